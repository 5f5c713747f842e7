//! What a run leaves while it runs: whole lines of its JSON-lines files as they come, and hashes of traces.

use serde_json::Value;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes read at one look at most, so that a look stays short.
const LOOK_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Milliseconds since 1970, as the files of a run have them.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The end of a file that grows.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    at: u64,
    part: Vec<u8>,
}

impl Tail {
    /// From the file's beginning, whether or not it is there yet.
    #[must_use]
    pub const fn of(path: PathBuf) -> Self {
        Self {
            path,
            at: 0,
            part: Vec::new(),
        }
    }

    /// The whole lines that have come since the last look. One that is no JSON (a disk was full in its midst) is left out.
    pub fn look(&mut self) -> Vec<Value> {
        let Ok(mut file) = File::open(&self.path) else {
            return Vec::new();
        };
        if file.metadata().is_ok_and(|found| found.len() < self.at) {
            // Cut: what was there is known, and what comes now is new.
            self.at = file.metadata().map_or(0, |found| found.len());
            self.part.clear();
        }
        let read = file
            .seek(SeekFrom::Start(self.at))
            .and_then(|_| file.take(LOOK_BYTES_MAX).read_to_end(&mut self.part));
        self.at += read.unwrap_or(0) as u64;
        let Some(end) = self.part.iter().rposition(|&byte| byte == b'\n') else {
            return Vec::new();
        };
        let rest = self.part.split_off(end + 1);
        let whole = std::mem::replace(&mut self.part, rest);
        let lines = whole.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }
}

/// Lines and BLAKE3 of a trace.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct TraceHash {
    /// Committed lines.
    pub lines: u64,
    /// BLAKE3 of the file's bytes.
    pub blake3: String,
}

/// Hashes the first `lines` lines of a trace, or all it has where it has fewer.
///
/// # Errors
/// If it cannot be read.
pub fn hash_trace(path: &Path, lines: u64) -> Result<TraceHash, String> {
    let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut count = 0;
    let mut end = 0;
    for (at, byte) in bytes.iter().enumerate() {
        if count == lines {
            break;
        }
        if *byte == b'\n' {
            count += 1;
            end = at + 1;
        }
    }
    Ok(TraceHash {
        lines: count,
        blake3: blake3::hash(&bytes[..end]).to_hex().to_string(),
    })
}

/// The first line in which two traces differ, as both have it.
#[must_use]
pub fn first_difference(left: &Path, right: &Path) -> Option<(usize, String, String)> {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let (left, right) = (read(left), read(right));
    let (mut left, mut right) = (left.lines(), right.lines());
    for line in 1.. {
        let pair = (left.next(), right.next());
        if pair.0.is_none() && pair.1.is_none() {
            return None;
        }
        if pair.0 != pair.1 {
            let text = |side: Option<&str>| side.unwrap_or("(no line)").to_owned();
            return Some((line, text(pair.0), text(pair.1)));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_tail_gives_each_whole_line_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("events.jsonl");
        let mut tail = Tail::of(path.clone());
        assert!(tail.look().is_empty());
        let mut file = File::create(&path).expect("a file");
        file.write_all(b"{\"step\":1}\n{\"st").expect("written");
        assert_eq!(tail.look().len(), 1);
        assert!(tail.look().is_empty());
        file.write_all(b"ep\":2}\nrubbish\n{\"step\":3}\n").expect("written");
        let steps: Vec<_> = tail.look().iter().filter_map(|line| line["step"].as_u64()).collect();
        assert_eq!(steps, [2, 3]);
    }

    #[test]
    fn traces_are_compared_over_the_same_number_of_lines() {
        let folder = tempfile::tempdir().expect("a folder");
        let [short, long] = ["short", "long"].map(|name| folder.path().join(name));
        std::fs::write(&short, "a\nb\n").expect("written");
        std::fs::write(&long, "a\nb\nc\n").expect("written");
        let (left, right) = (hash_trace(&short, 2), hash_trace(&long, 2));
        assert_eq!(left, right);
        assert_ne!(hash_trace(&short, 3), hash_trace(&long, 3));
        let (line, _, right) = first_difference(&short, &long).expect("they differ");
        assert_eq!((line, right.as_str()), (3, "c"));
    }
}
