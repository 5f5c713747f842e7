//! Looks at the clock of a store over HTTP: a server that refuses a request says what time it is, in the header `Date`.
//!
//! S3 refuses whatever was signed a quarter of an hour from its own time, to a HEAD without a word of why. The client shows
//! no header of an answer, so this stands between it and the network, and changes nothing.

use crate::answer::ClockAhead;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};
use std::time::{SystemTime, UNIX_EPOCH};

/// Answers that a wrong clock may have brought about.
const REFUSALS: [u16; 3] = [400, 401, 403];

/// Makes clients that look.
#[derive(Debug)]
pub(crate) struct Looking(pub(crate) ClockAhead);

impl HttpConnector for Looking {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        let clock = self.0.clone();
        Ok(HttpClient::new(Client { client, clock }))
    }
}

#[derive(Debug)]
struct Client {
    client: HttpClient,
    clock: ClockAhead,
}

#[async_trait::async_trait]
impl HttpService for Client {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answer = self.client.execute(request).await?;
        if REFUSALS.contains(&answer.status().as_u16()) {
            let date = answer.headers().get("date").and_then(|date| date.to_str().ok());
            if let Some(seconds) = date.and_then(|date| seconds_ahead(date, SystemTime::now())) {
                self.clock.seen(seconds);
            }
        }
        Ok(answer)
    }
}

/// How far a date of HTTP is ahead of `now`; `None` where it is no date.
fn seconds_ahead(date: &str, now: SystemTime) -> Option<i64> {
    let since = |time: SystemTime| {
        time.duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs() as i64)
    };
    httpdate::parse_http_date(date)
        .ok()
        .map(|date| since(date) - since(now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_date_is_compared_with_this_machines_clock() {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(seconds_ahead("Sun, 06 Nov 1994 08:49:37 GMT", now), Some(0));
        assert_eq!(seconds_ahead("Sun, 06 Nov 1994 09:49:37 GMT", now), Some(3_600));
        assert_eq!(seconds_ahead("Sun, 06 Nov 1994 08:39:36 GMT", now), Some(-601));
        assert_eq!(seconds_ahead("soon", now), None);
    }
}
