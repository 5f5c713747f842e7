//! The closed loop as three actors in a row: `Tsm` turns a line into signals, `Ate` signals into decisions, `Dmu`
//! completes and checks them by the data recipe and hands them back, so that they are written with the line (DESIGN.md section 9).
//!
//! - **LOOP-1** Each is a pure machine fed the committed trace in order; nothing else reaches it.
//! - They hold nothing that the trace does not: after a death all three are made again from it ([`Loop::start`]). What is written
//!   meanwhile the coordinator tells the new ones ([`recall`]).

use super::coordinator::CoordinatorMessage;
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::sync::Arc;
use std::time::Duration;
use tarazed_domain::{StepIndex, StepsCompleted};
use tarazed_protocol::data::controller::{Ate, Request, RequestError};
use tarazed_protocol::data::cursor::{DataCursor, Recipe};
use tarazed_protocol::data::decision::{Decision, DecisionSchedule};
use tarazed_protocol::data::signals::{BytesPerToken, Signals, Tsm};
use tarazed_protocol::data::{DomainFacts, LoopConfig};
use tarazed_protocol::trace::TraceLine;

/// Why a member of a loop that is made again ends.
const RENEWED: &str = "the closed loop is made again";
/// A member that is told to end has so long for it; its handlers wait for nothing.
const LAST_HANDLER_MS_MAX: u64 = 10_000;

/// What the loop is made from.
#[derive(Clone)]
pub struct LoopRules {
    /// What is decided, by whom, and when.
    pub config: LoopConfig,
    /// What is known of each domain.
    pub facts: Vec<DomainFacts>,
    /// Bytes behind one token, by domain; empty where they are not known.
    pub bytes: Vec<BytesPerToken>,
    /// Lanes of the global batch.
    pub lanes: u32,
    /// The data recipe.
    pub recipe: Recipe,
}

/// The line that will hold what a person asked for, and the step from which it acts; or why not.
pub type RequestAnswer = Result<(StepsCompleted, StepIndex), RequestError>;

/// What the loop is told.
pub enum LoopMessage {
    /// A line to look at, with the decisions before it that change the data; the answer goes to the coordinator.
    LookAt(Box<TraceLine>, Vec<Decision>),
    /// The next line, which another loop has decided.
    Recall(Box<TraceLine>),
    /// A person asks for a decision (LOOP-2). It waits for the next decision point in memory alone: `tarazed decide` looks for it
    /// in the trace, and says so where it is not there.
    Ask(Box<Request>, RpcReplyPort<RequestAnswer>),
}
impl ractor::Message for LoopMessage {}

pub enum AteMessage {
    Judge(Box<TraceLine>, Arc<Signals>),
    Recall(Box<TraceLine>, Arc<Signals>),
    Ask(Box<Request>, RpcReplyPort<RequestAnswer>),
}
impl ractor::Message for AteMessage {}

pub enum DmuMessage {
    Propose(StepsCompleted, Vec<Decision>, Arc<Signals>),
    Recall(Box<TraceLine>),
}
impl ractor::Message for DmuMessage {}

/// Tells a loop that was made again of lines that it was not made of.
pub fn recall(entry: &ActorRef<LoopMessage>, lines: Vec<TraceLine>) {
    for line in lines {
        // An error means that it died again already.
        let _ = entry.cast(LoopMessage::Recall(Box::new(line)));
    }
}

/// One of the three actors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LoopMember {
    /// Training State Monitor.
    Tsm,
    /// Adaptive Training Engine.
    Ate,
    /// Data Management Unit.
    Dmu,
}

impl LoopMember {
    /// All three, in the order in which a line passes them.
    pub const ALL: [Self; 3] = [Self::Tsm, Self::Ate, Self::Dmu];

    /// The newest such child of a parent.
    pub(super) fn of(self, parent: &ActorCell) -> Option<ActorCell> {
        let is_such = |child: &ActorCell| match self {
            Self::Tsm => child.is_message_type_of::<LoopMessage>(),
            Self::Ate => child.is_message_type_of::<AteMessage>(),
            Self::Dmu => child.is_message_type_of::<DmuMessage>(),
        };
        let such = parent
            .get_children()
            .into_iter()
            .filter(|child| is_such(child) == Some(true));
        such.max_by_key(ActorCell::get_id)
    }
}

/// The three actors.
pub struct Loop {
    pub entry: ActorRef<LoopMessage>,
    /// Of the last line that it was made of.
    pub signals: Option<Arc<Signals>>,
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
        let mut monitor = Tsm::new(rules.facts.clone())
            .with_bytes(rules.bytes.clone())
            .with_lanes(rules.lanes)
            .with_context(rules.config.context_tokens);
        let mut engine = Ate::new(&rules.config, &rules.facts);
        let schedule = DecisionSchedule::new(&rules.config.mixture, &rules.config.policy);
        let mut cursor = DataCursor::new(rules.recipe.clone(), schedule).map_err(|e| e.to_string())?;
        let mut last = None;
        for line in lines {
            let signals = monitor.on_line(line).map_err(|e| e.to_string())?;
            monitor.learn(&line.decisions);
            engine.replay(line, &signals).map_err(|e| e.to_string())?;
            cursor.record(line.step, &line.decisions).map_err(|e| e.to_string())?;
            last = Some(signals);
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
        let signals = last.map(Arc::new);
        Ok(Self {
            entry: tsm,
            signals,
            cells,
        })
    }

    /// Whether `cell` is one of the three.
    pub fn holds(&self, cell: &ActorCell) -> bool {
        self.cells.iter().any(|mine| mine.get_id() == cell.get_id())
    }

    /// Ends what is left of it, and waits until nothing more comes of it: what it says after the next loop has begun, the next loop
    /// does not know.
    pub async fn stop(&self) {
        for cell in &self.cells {
            cell.stop(Some(RENEWED.to_owned()));
        }
        for cell in &self.cells {
            let limit = Duration::from_millis(LAST_HANDLER_MS_MAX);
            if cell.wait(Some(limit)).await.is_err() {
                tracing::warn!("a part of the closed loop does not end");
            }
        }
    }

    /// Who they are.
    pub fn ids(&self) -> [ActorId; 3] {
        self.cells.each_ref().map(ActorCell::get_id)
    }
}

/// Training State Monitor.
struct TsmActor;

impl Actor for TsmActor {
    type Msg = LoopMessage;
    type State = (Tsm, ActorRef<AteMessage>);
    type Arguments = (Tsm, ActorRef<AteMessage>);

    async fn pre_start(
        &self,
        _: ActorRef<LoopMessage>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(arguments)
    }

    async fn handle(
        &self,
        _: ActorRef<LoopMessage>,
        message: LoopMessage,
        (monitor, next): &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            LoopMessage::LookAt(line, changes) => {
                monitor.learn(&changes);
                let signals = monitor.on_line(&line)?;
                next.cast(AteMessage::Judge(line, Arc::new(signals)))?;
            }
            LoopMessage::Recall(line) => {
                let signals = monitor.on_line(&line)?;
                monitor.learn(&line.decisions);
                next.cast(AteMessage::Recall(line, Arc::new(signals)))?;
            }
            // Behind the lines that came before it, so that it is judged by what they decided.
            LoopMessage::Ask(request, reply) => next.cast(AteMessage::Ask(request, reply))?,
        }
        Ok(())
    }
}

/// Adaptive Training Engine.
struct AteActor;

impl Actor for AteActor {
    type Msg = AteMessage;
    type State = (Ate, ActorRef<DmuMessage>);
    type Arguments = (Ate, ActorRef<DmuMessage>);

    async fn pre_start(
        &self,
        _: ActorRef<AteMessage>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(arguments)
    }

    async fn handle(
        &self,
        _: ActorRef<AteMessage>,
        message: AteMessage,
        (engine, next): &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            AteMessage::Judge(line, signals) => {
                let decisions = engine.on_line(&line, &signals);
                next.cast(DmuMessage::Propose(line.step, decisions, signals))?;
            }
            AteMessage::Recall(line, signals) => {
                engine.replay(&line, &signals)?;
                next.cast(DmuMessage::Recall(line))?;
            }
            AteMessage::Ask(request, reply) => {
                // An error means that whoever asked is gone; what was asked for stands.
                let _ = reply.send(engine.request(*request));
            }
        }
        Ok(())
    }
}

/// Data Management Unit: owns the recipe and the cursor's ledger.
struct Dmu;

impl Actor for Dmu {
    type Msg = DmuMessage;
    type State = (DataCursor, ActorRef<CoordinatorMessage>);
    type Arguments = (DataCursor, ActorRef<CoordinatorMessage>);

    async fn pre_start(
        &self,
        _: ActorRef<DmuMessage>,
        arguments: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(arguments)
    }

    async fn handle(
        &self,
        _: ActorRef<DmuMessage>,
        message: DmuMessage,
        (cursor, coordinator): &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            DmuMessage::Propose(line, mut decisions, signals) => {
                cursor.complete(line, &mut decisions)?;
                cursor.record(line, &decisions)?;
                coordinator.cast(CoordinatorMessage::Decided(line, decisions, signals))?;
            }
            DmuMessage::Recall(line) => cursor.record(line.step, &line.decisions)?,
        }
        Ok(())
    }
}
