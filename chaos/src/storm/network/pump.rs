//! One proxied connection: two pumps, each with the condition of its way.

use super::{Condition, Shared, Way, back, lock};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;

/// Bytes of one piece.
const PIECE_BYTES: usize = 64 * 1024;
/// Bytes of one piece on a throttled way, so that the rate is even.
const THROTTLED_PIECE_BYTES: u64 = 4 * 1024;

/// A connection between a dialer and its goal.
pub(super) struct Connection {
    pub shared: Arc<Shared>,
    /// From the dialer to its goal.
    pub way: Way,
}

/// How one direction ended.
#[derive(PartialEq, Eq)]
enum Ending {
    /// Its source said goodbye, and the other side was told.
    Closed,
    /// An error, or a reset was asked for: both ends must see one.
    Broken,
}

impl Connection {
    /// Until both directions are closed, or one breaks.
    pub async fn run(self, dialer: TcpStream, goal: TcpStream) {
        let number = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let reset = watch::Sender::new(false);
        lock(&self.shared.live).insert(number, (self.way, reset.clone()));
        let (from_dialer, to_dialer) = dialer.into_split();
        let (from_goal, to_goal) = goal.into_split();
        let mut there = Pump::new(&self.shared, self.way, from_dialer, to_goal, reset.clone());
        let mut back = Pump::new(&self.shared, back(self.way), from_goal, to_dialer, reset);
        let (left, right) = tokio::join!(there.run(), back.run());
        if left == Ending::Broken || right == Ending::Broken {
            // Closed without lingering, each end sees a reset.
            let _ = there.sink.as_ref().set_zero_linger();
            let _ = back.sink.as_ref().set_zero_linger();
        }
        lock(&self.shared.live).remove(&number);
    }
}

/// One direction.
struct Pump<'a> {
    shared: &'a Shared,
    way: Way,
    source: OwnedReadHalf,
    sink: OwnedWriteHalf,
    /// Breaks both directions of this connection.
    reset: watch::Sender<bool>,
    /// Bytes were lost: nothing passes any more.
    dead: bool,
}

impl<'a> Pump<'a> {
    const fn new(
        shared: &'a Shared,
        way: Way,
        source: OwnedReadHalf,
        sink: OwnedWriteHalf,
        reset: watch::Sender<bool>,
    ) -> Self {
        Self {
            shared,
            way,
            source,
            sink,
            reset,
            dead: false,
        }
    }

    async fn run(&mut self) -> Ending {
        let mut asked = self.reset.subscribe();
        let ending = tokio::select! {
            ending = self.pass() => ending,
            _ = asked.wait_for(|asked| *asked) => Ending::Broken,
        };
        if ending == Ending::Broken {
            // The other direction must not wait for an end that never comes.
            self.reset.send_replace(true);
        }
        ending
    }

    async fn pass(&mut self) -> Ending {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let count = match self.source.read(&mut piece).await {
                Ok(0) => return self.close().await,
                Ok(count) => count,
                // An end that broke off shows to the other one, unless the way is cut.
                Err(_) => {
                    self.until_mended().await;
                    return Ending::Broken;
                }
            };
            if self.deliver(&mut piece[..count]).await.is_err() {
                return Ending::Broken;
            }
        }
    }

    fn condition(&self) -> Option<Condition> {
        lock(&self.shared.conditions).get(&self.way).copied()
    }

    fn hit(&self) {
        *lock(&self.shared.hits).entry(self.way).or_default() += 1;
    }

    async fn deliver(&mut self, piece: &mut [u8]) -> std::io::Result<()> {
        let condition = self.condition();
        if self.dead || condition == Some(Condition::Cut) {
            self.dead = true;
            self.hit();
            return Ok(());
        }
        match condition {
            None | Some(Condition::Cut) => {}
            Some(Condition::Delay(ms)) => {
                self.hit();
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
            Some(Condition::Throttle(rate)) => return self.trickle(piece, rate).await,
            Some(Condition::FlipBit) => {
                // Whoever takes the condition away does the deed: it is done once.
                if lock(&self.shared.conditions).remove(&self.way).is_some() {
                    self.hit();
                    let middle = piece.len() / 2;
                    piece[middle] ^= 0x10;
                }
            }
        }
        self.sink.write_all(piece).await
    }

    async fn trickle(&mut self, piece: &[u8], rate: u64) -> std::io::Result<()> {
        self.hit();
        for part in piece.chunks(THROTTLED_PIECE_BYTES as usize) {
            // A way that is mended meanwhile is fast at once.
            if matches!(self.condition(), Some(Condition::Throttle(_))) {
                let ms = part.len() as u64 * 1000 / rate.max(1);
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
            self.sink.write_all(part).await?;
        }
        Ok(())
    }

    /// The source has closed. The other end learns of it as soon as the way lets it; where bytes are missing it sees an
    /// error, as from a peer that does not know the connection any more.
    async fn close(&mut self) -> Ending {
        self.until_mended().await;
        if self.dead || self.sink.shutdown().await.is_err() {
            Ending::Broken
        } else {
            Ending::Closed
        }
    }

    async fn until_mended(&mut self) {
        let mut changes = self.shared.changes.subscribe();
        loop {
            changes.mark_unchanged();
            if self.condition() != Some(Condition::Cut) {
                return;
            }
            self.dead = true;
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}
