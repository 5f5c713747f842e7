//! Recorded work: a lane's forward and backward as one launch.
//!
//! A step of a small model is hundreds of short kernels, and asking for each costs the host more than the device. The same
//! work over the same memory can be recorded once and then asked for as one [`Graph`]. What is recorded:
//!
//! - everything between the upload of a micro-batch's token ids and the download of its losses. Both stay outside, as do
//!   all waits; ids, losses, weights, gradients and activations lie at the addresses that they had when it was recorded, so
//!   a graph belongs to its shape, its scalars (loss scale) and its buffers: all are part of [`Graphs`]' key.
//! - A graph's launches are those of the unrecorded work, in the same order and shapes on the same stream, so it gives the
//!   same bits (DET-2); the tests compare them.
//! - Memory that recorded work uses lives as long as the graph, scratch included.
//!
//! The first time, work runs unrecorded: its plans are made and its scratch grows to its size. The second time it is
//! recorded and launched; from then on it is launched.

use super::context::Context;
use super::device::CudaDevice;
use super::driver::{Driver, GraphId, StreamId};
use super::memory::{Allocation, CudaBuffer, CudaTokens};
use super::stream::CudaStream;
use crate::device::DeviceError;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Recorded work, ready to be launched on the stream on which it was recorded.
pub struct Graph<D: Driver> {
    context: Arc<Context<D>>,
    id: GraphId,
    stream: StreamId,
    /// Keeps what the recorded work reads and writes.
    _uses: Vec<Arc<Allocation<D>>>,
}

impl<D: Driver> Graph<D> {
    /// Does the recorded work.
    ///
    /// # Panics
    /// On another stream than the one on which it was recorded: it uses that one's scratch memory.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub fn launch(&self, stream: &mut CudaStream<D>) -> Result<(), DeviceError> {
        assert_eq!(
            stream.id(),
            self.stream,
            "a graph belongs to the stream on which it was recorded"
        );
        assert!(!stream.is_capturing(), "a graph is not part of another");
        // SAFETY: the graph holds all memory that its work uses, and its own drop comes after the launch; that memory is
        // freed only when the device is done.
        self.context
            .ask("graph", |driver| unsafe { driver.launch_graph(self.id, self.stream) })
    }
}

impl<D: Driver> Drop for Graph<D> {
    fn drop(&mut self) {
        // A failure is that of earlier work, which its own stream tells.
        let _ = self.context.driver().destroy_graph(self.id);
    }
}

/// Ends a capture also where the recorded work fails or panics.
struct Capture<'a, D: Driver> {
    stream: &'a mut CudaStream<D>,
}

impl<D: Driver> Drop for Capture<'_, D> {
    fn drop(&mut self) {
        if self.stream.is_capturing()
            && let Ok((graph, _)) = self.stream.end_capture()
        {
            let _ = self.stream.context().driver().destroy_graph(graph);
        }
    }
}

impl<D: Driver> CudaDevice<D> {
    /// Records what `work` asks of the stream, without doing it. Work that waits, allocates or moves host data is refused.
    ///
    /// # Errors
    /// Those of `work`; [`DeviceError::Failed`].
    pub fn record<E: From<DeviceError>>(
        &self,
        stream: &mut CudaStream<D>,
        work: impl FnOnce(&mut CudaStream<D>) -> Result<(), E>,
    ) -> Result<Graph<D>, E> {
        stream.begin_capture()?;
        let capture = Capture { stream };
        work(capture.stream)?;
        let (id, uses) = capture.stream.end_capture()?;
        Ok(Graph {
            context: Arc::clone(self.context()),
            id,
            stream: capture.stream.id(),
            _uses: uses,
        })
    }
}

/// What tells recorded work from other: shape, scalars, and the identity of each buffer that the work is given.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct GraphKey(Vec<u64>);

impl GraphKey {
    /// A size or a count.
    #[must_use]
    pub fn size(mut self, size: usize) -> Self {
        self.0.push(size as u64);
        self
    }

    /// A factor, by its bits.
    #[must_use]
    pub fn factor(mut self, factor: f32) -> Self {
        self.0.push(u64::from(factor.to_bits()));
        self
    }

    /// A buffer: while a graph that uses it lives, no other has its address.
    #[must_use]
    pub fn buffer<D: Driver>(mut self, buffer: &CudaBuffer<D>) -> Self {
        self.0.push(buffer.memory.address().0);
        self
    }

    /// Token ids.
    #[must_use]
    pub fn tokens<D: Driver>(mut self, tokens: &CudaTokens<D>) -> Self {
        self.0.push(tokens.memory.address().0);
        self
    }
}

enum Stage<D: Driver> {
    /// It ran once, unrecorded.
    Warm,
    Recorded(Graph<D>),
}

/// The graphs of one stream.
pub struct Graphs<D: Driver> {
    stages: BTreeMap<GraphKey, Stage<D>>,
}

impl<D: Driver> Default for Graphs<D> {
    fn default() -> Self {
        Self {
            stages: BTreeMap::new(),
        }
    }
}

impl<D: Driver> Graphs<D> {
    /// Does `work`: by itself the first time, as a graph from then on. Work of one key always asks for the same.
    ///
    /// # Errors
    /// Those of `work`; [`DeviceError::Failed`].
    pub fn run<E: From<DeviceError>>(
        &mut self,
        device: &CudaDevice<D>,
        stream: &mut CudaStream<D>,
        key: GraphKey,
        work: impl FnOnce(&mut CudaStream<D>) -> Result<(), E>,
    ) -> Result<(), E> {
        let graph = match self.stages.get(&key) {
            None => {
                work(stream)?;
                self.stages.insert(key, Stage::Warm);
                return Ok(());
            }
            Some(Stage::Recorded(graph)) => return Ok(graph.launch(stream)?),
            Some(Stage::Warm) => device.record(stream, work)?,
        };
        graph.launch(stream)?;
        self.stages.insert(key, Stage::Recorded(graph));
        Ok(())
    }

    /// How many are recorded.
    #[must_use]
    pub fn recorded(&self) -> usize {
        let stages = self.stages.values();
        stages.filter(|stage| matches!(stage, Stage::Recorded(_))).count()
    }
}
