//! What a verifier found: names of bad objects with what is wrong, and how a check that cannot be made differs from one
//! that fails.

use std::fmt;

/// Findings kept in full; further ones are counted, so that a ruined store does not fill the memory.
const FINDINGS_KEPT_MAX: usize = 1_000;

/// The input cannot be judged: it is not there, cannot be read, or is no store or run folder at all. Exit code 2.
#[derive(Debug)]
pub struct Unusable(pub String);

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Something is not as it must be. Exit code 1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// Key, file or line.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
}

#[derive(Default, Debug)]
pub struct Findings {
    kept: Vec<Finding>,
    count: u64,
}

impl Findings {
    pub fn add(&mut self, object: impl Into<String>, problem: impl Into<String>) {
        self.count += 1;
        if self.kept.len() < FINDINGS_KEPT_MAX {
            self.kept.push(Finding {
                object: object.into(),
                problem: problem.into(),
            });
        }
    }

    pub const fn count(&self) -> u64 {
        self.count
    }

    pub fn json(&self) -> serde_json::Value {
        let one = |finding: &Finding| serde_json::json!({"object": finding.object, "problem": finding.problem});
        self.kept.iter().map(one).collect()
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.kept {
            writeln!(f, "BAD {}: {}", finding.object, finding.problem)?;
        }
        let unnamed = self.count - self.kept.len() as u64;
        if unnamed > 0 {
            writeln!(f, "BAD … and {unnamed} more")?;
        }
        Ok(())
    }
}
