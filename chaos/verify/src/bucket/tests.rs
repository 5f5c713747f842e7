//! Whole stores made by hand: sound ones pass, and lies behind right digests are found.

use super::manifest::ListedShard;
use super::manifest::tests::{handmade as manifest, seal};
use super::record::tests::handmade as record;
use super::state::{BlockSeeds, BlockSums, StateHash};
use super::*;

const BLOCK_ELEMENTS: u64 = 4;

/// Values of tensor `array`, element `at` of the whole space.
fn value(array: usize, at: u64) -> f32 {
    (array as u64 * 100 + at) as f32 / 8.0
}

/// The hash of three blocks by the definition.
fn state(step: u64) -> [u8; 32] {
    let mut state = StateHash::at(step);
    for block in 0..3_u32 {
        let mut sums = BlockSums::default();
        for array in 0..3 {
            for pair in 0..2 {
                let at = u64::from(block) * BLOCK_ELEMENTS + u64::from(pair) * 2;
                let words = [0, 1].map(|lane| value(array, at + lane).to_bits());
                sums.add(BlockSeeds::of(block), array, pair, words);
            }
        }
        state.block(sums);
    }
    state.finish()
}

fn shard_file(shard: u32, first_block: u64, block_count: u64) -> Vec<u8> {
    let elements = block_count * BLOCK_ELEMENTS;
    let mut header = format!(
        r#"{{"__metadata__":{{"format":"tarazed-optimizer-shard-1","step":"20","generation":"3","shard":"{shard}","first_block":"{first_block}","block_count":"{block_count}","block_elements":"{BLOCK_ELEMENTS}"}}"#
    );
    for (index, name) in (0..).zip(["master", "exp_avg", "exp_avg_sq"]) {
        let (from, to) = (index * elements * 4, (index + 1) * elements * 4);
        header += &format!(r#","{name}":{{"dtype":"F32","shape":[{elements}],"data_offsets":[{from},{to}]}}"#);
    }
    header.push('}');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    for array in 0..3 {
        let range = first_block * BLOCK_ELEMENTS..(first_block + block_count) * BLOCK_ELEMENTS;
        bytes.extend(range.flat_map(|at| value(array, at).to_le_bytes()));
    }
    bytes
}

/// A store of one checkpoint at step 20, of two shards.
struct Store {
    folder: tempfile::TempDir,
    shards: Vec<ListedShard>,
}

impl Store {
    fn new() -> Self {
        let mut store = Self {
            folder: tempfile::tempdir().unwrap(),
            shards: Vec::new(),
        };
        for (shard, first_block, block_count) in [(0, 0, 2), (1, 2, 1)] {
            let bytes = shard_file(shard, first_block, block_count);
            let key = format!("shards/{:020}/{:020}-x-{shard:06}-000000.safetensors", 20, 3);
            store.put(&key, &bytes);
            store.shards.push(ListedShard {
                shard,
                first_block: first_block as u32,
                block_count: block_count as u32,
                key,
                length: bytes.len() as u64,
                blake3: *blake3::hash(&bytes).as_bytes(),
            });
        }
        store.commit(&line(20, &state(20)), |_| {}, |record| record);
        store
    }

    fn put(&self, key: &str, bytes: &[u8]) {
        let path = self.folder.path().join(key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// Writes a chain of a fence and a commit whose digests are all right, whatever was changed before.
    fn commit(&self, line: &str, archive: impl FnOnce(&mut [u8]), kind: impl FnOnce(String) -> String) {
        for part in ["manifests", "commits"] {
            let _absent_at_first = std::fs::remove_dir_all(self.folder.path().join(part));
        }
        let mut bytes = manifest(&self.shards, BLOCK_ELEMENTS, 3, line);
        archive(&mut bytes[56..]);
        let bytes = seal(&bytes[56..]);
        let digest = blake3::hash(&bytes).to_hex();
        let key = format!("manifests/{:020}/{:020}-{digest}.manifest", 20, 3);
        self.put(&key, &bytes);
        let shard_bytes: u64 = self.shards.iter().map(|shard| shard.length).sum();
        let fence = record(0, [0; 32], 7, 1, r#"{"fence":{}}"#);
        let commit = format!(
            r#"{{"commit":{{"manifest":"{key}","length":{},"blake3":"{digest}","step":20,"shard_count":2,"shard_bytes":{shard_bytes},"created_unix_ms":1}}}}"#,
            bytes.len()
        );
        let commit = record(1, *blake3::hash(&fence).as_bytes(), 7, 3, &kind(commit));
        self.put("commits/00000000000000000000.jsonl", &fence);
        self.put("commits/00000000000000000001.jsonl", &commit);
    }

    /// Replaces a shard's bytes, and names them rightly in manifest and record.
    fn forge(&mut self, shard: usize, change: impl FnOnce(&mut [u8])) {
        let path = self.folder.path().join(&self.shards[shard].key);
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        self.shards[shard].blake3 = *blake3::hash(&bytes).as_bytes();
        self.commit(&line(20, &state(20)), |_| {}, |kind| kind);
    }

    fn report(&self) -> BucketReport {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(verify(self.folder.path().to_str().unwrap())).unwrap()
    }

    #[track_caller]
    fn says(&self, part: &str) {
        let report = self.report();
        let said = report.print();
        assert!(!report.is_clean() && said.contains(part), "{said}");
        assert!(said.contains("0 of 1 acknowledged checkpoints restore"), "{said}");
    }
}

fn line(step: u64, state: &[u8; 32]) -> String {
    format!(r#"{{"step":{step},"state":"{}"}}"#, to_hex(state))
}

#[test]
fn a_sound_store_restores() {
    let report = Store::new().report();
    assert!(report.is_clean(), "{}", report.print());
    assert_eq!((report.good.len(), report.good[0].state), (1, Some(state(20))));
    assert!(report.orphans.is_empty());
}

/// An object that no run wrote, in the highest place that a key can name, costs nothing but its own finding.
#[test]
fn a_stray_record_is_reported_and_the_rest_is_verified() {
    let store = Store::new();
    let stray = "commits/18446744073709551615.jsonl";
    store.put(stray, b"anything");
    let report = store.report();
    let said = report.print();
    assert!(said.contains(&format!("BAD {stray}: no chain is that long")), "{said}");
    let summary = "2 records (1 fences), 1 of 1 acknowledged checkpoints restore, 0 retired, 0 orphans, 1 findings\n";
    assert!(said.ends_with(summary), "{said}");
}

/// STEP-4: one changed bit of the state, with every digest made anew, is told by the trace line alone.
#[test]
fn a_forged_state_is_found() {
    let mut store = Store::new();
    store.forge(1, |bytes| *bytes.last_mut().unwrap() ^= 1);
    store.says("its shards hold state");
    let store = Store::new();
    store.commit(&line(20, &[9; 32]), |_| {}, |kind| kind);
    store.says("its trace line says 0909");
    store.commit(&line(21, &state(20)), |_| {}, |kind| kind);
    store.says("it is of step 21, the state of step 20");
    store.commit("no line at all", |_| {}, |kind| kind);
    store.says("its trace line: not JSON");
}

#[test]
fn a_forged_shard_or_record_is_found() {
    let mut store = Store::new();
    store.forge(0, |bytes| {
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    store.says("of exp_avg_sq is NaN");
    let mut store = Store::new();
    store.forge(0, |bytes| bytes[20] ^= 1);
    store.says("safetensors: ");
    let store = Store::new();
    let good = || line(20, &state(20));
    store.commit(
        &good(),
        |_| {},
        |kind| kind.replace("\"shard_count\":2", "\"shard_count\":3"),
    );
    store.says("are not those of its commit record");
    store.commit(&good(), |_| {}, |kind| kind.replace("\"step\":20", "\"step\":21"));
    store.says("are not those of its commit record");
    // A parent that lies in the future.
    let root = |archive: &mut [u8]| archive.len() - 384;
    let parent = |archive: &mut [u8]| {
        let at = root(archive) + 256;
        archive[at] = 1;
        archive[at + 8] = 5;
    };
    store.commit(&good(), parent, |kind| kind);
    store.says("which is another record");
    // A parent that is another record than the one of its place.
    let other = |archive: &mut [u8]| archive[archive.len() - 384 + 256] = 1;
    store.commit(&good(), other, |kind| kind);
    store.says("which is another record");
    let generation = |archive: &mut [u8]| archive[archive.len() - 384 + 40] = 4;
    store.commit(&good(), generation, |kind| kind);
    store.says("are not those of its commit record");
}

#[test]
fn a_manifest_under_another_key_is_found() {
    let store = Store::new();
    let elsewhere = "manifests/elsewhere";
    let found = walk(store.folder.path())
        .into_iter()
        .find(|path| path.to_str().unwrap().ends_with(".manifest"))
        .unwrap();
    std::fs::copy(&found, store.folder.path().join(elsewhere)).unwrap();
    let text = std::fs::read_to_string(store.folder.path().join("commits/00000000000000000001.jsonl")).unwrap();
    let kind = text
        .lines()
        .next()
        .unwrap()
        .split_once("\"kind\":")
        .unwrap()
        .1
        .strip_suffix('}')
        .unwrap();
    let from = kind.find("manifests/").unwrap();
    let to = kind.find(".manifest").unwrap() + ".manifest".len();
    let kind = format!("{}{elsewhere}{}", &kind[..from], &kind[to..]);
    let fence = std::fs::read(store.folder.path().join("commits/00000000000000000000.jsonl")).unwrap();
    store.put(
        "commits/00000000000000000001.jsonl",
        &record(1, *blake3::hash(&fence).as_bytes(), 7, 3, &kind),
    );
    store.says("its key should be manifests/");
}

fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.path().is_dir() {
            found.extend(walk(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}
