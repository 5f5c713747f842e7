//! `CheckpointWriter`: uploads this rank's checkpoint shards while training goes on.
//!
//! At most [`CHECKPOINTS_IN_FLIGHT_MAX`] checkpoints are under way at once; ranks begin no other meanwhile, all alike, unless
//! the run ends or pauses there (`tarazed_train::generation`). That one waits here, one snapshot of each shard, the newest:
//! an older one that waited is given up, said aloud. So the last checkpoint of a run is never given up for an older one.
//!
//! A shard that is asked for again while it goes up, by a generation that saves the same step, is not sent twice: the same
//! bytes are on their way.

use super::actor::RankMessage;
use super::restore::StoreSource;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tarazed_domain::limits::CHECKPOINTS_IN_FLIGHT_MAX;
use tarazed_domain::{Generation, OptimizerShardIndex, ShardLayout, StepsCompleted};
use tarazed_kernels::BlockHash;
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
    /// Of its blocks, as the last update left them.
    pub hashes: Vec<BlockHash>,
    pub payload: ShardPayload,
    /// Held until this shard is stored or given up.
    #[expect(dead_code, reason = "it counts as long as it is there")]
    pub upload: Arc<UploadTicket>,
}

pub enum WriterMessage {
    /// Store this.
    Store(Box<Snapshot>),
    /// There is nothing to store, and the controller hears why.
    NoSnapshot(Box<FromRank>),
    /// An upload ended.
    Ended {
        step: StepsCompleted,
        shard: OptimizerShardIndex,
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
    under_way: BTreeMap<StepsCompleted, BTreeMap<OptimizerShardIndex, UnderWay>>,
    waiting: BTreeMap<OptimizerShardIndex, Box<Snapshot>>,
}

/// A shard on its way up.
struct UnderWay {
    hashes: Vec<BlockHash>,
    /// The newest that wants it: whose loss it would be.
    generation: Generation,
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
            WriterMessage::Store(snapshot) if state.is_on_its_way(&snapshot) => {}
            WriterMessage::Store(snapshot) if state.has_room(&snapshot) => state.start(&myself, snapshot),
            WriterMessage::Store(snapshot) => {
                if let Some(older) = state.waiting.insert(snapshot.shard, snapshot) {
                    let cause = "an earlier one is still being uploaded, and a later one waits, too".to_owned();
                    state.tell(lost(&older, cause, false))?;
                }
            }
            WriterMessage::NoSnapshot(report) => state.tell(*report)?,
            WriterMessage::Ended { step, shard, report } => {
                let report = state.ended(step, shard, *report);
                state.tell(report)?;
                state.start_waiting(&myself);
            }
        }
        Ok(())
    }
}

impl WriterState {
    /// Whether the same bytes go up already; their end is this one's, too.
    fn is_on_its_way(&mut self, snapshot: &Snapshot) -> bool {
        let shards = self.under_way.get_mut(&snapshot.step);
        let same = shards
            .and_then(|shards| shards.get_mut(&snapshot.shard))
            .filter(|upload| upload.hashes == snapshot.hashes);
        if let Some(upload) = same {
            upload.generation = upload.generation.max(snapshot.generation);
            return true;
        }
        false
    }

    fn has_room(&self, snapshot: &Snapshot) -> bool {
        match self.under_way.get(&snapshot.step) {
            Some(shards) => !shards.contains_key(&snapshot.shard),
            None => self.under_way.len() < CHECKPOINTS_IN_FLIGHT_MAX,
        }
    }

    /// What the controller hears of an upload that has ended.
    fn ended(&mut self, step: StepsCompleted, shard: OptimizerShardIndex, mut report: FromRank) -> FromRank {
        if let Some(shards) = self.under_way.get_mut(&step) {
            if let (Some(upload), FromRank::ShardLost { generation, .. }) = (shards.remove(&shard), &mut report) {
                *generation = upload.generation;
            }
            if shards.is_empty() {
                self.under_way.remove(&step);
            }
        }
        report
    }

    fn tell(&self, report: FromRank) -> Result<(), ActorProcessingErr> {
        self.arguments.rank.cast(RankMessage::Tell(report))?;
        Ok(())
    }

    fn start(&mut self, myself: &ActorRef<WriterMessage>, snapshot: Box<Snapshot>) {
        let (step, shard, generation) = (snapshot.step, snapshot.shard, snapshot.generation);
        let hashes = snapshot.hashes.clone();
        let shards = self.under_way.entry(step).or_default();
        shards.insert(shard, UnderWay { hashes, generation });
        let (store, layout, myself) = (self.arguments.store.clone(), self.arguments.layout, myself.clone());
        tokio::spawn(async move {
            let upload = tokio::spawn(async move { upload(&store, layout, &snapshot).await });
            let report = upload.await.unwrap_or_else(|panic| FromRank::ShardLost {
                generation,
                step,
                shard,
                cause: format!("its upload failed: {panic}; this is a bug"),
                full: false,
            });
            let report = Box::new(report);
            // An error means that the rank ends.
            let _ = myself.cast(WriterMessage::Ended { step, shard, report });
        });
    }

    fn start_waiting(&mut self, myself: &ActorRef<WriterMessage>) {
        let Some(oldest) = self.waiting.values().map(|snapshot| snapshot.step).min() else {
            return;
        };
        let waiting = std::mem::take(&mut self.waiting);
        let is_due = |snapshot: &Snapshot| snapshot.step == oldest && self.has_room(snapshot);
        let (due, rest) = waiting.into_iter().partition(|(_, snapshot)| is_due(snapshot));
        self.waiting = rest;
        let due: BTreeMap<OptimizerShardIndex, Box<Snapshot>> = due;
        due.into_values().for_each(|snapshot| self.start(myself, snapshot));
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use tarazed_domain::ParameterLayout;
    use tarazed_train::snapshot::Uploads;

    const SHARD: OptimizerShardIndex = OptimizerShardIndex(0);

    /// Stands in for the rank's actor.
    struct Nobody;

    impl Actor for Nobody {
        type Msg = RankMessage;
        type State = ();
        type Arguments = ();

        async fn pre_start(&self, _: ActorRef<RankMessage>, (): ()) -> Result<(), ActorProcessingErr> {
            Ok(())
        }
    }

    fn snapshot(step: u64, generation: u64, content: u8) -> Snapshot {
        Snapshot {
            step: StepsCompleted(step),
            generation: Generation(generation),
            shard: SHARD,
            hashes: vec![BlockHash([content; size_of::<BlockHash>()])],
            payload: ShardPayload::new([[0.0_f32; 4]; 3]),
            upload: Uploads::default().begin(),
        }
    }

    /// A generation that saves the same step again does not double what is on its way, and hears of its end.
    #[tokio::test]
    async fn what_is_on_its_way_is_not_sent_again() {
        let (rank, _) = Actor::spawn(None, Nobody, ()).await.unwrap();
        let mut state = WriterState {
            arguments: WriterArguments {
                layout: layout(),
                store: StoreSource::new(String::new(), tokio::runtime::Handle::current()),
                rank: rank.clone(),
            },
            under_way: BTreeMap::new(),
            waiting: BTreeMap::new(),
        };
        let (first, again, other) = (snapshot(7, 1, 1), snapshot(7, 2, 1), snapshot(7, 2, 2));
        assert!(!state.is_on_its_way(&first) && state.has_room(&first));
        let upload = UnderWay {
            hashes: first.hashes.clone(),
            generation: first.generation,
        };
        state.under_way.insert(first.step, BTreeMap::from([(SHARD, upload)]));
        assert!(state.is_on_its_way(&again));
        assert!(
            !state.is_on_its_way(&other) && !state.has_room(&other),
            "other bytes wait"
        );
        assert!(
            !state.is_on_its_way(&snapshot(8, 2, 1)),
            "another step is another upload"
        );

        let ended = state.ended(first.step, SHARD, lost(&first, "no answer".to_owned(), false));
        let FromRank::ShardLost { generation, .. } = ended else {
            panic!("{ended:?}")
        };
        assert_eq!(
            generation, again.generation,
            "whoever waits for it would not hear an older one's loss"
        );
        assert!(state.under_way.is_empty() && state.has_room(&other));
        rank.stop(None);
    }

    fn layout() -> ShardLayout {
        ShardLayout::new(&ParameterLayout::new([("weight".to_owned(), vec![4], true)], 4), 1)
    }
}
