//! A collector of OTLP/gRPC that keeps what it is sent.
//!
//! Plain HTTP/2 and protobuf: a server out of `tonic` would do, but the features it needs would be the tests' alone, and the
//! first `cargo run` and the tests would build most of the tree each for themselves (`tests/tests/one_build.rs`).

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use prost::Message;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// A gRPC message stands behind one byte (0: not compressed) and its length.
const PREFIX_BYTES: usize = 5;

/// What one export held.
#[derive(Clone, Debug)]
pub enum Export {
    /// Spans.
    Spans(ExportTraceServiceRequest),
    /// Metrics.
    Metrics(ExportMetricsServiceRequest),
}

type Seen = Arc<Mutex<Vec<Export>>>;

/// Serves on a thread of its own until it is dropped.
#[derive(Debug)]
pub struct Collector {
    endpoint: String,
    seen: Seen,
    /// Closed by being dropped.
    _serving: oneshot::Sender<()>,
}

impl Collector {
    /// A collector on a free port of the loopback.
    ///
    /// # Panics
    /// If there is no port or no thread.
    #[must_use]
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a socket that does not block");
        let address = listener.local_addr().expect("an address");
        let (serving, over) = oneshot::channel();
        let seen = Seen::default();
        let keep = Arc::clone(&seen);
        let serve = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).expect("a listener");
                tokio::select! {
                    () = accept(&listener, &keep) => {}
                    _ = over => {}
                }
            });
        };
        std::thread::Builder::new()
            .name("collector".to_owned())
            .spawn(serve)
            .expect("a thread");
        Self {
            endpoint: format!("http://{address}"),
            seen,
            _serving: serving,
        }
    }

    /// For `telemetry.otlp_endpoint`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// What has been exported since this was asked last.
    #[must_use]
    pub fn take(&self) -> Vec<Export> {
        std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn accept(listener: &TcpListener, seen: &Seen) {
    while let Ok((socket, _)) = listener.accept().await {
        tokio::spawn(serve(socket, Arc::clone(seen)));
    }
}

async fn serve(socket: TcpStream, seen: Seen) {
    // A killed process breaks its connection off anywhere.
    let Ok(mut connection) = h2::server::handshake(socket).await else {
        return;
    };
    while let Some(Ok((request, respond))) = connection.accept().await {
        let seen = Arc::clone(&seen);
        tokio::spawn(async move {
            // An error means that the process is gone; what came before it counts.
            let _ = answer(request, respond, &seen).await;
        });
    }
}

async fn answer(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    seen: &Seen,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let path = request.uri().path().to_owned();
    let mut body = request.into_body();
    let mut received = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        received.extend_from_slice(&data);
    }
    // Past here it is whole: what is wrong with it is the exporter's fault, answered with a status (3: invalid argument).
    let (status, message) = match decode(&path, &received) {
        Ok(export) => {
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(export);
            ("0", String::new())
        }
        Err(reason) => ("3", reason),
    };
    let head = Response::builder()
        .header("content-type", "application/grpc")
        .body(())?;
    let mut stream = respond.send_response(head, false)?;
    if status == "0" {
        stream.send_data(Bytes::from_static(&[0; PREFIX_BYTES]), false)?;
    }
    let trailers = HeaderMap::from_iter([
        (HeaderName::from_static("grpc-status"), HeaderValue::from_static(status)),
        (
            HeaderName::from_static("grpc-message"),
            HeaderValue::from_str(&message)?,
        ),
    ]);
    stream.send_trailers(trailers)?;
    Ok(())
}

fn decode(path: &str, received: &[u8]) -> Result<Export, String> {
    let Some((&[compressed, a, b, c, d], message)) = received.split_first_chunk::<PREFIX_BYTES>() else {
        return Err(format!("{} bytes are no message", received.len()));
    };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if compressed != 0 || length != message.len() {
        return Err(format!("not one plain message of {length} bytes"));
    }
    match path {
        "/opentelemetry.proto.collector.trace.v1.TraceService/Export" => {
            Message::decode(message).map(Export::Spans).map_err(|e| e.to_string())
        }
        "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export" => {
            Message::decode(message).map(Export::Metrics).map_err(|e| e.to_string())
        }
        other => Err(format!("{other} is no OTLP export")),
    }
}
