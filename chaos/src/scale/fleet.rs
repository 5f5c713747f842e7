//! Processes, hosts, switches and spares: what is there, what is broken, and who lives where.
//!
//! A **berth** is the place of eight worker slots that always share a host. A host that breaks leaves its berth, is mended,
//! and waits as a spare; the berth takes the next spare there is, or waits for one.

use super::cost::{HOSTS_PER_SWITCH, RANKS_PER_HOST};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use tarazed_domain::{Incarnation, WorkerId};
use tarazed_protocol::message::Member;

/// How worker slots lie on hosts. The runtime gives the two copies of a shard to different ranks, mostly neighbours, and
/// knows no hosts (`sharder::place`); so the layout decides what one host takes along.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Layout {
    /// Eight neighbours on a host, as launchers number ranks.
    Packed,
    /// Neighbours on different hosts behind different switches.
    Striped,
}

/// What is wrong with a process that has not ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// Its device thread stands still; it is heard.
    Hung,
    /// It is not heard.
    Silent,
    /// Its data plane reaches nobody; it is heard, and answers.
    Cut,
}

/// Where a slot's process stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// None.
    Gone,
    /// Told to start.
    Starting,
    /// Ready, holding nothing.
    Waiting,
    /// In a generation, or a survivor of one.
    Member,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    incarnation: Incarnation,
    stage: Stage,
}

/// All of them.
#[derive(Debug)]
pub struct Fleet {
    slots: Vec<Slot>,
    layout: Layout,
    berths: u32,
    /// The host of each berth.
    hosts: Vec<Option<u32>>,
    spares: VecDeque<u32>,
    /// Berths that wait for a host.
    wanting: VecDeque<u32>,
    /// Berths whose host is a new one since its processes last started.
    moved: Vec<bool>,
    troubles: BTreeMap<u32, Trouble>,
    member_count: usize,
    silent_count: usize,
}

impl Fleet {
    /// `ranks` slots, eight to a berth, and so many spare hosts.
    #[must_use]
    pub fn new(ranks: u32, spare_hosts: u32, layout: Layout) -> Self {
        let berths = ranks / RANKS_PER_HOST;
        let mut order: Vec<u32> = (0..berths).collect();
        if layout == Layout::Striped {
            order.sort_by_key(|&host| (host % HOSTS_PER_SWITCH, host / HOSTS_PER_SWITCH));
        }
        let slot = Slot {
            incarnation: Incarnation(0),
            stage: Stage::Gone,
        };
        Self {
            slots: vec![slot; ranks as usize],
            layout,
            berths,
            hosts: order.into_iter().map(Some).collect(),
            spares: (berths..berths + spare_hosts).collect(),
            wanting: VecDeque::new(),
            moved: vec![false; berths as usize],
            troubles: BTreeMap::new(),
            member_count: 0,
            silent_count: 0,
        }
    }

    /// The berth of a slot.
    #[must_use]
    pub const fn berth_of(&self, slot: u32) -> u32 {
        match self.layout {
            Layout::Packed => slot / RANKS_PER_HOST,
            Layout::Striped => slot % self.berths,
        }
    }

    fn slots_of(&self, berth: u32) -> impl Iterator<Item = u32> + use<> {
        let (layout, berths) = (self.layout, self.berths);
        (0..RANKS_PER_HOST).map(move |place| match layout {
            Layout::Packed => berth * RANKS_PER_HOST + place,
            Layout::Striped => berth + place * berths,
        })
    }

    /// The slot's present life.
    #[must_use]
    pub fn member(&self, slot: u32) -> Member {
        Member {
            worker: WorkerId(slot),
            incarnation: self.slots[slot as usize].incarnation,
        }
    }

    /// Where the slot's process stands.
    #[must_use]
    pub fn stage(&self, slot: u32) -> Stage {
        self.slots[slot as usize].stage
    }

    /// Whether this life of the slot has a process, or will have one.
    #[must_use]
    pub fn lives(&self, member: Member) -> bool {
        let slot = &self.slots[member.worker.index()];
        slot.incarnation == member.incarnation && slot.stage != Stage::Gone
    }

    /// What is wrong with it.
    #[must_use]
    pub fn trouble(&self, slot: u32) -> Option<Trouble> {
        self.troubles.get(&slot).copied()
    }

    /// Those with something wrong, in order.
    #[must_use]
    pub const fn troubles(&self) -> &BTreeMap<u32, Trouble> {
        &self.troubles
    }

    /// Members with something wrong: their generation gets nowhere.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.troubles.keys().any(|&slot| self.stage(slot) == Stage::Member)
    }

    /// Whether a process that cannot be heard is there.
    #[must_use]
    pub const fn has_silent(&self) -> bool {
        self.silent_count > 0
    }

    /// How many are members.
    #[must_use]
    pub const fn member_count(&self) -> usize {
        self.member_count
    }

    /// Slots that are members, in order.
    pub fn members(&self) -> impl Iterator<Item = u32> {
        self.slots
            .iter()
            .zip(0..)
            .filter(|(slot, _)| slot.stage == Stage::Member)
            .map(|(_, at)| at)
    }

    /// Gives it a trouble, unless it has one.
    pub fn afflict(&mut self, slot: u32, trouble: Trouble) {
        if let Entry::Vacant(entry) = self.troubles.entry(slot) {
            entry.insert(trouble);
            self.silent_count += usize::from(trouble == Trouble::Silent);
        }
    }

    fn set_stage(&mut self, slot: u32, stage: Stage) {
        let before = std::mem::replace(&mut self.slots[slot as usize].stage, stage);
        self.member_count -= usize::from(before == Stage::Member);
        self.member_count += usize::from(stage == Stage::Member);
    }

    /// This life of a slot is told to start; whether its berth has a host, and whether that is a new one.
    pub fn start(&mut self, member: Member) -> Start {
        let slot = member.worker.0;
        self.slots[slot as usize].incarnation = member.incarnation;
        self.set_stage(slot, Stage::Starting);
        let berth = self.berth_of(slot);
        if self.hosts[berth as usize].is_none() {
            match self.spares.pop_front() {
                Some(host) => self.hosts[berth as usize] = Some(host),
                None => {
                    if !self.wanting.contains(&berth) {
                        self.wanting.push_back(berth);
                    }
                    return Start::Waits;
                }
            }
        }
        if self.moved[berth as usize] {
            Start::OnSpare { berth }
        } else {
            Start::InPlace
        }
    }

    /// A process became ready.
    pub fn ready(&mut self, member: Member) {
        self.set_stage(member.worker.0, Stage::Waiting);
        let berth = self.berth_of(member.worker.0);
        self.moved[berth as usize] = false;
    }

    /// It is in the generation that begins.
    pub fn admit(&mut self, slot: u32) {
        if self.stage(slot) != Stage::Member {
            self.set_stage(slot, Stage::Member);
        }
    }

    /// Its process is gone.
    pub fn end(&mut self, slot: u32) {
        self.set_stage(slot, Stage::Gone);
        let trouble = self.troubles.remove(&slot);
        self.silent_count -= usize::from(trouble == Some(Trouble::Silent));
    }

    /// The host of a slot's berth is taken out; gives the host, if the berth had one.
    pub fn drain(&mut self, berth: u32) -> Option<u32> {
        self.moved[berth as usize] = true;
        self.hosts[berth as usize].take()
    }

    /// Slots of a berth that have a process, or are starting one.
    #[must_use]
    pub fn living(&self, berth: u32) -> Vec<u32> {
        self.slots_of(berth)
            .filter(|&slot| self.stage(slot) != Stage::Gone)
            .collect()
    }

    /// Berths with a host behind the same switch as that of this one.
    #[must_use]
    pub fn behind_the_switch_of(&self, berth: u32) -> Vec<u32> {
        let Some(host) = self.hosts[berth as usize] else {
            return Vec::new();
        };
        let switch = host / HOSTS_PER_SWITCH;
        let hosts = self.hosts.iter().zip(0..);
        hosts
            .filter(|(host, _)| host.is_some_and(|host| host / HOSTS_PER_SWITCH == switch))
            .map(|(_, berth)| berth)
            .collect()
    }

    /// A host is mended: it goes to a berth that waits for one, which is given back, or to the spares.
    pub fn mended(&mut self, host: u32) -> Option<u32> {
        while let Some(berth) = self.wanting.pop_front() {
            if self.hosts[berth as usize].is_none() {
                self.hosts[berth as usize] = Some(host);
                return Some(berth);
            }
        }
        self.spares.push_back(host);
        None
    }

    /// Slots of a berth that are told to start and have no process yet.
    #[must_use]
    pub fn starting(&self, berth: u32) -> Vec<u32> {
        self.slots_of(berth)
            .filter(|&slot| self.stage(slot) == Stage::Starting)
            .collect()
    }
}

/// How a start goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// On the host where the slot was before.
    InPlace,
    /// On a spare host.
    OnSpare {
        /// All processes of which come up together.
        berth: u32,
    },
    /// No host is free.
    Waits,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_differ_in_who_shares_a_host() {
        let packed = Fleet::new(1024, 0, Layout::Packed);
        assert_eq!(packed.berth_of(0), packed.berth_of(7));
        let striped = Fleet::new(1024, 0, Layout::Striped);
        for slot in 0..1023 {
            let (a, b) = (striped.berth_of(slot), striped.berth_of(slot + 1));
            assert_ne!(a, b);
            let switch = |berth: u32| striped.hosts[berth as usize].map(|host| host / HOSTS_PER_SWITCH);
            assert_ne!(switch(a), switch(b), "slots {slot} and the next");
        }
    }

    #[test]
    fn a_berth_waits_where_no_spare_is_left_and_takes_the_mended_host() {
        let mut fleet = Fleet::new(16, 0, Layout::Packed);
        for slot in 0..16 {
            assert_eq!(fleet.start(fleet.member(slot)), Start::InPlace);
        }
        let host = fleet.drain(1);
        assert_eq!(host, Some(1));
        (8..16).for_each(|slot| fleet.end(slot));
        assert_eq!(fleet.start(fleet.member(9)), Start::Waits);
        assert_eq!(fleet.mended(1), Some(1));
        assert_eq!(fleet.starting(1), [9]);
        assert_eq!(fleet.start(fleet.member(10)), Start::OnSpare { berth: 1 });
    }
}
