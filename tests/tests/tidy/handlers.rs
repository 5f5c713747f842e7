//! Handlers of actors wait for no disk and do not sleep (SUP-4): whoever has written to them would wait, too. A file is read on a
//! blocking thread (`actors/src/blocking.rs`) or by a thread of its own. No handler is excepted.

use super::assert_tidy;
use super::source::{SourceFile, code_lines, files, has_word, split_tests};

/// Where actors are.
const ACTORS: &str = "actors/src/";
/// How a handler begins: of messages, or of what a parent hears.
const HANDLER: &str = "async fn handle";
/// What blocks the thread that it is called on, by the last two parts of its name: a `use` may have left out the first.
const BLOCKING: [&str; 4] = ["fs::", "thread::sleep", "File::", "OpenOptions::"];

/// Bodies of handlers, line by line with the lines' numbers.
fn handler_lines(file: &SourceFile) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    // Braces that are open, and whether the body has begun.
    let mut handler: Option<(usize, bool)> = None;
    for (index, line) in code_lines(&split_tests(file)[0]).into_iter().enumerate() {
        if handler.is_none() && line.contains(HANDLER) {
            handler = Some((0, false));
        }
        let Some((depth, begun)) = &mut handler else {
            continue;
        };
        let before = *begun;
        for brace in line.chars() {
            *depth += usize::from(brace == '{');
            *begun |= brace == '{';
            *depth = depth.saturating_sub(usize::from(brace == '}'));
        }
        let ends = *begun && *depth == 0;
        if before || *begun {
            found.push((index + 1, line));
        }
        if ends {
            handler = None;
        }
    }
    found
}

fn handler_complaints(files: &[SourceFile]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files.iter().filter(|file| file.path.starts_with(ACTORS)) {
        for (number, line) in handler_lines(file) {
            for call in BLOCKING.iter().filter(|call| is_called(&line, call)) {
                let path = &file.path;
                complaints.push(format!(
                    "{path}:{number}: `{call}` in a handler blocks its actor (SUP-4): use actors/src/blocking.rs"
                ));
            }
        }
    }
    complaints
}

/// Whether a line has this call, not as the end of a longer name; those of tokio wait without blocking.
fn is_called(line: &str, call: &str) -> bool {
    let (name, rest) = call.split_once("::").unwrap_or((call, ""));
    has_word(line, name) && line.contains(call) && !line.contains(&format!("tokio::{name}::{rest}"))
}

#[test]
fn no_handler_blocks_its_actor() {
    let files = files(&[".rs"]);
    let actors = files.iter().filter(|file| file.path.starts_with(ACTORS));
    let handlers = actors.filter(|file| !handler_lines(file).is_empty()).count();
    assert!(handlers > 10, "{handlers} files with handlers");
    assert_tidy(&handler_complaints(&files));
}

#[test]
fn a_handler_that_blocks_is_found() {
    let complaints = |path: &str, text: &str| handler_complaints(&[SourceFile::made_up(path, text)]);
    let handler = |body: &str| {
        format!("impl A {{\n    async fn handle(\n        &self,\n    ) -> B {{\n        {body}\n    }}\n}}\n")
    };
    for bad in [
        "let text = std::fs::read(path);",
        "if late { std::thread::sleep(WAIT); }",
        "match message { C => { thread::sleep(WAIT) } }",
        "let file = File::open(path)?;",
    ] {
        let found = complaints("actors/src/x.rs", &handler(bad));
        assert_eq!(found.len(), 1, "{bad}: {found:?}");
        assert!(found[0].starts_with("actors/src/x.rs:5: "), "{found:?}");
    }
    let supervisor = "async fn handle_supervisor_evt(&self) { std::fs::remove_file(path) }";
    assert_eq!(complaints("actors/src/x.rs", supervisor).len(), 1);
    for good in [
        "tokio::time::sleep(WAIT).await; // not std::thread::sleep",
        "let text = tokio::fs::read(path).await;",
        "let text = \"std::fs::read\"; TraceFile::open(path)",
    ] {
        assert_tidy(&complaints("actors/src/x.rs", &handler(good)));
    }
    let blocking = handler("std::fs::read(path)");
    assert_tidy(&complaints("runtime/x/src/x.rs", &blocking));
    assert_tidy(&complaints(
        "actors/src/x.rs",
        &format!("#[cfg(test)]\nmod tests {{\n{blocking}}}\n"),
    ));
    let beside = "fn handled() { std::fs::read(path) }\nasync fn handle() {}\nfn after() { File::open(path) }\n";
    let found = complaints("actors/src/x.rs", beside);
    assert!(found.is_empty(), "{found:?}");
}
