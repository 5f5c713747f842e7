//! Stragglers: a rank that is slow for long gets fewer lanes, and is never replaced for it (DESIGN.md section 6).
//!
//! Lanes are fixed and who hosts them decides no number, so this may look at clocks. Each rank says how long a lane takes
//! it; a world is uneven where other lanes would make its steps much shorter. One that stays uneven for a whole timeout
//! pauses, and the next generation has lanes by speed. When the slow one has recovered, the same rule gives them back.

use super::{Coordinator, Effect, Incident, Phase};
use crate::message::Member;
use tarazed_domain::Rank;

/// A world is uneven where lanes by speed would bring the time of a step below this share (percent) of what it is.
const UNEVEN_PERCENT: u64 = 75;
/// Speed of a rank that is as fast as the rest.
const SPEED_FULL: u32 = 100;
/// No rank counts as slower than this: it computes one lane in any case.
const SPEED_MIN: u32 = 5;
/// Looks in the time of one failure timeout.
const LOOKS_PER_TIMEOUT: u64 = 8;

impl Coordinator {
    /// Relative speeds for the plan of a generation.
    pub(super) fn speeds(&self, members: &[Member]) -> Vec<u32> {
        if self.slow.is_empty() {
            return vec![SPEED_FULL; members.len()];
        }
        let speed = |member| self.slow.get(member).copied().unwrap_or(SPEED_FULL);
        members.iter().map(speed).collect()
    }

    /// A tick of a generation that runs.
    pub(super) fn watch_pace(&mut self, now_ms: u64) -> Vec<Effect> {
        let timeout_ms = self.options.timeouts.failure_ms;
        let Phase::Running { pause_sent: false, .. } = self.phase else {
            return Vec::new();
        };
        if now_ms < self.looked_at_pace_ms + timeout_ms / LOOKS_PER_TIMEOUT {
            return Vec::new();
        }
        self.looked_at_pace_ms = now_ms;
        let Some(paces) = self.paces() else {
            return Vec::new();
        };
        let usual_us = median(&paces);
        let speeds: Vec<u32> = paces.iter().map(|&pace| speed(pace, usual_us)).collect();
        let by_speed = self.options.lanes.assign(&speeds);
        let step_us = |lanes: &mut dyn Iterator<Item = usize>| {
            let times = paces.iter().zip(lanes).map(|(pace, lanes)| pace * lanes as u64);
            times.max().unwrap_or(0)
        };
        let is_us = step_us(&mut self.roster.iter().map(|(_, lanes)| lanes.len()));
        let could_be_us = step_us(&mut by_speed.iter().map(|lanes| lanes.len()));
        if could_be_us * 100 >= is_us * UNEVEN_PERCENT {
            self.uneven_since_ms = None;
            return Vec::new();
        }
        if now_ms < *self.uneven_since_ms.get_or_insert(now_ms) + timeout_ms {
            return Vec::new();
        }
        self.uneven_since_ms = None;
        let members = self.roster.iter().map(|&(member, _)| member);
        self.slow = members.zip(speeds).filter(|&(_, speed)| speed < SPEED_FULL).collect();
        let mut effects: Vec<Effect> = self
            .slow
            .keys()
            .filter_map(|&member| {
                let lane_us = paces[self.rank_of(member).map(Rank::index)?];
                Some(Effect::Note(Incident::Straggler {
                    member,
                    lane_us,
                    usual_us,
                }))
            })
            .collect();
        effects.extend(self.ask_to_pause(false));
        effects
    }

    /// Every rank's time for a lane; none while one of them is not known.
    fn paces(&self) -> Option<Vec<u64>> {
        let pace = |&(member, _): &(Member, _)| {
            let worker = self.workers.get(member.worker)?;
            (worker.lane_us > 0).then_some(worker.lane_us)
        };
        self.roster.iter().map(pace).collect()
    }
}

/// Relative to the usual, in steps of five percent: small differences are noise.
fn speed(lane_us: u64, usual_us: u64) -> u32 {
    let percent = (u64::from(SPEED_FULL) * usual_us / lane_us.max(1)) as u32;
    (percent / 5 * 5).clamp(SPEED_MIN, SPEED_FULL)
}

/// The lower one of the two in the middle.
fn median(paces: &[u64]) -> u64 {
    let mut sorted = paces.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(0)
}
