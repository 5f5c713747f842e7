//! How long a membership round takes: from the last word that makes a new generation due, to the moment at which every
//! rank has its plan. Fence to all, an answer of each, the agreement, the plan to all: over the real control link (Unix
//! sockets, handshakes, credits) and the real membership machine; the ranks are tasks that answer at once.
//!
//! ```text
//! cargo run --release -p tarazed-actors --example membership_round -- [ROUNDS] [RANKS]…
//! ```

use std::collections::BTreeSet;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tarazed_actors::link::{Bind, Hub, HubConfig, HubEvent, PeerId, Uplink, UplinkConfig, UplinkEvent};
use tarazed_actors::link::{connect_uplink, start_hub};
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Generation, Incarnation, LaneTree, OptimizerShardIndex, StepsCompleted, WorkerId};
use tarazed_protocol::coordinator::{Coordinator, Effect, Event, Options};
use tarazed_protocol::message::{BeginPlan, FromRank, Member, ShardHolding, StateReport, ToRank};
use tokio::sync::mpsc;

type Failure = Box<dyn Error + Send + Sync>;
type Words = mpsc::UnboundedReceiver<(Member, FromRank)>;

const TOKEN: [u8; 32] = [7; 32];
const FAILURE: Duration = Duration::from_secs(10);
/// Warm-up rounds.
const COLD_ROUNDS: usize = 3;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<u32>());
    let rounds = numbers.next().transpose()?.unwrap_or(40) as usize;
    let mut sizes: Vec<u32> = numbers.collect::<Result<_, _>>()?;
    if sizes.is_empty() {
        sizes = vec![8, 32, 64, 128, 256];
    }
    println!("membership round, {rounds} rounds each: p50, p99 and worst in milliseconds");
    for ranks in sizes {
        let mut times_ms = measure(ranks, rounds).await?;
        times_ms.sort_by(f64::total_cmp);
        let at = |share: usize| times_ms[(times_ms.len() * share / 100).min(times_ms.len() - 1)];
        println!("{ranks:>4} ranks: {:>7.2} {:>7.2} {:>7.2}", at(50), at(99), at(100));
    }
    Ok(())
}

/// The controller's side: machine, hub, and what the ranks said.
struct Bench {
    machine: Coordinator,
    hub: Hub,
    words: Words,
    began: Instant,
    /// Kept open.
    _uplinks: Vec<Arc<Uplink>>,
    /// Generation whose plan a rank says it has.
    has_plan: mpsc::UnboundedReceiver<(Member, Generation)>,
}

async fn measure(ranks: u32, rounds: usize) -> Result<Vec<f64>, Failure> {
    let folder = tempfile::tempdir()?;
    let mut bench = start(ranks, folder.path()).await?;
    let mut times_ms = Vec::new();
    for round in 0..rounds + COLD_ROUNDS {
        // All but one stand at the boundary; the clock starts with the last one.
        let roster: Vec<Member> = bench.machine.roster().iter().map(|&(member, _)| member).collect();
        let generation = bench.machine.generation();
        let mut effects = Vec::new();
        let mut clock = Instant::now();
        for member in roster {
            clock = Instant::now();
            effects = bench.tell(Event::Paused {
                member,
                generation,
                step: StepsCompleted(1),
                saving: false,
            });
        }
        bench.act(effects).await?;
        bench.until_all_have_the_plan(ranks).await?;
        if round >= COLD_ROUNDS {
            times_ms.push(clock.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(times_ms)
}

async fn start(ranks: u32, folder: &Path) -> Result<Bench, Failure> {
    let (heard, words) = mpsc::unbounded_channel();
    let config = HubConfig {
        token: TOKEN,
        bind: Bind::near(folder, "link.sock"),
        failure: FAILURE,
        supervisor: None,
    };
    let hub = start_hub(config, move |event| {
        if let HubEvent::Message(peer, body) = event
            && let Ok(message) = FromRank::decode(&body.into_vec())
        {
            // An error means that the measurement is over.
            let _ = heard.send((member_of(peer), message));
        }
    })
    .await?;
    let (planned, has_plan) = mpsc::unbounded_channel();
    let mut uplinks = Vec::new();
    for worker in 0..ranks {
        uplinks.push(rank(worker, hub.address(), planned.clone()).await?);
    }
    let options = Options {
        ranks,
        spares: 0,
        lanes: LaneTree::new(ranks * 2),
        shard_count: ranks as usize,
        replicas: 2,
        timeouts: Timeouts::derive(10_000),
        restarts_max: 5,
        restart_backoff_ms: 100,
        last_step: StepsCompleted(1_000_000),
        hosts: Vec::new(),
    };
    let mut bench = Bench {
        machine: Coordinator::new(options, Generation(1), StepsCompleted(0)),
        hub,
        words,
        began: Instant::now(),
        _uplinks: uplinks,
        has_plan,
    };
    // A rank's end is open a moment before the hub's.
    while bench.hub.peers().len() < ranks as usize {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(bench.machine.start(0, &[]));
    let mut effects = Vec::new();
    for worker in 0..ranks {
        effects = bench.tell(Event::Ready {
            member: member(worker),
            address: format!("unix:/tmp/tarazed-0123456789abcdef/rank-{worker}.sock"),
            pid: worker + 1,
            newest: Generation(0),
        });
    }
    bench.act(effects).await?;
    bench.until_all_have_the_plan(ranks).await?;
    Ok(bench)
}

impl Bench {
    fn tell(&mut self, event: Event) -> Vec<Effect> {
        let now_ms = self.began.elapsed().as_millis() as u64;
        self.machine.on_event(now_ms, &event)
    }

    /// Carries effects out until the next plan has gone to everybody.
    async fn act(&mut self, effects: Vec<Effect>) -> Result<(), Failure> {
        let mut queue: Vec<Effect> = effects;
        loop {
            let mut next = Vec::new();
            for effect in queue {
                match effect {
                    Effect::Send { members, message } => {
                        let body = message.encode().map_err(text)?;
                        for member in members {
                            self.hub.send(peer_of(member), body.clone())?;
                        }
                    }
                    Effect::Begin { plan } => {
                        let body = ToRank::Begin(Box::new(BeginPlan::clone(&plan)))
                            .encode()
                            .map_err(text)?;
                        for entry in &plan.roster {
                            self.hub.send(peer_of(entry.member), body.clone())?;
                        }
                        return Ok(());
                    }
                    Effect::FindCheckpoint { .. } => next.extend(self.tell(Event::Located { checkpoint: None })),
                    Effect::Halt { diagnosis, .. } => return Err(diagnosis.into()),
                    _ => {}
                }
            }
            queue = next;
            while queue.is_empty() {
                let word = self.words.recv().await.ok_or("nobody speaks any more")?;
                if let (member, FromRank::State { generation, report }) = word {
                    queue = self.tell(Event::State {
                        member,
                        generation,
                        report,
                    });
                }
            }
        }
    }

    async fn until_all_have_the_plan(&mut self, ranks: u32) -> Result<(), Failure> {
        let mut have = BTreeSet::new();
        while have.len() < ranks as usize {
            let (member, generation) = self.has_plan.recv().await.ok_or("nobody is there any more")?;
            if generation == self.machine.generation() {
                have.insert(member);
            }
        }
        Ok(())
    }
}

/// A rank that answers at once: at a fence with the shards of its last plan.
async fn rank(
    worker: u32,
    address: String,
    planned: mpsc::UnboundedSender<(Member, Generation)>,
) -> Result<Arc<Uplink>, Failure> {
    let (said, mut hears) = mpsc::unbounded_channel();
    let config = UplinkConfig {
        address,
        token: TOKEN,
        peer: peer_of(member(worker)),
        connect: FAILURE,
        failure: FAILURE,
        supervisor: None,
    };
    let uplink = connect_uplink(config, move |event| {
        if let UplinkEvent::Message(body) = event {
            // An error means that the measurement is over.
            let _ = said.send(body.into_vec());
        }
    })
    .await?;
    let uplink = Arc::new(uplink);
    let answers = Arc::clone(&uplink);
    tokio::spawn(async move {
        let me = member(worker);
        let mut shards = Vec::new();
        while let Some(bytes) = hears.recv().await {
            match ToRank::decode(&bytes) {
                Ok(ToRank::Fence { generation }) => {
                    let report = StateReport {
                        shards: shards.clone(),
                        ..StateReport::default()
                    };
                    let Ok(body) = (FromRank::State { generation, report }).encode() else {
                        return;
                    };
                    if answers.send(body).is_err() {
                        return;
                    }
                }
                Ok(ToRank::Begin(plan)) => {
                    shards = held(&plan, me);
                    if planned.send((me, plan.generation)).is_err() {
                        return;
                    }
                }
                _ => {}
            }
        }
    });
    Ok(uplink)
}

fn held(plan: &BeginPlan, me: Member) -> Vec<ShardHolding> {
    let rank = plan.roster.iter().position(|entry| entry.member == me);
    let holds = |holders: &[tarazed_protocol::placement::ShardHolder]| {
        holders.iter().any(|holder| Some(holder.rank.index()) == rank)
    };
    let shards = plan.shards.iter().zip(0..).filter(|(holders, _)| holds(holders));
    shards
        .map(|(_, shard)| ShardHolding {
            shard: OptimizerShardIndex(shard),
            state: plan.base,
            reduced: None,
        })
        .collect()
}

fn text(error: impl std::fmt::Display) -> Failure {
    error.to_string().into()
}

const fn member(worker: u32) -> Member {
    Member {
        worker: WorkerId(worker),
        incarnation: Incarnation(0),
    }
}

const fn peer_of(member: Member) -> PeerId {
    PeerId {
        worker: member.worker,
        incarnation: member.incarnation,
    }
}

const fn member_of(peer: PeerId) -> Member {
    Member {
        worker: peer.worker,
        incarnation: peer.incarnation,
    }
}
