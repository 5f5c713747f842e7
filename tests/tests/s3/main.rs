//! Checkpoints on real S3 servers: the one in `tests/s3` always, and another one where the variables of `tests/ceph/start`
//! are set (`TARAZED_TEST_BUCKET` and those that clients read). Every test runs on each.
//!
//! Servers of the store's own tests misbehave on purpose and look at no signature; these are the ones that people use.
//! Credentials reach the store by its environment, so cases of the store run in a child process of this test.

mod access;
#[path = "../../../runtime/store/tests/common/checkpoints.rs"]
mod checkpoints;
mod place;
mod runs;
mod store;

use place::Place;

/// CKPT-1 to CKPT-6 as far as the store keeps them, with a checkpoint shard that goes up in parts and comes back.
#[test]
fn the_store_lives_there() {
    for place in Place::all() {
        place.run("life");
    }
}

/// CKPT-3: whatever number of controllers write one key, or claim one store, one wins.
#[test]
fn one_of_many_writers_wins() {
    for place in Place::all() {
        place.run("race");
        place.run("claims");
    }
}

/// Listings of several pages, ranges and deletions of many.
#[test]
fn objects_are_listed_read_and_deleted() {
    for place in Place::all() {
        place.run("objects");
    }
}

#[test]
fn wrong_credentials_and_missing_buckets_are_refused() {
    for place in Place::all() {
        place
            .clone_with("AWS_SECRET_ACCESS_KEY", "wrong-horse-battery-staple")
            .run("wrong credentials");
        place
            .clone_with("AWS_ACCESS_KEY_ID", "AKIDNOBODY")
            .run("wrong credentials");
        place.clone_with("AWS_SKIP_SIGNATURE", "true").run("wrong credentials");
        place.in_bucket("tarazed-no-such-bucket").run("no bucket");
    }
}

#[test]
#[ignore = "started by the other tests, in a process with its own environment"]
fn child() {
    if let Some((case, location)) = place::case() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(store::run(&case, &location));
    }
}
