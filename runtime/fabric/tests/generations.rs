//! Who is let in, and what happens from one generation to the next (SUP-2).

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{PATIENCE, TOKEN, connect, connected, each, listeners, loopback, roster, tag, timeouts, until};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use tarazed_domain::{Generation, Rank};
use tarazed_fabric::{AbortHandle, Collective, FabricError, Refusal, Remedy, SocketMesh, Transport, connect_mesh};

const NOW: Generation = Generation(7);

fn works(meshes: &mut [SocketMesh]) {
    let lengths = vec![1; meshes.len()];
    let expected: Vec<Vec<u8>> = (0..meshes.len()).map(|rank| vec![rank as u8]).collect();
    each(meshes.iter_mut().collect(), |rank, mesh| {
        assert_eq!(mesh.all_gather(tag(1), &[rank as u8], &lengths).unwrap(), expected);
    });
}

/// The plain socket address behind a roster entry.
fn plain(address: &str) -> &str {
    address.strip_prefix("tcp:").unwrap()
}

#[test]
fn an_old_generations_dialer_is_refused_counted_and_disturbs_nobody() {
    let dir = tempfile::tempdir().unwrap();
    for transport in [loopback(), Transport::Unix { dir: dir.path().into() }] {
        let listeners = listeners(&transport, 2);
        let stale_listener = tarazed_fabric::Listener::bind(&transport).unwrap();
        let roster = roster(&listeners);
        let refused = AtomicBool::new(false);
        let mut meshes = std::thread::scope(|scope| {
            let zero = scope.spawn(|| connect(&listeners[0], NOW, 0, &roster, PATIENCE).unwrap());
            // It claims rank 1 in the generation before, with the right token and roster, while the slot is still free.
            let stale = scope.spawn(|| connect(&stale_listener, Generation(6), 1, &roster, PATIENCE).unwrap_err());
            let error = stale.join().unwrap();
            let expected = FabricError::StaleGeneration {
                peer: Rank(0),
                ours: Generation(6),
                theirs: NOW,
            };
            assert_eq!(error, expected);
            assert_eq!(error.remedy(), Remedy::Fenced);
            refused.store(true, Ordering::SeqCst);
            assert!(!zero.is_finished(), "the stale dialer must not have taken the slot");
            let one = connect(&listeners[1], NOW, 1, &roster, PATIENCE).unwrap();
            vec![zero.join().unwrap(), one]
        });
        assert_eq!(listeners[0].refusals().get(Refusal::StaleGeneration), 1);
        works(&mut meshes);
    }
}

#[test]
fn a_wrong_token_is_refused_and_the_right_one_still_enters() {
    let listeners = listeners(&loopback(), 2);
    let roster = roster(&listeners);
    let mut meshes = std::thread::scope(|scope| {
        let zero = scope.spawn(|| connect(&listeners[0], NOW, 0, &roster, PATIENCE).unwrap());
        let abort = AbortHandle::new(NOW).unwrap();
        let error = connect_mesh(
            &listeners[1],
            NOW,
            Rank(1),
            &roster,
            [1; 32],
            &timeouts(PATIENCE),
            &abort,
        );
        let FabricError::Refused { peer, reason, .. } = error.unwrap_err() else {
            panic!("not refused")
        };
        assert_eq!(peer, Rank(0));
        assert!(reason.contains("token"), "{reason}");
        let one = connect(&listeners[1], NOW, 1, &roster, PATIENCE).unwrap();
        vec![zero.join().unwrap(), one]
    });
    assert_eq!(listeners[0].refusals().get(Refusal::Unauthenticated), 1);
    works(&mut meshes);
}

#[test]
fn another_roster_is_refused() {
    let listeners = listeners(&loopback(), 2);
    let roster = roster(&listeners);
    let abort = AbortHandle::new(NOW).unwrap();
    std::thread::scope(|scope| {
        let zero = scope.spawn(|| {
            connect_mesh(&listeners[0], NOW, Rank(0), &roster, TOKEN, &timeouts(PATIENCE), &abort).unwrap_err()
        });
        let other = [roster[0].clone(), "tcp:127.0.0.1:9".to_owned()];
        let error = connect(&listeners[1], NOW, 1, &other, PATIENCE).unwrap_err();
        assert!(matches!(error, FabricError::Refused { peer: Rank(0), .. }), "{error}");
        abort.abort();
        assert_eq!(zero.join().unwrap(), FabricError::Aborted { generation: NOW });
    });
    assert_eq!(listeners[0].refusals().get(Refusal::Roster), 1);
}

#[test]
fn garbage_to_the_listener_is_ignored() {
    let listeners = listeners(&loopback(), 2);
    let roster = roster(&listeners);
    let mut meshes = std::thread::scope(|scope| {
        let zero = scope.spawn(|| connect(&listeners[0], NOW, 0, &roster, PATIENCE).unwrap());
        let address = plain(&roster[0]);
        let mut request = TcpStream::connect(address).unwrap();
        request.write_all(&b"GET / HTTP/1.1\r\n".repeat(100)).unwrap();
        let mut answer = Vec::new();
        // Closed without a word, with or without a reset.
        let _ = request.read_to_end(&mut answer);
        assert!(answer.is_empty());
        let mut truncated = TcpStream::connect(address).unwrap();
        truncated.write_all(b"TZHS").unwrap();
        drop(truncated);
        drop(TcpStream::connect(address).unwrap());
        // Stays open and silent: must not keep anyone out.
        let silent = TcpStream::connect(address).unwrap();
        until("three refusals", || listeners[0].refusals().get(Refusal::Garbage) == 3);
        let one = connect(&listeners[1], NOW, 1, &roster, PATIENCE).unwrap();
        let meshes = vec![zero.join().unwrap(), one];
        drop(silent);
        meshes
    });
    works(&mut meshes);
}

// A flood of silent connections pushes out the oldest silent ones, never the memory and never a peer.
#[test]
fn a_flood_of_silent_connections_keeps_nobody_out() {
    let listeners = listeners(&loopback(), 2);
    let roster = roster(&listeners);
    let mut meshes = std::thread::scope(|scope| {
        let zero = scope.spawn(|| connect(&listeners[0], NOW, 0, &roster, PATIENCE).unwrap());
        let flood: Vec<TcpStream> = (0..300)
            .map(|_| TcpStream::connect(plain(&roster[0])).unwrap())
            .collect();
        until("some pushed out", || listeners[0].refusals().get(Refusal::Slow) >= 200);
        let one = connect(&listeners[1], NOW, 1, &roster, PATIENCE).unwrap();
        drop(flood);
        vec![zero.join().unwrap(), one]
    });
    works(&mut meshes);
}

#[test]
fn a_rank_that_is_ahead_waits_for_those_behind() {
    let listeners = listeners(&loopback(), 2);
    let roster = roster(&listeners);
    let old = AbortHandle::new(Generation(6)).unwrap();
    let mut meshes = std::thread::scope(|scope| {
        let behind = scope.spawn(|| {
            let timeouts = timeouts(PATIENCE);
            let fenced = connect_mesh(&listeners[0], Generation(6), Rank(0), &roster, TOKEN, &timeouts, &old);
            assert_eq!(
                fenced.unwrap_err(),
                FabricError::Aborted {
                    generation: Generation(6)
                }
            );
            connect(&listeners[0], NOW, 0, &roster, PATIENCE).unwrap()
        });
        let ahead = scope.spawn(|| connect(&listeners[1], NOW, 1, &roster, PATIENCE).unwrap());
        until("turned away", || {
            listeners[0].refusals().get(Refusal::FutureGeneration) > 0
        });
        old.abort();
        vec![behind.join().unwrap(), ahead.join().unwrap()]
    });
    works(&mut meshes);
}

#[test]
fn the_next_generation_is_built_on_the_same_listeners_after_an_abort() {
    let dir = tempfile::tempdir().unwrap();
    for transport in [loopback(), Transport::Unix { dir: dir.path().into() }] {
        let listeners = listeners(&transport, 4);
        let mut first = connected(&listeners, NOW, PATIENCE);
        works(&mut first);
        let handles: Vec<AbortHandle> = first.iter().map(Collective::abort_handle).collect();
        let blocked = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                each(first, |_, mut mesh| {
                    // Everyone waits for rank 3, which sends nothing.
                    let mut buffer = [0; 8];
                    let receive = tarazed_fabric::Receive {
                        from: Rank(3),
                        tag: tag(9),
                        bytes: &mut buffer,
                    };
                    let outcome = if mesh.rank() == Rank(3) {
                        Ok(())
                    } else {
                        mesh.exchange(&[], &mut [receive])
                    };
                    (outcome, mesh)
                })
            });
            handles.iter().for_each(AbortHandle::abort);
            thread.join().unwrap()
        });
        for (rank, (outcome, _)) in blocked.iter().enumerate() {
            let expected = if rank == 3 {
                Ok(())
            } else {
                Err(FabricError::Aborted { generation: NOW })
            };
            assert_eq!(*outcome, expected, "rank {rank}");
        }
        // The old meshes are still there while the new one is built, without rank 3, then with all.
        let mut smaller = connected(&listeners[..3], NOW.next(), PATIENCE);
        works(&mut smaller);
        let mut whole = connected(&listeners, NOW.next().next(), PATIENCE);
        works(&mut whole);
        drop(blocked);
        works(&mut whole);
        works(&mut smaller);
    }
}

#[test]
fn connecting_can_be_aborted_and_names_who_is_missing_when_time_is_over() {
    let listeners = listeners(&loopback(), 3);
    let roster = roster(&listeners);
    let abort = AbortHandle::new(NOW).unwrap();
    std::thread::scope(|scope| {
        let thread =
            scope.spawn(|| connect_mesh(&listeners[1], NOW, Rank(1), &roster, TOKEN, &timeouts(PATIENCE), &abort));
        abort.abort();
        assert_eq!(
            thread.join().unwrap().unwrap_err(),
            FabricError::Aborted { generation: NOW }
        );
    });
    let short = tarazed_domain::limits::Timeouts {
        connect_ms: 200,
        ..timeouts(PATIENCE)
    };
    let abort = AbortHandle::new(NOW).unwrap();
    let error = connect_mesh(&listeners[1], NOW, Rank(1), &roster, TOKEN, &short, &abort).unwrap_err();
    let FabricError::ConnectTimedOut { missing, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(missing, [Rank(0), Rank(2)]);
}
