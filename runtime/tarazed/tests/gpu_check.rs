//! The checks of `tarazed gpu-check` that need no GPU: whole runs of several processes, on the processors.

use std::path::Path;
use std::time::Duration;
use tarazed::gpu_check::processes::{Sizes, check};
use tarazed_domain::config::ClusterDevice;

/// DET-1: one process, several, and several of which one is killed, with a spare and without, leave the same trace.
#[test]
fn several_processes_with_one_killed_leave_the_trace_of_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let sizes = Sizes {
        device: ClusterDevice::Cpu,
        ranks: 2,
        steps: 3,
        patience: Duration::from_secs(300),
        visible: None,
        nccl: Err("not on processors".to_owned()),
    };
    let program = Path::new(env!("CARGO_BIN_EXE_tarazed"));
    let found = check(program, folder.path(), &sizes);
    assert!(found.failures.is_empty(), "{:?}", found.failures);
    let report = found.value.expect("a report");
    println!("{report:#}"); // for --nocapture
    assert!(
        report["steps_compared"].as_u64().is_some_and(|steps| steps >= 6),
        "{report}"
    );
    assert_eq!(report["same_traces"].as_array().map(Vec::len), Some(4), "{report}");
    assert_eq!(report["killed_over_nccl"], "not run: not on processors");
    for (run, bound_ms) in [("killed", 10_000), ("killed_with_a_spare", 2_000)] {
        let times = &report[run];
        // Times are reported, not required.
        assert!(
            times["kill_to_next_commit_ms"].is_u64() && times["within_bound"].is_boolean(),
            "{report}"
        );
        assert_eq!(times["bound_ms"], bound_ms, "{report}");
        assert_eq!(times["steps_lost"], 0, "{report}");
    }
}
