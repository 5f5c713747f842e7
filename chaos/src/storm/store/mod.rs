//! The object store of a storm: an S3 server, and in front of it a proxy that does the harm.
//!
//! The server is honest: one bucket in memory, creates-if-absent atomic per key. All trouble is made by the proxy, which
//! works in front of any S3 server ([`Store::start`] takes one's address).

mod http;
mod proxy;
mod server;

pub use proxy::Mischief;
use proxy::Proxy;
pub use proxy::Tally;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpListener;

/// The bucket.
pub const BUCKET: &str = "storm";
const KEY_ID: &str = "AKIDOFASTORMONLY";
const SECRET: &str = "not-a-secret-of-anything";

/// Server and proxy, until they are dropped with their runtime.
#[derive(Clone)]
pub struct Store {
    proxy: Arc<Proxy>,
    port: u16,
    own_server: bool,
}

impl Store {
    /// Starts both, or the proxy alone in front of `upstream` (`host:port`, plain HTTP).
    ///
    /// # Errors
    /// If there are no ports.
    pub async fn start(upstream: Option<&str>) -> Result<Self, String> {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let bind = async || TcpListener::bind(any).await.map_err(|e| format!("a store's port: {e}"));
        let own_server = upstream.is_none();
        let upstream = match upstream {
            Some(upstream) => upstream.to_owned(),
            None => {
                let listener = bind().await?;
                let address = listener.local_addr().map_err(|e| e.to_string())?;
                tokio::spawn(server::serve(listener, KEY_ID));
                address.to_string()
            }
        };
        let listener = bind().await?;
        let port = listener.local_addr().map_err(|e| e.to_string())?.port();
        let proxy = Arc::new(Proxy::new(upstream));
        tokio::spawn(Arc::clone(&proxy).serve(listener));
        Ok(Self {
            proxy,
            port,
            own_server,
        })
    }

    /// What the processes of a run need in their environment to use it.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        let mut variables = vec![("AWS_ENDPOINT_URL", endpoint.as_str()), ("AWS_ALLOW_HTTP", "true")];
        if self.own_server {
            variables.extend([("AWS_ACCESS_KEY_ID", KEY_ID), ("AWS_SECRET_ACCESS_KEY", SECRET)]);
        }
        let owned = variables.into_iter();
        owned.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// From now on this is done to requests; nothing, to mend it. What the mischief before came to.
    pub fn set(&self, mischief: Option<Mischief>) -> Tally {
        self.proxy.set(mischief)
    }
}

#[cfg(test)]
mod tests;
