//! Sorted files: tables of any size in bounded memory. What does not fit is written in sorted runs, which are merged.
//!
//! An entry is three words. Files hold nothing else, so their length says how many there are; who writes one for later keeps
//! its hash.

use crate::error::CorpusError;
use crate::files::HashingFile;
use crate::manifest::FileManifest;
use rayon::prelude::*;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// One row of a table; tables are sorted by all three words.
pub(crate) type Entry = [u64; 3];
pub(crate) const ENTRY_BYTES: u64 = 24;
/// Files merged at once.
const FAN_IN: usize = 64;
/// Read buffer of one file that is merged.
const BUFFER_BYTES: usize = 128 * 1024;

/// Creates a file of the pipeline, in place of one that a killed process left half written.
pub(crate) fn create(path: &Path) -> Result<HashingFile, CorpusError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(CorpusError::write(path)(e)),
        _ => HashingFile::create(path),
    }
}

fn write_entry(file: &mut HashingFile, entry: &Entry) -> Result<(), CorpusError> {
    let mut bytes = [0; ENTRY_BYTES as usize];
    for (out, word) in bytes.chunks_exact_mut(8).zip(entry) {
        out.copy_from_slice(&word.to_le_bytes());
    }
    file.write(&bytes)
}

/// Sorts entries into a file.
pub(crate) fn write_sorted(path: &Path, entries: &mut [Entry]) -> Result<FileManifest, CorpusError> {
    entries.par_sort_unstable();
    let mut file = create(path)?;
    for entry in &*entries {
        write_entry(&mut file, entry)?;
    }
    file.finish()
}

/// Reads a file of entries in its order.
pub(crate) struct EntryReader {
    path: PathBuf,
    file: BufReader<File>,
    left: u64,
}

impl EntryReader {
    /// All entries of a file.
    pub(crate) fn open(path: &Path) -> Result<Self, CorpusError> {
        let length = std::fs::metadata(path).map_err(CorpusError::unreadable(path))?.len();
        Self::open_at(path, 0, length / ENTRY_BYTES)
    }

    /// `count` entries from the one at `first` on.
    pub(crate) fn open_at(path: &Path, first: u64, count: u64) -> Result<Self, CorpusError> {
        let mut file = File::open(path).map_err(CorpusError::unreadable(path))?;
        file.seek(SeekFrom::Start(first * ENTRY_BYTES))
            .map_err(CorpusError::unreadable(path))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufReader::with_capacity(BUFFER_BYTES, file),
            left: count,
        })
    }

    pub(crate) fn next(&mut self) -> Result<Option<Entry>, CorpusError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let mut bytes = [0; ENTRY_BYTES as usize];
        self.file
            .read_exact(&mut bytes)
            .map_err(|e| CorpusError::corrupt(&self.path, format!("cannot be read ({e})")))?;
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at * 8..at * 8 + 8]);
            u64::from_le_bytes(word)
        };
        Ok(Some([word(0), word(1), word(2)]))
    }
}

/// The entries of several sorted files, in order.
pub(crate) struct Merge {
    files: Vec<EntryReader>,
    heap: BinaryHeap<Reverse<(Entry, usize)>>,
}

impl Merge {
    fn open(paths: &[PathBuf]) -> Result<Self, CorpusError> {
        let mut files = paths
            .iter()
            .map(|path| EntryReader::open(path))
            .collect::<Result<Vec<_>, _>>()?;
        let mut heap = BinaryHeap::with_capacity(files.len());
        for (index, file) in files.iter_mut().enumerate() {
            heap.extend(file.next()?.map(|entry| Reverse((entry, index))));
        }
        Ok(Self { files, heap })
    }

    /// The smallest entry that is left.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, CorpusError> {
        let Some(mut top) = self.heap.peek_mut() else {
            return Ok(None);
        };
        let Reverse((entry, index)) = *top;
        match self.files[index].next()? {
            Some(next) => *top = Reverse((next, index)),
            None => drop(std::collections::binary_heap::PeekMut::pop(top)),
        }
        Ok(Some(entry))
    }
}

/// How often [`merge`] reads each entry of so many files, its result's reading included.
pub(crate) const fn readings(mut files: usize) -> u64 {
    let mut readings = 1;
    while files > FAN_IN {
        files = files.div_ceil(FAN_IN);
        readings += 1;
    }
    readings
}

/// Merges any number of sorted files; where there are many, through files in `folder` that go when they have been read. `tell`
/// hears of every entry that goes into such a file.
pub(crate) fn merge(mut paths: Vec<PathBuf>, folder: &Path, tell: &mut dyn FnMut()) -> Result<Merge, CorpusError> {
    let mut made: Vec<PathBuf> = Vec::new();
    let mut round = 0;
    while paths.len() > FAN_IN {
        let mut next = Vec::with_capacity(paths.len().div_ceil(FAN_IN));
        for (index, group) in paths.chunks(FAN_IN).enumerate() {
            let path = folder.join(format!("merge-{round:02}-{index:06}"));
            let (mut merged, mut file) = (Merge::open(group)?, create(&path)?);
            while let Some(entry) = merged.next()? {
                write_entry(&mut file, &entry)?;
                tell();
            }
            file.finish()?;
            next.push(path);
        }
        remove(&made)?;
        made.clone_from(&next);
        paths = next;
        round += 1;
    }
    let merge = Merge::open(&paths)?;
    // The open files stay readable; their names are not needed any more.
    remove(&made)?;
    Ok(merge)
}

fn remove(paths: &[PathBuf]) -> Result<(), CorpusError> {
    paths
        .iter()
        .try_for_each(|path| std::fs::remove_file(path).map_err(CorpusError::write(path)))
}

/// Takes entries in any order, and gives them back sorted.
pub(crate) struct Sorter<'a> {
    folder: &'a Path,
    name: &'static str,
    entries_max: usize,
    entries: Vec<Entry>,
    runs: Vec<PathBuf>,
}

impl<'a> Sorter<'a> {
    /// Keeps `bytes_max` of entries in memory; runs go to `folder`.
    pub(crate) fn new(folder: &'a Path, name: &'static str, bytes_max: u64) -> Self {
        Self {
            folder,
            name,
            entries_max: (bytes_max / ENTRY_BYTES).max(1) as usize,
            entries: Vec::new(),
            runs: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, entry: Entry) -> Result<(), CorpusError> {
        self.entries.push(entry);
        if self.entries.len() >= self.entries_max {
            self.spill()?;
        }
        Ok(())
    }

    fn spill(&mut self) -> Result<(), CorpusError> {
        let path = self.folder.join(format!("{}-{:06}", self.name, self.runs.len()));
        write_sorted(&path, &mut self.entries)?;
        self.runs.push(path);
        self.entries.clear();
        Ok(())
    }

    /// All entries, sorted.
    pub(crate) fn finish(mut self) -> Result<Merge, CorpusError> {
        if !self.entries.is_empty() {
            self.spill()?;
        }
        self.entries = Vec::new();
        let merged = merge(self.runs.clone(), self.folder, &mut || ())?;
        remove(&self.runs)?;
        Ok(merged)
    }
}

/// Writes what comes, in its order, and says how many there were by some number of the entry.
pub(crate) struct EntryWriter {
    file: HashingFile,
}

impl EntryWriter {
    pub(crate) fn create(path: &Path) -> Result<Self, CorpusError> {
        create(path).map(|file| Self { file })
    }

    pub(crate) fn push(&mut self, entry: &Entry) -> Result<(), CorpusError> {
        write_entry(&mut self.file, entry)
    }

    pub(crate) fn finish(self) -> Result<FileManifest, CorpusError> {
        self.file.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(mut merge: Merge) -> Vec<Entry> {
        std::iter::from_fn(|| merge.next().unwrap()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Whatever the memory, what comes out is what came in, sorted; nothing is left in the folder.
        #[test]
        fn entries_come_back_sorted(entries in prop::collection::vec(any::<[u64; 3]>(), 0..300), kept in 1..50_u64) {
            let folder = tempfile::tempdir().unwrap();
            let mut sorter = Sorter::new(folder.path(), "test", kept * ENTRY_BYTES);
            for entry in &entries {
                sorter.push(*entry).unwrap();
            }
            let found = all(sorter.finish().unwrap());
            let mut expected = entries;
            expected.sort_unstable();
            prop_assert_eq!(found, expected);
            prop_assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    /// More runs than are merged at once, twice over.
    #[test]
    fn many_runs_are_merged_in_rounds() {
        let folder = tempfile::tempdir().unwrap();
        let count = (FAN_IN * FAN_IN + 5) as u64;
        let mut sorter = Sorter::new(folder.path(), "test", ENTRY_BYTES);
        (0..count).for_each(|i| sorter.push([i * 7919 % count, i, 0]).unwrap());
        let found = all(sorter.finish().unwrap());
        assert_eq!(found.len() as u64, count);
        assert_eq!((readings(FAN_IN), readings(count as usize)), (1, 3));
        assert!(found.is_sorted() && found.iter().enumerate().all(|(i, entry)| entry[0] == i as u64));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    /// What is told while files are merged, and what is read at the end, are as many as were foretold.
    #[test]
    fn every_reading_is_told() {
        let folder = tempfile::tempdir().unwrap();
        for files in [1, FAN_IN, FAN_IN + 1, 2 * FAN_IN + 3] {
            let paths: Vec<PathBuf> = (0..files)
                .map(|i| folder.path().join(format!("table-{files}-{i}")))
                .collect();
            for (i, path) in (0..).zip(&paths) {
                write_sorted(path, &mut [[i, 0, 0], [i + 1, 0, 0]]).unwrap();
            }
            let mut told = 0;
            let merged = merge(paths, folder.path(), &mut || told += 1).unwrap();
            let read = all(merged).len() as u64;
            assert_eq!(told + read, readings(files) * 2 * files as u64, "{files} files");
        }
    }

    #[test]
    fn a_part_of_a_file_can_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        let mut entries: Vec<Entry> = (0..10).map(|i| [i, 0, 0]).collect();
        write_sorted(&path, &mut entries).unwrap();
        let mut reader = EntryReader::open_at(&path, 3, 2).unwrap();
        assert_eq!(reader.next().unwrap(), Some([3, 0, 0]));
        assert_eq!(reader.next().unwrap(), Some([4, 0, 0]));
        assert_eq!(reader.next().unwrap(), None);
        std::fs::write(&path, [0; 30]).unwrap();
        let mut short = EntryReader::open_at(&path, 0, 2).unwrap();
        assert!(short.next().unwrap().is_some() && short.next().is_err());
    }
}
