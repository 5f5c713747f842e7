//! One suite for every implementation of `Collective`: in-process, Unix sockets, TCP.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{Kind, Local, PATIENCE, Tcp, Unix, bytes, each, fresh_generation, tag, until};
use proptest::prelude::*;
use std::sync::mpsc;
use std::time::Duration;
use tarazed_domain::Rank;
use tarazed_fabric::{Collective, FabricError, Receive, Send, Tag};

const MIB: usize = 1024 * 1024;

fn mesh<K: Kind>(world_size: usize) -> Vec<K::Mesh> {
    K::mesh(world_size, fresh_generation(), PATIENCE)
}

/// One message of a pattern that every rank knows.
#[derive(Clone, Debug)]
struct Message {
    from: usize,
    to: usize,
    length: usize,
    tag: Tag,
}

fn payload(message: &Message) -> Vec<u8> {
    bytes(message.tag.item, message.length)
}

/// Plays one rank's part of a pattern. The order of peers within the receives is turned by `turn`: it must not matter.
fn play<C: Collective>(mesh: &mut C, pattern: &[Message], turn: usize) -> Result<(), FabricError> {
    let (own, size) = (mesh.rank().index(), mesh.world_size());
    let payloads: Vec<_> = pattern
        .iter()
        .filter(|m| m.from == own)
        .map(|m| (m, payload(m)))
        .collect();
    let sends: Vec<Send<'_>> = payloads
        .iter()
        .map(|(m, bytes)| Send {
            to: Rank(m.to as u32),
            tag: m.tag,
            bytes,
        })
        .collect();
    let mut expected: Vec<_> = pattern.iter().filter(|m| m.to == own).collect();
    expected.sort_by_key(|m| (m.from + turn) % size);
    let mut buffers: Vec<Vec<u8>> = expected.iter().map(|m| vec![0xee; m.length]).collect();
    let mut receives: Vec<Receive<'_>> = expected
        .iter()
        .zip(&mut buffers)
        .map(|(m, bytes)| Receive {
            from: Rank(m.from as u32),
            tag: m.tag,
            bytes,
        })
        .collect();
    mesh.exchange(&sends, &mut receives)?;
    for (message, buffer) in expected.iter().zip(&buffers) {
        assert!(*buffer == payload(message), "{message:?} arrived changed");
    }
    Ok(())
}

type Pattern = Vec<Vec<Message>>;

fn patterns() -> impl Strategy<Value = (usize, Pattern)> {
    let lengths = prop_oneof![4 => 0..200_usize, 2 => 200..40_000_usize, 1 => 250_000..700_000_usize];
    let message = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), lengths);
    let rounds = prop::collection::vec(prop::collection::vec(message, 0..12), 1..4);
    (1..=5_usize, rounds).prop_map(|(size, rounds)| {
        let mut item = 0;
        let rounds = rounds
            .into_iter()
            .map(|round| {
                round
                    .into_iter()
                    .map(|(from, to, length)| {
                        item += 1;
                        Message {
                            from: from.index(size),
                            to: to.index(size),
                            length,
                            tag: tag(item),
                        }
                    })
                    .collect()
            })
            .collect();
        (size, rounds)
    })
}

// Ranks without a part in a round run ahead into the next one: no barrier is between rounds.
fn random_patterns_arrive_exactly<K: Kind>() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(40));
    runner
        .run(&patterns(), |(size, rounds)| {
            each(mesh::<K>(size), |rank, mut mesh| {
                for round in &rounds {
                    play(&mut mesh, round, rank).unwrap();
                }
                let sample = mesh.progress().sample();
                assert_eq!(sample.operations_completed, rounds.len() as u64);
                let sent = rounds.iter().flatten().filter(|m| m.from == rank && m.to != rank);
                assert_eq!(sample.bytes_sent, sent.map(|m| m.length as u64).sum::<u64>());
                mesh.leave();
            });
            Ok(())
        })
        .unwrap();
}

fn all_gather_delivers_uneven_lengths_by_rank<K: Kind>() {
    for size in 1..=5 {
        for lengths in [
            vec![8; size],
            (0..size).map(|rank| rank * 1000).collect(),
            vec![0; size],
        ] {
            let expected: Vec<Vec<u8>> = lengths.iter().enumerate().map(|(r, &n)| bytes(r as u64, n)).collect();
            each(mesh::<K>(size), |rank, mut mesh| {
                let gathered = mesh.all_gather(tag(1), &expected[rank], &lengths).unwrap();
                assert_eq!(gathered, expected);
                let mut flat = vec![0; lengths.iter().sum()];
                let start: usize = lengths[..rank].iter().sum();
                flat[start..start + lengths[rank]].copy_from_slice(&expected[rank]);
                mesh.all_gather_in_place(tag(2), &mut flat, &lengths).unwrap();
                assert_eq!(flat, expected.concat());
                mesh.leave();
            });
        }
    }
}

fn large_messages_cross_in_both_directions_at_once<K: Kind>() {
    for size in [2, 3] {
        let pairs = (0..size).flat_map(|from| (0..size).map(move |to| (from, to)));
        let pattern: Vec<Message> = pairs
            .filter(|(from, to)| from != to)
            .map(|(from, to)| Message {
                from,
                to,
                length: 8 * MIB + from,
                tag: tag((from * size + to) as u64),
            })
            .collect();
        each(mesh::<K>(size), |rank, mut mesh| {
            play(&mut mesh, &pattern, rank).unwrap();
            mesh.leave();
        });
    }
}

// A sender that is ahead is held back by the transport, and nothing is lost or reordered.
fn a_peer_may_be_ahead<K: Kind>() {
    const MESSAGES: u64 = 40;
    let (ahead, wait) = mpsc::channel();
    let wait = std::sync::Mutex::new(wait);
    each(mesh::<K>(2), |rank, mut mesh| {
        if rank == 0 {
            for item in 0..MESSAGES {
                if item == 1 {
                    ahead.send(()).unwrap();
                }
                let bytes = bytes(item, MIB / 2);
                mesh.exchange(
                    &[Send {
                        to: Rank(1),
                        tag: tag(item),
                        bytes: &bytes,
                    }],
                    &mut [],
                )
                .unwrap();
            }
        } else {
            wait.lock().unwrap().recv().unwrap();
            let mut buffer = vec![0; MIB / 2];
            for item in 0..MESSAGES {
                let receive = Receive {
                    from: Rank(0),
                    tag: tag(item),
                    bytes: &mut buffer,
                };
                mesh.exchange(&[], &mut [receive]).unwrap();
                assert!(buffer == bytes(item, MIB / 2));
            }
        }
        mesh.leave();
    });
}

// SUP-4: another thread ends a blocked call and every later one, and nothing revives the mesh.
fn abort_ends_a_blocked_call_for_good<K: Kind>() {
    let mut meshes = mesh::<K>(2);
    let silent = meshes.pop().unwrap();
    let mut blocked = meshes.pop().unwrap();
    let (handle, progress, generation) = (blocked.abort_handle(), blocked.progress(), blocked.generation());
    let thread = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut buffer = [0; 4];
            let first = mesh_receive(&mut blocked, 1, 1, &mut buffer);
            let second = mesh_receive(&mut blocked, 1, 1, &mut buffer);
            (first, second, blocked.all_gather(tag(3), &[], &[0, 0]))
        });
        until("the call began", || progress.sample().operations_started == 1);
        assert_eq!(progress.sample().operations_completed, 0);
        handle.clone().abort();
        handle.abort();
        thread.join().unwrap()
    });
    let aborted = FabricError::Aborted { generation };
    assert_eq!(thread, (Err(aborted.clone()), Err(aborted.clone()), Err(aborted)));
    drop(silent);
}

fn mesh_receive<C: Collective>(mesh: &mut C, from: u32, item: u64, bytes: &mut [u8]) -> Result<(), FabricError> {
    mesh.exchange(
        &[],
        &mut [Receive {
            from: Rank(from),
            tag: tag(item),
            bytes,
        }],
    )
}

fn an_aborted_mesh_is_over_even_if_the_data_is_there<K: Kind>() {
    let mut meshes = mesh::<K>(2);
    let (mut one, mut zero) = (meshes.pop().unwrap(), meshes.pop().unwrap());
    one.exchange(
        &[Send {
            to: Rank(0),
            tag: tag(1),
            bytes: b"data",
        }],
        &mut [],
    )
    .unwrap();
    zero.abort_handle().abort();
    let aborted = FabricError::Aborted {
        generation: zero.generation(),
    };
    assert_eq!(mesh_receive(&mut zero, 1, 1, &mut [0; 4]), Err(aborted));
}

// All wait for the dead one, directly.
fn a_death_is_named_by_all_who_wait<K: Kind>() {
    for size in 2..=5 {
        let victim = size / 2;
        let meshes = each(mesh::<K>(size), |rank, mut mesh| {
            if rank == victim {
                return None;
            }
            let lengths = vec![100_000; size];
            let error = mesh.all_gather(tag(1), &bytes(0, 100_000), &lengths).unwrap_err();
            assert_eq!(error.peer(), Some(Rank(victim as u32)), "{error}");
            assert_eq!(mesh.exchange(&[], &mut []), Err(error), "a failed mesh stays failed");
            Some(mesh)
        });
        assert_eq!(meshes.iter().flatten().count(), size - 1);
    }
}

// Each waits for the next one, and only the last for the dead one; each gives up at once. The blame must not slide.
fn a_death_is_named_through_others<K: Kind>() {
    for size in 3..=5 {
        each(mesh::<K>(size), |rank, mut mesh| {
            if rank + 1 < size {
                let error = mesh_receive(&mut mesh, rank as u32 + 1, 1, &mut [0; 64]).unwrap_err();
                assert_eq!(error.peer(), Some(Rank(size as u32 - 1)), "{error}");
                assert!(matches!(error, FabricError::PeerLost { .. }), "{error}");
            }
        });
    }
}

// What a dead peer sent before it died still counts: the barrier may be passed on it (STEP-2).
fn words_of_the_dead_are_heard<K: Kind>() {
    let mut meshes = mesh::<K>(2);
    let mut one = meshes.pop().unwrap();
    one.exchange(
        &[Send {
            to: Rank(0),
            tag: tag(1),
            bytes: &bytes(1, 1000),
        }],
        &mut [],
    )
    .unwrap();
    drop(one);
    let mut buffer = vec![0; 1000];
    mesh_receive(&mut meshes[0], 1, 1, &mut buffer).unwrap();
    assert_eq!(buffer, bytes(1, 1000));
    let error = mesh_receive(&mut meshes[0], 1, 2, &mut buffer).unwrap_err();
    assert_eq!(error.peer(), Some(Rank(1)));
}

fn leaving_alarms_nobody_but_those_who_need_the_leaver<K: Kind>() {
    let (gone, wait) = mpsc::channel();
    let wait = std::sync::Mutex::new(wait);
    each(mesh::<K>(3), |rank, mut mesh| {
        mesh.all_gather(tag(1), &[rank as u8], &[1, 1, 1]).unwrap();
        match rank {
            2 => {
                mesh.leave();
                assert!(matches!(mesh.exchange(&[], &mut []), Err(FabricError::Aborted { .. })));
                drop(mesh);
                gone.send(()).unwrap();
            }
            1 => {
                wait.lock().unwrap().recv().unwrap();
                mesh.exchange(
                    &[Send {
                        to: Rank(0),
                        tag: tag(2),
                        bytes: b"after",
                    }],
                    &mut [],
                )
                .unwrap();
                // Rank 0 answers once it has it, so its mesh outlives the exchange.
                mesh_receive(&mut mesh, 0, 3, &mut []).unwrap();
                mesh.leave();
            }
            _ => {
                // Blocked here while rank 2 leaves.
                mesh_receive(&mut mesh, 1, 2, &mut [0; 5]).unwrap();
                mesh.exchange(
                    &[Send {
                        to: Rank(1),
                        tag: tag(3),
                        bytes: &[],
                    }],
                    &mut [],
                )
                .unwrap();
                let error = mesh_receive(&mut mesh, 2, 4, &mut [0; 1]).unwrap_err();
                assert_eq!(error.peer(), Some(Rank(2)), "{error}");
            }
        }
    });
}

fn disagreements_are_named<K: Kind>() {
    let send_one = |sent: Tag, length: usize, due: Tag, expected: usize| {
        let mut meshes = mesh::<K>(2);
        let bytes = vec![1; length];
        meshes[1]
            .exchange(
                &[Send {
                    to: Rank(0),
                    tag: sent,
                    bytes: &bytes,
                }],
                &mut [],
            )
            .unwrap();
        let mut buffer = vec![0; expected];
        let receive = Receive {
            from: Rank(1),
            tag: due,
            bytes: &mut buffer,
        };
        meshes[0].exchange(&[], &mut [receive]).unwrap_err()
    };
    let (peer, expected, received) = (Rank(1), tag(1), tag(2));
    assert_eq!(
        send_one(received, 4, expected, 4),
        FabricError::TagMismatch {
            peer,
            expected,
            received
        }
    );
    for (sent, due) in [(4, 8), (8, 4), (0, 1), (1, 0)] {
        let mismatch = FabricError::LengthMismatch {
            peer,
            tag: tag(1),
            expected: due,
            received: sent,
        };
        assert_eq!(send_one(tag(1), sent as usize, tag(1), due as usize), mismatch);
    }
}

fn a_silent_peer_is_named_when_the_limit_is_over<K: Kind>() {
    let limit = Duration::from_millis(300);
    let mut meshes = K::mesh(3, fresh_generation(), limit);
    let mut zero = meshes.remove(0);
    let thread = std::thread::spawn(move || {
        let on_cpu = || {
            let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
            Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
        };
        let before = on_cpu();
        let error = mesh_receive(&mut zero, 2, 9, &mut [0; 4]).unwrap_err();
        (error, on_cpu() - before, zero)
    });
    let (error, burnt, _zero) = thread.join().unwrap();
    let FabricError::TimedOut {
        peer,
        waited_ms,
        tag: due,
    } = error
    else {
        panic!("{error}")
    };
    assert_eq!((peer, due), (Rank(2), tag(9)));
    assert!(waited_ms >= 300);
    assert!(
        burnt < limit / 3,
        "waiting must not spin: {burnt:?} of CPU in {limit:?}"
    );
}

fn messages_to_oneself_are_copied<K: Kind>() {
    let mut meshes = mesh::<K>(1);
    let mut buffer = [0; 3];
    let receive = Receive {
        from: Rank(0),
        tag: tag(1),
        bytes: &mut buffer,
    };
    meshes[0]
        .exchange(
            &[Send {
                to: Rank(0),
                tag: tag(1),
                bytes: b"own",
            }],
            &mut [receive],
        )
        .unwrap();
    assert_eq!(&buffer, b"own");
}

macro_rules! conformance {
    ($($kind:ident as $module:ident: $tests:tt;)*) => { $(conformance!(@ $kind $module $tests);)* };
    (@ $kind:ident $module:ident { $($test:ident,)* }) => {
        mod $module {
            $(#[test] fn $test() { super::$test::<super::$kind>(); })*
        }
    };
    ($tests:tt) => { conformance! { Local as local: $tests; Unix as unix: $tests; Tcp as tcp: $tests; } };
}

conformance! {{
    random_patterns_arrive_exactly,
    all_gather_delivers_uneven_lengths_by_rank,
    large_messages_cross_in_both_directions_at_once,
    a_peer_may_be_ahead,
    abort_ends_a_blocked_call_for_good,
    an_aborted_mesh_is_over_even_if_the_data_is_there,
    a_death_is_named_by_all_who_wait,
    a_death_is_named_through_others,
    words_of_the_dead_are_heard,
    leaving_alarms_nobody_but_those_who_need_the_leaver,
    disagreements_are_named,
    a_silent_peer_is_named_when_the_limit_is_over,
    messages_to_oneself_are_copied,
}}
