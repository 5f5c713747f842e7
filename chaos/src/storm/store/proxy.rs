//! The proxy in front of an S3 server. It reads whole requests, does what its present mischief says, and passes on the bytes
//! it was given.

use super::http::Message;
use std::io::{ErrorKind, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};

/// Something done to requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mischief {
    /// Every request is answered 503, and nothing is done.
    Unavailable,
    /// Every request is passed on this much later, in milliseconds.
    Latency(u64),
    /// The next so many writes are done, and answered 503 or with a closed connection in turn.
    LoseAnswers(u32),
    /// The next so many uploads break off half-way, towards the server and the client.
    TearUploads(u32),
    /// The next so many objects read have a bit flipped.
    CorruptReads(u32),
}

/// What came of a mischief.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Tally {
    /// Requests harmed.
    pub hits: u64,
}

#[derive(Default)]
struct State {
    mischief: Option<Mischief>,
    tally: Tally,
}

pub(super) struct Proxy {
    upstream: String,
    state: Mutex<State>,
}

/// What to do with one request.
enum Course {
    Pass,
    Refuse,
    Wait(Duration),
    LoseAnswer { silently: bool },
    Tear,
    Corrupt,
}

impl Proxy {
    pub fn new(upstream: String) -> Self {
        Self {
            upstream,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set(&self, mischief: Option<Mischief>) -> Tally {
        let mut state = self.state();
        state.mischief = mischief;
        std::mem::take(&mut state.tally)
    }

    /// Decides, and counts what is harmed. A corrupt read is counted where it is done: an answer may hold nothing to harm.
    fn course(&self, request: &Message) -> Course {
        let (method, _) = request.words();
        let mut state = self.state();
        let Some(mischief) = state.mischief else {
            return Course::Pass;
        };
        let counted = |state: &mut State, left: u32, next: fn(u32) -> Mischief| {
            state.tally.hits += 1;
            state.mischief = (left > 1).then(|| next(left - 1));
            left
        };
        match mischief {
            Mischief::Unavailable => {
                state.tally.hits += 1;
                Course::Refuse
            }
            Mischief::Latency(ms) => {
                state.tally.hits += 1;
                Course::Wait(Duration::from_millis(ms))
            }
            Mischief::LoseAnswers(left) if matches!(method, "PUT" | "POST" | "DELETE") => {
                let left = counted(&mut state, left, Mischief::LoseAnswers);
                Course::LoseAnswer {
                    silently: left.is_multiple_of(2),
                }
            }
            Mischief::TearUploads(left) if method == "PUT" && !request.body.is_empty() => {
                counted(&mut state, left, Mischief::TearUploads);
                Course::Tear
            }
            Mischief::CorruptReads(_) if method == "GET" && !is_listing(request) => Course::Corrupt,
            _ => Course::Pass,
        }
    }

    /// Flips a bit of an object that was read, if the mischief still stands.
    fn corrupt(&self, answer: &mut Message) {
        let mut state = self.state();
        if let Some(Mischief::CorruptReads(left)) = state.mischief
            && matches!(answer.status(), 200 | 206)
            && !answer.body.is_empty()
        {
            state.tally.hits += 1;
            state.mischief = (left > 1).then(|| Mischief::CorruptReads(left - 1));
            let middle = answer.body.len() / 2;
            answer.body[middle] ^= 0x08;
        }
    }

    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        loop {
            let Ok((client, _)) = listener.accept().await else {
                // Out of descriptors, which pass; without a pause this would spin.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let proxy = Arc::clone(&self);
            tokio::spawn(async move {
                // An error is a client that left, or a harm that was meant: its end of the connection says so.
                let _ = proxy.client(client).await;
            });
        }
    }

    async fn client(&self, client: TcpStream) -> Result<()> {
        client.set_nodelay(true)?;
        let mut client = BufReader::new(client);
        while let Some(request) = Message::read(&mut client, true).await? {
            let Some(answer) = self.carry_out(&request).await? else {
                return Ok(());
            };
            answer.write(&mut client).await?;
        }
        Ok(())
    }

    /// The answer; none where the connection is to be closed instead.
    async fn carry_out(&self, request: &Message) -> Result<Option<Message>> {
        let unavailable = || Message::answer(503, &[], b"<Error><Code>SlowDown</Code></Error>".to_vec());
        match self.course(request) {
            Course::Pass => self.forward(request).await.map(Some),
            Course::Refuse => Ok(Some(unavailable())),
            Course::Wait(time) => {
                tokio::time::sleep(time).await;
                self.forward(request).await.map(Some)
            }
            Course::LoseAnswer { silently } => {
                self.forward(request).await?;
                Ok((!silently).then(unavailable))
            }
            Course::Tear => {
                let mut torn = request.clone();
                torn.body.truncate(torn.body.len() / 2);
                let mut server = TcpStream::connect(&self.upstream).await?;
                torn.write(&mut server).await?;
                Ok(None)
            }
            Course::Corrupt => {
                let mut answer = self.forward(request).await?;
                self.corrupt(&mut answer);
                Ok(Some(answer))
            }
        }
    }

    async fn forward(&self, request: &Message) -> Result<Message> {
        let server = TcpStream::connect(&self.upstream).await?;
        server.set_nodelay(true)?;
        let mut server = BufReader::new(server);
        request.write(&mut server).await?;
        let with_body = request.words().0 != "HEAD";
        let answer = Message::read(&mut server, with_body).await?;
        answer.ok_or_else(|| ErrorKind::UnexpectedEof.into())
    }
}

/// Whether a request asks for names and not for an object.
fn is_listing(request: &Message) -> bool {
    let target = request.words().1;
    target.contains("list-type=")
}
