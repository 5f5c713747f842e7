//! What is done to a run: one fault after another, of the kinds and at the times that the seed says.

use super::controller::Life;
use super::persons;
use super::process::Process;
use super::random::Random;
use super::scenario::Fault;
use super::world::World;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tarazed_actors::controller::LoopMember;
use tarazed_actors::node::ExitCause;
use tarazed_domain::{Incarnation, StepIndex, WorkerId};
use tarazed_protocol::message::Member;
use tarazed_train::harm::{Harm, Place};
use tokio::time::Instant;

/// A controller stands still for so many timeouts at most.
const NAP_TIMEOUTS_MAX: u64 = 6;
/// Listings are old for so long at most.
const STALE_MAX: Duration = Duration::from_millis(1_000);
/// A line passes the closed loop in about half as many moves.
const LOOP_MOVES_MAX: u64 = 10;
/// What of a closed loop dies.
const IN_LOOPS: [&[LoopMember]; 4] = [
    &[LoopMember::Tsm],
    &[LoopMember::Ate],
    &[LoopMember::Dmu],
    &LoopMember::ALL,
];

/// Does what the scenario says until its fault phase is over.
pub async fn disturb(world: Arc<World>) {
    let mut random = world.random("faults", 0);
    let until = Instant::now() + Duration::from_millis(world.scenario.fault_phase_ms);
    let kinds: Vec<Fault> = world
        .scenario
        .faults
        .iter()
        .copied()
        .filter(|kind| !matches!(kind, Fault::KillInRecovery | Fault::FlipBit | Fault::KillLoop))
        .collect();
    while !kinds.is_empty() {
        let wait = Duration::from_millis(random.waiting_ms(world.scenario.fault_every_ms));
        if Instant::now() + wait >= until {
            break;
        }
        tokio::time::sleep(wait).await;
        let kind = random.pick(&kinds);
        strike(&world, kind, &mut random);
    }
    tokio::time::sleep_until(until).await;
    world.history.note("the faults are over");
    world.calm_down();
}

fn strike(world: &Arc<World>, kind: Fault, random: &mut Random) {
    let Some(life) = world.life().filter(|life| life.is_alive()) else {
        return;
    };
    let processes = world.processes(&life);
    let one = |random: &mut Random| -> Option<Arc<Process>> {
        let last = processes.len().checked_sub(1)?;
        Some(Arc::clone(&processes[random.between(0, last as u64) as usize]))
    };
    let timeout_ms = world.scenario.timeout_ms;
    let a_while = Duration::from_millis(random.between(1, timeout_ms * 3));
    let Some(target) = one(random) else {
        return strike_controller(world, kind, random);
    };
    world.history.note(&format!("fault: {kind:?}, {} first", target.member));
    let kill = |process: &Arc<Process>| process.end(world, ExitCause::Signal(9), None);
    match kind {
        Fault::KillRank => kill(&target),
        Fault::KillSeveral => {
            kill(&target);
            for _ in 0..random.between(1, 2) {
                if let Some(other) = one(random) {
                    kill(&other);
                }
            }
        }
        Fault::KillAll => processes.iter().for_each(kill),
        Fault::Hang => target.hang(),
        Fault::FreezeRank => target.stand_still(a_while),
        Fault::CutControl => {
            let (up, down) = random.pick(&[(true, true), (true, false), (false, true)]);
            target.disturb();
            if up {
                world.cut(target.pid, 0, a_while);
            }
            if down {
                world.cut(0, target.pid, a_while);
            }
        }
        Fault::CutData => {
            let (there, back) = random.pick(&[(true, true), (true, false), (false, true)]);
            let others: Vec<u32> = processes
                .iter()
                .map(|p| p.pid)
                .filter(|pid| *pid != target.pid)
                .collect();
            if others.is_empty() {
                return;
            }
            let other = random.pick(&others);
            if there {
                world.cut(target.pid, other, a_while);
            }
            if back {
                world.cut(other, target.pid, a_while);
            }
        }
        Fault::SpoilFrames => {
            world.spoil_frames(true);
            let world = Arc::clone(world);
            tokio::spawn(async move {
                tokio::time::sleep(a_while).await;
                world.spoil_frames(false);
            });
        }
        Fault::StoreErrors => world.weather.errors(a_while),
        Fault::StoreSlow => world.weather.slow(a_while),
        Fault::StoreStale => {
            let age = Duration::from_millis(random.between(1, timeout_ms));
            // A store whose listings stay old for longer is not one that the product takes.
            world.weather.stale(age, a_while.min(STALE_MAX));
        }
        Fault::KillNode | Fault::LoseHost | Fault::CutNode => strike_host(world, kind, random),
        Fault::Resize => {
            let ranks = random.between(1, u64::from(world.scenario.lanes)) as u32;
            world.history.note(&format!("{ranks} ranks are wanted"));
            life.resize(ranks);
        }
        Fault::KillController
        | Fault::Stop
        | Fault::StandStill
        | Fault::TakeOver
        | Fault::KillInRecovery
        | Fault::FlipBit
        | Fault::KillLoop => strike_controller(world, kind, random),
    }
}

fn strike_host(world: &Arc<World>, kind: Fault, random: &mut Random) {
    let Some(last) = world.hosts.len().checked_sub(1) else {
        return;
    };
    let host = Arc::clone(&world.hosts[random.between(0, last as u64) as usize]);
    world
        .history
        .note(&format!("fault: {kind:?}, workers {:?}", host.workers));
    match kind {
        Fault::CutNode => {
            let time = Duration::from_millis(random.between(1, world.scenario.timeout_ms * 3));
            host.cut(world, time, random.chance(0.5));
        }
        _ => host.kill_node(),
    }
    if kind == Fault::LoseHost {
        let lost = host
            .workers
            .clone()
            .map(WorkerId)
            .filter_map(|worker| world.newest_of(worker));
        for process in lost.filter(|process| process.is_alive()) {
            process.end(world, ExitCause::Signal(9), None);
        }
    }
}

/// How long a controller stands still: half of the time too short for anybody to mind, if it is not its own patience that
/// it loses.
fn nap(timeout_ms: u64, random: &mut Random) -> Duration {
    let (short, long) = (timeout_ms / 2, timeout_ms * NAP_TIMEOUTS_MAX);
    let time_ms = if random.chance(0.5) {
        random.between(1, short)
    } else {
        random.between(short, long)
    };
    Duration::from_millis(time_ms)
}

/// The bit that will flip in a process that starts now, if any.
pub fn flip(world: &World, pid: u32, member: Member) -> Option<Harm> {
    let mut random = world.random("flip", u64::from(pid));
    let struck = if world.scenario.wrong_update {
        member.incarnation == Incarnation(0)
            && u64::from(member.worker.0) == world.scenario.seed % u64::from(world.scenario.ranks)
    } else {
        world.scenario.has(Fault::FlipBit) && random.chance(0.15)
    };
    if !struck || world.is_calm() {
        return None;
    }
    // Not a gradient: where its lane is not audited in that very step, nobody can see it, and the line is wrong.
    let places: &[Place] = if world.scenario.wrong_update {
        &[Place::Update]
    } else {
        &[Place::Master, Place::FirstMoment, Place::SecondMoment]
    };
    Some(Harm {
        step: StepIndex(random.between(0, world.scenario.steps)),
        place: random.pick(places),
        shard: random.between(0, 5) as usize,
        element: random.between(0, 63) as usize,
        bit: random.between(12, 30) as u8,
        stuck: false,
    })
}

/// A line comes to a controller: the moment for its closed loop to die, before it has seen the line, in the midst of it, or after.
pub fn strike_loop(world: &Arc<World>, life: &Arc<Life>) {
    let how = |random: &mut Random| (random.pick(&IN_LOOPS), random.between(0, LOOP_MOVES_MAX));
    let Some((members, moves)) = world.draw_loop_death(how) else {
        return;
    };
    let (world, ends) = (Arc::clone(world), Arc::clone(life));
    // Said behind the line, so that the line is under way when the moves are counted.
    life.say(move |_| {
        tokio::spawn(async move {
            let mut left = moves;
            poll_fn(|context| {
                let Some(fewer) = left.checked_sub(1) else {
                    return Poll::Ready(());
                };
                left = fewer;
                // Behind all that can move now.
                context.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
            ends.end_loop(&world, members);
        });
    });
}

fn strike_controller(world: &Arc<World>, kind: Fault, random: &mut Random) {
    let Some(life) = world.life() else { return };
    let timeout_ms = world.scenario.timeout_ms;
    match kind {
        Fault::KillController => {
            if !world.scenario.persons {
                world.history.note("fault: the controller is killed");
                return life.kill();
            }
            // What somebody has just asked for may be granted, and even written, or is lost with it.
            persons::ask(world, random);
            let (world, after) = (Arc::clone(world), random.between(0, 40));
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(after)).await;
                world.history.note("fault: the controller is killed");
                life.kill();
            });
        }
        Fault::StandStill => life.stand_still(world, nap(timeout_ms, random)),
        Fault::TakeOver => {
            // As a rule because the one that is there stands still; or while it is at work.
            let asleep = random.chance(0.75).then(|| nap(timeout_ms, random));
            let after = asleep.map_or(0, |time| random.between(0, time.as_millis() as u64));
            if let Some(time) = asleep {
                life.stand_still(world, time);
            }
            world
                .history
                .note(&format!("fault: another controller takes over in {after} ms"));
            world.want_another(Duration::from_millis(after));
        }
        Fault::Stop => {
            world.history.note("fault: a signal asks for the end");
            life.stop();
        }
        _ => {}
    }
}
