//! `Coordinator`: the shell around the membership machine, the ledger and the checkpoint tracker. It turns messages into
//! events and effects into messages, in the order in which they come; it decides nothing.
//!
//! - **SUP-2** What comes from a stranger or from an older generation is refused by the machine and counted.
//! - **STEP-3** A line is written, acknowledged and shown only after the ledger had it from a rank that finished it.

mod checkpoints;

use super::TraceHeads;
use super::appender::{Appended, TraceRequest, TraceSink};
use super::checkpointer::{CheckpointerMessage, Located};
use super::durability::Newest;
use super::loops::{LoopMessage, RequestAnswer, recall};
use super::observatory::ObservatoryMessage;
use super::root::{DEPOSED, End, RootMessage};
use super::sharder::SharderMessage;
use super::shown;
use super::tree::Past;
use crate::link::{HubEvent, LinkError, PeerId, ToRanks};
use crate::node::{NodeCommand, NodeEvent, Processes};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tarazed_domain::limits::{LAST_WORDS_MS_MAX, UNACKNOWLEDGED_LINES_MAX};
use tarazed_domain::{Mutant, StepsCompleted, WorkerId};
use tarazed_protocol::checkpoint::{CheckpointTracker, StoredShard};
use tarazed_protocol::coordinator::{Coordinator as Machine, Effect, Event, Incident};
use tarazed_protocol::data::controller::Request;
use tarazed_protocol::data::decision::{Decision, for_ranks, stop_of};
use tarazed_protocol::data::signals::Signals;
use tarazed_protocol::data::weight_log::WeightLog;
use tarazed_protocol::ledger::{Ledger, LedgerEffect};
use tarazed_protocol::message::{BeginPlan, FromRank, Member, StepLine, ToRank};
use tarazed_protocol::rollback::Rollbacks;
use tarazed_protocol::schedule::CheckpointSchedule;
use tarazed_protocol::trace::TraceLine;
use tokio::time::Instant;

pub enum CoordinatorMessage {
    /// Everybody is there: start.
    Begin(Box<Peers>),
    /// From the hub.
    Hub(HubEvent),
    /// From the node agent.
    Node(NodeEvent),
    /// The loop has looked at a line.
    Decided(StepsCompleted, Vec<Decision>, Arc<Signals>),
    /// The loop was made again, of lines through this one.
    LoopReplaced(ActorRef<LoopMessage>, StepsCompleted),
    /// From the trace's writer.
    Appended(Appended),
    /// What to go on from; or why it cannot be told, with the exit code.
    Located(Box<Result<Located, (u8, String)>>),
    /// The newest checkpoint that the run can go on from, by what the store says.
    Newest(Option<Newest>),
    /// A checkpoint exists.
    Committed(StepsCompleted),
    /// A checkpoint could not be committed.
    CommitFailed {
        step: StepsCompleted,
        cause: String,
        /// The store has no room left.
        full: bool,
    },
    /// Nothing can go on.
    Fatal(String),
    /// To be shown.
    Warn(String),
    /// The world is to have this many ranks.
    Resize(u32),
    /// A person asks for a decision.
    Ask(Box<Request>, RpcReplyPort<RequestAnswer>),
    /// Another controller took over.
    Deposed,
    /// A signal.
    Stop,
    /// Time passed.
    Tick,
    /// For `status`.
    Status(RpcReplyPort<Value>),
}
impl ractor::Message for CoordinatorMessage {}

/// Whom the coordinator talks to.
pub struct Peers {
    pub hub: Box<dyn ToRanks>,
    pub node: Box<dyn Processes>,
    pub observatory: ActorRef<ObservatoryMessage>,
    pub checkpointer: ActorRef<CheckpointerMessage>,
    pub sharder: ActorRef<SharderMessage>,
    pub entry: ActorRef<LoopMessage>,
    pub signals: Option<Arc<Signals>>,
    pub trace: Box<dyn TraceSink>,
    pub past: Past,
}

pub struct CoordinatorArguments {
    pub machine: Machine,
    pub ledger: Ledger,
    pub weights: WeightLog,
    pub tracker: CheckpointTracker,
    pub root: ActorRef<RootMessage>,
    pub schedule: CheckpointSchedule,
}

pub struct CoordinatorState {
    arguments: CoordinatorArguments,
    peers: Option<Box<Peers>>,
    began: Instant,
    heads: TraceHeads,
    /// Signals of the newest line that the loop has looked at.
    signals: Option<Arc<Signals>>,
    deciding: Option<Box<TraceLine>>,
    writing: Option<Box<TraceLine>>,
    /// Whole checkpoints that wait for the trace to lie on the disk.
    syncing: BTreeMap<StepsCompleted, Vec<StoredShard>>,
    /// Ranks without a session that have not ended yet, since when, and why.
    cut_off: Vec<(Instant, Member, String)>,
    /// Workers whose processes nobody watches: no exit of theirs will come.
    unwatched: BTreeMap<u32, Range<u32>>,
    /// Nodes that are there; some may have come before the beginning.
    nodes_back: BTreeSet<u32>,
    /// What came before the beginning: a word of each rank of the controller before, at most a few.
    early: Vec<HubEvent>,
    ended: bool,
    /// Something was committed here, and may be collected still.
    committed: bool,
}

pub struct CoordinatorActor;

impl Actor for CoordinatorActor {
    type Msg = CoordinatorMessage;
    type State = CoordinatorState;
    type Arguments = CoordinatorArguments;

    async fn pre_start(
        &self,
        _: ActorRef<CoordinatorMessage>,
        arguments: CoordinatorArguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(CoordinatorState {
            arguments,
            peers: None,
            began: Instant::now(),
            heads: TraceHeads::new(),
            signals: None,
            deciding: None,
            writing: None,
            syncing: BTreeMap::new(),
            cut_off: Vec::new(),
            unwatched: BTreeMap::new(),
            nodes_back: BTreeSet::new(),
            early: Vec::new(),
            ended: false,
            committed: false,
        })
    }

    async fn handle(
        &self,
        _: ActorRef<CoordinatorMessage>,
        message: CoordinatorMessage,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            CoordinatorMessage::Begin(peers) => {
                state.begin_with(peers)?;
                for event in std::mem::take(&mut state.early) {
                    state.hub(event)?;
                }
                Ok(())
            }
            // Ranks of the controller before may be back before everything here stands.
            CoordinatorMessage::Hub(event) if state.peers.is_none() => {
                state.early.push(event);
                Ok(())
            }
            CoordinatorMessage::Resize(ranks) => state.event(Event::Resize { ranks }),
            CoordinatorMessage::Ask(request, reply) => {
                state.ask(request, reply);
                Ok(())
            }
            CoordinatorMessage::Deposed => {
                if let Some(peers) = &state.peers {
                    peers.node.command(NodeCommand::LetGo)?;
                }
                state.halt(33, DEPOSED.to_owned())
            }
            CoordinatorMessage::Hub(event) => state.hub(event),
            CoordinatorMessage::Node(event) => state.node(event),
            CoordinatorMessage::Decided(step, decisions, signals) => {
                state.deciding = None;
                state.signals = Some(signals);
                let effects = state.arguments.ledger.on_decided(step, decisions);
                state.record(effects)
            }
            CoordinatorMessage::LoopReplaced(entry, newest) => {
                recall(&entry, state.arguments.ledger.decided_after(newest));
                if let Some(peers) = &mut state.peers {
                    peers.entry = entry;
                }
                match state.deciding.clone() {
                    Some(line) => state.record(vec![LedgerEffect::Decide(line)]),
                    None => Ok(()),
                }
            }
            CoordinatorMessage::Appended(Appended::Written(head)) => state.written(head),
            CoordinatorMessage::Appended(Appended::Synced(step)) => state.commit(step),
            CoordinatorMessage::Appended(Appended::Failed(cause)) => state.halt(3, cause),
            CoordinatorMessage::Located(located) => state.located(*located),
            CoordinatorMessage::Newest(newest) => {
                let written = state.arguments.ledger.written();
                state.observe(ObservatoryMessage::Newest { newest, written })
            }
            CoordinatorMessage::Committed(step) => state.committed(step),
            CoordinatorMessage::CommitFailed { step, cause, full } => {
                state.arguments.tracker.on_commit_failed(step);
                state.checkpoint_failed(step, cause, full)
            }
            CoordinatorMessage::Fatal(cause) => state.halt(3, cause),
            CoordinatorMessage::Warn(text) => state.observe(ObservatoryMessage::Warning(text)),
            CoordinatorMessage::Stop => {
                state.observe(ObservatoryMessage::Stopping)?;
                state.event(Event::StopRequested)
            }
            CoordinatorMessage::Tick => {
                state.end_cut_off()?;
                if let Some(saving) = state.arguments.tracker.saving(state.now_ms()) {
                    state.observe(ObservatoryMessage::Saving(saving))?;
                }
                state.observe(ObservatoryMessage::Tick)?;
                state.event(Event::Tick)
            }
            CoordinatorMessage::Status(reply) => state.status(reply),
        }
    }
}

impl CoordinatorState {
    fn begin_with(&mut self, mut peers: Box<Peers>) -> Result<(), ActorProcessingErr> {
        let Past { lives, heads } = std::mem::take(&mut peers.past);
        self.signals = peers.signals.take();
        self.peers = Some(peers);
        self.heads = heads;
        let now_ms = self.now_ms();
        self.hear_decisions()?;
        let effects = self.arguments.machine.start(now_ms, &lives);
        self.act(effects)?;
        for node in self.nodes_back.clone() {
            self.event(Event::NodeBack { node })?;
        }
        Ok(())
    }

    /// A dropped reply says that nobody answers.
    fn ask(&self, request: Box<Request>, reply: RpcReplyPort<RequestAnswer>) {
        if let Some(peers) = self.peers.as_ref().filter(|_| !self.ended) {
            // An error means that the loop is being made again.
            let _ = peers.entry.cast(LoopMessage::Ask(request, reply));
        }
    }

    /// The observatory adds what it measures.
    fn status(&self, reply: RpcReplyPort<Value>) -> Result<(), ActorProcessingErr> {
        let saving = self.arguments.tracker.saving(self.now_ms());
        let CoordinatorArguments { machine, ledger, .. } = &self.arguments;
        let shown = shown::status(machine, ledger, saving, self.signals.as_deref());
        if self.peers.is_none() {
            // Nothing is measured yet. An error means that whoever asked is gone.
            let _ = reply.send(shown);
            return Ok(());
        }
        self.observe(ObservatoryMessage::Show(shown, reply))
    }

    /// The last step and the rollbacks, as far as decisions say.
    fn hear_decisions(&mut self) -> Result<(), ActorProcessingErr> {
        let decisions = self.arguments.ledger.decisions();
        let step = stop_of(decisions).map(|step| StepsCompleted(step.0));
        let rollbacks = Rollbacks::of(decisions);
        self.event(Event::GoesBack { rollbacks })?;
        self.event(Event::EndsAt { step })
    }

    fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    fn peers(&self) -> Result<&Peers, ActorProcessingErr> {
        self.peers.as_deref().ok_or_else(|| "not begun".into())
    }

    fn observe(&self, message: ObservatoryMessage) -> Result<(), ActorProcessingErr> {
        if let Some(peers) = &self.peers {
            peers.observatory.cast(message)?;
        }
        Ok(())
    }

    fn event(&mut self, event: Event) -> Result<(), ActorProcessingErr> {
        if self.peers.is_none() || self.ended {
            return Ok(());
        }
        let now_ms = self.now_ms();
        let effects = self.arguments.machine.on_event(now_ms, &event);
        self.act(effects)
    }

    fn act(&mut self, effects: Vec<Effect>) -> Result<(), ActorProcessingErr> {
        let mut queue = VecDeque::from(effects);
        while let Some(effect) = queue.pop_front() {
            match effect {
                Effect::Start { member, after_ms } => {
                    let after = Duration::from_millis(after_ms);
                    let Member { worker, incarnation } = member;
                    self.peers()?.node.command(NodeCommand::Start {
                        worker,
                        incarnation,
                        after,
                    })?;
                }
                Effect::Adopt { member } => {
                    let Member { worker, incarnation } = member;
                    self.peers()?.node.command(NodeCommand::Adopt { worker, incarnation })?;
                }
                Effect::Kill { member, reason } => {
                    let Member { worker, incarnation } = member;
                    self.peers()?.node.command(NodeCommand::Kill {
                        worker,
                        incarnation,
                        reason,
                    })?;
                }
                Effect::Send { members, message } => self.send(members, &message)?,
                Effect::Begin { plan } => self.begin(Arc::unwrap_or_clone(plan))?,
                Effect::FindCheckpoint { below, rollbacks } => {
                    self.arguments.tracker.on_locating(rollbacks.clone());
                    self.syncing.clear();
                    let locate = CheckpointerMessage::Locate { below, rollbacks };
                    self.peers()?.checkpointer.cast(locate)?;
                }
                Effect::Note(incident) => self.note(incident)?,
                Effect::Halt { code, diagnosis } => return self.halt(code, diagnosis),
                Effect::Done { code } => return self.done(code),
            }
        }
        Ok(())
    }

    /// A plan is completed once, whatever the size of the world.
    fn begin(&mut self, mut plan: BeginPlan) -> Result<(), ActorProcessingErr> {
        self.complete(&mut plan);
        let members: Vec<Member> = plan.roster.iter().map(|entry| entry.member).collect();
        self.send(members, &ToRank::Begin(Box::new(plan)))
    }

    /// What the ledger knows of a plan.
    fn complete(&self, plan: &mut BeginPlan) {
        plan.acknowledged = self.arguments.ledger.written();
        plan.decided = self.arguments.ledger.written();
        plan.state = self.arguments.ledger.state_at(plan.base);
        plan.decisions = for_ranks(self.arguments.ledger.decisions(), plan.base);
        if Mutant::DecisionsForgotten.is_on() {
            plan.decisions.clear();
        }
    }

    fn note(&mut self, incident: Incident) -> Result<(), ActorProcessingErr> {
        if let Incident::GenerationBegan {
            generation,
            base,
            members,
            ..
        } = &incident
        {
            let acted = self.arguments.machine.acted();
            self.arguments.tracker.on_generation(*generation, *base, acted);
            self.arguments.schedule.on_generation(members.len() as u32);
            let placed = SharderMessage::Placed {
                members: members.clone(),
                shards: self.arguments.machine.placement().cloned().unwrap_or_default(),
            };
            self.peers()?.sharder.cast(placed)?;
        }
        if let Incident::RankLost { rank: Some(_), .. } = &incident {
            self.arguments.schedule.on_loss();
        }
        if let Incident::Adopted { .. } = &incident {
            let inherit = CheckpointerMessage::Inherit(self.arguments.machine.acted());
            self.peers()?.checkpointer.cast(inherit)?;
        }
        self.observe(ObservatoryMessage::Incident(incident))
    }

    /// One message, encoded once, to all of them.
    fn send(&mut self, members: Vec<Member>, message: &ToRank) -> Result<(), ActorProcessingErr> {
        let body = message.encode().map_err(|e| e.to_string())?;
        for member in members {
            self.send_body(member, body.clone())?;
        }
        Ok(())
    }

    fn everybody(&self) -> Vec<Member> {
        self.arguments
            .machine
            .roster()
            .iter()
            .map(|&(member, _)| member)
            .collect()
    }

    fn send_body(&mut self, member: Member, body: Vec<u8>) -> Result<(), ActorProcessingErr> {
        let peer = PeerId {
            worker: member.worker,
            incarnation: member.incarnation,
        };
        match self.peers()?.hub.send(peer, body) {
            Ok(()) => Ok(()),
            // Nothing else would ever come of it: the rank waits for a message that cannot be sent.
            Err(error @ LinkError::TooLarge { .. }) => self.halt(3, error.to_string()),
            Err(error) => {
                // Its exit, or the loss of its session, comes as an event of its own.
                tracing::debug!("{member} was not told: {error}");
                Ok(())
            }
        }
    }

    fn hub(&mut self, event: HubEvent) -> Result<(), ActorProcessingErr> {
        match event {
            HubEvent::Connected(peer) => {
                // It has dialed again: the session that ended was an attempt that it gave up.
                let back = |member: &Member| (member.worker, member.incarnation) == (peer.worker, peer.incarnation);
                self.cut_off.retain(|(_, member, _)| !back(member));
                Ok(())
            }
            HubEvent::Disconnected(peer, reason) => {
                let member = Member {
                    worker: peer.worker,
                    incarnation: peer.incarnation,
                };
                let reason = format!("its control session ended: {reason}");
                self.cut_off.push((Instant::now(), member, reason));
                Ok(())
            }
            HubEvent::Message(peer, body) => {
                let member = Member {
                    worker: peer.worker,
                    incarnation: peer.incarnation,
                };
                match FromRank::decode(&body.into_vec()) {
                    Ok(message) => self.heard(member, message),
                    Err(error) => self.act(vec![Effect::Kill {
                        member,
                        reason: format!("it sent a {error}"),
                    }]),
                }
            }
        }
    }

    /// A rank without a session cannot take part: what is left of it is ended. One that failed closes its session just
    /// before it ends, and killed at once it would take its cause along (SUP-1). Whose node is away, whose end nobody tells.
    fn end_cut_off(&mut self) -> Result<(), ActorProcessingErr> {
        if self.ended || self.arguments.machine.is_leaving() {
            return Ok(());
        }
        let patience = Duration::from_millis(LAST_WORDS_MS_MAX);
        let (due, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.cut_off)
            .into_iter()
            .partition(|(since, member, _)| since.elapsed() >= patience || self.is_unwatched(member.worker));
        self.cut_off = rest;
        let kill = |(_, member, reason)| Effect::Kill { member, reason };
        self.act(due.into_iter().map(kill).collect())
    }

    fn is_unwatched(&self, worker: WorkerId) -> bool {
        self.unwatched.values().any(|workers| workers.contains(&worker.0))
    }

    fn heard(&mut self, member: Member, message: FromRank) -> Result<(), ActorProcessingErr> {
        if self.ended {
            return Ok(()); // what comes after a contradiction belongs to the same wrong course
        }
        // A stranger's readiness is answered by the machine; all else of another life is refused here (SUP-2).
        if !matches!(message, FromRank::Ready { .. }) && !self.arguments.machine.admits(member) {
            return Ok(());
        }
        match message {
            FromRank::Ready { address, pid, newest } => {
                self.observe(ObservatoryMessage::Ready(member))?;
                self.event(Event::Ready {
                    member,
                    address,
                    pid,
                    newest,
                })
            }
            FromRank::State { generation, report } => {
                for line in &report.lines {
                    self.line(line)?;
                }
                self.event(Event::State {
                    member,
                    generation,
                    report,
                })
            }
            FromRank::Running { .. } => Ok(()), // for whoever looks on
            FromRank::Saving { generation, step } => self.saving(generation, step),
            FromRank::Line {
                generation,
                line,
                spent_us,
            } => {
                self.observe(ObservatoryMessage::Spent { generation, spent_us })?;
                self.line(&line)
            }
            FromRank::Failed {
                generation,
                cause,
                suspects,
                fatal,
                dispute,
            } => self.event(Event::Failed {
                member,
                generation,
                cause,
                suspects,
                fatal,
                dispute,
            }),
            FromRank::Settled {
                generation,
                step,
                digest,
            } => self.event(Event::Settled {
                member,
                generation,
                step,
                digest,
            }),
            FromRank::Paused {
                generation,
                step,
                saving,
            } => self.event(Event::Paused {
                member,
                generation,
                step,
                saving,
            }),
            FromRank::Heartbeat {
                generation,
                step,
                progress,
                phase,
                lane_us,
                stored_bytes,
            } => self.event(Event::Heartbeat {
                member,
                generation,
                step,
                progress,
                activity: phase,
                lane_us,
                stored_bytes,
            }),
            FromRank::ShardSaved {
                step,
                shard,
                key,
                length,
                blake3,
            } => {
                let stored = StoredShard { key, length, blake3 };
                let effects = self.arguments.tracker.on_shard_saved(step, shard, stored);
                self.checkpoint(effects)
            }
            FromRank::ShardLost {
                generation,
                step,
                cause,
                full,
                ..
            } => {
                let effects = self.arguments.tracker.on_shard_lost(generation, step, cause, full);
                self.checkpoint(effects)
            }
        }
    }

    fn node(&mut self, event: NodeEvent) -> Result<(), ActorProcessingErr> {
        match event {
            NodeEvent::Started {
                worker,
                incarnation,
                pid,
            } => self.observe(ObservatoryMessage::Started(Member { worker, incarnation }, pid)),
            NodeEvent::Ending {
                worker,
                incarnation,
                killed,
            } => {
                let (member, cause) = (Member { worker, incarnation }, crate::node::why_ending(killed));
                self.event(Event::Ending { member, cause })
            }
            NodeEvent::Exited {
                worker,
                incarnation,
                exit,
            } => {
                let orderly = exit.cause.is_orderly();
                let member = Member { worker, incarnation };
                self.cut_off.retain(|(_, cut_off, _)| *cut_off != member);
                self.event(Event::Exited {
                    member,
                    cause: exit.to_string(),
                    orderly,
                })
            }
            NodeEvent::StartFailed {
                worker,
                incarnation,
                error,
            } => {
                let member = Member { worker, incarnation };
                self.event(Event::Exited {
                    member,
                    cause: error.to_string(),
                    orderly: false,
                })
            }
            NodeEvent::AllStopped => Ok(()),
            NodeEvent::NodeAway { node, workers } => {
                self.nodes_back.remove(&node);
                self.unwatched.insert(node, workers);
                self.event(Event::NodeAway { node })
            }
            NodeEvent::NodeBack { node } => {
                self.nodes_back.insert(node);
                self.unwatched.remove(&node);
                self.event(Event::NodeBack { node })
            }
        }
    }

    fn line(&mut self, line: &StepLine) -> Result<(), ActorProcessingErr> {
        if let Err(cause) = self.arguments.weights.on_line(line) {
            self.observe(ObservatoryMessage::Warning(cause))?;
        }
        let effects = self.arguments.ledger.on_line(line);
        self.record(effects)
    }

    fn record(&mut self, effects: Vec<LedgerEffect>) -> Result<(), ActorProcessingErr> {
        for effect in effects {
            if self.ended {
                return Ok(());
            }
            match effect {
                LedgerEffect::Decide(line) => {
                    self.deciding = Some(line.clone());
                    // An error means that the loop is being made again; it then gets this line.
                    let changes = self.arguments.ledger.data_changes();
                    let _ = self.peers()?.entry.cast(LoopMessage::LookAt(line, changes));
                }
                LedgerEffect::Write(line) => {
                    self.weigh(line.step)?;
                    let request = TraceRequest::Append(line.step, line.print());
                    self.peers()?.trace.request(request);
                    self.writing = Some(line);
                }
                LedgerEffect::Checked(step) => {
                    // A step that is told twice may be ahead of the trace.
                    if step <= self.arguments.ledger.written() {
                        self.weigh(step)?;
                    }
                    self.observe(ObservatoryMessage::Replayed(step))?;
                    self.ask_for_checkpoint(step)?;
                    self.event(Event::LineWritten { step })?;
                }
                LedgerEffect::Mismatch(diagnosis) => {
                    return self.halt(3, self.arguments.machine.with_ranks(&diagnosis));
                }
                LedgerEffect::Acknowledge { through, decisions } => {
                    let decisions = for_ranks(&decisions, StepsCompleted(0));
                    self.send(self.everybody(), &ToRank::Acknowledge { through, decisions })?;
                }
            }
        }
        Ok(())
    }

    /// The line of `weights.jsonl` that comes with a step, if one does.
    fn weigh(&mut self, step: StepsCompleted) -> Result<(), ActorProcessingErr> {
        if let Some(line) = self.arguments.weights.on_step(step) {
            let text = serde_json::to_string(&line)?;
            self.peers()?.trace.request(TraceRequest::Weights(text));
        }
        Ok(())
    }

    fn written(&mut self, head: tarazed_store::TraceHead) -> Result<(), ActorProcessingErr> {
        let step = head.step;
        self.heads.insert(step, head);
        // A manifest names the head of its own step. Which steps get one, ranks say when they begin it: not more lines after
        // that step than they may be ahead.
        if self.heads.len() > 2 * UNACKNOWLEDGED_LINES_MAX {
            let recent = StepsCompleted(step.0.saturating_sub(UNACKNOWLEDGED_LINES_MAX as u64));
            let tracker = &self.arguments.tracker;
            self.heads
                .retain(|&step, _| step > recent || tracker.is_under_way(step));
        }
        if let Some(line) = self.writing.take() {
            let ranks_alive = self.arguments.machine.roster().len();
            let signals = self.signals.clone();
            self.observe(ObservatoryMessage::Line {
                line,
                signals,
                ranks_alive,
            })?;
        }
        let effects = self.arguments.ledger.on_written(step);
        if self.arguments.ledger.decides(step) {
            // Before ranks hear of it, so that none can have ended by it unexpected.
            self.hear_decisions()?;
        }
        self.record(effects)?;
        self.ask_for_checkpoint(step)?;
        let effects = self.arguments.tracker.on_line_written(step);
        self.checkpoint(effects)?;
        self.event(Event::LineWritten { step })
    }

    fn halt(&mut self, code: u8, diagnosis: String) -> Result<(), ActorProcessingErr> {
        if !self.ended {
            self.ended = true;
            self.arguments.root.cast(RootMessage::Ended(End { code, diagnosis }))?;
        }
        Ok(())
    }

    /// All is saved: what is collected may go before the root hears of the end. Where nothing is, nobody waits for a store, which
    /// may be away.
    fn done(&mut self, code: u8) -> Result<(), ActorProcessingErr> {
        let Some(peers) = self.peers.as_ref().filter(|_| self.committed && !self.ended) else {
            return self.halt(code, String::new());
        };
        let end = End {
            code,
            diagnosis: String::new(),
        };
        let close = CheckpointerMessage::Close(end, self.arguments.root.clone());
        peers.checkpointer.cast(close)?;
        self.ended = true;
        Ok(())
    }
}
