//! Memory for uploads: how much may be copied out of snapshots at once.
//!
//! A snapshot lies in memory until it is stored, and each part on its way is a copy of some of it. When a piece is
//! copied, all copies together are at most a quarter of what the uploads then under way are to store, and never more than
//! [`UPLOAD_BYTES_IN_FLIGHT_MAX`]; one piece may always go, since a part cannot be as small as one likes.
//! This bounds the copies alone; what a process really needs beside them is measured (docs/STATUS.md).

use crate::limits::{UPLOAD_BYTES_IN_FLIGHT_MAX, UPLOAD_COPIES_DIVISOR};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

#[derive(Default)]
pub(crate) struct Room {
    counts: Mutex<Counts>,
    /// Whoever has it is the one that waits; the others stand in line for it, so that a large piece is not passed over for ever.
    turn: tokio::sync::Mutex<()>,
    freed: Notify,
}

#[derive(Default)]
struct Counts {
    /// Bytes of all uploads that have begun and not ended.
    to_store: u64,
    /// Bytes of copies that are on their way.
    copied: u64,
}

impl Counts {
    fn has_room(&self, bytes: u64) -> bool {
        let bound = (self.to_store / UPLOAD_COPIES_DIVISOR).min(UPLOAD_BYTES_IN_FLIGHT_MAX);
        self.copied == 0 || self.copied + bytes <= bound
    }
}

/// An upload that has begun, until dropped.
pub(crate) struct Upload {
    room: Arc<Room>,
    bytes: u64,
}

/// A copy that is on its way, until dropped.
pub(crate) struct Piece {
    room: Arc<Room>,
    bytes: u64,
}

impl Room {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins an upload of so many bytes.
    pub(crate) fn begin(self: &Arc<Self>, bytes: u64) -> Upload {
        self.counts().to_store += bytes;
        self.freed.notify_one();
        Upload {
            room: Arc::clone(self),
            bytes,
        }
    }
}

impl Upload {
    /// Waits until so many bytes of it may be copied. Whoever has copied some waits for one request alone, which ends.
    pub(crate) async fn piece(&self, bytes: u64) -> Piece {
        let room = &self.room;
        let _turn = room.turn.lock().await;
        loop {
            // Asked for before the look: what is freed between the two is not missed.
            let freed = room.freed.notified();
            {
                let mut counts = room.counts();
                if counts.has_room(bytes) {
                    counts.copied += bytes;
                    return Piece {
                        room: Arc::clone(room),
                        bytes,
                    };
                }
            }
            freed.await;
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.room.counts().to_store -= self.bytes;
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.room.counts().copied -= self.bytes;
        self.room.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    const MIB: u64 = 1024 * 1024;

    /// Uploads of these lengths at once, in parts of this size, each of which takes a few turns of the scheduler. The most that
    /// was copied at once, and what is left in the end.
    fn most_copied(lengths: &[u64], part: u64) -> (u64, u64) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let room = Arc::new(Room::default());
        let most = Arc::new(AtomicU64::new(0));
        let uploads = lengths.iter().map(|&length| {
            let (room, most) = (Arc::clone(&room), Arc::clone(&most));
            async move {
                let upload = room.begin(length);
                tokio::task::yield_now().await;
                let mut parts = tokio::task::JoinSet::new();
                let mut left = length;
                while left > 0 {
                    let bytes = left.min(part);
                    let piece = upload.piece(bytes).await;
                    most.fetch_max(room.counts().copied, Ordering::Relaxed);
                    parts.spawn(async move {
                        tokio::task::yield_now().await;
                        drop(piece);
                    });
                    left -= bytes;
                }
                while parts.join_next().await.is_some() {}
            }
        });
        runtime.block_on(futures::future::join_all(uploads));
        let counts = room.counts();
        (most.load(Ordering::Relaxed), counts.copied + counts.to_store)
    }

    #[test]
    fn a_large_upload_fills_the_room_and_a_small_one_a_quarter_of_itself() {
        assert_eq!(most_copied(&[160 * MIB], 8 * MIB).0, 32 * MIB);
        assert_eq!(most_copied(&[1_600 * MIB, 1_600 * MIB], 8 * MIB).0, 32 * MIB);
        assert_eq!(most_copied(&[40 * MIB], 8 * MIB).0, 8 * MIB);
        assert_eq!(most_copied(&[40 * MIB, 40 * MIB], 8 * MIB).0, 16 * MIB);
        assert_eq!(
            most_copied(&[600 * 1024 * MIB], 40 * MIB).0,
            40 * MIB,
            "one piece always goes"
        );
    }

    proptest! {
        // All of them end, nothing stays taken, and the bound holds with every mixture of lengths.
        #[test]
        fn copies_stay_within_a_quarter(lengths in prop::collection::vec(1_u64..400, 1..12), part in 1_u64..20) {
            let (most, left) = most_copied(&lengths, part);
            prop_assert_eq!(left, 0);
            prop_assert!(most <= (lengths.iter().sum::<u64>() / UPLOAD_COPIES_DIVISOR).max(part), "{}", most);
        }
    }
}
