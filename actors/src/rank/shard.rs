//! `OptimizerShard`: one actor for each optimizer shard this rank holds, the sharder's hand.
//!
//! It knows its role and takes snapshots of its shard: a copy on the blocking pool under a read lock, while the device
//! thread computes the next step (DESIGN.md section 7). The ticket is given back when the copy is made. What was copied is
//! hashed before it is stored: a bit that changed since the last update must not get into a checkpoint (DET-3).

use super::writer::{Snapshot, WriterMessage};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
use tarazed_kernels::{BlockHash, Blocks, CpuBuffer, CpuDevice, Device, DeviceError, View};
use tarazed_protocol::message::FromRank;
use tarazed_store::ShardPayload;
use tarazed_train::StepError;
use tarazed_train::generation::ShardToSave;
use tarazed_train::host::HostVisible;

pub enum ShardMessage {
    /// Copy the state of this step and pass it on to be stored.
    Snapshot {
        step: StepsCompleted,
        generation: Generation,
        shard: Box<dyn Saving>,
    },
    /// A copy is made, or not.
    Copied(Result<Box<Snapshot>, CopyError>),
}
impl ractor::Message for ShardMessage {}

/// Why there is no copy.
pub enum CopyError {
    /// The host has no memory for it: the checkpoint is given up, and training goes on.
    NoMemory(Box<FromRank>),
    /// The rank must end.
    Fatal(String),
}

/// A shard to save, on whatever device it lies.
pub trait Saving: Send {
    /// Which shard.
    fn shard(&self) -> OptimizerShardIndex;

    /// Copies it to the host and checks the copy against the hashes of its last update.
    ///
    /// # Errors
    /// A [`CopyError`].
    fn copy(self: Box<Self>, step: StepsCompleted, generation: Generation) -> Result<Snapshot, CopyError>;
}

/// A shard on a device of one kind.
pub struct OnDevice<D: Device> {
    pub device: D,
    pub shard: ShardToSave<D>,
}

pub struct OptimizerShard;

pub struct ShardActorState {
    index: OptimizerShardIndex,
    writer: ActorRef<WriterMessage>,
}

impl Actor for OptimizerShard {
    type Msg = ShardMessage;
    type State = ShardActorState;
    type Arguments = (OptimizerShardIndex, ActorRef<WriterMessage>);

    async fn pre_start(
        &self,
        _myself: ActorRef<Self::Msg>,
        (index, writer): Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(ShardActorState { index, writer })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ShardMessage::Snapshot {
                step,
                generation,
                shard,
            } => {
                assert_eq!(shard.shard(), state.index, "a shard's snapshot comes to its own actor");
                crate::blocking::detach(
                    move || shard.copy(step, generation),
                    move |copied| {
                        let copied = copied.unwrap_or_else(|panic| Err(CopyError::Fatal(panic)));
                        // An error means that this shard moved to another rank meanwhile.
                        let _ = myself.cast(ShardMessage::Copied(copied.map(Box::new)));
                    },
                );
            }
            ShardMessage::Copied(Ok(snapshot)) => state.writer.cast(WriterMessage::Store(snapshot))?,
            ShardMessage::Copied(Err(CopyError::NoMemory(report))) => {
                state.writer.cast(WriterMessage::NoSnapshot(report))?;
            }
            ShardMessage::Copied(Err(CopyError::Fatal(cause))) => return Err(cause.into()),
        }
        Ok(())
    }
}

impl<D: HostVisible> Saving for OnDevice<D> {
    fn shard(&self) -> OptimizerShardIndex {
        self.shard.shard
    }

    fn copy(self: Box<Self>, step: StepsCompleted, generation: Generation) -> Result<Snapshot, CopyError> {
        let Self { device, shard } = *self;
        let _span = tracing::info_span!("snapshot", step = step.0, shard = shard.shard.0).entered();
        let state = shard.state.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        assert_eq!(state.steps, step, "the next update waits for this copy");
        let copies = device
            .copies([&state.master, &state.first_moment, &state.second_moment])
            .map_err(|error| not_copied(&error, step, generation, shard.shard))?;
        let hashes = state.hashes.clone();
        drop(state);
        drop(shard.ticket);
        let copied = hashes_of(&copies, shard.blocks, hashes.len());
        if copied.map_err(|e| CopyError::Fatal(e.to_string()))? != hashes {
            let shard = shard.shard;
            return Err(CopyError::Fatal(StepError::Rotten { shard, step }.to_string()));
        }
        Ok(Snapshot {
            step,
            generation,
            shard: shard.shard,
            hashes,
            payload: ShardPayload::new(copies),
            upload: shard.upload,
        })
    }
}

/// What follows of a device that could not copy a shard to the host.
fn not_copied(
    error: &DeviceError,
    step: StepsCompleted,
    generation: Generation,
    shard: OptimizerShardIndex,
) -> CopyError {
    let needed_bytes = match error {
        DeviceError::OutOfMemory { needed_bytes, .. } | DeviceError::OutOfPinnedMemory { needed_bytes } => needed_bytes,
        _ => return CopyError::Fatal(format!("a snapshot of shard {shard}: {error}")),
    };
    CopyError::NoMemory(Box::new(FromRank::ShardLost {
        generation,
        step,
        shard,
        cause: format!(
            "the host has no memory for a snapshot of shard {shard}: {needed_bytes} bytes more were needed; run fewer ranks on \
             it, or give it more"
        ),
        full: false,
    }))
}

/// Hashes are the same on every device, so the host's check its copy.
fn hashes_of(copies: &[CpuBuffer; 3], blocks: Blocks, count: usize) -> Result<Vec<BlockHash>, DeviceError> {
    let device = CpuDevice::new();
    let mut hashes = vec![BlockHash::default(); count];
    let [master, exp_avg, exp_avg_sq] = copies.each_ref().map(View::from);
    device.block_hashes(&mut device.stream()?, blocks, master, exp_avg, exp_avg_sq, &mut hashes)?;
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host without memory for a copy costs the checkpoint, a device that fails the rank.
    #[test]
    fn a_checkpoint_is_given_up_where_there_is_no_memory_for_it() {
        let not_copied = |error| not_copied(&error, StepsCompleted(7), Generation(2), OptimizerShardIndex(3));
        let (needed_bytes, memory) = (1 << 40, None);
        for error in [
            DeviceError::OutOfMemory { needed_bytes, memory },
            DeviceError::OutOfPinnedMemory { needed_bytes },
        ] {
            let CopyError::NoMemory(report) = not_copied(error) else {
                panic!("the rank ends")
            };
            let FromRank::ShardLost { shard, cause, .. } = *report else {
                panic!("{report:?}")
            };
            assert!(
                shard == OptimizerShardIndex(3) && cause.contains("1099511627776 bytes"),
                "{cause}"
            );
        }
        let failed = DeviceError::Failed {
            operation: "copy",
            cause: "gone".to_owned(),
        };
        assert!(matches!(not_copied(failed), CopyError::Fatal(cause) if cause.contains("gone")));
    }
}
