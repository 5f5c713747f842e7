//! One rank's end of the mesh, and its making.

use super::agreement::{OFFER_BYTES, Offer, agree};
pub use super::rounds::Limits;
use super::rounds::{Message, rounds};
use crate::{
    AbortHandle, Collective, CommunicatorFault, DevicePlane, DeviceReceive, DeviceSend, FabricError, ProgressCounter,
    Receive, Send, SocketMesh, Tag, TagKind,
};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Generation, Rank};
use tarazed_kernels::cuda::CudaDevice;
use tarazed_kernels::cuda::driver::Driver;
use tarazed_kernels::cuda::nccl::{
    Communicator, CommunicatorError, Direction, Fault, Nccl, NcclAbsence, State, UNIQUE_ID_BYTES, UniqueId,
};

/// First and longest pause between two questions how far NCCL is, in microseconds: short against an exchange of a few
/// milliseconds, long against a system call. Doubled each time.
const POLL_US_MIN: u64 = 20;
const POLL_US_MAX: u64 = 1_000;
/// After NCCL says that some peer is gone, sockets may take so long to say which.
const BLAME_MS_MAX: u64 = 200;
/// Items of [`TagKind::Auxiliary`] at step 0, before a generation's first message.
const OFFER_ITEM: u64 = 1;
const UNIQUE_ID_ITEM: u64 = 2;
/// An announced message: kind, step, item, bytes.
const ANNOUNCED_BYTES: usize = 1 + 3 * size_of::<u64>();

/// What a rank has for NCCL.
pub struct DeviceMeans<D: Driver> {
    /// Where it computes.
    pub device: CudaDevice<D>,
    /// The library, or why there is none.
    pub library: Result<Arc<dyn Nccl>, NcclAbsence>,
    /// Its host, by [`super::agreement::host_identity`].
    pub host: String,
}

impl<D: Driver> DeviceMeans<D> {
    fn offer(&self) -> Offer {
        match &self.library {
            Ok(library) => Offer::ready(library.version(), &self.host, &self.device.facts().bus_id),
            Err(absence) => Offer::Without {
                because: absence.to_string(),
            },
        }
    }
}

/// Takes sockets that were just connected, agrees with all ranks on what carries device memory, and sets it up. Every rank of
/// the generation calls this, with or without NCCL; where all of them have it, the mesh offers a [`DevicePlane`]. `required`
/// is the same on all: without NCCL the mesh comes back failed then, and its first call says why. Its sockets stay open, since
/// others may still wait for offers, and a rank that hangs up would look lost to them.
///
/// # Errors
/// As [`Collective::exchange`]; `Communicator`.
pub fn connect_device_mesh<D: Driver>(
    mut sockets: SocketMesh,
    means: &DeviceMeans<D>,
    required: bool,
    timeouts: &Timeouts,
) -> Result<Box<dyn Collective>, FabricError> {
    let size = sockets.world_size();
    if size == 1 {
        return Ok(Box::new(sockets)); // it has nobody to send to
    }
    let tag = Tag::new(TagKind::Auxiliary, 0, OFFER_ITEM);
    let offers = sockets.all_gather(tag, &means.offer().encode(), &vec![OFFER_BYTES; size])?;
    let offers: Vec<Offer> = offers.iter().map(|bytes| Offer::decode(bytes)).collect();
    let library = match agree(&offers).and(means.library.as_ref().map_err(ToString::to_string)) {
        Ok(library) => Arc::clone(library),
        Err(because) if required => {
            sockets.fail(&FabricError::Communicator {
                fault: CommunicatorFault::Usage,
                cause: format!("NCCL is asked for (cluster.collective), and not all ranks can use it: {because}"),
            });
            return Ok(Box::new(sockets));
        }
        Err(because) => {
            if sockets.rank() == Rank(0) {
                tracing::info!(because, "device memory travels through the host, over sockets");
            }
            return Ok(Box::new(sockets));
        }
    };
    let id = share_id(&mut sockets, &*library)?;
    let mesh = NcclMesh::connect(sockets, &means.device, library, &id, timeouts)?;
    if mesh.rank() == Rank(0) {
        tracing::info!(ranks = size, "device memory travels over NCCL");
    }
    Ok(Box::new(mesh))
}

/// The first rank makes the id; all others hear it, or that there is none.
fn share_id(sockets: &mut SocketMesh, library: &dyn Nccl) -> Result<UniqueId, FabricError> {
    let mut lengths = vec![0; sockets.world_size()];
    lengths[0] = 1 + UNIQUE_ID_BYTES;
    let tag = Tag::new(TagKind::Auxiliary, 0, UNIQUE_ID_ITEM);
    if sockets.rank() == Rank(0) {
        let made = library.unique_id();
        let mut message = vec![u8::from(made.is_ok())];
        message.extend(made.as_ref().map_or([0; UNIQUE_ID_BYTES], |id| id.0));
        sockets.all_gather(tag, &message, &lengths)?;
        return made.map_err(|error| communicator_failed(&error.into()));
    }
    let all = sockets.all_gather(tag, &[], &lengths)?;
    match all[0].split_first() {
        Some((1, id)) => Ok(UniqueId(std::array::from_fn(|byte| id[byte]))),
        _ => Err(FabricError::lost(Rank(0), "NCCL gives it no id for a communicator")),
    }
}

fn communicator_failed(error: &CommunicatorError) -> FabricError {
    let fault = match error {
        CommunicatorError::Device(_) => CommunicatorFault::Process,
        CommunicatorError::Nccl(error) => match error.fault {
            Fault::Peer => CommunicatorFault::Peer,
            Fault::System => CommunicatorFault::System,
            Fault::Process => CommunicatorFault::Process,
            Fault::Usage => CommunicatorFault::Usage,
        },
    };
    FabricError::Communicator {
        fault,
        cause: error.to_string(),
    }
}

/// One rank's end: a communicator for device memory beside the sockets for all else, for one generation.
pub struct NcclMesh<D: Driver> {
    sockets: SocketMesh,
    /// None once it was given back.
    communicator: Option<Communicator<D>>,
    limits: Limits,
    /// A group of NCCL's must be done by then.
    stall_limit: Duration,
    /// A communicator must be given back by then, or the process cannot go on.
    abort_limit: Duration,
    failed: Option<FabricError>,
}

impl<D: Driver> NcclMesh<D> {
    /// Connects the communicator of `id`, whose members are those of the sockets. Where NCCL fails at it, the mesh comes back
    /// failed, and its first call says why: its sockets stay open, or this rank would look lost to peers who still wait.
    ///
    /// # Errors
    /// `Aborted`; `Communicator` if the device has no queue for it.
    pub fn connect(
        sockets: SocketMesh,
        device: &CudaDevice<D>,
        library: Arc<dyn Nccl>,
        id: &UniqueId,
        timeouts: &Timeouts,
    ) -> Result<Self, FabricError> {
        let communicator = Communicator::new(device, library).map_err(|error| communicator_failed(&error.into()))?;
        let (size, rank) = (sockets.world_size() as u32, sockets.rank().0);
        let mut mesh = Self {
            sockets,
            communicator: Some(communicator),
            limits: Limits::default(),
            stall_limit: Duration::from_millis(timeouts.collective_ms),
            abort_limit: Duration::from_millis(timeouts.fence_ms / 2),
            failed: None,
        };
        let connected = mesh.ask(|communicator| communicator.connect(id, size, rank));
        let connected = connected
            .and_then(|()| mesh.wait("a connection", |communicator| Ok(communicator.state()? == State::Ready)));
        match connected.map_err(|error| mesh.fail(error)) {
            Err(aborted @ FabricError::Aborted { .. }) => Err(aborted),
            _ => Ok(mesh),
        }
    }

    /// Sets what a call and a group take at most; the same on all ranks.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    fn check(&self) -> Result<(), FabricError> {
        self.sockets.abort_handle().check()?;
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn ask<T>(
        &mut self,
        call: impl FnOnce(&mut Communicator<D>) -> Result<T, CommunicatorError>,
    ) -> Result<T, FabricError> {
        match &mut self.communicator {
            Some(communicator) => call(communicator).map_err(|error| communicator_failed(&error)),
            None => unreachable!("a mesh that has given its communicator back has failed"),
        }
    }

    /// Waits until NCCL is so far, the mesh is aborted, a peer hangs up, or the limit is over.
    fn wait(
        &mut self,
        what: &str,
        mut is_so_far: impl FnMut(&mut Communicator<D>) -> Result<bool, CommunicatorError>,
    ) -> Result<(), FabricError> {
        let began = Instant::now();
        let mut pause_us = POLL_US_MIN;
        loop {
            self.sockets.abort_handle().check()?;
            if self.ask(&mut is_so_far)? {
                return Ok(());
            }
            if began.elapsed() >= self.stall_limit {
                let limit_ms = self.stall_limit.as_millis();
                return Err(FabricError::Communicator {
                    fault: CommunicatorFault::Peer,
                    cause: format!("NCCL has not come to the end of {what} within {limit_ms} ms"),
                });
            }
            self.sockets.watch(Duration::from_micros(pause_us))?;
            pause_us = (pause_us * 2).min(POLL_US_MAX);
        }
    }

    /// Gives the communicator back after an error: nothing of an exchange may be under way when it returns. What it returns
    /// is what every later call returns.
    fn fail(&mut self, error: FabricError) -> FabricError {
        let error = self.name_the_lost(error);
        let error = match self.give_back(Communicator::abort) {
            Ok(()) => error,
            // Worse: the process must end, whatever began it.
            Err(FabricError::Communicator { fault, cause }) => FabricError::Communicator {
                fault,
                cause: format!("{cause}; it was given up because: {error}"),
            },
            Err(worse) => worse,
        };
        self.sockets.fail(&error);
        if !matches!(error, FabricError::Aborted { .. }) {
            self.failed = Some(error.clone());
        }
        error
    }

    /// NCCL says that a peer is gone, and not which; its connection says so, too.
    fn name_the_lost(&mut self, error: FabricError) -> FabricError {
        let of_a_peer = CommunicatorFault::Peer;
        if !matches!(&error, FabricError::Communicator { fault, .. } if *fault == of_a_peer) {
            return error;
        }
        let until = Instant::now() + Duration::from_millis(BLAME_MS_MAX);
        while Instant::now() < until {
            match self.sockets.watch(Duration::from_micros(POLL_US_MAX)) {
                Ok(()) => {}
                Err(FabricError::PeerLost { peer, cause }) => {
                    let cause = format!("{cause}; {error}");
                    return FabricError::PeerLost { peer, cause };
                }
                Err(other) => return other,
            }
        }
        error
    }

    /// Gives the communicator back on a thread of its own: that is known to hang in some versions of NCCL. Nobody is inside
    /// another of its calls: whoever has it is here.
    fn give_back(
        &mut self,
        by: impl FnOnce(Communicator<D>) -> Result<(), CommunicatorError> + std::marker::Send + 'static,
    ) -> Result<(), FabricError> {
        let Some(communicator) = self.communicator.take() else {
            return Ok(());
        };
        let (sender, done) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("nccl-abort".to_owned());
        // Where the receiver has given up there is nobody to tell.
        let spawned = thread.spawn(move || drop(sender.send(by(communicator))));
        spawned.map_err(|cause| FabricError::system("a thread for NCCL", cause))?;
        let fault = CommunicatorFault::Process;
        match done.recv_timeout(self.abort_limit) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(FabricError::Communicator {
                fault,
                cause: format!("a communicator cannot be given back: {error}"),
            }),
            Err(_) => Err(FabricError::Communicator {
                fault,
                cause: format!(
                    "NCCL has not given a communicator back within {} ms, as some of its versions do not",
                    self.abort_limit.as_millis()
                ),
            }),
        }
    }

    fn move_memory(&mut self, sends: &[DeviceSend], receives: &[DeviceReceive]) -> Result<(), FabricError> {
        let (own, size) = (self.sockets.rank(), self.sockets.world_size());
        for peer in sends.iter().map(|s| s.to).chain(receives.iter().map(|r| r.from)) {
            assert!(
                peer.index() < size && peer != own,
                "rank {peer} in a world of {size}, from {own}"
            );
        }
        announce(&mut self.sockets, sends, receives)?;
        let leaving = sends.iter().map(|send| Message {
            peer: send.to,
            direction: Direction::Send,
            span: &send.span,
        });
        let arriving = receives.iter().map(|receive| Message {
            peer: receive.from,
            direction: Direction::Receive,
            span: &receive.span,
        });
        for round in rounds(own, size, self.limits, leaving.chain(arriving)) {
            self.ask(|communicator| communicator.start(&round))?;
            self.wait("a group", Communicator::is_done)?;
        }
        let progress = self.sockets.progress();
        progress.sent(sends.iter().map(|send| send.span.bytes()).sum());
        progress.received(receives.iter().map(|receive| receive.span.bytes()).sum());
        Ok(())
    }
}

/// What one rank has for another in an exchange, as both write it down.
#[derive(Default)]
struct Between {
    first: Option<Tag>,
    bytes: Vec<u8>,
    lengths: Vec<(Tag, u64)>,
}

impl Between {
    fn push(&mut self, tag: Tag, length: usize) {
        self.first.get_or_insert(tag);
        self.bytes.push(tag.kind as u8);
        for number in [tag.step, tag.item, length as u64] {
            self.bytes.extend(number.to_le_bytes());
        }
        self.lengths.push((tag, length as u64));
    }

    /// What differs first from what was due.
    fn compare(&self, peer: Rank, heard: &[u8]) -> Result<(), FabricError> {
        let heard = heard.chunks_exact(ANNOUNCED_BYTES);
        for ((&(expected, due), said), written) in self
            .lengths
            .iter()
            .zip(heard)
            .zip(self.bytes.chunks_exact(ANNOUNCED_BYTES))
        {
            if said == written {
                continue;
            }
            let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| said[1 + 8 * at + i]));
            let kind = TagKind::from_wire(said[0]).unwrap_or(TagKind::Auxiliary);
            let (received, bytes) = (Tag::new(kind, word(0), word(1)), word(2));
            return Err(if received == expected {
                FabricError::LengthMismatch {
                    peer,
                    tag: expected,
                    expected: due,
                    received: bytes,
                }
            } else {
                FabricError::TagMismatch {
                    peer,
                    expected,
                    received,
                }
            });
        }
        Ok(())
    }
}

/// Tells every rank that has a part in the exchange with this one what comes, hears the same from it, and compares: NCCL
/// would mix up or wait for ever what does not fit. Whoever returns knows that its peers are in the same exchange.
fn announce(sockets: &mut SocketMesh, sends: &[DeviceSend], receives: &[DeviceReceive]) -> Result<(), FabricError> {
    let mut peers: BTreeMap<Rank, (Between, Between)> = BTreeMap::new();
    for send in sends {
        peers.entry(send.to).or_default().0.push(send.tag, send.span.bytes());
    }
    for receive in receives {
        let (_, due) = peers.entry(receive.from).or_default();
        due.push(receive.tag, receive.span.bytes());
    }
    // Where one side has nothing to say, both know the other's first message.
    let tag = |said: &Between, other: &Between| match said.first.or(other.first) {
        Some(tag) => tag,
        None => unreachable!("a peer is listed for a message"),
    };
    let mut heard: Vec<Vec<u8>> = peers.values().map(|(_, due)| vec![0; due.bytes.len()]).collect();
    let announcements: Vec<Send<'_>> = peers
        .iter()
        .map(|(&to, (said, due))| Send {
            to,
            tag: tag(said, due),
            bytes: &said.bytes,
        })
        .collect();
    let mut answers: Vec<Receive<'_>> = peers
        .iter()
        .zip(&mut heard)
        .map(|((&from, (said, due)), bytes)| Receive {
            from,
            tag: tag(due, said),
            bytes,
        })
        .collect();
    sockets.exchange(&announcements, &mut answers)?;
    for ((&peer, (_, due)), heard) in peers.iter().zip(&heard) {
        due.compare(peer, heard)?;
    }
    Ok(())
}

impl<D: Driver> DevicePlane for NcclMesh<D> {
    fn exchange_memory(&mut self, sends: &[DeviceSend], receives: &[DeviceReceive]) -> Result<(), FabricError> {
        self.check()?;
        let progress = self.sockets.progress();
        progress.started();
        match self.move_memory(sends, receives) {
            Ok(()) => {
                progress.completed();
                Ok(())
            }
            Err(error) => Err(self.fail(error)),
        }
    }
}

impl<D: Driver> Collective for NcclMesh<D> {
    fn rank(&self) -> Rank {
        self.sockets.rank()
    }

    fn world_size(&self) -> usize {
        self.sockets.world_size()
    }

    fn generation(&self) -> Generation {
        self.sockets.generation()
    }

    fn exchange(&mut self, sends: &[Send<'_>], receives: &mut [Receive<'_>]) -> Result<(), FabricError> {
        self.check()?;
        self.sockets.exchange(sends, receives)
    }

    fn device_plane(&mut self) -> Option<&mut dyn DevicePlane> {
        Some(self)
    }

    fn abort_handle(&self) -> AbortHandle {
        self.sockets.abort_handle()
    }

    fn waits_for(&self) -> Option<Rank> {
        self.sockets.waits_for()
    }

    fn progress(&self) -> Arc<ProgressCounter> {
        self.sockets.progress()
    }

    fn leave(&mut self) {
        if self.check().is_ok() {
            let finalized = self.ask(Communicator::finalize).and_then(|()| {
                self.stall_limit = self.abort_limit;
                self.wait("leaving", |communicator| Ok(communicator.state()? == State::Ready))
            });
            let left = match finalized {
                Ok(()) => self.give_back(Communicator::destroy),
                Err(error) => self.give_back(Communicator::abort).and(Err(error)),
            };
            if let Err(error) = left {
                tracing::warn!(%error, "NCCL was not left in good order");
            }
            self.failed = Some(FabricError::Aborted {
                generation: self.generation(),
            });
        }
        self.sockets.leave();
    }

    fn retire(&mut self) -> Result<(), FabricError> {
        let generation = self.generation();
        self.failed.get_or_insert(FabricError::Aborted { generation });
        self.give_back(Communicator::abort)
    }
}

impl<D: Driver> Drop for NcclMesh<D> {
    fn drop(&mut self) {
        if let Err(error) = self.retire() {
            tracing::warn!(%error, "a communicator is left behind");
        }
    }
}

impl<D: Driver> fmt::Debug for NcclMesh<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclMesh")
            .field("sockets", &self.sockets)
            .field("communicator", &self.communicator)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
