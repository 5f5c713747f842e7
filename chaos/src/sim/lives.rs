//! One controller after another, as a scheduler starts them, and now and then one beside another, put in charge by a person.

use super::controller::{LifeEnd, Start, live};
use super::scenario::Fault;
use super::world::World;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tarazed_actors::controller::DEPOSED;
use tarazed_actors::run_folder::Occupied;

/// Controllers at the same time: more are not started, whatever the faults want.
const CONTROLLERS_MAX: usize = 4;

/// Until the run is done and every controller has ended; `lives` counts them.
pub async fn live_on(world: &Arc<World>, lives: &mut u64) {
    let mut random = world.random("lives", 0);
    let mut living = FuturesUnordered::new();
    let mut next = |lives: &mut u64, occupied: Occupied| {
        *lives += 1;
        let resizes = *lives > 1 && world.scenario.has(Fault::Stop);
        let ranks = if resizes {
            random.between(1, u64::from(world.scenario.lanes)) as u32
        } else {
            world.scenario.ranks
        };
        let waits = *lives > 1 && occupied == Occupied::Refuse;
        let start = Start {
            number: *lives,
            ranks,
            occupied,
            after: Duration::from_millis(if waits { random.between(1, 400) } else { 0 }),
        };
        live(world, start)
    };
    living.push(next(lives, Occupied::Refuse));
    let mut done = false;
    while !living.is_empty() {
        tokio::select! {
            biased;
            Some((number, end)) = living.next() => match end {
                LifeEnd::Code(0, _) if !world.reference.is_over() => {
                    world.fail(&format!("controller {number} says that the run is over, and it is not"));
                }
                LifeEnd::Code(0, _) if number == *lives => done = true,
                // One that has a successor, and may have finished just before it was put out of charge.
                LifeEnd::Code(0 | 33 | 34, _) | LifeEnd::Killed if number < *lives => {
                    world.deposed.fetch_add(1, Ordering::Relaxed);
                }
                LifeEnd::Code(33, diagnosis) if diagnosis.starts_with(DEPOSED) => {
                    world.fail(&format!("controller {number} has no successor, and ends: {diagnosis}"));
                }
                LifeEnd::Code(33 | 34, _) | LifeEnd::Killed => {
                    // One that ended before it took the folder leaves it to the one before, which may stand still.
                    let is_held = world.lives().iter().any(|life| life.is_alive() && life.holds());
                    let occupied = if is_held { Occupied::TakeOver } else { Occupied::Refuse };
                    living.push(next(lives, occupied));
                }
                LifeEnd::Code(code, diagnosis) => {
                    world.fail(&format!("controller {number} ended with {code}: {diagnosis}"));
                }
            },
            () = world.until_another_is_wanted(), if !done => {
                // The newest may be about to be started, or to take the folder: the numbers are in the order of charge.
                let newest = world.life().filter(|life| life.number == *lives);
                let holds = newest.is_some_and(|life| life.is_alive() && life.holds());
                if holds && living.len() < CONTROLLERS_MAX {
                    living.push(next(lives, Occupied::TakeOver));
                }
            }
        }
        if world.failure().is_some() {
            return;
        }
    }
}
