//! The house rules that a machine can check: floors, folders, sizes, invariants cited by tests, no stubs, no arithmetic of
//! the host's.
//!
//! Each rule is a function from plain data to a list of complaints. It runs on the project, where it must find nothing, and
//! on a made-up violation, where it must find something: a check that cannot fail is no check.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tarazed_domain::config::Config;

/// Floor and folder of every crate (DESIGN.md section 12). A dependency points to a strictly lower floor.
const FLOORS: [(&str, u8, &str); 14] = [
    ("tarazed-domain", 0, "runtime/domain"),
    ("tarazed-protocol", 1, "runtime/protocol"),
    ("tarazed-kernels", 1, "kernels"),
    ("tarazed-model", 2, "runtime/model"),
    ("tarazed-store", 2, "runtime/store"),
    ("tarazed-corpus", 2, "runtime/corpus"),
    ("tarazed-fabric", 2, "runtime/fabric"),
    ("tarazed-train", 3, "runtime/train"),
    ("tarazed-actors", 4, "actors"),
    ("tarazed", 5, "runtime/tarazed"),
    ("tarazed-chaos", 5, "chaos"),
    ("tarazed-verify", 5, "chaos/verify"),
    // It needs nobody; the tests, one floor up, start it.
    ("tarazed-s3", 5, "tests/s3"),
    ("tarazed-tests", 6, "tests"),
];

/// Judges what runs leave behind, and so shares nothing with them: neither a crate of the workspace nor the serializer of
/// their formats.
const INDEPENDENT: &str = "tarazed-verify";
const SERIALIZERS: [&str; 5] = ["bytecheck", "rkyv", "rkyv_derive", "safetensors", "serde"];

/// Entries of the root folder that must be there.
const ROOT_REQUIRED: [&str; 17] = [
    ".ci",
    ".gitignore",
    "ARCHITECTURE.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "actors",
    "chaos",
    "clippy.toml",
    "configs",
    "deny.toml",
    "docs",
    "kernels",
    "runtime",
    "rustfmt.toml",
    "tests",
];
/// Entries that may be there: what git ignores, git itself, and what is to come.
const ROOT_ALLOWED: [&str; 5] = [".git", ".gitattributes", "deploy", "runs", "target"];

/// Lines of one source file.
const FILE_LINES_MAX: usize = 800;

/// Where `unsafe` may stand: kernels and devices, process handling, limits of a test's process, and measuring tools.
const UNSAFE_ALLOWED: [&str; 8] = [
    "actors/src/node/lifeline.rs",
    "actors/src/node/process.rs",
    "kernels/examples/compile_report.rs",
    "kernels/src/",
    "kernels/tests/emulated_banks.rs",
    "kernels/tests/emulator.rs",
    "runtime/corpus/tests/full_disk.rs",
    "runtime/model/examples/step_speed.rs",
];

/// Code whose results reach the trace, a checkpoint or a data set: no number in it may come from the host's C library.
const NUMBERS: [&str; 6] = [
    "kernels/src/",
    "runtime/corpus/src/",
    "runtime/domain/src/",
    "runtime/model/src/",
    "runtime/protocol/src/",
    "runtime/train/src/",
];
/// The oracle of the kernels is compared within bounds and reaches no run; it is the better for other functions than theirs.
const NUMBERS_EXEMPT: &str = "kernels/src/conformance/";
/// Methods of floats that call the host's C library, or whose precision Rust leaves open. `sqrt` and `mul_add` are exact.
const HOST_FUNCTIONS: [&str; 28] = [
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "exp", "exp2", "exp_m1",
    "gamma", "hypot", "ln", "ln_1p", "ln_gamma", "log", "log10", "log2", "powf", "powi", "sin", "sin_cos", "sinh",
    "tan", "tanh",
];

/// Every invariant of DESIGN.md: family and how many it has.
const INVARIANTS: [(&str, u32); 6] = [
    ("DET", 4),
    ("SUP", 5),
    ("STEP", 6),
    ("CKPT", 6),
    ("DATA", 3),
    ("LOOP", 2),
];

/// The invariants that are implemented: each must be cited by a test, and stated in ARCHITECTURE.md.
const IMPLEMENTED: [&str; 25] = [
    "CKPT-1", "CKPT-2", "CKPT-3", "CKPT-4", "CKPT-5", "CKPT-6", "DATA-1", "DATA-2", "DATA-3", "DET-1", "DET-2",
    "DET-3", "LOOP-1", "LOOP-2", "STEP-1", "STEP-2", "STEP-3", "STEP-4", "STEP-5", "STEP-6", "SUP-1", "SUP-2", "SUP-3",
    "SUP-4", "SUP-5",
];

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    root.canonicalize().expect("the project's root folder")
}

/// A project file: its path from the root, with forward slashes, and its text.
struct SourceFile {
    path: String,
    text: String,
}

impl SourceFile {
    fn made_up(path: &str, text: &str) -> Self {
        Self {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }
}

/// All text files of the project with one of the given endings; build output, runs and hidden folders but `.ci` are left out.
fn files(endings: &[&str]) -> Vec<SourceFile> {
    let root = root();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a readable folder") {
            let path = entry.expect("a readable entry").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let relative = path
                .strip_prefix(&root)
                .expect("below the root")
                .to_string_lossy()
                .into_owned();
            if path.is_symlink() {
                continue;
            } else if path.is_dir() {
                let hidden = name.starts_with('.') && name != ".ci";
                if !hidden && relative != "target" && relative != "runs" && name != "__pycache__" {
                    folders.push(path);
                }
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{relative}: {e}"));
                found.push(SourceFile { path: relative, text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

#[track_caller]
fn assert_tidy(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

// --- floors ---------------------------------------------------------------------------------------------------------

/// A crate of the workspace: its folder and the crates of the workspace it depends on, in any way.
type Crates = BTreeMap<String, (String, Vec<String>)>;

fn workspace_crates() -> Crates {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let list = |value: &Value| value.as_array().expect("a list").clone();
    list(&metadata["packages"])
        .iter()
        .map(|package| {
            let manifest = PathBuf::from(text(&package["manifest_path"]))
                .canonicalize()
                .expect("a manifest");
            let folder = manifest
                .parent()
                .expect("a folder")
                .strip_prefix(root())
                .expect("below the root")
                .to_owned();
            let local = list(&package["dependencies"])
                .into_iter()
                .filter(|d| d["path"].is_string());
            let dependencies = local.map(|d| text(&d["name"])).collect();
            (
                text(&package["name"]),
                (folder.to_string_lossy().into_owned(), dependencies),
            )
        })
        .collect()
}

fn floor_complaints(crates: &Crates) -> Vec<String> {
    let floor = |name: &str| {
        FLOORS
            .iter()
            .find(|(known, _, _)| *known == name)
            .map(|(_, floor, _)| *floor)
    };
    let mut complaints = Vec::new();
    for (name, _, folder) in FLOORS {
        match crates.get(name) {
            None => complaints.push(format!("{name} stands in the table of floors and not in the workspace")),
            Some((place, _)) if place != folder => complaints.push(format!("{name} is in {place}, not in {folder}")),
            Some(_) => {}
        }
    }
    for (name, (_, dependencies)) in crates {
        let Some(upper) = floor(name) else {
            complaints.push(format!("{name} has no floor"));
            continue;
        };
        for dependency in dependencies {
            match floor(dependency) {
                Some(lower) if lower < upper => {}
                Some(lower) => complaints.push(format!(
                    "{name} (floor {upper}) depends on {dependency} (floor {lower}): dependencies point to lower floors"
                )),
                None => complaints.push(format!("{name} depends on {dependency}, which has no floor")),
            }
        }
    }
    complaints
}

#[test]
fn dependencies_point_to_lower_floors() {
    assert_tidy(&floor_complaints(&workspace_crates()));
}

#[test]
fn links_up_and_sideways_are_found() {
    let with = |name: &str, dependency: &str| {
        let mut crates = workspace_crates();
        crates
            .get_mut(name)
            .expect("a known crate")
            .1
            .push(dependency.to_owned());
        floor_complaints(&crates).join("\n")
    };
    assert!(
        with("tarazed-domain", "tarazed-train").contains("tarazed-domain (floor 0) depends on tarazed-train (floor 3)")
    );
    assert!(
        with("tarazed-model", "tarazed-store").contains("tarazed-model (floor 2) depends on tarazed-store (floor 2)")
    );
    assert!(with("tarazed-tests", "tarazed-new").contains("tarazed-new, which has no floor"));
    assert!(
        floor_complaints(&Crates::new())
            .iter()
            .any(|c| c.starts_with("tarazed-domain stands in the table"))
    );
}

/// What the verifier asks for that it must not have, by name: crates of the workspace, and serializers.
fn independence_complaints(crates: &Crates, asked_for: &[String]) -> Vec<String> {
    let shared = |name: &&String| crates.contains_key(*name) || SERIALIZERS.contains(&name.as_str());
    let complain = |name: &String| format!("{INDEPENDENT} depends on {name}: it judges by code of its own");
    asked_for.iter().filter(shared).map(complain).collect()
}

#[test]
fn the_verifier_shares_no_code_with_what_it_judges() {
    let crates = workspace_crates();
    let (folder, _) = crates.get(INDEPENDENT).expect("the verifier");
    let manifest = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).expect("its manifest");
    let manifest: toml::Table = toml::from_str(&manifest).expect("TOML");
    let mut asked_for = Vec::new();
    for (section, table) in &manifest {
        assert_ne!(
            section, "target",
            "dependencies of one target alone are not looked at here"
        );
        if let (true, Some(table)) = (section.ends_with("dependencies"), table.as_table()) {
            asked_for.extend(table.keys().cloned());
            let renamed = table.values().any(|value| value.get("package").is_some());
            assert!(!renamed, "a renamed dependency would hide what it is");
        }
    }
    assert!(asked_for.contains(&"blake3".to_owned()), "{asked_for:?}");
    assert_tidy(&independence_complaints(&crates, &asked_for));
    // And no source of another crate is read in as text or module.
    for file in files(&[".rs"])
        .iter()
        .filter(|file| file.path.starts_with("chaos/verify/"))
    {
        for line in code_lines(&file.text) {
            assert!(
                !line.contains("include!") && !line.contains("#[path"),
                "{}: {line}",
                file.path
            );
        }
    }
    for bad in ["tarazed-store", "rkyv"] {
        assert_eq!(independence_complaints(&crates, &[bad.to_owned()]).len(), 1, "{bad}");
    }
}

// --- folders and sizes ----------------------------------------------------------------------------------------------

fn root_complaints(entries: &BTreeSet<String>) -> Vec<String> {
    let missing = ROOT_REQUIRED.iter().filter(|name| !entries.contains(**name));
    let extra = entries.iter().filter(|name| {
        let known = ROOT_REQUIRED.contains(&name.as_str()) || ROOT_ALLOWED.contains(&name.as_str());
        let hidden_file = name.starts_with('.') && root().join(name).is_file();
        !known && !hidden_file
    });
    missing
        .map(|name| format!("{name} is missing from the root folder"))
        .chain(extra.map(|name| format!("{name} does not belong into the root folder (DESIGN.md section 12)")))
        .collect()
}

fn root_entries() -> BTreeSet<String> {
    let entries = std::fs::read_dir(root()).expect("a readable root folder");
    entries
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn the_root_folder_holds_what_the_design_says() {
    assert_tidy(&root_complaints(&root_entries()));
}

#[test]
fn a_missing_or_strange_folder_is_found() {
    let mut entries = root_entries();
    entries.remove("kernels");
    entries.insert("utils".to_owned());
    let complaints = root_complaints(&entries).join("\n");
    assert!(
        complaints.contains("kernels is missing") && complaints.contains("utils does not belong"),
        "{complaints}"
    );
}

fn length_complaints(files: &[SourceFile]) -> Vec<String> {
    let long = files.iter().filter(|file| file.text.lines().count() > FILE_LINES_MAX);
    long.map(|file| {
        format!(
            "{} has more than {FILE_LINES_MAX} lines: split it by what its parts are about",
            file.path
        )
    })
    .collect()
}

#[test]
fn files_stay_short() {
    assert_tidy(&length_complaints(&files(&[".rs", ".py", ".cu", ".cuh", ".sh", "run"])));
    assert_eq!(
        length_complaints(&[SourceFile::made_up("long.rs", &"\n".repeat(FILE_LINES_MAX + 1))]).len(),
        1
    );
}

// --- invariants -----------------------------------------------------------------------------------------------------

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

/// A file's text in two, line by line: what is no test, and what is. All of a test folder or file is; elsewhere each item
/// behind `#[cfg(test)]`, to its closing brace or semicolon. Lines of the other part are empty, so numbers stay.
fn split_tests(file: &SourceFile) -> [String; 2] {
    let in_tests = file.path.starts_with("tests/") || file.path.contains("/tests/") || file.path.ends_with("/tests.rs");
    if in_tests {
        return [String::new(), file.text.clone()];
    }
    let mut parts = [String::new(), String::new()];
    // Indentation of the item under way, and whether its body has begun.
    let mut item: Option<(usize, bool)> = None;
    for line in file.text.lines() {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        let rest = text.strip_prefix("#[cfg(test)]");
        let part = usize::from(item.is_some() || rest.is_some());
        if item.is_none() && rest.is_some() {
            item = Some((indent, false));
        }
        if let Some((first, body)) = &mut item {
            let code = rest.unwrap_or(text);
            let attribute = code.trim().is_empty() || code.starts_with("#[");
            *body |= !attribute && code.contains('{');
            let closes = if *body {
                text.ends_with(['}', ';'])
            } else {
                code.ends_with(';')
            };
            if !attribute && indent == *first && closes {
                item = None;
            }
        }
        parts[part].push_str(line);
        parts.iter_mut().for_each(|part| part.push('\n'));
    }
    parts
}

fn invariant_complaints(files: &[SourceFile], architecture: &str, implemented: &[&str]) -> Vec<String> {
    let tests = |file: &&SourceFile| file.path != "tests/tests/tidy.rs"; // naming an invariant here tests nothing
    let tested: BTreeSet<String> = files
        .iter()
        .filter(tests)
        .flat_map(|file| cited_ids(&split_tests(file)[1]))
        .collect();
    let stated = cited_ids(architecture);
    let known = |id: &str| {
        let (family, number) = id.split_once('-').unwrap_or((id, ""));
        let number: u32 = number.parse().unwrap_or(0);
        INVARIANTS
            .iter()
            .any(|(name, count)| *name == family && (1..=*count).contains(&number))
    };
    let mut complaints = Vec::new();
    for id in implemented {
        if !tested.contains(*id) {
            complaints.push(format!("no test cites {id}, which is said to be implemented"));
        }
        if !stated.contains(*id) {
            complaints.push(format!(
                "ARCHITECTURE.md does not state {id}, which is said to be implemented"
            ));
        }
    }
    for file in files.iter().filter(|file| file.path != "tests/tests/tidy.rs") {
        for id in cited_ids(&file.text).iter().filter(|id| !known(id)) {
            complaints.push(format!("{} cites {id}, which DESIGN.md does not have", file.path));
        }
    }
    complaints
}

#[test]
fn implemented_invariants_are_stated_and_cited_by_tests() {
    let architecture = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    assert_tidy(&invariant_complaints(&files(&[".rs"]), &architecture, &IMPLEMENTED));
}

#[test]
fn uncited_unstated_and_unknown_invariants_are_found() {
    let cited_outside_tests =
        SourceFile::made_up("runtime/x/src/a.rs", "//! STEP-2 holds.\n#[cfg(test)]\nmod tests {}\n");
    let unknown = SourceFile::made_up("runtime/x/src/b.rs", "// STEP-99\n");
    let complaints = invariant_complaints(&[cited_outside_tests, unknown], "", &["STEP-2"]).join("\n");
    assert!(complaints.contains("no test cites STEP-2"), "{complaints}");
    assert!(
        complaints.contains("ARCHITECTURE.md does not state STEP-2"),
        "{complaints}"
    );
    assert!(complaints.contains("b.rs cites STEP-99"), "{complaints}");
    let cited = SourceFile::made_up("runtime/x/src/a.rs", "#[cfg(test)]\nmod tests { /* STEP-2 */ }\n");
    assert_tidy(&invariant_complaints(&[cited], "STEP-2", &["STEP-2"]));
}

#[test]
fn test_code_is_told_from_code_around_it() {
    let text = "a\n#[cfg(test)]\nmod tests;\nb {\n    #[cfg(test)]\n    #[allow(x)]\n    fn c(\n        d: u8,\n    ) {\n        e;\n    }\n    f\n}\n\
                #[cfg(test)]\npub(crate) mod g {}\nh\n#[cfg(test)] use i;\nj\n#[cfg(test)]\nmod tests {\n    k!{}\n}\nl\n";
    let [code, tests] = split_tests(&SourceFile::made_up("runtime/x/src/a.rs", text));
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(words(&code), "a b { f } h j l");
    assert_eq!(code.lines().count(), text.lines().count());
    for word in ["mod tests;", "e;", "mod g {}", "use i;", "k!{}"] {
        assert!(tests.contains(word), "{word}: {tests}");
    }
    let [code, tests] = split_tests(&SourceFile::made_up("runtime/x/src/a/tests.rs", "fn m() {}"));
    assert_eq!((code.as_str(), tests.as_str()), ("", "fn m() {}"));
}

// --- what must not stand in the code --------------------------------------------------------------------------------

/// Rust code without comments and without the contents of string and character literals, line by line.
fn code_lines(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    let chars: Vec<char> = text.chars().collect();
    let mut at = 0;
    let mut block_depth = 0;
    let starts = |at: usize, pattern: &str| pattern.chars().enumerate().all(|(i, c)| chars.get(at + i) == Some(&c));
    while at < chars.len() {
        if chars[at] == '\n' {
            lines.push(String::new());
            at += 1;
        } else if starts(at, "/*") {
            block_depth += 1;
            at += 2;
        } else if block_depth > 0 {
            let closes = starts(at, "*/");
            block_depth -= usize::from(closes);
            at += if closes { 2 } else { 1 };
        } else if starts(at, "//") {
            at = (at..chars.len()).find(|&i| chars[i] == '\n').unwrap_or(chars.len());
        } else if let Some(end) = literal_end(&chars, at) {
            lines.extend(chars[at..end].iter().filter(|c| **c == '\n').map(|_| String::new()));
            at = end;
        } else {
            lines.last_mut().expect("at least one line").push(chars[at]);
            at += 1;
        }
    }
    lines
}

/// One past the string or character literal that begins at `at`, if one does.
fn literal_end(chars: &[char], at: usize) -> Option<usize> {
    let word_before = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    match chars[at] {
        '"' => {
            let mut i = at + 1;
            while i < chars.len() && chars[i] != '"' {
                i += if chars[i] == '\\' { 2 } else { 1 };
            }
            Some((i + 1).min(chars.len()))
        }
        'r' if !word_before || chars[at - 1] == 'b' => {
            let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
            if chars.get(at + 1 + hashes) != Some(&'"') {
                return None;
            }
            let closes =
                |i: &usize| chars[*i] == '"' && chars[i + 1..].iter().take_while(|c| **c == '#').count() >= hashes;
            let close = (at + 2 + hashes..chars.len()).find(closes)?;
            Some(close + 1 + hashes)
        }
        '\'' if chars.get(at + 1) == Some(&'\\') => (at + 3..chars.len()).find(|&i| chars[i] == '\'').map(|i| i + 1),
        '\'' if chars.get(at + 2) == Some(&'\'') => Some(at + 3),
        _ => None,
    }
}

fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(part) && !line[at + word.len()..].chars().next().is_some_and(part)
    })
}

fn code_complaints(files: &[SourceFile]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        let may_be_unsafe = UNSAFE_ALLOWED.iter().any(|place| file.path.starts_with(place));
        for (index, line) in code_lines(&file.text).iter().enumerate() {
            let place = format!("{}:{}", file.path, index + 1);
            for stub in ["todo", "unimplemented"] {
                if line.contains(&format!("{stub}!")) {
                    complaints.push(format!("{place}: {stub}! is a stub: leave the thing out, or write it"));
                }
            }
            if has_word(line, "unsafe") && !may_be_unsafe {
                complaints.push(format!(
                    "{place}: unsafe code lives in {} alone",
                    UNSAFE_ALLOWED.join(", ")
                ));
            }
        }
    }
    complaints
}

#[test]
fn no_stubs_and_unsafe_only_at_the_edges() {
    assert_tidy(&code_complaints(&files(&[".rs"])));
}

#[test]
fn every_place_that_may_be_unsafe_is() {
    let files = files(&[".rs"]);
    for place in UNSAFE_ALLOWED {
        let used = |file: &&SourceFile| {
            file.path.starts_with(place) && code_lines(&file.text).iter().any(|l| has_word(l, "unsafe"))
        };
        assert!(
            files.iter().find(used).is_some(),
            "{place} needs no permission to be unsafe any more: remove it"
        );
    }
}

#[test]
fn stubs_and_stray_unsafe_are_found_in_code_and_not_in_text() {
    let complaints = |path: &str, text: &str| code_complaints(&[SourceFile::made_up(path, text)]);
    assert_eq!(complaints("runtime/store/src/a.rs", "fn f() { todo!() }").len(), 1);
    assert_eq!(
        complaints("runtime/store/src/a.rs", "fn f() {\n  unimplemented!(\"x\")\n}").len(),
        1
    );
    assert_eq!(
        complaints("runtime/store/src/a.rs", "let c = '\"'; let x = unsafe { f(\"//\") };").len(),
        1
    );
    assert_tidy(&complaints("kernels/src/a.rs", "let x = unsafe { f() };"));
    let text = "// unsafe todo!()\n/* todo!() /* unsafe */ */ #[deny(unsafe_code)]\nlet s = \"unsafe \\\" todo!()\"; let r = r#\"todo!() \" unsafe\"#; let l: &'static str;\n";
    assert_tidy(&complaints("runtime/store/src/a.rs", text));
}

/// The host's function that a line of code calls, if any: `x.cos()`, or `f64::cos` handed on.
fn host_function(line: &str) -> Option<&'static str> {
    HOST_FUNCTIONS.into_iter().find(|name| {
        let method = line.contains(&format!(".{name}("));
        method
            || ["f32", "f64"]
                .iter()
                .any(|float| has_word(line, &format!("{float}::{name}")))
    })
}

fn number_complaints(files: &[SourceFile]) -> Vec<String> {
    let decides = |file: &&SourceFile| {
        NUMBERS.iter().any(|place| file.path.starts_with(place)) && !file.path.starts_with(NUMBERS_EXEMPT)
    };
    let mut complaints = Vec::new();
    for file in files.iter().filter(decides) {
        for (index, line) in code_lines(&split_tests(file)[0]).iter().enumerate() {
            if let Some(name) = host_function(line) {
                complaints.push(format!(
                    "{}:{}: `{name}` is the host's, and its last bits differ between machines (DET-1): use the crate libm",
                    file.path,
                    index + 1
                ));
            }
        }
    }
    complaints
}

#[test]
fn no_number_of_a_run_comes_from_the_host() {
    assert_tidy(&number_complaints(&files(&[".rs"])));
}

#[test]
fn the_hosts_functions_are_found_in_code_that_makes_numbers() {
    let complaints = |path: &str, text: &str| number_complaints(&[SourceFile::made_up(path, text)]);
    for bad in [
        "x.cos()",
        "(a / b)\n    .ln()",
        "x.powi(2)",
        "xs.map(f64::exp)",
        "f32::tan(x)",
    ] {
        let found = complaints("runtime/domain/src/a.rs", &format!("fn f() {{ {bad}; }}\n"));
        assert_eq!(found.len(), 1, "{bad}: {found:?}");
    }
    let line = "fn f() {}\n#[cfg(test)]\nmod tests;\n\nfn g() { x.exp() }\n";
    assert!(complaints("kernels/src/cpu/a.rs", line)[0].starts_with("kernels/src/cpu/a.rs:5: `exp`"));
    for good in [
        "libm::cos(x) + x.sqrt() + x.mul_add(y, z) + a.expand() + self.logs()",
        "let s = \".cos()\"; // x.cos()",
        "}\n#[cfg(test)]\nmod tests {\n    fn h() { x.cos(); }\n}\nfn i() {",
    ] {
        assert_tidy(&complaints(
            "runtime/domain/src/a.rs",
            &format!("fn f() {{\n{good}\n}}\n"),
        ));
    }
    assert_tidy(&complaints("runtime/tarazed/src/a.rs", "fn f() { x.cos() }"));
    assert_tidy(&complaints("runtime/domain/tests/a.rs", "fn f() { x.cos() }"));
}

/// Host names of package registries: builds take whatever source the user's tools are set to.
fn registry_hosts() -> Vec<String> {
    let hosts = [
        ["index.", "crates.io"],
        ["static.", "crates.io"],
        ["pypi", ".org"],
        ["pythonhosted", ".org"],
        ["deb.", "debian.org"],
        ["registry.", "npmjs.org"],
        ["proxy.", "golang.org"],
    ];
    hosts.iter().map(|parts| parts.concat()).collect()
}

fn host_complaints(files: &[SourceFile], lock: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        for host in registry_hosts().iter().filter(|host| file.text.contains(host.as_str())) {
            complaints.push(format!("{} names the registry host {host}", file.path));
        }
    }
    let official = format!(
        "source = \"registry+https://github.com/rust-lang/{}\"",
        "crates.io-index"
    );
    for (index, line) in lock.lines().enumerate() {
        if line.starts_with("source = ") && line != official {
            complaints.push(format!("Cargo.lock:{}: {line} is not the official registry", index + 1));
        }
    }
    complaints
}

#[test]
fn no_registry_host_is_named() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).expect("Cargo.lock");
    assert!(
        lock.lines().any(|line| line.starts_with("source = ")),
        "the lock file names sources"
    );
    let ends = [".rs", ".toml", ".md", ".py", ".sh", ".json", "run"];
    assert_tidy(&host_complaints(&files(&ends), &lock));
    let made_up = SourceFile::made_up("a.md", &format!("see https://{}/x", registry_hosts()[2]));
    assert_eq!(
        host_complaints(&[made_up], "source = \"registry+https://elsewhere\"\n").len(),
        2
    );
}

// --- what the README promises ---------------------------------------------------------------------------------------

/// Dotted keys of a config; a list of tables counts once.
fn keys(prefix: &str, value: &toml::Value, found: &mut BTreeSet<String>) {
    match value {
        toml::Value::Table(table) => {
            for (name, inner) in table {
                let key = if prefix.is_empty() {
                    name.clone()
                } else {
                    format!("{prefix}.{name}")
                };
                keys(&key, inner, found);
            }
        }
        toml::Value::Array(list) if list.iter().all(toml::Value::is_table) => {
            list.iter().for_each(|inner| keys(prefix, inner, found));
        }
        _ => {
            found.insert(prefix.to_owned());
        }
    }
}

#[test]
fn the_readme_explains_every_config_key() {
    let config = Config::load(&root().join("configs/aquila2-7b.toml"), &[]).expect("a good config");
    let resolved: toml::Value = toml::from_str(&config.to_toml().expect("TOML")).expect("TOML");
    let mut found = BTreeSet::new();
    keys("", &resolved, &mut found);
    assert!(found.len() > 40, "{found:?}");
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let unexplained: Vec<String> = found
        .iter()
        .filter(|key| !readme.contains(&format!("| `{key}` |")))
        .map(|key| format!("README.md does not explain the config key {key}"))
        .collect();
    assert_tidy(&unexplained);
}

#[test]
fn the_readme_begins_with_the_commands_that_ci_runs() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let ci = std::fs::read_to_string(root().join(".ci/run")).expect(".ci/run");
    let commands: Vec<&str> = readme
        .lines()
        .filter(|line| line.starts_with("cargo "))
        .take(2)
        .collect();
    assert_eq!(
        commands,
        [
            "cargo run --release -- train configs/quickstart.toml",
            "cargo test --release --workspace"
        ]
    );
    assert!(
        ci.lines().any(|line| line.trim() == commands[1]),
        ".ci/run runs the README's test command"
    );
}
