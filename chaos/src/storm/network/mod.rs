//! The network between the processes of a run, as TCP proxies: one port in front of each worker's data plane, one in front
//! of the controller's hub, and a condition for each directed way between two of them.
//!
//! - Bytes are passed on as they are unless a way's condition says otherwise.
//! - A connection that has lost bytes never carries any again, nor does its end show while the way is cut: that is what a
//!   partition does to a TCP connection, seen from its ends. One made after the way was mended is clean.
//! - Who dials is read, not guessed: on the data plane from the kernel's socket table (the hello names a rank of one
//!   generation, and a rank says nothing of the worker), at the hub from the worker in the link's hello.
//!
//! It does not reorder or duplicate: TCP would not let that show.

mod pump;

use super::processes::Processes;
use pump::Connection;
use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::path::Path;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Lives of the controller whose ports differ: a rank that outlives its controller keeps its port for a while.
const PORT_SETS: u16 = 8;
/// Between the first ports of two sets.
const PORTS_PER_SET: u16 = 32;
/// Ports are looked for here: below those that the system gives to dialing sockets, which could be in the way of a restart.
const PORTS: std::ops::Range<u16> = 12_000..30_000;
/// Bytes of a dialing worker's first message on the control link up to and with its worker: magic, worker.
const LINK_HELLO_BYTES: usize = 12;

/// A directed way between two processes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Way {
    /// Data plane, from one worker to another.
    Mesh(u32, u32),
    /// Control plane, from a worker to the controller.
    Up(u32),
    /// Control plane, from the controller to a worker.
    Down(u32),
}

/// What happens to bytes on a way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Condition {
    /// They vanish; connections stay open.
    Cut,
    /// Each piece comes later, in milliseconds.
    Delay(u64),
    /// They come at this rate, in bytes a second.
    Throttle(u64),
    /// One bit of the next piece is flipped, once.
    FlipBit,
}

/// What all connections look at.
struct Shared {
    processes: Mutex<Processes>,
    conditions: Mutex<BTreeMap<Way, Condition>>,
    /// Counts changes of conditions and resets, so that idle connections look too.
    changes: watch::Sender<u64>,
    live: Mutex<BTreeMap<u64, (Way, watch::Sender<bool>)>>,
    next: AtomicU64,
    /// First port of the workers' own listeners, and the hub's.
    mesh: AtomicU16,
    control: AtomicU16,
    /// Pieces that a condition has changed, by way.
    hits: Mutex<BTreeMap<Way, u64>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The proxies of a storm.
#[derive(Clone)]
pub struct Network {
    shared: Arc<Shared>,
    /// First of the ports that are dialed.
    front: u16,
    first: u16,
    ranks: u16,
}

impl Network {
    /// Listens in front of `ranks` workers and one hub.
    ///
    /// # Errors
    /// If there are no ports.
    pub async fn start(run_dir: &Path, ranks: u16) -> Result<Self, String> {
        let (first, listeners) = find_ports(ranks)?;
        let shared = Arc::new(Shared {
            processes: Mutex::new(Processes::of(run_dir)),
            conditions: Mutex::default(),
            changes: watch::Sender::new(0),
            live: Mutex::default(),
            next: AtomicU64::new(0),
            mesh: AtomicU16::new(first + PORTS_PER_SET),
            control: AtomicU16::new(first + PORTS_PER_SET + ranks),
            hits: Mutex::default(),
        });
        for (index, listener) in listeners.into_iter().enumerate() {
            let listener = TcpListener::from_std(listener).map_err(|e| format!("a proxy's listener: {e}"))?;
            let worker = u32::try_from(index).unwrap_or(u32::MAX);
            let mesh = (worker < u32::from(ranks)).then_some(worker);
            tokio::spawn(serve(Arc::clone(&shared), listener, mesh));
        }
        Ok(Self {
            shared,
            front: first,
            first,
            ranks,
        })
    }

    /// From now on it stands before the life with this number, whose config keys these are.
    #[must_use]
    pub fn lead_to(&self, life: u64, run_dir: &Path) -> Vec<String> {
        let set = u16::try_from(life % u64::from(PORT_SETS)).unwrap_or(0);
        let mesh = self.first + PORTS_PER_SET * (1 + set);
        let control = mesh + self.ranks;
        *lock(&self.shared.processes) = Processes::of(run_dir);
        self.shared.mesh.store(mesh, Ordering::SeqCst);
        self.shared.control.store(control, Ordering::SeqCst);
        let front = self.front;
        vec![
            "cluster.transport=\"tcp\"".to_owned(),
            format!("cluster.mesh_port={mesh}"),
            format!("cluster.mesh_advertise_port={front}"),
            format!("cluster.control_port={control}"),
            format!("cluster.control_advertise_port={}", front + self.ranks),
        ]
    }

    /// Puts a way into a condition, or mends it.
    pub fn set(&self, way: Way, condition: Option<Condition>) {
        let mut conditions = lock(&self.shared.conditions);
        match condition {
            Some(condition) => drop(conditions.insert(way, condition)),
            None => drop(conditions.remove(&way)),
        }
        drop(conditions);
        self.shared.changes.send_modify(|count| *count += 1);
    }

    /// Mends every way.
    pub fn mend_all(&self) {
        lock(&self.shared.conditions).clear();
        self.shared.changes.send_modify(|count| *count += 1);
    }

    /// Resets the living connections that carry this way; how many there were.
    pub fn reset(&self, way: Way) -> usize {
        let live = lock(&self.shared.live);
        let carrying = live.values().filter(|(found, _)| *found == way || *found == back(way));
        carrying.filter(|(_, reset)| reset.send(true).is_ok()).count()
    }

    /// Ways with a connection, dialer first, in order.
    #[must_use]
    pub fn live(&self) -> Vec<Way> {
        let mut ways: Vec<Way> = lock(&self.shared.live).values().map(|(way, _)| *way).collect();
        ways.sort_unstable();
        ways.dedup();
        ways
    }

    /// Pieces that conditions have changed on a way so far.
    #[must_use]
    pub fn hits(&self, way: Way) -> u64 {
        lock(&self.shared.hits).get(&way).copied().unwrap_or(0)
    }
}

/// The other direction.
#[must_use]
pub const fn back(way: Way) -> Way {
    match way {
        Way::Mesh(from, to) => Way::Mesh(to, from),
        Way::Up(worker) => Way::Down(worker),
        Way::Down(worker) => Way::Up(worker),
    }
}

/// A run of ports that are free now: those in front, taken at once, and the sets behind.
fn find_ports(ranks: u16) -> Result<(u16, Vec<StdListener>), String> {
    let needed = PORTS_PER_SET * (1 + PORT_SETS);
    let at = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    // Storms beside each other begin to look at different places.
    let places = usize::from((PORTS.end - PORTS.start) / needed);
    let begin = std::process::id() as usize % places;
    for place in 0..places {
        let first = PORTS.start + needed * u16::try_from((begin + place) % places).unwrap_or(0);
        let front: io::Result<Vec<_>> = (first..=first + ranks)
            .map(|port| StdListener::bind(at(port)))
            .collect();
        let Ok(front) = front else { continue };
        let mut behind = first + PORTS_PER_SET..first + needed;
        if behind.all(|port| StdListener::bind(at(port)).is_ok()) {
            for listener in &front {
                listener.set_nonblocking(true).map_err(|e| e.to_string())?;
            }
            return Ok((first, front));
        }
    }
    Err(format!("no {needed} free ports in a row in {PORTS:?}"))
}

/// Accepts for one worker's data plane, or for the hub.
async fn serve(shared: Arc<Shared>, listener: TcpListener, mesh: Option<u32>) {
    loop {
        let Ok((dialer, from)) = listener.accept().await else {
            // Out of descriptors, which pass; without a pause this would spin.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            continue;
        };
        tokio::spawn(connect(Arc::clone(&shared), dialer, from.port(), mesh));
    }
}

/// Finds out who dials, and joins the two ends. A caller that cannot be named, or whose goal does not listen, is reset:
/// what it would see without a proxy.
async fn connect(shared: Arc<Shared>, dialer: TcpStream, port: u16, mesh: Option<u32>) {
    let base = match mesh {
        Some(worker) => shared.mesh.load(Ordering::SeqCst) + u16::try_from(worker).unwrap_or(0),
        None => shared.control.load(Ordering::SeqCst),
    };
    let goal = TcpStream::connect((Ipv4Addr::LOCALHOST, base)).await;
    let way = match mesh {
        Some(to) => {
            let processes = lock(&shared.processes).clone();
            let found = tokio::task::spawn_blocking(move || processes.owner_of_port(port)).await;
            found.ok().flatten().map(|rank| Way::Mesh(rank.worker, to))
        }
        None => hub_caller(&dialer).await.map(Way::Up),
    };
    let (Ok(goal), Some(way)) = (goal, way) else {
        // Both ends close with an error.
        let _ = dialer.set_zero_linger();
        return;
    };
    let _ = dialer.set_nodelay(true);
    let _ = goal.set_nodelay(true);
    Connection { shared, way }.run(dialer, goal).await;
}

/// The worker in the first message on the control link, which is left where it is.
async fn hub_caller(dialer: &TcpStream) -> Option<u32> {
    let mut hello = [0; LINK_HELLO_BYTES];
    loop {
        let seen = dialer.peek(&mut hello).await.ok()?;
        if seen == LINK_HELLO_BYTES {
            break;
        } else if seen == 0 {
            return None;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    hello.starts_with(b"tarazed").then_some(())?;
    let worker: [u8; 4] = hello[8..].try_into().ok()?;
    Some(u32::from_le_bytes(worker))
}

#[cfg(test)]
mod tests;
