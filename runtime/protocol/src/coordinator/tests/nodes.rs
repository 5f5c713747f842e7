//! Ranks on several hosts: what the machine makes of nodes that are away.

use super::*;

fn member(worker: u32, incarnation: u32) -> Member {
    Member {
        worker: WorkerId(worker),
        incarnation: Incarnation(incarnation),
    }
}

/// Two workers on each of two nodes.
fn on_two_nodes() -> Options {
    Options {
        hosts: vec![0, 0, 1, 1],
        ..options()
    }
}

fn kills(effects: &[Effect], whom: Member) -> bool {
    effects
        .iter()
        .any(|effect| matches!(effect, Effect::Kill { member, .. } if *member == whom))
}

/// SUP-3: whose node has not come yet has not begun, and is not late however long that takes; from then on it has the time of a
/// start.
#[test]
fn a_start_waits_for_its_node() {
    let mut machine = Coordinator::new(on_two_nodes(), Generation(0), StepsCompleted(0));
    let start_ms = machine.options.timeouts.start_ms;
    machine.start(0, &[]);
    machine.on_event(1, &Event::NodeBack { node: 0 });
    let mut now_ms = 1;
    let mut pass = |machine: &mut Coordinator, time_ms: u64| {
        let mut effects = Vec::new();
        let until_ms = now_ms + time_ms;
        while now_ms < until_ms {
            now_ms += 100;
            effects.extend(machine.on_event(now_ms, &Event::Tick));
        }
        effects
    };
    let effects = pass(&mut machine, 3 * start_ms);
    assert!(kills(&effects, member(0, 0)), "its node is there: it is late");
    assert!(!kills(&effects, member(2, 0)), "{effects:?}");
    machine.on_event(3 * start_ms + 200, &Event::NodeBack { node: 1 });
    assert!(
        !kills(&pass(&mut machine, start_ms - 1_000), member(2, 0)),
        "it has its time"
    );
    assert!(kills(&pass(&mut machine, 2_000), member(2, 0)), "it had its time");
    machine.on_event(5 * start_ms, &Event::NodeAway { node: 1 });
    let effects = machine.on_event(5 * start_ms + 1, &Event::Tick);
    assert!(!kills(&effects, member(2, 0)), "nobody could end it now: {effects:?}");
}

/// A node starts a life for the controller before just when the next one has read who is there: that one hears of it early, and
/// does not wait for a word that was said.
#[test]
fn a_life_that_is_ready_before_it_is_asked_for_counts() {
    let mut machine = Coordinator::new(on_two_nodes(), Generation(7), StepsCompleted(5));
    let past = PastLife {
        member: member(0, 2),
        lives: true,
    };
    machine.start(0, &[past]);
    machine.on_event(1, &Event::NodeBack { node: 0 });
    let ready = Event::Ready {
        member: member(0, 3),
        address: "here".to_owned(),
        pid: 9,
        newest: Generation(0),
    };
    assert_eq!(machine.on_event(2, &ready), [], "it is not ended");
    let exited = Event::Exited {
        member: member(0, 2),
        cause: "ended while no node agent watched it".to_owned(),
        orderly: false,
    };
    let effects = machine.on_event(3, &exited);
    let next = member(0, 3);
    assert!(
        effects
            .iter()
            .any(|effect| matches!(effect, Effect::Start { member, .. } if *member == next))
    );
    let shown = machine.workers();
    assert_eq!((shown[0].member, shown[0].state, shown[0].pid), (next, "ready", 9));
}

/// A controller takes over while a host is lost: those on it are given up, and nobody waits for them.
#[test]
fn a_new_controller_goes_on_without_those_whose_node_is_away() {
    let mut machine = Coordinator::new(on_two_nodes(), Generation(7), StepsCompleted(5));
    let past: Vec<PastLife> = (0..WORKERS)
        .map(|worker| PastLife {
            member: member(worker, 3),
            lives: true,
        })
        .collect();
    machine.start(0, &past);
    machine.on_event(1, &Event::NodeBack { node: 0 });
    // One on each node comes back, and the lost node's is cut off before the others are there.
    for worker in [0, 2] {
        let ready = Event::Ready {
            member: member(worker, 3),
            address: String::new(),
            pid: 1,
            newest: Generation(9),
        };
        assert_eq!(machine.on_event(2, &ready), [], "the others are waited for");
    }
    let ending = |worker| Event::Ending {
        member: member(worker, 3),
        cause: "its node is away".to_owned(),
    };
    machine.on_event(3, &ending(2));
    machine.on_event(4, &ending(3));
    let effects = machine.on_event(5, &ending(1));
    let fenced: Vec<&Vec<Member>> = effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Send {
                members,
                message: ToRank::Fence { .. },
            } => Some(members),
            _ => None,
        })
        .collect();
    assert_eq!(fenced, [&vec![member(0, 3)]], "{effects:?}");
}
