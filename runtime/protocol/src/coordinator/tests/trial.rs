//! Silent corruption: disputes, verdicts, checkpoints that are not believed.

use super::*;
use crate::placement::ShardHolder;

/// What ranks say of a step whose loss is no number.
const NO_NUMBER: &str = "step N gives loss NaN";

impl Cluster {
    /// Everybody of the generation reports the same claims on shard 0; returns its holders.
    fn dispute(&mut self, step: u64, digests: &[u8]) -> Vec<Member> {
        let ranks: Vec<Rank> = self
            .coordinator
            .placement()
            .expect("a generation")
            .of(OptimizerShardIndex(0))
            .iter()
            .map(|holder| holder.rank)
            .collect();
        let holders: Vec<Member> = ranks
            .iter()
            .map(|rank| self.coordinator.roster()[rank.index()].0)
            .collect();
        let claims = ranks.iter().zip(digests).map(|(&rank, &digest)| Claim {
            rank,
            digest: [digest; 16],
        });
        let dispute = Dispute {
            step: StepsCompleted(step),
            item: DisputedItem::Shard(OptimizerShardIndex(0)),
            claims: claims.collect(),
        };
        self.all_report(&dispute, "shard 0 differs");
        holders
    }

    /// Everybody of the generation fails with this.
    fn all_report(&mut self, dispute: &Dispute, cause: &str) {
        let generation = self.coordinator.generation();
        for (member, _) in self.coordinator.roster().to_vec() {
            self.event(Event::Failed {
                member,
                generation,
                cause: cause.to_owned(),
                suspects: vec![],
                fatal: false,
                dispute: Some(dispute.clone()),
            });
        }
    }

    /// The next step gives a loss that is no number, and the next generation runs: nothing that anybody held before is in it.
    fn loses_its_numbers(&mut self) -> Dispute {
        let dispute = Dispute {
            step: StepsCompleted(self.coordinator.written.0 + 1),
            item: DisputedItem::Finite,
            claims: vec![],
        };
        self.all_report(&dispute, NO_NUMBER);
        assert_eq!(self.end, None, "once may be an accident");
        while !self.coordinator.is_running() {
            self.settle(1);
        }
        let plan = self.coordinator.plan.as_ref().expect("a generation runs");
        assert_eq!(plan.disputed, Some((dispute.step, dispute.item)));
        let believed = |holder: &ShardHolder| matches!(holder.origin, ShardOrigin::Keep | ShardOrigin::CopyFrom(_));
        assert!(!plan.shards.holders().iter().any(believed), "the state is restored");
        dispute
    }
}

/// DET-3: a result that differs is told with all ranks that have a part in it.
#[test]
fn a_diagnosis_names_the_ranks_and_their_lanes() {
    let mut cluster = Cluster::new();
    let unknown = cluster.coordinator.with_ranks("it differs");
    assert_eq!(unknown, "it differs; computed under an earlier controller");
    cluster.settle(12);
    let named = cluster.coordinator.with_ranks("it differs");
    let roster = cluster.coordinator.roster();
    assert_eq!(roster.len(), WORKERS as usize);
    assert!(named.starts_with("it differs; computed by worker "), "{named}");
    for (Member { worker, incarnation }, lanes) in roster {
        let (start, end) = (lanes.start, lanes.end);
        let rank = format!("worker {worker} (incarnation {incarnation}, lanes {start}..{end})");
        assert!(named.contains(&rank), "{rank} is not in: {named}");
    }
}

/// DET-3: nobody's state is believed until the step has been done again; then the one that had it wrong is replaced.
#[test]
fn a_dispute_is_settled_by_doing_the_step_again() {
    let mut cluster = Cluster::new();
    cluster.settle(12);
    let step = cluster.coordinator.written.0 + 1;
    let holders = cluster.dispute(step, &[1, 2]);
    assert_eq!(holders.len(), 2);
    let mut restored = false;
    for _ in 0..40 {
        cluster.settle(1);
        restored |= cluster.coordinator.plan.as_ref().is_some_and(|plan| {
            plan.disputed == Some((StepsCompleted(step), DisputedItem::Shard(OptimizerShardIndex(0))))
        });
        if restored {
            break;
        }
    }
    assert!(restored, "the plan says what to look at");
    let event = Event::Settled {
        member: cluster.coordinator.roster()[0].0,
        generation: cluster.coordinator.generation(),
        step: StepsCompleted(step),
        digest: [1; 16],
    };
    cluster.event(event);
    let wrong = holders[1];
    cluster.settle(300);
    assert_eq!(cluster.end, Some(Effect::Done { code: 0 }));
    for holder in holders {
        let expected = if holder == wrong {
            holder.incarnation.next()
        } else {
            holder.incarnation
        };
        assert_eq!(cluster.started[&holder.worker.0], expected, "{holder}");
    }
}

/// DET-3: what differs again and again halts the run, with everybody named who was part of it.
#[test]
fn a_dispute_that_nobody_can_decide_halts() {
    let mut cluster = Cluster::new();
    cluster.settle(12);
    let step = cluster.coordinator.written.0 + 1;
    let holders = cluster.dispute(step, &[1, 2]);
    for _ in 0..2 {
        assert_eq!(cluster.end, None);
        while !cluster.coordinator.is_running() {
            cluster.settle(1);
        }
        cluster.dispute(step, &[1, 2]);
    }
    let Some(Effect::Halt { code: 3, diagnosis }) = &cluster.end else {
        panic!("{:?}", cluster.end)
    };
    for holder in holders {
        assert!(diagnosis.contains(&holder.to_string()), "{diagnosis}");
    }
}

/// DET-3: a loss that is no number comes again from a restored state, so it is of the run itself: it halts at once, with step and
/// loss named, and nobody is replaced for it.
#[test]
fn a_loss_that_is_no_number_twice_halts() {
    let mut cluster = Cluster::new();
    cluster.settle(12);
    let dispute = cluster.loses_its_numbers();
    cluster.all_report(&dispute, NO_NUMBER);
    let Some(Effect::Halt { code: 3, diagnosis }) = &cluster.end else {
        panic!("{:?}", cluster.end)
    };
    let again = format!("step {} done again, with the same result", dispute.step);
    assert!(
        diagnosis.starts_with(NO_NUMBER) && diagnosis.contains(&again),
        "{diagnosis}"
    );
    assert!(cluster.started.values().all(|&life| life == Incarnation(0)));
}

/// DET-3: one that does not come again was an accident of nobody knows whom: the run goes on with everybody.
#[test]
fn a_loss_that_is_no_number_once_costs_nobody_his_place() {
    let mut cluster = Cluster::new();
    cluster.settle(12);
    let dispute = cluster.loses_its_numbers();
    let event = Event::Settled {
        member: cluster.coordinator.roster()[0].0,
        generation: cluster.coordinator.generation(),
        step: dispute.step,
        digest: [0; 16], // nobody claimed anything
    };
    cluster.event(event);
    cluster.settle(300);
    assert_eq!(cluster.end, Some(Effect::Done { code: 0 }));
    assert!(cluster.started.values().all(|&life| life == Incarnation(0)));
}

/// DET-3: two lots of bad luck at one step are no reason to halt: the result that came twice, of two workers, is right.
#[test]
fn a_second_dispute_is_decided_by_both() {
    let mut cluster = Cluster::new();
    cluster.coordinator.options.last_step = StepsCompleted(10_000);
    cluster.settle(12);
    let step = cluster.coordinator.written.0 + 1;
    let holders = cluster.dispute(step, &[1, 2]);
    while !cluster.coordinator.is_running() {
        cluster.settle(1);
    }
    // Now the other one is wrong, in its own way.
    assert_eq!(cluster.dispute(step, &[3, 1]), holders);
    cluster.settle(40);
    assert!(cluster.coordinator.is_running() && cluster.end.is_none());
    let plan = cluster.coordinator.plan.as_ref();
    assert!(
        plan.is_some_and(|plan| plan.restore.is_none()),
        "what the right one holds is believed"
    );
    for holder in holders {
        assert_eq!(
            cluster.started[&holder.worker.0],
            holder.incarnation.next(),
            "{holder} was wrong once"
        );
    }
}

/// DET-3: two of three agree: nothing is restored, and what the third holds counts for nothing.
#[test]
fn a_majority_overrules_one() {
    let mut cluster = Cluster::new();
    cluster.coordinator.options.replicas = 3;
    cluster.coordinator.options.last_step = StepsCompleted(10_000);
    cluster.kill(3); // a generation with three copies
    cluster.settle(30);
    cluster.saved = None; // a restore would begin from the seed
    let floor = cluster.floor;
    let step = cluster.coordinator.written.0 + 1;
    let holders = cluster.dispute(step, &[7, 9, 7]);
    assert_eq!(holders.len(), 3);
    let wrong = holders[1];
    cluster.settle(40);
    assert!(cluster.floor >= floor && cluster.coordinator.is_running());
    assert_eq!(cluster.started[&wrong.worker.0], wrong.incarnation.next());
    assert!(
        cluster
            .coordinator
            .plan
            .as_ref()
            .is_some_and(|plan| plan.restore.is_none())
    );
}

/// CKPT-4: a checkpoint whose state is not what the trace says of its step, or whose objects are bad, is passed over for an
/// older one.
#[test]
fn a_checkpoint_that_restores_another_state_is_refuted() {
    let (mut cluster, bad) = refuted(DisputedItem::Base);
    assert_eq!(asked_below(&mut cluster), Some(bad));
    let (mut cluster, bad) = refuted(DisputedItem::Checkpoint);
    assert_eq!(asked_below(&mut cluster), Some(bad));
}

/// CKPT-1, CKPT-4: where no checkpoint is left that could be read, whether to begin anew is a person's decision; where one was
/// refuted by its state alone, the run begins from the seed, for there is nothing better.
#[test]
fn unreadable_checkpoints_are_no_reason_to_begin_anew() {
    for (item, halts) in [(DisputedItem::Checkpoint, true), (DisputedItem::Base, false)] {
        let (mut cluster, _) = refuted(item);
        asked_below(&mut cluster);
        let located = Event::Located { checkpoint: None };
        let effects = cluster.coordinator.on_event(cluster.now_ms, &located);
        let halt = effects.iter().find_map(|effect| match effect {
            Effect::Halt { code, diagnosis } => Some((*code, diagnosis.clone())),
            _ => None,
        });
        assert_eq!(halt.is_some(), halts, "{item:?}: {effects:?}");
        if let Some((code, diagnosis)) = halt {
            assert!(code == 3 && diagnosis.contains("another state"), "{diagnosis}");
        }
    }
}

/// CKPT-4: what was still being stored when a checkpoint began to be restored may be committed meanwhile, and the older one
/// be collected: the newer one is looked for, and the older one's absence proves nothing.
#[test]
fn a_newer_checkpoint_is_not_passed_over_with_a_refuted_one() {
    for item in [DisputedItem::Base, DisputedItem::Checkpoint] {
        let (mut cluster, bad) = restoring();
        let step = StepsCompleted(bad.0 + 1);
        let effects = cluster
            .coordinator
            .on_event(cluster.now_ms, &Event::CheckpointCommitted { step });
        cluster.act(effects);
        refute(&mut cluster, bad, item);
        assert_eq!(asked_below(&mut cluster), None, "{item:?}");
        assert!(cluster.coordinator.unreadable.is_empty());
    }
}

/// All state is lost, the newest checkpoint is restored, and a rank finds it wrong in this way.
fn refuted(item: DisputedItem) -> (Cluster, StepsCompleted) {
    let (mut cluster, bad) = restoring();
    refute(&mut cluster, bad, item);
    (cluster, bad)
}

/// All state is lost, and ranks restore the newest checkpoint, of this step.
fn restoring() -> (Cluster, StepsCompleted) {
    let mut cluster = Cluster::new();
    cluster.settle(25);
    (0..SLOTS).for_each(|worker| cluster.kill(worker));
    while !cluster.coordinator.is_running() {
        cluster.settle(1);
    }
    let plan = cluster.coordinator.plan.as_ref();
    let from = plan.and_then(|plan| plan.restore.clone()).expect("restored");
    (cluster, from.step)
}

fn refute(cluster: &mut Cluster, step: StepsCompleted, item: DisputedItem) {
    let event = Event::Failed {
        member: cluster.coordinator.roster()[0].0,
        generation: cluster.coordinator.generation(),
        cause: "another state".to_owned(),
        suspects: vec![],
        fatal: false,
        dispute: Some(Dispute {
            step,
            item,
            claims: vec![],
        }),
    };
    let effects = cluster.coordinator.on_event(cluster.now_ms, &event);
    let refuted =
        |effect: &Effect| matches!(effect, Effect::Note(Incident::CheckpointRefuted { step: of, .. }) if *of == step);
    assert!(effects.iter().any(refuted), "{effects:?}");
    cluster.act(effects);
}

/// Below which step a checkpoint is looked for, when all have answered the fence.
fn asked_below(cluster: &mut Cluster) -> Option<StepsCompleted> {
    let mut below = None;
    for worker in 0..SLOTS {
        if let Some(process) = cluster.processes.get(&worker)
            && let Some(ToRank::Fence { generation }) = process.inbox.back()
        {
            let event = Event::State {
                member: cluster.member(worker),
                generation: *generation,
                report: StateReport::default(),
            };
            for effect in cluster.coordinator.on_event(cluster.now_ms, &event) {
                if let Effect::FindCheckpoint { below: asked, .. } = effect {
                    below = asked;
                }
            }
        }
    }
    below
}
