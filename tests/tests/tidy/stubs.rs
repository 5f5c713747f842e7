//! No stub, and `unsafe` where it may stand alone.

use super::assert_tidy;
use super::source::{SourceFile, code_lines, files, has_word};

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
