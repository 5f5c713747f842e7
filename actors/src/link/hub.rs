//! The controller's end.

use super::handshake::{cookie, random};
use super::socket::Listener;
use super::switchboard::{Live, SwitchMessage, Switchboard, SwitchboardArguments};
use super::{Counters, HubConfig, HubEvent, LinkCounts, LinkError, PeerId, lock};
use ractor::{Actor, ActorCell, ActorRef};
use std::sync::Arc;
use std::time::Duration;
use tarazed_domain::limits::LINK_CLOSE_MS_MAX;
use tokio::task::JoinSet;

/// The controller's end of the control plane. Dropping it ends every connection at once.
pub struct Hub {
    address: String,
    switchboard: Switch,
    live: Live,
    counters: Arc<Counters>,
}

/// Listens. `events` is called from the hub's own actor, in order, and must not block: it should post a message.
///
/// # Errors
/// `Reconfigure` if the address cannot work or another controller holds it; `System` if the machine refuses.
pub async fn start_hub(config: HubConfig, events: impl Fn(HubEvent) + Send + Sync + 'static) -> Result<Hub, LinkError> {
    let (listener, address) = Listener::bind(&config.bind).await?;
    let live = Live::default();
    let counters = Arc::new(Counters::default());
    let arguments = SwitchboardArguments {
        events: Box::new(events),
        live: Arc::clone(&live),
        counters: Arc::clone(&counters),
        accept: Some((listener, config.token, config.failure)),
    };
    let switchboard = spawn_switchboard("hub", &config.token, arguments, config.supervisor).await?;
    Ok(Hub {
        address,
        switchboard,
        live,
        counters,
    })
}

/// A link end's actor; it ends with this handle, also when a dial is abandoned half-way.
pub(super) struct Switch(pub ActorRef<SwitchMessage>);

impl Drop for Switch {
    fn drop(&mut self) {
        self.0.stop(None);
    }
}

/// Spawns a link end under a name that no other link end has, in this process or elsewhere.
pub(super) async fn spawn_switchboard(
    role: &str,
    token: &[u8; 32],
    arguments: SwitchboardArguments,
    supervisor: Option<ActorCell>,
) -> Result<Switch, LinkError> {
    let nonce = random::<16>().map_err(|e| LinkError::system("draw random bytes", e))?;
    let switchboard = Switchboard {
        cookie: cookie(token),
        name: format!("tarazed-{role}-{:032x}", u128::from_le_bytes(nonce)),
    };
    let spawned = match supervisor {
        Some(parent) => Actor::spawn_linked(None, switchboard, arguments, parent).await,
        None => Actor::spawn(None, switchboard, arguments).await,
    };
    let (actor, _) = spawned.map_err(|e| LinkError::system("start its actors", std::io::Error::other(e)))?;
    Ok(Switch(actor))
}

impl Hub {
    /// Where ranks dial: `unix:/path` or `tcp:127.0.0.1:1234`.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Queues one message to a peer; never waits. Messages to one peer arrive in the order of these calls.
    ///
    /// # Errors
    /// `Disconnected` if that very incarnation is not connected, `TooLarge`, or `Overrun`: then the peer was
    /// disconnected just now, and `HubEvent::Disconnected` follows (SUP-5).
    pub fn send(&self, peer: PeerId, body: Vec<u8>) -> Result<(), LinkError> {
        let connection = lock(&self.live).get(&peer).cloned();
        connection.ok_or(LinkError::Disconnected(peer))?.send(body)
    }

    /// Ends one peer's connection; `HubEvent::Disconnected` with this reason follows.
    pub fn disconnect(&self, peer: PeerId, reason: &str) {
        let connection = lock(&self.live).get(&peer).cloned();
        if let Some(connection) = connection {
            connection.cut(reason);
        }
    }

    /// Who is connected now, in order.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerId> {
        let mut peers: Vec<PeerId> = lock(&self.live).keys().copied().collect();
        peers.sort_unstable();
        peers
    }

    /// What has been counted so far.
    #[must_use]
    pub fn counts(&self) -> LinkCounts {
        self.counters.read()
    }

    /// Waits until the peers have handled what was sent (at most [`LINK_CLOSE_MS_MAX`]), then ends every connection.
    /// No event follows; the address is free on return.
    pub async fn close(self) {
        let limit = Duration::from_millis(LINK_CLOSE_MS_MAX);
        let connections: Vec<_> = lock(&self.live).values().cloned().collect();
        let mut settling = JoinSet::new();
        for connection in connections {
            settling.spawn(async move {
                if !connection.settle(limit).await {
                    tracing::warn!(peer = %connection.peer, "closed before it had handled everything");
                }
            });
        }
        while settling.join_next().await.is_some() {}
        // An error means that it is gone already.
        let _ = self.switchboard.0.stop_and_wait(None, Some(limit * 2)).await;
    }
}
