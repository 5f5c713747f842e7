//! No number of a run comes from the host's C library (DET-1).

use super::assert_tidy;
use super::source::{SourceFile, code_lines, files, has_word, split_tests};

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
