//! Where a stream's time goes: an event behind each operation, and the times between them.
//!
//! An operation's time is that from the end of the one before it to its own end, so what the device waits between two
//! operations (for the host, or for a launch) counts to the later one, and all times add up to the whole.

use super::context::Context;
use super::driver::{Driver, StreamId};
use super::event::Event;
use crate::device::DeviceError;
use std::collections::BTreeMap;
use std::sync::Arc;

const OPERATION: &str = "profile";

/// What a stream did of one kind.
#[derive(Clone, PartialEq, Debug)]
pub struct Spent {
    /// Kernel, product with its shape, copy.
    pub what: String,
    /// How often.
    pub calls: usize,
    /// All together.
    pub milliseconds: f64,
}

/// A profile under way.
pub(super) struct Profile<D: Driver> {
    context: Arc<Context<D>>,
    stream: StreamId,
    begin: Event<D>,
    ends: Vec<(String, Event<D>)>,
}

impl<D: Driver> Profile<D> {
    pub fn new(context: &Arc<Context<D>>, stream: StreamId) -> Result<Self, DeviceError> {
        let begin = Event::new(context)?;
        begin.record(OPERATION, stream)?;
        Ok(Self {
            context: Arc::clone(context),
            stream,
            begin,
            ends: Vec::new(),
        })
    }

    /// The operation asked for last is this.
    pub fn mark(&mut self, what: String) -> Result<(), DeviceError> {
        let end = Event::new(&self.context)?;
        end.record(OPERATION, self.stream)?;
        self.ends.push((what, end));
        Ok(())
    }

    /// Waits for the last operation. What took most stands first.
    pub fn finish(self) -> Result<Vec<Spent>, DeviceError> {
        let mut spent: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
        let mut before = &self.begin;
        for (what, end) in &self.ends {
            end.synchronize(OPERATION)?;
            let elapsed = self
                .context
                .ask(OPERATION, |driver| driver.elapsed_ms(before.id(), end.id()))?;
            let (calls, milliseconds) = spent.entry(what).or_default();
            *calls += 1;
            *milliseconds += f64::from(elapsed);
            before = end;
        }
        let mut spent: Vec<Spent> = spent
            .into_iter()
            .map(|(what, (calls, milliseconds))| Spent {
                what: what.to_owned(),
                calls,
                milliseconds,
            })
            .collect();
        spent.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        Ok(spent)
    }
}
