//! The control plane between processes: small, checked, ordered messages over `ractor_cluster`.
//!
//! A hub: the controller's process holds one isolated session to each rank's process, on a socket of this module's own
//! (a Unix socket, or TCP on loopback). Each end has one remotable actor, the switchboard; `ractor_cluster` carries
//! its casts. Before a stream is handed over, both ends prove that they hold the run's token (keyed BLAKE3 challenge),
//! and the rank's end says who it is: (worker, incarnation).
//!
//! Invariants
//! - **SUP-2** Identity is (worker, incarnation). A newer incarnation supersedes an older one's connection; an older
//!   one, or a second connection of a living one, is refused and counted.
//! - **SUP-5** A sender holds at most [`limits::LINK_UNACKNOWLEDGED_MESSAGES_MAX`] messages and
//!   [`limits::LINK_UNACKNOWLEDGED_BYTES_MAX`] bytes that the other side has not handled (a [`Body`] counts as handled
//!   when it is dropped). Past the bound the peer is disconnected with that reason; `send` never waits.
//! - **LINK-1** Messages of one connection are delivered once, in the order sent; a gap, a malformed or an oversize
//!   frame ends the connection with a reason. Nothing of a connection is delivered after its `Disconnected`.
//! - **LINK-2** Every `Connected` is followed by exactly one `Disconnected`, unless the hub itself is closed first.
//!
//! What it does not do: it does not notice a stopped process (SIGSTOP) or one that hangs: heartbeats are the caller's.
//! It does not reconnect, and it does not keep messages for a peer that is away. Messages still under way when a
//! process *dies* may be lost with it; [`Uplink::close`] and [`Hub::close`] wait until the other side has handled them.
//! It encrypts nothing: sockets beyond one machine need a TLS stream under the same handshake.
//!
//! [`limits::LINK_UNACKNOWLEDGED_MESSAGES_MAX`]: tarazed_domain::limits::LINK_UNACKNOWLEDGED_MESSAGES_MAX
//! [`limits::LINK_UNACKNOWLEDGED_BYTES_MAX`]: tarazed_domain::limits::LINK_UNACKNOWLEDGED_BYTES_MAX

mod acceptor;
mod connection;
mod envelope;
#[doc(hidden)]
pub mod fuzzing;
mod handshake;
mod hub;
mod session;
mod socket;
mod switchboard;
#[cfg(test)]
mod tests;
mod uplink;

pub use connection::Body;
pub use hub::{Hub, start_hub};
pub use socket::Bind;
pub use uplink::{Uplink, connect_uplink};

use ractor::ActorCell;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tarazed_domain::{Incarnation, WorkerId};

/// Who is at the other end: one life of one worker.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PeerId {
    /// The stable slot.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker {} (incarnation {})", self.worker, self.incarnation)
    }
}

/// How the controller listens.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// The run's secret; both ends prove that they hold it.
    pub token: [u8; 32],
    /// Where to listen.
    pub bind: Bind,
    /// A TCP peer that acknowledges nothing for this long is disconnected (the configured failure timeout).
    pub failure: Duration,
    /// Parent of the hub's actors (SUP-1): their death climbs there with its cause.
    pub supervisor: Option<ActorCell>,
}

/// How a rank dials its controller.
#[derive(Clone, Debug)]
pub struct UplinkConfig {
    /// [`Hub::address`].
    pub address: String,
    /// The run's secret.
    pub token: [u8; 32],
    /// Who is calling.
    pub peer: PeerId,
    /// Dialling, handshake and session must be done by then; until then failures that may pass are retried.
    pub connect: Duration,
    /// As in [`HubConfig::failure`].
    pub failure: Duration,
    /// Parent of the uplink's actors (SUP-1).
    pub supervisor: Option<ActorCell>,
}

/// What a hub tells its owner, from one actor and in order.
#[derive(Debug)]
pub enum HubEvent {
    /// The peer has proved itself; `send` to it works.
    Connected(PeerId),
    /// The connection is over, and why. Fires within milliseconds of the death of the peer's process.
    Disconnected(PeerId, String),
    /// A message; dropping the body returns its credit to the sender (SUP-5).
    Message(PeerId, Body),
}

/// What an uplink tells its owner, from one actor and in order. Messages may come before [`connect_uplink`] returns.
#[derive(Debug)]
pub enum UplinkEvent {
    /// A message; dropping the body returns its credit to the sender (SUP-5).
    Message(Body),
    /// The connection is over, and why. Fires once; not after [`Uplink::close`].
    Lost(String),
}

/// The controller's way to its ranks.
pub trait ToRanks: Send + Sync {
    /// Queues one message; never waits.
    ///
    /// # Errors
    /// As [`Hub::send`].
    fn send(&self, peer: PeerId, body: Vec<u8>) -> Result<(), LinkError>;
}

impl ToRanks for Hub {
    fn send(&self, peer: PeerId, body: Vec<u8>) -> Result<(), LinkError> {
        Self::send(self, peer, body)
    }
}

/// The controller's way to its nodes.
pub trait ToNodes: Send + Sync {
    /// Queues one message; never waits.
    ///
    /// # Errors
    /// As [`Hub::send`].
    fn send(&self, peer: PeerId, body: Vec<u8>) -> Result<(), LinkError>;

    /// Ends one peer's connection.
    fn disconnect(&self, peer: PeerId, reason: &str);
}

impl ToNodes for Hub {
    fn send(&self, peer: PeerId, body: Vec<u8>) -> Result<(), LinkError> {
        Self::send(self, peer, body)
    }

    fn disconnect(&self, peer: PeerId, reason: &str) {
        Self::disconnect(self, peer, reason);
    }
}

/// A rank's way to its controller.
#[async_trait::async_trait]
pub trait ToController: Send + Sync {
    /// Queues one message; never waits.
    ///
    /// # Errors
    /// As [`Uplink::send`].
    fn send(&self, body: Vec<u8>) -> Result<(), LinkError>;

    /// Ends the connection once what was sent has been handled, or after a while.
    async fn close(self: Box<Self>);
}

#[async_trait::async_trait]
impl ToController for Uplink {
    fn send(&self, body: Vec<u8>) -> Result<(), LinkError> {
        Self::send(self, body)
    }

    async fn close(self: Box<Self>) {
        Self::close(*self).await;
    }
}

/// What can go wrong, by what the caller does next.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Try again later: the other side was not there in time.
    #[error(
        "no link to {address} within {waited_ms} ms: {cause}; check that the controller runs and that the address is its own"
    )]
    Retry {
        /// Where it dialled.
        address: String,
        /// How long it tried.
        waited_ms: u64,
        /// The last failure.
        cause: String,
    },
    /// The settings cannot work: change them.
    #[error("{what}; {remedy}")]
    Reconfigure {
        /// What is wrong.
        what: String,
        /// What to change.
        remedy: &'static str,
    },
    /// The hub does not want this process: it must end (SUP-2).
    #[error("the controller refused {peer}: {reason}; this process has been replaced and must end")]
    Halt {
        /// Who was refused.
        peer: PeerId,
        /// The hub's reason.
        reason: String,
    },
    /// There is no such connection now: drop the message, and wait for `Connected`.
    #[error("{0} is not connected; its messages are dropped until it connects")]
    Disconnected(PeerId),
    /// The peer did not handle its messages: it has just been disconnected (SUP-5).
    #[error("{peer} has left {messages} messages ({bytes} bytes) unhandled; it was disconnected")]
    Overrun {
        /// The slow peer.
        peer: PeerId,
        /// Messages it has not handled.
        messages: u64,
        /// Bytes it has not handled.
        bytes: u64,
    },
    /// A programmer's error on the sending side; the connection goes on.
    #[error(
        "a control message of {bytes} bytes is above the limit of {} (limits::CONTROL_MESSAGE_BYTES_MAX); send less, or use the data plane",
        tarazed_domain::limits::CONTROL_MESSAGE_BYTES_MAX
    )]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// The machine refused a resource (sockets, randomness, actors).
    #[error("the link cannot {what}: {source}")]
    System {
        /// The operation.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl LinkError {
    fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// What a link has counted since its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LinkCounts {
    /// Data messages sent.
    pub messages_sent: u64,
    /// Data messages delivered.
    pub messages_received: u64,
    /// Frames refused: malformed, oversize, out of order, or of a connection that is over.
    pub frames_refused: u64,
    /// Callers that did not prove themselves in time.
    pub handshakes_refused: u64,
    /// Authenticated callers refused as stale or already connected (SUP-2).
    pub identities_refused: u64,
    /// Peers disconnected for leaving too much unhandled (SUP-5).
    pub overruns: u64,
}

#[derive(Default)]
struct Counters {
    messages_sent: AtomicU64,
    messages_received: AtomicU64,
    frames_refused: AtomicU64,
    handshakes_refused: AtomicU64,
    identities_refused: AtomicU64,
    overruns: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self) -> LinkCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LinkCounts {
            messages_sent: get(&self.messages_sent),
            messages_received: get(&self.messages_received),
            frames_refused: get(&self.frames_refused),
            handshakes_refused: get(&self.handshakes_refused),
            identities_refused: get(&self.identities_refused),
            overruns: get(&self.overruns),
        }
    }
}

/// Locks a mutex whose critical sections cannot leave broken data behind, so a panic elsewhere does not poison it.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
