//! Writing files that are on disk when they say so, and hashing files.

use crate::error::CorpusError;
use crate::manifest::FileManifest;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// A sink that hashes and counts what goes through it.
pub(crate) struct HashingFile {
    file: std::io::BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
    path: std::path::PathBuf,
}

impl HashingFile {
    pub(crate) fn create(path: &Path) -> Result<Self, CorpusError> {
        let file = File::create_new(path).map_err(CorpusError::write(path))?;
        Ok(Self {
            file: std::io::BufWriter::with_capacity(1 << 20, file),
            hasher: blake3::Hasher::new(),
            bytes: 0,
            path: path.to_owned(),
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), CorpusError> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(CorpusError::write(&self.path))
    }

    /// Flushes and syncs; only then is the file's description handed out.
    pub(crate) fn finish(mut self) -> Result<FileManifest, CorpusError> {
        self.file.flush().map_err(CorpusError::write(&self.path))?;
        self.file.get_ref().sync_all().map_err(CorpusError::write(&self.path))?;
        Ok(FileManifest {
            name: file_name(&self.path),
            bytes: self.bytes,
            blake3: self.hasher.finalize().to_hex().to_string(),
        })
    }
}

/// Writes and syncs a whole file.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<FileManifest, CorpusError> {
    let mut file = HashingFile::create(path)?;
    file.write(bytes)?;
    file.finish()
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_folder(path: &Path) -> Result<(), CorpusError> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(CorpusError::write(path))
}

/// Last part of a path, for manifests.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Length and BLAKE3 of a file's content, streamed.
pub(crate) fn hash_file(path: &Path) -> Result<(u64, blake3::Hash), CorpusError> {
    hash_file_telling(path, &mut |_| ())
}

/// As [`hash_file`]; `tell` hears how many bytes were hashed since it last heard.
pub(crate) fn hash_file_telling(path: &Path, tell: &mut dyn FnMut(u64)) -> Result<(u64, blake3::Hash), CorpusError> {
    let mut file = File::open(path).map_err(CorpusError::unreadable(path))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0_u8; 1 << 20];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut buffer).map_err(CorpusError::unreadable(path))?;
        if n == 0 {
            return Ok((bytes, hasher.finalize()));
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
        tell(n as u64);
    }
}

/// Checks a small file of a data set against its description and returns its bytes.
pub(crate) fn read_checked(folder: &Path, described: &FileManifest) -> Result<Vec<u8>, CorpusError> {
    let path = folder.join(&described.name);
    let bytes = std::fs::read(&path).map_err(CorpusError::unreadable(&path))?;
    if bytes.len() as u64 != described.bytes || blake3::hash(&bytes).to_hex().as_str() != described.blake3 {
        return Err(CorpusError::corrupt(
            &path,
            "its length or hash is not what data.json says",
        ));
    }
    Ok(bytes)
}
