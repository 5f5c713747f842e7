//! What ranks inherit: the controller's environment, but for what `TARAZED_RANK_` says otherwise.
//!
//! `TARAZED_RANK_NAME=value` is `NAME=value` for ranks, and no value is no variable. So ranks get credentials of their own for
//! the store, which may write and not delete, and need not be given the controller's.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use tarazed_domain::WorkerId;

const ACCESS_KEY: &str = "AWS_ACCESS_KEY_ID";
const SECRET_KEY: &str = "AWS_SECRET_ACCESS_KEY";
const PROFILE: &str = "AWS_PROFILE";
const SESSION_TOKEN: &str = "AWS_SESSION_TOKEN";
const PREFIX: &[u8] = b"TARAZED_RANK_";

/// What lets NCCL connect a worker with others on the same GPU, for tests: up to 2.29 it tells hosts apart by `NCCL_HOSTID` and
/// refuses one GPU twice on one host; from 2.30 it can be asked. Small kernels, so that those of all ranks run at once. From
/// NCCL's sources and documentation, never tried.
pub(super) fn sharing_gpus(worker: WorkerId) -> [(&'static str, String); 6] {
    [
        ("NCCL_HOSTID", format!("tarazed-worker-{}", worker.0)),
        ("NCCL_NET", "Socket".to_owned()),
        ("NCCL_SOCKET_IFNAME", "lo".to_owned()),
        ("NCCL_NVLS_ENABLE", "0".to_owned()),
        ("NCCL_MAX_CTAS", "2".to_owned()),
        ("NCCL_MULTI_RANK_GPU_ENABLE", "1".to_owned()),
    ]
}

/// Changes to an inherited environment; no value removes a variable.
pub(super) fn changes(inherited: impl Iterator<Item = (OsString, OsString)>) -> Vec<(OsString, Option<OsString>)> {
    let mut changes = Vec::new();
    let (mut has_key, mut has_token, mut has_profile) = (false, false, false);
    for (name, value) in inherited {
        let Some(theirs) = name.as_bytes().strip_prefix(PREFIX).filter(|theirs| !theirs.is_empty()) else {
            continue;
        };
        let theirs = OsString::from_vec(theirs.to_vec());
        has_key |= theirs == ACCESS_KEY;
        has_token |= theirs == SESSION_TOKEN;
        let value = Some(value).filter(|value| value != OsStr::new(""));
        has_profile |= theirs == PROFILE && value.is_some();
        changes.extend([(theirs, value), (name, None)]);
    }
    if has_profile && !has_key {
        // Keys of the environment come before a profile's.
        changes.extend([ACCESS_KEY, SECRET_KEY].map(|name| (name.into(), None)));
    }
    if (has_key || has_profile) && !has_token {
        // The controller's belongs to its own key.
        changes.push((SESSION_TOKEN.into(), None));
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn workers_that_share_a_gpu_look_like_different_hosts() {
        let [one, two] = [1, 2].map(|worker| sharing_gpus(WorkerId(worker)));
        assert_ne!(one[0], two[0]);
        assert_eq!(one[0].0, "NCCL_HOSTID");
        assert_eq!(one[1..], two[1..]);
    }

    #[test]
    fn ranks_get_what_is_meant_for_them_and_nothing_else_of_it() {
        let inherited = [
            ("AWS_ACCESS_KEY_ID", "all"),
            ("AWS_SESSION_TOKEN", "all"),
            ("PATH", "/bin"),
            ("TARAZED_RANK_", "odd"),
            ("TARAZED_RANK_AWS_ACCESS_KEY_ID", "few"),
            ("TARAZED_RANK_LANG", "C"),
            ("TARAZED_RANK_PAGER", ""),
            ("PAGER", "more"),
        ];
        let mut theirs: BTreeMap<OsString, OsString> = inherited
            .iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        for (name, value) in changes(theirs.clone().into_iter()) {
            match value {
                Some(value) => theirs.insert(name, value),
                None => theirs.remove(&name),
            };
        }
        let expected = [
            ("AWS_ACCESS_KEY_ID", "few"),
            ("LANG", "C"),
            ("PATH", "/bin"),
            ("TARAZED_RANK_", "odd"),
        ];
        let expected = expected.iter().map(|(name, value)| (name.into(), value.into()));
        assert_eq!(theirs, expected.collect());
    }

    #[test]
    fn a_profile_for_ranks_is_not_overruled_by_the_controllers_keys() {
        let inherited = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"].map(|name| (name, "all"));
        let inherited = inherited.into_iter().chain([("TARAZED_RANK_AWS_PROFILE", "ranks")]);
        let mut theirs: BTreeMap<OsString, OsString> =
            inherited.map(|(name, value)| (name.into(), value.into())).collect();
        for (name, value) in changes(theirs.clone().into_iter()) {
            match value {
                Some(value) => theirs.insert(name, value),
                None => theirs.remove(&name),
            };
        }
        assert_eq!(theirs, BTreeMap::from([("AWS_PROFILE".into(), "ranks".into())]));
    }
}
