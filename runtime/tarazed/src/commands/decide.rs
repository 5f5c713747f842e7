//! `tarazed decide`: a person pins, vetoes or forces a decision of a live run (LOOP-2).
//!
//! What is asked for becomes a decision of the run's next decision point, with the person's name and reason in the trace.
//! It is refused at once where it contradicts the config, what is decided, or what somebody else asked for before.
//!
//! Until then it waits in the controller's memory, and is lost with it. So the command waits for the line that was promised, and
//! says what that line holds: the trace alone says what is decided.

use super::status::ask_for;
use crate::exit::{Exit, Failure};
use crate::output::{print, short};
use crate::run_folder::RunFolder;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tarazed_actors::run_folder::lines_after;
use tarazed_domain::config::Config;
use tarazed_domain::{StepIndex, StepsCompleted};
use tarazed_protocol::data::decision::{Decision, DecisionAuthor, DecisionKind, domain_names};
use tarazed_protocol::trace::TraceLine;

/// Between two looks at the trace.
const LOOK: Duration = Duration::from_millis(200);
/// A line of the trace is hardly longer.
const LINE_BYTES_USUAL: u64 = 64 * 1024;
/// Between two questions whether a controller is there.
const ASK: Duration = Duration::from_secs(1);

/// Options of `tarazed decide`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder.
    #[arg(value_name = "RUN_DIR")]
    run_dir: PathBuf,
    /// Do not wait for the line that will hold it: until that is written, the request is lost if the controller ends.
    #[arg(long)]
    no_wait: bool,
    /// What to decide.
    #[command(subcommand)]
    what: What,
}

/// What a person can decide.
#[derive(Debug, clap::Subcommand)]
pub enum What {
    /// The controller changes the mixture no more, until `release`.
    Pin(Signature),
    /// The controller sets the mixture again.
    Release(Signature),
    /// Take back the decision with this number: it never acts, or what was before it is in force again.
    Veto {
        /// Its `id` in the trace.
        id: u64,
        /// Who decides, and why.
        #[command(flatten)]
        signature: Signature,
    },
    /// Set something, whatever the controller says.
    #[command(subcommand)]
    Force(Force),
}

/// What a person can set.
#[derive(Debug, clap::Subcommand)]
pub enum Force {
    /// A mixture: `web=0.5 wiki=0.3`; domains that are left out get nothing. Those that `tarazed data add` brought count.
    Mixture {
        /// Weight by domain; only their ratios count.
        #[arg(required = true, value_name = "DOMAIN=WEIGHT")]
        weights: Vec<String>,
        /// Who decides, and why.
        #[command(flatten)]
        signature: Signature,
    },
    /// The learning rate: so many times that of the config's schedule.
    Rate {
        /// Positive, e.g. 0.5.
        factor: f64,
        /// Who decides, and why.
        #[command(flatten)]
        signature: Signature,
    },
    /// The decay of a `wsd` schedule.
    Decay(Signature),
    /// The end of the run, with a last checkpoint.
    Stop(Signature),
    /// Training goes on from an older state, with the data behind: what was trained on since is skipped. It cannot be vetoed.
    Rollback {
        /// The state after this many steps.
        #[arg(long, value_name = "STEP")]
        to: u64,
        /// The newest checkpoint at or before that instead: no step is done again.
        #[arg(long)]
        at_checkpoint: bool,
        /// Who decides, and why.
        #[command(flatten)]
        signature: Signature,
    },
}

/// Who decides, why, and from when on.
#[derive(Debug, clap::Args)]
pub struct Signature {
    /// Who and why.
    #[command(flatten)]
    signer: Signer,
    /// Act at this step (from 0) at the earliest.
    #[arg(long, value_name = "STEP")]
    from_step: Option<u64>,
}

/// Who decides, and why.
#[derive(Debug, clap::Args)]
pub struct Signer {
    /// Why: it stands in the trace for ever.
    #[arg(long, value_name = "TEXT")]
    pub(super) reason: String,
    /// Who; the name of the system's user where it is absent.
    #[arg(long, value_name = "NAME")]
    by: Option<String>,
}

impl Signer {
    pub(super) fn person(&self) -> Result<String, Failure> {
        let name = self.by.clone().or_else(|| std::env::var("USER").ok());
        name.filter(|name| !name.is_empty()).ok_or_else(|| {
            Failure::refused(
                "--by",
                "says nothing, and neither does USER",
                "give your name: it stands in the trace",
            )
        })
    }
}

/// Runs the command.
///
/// # Errors
/// Refused where no controller is live, or with the reason why the decision cannot stand; transient where it was lost before it
/// stood in the trace.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    let folder = RunFolder::find(Some(&args.run_dir), Path::new("runs"))?;
    let (kind, signature) = match &args.what {
        What::Pin(signature) => (json!("pin"), signature),
        What::Release(signature) => (json!("release"), signature),
        What::Veto { id, signature } => (json!({"veto": {"decision": id}}), signature),
        What::Force(Force::Mixture { weights, signature }) => {
            let weights = mixture(&domains(&folder, &config(&folder)?)?, weights)?;
            (json!({"mixture": {"weights": weights}}), signature)
        }
        What::Force(Force::Rate { factor, signature }) => (json!({"learning_rate": {"factor": factor}}), signature),
        What::Force(Force::Decay(signature)) => (json!("decay"), signature),
        What::Force(Force::Stop(signature)) => (json!("stop"), signature),
        What::Force(Force::Rollback {
            to,
            at_checkpoint,
            signature,
        }) => {
            let to = if *at_checkpoint {
                checkpoint_before(&folder, *to)?
            } else {
                *to
            };
            // What is discarded the run says.
            (json!({"rollback": {"to": to, "discarded": []}}), signature)
        }
    };
    send(&folder, kind, &signature.signer, signature.from_step, args.no_wait)?;
    Ok(Exit::Done)
}

/// Asks the live run for a decision, tells which line will hold it, and waits for that line unless `no_wait`.
pub(super) fn send(
    folder: &RunFolder,
    kind: Value,
    signer: &Signer,
    not_before: Option<u64>,
    no_wait: bool,
) -> Result<(), Failure> {
    let person = signer.person()?;
    let request = json!({
        "command": "decide",
        "kind": kind,
        "person": person,
        "reason": signer.reason,
        "not_before": not_before,
    });
    // Whatever is written from here on is looked at.
    let mut tail = Tail::at_end(folder.trace())?;
    let Some(answer) = ask_for(folder, request)? else {
        return Err(not_live(folder));
    };
    let number = |key: &str| answer.get(key).and_then(Value::as_u64).unwrap_or_default();
    let (line, effective) = (StepsCompleted(number("line")), number("effective"));
    print(&format!(
        "waits in the controller's memory for line {line} of the trace, to act from step {effective} on{}\n",
        if no_wait {
            "; it is lost if the controller ends before: `tarazed trace show` shows it once it is decided"
        } else {
            ""
        }
    ))?;
    if no_wait {
        return Ok(());
    }
    let asked = Asked {
        kind: serde_json::from_value(kind).map_err(|e| Failure::halted("the request", e, "report this as a bug"))?,
        by: DecisionAuthor::Person(person),
        reason: &signer.reason,
    };
    let decided = wait(folder, &mut tail, line, &asked)?;
    print(&format!(
        "decided: number {} in line {line}, it acts from step {} on\n",
        decided.id, decided.effective
    ))
}

/// The step of the newest checkpoint, at or before this one, that the run can go back to.
fn checkpoint_before(folder: &RunFolder, step: u64) -> Result<u64, Failure> {
    let place = folder.dir().display().to_string();
    let found = super::checkpoint::newest_at_or_before(&place, StepsCompleted(step))?;
    let found = found.ok_or_else(|| {
        Failure::refused(
            format!("--to {step} --at-checkpoint"),
            "names no checkpoint: there is none at or before that step that training can go on from",
            "`tarazed checkpoint ls` shows what there is; without --at-checkpoint the steps to that state are done again",
        )
    })?;
    print(&format!("to the checkpoint of step {found}\n"))?;
    Ok(found.0)
}

/// Only a live run can be told anything.
pub(super) fn not_live(folder: &RunFolder) -> Failure {
    Failure::refused(
        folder.dir().display(),
        "is no live run",
        "decisions are made while it trains: start it with `tarazed train …`",
    )
}

/// What a decision is known by.
struct Asked<'a> {
    kind: DecisionKind,
    by: DecisionAuthor,
    reason: &'a str,
}

impl Asked<'_> {
    fn is(&self, decision: &Decision) -> bool {
        let is_kind = match (&decision.kind, &self.kind) {
            // Domains that come after its step have no place in a mixture; they were asked for with nothing, or it was refused.
            (DecisionKind::Mixture { weights }, DecisionKind::Mixture { weights: asked }) => {
                let (both, later) = asked.split_at(weights.len().min(asked.len()));
                weights == both && later.iter().all(|weight| *weight == 0.0)
            }
            // Shares of new domains are settled by the run.
            (DecisionKind::Data(change), DecisionKind::Data(asked)) => {
                (&change.version, &change.domains) == (&asked.version, &asked.domains)
                    && (change.weights == asked.weights || !asked.states_mixture())
            }
            (DecisionKind::Rollback { to, .. }, DecisionKind::Rollback { to: asked, .. }) => to == asked,
            (kind, asked) => kind == asked,
        };
        is_kind && (&decision.by, decision.reason.as_str()) == (&self.by, self.reason)
    }
}

/// Waits for a line of the trace, or for the end of whoever would write it, and returns the decision that was asked for.
fn wait(folder: &RunFolder, tail: &mut Tail, line: StepsCompleted, asked: &Asked<'_>) -> Result<Decision, Failure> {
    let lost = |cause: String| {
        Failure::transient(
            short(folder.dir()).display(),
            format!("the request is lost: {cause}"),
            "nothing was decided; ask again",
        )
    };
    let mut asked_last = Instant::now();
    let mut is_alone = false;
    loop {
        if let Some(found) = tail.find(line)? {
            let decision = found.decisions.into_iter().find(|decision| asked.is(decision));
            return decision.ok_or_else(|| {
                lost(format!(
                    "line {line} does not hold it; the controller that was asked has ended, or something else was decided before it"
                ))
            });
        }
        if is_alone {
            return Err(lost(format!("the controller ended before line {line}")));
        }
        std::thread::sleep(LOOK);
        if asked_last.elapsed() >= ASK {
            // The trace is looked at once more: its last line may be younger than that look. A controller that starts or is busy
            // answers with an error, and is there.
            is_alone = matches!(ask_for(folder, json!({"command": "status"})), Ok(None));
            asked_last = Instant::now();
        }
    }
}

/// The lines that a trace gets from now on.
struct Tail {
    path: PathBuf,
    /// Behind the last whole line that was read. What is torn behind it a new controller takes back.
    read: u64,
}

impl Tail {
    fn at_end(path: PathBuf) -> Result<Self, Failure> {
        let length = std::fs::metadata(&path).map_or(0, |m| m.len());
        let mut tail = Self { path, read: length };
        let mut window = LINE_BYTES_USUAL;
        loop {
            let from = length.saturating_sub(window);
            tail.read = from;
            let whole = whole(&tail.rest()?).len() as u64;
            if whole > 0 || from == 0 {
                tail.read = from + whole;
                return Ok(tail);
            }
            window *= 2;
        }
    }

    fn rest(&self) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        let read = File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.read))?;
            file.read_to_end(&mut bytes)
        });
        match read {
            // Not there yet, or just between two names.
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Failure::transient(
                self.path.display(),
                format!("cannot be read ({e})"),
                "`tarazed trace show` shows what is decided",
            )),
            _ => Ok(bytes),
        }
    }

    /// The line of this step, if it has come since the last look.
    fn find(&mut self, step: StepsCompleted) -> Result<Option<TraceLine>, Failure> {
        let bytes = self.rest()?;
        let whole = whole(&bytes);
        self.read += whole.len() as u64;
        for text in String::from_utf8_lossy(whole).lines() {
            let line = TraceLine::parse(text, 0).map_err(|e| {
                Failure::halted(
                    self.path.display(),
                    e,
                    "use the same version of tarazed as the run; `tarazed trace show` shows what is decided",
                )
            })?;
            if line.step == step {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }
}

/// Whole lines.
fn whole(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    &bytes[..end]
}

/// The run's config.
pub(super) fn config(folder: &RunFolder) -> Result<Config, Failure> {
    Config::load(&folder.config(), &[]).map_err(|e| {
        Failure::refused(
            folder.config().display(),
            format!("cannot be read ({e})"),
            "name the folder of a run",
        )
    })
}

/// The run's domains by all that its trace holds, in the order of its mixtures.
pub(super) fn domains(folder: &RunFolder, config: &Config) -> Result<Vec<String>, Failure> {
    let first: Vec<String> = config.data.domains.iter().map(|domain| domain.name.clone()).collect();
    let trace = folder.trace();
    if !trace.exists() {
        return Ok(first);
    }
    let lines = lines_after(&trace, StepsCompleted(0))
        .map_err(|e| Failure::refused(trace.display(), e.to_string(), "name the folder of a run"))?;
    let decisions: Vec<Decision> = lines.into_iter().flat_map(|line| line.decisions).collect();
    Ok(domain_names(&first, &decisions, StepIndex(u64::MAX)))
}

/// One weight for each domain.
pub(super) fn mixture(domains: &[String], items: &[String]) -> Result<Vec<f64>, Failure> {
    let refused = |item: &str, reason: &str| {
        let remedy = format!("write DOMAIN=WEIGHT; the domains are {}", domains.join(", "));
        Failure::refused(item, reason, remedy)
    };
    let mut weights = vec![None; domains.len()];
    for item in items {
        let Some((name, weight)) = item.split_once('=') else {
            return Err(refused(item, "has no '='"));
        };
        let Some(index) = domains.iter().position(|domain| domain == name) else {
            return Err(refused(item, "names no domain of this run"));
        };
        let weight: f64 = weight
            .parse()
            .map_err(|_| refused(item, "has no number behind the '='"))?;
        if !(weight.is_finite() && weight >= 0.0) {
            return Err(refused(item, "is no weight"));
        }
        if weights[index].replace(weight).is_some() {
            return Err(refused(item, "names its domain again"));
        }
    }
    Ok(weights.into_iter().map(Option::unwrap_or_default).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The end of a trace is behind its last whole line, however long lines are; what is torn there and written anew is read.
    #[test]
    fn a_tail_begins_behind_the_last_whole_line() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("trace.jsonl");
        assert_eq!(Tail::at_end(path.clone()).expect("no trace yet").read, 0);
        for (text, end) in [
            (String::new(), 0),
            ("torn".to_owned(), 0),
            ("a\nb\n".to_owned(), 4),
            ("a\nb\ntorn".to_owned(), 4),
            (format!("a\n{}", "x".repeat(300_000)), 2),
            (format!("{}\n", "x".repeat(300_000)), 300_001),
        ] {
            std::fs::write(&path, &text).expect("written");
            let mut tail = Tail::at_end(path.clone()).expect("a trace");
            assert_eq!(tail.read, end);
            assert_eq!(tail.find(StepsCompleted(1)).expect("no whole line"), None);
            assert_eq!(tail.read, end);
        }
        std::fs::write(&path, "").expect("written");
        let mut tail = Tail::at_end(path.clone()).expect("a trace");
        std::fs::write(&path, "not a line\n").expect("written");
        assert!(tail.find(StepsCompleted(1)).is_err());
    }

    /// A domain that comes later is left out of a mixture that acts before it.
    #[test]
    fn a_mixture_is_known_without_later_domains() {
        let mixture = |weights: &[f64]| DecisionKind::Mixture {
            weights: weights.to_vec(),
        };
        let by = DecisionAuthor::Person("ada".to_owned());
        let asked = Asked {
            kind: mixture(&[1.0, 2.0, 0.0]),
            by: by.clone(),
            reason: "a test",
        };
        let decided = |kind: DecisionKind, reason: &str| Decision {
            id: tarazed_protocol::data::decision::DecisionId(1),
            line: StepsCompleted(8),
            effective: StepIndex(12),
            kind,
            by: by.clone(),
            reason: reason.to_owned(),
        };
        assert!(asked.is(&decided(mixture(&[1.0, 2.0]), "a test")));
        assert!(asked.is(&decided(mixture(&[1.0, 2.0, 0.0]), "a test")));
        for (kind, reason) in [
            (mixture(&[1.0]), "a test"),
            (mixture(&[1.0, 3.0]), "a test"),
            (mixture(&[1.0, 2.0, 0.0, 0.0]), "a test"),
            (mixture(&[1.0, 2.0]), "another"),
            (DecisionKind::Pin, "a test"),
        ] {
            assert!(!asked.is(&decided(kind.clone(), reason)), "{kind:?} {reason}");
        }
    }

    #[test]
    fn a_mixture_is_one_weight_for_each_domain_in_their_order() {
        let domains = ["web", "wiki", "code"].map(str::to_owned);
        let of = |items: &[&str]| {
            let items: Vec<String> = items.iter().map(|item| (*item).to_owned()).collect();
            mixture(&domains, &items).map_err(|failure| failure.to_string())
        };
        assert_eq!(of(&["code=2", "web=0.5"]), Ok(vec![0.5, 0.0, 2.0]));
        for (items, problem) in [
            (&["web"][..], "no '='"),
            (&["book=1"], "no domain"),
            (&["web=much"], "no number"),
            (&["web=-1"], "no weight"),
            (&["web=NaN"], "no weight"),
            (&["web=1", "web=2"], "again"),
        ] {
            let refused = of(items).expect_err("refused");
            assert!(
                refused.contains(problem) && refused.contains("web, wiki, code"),
                "{refused}"
            );
        }
    }
}
