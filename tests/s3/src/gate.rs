//! What stands before the service: who may sign, and what time it is here.
//!
//! - Keys may be known, expired or unknown, and change while the server runs.
//! - Checkpoint shards may be kept waiting, as by a store that is slow.
//! - The server's clock may differ from the machine's. A request that was signed more than a quarter of an hour from it is
//!   refused, as S3 does it: the answer says when it was signed, what time it is here, and how much is allowed.
//!
//! Refusals have the codes, the status and the elements that S3's have, also those that quote the request.

use crate::Credentials;
use futures::StreamExt;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use s3s::auth::{S3Auth, SecretKey};
use s3s::dto::{Timestamp, TimestampFormat};
use s3s::{Body, S3Result, s3_error};
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// How far from the server's clock a request may have been signed, as S3 has it.
const SKEW_SECONDS_MAX: u64 = 15 * 60;
/// What the path of a checkpoint shard holds.
const SHARDS: &str = "/shards/";

/// What the server holds of a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It may sign.
    Valid,
    /// It may sign no more: `ExpiredToken`.
    Expired,
    /// Nobody has it: `InvalidAccessKeyId`.
    Unknown,
}

/// Keys, and the server's clock. All clones are one.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<State>);

/// Printing it shows no key.
impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("ahead_s", &self.0.ahead_s)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    keys: RwLock<HashMap<String, (String, Standing)>>,
    /// Seconds by which the server's clock is ahead of the machine's.
    ahead_s: AtomicI64,
    /// Checkpoint shards that may still be written before others wait; none where nothing waits.
    shards_left: watch::Sender<Option<usize>>,
}

/// A refusal, before it is written down.
struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: &'static str,
    /// Further elements.
    more: String,
}

impl Gate {
    pub(crate) fn admit(&self, credentials: &Credentials) {
        let known = (credentials.secret.clone(), Standing::Valid);
        let mut keys = self.0.keys.write().unwrap_or_else(PoisonError::into_inner);
        keys.insert(credentials.key_id.clone(), known);
    }

    pub(crate) fn set_standing(&self, key_id: &str, standing: Standing) {
        let mut keys = self.0.keys.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = keys.get_mut(key_id) {
            known.1 = standing;
        }
    }

    pub(crate) fn shift_clock(&self, ahead_s: i64) {
        self.0.ahead_s.store(ahead_s, Ordering::Relaxed);
    }

    pub(crate) fn hold_shards_after(&self, count: Option<usize>) {
        self.0.shards_left.send_replace(count);
    }

    /// Waits where this request writes a checkpoint shard and those are held.
    pub(crate) async fn wait(&self, request: &Request<Incoming>) {
        if request.method() != Method::PUT || !request.uri().path().contains(SHARDS) {
            return;
        }
        // Before the first look, so that no change is missed behind it.
        let mut changes = self.0.shards_left.subscribe();
        while !self.takes_a_place() {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    fn takes_a_place(&self) -> bool {
        let mut passes = true;
        self.0.shards_left.send_if_modified(|left| {
            match left {
                None => {}
                Some(0) => passes = false,
                Some(count) => *count -= 1,
            }
            false
        });
        passes
    }

    fn key(&self, key_id: &str) -> Option<(String, Standing)> {
        let keys = self.0.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.get(key_id).cloned()
    }

    fn now(&self) -> SystemTime {
        let ahead_s = self.0.ahead_s.load(Ordering::Relaxed);
        let by = Duration::from_secs(ahead_s.unsigned_abs());
        match ahead_s < 0 {
            true => SystemTime::now() - by,
            false => SystemTime::now() + by,
        }
    }

    /// The answer to a request that is refused here; its body is taken in first, or the client may never read why.
    pub(crate) async fn refuse(&self, request: Request<Incoming>) -> Result<Response<Body>, Request<Incoming>> {
        let Some(refusal) = self.refusal(&request) else {
            return Err(request);
        };
        let mut body = Body::from(request.into_body());
        while let Some(Ok(_)) = body.next().await {}
        Ok(refusal.answer())
    }

    fn refusal(&self, request: &Request<Incoming>) -> Option<Refusal> {
        let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
        let now = self.now();
        if let Some(signed) = header("x-amz-date").and_then(signed_at) {
            let bound = Duration::from_secs(SKEW_SECONDS_MAX);
            if signed < Timestamp::from(now - bound) || signed > Timestamp::from(now + bound) {
                return Some(Refusal::of_clock(&signed, &Timestamp::from(now)));
            }
        }
        let (_, key_id) = header(AUTHORIZATION.as_str())?.split_once("Credential=")?;
        let (key_id, _) = key_id.split_once('/')?;
        let is_expired = self
            .key(key_id)
            .is_some_and(|(_, standing)| standing == Standing::Expired);
        is_expired.then(|| Refusal::of_token(header("x-amz-security-token")))
    }

    /// The server's time, on every answer.
    pub(crate) fn date(&self, answer: &mut Response<Body>) {
        let date = written(&Timestamp::from(self.now()), TimestampFormat::HttpDate);
        if let Ok(date) = HeaderValue::from_str(&date) {
            answer.headers_mut().insert(DATE, date);
        }
    }
}

impl Refusal {
    fn of_clock(signed: &Timestamp, now: &Timestamp) -> Self {
        let (signed, now) = (
            written(signed, TimestampFormat::DateTime),
            written(now, TimestampFormat::DateTime),
        );
        let allowed_ms = SKEW_SECONDS_MAX * 1000;
        Self {
            status: StatusCode::FORBIDDEN,
            code: "RequestTimeTooSkewed",
            message: "The difference between the request time and the current time is too large.",
            more: format!(
                "<RequestTime>{signed}</RequestTime><ServerTime>{now}</ServerTime>\
                 <MaxAllowedSkewMilliseconds>{allowed_ms}</MaxAllowedSkewMilliseconds>"
            ),
        }
    }

    /// S3 repeats the token.
    fn of_token(token: Option<&str>) -> Self {
        let plain = |token: &&str| !token.contains(['<', '>', '&']);
        let token = token.filter(plain).map(|token| format!("<Token-0>{token}</Token-0>"));
        Self {
            status: StatusCode::BAD_REQUEST,
            code: "ExpiredToken",
            message: "The provided token has expired.",
            more: token.unwrap_or_default(),
        }
    }

    fn answer(self) -> Response<Body> {
        let Self {
            code, message, more, ..
        } = self;
        let body = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"
        );
        let mut answer = Response::new(Body::from(body));
        *answer.status_mut() = self.status;
        let xml = HeaderValue::from_static("application/xml");
        answer.headers_mut().insert(CONTENT_TYPE, xml);
        answer
    }
}

/// `20130524T000000Z`, as signatures have it.
fn signed_at(text: &str) -> Option<Timestamp> {
    let is_one = text.len() == 16 && text.is_ascii() && text.ends_with('Z') && text.as_bytes()[8] == b'T';
    if !is_one {
        return None;
    }
    let part = |from: usize, to: usize| &text[from..to];
    let (date, time) = (
        [part(0, 4), part(4, 6), part(6, 8)].join("-"),
        [part(9, 11), part(11, 13), part(13, 15)].join(":"),
    );
    Timestamp::parse(TimestampFormat::DateTime, &format!("{date}T{time}Z")).ok()
}

fn written(time: &Timestamp, format: TimestampFormat) -> String {
    let mut text = Vec::new();
    // What cannot be written is shown as nothing.
    let _ = time.format(format, &mut text);
    String::from_utf8(text).unwrap_or_default()
}

#[async_trait::async_trait]
impl S3Auth for Gate {
    async fn get_secret_key(&self, key_id: &str) -> S3Result<SecretKey> {
        match self.key(key_id) {
            Some((secret, standing)) if standing != Standing::Unknown => Ok(secret.into()),
            _ => Err(s3_error!(
                InvalidAccessKeyId,
                "The AWS Access Key Id you provided does not exist in our records."
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn dates_of_signatures_are_read() {
        let signed = signed_at("20130524T000001Z").unwrap();
        assert_eq!(written(&signed, TimestampFormat::DateTime), "2013-05-24T00:00:01.000Z");
        assert_eq!(
            written(&signed, TimestampFormat::HttpDate),
            "Fri, 24 May 2013 00:00:01 GMT"
        );
        for wrong in [
            "",
            "20130524T000001",
            "20131324T000001Z",
            "2013-05-24T00:01Z",
            "ßßßßßßßß",
        ] {
            assert_eq!(signed_at(wrong), None, "{wrong}");
        }
    }
}
