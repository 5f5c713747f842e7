//! What a run says on the terminal: one terse line per report, two where the domains do not fit beside the rest, and one
//! per incident. Pure: text in, text out.
//!
//! These lines are not log lines: they have no level and no time, and they go to standard output. Colour is the caller's
//! choice ([`Style`]), so that a file or a pipe gets plain text.

/// How lines are drawn.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Style {
    /// Whether to colour.
    pub colour: bool,
    /// Columns, which no line of progress goes beyond; `None` for no limit.
    pub columns: Option<usize>,
}

impl Style {
    /// For standard output: coloured on a terminal, unless `NO_COLOR` is set.
    #[must_use]
    pub fn for_stdout() -> Self {
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stdout());
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let columns = rustix::termios::tcgetwinsize(std::io::stdout()).map_or(0, |size| usize::from(size.ws_col));
        Self {
            colour: terminal && !refused,
            columns: Some(columns).filter(|columns| *columns > 0),
        }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

const DIM: &str = "2";
const BOLD: &str = "1";
const RED: &str = "31";
const GREEN: &str = "32";
const YELLOW: &str = "33";

/// Between fields of a line.
const GAP: &str = "  ";
/// In front of a report's second line.
const INDENT: &str = "     ";

/// One domain in a report.
#[derive(Clone, PartialEq, Debug)]
pub struct DomainProgress {
    /// Name.
    pub name: String,
    /// Share of the mixture, 0 to 1.
    pub weight: f64,
    /// Training loss in nats per token; `None` where the domain had no sample lately.
    pub loss: Option<f64>,
}

/// One report of progress.
#[derive(Clone, PartialEq, Debug)]
pub struct Progress {
    /// Steps completed.
    pub step: u64,
    /// Steps of the run.
    pub steps: u64,
    /// Training loss in nats per token.
    pub loss: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens per second of all ranks; `None` before it is known.
    pub tokens_per_s: Option<f64>,
    /// Model FLOPs utilisation, 0 to 1; `None` where the devices' peak is not known.
    pub mfu: Option<f64>,
    /// Domains, in the config's order.
    pub domains: Vec<DomainProgress>,
    /// Ranks that train.
    pub ranks_alive: u32,
    /// Ranks wanted.
    pub ranks: u32,
    /// Time left, in seconds; `None` before it is known.
    pub eta_s: Option<f64>,
}

impl Progress {
    /// Its lines, without line ends, and the domain to begin with next time. Columns stay aligned from report to report of
    /// one run. Where the domains do not all fit beside the rest they have a line of their own, and where that is too
    /// short for all, they take turns: it begins with the domain of index `first`.
    #[must_use]
    pub fn render(&self, style: Style, first: usize) -> (Vec<String>, usize) {
        let mut page = Page::new(style);
        for (code, text) in self.head() {
            page.add(code, text);
        }
        let domains: Vec<String> = self.domains.iter().map(DomainProgress::text).collect();
        let count = domains.len();
        let needed: usize = domains.iter().map(|domain| GAP.len() + columns(domain)).sum();
        if page.has_room(needed) {
            domains.into_iter().for_each(|domain| page.add("", domain));
            return (page.lines, 0);
        }
        if page.lines.len() == 1 {
            page.begin_line();
        }
        let mut shown = 0;
        while shown < count {
            let domain = domains[(first + shown) % count].clone();
            // One is always shown, on a line of its own if need be.
            if shown > 0 && !page.has_room_for(&domain) {
                break;
            }
            page.add("", domain);
            shown += 1;
        }
        (page.lines, (first + shown) % count)
    }

    /// All but the domains, each with its colour.
    fn head(&self) -> Vec<(&'static str, String)> {
        let width = digits(self.steps);
        let ranks = format!("{}/{} ranks", self.ranks_alive, self.ranks);
        let rank_code = if self.ranks_alive < self.ranks { YELLOW } else { DIM };
        let speed = self.tokens_per_s.map_or_else(|| "-".to_owned(), short);
        let left = self.eta_s.map_or_else(|| "-".to_owned(), duration);
        let mut head = vec![
            (BOLD, format!("step {:>width$}/{}", self.step, self.steps)),
            ("", format!("loss {:>7.4}", self.loss)),
            ("", format!("norm {:>6.2}", self.grad_norm)),
            (DIM, format!("lr {:>7.1e}", self.lr)),
            ("", format!("{speed:>6} tok/s")),
        ];
        head.extend(self.mfu.map(|mfu| ("", format!("mfu {:>4.1}%", mfu * 100.0))));
        head.extend([(rank_code, ranks), (DIM, format!("{left:>6} left"))]);
        head
    }
}

impl DomainProgress {
    fn text(&self) -> String {
        let loss = self
            .loss
            .map_or_else(|| "    -".to_owned(), |loss| format!("{loss:>5.2}"));
        format!("{} {:>2.0}% {loss}", self.name, self.weight * 100.0)
    }
}

/// Fields laid out on lines that end before the terminal does.
struct Page {
    style: Style,
    lines: Vec<String>,
    /// Columns of the last line so far; colours have none.
    used: usize,
    /// Fields in the last line.
    fields: usize,
}

impl Page {
    fn new(style: Style) -> Self {
        Self {
            style,
            lines: vec![String::new()],
            used: 0,
            fields: 0,
        }
    }

    fn has_room(&self, more: usize) -> bool {
        self.style.columns.is_none_or(|limit| self.used + more <= limit)
    }

    fn has_room_for(&self, text: &str) -> bool {
        self.has_room(GAP.len() + columns(text))
    }

    fn begin_line(&mut self) {
        self.lines.push(INDENT.to_owned());
        (self.used, self.fields) = (INDENT.len(), 0);
    }

    /// Puts a field at the end, on a new line where it does not fit, cut where no line can hold it.
    fn add(&mut self, code: &str, mut text: String) {
        if self.fields > 0 && !self.has_room_for(&text) {
            self.begin_line();
        }
        let gap = if self.fields > 0 { GAP } else { "" };
        while !self.has_room(gap.len() + columns(&text)) && text.pop().is_some() {}
        self.used += gap.len() + columns(&text);
        self.fields += 1;
        let painted = if code.is_empty() {
            text
        } else {
            self.style.paint(code, &text)
        };
        if let Some(line) = self.lines.last_mut() {
            *line += gap;
            *line += &painted;
        }
    }
}

/// Columns of a terminal that a text takes: two for each character of the East Asian wide blocks, as in Chinese names.
pub(crate) fn columns(text: &str) -> usize {
    let wide = |c: char| {
        matches!(c,
            '\u{1100}'..='\u{115f}' | '\u{2e80}'..='\u{a4cf}' | '\u{ac00}'..='\u{d7a3}' | '\u{f900}'..='\u{faff}'
            | '\u{fe30}'..='\u{fe6f}' | '\u{ff00}'..='\u{ff60}' | '\u{ffe0}'..='\u{ffe6}' | '\u{1f300}'..='\u{1faff}'
            | '\u{20000}'..='\u{3fffd}')
    };
    text.chars().map(|c| 1 + usize::from(wide(c))).sum()
}

/// Something that happened between progress lines.
#[derive(Clone, PartialEq, Debug)]
pub enum Incident {
    /// A stage of the start or the end, in words.
    Stage(String),
    /// A rank was lost.
    RankLost {
        /// Its worker.
        worker: u32,
        /// Which life of it.
        incarnation: u32,
        /// What is known of the cause, e.g. `killed by signal 9`.
        cause: String,
    },
    /// The survivors train again.
    Recovered {
        /// From knowing of the failure to training again.
        recovery_ms: f64,
        /// Number of the new world.
        generation: u64,
        /// Ranks in it.
        ranks: u32,
        /// Committed steps that had to be computed again; 0 where replicas covered the loss.
        steps_lost: u64,
    },
    /// A checkpoint is on its way to the store.
    Saving {
        /// Steps completed in it.
        step: u64,
        /// Its shards in the store.
        stored: u64,
        /// All its shards.
        shards: u64,
        /// Since the first rank began with it.
        for_ms: u64,
    },
    /// A checkpoint exists.
    CheckpointCommitted {
        /// Steps completed in it.
        step: u64,
        /// From its first shard to its commit record.
        checkpoint_ms: f64,
    },
    /// A decision stands in the trace.
    Decision {
        /// First step it takes effect in.
        effective_step: u64,
        /// The decision in words.
        what: String,
    },
    /// Held-out losses, in nats per token.
    Evaluated {
        /// Steps completed.
        step: u64,
        /// By domain or language.
        losses: Vec<(String, f64)>,
    },
    /// Something a person should know that stops nothing.
    Warning(String),
}

impl Incident {
    /// The line, without a line end.
    #[must_use]
    pub fn render(&self, style: Style) -> String {
        let (code, text) = match self {
            Self::Stage(text) => (DIM, text.clone()),
            Self::RankLost {
                worker,
                incarnation,
                cause,
            } => (
                RED,
                format!("! lost worker {worker} (incarnation {incarnation}): {cause}"),
            ),
            Self::Recovered {
                recovery_ms,
                generation,
                ranks,
                steps_lost,
            } => (
                GREEN,
                format!(
                    "! recovered in {}: generation {generation}, {ranks} ranks, {}",
                    milliseconds(*recovery_ms),
                    match steps_lost {
                        0 => "no step lost".to_owned(),
                        1 => "1 step to redo".to_owned(),
                        lost => format!("{lost} steps to redo"),
                    }
                ),
            ),
            Self::Saving {
                step,
                stored,
                shards,
                for_ms,
            } => (DIM, format!("* {}", saving(*step, *stored, *shards, *for_ms))),
            Self::CheckpointCommitted { step, checkpoint_ms } => (
                DIM,
                format!(
                    "* checkpoint of step {step} committed in {}",
                    milliseconds(*checkpoint_ms)
                ),
            ),
            Self::Decision { effective_step, what } => {
                (YELLOW, format!("* decided for step {effective_step} on: {what}"))
            }
            Self::Evaluated { step, losses } => {
                let losses: Vec<String> = losses.iter().map(|(name, loss)| format!("{name} {loss:.3}")).collect();
                ("", format!("* held out at step {step}: {}", losses.join("  ")))
            }
            Self::Warning(text) => (YELLOW, format!("! {text}")),
        };
        if code.is_empty() {
            text
        } else {
            style.paint(code, &text)
        }
    }
}

/// How far a checkpoint is, e.g. `saving step 120: 2 of 4 shards, 3 s`.
#[must_use]
pub fn saving(step: u64, stored: u64, shards: u64, for_ms: u64) -> String {
    format!("saving step {step}: {stored} of {shards} shards, {} s", for_ms / 1_000)
}

fn digits(number: u64) -> usize {
    number.checked_ilog10().unwrap_or(0) as usize + 1
}

/// A rate with three digits: `9.1k`, `1.23M`.
pub(crate) fn short(value: f64) -> String {
    match value {
        v if !v.is_finite() => "-".to_owned(),
        v if v < 1e3 => format!("{v:.0}"),
        v if v < 1e6 => format!("{:.1}k", v / 1e3),
        v => format!("{:.2}M", v / 1e6),
    }
}

/// Time left, short: `48s`, `2m05s`, `3h07m`, `12d04h`.
pub(crate) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".to_owned();
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3_600 => format!("{}m{:02}s", s / 60, s % 60),
        3_600..86_400 => format!("{}h{:02}m", s / 3_600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86_400, s / 3_600 % 24),
    }
}

pub(crate) fn milliseconds(ms: f64) -> String {
    if ms < 10_000.0 {
        format!("{ms:.0} ms")
    } else {
        format!("{:.1} s", ms / 1_000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn progress(step: u64) -> Progress {
        let domain = |name: &str, weight, loss| DomainProgress {
            name: name.to_owned(),
            weight,
            loss,
        };
        Progress {
            step,
            steps: 600,
            loss: 5.43214,
            grad_norm: 1.234,
            lr: 1.93e-3,
            tokens_per_s: Some(9_120.0),
            mfu: None,
            domains: vec![
                domain("wiki-zh", 0.207, Some(5.614)),
                domain("code", 0.4, None),
                domain("book", 0.393, Some(4.0)),
            ],
            ranks_alive: 4,
            ranks: 4,
            eta_s: Some(72.4),
        }
    }

    const PLAIN: Style = Style {
        colour: false,
        columns: None,
    };

    fn plain(columns: usize) -> Style {
        Style {
            colour: false,
            columns: Some(columns),
        }
    }

    /// Only where the devices' peak is known.
    #[test]
    fn utilisation_stands_behind_the_speed() {
        let known = Progress {
            mfu: Some(0.4126),
            ..progress(3)
        };
        assert!(
            one_line(&known).contains(" tok/s  mfu 41.3%  4/4 ranks"),
            "{}",
            one_line(&known)
        );
        assert!(!one_line(&progress(3)).contains("mfu"));
    }

    fn one_line(progress: &Progress) -> String {
        let (lines, _) = progress.render(PLAIN, 0);
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines.concat()
    }

    #[test]
    fn a_line_says_it_all() {
        assert_eq!(
            one_line(&progress(12)),
            "step  12/600  loss  5.4321  norm   1.23  lr  1.9e-3    9.1k tok/s  4/4 ranks   1m12s left  \
             wiki-zh 21%  5.61  code 40%     -  book 39%  4.00"
        );
    }

    #[test]
    fn unknown_numbers_are_dashes() {
        let mut first = progress(1);
        (first.tokens_per_s, first.eta_s) = (None, None);
        first.domains.clear();
        assert_eq!(
            one_line(&first),
            "step   1/600  loss  5.4321  norm   1.23  lr  1.9e-3       - tok/s  4/4 ranks       - left"
        );
    }

    /// A terminal of the usual widths shows everything, with no line that the terminal would have to break.
    #[test]
    fn domains_that_do_not_fit_have_a_line_of_their_own() {
        let head = "step  12/600  loss  5.4321  norm   1.23  lr  1.9e-3    9.1k tok/s  4/4 ranks";
        let (left, domains) = (" 1m12s left", "wiki-zh 21%  5.61  code 40%     -  book 39%  4.00");
        let shown = |columns| progress(12).render(plain(columns), 0);
        assert_eq!(
            shown(80),
            (
                vec![
                    head.to_owned(),
                    format!("     {left}  wiki-zh 21%  5.61  code 40%     -  book 39%  4.00")
                ],
                0
            )
        );
        for columns in [100, 120] {
            let whole = vec![format!("{head}  {left}"), format!("     {domains}")];
            assert_eq!(shown(columns), (whole, 0), "{columns} columns");
        }
        assert_eq!(shown(140).0, [format!("{head}  {left}  {domains}")]);
    }

    /// The quickstart's domains, which no usual terminal has room for at once: each has its turn.
    #[test]
    fn domains_that_one_line_cannot_hold_take_turns() {
        let names = [
            "classic-zh",
            "book-zh",
            "book-en",
            "help-zh",
            "help-en",
            "manual-zh",
            "manual-en",
            "knowledge-en",
            "code",
        ];
        let mut nine = progress(12);
        nine.domains = names
            .map(|name| DomainProgress {
                name: name.to_owned(),
                weight: 0.1,
                loss: Some(6.25),
            })
            .to_vec();
        for (columns, reports) in [(80, 5), (100, 3), (120, 2)] {
            let (mut first, mut seen) = (0, Vec::new());
            for _ in 0..reports {
                let (lines, next) = nine.render(plain(columns), first);
                assert_eq!(lines.len(), 2, "{lines:?}");
                assert!(lines.iter().all(|line| line.len() <= columns), "{columns}: {lines:?}");
                let text = lines.concat();
                for part in ["step  12/600", "loss", "norm", "lr", "tok/s", "4/4 ranks", "1m12s left"] {
                    assert!(text.contains(part), "{columns}: {part} in {lines:?}");
                }
                let shown = names.iter().filter(|name| text.contains(&format!(" {name} 10%  6.25")));
                seen.extend(shown.copied());
                first = next;
            }
            assert!(names.iter().all(|name| seen.contains(name)), "{columns}: {seen:?}");
        }
    }

    #[test]
    fn a_name_that_no_line_can_hold_is_cut() {
        let mut long = progress(12);
        long.domains[1].name = "网络文本".repeat(20);
        let (mut first, mut seen) = (0, String::new());
        for _ in 0..3 {
            let (lines, next) = long.render(plain(80), first);
            assert!(lines.iter().all(|line| columns(line) <= 80), "{lines:?}");
            seen += &lines.concat();
            first = next;
        }
        for part in ["wiki-zh 21%", "网络文本网络文本", "book 39%"] {
            assert!(seen.contains(part), "{part} has no turn");
        }
    }

    #[test]
    fn colour_changes_no_letter() {
        let style = Style {
            colour: true,
            columns: Some(80),
        };
        let mut lame = progress(12);
        lame.ranks_alive = 3;
        let painted = lame.render(style, 0).0.join("\n");
        assert!(painted.contains("\x1b[33m3/4 ranks\x1b[0m"), "{painted}");
        let mut bare = painted;
        for code in ["\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[33m"] {
            bare = bare.replace(code, "");
        }
        assert_eq!(bare, lame.render(plain(80), 0).0.join("\n"));
    }

    #[test]
    fn incidents_read_as_sentences() {
        let lost = Incident::RankLost {
            worker: 2,
            incarnation: 0,
            cause: "killed by signal 9".to_owned(),
        };
        let recovered = Incident::Recovered {
            recovery_ms: 83.6,
            generation: 2,
            ranks: 3,
            steps_lost: 0,
        };
        let checkpoint = Incident::CheckpointCommitted {
            step: 200,
            checkpoint_ms: 12_345.0,
        };
        let decision = Incident::Decision {
            effective_step: 208,
            what: "mixture wiki-zh 0.20 -> 0.24".to_owned(),
        };
        let evaluated = Incident::Evaluated {
            step: 150,
            losses: vec![("en".to_owned(), 5.1234), ("zh".to_owned(), 6.0)],
        };
        let lines: Vec<String> = [lost, recovered, checkpoint, decision, evaluated]
            .iter()
            .map(|incident| incident.render(PLAIN))
            .collect();
        assert_eq!(
            lines,
            [
                "! lost worker 2 (incarnation 0): killed by signal 9",
                "! recovered in 84 ms: generation 2, 3 ranks, no step lost",
                "* checkpoint of step 200 committed in 12.3 s",
                "* decided for step 208 on: mixture wiki-zh 0.20 -> 0.24",
                "* held out at step 150: en 5.123  zh 6.000",
            ]
        );
    }

    #[test]
    fn time_left_keeps_its_width() {
        for (seconds, text) in [
            (0.4, "0s"),
            (59.9, "1m00s"),
            (3_599.0, "59m59s"),
            (11_220.0, "3h07m"),
            (1e6, "11d13h"),
        ] {
            assert_eq!(duration(seconds), text);
        }
        assert_eq!(duration(f64::NAN), "-");
        assert_eq!(duration(-1.0), "-");
    }

    proptest! {
        /// Columns line up from the first step of a run to its last.
        #[test]
        fn lines_of_one_run_are_aligned(step in 1_u64..=600, loss in 0.0_f64..99.0, norm in 0.0_f64..999.0, rate in 1.0_f64..9e5) {
            let mut line = progress(step);
            (line.loss, line.grad_norm, line.tokens_per_s) = (loss, norm, Some(rate));
            prop_assert_eq!(one_line(&line).len(), one_line(&progress(600)).len());
        }

        /// Nothing makes it panic or leave the terminal's width, and every field and at least one domain is shown.
        #[test]
        fn any_numbers_keep_within_the_columns(
            loss in any::<f64>(), norm in any::<f64>(), eta in any::<f64>(), width in 40_usize..200, first in 0_usize..3,
        ) {
            let mut line = progress(3);
            (line.loss, line.grad_norm, line.eta_s) = (loss % 1e6, norm % 1e6, Some(eta));
            let (lines, next) = line.render(plain(width), first);
            for text in &lines {
                prop_assert!(columns(text) <= width && !text.contains('\n'), "{} columns: {:?}", width, lines);
            }
            prop_assert!(next < 3);
            prop_assert!(lines.concat().contains("ranks") && lines.concat().contains('%'), "{:?}", lines);
        }
    }
}
