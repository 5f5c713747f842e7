//! Which samples each step must have trained on, and whether each was used exactly once (DATA-1).
//!
//! The walk goes from step to step; its state is what domains have drawn and are owed, mixtures in force and to come, and
//! one bit per sample of each domain's present epoch.

use super::back::Backs;
use super::batch::{Accounts, Mixture, places};
use super::config::Config;
use super::data::Domain;
use super::line::{Change, Decision, Edition};
use super::order::{EpochOrder, batch_turn};
use crate::report::{Findings, Unusable};
use std::collections::{BTreeMap, BTreeSet};

const CHANGE_CONTEXT: &str = "tarazed data change v1";
const DATA_CONTEXT: &str = "tarazed step data v1";
/// Memory for the marks of all domains: eight thousand million samples.
const MARKS_BYTES_MAX: u64 = 1 << 30;
const DOMAINS_MAX: usize = 256;

/// What the recipe gives for one step.
pub struct Plan {
    pub data: [u8; 32],
    pub counts: Vec<u32>,
    /// Domain, epoch and sample at each place.
    samples: Vec<(u16, u32, u64)>,
}

/// One domain's samples so far.
struct Stream {
    name: String,
    /// What keys the order of its samples.
    key: String,
    samples: u64,
    held_out_sequences: u64,
    drawn: u64,
    order: EpochOrder,
    epoch: u32,
    marks: Vec<u64>,
    marked: u64,
    /// Samples of this epoch in lines that could not be proved, or in no line.
    unproved: u64,
    proved_in_all: u64,
    whole_epochs: u64,
}

/// What is told of one domain at the end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Usage {
    pub name: String,
    pub samples_per_epoch: u64,
    /// Samples in lines whose `data` was proved.
    pub samples: u64,
    /// Epochs in which every sample was used exactly once.
    pub whole_epochs: u64,
    /// Samples of the last, unfinished epoch, each used once.
    pub of_last_epoch: u64,
}

pub struct Walk {
    seed: u64,
    config: Config,
    consumed: u64,
    data_version: [u8; 32],
    streams: Vec<Stream>,
    /// What was told of texts that were replaced since.
    ended: Vec<Usage>,
    /// Changes of the data to come, by the first step (from 0) of each.
    changes: BTreeMap<u64, Change>,
    /// Names of all domains that are decided, and how many there are from which step on.
    names: Vec<String>,
    domain_counts: BTreeMap<u64, usize>,
    /// Decisions that change the data: they stand.
    lasting: BTreeSet<u64>,
    accounts: Accounts,
    /// Mixtures by the first step (from 0) that each is in force at.
    mixtures: BTreeMap<u64, Setting>,
    limits: Vec<Limit>,
    /// Decisions that were taken back.
    vetoed: BTreeSet<u64>,
    backs: Backs,
    next_step: u64,
    last_decision: u64,
}

/// A domain of which nothing is drawn, by a decision, from a step on and before another.
struct Limit {
    by: u64,
    domain: usize,
    from: u64,
    until: Option<u64>,
}

/// A mixture, and the decision that set it; none for the config's, and for one that a veto brought back.
struct Setting {
    by: Option<u64>,
    /// Shares of domains that are new with it, where it takes the others' from the mixture before.
    joined_by: Option<Vec<f64>>,
    /// The step of the mixture that a veto brought back.
    repeats: Option<u64>,
    mixture: Mixture,
}

impl Walk {
    pub fn new(config: &Config, domains: &[Domain], data_version: [u8; 32]) -> Result<Self, Unusable> {
        let names_differ = domains
            .iter()
            .map(|domain| &domain.name)
            .ne(config.domains.iter().map(|(name, _)| name));
        if names_differ {
            return Err(Unusable("the domains of data.json are not those of config.toml".into()));
        }
        if let Some(empty) = domains.iter().find(|domain| domain.train_sequences == 0) {
            return Err(Unusable(format!("the domain {} has no whole sequence", empty.name)));
        }
        let marks = domains
            .iter()
            .fold(0_u64, |sum, domain| sum.saturating_add(domain.train_sequences / 8 + 8));
        if marks > MARKS_BYTES_MAX {
            return Err(Unusable(format!(
                "marking each sample takes {marks} bytes, above the limit of {MARKS_BYTES_MAX}"
            )));
        }
        let weights: Vec<f64> = config.domains.iter().map(|(_, weight)| *weight).collect();
        let first = Mixture::new(&weights, weights.len()).map_err(|why| Unusable(format!("config.toml has {why}")))?;
        let stream = |domain: &Domain| {
            let (name, samples) = (&domain.name, domain.train_sequences);
            Stream::new(config.seed, name, name.clone(), samples, domain.held_out_sequences)
        };
        Ok(Self {
            seed: config.seed,
            config: config.clone(),
            consumed: 0,
            data_version,
            streams: domains.iter().map(stream).collect(),
            ended: Vec::new(),
            changes: BTreeMap::new(),
            names: domains.iter().map(|domain| domain.name.clone()).collect(),
            domain_counts: BTreeMap::from([(0, domains.len())]),
            lasting: BTreeSet::new(),
            accounts: Accounts::new(domains.len()),
            mixtures: BTreeMap::from([(
                0,
                Setting {
                    by: None,
                    joined_by: None,
                    repeats: None,
                    mixture: first,
                },
            )]),
            limits: Vec::new(),
            vetoed: BTreeSet::new(),
            backs: Backs::default(),
            next_step: 0,
            last_decision: 0,
        })
    }

    /// The trace line of the next step: one more than its index.
    pub const fn next_line(&self) -> u64 {
        self.next_step + 1
    }

    /// The mixture in force at the next step, without the domains that are at their limit.
    pub fn mixture(&self) -> Mixture {
        let in_force = self.mixtures.range(..=self.next_step).next_back();
        // The first holds from step 0.
        let decided: &Mixture = in_force.map_or_else(
            || unreachable!("a mixture is in force at every step"),
            |(_, setting)| &setting.mixture,
        );
        decided.without(|domain| self.is_limited(domain, self.next_step))
    }

    fn is_limited(&self, domain: usize, step: u64) -> bool {
        self.limits
            .iter()
            .any(|limit| limit.domain == domain && limit.from <= step && limit.until.is_none_or(|until| step < until))
    }

    /// Takes over that nothing is drawn of a domain from step `from` on, before other text comes for it.
    fn limit(&mut self, by: u64, domain: usize, from: u64) -> Result<(), String> {
        if domain >= self.domains_at(from) || self.is_limited(domain, from) {
            return Err(format!("domain {domain} is none, or at its limit already"));
        }
        let brings = |edition: &Edition| usize::from(edition.domain) == domain;
        let later = self.changes.range(from.saturating_add(1)..);
        let mut other_text = later.filter(|(_, change)| change.editions.iter().any(brings));
        let until = other_text.next().map(|(step, _)| *step);
        self.limits.push(Limit {
            by,
            domain,
            from,
            until,
        });
        Ok(())
    }

    /// Training tokens consumed once the next step is done.
    pub fn tokens_with_next(&self, config: &Config) -> u64 {
        let samples = self.consumed + u64::from(config.sequences(self.consumed));
        samples.saturating_mul(config.context)
    }

    /// Names of the domains that the last planned step could train on, and what each holds out.
    pub fn held_out(&self) -> impl Iterator<Item = (&str, u64)> + Clone {
        let streams = self.streams.iter();
        streams.map(|stream| (stream.name.as_str(), stream.held_out_sequences))
    }

    /// The data change with the next step, if they do: a new domain begins with nothing drawn and nothing owed; a new text
    /// begins at its first sample and takes over what its domain is owed; what is held out stays.
    fn change(&mut self) {
        let Some(change) = self.changes.remove(&self.next_step) else {
            return;
        };
        let mut hasher = blake3::Hasher::new_derive_key(CHANGE_CONTEXT);
        hasher.update(&self.data_version).update(change.version.as_bytes());
        for edition in change.editions {
            hasher.update(&edition.domain.to_le_bytes());
            hasher.update(&edition.index.to_le_bytes());
            let key = format!("{}@{}", edition.name, change.version);
            let (samples, held_out) = (edition.train_sequences, edition.held_out_sequences);
            let mut stream = Stream::new(self.seed, &edition.name, key, samples, held_out);
            match self.streams.get_mut(usize::from(edition.domain)) {
                Some(old) => {
                    stream.held_out_sequences = old.held_out_sequences;
                    let mut usage = old.usage();
                    usage.name = format!("{}, replaced at step {}", usage.name, self.next_step);
                    self.ended.push(usage);
                    *old = stream;
                }
                None => {
                    self.streams.push(stream);
                    self.accounts.open();
                }
            }
        }
        self.data_version = *hasher.finalize().as_bytes();
    }

    /// Domains that a step can train on, by all that is decided.
    fn domains_at(&self, step: u64) -> usize {
        let newest = self.domain_counts.range(..=step).next_back();
        newest.map_or(0, |(_, count)| *count) // the first holds from step 0
    }

    /// Takes over a change of the data from step `from` on.
    fn announce(&mut self, id: u64, from: u64, change: &Change) -> Result<(), String> {
        let newest = self.mixtures.keys().next_back().copied();
        if let Some(later) = newest.filter(|later| *later >= from && *later > 0) {
            return Err(format!(
                "it changes the data before step {later}, whose mixture is decided already"
            ));
        }
        if change.editions.is_empty() {
            return Err("it brings no domain".into());
        }
        let before = self.names.len();
        let mut names = self.names.clone();
        let mut replaced = BTreeSet::new();
        for edition in &change.editions {
            let at = usize::from(edition.domain);
            let fits = match names.get(at) {
                Some(name) => at < before && *name == edition.name && replaced.insert(at),
                None => at == names.len() && at < DOMAINS_MAX && !names.contains(&edition.name),
            };
            if !fits || edition.name.is_empty() || edition.train_sequences == 0 {
                return Err(format!("'{}' cannot be domain {at}", edition.name));
            }
            if at == names.len() {
                names.push(edition.name.clone());
            }
        }
        let marks = self.streams.iter().map(|stream| stream.samples / 8 + 8);
        let marks = change
            .editions
            .iter()
            .map(|edition| edition.train_sequences / 8 + 8)
            .chain(marks)
            .fold(0_u64, u64::saturating_add);
        if marks > MARKS_BYTES_MAX {
            return Err(format!(
                "marking each sample takes {marks} bytes, above the limit of {MARKS_BYTES_MAX}"
            ));
        }
        for limit in self.limits.iter_mut().filter(|limit| replaced.contains(&limit.domain)) {
            limit.until = Some(limit.until.map_or(from, |until| until.min(from)));
        }
        self.domain_counts.insert(from, names.len());
        self.names = names;
        self.lasting.insert(id);
        self.changes.insert(from, change.clone());
        Ok(())
    }

    /// What the next step trains on. Moves on to the step behind it.
    pub fn plan(&mut self, findings: &mut Findings) -> Plan {
        self.change();
        let mixture = self.mixture();
        let sequences = self.config.sequences(self.consumed);
        self.consumed += u64::from(sequences);
        if let Some(problem) = self.backs.begin() {
            findings.add(format!("step {}", self.next_step), problem);
        }
        let counts = self.accounts.pay(&mixture, sequences);
        self.backs.drew(&counts);
        let turn = batch_turn(self.seed, self.next_step, sequences);
        let mut hasher = blake3::Hasher::new_derive_key(DATA_CONTEXT);
        hasher.update(&self.data_version);
        let mut samples = Vec::with_capacity(sequences as usize);
        for domain in places(&counts, turn) {
            let (epoch, sample) = self.streams[usize::from(domain)].draw(self.seed, findings);
            hasher
                .update(&domain.to_le_bytes())
                .update(&epoch.to_le_bytes())
                .update(&sample.to_le_bytes());
            samples.push((domain, epoch, sample));
        }
        self.next_step += 1;
        Plan {
            data: *hasher.finalize().as_bytes(),
            counts,
            samples,
        }
    }

    /// A line proves that its step trained on these samples, or there is no such proof.
    pub fn settle(&mut self, plan: &Plan, proved: bool, findings: &mut Findings) {
        for (domain, epoch, sample) in &plan.samples {
            self.streams[usize::from(*domain)].mark(*epoch, *sample, proved, findings);
        }
    }

    /// Takes over the decisions of a line; the step after it is next. Says which break the rules.
    pub fn decide(&mut self, config: &Config, step: u64, decisions: &[Decision]) -> Result<(), String> {
        for decision in decisions {
            let refuse = |why: String| Err(format!("decision {}: {why}", decision.id));
            if !config.is_decision_point(step) {
                return refuse("the line is no decision point of the config".into());
            }
            if decision.line != step {
                return refuse(format!("it says that it belongs to line {}", decision.line));
            }
            if decision.id <= self.last_decision {
                return refuse(format!("it comes behind decision {}", self.last_decision));
            }
            if decision.effective < step.saturating_add(config.lag_steps) {
                return refuse(format!(
                    "it acts from step {} on, sooner than {} steps later",
                    decision.effective, config.lag_steps
                ));
            }
            self.last_decision = decision.id;
            let before = self.names.len();
            if let Some(change) = &decision.change
                && let Err(why) = self.announce(decision.id, decision.effective, change)
            {
                return refuse(why);
            }
            if let Some(weights) = &decision.weights {
                let new = self.names.len() - before;
                let joins = decision.change.is_some() && weights.len() == new;
                if let Err(why) = self.set(decision.id, decision.effective, weights, joins) {
                    return refuse(why);
                }
            }
            if let Some(domain) = decision.limit
                && let Err(why) = self.limit(decision.id, usize::from(domain), decision.effective)
            {
                return refuse(why);
            }
            if let Some(rollback) = &decision.rollback {
                let domains = self.domains_at(decision.effective);
                let decided = self
                    .backs
                    .decide(decision.id, step, decision.effective, rollback, domains);
                if let Err(why) = decided {
                    return refuse(why);
                }
            }
            if let Some(which) = decision.veto
                && let Err(why) = self.veto(which, decision.effective)
            {
                return refuse(why);
            }
        }
        Ok(())
    }

    /// Takes over a mixture from step `from` on: these weights, or that of before with new domains of these shares.
    fn set(&mut self, id: u64, from: u64, weights: &[f64], joins: bool) -> Result<(), String> {
        if from > 0 && self.mixtures.contains_key(&from) {
            return Err(format!("step {from} has a mixture already"));
        }
        let before = self.mixtures.range(..from).next_back();
        let mixture = match before {
            Some((_, before)) if joins => before.mixture.joined_by(weights),
            _ => Mixture::new(weights, self.domains_at(from)),
        };
        let setting = Setting {
            by: Some(id),
            joined_by: joins.then(|| weights.to_vec()),
            repeats: None,
            mixture: mixture.map_err(|why| format!("it has {why}"))?,
        };
        self.mixtures.insert(from, setting);
        self.join_again()
    }

    /// What new domains joined may be another mixture since, and with it what they made of it.
    fn join_again(&mut self) -> Result<(), String> {
        let mut joined: BTreeMap<u64, Mixture> = BTreeMap::new();
        let mut before: Option<Mixture> = None;
        for (step, setting) in &mut self.mixtures {
            if let (Some(shares), Some(before)) = (&setting.joined_by, &before) {
                setting.mixture = before.joined_by(shares)?;
                joined.insert(*step, setting.mixture.clone());
            } else if let Some(again) = setting.repeats.and_then(|repeats| joined.get(&repeats)) {
                setting.mixture = again.clone();
            }
            before = Some(setting.mixture.clone());
        }
        Ok(())
    }

    /// Takes back a mixture: from step `from` on, what was in force before it is in force again. Vetoes of what sets no
    /// mixture change no sample.
    fn veto(&mut self, which: u64, from: u64) -> Result<(), String> {
        if !self.vetoed.insert(which) {
            return Err(format!("decision {which} is vetoed already"));
        }
        if self.lasting.contains(&which) {
            return Err(format!("decision {which} changes the data, which cannot be taken back"));
        }
        self.backs.veto(which, from)?;
        if let Some(limit) = self.limits.iter_mut().find(|limit| limit.by == which) {
            if limit.until.is_some_and(|until| until <= from) {
                return Err(format!("decision {which} is not in force any more at step {from}"));
            }
            limit.until = Some(from.max(limit.from));
            return Ok(());
        }
        let found = self.mixtures.iter().find(|(_, setting)| setting.by == Some(which));
        let Some(step) = found.map(|(step, _)| *step) else {
            return Ok(());
        };
        if step >= from {
            self.mixtures.remove(&step);
            return self.join_again();
        }
        if self.mixtures.range(step + 1..=from).next().is_some() {
            return Err(format!("decision {which} is not in force any more at step {from}"));
        }
        if let Some((at, before)) = self.mixtures.range(..step).next_back() {
            let setting = Setting {
                by: None,
                joined_by: None,
                repeats: before.repeats.or(Some(*at)),
                mixture: before.mixture.clone(),
            };
            self.mixtures.insert(from, setting);
        }
        Ok(())
    }

    /// Of every text, those that were replaced first.
    pub fn usage(&self) -> Vec<Usage> {
        let present = self.streams.iter().map(Stream::usage);
        self.ended.iter().cloned().chain(present).collect()
    }
}

impl Stream {
    fn new(seed: u64, name: &str, key: String, samples: u64, held_out_sequences: u64) -> Self {
        Self {
            name: name.to_owned(),
            order: EpochOrder::new(seed, &key, 0, samples),
            key,
            samples,
            held_out_sequences,
            drawn: 0,
            epoch: 0,
            marks: vec![0; samples.div_ceil(64) as usize],
            marked: 0,
            unproved: 0,
            proved_in_all: 0,
            whole_epochs: 0,
        }
    }

    fn usage(&self) -> Usage {
        let whole = self.marked == self.samples;
        Usage {
            name: self.name.clone(),
            samples_per_epoch: self.samples,
            samples: self.proved_in_all,
            whole_epochs: self.whole_epochs + u64::from(whole),
            of_last_epoch: if whole { 0 } else { self.marked },
        }
    }

    fn draw(&mut self, seed: u64, findings: &mut Findings) -> (u32, u64) {
        let (epoch, place) = (self.drawn / self.samples, self.drawn % self.samples);
        self.drawn += 1;
        let epoch = u32::try_from(epoch).unwrap_or_else(|_| {
            findings.add(&self.name, "more than 2^32 epochs");
            u32::MAX
        });
        if place == 0 && self.drawn > 1 {
            self.order = EpochOrder::new(seed, &self.key, epoch, self.samples);
        }
        (epoch, self.order.sample(place))
    }

    fn mark(&mut self, epoch: u32, sample: u64, proved: bool, findings: &mut Findings) {
        if epoch != self.epoch {
            self.close(findings);
            self.epoch = epoch;
        }
        if !proved {
            self.unproved += 1;
            return;
        }
        let (word, bit) = ((sample / 64) as usize, 1_u64 << (sample % 64));
        if self.marks[word] & bit > 0 {
            findings.add(&self.name, format!("sample {sample} is used twice in epoch {epoch}"));
            return;
        }
        self.marks[word] |= bit;
        self.marked += 1;
        self.proved_in_all += 1;
    }

    /// The epoch is over: every sample must have been used.
    fn close(&mut self, findings: &mut Findings) {
        if self.marked == self.samples {
            self.whole_epochs += 1;
        } else {
            let lacking = self.samples - self.marked;
            let problem = format!(
                "epoch {}: {lacking} of {} samples are in no line that proves their use ({} of them in bad or missing lines)",
                self.epoch, self.samples, self.unproved
            );
            findings.add(&self.name, problem);
        }
        self.marks.fill(0);
        self.marked = 0;
        self.unproved = 0;
    }
}

#[cfg(test)]
pub mod tests;
