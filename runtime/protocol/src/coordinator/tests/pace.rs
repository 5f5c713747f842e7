//! Stragglers.

use super::*;

impl Cluster {
    /// Everybody says how long a lane takes it, for some time.
    fn paced(&mut self, for_ms: u64, lane_us: impl Fn(u32) -> u64) {
        let until = self.now_ms + for_ms;
        while self.now_ms < until {
            for (member, _) in self.coordinator.roster().to_vec() {
                let event = Event::Heartbeat {
                    member,
                    generation: self.coordinator.generation(),
                    step: StepsCompleted(0),
                    progress: self.now_ms,
                    activity: String::new(),
                    lane_us: lane_us(member.worker.0),
                    stored_bytes: 0,
                };
                self.event(event);
            }
            self.now_ms += 500;
            self.event(Event::Tick);
            self.settle(2);
        }
    }

    fn lanes(&self) -> Vec<usize> {
        let mut lanes: Vec<(u32, usize)> = self
            .coordinator
            .roster()
            .iter()
            .map(|(member, lanes)| (member.worker.0, lanes.len()))
            .collect();
        lanes.sort_unstable();
        lanes.into_iter().map(|(_, lanes)| lanes).collect()
    }
}

/// A straggler gets fewer lanes once it has been slow for a while, keeps its place, and gets them back.
#[test]
fn lanes_move_away_from_a_slow_rank_and_back() {
    let mut cluster = Cluster::new();
    cluster.coordinator.options.last_step = StepsCompleted(1_000_000);
    cluster.settle(12);
    let lives = cluster.started.clone();
    cluster.paced(30_000, |worker| 1_000 + u64::from(worker) * 50);
    assert_eq!(cluster.lanes(), [2, 2, 2, 2], "small differences are noise");
    cluster.paced(5_000, |worker| if worker == 1 { 4_000 } else { 1_000 });
    assert_eq!(cluster.lanes(), [2, 2, 2, 2], "not slow for long yet");
    cluster.paced(20_000, |worker| if worker == 1 { 4_000 } else { 1_000 });
    assert_eq!(cluster.lanes()[1], 1, "{:?}", cluster.lanes());
    assert_eq!(cluster.lanes().iter().sum::<usize>(), 8);
    cluster.paced(30_000, |_| 1_000);
    assert_eq!(cluster.lanes(), [2, 2, 2, 2], "it has recovered");
    assert_eq!(cluster.started, lives, "nobody was replaced");
}
