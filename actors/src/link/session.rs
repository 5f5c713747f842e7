//! The parent of the `ractor_cluster` sessions of one link end.
//!
//! It stands where `ractor_cluster::NodeServer` would, and speaks its message type. That one always opens a listener
//! of its own (by default on every interface) and elects between sessions by node name; here the sockets are ours and
//! the identity was settled by the handshake, so no session ever competes with another.

use super::switchboard::SwitchMessage;
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use ractor_cluster::node::{NodeConnectionMode, SessionCheckReply};
use ractor_cluster::{ClusterBidiStream, NetworkStream, NodeServerMessage, NodeSession, NodeSessionMessage};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use tarazed_domain::limits::CONTROL_MESSAGE_BYTES_MAX;

/// Room for the cluster layer's own fields around one of our frames.
const CLUSTER_OVERHEAD_BYTES: u64 = 1024;

/// Node ids are half of a remote actor's identity, and one process may hold several links.
static NODE_IDS: AtomicU64 = AtomicU64::new(0);

/// What a stream is, as the label that comes with it: `connection/endpoint`, both hexadecimal.
pub(super) fn label(connection: u64, endpoint: u64) -> String {
    format!("{connection:016x}/{endpoint:x}")
}

fn parse_label(label: &str) -> Option<(u64, u64)> {
    let (connection, endpoint) = label.split_once('/')?;
    Some((
        u64::from_str_radix(connection, 16).ok()?,
        u64::from_str_radix(endpoint, 16).ok()?,
    ))
}

pub(super) struct SessionHost {
    pub switchboard: ActorRef<SwitchMessage>,
    pub cookie: String,
    /// Unique among all link ends: the cluster layer takes an equal name for a connection to itself.
    pub name: String,
}

struct Session {
    actor: ActorRef<NodeSessionMessage>,
    connection: u64,
    /// The other switchboard's id in its own process.
    endpoint: u64,
}

pub(super) struct SessionHostState {
    sessions: HashMap<ActorId, Session>,
}

/// The cluster layer's name type is not exported; a message that carries one tells the compiler which it is.
fn default_of<T: Default>(_: impl FnOnce(T) -> NodeServerMessage) -> T {
    T::default()
}

impl SessionHost {
    async fn open(
        &self,
        myself: &ActorRef<NodeServerMessage>,
        stream: Box<dyn ClusterBidiStream>,
        is_server: bool,
    ) -> Result<(ActorId, Session), ActorProcessingErr> {
        let label = stream.peer_label().unwrap_or_default();
        let (connection, endpoint) = parse_label(&label).ok_or("a stream without a connection label")?;
        let mut name = default_of(|name| NodeServerMessage::UpdateSession {
            actor_id: ActorId::Local(0),
            name,
        });
        name.name.clone_from(&self.name);
        name.connection_string.clone_from(&self.name);
        let session = NodeSession::new(
            NODE_IDS.fetch_add(1, Ordering::Relaxed),
            is_server,
            self.cookie.clone(),
            myself.clone(),
            name,
            NodeConnectionMode::Isolated,
        )
        .with_max_inbound_frame_size(CONTROL_MESSAGE_BYTES_MAX as u64 + CLUSTER_OVERHEAD_BYTES);
        let (reader, writer) = stream.split();
        let network = NetworkStream::External {
            peer_label: Some(label),
            local_label: None,
            reader,
            writer,
        };
        match Actor::spawn_linked(None, session, network, myself.get_cell()).await {
            Ok((actor, _)) => Ok((
                actor.get_id(),
                Session {
                    actor,
                    connection,
                    endpoint,
                },
            )),
            Err(error) => {
                self.down(connection, format!("its session could not start: {error}"));
                Err(error.into())
            }
        }
    }

    fn ready(&self, session: &Session) {
        // The peer announced its remotable actors before it said that it is ready: the one it named in the handshake
        // is a child of the session by now. No name registry and no process group takes part.
        let remote = session
            .actor
            .get_children()
            .into_iter()
            .find(|child| matches!(child.get_id(), ActorId::Remote { pid, .. } if pid == session.endpoint));
        match remote {
            Some(cell) => {
                let ready = SwitchMessage::Ready {
                    connection: session.connection,
                    remote: ActorRef::from(cell),
                };
                // A switchboard that is gone stops this actor too.
                let _ = self.switchboard.cast(ready);
            }
            None => session
                .actor
                .stop(Some("the peer has not announced its switchboard".to_owned())),
        }
    }

    fn down(&self, connection: u64, reason: String) {
        let _ = self.switchboard.cast(SwitchMessage::Down { connection, reason });
    }

    fn ended(&self, state: &mut SessionHostState, actor: &ActorCell, reason: String) {
        if let Some(session) = state.sessions.remove(&actor.get_id()) {
            self.down(session.connection, reason);
        }
    }
}

impl Actor for SessionHost {
    type Msg = NodeServerMessage;
    type State = SessionHostState;
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<Self::Msg>, (): ()) -> Result<Self::State, ActorProcessingErr> {
        Ok(SessionHostState {
            sessions: HashMap::new(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            NodeServerMessage::ConnectionOpenedExternal { stream, is_server } => {
                match self.open(&myself, stream, is_server).await {
                    Ok((id, session)) => drop(state.sessions.insert(id, session)),
                    Err(error) => tracing::warn!(%error, "a link session could not be opened"),
                }
            }
            NodeServerMessage::ConnectionReady(id) => {
                if let Some(session) = state.sessions.get(&id) {
                    self.ready(session);
                }
            }
            // A session asks whether it may live; the handshake has decided that.
            NodeServerMessage::CheckSession { reply, .. } => {
                let _ = reply.send(SessionCheckReply::NoOtherConnection);
            }
            NodeServerMessage::GetSessions(reply) => {
                let _ = reply.send(HashMap::new());
            }
            NodeServerMessage::ConnectionOpened { .. }
            | NodeServerMessage::ConnectionAuthenticated(_)
            | NodeServerMessage::UpdateSession { .. }
            | NodeServerMessage::SubscribeToEvents { .. }
            | NodeServerMessage::UnsubscribeToEvents(_)
            | NodeServerMessage::PortChanged { .. } => {}
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorTerminated(actor, _, reason) => {
                self.ended(state, &actor, reason.unwrap_or_else(|| "session stopped".to_owned()));
            }
            SupervisionEvent::ActorFailed(actor, cause) => {
                self.ended(state, &actor, format!("session failed: {cause}"));
            }
            SupervisionEvent::ActorStarted(_)
            | SupervisionEvent::ProcessGroupChanged(_)
            | SupervisionEvent::PidLifecycleEvent(_) => {}
        }
        Ok(())
    }
}
