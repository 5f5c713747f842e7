//! Where a rank process is found, and the sockets themselves. A listener lives across generations: what changes with a
//! generation is who is let in ([`crate::connect_mesh`]).

use crate::{FabricError, RefusalCounters};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Connections the kernel keeps while nobody accepts; it takes the smaller of this and its own limit.
const BACKLOG: i32 = 4096;
/// Send buffer asked for on Unix sockets, in bytes; the kernel may give less. Four times as much measured no faster. TCP
/// tunes its own, and would stop if asked.
const UNIX_BUFFER_BYTES: usize = 1024 * 1024;
/// Longest path that fits a Unix socket address, in bytes.
const UNIX_PATH_BYTES_MAX: usize = 107;
const NONBLOCKING: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// What to listen on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Transport {
    /// A Unix socket with a fresh name in this folder, which only the run's user should be able to enter.
    Unix {
        /// The folder; it must exist.
        dir: PathBuf,
    },
    /// A TCP port that the system chooses, on this address of this machine.
    Tcp {
        /// The address under which peers reach this machine.
        ip: IpAddr,
    },
    /// A TCP port of the caller's choice, for where something forwards to it or lets nothing else through.
    TcpAt {
        /// Where to listen; port 0 lets the system choose.
        at: SocketAddr,
        /// The port that peers dial, on the same address; 0 for the one listened at.
        advertised_port: u16,
    },
}

/// The one listening socket of a rank process.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    address: Address,
    refusals: Arc<RefusalCounters>,
}

impl Listener {
    /// Starts to listen.
    ///
    /// # Errors
    /// `Address` if the folder or IP address cannot be used, `System` if the machine refuses.
    pub fn bind(transport: &Transport) -> Result<Self, FabricError> {
        let (socket, address) = match transport {
            Transport::Unix { dir } => bind_unix(dir)?,
            Transport::Tcp { ip } => bind_tcp(SocketAddr::new(*ip, 0), 0)?,
            Transport::TcpAt { at, advertised_port } => bind_tcp(*at, *advertised_port)?,
        };
        rustix::net::listen(&socket, BACKLOG).map_err(|cause| FabricError::system("listen", cause))?;
        Ok(Self {
            socket,
            address,
            refusals: Arc::default(),
        })
    }

    /// What peers dial: `unix:/path` or `tcp:ip:port`. Goes into the roster.
    #[must_use]
    pub fn address(&self) -> String {
        match &self.address {
            Address::Unix(path) => format!("unix:{}", path.display()),
            Address::Tcp(address) => format!("tcp:{address}"),
        }
    }

    /// What was refused so far, here and on the meshes connected through this listener.
    #[must_use]
    pub fn refusals(&self) -> Arc<RefusalCounters> {
        Arc::clone(&self.refusals)
    }

    /// The next waiting connection, non-blocking, if there is one.
    pub(crate) fn accept(&self) -> Result<Option<OwnedFd>, FabricError> {
        match rustix::net::accept_with(&self.socket, NONBLOCKING) {
            Ok(socket) => {
                tune(&socket, &self.address);
                Ok(Some(socket))
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(cause) => Err(FabricError::system("accept", cause)),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address {
            // Best effort: a name left behind is never used again.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn bind_unix(dir: &Path) -> Result<(OwnedFd, Address), FabricError> {
    static NAMES: AtomicU32 = AtomicU32::new(0);
    let refuse = |reason: String| FabricError::Address {
        address: format!("unix:{}", dir.display()),
        reason,
    };
    let dir = dir
        .canonicalize()
        .map_err(|cause| refuse(format!("{cause}; create the folder first")))?;
    if dir.to_str().is_none() {
        return Err(refuse("the path is not UTF-8; use another folder".into()));
    }
    loop {
        let socket = new_socket(AddressFamily::UNIX)?;
        let path = dir.join(format!(
            "rank-{}-{}.sock",
            std::process::id(),
            NAMES.fetch_add(1, Ordering::Relaxed)
        ));
        match with_unix_address(&path, |address| rustix::net::bind(&socket, address)) {
            Ok(()) => return Ok((socket, Address::Unix(path))),
            // Left behind by a process that had our id before us: take the next name.
            Err(Errno::ADDRINUSE) => {}
            Err(cause) => return Err(refuse(format!("cannot bind a socket there: {cause}"))),
        }
    }
}

fn bind_tcp(at: SocketAddr, advertised_port: u16) -> Result<(OwnedFd, Address), FabricError> {
    let refuse = |reason: String| FabricError::Address {
        address: format!("tcp:{at}"),
        reason,
    };
    if at.ip().is_unspecified() {
        return Err(refuse("peers cannot dial it; name one address of this machine".into()));
    }
    let socket = new_socket(family(at))?;
    if at.port() != 0 {
        // Connections of the life before linger on the port after its death; only a living listener may keep it.
        sockopt::set_socket_reuseaddr(&socket, true).map_err(|cause| FabricError::system("setsockopt", cause))?;
    }
    rustix::net::bind(&socket, &at).map_err(|cause| refuse(format!("cannot bind: {cause}")))?;
    let mut dialed = rustix::net::getsockname(&socket)
        .and_then(SocketAddr::try_from)
        .map_err(|cause| FabricError::system("getsockname", cause))?;
    if advertised_port != 0 {
        dialed.set_port(advertised_port);
    }
    Ok((socket, Address::Tcp(dialed)))
}

/// A parsed roster entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl Address {
    pub(crate) fn parse(text: &str) -> Result<Self, FabricError> {
        let refuse = |reason: &str| FabricError::Address {
            address: text.to_owned(),
            reason: reason.to_owned(),
        };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = Path::new(path);
            let named = path.is_absolute() && path.file_name().is_some();
            return if named {
                Ok(Self::Unix(path.into()))
            } else {
                Err(refuse("an absolute path must follow unix:"))
            };
        }
        match text.strip_prefix("tcp:").map(str::parse) {
            Some(Ok(address)) => Ok(Self::Tcp(address)),
            _ => Err(refuse("expected unix:/path or tcp:ip:port")),
        }
    }

    /// A non-blocking socket on its way to this address, and whether it is there already.
    pub(crate) fn dial(&self) -> Result<(OwnedFd, bool), Errno> {
        let (socket, outcome) = match self {
            Self::Unix(path) => {
                let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, NONBLOCKING, None)?;
                let outcome = with_unix_address(path, |address| rustix::net::connect(&socket, address));
                (socket, outcome)
            }
            Self::Tcp(address) => {
                let socket = rustix::net::socket_with(family(*address), SocketType::STREAM, NONBLOCKING, None)?;
                let outcome = rustix::net::connect(&socket, address);
                (socket, outcome)
            }
        };
        tune(&socket, self);
        match outcome {
            Ok(()) => Ok((socket, true)),
            Err(Errno::INPROGRESS) => Ok((socket, false)),
            Err(cause) => Err(cause),
        }
    }
}

fn family(address: SocketAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    }
}

fn new_socket(family: AddressFamily) -> Result<OwnedFd, FabricError> {
    rustix::net::socket_with(family, SocketType::STREAM, NONBLOCKING, None)
        .map_err(|cause| FabricError::system("socket", cause))
}

/// Makes the socket fit for bulk data. Best effort: a socket without it is slower, not wrong.
fn tune(socket: &OwnedFd, address: &Address) {
    let _ = match address {
        Address::Unix(_) => sockopt::set_socket_send_buffer_size(socket, UNIX_BUFFER_BYTES),
        Address::Tcp(_) => sockopt::set_tcp_nodelay(socket, true),
    };
}

/// Calls with the socket address of `path`. A path too long for one is reached through its folder's descriptor, so that
/// deep run folders work.
fn with_unix_address<T>(path: &Path, call: impl FnOnce(&SocketAddrUnix) -> Result<T, Errno>) -> Result<T, Errno> {
    if path.as_os_str().len() <= UNIX_PATH_BYTES_MAX {
        return call(&SocketAddrUnix::new(path)?);
    }
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::NAMETOOLONG);
    };
    let folder = std::fs::File::open(folder).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::NOENT))?;
    call(&SocketAddrUnix::new(
        Path::new("/proc/self/fd")
            .join(folder.as_raw_fd().to_string())
            .join(name),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_their_text() {
        for text in ["unix:/run/x/rank-1-0.sock", "tcp:127.0.0.1:80", "tcp:[::1]:80"] {
            assert!(Address::parse(text).is_ok(), "{text}");
        }
        for text in [
            "",
            "unix:",
            "unix:relative",
            "tcp:",
            "tcp:host",
            "tcp:127.0.0.1",
            "udp:127.0.0.1:80",
            "/run/x",
        ] {
            assert!(
                matches!(Address::parse(text), Err(FabricError::Address { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn deep_folders_work_and_the_name_goes_with_the_listener() {
        let root = tempfile::tempdir().expect("temporary folder");
        let deep = root.path().join("x".repeat(120)).join("y".repeat(120));
        std::fs::create_dir_all(&deep).expect("deep folder");
        let listener = Listener::bind(&Transport::Unix { dir: deep.clone() }).expect("bind");
        let address = Address::parse(&listener.address()).expect("address");
        let (_dialed, connected) = address.dial().expect("dial");
        assert!(connected);
        assert!(listener.accept().expect("accept").is_some());
        drop(listener);
        assert_eq!(std::fs::read_dir(&deep).expect("folder").count(), 0);
    }

    /// A worker's next life listens where its last one did, though connections of that one linger; peers dial the port in
    /// front of it.
    #[test]
    fn a_chosen_port_is_taken_again_and_another_is_advertised() {
        let bind = |port, advertised_port| {
            let at = SocketAddr::from(([127, 0, 0, 1], port));
            Listener::bind(&Transport::TcpAt { at, advertised_port })
        };
        let first = bind(0, 0).expect("any port");
        let address = first.address();
        let Ok(Address::Tcp(at)) = Address::parse(&address) else {
            panic!("{address}")
        };
        let dialed = std::net::TcpStream::connect(at).expect("connected");
        assert!(bind(at.port(), 0).is_err(), "a living listener keeps its port");
        let accepted = loop {
            if let Some(accepted) = first.accept().expect("accepted") {
                break accepted;
            }
        };
        // Closed here first, so the port's connection is the one that lingers.
        drop((accepted, first, dialed));
        let again = bind(at.port(), 9).expect("the same port");
        assert_eq!(again.address(), "tcp:127.0.0.1:9");
    }

    #[test]
    fn unusable_places_are_refused_with_a_remedy() {
        let missing = Listener::bind(&Transport::Unix {
            dir: "/nonexistent/folder".into(),
        });
        assert!(matches!(missing, Err(FabricError::Address { .. })));
        let any = Listener::bind(&Transport::Tcp {
            ip: "0.0.0.0".parse().expect("ip"),
        });
        assert!(matches!(any, Err(FabricError::Address { .. })));
    }
}
