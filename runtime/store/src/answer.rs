//! What an S3 server's refusal says, and what to do about it.
//!
//! The server's answer is XML that may quote the request: its key id, its session token, what was signed. Of all that a
//! message keeps the code and the sentence for people ([`concise`]), so no credential gets into a message by this way, also
//! none that the environment does not hold (those of a role or a web identity).

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

/// A request that was signed this far from the server's clock is refused; S3's own bound, which its answers also name.
const SKEW_SECONDS_MAX: i64 = 15 * 60;
/// What a message still shows of an answer that is no XML, e.g. a proxy's page.
const ANSWER_CHARS_MAX: usize = 400;

/// What to do where a store does not let us in.
pub(crate) const ACCESS: &str = "check the credentials in the environment (s3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, \
                                 AWS_REGION, AWS_ENDPOINT_URL; gs: GOOGLE_…; az: AZURE_…) and that they may read, write and \
                                 list there, and delete, too, unless they are a rank's";
const EXPIRED: &str = "the credentials have expired: renew them. Keys in a profile's file (~/.aws/credentials) are read again \
                       while a run goes on; those of the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, \
                       AWS_SESSION_TOKEN) are known to a run that is started with them";
const EXPIRED_PERHAPS: &str = "the store gives no reason here, and answers so where credentials have expired: renew them \
                               (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or a profile's file)";
const CLOCK: &str = "set this machine's clock (NTP), or the server's";
const REGION: &str = "name the bucket's region in AWS_REGION, or the server's address in AWS_ENDPOINT_URL";
const BUCKET: &str = "create the bucket, or correct its name in checkpoint.store";

/// How far the server's clock was ahead of this machine's at the last refusal, in seconds; negative where it was behind.
/// All clones are one.
#[derive(Clone, Debug)]
pub(crate) struct ClockAhead(Arc<AtomicI64>);

const UNKNOWN: i64 = i64::MIN;

impl Default for ClockAhead {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(UNKNOWN)))
    }
}

impl ClockAhead {
    #[cfg_attr(
        not(any(feature = "s3", test)),
        expect(dead_code, reason = "folders have no clock of their own")
    )]
    pub(crate) fn seen(&self, seconds: i64) {
        self.0.store(seconds, Ordering::Relaxed);
    }

    fn seconds(&self) -> Option<i64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|&seconds| seconds != UNKNOWN)
    }
}

/// What is to be done about a refusal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Remedy {
    /// Something must be changed.
    Change(String),
    /// The same again.
    Again,
}

/// The code of S3's answer, e.g. `ExpiredToken`.
fn code(message: &str) -> Option<&str> {
    element(message, "Code")
}

/// What the first element of this name holds.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let (_, rest) = text.split_once(open.as_str())?;
    rest.split_once(close.as_str()).map(|(found, _)| found)
}

/// The message with S3's XML cut down to code and sentence, and any other long answer cut short.
pub(crate) fn concise(message: &str) -> String {
    let Some(at) = ["<?xml", "<Error"].iter().filter_map(|mark| message.find(mark)).min() else {
        return shortened(message);
    };
    let (before, answer) = message.split_at(at);
    let said = match (element(answer, "Code"), element(answer, "Message")) {
        (Some(code), Some(sentence)) if !sentence.trim().is_empty() => format!("{code}: {sentence}"),
        (Some(code), _) => code.to_owned(),
        (None, _) => "(an answer that is not S3's)".to_owned(),
    };
    let behind = answer.rsplit_once("</Error>").map_or("", |(_, behind)| behind);
    shortened(&format!("{before}{said}{behind}"))
}

fn shortened(message: &str) -> String {
    // What comes before the answer (method, address, status) is bounded by the length of a key.
    let bound = message
        .find(NON_2XX)
        .map_or(usize::MAX, |at| at + NON_2XX.len() + ANSWER_CHARS_MAX);
    match message.char_indices().find(|(at, _)| *at >= bound) {
        Some((end, _)) => format!("{}…", &message[..end]),
        None => message.to_owned(),
    }
}

/// How the client begins to tell of an answer that was no success.
const NON_2XX: &str = "Server returned non-2xx status code";

/// What to do, where it is the credentials, the clock, the region or the bucket's name that is wrong; `None` where this says
/// nothing. `message` is the client's whole error.
pub(crate) fn remedy(message: &str, clock: &ClockAhead) -> Option<Remedy> {
    let change = |text: &str| Some(Remedy::Change(text.to_owned()));
    let (is_400, is_401) = (
        message.contains("400 Bad Request"),
        message.contains("401 Unauthorized"),
    );
    let is_403 = message.contains("403 Forbidden");
    match code(message) {
        Some("ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired") => change(EXPIRED),
        Some("RequestTimeTooSkewed" | "RequestExpired") => Some(of_clock(clock.seconds())),
        Some("InvalidToken") => change(ACCESS),
        Some("AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException") => {
            change(REGION)
        }
        Some("NoSuchBucket" | "InvalidBucketName") => change(BUCKET),
        // `InvalidAccessKeyId`, `SignatureDoesNotMatch`, `AccessDenied` and whatever else servers call it.
        Some(_) if is_401 || is_403 => change(ACCESS),
        Some(_) => None,
        // A HEAD is answered without a word.
        None if is_403 => match clock.seconds() {
            Some(ahead) if ahead.abs() >= SKEW_SECONDS_MAX => Some(of_clock(Some(ahead))),
            _ => change(ACCESS),
        },
        None if is_400 && message.contains("performing HEAD") => change(EXPIRED_PERHAPS),
        None if is_401 => change(ACCESS),
        None if message.contains("redirect without LOCATION") || message.contains("301 Moved") => change(REGION),
        None => None,
    }
}

fn of_clock(ahead: Option<i64>) -> Remedy {
    match ahead {
        // The clocks agree: the request was signed long before it came, as where this process stood still in between.
        Some(seconds) if seconds.abs() < SKEW_SECONDS_MAX / 2 => Remedy::Again,
        Some(seconds) => {
            let (minutes, side) = (
                (seconds.abs() + 30) / 60,
                if seconds > 0 { "behind" } else { "ahead of" },
            );
            Remedy::Change(format!(
                "this machine's clock is {minutes} minutes {side} the store's, which takes no request more than 15 minutes \
                 away: {CLOCK}"
            ))
        }
        None => Remedy::Change(format!(
            "this machine's clock and the store's differ by more than the store takes (15 minutes): {CLOCK}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(method: &str, status: &str, body: &str) -> String {
        format!("Generic S3 error: Error performing {method} http://s3/b/k in 1ms - {NON_2XX}: {status}: {body}")
    }

    fn xml(code: &str, more: &str) -> String {
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>Said so.</Message>{more}\
             <RequestId>4442587FB7D0A2F9</RequestId></Error>"
        )
    }

    #[test]
    fn no_credential_that_an_answer_quotes_stays_in_a_message() {
        let quoted = "<Token-0>IQoJb3JpZ2luX2VjE</Token-0><AWSAccessKeyId>ASIAEXAMPLE</AWSAccessKeyId>\
                      <StringToSign>AWS4-HMAC</StringToSign>";
        let message = concise(&refused("PUT", "400 Bad Request", &xml("ExpiredToken", quoted)));
        assert!(
            message.ends_with("400 Bad Request: ExpiredToken: Said so."),
            "{message}"
        );
        for secret in ["IQoJ", "ASIA", "AWS4", "RequestId"] {
            assert!(!message.contains(secret), "{message}");
        }
        // Nor of one that was cut off.
        let torn = concise("400: <Error><Code>ExpiredToken</Code><Token-0>IQoJb3Jp");
        assert_eq!(torn, "400: ExpiredToken");
        assert_eq!(concise("plain text"), "plain text");
        assert!(concise("403: <?xml?><html>no</html>").ends_with("(an answer that is not S3's)"));
    }

    #[test]
    fn a_page_of_a_proxy_is_cut_short() {
        let message = concise(&refused("GET", "502 Bad Gateway", &"ß".repeat(10_000)));
        assert!(message.ends_with('…') && message.len() < 700, "{}", message.len());
    }

    #[test]
    fn each_refusal_has_its_remedy() {
        let clock = ClockAhead::default();
        let of = |method: &str, status: &str, body: &str| remedy(&refused(method, status, body), &clock);
        let says = |found: Option<Remedy>, part: &str| {
            assert!(
                matches!(&found, Some(Remedy::Change(text)) if text.contains(part)),
                "{part}: {found:?}"
            );
        };
        says(of("PUT", "400 Bad Request", &xml("ExpiredToken", "")), "renew them");
        says(of("HEAD", "400 Bad Request", ""), "renew them");
        says(
            of("PUT", "400 Bad Request", &xml("InvalidToken", "")),
            "check the credentials",
        );
        for code in ["InvalidAccessKeyId", "SignatureDoesNotMatch", "NotSignedUp"] {
            says(of("GET", "403 Forbidden", &xml(code, "")), "check the credentials");
        }
        says(of("HEAD", "403 Forbidden", ""), "check the credentials");
        says(of("PUT", "403 Forbidden", &xml("RequestTimeTooSkewed", "")), "NTP");
        says(
            of("GET", "400 Bad Request", &xml("AuthorizationHeaderMalformed", "")),
            "AWS_REGION",
        );
        says(
            of("GET", "404 Not Found", &xml("NoSuchBucket", "")),
            "create the bucket",
        );
        assert_eq!(of("PUT", "503 Slow Down", &xml("SlowDown", "")), None);
        assert_eq!(of("PUT", "400 Bad Request", &xml("BadDigest", "")), None);
        assert_eq!(of("PUT", "500 Internal Server Error", ""), None);
    }

    #[test]
    fn a_clock_that_is_wrong_is_named_with_its_minutes() {
        let clock = ClockAhead::default();
        let skewed = refused("PUT", "403 Forbidden", &xml("RequestTimeTooSkewed", ""));
        let head = refused("HEAD", "403 Forbidden", "");
        for (seconds, part) in [(1_200, "20 minutes behind"), (-7_250, "121 minutes ahead of")] {
            clock.seen(seconds);
            for message in [&skewed, &head] {
                let found = remedy(message, &clock);
                assert!(
                    matches!(&found, Some(Remedy::Change(text)) if text.contains(part)),
                    "{found:?}"
                );
            }
        }
        // Signed before the process stood still, and sent after: nothing is wrong with a clock.
        clock.seen(2);
        assert_eq!(remedy(&skewed, &clock), Some(Remedy::Again));
        assert!(matches!(remedy(&head, &clock), Some(Remedy::Change(text)) if text == ACCESS));
    }
}
