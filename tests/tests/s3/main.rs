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

/// What other tests find nowhere is found where it is: in a file, whatever its folder, behind a link, and in an object.
#[test]
fn a_planted_secret_is_found() {
    let token = "a-token-of-a-session";
    let place = Place::own().clone_with("AWS_SESSION_TOKEN", token);
    let url = place.url();
    let temporary = || tempfile::tempdir().expect("a temporary folder");
    let (folder, elsewhere) = (temporary(), temporary());
    let (inside, outside) = (folder.path().join("log/old"), elsewhere.path().join("target"));
    std::fs::create_dir_all(&inside).expect("a folder");
    std::fs::write(inside.join("worker-0.log"), "nothing").expect("a file");
    std::fs::write(&outside, format!("behind a link: {}", place.credentials().secret)).expect("a file");
    place.run_at("plant", &url, &["harmless".to_owned()]);
    place.assert_untold(folder.path(), &url, &["said by nobody"]);

    std::fs::write(inside.join("worker-1.log"), format!("\0\0{token}\n")).expect("a file");
    std::os::unix::fs::symlink(&outside, folder.path().join("linked")).expect("a link");
    place.run_at("plant", &url, &["another secret".to_owned()]);
    let told_by = place.told_by(folder.path(), &url, &["another secret"]);
    let found = |end: &&str| told_by.iter().any(|name| name.ends_with(*end));
    let ends = ["linked", "planted", "worker-1.log"];
    assert!(told_by.len() == ends.len() && ends.iter().all(found), "{told_by:?}");
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
