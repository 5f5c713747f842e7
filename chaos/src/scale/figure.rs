//! Goodput against the time between failures, as SVG: simulated points, the textbook's curves, points measured on real
//! runs. Plain text that a seed determines; no library, no font, no script.

use super::report::Report;
use super::sweep::{Point, SERIES, SWEEP_RANKS, setup_of};
use super::young_daly::GOODPUT_VALID_MIN;
use std::fmt::Write;
use std::path::Path;

/// A point measured on a real run.
#[derive(Clone, PartialEq, Debug)]
pub struct Measured {
    /// Time between failures (seconds).
    pub mtbf_s: f64,
    /// Committed useful time over all time.
    pub goodput: f64,
    /// Which run.
    pub source: String,
}

/// Reads measured points; a file that is not there has none.
///
/// # Errors
/// What is wrong with the file.
pub fn read_measured(path: &Path) -> Result<Vec<Measured>, String> {
    match std::fs::read_to_string(path) {
        Ok(text) => parse_measured(&text).map_err(|e| format!("{}: {e}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

fn parse_measured(text: &str) -> Result<Vec<Measured>, String> {
    let mut points = Vec::new();
    for (line, number) in text.lines().zip(1..) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') || line == "mtbf_s,goodput,source" {
            continue;
        }
        let wrong = || format!("line {number} is not mtbf_s,goodput,source: {line}");
        let mut fields = line.splitn(3, ',').map(str::trim);
        let (Some(mtbf), Some(goodput), Some(source)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(wrong());
        };
        let (Ok(mtbf_s), Ok(goodput)) = (mtbf.parse::<f64>(), goodput.parse::<f64>()) else {
            return Err(wrong());
        };
        if !(mtbf_s > 0.0 && mtbf_s.is_finite() && (0.0..=1.0).contains(&goodput)) {
            return Err(wrong());
        }
        points.push(Measured {
            mtbf_s,
            goodput,
            source: source.to_owned(),
        });
    }
    Ok(points)
}

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 720.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 290.0;
/// Decades of the horizontal axis, in seconds.
const DECADE_MIN: i32 = 1;
const DECADE_MAX: i32 = 6;
/// Points of a curve.
const CURVE_POINTS: usize = 240;
/// One for each series; told apart by people who see colours differently (Okabe and Ito, 2008).
const COLOURS: [&str; 4] = ["#999999", "#0072B2", "#E69F00", "#009E73"];
const MEASURED_COLOUR: &str = "#D55E00";

fn x_of(mtbf_s: f64) -> f64 {
    let share = (libm::log10(mtbf_s) - f64::from(DECADE_MIN)) / f64::from(DECADE_MAX - DECADE_MIN);
    LEFT + share.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
}

fn y_of(goodput: f64) -> f64 {
    HEIGHT - BOTTOM - goodput.clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
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

    fn text(&mut self, x: f64, y: f64, style: &str, text: &str) {
        let _ = writeln!(
            self.0,
            r#"<text x="{x:.1}" y="{y:.1}" {style}>{}</text>"#,
            escaped(text)
        );
    }

    fn polyline(&mut self, points: &[(f64, f64)], style: &str) {
        if points.len() > 1 {
            let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = writeln!(
                self.0,
                r#"<polyline fill="none" points="{}" {style}/>"#,
                points.join(" ")
            );
        }
    }

    /// Each series has a shape besides its colour.
    fn mark(&mut self, series: usize, x: f64, y: f64, size: f64) {
        let fill = format!(r#"fill="{}" stroke="white" stroke-width="1""#, COLOURS[series]);
        let shape = match series {
            0 => format!(
                r#"<rect x="{:.1}" y="{:.1}" width="{:.1}" height="{:.1}" {fill}/>"#,
                x - size,
                y - size,
                size * 2.0,
                size * 2.0
            ),
            1 => format!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="{size:.1}" {fill}/>"#),
            2 => format!(
                r#"<polygon points="{x:.1},{:.1} {:.1},{:.1} {:.1},{:.1}" {fill}/>"#,
                y - size * 1.2,
                x - size * 1.2,
                y + size,
                x + size * 1.2,
                y + size
            ),
            _ => format!(
                r#"<polygon points="{x:.1},{:.1} {:.1},{y:.1} {x:.1},{:.1} {:.1},{y:.1}" {fill}/>"#,
                y - size * 1.4,
                x + size * 1.4,
                y + size * 1.4,
                x - size * 1.4
            ),
        };
        let _ = writeln!(self.0, "{shape}");
    }
}

fn label(seconds: f64) -> &'static str {
    match seconds as u64 {
        10 => "10 s",
        60 => "1 min",
        600 => "10 min",
        3_600 => "1 h",
        36_000 => "10 h",
        86_400 => "1 d",
        604_800 => "7 d",
        _ => "",
    }
}

fn axes(canvas: &mut Canvas) {
    let (bottom, right) = (y_of(0.0), WIDTH - RIGHT);
    for tenth in 0..=10_u32 {
        let y = y_of(f64::from(tenth) / 10.0);
        canvas.line((LEFT, y), (right, y), r##"stroke="#dddddd" stroke-width="1""##);
        if tenth % 2 == 0 {
            canvas.text(
                LEFT - 10.0,
                y + 5.0,
                r#"text-anchor="end""#,
                &format!("{}%", tenth * 10),
            );
        }
    }
    for seconds in [10.0, 60.0, 600.0, 3_600.0, 36_000.0, 86_400.0, 604_800.0] {
        let x = x_of(seconds);
        canvas.line((x, TOP), (x, bottom), r##"stroke="#eeeeee" stroke-width="1""##);
        canvas.text(x, bottom + 20.0, r#"text-anchor="middle""#, label(seconds));
    }
    canvas.line((LEFT, bottom), (right, bottom), r#"stroke="black" stroke-width="1.5""#);
    canvas.line((LEFT, TOP), (LEFT, bottom), r#"stroke="black" stroke-width="1.5""#);
    let middle = f64::midpoint(LEFT, right);
    canvas.text(
        middle,
        bottom + 42.0,
        r#"text-anchor="middle""#,
        "mean time between failures of the whole run (logarithmic)",
    );
    let (x, y) = (24.0, f64::midpoint(TOP, bottom));
    let turned = format!(r#"text-anchor="middle" transform="rotate(-90 {x:.1} {y:.1})""#);
    canvas.text(x, y, &turned, "goodput: useful committed time / all time");
}

/// The formula: a line where it holds, dots where it does not.
fn curves(canvas: &mut Canvas, seed: u64, report: &Report) {
    for at in (0..SERIES.len()).filter(|&at| SERIES[at].has_formula) {
        let (mut valid, mut beyond) = (Vec::new(), Vec::new());
        for step in 0..=CURVE_POINTS {
            let share = step as f64 / CURVE_POINTS as f64;
            let exponent = f64::from(DECADE_MIN) + share * f64::from(DECADE_MAX - DECADE_MIN);
            let mtbf_s = libm::pow(10.0, exponent);
            let setup = setup_of(seed, at, mtbf_s, &report.setup.cost);
            let goodput = setup.terms(0.0).best_goodput(mtbf_s * 1e3);
            let point = (x_of(mtbf_s), y_of(goodput));
            if goodput > GOODPUT_VALID_MIN {
                if valid.is_empty() {
                    beyond.push(point);
                }
                valid.push(point);
            } else if goodput > 0.0 {
                beyond.push(point);
            }
        }
        let colour = COLOURS[at];
        canvas.polyline(&valid, &format!(r#"stroke="{colour}" stroke-width="2""#));
        canvas.polyline(
            &beyond,
            &format!(r#"stroke="{colour}" stroke-width="2" stroke-dasharray="2 5""#),
        );
    }
}

fn legend(canvas: &mut Canvas, report: &Report, has_measured: bool) {
    let top = HEIGHT - BOTTOM + 70.0;
    for (at, series) in SERIES.iter().enumerate() {
        let y = top + 20.0 * at as f64;
        if series.has_formula {
            let style = format!(r#"stroke="{}" stroke-width="2""#, COLOURS[at]);
            canvas.line((LEFT, y - 4.0), (LEFT + 34.0, y - 4.0), &style);
        }
        canvas.mark(at, LEFT + 17.0, y - 4.0, 5.0);
        let with = if series.has_formula { "; line: Young/Daly" } else { "" };
        canvas.text(LEFT + 44.0, y, "", &format!("{}{with}", series.name));
    }
    let (x, setup) = (LEFT + 44.0, &report.setup);
    let below = top + 20.0 * SERIES.len() as f64 + 8.0;
    let lines = [
        format!("small marks: simulated, {SWEEP_RANKS} ranks, published rates scaled"),
        format!(
            "large ringed mark: simulated, {} ranks, {:.0} days, published rates",
            setup.ranks,
            setup.horizon_ms as f64 / 86_400e3
        ),
        "dotted: the formula below 80 %, where it does not hold".to_owned(),
    ];
    for (line, text) in lines.iter().enumerate() {
        canvas.text(x, below + 20.0 * line as f64, "", text);
    }
    if has_measured {
        let y = below + 60.0;
        cross(canvas, LEFT + 17.0, y - 4.0);
        canvas.text(x, y, "", "measured on real runs");
    } else {
        canvas.text(x, below + 60.0, r##"fill="#777777""##, "no measured points yet");
    }
}

fn cross(canvas: &mut Canvas, x: f64, y: f64) {
    let style = format!(r#"stroke="{MEASURED_COLOUR}" stroke-width="3""#);
    canvas.line((x - 5.0, y - 5.0), (x + 5.0, y + 5.0), &style);
    canvas.line((x - 5.0, y + 5.0), (x + 5.0, y - 5.0), &style);
}

/// The figure: `report` is the large world, `points` are those of the sweep.
#[must_use]
pub fn draw(report: &Report, points: &[Point], measured: &[Measured]) -> String {
    let mut canvas = Canvas(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"14\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    ));
    canvas.text(
        LEFT,
        30.0,
        r#"font-size="18" font-weight="bold""#,
        "Goodput against time between failures",
    );
    axes(&mut canvas);
    curves(&mut canvas, report.setup.seed, report);
    for point in points {
        canvas.mark(point.series, x_of(point.mtbf_s), y_of(point.goodput), 4.0);
    }
    let large = SERIES
        .iter()
        .position(|series| series.protection == report.setup.protection);
    let (x, y) = (x_of(report.setup.mtbf_ms() / 1e3), y_of(report.goodput()));
    if let Some(series) = large {
        canvas.mark(series, x, y, 7.0);
    }
    let _ = writeln!(
        canvas.0,
        r#"<circle cx="{x:.1}" cy="{y:.1}" r="12" fill="none" stroke="black" stroke-width="1.5"/>"#
    );
    let said = format!("{} ranks: {:.1}%", report.setup.ranks, 100.0 * report.goodput());
    // Under the mark, on whichever side there is room.
    if x < WIDTH * 0.75 {
        canvas.text(x + 16.0, y + 24.0, r#"font-weight="bold""#, &said);
    } else {
        canvas.text(x - 16.0, y + 24.0, r#"font-weight="bold" text-anchor="end""#, &said);
    }
    for point in measured {
        let (x, y) = (x_of(point.mtbf_s), y_of(point.goodput));
        cross(&mut canvas, x, y);
        canvas.text(x + 9.0, y + 5.0, r#"font-size="11""#, &point.source);
    }
    legend(&mut canvas, report, !measured.is_empty());
    canvas.0.push_str("</svg>\n");
    canvas.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_points_are_read_or_refused() {
        let text = "# real runs\nmtbf_s,goodput,source\n\n60, 0.87, storm of 4 ranks, two hours\n";
        let expected = Measured {
            mtbf_s: 60.0,
            goodput: 0.87,
            source: "storm of 4 ranks, two hours".to_owned(),
        };
        assert_eq!(parse_measured(text), Ok(vec![expected]));
        for wrong in ["60,0.87", "0,0.5,x", "60,1.5,x", "a,0.5,x", "inf,0.5,x"] {
            assert!(parse_measured(wrong).is_err(), "{wrong}");
        }
    }
}
