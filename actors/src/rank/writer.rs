//! `CheckpointWriter`: uploads this rank's checkpoint shards while training goes on.
//!
//! At most [`CHECKPOINTS_IN_FLIGHT_MAX`] checkpoints are under way at once; ranks begin no other meanwhile, all alike, unless
//! the run ends or pauses there (`tarazed_train::generation`). That one waits here, one snapshot of each shard, the newest:
//! an older one that waited is given up, said aloud. So the last checkpoint of a run is never given up for an older one.

use super::actor::RankMessage;
use super::restore::StoreSource;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tarazed_domain::limits::CHECKPOINTS_IN_FLIGHT_MAX;
use tarazed_domain::{Generation, OptimizerShardIndex, ShardLayout, StepsCompleted};
use tarazed_protocol::message::FromRank;
use tarazed_store::{ShardGeometry, ShardPayload, StoreError};
use tarazed_train::snapshot::UploadTicket;

/// Tries of one upload; the store's own retries come on top.
const UPLOAD_TRIES_MAX: u32 = 3;

/// A copy of one shard's state.
pub struct Snapshot {
    pub step: StepsCompleted,
    pub generation: Generation,
    pub shard: OptimizerShardIndex,
    pub payload: ShardPayload,
    /// Held until this shard is stored or given up.
    #[expect(dead_code, reason = "it counts as long as it is there")]
    pub upload: Arc<UploadTicket>,
}

pub enum WriterMessage {
    /// Store this.
    Store(Box<Snapshot>),
    /// An upload ended.
    Ended {
        step: StepsCompleted,
        report: Box<FromRank>,
    },
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
    /// Uploads of each checkpoint under way.
    under_way: BTreeMap<StepsCompleted, usize>,
    waiting: BTreeMap<OptimizerShardIndex, Box<Snapshot>>,
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
            waiting: BTreeMap::new(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            WriterMessage::Store(snapshot) if state.has_room(snapshot.step) => state.start(&myself, snapshot),
            WriterMessage::Store(snapshot) => {
                if let Some(older) = state.waiting.insert(snapshot.shard, snapshot) {
                    let cause = "an earlier one is still being uploaded, and a later one waits, too".to_owned();
                    state.tell(lost(&older, cause, false))?;
                }
            }
            WriterMessage::Ended { step, report } => {
                state.tell(*report)?;
                if let Some(count) = state.under_way.get_mut(&step) {
                    *count -= 1;
                    if *count == 0 {
                        state.under_way.remove(&step);
                    }
                }
                state.start_waiting(&myself);
            }
        }
        Ok(())
    }
}

impl WriterState {
    fn has_room(&self, step: StepsCompleted) -> bool {
        self.under_way.len() < CHECKPOINTS_IN_FLIGHT_MAX || self.under_way.contains_key(&step)
    }

    fn tell(&self, report: FromRank) -> Result<(), ActorProcessingErr> {
        self.arguments.rank.cast(RankMessage::Tell(report))?;
        Ok(())
    }

    fn start(&mut self, myself: &ActorRef<WriterMessage>, snapshot: Box<Snapshot>) {
        let step = snapshot.step;
        *self.under_way.entry(step).or_default() += 1;
        let (store, layout, myself) = (self.arguments.store.clone(), self.arguments.layout, myself.clone());
        tokio::spawn(async move {
            let report = Box::new(upload(&store, layout, &snapshot).await);
            // An error means that the rank ends.
            let _ = myself.cast(WriterMessage::Ended { step, report });
        });
    }

    fn start_waiting(&mut self, myself: &ActorRef<WriterMessage>) {
        let Some(oldest) = self.waiting.values().map(|snapshot| snapshot.step).min() else {
            return;
        };
        if self.has_room(oldest) {
            let waiting = std::mem::take(&mut self.waiting);
            let (due, rest) = waiting.into_iter().partition(|(_, snapshot)| snapshot.step == oldest);
            self.waiting = rest;
            let due: BTreeMap<OptimizerShardIndex, Box<Snapshot>> = due;
            due.into_values().for_each(|snapshot| self.start(myself, snapshot));
        }
    }
}

fn lost(snapshot: &Snapshot, cause: String, full: bool) -> FromRank {
    FromRank::ShardLost {
        generation: snapshot.generation,
        step: snapshot.step,
        shard: snapshot.shard,
        cause,
        full,
    }
}

fn refused(snapshot: &Snapshot, error: &StoreError) -> FromRank {
    lost(snapshot, error.to_string(), matches!(error, StoreError::Full { .. }))
}

#[tracing::instrument(name = "upload", skip_all, fields(step = snapshot.step.0, shard = snapshot.shard.0))]
async fn upload(store: &StoreSource, layout: ShardLayout, snapshot: &Snapshot) -> FromRank {
    let (step, shard) = (snapshot.step, snapshot.shard);
    let store = match store.store().await {
        Ok(store) => store,
        Err(error) => return refused(snapshot, &error),
    };
    let geometry = ShardGeometry::of(&layout, shard);
    let mut tries = 0;
    loop {
        let payload = snapshot.payload.clone();
        match store.put_shard(step, snapshot.generation, &geometry, payload).await {
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
            Err(error) => return refused(snapshot, &error),
        }
    }
}
