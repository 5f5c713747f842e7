//! A small S3 server over a folder (floor 5): for tests, and for trying `checkpoint.store = "s3://…"` without a cloud.
//!
//! It speaks what the checkpoint store and the usual tools need: signatures (version 4), put, get, ranges, head, copy, delete,
//! listings in pages, uploads in parts. Conditional writes are atomic: of any number of writers of one key, each saying
//! `If-None-Match: *` or the same `If-Match`, one wins. What is listed was there at one moment, all of it.
//!
//! The HTTP and XML side is the crate `s3s`. Its companion `s3s-fs` is not used: it checks a condition and then writes, makes
//! a bucket that is missing, and cannot hold keys much longer than a hundred characters.
//!
//! Its users are two: one who may do everything, and a run's ranks, who may not delete. Tests let their keys expire, become
//! unknown and come back, admit others, keep uploads waiting, and set the server's clock ([`Server::set_standing`],
//! [`Server::admit`], [`Server::hold_shards_after`], [`Server::shift_clock`]).
//!
//! What it does not do: survive a power cut (nothing is synced), keep metadata or checksums that come with an object,
//! encrypt. It listens on 127.0.0.1 alone. One process serves a folder at a time.

mod folder;
mod gate;
mod service;
#[cfg(test)]
mod tests;

pub use gate::Standing;

use folder::Folder;
use gate::Gate;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use s3s::access::{S3Access, S3AccessContext};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3Result, s3_error};
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;

/// The region that [`Server::environment`] names; requests may be signed for any.
const REGION: &str = "us-east-1";
/// Random bytes of a key id and of a secret.
const KEY_BYTES: (usize, usize) = (8, 20);
/// Threads that serve.
const THREADS: usize = 2;
/// Before the next connection is accepted where one could not be, e.g. for want of descriptors.
const ACCEPT_PAUSE_MS: u64 = 10;

/// What a client signs with. Printing it does not show the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// `AWS_ACCESS_KEY_ID`
    pub key_id: String,
    /// `AWS_SECRET_ACCESS_KEY`
    pub secret: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// New ones that nobody can guess.
    ///
    /// # Errors
    /// If the system has no random numbers.
    pub fn random() -> io::Result<Self> {
        Ok(Self {
            key_id: format!("TEST{}", random_hex(KEY_BYTES.0)?),
            secret: random_hex(KEY_BYTES.1)?,
        })
    }

    /// Those of `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, where both are set.
    #[must_use]
    pub fn from_environment() -> Option<Self> {
        Self::of_variables("")
    }

    fn of_variables(prefix: &str) -> Option<Self> {
        let variable = |name| std::env::var(format!("{prefix}{name}")).ok();
        let variable = |name| variable(name).filter(|value| !value.is_empty());
        Some(Self {
            key_id: variable("AWS_ACCESS_KEY_ID")?,
            secret: variable("AWS_SECRET_ACCESS_KEY")?,
        })
    }
}

/// A server that runs until it is dropped. Threads of its own serve, so a test may block.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    credentials: Credentials,
    of_ranks: Credentials,
    folder: Arc<Folder>,
    gate: Gate,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves a folder, made where it is missing, at a free port.
    ///
    /// # Errors
    /// As [`Self::start_at`].
    pub fn start(folder: &Path, credentials: Credentials) -> io::Result<Self> {
        Self::start_at(folder, credentials, 0)
    }

    /// Serves a folder at this port; 0 for a free one.
    ///
    /// # Errors
    /// If the folder cannot be made or is served by another process, or if the port is taken.
    pub fn start_at(folder: &Path, credentials: Credentials, port: u16) -> io::Result<Self> {
        let folder = Arc::new(Folder::open(folder)?);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let mut builder = S3ServiceBuilder::new(service::Objects(folder.clone()));
        let of_ranks = match Credentials::of_variables("TARAZED_RANK_") {
            Some(given) => given,
            None => Credentials::random()?,
        };
        let gate = Gate::default();
        for known in [&credentials, &of_ranks] {
            gate.admit(known);
        }
        builder.set_auth(gate.clone());
        builder.set_access(Rights {
            of_ranks: of_ranks.key_id.clone(),
        });
        let service = builder.build();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .enable_all()
            .build()?;
        let (stop, stopped) = oneshot::channel();
        let at_the_door = gate.clone();
        let thread = std::thread::Builder::new()
            .name("s3 server".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = accept(listener, service, at_the_door) => {}
                        _ = stopped => {}
                    }
                });
            })?;
        Ok(Self {
            address,
            credentials,
            of_ranks,
            folder,
            gate,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Its URL.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Makes a bucket; one that is there already stays as it is.
    ///
    /// # Errors
    /// If it cannot be made, or the name is not one for a bucket.
    pub fn create_bucket(&self, name: &str) -> io::Result<()> {
        self.folder.create_bucket(name)
    }

    /// Lets somebody else sign, too, who may do everything; or the same with another secret.
    pub fn admit(&self, credentials: &Credentials) {
        self.gate.admit(credentials);
    }

    /// What becomes of a key that was known once.
    pub fn set_standing(&self, key_id: &str, standing: Standing) {
        self.gate.set_standing(key_id, standing);
    }

    /// The same for the keys that [`Self::environment`] and [`Self::environment_of_ranks`] name.
    pub fn set_standing_of_all(&self, standing: Standing) {
        for known in [&self.credentials, &self.of_ranks] {
            self.gate.set_standing(&known.key_id, standing);
        }
    }

    /// Lets so many more checkpoint shards be written and keeps all others waiting; with `None` nothing waits any more.
    pub fn hold_shards_after(&self, count: Option<usize>) {
        self.gate.hold_shards_after(count);
    }

    /// Sets the server's clock so many seconds ahead of the machine's; below 0 it is behind.
    pub fn shift_clock(&self, seconds_ahead: i64) {
        self.gate.shift_clock(seconds_ahead);
    }

    /// Variables with which clients find it.
    #[must_use]
    pub fn environment(&self) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT_URL", self.endpoint()),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_ACCESS_KEY_ID", self.credentials.key_id.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.credentials.secret.clone()),
            ("AWS_REGION", REGION.to_owned()),
        ]
    }

    /// Variables with which a run's ranks sign as somebody who may do everything but delete: those of the environment where
    /// they are set there, else new ones at each start.
    #[must_use]
    pub fn environment_of_ranks(&self) -> [(&'static str, String); 2] {
        [
            ("TARAZED_RANK_AWS_ACCESS_KEY_ID", self.of_ranks.key_id.clone()),
            ("TARAZED_RANK_AWS_SECRET_ACCESS_KEY", self.of_ranks.secret.clone()),
        ]
    }
}

/// Who may do what.
struct Rights {
    of_ranks: String,
}

#[async_trait::async_trait]
impl S3Access for Rights {
    async fn check(&self, request: &mut S3AccessContext<'_>) -> S3Result<()> {
        let deletes = matches!(
            request.s3_op().name(),
            "DeleteObject" | "DeleteObjects" | "DeleteBucket"
        );
        match request.credentials() {
            Some(who) if !deletes || who.access_key != self.of_ranks => Ok(()),
            _ => Err(s3_error!(AccessDenied, "these credentials may not do that")),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Nobody listens where the thread has ended by itself.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: TcpListener, service: S3Service, gate: Gate) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
        return;
    };
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            continue;
        };
        // Answers are small and waited for. Without it they are only slower.
        let _ = stream.set_nodelay(true);
        let (service, gate) = (service.clone(), gate.clone());
        let serve = service_fn(move |request: hyper::Request<Incoming>| {
            let (service, gate) = (service.clone(), gate.clone());
            async move {
                gate.wait(&request).await;
                let mut answer = match gate.refuse(request).await {
                    Ok(refused) => refused,
                    Err(request) => service.call(request.map(s3s::Body::from)).await?,
                };
                gate.date(&mut answer);
                Ok::<_, s3s::HttpError>(answer)
            }
        });
        // A client that goes away in the middle is its own matter.
        tokio::spawn(async move {
            http1::Builder::new()
                .serve_connection(TokioIo::new(stream), serve)
                .await
        });
    }
}

fn random_hex(bytes: usize) -> io::Result<String> {
    let mut random = vec![0; bytes];
    let mut filled = 0;
    while filled < bytes {
        filled += rustix::rand::getrandom(&mut random[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(hex::encode(random))
}
