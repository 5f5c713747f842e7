//! People who decide (LOOP-2): they ask the controller that is there for something, at any moment, and what becomes of it
//! stands in the trace.
//!
//! - What is granted stands in the line that was named, where the controller that granted it writes that line; a request is
//!   lost with its controller, or with the closed loop of that, which may die.
//! - The trace holds nothing that nobody asked for, and nothing twice.
//! - A rollback is granted and may still not come: where the policy goes back first, the state that it named may be none to go
//!   back to any more.

use super::random::Random;
use super::scenario::CONTEXT;
use super::world::World;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tarazed_actors::controller::RequestAnswer;
use tarazed_domain::{StepIndex, StepsCompleted};
use tarazed_protocol::data::controller::Request;
use tarazed_protocol::data::decision::{
    DataChange, Decision, DecisionAuthor, DecisionId, DecisionKind, DomainEdition, SpikeBounds,
};
use tarazed_protocol::trace::TraceLine;
use tokio::time::Instant;

/// They wait so long for an answer.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Domains that a run begins with.
const DOMAINS: u16 = 2;
/// Steps that they look ahead, at most.
const AHEAD_STEPS_MAX: u64 = 12;

/// What was asked for, and what became of it.
#[derive(Default)]
pub struct Persons(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    asked: BTreeMap<String, Asked>,
    newest: DecisionId,
    /// Domains by all that is decided.
    domains: u16,
    written: StepsCompleted,
    /// When a closed loop died the last time.
    loop_died: Option<Instant>,
}

struct Asked {
    kind: DecisionKind,
    not_before: Option<StepIndex>,
    is_refused: bool,
    /// By which controller, for which line, from which step on.
    granted: Option<(u64, StepsCompleted, StepIndex)>,
    is_recorded: bool,
}

/// Asks now and then, until the faults are over.
pub async fn decide(world: Arc<World>) {
    let mut random = world.random("persons", 0);
    let every_ms = random.pick(&[60.0, 200.0, 500.0]);
    while world.scenario.persons && !world.is_calm() {
        tokio::time::sleep(Duration::from_millis(random.waiting_ms(every_ms))).await;
        ask(&world, &mut random);
    }
}

/// Somebody asks for something.
pub fn ask(world: &Arc<World>, random: &mut Random) {
    let Some(life) = world.life().filter(|life| life.is_alive()) else {
        return;
    };
    let request = world.persons.think(random);
    let (person, number) = (request.person.clone(), life.number);
    world.history.note(&format!(
        "{person} asks controller {number} for {:?} from {:?} on",
        request.kind, request.not_before
    ));
    let (told, asked) = (Arc::clone(world), Instant::now());
    life.ask(request, move |answer| {
        told.history.note(&format!("{person} is told {answer:?}"));
        told.persons.answered(&person, number, asked, answer);
    });
}

impl Persons {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn think(&self, random: &mut Random) -> Request {
        let mut inner = self.lock();
        let domains = inner.domains.max(DOMAINS);
        let kind = match random.between(0, 16) {
            0..=2 => DecisionKind::Mixture {
                weights: weights(random, domains),
            },
            3 => DecisionKind::Pin,
            4 => DecisionKind::Release,
            5 | 6 => DecisionKind::LearningRate {
                factor: random.between(50, 200) as f64 / 100.0,
            },
            7 | 8 => DecisionKind::Veto {
                decision: DecisionId(random.between(1, inner.newest.0 + 1)),
            },
            9 => DecisionKind::SpikeBounds(SpikeBounds {
                expected: (0..domains).map(|_| random.chance(0.7).then_some(5.0)).collect(),
                residual_loss: random.between(0, 20) as f64 / 10.0,
                grad_norm: random.between(1, 60) as f64 / 10.0,
            }),
            10 => DecisionKind::Decay,
            11..=13 => DecisionKind::Data(change(random, domains)),
            14 | 15 => DecisionKind::Rollback {
                to: StepsCompleted(random.between(0, inner.written.0)),
                discarded: Vec::new(),
            },
            _ => DecisionKind::Stop,
        };
        // Most runs come to their end, and data change at a step that is still to be decided.
        let late = matches!(kind, DecisionKind::Stop | DecisionKind::Data(_)) || random.chance(0.3);
        let ahead = random.between(0, AHEAD_STEPS_MAX);
        let person = format!("person {}", inner.asked.len());
        let not_before = late.then(|| StepIndex(inner.written.0 + ahead));
        let asked = Asked {
            kind: kind.clone(),
            not_before,
            is_refused: false,
            granted: None,
            is_recorded: false,
        };
        inner.asked.insert(person.clone(), asked);
        Request {
            person,
            kind,
            not_before,
            reason: "they like it".to_owned(),
        }
    }

    fn answered(&self, person: &str, controller: u64, asked_at: Instant, answer: Option<RequestAnswer>) {
        let mut inner = self.lock();
        // Of what was granted before, nothing is left.
        let is_kept = inner.loop_died.is_none_or(|died| died < asked_at);
        if let Some(asked) = inner.asked.get_mut(person) {
            match answer {
                Some(Ok((line, step))) if is_kept => asked.granted = Some((controller, line, step)),
                Some(Err(_)) => asked.is_refused = true,
                Some(Ok(_)) | None => {}
            }
        }
    }

    /// What a controller has granted, and not decided yet, is lost with its closed loop.
    pub fn loop_dies(&self, controller: u64) {
        let mut inner = self.lock();
        inner.loop_died = Some(Instant::now());
        for asked in inner.asked.values_mut() {
            asked.granted = asked.granted.filter(|(by, ..)| *by != controller);
        }
    }

    /// How much of what they asked for stands in the trace.
    pub fn recorded_count(&self) -> u64 {
        let inner = self.lock();
        inner.asked.values().filter(|asked| asked.is_recorded).count() as u64
    }

    /// A controller has written a line with these decisions: what of it is as it should be, as far as persons are concerned.
    ///
    /// # Errors
    /// What is not.
    pub fn recorded(&self, controller: u64, line: StepsCompleted, decisions: &[Decision]) -> Result<(), String> {
        let mut inner = self.lock();
        inner.written = line;
        for decision in decisions {
            inner.newest = inner.newest.max(decision.id);
            if let DecisionKind::Data(change) = &decision.kind {
                let newest = change.domains.iter().map(|edition| edition.domain + 1).max();
                inner.domains = inner.domains.max(newest.unwrap_or_default());
            }
            let DecisionAuthor::Person(person) = &decision.by else {
                continue;
            };
            let asked = inner.asked.get_mut(person);
            let asked = asked.ok_or_else(|| format!("line {line} holds what {person} never asked for"))?;
            if std::mem::replace(&mut asked.is_recorded, true) {
                return Err(format!("line {line} holds what {person} decided a second time"));
            }
            let promised = asked.granted.filter(|(by, ..)| *by == controller);
            let kept = promised.is_none_or(|(_, at, from)| (at, from) == (line, decision.effective));
            let early = asked.not_before.is_some_and(|step| decision.effective < step);
            if !kept || early || asked.is_refused || !is_asked(&asked.kind, &decision.kind) {
                return Err(format!(
                    "line {line} holds {decision:?}, and {person} was told {promised:?}"
                ));
            }
        }
        let broken = inner.asked.iter().find(|(_, asked)| {
            let due = asked.granted.is_some_and(|(by, at, _)| (by, at) == (controller, line));
            due && !asked.is_recorded && !matches!(asked.kind, DecisionKind::Rollback { .. })
        });
        match broken {
            Some((person, _)) => Err(format!("line {line} does not hold what {person} was granted")),
            None => Ok(()),
        }
    }
}

/// Whether what is decided is what was asked for, up to what the engine fills in: what a rollback discards, and shares of new
/// domains.
fn is_asked(asked: &DecisionKind, decided: &DecisionKind) -> bool {
    match (asked, decided) {
        (DecisionKind::Rollback { to: asked, .. }, DecisionKind::Rollback { to, .. }) => asked == to,
        (DecisionKind::Data(asked), DecisionKind::Data(change)) if !asked.states_mixture() => {
            (&asked.version, &asked.domains) == (&change.version, &change.domains) && !change.states_mixture()
        }
        (asked, decided) => asked == decided,
    }
}

fn weights(random: &mut Random, domains: u16) -> Vec<f64> {
    (0..domains).map(|_| random.between(1, 9) as f64).collect()
}

/// Other text for a domain, or another domain.
fn change(random: &mut Random, domains: u16) -> DataChange {
    let domain = random.between(0, u64::from(domains.min(DOMAINS))) as u16;
    let train_sequences = random.between(5, 90);
    let edition = DomainEdition {
        name: ["one", "two", "three"][usize::from(domain)].to_owned(),
        domain,
        index: random.between(0, 3) as u16,
        language: "en".to_owned(),
        train_sequences,
        train_tokens: train_sequences * CONTEXT,
    };
    let is_new = domain >= domains;
    let weights = match random.between(0, 3) {
        0 => Vec::new(),
        1 if is_new => vec![random.between(5, 30) as f64 / 100.0],
        _ => weights(random, domains.max(domain + 1)),
    };
    DataChange {
        version: blake3::hash(&random.bits().to_le_bytes()).to_hex().to_string(),
        domains: vec![edition],
        weights,
    }
}

/// The decisions in a line.
///
/// # Errors
/// If it is no line.
pub fn decisions_in(text: &str) -> Result<Vec<Decision>, String> {
    let line = TraceLine::parse(text, 0).map_err(|e| e.to_string())?;
    Ok(line.decisions)
}
