//! Which samples a step trains on: a pure function of (recipe, step, decisions so far).
//!
//! - **DATA-1** Every sample of a domain's epoch is in exactly one committed step: domains are drawn in the order of a
//!   keyed permutation per epoch, and a new epoch begins when one is used up. Lanes are slices of the batch, so world
//!   size and failures have no part in it.
//! - **DATA-2** The cursor is the committed step and the decisions so far. What it holds besides (draws and carries) is a
//!   cache of a replay from step 0, which costs well under a microsecond per step.
//! - **STEP-6** [`DataCursor::needs`] says which outcome a step waits for, if any.
//!
//! It reads no token: where a sequence lies is the corpus' affair.

use super::catalogue::{Catalogue, Holding};
use super::composition::{Carry, Composer, Quanta, SEQUENCES_PER_STEP_MAX, interleave};
use super::course::Directives;
use super::decision::{
    Decision, DecisionKind, DecisionLedger, DecisionSchedule, DiscardedSamples, LedgerError, check_weights,
};
use super::permutation::{KeyedPermutation, SEQUENCES_MAX, rotation};
use std::collections::BTreeSet;
use std::sync::Arc;
use tarazed_domain::config::BatchSchedule;
use tarazed_domain::limits::DOMAINS_MAX;
use tarazed_domain::{DomainIndex, LaneIndex, StepIndex, StepsCompleted};

const DIGEST_CONTEXT: &str = "tarazed step data v1";

/// One domain of a recipe.
#[derive(Clone, PartialEq, Debug)]
pub struct DomainRecipe {
    /// Unique name; it keys the order of samples, so the order of domains in the config does not.
    pub name: String,
    /// Training sequences of one epoch.
    pub train_sequences: u64,
    /// Weight in the initial mixture, before normalising.
    pub weight: f64,
}

/// What decides the samples of a run, besides decisions.
#[derive(Clone, PartialEq, Debug)]
pub struct Recipe {
    /// Seed of the run.
    pub seed: u64,
    /// Domains, in config order.
    pub domains: Vec<DomainRecipe>,
    /// Sequences of the global batch, by step.
    pub batch: BatchSchedule,
    /// Hash of the prepared data.
    pub data_version: [u8; 32],
}

/// A recipe that cannot be followed. The caller reconfigures.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[error("the data recipe is refused: {0}")]
pub struct RecipeError(pub String);

/// One training sequence.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SampleRef {
    /// Domain, in config order.
    pub domain: DomainIndex,
    /// Pass over the domain's edition, from 0.
    pub epoch: u32,
    /// Sequence within the domain's training part.
    pub sequence: u64,
}

/// The samples of one step.
#[derive(Clone, PartialEq, Debug)]
pub struct StepPlan {
    /// The step.
    pub step: StepIndex,
    /// The global batch, in order; lane `l` of `L` owns the places `⌊l n / L⌋` up to `⌊(l + 1) n / L⌋` of `n`: as even as can
    /// be, and none where a ramp begins with fewer sequences than lanes.
    pub samples: Vec<SampleRef>,
    /// What the domains hold, in their order.
    pub holdings: Arc<[Holding]>,
    /// Hash over the data version and the samples: the `data` of the trace line.
    pub digest: [u8; 32],
    /// Mixture in force, normalised, in domain order.
    pub mixture: Vec<f64>,
    /// Sequences of each domain.
    pub counts: Vec<u32>,
    /// What else was decided for it.
    pub directives: Directives,
}

impl StepPlan {
    /// The samples of one of `lane_count` lanes.
    ///
    /// # Panics
    /// If there is no such lane.
    #[must_use]
    pub fn lane(&self, lane: LaneIndex, lane_count: u32) -> &[SampleRef] {
        assert!(lane.0 < lane_count, "lane {lane} of {lane_count}");
        // In 64 bits: both factors are of 32.
        let before = |lanes: u64| (lanes * self.samples.len() as u64 / u64::from(lane_count)) as usize;
        &self.samples[before(u64::from(lane.0))..before(u64::from(lane.0) + 1)]
    }
}

/// A step that cannot be planned.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// Wait: the outcome of this decision point decides the step's mixture.
    #[error("the outcome of decision point {line} is not known yet; record line {line} first")]
    DecisionMissing {
        /// The decision point.
        line: StepsCompleted,
    },
    /// Halt: a domain so small that its passes cannot be counted.
    #[error("domain '{domain}' was passed over more than 2^32 times; give it more data or a lower weight")]
    TooManyEpochs {
        /// The domain.
        domain: String,
    },
}

/// Decisions that cannot be completed. The caller halts.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CompleteError {
    /// A rollback asks for a step that is not known.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The decisions beside it are refused.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

fn without_rollbacks(decisions: &[Decision]) -> Vec<Decision> {
    let is_rollback = |decision: &&Decision| matches!(decision.kind, DecisionKind::Rollback { .. });
    decisions
        .iter()
        .filter(|decision| !is_rollback(decision))
        .cloned()
        .collect()
}

/// A cache of the replay from step 0.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Position {
    next: StepIndex,
    /// Sections of the catalogue that have begun.
    sections: usize,
    drawn: Vec<u64>,
    /// What was drawn of each domain when its present edition began.
    begun: Vec<u64>,
    carry: Carry,
}

/// A mixture and the first step it holds for.
#[derive(Clone, PartialEq, Debug)]
struct Segment {
    from: StepIndex,
    weights: Vec<f64>,
    quanta: Quanta,
}

/// Plans steps. Cloning it is cheap; clones never disagree.
#[derive(Clone, Debug)]
pub struct DataCursor {
    recipe: Recipe,
    ledger: DecisionLedger,
    segments: Vec<Segment>,
    catalogue: Catalogue,
    position: Position,
    counts: Vec<u32>,
    composer: Composer,
}

impl DataCursor {
    /// The cursor at step 0, with no decision.
    ///
    /// # Errors
    /// A [`RecipeError`] naming what is wrong.
    pub fn new(recipe: Recipe, schedule: DecisionSchedule) -> Result<Self, RecipeError> {
        check_recipe(&recipe)?;
        let weights: Vec<f64> = recipe.domains.iter().map(|domain| domain.weight).collect();
        let domain_count = weights.len();
        Ok(Self {
            segments: vec![Segment::new(StepIndex(0), &weights)],
            catalogue: Catalogue::new(&recipe, &[]).map_err(RecipeError)?,
            ledger: DecisionLedger::new(schedule, weights),
            position: Position::start(domain_count),
            counts: vec![0; domain_count],
            composer: Composer::default(),
            recipe,
        })
    }

    /// The cursor as of line `recorded`, from all decisions up to it, in order: what a restore and a new rank do.
    ///
    /// # Errors
    /// A [`RecipeError`]; refused decisions are named in it.
    pub fn restore(
        recipe: Recipe,
        schedule: DecisionSchedule,
        recorded: StepsCompleted,
        decisions: &[Decision],
    ) -> Result<Self, RecipeError> {
        let mut cursor = Self::new(recipe, schedule)?;
        let weights = cursor.ledger.course().mixture(StepIndex(0)).to_vec();
        cursor.ledger =
            DecisionLedger::rebuild(schedule, weights, recorded, decisions).map_err(|e| RecipeError(e.to_string()))?;
        cursor.catalogue = Catalogue::new(&cursor.recipe, decisions).map_err(RecipeError)?;
        cursor.segment_again();
        Ok(cursor)
    }

    /// Takes over the decisions of a committed line, possibly none. Every decision point must come, in order; other
    /// lines may be left out, and the same outcome may come again.
    ///
    /// # Errors
    /// A [`LedgerError`]; the cursor is then unchanged.
    pub fn record(&mut self, line: StepsCompleted, decisions: &[Decision]) -> Result<(), LedgerError> {
        if line > self.ledger.recorded() {
            self.check_discarded(line, decisions)?;
        }
        let catalogue = self.catalogue_with(line, decisions)?;
        if self.ledger.record(line, decisions)? && !decisions.is_empty() {
            // The ledger refuses late decisions, so no step planned so far may have another mixture now.
            let planned = self.position.next;
            assert!(
                decisions.iter().all(|decision| decision.effective >= planned),
                "decisions of line {line} would change a planned step"
            );
            self.segment_again();
            if let Some(catalogue) = catalogue {
                self.catalogue = catalogue;
            }
        }
        Ok(())
    }

    /// What there is after these decisions too, where they change it.
    fn catalogue_with(&self, line: StepsCompleted, decisions: &[Decision]) -> Result<Option<Catalogue>, LedgerError> {
        let changes = |decision: &&Decision| matches!(decision.kind, DecisionKind::Data(_));
        let Some(first) = decisions.iter().find(changes).filter(|_| line > self.ledger.recorded()) else {
            return Ok(None);
        };
        let all = [self.ledger.decisions(), decisions].concat();
        let catalogue = Catalogue::new(&self.recipe, &all).map_err(|reason| LedgerError::Refused {
            id: first.id,
            line,
            reason,
        })?;
        Ok(Some(catalogue))
    }

    /// What a rollback says it discards is what it discards (DATA-3).
    fn check_discarded(&self, line: StepsCompleted, decisions: &[Decision]) -> Result<(), LedgerError> {
        let mut whole = decisions.to_vec();
        let completed = self.complete(line, &mut whole);
        let refuse = |decision: &Decision, reason: String| {
            Err(LedgerError::Refused {
                id: decision.id,
                line,
                reason,
            })
        };
        match (
            completed,
            decisions.iter().zip(&whole).find(|(said, found)| said != found),
        ) {
            (Err(CompleteError::Ledger(error)), _) => Err(error),
            (Err(CompleteError::Plan(error)), _) => match decisions.first() {
                Some(decision) => refuse(decision, error.to_string()),
                None => Ok(()),
            },
            (Ok(()), Some((said, _))) => refuse(said, "it does not discard the samples that it names".to_owned()),
            (Ok(()), None) => Ok(()),
        }
    }

    fn segment_again(&mut self) {
        let segments = self.ledger.course().segments();
        self.segments = segments
            .iter()
            .map(|(from, weights)| Segment::new(*from, weights))
            .collect();
    }

    /// Fills in what a rollback discards, which its author need not know: of each domain, the draws from the state gone
    /// back to up to the step at which it acts. Call it before the decisions of `line` are recorded.
    ///
    /// # Errors
    /// [`PlanError::DecisionMissing`] where an earlier outcome is not recorded, or the [`LedgerError`] of these.
    pub fn complete(&self, line: StepsCompleted, decisions: &mut [Decision]) -> Result<(), CompleteError> {
        if !decisions
            .iter()
            .any(|decision| matches!(decision.kind, DecisionKind::Rollback { .. }))
        {
            return Ok(());
        }
        // What acts between the line and the rollback is decided by this line at the latest.
        let mut ahead = self.clone();
        ahead.record(line, &without_rollbacks(decisions))?;
        for decision in decisions {
            if let DecisionKind::Rollback { to, discarded } = &mut decision.kind {
                *discarded = ahead.discarded(*to, decision.effective)?;
            }
        }
        Ok(())
    }

    /// Draws of each domain by the steps from `to` on and before `until`.
    ///
    /// # Errors
    /// [`PlanError::DecisionMissing`] to wait.
    pub fn discarded(&mut self, to: StepsCompleted, until: StepIndex) -> Result<Vec<DiscardedSamples>, PlanError> {
        let mut first = self.drawn(StepIndex(to.0))?;
        let end = self.drawn(until)?;
        first.resize(end.len(), 0); // of a domain that came since, all
        let draws = first.into_iter().zip(end);
        Ok(draws
            .map(|(first, end)| DiscardedSamples {
                first,
                count: end - first,
            })
            .collect())
    }

    /// The newest decision point whose outcome must be recorded before `step` can be planned; 0 if there is none.
    #[must_use]
    pub fn needs(&self, step: StepIndex) -> StepsCompleted {
        self.ledger.schedule().needs(step)
    }

    /// Whether a decision ends the run before `step`; none where that is not known yet.
    #[must_use]
    pub fn ends_before(&self, step: StepIndex) -> Option<bool> {
        let known = self.needs(step) <= self.ledger.recorded();
        known.then(|| self.ledger.course().stop().is_some_and(|stop| stop <= step))
    }

    /// Plans any step whose decisions are known. Planning forward from the last planned step is cheap; a step further
    /// back is found by replay from 0 and gives the same plan (DATA-2).
    ///
    /// # Errors
    /// [`PlanError::DecisionMissing`] to wait, [`PlanError::TooManyEpochs`] to halt.
    pub fn plan(&mut self, step: StepIndex) -> Result<StepPlan, PlanError> {
        self.seek(step)?;
        let drawn_before = self.position.drawn.clone();
        self.advance();
        let sequences = self.recipe.batch.sequences(step);
        let places = interleave(&self.counts, rotation(self.recipe.seed, step, sequences));
        let holdings = Arc::clone(&self.catalogue.at(step).holdings);
        let samples = match self.samples(&holdings, drawn_before, &places) {
            Ok(samples) => samples,
            Err(e) => {
                self.restart();
                return Err(e);
            }
        };
        Ok(StepPlan {
            step,
            digest: digest(&self.catalogue.at(step).version, &samples),
            samples,
            holdings,
            mixture: self.segment(step).weights.clone(),
            counts: self.counts.clone(),
            directives: self.ledger.course().directives(step),
        })
    }

    /// Sequences drawn from each domain by the steps before `step`, in domain order.
    ///
    /// # Errors
    /// [`PlanError::DecisionMissing`] to wait.
    pub fn drawn(&mut self, step: StepIndex) -> Result<Vec<u64>, PlanError> {
        self.seek(step)?;
        Ok(self.position.drawn.clone())
    }

    /// Moves to `step`.
    ///
    /// # Errors
    /// [`PlanError::DecisionMissing`] to wait.
    pub fn seek(&mut self, step: StepIndex) -> Result<(), PlanError> {
        let line = self.needs(step);
        if line > self.ledger.recorded() {
            return Err(PlanError::DecisionMissing { line });
        }
        if step < self.position.next {
            self.restart();
        }
        while self.position.next < step {
            self.advance();
        }
        self.arrive();
        Ok(())
    }

    /// All decisions so far: with the committed step, the whole state (DATA-2).
    #[must_use]
    pub const fn ledger(&self) -> &DecisionLedger {
        &self.ledger
    }

    /// The recipe.
    #[must_use]
    pub const fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    fn segment(&self, step: StepIndex) -> &Segment {
        let after = self.segments.partition_point(|segment| segment.from <= step);
        &self.segments[after - 1] // the first segment begins at step 0
    }

    fn restart(&mut self) {
        self.position = Position::start(self.recipe.domains.len());
        self.counts = vec![0; self.recipe.domains.len()];
    }

    /// What begins with the next step: new domains, of which nothing is drawn and to which nothing is owed, and editions.
    fn arrive(&mut self) {
        while let Some(section) = self.catalogue.sections().get(self.position.sections)
            && section.from <= self.position.next
        {
            let position = &mut self.position;
            let domain_count = section.holdings.len();
            position.drawn.resize(domain_count, 0);
            position.begun.resize(domain_count, 0);
            position.carry.grow(domain_count);
            self.counts.resize(domain_count, 0);
            for &domain in &section.begun {
                position.begun[domain] = position.drawn[domain];
            }
            position.sections += 1;
        }
    }

    /// Counts of the next step, and past it.
    fn advance(&mut self) {
        self.arrive();
        let after = self
            .segments
            .partition_point(|segment| segment.from <= self.position.next);
        let quanta = &self.segments[after - 1].quanta;
        let sequences = self.recipe.batch.sequences(self.position.next);
        self.composer
            .compose(quanta, sequences, &mut self.position.carry, &mut self.counts);
        for (drawn, count) in self.position.drawn.iter_mut().zip(&self.counts) {
            *drawn += u64::from(*count);
        }
        self.position.next.0 += 1;
    }

    fn samples(
        &self,
        holdings: &[Holding],
        mut drawn: Vec<u64>,
        places: &[DomainIndex],
    ) -> Result<Vec<SampleRef>, PlanError> {
        let mut epochs: Vec<Option<(u32, KeyedPermutation)>> = vec![None; drawn.len()];
        let mut samples = Vec::with_capacity(places.len());
        for &domain in places {
            let held = &holdings[domain.index()];
            let place = drawn[domain.index()] - self.position.begun[domain.index()];
            drawn[domain.index()] += 1;
            let epoch = u32::try_from(place / held.train_sequences).map_err(|_| PlanError::TooManyEpochs {
                domain: held.name.clone(),
            })?;
            let slot = &mut epochs[domain.index()];
            let (_, permutation) = match slot {
                Some(current) if current.0 == epoch => current,
                _ => slot.insert((
                    epoch,
                    KeyedPermutation::new(self.recipe.seed, &held.order_key, epoch, held.train_sequences),
                )),
            };
            samples.push(SampleRef {
                domain,
                epoch,
                sequence: permutation.apply(place % held.train_sequences),
            });
        }
        Ok(samples)
    }
}

impl Position {
    fn start(domain_count: usize) -> Self {
        Self {
            next: StepIndex(0),
            sections: 1,
            drawn: vec![0; domain_count],
            begun: vec![0; domain_count],
            carry: Carry::new(domain_count),
        }
    }
}

impl Segment {
    fn new(from: StepIndex, weights: &[f64]) -> Self {
        let sum: f64 = weights.iter().sum();
        Self {
            from,
            weights: weights.iter().map(|weight| weight / sum).collect(),
            quanta: Quanta::new(weights),
        }
    }
}

fn check_recipe(recipe: &Recipe) -> Result<(), RecipeError> {
    let refuse = |reason: String| Err(RecipeError(reason));
    let domains = &recipe.domains;
    if !(1..=DOMAINS_MAX).contains(&domains.len()) {
        return refuse(format!("{} domains are not in 1..={DOMAINS_MAX}", domains.len()));
    }
    if let Some((_, sequences)) = recipe
        .batch
        .stages()
        .find(|(_, sequences)| !(1..=SEQUENCES_PER_STEP_MAX).contains(sequences))
    {
        return refuse(format!(
            "a batch of {sequences} sequences is not in 1..={SEQUENCES_PER_STEP_MAX}"
        ));
    }
    let weights: Vec<f64> = domains.iter().map(|domain| domain.weight).collect();
    check_weights(&weights, domains.len()).or_else(&refuse)?;
    let mut names = BTreeSet::new();
    for domain in domains {
        if !names.insert(&domain.name) {
            return refuse(format!("domain '{}' stands twice", domain.name));
        }
        if !(1..=SEQUENCES_MAX).contains(&domain.train_sequences) {
            return refuse(format!(
                "domain '{}' has {} training sequences, not 1..=2^40; add data, lower the context or leave it out",
                domain.name, domain.train_sequences
            ));
        }
    }
    Ok(())
}

fn digest(data_version: &[u8; 32], samples: &[SampleRef]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(DIGEST_CONTEXT);
    hasher.update(data_version);
    let mut bytes = Vec::with_capacity(samples.len() * 14);
    for sample in samples {
        bytes.extend_from_slice(&sample.domain.0.to_le_bytes());
        bytes.extend_from_slice(&sample.epoch.to_le_bytes());
        bytes.extend_from_slice(&sample.sequence.to_le_bytes());
    }
    hasher.update(&bytes);
    *hasher.finalize().as_bytes()
}
