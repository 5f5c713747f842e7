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

    /// Packs claims, each of a member on a shard; those of one shard come in the order of its members, or in none. A shard that
    /// the layout does not have is not there, whoever claims it.
    ///
    /// # Errors
    /// The shards that nobody claims.
    fn pack(
        shard_count: usize,
        claims: impl Iterator<Item = (OptimizerShardIndex, Member)> + Clone,
        in_order: bool,
    ) -> Result<Self, Vec<OptimizerShardIndex>> {
        let claims = claims.filter(|(shard, _)| shard.index() < shard_count);
        let mut starts = vec![0_u32; shard_count + 1];
        for (shard, _) in claims.clone() {
            starts[shard.index() + 1] += 1;
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
        for (shard, member) in claims {
            let end = &mut ends[shard.index()];
            members[*end as usize] = member;
            *end += 1;
        }
        if !in_order {
            for shard in 0..shard_count {
                members[starts[shard] as usize..starts[shard + 1] as usize].sort_unstable();
            }
        }
        Ok(Self { starts, members })
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
        let is_live = |step: &StepsCompleted| rollbacks.is_live(*step) || Mutant::DeadStateKept.is_on();
        let step_of = |at: u32| self.outcomes[at as usize].step;
        let stood = self.stands.iter().zip(held).filter(|(_, held)| *held);
        let stood = stood.map(|(stand, _)| stand.state);
        let passed = self.passed.iter().map(|&(_, at)| step_of(at));
        let base = stood.chain(passed).filter(is_live).max().unwrap_or_default();
        let passed_it = self.passed.iter().filter(|&&(_, at)| step_of(at) == base);
        let told_by = passed_it.min_by_key(|&&(member, _)| member);
        let outcome = told_by.map(|&(_, at)| self.outcomes[at as usize].clone());

        let before = base.0.checked_sub(1).map(|step| rollbacks.start_of(StepIndex(step)));
        let is_usable = |stand: &Stand| {
            let stands = stand.state == base;
            let can_finish = Some(stand.state) == before
                && (stand.reduced == Some(base) || Mutant::StaleHolder.is_on())
                && outcome.is_some();
            is_live(&stand.state) && (stands || can_finish)
        };
        let usable: Vec<bool> = self.stands.iter().map(is_usable).collect();
        let claims = self.claims.iter().filter(|claim| usable[claim.stand as usize]);
        let holders = Holders::pack(shard_count, claims.map(|claim| (claim.shard, claim.member)), in_order)?;
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

    fn holding(shard: u32, state: u64, reduced: Option<u64>) -> ShardHolding {
        ShardHolding {
            shard: OptimizerShardIndex(shard),
            state: StepsCompleted(state),
            reduced: reduced.map(StepsCompleted),
        }
    }

    fn report(shards: Vec<ShardHolding>, passed: Option<BarrierOutcome>) -> StateReport {
        StateReport {
            shards,
            passed,
            lines: vec![],
            waits_for: None,
        }
    }

    /// One that stands at this count with these shards.
    fn standing(shards: &[u32], state: u64) -> StateReport {
        let holdings = shards.iter().map(|&shard| holding(shard, state, Some(state)));
        report(holdings.collect(), Some(outcome(state)))
    }

    /// The rule by trying: which counts there is a witness of, and which of them each copy gets to with what the survivors have.
    fn resolve_by_trying(shard_count: usize, reports: &BTreeMap<Member, StateReport>) -> Resolution {
        const COUNTS: std::ops::Range<u64> = 0..20;
        let outcome_of = |count: u64| {
            let mut told = reports.values().filter_map(|report| report.passed.as_ref());
            told.find(|outcome| outcome.step.0 == count).cloned()
        };
        let held = || reports.values().flat_map(|report| &report.shards);
        let is_witnessed = |&count: &u64| outcome_of(count).is_some() || held().any(|holding| holding.state.0 == count);
        let base = COUNTS.rev().find(is_witnessed).unwrap_or(0);
        // A step that leads further than the base has no witness, so nobody can do it.
        let gets_to_base = |holding: &ShardHolding| {
            let mut at = holding.state.0;
            while holding.reduced == Some(StepsCompleted(at + 1)) && outcome_of(at + 1).is_some() {
                at += 1;
            }
            at == base
        };
        let (mut holders, mut missing) = (Vec::new(), Vec::new());
        for shard in (0..shard_count as u32).map(OptimizerShardIndex) {
            let mut members = Vec::new();
            for (&member, report) in reports {
                let copies = report.shards.iter().filter(|holding| holding.shard == shard);
                members.extend(copies.filter(|copy| gets_to_base(copy)).map(|_| member));
            }
            if members.is_empty() {
                missing.push(shard);
            }
            holders.push(members);
        }
        if missing.is_empty() {
            let (base, outcome) = (StepsCompleted(base), outcome_of(base));
            Resolution::Continue { base, outcome, holders }
        } else {
            Resolution::Restore { missing }
        }
    }

    const BEFORE: u64 = 9;
    const AFTER: u64 = 10;

    /// A generation in the middle of the step from 9 to 10.
    #[derive(Clone, Debug)]
    struct World {
        shards: u32,
        /// Copies that each rank was given, and whether their reduced gradients come.
        given: Vec<Vec<(ShardHolding, bool)>>,
        /// Copies that each rank still has from older generations, and nobody counts on.
        left_over: Vec<Vec<ShardHolding>>,
        entered: Vec<bool>,
        passed: Vec<bool>,
    }

    impl World {
        /// The next move of a rank, in the order that the step has them; none while it waits for others.
        fn advance(&mut self, rank: usize) {
            let copies = &mut self.given[rank];
            if !self.entered[rank] {
                let comes = |(copy, comes): &&mut (ShardHolding, bool)| *comes && copy.reduced.is_none();
                match copies.iter_mut().find(comes) {
                    Some((copy, _)) => copy.reduced = Some(StepsCompleted(AFTER)),
                    // STEP-1, where all of them come.
                    None => self.entered[rank] = true,
                }
            } else if !self.passed[rank] {
                self.passed[rank] = self.entered.iter().all(|entered| *entered);
            } else {
                let is_due = |(copy, _): &&mut (ShardHolding, bool)| copy.state.0 == BEFORE && copy.reduced.is_some();
                if let Some((copy, _)) = copies.iter_mut().find(is_due) {
                    copy.state = StepsCompleted(AFTER);
                }
            }
        }

        fn keeps_step_1(&self) -> bool {
            self.given.iter().flatten().all(|(_, comes)| *comes)
        }

        fn report(&self, rank: usize) -> StateReport {
            let given = self.given[rank].iter().map(|(copy, _)| *copy);
            let all = given.chain(self.left_over[rank].iter().copied());
            let newest = if self.passed[rank] { AFTER } else { BEFORE };
            report(all.collect(), Some(outcome(newest)))
        }
    }

    /// Of one to six ranks, one to seven shards and one to three copies of each, wherever they lie.
    fn any_world() -> impl Strategy<Value = World> {
        let sizes = (1_usize..7, 1_u32..8, 1_usize..4);
        sizes.prop_flat_map(|(ranks, shards, copies)| {
            let all: Vec<usize> = (0..ranks).collect();
            let places = prop::collection::vec(prop::sample::subsequence(all, copies.min(ranks)), shards as usize);
            // In most worlds every gradient comes.
            let late = prop_oneof![
                3 => Just(Vec::new()),
                1 => prop::collection::vec((0..ranks, 0..shards), 1..4)
            ];
            let reduced = prop::option::of(BEFORE..=AFTER);
            let left_over = prop::collection::vec((0..ranks, 0..shards, 6..=BEFORE, reduced), 0..6);
            (places, late, left_over).prop_map(move |(places, late, left_over)| {
                let mut world = World {
                    shards,
                    given: vec![Vec::new(); ranks],
                    left_over: vec![Vec::new(); ranks],
                    entered: vec![false; ranks],
                    passed: vec![false; ranks],
                };
                for (shard, place) in (0_u32..).zip(places) {
                    for rank in place {
                        let comes = !late.contains(&(rank, shard));
                        world.given[rank].push((holding(shard, BEFORE, None), comes));
                    }
                }
                for (rank, shard, state, reduced) in left_over {
                    let copy = holding(shard, state, reduced);
                    let is_given = world.given[rank].iter().any(|(given, _)| given.shard == copy.shard);
                    let is_there = world.left_over[rank].iter().any(|other| other.shard == copy.shard);
                    if !is_given && !is_there {
                        world.left_over[rank].push(copy);
                    }
                }
                world
            })
        })
    }

    proptest! {
        /// STEP-1, STEP-2: a step commits if and only if a survivor passed its barrier, and then every survivor finishes it with
        /// every copy that it was given. Who cannot finish it is no donor, be its copy old or its gradient missing.
        #[test]
        fn a_step_commits_if_and_only_if_a_survivor_passed(
            (mut world, moves, dead) in any_world().prop_flat_map(|world| {
                let ranks = world.given.len();
                // Enough for a whole step of all of them.
                let moves = prop::collection::vec(0..ranks, 0..80);
                (Just(world), moves, prop::collection::vec(any::<bool>(), ranks))
            })
        ) {
            for rank in moves {
                world.advance(rank);
            }
            let survivors: Vec<usize> = (0..dead.len()).filter(|&rank| !dead[rank]).collect();
            let reports: BTreeMap<Member, StateReport> =
                survivors.iter().map(|&rank| (member(rank as u32), world.report(rank))).collect();
            let found = resolve(world.shards as usize, &Rollbacks::default(), &reports);
            prop_assert_eq!(&found, &resolve_by_trying(world.shards as usize, &reports));
            let passed = survivors.iter().any(|&rank| world.passed[rank]);
            let given = |shard: u32| {
                let has = |rank: &usize| world.given[*rank].iter().any(|(copy, _)| copy.shard.0 == shard);
                survivors.iter().copied().filter(has).collect::<Vec<usize>>()
            };
            match found {
                Resolution::Continue { base, outcome, holders } => {
                    prop_assert_eq!(base, StepsCompleted(if passed { AFTER } else { BEFORE }));
                    prop_assert_eq!(outcome.map(|o| o.step), Some(base), "the one that passed hands the outcome over");
                    for (shard, members) in (0_u32..).zip(&holders) {
                        let all = given(shard).into_iter().all(|rank| members.contains(&member(rank as u32)));
                        prop_assert!(all || !world.keeps_step_1(), "by STEP-1 every surviving holder can finish");
                        for holder in members {
                            let copy = reports[holder].shards.iter().find(|copy| copy.shard.0 == shard);
                            let copy = copy.expect("what a holder holds");
                            let stands = copy.state == base;
                            prop_assert!(stands || copy.state.next().completed() == base && copy.reduced == Some(base));
                        }
                    }
                }
                Resolution::Restore { missing } => {
                    let lost = missing.iter().all(|shard| given(shard.0).is_empty());
                    prop_assert!(!missing.is_empty());
                    prop_assert!(lost || !world.keeps_step_1(), "a survivor was given one of {missing:?}");
                }
            }
        }
    }

    fn any_report() -> impl Strategy<Value = StateReport> {
        let copy = (0u32..4, 7u64..10, prop::option::of(8u64..11));
        let passed = prop::option::of((7u64..11, prop_oneof![Just(1.0), Just(2.0), Just(3.0)]));
        (prop::collection::vec(copy, 0..6), passed).prop_map(|(copies, passed)| {
            let copies = copies.into_iter();
            let shards = copies.map(|(shard, state, reduced)| holding(shard, state, reduced));
            let passed = passed.map(|(step, loss)| BarrierOutcome { loss, ..outcome(step) });
            report(shards.collect(), passed)
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
            let expected = resolve_by_trying(3, &kept);
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
        let reports = BTreeMap::from([(member(0), standing(&[0, 1], AFTER))]);
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
        let reports = BTreeMap::from([(member(0), standing(&[0, 1, 77], AFTER))]);
        assert!(
            matches!(resolve(2, &Rollbacks::default(), &reports), Resolution::Continue { holders, .. } if holders.len() == 2)
        );
    }

    #[test]
    fn a_copy_left_behind_by_an_older_step_is_no_donor() {
        let stale = report(vec![holding(0, 7, None)], Some(outcome(BEFORE)));
        let reports = BTreeMap::from([(member(0), stale), (member(1), standing(&[0, 1], AFTER))]);
        let Resolution::Continue { holders, .. } = resolve(2, &Rollbacks::default(), &reports) else {
            panic!("shard 0 lives on worker 1")
        };
        assert_eq!(holders[0], vec![member(1)]);
    }
}
