//! The README's first command, as it stands there: what a newcomer sees in the first minutes.

use std::path::Path;
use tarazed_domain::config::Config;
use tarazed_tests::harness::{Project, Run};

/// Steps within which a run is waited for at a time.
const STRIDE_STEPS: usize = 20;
/// By how much held-out loss must be below what token frequencies alone give.
const BELOW_UNIGRAM: f64 = 0.08;

/// The whole quickstart, with a rank killed on the way as its own last words suggest: it says what it does from the beginning,
/// loses no step, trains what one rank alone trains, and ends with held-out losses well below the unigram entropy, a sample in each language, and what to try next.
#[test]
fn the_quickstart_does_what_the_readme_says() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart.toml");
    let config = Config::load(&file, &[]).expect("the quickstart's config");
    let languages = ["code", "en", "zh"];
    assert!(config.data.domains.len() >= 5 && config.cluster.ranks == 4);

    let project = Project::of(&file.canonicalize().expect("a file"));
    let mut run = Run::start(&project.train("quickstart"));
    for step in (STRIDE_STEPS..=config.run.steps as usize).step_by(STRIDE_STEPS) {
        run.wait_for_step(step as u64);
        if step == 5 * STRIDE_STEPS {
            run.wait_for("a rank to kill", |run| run.kill_rank(2));
        }
    }
    let outcome = run.finish();
    outcome.assert_code(0);
    let said = format!("{}\n{}", outcome.stdout, outcome.stderr);

    let trace = run.json_lines("trace.jsonl");
    let steps: Vec<_> = trace.iter().filter_map(|line| line["step"].as_u64()).collect();
    assert_eq!(steps, (1..=config.run.steps).collect::<Vec<_>>(), "each step once");
    assert_eq!(run.events("recovered").len(), 1, "{}", run.tail());

    let mut expected: Vec<String> = [
        "tokenizer: ",
        "generation ",
        "step   1/",
        "4/4 ranks",
        "\nnext, ",
        "trace diff",
    ]
    .map(str::to_owned)
    .into();
    expected.extend(
        config
            .data
            .domains
            .iter()
            .map(|domain| format!("domain {} (", domain.name)),
    );
    expected.extend((0..4).map(|worker| format!("worker {worker} (incarnation 0): ready")));
    expected.extend(languages.map(|language| format!("sample, {language} (")));
    for part in &expected {
        assert!(said.contains(part.as_str()), "'{part}' is not said\n{}", run.tail());
    }

    let undisturbed = beginning_on_one_rank(&project);
    let beginning = std::fs::read(run.dir().join("trace.jsonl")).expect("a trace");
    assert!(
        beginning.starts_with(&undisturbed),
        "one rank alone trains something else"
    );

    for language in languages {
        let of_it = |line: &&str| line.split_whitespace().next() == Some(language) && line.contains("(unigram ");
        let line = said.lines().find(of_it).expect("a line for each language");
        let numbers: Vec<f64> = line
            .split(|c: char| !c.is_ascii_digit() && c != '.')
            .filter_map(|word| word.parse().ok())
            .collect();
        let (loss, unigram) = (numbers[0], numbers[1]);
        assert!(loss < (1.0 - BELOW_UNIGRAM) * unigram, "{line}");
    }
}

/// Whole lines of the same run on one rank, as far as it is waited for.
fn beginning_on_one_rank(project: &Project) -> Vec<u8> {
    let mut alone = Run::start(&project.train("alone").ranks(1));
    alone.wait_for_step(2 * STRIDE_STEPS as u64);
    let mut trace = std::fs::read(alone.dir().join("trace.jsonl")).expect("a trace");
    let end = trace.iter().rposition(|&byte| byte == b'\n').expect("a line");
    trace.truncate(end + 1);
    trace
}
