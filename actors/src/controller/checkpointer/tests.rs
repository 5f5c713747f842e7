//! What is told when, and what the collecting of old checkpoints holds up.

#![allow(clippy::unwrap_used)]

use super::*;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use tarazed_domain::StepIndex;
use tarazed_protocol::rollback::Rollback;
use tarazed_store::{CheckpointState, ShardPayload};
use tokio::sync::mpsc;

/// Nothing here takes long; a loaded machine may.
const WAIT: Duration = Duration::from_secs(60);

const CONFIG: &str = r#"
[run]
name = "collected"
seed = 1
steps = 100
[model]
layers = 1
hidden = 8
ffn = 8
heads = 2
kv_heads = 1
context = 4
vocabulary = 264
init_std = 0.1
[batch]
lanes = 2
sequences_per_lane = 2
micro_batch_sequences = 1
[optimizer]
learning_rate = 1e-2
block_elements = 64
shards = 2
replicas = 1
[[data.domains]]
name = "one"
path = "one"
language = "en"
weight = 1.0
[cluster]
device = "cpu"
ranks = 1
"#;

/// Stands in for an actor, and passes on what it is told.
struct Listener<M>(PhantomData<fn() -> M>);

impl<M: ractor::Message> Actor for Listener<M> {
    type Msg = M;
    type State = mpsc::UnboundedSender<M>;
    type Arguments = mpsc::UnboundedSender<M>;

    async fn pre_start(&self, _: ActorRef<M>, heard: Self::Arguments) -> Result<Self::State, ActorProcessingErr> {
        Ok(heard)
    }

    async fn handle(&self, _: ActorRef<M>, message: M, heard: &mut Self::State) -> Result<(), ActorProcessingErr> {
        // An error means that the test is over.
        let _ = heard.send(message);
        Ok(())
    }
}

async fn listen<M: ractor::Message>() -> (ActorRef<M>, mpsc::UnboundedReceiver<M>) {
    let (told, heard) = mpsc::unbounded_channel();
    let (listener, _) = Actor::spawn(None, Listener::<M>(PhantomData), told).await.unwrap();
    (listener, heard)
}

/// A checkpointer over a folder, between listeners.
struct Bench {
    folder: tempfile::TempDir,
    store: CheckpointStore,
    fence: Fence,
    facts: ManifestFacts,
    coordinator: ActorRef<CoordinatorMessage>,
    checkpointer: ActorRef<CheckpointerMessage>,
    heard: mpsc::UnboundedReceiver<CoordinatorMessage>,
}

impl Bench {
    async fn new(keep_last: u32, clock: fn() -> u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let trace = folder.path().join("trace.jsonl");
        std::fs::write(&trace, "").unwrap();
        let config = Config::parse(CONFIG, "test", &[], Path::new("")).unwrap();
        let facts = ManifestFacts::of_program(&config, "data", BinaryId::default(), clock);
        let location = folder.path().join("store");
        let writer = WriterId::fresh(Generation(0));
        let store = CheckpointStore::open(&location.to_string_lossy(), writer)
            .await
            .unwrap();
        let fence = store.claim(Generation(1)).await.unwrap();
        let (coordinator, heard) = listen().await;
        let arguments = CheckpointerArguments {
            claimed: Claimed {
                store: store.clone(),
                fence,
            },
            trace,
            facts: facts.clone(),
            retention: Retention::last(keep_last),
            reach_steps: None,
            coordinator: coordinator.clone(),
        };
        let (checkpointer, _) = Actor::spawn(None, Checkpointer, arguments).await.unwrap();
        Self {
            folder,
            store,
            fence,
            facts,
            coordinator,
            checkpointer,
            heard,
        }
    }

    async fn hear(&mut self) -> CoordinatorMessage {
        let heard = tokio::time::timeout(WAIT, self.heard.recv()).await;
        heard.expect("a word in time").expect("the checkpointer")
    }

    /// Stores a checkpoint's shards and has it committed.
    async fn commit(&mut self, step: u64) {
        let (step, generation) = (StepsCompleted(step), self.fence.generation);
        let mut shards = Vec::new();
        for index in 0..self.facts.shards.shard_count() {
            let geometry = ShardGeometry::of(&self.facts.shards, OptimizerShardIndex(index as u32));
            let zeros = || vec![0.0_f32; geometry.elements() as usize];
            let payload = ShardPayload::new([zeros(), zeros(), zeros()]);
            let stored = self.store.put_shard(step, generation, &geometry, payload).await;
            let ObjectRecord { key, length, blake3 } = stored.unwrap().object;
            shards.push(StoredShard {
                key,
                length,
                blake3: blake3.0,
            });
        }
        let head = TraceHead {
            step,
            ..TraceHead::default()
        };
        let commit = CheckpointerMessage::Commit {
            step,
            generation,
            shards,
            head: Box::new(head),
            decisions: Vec::new(),
            rollbacks: Rollbacks::default(),
            back_to: None,
        };
        self.checkpointer.cast(commit).unwrap();
        let told = self.hear().await;
        assert!(matches!(told, CoordinatorMessage::Committed(told) if told == step));
    }

    /// What the next word says of the newest checkpoint: its step and its age.
    async fn newest(&mut self) -> Option<(u64, u64)> {
        let CoordinatorMessage::Newest(newest) = self.hear().await else {
            panic!("another word")
        };
        newest.map(|newest| (newest.step.0, newest.age_ms))
    }

    /// Where a search comes to, and the step of the newest checkpoint that it tells of first.
    async fn locate(&mut self) -> (Option<u64>, Option<u64>) {
        let locate = CheckpointerMessage::Locate {
            below: None,
            rollbacks: Rollbacks::default(),
        };
        self.checkpointer.cast(locate).unwrap();
        let durable = self.newest().await.map(|(step, _)| step);
        let CoordinatorMessage::Located(located) = self.hear().await else {
            panic!("another word")
        };
        let from = located.expect("found").from;
        (durable, from.map(|from| from.step.0))
    }

    /// Ends the run; where its end is heard of.
    async fn close(&self) -> mpsc::UnboundedReceiver<RootMessage> {
        let (root, ended) = listen().await;
        let end = End {
            code: 34,
            diagnosis: String::new(),
        };
        self.checkpointer.cast(CheckpointerMessage::Close(end, root)).unwrap();
        ended
    }

    async fn state_of(&self, step: u64) -> CheckpointState {
        let listed = self.store.list().await.unwrap();
        let found = listed.iter().find(|found| found.reference.step.0 == step);
        found.expect("listed").state
    }
}

/// The newest checkpoint's manifest, which keeps whoever reads it waiting until this is dropped.
struct Stuck(PathBuf);

impl Stuck {
    async fn new(bench: &Bench) -> Self {
        let newest = bench.store.newest_valid(None).await.unwrap().unwrap();
        let path = bench.folder.path().join("store").join(newest.object.key);
        // In one move: a collection that is still under way removes folders that it finds empty.
        let fifo = bench.folder.path().join("fifo");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        std::fs::rename(&fifo, &path).unwrap();
        Self(path)
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        // Its readers have a partner, and there will be no others. Without the first the test would wait for them for ever.
        let _partner = std::fs::OpenOptions::new().read(true).write(true).open(&self.0);
        let _ = std::fs::remove_file(&self.0);
    }
}

async fn ended(heard: &mut mpsc::UnboundedReceiver<RootMessage>) -> u8 {
    match tokio::time::timeout(WAIT, heard.recv()).await.expect("in time") {
        Some(RootMessage::Ended(end)) => end.code,
        _ => panic!("no end"),
    }
}

/// CKPT-1: a checkpoint is told of when it exists, however long the ones before it take to go; and neither the next commit nor
/// a search waits for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_waits_for_a_collection() {
    let mut bench = Bench::new(1, || 0).await;
    bench.commit(10).await;
    let stuck = Stuck::new(&bench).await;
    bench.commit(20).await;
    bench.commit(30).await;
    assert_eq!(bench.locate().await, (Some(30), Some(30)));
    bench.commit(40).await;
    assert_eq!(
        bench.state_of(10).await,
        CheckpointState::Committed,
        "nothing could be collected"
    );
    drop(stuck);
}

/// A run that ends is collected first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_collection_is_waited_for() {
    let mut bench = Bench::new(1, || 0).await;
    bench.commit(10).await;
    bench.commit(20).await;
    assert_eq!(ended(&mut bench.close().await).await, 34);
    assert_eq!(bench.state_of(10).await, CheckpointState::Retired);
    assert_eq!(bench.state_of(20).await, CheckpointState::Committed);
}

/// It is waited for as long as it works, and does not keep the end for itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_comes_behind_a_collection_under_way() {
    let mut bench = Bench::new(1, || 0).await;
    bench.commit(10).await;
    let stuck = Stuck::new(&bench).await;
    bench.commit(20).await;
    let mut heard = bench.close().await;
    let early = tokio::time::timeout(Duration::from_millis(200), heard.recv()).await;
    assert!(early.is_err(), "it was still collecting");
    drop(stuck);
    assert_eq!(ended(&mut heard).await, 34);
}

/// A run that made no checkpoint ends at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_without_a_commit_waits_for_nothing() {
    let bench = Bench::new(1, || 0).await;
    assert_eq!(ended(&mut bench.close().await).await, 34);
}

/// CKPT-3: a collection that fails is heard of, as one of a controller that was put out of charge does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collection_that_fails_is_told_of() {
    let mut bench = Bench::new(1, || 0).await;
    bench.commit(10).await;
    let location = bench.folder.path().join("store");
    let successor = CheckpointStore::open(&location.to_string_lossy(), WriterId::fresh(Generation(0))).await;
    successor.unwrap().claim(Generation(1)).await.unwrap();
    let claimed = Claimed {
        store: bench.store.clone(),
        fence: bench.fence,
    };
    let collector = Collector::start(&claimed, &bench.coordinator);
    collector.wanted.send_replace(Some(Collection {
        step: StepsCompleted(10),
        retention: Retention::last(1),
        rollbacks: Rollbacks::default(),
    }));
    collector.finish().await;
    let CoordinatorMessage::Warn(text) = bench.hear().await else {
        panic!("another word")
    };
    assert!(text.starts_with("old checkpoints stay: "), "{text}");
}

/// What is durable is told of a search and to a successor: the newest checkpoint of a state that the run goes on from, and how
/// old it is by the clock that made it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_checkpoint_is_told_with_its_age() {
    static NOW_MS: AtomicU64 = AtomicU64::new(5_000);
    let mut bench = Bench::new(3, || NOW_MS.load(Ordering::SeqCst)).await;
    let inherit = |bench: &Bench, rollbacks| {
        let inherit = CheckpointerMessage::Inherit(rollbacks);
        bench.checkpointer.cast(inherit).unwrap();
    };
    inherit(&bench, Rollbacks::default());
    assert_eq!(bench.newest().await, None, "nothing is");
    bench.commit(10).await;
    NOW_MS.store(6_000, Ordering::SeqCst);
    bench.commit(20).await;
    NOW_MS.store(9_000, Ordering::SeqCst);
    inherit(&bench, Rollbacks::default());
    assert_eq!(bench.newest().await, Some((20, 3_000)));
    let back = Rollback {
        at: StepIndex(20),
        to: StepsCompleted(12),
    };
    inherit(&bench, [back].into_iter().collect());
    assert_eq!(
        bench.newest().await,
        Some((10, 4_000)),
        "the state after step 20 is left behind"
    );
    NOW_MS.store(1_000, Ordering::SeqCst);
    inherit(&bench, Rollbacks::default());
    assert_eq!(bench.newest().await, Some((20, 0)), "a clock that was set back");
    assert_eq!(bench.locate().await, (Some(20), Some(20)));
}
