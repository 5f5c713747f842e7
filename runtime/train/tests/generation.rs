//! The start of a generation on real ranks: what it leaves behind when it is cut short, and that nothing shows in a
//! number (DET-1, DET-2, STEP-1, STEP-2).
#![allow(clippy::unwrap_used)]

mod common;

use common::{Checkpoint, NoStore, Node, Outcome, Said, Tensors, Wanted, agreed, member, meshes, plan, reports, run};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tarazed_domain::{OptimizerShardIndex, Rank, StepIndex, StepsCompleted};
use tarazed_fabric::{Collective, FabricError};
use tarazed_protocol::message::{BeginPlan, DisputedItem, Member, RestoreFrom, StateReport, StepLine};
use tarazed_protocol::placement::{ShardHolder, ShardOrigin};
use tarazed_train::StepError;
use tarazed_train::generation::{ShardSource, TakeWeights};
use tarazed_train::harm::{Harm, Place};
use tarazed_train::host::HostVisible;

type Lines = BTreeMap<StepsCompleted, StepLine>;

fn begin(workers: &[u32], replicas: usize, last_step: u64) -> (Vec<Node>, BeginPlan) {
    let wanted = Wanted {
        generation: 1,
        members: workers.iter().copied().map(member).collect(),
        replicas,
        last_step,
        ..Wanted::default()
    };
    let nodes = workers.iter().copied().map(Node::new).collect();
    (nodes, plan(&wanted, &BTreeMap::new()))
}

/// Nodes that look at the weights every so many steps.
fn weighing(nodes: &mut [Node], interval_steps: u64) {
    for node in nodes {
        Arc::make_mut(&mut node.state.config).monitor.weights_interval_steps = interval_steps;
    }
}

/// One rank still stores its share: all leave the due checkpoint out, and all take it as soon as that rank has stored it.
#[test]
fn a_slow_store_makes_checkpoints_rarer_on_all_ranks_alike() {
    let (mut nodes, plan) = begin(&[0, 1, 2], 2, 12);
    for node in &mut nodes {
        Arc::make_mut(&mut node.state.config).checkpoint.interval_steps = 2;
    }
    nodes[0].stores_from = StepsCompleted(6);
    let outcomes = run(&mut nodes, &plan, &mut meshes(&plan), &NoStore);
    for outcome in outcomes {
        assert!(outcome.ended.is_ok(), "{:?}", outcome.ended);
        assert_eq!(outcome.saved_steps(), [2, 7, 8, 10, 12], "rank of {}", outcome.member);
    }
}

/// What was due and is not there when a generation begins is made up for at its first boundary, and nothing else is.
#[test]
fn a_checkpoint_that_was_missed_is_made_up_for() {
    for (checkpointed, expected) in [(0, &[5, 6, 8][..]), (2, &[5, 6, 8]), (3, &[6, 8]), (4, &[6, 8])] {
        let (mut nodes, first) = begin(&[0, 1], 2, 4);
        let before = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
        for node in &mut nodes {
            Arc::make_mut(&mut node.state.config).checkpoint.interval_steps = 3;
        }
        let wanted = Wanted {
            generation: 2,
            members: vec![member(0), member(1)],
            replicas: 2,
            last_step: 8,
            ..Wanted::default()
        };
        let mut second = plan(&wanted, &reports(&before));
        second.checkpointed = StepsCompleted(checkpointed);
        for outcome in run(&mut nodes, &second, &mut meshes(&second), &NoStore) {
            assert_eq!(outcome.saved_steps(), expected, "checkpoint of {checkpointed}");
        }
    }
}

/// The trace of a run in which nothing happens, on one rank.
fn undisturbed(last_step: u64) -> Lines {
    undisturbed_weighing(last_step, 0)
}

fn undisturbed_weighing(last_step: u64, interval_steps: u64) -> Lines {
    let (mut nodes, plan) = begin(&[0], 1, last_step);
    weighing(&mut nodes, interval_steps);
    let outcomes = run(&mut nodes, &plan, &mut meshes(&plan), &NoStore);
    assert!(outcomes[0].ended.is_ok(), "{:?}", outcomes[0].ended);
    outcomes[0].lines().map(|line| (line.step, line.clone())).collect()
}

/// Takes lines over as the ledger does: a step told twice is told the same.
fn take_lines(trace: &mut Lines, outcomes: &[Outcome]) {
    for line in outcomes.iter().flat_map(Outcome::lines) {
        let known = trace.entry(line.step).or_insert_with(|| line.clone());
        assert_eq!(known, line, "step {} has one result", line.step);
    }
}

/// DET-2: the moments of every tensor are those of the whole model's master weights, bit for bit the same in every world.
#[test]
fn weights_are_summed_alike_in_every_world() {
    let (mut alone, plan) = begin(&[0], 1, 4);
    weighing(&mut alone, 2);
    let outcomes = run(&mut alone, &plan, &mut meshes(&plan), &NoStore);
    let lines: Lines = outcomes[0].lines().map(|line| (line.step, line.clone())).collect();
    let told: Vec<u64> = lines
        .values()
        .filter(|l| !l.weights.is_empty())
        .map(|l| l.step.0)
        .collect();
    assert_eq!(told, [2, 4], "every second step");
    let state = &alone[0].state;
    let flat: Vec<f32> = state
        .shards
        .values()
        .flat_map(|shard| shard.read().master.to_vec())
        .collect();
    let moments = &lines[&StepsCompleted(4)].weights;
    assert_eq!(moments.len(), state.layout.tensors().len());
    for (slot, moments) in state.layout.tensors().iter().zip(moments) {
        let own: Vec<f64> = flat[slot.range()].iter().map(|weight| f64::from(*weight)).collect();
        let (sum, squares) = (own.iter().sum::<f64>(), own.iter().map(|w| w * w).sum::<f64>());
        assert_eq!(moments.count, own.len() as u64, "{}", slot.name);
        assert!(
            (moments.sum - sum).abs() < 1e-9,
            "{}: {moments:?}, not {sum}",
            slot.name
        );
        assert!(
            (moments.square_sum - squares).abs() < 1e-9,
            "{}: {moments:?}, not {squares}",
            slot.name
        );
    }
    for (workers, replicas) in [(&[0, 1][..], 1), (&[0, 1, 2], 2), (&[0, 1, 2, 3], 3)] {
        let (mut nodes, plan) = begin(workers, replicas, 4);
        weighing(&mut nodes, 2);
        for outcome in run(&mut nodes, &plan, &mut meshes(&plan), &NoStore) {
            assert!(outcome.ended.is_ok(), "{:?}", outcome.ended);
            for line in outcome.report.lines {
                assert_eq!(lines[&line.step], line, "{} ranks, step {}", workers.len(), line.step);
            }
        }
    }
}

fn held(report: &StateReport) -> Vec<OptimizerShardIndex> {
    report.shards.iter().map(|holding| holding.shard).collect()
}

fn given(plan: &BeginPlan, rank: u32) -> Vec<OptimizerShardIndex> {
    let holds = |shard: &u32| {
        plan.shards
            .of(OptimizerShardIndex(*shard))
            .iter()
            .any(|holder| holder.rank == Rank(rank))
    };
    (0..plan.shards.shard_count() as u32)
        .filter(holds)
        .map(OptimizerShardIndex)
        .collect()
}

fn copies_to(plan: &BeginPlan, rank: u32) -> usize {
    let copied = |holder: &&ShardHolder| holder.rank == Rank(rank) && matches!(holder.origin, ShardOrigin::CopyFrom(_));
    plan.shards.holders().iter().filter(copied).count()
}

/// STEP-5: rank 0 alone says that a generation runs, after its base's line where that is still to come.
#[test]
fn rank_0_alone_says_that_the_generation_runs() {
    let (mut nodes, first) = begin(&[0, 1], 2, 2);
    let outcomes = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
    let lines: Lines = outcomes[0].lines().map(|line| (line.step, line.clone())).collect();
    assert_eq!(lines.keys().copied().collect::<Vec<_>>(), [1, 2].map(StepsCompleted));
    assert!(matches!(outcomes[0].said[0], Said::Running(StepsCompleted(0))));
    assert_eq!(outcomes[1].said, [Said::Saved(StepsCompleted(2))], "rank 1 has no say");

    // The base's line is acknowledged, or still to come: then it comes first, from everybody.
    for acknowledged in [2, 1] {
        let wanted = Wanted {
            generation: 4 - acknowledged,
            members: vec![member(0), member(1)],
            replicas: 2,
            last_step: 2,
            acknowledged,
            ..Wanted::default()
        };
        let mut next = plan(&wanted, &reports(&outcomes));
        assert_eq!(next.base, StepsCompleted(2));
        let line = lines[&StepsCompleted(2)].clone();
        next.state = Some(line.state).filter(|_| acknowledged == 2);
        // Rank 0 lost the line: it completes it from the plan's outcome.
        nodes[0].state.lines.clear();
        let outcomes = run(&mut nodes, &next, &mut meshes(&next), &NoStore);
        let running = Said::Running(StepsCompleted(2));
        if acknowledged == 2 {
            assert_eq!(outcomes[0].said, [running]);
            assert_eq!(outcomes[1].said, []);
        } else {
            assert_eq!(outcomes[0].said, [Said::Line(line.clone()), running]);
            assert_eq!(outcomes[1].said, [Said::Line(line)]);
        }
    }
}

/// Two ranks with the only copy of each shard take in a third, to which some shards move; it dies before it is whole.
/// Nobody else ever holds what moved, so the donors must.
#[test]
fn a_newcomer_that_dies_before_it_is_whole_takes_no_shard_with_it() {
    let trace = undisturbed(4);
    let weights_exchanged = 2; // exchanges of a start: copies, hashes, weights
    for dies_at in 0..weights_exchanged {
        let (mut nodes, first) = begin(&[0, 1], 1, 2);
        let outcomes = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
        let mut wanted = Wanted {
            generation: 2,
            members: vec![member(0), member(1), member(2)],
            replicas: 1,
            last_step: 4,
            acknowledged: 2,
            ..Wanted::default()
        };
        let admission = plan(&wanted, &reports(&outcomes));
        assert_eq!(copies_to(&admission, 2), 2, "shards move to the newcomer");
        nodes.push(Node::new(2));
        let mut ends = meshes(&admission);
        ends[2].die_at(dies_at);
        let outcomes = run(&mut nodes, &admission, &mut ends, &NoStore);
        assert!(ends[2].is_dead());
        for (outcome, rank) in outcomes[..2].iter().zip(0..) {
            let lost = matches!(&outcome.ended, Err(StepError::Fabric(FabricError::PeerLost { peer, .. })) if *peer == Rank(2));
            assert!(lost, "{:?}", outcome.ended);
            assert_eq!(
                held(&outcome.report),
                given(&first, rank),
                "the donor holds what it held"
            );
        }

        // So the two go on without a restore, and nothing shows.
        nodes.pop();
        wanted.generation = 3;
        wanted.members.pop();
        let survivors = reports(&outcomes[..2]);
        assert!(
            agreed(&survivors, admission.shards.shard_count()).is_some(),
            "no shard is lost"
        );
        let next = plan(&wanted, &survivors);
        let outcomes = run(&mut nodes, &next, &mut meshes(&next), &NoStore);
        let base = &trace[&StepsCompleted(2)];
        assert_eq!(outcomes[0].said[0], Said::Running(base.step));
        let mut lines = Lines::new();
        take_lines(&mut lines, &outcomes);
        assert!(
            lines
                .values()
                .eq(trace.range(StepsCompleted(3)..).map(|(_, line)| line))
        );
    }
}

/// Once everybody is whole, each rank holds what the map gives it and no more.
#[test]
fn what_moved_away_is_dropped_when_all_are_whole() {
    let (mut nodes, first) = begin(&[0, 1], 1, 1);
    let outcomes = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
    let wanted = Wanted {
        generation: 2,
        members: vec![member(0), member(1), member(2)],
        replicas: 1,
        last_step: 1, // the base itself: no step runs
        acknowledged: 1,
        ..Wanted::default()
    };
    let admission = plan(&wanted, &reports(&outcomes));
    nodes.push(Node::new(2));
    let outcomes = run(&mut nodes, &admission, &mut meshes(&admission), &NoStore);
    for (outcome, rank) in outcomes.iter().zip(0..) {
        assert!(outcome.ended.is_ok(), "{:?}", outcome.ended);
        assert_eq!(held(&outcome.report), given(&admission, rank));
    }
}

/// STEP-2: a rank that was given up while it lived, and is found again, stands several steps behind. What it holds counts for
/// nothing, it does not try to finish the agreed step with it, and it is fed like a newcomer.
#[test]
fn a_rank_far_behind_is_fed_like_a_newcomer() {
    let mut trace = Lines::new();
    let (mut nodes, first) = begin(&[0, 1, 2], 2, 2);
    let mut outcomes = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
    take_lines(&mut trace, &outcomes);
    let (behind, given_up) = (nodes.remove(2), outcomes.remove(2));
    let mut wanted = Wanted {
        generation: 2,
        members: vec![member(0), member(1)],
        replicas: 2,
        last_step: 5,
        acknowledged: 2,
        ..Wanted::default()
    };
    let without = plan(&wanted, &reports(&outcomes));
    let mut outcomes = run(&mut nodes, &without, &mut meshes(&without), &NoStore);
    take_lines(&mut trace, &outcomes);

    nodes.push(behind);
    outcomes.push(given_up);
    wanted.generation = 3;
    wanted.members.push(member(2));
    (wanted.last_step, wanted.acknowledged) = (7, 5);
    let again = plan(&wanted, &reports(&outcomes));
    assert_eq!(again.base, StepsCompleted(5));
    assert!(again.outcome.is_some(), "there is a step to be finished");
    assert!(copies_to(&again, 2) > 0, "it holds nothing of use");
    let outcomes = run(&mut nodes, &again, &mut meshes(&again), &NoStore);
    for outcome in &outcomes {
        assert!(outcome.ended.is_ok(), "{:?}", outcome.ended);
    }
    take_lines(&mut trace, &outcomes);
    assert_eq!(trace, undisturbed(7));
}

/// STEP-1, STEP-2, DET-1: with two copies of each shard, whoever of three dies at whatever exchange, in the start of a
/// generation that admits a newcomer or in the steps after it, the others go on without a restore and write the same
/// trace.
#[test]
fn whoever_dies_whenever_the_trace_is_the_same() {
    assert_eq!(deaths(0), 3 * (3 + 2 * 5), "a start has 3 exchanges, a step 5");
    assert_eq!(deaths(1), 3 * (3 + 2 * 6), "one more where the weights are looked at");
}

/// Every death once, in runs that look at their weights every so many steps; how many there were.
fn deaths(interval_steps: u64) -> usize {
    let trace = undisturbed_weighing(5, interval_steps);
    let mut deaths = 0;
    for dies in 0..3 {
        for dies_at in 0.. {
            let (died, lines) = run_with_death(dies, dies_at, interval_steps);
            assert_eq!(lines, trace, "rank {dies} dies at exchange {dies_at}");
            if !died {
                break;
            }
            deaths += 1;
        }
    }
    deaths
}

/// Two ranks run to step 2, admit a third, run to step 4 unless one dies; the living run to step 5.
fn run_with_death(dies: usize, dies_at: usize, interval_steps: u64) -> (bool, Lines) {
    let mut lines = Lines::new();
    let (mut nodes, first) = begin(&[0, 1], 2, 2);
    weighing(&mut nodes, interval_steps);
    let outcomes = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
    take_lines(&mut lines, &outcomes);
    let mut wanted = Wanted {
        generation: 2,
        members: vec![member(0), member(1), member(2)],
        replicas: 2,
        last_step: 4,
        acknowledged: 2,
        ..Wanted::default()
    };
    let admission = plan(&wanted, &reports(&outcomes));
    nodes.push(Node::new(2));
    weighing(&mut nodes, interval_steps);
    let mut ends = meshes(&admission);
    ends[dies].die_at(dies_at);
    let mut outcomes = run(&mut nodes, &admission, &mut ends, &NoStore);
    let died = ends[dies].is_dead();
    if died {
        // What it said last may have been heard, but what it held is gone.
        take_lines(&mut lines, &outcomes);
        nodes.remove(dies);
        outcomes.remove(dies);
        wanted.members.remove(dies);
    }
    take_lines(&mut lines, &outcomes);

    wanted.generation = 3;
    wanted.last_step = 5;
    wanted.acknowledged = lines.keys().next_back().map_or(0, |step| step.0);
    let living = reports(&outcomes);
    assert!(
        agreed(&living, admission.shards.shard_count()).is_some(),
        "two copies cover one death"
    );
    let next = plan(&wanted, &living);
    let outcomes = run(&mut nodes, &next, &mut meshes(&next), &NoStore);
    for outcome in &outcomes {
        assert!(outcome.ended.is_ok(), "{:?}", outcome.ended);
    }
    take_lines(&mut lines, &outcomes);
    (died, lines)
}

/// A checkpoint of two ranks after step 2, and the trace to step 4.
fn saved() -> (Checkpoint, Lines) {
    let (mut nodes, first) = begin(&[0, 1], 2, 2);
    let outcomes = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
    (Checkpoint::of(2, &outcomes), undisturbed(4))
}

fn restoring(members: Vec<Member>, from: &RestoreFrom, generation: u64, last_step: u64) -> BeginPlan {
    let wanted = Wanted {
        generation,
        members,
        replicas: 2,
        last_step,
        acknowledged: from.step.0,
        restore: Some(from.clone()),
        ..Wanted::default()
    };
    plan(&wanted, &BTreeMap::new())
}

/// CKPT-6, STEP-5: from two ranks to one or three, and the state is that of the base's line.
#[test]
fn a_restore_on_another_world_size_is_bit_for_bit_the_same() {
    let (checkpoint, trace) = saved();
    let base = &trace[&StepsCompleted(2)];
    for workers in 1..4 {
        let members: Vec<Member> = (0..workers).map(member).collect();
        let mut nodes: Vec<Node> = (0..workers).map(Node::new).collect();
        let mut next = restoring(members, &checkpoint.name, 5, 4);
        next.state = Some(base.state);
        let outcomes = run(&mut nodes, &next, &mut meshes(&next), &checkpoint);
        assert_eq!(outcomes[0].said[0], Said::Running(base.step));
        let mut lines = Lines::new();
        take_lines(&mut lines, &outcomes);
        assert!(
            lines
                .values()
                .eq(trace.range(StepsCompleted(3)..).map(|(_, line)| line))
        );
    }
}

/// Stops being read: either it never answers, or the abort comes while it reads its first shard.
struct Interrupted<'a> {
    checkpoint: &'a Checkpoint,
    hangs: bool,
    reads: AtomicUsize,
    outside: Arc<AtomicBool>,
}

impl ShardSource for Interrupted<'_> {
    fn read(&self, from: &RestoreFrom, shard: OptimizerShardIndex, abort: &AtomicBool) -> Result<Tensors, StepError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.hangs {
            while !abort.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            return Err(StepError::Aborted);
        }
        self.outside.store(true, Ordering::Relaxed);
        self.checkpoint.read(from, shard, abort)
    }
}

/// SUP-4: a fence that comes during a restore is answered, and the rank is as good as new.
#[test]
fn an_abort_ends_a_restore_before_the_next_shard() {
    let (checkpoint, trace) = saved();
    for hangs in [true, false] {
        let mut nodes = vec![Node::new(0)];
        let source = Interrupted {
            checkpoint: &checkpoint,
            hangs,
            reads: AtomicUsize::new(0),
            outside: Arc::clone(&nodes[0].abort),
        };
        let next = restoring(vec![member(0)], &checkpoint.name, 5, 4);
        let began = Instant::now();
        let outcomes = std::thread::scope(|scope| {
            let abort = Arc::clone(&nodes[0].abort);
            if hangs {
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(50));
                    abort.store(true, Ordering::Relaxed);
                });
            }
            run(&mut nodes, &next, &mut meshes(&next), &source)
        });
        assert!(
            matches!(outcomes[0].ended, Err(StepError::Aborted)),
            "{:?}",
            outcomes[0].ended
        );
        assert!(began.elapsed() < Duration::from_secs(5));
        assert_eq!(
            source.reads.load(Ordering::Relaxed),
            1,
            "no shard is begun after the abort"
        );
        assert_eq!(outcomes[0].said, []);
        assert_eq!(held(&outcomes[0].report), [], "what is not whole is not offered");

        nodes[0].abort = Arc::default();
        let next = restoring(vec![member(0)], &checkpoint.name, 6, 4);
        let outcomes = run(&mut nodes, &next, &mut meshes(&next), &checkpoint);
        let base = &trace[&StepsCompleted(2)];
        assert_eq!(outcomes[0].said[0], Said::Running(base.step));
    }
}

/// SUP-4: neither seed nor peers keep an aborted rank.
#[test]
fn an_abort_ends_every_kind_of_start() {
    let (mut nodes, first) = begin(&[0, 1], 1, 2);
    nodes[0].abort.store(true, Ordering::Relaxed);
    let outcomes = run(&mut nodes[..1], &alone(&first), &mut meshes(&alone(&first)), &NoStore);
    assert!(matches!(outcomes[0].ended, Err(StepError::Aborted)));
    assert_eq!(held(&outcomes[0].report), []);

    // A survivor keeps what it held, a newcomer has nothing.
    let (mut nodes, first) = begin(&[0, 1], 1, 2);
    let outcomes = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
    let wanted = Wanted {
        generation: 2,
        members: vec![member(0), member(1), member(2)],
        replicas: 1,
        last_step: 4,
        acknowledged: 2,
        ..Wanted::default()
    };
    let admission = plan(&wanted, &reports(&outcomes));
    nodes.push(Node::new(2));
    let mut ends = meshes(&admission);
    for (node, mesh) in nodes.iter().zip(&ends) {
        node.abort.store(true, Ordering::Relaxed);
        mesh.abort_handle().abort();
    }
    let outcomes = run(&mut nodes, &admission, &mut ends, &NoStore);
    for (outcome, rank) in outcomes.iter().zip(0..) {
        assert!(matches!(outcome.ended, Err(StepError::Aborted)), "{:?}", outcome.ended);
        let before = if rank < 2 { given(&first, rank) } else { Vec::new() };
        assert_eq!(held(&outcome.report), before);
    }
}

/// The same plan for its first member alone.
fn alone(plan: &BeginPlan) -> BeginPlan {
    let wanted = Wanted {
        generation: plan.generation.0,
        members: vec![plan.roster[0].member],
        replicas: 1,
        last_step: plan.last_step.0,
        ..Wanted::default()
    };
    common::plan(&wanted, &BTreeMap::new())
}

/// A plan that restores from nothing, or from a checkpoint that is not its base's, is not followed.
#[test]
fn a_plan_must_name_the_checkpoint_of_its_base() {
    let (checkpoint, _) = saved();
    let good = restoring(vec![member(0)], &checkpoint.name, 5, 4);
    let mut nameless = good.clone();
    nameless.restore = None;
    let mut other = good;
    other.base = StepsCompleted(3);
    for bad in [nameless, other] {
        let mut nodes = vec![Node::new(0)];
        let outcomes = run(&mut nodes, &bad, &mut meshes(&bad), &checkpoint);
        assert!(
            matches!(outcomes[0].ended, Err(StepError::Restore(_))),
            "{:?}",
            outcomes[0].ended
        );
    }
    assert!(checkpoint.read.lock().unwrap().is_empty());
}

/// Flips one bit of a shard as an update would that went wrong: its hashes say what it is now.
fn spoil(node: &mut Node, shard: OptimizerShardIndex) {
    let state = &mut node.state;
    let held = state.shards.get_mut(&shard).unwrap();
    let mut inner = held.write();
    let element = &mut inner.second_moment[3];
    *element = f32::from_bits(element.to_bits() ^ 1 << 20);
    drop(inner);
    held.rehash(&state.device, &mut state.stream, &state.layout).unwrap();
}

/// DET-3: a step was cut short before its holders were compared, one of them has it wrong, and the plan gives up the copy
/// that is right: all see it before anything comes of it.
#[test]
fn copies_that_are_given_up_are_compared_before() {
    let (mut nodes, first) = begin(&[0, 1], 2, 2);
    let outcomes = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
    let wanted = Wanted {
        generation: 2,
        members: vec![member(0), member(1), member(2)],
        replicas: 2,
        last_step: 4,
        acknowledged: 2,
        ..Wanted::default()
    };
    let mut next = plan(&wanted, &reports(&outcomes));
    let gives_up = |rank: u32| {
        let kept = given(&next, rank);
        given(&first, rank).into_iter().find(|shard| !kept.contains(shard))
    };
    let (honest, shard) = (0..2)
        .find_map(|rank| Some((rank, gives_up(rank)?)))
        .expect("a shard that moves to the newcomer");
    let wrong = 1 - honest;
    for holder in next.shards.of_mut(shard) {
        if holder.rank == Rank(2) {
            holder.origin = ShardOrigin::CopyFrom(Rank(wrong));
        }
    }
    spoil(&mut nodes[wrong as usize], shard);
    nodes.push(Node::new(2));
    for outcome in run(&mut nodes, &next, &mut meshes(&next), &NoStore) {
        let Err(StepError::Disputed(dispute)) = outcome.ended else {
            panic!("{:?}", outcome.ended)
        };
        assert_eq!(dispute.item, DisputedItem::Shard(shard));
        let digest_of = |rank| {
            dispute
                .claims
                .iter()
                .find(|claim| claim.rank == Rank(rank))
                .map(|claim| claim.digest)
        };
        assert_ne!(digest_of(honest), digest_of(wrong));
        assert_eq!(digest_of(2), None, "the newcomer is no second witness for its donor");
        assert_eq!(dispute.claims.len(), 2);
    }
}

/// DET-3: a bit of the only copy changes between two updates: the update sees it, whichever array it is in.
#[test]
fn an_update_does_not_believe_memory_that_changed() {
    for place in [Place::Master, Place::FirstMoment, Place::SecondMoment] {
        let (mut nodes, first) = begin(&[0], 1, 4);
        nodes[0].state.harm = Some(Harm {
            step: StepIndex(2),
            place,
            shard: 1,
            element: 70,
            bit: 3,
            stuck: false,
        });
        let outcomes = run(&mut nodes, &first, &mut meshes(&first), &NoStore);
        let rotten = matches!(
            &outcomes[0].ended,
            Err(StepError::Rotten {
                step: StepsCompleted(2),
                ..
            })
        );
        assert!(rotten, "{place:?}: {:?}", outcomes[0].ended);
        assert_eq!(outcomes[0].lines().count(), 2, "{place:?}: lines before it");
    }
}

/// DET-3: nobody takes a step from a state that is not the one in its line, whoever else has seen it.
#[test]
fn from_another_state_than_that_of_the_trace_nobody_begins() {
    let (checkpoint, _) = saved();
    let mut nodes: Vec<Node> = (0..2).map(Node::new).collect();
    let mut next = restoring((0..2).map(member).collect(), &checkpoint.name, 5, 4);
    next.state = Some([7; 32]);
    for outcome in run(&mut nodes, &next, &mut meshes(&next), &checkpoint) {
        let Err(error @ StepError::OtherBase { .. }) = &outcome.ended else {
            panic!("{:?}", outcome.ended)
        };
        assert!(error.to_string().contains("0707"), "{error}");
        assert!(
            error
                .dispute()
                .is_some_and(|dispute| dispute.item == DisputedItem::Base)
        );
        assert_eq!(outcome.said, []);
    }
}

/// Another run's checkpoint, whose master weights this one begins with. Reads of whole shards are not asked for.
struct Given<'a> {
    checkpoint: &'a Checkpoint,
    elements: usize,
    /// The read fails there, if anywhere.
    bad: Option<OptimizerShardIndex>,
}

impl ShardSource for Given<'_> {
    fn read(&self, from: &RestoreFrom, _: OptimizerShardIndex, _: &AtomicBool) -> Result<Tensors, StepError> {
        panic!("nothing is restored here, least of all {from:?}");
    }

    fn read_initial(
        &self,
        shards: &[(OptimizerShardIndex, Range<usize>)],
        abort: &AtomicBool,
        take: &mut TakeWeights<'_>,
    ) -> Result<(), StepError> {
        // In any order.
        for (shard, elements) in shards.iter().rev() {
            if self.bad == Some(*shard) {
                return Err(StepError::Restore("shards/x is bad".to_owned()));
            }
            let master = self.checkpoint.shards[shard][0].clone();
            assert!(elements.len() == master.len() && elements.end <= self.elements);
            take(*shard, master)?;
            if abort.load(Ordering::Relaxed) {
                return Err(StepError::Aborted);
            }
        }
        Ok(())
    }
}

/// Nodes of a run that begins with given weights, from step 0.
fn begin_given(workers: u32, last_step: u64) -> (Vec<Node>, BeginPlan) {
    let config = common::config_with(&[
        "model.initial.from=elsewhere",
        &format!("model.initial.blake3={}", "0a".repeat(32)),
    ]);
    let members: Vec<u32> = (0..workers).collect();
    let (_, plan) = begin(&members, 2.min(workers as usize), last_step);
    (members.iter().map(|&worker| Node::of(worker, &config)).collect(), plan)
}

/// DET-1, CKPT-6: given weights are what a run begins with, on every rank and in every world; moments begin at zero, steps too,
/// and of the seed's weights nothing is left.
#[test]
fn given_weights_begin_a_run_alike_in_every_world() {
    let (checkpoint, of_seed) = saved();
    let mut traces = Vec::new();
    for workers in [1, 2, 3] {
        let (mut nodes, plan) = begin_given(workers, 0);
        let elements = nodes[0].state.layout.flat_elements();
        let source = Given {
            checkpoint: &checkpoint,
            elements,
            bad: None,
        };
        for outcome in run(&mut nodes, &plan, &mut meshes(&plan), &source) {
            assert!(outcome.ended.is_ok(), "{:?}", outcome.ended);
        }
        for node in &nodes {
            for (shard, held) in &node.state.shards {
                let held = held.read();
                let buffers = [&held.master, &held.first_moment, &held.second_moment];
                let [master, first, second] = node.state.device.copies(buffers).unwrap().map(|copy| copy.to_vec());
                assert_eq!(master, checkpoint.shards[shard][0], "shard {shard}");
                assert!(first.iter().chain(&second).all(|value| value.to_bits() == 0));
            }
        }
        let (mut nodes, plan) = begin_given(workers, 4);
        let outcomes = run(&mut nodes, &plan, &mut meshes(&plan), &source);
        let mut lines = Lines::new();
        take_lines(&mut lines, &outcomes);
        assert_eq!(lines.len(), 4);
        traces.push(lines);
    }
    assert!(traces.iter().all(|trace| *trace == traces[0]));
    let first = StepsCompleted(1);
    assert_ne!(traces[0][&first].state, of_seed[&first].state);
    assert_eq!(traces[0][&first].data, of_seed[&first].data, "samples are the seed's");
}

/// CKPT-4, SUP-4: what is wrong with them is the fault of this rank, not of a checkpoint of the run, and nothing of them is held
/// then; an abort ends them, too.
#[test]
fn given_weights_that_cannot_be_read_begin_nothing() {
    let (checkpoint, _) = saved();
    for (bad, aborted) in [(Some(OptimizerShardIndex(2)), false), (None, true)] {
        let (mut nodes, plan) = begin_given(1, 2);
        let source = Given {
            checkpoint: &checkpoint,
            elements: nodes[0].state.layout.flat_elements(),
            bad,
        };
        nodes[0].abort.store(aborted, Ordering::Relaxed);
        let outcomes = run(&mut nodes, &plan, &mut meshes(&plan), &source);
        let error = outcomes[0].ended.as_ref().unwrap_err();
        let expected = match aborted {
            true => matches!(error, StepError::Aborted),
            false => matches!(error, StepError::Restore(_)) && error.is_own_fault() && error.dispute().is_none(),
        };
        assert!(expected, "{error:?}");
        assert_eq!(held(&outcomes[0].report), []);
    }
    // A source that knows of none.
    let (mut nodes, plan) = begin_given(1, 2);
    let outcomes = run(&mut nodes, &plan, &mut meshes(&plan), &NoStore);
    assert!(matches!(outcomes[0].ended, Err(StepError::Restore(_))));
}
