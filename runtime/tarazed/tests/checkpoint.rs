//! `tarazed checkpoint` as a person runs it: exit codes, and what each command does to a store.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};
use tarazed::exit::Exit;
use tarazed::source::unread;
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
use tarazed_store::{
    BinaryId, CheckpointStore, Digest, Lineage, Manifest, Retention, ShardGeometry, ShardPayload, StoreError,
    TraceHead, WriterId,
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

/// Three checkpoints of two shards of one block each.
async fn fill(folder: &Path) {
    fill_with(folder, &[10, 20, 30], |_| "", None).await;
}

/// Checkpoints of these steps, of two shards of one block each, with the decisions up to each.
async fn fill_with(folder: &Path, steps: &[u64], decisions: impl Fn(u64) -> &'static str, reach_steps: Option<u32>) {
    let location = folder.to_str().expect("a UTF-8 path");
    let store = CheckpointStore::open(location, WriterId::fresh(Generation(0)))
        .await
        .expect("opened");
    let fence = store.claim(Generation(1)).await.expect("claimed");
    for &step in steps {
        let decisions = decisions(step).as_bytes().to_vec();
        let value = step as f32;
        let step = StepsCompleted(step);
        let mut shards = Vec::new();
        for block in 0..2 {
            let geometry = ShardGeometry {
                shard: OptimizerShardIndex(block),
                first_block: block,
                block_count: 1,
                block_elements: 64,
            };
            let payload = ShardPayload::new([0, 1, 2].map(|_| vec![value; 64]));
            let put = store.put_shard(step, fence.generation, &geometry, payload);
            shards.push(put.await.expect("put"));
        }
        let manifest = Manifest {
            run: Digest::of(b"run"),
            step,
            generation: fence.generation,
            writer: store.writer(),
            block_elements: 64,
            block_count: 2,
            shard_count: 2,
            layout: Digest::of(b"layout"),
            data: Digest::of(b"data"),
            shards,
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

/// CKPT-5: what is gone because its checkpoint was retired while it was read is no damage, and what is gone otherwise is.
#[tokio::test]
async fn what_is_retired_while_it_is_read_may_be_tried_again() {
    let folder = tempfile::tempdir().expect("a folder");
    fill(folder.path()).await;
    let location = folder.path().to_str().expect("a UTF-8 path");
    let store = CheckpointStore::open(location, WriterId::fresh(Generation(0)))
        .await
        .expect("opened");
    let listed = store.list().await.expect("a list");
    let fence = store.claim(Generation(2)).await.expect("claimed");
    store.gc(&fence, Retention::last(1)).await.expect("collected");
    for checkpoint in listed {
        let gone = StoreError::NotFound {
            what: "a shard".to_owned(),
            remedy: "use another checkpoint".to_owned(),
        };
        let failure = unread(&store, &checkpoint.reference, gone).await;
        let expected = match checkpoint.reference.step.0 {
            30 => Exit::Refused,
            _ => Exit::Transient,
        };
        assert_eq!(failure.exit, expected, "{}", failure.message);
    }
}

/// Keys of the objects of one kind, in order.
fn keys(folder: &Path, kind: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut folders = vec![folder.join(kind)];
    while let Some(below) = folders.pop() {
        for entry in std::fs::read_dir(below).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path)
            } else {
                let key = path.strip_prefix(folder).expect("a path below the store's");
                keys.push(key.to_str().expect("a UTF-8 path").to_owned())
            }
        }
    }
    keys.sort();
    keys
}

fn flip_a_byte(folder: &Path, key: &str) {
    let path = folder.join(key);
    let mut bytes = std::fs::read(&path).expect("read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(path, bytes).expect("written");
}

/// What a command with `--json` prints; what it has to say beside that is on the error output.
#[track_caller]
fn document(args: &[&str], code: i32) -> Value {
    let output = tarazed(args);
    let said = expect(&output, code);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
}

/// The problems that `verify --json` has of each checkpoint, by its step.
fn problems(listed: &Value) -> BTreeMap<u64, String> {
    let checkpoints = listed["checkpoints"].as_array().expect("a list");
    let of = |checkpoint: &Value| {
        let step = checkpoint["reference"]["step"].as_u64().expect("a step");
        (step, checkpoint["problems"].to_string())
    };
    checkpoints.iter().map(of).collect()
}

/// The lines of a table, by the step with which they begin.
fn lines(table: &str) -> BTreeMap<u64, String> {
    let of = |line: &str| {
        let (step, rest) = line.strip_prefix("step ")?.split_once(':')?;
        Some((step.parse().ok()?, rest.to_owned()))
    };
    table.lines().filter_map(of).collect()
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
    assert!(expect(&tarazed(&["checkpoint", "show", store, "--step", "10"]), 0).contains("shard    1: blocks 1..2"));
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

    flip_a_byte(folder.path(), keys(folder.path(), "shards").last().expect("a shard"));
    let verified = expect(&tarazed(&["checkpoint", "verify", store]), 3);
    assert!(
        verified.contains("step 30: ") && verified.contains("step 10: whole"),
        "{verified}"
    );
}

/// CKPT-4: what is damaged is named by its key, shard or manifest, in the line of its checkpoint and in no other.
#[tokio::test]
async fn a_damaged_object_is_named_by_its_key() {
    for (kind, step) in [("shards", 20), ("manifests", 20), ("shards", 30), ("manifests", 10)] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fill(folder.path()).await;
        let store = folder.path().to_str().expect("a UTF-8 path");
        let prefix = format!("{kind}/{step:020}/");
        let all = keys(folder.path(), kind);
        let key = all.iter().find(|key| key.starts_with(&prefix)).expect("an object");
        flip_a_byte(folder.path(), key);
        // Of the length alone nothing is seen; a manifest is always read.
        let quick = if kind == "shards" { 0 } else { 3 };
        for (depth, code) in [(None, 3), (Some("--quick"), quick)] {
            let args: Vec<&str> = ["checkpoint", "verify", store].into_iter().chain(depth).collect();
            let table = expect(&tarazed(&args), code);
            let listed = document(&[&args[..], &["--json"]].concat(), code);
            for found in [lines(&table), problems(&listed)] {
                assert_eq!(found.len(), 3, "{table}");
                for (at, said) in found {
                    assert_eq!(said.contains(key), at == step && code == 3, "{key}: {at}: {said}");
                    let named = ["shards/", "manifests/"].iter().any(|kind| said.contains(kind));
                    assert_eq!(named, at == step && code == 3, "{at}: {said}");
                }
            }
        }
    }
}

/// `--quick` names each object that is bad, not the first alone.
#[tokio::test]
async fn all_bad_objects_of_a_checkpoint_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fill(folder.path()).await;
    let store = folder.path().to_str().expect("a UTF-8 path");
    let mut shards = keys(folder.path(), "shards");
    shards.retain(|key| key.starts_with("shards/00000000000000000020/"));
    assert_eq!(shards.len(), 2, "{shards:?}");
    std::fs::remove_file(folder.path().join(&shards[0])).expect("removed");
    std::fs::write(folder.path().join(&shards[1]), b"short").expect("written");
    for depth in [&[][..], &["--quick"]] {
        let table = expect(&tarazed(&[&["checkpoint", "verify", store][..], depth].concat()), 3);
        let lines = lines(&table);
        assert!(shards.iter().all(|key| lines[&20].contains(key)), "{table}");
        assert!(lines[&30].contains("whole") && lines[&10].contains("whole"), "{table}");
    }
}

/// An object that cannot be read is no bad one, hides no bad one, and ends nothing: the others are verified and told. In the place
/// of its bytes lies a link to itself, which the system does not open.
#[tokio::test]
async fn what_cannot_be_read_is_told_apart_and_ends_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fill(folder.path()).await;
    let store = folder.path().to_str().expect("a UTF-8 path");
    let all = keys(folder.path(), "shards");
    let closed: Vec<&String> = all
        .iter()
        .filter(|key| !key.contains("/00000000000000000010/"))
        .collect();
    assert_eq!(closed.len(), 4, "{all:?}");
    for key in &closed {
        let path = folder.path().join(key);
        std::fs::remove_file(&path).expect("removed");
        std::os::unix::fs::symlink(&path, &path).expect("linked");
    }
    for (depth, bad) in [(&["--quick"][..], false), (&[], false), (&[], true)] {
        if bad {
            let key = all.iter().find(|key| !closed.contains(key)).expect("a shard");
            flip_a_byte(folder.path(), key);
        }
        let code = if bad { 3 } else { 33 };
        let args = [&["checkpoint", "verify", store][..], depth].concat();
        let table = expect(&tarazed(&args), code);
        let listed = document(&[&args[..], &["--json"]].concat(), code);
        let (lines, problems) = (lines(&table), problems(&listed));
        assert_eq!(lines[&10].contains("whole"), !bad, "{table}");
        for (at, step) in [30, 20].into_iter().enumerate() {
            let unread = listed["checkpoints"][at]["unread"].to_string();
            let named = closed.iter().filter(|key| key.contains(&format!("/{step:020}/")));
            for key in named {
                assert!(lines[&step].contains(&format!("not read: look up {key}: ")), "{table}");
                assert!(unread.contains(key.as_str()), "{listed}");
            }
            assert_eq!(problems[&step], "[]", "{listed}");
        }
        let whole = &listed["checkpoints"][2];
        assert_eq!(
            (&whole["unread"], &whole["retired"]),
            (&serde_json::json!([]), &Value::from(false))
        );
        assert_eq!(problems[&10] == "[]", !bad, "{listed}");
    }
}

/// Where there is no checkpoint, nobody can say that all are good, or collect any: refused, with what is there instead, and no
/// claim is written that would halt a run.
#[tokio::test]
async fn without_a_checkpoint_nothing_is_verified_or_collected() {
    let (empty, claimed) = (tempfile::tempdir(), tempfile::tempdir());
    let (empty, claimed) = (empty.expect("a temporary folder"), claimed.expect("a temporary folder"));
    fill_with(claimed.path(), &[], |_| "", None).await;
    assert_eq!(keys(claimed.path(), "commits").len(), 1, "the claim");
    for (folder, says) in [
        (&empty, "holds no record of any checkpoint; check the path"),
        (&claimed, "no checkpoint is committed yet"),
    ] {
        let store = folder.path().to_str().expect("a UTF-8 path");
        for args in [
            &["verify", store][..],
            &["verify", store, "--quick", "--json"],
            &["gc", store, "--keep-last", "1", "--claim"],
        ] {
            let output = tarazed(&[&["checkpoint"][..], args].concat());
            let refused = expect(&output, 2);
            assert!(refused.contains(says) && refused.contains(store), "{refused}");
            assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{args:?}");
        }
    }
    assert_eq!(keys(claimed.path(), "commits").len(), 1, "nobody claimed it");
    assert!(!empty.path().join("commits").exists(), "nor the empty one");
}

#[tokio::test]
async fn show_in_json_has_all_that_a_manifest_says() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fill_with(folder.path(), &[10, 20, 30, 40, 50], decided, Some(30)).await;
    let store = folder.path().to_str().expect("a UTF-8 path");
    let show = |args: &[&str]| document(&[&["checkpoint", "show", store, "--json"][..], args].concat(), 0);
    let newest = show(&[]);
    assert_eq!(newest["reference"]["step"], 50, "{newest}");
    assert_eq!(newest["generation"], 1, "{newest}");
    assert_eq!(newest["left_behind_by"], Value::Null, "{newest}");
    assert_eq!(newest["rollback_reach_steps"], 30, "{newest}");
    assert_eq!(newest["run"], Digest::of(b"run").to_string(), "{newest}");
    assert_eq!(newest["new_lineage"], Value::Null, "{newest}");
    assert_eq!(newest["warnings"], serde_json::json!([]), "{newest}");
    let older = show(&["--step", "40"]);
    assert_eq!(
        older["left_behind_by"],
        serde_json::json!({"at": 45, "to": 20}),
        "{older}"
    );
    let named: Vec<&str> = older["shards"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|shard| shard["object"]["key"].as_str())
        .collect();
    let mut there = keys(folder.path(), "shards");
    there.retain(|key| key.starts_with("shards/00000000000000000040/"));
    assert_eq!(named, there, "{older}");
    let manifest = older["manifest"]["key"].as_str().expect("a key");
    assert!(folder.path().join(manifest).is_file(), "{older}");
}

#[tokio::test]
async fn pin_in_json_names_the_checkpoint_and_the_reason() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fill(folder.path()).await;
    let store = folder.path().to_str().expect("a UTF-8 path");
    let pin = ["checkpoint", "pin", store, "--step", "20", "--note", "mine", "--json"];
    let pinned = document(&pin, 0);
    let listed = document(&["checkpoint", "ls", store, "--json"], 0);
    assert_eq!(pinned["reference"], listed[1]["reference"], "{pinned}");
    assert_eq!(
        (&pinned["reference"]["step"], &pinned["pinned"], &listed[1]["pinned"]),
        (&Value::from(20), &Value::from("mine"), &Value::from("mine")),
        "{pinned}"
    );
}

#[tokio::test]
async fn unpin_in_json_names_the_checkpoint() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fill(folder.path()).await;
    let store = folder.path().to_str().expect("a UTF-8 path");
    expect(&tarazed(&["checkpoint", "pin", store, "--step", "20"]), 0);
    let unpin = ["checkpoint", "unpin", store, "--step", "20", "--json"];
    let released = document(&unpin, 0);
    let listed = document(&["checkpoint", "ls", store, "--json"], 0);
    assert_eq!(released["reference"], listed[1]["reference"], "{released}");
    assert_eq!(
        (released.get("pinned"), listed[1].get("pinned")),
        (Some(&Value::Null), Some(&Value::Null)),
        "{released}"
    );
}

#[tokio::test]
async fn gc_in_json_says_what_is_kept_and_what_went() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fill_with(folder.path(), &[10, 20, 30, 40, 50], decided, Some(30)).await;
    let store = folder.path().to_str().expect("a UTF-8 path");
    let gc = |args: &[&str]| {
        let asked = ["checkpoint", "gc", store, "--keep-last", "1", "--claim", "--json"];
        document(&[&asked[..], args].concat(), 0)
    };
    let steps = |report: &Value, name: &str| -> Vec<u64> {
        let listed = report[name].as_array().expect("a list").iter();
        listed.filter_map(|reference| reference["step"].as_u64()).collect()
    };
    let report = gc(&[]);
    assert_eq!(report["back_to"], 20, "{report}");
    assert_eq!(
        (steps(&report, "kept"), steps(&report, "retired")),
        (vec![50, 20], vec![40, 30, 10]),
        "{report}"
    );
    assert_eq!(report["deleted_objects"], 9, "three manifests, six shards: {report}");
    assert!(report["deleted_bytes"].as_u64() > Some(0), "{report}");
    let report = gc(&["--ended"]);
    assert_eq!(report.get("back_to"), Some(&Value::Null), "{report}");
    assert_eq!(
        (steps(&report, "kept"), steps(&report, "retired")),
        (vec![50], vec![20]),
        "{report}"
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
    let before = keys(folder.path(), "commits");
    let refused = run(&["gc", store, "--keep-last", "1", "--claim"], 2);
    assert!(refused.contains("cannot be read"), "{refused}");
    // CKPT-3: a claim would have halted a run that still writes there.
    assert_eq!(keys(folder.path(), "commits"), before);
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
