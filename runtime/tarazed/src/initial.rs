//! The checkpoint that a new run begins with, looked up before anything of the run is written: what is not there, or does not fit,
//! would otherwise show on every rank, again and again.

use crate::commands::{self, checkpoint};
use crate::exit::{Exit, Failure};
use crate::source::is_what_was_imported;
use tarazed_domain::config::{Config, InitialConfig};
use tarazed_domain::{Generation, StepsCompleted};
use tarazed_store::{CheckpointStore, Digest, Manifest, Restorable, StoreError, WriterId, folder_of};

const FROM: &str = "model.initial.from";
const BLAKE3: &str = "model.initial.blake3";

/// Whether the weights that the config begins with, if it names any, are there and fit its model. Reads no weights.
///
/// # Errors
/// Refused where the store or the checkpoint is not there, where it is another one or of another model; halted where it is damaged;
/// transient where the store does not answer.
pub fn check(config: &Config) -> Result<(), Failure> {
    match &config.model.initial {
        Some(initial) => commands::runtime()?.block_on(look_up(config, initial)),
        None => Ok(()),
    }
}

async fn look_up(config: &Config, initial: &InitialConfig) -> Result<(), Failure> {
    let (place, step) = initial.place();
    if let Some(folder) = folder_of(place).filter(|folder| folder.join("config.toml").is_file()) {
        let remedy = format!("name its store, e.g. {}", folder.join("store").display());
        return Err(Failure::refused(FROM, format!("{place} is a run's folder"), remedy));
    }
    let writer = WriterId::fresh(Generation(0));
    let store = CheckpointStore::open_existing(place, writer).await.map_err(named)?;
    let found = store.by_manifest(Digest(initial.blake3)).await.map_err(named)?;
    match found.filter(|found| step.is_none_or(|step| step == found.reference.step)) {
        Some(found) => {
            for warning in &found.warnings {
                eprintln!("tarazed: {FROM}: {warning}");
            }
            fits(config, &found.manifest)
        }
        None => Err(absent(&store, initial, step).await.unwrap_or_else(|failure| failure)),
    }
}

/// Why there is no such checkpoint: the refusal, or what kept the store from saying it.
async fn absent(
    store: &CheckpointStore,
    initial: &InitialConfig,
    step: Option<StepsCompleted>,
) -> Result<Failure, Failure> {
    let (location, wanted) = (store.location(), initial.digest());
    let there: Option<Restorable> = match step {
        Some(step) => match store.at_step(step).await {
            Err(StoreError::NotFound { .. }) => None,
            other => Some(other.map_err(named)?),
        },
        None => store.newest_valid(None).await.map_err(named)?,
    };
    let Some(there) = there else {
        let of = step.map_or_else(String::new, |step| format!(" of step {step}"));
        let cause = format!("{location} holds no checkpoint{of}");
        let remedy =
            "`tarazed checkpoint ls` says what it holds; one that its run may collect is kept by `checkpoint pin`";
        return Ok(Failure::refused(FROM, cause, remedy));
    };
    let which = step.map_or("the newest one there", |_| "the checkpoint");
    let cause = format!(
        "{which}, of step {}, has the manifest {}, and not {wanted}",
        there.reference.step, there.object.blake3
    );
    let remedy =
        format!("give that of the one that is meant, as `tarazed checkpoint show {location} --step N` prints it");
    Ok(Failure::refused(BLAKE3, cause, remedy))
}

/// Whether its weights lie where this config's do, and those of an import mean the same there. Of a run's own checkpoint the second is not
/// known: its manifest has the whole config's digest alone.
fn fits(config: &Config, manifest: &Manifest) -> Result<(), Failure> {
    let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
    if Digest::of(layout.described().as_bytes()) == manifest.layout {
        return is_what_was_imported(&"model.initial", &config.model, manifest);
    }
    let (theirs, ours) = (manifest.block_elements, layout.block_elements() as u64);
    if theirs != ours {
        let cause = format!("is {ours}, and the weights of model.initial lie in blocks of {theirs}");
        let remedy = format!(
            "set it to {theirs}, or import the weights again with --block-elements {ours}, and give the new hash"
        );
        return Err(Failure::refused("optimizer.block_elements", cause, remedy));
    }
    let cause = format!(
        "is another model: its checkpoint holds {} blocks of {theirs} elements, and this config's model {}, or as many of other tensors",
        manifest.block_count,
        layout.block_count()
    );
    let remedy =
        "give layers, hidden, ffn, heads, kv_heads and vocabulary as the model has them that was trained or imported";
    Err(Failure::refused("model.initial", cause, remedy))
}

/// What the store says, of that key.
fn named(error: StoreError) -> Failure {
    let Failure { exit, message } = checkpoint::failure(error);
    // A checkpoint whose objects are bad is a person's to mend; there is no older one to take here.
    let remedy = match exit {
        Exit::Halted => "; `tarazed checkpoint verify` looks at the whole store",
        _ => "",
    };
    Failure {
        exit,
        message: format!("{FROM}: {message}{remedy}"),
    }
}
