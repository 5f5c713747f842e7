//! A rank's end.

use super::connection::Connection;
use super::handshake::{self, HandshakeError, Verdict};
use super::hub::{Switch, spawn_switchboard};
use super::socket::{Bind, Stream};
use super::switchboard::{Live, SwitchMessage, SwitchboardArguments};
use super::{Counters, HubEvent, LinkCounts, LinkError, UplinkConfig, UplinkEvent};
use ractor::ActorRef;
use std::sync::Arc;
use std::time::Duration;
use tarazed_domain::limits::LINK_CLOSE_MS_MAX;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Pauses between dials: short at first, because a starting controller is ready within milliseconds.
const DIAL_PAUSE_MIN: Duration = Duration::from_millis(2);
const DIAL_PAUSE_MAX: Duration = Duration::from_millis(100);

/// A rank's end of the control plane. Dropping it ends the connection at once.
pub struct Uplink {
    connection: Arc<Connection>,
    switchboard: Switch,
    counters: Arc<Counters>,
}

/// Dials the hub until it answers or `config.connect` has passed. `events` is called from the uplink's own actor, in
/// order, and must not block: it should post a message.
///
/// # Errors
/// `Retry` if the hub did not answer in time, `Reconfigure` for a wrong address or token, `Halt` if this incarnation
/// has been replaced (SUP-2), `System` if the machine refuses.
pub async fn connect_uplink(
    config: UplinkConfig,
    events: impl Fn(UplinkEvent) + Send + Sync + 'static,
) -> Result<Uplink, LinkError> {
    let bind = Bind::parse(&config.address)?;
    let counters = Arc::new(Counters::default());
    let arguments = SwitchboardArguments {
        events: Box::new(move |event| match event {
            HubEvent::Connected(_) => {}
            HubEvent::Disconnected(_, reason) => events(UplinkEvent::Lost(reason)),
            HubEvent::Message(_, body) => events(UplinkEvent::Message(body)),
        }),
        live: Live::default(),
        counters: Arc::clone(&counters),
        accept: None,
    };
    let switchboard = spawn_switchboard("rank", &config.token, arguments, config.supervisor.clone()).await?;
    let connection = dial(&config, &bind, &switchboard.0).await?;
    Ok(Uplink {
        connection,
        switchboard,
        counters,
    })
}

/// How one attempt failed.
enum Attempt {
    Again(String),
    Never(LinkError),
}

async fn dial(
    config: &UplinkConfig,
    bind: &Bind,
    switchboard: &ActorRef<SwitchMessage>,
) -> Result<Arc<Connection>, LinkError> {
    let deadline = Instant::now() + config.connect;
    let mut pause = DIAL_PAUSE_MIN;
    let mut cause = "the connect time is zero".to_owned();
    loop {
        match tokio::time::timeout_at(deadline, attempt(config, bind, switchboard)).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(Attempt::Never(error))) => return Err(error),
            Ok(Err(Attempt::Again(why))) => cause = why,
            Err(_) => cause = format!("no answer in time (before that: {cause})"),
        }
        if Instant::now() + pause >= deadline {
            return Err(LinkError::Retry {
                address: config.address.clone(),
                waited_ms: u64::try_from(config.connect.as_millis()).unwrap_or(u64::MAX),
                cause,
            });
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(DIAL_PAUSE_MAX);
    }
}

async fn attempt(
    config: &UplinkConfig,
    bind: &Bind,
    switchboard: &ActorRef<SwitchMessage>,
) -> Result<Arc<Connection>, Attempt> {
    let again = |error: std::io::Error| Attempt::Again(error.to_string());
    let mut stream = Stream::dial(bind).await.map_err(again)?;
    stream.tune(config.failure).map_err(again)?;
    let endpoint = switchboard.get_id().pid();
    let session = handshake::call(stream.duplex(), &config.token, config.peer, endpoint)
        .await
        .map_err(|error| match error {
            HandshakeError::Io(_) => Attempt::Again(error.to_string()),
            HandshakeError::Token | HandshakeError::Foreign => Attempt::Never(LinkError::Reconfigure {
                what: format!("{}: {error}", config.address),
                remedy: "pass the address and the token of the same run, and one version of the program",
            }),
        })?;
    match session.verdict {
        Verdict::Welcome => {}
        Verdict::Busy(reason) => return Err(Attempt::Again(reason)),
        Verdict::Refused(reason) => {
            return Err(Attempt::Never(LinkError::Halt {
                peer: config.peer,
                reason,
            }));
        }
    }
    let gone = |_| Attempt::Never(LinkError::system("go on", std::io::Error::other("its actor is gone")));
    let (reply, verdict) = oneshot::channel();
    let knife = stream.knife().map_err(again)?;
    let connection = session.connection;
    let admit = SwitchMessage::Admit {
        peer: config.peer,
        connection,
        knife,
        reply,
    };
    switchboard.cast(admit).map_err(|_| gone(()))?;
    if verdict.await.map_err(|_| gone(()))? != Verdict::Welcome {
        return Err(Attempt::Again("the previous attempt is still ending".to_owned()));
    }
    let (opened, is_open) = oneshot::channel();
    let open = SwitchMessage::Open {
        connection,
        endpoint: session.endpoint,
        stream,
        is_server: false,
        opened: Some(opened),
    };
    switchboard.cast(open).map_err(|_| gone(()))?;
    is_open
        .await
        .map_err(|_| Attempt::Again("the hub ended the session while it started".to_owned()))
}

impl Uplink {
    /// Queues one message to the controller; never waits. Messages arrive in the order of these calls.
    ///
    /// # Errors
    /// `Disconnected` once the link is lost, `TooLarge`, or `Overrun`: then the link was ended just now, and
    /// `UplinkEvent::Lost` follows (SUP-5).
    pub fn send(&self, body: Vec<u8>) -> Result<(), LinkError> {
        self.connection.send(body)
    }

    /// What has been counted so far.
    #[must_use]
    pub fn counts(&self) -> LinkCounts {
        self.counters.read()
    }

    /// Waits until the controller has handled what was sent (at most [`LINK_CLOSE_MS_MAX`]), then ends the connection.
    /// Returns whether everything was handled. A process that ends without this may lose its last messages.
    pub async fn close(self) -> bool {
        let limit = Duration::from_millis(LINK_CLOSE_MS_MAX);
        let settled = self.connection.settle(limit).await;
        // An error means that it is gone already.
        let _ = self.switchboard.0.stop_and_wait(None, Some(limit)).await;
        settled
    }
}

#[cfg(test)]
impl Uplink {
    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }
}
