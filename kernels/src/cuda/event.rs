//! Events, given back when dropped.

use super::context::Context;
use super::driver::{Driver, EventId, StreamId};
use crate::device::DeviceError;
use std::sync::Arc;

/// A point in a queue.
pub(super) struct Event<D: Driver> {
    context: Arc<Context<D>>,
    id: EventId,
}

impl<D: Driver> Event<D> {
    pub fn new(context: &Arc<Context<D>>) -> Result<Self, DeviceError> {
        let id = context.ask("event", Driver::create_event)?;
        Ok(Self {
            context: Arc::clone(context),
            id,
        })
    }

    pub const fn id(&self) -> EventId {
        self.id
    }

    /// Puts it behind what a queue holds.
    pub fn record(&self, operation: &'static str, stream: StreamId) -> Result<(), DeviceError> {
        self.context.ask(operation, |driver| driver.record(self.id, stream))
    }

    /// What the queue is asked for from now on waits for it, on the device.
    pub fn hold(&self, operation: &'static str, stream: StreamId) -> Result<(), DeviceError> {
        self.context.ask(operation, |driver| driver.wait(stream, self.id))
    }

    /// Waits for it on the host.
    pub fn synchronize(&self, operation: &'static str) -> Result<(), DeviceError> {
        self.context.ask(operation, |driver| driver.synchronize_event(self.id))
    }
}

impl<D: Driver> Drop for Event<D> {
    fn drop(&mut self) {
        // A failure is that of earlier work, which its own stream tells.
        let _ = self.context.driver().destroy_event(self.id);
    }
}
