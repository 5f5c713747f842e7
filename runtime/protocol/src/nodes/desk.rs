//! A node's side: which processes of its host live, and what is to be done with them.

use super::{HeldLife, LifeState, WantedLife};
use crate::coordinator::PastLife;
use crate::message::Member;
use std::collections::BTreeMap;
use tarazed_domain::{Incarnation, Mutant, WorkerId};

/// What the node's agent is to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DeskEffect {
    /// Start a process.
    Start {
        /// As whom.
        member: Member,
        /// Wait first.
        after_ms: u64,
    },
    /// Watch a process that an earlier agent of this host started.
    Adopt {
        /// Who.
        member: Member,
    },
    /// End a process.
    Kill {
        /// Which.
        member: Member,
        /// Why.
        reason: String,
    },
    /// Tell the controller [`NodeDesk::have`].
    Report,
}

#[derive(Debug)]
struct Held {
    incarnation: Incarnation,
    state: LifeState,
    /// It was told to end.
    is_killed: bool,
    /// The life that is to follow it once it is over.
    successor: Option<WantedLife>,
}

/// All that a node knows and is asked for.
#[derive(Debug, Default)]
pub struct NodeDesk {
    held: BTreeMap<WorkerId, Held>,
    /// The newest life of each worker that was ever started on this host.
    newest: BTreeMap<WorkerId, Incarnation>,
    /// Asked for by a controller that knew less than this node: a newer life of the same worker is here.
    outdated: Vec<Member>,
    /// The node leaves: nothing is started any more.
    is_leaving: bool,
}

impl NodeDesk {
    /// A node whose host has these lives from before, and what is to be done first: those that live are watched again.
    #[must_use]
    pub fn new(past: &[PastLife]) -> (Self, Vec<DeskEffect>) {
        let mut desk = Self::default();
        let mut effects = Vec::new();
        for &PastLife { member, lives } in past {
            let state = match lives {
                true => LifeState::Starting,
                false => ended_unseen(),
            };
            desk.hold(member, state);
            effects.extend(lives.then_some(DeskEffect::Adopt { member }));
        }
        (desk, effects)
    }

    fn hold(&mut self, member: Member, state: LifeState) {
        let newest = self.newest.entry(member.worker).or_insert(member.incarnation);
        *newest = member.incarnation.max(*newest);
        let held = Held {
            incarnation: member.incarnation,
            state,
            is_killed: false,
            successor: None,
        };
        self.held.insert(member.worker, held);
    }

    /// What the controller wants, all of it.
    pub fn on_want(&mut self, wanted: &[WantedLife]) -> Vec<DeskEffect> {
        let is_wanted = |worker: WorkerId, incarnation| {
            let member = Member { worker, incarnation };
            wanted.iter().any(|life| life.member == member)
        };
        // The controller has heard of an end that it does not ask for any more.
        self.held
            .retain(|&worker, held| held.state.is_alive() || is_wanted(worker, held.incarnation));
        self.outdated.clear();
        let mut effects: Vec<DeskEffect> = wanted.iter().flat_map(|life| self.want(life)).collect();
        effects.push(DeskEffect::Report);
        effects
    }

    fn want(&mut self, life: &WantedLife) -> Vec<DeskEffect> {
        let Member { worker, incarnation } = life.member;
        let Some(held) = self.held.get_mut(&worker) else {
            return self.begin(life);
        };
        if held.incarnation == incarnation {
            held.successor = None;
            return match &life.kill {
                Some(reason) => self.kill(worker, reason),
                None => Vec::new(),
            };
        }
        if held.incarnation > incarnation {
            self.outdated.push(life.member);
            return Vec::new();
        }
        if !held.state.is_alive() || Mutant::NodeStartsBeside.is_on() {
            return self.begin(life);
        }
        // A worker has one life at a time.
        held.successor = Some(life.clone());
        self.kill(worker, "its worker begins a newer life")
    }

    /// Nobody of this worker lives here.
    fn begin(&mut self, life: &WantedLife) -> Vec<DeskEffect> {
        let member = life.member;
        let was_here = self.newest.get(&member.worker) >= Some(&member.incarnation) && !Mutant::NodeStartsTwice.is_on();
        let unborn = |cause: &str| LifeState::NotStarted {
            cause: cause.to_owned(),
        };
        let state = match &life.kill {
            _ if life.adopt || was_here => ended_unseen(),
            Some(reason) => unborn(reason),
            // The controller goes on waiting for it, until this node is back.
            None if self.is_leaving => return Vec::new(),
            None => LifeState::Starting,
        };
        let starts = state == LifeState::Starting;
        self.hold(member, state);
        let after_ms = life.after_ms;
        starts
            .then_some(DeskEffect::Start { member, after_ms })
            .into_iter()
            .collect()
    }

    fn kill(&mut self, worker: WorkerId, reason: &str) -> Vec<DeskEffect> {
        match self.held.get_mut(&worker) {
            Some(held) if held.state.is_alive() && !held.is_killed => {
                held.is_killed = true;
                let incarnation = held.incarnation;
                let member = Member { worker, incarnation };
                vec![DeskEffect::Kill {
                    member,
                    reason: reason.to_owned(),
                }]
            }
            _ => Vec::new(),
        }
    }

    /// The agent's word on a life.
    pub fn on_life(&mut self, member: Member, state: LifeState) -> Vec<DeskEffect> {
        let Some(held) = self.held.get_mut(&member.worker) else {
            return Vec::new();
        };
        if held.incarnation != member.incarnation || !held.state.is_alive() {
            return Vec::new();
        }
        held.state = state;
        let mut effects = Vec::new();
        if !held.state.is_alive()
            && let Some(successor) = held.successor.take()
        {
            effects = self.begin(&successor);
        }
        effects.push(DeskEffect::Report);
        effects
    }

    /// The process of a life that is known to run; 0 for others.
    #[must_use]
    pub fn pid(&self, member: Member) -> u32 {
        let held = self
            .held
            .get(&member.worker)
            .filter(|held| held.incarnation == member.incarnation);
        match held.map(|held| &held.state) {
            Some(&(LifeState::Running { pid } | LifeState::Ending { pid, .. })) => pid,
            _ => 0,
        }
    }

    /// The node leaves: nothing is started any more, and everybody ends.
    pub fn leave(&mut self, reason: &str) -> Vec<DeskEffect> {
        self.is_leaving = true;
        let workers: Vec<WorkerId> = self.held.keys().copied().collect();
        workers
            .into_iter()
            .flat_map(|worker| self.kill(worker, reason))
            .collect()
    }

    /// Whether no process is left, nor will come to be.
    #[must_use]
    pub fn is_deserted(&self) -> bool {
        self.held.values().all(|held| !held.state.is_alive())
    }

    /// All lives that it knows of.
    #[must_use]
    pub fn have(&self) -> Vec<HeldLife> {
        let lives = self.held.iter().map(|(&worker, held)| HeldLife {
            member: Member {
                worker,
                incarnation: held.incarnation,
            },
            state: held.state.clone(),
        });
        let outdated = self.outdated.iter().map(|&member| HeldLife {
            member,
            state: ended_unseen(),
        });
        lives.chain(outdated).collect()
    }
}

/// Of a life whose end nobody here saw.
fn ended_unseen() -> LifeState {
    LifeState::Over {
        cause: "ended while no node agent watched it".to_owned(),
        orderly: false,
    }
}
