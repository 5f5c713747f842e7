//! One rank's communicator: built once, used by one owner, given back once.
//!
//! - **Nobody is inside a call when it aborts.** Every call takes the communicator by exclusive reference, and
//!   [`Communicator::abort`] takes it whole: whoever holds it to abort it knows that no other thread calls for it. An owner
//!   that hangs inside a call cannot be aborted from outside; its process ends.
//! - A group that was started is ended, also where a call inside it fails: a thread's open group would swallow all that it
//!   asks for next.
//! - Memory that a transfer names stays allocated until its queue is idle or the communicator is given back, whatever its
//!   owner drops.
//! - Transfers have a queue of their own. One that never ends holds up nothing else of the rank's, but the freeing of memory.

use super::{CALL_BYTES_MAX, CommunicatorId, GROUP_CALLS_MAX, Nccl, NcclError, State, UniqueId};
use crate::cuda::context::Context;
use crate::cuda::device::CudaDevice;
use crate::cuda::driver::Driver;
use crate::cuda::memory::DeviceSpan;
use crate::cuda::stream::Queue;
use crate::device::DeviceError;
use std::fmt;
use std::sync::Arc;

const OPERATION: &str = "exchange";

/// What went wrong with a communicator, or with the device below it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CommunicatorError {
    /// NCCL's answer.
    #[error(transparent)]
    Nccl(#[from] NcclError),
    /// The device's.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Which way a transfer goes, seen from the owner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// To the peer.
    Send,
    /// From the peer.
    Receive,
}

/// Part of a message, at most [`CALL_BYTES_MAX`] long.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// The other rank.
    pub peer: u32,
    /// Which way.
    pub direction: Direction,
    /// The memory.
    pub span: DeviceSpan,
    /// Where the part begins in it, bytes.
    pub offset: usize,
    /// Its length, bytes; not 0.
    pub bytes: usize,
}

/// One rank's end of a communicator. It has one owner, who may hand it to another thread as a whole.
pub struct Communicator<D: Driver> {
    library: Arc<dyn Nccl>,
    context: Arc<Context<D>>,
    /// None before [`Communicator::connect`] and once it is given back.
    id: Option<CommunicatorId>,
    /// Given back before the memory: that waits for what stands in it.
    queue: Queue<D>,
    in_flight: Vec<DeviceSpan>,
}

impl<D: Driver> Communicator<D> {
    /// One that is not connected, with a queue of its own.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub fn new(device: &CudaDevice<D>, library: Arc<dyn Nccl>) -> Result<Self, DeviceError> {
        let context = Arc::clone(device.context());
        Ok(Self {
            library,
            id: None,
            queue: Queue::new(&context)?,
            in_flight: Vec::new(),
            context,
        })
    }

    /// Begins to connect with the others that were given the same id; done when [`Communicator::state`] says so.
    ///
    /// # Errors
    /// [`CommunicatorError`]; the communicator is then only good to be aborted.
    ///
    /// # Panics
    /// If it was connected before.
    pub fn connect(&mut self, id: &UniqueId, ranks: u32, rank: u32) -> Result<(), CommunicatorError> {
        assert!(self.id.is_none(), "a communicator is connected once");
        self.context.ask(OPERATION, Driver::make_current)?;
        Ok(self.library.init(id, ranks, rank, &mut self.id)?)
    }

    /// Whether it may be asked for the next thing; does not wait.
    ///
    /// # Errors
    /// [`CommunicatorError`], also of work asked for before.
    ///
    /// # Panics
    /// Before it was connected.
    pub fn state(&mut self) -> Result<State, CommunicatorError> {
        Ok(self.library.state(self.id())?)
    }

    /// Asks for transfers, which progress together; does not wait. None of their memory is freed, and their bytes must not be
    /// written by others, nor those of receives be read, before [`Communicator::is_done`] says so.
    ///
    /// # Errors
    /// [`CommunicatorError`]; some of them may be under way all the same, until the communicator is given back.
    ///
    /// # Panics
    /// If there are more than [`GROUP_CALLS_MAX`], one is empty, too long or outside its memory: the caller cuts messages.
    pub fn start(&mut self, transfers: &[Transfer]) -> Result<(), CommunicatorError> {
        assert!(
            transfers.len() <= GROUP_CALLS_MAX,
            "{} calls in a group",
            transfers.len()
        );
        let id = self.id();
        self.context.ask(OPERATION, Driver::make_current)?;
        self.library.group_start()?;
        // Before the first call names it.
        self.in_flight
            .extend(transfers.iter().map(|transfer| transfer.span.clone()));
        let asked = transfers.iter().try_for_each(|transfer| self.ask(id, transfer));
        // Also where a call failed.
        let ended = self.library.group_end();
        asked.and(ended)?;
        Ok(())
    }

    fn ask(&self, id: CommunicatorId, transfer: &Transfer) -> Result<(), NcclError> {
        let &Transfer {
            peer,
            direction,
            ref span,
            offset,
            bytes,
        } = transfer;
        let end = offset.checked_add(bytes);
        assert!(
            (1..=CALL_BYTES_MAX).contains(&bytes) && end.is_some_and(|end| end <= span.bytes()),
            "{bytes} bytes from {offset} on of {span:?} in one call"
        );
        let at = span.address().further(offset);
        // SAFETY: the range lies within the span, as was just checked, and a clone of the span is kept in `in_flight` until
        // the queue was seen idle, or the communicator was given back.
        unsafe {
            match direction {
                Direction::Send => self.library.send(id, peer, at, bytes, self.queue.id()),
                Direction::Receive => self.library.receive(id, peer, at, bytes, self.queue.id()),
            }
        }
    }

    /// Whether all transfers are done; does not wait. If so, their memory is let go of.
    ///
    /// # Errors
    /// [`CommunicatorError`], also of work asked for before.
    ///
    /// # Panics
    /// Before it was connected.
    pub fn is_done(&mut self) -> Result<bool, CommunicatorError> {
        // In this order: until a group has taken its place in the queue, the queue may look idle.
        if self.library.state(self.id())? == State::Busy {
            return Ok(false);
        }
        let queue = self.queue.id();
        let idle = self.context.ask(OPERATION, |driver| driver.is_idle(queue))?;
        if idle {
            self.in_flight.clear();
        }
        Ok(idle)
    }

    /// Begins to leave in good order; done when [`Communicator::state`] says so.
    ///
    /// # Errors
    /// [`CommunicatorError`].
    ///
    /// # Panics
    /// Before it was connected.
    pub fn finalize(&mut self) -> Result<(), CommunicatorError> {
        Ok(self.library.finalize(self.id())?)
    }

    /// Gives it back after it was finalised. May wait.
    ///
    /// # Errors
    /// [`CommunicatorError`].
    pub fn destroy(mut self) -> Result<(), CommunicatorError> {
        self.give_back(|library, id| library.destroy(id))
    }

    /// Ends what is under way and gives it back. May wait, in some versions of NCCL for ever: nothing else should depend on
    /// the thread that calls this. Until it returns, the memory of transfers stays allocated.
    ///
    /// # Errors
    /// [`CommunicatorError`].
    pub fn abort(mut self) -> Result<(), CommunicatorError> {
        self.give_back(|library, id| library.abort(id))
    }

    fn give_back(
        &mut self,
        by: impl FnOnce(&dyn Nccl, CommunicatorId) -> Result<(), NcclError>,
    ) -> Result<(), CommunicatorError> {
        let Some(id) = self.id.take() else {
            return Ok(());
        };
        // Also on a device that is lost: the library's own threads are to end. This may be another thread than before.
        let current = self.context.driver().make_current();
        by(&*self.library, id)?;
        current.map_err(|error| self.context.judge(OPERATION, &error))?;
        Ok(())
    }

    fn id(&self) -> CommunicatorId {
        match self.id {
            Some(id) => id,
            None => panic!("a communicator is used before it was connected"),
        }
    }
}

impl<D: Driver> Drop for Communicator<D> {
    fn drop(&mut self) {
        // Where its owner was unwound. Nobody is left to tell of a failure.
        let _ = self.give_back(|library, id| library.abort(id));
    }
}

impl<D: Driver> fmt::Debug for Communicator<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("id", &self.id)
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}
