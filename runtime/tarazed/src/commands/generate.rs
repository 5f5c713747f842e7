//! `tarazed generate RUN[@STEP] --prompt TEXT`: a checkpoint's continuation of a text.

use crate::exit::{Exit, Failure};
use crate::inference::{Inference, Sampling};
use crate::output::print;
use std::path::{Path, PathBuf};
use tarazed_domain::StepsCompleted;

/// Options of `tarazed generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder, with @STEP for another checkpoint than the newest.
    #[arg(value_name = "RUN[@STEP]")]
    run: String,
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
    let (dir, step) = place(&args.run)?;
    let runtime = super::runtime()?;
    let mut inference = runtime.block_on(Inference::open(&dir, step))?;
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

/// Folder and step of `RUN[@STEP]`; a folder whose name holds an `@` is taken as it is.
pub(super) fn place(run: &str) -> Result<(PathBuf, Option<StepsCompleted>), Failure> {
    match run.rsplit_once('@') {
        Some((dir, step)) if !Path::new(run).is_dir() => {
            let step = step.parse().map_err(|_| {
                Failure::refused(run, format!("'{step}' is no step"), "write RUN@STEP, e.g. runs/a@100")
            })?;
            Ok((dir.into(), Some(StepsCompleted(step))))
        }
        _ => Ok((run.into(), None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_may_follow_the_folder() {
        assert_eq!(place("runs/a").expect("a folder"), ("runs/a".into(), None));
        assert_eq!(
            place("runs/a@120").expect("a folder and a step"),
            ("runs/a".into(), Some(StepsCompleted(120)))
        );
        let refused = place("runs/a@last").expect_err("no number");
        assert!(
            refused.message.starts_with("runs/a@last: 'last' is no step"),
            "{refused}"
        );
    }
}
