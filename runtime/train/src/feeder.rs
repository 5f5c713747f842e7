//! The samples of this rank's lanes, a few steps ahead, made by a thread of its own.
//!
//! - **DATA-2** A batch is a function of (recipe, step, decisions so far); the feeder holds no other state.
//! - **STEP-6** It waits only where the outcome of a decision point due is missing.
//! - **SUP-5** It holds at most [`PREFETCH_STEPS_MAX`] batches.

use crate::StepError;
use crate::state::StepFacts;
use crate::waiting::Waiting;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tarazed_domain::limits::PREFETCH_STEPS_MAX;
use tarazed_domain::{DomainIndex, Generation, LaneIndex, LaneRange, Mutant, Rank, StepIndex, StepsCompleted};
use tarazed_protocol::data::catalogue::Origin;
use tarazed_protocol::data::course::Directives;
use tarazed_protocol::data::cursor::{DataCursor, PlanError, StepPlan};
use tarazed_protocol::data::decision::{DataChange, Decision};
use tarazed_protocol::message::BeginPlan;
use tarazed_protocol::rollback::Rollbacks;

/// Where tokens are read.
pub trait SampleSource: Send + Sync + 'static {
    /// Held-out sequences of a domain.
    fn held_out_sequences(&self, domain: DomainIndex) -> u64;
    /// Reads a training sequence of `context + 1` tokens.
    ///
    /// # Errors
    /// A message naming the file.
    fn training(&self, domain: DomainIndex, sequence: u64, out: &mut [u32]) -> Result<(), String>;
    /// Reads a held-out sequence of `context + 1` tokens.
    ///
    /// # Errors
    /// A message naming the file.
    fn held_out(&self, domain: DomainIndex, sequence: u64, out: &mut [u32]) -> Result<(), String>;
    /// Opens the data set of a change, which must hold the domains that the change names.
    ///
    /// # Errors
    /// A message naming the data set, where it was looked for and what is wrong with it.
    fn open(&self, change: &DataChange) -> Result<Arc<dyn SampleSource>, String> {
        Err(format!(
            "data set {} is needed from here on, and nothing can be looked up here",
            change.version
        ))
    }
}

/// One domain's text in one data set.
struct Text {
    source: Arc<dyn SampleSource>,
    domain: DomainIndex,
}

/// Sequences one after another, each with its domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequences {
    tokens: Vec<u32>,
    domains: Vec<DomainIndex>,
}

/// A few consecutive sequences.
#[derive(Clone, Copy, Debug)]
pub struct SequencesRef<'a> {
    /// `context + 1` tokens of each.
    pub tokens: &'a [u32],
    /// The domain of each.
    pub domains: &'a [DomainIndex],
}

impl Sequences {
    /// Cuts into micro-batches of at most `count` sequences of `sequence_tokens` each, left to right.
    pub fn chunks(&self, count: usize, sequence_tokens: usize) -> impl Iterator<Item = SequencesRef<'_>> {
        self.tokens
            .chunks(count * sequence_tokens)
            .zip(self.domains.chunks(count))
            .map(|(tokens, domains)| SequencesRef { tokens, domains })
    }
}

/// One lane's samples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaneSamples {
    /// To train on.
    pub training: Sequences,
    /// To evaluate with the weights before this step; empty in most steps.
    pub held_out: Sequences,
}

/// What one rank needs for one step.
#[derive(Clone, Debug)]
pub struct StepBatch {
    /// The step.
    pub step: StepIndex,
    /// Digest of the whole global batch's samples.
    pub digest: [u8; 32],
    /// Mixture in force.
    pub mixture: Vec<f64>,
    /// What else was decided for the step.
    pub directives: Directives,
    /// Sequences of the global batch.
    pub sequences: u32,
    /// Context length; a sequence has one token more.
    pub context: usize,
    /// The lane that is audited in this step; none in most.
    pub audited: Option<LaneIndex>,
    /// Its samples, where it is this rank that computes it again.
    pub to_audit: Option<LaneSamples>,
    range: LaneRange,
    lanes: Vec<LaneSamples>,
}

impl StepBatch {
    /// One lane's samples.
    ///
    /// # Panics
    /// If the lane is not in the range that was asked for.
    #[must_use]
    pub fn lane(&self, lane: LaneIndex) -> &LaneSamples {
        assert!(self.range.contains(lane), "lane {lane} was fed");
        &self.lanes[(lane.0 - self.range.start) as usize]
    }

    /// Whether other ranks hold samples of the same step; for a seeded bug alone.
    pub(crate) const fn is_shared(&self) -> bool {
        self.range.start > 0
    }

    /// Domains that the step can train on.
    #[must_use]
    pub const fn domain_count(&self) -> usize {
        self.mixture.len()
    }

    /// Tokens of one sequence, its last target included.
    #[must_use]
    pub const fn sequence_tokens(&self) -> usize {
        self.context + 1
    }

    /// Lanes without a sequence, as a batch has them that is smaller than its lanes.
    #[cfg(test)]
    pub(crate) fn without_sequences(context: usize, range: LaneRange) -> Self {
        Self {
            step: StepIndex(0),
            digest: [0; 32],
            mixture: vec![1.0],
            directives: Directives::default(),
            sequences: 0,
            context,
            audited: None,
            to_audit: None,
            range,
            lanes: vec![LaneSamples::default(); range.len()],
        }
    }
}

/// Fixed facts of feeding.
#[derive(Clone, Debug)]
pub struct FeedRules {
    /// Context length.
    pub context: usize,
    /// Lanes of the global batch.
    pub lane_count: u32,
    /// Steps between evaluations; 0 for none.
    pub evaluation_interval_steps: u64,
    /// Held-out sequences of a domain at most.
    pub held_out_sequences_max: u32,
    /// Steps between audits; 0 for none.
    pub audit_interval_steps: u64,
}

impl FeedRules {
    /// The lane that is audited in a step, each in its turn; none in most steps.
    #[must_use]
    pub fn audited(&self, step: StepIndex) -> Option<LaneIndex> {
        let (interval, done) = (self.audit_interval_steps, step.completed().0);
        let due = interval > 0 && done.is_multiple_of(interval);
        due.then(|| LaneIndex((done / interval % u64::from(self.lane_count)) as u32))
    }
}

struct Want {
    generation: Generation,
    lanes: Share,
    next: StepIndex,
    /// Those that have acted: the steps that they left behind are not fed.
    rollbacks: Rollbacks,
    until: StepsCompleted,
}

/// What a rank is fed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Share {
    /// The lanes that it computes.
    own: LaneRange,
    /// Those that it audits: another rank's, where there is another.
    watched: LaneRange,
}

impl Share {
    /// What a rank of a plan is fed: it watches the one before it, and a lone one itself.
    fn of(plan: &BeginPlan, rank: Rank) -> Self {
        let before = rank.index().checked_sub(1).unwrap_or(plan.roster.len() - 1);
        Self {
            own: plan.roster[rank.index()].lanes,
            watched: plan.roster[before].lanes,
        }
    }
}

struct Inner {
    cursor: DataCursor,
    want: Option<Want>,
    ready: VecDeque<StepBatch>,
    failed: Option<String>,
    stopped: bool,
    /// Grows with whatever may make a batch possible, so that no change between a look and a wait is missed.
    changes: u64,
}

/// The data set of a change.
type Opened = (Arc<DataChange>, Arc<dyn SampleSource>);

/// The feeder, shared by its thread, the device thread and the actor that owns it.
pub struct Feeder {
    inner: Mutex<Inner>,
    changed: Condvar,
    rules: FeedRules,
    source: Arc<dyn SampleSource>,
    /// Data sets of changes, opened when first needed.
    opened: Mutex<Vec<Opened>>,
    waiting: Waiting,
}

impl Feeder {
    /// A feeder that has nothing to do yet, with a thread of its own to run it.
    #[must_use]
    pub fn new(cursor: DataCursor, rules: FeedRules, source: Arc<dyn SampleSource>) -> Arc<Self> {
        Self::with_waiting(cursor, rules, source, Waiting::default())
    }

    /// The same; where `waiting` knows no other thread, whoever asks for a batch makes it.
    #[must_use]
    pub fn with_waiting(
        cursor: DataCursor,
        rules: FeedRules,
        source: Arc<dyn SampleSource>,
        waiting: Waiting,
    ) -> Arc<Self> {
        let inner = Inner {
            cursor,
            want: None,
            ready: VecDeque::new(),
            failed: None,
            stopped: false,
            changes: 0,
        };
        Arc::new(Self {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            rules,
            source,
            opened: Mutex::default(),
            waiting,
        })
    }

    /// Something changed that a batch may depend on.
    fn announce(&self, mut inner: MutexGuard<'_, Inner>) {
        inner.changes += 1;
        drop(inner);
        self.changed.notify_all();
    }

    /// Whether [`Feeder::run`] needs a thread.
    #[must_use]
    pub const fn needs_thread(&self) -> bool {
        !self.waiting.is_alone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on feeds a rank's share of this plan's steps; what was made for another generation is dropped.
    ///
    /// # Panics
    /// If the plan has no such rank: a programmer's error.
    pub fn begin(&self, cursor: DataCursor, plan: &BeginPlan, rank: Rank) {
        let mut inner = self.lock();
        inner.cursor = cursor;
        inner.ready.clear();
        inner.want = Some(Want {
            generation: plan.generation,
            lanes: Share::of(plan, rank),
            next: plan.rollbacks.next(plan.base),
            rollbacks: plan.rollbacks.clone(),
            until: plan.last_step,
        });
        self.announce(inner);
    }

    /// Lines through `through` are written; these are the decisions in them.
    ///
    /// # Errors
    /// If a decision contradicts what is known.
    pub fn record(&self, through: StepsCompleted, decisions: &[Decision]) -> Result<(), String> {
        let mut inner = self.lock();
        let mut line = inner.cursor.ledger().recorded();
        while line < through {
            line = line.next().completed();
            let in_line: Vec<Decision> = decisions
                .iter()
                .filter(|decision| decision.line == line)
                .cloned()
                .collect();
            inner.cursor.record(line, &in_line).map_err(|e| e.to_string())?;
        }
        self.announce(inner);
        Ok(())
    }

    /// What the line of a past step says besides measurements.
    ///
    /// # Errors
    /// `Data` if the step cannot be planned.
    pub fn facts(&self, step: StepIndex) -> Result<StepFacts, StepError> {
        let plan = self
            .lock()
            .cursor
            .plan(step)
            .map_err(|e| StepError::Data(e.to_string()))?;
        Ok(StepFacts {
            step,
            data: plan.digest,
            mixture: plan.mixture,
            directives: plan.directives,
        })
    }

    /// Ends the thread.
    pub fn stop(&self) {
        let mut inner = self.lock();
        inner.stopped = true;
        self.announce(inner);
    }

    /// The batch of a step; waits for it. None where a decision ends the run before the step.
    ///
    /// # Errors
    /// `Aborted` once `abort` is set; `Data` if samples cannot be read.
    pub fn next(&self, step: StepIndex, abort: &AtomicBool) -> Result<Option<StepBatch>, StepError> {
        let mut inner = self.lock();
        loop {
            if abort.load(Ordering::Relaxed) || inner.stopped {
                return Err(StepError::Aborted);
            }
            if let Some(cause) = &inner.failed {
                return Err(StepError::Data(cause.clone()));
            }
            if inner.cursor.ends_before(step) == Some(true) {
                return Ok(None);
            }
            if inner.ready.front().is_some_and(|batch| batch.step == step)
                && let Some(batch) = inner.ready.pop_front()
            {
                self.announce(inner);
                return Ok(Some(batch));
            }
            if self.waiting.is_alone() {
                drop(inner);
                let made = self.make_one();
                inner = self.lock();
                if made {
                    continue;
                }
            }
            // The abort flag has no condition of its own; looking again now and then is soon enough.
            inner = self
                .waiting
                .until_changed(&self.changed, || self.lock(), inner, Duration::from_millis(20));
        }
    }

    /// The thread's body: makes batches until it is stopped.
    pub fn run(&self) {
        let mut changes = self.lock().changes;
        while !self.lock().stopped {
            if self.make_one() {
                continue;
            }
            let mut inner = self.lock();
            while inner.changes == changes && !inner.stopped {
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
            }
            changes = inner.changes;
        }
    }

    /// Makes the next batch if it can be made; says whether anything changed.
    fn make_one(&self) -> bool {
        let mut inner = self.lock();
        let Some((generation, lanes, step)) = self.due(&inner) else {
            return false;
        };
        let plan = match inner.cursor.plan(step) {
            Ok(plan) => plan,
            Err(PlanError::DecisionMissing { .. }) => return false,
            Err(error) => {
                inner.failed = Some(error.to_string());
                self.changed.notify_all();
                return true;
            }
        };
        drop(inner); // reading must not hold up who asks or records
        let made = self.read(step, lanes, plan);
        let mut inner = self.lock();
        match (&mut inner.want, made) {
            (Some(want), Ok(batch)) if want.generation == generation && want.next == step => {
                want.next = want.rollbacks.next(step.completed());
                inner.ready.push_back(batch);
            }
            (_, Ok(_)) => {} // made for a generation that is over
            (_, Err(cause)) => inner.failed = Some(cause),
        }
        self.changed.notify_all();
        true
    }

    fn due(&self, inner: &Inner) -> Option<(Generation, Share, StepIndex)> {
        let want = inner.want.as_ref()?;
        let room = inner.ready.len() < PREFETCH_STEPS_MAX && inner.failed.is_none();
        (room && want.next.completed() <= want.until).then_some((want.generation, want.lanes, want.next))
    }

    fn text(&self, origin: &Origin) -> Result<Text, String> {
        let source = match &origin.change {
            None => Arc::clone(&self.source),
            Some(change) => {
                let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
                match opened.iter().find(|(known, _)| known == change) {
                    Some((_, source)) => Arc::clone(source),
                    None => {
                        let source = self.source.open(change)?;
                        opened.push((Arc::clone(change), Arc::clone(&source)));
                        source
                    }
                }
            }
        };
        Ok(Text {
            source,
            domain: origin.domain,
        })
    }

    fn read(&self, step: StepIndex, share: Share, plan: StepPlan) -> Result<StepBatch, String> {
        let range = share.own;
        // Also those that none of these lanes draws from: what lacks shows at the step of the change, on every rank.
        let texts = plan.holdings.iter().map(|held| self.text(&held.training));
        let texts: Vec<Text> = texts
            .collect::<Result<_, _>>()
            .map_err(|e| format!("step {step}: {e}"))?;
        let own = range.lanes().map(|lane| self.read_training(lane, &plan, &texts));
        let mut lanes: Vec<LaneSamples> = own.collect::<Result<_, _>>()?;
        let audited = self.rules.audited(step);
        let to_audit = audited
            .filter(|lane| share.watched.contains(*lane))
            .map(|lane| self.read_training(lane, &plan, &texts))
            .transpose()?;
        if self.is_evaluation(step) {
            let texts = plan.holdings.iter().map(|held| self.text(&held.held_out));
            let texts: Vec<Text> = texts.collect::<Result<_, _>>()?;
            self.read_held_out(range, &texts, &mut lanes)?;
        }
        Ok(StepBatch {
            step,
            digest: plan.digest,
            mixture: plan.mixture,
            directives: plan.directives,
            sequences: plan.samples.len() as u32,
            context: self.rules.context,
            audited,
            to_audit,
            range,
            lanes,
        })
    }

    fn read_training(&self, lane: LaneIndex, plan: &StepPlan, texts: &[Text]) -> Result<LaneSamples, String> {
        let sequence_tokens = self.rules.context + 1;
        let samples = plan.lane(lane, self.rules.lane_count);
        let mut lane = LaneSamples::default();
        lane.training.tokens.resize(samples.len() * sequence_tokens, 0);
        let outs = lane.training.tokens.chunks_exact_mut(sequence_tokens);
        for (sample, out) in samples.iter().zip(outs) {
            let text = &texts[sample.domain.index()];
            text.source.training(text.domain, sample.sequence, out)?;
            lane.training.domains.push(sample.domain);
        }
        Ok(lane)
    }

    /// A line is an evaluation every so many steps, of the weights before its step.
    fn is_evaluation(&self, step: StepIndex) -> bool {
        let interval = self.rules.evaluation_interval_steps;
        interval > 0 && step.completed().0.is_multiple_of(interval)
    }

    /// Held-out sequences are dealt to lanes in turn, so that who computes what is a function of the lane alone (DET-1).
    fn read_held_out(&self, range: LaneRange, texts: &[Text], lanes: &mut [LaneSamples]) -> Result<(), String> {
        let sequence_tokens = self.rules.context + 1;
        let mut turn = 0_u64;
        for (domain, text) in (0..).map(DomainIndex).zip(texts) {
            let count = text
                .source
                .held_out_sequences(text.domain)
                .min(u64::from(self.rules.held_out_sequences_max));
            for sequence in 0..count {
                let mut lane = LaneIndex((turn % u64::from(self.rules.lane_count)) as u32);
                turn += 1;
                if Mutant::EvaluationByRank.is_on() {
                    lane = LaneIndex(range.start);
                }
                if !range.contains(lane) {
                    continue;
                }
                let held_out = &mut lanes[(lane.0 - range.start) as usize].held_out;
                let start = held_out.tokens.len();
                held_out.tokens.resize(start + sequence_tokens, 0);
                text.source
                    .held_out(text.domain, sequence, &mut held_out.tokens[start..])?;
                held_out.domains.push(domain);
            }
        }
        Ok(())
    }
}
