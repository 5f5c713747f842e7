//! The one reader of a run behind all who look at its page. It looks only when somebody asks and what it knows is older
//! than [`REFRESH_INTERVAL_MS`]; else it answers what it said last.
//!
//! The present comes from [`Watcher`], as on a terminal; the course of the run from its files, in which it reads on where
//! it stopped. It waits for disks and for the controller, so it has a thread of its own.

use super::record::Record;
use super::shown;
use super::tail::Tail;
use crate::run_folder::RunFolder;
use crate::watch::View;
use crate::watch::look::Watcher;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Least time between two looks.
pub const REFRESH_INTERVAL_MS: u64 = 500;
/// So long one look reads in each file at most, but for the piece under way: a long run is read bit by bit, and leaves the
/// processors to training.
const READ_BUDGET_MS: u64 = 50;

/// What somebody wants to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Question {
    /// The present.
    View,
    /// The course of the run after a step.
    History {
        /// Nothing of it and of those before.
        after: u64,
    },
}

/// Reads one run.
#[derive(Debug)]
pub struct Reader {
    watcher: Watcher,
    view: View,
    languages: BTreeMap<String, &'static str>,
    trace: Tail,
    metrics: Tail,
    events: Tail,
    record: Record,
    /// Raised when a file turned out to be another one: what was told before is void.
    edition: u64,
    looked_at: Option<Instant>,
    /// The present as last seen, as JSON.
    shown: String,
}

impl Reader {
    /// Of a run in `folder` that ends after `last_step` and begins with domains of these languages.
    #[must_use]
    pub fn new(folder: &RunFolder, last_step: u64, languages: BTreeMap<String, &'static str>) -> Self {
        Self {
            watcher: Watcher::new(folder.clone()).ended_after(last_step),
            view: View::default(),
            trace: Tail::new(folder.trace()),
            metrics: Tail::new(folder.metrics()),
            events: Tail::new(folder.events()),
            record: Record::new(languages.clone()),
            languages,
            edition: 1,
            looked_at: None,
            shown: String::new(),
        }
    }

    /// The answer, as JSON.
    pub fn answer(&mut self, question: Question, now: Instant, now_unix_ms: u64) -> String {
        let interval = Duration::from_millis(REFRESH_INTERVAL_MS);
        if self
            .looked_at
            .is_none_or(|looked_at| now.saturating_duration_since(looked_at) >= interval)
        {
            let began = Instant::now();
            self.look(now_unix_ms);
            // From its end: whoever asked meanwhile, and waited for it, is served by it, however long it took.
            self.looked_at = Some(now + began.elapsed());
        }
        match question {
            Question::View => self.shown.clone(),
            Question::History { after } => self.history(after),
        }
    }

    fn look(&mut self, now_unix_ms: u64) {
        self.read_on();
        self.watcher.hear_of_ends(self.record.ends());
        match self.watcher.look(now_unix_ms) {
            Ok(view) => self.view = view,
            // What was known stays, and grows old.
            Err(failure) => {
                self.view.remark = Some(failure.message);
                self.view.now_unix_ms = now_unix_ms;
            }
        }
        self.shown = shown::view(&self.view, &mut self.record).to_string();
    }

    /// What cannot be read the view says: it looks at the same files.
    fn read_on(&mut self) {
        let files = [&mut self.trace, &mut self.metrics, &mut self.events].map(Tail::open);
        let is_other = files.iter().any(|file| matches!(file, Ok((_, true))));
        if is_other {
            self.edition += 1;
            self.record = Record::new(self.languages.clone());
            for tail in [&mut self.trace, &mut self.metrics, &mut self.events] {
                tail.restart();
            }
        }
        let [trace, metrics, events] = files.map(|file| file.ok().map(|(opened, _)| opened));
        let budget = || Instant::now() + Duration::from_millis(READ_BUDGET_MS);
        let record = &mut self.record;
        if let Some(opened) = events {
            let _ = self.events.read(&opened, budget(), &mut |line| record.event_line(line));
        }
        if let Some(opened) = trace {
            let _ = self.trace.read(&opened, budget(), &mut |line| record.trace_line(line));
        }
        if let Some(opened) = metrics {
            let _ = self
                .metrics
                .read(&opened, budget(), &mut |line| record.metrics_line(line));
        }
    }

    fn history(&self, after: u64) -> String {
        let tails = [&self.trace, &self.metrics, &self.events].map(Tail::progress);
        let (read, length) = tails
            .into_iter()
            .fold((0, 0), |(read, length), tail| (read + tail.0, length + tail.1));
        let mut told = self.record.history().since(after);
        told["edition"] = self.edition.into();
        told["read_fraction"] = (if length > 0 { read as f64 / length as f64 } else { 1.0 }).into();
        told.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::Path;

    const NOW: u64 = 1_000_000;

    fn append(path: &Path, line: &Value) {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        writeln!(file.expect("a file"), "{line}").expect("written");
    }

    fn trace_line(step: u64) -> Value {
        json!({"step": step, "tokens": step * 10, "loss": 5.0, "lr": 1e-3, "mixture": {"web": 1.0}, "decisions": []})
    }

    /// A reader of a folder with so many steps.
    fn reader(steps: u64) -> (tempfile::TempDir, RunFolder, Reader) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = RunFolder::new(dir.path());
        for step in 1..=steps {
            append(&folder.trace(), &trace_line(step));
            append(
                &folder.metrics(),
                &json!({"step": step, "time_unix_ms": step, "tokens_per_s": 7.0}),
            );
        }
        let reader = Reader::new(&folder, 100, BTreeMap::new());
        (dir, folder, reader)
    }

    fn ask(reader: &mut Reader, question: Question, at: Instant) -> Value {
        serde_json::from_str(&reader.answer(question, at, NOW)).expect("JSON")
    }

    const ALL: Question = Question::History { after: 0 };

    /// However many ask: a look now and then, and what is new after it.
    #[test]
    fn one_look_serves_all_who_ask_within_its_time() {
        let (_dir, folder, mut reader) = reader(3);
        let began = Instant::now();
        assert_eq!(ask(&mut reader, Question::View, began)["step"], 3);
        // The look took no longer, and its time counts from its end.
        let took = began.elapsed();
        append(&folder.trace(), &trace_line(4));
        let later = |ms| began + Duration::from_millis(ms);
        assert_eq!(ask(&mut reader, Question::View, later(499))["step"], 3);
        assert_eq!(ask(&mut reader, ALL, later(499))["step"], json!([1, 2, 3]));
        assert_eq!(ask(&mut reader, ALL, later(500) + took)["step"], json!([1, 2, 3, 4]));
        let view = ask(&mut reader, Question::View, later(501) + took);
        assert_eq!((&view["step"], &view["figures"]["tokens"]), (&4.into(), &40.into()));
        assert_eq!(
            ask(&mut reader, Question::History { after: 3 }, later(502) + took)["step"],
            json!([4])
        );
    }

    /// A controller that is slow to answer is asked once, whoever waits meanwhile.
    #[test]
    fn a_look_that_takes_long_serves_all_who_waited_for_it() {
        let (_dir, folder, mut reader) = reader(3);
        std::fs::write(folder.control_token(), "00").expect("written");
        let listener = UnixListener::bind(folder.control_socket()).expect("a socket");
        let took = Duration::from_millis(REFRESH_INTERVAL_MS + 100);
        let asked = std::thread::spawn(move || {
            let mut asked = 0;
            for connection in listener.incoming() {
                let mut said = [0; 1];
                // The last one says nothing.
                let mut connection = connection.expect("a connection");
                if connection.read(&mut said).unwrap_or(0) == 0 {
                    return asked;
                }
                asked += 1;
                // It hangs up only then.
                std::thread::sleep(took);
            }
            asked
        });
        let began = Instant::now();
        for waited in 0..3 {
            assert_eq!(ask(&mut reader, Question::View, began + took * waited / 2)["step"], 3);
        }
        drop(UnixStream::connect(folder.control_socket()).expect("a connection"));
        assert_eq!(asked.join().expect("no panic"), 1);
    }

    #[test]
    fn a_trace_that_is_another_one_begins_a_new_edition() {
        let (_dir, folder, mut reader) = reader(3);
        let began = Instant::now();
        let first = ask(&mut reader, ALL, began);
        assert_eq!((&first["edition"], &first["read_fraction"]), (&1.into(), &1.0.into()));
        std::fs::write(folder.trace(), format!("{}\n", trace_line(1))).expect("written");
        let second = ask(&mut reader, ALL, began + Duration::from_secs(1));
        assert_eq!(second["edition"], 2);
        assert_eq!(
            second["tokens"],
            json!([10, null, null]),
            "of the trace one step is left"
        );
        assert_eq!(
            second["tokens_per_s"]["mean"],
            json!([7.0, 7.0, 7.0]),
            "the other files are read again"
        );
    }

    #[test]
    fn a_folder_that_goes_away_is_said_and_what_was_known_stays() {
        let (dir, _folder, mut reader) = reader(3);
        let began = Instant::now();
        ask(&mut reader, Question::View, began);
        dir.close().expect("removed");
        let view = ask(&mut reader, Question::View, began + Duration::from_secs(1));
        assert_eq!((&view["step"], &view["now_unix_ms"]), (&3.into(), &NOW.into()));
        let remark = view["remark"].as_str().expect("what is wrong");
        assert!(remark.contains("is gone"), "{remark}");
    }
}
