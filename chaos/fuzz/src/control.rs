//! What travels within the control plane.

/// Messages between controller and ranks, those between controller and nodes, and the lane statistics that some carry.
pub mod message {
    use tarazed_domain::{
        Generation, Incarnation, LaneIndex, LaneRange, OptimizerShardIndex, Rank, StepIndex, StepsCompleted, WorkerId,
    };
    use tarazed_protocol::data::decision::{Decision, DecisionAuthor, DecisionId, DecisionKind};
    use tarazed_protocol::data::stats::LaneStats;
    use tarazed_protocol::data::trajectory::Moments;
    use tarazed_protocol::message::{
        Addresses, BarrierOutcome, BeginPlan, Claim, Dispute, DisputedItem, FromRank, Member, RestoreFrom, RosterEntry,
        ShardHolding, StateReport, StepLine, ToRank,
    };
    use tarazed_protocol::nodes::desk::NodeDesk;
    use tarazed_protocol::nodes::roster::{NodeFacts, NodeRoster};
    use tarazed_protocol::nodes::{FromNode, HeldLife, LifeState, ToNode, WantedLife};
    use tarazed_protocol::placement::{Placement, ShardHolder, ShardOrigin};
    use tarazed_protocol::rollback::Rollback;

    const DOMAINS: usize = 3;

    /// A body of either direction, or statistics: by the first byte.
    ///
    /// # Panics
    /// If a message is not written again as one that reads the same.
    pub fn run(data: &[u8]) {
        let Some((way, body)) = data.split_first() else {
            return;
        };
        match way % 5 {
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
            2 => {
                if let Ok(message) = ToNode::decode(body) {
                    let written = message.encode().expect("what was read can be written");
                    assert_eq!(ToNode::decode(&written).as_ref(), Ok(&message));
                    if let ToNode::Want(wanted) = message {
                        let (mut desk, _) = NodeDesk::new(&[]);
                        let _orders = (desk.on_want(&wanted), desk.on_want(&wanted));
                    }
                }
            }
            3 => {
                if let Ok(message) = FromNode::decode(body) {
                    let written = message.encode().expect("what was read can be written");
                    assert_eq!(FromNode::decode(&written).as_ref(), Ok(&message));
                    let _reports = roster().on_message(0, message);
                }
            }
            _ => {
                if let Ok(stats) = LaneStats::decode(body, DOMAINS) {
                    assert_eq!(stats.encode(), body, "one value, one spelling");
                }
            }
        }
    }

    const PROGRAM: [u8; 32] = [7; 32];

    const fn member() -> Member {
        Member {
            worker: WorkerId(1),
            incarnation: Incarnation(2),
        }
    }

    /// One node, of which a life is wanted.
    fn roster() -> NodeRoster {
        let facts = NodeFacts {
            name: "a".to_owned(),
            workers: 0..4,
        };
        let mut roster = NodeRoster::new(PROGRAM, 1_000, vec![facts]);
        let _waits = roster.start(member(), 0, false);
        roster
    }

    fn to_nodes() -> Vec<ToNode> {
        let wanted = WantedLife {
            member: member(),
            after_ms: 100,
            adopt: false,
            kill: Some("no heartbeat".to_owned()),
        };
        vec![
            ToNode::Want(vec![wanted]),
            ToNode::Refused("another program".to_owned()),
            ToNode::End { code: 34 },
        ]
    }

    fn from_nodes() -> Vec<FromNode> {
        let states = [
            LifeState::Starting,
            LifeState::Running { pid: 9 },
            LifeState::Ending { pid: 9, killed: None },
            LifeState::Over {
                cause: "signal 9".to_owned(),
                orderly: false,
            },
            LifeState::NotStarted {
                cause: "cancelled".to_owned(),
            },
        ];
        let lives: Vec<HeldLife> = states
            .into_iter()
            .map(|state| HeldLife {
                member: member(),
                state,
            })
            .collect();
        vec![
            FromNode::Hello {
                binary: PROGRAM,
                host: "host".to_owned(),
                lives: lives.clone(),
            },
            FromNode::Have(lives),
        ]
    }

    fn outcome() -> BarrierOutcome {
        BarrierOutcome {
            step: StepsCompleted(4),
            grad_norm: 1.5,
            loss: 2.5,
            stats: LaneStats::new(DOMAINS).encode(),
            skipped: false,
            pause: false,
            checkpoint: true,
            busy: true,
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
            skipped: false,
            weights: vec![Moments {
                count: 2,
                sum: 0.5,
                square_sum: 0.25,
            }],
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
                lanes: LaneRange { start: 0, end: 8 },
            }],
            addresses: Addresses::from_iter(["unix:/tmp/a-socket"]),
            base: StepsCompleted(4),
            outcome: Some(outcome()),
            shards: Placement::new(
                2,
                vec![
                    holder(0, ShardOrigin::Keep),
                    holder(1, ShardOrigin::CopyFrom(Rank(0))),
                    holder(0, ShardOrigin::Restore),
                    holder(1, ShardOrigin::Initialise),
                ],
            ),
            restore: Some(RestoreFrom {
                step: StepsCompleted(4),
                manifest_key: "manifests/a-key".into(),
                length: 9,
                blake3: [3; 32],
            }),
            acknowledged: StepsCompleted(3),
            decisions: Vec::new(),
            decided: StepsCompleted(3),
            rollbacks: [Rollback {
                at: StepIndex(9),
                to: StepsCompleted(4),
            }]
            .into_iter()
            .collect(),
            last_step: StepsCompleted(9),
            checkpoint_at_base: false,
            checkpointed: StepsCompleted(2),
            state: None,
            disputed: Some((StepsCompleted(5), DisputedItem::Lane(LaneIndex(2)))),
        }
    }

    fn decision() -> Decision {
        Decision {
            id: DecisionId(1),
            line: StepsCompleted(3),
            effective: StepIndex(9),
            kind: DecisionKind::Mixture {
                weights: vec![0.75, 0.25],
            },
            by: DecisionAuthor::Person("a person".into()),
            reason: "why".into(),
        }
    }

    fn to_ranks() -> Vec<ToRank> {
        let generation = Generation(3);
        vec![
            ToRank::Fence { generation },
            ToRank::Begin(Box::new(plan())),
            ToRank::Pause {
                generation,
                checkpoint: true,
            },
            ToRank::Acknowledge {
                through: StepsCompleted(4),
                decisions: vec![decision()],
            },
            ToRank::Shutdown,
        ]
    }

    fn dispute() -> Dispute {
        let claim = |rank| Claim {
            rank: Rank(rank),
            digest: [rank as u8; 16],
        };
        Dispute {
            step: StepsCompleted(4),
            item: DisputedItem::Shard(OptimizerShardIndex(1)),
            claims: vec![claim(0), claim(1)],
        }
    }

    fn of_the_run() -> Vec<FromRank> {
        let (generation, step) = (Generation(3), StepsCompleted(4));
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
        vec![
            FromRank::Ready {
                address: "unix:/tmp/a-socket".into(),
                pid: 7,
                newest: generation,
            },
            FromRank::State { generation, report },
            FromRank::Running { generation, base: step },
            FromRank::Line {
                generation,
                line: line(),
                spent_us: vec![1, 2],
            },
            FromRank::Heartbeat {
                generation,
                step,
                progress: 5,
                phase: "computing".into(),
                lane_us: 900,
                stored_bytes: 0,
            },
            FromRank::Paused {
                generation,
                step,
                saving: true,
            },
            FromRank::Saving { generation, step },
        ]
    }

    fn of_failures_and_shards() -> Vec<FromRank> {
        let (generation, step, shard) = (Generation(3), StepsCompleted(4), OptimizerShardIndex(1));
        vec![
            FromRank::Failed {
                generation,
                cause: "a peer is gone".into(),
                suspects: vec![Rank(1)],
                fatal: false,
                dispute: Some(dispute()),
            },
            FromRank::Failed {
                generation,
                cause: "a checkpoint is bad".into(),
                suspects: vec![],
                fatal: false,
                dispute: Some(Dispute {
                    step,
                    item: DisputedItem::Checkpoint,
                    claims: vec![],
                }),
            },
            FromRank::Settled {
                generation,
                step,
                digest: [4; 16],
            },
            FromRank::ShardSaved {
                step,
                shard,
                key: "shards/a-key".into(),
                length: 9,
                blake3: [3; 32],
            },
            FromRank::ShardLost {
                generation,
                step,
                shard,
                cause: "the store is full".into(),
                full: true,
            },
        ]
    }

    /// One message of each kind.
    ///
    /// # Panics
    /// If one cannot be written.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let to = to_ranks();
        let to = to.iter().map(|message| (0, message.encode().expect("a message")));
        let from = [of_the_run(), of_failures_and_shards()].concat();
        let from = from.iter().map(|message| (1, message.encode().expect("a message")));
        let (to_nodes, from_nodes) = (to_nodes(), from_nodes());
        let to_nodes = to_nodes.iter().map(|message| (2, message.encode().expect("a message")));
        let from_nodes = from_nodes
            .iter()
            .map(|message| (3, message.encode().expect("a message")));
        let stats = std::iter::once((4, LaneStats::new(DOMAINS).encode()));
        to.chain(from)
            .chain(to_nodes)
            .chain(from_nodes)
            .chain(stats)
            .map(|(way, body)| [vec![way], body].concat())
            .collect()
    }
}

/// The request line of the control socket.
#[cfg(feature = "all")]
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
        let request = |token: &str, command: &str, ranks: i64| {
            serde_json::json!({"token": token, "command": command, "ranks": ranks})
                .to_string()
                .into_bytes()
        };
        vec![
            request("the-token-of-this-run", "status", 0),
            request("the-token-of-this-run", "resize", 4),
            request("the-token-of-this-run", "resize", -1),
            request("the-token-of-this-run", "other", 0),
            request("x", "status", 0),
        ]
    }
}
