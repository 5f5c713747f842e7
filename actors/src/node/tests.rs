//! Real processes: their ends, their words, and that none is left.

use super::*;
use std::path::Path;
use std::process::{Command, Stdio};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Far above anything measured; only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(30);
const CONTROLLER: &str = "TARAZED_TEST_NODE_CONTROLLER";
const HOLDER: &str = "TARAZED_TEST_LIFELINE";
const W0: WorkerId = WorkerId(0);
const I0: Incarnation = Incarnation(0);

/// `sh` takes the two appended arguments as `$1…`.
fn shell(script: &str, folder: &Path) -> LaunchSpec {
    LaunchSpec {
        program: "/bin/sh".into(),
        shown_as: "/bin/sh".into(),
        args: vec!["-c".into(), script.into(), "sh".into()],
        env: vec![("TARAZED_TEST".into(), "set".into())],
        share_gpus: false,
        lifeline: false,
        log_dir: folder.join("logs"),
        registry: folder.join("ranks"),
        tenure: None,
        released: Arc::default(),
    }
}

struct Bench {
    agent: NodeAgent,
    events: UnboundedReceiver<NodeEvent>,
    _folder: tempfile::TempDir,
}

impl Bench {
    async fn new(script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let spec = shell(script, folder.path());
        Self::with(spec, folder).await
    }

    async fn with(spec: LaunchSpec, folder: tempfile::TempDir) -> Self {
        let (sender, events) = unbounded_channel();
        let agent = start_node_agent(spec, None, move |event| drop(sender.send(event)))
            .await
            .unwrap();
        Self {
            agent,
            events,
            _folder: folder,
        }
    }

    fn start(&self, worker: WorkerId, incarnation: Incarnation) {
        self.start_after(worker, incarnation, Duration::ZERO);
    }

    fn start_after(&self, worker: WorkerId, incarnation: Incarnation, after: Duration) {
        let start = NodeCommand::Start {
            worker,
            incarnation,
            after,
        };
        self.agent.command(start).unwrap();
    }

    fn kill(&self, worker: WorkerId, incarnation: Incarnation) {
        let reason = "it hangs".to_owned();
        let kill = NodeCommand::Kill {
            worker,
            incarnation,
            reason,
        };
        self.agent.command(kill).unwrap();
    }

    async fn next(&mut self) -> NodeEvent {
        next(&mut self.events).await
    }

    async fn started(&mut self) -> u32 {
        match self.next().await {
            NodeEvent::Started { pid, .. } => pid,
            other => panic!("{other:?}"),
        }
    }

    async fn exited(&mut self) -> Exit {
        match self.next().await {
            NodeEvent::Exited { exit, .. } => exit,
            other => panic!("{other:?}"),
        }
    }

    async fn start_failed(&mut self) -> StartError {
        match self.next().await {
            NodeEvent::StartFailed { error, .. } => error,
            other => panic!("{other:?}"),
        }
    }
}

async fn next(events: &mut UnboundedReceiver<NodeEvent>) -> NodeEvent {
    tokio::time::timeout(PATIENCE, events.recv()).await.unwrap().unwrap()
}

/// Waits until a condition of the outside world holds.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Not even a zombie counts as alive: orphans are reaped by whoever is process 1 here, in its own time.
fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the command's name, which is in parentheses.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// A process that does nothing for longer than any test lasts.
const IDLE: &str = "echo ready; exec sleep 1000";

/// Not a test of its own: a process that holds a lifeline, for the tests below. It ends by itself once there is a file `leave`.
#[test]
fn lifeline_process() {
    let Ok(folder) = std::env::var(HOLDER) else { return };
    let folder = Path::new(&folder);
    let lifeline = Lifeline::hold();
    std::fs::write(folder.join("holds"), "").unwrap();
    while !folder.join("leave").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(lifeline);
    // What it said is heard before anybody is told of its end.
    std::fs::write(folder.join("left"), "").unwrap();
}

impl Bench {
    /// A life of [`lifeline_process`] that holds its lifeline.
    async fn with_lifeline() -> (Self, u32) {
        let folder = tempfile::tempdir().unwrap();
        let script = r#"exec "$TARAZED_TEST_EXE" --exact node::tests::lifeline_process --nocapture"#;
        let mut spec = LaunchSpec {
            lifeline: true,
            ..shell(script, folder.path())
        };
        let exe = std::env::current_exe().unwrap();
        spec.env.push(("TARAZED_TEST_EXE".into(), exe.into()));
        spec.env.push((HOLDER.into(), folder.path().into()));
        let mut bench = Self::with(spec, folder).await;
        bench.start(W0, I0);
        let pid = bench.started().await;
        let holds = bench._folder.path().join("holds");
        eventually("it holds its lifeline", || holds.exists()).await;
        (bench, pid)
    }

    async fn ending(&mut self) -> Option<String> {
        match self.next().await {
            NodeEvent::Ending { killed, .. } => killed,
            other => panic!("{other:?}"),
        }
    }
}

/// NODE-1: a killed process is told of when its end begins, and when it is gone.
#[tokio::test]
async fn a_sudden_end_is_told_when_it_begins() {
    let (mut bench, pid) = Bench::with_lifeline().await;
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(bench.ending().await, None);
    assert_eq!(bench.exited().await.cause, ExitCause::Signal(9));

    let (mut bench, _) = Bench::with_lifeline().await;
    bench.kill(W0, I0);
    assert_eq!(bench.ending().await.as_deref(), Some("it hangs"));
    assert_eq!(bench.exited().await.killed.as_deref(), Some("it hangs"));
}

/// One that ends by itself says so: its last words are not overtaken.
#[tokio::test]
async fn an_end_of_its_own_is_told_when_it_is_over() {
    let (mut bench, _) = Bench::with_lifeline().await;
    std::fs::write(bench._folder.path().join("leave"), "").unwrap();
    let exit = bench.exited().await;
    assert_eq!(exit.cause, ExitCause::Code(0), "{exit}");
    assert!(bench._folder.path().join("left").exists());
}

/// A program without one (what the system refuses, it goes without) is heard of by its exit.
#[tokio::test]
async fn a_process_without_a_lifeline_is_none_that_died() {
    let folder = tempfile::tempdir().unwrap();
    let spec = LaunchSpec {
        lifeline: true,
        // It closes the pipe, and lives on.
        ..shell("exec </dev/null; exec sleep 1000", folder.path())
    };
    let mut bench = Bench::with(spec, folder).await;
    bench.start(W0, I0);
    let pid = bench.started().await;
    eventually("the pipe is closed", || {
        std::fs::read_link(format!("/proc/{pid}/fd/0")).is_ok_and(|file| file == Path::new("/dev/null"))
    })
    .await;
    bench.kill(W0, I0);
    assert_eq!(bench.exited().await.cause, ExitCause::Signal(9));
}

#[tokio::test]
async fn an_exit_comes_with_code_and_last_words() {
    let mut bench = Bench::new("echo $TARAZED_TEST $1 $2 $3 $4; echo boom >&2; exit 7").await;
    bench.start(WorkerId(3), Incarnation(5));
    let pid = bench.started().await;
    let exit = bench.exited().await;
    assert_eq!(exit.cause, ExitCause::Code(7));
    assert_eq!(exit.killed, None);
    assert_eq!(exit.tail, ["set --worker 3 --incarnation 5", "boom"]);
    assert!(exit.to_string().contains("exit code 7"), "{exit}");
    assert!(exit.to_string().contains("boom"), "{exit}");
    assert!(!exists(pid), "reaped before it is reported (NODE-2)");
}

/// A long last speech is cut to its end, and an earlier life's words are not this one's.
#[tokio::test]
async fn the_tail_is_of_this_life_and_bounded() {
    let script = "[ $4 = 0 ] && echo first-life; [ $4 = 1 ] && seq 100000 >&2; exit 1";
    let mut bench = Bench::new(script).await;
    bench.start(W0, I0);
    bench.started().await;
    assert_eq!(bench.exited().await.tail, ["first-life"]);
    bench.start(W0, I0.next());
    bench.started().await;
    let exit = bench.exited().await;
    let expected: Vec<String> = (99_981..=100_000).map(|n| n.to_string()).collect();
    assert_eq!(exit.tail, expected);
    bench.start(W0, Incarnation(2));
    bench.started().await;
    assert!(bench.exited().await.tail.is_empty());
    let log = std::fs::read_to_string(&exit.log).unwrap();
    assert!(log.starts_with("=== worker 0 incarnation 0\nfirst-life\n=== worker 0 incarnation 1\n1\n"));
    assert!(log.ends_with("100000\n=== worker 0 incarnation 2\n"));
}

/// The times that recovery rests on, printed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ends_are_seen_within_milliseconds() {
    let mut bench = Bench::new(IDLE).await;
    let (mut starts, mut kills, mut deaths) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..10 {
        let began = Instant::now();
        bench.start(W0, Incarnation(round));
        let pid = bench.started().await;
        starts.push(began.elapsed());
        let killed = Instant::now();
        let exit = if round % 2 == 0 {
            bench.kill(W0, Incarnation(round));
            let exit = bench.exited().await;
            kills.push(killed.elapsed());
            assert_eq!(exit.killed.as_deref(), Some("it hangs"));
            exit
        } else {
            // From outside, as the out-of-memory killer would.
            let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            let exit = bench.exited().await;
            deaths.push(killed.elapsed());
            assert_eq!(exit.killed, None);
            exit
        };
        assert_eq!(exit.cause, ExitCause::Signal(9));
        assert!(exit.to_string().contains("SIGKILL"), "{exit}");
    }
    println!("Start to Started {starts:?}; Kill to Exited {kills:?}; SIGKILL from outside to Exited {deaths:?}");
    let best = deaths.iter().chain(&kills).min().unwrap();
    assert!(best < &Duration::from_millis(100), "{best:?}");
}

#[tokio::test]
async fn a_missing_program_is_named_with_its_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = shell("", folder.path());
    spec.program = "/nonexistent/tarazed".into();
    spec.shown_as.clone_from(&spec.program);
    let mut bench = Bench::with(spec, folder).await;
    bench.start(W0, I0);
    let error = bench.start_failed().await;
    assert!(matches!(error, StartError::Reconfigure { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("/nonexistent/tarazed") && text.contains("check that the program exists"),
        "{text}"
    );
    // The slot is free again: the next life may be tried.
    bench.start(W0, I0.next());
    bench.start_failed().await;
}

#[tokio::test]
async fn an_unwritable_log_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = shell("", folder.path());
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    spec.log_dir = file.clone();
    let mut bench = Bench::with(spec, folder).await;
    bench.start(W0, I0);
    let text = bench.start_failed().await.to_string();
    assert!(
        text.contains("choose a log folder") && text.contains(file.to_str().unwrap()),
        "{text}"
    );
}

/// NODE-2: neither ranks nor what ranks have started stay behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_all_leaves_nothing_behind() {
    let mut bench = Bench::new("sleep 1000 & echo $!; wait").await;
    for worker in 0..4 {
        bench.start(WorkerId(worker), I0);
    }
    bench.start_after(WorkerId(9), I0, Duration::from_secs(3600));
    let mut pids = Vec::new();
    for _ in 0..4 {
        pids.push(bench.started().await);
    }
    for worker in 0..4 {
        let log = bench._folder.path().join(format!("logs/worker-{worker}.log"));
        let helper = || std::fs::read_to_string(&log).ok()?.lines().nth(1)?.parse::<u32>().ok();
        eventually("the helper's pid is in the log", || helper().is_some()).await;
        pids.push(helper().unwrap());
    }
    assert!(pids.iter().all(|pid| alive(*pid)));
    bench.agent.command(NodeCommand::StopAll).unwrap();
    let (mut exits, mut cancelled) = (0, 0);
    loop {
        match bench.next().await {
            NodeEvent::Exited { exit, .. } => {
                assert_eq!(exit.cause, ExitCause::Signal(9));
                exits += 1;
            }
            NodeEvent::StartFailed { error, worker, .. } => {
                assert!(
                    matches!(error, StartError::Cancelled(_)) && worker == WorkerId(9),
                    "{error}"
                );
                cancelled += 1;
            }
            NodeEvent::AllStopped => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((exits, cancelled), (4, 1));
    assert!(
        !pids[..4].iter().any(|pid| exists(*pid)),
        "each rank is reaped before its exit is reported"
    );
    eventually("their helpers are dead", || !pids.iter().any(|pid| alive(*pid))).await;
    // With nothing to stop, the answer comes at once; and work can go on.
    bench.agent.command(NodeCommand::StopAll).unwrap();
    assert!(matches!(bench.next().await, NodeEvent::AllStopped));
    bench.start(W0, I0.next());
    bench.started().await;
}

/// NODE-2: an orderly stop returns when the processes are gone; a dropped, a killed and a broken agent kill them too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_end_with_their_agent() {
    let mut bench = Bench::new(IDLE).await;
    bench.start(W0, I0);
    let pid = bench.started().await;
    bench.agent.stop().await;
    assert!(!exists(pid));

    let mut bench = Bench::new(IDLE).await;
    bench.start(W0, I0);
    let pid = bench.started().await;
    drop(bench.agent);
    eventually("a dropped agent's process ends", || !exists(pid)).await;

    let mut bench = Bench::new(IDLE).await;
    bench.start(W0, I0);
    let pid = bench.started().await;
    bench.agent.actor.kill();
    eventually("a killed agent's process ends", || !exists(pid)).await;

    let folder = tempfile::tempdir().unwrap();
    let (sender, mut pids) = unbounded_channel();
    let agent = start_node_agent(shell(IDLE, folder.path()), None, move |event| {
        if let NodeEvent::Started { pid, .. } = event {
            sender.send(pid).unwrap();
            panic!("the owner cannot bear events");
        }
    })
    .await
    .unwrap();
    let start = NodeCommand::Start {
        worker: W0,
        incarnation: I0,
        after: Duration::ZERO,
    };
    agent.command(start).unwrap();
    let pid = tokio::time::timeout(PATIENCE, pids.recv()).await.unwrap().unwrap();
    eventually("a broken agent's process ends", || !exists(pid)).await;
}

/// SUP-2: an agent that is out of charge kills nobody: not when it is told to, nor when it is stopped, dropped or killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_of_a_successor_are_left_alone() {
    for end in ["stopped", "dropped", "killed"] {
        let folder = tempfile::tempdir().unwrap();
        let lock = folder.path().join("lock");
        let spec = LaunchSpec {
            tenure: Some(Tenure::of(lock.clone()).unwrap()),
            ..shell(IDLE, folder.path())
        };
        let mut bench = Bench::with(spec, folder).await;
        bench.start(W0, I0);
        let pid = bench.started().await;
        // The lock's name goes to another file, as in a take-over.
        std::fs::rename(&lock, lock.with_extension("old")).unwrap();
        bench.kill(W0, I0);
        match end {
            "stopped" => bench.agent.stop().await,
            "dropped" => drop(bench.agent),
            _ => bench.agent.actor.kill(),
        }
        let silence = async { while bench.events.recv().await.is_some() {} };
        tokio::time::timeout(PATIENCE, silence).await.unwrap();
        assert!(alive(pid), "{end}");
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
}

/// SUP-2: an agent that stood still while a start was due, and is out of charge since, starts nobody and writes nothing
/// down: its successor has started the same worker.
#[tokio::test]
async fn a_start_that_is_due_after_the_charge_was_lost_is_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    let (lock, registry) = (folder.path().join("lock"), folder.path().join("ranks"));
    let spec = LaunchSpec {
        tenure: Some(Tenure::of(lock.clone()).unwrap()),
        ..shell(IDLE, folder.path())
    };
    let mut bench = Bench::with(spec, folder).await;
    // The one thread of this test asks and takes over before the agent gets a turn.
    bench.start_after(W0, I0, Duration::from_millis(1));
    std::fs::rename(&lock, lock.with_extension("old")).unwrap();
    let error = bench.start_failed().await;
    assert!(
        matches!(&error, StartError::Cancelled(why) if why.contains("in charge")),
        "{error}"
    );
    assert!(registry::read(&registry).unwrap().is_empty());
}

/// SUP-1: the death of a process's actor ends the process and is reported with its cause, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_supervisor_is_an_exit_of_its_own_kind() {
    let mut bench = Bench::new(IDLE).await;
    bench.start(W0, I0);
    let pid = bench.started().await;
    bench.agent.actor.get_children().pop().unwrap().kill();
    let exit = bench.exited().await;
    assert!(matches!(exit.cause, ExitCause::Unsupervised(_)), "{exit}");
    eventually("its process ends", || !exists(pid)).await;
    bench.start(W0, I0.next());
    bench.started().await;
}

/// SUP-2, NODE-1: one life at a time, each newer than the last; every refusal is said and counted.
#[tokio::test]
async fn lives_follow_each_other() {
    let mut bench = Bench::new(IDLE).await;
    bench.start(W0, I0);
    let first = bench.started().await;
    bench.start(W0, I0);
    assert!(matches!(bench.start_failed().await, StartError::Refused(_)));
    bench.start(W0, I0.next());
    assert!(bench.start_failed().await.to_string().contains("still lives"));
    // Of another life: nothing happens.
    bench.kill(W0, I0.next());
    bench.kill(WorkerId(8), I0);
    bench.kill(W0, I0);
    assert_eq!(bench.exited().await.cause, ExitCause::Signal(9));
    bench.kill(W0, I0);
    bench.start(W0, I0.next());
    let second = bench.started().await;
    assert_ne!(first, second);
    assert!(exists(second));
    assert_eq!(bench.agent.refused(), 5);
}

/// A start in its back-off can be cancelled, and the wait does not hold up other workers.
#[tokio::test]
async fn a_waiting_start_can_be_cancelled() {
    let mut bench = Bench::new(IDLE).await;
    bench.start_after(W0, I0, Duration::from_secs(3600));
    bench.start_after(WorkerId(1), I0, Duration::from_millis(30));
    let asked = Instant::now();
    bench.started().await;
    assert!(asked.elapsed() >= Duration::from_millis(20), "the back-off is kept");
    bench.kill(W0, I0);
    let error = bench.start_failed().await;
    assert!(
        matches!(&error, StartError::Cancelled(reason) if reason == "it hangs"),
        "{error}"
    );
}

/// Not a test of its own: a controller process that the next test kills.
#[test]
fn controller_process() {
    let Ok(folder) = std::env::var(CONTROLLER) else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let folder = Path::new(&folder);
        let script = format!(
            "echo $$ > {0}/pid.new; mv {0}/pid.new {0}/pid; while [ -d {0} ] && [ ! -e {0}/stop ]; do echo >> {0}/work; sleep 0.01; done",
            folder.display()
        );
        let (sender, mut events) = unbounded_channel();
        let agent = start_node_agent(shell(&script, folder), None, move |event| drop(sender.send(event)))
            .await
            .unwrap();
        let start = NodeCommand::Start {
            worker: W0,
            incarnation: I0,
            after: Duration::ZERO,
        };
        agent.command(start).unwrap();
        while events.recv().await.is_some() {}
    });
}

/// NODE-2: when the whole controller is killed, a rank is not killed with it (it may be re-adopted): it goes on working.
#[tokio::test]
async fn a_killed_controller_takes_no_rank_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut controller = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "node::tests::controller_process", "--nocapture"])
        .env(CONTROLLER, folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pid_file = folder.path().join("pid");
    eventually("the rank runs", || pid_file.exists()).await;
    let pid: u32 = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    controller.kill().unwrap();
    controller.wait().unwrap();
    let work = || std::fs::metadata(folder.path().join("work")).map_or(0, |file| file.len());
    let done = work();
    eventually("the rank works on", || work() > done + 3).await;
    assert!(alive(pid));
    std::fs::write(folder.path().join("stop"), "").unwrap();
    eventually("the rank ends", || !alive(pid)).await;
}
