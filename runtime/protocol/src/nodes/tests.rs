use super::desk::{DeskEffect, NodeDesk};
use super::roster::{LifeReport, NodeFacts, NodeRoster, RosterEffect};
use super::{FromNode, HeldLife, LifeState, ToNode, WantedLife};
use crate::coordinator::PastLife;
use crate::message::Member;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use tarazed_domain::{Incarnation, WorkerId};

const WORKERS: u32 = 3;
const PROGRAM: [u8; 32] = [7; 32];
const PATIENCE_MS: u64 = 1_000;

/// A node process, with what its agent is still to do.
struct NodeProcess {
    desk: NodeDesk,
    orders: VecDeque<DeskEffect>,
}

/// A link between the two, with what is under way.
#[derive(Default)]
struct Link {
    to_node: VecDeque<Vec<u8>>,
    to_controller: VecDeque<Vec<u8>>,
}

/// What the membership machine was told of one life.
#[derive(Default, Debug)]
struct Heard {
    started: u32,
    ending: u32,
    over: u32,
    is_killed: bool,
}

/// One controller, one node, one host; whatever can be lost is lost.
struct World {
    roster: NodeRoster,
    node: Option<NodeProcess>,
    link: Option<Link>,
    /// Processes of the host.
    living: BTreeSet<Member>,
    /// Every start of a process there ever was.
    started: BTreeSet<Member>,
    /// The newest life of each worker that the host's registry names.
    registry: BTreeMap<WorkerId, Incarnation>,
    asked: BTreeMap<Member, Heard>,
    newest: BTreeMap<WorkerId, Incarnation>,
}

impl World {
    fn new() -> Self {
        let facts = NodeFacts {
            name: "a".to_owned(),
            workers: 0..WORKERS,
        };
        Self {
            roster: NodeRoster::new(PROGRAM, PATIENCE_MS, vec![facts]),
            node: None,
            link: None,
            living: BTreeSet::new(),
            started: BTreeSet::new(),
            registry: BTreeMap::new(),
            asked: BTreeMap::new(),
            newest: BTreeMap::new(),
        }
    }

    fn begin_node(&mut self) {
        let past: Vec<PastLife> = self
            .registry
            .iter()
            .map(|(&worker, &incarnation)| {
                let member = Member { worker, incarnation };
                PastLife {
                    member,
                    lives: self.living.contains(&member),
                }
            })
            .collect();
        let (desk, orders) = NodeDesk::new(&past);
        self.node = Some(NodeProcess {
            desk,
            orders: orders.into(),
        });
    }

    fn begin_link(&mut self) {
        if let (Some(node), None) = (&self.node, &self.link) {
            let hello = FromNode::Hello {
                binary: PROGRAM,
                host: "host".to_owned(),
                lives: node.desk.have(),
            };
            let mut link = Link::default();
            link.to_controller.push_back(hello.encode().expect("encoded"));
            self.link = Some(link);
        }
    }

    fn cut_link(&mut self) {
        if self.link.take().is_some() {
            let effects = self.roster.on_lost(0, "cut");
            self.roster_effects(effects);
        }
    }

    /// Its processes stay.
    fn kill_node(&mut self) {
        self.node = None;
        self.cut_link();
    }

    fn roster_effects(&mut self, effects: Vec<RosterEffect>) {
        for effect in effects {
            match effect {
                RosterEffect::Send { node, message } => {
                    assert_eq!(node, 0);
                    let link = self.link.as_mut().expect("it sends to who is linked");
                    link.to_node.push_back(message.encode().expect("encoded"));
                }
                RosterEffect::Report { member, report } => {
                    let heard = self.asked.get_mut(&member).expect("of a life that was asked for");
                    assert_eq!(heard.over, 0, "nothing follows an end: {member} {report:?}");
                    match report {
                        LifeReport::Started { .. } => heard.started += 1,
                        LifeReport::Ending { .. } => heard.ending += 1,
                        LifeReport::Exited { .. } | LifeReport::StartFailed { .. } => heard.over += 1,
                    }
                    assert!(heard.started <= 1 && heard.ending <= 1, "NODE-1: {member} {heard:?}");
                    if heard.over > 0 {
                        assert!(!self.living.contains(&member), "{member} lives, and is told to be over");
                    }
                }
                RosterEffect::Back { .. } | RosterEffect::Away { .. } => {}
                RosterEffect::TurnedAway { reason, .. } => panic!("{reason}"),
            }
        }
    }

    fn desk_effects(&mut self, effects: Vec<DeskEffect>) {
        let node = self.node.as_mut().expect("there is a node");
        for effect in effects {
            match effect {
                DeskEffect::Report => {
                    let have = FromNode::Have(node.desk.have());
                    if let Some(link) = &mut self.link {
                        link.to_controller.push_back(have.encode().expect("encoded"));
                    }
                }
                order => node.orders.push_back(order),
            }
        }
    }

    /// The agent does the first thing that it is to do.
    fn obey(&mut self) -> bool {
        let Some(order) = self.node.as_mut().and_then(|node| node.orders.pop_front()) else {
            return false;
        };
        let (member, state) = match order {
            DeskEffect::Start { member, .. } => {
                assert!(self.started.insert(member), "SUP-2: {member} is started twice");
                assert!(
                    self.living.iter().all(|other| other.worker != member.worker),
                    "SUP-2: {member} is started beside another life"
                );
                self.registry.insert(member.worker, member.incarnation);
                self.living.insert(member);
                (member, LifeState::Running { pid: 1 })
            }
            DeskEffect::Adopt { member } if self.living.contains(&member) => (member, LifeState::Running { pid: 1 }),
            DeskEffect::Adopt { member } => (
                member,
                LifeState::NotStarted {
                    cause: "gone".to_owned(),
                },
            ),
            DeskEffect::Kill { member, .. } => {
                self.living.remove(&member);
                (member, over("killed"))
            }
            DeskEffect::Report => unreachable!("not an order"),
        };
        self.life(member, state);
        true
    }

    fn life(&mut self, member: Member, state: LifeState) {
        if let Some(node) = &mut self.node {
            let effects = node.desk.on_life(member, state);
            self.desk_effects(effects);
        }
    }

    /// A process ends by itself; a node that is there sees it.
    fn die(&mut self, worker: WorkerId) {
        let life = self.living.iter().find(|member| member.worker == worker).copied();
        if let Some(member) = life {
            self.living.remove(&member);
            // An agent that was told to start or adopt it, and has not said so yet, says that first.
            self.life(member, over("by itself"));
        }
    }

    fn deliver_to_node(&mut self) -> bool {
        let Some(bytes) = self.link.as_mut().and_then(|link| link.to_node.pop_front()) else {
            return false;
        };
        let ToNode::Want(wanted) = ToNode::decode(&bytes).expect("decoded") else {
            panic!("nothing else is sent here")
        };
        let node = self.node.as_mut().expect("a link has two ends");
        let effects = node.desk.on_want(&wanted);
        self.desk_effects(effects);
        true
    }

    fn deliver_to_controller(&mut self) -> bool {
        let Some(bytes) = self.link.as_mut().and_then(|link| link.to_controller.pop_front()) else {
            return false;
        };
        let effects = self.roster.on_message(0, FromNode::decode(&bytes).expect("decoded"));
        self.roster_effects(effects);
        true
    }

    fn present(&self, worker: WorkerId) -> Option<Member> {
        let incarnation = *self.newest.get(&worker)?;
        let member = Member { worker, incarnation };
        (self.asked[&member].over == 0).then_some(member)
    }

    /// As the membership machine does: a next life only once the last one is over.
    fn ask_for_next(&mut self, worker: WorkerId) {
        if self.present(worker).is_some() {
            return;
        }
        let incarnation = self.newest.get(&worker).map_or(Incarnation(0), |newest| newest.next());
        self.newest.insert(worker, incarnation);
        let member = Member { worker, incarnation };
        self.asked.insert(member, Heard::default());
        let effects = self.roster.start(member, 0, false);
        self.roster_effects(effects);
    }

    fn ask_for_end(&mut self, worker: WorkerId) {
        if let Some(member) = self.present(worker) {
            self.asked.get_mut(&member).expect("asked").is_killed = true;
            let effects = self.roster.kill(0, member, "it is to end");
            self.roster_effects(effects);
        }
    }

    fn act(&mut self, action: u8, worker: WorkerId) {
        match action {
            0 | 1 => self.ask_for_next(worker),
            2 => self.ask_for_end(worker),
            3 => self.die(worker),
            4 => self.cut_link(),
            5 => self.kill_node(),
            6 if self.node.is_none() => self.begin_node(),
            6 | 7 => self.begin_link(),
            8..=10 => drop(self.deliver_to_node()),
            11..=13 => drop(self.deliver_to_controller()),
            _ => drop(self.obey()),
        }
    }

    /// Everybody is there, and everything arrives.
    fn settle(&mut self) {
        if self.node.is_none() {
            self.begin_node();
        }
        self.begin_link();
        while self.obey() || self.deliver_to_node() || self.deliver_to_controller() {}
    }

    fn check_settled(&self) {
        for (member, heard) in &self.asked {
            let lives = self.living.contains(member);
            if heard.is_killed {
                assert!(
                    heard.over == 1 && !lives,
                    "{member} was to end: {heard:?}, lives: {lives}"
                );
            }
            assert_eq!(heard.over == 0, lives, "{member}: {heard:?}");
            assert!(
                heard.started >= u32::from(lives),
                "{member} lives, and nobody was told: {heard:?}"
            );
        }
        for member in &self.living {
            assert!(
                self.asked.contains_key(member),
                "{member} lives, and nobody asked for it"
            );
        }
    }
}

fn over(cause: &str) -> LifeState {
    LifeState::Over {
        cause: cause.to_owned(),
        orderly: false,
    }
}

fn member(worker: u32, incarnation: u32) -> Member {
    Member {
        worker: WorkerId(worker),
        incarnation: Incarnation(incarnation),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// SUP-2, NODE-1: whatever is lost in whatever order, no life is started twice or beside another, and in the end each is
    /// told of as it is.
    #[test]
    fn two_ends_that_lose_each_other_agree_again(actions in prop::collection::vec((0u8..18, 0u32..WORKERS), 0..120)) {
        let mut world = World::new();
        for (action, worker) in actions {
            world.act(action, WorkerId(worker));
        }
        world.settle();
        world.check_settled();
    }
}

/// The ranks of a host that is lost are no reason to wait: they count as ending at once, and begin anew when it is back.
#[test]
fn a_life_on_a_node_that_is_away_ends_without_it() {
    let mut world = World::new();
    world.ask_for_next(WorkerId(1));
    world.settle();
    let life = member(1, 0);
    assert_eq!((world.asked[&life].started, world.living.len()), (1, 1));
    world.kill_node();
    world.ask_for_end(WorkerId(1));
    assert_eq!((world.asked[&life].ending, world.asked[&life].over), (1, 0));
    // The host is back without its processes.
    world.living.clear();
    world.settle();
    world.check_settled();
    world.ask_for_next(WorkerId(1));
    world.settle();
    assert!(world.living.contains(&member(1, 1)));
}

/// A node that stands still keeps its link, and ends nobody: after a while its lives count as ending, once.
#[test]
fn a_node_that_stands_still_is_not_waited_for() {
    let mut world = World::new();
    world.ask_for_next(WorkerId(0));
    world.settle();
    let life = member(0, 0);
    assert!(matches!(
        world.roster.kill(5, life, "silent")[..],
        [RosterEffect::Send { .. }]
    ));
    assert_eq!(world.roster.kill(5 + PATIENCE_MS, life, "silent"), []);
    let effects = world.roster.kill(6 + PATIENCE_MS, life, "silent");
    assert!(
        matches!(
            &effects[..],
            [RosterEffect::Report {
                report: LifeReport::Ending { .. },
                ..
            }]
        ),
        "{effects:?}"
    );
    assert_eq!(world.roster.kill(7 + PATIENCE_MS, life, "silent"), []);
}

/// A link that is cut is no death.
#[test]
fn a_cut_link_costs_no_life() {
    let mut world = World::new();
    world.ask_for_next(WorkerId(0));
    world.settle();
    world.cut_link();
    world.settle();
    world.kill_node();
    world.settle();
    let heard = &world.asked[&member(0, 0)];
    assert_eq!((heard.started, heard.ending, heard.over), (1, 0, 0));
    world.check_settled();
}

/// DET-4: ranks of another program would compute other numbers.
#[test]
fn a_node_of_another_program_is_turned_away() {
    let facts = NodeFacts {
        name: "a".to_owned(),
        workers: 0..1,
    };
    let mut roster = NodeRoster::new(PROGRAM, PATIENCE_MS, vec![facts]);
    assert_eq!(roster.start(member(0, 0), 0, false), [], "it waits for its node");
    let hello = |binary| FromNode::Hello {
        binary,
        host: "h".to_owned(),
        lives: Vec::new(),
    };
    let effects = roster.on_message(0, hello([8; 32]));
    assert!(
        matches!(
            &effects[..],
            [
                RosterEffect::TurnedAway { .. },
                RosterEffect::Send {
                    message: ToNode::Refused(_),
                    ..
                }
            ]
        ),
        "{effects:?}"
    );
    assert_eq!(roster.on_message(0, FromNode::Have(Vec::new())), [], "whatever it says");
    assert_eq!(roster.on_lost(0, "gone"), []);
    let effects = roster.on_message(0, hello(PROGRAM));
    assert!(
        matches!(&effects[..], [RosterEffect::Back { .. }, RosterEffect::Send { message: ToNode::Want(wanted), .. }] if wanted.len() == 1),
        "{effects:?}"
    );
}

/// A node that leaves ends its lives, and starts none: what is asked for waits until it is back.
#[test]
fn a_node_that_leaves_starts_nobody() {
    let wanted = |worker| WantedLife {
        member: member(worker, 0),
        after_ms: 0,
        adopt: false,
        kill: None,
    };
    let (mut desk, _) = NodeDesk::new(&[]);
    let start = DeskEffect::Start {
        member: member(0, 0),
        after_ms: 0,
    };
    assert_eq!(desk.on_want(&[wanted(0)]), [start, DeskEffect::Report]);
    desk.on_life(member(0, 0), LifeState::Running { pid: 3 });
    let reason = "drained".to_owned();
    assert_eq!(
        desk.leave(&reason),
        [DeskEffect::Kill {
            member: member(0, 0),
            reason
        }]
    );
    assert!(!desk.is_deserted());
    assert_eq!(desk.on_want(&[wanted(0), wanted(1)]), [DeskEffect::Report]);
    desk.on_life(member(0, 0), over("killed"));
    assert!(desk.is_deserted());
    assert_eq!(
        desk.have(),
        [HeldLife {
            member: member(0, 0),
            state: over("killed")
        }]
    );
}

/// A controller that has just taken over may know an older life than the node does: it hears that this one is over.
#[test]
fn an_outdated_life_is_answered() {
    let past = PastLife {
        member: member(2, 6),
        lives: true,
    };
    let (mut desk, orders) = NodeDesk::new(&[past]);
    assert_eq!(orders, [DeskEffect::Adopt { member: member(2, 6) }]);
    desk.on_life(member(2, 6), LifeState::Running { pid: 3 });
    let older = WantedLife {
        member: member(2, 5),
        after_ms: 0,
        adopt: true,
        kill: None,
    };
    assert_eq!(desk.on_want(&[older]), [DeskEffect::Report]);
    let have = desk.have();
    assert!(
        matches!(&have[..], [six, HeldLife { member: five, state: LifeState::Over { .. } }]
        if six.member == member(2, 6) && *five == member(2, 5)),
        "{have:?}"
    );
}
