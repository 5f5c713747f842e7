//! Curves as SVG: plain text that the numbers determine; no library, no font, no script.

use super::results::run;
use super::schedule::{Arm, BEST_STATIC, CaseRuns, Finished};
use super::statistics;
use std::fmt::Write as _;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 600.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 210.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 70.0;
/// Told apart by people who see colours differently (Okabe and Ito, 2008).
const COLOURS: [&str; 8] = [
    "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999",
];
/// For more series than there are colours.
const DASHES: [&str; 3] = ["", "7 4", "2 4"];
/// Distance of two labels.
const LABEL_HEIGHT: f64 = 16.0;

/// A line over training tokens.
#[derive(Clone, PartialEq, Debug)]
pub struct Series {
    /// What it is.
    pub label: String,
    /// Tokens, centre, lower and upper end of the band, by place.
    pub places: Vec<(f64, f64, f64, f64)>,
}

/// A figure.
#[derive(Clone, PartialEq, Debug)]
pub struct Chart {
    /// Its title.
    pub title: String,
    /// What the vertical axis measures.
    pub unit: String,
    /// Its lines.
    pub series: Vec<Series>,
}

/// Mean and band of one standard deviation over seeds, place by place.
fn series(label: &str, curves: &[Vec<(f64, f64)>]) -> Series {
    let places = curves.iter().map(Vec::len).min().unwrap_or(0);
    let place = |at: usize| {
        let values: Vec<f64> = curves.iter().map(|curve| curve[at].1).collect();
        let (centre, spread) = (statistics::mean(&values), statistics::deviation(&values).unwrap_or(0.0));
        (curves[0][at].0, centre, centre - spread, centre + spread)
    };
    Series {
        label: label.to_owned(),
        places: (0..places).map(place).collect(),
    }
}

/// Arms that figures show: with all of them nothing could be seen.
fn shown<'a>(case: &CaseRuns<'_>, arms: &'a [Arm]) -> Vec<&'a Arm> {
    let wanted = |arm: &&Arm| {
        let statics = ["natural", "uniform", "unimax", BEST_STATIC];
        let adaptive = case
            .plan
            .controllers()
            .any(|c| arm.label == c.name || arm.label == format!("{}-mean", c.name));
        statics.contains(&arm.label.as_str()) || adaptive
    };
    arms.iter().filter(wanted).collect()
}

/// Held-out curves of a case: mean over the judged domains, and over the seeds that are there.
#[must_use]
pub fn curves(case: &CaseRuns<'_>, arms: &[Arm], finished: &Finished) -> Chart {
    let seeds = &case.plan.seeds.judging;
    let of = |arm: &Arm| {
        let runs = seeds.iter().filter_map(|&seed| run(case, arm, seed, finished));
        let curves: Vec<Vec<(f64, f64)>> = runs
            .map(|outcome| {
                outcome
                    .curve
                    .iter()
                    .map(|place| (place.tokens as f64, place.macro_mean))
                    .collect()
            })
            .collect();
        series(&arm.label, &curves)
    };
    Chart {
        title: format!("{}: held-out text over training", case.name),
        unit: "bits per byte, mean over judged domains; band: one standard deviation over seeds".to_owned(),
        series: shown(case, arms).into_iter().map(of).collect(),
    }
}

/// The same as differences to the natural mixture of the same seed.
#[must_use]
pub fn differences(case: &CaseRuns<'_>, arms: &[Arm], finished: &Finished) -> Chart {
    let natural = arms.iter().find(|arm| arm.label == "natural");
    let of = |arm: &Arm| {
        let pairs = case.plan.seeds.judging.iter().filter_map(|&seed| {
            let (own, other) = (run(case, arm, seed, finished)?, run(case, natural?, seed, finished)?);
            let places = own.curve.iter().zip(&other.curve);
            Some(
                places
                    .map(|(a, b)| (a.tokens as f64, a.macro_mean - b.macro_mean))
                    .collect(),
            )
        });
        series(&arm.label, &pairs.collect::<Vec<_>>())
    };
    Chart {
        title: format!("{}: difference to the natural mixture with the same seed", case.name),
        unit: "bits per byte, below zero is better; band: one standard deviation over seeds".to_owned(),
        series: shown(case, arms).into_iter().map(of).collect(),
    }
}

/// The mixture of an arm over time, one line a domain.
#[must_use]
pub fn mixture(case: &CaseRuns<'_>, arm: &Arm, finished: &Finished) -> Chart {
    let seeds = &case.plan.seeds.judging;
    let of = |(domain, facts): (usize, &super::measure::DomainFacts)| {
        let runs = seeds.iter().filter_map(|&seed| run(case, arm, seed, finished));
        let curves: Vec<Vec<(f64, f64)>> = runs
            .map(|outcome| {
                outcome
                    .curve
                    .iter()
                    .map(|place| (place.tokens as f64, place.mixture[domain]))
                    .collect()
            })
            .collect();
        series(&facts.name, &curves)
    };
    Chart {
        title: format!("{}: the mixture of {} over training", case.name, arm.label),
        unit: "weight; band: one standard deviation over seeds".to_owned(),
        series: case.facts.domains.iter().enumerate().map(of).collect(),
    }
}

/// From numbers to places on the paper.
struct Axes {
    x: (f64, f64),
    y: (f64, f64),
}

impl Axes {
    /// Holds all places, with a little air above and below.
    fn of(chart: &Chart) -> Option<Self> {
        let places = || chart.series.iter().flat_map(|series| &series.places);
        let fold = |values: &mut dyn Iterator<Item = f64>| {
            values
                .filter(|value| value.is_finite())
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                    (low.min(value), high.max(value))
                })
        };
        let x = fold(&mut places().map(|place| place.0));
        let y = fold(&mut places().flat_map(|place| [place.2, place.3]));
        if x.0 > x.1 || y.0 > y.1 {
            return None;
        }
        let air = ((y.1 - y.0) * 0.04).max(1e-6);
        Some(Self {
            x: (x.0, x.1.max(x.0 + 1.0)),
            y: (y.0 - air, y.1 + air),
        })
    }

    fn x_of(&self, tokens: f64) -> f64 {
        LEFT + (tokens - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT)
    }

    fn y_of(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - (value - self.y.0) / (self.y.1 - self.y.0) * (HEIGHT - TOP - BOTTOM)
    }
}

/// Round numbers between two ends: steps of 1, 2 or 5 times a power of ten, at most about eight.
fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    let rough = (high - low) / 8.0;
    let power = libm::pow(10.0, libm::floor(libm::log10(rough)));
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|step| *step >= rough);
    let step = step.unwrap_or(10.0 * power);
    let (first, last) = (libm::ceil(low / step) as i64, libm::floor(high / step) as i64);
    (first..=last).map(|at| at as f64 * step).collect()
}

fn number(value: f64) -> String {
    let text = format!("{value:.6}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

fn tokens_text(tokens: f64) -> String {
    match tokens {
        t if t >= 1e6 => format!("{}M", number(t / 1e6)),
        t if t >= 1e3 => format!("{}k", number(t / 1e3)),
        t => number(t),
    }
}

/// The text so far; writing to a string cannot fail.
struct Canvas(String);

impl Canvas {
    fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), style: &str) {
        let _ = writeln!(
            self.0,
            r#"<line x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}" {style}/>"#
        );
    }

    fn text(&mut self, (x, y): (f64, f64), style: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let _ = writeln!(self.0, r#"<text x="{x:.1}" y="{y:.1}" {style}>{text}</text>"#);
    }

    fn shape(&mut self, name: &str, points: &[(f64, f64)], style: &str) {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(self.0, r#"<{name} points="{}" {style}/>"#, points.join(" "));
    }
}

impl Chart {
    /// The figure as SVG; one without any place says that there is nothing yet.
    #[must_use]
    pub fn draw(&self) -> String {
        let mut canvas = Canvas(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        ));
        canvas.text((LEFT, 26.0), r#"font-size="17" font-weight="bold""#, &self.title);
        canvas.text((LEFT, 46.0), r##"fill="#555555""##, &self.unit);
        match Axes::of(self) {
            Some(axes) => self.draw_on(&axes, &mut canvas),
            None => canvas.text((LEFT, HEIGHT / 2.0), "", "no finished runs yet"),
        }
        canvas.0.push_str("</svg>\n");
        canvas.0
    }

    fn draw_on(&self, axes: &Axes, canvas: &mut Canvas) {
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for value in ticks(axes.y) {
            let y = axes.y_of(value);
            let colour = if value == 0.0 { "#777777" } else { "#dddddd" };
            canvas.line((LEFT, y), (right, y), &format!(r#"stroke="{colour}""#));
            canvas.text((LEFT - 8.0, y + 4.0), r#"text-anchor="end""#, &number(value));
        }
        for tokens in ticks(axes.x) {
            let x = axes.x_of(tokens);
            canvas.line((x, bottom), (x, bottom + 5.0), r#"stroke="black""#);
            canvas.text((x, bottom + 20.0), r#"text-anchor="middle""#, &tokens_text(tokens));
        }
        canvas.line((LEFT, bottom), (right, bottom), r#"stroke="black""#);
        canvas.line((LEFT, TOP), (LEFT, bottom), r#"stroke="black""#);
        let middle = f64::midpoint(LEFT, right);
        canvas.text((middle, bottom + 44.0), r#"text-anchor="middle""#, "training tokens");
        let drawn = || {
            self.series
                .iter()
                .enumerate()
                .filter(|(_, series)| !series.places.is_empty())
        };
        for (at, series) in drawn() {
            let colour = COLOURS[at % COLOURS.len()];
            let at_y = |value: f64| axes.y_of(value);
            let upper = series.places.iter().map(|place| (axes.x_of(place.0), at_y(place.3)));
            let lower = series
                .places
                .iter()
                .rev()
                .map(|place| (axes.x_of(place.0), at_y(place.2)));
            let band: Vec<(f64, f64)> = upper.chain(lower).collect();
            canvas.shape("polygon", &band, &format!(r#"fill="{colour}" fill-opacity="0.12""#));
        }
        for (at, series) in drawn() {
            let line: Vec<(f64, f64)> = series
                .places
                .iter()
                .map(|place| (axes.x_of(place.0), axes.y_of(place.1)))
                .collect();
            canvas.shape("polyline", &line, &format!(r#"fill="none" {}"#, stroke(at)));
        }
        self.labels(axes, canvas);
    }

    /// Labels at the lines' ends, pushed apart where lines end close to each other.
    fn labels(&self, axes: &Axes, canvas: &mut Canvas) {
        let mut ends: Vec<(f64, usize)> = self
            .series
            .iter()
            .enumerate()
            .filter_map(|(at, series)| Some((axes.y_of(series.places.last()?.1), at)))
            .collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let room = HEIGHT - 20.0 - ends.len() as f64 * LABEL_HEIGHT;
        let mut y_next = f64::NEG_INFINITY;
        for (done, (y, at)) in ends.into_iter().enumerate() {
            let y_label = y.max(y_next).min(room + done as f64 * LABEL_HEIGHT);
            y_next = y_label + LABEL_HEIGHT;
            let x = WIDTH - RIGHT + 6.0;
            canvas.line((x - 4.0, y), (x + 10.0, y_label), r##"stroke="#bbbbbb""##);
            canvas.line((x + 12.0, y_label), (x + 36.0, y_label), &stroke(at));
            canvas.text((x + 42.0, y_label + 4.0), "", &self.series[at].label);
        }
    }
}

fn stroke(series: usize) -> String {
    let (colour, dash) = (
        COLOURS[series % COLOURS.len()],
        DASHES[series / COLOURS.len() % DASHES.len()],
    );
    format!(r#"stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}""#)
}

#[cfg(test)]
mod tests {
    use super::super::measure::tests::facts;
    use super::super::results::tests::{plan_of, whole};
    use super::super::schedule::tests::runs;
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks((0.0, 8.0)), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        let found = ticks((1.93, 2.31));
        assert_eq!(
            found.iter().map(|tick| number(*tick)).collect::<Vec<_>>(),
            ["1.95", "2", "2.05", "2.1", "2.15", "2.2", "2.25", "2.3"]
        );
        assert_eq!(
            (number(-0.0), tokens_text(512_000.0), tokens_text(1.5e6)),
            ("0".into(), "512k".into(), "1.5M".into())
        );
    }

    #[test]
    fn a_place_has_the_mean_and_the_deviation_of_its_seeds() {
        let found = series("x", &[vec![(0.0, 1.0), (10.0, 4.0)], vec![(0.0, 3.0), (10.0, 4.0)]]);
        let spread = 2.0_f64.sqrt();
        assert_eq!(
            found.places,
            [(0.0, 2.0, 2.0 - spread, 2.0 + spread), (10.0, 4.0, 4.0, 4.0)]
        );
    }

    #[test]
    fn figures_show_each_arm_and_are_well_formed() {
        let plan = plan_of("[1, 2, 3]");
        let (results, finished) = whole(&plan);
        let facts = facts();
        let case = runs(&plan, "plain", &facts);
        let arms: Vec<Arm> = results.cases[0].arms.iter().map(|arm| arm.arm.clone()).collect();
        let charts = [
            curves(&case, &arms, &finished),
            differences(&case, &arms, &finished),
            mixture(&case, &arms[5], &finished),
        ];
        for chart in &charts {
            let svg = chart.draw();
            assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
            assert_eq!(svg.matches("<polyline").count(), chart.series.len(), "{}", chart.title);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            for series in &chart.series {
                assert!(svg.contains(&format!(">{}</text>", series.label)), "{}", series.label);
            }
        }
        assert_eq!(charts[0].series.len(), 6);
        // The natural mixture does not differ from itself.
        assert!(charts[1].series[0].places.iter().all(|place| place.1 == 0.0));
        let empty = curves(&case, &arms, &Finished::new()).draw();
        assert!(empty.contains("no finished runs yet"));
    }
}
