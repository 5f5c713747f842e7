//! The whole store over HTTP, against a small S3 server in this process: real requests, signatures and retries.
//!
//! Credentials and endpoint reach the store by its environment, so each case runs in a child process of this test.
#![cfg(feature = "s3")]
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod server;

use common::{life, writer};
use server::{Mischief, Server};
use std::process::Command;
use std::time::{Duration, Instant};
use tarazed_store::{CheckpointStore, StoreError};

const CASE: &str = "TARAZED_TEST_CASE";
const KEY_ID: &str = "AKIDFORTESTSONLY";
const SECRET: &str = "correct-horse-battery-staple";

/// Runs `case` in a child process whose only credentials are the given ones.
fn run(case: &str, environment: &[(&str, &str)]) {
    let started = Instant::now();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["child", "--exact", "--ignored", "--nocapture"]);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("AWS_") || name.contains("proxy")) {
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
    assert!(!text.contains(SECRET), "a secret was printed: {text}");
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
    let closed = "http://127.0.0.1:9";
    run(
        "no credentials",
        &[
            ("AWS_METADATA_ENDPOINT", closed),
            ("AWS_ENDPOINT_URL", closed),
            ("AWS_ALLOW_HTTP", "true"),
        ],
    );
    with_credentials("no server", closed);
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
