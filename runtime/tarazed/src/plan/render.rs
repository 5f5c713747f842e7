//! A plan as text.

use super::{Hardware, Plan, memory::Place};
use std::fmt::Write as _;

/// Bytes with three digits and a decimal unit.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 || value >= 99.95 {
        format!("{value:.0} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// Seconds in the unit a person would use.
#[must_use]
pub fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.0} us", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7_200.0 => format!("{:.1} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3_600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

/// Parameters as people say them.
#[must_use]
pub fn parameters(count: u64) -> String {
    match count {
        n if n >= 1_000_000_000 => format!("{:.2}B", n as f64 / 1e9),
        n => format!("{:.2}M", n as f64 / 1e6),
    }
}

/// The whole plan.
#[must_use]
pub fn text(plan: &Plan) -> String {
    let mut out = String::new();
    let hardware = match &plan.hardware {
        Hardware::Cpu { cores, memory_bytes } => format!(
            "{} CPU ranks on {cores} cores with {}",
            plan.ranks,
            bytes(*memory_bytes)
        ),
        Hardware::Gpu {
            count,
            name,
            memory_bytes,
            ..
        } => format!("{count} x {name} with {}", bytes(*memory_bytes)),
    };
    let (most, fewest) = plan.lanes_per_rank;
    let lanes = match (fewest, most) {
        (1, 1) => "1 lane".to_owned(),
        _ if most == fewest => format!("{most} lanes"),
        _ => format!("{fewest} to {most} lanes"),
    };
    let _ = writeln!(
        out,
        "{}: {} parameters, {} tokens a step, {hardware}, {lanes} a rank\n",
        plan.name,
        parameters(plan.parameters),
        plan.tokens_per_step
    );
    let _ = writeln!(out, "Memory of the worst-placed rank");
    for term in &plan.terms {
        let place = if term.place == Place::Host { " (host)" } else { "" };
        let _ = writeln!(
            out,
            "  {:<20} {:>9}{place:<7} {}",
            term.name,
            bytes(term.bytes),
            term.formula
        );
    }
    let verdict = if plan.fits { "fits" } else { "does not fit" };
    let _ = writeln!(
        out,
        "  {:<20} {:>9}        {verdict} in {} of usable memory a rank; largest term: {}\n",
        "sum",
        bytes(plan.device_bytes),
        bytes(plan.budget_bytes),
        plan.largest_term
    );
    time(&mut out, plan);
    for line in &plan.advice {
        let _ = writeln!(out, "- {line}");
    }
    out
}

fn time(out: &mut String, plan: &Plan) {
    let t = &plan.time;
    let _ = writeln!(
        out,
        "Predicted step: {} = compute {} + reduction {} + update {} + all-gather {}",
        seconds(t.step_s),
        seconds(t.compute_s),
        seconds(t.reduce_s),
        seconds(t.update_s),
        seconds(t.gather_s)
    );
    let _ = writeln!(
        out,
        "  {:.0} tokens/s ({:.0} a rank); all steps: {}, without evaluation, checkpoints and failures",
        t.tokens_per_s,
        t.tokens_per_s / f64::from(plan.ranks),
        seconds(plan.run_s)
    );
    let _ = writeln!(
        out,
        "  compute = tokens x {:.4e} FLOPs (6 x multiplied parameters + 6 x layers x context x hidden) / rate",
        t.flops_per_token
    );
    let _ = writeln!(out, "  assumed: {}", t.assumptions.join("; "));
}
