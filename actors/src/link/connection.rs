//! One connection's books: who, how much is under way in either direction, and how to end it.

use super::envelope::{Footer, Kind, seal};
use super::socket::Knife;
use super::switchboard::SwitchMessage;
use super::{Counters, LinkError, PeerId, lock};
use ractor::ActorRef;
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tarazed_domain::limits::{
    CONTROL_MESSAGE_BYTES_MAX, LINK_CREDIT_BYTES, LINK_CREDIT_MESSAGES, LINK_UNACKNOWLEDGED_BYTES_MAX,
    LINK_UNACKNOWLEDGED_MESSAGES_MAX,
};
use tokio::sync::Notify;

/// A received message. Dropping it tells the sender that it has been handled (SUP-5), so keep it until it has been.
#[derive(Debug)]
pub struct Body {
    bytes: Vec<u8>,
    credit: Option<Credit>,
}

impl Body {
    pub(super) fn new(bytes: Vec<u8>, connection: Arc<Connection>) -> Self {
        let credit = Some(Credit {
            connection,
            bytes: bytes.len() as u64,
        });
        Self { bytes, credit }
    }

    /// A body that came over no link and returns no credit, for callers that make such events themselves.
    #[must_use]
    pub fn detached(bytes: Vec<u8>) -> Self {
        Self { bytes, credit: None }
    }

    /// The bytes; the message counts as handled from here on.
    #[must_use]
    pub fn into_vec(mut self) -> Vec<u8> {
        self.credit = None;
        std::mem::take(&mut self.bytes)
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

struct Credit {
    connection: Arc<Connection>,
    bytes: u64,
}

impl std::fmt::Debug for Credit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credit({})", self.bytes)
    }
}

impl Drop for Credit {
    fn drop(&mut self) {
        self.connection.handled(self.bytes);
    }
}

/// Cumulative counts of data messages and their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Tally {
    messages: u64,
    bytes: u64,
}

impl Tally {
    fn add(&mut self, bytes: u64) {
        self.messages += 1;
        self.bytes += bytes;
    }

    /// How much of `self` is not yet in `part`.
    fn minus(self, part: Self) -> Self {
        Self {
            messages: self.messages - part.messages,
            bytes: self.bytes - part.bytes,
        }
    }

    fn is_over(self) -> bool {
        self.messages > LINK_UNACKNOWLEDGED_MESSAGES_MAX || self.bytes > LINK_UNACKNOWLEDGED_BYTES_MAX
    }
}

#[derive(Default)]
struct Books {
    /// The other side's switchboard; there between `Connected` and `Disconnected`.
    remote: Option<ActorRef<SwitchMessage>>,
    sequence: u64,
    sent: Tally,
    /// Of `sent`, what the other side says it has handled.
    sent_handled: Tally,
    received: Tally,
    /// Of `received`, what our owner has handled.
    handled: Tally,
    /// Of `handled`, what we have told the other side.
    told: Tally,
    /// The other side has said that it closes.
    peer_closing: bool,
    /// We said so, and the other side has answered.
    settled: bool,
}

/// Shared by the switchboard, the senders and the bodies under way.
pub(super) struct Connection {
    pub peer: PeerId,
    pub id: u64,
    knife: Knife,
    counters: Arc<Counters>,
    reason: OnceLock<String>,
    books: Mutex<Books>,
    settled: Notify,
}

impl Connection {
    pub fn new(peer: PeerId, id: u64, knife: Knife, counters: Arc<Counters>) -> Self {
        Self {
            peer,
            id,
            knife,
            counters,
            reason: OnceLock::new(),
            books: Mutex::new(Books::default()),
            settled: Notify::new(),
        }
    }

    /// From now on messages can be sent.
    pub fn open(&self, remote: ActorRef<SwitchMessage>) {
        lock(&self.books).remote = Some(remote);
    }

    /// Ends the stream. The first reason given is the one reported.
    pub fn cut(&self, reason: impl Into<String>) {
        let _ = self.reason.set(reason.into());
        lock(&self.books).remote = None;
        self.knife.cut();
        self.settled.notify_waiters();
    }

    /// Why it ended: our own reason if we ended it, or else what the session saw.
    pub fn reason(&self, seen: &str) -> String {
        if let Some(reason) = self.reason.get() {
            return reason.clone();
        }
        if lock(&self.books).peer_closing {
            return "closed by the other side".to_owned();
        }
        format!("the connection ended without a goodbye ({seen}): the process died, or its host or network is gone")
    }

    /// Queues one message; never waits (SUP-5). The lock makes the order of sequence numbers that of the casts.
    pub fn send(&self, body: Vec<u8>) -> Result<(), LinkError> {
        let length = body.len();
        if length > CONTROL_MESSAGE_BYTES_MAX {
            return Err(LinkError::TooLarge { bytes: length });
        }
        let mut books = lock(&self.books);
        let mut sent = books.sent;
        sent.add(length as u64);
        let under_way = sent.minus(books.sent_handled);
        if books.remote.is_some() && under_way.is_over() {
            drop(books);
            Counters::add(&self.counters.overruns);
            let error = LinkError::Overrun {
                peer: self.peer,
                messages: under_way.messages,
                bytes: under_way.bytes,
            };
            self.cut(error.to_string());
            return Err(error);
        }
        self.post(&mut books, Kind::Data, body)?;
        books.sent = sent;
        Counters::add(&self.counters.messages_sent);
        Ok(())
    }

    fn post(&self, books: &mut Books, kind: Kind, body: Vec<u8>) -> Result<(), LinkError> {
        let gone = || LinkError::Disconnected(self.peer);
        let remote = books.remote.as_ref().ok_or_else(gone)?;
        let footer = Footer {
            connection: self.id,
            sequence: books.sequence,
            kind,
        };
        remote
            .cast(SwitchMessage::Frame(seal(body, footer)))
            .map_err(|_| gone())?;
        books.sequence += 1;
        Ok(())
    }

    /// Sends bytes as they are, to see what the other side makes of them.
    #[cfg(test)]
    pub fn post_raw(&self, frame: Vec<u8>) {
        let books = lock(&self.books);
        let remote = books.remote.as_ref().expect("the test's link is up");
        remote.cast(SwitchMessage::Frame(frame)).expect("the test's link is up");
    }

    /// Books an arrived message; false if the other side sent more than its credits allow.
    pub fn receive(&self, bytes: u64) -> bool {
        let mut books = lock(&self.books);
        books.received.add(bytes);
        !books.received.minus(books.handled).is_over()
    }

    fn handled(&self, bytes: u64) {
        let mut books = lock(&self.books);
        books.handled.add(bytes);
        let untold = books.handled.minus(books.told);
        if untold.messages >= LINK_CREDIT_MESSAGES || untold.bytes >= LINK_CREDIT_BYTES {
            self.tell(&mut books);
        }
        self.answer_closing(&mut books);
    }

    fn answer_closing(&self, books: &mut Books) {
        if books.peer_closing && books.handled == books.received {
            // If the connection is over, nobody waits for this.
            let _ = self.post(books, Kind::Closed, Vec::new());
        }
    }

    fn tell(&self, books: &mut Books) {
        let mut body = Vec::with_capacity(16 + super::envelope::FOOTER_BYTES);
        body.extend_from_slice(&books.handled.messages.to_le_bytes());
        body.extend_from_slice(&books.handled.bytes.to_le_bytes());
        books.told = books.handled;
        // If the connection is over, so are its credits.
        let _ = self.post(books, Kind::Handled, body);
    }

    /// The other side closes as soon as it knows that all of its messages have been handled.
    pub fn peer_is_closing(&self) {
        let mut books = lock(&self.books);
        books.peer_closing = true;
        self.answer_closing(&mut books);
    }

    /// The answer to our own `Closing`.
    pub fn all_is_handled(&self) {
        let mut books = lock(&self.books);
        books.sent_handled = books.sent;
        books.settled = true;
        self.settled.notify_waiters();
    }

    /// Takes credits back; an impossible count is the other side's fault.
    pub fn credit(&self, body: &[u8]) -> Result<(), String> {
        let Some((messages, rest)) = body.split_first_chunk::<8>() else {
            return Err(format!("a credit of {} bytes", body.len()));
        };
        let Ok(bytes) = <[u8; 8]>::try_from(rest) else {
            return Err(format!("a credit of {} bytes", body.len()));
        };
        let tally = Tally {
            messages: u64::from_le_bytes(*messages),
            bytes: u64::from_le_bytes(bytes),
        };
        let mut books = lock(&self.books);
        let (sent, before) = (books.sent, books.sent_handled);
        let grows = tally.messages >= before.messages && tally.bytes >= before.bytes;
        if !grows || tally.messages > sent.messages || tally.bytes > sent.bytes {
            return Err(format!("credits for {tally:?} where {sent:?} was sent"));
        }
        books.sent_handled = tally;
        Ok(())
    }

    /// Says goodbye and waits until the other side has handled everything, or is gone, or `limit` has passed. Returns
    /// whether everything was handled. It waits for an answer even if all credits are back, because a stream that is
    /// cut too early takes the goodbye with it.
    pub async fn settle(&self, limit: Duration) -> bool {
        if self.post(&mut lock(&self.books), Kind::Closing, Vec::new()).is_err() {
            return false;
        }
        let answered = async {
            loop {
                let notified = self.settled.notified();
                tokio::pin!(notified);
                // Registered before the check, so that no answer between the two is missed.
                notified.as_mut().enable();
                {
                    let books = lock(&self.books);
                    if books.settled || books.remote.is_none() {
                        return books.sent == books.sent_handled;
                    }
                }
                notified.await;
            }
        };
        tokio::time::timeout(limit, answered).await.unwrap_or(false)
    }
}
