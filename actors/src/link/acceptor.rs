//! Takes callers in: accepts streams, has each prove itself within a limit, asks the switchboard for its verdict.

use super::handshake::{self, Caller, Verdict};
use super::socket::{Listener, Stream};
use super::switchboard::SwitchMessage;
use super::{Counters, handshake::HandshakeError};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::sync::Arc;
use std::time::Duration;
use tarazed_domain::limits::{LINK_HANDSHAKE_MS_MAX, LINK_HANDSHAKES_MAX};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// Pause after a failed accept (out of file descriptors, mostly), so that it does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(20);

pub(super) struct Acceptor;

pub(super) struct AcceptorArguments {
    pub listener: Listener,
    pub terms: Terms,
}

/// What each handshake needs.
pub(super) struct Terms {
    pub token: [u8; 32],
    pub failure: Duration,
    pub switchboard: ActorRef<SwitchMessage>,
    pub counters: Arc<Counters>,
}

pub(super) struct AcceptNext;
impl ractor::Message for AcceptNext {}

pub(super) struct AcceptorState {
    /// Here alone, not with the handshakes: the address must be free once this actor has ended.
    listener: Listener,
    terms: Arc<Terms>,
    /// Aborted with this actor.
    handshakes: JoinSet<()>,
}

impl Actor for Acceptor {
    type Msg = AcceptNext;
    type State = AcceptorState;
    type Arguments = AcceptorArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        arguments: AcceptorArguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        myself.cast(AcceptNext)?;
        Ok(AcceptorState {
            listener: arguments.listener,
            terms: Arc::new(arguments.terms),
            handshakes: JoinSet::new(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        _: AcceptNext,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let accepted = state.listener.accept().await;
        while let Some(ended) = state.handshakes.try_join_next() {
            if let Err(error) = ended {
                tracing::error!(%error, "a link handshake panicked");
            }
        }
        match accepted {
            Ok(stream) if state.handshakes.len() < LINK_HANDSHAKES_MAX => {
                state.handshakes.spawn(receive(Arc::clone(&state.terms), stream));
            }
            Ok(_) => Counters::add(&state.terms.counters.handshakes_refused),
            Err(error) => {
                tracing::warn!(%error, "the link cannot accept callers");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
        myself.cast(AcceptNext)?;
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Self::Msg>,
        _: SupervisionEvent,
        _: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        // It has no children.
        Ok(())
    }
}

async fn receive(terms: Arc<Terms>, mut stream: Stream) {
    let limit = Duration::from_millis(LINK_HANDSHAKE_MS_MAX);
    let proved = tokio::time::timeout(limit, prove(&terms, &mut stream)).await;
    let caller = match proved {
        Ok(Ok(caller)) => caller,
        Ok(Err(error)) => {
            Counters::add(&terms.counters.handshakes_refused);
            return tracing::warn!(%error, "a link caller was refused");
        }
        Err(_) => {
            Counters::add(&terms.counters.handshakes_refused);
            return tracing::warn!("a link caller did not prove itself in time");
        }
    };
    let (connection, endpoint, peer) = (caller.connection, caller.endpoint, caller.peer);
    let Ok(knife) = stream.knife() else {
        return tracing::warn!(%peer, "out of file descriptors: a link caller was dropped");
    };
    let (reply, verdict) = oneshot::channel();
    let admit = SwitchMessage::Admit {
        peer,
        connection,
        knife,
        reply,
    };
    if terms.switchboard.cast(admit).is_err() {
        return;
    }
    let Ok(verdict) = verdict.await else { return };
    let answered = tokio::time::timeout(limit, handshake::answer(stream.duplex(), caller, &verdict)).await;
    if verdict != Verdict::Welcome {
        return tracing::warn!(%peer, ?verdict, "a link caller was turned away");
    }
    let next = if matches!(answered, Ok(Ok(()))) {
        SwitchMessage::Open {
            connection,
            endpoint,
            stream,
            is_server: true,
            opened: None,
        }
    } else {
        SwitchMessage::Down {
            connection,
            reason: "it left during the handshake".to_owned(),
        }
    };
    // A switchboard that is gone has ended the connection itself.
    let _ = terms.switchboard.cast(next);
}

async fn prove(terms: &Terms, stream: &mut Stream) -> Result<Caller, HandshakeError> {
    stream.tune(terms.failure)?;
    let endpoint = terms.switchboard.get_id().pid();
    handshake::receive(stream.duplex(), &terms.token, endpoint).await
}
