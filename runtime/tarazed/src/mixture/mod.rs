//! The honest comparison of mixtures, adaptive against static (`tarazed bench mixture`; method: docs/MIXTURE.md).
//!
//! | part | holds |
//! |---|---|
//! | [`plan`] | what is fixed before the first run: cases, arms, seeds, metrics |
//! | [`cases`] | the corpus, changed; held-out text that overlaps with training text goes |
//! | [`statics`] | the static mixtures: powers of size, UniMax, points of the simplex |
//! | [`schedule`] | which runs are due, given those that are finished: pure, so a killed bench goes on |
//! | [`record`], [`book`] | finished runs as lines of text, and the file that keeps them |
//! | [`again`] | finished runs done once more, trace against trace |
//! | [`runner`] | a run as a `tarazed train` process of its own |
//! | [`measure`] | from a trace to bits per byte |
//! | [`epochs`] | how often a run passes over each text |
//! | [`statistics`] | paired differences: intervals, exact tests, corrections |
//! | [`results`], [`report`], [`figure`] | what was found, as data, text and SVG |
//!
//! Nothing here trains or decides about training: runs are what `tarazed train` makes of a config, and all that is known of
//! them is their committed traces. By the promise (DET-1) a comparison is a function of plan, corpus, program and device
//! type, whatever was killed on the way.

pub mod again;
pub mod book;
pub mod cases;
pub mod epochs;
pub mod figure;
pub mod margin;
pub mod measure;
pub mod plan;
pub mod random;
pub mod record;
pub mod report;
pub mod results;
pub mod runner;
pub mod schedule;
pub mod statics;
pub mod statistics;

#[cfg(test)]
pub(crate) mod tests {
    use super::random::Random;
    use std::path::Path;
    use tarazed_domain::config::Config;

    /// A config of a tiny model on two small domains below `folder`.
    pub(crate) fn base(folder: &Path) -> Config {
        let write = |name: &str, text: &dyn Fn(usize) -> String| {
            let lines = (0..300).map(|i| serde_json::json!({ "text": text(i) }).to_string() + "\n");
            std::fs::write(folder.join(name), lines.collect::<String>()).expect("written");
        };
        // Drawn, so that no held-out text overlaps with training text by chance.
        let drawn = |i: usize, from: &str, count: usize| -> String {
            let mut random = Random::of(i as u64, from);
            let letters: Vec<char> = from.chars().collect();
            (0..count).map(|_| letters[random.index(0..letters.len())]).collect()
        };
        write("web.jsonl", &|i| drawn(i, "abcdefgh ij klm nop ", 120));
        write("zh.jsonl", &|i| drawn(i, "天地玄黄宇宙洪荒日月盈昃辰宿列张", 24));
        let text = "[run]\nname = \"tiny\"\nseed = 7\nsteps = 3\n\
            [model]\nlayers = 1\nhidden = 16\nffn = 16\nheads = 2\nkv_heads = 1\ncontext = 16\nvocabulary = 300\ninit_std = 0.02\n\
            [batch]\nlanes = 2\nsequences_per_lane = 1\nmicro_batch_sequences = 1\n\
            [optimizer]\nlearning_rate = 1e-3\nschedule = { kind = \"constant\", warmup_steps = 2 }\nblock_elements = 1024\n\
            [data]\nheld_out_fraction = 0.2\n\
            [[data.domains]]\nname = \"web\"\npath = \"web.jsonl\"\nlanguage = \"en\"\nweight = 1\n\
            [[data.domains]]\nname = \"zh\"\npath = \"zh.jsonl\"\nlanguage = \"zh\"\nweight = 1\n";
        let overrides = ["evaluation.interval_steps=1", "evaluation.sequences_per_domain_max=4"].map(str::to_owned);
        Config::parse(text, "base.toml", &overrides, folder).expect("a good config")
    }
}
