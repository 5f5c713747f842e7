//! `tarazed import DIR --to STORE`: the weights of a Hugging Face folder as a checkpoint of step 0 (docs/FORMATS.md).
//!
//! Everything is checked before anything is written: the store, the config, every header, every value. Then master weights go up one
//! optimizer shard at a time, with moments of zero, and the commit comes last (CKPT-1). So the largest optimizer shard and not the
//! model must fit into memory.

use super::checkpoint;
use crate::exit::{Exit, Failure};
use crate::hugging_face::header::Stored;
use crate::hugging_face::model::{self, Unfit};
use crate::hugging_face::tensors::{Tensors, small_file};
use crate::output::print;
use crate::plan::render;
use crate::source::{IMPORT, import_digest};
use rustix::fs::{Access, access};
use serde_json::Value;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tarazed_corpus::{TOKENIZER_FILE, Tokenizer};
use tarazed_domain::config::{InitialConfig, ModelConfig};
use tarazed_domain::limits::OPTIMIZER_SHARDS_MAX;
use tarazed_domain::{Generation, ParameterLayout, ShardLayout, StepsCompleted};
use tarazed_store::{
    CheckpointStore, Depth, Digest, Lineage, Manifest, Select, ShardGeometry, ShardPayload, ShardRecord, StoreError,
    TraceHead, WriterId, folder_of,
};

/// Bytes of a `config.json`.
const CONFIG_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// The generation that shards are named by; the claim that follows makes it the first of the chain.
const GENERATION: Generation = Generation(1);
const STEP: StepsCompleted = StepsCompleted(0);
/// Optimizer shards where nobody says how many: at least so many, and of so many elements at most.
const SHARDS: u64 = 16;
const SHARD_ELEMENTS: u64 = 1 << 26;
/// How often a commit is tried whose answer is not known: a chain that is claimed cannot be begun anew.
const COMMITS: usize = 4;

/// Options of `tarazed import`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face folder of a LlamaForCausalLM: config.json and safetensors files (F32, BF16 or F16), one or several.
    #[arg(value_name = "DIR")]
    from: PathBuf,
    /// Store of checkpoints to begin: a folder or URL that holds no chain of records yet.
    #[arg(long, value_name = "STORE")]
    to: String,
    /// File to make with the [model] section for a run that begins with these weights; standard output where it is absent.
    #[arg(long, value_name = "FILE")]
    config_out: Option<PathBuf>,
    /// Rows of embedding and head, at least as many as config.json says, which it is where this is absent. Rows that are added are
    /// zero, so the tokens that they stand for begin with a logit of zero.
    #[arg(long, value_name = "N")]
    vocabulary: Option<usize>,
    /// Elements of a block, as optimizer.block_elements of the run that begins with these weights.
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    block_elements: usize,
    /// Optimizer shards that the checkpoint is cut into, 12 bytes for each parameter; a run may have another number. A rank that begins
    /// with them holds up to three at a time. 16 where this is absent, or as many as it takes for none to have more than 67,108,864
    /// parameters.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=OPTIMIZER_SHARDS_MAX))]
    shards: Option<u64>,
}

/// What is imported, before any of its values is read.
struct Found {
    model: ModelConfig,
    /// Rows that the folder has.
    tokens: usize,
    layout: ParameterLayout,
    tensors: Tensors,
    /// The tokenizer's file, or why it will not serve.
    tokenizer: Result<PathBuf, String>,
}

/// Runs the command.
///
/// # Errors
/// Refused for a folder that is not of such a model, by the key or the tensor at fault, and for a store that holds a chain; halted
/// where a disk is full; else by what the store says. What is refused before the values have been read has written nothing; what went
/// up before something failed is removed.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    let runtime = super::runtime()?;
    let config_out = args.config_out.as_deref();
    config_out.map_or(Ok(()), check_config_out)?;
    runtime.block_on(check_target(&args.to))?;
    let found = find(args)?;
    checkpoint::try_remote(&args.to)?;
    found.tensors.check_values()?;
    let imported = runtime.block_on(write(args, &found))?;
    tell(args, &found, &imported)?;
    Ok(Exit::Done)
}

/// Nothing is written over, and a place that takes no file is better known before hours of reading.
fn check_config_out(path: &Path) -> Result<(), Failure> {
    let refused = |cause: &str| {
        let remedy = "name a file to make by --config-out, in a folder that is there";
        Err(Failure::refused(path.display(), cause, remedy))
    };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    match std::fs::symlink_metadata(path) {
        Ok(_) => refused("is there already"),
        Err(_) if !parent.unwrap_or(Path::new(".")).is_dir() => refused("cannot be made: its folder is not there"),
        Err(_) => Ok(()),
    }
}

/// Whether the store is free: a chain is one run's, and an import begins one.
async fn check_target(location: &str) -> Result<(), Failure> {
    folder_of(location).map_or(Ok(()), |folder| check_folder(&folder))?;
    let writer = WriterId::fresh(Generation(0));
    let store = match CheckpointStore::open_existing(location, writer).await {
        Ok(store) => store,
        // It will be made.
        Err(StoreError::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(checkpoint::failure(error)),
    };
    check_free(&store).await?;
    if store.holds_shards().await.map_err(checkpoint::failure)? {
        let cause = "holds shards of no checkpoint: an import there was killed, or is under way";
        let remedy = "name another store by --to; one that was killed has left nothing that is of use";
        return Err(Failure::refused(store.location(), cause, remedy));
    }
    Ok(())
}

/// Whether a store can be in this folder, before anything is made there.
fn check_folder(folder: &Path) -> Result<(), Failure> {
    let refused = |cause: &str, remedy: &str| Err(Failure::refused(folder.display(), cause, remedy));
    if folder.exists() && !folder.is_dir() {
        return refused("is no folder", "name a folder or a URL by --to");
    }
    if folder.join("config.toml").is_file() {
        let remedy = "name a store of its own by --to: a run's folder holds that run's";
        return refused("is a run's folder", remedy);
    }
    let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    let there = folder.ancestors().find(|folder| folder.exists());
    match there.map(|there| access(there, Access::WRITE_OK | Access::EXEC_OK)) {
        Some(Err(error)) => refused(
            &format!("cannot be written ({error})"),
            "name a folder by --to that this user may write",
        ),
        _ => Ok(()),
    }
}

async fn check_free(store: &CheckpointStore) -> Result<(), Failure> {
    let report = store
        .verify(Select::Newest, Depth::Quick)
        .await
        .map_err(checkpoint::failure)?;
    if report.records == 0 && report.chain_problems.is_empty() {
        return Ok(());
    }
    let cause = match report.checkpoints.is_empty() {
        true => "is claimed already, by a run that has just begun or an import that was killed",
        false => "holds a chain of checkpoints already",
    };
    let remedy = "nothing is written into a chain that is there: name another store by --to";
    Err(Failure::refused(store.location(), cause, remedy))
}

/// Reads all that is small, and every header.
fn find(args: &Args) -> Result<Found, Failure> {
    let folder = &args.from;
    let path = folder.join("config.json");
    let text = small_file(&path, CONFIG_BYTES_MAX)?;
    let remedy = "give a folder of a model that this program can be: Llama's architecture, with nothing added";
    let config: Value = serde_json::from_slice(&text)
        .map_err(|e| Failure::refused(path.display(), format!("is no JSON ({e})"), remedy))?;
    let refused = |Unfit { key, cause }| Failure::refused(path.display(), format!("{key}: {cause}"), remedy);
    let mut model = model::model(&config).map_err(refused)?;
    let tokens = model.vocabulary;
    model.vocabulary = args.vocabulary.unwrap_or(tokens);
    if model.vocabulary < tokens {
        let cause = format!("is {}, and config.json has vocab_size {tokens}", model.vocabulary);
        return Err(Failure::refused(
            "--vocabulary",
            cause,
            "rows are only added: name at least as many",
        ));
    }
    model.validate(args.block_elements).map_err(|unfit| {
        let option = match unfit.key.as_str() {
            "optimizer.block_elements" => Some("--block-elements"),
            "model.vocabulary" if args.vocabulary.is_some() => Some("--vocabulary"),
            _ => None,
        };
        match option {
            Some(option) => Failure::refused(option, unfit.reason, "give another one"),
            None => Failure::refused(path.display(), format!("{}: {}", unfit.key, unfit.reason), unfit.remedy),
        }
    })?;
    let layout = tarazed_model::parameter_layout(&model, args.block_elements);
    let tensors = Tensors::open(folder, &layout, tokens)?;
    let tokenizer = tokenizer(folder, model.vocabulary)?;
    Ok(Found {
        model,
        tokens,
        layout,
        tensors,
        tokenizer,
    })
}

/// The folder's tokenizer; why it will not serve where it is not there or none of ours, for weights are good without it.
fn tokenizer(folder: &Path, rows: usize) -> Result<Result<PathBuf, String>, Failure> {
    let path = folder.join(TOKENIZER_FILE);
    if !path.is_file() {
        return Ok(Err(format!("{} is not there", path.display())));
    }
    let entries = match Tokenizer::load(&path) {
        Ok(tokenizer) => tokenizer.vocabulary(),
        Err(error) => return Ok(Err(error.to_string())),
    };
    if entries > rows {
        let cause = format!("the tokenizer has {entries} entries and the model {rows} rows");
        let remedy = format!("add rows of zeros by --vocabulary {entries}");
        return Err(Failure::refused(path.display(), cause, remedy));
    }
    let path = std::path::absolute(&path).unwrap_or(path);
    Ok(Ok(path))
}

/// One of a shard's tensors; moments share theirs.
struct Values(Arc<Vec<f32>>);

impl AsRef<[f32]> for Values {
    fn as_ref(&self) -> &[f32] {
        &self.0
    }
}

/// So many zeros; an error where there is no memory for them.
fn room(elements: usize) -> Result<Vec<f32>, Failure> {
    let mut values = Vec::new();
    values.try_reserve_exact(elements).map_err(|_| {
        let cause = format!("there is none for an optimizer shard of {elements} elements");
        Failure::refused("memory", cause, "cut the checkpoint into more by --shards")
    })?;
    values.resize(elements, 0.0);
    Ok(values)
}

/// What was committed, and the digest of its manifest.
struct Imported {
    manifest: Manifest,
    blake3: Digest,
}

async fn write(args: &Args, found: &Found) -> Result<Imported, Failure> {
    let store = CheckpointStore::open(&args.to, WriterId::fresh(Generation(0))).await;
    let store = store.map_err(checkpoint::failure)?;
    store.self_test().await.map_err(checkpoint::failure)?;
    let count = args.shards.unwrap_or_else(|| {
        let needed = (found.layout.flat_elements() as u64).div_ceil(SHARD_ELEMENTS);
        needed.clamp(SHARDS, OPTIMIZER_SHARDS_MAX)
    });
    let cut = ShardLayout::new(&found.layout, count as usize);
    let mut shards = Vec::with_capacity(cut.shard_count());
    let uploaded = upload(&store, found, &cut, &mut shards).await;
    // Hours may have passed.
    let is_free = match uploaded {
        Ok(()) => check_free(&store).await,
        Err(failure) => Err(failure),
    };
    if let Err(failure) = is_free {
        if let Err(error) = store.discard(&shards).await {
            eprintln!("tarazed: shards that went up stay in {}: {error}", store.location());
        }
        return Err(failure);
    }
    commit(&store, found, &cut, shards).await
}

/// Uploads every shard, and names those that are up.
async fn upload(
    store: &CheckpointStore,
    found: &Found,
    cut: &ShardLayout,
    shards: &mut Vec<ShardRecord>,
) -> Result<(), Failure> {
    let mut zeros = Arc::new(Vec::new());
    for shard in cut.shards() {
        let elements = cut.elements(shard);
        let mut master = room(elements.len())?;
        found.tensors.read(elements.start, &mut master)?;
        if zeros.len() != master.len() {
            zeros = Arc::new(room(master.len())?);
        }
        let tensors = [Arc::new(master), Arc::clone(&zeros), Arc::clone(&zeros)].map(Values);
        let geometry = ShardGeometry::of(cut, shard);
        let put = store.put_shard(STEP, GENERATION, &geometry, ShardPayload::new(tensors));
        shards.push(put.await.map_err(checkpoint::failure)?);
    }
    Ok(())
}

/// Claims the store and commits; a commit of which the store does not say whether it was done is asked for again, which does no harm.
async fn commit(
    store: &CheckpointStore,
    found: &Found,
    cut: &ShardLayout,
    shards: Vec<ShardRecord>,
) -> Result<Imported, Failure> {
    // The same command would find the shards, or the claim, and refuse: a person is needed.
    let unsure = |error: StoreError| {
        let cause = format!("all shards are up, and the checkpoint is not known to be committed ({error})");
        let remedy = "look with `tarazed checkpoint ls`; where it is not there, remove what the store holds, or name another one by --to";
        Failure::halted(store.location(), cause, remedy)
    };
    let fence = store.claim(GENERATION).await.map_err(unsure)?;
    let manifest = Manifest {
        run: import_digest(&found.model),
        step: STEP,
        generation: fence.generation,
        writer: store.writer(),
        block_elements: found.layout.block_elements() as u64,
        block_count: found.layout.block_count() as u32,
        shard_count: cut.shard_count() as u32,
        layout: Digest::of(found.layout.described().as_bytes()),
        data: Digest::default(),
        shards,
        decisions: b"[]".to_vec(),
        trace_head: TraceHead {
            step: STEP,
            blake3: Digest::of(b""),
            ..TraceHead::default()
        },
        binary: tarazed_actors::controller::binary_id(),
        device_type: IMPORT.to_owned(),
        lineage: Lineage::default(),
        created_unix_ms: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis() as u64,
        rollback_reach_steps: None,
    };
    let blake3 = Digest::of(&manifest.encode().map_err(checkpoint::failure)?);
    let mut committed = store.commit(&fence, &manifest).await;
    for _ in 1..COMMITS {
        if matches!(committed, Err(StoreError::Retry { .. })) {
            committed = store.commit(&fence, &manifest).await;
        }
    }
    committed.map_err(unsure)?;
    Ok(Imported { manifest, blake3 })
}

/// What was done, and the sections that a run needs: the first as comments where both go to standard output.
fn tell(args: &Args, found: &Found, checkpoint: &Imported) -> Result<(), Failure> {
    let (told, sections) = (told(args, found, checkpoint), sections(args, found, checkpoint));
    let commented = || told.lines().fold(String::new(), |text, line| text + "# " + line + "\n");
    let Some(path) = &args.config_out else {
        return print(&(commented() + "\n" + &sections));
    };
    let made = File::create_new(path).and_then(|mut file| {
        file.write_all((commented() + "\n" + &sections).as_bytes())?;
        file.sync_all()
    });
    print(&told)?;
    made.map_err(|e| {
        // The checkpoint stands, whatever became of the file.
        let _ = print(&sections);
        let remedy = "the checkpoint is committed: what was to stand there is above";
        Failure::io(path.display(), &e, "cannot be written", remedy)
    })
}

fn told(args: &Args, found: &Found, checkpoint: &Imported) -> String {
    let types = found.tensors.stored();
    let types: Vec<&str> = types
        .iter()
        .map(|stored| match stored {
            Stored::F32 => "float32",
            Stored::Bf16 => "bfloat16",
            Stored::F16 => "float16",
        })
        .collect();
    let manifest = &checkpoint.manifest;
    let files = found.tensors.files();
    let mut text = format!(
        "{}: the weights of {} as the checkpoint of step 0, {} parameters in {} from {files} {}; {} in {} shards\n",
        args.to,
        args.from.display(),
        render::parameters(found.layout.parameter_count() as u64),
        types.join(" and "),
        if files == 1 { "file" } else { "files" },
        render::bytes(manifest.shard_bytes()),
        manifest.shard_count,
    );
    // Writing to a string cannot fail.
    let added = found.model.vocabulary - found.tokens;
    if added > 0 {
        let _ = writeln!(text, "added: {added} rows of zeros to embedding and head, each");
    }
    if let Err(why) = &found.tokenizer {
        let why = why.split_whitespace().collect::<Vec<_>>().join(" ");
        let _ = writeln!(text, "no tokenizer: {why}; name another one by data.tokenizer.path");
    }
    text
}

/// `[model]`, `[model.initial]` and where the tokenizer is, as a run's config has them.
fn sections(args: &Args, found: &Found, checkpoint: &Imported) -> String {
    let ModelConfig {
        layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        context,
        vocabulary,
        rope_theta,
        norm_eps,
        init_std,
        norm_init,
        initial: _,
    } = &found.model;
    let string = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let mut text = format!(
        "[model]\nlayers = {layers}\nhidden = {hidden}\nffn = {ffn}\nheads = {heads}\nkv_heads = {kv_heads}\n\
         context = {context}\nvocabulary = {vocabulary}\nrope_theta = {rope_theta:?}\nnorm_eps = {norm_eps:?}\n\
         init_std = {init_std:?}\nnorm_init = {norm_init:?}\n"
    );
    let initial = InitialConfig {
        from: from(&args.to),
        blake3: checkpoint.blake3.0,
    };
    // Writing to a string cannot fail.
    let _ = write!(
        text,
        "\n# With optimizer.block_elements = {}, as the checkpoint has it.\n[model.initial]\nfrom = {}\nblake3 = \"{}\"\n",
        found.layout.block_elements(),
        string(&initial.from),
        initial.digest()
    );
    if let Ok(path) = &found.tokenizer {
        let path = string(&path.to_string_lossy());
        let _ = write!(text, "\n[data.tokenizer]\npath = {path}\n");
    }
    text
}

/// As `model.initial.from` names it from anywhere.
fn from(location: &str) -> String {
    let absolute = std::path::absolute(location).ok().filter(|_| !location.contains("://"));
    let place = absolute.map_or_else(|| location.to_owned(), |path| path.to_string_lossy().into_owned());
    format!("{place}@0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_named_from_anywhere() {
        let here = std::env::current_dir().expect("a working directory");
        assert_eq!(from("imported"), format!("{}/imported@0", here.display()));
        assert_eq!(from("/data/imported"), "/data/imported@0");
        assert_eq!(from("s3://bucket/imported"), "s3://bucket/imported@0");
    }

    #[test]
    fn a_file_to_make_is_none_that_is_there() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let there = folder.path().join("there.toml");
        std::fs::write(&there, "").expect("written");
        for path in [there, folder.path().to_owned(), folder.path().join("nowhere/x.toml")] {
            let refused = check_config_out(&path).expect_err("refused");
            assert_eq!(refused.exit, Exit::Refused, "{refused}");
        }
        check_config_out(&folder.path().join("new.toml")).expect("it can be made");
    }
}
