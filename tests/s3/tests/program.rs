//! The program as a person starts it.
#![allow(clippy::unwrap_used)]

use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Ends with the test, also where that fails.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts it, and reads what it says up to the last line.
fn start(folder: &Path, variables: &[(&str, &str)]) -> (Started, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tarazed-s3"))
        .arg("--folder")
        .arg(folder)
        .args(["--bucket", "some-bucket"])
        .env_remove("AWS_ACCESS_KEY_ID")
        .env_remove("AWS_SECRET_ACCESS_KEY")
        .envs(variables.iter().copied())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = child.stdout.take().unwrap();
    let (child, mut said) = (Started(child), String::new());
    for line in BufReader::new(output).lines() {
        said += &line.unwrap();
        said.push('\n');
        if said.ends_with("checkpoint ls s3://some-bucket/quickstart\n") {
            break;
        }
    }
    (child, said)
}

fn exported<'a>(said: &'a str, name: &str) -> &'a str {
    let line = said
        .lines()
        .find_map(|line| line.strip_prefix("export ")?.strip_prefix(name)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("{name} is not said: {said}"))
}

#[test]
fn it_says_how_to_use_it_and_stops_when_told() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("objects");
    let mut secrets = Vec::new();
    for given in [
        &[][..],
        &[("AWS_ACCESS_KEY_ID", "GIVEN"), ("AWS_SECRET_ACCESS_KEY", "hunter2")],
        &[],
    ] {
        let (mut child, said) = start(&folder, given);
        let address = exported(&said, "AWS_ENDPOINT_URL").strip_prefix("http://").unwrap();
        TcpStream::connect(address).unwrap();
        assert_eq!(exported(&said, "AWS_ALLOW_HTTP"), "true");
        secrets.push(exported(&said, "AWS_SECRET_ACCESS_KEY").to_owned());
        assert!(said.contains("checkpoint.store=s3://some-bucket/"), "{said}");
        assert!(folder.join("some-bucket").is_dir());
        kill_process(Pid::from_child(&child.0), Signal::TERM).unwrap();
        assert!(child.0.wait().unwrap().success());
    }
    assert_eq!(secrets[1], "hunter2");
    assert_ne!(secrets[0], secrets[2], "random each time");
}
