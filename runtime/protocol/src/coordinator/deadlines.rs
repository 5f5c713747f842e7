//! What is due when: the moves that only time makes.

use super::alarm::Alarm;
use super::{Coordinator, Effect, Incident, Phase, WorkerPhase};
use tarazed_domain::{Mutant, WorkerId};

/// How long a failed collective waits for its cause to show (a process exit comes within milliseconds) before the
/// generation is renewed with everybody.
const FAILED_GRACE_MS: u64 = 100;

impl Coordinator {
    /// The earliest time at which a tick has something to do, somebody's silence aside: a driver knows better than this
    /// machine whom it is about to let be heard. One in virtual time goes there at once and tells
    /// [`Self::skip_idle_ticks`].
    #[must_use]
    pub fn next_deadline_ms(&self) -> Option<u64> {
        let of_phase = match &self.phase {
            Phase::Fencing { deadline_ms, .. }
            | Phase::Finishing { deadline_ms, .. }
            | Phase::Leaving { deadline_ms } => Some(deadline_ms + 1),
            Phase::Running { failed, .. } => failed.as_ref().map(|(since, _)| since + FAILED_GRACE_MS),
            Phase::Adopting { .. } | Phase::Forming | Phase::Locating => None,
            Phase::Done => return None,
        };
        let of_stop = self.stop.map(|since| since + self.options.timeouts.stop_ms + 1);
        let of_start = self.workers.start_deadline_ms().map(|deadline_ms| deadline_ms + 1);
        [of_phase, of_stop, of_start].into_iter().flatten().min()
    }

    /// When a member or a waiting worker that is not heard of again counts as silent; none for others.
    #[must_use]
    pub fn silence_deadline_ms(&self, worker: WorkerId) -> Option<u64> {
        let worker = self.workers.get(worker)?;
        matches!(worker.phase, WorkerPhase::Member | WorkerPhase::Ready)
            .then(|| worker.heard_ms + self.options.timeouts.suspect_ms + 1)
    }

    /// Ticks until now had nothing to do and were not made. Without this the next tick would take their lack for this
    /// process's own absence.
    pub fn skip_idle_ticks(&mut self, now_ms: u64) {
        self.ticked_ms = Some(now_ms);
        self.progressed_ms = now_ms;
    }

    pub(super) fn on_tick(&mut self, now_ms: u64) -> Vec<Effect> {
        self.excuse_own_absence(now_ms);
        let timeouts = self.options.timeouts;
        let mut effects = if Mutant::SilenceIgnored.is_on() {
            Vec::new()
        } else {
            self.kill_the_silent(now_ms)
        };
        match &self.phase {
            Phase::Fencing {
                deadline_ms, awaiting, ..
            } if now_ms > *deadline_ms => {
                let reason = format!(
                    "no answer to a fence within {} ms: its device thread hangs",
                    timeouts.fence_ms
                );
                let members = self.workers.iter().map(|(member, _)| member);
                effects.extend(
                    members
                        .filter(|member| awaiting.contains(member.worker))
                        .map(|member| Effect::Kill {
                            member,
                            reason: reason.clone(),
                        }),
                );
            }
            Phase::Running {
                failed: Some((since, cause)),
                suspects,
                ..
            } if now_ms >= since + FAILED_GRACE_MS => {
                let (cause, alarm) = (cause.clone(), Alarm::Named(suspects.clone()));
                effects.extend(self.sound_alarm(now_ms, cause, alarm));
            }
            Phase::Running { failed: None, .. }
                if now_ms > self.progressed_ms + self.stall_ms && !Mutant::StallIgnored.is_on() =>
            {
                let cause = format!("no rank has made any progress for {} ms", self.stall_ms);
                effects.extend(self.sound_alarm(now_ms, cause, Alarm::Stall));
            }
            &Phase::Finishing { step, deadline_ms } if now_ms > deadline_ms => {
                let cause = format!("nothing of it was stored for {} ms", timeouts.stop_ms);
                self.save_failed = Some((step, cause, false));
                effects.extend(self.save_again(now_ms));
            }
            Phase::Running { failed: None, .. } => effects.extend(self.watch_pace(now_ms)),
            Phase::Leaving { deadline_ms } if now_ms > *deadline_ms => effects.extend(self.done()),
            _ => {}
        }
        if let Some(since) = self.stop
            && now_ms > since + timeouts.stop_ms
            && !matches!(self.phase, Phase::Done)
        {
            let late = format!(
                "no last checkpoint within {} ms of the stop, and of the last part stored for it",
                timeouts.stop_ms
            );
            return match self.verdict.take() {
                Some((code, diagnosis)) => self.halt(code, format!("{diagnosis}\n{late}")),
                None => self.halt(33, late),
            };
        }
        effects
    }

    fn sound_alarm(&mut self, now_ms: u64, cause: String, alarm: Alarm) -> Vec<Effect> {
        let silent_ms = now_ms.saturating_sub(self.progressed_ms);
        let note = Effect::Note(Incident::Alarm {
            cause: cause.clone(),
            silent_ms,
        });
        let mut effects = vec![note];
        effects.extend(self.fence(now_ms, cause, Some(alarm)));
        effects
    }

    /// Where this process was stopped or starved, what came meanwhile waits behind this tick: nobody was silent.
    fn excuse_own_absence(&mut self, now_ms: u64) {
        let absent_ms = now_ms.saturating_sub(self.ticked_ms.replace(now_ms).unwrap_or(now_ms));
        if absent_ms <= self.options.timeouts.failure_ms / 2 || Mutant::AbsenceCounted.is_on() {
            return;
        }
        // What was heard right behind the absence, before this tick, is no older than now.
        let excused = |since_ms: u64| (since_ms + absent_ms).min(now_ms);
        self.workers.excuse(absent_ms, excused);
        self.progressed_ms = excused(self.progressed_ms);
        match &mut self.phase {
            Phase::Fencing { deadline_ms, .. }
            | Phase::Finishing { deadline_ms, .. }
            | Phase::Leaving { deadline_ms } => {
                *deadline_ms += absent_ms;
            }
            // Whose death failed the collective may be among what waits.
            Phase::Running {
                failed: Some((since, _)),
                ..
            } => *since = excused(*since),
            _ => {}
        }
        self.stop = self.stop.map(excused);
    }

    fn kill_the_silent(&self, now_ms: u64) -> Vec<Effect> {
        let timeouts = self.options.timeouts;
        let mut effects = Vec::new();
        for (member, w) in self.workers.iter() {
            match w.phase {
                // One whose node is away has not begun, or was given up; but one of an earlier controller is waited for.
                WorkerPhase::Starting { .. }
                    if self.is_away(member.worker)
                        && (self.workers.is_doomed(member) || !matches!(self.phase, Phase::Adopting { .. })) => {}
                WorkerPhase::Starting { deadline_ms } if now_ms > deadline_ms => {
                    let reason = match self.phase {
                        Phase::Adopting { .. } => format!("not back within {} ms", timeouts.failure_ms),
                        _ => format!("not ready within {} ms of its start", timeouts.start_ms),
                    };
                    effects.push(Effect::Kill { member, reason });
                }
                WorkerPhase::Member | WorkerPhase::Ready
                    if !matches!(self.phase, Phase::Leaving { .. }) && now_ms > w.heard_ms + timeouts.suspect_ms =>
                {
                    let reason = format!("no heartbeat for {} ms", timeouts.suspect_ms);
                    effects.push(Effect::Kill { member, reason });
                }
                _ => {}
            }
        }
        effects
    }
}
