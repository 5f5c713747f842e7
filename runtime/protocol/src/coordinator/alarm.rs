//! Alarms: what members see of a generation that gets nowhere, and who is replaced for it.
//!
//! Three faults look alike from outside, for every rank stands still in each of them. They are told apart by a fence, which
//! a healthy device thread answers at once, and by what each rank's data plane waited for:
//!
//! | fault | fence | waited for | then |
//! |---|---|---|---|
//! | a device thread hangs | it does not answer | | it is killed when the fence is due |
//! | nothing arrives between two ranks | all answer | each other, in a circle | the second time one of them is replaced |
//! | one is slow, or restores | all answer | one that is at work | nobody is replaced; patience doubles |

use super::{Coordinator, Effect, Phase, WorkerPhase};
use crate::message::Member;
use std::collections::BTreeMap;

/// Alarms that were false lengthen the patience with a stall to this many times the timeout, no further.
const STALL_TIMEOUTS_MAX: u64 = 64;
/// A member that others found silent this often, although it answers the controller, is replaced.
const STRIKES_MAX: u32 = 2;

/// What members saw of the end of a generation.
#[derive(Clone, Debug)]
pub(super) enum Alarm {
    /// Nobody made any progress.
    Stall,
    /// Some were named as silent, once for each complaint.
    Named(Vec<Member>),
}

impl Coordinator {
    /// Everybody answered a fence that followed an alarm: nobody hangs. Either the way between two members is broken, and
    /// the second time one of them is replaced, or somebody was merely slow, and patience grows.
    pub(super) fn judge_alarm(&mut self) -> Vec<Effect> {
        let Phase::Fencing { alarm, .. } = &mut self.phase else {
            return Vec::new();
        };
        let named = match alarm.take() {
            None => return Vec::new(),
            Some(Alarm::Named(named)) => named,
            Some(Alarm::Stall) => {
                let circle = self.waiting_in_a_circle();
                if circle.is_empty() {
                    self.stall_ms = (self.stall_ms * 2).min(self.options.timeouts.failure_ms * STALL_TIMEOUTS_MAX);
                }
                circle
            }
        };
        let mut complaints: BTreeMap<Member, usize> = BTreeMap::new();
        for member in named {
            *complaints.entry(member).or_default() += 1;
        }
        for &member in complaints.keys() {
            *self.strikes.entry(member).or_default() += 1;
        }
        let struck_out = |member: &Member| {
            let strikes = self.strikes.get(member).copied().unwrap_or_default();
            let alive = self.workers.get(member.worker);
            strikes >= STRIKES_MAX && alive.is_some_and(|worker| worker.phase == WorkerPhase::Member)
        };
        let worst = complaints
            .into_iter()
            .filter(|(member, _)| struck_out(member) && self.workers.member(member.worker) == *member)
            .max_by_key(|&(member, count)| (count, member));
        let Some((member, count)) = worst else {
            return Vec::new();
        };
        self.strikes.clear();
        if let Phase::Fencing { awaiting, .. } = &mut self.phase {
            awaiting.insert(member.worker);
        }
        let reason = format!("{count} of its peers wait for it, time and again, although it answers the controller");
        vec![Effect::Kill { member, reason }]
    }

    /// Members of a stalled generation that wait for each other in a circle: none of them is at work, so something between
    /// them does not arrive. Whoever waits for one that is at work (a slow one, or one that restores) is in no circle.
    fn waiting_in_a_circle(&self) -> Vec<Member> {
        let next: Vec<Option<usize>> = self
            .roster
            .iter()
            .map(|&(member, _)| {
                let worker = self.workers.get(member.worker)?;
                let answered = worker.incarnation == member.incarnation && worker.phase == WorkerPhase::Member;
                let rank = worker.waits_for.filter(|_| answered)?;
                (rank.index() < self.roster.len()).then_some(rank.index())
            })
            .collect();
        // Each walk ends at somebody seen before; on the present walk, that closes a circle.
        let mut in_circle = vec![false; next.len()];
        let mut seen = vec![false; next.len()];
        for start in 0..next.len() {
            let (mut path, mut at) = (Vec::new(), Some(start));
            while let Some(rank) = at.filter(|&rank| !seen[rank]) {
                seen[rank] = true;
                path.push(rank);
                at = next[rank];
            }
            let entry = at.and_then(|rank| path.iter().position(|&on_path| on_path == rank));
            for &rank in entry.map_or(&[][..], |entry| &path[entry..]) {
                in_circle[rank] = true;
            }
        }
        let seats = self.roster.iter().zip(in_circle);
        seats
            .filter(|(_, circles)| *circles)
            .map(|((member, _), _)| *member)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Event, Incident, Options};
    use super::*;
    use crate::message::{ShardHolding, StateReport, ToRank};
    use tarazed_domain::limits::Timeouts;
    use tarazed_domain::{Generation, Incarnation, LaneTree, OptimizerShardIndex, Rank, StepsCompleted, WorkerId};

    const TIMEOUT_MS: u64 = 1000;

    struct Bench {
        machine: Coordinator,
        now_ms: u64,
        members: Vec<Member>,
        killed: Vec<Member>,
        fenced: bool,
        /// `silent_ms` of alarms.
        silent_ms: Vec<u64>,
    }

    impl Bench {
        /// A generation of three that runs.
        fn new() -> Self {
            let options = Options {
                ranks: 3,
                spares: 0,
                lanes: LaneTree::new(3),
                shard_count: 1,
                replicas: 3,
                timeouts: Timeouts::derive(TIMEOUT_MS),
                restarts_max: 100,
                restart_backoff_ms: 1,
                last_step: StepsCompleted(100),
                hosts: Vec::new(),
            };
            let mut machine = Coordinator::new(options, Generation(0), StepsCompleted(0));
            machine.start(0, &[]);
            let member = |worker| Member {
                worker: WorkerId(worker),
                incarnation: Incarnation(0),
            };
            let members: Vec<Member> = (0..3).map(member).collect();
            let mut bench = Self {
                machine,
                now_ms: 0,
                members: members.clone(),
                killed: Vec::new(),
                fenced: false,
                silent_ms: Vec::new(),
            };
            for member in members {
                bench.event(Event::Ready {
                    member,
                    address: String::new(),
                    pid: 1,
                    newest: Generation(0),
                });
            }
            bench.event(Event::Located { checkpoint: None });
            assert!(bench.machine.is_running());
            bench
        }

        fn event(&mut self, event: Event) {
            for effect in self.machine.on_event(self.now_ms, &event) {
                match effect {
                    Effect::Kill { member, .. } => self.killed.push(member),
                    Effect::Note(Incident::Alarm { silent_ms, .. }) => self.silent_ms.push(silent_ms),
                    Effect::Send {
                        message: ToRank::Fence { .. },
                        ..
                    } => self.fenced = true,
                    _ => {}
                }
            }
        }

        /// Time passes; all are heard, and those in `working` have done something.
        fn pass(&mut self, time_ms: u64, working: &[usize]) {
            for _ in 0..time_ms / 100 {
                self.now_ms += 100;
                for (index, member) in self.members.clone().into_iter().enumerate() {
                    let progress = if working.contains(&index) { self.now_ms } else { 1 };
                    self.event(Event::Heartbeat {
                        member,
                        generation: self.machine.generation(),
                        step: StepsCompleted(0),
                        progress,
                        activity: String::new(),
                        lane_us: 0,
                        stored_bytes: 0,
                    });
                }
                self.event(Event::Tick);
            }
        }

        /// All answer the fence; each waited for the rank given.
        fn answer(&mut self, waits_for: [Option<u32>; 3]) {
            assert!(std::mem::take(&mut self.fenced), "there was a fence");
            for (member, waits_for) in self.members.clone().into_iter().zip(waits_for) {
                let report = StateReport {
                    shards: vec![ShardHolding {
                        shard: OptimizerShardIndex(0),
                        state: StepsCompleted(0),
                        reduced: None,
                    }],
                    waits_for: waits_for.map(Rank),
                    ..StateReport::default()
                };
                let generation = self.machine.generation();
                self.event(Event::State {
                    member,
                    generation,
                    report,
                });
            }
        }
    }

    #[test]
    fn a_rank_at_work_is_no_stall() {
        let mut bench = Bench::new();
        bench.pass(TIMEOUT_MS * 10, &[1]);
        assert!(!bench.fenced, "one works, the others wait for it");
        bench.pass(TIMEOUT_MS + 200, &[]);
        assert!(bench.fenced);
    }

    #[test]
    fn one_that_hangs_does_not_answer_and_is_killed() {
        let mut bench = Bench::new();
        bench.pass(TIMEOUT_MS + 200, &[]);
        assert!(bench.fenced && bench.killed.is_empty());
        assert!(
            matches!(bench.silent_ms[..], [silent] if (TIMEOUT_MS * 7 / 8..=TIMEOUT_MS).contains(&silent)),
            "seen within the timeout: {:?}",
            bench.silent_ms
        );
        let generation = bench.machine.generation();
        for member in [bench.members[0], bench.members[2]] {
            bench.event(Event::State {
                member,
                generation,
                report: StateReport::default(),
            });
        }
        bench.pass(TIMEOUT_MS + 200, &[]);
        assert_eq!(bench.killed[0], bench.members[1]);
    }

    #[test]
    fn two_that_cannot_hear_each_other_lose_one_the_second_time() {
        let mut bench = Bench::new();
        for round in 0..2 {
            bench.pass(TIMEOUT_MS + 200, &[]);
            assert!(bench.killed.is_empty(), "round {round}");
            bench.answer([Some(1), Some(0), Some(0)]);
        }
        assert_eq!(bench.killed.len(), 1);
        assert!(
            bench.members[..2].contains(&bench.killed[0]),
            "not the one that merely waits"
        );
    }

    #[test]
    fn a_slow_rank_is_left_alone_and_patience_grows() {
        let mut bench = Bench::new();
        bench.pass(TIMEOUT_MS + 200, &[]);
        bench.answer([Some(2), Some(0), None]);
        assert!(bench.machine.is_running());
        bench.pass(TIMEOUT_MS + 200, &[]);
        assert!(!bench.fenced, "twice the time is allowed now");
        bench.pass(TIMEOUT_MS, &[]);
        bench.answer([Some(2), Some(0), None]);
        assert!(bench.killed.is_empty());
    }
}
