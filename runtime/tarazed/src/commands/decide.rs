//! `tarazed decide`: a person pins, vetoes or forces a decision of a live run (LOOP-2).
//!
//! What is asked for becomes a decision of the run's next decision point, with the person's name and reason in the trace.
//! It is refused at once where it contradicts the config, what is decided, or what somebody else asked for before.

use super::status::ask_for;
use crate::exit::{Exit, Failure};
use crate::output::print;
use crate::run_folder::RunFolder;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tarazed_actors::run_folder::lines_after;
use tarazed_domain::config::Config;
use tarazed_domain::{StepIndex, StepsCompleted};
use tarazed_protocol::data::decision::{Decision, domain_names};

/// Options of `tarazed decide`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder.
    #[arg(value_name = "RUN_DIR")]
    run_dir: PathBuf,
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
/// Refused where no controller is live, or with the reason why the decision cannot stand.
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
    };
    let request = json!({
        "command": "decide",
        "kind": kind,
        "person": signature.signer.person()?,
        "reason": signature.signer.reason,
        "not_before": signature.from_step,
    });
    send(&folder, request)?;
    Ok(Exit::Done)
}

/// Asks the live run for a decision, and tells which line will hold it.
pub(super) fn send(folder: &RunFolder, request: Value) -> Result<(), Failure> {
    let Some(answer) = ask_for(folder, request)? else {
        return Err(not_live(folder));
    };
    let number = |key: &str| answer.get(key).and_then(Value::as_u64).unwrap_or_default();
    print(&format!(
        "line {} of the trace will hold it, and it acts from step {} on; `tarazed trace show` shows it then\n",
        number("line"),
        number("effective")
    ))
}

/// Only a live run can be told anything.
pub(super) fn not_live(folder: &RunFolder) -> Failure {
    Failure::refused(
        folder.dir().display(),
        "is no live run",
        "decisions are made while it trains: start it with `tarazed train …`",
    )
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

/// One weight for each domain; nothing for those that are left out.
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
