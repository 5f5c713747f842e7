//! `tarazed watch` where standard output is no terminal: plain blocks, and an end that scripts can rely on.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// A run of 120 steps out of 280 steps, as its files tell, the last line of each cut.
fn run_in(folder: &Path) {
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).expect("written");
    write(
        "config.toml",
        "[run]\nname = \"tiny\"\nseed = 7\nsteps = 280\n\
        [model]\nlayers = 1\nhidden = 16\nffn = 16\nheads = 2\nkv_heads = 1\ncontext = 16\nvocabulary = 300\ninit_std = 0.02\n\
        [batch]\nlanes = 2\nsequences_per_lane = 1\nmicro_batch_sequences = 1\n\
        [optimizer]\nlearning_rate = 1e-3\nschedule = { kind = \"constant\", warmup_steps = 2 }\nblock_elements = 1024\n\
        [data]\nheld_out_fraction = 0.1\n\
        [[data.domains]]\nname = \"web\"\npath = \"web.jsonl\"\nlanguage = \"en\"\nweight = 1.0\n\
        [cluster]\nranks = 1\n",
    );
    write(
        "trace.jsonl",
        "{\"step\":120,\"lr\":0.001,\"mixture\":{\"书籍\":0.75,\"web\":0.25},\"domains\":{}}\n{\"step\":121,\"l",
    );
    write(
        "metrics.jsonl",
        "{\"step\":119,\"time_unix_ms\":1000,\"loss_metrics/global_avg_loss\":5.5}\n\
         {\"step\":120,\"time_unix_ms\":2000,\"loss_metrics/global_avg_loss\":5.25,\"tokens_per_s\":2048.0}\n{\"st",
    );
    write(
        "events.jsonl",
        "{\"kind\":\"rank_lost\",\"time_unix_ms\":1500,\"worker\":1,\"incarnation\":0,\"cause\":\"killed by signal 9\"}\n{",
    );
}

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tarazed"));
    command.arg("watch").args(args).current_dir(folder);
    command
}

fn tarazed(folder: &Path, args: &[&str]) -> Output {
    command(folder, args).output().expect("the program runs")
}

#[test]
fn a_run_that_has_ended_is_one_block_and_an_ordinary_end() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    run_in(folder.path());
    let output = tarazed(folder.path(), &["--run-dir", "."]);
    let (text, errors) = (
        String::from_utf8(output.stdout).expect("text"),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert_eq!(output.status.code(), Some(0), "{text}{errors}");
    assert!(errors.is_empty(), "{errors}");
    assert!(!text.contains('\x1b'), "{text:?}");
    for part in [
        "tiny  .\nended at step 120 of 280: `tarazed train` with the same config and folder goes on\n",
        "\nstep 120 of 280  loss 5.2500  norm -  lr 1.00e-3  2.0k tok/s",
        "\nloss of steps 119 to 120\n",
        "书籍    75.0%",
        "rank_lost",
        "worker 1: killed by signal 9",
    ] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
}

/// Kills it where a test fails.
struct Watch(Child);

impl Drop for Watch {
    /// An error means that it has ended.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Block after block while a killed controller may have a successor, until a signal, which is no failure.
#[test]
fn a_run_that_may_go_on_is_watched_until_somebody_leaves() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    run_in(folder.path());
    // What a controller removes when it ends in order.
    std::fs::write(folder.path().join("controller.json"), "{}").expect("written");
    let child = command(folder.path(), &["--run-dir", ".", "--interval-ms", "100"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let mut watch = Watch(child);
    let lines = BufReader::new(watch.0.stdout.take().expect("its output")).lines();
    let mut lines = lines.map(|line| line.expect("text"));
    for _ in 0..3 {
        let told = lines.any(|line| line.starts_with("the controller is gone"));
        assert!(told, "it ended");
    }
    let pid = rustix::process::Pid::from_child(&watch.0);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("sent");
    lines.by_ref().for_each(drop);
    let status = watch.0.wait().expect("its end");
    let mut errors = String::new();
    let mut stderr = watch.0.stderr.take().expect("its messages");
    stderr.read_to_string(&mut errors).expect("text");
    assert_eq!(status.code(), Some(0), "{errors}");
    assert!(errors.is_empty(), "{errors}");
}

/// It prints for ever, so unlike others it must notice.
#[test]
fn a_reader_that_goes_away_ends_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    run_in(folder.path());
    std::fs::write(folder.path().join("controller.json"), "{}").expect("written");
    let child = command(folder.path(), &["--run-dir", ".", "--interval-ms", "100"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let mut watch = Watch(child);
    drop(watch.0.stdout.take());
    assert_eq!(watch.0.wait().expect("its end").code(), Some(0));
}

#[test]
fn a_folder_without_a_run_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (args, part) in [
        (
            &["--run-dir", "nowhere"][..],
            "--run-dir nowhere: holds no run (no config.toml); give the folder that `tarazed train` printed",
        ),
        (
            &[],
            "runs: holds no run folder; start a run, or name its folder with --run-dir",
        ),
    ] {
        let output = tarazed(folder.path(), args);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(
            message.starts_with("tarazed: refused: ") && message.contains(part),
            "{message}"
        );
        assert!(output.stdout.is_empty());
    }
    assert_eq!(tarazed(folder.path(), &["--interval-ms", "1"]).status.code(), Some(2));
}
