//! `OptimizerSharder`: keeps the present shard→rank map in sight, and says when a shard has fewer copies than configured.
//!
//! The map itself is made by `protocol::sharder`, as part of the plan of a generation.

use super::{Notice, Notify};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use tarazed_protocol::message::Member;
use tarazed_protocol::placement::{Placement, ShardHolder};

pub enum SharderMessage {
    /// A generation begins with these holders per shard.
    Placed { members: Vec<Member>, shards: Placement },
    /// Who holds what, for `status`.
    Show(RpcReplyPort<serde_json::Value>),
}
impl ractor::Message for SharderMessage {}

pub struct OptimizerSharder;

pub struct SharderState {
    replicas: usize,
    notify: Notify,
    members: Vec<Member>,
    shards: Option<Placement>,
}

impl Actor for OptimizerSharder {
    type Msg = SharderMessage;
    type State = SharderState;
    type Arguments = (usize, Notify);

    async fn pre_start(
        &self,
        _: ActorRef<SharderMessage>,
        (replicas, notify): Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(SharderState {
            replicas,
            notify,
            members: Vec::new(),
            shards: None,
        })
    }

    async fn handle(
        &self,
        _: ActorRef<SharderMessage>,
        message: SharderMessage,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            SharderMessage::Placed { members, shards } => {
                let fewest = shards.copies();
                let before = state.shards.as_ref().map_or(state.replicas, Placement::copies);
                if fewest < state.replicas && before >= state.replicas {
                    (state.notify)(Notice::Warning(format!(
                        "{} of {} copies of each optimizer shard: the loss of the last rank that holds one means a \
                         restore from the newest checkpoint",
                        fewest, state.replicas
                    )));
                }
                state.members = members;
                state.shards = Some(shards);
            }
            SharderMessage::Show(reply) => {
                let shards: Vec<Vec<u32>> = state
                    .shards
                    .iter()
                    .flat_map(Placement::iter)
                    .map(|holders| {
                        let worker = |holder: &ShardHolder| state.members.get(holder.rank.index()).map(|m| m.worker.0);
                        holders.iter().filter_map(worker).collect()
                    })
                    .collect();
                // An error means that whoever asked is gone.
                let _ = reply.send(serde_json::json!(shards));
            }
        }
        Ok(())
    }
}
