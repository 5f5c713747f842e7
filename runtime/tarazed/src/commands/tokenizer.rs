//! `tarazed tokenizer train`: a tokenizer from text files alone.

use super::data::{NewFile, domain_of};
use crate::exit::{Exit, Failure};
use crate::output::print;
use std::io::Write as _;
use std::path::PathBuf;
use tarazed_corpus::train_tokenizer;

/// `tarazed tokenizer …`
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Train byte-level BPE, in the form that Aquila2's has; the result is a tokenizer.json that Hugging Face's library reads.
    Train(Train),
}

/// Options of `tarazed tokenizer train`.
#[derive(Debug, clap::Args)]
pub struct Train {
    /// Files or folders of JSON lines, parquet or text.
    #[arg(required = true)]
    inputs: Vec<PathBuf>,
    /// Entries, the 256 bytes and 9 special tokens included.
    #[arg(long, value_name = "N")]
    vocabulary: usize,
    /// JSON or parquet field that holds the text.
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_field: String,
    /// Text is sampled down to this many bytes, which are held in memory.
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 20)]
    train_bytes_max: u64,
    /// The file to write; it must not be there.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Refused where the input cannot be read or is too small; transient or halted where the file cannot be written.
pub fn run(command: &Command) -> Result<Exit, Failure> {
    let Command::Train(args) = command;
    if args.out.exists() {
        return Err(Failure::refused(
            args.out.display(),
            "is there already",
            "move it away, or name another file by --out",
        ));
    }
    let domains: Vec<_> = args
        .inputs
        .iter()
        .map(|path| domain_of(path, &args.text_field))
        .collect();
    let (tokenizer, json, bytes) = train_tokenizer(&domains, args.vocabulary, args.train_bytes_max)?;
    // A tokenizer.json that was cut short would be taken for one.
    let written = NewFile::create(&args.out).and_then(|mut file| {
        file.writer.write_all(json.as_bytes())?;
        file.finish()
    });
    written.map_err(|e| {
        Failure::io(
            args.out.display(),
            &e,
            "cannot be written",
            "free space, or name another file by --out",
        )
    })?;
    print(&format!(
        "{}: {} entries, trained on {:.1} MB\n",
        args.out.display(),
        tokenizer.vocabulary(),
        bytes as f64 / 1e6
    ))?;
    Ok(Exit::Done)
}
