//! Finding a checkpoint to restore, listing and verifying them (CKPT-1, CKPT-4).

use crate::chain::{Judgement, Standing};
use crate::digest::Digest;
use crate::error::StoreError;
use crate::keys;
use crate::limits::MANIFEST_BYTES_MAX;
use crate::manifest::{CommitRef, Manifest, ObjectRecord};
use crate::record::{CommitRecord, RecordKind};
use crate::store::CheckpointStore;
use serde::Serialize;
use tarazed_domain::{Generation, StepsCompleted};

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
    /// Bytes of checkpoint shards read and hashed.
    pub bytes_hashed: u64,
}

/// What [`CheckpointStore::verify`] found.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct VerifyReport {
    /// What is wrong with the chain of records.
    pub chain_problems: Vec<String>,
    /// Newest first.
    pub checkpoints: Vec<Verdict>,
}

impl VerifyReport {
    /// Whether nothing at all is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.chain_problems.is_empty() && self.checkpoints.iter().all(|verdict| verdict.problems.is_empty())
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
        let bytes = self.get_small(key, MANIFEST_BYTES_MAX).await?;
        if bytes.len() as u64 != object.length {
            let why = format!("{} bytes instead of {}", bytes.len(), object.length);
            return Err(StoreError::corrupt(key, why));
        }
        if Digest::of(&bytes) != object.blake3 {
            let why = "its contents do not have the hash in the commit record";
            return Err(StoreError::corrupt(key, why));
        }
        Manifest::decode(key, &bytes)
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

    /// Checks the chain and the selected checkpoints, and says all that is wrong with them.
    ///
    /// # Errors
    /// By cause, if the store cannot be read; [`StoreError::NotFound`] if nothing is selected. What is damaged is in the
    /// report, not an error.
    pub async fn verify(&self, select: Select, depth: Depth) -> Result<VerifyReport, StoreError> {
        let judgement = self.chain().await?.judge();
        let mut report = VerifyReport {
            chain_problems: judgement.problems.clone(),
            checkpoints: Vec::new(),
        };
        let selected = judgement.commits().filter(|standing| match select {
            Select::All | Select::Newest => true,
            Select::Step(step) => standing.record.step() == Some(step),
        });
        let limit = if select == Select::Newest { 1 } else { usize::MAX };
        for standing in selected.take(limit) {
            let Some(reference) = standing.reference() else {
                continue;
            };
            report
                .checkpoints
                .push(self.verdict(reference, &standing.record, depth).await?);
        }
        match select {
            Select::Step(step) if report.checkpoints.is_empty() => Err(self.no_such_step(step)),
            _ => Ok(report),
        }
    }

    async fn verdict(&self, reference: CommitRef, record: &CommitRecord, depth: Depth) -> Result<Verdict, StoreError> {
        let mut verdict = Verdict {
            reference,
            problems: Vec::new(),
            bytes_hashed: 0,
        };
        let mut note = |result: Result<(), StoreError>| match result {
            Err(error) if error.is_bad_object() => {
                verdict.problems.push(error.to_string());
                Ok(false)
            }
            other => other.map(|()| true),
        };
        let manifest = match self.manifest(record).await {
            Ok(manifest) => manifest,
            Err(error) => {
                note(Err(error))?;
                return Ok(verdict);
            }
        };
        match depth {
            Depth::Quick => {
                for error in self.bad_objects(&manifest).await? {
                    note(Err(error))?;
                }
            }
            Depth::Full => {
                let mut bytes_hashed = 0;
                for shard in &manifest.shards {
                    if note(self.hash_object(&shard.object).await)? {
                        bytes_hashed += shard.object.length;
                    }
                }
                verdict.bytes_hashed = bytes_hashed;
            }
        }
        Ok(verdict)
    }
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
