//! The chain of records: reading it, judging it, appending to it.
//!
//! - **CKPT-1** A checkpoint exists if and only if its commit record stands. A record *stands* if it can be read in its
//!   place, its readable successor that stands names it by hash, and it was written behind the fence in force. The walk
//!   starts at the head, so a record put later into a place that had been deleted is contradicted by its successor and
//!   does not count. A missing or unreadable record costs itself, is reported on every walk, and does not take the
//!   checkpoints before or after it along: those are proved by their own hashes.
//! - **CKPT-2** Whatever a conditional write answers, the place is read back and compared, writer's nonce and body. In a folder
//!   what reads back need not be on the disk: where the write failed it is synced before anything is built on it.
//! - **CKPT-3** Fences, commits, retirements and pins share one sequence, so each sees all before it or loses its place.
//!
//! Judging is pure ([`Chain::standing`]); the rest is a thin shell around the object store.

use crate::digest::Digest;
use crate::error::StoreError;
use crate::keys;
use crate::limits::{APPEND_ATTEMPTS_MAX, COMMIT_RECORD_BYTES_MAX, RECORD_READS_MAX, SMALL_REQUESTS_IN_FLIGHT_MAX};
use crate::record::{CommitRecord, GENERATION_MAX, RecordKind};
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
    /// Keys of places that no chain has. They hide nothing, so nothing is lost with them.
    pub(crate) strays: Vec<String>,
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

    /// The record of the highest generation.
    fn highest(&self) -> Option<&Standing> {
        self.standing.iter().max_by_key(|standing| standing.record.generation)
    }

    /// A generation above any that wrote, unreadable records counted as one each. No overflow: generations of records end at
    /// [`GENERATION_MAX`], places at [`keys::PLACES_MAX`].
    pub(crate) fn next_generation(&self) -> Generation {
        let highest = self.highest().map_or(0, |standing| standing.record.generation.0);
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
        let stray = "no chain is that long, so it is none of this one's records; move it out of the store";
        let strays = self.strays.iter().map(|key| format!("{key}: {stray}"));
        judgement.problems.extend(strays);
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
        let mut chain = Chain::default();
        let mut places = Vec::new();
        for (key, meta) in self.list_objects(keys::COMMITS).await? {
            match keys::sequence_of(&key) {
                Some(sequence) if sequence < keys::PLACES_MAX => places.push((sequence, meta)),
                Some(_) => chain.strays.push(key),
                None => tracing::warn!(key, location = self.location(), "not a commit record; ignored"),
            }
        }
        places.extend(self.unlisted(&places).await?);
        let links: Vec<(u64, SystemTime, Option<Link>)> = futures::stream::iter(places)
            .map(|(sequence, meta)| async move {
                let link = self.link(sequence, &meta).await?;
                Ok::<_, StoreError>((sequence, meta.last_modified.into(), link))
            })
            .buffer_unordered(SMALL_REQUESTS_IN_FLIGHT_MAX)
            .try_collect()
            .await?;
        for (sequence, modified, link) in links {
            if let Some(link) = link {
                chain.links.insert(sequence, link);
                chain.modified.insert(sequence, modified);
            }
        }
        self.sync_doubtful(&chain).await?;
        Ok(chain)
    }

    /// Places that this process has read or written, that are still there, and that the listing does not show: it is older than what
    /// is known here. Whoever has claimed the store so sees his claim, and all that was before it, whatever listings say.
    async fn unlisted(&self, listed: &[(u64, ObjectMeta)]) -> Result<Vec<(u64, ObjectMeta)>, StoreError> {
        let listed: BTreeSet<u64> = listed.iter().map(|(sequence, _)| *sequence).collect();
        let mut found = Vec::new();
        for sequence in self.known_places() {
            if !listed.contains(&sequence)
                && let Some(meta) = self.meta_of(&keys::record(sequence)).await?
            {
                found.push((sequence, meta));
            }
        }
        Ok(found)
    }

    /// Reads a place that somebody else has taken, whether a listing shows it yet or not.
    async fn learn(&self, sequence: u64) -> Result<(), StoreError> {
        if let Some(meta) = self.meta_of(&keys::record(sequence)).await? {
            self.link(sequence, &meta).await?;
        }
        Ok(())
    }

    /// What a create of ours left that failed, and that reads well by now, goes to the disk before anybody relies on it. A place
    /// that is empty stays in doubt: the write may still be under way.
    async fn sync_doubtful(&self, chain: &Chain) -> Result<(), StoreError> {
        let mut there = self.doubtful().clone();
        there.retain(|sequence| chain.links.contains_key(sequence));
        for sequence in there {
            self.sync(&keys::record(sequence)).await?;
            self.doubtful().remove(&sequence);
        }
        Ok(())
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
            let judgement = chain.judge();
            let (generation, kind) = match decide(&chain, &judgement)? {
                Decision::Write(generation, kind) => (generation, kind),
                Decision::Done(standing) => return Ok(standing),
            };
            let (sequence, previous) = chain.next();
            if sequence >= keys::PLACES_MAX {
                return Err(self.no_number_left(sequence - 1, "it lies in the last place that a chain has"));
            }
            if let Some(highest) = judgement.highest().filter(|_| generation > GENERATION_MAX) {
                return Err(self.no_number_left(highest.record.sequence, "no generation is above its own"));
            }
            let record = CommitRecord::new(sequence, previous, self.writer().nonce, generation, kind);
            let bytes = Bytes::from(record.encode()?);
            let digest = Digest::of(&bytes);
            let key = keys::record(sequence);
            // Also where nobody waits for the answer any more: a write to a folder goes on all the same.
            self.doubtful().insert(sequence);
            let written = match self.put_raw(&key, bytes.clone().into(), PutMode::Create).await {
                Ok(()) => {
                    self.doubtful().remove(&sequence);
                    true
                }
                Err(failure) => self.settle(sequence, &bytes, failure).await?,
            };
            if written {
                self.cache(sequence, CachedLink::written(&record, digest));
                self.refuse_lost_place(sequence, digest).await?;
                return Ok(Standing { record, digest });
            }
            self.learn(sequence).await?;
        }
        Err(StoreError::Retry {
            operation: "append to",
            key: keys::COMMITS.to_string(),
            cause: format!("{APPEND_ATTEMPTS_MAX} places were taken by others, one after the other"),
        })
    }

    /// A record that leaves no number behind its own.
    fn no_number_left(&self, sequence: u64, why: &str) -> StoreError {
        StoreError::Reconfigure {
            location: self.location().to_string(),
            cause: format!("{}: {why}, and no run gets so far", keys::record(sequence)),
            remedy: "something else put it there: move it out of the store".to_string(),
        }
    }

    /// CKPT-2: what became of a conditional write that failed? `true` if the place holds our record for good, `false` if it
    /// holds another's or the store says that a write is under way there.
    async fn settle(&self, sequence: u64, ours: &[u8], failure: Failure) -> Result<bool, StoreError> {
        if Mutant::BlindRetry.is_on() {
            return Ok(true);
        }
        let key = &keys::record(sequence);
        // Also where nothing is there yet: a write to a folder goes on behind its time-out.
        self.doubtful().insert(sequence);
        let conflict = matches!(
            &failure,
            Failure::Store(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })
        );
        match self.get_small(key, COMMIT_RECORD_BYTES_MAX).await {
            Ok(found) => {
                let is_ours = found.as_ref() == ours;
                // A folder shows a name whose own sync failed.
                if is_ours {
                    self.sync(key).await?;
                }
                self.doubtful().remove(&sequence);
                Ok(is_ours)
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Redactor;
    use crate::location::Place;
    use crate::writer::WriterId;
    use object_store::memory::InMemory;
    use object_store::path::Path;
    use std::sync::Arc;

    /// A store whose reads do not say what is on the disk: its objects lie in memory, and it syncs a folder, if it has one.
    fn store(folder: Option<&std::path::Path>) -> CheckpointStore {
        let place = Place {
            objects: Arc::new(InMemory::new()),
            root: Path::default(),
            redactor: Redactor::new("a store"),
            folder: folder.map(Into::into),
        };
        let writer = WriterId {
            nonce: WriterNonce([7; 16]),
            generation: Generation(1),
        };
        CheckpointStore::at(place, writer)
    }

    fn fence(writer: u8) -> Bytes {
        let kind = RecordKind::Fence {};
        let record = CommitRecord::new(0, Digest::default(), WriterNonce([writer; 16]), Generation(1), kind);
        record.encode().unwrap().into()
    }

    /// What a folder says where the name is there and its sync failed.
    fn failed() -> Failure {
        Failure::Store(object_store::Error::Generic {
            store: "test",
            source: std::io::Error::from_raw_os_error(5).into(),
        })
    }

    async fn put(store: &CheckpointStore, bytes: &Bytes) {
        let key = keys::record(0);
        let put = store.put_raw(&key, bytes.clone().into(), PutMode::Create).await;
        assert!(put.is_ok());
    }

    /// CKPT-2: in a folder a record that was not acknowledged counts once it is on the disk, and nothing is built on it before.
    #[tokio::test]
    async fn what_reads_back_from_a_folder_counts_once_it_is_on_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(Some(folder.path()));
        let ours = fence(7);
        put(&store, &ours).await;
        // Nothing is in the folder yet, so it cannot be synced.
        let refused = store.settle(0, &ours, failed()).await;
        let is_asked_again = |error: &StoreError| {
            let says = "make durable commits/00000000000000000000.jsonl";
            matches!(error, StoreError::Retry { .. }) && error.to_string().starts_with(says)
        };
        assert!(refused.is_err_and(|error| is_asked_again(&error)));
        let unread = store.chain().await.map(|chain| chain.head());
        assert!(unread.is_err_and(|error| is_asked_again(&error)));
        let path = folder.path().join(keys::record(0));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, &ours).unwrap();
        assert_eq!(store.chain().await.unwrap().head(), Some(0));
        assert!(store.doubtful().is_empty());
        assert_eq!(store.settle(0, &ours, failed()).await, Ok(true));
        assert!(store.doubtful().is_empty());
    }

    /// The same where the write comes to its end behind the answer: its place is empty first.
    #[tokio::test]
    async fn a_write_that_comes_late_is_synced_too() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(Some(folder.path()));
        let ours = fence(7);
        let silent = store.settle(0, &ours, Failure::TimedOut).await;
        assert!(matches!(
            silent,
            Err(StoreError::Retry {
                operation: "create",
                ..
            })
        ));
        assert_eq!(store.chain().await.unwrap().head(), None);
        put(&store, &ours).await;
        let refused = store.chain().await.map(|chain| chain.head());
        assert!(matches!(
            refused,
            Err(StoreError::Retry {
                operation: "make durable",
                ..
            })
        ));
    }

    /// CKPT-2: a remote store's object is durable once it reads back; another's record is nobody's to sync.
    #[tokio::test]
    async fn a_remote_store_and_a_lost_place_need_no_sync() {
        let remote = store(None);
        put(&remote, &fence(7)).await;
        assert_eq!(remote.settle(0, &fence(7), failed()).await, Ok(true));
        assert_eq!(remote.chain().await.unwrap().head(), Some(0));
        let folder = tempfile::tempdir().unwrap();
        let lost = store(Some(folder.path()));
        put(&lost, &fence(8)).await;
        assert_eq!(lost.settle(0, &fence(7), failed()).await, Ok(false));
        assert_eq!(lost.chain().await.unwrap().head(), Some(0));
    }
}
