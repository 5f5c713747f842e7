//! Named limits of the store, each with its unit in its name. Nothing here decides numbers (DET-1): only how bytes travel.

/// Bytes of one commit record; a larger object under `commits/` is not one.
pub const COMMIT_RECORD_BYTES_MAX: u64 = 64 * 1024;
/// Bytes of one manifest: 65,536 checkpoint shards and a generous decision state fit.
pub const MANIFEST_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// Bytes of the JSON header of one checkpoint shard.
pub const SHARD_HEADER_BYTES_MAX: u64 = 64 * 1024;
/// Objects up to this size go up in one request; larger ones in parts.
pub const SINGLE_PUT_BYTES_MAX: u64 = PART_BYTES;
/// Parts as large as this serve any object that is not so large that it would have too many.
pub const PART_BYTES: u64 = 8 * 1024 * 1024;
/// Parts of one upload; S3 refuses more than 10,000, so parts of a very large object grow instead.
pub const PARTS_MAX: u64 = 9_000;
/// Parts, and objects that go up whole, on their way at once, of all uploads of one process: each has its share of the link
/// within [`REQUEST_TIMEOUT_MS`].
pub const UPLOADS_IN_FLIGHT_MAX: usize = 4;
/// Bytes asked for in one ranged read of a checkpoint shard.
pub const READ_RANGE_BYTES: u64 = 8 * 1024 * 1024;
/// Ranged reads of one object on their way at once.
pub const READS_IN_FLIGHT_MAX: usize = 4;
/// Small objects (records, object heads) asked for at once.
pub const SMALL_REQUESTS_IN_FLIGHT_MAX: usize = 32;
/// Manifests that a collection reads at once.
pub const MANIFESTS_IN_FLIGHT_MAX: usize = 8;
/// Sequence numbers tried by one append before the caller is told to retry.
pub const APPEND_ATTEMPTS_MAX: usize = 16;
/// Reads of one record or manifest before it counts as unreadable, unless two in a row give the same bytes.
pub const RECORD_READS_MAX: usize = 4;
/// Reads of one checkpoint shard whose hash is wrong: the second says whether the first was garbled on its way.
pub const SHARD_READS_MAX: usize = 2;
/// Commits named by one retire record; the next collection goes on from there.
pub const RETIRED_PER_RECORD_MAX: usize = 1_000;
/// Bytes of free text in a record or a pin.
pub const NOTE_BYTES_MAX: usize = 1_000;
/// Rounds of concurrent creates that the self-test runs.
pub const SELF_TEST_ROUNDS: usize = 3;
/// Attempts of one create of the self-test while the store answers that another write is under way.
pub const SELF_TEST_CREATES_MAX: usize = 8;
/// Bytes of a probe of the self-test.
pub const PROBE_BYTES_MAX: u64 = 1024;
/// Writers racing for one key in a round of the self-test.
pub const SELF_TEST_WRITERS: usize = 8;
/// A probe this much older than the newest commit belongs to no self-test under way; a younger one may be that of a
/// controller that is just starting, and is left alone.
pub const SELF_TEST_MS_MAX: u64 = 60 * 60 * 1000;

/// One HTTP request, from connecting to the last byte of its answer. A part of 8 MiB passes at 140 KB/s, four at once on a link
/// that carries 560 KB/s.
pub const REQUEST_TIMEOUT_MS: u64 = 60_000;
/// Connecting to the store.
pub const CONNECT_TIMEOUT_MS: u64 = 5_000;
/// Attempts of one request after the first, on connection errors, 429 and 5xx answers.
pub const REQUEST_RETRIES_MAX: usize = 4;
/// No retry starts later than this after the first attempt of a request. One whose time ran out is made once more.
pub const RETRY_WINDOW_MS: u64 = 75_000;
/// Keys of an AWS profile are read again from its files by a request that comes so much later.
pub const PROFILE_AGE_MS_MAX: u64 = 1_000;
/// First and longest pause between attempts.
pub const BACKOFF_MS: (u64, u64) = (100, 5_000);
/// One operation on one object as a caller sees it, retries included; no call to the store outlives it.
pub const OPERATION_TIMEOUT_MS: u64 = 150_000;

const _: () = {
    assert!(
        SINGLE_PUT_BYTES_MAX >= 5 * 1024 * 1024 && PART_BYTES >= 5 * 1024 * 1024,
        "S3's smallest part"
    );
    assert!(PARTS_MAX <= 10_000, "S3's part limit");
    assert!(
        OPERATION_TIMEOUT_MS > RETRY_WINDOW_MS + REQUEST_TIMEOUT_MS,
        "the last attempt of a request may run to its own time-out"
    );
    assert!(
        RETRY_WINDOW_MS > REQUEST_TIMEOUT_MS + BACKOFF_MS.1,
        "a silent connection costs a request, and not the upload that it is a part of"
    );
    assert!(
        RETIRED_PER_RECORD_MAX as u64 * 21 + 4096 < COMMIT_RECORD_BYTES_MAX,
        "a retire record fits its limit"
    );
    assert!(
        CONNECT_TIMEOUT_MS < REQUEST_TIMEOUT_MS,
        "connecting is part of a request"
    );
};
