//! Objects as files: `BUCKET/KEY`, with unfinished uploads in `.uploads/`.
//!
//! - A body is received into a temporary file without any lock, so a client that stands still holds up nobody.
//! - Then, under the one lock, the condition is checked and the file renamed into place: a conditional write is atomic.
//! - An object's version is its file's modification time, which is made unique under that lock. Its ETag says so, and needs
//!   no second file that could disagree.

use futures::{Stream, StreamExt};
use s3s::dto::{ETag, ETagCondition};
use s3s::{S3Error, S3ErrorCode, S3Result, s3_error};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::AsyncWriteExt;

/// No bucket is called so: their names begin with a letter or a digit.
const UPLOADS: &str = ".uploads";
const LOCK: &str = ".lock";
const TEMPORARY: &str = "temporary-";
/// In the folder of an upload: the bucket and the key that it is for.
const TARGET: &str = "target";
/// S3's smallest part, the last one excepted.
const PART_BYTES_MIN: u64 = 5 * 1024 * 1024;
const UPLOAD_ID_BYTES: usize = 16;

/// What a write asks of the object that is there.
#[derive(Default)]
pub(crate) struct Conditions {
    pub(crate) if_match: Option<ETagCondition>,
    pub(crate) if_none_match: Option<ETagCondition>,
}

/// An object's length and when it was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Version {
    pub(crate) bytes: u64,
    pub(crate) modified: SystemTime,
}

impl Version {
    fn of(path: &Path) -> io::Result<Option<Self>> {
        match fs::metadata(path) {
            Ok(found) if found.is_file() => Self::from_metadata(&found).map(Some),
            Ok(_) => Ok(None),
            Err(error) if is_absence(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn from_metadata(found: &fs::Metadata) -> io::Result<Self> {
        Ok(Self {
            bytes: found.len(),
            modified: found.modified()?,
        })
    }

    /// With a dash in it: clients take one without for an MD5 of the content.
    pub(crate) fn etag(&self) -> ETag {
        let since = self.modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        ETag::Strong(format!("{:032x}-{}", since.as_nanos(), self.bytes))
    }
}

/// A file that goes away where it is not renamed.
pub(crate) struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Not there any more once it is renamed.
        let _ = fs::remove_file(&self.0);
    }
}

/// The folder that is served.
#[derive(Debug)]
pub(crate) struct Folder {
    root: PathBuf,
    /// When the newest object was written; held while objects change or are listed.
    newest: Mutex<SystemTime>,
    temporaries: AtomicU64,
    /// Its lock says that this process serves the folder.
    _lock: File,
}

fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// What a client hears of a file system's refusal.
fn refusal(error: io::Error) -> S3Error {
    match error.kind() {
        ErrorKind::InvalidFilename => s3_error!(error, KeyTooLongError),
        ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::AlreadyExists => {
            let mut refusal = s3_error!(
                InvalidRequest,
                "one key is the folder of another: both cannot be objects here"
            );
            refusal.set_source(error.into());
            refusal
        }
        _ => S3Error::internal_error(error),
    }
}

impl Folder {
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root.join(UPLOADS))?;
        let root = root.canonicalize()?;
        let lock = File::create(root.join(LOCK))?;
        lock.try_lock().map_err(|error| {
            let cause = format!("{}: served by another process? {error}", root.display());
            io::Error::new(ErrorKind::ResourceBusy, cause)
        })?;
        for entry in fs::read_dir(root.join(UPLOADS))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self {
            root,
            newest: Mutex::new(UNIX_EPOCH),
            temporaries: AtomicU64::new(0),
            _lock: lock,
        })
    }

    fn lock(&self) -> MutexGuard<'_, SystemTime> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn create_bucket(&self, name: &str) -> io::Result<()> {
        if s3s::path::check_bucket_name(name) {
            return fs::create_dir_all(self.root.join(name));
        }
        let cause = format!("'{name}' is not a name for a bucket: 3 to 63 lower-case letters, digits, '-' and '.'");
        Err(io::Error::new(ErrorKind::InvalidInput, cause))
    }

    pub(crate) fn buckets(&self) -> S3Result<Vec<(String, SystemTime)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(refusal)? {
            let entry = entry.map_err(refusal)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let metadata = entry.metadata().map_err(refusal)?;
            if metadata.is_dir() && s3s::path::check_bucket_name(&name) {
                found.push((name, metadata.modified().map_err(refusal)?));
            }
        }
        found.sort();
        Ok(found)
    }

    /// A bucket that must be there. Its name was checked by `s3s` where it came by HTTP.
    pub(crate) fn bucket(&self, name: &str) -> S3Result<PathBuf> {
        let path = self.root.join(name);
        if s3s::path::check_bucket_name(name) && path.is_dir() {
            return Ok(path);
        }
        Err(s3_error!(NoSuchBucket))
    }

    fn object(&self, bucket: &str, key: &str) -> S3Result<PathBuf> {
        let bucket = self.bucket(bucket)?;
        if !is_plain(key) {
            let cause = "keys with empty parts, '.' or '..' are not served here";
            return Err(s3_error!(InvalidArgument, "{cause}"));
        }
        Ok(bucket.join(key))
    }

    fn temporary(&self) -> Temporary {
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        Temporary(self.root.join(UPLOADS).join(format!("{TEMPORARY}{number}")))
    }

    /// Takes in a body whole.
    pub(crate) async fn receive<E>(
        &self,
        mut body: impl Stream<Item = Result<bytes::Bytes, E>> + Unpin,
    ) -> S3Result<Temporary>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let temporary = self.temporary();
        let mut file = tokio::fs::File::create(&temporary.0).await.map_err(refusal)?;
        while let Some(chunk) = body.next().await {
            // Cut short, or another body than the signed one.
            let chunk = chunk.map_err(|error| S3Error::with_source(S3ErrorCode::IncompleteBody, error.into()))?;
            file.write_all(&chunk).await.map_err(refusal)?;
        }
        file.flush().await.map_err(refusal)?;
        Ok(temporary)
    }

    /// Makes what was received the object, if the conditions hold.
    pub(crate) fn place(
        &self,
        body: &Temporary,
        bucket: &str,
        key: &str,
        conditions: &Conditions,
    ) -> S3Result<Version> {
        let path = self.object(bucket, key)?;
        let mut newest = self.lock();
        check(Version::of(&path).map_err(refusal)?, conditions)?;
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(refusal)?;
        }
        stamp(&mut newest, body).map_err(refusal)?;
        fs::rename(&body.0, &path).map_err(refusal)?;
        Version::of(&path).map_err(refusal)?.ok_or_else(|| s3_error!(NoSuchKey))
    }

    /// Removes an object; one that is not there counts as removed.
    pub(crate) fn remove(&self, bucket: &str, key: &str) -> S3Result<()> {
        let (root, path) = (self.bucket(bucket)?, self.object(bucket, key)?);
        let _newest = self.lock();
        if Version::of(&path).map_err(refusal)?.is_none() {
            return Ok(());
        }
        fs::remove_file(&path).map_err(refusal)?;
        // Folders are no objects: those left empty go, too, up to the first that is not.
        let parents = path.ancestors().skip(1).take_while(|parent| *parent != root);
        let _first_that_stays = parents.map(fs::remove_dir).find(Result::is_err);
        Ok(())
    }

    /// An object's file, and what is in it: later writes replace the file, and do not change this one.
    pub(crate) fn open_object(&self, bucket: &str, key: &str) -> S3Result<(File, Version)> {
        let path = self.object(bucket, key)?;
        let file = File::open(path).map_err(|error| match is_absence(&error) {
            true => s3_error!(error, NoSuchKey),
            false => refusal(error),
        })?;
        let found = file.metadata().map_err(refusal)?;
        if !found.is_file() {
            return Err(s3_error!(NoSuchKey));
        }
        let version = Version::from_metadata(&found).map_err(refusal)?;
        Ok((file, version))
    }

    /// All objects whose keys begin so, in the order of their keys.
    pub(crate) fn list(&self, bucket: &str, prefix: &str) -> S3Result<Vec<(String, Version)>> {
        let root = self.bucket(bucket)?;
        // Only below the folder that the prefix names, where it names one.
        let start = prefix.rsplit_once('/').map_or("", |(folder, _)| folder);
        let start = if is_plain(start) {
            root.join(start)
        } else {
            root.clone()
        };
        let mut found = Vec::new();
        let mut folders = vec![start];
        let _newest = self.lock();
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                Err(error) if is_absence(&error) => continue,
                entries => entries.map_err(refusal)?,
            };
            for entry in entries {
                let path = entry.map_err(refusal)?.path();
                let metadata = fs::symlink_metadata(&path).map_err(refusal)?;
                if metadata.is_dir() {
                    folders.push(path);
                } else if let Some(key) = path.strip_prefix(&root).ok().and_then(Path::to_str)
                    && key.starts_with(prefix)
                {
                    found.push((key.to_owned(), Version::from_metadata(&metadata).map_err(refusal)?));
                }
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    /// Copies an object's bytes for a new one.
    pub(crate) fn duplicate(&self, mut source: File) -> S3Result<Temporary> {
        let temporary = self.temporary();
        let mut file = File::create(&temporary.0).map_err(refusal)?;
        io::copy(&mut source, &mut file).map_err(refusal)?;
        Ok(temporary)
    }

    pub(crate) fn begin_upload(&self, bucket: &str, key: &str) -> S3Result<String> {
        self.object(bucket, key)?;
        let id = crate::random_hex(UPLOAD_ID_BYTES).map_err(refusal)?;
        let folder = self.root.join(UPLOADS).join(&id);
        fs::create_dir(&folder).map_err(refusal)?;
        fs::write(folder.join(TARGET), target(bucket, key)).map_err(refusal)?;
        Ok(id)
    }

    /// The folder of an upload that was begun for this object and has not ended.
    fn upload(&self, id: &str, bucket: &str, key: &str) -> S3Result<PathBuf> {
        self.bucket(bucket)?;
        let folder = self.root.join(UPLOADS).join(id);
        let is_id = id.len() == 2 * UPLOAD_ID_BYTES && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        match fs::read_to_string(folder.join(TARGET)) {
            Ok(text) if is_id && text == target(bucket, key) => Ok(folder),
            _ => Err(s3_error!(NoSuchUpload)),
        }
    }

    pub(crate) fn place_part(
        &self,
        body: &Temporary,
        id: &str,
        bucket: &str,
        key: &str,
        number: i32,
    ) -> S3Result<Version> {
        let path = self.upload(id, bucket, key)?.join(number.to_string());
        let mut newest = self.lock();
        stamp(&mut newest, body).map_err(refusal)?;
        fs::rename(&body.0, &path).map_err(refusal)?;
        Version::of(&path)
            .map_err(refusal)?
            .ok_or_else(|| s3_error!(NoSuchUpload))
    }

    /// The parts of an upload behind each other, if they are the ones that the client means.
    pub(crate) fn join(&self, id: &str, bucket: &str, key: &str, parts: &[(i32, Option<ETag>)]) -> S3Result<Temporary> {
        let folder = self.upload(id, bucket, key)?;
        if parts.is_empty() {
            return Err(s3_error!(InvalidRequest, "no part is named"));
        }
        if parts.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
            return Err(s3_error!(InvalidPartOrder));
        }
        let temporary = self.temporary();
        let mut whole = File::create(&temporary.0).map_err(refusal)?;
        for (index, (number, etag)) in parts.iter().enumerate() {
            let path = folder.join(number.to_string());
            let version = Version::of(&path)
                .map_err(refusal)?
                .ok_or_else(|| s3_error!(InvalidPart))?;
            if etag.as_ref().is_some_and(|etag| !etag.strong_cmp(&version.etag())) {
                return Err(s3_error!(InvalidPart));
            }
            if index + 1 < parts.len() && version.bytes < PART_BYTES_MIN {
                return Err(s3_error!(EntityTooSmall));
            }
            io::copy(&mut File::open(&path).map_err(refusal)?, &mut whole).map_err(refusal)?;
        }
        Ok(temporary)
    }

    pub(crate) fn end_upload(&self, id: &str, bucket: &str, key: &str) -> S3Result<()> {
        fs::remove_dir_all(self.upload(id, bucket, key)?).map_err(refusal)
    }
}

fn target(bucket: &str, key: &str) -> String {
    format!("{bucket}/{key}")
}

/// Whether a key names the same file however its path is read.
fn is_plain(key: &str) -> bool {
    !key.contains('\0') && key.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// A time that no object had before. Under the lock that guards `newest`.
fn stamp(newest: &mut SystemTime, body: &Temporary) -> io::Result<()> {
    *newest = SystemTime::now().max(*newest + Duration::from_nanos(1));
    File::options().write(true).open(&body.0)?.set_modified(*newest)
}

pub(crate) fn check(found: Option<Version>, conditions: &Conditions) -> S3Result<()> {
    let is = |condition: &ETagCondition, version: &Version| match condition {
        ETagCondition::Any => true,
        ETagCondition::ETag(etag) => etag.value() == version.etag().value(),
    };
    match (&conditions.if_match, &found) {
        (Some(_), None) => return Err(s3_error!(NoSuchKey)),
        (Some(condition), Some(version)) if !is(condition, version) => return Err(s3_error!(PreconditionFailed)),
        _ => {}
    }
    match (&conditions.if_none_match, &found) {
        (Some(condition), Some(version)) if is(condition, version) => Err(s3_error!(PreconditionFailed)),
        _ => Ok(()),
    }
}
