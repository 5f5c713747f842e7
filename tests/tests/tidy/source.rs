//! The project's files as text, and what of it is code, comment or test.

use super::root;

/// A project file: its path from the root, with forward slashes, and its text.
pub struct SourceFile {
    pub path: String,
    pub text: String,
}

impl SourceFile {
    pub fn made_up(path: &str, text: &str) -> Self {
        Self {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }
}

/// All text files of the project with one of the given endings; build output, runs and hidden folders but `.ci` are left out.
pub fn files(endings: &[&str]) -> Vec<SourceFile> {
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

/// Whether all of a file is test.
pub fn is_all_tests(path: &str) -> bool {
    path.starts_with("tests/") || path.contains("/tests/") || path.ends_with("/tests.rs")
}

/// A file's text in two, line by line: what is no test, and what is. All of a test folder or file is; elsewhere each item
/// behind `#[cfg(test)]`, to its closing brace or semicolon. Lines of the other part are empty, so numbers stay.
pub fn split_tests(file: &SourceFile) -> [String; 2] {
    if is_all_tests(&file.path) {
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

/// Rust code without comments and without the contents of string and character literals, line by line.
pub fn code_lines(text: &str) -> Vec<String> {
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

pub fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(part) && !line[at + word.len()..].chars().next().is_some_and(part)
    })
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
