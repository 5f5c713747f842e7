//! The store as a verifier needs it: list all, read whole, read piece by piece. It never writes.

use crate::report::Unusable;
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use url::Url;

/// Bytes asked for at once.
const PIECE_BYTES: u64 = 8 * 1024 * 1024;

pub struct Objects {
    store: Arc<dyn ObjectStore>,
    root: Path,
}

impl Objects {
    /// Opens a folder, `file://…` or `s3://bucket/prefix` (credentials and endpoint from the environment).
    pub fn open(location: &str) -> Result<Self, Unusable> {
        let unusable = |why: &dyn std::fmt::Display| Unusable(format!("{location}: {why}"));
        if !location.contains("://") {
            return Self::folder(PathBuf::from(location));
        }
        let url = Url::parse(location).map_err(|why| unusable(&why))?;
        match url.scheme() {
            "file" => Self::folder(url.to_file_path().map_err(|()| unusable(&"no local path"))?),
            "s3" => {
                // The HTTP client asks for the process's default provider; this is the only place that sets one.
                let _already_set = rustls::crypto::ring::default_provider().install_default();
                let bucket = url.host_str().filter(|name| !name.is_empty());
                let builder = object_store::aws::AmazonS3Builder::from_env()
                    .with_bucket_name(bucket.ok_or_else(|| unusable(&"the URL names no bucket"))?);
                Ok(Self {
                    store: Arc::new(builder.build().map_err(|why| unusable(&why))?),
                    root: Path::from_url_path(url.path()).map_err(|why| unusable(&why))?,
                })
            }
            other => Err(unusable(&format!(
                "no store speaks {other}://; give a folder, file:// or s3://"
            ))),
        }
    }

    fn folder(folder: PathBuf) -> Result<Self, Unusable> {
        let store = LocalFileSystem::new_with_prefix(&folder);
        let store = store.map_err(|why| Unusable(format!("{}: {why}", folder.display())))?;
        Ok(Self {
            store: Arc::new(store),
            root: Path::default(),
        })
    }

    /// All objects: key below the root, and length.
    pub async fn list(&self) -> Result<BTreeMap<String, u64>, Unusable> {
        let mut listed = BTreeMap::new();
        let mut stream = self.store.list(Some(&self.root));
        while let Some(meta) = stream
            .try_next()
            .await
            .map_err(|why| Unusable(format!("the store cannot be listed: {why}")))?
        {
            if let Some(parts) = meta.location.prefix_match(&self.root) {
                let key: Vec<String> = parts.map(|part| part.as_ref().to_owned()).collect();
                listed.insert(key.join("/"), meta.size);
            }
        }
        Ok(listed)
    }

    fn path(&self, key: &str) -> Path {
        Path::from_iter(self.root.parts().chain(Path::from(key).parts()))
    }

    /// Reads an object of `length` bytes piece by piece; `false` if it is gone or shorter.
    pub async fn read(&self, key: &str, length: u64, mut piece: impl FnMut(&[u8])) -> Result<bool, Unusable> {
        let path = self.path(key);
        let mut from = 0;
        while from < length {
            let to = length.min(from + PIECE_BYTES);
            match self.store.get_range(&path, from..to).await {
                Ok(bytes) => {
                    piece(&bytes);
                    if (bytes.len() as u64) < to - from {
                        return Ok(false);
                    }
                }
                Err(object_store::Error::NotFound { .. }) => return Ok(false),
                Err(why) => return Err(Unusable(format!("{key} cannot be read: {why}"))),
            }
            from = to;
        }
        Ok(true)
    }

    /// All bytes of a small object of `length` bytes; none if it is gone or shorter.
    pub async fn read_whole(&self, key: &str, length: u64) -> Result<Option<Vec<u8>>, Unusable> {
        let mut bytes = Vec::new();
        let whole = self.read(key, length, |piece| bytes.extend_from_slice(piece)).await?;
        Ok(whole.then_some(bytes))
    }
}
