//! Whole generations on the CUDA device, its kernels run by the emulator: neither how many ranks there are nor where their
//! state came from shows in a bit (DET-1, DET-2, CKPT-6), though all of it crosses to the host and is rounded on the way.
#![cfg(feature = "emulator")]
#![allow(clippy::unwrap_used)]

mod common;

use common::{Checkpoint, NoStore, Node, Outcome, Wanted, member, meshes, plan, reports, run};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Rank, StepsCompleted};
use tarazed_fabric::nccl::NcclMesh;
use tarazed_fabric::{AbortHandle, Collective, Listener, Transport, connect_mesh};
use tarazed_kernels::CpuDevice;
use tarazed_kernels::cuda::CudaDevice;
use tarazed_kernels::cuda::emulated::EmulatedDriver;
use tarazed_kernels::cuda::nccl::Nccl;
use tarazed_kernels::cuda::nccl::recording::{Call, RecordingNccl, RecordingWorld};
use tarazed_protocol::message::{BeginPlan, StepLine};
use tarazed_train::host::HostVisible;

type Emulated = CudaDevice<EmulatedDriver>;
type Lines = BTreeMap<StepsCompleted, StepLine>;

fn device() -> Emulated {
    let driver = EmulatedDriver::new(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap_or_else(|error| panic!("{error}"));
    CudaDevice::new(driver).unwrap()
}

fn lines(outcomes: &[Outcome]) -> Lines {
    for outcome in outcomes {
        assert!(outcome.ended.is_ok(), "{:?}", outcome.ended);
    }
    let lines = outcomes.iter().flat_map(Outcome::lines);
    lines.map(|line| (line.step, line.clone())).collect()
}

fn wanted(generation: u64, workers: u32, last_step: u64) -> Wanted {
    Wanted {
        generation,
        members: (0..workers).map(member).collect(),
        replicas: workers.min(2) as usize,
        last_step,
        ..Wanted::default()
    }
}

/// A run from its seed, with what its ranks hold then.
fn from_seed<D: HostVisible + Clone>(device: &D, workers: u32, last_step: u64) -> (Vec<Node<D>>, Vec<Outcome>) {
    let plan = plan(&wanted(1, workers, last_step), &BTreeMap::new());
    let mut nodes: Vec<_> = (0..workers).map(|worker| Node::on(worker, device.clone())).collect();
    let outcomes = run(&mut nodes, &plan, &mut meshes(&plan), &NoStore);
    (nodes, outcomes)
}

#[test]
fn the_number_of_ranks_does_not_show() {
    let device = device();
    let alone = lines(&from_seed(&device, 1, 3).1);
    assert_eq!(alone.len(), 3);
    for workers in [2, 3] {
        assert_eq!(lines(&from_seed(&device, workers, 3).1), alone, "{workers} ranks");
    }
    // It is training, and not the processor's.
    let on_cpu = lines(&from_seed(&CpuDevice::new(), 1, 3).1);
    for (step, line) in &alone {
        let (loss, expected) = (line.loss, on_cpu[step].loss);
        assert!(
            (loss - expected).abs() < 0.02 * expected,
            "{step}: {loss} and {expected}"
        );
        assert_ne!(line.state, on_cpu[step].state, "bf16 and f32 are two lineages");
    }
}

#[test]
fn a_newcomer_and_a_restore_do_not_show() {
    let device = device();
    let whole = lines(&from_seed(&device, 1, 4).1);
    let (mut nodes, first) = from_seed(&device, 2, 2);
    // A third rank takes shards over from the two.
    let next = plan(&wanted(2, 3, 4), &reports(&first));
    assert_eq!(next.base, StepsCompleted(2));
    nodes.push(Node::on(2, device.clone()));
    let mut seen = lines(&first);
    seen.extend(lines(&run(&mut nodes, &next, &mut meshes(&next), &NoStore)));
    assert_eq!(seen, whole, "three ranks went on from two");

    let checkpoint = Checkpoint::of(2, &first);
    let from = Wanted {
        restore: Some(checkpoint.name.clone()),
        ..wanted(3, 1, 4)
    };
    let restored = plan(&from, &BTreeMap::new());
    let mut alone = vec![Node::on(0, device)];
    let rest = lines(&run(&mut alone, &restored, &mut meshes(&restored), &checkpoint));
    let expected: Lines = whole.into_iter().filter(|(step, _)| step.0 > 2).collect();
    assert_eq!(rest, expected, "one rank went on from a checkpoint of two");
}

/// Meshes over sockets and a recording NCCL, each with its library.
fn nccl_meshes(plan: &BeginPlan, device: &Emulated) -> Vec<(NcclMesh<EmulatedDriver>, RecordingNccl)> {
    let world = RecordingWorld::new();
    let ip = "127.0.0.1".parse().unwrap();
    let listeners: Vec<Listener> = plan
        .roster
        .iter()
        .map(|_| Listener::bind(&Transport::Tcp { ip }).unwrap())
        .collect();
    let roster: Vec<String> = listeners.iter().map(Listener::address).collect();
    let id = RecordingNccl::new(&world, device.clone()).unique_id().unwrap();
    let timeouts = Timeouts::derive(120_000);
    let connect = |(rank, listener): (u32, &Listener)| {
        let abort = AbortHandle::new(plan.generation).unwrap();
        let token = [7; 32];
        let sockets = connect_mesh(listener, plan.generation, Rank(rank), &roster, token, &timeouts, &abort).unwrap();
        let library = RecordingNccl::new(&world, device.clone());
        let mesh = NcclMesh::connect(sockets, device, Arc::new(library.clone()), &id, &timeouts).unwrap();
        (mesh, library)
    };
    std::thread::scope(|scope| {
        let connect = &connect;
        let threads: Vec<_> = (0..)
            .zip(&listeners)
            .map(|rank| scope.spawn(move || connect(rank)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Two ranks, then a third that copies from them; sums, replicas, working weights and copies all travel.
#[test]
fn device_memory_over_nccl_or_over_the_host_gives_the_same_bits() {
    let device = device();
    let play = |over_nccl: bool| {
        let (mut seen, mut nodes, mut held) = (Lines::new(), Vec::new(), BTreeMap::new());
        for (generation, workers, last_step) in [(1, 2, 2), (2, 3, 4)] {
            nodes.extend((nodes.len() as u32..workers).map(|worker| Node::on(worker, device.clone())));
            let plan = plan(&wanted(generation, workers, last_step), &held);
            let outcomes = if over_nccl {
                let (mut meshes, libraries): (Vec<_>, Vec<_>) = nccl_meshes(&plan, &device).into_iter().unzip();
                let outcomes = run(&mut nodes, &plan, &mut meshes, &NoStore);
                meshes.iter_mut().for_each(|mesh| mesh.retire().unwrap());
                for library in libraries {
                    let calls = library.take();
                    let sent = calls
                        .iter()
                        .any(|call| matches!(call, Call::Send(_, bytes) if *bytes > 0));
                    assert!(sent, "rank sent nothing over NCCL: {calls:?}");
                    assert_eq!(library.left(), Vec::<String>::new());
                }
                outcomes
            } else {
                run(&mut nodes, &plan, &mut meshes(&plan), &NoStore)
            };
            held = reports(&outcomes);
            seen.extend(lines(&outcomes));
        }
        seen
    };
    let over_host = play(false);
    assert_eq!(over_host.len(), 4);
    assert_eq!(play(true), over_host);
}
