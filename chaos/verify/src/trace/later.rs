//! Data sets that enter a run by a decision: found under their version in the run's `data`, read from the first byte to the
//! last, and compared with what the decision says of them.

use super::data::DataSet;
use super::line::Change;
use crate::report::Findings;
use std::path::PathBuf;

pub struct Later {
    data: PathBuf,
    context: u64,
    tokenizer: [u8; 32],
    known: Vec<(String, DataSet)>,
    /// Bytes that were hashed.
    pub hashed: u64,
}

impl Later {
    /// For a run that keeps its data sets in `data`, and began with tokens of this tokenizer.
    pub const fn new(data: PathBuf, context: u64, tokenizer: [u8; 32]) -> Self {
        Self {
            data,
            context,
            tokenizer,
            known: Vec::new(),
            hashed: 0,
        }
    }

    /// Looks up what a change brings, and takes over what each domain holds out. Says what is not as the decision says.
    pub fn look_up(&mut self, change: &mut Change, findings: &mut Findings) -> Result<(), String> {
        if !self.known.iter().any(|(version, _)| *version == change.version) {
            let folder = self.data.join(&change.version);
            let set = DataSet::load(&folder, self.context).map_err(|why| format!("{}: {why}", folder.display()))?;
            if set.version != *blake3::hash(change.version.as_bytes()).as_bytes() {
                return Err(format!("{}: holds another data set", folder.display()));
            }
            if set.tokenizer() != self.tokenizer {
                return Err(format!("{}: another tokenizer than the run's", folder.display()));
            }
            self.hashed += set.check_files(findings);
            self.known.push((change.version.clone(), set));
        }
        let Some((_, set)) = self.known.iter().find(|(version, _)| *version == change.version) else {
            return Ok(()); // it was put there above
        };
        for edition in &mut change.editions {
            let held = set.domains.get(usize::from(edition.index));
            let held = held.filter(|held| {
                let said = (&edition.name, edition.train_sequences, edition.train_tokens);
                (&held.name, held.train_sequences, held.train_tokens) == said
            });
            let Some(held) = held else {
                return Err(format!("its data set has no such domain as '{}'", edition.name));
            };
            edition.held_out_sequences = held.held_out_sequences;
        }
        Ok(())
    }
}
