//! `tarazed export RUN_OR_STORE[@STEP] --to DIR`: a checkpoint as a Hugging Face folder (docs/FORMATS.md).
//!
//! Weights go from the store to their files one optimizer shard at a time, each after its hash was right (CKPT-4), so the
//! largest shard and not the model must fit into memory. The folder appears by one rename, when all of it is on the disk.

use crate::exit::{Exit, Failure, is_of_the_place};
use crate::hugging_face::weights::{INDEX_FILE, WeightsFile, Writer, index, plan, total_bytes};
use crate::hugging_face::{self, Dtype};
use crate::output::print;
use crate::plan::render;
use crate::source::{Opened, Source};
use futures::StreamExt;
use serde_json::Value;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Error, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use tarazed_corpus::TOKENIZER_FILE;

/// Files of an export that say what its weights are.
const JSON_FILES: [&str; 3] = ["config.json", "generation_config.json", "tokenizer_config.json"];

/// Options of `tarazed export`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Folder to make; one that is there must be empty.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// What weights are written as; bf16 rounds to the nearest, ties to even.
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// Weights in one file at most; what is more goes into several, with an index.
    #[arg(long, value_name = "BYTES", default_value_t = 5_000_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    shard_bytes: u64,
}

/// Runs the command.
///
/// # Errors
/// Refused for a folder that holds something, for what names no checkpoint, or another run's config; halted where a disk is full
/// or the checkpoint is damaged; else by what the store says.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    check_target(&args.to)?;
    let runtime = super::runtime()?;
    let opened = runtime.block_on(args.source.open())?;
    let tokens = opened.tokenizer.vocabulary();
    let files = plan(&opened.layout, tokens, args.dtype, args.shard_bytes);
    let folder = Partial::begin(&args.to)?;
    runtime.block_on(write_weights(&opened, &files, args.dtype, &folder.path))?;
    write_rest(&opened, &files, args.dtype, &folder.path)?;
    folder.publish(&args.to)?;
    print(&told(args, &opened, &files))?;
    Ok(Exit::Done)
}

async fn write_weights(opened: &Opened, files: &[WeightsFile], dtype: Dtype, folder: &Path) -> Result<(), Failure> {
    let mut writer = Writer::new(folder, files, dtype, opened.manifest.step.0);
    let mut parts = std::pin::pin!(opened.store.read_weights(&opened.manifest));
    while let Some(part) = parts.next().await {
        let part = match part {
            Ok(part) => part,
            Err(error) => return Err(opened.unread(error).await),
        };
        writer
            .push(part.first_element as usize, &part.values)
            .map_err(|error| cannot_write(&error.path, &error.source))?;
    }
    writer.finish();
    Ok(())
}

fn write_rest(opened: &Opened, files: &[WeightsFile], dtype: Dtype, folder: &Path) -> Result<(), Failure> {
    let Opened { config, tokenizer, .. } = opened;
    let [config_file, generation_file, words_file] = JSON_FILES;
    let pretty = |value: &Value| format!("{value:#}\n").into_bytes();
    let mut rest = vec![
        (
            config_file,
            pretty(&hugging_face::config(&config.model, tokenizer, dtype)),
        ),
        (generation_file, pretty(&hugging_face::generation_config(tokenizer))),
        (TOKENIZER_FILE, opened.tokenizer_json.clone()),
        (
            words_file,
            pretty(&hugging_face::tokenizer_config(&config.model, tokenizer)),
        ),
    ];
    if files.len() > 1 {
        rest.push((INDEX_FILE, pretty(&index(files, dtype))));
    }
    for (name, bytes) in rest {
        let path = folder.join(name);
        File::create_new(&path)
            .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
            .map_err(|e| cannot_write(&path, &e))?;
    }
    Ok(())
}

fn told(args: &Args, opened: &Opened, files: &[WeightsFile]) -> String {
    let mut text = format!(
        "{}: the checkpoint of step {}, {} of {} in {} {}\n",
        args.to.display(),
        opened.manifest.step,
        render::bytes(total_bytes(files, args.dtype)),
        args.dtype.torch(),
        files.len(),
        if files.len() == 1 { "file" } else { "files" }
    );
    let padding = opened.config.model.vocabulary - opened.tokenizer.vocabulary();
    if padding > 0 {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "left out: {padding} rows of embedding and head, each, behind the tokenizer's last token"
        );
    }
    text
}

/// Refuses to write over anything, before hours of reading; the rename sees to it once more.
fn check_target(to: &Path) -> Result<(), Failure> {
    let is_free = match std::fs::symlink_metadata(to) {
        Err(e) if e.kind() == ErrorKind::NotFound => true,
        Err(e) => return Err(cannot_write(to, &e)),
        Ok(there) if there.is_dir() => {
            let mut entries = std::fs::read_dir(to).map_err(|e| cannot_write(to, &e))?;
            entries.next().is_none()
        }
        Ok(_) => false,
    };
    if is_free { Ok(()) } else { Err(taken(to)) }
}

fn taken(to: &Path) -> Failure {
    let remedy = "nothing is written over: move it away, or name another folder by --to";
    Failure::refused(to.display(), "is there already", remedy)
}

/// A place that does not take a file is refused as long as it is that place; what a disk or a network does may pass.
fn cannot_write(path: &Path, error: &Error) -> Failure {
    let cause = "cannot be written";
    if is_of_the_place(error) {
        let remedy = "name a folder by --to in one that is there and that this user may write";
        return Failure::refused(path.display(), format!("{cause} ({error})"), remedy);
    }
    let remedy = "free space there, or name another folder by --to; nothing was exported";
    Failure::io(path.display(), error, cause, remedy)
}

/// Removes what exports to the same folder have left that were killed. Whatever is not surely one's stays, and so does what cannot
/// be removed: it is in nobody's way.
fn remove_leftovers(parent: &Path, start: &str) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(start));
        let pid = number.and_then(|number| number.parse::<i32>().ok().filter(|pid| pid.to_string() == number));
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_folder && pid.is_some_and(is_over) && is_left(&entry.path()) {
            // One that goes meanwhile is removed by another export.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Whether no process has this number; or this one has, which has only begun.
fn is_over(pid: i32) -> bool {
    let is_own = u32::try_from(pid) == Ok(std::process::id());
    let is_gone = |pid| rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH);
    is_own || (pid > 0 && rustix::process::Pid::from_raw(pid).is_some_and(is_gone))
}

/// Whether a folder holds nothing but what an export writes, and no process holds it: on another host, or in another container, the
/// number of a living one may be that of none here.
fn is_left(folder: &Path) -> bool {
    let is_written = |name: &str| {
        let is_weights = name.starts_with("model") && name.ends_with(".safetensors");
        is_weights || name == INDEX_FILE || name == TOKENIZER_FILE || JSON_FILES.contains(&name)
    };
    let Ok(mut entries) = std::fs::read_dir(folder) else {
        return false;
    };
    let is_own = |entry: std::fs::DirEntry| {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        is_file && entry.file_name().to_str().is_some_and(is_written)
    };
    entries.all(|entry| entry.is_ok_and(is_own)) && File::open(folder).is_ok_and(|folder| folder.try_lock().is_ok())
}

/// A folder beside the one to be made, under another name until it is whole. One that is dropped before goes with all in it.
struct Partial {
    path: PathBuf,
    /// Where both names stand.
    parent: PathBuf,
    /// Held as long as this process writes there, where the file system knows locks.
    _lock: Option<File>,
}

impl Partial {
    fn begin(to: &Path) -> Result<Self, Failure> {
        let name = to.file_name().ok_or_else(|| {
            let cause = "is no name that a folder can get";
            Failure::refused(format!("--to {}", to.display()), cause, "name the folder to make")
        })?;
        let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new(".")).to_owned();
        let start = format!(".{}.partial-", name.display());
        remove_leftovers(&parent, &start);
        let path = parent.join(format!("{start}{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|e| cannot_write(&path, &e))?;
        let lock = File::open(&path).ok().filter(|folder| folder.try_lock().is_ok());
        Ok(Self {
            path,
            parent,
            _lock: lock,
        })
    }

    /// Gives the folder its name. An empty folder of that name is replaced; anything else stays.
    fn publish(self, to: &Path) -> Result<(), Failure> {
        let sync = |folder: &Path| File::open(folder)?.sync_all();
        sync(&self.path).map_err(|e| cannot_write(&self.path, &e))?;
        std::fs::rename(&self.path, to).map_err(|e| match e.kind() {
            ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::NotADirectory => taken(to),
            _ => cannot_write(to, &e),
        })?;
        sync(&self.parent).map_err(|e| {
            let remedy =
                "the folder is there and may not outlive a power cut: look at the disk, or export to another one";
            Failure::io(self.parent.display(), &e, "cannot be made durable", remedy)
        })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After the rename there is nothing of this name; what cannot be removed is no export.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let base = tempfile::tempdir().expect("a temporary folder");
        let to = base.path().join("out");
        let fill = || {
            let partial = Partial::begin(&to).expect("a folder beside it");
            std::fs::write(partial.path.join("config.json"), "{}").expect("written");
            partial
        };
        drop(fill());
        assert_eq!(std::fs::read_dir(base.path()).expect("a folder").count(), 0);
        std::fs::create_dir(&to).expect("an empty folder");
        check_target(&to).expect("an empty folder may be filled");
        fill().publish(&to).expect("published");
        assert!(to.join("config.json").is_file());
        assert_eq!(std::fs::read_dir(base.path()).expect("a folder").count(), 1);
        // Somebody else was first.
        let refused = fill().publish(&to).expect_err("taken");
        assert_eq!(refused.exit, Exit::Refused, "{refused}");
        assert_eq!(check_target(&to).expect_err("taken").exit, Exit::Refused);
        assert_eq!(std::fs::read_dir(base.path()).expect("a folder").count(), 1);
    }

    #[test]
    fn what_a_folder_cannot_be_is_refused() {
        let base = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(base.path().join("file"), "").expect("a file");
        for to in ["file", "file/x", "nowhere/x", ".."] {
            let to = base.path().join(to);
            let refused = check_target(&to).and_then(|()| Partial::begin(&to).map(drop));
            assert_eq!(refused.expect_err("refused").exit, Exit::Refused, "{}", to.display());
        }
        assert_eq!(std::fs::read_dir(base.path()).expect("a folder").count(), 1);
    }

    #[test]
    fn a_full_disk_halts() {
        let full = cannot_write(Path::new("out"), &Error::from_raw_os_error(28));
        assert_eq!(full.exit, Exit::Halted, "{full}");
    }

    /// The number of a process that is no more.
    fn ended() -> u32 {
        let mut process = std::process::Command::new("true").spawn().expect("a process");
        process.wait().expect("it ends");
        process.id()
    }

    /// What exports to the same folder have left goes, and nothing that only looks like it: what a living process writes, another
    /// folder's, what is no export's, what a process holds that has no number here.
    #[test]
    fn what_a_killed_export_left_is_removed_and_nothing_else() {
        let base = tempfile::tempdir().expect("a temporary folder");
        let make = |name: &str, file: &str| {
            let folder = base.path().join(name);
            std::fs::create_dir(&folder).expect("a folder");
            std::fs::write(folder.join(file), "x").expect("written");
            folder
        };
        let own = std::process::id();
        for (pid, file) in [
            (ended(), "config.json"),
            (ended(), "model-00001-of-00002.safetensors"),
            (ended(), INDEX_FILE),
            (own, "model.safetensors"),
        ] {
            make(&format!(".out.partial-{pid}"), file);
        }
        std::fs::create_dir(base.path().join(format!(".out.partial-{}", ended()))).expect("an empty folder");

        let mut stay = vec![
            make(".out.partial-1", "config.json"),
            make(&format!(".out.partial-{}", ended()), "notes.txt"),
            make(&format!(".out.partial-0{}", ended()), "config.json"),
            make(&format!(".out.partial--{}", ended()), "config.json"),
            make(&format!(".out.partial-{}x", ended()), "config.json"),
            make(&format!(".other.partial-{}", ended()), "config.json"),
            make(&format!("out.partial-{}", ended()), "config.json"),
        ];
        let file = base.path().join(format!(".out.partial-{}", ended()));
        std::fs::write(&file, "x").expect("written");
        let deeper = make(&format!(".out.partial-{}", ended()), "config.json");
        std::fs::create_dir(deeper.join("model.safetensors")).expect("a folder");
        let held = make(&format!(".out.partial-{}", ended()), "config.json");
        let lock = File::open(&held).expect("a folder");
        lock.try_lock().expect("free");
        stay.extend([file, deeper, held]);

        let partial = Partial::begin(&base.path().join("out")).expect("a folder beside it");
        // Not even one's own that is under way.
        remove_leftovers(base.path(), ".out.partial-");
        stay.push(partial.path.clone());
        let mut left: Vec<PathBuf> = std::fs::read_dir(base.path())
            .expect("a folder")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        left.sort();
        stay.sort();
        assert_eq!(left, stay);
    }
}
