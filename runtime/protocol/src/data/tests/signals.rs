use super::*;
use crate::data::signals::{SPIKE_WINDOW_LINES_MIN, SignalError};

fn spikes(world: &mut World, steps: u64, change: impl Fn(u64, &mut TraceLine)) -> Vec<u64> {
    (0..steps)
        .filter_map(|_| {
            let step = world.lines.len() as u64 + 1;
            world.step(|line| change(step, line)).spike().then_some(step)
        })
        .collect()
}

fn raise(line: &mut TraceLine, nats: f64) {
    line.loss += nats;
    for (_, domain) in &mut line.domains.0 {
        domain.loss += nats;
    }
}

fn fixed() -> MixtureConfig {
    MixtureConfig::default()
}

#[test]
fn a_calm_run_has_no_spike_and_a_raised_loss_is_one() {
    let mut world = World::new(laws(), &fixed());
    assert_eq!(spikes(&mut world, 1000, |_, _| ()), Vec::<u64>::new());
    let found = spikes(&mut world, 300, |step, line| match step {
        1100 => raise(line, 0.5),
        1105 => raise(line, 0.2),
        _ => (),
    });
    assert_eq!(found, [1100, 1105], "the first spike does not hide the second");
}

#[test]
fn gradient_norms_spike_on_their_own() {
    let mut world = World::new(laws(), &fixed());
    let found = spikes(&mut world, 300, |step, line| {
        if step == 200 {
            line.grad_norm = 20.0;
        }
    });
    assert_eq!(found, [200]);
}

/// Nothing is called before there are enough lines, except what is not a number.
#[test]
fn early_lines_are_not_judged_but_non_finite_ones_are() {
    let mut world = World::new(laws(), &fixed());
    let found = spikes(&mut world, 60, |step, line| {
        if step == 30 {
            raise(line, 5.0);
        }
        if step == 40 {
            raise(line, f64::NAN);
        }
        if step == 50 {
            line.grad_norm = f64::INFINITY;
        }
    });
    const { assert!(SPIKE_WINDOW_LINES_MIN > 60) };
    assert_eq!(found, [40, 50]);
    assert!(
        spikes(&mut world, 200, |_, _| ()).is_empty(),
        "and they leave no trace in the statistics"
    );
}

/// A reweighting changes the loss by a nat and is no spike; the same jump of the loss without one is.
#[test]
fn reweighting_is_no_false_spike() {
    let laws = || {
        vec![
            law("easy", 0.9, 1_000_000, 1.0, 0.0, 0.2),
            law("hard", 0.1, 1_000_000, 6.0, 0.0, 0.2),
        ]
    };
    let mut config = ado();
    config.start_steps = 150;
    let mut world = World::new(laws(), &config);
    world.evaluation_interval_steps = 1_000_000;
    let force = crate::data::controller::Request {
        person: "ada".into(),
        kind: DecisionKind::Mixture {
            weights: vec![0.5, 0.5],
        },
        not_before: None,
        reason: "more of the hard one".into(),
    };
    world.ate.request(force).unwrap();
    assert!(spikes(&mut world, 300, |_, _| ()).is_empty());
    let jump = world.lines[200].loss - world.lines[100].loss;
    assert!(jump > 1.5, "the loss rose by {jump}, by the mixture alone");
    let mut control = World::new(laws(), &fixed());
    assert_eq!(
        spikes(&mut control, 200, |step, line| if step == 160 {
            raise(line, jump)
        }),
        [160]
    );
}

/// A lasting change of level is flagged at first, then accepted: no run stays frozen for ever.
#[test]
fn a_new_level_is_accepted() {
    for noise in [0.02, 0.0] {
        let mut world = World::new(laws(), &fixed());
        world.noise = noise;
        let found = spikes(&mut world, 900, |step, line| {
            if step > 300 {
                raise(line, 1.0);
            }
        });
        assert_eq!(found.first(), Some(&301));
        assert!(found.last().is_some_and(|last| *last < 500), "{found:?}");
    }
}

#[test]
fn a_plateau_is_seen_and_progress_is_none() {
    let mut world = World::new(laws(), &fixed());
    world.run(255);
    assert_eq!(world.step(|_| ()).plateau, None, "too few lines to say");
    assert_eq!(world.step(|_| ()).plateau, Some(false));
    let mut flat = World::new(
        vec![
            law("a", 0.5, 1_000_000, 2.0, 0.0, 0.2),
            law("b", 0.5, 1_000_000, 3.0, 0.0, 0.2),
        ],
        &fixed(),
    );
    flat.run(1000);
    assert_eq!(flat.step(|_| ()).plateau, Some(true));
}

#[test]
fn losses_tokens_and_epochs_are_those_of_the_trace() {
    let mut laws = laws();
    laws[1].language = Language::Zh;
    laws[2].train_sequences = 100;
    let mut world = World::new(laws, &fixed());
    world.run(499);
    let signals = world.step(|_| ());
    let total: u64 = signals.domains.iter().map(|domain| domain.tokens).sum();
    assert_eq!(total, signals.tokens);
    for (domain, law) in signals.domains.iter().zip(&world.laws) {
        let requested = law.weight * signals.tokens as f64;
        assert!((domain.tokens_requested - requested).abs() < 1e-3);
        assert!(
            (domain.tokens as f64 - requested).abs() <= CONTEXT_TOKENS as f64,
            "within one sequence"
        );
        let train = domain.train_loss.unwrap();
        assert!((train - domain.heldout_loss.unwrap()).abs() < 0.1, "{domain:?}");
    }
    let code = &signals.domains[2];
    assert_eq!(code.epochs, code.tokens as f64 / (100.0 * CONTEXT_TOKENS as f64));
    assert_eq!(signals.evaluated, Some(StepsCompleted(500)));
    let heldout = world.lines[499].heldout.clone().unwrap();
    let of = |name: &str| heldout.get(name).unwrap().loss;
    assert_eq!(signals.languages.len(), 2);
    assert_eq!(signals.languages[0].language, Language::En);
    assert!((signals.languages[0].heldout_loss - (of("web") + of("code")) / 2.0).abs() < 1e-12);
    assert_eq!(signals.languages[1].heldout_loss, of("wiki"));
    let macro_loss = (of("web") + of("wiki") + of("code")) / 3.0;
    assert!((signals.heldout_macro.unwrap() - macro_loss).abs() < 1e-12);
    let after = world.step(|_| ());
    assert_eq!(
        after.evaluated,
        Some(StepsCompleted(500)),
        "the newest evaluation stands until the next"
    );
    assert_eq!(after.heldout_macro, signals.heldout_macro);
}

/// LOOP-1: signals are a function of the lines, and those of the printed trace the same.
#[test]
fn signals_are_rebuilt_from_the_trace() {
    let mut world = World::new(laws(), &ado());
    let live: Vec<Signals> = (0..400).map(|_| world.step(|_| ())).collect();
    let mut tsm = Tsm::new(facts(&world.laws));
    for (line, live) in world.lines.iter().zip(live) {
        let line = TraceLine::parse(&line.print(), 1).unwrap();
        assert_eq!(tsm.on_line(&line).unwrap(), live);
    }
}

#[test]
fn a_foreign_trace_is_refused() {
    let mut world = World::new(laws(), &fixed());
    world.run(3);
    let mut line = world.lines[2].clone();
    let out_of_order = SignalError::OutOfOrder {
        expected: StepsCompleted(4),
        found: StepsCompleted(3),
    };
    assert_eq!(world.tsm.on_line(&line), Err(out_of_order));
    line.step = StepsCompleted(4);
    line.domains.0[0].0 = "paper".into();
    let unknown = SignalError::UnknownDomain {
        line: StepsCompleted(4),
        domain: "paper".into(),
    };
    assert_eq!(world.tsm.on_line(&line), Err(unknown));
    world.step(|_| ());
}

/// Lines made of a known gradient and a known noise give both back, and no noise without what it is made of.
#[test]
fn the_noise_scale_is_that_of_its_definition() {
    let (lanes, gradient_square, noise_trace) = (8.0, 4.0, 50_000.0);
    let mut world = World::new(laws(), &fixed());
    world.tsm = Tsm::new(facts(&laws())).with_lanes(8);
    assert_eq!(world.step(|_| ()).gradient_noise, None);
    let mut seen = None;
    for _ in 0..20 {
        let signals = world.step(|line| {
            let batch = (32 * CONTEXT_TOKENS) as f64;
            line.grad_norm = f64::sqrt(gradient_square + noise_trace / batch);
            line.lane_squares = Some((gradient_square + noise_trace / (batch / lanes)) / lanes);
        });
        seen = signals.gradient_noise;
    }
    let noise = seen.unwrap();
    assert!((noise.gradient_square - gradient_square).abs() < 1e-9, "{noise:?}");
    assert!((noise.noise_trace - noise_trace).abs() < 1e-4, "{noise:?}");
    assert!(
        (noise.scale_tokens.unwrap() - noise_trace / gradient_square).abs() < 1e-4,
        "{noise:?}"
    );
}

/// Bits per byte are nats over ln 2 and over the bytes of a token, for the domains whose bytes are known.
#[test]
fn losses_are_also_told_in_bits_per_byte() {
    use crate::data::signals::BytesPerToken;
    let mut world = World::new(laws(), &fixed());
    let bytes = |train: f64, heldout: f64| BytesPerToken { train, heldout };
    world.tsm = Tsm::new(facts(&laws())).with_bytes(vec![bytes(4.0, 5.0), bytes(0.0, 3.0)]);
    world.run(50);
    let signals = world.step(|_| ());
    let web = &signals.domains[0];
    assert_eq!(
        web.train_bits_per_byte,
        web.train_loss.map(|nats| nats / std::f64::consts::LN_2 / 4.0)
    );
    assert_eq!(
        web.heldout_bits_per_byte,
        web.heldout_loss.map(|nats| nats / std::f64::consts::LN_2 / 5.0)
    );
    assert_eq!(signals.domains[1].train_bits_per_byte, None);
    assert!(signals.domains[1].heldout_bits_per_byte.is_some());
    assert_eq!(
        signals.domains[2].heldout_bits_per_byte, None,
        "nothing is known of its bytes"
    );
}

/// A language's bits are over its bytes, whatever its domains' shares; where one domain's bytes are not known, neither are its.
#[test]
fn a_language_s_bits_are_over_its_bytes() {
    use crate::data::signals::BytesPerToken;
    let mut laws = laws();
    laws[1].language = Language::Zh;
    let mut world = World::new(laws.clone(), &fixed());
    let bytes = |heldout: f64| BytesPerToken { train: 1.0, heldout };
    world.tsm = Tsm::new(facts(&laws)).with_bytes(vec![bytes(4.0), bytes(0.0), bytes(2.0)]);
    let loss = |bits: f64, tokens: u64| DomainLoss {
        loss: bits * std::f64::consts::LN_2,
        tokens,
    };
    let signals = world.step(|line| {
        let losses = [
            ("web", loss(8.0, 100)),
            ("wiki", loss(6.0, 50)),
            ("code", loss(1.0, 300)),
        ];
        line.heldout = Some(DomainMap(losses.map(|(name, loss)| (name.to_owned(), loss)).to_vec()));
    });
    let of = |language| {
        signals
            .languages
            .iter()
            .find(|found| found.language == language)
            .unwrap()
    };
    // 800 bits over 400 bytes, 300 over 600.
    assert!((of(Language::En).heldout_bits_per_byte.unwrap() - 1.1).abs() < 1e-12);
    assert_eq!(of(Language::Zh).heldout_bits_per_byte, None);
}
