//! Giving up a mesh from another thread (SUP-4).
//!
//! A handle belongs to one generation and knows one direction: once aborted, it stays so. There is no reset, so a thread
//! that still holds an old mesh can never wake up into a newer world.

use crate::FabricError;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tarazed_domain::Generation;

/// Wakes whoever waits on something other than a file descriptor.
type Waker = Box<dyn Fn() + Send + Sync>;

struct Inner {
    generation: Generation,
    aborted: AtomicBool,
    /// A socket pair for poll sets: shutting one end down makes the other readable, for good. No byte is ever written.
    pair: Option<(UnixStream, UnixStream)>,
    /// Wakes threads that wait on something other than a file descriptor.
    wakers: Mutex<Vec<Waker>>,
}

/// Makes a blocked or any later call on a mesh return [`FabricError::Aborted`] within milliseconds. Clones act on the
/// same mesh. May be made before the mesh, so that connecting can be aborted too.
#[derive(Clone)]
pub struct AbortHandle(Arc<Inner>);

impl AbortHandle {
    /// A handle for a mesh that is to be connected.
    ///
    /// # Errors
    /// `System` if no file descriptor is left.
    pub fn new(generation: Generation) -> Result<Self, FabricError> {
        let pair = UnixStream::pair().map_err(|cause| FabricError::system("socketpair", cause))?;
        Ok(Self::with_pair(generation, Some(pair)))
    }

    /// A handle for meshes that wait on wakers alone.
    #[must_use]
    pub fn without_descriptor(generation: Generation) -> Self {
        Self::with_pair(generation, None)
    }

    fn with_pair(generation: Generation, pair: Option<(UnixStream, UnixStream)>) -> Self {
        Self(Arc::new(Inner {
            generation,
            aborted: AtomicBool::new(false),
            pair,
            wakers: Mutex::default(),
        }))
    }

    /// The generation this handle can end.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.0.generation
    }

    /// Ends it. May be called often and from any thread; never blocks on the network.
    pub fn abort(&self) {
        if self.0.aborted.swap(true, Ordering::SeqCst) {
            return;
        }
        if let Some((near, _)) = &self.0.pair {
            // Fails only if already shut down, which nobody else does.
            let _ = near.shutdown(std::net::Shutdown::Both);
        }
        for wake in self.0.wakers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            wake();
        }
    }

    /// Whether it was aborted.
    #[must_use]
    pub fn is_aborted(&self) -> bool {
        self.0.aborted.load(Ordering::SeqCst)
    }

    /// `Aborted` if it was.
    ///
    /// # Errors
    /// `Aborted`.
    pub fn check(&self) -> Result<(), FabricError> {
        if self.is_aborted() {
            Err(FabricError::Aborted {
                generation: self.0.generation,
            })
        } else {
            Ok(())
        }
    }

    /// Readable from the moment of the abort.
    ///
    /// # Panics
    /// On a handle made for a mesh without descriptors.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        match &self.0.pair {
            Some((_, far)) => far.as_fd(),
            None => panic!("this abort handle belongs to an in-process mesh; make one with AbortHandle::new"),
        }
    }

    /// Calls `wake` at the abort, from the thread that aborts; it must not block.
    pub fn on_abort(&self, wake: Waker) {
        self.0.wakers.lock().unwrap_or_else(PoisonError::into_inner).push(wake);
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AbortHandle")
            .field("generation", &self.0.generation)
            .field("aborted", &self.is_aborted())
            .finish_non_exhaustive()
    }
}
