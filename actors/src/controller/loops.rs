//! The closed loop as three actors in a row: `Tsm` turns a line into signals, `Ate` signals into decisions, `Dmu` checks
//! them against the data recipe and hands them back, so that they are written with the line (DESIGN.md section 9).
//!
//! - **LOOP-1** Each is a pure machine fed the committed trace in order; nothing else reaches it.
//! - They hold nothing that the trace does not: after a death all three are made again from it ([`Loop::start`]).

use super::coordinator::CoordinatorMessage;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef};
use tarazed_domain::StepsCompleted;
use tarazed_domain::config::MixtureConfig;
use tarazed_protocol::data::DomainFacts;
use tarazed_protocol::data::controller::Ate;
use tarazed_protocol::data::cursor::{DataCursor, Recipe};
use tarazed_protocol::data::decision::Decision;
use tarazed_protocol::data::signals::{Signals, Tsm};
use tarazed_protocol::trace::TraceLine;

/// Why a member of a loop that is made again ends.
pub const RENEWED: &str = "the closed loop is made again";

/// What the loop is made from.
#[derive(Clone)]
pub struct LoopRules {
    /// The controller of the mixture, and when it decides.
    pub mixture: MixtureConfig,
    /// What is known of each domain.
    pub facts: Vec<DomainFacts>,
    /// The data recipe.
    pub recipe: Recipe,
}

/// A line to look at; the answer goes to the coordinator.
pub struct LookAt(pub Box<TraceLine>);
impl ractor::Message for LookAt {}

pub struct Judge(Box<TraceLine>, Box<Signals>);
impl ractor::Message for Judge {}

pub struct Propose(StepsCompleted, Vec<Decision>);
impl ractor::Message for Propose {}

/// The three actors.
pub struct Loop {
    pub entry: ActorRef<LookAt>,
    cells: [ActorCell; 3],
}

impl Loop {
    /// Makes the loop as it stands after `lines`.
    ///
    /// # Errors
    /// If a machine refuses the trace: it was changed, or another program wrote it.
    pub async fn start(
        rules: &LoopRules,
        lines: &[TraceLine],
        coordinator: ActorRef<CoordinatorMessage>,
        parent: ActorCell,
    ) -> Result<Self, String> {
        let mut monitor = Tsm::new(rules.facts.clone());
        let mut engine = Ate::new(&rules.mixture, &rules.facts);
        let mut cursor = DataCursor::new(rules.recipe.clone(), &rules.mixture).map_err(|e| e.to_string())?;
        for line in lines {
            let signals = monitor.on_line(line).map_err(|e| e.to_string())?;
            engine.replay(line, &signals).map_err(|e| e.to_string())?;
            cursor.record(line.step, &line.decisions).map_err(|e| e.to_string())?;
        }
        let refused = |e: ractor::SpawnErr| e.to_string();
        let (dmu, _) = Actor::spawn_linked(None, Dmu, (cursor, coordinator), parent.clone())
            .await
            .map_err(refused)?;
        let (ate, _) = Actor::spawn_linked(None, AteActor, (engine, dmu.clone()), parent.clone())
            .await
            .map_err(refused)?;
        let (tsm, _) = Actor::spawn_linked(None, TsmActor, (monitor, ate.clone()), parent)
            .await
            .map_err(refused)?;
        let cells = [tsm.get_cell(), ate.get_cell(), dmu.get_cell()];
        Ok(Self { entry: tsm, cells })
    }

    /// Whether `cell` is one of the three.
    pub fn holds(&self, cell: &ActorCell) -> bool {
        self.cells.iter().any(|mine| mine.get_id() == cell.get_id())
    }

    /// Ends what is left of it.
    pub fn stop(&self) {
        for cell in &self.cells {
            cell.stop(Some(RENEWED.to_owned()));
        }
    }
}

/// Training State Monitor.
struct TsmActor;

impl Actor for TsmActor {
    type Msg = LookAt;
    type State = (Tsm, ActorRef<Judge>);
    type Arguments = (Tsm, ActorRef<Judge>);

    async fn pre_start(
        &self,
        _: ActorRef<LookAt>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(arguments)
    }

    async fn handle(
        &self,
        _: ActorRef<LookAt>,
        LookAt(line): LookAt,
        (monitor, next): &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let signals = monitor.on_line(&line)?;
        next.cast(Judge(line, Box::new(signals)))?;
        Ok(())
    }
}

/// Adaptive Training Engine.
struct AteActor;

impl Actor for AteActor {
    type Msg = Judge;
    type State = (Ate, ActorRef<Propose>);
    type Arguments = (Ate, ActorRef<Propose>);

    async fn pre_start(
        &self,
        _: ActorRef<Judge>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(arguments)
    }

    async fn handle(
        &self,
        _: ActorRef<Judge>,
        Judge(line, signals): Judge,
        (engine, next): &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let decisions = engine.on_line(&line, &signals);
        next.cast(Propose(line.step, decisions))?;
        Ok(())
    }
}

/// Data Management Unit: owns the recipe and the cursor's ledger.
struct Dmu;

impl Actor for Dmu {
    type Msg = Propose;
    type State = (DataCursor, ActorRef<CoordinatorMessage>);
    type Arguments = (DataCursor, ActorRef<CoordinatorMessage>);

    async fn pre_start(
        &self,
        _: ActorRef<Propose>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(arguments)
    }

    async fn handle(
        &self,
        _: ActorRef<Propose>,
        Propose(line, decisions): Propose,
        (cursor, coordinator): &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        cursor.record(line, &decisions)?;
        coordinator.cast(CoordinatorMessage::Decided(line, decisions))?;
        Ok(())
    }
}
