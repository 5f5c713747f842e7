//! The dashboard of a run: one page on the loopback interface, served by the process of `tarazed train` as long as it lives.
//!
//! | part | holds |
//! |---|---|
//! | [`site`] | which request gets which answer: pure |
//! | [`serve`] | HTTP: bounded connections, sizes and times |
//! | [`reader`] | the one look at the run behind all who ask |
//! | [`tail`], [`record`], [`history`] | reading on in the run's files; what they said; its course in few points |
//! | [`shown`] | from a view to JSON: pure |
//! | `page.html` | the page, which fetches nothing else |
//!
//! It must never harm the run: it has a thread and a runtime of its own, reads the run's files and asks its control socket as
//! `tarazed watch` does, and only when somebody looks. What fails in it costs the page alone.
//!
//! Deliberately absent: anything that changes the run; TLS and users. Whoever knows the address may look, so it holds a
//! token, and the file that has it is its owner's alone.

pub mod history;
pub mod reader;
pub mod record;
pub mod serve;
pub mod shown;
pub mod site;
pub mod tail;

use crate::exit::Failure;
use crate::run_folder::RunFolder;
use reader::Reader;
use serve::Site;
use site::{Answers, Token};
use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, oneshot};

/// Where the page is served unless somebody says otherwise: for this machine alone, at any free port.
pub const PLACE: &str = "127.0.0.1:0";
/// Who wants no page says this.
const OFF: &str = "off";

/// Reads `--dashboard`: an address with a port, or none for `off`.
///
/// # Errors
/// Refused where it is neither.
pub fn place(text: &str) -> Result<Option<SocketAddr>, Failure> {
    if text == OFF {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        Failure::refused(
            format!("--dashboard {text}"),
            "is no IP address with a port",
            format!("give one like {PLACE} (port 0 for any free one) or [::1]:8080, or {OFF}"),
        )
    })
}

/// The run that is shown.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its folder.
    pub folder: RunFolder,
    /// The step that it ends after.
    pub last_step: u64,
    /// Languages of the domains that it begins with.
    pub languages: BTreeMap<String, &'static str>,
}

/// Where a page is, and the file of the run folder that says so.
#[derive(Clone, Debug)]
pub struct Address {
    url: String,
    file: PathBuf,
}

/// A page that is served until this is dropped.
#[derive(Debug)]
pub struct Dashboard {
    address: Address,
    publish: Arc<Notify>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Dashboard {
    /// Serves the page of `run` at `address`.
    ///
    /// # Errors
    /// Transient where nothing can listen there, or the machine gives no thread.
    pub fn start(address: SocketAddr, run: Run) -> Result<Self, Failure> {
        let cannot = |e: std::io::Error| {
            let what = format!("--dashboard {address}");
            let remedy = format!("name another address or port ({PLACE} is any free one of this machine), or {OFF}");
            Failure::transient(what, format!("cannot be served ({e})"), remedy)
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()
            .map_err(cannot)?;
        let listener = std::net::TcpListener::bind(address).map_err(cannot)?;
        listener.set_nonblocking(true).map_err(cannot)?;
        let bound = listener.local_addr().map_err(cannot)?;
        let entered = runtime.enter();
        let listener = TcpListener::from_std(listener).map_err(cannot)?;
        drop(entered);
        let token = Token::random().map_err(cannot)?;
        let answers = Token::random().and_then(|nonce| Answers::new(&nonce)).map_err(cannot)?;
        let url = format!("http://{}/{}/", host(bound), token.text());
        let address = Address {
            url,
            file: run.folder.dashboard_url(),
        };
        let site = Arc::new(Site {
            token,
            answers,
            reader: Arc::new(Mutex::new(Reader::new(&run.folder, run.last_step, run.languages))),
        });
        let publish = Arc::new(Notify::new());
        let (stop, stopped) = oneshot::channel();
        let told = (address.clone(), Arc::clone(&publish));
        let work = move || work(runtime, listener, site, told, stopped);
        let thread = std::thread::Builder::new().name("dashboard".to_owned()).spawn(work);
        Ok(Self {
            address,
            publish,
            stop: Some(stop),
            thread: Some(thread.map_err(cannot)?),
        })
    }

    /// Where the page is. Whoever knows it may look.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.address.url
    }

    /// The same, with the file that says so.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// What writes the address into the run folder when it is told so, without waiting: a folder whose run is refused keeps
    /// what it had.
    #[must_use]
    pub fn publisher(&self) -> Arc<Notify> {
        Arc::clone(&self.publish)
    }
}

impl Drop for Dashboard {
    /// Whoever is being answered is left behind: nobody waits for a client.
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Nobody listens where the thread has ended by itself.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.address.withdraw();
    }
}

impl Address {
    /// Writes it for this user alone, in one piece.
    fn write(&self) -> std::io::Result<()> {
        let fresh = self.file.with_extension("url.new");
        // One that an earlier start left behind may have other permissions.
        let _ = std::fs::remove_file(&fresh);
        let mut options = std::fs::OpenOptions::new();
        let made = options.create_new(true).write(true).mode(0o600).open(&fresh);
        made.and_then(|mut made| writeln!(made, "{}", self.url))
            .and_then(|()| std::fs::rename(&fresh, &self.file))
            .inspect_err(|_| {
                let _ = std::fs::remove_file(&fresh);
            })
    }

    /// Removes the file, unless it is another's by now: of a controller that took over.
    pub fn withdraw(&self) {
        if std::fs::read_to_string(&self.file).is_ok_and(|text| text.trim_end() == self.url) {
            // One that stays names a page that is gone, and the next start writes over it, or removes it.
            let _ = std::fs::remove_file(&self.file);
        }
    }
}

/// What the thread does until it is stopped.
fn work(
    runtime: Runtime,
    listener: TcpListener,
    site: Arc<Site>,
    (address, publish): (Address, Arc<Notify>),
    stopped: oneshot::Receiver<()>,
) {
    runtime.block_on(async {
        let tell = async {
            publish.notified().await;
            if let Err(e) = address.write() {
                let file = address.file.display();
                tracing::warn!("{file}: cannot be written ({e}); the address was printed");
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = serve::accept(listener, site) => {}
            () = tell => {}
            _ = stopped => {}
        }
    });
    // A look that waits for the controller's answer must not hold up the end.
    runtime.shutdown_background();
}

/// As others would write it: one that stands for all addresses of the machine is none to go to.
fn host(bound: SocketAddr) -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if bound.ip().is_unspecified() && !name.is_empty() {
        format!("{name}:{}", bound.port())
    } else {
        bound.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    #[test]
    fn a_place_is_an_address_with_a_port_or_off() {
        let ok = |text: &str| place(text).expect("a place").map(|place| place.to_string());
        assert_eq!(ok("off"), None);
        for text in [PLACE, "0.0.0.0:8080", "[::1]:0"] {
            assert_eq!(ok(text).as_deref(), Some(text));
        }
        for text in [
            "",
            "8080",
            ":8080",
            "127.0.0.1",
            "127.0.0.1:",
            "127.0.0.1:65536",
            "localhost:80",
            "OFF",
            "::1:80",
        ] {
            let refused = place(text).expect_err("refused");
            assert_eq!(refused.exit, Exit::Refused, "{text}");
            let message = &refused.message;
            assert!(
                message.starts_with(&format!("--dashboard {text}: is no IP address")),
                "{message}"
            );
            assert!(message.contains("or off"), "{message}");
        }
    }

    #[test]
    fn an_address_is_one_to_go_to() {
        let host = |text: &str| host(text.parse().expect("an address"));
        assert_eq!(host("127.0.0.1:80"), "127.0.0.1:80");
        assert_eq!(host("[::1]:80"), "[::1]:80");
        assert!(!host("0.0.0.0:80").starts_with("0.0.0.0") && host("0.0.0.0:80").ends_with(":80"));
    }

    #[test]
    fn the_address_is_its_owners_and_goes_with_its_page() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("dashboard.url");
        std::fs::write(dir.path().join("dashboard.url.new"), "half").expect("written");
        let address = |file: &Path, url: &str| Address {
            url: url.to_owned(),
            file: file.to_owned(),
        };
        let (first, second) = (address(&file, "http://a/1/"), address(&file, "http://a/2/"));
        first.write().expect("written");
        assert_eq!(std::fs::read_to_string(&file).expect("a file"), "http://a/1/\n");
        let mode = std::fs::metadata(&file).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{mode:o}");
        second.write().expect("written over");
        first.withdraw();
        assert!(file.exists(), "it is another's by now");
        second.withdraw();
        assert_eq!(std::fs::read_dir(dir.path()).expect("a folder").count(), 0);
        second.withdraw();
        assert!(address(&dir.path().join("nowhere/dashboard.url"), "x").write().is_err());
    }
}
