//! The control socket: one JSON request line, one JSON answer line, for whoever holds the token.

use super::coordinator::CoordinatorMessage;
use super::sharder::SharderMessage;
use super::tree::Ear;
use crate::later_data;
use crate::run_folder::RunPaths;
use ractor::{ActorRef, rpc::CallResult};
use serde_json::{Value, json};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tarazed_corpus::TokenizerManifest;
use tarazed_domain::StepIndex;
use tarazed_domain::config::ClusterConfig;
use tarazed_protocol::data::controller::Request as Decide;
use tarazed_protocol::data::decision::DecisionKind;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// Bytes of one request.
const REQUEST_BYTES_MAX: u64 = 64 * 1024;
/// Bytes of a person's name.
const PERSON_BYTES_MAX: usize = 128;
/// Bytes of a person's reason.
const REASON_BYTES_MAX: usize = 4096;
/// A request must be there and be answered by then.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest path of a Unix socket's address.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Opens the control socket of a run and writes its token for the owner alone. A path that is too long for a socket is
/// bound through its folder's descriptor.
///
/// # Errors
/// If the socket or the token cannot be made.
pub fn open(paths: &RunPaths, token: &str) -> std::io::Result<UnixListener> {
    let token_path = paths.control_token();
    let _ = std::fs::remove_file(&token_path);
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&token_path)?;
    writeln!(file, "{token}")?;
    let socket = paths.control_socket();
    // The folder's lock is ours, so a socket that is there belongs to a controller that is gone.
    let _ = std::fs::remove_file(&socket);
    if socket.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
        return UnixListener::bind(&socket);
    }
    let folder = std::fs::File::open(paths.dir())?;
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&folder);
    UnixListener::bind(format!("/proc/self/fd/{descriptor}/control.sock"))
}

/// Whom requests are passed on to, and what they are judged by.
pub struct Desk {
    /// As many ranks as a world may have.
    pub ranks_max: u32,
    /// Who is where.
    pub cluster: ClusterConfig,
    /// Where the run keeps its data sets.
    pub data: PathBuf,
    /// Tokens of one sequence.
    pub context: usize,
    /// That of the data that the run began with.
    pub tokenizer: TokenizerManifest,
    /// Who knows of the run.
    pub coordinator: ActorRef<CoordinatorMessage>,
    /// Who knows of its shards.
    pub sharder: ActorRef<SharderMessage>,
}

/// Serves requests for ever.
pub async fn serve(listener: UnixListener, token: String, desk: Desk) {
    let desk = Arc::new(desk);
    while let Ok((stream, _)) = listener.accept().await {
        let (token, desk) = (token.clone(), Arc::clone(&desk));
        tokio::spawn(async move {
            let answered = tokio::time::timeout(REQUEST_TIMEOUT, answer(stream, &token, &desk)).await;
            if let Ok(Err(error)) = answered {
                tracing::debug!("a status request broke off: {error}");
            }
        });
    }
}

/// What a request line asks for.
#[derive(Clone, PartialEq, Debug)]
pub enum Request {
    /// It does not hold the run's token; whatever else it says is not looked at.
    Stranger,
    /// The status.
    Status,
    /// Another number of ranks; none if what stands there is no number of ranks.
    Resize(Option<u32>),
    /// A decision (LOOP-2), or why what stands there is none.
    Decide(Result<Box<Decide>, String>),
    /// A command that does not exist.
    Unknown(String),
}

impl Request {
    /// Reads a line, whatever it holds.
    #[must_use]
    pub fn read(line: &str, token: &str) -> Self {
        let request: Value = serde_json::from_str(line).unwrap_or(Value::Null);
        let field = |name: &str| request.get(name).and_then(Value::as_str).unwrap_or_default();
        // Compared as hashes, so that the time it takes says nothing of the token.
        if blake3::hash(field("token").as_bytes()) != blake3::hash(token.as_bytes()) {
            return Self::Stranger;
        }
        match field("command") {
            "status" => Self::Status,
            "resize" => Self::Resize(
                request
                    .get("ranks")
                    .and_then(Value::as_u64)
                    .and_then(|ranks| u32::try_from(ranks).ok()),
            ),
            "decide" => Self::Decide(read_decision(&request)),
            other => Self::Unknown(other.to_owned()),
        }
    }
}

/// The decision that a request asks for.
fn read_decision(request: &Value) -> Result<Box<Decide>, String> {
    let text = |name: &str, bytes_max: usize| {
        let text = request.get(name).and_then(Value::as_str).unwrap_or_default();
        if text.is_empty() || text.len() > bytes_max {
            return Err(format!("'{name}' is a text of 1 to {bytes_max} bytes"));
        }
        Ok(text.to_owned())
    };
    let not_before = match request.get("not_before") {
        None | Some(Value::Null) => None,
        Some(step) => Some(StepIndex(step.as_u64().ok_or("'not_before' is a step, from 0")?)),
    };
    let kind = request.get("kind").cloned().unwrap_or(Value::Null);
    Ok(Box::new(Decide {
        person: text("person", PERSON_BYTES_MAX)?,
        reason: text("reason", REASON_BYTES_MAX)?,
        kind: serde_json::from_value(kind).map_err(|e| format!("'kind' is no decision ({e})"))?,
        not_before,
    }))
}

async fn answer(mut stream: UnixStream, token: &str, desk: &Arc<Desk>) -> std::io::Result<()> {
    let (read, mut write) = stream.split();
    let mut line = String::new();
    BufReader::new(read.take(REQUEST_BYTES_MAX))
        .read_line(&mut line)
        .await?;
    let value = match Request::read(&line, token) {
        Request::Stranger => json!({"error": "the token is not this run's"}),
        Request::Status => {
            let mut value = status(&desk.coordinator, &desk.sharder).await;
            name_nodes(&mut value, &desk.cluster);
            value
        }
        Request::Resize(ranks) => resize(ranks, desk.ranks_max, &desk.coordinator),
        Request::Decide(Ok(request)) => match check_data(desk, &request.kind).await {
            Ok(()) => decide(request, &desk.coordinator).await,
            Err(error) => json!({"error": error, "remedy": "`tarazed data add` brings data sets into a run"}),
        },
        Request::Decide(Err(error)) => json!({"error": error}),
        Request::Unknown(command) => json!({"error": format!("there is no command '{command}'")}),
    };
    write.write_all(format!("{value}\n").as_bytes()).await
}

/// Where ranks run on several hosts: on which node each worker is.
fn name_nodes(status: &mut Value, cluster: &ClusterConfig) {
    let workers = status.get_mut("workers").and_then(Value::as_array_mut);
    for worker in workers.into_iter().flatten() {
        let number = worker.get("worker").and_then(Value::as_u64);
        let number = number.and_then(|number| u32::try_from(number).ok());
        let node = number.and_then(|number| cluster.node_of(number));
        if let (Some(node), Some(object)) = (node, worker.as_object_mut()) {
            object.insert("node".to_owned(), cluster.nodes[node].name.as_str().into());
        }
    }
}

/// Asks for another number of ranks; that it was understood is all that the answer says.
fn resize(ranks: Option<u32>, ranks_max: u32, coordinator: &ActorRef<CoordinatorMessage>) -> Value {
    match ranks {
        Some(ranks) if (1..=ranks_max).contains(&ranks) => match coordinator.cast(CoordinatorMessage::Resize(ranks)) {
            Ok(()) => json!({"ranks": ranks}),
            Err(_) => json!({"error": "the controller is ending"}),
        },
        _ => json!({
            "error": format!("a world has 1 to {ranks_max} ranks: one for each of its lanes, and no more than its nodes have room for")
        }),
    }
}

/// What a change of the data names must lie in the run folder, and be what it says, before it can stand in the trace.
async fn check_data(desk: &Arc<Desk>, kind: &DecisionKind) -> Result<(), String> {
    let DecisionKind::Data(change) = kind else {
        return Ok(());
    };
    let (desk, change) = (Arc::clone(desk), change.clone());
    crate::blocking::run(move || later_data::check(&desk.data, desk.context, Some(&desk.tokenizer), &change))
        .await
        .and_then(|checked| checked)
}

/// Asks the closed loop; the answer names the line that will hold the decision.
async fn decide(request: Box<Decide>, coordinator: &ActorRef<CoordinatorMessage>) -> Value {
    match Ear(coordinator.clone()).ask(request, REQUEST_TIMEOUT).await {
        Some(Ok((line, step))) => json!({"line": line, "effective": step}),
        Some(Err(refused)) => json!({
            "error": refused.to_string(),
            "remedy": "`tarazed trace show` lists what is decided; ask for what can stand beside it",
        }),
        None => json!({"error": "the controller is starting or ending, or its loop is being made again; ask again"}),
    }
}

async fn status(coordinator: &ActorRef<CoordinatorMessage>, sharder: &ActorRef<SharderMessage>) -> Value {
    let limit = Some(REQUEST_TIMEOUT);
    let Ok(CallResult::Success(mut value)) = coordinator.call(CoordinatorMessage::Status, limit).await else {
        return json!({"error": "the controller is ending"});
    };
    if let Ok(CallResult::Success(shards)) = sharder.call(SharderMessage::Show, limit).await
        && let Some(object) = value.as_object_mut()
    {
        object.insert("shards".to_owned(), shards);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Request {
        Request::read(line, "right")
    }

    /// Without the token nothing is looked at, however the line is made.
    #[test]
    fn a_line_without_the_token_is_a_strangers() {
        let lines = [
            "",
            "null",
            "[]",
            "7",
            r#"{"command":"status"}"#,
            r#"{"token":7,"command":"status"}"#,
            r#"{"token":"wrong","command":"status"}"#,
            r#"{"token":"right","command":"status""#,
        ];
        for line in lines {
            assert_eq!(read(line), Request::Stranger, "{line}");
        }
        let deep = "[".repeat(REQUEST_BYTES_MAX as usize);
        assert_eq!(read(&deep), Request::Stranger);
    }

    #[test]
    fn a_number_of_ranks_is_a_whole_number_that_fits() {
        let resize = |ranks: &str| read(&format!(r#"{{"token":"right","command":"resize","ranks":{ranks}}}"#));
        assert_eq!(resize("4"), Request::Resize(Some(4)));
        for ranks in ["-1", "1.5", "4294967296", "\"4\"", "null", "[4]"] {
            assert_eq!(resize(ranks), Request::Resize(None), "{ranks}");
        }
        assert_eq!(read(r#"{"token":"right","command":"resize"}"#), Request::Resize(None));
    }

    #[test]
    fn a_decision_says_what_by_whom_and_why() {
        let decide = |rest: &str| read(&format!(r#"{{"token":"right","command":"decide",{rest}}}"#));
        let pin = decide(r#""person":"ada","reason":"drift","kind":"pin""#);
        let Request::Decide(Ok(request)) = pin else {
            panic!("{pin:?}")
        };
        assert_eq!(
            (request.person.as_str(), &request.kind, request.not_before),
            ("ada", &DecisionKind::Pin, None)
        );
        let forced = decide(r#""person":"ada","reason":"r","kind":{"mixture":{"weights":[1.0,2.0]}},"not_before":7"#);
        assert!(matches!(forced, Request::Decide(Ok(request)) if request.not_before == Some(StepIndex(7))));
        for (rest, problem) in [
            (r#""person":"ada","kind":"pin""#, "'reason'"),
            (r#""reason":"r","kind":"pin""#, "'person'"),
            (r#""person":"ada","reason":"r","kind":"halt""#, "'kind'"),
            (r#""person":"ada","reason":"r""#, "'kind'"),
            (
                r#""person":"ada","reason":"r","kind":"pin","not_before":-1"#,
                "'not_before'",
            ),
        ] {
            let refused = decide(rest);
            assert!(
                matches!(&refused, Request::Decide(Err(why)) if why.contains(problem)),
                "{refused:?}"
            );
        }
        let long = format!(
            r#""person":"ada","kind":"pin","reason":"{}""#,
            "r".repeat(REASON_BYTES_MAX + 1)
        );
        assert!(matches!(decide(&long), Request::Decide(Err(_))));
    }

    #[test]
    fn commands_are_told_apart() {
        assert_eq!(read(r#"{"token":"right","command":"status"}"#), Request::Status);
        assert_eq!(
            read(r#"{"token":"right","command":"train"}"#),
            Request::Unknown("train".into())
        );
        assert_eq!(read(r#"{"token":"right"}"#), Request::Unknown(String::new()));
    }
}
