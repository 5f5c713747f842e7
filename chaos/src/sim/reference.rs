//! The undisturbed run: one rank, no actor, no network, no store. What any other run of the scenario must write.
//!
//! Where it is rolled back, it goes on from a copy of that very state, which it made when it was there: it does no step
//! twice, and walks no way back.

use super::scenario::Scenario;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tarazed_actors::run_folder::RunPaths;
use tarazed_domain::config::{Config, DomainConfig, SpikePolicy};
use tarazed_domain::{
    DomainIndex, Generation, Incarnation, LaneRange, LaneTree, OptimizerShardIndex, Rank, StepsCompleted, WorkerId,
};
use tarazed_fabric::local_mesh;
use tarazed_kernels::CpuDevice;
use tarazed_protocol::data::DomainFacts;
use tarazed_protocol::data::controller::Ate;
use tarazed_protocol::data::cursor::{DataCursor, DomainRecipe, Recipe};
use tarazed_protocol::data::decision::{DataChange, Decision, DecisionSchedule, expected_end};
use tarazed_protocol::data::signals::Tsm;
use tarazed_protocol::data::weight_log::WeightLog;
use tarazed_protocol::ledger::{Ledger, LedgerEffect};
use tarazed_protocol::message::{Addresses, BeginPlan, Member, RestoreFrom, RosterEntry, StepLine};
use tarazed_protocol::placement::{Placement, ShardHolder, ShardOrigin};
use tarazed_protocol::rollback::{Rollback, Rollbacks};
use tarazed_train::StepError;
use tarazed_train::feeder::{FeedRules, Feeder, SampleSource};
use tarazed_train::generation::{self, Means, Reporter, ShardSource, ShardToSave, Switches};
use tarazed_train::host::HostVisible;
use tarazed_train::state::RankState;
use tarazed_train::waiting::Waiting;
use tarazed_train::world::World as Ranks;

/// Training sequences of each domain: enough that no run comes to an end of them, few enough for several epochs.
const TRAIN_SEQUENCES: u64 = 90;
/// Of so many sequences one is odd, where spikes are skipped.
const ODD_ONE_IN: u64 = TRAIN_SEQUENCES;

/// The lines of the undisturbed run. What persons decide is an input of it: where they may, it goes on as far as they are
/// known to have decided, and takes what they did from the lines that it is compared with.
pub struct Reference(Mutex<Undisturbed>);

/// Tokens that are a function of their place.
struct MadeUpTokens {
    /// Few tokens, which are soon learnt, and now and then a sequence of others: a spike of the loss.
    has_odd: bool,
    /// Of the data set: 0 is the one that the run begins with.
    set: u64,
}

impl SampleSource for MadeUpTokens {
    fn held_out_sequences(&self, _domain: DomainIndex) -> u64 {
        3
    }

    fn training(&self, domain: DomainIndex, sequence: u64, out: &mut [u32]) -> Result<(), String> {
        for (index, token) in (0..).zip(out) {
            let plain = sequence * 31 + index * 7 + u64::from(domain.0) + self.set;
            *token = match self.has_odd {
                false => plain % 264,
                true if sequence % ODD_ONE_IN == ODD_ONE_IN / 2 => 200 + plain % 64,
                true => plain % 8,
            } as u32;
        }
        Ok(())
    }

    fn held_out(&self, domain: DomainIndex, sequence: u64, out: &mut [u32]) -> Result<(), String> {
        self.training(domain, sequence + 1_000, out)
    }

    fn open(&self, change: &DataChange) -> Result<Arc<dyn SampleSource>, String> {
        let digits = change.version.get(..8).unwrap_or_default();
        let set = u64::from_str_radix(digits, 16).map_err(|e| format!("data set {}: {e}", change.version))?;
        let has_odd = self.has_odd;
        Ok(Arc::new(Self { has_odd, set }))
    }
}

/// Where samples come from.
pub fn samples(scenario: &Scenario) -> Arc<dyn SampleSource> {
    Arc::new(MadeUpTokens {
        has_odd: scenario.skips_spikes,
        set: 0,
    })
}

/// Where an odd sequence would come with every few steps it would be none: domains grow with the batch.
fn train_sequences(config: &Config) -> u64 {
    match config.policy.spikes {
        SpikePolicy::Skip => TRAIN_SEQUENCES * u64::from(config.batch.lanes),
        SpikePolicy::Clip | SpikePolicy::RollbackAndSkip => TRAIN_SEQUENCES,
    }
}

/// How ranks are fed; as the scenario's config says.
pub const fn feed_rules(lane_count: u32) -> FeedRules {
    FeedRules {
        context: 4,
        lane_count,
        evaluation_interval_steps: 4,
        held_out_sequences_max: 2,
        audit_interval_steps: 3,
    }
}

/// The data recipe and what the closed loop knows of the domains.
pub fn data_of(config: &Config) -> (Recipe, Vec<DomainFacts>) {
    let train_sequences = train_sequences(config);
    let recipe = |domain: &DomainConfig| DomainRecipe {
        name: domain.name.clone(),
        train_sequences,
        weight: domain.weight,
    };
    let facts = |domain: &DomainConfig| DomainFacts {
        name: domain.name.clone(),
        language: domain.language,
        weight: domain.weight,
        train_tokens: train_sequences * 4,
        train_sequences,
    };
    let recipe = Recipe {
        seed: config.run.seed,
        domains: config.data.domains.iter().map(recipe).collect(),
        batch: config.batch_schedule(),
        data_version: [1; 32],
    };
    (recipe, config.data.domains.iter().map(facts).collect())
}

impl Reference {
    /// One whose run has not begun.
    ///
    /// # Errors
    /// What went wrong: a bug of the step or of this module.
    pub fn new(scenario: &Scenario, paths: &RunPaths) -> Result<Self, String> {
        let mut run = Undisturbed::new(scenario, paths)?;
        if !scenario.persons {
            run.go_on(StepsCompleted(scenario.steps))?;
        }
        Ok(Self(Mutex::new(run)))
    }

    fn run(&self) -> MutexGuard<'_, Undisturbed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The line of a step, in which persons decided this; none behind the end of the run.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn line(&self, step: StepsCompleted, persons: Vec<Decision>) -> Result<Option<String>, String> {
        let mut run = self.run();
        if step > run.written {
            let point = run.schedule.is_point(step);
            let next = run.schedule.next_point(step).unwrap_or(StepsCompleted(u64::MAX));
            let through = if point { step } else { StepsCompleted(next.0 - 1) };
            run.teller.told().persons.insert(step, persons);
            run.go_on(through)?;
        }
        let line = run.teller.told().lines.get(&step).cloned();
        Ok(line)
    }

    /// All of `weights.jsonl`.
    #[must_use]
    pub fn weights(&self) -> String {
        self.run().teller.told().weights.clone()
    }

    /// The step of its last line so far; a decided stop comes before `run.steps`.
    #[must_use]
    pub fn last(&self) -> StepsCompleted {
        self.run().written
    }

    /// Whether the run is over by what was decided so far.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.run().is_over()
    }

    /// All lines so far.
    #[must_use]
    pub fn trace(&self) -> String {
        let run = self.run();
        let told = run.teller.told();
        told.lines.values().map(|line| format!("{line}\n")).collect()
    }
}

/// The undisturbed run as far as it has come.
struct Undisturbed {
    config: Arc<Config>,
    steps: StepsCompleted,
    /// Where it is stopped in any case: what a rollback does, begins or ends there.
    boundaries: Vec<StepsCompleted>,
    recipe: Recipe,
    schedule: DecisionSchedule,
    tree: LaneTree,
    feeder: Arc<Feeder>,
    state: RankState<CpuDevice>,
    teller: Teller,
    copies: Copies,
    written: StepsCompleted,
}

impl Undisturbed {
    fn new(scenario: &Scenario, paths: &RunPaths) -> Result<Self, String> {
        let config = Arc::new(scenario.config(1, paths.dir()).map_err(|e| e.to_string())?);
        let (recipe, facts) = data_of(&config);
        let schedule = DecisionSchedule::of(&config);
        let cursor = || DataCursor::new(recipe.clone(), schedule).map_err(|e| e.to_string());
        let alone = Waiting::GivingWay(Arc::new(|| panic!("nobody is there to be waited for")));
        let rules = feed_rules(scenario.lanes);
        let feeder = Feeder::with_waiting(cursor()?, rules, samples(scenario), alone.clone());
        let state = RankState::new(Arc::clone(&config), CpuDevice::new(), Arc::default()).map_err(|e| e.to_string())?;
        let state = state.with_waiting(alone);
        let names = config.data.domains.iter().map(|domain| domain.name.clone()).collect();
        let (batch, context) = (config.batch_schedule(), config.model.context as u64);
        let teller = Teller {
            feeder: Arc::clone(&feeder),
            inner: Mutex::new(Told {
                ledger: Ledger::new(names, batch.clone(), context, Vec::new()),
                log: WeightLog::new(state.layout.clone(), batch, context, None),
                weights: String::new(),
                monitor: Tsm::new(facts.clone()),
                engine: Ate::new(&scenario.loop_config(&config), &facts),
                cursor: cursor()?,
                persons: BTreeMap::new(),
                lines: BTreeMap::new(),
                failure: None,
            }),
        };
        Ok(Self {
            steps: StepsCompleted(scenario.steps),
            boundaries: scenario.rollback_boundaries(),
            tree: LaneTree::new(scenario.lanes),
            config,
            recipe,
            schedule,
            feeder,
            state,
            teller,
            copies: Copies::default(),
            written: StepsCompleted(0),
        })
    }

    fn is_over(&self) -> bool {
        let end = expected_end(self.teller.told().ledger.decisions(), None, self.steps);
        self.written >= end
    }

    /// Runs on through a line, or to the end of the run.
    fn go_on(&mut self, through: StepsCompleted) -> Result<(), String> {
        while self.written < through && !self.is_over() {
            let decisions = self.teller.told().ledger.decisions().to_vec();
            let written = self.written;
            let mut plan = plan(&self.config, self.state.shard_layout.shard_count(), written, &decisions);
            plan.state = self.teller.told().ledger.state_at(plan.base);
            let boundaries = self.boundaries.iter().copied().filter(|boundary| *boundary > written);
            plan.last_step = boundaries.chain([through, plan.last_step]).min().unwrap_or(through);
            let world = Ranks::new(&plan, plan.roster[0].member, self.tree, self.state.shard_layout)
                .ok_or("not in the roster")?;
            let known = DataCursor::restore(self.recipe.clone(), self.schedule, written, &decisions)
                .map_err(|e| e.to_string())?;
            self.feeder.begin(known, &plan, world.rank);
            let mut mesh = local_mesh(1, plan.generation).remove(0);
            let mut means = Means {
                fabric: &mut mesh,
                feeder: &self.feeder,
                source: &self.copies,
                switches: &Switches::default(),
                reporter: &self.teller,
            };
            let paused = generation::run(&mut self.state, &world, &plan, &mut means).map_err(|e| e.to_string())?;
            if let Some(failure) = self.teller.told().failure.take() {
                return Err(failure);
            }
            if paused.step <= written {
                return Err(format!("the undisturbed run stands still at step {written}"));
            }
            self.written = paused.step;
            self.copies.keep(&self.state, self.written)?;
        }
        Ok(())
    }
}

/// One rank that holds everything, as it stands where the trace is written through a line; or as it stood where a decision
/// says so.
fn plan(config: &Config, shard_count: usize, written: StepsCompleted, decisions: &[Decision]) -> BeginPlan {
    let at = written.next();
    let back = Rollbacks::of(decisions).acting_at(written).map(|rollback| rollback.to);
    let base = back.unwrap_or(written);
    let origin = match back {
        _ if base == StepsCompleted(0) => ShardOrigin::Initialise,
        Some(_) => ShardOrigin::Restore,
        None => ShardOrigin::Keep,
    };
    let member = Member {
        worker: WorkerId(0),
        incarnation: Incarnation(0),
    };
    let lanes = LaneRange {
        start: 0,
        end: config.batch.lanes,
    };
    let holder = ShardHolder { rank: Rank(0), origin };
    BeginPlan {
        generation: Generation(1 + written.0),
        roster: vec![RosterEntry { member, lanes }],
        addresses: Addresses::from_iter([""]),
        base,
        outcome: None,
        shards: Placement::same(shard_count, &[holder]),
        restore: back.map(Copies::name),
        acknowledged: written,
        decisions: Vec::new(),
        decided: written,
        rollbacks: back.map(|to| Rollback { at, to }).into_iter().collect(),
        last_step: StepsCompleted(config.run.steps),
        checkpoint_at_base: false,
        checkpointed: StepsCompleted(0),
        state: None,
        disputed: None,
    }
}

struct Told {
    ledger: Ledger,
    log: WeightLog,
    weights: String,
    monitor: Tsm,
    engine: Ate,
    cursor: DataCursor,
    /// What persons decided, by line.
    persons: BTreeMap<StepsCompleted, Vec<Decision>>,
    lines: BTreeMap<StepsCompleted, String>,
    failure: Option<String>,
}

/// Makes each line's decisions at once, with the production machines, and feeds them back.
struct Teller {
    feeder: Arc<Feeder>,
    inner: Mutex<Told>,
}

impl Told {
    fn line(&mut self, feeder: &Feeder, line: &StepLine) -> Result<(), String> {
        self.log.on_line(line)?;
        let mut effects = self.ledger.on_line(line);
        while let Some(effect) = effects.pop() {
            match effect {
                LedgerEffect::Decide(mut line) => {
                    line.decisions = self.persons.get(&line.step).cloned().unwrap_or_default();
                    self.monitor.learn(&self.ledger.data_changes());
                    let signals = self.monitor.on_line(&line).map_err(|e| e.to_string())?;
                    let mut decisions = self.engine.on_line(&line, &signals);
                    self.cursor
                        .complete(line.step, &mut decisions)
                        .map_err(|e| e.to_string())?;
                    self.cursor.record(line.step, &decisions).map_err(|e| e.to_string())?;
                    effects.extend(self.ledger.on_decided(line.step, decisions));
                }
                LedgerEffect::Write(line) => {
                    if let Some(weights) = self.log.on_step(line.step) {
                        let text = serde_json::to_string(&weights).map_err(|e| e.to_string())?;
                        self.weights += &format!("{text}\n");
                    }
                    self.lines.insert(line.step, line.print());
                    effects.extend(self.ledger.on_written(line.step));
                }
                LedgerEffect::Acknowledge { through, decisions } => feeder.record(through, &decisions)?,
                LedgerEffect::Checked(_) => {}
                LedgerEffect::Mismatch(diagnosis) => return Err(diagnosis),
            }
        }
        Ok(())
    }
}

impl Reporter<CpuDevice> for Teller {
    fn running(&self, _: StepsCompleted) {}

    fn settled(&self, _: StepsCompleted, _: [u8; 16]) {}

    fn line(&self, line: StepLine) {
        let mut told = self.told();
        if let Err(failure) = told.line(&self.feeder, &line) {
            told.failure.get_or_insert(failure);
        }
    }

    fn save(&self, _: StepsCompleted, _: Vec<ShardToSave<CpuDevice>>) {}
}

impl Teller {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Master weights and both moments of every shard, at each boundary at which the run was stopped.
#[derive(Default)]
struct Copies(BTreeMap<(StepsCompleted, OptimizerShardIndex), [Vec<f32>; 3]>);

impl Copies {
    fn name(step: StepsCompleted) -> RestoreFrom {
        RestoreFrom {
            step,
            manifest_key: String::new(),
            length: 0,
            blake3: [0; 32],
        }
    }

    fn keep(&mut self, state: &RankState<CpuDevice>, step: StepsCompleted) -> Result<(), String> {
        for (&index, shard) in &state.shards {
            let shard = shard.read();
            let buffers = [&shard.master, &shard.first_moment, &shard.second_moment];
            let copies = state.device.copies(buffers).map_err(|e| e.to_string())?;
            self.0.insert((step, index), copies.map(|copy| copy.to_vec()));
        }
        Ok(())
    }
}

impl ShardSource for Copies {
    fn read(
        &self,
        from: &RestoreFrom,
        shard: OptimizerShardIndex,
        _: &std::sync::atomic::AtomicBool,
    ) -> Result<[Vec<f32>; 3], StepError> {
        let copy = self.0.get(&(from.step, shard)).cloned();
        copy.ok_or_else(|| StepError::Restore(format!("the undisturbed run made no copy at step {}", from.step)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(scenario: &Scenario) -> Reference {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Reference::new(scenario, &RunPaths::new(folder.path())).expect("it runs")
    }

    /// The first of some seeds whose scenario is `is_wanted`.
    fn scenarios(is_wanted: fn(&Scenario) -> bool) -> impl Iterator<Item = Scenario> {
        let wanted = move |scenario: &Scenario| !scenario.persons && is_wanted(scenario);
        (0..1_000).map(Scenario::of).filter(wanted).take(30)
    }

    /// Policies of scenarios do something: an update is left out, a run ends early, a batch grows.
    #[test]
    fn policies_are_not_idle() {
        let has = |reference: &Reference, part: &str| reference.trace().contains(part);
        assert!(scenarios(|s| s.skips_spikes).any(|scenario| has(&reference(&scenario), "\"skipped\":true")));
        let ends_early = |scenario: Scenario| {
            let last = reference(&scenario).last();
            assert!(last.0 <= scenario.steps);
            last.0 < scenario.steps
        };
        assert!(scenarios(|s| s.stop_tokens.is_some()).any(ends_early));
        let scenario = scenarios(|s| s.ramp.is_some()).next().expect("one with a ramp");
        let full = u64::from(scenario.lanes) * 2 * 4;
        let line = reference(&scenario).line(StepsCompleted(1), Vec::new());
        let line = line.expect("it runs").expect("a line");
        assert!(!line.contains(&format!("\"tokens\":{full},")), "{line}");
    }
}
