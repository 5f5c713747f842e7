//! An S3 server in memory: one bucket; put, get, ranges, head, list, delete, uploads in parts. A create-if-absent and the
//! write it guards are one act. Keys of access are compared by name; signatures are not checked.

use super::BUCKET;
use super::http::{Message, decode};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Result;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};

/// Objects named by one page of a listing: small, so that clients have to go on.
pub(super) const PAGE_OBJECTS: usize = 50;

struct Object {
    bytes: Arc<Vec<u8>>,
    etag: String,
    modified: SystemTime,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Object>,
    uploads: BTreeMap<String, BTreeMap<u32, Vec<u8>>>,
    uploads_begun: u64,
}

/// Serves for ever.
pub(super) async fn serve(listener: TcpListener, key_id: &'static str) {
    let state: Arc<Mutex<State>> = Arc::default();
    loop {
        let Ok((client, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            // A request that breaks off is its client's matter, and changes nothing here.
            let _ = converse(client, &state, key_id).await;
        });
    }
}

async fn converse(client: TcpStream, state: &Mutex<State>, key_id: &str) -> Result<()> {
    client.set_nodelay(true)?;
    let mut client = BufReader::new(client);
    while let Some(request) = Message::read(&mut client, true).await? {
        let allowed = request.header("authorization");
        let allowed = allowed.is_some_and(|value| value.contains(&format!("Credential={key_id}/")));
        let answer = if allowed {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            act(&request, &mut state)
        } else {
            fault(403, "InvalidAccessKeyId")
        };
        answer.write(&mut client).await?;
    }
    Ok(())
}

fn fault(status: u16, code: &str) -> Message {
    let body = format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>");
    Message::answer(status, &[], body.into_bytes())
}

/// What a request is about.
struct Asked {
    method: String,
    key: String,
    query: BTreeMap<String, String>,
}

impl Asked {
    fn of(request: &Message) -> Option<Self> {
        let (method, target) = request.words();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let path = decode(path);
        let path = path.trim_start_matches('/');
        let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let pairs = pairs.map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name), decode(value))
        });
        (bucket == BUCKET).then(|| Self {
            method: method.to_owned(),
            key: key.to_owned(),
            query: pairs.collect(),
        })
    }

    fn is(&self, method: &str, parameter: &str) -> bool {
        self.method == method && self.query.contains_key(parameter)
    }
}

fn act(request: &Message, state: &mut State) -> Message {
    let Some(asked) = Asked::of(request) else {
        return fault(404, "NoSuchBucket");
    };
    if asked.key.is_empty() {
        return match asked.method.as_str() {
            "GET" => list(&asked.query, state),
            "POST" => delete_many(&request.body, state),
            _ => fault(405, "MethodNotAllowed"),
        };
    }
    if asked.query.contains_key("uploads") || asked.query.contains_key("uploadId") {
        return upload(&asked, request, state);
    }
    match asked.method.as_str() {
        "PUT" => {
            let create = request.header("if-none-match") == Some("*");
            if create && state.objects.contains_key(&asked.key) {
                return fault(412, "PreconditionFailed");
            }
            put(state, asked.key, request.body.clone())
        }
        "GET" | "HEAD" => get(request, &asked, state),
        "DELETE" => {
            state.objects.remove(&asked.key);
            Message::answer(204, &[], Vec::new())
        }
        _ => fault(405, "MethodNotAllowed"),
    }
}

fn put(state: &mut State, key: String, bytes: Vec<u8>) -> Message {
    let etag = format!("\"{}\"", &blake3::hash(&bytes).to_hex()[..32]);
    let object = Object {
        bytes: Arc::new(bytes),
        etag: etag.clone(),
        modified: SystemTime::now(),
    };
    state.objects.insert(key, object);
    Message::answer(200, &[("etag", &etag)], Vec::new())
}

fn upload(asked: &Asked, request: &Message, state: &mut State) -> Message {
    if asked.is("POST", "uploads") {
        state.uploads_begun += 1;
        let id = format!("upload-{}", state.uploads_begun);
        state.uploads.insert(id.clone(), BTreeMap::new());
        let body = format!("<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>");
        return Message::answer(200, &[], body.into_bytes());
    }
    let id = asked.query.get("uploadId").cloned().unwrap_or_default();
    let Some(parts) = state.uploads.get_mut(&id) else {
        return fault(404, "NoSuchUpload");
    };
    match asked.method.as_str() {
        "PUT" => {
            let number = asked.query.get("partNumber").and_then(|text| text.parse().ok());
            let Some(number) = number else {
                return fault(400, "InvalidArgument");
            };
            parts.insert(number, request.body.clone());
            Message::answer(200, &[("etag", &format!("\"part-{number}\""))], Vec::new())
        }
        "POST" => {
            let whole = state.uploads.remove(&id).unwrap_or_default();
            put(state, asked.key.clone(), whole.into_values().flatten().collect());
            let body = "<CompleteMultipartUploadResult><ETag>\"whole\"</ETag></CompleteMultipartUploadResult>";
            Message::answer(200, &[], body.into())
        }
        "DELETE" => {
            state.uploads.remove(&id);
            Message::answer(204, &[], Vec::new())
        }
        _ => fault(405, "MethodNotAllowed"),
    }
}

fn get(request: &Message, asked: &Asked, state: &State) -> Message {
    let Some(object) = state.objects.get(&asked.key) else {
        return fault(404, "NoSuchKey");
    };
    let (length, modified) = (object.bytes.len(), http_date(object.modified));
    let mut headers = vec![("etag", object.etag.as_str()), ("last-modified", modified.as_str())];
    if asked.method == "HEAD" {
        let length = length.to_string();
        headers.push(("content-length", &length));
        return Message::answer(200, &headers, Vec::new());
    }
    let range = request.header("range").and_then(|range| range.strip_prefix("bytes="));
    let Some((from, to)) = range.and_then(|range| range.split_once('-')) else {
        return Message::answer(200, &headers, object.bytes.to_vec());
    };
    let end = to
        .parse::<usize>()
        .map_or(length, |last| length.min(last.saturating_add(1)));
    let part = from.parse().ok().and_then(|from: usize| object.bytes.get(from..end));
    let Some(part) = part.filter(|part| !part.is_empty()) else {
        return fault(416, "InvalidRange");
    };
    let range = format!("bytes {from}-{}/{length}", end - 1);
    headers.push(("content-range", &range));
    Message::answer(206, &headers, part.to_vec())
}

fn list(query: &BTreeMap<String, String>, state: &State) -> Message {
    let text = |name: &str| query.get(name).cloned().unwrap_or_default();
    let (prefix, delimiter) = (text("prefix"), text("delimiter"));
    let after = text("continuation-token").max(text("start-after"));
    let found = state.objects.range(prefix.clone()..);
    let mut found = found
        .take_while(|(key, _)| key.starts_with(&prefix))
        .filter(|(key, _)| **key > after)
        .peekable();
    let (mut entries, mut folders, mut last) = (String::new(), Vec::new(), String::new());
    for (key, object) in found.by_ref().take(PAGE_OBJECTS) {
        last.clone_from(key);
        let folder = key[prefix.len()..]
            .split_once(&delimiter)
            .filter(|_| !delimiter.is_empty());
        if let Some((folder, _)) = folder {
            folders.push(format!("{prefix}{folder}{delimiter}"));
            continue;
        }
        // Writing to a string cannot fail.
        let _ = write!(
            entries,
            "<Contents><Key>{}</Key><LastModified>{}</LastModified><ETag>{}</ETag><Size>{}</Size></Contents>",
            escape(key),
            iso_date(object.modified),
            escape(&object.etag),
            object.bytes.len()
        );
    }
    folders.dedup();
    for folder in folders {
        let _ = write!(
            entries,
            "<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>",
            escape(&folder)
        );
    }
    let more = found.peek().is_some();
    let token = if more {
        format!("<NextContinuationToken>{}</NextContinuationToken>", escape(&last))
    } else {
        String::new()
    };
    let body = format!("<ListBucketResult>{entries}<IsTruncated>{more}</IsTruncated>{token}</ListBucketResult>");
    Message::answer(200, &[("content-type", "application/xml")], body.into_bytes())
}

fn delete_many(body: &[u8], state: &mut State) -> Message {
    let body = String::from_utf8_lossy(body).into_owned();
    let keys = body
        .split("<Key>")
        .skip(1)
        .filter_map(|piece| piece.split("</Key>").next());
    let mut xml = String::from("<DeleteResult>");
    for key in keys {
        let plain = key.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
        state.objects.remove(&plain);
        let _ = write!(xml, "<Deleted><Key>{key}</Key></Deleted>");
    }
    xml.push_str("</DeleteResult>");
    Message::answer(200, &[], xml.into_bytes())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Year, month, day, and seconds of the day (civil-from-days, Howard Hinnant's algorithm, for days since 1970).
fn civil(time: SystemTime) -> (u64, usize, u64, u64, u64) {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let days = seconds / 86_400;
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month as usize, day, days, seconds % 86_400)
}

fn iso_date(time: SystemTime) -> String {
    let (year, month, day, _, second) = civil(time);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}.000Z",
        second % 60
    )
}

fn http_date(time: SystemTime) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (year, month, day, days, second) = civil(time);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let (weekday, month) = (DAYS[(days % 7) as usize], MONTHS[month - 1]);
    format!(
        "{weekday}, {day:02} {month} {year} {hour:02}:{minute:02}:{:02} GMT",
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_as_the_standards_have_them() {
        let time = UNIX_EPOCH + Duration::from_secs(951_782_399);
        assert_eq!(iso_date(time), "2000-02-28T23:59:59.000Z");
        assert_eq!(
            http_date(time + Duration::from_secs(1)),
            "Tue, 29 Feb 2000 00:00:00 GMT"
        );
    }
}
