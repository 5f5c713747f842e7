//! Which samples each step must have trained on, and whether each was used exactly once (DATA-1).
//!
//! The walk goes from step to step; its state is what domains have drawn and are owed, mixtures in force and to come, and
//! one bit per sample of each domain's present epoch.

use super::back::Backs;
use super::batch::{Accounts, Mixture, places};
use super::config::Config;
use super::data::Domain;
use super::line::Decision;
use super::order::{EpochOrder, batch_turn};
use crate::report::{Findings, Unusable};
use std::collections::{BTreeMap, BTreeSet};

const DATA_CONTEXT: &str = "tarazed step data v1";
/// Memory for the marks of all domains: eight thousand million samples.
const MARKS_BYTES_MAX: u64 = 1 << 30;

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
    samples: u64,
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
    accounts: Accounts,
    /// Mixtures by the first step (from 0) that each is in force at.
    mixtures: BTreeMap<u64, Setting>,
    /// Decisions that were taken back.
    vetoed: BTreeSet<u64>,
    backs: Backs,
    next_step: u64,
    last_decision: u64,
}

/// A mixture, and the decision that set it; none for the config's, and for one that a veto brought back.
struct Setting {
    by: Option<u64>,
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
        let stream = |domain: &Domain| Stream {
            name: domain.name.clone(),
            samples: domain.train_sequences,
            drawn: 0,
            order: EpochOrder::new(config.seed, &domain.name, 0, domain.train_sequences),
            epoch: 0,
            marks: vec![0; domain.train_sequences.div_ceil(64) as usize],
            marked: 0,
            unproved: 0,
            proved_in_all: 0,
            whole_epochs: 0,
        };
        Ok(Self {
            seed: config.seed,
            config: config.clone(),
            consumed: 0,
            data_version,
            streams: domains.iter().map(stream).collect(),
            accounts: Accounts::new(domains.len()),
            mixtures: BTreeMap::from([(
                0,
                Setting {
                    by: None,
                    mixture: first,
                },
            )]),
            vetoed: BTreeSet::new(),
            backs: Backs::new(domains.len()),
            next_step: 0,
            last_decision: 0,
        })
    }

    /// The trace line of the next step: one more than its index.
    pub const fn next_line(&self) -> u64 {
        self.next_step + 1
    }

    /// The mixture in force at the next step.
    pub fn mixture(&self) -> &Mixture {
        let in_force = self.mixtures.range(..=self.next_step).next_back();
        // The first holds from step 0.
        in_force.map_or_else(
            || unreachable!("a mixture is in force at every step"),
            |(_, setting)| &setting.mixture,
        )
    }

    /// Training tokens consumed once the next step is done.
    pub fn tokens_with_next(&self, config: &Config) -> u64 {
        let samples = self.consumed + u64::from(config.sequences(self.consumed));
        samples.saturating_mul(config.context)
    }

    /// What the next step trains on. Moves on to the step behind it.
    pub fn plan(&mut self, findings: &mut Findings) -> Plan {
        let mixture = self.mixture().clone();
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
            if let Some(weights) = &decision.weights {
                let mixture = match Mixture::new(weights, self.streams.len()) {
                    Ok(mixture) => mixture,
                    Err(why) => return refuse(format!("it has {why}")),
                };
                if decision.effective > 0 && self.mixtures.contains_key(&decision.effective) {
                    return refuse(format!("step {} has a mixture already", decision.effective));
                }
                let by = Some(decision.id);
                self.mixtures.insert(decision.effective, Setting { by, mixture });
            }
            if let Some(rollback) = &decision.rollback
                && let Err(why) = self.backs.decide(decision.id, step, decision.effective, rollback)
            {
                return refuse(why);
            }
            if let Some(which) = decision.veto
                && let Err(why) = self.veto(which, decision.effective)
            {
                return refuse(why);
            }
        }
        Ok(())
    }

    /// Takes back a mixture: from step `from` on, what was in force before it is in force again. Vetoes of what sets no
    /// mixture change no sample.
    fn veto(&mut self, which: u64, from: u64) -> Result<(), String> {
        if !self.vetoed.insert(which) {
            return Err(format!("decision {which} is vetoed already"));
        }
        self.backs.veto(which, from)?;
        let found = self.mixtures.iter().find(|(_, setting)| setting.by == Some(which));
        let Some(step) = found.map(|(step, _)| *step) else {
            return Ok(());
        };
        if step >= from {
            self.mixtures.remove(&step);
            return Ok(());
        }
        if self.mixtures.range(step + 1..=from).next().is_some() {
            return Err(format!("decision {which} is not in force any more at step {from}"));
        }
        if let Some((_, before)) = self.mixtures.range(..step).next_back() {
            let mixture = before.mixture.clone();
            self.mixtures.insert(from, Setting { by: None, mixture });
        }
        Ok(())
    }

    pub fn usage(&self) -> Vec<Usage> {
        let of = |stream: &Stream| {
            let whole = stream.marked == stream.samples;
            Usage {
                name: stream.name.clone(),
                samples_per_epoch: stream.samples,
                samples: stream.proved_in_all,
                whole_epochs: stream.whole_epochs + u64::from(whole),
                of_last_epoch: if whole { 0 } else { stream.marked },
            }
        };
        self.streams.iter().map(of).collect()
    }
}

impl Stream {
    fn draw(&mut self, seed: u64, findings: &mut Findings) -> (u32, u64) {
        let (epoch, place) = (self.drawn / self.samples, self.drawn % self.samples);
        self.drawn += 1;
        let epoch = u32::try_from(epoch).unwrap_or_else(|_| {
            findings.add(&self.name, "more than 2^32 epochs");
            u32::MAX
        });
        if place == 0 && self.drawn > 1 {
            self.order = EpochOrder::new(seed, &self.name, epoch, self.samples);
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
pub mod tests {
    use super::*;

    pub fn config() -> Config {
        Config {
            seed: 7,
            context: 16,
            sequences_per_step: 4,
            ramp: None,
            domains: vec![("a".into(), 3.0), ("b".into(), 1.0)],
            decision_points: Some((4, 4)),
            lag_steps: 2,
            evaluation_interval_steps: 0,
            held_out_sequences_max: 0,
        }
    }

    pub fn domains() -> Vec<Domain> {
        let domain = |name: &str, train_sequences| Domain {
            name: name.into(),
            train_sequences,
            held_out_sequences: 0,
        };
        vec![domain("a", 10), domain("b", 7)]
    }

    fn walk() -> Walk {
        Walk::new(&config(), &domains(), [1; 32]).unwrap()
    }

    #[test]
    fn every_sample_of_an_epoch_is_used_once() {
        let (mut walk, mut findings) = (walk(), Findings::default());
        for _ in 0..70 {
            let plan = walk.plan(&mut findings);
            assert_eq!(plan.samples.len(), 4);
            walk.settle(&plan, true, &mut findings);
        }
        assert_eq!(findings.count(), 0);
        let usage = walk.usage();
        assert_eq!(
            (usage[0].samples, usage[0].whole_epochs, usage[0].of_last_epoch),
            (210, 21, 0)
        );
        assert_eq!(
            (usage[1].samples, usage[1].whole_epochs, usage[1].of_last_epoch),
            (70, 10, 0)
        );
    }

    #[test]
    fn a_step_without_proof_and_one_that_comes_twice_are_noticed() {
        let (mut walk, mut findings) = (walk(), Findings::default());
        for step in 0..8 {
            let plan = walk.plan(&mut findings);
            walk.settle(&plan, step != 1, &mut findings);
        }
        assert!(
            findings.to_string().contains("BAD a: epoch 0: 3 of 10 samples"),
            "{findings}"
        );
        let (mut walk, mut findings) = (self::walk(), Findings::default());
        let plan = walk.plan(&mut findings);
        walk.settle(&plan, true, &mut findings);
        walk.settle(&plan, true, &mut findings);
        assert_eq!(
            findings.to_string().matches("is used twice in epoch 0").count(),
            4,
            "{findings}"
        );
    }

    #[test]
    fn decisions_act_when_they_say_and_rules_are_kept() {
        let decision = |id, line, effective, weights: &[f64]| Decision {
            id,
            line,
            effective,
            weights: Some(weights.to_vec()),
            veto: None,
            rollback: None,
        };
        let (mut walk, mut findings) = (walk(), Findings::default());
        let config = config();
        for _ in 0..4 {
            walk.plan(&mut findings);
        }
        walk.decide(&config, 4, &[decision(1, 4, 7, &[0.0, 1.0])]).unwrap();
        let b_alone: Vec<bool> = (4..9).map(|_| walk.plan(&mut findings).counts == [0, 4]).collect();
        assert_eq!(b_alone, [false, false, false, true, true]);
        let mut refused = |step, decision: Decision, part: &str| {
            let said = walk.decide(&config, step, &[decision]).unwrap_err();
            assert!(said.contains(part), "{said}");
        };
        refused(9, decision(2, 9, 20, &[1.0, 1.0]), "no decision point");
        refused(12, decision(2, 8, 20, &[1.0, 1.0]), "belongs to line 8");
        refused(12, decision(1, 12, 20, &[1.0, 1.0]), "comes behind decision 1");
        refused(12, decision(2, 12, 13, &[1.0, 1.0]), "sooner than 2 steps");
        refused(12, decision(2, 12, 20, &[1.0]), "1 weights for 2 domains");
        walk.decide(&config, 12, &[decision(5, 12, 20, &[1.0, 1.0])]).unwrap();
        assert!(
            walk.decide(&config, 12, &[decision(6, 12, 20, &[1.0, 2.0])])
                .unwrap_err()
                .contains("has a mixture already")
        );
    }

    #[test]
    fn a_veto_brings_back_what_was_before() {
        let sets = |id, line, weights: &[f64]| Decision {
            id,
            line,
            effective: line + 2,
            weights: Some(weights.to_vec()),
            veto: None,
            rollback: None,
        };
        let vetoes = |id, line, which| Decision {
            id,
            line,
            effective: line + 2,
            weights: None,
            veto: Some(which),
            rollback: None,
        };
        let (mut walk, mut findings) = (walk(), Findings::default());
        let config = config();
        walk.decide(&config, 4, &[sets(1, 4, &[0.0, 1.0])]).unwrap();
        walk.decide(&config, 8, &[vetoes(2, 8, 1)]).unwrap();
        let b_alone: Vec<bool> = (0..12).map(|_| walk.plan(&mut findings).counts == [0, 4]).collect();
        let expected: Vec<bool> = (0..12).map(|step| (6..10).contains(&step)).collect();
        assert_eq!(b_alone, expected);
        walk.decide(&config, 12, &[sets(3, 12, &[0.0, 1.0])]).unwrap();
        walk.decide(&config, 16, &[sets(4, 16, &[1.0, 1.0])]).unwrap();
        let late = walk.decide(&config, 20, &[vetoes(5, 20, 3)]).unwrap_err();
        assert!(late.contains("not in force any more"), "{late}");
        let twice = walk.decide(&config, 20, &[vetoes(6, 20, 1)]).unwrap_err();
        assert!(twice.contains("vetoed already"), "{twice}");
    }

    #[test]
    fn batches_grow_along_a_ramp() {
        let mut config = config();
        config.ramp = Some(super::super::config::Ramp {
            start: 1,
            step: 3,
            samples: 5,
        });
        let mut walk = Walk::new(&config, &domains(), [1; 32]).unwrap();
        let mut findings = Findings::default();
        let mut tokens = Vec::new();
        let sizes: Vec<usize> = (0..7)
            .map(|_| {
                tokens.push(walk.tokens_with_next(&config));
                walk.plan(&mut findings).samples.len()
            })
            .collect();
        assert_eq!(sizes, [1, 1, 1, 1, 1, 4, 4]);
        assert_eq!(tokens, [16, 32, 48, 64, 80, 144, 208]);
    }

    #[test]
    fn the_data_hash_depends_on_the_version_and_the_samples() {
        let mut findings = Findings::default();
        let mut other = Walk::new(&config(), &domains(), [2; 32]).unwrap();
        let (mut first, second) = (walk(), other.plan(&mut findings).data);
        let own = first.plan(&mut findings).data;
        assert_ne!(own, second);
        assert_ne!(own, first.plan(&mut findings).data);
        let mut names = domains();
        names.swap(0, 1);
        assert!(Walk::new(&config(), &names, [1; 32]).is_err());
    }
}
