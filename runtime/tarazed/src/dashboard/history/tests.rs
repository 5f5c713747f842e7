//! Thinning, by what the points say.

use super::*;

/// A line with losses that differ by step, and a mixture that never changes.
fn line(step: u64) -> Line<'static> {
    Line {
        step,
        tokens: Some(step.saturating_mul(100)),
        loss: Some(loss(step)),
        grad_norm: Some(1.0),
        lr: Some(1e-3 / step as f64),
        mixture: vec![("web", 0.75), ("书籍", 0.25)],
        held_out: Vec::new(),
    }
}

fn loss(step: u64) -> f64 {
    5.0 + (step % 7) as f64
}

fn of_steps(steps: std::ops::RangeInclusive<u64>) -> History {
    let mut history = History::default();
    steps.for_each(|step| {
        history.line(&line(step));
        history.speed(step, Some(step as f64));
    });
    history
}

fn numbers(of: &Value) -> Vec<f64> {
    let list = of.as_array().expect("a list").iter();
    list.map(|number| number.as_f64().expect("a number")).collect()
}

#[test]
fn a_short_run_is_told_step_by_step() {
    let told = of_steps(1..=1_000).since(0);
    assert_eq!((&told["width"], &told["through"]), (&1.into(), &1_000.into()));
    let expected: Vec<f64> = (1..=1_000).map(loss).collect();
    for which in ["min", "mean", "max"] {
        assert_eq!(numbers(&told["loss"][which]), expected, "{which}");
    }
    assert_eq!(told["step"].as_array().map(Vec::len), Some(1_000));
    assert_eq!((&told["tokens"][6], &told["step"][6]), (&700.into(), &7.into()));
    assert_eq!(numbers(&told["tokens_per_s"]["mean"])[..3], [1.0, 2.0, 3.0]);
}

/// Every length up to some thousand: buckets are aligned, few enough, not needlessly wide, and lose no extreme and no step.
#[test]
fn points_are_few_and_honest() {
    let mut history = History::default();
    for step in 1..=9_000_u64 {
        let spike = if step == 4_321 { 99.0 } else { loss(step) };
        history.line(&Line {
            loss: Some(spike),
            ..line(step)
        });
        if step % 977 != 0 && step != 9_000 {
            continue;
        }
        let told = history.since(0);
        let width = told["width"].as_u64().expect("a number");
        let points = told["step"].as_array().expect("a list").len() as u64;
        assert_eq!(points, step.div_ceil(width), "{step}");
        assert!(
            points <= POINTS_MAX as u64 && (width == 1 || points > POINTS_MAX as u64 / 2),
            "{step}"
        );
        let (least, mean, greatest) = (
            numbers(&told["loss"]["min"]),
            numbers(&told["loss"]["mean"]),
            numbers(&told["loss"]["max"]),
        );
        for bucket in 0..points {
            let (first, last) = (bucket * width + 1, ((bucket + 1) * width).min(step));
            let held: Vec<f64> = (first..=last)
                .map(|step| if step == 4_321 { 99.0 } else { loss(step) })
                .collect();
            let at = bucket as usize;
            assert_eq!(least[at], held.iter().copied().fold(f64::MAX, f64::min));
            assert_eq!(greatest[at], held.iter().copied().fold(f64::MIN, f64::max));
            let expected = held.iter().sum::<f64>() / held.len() as f64;
            assert!((mean[at] - expected).abs() < 1e-9, "{} and {expected}", mean[at]);
            assert_eq!(
                (&told["step"][at], &told["tokens"][at]),
                (&last.into(), &(last * 100).into())
            );
        }
        assert_eq!(greatest.contains(&99.0), step >= 4_321, "the spike is there");
    }
}

/// Whoever looks all the time has in the end what one gets who looks once.
#[test]
fn points_that_are_told_stay() {
    let (mut history, mut held) = (History::default(), Vec::<(u64, Value)>::new());
    let (mut width, mut through) = (1, 0);
    let points = |told: &Value| -> Vec<(u64, Value)> {
        let steps = told["step"].as_array().expect("a list").iter().enumerate();
        let point = |(at, step): (usize, &Value)| {
            let told = json!([
                step,
                told["loss"]["max"][at],
                told["lr"][at],
                told["tokens_per_s"]["mean"][at]
            ]);
            (step.as_u64().expect("a number"), told)
        };
        steps.map(point).collect()
    };
    for step in 1..=5_000_u64 {
        history.line(&line(step));
        // Metrics come later than the trace.
        if step > 10 {
            history.speed(step - 10, Some(step as f64));
        }
        if step % 83 != 0 && step != 5_000 {
            continue;
        }
        let mut told = history.since(through);
        if told["width"] != width {
            width = told["width"].as_u64().expect("a number");
            held.clear();
            told = history.since(0);
        }
        through = told["through"].as_u64().expect("a number");
        for (last, point) in points(&told) {
            held.retain(|(known, _)| (known - 1) / width != (last - 1) / width);
            held.push((last, point));
        }
    }
    assert_eq!(held, points(&history.since(0)));
}

/// Nothing but what is new.
#[test]
fn only_what_is_asked_for_is_told() {
    let history = of_steps(1..=4_000);
    let told = history.since(3_990);
    assert_eq!(
        (&told["width"], &told["step"]),
        (&4.into(), &json!([3_992, 3_996, 4_000]))
    );
    assert_eq!(history.since(4_000)["step"], json!([]));
    assert_eq!(history.since(u64::MAX)["loss"]["mean"], json!([]));
}

#[test]
fn what_is_not_finite_or_not_there_is_left_out() {
    let mut history = History::default();
    history.line(&Line {
        step: 1,
        loss: Some(f64::NAN),
        grad_norm: None,
        lr: Some(f64::INFINITY),
        ..Line::default()
    });
    history.line(&line(2));
    let told = history.since(0);
    assert_eq!(told["loss"]["mean"], json!([null, loss(2)]));
    assert_eq!(told["grad_norm"]["max"], json!([null, 1.0]));
    assert_eq!(told["lr"], json!([null, 1e-3 / 2.0]));
    assert_eq!(told["tokens"], json!([null, 200]));
    assert_eq!(told["tokens_per_s"]["min"], json!([null, null]));
    assert_eq!(told["through"], 0, "no metrics yet");
}

/// A mixture is told where it changes, with the step of the change; domains that come later stand behind.
#[test]
fn a_mixture_is_told_where_it_changes() {
    let mut history = of_steps(1..=5);
    let changed = |step, mixture: &[(&'static str, f64)]| Line {
        mixture: mixture.to_vec(),
        ..line(step)
    };
    history.line(&changed(6, &[("web", 0.5), ("书籍", 0.5)]));
    history.line(&changed(7, &[("web", 0.5), ("书籍", 0.5)]));
    history.line(&changed(8, &[("web", 0.5), ("code", 0.25), ("书籍", 0.25)]));
    let told = history.since(0);
    assert_eq!(told["mixture"]["names"], json!(["web", "书籍", "code"]));
    assert_eq!(
        told["mixture"]["points"],
        json!([[1, [0.75, 0.25]], [6, [0.5, 0.5]], [8, [0.5, 0.25, 0.25]]])
    );
    assert_eq!(history.since(6)["mixture"]["points"], json!([[8, [0.5, 0.25, 0.25]]]));
}

/// Evaluations keep their steps; of several in one bucket the last is told.
#[test]
fn held_out_losses_keep_their_steps() {
    let mut history = History::default();
    for step in 1..=3_000 {
        let held_out = if step % 10 == 0 {
            vec![("web", loss(step)), ("all en", loss(step) + 0.5)]
        } else {
            Vec::new()
        };
        history.line(&Line { held_out, ..line(step) });
    }
    let told = history.since(0);
    assert_eq!(
        (&told["width"], &told["heldout"]["names"]),
        (&4.into(), &json!(["web", "all en"]))
    );
    let points = told["heldout"]["points"].as_array().expect("a list");
    assert_eq!(points.len(), 300, "no two in one bucket of 4");
    assert_eq!(points[2], json!([30, [loss(30), loss(30) + 0.5]]));
    assert_eq!(
        told["mixture"]["points"],
        json!([[1, [0.75, 0.25]]]),
        "it never changes"
    );
}

/// Whatever number a damaged file holds, memory is bounded.
#[test]
fn an_absurd_step_is_no_end() {
    let mut history = of_steps(1..=100);
    history.line(&line(u64::MAX));
    history.line(&line(0));
    let told = history.since(0);
    assert!(told["step"].as_array().expect("a list").len() <= 2, "{told}");
    assert!(history.buckets.len() <= POINTS_MAX);
}
