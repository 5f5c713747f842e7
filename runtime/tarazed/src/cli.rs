//! The command line: which commands there are. Each command's options and work stand in its own file.

use crate::commands::{
    bench, checkpoint, data, decide, eval, export, generate, gpu_check, import, node, plan, rank, resize, status,
    tokenizer, trace, train, watch,
};
use clap::{Parser, Subcommand};

/// Fault-tolerant pretraining of Aquila2-family language models.
///
/// Exit codes: 0 done; 2 refused, never retry; 3 halted with a diagnosis; 33 transient, retry; 34 stopped by a signal,
/// after a last checkpoint: the same command goes on.
#[derive(Debug, Parser)]
#[command(
    name = "tarazed",
    version,
    about,
    max_term_width = 110,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands that work.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train; a run folder that holds the run is resumed. Where the config names nodes, this is the controller alone.
    #[command(visible_alias = "controller")]
    Train(train::Args),
    /// One rank process; started by `train`.
    #[command(hide = true)]
    Rank(rank::Args),
    /// Stand for one host of a run whose ranks run on several ([[cluster.nodes]]): start, watch and end its rank processes.
    Node(node::Args),
    /// Show where a run stands.
    Status(status::Args),
    /// Show a run live, redrawn in place: figures, workers, mixture, incidents, loss curve. Ctrl-C leaves it.
    Watch(watch::Args),
    /// Change the number of ranks of a live run, at its next step boundary; the numbers do not depend on it.
    Resize(resize::Args),
    /// Pin, veto or force a decision of a live run; it is recorded in the trace like the run's own.
    Decide(decide::Args),
    /// Say what a config needs: memory per rank by term, predicted step time, what fits. Trains nothing.
    Plan(plan::Args),
    /// Look after a store of checkpoints.
    #[command(subcommand)]
    Checkpoint(checkpoint::Command),
    /// Show a committed trace, or compare two.
    #[command(subcommand)]
    Trace(trace::Command),
    /// Continue a text with a checkpoint of a run.
    Generate(generate::Args),
    /// Score a checkpoint of a run on multiple-choice questions of yours.
    Eval(eval::Args),
    /// Write a checkpoint as a Hugging Face folder, which loads as LlamaForCausalLM.
    Export(export::Args),
    /// Begin a store of checkpoints with the weights of a Hugging Face folder: the way back of export.
    Import(import::Args),
    /// Prepare data, look into them, look for benchmark text, export tokens, bring more into a running training.
    #[command(subcommand)]
    Data(data::Command),
    /// Train a tokenizer.
    #[command(subcommand)]
    Tokenizer(tokenizer::Command),
    /// Compare ways to train.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Check this machine's GPU: results, the same bits each time, speed. Exits with 2 where there is none.
    GpuCheck(gpu_check::Args),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn usage_errors_are_refusals() {
        for line in [
            &["tarazed", "no-such-command"][..],
            &["tarazed", "plan"],
            &["tarazed", "status", "--no-such"],
        ] {
            let error = Cli::try_parse_from(line).expect_err("refused");
            assert_eq!(
                error.exit_code(),
                i32::from(crate::exit::Exit::Refused.code()),
                "{line:?}"
            );
        }
    }
}
