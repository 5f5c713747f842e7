//! Which checkpoint a command means, with the config and the tokenizer that go with it.
//!
//! A store has weights, and of its run's config and data only digests. So where a store is named that does not lie in its run's
//! folder, that folder or the two files are named besides, and a config of another run is refused. A tokenizer that is named by
//! its file is taken at its word: no checkpoint has a digest of that alone.
//!
//! An import has no run at all: any config serves whose `[model]` means what its weights were made for.

use crate::commands::checkpoint;
use crate::exit::Failure;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use tarazed_actors::run_folder::RunPaths;
use tarazed_corpus::{DataManifest, MANIFEST_FILE, Tokenizer};
use tarazed_domain::config::{Config, ModelConfig};
use tarazed_domain::{Generation, ParameterLayout, StepsCompleted};
use tarazed_store::{
    CheckpointState, CheckpointStore, CheckpointSummary, CommitRef, Digest, Manifest, Restorable, StoreError, WriterId,
};

/// What names a checkpoint on the command line.
#[derive(Clone, Debug, clap::Args)]
pub struct Source {
    /// Run folder, store folder or URL, with @STEP for another checkpoint than the newest.
    #[arg(value_name = "RUN_OR_STORE[@STEP]")]
    from: String,
    /// Folder of the run whose store this is, where the store does not lie in it: for its config and its tokenizer.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// The run's config.toml.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The run's tokenizer.json.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

/// A checkpoint that is there, and what reading it takes.
pub struct Opened {
    /// Its store.
    pub store: CheckpointStore,
    /// Its name.
    reference: CommitRef,
    /// What it holds.
    pub manifest: Manifest,
    /// Its run's config.
    pub config: Config,
    /// Where its weights lie.
    pub layout: ParameterLayout,
    /// Its run's tokenizer.
    pub tokenizer: Tokenizer,
    /// The bytes of the tokenizer's file.
    pub tokenizer_json: Vec<u8>,
}

impl Opened {
    /// What becomes of a read that ended like this.
    pub async fn unread(&self, error: StoreError) -> Failure {
        unread(&self.store, &self.reference, error).await
    }
}

/// An object that is gone because the run has retired its checkpoint meanwhile is no damage, and another try finds another one.
pub async fn unread(store: &CheckpointStore, reference: &CommitRef, error: StoreError) -> Failure {
    let is_retired = |all: Vec<CheckpointSummary>| {
        let mut same = all.iter().filter(|found| found.reference == *reference);
        same.any(|found| found.state == CheckpointState::Retired)
    };
    if error.is_bad_object() && store.list().await.is_ok_and(is_retired) {
        return Failure::transient(
            format!("the checkpoint of step {}", reference.step),
            "was retired by its run while it was read",
            "try again, or keep one by `tarazed checkpoint pin` before",
        );
    }
    checkpoint::failure(error)
}

impl Source {
    /// The newest checkpoint of the run in `dir`.
    #[must_use]
    pub fn of_run(dir: &Path) -> Self {
        Self {
            from: dir.display().to_string(),
            run_dir: None,
            config: None,
            tokenizer: None,
        }
    }

    /// What was named, without the step.
    ///
    /// # Errors
    /// Refused where the step is no number.
    pub fn place(&self) -> Result<&str, Failure> {
        split(&self.from).map(|(place, _)| place)
    }

    /// Finds the checkpoint; reads no weights. The newest is the newest valid one that training goes on from.
    ///
    /// # Errors
    /// Refused where there is no such store or checkpoint, where config or tokenizer are not known, or are another run's; else
    /// by what the store says.
    pub async fn open(&self) -> Result<Opened, Failure> {
        let (place, step) = split(&self.from)?;
        let own = RunPaths::new(place);
        let is_run = !is_url(place) && own.config().is_file();
        let location = if is_run {
            own.store_location(&Config::load(&own.config(), &[])?)
        } else {
            place.to_owned()
        };
        let store = CheckpointStore::open_existing(&location, WriterId::fresh(Generation(0)))
            .await
            .map_err(checkpoint::failure)?;
        let found = find(&store, step).await?;
        for warning in &found.warnings {
            eprintln!("tarazed: {warning}");
        }
        let (reference, manifest) = (found.reference, found.manifest);
        let run = match &self.run_dir {
            Some(dir) => Some(RunPaths::new(dir)),
            None if is_run => Some(own),
            None => run_around(Path::new(place)),
        };
        let (path, config) = self.config(run.as_ref(), &store)?;
        let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
        check(&path, &config, &layout, &manifest)?;
        let (tokenizer, tokenizer_json) = self.tokenizer(run.as_ref(), &store, &manifest)?;
        let (entries, rows) = (tokenizer.vocabulary(), config.model.vocabulary);
        if entries > rows {
            let cause = format!("the tokenizer has {entries} entries and the model {rows} rows");
            return Err(Failure::refused("--tokenizer", cause, "name the run's own"));
        }
        Ok(Opened {
            store,
            reference,
            manifest,
            config,
            layout,
            tokenizer,
            tokenizer_json,
        })
    }

    /// The config and its file.
    fn config(&self, run: Option<&RunPaths>, store: &CheckpointStore) -> Result<(PathBuf, Config), Failure> {
        let path = match (&self.config, run) {
            (Some(path), _) => path.clone(),
            (None, Some(run)) => run.config(),
            (None, None) => {
                let cause = "a store does not hold its run's config";
                let remedy = "add --run-dir DIR, the run's folder, or --config FILE and --tokenizer FILE";
                return Err(Failure::refused(store.location(), cause, remedy));
            }
        };
        let config = Config::load(&path, &[])?;
        Ok((path, config))
    }

    fn tokenizer(
        &self,
        run: Option<&RunPaths>,
        store: &CheckpointStore,
        manifest: &Manifest,
    ) -> Result<(Tokenizer, Vec<u8>), Failure> {
        if let Some(path) = &self.tokenizer {
            let tokenizer = Tokenizer::load(path)?;
            let json = std::fs::read(path).map_err(|e| {
                let cause = format!("cannot be read ({e})");
                Failure::refused(path.display(), cause, "give the run's tokenizer.json")
            })?;
            return Ok((tokenizer, json));
        }
        if manifest.device_type == IMPORT {
            let cause = "an import was trained on no data set of this run, whose tokenizer would be its own";
            let remedy = "add --tokenizer FILE, the tokenizer.json of the folder that was imported";
            return Err(Failure::refused(store.location(), cause, remedy));
        }
        let run = run.ok_or_else(|| {
            let cause = "a store does not hold its run's tokenizer";
            let remedy =
                "add --tokenizer FILE, the tokenizer.json of the run's data set, or --run-dir DIR, the run's folder";
            Failure::refused(store.location(), cause, remedy)
        })?;
        let folder = data_set(run, manifest)?;
        Ok(DataManifest::load(&folder)?.tokenizer.load(&folder)?)
    }
}

/// The device type of a checkpoint that no device has made.
pub const IMPORT: &str = "import";

/// What stands for the run of an import: what of `[model]` decides what its weights mean. How they were initialised decides
/// nothing any more, and neither does a context that they may be trained on with.
#[must_use]
pub fn import_digest(model: &ModelConfig) -> Digest {
    let ModelConfig {
        layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        vocabulary,
        rope_theta,
        norm_eps,
        ..
    } = model;
    let text = format!(
        "tarazed import: layers={layers} hidden={hidden} ffn={ffn} heads={heads} kv_heads={kv_heads} \
         vocabulary={vocabulary} rope_theta={rope_theta:?} norm_eps={norm_eps:?}"
    );
    Digest::of(text.as_bytes())
}

/// Whether a model means the same by an import's weights; one that has them lie alike may have other heads, or turn them otherwise.
///
/// # Errors
/// Refused, of whatever names the model, where it does not.
pub fn is_what_was_imported(what: &dyn Display, model: &ModelConfig, manifest: &Manifest) -> Result<(), Failure> {
    if manifest.device_type != IMPORT || import_digest(model) == manifest.run {
        return Ok(());
    }
    let cause = "its [model] is not that of the imported weights";
    let remedy = "give sizes, vocabulary, rope_theta and norm_eps as `tarazed import` printed them";
    Err(Failure::refused(what, cause, remedy))
}

fn is_url(place: &str) -> bool {
    place.contains("://")
}

/// Place and step of `PLACE[@STEP]`; a folder whose name holds an `@` is taken as it is.
fn split(from: &str) -> Result<(&str, Option<StepsCompleted>), Failure> {
    match from.rsplit_once('@') {
        // Before a slash it is part of a path, or of a URL with credentials, which the store refuses without a word of it.
        Some((place, step)) if !step.contains('/') && !Path::new(from).is_dir() => {
            let step = step.parse().map_err(|_| {
                let remedy = "write RUN@STEP, e.g. runs/a@100";
                if is_url(from) {
                    return Failure::refused("(URL)", "what stands behind its last @ is no step", remedy);
                }
                Failure::refused(from, format!("'{step}' is no step"), remedy)
            })?;
            Ok((place, Some(StepsCompleted(step))))
        }
        _ => Ok((from, None)),
    }
}

/// The run whose own store lies in this folder.
fn run_around(store: &Path) -> Option<RunPaths> {
    let store = store.canonicalize().ok()?;
    let run = RunPaths::new(store.parent()?);
    (run.store() == store && run.config().is_file()).then_some(run)
}

async fn find(store: &CheckpointStore, step: Option<StepsCompleted>) -> Result<Restorable, Failure> {
    let found = match step {
        Some(step) => Some(store.at_step(step).await.map_err(checkpoint::failure)?),
        None => checkpoint::newest_live(store).await?,
    };
    found.ok_or_else(|| {
        Failure::refused(
            store.location(),
            "holds no checkpoint yet",
            "train until the first one, or stop the run with SIGTERM, which makes one",
        )
    })
}

/// Whether the checkpoint is of this config's run, and its weights lie where this program looks for them.
fn check(path: &Path, config: &Config, layout: &ParameterLayout, manifest: &Manifest) -> Result<(), Failure> {
    let is_of_run = |config: &Config| Digest::of(config.identity().as_bytes()) == manifest.run;
    let mut unannounced = config.clone();
    // The config of a run that was begun before there were notices of rollbacks does not say that it gives none.
    unannounced.policy.rollback_notice_steps = 0;
    let step = manifest.step;
    if manifest.device_type == IMPORT {
        is_what_was_imported(&path.display(), &config.model, manifest)?;
    } else if !is_of_run(config) && !is_of_run(&unannounced) {
        let cause = format!("the checkpoint of step {step} was made with another config");
        let remedy = "name the config.toml of its run's folder, as it was";
        return Err(Failure::refused(path.display(), cause, remedy));
    }
    let covered = u64::from(manifest.block_count) * manifest.block_elements;
    let is_laid_out = Digest::of(layout.described().as_bytes()) == manifest.layout;
    if !is_laid_out || covered != layout.flat_elements() as u64 {
        let cause = "its weights do not lie where this program looks for them";
        let remedy = match manifest.device_type == IMPORT {
            true => format!(
                "give a config with optimizer.block_elements = {}",
                manifest.block_elements
            ),
            false => "use the version of tarazed that made it".to_owned(),
        };
        return Err(Failure::refused(format!("checkpoint of step {step}"), cause, remedy));
    }
    Ok(())
}

/// The folder of the data set that the checkpoint was trained on: a run folder may hold others.
///
/// # Errors
/// Refused where it is not there; else by what is wrong with it.
pub fn data_set(run: &RunPaths, manifest: &Manifest) -> Result<PathBuf, Failure> {
    let data = run.data();
    let remedy = "name a run folder whose data are still there, or --tokenizer FILE";
    let folders = std::fs::read_dir(&data).map_err(|e| Failure::refused(data.display(), e, remedy))?;
    let mut folders: Vec<_> = folders.flatten().map(|entry| entry.path()).collect();
    folders.sort();
    for folder in folders.iter().filter(|folder| folder.join(MANIFEST_FILE).is_file()) {
        if Digest::of(DataManifest::load(folder)?.version.as_bytes()) == manifest.data {
            return Ok(folder.clone());
        }
    }
    Err(Failure::refused(
        data.display(),
        "the data set that the checkpoint was trained on is not there",
        "start `tarazed train` once with the same config: it makes the data set anew",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_may_follow_the_place() {
        for (from, place, step) in [
            ("runs/a", "runs/a", None),
            ("runs/a@120", "runs/a", Some(120)),
            ("s3://bucket/run@7", "s3://bucket/run", Some(7)),
            ("runs/me@home/a", "runs/me@home/a", None),
            ("s3://key:secret@bucket/run", "s3://key:secret@bucket/run", None),
        ] {
            assert_eq!(split(from).expect(from), (place, step.map(StepsCompleted)));
        }
        let refused = split("runs/a@last").expect_err("no number");
        assert!(
            refused.message.starts_with("runs/a@last: 'last' is no step"),
            "{refused}"
        );
    }

    #[test]
    fn a_folder_with_an_at_in_its_name_is_itself() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let named = folder.path().join("a@7");
        std::fs::create_dir(&named).expect("a folder");
        let named = named.to_str().expect("UTF-8");
        assert_eq!(split(named).expect("a folder"), (named, None));
    }

    #[test]
    fn what_a_url_holds_is_not_repeated() {
        let refused = split("s3://key:topsecret@topsecret").expect_err("no step");
        assert!(!refused.message.contains("topsecret"), "{refused}");
    }

    /// A run that goes on from an import may begin with another context, and says from where it begins.
    #[test]
    fn an_import_is_named_by_what_its_weights_mean() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/quickstart.toml");
        let digest = |overrides: &[&str]| {
            let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
            import_digest(&Config::load(Path::new(path), &overrides).expect("a good config").model)
        };
        let own = digest(&[]);
        let hash = format!("model.initial.blake3={}", "0a".repeat(32));
        for same in [
            &["model.context=64"][..],
            &["model.init_std=0.5", "model.norm_init=2.0"],
            &["run.seed=1", "optimizer.shards=3"],
            &["model.initial.from=elsewhere", &hash],
        ] {
            assert_eq!(digest(same), own, "{same:?}");
        }
        for other in [
            "layers=3",
            "ffn=64",
            "vocabulary=9999",
            "rope_theta=5e5",
            "norm_eps=1e-6",
        ] {
            assert_ne!(digest(&[&format!("model.{other}")]), own, "{other}");
        }
    }
}
