//! What deaths among the controller's actors mean (SUP-1). There are no ranks: lines are told as rank 0 tells them, and the trace
//! is written by hand, line by line.

#![allow(clippy::unwrap_used)]

use super::super::appender::{TraceFile, TraceRequest, TraceSink};
use super::super::checkpointer::Claimed;
use super::super::loops::{LoopMember, LoopMessage};
use super::super::tree::{Begun, LoopHarm};
use super::*;
use crate::link::{Body, HubEvent, LinkError, PeerId, ToRanks};
use tarazed_domain::{DomainIndex, Generation};
use tarazed_protocol::data::cursor::{DomainRecipe, Recipe};
use tarazed_protocol::data::stats::LaneStats;
use tarazed_protocol::message::{FromRank, StepLine};
use tarazed_protocol::trace::TraceLine;
use tarazed_store::{BinaryId, CheckpointStore, WriterId};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Nothing here takes long; a loaded machine may.
const WAIT: Duration = Duration::from_secs(60);

/// Decisions in every fourth line, and three deaths in a row are one too many.
const CONFIG: &str = r#"
[run]
name = "deadly"
seed = 1
steps = 1000
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
[mixture]
controller = "odm"
start_steps = 4
interval_steps = 4
lag_steps = 3
[[data.domains]]
name = "one"
path = "one"
language = "en"
weight = 1.0
[[data.domains]]
name = "two"
path = "two"
language = "zh"
weight = 2.0
[cluster]
device = "cpu"
ranks = 1
[fault]
restarts_max = 3
"#;

/// Nobody hears it.
struct Silence;

impl ToRanks for Silence {
    fn send(&self, _: PeerId, _: Vec<u8>) -> Result<(), LinkError> {
        Ok(())
    }
}

/// What is asked for goes to the test.
struct Outbox<T>(mpsc::UnboundedSender<T>);

impl Processes for Outbox<NodeCommand> {
    fn command(&self, command: NodeCommand) -> Result<(), NodeError> {
        // An error means that the test has heard what it wants to know.
        let _ = self.0.send(command);
        Ok(())
    }
}

impl TraceSink for Outbox<TraceRequest> {
    fn request(&self, request: TraceRequest) {
        // An error means that the test is over.
        let _ = self.0.send(request);
    }
}

/// A controller's tree, as it stands in a run, between edges that are the test's.
struct Bench {
    paths: RunPaths,
    begun: Begun,
    harm: LoopHarm,
    ear: Ear,
    rank: PeerId,
    trace: TraceFile,
    requests: mpsc::UnboundedReceiver<TraceRequest>,
    _folder: tempfile::TempDir,
}

impl Bench {
    async fn new(notify: Notify) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let paths = RunPaths::new(folder.path());
        let tree = Tree::start(parts(&paths, notify).await).await.unwrap();
        let trace = TraceFile::open(&paths, tree.weights_bytes()).unwrap();
        let ear = tree.ear();
        let (to_write, requests) = mpsc::unbounded_channel();
        let (to_do, mut commands) = mpsc::unbounded_channel();
        let begun = tree.begin(Edges {
            ranks: Box::new(Silence),
            processes: Box::new(Outbox(to_do)),
            trace: Box::new(Outbox(to_write)),
            past: Past::default(),
        });
        let started = timeout(WAIT, commands.recv()).await.unwrap();
        let Some(NodeCommand::Start {
            worker, incarnation, ..
        }) = started
        else {
            panic!("{started:?}")
        };
        Self {
            harm: begun.loop_harm(),
            rank: PeerId { worker, incarnation },
            paths,
            begun,
            ear,
            trace,
            requests,
            _folder: folder,
        }
    }

    /// Rank 0 tells the line of a step.
    fn tell(&self, step: u64) {
        let body = Body::detached(told(step).encode().unwrap());
        self.ear.hub(HubEvent::Message(self.rank, body));
    }

    /// A line with its decisions, which waits to be written.
    async fn decided(&mut self) -> TraceRequest {
        let request = timeout(WAIT, self.requests.recv()).await;
        request.expect("a line in time").expect("the coordinator")
    }

    fn write(&mut self, request: TraceRequest) {
        let written = self.trace.perform(request).unwrap();
        self.ear.appended(written.expect("a trace line"));
    }

    fn lines(&self) -> Vec<TraceLine> {
        crate::run_folder::lines_after(&self.paths.trace(), StepsCompleted(0)).unwrap()
    }

    fn kill(&self, member: LoopMember) {
        assert!(self.harm.kill(member), "no {member:?} to kill");
    }

    fn kill_all(&self) {
        // Found before the first dies: then the others may be on their way out.
        let all = LoopMember::ALL.map(|member| self.harm.member(member).expect("it is there"));
        all.iter().for_each(ActorCell::kill);
    }

    /// Who the loop's actors are now.
    fn members(&self) -> [Option<ActorId>; 3] {
        LoopMember::ALL.map(|member| self.harm.member(member).map(|cell| cell.get_id()))
    }

    /// Waits until all of them are others.
    async fn renewed(&self, before: &[Option<ActorId>]) {
        let renewed = async {
            while self.members().iter().zip(before).any(|(now, before)| now <= before) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(WAIT, renewed).await.expect("the loop is made again");
    }

    async fn end(&mut self) -> End {
        timeout(WAIT, self.begun.end()).await.expect("an end in time")
    }
}

async fn parts(paths: &RunPaths, notify: Notify) -> TreeParts {
    let config = Config::parse(CONFIG, "test", &[], Path::new("")).unwrap();
    let location = paths.dir().join("store").to_string_lossy().into_owned();
    let writer = WriterId::fresh(Generation(0));
    let store = CheckpointStore::open(&location, writer).await.unwrap();
    let fence = store.claim(Generation(1)).await.unwrap();
    let sequences = 10_000;
    let domains = config.data.domains.iter();
    let facts = domains.clone().map(|domain| DomainFacts {
        name: domain.name.clone(),
        language: domain.language,
        weight: domain.weight,
        train_tokens: sequences * config.model.context as u64,
        train_sequences: sequences,
    });
    let domains = domains.map(|domain| DomainRecipe {
        name: domain.name.clone(),
        train_sequences: sequences,
        weight: domain.weight,
    });
    let recipe = Recipe {
        seed: config.run.seed,
        domains: domains.collect(),
        batch: config.batch_schedule(),
        data_version: [1; 32],
    };
    TreeParts {
        last_step: StepsCompleted(config.run.steps),
        lines: Vec::new(),
        paths: paths.clone(),
        claimed: Claimed { store, fence },
        facts: ManifestFacts::of_program(&config, "data", BinaryId::default(), || 0),
        rules: LoopRules {
            config: LoopConfig::of(&config),
            facts: facts.collect(),
            bytes: Vec::new(),
            lanes: config.batch.lanes,
            recipe,
        },
        metrics: JsonLines::nowhere(),
        events: JsonLines::nowhere(),
        notify,
        config: Arc::new(config),
    }
}

/// The line of a step: a function of the step alone.
fn told(step: u64) -> FromRank {
    let (loss, tokens) = (2.0 + 1.0 / step as f64, 8);
    let mut stats = LaneStats::new(2);
    stats.add_train(DomainIndex(0), 2.0 * loss * tokens as f64, tokens);
    stats.add_train(DomainIndex(1), loss * tokens as f64, tokens);
    let line = StepLine {
        step: StepsCompleted(step),
        data: [step as u8; 32],
        loss: 1.5 * loss,
        grad_norm: 1.0,
        state: [step as u8; 32],
        learning_rate: 1e-2,
        mixture: vec![0.5, 0.5],
        stats: stats.encode(),
        skipped: false,
        weights: Vec::new(),
    };
    FromRank::Line {
        generation: Generation(1),
        line,
        spent_us: Vec::new(),
    }
}

/// When the loop dies, as seen from a line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Moment {
    BeforeItComes,
    WhileItIsLookedAt,
    /// All three at once.
    WhollyMeanwhile,
    /// It is decided, and stands in no trace yet.
    BeforeItIsWritten,
    Never,
}

/// The trace of some lines, each with its moment in turn.
async fn trace(moments: &[Moment]) -> Vec<TraceLine> {
    let mut bench = Bench::new(Arc::new(|_| {})).await;
    for step in 1..=25_usize {
        let moment = moments[step % moments.len()];
        let member = LoopMember::ALL[step / moments.len() % LoopMember::ALL.len()];
        let before = bench.members();
        if moment == Moment::BeforeItComes {
            bench.kill(member);
        }
        bench.tell(step as u64);
        match moment {
            Moment::WhileItIsLookedAt => bench.kill(member),
            Moment::WhollyMeanwhile => bench.kill_all(),
            _ => {}
        }
        let line = bench.decided().await;
        match moment {
            Moment::Never => assert_eq!(bench.members(), before, "it needed another try at {line:?}"),
            Moment::BeforeItIsWritten => {
                bench.kill(member);
                bench.renewed(&before).await;
                bench.write(line);
                continue;
            }
            _ => {}
        }
        bench.write(line);
        if moment != Moment::Never {
            bench.renewed(&before).await;
        }
    }
    let ended = timeout(Duration::from_millis(1), bench.begun.end()).await;
    assert!(ended.is_err(), "{ended:?}");
    bench.lines()
}

/// SUP-1, LOOP-1: whenever parts of the closed loop die, all of it is made again, and what is decided stays as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loop_that_dies_is_made_again_and_decides_the_same() {
    let undisturbed = trace(&[Moment::Never]).await;
    assert_eq!(undisturbed.len(), 25);
    let decides = |line: &TraceLine| !line.decisions.is_empty();
    assert!(undisturbed.iter().filter(|line| decides(line)).count() > 1);
    let disturbed = trace(&[
        Moment::BeforeItComes,
        Moment::WhileItIsLookedAt,
        Moment::WhollyMeanwhile,
        Moment::BeforeItIsWritten,
        Moment::Never,
    ])
    .await;
    assert_eq!(disturbed, undisturbed);
}

/// SUP-1, SUP-3: a loop that dies of the same line again and again is not made again for ever: the run halts, and says of what
/// it died each time.
#[tokio::test]
async fn a_loop_that_dies_again_and_again_halts_the_run_with_the_causes() {
    let mut bench = Bench::new(Arc::new(|_| {})).await;
    bench.tell(1);
    let line = bench.decided().await;
    bench.write(line);
    let mut wrong = bench.lines().remove(0);
    for step in [51, 52, 53] {
        let before = bench.members();
        wrong.step = StepsCompleted(step);
        let entry = bench.harm.member(LoopMember::Tsm).expect("the loop's entry");
        let entry = ActorRef::<LoopMessage>::from(entry);
        entry
            .cast(LoopMessage::LookAt(Box::new(wrong.clone()), Vec::new()))
            .unwrap();
        if step < 53 {
            bench.renewed(&before).await;
        }
    }
    let End { code, diagnosis } = bench.end().await;
    assert_eq!(code, 3, "{diagnosis}");
    let causes: Vec<&str> = diagnosis.lines().collect();
    assert_eq!(causes[0], "the closed loop dies again and again:");
    assert_eq!(causes.len(), 4, "{diagnosis}");
    for (cause, step) in causes[1..].iter().zip([51, 52, 53]) {
        let expected = format!("failed: line {step} came where line 2 must come");
        assert!(cause.contains(&expected), "{diagnosis}");
    }
}

/// SUP-1: any other actor of the controller that panics halts the run with what it panicked of.
#[tokio::test]
async fn another_actor_that_panics_halts_the_run_with_its_cause() {
    let mut bench = Bench::new(Arc::new(|notice| {
        assert!(!matches!(notice, Notice::Line { .. }), "the terminal is upside down");
    }))
    .await;
    bench.tell(1);
    let line = bench.decided().await;
    bench.write(line);
    let End { code, diagnosis } = bench.end().await;
    assert_eq!(code, 3, "{diagnosis}");
    assert!(
        diagnosis.contains("an actor of the controller ended: failed: the terminal is upside down"),
        "{diagnosis}"
    );
}
