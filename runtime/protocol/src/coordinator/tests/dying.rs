//! Processes whose end is seen to begin before they are gone.

use super::*;

impl Cluster {
    /// It does nothing any more, and its exit comes when it comes.
    pub(super) fn kill_slowly(&mut self, worker: u32) {
        let Some(process) = self.processes.remove(&worker) else {
            return;
        };
        let member = Member {
            worker: WorkerId(worker),
            incarnation: process.incarnation,
        };
        self.pending
            .retain(|event| !matches!(event, Event::Ready { member: m, .. } if *m == member));
        self.pending.push_back(Event::Exited {
            member,
            cause: "killed".to_owned(),
            orderly: false,
        });
        self.event(Event::Ending {
            member,
            cause: "being killed".to_owned(),
        });
    }

    fn notes(&mut self, event: Event) -> Vec<Incident> {
        self.now_ms += 1;
        let effects = self.coordinator.on_event(self.now_ms, &event);
        self.act(effects.clone());
        let noted = effects.into_iter().filter_map(|effect| match effect {
            Effect::Note(incident) => Some(incident),
            _ => None,
        });
        noted.collect()
    }
}

/// The others train on without one that takes its time to be gone; its next life waits for that, and nothing else does.
#[test]
fn nobody_waits_for_a_dying_process() {
    let mut cluster = Cluster::new();
    cluster.coordinator.options.last_step = StepsCompleted(10_000);
    cluster.settle(12);
    let (generation, written) = (cluster.coordinator.generation(), cluster.coordinator.written);
    let dying = cluster.member(1);
    cluster.kill_slowly(1);
    let exit = cluster.pending.pop_back().expect("its exit");
    cluster.settle(30);
    assert!(cluster.coordinator.is_running() && cluster.coordinator.written > written);
    assert_eq!(cluster.coordinator.generation(), generation.next());
    assert_eq!(cluster.coordinator.roster().len(), WORKERS as usize - 1);
    assert_eq!(cluster.coordinator.workers()[1].state, "ending");
    assert_eq!(
        cluster.started[&1], dying.incarnation,
        "two lives of one worker are never there together (SUP-2)"
    );
    cluster.event(exit);
    assert_eq!(cluster.started[&1], dying.incarnation.next());
    assert_eq!(
        cluster.coordinator.generation(),
        generation.next(),
        "the exit is no second loss"
    );
    cluster.settle(30);
    assert_eq!(cluster.coordinator.roster().len(), WORKERS as usize);
}

/// One loss is one, told when it begins, and told with its cause when it is over.
#[test]
fn an_end_is_told_twice_and_counted_once() {
    let mut cluster = Cluster::new();
    cluster.settle(12);
    let member = cluster.member(2);
    let rank = cluster.coordinator.rank_of(member);
    assert!(rank.is_some());
    let ending = || Event::Ending {
        member,
        cause: "being killed".to_owned(),
    };
    let notes = cluster.notes(ending());
    assert!(
        matches!(&notes[..], [Incident::RankEnding { member: m, rank: r, .. }] if (*m, *r) == (member, rank)),
        "{notes:?}"
    );
    assert_eq!(cluster.notes(ending()), [], "said already");
    cluster.now_ms += 500;
    let exited = Event::Exited {
        member,
        cause: "signal 9".to_owned(),
        orderly: false,
    };
    let notes = cluster.notes(exited);
    let [
        Incident::RankLost {
            rank: told,
            cause,
            silent_ms,
            expected: true,
            ..
        },
    ] = &notes[..]
    else {
        panic!("{notes:?}")
    };
    assert_eq!((*told, cause.as_str()), (rank, "signal 9"));
    assert!(
        *silent_ms < 500,
        "from its last word to its end's beginning: {silent_ms}"
    );
    assert_eq!(cluster.notes(ending()), [], "of a life that is over");
}

/// A process that ends while the world leaves, or one that holds nothing yet, is heard of by its exit alone.
#[test]
fn an_end_of_no_member_is_no_loss() {
    let mut cluster = Cluster::new();
    let starting = Member {
        worker: WorkerId(1),
        incarnation: Incarnation(0),
    };
    let ending = |member| Event::Ending {
        member,
        cause: String::new(),
    };
    assert_eq!(cluster.coordinator.on_event(1, &ending(starting)), []);
    cluster.coordinator.options.last_step = StepsCompleted(5);
    while !matches!(cluster.coordinator.phase, Phase::Leaving { .. }) {
        assert!(cluster.end.is_none(), "it leaves first");
        cluster.settle(1);
        cluster.event(Event::Tick);
    }
    let leaving = cluster.member(0);
    assert_eq!(cluster.coordinator.on_event(cluster.now_ms, &ending(leaving)), []);
}

/// A spare that is dying itself takes nobody's place.
#[test]
fn a_dying_spare_is_not_admitted() {
    let mut cluster = Cluster::new();
    cluster.coordinator.options.last_step = StepsCompleted(10_000);
    cluster.coordinator.options.spares = 1;
    cluster.event(Event::Resize { ranks: WORKERS });
    cluster.settle(12);
    assert_eq!(cluster.coordinator.workers()[4].state, "ready");
    cluster.kill_slowly(4);
    cluster.kill_slowly(1);
    let exits: Vec<Event> = cluster.pending.drain(..).collect();
    cluster.settle(6);
    assert!(cluster.coordinator.is_running());
    assert_eq!(cluster.coordinator.roster().len(), WORKERS as usize - 1);
    exits.into_iter().for_each(|exit| cluster.event(exit));
    cluster.settle(60);
    assert_eq!(cluster.coordinator.roster().len(), WORKERS as usize);
}

/// What a process said before may be heard behind the news of its end.
#[test]
fn a_word_behind_its_end_brings_nobody_back() {
    let mut cluster = Cluster::new();
    cluster.coordinator.options.last_step = StepsCompleted(10_000);
    cluster.settle(12);
    let dying = cluster.member(1);
    cluster.kill_slowly(1);
    cluster.event(Event::Ready {
        member: dying,
        address: String::new(),
        pid: 1,
        newest: Generation(0),
    });
    assert_eq!(cluster.coordinator.workers()[1].state, "ending");
}

/// Nor does one that dies before it was ready, whose word is heard behind the news of its end.
#[test]
fn a_starting_process_that_dies_is_never_ready() {
    let mut cluster = Cluster::new();
    cluster.coordinator.options.last_step = StepsCompleted(10_000);
    cluster.settle(12);
    cluster.kill(1);
    let starting = cluster.member(1);
    assert_eq!(cluster.coordinator.workers()[1].state, "starting");
    cluster.kill_slowly(1);
    let exit = cluster.pending.pop_back().expect("its exit");
    let ready = |member| Event::Ready {
        member,
        address: String::new(),
        pid: 1,
        newest: Generation(0),
    };
    cluster.event(ready(starting));
    assert_eq!(
        cluster.coordinator.workers()[1].state,
        "starting",
        "until its exit is heard"
    );
    cluster.event(exit);
    cluster.settle(60);
    assert_eq!(
        cluster.coordinator.roster().len(),
        WORKERS as usize,
        "its next life is ready as any"
    );
}
