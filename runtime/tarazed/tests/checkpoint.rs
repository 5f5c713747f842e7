//! `tarazed checkpoint` as a person runs it: exit codes, and what each command does to a store.

use std::path::Path;
use std::process::{Command, Output};
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
use tarazed_store::{
    BinaryId, CheckpointStore, Digest, Lineage, Manifest, ShardGeometry, ShardPayload, TraceHead, WriterId,
};

fn tarazed(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tarazed"));
    command.args(args).output().expect("the program runs")
}

#[track_caller]
fn expect(output: &Output, code: i32) -> String {
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert_eq!(output.status.code(), Some(code), "{out}\n{err}");
    out + &err
}

/// Three checkpoints of one shard of two blocks.
async fn fill(folder: &Path) {
    fill_with(folder, &[10, 20, 30], |_| "", None).await;
}

/// Checkpoints of these steps, of one shard of two blocks, with the decisions up to each.
async fn fill_with(folder: &Path, steps: &[u64], decisions: impl Fn(u64) -> &'static str, reach_steps: Option<u32>) {
    let location = folder.to_str().expect("a UTF-8 path");
    let store = CheckpointStore::open(location, WriterId::fresh(Generation(0)))
        .await
        .expect("opened");
    let fence = store.claim(Generation(1)).await.expect("claimed");
    for &step in steps {
        let decisions = decisions(step).as_bytes().to_vec();
        let geometry = ShardGeometry {
            shard: OptimizerShardIndex(0),
            first_block: 0,
            block_count: 2,
            block_elements: 64,
        };
        let payload = ShardPayload::new([0, 1, 2].map(|_| vec![step as f32; 128]));
        let step = StepsCompleted(step);
        let shard = store
            .put_shard(step, fence.generation, &geometry, payload)
            .await
            .expect("put");
        let manifest = Manifest {
            run: Digest::of(b"run"),
            step,
            generation: fence.generation,
            writer: store.writer(),
            block_elements: 64,
            block_count: 2,
            shard_count: 1,
            layout: Digest::of(b"layout"),
            data: Digest::of(b"data"),
            shards: vec![shard],
            decisions,
            trace_head: TraceHead {
                step,
                ..TraceHead::default()
            },
            binary: BinaryId::default(),
            device_type: "cpu".to_owned(),
            lineage: Lineage::default(),
            created_unix_ms: 0,
            rollback_reach_steps: reach_steps,
        };
        store.commit(&fence, &manifest).await.expect("committed");
    }
}

fn flip_a_byte(folder: &Path) {
    let mut shards: Vec<_> = Vec::new();
    let mut folders = vec![folder.join("shards")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path)
            } else {
                shards.push(path)
            }
        }
    }
    shards.sort();
    let newest = shards.last().expect("a shard");
    let mut bytes = std::fs::read(newest).expect("read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(newest, bytes).expect("written");
}

/// CKPT-4 and CKPT-5 as a person meets them.
#[tokio::test]
async fn a_store_is_listed_verified_pinned_and_collected() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fill(folder.path()).await;
    let store = folder.path().to_str().expect("a UTF-8 path");

    let listed = expect(&tarazed(&["checkpoint", "ls", store]), 0);
    let steps: Vec<&str> = listed
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(steps, ["30", "20", "10"], "{listed}");
    assert!(expect(&tarazed(&["checkpoint", "show", store]), 0).starts_with("step 30, generation 1\n"));
    assert!(expect(&tarazed(&["checkpoint", "show", store, "--step", "10"]), 0).contains("shard    0: blocks 0..2"));
    expect(&tarazed(&["checkpoint", "show", store, "--step", "11"]), 2);
    expect(&tarazed(&["checkpoint", "verify", store]), 0);

    expect(
        &tarazed(&["checkpoint", "pin", store, "--step", "10", "--note", "for the paper"]),
        0,
    );
    let refused = expect(&tarazed(&["checkpoint", "gc", store, "--keep-last", "1"]), 2);
    assert!(refused.contains("--claim"), "{refused}");
    let collected = expect(&tarazed(&["checkpoint", "gc", store, "--keep-last", "1", "--claim"]), 0);
    assert!(collected.starts_with("2 checkpoints kept, 1 retired"), "{collected}");
    let listed = expect(&tarazed(&["checkpoint", "ls", store]), 0);
    assert!(
        listed.contains("retired") && listed.contains("for the paper"),
        "{listed}"
    );

    flip_a_byte(folder.path());
    let verified = expect(&tarazed(&["checkpoint", "verify", store]), 3);
    assert!(
        verified.contains("step 30: ") && verified.contains("step 10: whole"),
        "{verified}"
    );
}

/// Step 45 goes on from the state after step 20, as is decided on line 40.
const BACK: &str = r#"[{"id":1,"line":40,"effective":45,"kind":{"rollback":{"to":20,"discarded":[]}},"by":{"controller":"policy"},"reason":"a test"}]"#;

fn decided(step: u64) -> &'static str {
    if step < 40 { "[]" } else { BACK }
}

/// What `--json` says of each step's rollback that left it behind: the step at which that acted, and the state gone back to.
fn left_behind(listed: &str, pointer: &str) -> Vec<(u64, Option<(u64, u64)>)> {
    let listed: serde_json::Value = serde_json::from_str(listed).expect("JSON");
    let checkpoints = listed
        .pointer(pointer)
        .and_then(serde_json::Value::as_array)
        .expect("a list");
    let mark = |checkpoint: &serde_json::Value| {
        let number = |pointer: &str| checkpoint.pointer(pointer).and_then(serde_json::Value::as_u64);
        let by = number("/left_behind_by/at").zip(number("/left_behind_by/to"));
        assert!(checkpoint.get("left_behind_by").is_some(), "{checkpoint}");
        (number("/reference/step").expect("a step"), by)
    };
    checkpoints.iter().map(mark).collect()
}

/// CKPT-5: what a rollback left behind is named once a checkpoint behind it is there, and is what goes first; one that is as old as
/// the run may still go back stays, unless the run has ended.
#[tokio::test]
async fn what_a_rollback_left_behind_is_named_and_collected() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fill_with(folder.path(), &[10, 20, 30, 40, 50], decided, Some(30)).await;
    let store = folder.path().to_str().expect("a UTF-8 path");
    let run = |args: &[&str]| expect(&tarazed(&[&["checkpoint"][..], args].concat()), 0);
    let expected = [
        (50, None),
        (40, Some((45, 20))),
        (30, Some((45, 20))),
        (20, None),
        (10, None),
    ];
    assert_eq!(left_behind(&run(&["ls", store, "--json"]), ""), expected);
    assert_eq!(
        left_behind(&run(&["verify", store, "--json"]), "/checkpoints"),
        expected
    );
    let listed = run(&["ls", store]);
    assert_eq!(listed.matches("abandoned").count(), 2, "{listed}");
    let verified = run(&["verify", store]);
    assert!(
        verified.contains("step 40: whole") && verified.matches("; abandoned: step 46").count() == 2,
        "{verified}"
    );
    let shown = run(&["show", store, "--step", "30"]);
    assert!(
        shown.contains("\nabandoned: step 46 was done from the state after step 20"),
        "{shown}"
    );
    let shown = run(&["show", store]);
    assert!(
        shown.starts_with("step 50, ") && !shown.contains("abandoned"),
        "{shown}"
    );
    assert!(shown.contains("may go back 30 steps"), "{shown}");

    let collected = run(&["gc", store, "--keep-last", "1", "--claim"]);
    assert!(
        collected.contains("as far as step 20") && collected.contains("2 checkpoints kept, 3 retired"),
        "{collected}"
    );
    let collected = run(&["gc", store, "--keep-last", "1", "--ended", "--claim"]);
    assert!(collected.starts_with("1 checkpoints kept, 1 retired"), "{collected}");
}

/// A rollback that is decided and of which no checkpoint knows that it has acted: nothing is abandoned, and what it goes back to
/// stays. Decisions that cannot be read are no reason to delete.
#[tokio::test]
async fn what_a_rollback_to_come_goes_back_to_stays() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fill_with(folder.path(), &[10, 20, 25, 30, 40], decided, None).await;
    let store = folder.path().to_str().expect("a UTF-8 path");
    let run = |args: &[&str], code: i32| expect(&tarazed(&[&["checkpoint"][..], args].concat()), code);
    let listed = run(&["ls", store], 0);
    assert!(!listed.contains("abandoned"), "{listed}");
    let collected = run(&["gc", store, "--keep-last", "1", "--claim"], 0);
    assert!(
        collected.contains("as far as step 20") && collected.contains("3 checkpoints kept, 2 retired"),
        "{collected}"
    );
    let left: Vec<u64> = left_behind(&run(&["verify", store, "--json"], 0), "/checkpoints")
        .into_iter()
        .map(|(step, _)| step)
        .collect();
    assert_eq!(left, [40, 25, 20]);

    let folder = tempfile::tempdir().expect("a temporary folder");
    fill_with(folder.path(), &[10, 20], |_| r#"[{"of":"another version"}]"#, None).await;
    let store = folder.path().to_str().expect("a UTF-8 path");
    let listed = run(&["ls", store], 0);
    assert!(listed.contains("cannot be read"), "{listed}");
    let refused = run(&["gc", store, "--keep-last", "1", "--claim"], 2);
    assert!(refused.contains("cannot be read"), "{refused}");
}

#[test]
fn what_is_no_store_is_refused_and_not_made() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let absent = folder.path().join("absent");
    let refused = expect(
        &tarazed(&["checkpoint", "ls", absent.to_str().expect("a UTF-8 path")]),
        2,
    );
    assert!(refused.contains("absent"), "{refused}");
    assert!(!absent.exists());
}
