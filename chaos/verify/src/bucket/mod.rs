//! Does every acknowledged checkpoint of a store restore? Reads the bucket and nothing else.
//!
//! - The chain of records is walked and judged (CKPT-1, CKPT-3, CKPT-5).
//! - Every commit that stands and is not retired: its manifest by length and BLAKE3, then its contents; every shard by
//!   presence, length and BLAKE3, then its header, finite numbers, and the hash of every block.
//! - The hash of the whole state, made of those, must be the one that the checkpoint's own trace line names (STEP-4): so
//!   the numbers are those that the run had at that step, and not only bytes that survived.
//!
//! What it does not do: it does not know the config, so it cannot say whether the state is that of the run that somebody
//! means; it writes nothing; and it needs the store to stand still (a checkpoint collected meanwhile reads as missing).

mod archive;
mod chain;
mod manifest;
mod objects;
mod record;
mod shard;
mod state;

use crate::json::{Json, to_hex};
use crate::report::{Findings, Unusable};
use chain::{Acknowledged, Place, Verdict};
use manifest::{MANIFEST_BYTES_MAX, Manifest, NamedCommit};
use objects::Objects;
use record::{RECORD_BYTES_MAX, Record};
use serde_json::json;
use state::StateHash;
use std::collections::{BTreeMap, BTreeSet};

/// A checkpoint in which nothing is wrong.
struct Good {
    sequence: u64,
    step: u64,
    shards: usize,
    bytes: u64,
    pinned: bool,
    /// The state hash; none at step 0, where the trace has no line to compare with.
    state: Option<[u8; 32]>,
    made_by: String,
    reach_steps: Option<u32>,
}

/// What was found in a bucket.
pub struct BucketReport {
    findings: Findings,
    good: Vec<Good>,
    acknowledged: usize,
    retired: u64,
    fences: u64,
    records: usize,
    orphans: Vec<String>,
}

impl BucketReport {
    pub const fn is_clean(&self) -> bool {
        self.findings.count() == 0
    }

    pub fn print(&self) -> String {
        let mut text = String::new();
        for good in &self.good {
            let proof = match good.state {
                Some(state) => format!("state {} as its trace line says", &to_hex(&state)[..16]),
                None => "no trace line to compare the state with".into(),
            };
            let pin = if good.pinned { ", pinned" } else { "" };
            text += &format!(
                "ok  step {} (record {}{pin}): {} shards, {} bytes, {proof}, by {}\n",
                good.step, good.sequence, good.shards, good.bytes, good.made_by
            );
        }
        for orphan in &self.orphans {
            text += &format!("orphan  {orphan}\n");
        }
        text += &self.findings.to_string();
        text + &format!(
            "{} records ({} fences), {} of {} acknowledged checkpoints restore, {} retired, {} orphans, {} findings\n",
            self.records,
            self.fences,
            self.good.len(),
            self.acknowledged,
            self.retired,
            self.orphans.len(),
            self.findings.count()
        )
    }

    pub fn json(&self) -> serde_json::Value {
        let good = self.good.iter().map(|good| {
            json!({
                "sequence": good.sequence, "step": good.step, "shards": good.shards, "bytes": good.bytes,
                "pinned": good.pinned, "state": good.state.map(|state| to_hex(&state)), "made_by": good.made_by,
                "rollback_reach_steps": good.reach_steps,
            })
        });
        json!({
            "ok": self.is_clean(), "records": self.records, "fences": self.fences, "acknowledged": self.acknowledged,
            "retired": self.retired, "restorable": good.collect::<Vec<_>>(), "orphans": self.orphans,
            "finding_count": self.findings.count(), "findings": self.findings.json(),
        })
    }
}

/// Verifies the store at a folder or URL.
pub async fn verify(location: &str) -> Result<BucketReport, Unusable> {
    let objects = Objects::open(location)?;
    let listed = objects.list().await?;
    let places = read_places(&objects, &listed).await?;
    if places.is_empty() {
        return Err(Unusable(format!(
            "{location}: no record under commits/; this is no checkpoint store"
        )));
    }
    let records = places.range(..record::PLACES_MAX).count();
    let mut findings = Findings::default();
    let verdict = chain::judge(places, &mut findings);
    let mut referred: BTreeSet<String> = listed
        .keys()
        .filter(|key| record::place(key).is_some())
        .cloned()
        .collect();
    let mut good = Vec::new();
    for acknowledged in &verdict.acknowledged {
        let mut check = CommitCheck {
            objects: &objects,
            listed: &listed,
            findings: &mut findings,
            referred: &mut referred,
        };
        good.extend(check.run(acknowledged, &verdict).await?);
    }
    Ok(BucketReport {
        findings,
        good,
        acknowledged: verdict.acknowledged.len(),
        retired: verdict.retired_count,
        fences: verdict.fence_count,
        records,
        orphans: listed.into_keys().filter(|key| !referred.contains(key)).collect(),
    })
}

async fn read_places(objects: &Objects, listed: &BTreeMap<String, u64>) -> Result<BTreeMap<u64, Place>, Unusable> {
    let mut places = BTreeMap::new();
    for (key, length) in listed {
        let Some(sequence) = record::place(key) else {
            continue;
        };
        let place = if *length > RECORD_BYTES_MAX {
            Place::Broken(format!("{length} bytes are too many for a record"))
        } else {
            match objects.read_whole(key, *length).await? {
                None => Place::Broken("it was there and is gone".into()),
                Some(bytes) => match Record::decode(sequence, &bytes) {
                    Ok(record) => Place::Whole(record, *blake3::hash(&bytes).as_bytes()),
                    Err(why) => Place::Broken(why),
                },
            }
        };
        places.insert(sequence, place);
    }
    Ok(places)
}

/// Checks one acknowledged checkpoint.
struct CommitCheck<'a> {
    objects: &'a Objects,
    listed: &'a BTreeMap<String, u64>,
    findings: &'a mut Findings,
    referred: &'a mut BTreeSet<String>,
}

impl CommitCheck<'_> {
    async fn run(&mut self, acknowledged: &Acknowledged, verdict: &Verdict) -> Result<Option<Good>, Unusable> {
        let before = self.findings.count();
        let key = &acknowledged.commit.manifest;
        self.referred.insert(key.clone());
        let manifest = match self.manifest(acknowledged).await? {
            Ok(manifest) => manifest,
            Err(why) => {
                self.findings.add(key, why);
                return Ok(None);
            }
        };
        for named in [&manifest.parent, &manifest.restored_from].into_iter().flatten() {
            self.check_named(key, named, acknowledged.sequence, verdict);
        }
        let state = self.shards(&manifest).await?;
        let mut compared = None;
        if let (Some(state), true) = (state, manifest.step > 0) {
            match claimed_state(&manifest) {
                Ok(claimed) if claimed == state => compared = Some(state),
                Ok(claimed) => {
                    let problem = format!(
                        "its shards hold state {}, its trace line says {}",
                        to_hex(&state),
                        to_hex(&claimed)
                    );
                    self.findings.add(key, problem);
                }
                Err(why) => self.findings.add(key, format!("its trace line: {why}")),
            }
        }
        Ok((self.findings.count() == before).then(|| Good {
            sequence: acknowledged.sequence,
            step: manifest.step,
            shards: manifest.shards.len(),
            bytes: manifest.shard_bytes(),
            pinned: acknowledged.pinned,
            state: compared,
            made_by: format!("{} on {}", manifest.binary, manifest.device_type),
            reach_steps: manifest.reach_steps,
        }))
    }

    /// The manifest, if it is the one that the record names and says what the record says.
    async fn manifest(&self, acknowledged: &Acknowledged) -> Result<Result<Manifest, String>, Unusable> {
        let commit = &acknowledged.commit;
        match self.listed.get(&commit.manifest) {
            None => return Ok(Err("missing".into())),
            Some(found) if *found != commit.length || *found > MANIFEST_BYTES_MAX => {
                return Ok(Err(format!("{found} bytes instead of {}", commit.length)));
            }
            Some(_) => {}
        }
        let Some(bytes) = self.objects.read_whole(&commit.manifest, commit.length).await? else {
            return Ok(Err("it was there and is gone".into()));
        };
        if *blake3::hash(&bytes).as_bytes() != commit.blake3 {
            return Ok(Err("its bytes do not have the BLAKE3 in the commit record".into()));
        }
        Ok(Manifest::decode(&bytes).and_then(|manifest| agrees(manifest, acknowledged)))
    }

    /// A commit that a manifest names must be the one in the chain, where that place stands.
    fn check_named(&mut self, key: &str, named: &NamedCommit, own: u64, verdict: &Verdict) {
        let standing = verdict.digests.get(&named.sequence);
        if named.sequence >= own || standing.is_some_and(|digest| *digest != named.record) {
            let problem = format!(
                "it comes from step {} at {}, which is another record",
                named.step,
                record::key(named.sequence)
            );
            self.findings.add(key, problem);
        }
    }

    /// Reads every shard; the hash of the state if all are good.
    async fn shards(&mut self, manifest: &Manifest) -> Result<Option<[u8; 32]>, Unusable> {
        let mut state = Some(StateHash::at(manifest.step));
        for listed in &manifest.shards {
            self.referred.insert(listed.key.clone());
            let checked = match self.listed.get(&listed.key) {
                None => Err("missing".into()),
                Some(found) if *found != listed.length => Err(format!("{found} bytes instead of {}", listed.length)),
                Some(_) => match shard::ShardCheck::new(manifest, listed) {
                    Err(why) => Err(why),
                    Ok(mut check) => {
                        self.objects
                            .read(&listed.key, listed.length, |piece| check.feed(piece))
                            .await?;
                        check.finish()
                    }
                },
            };
            match checked {
                Ok(blocks) => {
                    if let Some(state) = &mut state {
                        blocks.into_iter().for_each(|sums| state.block(sums));
                    }
                }
                Err(why) => {
                    self.findings.add(&listed.key, why);
                    state = None;
                }
            }
        }
        Ok(state.map(|state| state.finish()))
    }
}

fn agrees(manifest: Manifest, acknowledged: &Acknowledged) -> Result<Manifest, String> {
    let commit = &acknowledged.commit;
    let same = manifest.step == commit.step
        && manifest.shards.len() as u64 == commit.shard_count
        && manifest.shard_bytes() == commit.shard_bytes
        && manifest.generation == acknowledged.generation
        && manifest.writer_nonce == acknowledged.writer;
    if !same {
        return Err("its step, shards, generation or writer are not those of its commit record".into());
    }
    if manifest.key(&commit.blake3) != commit.manifest {
        return Err(format!("its key should be {}", manifest.key(&commit.blake3)));
    }
    Ok(manifest)
}

/// The state that the trace line in the manifest names.
fn claimed_state(manifest: &Manifest) -> Result<[u8; 32], String> {
    let line = Json::parse(manifest.last_line.as_bytes())?;
    let step = line.get("step")?.count()?;
    if step != manifest.step {
        return Err(format!("it is of step {step}, the state of step {}", manifest.step));
    }
    line.get("state")?.hex()
}

#[cfg(test)]
mod tests;
