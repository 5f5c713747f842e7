//! `CheckpointWriter`: uploads this rank's checkpoint shards while training goes on.
//!
//! At most [`CHECKPOINTS_IN_FLIGHT_MAX`] checkpoints are under way at once; a further one is given up, said aloud, because
//! memory must stay bounded where the store is slower than the checkpoint interval.

use super::actor::RankMessage;
use super::restore::StoreSource;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::collections::BTreeMap;
use std::time::Duration;
use tarazed_domain::limits::CHECKPOINTS_IN_FLIGHT_MAX;
use tarazed_domain::{Generation, OptimizerShardIndex, ShardLayout, StepsCompleted};
use tarazed_protocol::message::FromRank;
use tarazed_store::{ShardGeometry, ShardSlices, StoreError};

/// Tries of one upload; the store's own retries come on top.
const UPLOAD_TRIES_MAX: u32 = 3;

/// A copy of one shard's state.
pub struct Snapshot {
    pub step: StepsCompleted,
    pub generation: Generation,
    pub shard: OptimizerShardIndex,
    pub master: Vec<f32>,
    pub exp_avg: Vec<f32>,
    pub exp_avg_sq: Vec<f32>,
}

pub enum WriterMessage {
    /// Store this.
    Store(Box<Snapshot>),
    /// An upload ended.
    Ended { step: StepsCompleted, report: FromRank },
}
impl ractor::Message for WriterMessage {}

pub struct CheckpointWriter;

pub struct WriterArguments {
    pub layout: ShardLayout,
    pub store: StoreSource,
    pub rank: ActorRef<RankMessage>,
}

pub struct WriterState {
    arguments: WriterArguments,
    under_way: BTreeMap<StepsCompleted, usize>,
}

impl Actor for CheckpointWriter {
    type Msg = WriterMessage;
    type State = WriterState;
    type Arguments = WriterArguments;

    async fn pre_start(
        &self,
        _myself: ActorRef<Self::Msg>,
        arguments: WriterArguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(WriterState {
            arguments,
            under_way: BTreeMap::new(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            WriterMessage::Store(snapshot) => {
                let step = snapshot.step;
                let full = state.under_way.len() >= CHECKPOINTS_IN_FLIGHT_MAX && !state.under_way.contains_key(&step);
                if full {
                    let cause = format!("{CHECKPOINTS_IN_FLIGHT_MAX} checkpoints are still being uploaded");
                    let report = FromRank::ShardLost {
                        step,
                        shard: snapshot.shard,
                        cause,
                    };
                    state.arguments.rank.cast(RankMessage::Tell(report))?;
                    return Ok(());
                }
                *state.under_way.entry(step).or_default() += 1;
                let store = state.arguments.store.clone();
                let layout = state.arguments.layout;
                tokio::spawn(async move {
                    let report = upload(&store, layout, &snapshot).await;
                    // An error means that the rank ends.
                    let _ = myself.cast(WriterMessage::Ended { step, report });
                });
            }
            WriterMessage::Ended { step, report } => {
                if let Some(count) = state.under_way.get_mut(&step) {
                    *count -= 1;
                    if *count == 0 {
                        state.under_way.remove(&step);
                    }
                }
                state.arguments.rank.cast(RankMessage::Tell(report))?;
            }
        }
        Ok(())
    }
}

#[tracing::instrument(name = "upload", skip_all, fields(step = snapshot.step.0, shard = snapshot.shard.0))]
async fn upload(store: &StoreSource, layout: ShardLayout, snapshot: &Snapshot) -> FromRank {
    let (step, shard) = (snapshot.step, snapshot.shard);
    let lost = |cause: String| FromRank::ShardLost { step, shard, cause };
    let store = match store.store().await {
        Ok(store) => store,
        Err(error) => return lost(error.to_string()),
    };
    let geometry = ShardGeometry::of(&layout, shard);
    let mut tries = 0;
    loop {
        let slices = ShardSlices {
            master: &snapshot.master,
            exp_avg: &snapshot.exp_avg,
            exp_avg_sq: &snapshot.exp_avg_sq,
        };
        match store.put_shard(step, snapshot.generation, &geometry, slices).await {
            Ok(record) => {
                let object = record.object;
                return FromRank::ShardSaved {
                    step,
                    shard,
                    key: object.key,
                    length: object.length,
                    blake3: object.blake3.0,
                };
            }
            Err(StoreError::Retry { .. }) if tries + 1 < UPLOAD_TRIES_MAX => {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(100 << tries)).await;
            }
            Err(error) => return lost(error.to_string()),
        }
    }
}
