//! From `checkpoint.store` (a folder or a URL) to an object store. Time-outs and retries are set here, by name; nothing
//! is left to a library's default. Credentials come from the environment or AWS's shared files: a URL that carries any is refused.

use crate::error::{Redactor, StoreError};
#[cfg(feature = "s3")]
use crate::profile::{Profile, ProfileKeys};
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use url::Url;

/// An object store and where in it the checkpoints lie.
pub(crate) struct Place {
    pub(crate) objects: Arc<dyn ObjectStore>,
    pub(crate) root: Path,
    pub(crate) redactor: Redactor,
    /// The folder, if the store is one.
    pub(crate) folder: Option<PathBuf>,
}

/// What to do about a folder that is not there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum IfAbsent {
    Create,
    Refuse,
}

/// The folder that a location names, by its path or by a `file://` URL; none for a store elsewhere, and for what is no location.
#[must_use]
pub fn folder_of(location: &str) -> Option<PathBuf> {
    let location = location.trim();
    if !location.contains("://") {
        return (!location.is_empty()).then(|| PathBuf::from(location));
    }
    let url = Url::parse(location).ok().filter(|url| url.scheme() == "file")?;
    url.to_file_path().ok()
}

pub(crate) async fn open(location: &str, if_absent: IfAbsent) -> Result<Place, StoreError> {
    let location = location.trim();
    if location.is_empty() {
        return Err(reconfigure("(empty)", "no folder or URL given", "set checkpoint.store"));
    }
    if !location.contains("://") {
        return open_folder(PathBuf::from(location), if_absent).await;
    }
    let Ok(url) = Url::parse(location) else {
        // The text may hold a secret, so it is not repeated.
        return Err(reconfigure("(URL)", "this is not a URL", REMEDY));
    };
    let shown = format!(
        "{}://{}{}",
        url.scheme(),
        url.host_str().unwrap_or_default(),
        url.path()
    );
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        let cause = "the URL carries more than scheme, bucket and path";
        return Err(reconfigure(
            &shown,
            cause,
            "put credentials and endpoint into the environment, not into the URL",
        ));
    }
    if url.scheme() == "file" {
        let folder = url
            .to_file_path()
            .map_err(|()| reconfigure(&shown, "no local path", REMEDY))?;
        return open_folder(folder, if_absent).await;
    }
    open_cloud(&url, &shown)
}

const REMEDY: &str = "give a folder or a URL such as file:///data/run, s3://bucket/prefix (gs://, az://)";

fn reconfigure(location: &str, cause: impl ToString, remedy: &str) -> StoreError {
    StoreError::Reconfigure {
        location: location.to_string(),
        cause: cause.to_string(),
        remedy: remedy.to_string(),
    }
}

async fn open_folder(folder: PathBuf, if_absent: IfAbsent) -> Result<Place, StoreError> {
    let shown = folder.display().to_string();
    let made = tokio::task::spawn_blocking({
        let folder = folder.clone();
        move || match if_absent {
            IfAbsent::Create => create_durably(&folder),
            IfAbsent::Refuse => Ok(()),
        }
    })
    .await
    .map_err(|error| reconfigure(&shown, error, REMEDY))?;
    made.map_err(|error| reconfigure(&shown, error, "choose a folder that this user may create and write"))?;
    if if_absent == IfAbsent::Refuse && !folder.is_dir() {
        return Err(StoreError::NotFound {
            what: format!("checkpoint store {shown}"),
            remedy: "check the path".to_string(),
        });
    }
    // fsync before a write is acknowledged: a checkpoint that a power cut erases was never committed.
    let objects = LocalFileSystem::new_with_prefix(&folder)
        .map_err(|error| reconfigure(&shown, error, "choose a folder that this user may read and write"))?
        .with_fsync(true);
    Ok(Place {
        objects: Arc::new(objects),
        root: Path::default(),
        redactor: Redactor::new(&shown),
        folder: Some(folder),
    })
}

/// Creates the folder and makes each new directory entry durable.
fn create_durably(folder: &std::path::Path) -> std::io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let parent = match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    create_durably(&parent)?;
    match std::fs::create_dir(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists || !folder.is_dir() => Err(error),
        _ => std::fs::File::open(parent)?.sync_all(),
    }
}

#[cfg(not(feature = "s3"))]
fn open_cloud(url: &Url, shown: &str) -> Result<Place, StoreError> {
    match url.scheme() {
        "s3" | "gs" | "az" => Err(reconfigure(
            shown,
            format!("this binary was built without {}://", url.scheme()),
            "build with the feature s3 (gcs, azure), or use a folder",
        )),
        other => Err(reconfigure(shown, format!("no store speaks {other}://"), REMEDY)),
    }
}

#[cfg(feature = "s3")]
fn open_cloud(url: &Url, shown: &str) -> Result<Place, StoreError> {
    use object_store::ClientConfigKey;
    // The HTTP client asks for the process's default provider; another part of the process may have set one before.
    let _already_set = rustls::crypto::ring::default_provider().install_default();
    let bucket = url.host_str().filter(|name| !name.is_empty());
    let bucket = bucket.ok_or_else(|| reconfigure(shown, "the URL names no bucket", REMEDY))?;
    let root = Path::from_url_path(url.path()).map_err(|error| reconfigure(shown, error, REMEDY))?;
    let redactor = Redactor::new(shown);
    let client = [
        (ClientConfigKey::Timeout, crate::limits::REQUEST_TIMEOUT_MS),
        (ClientConfigKey::ConnectTimeout, crate::limits::CONNECT_TIMEOUT_MS),
    ];
    let client = client.map(|(key, ms)| (key, format!("{ms}ms")));
    let built: Result<Arc<dyn ObjectStore>, object_store::Error> = match url.scheme() {
        "s3" => {
            use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
            let profile = Profile::of_environment().map_err(|cause| {
                reconfigure(
                    shown,
                    cause,
                    "correct AWS_PROFILE or the profile, or set AWS_ACCESS_KEY_ID",
                )
            })?;
            redactor.learn(profile.secrets());
            let mut builder = AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                .with_http_connector(crate::clock::Looking(redactor.clock.clone()))
                .with_retry(cloud::retries());
            if let Some(keys) = ProfileKeys::of(&profile, &redactor) {
                builder = builder.with_credentials(Arc::new(keys));
            }
            for (key, value) in profile {
                builder = builder.with_config(key, value);
            }
            for (key, value) in client {
                builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
            }
            builder.build().map(|store| Arc::new(store) as _)
        }
        #[cfg(feature = "gcs")]
        "gs" => {
            use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
            let mut builder = GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(bucket)
                .with_retry(cloud::retries());
            for (key, value) in client {
                builder = builder.with_config(GoogleConfigKey::Client(key), value);
            }
            builder.build().map(|store| Arc::new(store) as _)
        }
        #[cfg(feature = "azure")]
        "az" => {
            use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
            let mut builder = MicrosoftAzureBuilder::from_env()
                .with_container_name(bucket)
                .with_retry(cloud::retries());
            for (key, value) in client {
                builder = builder.with_config(AzureConfigKey::Client(key), value);
            }
            builder.build().map(|store| Arc::new(store) as _)
        }
        other => {
            return Err(reconfigure(
                shown,
                format!("this binary was built without {other}://"),
                REMEDY,
            ));
        }
    };
    let objects = built.map_err(|error| {
        reconfigure(
            shown,
            redactor.clean(&error.to_string()),
            "check the store's variables in the environment",
        )
    })?;
    Ok(Place {
        objects,
        root,
        redactor,
        folder: None,
    })
}

#[cfg(feature = "s3")]
mod cloud {
    use crate::limits::{BACKOFF_MS, REQUEST_RETRIES_MAX, RETRY_WINDOW_MS};
    use object_store::{BackoffConfig, RetryConfig};
    use std::time::Duration;

    pub(super) fn retries() -> RetryConfig {
        RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(BACKOFF_MS.0),
                max_backoff: Duration::from_millis(BACKOFF_MS.1),
                base: 2.0,
            },
            max_retries: REQUEST_RETRIES_MAX,
            retry_timeout: Duration::from_millis(RETRY_WINDOW_MS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn refusal(location: &str) -> String {
        match open(location, IfAbsent::Refuse).await {
            Ok(_) => panic!("{location} must be refused"),
            Err(error) => error.to_string(),
        }
    }

    #[tokio::test]
    async fn a_url_with_credentials_is_refused_and_not_repeated() {
        for url in [
            "s3://AKIAEXAMPLE:topsecret@bucket/run",
            "s3://bucket/run?X-Amz-Signature=topsecret",
        ] {
            let message = refusal(url).await;
            assert!(message.contains("environment"), "{message}");
            assert!(
                !message.contains("topsecret") && !message.contains("AKIAEXAMPLE"),
                "{message}"
            );
        }
        assert!(!refusal("s3://[topsecret").await.contains("topsecret"));
    }

    #[tokio::test]
    async fn what_cannot_be_opened_says_what_to_do() {
        assert!(refusal("").await.contains("checkpoint.store"));
        assert!(refusal("ftp://host/x").await.contains("ftp://"));
        assert!(refusal("/nonexistent/for/sure").await.contains("not found"));
    }

    #[tokio::test]
    async fn a_folder_is_made_with_its_parents() {
        let base = tempfile::tempdir().unwrap();
        let folder = base.path().join("a/b/store");
        open(folder.to_str().unwrap(), IfAbsent::Create).await.unwrap();
        assert!(folder.is_dir());
        let url = Url::from_file_path(&folder).unwrap();
        open(url.as_str(), IfAbsent::Refuse).await.unwrap();
        std::fs::write(base.path().join("file"), b"").unwrap();
        let blocked = open(base.path().join("file/x").to_str().unwrap(), IfAbsent::Create).await;
        assert!(matches!(blocked.map(|_| ()), Err(StoreError::Reconfigure { .. })));
    }
}
