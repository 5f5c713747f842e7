//! The commit rule: which step the survivors of a generation agree on.
//!
//! - **STEP-1** Entering the barrier means: my shards, primary and replica, hold their reduced gradients.
//! - **STEP-2** A step is committed if any surviving rank passed its barrier; by STEP-1 every survivor then holds its
//!   reduced gradients, and the one that passed hands the outcome to the rest. If none passed, it is redone.
//!
//! The rule sees what survivors report and which rollbacks have acted; it does not know time, and a redone step gives the
//! same bits. What a rollback has left behind counts as not held.

use crate::message::{BarrierOutcome, Member, ShardHolding, StateReport};
use crate::rollback::Rollbacks;
use std::collections::{BTreeMap, BTreeSet};
use tarazed_domain::{Incarnation, Mutant, OptimizerShardIndex, StepIndex, StepsCompleted, WorkerId};

/// What the survivors can go on from.
#[derive(Clone, PartialEq, Debug)]
pub enum Resolution {
    /// Every shard reaches this step from what survivors hold.
    Continue {
        /// The agreed count of committed steps.
        base: StepsCompleted,
        /// How to finish it, for holders one step behind and for the line.
        outcome: Option<BarrierOutcome>,
        /// Per shard the members that hold it whole at the base or one reduced gradient before it.
        holders: Vec<Vec<Member>>,
    },
    /// More was lost than the replicas cover, or nothing was there: restore the newest valid checkpoint.
    Restore {
        /// Shards without a usable copy.
        missing: Vec<OptimizerShardIndex>,
    },
}

/// Applies STEP-2 to the survivors' reports.
#[must_use]
pub fn resolve(shard_count: usize, rollbacks: &Rollbacks, reports: &BTreeMap<Member, StateReport>) -> Resolution {
    let mut survey = Survey::default();
    for (&member, report) in reports {
        survey.hear(member, &report.shards, report.passed.as_ref());
    }
    match survey.resolve(shard_count, rollbacks) {
        Ok(Agreement { base, outcome, holders }) => {
            let holders = (0..shard_count).map(|shard| holders.of(shard).to_vec()).collect();
            Resolution::Continue { base, outcome, holders }
        }
        Err(missing) => Resolution::Restore { missing },
    }
}

/// What the survivors agree on.
#[derive(Debug)]
pub(crate) struct Agreement {
    pub(crate) base: StepsCompleted,
    pub(crate) outcome: Option<BarrierOutcome>,
    pub(crate) holders: Holders,
}

/// Per shard the members that hold it, in their order; in one piece of memory.
#[derive(Debug)]
pub(crate) struct Holders {
    starts: Vec<u32>,
    members: Vec<Member>,
}

impl Holders {
    /// Nobody holds anything: the state is restored or initialised.
    pub(crate) fn nobody(shard_count: usize) -> Self {
        Self {
            starts: vec![0; shard_count + 1],
            members: Vec::new(),
        }
    }

    /// Whether no shard has a holder.
    pub(crate) const fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Holders of all shards together.
    pub(crate) const fn len(&self) -> usize {
        self.members.len()
    }

    /// Holders of one shard.
    pub(crate) fn of(&self, shard: usize) -> &[Member] {
        &self.members[self.starts[shard] as usize..self.starts[shard + 1] as usize]
    }
}

/// How far a holding has come, as far as the rule looks at it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stand {
    state: StepsCompleted,
    /// It has the reduced gradient that leads to this count.
    reduced: Option<StepsCompleted>,
}

/// One holding. A large world has many that stand alike.
#[derive(Clone, Copy, Debug)]
struct Claim {
    member: Member,
    shard: OptimizerShardIndex,
    /// Place of its [`Stand`].
    stand: u32,
}

/// Distinct values that are compared with a new one. All that passed a barrier were given the same outcome, and all stand
/// within a step of each other, so there are few; those that equal none (an outcome with a NaN does not) are kept each.
const DISTINCT_COMPARED_MAX: usize = 4;

/// The place among `known` of one that is the same as `new`; where there is none, it is put there.
fn place_of<T: Clone>(known: &mut Vec<T>, new: &T, is_same: impl Fn(&T, &T) -> bool) -> u32 {
    let recent = known.len().saturating_sub(DISTINCT_COMPARED_MAX)..known.len();
    let found = recent.rev().find(|&at| is_same(&known[at], new));
    let at = found.unwrap_or_else(|| {
        known.push(new.clone());
        known.len() - 1
    });
    at as u32
}

/// Equality of outcomes that does not look at empty statistics. Of no bytes the C library reads none, but by a masked load: at
/// the address of an empty vector that takes a processor with AVX-512 about a tenth of a microsecond, for each of a large
/// world's answers.
fn is_same_outcome(a: &BarrierOutcome, b: &BarrierOutcome) -> bool {
    let BarrierOutcome {
        step,
        grad_norm,
        loss,
        stats,
        skipped,
        pause,
        checkpoint,
        busy,
    } = a;
    (step, grad_norm, loss) == (&b.step, &b.grad_norm, &b.loss)
        && (skipped, pause, checkpoint, busy) == (&b.skipped, &b.pause, &b.checkpoint, &b.busy)
        && (stats.is_empty() && b.stats.is_empty() || *stats == b.stats)
}

/// The survivors' answers, taken in as they come and kept small.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    answered: Vec<Member>,
    /// Those that answered and are gone; taken out all at once, when somebody looks.
    gone: BTreeSet<Member>,
    claims: Vec<Claim>,
    stands: Vec<Stand>,
    /// Whose newest barrier gave which outcome.
    passed: Vec<(Member, u32)>,
    outcomes: Vec<BarrierOutcome>,
}

impl Survey {
    /// For about so many answers and holdings.
    pub(crate) fn with_capacity(members: usize, holdings: usize) -> Self {
        Self {
            answered: Vec::with_capacity(members),
            claims: Vec::with_capacity(holdings),
            passed: Vec::with_capacity(members),
            ..Self::default()
        }
    }

    /// A survivor's answer; each answers once.
    pub(crate) fn hear(&mut self, member: Member, shards: &[ShardHolding], passed: Option<&BarrierOutcome>) {
        self.answered.push(member);
        for &ShardHolding { shard, state, reduced } in shards {
            let stand = place_of(&mut self.stands, &Stand { state, reduced }, Stand::eq);
            self.claims.push(Claim { member, shard, stand });
        }
        if let Some(outcome) = passed {
            self.passed
                .push((member, place_of(&mut self.outcomes, outcome, is_same_outcome)));
        }
    }

    /// One that answered, or would have, is gone.
    pub(crate) fn forget(&mut self, member: Member) {
        self.gone.insert(member);
    }

    /// Who answered and is there, in order of arrival.
    pub(crate) fn answered(&mut self) -> &[Member] {
        if !self.gone.is_empty() {
            let mut gone = std::mem::take(&mut self.gone);
            // Those of a host that is lost are mostly gone before they answer, and the others answer mostly in order.
            if self.answered.is_sorted() {
                gone.retain(|member| self.answered.binary_search(member).is_ok());
            }
            if !gone.is_empty() {
                self.answered.retain(|member| !gone.contains(member));
                self.claims.retain(|claim| !gone.contains(&claim.member));
                self.passed.retain(|(member, _)| !gone.contains(member));
            }
        }
        &self.answered
    }

    /// Whether anybody holds anything that these rollbacks have left behind.
    pub(crate) fn holds_dead(&mut self, rollbacks: &Rollbacks) -> bool {
        let is_dead = |(stand, held): (&Stand, bool)| held && !rollbacks.is_live(stand.state);
        let held = self.held();
        self.stands.iter().zip(held).any(is_dead)
    }

    /// Of each stand, whether anybody who is there has it.
    fn held(&mut self) -> Vec<bool> {
        self.answered();
        let mut held = vec![false; self.stands.len()];
        for claim in &self.claims {
            held[claim.stand as usize] = true;
        }
        held
    }

    /// The rule. An error names the shards without a usable copy.
    pub(crate) fn resolve(
        &mut self,
        shard_count: usize,
        rollbacks: &Rollbacks,
    ) -> Result<Agreement, Vec<OptimizerShardIndex>> {
        let in_order = self.answered().is_sorted();
        let held = self.held();
        let is_live = |step: StepsCompleted| rollbacks.is_live(step) || Mutant::DeadStateKept.is_on();
        let step_of = |at: u32| self.outcomes[at as usize].step;
        let stood = self
            .stands
            .iter()
            .zip(held)
            .filter(|&(stand, held)| held && is_live(stand.state));
        let passed = self
            .passed
            .iter()
            .map(|&(_, at)| step_of(at))
            .filter(|&step| is_live(step));
        let base = stood
            .map(|(stand, _)| stand.state)
            .chain(passed)
            .max()
            .unwrap_or_default();
        let outcome = self
            .passed
            .iter()
            .filter(|&&(_, at)| step_of(at) == base)
            .min_by_key(|&&(member, _)| member)
            .map(|&(_, at)| self.outcomes[at as usize].clone());

        let before = base.0.checked_sub(1).map(|step| rollbacks.start_of(StepIndex(step)));
        let is_usable = |stand: &Stand| {
            let stands = stand.state == base;
            let can_finish = Some(stand.state) == before
                && (stand.reduced == Some(base) || Mutant::StaleHolder.is_on())
                && outcome.is_some();
            is_live(stand.state) && (stands || can_finish)
        };
        let usable: Vec<bool> = self.stands.iter().map(is_usable).collect();
        // A shard that the layout does not have is not there, whoever says so.
        let counts = |claim: &&Claim| usable[claim.stand as usize] && claim.shard.index() < shard_count;
        let usable = self.claims.iter().filter(counts);
        let mut starts = vec![0_u32; shard_count + 1];
        for claim in usable.clone() {
            starts[claim.shard.index() + 1] += 1;
        }
        let missing: Vec<OptimizerShardIndex> = (0..shard_count as u32)
            .map(OptimizerShardIndex)
            .filter(|shard| starts[shard.index() + 1] == 0)
            .collect();
        if !missing.is_empty() {
            return Err(missing);
        }
        for shard in 0..shard_count {
            starts[shard + 1] += starts[shard];
        }
        let mut ends = starts.clone();
        let nobody = Member {
            worker: WorkerId(0),
            incarnation: Incarnation(0),
        };
        let mut members = vec![nobody; starts[shard_count] as usize];
        for claim in usable {
            let end = &mut ends[claim.shard.index()];
            members[*end as usize] = claim.member;
            *end += 1;
        }
        if !in_order {
            for shard in 0..shard_count {
                members[starts[shard] as usize..starts[shard + 1] as usize].sort_unstable();
            }
        }
        let holders = Holders { starts, members };
        Ok(Agreement { base, outcome, holders })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn member(worker: u32) -> Member {
        Member {
            worker: WorkerId(worker),
            incarnation: Incarnation(0),
        }
    }

    fn outcome(step: u64) -> BarrierOutcome {
        BarrierOutcome {
            step: StepsCompleted(step),
            grad_norm: 1.0,
            loss: 2.0,
            stats: vec![],
            skipped: false,
            pause: false,
            checkpoint: false,
            busy: false,
        }
    }

    /// How far one rank got in step 10 when the world ended.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Reached {
        Reducing,
        Entered,
        Passed,
        Updated,
    }

    #[test]
    fn outcomes_are_the_same_if_they_are_equal() {
        let base = BarrierOutcome {
            stats: vec![1],
            ..outcome(7)
        };
        let with = |change: fn(&mut BarrierOutcome)| {
            let mut other = base.clone();
            change(&mut other);
            other
        };
        let others = [
            base.clone(),
            with(|o| o.step = StepsCompleted(8)),
            with(|o| o.grad_norm = 3.0),
            with(|o| o.grad_norm = f64::NAN),
            with(|o| o.loss = 3.0),
            with(|o| o.stats = vec![]),
            with(|o| o.stats = vec![2]),
            with(|o| o.skipped = true),
            with(|o| o.pause = true),
            with(|o| o.checkpoint = true),
            with(|o| o.busy = true),
        ];
        for a in &others {
            for b in &others {
                assert_eq!(is_same_outcome(a, b), a == b, "{a:?} {b:?}");
            }
        }
    }

    fn report(shards: &[u32], reached: Reached) -> StateReport {
        let state = StepsCompleted(if reached == Reached::Updated { 10 } else { 9 });
        let reduced = (reached >= Reached::Entered).then_some(StepsCompleted(10));
        StateReport {
            shards: shards
                .iter()
                .map(|&s| ShardHolding {
                    shard: OptimizerShardIndex(s),
                    state,
                    reduced,
                })
                .collect(),
            passed: Some(outcome(if reached >= Reached::Passed { 10 } else { 9 })),
            lines: vec![],
            waits_for: None,
        }
    }

    fn reached() -> impl Strategy<Value = Reached> {
        prop_oneof![
            Just(Reached::Reducing),
            Just(Reached::Entered),
            Just(Reached::Passed),
            Just(Reached::Updated)
        ]
    }

    proptest! {
        /// STEP-2, with STEP-1 as the barrier gives it: nobody passes unless everybody entered.
        #[test]
        fn a_step_commits_if_and_only_if_a_survivor_passed(
            mut progress in prop::collection::vec(reached(), 4), dead in prop::collection::vec(any::<bool>(), 4)
        ) {
            if progress.iter().any(|&p| p >= Reached::Passed) {
                for p in &mut progress { *p = (*p).max(Reached::Entered); }
            }
            // Shard s lives on workers s and s + 1.
            let reports: BTreeMap<Member, StateReport> = (0..4u32)
                .filter(|&w| !dead[w as usize])
                .map(|w| (member(w), report(&[w, (w + 3) % 4], progress[w as usize])))
                .collect();
            let covered = (0..4).all(|s| !dead[s] || !dead[(s + 1) % 4]);
            let survivor_passed = (0..4).any(|w| !dead[w] && progress[w] >= Reached::Passed);
            match resolve(4, &Rollbacks::default(), &reports) {
                Resolution::Continue { base, outcome, holders } => {
                    prop_assert!(covered);
                    prop_assert_eq!(base, StepsCompleted(if survivor_passed { 10 } else { 9 }));
                    prop_assert_eq!(outcome.map(|o| o.step), Some(base), "the one that passed hands the outcome over");
                    for (shard, members) in holders.iter().enumerate() {
                        let alive = [shard, (shard + 1) % 4].iter().filter(|&&w| !dead[w]).count();
                        prop_assert_eq!(members.len(), alive, "by STEP-1 every surviving holder can finish");
                    }
                }
                Resolution::Restore { missing } => {
                    prop_assert!(!covered);
                    prop_assert!(!missing.is_empty());
                }
            }
        }
    }

    /// The rule in its plainest words, over whole reports.
    fn resolve_plainly(shard_count: usize, reports: &BTreeMap<Member, StateReport>) -> Resolution {
        let stood = reports
            .values()
            .flat_map(|report| report.shards.iter().map(|holding| holding.state));
        let passed = || reports.values().filter_map(|report| report.passed.as_ref());
        let base = stood
            .chain(passed().map(|outcome| outcome.step))
            .max()
            .unwrap_or_default();
        let outcome = passed().find(|outcome| outcome.step == base).cloned();
        let usable = |holding: &ShardHolding| {
            holding.state == base
                || (holding.state.next().completed() == base && holding.reduced == Some(base) && outcome.is_some())
        };
        let holders_of = |shard: u32| -> Vec<Member> {
            let named = |holding: &&ShardHolding| holding.shard.0 == shard && usable(holding);
            reports
                .iter()
                .flat_map(|(&member, report)| report.shards.iter().filter(named).map(move |_| member))
                .collect()
        };
        let holders: Vec<Vec<Member>> = (0..shard_count as u32).map(holders_of).collect();
        let missing: Vec<OptimizerShardIndex> = (0..shard_count as u32)
            .filter(|&s| holders[s as usize].is_empty())
            .map(OptimizerShardIndex)
            .collect();
        if missing.is_empty() {
            Resolution::Continue { base, outcome, holders }
        } else {
            Resolution::Restore { missing }
        }
    }

    fn any_report() -> impl Strategy<Value = StateReport> {
        let holding = (0u32..4, 7u64..10, prop::option::of(8u64..11));
        let passed = prop::option::of((7u64..11, prop_oneof![Just(1.0), Just(2.0), Just(3.0)]));
        (prop::collection::vec(holding, 0..6), passed).prop_map(|(holdings, passed)| StateReport {
            shards: holdings
                .into_iter()
                .map(|(shard, state, reduced)| ShardHolding {
                    shard: OptimizerShardIndex(shard),
                    state: StepsCompleted(state),
                    reduced: reduced.map(StepsCompleted),
                })
                .collect(),
            passed: passed.map(|(step, loss)| BarrierOutcome { loss, ..outcome(step) }),
            waits_for: None,
            lines: vec![],
        })
    }

    proptest! {
        /// Answers taken in one by one, in any order, with some of them taken back, give what the whole reports give.
        #[test]
        fn the_order_of_answers_and_those_gone_do_not_show(
            answers in prop::collection::vec((any_report(), any::<bool>()), 1..7).prop_shuffle(), order in any::<u64>()
        ) {
            let mut survey = Survey::default();
            let mut kept = BTreeMap::new();
            let count = answers.len() as u32;
            for (at, (report, stays)) in answers.into_iter().enumerate() {
                let member = member((at as u32 * 5 + (order % 7) as u32) % (5 * count + 7));
                survey.hear(member, &report.shards, report.passed.as_ref());
                kept.insert(member, (report, stays));
            }
            kept.iter().filter(|(_, (_, stays))| !stays).for_each(|(&member, _)| survey.forget(member));
            let kept: BTreeMap<Member, StateReport> =
                kept.into_iter().filter(|(_, (_, stays))| *stays).map(|(member, (report, _))| (member, report)).collect();
            let expected = resolve_plainly(3, &kept);
            let found = match survey.resolve(3, &Rollbacks::default()) {
                Ok(Agreement { base, outcome, holders }) => {
                    let holders = (0..3).map(|shard| holders.of(shard).to_vec()).collect();
                    Resolution::Continue { base, outcome, holders }
                }
                Err(missing) => Resolution::Restore { missing },
            };
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(resolve(3, &Rollbacks::default(), &kept), expected);
            prop_assert_eq!(survey.answered().len(), kept.len());
        }
    }

    #[test]
    fn a_lost_shard_means_restore_and_names_it() {
        let reports = BTreeMap::from([(member(0), report(&[0, 1], Reached::Updated))]);
        assert_eq!(
            resolve(3, &Rollbacks::default(), &reports),
            Resolution::Restore {
                missing: vec![OptimizerShardIndex(2)]
            }
        );
        assert!(matches!(
            resolve(1, &Rollbacks::default(), &BTreeMap::new()),
            Resolution::Restore { .. }
        ));
    }

    #[test]
    fn a_shard_that_the_layout_does_not_have_is_ignored() {
        let reports = BTreeMap::from([(member(0), report(&[0, 1, 77], Reached::Updated))]);
        assert!(
            matches!(resolve(2, &Rollbacks::default(), &reports), Resolution::Continue { holders, .. } if holders.len() == 2)
        );
    }

    #[test]
    fn a_copy_left_behind_by_an_older_step_is_no_donor() {
        let mut stale = report(&[0], Reached::Reducing);
        stale.shards[0].state = StepsCompleted(7);
        let reports = BTreeMap::from([(member(0), stale), (member(1), report(&[0, 1], Reached::Updated))]);
        let Resolution::Continue { holders, .. } = resolve(2, &Rollbacks::default(), &reports) else {
            panic!("shard 0 lives on worker 1")
        };
        assert_eq!(holders[0], vec![member(1)]);
    }
}
