//! `OptimizerShard`: one actor for each optimizer shard this rank holds, the sharder's hand.
//!
//! It knows its role and takes snapshots of its shard: a copy on the blocking pool under a read lock, while the device
//! thread computes the next step (DESIGN.md section 7). The ticket is given back when the copy is made. What was copied is
//! hashed before it is stored: a bit that changed since the last update must not get into a checkpoint (DET-3).

use super::writer::{Snapshot, WriterMessage};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
use tarazed_kernels::{BlockHash, Blocks, CpuBuffer, CpuDevice, Device, DeviceError, View};
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
    /// A copy is made; or the rank must end, because of this.
    Copied(Result<Box<Snapshot>, String>),
}
impl ractor::Message for ShardMessage {}

/// A shard to save, on whatever device it lies.
pub trait Saving: Send {
    /// Which shard.
    fn shard(&self) -> OptimizerShardIndex;

    /// Copies it to the host and checks the copy against the hashes of its last update.
    ///
    /// # Errors
    /// Why the rank must end.
    fn copy(self: Box<Self>, step: StepsCompleted, generation: Generation) -> Result<Snapshot, String>;
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
                crate::blocking::detach(move || {
                    let snapshot = shard.copy(step, generation);
                    // An error means that this shard moved to another rank meanwhile.
                    let _ = myself.cast(ShardMessage::Copied(snapshot.map(Box::new)));
                });
            }
            ShardMessage::Copied(snapshot) => state.writer.cast(WriterMessage::Store(snapshot?))?,
        }
        Ok(())
    }
}

impl<D: HostVisible> Saving for OnDevice<D> {
    fn shard(&self) -> OptimizerShardIndex {
        self.shard.shard
    }

    fn copy(self: Box<Self>, step: StepsCompleted, generation: Generation) -> Result<Snapshot, String> {
        let Self { device, shard } = *self;
        let _span = tracing::info_span!("snapshot", step = step.0, shard = shard.shard.0).entered();
        let state = shard.state.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        assert_eq!(state.steps, step, "the next update waits for this copy");
        let copies = device
            .copies([&state.master, &state.first_moment, &state.second_moment])
            .map_err(|e| format!("a snapshot of shard {}: {e}", shard.shard))?;
        let hashes = state.hashes.clone();
        drop(state);
        drop(shard.ticket);
        if hashes_of(&copies, shard.blocks, hashes.len()).map_err(|e| e.to_string())? != hashes {
            let shard = shard.shard;
            return Err(StepError::Rotten { shard, step }.to_string());
        }
        Ok(Snapshot {
            step,
            generation,
            shard: shard.shard,
            payload: ShardPayload::new(copies),
            upload: shard.upload,
        })
    }
}

/// Hashes are the same on every device, so the host's check its copy.
fn hashes_of(copies: &[CpuBuffer; 3], blocks: Blocks, count: usize) -> Result<Vec<BlockHash>, DeviceError> {
    let device = CpuDevice::new();
    let mut hashes = vec![BlockHash::default(); count];
    let [master, exp_avg, exp_avg_sq] = copies.each_ref().map(View::from);
    device.block_hashes(&mut device.stream()?, blocks, master, exp_avg, exp_avg_sq, &mut hashes)?;
    Ok(hashes)
}
