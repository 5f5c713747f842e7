//! The ranks' and the hosts' part: what fails, who answers a fence with what, who stands at a boundary, who leaves.

use super::causes::{CAUSES, Drawn, Reach, Seen};
use super::fleet::{Stage, Trouble};
use super::ledger::CHARGE_ADMISSION;
use super::world::{Happening, World};
use std::cmp::Reverse;
use tarazed_domain::{Generation, OptimizerShardIndex, Rank, StepsCompleted, WorkerId};
use tarazed_protocol::coordinator::Event;
use tarazed_protocol::message::{BarrierOutcome, Member, ShardHolding, StateReport};

/// So many peers say that they cannot connect before the generation is given up.
const COMPLAINTS: u32 = 3;

impl World<'_> {
    /// Something fails, somewhere.
    pub fn fault(&mut self, now_ms: u64, drawn: Drawn) {
        let victim = self.random.between(0, u64::from(self.setup.ranks) - 1) as u32;
        if self.fleet.stage(victim) == Stage::Gone {
            self.tally.struck_nothing += 1;
            return;
        }
        let berth = self.fleet.berth_of(victim);
        let berths = if drawn.whole_switch {
            self.fleet.behind_the_switch_of(berth)
        } else {
            vec![berth]
        };
        let one_alone = matches!(drawn.seen, Seen::Hang | Seen::Connection | Seen::Corruption);
        let struck: Vec<u32> = if one_alone || CAUSES[drawn.cause].reach == Reach::Rank {
            vec![victim]
        } else {
            berths.iter().flat_map(|&berth| self.fleet.living(berth)).collect()
        };
        let fault = self.record(now_ms, drawn, struck.len());
        let is_felt = struck.iter().any(|&slot| self.fleet.stage(slot) == Stage::Member);
        if is_felt {
            self.open.push(fault);
        }
        for &slot in &struck {
            self.faults_of.entry(slot).or_insert(fault);
        }
        let cost = &self.setup.cost;
        let repair_ms = if drawn.whole_switch {
            cost.switch_repair_ms
        } else {
            cost.host_repair_ms
        };
        let drains = CAUSES[drawn.cause].reach != Reach::Rank;
        match drawn.seen {
            Seen::Corruption => self.corrupt(now_ms, victim, fault, repair_ms),
            Seen::Exit => {
                struck.iter().for_each(|&slot| self.die(now_ms, slot, "it fails"));
                if drains {
                    self.drain(now_ms, berth, repair_ms);
                }
            }
            Seen::Hang | Seen::Silence | Seen::Connection => {
                if is_felt {
                    self.freeze(now_ms, drawn.cause);
                    self.tally.saves_lost += self.saves.interrupt(now_ms) as u64;
                }
                let trouble = match drawn.seen {
                    Seen::Hang => Trouble::Hung,
                    Seen::Silence => Trouble::Silent,
                    _ => Trouble::Cut,
                };
                for slot in struck {
                    self.afflict(now_ms, slot, trouble, drains.then_some(repair_ms));
                }
                if is_felt && self.machine.is_running() {
                    self.watch(now_ms);
                }
            }
        }
    }

    fn afflict(&mut self, now_ms: u64, slot: u32, trouble: Trouble, repair_ms: Option<u64>) {
        if let Some(repair_ms) = repair_ms {
            self.drains.insert(slot, repair_ms);
        }
        if self.fleet.stage(slot) == Stage::Starting {
            // It does not come up; its node agent says so.
            return self.die(now_ms, slot, "it could not be started");
        }
        self.fleet.afflict(slot, trouble);
        if trouble == Trouble::Silent {
            self.heartbeat(now_ms, slot);
        }
    }

    fn heartbeat(&mut self, now_ms: u64, slot: u32) {
        let (member, generation) = (self.fleet.member(slot), self.machine.generation());
        let (step, activity) = (StepsCompleted(self.stand.step), String::new());
        // Whoever waits for one in trouble makes no progress; a world at work is not watched for any.
        let event = Event::Heartbeat {
            member,
            generation,
            step,
            progress: 0,
            activity,
            lane_us: 0,
            stored_bytes: 0,
        };
        self.tell(now_ms, &event);
    }

    /// Everybody who can be heard, and would count as silent at this tick, is heard before it.
    pub fn heartbeats(&mut self, now_ms: u64) {
        for slot in 0..self.setup.ranks {
            let due = self.machine.silence_deadline_ms(WorkerId(slot));
            if due.is_some_and(|due_ms| due_ms <= now_ms)
                && matches!(self.fleet.stage(slot), Stage::Member | Stage::Waiting)
                && self.fleet.trouble(slot) != Some(Trouble::Silent)
            {
                self.heartbeat(now_ms, slot);
            }
        }
    }

    /// All survivors that can answer a fence do.
    pub fn answer(&mut self, now_ms: u64, generation: Generation) {
        if generation != self.machine.generation() {
            return;
        }
        let waits = self.who_waits_for_whom();
        let all_well = self.fleet.troubles().is_empty();
        // One after the other in the same memory.
        let mut event = Event::State {
            member: self.fleet.member(0),
            generation,
            report: StateReport::default(),
        };
        for slot in 0..self.setup.ranks {
            if self.fleet.stage(slot) != Stage::Member {
                continue;
            }
            let trouble = if all_well { None } else { self.fleet.trouble(slot) };
            if matches!(trouble, Some(Trouble::Hung | Trouble::Silent)) {
                continue;
            }
            if let Event::State { member, report, .. } = &mut event {
                *member = self.fleet.member(slot);
                self.report(slot, report);
                let waits = waits.iter().find(|(waiting, _)| *waiting == slot);
                report.waits_for = waits.map(|&(_, rank)| rank);
            }
            self.tell(now_ms, &event);
        }
    }

    fn report(&self, slot: u32, report: &mut StateReport) {
        let stand = self.stand;
        let state = StepsCompleted(stand.step);
        let reduced = stand.passed_below.map(|_| state.next().completed());
        report.shards.clear();
        report
            .shards
            .extend(self.holdings.of(slot).iter().map(|&shard| ShardHolding {
                shard: OptimizerShardIndex(shard),
                state,
                reduced,
            }));
        let passed = stand.step + u64::from(stand.passed_below.is_some_and(|below| slot < below));
        // One that holds nothing has just come, or gives up what it had: it passed no barrier of this course.
        report.passed = (passed > 0 && !report.shards.is_empty()).then(|| outcome(passed));
    }

    /// The rank of a slot in the present generation.
    pub fn rank_of(&self, slot: u32) -> Option<Rank> {
        let roster = self.machine.roster();
        let found = roster.binary_search_by_key(&slot, |(member, _)| member.worker.0);
        found.ok().map(|rank| Rank(rank as u32))
    }

    /// One that is cut off waits for a neighbour, and that one for it; nobody else is in their circle.
    fn who_waits_for_whom(&self) -> Vec<(u32, Rank)> {
        let roster = self.machine.roster();
        let cut = self.fleet.troubles().iter();
        cut.filter(|(_, trouble)| **trouble == Trouble::Cut)
            .filter_map(|(&slot, _)| {
                let rank = self.rank_of(slot)?;
                let peer = (rank.index() + 1) % roster.len();
                let peer_slot = roster[peer].0.worker.0;
                Some([(slot, Rank(peer as u32)), (peer_slot, rank)])
            })
            .flatten()
            .collect()
    }

    /// In a generation that begins with one that is cut off, its peers fail to connect to it.
    pub fn expect_refusals(&mut self, now_ms: u64, generation: Generation) {
        let connect_ms = self.setup.cost.timeouts.connect_ms;
        let cut: Vec<u32> = self
            .fleet
            .troubles()
            .iter()
            .filter(|(_, t)| **t == Trouble::Cut)
            .map(|(&s, _)| s)
            .collect();
        for slot in cut {
            self.at(now_ms + connect_ms, Happening::Refused(generation, slot));
        }
    }

    /// Peers complain of it.
    pub fn refuse(&mut self, now_ms: u64, generation: Generation, slot: u32) {
        if generation != self.machine.generation() || self.fleet.trouble(slot) != Some(Trouble::Cut) {
            return;
        }
        let roster = self.machine.roster();
        let Some(rank) = self.rank_of(slot) else {
            return;
        };
        let size = roster.len();
        let peers: Vec<Member> = (1..=COMPLAINTS as usize)
            .map(|step| roster[(rank.index() + step) % size].0)
            .filter(|peer| peer.worker.0 != slot)
            .collect();
        for member in peers {
            self.tell(
                now_ms,
                &Event::Failed {
                    member,
                    generation,
                    cause: "cannot connect".to_owned(),
                    suspects: vec![rank],
                    fatal: false,
                    dispute: None,
                },
            );
        }
    }

    /// All members of a generation stand at a boundary.
    pub fn boundary(&mut self, now_ms: u64, generation: Generation, step: u64, saving: bool) {
        let stretch = match &self.running {
            Some(running) if running.generation == generation => running.stretch,
            _ => None,
        };
        let Some(stretch) = stretch else { return };
        if now_ms < stretch.from_ms || stretch.base + stretch.at(now_ms).steps != step {
            return;
        }
        self.freeze(now_ms, CHARGE_ADMISSION);
        self.tally.pauses += 1;
        if saving {
            let protection = &self.setup.protection;
            let due_ms = now_ms + protection.snapshot_ms + protection.upload_ms;
            self.saves.begin(step, due_ms);
            self.at(due_ms, Happening::Saved);
        }
        let mut event = Event::Paused {
            member: self.fleet.member(0),
            generation,
            step: StepsCompleted(step),
            saving,
        };
        for slot in 0..self.setup.ranks {
            if self.fleet.stage(slot) == Stage::Member {
                if let Event::Paused { member, .. } = &mut event {
                    *member = self.fleet.member(slot);
                }
                self.tell(now_ms, &event);
            }
        }
    }

    /// The run halts: every process ends, and somebody has to start it again.
    pub fn halted(&mut self, now_ms: u64, code: u8, diagnosis: String) {
        let blame = self.ledger.blame();
        self.tally.halts.push((blame, code, diagnosis));
        self.freeze(now_ms, blame);
        self.running = None;
        self.saves.interrupt(now_ms);
        for slot in 0..self.setup.ranks {
            if self.fleet.stage(slot) != Stage::Gone {
                self.fleet.end(slot);
                self.holdings.lose(slot);
            }
        }
        self.faults_of.clear();
        self.wrong.clear();
        self.distrusted = false;
        let lives_on =
            |happening: &Happening| matches!(happening, Happening::Fault | Happening::Mended(_) | Happening::Horizon);
        self.queue.retain(|Reverse((_, _, happening))| lives_on(happening));
        for (slot, repair_ms) in std::mem::take(&mut self.drains) {
            self.drain(now_ms, self.fleet.berth_of(slot), repair_ms);
        }
        if self.closed.is_some() {
            self.end = Some(Ok(code));
            return;
        }
        self.is_halted = true;
        self.give_up_steps();
        self.at(now_ms + self.setup.cost.person_ms, Happening::Controller);
    }

    /// The simulated time is over: the account is closed, and the run is asked to end in order.
    pub fn horizon(&mut self, now_ms: u64) {
        let mut ledger = self.ledger.clone();
        let mut stood = self.stand.step;
        let stretch = self.running.as_ref().and_then(|running| running.stretch);
        match stretch {
            Some(stretch) if now_ms >= stretch.from_ms => {
                ledger.stretch(now_ms, &stretch, CHARGE_ADMISSION);
                stood = stretch.base + stretch.at(now_ms).steps;
            }
            _ => ledger.down(now_ms, CHARGE_ADMISSION),
        }
        self.closed = Some((ledger, stood));
        if self.is_halted {
            self.end = Some(Ok(3));
            return;
        }
        self.tell(now_ms, &Event::StopRequested);
    }

    /// They were told to leave, and do.
    pub fn leave(&mut self, now_ms: u64, leaving: Vec<Member>) {
        for member in leaving {
            if self.fleet.lives(member) {
                self.fleet.end(member.worker.0);
                let (cause, orderly) = ("left".to_owned(), true);
                self.tell(now_ms, &Event::Exited { member, cause, orderly });
            }
        }
    }
}

fn outcome(step: u64) -> BarrierOutcome {
    BarrierOutcome {
        step: StepsCompleted(step),
        grad_norm: 1.0,
        loss: 1.0,
        stats: Vec::new(),
        skipped: false,
        pause: false,
        checkpoint: false,
        busy: false,
    }
}
