//! What the domains of a run hold, by step: the data that it began with, and what decisions have changed since.
//!
//! An **edition** of a domain is one text: the first is that of the data set that a run began with, or that a new domain came
//! with; another replaces it from a step on. Domains are only ever added, behind those that are there, so a domain keeps its
//! number, its name, its quota and its carry for the whole run.
//!
//! - **DATA-1** The draws of an edition begin at 0, in an order of its own; those of the one before end where they stand.
//! - **DATA-2** All of it is a function of the recipe and of the decisions in their order.
//! - The hash that goes into the `data` of every line is chained: it names all data sets so far, so that two runs whose data
//!   changed differently differ in every line since.
//! - Held-out text is that of a domain's first edition for ever, so that a held-out loss stays comparable with those before.

use super::cursor::Recipe;
use super::decision::{DataChange, Decision, data_changes};
use std::sync::Arc;
use tarazed_domain::{DomainIndex, StepIndex};

const CHANGE_CONTEXT: &str = "tarazed data change v1";

/// Where text lies: a domain of a data set.
#[derive(Clone, PartialEq, Debug)]
pub struct Origin {
    /// The change that brought the data set; none for the one that the run began with.
    pub change: Option<Arc<DataChange>>,
    /// Its place in that data set.
    pub domain: DomainIndex,
}

/// What a domain of the run holds.
#[derive(Clone, PartialEq, Debug)]
pub struct Holding {
    /// Its name.
    pub name: String,
    /// What keys the order of its samples: the name, and behind `@` the version of the data set where it came later.
    pub order_key: String,
    /// Training sequences of one epoch.
    pub train_sequences: u64,
    /// Its training text.
    pub training: Origin,
    /// Its held-out text.
    pub held_out: Origin,
}

/// What there is from a step on.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Section {
    pub from: StepIndex,
    pub holdings: Arc<[Holding]>,
    /// Domains whose edition begins here.
    pub begun: Vec<usize>,
    /// Goes into the digest of every step.
    pub version: [u8; 32],
}

/// Everything that there is, by step.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Catalogue(Vec<Section>);

impl Catalogue {
    /// That of a recipe after these decisions, which a ledger has taken over.
    ///
    /// # Errors
    /// What a ledger cannot know: a name that is taken, or one that does not stay with its domain.
    pub(super) fn new(recipe: &Recipe, decisions: &[Decision]) -> Result<Self, String> {
        let first = (0_u16..).zip(&recipe.domains).map(|(domain, recipe)| Holding {
            name: recipe.name.clone(),
            order_key: recipe.name.clone(),
            train_sequences: recipe.train_sequences,
            training: Origin::first(domain),
            held_out: Origin::first(domain),
        });
        let mut sections = vec![Section {
            from: StepIndex(0),
            holdings: first.collect(),
            begun: Vec::new(),
            version: recipe.data_version,
        }];
        for (from, change) in data_changes(decisions) {
            // The first section is always there.
            let next = sections[sections.len() - 1].changed(from, change)?;
            sections.push(next);
        }
        Ok(Self(sections))
    }

    /// What there is at a step.
    pub(super) fn at(&self, step: StepIndex) -> &Section {
        let after = self.0.partition_point(|section| section.from <= step);
        &self.0[after - 1] // the first begins at step 0
    }

    /// All sections, the first of which is what the run began with.
    pub(super) fn sections(&self) -> &[Section] {
        &self.0
    }
}

impl Origin {
    fn first(domain: u16) -> Self {
        Self {
            change: None,
            domain: DomainIndex(domain),
        }
    }
}

impl Section {
    fn changed(&self, from: StepIndex, change: &DataChange) -> Result<Self, String> {
        let shared = Arc::new(change.clone());
        let mut holdings = self.holdings.to_vec();
        let mut begun = Vec::with_capacity(change.domains.len());
        for edition in &change.domains {
            let at = usize::from(edition.domain);
            if let Some(other) = holdings.iter().position(|held| held.name == edition.name)
                && other != at
            {
                return Err(format!("'{}' is domain {other} already", edition.name));
            }
            let training = Origin {
                change: Some(Arc::clone(&shared)),
                domain: DomainIndex(edition.index),
            };
            let mut holding = Holding {
                name: edition.name.clone(),
                order_key: format!("{}@{}", edition.name, change.version),
                train_sequences: edition.train_sequences,
                held_out: training.clone(),
                training,
            };
            match holdings.get_mut(at) {
                Some(held) if held.name != edition.name => {
                    return Err(format!("domain {at} is '{}', not '{}'", held.name, edition.name));
                }
                Some(held) => {
                    holding.held_out = held.held_out.clone();
                    *held = holding;
                }
                None => holdings.push(holding),
            }
            begun.push(at);
        }
        Ok(Self {
            from,
            holdings: holdings.into(),
            begun,
            version: chained(&self.version, change),
        })
    }
}

fn chained(before: &[u8; 32], change: &DataChange) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(CHANGE_CONTEXT);
    hasher.update(before);
    hasher.update(change.version.as_bytes());
    for edition in &change.domains {
        hasher.update(&edition.domain.to_le_bytes());
        hasher.update(&edition.index.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}
