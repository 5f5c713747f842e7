//! `tarazed status`: asks a live run through its control socket, and reads the files where none is live.
//!
//! One JSON request line, one JSON answer line. This module only reads.

use crate::exit::{Exit, Failure};
use crate::output::{print, print_json};
use crate::progress;
use crate::run_folder::RunFolder;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest wait for a live controller's answer.
const ANSWER_TIMEOUT_MS: u64 = 5_000;
/// Longest accepted answer.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// How much of a file's end is read to find its last line; a trace line with 256 domains is far shorter.
const TAIL_BYTES_MAX: u64 = 1024 * 1024;
/// Longest path of a Unix socket's address, its final zero included.
const SOCKET_PATH_BYTES_MAX: usize = 108;

/// Options of `tarazed status`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder; the newest below runs/ where it is absent.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Refused where there is no run, transient where a live controller does not answer.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    let folder = RunFolder::find(args.run_dir.as_deref(), Path::new("runs"))?;
    let mut answer = match ask(&folder, "status")? {
        Some(answer) => answer,
        None => from_files(&folder)?,
    };
    add_utilisation(&folder, &mut answer)?;
    if args.json {
        print_json(&answer)?;
    } else {
        print(&table(&folder, &answer))?;
    }
    Ok(Exit::Done)
}

/// Sends `command` to the run's controller; `None` where no controller listens.
///
/// # Errors
/// Refused where the token cannot be read or is not accepted, transient where the controller does not answer.
pub fn ask(folder: &RunFolder, command: &str) -> Result<Option<Value>, Failure> {
    ask_for(folder, json!({"command": command}))
}

/// As [`ask`], with a request that says more than the command's name.
///
/// # Errors
/// As [`ask`].
pub fn ask_for(folder: &RunFolder, mut request: Value) -> Result<Option<Value>, Failure> {
    let socket = folder.control_socket();
    let Some(mut stream) = connect(&socket)? else {
        return Ok(None);
    };
    let token_path = folder.control_token();
    let token = std::fs::read_to_string(&token_path).map_err(|e| {
        Failure::refused(
            token_path.display(),
            format!("cannot be read ({e})"),
            "only the user who started the run may ask it",
        )
    })?;
    let silent = |e: std::io::Error| {
        Failure::transient(
            socket.display(),
            format!("the controller does not answer ({e})"),
            "try again; events.jsonl in the run folder says what it does",
        )
    };
    let timeout = Some(Duration::from_millis(ANSWER_TIMEOUT_MS));
    stream
        .set_read_timeout(timeout)
        .and_then(|()| stream.set_write_timeout(timeout))
        .map_err(silent)?;
    request["token"] = token.trim().into();
    stream.write_all(format!("{request}\n").as_bytes()).map_err(silent)?;
    let mut line = String::new();
    BufReader::new(stream.take(ANSWER_BYTES_MAX))
        .read_line(&mut line)
        .map_err(silent)?;
    if !line.ends_with('\n') {
        return Err(silent(ErrorKind::UnexpectedEof.into()));
    }
    let answer: Value = serde_json::from_str(&line).map_err(|e| {
        Failure::refused(
            socket.display(),
            format!("the answer is not JSON ({e})"),
            "use the same version of tarazed as the run",
        )
    })?;
    match answer.get("error").and_then(Value::as_str) {
        Some(error) => {
            let remedy = answer.get("remedy").and_then(Value::as_str);
            let remedy = remedy.unwrap_or("use the same version of tarazed as the run, as the same user");
            Err(Failure::refused(socket.display(), error, remedy))
        }
        None => Ok(Some(answer)),
    }
}

/// Connects; `None` where nothing listens. A path too long for a socket address goes through its folder's descriptor.
fn connect(socket: &Path) -> Result<Option<UnixStream>, Failure> {
    let failed = |e: std::io::Error| match e.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => Ok(None),
        _ => Err(Failure::refused(
            socket.display(),
            format!("cannot be opened ({e})"),
            "only the user who started the run may ask it",
        )),
    };
    let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
        return failed(ErrorKind::NotFound.into());
    };
    let connected = if socket.as_os_str().len() < SOCKET_PATH_BYTES_MAX {
        UnixStream::connect(socket)
    } else {
        std::fs::File::open(dir).and_then(|dir| {
            let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
            UnixStream::connect(short)
        })
    };
    connected.map(Some).or_else(failed)
}

/// What the files say of a run that is not live.
fn from_files(folder: &RunFolder) -> Result<Value, Failure> {
    let line = last_line(&folder.trace())?;
    let event = last_line(&folder.events())?;
    let step = line.as_ref().and_then(|line| line.get("step").cloned());
    Ok(json!({
        "live": false,
        "generation": null,
        "step": step.unwrap_or(json!(0)),
        "workers": [],
        "saving": null,
        "signals": signals_of(&folder.metrics())?,
        "last_line": line,
        "last_event": event,
    }))
}

/// Model FLOPs utilisation as last measured, in percent, where the run's devices have a known peak.
fn add_utilisation(folder: &RunFolder, answer: &mut Value) -> Result<(), Failure> {
    const KEY: &str = "mfu(%)";
    let measured = last_line(&folder.metrics())?;
    if let (Some(mfu), Some(answer)) = (measured.and_then(|line| line.get(KEY).cloned()), answer.as_object_mut()) {
        answer.insert(KEY.to_owned(), mfu);
    }
    Ok(())
}

/// The newest signals in `metrics.jsonl`, where not every line holds them; `None` where its end holds none.
fn signals_of(path: &Path) -> Result<Option<Value>, Failure> {
    let tail = tail(path)?;
    let mut lines = tail.split(|&byte| byte == b'\n').rev();
    // What is no JSON is a line that a crash cut short: this file is for people.
    let newest = lines.find_map(|line| serde_json::from_slice::<Value>(line).ok()?.get("signals").cloned());
    Ok(newest)
}

/// The end of a file; empty where there is none.
pub(crate) fn tail(path: &Path) -> Result<Vec<u8>, Failure> {
    let unreadable = |e: std::io::Error| {
        Failure::refused(
            path.display(),
            format!("cannot be read ({e})"),
            "check the folder and its permissions",
        )
    };
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(unreadable(e)),
    };
    let len = file.metadata().map_err(unreadable)?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES_MAX)))
        .map_err(unreadable)?;
    let mut tail = Vec::new();
    file.take(TAIL_BYTES_MAX).read_to_end(&mut tail).map_err(unreadable)?;
    Ok(tail)
}

/// The last whole line of a JSON-lines file; `None` where there is none.
fn last_line(path: &Path) -> Result<Option<Value>, Failure> {
    let tail = tail(path)?;
    let whole = tail.iter().rposition(|&b| b == b'\n').unwrap_or(0);
    let start = tail[..whole].iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
    if whole == 0 {
        return Ok(None);
    }
    serde_json::from_slice(&tail[start..whole]).map(Some).map_err(|e| {
        Failure::refused(
            path.display(),
            format!("its last line is not JSON ({e})"),
            "the file is damaged; `tarazed train` on this folder says what can be resumed",
        )
    })
}

fn table(folder: &RunFolder, answer: &Value) -> String {
    let mut text = String::new();
    let field = |value: &Value, key: &str| match value.get(key) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let live = answer.get("live").and_then(Value::as_bool).unwrap_or(true);
    let _ = writeln!(
        text,
        "{}: {}, step {}, generation {}",
        folder.dir().display(),
        if live { "live" } else { "not live" },
        field(answer, "step"),
        field(answer, "generation")
    );
    if let Some(mfu) = answer.get("mfu(%)").and_then(Value::as_f64) {
        let _ = writeln!(text, "model FLOPs utilisation {mfu:.1}% over the last steps");
    }
    let workers = answer.get("workers").and_then(Value::as_array);
    let mut columns = vec!["worker", "rank", "pid", "incarnation", "lanes", "step", "state"];
    if let Some(workers) = workers.filter(|list| !list.is_empty()) {
        if workers.iter().any(|worker| worker.get("node").is_some()) {
            columns.push("node");
        }
        let row = |of: &dyn Fn(&str) -> String| {
            columns
                .iter()
                .map(|name| format!("{:>12}", of(name)))
                .collect::<String>()
        };
        let _ = writeln!(text, "{}", row(&|name| name.to_owned()));
        for worker in workers {
            let _ = writeln!(text, "{}", row(&|name| field(worker, name)));
        }
    }
    if let Some(lag_s) = answer.get("durability_lag_s").and_then(Value::as_f64) {
        let newest = match answer.get("durable_step").and_then(Value::as_u64) {
            Some(step) => format!("newest checkpoint of step {step}"),
            None => "no checkpoint yet".to_owned(),
        };
        let _ = writeln!(text, "{newest}, {lag_s:.0} s behind");
    }
    if let Some(saving) = answer.get("saving").filter(|saving| saving.is_object()) {
        let number = |key: &str| saving.get(key).and_then(Value::as_u64).unwrap_or_default();
        let [step, stored, shards, for_ms] = ["step", "stored", "shards", "for_ms"].map(number);
        let _ = writeln!(text, "{}", progress::saving(step, stored, shards, for_ms));
    }
    if let Some(notice) = answer.get("rollback_notice").filter(|notice| notice.is_object()) {
        let _ = writeln!(
            text,
            "notice: at step {} training goes back to the state after step {} ({}), unless somebody vetoes it in time: \
             `tarazed decide {} veto {} --reason TEXT`",
            field(notice, "at"),
            field(notice, "to"),
            field(notice, "reason"),
            folder.dir().display(),
            field(notice, "decision")
        );
    }
    if let Some(signals) = answer.get("signals").filter(|signals| signals.is_object()) {
        text.push_str(&signals_text(signals));
    }
    if !live {
        if let Some(line) = answer.get("last_line").filter(|line| line.is_object()) {
            let _ = writeln!(
                text,
                "last committed step {}: loss {}, state {}",
                field(line, "step"),
                field(line, "loss"),
                field(line, "state")
            );
        }
        if let Some(event) = answer.get("last_event").filter(|event| event.is_object()) {
            let _ = writeln!(text, "last event: {event}");
        }
        let _ = writeln!(text, "`tarazed train` with the same config and folder resumes it.");
    }
    text
}

/// Gradient noise, and losses in bits per byte of text by domain and language.
fn signals_text(signals: &Value) -> String {
    let mut text = String::new();
    if let Some(noise) = signals.get("gradient_noise").filter(|noise| noise.is_object()) {
        let _ = match noise.get("scale_tokens").and_then(Value::as_f64) {
            Some(scale) => writeln!(text, "gradient noise scale: {scale:.0} tokens"),
            None => writeln!(
                text,
                "gradient noise scale: not known, the gradient is lost in its noise"
            ),
        };
    }
    let number = |of: &Value, key: &str| match of.get(key).and_then(Value::as_f64) {
        Some(number) => format!("{number:.3}"),
        None => "-".to_owned(),
    };
    let entries = |key: &str| signals.get(key).and_then(Value::as_object).into_iter().flatten();
    let keys = ["train_bits_per_byte", "heldout_bits_per_byte"];
    if entries("domains").any(|(_, domain)| keys.iter().any(|key| domain.get(key).is_some_and(Value::is_number))) {
        let _ = writeln!(text, "{:<20}{:>12}{:>12}", "bits per byte", "training", "held out");
        for (name, of) in entries("domains").chain(entries("languages")) {
            let [train, heldout] = keys.map(|key| number(of, key));
            let _ = writeln!(text, "  {name:<18}{train:>12}{heldout:>12}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn run_in(dir: &Path) -> RunFolder {
        std::fs::create_dir_all(dir).expect("a folder");
        std::fs::write(dir.join("config.toml"), "").expect("a file");
        std::fs::write(dir.join("control.token"), "secret\n").expect("a file");
        RunFolder::new(dir)
    }

    /// Answers one request with `answer` and returns the request.
    fn serve_once(listener: UnixListener, answer: &'static str) -> std::thread::JoinHandle<Value> {
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a connection");
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).expect("a request");
            (&stream).write_all(answer.as_bytes()).expect("an answer");
            serde_json::from_str(&line).expect("a JSON request")
        })
    }

    #[test]
    fn utilisation_is_said_where_it_was_measured() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = run_in(dir.path());
        let shown = || {
            let mut answer = from_files(&folder).expect("files");
            add_utilisation(&folder, &mut answer).expect("files");
            table(&folder, &answer)
        };
        assert!(!shown().contains("utilisation"), "no metrics yet");
        let metrics = dir.path().join("metrics.jsonl");
        std::fs::write(&metrics, "{\"step\":1,\"tokens_per_s\":5.0}\n").expect("a file");
        assert!(!shown().contains("utilisation"), "no known peak");
        std::fs::write(&metrics, "{\"step\":1}\n{\"step\":2,\"mfu(%)\":41.26}\n").expect("a file");
        assert!(
            shown().contains("model FLOPs utilisation 41.3% over the last steps"),
            "{}",
            shown()
        );
    }

    #[test]
    fn a_live_run_is_asked_with_its_token() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = run_in(dir.path());
        let listener = UnixListener::bind(folder.control_socket()).expect("a socket");
        let server = serve_once(
            listener,
            "{\"generation\":2,\"step\":7,\"durable_step\":3,\"durability_lag_s\":12.4,\"saving\":{\"step\":5,\"stored\":2,\"shards\":4,\"for_ms\":3900},\"workers\":[{\"worker\":0,\"rank\":0,\"pid\":9,\"incarnation\":1,\"lanes\":[0,4],\"step\":7,\"state\":\"training\"}]}\n",
        );
        let answer = ask(&folder, "status").expect("an answer").expect("a live run");
        let request = server.join().expect("the server ends");
        assert_eq!(request, json!({"token": "secret", "command": "status"}));
        let text = table(&folder, &answer);
        assert!(text.contains("live, step 7, generation 2"), "{text}");
        assert!(text.contains("training"), "{text}");
        assert!(
            text.contains("\nnewest checkpoint of step 3, 12 s behind\nsaving step 5: 2 of 4 shards, 3 s\n"),
            "{text}"
        );
    }

    #[test]
    fn a_long_path_is_no_obstacle() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = run_in(&dir.path().join("x".repeat(120)));
        let short = dir.path().join("s");
        let listener = UnixListener::bind(&short).expect("a socket");
        std::fs::rename(&short, folder.control_socket()).expect("a move");
        let server = serve_once(listener, "{\"step\":1}\n");
        let answer = ask(&folder, "status").expect("an answer").expect("a live run");
        server.join().expect("the server ends");
        assert_eq!(answer, json!({"step": 1}));
    }

    #[test]
    fn refusals_and_silence_are_told_apart() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = run_in(dir.path());
        let listener = UnixListener::bind(folder.control_socket()).expect("a socket");
        let server = serve_once(listener, "{\"error\":\"wrong token\"}\n");
        assert_eq!(ask(&folder, "status").expect_err("refused").exit, Exit::Refused);
        server.join().expect("the server ends");
        std::fs::remove_file(folder.control_socket()).expect("removed");
        let listener = UnixListener::bind(folder.control_socket()).expect("a socket");
        let server = serve_once(listener, "{\"st");
        assert_eq!(ask(&folder, "status").expect_err("cut off").exit, Exit::Transient);
        server.join().expect("the server ends");
    }

    #[test]
    fn a_dead_run_is_read_from_its_files() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = run_in(dir.path());
        // A socket that nobody listens to any more, as a killed controller leaves it.
        drop(UnixListener::bind(folder.control_socket()).expect("a socket"));
        assert!(ask(&folder, "status").expect("no error").is_none());
        std::fs::write(
            folder.trace(),
            "{\"step\":1}\n{\"step\":2,\"loss\":3.5}\n{\"step\":3,\"lo",
        )
        .expect("a trace");
        let answer = from_files(&folder).expect("an answer");
        assert_eq!((&answer["live"], &answer["step"]), (&json!(false), &json!(2)));
        let text = table(&folder, &answer);
        assert!(text.contains("not live, step 2"), "{text}");
        assert!(!text.contains("saving"), "{text}");
        assert!(text.contains("loss 3.5"), "{text}");
    }

    /// Signals that are known are shown; of a run that is not live, the newest of its metrics that hold any.
    #[test]
    fn signals_are_shown_in_their_units() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = run_in(dir.path());
        let signals = json!({
            "gradient_noise": {"scale_tokens": 1234.4, "gradient_square": 1.0, "noise_trace": 1234.4},
            "domains": {
                "web": {"train_bits_per_byte": 1.25, "heldout_bits_per_byte": 1.5},
                "tiny": {"train_bits_per_byte": 2.0, "heldout_bits_per_byte": null},
            },
            "languages": {"en": {"heldout_bits_per_byte": 1.5}},
        });
        let lines = [
            json!({"step": 1, "signals": {"domains": {}}}),
            json!({"step": 2, "signals": signals}),
            json!({"step": 3}),
        ];
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(folder.metrics(), text + "{\"st").expect("metrics");
        let answer = from_files(&folder).expect("an answer");
        assert_eq!(answer["signals"], signals);
        let shown = table(&folder, &answer);
        assert!(shown.contains("gradient noise scale: 1234 tokens"), "{shown}");
        for row in [["web", "1.250", "1.500"], ["tiny", "2.000", "-"], ["en", "-", "1.500"]] {
            let found = shown.lines().any(|line| line.split_whitespace().eq(row));
            assert!(found, "{row:?} in {shown}");
        }

        let lost = json!({"gradient_noise": {"scale_tokens": null}, "domains": {"web": {"train_bits_per_byte": null}}});
        let shown = signals_text(&lost);
        assert!(
            shown.contains("not known") && !shown.contains("bits per byte"),
            "{shown}"
        );
    }

    #[test]
    fn a_run_without_a_trace_stands_at_step_0() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = run_in(dir.path());
        assert_eq!(from_files(&folder).expect("an answer")["step"], json!(0));
    }
}
