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
use tarazed_protocol::data::decision::{Decision, DecisionKind, DecisionSchedule, expected_end};
use tarazed_protocol::data::signals::Tsm;
use tarazed_protocol::data::weight_log::WeightLog;
use tarazed_protocol::ledger::{Ledger, LedgerEffect};
use tarazed_protocol::message::{Addresses, BeginPlan, Member, RestoreFrom, RosterEntry, StepLine};
use tarazed_protocol::placement::{Placement, ShardHolder, ShardOrigin};
use tarazed_protocol::rollback::Rollback;
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

/// The lines of the undisturbed run.
pub struct Reference {
    trace: BTreeMap<StepsCompleted, String>,
    weights: String,
}

/// Tokens that are a function of their place.
struct MadeUpTokens {
    /// Few tokens, which are soon learnt, and now and then a sequence of others: a spike of the loss.
    has_odd: bool,
}

impl SampleSource for MadeUpTokens {
    fn held_out_sequences(&self, _domain: DomainIndex) -> u64 {
        3
    }

    fn training(&self, domain: DomainIndex, sequence: u64, out: &mut [u32]) -> Result<(), String> {
        for (index, token) in (0..).zip(out) {
            let plain = sequence * 31 + index * 7 + u64::from(domain.0);
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
}

/// Where samples come from.
pub fn samples(scenario: &Scenario) -> Arc<dyn SampleSource> {
    Arc::new(MadeUpTokens {
        has_odd: scenario.skips_spikes,
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
    /// The line of a step.
    #[must_use]
    pub fn line(&self, step: StepsCompleted) -> Option<&str> {
        self.trace.get(&step).map(String::as_str)
    }

    /// All of `weights.jsonl`.
    #[must_use]
    pub fn weights(&self) -> &str {
        &self.weights
    }

    /// The step of its last line; a decided stop comes before `run.steps`.
    #[must_use]
    pub fn last(&self) -> StepsCompleted {
        self.trace.keys().next_back().copied().unwrap_or(StepsCompleted(0))
    }

    /// Runs it.
    ///
    /// # Errors
    /// What went wrong: a bug of the step or of this module.
    pub fn compute(scenario: &Scenario, paths: &RunPaths) -> Result<Self, String> {
        let config = Arc::new(scenario.config(1, paths.dir()).map_err(|e| e.to_string())?);
        let (recipe, facts) = data_of(&config);
        let schedule = DecisionSchedule::of(&config);
        let cursor = || DataCursor::new(recipe.clone(), schedule).map_err(|e| e.to_string());
        let alone = Waiting::GivingWay(Arc::new(|| panic!("nobody is there to be waited for")));
        let rules = feed_rules(scenario.lanes);
        let feeder = Feeder::with_waiting(cursor()?, rules, samples(scenario), alone.clone());
        let state = RankState::new(Arc::clone(&config), CpuDevice::new(), Arc::default()).map_err(|e| e.to_string())?;
        let mut state = state.with_waiting(alone);
        let tree = LaneTree::new(scenario.lanes);
        let names = config.data.domains.iter().map(|domain| domain.name.clone()).collect();
        let teller = Teller {
            feeder: &feeder,
            inner: Mutex::new(Told {
                ledger: Ledger::new(names, config.batch_schedule(), config.model.context as u64, Vec::new()),
                log: WeightLog::new(
                    state.layout.clone(),
                    config.batch_schedule(),
                    config.model.context as u64,
                    None,
                ),
                weights: String::new(),
                monitor: Tsm::new(facts.clone()),
                engine: Ate::new(&scenario.loop_config(&config), &facts),
                cursor: cursor()?,
                lines: BTreeMap::new(),
                failure: None,
            }),
        };
        let mut copies = Copies::default();
        let mut written = StepsCompleted(0);
        loop {
            let decisions = teller.told().ledger.decisions().to_vec();
            if written >= expected_end(&decisions, None, StepsCompleted(scenario.steps)) {
                break;
            }
            let mut plan = plan(&config, state.shard_layout.shard_count(), written, &decisions);
            plan.state = teller.told().ledger.state_at(plan.base);
            let boundaries = scenario.rollback_boundaries().filter(|boundary| *boundary > written);
            plan.last_step = boundaries.min().unwrap_or(plan.last_step).min(plan.last_step);
            let world =
                Ranks::new(&plan, plan.roster[0].member, tree, state.shard_layout).ok_or("not in the roster")?;
            let known =
                DataCursor::restore(recipe.clone(), schedule, written, &decisions).map_err(|e| e.to_string())?;
            feeder.begin(known, &plan, world.rank);
            let mut mesh = local_mesh(1, plan.generation).remove(0);
            let mut means = Means {
                fabric: &mut mesh,
                feeder: &feeder,
                source: &copies,
                switches: &Switches::default(),
                reporter: &teller,
            };
            let paused = generation::run(&mut state, &world, &plan, &mut means).map_err(|e| e.to_string())?;
            if paused.step <= written {
                return Err(format!("the undisturbed run stands still at step {written}"));
            }
            written = paused.step;
            copies.keep(&state, written)?;
        }
        let told = teller.inner.into_inner().unwrap_or_else(PoisonError::into_inner);
        match told.failure {
            Some(failure) => Err(failure),
            None => Ok(Self {
                trace: told.lines,
                weights: told.weights,
            }),
        }
    }
}

/// One rank that holds everything, as it stands where the trace is written through a line; or as it stood where a decision
/// says so.
fn plan(config: &Config, shard_count: usize, written: StepsCompleted, decisions: &[Decision]) -> BeginPlan {
    let at = written.next();
    let back = decisions.iter().find_map(|decision| match decision.kind {
        DecisionKind::Rollback { to, .. } if decision.effective == at => Some(to),
        _ => None,
    });
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
    lines: BTreeMap<StepsCompleted, String>,
    failure: Option<String>,
}

/// Makes each line's decisions at once, with the production machines, and feeds them back.
struct Teller<'a> {
    feeder: &'a Feeder,
    inner: Mutex<Told>,
}

impl Told {
    fn line(&mut self, feeder: &Feeder, line: &StepLine) -> Result<(), String> {
        self.log.on_line(line)?;
        let mut effects = self.ledger.on_line(line);
        while let Some(effect) = effects.pop() {
            match effect {
                LedgerEffect::Decide(line) => {
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

impl Reporter<CpuDevice> for Teller<'_> {
    fn running(&self, _: StepsCompleted) {}

    fn settled(&self, _: StepsCompleted, _: [u8; 16]) {}

    fn line(&self, line: StepLine) {
        let mut told = self.told();
        if let Err(failure) = told.line(self.feeder, &line) {
            told.failure.get_or_insert(failure);
        }
    }

    fn save(&self, _: StepsCompleted, _: Vec<ShardToSave<CpuDevice>>) {}
}

impl Teller<'_> {
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
        Reference::compute(scenario, &RunPaths::new(folder.path())).expect("it runs")
    }

    /// The first of some seeds whose scenario is `is_wanted`.
    fn scenarios(is_wanted: fn(&Scenario) -> bool) -> impl Iterator<Item = Scenario> {
        (0..1_000).map(Scenario::of).filter(is_wanted).take(30)
    }

    /// Policies of scenarios do something: an update is left out, a run ends early, a batch grows.
    #[test]
    fn policies_are_not_idle() {
        let has = |reference: &Reference, part: &str| reference.trace.values().any(|line| line.contains(part));
        assert!(scenarios(|s| s.skips_spikes).any(|scenario| has(&reference(&scenario), "\"skipped\":true")));
        let ends_early = |scenario: Scenario| {
            let last = reference(&scenario).last();
            assert!(last.0 <= scenario.steps);
            last.0 < scenario.steps
        };
        assert!(scenarios(|s| s.stop_tokens.is_some()).any(ends_early));
        let scenario = scenarios(|s| s.ramp.is_some()).next().expect("one with a ramp");
        let full = u64::from(scenario.lanes) * 2 * 4;
        let line = reference(&scenario).line(StepsCompleted(1)).expect("a line").to_owned();
        assert!(!line.contains(&format!("\"tokens\":{full},")), "{line}");
    }
}
