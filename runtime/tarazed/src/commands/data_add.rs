//! `tarazed data add`: domains of a prepared data set enter a running training at a stated step, or replace the text of some.
//!
//! The data set is linked into the run folder under the hash of its content; then the run is asked for a decision that names
//! it by that hash. Nothing changes before the decision stands in the trace, and the run refuses what it cannot find.

use super::decide::{Signer, config, domains, mixture, not_live, send};
use crate::exit::Failure;
use crate::run_folder::RunFolder;
use serde_json::json;
use std::path::{Path, PathBuf};
use tarazed_actors::later_data;
use tarazed_actors::run_folder::RunPaths;
use tarazed_corpus::{DataManifest, adopt_later, find_data_set};
use tarazed_protocol::data::decision::{DataChange, DecisionKind};

/// Options of `tarazed data add`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of a live run.
    #[arg(value_name = "RUN_DIR")]
    run_dir: PathBuf,
    /// A data set made with the run's tokenizer, or the folder that `prepare --out` named. It must stay where it is.
    #[arg(long, value_name = "DIR")]
    prepared: PathBuf,
    /// A domain of it that is to enter; all of them where none is named. May be given several times.
    #[arg(long, value_name = "NAME")]
    domain: Vec<String>,
    /// A domain of the run whose text that of the same name in the data set replaces. May be given several times.
    #[arg(long, value_name = "NAME")]
    replace: Vec<String>,
    /// Share of a new domain in the mixture from then on, between 0 and 1; the others have the rest, in their proportions. Where
    /// neither shares nor weights are given, new domains get theirs by training tokens.
    #[arg(long, value_name = "DOMAIN=SHARE", conflicts_with = "weight")]
    share: Vec<String>,
    /// Weight of a domain of the run or of a new one from then on, whatever a controller has made of the mixture; only their
    /// ratios count, and domains that are left out get nothing.
    #[arg(long, value_name = "DOMAIN=WEIGHT")]
    weight: Vec<String>,
    /// The first step (from 0) that trains on it; refused where that is too soon.
    #[arg(long, value_name = "STEP")]
    at_step: u64,
    /// Do not wait for the line that will hold it: until that is written, the request is lost if the controller ends.
    #[arg(long)]
    no_wait: bool,
    /// Who decides, and why.
    #[command(flatten)]
    signer: Signer,
}

/// Runs the command.
///
/// # Errors
/// Refused where no controller is live, where the data set does not fit the run, or with the reason why the decision cannot
/// stand.
pub fn run(args: &Args) -> Result<(), Failure> {
    let folder = RunFolder::find(Some(&args.run_dir), Path::new("runs"))?;
    if !folder.control_socket().exists() {
        return Err(not_live(&folder));
    }
    // Whoever has no name adopts nothing.
    args.signer.person()?;
    let config = config(&folder)?;
    let data = RunPaths::new(folder.dir()).data();
    let first = DataManifest::load(&find_data_set(&data)?)?;
    let names = domains(&folder, &config)?;
    let manifest = DataManifest::load(&find_data_set(&args.prepared)?)?;
    let unfit = |reason: String| {
        Failure::refused(
            args.prepared.display(),
            reason,
            "`tarazed data inspect` shows what it holds",
        )
    };
    let editions =
        later_data::editions(&manifest, config.model.context, &names, &args.domain, &args.replace).map_err(unfit)?;
    let new: Vec<String> = editions
        .iter()
        .filter(|edition| usize::from(edition.domain) >= names.len())
        .map(|edition| edition.name.clone())
        .collect();
    let weights = if args.weight.is_empty() {
        shares(&new, &args.share)?
    } else {
        mixture(&[names, new].concat(), &args.weight)?
    };
    // What the run refuses all the same leaves a link that nothing refers to.
    let adopted = adopt_later(&args.prepared, &first, config.model.context, &data)?;
    if adopted.version != manifest.version {
        return Err(unfit("was changed while it was looked at".to_owned()));
    }
    let change = DataChange {
        version: adopted.version,
        domains: editions,
        weights,
    };
    let kind = json!(DecisionKind::Data(change));
    send(&folder, kind, &args.signer, Some(args.at_step), args.no_wait)
}

/// A share for each new domain, or for none.
fn shares(new: &[String], items: &[String]) -> Result<Vec<f64>, Failure> {
    if items.is_empty() {
        return Ok(Vec::new());
    }
    let shares = mixture(new, items)?;
    if let Some(without) = shares.iter().position(|share| *share <= 0.0) {
        return Err(Failure::refused(
            "--share",
            format!("says nothing of '{}'", new[without]),
            "give one for each new domain, or none at all",
        ));
    }
    Ok(shares)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_new_domain_has_a_share_or_none_has() {
        let new = ["code", "book"].map(str::to_owned);
        let shares = |items: &[&str]| shares(&new, &items.iter().map(|&item| item.to_owned()).collect::<Vec<_>>());
        assert_eq!(shares(&[]).expect("by size"), Vec::<f64>::new());
        assert_eq!(shares(&["book=0.1", "code=0.2"]).expect("both"), [0.2, 0.1]);
        for (items, part) in [
            (&["book=0.1"][..], "nothing of 'code'"),
            (&["book=0.1", "code=0"], "nothing of 'code'"),
            (&["web=0.1"], "names no domain"),
        ] {
            let refused = shares(items).expect_err(part).to_string();
            assert!(refused.contains(part), "{refused}");
        }
    }
}
