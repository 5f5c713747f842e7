//! Device memory between ranks, over sockets and the recording NCCL: what arrives, what is asked of the library, and what
//! becomes of everything when something fails. No GPU has run any of this.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{PATIENCE, each, fresh_generation, listeners, loopback, tag, until};
use proptest::prelude::*;
use std::sync::Arc;
use std::time::Duration;
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Generation, Rank};
use tarazed_fabric::nccl::{DeviceMeans, Limits, NcclMesh, connect_device_mesh};
use tarazed_fabric::{
    AbortHandle, Collective, CommunicatorFault, DevicePlane, DeviceReceive, DeviceSend, FabricError, Remedy,
    SocketMesh, Tag,
};
use tarazed_kernels::cuda::nccl::recording::{Call, RecordingNccl, RecordingWorld};
use tarazed_kernels::cuda::nccl::{Fault, Nccl, NcclAbsence, UniqueId};
use tarazed_kernels::cuda::recording::RecordingDriver;
use tarazed_kernels::cuda::{CudaBuffer, CudaDevice};
use tarazed_kernels::{Device, Precision};

type Mesh = NcclMesh<RecordingDriver>;
type Buffer = CudaBuffer<RecordingDriver>;

/// One rank's machine.
struct Host {
    driver: RecordingDriver,
    device: CudaDevice<RecordingDriver>,
    library: RecordingNccl,
}

impl Host {
    fn new(world: &Arc<RecordingWorld>) -> Self {
        let driver = RecordingDriver::new();
        let device = CudaDevice::new(driver.clone()).unwrap();
        let library = RecordingNccl::new(world, driver.clone());
        Self {
            driver,
            device,
            library,
        }
    }

    fn buffer(&self, bytes: &[u8]) -> Buffer {
        let buffer = self.device.alloc(bytes.len().div_ceil(4), Precision::Full).unwrap();
        self.driver.poke(buffer.address(), bytes);
        buffer
    }

    fn means(&self, host: &str) -> DeviceMeans<RecordingDriver> {
        DeviceMeans {
            device: self.device.clone(),
            library: Ok(Arc::new(self.library.clone())),
            host: host.to_owned(),
        }
    }

    /// What is left once the device is gone.
    fn left(self) -> Vec<String> {
        drop(self.device);
        let mut left = self.driver.left();
        left.extend(self.library.left());
        left
    }
}

fn hosts(world: &Arc<RecordingWorld>, size: usize) -> Vec<Host> {
    (0..size).map(|_| Host::new(world)).collect()
}

fn timeouts() -> Timeouts {
    common::timeouts(PATIENCE)
}

fn sockets(size: usize, generation: Generation) -> Vec<SocketMesh> {
    common::connected(&listeners(&loopback(), size), generation, PATIENCE)
}

/// Meshes whose communicators are connected.
fn meshes(hosts: &[Host], limits: Limits) -> Vec<Mesh> {
    let id = hosts[0].library.unique_id().unwrap();
    each(sockets(hosts.len(), fresh_generation()), |rank, sockets| {
        connect(sockets, &hosts[rank], &id, &timeouts())
            .unwrap()
            .with_limits(limits)
    })
}

fn connect(sockets: SocketMesh, host: &Host, id: &UniqueId, timeouts: &Timeouts) -> Result<Mesh, FabricError> {
    NcclMesh::connect(sockets, &host.device, Arc::new(host.library.clone()), id, timeouts)
}

fn send(to: u32, item: u64, buffer: &Buffer, elements: usize) -> DeviceSend {
    DeviceSend {
        to: Rank(to),
        tag: tag(item),
        span: buffer.span(0..elements),
    }
}

fn receive(from: u32, item: u64, buffer: &Buffer, elements: usize) -> DeviceReceive {
    DeviceReceive {
        from: Rank(from),
        tag: tag(item),
        span: buffer.span(0..elements),
    }
}

/// Ranks 0 and 1 swap eight bytes.
fn swap(mesh: &mut dyn DevicePlane, own: u32, out: &Buffer, into: &Buffer) -> Result<(), FabricError> {
    let (peer, [sent, due]) = (1 - own, [u64::from(own), u64::from(1 - own)]);
    mesh.exchange_memory(&[send(peer, sent, out, 2)], &[receive(peer, due, into, 2)])
}

#[derive(Clone, Debug)]
struct Message {
    from: usize,
    to: usize,
    elements: usize,
    tag: Tag,
}

fn payload(message: &Message) -> Vec<u8> {
    common::bytes(message.tag.item, message.elements * 4)
}

fn play(mesh: &mut Mesh, host: &Host, pattern: &[Message]) -> Result<(), FabricError> {
    let own = mesh.rank().index();
    let out: Vec<(&Message, Buffer)> = pattern
        .iter()
        .filter(|m| m.from == own)
        .map(|m| (m, host.buffer(&payload(m))))
        .collect();
    let into: Vec<(&Message, Buffer)> = pattern
        .iter()
        .filter(|m| m.to == own)
        .map(|m| (m, host.buffer(&vec![0xee; m.elements * 4])))
        .collect();
    let sends: Vec<DeviceSend> = out
        .iter()
        .map(|(m, buffer)| DeviceSend {
            to: Rank(m.to as u32),
            tag: m.tag,
            span: buffer.span(0..m.elements),
        })
        .collect();
    let receives: Vec<DeviceReceive> = into
        .iter()
        .map(|(m, buffer)| DeviceReceive {
            from: Rank(m.from as u32),
            tag: m.tag,
            span: buffer.span(0..m.elements),
        })
        .collect();
    mesh.exchange_memory(&sends, &receives)?;
    for (message, buffer) in &into {
        let arrived = host.driver.peek(buffer.address(), message.elements * 4);
        assert!(arrived == payload(message), "{message:?} arrived changed");
    }
    Ok(())
}

fn patterns() -> impl Strategy<Value = (usize, Limits, Vec<Vec<Message>>)> {
    let message = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..60_usize);
    let rounds = prop::collection::vec(prop::collection::vec(message, 0..12), 1..4);
    let limits = (2..9_usize, 1..90_usize);
    (2..=4_usize, limits, rounds).prop_map(|(size, (group_calls, call_bytes), rounds)| {
        let mut item = 0;
        let mut named = |(from, step, elements): (prop::sample::Index, prop::sample::Index, usize)| {
            item += 1;
            let from = from.index(size);
            Message {
                from,
                to: (from + 1 + step.index(size - 1)) % size,
                elements,
                tag: tag(item),
            }
        };
        let limits = Limits {
            group_calls,
            call_bytes,
        };
        let rounds = rounds
            .into_iter()
            .map(|round| round.into_iter().map(&mut named).collect());
        (size, limits, rounds.collect())
    })
}

/// Messages longer than a call, more than a group holds, and empty ones.
#[test]
fn random_patterns_arrive_exactly_and_nothing_is_left() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(24));
    let outcome = runner.run(&patterns(), |(size, limits, rounds)| {
        let hosts = hosts(&RecordingWorld::new(), size);
        let meshes = meshes(&hosts, limits);
        each(meshes, |rank, mut mesh| {
            for round in &rounds {
                play(&mut mesh, &hosts[rank], round).unwrap();
            }
            mesh.leave();
        });
        for host in hosts {
            prop_assert_eq!(host.left(), Vec::<String>::new());
        }
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn the_library_is_asked_in_order_and_left_in_order() {
    let hosts = hosts(&RecordingWorld::new(), 2);
    let meshes = each(sockets(2, fresh_generation()), |rank, sockets| {
        let means = hosts[rank].means(&format!("host {rank}"));
        connect_device_mesh(sockets, &means, true, &timeouts()).unwrap()
    });
    each(meshes, |rank, mut mesh| {
        let (out, into) = (hosts[rank].buffer(&[rank as u8; 8]), hosts[rank].buffer(&[9; 8]));
        let plane = mesh.device_plane().unwrap();
        // An empty message needs no call, and an exchange of nothing no group.
        let peer = 1 - rank as u32;
        plane
            .exchange_memory(&[send(peer, 7, &out, 0)], &[receive(peer, 7, &into, 0)])
            .unwrap();
        plane.exchange_memory(&[], &[]).unwrap();
        swap(plane, rank as u32, &out, &into).unwrap();
        assert_eq!(hosts[rank].driver.peek(into.address(), 8), [peer as u8; 8]);
        // Small messages stay on the sockets.
        assert_eq!(mesh.all_gather(tag(9), &[rank as u8], &[1, 1]).unwrap(), [[0], [1]]);
        mesh.leave();
    });
    for (rank, host) in hosts.into_iter().enumerate() {
        let peer = 1 - rank as u32;
        let mut expected = if rank == 0 { vec![Call::UniqueId] } else { vec![] };
        expected.extend([
            Call::Init(2, rank as u32),
            Call::GroupStart,
            Call::Send(peer, 8),
            Call::Receive(peer, 8),
            Call::GroupEnd,
            Call::Finalize,
            Call::Destroy,
        ]);
        assert_eq!(host.library.take(), expected);
        assert_eq!(host.left(), Vec::<String>::new());
    }
}

/// Connects, swaps twice and leaves, as a rank does, up to the first error; then the rank is told that the generation is over.
fn life(sockets: SocketMesh, host: &Host, name: &str) -> Result<(), FabricError> {
    let means = host.means(name);
    let rank = sockets.rank().0;
    let mut mesh = connect_device_mesh(sockets, &means, false, &timeouts())?;
    let (out, into) = (host.buffer(&[1; 8]), host.buffer(&[2; 8]));
    for _ in 0..2 {
        let Some(plane) = mesh.device_plane() else {
            panic!("all ranks have NCCL")
        };
        if let Err(error) = swap(plane, rank, &out, &into) {
            let again = mesh.exchange(&[], &mut []).unwrap_err();
            // Rank 1 may have been fenced in between.
            let fenced = rank == 1 && matches!(again, FabricError::Aborted { .. });
            assert!(
                again == error || fenced,
                "a failed mesh stays failed: {error}, then {again}"
            );
            mesh.retire()?;
            return Err(error);
        }
    }
    mesh.leave();
    Ok(())
}

/// A failure at every call that rank 0 makes, of every kind: the error says what comes next, rank 1 can be fenced, and nothing
/// of either is left.
#[test]
fn a_failure_at_every_call_leaves_nothing_behind() {
    let calls = |fail: Option<(usize, Fault)>| {
        let hosts = hosts(&RecordingWorld::new(), 2);
        if let Some((number, fault)) = fail {
            hosts[0].library.fail(number, fault);
        }
        let sockets = sockets(2, fresh_generation());
        let fences: Vec<AbortHandle> = sockets.iter().map(Collective::abort_handle).collect();
        let outcomes = each(sockets, |rank, sockets| {
            let outcome = life(sockets, &hosts[rank], &format!("host {rank}"));
            // Rank 1 fails only because of rank 0, and may do so before that has come back.
            if rank == 0 && outcome.is_err() {
                fences.iter().for_each(AbortHandle::abort);
            }
            outcome
        });
        let asked = hosts[0].library.asked();
        for host in hosts {
            assert_eq!(host.left(), Vec::<String>::new(), "{fail:?}");
        }
        (asked, outcomes)
    };
    let (asked, outcomes) = calls(None);
    assert_eq!(outcomes, [Ok(()), Ok(())]);
    assert_eq!(asked.len(), 12, "{asked:?}");
    for (fault, remedy) in [
        (Fault::System, Remedy::Reconfigure),
        (Fault::Process, Remedy::Replace),
        (Fault::Usage, Remedy::Halt),
    ] {
        for (number, name) in asked.iter().enumerate() {
            let (after, outcomes) = calls(Some((number, fault)));
            assert_eq!(after[number], *name);
            let opened = after.iter().filter(|call| **call == "ncclGroupStart").count();
            let closed = after.iter().filter(|call| **call == "ncclGroupEnd").count();
            let refused = usize::from(*name == "ncclGroupStart");
            assert_eq!(opened, closed + refused, "{name} ({number}): {after:?}");
            match &outcomes[0] {
                // A rank that leaves has nothing more to lose.
                Ok(()) => assert!(["ncclCommFinalize", "ncclCommDestroy"].contains(name), "{name}"),
                Err(error) => {
                    assert_eq!(error.remedy(), remedy, "{name}: {error}");
                    assert!(error.to_string().contains(name), "{name}: {error}");
                }
            }
        }
    }
}

// SUP-4, in each of the three places where a rank can be.
#[test]
fn an_abort_ends_a_connection_that_does_not_come_about() {
    let hosts = hosts(&RecordingWorld::new(), 2);
    let id = hosts[0].library.unique_id().unwrap();
    let mut sockets = sockets(2, fresh_generation());
    let _one = sockets.pop().unwrap();
    let zero = sockets.pop().unwrap();
    let (handle, generation) = (zero.abort_handle(), zero.generation());
    let library = hosts[0].library.clone();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| connect(zero, &hosts[0], &id, &timeouts()).map(|_| ()));
        until("the connection began", || {
            library.asked().contains(&"ncclCommInitRankConfig")
        });
        handle.abort();
        assert_eq!(thread.join().unwrap(), Err(FabricError::Aborted { generation }));
    });
    assert_eq!(library.take().last(), Some(&Call::Abort));
    assert!(library.left().is_empty());
}

/// Two ranks in a group that never ends.
fn stuck(
    world: &Arc<RecordingWorld>,
    hosts: &[Host],
    meshes: Vec<Mesh>,
    then: impl FnOnce(&[AbortHandle]),
) -> Vec<(Mesh, Result<(), FabricError>)> {
    world.stall(true);
    let handles: Vec<AbortHandle> = meshes.iter().map(Collective::abort_handle).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = meshes
            .into_iter()
            .zip(hosts)
            .map(|(mut mesh, host)| {
                scope.spawn(move || {
                    let rank = mesh.rank().0;
                    let (out, into) = (host.buffer(&[1; 8]), host.buffer(&[2; 8]));
                    let outcome = swap(&mut mesh, rank, &out, &into);
                    // Both buffers go with this, whatever is under way.
                    (mesh, outcome)
                })
            })
            .collect();
        let in_group = |host: &Host| host.library.asked().contains(&"ncclGroupEnd");
        until("both are in the group", || hosts.iter().all(in_group));
        then(&handles);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn an_abort_ends_a_group_and_its_memory_is_given_back() {
    let world = RecordingWorld::new();
    let hosts = hosts(&world, 2);
    let meshes = meshes(&hosts, Limits::default());
    let generation = meshes[0].generation();
    let ended = stuck(&world, &hosts, meshes, |handles| {
        handles.iter().for_each(AbortHandle::abort)
    });
    for (mut mesh, outcome) in ended {
        let aborted = Err(FabricError::Aborted { generation });
        assert_eq!(outcome, aborted);
        assert_eq!(mesh.exchange_memory(&[], &[]), aborted, "for good");
    }
    for host in hosts {
        assert_eq!(host.library.take().last(), Some(&Call::Abort));
        assert_eq!(host.left(), Vec::<String>::new());
    }
}

#[test]
fn an_idle_mesh_is_over_after_an_abort_and_retires() {
    let hosts = hosts(&RecordingWorld::new(), 2);
    let mut meshes = meshes(&hosts, Limits::default());
    let generation = meshes[0].generation();
    meshes[0].abort_handle().abort();
    let aborted = Err(FabricError::Aborted { generation });
    let buffer = hosts[0].buffer(&[0; 8]);
    assert_eq!(swap(&mut meshes[0], 0, &buffer, &buffer), aborted);
    assert_eq!(hosts[0].library.left().len(), 1, "nobody was in a hurry");
    meshes[0].retire().unwrap();
    assert_eq!(hosts[0].library.take().last(), Some(&Call::Abort));
    assert_eq!(hosts[0].library.left(), Vec::<String>::new());
    meshes[0].retire().unwrap();
}

/// Some versions of NCCL hang there. The rank says so in time, and no memory is freed under what may still run.
#[test]
fn an_abort_that_hangs_costs_the_process_and_frees_nothing() {
    let world = RecordingWorld::new();
    let hosts = hosts(&world, 2);
    let id = hosts[0].library.unique_id().unwrap();
    let hasty = Timeouts {
        fence_ms: 100,
        ..timeouts()
    };
    let meshes = each(sockets(2, fresh_generation()), |rank, sockets| {
        connect(sockets, &hosts[rank], &id, &hasty).unwrap()
    });
    world.hang_aborts(true);
    let ended = stuck(&world, &hosts, meshes, |handles| {
        handles.iter().for_each(AbortHandle::abort)
    });
    for ((_, outcome), host) in ended.iter().zip(&hosts) {
        let error = outcome.clone().unwrap_err();
        assert_eq!(error.remedy(), Remedy::Replace, "{error}");
        assert!(error.to_string().contains("within 50 ms"), "{error}");
        assert_eq!(error.peer(), None, "a peer is not to blame for it");
        let kept = host
            .driver
            .left()
            .into_iter()
            .filter(|what| what == "8 bytes of device memory");
        assert_eq!(kept.count(), 2);
    }
    drop(ended);
    world.hang_aborts(false);
    for host in &hosts {
        until("the abort came back", || host.library.left().is_empty());
        until("its memory was let go of", || {
            !host.driver.left().iter().any(|what| what.starts_with("8 bytes"))
        });
    }
}

#[test]
fn each_generation_has_a_communicator_of_its_own() {
    let hosts = hosts(&RecordingWorld::new(), 3);
    let mut now = meshes(&hosts, Limits::default());
    // One is gone; the next world is smaller, then whole again.
    for size in [2, 3] {
        for mesh in &mut now {
            mesh.abort_handle().abort();
            mesh.retire().unwrap();
        }
        drop(now);
        now = meshes(&hosts[..size], Limits::default());
        let pattern: Vec<Message> = (0..size)
            .map(|from| Message {
                from,
                to: (from + 1) % size,
                elements: 5,
                tag: tag(from as u64),
            })
            .collect();
        now = each(now, |rank, mut mesh| {
            play(&mut mesh, &hosts[rank], &pattern).unwrap();
            mesh
        });
    }
    drop(now);
    let calls = hosts[0].library.take();
    assert_eq!(calls.iter().filter(|call| **call == Call::UniqueId).count(), 3);
    for host in hosts {
        assert_eq!(host.left(), Vec::<String>::new());
    }
}

// NCCL says nothing of a death; the sockets do.
#[test]
fn a_peer_that_dies_in_a_group_is_named() {
    for told_by_nccl in [false, true] {
        let world = RecordingWorld::new();
        let hosts = hosts(&world, 3);
        let mut meshes = meshes(&hosts, Limits::default());
        let victim = meshes.pop().unwrap();
        let (second, mut first) = (meshes.pop().unwrap(), meshes.pop().unwrap());
        world.stall(true);
        let outcome = std::thread::scope(|scope| {
            let (host, library) = (&hosts[0], &hosts[0].library);
            let waiting = scope.spawn(move || {
                let buffer = host.buffer(&[0; 8]);
                first.exchange_memory(&[], &[receive(1, 1, &buffer, 2)])
            });
            let peer = &hosts[1];
            let sending = scope.spawn(move || {
                let (mut mesh, buffer) = (second, peer.buffer(&[0; 8]));
                let outcome = mesh.exchange_memory(&[send(0, 1, &buffer, 2)], &[]);
                (mesh, outcome)
            });
            until("it waits", || library.asked().contains(&"ncclGroupEnd"));
            drop(victim);
            if told_by_nccl {
                library.fail_communicators(Fault::Peer);
            }
            let (mesh, outcome) = sending.join().unwrap();
            assert_eq!(outcome.unwrap_err().peer(), Some(Rank(2)));
            let outcome = waiting.join().unwrap();
            drop(mesh);
            outcome
        });
        let error = outcome.unwrap_err();
        assert!(matches!(error, FabricError::PeerLost { .. }), "{error}");
        assert_eq!(error.peer(), Some(Rank(2)), "{error}");
    }
}

#[test]
fn a_remote_error_without_a_death_blames_nobody() {
    let world = RecordingWorld::new();
    let hosts = hosts(&world, 2);
    let meshes = meshes(&hosts, Limits::default());
    let ended = stuck(&world, &hosts, meshes, |_| {
        hosts
            .iter()
            .for_each(|host| host.library.fail_communicators(Fault::Peer));
    });
    for (_, outcome) in &ended {
        let error = outcome.clone().unwrap_err();
        assert_eq!((error.remedy(), error.peer()), (Remedy::Reconfigure, None), "{error}");
        let FabricError::Communicator { fault, cause } = error else {
            panic!("{error}")
        };
        assert_eq!(fault, CommunicatorFault::Peer);
        assert!(cause.contains("ncclRemoteError"), "{cause}");
    }
}

#[test]
fn a_group_that_does_not_end_in_time_is_given_up() {
    let world = RecordingWorld::new();
    let hosts = hosts(&world, 2);
    let id = hosts[0].library.unique_id().unwrap();
    let hasty = Timeouts {
        collective_ms: 200,
        ..timeouts()
    };
    let meshes = each(sockets(2, fresh_generation()), |rank, sockets| {
        connect(sockets, &hosts[rank], &id, &hasty).unwrap()
    });
    for (_, outcome) in stuck(&world, &hosts, meshes, |_| {}) {
        let error = outcome.unwrap_err();
        // The first to give up may close its communicator before the other does.
        assert_eq!(error.remedy(), Remedy::Reconfigure, "{error}");
        assert!(error.to_string().contains("within 200 ms"), "{error}");
    }
}

#[test]
fn disagreements_are_named_before_a_byte_moves() {
    let hosts = hosts(&RecordingWorld::new(), 2);
    // Pairs of item and elements.
    let run = |sent: &[(u64, usize)], due: &[(u64, usize)]| {
        let mut outcomes = each(meshes(&hosts, Limits::default()), |rank, mut mesh| {
            let buffer = hosts[rank].buffer(&[0; 64]);
            if rank == 0 {
                let receives = due.iter().map(|&(item, elements)| receive(1, item, &buffer, elements));
                mesh.exchange_memory(&[], &receives.collect::<Vec<_>>())
            } else {
                let sends = sent.iter().map(|&(item, elements)| send(0, item, &buffer, elements));
                mesh.exchange_memory(&sends.collect::<Vec<_>>(), &[])
            }
        });
        assert!(outcomes[1].is_err(), "the sender does not believe that all is well");
        outcomes.swap_remove(0).unwrap_err()
    };
    let (peer, expected, received) = (Rank(1), tag(1), tag(2));
    let mismatch = FabricError::TagMismatch {
        peer,
        expected,
        received,
    };
    assert_eq!(run(&[(2, 4)], &[(1, 4)]), mismatch);
    assert_eq!(run(&[(0, 4), (2, 4)], &[(0, 4), (1, 4)]), mismatch);
    let mismatch = FabricError::LengthMismatch {
        peer,
        tag: tag(1),
        expected: 8,
        received: 16,
    };
    assert_eq!(run(&[(0, 4), (1, 4)], &[(0, 4), (1, 2)]), mismatch);
    let error = run(&[(0, 4), (1, 4)], &[(0, 4)]);
    assert!(matches!(error, FabricError::LengthMismatch { .. }), "{error}");
}

#[test]
fn all_ranks_use_nccl_or_none_does() {
    type Change = fn(&mut DeviceMeans<RecordingDriver>);
    let without: Change = |means| means.library = Err(NcclAbsence::Library);
    let shared: Change = |means| means.host = "host 0".to_owned();
    for (change, because) in [
        (without, "rank 1: libnccl.so.2 is not there"),
        (shared, "ranks 0 and 1 share a GPU"),
    ] {
        for required in [false, true] {
            let hosts = hosts(&RecordingWorld::new(), 3);
            let outcomes = each(sockets(3, fresh_generation()), |rank, sockets| {
                let mut means = hosts[rank].means(&format!("host {rank}"));
                if rank == 1 {
                    change(&mut means);
                }
                let mut mesh = connect_device_mesh(sockets, &means, required, &timeouts()).unwrap();
                assert!(mesh.device_plane().is_none());
                (mesh.all_gather(tag(1), &[7], &[1; 3]), mesh)
            });
            for (outcome, _) in outcomes {
                let Err(error) = outcome else {
                    assert!(!required);
                    continue;
                };
                assert!(required, "{error}");
                assert_eq!(error.remedy(), Remedy::Halt);
                let text = error.to_string();
                assert!(text.contains(because) && text.contains("cluster.collective"), "{text}");
            }
            assert!(hosts.iter().all(|host| host.library.asked().is_empty()));
        }
    }
}

#[test]
fn a_rank_alone_needs_neither_an_agreement_nor_nccl() {
    let hosts = hosts(&RecordingWorld::new(), 1);
    let mut means = hosts[0].means("host");
    means.library = Err(NcclAbsence::Library);
    let sockets = sockets(1, fresh_generation()).pop().unwrap();
    let mut mesh = connect_device_mesh(sockets, &means, true, &timeouts()).unwrap();
    assert!(mesh.device_plane().is_none());
}

/// Waiting for NCCL must leave the processors to others.
#[test]
fn waiting_does_not_spin() {
    let world = RecordingWorld::new();
    let hosts = hosts(&world, 2);
    let id = hosts[0].library.unique_id().unwrap();
    let limit = Duration::from_millis(400);
    let hasty = Timeouts {
        collective_ms: limit.as_millis() as u64,
        ..timeouts()
    };
    let mut sockets = sockets(2, fresh_generation());
    let _one = sockets.pop().unwrap();
    let zero = sockets.pop().unwrap();
    let thread = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let on_cpu = || {
                let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
                Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
            };
            let before = on_cpu();
            let mut mesh = connect(zero, &hosts[0], &id, &hasty).unwrap();
            let error = mesh.exchange_memory(&[], &[]).unwrap_err();
            assert!(error.to_string().contains("within 400 ms"), "{error}");
            on_cpu() - before
        });
        waiting.join().unwrap()
    });
    assert!(thread < limit / 3, "{thread:?} of CPU in {limit:?}");
}
