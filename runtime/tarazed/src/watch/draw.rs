//! From a [`View`] to lines that fit a terminal. Pure: no clock, no colour codes, the same lines for the same view.
//!
//! Where not everything has room, each part first gets the rows that make it readable, the most important part first, and
//! then they share what is left row by row. What a part leaves out it says in its last row.

use super::{Domain, Incident, Stage, View, WaitsFor, Worker};
use crate::progress::{self, columns, duration, milliseconds};
use std::collections::BTreeMap;

/// What a line is, for whoever colours it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tone {
    /// Text.
    Plain,
    /// The first line of a part.
    Title,
    /// All is well.
    Good,
    /// A person may want to do something.
    Warning,
    /// A person should do something.
    Alarm,
}

/// A line of the page, without a line end and without control characters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// What it is.
    pub tone: Tone,
    /// What it says.
    pub text: String,
}

impl Line {
    fn new(tone: Tone, text: impl Into<String>) -> Self {
        Self {
            tone,
            text: text.into(),
        }
    }
}

/// Between columns and fields.
const GAP: &str = "  ";
/// Between entries of a grid that stand side by side.
const GUTTER: &str = "    ";
/// Rows of the loss curve where there is room.
const CURVE_ROWS: usize = 7;
/// Blocks of one to eight eighths.
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Older figures are said to be old.
const FRESH_MS: u64 = 5_000;

/// The page for a terminal of `width` columns: at most `height` lines, none of them wider.
#[must_use]
pub fn draw(view: &View, width: usize, height: usize) -> Vec<Line> {
    let mut lines = head(view, width);
    let grid = Grid::new(&view.domains, width);
    let rows_of = |count: usize, titles: usize| if count == 0 { 0 } else { count + titles };
    let workers_wanted = rows_of(view.workers.len(), 2);
    let incidents_wanted = rows_of(view.incidents.len(), 1);
    let curve_wanted = if view.losses.len() < 2 { 0 } else { CURVE_ROWS };
    // The most important first.
    let [worker_rows, incident_rows, domain_rows, language_rows, curve_rows] = share(
        height.saturating_sub(lines.len()),
        [
            (4, workers_wanted),
            (2, incidents_wanted),
            (3, rows_of(grid.rows(), 1)),
            (1, usize::from(!view.languages.is_empty())),
            (3, curve_wanted),
        ],
    );
    lines.extend(curve(&view.losses, width, curve_rows));
    lines.extend(workers(&view.workers, width, worker_rows));
    lines.extend(grid.draw(domain_rows));
    lines.extend(languages(view, language_rows));
    lines.extend(incidents(view, width, incident_rows));
    lines.truncate(height);
    for line in &mut lines {
        line.text = cut(&line.text, width);
    }
    lines
}

/// Rows for parts that want `(least, all)` of `free` ones.
fn share<const N: usize>(mut free: usize, wants: [(usize, usize); N]) -> [usize; N] {
    let mut given = [0; N];
    for (given, (least, wanted)) in given.iter_mut().zip(wants) {
        let least = least.min(wanted);
        if least <= free {
            *given = least;
            free -= least;
        }
    }
    loop {
        let before = free;
        for (given, (_, wanted)) in given.iter_mut().zip(wants) {
            if free > 0 && *given > 0 && *given < wanted {
                *given += 1;
                free -= 1;
            }
        }
        if free == before {
            return given;
        }
    }
}

// --- what every page begins with --------------------------------------------------------------------------------------

fn head(view: &View, width: usize) -> Vec<Line> {
    let mut title = Vec::from([view.name.clone(), view.dir.clone()]);
    title.extend(view.generation.map(|generation| format!("generation {generation}")));
    title.retain(|field| !field.is_empty());
    let mut lines: Vec<Line> = flow(title, GAP, width)
        .into_iter()
        .map(|text| Line::new(Tone::Title, text))
        .collect();
    let mut say = |tone, text: String| {
        let words = text.split_whitespace().map(str::to_owned);
        lines.extend(flow(words, " ", width).into_iter().map(|text| Line::new(tone, text)));
    };
    let (tone, text) = stage(view);
    say(tone, text);
    if let Some(remark) = &view.remark {
        say(Tone::Warning, format!("not everything could be read: {remark}"));
    }
    if let Some(notice) = &view.notice {
        let (at, to, reason) = (notice.at, notice.to, &notice.reason);
        let veto = format!("`tarazed decide {} veto {} --reason TEXT`", view.dir, notice.decision);
        say(
            Tone::Warning,
            format!(
                "notice: at step {at} training goes back to the state after step {to} ({reason}), unless somebody vetoes it in time: {veto}"
            ),
        );
    }
    let figures = flow(figures(view), GAP, width);
    lines.extend(figures.into_iter().map(|text| Line::new(Tone::Plain, text)));
    lines
}

/// Who is in charge, and what to do where nobody is.
pub(crate) fn stage(view: &View) -> (Tone, String) {
    let again = "`tarazed train` with the same config and folder";
    let (step, steps) = (view.step, steps_text(view));
    match &view.stage {
        Stage::Live => (Tone::Good, format!("live{}", age(view))),
        Stage::Waits(WaitsFor::Controller) => (
            Tone::Warning,
            "waits for a controller: start the run with `tarazed train`".to_owned(),
        ),
        Stage::Waits(WaitsFor::Preparation) => (
            Tone::Plain,
            "waits for the controller, which prepares data and store".to_owned(),
        ),
        Stage::Waits(WaitsFor::FirstStep) => (
            Tone::Plain,
            format!("waits for the first step; workers: {}", states(&view.workers)),
        ),
        Stage::Silent(cause) => (
            Tone::Alarm,
            format!("the controller cannot be asked: {cause}{}", age(view)),
        ),
        Stage::Held => (
            Tone::Warning,
            format!(
                "a controller has the run folder and does not listen: it starts or ends{}",
                age(view)
            ),
        ),
        Stage::Gone => (
            Tone::Alarm,
            format!("the controller is gone without a word: {again} goes on{}", age(view)),
        ),
        Stage::Ended if view.steps.is_some_and(|steps| step >= steps) => (Tone::Good, format!("done: step {steps}")),
        Stage::Ended => (Tone::Warning, format!("ended at step {steps}: {again} goes on")),
    }
}

/// Nothing where the figures are new.
fn age(view: &View) -> String {
    let age_ms = view.figures.at_unix_ms.map(|at| view.now_unix_ms.saturating_sub(at));
    match age_ms.filter(|age_ms| *age_ms > FRESH_MS) {
        Some(age_ms) => format!("; last step {} ago", duration(age_ms as f64 / 1e3)),
        None => String::new(),
    }
}

fn steps_text(view: &View) -> String {
    match view.steps {
        Some(steps) => format!("{} of {steps}", view.step),
        None => view.step.to_string(),
    }
}

fn figures(view: &View) -> Vec<String> {
    let figures = &view.figures;
    let known = |value: Option<f64>, text: &dyn Fn(f64) -> String| value.map_or_else(|| "-".to_owned(), text);
    let mut fields = vec![format!("step {}", steps_text(view))];
    if view.stage == Stage::Live {
        fields.push(format!("{} left", known(figures.eta_s, &duration)));
    }
    if figures.at_unix_ms.is_none() {
        return fields;
    }
    fields.extend([
        format!("loss {}", known(figures.loss, &|loss| format!("{loss:.4}"))),
        format!("norm {}", known(figures.grad_norm, &|norm| format!("{norm:.3}"))),
        format!("lr {}", known(figures.lr, &|lr| format!("{lr:.2e}"))),
        format!("{} tok/s", known(figures.tokens_per_s, &progress::short)),
    ]);
    fields.extend(figures.mfu_percent.map(|mfu| format!("mfu {mfu:.1}%")));
    fields.push(format!(
        "goodput {}",
        known(figures.goodput, &|goodput| format!("{:.2}%", goodput * 100.0))
    ));
    let newest = match figures.durable_step {
        Some(step) => format!("checkpoint of step {step}"),
        None => "no checkpoint yet".to_owned(),
    };
    let behind = figures
        .durability_lag_s
        .map(|lag_s| format!(", {} behind", duration(lag_s)));
    fields.push(newest + behind.as_deref().unwrap_or_default());
    fields.extend(
        view.saving
            .map(|saving| progress::saving(saving.step, saving.stored, saving.shards, saving.for_ms)),
    );
    fields
}

// --- the loss curve ---------------------------------------------------------------------------------------------------

fn curve(losses: &[(u64, f64)], width: usize, rows: usize) -> Vec<Line> {
    let (Some((first, _)), Some((last, _))) = (losses.first(), losses.last()) else {
        return Vec::new();
    };
    if rows < 2 {
        return Vec::new();
    }
    let rows = rows - 1;
    let extreme = |better: fn(f64, f64) -> f64| losses.iter().map(|(_, loss)| *loss).reduce(better);
    let widest = [extreme(f64::max), extreme(f64::min)].map(|loss| format!("{:.3}", loss.unwrap_or_default()).len());
    let margin = widest[0].max(widest[1]) + 1;
    let bars = bins(losses, width.saturating_sub(margin));
    let (high, low) = (
        bars.iter().copied().fold(f64::MIN, f64::max),
        bars.iter().copied().fold(f64::MAX, f64::min),
    );
    // In eighths of a row, the lowest one.
    let eighths = |loss: f64| match high > low {
        true => 1 + ((loss - low) / (high - low) * (8 * rows - 1) as f64).round() as usize,
        false => 1,
    };
    let mut lines = vec![Line::new(Tone::Title, format!("loss of steps {first} to {last}"))];
    for row in (0..rows).rev() {
        let label = match row {
            _ if row + 1 == rows => format!("{high:.3}"),
            0 => format!("{low:.3}"),
            _ => String::new(),
        };
        let block = |loss: &f64| match eighths(*loss).saturating_sub(8 * row) {
            0 => ' ',
            full => BLOCKS[full.min(8) - 1],
        };
        let row: String = bars.iter().map(block).collect();
        let text = format!("{} {row}", pad(&label, margin - 1, false));
        lines.push(Line::new(Tone::Plain, text.trim_end()));
    }
    lines
}

/// Means of so many runs of neighbours at most.
fn bins(losses: &[(u64, f64)], count: usize) -> Vec<f64> {
    let count = count.clamp(1, losses.len());
    let mean = |bin: usize| {
        let of = &losses[bin * losses.len() / count..(bin + 1) * losses.len() / count];
        of.iter().map(|(_, loss)| loss).sum::<f64>() / of.len() as f64
    };
    (0..count).map(mean).collect()
}

// --- tables -----------------------------------------------------------------------------------------------------------

/// A column of a table.
struct Column {
    name: &'static str,
    cells: Vec<String>,
    /// Text stands left, numbers right.
    is_text: bool,
    /// Where not all columns fit, the highest goes first; 0 stays.
    goes: u8,
}

impl Column {
    fn numbers(name: &'static str, goes: u8, cells: impl Iterator<Item = String>) -> Self {
        Self {
            name,
            cells: cells.collect(),
            is_text: false,
            goes,
        }
    }

    fn text(name: &'static str, goes: u8, cells: impl Iterator<Item = String>) -> Self {
        Self {
            is_text: true,
            ..Self::numbers(name, goes, cells)
        }
    }

    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|cell| columns(cell));
        cells.max().unwrap_or(0).max(columns(self.name))
    }
}

/// Head and rows, all of one width, without the columns that do not fit or in which nothing is known.
fn table(mut kept: Vec<Column>, width: usize) -> Vec<String> {
    let is_known = |cell: &String| !cell.is_empty() && cell != "-";
    kept.retain(|column| column.goes == 0 || column.cells.iter().any(is_known));
    let needed = |kept: &[Column]| kept.iter().map(|column| column.width() + GAP.len()).sum::<usize>();
    while needed(&kept) > width + GAP.len() {
        let first = kept.iter().map(|column| column.goes).max().unwrap_or(0);
        if first == 0 {
            break;
        }
        kept.retain(|column| column.goes != first);
    }
    let widths: Vec<usize> = kept.iter().map(Column::width).collect();
    let count = kept.iter().map(|column| column.cells.len()).max().unwrap_or(0);
    let row = |cell: &dyn Fn(&Column) -> String| {
        let cells = kept.iter().zip(&widths);
        let padded: Vec<String> = cells
            .map(|(column, width)| pad(&cell(column), *width, column.is_text))
            .collect();
        padded.join(GAP)
    };
    let head = row(&|column| column.name.to_owned());
    let rows = (0..count).map(|at| row(&|column| column.cells.get(at).cloned().unwrap_or_default()));
    std::iter::once(head).chain(rows).collect()
}

/// The first of `count` entries that `rows` rows have room for, beside a row that says how many are left out.
const fn shown(count: usize, rows: usize) -> usize {
    if count <= rows { count } else { rows.saturating_sub(1) }
}

fn left_out(count: usize, shown: usize) -> Option<Line> {
    (shown < count).then(|| Line::new(Tone::Plain, format!("… {} more", count - shown)))
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// How many workers are in which state.
fn states(workers: &[Worker]) -> String {
    let mut counts = BTreeMap::new();
    for worker in workers {
        *counts.entry(clean(&worker.state)).or_insert(0) += 1;
    }
    let counts: Vec<String> = counts.iter().map(|(state, count)| format!("{count} {state}")).collect();
    if counts.is_empty() {
        "none yet".to_owned()
    } else {
        counts.join(", ")
    }
}

/// Where not all fit, those first that do not train.
fn workers(workers: &[Worker], width: usize, rows: usize) -> Vec<Line> {
    let Some(rows) = rows.checked_sub(2).filter(|rows| *rows > 0) else {
        return Vec::new();
    };
    let mut listed: Vec<&Worker> = workers.iter().collect();
    let count = shown(listed.len(), rows);
    if count < listed.len() {
        listed.sort_by_key(|worker| worker.state == "training");
        listed.truncate(count);
    }
    let numbers = |name, goes, cell: &dyn Fn(&Worker) -> String| {
        Column::numbers(name, goes, listed.iter().map(|worker| cell(worker)))
    };
    let lanes = |worker: &Worker| worker.lanes.map(|[from, to]| format!("{from}..{to}"));
    let lane_ms = |worker: &Worker| worker.lane_us.map(|us| format!("{:.1}", us as f64 / 1e3));
    let node = |worker: &&Worker| clean(worker.node.as_deref().unwrap_or("-"));
    let nodes = listed.iter().any(|worker| worker.node.is_some());
    let nodes = nodes.then(|| Column::text("node", 4, listed.iter().map(node)));
    let columns = [
        Some(numbers("worker", 0, &|worker| worker.worker.to_string())),
        Some(numbers("rank", 2, &|worker| or_dash(worker.rank))),
        nodes,
        Some(numbers("pid", 4, &|worker| {
            or_dash(Some(worker.pid).filter(|pid| *pid > 0))
        })),
        Some(numbers("incarnation", 5, &|worker| worker.incarnation.to_string())),
        Some(numbers("lanes", 3, &|worker| or_dash(lanes(worker)))),
        Some(numbers("step", 1, &|worker| worker.step.to_string())),
        Some(Column::text(
            "state",
            0,
            listed.iter().map(|worker| clean(&worker.state)),
        )),
        Some(numbers("ms/lane", 6, &|worker| or_dash(lane_ms(worker)))),
        Some(Column::text(
            "does",
            7,
            listed.iter().map(|worker| clean(&worker.activity)),
        )),
    ];
    let rows = table(columns.into_iter().flatten().collect(), width);
    let title = format!("workers: {}", states(workers));
    let mut lines = vec![Line::new(Tone::Title, title)];
    let tones = std::iter::once(Tone::Plain).chain(listed.iter().map(|worker| match worker.state.as_str() {
        "training" | "paused" | "left" => Tone::Plain,
        _ => Tone::Warning,
    }));
    lines.extend(
        rows.iter()
            .zip(tones)
            .map(|(row, tone)| Line::new(tone, row.trim_end())),
    );
    lines.extend(left_out(workers.len(), count));
    lines
}

/// The mixture: as many columns of entries as fit beside each other, filled from top to bottom.
struct Grid {
    /// Head and entries of one width.
    head: String,
    entries: Vec<String>,
    /// Entries side by side.
    abreast: usize,
}

impl Grid {
    fn new(domains: &[Domain], width: usize) -> Self {
        let loss = |loss: Option<f64>| or_dash(loss.map(|loss| format!("{loss:.3}")));
        let tokens = |domain: &Domain| {
            let known = domain.tokens.zip(domain.tokens_requested);
            or_dash(known.map(|(got, asked)| format!("{}/{}", progress::short(got as f64), progress::short(asked))))
        };
        let mut entries = table(
            vec![
                Column::text("domain", 0, domains.iter().map(|domain| clean(&domain.name))),
                Column::numbers(
                    "share",
                    0,
                    domains.iter().map(|domain| format!("{:.1}%", domain.weight * 100.0)),
                ),
                Column::numbers("loss", 1, domains.iter().map(|domain| loss(domain.train_loss))),
                Column::numbers("held out", 2, domains.iter().map(|domain| loss(domain.heldout_loss))),
                Column::numbers("tokens/asked", 3, domains.iter().map(tokens)),
            ],
            width,
        );
        let head = entries.remove(0);
        let abreast = ((width + GUTTER.len()) / (columns(&head) + GUTTER.len())).clamp(1, entries.len().max(1));
        Self { head, entries, abreast }
    }

    fn rows(&self) -> usize {
        self.entries.len().div_ceil(self.abreast)
    }

    fn draw(&self, rows: usize) -> Vec<Line> {
        let Some(rows) = rows.checked_sub(1).filter(|rows| *rows > 0) else {
            return Vec::new();
        };
        let used = shown(self.rows(), rows);
        let count = self.entries.len().min(used * self.abreast);
        // No more side by side than there is something below of.
        let abreast = count.div_ceil(used.max(1));
        let heads = vec![self.head.as_str(); abreast];
        let mut lines = vec![Line::new(Tone::Title, heads.join(GUTTER).trim_end())];
        lines.extend((0..used).map(|row| {
            let entries = self.entries[..count].iter().skip(row).step_by(used.max(1));
            let entries: Vec<&str> = entries.map(String::as_str).collect();
            Line::new(Tone::Plain, entries.join(GUTTER).trim_end())
        }));
        lines.extend(left_out(self.entries.len(), count));
        lines
    }
}

fn languages(view: &View, rows: usize) -> Option<Line> {
    if rows == 0 {
        return None;
    }
    let evaluated = view
        .evaluated
        .map_or_else(String::new, |step| format!(" at step {step}"));
    let languages = view.languages.iter().map(|language| {
        let loss = or_dash(language.loss.map(|loss| format!("{loss:.3}")));
        let bits = language.bits_per_byte.map(|bits| format!(" ({bits:.3} bits per byte)"));
        format!("{GAP}{} {loss}{}", clean(&language.name), bits.unwrap_or_default())
    });
    let languages: String = languages.collect();
    Some(Line::new(Tone::Plain, format!("held out{evaluated}:{languages}")))
}

fn incidents(view: &View, width: usize, rows: usize) -> Vec<Line> {
    let Some(rows) = rows.checked_sub(1).filter(|rows| *rows > 0) else {
        return Vec::new();
    };
    // The oldest of them are not missed.
    let listed = &view.incidents[..view.incidents.len().min(rows)];
    let ago = |incident: &Incident| {
        let ago_ms = view.now_unix_ms.saturating_sub(incident.unix_ms);
        duration(ago_ms as f64 / 1e3)
    };
    let recovery = |incident: &Incident| or_dash(incident.recovery_ms.map(|ms| milliseconds(ms as f64)));
    let narrow = vec![
        Column::numbers("ago", 0, listed.iter().map(ago)),
        Column::text("incident", 0, listed.iter().map(|incident| clean(&incident.kind))),
        Column::numbers("recovery", 1, listed.iter().map(recovery)),
    ];
    // Causes are long: they have what is left of the line, and the recovery gives way where that is little.
    let rows = table(narrow, width.saturating_sub(width / 3));
    let whats = std::iter::once("cause").chain(listed.iter().map(|incident| incident.what.as_str()));
    let tones = std::iter::once(Tone::Title).chain(listed.iter().map(|incident| tone_of(&incident.kind)));
    let lines = rows.iter().zip(whats).zip(tones);
    lines
        .map(|((row, what), tone)| Line::new(tone, format!("{row}{GAP}{what}").trim_end()))
        .collect()
}

pub(crate) fn tone_of(kind: &str) -> Tone {
    match kind {
        "rank_lost" | "rank_ending" | "alarm" | "state_lost" | "convicted" | "disputed" => Tone::Alarm,
        "recovered" | "adopted" => Tone::Good,
        _ => Tone::Warning,
    }
}

// --- text -------------------------------------------------------------------------------------------------------------

/// Fields one behind the other, on as many lines as they need.
fn flow(fields: impl IntoIterator<Item = String>, gap: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for field in fields {
        match lines.last_mut() {
            Some(line) if columns(line) + gap.len() + columns(&field) <= width => {
                line.push_str(gap);
                line.push_str(&field);
            }
            _ => lines.push(field),
        }
    }
    lines
}

/// Text from a file must not move the cursor.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// To so many columns at most, with a sign where something is missing.
fn cut(text: &str, width: usize) -> String {
    let text = clean(text);
    if columns(&text) <= width {
        return text;
    }
    let mut kept = String::new();
    let mut used = 0;
    for c in text.chars() {
        used += columns(c.encode_utf8(&mut [0; 4]));
        // One column is for the sign.
        if used + 1 > width {
            break;
        }
        kept.push(c);
    }
    if width > 0 {
        kept.push('…');
    }
    kept
}

fn pad(text: &str, width: usize, left: bool) -> String {
    let blanks = " ".repeat(width.saturating_sub(columns(text)));
    if left {
        format!("{text}{blanks}")
    } else {
        format!("{blanks}{text}")
    }
}

#[cfg(test)]
mod tests;
