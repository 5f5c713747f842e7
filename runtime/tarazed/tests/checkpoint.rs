//! `tarazed checkpoint` as a person runs it: exit codes, and what each command does to a store.

use std::path::Path;
use std::process::{Command, Output};
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
use tarazed_store::{
    BinaryId, CheckpointStore, Digest, Lineage, Manifest, ShardGeometry, ShardSlices, TraceHead, WriterId,
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
    let location = folder.to_str().expect("a UTF-8 path");
    let store = CheckpointStore::open(location, WriterId::fresh(Generation(0)))
        .await
        .expect("opened");
    let fence = store.claim(Generation(1)).await.expect("claimed");
    for step in [10_u64, 20, 30] {
        let geometry = ShardGeometry {
            shard: OptimizerShardIndex(0),
            first_block: 0,
            block_count: 2,
            block_elements: 64,
        };
        let values = vec![step as f32; 128];
        let slices = ShardSlices {
            master: &values,
            exp_avg: &values,
            exp_avg_sq: &values,
        };
        let step = StepsCompleted(step);
        let shard = store
            .put_shard(step, fence.generation, &geometry, slices)
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
            decisions: Vec::new(),
            trace_head: TraceHead {
                step,
                ..TraceHead::default()
            },
            binary: BinaryId::default(),
            device_type: "cpu".to_owned(),
            lineage: Lineage::default(),
            created_unix_ms: 0,
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
