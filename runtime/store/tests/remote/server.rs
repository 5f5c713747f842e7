//! A small S3 server for tests: one bucket, `checkpoints`, in memory. Conditional creates are atomic, listings come in
//! pages of two, and the access key's name is checked (not the signature). It misbehaves on demand.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mischief {
    None,
    /// Every first create of a key takes effect and is answered 503.
    AnswersCreates503Once,
    /// Every first create of a key takes effect, and the connection is closed instead of an answer.
    DropsCreatesAnswersOnce,
    /// Every first create of a key is answered 409, without effect: S3's answer while another write is under way.
    Conflicts409Once,
    IgnoresConditions,
    /// The first so many requests of each kind (method and folder) are answered with this status, without effect.
    Fails {
        status: u16,
        times: usize,
    },
    /// The first so many answers to a read of each object whose key holds this promise all bytes and end behind the first; the
    /// connection is closed.
    ClosesEarly {
        of: &'static str,
        times: usize,
    },
    /// Every read of an object whose key holds this is answered as if the object ended one byte earlier: a whole answer, at
    /// odds with the listing and the look-up.
    AnswersShort {
        of: &'static str,
    },
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Vec<u8>>,
    uploads: BTreeMap<String, BTreeMap<u32, Vec<u8>>>,
    upload_count: usize,
    harmed: Vec<String>,
    /// How often a kind of request, or an object, has been harmed so far.
    times: BTreeMap<String, usize>,
}

impl State {
    /// Whether this one is still to be harmed; counts it.
    fn harm(&mut self, what: String, times_max: usize) -> bool {
        let times = self.times.entry(what.clone()).or_default();
        if *times >= times_max {
            return false;
        }
        *times += 1;
        self.harmed.push(what);
        true
    }
}

pub struct Server {
    port: u16,
    state: Arc<Mutex<State>>,
}

struct Request {
    method: String,
    key: Option<String>,
    bucket: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

enum Answer {
    Is(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// The same, cut off behind the first byte of the body.
    Torn(u16, Vec<(&'static str, String)>, Vec<u8>),
    Silence,
}

fn is(status: u16, body: impl Into<Vec<u8>>) -> Answer {
    Answer::Is(status, Vec::new(), body.into())
}

fn fault(status: u16, code: &str) -> Answer {
    is(
        status,
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{code}</Message></Error>"),
    )
}

impl Server {
    pub fn start(key_id: &str, mischief: Mischief) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State::default()));
        let (shared, key_id) = (state.clone(), key_id.to_string());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (state, key_id) = (shared.clone(), key_id.clone());
                std::thread::spawn(move || serve(stream, &state, &key_id, mischief));
            }
        });
        Self { port, state }
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn multipart_uploads(&self) -> usize {
        self.state.lock().unwrap().upload_count
    }

    pub fn mischief_done(&self) -> usize {
        self.state.lock().unwrap().harmed.len()
    }
}

fn serve(stream: TcpStream, state: &Mutex<State>, key_id: &str, mischief: Mischief) {
    let mut writer = stream.try_clone().unwrap();
    let mut reader = BufReader::new(stream);
    while let Some(request) = read(&mut reader) {
        let allowed = request
            .headers
            .get("authorization")
            .is_some_and(|a| a.contains(&format!("Credential={key_id}/")));
        let answer = match () {
            () if !allowed => fault(403, "InvalidAccessKeyId"),
            () if request.bucket != "checkpoints" => fault(404, "NoSuchBucket"),
            () => answer(&request, &mut state.lock().unwrap(), mischief),
        };
        let (status, headers, body, is_torn) = match answer {
            Answer::Is(status, headers, body) => (status, headers, body, false),
            Answer::Torn(status, headers, body) => (status, headers, body, true),
            Answer::Silence => return,
        };
        let mut head = format!("HTTP/1.1 {status} X\r\nlast-modified: Mon, 23 Nov 2026 10:00:00 GMT\r\n");
        for (name, value) in &headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        // A HEAD's answer states its object's length and carries no body.
        if request.method != "HEAD" || status != 200 {
            head.push_str(&format!(
                "content-length: {}\r\n",
                if request.method == "HEAD" { 0 } else { body.len() }
            ));
        }
        head.push_str("\r\n");
        let body = match request.method.as_str() {
            "HEAD" => &[][..],
            _ if is_torn => &body[..body.len().min(1)],
            _ => &body,
        };
        let sent = writer.write_all(head.as_bytes()).and_then(|()| writer.write_all(body));
        if sent.is_err() || is_torn {
            return;
        }
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|bytes| *bytes > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_string(), words.next()?.to_string());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim().split_once(':') {
            None => break,
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.trim().to_string()),
        };
    }
    let length = headers
        .get("content-length")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let (bucket, key) = path
        .trim_start_matches('/')
        .split_once('/')
        .unwrap_or((path.trim_matches('/'), ""));
    let key = (!key.is_empty()).then(|| key.to_string());
    Some(Request {
        method,
        bucket: bucket.to_string(),
        key,
        query,
        headers,
        body,
    })
}

/// What a request is to do with what: its method, and the folder of its object, if it has one.
fn kind_of(request: &Request) -> String {
    let folders = ["commits", "manifests", "shards", "self-test"];
    let within = |folder: &&str| {
        request
            .key
            .as_ref()
            .is_some_and(|key| key.contains(&format!("/{folder}/")))
    };
    let folder = folders.into_iter().find(within).unwrap_or("bucket");
    format!("{} {folder}", request.method)
}

fn answer(request: &Request, state: &mut State, mischief: Mischief) -> Answer {
    match mischief {
        Mischief::Fails { status, times } if state.harm(kind_of(request), times) => return fault(status, "SlowDown"),
        _ => {}
    }
    let Some(key) = request.key.clone() else {
        return match request.method.as_str() {
            "GET" => list(request, state),
            "POST" => delete_many(request, state),
            _ => fault(405, "MethodNotAllowed"),
        };
    };
    let query = |name: &str| request.query.get(name).cloned();
    match (request.method.as_str(), query("uploadId")) {
        ("POST", None) if request.query.contains_key("uploads") => {
            state.upload_count += 1;
            let id = format!("upload-{}", state.upload_count);
            state.uploads.insert(id.clone(), BTreeMap::new());
            is(
                200,
                format!("<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"),
            )
        }
        ("PUT", Some(id)) => {
            let number = query("partNumber").and_then(|text| text.parse().ok()).unwrap();
            state.uploads.get_mut(&id).unwrap().insert(number, request.body.clone());
            Answer::Is(200, vec![("etag", format!("\"part-{number}\""))], Vec::new())
        }
        ("POST", Some(id)) => {
            let parts = state.uploads.remove(&id).unwrap();
            state.objects.insert(key, parts.into_values().flatten().collect());
            is(
                200,
                "<CompleteMultipartUploadResult><ETag>\"whole\"</ETag></CompleteMultipartUploadResult>",
            )
        }
        ("DELETE", Some(id)) => {
            state.uploads.remove(&id);
            is(204, "")
        }
        ("PUT", None) => put(request, key, state, mischief),
        ("GET", None) => get_harmed(request, &key, state, mischief),
        ("HEAD", None) => get(request, state.objects.get(&key)),
        ("DELETE", None) => {
            state.objects.remove(&key);
            is(204, "")
        }
        _ => fault(405, "MethodNotAllowed"),
    }
}

fn put(request: &Request, key: String, state: &mut State, mischief: Mischief) -> Answer {
    let create = request.headers.get("if-none-match").is_some_and(|value| value == "*");
    let first = create && !state.harmed.contains(&key);
    if first && mischief == Mischief::Conflicts409Once {
        state.harmed.push(key);
        return fault(409, "ConditionalRequestConflict");
    }
    if create && state.objects.contains_key(&key) && mischief != Mischief::IgnoresConditions {
        return fault(412, "PreconditionFailed");
    }
    state.objects.insert(key.clone(), request.body.clone());
    match mischief {
        Mischief::AnswersCreates503Once if first => {
            state.harmed.push(key);
            fault(503, "SlowDown")
        }
        Mischief::DropsCreatesAnswersOnce if first => {
            state.harmed.push(key);
            Answer::Silence
        }
        _ => Answer::Is(200, vec![("etag", etag(&request.body))], Vec::new()),
    }
}

fn etag(bytes: &[u8]) -> String {
    format!("\"{}\"", &blake3::hash(bytes).to_hex()[..32])
}

fn get_harmed(request: &Request, key: &str, state: &mut State, mischief: Mischief) -> Answer {
    let is_torn = match mischief {
        Mischief::ClosesEarly { of, times } => key.contains(of) && state.harm(key.to_string(), times),
        _ => false,
    };
    let is_short = match mischief {
        Mischief::AnswersShort { of } => key.contains(of) && state.harm(key.to_string(), usize::MAX),
        _ => false,
    };
    let bytes = state.objects.get(key).map(|bytes| {
        let end = bytes.len() - usize::from(is_short);
        bytes[..end].to_vec()
    });
    match get(request, bytes.as_ref()) {
        Answer::Is(status, headers, body) if is_torn => Answer::Torn(status, headers, body),
        whole => whole,
    }
}

fn get(request: &Request, bytes: Option<&Vec<u8>>) -> Answer {
    let Some(bytes) = bytes else {
        return fault(404, "NoSuchKey");
    };
    let mut headers = vec![("etag", etag(bytes))];
    let range = request
        .headers
        .get("range")
        .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    if let Some((from, to)) = range {
        let from: usize = from.parse().unwrap();
        let to = to
            .parse::<usize>()
            .map_or(bytes.len(), |last| bytes.len().min(last + 1));
        headers.push(("content-range", format!("bytes {from}-{}/{}", to - 1, bytes.len())));
        return Answer::Is(206, headers, bytes[from..to].to_vec());
    }
    if request.method == "HEAD" {
        headers.push(("content-length", bytes.len().to_string()));
    }
    Answer::Is(200, headers, bytes.clone())
}

fn list(request: &Request, state: &State) -> Answer {
    let prefix = request.query.get("prefix").cloned().unwrap_or_default();
    let after = request.query.get("continuation-token").cloned().unwrap_or_default();
    let found: Vec<_> = state
        .objects
        .iter()
        .filter(|(key, _)| key.starts_with(&prefix) && **key > after)
        .collect();
    let page = &found[..found.len().min(2)];
    let mut xml = String::from("<?xml version=\"1.0\"?><ListBucketResult>");
    for (key, bytes) in page {
        let (etag, size) = (etag(bytes), bytes.len());
        xml.push_str(&format!(
            "<Contents><Key>{key}</Key><LastModified>2026-11-23T10:00:00.000Z</LastModified><ETag>{etag}</ETag>\
             <Size>{size}</Size></Contents>"
        ));
    }
    xml.push_str(&format!("<IsTruncated>{}</IsTruncated>", found.len() > page.len()));
    if let Some((last, _)) = page.last().filter(|_| found.len() > page.len()) {
        xml.push_str(&format!("<NextContinuationToken>{last}</NextContinuationToken>"));
    }
    xml.push_str("</ListBucketResult>");
    is(200, xml)
}

fn delete_many(request: &Request, state: &mut State) -> Answer {
    let body = String::from_utf8_lossy(&request.body).into_owned();
    let mut xml = String::from("<?xml version=\"1.0\"?><DeleteResult>");
    for piece in body.split("<Key>").skip(1) {
        let key = piece.split("</Key>").next().unwrap();
        state.objects.remove(key);
        xml.push_str(&format!("<Deleted><Key>{key}</Key></Deleted>"));
    }
    xml.push_str("</DeleteResult>");
    is(200, xml)
}
