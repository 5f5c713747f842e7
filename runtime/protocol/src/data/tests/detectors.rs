//! How often detectors cry wolf on recorded curves, and what they miss of events planted in them: the table of docs/MONITOR.md, which
//! `--nocapture` prints.

use super::*;
use std::fmt::Write as _;

/// Name and lines of each curve: a mixture that adapts after ADO, a fixed one of a larger model whose rate decays at the end (WSD), and
/// one that adapts after ODM, by steps that are larger. With what is held of it: at most so many of its own lines called a spike, and
/// more than so many of the gradient norms that are 9 sigma higher.
const CURVES: [(&str, &str, f64, f64); 3] = [
    ("ado", include_str!("recorded/small.txt"), 0.002, 0.95),
    ("static, wsd", include_str!("recorded/wsd.txt"), 0.01, 0.9),
    ("odm", include_str!("recorded/odm.txt"), 0.01, 0.9),
];
/// Places for events: far enough apart that none sees another, behind the warm-up and its steep fall.
const FIRST_PLACE: usize = 600;
const PLACES_APART: usize = 37;

fn recorded(curve: &str) -> Vec<TraceLine> {
    let rows = curve.lines().filter(|row| !row.starts_with('#'));
    let lines = rows.enumerate().map(|(index, row)| {
        let numbers: Vec<f64> = row.split(' ').map(|number| number.parse().unwrap()).collect();
        let names = ["zh", "en"].map(str::to_owned);
        let losses = [(numbers[1], numbers[2]), (numbers[3], numbers[4])];
        let seen = names
            .iter()
            .cloned()
            .zip(losses)
            .filter(|(_, (_, sequences))| *sequences > 0.0);
        let step = StepIndex(index as u64);
        let mut line = TraceLine {
            step: step.completed(),
            tokens: (step.0 + 1) * 8 * 64,
            data: [0; 32],
            loss: 0.0,
            grad_norm: numbers[0],
            state: [0; 32],
            lr: 3e-3,
            mixture: DomainMap(names.iter().cloned().zip([numbers[5], 1.0 - numbers[5]]).collect()),
            domains: DomainMap(
                seen.map(|(name, (loss, sequences))| {
                    let tokens = sequences as u64 * 64;
                    (name, DomainLoss { loss, tokens })
                })
                .collect(),
            ),
            heldout: None,
            lane_squares: None,
            skipped: false,
            lineage: None,
            decisions: Vec::new(),
        };
        settle_loss(&mut line);
        line
    });
    lines.collect()
}

/// The mean over tokens, as a rank forms it.
fn settle_loss(line: &mut TraceLine) {
    let (sum, tokens) = line.domains.iter().fold((0.0, 0.0), |(sum, tokens), (_, seen)| {
        (sum + seen.loss * seen.tokens as f64, tokens + seen.tokens as f64)
    });
    line.loss = sum / tokens;
}

fn raise(line: &mut TraceLine, nats: f64) {
    for (_, seen) in &mut line.domains.0 {
        seen.loss += nats;
    }
    settle_loss(line);
}

fn monitor() -> Tsm {
    let fact = |name: &str, weight: f64| DomainFacts {
        name: name.into(),
        language: Language::En,
        weight,
        train_tokens: 300_000,
        train_sequences: 300_000 / CONTEXT_TOKENS,
    };
    Tsm::new(vec![fact("zh", 0.4), fact("en", 0.6)])
}

/// What was seen of an event planted at each place.
struct Seen {
    places: usize,
    found: usize,
}

impl Seen {
    fn rate(&self) -> f64 {
        self.found as f64 / self.places as f64
    }
}

/// Plants an event at every place in turn: `change` alters the lines from there on (0 is the first), `is_seen` looks at
/// their signals, for so many lines.
fn plant(
    lines: &[TraceLine],
    for_lines: usize,
    change: impl Fn(usize, &mut TraceLine),
    is_seen: impl Fn(&Signals) -> bool,
) -> Seen {
    let mut tsm = monitor();
    let mut seen = Seen { places: 0, found: 0 };
    for (place, line) in lines.iter().enumerate() {
        let whole = place + for_lines <= lines.len();
        if place >= FIRST_PLACE && place % PLACES_APART == 0 && whole {
            let mut trial = tsm.clone();
            seen.places += 1;
            let found = lines[place..place + for_lines].iter().enumerate().any(|(index, line)| {
                let mut line = line.clone();
                change(index, &mut line);
                is_seen(&trial.on_line(&line).unwrap())
            });
            seen.found += usize::from(found);
        }
        tsm.on_line(line).unwrap();
    }
    seen
}

/// The spread of residual loss and gradient norm on the second half of the recorded curve: what "6 sigma" is there.
fn sigmas(lines: &[TraceLine]) -> [f64; 2] {
    let mut tsm = monitor();
    let signals: Vec<Signals> = lines.iter().map(|line| tsm.on_line(line).unwrap()).collect();
    let late = &signals[signals.len() / 2..];
    let mean = |sigma: fn(&Signals) -> f64| late.iter().map(sigma).sum::<f64>() / late.len() as f64;
    [
        mean(|signals| signals.residual_loss.window.sigma),
        mean(|signals| signals.grad_norm.window.sigma),
    ]
}

/// Shares of lines that were called something, or of events that were seen.
struct Rates {
    /// Of the curve's lines, with nothing planted.
    spikes: f64,
    divergences: f64,
    /// Of planted events, by their size.
    loss_4_sigma: f64,
    loss_9_sigma: f64,
    norm_3_sigma: f64,
    norm_9_sigma: f64,
    reweighted: f64,
    single_spike: f64,
    slow_divergence: f64,
    fast_divergence: f64,
}

impl Rates {
    /// Each with what it is of.
    fn rows(&self) -> [(&'static str, f64); 10] {
        [
            ("lines called a spike", self.spikes),
            ("lines called a divergence", self.divergences),
            ("spikes of 4 sigma called one", self.loss_4_sigma),
            ("spikes of 9 sigma called one", self.loss_9_sigma),
            ("gradient norms of 3 sigma more called a spike", self.norm_3_sigma),
            ("gradient norms of 9 sigma more called a spike", self.norm_9_sigma),
            (
                "changes of the mixture called anything within 64 lines",
                self.reweighted,
            ),
            (
                "single spikes of 2 nats called a divergence within 64 lines",
                self.single_spike,
            ),
            (
                "divergences of 0.01 nats a line seen within 160 lines",
                self.slow_divergence,
            ),
            (
                "divergences of 0.05 nats a line seen within 160 lines",
                self.fast_divergence,
            ),
        ]
    }

    fn of(lines: &[TraceLine]) -> Self {
        let mut tsm = monitor();
        let calm: Vec<Signals> = lines.iter().map(|line| tsm.on_line(line).unwrap()).collect();
        let called = |what: &dyn Fn(&Signals) -> bool| {
            calm.iter().filter(|signals| what(signals)).count() as f64 / calm.len() as f64
        };
        let [loss_sigma, norm_sigma] = sigmas(lines);
        let spike = |sigmas: f64| {
            let raised = |_: usize, line: &mut TraceLine| raise(line, sigmas * loss_sigma);
            plant(lines, 1, raised, |signals| signals.residual_loss.spike).rate()
        };
        let norm = |sigmas: f64| {
            let louder = |_: usize, line: &mut TraceLine| line.grad_norm += sigmas * norm_sigma;
            plant(lines, 1, louder, |signals| signals.grad_norm.spike).rate()
        };
        // Seven of eight sequences of one domain instead of a mixture: the loss moves, its residual does not. The recorded mean
        // of that domain is one over two or three sequences, so seven of it are noisier here than they would be.
        let reweigh = |_: usize, line: &mut TraceLine| {
            if let [(_, zh), (_, en)] = &mut line.domains.0[..] {
                (zh.tokens, en.tokens) = (7 * 64, 64);
            }
            settle_loss(line);
        };
        let anything = |signals: &Signals| signals.residual_loss.spike || signals.divergence.is_some();
        let diverges = |signals: &Signals| signals.divergence.is_some();
        let drift = |rise: f64| {
            let rises = |index: usize, line: &mut TraceLine| raise(line, rise * (index + 1) as f64);
            plant(lines, 160, rises, diverges).rate()
        };
        let once = |index: usize, line: &mut TraceLine| raise(line, if index == 0 { 2.0 } else { 0.0 });
        Self {
            spikes: called(&Signals::spike),
            divergences: called(&diverges),
            loss_4_sigma: spike(4.0),
            loss_9_sigma: spike(9.0),
            norm_3_sigma: norm(3.0),
            norm_9_sigma: norm(9.0),
            reweighted: plant(lines, 64, reweigh, anything).rate(),
            single_spike: plant(lines, 64, once, diverges).rate(),
            slow_divergence: drift(0.01),
            fast_divergence: drift(0.05),
        }
    }
}

#[test]
fn false_alarms_and_misses_on_recorded_curves() {
    let all = CURVES.map(|(name, curve, ..)| (name, Rates::of(&recorded(curve)).rows()));
    let mut table = String::from("|");
    for (name, _) in &all {
        let _infallible = write!(table, " | {name}");
    }
    for row in 0..all[0].1.len() {
        let _infallible = write!(table, " |\n| {}", all[0].1[row].0);
        for (_, rows) in &all {
            let _infallible = write!(table, " | {:.1} %", 100.0 * rows[row].1);
        }
    }
    println!("{table} |");
    for (name, curve, spikes_max, norms_min) in CURVES {
        let rates = Rates::of(&recorded(curve));
        assert!(
            rates.spikes < spikes_max && rates.divergences == 0.0,
            "{name}:\n{table}"
        );
        assert!(
            rates.loss_4_sigma < 0.1 && rates.loss_9_sigma > 0.95,
            "{name}:\n{table}"
        );
        assert!(
            rates.norm_3_sigma < 0.1 && rates.norm_9_sigma > norms_min,
            "{name}:\n{table}"
        );
        assert!(rates.reweighted < 0.05 && rates.single_spike == 0.0, "{name}:\n{table}");
        assert!(
            rates.slow_divergence > 0.95 && rates.fast_divergence == 1.0,
            "{name}:\n{table}"
        );
    }
}

/// A plateau is seen where the fall is taken out of the recorded curve, and mostly not where it falls fast.
#[test]
fn plateaus_on_a_recorded_curve() {
    let lines = recorded(CURVES[0].1);
    let mut tsm = monitor();
    let calm: Vec<Signals> = lines.iter().map(|line| tsm.on_line(line).unwrap()).collect();
    let early = &calm[255..600];
    let called = early.iter().filter(|signals| signals.plateau == Some(true)).count();
    println!(
        "{called} of {} lines in the steep part are called a plateau",
        early.len()
    );
    assert_eq!(called, 0);
    // From each place on the domains' losses go on around their level of the place: noise as recorded, no trend.
    let level = |from: usize, name: &str| {
        let window = &lines[from - 64..from];
        let losses = window
            .iter()
            .filter_map(|line| line.domains.get(name))
            .map(|seen| seen.loss);
        losses.clone().sum::<f64>() / losses.count() as f64
    };
    let mut found = 0;
    let places: Vec<usize> = (FIRST_PLACE..lines.len() - 400).step_by(97).collect();
    for &place in &places {
        let mut tsm = monitor();
        for line in &lines[..place] {
            tsm.on_line(line).unwrap();
        }
        let is_seen = (place..place + 400).any(|at| {
            let mut line = lines[at].clone();
            let moving = (at.min(lines.len() - 1)).max(64);
            for (name, seen) in &mut line.domains.0 {
                seen.loss += level(place, name) - level(moving, name);
            }
            settle_loss(&mut line);
            tsm.on_line(&line).unwrap().plateau == Some(true)
        });
        found += usize::from(is_seen);
    }
    println!("{found} of {} planted plateaus are seen within 400 lines", places.len());
    assert!(found * 100 >= places.len() * 95, "{found} of {}", places.len());
}
