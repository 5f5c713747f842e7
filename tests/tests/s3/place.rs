//! Where a test keeps its objects: a server, a bucket in it, and a prefix that nobody else uses.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use tarazed_s3::{Credentials, Server};
use tarazed_tests::harness::Project;

/// Names a bucket on another server, whose variables are set too.
const BUCKET: &str = "TARAZED_TEST_BUCKET";
const CASE: &str = "TARAZED_TEST_CASE";
const LOCATION: &str = "TARAZED_TEST_LOCATION";
/// What must be told nowhere, a line each.
const SECRETS: &str = "TARAZED_TEST_SECRETS";
/// How a search of objects begins the line that names one, and the line that says how many there were.
pub const TOLD_BY: &str = "told by: ";
pub const LOOKED_AT: &str = "objects looked at: ";
const KEY_ID: &str = "AWS_ACCESS_KEY_ID";
const SECRET: &str = "AWS_SECRET_ACCESS_KEY";
const SESSION_TOKEN: &str = "AWS_SESSION_TOKEN";

/// One server, as clients find it.
#[derive(Clone)]
pub struct Place {
    name: String,
    bucket: String,
    variables: Vec<(String, String)>,
    secret: String,
    /// The server and its folder, where they are the test's own; in the order in which they go.
    own: Option<Rc<(Server, tempfile::TempDir)>>,
}

impl Place {
    /// The project's own server, and the one of the environment where there is one.
    pub fn all() -> Vec<Self> {
        let mut places = vec![Self::own()];
        places.extend(Self::of_environment());
        places
    }

    /// The project's own server.
    pub fn own() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let credentials = Credentials::random().expect("random numbers");
        let server = Server::start(folder.path(), credentials).expect("a server");
        let bucket = "tarazed-test".to_owned();
        server.create_bucket(&bucket).expect("a bucket");
        let mut variables: Vec<_> = server.environment().into();
        variables.extend(server.environment_of_ranks());
        variables.push(("NO_PROXY", "127.0.0.1".to_owned()));
        let variables = variables.into_iter().map(|(name, value)| (name.to_owned(), value));
        Self::new("tests/s3", bucket, variables.collect(), Some(Rc::new((server, folder))))
    }

    fn of_environment() -> Option<Self> {
        let bucket = std::env::var(BUCKET).ok()?;
        let variables = std::env::vars().filter(|(name, _)| is_of_store(name));
        Some(Self::new(BUCKET, bucket, variables.collect(), None))
    }

    fn new(
        name: &str,
        bucket: String,
        variables: Vec<(String, String)>,
        own: Option<Rc<(Server, tempfile::TempDir)>>,
    ) -> Self {
        let secret = variables.iter().find(|(name, _)| name == SECRET);
        let (_, secret) = secret.expect("a secret in the environment").clone();
        Self {
            name: name.to_owned(),
            bucket,
            variables,
            secret,
            own,
        }
    }

    /// The same server, found in another way.
    pub fn clone_with(&self, name: &str, value: &str) -> Self {
        let mut other = self.clone();
        other.variables.retain(|(known, _)| known != name);
        other.variables.push((name.to_owned(), value.to_owned()));
        other
    }

    /// The server, which is the test's own.
    #[track_caller]
    pub fn server(&self) -> &Server {
        let (server, _) = &**self.own.as_ref().expect("the project's own server");
        server
    }

    fn variable(&self, wanted: &str) -> &str {
        let found = self.variables.iter().find(|(name, _)| name == wanted);
        found.map_or("", |(_, value)| value)
    }

    /// What the controller signs with.
    pub fn credentials(&self) -> Credentials {
        Credentials {
            key_id: self.variable(KEY_ID).to_owned(),
            secret: self.variable(SECRET).to_owned(),
        }
    }

    /// The same server, whose keys are found elsewhere, by ranks as by the controller.
    pub fn without_keys(&self) -> Self {
        let mut other = self.clone();
        let is_key = |name: &str| [KEY_ID, SECRET, SESSION_TOKEN].iter().any(|key| name.ends_with(key));
        other.variables.retain(|(name, _)| !is_key(name));
        other
    }

    /// The same server for somebody who has what its ranks have; none where they have nothing of their own.
    pub fn of_ranks(&self) -> Option<Self> {
        let theirs = self.variables.iter();
        let theirs: Vec<_> = theirs
            .filter_map(|(name, value)| Some((name.strip_prefix("TARAZED_RANK_")?, value)))
            .collect();
        let with = |place: Self, (name, value): &(&str, &String)| place.clone_with(name, value);
        (!theirs.is_empty()).then(|| theirs.iter().fold(self.clone(), with))
    }

    /// Another bucket of the same server.
    pub fn in_bucket(&self, bucket: &str) -> Self {
        Self {
            bucket: bucket.to_owned(),
            ..self.clone()
        }
    }

    /// The URL of a store with this name, on a server that nobody else uses.
    pub fn url_of(&self, name: &str) -> String {
        format!("s3://{}/runs/{name}/store", self.bucket)
    }

    /// The URL of a store that nobody has used, with a prefix as long as people's may be.
    pub fn url(&self) -> String {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let prefix = format!("people/somebody/runs/{}-{process}-{count}/store", now.as_nanos());
        format!("s3://{}/{prefix}", self.bucket)
    }

    /// A project whose programs use this server.
    pub fn project(&self, project: Project) -> Project {
        let with = |project: Project, (name, value): &(String, String)| project.variable(name, value);
        self.variables.iter().fold(project, with)
    }

    /// Runs a case of the store in a child process whose only credentials are this place's; it says no secret.
    #[track_caller]
    pub fn run(&self, case: &str) {
        self.run_at(case, &self.url(), &[]);
    }

    /// The same at this URL, for a case that knows these secrets; what it said.
    #[track_caller]
    pub fn run_at(&self, case: &str, location: &str, secrets: &[String]) -> String {
        let mut child = Command::new(std::env::current_exe().expect("a test knows its own path"));
        child.args(["child", "--exact", "--ignored", "--nocapture"]);
        for (name, _) in std::env::vars().filter(|(name, _)| is_of_store(name)) {
            child.env_remove(name);
        }
        let output = child
            .env(CASE, case)
            .env(LOCATION, location)
            .env(SECRETS, secrets.join("\n"))
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .output()
            .expect("the child runs");
        let (said, complained) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        let text = format!("{}, {case}: {said}{complained}", self.name);
        self.assert_silent(&text);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        text
    }

    /// Fails if a text holds a secret, and does not show it then.
    #[track_caller]
    pub fn assert_silent(&self, text: &str) {
        for secret in self.secrets() {
            let shown = text.replace(secret.as_str(), "***");
            assert!(!text.contains(secret.as_str()), "a secret was printed: {shown}");
        }
    }

    /// Secret keys and session tokens, of the controller and of ranks.
    fn secrets(&self) -> Vec<String> {
        let is_secret = |name: &str| name.ends_with(SECRET) || name.ends_with(SESSION_TOKEN);
        let given = self.variables.iter().filter(|(name, _)| is_secret(name));
        given.map(|(_, secret)| secret).chain([&self.secret]).cloned().collect()
    }

    /// Fails if a file of the run folder or an object of its store holds a secret of this place, or one of `more`.
    #[track_caller]
    pub fn assert_untold(&self, run_dir: &Path, url: &str, more: &[&str]) {
        let told_by = self.told_by(run_dir, url, more);
        assert!(told_by.is_empty(), "a secret is in {told_by:?}");
    }

    /// Files below a folder and objects below a URL that hold a secret of this place, or one of `more`. Fails where there is
    /// no file or no object: nothing would have been looked at.
    #[track_caller]
    pub fn told_by(&self, folder: &Path, url: &str, more: &[&str]) -> Vec<String> {
        let mut secrets = self.secrets();
        secrets.extend(more.iter().map(|secret| (*secret).to_owned()));
        let (mut told_by, mut looked_at) = (Vec::new(), 0);
        let mut folders = vec![folder.to_owned()];
        while let Some(next) = folders.pop() {
            for entry in std::fs::read_dir(&next).expect("a folder") {
                let path = entry.expect("an entry").path();
                // A link's target counts: what a run has linked is part of its folder.
                let kind = std::fs::metadata(&path).expect("a file's facts").file_type();
                if kind.is_dir() {
                    folders.push(path);
                } else if kind.is_file() {
                    looked_at += 1;
                    let bytes = std::fs::read(&path).expect("a readable file");
                    told_by.extend(tells(&bytes, &secrets).then(|| path.display().to_string()));
                }
            }
        }
        assert!(looked_at > 0, "no file in {}", folder.display());
        let said = self.run_at("search", url, &secrets);
        let number = said.lines().find_map(|line| line.strip_prefix(LOOKED_AT));
        let number: u64 = number.and_then(|number| number.parse().ok()).expect("a number");
        assert!(number > 0, "no object in {url}");
        told_by.extend(
            said.lines()
                .filter_map(|line| line.strip_prefix(TOLD_BY).map(str::to_owned)),
        );
        told_by
    }

    /// What the failure of a test names it.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Whether bytes hold one of these texts.
pub fn tells(bytes: &[u8], secrets: &[String]) -> bool {
    let holds = |secret: &[u8]| {
        let is_it = |part: &[u8]| part.first() == secret.first() && part == secret;
        !secret.is_empty() && bytes.windows(secret.len()).any(is_it)
    };
    secrets.iter().any(|secret| holds(secret.as_bytes()))
}

/// The secrets that this process is to search for.
pub fn secrets() -> Vec<String> {
    let all = std::env::var(SECRETS).unwrap_or_default();
    all.lines().map(str::to_owned).collect()
}

/// Whether it says how the store is reached.
fn is_of_store(variable: &str) -> bool {
    variable.starts_with("AWS_") || variable.starts_with("TARAZED_RANK_AWS_")
}

/// The case that this process is to run, and where; none where a person started it.
pub fn case() -> Option<(String, String)> {
    Some((std::env::var(CASE).ok()?, std::env::var(LOCATION).ok()?))
}
