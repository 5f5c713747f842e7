//! What a store's checkpoints know of rollbacks: which of them are of states that training does not go on from, and how far back it
//! may still go. By the decisions in the checkpoint that is furthest on, so nothing but the bucket is asked.
//!
//! Between a rollback and the first checkpoint behind it no manifest knows that it has acted, so the states it has left behind
//! look like any others until then. A run knows it from its trace, and restores none of them.

use super::checkpoint::failure;
use crate::exit::{Exit, Failure};
use serde_json::{Value, json};
use tarazed_domain::StepsCompleted;
use tarazed_protocol::data::decision::Decision;
use tarazed_protocol::rollback::{Rollbacks, must_stay};
use tarazed_store::{CheckpointState, CheckpointStore, CheckpointSummary, Manifest, StoreError};

/// Rollbacks as far as checkpoints know.
#[derive(Debug, Default)]
pub(super) struct LeftBehind {
    /// Those that have acted.
    acted: Rollbacks,
    back_to: Option<StepsCompleted>,
}

impl LeftBehind {
    /// What the checkpoints of this listing know.
    ///
    /// # Errors
    /// Where the store does not answer, or the decisions cannot be read: then nobody can say which checkpoints stand.
    pub(super) async fn known(store: &CheckpointStore, list: &[CheckpointSummary]) -> Result<Self, Failure> {
        let committed = list.iter().filter(|it| it.state == CheckpointState::Committed);
        let mut steps: Vec<StepsCompleted> = committed.map(|it| it.reference.step).collect();
        steps.sort_unstable();
        steps.dedup();
        for step in steps.into_iter().rev() {
            match store.at_step(step).await {
                Ok(found) => return Self::of(&found.manifest),
                // An older one knows less: whoever needs this one says what is wrong with it.
                Err(error) if error.is_bad_object() => {}
                Err(StoreError::NotFound { .. }) => {} // collected since the listing
                Err(error) => return Err(failure(error)),
            }
        }
        Ok(Self::default())
    }

    /// The same for whoever only shows it: decisions that cannot be read are said to be so, and all counts as live.
    ///
    /// # Errors
    /// Where the store does not answer.
    pub(super) async fn shown(store: &CheckpointStore, list: &[CheckpointSummary]) -> Result<Self, Failure> {
        match Self::known(store, list).await {
            Err(unread) if unread.exit == Exit::Refused => {
                eprintln!("tarazed: {}", unread.message);
                Ok(Self::default())
            }
            known => known,
        }
    }

    fn of(manifest: &Manifest) -> Result<Self, Failure> {
        let step = manifest.step;
        let decisions: Vec<Decision> = match manifest.decisions.as_slice() {
            [] => Vec::new(),
            json => serde_json::from_slice(json).map_err(|error| {
                Failure::refused(
                    format!("the decisions in the checkpoint of step {step}"),
                    format!("cannot be read ({error})"),
                    "use the version of tarazed that wrote it: without them nobody knows which checkpoints a rollback left behind",
                )
            })?,
        };
        let all = Rollbacks::of(&decisions);
        // One that would act right behind it did so only if the run went on from there, which a later one would show.
        let written = StepsCompleted(step.0.saturating_sub(1));
        let acted = all.acted(written);
        let reach = manifest.rollback_reach_steps.map(u64::from);
        Ok(Self {
            back_to: must_stay(step, reach, all.oldest_to_come(written), &acted),
            acted,
        })
    }

    /// Whether training goes on from the state of this step, as far as is known.
    pub(super) fn is_live(&self, step: StepsCompleted) -> bool {
        self.acted.is_live(step)
    }

    /// How far back a rollback may go that is still to be decided by the run's policy, or has not acted; none for no further than
    /// the newest checkpoint.
    pub(super) const fn back_to(&self) -> Option<StepsCompleted> {
        self.back_to
    }

    /// What became of a checkpoint that is left behind, for people.
    pub(super) fn fate(&self, step: StepsCompleted) -> Option<String> {
        let back = self.acted.left_behind_by(step)?;
        Some(format!(
            "abandoned: step {} was done from the state after step {}, and nothing goes on from this one",
            back.at.completed(),
            back.to
        ))
    }

    /// The same in JSON, beside what is said of the checkpoint: `null` where training goes on from it.
    pub(super) fn mark(&self, step: StepsCompleted, mut said: Value) -> Value {
        let back = self.acted.left_behind_by(step);
        said["left_behind_by"] = back.map_or(Value::Null, |back| json!({"at": back.at, "to": back.to}));
        said
    }
}
