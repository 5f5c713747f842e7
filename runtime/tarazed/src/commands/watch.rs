//! `tarazed watch`: a run on the terminal, redrawn in place until it ends or somebody leaves.
//!
//! One thread looks ([`crate::watch::look`]), this one draws what it saw last ([`crate::watch::draw`]), so a controller
//! that does not answer holds up no redraw. The terminal keeps its modes and its one screen: each page is written over the
//! last one, and there is nothing to restore however this ends, by SIGKILL too. The last page stays.

use crate::exit::{Exit, Failure};
use crate::outlet::DRAIN_TIMEOUT_MS;
use crate::progress::Style;
use crate::run_folder::RunFolder;
use crate::watch::draw::{Line, Tone, draw};
use crate::watch::look::{Watcher, choose, unix_ms};
use crate::watch::{Stage, View};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch::{Receiver, channel};

/// Where a terminal does not say its size.
const TERMINAL: (usize, usize) = (80, 24);
/// Columns and rows of a block where standard output is no terminal.
const BLOCK: (usize, usize) = (120, 60);

/// Options of `tarazed watch`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder; the newest below runs/ where it is absent.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Milliseconds between two looks.
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
    interval_ms: u64,
}

/// What was seen last; none before the first look.
type Seen = Option<Result<View, Failure>>;

/// Runs the command.
///
/// # Errors
/// Refused where there is no run, or its folder goes away.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    let folder = choose(args.run_dir.as_deref(), Path::new("runs"))?;
    let interval = Duration::from_millis(args.interval_ms);
    let runtime = super::runtime()?;
    let ended = runtime.block_on(async {
        // Before anything is drawn, so that a page is always written to its end.
        let signals = Signals::hear()?;
        show(observe(folder, interval)?, signals, Page::for_stdout(), interval).await
    });
    // A reader that stands still must not keep this process.
    runtime.shutdown_background();
    ended
}

/// Starts the thread that looks, until the run ends or nobody wants to know.
fn observe(folder: RunFolder, interval: Duration) -> Result<Receiver<Seen>, Failure> {
    let (tell, seen) = channel(None);
    let look = move || {
        let mut watcher = Watcher::new(folder);
        loop {
            let looked = watcher.look(unix_ms());
            let goes_on = looked.as_ref().is_ok_and(|view| view.stage != Stage::Ended);
            if tell.send(Some(looked)).is_err() || !goes_on {
                return;
            }
            std::thread::sleep(interval);
        }
    };
    std::thread::Builder::new()
        .name("look".to_owned())
        .spawn(look)
        .map_err(|e| {
            Failure::transient(
                "threads",
                format!("cannot be started ({e})"),
                "free resources and try again",
            )
        })?;
    Ok(seen)
}

/// Draws what is seen until the run ends, its reader goes, or a signal comes.
async fn show(mut seen: Receiver<Seen>, signals: Signals, mut page: Page, interval: Duration) -> Result<Exit, Failure> {
    let Signals {
        terminate,
        interrupt,
        hangup,
        mut resized,
    } = signals;
    let mut leave = pin!(any_of(terminate, interrupt, hangup));
    loop {
        let view = tokio::select! {
            () = &mut leave => return Ok(Exit::Done),
            view = next(&mut seen, &mut resized, page.is_terminal.then_some(2 * interval)) => view?,
        };
        let text = page.text(&view);
        let mut written = tokio::task::spawn_blocking(move || write(&text));
        let goes_on = tokio::select! {
            goes_on = &mut written => goes_on,
            () = &mut leave => {
                // To the end of the page, unless the terminal stands still.
                let _ = tokio::time::timeout(Duration::from_millis(DRAIN_TIMEOUT_MS), written).await;
                return Ok(Exit::Done);
            }
        };
        let goes_on = goes_on
            .map_err(|e| Failure::halted("the page", format!("was not written ({e})"), "report this as a bug"))??;
        if !goes_on || view.stage == Stage::Ended {
            return Ok(Exit::Done);
        }
    }
}

/// What is to be drawn next: at a new look, and on a terminal also when its size changes or no look comes for long, so that
/// times go on.
async fn next(seen: &mut Receiver<Seen>, resized: &mut Signal, patience: Option<Duration>) -> Result<View, Failure> {
    loop {
        let late = async {
            match patience {
                Some(patience) => tokio::time::sleep(patience).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = seen.changed() => changed.map_err(|_| {
                Failure::halted("the thread that looks", "has ended", "report this as a bug")
            })?,
            _ = resized.recv(), if patience.is_some() => {}
            () = late => {}
        }
        if let Some(seen) = seen.borrow_and_update().clone() {
            return seen.map(|view| View {
                now_unix_ms: unix_ms(),
                ..view
            });
        }
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    resized: Signal,
}

impl Signals {
    fn hear() -> Result<Self, Failure> {
        let hear = |kind| {
            signal(kind).map_err(|e| Failure::transient("signals", format!("cannot be heard ({e})"), "try again"))
        };
        Ok(Self {
            terminate: hear(SignalKind::terminate())?,
            interrupt: hear(SignalKind::interrupt())?,
            hangup: hear(SignalKind::hangup())?,
            resized: hear(SignalKind::window_change())?,
        })
    }
}

async fn any_of(mut terminate: Signal, mut interrupt: Signal, mut hangup: Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = hangup.recv() => {}
    }
}

/// How pages are written to standard output.
struct Page {
    /// One over the other, or one behind the other.
    is_terminal: bool,
    colour: bool,
    /// Pages so far.
    count: u64,
}

impl Page {
    fn for_stdout() -> Self {
        let is_dumb = std::env::var_os("TERM").is_some_and(|name| name == "dumb");
        Self {
            is_terminal: std::io::stdout().is_terminal() && !is_dumb,
            colour: Style::for_stdout().colour && !is_dumb,
            count: 0,
        }
    }

    /// The bytes of the next page.
    fn text(&mut self, view: &View) -> String {
        let (width, height) = if self.is_terminal { terminal_size() } else { BLOCK };
        self.count += 1;
        if !self.is_terminal {
            let gap = if self.count > 1 { "\n" } else { "" };
            return format!("{gap}{}", self.lines(view, width, height, ""));
        }
        // The cursor stands in the row behind the page, so that no line scrolls the terminal.
        let height = height.saturating_sub(1);
        match (self.count, &view.stage) {
            // There is only this one.
            (1, Stage::Ended) => self.lines(view, width, height, ""),
            // What was there moves up, out of the way.
            (1, _) => "\n".repeat(height) + &self.over(view, width, height),
            _ => self.over(view, width, height),
        }
    }

    /// From the upper left corner: each row is cleared before it is written, since a full one leaves no cursor to clear
    /// from; then all that is below.
    fn over(&self, view: &View, width: usize, height: usize) -> String {
        format!("\x1b[H{}\x1b[J", self.lines(view, width, height, "\x1b[K"))
    }

    fn lines(&self, view: &View, width: usize, height: usize, before: &str) -> String {
        let lines = draw(view, width, height);
        let lines = lines.iter().map(|line| format!("{before}{}\n", self.paint(line)));
        lines.collect()
    }

    fn paint(&self, line: &Line) -> String {
        let code = match line.tone {
            Tone::Plain => return line.text.clone(),
            Tone::Title => "1",
            Tone::Good => "32",
            Tone::Warning => "33",
            Tone::Alarm => "31",
        };
        if self.colour {
            format!("\x1b[{code}m{}\x1b[0m", line.text)
        } else {
            line.text.clone()
        }
    }
}

fn terminal_size() -> (usize, usize) {
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    let (columns, rows) = size.map_or((0, 0), |size| (usize::from(size.ws_col), usize::from(size.ws_row)));
    let or = |found: usize, usual: usize| if found > 0 { found } else { usual };
    (or(columns, TERMINAL.0), or(rows, TERMINAL.1))
}

/// Whether anybody reads on: unlike a command that prints once, this one would print for ever.
fn write(text: &str) -> Result<bool, Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Failure::io(
            "standard output",
            &e,
            "cannot be written",
            "free space or redirect it elsewhere, and try again",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting() -> View {
        View {
            stage: Stage::Gone,
            name: "tiny".to_owned(),
            ..View::default()
        }
    }

    fn page(is_terminal: bool, colour: bool) -> Page {
        Page {
            is_terminal,
            colour,
            count: 0,
        }
    }

    /// Blocks one behind the other, without anything but text.
    #[test]
    fn what_is_no_terminal_gets_plain_blocks() {
        let mut page = page(false, false);
        let (first, second) = (page.text(&waiting()), page.text(&waiting()));
        assert!(first.starts_with("tiny\nthe controller is gone"), "{first}");
        assert_eq!(second, format!("\n{first}"));
        assert!(!first.contains('\x1b'));
    }

    /// Nothing that would have to be taken back when this is killed: no other screen, no hidden cursor, and each colour ends in
    /// its line.
    #[test]
    fn a_page_leaves_nothing_to_restore() {
        let mut page = page(true, true);
        let (_, height) = terminal_size();
        let (first, second) = (page.text(&waiting()), page.text(&waiting()));
        assert_eq!(first, "\n".repeat(height - 1) + &second);
        assert!(
            second.starts_with("\x1b[H\x1b[K\x1b[1mtiny\x1b[0m\n\x1b[K\x1b[31mthe controller"),
            "{second:?}"
        );
        assert!(second.ends_with("\n\x1b[J") && !second.contains("\x1b[?"), "{second:?}");
        for line in second
            .lines()
            .filter(|line| line.contains("\x1b[3") || line.contains("\x1b[1m"))
        {
            assert!(line.ends_with("\x1b[0m"), "{line:?}");
        }
    }

    /// A run that has ended before is printed once, below what was on the terminal.
    #[test]
    fn an_end_alone_is_printed_where_the_cursor_stands() {
        let ended = View {
            stage: Stage::Ended,
            ..waiting()
        };
        let text = page(true, false).text(&ended);
        assert!(text.starts_with("tiny\n") && !text.contains('\x1b'), "{text:?}");
    }
}
