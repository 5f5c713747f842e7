//! Silent data corruption: ranks differ in what they computed, and a recomputation tells who is wrong (DET-3).
//!
//! Where most holders agree, the others are wrong, and the rest goes on without them. Else nobody's state is believed: it
//! is restored from the newest checkpoint, the steps since are done again and compared with their lines, and at the
//! disputed step the result tells whose claim was wrong. That rank is replaced. Where they differ again, the claims of all
//! tries count together: two wrong results are not alike by accident, so the one that most workers have had is right. What
//! nobody can decide after a few tries was no accident, and halts the run with the ranks named.
//!
//! A checkpoint may have been made of a state that was already wrong: its bytes are as recorded, and what it restores is
//! not what the trace says of its step. Or its bytes are not as recorded, which those see who read them. Then an older one
//! is looked for (CKPT-4); where none is left, it is for a person to say whether the run begins anew.

use super::{Coordinator, Effect, Incident, Phase, WorkerPhase};
use crate::message::{Dispute, DisputedItem, ItemDigest, Member};
use std::collections::{BTreeMap, BTreeSet};
use tarazed_domain::{LaneRange, Mutant, StepsCompleted, WorkerId};

/// A step that is disputed this often, undecided, is not done again.
const TRIES_MAX: u32 = 3;
/// Ranks that a diagnosis names one by one.
const RANKS_NAMED_MAX: usize = 16;

/// What ranks differ in, until the step has been done again.
#[derive(Debug)]
pub(super) struct Trial {
    pub(super) step: StepsCompleted,
    pub(super) item: DisputedItem,
    /// Of all tries.
    claims: Vec<(Member, ItemDigest)>,
    tries: u32,
}

impl Coordinator {
    /// Every rank of a generation reports the same dispute; the first report counts.
    pub(super) fn on_disputed(&mut self, now_ms: u64, dispute: &Dispute, cause: &str) -> Vec<Effect> {
        if !matches!(self.phase, Phase::Running { .. }) {
            return Vec::new();
        }
        let &Dispute { step, item, ref claims } = dispute;
        match item {
            DisputedItem::Base => return self.on_base_differs(now_ms, cause.to_owned()),
            DisputedItem::Checkpoint => {
                let effects = self.on_base_differs(now_ms, cause.to_owned());
                // A newer one has been committed since, or it is not there any more because of that.
                if self.refuted.is_some() {
                    self.unreadable.push(cause.to_owned());
                }
                return effects;
            }
            DisputedItem::Shard(_) | DisputedItem::Lane(_) | DisputedItem::Finite => {}
        }
        let claims: Vec<(Member, ItemDigest)> = claims
            .iter()
            .filter_map(|claim| Some((self.roster.get(claim.rank.index())?.0, claim.digest)))
            .collect();
        let members: Vec<Member> = claims.iter().map(|&(member, _)| member).collect();
        let before = self.trial.take_if(|before| (before.step, before.item) == (step, item));
        let tries = before.as_ref().map_or(1, |before| before.tries + 1);
        let mut trial = Trial {
            step,
            item,
            claims: before.map_or_else(Vec::new, |before| before.claims),
            tries,
        };
        trial.claims.extend(&claims);
        let verdict = majority(&claims).or_else(|| most_workers(&trial.claims).filter(|_| tries > 1));
        let mut effects = vec![Effect::Note(Incident::Disputed { step, item, members })];
        if let Some(digest) = verdict {
            effects.extend(self.convict(trial, digest));
            // The step is done, and those who have it right hold it; what the others report must not count.
            for (member, _) in claims.into_iter().filter(|&(_, claimed)| claimed != digest) {
                self.workers.set_phase(member.worker, WorkerPhase::Released);
            }
        } else if tries >= TRIES_MAX || item == DisputedItem::Finite && tries > 1 {
            return self.halt(3, undecided(&trial, cause));
        } else {
            self.trial = Some(trial);
            self.distrusted = !Mutant::DisputedStateKept.is_on();
        }
        effects.extend(self.fence(now_ms, cause.to_owned(), None));
        effects
    }

    /// What is wrong with a result, and whose it is: every rank of the generation that tells it, with its lanes. A line does not
    /// say which of them it comes from: all of them have a part in it.
    #[must_use]
    pub fn with_ranks(&self, diagnosis: &str) -> String {
        let name = |&(member, lanes): &(Member, LaneRange)| {
            let Member { worker, incarnation } = member;
            let LaneRange { start, end } = lanes;
            format!("worker {worker} (incarnation {incarnation}, lanes {start}..{end})")
        };
        let named: Vec<String> = self.roster.iter().take(RANKS_NAMED_MAX).map(name).collect();
        match self.roster.len() - named.len() {
            // Ranks of the controller before tell what they have computed for it.
            _ if named.is_empty() => format!("{diagnosis}; computed under an earlier controller"),
            0 => format!("{diagnosis}; computed by {}", named.join(", ")),
            more => format!("{diagnosis}; computed by {} and {more} more", named.join(", ")),
        }
    }

    /// The disputed step was done again.
    pub(super) fn on_settled(&mut self, step: StepsCompleted, digest: ItemDigest) -> Vec<Effect> {
        match self.trial.take_if(|trial| trial.step == step) {
            Some(trial) => self.convict(trial, digest),
            None => Vec::new(),
        }
    }

    /// Whoever claimed something else is replaced.
    fn convict(&mut self, trial: Trial, digest: ItemDigest) -> Vec<Effect> {
        let Trial { step, item, claims, .. } = trial;
        let wrong = claims.into_iter().filter(|&(_, claimed)| claimed != digest);
        let members: BTreeSet<Member> = wrong.map(|(member, _)| member).collect();
        let members: Vec<Member> = members.into_iter().collect();
        let mut effects = Vec::new();
        for &member in &members {
            let lives = self.workers.get(member.worker).is_some() && self.workers.member(member.worker) == member;
            if lives && !Mutant::CulpritKept.is_on() {
                let reason = format!("silent data corruption: it had {item} wrong after step {step}");
                effects.push(Effect::Kill { member, reason });
            }
        }
        effects.push(Effect::Note(Incident::Convicted { step, item, members }));
        effects
    }

    /// The state that a generation began from is not that of the trace. One from a checkpoint speaks against the
    /// checkpoint, one that ranks held against the ranks.
    fn on_base_differs(&mut self, now_ms: u64, diagnosis: String) -> Vec<Effect> {
        let Some(plan) = self
            .plan
            .as_ref()
            .filter(|_| matches!(self.phase, Phase::Running { .. }))
        else {
            return Vec::new();
        };
        let mut effects = Vec::new();
        if let Some(from) = &plan.restore {
            let step = from.step;
            // Where another was committed meanwhile that one is looked for, and this one may have been collected for it.
            if self.checkpointed.is_none_or(|newest| newest <= step) {
                self.refuted = Some(step);
            }
            self.distrusted = true;
            effects.push(Effect::Note(Incident::CheckpointRefuted { step, diagnosis }));
            // It is no sign of getting nowhere: each refuted checkpoint is older than the last, so there is an end to it.
            effects.extend(self.begin_fence(now_ms, None));
            return effects;
        } else if plan.shards.holders().iter().any(|holder| holder.origin.is_seed()) {
            return self.halt(3, diagnosis); // the seed itself gives another state than it did
        }
        self.distrusted = true;
        effects.extend(self.fence(now_ms, diagnosis, None));
        effects
    }

    /// There is no checkpoint to restore from. Where there were some that could not be read, that is no answer.
    pub(super) fn nothing_to_restore(&mut self) -> Option<Vec<Effect>> {
        let causes = std::mem::take(&mut self.unreadable);
        (!causes.is_empty()).then(|| {
            let diagnosis = format!(
                "no checkpoint in the store can be restored: {}; restore its objects from a copy, or begin anew in another \
                 --run-dir with another checkpoint.store",
                causes.join("; ")
            );
            self.halt(3, diagnosis)
        })
    }

    pub(super) fn find_checkpoint(&mut self) -> Effect {
        self.distrusted = false;
        Effect::FindCheckpoint {
            below: self.refuted,
            rollbacks: self.acted(),
        }
    }
}

/// What more than half of them claim.
fn majority(claims: &[(Member, ItemDigest)]) -> Option<ItemDigest> {
    let mut counts: BTreeMap<ItemDigest, usize> = BTreeMap::new();
    for &(_, digest) in claims {
        *counts.entry(digest).or_default() += 1;
    }
    counts
        .into_iter()
        .find(|&(_, count)| count * 2 > claims.len())
        .map(|(digest, _)| digest)
}

/// What more workers have claimed than anything else, in whatever life: a worker that is wrong in the same way each time
/// counts once.
fn most_workers(claims: &[(Member, ItemDigest)]) -> Option<ItemDigest> {
    let mut workers: BTreeMap<ItemDigest, BTreeSet<WorkerId>> = BTreeMap::new();
    for &(member, digest) in claims {
        workers.entry(digest).or_default().insert(member.worker);
    }
    let most = workers.values().map(BTreeSet::len).max()?;
    let mut with_most = workers.into_iter().filter(|(_, claimants)| claimants.len() == most);
    let (digest, _) = with_most.next()?;
    with_most.next().is_none().then_some(digest)
}

/// The diagnosis where doing it again has not helped.
fn undecided(trial: &Trial, cause: &str) -> String {
    let Trial {
        step,
        item,
        claims,
        tries,
    } = trial;
    if *item == DisputedItem::Finite {
        return format!("{cause}; the state was restored and step {step} done again, with the same result");
    }
    let parties: BTreeSet<Member> = claims.iter().map(|&(member, _)| member).collect();
    let parties: Vec<String> = parties.iter().map(Member::to_string).collect();
    format!(
        "{cause}; step {step} was done {tries} times, each time from a restored state, and {item} differs each time, between \
         {}; look at their machines",
        parties.join(", ")
    )
}
