//! What a finished run shows at its end: held-out loss beside a baseline, a sample in each language, what to try next.

use crate::exit::Failure;
use crate::inference::{Inference, Sampling};
use crate::output::print;
use crate::source::{self, Source};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use tarazed_actors::run_folder::{self, RunPaths};
use tarazed_corpus::{ScoredText, Split, TokenStore, UnigramLoss};
use tarazed_domain::config::Config;
use tarazed_domain::{DomainIndex, StepsCompleted};
use tarazed_protocol::trace::{DomainLoss, DomainMap};

/// Tokens of held-out text that a sample goes on from.
const PROMPT_TOKENS: usize = 24;
/// Tokens of a sample.
const SAMPLE_TOKENS: usize = 48;

/// Prints the end of the run in `dir`. A run that is done stays done whatever goes wrong here, so callers print the
/// failure and go on.
///
/// # Errors
/// If the checkpoint, the data or the trace cannot be read back.
pub fn tell(dir: &Path, config_file: &Path) -> Result<(), Failure> {
    let runtime = crate::commands::runtime()?;
    let opened = runtime.block_on(Source::of_run(dir).open())?;
    let data_set = source::data_set(&RunPaths::new(dir), &opened.manifest)?;
    let data = TokenStore::open(&data_set, opened.config.model.context)?;
    let mut inference = runtime.block_on(Inference::load(opened))?;
    let trace = RunPaths::new(dir).trace();
    let lines =
        run_folder::lines_after(&trace, StepsCompleted(0)).map_err(|e| Failure::refused(e.path, e.cause, e.remedy))?;
    let evaluated = lines
        .iter()
        .rev()
        .find_map(|line| line.heldout.as_ref().map(|losses| (line.step, losses)));
    if let Some((step, losses)) = evaluated {
        let sequences_max = u64::from(inference.config.evaluation.sequences_per_domain_max);
        let unigram = data.unigram_losses(sequences_max)?;
        let scored = data.scored_text(sequences_max)?;
        print(&held_out(step, &by_language(losses, &inference.config, &unigram)))?;
        print(&bits_per_byte(losses, &inference.config, &scored))?;
    }
    for (language, domain) in languages(&inference.config) {
        if let Some(sample) = sample(&mut inference, &data, domain)? {
            print(&format!(
                "sample, {language} ({domain_name}): {sample}\n",
                domain_name = inference.config.data.domains[domain.index()].name
            ))?;
        }
    }
    print(&next(dir, config_file, &inference.config))
}

/// A language's figures, in nats per token over the same targets.
#[derive(Clone, Copy, PartialEq, Debug)]
struct LanguageLoss {
    model: f64,
    unigram: f64,
}

/// Losses weighted by tokens; beside them the loss of the same sequences under the token frequencies of their language's
/// training text. A domain whose two losses are not over as many tokens is left out: they would be of different texts.
fn by_language(
    losses: &DomainMap<DomainLoss>,
    config: &Config,
    unigram: &[Option<UnigramLoss>],
) -> BTreeMap<&'static str, LanguageLoss> {
    let mut sums: BTreeMap<&'static str, [f64; 3]> = BTreeMap::new();
    for (domain, unigram) in config.data.domains.iter().zip(unigram) {
        let (Some(loss), Some(unigram)) = (losses.get(&domain.name), unigram) else {
            continue;
        };
        if loss.tokens != unigram.tokens {
            continue;
        }
        let tokens = loss.tokens as f64;
        let sum = sums.entry(domain.language.name()).or_default();
        *sum = [
            sum[0] + loss.loss * tokens,
            sum[1] + unigram.loss * tokens,
            sum[2] + tokens,
        ];
    }
    sums.into_iter()
        .map(|(language, [model, unigram, tokens])| {
            let loss = LanguageLoss {
                model: model / tokens,
                unigram: unigram / tokens,
            };
            (language, loss)
        })
        .collect()
}

fn held_out(step: StepsCompleted, losses: &BTreeMap<&'static str, LanguageLoss>) -> String {
    let mut text =
        format!("\nheld-out loss at step {step}, in nats per token; in brackets what token frequencies alone give\n");
    for (language, loss) in losses {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "  {language:<5} {:.3}  (unigram {:.3}: {:+.0}%)",
            loss.model,
            loss.unigram,
            100.0 * (loss.model / loss.unigram - 1.0)
        );
    }
    text.push('\n');
    text
}

/// Held-out losses in bits per UTF-8 byte of the text that was scored, `nats / ln 2 / bytes` (Gao et al., arXiv 2101.00027,
/// section 3.1): by language, its bits over its bytes, and by domain. A number that does not depend on the tokenizer.
fn bits_per_byte(losses: &DomainMap<DomainLoss>, config: &Config, scored: &[ScoredText]) -> String {
    let mut languages: BTreeMap<&'static str, (f64, f64, String)> = BTreeMap::new();
    for (domain, scored) in config.data.domains.iter().zip(scored) {
        // Of a trace that was made with another evaluation, the tokens are others.
        let Some(loss) = losses.get(&domain.name).filter(|loss| loss.tokens == scored.tokens) else {
            continue;
        };
        if scored.text_bytes <= 0.0 {
            continue;
        }
        let bits = loss.loss * loss.tokens as f64 / std::f64::consts::LN_2;
        let (all_bits, all_bytes, named) = languages.entry(domain.language.name()).or_default();
        *all_bits += bits;
        *all_bytes += scored.text_bytes;
        // Writing to a string cannot fail.
        let _ = write!(named, "  {} {:.3}", domain.name, bits / scored.text_bytes);
    }
    if languages.is_empty() {
        return String::new();
    }
    let mut text = "the same in bits per byte of text; behind it each domain's\n".to_owned();
    for (language, (bits, bytes, named)) in languages {
        let _ = writeln!(text, "  {language:<5} {:.3}  {named}", bits / bytes);
    }
    text.push('\n');
    text
}

/// The first domain of each language.
fn languages(config: &Config) -> Vec<(&'static str, DomainIndex)> {
    let mut found: Vec<(&'static str, DomainIndex)> = Vec::new();
    for (index, domain) in config.data.domains.iter().enumerate() {
        let language = domain.language.name();
        if found.iter().all(|(known, _)| *known != language) {
            found.push((language, DomainIndex(index as u16)));
        }
    }
    found
}

/// The model's continuation of the domain's first held-out text, which it never trained on.
fn sample(inference: &mut Inference, data: &TokenStore, domain: DomainIndex) -> Result<Option<String>, Failure> {
    let context = inference.config.model.context;
    if data.sequences(domain, Split::HeldOut) == 0 {
        return Ok(None);
    }
    let mut tokens = vec![0; context + 1];
    data.fill(domain, Split::HeldOut, 0, &mut tokens)?;
    tokens.truncate(PROMPT_TOKENS);
    let mut prompt = inference.decode(&tokens)?;
    while prompt.ends_with(char::REPLACEMENT_CHARACTER) && tokens.len() > 1 {
        tokens.pop(); // a character cut in two
        prompt = inference.decode(&tokens)?;
    }
    let sampling = Sampling {
        temperature: 0.7,
        top_k: 40,
        seed: inference.config.run.seed,
        tokens_max: SAMPLE_TOKENS,
    };
    let made = inference.continue_from(&tokens, sampling)?;
    let made = inference.decode(&made)?;
    let made = made.trim_end_matches(char::REPLACEMENT_CHARACTER);
    Ok(Some(one_line(&format!("{prompt} ⟶ {made}"))))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn next(dir: &Path, config_file: &Path, config: &Config) -> String {
    let (dir, config_file, name) = (dir.display(), config_file.display(), &config.run.name);
    let other = if config.cluster.ranks == 3 {
        2
    } else {
        3.min(config.batch.lanes)
    };
    let text = format!(
        "\nnext, with `tarazed` for target/release/tarazed:
  tarazed generate {dir} --prompt \"…\"                      go on from a text of yours
  tarazed train {config_file} --ranks {other} --run-dir runs/{name}-{other}     the same run on {other} ranks; while it runs:
    kill -9 $(pgrep -f 'tarazed rank' | head -1)             a rank dies and comes back
    kill -TERM $(pgrep -of 'tarazed train')                  stop after a checkpoint; the same command goes on
  tarazed trace diff {dir} runs/{name}-{other}               exit code 0: bit for bit the same training
  your own text: copy {config_file}, name jsonl, parquet or text folders in [[data.domains]]\n"
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_compares_with_the_baseline() {
        let losses = BTreeMap::from([(
            "en",
            LanguageLoss {
                model: 4.5,
                unigram: 6.0,
            },
        )]);
        let text = held_out(StepsCompleted(600), &losses);
        assert!(
            text.contains("step 600") && text.contains("en    4.500  (unigram 6.000: -25%)"),
            "{text}"
        );
    }

    /// Both figures of a language weigh its domains alike, and a domain that was not scored whole counts in neither.
    #[test]
    fn both_figures_are_of_the_same_tokens() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/quickstart.toml");
        let config = Config::load(Path::new(path), &[]).expect("a good config");
        let losses: DomainMap<DomainLoss> = serde_json::from_str(
            r#"{"book-en":{"loss":4.0,"tokens":100},"help-en":{"loss":5.0,"tokens":300},"manual-en":{"loss":9.0,"tokens":7}}"#,
        )
        .expect("losses");
        let unigram: Vec<Option<UnigramLoss>> = config
            .data
            .domains
            .iter()
            .map(|domain| match domain.name.as_str() {
                "book-en" => Some((6.0, 100)),
                "help-en" => Some((7.0, 300)),
                "manual-en" => Some((1.0, 8)),
                _ => None,
            })
            .map(|found| found.map(|(loss, tokens)| UnigramLoss { loss, tokens }))
            .collect();
        let found = by_language(&losses, &config, &unigram);
        let expected = LanguageLoss {
            model: 4.75,
            unigram: 6.75,
        };
        assert_eq!(found, BTreeMap::from([("en", expected)]));
    }

    /// A language's bits over its bytes are no mean of its domains'; what was not scored as it would be now is left out.
    #[test]
    fn bits_are_over_the_bytes_of_the_very_text() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/quickstart.toml");
        let config = Config::load(Path::new(path), &[]).expect("a good config");
        let losses: DomainMap<DomainLoss> = serde_json::from_str(
            r#"{"book-en":{"loss":2.772588722239781,"tokens":100},"help-en":{"loss":1.3862943611198906,"tokens":300},"manual-en":{"loss":9.0,"tokens":7}}"#,
        )
        .expect("losses");
        let of = |tokens, text_bytes| ScoredText { tokens, text_bytes };
        let scored: Vec<ScoredText> = config
            .data
            .domains
            .iter()
            .map(|domain| match domain.name.as_str() {
                "book-en" => of(100, 200.0),
                "help-en" => of(300, 1_200.0),
                "manual-en" => of(8, 30.0),
                _ => ScoredText::default(),
            })
            .collect();
        let text = bits_per_byte(&losses, &config, &scored);
        // 400 bits over 200 bytes, 600 over 1,200, 1,000 over 1,400.
        let rows: Vec<&str> = text.lines().skip(1).filter(|line| !line.is_empty()).collect();
        assert_eq!(rows.len(), 1, "{text}");
        let mut words: Vec<&str> = rows[0].split_whitespace().collect();
        assert_eq!(words.drain(..2).collect::<Vec<_>>(), ["en", "0.714"], "{text}");
        let pairs: BTreeMap<&str, &str> = words.chunks(2).map(|pair| (pair[0], pair[1])).collect();
        assert_eq!(
            pairs,
            BTreeMap::from([("book-en", "2.000"), ("help-en", "0.500")]),
            "{text}"
        );
        assert_eq!(bits_per_byte(&DomainMap::default(), &config, &scored), "");
    }

    #[test]
    fn each_language_shows_its_first_domain() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/quickstart.toml");
        let config = Config::load(Path::new(path), &[]).expect("a good config");
        let shown: Vec<_> = languages(&config)
            .into_iter()
            .map(|(language, domain)| (language, config.data.domains[domain.index()].name.as_str()))
            .collect();
        assert_eq!(shown, [("zh", "classic-zh"), ("en", "book-en"), ("code", "code")]);
    }
}
