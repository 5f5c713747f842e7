//! Mutual proof of the run's token before a stream is handed to `ractor_cluster`, whose own cookie is only a SHA-256
//! over a 32-bit challenge.
//!
//! ```text
//! rank → hub   hello      magic, version, worker, incarnation, endpoint, nonce
//! hub  → rank  challenge  connection, endpoint, nonce, MAC("hub",  hello ‖ challenge)
//! rank → hub   proof                                  MAC("rank", hello ‖ challenge)
//! hub  → rank  verdict    code, reason                and its MAC over all before it
//! ```
//! MACs are keyed BLAKE3 over the whole transcript with a label per direction, so nothing can be replayed, reflected or
//! moved to another identity. `endpoint` is the process-local id of each side's switchboard actor.

use super::PeerId;
use std::io;
use tarazed_domain::{Incarnation, WorkerId};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub(super) const MAGIC: &[u8; 8] = b"tarazed\x01";
pub(super) const HELLO_BYTES: usize = 8 + 4 + 4 + 8 + 32;
const CHALLENGE_BYTES: usize = 8 + 8 + 32;
const MAC_BYTES: usize = 32;
const VERDICT_BYTES_MAX: usize = 512;

/// The hub's answer to a proved identity.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// The stream is the session's now.
    Welcome,
    /// This identity will never be admitted again.
    Refused(String),
    /// Not now; the caller may dial again.
    Busy(String),
}

/// What the rank's end learns.
#[derive(Debug)]
pub(super) struct Session {
    pub connection: u64,
    pub endpoint: u64,
    pub verdict: Verdict,
}

/// What the hub's end learns, before its verdict.
pub(super) struct Caller {
    pub peer: PeerId,
    pub connection: u64,
    pub endpoint: u64,
    transcript: Transcript,
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the other side does not speak this protocol")]
    Foreign,
    #[error("the other side does not hold this run's token")]
    Token,
}

struct Transcript {
    key: [u8; 32],
    hasher: blake3::Hasher,
}

impl Transcript {
    fn new(token: &[u8; 32]) -> Self {
        let key = blake3::derive_key("tarazed 2026 link handshake v1", token);
        Self {
            key,
            hasher: blake3::Hasher::new(),
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// MAC of all bytes added so far. Compared in constant time: `blake3::Hash` does that.
    fn mac(&self, label: &str) -> blake3::Hash {
        let mut mac = blake3::Hasher::new_keyed(&self.key);
        mac.update(label.as_bytes());
        mac.update(self.hasher.finalize().as_bytes());
        mac.finalize()
    }
}

/// The secret that `ractor_cluster` uses as its cookie: never the token itself.
pub(super) fn cookie(token: &[u8; 32]) -> String {
    blake3::Hash::from(blake3::derive_key("tarazed 2026 link cookie v1", token))
        .to_hex()
        .to_string()
}

/// Fresh random bytes from the kernel.
pub(super) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(bytes)
}

async fn read_array<const N: usize>(stream: &mut (impl AsyncRead + Unpin + ?Sized)) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// The rank's side. `endpoint` is its switchboard's id.
pub(super) async fn call(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin + ?Sized),
    token: &[u8; 32],
    peer: PeerId,
    endpoint: u64,
) -> Result<Session, HandshakeError> {
    let mut transcript = Transcript::new(token);
    let mut hello = Vec::with_capacity(HELLO_BYTES);
    hello.extend_from_slice(MAGIC);
    hello.extend_from_slice(&peer.worker.0.to_le_bytes());
    hello.extend_from_slice(&peer.incarnation.0.to_le_bytes());
    hello.extend_from_slice(&endpoint.to_le_bytes());
    hello.extend_from_slice(&random::<32>()?);
    transcript.add(&hello);
    stream.write_all(&hello).await?;

    let challenge = read_array::<CHALLENGE_BYTES>(stream).await?;
    transcript.add(&challenge);
    let proof = read_array::<MAC_BYTES>(stream).await?;
    if transcript.mac("hub") != blake3::Hash::from(proof) {
        return Err(HandshakeError::Token);
    }
    stream.write_all(transcript.mac("rank").as_bytes()).await?;

    let head = read_array::<3>(stream).await?;
    let length = usize::from(u16::from_le_bytes([head[1], head[2]]));
    if length > VERDICT_BYTES_MAX {
        return Err(HandshakeError::Foreign);
    }
    let mut reason = vec![0; length];
    stream.read_exact(&mut reason).await?;
    transcript.add(&head);
    transcript.add(&reason);
    let proof = read_array::<MAC_BYTES>(stream).await?;
    if transcript.mac("verdict") != blake3::Hash::from(proof) {
        return Err(HandshakeError::Token);
    }
    let reason = String::from_utf8_lossy(&reason).into_owned();
    let verdict = match head[0] {
        0 => Verdict::Welcome,
        1 => Verdict::Refused(reason),
        2 => Verdict::Busy(reason),
        _ => return Err(HandshakeError::Foreign),
    };
    Ok(Session {
        connection: u64::from_le_bytes(take(&challenge, 0)),
        endpoint: u64::from_le_bytes(take(&challenge, 8)),
        verdict,
    })
}

/// The hub's side up to the caller's proof. [`answer`] ends it.
pub(super) async fn receive(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin + ?Sized),
    token: &[u8; 32],
    endpoint: u64,
) -> Result<Caller, HandshakeError> {
    let hello = read_array::<HELLO_BYTES>(stream).await?;
    if hello[..8] != MAGIC[..] {
        return Err(HandshakeError::Foreign);
    }
    let mut transcript = Transcript::new(token);
    transcript.add(&hello);
    let connection = u64::from_le_bytes(random::<8>()?);
    let mut challenge = Vec::with_capacity(CHALLENGE_BYTES + MAC_BYTES);
    challenge.extend_from_slice(&connection.to_le_bytes());
    challenge.extend_from_slice(&endpoint.to_le_bytes());
    challenge.extend_from_slice(&random::<32>()?);
    transcript.add(&challenge);
    challenge.extend_from_slice(transcript.mac("hub").as_bytes());
    stream.write_all(&challenge).await?;

    let proof = read_array::<MAC_BYTES>(stream).await?;
    if transcript.mac("rank") != blake3::Hash::from(proof) {
        return Err(HandshakeError::Token);
    }
    Ok(Caller {
        peer: PeerId {
            worker: WorkerId(u32::from_le_bytes(take(&hello, 8))),
            incarnation: Incarnation(u32::from_le_bytes(take(&hello, 12))),
        },
        connection,
        endpoint: u64::from_le_bytes(take(&hello, 16)),
        transcript,
    })
}

/// The hub's last word.
pub(super) async fn answer(
    stream: &mut (impl AsyncWrite + Unpin + ?Sized),
    mut caller: Caller,
    verdict: &Verdict,
) -> io::Result<()> {
    let (code, reason) = match verdict {
        Verdict::Welcome => (0, ""),
        Verdict::Refused(reason) => (1, reason.as_str()),
        Verdict::Busy(reason) => (2, reason.as_str()),
    };
    let reason = &reason.as_bytes()[..reason.len().min(VERDICT_BYTES_MAX)];
    let length = u16::try_from(reason.len()).expect("cut to VERDICT_BYTES_MAX");
    let mut message = vec![code];
    message.extend_from_slice(&length.to_le_bytes());
    message.extend_from_slice(reason);
    caller.transcript.add(&message);
    message.extend_from_slice(caller.transcript.mac("verdict").as_bytes());
    stream.write_all(&message).await
}
