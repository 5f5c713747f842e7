//! When a checkpoint is whole: every optimizer shard's object is stored and the trace is written through its step.
//!
//! - **CKPT-1** A checkpoint exists if and only if its commit record does: this machine asks for the commit once, after
//!   everything it names is there.
//!
//! A checkpoint overtaken by a newer whole one, or one whose rank died while it wrote, is given up; its objects are
//! garbage for the collector. It does no I/O.

use crate::rollback::Rollbacks;
use std::collections::{BTreeMap, BTreeSet};
use tarazed_domain::{Generation, Mutant, OptimizerShardIndex, StepsCompleted};

/// One stored checkpoint shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoredShard {
    /// Object key.
    pub key: String,
    /// Length in bytes.
    pub length: u64,
    /// BLAKE3 of the object.
    pub blake3: [u8; 32],
}

/// What to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CheckpointEffect {
    /// Everything is there: write manifest and commit record.
    Commit {
        /// The checkpoint's step.
        step: StepsCompleted,
        /// Its shards, in order.
        shards: Vec<StoredShard>,
    },
    /// Not to be had any more, said aloud.
    GivenUp {
        /// The checkpoint's step.
        step: StepsCompleted,
        /// Why.
        cause: String,
        /// The store has no room left.
        full: bool,
    },
}

/// How far the newest checkpoint under way is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SavingProgress {
    /// The checkpoint's step.
    pub step: StepsCompleted,
    /// Its shards that lie in the store.
    pub stored: usize,
    /// All its shards.
    pub shards: usize,
    /// Since the first rank began with it.
    pub for_ms: u64,
}

/// Checkpoints being written.
#[derive(Debug)]
pub struct CheckpointTracker {
    shard_count: usize,
    written: StepsCompleted,
    /// Newest one a commit was asked for.
    newest: Option<StepsCompleted>,
    /// Newest one that exists.
    committed: Option<StepsCompleted>,
    /// While the checkpoint to restore from is being looked for, none is committed: it would change what is found.
    locating: bool,
    /// Losses of older generations say nothing of the present one's objects.
    generation: Generation,
    /// Begun by some rank, and neither there nor given up; when.
    begun: BTreeMap<StepsCompleted, u64>,
    open: BTreeMap<StepsCompleted, BTreeMap<OptimizerShardIndex, StoredShard>>,
    failed: BTreeSet<StepsCompleted>,
    /// What these have left behind is not to be saved any more.
    rollbacks: Rollbacks,
}

impl CheckpointTracker {
    /// A tracker for checkpoints of `shard_count` shards; `written` is the newest trace line.
    #[must_use]
    pub fn new(shard_count: usize, written: StepsCompleted) -> Self {
        Self {
            shard_count,
            written,
            newest: None,
            committed: None,
            locating: false,
            generation: Generation(0),
            begun: BTreeMap::new(),
            open: BTreeMap::new(),
            failed: BTreeSet::new(),
            rollbacks: Rollbacks::default(),
        }
    }

    /// The checkpoint to restore from is being looked for, where these rollbacks have acted.
    pub fn on_locating(&mut self, rollbacks: Rollbacks) {
        self.locating = true;
        self.rollbacks = rollbacks;
    }

    /// The run goes on from this checkpoint (or from the seed): later ones are made anew.
    pub fn on_restored(&mut self, from: Option<StepsCompleted>) {
        self.locating = false;
        self.newest = from;
        self.committed = from;
        self.begun.clear();
        self.open.clear();
        self.failed.clear();
    }

    /// A commit that was asked for was made.
    pub fn on_committed(&mut self, step: StepsCompleted) {
        self.committed = self.committed.max(Some(step));
        self.begun = self.begun.split_off(&step.next().completed());
    }

    /// A commit that was asked for could not be made: the step's shards may be saved again.
    pub fn on_commit_failed(&mut self, step: StepsCompleted) {
        self.begun.remove(&step);
        if self.newest == Some(step) {
            self.newest = self.committed;
        }
    }

    /// A new generation begins: those at work on older checkpoints may be gone.
    pub fn on_generation(&mut self, generation: Generation, base: StepsCompleted, rollbacks: Rollbacks) {
        self.generation = generation;
        self.rollbacks = rollbacks;
        self.failed.clear();
        // The base may be saved once more; its old objects are replaced as they come.
        self.open.retain(|&step, _| step <= base);
        self.begun.retain(|&step, _| step <= base);
    }

    /// A rank has begun with its share.
    pub fn on_saving(&mut self, now_ms: u64, generation: Generation, step: StepsCompleted) {
        if generation < self.generation || self.failed.contains(&step) {
            return; // given up already
        }
        if !self.rollbacks.is_live(step) {
            return;
        }
        if self.committed.is_none_or(|committed| committed < step) {
            self.begun.entry(step).or_insert(now_ms);
        }
    }

    /// Whether a checkpoint of this step may still come: what it names besides shards must be kept.
    #[must_use]
    pub fn is_under_way(&self, step: StepsCompleted) -> bool {
        self.begun.contains_key(&step) || self.open.contains_key(&step)
    }

    /// How far the newest one under way is; none where no rank is at work on one.
    #[must_use]
    pub fn saving(&self, now_ms: u64) -> Option<SavingProgress> {
        let (&step, &began_ms) = self.begun.last_key_value()?;
        let stored = match self.open.get(&step) {
            Some(shards) => shards.len(),
            // Nothing is collected any more once its commit was asked for.
            None if self.newest == Some(step) => self.shard_count,
            None => 0,
        };
        Some(SavingProgress {
            step,
            stored,
            shards: self.shard_count,
            for_ms: now_ms.saturating_sub(began_ms),
        })
    }

    /// A checkpoint shard lies in the store.
    pub fn on_shard_saved(
        &mut self,
        step: StepsCompleted,
        shard: OptimizerShardIndex,
        stored: StoredShard,
    ) -> Vec<CheckpointEffect> {
        if shard.index() >= self.shard_count || self.newest.is_some_and(|newest| step <= newest) {
            return Vec::new();
        }
        if !self.rollbacks.is_live(step) || self.failed.contains(&step) {
            return Vec::new(); // stored late, by a rank that had begun before the step was rolled back or given up
        }
        self.open.entry(step).or_default().insert(shard, stored);
        self.settle()
    }

    /// A checkpoint shard could not be stored.
    pub fn on_shard_lost(
        &mut self,
        generation: Generation,
        step: StepsCompleted,
        cause: String,
        full: bool,
    ) -> Vec<CheckpointEffect> {
        if generation < self.generation {
            return Vec::new();
        }
        if self.newest.is_some_and(|newest| step <= newest) || !self.failed.insert(step) {
            return Vec::new();
        }
        self.open.remove(&step);
        self.begun.remove(&step);
        vec![CheckpointEffect::GivenUp { step, cause, full }]
    }

    /// The trace is written (and lies on disk) through this step.
    pub fn on_line_written(&mut self, step: StepsCompleted) -> Vec<CheckpointEffect> {
        self.written = self.written.max(step);
        self.settle()
    }

    fn settle(&mut self) -> Vec<CheckpointEffect> {
        if self.locating {
            return Vec::new();
        }
        let whole = self
            .open
            .iter()
            .rev()
            .find(|(step, shards)| {
                let written = **step <= self.written || Mutant::CommitBeforeLine.is_on();
                let missing = usize::from(Mutant::CommitPartial.is_on());
                written && shards.len() + missing >= self.shard_count
            })
            .map(|(&step, _)| step);
        let Some(step) = whole else { return Vec::new() };
        let shards = self.open.remove(&step).unwrap_or_default().into_values().collect();
        self.newest = Some(step);
        let overtaken: Vec<StepsCompleted> = self.open.range(..step).map(|(&older, _)| older).collect();
        let mut effects = vec![CheckpointEffect::Commit { step, shards }];
        for older in overtaken {
            self.open.remove(&older);
            self.begun.remove(&older);
            let cause = format!("the checkpoint of step {step} was whole first");
            effects.push(CheckpointEffect::GivenUp {
                step: older,
                cause,
                full: false,
            });
        }
        effects
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollback::Rollback;
    use tarazed_domain::StepIndex;

    fn stored(name: &str) -> StoredShard {
        StoredShard {
            key: name.to_owned(),
            length: 1,
            blake3: [0; 32],
        }
    }

    /// CKPT-1
    #[test]
    fn a_commit_is_asked_for_once_and_only_when_whole() {
        let mut tracker = CheckpointTracker::new(2, StepsCompleted(9));
        let step = StepsCompleted(10);
        assert_eq!(tracker.on_shard_saved(step, OptimizerShardIndex(1), stored("b")), []);
        assert_eq!(
            tracker.on_shard_saved(step, OptimizerShardIndex(0), stored("a")),
            [],
            "the line is missing"
        );
        let effects = tracker.on_line_written(step);
        assert_eq!(
            effects,
            [CheckpointEffect::Commit {
                step,
                shards: vec![stored("a"), stored("b")]
            }]
        );
        assert_eq!(
            tracker.on_shard_saved(step, OptimizerShardIndex(0), stored("a")),
            [],
            "committed already"
        );
    }

    #[test]
    fn a_checkpoint_is_under_way_from_the_first_word_of_it_to_its_end() {
        let mut tracker = CheckpointTracker::new(1, StepsCompleted(99));
        for step in [10, 20, 30, 40].map(StepsCompleted) {
            assert!(!tracker.is_under_way(step));
            tracker.on_saving(0, Generation(1), step);
            assert!(tracker.is_under_way(step));
        }
        tracker.on_shard_lost(Generation(1), StepsCompleted(10), "no answer".into(), false);
        assert!(!tracker.is_under_way(StepsCompleted(10)), "given up");
        let late = tracker.on_shard_saved(StepsCompleted(10), OptimizerShardIndex(0), stored("late"));
        assert!(
            late.is_empty() && !tracker.is_under_way(StepsCompleted(10)),
            "given up once"
        );
        let effects = tracker.on_shard_saved(StepsCompleted(20), OptimizerShardIndex(0), stored("a"));
        assert!(
            !effects.is_empty() && tracker.is_under_way(StepsCompleted(20)),
            "to be committed"
        );
        tracker.on_committed(StepsCompleted(20));
        tracker.on_saving(0, Generation(1), StepsCompleted(20));
        assert!(
            !tracker.is_under_way(StepsCompleted(20)),
            "a late word of one that is there"
        );
        tracker.on_commit_failed(StepsCompleted(30));
        assert!(!tracker.is_under_way(StepsCompleted(30)));
        tracker.on_generation(Generation(2), StepsCompleted(35), Rollbacks::default());
        assert!(
            !tracker.is_under_way(StepsCompleted(40)),
            "its step is to be done again"
        );
    }

    /// Counted from the first rank's word to the commit; none is shown that is there, lost or left behind.
    #[test]
    fn progress_is_told_from_the_first_word_to_the_commit() {
        let mut tracker = CheckpointTracker::new(2, StepsCompleted(20));
        let told = |tracker: &CheckpointTracker, now_ms| {
            let saving = tracker.saving(now_ms)?;
            assert_eq!(saving.shards, 2);
            Some((saving.step.0, saving.stored, saving.for_ms))
        };
        let (ten, twenty) = (StepsCompleted(10), StepsCompleted(20));
        assert_eq!(told(&tracker, 5), None);
        tracker.on_saving(1_000, Generation(1), ten);
        tracker.on_saving(1_700, Generation(1), ten);
        assert_eq!(
            told(&tracker, 1_800),
            Some((10, 0, 800)),
            "the first rank's word counts"
        );
        tracker.on_shard_saved(ten, OptimizerShardIndex(1), stored("b"));
        tracker.on_shard_saved(ten, OptimizerShardIndex(1), stored("b again"));
        assert_eq!(told(&tracker, 4_000), Some((10, 1, 3_000)));
        tracker.on_shard_saved(ten, OptimizerShardIndex(0), stored("a"));
        assert_eq!(told(&tracker, 4_100), Some((10, 2, 3_100)), "it is being committed");
        tracker.on_saving(5_000, Generation(1), twenty);
        assert_eq!(told(&tracker, 5_000), Some((20, 0, 0)), "the newest one");
        tracker.on_committed(ten);
        assert_eq!(told(&tracker, 5_001), Some((20, 0, 1)));
        tracker.on_shard_lost(Generation(1), twenty, "no answer".into(), false);
        assert_eq!(told(&tracker, 6_000), None);
    }

    #[test]
    fn a_newer_whole_checkpoint_overtakes_a_partial_one() {
        let mut tracker = CheckpointTracker::new(1, StepsCompleted(30));
        let mut partial = CheckpointTracker::new(2, StepsCompleted(30));
        assert!(
            partial
                .on_shard_saved(StepsCompleted(10), OptimizerShardIndex(0), stored("a"))
                .is_empty()
        );
        partial.on_shard_saved(StepsCompleted(20), OptimizerShardIndex(0), stored("a"));
        let effects = partial.on_shard_saved(StepsCompleted(20), OptimizerShardIndex(1), stored("b"));
        assert!(matches!(
            effects[0],
            CheckpointEffect::Commit {
                step: StepsCompleted(20),
                ..
            }
        ));
        assert!(matches!(
            effects[1],
            CheckpointEffect::GivenUp {
                step: StepsCompleted(10),
                ..
            }
        ));
        assert_eq!(
            partial.on_shard_saved(StepsCompleted(10), OptimizerShardIndex(1), stored("b")),
            []
        );
        assert_eq!(
            tracker
                .on_shard_lost(Generation(1), StepsCompleted(10), "disk full".into(), true)
                .len(),
            1
        );
        assert_eq!(
            tracker
                .on_shard_lost(Generation(1), StepsCompleted(10), "disk full".into(), true)
                .len(),
            0,
            "said once"
        );
    }

    /// A commit that failed may be tried again with the same step's shards, saved anew.
    #[test]
    fn a_failed_commit_can_be_asked_for_again() {
        let mut tracker = CheckpointTracker::new(1, StepsCompleted(20));
        let save = |tracker: &mut CheckpointTracker, step| {
            tracker
                .on_shard_saved(StepsCompleted(step), OptimizerShardIndex(0), stored("a"))
                .len()
        };
        assert_eq!(save(&mut tracker, 10), 1);
        tracker.on_committed(StepsCompleted(10));
        assert_eq!(save(&mut tracker, 20), 1);
        assert_eq!(save(&mut tracker, 20), 0, "it is being committed");
        tracker.on_commit_failed(StepsCompleted(20));
        assert_eq!(save(&mut tracker, 10), 0, "this one exists");
        assert_eq!(save(&mut tracker, 20), 1);
    }

    /// What a rollback has left behind is no checkpoint any more, however late its shards are stored.
    #[test]
    fn a_state_that_is_left_behind_is_not_saved() {
        let mut tracker = CheckpointTracker::new(1, StepsCompleted(20));
        let back = Rollback {
            at: StepIndex(20),
            to: StepsCompleted(12),
        };
        tracker.on_locating([back].into_iter().collect());
        tracker.on_restored(Some(StepsCompleted(10)));
        tracker.on_saving(0, Generation(1), StepsCompleted(20));
        assert!(!tracker.is_under_way(StepsCompleted(20)));
        for (step, commits) in [(20, 0), (13, 0), (12, 1), (21, 0)] {
            let saved = tracker.on_shard_saved(StepsCompleted(step), OptimizerShardIndex(0), stored("a"));
            assert_eq!(saved.len(), commits, "of step {step}");
        }
        assert_eq!(tracker.on_line_written(StepsCompleted(21)).len(), 1);
    }

    /// STEP-5: what is being restored from cannot be overtaken meanwhile; a late loss of a former life spoils nothing.
    #[test]
    fn nothing_is_committed_while_a_checkpoint_is_looked_for() {
        let mut tracker = CheckpointTracker::new(1, StepsCompleted(20));
        tracker.on_locating(Rollbacks::default());
        let saved = tracker.on_shard_saved(StepsCompleted(20), OptimizerShardIndex(0), stored("a"));
        assert_eq!(saved, []);
        tracker.on_restored(Some(StepsCompleted(10)));
        tracker.on_generation(Generation(5), StepsCompleted(10), Rollbacks::default());
        assert_eq!(
            tracker.on_shard_lost(Generation(4), StepsCompleted(20), "old".into(), false),
            []
        );
        let saved = tracker.on_shard_saved(StepsCompleted(20), OptimizerShardIndex(0), stored("a"));
        assert_eq!(saved.len(), 1);
    }
}
