//! Claiming the store and committing checkpoints (CKPT-1, CKPT-2, CKPT-3); pins.

use crate::chain::{Chain, Decision, Judgement, Standing};
use crate::digest::Digest;
use crate::error::StoreError;
use crate::keys;
use crate::limits::{NOTE_BYTES_MAX, SMALL_REQUESTS_IN_FLIGHT_MAX};
use crate::manifest::{CommitRef, Manifest};
use crate::record::{CommitRecord, RecordKind};
use crate::store::CheckpointStore;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tarazed_domain::{Generation, Mutant, StepsCompleted};

/// Proof that this controller claimed the store; good until another claims it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fence {
    /// The generation claimed: above every one that the chain knew.
    pub generation: Generation,
    /// Position of the fence record in the chain.
    pub sequence: u64,
    record: Digest,
}

/// A checkpoint that exists.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Committed {
    /// Its name: the next manifest's parent.
    pub reference: CommitRef,
    /// Its record.
    pub record: CommitRecord,
}

impl Committed {
    fn of(standing: Standing, step: StepsCompleted) -> Self {
        Self {
            reference: CommitRef {
                sequence: standing.record.sequence,
                step,
                record: standing.digest,
            },
            record: standing.record,
        }
    }
}

impl CheckpointStore {
    /// Whether the fence is still in force on the chain as judged (CKPT-3). Where that cannot be known, it is not.
    pub(crate) fn check_fence(&self, fence: &Fence, judgement: &Judgement) -> Result<(), StoreError> {
        if Mutant::FenceIgnored.is_on() {
            return Ok(());
        }
        if let Some(later) = judgement.other_holder_after(fence.sequence, self.writer().nonce) {
            return Err(StoreError::Fenced {
                key: keys::record(later.record.sequence),
                by: later.record.generation.0,
            });
        }
        let why =
            "another controller's claim may have been here; if this is the only controller, claim the store again";
        let after = judgement
            .lost
            .iter()
            .map(|(first, last)| (*first).max(fence.sequence)..=*last);
        if let Some(unknown) = after.flatten().find(|sequence| !self.knows_harmless(*sequence)) {
            return Err(StoreError::corrupt(keys::record(unknown), why));
        }
        let stands = |s: &Standing| s.record.sequence == fence.sequence && s.digest == fence.record;
        if judgement.standing.iter().any(stands) {
            return Ok(());
        }
        Err(StoreError::corrupt(keys::record(fence.sequence), why))
    }

    /// Claims the store: writes an empty fence record for a generation above `at_least` less one, above that of
    /// [`Self::writer`] less one, and above every generation the chain knows. Whoever claimed before can no longer commit
    /// or delete (CKPT-3). Call it before trusting anything else in the store.
    ///
    /// # Errors
    /// [`StoreError::Retry`], [`StoreError::Full`] or [`StoreError::Reconfigure`] by cause.
    pub async fn claim(&self, at_least: Generation) -> Result<Fence, StoreError> {
        self.claim_while(at_least, || true).await
    }

    /// As [`Self::claim`], but only as long as `wanted` says so, which is asked before each try: whoever has been replaced
    /// while it waited for the store must not claim it from its successor.
    ///
    /// # Errors
    /// As [`Self::claim`]; [`StoreError::Refused`] where it is not wanted any more: nothing was written.
    pub async fn claim_while(&self, at_least: Generation, wanted: impl Fn() -> bool) -> Result<Fence, StoreError> {
        let floor = at_least.max(self.writer().generation);
        let claimed = self
            .append(|_, judgement| {
                if !wanted() {
                    return Err(StoreError::refused("whoever claims the store has been replaced"));
                }
                let generation = judgement.next_generation().max(floor);
                Ok(Decision::Write(generation, RecordKind::Fence {}))
            })
            .await?;
        Ok(Fence {
            generation: claimed.record.generation,
            sequence: claimed.record.sequence,
            record: claimed.digest,
        })
    }

    /// Commits a checkpoint whose shards are all uploaded: checks that every object is there at its length, writes the
    /// manifest, then the commit record. Repeating the call with the same manifest is harmless: it commits once.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if another controller claimed the store: stop. [`StoreError::NotFound`] or
    /// [`StoreError::Corrupt`] if a shard's object is not as recorded: upload that shard again.
    /// [`StoreError::Refused`] for a manifest that does not add up. Else [`StoreError::Retry`], [`StoreError::Full`],
    /// [`StoreError::Reconfigure`]: after any of them the checkpoint is either whole or not there (CKPT-1).
    pub async fn commit(&self, fence: &Fence, manifest: &Manifest) -> Result<Committed, StoreError> {
        if manifest.writer.nonce != self.writer().nonce || manifest.generation < fence.generation {
            return Err(StoreError::refused(format!(
                "a manifest of writer {}, generation {}, behind the fence of writer {}, generation {}",
                manifest.writer.nonce,
                manifest.generation,
                self.writer().nonce,
                fence.generation
            )));
        }
        let bytes = Bytes::from(manifest.encode()?);
        let digest = Digest::of(&bytes);
        let kind = commit_kind(manifest, &bytes, digest);
        let decide = |_: &Chain, judgement: &Judgement| {
            self.check_fence(fence, judgement)?;
            let done = judgement
                .standing
                .iter()
                .find(|s| s.record.sequence > fence.sequence && s.record.kind == kind);
            Ok(match done {
                Some(standing) => Decision::Done(standing.clone()),
                None => Decision::Write(manifest.generation, kind.clone()),
            })
        };
        // A fenced controller writes nothing, not even a manifest that nobody would read.
        let chain = self.chain().await?;
        if let Decision::Done(standing) = decide(&chain, &chain.judge())? {
            return Ok(Committed::of(standing, manifest.step));
        }
        self.check_objects(manifest).await?;
        self.put(
            &keys::manifest(manifest.step, manifest.generation, &digest),
            bytes.into(),
        )
        .await?;
        let standing = self.append(decide).await?;
        Ok(Committed::of(standing, manifest.step))
    }

    /// Whether every checkpoint shard is there at its length. Its hash was taken while it went up, and is checked by
    /// whoever reads it.
    pub(crate) async fn check_objects(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let bad = self.bad_objects(manifest).await?;
        bad.into_iter().next().map_or(Ok(()), Err)
    }

    /// What is wrong with each checkpoint shard that is not there at its length, in the manifest's order. An error only
    /// if the store did not answer.
    pub(crate) async fn bad_objects(&self, manifest: &Manifest) -> Result<Vec<StoreError>, StoreError> {
        // Owned items: a closure over borrowed ones makes futures that are not `Send` in the compiler's eyes.
        let objects: Vec<(String, u64)> = manifest
            .shards
            .iter()
            .map(|record| (record.object.key.clone(), record.object.length))
            .collect();
        let looked_up: Vec<Option<StoreError>> = futures::stream::iter(objects)
            .map(|(key, length)| async move {
                Ok::<_, StoreError>(match self.length_of(&key).await? {
                    Some(found) if found == length => None,
                    Some(found) => Some(StoreError::corrupt(&key, format!("{found} bytes instead of {length}"))),
                    None => Some(StoreError::NotFound {
                        what: format!("{key} in {}", self.location()),
                        remedy: "use an older checkpoint and find out what removed the object".to_string(),
                    }),
                })
            })
            .buffered(SMALL_REQUESTS_IN_FLIGHT_MAX)
            .try_collect()
            .await?;
        Ok(looked_up.into_iter().flatten().collect())
    }

    /// Keeps the newest checkpoint of `step` from every collection until it is unpinned (CKPT-5). Needs no claim: a
    /// running controller goes on undisturbed.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such checkpoint; else by cause.
    pub async fn pin(&self, step: StepsCompleted, note: &str) -> Result<CommitRef, StoreError> {
        if note.len() > NOTE_BYTES_MAX {
            return Err(StoreError::refused(format!(
                "a note of more than {NOTE_BYTES_MAX} bytes"
            )));
        }
        self.mark(step, |sequence| RecordKind::Pin {
            sequence,
            note: note.to_string(),
        })
        .await
    }

    /// Lifts a pin. Lifting one that is not there changes nothing.
    ///
    /// # Errors
    /// As [`Self::pin`].
    pub async fn unpin(&self, step: StepsCompleted) -> Result<CommitRef, StoreError> {
        self.mark(step, |sequence| RecordKind::Unpin { sequence }).await
    }

    async fn mark(&self, step: StepsCompleted, kind: impl Fn(u64) -> RecordKind) -> Result<CommitRef, StoreError> {
        let find = |judgement: &Judgement| -> Result<CommitRef, StoreError> {
            let found = judgement
                .commits()
                .find(|standing| standing.record.step() == Some(step));
            let standing = found.ok_or_else(|| self.no_such_step(step))?;
            Ok(CommitRef {
                sequence: standing.record.sequence,
                step,
                record: standing.digest,
            })
        };
        self.append(|_, judgement| {
            let target = find(judgement)?;
            let wanted = kind(target.sequence);
            let newest = |s: &&Standing| match &s.record.kind {
                RecordKind::Pin { sequence, .. } | RecordKind::Unpin { sequence } => *sequence == target.sequence,
                _ => false,
            };
            if let Some(same) = judgement
                .standing
                .iter()
                .rev()
                .find(newest)
                .filter(|s| s.record.kind == wanted)
            {
                return Ok(Decision::Done(same.clone()));
            }
            let generation = judgement
                .standing
                .iter()
                .map(|s| s.record.generation)
                .max()
                .unwrap_or_default();
            Ok(Decision::Write(generation, wanted))
        })
        .await?;
        find(&self.chain().await?.judge())
    }

    pub(crate) fn no_such_step(&self, step: StepsCompleted) -> StoreError {
        StoreError::NotFound {
            what: format!("a checkpoint of step {step} in {}", self.location()),
            remedy: "list the checkpoints there are".to_string(),
        }
    }
}

fn commit_kind(manifest: &Manifest, bytes: &Bytes, digest: Digest) -> RecordKind {
    RecordKind::Commit {
        manifest: keys::manifest(manifest.step, manifest.generation, &digest),
        length: bytes.len() as u64,
        blake3: digest,
        step: manifest.step,
        shard_count: manifest.shard_count,
        shard_bytes: manifest.shard_bytes(),
        created_unix_ms: manifest.created_unix_ms,
    }
}
