//! The end of `weights.jsonl`: what a controller goes on from.

use super::FolderError;
use std::io::ErrorKind;
use std::path::Path;
use tarazed_domain::StepsCompleted;
use tarazed_protocol::data::trajectory::WeightLine;

/// What of `weights.jsonl` is committed.
#[derive(PartialEq, Debug, Default)]
pub struct RecalledWeights {
    /// Its last line.
    pub last: Option<WeightLine>,
    /// Bytes up to that line's end.
    pub bytes: u64,
}

/// What of the file is committed. What follows is not: a torn line, and lines of steps behind `written`, the trace's end, which
/// a life before this one wrote.
///
/// # Errors
/// A [`FolderError`] where the file cannot be read, or a whole line of it is none.
pub fn recall_weights(path: &Path, written: StepsCompleted) -> Result<RecalledWeights, FolderError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(RecalledWeights::default()),
        Err(e) => return Err(FolderError::io(path, &e)),
    };
    let (mut last, mut kept_bytes): (Option<WeightLine>, usize) = (None, 0);
    for (number, text) in (1..).zip(bytes.split_inclusive(|byte| *byte == b'\n')) {
        if !text.ends_with(b"\n") {
            break;
        }
        let wrong = |cause: String| {
            let remedy = "move the file away: the run does not need it and begins a new one, or restore it";
            FolderError::new(path, format!("line {number} {cause}"), remedy)
        };
        let line: WeightLine = serde_json::from_slice(text).map_err(|e| wrong(format!("is damaged ({e})")))?;
        if last.as_ref().is_some_and(|last| last.step >= line.step) {
            return Err(wrong("does not come after the one before".to_owned()));
        }
        if line.step > written {
            break;
        }
        kept_bytes += text.len();
        last = Some(line);
    }
    Ok(RecalledWeights {
        last,
        bytes: kept_bytes as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> String {
        format!(
            r#"{{"step":{step},"tokens":{},"std":{{"mlp.up_proj":[0.5,0.25]}}}}"#,
            step * 10
        ) + "\n"
    }

    #[test]
    fn what_is_not_committed_does_not_count() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("weights.jsonl");
        assert_eq!(
            recall_weights(&path, StepsCompleted(9)).expect("none"),
            RecalledWeights::default()
        );
        let all = line(3) + &line(6) + &line(9);
        for (torn, written, kept, step) in [
            ("", 9, 3, 9),
            ("{\"step\":12,\"tok", 20, 3, 9),
            ("", 8, 2, 6),
            ("{\"st", 6, 2, 6),
        ] {
            std::fs::write(&path, all.clone() + torn).expect("written");
            let found = recall_weights(&path, StepsCompleted(written)).expect("a good file");
            assert_eq!(found.last.expect("a line").step, StepsCompleted(step));
            let expected: usize = all.split_inclusive('\n').take(kept).map(str::len).sum();
            assert_eq!(found.bytes, expected as u64);
        }
        assert_eq!(
            recall_weights(&path, StepsCompleted(2)).expect("a good file"),
            RecalledWeights::default()
        );
        let text = std::fs::read_to_string(&path).expect("read");
        assert_eq!(text, all + "{\"st", "nothing is cut before the run is accepted");
    }

    #[test]
    fn a_damaged_file_is_refused_with_its_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("weights.jsonl");
        for (text, cause) in [
            (line(3) + "{\"step\":6}\n", "line 2 is damaged"),
            (line(6) + &line(6), "line 2 does not come after"),
        ] {
            std::fs::write(&path, &text).expect("written");
            let refused = recall_weights(&path, StepsCompleted(9)).expect_err("refused");
            assert!(
                refused.cause.contains(cause) && refused.remedy.contains("away"),
                "{refused}"
            );
            assert_eq!(std::fs::read_to_string(&path).expect("read"), text, "nothing was cut");
        }
    }
}
