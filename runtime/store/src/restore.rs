//! Finding a checkpoint to restore, listing and verifying them (CKPT-1, CKPT-4).

use crate::chain::{Judgement, Standing};
use crate::digest::Digest;
use crate::error::StoreError;
use crate::keys;
use crate::limits::{BACKOFF_MS, MANIFEST_BYTES_MAX, RECORD_READS_MAX, SMALL_REQUESTS_IN_FLIGHT_MAX};
use crate::manifest::{CommitRef, Manifest, ObjectRecord};
use crate::record::{CommitRecord, RecordKind};
use crate::store::CheckpointStore;
use futures::StreamExt;
use serde::{Serialize, Serializer};
use std::future::Future;
use std::time::Duration;
use tarazed_domain::{Generation, StepsCompleted};

/// Tries of one object that the store does not answer for, before it counts as unread.
const OBJECT_TRIES_MAX: u32 = 4;
/// Objects in a row that the store does not answer for, before it is asked whether it is still there: to try each object of one
/// that is gone would take days.
const UNANSWERED_MAX: u32 = 3;

/// A checkpoint to restore from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Restorable {
    /// Its name: `restored_from` of the lineage to come.
    pub reference: CommitRef,
    /// Its record.
    pub record: CommitRecord,
    /// Where its manifest lies and what its bytes are: enough for another process to read the very same one
    /// ([`CheckpointStore::manifest_at`]).
    pub object: ObjectRecord,
    /// Its manifest, hash checked.
    pub manifest: Manifest,
    /// Newer checkpoints that were passed over, and whatever is wrong with the chain: to be shown, not swallowed.
    pub warnings: Vec<String>,
}

/// How closely to look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Depth {
    /// Manifest by hash, checkpoint shards by presence and length.
    Quick,
    /// Every byte of every checkpoint shard by hash.
    Full,
}

/// Which checkpoints to verify.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Select {
    /// All that are not retired.
    All,
    /// The newest.
    Newest,
    /// Those of one step.
    Step(StepsCompleted),
}

/// Whether a checkpoint can be expected to be there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointState {
    /// Committed, not retired.
    Committed,
    /// Retired by a collection: its objects are gone or going.
    Retired,
}

/// One checkpoint, from its commit record alone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct CheckpointSummary {
    /// Its name.
    pub reference: CommitRef,
    /// The generation that committed it.
    pub generation: Generation,
    /// Checkpoint shards.
    pub shard_count: u32,
    /// Bytes of all checkpoint shards.
    pub shard_bytes: u64,
    /// Wall clock at creation.
    pub created_unix_ms: u64,
    /// Whether it can be expected to be there.
    pub state: CheckpointState,
    /// Why a person keeps it, if one does.
    pub pinned: Option<String>,
}

/// What [`CheckpointStore::verify`] found in one checkpoint.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Verdict {
    /// Its name.
    pub reference: CommitRef,
    /// What is wrong with it; empty if nothing is.
    pub problems: Vec<String>,
    /// Why objects of it could not be read: whether they are good is not known.
    #[serde(serialize_with = "in_words")]
    pub unread: Vec<StoreError>,
    /// A collection retired it while it was verified: what is missing of it has to be, and it has no problems.
    pub retired: bool,
    /// Bytes of checkpoint shards read and hashed.
    pub bytes_hashed: u64,
}

fn in_words<S: Serializer>(errors: &[StoreError], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(errors.iter().map(ToString::to_string))
}

impl Verdict {
    /// Takes down why an object did not pass.
    fn note(&mut self, error: StoreError) {
        if error.is_bad_object() {
            self.problems.push(error.to_string());
        } else {
            self.unread.push(error);
        }
    }
}

/// What [`CheckpointStore::verify`] found.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct VerifyReport {
    /// Records in the chain, of checkpoints or not, readable or not. Without any, no run has used the store, or all is lost.
    pub records: u64,
    /// What is wrong with the chain of records.
    pub chain_problems: Vec<String>,
    /// Newest first.
    pub checkpoints: Vec<Verdict>,
}

impl VerifyReport {
    /// Whether nothing at all is wrong, as far as everything could be read.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let is_clean = |verdict: &Verdict| verdict.problems.is_empty() && verdict.unread.is_empty();
        self.chain_problems.is_empty() && self.checkpoints.iter().all(is_clean)
    }
}

/// The manifest's key, length and digest in a commit record.
pub(crate) const fn manifest_of(record: &CommitRecord) -> Option<(&String, u64, Digest)> {
    match &record.kind {
        RecordKind::Commit {
            manifest,
            length,
            blake3,
            ..
        } => Some((manifest, *length, *blake3)),
        _ => None,
    }
}

/// The manifest's object, as a commit record names it.
fn manifest_object(record: &CommitRecord) -> Result<ObjectRecord, StoreError> {
    let Some((key, length, blake3)) = manifest_of(record) else {
        let why = format!("record {} commits no checkpoint", record.sequence);
        return Err(StoreError::refused(why));
    };
    Ok(ObjectRecord {
        key: key.clone(),
        length,
        blake3,
    })
}

impl Standing {
    pub(crate) fn reference(&self) -> Option<CommitRef> {
        Some(CommitRef {
            sequence: self.record.sequence,
            step: self.record.step()?,
            record: self.digest,
        })
    }
}

impl CheckpointStore {
    /// The newest checkpoint (below a step, if given) whose manifest has its hash and whose checkpoint shards are all
    /// there at their lengths. A bad one is warned of and passed over, never tried twice (CKPT-4). Bytes of shards are
    /// hashed by whoever reads them: if a read fails as [`StoreError::is_bad_object`], ask again below that step.
    ///
    /// `None` means that there is nothing to restore: no checkpoint at all, or none below `below`.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if there are checkpoints and all are bad: starting afresh is then a person's decision.
    pub async fn newest_valid(&self, below: Option<StepsCompleted>) -> Result<Option<Restorable>, StoreError> {
        self.newest(below, Depth::Quick).await
    }

    /// As [`Self::newest_valid`], of a step that is wanted.
    ///
    /// # Errors
    /// As [`Self::newest_valid`].
    pub async fn newest_valid_where(
        &self,
        wanted: impl Fn(StepsCompleted) -> bool,
    ) -> Result<Option<Restorable>, StoreError> {
        self.newest_where(Depth::Quick, wanted).await
    }

    /// As [`Self::newest_valid`], but reads and hashes every byte first.
    ///
    /// # Errors
    /// As [`Self::newest_valid`].
    pub async fn newest_verified(&self, below: Option<StepsCompleted>) -> Result<Option<Restorable>, StoreError> {
        self.newest(below, Depth::Full).await
    }

    /// The newest valid checkpoint of exactly that step.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none; [`StoreError::Corrupt`] if all of that step are bad.
    pub async fn at_step(&self, step: StepsCompleted) -> Result<Restorable, StoreError> {
        let found = self.newest_where(Depth::Quick, |candidate| candidate == step).await?;
        found.ok_or_else(|| self.no_such_step(step))
    }

    async fn newest(&self, below: Option<StepsCompleted>, depth: Depth) -> Result<Option<Restorable>, StoreError> {
        self.newest_where(depth, |step| below.is_none_or(|below| step < below))
            .await
    }

    async fn newest_where(
        &self,
        depth: Depth,
        wanted: impl Fn(StepsCompleted) -> bool,
    ) -> Result<Option<Restorable>, StoreError> {
        let judgement = self.chain().await?.judge();
        let mut warnings = judgement.problems.clone();
        for problem in &warnings {
            tracing::warn!(
                problem,
                location = self.location(),
                "the chain of checkpoints is damaged"
            );
        }
        let mut any_commit = false;
        for standing in judgement.commits() {
            any_commit = true;
            let Some(reference) = standing.reference().filter(|reference| wanted(reference.step)) else {
                continue;
            };
            match self.examine(&standing.record, depth).await {
                Ok((manifest, _)) => {
                    return Ok(Some(Restorable {
                        reference,
                        record: standing.record.clone(),
                        object: manifest_object(&standing.record)?,
                        manifest,
                        warnings,
                    }));
                }
                Err(error) if error.is_bad_object() => {
                    tracing::warn!(step = reference.step.0, %error, "a checkpoint is bad; trying an older one");
                    warnings.push(format!("checkpoint of step {}: {error}", reference.step));
                }
                Err(error) => return Err(error),
            }
        }
        // Damage that may hide a checkpoint must not look like an empty store.
        let hidden = !any_commit && !judgement.lost.is_empty();
        if hidden || warnings.len() > judgement.problems.len() {
            let why = format!("no checkpoint can be used: {}", warnings.join("; "));
            return Err(StoreError::corrupt(keys::COMMITS, why));
        }
        Ok(None)
    }

    /// Reads and checks the manifest, then the shards to the given depth. Returns the bytes hashed, too.
    async fn examine(&self, record: &CommitRecord, depth: Depth) -> Result<(Manifest, u64), StoreError> {
        let manifest = self.manifest(record).await?;
        let mut bytes_hashed = 0;
        match depth {
            Depth::Quick => self.check_objects(&manifest).await?,
            Depth::Full => {
                for shard in &manifest.shards {
                    self.hash_object(&shard.object).await?;
                    bytes_hashed += shard.object.length;
                }
            }
        }
        Ok((manifest, bytes_hashed))
    }

    /// The manifest that a commit record names: length and hash first, then its own header, then its contents.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] or [`StoreError::NotFound`] if it is not as recorded; [`StoreError::Refused`] if the record
    /// commits nothing.
    pub async fn manifest(&self, record: &CommitRecord) -> Result<Manifest, StoreError> {
        let object = manifest_object(record)?;
        let manifest = self.manifest_at(&object).await?;
        if Some(manifest.step) != record.step() {
            let why = "it is of another step than its commit record";
            return Err(StoreError::corrupt(&object.key, why));
        }
        Ok(manifest)
    }

    /// The manifest that lies at a key and is of that length and hash, and no other: for a process that is told which
    /// checkpoint another one verified. Reads no record: whether the checkpoint stands is the teller's knowledge.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] or [`StoreError::NotFound`] if the object is not as given; else by cause.
    pub async fn manifest_at(&self, object: &ObjectRecord) -> Result<Manifest, StoreError> {
        let key = object.key.as_str();
        let mut other: Option<Digest> = None;
        let mut why = String::new();
        for _ in 0..RECORD_READS_MAX {
            let bytes = self.get_small(key, MANIFEST_BYTES_MAX).await?;
            let digest = Digest::of(&bytes);
            why = match bytes.len() as u64 {
                length if length != object.length => format!("{length} bytes instead of {}", object.length),
                _ if digest != object.blake3 => "its contents do not have the hash in the commit record".to_owned(),
                _ => return Manifest::decode(key, &bytes),
            };
            // Damage that lies in the store reads the same each time; what was garbled on its way costs no checkpoint.
            if other.replace(digest) == Some(digest) {
                break;
            }
        }
        Err(StoreError::corrupt(key, why))
    }

    /// The manifest whose bytes have this digest, for a process that is told no more of a checkpoint than that, and its step
    /// perhaps. Reads no record: whether the checkpoint stands is the teller's knowledge.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if no manifest has that digest in its name, [`StoreError::Corrupt`] if the one that has is another;
    /// else by cause.
    pub async fn manifest_named(&self, blake3: Digest, step: Option<StepsCompleted>) -> Result<Manifest, StoreError> {
        let folder = step.map_or_else(|| keys::MANIFESTS.to_string(), keys::manifests_of);
        let listed = self.list_objects(&folder).await?;
        let found = listed.into_iter().find(|(key, _)| keys::is_manifest_of(key, &blake3));
        let Some((key, meta)) = found else {
            return Err(StoreError::NotFound {
                what: format!(
                    "a manifest with the BLAKE3 {blake3} below {folder} in {}",
                    self.location()
                ),
                remedy: "list the checkpoints there are".to_string(),
            });
        };
        let length = meta.size;
        self.manifest_at(&ObjectRecord { key, length, blake3 }).await
    }

    /// The checkpoint whose manifest has this digest: the one name of it that pins every byte, since a manifest has the digest of
    /// each object. None where no checkpoint that stands has it; a retired one does not.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] or [`StoreError::NotFound`] if its manifest or the length of a checkpoint shard is not as recorded;
    /// else by cause.
    pub async fn by_manifest(&self, blake3: Digest) -> Result<Option<Restorable>, StoreError> {
        let judgement = self.chain().await?.judge();
        let is_named = |record: &CommitRecord| manifest_of(record).is_some_and(|(_, _, digest)| digest == blake3);
        let Some(standing) = judgement.commits().find(|standing| is_named(&standing.record)) else {
            return Ok(None);
        };
        let Some(reference) = standing.reference() else {
            return Ok(None);
        };
        let (manifest, _) = self.examine(&standing.record, Depth::Quick).await?;
        Ok(Some(Restorable {
            reference,
            record: standing.record.clone(),
            object: manifest_object(&standing.record)?,
            manifest,
            warnings: judgement.problems.clone(),
        }))
    }

    /// All checkpoints that the chain knows, newest first, retired ones included; reads no manifest.
    ///
    /// # Errors
    /// By cause. Damage in the chain is warned of, and reported by [`Self::verify`].
    pub async fn list(&self) -> Result<Vec<CheckpointSummary>, StoreError> {
        let judgement = self.chain().await?.judge();
        for problem in &judgement.problems {
            tracing::warn!(
                problem,
                location = self.location(),
                "the chain of checkpoints is damaged"
            );
        }
        Ok(judgement
            .standing
            .iter()
            .rev()
            .filter_map(|standing| summary(standing, &judgement))
            .collect())
    }

    /// Checks the chain and the selected checkpoints, and says all that is wrong with them. A run may go on meanwhile: what it
    /// retires is no damage. An object that cannot be read ends nothing: it is in the report, too.
    ///
    /// # Errors
    /// By cause, if the chain cannot be read; [`StoreError::NotFound`] if no checkpoint is of the step asked for.
    pub async fn verify(&self, select: Select, depth: Depth) -> Result<VerifyReport, StoreError> {
        let chain = patiently(|| self.chain()).await?;
        let judgement = chain.judge();
        let mut report = VerifyReport {
            records: chain.links.len() as u64,
            chain_problems: judgement.problems.clone(),
            checkpoints: Vec::new(),
        };
        let selected = judgement.commits().filter(|standing| match select {
            Select::All | Select::Newest => true,
            Select::Step(step) => standing.record.step() == Some(step),
        });
        let limit = if select == Select::Newest { 1 } else { usize::MAX };
        let mut presence = Presence::default();
        for standing in selected.take(limit) {
            let Some(reference) = standing.reference() else {
                continue;
            };
            let mut verdict = Verdict {
                reference,
                problems: Vec::new(),
                unread: Vec::new(),
                retired: false,
                bytes_hashed: 0,
            };
            self.look_at(&standing.record, depth, &mut verdict, &mut presence).await;
            if !verdict.problems.is_empty() {
                self.excuse_retired(&mut verdict).await;
            }
            report.checkpoints.push(verdict);
        }
        match select {
            Select::Step(step) if report.checkpoints.is_empty() => Err(self.no_such_step(step)),
            _ => Ok(report),
        }
    }

    /// Manifest and checkpoint shards of one checkpoint.
    async fn look_at(&self, record: &CommitRecord, depth: Depth, verdict: &mut Verdict, presence: &mut Presence) {
        if self.is_gone(presence).await {
            return verdict.note(not_asked_for(record));
        }
        let manifest = patiently(|| self.manifest(record)).await;
        presence.note(&manifest);
        let manifest = match manifest {
            Ok(manifest) => manifest,
            Err(error) => return verdict.note(error),
        };
        let in_flight = match depth {
            Depth::Quick => SMALL_REQUESTS_IN_FLIGHT_MAX,
            Depth::Full => 1,
        };
        // Owned items: a closure over borrowed ones makes futures that are not `Send` in the compiler's eyes.
        let objects = manifest.shards.into_iter().map(|shard| shard.object);
        let mut looked_at = futures::stream::iter(objects)
            .map(|object| async move {
                match depth {
                    Depth::Quick => patiently(|| self.check_length(&object)).await.map(|()| 0),
                    Depth::Full => patiently(|| self.hash_object(&object)).await.map(|()| object.length),
                }
            })
            .buffered(in_flight);
        while let Some(hashed) = looked_at.next().await {
            presence.note(&hashed);
            match hashed {
                Ok(bytes) => verdict.bytes_hashed += bytes,
                Err(error) => verdict.note(error),
            }
            if self.is_gone(presence).await {
                return verdict.note(not_asked_for(record));
            }
        }
    }

    /// Whether the store itself is gone, and not some of its objects alone.
    async fn is_gone(&self, presence: &mut Presence) -> bool {
        if presence.unanswered >= UNANSWERED_MAX {
            presence.is_gone |= patiently(|| self.chain()).await.is_err();
            presence.unanswered = 0;
        }
        presence.is_gone
    }

    /// What is retired by now may be gone: the run took it out of its store while it was verified.
    async fn excuse_retired(&self, verdict: &mut Verdict) {
        match patiently(|| self.chain()).await {
            Ok(chain) if chain.judge().retired.contains(&verdict.reference.sequence) => {
                verdict.retired = true;
                verdict.problems.clear();
                verdict.unread.clear();
            }
            Ok(_) => {}
            // The problems stay: that nobody knows whether they are any is said beside them.
            Err(error) => verdict.unread.push(error),
        }
    }
}

/// Whether the store still answers, as far as a verification knows.
#[derive(Default)]
struct Presence {
    /// Objects in a row that it did not answer for.
    unanswered: u32,
    is_gone: bool,
}

impl Presence {
    fn note<T>(&mut self, answer: &Result<T, StoreError>) {
        self.unanswered = match answer {
            Err(StoreError::Retry { .. }) => self.unanswered + 1,
            _ => 0,
        };
    }
}

fn not_asked_for(record: &CommitRecord) -> StoreError {
    StoreError::Retry {
        operation: "verify",
        key: keys::record(record.sequence),
        cause: "no more of this checkpoint was asked for, since the store does not answer any more".to_string(),
    }
}

/// Asks again, after a pause, as long as the store does not answer.
async fn patiently<T, F>(ask: impl Fn() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let (mut pause_ms, pause_ms_max) = BACKOFF_MS;
    for _ in 1..OBJECT_TRIES_MAX {
        match ask().await {
            Err(StoreError::Retry { .. }) => {}
            answer => return answer,
        }
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        pause_ms = pause_ms_max.min(pause_ms * 2);
    }
    ask().await
}

fn summary(standing: &Standing, judgement: &Judgement) -> Option<CheckpointSummary> {
    let RecordKind::Commit {
        shard_count,
        shard_bytes,
        created_unix_ms,
        ..
    } = standing.record.kind
    else {
        return None;
    };
    let sequence = standing.record.sequence;
    let state = if judgement.retired.contains(&sequence) {
        CheckpointState::Retired
    } else {
        CheckpointState::Committed
    };
    Some(CheckpointSummary {
        reference: standing.reference()?,
        generation: standing.record.generation,
        shard_count,
        shard_bytes,
        created_unix_ms,
        state,
        pinned: judgement.pinned.get(&sequence).cloned(),
    })
}
