//! The tier for large worlds, on small ones: the same setup gives the same world, nothing is lost where a copy lives, and
//! where the textbook's formula holds, the simulated goodput is what it says.
#![allow(clippy::expect_used, reason = "a failed expectation is a failed test")]

use tarazed_chaos::scale::causes::Seen;
use tarazed_chaos::scale::fleet::Layout;
use tarazed_chaos::scale::report::Report;
use tarazed_chaos::scale::setup::Setup;
use tarazed_chaos::scale::sweep::{SERIES, setup_of};
use tarazed_chaos::scale::{cost::Cost, run};

const DAY_MS: u64 = 86_400_000;

/// A world that is well: [`run`] itself checks each plan, each restore and the account of time and steps.
fn well(setup: Setup) -> Report {
    let seed = setup.seed;
    let report = run(setup).expect("a world");
    assert_eq!(report.failure, None, "seed {seed}");
    assert!(report.ledger.steps > 0);
    report
}

/// 64 ranks, two days, a failure each half hour or so.
fn small(seed: u64, layout: Layout) -> Setup {
    let mut setup = Setup::new(64, 2 * DAY_MS, seed);
    setup.rate_factor = 1_500.0;
    setup.protection.layout = layout;
    setup
}

/// DET-1 for the tier itself.
#[test]
fn the_same_seed_gives_the_same_world() {
    for layout in [Layout::Packed, Layout::Striped] {
        let first = well(small(7, layout));
        assert_eq!(first.digest, well(small(7, layout)).digest);
        assert_ne!(first.digest, well(small(8, layout)).digest);
        assert!(first.tally.faults.len() > 40, "{} failures", first.tally.faults.len());
    }
}

/// STEP-2, SUP-3: many seeds, every way to fail; [`run`] refuses a world that loses a committed step while copies live,
/// restores without need, or does not come to its end.
#[test]
fn committed_steps_are_lost_only_with_their_last_copy() {
    let (mut lost, mut finished, mut ends) = (0, 0, [0_u32; 2]);
    for seed in 0..60 {
        for layout in [Layout::Packed, Layout::Striped] {
            let report = well(small(seed, layout));
            lost += report.ledger.steps_lost;
            finished += report.tally.finished_steps;
            ends[usize::from(report.exit_code == Some(34))] += 1;
        }
    }
    assert!(
        lost > 0,
        "whole hosts were lost with both copies, so that the checks had something to check"
    );
    assert!(finished > 0, "some failure came while a barrier was being passed");
    // A stop in mid-restore may find no time for its last checkpoint, and a halted run is not asked.
    assert!(ends[1] > ends[0] * 5, "{ends:?}: a stop ends in order, as a rule");
}

/// Ranks alone that fail cost no committed step, because the other copy lives.
#[test]
fn a_host_takes_both_copies_of_neighbours_along_and_not_those_of_strangers() {
    let restores = |layout| {
        let mut setup = small(3, layout);
        setup.ranks = 512;
        setup.rate_factor = 200.0;
        setup.horizon_ms = 4 * DAY_MS;
        let report = well(setup);
        report.tally.restores.iter().sum::<u64>() as f64 / report.tally.faults.len() as f64
    };
    let (packed, striped) = (restores(Layout::Packed), restores(Layout::Striped));
    assert!(packed > 0.5, "{packed}: most failures take a host");
    assert!(striped < packed / 2.0, "{striped} against {packed}");
}

/// DET-3: a wrong result halts nothing. It is told by another's, the state is restored where two differ and nobody knows who
/// is right, and the one that had it wrong is replaced; [`run`] refuses a world that replaces another.
#[test]
fn silent_corruption_costs_a_rank_and_no_person() {
    for replicas in [1, 2, 3] {
        let (mut struck, mut disputes, mut convicted) = (0, 0, 0);
        for seed in 0..16 {
            let mut setup = small(seed, Layout::Striped);
            setup.protection.replicas = replicas;
            let tally = well(setup).tally;
            struck += tally
                .faults
                .iter()
                .filter(|fault| fault.seen == Seen::Corruption)
                .count() as u64;
            disputes += tally.disputes;
            convicted += tally.convicted;
            for (_, _, diagnosis) in &tally.halts {
                assert!(!diagnosis.contains("differs"), "{diagnosis}");
            }
        }
        println!("{replicas} replicas: {struck} struck, {disputes} disputes, {convicted} named");
        assert!(struck >= 10 && disputes <= struck);
        assert!(
            disputes * 10 >= struck * 8,
            "{disputes} of {struck}: some died of something else first"
        );
        assert!(
            convicted <= disputes && convicted * 10 >= disputes * 8,
            "{convicted} of {disputes}"
        );
        assert!(replicas < 3 || convicted == disputes, "two who agree know at once");
    }
}

/// Where goodput is above 80 %, simulation and formula differ by less than this.
const YOUNG_DALY_TOLERANCE: f64 = 0.015;

/// The simulated checkpoint and restart is what Young and Daly expect of it, at both ends of a wide range of costs.
#[test]
fn checkpoint_and_restart_agrees_with_young_and_daly() {
    let mut compared = 0;
    for series in (0..SERIES.len()).filter(|&series| SERIES[series].has_formula) {
        for mtbf_s in [1_800.0, 7_200.0, 28_800.0] {
            let mut setup = setup_of(5, series, mtbf_s, &Cost::default());
            // The world's size does not matter to the formula; its failures do.
            setup.ranks = 256;
            setup.rate_factor *= 4.0;
            let expected = setup.terms(0.0).best_goodput(setup.mtbf_ms());
            if expected <= 0.8 {
                continue;
            }
            let found = well(setup).goodput();
            println!(
                "{}, {mtbf_s} s: {found:.4}, expected {expected:.4}",
                SERIES[series].name
            );
            assert!(
                (found - expected).abs() < YOUNG_DALY_TOLERANCE,
                "{} at {mtbf_s} s: {found:.4}, expected {expected:.4}",
                SERIES[series].name
            );
            compared += 1;
        }
    }
    assert!(compared >= 4, "{compared} points lie where the formula holds");
}
