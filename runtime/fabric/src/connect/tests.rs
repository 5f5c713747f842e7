//! Connecting, against peers that do the handshake by hand: so that a test knows the moment a slot is taken.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;
use crate::{Refusal, Transport};
use std::io::{Read, Write};
use std::net::TcpStream;

const NOW: Generation = Generation(3);
const TOKEN: [u8; 32] = [8; 32];

struct Stage {
    listener: Listener,
    roster: Vec<String>,
    key: HandshakeKey,
    abort: AbortHandle,
}

impl Stage {
    /// Rank 0 of a world of three, whose other ranks are played by the test.
    fn new() -> Self {
        let listener = Listener::bind(&Transport::Tcp {
            ip: "127.0.0.1".parse().unwrap(),
        })
        .unwrap();
        let roster = vec![listener.address(), "tcp:127.0.0.1:1".into(), "tcp:127.0.0.1:2".into()];
        let abort = AbortHandle::new(NOW).unwrap();
        Self {
            listener,
            roster,
            key: HandshakeKey::derive(&TOKEN),
            abort,
        }
    }

    fn connect(&self) -> Result<SocketMesh, FabricError> {
        let timeouts = Timeouts::derive(120_000);
        connect_mesh(
            &self.listener,
            NOW,
            Rank(0),
            &self.roster,
            TOKEN,
            &timeouts,
            &self.abort,
        )
    }

    fn dial(&self) -> TcpStream {
        TcpStream::connect(self.roster[0].strip_prefix("tcp:").unwrap()).unwrap()
    }

    fn hello(&self, from: u32) -> [u8; HELLO_BYTES] {
        let hello = Hello {
            generation: NOW,
            from: Rank(from),
            to: Rank(0),
            world_size: 3,
            roster: roster_digest(&self.roster),
            nonce: [from as u8; 32],
        };
        hello.encode(&self.key)
    }

    fn reply(&self, socket: &mut TcpStream, hello: &[u8; HELLO_BYTES]) -> Reply {
        let mut bytes = [0; REPLY_BYTES];
        socket.read_exact(&mut bytes).unwrap();
        let (reply, authentic) = Reply::decode(&self.key, hello, &bytes).unwrap();
        assert!(authentic);
        reply
    }

    /// The whole handshake; returns when the slot is taken.
    fn enter(&self, from: u32) -> TcpStream {
        let mut socket = self.dial();
        let hello = self.hello(from);
        socket.write_all(&hello).unwrap();
        let challenge = self.reply(&mut socket, &hello);
        assert_eq!(challenge.status, Status::Challenge);
        socket.write_all(&proof(&self.key, &hello, &challenge.nonce)).unwrap();
        assert_eq!(self.reply(&mut socket, &hello).status, Status::Accepted);
        socket
    }
}

#[test]
fn a_connected_peer_that_dies_while_others_connect_is_named_at_once() {
    let stage = Stage::new();
    std::thread::scope(|scope| {
        let zero = scope.spawn(|| stage.connect().unwrap_err());
        drop(stage.enter(1));
        let error = zero.join().unwrap();
        assert!(matches!(error, FabricError::PeerLost { peer: Rank(1), .. }), "{error}");
    });
}

#[test]
fn a_peer_that_dials_again_replaces_its_older_connection() {
    let stage = Stage::new();
    std::thread::scope(|scope| {
        let zero = scope.spawn(|| stage.connect().unwrap());
        let mut first = stage.enter(1);
        let second = stage.enter(1);
        // The older one is closed, and its end is not taken for the peer's.
        assert_eq!(first.read(&mut [0]).unwrap(), 0);
        drop(first);
        let third = stage.enter(2);
        drop(zero.join().unwrap());
        drop((second, third));
    });
}

#[test]
fn a_recorded_handshake_does_not_open_the_door() {
    let stage = Stage::new();
    std::thread::scope(|scope| {
        let zero = scope.spawn(|| stage.connect());
        let hello = stage.hello(1);
        let mut honest = stage.dial();
        honest.write_all(&hello).unwrap();
        let challenge = stage.reply(&mut honest, &hello);
        let recorded = proof(&stage.key, &hello, &challenge.nonce);
        let mut replayed = stage.dial();
        replayed.write_all(&hello).unwrap();
        assert_ne!(stage.reply(&mut replayed, &hello).nonce, challenge.nonce);
        replayed.write_all(&recorded).unwrap();
        assert_eq!(replayed.read(&mut [0]).unwrap(), 0, "closed without a word");
        assert_eq!(stage.listener.refusals().get(Refusal::Unauthenticated), 1);
        stage.abort.abort();
        assert_eq!(
            zero.join().unwrap().unwrap_err(),
            FabricError::Aborted { generation: NOW }
        );
    });
}

#[test]
fn a_dialer_believes_no_listener_without_the_token() {
    let impostor = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", impostor.local_addr().unwrap());
    let listener = Listener::bind(&Transport::Tcp {
        ip: "127.0.0.1".parse().unwrap(),
    })
    .unwrap();
    let roster = [address, listener.address()];
    let abort = AbortHandle::new(NOW).unwrap();
    std::thread::scope(|scope| {
        let one = scope.spawn(|| {
            let timeouts = Timeouts::derive(120_000);
            connect_mesh(&listener, NOW, Rank(1), &roster, TOKEN, &timeouts, &abort).unwrap_err()
        });
        let (mut socket, _) = impostor.accept().unwrap();
        let mut hello = [0; HELLO_BYTES];
        socket.read_exact(&mut hello).unwrap();
        let reply = Reply {
            status: Status::Challenge,
            generation: NOW,
            nonce: [0; 32],
        };
        socket
            .write_all(&reply.encode(&HandshakeKey::derive(&[9; 32]), &hello))
            .unwrap();
        let error = one.join().unwrap();
        assert!(matches!(error, FabricError::Refused { peer: Rank(0), .. }), "{error}");
    });
}
