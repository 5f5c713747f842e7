//! A temporary folder with texts, a config and the run folders of a test, and the command lines it starts.

use super::program::{tarazed, verifier};
use super::run::{Outcome, Run};
use super::texts;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A tiny model: 2 layers of width 32 on three small domains, 8 lanes of one sequence of 32 tokens. A step takes a few
/// milliseconds. `run.steps` stands far behind what tests run (`--steps` stops them), so that all share one schedule.
const TINY: &str = r#"
[run]
name = "tiny"
seed = 7
steps = 4000

[model]
layers = 2
hidden = 32
ffn = 64
heads = 4
kv_heads = 2
context = 32
vocabulary = 512
init_std = 0.02

[batch]
lanes = 8
sequences_per_lane = 1
micro_batch_sequences = 1

[optimizer]
learning_rate = 3e-3
schedule = { kind = "cosine", warmup_steps = 20, final_fraction = 0.1 }
block_elements = 1024
shards = 8
replicas = 2

[data]
held_out_fraction = 0.1

[evaluation]
interval_steps = 10
sequences_per_domain_max = 4

[checkpoint]
interval_steps = 20
keep_last = 3

[monitor]
weights_interval_steps = 15

[cluster]
device = "cpu"
"#;

const TEMPORARY: &str = "tmp";

/// Starts the program with writes beyond the limit on file sizes failing instead of ending it, as on a full disk. The
/// first argument is the limit.
const LIMITED: &str = "trap '' XFSZ && ulimit -S -f \"$0\" && exec \"$@\"";

/// A folder of its own for one test; gone with it.
#[derive(Debug)]
pub struct Project {
    folder: tempfile::TempDir,
    config: PathBuf,
    variables: Vec<(String, String)>,
}

impl Project {
    /// The tiny config, and its texts in `text/`.
    ///
    /// # Panics
    /// If the folder cannot be written.
    #[must_use]
    pub fn tiny() -> Self {
        let folder = folder();
        let mut config: toml::Table = toml::from_str(TINY).expect("TOML");
        let mut domains = Vec::new();
        for (name, language, text) in texts::domains() {
            let path = format!("text/{name}.jsonl");
            std::fs::write(folder.path().join(&path), text).expect("a text is written");
            let domain = toml::toml! {
                name = name
                path = path
                language = language
                weight = 1.0
            };
            domains.push(toml::Value::Table(domain));
        }
        let data = config["data"].as_table_mut().expect("a section");
        data.insert("domains".to_owned(), domains.into());
        let file = folder.path().join("tiny.toml");
        let project = Self {
            folder,
            config: file,
            variables: Vec::new(),
        };
        project.write(&config);
        project
    }

    /// A config that is there already, with a folder for its runs.
    #[must_use]
    pub fn of(config: &Path) -> Self {
        Self {
            folder: folder(),
            config: config.to_owned(),
            variables: Vec::new(),
        }
    }

    /// The tiny config with some keys set, e.g. `("cluster.ranks", "3")`, values in TOML.
    #[must_use]
    pub fn tiny_with(keys: &[(&str, &str)]) -> Self {
        let project = Self::tiny();
        for (key, value) in keys {
            project.set(key, value);
        }
        project
    }

    /// With an environment variable for every program that it starts.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets one key of the config file.
    ///
    /// # Panics
    /// If the value is not TOML.
    pub fn set(&self, key: &str, value: &str) {
        let (section, name) = key.split_once('.').expect("section.key");
        let parsed: toml::Table = toml::from_str(&format!("value = {value}")).expect("a TOML value");
        self.edit(|config| {
            let section = config
                .entry(section)
                .or_insert_with(|| toml::Value::Table(toml::Table::new()));
            let section = section.as_table_mut().expect("a section");
            section.insert(name.to_owned(), parsed["value"].clone());
        });
    }

    /// Changes the config file.
    ///
    /// # Panics
    /// If it cannot be read or written.
    pub fn edit(&self, change: impl FnOnce(&mut toml::Table)) {
        let text = std::fs::read_to_string(self.config()).expect("the config");
        let mut table = toml::from_str(&text).expect("TOML");
        change(&mut table);
        self.write(&table);
    }

    fn write(&self, config: &toml::Table) {
        std::fs::write(self.config(), config.to_string()).expect("the config is written");
    }

    /// The project's folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The config file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.config.clone()
    }

    /// Where its runs put temporary files.
    #[must_use]
    pub fn temporary(&self) -> PathBuf {
        self.path().join(TEMPORARY)
    }

    /// The text of a domain.
    #[must_use]
    pub fn text(&self, domain: &str) -> PathBuf {
        self.path().join("text").join(format!("{domain}.jsonl"))
    }

    /// The folder of a run.
    #[must_use]
    pub fn run_dir(&self, run: &str) -> PathBuf {
        self.path().join("runs").join(run)
    }

    /// A `tarazed train` of this config in the run folder of this name.
    #[must_use]
    pub fn train(&self, run: &str) -> Train {
        Train {
            program: tarazed().to_owned(),
            folder: self.path().to_owned(),
            config: self.config(),
            run_dir: self.run_dir(run),
            args: Vec::new(),
            variables: self.variables.clone(),
            disk: None,
        }
    }

    /// Runs any other command of the program to its end.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn tarazed<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Outcome {
        self.complete(tarazed(), args)
    }

    /// Steps of the checkpoints that stand committed in a store, or in a run's folder: what is saved, where a run's events tell
    /// what a controller lived to hear of.
    ///
    /// # Panics
    /// If the store cannot be listed.
    #[must_use]
    pub fn committed<S: AsRef<std::ffi::OsStr>>(&self, store: S) -> BTreeSet<u64> {
        let args = ["checkpoint".as_ref(), "ls".as_ref(), "--json".as_ref(), store.as_ref()];
        let listed = self.tarazed(&args);
        listed.assert_code(0);
        let listed: serde_json::Value = serde_json::from_str(&listed.stdout).expect("JSON");
        let all = listed.as_array().expect("a list").iter();
        all.filter(|checkpoint| checkpoint["state"] == "committed")
            .filter_map(|checkpoint| checkpoint["reference"]["step"].as_u64())
            .collect()
    }

    /// Runs the verifier, which shares no code with the program, to its end.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn verify<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Outcome {
        self.complete(verifier(), args)
    }

    fn complete<S: AsRef<std::ffi::OsStr>>(&self, program: &Path, args: &[S]) -> Outcome {
        let output = command(program, self.path())
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .args(args)
            .output()
            .expect("the program runs");
        Outcome::new(output.status, output.stdout, output.stderr)
    }
}

/// A command line of `tarazed train`, not started yet.
#[derive(Clone, Debug)]
pub struct Train {
    program: PathBuf,
    folder: PathBuf,
    config: PathBuf,
    run_dir: PathBuf,
    args: Vec<String>,
    variables: Vec<(String, String)>,
    /// Limit on file sizes, in the shell's words; none for a disk that never fills.
    disk: Option<&'static str>,
}

impl Train {
    /// `--ranks N`
    #[must_use]
    pub fn ranks(self, count: u32) -> Self {
        self.arg("--ranks").arg(&count.to_string())
    }

    /// `--steps N`
    #[must_use]
    pub fn steps(self, count: u64) -> Self {
        self.arg("--steps").arg(&count.to_string())
    }

    /// `--set KEY=VALUE`
    #[must_use]
    pub fn set(self, key: &str, value: &str) -> Self {
        self.arg("--set").arg(&format!("{key}={value}"))
    }

    /// Any further argument.
    #[must_use]
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// An environment variable of the run and its ranks.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Another program than the one under test.
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        program.clone_into(&mut self.program);
        self
    }

    /// On a disk that [`Run::fill_disk`] fills: a limit on file sizes stands in for it, which every user may set.
    #[must_use]
    pub const fn on_small_disk(mut self) -> Self {
        self.disk = Some("unlimited");
        self
    }

    /// Runs it to its end on a disk that is full from the start: it can make files and write nothing into them.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn finish_on_full_disk(&self) -> Outcome {
        let full = Self {
            disk: Some("0"),
            ..self.clone()
        };
        // Through pipes: files could not take what it says.
        let output = full.command().output().expect("the program runs");
        Outcome::new(output.status, output.stdout, output.stderr)
    }

    /// The run folder.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Runs it to its end, whatever that is.
    #[must_use]
    pub fn finish(&self) -> Outcome {
        Run::start(self).finish()
    }

    /// Runs it to its end, which must be code 0.
    #[must_use]
    #[track_caller]
    pub fn complete(&self) -> Run {
        let mut run = Run::start(self);
        run.finish().assert_code(0);
        run
    }

    pub(super) fn command(&self) -> Command {
        let mut command = match self.disk {
            None => command(&self.program, &self.folder),
            Some(limit) => {
                let mut shell = command(Path::new("sh"), &self.folder);
                shell.args(["-c", LIMITED, limit]).arg(&self.program);
                shell
            }
        };
        command
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .arg("train")
            .arg(&self.config)
            .arg("--run-dir")
            .arg(&self.run_dir);
        command.args(&self.args);
        command
    }

    /// Where the output of this command goes.
    pub(super) fn output(&self, name: &str) -> PathBuf {
        let run = self.run_dir.file_name().unwrap_or_default().to_string_lossy();
        self.folder.join(format!("{run}.{name}"))
    }
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new()
        .prefix("tarazed-test-")
        .tempdir()
        .expect("a temporary folder");
    for name in ["text", "runs", TEMPORARY] {
        std::fs::create_dir(folder.path().join(name)).expect("a folder");
    }
    folder
}

/// A program in a test's folder. Sockets go there too, so that a killed run leaves nothing in the system's folder. Where its
/// store is and who may use it, a test says itself.
fn command(program: &Path, folder: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("AWS_")) {
        command.env_remove(name);
    }
    command
        .current_dir(folder)
        .stdin(Stdio::null())
        .env("TMPDIR", folder.join(TEMPORARY))
        .env_remove("RUST_LOG")
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
    command
}
