//! Credentials of AWS's shared files (`~/.aws/credentials`, `~/.aws/config`), which `object_store` does not read.
//!
//! As other clients of S3 have it: variables of the environment come first, those of web identities and containers, too; then
//! the profile that `AWS_PROFILE` names, or `default`; a role of the machine comes last. Where nothing names a file or a
//! profile, one that cannot be read or used is none. The formats are those of the AWS SDKs' reference guide, "Shared config and credentials files". Static keys,
//! region and endpoint are taken; profiles that ask a program or another account for keys are not known here, and say so.
//!
//! Keys that are renewed in the files while a process runs are taken from there ([`ProfileKeys`]): temporary ones live for
//! hours, and runs for weeks.

use crate::error::Redactor;
use crate::limits::PROFILE_AGE_MS_MAX;
use object_store::CredentialProvider;
use object_store::aws::{AmazonS3ConfigKey, AwsCredential};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of such a file that are read at most.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Settings that lead to credentials in a way that is not known here.
const UNKNOWN_WAYS: [&str; 5] = [
    "credential_process",
    "role_arn",
    "source_profile",
    "sso_session",
    "sso_start_url",
];

/// What a profile sets that no variable of the environment does.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Profile(Vec<(AmazonS3ConfigKey, String)>);

/// Printing it shows no values.
impl std::fmt::Debug for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(key, _)| key)).finish()
    }
}

impl Profile {
    /// The profile in force for this process; empty where there is none and none was asked for.
    ///
    /// # Errors
    /// Why the profile that is asked for cannot be used; no value of it is repeated.
    pub(crate) fn of_environment() -> Result<Self, String> {
        Self::of(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn of(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let home = variable("HOME").map(|home| PathBuf::from(home).join(".aws"));
        let wanted = variable("AWS_PROFILE");
        let text_of = |name: &str, default: &str| match (variable(name), &home) {
            (Some(named), _) => read(Path::new(&named)),
            (None, Some(home)) if wanted.is_some() => read(&home.join(default)),
            (None, Some(home)) => Ok(read(&home.join(default)).unwrap_or_default()),
            (None, None) => Ok(None),
        };
        let name = wanted.as_deref().unwrap_or("default");
        let config = text_of("AWS_CONFIG_FILE", "config")?.unwrap_or_default();
        let mut found = settings_of(&config, &format!("profile {name}"));
        if name == "default" {
            found.extend(settings_of(&config, name));
        }
        let credentials = text_of("AWS_SHARED_CREDENTIALS_FILE", "credentials")?.unwrap_or_default();
        let credentials = settings_of(&credentials, name);
        if credentials.contains_key("aws_access_key_id") {
            // Keys of two sources are no pair.
            found.retain(|setting, _| !setting.starts_with("aws_"));
        }
        found.extend(credentials);
        if found.is_empty() && wanted.is_some() {
            return Err(format!(
                "AWS_PROFILE names {name}, and no such profile is in ~/.aws/credentials or ~/.aws/config"
            ));
        }
        let has_keys = OWN_KEYS.iter().any(|name| variable(name).is_some());
        if !has_keys && found.contains_key("aws_access_key_id") && variable("AWS_SESSION_TOKEN").is_some() {
            return Err(format!(
                "AWS_SESSION_TOKEN is set without AWS_ACCESS_KEY_ID, and would be sent with the keys of the profile {name}; \
                 unset it, or set the keys that it belongs to"
            ));
        }
        match UNKNOWN_WAYS.iter().find(|way| found.contains_key(**way)) {
            Some(way) if wanted.is_some() && !has_keys && !found.contains_key("aws_access_key_id") => Err(format!(
                "the AWS profile {name} gets its keys by {way}, which is not known here; set AWS_ACCESS_KEY_ID, \
                 AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN from it (`aws configure export-credentials --format env`)"
            )),
            _ => Ok(Self(
                SETTINGS
                    .into_iter()
                    // Keys of two sources are no pair: one variable of them stands for all three.
                    .filter(|(_, variables, _)| variables.iter().all(|name| variable(name).is_none()))
                    .filter_map(|(setting, _, key)| Some((key, found.get(setting)?.clone())))
                    .collect(),
            )),
        }
    }

    /// What must not appear in any message.
    pub(crate) fn secrets(&self) -> impl Iterator<Item = String> {
        use AmazonS3ConfigKey::{AccessKeyId, SecretAccessKey, Token};
        let secret = |key: &AmazonS3ConfigKey| matches!(key, AccessKeyId | SecretAccessKey | Token);
        self.0
            .iter()
            .filter(move |(key, _)| secret(key))
            .map(|(_, value)| value.clone())
    }
}

impl Profile {
    /// What requests are signed with, where the profile has it.
    fn keys(&self) -> Option<AwsCredential> {
        let setting = |wanted| {
            let found = self.0.iter().find(|(key, _)| *key == wanted);
            found.map(|(_, value)| value.clone())
        };
        Some(AwsCredential {
            key_id: setting(AmazonS3ConfigKey::AccessKeyId)?,
            secret_key: setting(AmazonS3ConfigKey::SecretAccessKey)?,
            token: setting(AmazonS3ConfigKey::Token),
        })
    }
}

/// Reads the profile.
type Reader = fn() -> Result<Profile, String>;

/// The profile's keys as its files hold them now: a request that comes [`PROFILE_AGE_MS_MAX`] after they were read last reads
/// them again. Files that cannot be used for a moment change nothing.
pub(crate) struct ProfileKeys {
    read: Reader,
    age_max: Duration,
    /// When they were read, and what was there.
    known: Mutex<(Instant, Arc<AwsCredential>)>,
    redactor: Redactor,
}

/// Printing it shows no values.
impl std::fmt::Debug for ProfileKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProfileKeys").finish_non_exhaustive()
    }
}

impl ProfileKeys {
    /// Those of the profile in force for this process, which was just read; none where keys come from elsewhere.
    pub(crate) fn of(profile: &Profile, redactor: &Redactor) -> Option<Self> {
        let age_max = Duration::from_millis(PROFILE_AGE_MS_MAX);
        Self::read_by(Profile::of_environment, age_max, profile, redactor)
    }

    fn read_by(read: Reader, age_max: Duration, profile: &Profile, redactor: &Redactor) -> Option<Self> {
        Some(Self {
            read,
            age_max,
            known: Mutex::new((Instant::now(), Arc::new(profile.keys()?))),
            redactor: redactor.clone(),
        })
    }

    /// Whether it is time to read again; whoever is told so does it, and nobody else meanwhile.
    fn is_due(&self) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = known.0.elapsed() >= self.age_max;
        if is_due {
            known.0 = Instant::now();
        }
        is_due
    }
}

#[async_trait::async_trait]
impl CredentialProvider for ProfileKeys {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        if self.is_due() {
            let read = tokio::task::spawn_blocking(self.read)
                .await
                .unwrap_or_else(|error| Err(error.to_string()));
            match read.map(|profile| (profile.keys(), profile)) {
                Ok((Some(keys), profile)) => {
                    self.redactor.learn(profile.secrets());
                    self.known.lock().unwrap_or_else(PoisonError::into_inner).1 = Arc::new(keys);
                }
                Ok((None, _)) => tracing::debug!("the AWS profile holds no keys now; those read before are used"),
                Err(error) => tracing::debug!(%error, "the AWS profile cannot be read now; its old keys are used"),
            }
        }
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(&known.1))
    }
}

impl IntoIterator for Profile {
    type Item = (AmazonS3ConfigKey, String);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// Variables of the environment that give keys, one way or another.
const OWN_KEYS: [&str; 4] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
];
/// A setting, the variables of the environment that come before it, and what it means to the client.
const SETTINGS: [(&str, &[&str], AmazonS3ConfigKey); 5] = [
    ("aws_access_key_id", &OWN_KEYS, AmazonS3ConfigKey::AccessKeyId),
    ("aws_secret_access_key", &OWN_KEYS, AmazonS3ConfigKey::SecretAccessKey),
    ("aws_session_token", &OWN_KEYS, AmazonS3ConfigKey::Token),
    (
        "region",
        &["AWS_REGION", "AWS_DEFAULT_REGION"],
        AmazonS3ConfigKey::Region,
    ),
    (
        "endpoint_url",
        &["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"],
        AmazonS3ConfigKey::Endpoint,
    ),
];

fn read(path: &Path) -> Result<Option<String>, String> {
    let shown = path.display();
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{shown}: {error}")),
        Ok(facts) if facts.len() > FILE_BYTES_MAX => {
            return Err(format!("{shown} is no file of AWS profiles: too long"));
        }
        Ok(_) => {}
    }
    // The error of a file that is no text would show what is in it.
    let bytes = std::fs::read(path).map_err(|error| format!("{shown}: {error}"))?;
    let text = String::from_utf8(bytes).map_err(|_| format!("{shown} is no text in UTF-8"))?;
    Ok(Some(text))
}

/// The settings of one section. Indented lines belong to a setting of several, none of which is of use here.
fn settings_of(text: &str, wanted: &str) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::new();
    let mut is_wanted = false;
    for line in text.lines() {
        if line.starts_with(char::is_whitespace) || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(section) = line.strip_prefix('[') {
            let section = section.split(']').next().unwrap_or_default();
            is_wanted = section.split_whitespace().eq(wanted.split_whitespace());
        } else if let Some((name, value)) = line.split_once('=').filter(|_| is_wanted) {
            let value = [" #", " ;", "\t#", "\t;"]
                .into_iter()
                .fold(value, |value, comment| value.split(comment).next().unwrap_or_default());
            settings.insert(name.trim().to_lowercase(), value.trim().to_owned());
        }
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;
    use AmazonS3ConfigKey::{AccessKeyId, Endpoint, Region, SecretAccessKey};

    const CREDENTIALS: &str = "\
# mine
[default]
aws_access_key_id = AKIDDEFAULT
aws_secret_access_key=secret/of+default==
[lab]
aws_access_key_id = AKIDLAB ; of the lab
aws_secret_access_key = secretoflab
";
    const CONFIG: &str = "\
[default]
region = eu-west-1
s3 =
  endpoint_url = http://nested.example
[profile  lab]
region=us-west-2
endpoint_url = http://lab.example:8000
aws_secret_access_key = overruled
[profile sso]
sso_session = corp
[services lab]
region = nowhere
";

    fn profile(settings: &[(AmazonS3ConfigKey, &str)]) -> Profile {
        Profile(
            settings
                .iter()
                .map(|(key, value)| (*key, (*value).to_owned()))
                .collect(),
        )
    }

    fn of(variables: &[(&str, &str)]) -> Result<Profile, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(".aws")).unwrap();
        std::fs::write(folder.path().join(".aws/credentials"), CREDENTIALS).unwrap();
        std::fs::write(folder.path().join(".aws/config"), CONFIG).unwrap();
        let home = folder.path().to_str().unwrap();
        Profile::of(&|name| {
            let known = variables.iter().find(|(known, _)| *known == name);
            match (known, name) {
                (Some((_, value)), _) => Some((*value).to_owned()),
                (None, "HOME") => Some(home.to_owned()),
                _ => None,
            }
        })
    }

    #[test]
    fn the_default_profile_serves_where_nothing_is_said() {
        let expected = [
            (AccessKeyId, "AKIDDEFAULT"),
            (SecretAccessKey, "secret/of+default=="),
            (Region, "eu-west-1"),
        ];
        assert_eq!(of(&[]).unwrap(), profile(&expected));
    }

    #[test]
    fn a_named_profile_is_taken_from_both_files() {
        let expected = [
            (AccessKeyId, "AKIDLAB"),
            (SecretAccessKey, "secretoflab"),
            (Region, "us-west-2"),
            (Endpoint, "http://lab.example:8000"),
        ];
        assert_eq!(of(&[("AWS_PROFILE", "lab")]).unwrap(), profile(&expected));
    }

    #[test]
    fn the_environment_comes_first() {
        let lab = [("AWS_ACCESS_KEY_ID", "AKIDENV"), ("AWS_PROFILE", "lab")];
        let expected = [(Region, "us-west-2"), (Endpoint, "http://lab.example:8000")];
        assert_eq!(of(&lab).unwrap(), profile(&expected), "no secret without its key");
        let elsewhere = [lab[0], lab[1], ("AWS_DEFAULT_REGION", "x"), ("AWS_ENDPOINT_URL", "y")];
        assert_eq!(of(&elsewhere).unwrap(), Profile::default());
        let sso = [("AWS_ACCESS_KEY_ID", "AKIDENV"), ("AWS_PROFILE", "sso")];
        assert_eq!(of(&sso).unwrap(), Profile::default(), "its way to keys is not needed");
    }

    #[test]
    fn what_cannot_be_used_is_said_without_secrets() {
        assert!(
            of(&[("AWS_PROFILE", "typo")])
                .unwrap_err()
                .contains("AWS_PROFILE names typo")
        );
        assert!(of(&[("AWS_PROFILE", "sso")]).unwrap_err().contains("sso_session"));
        assert!(
            of(&[("AWS_SESSION_TOKEN", "alone")])
                .unwrap_err()
                .contains("without AWS_ACCESS_KEY_ID")
        );
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x");
        std::fs::write(&file, b"[default]\naws_secret_access_key = hush\xff").unwrap();
        let refused = of(&[("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap())]).unwrap_err();
        assert!(refused.contains("UTF-8") && !refused.contains("hush"), "{refused}");
        assert!(!format!("{:?}", of(&[]).unwrap()).contains("secret/of"));
    }

    #[test]
    fn no_files_are_no_profile() {
        for home in ["/nonexistent", "/dev/null"] {
            let nowhere = |name: &str| (name == "HOME").then(|| home.to_owned());
            assert_eq!(Profile::of(&nowhere).unwrap(), Profile::default());
            let named = |name: &str| {
                (name == "AWS_PROFILE")
                    .then(|| "lab".to_owned())
                    .or_else(|| nowhere(name))
            };
            assert!(Profile::of(&named).is_err(), "what is asked for must be there");
        }
    }

    #[test]
    fn an_identity_of_the_environment_is_not_overruled_by_a_profile_that_nobody_named() {
        let regions = of(&[("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")]).unwrap();
        assert_eq!(regions, profile(&[(Region, "eu-west-1")]));
    }

    #[test]
    fn keys_of_two_files_are_not_mixed() {
        let folder = tempfile::tempdir().unwrap();
        let (config, credentials) = (folder.path().join("config"), folder.path().join("credentials"));
        std::fs::write(
            &config,
            "[profile default]\naws_session_token = of another\nregion = x\n",
        )
        .unwrap();
        std::fs::write(&credentials, CREDENTIALS).unwrap();
        let files = |name: &str| match name {
            "AWS_CONFIG_FILE" => Some(config.display().to_string()),
            "AWS_SHARED_CREDENTIALS_FILE" => Some(credentials.display().to_string()),
            _ => None,
        };
        let expected = [
            (AccessKeyId, "AKIDDEFAULT"),
            (SecretAccessKey, "secret/of+default=="),
            (Region, "x"),
        ];
        assert_eq!(Profile::of(&files).unwrap(), profile(&expected));
    }

    /// A profile on disk that changes while it is used: renewed, then torn, then gone.
    #[tokio::test]
    async fn renewed_keys_are_taken_and_a_torn_file_is_not() {
        static STATE: Mutex<usize> = Mutex::new(0);
        let read: Reader = || {
            let mut state = STATE.lock().unwrap();
            *state += 1;
            match *state {
                1 => Ok(profile(&[
                    (AccessKeyId, "AKIDNEW"),
                    (SecretAccessKey, "a new secret"),
                    (AmazonS3ConfigKey::Token, "a new token"),
                ])),
                2 => Ok(profile(&[(AccessKeyId, "AKIDTORN")])),
                _ => Err("gone".to_owned()),
            }
        };
        let redactor = Redactor::new("s3://bucket");
        let first = profile(&[(AccessKeyId, "AKIDOLD"), (SecretAccessKey, "an old secret")]);
        let keys = ProfileKeys::read_by(read, Duration::ZERO, &first, &redactor).unwrap();
        for _ in 0..3 {
            let now = keys.get_credential().await.unwrap();
            assert_eq!(
                (now.key_id.as_str(), now.token.as_deref()),
                ("AKIDNEW", Some("a new token"))
            );
        }
        assert_eq!(redactor.clean("it was a new secret"), "it was ***");
        let young = ProfileKeys::read_by(read, Duration::from_secs(3_600), &first, &redactor).unwrap();
        assert_eq!(young.get_credential().await.unwrap().key_id, "AKIDOLD", "not yet");
        let none = profile(&[(Region, "x")]);
        assert!(ProfileKeys::read_by(read, Duration::ZERO, &none, &redactor).is_none());
        assert!(!format!("{keys:?}").contains("secret"));
    }
}
