//! Invariants: each of DESIGN.md is stated in ARCHITECTURE.md, and cited by a test.

use super::source::{SourceFile, files, is_all_tests, split_tests};
use super::{assert_tidy, root};
use std::collections::BTreeSet;

/// Every invariant of DESIGN.md: family and how many it has.
const INVARIANTS: [(&str, u32); 6] = [
    ("DET", 4),
    ("SUP", 5),
    ("STEP", 6),
    ("CKPT", 6),
    ("DATA", 3),
    ("LOOP", 2),
];

/// To name an invariant here tests nothing.
const HERE: &str = "tests/tests/tidy/";

fn invariants() -> BTreeSet<String> {
    let families = INVARIANTS.iter();
    families
        .flat_map(|(family, count)| (1..=*count).map(move |number| format!("{family}-{number}")))
        .collect()
}

/// Ids such as `STEP-2` in a text, in the families of DESIGN.md.
fn cited_ids(text: &str) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    for (family, _) in INVARIANTS {
        for (at, _) in text.match_indices(family) {
            let inside_a_word = text[..at]
                .chars()
                .next_back()
                .is_some_and(|c| c.is_ascii_alphanumeric() || c == '-');
            let Some(rest) = text[at + family.len()..].strip_prefix('-') else {
                continue;
            };
            let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
            if !inside_a_word && !number.is_empty() {
                ids.insert(format!("{family}-{number}"));
            }
        }
    }
    ids
}

/// Whether this attribute, without its opening, makes a test of what follows.
fn makes_a_test(attribute: &str) -> bool {
    let end = attribute.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
    let name = &attribute[..end.unwrap_or(attribute.len())];
    name.rsplit("::").next() == Some("test")
}

/// Ids that tests cite: in the comments directly above a test, and in the module documentation of a file of tests. In any other
/// comment an id does not say what is tested.
fn tested_ids(file: &SourceFile) -> BTreeSet<String> {
    let tests = &split_tests(file)[1];
    let (mut ids, mut module) = (BTreeSet::new(), BTreeSet::new());
    let (mut above, mut is_test, mut has_tests) = (BTreeSet::new(), false, false);
    for line in tests.lines().map(str::trim) {
        if line.starts_with("//!") {
            module.extend(cited_ids(line));
        } else if line.starts_with("//") {
            above.extend(cited_ids(line));
        } else if let Some(attribute) = line.strip_prefix("#[") {
            is_test |= makes_a_test(attribute);
        } else {
            let above = std::mem::take(&mut above);
            let line = line.trim_start_matches("pub ").trim_start_matches("async ");
            if std::mem::take(&mut is_test) && line.starts_with("fn ") {
                has_tests = true;
                ids.extend(above);
            }
        }
    }
    if has_tests && is_all_tests(&file.path) {
        ids.extend(module);
    }
    ids
}

fn invariant_complaints(files: &[SourceFile], architecture: &str) -> Vec<String> {
    let files = || files.iter().filter(|file| !file.path.starts_with(HERE));
    let known = invariants();
    let tested: BTreeSet<String> = files().flat_map(tested_ids).collect();
    let stated = cited_ids(architecture);
    let untested = known.difference(&tested).map(|id| format!("no test cites {id}"));
    let unstated = known
        .difference(&stated)
        .map(|id| format!("ARCHITECTURE.md does not state {id}"));
    let mut complaints: Vec<String> = untested.chain(unstated).collect();
    for file in files() {
        for id in cited_ids(&file.text).difference(&known) {
            complaints.push(format!("{} cites {id}, which DESIGN.md does not have", file.path));
        }
    }
    complaints
}

#[test]
fn invariants_are_stated_and_cited_by_tests() {
    assert_eq!(invariants().len(), 26, "as many as DESIGN.md has");
    let architecture = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    assert_tidy(&invariant_complaints(&files(&[".rs"]), &architecture));
}

#[test]
fn uncited_unstated_and_unknown_invariants_are_found() {
    let all: Vec<String> = invariants().into_iter().collect();
    let all = all.join(", ");
    let but = |id: &str| all.replace(id, "");
    let test = |above: &str| SourceFile::made_up("runtime/x/tests/a.rs", &format!("{above}\n#[test]\nfn a() {{}}\n"));
    let cited = || test(&format!("/// {all}"));
    assert_tidy(&invariant_complaints(&[cited()], &all));
    let complaints = |file: SourceFile, architecture: &str| invariant_complaints(&[file], architecture).join("\n");
    let uncited = complaints(test(&format!("/// {}", but("DET-4"))), &all);
    assert_eq!(uncited, "no test cites DET-4");
    let unstated = complaints(cited(), &but("STEP-2"));
    assert_eq!(unstated, "ARCHITECTURE.md does not state STEP-2");
    let unknown = complaints(test(&format!("/// {all}, STEP-99")), &all);
    assert_eq!(
        unknown,
        "runtime/x/tests/a.rs cites STEP-99, which DESIGN.md does not have"
    );
}

#[test]
fn what_stands_above_a_test_is_cited_and_nothing_else() {
    let ids = |path: &str, text: &str| {
        tested_ids(&SourceFile::made_up(path, text))
            .into_iter()
            .collect::<Vec<_>>()
    };
    for cited in [
        "/// STEP-2\n#[test]\nfn a() {}",
        "#[tokio::test(flavor = \"multi_thread\")]\n// STEP-2: so\n#[ignore]\nasync fn a() {}",
        "//! STEP-2\n\n#[test]\nfn a() {}",
        "proptest! {\n    /// Whatever. STEP-2\n    #[test]\n    fn a(b in c()) {\n    }\n}",
    ] {
        assert_eq!(ids("runtime/x/tests/a.rs", cited), ["STEP-2"], "{cited}");
    }
    for not_cited in [
        "/// STEP-2\nfn helper() {}\n#[test]\nfn a() {}",
        "#[test]\nfn a() {\n    // STEP-2\n    b();\n}",
        "/// STEP-2\n\n#[test]\nfn a() {}",
        "/// STEP-2\n#[cfg(test)]\nfn a() {}",
        "#[test]\nfn a() { /* STEP-2 */ }",
        "//! STEP-2\n\npub fn helper() {}",
    ] {
        assert_eq!(ids("runtime/x/tests/a.rs", not_cited), [""; 0], "{not_cited}");
    }
    let inside = "//! STEP-1 holds.\n#[cfg(test)]\nmod tests {\n    /// STEP-2\n    #[test]\n    fn a() {}\n}\n";
    assert_eq!(ids("runtime/x/src/a.rs", inside), ["STEP-2"]);
}
