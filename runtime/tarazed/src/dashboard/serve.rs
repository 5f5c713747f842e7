//! HTTP for the page: few connections at a time, short ones, each for one request.
//!
//! A client is one of many that nobody knows, and the run must not feel any of them: connections, sizes and times are
//! bounded, what waits for a disk waits on a thread of its own, and whoever is too slow is left behind. A connection ends
//! with its answer, so one that is open is one that is at work: browsers that keep theirs would keep others out.

use super::reader::{Question, Reader};
use super::site::{Answers, Route, Token, route};
use crate::watch::look::unix_ms;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Connections at a time; others wait until one ends.
pub const CONNECTIONS_MAX: usize = 32;
/// Bytes of a request, without a body: none is taken.
const REQUEST_BYTES_MAX: usize = 8 * 1024;
/// Lines in a request's head.
const REQUEST_HEADERS_MAX: usize = 64;
/// A request must be there by then.
const REQUEST_TIMEOUT_MS: u64 = 10_000;
/// A connection must be done by then: a controller that does not answer is waited for 5 s.
const CONNECTION_TIMEOUT_MS: u64 = 30_000;
/// Before the next connection is accepted where one could not be, e.g. for want of descriptors.
const ACCEPT_PAUSE_MS: u64 = 100;

/// All that is served.
#[derive(Debug)]
pub struct Site {
    /// Who knows it may look.
    pub token: Token,
    /// The page and the headers.
    pub answers: Answers,
    /// The run.
    pub reader: Arc<Mutex<Reader>>,
}

/// Serves for ever.
pub async fn accept(listener: TcpListener, site: Arc<Site>) {
    let free = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // An error would mean that the semaphore is closed, which nobody does.
    while let Ok(place) = Arc::clone(&free).acquire_owned().await {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            continue;
        };
        let site = Arc::clone(&site);
        tokio::spawn(async move {
            serve(stream, site).await;
            drop(place);
        });
    }
}

async fn serve(stream: TcpStream, site: Arc<Site>) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let site = Arc::clone(&site);
        async move { Ok::<_, Infallible>(site.answer(&request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(REQUEST_TIMEOUT_MS))
        .max_header_size(REQUEST_BYTES_MAX)
        .max_headers(REQUEST_HEADERS_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    // A client that goes away in the middle, or is too slow, is its own matter.
    let _ = tokio::time::timeout(Duration::from_millis(CONNECTION_TIMEOUT_MS), connection).await;
}

impl Site {
    async fn answer(&self, request: &Request<Incoming>) -> Response<String> {
        let uri = request.uri();
        let found = route(request.method(), uri.path(), uri.query(), &self.token);
        if found != Route::NotFound && !request.body().is_end_stream() {
            return self
                .answers
                .refusal(StatusCode::PAYLOAD_TOO_LARGE, "a request here has no body");
        }
        let question = match found {
            Route::Page => return self.answers.page(),
            Route::Slash => return self.answers.slash(&self.token),
            Route::View => Question::View,
            Route::History { after } => Question::History { after },
            Route::NoStep => return self.answers.refusal(StatusCode::BAD_REQUEST, "after is a step, from 0"),
            Route::ReadOnly => {
                return self
                    .answers
                    .refusal(StatusCode::METHOD_NOT_ALLOWED, "it can only be read");
            }
            Route::NotFound => return self.answers.refusal(StatusCode::NOT_FOUND, "nothing is here"),
        };
        match self.ask(question).await {
            Some(text) => self.answers.json(text),
            None => self.answers.refusal(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the reader has ended: report this as a bug",
            ),
        }
    }

    /// The reader's answer; it waits for disks and for the controller, so on a thread of its own. None after a panic in it.
    async fn ask(&self, question: Question) -> Option<String> {
        let reader = Arc::clone(&self.reader);
        let answered = tokio::task::spawn_blocking(move || {
            let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
            reader.answer(question, Instant::now(), unix_ms())
        });
        answered.await.ok()
    }
}
