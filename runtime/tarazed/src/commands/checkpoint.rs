//! `tarazed checkpoint ls|show|verify|pin|unpin|gc`: looking after a store of checkpoints.
//!
//! Thin over the store crate, which keeps CKPT-1 to CKPT-6. Reading commands write nothing. `gc` claims the store as a new
//! controller would (CKPT-3), so it asks for a flag.

use crate::exit::{Exit, Failure};
use crate::output::{print, print_json};
use crate::plan::render;
use crate::run_folder::RunFolder;
use std::fmt::Write as _;
use std::path::Path;
use tarazed_domain::config::Config;
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_protocol::data::decision::Decision;
use tarazed_protocol::rollback::Rollbacks;
use tarazed_protocol::trace::NewLineage;
use tarazed_store::{
    CheckpointState, CheckpointStore, CheckpointSummary, Depth, Manifest, Restorable, Retention, Select, StoreError,
    VerifyReport, WriterId,
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
    },
    /// Check checkpoints against their hashes: exit code 0 if all is whole, 3 if not.
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
    },
    /// Lift a pin.
    Unpin {
        /// Run folder, store folder or URL.
        store: String,
        /// Steps completed.
        #[arg(long)]
        step: u64,
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
        /// Claim the store: a run that still writes there halts. A run collects its own store by itself.
        #[arg(long)]
        claim: bool,
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
            if *json {
                print_json(&list)?
            } else {
                print(&table(&list, &rollbacks(&store, &list).await?))?
            }
        }
        Command::Show { store, step } => {
            let store = open(store).await?;
            let found = match step {
                Some(step) => store.at_step(StepsCompleted(*step)).await.map_err(failure)?,
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
            print(&details(&found.manifest))?;
        }
        Command::Verify {
            store,
            step,
            quick,
            json,
        } => {
            let select = step.map_or(Select::All, |step| Select::Step(StepsCompleted(step)));
            let depth = if *quick { Depth::Quick } else { Depth::Full };
            let report = open(store).await?.verify(select, depth).await.map_err(failure)?;
            if *json {
                print_json(&report)?
            } else {
                print(&verdicts(&report))?
            }
            return judge(&report);
        }
        Command::Pin { store, step, note } => {
            let reference = open(store)
                .await?
                .pin(StepsCompleted(*step), note)
                .await
                .map_err(failure)?;
            print(&format!(
                "step {} is kept (record {})\n",
                reference.step, reference.sequence
            ))?;
        }
        Command::Unpin { store, step } => {
            let reference = open(store).await?.unpin(StepsCompleted(*step)).await.map_err(failure)?;
            print(&format!("step {} is no longer pinned\n", reference.step))?;
        }
        Command::Gc {
            store,
            keep_last,
            keep_every_steps,
            claim,
        } => {
            let retention = Retention {
                last: *keep_last,
                every_steps: *keep_every_steps,
                back_to: None,
            };
            return collect(store, retention, *claim).await;
        }
    }
    Ok(Exit::Done)
}

async fn collect(store: &str, retention: Retention, claim: bool) -> Result<Exit, Failure> {
    if !claim {
        return Err(Failure::refused(
            "--claim",
            "is missing: collecting claims the store, and a run that still writes there halts",
            "stop that run or leave it to collect its own store, then add --claim",
        ));
    }
    let store = open(store).await?;
    let fence = store.claim(Generation(0)).await.map_err(failure)?;
    let list = store.list().await.map_err(failure)?;
    let rollbacks = rollbacks(&store, &list).await?;
    let live = |step| rollbacks.is_live(step);
    let report = store.gc_of(&fence, retention, live).await.map_err(failure)?;
    for warning in &report.warnings {
        eprintln!("tarazed: {warning}");
    }
    print(&format!(
        "{} checkpoints kept, {} retired; {} objects deleted, {}\n",
        report.kept.len(),
        report.retired.len(),
        report.deleted_objects,
        render::bytes(report.deleted_bytes)
    ))?;
    Ok(Exit::Done)
}

/// The newest valid checkpoint of a state that the run goes on from.
pub(crate) async fn newest_live(store: &CheckpointStore) -> Result<Option<Restorable>, Failure> {
    let list = store.list().await.map_err(failure)?;
    let rollbacks = rollbacks(store, &list).await?;
    let live = |step| rollbacks.is_live(step);
    store.newest_valid_where(live).await.map_err(failure)
}

/// Rollbacks that have acted, as far as checkpoints know: by the decisions in the one that is furthest on.
async fn rollbacks(store: &CheckpointStore, list: &[CheckpointSummary]) -> Result<Rollbacks, Failure> {
    let committed = list.iter().filter(|it| it.state == CheckpointState::Committed);
    let mut steps: Vec<StepsCompleted> = committed.map(|it| it.reference.step).collect();
    steps.sort_unstable();
    steps.dedup();
    for step in steps.into_iter().rev() {
        match store.at_step(step).await {
            Ok(found) => {
                let decisions: Vec<Decision> = serde_json::from_slice(&found.manifest.decisions).unwrap_or_default();
                // One that would act right behind it did so only if the run went on from there, which a later one would show.
                return Ok(Rollbacks::of(&decisions).acted(StepsCompleted(step.0.saturating_sub(1))));
            }
            Err(error @ StoreError::Retry { .. }) => return Err(failure(error)),
            Err(_) => {} // whoever needs it says what is wrong with it
        }
    }
    Ok(Rollbacks::default())
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

fn judge(report: &VerifyReport) -> Result<Exit, Failure> {
    let bad = report
        .checkpoints
        .iter()
        .filter(|verdict| !verdict.problems.is_empty())
        .count();
    if report.is_clean() {
        return Ok(Exit::Done);
    }
    Err(Failure::halted(
        "checkpoints",
        format!(
            "{bad} bad, {} problems in the chain of records",
            report.chain_problems.len()
        ),
        "a run restores the newest good one by itself; find out what changed the objects",
    ))
}

fn table(list: &[CheckpointSummary], rollbacks: &Rollbacks) -> String {
    let mut text = format!(
        "{:>10} {:>10} {:>7} {:>9}  {:<10} pinned\n",
        "step", "generation", "shards", "size", "state"
    );
    for checkpoint in list {
        let state = match checkpoint.state {
            CheckpointState::Committed if !rollbacks.is_live(checkpoint.reference.step) => "abandoned",
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

fn verdicts(report: &VerifyReport) -> String {
    let mut text = String::new();
    for problem in &report.chain_problems {
        let _ = writeln!(text, "chain: {problem}");
    }
    for verdict in &report.checkpoints {
        let state = if verdict.problems.is_empty() {
            "whole".to_owned()
        } else {
            verdict.problems.join("; ")
        };
        let hashed = render::bytes(verdict.bytes_hashed);
        let _ = writeln!(
            text,
            "step {}: {state} ({hashed} of shards hashed)",
            verdict.reference.step
        );
    }
    text
}

fn details(manifest: &Manifest) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "step {}, generation {}", manifest.step, manifest.generation);
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
        "run    {}\nlayout {}\ndata   {}",
        manifest.run, manifest.layout, manifest.data
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
