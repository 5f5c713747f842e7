//! Where objects lie under the store's root, and what a key says about its object.
//!
//! ```text
//! commits/<sequence>.jsonl                                   the chain; never deleted (CKPT-5)
//! manifests/<step>/<generation>-<BLAKE3>.manifest            named by content: writing one twice is harmless
//! shards/<step>/<generation>-<writer>-<shard>-<upload>.safetensors   one upload, one key: never overwritten by others
//! self-test/…                                                short-lived probes
//! ```
//! Numbers are zero-padded, so that listing order is number order.

use crate::digest::Digest;
use crate::writer::WriterNonce;
use object_store::path::Path;
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};

pub(crate) const COMMITS: &str = "commits";
pub(crate) const MANIFESTS: &str = "manifests";
pub(crate) const SHARDS: &str = "shards";
pub(crate) const SELF_TEST: &str = "self-test";
const RECORD_SUFFIX: &str = ".jsonl";
const MANIFEST_SUFFIX: &str = ".manifest";
const DIGITS: usize = 20;
/// Places of a chain: a record each millisecond fills them in thirty thousand years. Anybody may put an object with a higher
/// number there, and with a bound none makes a sum of places overflow.
pub(crate) const PLACES_MAX: u64 = 1_000_000_000_000_000;

pub(crate) fn record(sequence: u64) -> String {
    format!("{COMMITS}/{sequence:0DIGITS$}{RECORD_SUFFIX}")
}

pub(crate) fn manifest(step: StepsCompleted, generation: Generation, digest: &Digest) -> String {
    format!(
        "{MANIFESTS}/{:0DIGITS$}/{:0DIGITS$}-{digest}{MANIFEST_SUFFIX}",
        step.0, generation.0
    )
}

/// Where the manifests of a step lie.
pub(crate) fn manifests_of(step: StepsCompleted) -> String {
    format!("{MANIFESTS}/{:0DIGITS$}", step.0)
}

/// Whether the key of a manifest names this digest.
pub(crate) fn is_manifest_of(key: &str, digest: &Digest) -> bool {
    let name = key.strip_suffix(MANIFEST_SUFFIX);
    name.and_then(|name| name.strip_suffix(&digest.to_string()))
        .is_some_and(|rest| rest.ends_with('-'))
}

pub(crate) fn shard(
    step: StepsCompleted,
    generation: Generation,
    shard: OptimizerShardIndex,
    writer: WriterNonce,
    upload: u64,
) -> String {
    format!(
        "{SHARDS}/{:0DIGITS$}/{:0DIGITS$}-{writer}-{:06}-{upload:06}.safetensors",
        step.0, generation.0, shard.0
    )
}

/// The sequence number in a record's key, [`PLACES_MAX`] and more included; nothing for any other key.
pub(crate) fn sequence_of(key: &str) -> Option<u64> {
    let name = key
        .strip_prefix(COMMITS)?
        .strip_prefix('/')?
        .strip_suffix(RECORD_SUFFIX)?;
    (name.len() == DIGITS).then(|| name.parse().ok()).flatten()
}

/// The step and generation in the key of a manifest or a checkpoint shard; nothing for any other key.
pub(crate) fn step_and_generation_of(key: &str) -> Option<(StepsCompleted, Generation)> {
    let mut parts = key.split('/');
    let kind = parts.next()?;
    if kind != MANIFESTS && kind != SHARDS {
        return None;
    }
    let step = parts.next()?.parse().ok()?;
    let generation = parts.next()?.split('-').next()?.parse().ok()?;
    parts
        .next()
        .is_none()
        .then_some((StepsCompleted(step), Generation(generation)))
}

/// The key below the store's root, as the object store wants it.
pub(crate) fn full(root: &Path, key: &str) -> Path {
    Path::from_iter(root.parts().chain(Path::from(key).parts()))
}

/// The key relative to the store's root.
pub(crate) fn relative(root: &Path, location: &Path) -> Option<String> {
    let parts: Vec<String> = location
        .prefix_match(root)?
        .map(|part| part.as_ref().to_string())
        .collect();
    (!parts.is_empty()).then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_say_what_they_hold() {
        assert_eq!(sequence_of(&record(7)), Some(7));
        assert_eq!(sequence_of(&record(u64::MAX)), Some(u64::MAX));
        for stray in [
            "commits/7.jsonl",
            "commits/x",
            "manifests/00000000000000000007.jsonl",
            "",
        ] {
            assert_eq!(sequence_of(stray), None, "{stray}");
        }
        let (step, generation) = (StepsCompleted(120), Generation(3));
        let key = shard(step, generation, OptimizerShardIndex(5), WriterNonce([0xab; 16]), 0);
        assert_eq!(step_and_generation_of(&key), Some((step, generation)));
        let key = manifest(step, generation, &Digest::of(b"x"));
        assert_eq!(step_and_generation_of(&key), Some((step, generation)));
        let digest = Digest::of(b"x");
        assert!(is_manifest_of(&key, &digest) && key.starts_with(&format!("{}/", manifests_of(step))));
        assert!(!is_manifest_of(&key, &Digest::of(b"y")) && !is_manifest_of(&format!("{digest}.manifest"), &digest));
        assert_eq!(step_and_generation_of(&record(1)), None);
        let root = Path::from("bucket folder/run");
        assert_eq!(relative(&root, &full(&root, &key)), Some(key));
    }
}
