//! The dashboard over a real socket: what is served, to whom, and what clients that misbehave cost others.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};
use tarazed::dashboard::serve::CONNECTIONS_MAX;
use tarazed::dashboard::{Dashboard, Run};
use tarazed::exit::Exit;
use tarazed::run_folder::RunFolder;

/// Longest wait for anything here.
const WAIT: Duration = Duration::from_secs(60);

/// A page of a run of three steps, as its files tell.
struct Served {
    dir: tempfile::TempDir,
    dashboard: Dashboard,
    address: SocketAddr,
    token: String,
}

fn served() -> Served {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let folder = RunFolder::new(dir.path());
    let mut texts = [String::new(), String::new()];
    for step in 1..=3_u64 {
        let loss = 6.0 - step as f64;
        texts[0] += &json!({
            "step": step, "tokens": step * 64, "loss": loss, "grad_norm": 1.5, "lr": 1e-3,
            "mixture": {"<img src=x>": 1.0}, "domains": {}, "decisions": [],
        })
        .to_string();
        texts[1] += &json!({"step": step, "time_unix_ms": step, "tokens_per_s": 100.0}).to_string();
        texts.iter_mut().for_each(|text| text.push('\n'));
    }
    std::fs::write(folder.trace(), &texts[0]).expect("written");
    std::fs::write(folder.metrics(), &texts[1]).expect("written");
    let lost = json!({"kind": "rank_lost", "time_unix_ms": 9, "step": 2, "worker": 1, "rank": 1, "cause": "signal 9"});
    std::fs::write(folder.events(), format!("{lost}\n")).expect("written");
    let run = Run {
        folder,
        last_step: 100,
        languages: BTreeMap::new(),
    };
    let dashboard = Dashboard::start(default_place(), run).expect("a page");
    let rest = dashboard.url().strip_prefix("http://").expect("HTTP");
    let (address, token) = rest.split_once('/').expect("a path");
    Served {
        address: address.parse().expect("an address"),
        token: token.trim_end_matches('/').to_owned(),
        dir,
        dashboard,
    }
}

fn default_place() -> SocketAddr {
    let place = tarazed::dashboard::place(tarazed::dashboard::PLACE).expect("a place");
    place.expect("no page is not the default")
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}{}", self.head, self.body);
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(WAIT)).expect("a limit");
    stream
}

/// All that is answered to these bytes until the connection ends.
fn send(address: SocketAddr, bytes: &[u8]) -> Answer {
    let mut stream = connect(address);
    stream.write_all(bytes).expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer and its end");
    let answer = String::from_utf8(answer).expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Answer {
        status: status.expect("a status"),
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

impl Served {
    /// A request for what lies at `path`, in which `TOKEN` stands for the token.
    fn ask(&self, method: &str, path: &str, more: &str) -> Answer {
        let path = path.replace("TOKEN", &self.token);
        send(
            self.address,
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n").as_bytes(),
        )
    }

    fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "")
    }
}

#[test]
fn page_present_and_course_are_served_below_the_token() {
    let served = served();
    let page = served.get("/TOKEN/");
    assert_eq!(page.status, 200, "{}", page.head);
    assert!(page.body.starts_with("<!doctype html>") && page.body.ends_with("</html>\n"));
    for header in [
        "content-type: text/html; charset=utf-8",
        "cache-control: no-store",
        "content-security-policy: default-src 'none'; script-src 'nonce-",
        "x-content-type-options: nosniff",
        "referrer-policy: no-referrer",
        "connection: close",
    ] {
        assert!(page.head.contains(header), "{header}: {}", page.head);
    }
    assert!(!page.body.contains(&served.token), "the token is the address's alone");

    let answer = served.get("/TOKEN/view.json");
    assert!(
        answer.head.contains("content-type: application/json"),
        "{}",
        answer.head
    );
    let view = answer.json();
    assert_eq!((&view["step"], &view["figures"]["tokens"]), (&3.into(), &192.into()));
    assert_eq!(view["incidents"]["newest"][0]["what"], "worker 1: signal 9");
    assert_eq!(view["domains"][0]["name"], "<img src=x>", "text is text");
    let history = served.get("/TOKEN/history.json?after=1").json();
    assert_eq!(
        (&history["step"], &history["loss"]["mean"]),
        (&json!([2, 3]), &json!([4.0, 3.0]))
    );
    assert_eq!(served.get("/TOKEN/history.json").json()["step"], json!([1, 2, 3]));
}

#[test]
fn all_else_is_refused_by_what_is_wrong_with_it() {
    let served = served();
    for path in [
        "/",
        "/00112233445566778899aabbccddeeff",
        "/TOKEN/trace.jsonl",
        "/00112233445566778899aabbccddeeff/view.json",
        "/favicon.ico",
    ] {
        let answer = served.get(path);
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (404, "nothing is here\n"),
            "{path}"
        );
    }
    let short = served.get("/TOKEN");
    assert_eq!(short.status, 308);
    let place = format!("location: /{}/", served.token);
    assert!(short.head.lines().any(|line| line == place), "{}", short.head);
    let stranger = served.ask("POST", "/00112233445566778899aabbccddeeff/view.json", "");
    assert_eq!(stranger.status, 404, "a stranger is told nothing");
    let posted = served.ask("POST", "/TOKEN/view.json", "");
    assert_eq!(posted.status, 405);
    assert!(posted.head.contains("allow: get, head"), "{}", posted.head);
    assert_eq!(served.get("/TOKEN/history.json?after=x").status, 400);
    for path in ["/TOKEN/", "/TOKEN/view.json"] {
        assert_eq!(served.ask("GET", path, "Content-Length: 5\r\n").status, 413, "{path}");
    }
    let head = served.ask("HEAD", "/TOKEN/view.json", "");
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    // A name of somebody else's that was made to lead here is as good as any: the token is what counts.
    let other = format!(
        "GET /{}/view.json HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n",
        served.token
    );
    assert_eq!(send(served.address, other.as_bytes()).status, 200);
    assert_eq!(send(served.address, b"nonsense\r\n\r\n").status, 400);
}

/// As much as is taken, and no end of the head in it.
#[test]
fn a_request_without_an_end_is_cut_off() {
    let served = served();
    let mut request = format!("GET /{}/ HTTP/1.1\r\nX: ", served.token).into_bytes();
    request.resize(8 * 1024, b'x');
    assert_eq!(send(served.address, &request).status, 431);
    assert_eq!(served.get("/TOKEN/").status, 200);
}

/// Forty at once, of whom each gets an answer; and some that say nothing, or half of a request, keep nobody else waiting.
#[test]
fn many_clients_and_slow_ones_are_served() {
    let served = served();
    let slow: Vec<TcpStream> = (0..CONNECTIONS_MAX - 4)
        .map(|number| {
            let mut stream = connect(served.address);
            if number % 2 == 0 {
                stream.write_all(b"GET /half").expect("sent");
            }
            stream
        })
        .collect();
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| assert_eq!(served.get("/TOKEN/view.json").json()["step"], 3));
        }
    });
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "the slow ones were waited for"
    );
    drop(slow);
}

/// More than are let in say nothing: they are left behind, and whoever comes after them is served.
#[test]
fn clients_that_say_nothing_are_left_behind() {
    let served = served();
    let mut silent: Vec<TcpStream> = (0..CONNECTIONS_MAX + 8).map(|_| connect(served.address)).collect();
    assert_eq!(served.get("/TOKEN/").status, 200);
    let mut rest = Vec::new();
    let ended = silent[0].read_to_end(&mut rest);
    assert!(
        ended.is_ok() || ended.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset),
        "the first one is gone"
    );
}

#[test]
fn a_page_ends_with_its_run_and_takes_its_address_along() {
    let Served {
        dir,
        dashboard,
        address,
        token,
    } = served();
    let file = dir.path().join("dashboard.url");
    assert!(!file.exists(), "not before it is told");
    dashboard.publisher().notify_one();
    let deadline = Instant::now() + WAIT;
    while !file.exists() {
        assert!(Instant::now() < deadline, "no address");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(
        std::fs::read_to_string(&file).expect("a file").trim_end(),
        dashboard.url()
    );
    assert_eq!(
        std::fs::metadata(&file).expect("a file").permissions().mode() & 0o777,
        0o600
    );
    // Nobody who is being served holds up the end, nor does a controller that does not answer: it is waited for for five seconds.
    let folder = RunFolder::new(dir.path());
    std::fs::write(folder.control_token(), "00").expect("written");
    let controller = UnixListener::bind(folder.control_socket()).expect("a socket");
    let _half = connect(address);
    let mut waits = connect(address);
    write!(waits, "GET /{token}/view.json HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("sent");
    let _asked = controller.accept().expect("the controller is asked");
    let began = Instant::now();
    drop(dashboard);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert!(TcpStream::connect(address).is_err(), "nobody listens");
    assert!(!file.exists());
}

#[test]
fn a_port_that_is_taken_is_said_with_its_remedy() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let run = Run {
        folder: RunFolder::new(dir.path()),
        last_step: 1,
        languages: BTreeMap::new(),
    };
    let failure = Dashboard::start(address, run).expect_err("taken");
    assert_eq!(failure.exit, Exit::Transient);
    let begin = format!("--dashboard {address}: cannot be served (");
    assert!(failure.message.starts_with(&begin), "{}", failure.message);
    assert!(
        failure.message.contains("127.0.0.1:0 is any free one"),
        "{}",
        failure.message
    );
}
