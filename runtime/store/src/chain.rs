//! The chain of records: reading it, judging it, appending to it.
//!
//! - **CKPT-1** A checkpoint exists if and only if its commit record stands. A record *stands* if it can be read in its
//!   place, its readable successor that stands names it by hash, and it was written behind the fence in force. The walk
//!   starts at the head, so a record put later into a place that had been deleted is contradicted by its successor and
//!   does not count. A missing or unreadable record costs itself, is reported on every walk, and does not take the
//!   checkpoints before or after it along: those are proved by their own hashes.
//! - **CKPT-2** Whatever a conditional write answers, the place is read back and compared, writer's nonce and body.
//! - **CKPT-3** Fences, commits, retirements and pins share one sequence, so each sees all before it or loses its place.
//!
//! Judging is pure ([`Chain::standing`]); the rest is a thin shell around the object store.

use crate::digest::Digest;
use crate::error::StoreError;
use crate::keys;
use crate::limits::{APPEND_ATTEMPTS_MAX, COMMIT_RECORD_BYTES_MAX, RECORD_READS_MAX, SMALL_REQUESTS_IN_FLIGHT_MAX};
use crate::record::{CommitRecord, RecordKind};
use crate::store::{CheckpointStore, Failure};
use crate::writer::WriterNonce;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectMeta, PutMode};
use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;
use tarazed_domain::{Generation, Mutant};

/// What lies in one place of the chain.
#[derive(Clone, Debug)]
pub(crate) enum Link {
    Record { record: CommitRecord, digest: Digest },
    Unreadable { why: String, digest: Digest },
}

impl Link {
    const fn digest(&self) -> Digest {
        match self {
            Self::Record { digest, .. } | Self::Unreadable { digest, .. } => *digest,
        }
    }
}

/// A link and the listing under which it was read.
#[derive(Clone)]
pub(crate) struct CachedLink {
    link: Link,
    size: u64,
    e_tag: Option<String>,
    modified: SystemTime,
    /// What stood here when it was first read well; kept even if the place is damaged later.
    pub(crate) first_read: Option<CommitRecord>,
}

impl CachedLink {
    /// A record of our own, not read yet: no listing looks like this one's.
    fn written(record: &CommitRecord, digest: Digest) -> Self {
        Self {
            link: Link::Record {
                record: record.clone(),
                digest,
            },
            size: 0,
            e_tag: None,
            modified: SystemTime::UNIX_EPOCH,
            first_read: Some(record.clone()),
        }
    }

    fn is_of(&self, meta: &ObjectMeta) -> bool {
        self.size == meta.size && self.e_tag == meta.e_tag && self.modified == SystemTime::from(meta.last_modified)
    }
}

/// All places of the chain that hold something.
#[derive(Default)]
pub(crate) struct Chain {
    pub(crate) links: BTreeMap<u64, Link>,
    /// When the store says each record was written: compared only with other times of the same store.
    pub(crate) modified: BTreeMap<u64, SystemTime>,
}

/// A record that stands, and its name.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    pub(crate) record: CommitRecord,
    pub(crate) digest: Digest,
}

/// What the chain says, all told.
#[derive(Default, Debug)]
pub(crate) struct Judgement {
    /// The records that stand, oldest first.
    pub(crate) standing: Vec<Standing>,
    /// Commits that may be deleted.
    pub(crate) retired: BTreeSet<u64>,
    /// Commits that a person keeps, with the reason.
    pub(crate) pinned: BTreeMap<u64, String>,
    /// What is wrong with the chain, in words.
    pub(crate) problems: Vec<String>,
    /// Places, from first to last, whose contents are unknown or do not count.
    pub(crate) lost: Vec<(u64, u64)>,
}

impl Judgement {
    /// Commits that stand and are not retired, newest first.
    pub(crate) fn commits(&self) -> impl Iterator<Item = &Standing> {
        let retired = &self.retired;
        self.standing
            .iter()
            .rev()
            .filter(move |standing| standing.record.step().is_some() && !retired.contains(&standing.record.sequence))
    }

    /// A generation above any that wrote, unreadable records counted as one each.
    pub(crate) fn next_generation(&self) -> Generation {
        let highest = self
            .standing
            .iter()
            .map(|standing| standing.record.generation.0)
            .max()
            .unwrap_or(0);
        let lost: u64 = self.lost.iter().map(|(first, last)| last - first + 1).sum();
        Generation(highest + 1 + lost)
    }

    /// The last place that is lost.
    pub(crate) fn last_lost_place(&self) -> Option<u64> {
        self.lost.iter().map(|(_, last)| *last).max()
    }

    /// The contents of places `first` to `last` are unknown, or do not count.
    fn lose(&mut self, first: u64, last: u64, problem: String) {
        self.lost.push((first, last));
        self.problems.push(problem);
    }

    /// The first record after `sequence` that only another holder of the store can have written.
    pub(crate) fn other_holder_after(&self, sequence: u64, holder: WriterNonce) -> Option<&Standing> {
        let after = self.standing.iter().filter(|s| s.record.sequence > sequence);
        after.into_iter().find(|s| match s.record.kind {
            RecordKind::Fence {} => true,
            RecordKind::Commit { .. } | RecordKind::Retire { .. } => s.record.writer != holder,
            RecordKind::Pin { .. } | RecordKind::Unpin { .. } => false,
        })
    }
}

impl Chain {
    /// The last place in use.
    pub(crate) fn head(&self) -> Option<u64> {
        self.links.keys().next_back().copied()
    }

    fn next(&self) -> (u64, Digest) {
        self.links
            .last_key_value()
            .map_or((0, Digest::default()), |(sequence, link)| (sequence + 1, link.digest()))
    }

    /// Which records stand, and what follows from them.
    pub(crate) fn judge(&self) -> Judgement {
        let mut judgement = Judgement::default();
        let mut standing = self.linked(&mut judgement);
        standing.reverse();
        let mut fence: Option<WriterNonce> = None;
        let mut expected = 0;
        for candidate in standing {
            let record = &candidate.record;
            if record.sequence != expected {
                // What was lost in between may have been a fence.
                fence = None;
            }
            expected = record.sequence + 1;
            let behind_fence = fence.is_none_or(|nonce| nonce == record.writer);
            match &record.kind {
                RecordKind::Fence {} => fence = Some(record.writer),
                RecordKind::Commit { .. } | RecordKind::Retire { .. } if !behind_fence => {
                    let problem = "written by a controller that was fenced; it does not count";
                    let sequence = record.sequence;
                    judgement.lose(sequence, sequence, format!("{}: {problem}", keys::record(sequence)));
                    continue;
                }
                RecordKind::Commit { .. } => {}
                RecordKind::Retire { sequences } => judgement.retired.extend(sequences),
                RecordKind::Pin { sequence, note } => {
                    judgement.pinned.insert(*sequence, note.clone());
                }
                RecordKind::Unpin { sequence } => {
                    judgement.pinned.remove(sequence);
                }
            }
            judgement.standing.push(candidate);
        }
        judgement
    }

    /// From the head down: the records not contradicted by a successor that is itself linked. Newest first.
    fn linked(&self, judgement: &mut Judgement) -> Vec<Standing> {
        let mut linked = Vec::new();
        let mut above: Option<(u64, Digest)> = None;
        let mut missing_above = self.head().map_or(0, |head| head + 1);
        for (&sequence, link) in self.links.iter().rev() {
            if sequence + 1 < missing_above {
                let (first, last) = (sequence + 1, missing_above - 1);
                judgement.lose(first, last, missing(first, last));
            }
            missing_above = sequence;
            let key = keys::record(sequence);
            let named = above
                .filter(|(successor, _)| *successor == sequence + 1)
                .map(|(_, digest)| digest);
            match link {
                Link::Unreadable { why, .. } => judgement.lose(sequence, sequence, format!("{key}: {why}")),
                Link::Record { digest, .. } if named.is_some_and(|named| named != *digest) => {
                    let problem = "it is not the record that its successor names";
                    judgement.lose(sequence, sequence, format!("{key}: {problem}"));
                }
                Link::Record { record, digest } => {
                    above = Some((sequence, record.previous));
                    linked.push(Standing {
                        record: record.clone(),
                        digest: *digest,
                    });
                }
            }
        }
        if missing_above > 0 {
            judgement.lose(0, missing_above - 1, missing(0, missing_above - 1));
        }
        linked
    }
}

fn missing(first: u64, last: u64) -> String {
    if first == last {
        format!("{}: missing", keys::record(first))
    } else {
        format!("{} to {}: missing", keys::record(first), keys::record(last))
    }
}

/// What an append should do, decided on the chain as it is.
pub(crate) enum Decision {
    /// Write this record.
    Write(Generation, RecordKind),
    /// It is written already: an earlier attempt got through (CKPT-2).
    Done(Standing),
}

impl CheckpointStore {
    /// Whether this process knows that a place, lost now, held nothing by which another took over the store.
    pub(crate) fn knows_harmless(&self, sequence: u64) -> bool {
        let record = self.cached(sequence).and_then(|cached| cached.first_read);
        record.is_some_and(|record| match record.kind {
            RecordKind::Fence {} => false,
            RecordKind::Commit { .. } | RecordKind::Retire { .. } => record.writer == self.writer().nonce,
            RecordKind::Pin { .. } | RecordKind::Unpin { .. } => true,
        })
    }

    /// Reads the chain. Records read before and listed unchanged are not read again.
    pub(crate) async fn chain(&self) -> Result<Chain, StoreError> {
        let listed = self.list_objects(keys::COMMITS).await?;
        let places = listed.into_iter().filter_map(|(key, meta)| {
            let sequence = keys::sequence_of(&key);
            if sequence.is_none() {
                tracing::warn!(key, location = self.location(), "not a commit record; ignored");
            }
            Some((sequence?, meta))
        });
        let links: Vec<(u64, SystemTime, Option<Link>)> = futures::stream::iter(places)
            .map(|(sequence, meta)| async move {
                let link = self.link(sequence, &meta).await?;
                Ok::<_, StoreError>((sequence, meta.last_modified.into(), link))
            })
            .buffer_unordered(SMALL_REQUESTS_IN_FLIGHT_MAX)
            .try_collect()
            .await?;
        let mut chain = Chain::default();
        for (sequence, modified, link) in links {
            if let Some(link) = link {
                chain.links.insert(sequence, link);
                chain.modified.insert(sequence, modified);
            }
        }
        Ok(chain)
    }

    async fn link(&self, sequence: u64, meta: &ObjectMeta) -> Result<Option<Link>, StoreError> {
        let before = self.cached(sequence);
        if let Some(cached) = before.as_ref().filter(|cached| cached.is_of(meta)) {
            return Ok(Some(cached.link.clone()));
        }
        let Some(link) = self.read_link(sequence).await? else {
            return Ok(None);
        };
        let read_now = match &link {
            Link::Record { record, .. } => Some(record.clone()),
            Link::Unreadable { .. } => None,
        };
        let cached = CachedLink {
            first_read: before.and_then(|cached| cached.first_read).or(read_now),
            link: link.clone(),
            size: meta.size,
            e_tag: meta.e_tag.clone(),
            modified: meta.last_modified.into(),
        };
        self.cache(sequence, cached);
        Ok(Some(link))
    }

    /// What lies in a place. Bytes that are no record are read again: an error on their way, believed once, would be named
    /// by the successor and cost the record for good. Nothing where it is gone.
    async fn read_link(&self, sequence: u64) -> Result<Option<Link>, StoreError> {
        let mut unreadable = None;
        for _ in 0..RECORD_READS_MAX {
            let (why, digest) = match self.get_small(&keys::record(sequence), COMMIT_RECORD_BYTES_MAX).await {
                Ok(bytes) => {
                    let digest = Digest::of(&bytes);
                    match CommitRecord::decode(sequence, &bytes) {
                        Ok(record) => return Ok(Some(Link::Record { record, digest })),
                        Err(why) => (why, digest),
                    }
                }
                // Listed, then gone: judged as missing.
                Err(StoreError::NotFound { .. }) => return Ok(None),
                Err(StoreError::Corrupt { why, .. }) => (why, Digest::default()),
                Err(error) => return Err(error),
            };
            // Damage that lies in the store reads the same each time.
            if unreadable.replace((why.clone(), digest)) == Some((why, digest)) {
                break;
            }
        }
        Ok(unreadable.map(|(why, digest)| Link::Unreadable { why, digest }))
    }

    /// Appends one record. `decide` sees the chain as it is at each attempt and may refuse.
    pub(crate) async fn append(
        &self,
        decide: impl Fn(&Chain, &Judgement) -> Result<Decision, StoreError>,
    ) -> Result<Standing, StoreError> {
        for _ in 0..APPEND_ATTEMPTS_MAX {
            let chain = self.chain().await?;
            let (generation, kind) = match decide(&chain, &chain.judge())? {
                Decision::Write(generation, kind) => (generation, kind),
                Decision::Done(standing) => return Ok(standing),
            };
            let (sequence, previous) = chain.next();
            let record = CommitRecord::new(sequence, previous, self.writer().nonce, generation, kind);
            let bytes = Bytes::from(record.encode()?);
            let digest = Digest::of(&bytes);
            let key = keys::record(sequence);
            let written = match self.put_raw(&key, bytes.clone().into(), PutMode::Create).await {
                Ok(()) => true,
                Err(failure) => self.settle(&key, &bytes, failure).await?,
            };
            if written {
                self.cache(sequence, CachedLink::written(&record, digest));
                self.refuse_lost_place(sequence, digest).await?;
                return Ok(Standing { record, digest });
            }
        }
        Err(StoreError::Retry {
            operation: "append to",
            key: keys::COMMITS.to_string(),
            cause: format!("{APPEND_ATTEMPTS_MAX} places were taken by others, one after the other"),
        })
    }

    /// CKPT-2: what became of a conditional write that failed? `true` if the place holds our record, `false` if it holds
    /// another's or the store says that a write is under way there.
    async fn settle(&self, key: &str, ours: &[u8], failure: Failure) -> Result<bool, StoreError> {
        if Mutant::BlindRetry.is_on() {
            return Ok(true);
        }
        let conflict = matches!(
            &failure,
            Failure::Store(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })
        );
        match self.get_small(key, COMMIT_RECORD_BYTES_MAX).await {
            Ok(found) => Ok(found.as_ref() == ours),
            Err(StoreError::Corrupt { .. }) => Ok(false),
            Err(StoreError::NotFound { .. }) if conflict => Ok(false),
            Err(StoreError::NotFound { .. }) => Err(self.sort("create", key, failure)),
            // Unknown still: the caller's next attempt writes the same bytes to the same place, or finds them.
            Err(error) => Err(error),
        }
    }

    /// A place deleted by somebody can be won again by a controller that slept; its successor gives that away.
    async fn refuse_lost_place(&self, sequence: u64, digest: Digest) -> Result<(), StoreError> {
        let key = keys::record(sequence + 1);
        let successor = match self.get_small(&key, COMMIT_RECORD_BYTES_MAX).await {
            Ok(bytes) => CommitRecord::decode(sequence + 1, &bytes),
            Err(StoreError::NotFound { .. }) => return Ok(()),
            Err(StoreError::Corrupt { why, .. }) => Err(why),
            Err(error) => return Err(error),
        };
        match successor {
            Ok(record) if record.previous != digest => Err(StoreError::Fenced {
                key,
                by: record.generation.0,
            }),
            _ => Ok(()),
        }
    }
}
