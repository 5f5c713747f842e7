//! What one simulation is like: sizes, speeds and faults, all drawn from its seed.
//!
//! Swarm testing (Groce et al., ISSTA 2012): each seed leaves out about half of the kinds of fault, so that some seeds are
//! full of one kind, which a mixture of all would hide.

use super::random::Random;
use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;
use tarazed_domain::StepsCompleted;
use tarazed_domain::config::{BatchRamp, Config, ConfigError};
use tarazed_protocol::data::LoopConfig;
use tarazed_store::limits::PART_BYTES;

/// `mixture.interval_steps` and `mixture.start_steps`.
const DECISION_INTERVAL_STEPS: u64 = 4;
/// `mixture.lag_steps`.
const DECISION_LAG_STEPS: u64 = 3;
/// Lines before the bounds of a spike are known, and a few more: runs that skip spikes are longer than this.
const SPIKE_STEPS_MIN: u64 = 80;
/// `batch.sequences_per_lane`.
const SEQUENCES_PER_LANE: u32 = 2;
/// Tokens of a sequence.
pub(super) const CONTEXT: u64 = 4;

/// A kind of fault.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    /// One rank's process is killed.
    KillRank,
    /// Two or three at the same moment: primary and replica among them.
    KillSeveral,
    /// Every rank at the same moment.
    KillAll,
    /// A rank is killed while the recovery from something else is under way.
    KillInRecovery,
    /// A device thread never comes back; the process around it lives.
    Hang,
    /// A rank's process stands still for a while.
    FreezeRank,
    /// Control messages between a rank and the controller do not arrive for a while, one way or both.
    CutControl,
    /// Frames between two ranks do not arrive for a while, one way or both.
    CutData,
    /// Frames are changed, doubled, lost or swapped for a while.
    SpoilFrames,
    /// The controller's process is killed.
    KillController,
    /// A signal asks for a last checkpoint and the end; the run is started again, at another world size.
    Stop,
    /// Somebody asks for another number of ranks.
    Resize,
    /// One bit of a rank's optimizer state changes by itself, in some of the lives of ranks.
    FlipBit,
    /// The store answers with errors for a while; half of the requests were carried out all the same.
    StoreErrors,
    /// The store is slow for a while.
    StoreSlow,
    /// Listings of the store are old for a while: new objects are missing, deleted ones are still there.
    StoreStale,
    /// The controller's process stands still for a while: shorter than any timeout, or longer.
    StandStill,
    /// A person puts another controller in charge, as a rule because the one that is there stands still; it wakes up later.
    TakeOver,
    /// Parts of the controller's closed loop die of themselves, now and then when a line has come.
    KillLoop,
    /// A node process is killed; its ranks live on.
    KillNode,
    /// A host is lost: its node process and all its ranks at the same moment.
    LoseHost,
    /// What a node and the controller say does not arrive for a while; half of the time their link breaks.
    CutNode,
}

impl Fault {
    /// Every kind.
    pub const ALL: [Self; 22] = [
        Self::KillRank,
        Self::KillSeveral,
        Self::KillAll,
        Self::KillInRecovery,
        Self::Hang,
        Self::FreezeRank,
        Self::CutControl,
        Self::CutData,
        Self::SpoilFrames,
        Self::KillController,
        Self::Stop,
        Self::Resize,
        Self::FlipBit,
        Self::StoreErrors,
        Self::StoreSlow,
        Self::StoreStale,
        Self::StandStill,
        Self::TakeOver,
        Self::KillLoop,
        Self::KillNode,
        Self::LoseHost,
        Self::CutNode,
    ];
    /// Those that are drawn apart from the others, and less often.
    const OF_CONTROLLERS: [Self; 2] = [Self::StandStill, Self::TakeOver];
    /// Those of runs on several hosts.
    const OF_NODES: [Self; 3] = [Self::KillNode, Self::LoseHost, Self::CutNode];
    /// That of the closed loop: drawn apart from all others, and it strikes at times of its own.
    const OF_LOOPS: Self = Self::KillLoop;
}

impl Fault {
    /// Whether no step is cut short by it.
    fn spares_steps(self) -> bool {
        matches!(
            self,
            Self::Stop
                | Self::Resize
                | Self::StoreErrors
                | Self::StoreSlow
                | Self::StoreStale
                | Self::StandStill
                | Self::KillLoop
                | Self::KillNode
                | Self::CutNode
        )
    }
}

/// Everything about one simulation that its seed decides.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The seed.
    pub seed: u64,
    /// Lanes of the global batch.
    pub lanes: u32,
    /// Rank processes at first.
    pub ranks: u32,
    /// Processes held ready beside them.
    pub spares: u32,
    /// Hosts with a node process each; 0 where the controller starts the ranks itself.
    pub nodes: u32,
    /// Steps of the run.
    pub steps: u64,
    /// Optimizer shards at most.
    pub shards: u32,
    /// Copies of each.
    pub replicas: u32,
    /// Steps between checkpoints; 0 for the last only.
    pub checkpoint_interval_steps: u64,
    /// `checkpoint.interval`.
    pub checkpoint_interval: &'static str,
    /// `checkpoint.keep_every_steps`.
    pub keep_every_steps: u64,
    /// Checkpoints kept.
    pub keep_last: u32,
    /// The mixture adapts.
    pub adaptive: bool,
    /// `mixture.epochs_max`; not always reached.
    pub epochs_max: Option<u64>,
    /// `policy.spikes = "skip"`, with samples of which a few are odd.
    pub skips_spikes: bool,
    /// `policy.stop.tokens`; not always reached.
    pub stop_tokens: Option<u64>,
    /// `batch.ramp`.
    pub ramp: Option<BatchRamp>,
    /// Rollbacks: the line on which each is decided, and the state to go back to. One into what an earlier one has left
    /// behind is not decided.
    pub rollbacks: Vec<(u64, u64)>,
    /// Persons decide, too.
    pub persons: bool,
    /// The learning rate stays level until somebody decides otherwise; where nobody may, it does not.
    pub decays_on_demand: bool,
    /// `fault.timeout_ms`.
    pub timeout_ms: u64,
    /// One lane's forward and backward (milliseconds).
    pub lane_ms: u64,
    /// Longest way of a message (microseconds).
    pub link_us_max: u64,
    /// Payload bytes of a data-plane frame at most.
    pub frame_bytes: usize,
    /// A process from its start to its first word, at most (milliseconds).
    pub start_ms_max: u64,
    /// A store request at most (milliseconds).
    pub store_ms_max: u64,
    /// Bytes of a part of an upload: in some runs so few that checkpoint shards go up in several.
    pub part_bytes: u64,
    /// Kinds of fault that happen.
    pub faults: Vec<Fault>,
    /// One rank computes one update wrong. That shows where copies are compared, at the end of the step; where the right
    /// copy is lost in that very moment nobody can tell, so nothing else cuts steps short in such a run.
    pub wrong_update: bool,
    /// Mean time between faults (milliseconds).
    pub fault_every_ms: f64,
    /// Faults happen for this long; then the run must come to its end.
    pub fault_phase_ms: u64,
}

impl Scenario {
    /// The scenario of a seed.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut random = Random::of(seed, "scenario", 0);
        let lanes = random.pick(&[1, 2, 3, 4, 4, 5, 6, 8]);
        let ranks = random.between(1, u64::from(lanes.min(5))) as u32;
        let timeout_ms = random.pick(&[300, 500, 1000, 2000]);
        let drawn = Fault::ALL.into_iter().filter(|fault| {
            let apart = Fault::OF_CONTROLLERS.contains(fault) || Fault::OF_NODES.contains(fault);
            !apart && *fault != Fault::OF_LOOPS
        });
        let mut faults: Vec<Fault> = drawn.filter(|_| random.chance(0.45)).collect();
        let mut controllers = Random::of(seed, "controllers", 0);
        faults.extend(Fault::OF_CONTROLLERS.into_iter().filter(|_| controllers.chance(0.3)));
        if Random::of(seed, "loops", 0).chance(0.35) {
            faults.push(Fault::OF_LOOPS);
        }
        let mut hosts = Random::of(seed, "hosts", 0);
        let nodes = if hosts.chance(0.5) {
            hosts.pick(&[1, 2, 2, 3]).min(ranks)
        } else {
            0
        };
        if nodes > 0 {
            faults.extend(Fault::OF_NODES.into_iter().filter(|_| hosts.chance(0.65)));
        }
        let mut persons = Random::of(seed, "who decides", 0);
        let wrong_update = Random::of(seed, "wrong update", 0).chance(0.06);
        let mut clock = Random::of(seed, "checkpoints by the clock", 0);
        let mut policy = Random::of(seed, "policy", 0);
        let skips_spikes = policy.chance(0.1);
        let spares = random.pick(&[0, 0, 0, 1, 2]);
        let steps = match random.between(10, 30) {
            few if skips_spikes => SPIKE_STEPS_MIN + few,
            few => few,
        };
        if wrong_update {
            faults.retain(|fault| fault.spares_steps());
        }
        let mut epochs = Random::of(seed, "epochs", 0);
        let mut backs = Random::of(seed, "rollbacks", 0);
        let rolls_back = backs.chance(0.3);
        let mut scenario = Self {
            seed,
            lanes,
            ranks,
            spares,
            nodes,
            steps,
            shards: random.between(1, 6) as u32,
            replicas: random.between(1, u64::from(ranks.min(3))) as u32,
            checkpoint_interval_steps: random.pick(&[0, 2, 3, 5, 8]),
            checkpoint_interval: clock.pick(&["off", "off", "1s", "2s"]),
            keep_every_steps: clock.pick(&[0, 0, 4]),
            keep_last: random.between(1, 3) as u32,
            adaptive: random.chance(0.5),
            epochs_max: epochs.chance(0.2).then(|| epochs.pick(&[1, 1, 2, 3])),
            skips_spikes,
            stop_tokens: policy.chance(0.25).then(|| stop_tokens(&mut policy, lanes, steps)),
            ramp: policy.chance(0.25).then(|| ramp(&mut policy, lanes)),
            timeout_ms,
            lane_ms: random.between(2, 20),
            link_us_max: random.pick(&[200, 2_000, 10_000]),
            frame_bytes: random.pick(&[256, 1024, 4096]),
            start_ms_max: random.pick(&[20, 60, 200]),
            store_ms_max: random.pick(&[3, 20, 80]),
            part_bytes: Random::of(seed, "parts", 0).pick(&[PART_BYTES, PART_BYTES, 4096]),
            faults,
            wrong_update,
            fault_every_ms: random.pick(&[80.0, 250.0, 800.0]),
            fault_phase_ms: random.between(500, 6_000),
            rollbacks: Vec::new(),
            persons: persons.chance(0.2),
            decays_on_demand: persons.chance(0.3),
        };
        let points = (1..=scenario.steps / DECISION_INTERVAL_STEPS).map(|point| point * DECISION_INTERVAL_STEPS);
        let points = points.filter(|_| rolls_back && backs.chance(0.4));
        let points: Vec<u64> = points.collect();
        scenario.rollbacks = points
            .into_iter()
            .map(|line| (line, backs.between(0, line - 1)))
            .collect();
        scenario
    }

    /// The closed loop of a run with this config: with the scenario's rollbacks.
    #[must_use]
    pub fn loop_config(&self, config: &Config) -> LoopConfig {
        let pairs = self.rollbacks.iter();
        LoopConfig {
            rehearsed: pairs
                .map(|&(line, to)| (StepsCompleted(line), StepsCompleted(to)))
                .collect(),
            ..LoopConfig::of(config)
        }
    }

    /// Counts at which a rollback acts or to which it goes back, if it is decided at all. Persons may ask for any.
    #[must_use]
    pub fn rollback_boundaries(&self) -> Vec<StepsCompleted> {
        if self.persons {
            return (0..=self.steps).map(StepsCompleted).collect();
        }
        let boundaries = |&(line, to): &(u64, u64)| [line + DECISION_LAG_STEPS, to];
        self.rollbacks.iter().flat_map(boundaries).map(StepsCompleted).collect()
    }

    /// The same with some kinds of fault in it, often; and with persons who decide, if so.
    #[must_use]
    pub fn insisting(mut self, faults: &[Fault], persons: bool) -> Self {
        self.persons |= persons;
        if !faults.is_empty() {
            self.wrong_update = false;
            self.faults.retain(|fault| !faults.contains(fault));
            // As often as all others together.
            let times = self.faults.len().div_ceil(faults.len()).max(1);
            for _ in 0..times {
                self.faults.extend(faults);
            }
            self.fault_every_ms = self.fault_every_ms.min(250.0);
        }
        self
    }

    /// Whether a kind of fault happens.
    #[must_use]
    pub fn has(&self, fault: Fault) -> bool {
        self.faults.contains(&fault)
    }

    /// The workers of each host: those of the world as it begins on all of them, those that may come on the last.
    #[must_use]
    pub fn slots(&self) -> Vec<Range<u32>> {
        let each = self.ranks.div_ceil(self.nodes.max(1));
        let first_of = |host: u32| (host * each).min(self.ranks + self.spares);
        let last = self.lanes + self.spares + self.nodes;
        let ends = (1..=self.nodes).map(|next| if next == self.nodes { last } else { first_of(next) });
        (0..self.nodes)
            .map(first_of)
            .zip(ends)
            .map(|(first, end)| first..end)
            .collect()
    }

    /// The hosts, as a config has them.
    fn nodes_text(&self) -> String {
        if self.nodes == 0 {
            return String::new();
        }
        let nodes: Vec<String> = (0..)
            .zip(self.slots())
            .map(|(index, workers): (u32, Range<u32>)| {
                format!("{{name = \"host-{index}\", slots = {}}}", workers.len())
            })
            .collect();
        format!(
            "transport = \"tcp\"\naddress = \"127.0.0.1\"\nnodes = [{}]\n",
            nodes.join(", ")
        )
    }

    /// The run's config, at a world size.
    ///
    /// # Errors
    /// If the scenario makes no valid config: a bug of this module.
    pub fn config(&self, ranks: u32, dir: &Path) -> Result<Config, ConfigError> {
        let controller = if self.adaptive { "ado" } else { "static" };
        let (rate, decay_steps) = match self.persons && self.decays_on_demand {
            true => ("wsd", 6),
            false => ("cosine", 0),
        };
        let (replicas, timeout_ms) = (self.replicas.min(ranks), self.timeout_ms);
        let nodes = self.nodes_text();
        let limit = self
            .epochs_max
            .map_or_else(String::new, |epochs| format!("epochs_max = {epochs}\n"));
        let Self {
            seed,
            lanes,
            steps,
            shards,
            checkpoint_interval_steps,
            checkpoint_interval,
            keep_every_steps,
            keep_last,
            spares,
            ..
        } = self;
        // A seed of the run is a signed number of its file.
        let run_seed = seed & 0xffff;
        let text = format!(
            r#"
[run]
name = "simulated"
seed = {run_seed}
steps = {steps}
[model]
layers = 1
hidden = 8
ffn = 8
heads = 2
kv_heads = 1
context = {CONTEXT}
vocabulary = 264
init_std = 0.1
[batch]
lanes = {lanes}
sequences_per_lane = {SEQUENCES_PER_LANE}
micro_batch_sequences = 1
[optimizer]
learning_rate = 1e-2
block_elements = 64
shards = {shards}
replicas = {replicas}
[optimizer.schedule]
kind = "{rate}"
warmup_steps = 2
decay_steps = {decay_steps}
final_fraction = 0.1
[mixture]
controller = "{controller}"
start_steps = {DECISION_INTERVAL_STEPS}
interval_steps = {DECISION_INTERVAL_STEPS}
lag_steps = {DECISION_LAG_STEPS}
{limit}[[data.domains]]
name = "one"
path = "one"
language = "en"
weight = 1.0
[[data.domains]]
name = "two"
path = "two"
language = "zh"
weight = 2.0
[evaluation]
interval_steps = 4
sequences_per_domain_max = 2
[checkpoint]
interval_steps = {checkpoint_interval_steps}
interval = "{checkpoint_interval}"
keep_every_steps = {keep_every_steps}
keep_last = {keep_last}
[monitor]
weights_interval_steps = 3
[cluster]
device = "cpu"
ranks = {ranks}
spares = {spares}
{nodes}[fault]
timeout_ms = {timeout_ms}
restarts_max = 1000
restart_backoff_ms = 20
"#
        );
        let text = text + &self.policy();
        let mut config = Config::parse(&text, "scenario", &[], Path::new(""))?;
        config.set_dir(dir)?;
        Ok(config)
    }

    /// Sections that only some runs have.
    fn policy(&self) -> String {
        // Where persons may decide, the lines of decisions are as long as rollbacks need them.
        let persons = self.persons || !self.rollbacks.is_empty();
        let mut text = format!("[policy]\npersons = {persons}\n");
        // Writing to a string does not fail.
        if self.skips_spikes {
            let _ = writeln!(text, "spikes = \"skip\"");
        }
        if let Some(tokens) = self.stop_tokens {
            let _ = writeln!(text, "[policy.stop]\ntokens = {tokens}");
        }
        if let Some(ramp) = self.ramp {
            let BatchRamp {
                start_sequences,
                step_sequences,
                samples,
            } = ramp;
            let _ = writeln!(
                text,
                "[batch.ramp]\nstart_sequences = {start_sequences}\nstep_sequences = {step_sequences}\nsamples = {samples}"
            );
        }
        text
    }
}

/// Somewhere in the second half of a run with full batches, or a little behind its end.
fn stop_tokens(random: &mut Random, lanes: u32, steps: u64) -> u64 {
    let all = steps * u64::from(lanes) * u64::from(SEQUENCES_PER_LANE) * CONTEXT;
    random.between(all / 2, all + all / 10)
}

/// One to three rises to the full batch, from a single sequence on at the least.
fn ramp(random: &mut Random, lanes: u32) -> BatchRamp {
    let full = u64::from(lanes * SEQUENCES_PER_LANE);
    let rises = random.between(1, 3.min(full - 1));
    let step = random.between(1, (full - 1) / rises);
    BatchRamp {
        start_sequences: (full - rises * step) as u32,
        step_sequences: step as u32,
        samples: random.between(1, 8 * full),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_makes_a_valid_config() {
        for seed in 0..500 {
            let scenario = Scenario::of(seed);
            for ranks in 1..=scenario.lanes {
                scenario.config(ranks, Path::new("/tmp")).expect("valid");
            }
        }
    }

    #[test]
    fn some_seeds_have_a_policy_that_others_lack() {
        let with = |has: fn(&Scenario) -> bool| (0..200).filter(|&seed| has(&Scenario::of(seed))).count();
        for (name, count, range) in [
            ("spikes", with(|s| s.skips_spikes), 8..40),
            ("stop", with(|s| s.stop_tokens.is_some()), 25..80),
            ("ramp", with(|s| s.ramp.is_some()), 25..80),
            ("rollback", with(|s| !s.rollbacks.is_empty()), 25..80),
            ("persons", with(|s| s.persons), 25..60),
            ("nodes", with(|s| s.nodes > 0), 60..140),
        ] {
            assert!(range.contains(&count), "{name}: {count} of 200 seeds");
        }
    }

    #[test]
    fn some_seeds_have_one_kind_of_fault_that_others_lack() {
        for fault in Fault::ALL {
            let with = (0..200).filter(|&seed| Scenario::of(seed).has(fault)).count();
            assert!((40..160).contains(&with), "{fault:?} in {with} of 200 seeds");
        }
    }
}
