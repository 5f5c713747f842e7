//! The mesh over sockets: one connection per pair of ranks, one poll loop in the caller's thread.
//!
//! An exchange sweeps over its peers, moving at most one frame per peer and direction at a time, so all progress
//! together; when no socket can move, it sleeps in poll(2) on all of them and on the abort handle (SUP-4). It never
//! spins. Peers that have no part in the exchange are watched too: if one of them dies while this rank waits for
//! another, which may itself wait for the dead one, the blame goes to the dead one at once.

use crate::counters::{ProgressCounter, RefusalCounters};
use crate::judge::Identity;
use crate::link::{Incoming, Link, Outgoing, Presence, Step};
use crate::{AbortHandle, Collective, FabricError, Receive, Send, Tag};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tarazed_domain::{Generation, Rank};

/// One rank's end of a full mesh of sockets, for one generation. Made by [`crate::connect_mesh`].
pub struct SocketMesh {
    own: Identity,
    /// By rank; none for the own one.
    links: Vec<Option<Link>>,
    stall_limit: Duration,
    abort: AbortHandle,
    progress: Arc<ProgressCounter>,
    refusals: Arc<RefusalCounters>,
    /// The first error; what every later call returns.
    failed: Option<FabricError>,
    waits_for: Option<Rank>,
}

/// One peer's part in one exchange.
struct Part<'e, 's, 'r> {
    out: Outgoing<'s>,
    incoming: Incoming<'e, 'r>,
    /// Whether the socket may take or give bytes, as far as known.
    may_send: bool,
    may_receive: bool,
    moved_at: Instant,
}

impl Part<'_, '_, '_> {
    /// The message under way, if anything is left to do.
    fn due(&self) -> Option<Tag> {
        self.incoming.due().or(self.out.due())
    }

    fn may_move(&self) -> bool {
        (self.may_send && self.out.due().is_some()) || (self.may_receive && self.incoming.due().is_some())
    }

    /// One frame each way at most.
    fn advance(&mut self, link: &mut Link) -> Result<(), FabricError> {
        let mut moved = false;
        if self.may_send {
            let step = link.send_step(&mut self.out)?;
            self.may_send = step == Step::Moved;
            moved |= matches!(step, Step::Moved | Step::MovedAndBlocked);
        }
        if self.may_receive {
            let step = link.receive_step(&mut self.incoming)?;
            self.may_receive = step == Step::Moved;
            moved |= matches!(step, Step::Moved | Step::MovedAndBlocked);
        }
        if moved {
            self.moved_at = Instant::now();
        }
        Ok(())
    }
}

impl SocketMesh {
    pub(crate) fn new(
        own: Identity,
        links: Vec<Option<Link>>,
        stall_limit: Duration,
        abort: AbortHandle,
        progress: Arc<ProgressCounter>,
        refusals: Arc<RefusalCounters>,
    ) -> Self {
        Self {
            own,
            links,
            stall_limit,
            abort,
            progress,
            refusals,
            failed: None,
            waits_for: None,
        }
    }

    /// What was refused through this rank's listener so far.
    #[must_use]
    pub fn refusals(&self) -> Arc<RefusalCounters> {
        Arc::clone(&self.refusals)
    }

    fn check(&self) -> Result<(), FabricError> {
        self.abort.check()?;
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Remembers the first error, and passes the blame for a lost peer on to those who may be waiting for this rank.
    pub(crate) fn fail(&mut self, error: &FabricError) {
        if matches!(error, FabricError::Aborted { .. }) {
            return;
        }
        self.failed = Some(error.clone());
        if let FabricError::PeerLost { peer, .. } | FabricError::TimedOut { peer, .. } = error {
            for link in self.links.iter_mut().flatten() {
                link.send_fault(*peer);
            }
        }
    }

    fn run(&mut self, sends: &[Send<'_>], receives: &mut [Receive<'_>]) -> Result<(), FabricError> {
        let mut parts = plan(self.own, sends, receives);
        loop {
            self.abort.check()?;
            let mut pending = false;
            let mut may_move = false;
            for (link, part) in self.links.iter_mut().zip(&mut parts) {
                let Some(link) = link else { continue };
                if part.may_move() {
                    part.advance(link)?;
                }
                pending |= part.due().is_some();
                may_move |= part.may_move();
            }
            if !pending {
                self.waits_for = None;
                return Ok(());
            }
            if !may_move {
                self.wait(&mut parts)?;
            }
        }
    }

    /// Sleeps until a socket can move, a peer hangs up, the handle aborts, or a peer has stalled for too long.
    fn wait(&mut self, parts: &mut [Part<'_, '_, '_>]) -> Result<(), FabricError> {
        let stalled = parts
            .iter()
            .enumerate()
            .filter_map(|(rank, part)| part.due().map(|tag| (part.moved_at, rank, tag)))
            .min_by_key(|&(moved_at, rank, _)| (moved_at, rank));
        let mut timeout = None;
        self.waits_for = stalled.map(|(_, rank, _)| Rank(rank as u32));
        if let Some((moved_at, rank, tag)) = stalled {
            let waited = moved_at.elapsed();
            if waited >= self.stall_limit {
                let waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
                return Err(FabricError::TimedOut {
                    peer: Rank(rank as u32),
                    waited_ms,
                    tag,
                });
            }
            timeout = Some(self.stall_limit - waited);
        }
        let mut watched = Vec::with_capacity(parts.len());
        let mut fds = Vec::with_capacity(parts.len() + 1);
        for (rank, (link, part)) in self.links.iter().zip(&*parts).enumerate() {
            let Some(link) = link else { continue };
            let mut events = PollFlags::empty();
            events.set(PollFlags::IN, part.incoming.due().is_some());
            events.set(PollFlags::OUT, part.out.due().is_some());
            events.set(PollFlags::RDHUP, link.presence() == Presence::Here);
            if !events.is_empty() {
                watched.push(rank);
                fds.push(PollFd::new(link, events));
            }
        }
        let abort = self.abort.descriptor();
        fds.push(PollFd::new(&abort, PollFlags::IN));
        poll(&mut fds, timeout)?;
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        for (rank, ready) in watched.into_iter().zip(ready) {
            let (Some(link), part) = (&mut self.links[rank], &mut parts[rank]) else {
                continue;
            };
            let hangup = ready.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR);
            part.may_send = hangup || ready.contains(PollFlags::OUT);
            part.may_receive = hangup || ready.contains(PollFlags::IN);
            // If something is due from the peer, its stream itself will tell.
            if hangup && part.incoming.due().is_none() && link.presence() == Presence::Here {
                link.look_at_hangup()?;
            }
        }
        Ok(())
    }
}

impl SocketMesh {
    /// Sleeps for `timeout` at most, while something else than these sockets works for this rank; nothing is due on them.
    ///
    /// # Errors
    /// `Aborted`, at once; `PeerLost` if a peer hangs up.
    pub(crate) fn watch(&mut self, timeout: Duration) -> Result<(), FabricError> {
        let mut watched = Vec::with_capacity(self.links.len());
        let mut fds = Vec::with_capacity(self.links.len() + 1);
        for (rank, link) in self.links.iter().enumerate() {
            if let Some(link) = link.as_ref().filter(|link| link.presence() == Presence::Here) {
                watched.push(rank);
                fds.push(PollFd::new(link, PollFlags::RDHUP));
            }
        }
        let abort = self.abort.descriptor();
        fds.push(PollFd::new(&abort, PollFlags::IN));
        poll(&mut fds, Some(timeout))?;
        let hung_up = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let ready: Vec<bool> = fds.iter().map(|fd| fd.revents().intersects(hung_up)).collect();
        self.abort.check()?;
        for (rank, ready) in watched.into_iter().zip(ready) {
            if let Some(link) = self.links[rank].as_mut().filter(|_| ready) {
                link.look_at_hangup()?;
            }
        }
        Ok(())
    }
}

/// Sorts an exchange by peer, in the caller's order, and does the own rank's part.
fn plan<'e, 's, 'r>(own: Identity, sends: &[Send<'s>], receives: &'e mut [Receive<'r>]) -> Vec<Part<'e, 's, 'r>> {
    let now = Instant::now();
    let mut parts: Vec<Part<'_, '_, '_>> = (0..own.world_size)
        .map(|_| Part {
            out: Outgoing::default(),
            incoming: Incoming::default(),
            may_send: true,
            may_receive: true,
            moved_at: now,
        })
        .collect();
    let mut to_self = VecDeque::new();
    for send in sends {
        assert!(
            send.to.index() < own.world_size,
            "rank {} is outside the world of {}",
            send.to,
            own.world_size
        );
        if send.to == own.rank {
            to_self.push_back(*send);
        } else {
            parts[send.to.index()].out.push(send.tag, send.bytes);
        }
    }
    for receive in receives {
        assert!(
            receive.from.index() < own.world_size,
            "rank {} is outside the world",
            receive.from
        );
        if receive.from == own.rank {
            copy_to_self(to_self.pop_front(), receive);
        } else {
            parts[receive.from.index()].incoming.push(receive);
        }
    }
    assert!(
        to_self.is_empty(),
        "a message to the own rank needs its receive in the same exchange"
    );
    parts
}

/// A message of a rank to itself. Both ends are the caller's, so a disagreement is a programmer's error.
pub(crate) fn copy_to_self(send: Option<Send<'_>>, receive: &mut Receive<'_>) {
    let Some(send) = send else {
        panic!("no message to the own rank for {}", receive.tag)
    };
    assert_eq!(send.tag, receive.tag, "tags of a message to the own rank");
    assert_eq!(
        send.bytes.len(),
        receive.bytes.len(),
        "lengths of a message to the own rank"
    );
    receive.bytes.copy_from_slice(send.bytes);
}

/// poll(2); a signal counts as nothing ready.
pub(crate) fn poll(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> Result<(), FabricError> {
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    match rustix::event::poll(fds, timeout.as_ref()) {
        Ok(_) => Ok(()),
        Err(Errno::INTR) => {
            for fd in fds {
                fd.clear_revents();
            }
            Ok(())
        }
        Err(cause) => Err(FabricError::system("poll", cause)),
    }
}

impl Collective for SocketMesh {
    fn rank(&self) -> Rank {
        self.own.rank
    }

    fn world_size(&self) -> usize {
        self.own.world_size
    }

    fn generation(&self) -> Generation {
        self.own.generation
    }

    fn exchange(&mut self, sends: &[Send<'_>], receives: &mut [Receive<'_>]) -> Result<(), FabricError> {
        self.check()?;
        self.progress.started();
        match self.run(sends, receives) {
            Ok(()) => {
                self.progress.completed();
                Ok(())
            }
            Err(error) => {
                self.fail(&error);
                Err(error)
            }
        }
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn waits_for(&self) -> Option<Rank> {
        self.waits_for
    }

    fn progress(&self) -> Arc<ProgressCounter> {
        Arc::clone(&self.progress)
    }

    fn leave(&mut self) {
        if self.check().is_err() {
            return;
        }
        self.failed = Some(FabricError::Aborted {
            generation: self.own.generation,
        });
        let until = Instant::now() + self.stall_limit;
        let mut full: Vec<&mut Link> = self.links.iter_mut().flatten().collect();
        loop {
            full = full
                .into_iter()
                .filter_map(|link| (link.send_goodbye() == Step::Blocked).then_some(link))
                .collect();
            let left = until.saturating_duration_since(Instant::now());
            if full.is_empty() || left.is_zero() || self.abort.is_aborted() {
                return;
            }
            let abort = self.abort.descriptor();
            let mut fds: Vec<PollFd<'_>> = full.iter().map(|link| PollFd::new(*link, PollFlags::OUT)).collect();
            fds.push(PollFd::new(&abort, PollFlags::IN));
            if poll(&mut fds, Some(left)).is_err() {
                return;
            }
        }
    }
}

impl std::fmt::Debug for SocketMesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SocketMesh")
            .field("own", &self.own)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
