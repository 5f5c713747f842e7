//! The whole store over HTTP, against a small S3 server in this process: real requests, signatures and retries.
//!
//! Credentials and endpoint reach the store by its environment, so each case runs in a child process of this test.
#![cfg(feature = "s3")]
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod server;

use common::{checkpoint, life, restore, writer};
use server::{Mischief, Server};
use std::process::Command;
use std::time::{Duration, Instant};
use tarazed_domain::Generation;
use tarazed_store::limits::REQUEST_RETRIES_MAX;
use tarazed_store::{CheckpointStore, Depth, Select, StoreError};

const CASE: &str = "TARAZED_TEST_CASE";
const KEY_ID: &str = "AKIDFORTESTSONLY";
const SECRET: &str = "correct-horse-battery-staple";
const SECRET_BASE64: &str = "Y29ycmVjdC1ob3JzZS1iYXR0ZXJ5LXN0YXBsZQ==";
/// How often a verification asks for an object that it gets no answer for.
const VERIFICATION_TRIES: usize = 4;
/// Nobody listens at that port.
const CLOSED: &str = "http://127.0.0.1:9";

/// Runs `case` in a child process whose only credentials are the given ones.
fn run(case: &str, environment: &[(&str, &str)]) {
    let started = Instant::now();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["child", "--exact", "--ignored", "--nocapture"]);
    let foreign = |name: &str| {
        let clouds = ["AWS_", "GOOGLE_", "AZURE_"];
        clouds.iter().any(|cloud| name.starts_with(cloud)) || name.to_ascii_lowercase().contains("proxy")
    };
    for (name, _) in std::env::vars().filter(|(name, _)| foreign(name)) {
        child.env_remove(name);
    }
    let output = child
        .env(CASE, case)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success() && text.contains("1 passed"), "{case}: {text}");
    for secret in [SECRET, SECRET_BASE64] {
        assert!(!text.contains(secret), "a secret was printed: {text}");
    }
    let bound = Duration::from_millis(tarazed_store::limits::OPERATION_TIMEOUT_MS);
    assert!(started.elapsed() < bound, "{case}: bounded in time");
}

fn with_credentials(case: &str, endpoint: &str) {
    let environment = [
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", KEY_ID),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
    ];
    run(case, &environment);
}

#[test]
fn a_run_on_s3() {
    let server = Server::start(KEY_ID, Mischief::None);
    with_credentials("run", &server.endpoint());
    assert!(server.multipart_uploads() > 0, "large shards go up in parts");
}

// CKPT-2: the server carries a create out, answers 503 or not at all; the client's own retry then meets its own record.
#[test]
fn commits_whose_answers_are_lost() {
    for mischief in [
        Mischief::AnswersCreates503Once,
        Mischief::DropsCreatesAnswersOnce,
        Mischief::Conflicts409Once,
    ] {
        let server = Server::start(KEY_ID, mischief);
        with_credentials("run", &server.endpoint());
        assert!(server.mischief_done() > 2, "{mischief:?}");
    }
}

/// Answers of a server that is asked for too much, or is ill, as many as the client asks again after: nobody sees them.
#[test]
fn refusals_within_the_retries_are_not_seen() {
    std::thread::scope(|scope| {
        for (status, times) in [(429, 2), (500, REQUEST_RETRIES_MAX), (503, REQUEST_RETRIES_MAX)] {
            scope.spawn(move || {
                let server = Server::start(KEY_ID, Mischief::Fails { status, times });
                with_credentials("run", &server.endpoint());
                // Lists, deletes, and writes, reads and look-ups of records, manifests, shards and probes.
                assert!(
                    server.mischief_done() >= 10 * times,
                    "{status}: {}",
                    server.mischief_done()
                );
            });
        }
    });
}

/// One answer more, and the caller is told to try again; that nothing was half done shows where it does (CKPT-2).
#[test]
fn refusals_beyond_the_retries_are_told_with_the_servers_answer() {
    let times = REQUEST_RETRIES_MAX + 1;
    std::thread::scope(|scope| {
        for (case, status) in [("beyond 429", 429), ("beyond 500", 500), ("beyond 503", 503)] {
            scope.spawn(move || {
                let server = Server::start(KEY_ID, Mischief::Fails { status, times });
                with_credentials(case, &server.endpoint());
                // The listing; the first record's creation, and the read that was to settle what became of it.
                assert_eq!(server.mischief_done(), 3 * times, "{case}");
            });
        }
    });
}

async fn beyond(status: &str) {
    let store = CheckpointStore::open("s3://checkpoints/run", writer(1)).await.unwrap();
    let again = |error: StoreError| {
        let message = error.to_string();
        assert!(
            matches!(error, StoreError::Retry { .. }) && message.contains(status) && message.contains("SlowDown"),
            "{message}"
        );
    };
    again(store.newest_valid(None).await.unwrap_err());
    assert!(store.newest_valid(None).await.unwrap().is_none());
    again(store.claim(Generation(0)).await.unwrap_err());
    let fence = store.claim(Generation(0)).await.unwrap();
    assert_eq!((fence.sequence, fence.generation), (0, Generation(1)));
}

// CKPT-4: a body that breaks off is asked for again from where it broke off; where it never comes whole, that is the network's
// doing and no reason to go back to an older checkpoint.
#[test]
fn bodies_that_break_off_are_completed_or_tried_again() {
    let of = "/00000000000000000020/";
    let server = Server::start(KEY_ID, Mischief::ClosesEarly { of, times: 1 });
    with_credentials("breaks off once", &server.endpoint());
    assert_eq!(server.mischief_done(), 4, "a manifest, three shards");
    let server = Server::start(KEY_ID, Mischief::ClosesEarly { of, times: usize::MAX });
    with_credentials("breaks off always", &server.endpoint());
    assert_eq!(
        server.mischief_done(),
        (1 + VERIFICATION_TRIES) * (REQUEST_RETRIES_MAX + 1),
        "a restore, and the tries of a verification, of which the manifest is the first read"
    );
}

async fn two_checkpoints() -> CheckpointStore {
    let location = "s3://checkpoints/run";
    let store = CheckpointStore::open(location, writer(1)).await.unwrap();
    let fence = store.claim(Generation(0)).await.unwrap();
    for step in [10, 20] {
        checkpoint(&store, &fence, step).await;
    }
    CheckpointStore::open(location, writer(2)).await.unwrap()
}

async fn breaks_off_always() {
    let reader = two_checkpoints().await;
    let restored = restore(&reader).await.unwrap_err();
    let report = reader.verify(Select::All, Depth::Full).await.unwrap();
    let [newest, older] = report.checkpoints.as_slice() else {
        panic!("{report:?}");
    };
    let [verified] = newest.unread.as_slice() else {
        panic!("{report:?}");
    };
    for error in [&restored, verified] {
        let read = |key: &str| key.starts_with("manifests/00000000000000000020/");
        assert!(matches!(error, StoreError::Retry { key, .. } if read(key)), "{error}");
    }
    assert!(newest.problems.is_empty() && !report.is_clean(), "{report:?}");
    assert!(older.problems.is_empty() && older.unread.is_empty(), "{report:?}");
}

// CKPT-4: an answer that is whole in itself and too short is as good as a damaged object: it is named, and the older checkpoint
// serves.
#[test]
fn answers_that_are_too_short_are_found_out() {
    for (case, of) in [
        ("short shard", "/shards/00000000000000000020/"),
        ("short manifest", "/manifests/00000000000000000020/"),
        ("short record", "/commits/00000000000000000002.jsonl"),
    ] {
        let server = Server::start(KEY_ID, Mischief::AnswersShort { of });
        with_credentials(case, &server.endpoint());
        assert!(server.mischief_done() > 0, "{case}");
    }
}

async fn short(key: &str, why: &str) {
    let reader = two_checkpoints().await;
    let report = reader.verify(Select::All, Depth::Full).await.unwrap();
    let mut problems = report.chain_problems.clone();
    problems.extend(report.checkpoints.iter().flat_map(|verdict| verdict.problems.clone()));
    assert!(!problems.is_empty(), "{report:?}");
    assert!(
        problems
            .iter()
            .all(|problem| problem.starts_with(key) && problem.contains(why)),
        "{report:?}"
    );
    assert_eq!(restore(&reader).await.unwrap(), Some(10));
}

// Not tried on the real services: that their addresses open with credentials of the environment, that a request where nothing
// answers ends in an error, and that neither the error nor what is printed of the store repeats a credential ([`run`] looks).
#[cfg(feature = "gcs")]
#[test]
fn a_bucket_of_google_that_does_not_answer() {
    let environment = [("GOOGLE_BASE_URL", CLOSED), ("GOOGLE_BEARER_TOKEN", SECRET)];
    run("gs", &environment);
    let quoted = format!("\"{SECRET}\"");
    run(
        "gs with a key that is none",
        &[("GOOGLE_SERVICE_ACCOUNT_KEY", quoted.as_str())],
    );
}

#[cfg(feature = "azure")]
#[test]
fn a_container_of_azure_that_does_not_answer() {
    let account = [
        ("AZURE_STORAGE_ACCOUNT_NAME", "anybody"),
        ("AZURE_STORAGE_ENDPOINT", CLOSED),
        ("AZURE_ALLOW_HTTP", "true"),
    ];
    // A key in base64, a bearer token, and a signature that is part of each request's address.
    let signature = format!("sv=2025-01-05&sig={SECRET}");
    for (name, secret) in [
        ("AZURE_STORAGE_ACCOUNT_KEY", SECRET_BASE64),
        ("AZURE_STORAGE_TOKEN", SECRET),
        ("AZURE_STORAGE_SAS_TOKEN", signature.as_str()),
    ] {
        run("az", &[&account[..], &[(name, secret)]].concat());
    }
    let broken = [&account[..], &[("AZURE_STORAGE_ACCOUNT_KEY", SECRET)]].concat();
    run("az with a key that is none", &broken);
}

#[cfg(any(feature = "gcs", feature = "azure"))]
async fn does_not_answer(location: &str) {
    let store = CheckpointStore::open(location, writer(1)).await.unwrap();
    assert_eq!(store.location(), location);
    let began = Instant::now();
    let calls = [
        store.self_test().await.unwrap_err(),
        store.newest_valid(None).await.unwrap_err(),
        store.claim(Generation(0)).await.unwrap_err(),
    ];
    // A closed port refuses at once; what takes time are the pauses between tries.
    let pauses = REQUEST_RETRIES_MAX as u64 * tarazed_store::limits::BACKOFF_MS.1;
    assert!(
        began.elapsed() < 3 * Duration::from_millis(pauses),
        "{:?}",
        began.elapsed()
    );
    for error in calls {
        assert!(matches!(error, StoreError::Retry { .. }), "{error:?}");
        println!("{error} {error:?}");
    }
    println!("{store:?}");
}

#[cfg(any(feature = "gcs", feature = "azure"))]
async fn does_not_open(location: &str, reason: &str) {
    let error = CheckpointStore::open(location, writer(1)).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Reconfigure { .. }) && error.to_string().contains(reason),
        "{error:?}"
    );
    println!("{error} {error:?}");
}

#[test]
fn a_server_that_ignores_conditions_is_refused() {
    let server = Server::start(KEY_ID, Mischief::IgnoresConditions);
    with_credentials("ignores conditions", &server.endpoint());
}

#[test]
fn a_missing_bucket_and_wrong_credentials_are_told_apart() {
    let server = Server::start(KEY_ID, Mischief::None);
    with_credentials("no bucket", &server.endpoint());
    let server = Server::start("SOMEBODYELSE", Mischief::None);
    with_credentials("wrong credentials", &server.endpoint());
}

#[test]
fn no_credentials_and_no_server_are_reported_in_bounded_time() {
    run(
        "no credentials",
        &[
            ("AWS_METADATA_ENDPOINT", CLOSED),
            ("AWS_ENDPOINT_URL", CLOSED),
            ("AWS_ALLOW_HTTP", "true"),
        ],
    );
    with_credentials("no server", CLOSED);
}

#[test]
#[ignore = "started by the other tests, in a process with its own environment"]
fn child() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        match case.as_str() {
            "run" => life("s3://checkpoints/some/run").await,
            "ignores conditions" => refused("s3://checkpoints/run", "ignores conditional writes").await,
            "no bucket" => refused("s3://elsewhere/run", "create the bucket").await,
            "wrong credentials" => refused("s3://checkpoints/run", "check the credentials").await,
            "no credentials" => refused("s3://checkpoints/run", "no credentials in the environment").await,
            "no server" => {
                let store = CheckpointStore::open("s3://checkpoints/run", writer(1)).await.unwrap();
                let error = store.self_test().await.unwrap_err();
                assert!(matches!(error, StoreError::Retry { .. }), "{error}");
            }
            "beyond 429" => beyond("429 Too Many Requests").await,
            "beyond 500" => beyond("500 Internal Server Error").await,
            "beyond 503" => beyond("503 Service Unavailable").await,
            "breaks off once" => {
                let reader = two_checkpoints().await;
                assert_eq!(restore(&reader).await.unwrap(), Some(20));
                assert!(reader.verify(Select::All, Depth::Full).await.unwrap().is_clean());
            }
            "breaks off always" => breaks_off_always().await,
            "short shard" => {
                short(
                    "shards/00000000000000000020/",
                    "it changed its length while it was read",
                )
                .await
            }
            "short manifest" => short("manifests/00000000000000000020/", "bytes instead of").await,
            "short record" => short("commits/00000000000000000002.jsonl", "it is cut short").await,
            #[cfg(feature = "gcs")]
            "gs" => does_not_answer("gs://bucket/x").await,
            #[cfg(feature = "gcs")]
            "gs with a key that is none" => does_not_open("gs://bucket/x", "check the store's variables").await,
            #[cfg(feature = "azure")]
            "az" => does_not_answer("az://container/x").await,
            #[cfg(feature = "azure")]
            "az with a key that is none" => does_not_open("az://container/x", "check the store's variables").await,
            other => panic!("no case {other}"),
        }
    });
}

async fn refused(location: &str, reason: &str) {
    let store = CheckpointStore::open(location, writer(1)).await.unwrap();
    let error = store.self_test().await.unwrap_err();
    assert!(matches!(error, StoreError::Reconfigure { .. }), "{error:?}");
    assert!(
        error.to_string().contains(reason) && error.to_string().contains(location),
        "{error}"
    );
}
