//! `tarazed checkpoint ls|show|verify|pin|unpin|gc`: looking after a store of checkpoints.
//!
//! Thin over the store crate, which keeps CKPT-1 to CKPT-6. Reading commands write nothing. `gc` claims the store as a new
//! controller would (CKPT-3), so it asks for a flag.

use super::left_behind::LeftBehind;
use crate::exit::{Exit, Failure};
use crate::output::{print, print_json};
use crate::plan::render;
use crate::run_folder::RunFolder;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;
use tarazed_domain::config::Config;
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_protocol::trace::NewLineage;
use tarazed_store::{
    CheckpointState, CheckpointStore, CheckpointSummary, Depth, GcReport, Restorable, Retention, Select, StoreError,
    Verdict, VerifyReport, WriterId,
};

/// `tarazed checkpoint …`; STORE is a run folder, a store's folder or its URL.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List checkpoints, newest first.
    Ls {
        /// Run folder, store folder or URL.
        store: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what one checkpoint holds.
    Show {
        /// Run folder, store folder or URL.
        store: String,
        /// Steps completed; the newest valid one where it is absent.
        #[arg(long)]
        step: Option<u64>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Check checkpoints against their hashes: exit code 0 if all are whole, 3 if any is not, 33 if any could not be read for now, 2
    /// if there is none.
    Verify {
        /// Run folder, store folder or URL.
        store: String,
        /// Only those of this step.
        #[arg(long)]
        step: Option<u64>,
        /// Check manifests by hash, and shards by presence and length only.
        #[arg(long)]
        quick: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Keep a checkpoint whatever is collected.
    Pin {
        /// Run folder, store folder or URL.
        store: String,
        /// Steps completed.
        #[arg(long)]
        step: u64,
        /// Why it is kept.
        #[arg(long, default_value = "")]
        note: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Lift a pin.
    Unpin {
        /// Run folder, store folder or URL.
        store: String,
        /// Steps completed.
        #[arg(long)]
        step: u64,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Delete the objects of all but the newest checkpoints and the pinned ones.
    Gc {
        /// Run folder, store folder or URL.
        store: String,
        /// Good checkpoints to keep, at least 1.
        #[arg(long, value_name = "N")]
        keep_last: u32,
        /// Also keep the first checkpoint at or after every multiple of this step; 0 for none.
        #[arg(long, value_name = "STEPS", default_value_t = 0)]
        keep_every_steps: u64,
        /// The run has ended: keep nothing for a rollback that it could still decide. Without this, one checkpoint stays that is
        /// as old as its `policy` may go back, and what a rollback that is decided goes back to, as far as the newest checkpoint knows.
        #[arg(long)]
        ended: bool,
        /// Claim the store: a run that still writes there halts. A run collects its own store by itself.
        #[arg(long)]
        claim: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command.
///
/// # Errors
/// By what the store says: refused, transient, or halted where a checkpoint is bad.
pub fn run(command: &Command) -> Result<Exit, Failure> {
    super::runtime()?.block_on(act(command))
}

async fn act(command: &Command) -> Result<Exit, Failure> {
    match command {
        Command::Ls { store, json } => {
            let store = open(store).await?;
            let list = store.list().await.map_err(failure)?;
            let known = LeftBehind::shown(&store, &list).await?;
            if *json {
                let listed = list.iter().map(|it| known.mark(it.reference.step, json!(it)));
                print_json(&listed.collect::<Vec<_>>())?
            } else {
                print(&table(&list, &known))?
            }
        }
        Command::Show { store, step, json } => show(store, step.map(StepsCompleted), *json).await?,
        Command::Verify {
            store,
            step,
            quick,
            json,
        } => {
            let select = step.map_or(Select::All, |step| Select::Step(StepsCompleted(step)));
            let depth = if *quick { Depth::Quick } else { Depth::Full };
            return verify(store, select, depth, *json).await;
        }
        Command::Pin {
            store,
            step,
            note,
            json,
        } => {
            let store = open(store).await?;
            let kept = store.pin(StepsCompleted(*step), note).await.map_err(failure)?;
            if *json {
                print_json(&json!({"reference": kept, "pinned": note}))?
            } else {
                print(&format!("step {} is kept (record {})\n", kept.step, kept.sequence))?
            }
        }
        Command::Unpin { store, step, json } => {
            let store = open(store).await?;
            let released = store.unpin(StepsCompleted(*step)).await.map_err(failure)?;
            if *json {
                print_json(&json!({"reference": released, "pinned": null}))?
            } else {
                print(&format!("step {} is no longer pinned\n", released.step))?
            }
        }
        Command::Gc {
            store,
            keep_last,
            keep_every_steps,
            ended,
            claim,
            json,
        } => {
            let retention = Retention {
                last: *keep_last,
                every_steps: *keep_every_steps,
                back_to: None,
            };
            let (back_to, report) = collect(store, retention, *ended, *claim).await?;
            say_collected(back_to, &report, *json)?;
        }
    }
    Ok(Exit::Done)
}

async fn show(place: &str, step: Option<StepsCompleted>, json: bool) -> Result<(), Failure> {
    let store = open(place).await?;
    let found = match step {
        Some(step) => store.at_step(step).await.map_err(failure)?,
        None => newest_live(&store).await?.ok_or_else(|| {
            Failure::refused(
                store.location(),
                "holds no valid checkpoint",
                "`checkpoint verify` says why",
            )
        })?,
    };
    for warning in &found.warnings {
        eprintln!("tarazed: {warning}");
    }
    let list = store.list().await.map_err(failure)?;
    let known = LeftBehind::shown(&store, &list).await?;
    if json {
        print_json(&described(&found, &known))
    } else {
        print(&details(&found, &known))
    }
}

async fn verify(place: &str, select: Select, depth: Depth, json: bool) -> Result<Exit, Failure> {
    let store = open(place).await?;
    // Before the hours of hashing: behind them nothing may fail any more that would take with it what they found.
    let list = store.list().await.map_err(failure)?;
    let known = LeftBehind::shown(&store, &list).await.unwrap_or_else(|unknown| {
        eprintln!("tarazed: what a rollback left behind is not known: {}", unknown.message);
        LeftBehind::default()
    });
    let report = store.verify(select, depth).await.map_err(failure)?;
    if report.checkpoints.is_empty() && report.chain_problems.is_empty() {
        return Err(none_committed(&store, report.records > 0));
    }
    if json {
        let verdicts = report.checkpoints.iter();
        let marked = verdicts.map(|verdict| known.mark(verdict.reference.step, json!(verdict)));
        let checkpoints: Vec<_> = marked.collect();
        print_json(&json!({"chain_problems": report.chain_problems, "checkpoints": checkpoints}))?
    } else {
        print(&verdicts(&report, &known))?
    }
    judge(&report)
}

/// Of no checkpoint nobody can say that it is good, or that it may go.
fn none_committed(store: &CheckpointStore, is_used: bool) -> Failure {
    if is_used {
        return Failure::refused(
            store.location(),
            "no checkpoint is committed yet",
            "train until the first one, or stop the run with SIGTERM, which makes one",
        );
    }
    Failure::refused(
        store.location(),
        "holds no record of any checkpoint",
        "check the path or the URL; if it is right, no run has used it yet, or all its objects were deleted, by a rule that expires \
         them for instance",
    )
}

/// Collects; as far as which step a rollback may still go, if one may, and what was done.
async fn collect(
    store: &str,
    retention: Retention,
    ended: bool,
    claim: bool,
) -> Result<(Option<StepsCompleted>, GcReport), Failure> {
    if !claim {
        return Err(Failure::refused(
            "--claim",
            "is missing: collecting claims the store, and a run that still writes there halts",
            "stop that run or leave it to collect its own store, then add --claim",
        ));
    }
    let store = open(store).await?;
    // A claim halts the run that holds the store, so whatever is to be refused is refused before.
    let list = store.list().await.map_err(failure)?;
    if list.is_empty() {
        let report = store.verify(Select::Newest, Depth::Quick).await.map_err(failure)?;
        judge(&report)?;
        return Err(none_committed(&store, report.records > 0));
    }
    LeftBehind::known(&store, &list).await?;
    let fence = store.claim(Generation(0)).await.map_err(failure)?;
    // What was committed until then counts, too.
    let list = store.list().await.map_err(failure)?;
    let known = LeftBehind::known(&store, &list).await?;
    let back_to = known.back_to().filter(|_| !ended);
    let retention = Retention { back_to, ..retention };
    let report = store.gc_of(&fence, retention, |step| known.is_live(step)).await;
    Ok((back_to, report.map_err(failure)?))
}

fn say_collected(back_to: Option<StepsCompleted>, report: &GcReport, json: bool) -> Result<(), Failure> {
    for warning in &report.warnings {
        eprintln!("tarazed: {warning}");
    }
    if json {
        let mut said = json!(report);
        said["back_to"] = json!(back_to);
        return print_json(&said);
    }
    let mut text = String::new();
    if let Some(step) = back_to {
        let _ = writeln!(
            text,
            "this run may still be rolled back as far as step {step}: what it then needs stays (--ended gives it up)"
        );
    }
    let _ = writeln!(
        text,
        "{} checkpoints kept, {} retired; {} objects deleted, {}",
        report.kept.len(),
        report.retired.len(),
        report.deleted_objects,
        render::bytes(report.deleted_bytes)
    );
    print(&text)
}

/// The newest valid checkpoint of a state that the run goes on from.
pub(crate) async fn newest_live(store: &CheckpointStore) -> Result<Option<Restorable>, Failure> {
    newest_live_where(store, |_| true).await
}

/// The same, at or before a step; STORE as on the command line.
pub(super) fn newest_at_or_before(place: &str, last: StepsCompleted) -> Result<Option<StepsCompleted>, Failure> {
    let found = async {
        let store = open(place).await?;
        newest_live_where(&store, |step| step <= last).await
    };
    let found = super::runtime()?.block_on(found)?;
    Ok(found.map(|found| found.reference.step))
}

async fn newest_live_where(
    store: &CheckpointStore,
    wanted: impl Fn(StepsCompleted) -> bool,
) -> Result<Option<Restorable>, Failure> {
    let list = store.list().await.map_err(failure)?;
    let known = LeftBehind::shown(store, &list).await?;
    let found = store.newest_valid_where(|step| wanted(step) && known.is_live(step));
    found.await.map_err(failure)
}

/// Opens the store of a run folder, or the store itself.
async fn open(place: &str) -> Result<CheckpointStore, Failure> {
    let run = RunFolder::new(place);
    let location = if Path::new(place).is_dir() && run.config().is_file() {
        let configured = Config::load(&run.config(), &[])?.checkpoint.store;
        if configured.is_empty() {
            run.store().display().to_string()
        } else {
            configured
        }
    } else {
        place.to_owned()
    };
    let writer = WriterId::fresh(Generation(0));
    CheckpointStore::open_existing(&location, writer).await.map_err(failure)
}

/// Tries a remote store before hours of work that would be in vain without it: whether it answers, lets this user in and
/// is fit. Its probes are gone afterwards. Folders, and the default, are tried where they are opened.
pub(crate) fn try_remote(location: &str) -> Result<(), Failure> {
    if !location.contains("://") || location.starts_with("file://") {
        return Ok(());
    }
    let tried = async {
        let store = CheckpointStore::open_existing(location, WriterId::fresh(Generation(0))).await?;
        store.self_test().await
    };
    super::runtime()?.block_on(tried).map_err(failure)
}

/// The exit code by what the caller does next.
pub(crate) fn failure(error: StoreError) -> Failure {
    let exit = match error {
        StoreError::Retry { .. } => Exit::Transient,
        StoreError::Full { .. } | StoreError::Corrupt { .. } | StoreError::Fenced { .. } => Exit::Halted,
        StoreError::Reconfigure { .. } | StoreError::NotFound { .. } | StoreError::Refused { .. } => Exit::Refused,
    };
    Failure {
        exit,
        message: error.to_string(),
    }
}

/// What is bad comes first: a person is needed whatever else could not be read.
fn judge(report: &VerifyReport) -> Result<Exit, Failure> {
    let count = |is: fn(&Verdict) -> bool| report.checkpoints.iter().filter(|verdict| is(verdict)).count();
    let bad = count(|verdict| !verdict.problems.is_empty());
    let unread = count(|verdict| !verdict.unread.is_empty());
    let chain = report.chain_problems.len();
    if bad > 0 || chain > 0 {
        let also = match unread {
            0 => String::new(),
            unread => format!(", {unread} not read to the end"),
        };
        return Err(Failure::halted(
            "checkpoints",
            format!("{bad} bad, {chain} problems in the chain of records{also}"),
            "a run restores the newest good one by itself; find out what changed the objects",
        ));
    }
    if unread > 0 {
        let mut causes = report.checkpoints.iter().flat_map(|verdict| &verdict.unread);
        // Where all of it waits for somebody's hand, the same again does no better.
        let may_pass = causes.any(|cause| matches!(cause, StoreError::Retry { .. }));
        let exit = if may_pass { Exit::Transient } else { Exit::Refused };
        let cause = format!("{unread} not read to the end, none of the others bad");
        let remedy = "what is said of each object says what to do; then verify again";
        return Err(Failure::new(exit, "checkpoints", cause, remedy));
    }
    if !report.checkpoints.is_empty() && report.checkpoints.iter().all(|verdict| verdict.retired) {
        let cause = "each was retired by its run while it was verified";
        let remedy = "verify again: newer ones are there";
        return Err(Failure::transient("checkpoints", cause, remedy));
    }
    Ok(Exit::Done)
}

fn table(list: &[CheckpointSummary], known: &LeftBehind) -> String {
    let mut text = format!(
        "{:>10} {:>10} {:>7} {:>9}  {:<10} pinned\n",
        "step", "generation", "shards", "size", "state"
    );
    for checkpoint in list {
        let state = match checkpoint.state {
            CheckpointState::Committed if !known.is_live(checkpoint.reference.step) => "abandoned",
            CheckpointState::Committed => "committed",
            CheckpointState::Retired => "retired",
        };
        let row = format!(
            "{:>10} {:>10} {:>7} {:>9}  {state:<10} {}",
            checkpoint.reference.step,
            checkpoint.generation,
            checkpoint.shard_count,
            render::bytes(checkpoint.shard_bytes),
            checkpoint.pinned.as_deref().unwrap_or("")
        );
        let _ = writeln!(text, "{}", row.trim_end());
    }
    text
}

fn verdicts(report: &VerifyReport, known: &LeftBehind) -> String {
    let mut text = String::new();
    for problem in &report.chain_problems {
        let _ = writeln!(text, "chain: {problem}");
    }
    for verdict in &report.checkpoints {
        let unread = verdict.unread.iter().map(|cause| format!("not read: {cause}"));
        let found: Vec<String> = verdict.problems.iter().cloned().chain(unread).collect();
        let state = match found.as_slice() {
            [] if verdict.retired => "retired by its run while it was verified".to_owned(),
            [] => "whole".to_owned(),
            found => found.join("; "),
        };
        let hashed = render::bytes(verdict.bytes_hashed);
        let step = verdict.reference.step;
        let fate = known.fate(step).map(|fate| format!("; {fate}")).unwrap_or_default();
        let _ = writeln!(text, "step {step}: {state} ({hashed} of shards hashed){fate}");
    }
    text
}

fn details(found: &Restorable, known: &LeftBehind) -> String {
    let manifest = &found.manifest;
    let mut text = String::new();
    let _ = writeln!(text, "step {}, generation {}", manifest.step, manifest.generation);
    if let Some(fate) = known.fate(manifest.step) {
        let _ = writeln!(text, "{fate}");
    }
    if let Some(steps) = manifest.rollback_reach_steps {
        let _ = writeln!(text, "the run's policy may go back {steps} steps");
    }
    let _ = writeln!(
        text,
        "{} blocks of {} elements in {} shards, {}",
        manifest.block_count,
        manifest.block_elements,
        manifest.shard_count,
        render::bytes(manifest.shard_bytes())
    );
    let _ = writeln!(
        text,
        "manifest {}\nrun    {}\nlayout {}\ndata   {}",
        found.object.blake3, manifest.run, manifest.layout, manifest.data
    );
    let trace = &manifest.trace_head;
    let _ = writeln!(
        text,
        "trace  {} ({} bytes to step {})",
        trace.blake3, trace.length_bytes, trace.step
    );
    let program = &manifest.binary;
    let _ = writeln!(
        text,
        "written by version {} (build {}) on {}",
        program.version, program.build, manifest.device_type
    );
    if let Some(from) = &manifest.lineage.restored_from {
        let _ = writeln!(text, "restored from step {} (record {})", from.step, from.sequence);
    }
    if !manifest.lineage.declared.is_empty() {
        let declared = &manifest.lineage.declared;
        let shown =
            serde_json::from_str::<NewLineage>(declared).map_or_else(|_| declared.clone(), |known| known.to_string());
        let _ = writeln!(text, "new lineage: {shown}");
    }
    for shard in &manifest.shards {
        let _ = writeln!(
            text,
            "shard {:>4}: blocks {}..{}, {} ({}), {}",
            shard.shard,
            shard.first_block,
            shard.first_block + shard.block_count,
            shard.object.key,
            render::bytes(shard.object.length),
            shard.object.blake3
        );
    }
    text
}

/// The same and more in JSON (docs/FORMATS.md).
fn described(found: &Restorable, known: &LeftBehind) -> Value {
    let manifest = &found.manifest;
    let lineage = &manifest.lineage;
    let declared = match lineage.declared.as_str() {
        "" => Value::Null,
        declared => serde_json::from_str(declared).unwrap_or_else(|_| json!(declared)),
    };
    let said = json!({
        "reference": found.reference,
        "manifest": found.object,
        "generation": manifest.generation,
        "writer": manifest.writer.nonce,
        "run": manifest.run,
        "layout": manifest.layout,
        "data": manifest.data,
        "block_elements": manifest.block_elements,
        "block_count": manifest.block_count,
        "shard_count": manifest.shard_count,
        "shard_bytes": manifest.shard_bytes(),
        "shards": manifest.shards,
        "trace_head": manifest.trace_head,
        "binary": manifest.binary,
        "device_type": manifest.device_type,
        "parent": lineage.parent,
        "restored_from": lineage.restored_from,
        "new_lineage": declared,
        "created_unix_ms": manifest.created_unix_ms,
        "rollback_reach_steps": manifest.rollback_reach_steps,
        "warnings": found.warnings,
    });
    known.mark(manifest.step, said)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tarazed_store::{CommitRef, Digest};

    #[test]
    fn a_full_store_halts_and_a_silent_one_is_worth_a_retry() {
        let (key, cause) = ("commits/1".to_owned(), "No space left on device".to_owned());
        let full = StoreError::Full {
            location: "runs/a/store".to_owned(),
            key: key.clone(),
            cause: cause.clone(),
        };
        let full = failure(full);
        assert!(
            full.exit == Exit::Halted && full.message.contains("free space"),
            "{full}"
        );
        let silent = StoreError::Retry {
            operation: "write",
            key,
            cause,
        };
        assert_eq!(failure(silent).exit, Exit::Transient);
    }

    fn verdict(step: u64) -> Verdict {
        Verdict {
            reference: CommitRef {
                sequence: step,
                step: StepsCompleted(step),
                record: Digest::of(b"record"),
            },
            problems: Vec::new(),
            unread: Vec::new(),
            retired: false,
            bytes_hashed: 0,
        }
    }

    fn unanswered() -> StoreError {
        StoreError::Retry {
            operation: "read",
            key: "shards/a".to_owned(),
            cause: "no answer".to_owned(),
        }
    }

    fn refused() -> StoreError {
        StoreError::Reconfigure {
            location: "s3://bucket/run".to_owned(),
            cause: "read shards/b: 403 Forbidden".to_owned(),
            remedy: "check the credentials".to_owned(),
        }
    }

    /// CKPT-4: what is bad is never hidden by what could not be read, and what could not be read is no good checkpoint.
    #[test]
    fn a_verification_ends_with_the_worst_that_it_found() {
        let bad = || Verdict {
            problems: vec!["shards/c: 7 bytes instead of 9".to_owned()],
            ..verdict(30)
        };
        let unread = |causes: &[StoreError]| Verdict {
            unread: causes.to_vec(),
            ..verdict(20)
        };
        let retired = || Verdict {
            retired: true,
            ..verdict(10)
        };
        for (checkpoints, exit) in [
            (vec![verdict(40)], Exit::Done),
            (vec![verdict(40), retired()], Exit::Done),
            (vec![retired()], Exit::Transient),
            (vec![verdict(40), unread(&[unanswered()])], Exit::Transient),
            (vec![unread(&[refused(), unanswered()])], Exit::Transient),
            (vec![verdict(40), unread(&[refused()])], Exit::Refused),
            (vec![unread(&[unanswered()]), bad()], Exit::Halted),
        ] {
            let report = VerifyReport {
                records: 9,
                chain_problems: Vec::new(),
                checkpoints,
            };
            let ended = judge(&report).unwrap_or_else(|failure| failure.exit);
            assert_eq!(ended, exit, "{report:?}");
            let damaged = VerifyReport {
                chain_problems: vec!["commits/3: missing".to_owned()],
                ..report
            };
            let ended = judge(&damaged).unwrap_or_else(|failure| failure.exit);
            assert_eq!(ended, Exit::Halted, "{damaged:?}");
        }
    }

    /// One line says all of its checkpoint, in the table; in JSON each kind has its key.
    #[test]
    fn what_is_bad_and_what_is_unread_are_told_apart() {
        let torn = Verdict {
            problems: vec!["shards/c: 7 bytes instead of 9".to_owned()],
            unread: vec![unanswered()],
            ..verdict(30)
        };
        let gone = Verdict {
            retired: true,
            ..verdict(20)
        };
        let report = VerifyReport {
            records: 3,
            chain_problems: Vec::new(),
            checkpoints: vec![torn, gone],
        };
        let table = verdicts(&report, &LeftBehind::default());
        let lines: Vec<&str> = table.lines().collect();
        let torn = "step 30: shards/c: 7 bytes instead of 9; not read: read shards/a: no answer";
        assert!(lines[0].starts_with(torn), "{table}");
        assert!(
            lines[1].starts_with("step 20: retired by its run while it was verified"),
            "{table}"
        );
        let listed = json!(report.checkpoints);
        assert_eq!(listed[0]["unread"], json!([unanswered().to_string()]), "{listed}");
        assert_eq!(listed[0]["problems"][0], "shards/c: 7 bytes instead of 9", "{listed}");
        let retired = [&listed[0]["retired"], &listed[1]["retired"]];
        assert_eq!(retired, [&json!(false), &json!(true)], "{listed}");
    }
}
