//! The controller's side: what is wanted of each node, and what the membership machine is told of it.

use super::{FromNode, HeldLife, LifeState, ToNode, WantedLife};
use crate::message::Member;
use std::collections::BTreeMap;
use std::ops::Range;
use tarazed_domain::{Mutant, WorkerId};

/// A host of the run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeFacts {
    /// Its name.
    pub name: String,
    /// Its workers.
    pub workers: Range<u32>,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RosterEffect {
    /// To the node of this number, which is linked.
    Send {
        /// Which.
        node: usize,
        /// What.
        message: ToNode,
    },
    /// To the membership machine.
    Report {
        /// Of whom.
        member: Member,
        /// What.
        report: LifeReport,
    },
    /// A node is there.
    Back {
        /// Its number.
        index: usize,
        /// Its name.
        node: String,
        /// Its host's name.
        host: String,
        /// How many rank processes it has.
        lives: usize,
    },
    /// A node is not there any more, and nobody watches its rank processes.
    Away {
        /// Its number.
        index: usize,
        /// Its name.
        node: String,
        /// Its workers.
        workers: Range<u32>,
        /// Why.
        cause: String,
        /// How many rank processes it had.
        lives: usize,
    },
    /// For people: a process that would be a node cannot be one.
    TurnedAway {
        /// Its name.
        node: String,
        /// Why.
        reason: String,
    },
}

/// What became of a life.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LifeReport {
    /// Its process runs.
    Started {
        /// Process id on its host.
        pid: u32,
    },
    /// It can do nothing any more, and is not gone yet.
    Ending {
        /// The reason for which it was killed, if it was.
        killed: Option<String>,
    },
    /// It is gone.
    Exited {
        /// How it ended.
        cause: String,
        /// By itself, with code 0.
        orderly: bool,
    },
    /// It never came to be.
    StartFailed {
        /// Why.
        cause: String,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Told {
    Nothing,
    Started,
    Ending,
}

#[derive(Debug)]
struct Wanted {
    life: WantedLife,
    told: Told,
    /// When its end was asked for first.
    kill_ms: u64,
}

#[derive(Debug)]
struct Node {
    facts: NodeFacts,
    is_linked: bool,
    wanted: BTreeMap<WorkerId, Wanted>,
}

/// All nodes of a run.
#[derive(Debug)]
pub struct NodeRoster {
    binary: [u8; 32],
    patience_ms: u64,
    nodes: Vec<Node>,
    let_go: bool,
}

impl NodeRoster {
    /// Nodes whose program must be the one with this BLAKE3, and of which one that is there and does not end a life in time counts
    /// as away for it: what stands still keeps its links.
    #[must_use]
    pub fn new(binary: [u8; 32], patience_ms: u64, nodes: Vec<NodeFacts>) -> Self {
        let node = |facts| Node {
            facts,
            is_linked: false,
            wanted: BTreeMap::new(),
        };
        Self {
            binary,
            patience_ms,
            nodes: nodes.into_iter().map(node).collect(),
            let_go: false,
        }
    }

    fn node_of(&self, worker: WorkerId) -> Option<usize> {
        self.nodes
            .iter()
            .position(|node| node.facts.workers.contains(&worker.0))
    }

    /// A life is to begin after a while, or one of an earlier controller is to be watched. It is answered once its node says
    /// what became of it.
    pub fn start(&mut self, member: Member, after_ms: u64, adopt: bool) -> Vec<RosterEffect> {
        let Some(node) = self.node_of(member.worker) else {
            let cause = "no node of cluster.nodes has room for it".to_owned();
            let report = LifeReport::StartFailed { cause };
            return vec![RosterEffect::Report { member, report }];
        };
        let wanted = Wanted {
            life: WantedLife {
                member,
                after_ms,
                adopt,
                kill: None,
            },
            told: Told::Nothing,
            kill_ms: 0,
        };
        self.nodes[node].wanted.insert(member.worker, wanted);
        self.want(node)
    }

    /// A life is to end. Where its node is away, it counts as ending. May be asked for again, and is where nothing comes of it.
    pub fn kill(&mut self, now_ms: u64, member: Member, reason: &str) -> Vec<RosterEffect> {
        let Some(index) = self.node_of(member.worker) else {
            return Vec::new();
        };
        let node = &mut self.nodes[index];
        let Some(wanted) = node
            .wanted
            .get_mut(&member.worker)
            .filter(|wanted| wanted.life.member == member)
        else {
            return Vec::new();
        };
        if wanted.life.kill.is_some() {
            return match now_ms > wanted.kill_ms + self.patience_ms {
                true => wanted.give_up(&node.facts.name).into_iter().collect(),
                false => Vec::new(),
            };
        }
        wanted.life.kill = Some(reason.to_owned());
        wanted.kill_ms = now_ms;
        if node.is_linked {
            return self.want(index);
        }
        node.given_up().collect()
    }

    /// Another controller is in charge: nothing is wanted or told any more.
    pub fn let_go(&mut self) {
        self.let_go = true;
    }

    /// Whether nodes are to be told that the run is over, when this controller ends.
    #[must_use]
    pub const fn is_in_charge(&self) -> bool {
        !self.let_go
    }

    /// Whether it has this node.
    #[must_use]
    pub fn has(&self, node: usize) -> bool {
        node < self.nodes.len()
    }

    /// A node's link is over.
    pub fn on_lost(&mut self, index: usize, cause: &str) -> Vec<RosterEffect> {
        let Some(node) = self.nodes.get_mut(index).filter(|node| node.is_linked) else {
            return Vec::new();
        };
        node.is_linked = false;
        if self.let_go {
            return Vec::new();
        }
        let mut effects = vec![RosterEffect::Away {
            index,
            node: node.facts.name.clone(),
            workers: node.facts.workers.clone(),
            cause: cause.to_owned(),
            lives: node
                .wanted
                .values()
                .filter(|wanted| wanted.told == Told::Started)
                .count(),
        }];
        effects.extend(node.given_up());
        effects
    }

    /// A node says something.
    pub fn on_message(&mut self, index: usize, message: FromNode) -> Vec<RosterEffect> {
        let (let_go, binary) = (self.let_go, self.binary);
        let Some(node) = self.nodes.get_mut(index) else {
            return Vec::new();
        };
        if let_go {
            return Vec::new();
        }
        match message {
            FromNode::Hello { binary: theirs, .. } if theirs != binary => {
                let reason = "its program is not the one that the controller runs, and another program computes other \
                              numbers; start the same file on every host"
                    .to_owned();
                let turned = RosterEffect::TurnedAway {
                    node: node.facts.name.clone(),
                    reason: reason.clone(),
                };
                let message = ToNode::Refused(reason);
                vec![turned, RosterEffect::Send { node: index, message }]
            }
            FromNode::Hello { host, lives, .. } => {
                node.is_linked = true;
                let mut effects = vec![RosterEffect::Back {
                    index,
                    node: node.facts.name.clone(),
                    host,
                    lives: lives.iter().filter(|life| life.state.is_alive()).count(),
                }];
                effects.extend(node.hear(lives));
                if !Mutant::BackUntold.is_on() {
                    effects.extend(self.want(index));
                }
                effects
            }
            FromNode::Have(lives) if node.is_linked => node.hear(lives),
            FromNode::Have(_) => Vec::new(), // it was turned away
        }
    }

    /// Everything that is wanted of a node, to it.
    fn want(&self, index: usize) -> Vec<RosterEffect> {
        let node = &self.nodes[index];
        if !node.is_linked || self.let_go {
            return Vec::new();
        }
        let wanted = node.wanted.values().map(|wanted| wanted.life.clone()).collect();
        vec![RosterEffect::Send {
            node: index,
            message: ToNode::Want(wanted),
        }]
    }
}

impl Wanted {
    /// It is to end, and its node, of this name, cannot be relied on.
    fn give_up(&mut self, name: &str) -> Option<RosterEffect> {
        let reason = self.life.kill.as_ref().filter(|_| self.told != Told::Ending)?;
        if Mutant::AwayAwaited.is_on() {
            return None;
        }
        self.told = Told::Ending;
        let killed = Some(format!("{reason}; its node '{name}' is away or stands still"));
        Some(RosterEffect::Report {
            member: self.life.member,
            report: LifeReport::Ending { killed },
        })
    }
}

impl Node {
    /// Those that are to end, while nobody can end them.
    fn given_up(&mut self) -> impl Iterator<Item = RosterEffect> {
        let name = &self.facts.name;
        self.wanted.values_mut().filter_map(move |wanted| wanted.give_up(name))
    }

    fn hear(&mut self, lives: Vec<HeldLife>) -> Vec<RosterEffect> {
        let mut effects = Vec::new();
        for HeldLife { member, state } in lives {
            let known = self.wanted.get_mut(&member.worker);
            let Some(wanted) = known.filter(|wanted| wanted.life.member == member) else {
                continue; // of an earlier life, or of a controller that is gone
            };
            let mut tell = |report| effects.push(RosterEffect::Report { member, report });
            match state {
                LifeState::Starting => {}
                LifeState::Running { pid } | LifeState::Ending { pid, .. } if wanted.told == Told::Nothing => {
                    wanted.told = Told::Started;
                    tell(LifeReport::Started { pid });
                    if let LifeState::Ending { killed, .. } = state {
                        wanted.told = Told::Ending;
                        tell(LifeReport::Ending { killed });
                    }
                }
                LifeState::Running { .. } => {}
                LifeState::Ending { killed, .. } => {
                    if wanted.told != Told::Ending {
                        wanted.told = Told::Ending;
                        tell(LifeReport::Ending { killed });
                    }
                }
                LifeState::Over { cause, orderly } => {
                    tell(LifeReport::Exited { cause, orderly });
                    self.wanted.remove(&member.worker);
                }
                LifeState::NotStarted { cause } => {
                    tell(LifeReport::StartFailed { cause });
                    self.wanted.remove(&member.worker);
                }
            }
        }
        effects
    }
}
