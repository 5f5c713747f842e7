//! Collecting old checkpoints and what failed uploads left behind (CKPT-5).
//!
//! Collection first *retires*: a record in the chain names the commits to go, behind the caller's fence, so a fenced
//! controller deletes nothing and nobody trusts a checkpoint that is half gone (CKPT-3). Then their objects are deleted,
//! manifests last, so that an interrupted collection is finished by the next.
//!
//! An object that no commit names may be an upload under way. It is collected only if it can no longer be committed: its
//! step is not above that of the newest commit behind this fence, and it was written before that commit (times are the
//! store's own, compared with each other only; steps are committed in order within a generation).
//!
//! A run that was rolled back has checkpoints of states that it does not go on from. They count for nothing in what is kept.
//!
//! Where places of the chain are lost, a pin or a commit may be hidden there: what is older than the damage is kept.

use crate::Fence;
use crate::chain::{Chain, Decision, Judgement, Standing};
use crate::error::StoreError;
use crate::keys;
use crate::limits::{MANIFESTS_IN_FLIGHT_MAX, RETIRED_PER_RECORD_MAX, SELF_TEST_MS_MAX};
use crate::manifest::{CommitRef, Manifest};
use crate::record::{CommitRecord, RecordKind};
use crate::restore::manifest_of;
use crate::store::CheckpointStore;
use futures::StreamExt;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tarazed_domain::{Mutant, StepsCompleted};

/// Which checkpoints a collection keeps, besides the pinned ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Retention {
    /// So many of the newest good ones; at least one is always kept.
    pub last: u32,
    /// The first one at or after every multiple of this step; 0 for none.
    pub every_steps: u64,
    /// And the newest good one at or before this step, with the first one behind it, which takes its place where the next
    /// collections name later steps.
    pub back_to: Option<StepsCompleted>,
}

impl Retention {
    /// The newest good ones alone.
    #[must_use]
    pub const fn last(count: u32) -> Self {
        Self {
            last: count,
            every_steps: 0,
            back_to: None,
        }
    }

    /// Which of these steps are the first at or after a multiple.
    fn firsts(&self, steps: impl Iterator<Item = StepsCompleted>) -> BTreeSet<StepsCompleted> {
        let mut firsts = BTreeMap::<u64, StepsCompleted>::new();
        for step in steps {
            let multiples = step.0.checked_div(self.every_steps).unwrap_or(0);
            if multiples > 0 {
                let first = firsts.entry(multiples).or_insert(step);
                *first = step.min(*first);
            }
        }
        firsts.into_values().collect()
    }
}

/// What a collection did.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct GcReport {
    /// Checkpoints that are kept, newest first.
    pub kept: Vec<CommitRef>,
    /// Checkpoints retired by this collection.
    pub retired: Vec<CommitRef>,
    /// Objects deleted, those left by earlier, interrupted collections and failed uploads included.
    pub deleted_objects: u64,
    /// Their bytes.
    pub deleted_bytes: u64,
    /// What was kept although nobody may need it, and why.
    pub warnings: Vec<String>,
}

/// An object as the store lists it.
#[derive(Clone, Copy)]
struct Listed {
    bytes: u64,
    modified: SystemTime,
}

type Listing = BTreeMap<String, Listed>;

/// What live commits need.
#[derive(Default)]
struct Needed {
    keys: HashSet<String>,
    /// Steps of commits whose manifest cannot be read: nothing of theirs is touched.
    steps: BTreeSet<StepsCompleted>,
}

impl Needed {
    fn add(&mut self, other: Self) {
        self.keys.extend(other.keys);
        self.steps.extend(other.steps);
    }

    fn holds(&self, key: &str) -> bool {
        let step = keys::step_and_generation_of(key).map(|(step, _)| step);
        self.keys.contains(key) || step.is_some_and(|step| self.steps.contains(&step))
    }
}

/// A commit that may go, and what it alone needs.
struct Doomed {
    standing: Standing,
    objects: Needed,
}

/// From when on an object without a commit is garbage.
struct OrphanRule {
    step: StepsCompleted,
    before: SystemTime,
    after: Option<SystemTime>,
}

impl OrphanRule {
    fn applies(&self, key: &str, modified: SystemTime) -> bool {
        let probe = key
            .strip_prefix(keys::SELF_TEST)
            .is_some_and(|rest| rest.starts_with('/'));
        // A self-test that loses its probes would blame the store, and its controller would refuse to start.
        let grace = Duration::from_millis(if probe { SELF_TEST_MS_MAX } else { 0 });
        let before = self.before.checked_sub(grace);
        let in_time = before.is_some_and(|before| modified < before) && self.after.is_none_or(|after| modified > after);
        let passed = keys::step_and_generation_of(key).is_some_and(|(step, _)| step <= self.step);
        in_time && (probe || passed)
    }
}

impl CheckpointStore {
    /// Retires all checkpoints but those that `retention` names and the pinned ones, and deletes their objects and what failed
    /// uploads left. At least one good checkpoint is always kept; bad ones newer than a kept one are kept as evidence; if
    /// fewer than `retention.last` are good, none is retired. Never deletes a commit record.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if another controller claimed the store: nothing was deleted. Else by cause; what was left
    /// is collected next time.
    pub async fn gc(&self, fence: &Fence, retention: Retention) -> Result<GcReport, StoreError> {
        self.gc_of(fence, retention, |_| true).await
    }

    /// The same for a run that goes on from none but the `live` steps: those of others are kept where they are pinned, or
    /// until there are enough of the live ones.
    ///
    /// # Errors
    /// As [`Self::gc`].
    pub async fn gc_of(
        &self,
        fence: &Fence,
        retention: Retention,
        live: impl Fn(StepsCompleted) -> bool,
    ) -> Result<GcReport, StoreError> {
        let chain = self.chain().await?;
        let judgement = chain.judge();
        self.check_fence(fence, &judgement)?;
        let mut report = GcReport::default();
        let listing = self.listing().await?;
        let horizon = self.horizon(&judgement, &mut report);
        let (doomed, mut needed) = self
            .sort_commits(&judgement, &listing, (retention, &live), horizon, &mut report)
            .await?;
        // First what needs no record: on a full disk that makes room for the record.
        let mut garbage = self.garbage_of_retired(&judgement, &listing, &needed).await?;
        if let Some(rule) = orphan_rule(fence, &chain, &judgement, horizon) {
            let live = |key: &str| needed.holds(key) || doomed.iter().any(|doomed| doomed.objects.holds(key));
            let orphans = listing
                .iter()
                .filter(|(key, listed)| rule.applies(key, listed.modified) && !live(key));
            garbage.extend(orphans.map(|(key, _)| key.clone()));
            self.sweep(rule, &mut report).await;
        }
        self.delete_garbage(garbage, &listing, &mut report).await?;
        if Mutant::DeletedBeforeRetired.is_on() {
            let early = doomed.iter().flat_map(|doomed| doomed.objects.keys.iter().cloned());
            let early = early
                .filter(|key| !needed.holds(key) && listing.contains_key(key))
                .collect();
            self.delete_garbage(early, &listing, &mut report).await?;
        }
        let mut garbage = BTreeSet::new();
        for doomed in self.retire(fence, doomed, &mut needed, &mut report).await? {
            garbage.extend(doomed.objects.keys);
        }
        garbage.retain(|key| !needed.holds(key) && listing.contains_key(key));
        self.delete_garbage(garbage, &listing, &mut report).await?;
        Ok(report)
    }

    /// In a folder store: what crashes left half written.
    async fn sweep(&self, rule: OrphanRule, report: &mut GcReport) {
        let Some(folder) = self.folder().cloned() else {
            return;
        };
        let swept = tokio::task::spawn_blocking(move || sweep_unfinished_files(&folder, &rule)).await;
        let (files, bytes) = swept.unwrap_or_default();
        report.deleted_objects += files;
        report.deleted_bytes += bytes;
    }

    async fn listing(&self) -> Result<Listing, StoreError> {
        let mut listing = Listing::new();
        for folder in [keys::SHARDS, keys::MANIFESTS, keys::SELF_TEST] {
            for (key, meta) in self.list_objects(folder).await? {
                let modified = meta.last_modified.into();
                listing.insert(
                    key,
                    Listed {
                        bytes: meta.size,
                        modified,
                    },
                );
            }
        }
        Ok(listing)
    }

    /// The first record after all damage; nothing older is touched. `u64::MAX` if the damage is at the head.
    fn horizon(&self, judgement: &Judgement, report: &mut GcReport) -> u64 {
        let Some(lost) = judgement.last_lost_place() else {
            return 0;
        };
        for problem in &judgement.problems {
            tracing::warn!(
                problem,
                location = self.location(),
                "damage in the chain; older checkpoints are not collected"
            );
        }
        report.warnings.extend(judgement.problems.iter().cloned());
        let after = judgement
            .standing
            .iter()
            .map(|standing| standing.record.sequence)
            .find(|sequence| *sequence > lost);
        after.unwrap_or(u64::MAX)
    }

    /// Which commits may be retired, and which keys the others need.
    async fn sort_commits(
        &self,
        judgement: &Judgement,
        listing: &Listing,
        (retention, live): (Retention, &impl Fn(StepsCompleted) -> bool),
        horizon: u64,
        report: &mut GcReport,
    ) -> Result<(Vec<Doomed>, Needed), StoreError> {
        let (mut doomed, mut needed) = (Vec::<Doomed>::new(), Needed::default());
        let (mut good, mut back_to) = (0, retention.back_to);
        let steps = judgement.commits().filter_map(Standing::reference).map(|it| it.step);
        let steps: Vec<StepsCompleted> = steps.filter(|step| live(*step)).collect();
        let mut firsts = retention.firsts(steps.iter().copied());
        let behind = |oldest| steps.iter().copied().filter(|step| *step > oldest).min();
        firsts.extend(back_to.and_then(behind));
        let named: Vec<(&Standing, CommitRef, &String)> = judgement
            .commits()
            .filter_map(|standing| Some((standing, standing.reference()?, manifest_of(&standing.record)?.0)))
            .collect();
        let reads: Vec<_> = named
            .iter()
            .map(|(standing, ..)| self.readable_manifest(&standing.record))
            .collect();
        let manifests = futures::stream::iter(reads).buffered(MANIFESTS_IN_FLIGHT_MAX);
        let mut read = futures::stream::iter(named).zip(manifests);
        while let Some(((standing, reference, key), manifest)) = read.next().await {
            let stays = judgement.pinned.contains_key(&reference.sequence) || firsts.contains(&reference.step);
            let kept = retention.last.max(1) as usize - usize::from(Mutant::GreedyCollector.is_on());
            let full = good >= kept && doomed.len() < RETIRED_PER_RECORD_MAX;
            let (objects, whole) = needs_of(standing, key, manifest?, listing, report);
            let counts = whole && live(reference.step);
            // Of those that are old enough the first one met, since the newest comes first.
            let stays = back_to.take_if(|oldest| counts && reference.step <= *oldest).is_some() || stays;
            if full && !stays && reference.sequence >= horizon {
                let standing = standing.clone();
                doomed.push(Doomed { standing, objects });
                continue;
            }
            report.kept.push(reference);
            good += usize::from(counts);
            needed.add(objects);
        }
        Ok((doomed, needed))
    }

    /// The manifest, or why it is bad; an error only if the store did not answer.
    async fn readable_manifest(&self, record: &CommitRecord) -> Result<Result<Manifest, String>, StoreError> {
        match self.manifest(record).await {
            Ok(manifest) => Ok(Ok(manifest)),
            Err(error @ StoreError::Reconfigure { .. }) => Ok(Err(error.to_string())),
            Err(error) if error.is_bad_object() => Ok(Err(error.to_string())),
            Err(error) => Err(error),
        }
    }

    /// Says in the chain what is about to go; returns what may go now. What was pinned meanwhile is needed again.
    async fn retire(
        &self,
        fence: &Fence,
        doomed: Vec<Doomed>,
        needed: &mut Needed,
        report: &mut GcReport,
    ) -> Result<Vec<Doomed>, StoreError> {
        if doomed.is_empty() {
            return Ok(Vec::new());
        }
        let appended = self
            .append(|_, judgement| {
                self.check_fence(fence, judgement)?;
                // A pin may have come in between: it is in the chain before this record, or loses its place to it.
                let still = doomed.iter().map(|doomed| doomed.standing.record.sequence);
                let sequences = still
                    .filter(|sequence| !judgement.pinned.contains_key(sequence) || Mutant::PinOvertaken.is_on())
                    .collect();
                Ok(Decision::Write(fence.generation, RecordKind::Retire { sequences }))
            })
            .await?;
        let RecordKind::Retire { sequences } = appended.record.kind else {
            return Ok(Vec::new());
        };
        let mut retired = Vec::new();
        for doomed in doomed {
            let reference = doomed.standing.reference();
            if sequences.contains(&doomed.standing.record.sequence) {
                report.retired.extend(reference);
                retired.push(doomed);
            } else {
                report.kept.extend(reference);
                needed.add(doomed.objects);
            }
        }
        Ok(retired)
    }

    /// Objects of commits retired before that are still there: an earlier collection was interrupted.
    async fn garbage_of_retired(
        &self,
        judgement: &Judgement,
        listing: &Listing,
        needed: &Needed,
    ) -> Result<BTreeSet<String>, StoreError> {
        let mut garbage = BTreeSet::new();
        let retired = |standing: &&Standing| judgement.retired.contains(&standing.record.sequence);
        for standing in judgement.standing.iter().filter(retired) {
            let manifest = manifest_of(&standing.record).filter(|(key, _, _)| listing.contains_key(*key));
            let Some((key, _, _)) = manifest else {
                continue;
            };
            garbage.insert(key.clone());
            if let Ok(manifest) = self.readable_manifest(&standing.record).await? {
                garbage.extend(manifest.shards.into_iter().map(|shard| shard.object.key));
            }
        }
        garbage.retain(|key| !needed.holds(key) && listing.contains_key(key));
        Ok(garbage)
    }

    async fn delete_garbage(
        &self,
        garbage: BTreeSet<String>,
        listing: &Listing,
        report: &mut GcReport,
    ) -> Result<(), StoreError> {
        debug_assert!(garbage.iter().all(|key| !key.starts_with(keys::COMMITS)), "CKPT-5");
        // Manifests last: while one is there, the next collection finds the rest of its checkpoint.
        let (manifests, others): (Vec<_>, Vec<_>) =
            garbage.into_iter().partition(|key| key.starts_with(keys::MANIFESTS));
        for batch in [others, manifests] {
            self.delete_all(&batch).await?;
            report.deleted_objects += batch.len() as u64;
            report.deleted_bytes += batch
                .iter()
                .filter_map(|key| listing.get(key))
                .map(|l| l.bytes)
                .sum::<u64>();
        }
        Ok(())
    }
}

/// What a commit needs, and whether all of it is there; `manifest` is its own, or why that is bad.
fn needs_of(
    standing: &Standing,
    manifest_key: &str,
    manifest: Result<Manifest, String>,
    listing: &Listing,
    report: &mut GcReport,
) -> (Needed, bool) {
    let mut needed = Needed::default();
    needed.keys.insert(manifest_key.to_string());
    match manifest {
        Ok(manifest) => {
            let whole = is_whole(&manifest, listing);
            let keys = manifest.shards.into_iter().map(|shard| shard.object.key);
            needed.keys.extend(keys);
            (needed, whole)
        }
        Err(why) => {
            report.warnings.push(why);
            needed.steps.extend(standing.record.step());
            (needed, false)
        }
    }
}

fn is_whole(manifest: &Manifest, listing: &Listing) -> bool {
    let there = |key: &String, length| listing.get(key).is_some_and(|listed| listed.bytes == length);
    manifest
        .shards
        .iter()
        .all(|shard| there(&shard.object.key, shard.object.length))
}

fn orphan_rule(fence: &Fence, chain: &Chain, judgement: &Judgement, horizon: u64) -> Option<OrphanRule> {
    let newest = judgement
        .commits()
        .find(|standing| standing.record.sequence > fence.sequence)?;
    let after = match horizon {
        0 => None,
        // Damage at the head: no time from which on all is known.
        u64::MAX => return None,
        sequence => Some(*chain.modified.get(&sequence)?),
    };
    Some(OrphanRule {
        step: newest.record.step()?,
        before: *chain.modified.get(&newest.record.sequence)?,
        after,
    })
}

/// Files that a crash left half written in a folder store, `<name>#<number>`, invisible to listings; and folders of past
/// steps that are empty now.
fn sweep_unfinished_files(folder: &Path, rule: &OrphanRule) -> (u64, u64) {
    let mut swept = (0, 0);
    let mut folders: Vec<PathBuf> = [keys::SHARDS, keys::MANIFESTS, keys::SELF_TEST]
        .map(|name| folder.join(name))
        .into();
    let mut at = 0;
    while let Some(next) = folders.get(at).cloned() {
        at += 1;
        let Ok(entries) = std::fs::read_dir(&next) else {
            continue;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() {
                folders.push(path);
            } else if is_unfinished(folder, &path, &metadata, rule) && std::fs::remove_file(&path).is_ok() {
                swept = (swept.0 + 1, swept.1 + metadata.len());
            }
        }
    }
    for step_folder in folders.iter().skip(3) {
        let step = step_folder
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok())
            .map(StepsCompleted);
        if step.is_some_and(|step| step <= rule.step) {
            // Fails, as it should, if anything is in there.
            let _not_empty = std::fs::remove_dir(step_folder);
        }
    }
    swept
}

fn is_unfinished(folder: &Path, path: &Path, metadata: &std::fs::Metadata, rule: &OrphanRule) -> bool {
    let key = path.strip_prefix(folder).ok().and_then(Path::to_str);
    let Some((key, number)) = key.and_then(|key| key.rsplit_once('#')) else {
        return false;
    };
    let staged = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    staged && metadata.modified().is_ok_and(|modified| rule.applies(key, modified))
}
