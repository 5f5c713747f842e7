//! Reading on in a file that grows: whole lines, each of them once.
//!
//! What was read is told from what is there now by the file's identity, its length, and its last bytes before the place
//! that reading goes on from. A file that was replaced, cut, or cut and written again is another one, and read anew.
//!
//! Deliberately absent: holding a file open. Its name says what is meant, and whoever takes a run over gives it to a copy.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::Instant;

/// Bytes read at once.
const CHUNK_BYTES: usize = 256 * 1024;
/// A longer line is passed over; a trace line of 256 domains is far shorter.
const LINE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes before the place that reading goes on from by which a file is known again.
const MARK_BYTES: usize = 64;

/// A place in a file of lines.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    /// Device and inode of what was read.
    identity: Option<(u64, u64)>,
    /// Where the next line begins.
    offset: u64,
    /// The bytes before it.
    mark: Vec<u8>,
    /// The line under way is too long.
    is_skipping: bool,
    length: u64,
}

/// A file that is there, as far as it was at one moment.
#[derive(Debug)]
pub struct Opened(Option<File>);

impl Tail {
    /// At the beginning of the file at `path`, whether or not it is there yet.
    #[must_use]
    pub const fn new(path: PathBuf) -> Self {
        Self {
            path,
            identity: None,
            offset: 0,
            mark: Vec::new(),
            is_skipping: false,
            length: 0,
        }
    }

    /// Bytes read, and bytes that can be: a line under way is none of them once all before it are read.
    #[must_use]
    pub const fn progress(&self) -> (u64, u64) {
        (self.offset, self.length)
    }

    /// Looks at the file, and says whether it is another one than was read so far: then all that came from it is void, and
    /// [`Self::read`] begins at its beginning.
    ///
    /// # Errors
    /// If it cannot be looked at. One that is not there has nothing new.
    pub fn open(&mut self) -> std::io::Result<(Opened, bool)> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok((Opened(None), false)),
            Err(e) => return Err(e),
        };
        let found = file.metadata()?;
        let identity = Some((found.dev(), found.ino()));
        let is_other = self.identity.is_some() && (self.identity != identity || !self.is_same(&file, found.len()));
        if is_other || self.identity.is_none() {
            self.begin(identity, found.len());
        }
        self.length = found.len();
        Ok((Opened(Some(file)), is_other))
    }

    /// To the beginning of the same file: what came from it is to be had again.
    pub fn restart(&mut self) {
        self.begin(self.identity, self.length);
    }

    /// Whether what was read still stands in the file.
    fn is_same(&self, file: &File, length: u64) -> bool {
        let mut before = vec![0; self.mark.len()];
        length >= self.offset
            && file
                .read_exact_at(&mut before, self.offset - self.mark.len() as u64)
                .is_ok_and(|()| before == self.mark)
    }

    fn begin(&mut self, identity: Option<(u64, u64)>, length: u64) {
        (self.identity, self.length) = (identity, length);
        (self.offset, self.is_skipping) = (0, false);
        self.mark.clear();
    }

    /// Hands on every further whole line, without its end, until there is none or it is past `until`; so it goes on in any
    /// case, if by one line.
    ///
    /// # Errors
    /// If the file cannot be read; what was handed on stays so.
    pub fn read(&mut self, opened: &Opened, until: Instant, hear: &mut dyn FnMut(&[u8])) -> std::io::Result<()> {
        let Some(file) = &opened.0 else { return Ok(()) };
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let count = file.read_at(&mut chunk, self.offset)?;
            let bytes = &chunk[..count];
            match bytes.iter().rposition(|&byte| byte == b'\n') {
                Some(end) => {
                    let lines = bytes[..end].split(|&byte| byte == b'\n');
                    // Of a line that is too long, the rest stands first.
                    lines.skip(usize::from(self.is_skipping)).for_each(&mut *hear);
                    self.is_skipping = false;
                    self.go_on(&chunk[..=end]);
                }
                None if count < chunk.len() => {
                    self.length = self.offset;
                    return Ok(());
                }
                None if count < LINE_BYTES_MAX => {
                    chunk.resize((2 * count).min(LINE_BYTES_MAX), 0);
                    continue;
                }
                None => {
                    self.is_skipping = true;
                    self.go_on(&chunk[..count]);
                }
            }
            if Instant::now() >= until {
                return Ok(());
            }
        }
    }

    /// Behind these bytes.
    fn go_on(&mut self, bytes: &[u8]) {
        self.offset += bytes.len() as u64;
        self.mark
            .extend_from_slice(&bytes[bytes.len().saturating_sub(MARK_BYTES)..]);
        let too_many = self.mark.len().saturating_sub(MARK_BYTES);
        self.mark.drain(..too_many);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::path::Path;
    use std::time::Duration;

    fn in_an_hour() -> Instant {
        Instant::now() + Duration::from_secs(3_600)
    }

    /// The lines that are new, and whether the file is another one.
    fn look(tail: &mut Tail) -> (Vec<String>, bool) {
        let (opened, is_other) = tail.open().expect("a file or none");
        let mut lines = Vec::new();
        let mut hear = |line: &[u8]| lines.push(String::from_utf8_lossy(line).into_owned());
        tail.read(&opened, in_an_hour(), &mut hear).expect("a readable file");
        (lines, is_other)
    }

    fn append(path: &Path, text: &str) {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        file.expect("a file").write_all(text.as_bytes()).expect("written");
    }

    fn lines(of: &[&str], is_other: bool) -> (Vec<String>, bool) {
        (of.iter().map(|line| (*line).to_owned()).collect(), is_other)
    }

    #[test]
    fn whole_lines_are_handed_on_once() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("lines");
        let mut tail = Tail::new(path.clone());
        assert_eq!(look(&mut tail), lines(&[], false), "not there yet");
        append(&path, "a\nb\nhal");
        assert_eq!(look(&mut tail), lines(&["a", "b"], false));
        assert_eq!(look(&mut tail), lines(&[], false));
        assert_eq!(tail.progress(), (4, 4), "no more can be read");
        append(&path, "f\n");
        assert_eq!(look(&mut tail), lines(&["half"], false));
        assert_eq!(tail.progress(), (9, 9));
    }

    #[test]
    fn a_file_that_was_cut_or_replaced_is_read_anew() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("lines");
        append(&path, "a\nb\n");
        let mut tail = Tail::new(path.clone());
        assert_eq!(look(&mut tail), lines(&["a", "b"], false));
        std::fs::write(&path, "a\n").expect("written");
        assert_eq!(look(&mut tail), lines(&["a"], true), "shorter");
        std::fs::write(&path, "c\nd\n").expect("written");
        assert_eq!(look(&mut tail), lines(&["c", "d"], true), "cut, and longer by now");
        let copy = dir.path().join("copy");
        std::fs::write(&copy, "c\nd\ne\n").expect("written");
        std::fs::rename(&copy, &path).expect("renamed");
        assert_eq!(look(&mut tail), lines(&["c", "d", "e"], true), "another file");
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(look(&mut tail), lines(&[], false), "what was read stays");
        append(&path, "f\n");
        assert_eq!(look(&mut tail), lines(&["f"], true), "the next one");
    }

    /// The end of a line that was not whole may be cut off: nothing of it was handed on.
    #[test]
    fn a_torn_line_that_is_cut_off_changes_nothing() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("lines");
        append(&path, "a\ntorn");
        let mut tail = Tail::new(path.clone());
        assert_eq!(look(&mut tail), lines(&["a"], false));
        let file = std::fs::OpenOptions::new().write(true).open(&path).expect("a file");
        file.set_len(2).expect("cut");
        append(&path, "whole\n");
        assert_eq!(look(&mut tail), lines(&["whole"], false));
    }

    #[test]
    fn lines_longer_than_a_chunk_are_whole_and_absurd_ones_are_passed_over() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("lines");
        let (long, absurd) = ("x".repeat(3 * CHUNK_BYTES), "y".repeat(2 * LINE_BYTES_MAX + 7));
        append(&path, &format!("a\n{long}\n{absurd}\nb\nc"));
        let (found, _) = look(&mut Tail::new(path));
        assert_eq!(found, ["a", long.as_str(), "b"]);
    }

    #[test]
    fn past_its_time_it_stops_and_goes_on_later() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("lines");
        let count = 40_000;
        append(&path, &"0123456789abcdef\n".repeat(count));
        let mut tail = Tail::new(path);
        let (mut heard, mut looks) = (0, 0);
        while heard < count {
            let (opened, _) = tail.open().expect("a file");
            let before = heard;
            tail.read(&opened, Instant::now(), &mut |_: &[u8]| heard += 1)
                .expect("a readable file");
            assert!(heard > before, "it goes on in any case");
            looks += 1;
        }
        assert!(heard == count && looks > 1, "{heard} lines in {looks} looks");
    }
}
