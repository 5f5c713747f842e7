//! Tests across the modules, on a world in which losses follow known laws.

mod arrivals;
mod change;
mod controller;
mod controllers;
mod course;
mod cursor;
mod decision;
mod detectors;
mod epochs;
mod rollback;
mod signals;
mod stats;

use super::controller::Ate;
use super::cursor::{DataCursor, DomainRecipe, Recipe};
use super::decision::{Decision, DecisionAuthor, DecisionId, DecisionKind, DecisionSchedule};
use super::signals::{Signals, Tsm};
use super::{DomainFacts, LoopConfig};
use crate::trace::{DomainLoss, DomainMap, TraceLine};
use std::collections::BTreeMap;
use tarazed_domain::config::{
    BatchSchedule, ControllerKind, Language, LearningRateSchedule, MixtureConfig, PolicyConfig,
};
use tarazed_domain::{StepIndex, StepsCompleted};

pub const CONTEXT_TOKENS: u64 = 64;

/// A domain whose losses are known beforehand: `floor + scale * tokens^-exponent`.
#[derive(Clone, Debug)]
pub struct Law {
    pub name: &'static str,
    pub language: Language,
    pub weight: f64,
    pub train_sequences: u64,
    pub floor: f64,
    pub scale: f64,
    pub exponent: f64,
}

pub fn law(name: &'static str, weight: f64, train_sequences: u64, floor: f64, scale: f64, exponent: f64) -> Law {
    Law {
        name,
        language: Language::En,
        weight,
        train_sequences,
        floor,
        scale,
        exponent,
    }
}

/// Three domains: `web` and `wiki` ordinary, `code` falling fast to a low floor.
pub fn laws() -> Vec<Law> {
    vec![
        law("web", 0.6, 1_000_000, 2.0, 20.0, 0.22),
        law("wiki", 0.3, 400_000, 1.8, 20.0, 0.25),
        law("code", 0.1, 200_000, 0.3, 30.0, 0.20),
    ]
}

pub fn ado() -> MixtureConfig {
    MixtureConfig {
        controller: ControllerKind::Ado,
        start_steps: 100,
        interval_steps: 50,
        lag_steps: 8,
        ..MixtureConfig::default()
    }
}

/// A loop that decides on the mixture alone, on global batches of 32 sequences.
pub fn mixture_loop(mixture: &MixtureConfig) -> LoopConfig {
    LoopConfig {
        mixture: mixture.clone(),
        policy: PolicyConfig::default(),
        rate: LearningRateSchedule::Constant { warmup_steps: 0 },
        batch: BatchSchedule::fixed(32),
        context_tokens: CONTEXT_TOKENS,
        rehearsed: BTreeMap::new(),
        planned: Vec::new(),
    }
}

pub fn engine(mixture: &MixtureConfig, facts: &[DomainFacts]) -> Ate {
    Ate::new(&mixture_loop(mixture), facts)
}

pub fn points(mixture: &MixtureConfig) -> DecisionSchedule {
    DecisionSchedule::new(mixture, &PolicyConfig::default())
}

pub fn recipe(laws: &[Law], sequences_per_step: u32) -> Recipe {
    Recipe {
        seed: 11,
        domains: laws
            .iter()
            .map(|law| DomainRecipe {
                name: law.name.to_owned(),
                train_sequences: law.train_sequences,
                weight: law.weight,
            })
            .collect(),
        batch: BatchSchedule::fixed(sequences_per_step),
        data_version: [9; 32],
    }
}

pub fn facts(laws: &[Law]) -> Vec<DomainFacts> {
    laws.iter()
        .map(|law| DomainFacts {
            name: law.name.to_owned(),
            language: law.language,
            weight: law.weight,
            train_tokens: law.train_sequences * CONTEXT_TOKENS,
            train_sequences: law.train_sequences,
        })
        .collect()
}

pub fn mixture_decision(id: u64, line: u64, effective: u64, weights: &[f64]) -> Decision {
    Decision {
        id: DecisionId(id),
        line: StepsCompleted(line),
        effective: StepIndex(effective),
        kind: DecisionKind::Mixture {
            weights: weights.to_vec(),
        },
        by: DecisionAuthor::Person("ada".into()),
        reason: "a test".into(),
    }
}

/// Noise of about one standard deviation, keyed: the same for the same arguments.
pub fn noise(step: u64, domain: u64) -> f64 {
    let hash = blake3::hash(&[step.to_le_bytes(), domain.to_le_bytes()].concat());
    let bytes = hash.as_bytes();
    (0..12).map(|i| f64::from(bytes[i]) / 256.0).sum::<f64>() - 6.0 + 6.0 / 256.0
}

/// A whole loop without a model: cursor, trace, signals, controller.
pub struct World {
    pub laws: Vec<Law>,
    pub cursor: DataCursor,
    pub tsm: Tsm,
    pub ate: Ate,
    pub lines: Vec<TraceLine>,
    pub evaluation_interval_steps: u64,
    pub noise: f64,
    tokens: Vec<u64>,
}

impl World {
    pub fn new(laws: Vec<Law>, mixture: &MixtureConfig) -> Self {
        Self::of(laws, &mixture_loop(mixture))
    }

    pub fn of(laws: Vec<Law>, config: &LoopConfig) -> Self {
        let facts = facts(&laws);
        let schedule = DecisionSchedule::new(&config.mixture, &config.policy);
        let mut recipe = recipe(&laws, 32);
        recipe.batch = config.batch.clone();
        Self {
            cursor: DataCursor::new(recipe, schedule).unwrap(),
            tsm: Tsm::new(facts.clone()),
            ate: Ate::new(config, &facts),
            lines: Vec::new(),
            evaluation_interval_steps: 50,
            noise: 0.02,
            tokens: vec![0; laws.len()],
            laws,
        }
    }

    /// Runs one step; `change` may alter the line as measured, before anyone sees it.
    pub fn step(&mut self, change: impl FnOnce(&mut TraceLine)) -> Signals {
        let step = StepIndex(self.lines.len() as u64);
        let plan = self.cursor.plan(step).unwrap();
        let mut line = TraceLine {
            step: step.completed(),
            tokens: self.cursor.recipe().batch.samples(step.completed()) * CONTEXT_TOKENS,
            data: plan.digest,
            loss: 0.0,
            grad_norm: 1.0 + 0.05 * noise(step.0, 99),
            state: [1; 32],
            lr: 1e-3,
            mixture: self.named(|domain, _| Some(plan.mixture[domain])),
            domains: DomainMap::default(),
            heldout: None,
            lane_squares: None,
            skipped: false,
            lineage: None,
            decisions: Vec::new(),
        };
        let (mut loss_sum, mut token_sum) = (0.0, 0.0);
        line.domains = self.named(|domain, law| {
            let tokens = u64::from(plan.counts[domain]) * CONTEXT_TOKENS;
            let loss = self.loss(law, domain, 1.0) + self.noise * noise(step.0, domain as u64);
            loss_sum += loss * tokens as f64;
            token_sum += tokens as f64;
            (tokens > 0).then_some(DomainLoss { loss, tokens })
        });
        line.loss = loss_sum / token_sum;
        for (tokens, count) in self.tokens.iter_mut().zip(&plan.counts) {
            *tokens += u64::from(*count) * CONTEXT_TOKENS;
        }
        if line.step.0.is_multiple_of(self.evaluation_interval_steps) {
            line.heldout = Some(self.named(|domain, law| {
                let loss = self.loss(law, domain, 1.0) + 0.2 * self.noise * noise(step.0, 1000 + domain as u64);
                Some(DomainLoss { loss, tokens: 4096 })
            }));
        }
        change(&mut line);
        let signals = self.tsm.on_line(&line).unwrap();
        line.decisions = self.ate.on_line(&line, &signals);
        self.cursor.complete(line.step, &mut line.decisions).unwrap();
        self.cursor.record(line.step, &line.decisions).unwrap();
        self.tsm.learn(&line.decisions);
        self.lines.push(line);
        signals
    }

    pub fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.step(|_| ());
        }
    }

    /// Room for laws that came since.
    pub fn grow(&mut self) {
        self.tokens.resize(self.laws.len(), 0);
    }

    pub fn mixtures(&self) -> Vec<&Decision> {
        self.lines.iter().flat_map(|line| &line.decisions).collect()
    }

    fn loss(&self, law: &Law, domain: usize, least: f64) -> f64 {
        law.floor + law.scale * (self.tokens[domain] as f64).max(least * 2048.0).powf(-law.exponent)
    }

    fn named<T>(&self, mut value: impl FnMut(usize, &Law) -> Option<T>) -> DomainMap<T> {
        let values = self.laws.iter().enumerate();
        DomainMap(
            values
                .filter_map(|(domain, law)| Some((law.name.to_owned(), value(domain, law)?)))
                .collect(),
        )
    }
}
