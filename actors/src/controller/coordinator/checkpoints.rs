//! The coordinator's part in checkpoints: from a rank's word that it saves to the commit, and back from a restore.

use super::super::appender::TraceRequest;
use super::super::checkpointer::{CheckpointerMessage, Located};
use super::super::observatory::ObservatoryMessage;
use super::CoordinatorState;
use ractor::ActorProcessingErr;
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_protocol::checkpoint::CheckpointEffect;
use tarazed_protocol::coordinator::Event;
use tarazed_protocol::message::ToRank;
use tarazed_protocol::rollback::Rollbacks;

impl CoordinatorState {
    pub(super) fn saving(&mut self, generation: Generation, step: StepsCompleted) -> Result<(), ActorProcessingErr> {
        let now_ms = self.now_ms();
        self.arguments.tracker.on_saving(now_ms, generation, step);
        // Not a late word of one that is there or given up.
        let under_way = self.arguments.tracker.saving(now_ms);
        if under_way.is_some_and(|saving| saving.step == step) {
            self.observe(ObservatoryMessage::SavingBegan(step))?;
        }
        Ok(())
    }

    pub(super) fn committed(&mut self, step: StepsCompleted) -> Result<(), ActorProcessingErr> {
        self.committed = true;
        self.observe(ObservatoryMessage::Checkpoint(step))?;
        self.arguments.tracker.on_committed(step);
        self.arguments.ledger.forget(step);
        self.heads = self.heads.split_off(&step);
        let now_ms = self.now_ms();
        self.arguments.schedule.on_committed(now_ms, step);
        self.event(Event::CheckpointCommitted { step })
    }

    pub(super) fn checkpoint(&mut self, effects: Vec<CheckpointEffect>) -> Result<(), ActorProcessingErr> {
        for effect in effects {
            match effect {
                CheckpointEffect::Commit { step, shards } => {
                    self.syncing.insert(step, shards);
                    self.peers()?.trace.request(TraceRequest::Sync(step));
                }
                CheckpointEffect::GivenUp { step, cause, full } => self.checkpoint_failed(step, cause, full)?,
            }
        }
        Ok(())
    }

    /// The trace lies on the disk: the checkpoint may name it.
    pub(super) fn commit(&mut self, step: StepsCompleted) -> Result<(), ActorProcessingErr> {
        let Some(shards) = self.syncing.remove(&step) else {
            return Ok(()); // overtaken by a restore
        };
        let Some(head) = self.heads.get(&step).cloned() else {
            self.arguments.tracker.on_commit_failed(step);
            return self.checkpoint_failed(step, "its line is not at hand any more".to_owned(), false);
        };
        let decisions = self.arguments.ledger.decisions();
        let so_far = decisions.iter().filter(|decision| decision.line <= step);
        let commit = CheckpointerMessage::Commit {
            step,
            generation: self.arguments.machine.generation(),
            shards,
            head: Box::new(head),
            decisions: so_far.cloned().collect(),
            back_to: Rollbacks::of(decisions).oldest_to_come(self.arguments.ledger.written()),
            rollbacks: self.arguments.machine.acted(),
        };
        self.peers()?.checkpointer.cast(commit)?;
        Ok(())
    }

    /// By the clock; `checkpoint.interval_steps` the ranks count by themselves.
    pub(super) fn ask_for_checkpoint(&mut self, written: StepsCompleted) -> Result<(), ActorProcessingErr> {
        let now_ms = self.now_ms();
        if let Some(from) = self.arguments.schedule.on_line(now_ms, written) {
            let generation = self.arguments.machine.generation();
            self.send(self.everybody(), &ToRank::Checkpoint { generation, from })?;
        }
        Ok(())
    }

    pub(super) fn checkpoint_failed(
        &mut self,
        step: StepsCompleted,
        cause: String,
        full: bool,
    ) -> Result<(), ActorProcessingErr> {
        let now_ms = self.now_ms();
        self.arguments.schedule.on_failed(now_ms, step);
        self.observe(ObservatoryMessage::NoCheckpoint {
            step,
            cause: cause.clone(),
        })?;
        self.event(Event::CheckpointFailed { step, cause, full })
    }

    pub(super) fn located(&mut self, located: Result<Located, (u8, String)>) -> Result<(), ActorProcessingErr> {
        let Located {
            from,
            lines,
            heads,
            lineage,
        } = match located {
            Ok(located) => located,
            Err((code, reason)) => return self.halt(code, reason),
        };
        let step = from.as_ref().map(|from| from.step);
        let written = self.arguments.ledger.written();
        if let Some(base) = step.filter(|base| *base > written) {
            let diagnosis = format!(
                "the store's newest checkpoint is of step {base}, but the run folder's trace ends at step {written}; \
                 restore trace.jsonl, or begin in another --run-dir with another checkpoint.store"
            );
            return self.halt(3, diagnosis);
        }
        self.arguments.tracker.on_restored(step);
        self.arguments.ledger.recall(lines);
        if let Some(lineage) = lineage {
            self.arguments.ledger.declare(lineage);
        }
        self.heads.extend(heads);
        self.event(Event::Located { checkpoint: from })
    }
}
