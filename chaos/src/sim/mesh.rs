//! The data plane in virtual time: frames that are really encoded and really judged, on links that delay, lose, double,
//! swap and change them.
//!
//! It keeps the promises of [`Collective`] (`runtime/fabric/src/collective.rs`), with the judge of the real one. A message
//! is cut into frames; each frame travels for a random time, but never overtakes another of its link unless a fault makes
//! it. Peers hold a bounded number of frames.

use super::coroutine::wait_for;
use super::process::Process;
use super::random::Random;
use super::world::World;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Generation, Rank};
use tarazed_fabric::{
    AbortHandle, Collective, Corruption, FabricError, FrameHeader, FrameKind, HEADER_BYTES, Identity, Judge,
    ProgressCounter, Receive, RefusalCounters, Send, Tag, TagKind, payload_checksum,
};
use tarazed_protocol::message::BeginPlan;
use tarazed_train::device_thread::{DataPlane, GenerationControl};
use tokio::sync::Notify;
use tokio::time::Instant;

/// Frames under way or unread between two ranks.
const FRAMES_UNREAD_MAX: usize = 32;

struct Frame {
    arrives: Instant,
    bytes: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq)]
enum Presence {
    Here,
    Left,
    Lost { blame: Rank, cause: String },
}

struct Links {
    /// By sender and receiver.
    queues: Vec<VecDeque<Frame>>,
    presence: Vec<Presence>,
    joined: Vec<bool>,
    random: Random,
}

/// What the ranks of one generation share.
pub struct Generational {
    generation: Generation,
    /// Process of each rank, as far as it has come.
    processes: Mutex<Vec<Option<Arc<Process>>>>,
    links: Mutex<Links>,
    changed: Vec<Notify>,
}

impl Generational {
    /// Nobody has come yet.
    #[must_use]
    pub fn new(generation: Generation, world_size: usize, random: Random) -> Arc<Self> {
        let links = Links {
            queues: (0..world_size * world_size).map(|_| VecDeque::new()).collect(),
            presence: vec![Presence::Here; world_size],
            joined: vec![false; world_size],
            random,
        };
        Arc::new(Self {
            generation,
            processes: Mutex::new(vec![None; world_size]),
            links: Mutex::new(links),
            changed: (0..world_size).map(|_| Notify::new()).collect(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn size(&self) -> usize {
        self.changed.len()
    }

    fn process(&self, rank: usize) -> Option<Arc<Process>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)[rank].clone()
    }

    fn announce(&self, rank: usize, presence: Presence) {
        let mut links = self.lock();
        if links.presence[rank] == Presence::Here {
            links.presence[rank] = presence;
        }
        drop(links);
        self.wake_all();
    }

    fn wake_all(&self) {
        self.changed.iter().for_each(Notify::notify_one);
    }

    /// A rank's process is gone: its connections close.
    pub fn lose(&self, rank: usize) {
        let blame = Rank(rank as u32);
        let cause = "it closed the connection".to_owned();
        self.announce(rank, Presence::Lost { blame, cause });
    }
}

/// A process's way to make meshes.
pub struct SimPlane {
    /// The simulation.
    pub world: Arc<World>,
    /// The own process.
    pub process: Arc<Process>,
}

impl DataPlane for SimPlane {
    fn connect(
        &mut self,
        plan: &BeginPlan,
        rank: Rank,
        control: &GenerationControl,
        timeouts: &Timeouts,
    ) -> Result<Box<dyn Collective>, FabricError> {
        let shared = self.world.meet(&self.process, plan.generation, plan.roster.len());
        let own = rank.index();
        shared.processes.lock().unwrap_or_else(PoisonError::into_inner)[own] = Some(Arc::clone(&self.process));
        self.process.takes_part(&shared, own);
        let wake = Arc::clone(&shared);
        control
            .fabric
            .on_abort(Box::new(move || wake.changed[own].notify_one()));
        shared.lock().joined[own] = true;
        shared.wake_all();
        wait_for(self.all_there(&shared, own, control, timeouts))?;
        Ok(Box::new(SimMesh::new(
            &self.world,
            shared,
            own,
            control.fabric.clone(),
            timeouts,
        )))
    }
}

impl SimPlane {
    async fn all_there(
        &self,
        shared: &Generational,
        own: usize,
        control: &GenerationControl,
        timeouts: &Timeouts,
    ) -> Result<(), FabricError> {
        let deadline = Instant::now() + Duration::from_millis(timeouts.connect_ms);
        loop {
            control.fabric.check()?;
            let (missing, lost) = {
                let links = shared.lock();
                let missing: Vec<Rank> = (0..shared.size())
                    .filter(|&rank| !links.joined[rank] || self.world.is_cut(shared, rank, own))
                    .map(|rank| Rank(rank as u32))
                    .collect();
                (missing, first_lost(&links, own))
            };
            if missing.is_empty() {
                return Ok(());
            }
            if let Some(error) = lost {
                return Err(error);
            }
            if Instant::now() >= deadline {
                return Err(FabricError::ConnectTimedOut {
                    waited_ms: timeouts.connect_ms,
                    missing,
                    cause: "they did not come".to_owned(),
                });
            }
            // A cut heals without a word: look again now and then.
            let look_again = (Instant::now() + Duration::from_millis(20)).min(deadline);
            tokio::select! {
                biased;
                () = shared.changed[own].notified() => {}
                () = tokio::time::sleep_until(look_again) => {}
            }
        }
    }
}

/// While a rank waits: a lost peer is to blame, whether it is the one waited for or not.
fn first_lost(links: &Links, own: usize) -> Option<FabricError> {
    links.presence.iter().enumerate().find_map(|(rank, presence)| {
        let Presence::Lost { blame, cause } = presence else {
            return None;
        };
        let peer = if blame.index() == own {
            Rank(rank as u32)
        } else {
            *blame
        };
        (rank != own).then(|| FabricError::PeerLost {
            peer,
            cause: cause.clone(),
        })
    })
}

/// One rank's end of a generation's data plane.
struct SimMesh {
    world: Arc<World>,
    shared: Arc<Generational>,
    own: usize,
    abort: AbortHandle,
    stall_limit: Duration,
    progress: Arc<ProgressCounter>,
    judges: Vec<Judge>,
    sent_frames: Vec<u64>,
    failed: Option<FabricError>,
    waits_for: Option<Rank>,
}

/// A message on its way in.
struct Incoming<'e, 'a> {
    receive: &'e mut Receive<'a>,
    offset: usize,
}

struct Work<'e, 'a> {
    sends: Vec<VecDeque<(Tag, Vec<u8>)>>,
    receives: Vec<VecDeque<Incoming<'e, 'a>>>,
    moved_at: Vec<Instant>,
}

impl Work<'_, '_> {
    fn due(&self, peer: usize) -> Option<Tag> {
        let incoming = self.receives[peer].front().map(|incoming| incoming.receive.tag);
        incoming.or(self.sends[peer].front().map(|(tag, _)| *tag))
    }
}

impl SimMesh {
    fn new(world: &Arc<World>, shared: Arc<Generational>, own: usize, abort: AbortHandle, timeouts: &Timeouts) -> Self {
        let size = shared.size();
        let identity = Identity {
            generation: shared.generation,
            rank: Rank(own as u32),
            world_size: size,
        };
        let refusals = Arc::new(RefusalCounters::default());
        Self {
            world: Arc::clone(world),
            own,
            abort,
            stall_limit: Duration::from_millis(timeouts.collective_ms),
            progress: Arc::default(),
            judges: (0..size as u32)
                .map(|peer| Judge::new(identity, Rank(peer), Arc::clone(&refusals)))
                .collect(),
            sent_frames: vec![0; size],
            failed: None,
            waits_for: None,
            shared,
        }
    }

    fn check(&self) -> Result<(), FabricError> {
        self.abort.check()?;
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Computing takes time; it is spent before the exchange that ends it.
    fn compute_time(&self, sends: &[Send<'_>], receives: &[Receive<'_>]) -> Duration {
        let mut tags = sends
            .iter()
            .map(|s| s.tag.kind)
            .chain(receives.iter().map(|r| r.tag.kind));
        let alone = self.shared.size() == 1;
        if alone || tags.any(|kind| kind == TagKind::GradientPartial) {
            self.world.compute_time(self.shared.size())
        } else {
            Duration::ZERO
        }
    }

    fn plan<'e, 'a>(&self, sends: &[Send<'_>], receives: &'e mut [Receive<'a>]) -> Work<'e, 'a> {
        let size = self.shared.size();
        let mut work = Work {
            sends: (0..size).map(|_| VecDeque::new()).collect(),
            receives: (0..size).map(|_| VecDeque::new()).collect(),
            moved_at: vec![Instant::now(); size],
        };
        let mut to_self = VecDeque::new();
        for send in sends {
            if send.to.index() == self.own {
                to_self.push_back(*send);
            } else {
                work.sends[send.to.index()].push_back((send.tag, send.bytes.to_vec()));
            }
        }
        for receive in receives {
            if receive.from.index() == self.own {
                let sent = to_self.pop_front();
                assert_eq!(
                    sent.map(|sent| sent.tag),
                    Some(receive.tag),
                    "a message to the own rank"
                );
                if let Some(sent) = sent {
                    receive.bytes.copy_from_slice(sent.bytes);
                }
            } else {
                let peer = receive.from.index();
                work.receives[peer].push_back(Incoming { receive, offset: 0 });
            }
        }
        work
    }

    async fn run(&mut self, sends: &[Send<'_>], receives: &mut [Receive<'_>]) -> Result<(), FabricError> {
        let busy = self.compute_time(sends, receives);
        if busy > Duration::ZERO {
            tokio::select! {
                biased;
                () = tokio::time::sleep(busy) => {}
                () = until_aborted(&self.abort, &self.shared.changed[self.own]) => {}
            }
        }
        let shared = Arc::clone(&self.shared);
        let mut work = self.plan(sends, receives);
        loop {
            self.abort.check()?;
            let mut next_arrival = None;
            let own = self.own;
            for peer in (0..shared.size()).filter(|&peer| peer != own) {
                if self.advance(&mut work, peer, &mut next_arrival)? {
                    work.moved_at[peer] = Instant::now();
                    shared.changed[peer].notify_one();
                }
            }
            let pending = (0..shared.size()).filter_map(|peer| work.due(peer).map(|tag| (peer, tag)));
            let waited_for = pending.min_by_key(|&(peer, _)| (work.moved_at[peer], peer));
            self.waits_for = waited_for.map(|(peer, _)| Rank(peer as u32));
            let Some((peer, tag)) = waited_for else {
                return Ok(());
            };
            if let Some(error) = first_lost(&shared.lock(), self.own) {
                return Err(error);
            }
            let deadline = work.moved_at[peer] + self.stall_limit;
            if Instant::now() >= deadline {
                return Err(FabricError::TimedOut {
                    peer: Rank(peer as u32),
                    waited_ms: self.stall_limit.as_millis() as u64,
                    tag,
                });
            }
            let wake = next_arrival.map_or(deadline, |arrival: Instant| arrival.min(deadline));
            tokio::select! {
                biased;
                () = shared.changed[self.own].notified() => {}
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Moves what can move between this rank and one peer; says whether anything did.
    fn advance(
        &mut self,
        work: &mut Work<'_, '_>,
        peer: usize,
        next_arrival: &mut Option<Instant>,
    ) -> Result<bool, FabricError> {
        let shared = Arc::clone(&self.shared);
        let (now, size) = (Instant::now(), shared.size());
        let mut links = shared.lock();
        let mut moved = false;
        while let Some(incoming) = work.receives[peer].front_mut() {
            let queue = &mut links.queues[peer * size + self.own];
            let Some(frame) = queue.front() else { break };
            let arrives = self.world.arrival(&shared, peer, self.own, frame.arrives);
            if arrives > now {
                *next_arrival = Some(next_arrival.map_or(arrives, |next| next.min(arrives)));
                break;
            }
            let Some(frame) = queue.pop_front() else { break };
            moved = true;
            if self.take(peer, incoming, &frame.bytes)? {
                work.receives[peer].pop_front();
            }
        }
        if let (Presence::Left, Some(due)) = (&links.presence[peer], work.due(peer)) {
            return Err(FabricError::PeerLost {
                peer: Rank(peer as u32),
                cause: format!("it left in good order before {due}"),
            });
        }
        while links.queues[self.own * size + peer].len() < FRAMES_UNREAD_MAX {
            let Some((tag, message)) = work.sends[peer].pop_front() else {
                break;
            };
            self.send(&mut links, peer, tag, &message);
            moved = true;
        }
        Ok(moved)
    }

    /// One frame of the message that is due; says whether the message is complete.
    fn take(&mut self, peer: usize, incoming: &mut Incoming<'_, '_>, frame: &[u8]) -> Result<bool, FabricError> {
        let (tag, length) = (incoming.receive.tag, incoming.receive.bytes.len());
        let corrupt = |corruption| FabricError::Corrupt {
            peer: Rank(peer as u32),
            tag,
            corruption,
        };
        let (header, payload) = frame
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or_else(|| corrupt(Corruption::Magic))?;
        let opened = self.judges[peer].header(header, tag, length, incoming.offset)?;
        if opened.bytes != payload.len() {
            return Err(corrupt(Corruption::Oversized));
        }
        self.judges[peer].payload(tag, payload, opened.checksum)?;
        let end = incoming.offset + payload.len();
        incoming.receive.bytes[incoming.offset..end].copy_from_slice(payload);
        incoming.offset = end;
        self.progress.received(payload.len());
        Ok(end == length)
    }

    fn send(&mut self, links: &mut Links, peer: usize, tag: Tag, message: &[u8]) {
        let spoil = self.world.spoils_frames();
        let mut offset = 0;
        loop {
            let payload = &message[offset..message.len().min(offset + self.world.scenario.frame_bytes)];
            let header = FrameHeader {
                kind: FrameKind::Data,
                generation: self.shared.generation,
                source: Rank(self.own as u32),
                destination: Rank(peer as u32),
                sequence: self.sent_frames[peer],
                tag,
                message_bytes: message.len() as u64,
                offset: offset as u64,
                payload_bytes: payload.len() as u64,
                payload_checksum: payload_checksum(payload),
            };
            self.sent_frames[peer] += 1;
            self.progress.sent(payload.len());
            let bytes = [&header.encode()[..], payload].concat();
            self.put(links, peer, bytes, spoil);
            offset += payload.len();
            if offset == message.len() {
                return;
            }
        }
    }

    fn put(&self, links: &mut Links, peer: usize, mut bytes: Vec<u8>, spoil: bool) {
        let Links { queues, random, .. } = links;
        let queue = &mut queues[self.own * self.shared.size() + peer];
        let travel = Duration::from_micros(random.between(20, self.world.scenario.link_us_max));
        let arrives = (Instant::now() + travel).max(queue.back().map_or_else(Instant::now, |last| last.arrives));
        if !(spoil && random.chance(0.02)) {
            queue.push_back(Frame { arrives, bytes });
            return;
        }
        match random.between(0, 3) {
            0 => {} // lost
            1 => {
                let bytes = bytes.clone();
                queue.push_back(Frame {
                    arrives,
                    bytes: bytes.clone(),
                });
                queue.push_back(Frame { arrives, bytes });
            }
            2 => {
                let bit = random.between(0, bytes.len() as u64 * 8 - 1) as usize;
                bytes[bit / 8] ^= 1 << (bit % 8);
                queue.push_back(Frame { arrives, bytes });
            }
            _ => {
                let before = queue.pop_back();
                queue.push_back(Frame { arrives, bytes });
                queue.extend(before.map(|frame| Frame { arrives, ..frame }));
            }
        }
    }
}

async fn until_aborted(abort: &AbortHandle, changed: &Notify) {
    while !abort.is_aborted() {
        changed.notified().await;
    }
}

impl Collective for SimMesh {
    fn rank(&self) -> Rank {
        Rank(self.own as u32)
    }

    fn world_size(&self) -> usize {
        self.shared.size()
    }

    fn generation(&self) -> Generation {
        self.shared.generation
    }

    fn exchange(&mut self, sends: &[Send<'_>], receives: &mut [Receive<'_>]) -> Result<(), FabricError> {
        self.check()?;
        self.progress.started();
        let outcome = wait_for(self.run(sends, receives));
        match &outcome {
            Ok(()) => self.progress.completed(),
            Err(FabricError::Aborted { .. }) => {}
            Err(error) => {
                self.failed = Some(error.clone());
                if let FabricError::PeerLost { peer, .. } | FabricError::TimedOut { peer, .. } = error {
                    let cause = format!("rank {} reports it", self.own);
                    self.shared.announce(self.own, Presence::Lost { blame: *peer, cause });
                }
            }
        }
        outcome
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
        if self.check().is_ok() {
            let generation = self.shared.generation;
            self.failed = Some(FabricError::Aborted { generation });
            self.shared.announce(self.own, Presence::Left);
        }
    }
}

impl Drop for SimMesh {
    fn drop(&mut self) {
        self.shared.lose(self.own);
    }
}

impl Generational {
    /// The processes of two ranks, where both have come.
    pub fn pair(&self, from: usize, to: usize) -> Option<(Arc<Process>, Arc<Process>)> {
        Some((self.process(from)?, self.process(to)?))
    }
}
