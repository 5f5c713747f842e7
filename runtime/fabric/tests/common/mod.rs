//! What the suites share: meshes of every kind, and one thread per rank.

#![allow(dead_code, reason = "each suite uses its part")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Generation, Rank};
use tarazed_fabric::{
    AbortHandle, Collective, FabricError, Listener, LocalMesh, SocketMesh, Tag, TagKind, Transport, connect_mesh,
    local_mesh,
};

pub const TOKEN: [u8; 32] = [0x5a; 32];
/// Long enough that it never ends a test that is going to pass.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub fn tag(item: u64) -> Tag {
    Tag::new(TagKind::Probe, 1, item)
}

pub fn timeouts(stall: Duration) -> Timeouts {
    Timeouts {
        connect_ms: 120_000,
        collective_ms: stall.as_millis() as u64,
        ..Timeouts::derive(60_000)
    }
}

/// Reproducible bytes.
pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

/// A way to make meshes.
pub trait Kind {
    type Mesh: Collective + 'static;
    fn mesh(world_size: usize, generation: Generation, stall: Duration) -> Vec<Self::Mesh>;
}

pub struct Local;
pub struct Unix;
pub struct Tcp;

impl Kind for Local {
    type Mesh = LocalMesh;
    fn mesh(world_size: usize, generation: Generation, stall: Duration) -> Vec<LocalMesh> {
        local_mesh(world_size, generation)
            .into_iter()
            .map(|mesh| mesh.with_stall_limit(stall))
            .collect()
    }
}

impl Kind for Unix {
    type Mesh = SocketMesh;
    fn mesh(world_size: usize, generation: Generation, stall: Duration) -> Vec<SocketMesh> {
        let dir = tempfile::tempdir().unwrap();
        let listeners = listeners(&Transport::Unix { dir: dir.path().into() }, world_size);
        connected(&listeners, generation, stall)
    }
}

impl Kind for Tcp {
    type Mesh = SocketMesh;
    fn mesh(world_size: usize, generation: Generation, stall: Duration) -> Vec<SocketMesh> {
        let listeners = listeners(&loopback(), world_size);
        connected(&listeners, generation, stall)
    }
}

pub fn loopback() -> Transport {
    Transport::Tcp {
        ip: "127.0.0.1".parse().unwrap(),
    }
}

pub fn listeners(transport: &Transport, world_size: usize) -> Vec<Listener> {
    (0..world_size).map(|_| Listener::bind(transport).unwrap()).collect()
}

pub fn roster(listeners: &[Listener]) -> Vec<String> {
    listeners.iter().map(Listener::address).collect()
}

pub fn connected(listeners: &[Listener], generation: Generation, stall: Duration) -> Vec<SocketMesh> {
    let roster = roster(listeners);
    each((0..listeners.len()).collect(), |rank, _| {
        connect(&listeners[rank], generation, rank, &roster, stall).unwrap()
    })
}

pub fn connect(
    listener: &Listener,
    generation: Generation,
    rank: usize,
    roster: &[String],
    stall: Duration,
) -> Result<SocketMesh, FabricError> {
    let abort = AbortHandle::new(generation).unwrap();
    connect_mesh(
        listener,
        generation,
        Rank(rank as u32),
        roster,
        TOKEN,
        &timeouts(stall),
        &abort,
    )
}

/// Runs `work` on one thread per item and returns the results in order; a panic of any is the test's.
pub fn each<T: Send, R: Send>(items: Vec<T>, work: impl Fn(usize, T) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = items
            .into_iter()
            .enumerate()
            .map(|(index, item)| scope.spawn(move || work(index, item)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Waits for a condition that another thread brings about.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never happened: {what}");
        std::thread::yield_now();
    }
}

pub fn fresh_generation() -> Generation {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    Generation(NEXT.fetch_add(1, Ordering::Relaxed))
}
