//! Which records of the chain count, and which checkpoints follow from them.
//!
//! A record *stands* if it reads back in its place, the standing record behind it names it by digest, and it was written by
//! the holder of the fence before it. A bad or missing record costs itself: it is a finding, and what is proved by its own
//! digests stands beside it. An object with a number that no chain reaches is a finding, and hides nothing.

use super::record::{Commit, Kind, PLACES_MAX, Record, key};
use crate::report::Findings;
use std::collections::{BTreeMap, BTreeSet};

/// What was read in one place.
pub enum Place {
    Whole(Record, [u8; 32]),
    Broken(String),
}

/// A checkpoint that was committed and must restore.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Acknowledged {
    pub sequence: u64,
    pub writer: [u8; 16],
    pub generation: u64,
    pub commit: Commit,
    pub pinned: bool,
}

#[derive(Default, Debug)]
pub struct Verdict {
    /// Commits that stand and are not retired, oldest first.
    pub acknowledged: Vec<Acknowledged>,
    /// Digest of every record that stands.
    pub digests: BTreeMap<u64, [u8; 32]>,
    pub retired_count: u64,
    pub fence_count: u64,
}

pub fn judge(mut places: BTreeMap<u64, Place>, findings: &mut Findings) -> Verdict {
    for stray in places.split_off(&PLACES_MAX).into_keys() {
        findings.add(key(stray), "no chain is that long, so it is none of this one's records");
    }
    let linked = drop_contradicted(&mut places, findings);
    let mut verdict = Verdict::default();
    let mut fence: Option<Fence> = None;
    let (mut retired, mut pinned) = (BTreeSet::new(), BTreeSet::new());
    let mut commits: BTreeMap<u64, Acknowledged> = BTreeMap::new();
    let mut next = 0;
    for (sequence, (record, digest)) in linked {
        if sequence != next {
            // A fence may have stood in between.
            fence = None;
        }
        next = sequence + 1;
        if fence.as_ref().is_some_and(|fence| !fence.admits(&record, findings)) {
            continue;
        }
        verdict.digests.insert(sequence, digest);
        match record.kind {
            Kind::Fence => {
                verdict.fence_count += 1;
                fence = Some(Fence {
                    sequence,
                    holder: record.writer,
                    generation: record.generation,
                });
            }
            Kind::Commit(commit) => {
                let acknowledged = Acknowledged {
                    sequence,
                    writer: record.writer,
                    generation: record.generation,
                    commit,
                    pinned: false,
                };
                commits.insert(sequence, acknowledged);
            }
            Kind::Retire(sequences) => {
                for target in sequences {
                    if pinned.contains(&target) {
                        findings.add(
                            key(sequence),
                            format!("retires the checkpoint of {}, which is pinned", key(target)),
                        );
                    }
                    retired.insert(target);
                }
            }
            Kind::Pin(target) => {
                pinned.insert(target);
            }
            Kind::Unpin(target) => {
                pinned.remove(&target);
            }
        }
    }
    verdict.retired_count = commits.keys().filter(|sequence| retired.contains(sequence)).count() as u64;
    commits.retain(|sequence, _| !retired.contains(sequence));
    verdict.acknowledged = commits.into_values().collect();
    for acknowledged in &mut verdict.acknowledged {
        acknowledged.pinned = pinned.contains(&acknowledged.sequence);
    }
    verdict
}

/// The newest fence before a record.
struct Fence {
    sequence: u64,
    holder: [u8; 16],
    generation: u64,
}

impl Fence {
    /// Whether a record behind it counts; one that does may still be wrong.
    fn admits(&self, record: &Record, findings: &mut Findings) -> bool {
        let needs_fence = matches!(record.kind, Kind::Commit(_) | Kind::Retire(_));
        if needs_fence && record.writer != self.holder {
            let fence = key(self.sequence);
            let problem =
                format!("written behind the fence {fence} by a writer that does not hold it; it does not count");
            findings.add(key(record.sequence), problem);
            return false;
        }
        if record.generation < self.generation {
            let (own, fence) = (record.generation, self.generation);
            let problem = format!("of generation {own}, behind the fence of generation {fence}");
            findings.add(key(record.sequence), problem);
        }
        true
    }
}

/// From the newest down: what is missing, broken, or not the record that the one behind it names, is a finding.
fn drop_contradicted(places: &mut BTreeMap<u64, Place>, findings: &mut Findings) -> BTreeMap<u64, (Record, [u8; 32])> {
    let mut linked = BTreeMap::new();
    // What the standing record right behind says of the next place down.
    let mut named: Option<(u64, [u8; 32])> = None;
    let mut above = places.keys().next_back().map_or(0, |newest| newest + 1);
    while let Some((sequence, place)) = places.pop_last() {
        missing(sequence + 1, above, findings);
        above = sequence;
        let expected = named.take().filter(|(successor, _)| *successor == sequence + 1);
        match place {
            Place::Broken(why) => findings.add(key(sequence), why),
            Place::Whole(_, digest) if expected.is_some_and(|(_, named)| named != digest) => {
                findings.add(key(sequence), "not the record that the one behind it names");
            }
            Place::Whole(record, _) if sequence == 0 && record.previous != [0; 32] => {
                findings.add(key(sequence), "the first record names a predecessor");
            }
            Place::Whole(record, digest) => {
                named = Some((sequence, record.previous));
                linked.insert(sequence, (record, digest));
            }
        }
    }
    missing(0, above, findings);
    linked
}

fn missing(first: u64, end: u64, findings: &mut Findings) {
    if first + 1 == end {
        findings.add(key(first), "missing");
    } else if first < end {
        findings.add(key(first), format!("missing, and all up to {}", key(end - 1)));
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::handmade;
    use super::*;

    /// A chain of (writer, generation, kind), each record naming the one before.
    fn chain(records: &[(u8, u64, &str)]) -> Vec<Vec<u8>> {
        let mut previous = [0; 32];
        let mut all = Vec::new();
        for (sequence, (writer, generation, kind)) in records.iter().enumerate() {
            let bytes = handmade(sequence as u64, previous, *writer, *generation, kind);
            previous = *blake3::hash(&bytes).as_bytes();
            all.push(bytes);
        }
        all
    }

    fn commit(step: u64) -> String {
        let digest = "00".repeat(32);
        format!(
            r#"{{"commit":{{"manifest":"m","length":1,"blake3":"{digest}","step":{step},"shard_count":1,"shard_bytes":1,"created_unix_ms":1}}}}"#
        )
    }

    fn placed(chain: &[Vec<u8>], skip: Option<usize>) -> BTreeMap<u64, Place> {
        let kept = chain.iter().enumerate().filter(|(at, _)| Some(*at) != skip);
        kept.map(|(sequence, bytes)| {
            let place = match Record::decode(sequence as u64, bytes) {
                Ok(record) => Place::Whole(record, *blake3::hash(bytes).as_bytes()),
                Err(why) => Place::Broken(why),
            };
            (sequence as u64, place)
        })
        .collect()
    }

    fn judged_places(places: BTreeMap<u64, Place>) -> (Vec<u64>, String) {
        let mut findings = Findings::default();
        let verdict = judge(places, &mut findings);
        (
            verdict.acknowledged.iter().map(|a| a.commit.step).collect(),
            findings.to_string(),
        )
    }

    fn judged(chain: &[Vec<u8>], skip: Option<usize>) -> (Vec<u64>, String) {
        judged_places(placed(chain, skip))
    }

    const FENCE: &str = r#"{"fence":{}}"#;

    #[test]
    fn a_whole_chain_has_no_finding() {
        let (a, b, c) = (commit(10), commit(20), commit(30));
        let retire = r#"{"retire":{"sequences":[1]}}"#;
        let whole = chain(&[
            (1, 1, FENCE),
            (1, 1, &a),
            (1, 2, &b),
            (1, 1, retire),
            (2, 3, FENCE),
            (2, 3, &c),
        ]);
        assert_eq!(judged(&whole, None), (vec![20, 30], String::new()));
    }

    #[test]
    fn a_lost_or_damaged_record_costs_itself_and_is_named() {
        let (a, b) = (commit(10), commit(20));
        let whole = chain(&[(1, 1, FENCE), (1, 1, &a), (1, 1, &b)]);
        let (steps, said) = judged(&whole, Some(1));
        assert_eq!(steps, [20]);
        assert!(said.contains("commits/00000000000000000001.jsonl: missing"), "{said}");
        let mut damaged = whole.clone();
        damaged[1][30] ^= 1;
        let (steps, said) = judged(&damaged, None);
        assert_eq!(steps, [20]);
        assert!(said.contains("commits/00000000000000000001.jsonl: "), "{said}");
        // A whole record put into the place of another.
        let mut replaced = whole;
        replaced[1] = handmade(1, [5; 32], 1, 1, &commit(11));
        let (steps, said) = judged(&replaced, None);
        assert_eq!(steps, [20]);
        assert!(said.contains("not the record that the one behind it names"), "{said}");
    }

    /// Anybody may put an object there: it is named, no place below it is missed, and the chain is judged without it.
    #[test]
    fn an_object_where_no_chain_reaches_is_named_and_hides_nothing() {
        let a = commit(10);
        for stray in [PLACES_MAX, u64::MAX - 1, u64::MAX] {
            let whole = handmade(stray, [1; 32], 1, 1, &commit(30));
            let record = Record::decode(stray, &whole).expect("a record by its own digests");
            let digest = *blake3::hash(&whole).as_bytes();
            for odd in [
                Place::Whole(record, digest),
                Place::Broken("it is not two lines".into()),
            ] {
                let mut places = placed(&chain(&[(1, 1, FENCE), (1, 1, &a)]), None);
                places.insert(stray, odd);
                let (steps, said) = judged_places(places);
                assert_eq!(steps, [10]);
                assert_eq!(
                    said,
                    format!(
                        "BAD {}: no chain is that long, so it is none of this one's records\n",
                        key(stray)
                    )
                );
            }
        }
    }

    #[test]
    fn a_fenced_writer_commits_and_retires_nothing() {
        let (a, b) = (commit(10), commit(20));
        let whole = chain(&[
            (1, 1, FENCE),
            (1, 1, &a),
            (2, 2, FENCE),
            (1, 2, &b),
            (1, 2, r#"{"retire":{"sequences":[1]}}"#),
        ]);
        let (steps, said) = judged(&whole, None);
        assert_eq!(steps, [10]);
        assert_eq!(said.matches("does not hold it").count(), 2, "{said}");
        let stale = chain(&[(1, 5, FENCE), (1, 4, &a)]);
        assert!(
            judged(&stale, None)
                .1
                .contains("of generation 4, behind the fence of generation 5")
        );
        assert!(
            judged(&[handmade(0, [1; 32], 1, 1, FENCE)], None)
                .1
                .contains("names a predecessor")
        );
    }

    #[test]
    fn a_pinned_checkpoint_is_not_retired() {
        let pin = r#"{"pin":{"sequence":1,"note":"kept"}}"#;
        let retire = r#"{"retire":{"sequences":[1]}}"#;
        let a = commit(10);
        let whole = chain(&[(1, 1, FENCE), (1, 1, &a), (9, 1, pin), (1, 1, retire)]);
        let (steps, said) = judged(&whole, None);
        assert!(steps.is_empty());
        assert!(said.contains("which is pinned"), "{said}");
        let lifted = chain(&[
            (1, 1, FENCE),
            (1, 1, &a),
            (9, 1, pin),
            (9, 1, r#"{"unpin":{"sequence":1}}"#),
            (1, 1, retire),
        ]);
        assert_eq!(judged(&lifted, None).1, "");
    }
}
