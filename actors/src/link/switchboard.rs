//! The switchboard: the one remotable actor of a link end. It checks frames, keeps the roster of connections, and is
//! the only caller of the owner's event function, so events of one connection come in order (LINK-1, LINK-2).

use super::acceptor::{AcceptNext, Acceptor, AcceptorArguments, Terms};
use super::connection::{Body, Connection};
use super::envelope::{self, Footer, Kind};
use super::handshake::Verdict;
use super::session::{SessionHost, label};
use super::socket::{Knife, Listener, Stream, Wire};
use super::{Counters, HubEvent, PeerId, lock};
use ractor::message::{BoxedDowncastErr, SerializedMessage};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use ractor_cluster::NodeServerMessage;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tarazed_domain::limits::{LINK_CLOSE_MS_MAX, LINK_HANDSHAKE_MS_MAX, LINK_UNACKNOWLEDGED_MESSAGES_MAX};
use tarazed_domain::{Incarnation, WorkerId};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// The connections that can be sent to now.
pub(super) type Live = Arc<Mutex<HashMap<PeerId, Arc<Connection>>>>;

/// What the owner is told through.
pub(super) type Events = Box<dyn FnMut(HubEvent) + Send>;

pub(super) enum SwitchMessage {
    /// The only one that crosses processes.
    Frame(Vec<u8>),
    /// A caller has proved itself; may it come in?
    Admit {
        peer: PeerId,
        connection: u64,
        knife: Knife,
        reply: oneshot::Sender<Verdict>,
    },
    /// The stream of an admitted connection, for its session. `opened` is told when messages can be sent.
    Open {
        connection: u64,
        endpoint: u64,
        stream: Stream,
        is_server: bool,
        opened: Option<oneshot::Sender<Arc<Connection>>>,
    },
    /// The session is up.
    Ready {
        connection: u64,
        remote: ActorRef<SwitchMessage>,
    },
    /// The session had all the time it may take to come up.
    Expire { connection: u64 },
    /// The session, or the attempt at one, is over.
    Down { connection: u64, reason: String },
}

impl ractor::Message for SwitchMessage {
    fn serializable() -> bool {
        true
    }

    fn serialize(self) -> Result<SerializedMessage, BoxedDowncastErr> {
        match self {
            Self::Frame(args) => Ok(SerializedMessage::Cast {
                variant: String::new(),
                args,
                metadata: None,
            }),
            _ => Err(BoxedDowncastErr),
        }
    }

    fn deserialize(message: SerializedMessage) -> Result<Self, BoxedDowncastErr> {
        match message {
            SerializedMessage::Cast { args, .. } => Ok(Self::Frame(args)),
            SerializedMessage::Call { .. } | SerializedMessage::CallReply(..) => Err(BoxedDowncastErr),
        }
    }
}

pub(super) struct Switchboard {
    pub cookie: String,
    pub name: String,
}

pub(super) struct SwitchboardArguments {
    pub events: Events,
    pub live: Live,
    pub counters: Arc<Counters>,
    /// A hub's; an uplink has none.
    pub accept: Option<(Listener, [u8; 32], Duration)>,
}

enum Phase {
    /// Known, but its session is not up. Frames may overtake the news that it is: they wait here.
    Admitted {
        waiting: Vec<(Footer, Vec<u8>)>,
        opened: Option<oneshot::Sender<Arc<Connection>>>,
    },
    Ready,
}

struct Entry {
    connection: Arc<Connection>,
    phase: Phase,
    sequence_expected: u64,
}

#[derive(Default)]
struct Worker {
    incarnation: Incarnation,
    connection: Option<u64>,
}

pub(super) struct SwitchboardState {
    events: Events,
    live: Live,
    counters: Arc<Counters>,
    host: ActorRef<NodeServerMessage>,
    acceptor: Option<(ActorRef<AcceptNext>, JoinHandle<()>)>,
    entries: HashMap<u64, Entry>,
    workers: HashMap<WorkerId, Worker>,
}

impl Drop for SwitchboardState {
    /// However this actor ends, no stream outlives it.
    fn drop(&mut self) {
        self.cut_all();
    }
}

impl SwitchboardState {
    fn cut_all(&self) {
        for entry in self.entries.values() {
            entry.connection.cut("this side's link has ended");
        }
        lock(&self.live).clear();
    }

    fn admit(&mut self, peer: PeerId, id: u64, knife: Knife) -> Verdict {
        let worker = self.workers.entry(peer.worker).or_default();
        if peer.incarnation < worker.incarnation {
            Counters::add(&self.counters.identities_refused);
            return Verdict::Refused(format!("incarnation {} is already known", worker.incarnation));
        }
        let previous = worker.connection;
        if peer.incarnation == worker.incarnation && previous.is_some() {
            Counters::add(&self.counters.identities_refused);
            return Verdict::Busy("this incarnation is connected already".to_owned());
        }
        *worker = Worker {
            incarnation: peer.incarnation,
            connection: Some(id),
        };
        if let Some(previous) = previous {
            self.end(previous, &format!("replaced by incarnation {}", peer.incarnation));
        }
        let entry = Entry {
            connection: Arc::new(Connection::new(peer, id, knife, Arc::clone(&self.counters))),
            phase: Phase::Admitted {
                waiting: Vec::new(),
                opened: None,
            },
            sequence_expected: 0,
        };
        self.entries.insert(id, entry);
        Verdict::Welcome
    }

    fn open(&mut self, id: u64, stream: Wire, is_server: bool, opened: Option<oneshot::Sender<Arc<Connection>>>) {
        // The entry may be gone: replaced while the verdict was on its way. Then the stream just ends here.
        let Some(Entry {
            phase: Phase::Admitted { opened: slot, .. },
            ..
        }) = self.entries.get_mut(&id)
        else {
            return;
        };
        *slot = opened;
        let message = NodeServerMessage::ConnectionOpenedExternal {
            stream: Box::new(stream),
            is_server,
        };
        if self.host.cast(message).is_err() {
            self.end(id, "the session host is gone");
        }
    }

    fn ready(&mut self, id: u64, remote: ActorRef<SwitchMessage>) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let Phase::Admitted { waiting, opened } = std::mem::replace(&mut entry.phase, Phase::Ready) else {
            return;
        };
        let connection = Arc::clone(&entry.connection);
        connection.open(remote);
        lock(&self.live).insert(connection.peer, Arc::clone(&connection));
        (self.events)(HubEvent::Connected(connection.peer));
        if let Some(opened) = opened {
            // The dialler may have given up; then it stops this actor as well.
            let _ = opened.send(connection);
        }
        for (footer, body) in waiting {
            self.deliver(footer, body);
        }
    }

    fn expire(&mut self, id: u64) {
        if let Some(entry) = self.entries.get(&id)
            && matches!(entry.phase, Phase::Admitted { .. })
        {
            self.end(id, "its session did not come up in time");
        }
    }

    fn frame(&mut self, frame: Vec<u8>) {
        match envelope::open(frame) {
            Ok((footer, body)) => match self.entries.get_mut(&footer.connection) {
                None => Counters::add(&self.counters.frames_refused),
                Some(Entry {
                    phase: Phase::Admitted { waiting, .. },
                    ..
                }) => {
                    if waiting.len() as u64 >= LINK_UNACKNOWLEDGED_MESSAGES_MAX {
                        self.refuse(footer.connection, "it sent more than its credits allow");
                    } else {
                        waiting.push((footer, body));
                    }
                }
                Some(_) => self.deliver(footer, body),
            },
            Err(error) => match error.connection {
                Some(id) if self.entries.contains_key(&id) => {
                    self.refuse(id, &format!("it sent a bad frame: {}", error.reason));
                }
                // Nothing in it can be believed. If a real frame is missing, the next one of its connection shows it.
                _ => {
                    Counters::add(&self.counters.frames_refused);
                    tracing::warn!(reason = %error.reason, "a control frame was refused");
                }
            },
        }
    }

    fn deliver(&mut self, footer: Footer, body: Vec<u8>) {
        let Some(entry) = self.entries.get_mut(&footer.connection) else {
            Counters::add(&self.counters.frames_refused);
            return;
        };
        if footer.sequence != entry.sequence_expected {
            let expected = entry.sequence_expected;
            let reason = format!("frame {expected} was expected and frame {} came", footer.sequence);
            return self.refuse(footer.connection, &reason);
        }
        entry.sequence_expected += 1;
        let connection = Arc::clone(&entry.connection);
        match footer.kind {
            Kind::Data => {
                if !connection.receive(body.len() as u64) {
                    return self.refuse(footer.connection, "it sent more than its credits allow");
                }
                Counters::add(&self.counters.messages_received);
                let peer = connection.peer;
                (self.events)(HubEvent::Message(peer, Body::new(body, connection)));
            }
            Kind::Handled => {
                if let Err(reason) = connection.credit(&body) {
                    self.refuse(footer.connection, &format!("it sent {reason}"));
                }
            }
            Kind::Closing => connection.peer_is_closing(),
            Kind::Closed => connection.all_is_handled(),
        }
    }

    fn refuse(&mut self, id: u64, reason: &str) {
        Counters::add(&self.counters.frames_refused);
        self.end(id, reason);
    }

    /// Ends a connection from this side; what its session says later finds no entry.
    fn end(&mut self, id: u64, reason: &str) {
        if let Some(entry) = self.entries.get(&id) {
            entry.connection.cut(reason);
        }
        self.down(id, reason);
    }

    fn down(&mut self, id: u64, seen: &str) {
        let Some(entry) = self.entries.remove(&id) else { return };
        let connection = entry.connection;
        let reason = connection.reason(seen);
        connection.cut(reason.clone());
        if let Some(worker) = self.workers.get_mut(&connection.peer.worker)
            && worker.connection == Some(id)
        {
            worker.connection = None;
        }
        if matches!(entry.phase, Phase::Ready) {
            {
                let mut live = lock(&self.live);
                if live.get(&connection.peer).is_some_and(|other| other.id == id) {
                    live.remove(&connection.peer);
                }
            }
            (self.events)(HubEvent::Disconnected(connection.peer, reason));
        }
    }

    fn end_all(&mut self, reason: &str) {
        let mut ids: Vec<u64> = self.entries.keys().copied().collect();
        ids.sort_unstable_by_key(|id| self.entries[id].connection.peer);
        for id in ids {
            self.end(id, reason);
        }
    }
}

impl Actor for Switchboard {
    type Msg = SwitchMessage;
    type State = SwitchboardState;
    type Arguments = SwitchboardArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let host = SessionHost {
            switchboard: myself.clone(),
            cookie: self.cookie.clone(),
            name: self.name.clone(),
        };
        let (host, _) = Actor::spawn_linked(None, host, (), myself.get_cell()).await?;
        let acceptor = match arguments.accept {
            None => None,
            Some((listener, token, failure)) => {
                let terms = Terms {
                    token,
                    failure,
                    switchboard: myself.clone(),
                    counters: Arc::clone(&arguments.counters),
                };
                let acceptor = AcceptorArguments { listener, terms };
                Some(Actor::spawn_linked(None, Acceptor, acceptor, myself.get_cell()).await?)
            }
        };
        Ok(SwitchboardState {
            events: arguments.events,
            live: arguments.live,
            counters: arguments.counters,
            host,
            acceptor,
            entries: HashMap::new(),
            workers: HashMap::new(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            SwitchMessage::Frame(frame) => state.frame(frame),
            SwitchMessage::Admit {
                peer,
                connection,
                knife,
                reply,
            } => {
                let verdict = state.admit(peer, connection, knife);
                let admitted = verdict == Verdict::Welcome;
                if reply.send(verdict).is_err() && admitted {
                    state.end(connection, "it left during the handshake");
                }
            }
            SwitchMessage::Open {
                connection,
                endpoint,
                stream,
                is_server,
                opened,
            } => {
                let label = label(connection, endpoint);
                state.open(connection, Wire { stream, label }, is_server, opened);
                // The cluster layer's own handshake has no deadline: a peer stopped in the middle of it would keep its
                // place for ever.
                let limit = Duration::from_millis(LINK_HANDSHAKE_MS_MAX);
                myself.send_after(limit, move || SwitchMessage::Expire { connection });
            }
            SwitchMessage::Ready { connection, remote } => state.ready(connection, remote),
            SwitchMessage::Expire { connection } => state.expire(connection),
            SwitchMessage::Down { connection, reason } => state.down(connection, &reason),
        }
        Ok(())
    }

    async fn post_stop(&self, _: ActorRef<Self::Msg>, state: &mut Self::State) -> Result<(), ActorProcessingErr> {
        state.cut_all();
        // A kill, because the acceptor waits inside its handler; and its end, because the address is free then.
        if let Some((acceptor, ended)) = state.acceptor.take() {
            let limit = Duration::from_millis(LINK_CLOSE_MS_MAX);
            acceptor.kill();
            if tokio::time::timeout(limit, ended).await.is_err() {
                tracing::warn!("the link's acceptor did not end in time");
            }
        }
        Ok(())
    }

    /// SUP-1: neither child ends while this actor runs; if one does, all connections end and the cause climbs.
    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let cause = match event {
            SupervisionEvent::ActorFailed(actor, cause) => format!("{} failed: {cause}", actor.get_id()),
            SupervisionEvent::ActorTerminated(actor, _, reason) => {
                format!("{} stopped: {}", actor.get_id(), reason.unwrap_or_default())
            }
            SupervisionEvent::ActorStarted(_)
            | SupervisionEvent::ProcessGroupChanged(_)
            | SupervisionEvent::PidLifecycleEvent(_) => return Ok(()),
        };
        let cause = format!("a part of the link ended by itself: actor {cause}");
        state.end_all(&cause);
        Err(cause.into())
    }
}
