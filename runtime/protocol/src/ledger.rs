//! Which lines of the committed trace are written, and which are only checked.
//!
//! - **STEP-3** Nothing outside the ranks sees a step before it is committed: a line comes here only from a rank that
//!   finished the step, which it can only past the barrier.
//! - **STEP-5** After a restore behind the trace's end, replayed steps are checked against their lines, not written again.
//! - **DET-3** A replayed step must reproduce its recorded line; if not, the run halts with a diagnosis, to which the membership
//!   machine adds whose result it is.
//! - Lines are written once each, in order, each with the decisions made on it: a decision stands in the trace before it
//!   takes effect.
//!
//! ```text
//! line from a rank --> next in order? --> Decide (TSM, ATE, DMU) --> Write --> written: acknowledge to ranks
//!                  \-> known already? --> compare
//!                  \-> ahead of order? -> kept
//! ```

use crate::data::decision::{Decision, DecisionKind, domain_names};
use crate::data::stats::LaneStats;
use crate::message::StepLine;
use crate::trace::{DomainMap, NewLineage, TraceLine};
use std::collections::BTreeMap;
use tarazed_domain::config::BatchSchedule;
use tarazed_domain::{Mutant, StepIndex, StepsCompleted};

/// What to do next.
#[derive(Clone, Debug)]
pub enum LedgerEffect {
    /// Let the loop look at this line; answer with [`Ledger::on_decided`].
    Decide(Box<TraceLine>),
    /// Append this line to the trace; answer with [`Ledger::on_written`].
    Write(Box<TraceLine>),
    /// A replayed or repeated step gave its recorded line.
    Checked(StepsCompleted),
    /// It did not (DET-3).
    Mismatch(String),
    /// Tell the ranks.
    Acknowledge {
        /// Lines through this one are written.
        through: StepsCompleted,
        /// Decisions in the newest.
        decisions: Vec<Decision>,
    },
}

/// The committed trace's head.
#[derive(Debug)]
pub struct Ledger {
    domain_names: Vec<String>,
    batch: BatchSchedule,
    context_tokens: u64,
    written: StepsCompleted,
    /// Lines that a replay may come back to.
    known: BTreeMap<StepsCompleted, TraceLine>,
    waiting: BTreeMap<StepsCompleted, TraceLine>,
    at_work: Option<AtWork>,
    /// To stand in the next line.
    lineage: Option<NewLineage>,
    decisions: Vec<Decision>,
}

/// What is being done about the next line. Each answer counts once, so no line is written twice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum AtWork {
    Deciding(StepsCompleted),
    Writing(StepsCompleted),
}

impl Ledger {
    /// A ledger at the end of `lines`, the trace so far, of a run with these global batches of sequences of so many tokens.
    #[must_use]
    pub fn new(domain_names: Vec<String>, batch: BatchSchedule, context_tokens: u64, lines: Vec<TraceLine>) -> Self {
        let written = lines.last().map_or(StepsCompleted(0), |line| line.step);
        let decisions = lines.iter().flat_map(|line| line.decisions.iter().cloned()).collect();
        let known = lines.into_iter().map(|line| (line.step, line)).collect();
        Self {
            domain_names,
            batch,
            context_tokens,
            written,
            known,
            waiting: BTreeMap::new(),
            at_work: None,
            lineage: None,
            decisions,
        }
    }

    /// The newest line written.
    #[must_use]
    pub const fn written(&self) -> StepsCompleted {
        self.written
    }

    /// Another program has gone on with the run: the next line that is written says so (DET-4).
    pub fn declare(&mut self, lineage: NewLineage) {
        self.lineage = Some(lineage);
    }

    /// Whether the line of this step, the newest that is written, holds decisions.
    #[must_use]
    pub fn decides(&self, step: StepsCompleted) -> bool {
        self.decisions.last().is_some_and(|decision| decision.line == step)
    }

    /// Every decision written so far.
    #[must_use]
    pub fn decisions(&self) -> &[Decision] {
        &self.decisions
    }

    /// Those of them that change the data: who explains a line must have heard of those before it.
    #[must_use]
    pub fn data_changes(&self) -> Vec<Decision> {
        let changes = |decision: &&Decision| matches!(decision.kind, DecisionKind::Data(_));
        self.decisions.iter().filter(changes).cloned().collect()
    }

    /// Lines after this one that are decided, in order, also one that is being written: a loop that was made again of lines through
    /// it has seen none of them.
    #[must_use]
    pub fn decided_after(&self, step: StepsCompleted) -> Vec<TraceLine> {
        let written = self.known.range(step.next().completed()..).map(|(_, line)| line);
        let writing = match self.at_work {
            Some(AtWork::Writing(writing)) if writing > step => self.waiting.get(&writing),
            _ => None,
        };
        written.chain(writing).cloned().collect()
    }

    /// Lines before this step, that of a checkpoint, are not replayed any more; its own is compared with what a restore
    /// gives.
    pub fn forget(&mut self, before: StepsCompleted) {
        self.known = self.known.split_off(&before);
    }

    /// Hash of the whole state after a step, as its line has it; a generation that begins there must begin from it
    /// (DET-3).
    #[must_use]
    pub fn state_at(&self, base: StepsCompleted) -> Option<[u8; 32]> {
        self.known.get(&base).map(|line| line.state)
    }

    /// Lines to check a replay against, read back from the trace after a restore behind what is still known.
    pub fn recall(&mut self, lines: Vec<TraceLine>) {
        self.known.extend(
            lines
                .into_iter()
                .filter(|line| line.step <= self.written)
                .map(|line| (line.step, line)),
        );
    }

    /// A rank finished a step.
    pub fn on_line(&mut self, line: &StepLine) -> Vec<LedgerEffect> {
        let line = match self.assemble(line) {
            Ok(line) => line,
            Err(diagnosis) => return vec![LedgerEffect::Mismatch(diagnosis)],
        };
        let step = line.step;
        let recorded = self.known.get(&step).or_else(|| self.waiting.get(&step));
        if let Some(recorded) = recorded.filter(|_| !Mutant::LineRepeated.is_on()) {
            return vec![compare(recorded, line)];
        }
        if step <= self.written && Mutant::LineRepeated.is_on() {
            return vec![LedgerEffect::Write(Box::new(line))];
        }
        if step <= self.written {
            return vec![LedgerEffect::Checked(step)]; // long acknowledged and forgotten
        }
        self.waiting.insert(step, line);
        self.next()
    }

    fn next(&mut self) -> Vec<LedgerEffect> {
        let mut step = self.written.next().completed();
        if Mutant::LineOutOfOrder.is_on()
            && let Some(&first) = self.waiting.keys().next()
        {
            step = first;
        }
        if self.at_work.is_some() {
            return Vec::new();
        }
        let Some(line) = self.waiting.get(&step) else {
            return Vec::new();
        };
        self.at_work = Some(AtWork::Deciding(step));
        vec![LedgerEffect::Decide(Box::new(line.clone()))]
    }

    /// The loop has looked at a line and made these decisions.
    pub fn on_decided(&mut self, step: StepsCompleted, decisions: Vec<Decision>) -> Vec<LedgerEffect> {
        if self.at_work != Some(AtWork::Deciding(step)) {
            return Vec::new();
        }
        let Some(line) = self.waiting.get_mut(&step) else {
            return Vec::new();
        };
        self.at_work = Some(AtWork::Writing(step));
        line.decisions = decisions;
        line.lineage = self.lineage.take();
        vec![LedgerEffect::Write(Box::new(line.clone()))]
    }

    /// A line lies in the trace.
    pub fn on_written(&mut self, step: StepsCompleted) -> Vec<LedgerEffect> {
        if self.at_work != Some(AtWork::Writing(step)) {
            return Vec::new();
        }
        self.at_work = None;
        let Some(line) = self.waiting.remove(&step) else {
            return Vec::new();
        };
        self.written = step;
        self.decisions.extend(line.decisions.iter().cloned());
        let acknowledge = LedgerEffect::Acknowledge {
            through: step,
            decisions: line.decisions.clone(),
        };
        self.known.insert(step, line);
        let mut effects = vec![acknowledge];
        effects.extend(self.next());
        effects
    }

    fn assemble(&self, line: &StepLine) -> Result<TraceLine, String> {
        // The decisions that a step rests on are written before any rank can plan it.
        let step = StepIndex(line.step.0.saturating_sub(1));
        let names = &domain_names(&self.domain_names, &self.decisions, step);
        let stats = LaneStats::decode(&line.stats, names.len()).map_err(|e| format!("step {}: {e}", line.step))?;
        if line.mixture.len() != names.len() {
            return Err(format!(
                "step {}: a mixture of {} domains, not {}",
                line.step,
                line.mixture.len(),
                names.len()
            ));
        }
        let squares = stats.lane_squares();
        let mut numbers = line.mixture.iter().copied().chain([line.learning_rate]).chain(squares);
        if let Some(wrong) = numbers.find(|number| !number.is_finite()) {
            return Err(format!(
                "step {}: {wrong} among its rate, mixture and lanes' squares",
                line.step
            ));
        }
        Ok(TraceLine {
            step: line.step,
            tokens: self.batch.samples(line.step) * self.context_tokens,
            data: line.data,
            loss: line.loss,
            grad_norm: line.grad_norm,
            state: line.state,
            lr: line.learning_rate,
            mixture: DomainMap(names.iter().cloned().zip(line.mixture.iter().copied()).collect()),
            domains: stats.train_map(names),
            heldout: stats.heldout_map(names),
            lane_squares: squares,
            skipped: line.skipped,
            lineage: None,
            decisions: Vec::new(),
        })
    }
}

fn compare(recorded: &TraceLine, mut line: TraceLine) -> LedgerEffect {
    line.decisions.clone_from(&recorded.decisions); // decisions are the controller's, not the ranks'
    match recorded.first_difference(&line) {
        None => LedgerEffect::Checked(line.step),
        Some(difference) => LedgerEffect::Mismatch(format!(
            "step {} was computed twice with different results: {} was {}, now {} (DET-3)",
            line.step, difference.field, difference.a, difference.b
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Program;

    fn line(step: u64, loss: f64) -> StepLine {
        StepLine {
            step: StepsCompleted(step),
            data: [1; 32],
            loss,
            grad_norm: 1.0,
            state: [2; 32],
            learning_rate: 1e-3,
            mixture: vec![1.0],
            stats: LaneStats::new(1).encode(),
            skipped: false,
            weights: Vec::new(),
        }
    }

    fn ledger() -> Ledger {
        Ledger::new(vec!["wiki".to_owned()], BatchSchedule::fixed(2), 5, Vec::new())
    }

    fn run_through(ledger: &mut Ledger, effects: Vec<LedgerEffect>) -> Vec<u64> {
        let mut written = Vec::new();
        let mut queue = effects;
        while let Some(effect) = queue.pop() {
            match effect {
                LedgerEffect::Decide(line) => queue.extend(ledger.on_decided(line.step, vec![])),
                LedgerEffect::Write(line) => {
                    written.push(line.step.0);
                    queue.extend(ledger.on_written(line.step));
                }
                LedgerEffect::Mismatch(diagnosis) => panic!("{diagnosis}"),
                LedgerEffect::Checked(_) | LedgerEffect::Acknowledge { .. } => {}
            }
        }
        written
    }

    /// STEP-3: each line once and in order, however they come.
    #[test]
    fn lines_are_written_once_and_in_order() {
        let mut ledger = ledger();
        let mut written = Vec::new();
        for step in [2, 1, 1, 4, 2, 3, 3, 4] {
            let effects = ledger.on_line(&line(step, 1.0));
            written.extend(run_through(&mut ledger, effects));
        }
        assert_eq!(written, [1, 2, 3, 4]);
    }

    /// STEP-5 and DET-3: a replay is checked, and a different result is not accepted.
    #[test]
    fn a_replayed_step_is_checked_and_a_wrong_one_halts() {
        let mut ledger = ledger();
        for step in 1..=3 {
            let effects = ledger.on_line(&line(step, 1.0));
            run_through(&mut ledger, effects);
        }
        assert!(matches!(
            ledger.on_line(&line(2, 1.0))[..],
            [LedgerEffect::Checked(StepsCompleted(2))]
        ));
        let wrong = ledger.on_line(&line(2, 1.0 + f64::EPSILON));
        let [LedgerEffect::Mismatch(diagnosis)] = &wrong[..] else {
            panic!("one bit is enough")
        };
        assert!(
            diagnosis.contains("step 2") && diagnosis.contains("loss"),
            "{diagnosis}"
        );
    }

    /// DET-4: what is declared stands in the next line that is written, once; a replay of that line is checked as any other.
    #[test]
    fn a_new_lineage_stands_in_one_line() {
        let program = |build: &str| Program {
            binary: build.to_owned(),
            device: "cpu".to_owned(),
            libraries: Vec::new(),
        };
        let mut ledger = ledger();
        let effects = ledger.on_line(&line(1, 1.0));
        run_through(&mut ledger, effects);
        ledger.declare(NewLineage {
            from: program("a"),
            to: program("b"),
        });
        let mut declares = Vec::new();
        for step in [1, 2, 3, 2] {
            let mut queue = ledger.on_line(&line(step, 1.0));
            while let Some(effect) = queue.pop() {
                match effect {
                    LedgerEffect::Decide(line) => queue.extend(ledger.on_decided(line.step, vec![])),
                    LedgerEffect::Write(line) => {
                        declares.push((line.step.0, line.lineage.is_some()));
                        queue.extend(ledger.on_written(line.step));
                    }
                    LedgerEffect::Mismatch(diagnosis) => panic!("{diagnosis}"),
                    LedgerEffect::Checked(_) | LedgerEffect::Acknowledge { .. } => {}
                }
            }
        }
        assert_eq!(declares, [(2, true), (3, false)]);
    }

    /// STEP-3: a loop that is made again may answer twice for one line; it is written once.
    #[test]
    fn a_second_answer_for_a_line_writes_nothing() {
        let mut ledger = ledger();
        ledger.on_line(&line(1, 1.0));
        assert_eq!(ledger.on_decided(StepsCompleted(1), vec![]).len(), 1);
        assert!(ledger.on_decided(StepsCompleted(1), vec![]).is_empty());
        assert_eq!(ledger.on_written(StepsCompleted(1)).len(), 1);
        assert!(ledger.on_written(StepsCompleted(1)).is_empty());
    }

    /// LOOP-1: what a loop has not seen that was made again meanwhile is what is decided since, be it written or not.
    #[test]
    fn a_loop_made_again_is_told_what_is_decided_since() {
        let mut ledger = ledger();
        for step in 1..=3 {
            let effects = ledger.on_line(&line(step, 1.0));
            run_through(&mut ledger, effects);
        }
        let told = |ledger: &Ledger, seen: u64| -> Vec<u64> {
            let lines = ledger.decided_after(StepsCompleted(seen));
            lines.iter().map(|line| line.step.0).collect()
        };
        assert_eq!(told(&ledger, 1), [2, 3]);
        assert_eq!(told(&ledger, 3), [0; 0]);
        ledger.on_line(&line(4, 1.0));
        assert_eq!(told(&ledger, 3), [0; 0], "the new loop decides it");
        ledger.on_decided(StepsCompleted(4), vec![]);
        assert_eq!(told(&ledger, 2), [3, 4]);
        assert_eq!(told(&ledger, 4), [0; 0], "it is in the trace already");
        ledger.on_written(StepsCompleted(4));
        assert_eq!(told(&ledger, 3), [4]);
    }

    /// STEP-5 and DET-3: a checkpoint's own line is kept, and what a generation starts from is compared with it.
    #[test]
    fn a_base_is_known_as_long_as_its_line_may_be_asked_for() {
        let mut ledger = ledger();
        for step in 1..=3 {
            let effects = ledger.on_line(&line(step, 1.0));
            run_through(&mut ledger, effects);
        }
        ledger.forget(StepsCompleted(2));
        assert_eq!(ledger.state_at(StepsCompleted(2)), Some([2; 32]));
        assert_eq!(ledger.state_at(StepsCompleted(1)), None, "no line to compare with");
    }

    /// A line that could not be printed is a rank's mistake, and no panic.
    #[test]
    fn numbers_that_are_none_are_refused() {
        let mut ledger = ledger();
        let mut wrong = line(1, 1.0);
        wrong.learning_rate = f64::NAN;
        assert!(matches!(ledger.on_line(&wrong)[..], [LedgerEffect::Mismatch(_)]));
        let mut wrong = line(1, 1.0);
        wrong.mixture = vec![f64::INFINITY];
        assert!(matches!(ledger.on_line(&wrong)[..], [LedgerEffect::Mismatch(_)]));
    }

    /// DATA-2: a line names the domains of its step, by the decisions that stand before it.
    #[test]
    fn lines_have_the_domains_of_their_step() {
        use crate::data::decision::{DataChange, DecisionAuthor, DecisionId, DomainEdition};
        use tarazed_domain::StepIndex;
        let edition = DomainEdition {
            name: "code".into(),
            domain: 1,
            index: 0,
            language: "code".into(),
            train_sequences: 9,
            train_tokens: 90,
        };
        let arrival = Decision {
            id: DecisionId(1),
            line: StepsCompleted(1),
            effective: StepIndex(2),
            kind: DecisionKind::Data(DataChange {
                version: "00".repeat(32),
                domains: vec![edition],
                weights: vec![1.0, 1.0],
            }),
            by: DecisionAuthor::Person("ada".into()),
            reason: String::new(),
        };
        let of = |step, domains: usize| StepLine {
            mixture: vec![1.0 / domains as f64; domains],
            stats: LaneStats::new(domains).encode(),
            ..line(step, 1.0)
        };
        let mut ledger = ledger();
        ledger.on_line(&of(1, 1));
        ledger.on_decided(StepsCompleted(1), vec![arrival.clone()]);
        ledger.on_written(StepsCompleted(1));
        assert_eq!(ledger.data_changes(), [arrival]);
        assert!(
            matches!(ledger.on_line(&of(2, 2))[..], [LedgerEffect::Mismatch(_)]),
            "one step early"
        );
        let effects = ledger.on_line(&of(2, 1));
        assert_eq!(run_through(&mut ledger, effects), [2]);
        let effects = ledger.on_line(&of(3, 2));
        let [LedgerEffect::Decide(line)] = &effects[..] else {
            panic!("{effects:?}")
        };
        assert_eq!(
            line.mixture.iter().map(|(name, _)| name).collect::<Vec<_>>(),
            ["wiki", "code"]
        );
        assert_eq!(run_through(&mut ledger, effects), [3]);
        // A replay of a step before is one of the domains of then.
        assert!(matches!(
            ledger.on_line(&of(2, 1))[..],
            [LedgerEffect::Checked(StepsCompleted(2))]
        ));
    }

    #[test]
    fn statistics_of_another_config_are_refused() {
        let mut ledger = ledger();
        let mut alien = line(1, 1.0);
        alien.stats = LaneStats::new(2).encode();
        assert!(matches!(ledger.on_line(&alien)[..], [LedgerEffect::Mismatch(_)]));
    }
}
