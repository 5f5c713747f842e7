//! Chunks of token shards whose hash was right, kept for the next sequence that lies in them.
//!
//! A sequence is a small part of a chunk, and sequences come in random order, so a reader that checks what it uses reads and
//! hashes a whole chunk for each: a third of a millisecond on a 2 GHz core, on the feeder's thread, beside the step. Small
//! data sets fit into the cache and are read and hashed once. What is kept decides no number.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Checked chunks of one data set that a process keeps: 32 MiB of chunks of 256 KiB.
pub(crate) const CACHED_CHUNKS_MAX: usize = 128;

/// A shard's name in one cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct ShardKey(u32);

/// Checked chunks of all shards of a data set; the one that came first goes first. Read from any thread.
#[derive(Debug)]
pub(crate) struct ChunkCache {
    chunks_max: usize,
    shards: AtomicU32,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Only ever asked, never walked (DET-1).
    held: HashMap<(ShardKey, usize), Arc<Vec<u8>>>,
    /// The keys of `held`, oldest first.
    order: VecDeque<(ShardKey, usize)>,
}

impl ChunkCache {
    /// An empty cache of at most `chunks_max` chunks.
    pub(crate) fn new(chunks_max: usize) -> Self {
        Self {
            chunks_max,
            shards: AtomicU32::new(0),
            inner: Mutex::default(),
        }
    }

    /// A name for one more shard.
    pub(crate) fn shard(&self) -> ShardKey {
        // Relaxed: only that no two are alike matters.
        ShardKey(self.shards.fetch_add(1, Ordering::Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change leaves both tables whole or merely without a chunk, so another thread's panic does no harm.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, shard: ShardKey, chunk: usize) -> Option<Arc<Vec<u8>>> {
        self.lock().held.get(&(shard, chunk)).cloned()
    }

    /// Keeps a chunk that has been checked.
    pub(crate) fn put(&self, shard: ShardKey, chunk: usize, bytes: &Arc<Vec<u8>>) {
        if self.chunks_max == 0 {
            return;
        }
        let key = (shard, chunk);
        let mut inner = self.lock();
        if inner.held.insert(key, Arc::clone(bytes)).is_some() {
            return; // read by two threads at once, or checked again
        }
        inner.order.push_back(key);
        if inner.order.len() > self.chunks_max
            && let Some(oldest) = inner.order.pop_front()
        {
            inner.held.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_are_kept_than_the_limit_and_the_oldest_goes_first() {
        let cache = ChunkCache::new(3);
        let (a, b) = (cache.shard(), cache.shard());
        let bytes = |value: u8| -> Arc<Vec<u8>> { Arc::new(vec![value]) };
        for (shard, chunk, value) in [(a, 0, 1), (b, 0, 2), (a, 0, 3), (a, 1, 4), (b, 7, 5)] {
            cache.put(shard, chunk, &bytes(value));
            let inner = cache.lock();
            assert!(inner.held.len() <= 3 && inner.held.len() == inner.order.len());
        }
        assert_eq!(cache.get(a, 0), None, "put twice, but first");
        assert_eq!(cache.get(b, 0), Some(bytes(2)));
        assert_eq!(cache.get(a, 1), Some(bytes(4)));
        assert_eq!(cache.get(b, 7), Some(bytes(5)));
        assert_eq!(cache.get(a, 7), None, "another shard's");
    }

    #[test]
    fn a_cache_of_none_keeps_none() {
        let cache = ChunkCache::new(0);
        let shard = cache.shard();
        cache.put(shard, 0, &Arc::new(vec![1]));
        assert_eq!(cache.get(shard, 0), None);
    }
}
