//! Data without a run: what `tarazed data prepare` reads, from a run's config or from a file with `[data]` alone.

use super::{ConfigError, DataConfig, absolute, reading, validate};
use serde::Deserialize;
use std::path::Path;

/// The data of a config, and what of the model matters to it.
#[derive(Clone, PartialEq, Debug)]
pub struct DataFile {
    /// Domains, tokenizer, refinement.
    pub data: DataConfig,
    /// Rows of the model's embedding, if the file has a model; else what the tokenizer may have.
    pub model_vocabulary: usize,
    /// Context length, if the file has a model; else 1, so that any text will do.
    pub context: usize,
}

/// The parts of a file that are looked at; a run's other sections are the run's.
#[derive(Deserialize)]
struct Parts {
    data: DataConfig,
    model: Option<Model>,
}

#[derive(Deserialize)]
struct Model {
    vocabulary: usize,
    context: usize,
}

/// Top-level sections that a run's config has.
const SECTIONS: [&str; 13] = [
    "run",
    "model",
    "batch",
    "optimizer",
    "data",
    "mixture",
    "policy",
    "evaluation",
    "checkpoint",
    "cluster",
    "fault",
    "monitor",
    "telemetry",
];

impl DataFile {
    /// Reads `path`, a run's config or a file with a `[data]` section alone, applies `key=value` overrides, makes paths
    /// absolute and validates the data.
    ///
    /// # Errors
    /// A [`ConfigError`] naming the key or the file.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let text = reading::text_of(
            path,
            "give the path of a run's config, or of a file with a [data] section",
        )?;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        Self::parse(&text, &name, overrides, folder.unwrap_or_else(|| Path::new(".")))
    }

    /// As [`DataFile::load`], from text; `name` stands for the file in messages.
    ///
    /// # Errors
    /// A [`ConfigError`] naming the key.
    pub fn parse(text: &str, name: &str, overrides: &[String], folder: &Path) -> Result<Self, ConfigError> {
        let source = reading::Source::new(text, name, overrides)?;
        source.only(&SECTIONS)?;
        let Parts { mut data, model } = source.read()?;
        data.resolve(folder)?;
        let model_vocabulary = match (&model, &data.tokenizer.path) {
            (Some(model), _) => model.vocabulary,
            (None, Some(_)) => u32::MAX as usize,
            (None, None) => data.tokenizer.vocabulary,
        };
        if model_vocabulary == 0 {
            let remedy = "set it, e.g. to 32000, or name a ready tokenizer by data.tokenizer.path";
            return Err(ConfigError::new(
                "data.tokenizer.vocabulary",
                "is 0, and the file has no model",
                remedy,
            ));
        }
        validate::data(&data, model_vocabulary)?;
        Ok(Self {
            data,
            model_vocabulary,
            context: model.map_or(1, |model| model.context.max(1)),
        })
    }
}

impl DataConfig {
    /// Makes every path absolute; sources are relative to `folder`, the config file's.
    pub(super) fn resolve(&mut self, folder: &Path) -> Result<(), ConfigError> {
        if let Some(path) = &mut self.prepared {
            *path = absolute("data.prepared", &folder.join(&*path))?;
        }
        for (index, domain) in self.domains.iter_mut().enumerate() {
            let key = format!("data.domains[{index}].path");
            if domain.path.as_os_str().is_empty() {
                if self.prepared.is_some() {
                    continue;
                }
                return Err(ConfigError::new(key, "is empty", "name the domain's file or folder"));
            }
            domain.path = absolute(&key, &folder.join(&domain.path))?;
        }
        for (index, later) in self.later.iter_mut().enumerate() {
            let key = format!("data.later[{index}].prepared");
            if later.prepared.as_os_str().is_empty() {
                return Err(ConfigError::new(
                    key,
                    "is empty",
                    "name a folder that `tarazed data prepare` wrote",
                ));
            }
            later.prepared = absolute(&key, &folder.join(&later.prepared))?;
        }
        if let Some(path) = &mut self.tokenizer.path {
            *path = absolute("data.tokenizer.path", &folder.join(&*path))?;
        }
        for set in self.refine.iter_mut().flat_map(|refine| &mut refine.decontaminate.sets) {
            let key = format!("data.refine.decontaminate.sets, '{}'", set.name);
            set.path = absolute(&key, &folder.join(&set.path))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: &str = "[data.tokenizer]\nvocabulary = 400\n[[data.domains]]\nname = \"web\"\npath = \"a.jsonl\"\nlanguage = \"en\"\nweight = 1.0\n";

    fn parse(text: &str, overrides: &[&str]) -> Result<DataFile, ConfigError> {
        let overrides: Vec<String> = overrides.iter().map(|&item| item.to_owned()).collect();
        DataFile::parse(text, "data.toml", &overrides, Path::new("/somewhere"))
    }

    #[test]
    fn a_file_with_data_alone_is_enough() {
        let file = parse(DATA, &[]).unwrap();
        assert_eq!(file.data.domains[0].path, Path::new("/somewhere/a.jsonl"));
        assert_eq!((file.model_vocabulary, file.context), (400, 1));
        assert!(file.data.refine.is_none());
        let refined = parse(&format!("{DATA}[data.refine]\n"), &[]).unwrap();
        assert_eq!(refined.data.refine, Some(super::super::RefineConfig::default()));
    }

    #[test]
    fn wrong_data_is_refused_by_key() {
        for (overrides, message) in [
            (&["data.tokenizer.vocabulary=0"][..], "data.tokenizer.vocabulary: is 0"),
            (&["dat.x=1"], "unknown section 'dat'"),
            (&["data.refine.duplicates.bands=0"], "data.refine.duplicates.bands"),
            (&["data.refine.duplicates.rows=1000"], "data.refine.duplicates"),
            (&["data.refine.memory_bytes_max=1000"], "data.refine.memory_bytes_max"),
            (
                &["data.refine.quality.exempt=[\"no\"]"],
                "data.refine.quality.exempt: 'no' is no domain",
            ),
            (
                &["data.refine.language.share_min=1.5"],
                "data.refine.language.share_min",
            ),
            (
                &["data.refine.decontaminate.words=2"],
                "data.refine.decontaminate.words",
            ),
        ] {
            let error = parse(DATA, overrides).expect_err("refused").to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
