//! Folders of runs: who may use one, what is kept, and what is refused.

use super::*;

fn config(dir: &Path, overrides: &[&str]) -> Config {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/quickstart.toml");
    let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
    let mut config = Config::load(Path::new(path), &overrides).expect("a good config");
    config.set_dir(dir).expect("a good folder");
    config
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// As a run up to its first step leaves them.
fn write_some(folder: &RunFolder, config: &Config) {
    folder.write_config(config).expect("written");
    for name in ["data/0123456789abcdef", "log", "store/commits"] {
        std::fs::create_dir_all(folder.paths.dir().join(name)).expect("a folder");
        std::fs::write(folder.paths.dir().join(name).join("file"), "x").expect("written");
    }
}

/// Exit code 2 says that nothing was written.
#[test]
fn a_new_run_that_is_refused_leaves_nothing() {
    let base = tempfile::tempdir().expect("a temporary folder");
    let (dir, store) = (base.path().join("runs/new"), base.path().join("stores/new"));
    let config = config(&dir, &[&format!("checkpoint.store={}", store.display())]);
    let folder = RunFolder::open(&config, Existing::Fresh).expect("opened");
    write_some(&folder, &config);
    std::fs::create_dir_all(store.join("self-test")).expect("a folder");
    let attempt = folder.attempt();
    drop(folder);
    let refused = RunFolder::open(&config, Existing::ResumeOrBegin).expect_err("still locked");
    assert!(refused.cause.contains("in use"), "{refused}");
    attempt.undo();
    assert_eq!(names(base.path()), [""; 0]);
}

#[test]
fn what_is_not_of_the_attempt_stays() {
    let base = tempfile::tempdir().expect("a temporary folder");
    let config = config(base.path(), &[]);
    std::fs::create_dir(base.path().join("data")).expect("a folder");
    std::fs::write(base.path().join("notes.txt"), "mine").expect("written");
    let folder = RunFolder::open(&config, Existing::ResumeOrBegin).expect("opened");
    write_some(&folder, &config);
    std::fs::write(base.path().join("more.txt"), "mine").expect("written");
    folder.give_up();
    assert_eq!(names(base.path()), ["data", "more.txt", "notes.txt"]);
    let folder = RunFolder::open(&config, Existing::ResumeOrBegin).expect("opened again");
    write_some(&folder, &config);
    std::fs::write(folder.paths.trace(), "a line").expect("written");
    folder.give_up();
    assert!(
        config.run.dir.join("store/commits").exists(),
        "a run that has begun stays"
    );
}

#[test]
fn a_run_that_was_there_stays_when_a_resume_is_refused() {
    let base = tempfile::tempdir().expect("a temporary folder");
    let config = config(&base.path().join("run"), &[]);
    let folder = RunFolder::open(&config, Existing::Fresh).expect("opened");
    write_some(&folder, &config);
    let before = names(&config.run.dir);
    drop(folder);
    RunFolder::open(&config, Existing::Resume)
        .expect("opened again")
        .give_up();
    let mut other = config.clone();
    other.run.seed += 1;
    let refused = RunFolder::open(&other, Existing::Resume).expect_err("refused");
    assert!(refused.cause.contains("differs in: seed"), "{refused}");
    assert_eq!(names(&config.run.dir), before);
}

/// A controller of another run that was asked to take over by mistake must not put a healthy one out of charge.
#[test]
fn a_take_over_that_is_refused_changes_nothing() {
    let base = tempfile::tempdir().expect("a temporary folder");
    let config = config(&base.path().join("run"), &[]);
    let folder = RunFolder::open(&config, Existing::Fresh).expect("opened");
    write_some(&folder, &config);
    let (before, tenure) = (names(&config.run.dir), folder.tenure());
    let mut other = config.clone();
    other.run.seed += 1;
    let refused = RunFolder::open_as(&other, Existing::ResumeOrBegin, Occupied::TakeOver).expect_err("refused");
    assert!(refused.cause.contains("differs in: seed"), "{refused}");
    assert!(tenure.holds() && names(&config.run.dir) == before);
    let next = RunFolder::open_as(&config, Existing::ResumeOrBegin, Occupied::TakeOver).expect("taken over");
    assert!(!tenure.holds() && next.tenure().holds());
}

/// Paths, placement and cadence may change over a resume; checkpoints are cut by the number of shards.
#[test]
fn a_run_goes_on_elsewhere_but_not_with_other_shards() {
    let base = tempfile::tempdir().expect("a temporary folder");
    let dir = base.path().join("run");
    let first = config(&dir, &[]);
    let folder = RunFolder::open(&first, Existing::Fresh).expect("opened");
    folder.write_config(&first).expect("written");
    let text = std::fs::read(folder.paths.config()).expect("a config");
    drop(folder);
    let mut moved = config(&dir, &["cluster.ranks=2", "checkpoint.interval_steps=7"]);
    moved.data.domains[0].path = "/elsewhere/text.jsonl".into();
    RunFolder::open(&moved, Existing::Resume).expect("the same run");
    let back = Config::load(&dir.join("config.toml"), &[]).expect("a good config");
    assert_eq!(back, first, "the run folder's config is the resolved one");
    RunFolder::open(&back, Existing::Resume).expect("the same run");
    let more = config(&dir, &["optimizer.shards=9"]);
    let refused = RunFolder::open(&more, Existing::Resume).expect_err("refused");
    assert!(
        refused.cause.contains("optimizer.shards = 8, not 9") && refused.trouble == Trouble::Unfit,
        "{refused}"
    );
    assert_eq!(std::fs::read(dir.join("config.toml")).expect("a config"), text);
}

/// Processors compute in f32 and CUDA devices in bf16: one run is not continued on the other, whatever `auto` finds now.
#[test]
fn a_run_does_not_go_on_with_another_kind_of_device() {
    let base = tempfile::tempdir().expect("a temporary folder");
    for (began, resumed) in [("cpu", "cuda"), ("cuda", "cpu")] {
        let dir = base.path().join(began);
        let on = |device: &str| config(&dir, &[&format!("cluster.device={device}")]);
        let folder = RunFolder::open(&on(began), Existing::Fresh).expect("opened");
        folder.write_config(&on(began)).expect("written");
        drop(folder);
        let refused = RunFolder::open(&on(resumed), Existing::Resume).expect_err("refused");
        let expected = format!("cluster.device = \"{began}\", not \"{resumed}\"");
        assert!(
            refused.cause.contains(&expected) && refused.trouble == Trouble::Unfit,
            "{refused}"
        );
        assert!(refused.remedy.contains(&format!("\"{began}\"")), "{refused}");
        RunFolder::open(&on(began), Existing::Resume).expect("the same run");
    }
}

#[test]
fn a_full_disk_a_failing_one_and_a_file_in_the_way_are_told_apart() {
    for kind in [
        ErrorKind::StorageFull,
        ErrorKind::QuotaExceeded,
        ErrorKind::FileTooLarge,
    ] {
        let full = FolderError::io(Path::new("x"), &std::io::Error::from(kind));
        assert!(
            full.trouble == Trouble::Full && full.remedy.contains("free space"),
            "{full}"
        );
    }
    let failing = FolderError::io(Path::new("x"), &std::io::Error::from_raw_os_error(5));
    assert_eq!(failing.trouble, Trouble::Failing, "EIO");
    let base = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(base.path().join("file"), "").expect("written");
    let config = config(&base.path().join("file/run"), &[]);
    let refused = RunFolder::open(&config, Existing::Fresh).expect_err("refused");
    assert_eq!(refused.trouble, Trouble::Unfit, "{refused}");
    assert_eq!(names(base.path()), ["file"]);
}

/// A run of a program that knew no notices of rollbacks goes on without, and with one it is another run.
#[test]
fn a_run_that_knew_no_notices_goes_on_without() {
    let base = tempfile::tempdir().expect("a temporary folder");
    let of = |notice: &[&str]| config(base.path(), &[&["policy.spikes=rollback_and_skip"], notice].concat());
    let without = of(&["policy.rollback_notice_steps=0"]);
    let folder = RunFolder::open(&without, Existing::ResumeOrBegin).expect("opened");
    write_some(&folder, &without);
    let path = folder.paths.config();
    drop(folder);
    let text = std::fs::read_to_string(&path).expect("a config");
    let old: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("rollback_notice_steps"))
        .collect();
    assert!(old.len() < text.lines().count());
    std::fs::write(&path, old.join("\n")).expect("written");
    let refused = RunFolder::open(&of(&[]), Existing::ResumeOrBegin).expect_err("another run");
    assert!(refused.cause.contains("differs in: policy"), "{refused}");
    drop(RunFolder::open(&without, Existing::ResumeOrBegin).expect("the same run"));
}

/// A section that only one of two configs has is named like any other.
#[test]
fn what_is_new_in_a_config_is_named() {
    let base = tempfile::tempdir().expect("a temporary folder");
    let plain = config(base.path(), &[]);
    let folder = RunFolder::open(&plain, Existing::ResumeOrBegin).expect("opened");
    write_some(&folder, &plain);
    drop(folder);
    let more = config(base.path(), &["policy.persons=true"]);
    let refused = RunFolder::open(&more, Existing::ResumeOrBegin).expect_err("another run");
    assert!(refused.cause.contains("differs in: policy"), "{refused}");
}
