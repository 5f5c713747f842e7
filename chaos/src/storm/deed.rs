//! How each kind of fault is done: a small function each. A fault that cannot be done says why, and whether it ever can.

use super::book::Victim;
use super::kind::Kind;
use super::life::Life;
use super::machine::{Cage, Disk};
use super::network::{Condition, Network, Way, back};
use super::processes::{Handle, Processes, Rank, limit};
use super::store::{Mischief, Store};
use crate::sim::random::Random;
use rustix::process::{Resource, Signal, getrlimit};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A starved rank runs this long, then stands this long.
const STARVED_RUN: Duration = Duration::from_millis(10);
const STARVED_STAND: Duration = Duration::from_millis(90);
/// Mischief of the store that waits for requests is called off after this long.
const STORE_WAIT_MS: u64 = 10_000;
/// A flipped bit waits this long for bytes to be flipped.
const FLIP_WAIT_MS: u64 = 5_000;
/// A full disk is freed after this long, if nobody has ended of it.
const DISK_FULL_MS: u64 = 15_000;
/// Memory or descriptors may not be asked for at once.
const EXHAUSTION_MS: u64 = 8_000;
/// Bytes a second on a throttled way.
const THROTTLE_BYTES: (u64, u64) = (64 * 1024, 1024 * 1024);

/// What can be harmed.
pub struct Field<'a> {
    /// The controller.
    pub life: &'a mut Life,
    /// Ranks, of this life or an older one.
    pub processes: &'a Processes,
    /// Proxies.
    pub network: &'a Network,
    /// The store.
    pub store: &'a Store,
    /// The disk.
    pub disk: &'a Disk,
    /// The memory group.
    pub cage: &'a Cage,
    /// Where choices come from.
    pub random: &'a mut Random,
    /// `fault.timeout_ms` of the run: durations are chosen around it.
    pub timeout_ms: u64,
    /// The program, for `status`.
    pub program: &'a Path,
    /// The run folder.
    pub run_dir: &'a Path,
    /// The store is in somebody's hands already.
    pub store_is_harmed: bool,
    /// The controller stands still.
    pub controller_is_stopped: bool,
}

/// A fault that was done.
pub struct Deed {
    /// What was hit, in words.
    pub target: String,
    /// Processes that were hit.
    pub victims: Vec<Victim>,
    /// How long it lasts.
    pub lasts_ms: u64,
    /// What ends it.
    pub mend: Mend,
}

/// What ends a harm, and tells whether anything ran into it.
pub enum Mend {
    /// It is over already.
    Nothing,
    /// SIGCONT.
    Continue(Handle),
    /// SIGCONT to the controller.
    ContinueController,
    /// A thread that starves a rank ends.
    Feed(Arc<AtomicBool>),
    /// Ways are mended; pieces harmed before on each.
    Ways(Vec<(Way, u64)>),
    /// The store is left alone.
    Store,
    /// Room on the disk, and limits lifted.
    Disk(Vec<u32>),
    /// A rank that still lives gets its memory back: nothing came of it. With it, how many the kernel had ended before.
    Memory(Rank, Option<u64>),
    /// A rank that still lives may open files again.
    Descriptors(Rank),
}

/// Why a fault was not done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum No {
    /// There is nothing to harm in that way just now.
    Now(String),
    /// This machine cannot do it.
    Ever(String),
}

fn now(why: &str) -> No {
    No::Now(why.to_owned())
}

/// A process that has just ended is no reason to give a kind up; a refusal of the system is.
fn no(what: &str, error: &std::io::Error) -> No {
    let why = format!("{what}: {error}");
    if error.kind() == std::io::ErrorKind::NotFound {
        No::Now(why)
    } else {
        No::Ever(why)
    }
}

const fn victim(rank: Rank) -> Victim {
    Victim {
        worker: rank.worker,
        incarnation: rank.incarnation,
    }
}

fn over(target: String, victims: Vec<Victim>) -> Deed {
    Deed {
        target,
        victims,
        lasts_ms: 0,
        mend: Mend::Nothing,
    }
}

/// Does it.
///
/// # Errors
/// Why it was not done.
pub fn perform(kind: Kind, field: &mut Field) -> Result<Deed, No> {
    match kind {
        Kind::KillRank => field.signal_rank(Signal::KILL),
        Kind::TermRank => field.signal_rank(Signal::TERM),
        Kind::KillPair => field.kill_pair(),
        Kind::KillAllRanks => field.kill_all(),
        Kind::KillController => field.signal_controller(Signal::KILL),
        Kind::TermController => field.signal_controller(Signal::TERM),
        Kind::KillEverything => {
            let mut deed = field.signal_controller(Signal::KILL)?;
            deed.victims = field.kill_all().map(|all| all.victims).unwrap_or_default();
            Ok(deed)
        }
        Kind::StopRank => field.stop_rank(),
        Kind::StopController => field.stop_controller(),
        Kind::ZombieRank => field.zombie(),
        Kind::CpuStarvation => field.starve(),
        Kind::OomKill => field.take_memory(),
        Kind::DiskFull => field.fill_disk(),
        Kind::DescriptorExhaustion => field.take_descriptors(),
        Kind::EdgePartitionOneWay => field.edge(Condition::Cut, false),
        Kind::EdgePartition => field.edge(Condition::Cut, true),
        Kind::EdgeReset => field.reset_edge(),
        Kind::EdgeDelay => {
            let ms = field.random.between(5, 40);
            field.edge(Condition::Delay(ms), true)
        }
        Kind::EdgeThrottle => {
            let rate = field.random.between(THROTTLE_BYTES.0, THROTTLE_BYTES.1);
            field.edge(Condition::Throttle(rate), true)
        }
        Kind::EdgeBitFlip => field.edge(Condition::FlipBit, false),
        Kind::ControlPartition => field.control(Condition::Cut),
        Kind::ControlReset => field.reset_control(),
        Kind::ControlBitFlip => field.control(Condition::FlipBit),
        Kind::StoreUnavailable => field.harm_store(Mischief::Unavailable),
        Kind::StoreLatency => {
            let ms = field.random.between(100, 800);
            field.harm_store(Mischief::Latency(ms))
        }
        Kind::StoreLostAnswer => field.harm_store(Mischief::LoseAnswers(4)),
        Kind::StoreTornUpload => field.harm_store(Mischief::TearUploads(2)),
        Kind::StoreCorruptRead => field.corrupt_read(),
    }
}

impl Field<'_> {
    fn pick_rank(&mut self) -> Result<Rank, No> {
        let ranks = self.processes.ranks();
        if ranks.is_empty() {
            return Err(now("no rank runs"));
        }
        Ok(self.random.pick(&ranks))
    }

    fn signal_rank(&mut self, signal: Signal) -> Result<Deed, No> {
        let rank = self.pick_rank()?;
        if self.processes.signal(rank, signal) {
            Ok(over(format!("worker {}", rank.worker), vec![victim(rank)]))
        } else {
            Err(now("the rank has just ended"))
        }
    }

    /// Primary and replica of one shard, as the controller shows them.
    fn kill_pair(&mut self) -> Result<Deed, No> {
        let ranks = self.processes.ranks();
        if ranks.len() < 2 || self.controller_is_stopped {
            return Err(now("there are no two ranks to ask for"));
        }
        let status = self.status().ok_or_else(|| now("the controller does not answer"))?;
        let shards: Vec<&Vec<Value>> = status["shards"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_array)
            .collect();
        let held_twice: Vec<_> = shards.into_iter().filter(|holders| holders.len() >= 2).collect();
        if held_twice.is_empty() {
            return Err(now("no shard has two holders"));
        }
        let holders = self.random.pick(&held_twice);
        let wanted: Vec<u64> = holders.iter().filter_map(Value::as_u64).collect();
        let pair = ranks
            .into_iter()
            .filter(|rank| wanted.contains(&u64::from(rank.worker)));
        let hit: Vec<Rank> = pair.filter(|&rank| self.processes.signal(rank, Signal::KILL)).collect();
        if hit.len() < 2 {
            return Err(now("a holder has just ended"));
        }
        let workers: Vec<u32> = hit.iter().map(|rank| rank.worker).collect();
        let victims = hit.into_iter().map(victim).collect();
        Ok(over(format!("holders {workers:?} of one shard"), victims))
    }

    fn status(&self) -> Option<Value> {
        let asked = Command::new(self.program)
            .args(["status", "--json", "--run-dir"])
            .arg(self.run_dir)
            .output();
        serde_json::from_slice(&asked.ok().filter(|output| output.status.success())?.stdout).ok()
    }

    fn kill_all(&mut self) -> Result<Deed, No> {
        let ranks = self.processes.ranks().into_iter();
        let hit: Vec<Rank> = ranks
            .filter(|&rank| self.processes.signal(rank, Signal::KILL))
            .collect();
        if hit.is_empty() {
            return Err(now("no rank runs"));
        }
        Ok(over(
            format!("{} ranks", hit.len()),
            hit.into_iter().map(victim).collect(),
        ))
    }

    fn signal_controller(&mut self, signal: Signal) -> Result<Deed, No> {
        if self.controller_is_stopped {
            return Err(now("the controller stands still"));
        }
        if self.life.signal(signal) {
            Ok(over("controller".to_owned(), Vec::new()))
        } else {
            Err(now("the controller has just ended"))
        }
    }

    /// Around the timeout: some wake up in time, some are taken for dead.
    fn around_timeout(&mut self, least_tenths: u64, most_tenths: u64) -> u64 {
        let tenth = self.timeout_ms / 10;
        self.random.between(tenth * least_tenths, tenth * most_tenths)
    }

    fn stop_rank(&mut self) -> Result<Deed, No> {
        let rank = self.pick_rank()?;
        let handle = self.processes.handle(rank);
        let handle = handle.filter(|handle| handle.signal(Signal::STOP));
        let handle = handle.ok_or_else(|| now("the rank has just ended"))?;
        let lasts_ms = self.around_timeout(2, 25);
        Ok(Deed {
            target: format!("worker {} for {lasts_ms} ms", rank.worker),
            victims: vec![victim(rank)],
            lasts_ms,
            mend: Mend::Continue(handle),
        })
    }

    fn stop_controller(&mut self) -> Result<Deed, No> {
        let mut deed = self.signal_controller(Signal::STOP)?;
        deed.lasts_ms = self.around_timeout(2, 15);
        deed.target = format!("controller for {} ms", deed.lasts_ms);
        deed.mend = Mend::ContinueController;
        Ok(deed)
    }

    fn zombie(&mut self) -> Result<Deed, No> {
        let mut deed = self.stop_rank()?;
        let killed = self.signal_controller(Signal::KILL);
        if let Err(no) = killed {
            if let Mend::Continue(handle) = &deed.mend {
                handle.signal(Signal::CONT);
            }
            return Err(no);
        }
        deed.lasts_ms = self.around_timeout(20, 40);
        deed.target.push_str(", which wakes under the next controller");
        Ok(deed)
    }

    fn starve(&mut self) -> Result<Deed, No> {
        let rank = self.pick_rank()?;
        let handle = self
            .processes
            .handle(rank)
            .ok_or_else(|| now("the rank has just ended"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let heard = Arc::clone(&stop);
        let duty = move || {
            while !heard.load(Ordering::SeqCst) && handle.signal(Signal::STOP) {
                std::thread::sleep(STARVED_STAND);
                handle.signal(Signal::CONT);
                std::thread::sleep(STARVED_RUN);
            }
        };
        let spawned = std::thread::Builder::new().name("starve".to_owned()).spawn(duty);
        spawned.map_err(|e| No::Now(format!("a thread: {e}")))?;
        let lasts_ms = self.timeout_ms * 2;
        Ok(Deed {
            target: format!("worker {} for {lasts_ms} ms", rank.worker),
            victims: vec![victim(rank)],
            lasts_ms,
            mend: Mend::Feed(stop),
        })
    }

    fn take_memory(&mut self) -> Result<Deed, No> {
        let rank = self.pick_rank()?;
        let kills = self.cage.kills();
        self.cage
            .put(rank.pid)
            .map_err(|e| no("a rank's memory cannot be limited", &e))?;
        Ok(Deed {
            target: format!("worker {}", rank.worker),
            victims: vec![victim(rank)],
            lasts_ms: EXHAUSTION_MS,
            mend: Mend::Memory(rank, kills),
        })
    }

    fn take_descriptors(&mut self) -> Result<Deed, No> {
        let rank = self.pick_rank()?;
        limit(rank.pid, Resource::Nofile, Some(1)).map_err(|e| no("a rank's descriptors cannot be limited", &e))?;
        Ok(Deed {
            target: format!("worker {}", rank.worker),
            victims: vec![victim(rank)],
            lasts_ms: EXHAUSTION_MS,
            mend: Mend::Descriptors(rank),
        })
    }

    fn fill_disk(&mut self) -> Result<Deed, No> {
        let ranks = self.processes.ranks().into_iter().map(|rank| rank.pid);
        let all: Vec<u32> = ranks.chain([self.life.pid()]).collect();
        self.disk.fill(&all).map_err(|e| no("the disk cannot be filled", &e))?;
        Ok(Deed {
            target: "the run folder's disk".to_owned(),
            victims: Vec::new(),
            lasts_ms: DISK_FULL_MS,
            mend: Mend::Disk(all),
        })
    }

    /// A living connection between two ranks.
    fn pick_edge(&mut self) -> Result<Way, No> {
        let live = self.network.live().into_iter();
        let edges: Vec<Way> = live.filter(|way| matches!(way, Way::Mesh(..))).collect();
        if edges.is_empty() {
            return Err(now("no two ranks are connected"));
        }
        let way = self.random.pick(&edges);
        Ok(if self.random.chance(0.5) { back(way) } else { way })
    }

    fn edge(&mut self, condition: Condition, both: bool) -> Result<Deed, No> {
        let way = self.pick_edge()?;
        let ways = if both { vec![way, back(way)] } else { vec![way] };
        let lasts_ms = match condition {
            Condition::Cut => self.around_timeout(5, 40),
            Condition::FlipBit => FLIP_WAIT_MS,
            Condition::Delay(_) | Condition::Throttle(_) => self.timeout_ms * 2,
        };
        Ok(self.harm_ways(&ways, condition, lasts_ms))
    }

    fn harm_ways(&self, ways: &[Way], condition: Condition, lasts_ms: u64) -> Deed {
        let before = ways.iter().map(|&way| (way, self.network.hits(way))).collect();
        for &way in ways {
            self.network.set(way, Some(condition));
        }
        Deed {
            target: format!("{ways:?}: {condition:?} for {lasts_ms} ms"),
            victims: Vec::new(),
            lasts_ms,
            mend: Mend::Ways(before),
        }
    }

    fn reset_edge(&mut self) -> Result<Deed, No> {
        let way = self.pick_edge()?;
        match self.network.reset(way) {
            0 => Err(now("the connection has just ended")),
            _ => Ok(over(format!("{way:?}"), Vec::new())),
        }
    }

    fn pick_control(&mut self) -> Result<Way, No> {
        let live = self.network.live().into_iter();
        let links: Vec<Way> = live.filter(|way| matches!(way, Way::Up(_))).collect();
        if links.is_empty() {
            return Err(now("no rank is connected to the controller"));
        }
        Ok(self.random.pick(&links))
    }

    fn control(&mut self, condition: Condition) -> Result<Deed, No> {
        let way = self.pick_control()?;
        Ok(match condition {
            Condition::FlipBit => self.harm_ways(&[way], condition, FLIP_WAIT_MS),
            _ => {
                let lasts_ms = self.around_timeout(5, 40);
                self.harm_ways(&[way, back(way)], condition, lasts_ms)
            }
        })
    }

    fn reset_control(&mut self) -> Result<Deed, No> {
        let way = self.pick_control()?;
        match self.network.reset(way) {
            0 => Err(now("the connection has just ended")),
            _ => Ok(over(format!("{way:?}"), Vec::new())),
        }
    }

    fn harm_store(&mut self, mischief: Mischief) -> Result<Deed, No> {
        if self.store_is_harmed {
            return Err(now("the store is being harmed already"));
        }
        let lasts_ms = match mischief {
            Mischief::Unavailable => self.random.between(1_000, 4_000),
            Mischief::Latency(_) => self.timeout_ms * 3,
            _ => STORE_WAIT_MS,
        };
        self.store.set(Some(mischief));
        Ok(Deed {
            target: format!("{mischief:?}"),
            victims: Vec::new(),
            lasts_ms,
            mend: Mend::Store,
        })
    }

    /// Only a run that has lost its state reads.
    fn corrupt_read(&mut self) -> Result<Deed, No> {
        if self.processes.ranks().is_empty() {
            return Err(now("no rank runs"));
        }
        let mut deed = self.harm_store(Mischief::CorruptReads(1))?;
        match self.kill_all() {
            Ok(all) => deed.victims = all.victims,
            Err(no) => {
                self.store.set(None);
                return Err(no);
            }
        }
        Ok(deed)
    }
}

/// Ends a harm; whether anything ran into it.
pub fn mend(mend: &Mend, field: &mut Field) -> bool {
    match mend {
        Mend::Nothing => true,
        Mend::Continue(handle) => {
            handle.signal(Signal::CONT);
            true
        }
        Mend::ContinueController => {
            field.life.signal(Signal::CONT);
            true
        }
        Mend::Feed(stop) => {
            stop.store(true, Ordering::SeqCst);
            true
        }
        Mend::Ways(before) => {
            let hit = before.iter().any(|&(way, hits)| field.network.hits(way) > hits);
            before.iter().for_each(|&(way, _)| field.network.set(way, None));
            hit
        }
        Mend::Store => field.store.set(None).hits > 0,
        Mend::Disk(processes) => {
            field.disk.free();
            if !field.disk.is_own() {
                for &process in processes {
                    // Those that have ended took their limits along.
                    let _ = limit(process, Resource::Fsize, None);
                }
            }
            true
        }
        Mend::Memory(rank, kills) => {
            let lives = field.processes.handle(*rank).is_some();
            if lives {
                field.cage.free(rank.pid);
            }
            // Another fault may have ended it before it needed memory.
            match (field.cage.kills(), kills) {
                (Some(after), Some(before)) => after > *before,
                _ => !lives,
            }
        }
        Mend::Descriptors(rank) => {
            if field.processes.handle(*rank).is_some() {
                let _ = limit(rank.pid, Resource::Nofile, getrlimit(Resource::Nofile).current);
            }
            true
        }
    }
}
