//! Ranks on several hosts: nodes with addresses of their own, lost, drained, doubled and brought back.

use crate::common::assert_undisturbed;
use rustix::process::Signal;
use std::collections::BTreeSet;
use tarazed_tests::harness::{Node, Project, Run, Status};

const A: &str = "127.0.0.1";
const B: &str = "127.0.0.2";

/// Two hosts with room for two workers each: 0 and 1 on the first, 2 and 3 on the second.
fn project() -> Project {
    Project::tiny_with(&[
        ("cluster.transport", "\"tcp\""),
        ("cluster.address", "\"127.0.0.1\""),
        (
            "cluster.nodes",
            "[{name = \"a\", address = \"127.0.0.1\", slots = 2}, {name = \"b\", address = \"127.0.0.2\", slots = 2}]",
        ),
        ("fault.restarts_max", "50"),
    ])
}

fn both(project: &Project, run: &str) -> [Node; 2] {
    [Node::start(project, run, "a", A), Node::start(project, run, "b", B)]
}

fn pids(run: &Run) -> BTreeSet<u32> {
    run.processes().ranks().into_iter().collect()
}

/// The workers that compute.
fn training(status: &Status) -> Vec<u32> {
    let all = status.workers.iter();
    all.filter(|worker| worker.state == "training")
        .map(|worker| worker.worker)
        .collect()
}

/// DET-1, DESIGN.md section 4: where ranks run decides no number; copies of a shard lie on different hosts; a rank that is
/// killed is started again by its node, and nodes end with the run.
#[test]
fn ranks_on_two_hosts_write_the_trace_of_one() {
    let project = project();
    let steps = 600;
    // A node may be there before its controller.
    let [mut a, mut b] = both(&project, "two");
    let mut run = Run::start(&project.train("two").ranks(4).steps(steps));
    let status = run.wait_for_status("all ranks", |status| status.all_train(4) && !status.shards.is_empty());
    assert_eq!((a.ranks().len(), b.ranks().len()), (2, 2), "{}{}", a.said(), b.said());
    for holders in &status.shards {
        let hosts: BTreeSet<u32> = holders.iter().map(|worker| worker / 2).collect();
        assert_eq!(hosts.len(), 2, "both copies on one host: {:?}", status.shards);
    }
    for worker in [3, 0] {
        assert!(run.kill_rank(worker).is_some(), "{}", run.tail());
        run.wait_for_status("its next life", |status| {
            status.all_train(4) && status.workers[worker as usize].incarnation == 1
        });
    }
    assert_undisturbed(&mut run, steps, "two hosts");
    let lost = run.events("rank_lost");
    assert_eq!(lost.len(), 2, "{lost:?}");
    for event in &lost {
        let cause = event["cause"].as_str().unwrap_or_default();
        assert!(cause.starts_with("signal 9 (SIGKILL) after"), "{event}");
    }
    for node in [&mut a, &mut b] {
        node.finish().assert_code(0);
    }
    assert_eq!(pids(&run), BTreeSet::new());
}

/// STEP-2, DESIGN.md section 4: a host is lost with all that runs there. The other one has a copy of everything and goes on:
/// nothing is restored, no step is lost. When the host is back, its workers begin anew.
#[test]
fn a_host_that_is_lost_loses_no_step() {
    // Without checkpoints, a restore would begin from the seed.
    let project = project();
    project.set("checkpoint.interval_steps", "0");
    let steps = 2_000;
    let [_a, mut b] = both(&project, "lost");
    let mut run = Run::start(&project.train("lost").ranks(4).steps(steps));
    for round in 0..2 {
        run.wait_for_status("all ranks", |status| status.all_train(4));
        let from = run.step();
        run.wait_for_step(from + 20);
        b.lose();
        run.wait_for_status("those who are left", |status| training(status) == [0, 1]);
        let from = run.step();
        run.wait_for_step(from + 20);
        b = Node::start(&project, "lost", "b", B);
        let back = run.wait_for_status("all ranks again", |status| status.all_train(4));
        for worker in [2, 3] {
            assert!(back.workers[worker].incarnation > round, "{back:?}");
        }
    }
    let back = run.status();
    for holders in &back.shards {
        let hosts: BTreeSet<u32> = holders.iter().map(|worker| worker / 2).collect();
        assert_eq!(hosts.len(), 2, "the host is used again: {:?}", back.shards);
    }
    assert_undisturbed(&mut run, steps, "a lost host");
    assert_eq!(run.events("state_lost").len(), 0, "{}", run.tail());
    b.finish().assert_code(0);
}

/// SUP-1, SUP-2: a node's process is lost, its ranks train on; the next one watches them, and starts their next lives.
#[test]
fn a_node_that_is_killed_costs_no_rank() {
    let project = project();
    let steps = 1_000;
    let [_a, mut b] = both(&project, "node");
    let mut run = Run::start(&project.train("node").ranks(4).steps(steps));
    run.wait_for_status("all ranks", |status| status.all_train(4));
    let (before, generations) = (pids(&run), run.events("generation").len());
    b.signal(Signal::KILL);
    assert_eq!(b.finish().signal, Some(9));
    let from = run.step();
    run.wait_for_step(from + 30);
    // One of its ranks dies while nobody watches it: the others go on, and it has no next life yet.
    let victim = run.kill_rank(3).expect("it lives");
    run.wait_for_status("the others", |status| training(status) == [0, 1, 2]);
    let mut b = Node::start(&project, "node", "b", B);
    let status = run.wait_for_status("all ranks", |status| status.all_train(4));
    assert_eq!(status.workers[3].incarnation, 1, "{status:?}");
    let after = pids(&run);
    assert_eq!(
        before.difference(&after).copied().collect::<Vec<_>>(),
        [victim],
        "no other process ended\n{}",
        run.tail()
    );
    assert!(run.events("generation").len() > generations);
    assert_undisturbed(&mut run, steps, "a killed node");
    assert_eq!(run.events("rank_lost").len(), 1, "{}", run.tail());
    b.finish().assert_code(0);
}

/// SUP-2: a node's process stands still and keeps its link. A rank of its dies, and nobody can end what is left of it: the
/// others go on all the same, and its next life begins when the node goes on.
#[test]
fn a_node_that_stands_still_stalls_nobody() {
    let project = project();
    project.set("fault.timeout_ms", "2000");
    let steps = 2_000;
    let [_a, mut b] = both(&project, "frozen");
    let mut run = Run::start(&project.train("frozen").ranks(4).steps(steps));
    run.wait_for_status("all ranks", |status| status.all_train(4));
    b.signal(Signal::STOP);
    assert!(run.kill_rank(3).is_some());
    run.wait_for_status("the others", |status| training(status) == [0, 1, 2]);
    let from = run.step();
    run.wait_for_step(from + 20);
    b.signal(Signal::CONT);
    run.wait_for_status("its next life", |status| {
        status.all_train(4) && status.workers[3].incarnation > 0
    });
    assert_undisturbed(&mut run, steps, "a node that stood still");
    assert_eq!(run.events("state_lost").len(), 0, "{}", run.tail());
    b.finish().assert_code(0);
}

/// STEP-6, CKPT-3: the controller is lost with a whole host: the next one does not wait for who cannot come back.
#[test]
fn a_controller_that_is_lost_with_a_host_is_replaced_without_it() {
    let project = project();
    project.set("checkpoint.interval_steps", "0");
    project.set("fault.timeout_ms", "2000");
    let steps = 2_000;
    let train = project.train("both").ranks(4).steps(steps);
    let [mut a, mut b] = both(&project, "both");
    let mut first = Run::start(&train);
    first.wait_for_step(40);
    first.wait_for_status("all ranks", |status| status.all_train(4));
    first.signal(Signal::KILL);
    b.lose();
    first.finish();
    let written = first.step();
    first.leave();
    let mut second = Run::start(&train);
    second.wait_for_status("those who are left", |status| training(status) == [0, 1]);
    second.wait_for_step(written + 20);
    let mut b = Node::start(&project, "both", "b", B);
    second.wait_for_status("all ranks again", |status| status.all_train(4));
    assert_undisturbed(&mut second, steps, "a controller and a host");
    assert_eq!(second.events("state_lost").len(), 0, "{}", second.tail());
    for node in [&mut a, &mut b] {
        node.finish().assert_code(0);
    }
}

/// STEP-6, CKPT-3: the controller is killed; nodes and ranks wait for the next one, which goes on with both.
#[test]
fn nodes_outlive_their_controller() {
    let project = project();
    project.set("checkpoint.interval_steps", "0");
    let steps = 1_100;
    let train = project.train("orphans").ranks(4).steps(steps);
    let [mut a, mut b] = both(&project, "orphans");
    let mut first = Run::start(&train);
    first.wait_for_step(40);
    first.wait_for_status("all ranks", |status| status.all_train(4));
    let before = pids(&first);
    first.signal(Signal::KILL);
    assert_eq!(first.finish().signal, Some(9));
    let written = first.step();
    first.leave();
    let mut second = Run::start(&train);
    second.wait_for_step(written + 1);
    assert_eq!(pids(&second), before, "the same processes\n{}", second.tail());
    second.wait_for_status("all ranks", |status| status.all_train(4));
    // A rank that the first one's nodes started is started again for the second.
    assert!(second.kill_rank(2).is_some());
    second.wait_for_status("its next life", |status| {
        status.all_train(4) && status.workers[2].incarnation == 1
    });
    assert_undisturbed(&mut second, steps, "a killed controller");
    assert_eq!(second.events("adopted").len(), 1, "{}", second.tail());
    assert_eq!(second.events("state_lost").len(), 0, "{}", second.tail());
    for node in [&mut a, &mut b] {
        node.finish().assert_code(0);
    }
}

/// CKPT-3, SUP-2: a controller that stood still while another took over finds nodes and ranks in other hands, and touches none.
#[test]
fn a_controller_that_wakes_up_leaves_the_nodes_alone() {
    let project = project();
    let steps = 1_100;
    let train = project.train("asleep").ranks(4).steps(steps);
    let [mut a, mut b] = both(&project, "asleep");
    let mut first = Run::start(&train);
    first.wait_for_step(40);
    first.wait_for_status("all ranks", |status| status.all_train(4));
    let before = pids(&first);
    first.signal(Signal::STOP);
    let written = first.step();
    let mut second = Run::start(&train.clone().arg("--take-over"));
    second.wait_for_step(written + 20);
    assert_eq!(pids(&second), before, "the same processes\n{}", second.tail());
    first.signal(Signal::CONT);
    assert_eq!(first.finish().code, Some(33), "{}", second.tail());
    first.leave();
    drop(first);
    assert_undisturbed(&mut second, steps, "a controller that woke up");
    assert_eq!(second.events("rank_lost").len(), 0, "{}", second.tail());
    for node in [&mut a, &mut b] {
        node.finish().assert_code(0);
    }
}

/// A host is drained by SIGTERM: its ranks end, the run goes on without it, and takes it back. A world has no more ranks than its
/// nodes have room for.
#[test]
fn a_host_is_drained_and_comes_back() {
    let project = project();
    let steps = 1_000;
    let [_a, mut b] = both(&project, "drain");
    let mut run = Run::start(&project.train("drain").ranks(4).steps(steps));
    run.wait_for_status("all ranks", |status| status.all_train(4));
    let dir = run.dir().to_string_lossy().into_owned();
    let refused = project.tarazed(&["resize", "5", "--run-dir", &dir]);
    assert_ne!(refused.code, Some(0), "{}", refused.tail());
    refused.assert_says("no more than its nodes have room for");
    b.signal(Signal::TERM);
    let left = b.finish();
    left.assert_code(34);
    left.assert_says("the run goes on without this host");
    assert_eq!(b.ranks(), [] as [u32; 0]);
    run.wait_for_status("those who are left", |status| training(status) == [0, 1]);
    let from = run.step();
    run.wait_for_step(from + 20);
    let mut b = Node::start(&project, "drain", "b", B);
    run.wait_for_status("all ranks again", |status| status.all_train(4));
    assert_undisturbed(&mut run, steps, "a drained host");
    b.finish().assert_code(0);
}

/// A signal to the controller: a last checkpoint, 34 for it and for its nodes, and the same commands go on.
#[test]
fn a_stopped_run_stops_its_nodes_and_resumes() {
    let project = project();
    let train = project.train("stop").ranks(4).steps(400);
    let [mut a, mut b] = both(&project, "stop");
    let mut run = Run::start(&train);
    run.wait_for_step(30);
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
    for node in [&mut a, &mut b] {
        node.finish().assert_code(34);
    }
    assert_eq!(pids(&run), BTreeSet::new(), "{}", run.tail());
    run.leave();
    let [mut a, mut b] = both(&project, "stop");
    assert_undisturbed(&mut Run::start(&train), 400, "a stopped run");
    for node in [&mut a, &mut b] {
        node.finish().assert_code(0);
    }
}

/// Bad input: a node that is none, one that is there already, one whose controller never comes, and configs that cannot work.
#[test]
fn what_can_be_no_node_is_refused() {
    let project = project();
    let mut lonely = Node::start_with(&project, "nobody", "a", A, &["--wait", "0"]);
    let outcome = lonely.finish();
    outcome.assert_code(33);
    outcome.assert_says("no controller with nodes came");
    assert!(!lonely.run_dir().exists(), "nothing is written");

    for (key, value, problem) in [
        ("cluster.transport", "\"unix\"", "cluster.transport"),
        ("cluster.ranks", "5", "cluster.ranks"),
        ("cluster.nodes", "[]", "cluster.address"),
    ] {
        let refused = project.train("bad").set(key, value).steps(10).finish();
        refused.assert_code(2);
        refused.assert_says(problem);
        assert!(!project.run_dir("bad").exists(), "{key}: nothing is written");
    }

    let [_a, _b] = both(&project, "good");
    let mut run = Run::start(&project.train("good").ranks(4).steps(2_000));
    run.wait_for_status("all ranks", |status| status.all_train(4));
    let before = pids(&run);
    let mut stranger = Node::start(&project, "good", "c", "127.0.0.3");
    let outcome = stranger.finish();
    outcome.assert_code(2);
    outcome.assert_says("its nodes are: a, b");
    let mut second = Node::start(&project, "good", "b", B);
    let outcome = second.finish();
    outcome.assert_code(33);
    outcome.assert_says("another process stands for node 'b'");
    let from = run.step();
    run.wait_for_step(from + 20);
    assert_eq!(pids(&run), before, "nobody was harmed\n{}", run.tail());
    run.signal(Signal::TERM);
    run.finish().assert_code(34);
}

/// A network of its own between this host and another one, which only root can lay.
struct Wire {
    namespace: String,
    here: String,
    there: String,
}

impl Wire {
    /// None where this user may not, or the machine has no `ip`.
    fn lay() -> Option<Self> {
        let number = std::process::id() % 10_000;
        let wire = Self {
            namespace: format!("tarazed-{number}"),
            here: format!("10.231.{}.1", number % 250),
            there: format!("10.231.{}.2", number % 250),
        };
        let (near, far) = (format!("tzn{number}"), format!("tzf{number}"));
        let namespace = wire.namespace.as_str();
        if !ip(&["netns", "add", namespace]) {
            return None;
        }
        let laid = ip(&[
            "link", "add", &near, "type", "veth", "peer", "name", &far, "netns", namespace,
        ]) && ip(&["addr", "add", &format!("{}/30", wire.here), "dev", &near])
            && ip(&["link", "set", &near, "up"])
            && wire.there(&["addr", "add", &format!("{}/30", wire.there), "dev", &far])
            && wire.there(&["link", "set", &far, "up"])
            && wire.there(&["link", "set", "lo", "up"]);
        laid.then_some(wire)
    }

    fn there(&self, args: &[&str]) -> bool {
        ip(&[&["-n", self.namespace.as_str()], args].concat())
    }

    /// From now on nothing arrives on either side, and nobody is told: frames go to a station that is not there.
    fn cut(&self) {
        let number = std::process::id() % 10_000;
        let (near, far) = (format!("tzn{number}"), format!("tzf{number}"));
        let nobody = ["lladdr", "02:00:00:00:00:99", "nud", "permanent"];
        assert!(ip(&[
            &["neigh", "replace", self.there.as_str(), "dev", near.as_str()],
            &nobody[..]
        ]
        .concat()));
        assert!(
            self.there(
                &[
                    &["neigh", "replace", self.here.as_str(), "dev", far.as_str()],
                    &nobody[..]
                ]
                .concat()
            )
        );
    }

    fn mend(&self) {
        let number = std::process::id() % 10_000;
        let (near, far) = (format!("tzn{number}"), format!("tzf{number}"));
        assert!(ip(&["neigh", "del", &self.there, "dev", &near]));
        assert!(self.there(&["neigh", "del", &self.here, "dev", &far]));
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // The pair of devices goes with it.
        ip(&["netns", "del", &self.namespace]);
    }
}

fn ip(args: &[&str]) -> bool {
    let output = std::process::Command::new("ip").args(args).output();
    output.is_ok_and(|output| output.status.success())
}

/// SUP-2, DESIGN.md section 6: a host is partitioned off: sockets stay open, and nothing arrives. It is seen by its silence; the
/// other host goes on with its copies, and when the network is whole again, what the lost one's ranks still hold is not believed.
#[test]
fn a_host_that_is_partitioned_off_is_done_without() {
    let Some(wire) = Wire::lay() else {
        eprintln!("not run: laying a network between two hosts takes root and `ip`");
        return;
    };
    let project = project();
    project.set("cluster.address", &format!("\"{}\"", wire.here));
    let nodes = "[{name = \"a\", slots = 2}, {name = \"b\", slots = 2}]";
    project.set("cluster.nodes", nodes);
    project.set("checkpoint.interval_steps", "0");
    project.set("fault.timeout_ms", "2000");
    let steps = 1_500;
    let more = ["--address", wire.here.as_str()];
    let mut a = Node::start_with(&project, "wire", "a", &wire.here, &more);
    let mut b = Node::start_by_address(&wire.namespace, &project, "wire", "b", &wire.there);
    let mut run = Run::start(&project.train("wire").ranks(4).steps(steps));
    run.wait_for_status("all ranks", |status| status.all_train(4));
    let from = run.step();
    run.wait_for_step(from + 20);
    wire.cut();
    run.wait_for_status("those who are left", |status| training(status) == [0, 1]);
    let from = run.step();
    run.wait_for_step(from + 20);
    assert_eq!(b.ranks().len(), 2, "they live on, where they are");
    wire.mend();
    let back = run.wait_for_status("all ranks again", |status| status.all_train(4));
    for worker in [2, 3] {
        assert!(back.workers[worker].incarnation > 0, "{back:?}");
    }
    assert_undisturbed(&mut run, steps, "a partition");
    assert_eq!(run.events("state_lost").len(), 0, "{}", run.tail());
    for node in [&mut a, &mut b] {
        node.finish().assert_code(0);
    }
}
