//! Opening source files: plain, gzip (`.gz`) or Zstandard (`.zst`), by file ending.

use crate::error::CorpusError;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

const BUFFER_BYTES: usize = 1 << 20;

/// How a file is packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstandard,
}

impl Packing {
    /// By file ending, and the ending of what is inside.
    pub(crate) fn of(path: &Path) -> (Self, Option<&str>) {
        // By the system's own strings: a name need not be UTF-8, and its ending may be all the same.
        fn ending(name: &OsStr) -> Option<&str> {
            Path::new(name).extension().and_then(OsStr::to_str)
        }
        let packing = match ending(path.as_os_str()) {
            Some("gz") => Self::Gzip,
            Some("zst") => Self::Zstandard,
            _ => Self::Plain,
        };
        let inside = match packing {
            Self::Plain => path.file_name(),
            Self::Gzip | Self::Zstandard => path.file_stem(),
        };
        (packing, inside.and_then(ending))
    }
}

/// Counts the bytes that are read from the disk, for progress alone.
struct Counted<'a, R> {
    inner: R,
    read: Option<&'a AtomicU64>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if let Some(read) = self.read {
            // Relaxed: a figure for people.
            read.fetch_add(count as u64, Ordering::Relaxed);
        }
        Ok(count)
    }
}

/// Opens a source, unpacking it on the way. `read` counts bytes of the file.
///
/// # Errors
/// [`CorpusError::Unreadable`]. What is packed wrongly shows when it is read.
pub(crate) fn open<'a>(path: &Path, read: Option<&'a AtomicU64>) -> Result<Box<dyn BufRead + 'a>, CorpusError> {
    let inner = File::open(path).map_err(CorpusError::unreadable(path))?;
    let counted = Counted { inner, read };
    Ok(match Packing::of(path).0 {
        Packing::Plain => Box::new(BufReader::with_capacity(BUFFER_BYTES, counted)),
        Packing::Gzip => {
            let packed = BufReader::with_capacity(BUFFER_BYTES, counted);
            Box::new(BufReader::with_capacity(
                BUFFER_BYTES,
                flate2::bufread::MultiGzDecoder::new(packed),
            ))
        }
        Packing::Zstandard => {
            let unpacked = zstd::stream::read::Decoder::new(counted).map_err(CorpusError::unreadable(path))?;
            Box::new(BufReader::with_capacity(BUFFER_BYTES, unpacked))
        }
    })
}

/// Whether a file holds JSON lines, by its ending.
pub(crate) fn is_json_lines(path: &Path) -> bool {
    matches!(Packing::of(path).1, Some("jsonl" | "ndjson"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn endings_say_what_is_inside() {
        for (name, packing, inside) in [
            ("a.jsonl", Packing::Plain, Some("jsonl")),
            ("dir.gz/a.jsonl.gz", Packing::Gzip, Some("jsonl")),
            ("a.txt.zst", Packing::Zstandard, Some("txt")),
            ("a.gz", Packing::Gzip, None),
            ("README", Packing::Plain, None),
        ] {
            assert_eq!(Packing::of(Path::new(name)), (packing, inside), "{name}");
        }
        // Names that are not UTF-8, as Linux allows them.
        for (name, packing, inside) in [
            (&b"caf\xe9.gz"[..], Packing::Gzip, None),
            (b"\xff.zst", Packing::Zstandard, None),
            (b"dir/caf\xe9.jsonl.gz", Packing::Gzip, Some("jsonl")),
            (b"caf\xe9.parquet", Packing::Plain, Some("parquet")),
            (b"a.\xff.gz", Packing::Gzip, None),
        ] {
            let path = Path::new(OsStr::from_bytes(name));
            assert_eq!(Packing::of(path), (packing, inside), "{}", path.display());
        }
        assert!(is_json_lines(Path::new("x/a.ndjson.zst")) && !is_json_lines(Path::new("a.json.gz")));
    }

    #[test]
    fn packed_files_read_as_what_is_inside() {
        let folder = tempfile::tempdir().unwrap();
        let text = "one\ntwo\n".repeat(1000);
        let gzip = |text: &str| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut encoder, text.as_bytes()).unwrap();
            encoder.finish().unwrap()
        };
        let zst = zstd::bulk::compress(text.as_bytes(), 1).unwrap();
        // Several members in one file are one text, as the tools have it.
        let two = [gzip(&text[..4]), gzip(&text[4..])].concat();
        for (name, bytes) in [
            ("a.txt", text.clone().into_bytes()),
            ("b.txt.gz", two),
            ("c.txt.zst", zst),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, &bytes).unwrap();
            let (mut found, read) = (String::new(), AtomicU64::new(0));
            open(&path, Some(&read)).unwrap().read_to_string(&mut found).unwrap();
            assert!(found == text, "{name}");
            assert_eq!(read.into_inner(), bytes.len() as u64);
            std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            let cut = open(&path, None).unwrap().read_to_string(&mut String::new());
            assert_eq!(cut.is_err(), name != "a.txt", "a packed file that was cut is no text");
        }
    }
}
