//! NCCL between ranks that are threads of one process: it writes calls down, moves real bytes between the memories of
//! recording or emulated drivers, and fails, stalls or hangs where it is told to.
//!
//! It is stricter than the library. A send outside of a group, a group in a group, a communicator asked for more before it
//! was seen ready, given back twice, or given back by a thread with an open group: each panics with what was wrong. What was
//! not given back, [`RecordingNccl::left`] names.
//!
//! It knows no time: whether a peer is slow or gone it never says by itself, as NCCL over memory and links does not.

use super::*;
use crate::cuda::recording::RecordingDriver;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The device memory of one rank, as the recorder reaches it.
pub trait Memory: Send + Sync + 'static {
    /// Bytes that are allocated.
    fn read(&self, from: Address, bytes: usize) -> Vec<u8>;
    /// Overwrites bytes that are allocated.
    fn write(&self, to: Address, bytes: &[u8]);
    /// Work stands in a queue and uses these ranges.
    fn occupy(&self, stream: StreamId, ranges: &[(Address, usize)]);
    /// It is done.
    fn settle(&self, stream: StreamId);
    /// Whether its queues say that they are idle, whatever stands in them: [`Nccl::state`] is busy instead.
    fn is_always_idle(&self) -> bool {
        false
    }
}

impl Memory for RecordingDriver {
    fn read(&self, from: Address, bytes: usize) -> Vec<u8> {
        self.peek(from, bytes)
    }

    fn write(&self, to: Address, bytes: &[u8]) {
        self.poke(to, bytes);
    }

    fn occupy(&self, stream: StreamId, ranges: &[(Address, usize)]) {
        Self::occupy(self, stream, ranges);
    }

    fn settle(&self, stream: StreamId) {
        Self::settle(self, stream);
    }
}

#[cfg(feature = "emulator")]
impl Memory for crate::cuda::CudaDevice<crate::cuda::emulated::EmulatedDriver> {
    fn read(&self, from: Address, bytes: usize) -> Vec<u8> {
        self.driver().peek(from, bytes)
    }

    fn write(&self, to: Address, bytes: &[u8]) {
        self.driver().poke(to, bytes);
    }

    fn occupy(&self, _: StreamId, _: &[(Address, usize)]) {}

    fn settle(&self, _: StreamId) {}

    fn is_always_idle(&self) -> bool {
        true
    }
}

/// One call of one rank, as it was asked for. [`Nccl::state`] is not written down: how often it is asked is a matter of time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Call {
    /// [`Nccl::unique_id`]
    UniqueId,
    /// [`Nccl::init`], with ranks and rank.
    Init(u32, u32),
    /// [`Nccl::group_start`]
    GroupStart,
    /// [`Nccl::send`], with peer and bytes.
    Send(u32, usize),
    /// [`Nccl::receive`], with peer and bytes.
    Receive(u32, usize),
    /// [`Nccl::group_end`]
    GroupEnd,
    /// [`Nccl::finalize`]
    Finalize,
    /// [`Nccl::destroy`]
    Destroy,
    /// [`Nccl::abort`]
    Abort,
}

/// A send or a receive that waits for its other half.
#[derive(Clone, Copy)]
struct Half {
    communicator: CommunicatorId,
    at: Address,
    bytes: usize,
}

struct Member {
    unique: UniqueId,
    rank: u32,
    ranks: u32,
    memory: Arc<dyn Memory>,
    /// All members were there once.
    connected: bool,
    /// Its owner has seen it ready since it was asked last.
    seen_ready: bool,
    finalized: bool,
    /// Halves under way, by queue.
    pending: BTreeMap<StreamId, usize>,
    failed: Option<NcclError>,
}

#[derive(Default)]
struct World {
    handles: u64,
    members: BTreeMap<CommunicatorId, Member>,
    /// By unique id, sender and receiver.
    sends: BTreeMap<(UniqueId, u32, u32), VecDeque<Half>>,
    receives: BTreeMap<(UniqueId, u32, u32), VecDeque<Half>>,
    aborts_hang: bool,
    stalls: bool,
}

/// What the ranks of one test share.
#[derive(Default)]
pub struct RecordingWorld {
    state: Mutex<World>,
    changed: Condvar,
}

impl RecordingWorld {
    /// One that nothing has happened in.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on, aborts hang, as those of some versions do; until this is called with `false`.
    pub fn hang_aborts(&self, hang: bool) {
        self.lock().aborts_hang = hang;
        self.changed.notify_all();
    }

    /// From now on, no bytes move; until this is called with `false`.
    pub fn stall(&self, stall: bool) {
        let mut world = self.lock();
        world.stalls = stall;
        world.deliver();
    }
}

impl World {
    /// Moves what has both halves.
    fn deliver(&mut self) {
        if self.stalls {
            return;
        }
        for (pair, sends) in &mut self.sends {
            let Some(receives) = self.receives.get_mut(pair) else {
                continue;
            };
            while let (Some(send), Some(receive)) = (sends.front().copied(), receives.front().copied()) {
                assert_eq!(
                    send.bytes, receive.bytes,
                    "the halves of a message from {} to {}",
                    pair.1, pair.2
                );
                sends.pop_front();
                receives.pop_front();
                let bytes = self.members[&send.communicator].memory.read(send.at, send.bytes);
                self.members[&receive.communicator].memory.write(receive.at, &bytes);
                for half in [send, receive] {
                    let Some(member) = self.members.get_mut(&half.communicator) else {
                        unreachable!("it was just found")
                    };
                    member.settle_one();
                }
            }
        }
    }

    fn member(&mut self, id: CommunicatorId) -> &mut Member {
        match self.members.get_mut(&id) {
            Some(member) => member,
            None => panic!("{id:?} was given back"),
        }
    }

    fn remove(&mut self, id: CommunicatorId) {
        let Some(member) = self.members.remove(&id) else {
            panic!("{id:?} is given back twice")
        };
        for halves in self.sends.values_mut().chain(self.receives.values_mut()) {
            halves.retain(|half| half.communicator != id);
        }
        for stream in member.pending.keys() {
            member.memory.settle(*stream);
        }
    }
}

impl Member {
    /// One half is done; a rank has one queue for all of them.
    fn settle_one(&mut self) {
        let Some((&stream, count)) = self.pending.iter_mut().next() else {
            unreachable!("what is delivered was pending")
        };
        *count -= 1;
        if *count == 0 {
            self.pending.remove(&stream);
            self.memory.settle(stream);
        }
    }
}

#[derive(Default)]
struct Log {
    calls: Vec<Call>,
    /// Calls so far, by name, states left out.
    asked: Vec<&'static str>,
    fails: Option<(usize, Fault)>,
    /// Halves asked for in the open group.
    group: Option<Vec<(bool, u32, StreamId, Half)>>,
}

/// One rank's library. Its clones are the same rank's, so a test keeps one and gives one away.
#[derive(Clone)]
pub struct RecordingNccl {
    world: Arc<RecordingWorld>,
    memory: Arc<dyn Memory>,
    log: Arc<Mutex<Log>>,
}

impl RecordingNccl {
    /// The library of a rank with this memory.
    #[must_use]
    pub fn new(world: &Arc<RecordingWorld>, memory: impl Memory) -> Self {
        Self {
            world: Arc::clone(world),
            memory: Arc::new(memory),
            log: Arc::default(),
        }
    }

    fn locked(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the call of this number fail, counted from 0 and from the rank's first call on, without states.
    pub fn fail(&self, number: usize, fault: Fault) {
        self.locked().fails = Some((number, fault));
    }

    /// Lets every communicator of this rank fail by itself, as [`Nccl::state`] tells.
    pub fn fail_communicators(&self, fault: Fault) {
        let mut world = self.world.lock();
        let mine = |member: &&mut Member| Arc::ptr_eq(&member.memory, &self.memory);
        for member in world.members.values_mut().filter(mine) {
            member.failed = Some(error("ncclCommGetAsyncError", fault));
        }
    }

    /// The names of all calls so far, in order; failed ones too, states not.
    #[must_use]
    pub fn asked(&self) -> Vec<&'static str> {
        self.locked().asked.clone()
    }

    /// Takes the calls since the last time; failed ones are not among them.
    #[must_use]
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.locked().calls)
    }

    /// Everything of this rank's that was not given back or ended, in words; empty where all was.
    #[must_use]
    pub fn left(&self) -> Vec<String> {
        let group = self.locked().group.as_ref().map(|_| "an open group".to_owned());
        let world = self.world.lock();
        let mine = world
            .members
            .iter()
            .filter(|(_, m)| Arc::ptr_eq(&m.memory, &self.memory));
        mine.map(|(id, _)| format!("{id:?}")).chain(group).collect()
    }

    /// Counts a call, and fails it where it is to fail.
    fn enter(&self, name: &'static str) -> Result<MutexGuard<'_, Log>, NcclError> {
        let mut log = self.locked();
        let number = log.asked.len();
        log.asked.push(name);
        match log.fails {
            Some((at, fault)) if at == number => Err(error(name, fault)),
            _ => Ok(log),
        }
    }

    fn half(&self, is_send: bool, peer: u32, stream: StreamId, half: Half) -> Result<(), NcclError> {
        let mut log = self.enter(if is_send { "ncclSend" } else { "ncclRecv" })?;
        let Some(group) = &mut log.group else {
            panic!("a transfer outside of a group")
        };
        group.push((is_send, peer, stream, half));
        log.calls.push(if is_send {
            Call::Send(peer, half.bytes)
        } else {
            Call::Receive(peer, half.bytes)
        });
        let mut world = self.world.lock();
        let member = world.member(half.communicator);
        assert!(peer < member.ranks && peer != member.rank, "no peer {peer}");
        assert!(
            member.seen_ready && !member.finalized,
            "asked for more before it was ready"
        );
        Ok(())
    }

    fn enqueue(&self, halves: Vec<(bool, u32, StreamId, Half)>) {
        let mut world = self.world.lock();
        for (is_send, peer, stream, half) in halves {
            let member = world.member(half.communicator);
            let (unique, rank) = (member.unique, member.rank);
            *member.pending.entry(stream).or_default() += 1;
            member.memory.occupy(stream, &[(half.at, half.bytes)]);
            member.seen_ready = false;
            let (pairs, pair) = if is_send {
                (&mut world.sends, (unique, rank, peer))
            } else {
                (&mut world.receives, (unique, peer, rank))
            };
            pairs.entry(pair).or_default().push_back(half);
        }
        world.deliver();
    }
}

fn error(call: &'static str, fault: Fault) -> NcclError {
    let code = match fault {
        Fault::Process => 1,
        Fault::System => 2,
        Fault::Usage => 5,
        Fault::Peer => 6,
    };
    NcclError {
        call,
        fault,
        name: super::fault(code).1,
        detail: String::new(),
    }
}

impl Nccl for RecordingNccl {
    fn version(&self) -> u32 {
        22_809
    }

    fn unique_id(&self) -> Result<UniqueId, NcclError> {
        self.enter("ncclGetUniqueId")?.calls.push(Call::UniqueId);
        let mut world = self.world.lock();
        world.handles += 1;
        let mut id = [0; UNIQUE_ID_BYTES];
        id[..8].copy_from_slice(&world.handles.to_le_bytes());
        Ok(UniqueId(id))
    }

    fn init(&self, id: &UniqueId, ranks: u32, rank: u32, made: &mut Option<CommunicatorId>) -> Result<(), NcclError> {
        let entered = self.enter("ncclCommInitRankConfig");
        let mut world = self.world.lock();
        world.handles += 1;
        let communicator = CommunicatorId(world.handles);
        let failed = entered.as_ref().err().cloned();
        world.members.insert(
            communicator,
            Member {
                unique: *id,
                rank,
                ranks,
                memory: Arc::clone(&self.memory),
                connected: false,
                seen_ready: false,
                finalized: false,
                pending: BTreeMap::new(),
                failed,
            },
        );
        *made = Some(communicator);
        entered?.calls.push(Call::Init(ranks, rank));
        Ok(())
    }

    fn state(&self, communicator: CommunicatorId) -> Result<State, NcclError> {
        let mut world = self.world.lock();
        let unique = world.member(communicator).unique;
        let present = world.members.values().filter(|member| member.unique == unique).count();
        let member = world.member(communicator);
        if let Some(failed) = &member.failed {
            return Err(failed.clone());
        }
        // Whoever was there once may be gone again.
        member.connected |= present == member.ranks as usize;
        let under_way = member.memory.is_always_idle() && !member.pending.is_empty();
        if !member.connected || under_way {
            return Ok(State::Busy);
        }
        member.seen_ready = true;
        Ok(State::Ready)
    }

    fn group_start(&self) -> Result<(), NcclError> {
        let mut log = self.enter("ncclGroupStart")?;
        assert!(log.group.is_none(), "a group in a group");
        log.group = Some(Vec::new());
        log.calls.push(Call::GroupStart);
        Ok(())
    }

    fn group_end(&self) -> Result<(), NcclError> {
        let halves = self.locked().group.take();
        let Some(halves) = halves else {
            panic!("the end of no group")
        };
        self.enter("ncclGroupEnd")?.calls.push(Call::GroupEnd);
        self.enqueue(halves);
        Ok(())
    }

    unsafe fn send(
        &self,
        communicator: CommunicatorId,
        to: u32,
        from: Address,
        bytes: usize,
        stream: StreamId,
    ) -> Result<(), NcclError> {
        let at = from;
        self.half(
            true,
            to,
            stream,
            Half {
                communicator,
                at,
                bytes,
            },
        )
    }

    unsafe fn receive(
        &self,
        communicator: CommunicatorId,
        from: u32,
        to: Address,
        bytes: usize,
        stream: StreamId,
    ) -> Result<(), NcclError> {
        let at = to;
        self.half(
            false,
            from,
            stream,
            Half {
                communicator,
                at,
                bytes,
            },
        )
    }

    fn finalize(&self, communicator: CommunicatorId) -> Result<(), NcclError> {
        self.enter("ncclCommFinalize")?.calls.push(Call::Finalize);
        let mut world = self.world.lock();
        let member = world.member(communicator);
        assert!(member.pending.is_empty(), "finalised with work under way");
        member.finalized = true;
        Ok(())
    }

    fn destroy(&self, communicator: CommunicatorId) -> Result<(), NcclError> {
        let entered = self
            .enter("ncclCommDestroy")
            .map(|mut log| log.calls.push(Call::Destroy));
        let mut world = self.world.lock();
        assert!(
            world.member(communicator).finalized,
            "destroyed before it was finalised"
        );
        world.remove(communicator);
        entered
    }

    fn abort(&self, communicator: CommunicatorId) -> Result<(), NcclError> {
        let entered = self.enter("ncclCommAbort").map(|mut log| {
            assert!(log.group.is_none(), "aborted inside a group");
            log.calls.push(Call::Abort);
        });
        let mut world = self.world.lock();
        while world.aborts_hang {
            world = self.world.changed.wait(world).unwrap_or_else(PoisonError::into_inner);
        }
        world.remove(communicator);
        entered
    }
}
