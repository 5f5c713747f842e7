//! What is simulated: the world, the way it protects its state, for how long, and from which seed.

use super::cost::{Cost, RANKS_PER_HOST};
use super::fleet::Layout;
use super::young_daly::Terms;

/// How state is protected.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Protection {
    /// Copies of each optimizer shard on live ranks; with one, each loss means a restore.
    pub replicas: u32,
    /// How slots lie on hosts.
    pub layout: Layout,
    /// The run stands still for a checkpoint (milliseconds).
    pub snapshot_ms: u64,
    /// From there until it may be restored (milliseconds).
    pub upload_ms: u64,
}

/// Everything that a simulation depends on.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Worker slots, a multiple of the ranks on a host.
    pub ranks: u32,
    /// Simulated time (milliseconds).
    pub horizon_ms: u64,
    /// Seed of the failures.
    pub seed: u64,
    /// Published rates are multiplied by this.
    pub rate_factor: f64,
    /// Hosts that stand by.
    pub spare_hosts: u32,
    /// Deaths of one worker without progress between them, as `fault.restarts_max`.
    pub restarts_max: u32,
    /// First wait between its starts, as `fault.restart_backoff_ms`.
    pub restart_backoff_ms: u64,
    /// Protection of the state.
    pub protection: Protection,
    /// What things take.
    pub cost: Cost,
}

/// Spare hosts, one in so many; at least a switch's worth and as many again.
const HOSTS_PER_SPARE: u32 = 50;
const SPARE_HOSTS_MIN: u32 = 64;

impl Setup {
    /// A world with the published rates, two replicas and checkpoints that are written behind the steps.
    #[must_use]
    pub fn new(ranks: u32, horizon_ms: u64, seed: u64) -> Self {
        Self {
            ranks,
            horizon_ms,
            seed,
            rate_factor: 1.0,
            spare_hosts: (ranks / RANKS_PER_HOST / HOSTS_PER_SPARE).max(SPARE_HOSTS_MIN),
            restarts_max: 5,
            restart_backoff_ms: 1_000,
            protection: Protection {
                replicas: 2,
                layout: Layout::Packed,
                snapshot_ms: 500,
                upload_ms: 30_000,
            },
            cost: Cost::default(),
        }
    }

    /// Mean time between failures of the world (milliseconds).
    #[must_use]
    pub fn mtbf_ms(&self) -> f64 {
        Cost::mtbf_ms(self.ranks, self.rate_factor)
    }

    /// The formula's terms for this world, restoring after each failure.
    #[must_use]
    pub fn terms(&self, plan_bytes: f64) -> Terms {
        let Protection {
            replicas,
            snapshot_ms,
            upload_ms,
            ..
        } = self.protection;
        self.cost.terms(
            self.ranks as usize,
            plan_bytes,
            replicas as usize,
            snapshot_ms,
            upload_ms,
        )
    }

    /// Steps between checkpoints: the formula's best interval in whole steps.
    #[must_use]
    pub fn every_steps(&self) -> u64 {
        let best_ms = self.terms(0.0).best_interval_ms(self.mtbf_ms());
        ((best_ms / self.cost.step_ms as f64).round() as u64).max(1)
    }

    /// What makes it no world, if anything.
    ///
    /// # Errors
    /// In words for the one who asked.
    pub fn check(&self) -> Result<(), String> {
        if self.ranks == 0 || !self.ranks.is_multiple_of(RANKS_PER_HOST) {
            return Err(format!(
                "ranks must be a multiple of {RANKS_PER_HOST}, not {}",
                self.ranks
            ));
        }
        if self.ranks.checked_mul(self.cost.lanes_per_rank).is_none() {
            return Err("too many lanes".to_owned());
        }
        if self.protection.replicas == 0 || self.protection.replicas > self.ranks {
            return Err("replicas must be 1 to the number of ranks".to_owned());
        }
        if !(self.rate_factor > 0.0 && self.rate_factor.is_finite()) {
            return Err("the rate's factor must be above zero".to_owned());
        }
        let cost = &self.cost;
        if cost.lanes_per_rank == 0 || cost.step_ms == 0 || cost.barrier_ms > cost.step_ms {
            return Err("a rank has lanes, and a step takes time, its barrier not more".to_owned());
        }
        if self.protection.upload_ms + self.protection.snapshot_ms + cost.step_ms >= cost.timeouts.stop_ms {
            return Err("the last checkpoint would not be there within the time that a stop allows".to_owned());
        }
        Ok(())
    }
}
