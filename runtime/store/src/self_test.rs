//! Is this store fit for checkpoints? Found out before the first step, not at the first failure.
//!
//! Commits rest on three promises: create-if-absent has one winner, a read after a write sees it, and so does a listing.
//! A store that ignores the condition would let two controllers commit at once; it is refused with the reason.

use crate::error::StoreError;
use crate::keys;
use crate::limits::{PROBE_BYTES_MAX, RECORD_READS_MAX, SELF_TEST_CREATES_MAX, SELF_TEST_ROUNDS, SELF_TEST_WRITERS};
use crate::store::{CheckpointStore, Failure};
use crate::writer::WriterNonce;
use bytes::Bytes;
use object_store::PutMode;

impl CheckpointStore {
    /// Writes, races, reads, lists and deletes small probes under `self-test/`.
    ///
    /// # Errors
    /// [`StoreError::Reconfigure`] with the reason if the store is unfit or cannot be reached as configured; else by
    /// cause. Bounded in time by [`crate::limits`].
    pub async fn self_test(&self) -> Result<(), StoreError> {
        // No folder of its own: in a folder store it would stay behind empty.
        let prefix = format!("{}/{}", keys::SELF_TEST, WriterNonce::fresh());
        self.probe(&prefix).await?;
        let probes = self.probes(&prefix).await?;
        self.delete_all(&probes).await?;
        if self.probes(&prefix).await?.is_empty() {
            return Ok(());
        }
        Err(self.unfit("deleted objects are still listed"))
    }

    /// The probes there are. After a failure they stay; a collection takes them.
    async fn probes(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let listed = self.list_objects(keys::SELF_TEST).await?;
        Ok(listed
            .into_iter()
            .map(|(key, _)| key)
            .filter(|key| key.starts_with(prefix))
            .collect())
    }

    async fn probe(&self, prefix: &str) -> Result<(), StoreError> {
        let first = format!("{prefix}-create");
        if !self.create(&first, b"first").await? {
            return Err(self.unfit("creating an object that is not there fails as if it were"));
        }
        self.expect(&first, b"first").await?;
        if self.create(&first, b"second").await? {
            return Err(self.unfit("it ignores conditional writes: an object was created twice"));
        }
        self.expect(&first, b"first").await?;
        for round in 0..SELF_TEST_ROUNDS {
            self.race(&format!("{prefix}-race-{round}")).await?;
        }
        let listed = self.probes(prefix).await?.len();
        if listed != SELF_TEST_ROUNDS + 1 {
            return Err(self.unfit(&format!(
                "it lists {listed} of {} objects just written",
                SELF_TEST_ROUNDS + 1
            )));
        }
        Ok(())
    }

    /// Several writers at once for one key: a store that checks first and writes later lets more than one win.
    async fn race(&self, key: &str) -> Result<(), StoreError> {
        let bodies: Vec<String> = (0..SELF_TEST_WRITERS)
            .map(|writer| format!("writer {writer}"))
            .collect();
        let writers = bodies.iter().map(|body| self.create(key, body.as_bytes()));
        let mut winners = Vec::new();
        for (body, won) in bodies.iter().zip(futures::future::join_all(writers).await) {
            if won? {
                winners.push(body);
            }
        }
        match winners.as_slice() {
            [winner] => self.expect(key, winner.as_bytes()).await,
            [] => Err(self.unfit("of several concurrent creates of one object none won")),
            several => {
                let cause = format!(
                    "{} of {SELF_TEST_WRITERS} concurrent creates of one object won",
                    several.len()
                );
                Err(self.unfit(&cause))
            }
        }
    }

    /// Whether the place was free and is now ours; as everywhere, ambiguity is settled by reading back (CKPT-2). "Already
    /// exists" with nothing there is S3's 409 while another write is under way: it is tried again.
    async fn create(&self, key: &str, body: &[u8]) -> Result<bool, StoreError> {
        use object_store::Error as E;
        for _ in 0..SELF_TEST_CREATES_MAX {
            let put = self.put_raw(key, Bytes::copy_from_slice(body).into(), PutMode::Create);
            match put.await {
                Ok(()) => return Ok(true),
                Err(Failure::Store(E::AlreadyExists { .. } | E::Precondition { .. })) => {}
                Err(Failure::Store(E::NotImplemented { .. })) => {
                    return Err(self.unfit("it does not offer conditional writes"));
                }
                Err(failure) => return Err(self.sort("create", key, failure)),
            }
            match self.holds(key, body).await {
                Err(StoreError::NotFound { .. }) => {}
                settled => return settled,
            }
        }
        Ok(false)
    }

    async fn expect(&self, key: &str, body: &[u8]) -> Result<(), StoreError> {
        match self.holds(key, body).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.unfit("it ignores conditional writes: an object that was there has been replaced")),
            Err(StoreError::NotFound { .. }) => Err(self.unfit("an object just written cannot be read")),
            Err(error) => Err(error),
        }
    }

    /// Whether an object has this body. One that was garbled on its way is read again: what lies in the store reads the same
    /// each time, and a good store must not be refused for one flipped bit.
    async fn holds(&self, key: &str, body: &[u8]) -> Result<bool, StoreError> {
        let mut other: Option<Bytes> = None;
        for _ in 0..RECORD_READS_MAX {
            let found = self.get_small(key, PROBE_BYTES_MAX).await?;
            if found.as_ref() == body {
                return Ok(true);
            }
            if other.replace(found.clone()) == Some(found) {
                break;
            }
        }
        Ok(false)
    }

    fn unfit(&self, cause: &str) -> StoreError {
        StoreError::Reconfigure {
            location: self.location().to_string(),
            cause: cause.to_string(),
            remedy: "two controllers could commit at once there; use a store with atomic create-if-absent writes and \
                     strongly consistent reads and listings (S3, or a server that honours If-None-Match)"
                .to_string(),
        }
    }
}
