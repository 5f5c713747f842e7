//! `DataFeeder`: owns the feeder's thread and tells it what to prepare.

use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::sync::Arc;
use tarazed_domain::{Rank, StepsCompleted};
use tarazed_protocol::data::cursor::{DataCursor, Recipe};
use tarazed_protocol::data::decision::{Decision, DecisionSchedule};
use tarazed_protocol::message::BeginPlan;
use tarazed_train::feeder::Feeder;

pub enum FeederMessage {
    /// Lines through this one are written; their decisions.
    Record {
        through: StepsCompleted,
        decisions: Vec<Decision>,
    },
    /// The thread ended.
    Ended(String),
}
impl ractor::Message for FeederMessage {}

/// Points the feeder at a new generation. Called before the device thread hears of it, so that no batch of an older
/// generation can be taken for one of the new.
///
/// # Errors
/// If the decisions do not fit the recipe: two programs differ.
pub fn begin(
    feeder: &Feeder,
    recipe: &Recipe,
    schedule: DecisionSchedule,
    plan: &BeginPlan,
    rank: Rank,
) -> Result<(), String> {
    let cursor = DataCursor::restore(recipe.clone(), schedule, plan.decided, &plan.decisions);
    feeder.begin(cursor.map_err(|e| e.to_string())?, plan, rank);
    Ok(())
}

pub struct DataFeeder;

impl Actor for DataFeeder {
    type Msg = FeederMessage;
    type State = Arc<Feeder>;
    type Arguments = Arc<Feeder>;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        feeder: Arc<Feeder>,
    ) -> Result<Self::State, ActorProcessingErr> {
        if !feeder.needs_thread() {
            return Ok(feeder);
        }
        let work = Arc::clone(&feeder);
        std::thread::Builder::new().name("feeder".to_owned()).spawn(move || {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work.run()));
            if ended.is_err() {
                // An error means that the rank ends already.
                let _ = myself.cast(FeederMessage::Ended("the feeder's thread panicked".to_owned()));
            }
        })?;
        Ok(feeder)
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        feeder: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            FeederMessage::Record { through, decisions } => feeder.record(through, &decisions)?,
            FeederMessage::Ended(cause) => return Err(cause.into()),
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _myself: ActorRef<Self::Msg>,
        feeder: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        feeder.stop();
        Ok(())
    }
}
