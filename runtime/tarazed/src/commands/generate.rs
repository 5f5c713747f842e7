//! `tarazed generate RUN_OR_STORE[@STEP] --prompt TEXT`: a checkpoint's continuation of a text.

use crate::exit::{Exit, Failure};
use crate::inference::{Inference, Sampling};
use crate::output::print;
use crate::source::Source;

/// Options of `tarazed generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Beginning of the text.
    #[arg(long)]
    prompt: String,
    /// Tokens to make at most.
    #[arg(long, value_name = "N", default_value_t = 64)]
    tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f64,
    /// Draw among this many of the likeliest tokens; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: usize,
    /// Seed of the draws.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Runs the command.
///
/// # Errors
/// Refused for bad options; else by what the store says.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    if !args.temperature.is_finite() || args.temperature < 0.0 {
        return Err(Failure::refused(
            "--temperature",
            format!("is {}", args.temperature),
            "give 0 or more",
        ));
    }
    let runtime = super::runtime()?;
    let mut inference = runtime.block_on(Inference::open(&args.source))?;
    let prompt = inference.encode(&args.prompt)?;
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        seed: args.seed,
        tokens_max: args.tokens,
    };
    let text = inference.continue_from(&prompt, sampling)?;
    print(&format!("{}{}\n", args.prompt, inference.decode(&text)?))?;
    Ok(Exit::Done)
}
