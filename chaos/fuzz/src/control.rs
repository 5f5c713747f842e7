//! What travels within the control plane.

/// Messages between controller and ranks, and the lane statistics that some carry.
pub mod message {
    use tarazed_domain::{Generation, Incarnation, LaneRange, OptimizerShardIndex, Rank, StepsCompleted, WorkerId};
    use tarazed_protocol::data::stats::LaneStats;
    use tarazed_protocol::message::{
        BarrierOutcome, BeginPlan, FromRank, Member, RestoreFrom, RosterEntry, ShardHolder, ShardHolding, ShardOrigin,
        StateReport, StepLine, ToRank,
    };

    const DOMAINS: usize = 3;

    /// A body of either direction, or statistics: by the first byte.
    ///
    /// # Panics
    /// If a message is not written again as one that reads the same.
    pub fn run(data: &[u8]) {
        let Some((way, body)) = data.split_first() else {
            return;
        };
        match way % 3 {
            0 => {
                if let Ok(message) = ToRank::decode(body) {
                    let written = message.encode().expect("what was read can be written");
                    let again = ToRank::decode(&written).expect("what was written can be read");
                    assert_eq!(again.encode().ok(), Some(written));
                }
            }
            1 => {
                if let Ok(message) = FromRank::decode(body) {
                    let written = message.encode().expect("what was read can be written");
                    let again = FromRank::decode(&written).expect("what was written can be read");
                    assert_eq!(again.encode().ok(), Some(written));
                    if let FromRank::Line { line, .. } = &message {
                        let _mostly_refused = LaneStats::decode(&line.stats, DOMAINS);
                    }
                }
            }
            _ => {
                if let Ok(stats) = LaneStats::decode(body, DOMAINS) {
                    assert_eq!(stats.encode(), body, "one value, one spelling");
                }
            }
        }
    }

    fn outcome() -> BarrierOutcome {
        BarrierOutcome {
            step: StepsCompleted(4),
            grad_norm: 1.5,
            loss: 2.5,
            stats: LaneStats::new(DOMAINS).encode(),
            pause: false,
            checkpoint: true,
        }
    }

    fn line() -> StepLine {
        StepLine {
            step: StepsCompleted(4),
            data: [1; 32],
            loss: 2.5,
            grad_norm: 1.5,
            state: [2; 32],
            learning_rate: 1e-3,
            mixture: vec![0.5, 0.5],
            stats: LaneStats::new(DOMAINS).encode(),
        }
    }

    fn plan() -> BeginPlan {
        let holder = |rank, origin| ShardHolder {
            rank: Rank(rank),
            origin,
        };
        BeginPlan {
            generation: Generation(3),
            roster: vec![RosterEntry {
                member: Member {
                    worker: WorkerId(0),
                    incarnation: Incarnation(1),
                },
                address: "unix:/tmp/a-socket".into(),
                lanes: LaneRange { start: 0, end: 8 },
            }],
            base: StepsCompleted(4),
            outcome: Some(outcome()),
            shards: vec![
                vec![holder(0, ShardOrigin::Keep), holder(1, ShardOrigin::CopyFrom(Rank(0)))],
                vec![holder(0, ShardOrigin::Restore)],
            ],
            restore: Some(RestoreFrom {
                step: StepsCompleted(4),
                manifest_key: "manifests/a-key".into(),
                length: 9,
                blake3: [3; 32],
            }),
            acknowledged: StepsCompleted(3),
            decisions: Vec::new(),
            decided: StepsCompleted(3),
            last_step: StepsCompleted(9),
            checkpoint_at_base: false,
        }
    }

    /// One message of each kind.
    ///
    /// # Panics
    /// If one cannot be written.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let (generation, step) = (Generation(3), StepsCompleted(4));
        let to = [
            ToRank::Fence { generation },
            ToRank::Begin(Box::new(plan())),
            ToRank::Pause {
                generation,
                checkpoint: true,
            },
            ToRank::Acknowledge {
                through: step,
                decisions: Vec::new(),
            },
            ToRank::Shutdown,
        ];
        let report = StateReport {
            shards: vec![ShardHolding {
                shard: OptimizerShardIndex(1),
                state: step,
                reduced: Some(step),
            }],
            passed: Some(outcome()),
            lines: vec![line()],
            waits_for: Some(Rank(1)),
        };
        let from = [
            FromRank::Ready {
                address: "unix:/tmp/a-socket".into(),
                pid: 7,
            },
            FromRank::State { generation, report },
            FromRank::Line {
                generation,
                line: line(),
                spent_us: vec![1, 2],
            },
            FromRank::Failed {
                generation,
                cause: "a peer is gone".into(),
                suspects: vec![Rank(1)],
                corruption: false,
            },
            FromRank::Heartbeat {
                generation,
                step,
                progress: 5,
                phase: "computing".into(),
            },
            FromRank::ShardSaved {
                step,
                shard: OptimizerShardIndex(1),
                key: "shards/a-key".into(),
                length: 9,
                blake3: [3; 32],
            },
        ];
        let to = to.iter().map(|message| (0, message.encode().expect("a message")));
        let from = from.iter().map(|message| (1, message.encode().expect("a message")));
        let stats = std::iter::once((2, LaneStats::new(DOMAINS).encode()));
        to.chain(from)
            .chain(stats)
            .map(|(way, body)| [vec![way], body].concat())
            .collect()
    }
}

/// The request line of the control socket.
pub mod status_request {
    use tarazed_actors::controller::status::Request;

    /// One line: without the token it is a stranger's, whatever it says.
    ///
    /// # Panics
    /// If a line without the token is believed.
    pub fn run(data: &[u8]) {
        const TOKEN: &str = "the-token-of-this-run";
        let line = String::from_utf8_lossy(data);
        if !line.contains('\\') && !line.contains(TOKEN) {
            assert_eq!(Request::read(&line, TOKEN), Request::Stranger);
        }
        let _either = Request::read(&line, TOKEN);
    }

    /// Requests as the program writes them.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let request = |token: &str, command: &str| {
            serde_json::json!({"token": token, "command": command})
                .to_string()
                .into_bytes()
        };
        vec![
            request("the-token-of-this-run", "status"),
            request("the-token-of-this-run", "other"),
            request("x", "status"),
        ]
    }
}
