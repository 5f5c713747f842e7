//! Building the mesh of a new generation.
//!
//! Every rank dials the ranks below its own and accepts those above. One poll loop does both, in the caller's thread,
//! until every slot is filled, the time is over, or the handle aborts. A slot is taken only by a peer that proved the
//! run's token, this generation, its rank and this roster; everything else is refused and counted (SUP-2), costs a fixed
//! number of bytes while it lasts, and is thrown out when it takes too long.

use crate::counters::{ProgressCounter, Refusal};
use crate::handshake::{
    Door, HELLO_BYTES, HandshakeKey, Hello, HelloError, Nonce, PROOF_BYTES, REPLY_BYTES, Reply, Status, proof,
    proof_is_right, roster_digest,
};
use crate::judge::Identity;
use crate::link::{Link, Presence};
use crate::listener::Address;
use crate::mesh::poll;
use crate::{AbortHandle, FabricError, Listener, SocketMesh};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, sockopt};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Generation, Rank};

/// First pause before dialing again; doubled each time.
const REDIAL_MS_MIN: u64 = 2;
/// Longest pause before dialing again.
const REDIAL_MS_MAX: u64 = 100;
/// Handshakes under way beyond one per rank; more push the oldest out.
const HANDSHAKES_SPARE: usize = 64;
/// Connections taken from the listener before anything else gets its turn.
const ACCEPTS_PER_TURN: usize = 64;

/// Connects this rank with all others of a generation: `roster[rank]` is the address of each rank's [`Listener`].
///
/// Blocks until all are connected; ranks may return at different times. Ranks that are still in an older generation, or
/// not yet started, are dialed again until `timeouts.connect_ms` is over. `timeouts.collective_ms` becomes the mesh's
/// limit for a peer that moves no byte.
///
/// # Errors
/// `Aborted`; `StaleGeneration` if a peer is in a newer generation; `Refused` if token, roster or protocol version
/// differ; `PeerLost` if a connected peer dies meanwhile; `ConnectTimedOut` with the missing ranks; `Address`; `System`.
///
/// # Panics
/// If `rank` is outside the roster or the handle is of another generation: the caller's mistake.
pub fn connect_mesh(
    listener: &Listener,
    generation: Generation,
    rank: Rank,
    roster: &[String],
    run_token: [u8; 32],
    timeouts: &Timeouts,
    abort: &AbortHandle,
) -> Result<SocketMesh, FabricError> {
    assert!(
        rank.index() < roster.len(),
        "rank {rank} is outside the roster of {}",
        roster.len()
    );
    assert_eq!(
        abort.generation(),
        generation,
        "an abort handle belongs to one generation"
    );
    let started = Instant::now();
    let limit = Duration::from_millis(timeouts.connect_ms);
    let mut builder = Builder::new(listener, generation, rank, roster, &run_token, limit)?;
    while !builder.is_complete() {
        abort.check()?;
        let waited = started.elapsed();
        if waited >= limit {
            return Err(builder.timed_out(waited));
        }
        builder.dial_those_due();
        builder.wait(limit - waited, abort)?;
    }
    abort.check()?;
    let stall_limit = Duration::from_millis(timeouts.collective_ms);
    Ok(SocketMesh::new(
        builder.own,
        builder.links,
        stall_limit,
        abort.clone(),
        builder.progress,
        builder.listener.refusals(),
    ))
}

/// A message of fixed size on its way in.
struct Inbox<const N: usize> {
    bytes: [u8; N],
    filled: usize,
}

impl<const N: usize> Inbox<N> {
    const fn new() -> Self {
        Self {
            bytes: [0; N],
            filled: 0,
        }
    }

    /// The message once it is whole, `None` while it is not; `Err` if the connection ended.
    fn fill(&mut self, socket: &OwnedFd) -> Result<Option<&[u8; N]>, Errno> {
        match rustix::net::recv(socket, &mut self.bytes[self.filled..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Err(Errno::CONNRESET),
            Ok((_, moved)) => {
                self.filled += moved;
                Ok((self.filled == N).then_some(&self.bytes))
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(cause) => Err(cause),
        }
    }
}

/// Sends a whole handshake message; fresh sockets have room for it.
fn send_whole(socket: &OwnedFd, bytes: &[u8]) -> Result<(), Errno> {
    match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err(Errno::NOBUFS),
        Err(cause) => Err(cause),
    }
}

/// Where a lower rank's connection stands.
enum Dial {
    /// To be dialed at that time.
    Due(Instant),
    /// TCP is connecting.
    Connecting(OwnedFd),
    /// The Hello is sent; a challenge, then an acceptance are awaited.
    Greeting {
        socket: OwnedFd,
        hello: Box<[u8; HELLO_BYTES]>,
        inbox: Inbox<REPLY_BYTES>,
        challenged: bool,
    },
}

struct Dialer {
    peer: Rank,
    address: Address,
    text: String,
    pause_ms: u64,
    dial: Dial,
}

/// A connection that came in and has not proved itself yet.
struct Caller {
    socket: OwnedFd,
    stage: CallerStage,
    until: Instant,
}

enum CallerStage {
    Hello(Inbox<HELLO_BYTES>),
    Proof {
        hello: Box<[u8; HELLO_BYTES]>,
        from: Rank,
        challenge: Nonce,
        inbox: Inbox<PROOF_BYTES>,
    },
}

/// What became of a caller in one turn.
enum Verdict {
    Wait,
    Refused(Refusal),
    Admitted(Rank),
}

struct Builder<'l> {
    listener: &'l Listener,
    own: Identity,
    door: Door,
    key: HandshakeKey,
    handshake_limit: Duration,
    links: Vec<Option<Link>>,
    dialers: Vec<Dialer>,
    /// Oldest first.
    callers: Vec<Caller>,
    progress: Arc<ProgressCounter>,
    last_cause: String,
}

impl<'l> Builder<'l> {
    fn new(
        listener: &'l Listener,
        generation: Generation,
        rank: Rank,
        roster: &[String],
        run_token: &[u8; 32],
        limit: Duration,
    ) -> Result<Self, FabricError> {
        let now = Instant::now();
        let dialers = roster[..rank.index()]
            .iter()
            .enumerate()
            .map(|(peer, text)| {
                Ok(Dialer {
                    peer: Rank(peer as u32),
                    address: Address::parse(text)?,
                    text: text.clone(),
                    pause_ms: REDIAL_MS_MIN,
                    dial: Dial::Due(now),
                })
            })
            .collect::<Result<_, FabricError>>()?;
        let world_size = roster.len();
        Ok(Self {
            listener,
            own: Identity {
                generation,
                rank,
                world_size,
            },
            door: Door {
                generation,
                rank,
                world_size: world_size as u32,
                roster: roster_digest(roster),
            },
            key: HandshakeKey::derive(run_token),
            handshake_limit: limit / 2,
            links: (0..world_size).map(|_| None).collect(),
            dialers,
            callers: Vec::new(),
            progress: Arc::default(),
            last_cause: "nobody answered".into(),
        })
    }

    fn is_complete(&self) -> bool {
        self.links.iter().flatten().count() + 1 == self.own.world_size
    }

    fn timed_out(&self, waited: Duration) -> FabricError {
        let missing = (0..self.own.world_size as u32)
            .map(Rank)
            .filter(|&rank| rank != self.own.rank);
        FabricError::ConnectTimedOut {
            missing: missing.filter(|rank| self.links[rank.index()].is_none()).collect(),
            waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
            cause: self.last_cause.clone(),
        }
    }

    /// Fills a slot. A peer that dials again gave its older connection up, so the newest one counts.
    fn admit(&mut self, peer: Rank, socket: OwnedFd) {
        let progress = Arc::clone(&self.progress);
        let link = Link::new(socket, self.own, peer, progress, self.listener.refusals());
        self.links[peer.index()] = Some(link);
    }

    fn dial_those_due(&mut self) {
        let now = Instant::now();
        for dialer in &mut self.dialers {
            if !matches!(dialer.dial, Dial::Due(at) if at <= now) {
                continue;
            }
            let outcome = match dialer.address.dial() {
                Ok((socket, true)) => dialer.greet(socket, self.own, &self.door, &self.key),
                Ok((socket, false)) => {
                    dialer.dial = Dial::Connecting(socket);
                    Ok(())
                }
                Err(cause) => Err(cause),
            };
            if let Err(cause) = outcome {
                self.last_cause = dialer.again(cause);
            }
        }
    }

    /// Sleeps until something happens or `left` is over, and deals with all that happened.
    fn wait(&mut self, left: Duration, abort: &AbortHandle) -> Result<(), FabricError> {
        let now = Instant::now();
        let mut timeout = left;
        let abort = abort.descriptor();
        let mut fds = vec![
            PollFd::new(&abort, PollFlags::IN),
            PollFd::new(self.listener, PollFlags::IN),
        ];
        for dialer in &self.dialers {
            match &dialer.dial {
                Dial::Due(at) => timeout = timeout.min(at.saturating_duration_since(now)),
                Dial::Connecting(socket) => fds.push(PollFd::new(socket, PollFlags::OUT)),
                Dial::Greeting { socket, .. } => fds.push(PollFd::new(socket, PollFlags::IN)),
            }
        }
        for caller in &self.callers {
            timeout = timeout.min(caller.until.saturating_duration_since(now));
            fds.push(PollFd::new(&caller.socket, PollFlags::IN));
        }
        for link in self
            .links
            .iter()
            .flatten()
            .filter(|link| link.presence() == Presence::Here)
        {
            fds.push(PollFd::new(link, PollFlags::RDHUP));
        }
        poll(&mut fds, Some(timeout))?;
        let mut ready = fds
            .iter()
            .map(|fd| !fd.revents().is_empty())
            .collect::<Vec<_>>()
            .into_iter();
        let mut next = || ready.next().unwrap_or(false);
        let (_aborted, knock) = (next(), next());
        let dialers_ready: Vec<bool> = self
            .dialers
            .iter()
            .map(|dialer| !matches!(dialer.dial, Dial::Due(_)) && next())
            .collect();
        let callers_ready: Vec<bool> = self.callers.iter().map(|_| next()).collect();
        for link in self
            .links
            .iter_mut()
            .flatten()
            .filter(|link| link.presence() == Presence::Here)
        {
            if next() {
                link.look_at_hangup()?;
            }
        }
        self.advance_dialers(&dialers_ready)?;
        self.advance_callers(&callers_ready)?;
        if knock { self.accept() } else { Ok(()) }
    }

    fn advance_dialers(&mut self, ready: &[bool]) -> Result<(), FabricError> {
        let mut admitted = Vec::new();
        let mut remaining = Vec::with_capacity(self.dialers.len());
        for (mut dialer, &ready) in std::mem::take(&mut self.dialers).into_iter().zip(ready) {
            if ready {
                match dialer.advance(self.own, &self.door, &self.key)? {
                    Ok(Some(socket)) => {
                        admitted.push((dialer.peer, socket));
                        continue;
                    }
                    Ok(None) => {}
                    Err(cause) => self.last_cause = dialer.again(cause),
                }
            }
            remaining.push(dialer);
        }
        self.dialers = remaining;
        for (peer, socket) in admitted {
            self.admit(peer, socket);
        }
        Ok(())
    }

    fn advance_callers(&mut self, ready: &[bool]) -> Result<(), FabricError> {
        let now = Instant::now();
        let mut remaining = Vec::with_capacity(self.callers.len());
        for (mut caller, &ready) in std::mem::take(&mut self.callers).into_iter().zip(ready) {
            let verdict = if ready {
                caller.advance(&self.door, &self.key)?
            } else {
                Verdict::Wait
            };
            match verdict {
                Verdict::Wait if caller.until <= now => self.listener.refusals().count(Refusal::Slow),
                Verdict::Wait => remaining.push(caller),
                Verdict::Refused(reason) => self.listener.refusals().count(reason),
                Verdict::Admitted(peer) => self.admit(peer, caller.socket),
            }
        }
        self.callers = remaining;
        Ok(())
    }

    fn accept(&mut self) -> Result<(), FabricError> {
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(socket) = self.listener.accept()? else { break };
            if self.callers.len() >= self.own.world_size + HANDSHAKES_SPARE {
                self.callers.remove(0);
                self.listener.refusals().count(Refusal::Slow);
            }
            let until = Instant::now() + self.handshake_limit;
            self.callers.push(Caller {
                socket,
                stage: CallerStage::Hello(Inbox::new()),
                until,
            });
        }
        Ok(())
    }
}

impl Dialer {
    /// Closes what there is and dials again after a pause; returns the cause in words.
    fn again(&mut self, cause: Errno) -> String {
        self.dial = Dial::Due(Instant::now() + Duration::from_millis(self.pause_ms));
        self.pause_ms = (self.pause_ms * 2).min(REDIAL_MS_MAX);
        format!("rank {} at {}: {cause}", self.peer, self.text)
    }

    fn greet(&mut self, socket: OwnedFd, own: Identity, door: &Door, key: &HandshakeKey) -> Result<(), Errno> {
        let hello = Hello {
            generation: own.generation,
            from: own.rank,
            to: self.peer,
            world_size: door.world_size,
            roster: door.roster,
            nonce: nonce()?,
        };
        let hello = Box::new(hello.encode(key));
        send_whole(&socket, &hello[..])?;
        self.dial = Dial::Greeting {
            socket,
            hello,
            inbox: Inbox::new(),
            challenged: false,
        };
        Ok(())
    }

    /// One turn of a ready connection: `Ok(Some)` when admitted; the inner error means dial again, the outer one is
    /// final.
    fn advance(
        &mut self,
        own: Identity,
        door: &Door,
        key: &HandshakeKey,
    ) -> Result<Result<Option<OwnedFd>, Errno>, FabricError> {
        let now = Instant::now();
        match std::mem::replace(&mut self.dial, Dial::Due(now)) {
            Dial::Due(at) => {
                self.dial = Dial::Due(at);
                Ok(Ok(None))
            }
            Dial::Connecting(socket) => {
                let connected = sockopt::socket_error(&socket).and_then(|outcome| outcome);
                Ok(connected
                    .and_then(|()| self.greet(socket, own, door, key))
                    .map(|()| None))
            }
            Dial::Greeting {
                socket,
                hello,
                mut inbox,
                challenged,
            } => {
                let reply = match inbox.fill(&socket) {
                    Ok(Some(bytes)) => Reply::decode(key, &hello, bytes),
                    Ok(None) => {
                        self.dial = Dial::Greeting {
                            socket,
                            hello,
                            inbox,
                            challenged,
                        };
                        return Ok(Ok(None));
                    }
                    Err(cause) => return Ok(Err(cause)),
                };
                let status = match reply {
                    Some((reply, authentic)) => self.judge(reply, authentic, own.generation)?,
                    None => return Ok(Err(Errno::PROTO)),
                };
                match (status, challenged) {
                    (Status::Challenge, false) => {
                        let Some((reply, _)) = reply else {
                            return Ok(Err(Errno::PROTO));
                        };
                        let sent = send_whole(&socket, &proof(key, &hello, &reply.nonce));
                        self.dial = Dial::Greeting {
                            socket,
                            hello,
                            inbox: Inbox::new(),
                            challenged: true,
                        };
                        Ok(sent.map(|()| None))
                    }
                    (Status::Accepted, true) => Ok(Ok(Some(socket))),
                    _ => Ok(Err(Errno::PROTO)),
                }
            }
        }
    }

    /// The status to go on with, or the final refusal.
    fn judge(&self, reply: Reply, authentic: bool, ours: Generation) -> Result<Status, FabricError> {
        let refused = |reason: &str| FabricError::Refused {
            peer: self.peer,
            address: self.text.clone(),
            reason: reason.to_owned(),
        };
        match reply.status {
            Status::Version => Err(refused("it speaks another version; run one binary everywhere")),
            Status::Unauthenticated => Err(refused("it has another run token; give all ranks the same one")),
            _ if !authentic => Err(refused("it does not know the run token; somebody else listens there")),
            Status::Roster => Err(refused(
                "it has another roster for this generation, or another rank; a bug",
            )),
            Status::Stale => Err(FabricError::StaleGeneration {
                peer: self.peer,
                ours,
                theirs: reply.generation,
            }),
            status @ (Status::Challenge | Status::Accepted | Status::NotYet) => Ok(status),
        }
    }
}

impl Caller {
    /// One turn of a ready connection.
    fn advance(&mut self, door: &Door, key: &HandshakeKey) -> Result<Verdict, FabricError> {
        match &mut self.stage {
            CallerStage::Hello(inbox) => {
                let hello = match inbox.fill(&self.socket) {
                    Ok(Some(bytes)) => *bytes,
                    Ok(None) => return Ok(Verdict::Wait),
                    Err(_) => return Ok(Verdict::Refused(Refusal::Garbage)),
                };
                self.answer(door, key, hello)
            }
            CallerStage::Proof {
                hello,
                from,
                challenge,
                inbox,
            } => {
                let given = match inbox.fill(&self.socket) {
                    Ok(Some(bytes)) => *bytes,
                    Ok(None) => return Ok(Verdict::Wait),
                    Err(_) => return Ok(Verdict::Refused(Refusal::Garbage)),
                };
                if !proof_is_right(key, hello, challenge, &given) {
                    return Ok(Verdict::Refused(Refusal::Unauthenticated));
                }
                let welcome = Reply {
                    status: Status::Accepted,
                    generation: door.generation,
                    nonce: *challenge,
                };
                let sent = send_whole(&self.socket, &welcome.encode(key, hello));
                Ok(if sent.is_ok() {
                    Verdict::Admitted(*from)
                } else {
                    Verdict::Refused(Refusal::Garbage)
                })
            }
        }
    }

    fn answer(&mut self, door: &Door, key: &HandshakeKey, bytes: [u8; HELLO_BYTES]) -> Result<Verdict, FabricError> {
        let (status, from) = match Hello::decode(key, &bytes) {
            Ok(hello) => (door.judge(&hello), hello.from),
            Err(HelloError::Garbage) => return Ok(Verdict::Refused(Refusal::Garbage)),
            Err(HelloError::Version) => (Status::Version, Rank(0)),
            Err(HelloError::Unauthenticated) => (Status::Unauthenticated, Rank(0)),
        };
        let challenge = nonce().map_err(|cause| FabricError::system("getrandom", cause))?;
        let reply = Reply {
            status,
            generation: door.generation,
            nonce: challenge,
        };
        let sent = send_whole(&self.socket, &reply.encode(key, &bytes));
        let refusal = match status {
            Status::Challenge if sent.is_ok() => {
                self.stage = CallerStage::Proof {
                    hello: Box::new(bytes),
                    from,
                    challenge,
                    inbox: Inbox::new(),
                };
                return Ok(Verdict::Wait);
            }
            Status::Challenge | Status::Accepted => Refusal::Garbage,
            Status::Stale => Refusal::StaleGeneration,
            Status::NotYet => Refusal::FutureGeneration,
            Status::Unauthenticated => Refusal::Unauthenticated,
            Status::Roster => Refusal::Roster,
            Status::Version => Refusal::Version,
        };
        tracing::debug!(?refusal, generation = %door.generation, rank = %door.rank, "refused a connection");
        Ok(Verdict::Refused(refusal))
    }
}

/// Fresh random bytes; they protect the handshake against recordings and decide nothing else (DET-1).
fn nonce() -> Result<Nonce, Errno> {
    let mut nonce = [0; 32];
    let mut filled = 0;
    while filled < nonce.len() {
        filled += rustix::rand::getrandom(&mut nonce[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(nonce)
}

#[cfg(test)]
mod tests;
