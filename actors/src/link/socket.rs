//! Sockets of the link: Unix or TCP, with the options that make a dead peer show.

use super::LinkError;
use ractor_cluster::{BoxRead, BoxWrite, ClusterBidiStream};
use rustix::net::{Shutdown, sockopt};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Longest path that a Unix socket address holds on Linux, without its closing zero.
const UNIX_PATH_BYTES_MAX: usize = 107;
const READ_BUFFER_BYTES: usize = 64 * 1024;

/// Where a hub listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Bind {
    /// A Unix socket at this path (at most 107 bytes); readable by its owner alone.
    Unix(PathBuf),
    /// TCP, for example `127.0.0.1:0`; port 0 lets the system choose.
    Tcp(SocketAddr),
}

impl Bind {
    /// A Unix socket of this name in `folder`, or TCP on loopback where that path would be too long.
    #[must_use]
    pub fn near(folder: &Path, name: &str) -> Self {
        let path = folder.join(name);
        if path.as_os_str().len() <= UNIX_PATH_BYTES_MAX {
            Self::Unix(path)
        } else {
            Self::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)))
        }
    }

    /// Reads what [`super::Hub::address`] wrote: `unix:/path` or `tcp:127.0.0.1:1234`.
    pub(super) fn parse(address: &str) -> Result<Self, LinkError> {
        if let Some(path) = address.strip_prefix("unix:") {
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        if let Some(Ok(socket)) = address.strip_prefix("tcp:").map(str::parse) {
            return Ok(Self::Tcp(socket));
        }
        Err(LinkError::Reconfigure {
            what: format!("`{address}` is no link address"),
            remedy: "pass the address that the controller printed: unix:/path or tcp:127.0.0.1:1234",
        })
    }

    fn to_address(&self) -> Result<String, LinkError> {
        match self {
            Self::Tcp(socket) => Ok(format!("tcp:{socket}")),
            Self::Unix(path) => match path.to_str() {
                Some(text) if text.len() <= UNIX_PATH_BYTES_MAX => Ok(format!("unix:{text}")),
                _ => Err(LinkError::Reconfigure {
                    what: format!("{} is too long for a Unix socket, or not UTF-8", path.display()),
                    remedy: "use a path of at most 107 bytes, or tcp:127.0.0.1:0",
                }),
            },
        }
    }
}

pub(super) enum Listener {
    Unix {
        listener: UnixListener,
        _name: UnlinkOnDrop,
    },
    Tcp(TcpListener),
}

/// Removes the socket's name when the hub is gone.
pub(super) struct UnlinkOnDrop(PathBuf);

impl Drop for UnlinkOnDrop {
    fn drop(&mut self) {
        // Nobody is helped by an error here: a leftover name is found stale by the next hub.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Binds; returns the listener and its address.
    pub async fn bind(bind: &Bind) -> Result<(Self, String), LinkError> {
        let address = bind.to_address()?;
        match bind {
            Bind::Unix(path) => {
                remove_stale(path).await?;
                let listener =
                    UnixListener::bind(path).map_err(|e| LinkError::system(format!("listen at {address}"), e))?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
                    .map_err(|e| LinkError::system(format!("protect {address}"), e))?;
                let _name = UnlinkOnDrop(path.clone());
                Ok((Self::Unix { listener, _name }, address))
            }
            Bind::Tcp(socket) => {
                let fail = |e| LinkError::system(format!("listen at {address}"), e);
                let listener = TcpListener::bind(socket).await.map_err(fail)?;
                let local = listener.local_addr().map_err(fail)?;
                Ok((Self::Tcp(listener), format!("tcp:{local}")))
            }
        }
    }

    pub async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix { listener, .. } => Ok(Stream::Unix(listener.accept().await?.0)),
            Self::Tcp(listener) => Ok(Stream::Tcp(listener.accept().await?.0)),
        }
    }
}

/// A name left by a hub that was killed is removed; a living hub's is not.
async fn remove_stale(path: &Path) -> Result<(), LinkError> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(LinkError::system(format!("look at {}", path.display()), e)),
    };
    if !metadata.file_type().is_socket() {
        return Err(LinkError::Reconfigure {
            what: format!("{} exists and is not a socket", path.display()),
            remedy: "choose another path for the control socket",
        });
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(LinkError::Reconfigure {
            what: format!("another controller listens at {}", path.display()),
            remedy: "stop it, or choose another run folder",
        });
    }
    match std::fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(LinkError::system(
            format!("remove the stale socket {}", path.display()),
            e,
        )),
    }
}

/// Reading and writing, for the handshake.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// A connected stream.
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub async fn dial(bind: &Bind) -> io::Result<Self> {
        match bind {
            Bind::Unix(path) => Ok(Self::Unix(UnixStream::connect(path).await?)),
            Bind::Tcp(socket) => Ok(Self::Tcp(TcpStream::connect(socket).await?)),
        }
    }

    pub fn duplex(&mut self) -> &mut dyn Duplex {
        match self {
            Self::Unix(stream) => stream,
            Self::Tcp(stream) => stream,
        }
    }

    /// Small messages leave at once, and a peer whose host is gone shows within about `failure`.
    pub fn tune(&self, failure: Duration) -> io::Result<()> {
        let Self::Tcp(stream) = self else { return Ok(()) };
        let fd = stream.as_fd();
        let millis = u32::try_from(failure.as_millis()).unwrap_or(u32::MAX);
        // Probes count in whole seconds; three of them, then the user timeout decides.
        let probe = Duration::from_secs((failure.as_secs() / 4).max(1));
        sockopt::set_tcp_nodelay(fd, true)?;
        sockopt::set_socket_keepalive(fd, true)?;
        sockopt::set_tcp_keepidle(fd, probe)?;
        sockopt::set_tcp_keepintvl(fd, probe)?;
        sockopt::set_tcp_keepcnt(fd, 3)?;
        sockopt::set_tcp_user_timeout(fd, millis)?;
        Ok(())
    }

    /// A second handle, to cut the stream from outside.
    pub fn knife(&self) -> io::Result<Knife> {
        let fd = match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        };
        Ok(Knife(fd.try_clone_to_owned()?))
    }
}

/// Ends a stream that some actor is reading or writing: both ends see its end at once.
pub(super) struct Knife(OwnedFd);

impl Knife {
    pub fn cut(&self) {
        // The only failure is that the stream has ended already.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }
}

/// A stream on its way into `ractor_cluster`; the label tells the session host what it is.
pub(super) struct Wire {
    pub stream: Stream,
    pub label: String,
}

impl ClusterBidiStream for Wire {
    fn split(self: Box<Self>) -> (BoxRead, BoxWrite) {
        match self.stream {
            Stream::Unix(stream) => {
                let (read, write) = stream.into_split();
                (buffered(read), Box::new(write))
            }
            Stream::Tcp(stream) => {
                let (read, write) = stream.into_split();
                (buffered(read), Box::new(write))
            }
        }
    }

    fn peer_label(&self) -> Option<String> {
        Some(self.label.clone())
    }
}

/// The session reads a length, then the frame: a buffer makes that one system call.
fn buffered(read: impl AsyncRead + Unpin + Send + 'static) -> BoxRead {
    Box::new(BufReader::with_capacity(READ_BUFFER_BYTES, read))
}
