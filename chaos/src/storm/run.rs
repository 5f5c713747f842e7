//! The storm itself: one loop that keeps a controller alive, reads what it writes, does faults when they are due and mends
//! them when their time is over.
//!
//! - A controller that was killed, or ended with 33, is started again at once, on the next world size; so is one that was
//!   asked to stop (34), and one that halted (3) on a disk that is full, once there is room. Any other end is the verdict.
//! - At the end everything is mended, the run is asked to stop, and a last life ends by itself some steps later: an end that
//!   was not forced.

use super::book::{Book, Entry};
use super::deck::{Clock, Deck};
use super::deed::{Deed, Field, Mend, No, mend, perform};
use super::files::{Tail, unix_ms};
use super::kind::Kind;
use super::life::{End, Launch, Life};
use super::machine::{Cage, Disk};
use super::network::Network;
use super::processes::Processes;
use super::report::LifeReport;
use super::scenario::{Phase, Scenario, Second};
use super::store::Store;
use crate::sim::random::Random;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Between two turns of the loop.
const TURN: Duration = Duration::from_millis(4);
/// After a fault that could not be done just now.
const AGAIN: Duration = Duration::from_millis(100);
/// Faults at phases of recovery in a row, without a new line between them.
const CHAIN_MAX: u32 = 3;
/// Lives in a row that may end with 33 without a new line.
const TRANSIENT_MAX: u32 = 20;
/// Steps of the last life.
const LAST_STEPS: u64 = 10;
/// Outcomes are waited for this long when the storm is over.
const SETTLE: Duration = Duration::from_secs(20);
/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(30);
/// Cards looked at before a due fault waits for another turn.
const CARDS_PER_TURN: usize = 4;

/// Everything that outlives a controller.
pub struct Ground<'a> {
    /// What to do.
    pub scenario: &'a Scenario,
    /// How the run is started; ports are added per life.
    pub launch: Launch,
    /// Proxies between its processes.
    pub network: &'a Network,
    /// Its store.
    pub store: &'a Store,
    /// Its disk.
    pub disk: &'a Disk,
    /// Where memory runs out.
    pub cage: &'a Cage,
    /// `fault.timeout_ms`
    pub timeout_ms: u64,
    /// One line for each fault, as it is done.
    pub log: File,
    /// A person has asked for the end.
    pub interrupted: &'a AtomicBool,
}

/// What the storm left.
pub struct Outcome {
    /// All faults.
    pub book: Book,
    /// All lives.
    pub lives: Vec<LifeReport>,
    /// Kinds that this machine cannot do, and why.
    pub impossible: BTreeMap<Kind, String>,
    /// From the first start until the last fault was over.
    pub wall: Duration,
    /// New lines in that time, by world size.
    pub lines_by_world: BTreeMap<u32, u64>,
    /// Lines behind the newest one that were computed again.
    pub replayed: u64,
    /// Lives that ended with 33.
    pub transient_ends: u64,
    /// Why it came to no good end.
    pub failure: Option<String>,
}

/// How far the storm is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Faults are done.
    Blowing,
    /// No more; outcomes are waited for until then.
    Settling(Instant),
    /// The run was asked to stop.
    Stopping,
    /// The last life, which ends by itself.
    Last,
    /// It did.
    Over,
}

struct Storm<'a> {
    ground: Ground<'a>,
    life: Life,
    processes: Processes,
    number: u64,
    world: u32,
    stage: Stage,
    deck: Deck,
    clock: Clock,
    random: Random,
    book: Book,
    events: Tail,
    metrics: Tail,
    mends: Vec<(Instant, u64, Kind, Mend)>,
    impossible: BTreeMap<Kind, String>,
    lives: Vec<LifeReport>,
    lines_by_world: BTreeMap<u32, u64>,
    life_lines: u64,
    replayed: u64,
    transient_ends: u64,
    transient_in_a_row: u32,
    chain: u32,
    /// A generation has begun in this life.
    has_begun: bool,
    began: Instant,
    blew_until: Option<Instant>,
    newest_line: Instant,
    retry_at: Instant,
    said: Instant,
}

/// Lets the storm blow.
///
/// # Errors
/// If the first life cannot be started.
pub fn blow(ground: Ground<'_>) -> Result<Outcome, String> {
    let mut storm = Storm::begin(ground)?;
    let failure = loop {
        match storm.turn() {
            Ok(()) if storm.stage == Stage::Over => break None,
            Ok(()) => std::thread::sleep(TURN),
            Err(failure) => break Some(failure),
        }
    };
    Ok(storm.end(failure))
}

impl<'a> Storm<'a> {
    fn begin(ground: Ground<'a>) -> Result<Self, String> {
        let scenario = ground.scenario;
        let run_dir = ground.launch.run_dir.clone();
        let now = Instant::now();
        let world = scenario.worlds[0];
        let life = Self::launch(&ground, 0, world, scenario.until.steps)?;
        Ok(Self {
            life,
            processes: Processes::of(&run_dir),
            number: 0,
            world,
            stage: Stage::Blowing,
            deck: Deck::new(scenario.faults.clone(), scenario.seed),
            clock: Clock::new(scenario.pace.clone(), scenario.seed),
            random: Random::of(scenario.seed, "choices", 0),
            book: Book::default(),
            events: Tail::of(run_dir.join("events.jsonl")),
            metrics: Tail::of(run_dir.join("metrics.jsonl")),
            mends: Vec::new(),
            impossible: BTreeMap::new(),
            lives: Vec::new(),
            lines_by_world: BTreeMap::new(),
            life_lines: 0,
            replayed: 0,
            transient_ends: 0,
            transient_in_a_row: 0,
            chain: 0,
            has_begun: false,
            began: now,
            blew_until: None,
            newest_line: now,
            retry_at: now,
            said: now,
            ground,
        })
    }

    fn launch(ground: &Ground, number: u64, world: u32, steps: Option<u64>) -> Result<Life, String> {
        let mut launch = ground.launch.clone();
        launch.set.extend(ground.network.lead_to(number, &launch.run_dir));
        launch.ranks = world;
        launch.steps = steps;
        launch.start()
    }

    fn turn(&mut self) -> Result<(), String> {
        let now = Instant::now();
        if self.ground.interrupted.load(Ordering::SeqCst) {
            return Err("interrupted".to_owned());
        }
        self.read(now);
        if let Some(end) = self.life.ended() {
            // What it wrote last must count.
            self.read(now);
            self.ended(end)?;
        }
        self.mend_due(now);
        self.book.settle(unix_ms());
        self.advance(now);
        if self.stage == Stage::Blowing && self.clock.is_due(now) && now >= self.retry_at {
            self.fault_due(now);
        }
        self.progress(now);
        let patience = Duration::from_secs(self.ground.scenario.patience_s);
        if now.duration_since(self.newest_line) > patience && self.stage != Stage::Over {
            return Err(format!(
                "no new line for {patience:?}; standard error ends with\n{}",
                self.life.tail()
            ));
        }
        Ok(())
    }

    fn read(&mut self, now: Instant) {
        for event in self.events.look() {
            self.book.event(&event);
            self.count_replay(&event);
            self.phase_entered(&event);
        }
        for line in self.metrics.look() {
            if self.book.line(&line) {
                self.newest_line = now;
                self.life_lines += 1;
                self.chain = 0;
                self.transient_in_a_row = 0;
                if matches!(self.stage, Stage::Blowing | Stage::Settling(_)) {
                    *self.lines_by_world.entry(self.world).or_default() += 1;
                }
                self.clock.line(now);
            }
        }
    }

    /// A generation that begins behind the newest line computes the lines between again.
    fn count_replay(&mut self, event: &Value) {
        if event["kind"] == "generation"
            && let Some(base) = event["base"].as_u64()
        {
            self.replayed += self.book.newest_step().saturating_sub(base);
        }
    }

    fn phase_entered(&mut self, event: &Value) {
        let phase = match event["kind"].as_str().unwrap_or_default() {
            // The exit that follows an end that was seen to begin is no second loss.
            "rank_lost" if event["expected"] == true => return,
            "rank_ending" | "rank_lost" => Phase::Fence,
            "state_lost" => Phase::Locate,
            "generation" => {
                let again = std::mem::replace(&mut self.has_begun, true);
                match event["restored"].as_bool() {
                    Some(true) => Phase::Restore,
                    _ if again => Phase::Begin,
                    _ => return,
                }
            }
            "rank_ready" if self.has_begun => Phase::Admit,
            "checkpoint" => Phase::Checkpoint,
            _ => return,
        };
        self.second(phase);
    }

    fn second(&mut self, phase: Phase) {
        let scenario = self.ground.scenario;
        let fits = |second: &&Second| second.on == phase;
        for second in scenario.second.iter().filter(fits) {
            let wanted = self.random.chance(second.share);
            if wanted && self.stage == Stage::Blowing && self.chain < CHAIN_MAX {
                // One that cannot be done now was no second fault, and is not counted.
                if self.attempt(second.kind, &phase_name(phase)).is_ok() {
                    self.chain += 1;
                }
            }
        }
    }

    fn fault_due(&mut self, now: Instant) {
        for turn in 0..CARDS_PER_TURN {
            let card = self.deck.card(turn, CARDS_PER_TURN);
            let Some(kind) = card else { break };
            match self.attempt(kind, "pace") {
                Ok(()) => {
                    self.clock.done();
                    return;
                }
                Err(No::Now(_)) => self.deck.put_back(kind),
                Err(No::Ever(why)) => {
                    self.deck.strike_out(kind);
                    self.impossible.insert(kind, why);
                }
            }
        }
        self.retry_at = now + AGAIN;
    }

    fn field(&mut self) -> Field<'_> {
        let harmed = self.mends.iter().any(|(.., mend)| matches!(mend, Mend::Store));
        let stopped = self
            .mends
            .iter()
            .any(|(.., mend)| matches!(mend, Mend::ContinueController));
        Field {
            life: &mut self.life,
            processes: &self.processes,
            network: self.ground.network,
            store: self.ground.store,
            disk: self.ground.disk,
            cage: self.ground.cage,
            random: &mut self.random,
            timeout_ms: self.ground.timeout_ms,
            program: &self.ground.launch.program,
            run_dir: &self.ground.launch.run_dir,
            ranks_max: self.ground.scenario.largest(),
            store_is_harmed: harmed,
            controller_is_stopped: stopped,
        }
    }

    /// Tries one fault, and enters it where it was done.
    fn attempt(&mut self, kind: Kind, trigger: &str) -> Result<(), No> {
        if self.disk_is_full() && kind == Kind::DiskFull {
            return Err(No::Now("it is full already".to_owned()));
        }
        // Before the deed: what comes of it must not seem older.
        let at_ms = unix_ms();
        let Deed {
            target,
            victims,
            lasts_ms,
            mend,
        } = perform(kind, &mut self.field())?;
        let entry = Entry {
            kind,
            trigger: trigger.to_owned(),
            life: self.number,
            world: self.world,
            target,
            victims,
            lasts_ms,
        };
        let number = self.book.enter(at_ms, entry);
        self.write_log(number);
        let due = Instant::now() + Duration::from_millis(lasts_ms);
        if !matches!(mend, Mend::Nothing) {
            self.mends.push((due, number, kind, mend));
        }
        Ok(())
    }

    fn write_log(&mut self, number: u64) {
        let record = usize::try_from(number)
            .ok()
            .and_then(|number| self.book.records().get(number));
        let line = record
            .and_then(|record| serde_json::to_string(record).ok())
            .unwrap_or_default();
        // The log is for people who watch; the report holds everything again.
        let _ = writeln!(self.ground.log, "{line}");
    }

    fn disk_is_full(&self) -> bool {
        self.mends.iter().any(|(.., mend)| matches!(mend, Mend::Disk(_)))
    }

    fn mend_due(&mut self, now: Instant) {
        let (due, rest) = std::mem::take(&mut self.mends)
            .into_iter()
            .partition(|(at, ..)| *at <= now);
        self.mends = rest;
        self.mend(due);
    }

    fn mend(&mut self, due: Vec<(Instant, u64, Kind, Mend)>) {
        for (_, number, _, harm) in due {
            let had_effect = mend(&harm, &mut self.field());
            self.book.mended(number, unix_ms(), had_effect);
        }
    }

    fn mend_all(&mut self) {
        let all = std::mem::take(&mut self.mends);
        self.mend(all);
        self.ground.network.mend_all();
    }

    fn advance(&mut self, now: Instant) {
        let until = &self.ground.scenario.until;
        match self.stage {
            Stage::Blowing => {
                // A harm that nothing has run into yet may turn out to be none.
                let enough = until.faults.is_some_and(|faults| self.book.done() >= faults);
                let late = until
                    .minutes
                    .is_some_and(|minutes| self.began.elapsed().as_secs_f64() >= minutes * 60.0);
                if enough || late {
                    self.stage = Stage::Settling(now + SETTLE);
                }
            }
            Stage::Settling(deadline) => {
                let missing = until.faults.is_some_and(|faults| self.book.done() < faults);
                if self.mends.is_empty() && missing && until.minutes.is_none() {
                    self.stage = Stage::Blowing;
                } else if self.mends.is_empty() && (self.book.is_settled() || now >= deadline) {
                    self.blew_until = Some(now);
                    self.mend_all();
                    self.life.signal(Signal::TERM);
                    self.stage = Stage::Stopping;
                }
            }
            Stage::Stopping | Stage::Last | Stage::Over => {}
        }
    }

    fn ended(&mut self, end: End) -> Result<(), String> {
        self.book.controller_ended(unix_ms(), &format!("{end:?}"));
        let newest = self.book.newest_step();
        self.lives.push(LifeReport {
            world: self.world,
            lines: std::mem::take(&mut self.life_lines),
            end: format!("{end:?}"),
        });
        let killed = self.last_record_of_life(|kind| kind.kills_controller());
        let asked_to_stop =
            self.stage == Stage::Stopping || self.last_record_of_life(|kind| kind == Kind::TermController);
        let goes_on = match end {
            End::Code(0) if self.stage == Stage::Last || self.ground.scenario.until.steps.is_some() => {
                self.blew_until.get_or_insert_with(Instant::now);
                self.stage = Stage::Over;
                return Ok(());
            }
            End::Signal(9) => killed,
            End::Code(34) => asked_to_stop,
            End::Code(33) => {
                self.transient_ends += 1;
                self.transient_in_a_row += 1;
                self.transient_in_a_row <= TRANSIENT_MAX
            }
            End::Code(3) if self.disk_is_full() => {
                let (full, rest) = std::mem::take(&mut self.mends)
                    .into_iter()
                    .partition(|(.., mend)| matches!(mend, Mend::Disk(_)));
                self.mends = rest;
                self.mend(full);
                true
            }
            _ => false,
        };
        if !goes_on {
            return Err(format!(
                "the controller ended with {end:?} at line {newest}\n{}",
                self.life.tail()
            ));
        }
        let steps = if matches!(self.stage, Stage::Stopping | Stage::Last) {
            self.stage = Stage::Last;
            Some(newest + LAST_STEPS)
        } else {
            self.ground.scenario.until.steps
        };
        self.start_again(steps)
    }

    fn last_record_of_life(&self, is: impl Fn(Kind) -> bool) -> bool {
        let mut of_life = self
            .book
            .records()
            .iter()
            .rev()
            .take_while(|record| record.life == self.number);
        of_life.any(|record| is(record.kind))
    }

    fn start_again(&mut self, steps: Option<u64>) -> Result<(), String> {
        self.number += 1;
        let worlds = &self.ground.scenario.worlds;
        self.world = worlds[usize::try_from(self.number).unwrap_or(0) % worlds.len()];
        self.life.leave();
        self.life = Self::launch(&self.ground, self.number, self.world, steps)?;
        self.has_begun = false;
        self.book.controller_started();
        if self.stage == Stage::Blowing {
            self.second(Phase::Claim);
        }
        Ok(())
    }

    fn progress(&mut self, now: Instant) {
        if now.duration_since(self.said) < PROGRESS {
            return;
        }
        self.said = now;
        println!(
            "{:>6.0} s: line {}, life {} on {} ranks, {} faults done, {:?}",
            self.began.elapsed().as_secs_f64(),
            self.book.newest_step(),
            self.number,
            self.world,
            self.book.done(),
            self.stage
        );
    }

    fn end(mut self, failure: Option<String>) -> Outcome {
        self.mend_all();
        if failure.is_some() {
            self.lives.push(LifeReport {
                world: self.world,
                lines: self.life_lines,
                end: "killed by the storm".to_owned(),
            });
        }
        let until = self.blew_until.unwrap_or_else(Instant::now);
        Outcome {
            wall: until.duration_since(self.began),
            book: self.book,
            lives: self.lives,
            impossible: self.impossible,
            lines_by_world: self.lines_by_world,
            replayed: self.replayed,
            transient_ends: self.transient_ends,
            failure,
        }
    }
}

fn phase_name(phase: Phase) -> String {
    format!("{phase:?}").to_lowercase()
}
