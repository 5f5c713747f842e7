//! The committed trace: one line of `trace.jsonl` per committed step.
//!
//! Only what is a function of the promise goes in (DESIGN.md section 1): generation, time and placement belong to other
//! files. Two runs of the same config, data, seed and binary write the same bytes, whatever failed on the way; so the
//! text is canonical: fixed key order, domain order as in the config, shortest floats that read back to the same bits.
//! `loss` and `grad_norm` stand twice, once to read and once as bits; a value that is not finite reads `null` and lives
//! in its bits.
//!
//! - **STEP-5** Replayed steps are checked against their lines: [`TraceLine::first_difference`] says in what they differ.
//! - **LOOP-1**, **DATA-2** The lines are all that signals, controllers and the cursor are made of.
//!
//! - **DET-4** Where another program, or the same on another device type, goes on with a run, its first line says so
//!   ([`NewLineage`]). That is no part of what lines are compared by: it says who computed them, not what they hold.
//!
//! No file is opened here: text comes in as bytes, and goes out as text.

use crate::data::decision::Decision;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;
use tarazed_domain::StepsCompleted;

/// A map from domain name to value that keeps the order of the config.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct DomainMap<T>(pub Vec<(String, T)>);

impl<T> Default for DomainMap<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> DomainMap<T> {
    /// The value of a domain.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&T> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// Names and values, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &T)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }
}

impl<T: Serialize> Serialize for DomainMap<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for DomainMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
            type Value = DomainMap<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from domain name to value")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<DomainMap<T>, A::Error> {
                let mut map = DomainMap::default();
                while let Some((name, value)) = access.next_entry::<String, T>()? {
                    if map.get(&name).is_some() {
                        return Err(A::Error::custom(format!("domain '{name}' stands twice")));
                    }
                    map.0.push((name, value));
                }
                Ok(map)
            }
        }
        deserializer.deserialize_map(InOrder(PhantomData))
    }
}

/// Mean loss of a domain and the tokens it was taken over.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
#[serde(into = "DomainLossText", try_from = "DomainLossText")]
pub struct DomainLoss {
    /// Mean loss per token, in nats.
    pub loss: f64,
    /// Tokens.
    pub tokens: u64,
}

/// What computes a run, as far as it decides numbers (DET-4).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// Version and build of the binary.
    pub binary: String,
    /// Device type.
    pub device: String,
    /// Libraries whose version decides numbers; the key is there only where there are any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub libraries: Vec<String>,
}

/// From this line on another program computes the run (DET-4).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewLineage {
    /// Until then.
    pub from: Program,
    /// From here on.
    pub to: Program,
}

/// For people.
impl fmt::Display for NewLineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to } = self;
        write!(
            f,
            "binary {} on {} became {} on {}",
            from.binary, from.device, to.binary, to.device
        )
    }
}

/// One line of the committed trace.
#[derive(Clone, Debug, Serialize, Deserialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
#[serde(into = "LineText", try_from = "LineText")]
pub struct TraceLine {
    /// Optimizer updates done, this one included.
    pub step: StepsCompleted,
    /// Training tokens consumed so far, this step included.
    pub tokens: u64,
    /// Digest of the step's samples (`data::cursor`).
    pub data: [u8; 32],
    /// Mean training loss per token, in nats.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// BLAKE3 over the block hashes of the whole training state after the update (STEP-4).
    pub state: [u8; 32],
    /// Learning rate of the update.
    pub lr: f64,
    /// Mixture in force, normalised, in domain order.
    pub mixture: DomainMap<f64>,
    /// Training loss by domain, of the domains that had tokens in this step.
    pub domains: DomainMap<DomainLoss>,
    /// Held-out loss by domain, where the step is an evaluation.
    pub heldout: Option<DomainMap<DomainLoss>>,
    /// Sum of the squares of each lane's part of the gradient, where a config asks for it; never not finite.
    pub lane_squares: Option<f64>,
    /// The update was left out, by the bounds in force: the state is that of the line before.
    pub skipped: bool,
    /// Declared where another program goes on from here.
    pub lineage: Option<NewLineage>,
    /// Decisions made on this line.
    pub decisions: Vec<Decision>,
}

/// A trace that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TraceError {
    /// Cut and go on: the writer died within the last line. The lines before it are whole.
    #[error(
        "trace line {line_number} breaks off; cut the file to its first {whole_bytes} bytes and write the line again"
    )]
    Torn {
        /// Line number, from 1.
        line_number: usize,
        /// Bytes of the whole lines before it.
        whole_bytes: usize,
    },
    /// Halt: a whole line is not a trace line.
    #[error("trace line {line_number} is damaged: {cause}; restore the file or start a fresh run folder")]
    Malformed {
        /// Line number, from 1.
        line_number: usize,
        /// What is wrong with it.
        cause: String,
    },
    /// Halt: steps do not follow each other.
    #[error("trace line {line_number} is step {found} where step {expected} must stand; restore the file")]
    OutOfOrder {
        /// Line number, from 1.
        line_number: usize,
        /// The step that follows the line before.
        expected: StepsCompleted,
        /// The step of the line.
        found: StepsCompleted,
    },
}

impl TraceLine {
    /// The line as text, without a line end.
    ///
    /// # Panics
    /// If the learning rate, a weight, the lanes' squares or a decision is not finite: a programmer's error, none comes from a run.
    #[must_use]
    pub fn print(&self) -> String {
        let finite = self.lr.is_finite()
            && self.lane_squares.is_none_or(f64::is_finite)
            && self.mixture.iter().all(|(_, weight)| weight.is_finite());
        assert!(finite, "learning rate and mixture of step {} are finite", self.step);
        match serde_json::to_string(self) {
            Ok(text) => text,
            Err(e) => unreachable!("a trace line always has a text: {e}"),
        }
    }

    /// Reads one line, with or without its line end. `line_number` counts from 1 and stands in the error.
    ///
    /// # Errors
    /// [`TraceError::Malformed`] with the cause.
    pub fn parse(text: &str, line_number: usize) -> Result<Self, TraceError> {
        serde_json::from_str(text.trim_end_matches(['\n', '\r'])).map_err(|e| TraceError::Malformed {
            line_number,
            cause: e.to_string(),
        })
    }

    /// The first field, in key order, in which two lines differ, by bits: its name and both values. Who computed them is not
    /// compared.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<Difference> {
        let found = |field: &str, a: &dyn fmt::Display, b: &dyn fmt::Display| {
            Some(Difference {
                step: self.step,
                field: field.to_owned(),
                a: a.to_string(),
                b: b.to_string(),
            })
        };
        let number = |field: &str, a: f64, b: f64| {
            let show = |value: f64| format!("{value} ({})", bits_text(value));
            (a.to_bits() != b.to_bits())
                .then(|| found(field, &show(a), &show(b)))
                .flatten()
        };
        if self.step != other.step {
            return found("step", &self.step, &other.step);
        }
        if self.tokens != other.tokens {
            return found("tokens", &self.tokens, &other.tokens);
        }
        if self.data != other.data {
            return found("data", &hex::encode(self.data), &hex::encode(other.data));
        }
        number("loss", self.loss, other.loss)
            .or_else(|| number("grad_norm", self.grad_norm, other.grad_norm))
            .or_else(|| {
                (self.state != other.state)
                    .then(|| found("state", &hex::encode(self.state), &hex::encode(other.state)))
                    .flatten()
            })
            .or_else(|| number("lr", self.lr, other.lr))
            .or_else(|| {
                let same = |a: &f64, b: &f64| a.to_bits() == b.to_bits();
                map_difference("mixture", &self.mixture, &other.mixture, same)
                    .and_then(|(field, a, b)| found(&field, &a, &b))
            })
            .or_else(|| {
                map_difference("domains", &self.domains, &other.domains, PartialEq::eq)
                    .and_then(|(field, a, b)| found(&field, &a, &b))
            })
            .or_else(|| match (&self.heldout, &other.heldout) {
                (Some(a), Some(b)) => {
                    map_difference("heldout", a, b, PartialEq::eq).and_then(|(field, a, b)| found(&field, &a, &b))
                }
                (None, None) => None,
                (Some(_), None) => found("heldout", &"present", &"absent"),
                (None, Some(_)) => found("heldout", &"absent", &"present"),
            })
            .or_else(|| {
                let bits = |squares: Option<f64>| squares.map_or_else(|| "absent".to_owned(), bits_text);
                let (a, b) = (bits(self.lane_squares), bits(other.lane_squares));
                (a != b).then(|| found("lane_squares", &a, &b)).flatten()
            })
            .or_else(|| {
                let differ = self.skipped != other.skipped;
                differ
                    .then(|| found("skipped", &self.skipped, &other.skipped))
                    .flatten()
            })
            .or_else(|| {
                (self.decisions != other.decisions)
                    .then(|| {
                        let show = |decisions: &[Decision]| format!("{decisions:?}");
                        found("decisions", &show(&self.decisions), &show(&other.decisions))
                    })
                    .flatten()
            })
    }
}

/// Equal in all that was computed, floats by bits.
impl PartialEq for TraceLine {
    fn eq(&self, other: &Self) -> bool {
        self.first_difference(other).is_none()
    }
}

/// Equal by bits.
impl PartialEq for DomainLoss {
    fn eq(&self, other: &Self) -> bool {
        self.loss.to_bits() == other.loss.to_bits() && self.tokens == other.tokens
    }
}

fn map_difference<T: fmt::Debug>(
    field: &str,
    a: &DomainMap<T>,
    b: &DomainMap<T>,
    same: impl Fn(&T, &T) -> bool,
) -> Option<(String, String, String)> {
    let names = |map: &DomainMap<T>| map.iter().map(|(name, _)| name).collect::<Vec<_>>().join(",");
    if names(a) != names(b) {
        return Some((field.to_owned(), names(a), names(b)));
    }
    a.iter()
        .zip(b.iter())
        .find(|((_, a), (_, b))| !same(a, b))
        .map(|((name, a), (_, b))| (format!("{field}.{name}"), format!("{a:?}"), format!("{b:?}")))
}

/// Where two traces part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// The step.
    pub step: StepsCompleted,
    /// The field, e.g. `loss` or `heldout.wiki`.
    pub field: String,
    /// Its value in the first trace.
    pub a: String,
    /// Its value in the second.
    pub b: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}: {} is {} and {}", self.step, self.field, self.a, self.b)
    }
}

/// How two traces compare.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Comparison {
    /// Steps that both hold, up to the difference if there is one. A comparison of none proves nothing.
    pub common_steps: usize,
    /// The first difference.
    pub first: Option<Difference>,
}

/// Compares two traces, each in order of step, on the steps both hold.
#[must_use]
pub fn diff(a: &[TraceLine], b: &[TraceLine]) -> Comparison {
    let (mut at_a, mut at_b) = (a.iter().peekable(), b.iter().peekable());
    let mut common_steps = 0;
    while let (Some(line_a), Some(line_b)) = (at_a.peek(), at_b.peek()) {
        if line_a.step < line_b.step {
            at_a.next();
            continue;
        }
        if line_b.step < line_a.step {
            at_b.next();
            continue;
        }
        common_steps += 1;
        if let Some(first) = line_a.first_difference(line_b) {
            return Comparison {
                common_steps,
                first: Some(first),
            };
        }
        at_a.next();
        at_b.next();
    }
    Comparison {
        common_steps,
        first: None,
    }
}

/// Who computed the end of a trace, as far as it can be known: what a new program compares itself with. `checkpoint` is that
/// of step `base`, by whom it was made, and what that program has found to be declared.
///
/// A program may make checkpoints while it still replays another's lines, before there is a new line to declare itself in:
/// what its checkpoint says is then not true of the trace.
#[must_use]
pub fn writer_of(
    lines: &[TraceLine],
    base: StepsCompleted,
    checkpoint: Option<(Program, Option<NewLineage>)>,
) -> Option<Program> {
    let declares = |line: &TraceLine| line.lineage.as_ref().map(|lineage| (line.step, lineage.to.clone()));
    let newest = lines.iter().rev().find_map(declares);
    match (newest, checkpoint) {
        (Some((step, to)), _) if step > base => Some(to),
        (newest, None) => newest.map(|(_, to)| to),
        (newest, Some((maker, found))) => match found {
            Some(found) if found.to == maker && newest.is_none_or(|(_, to)| to != maker) => Some(found.from),
            _ => Some(maker),
        },
    }
}

/// Reads a whole trace. Steps must follow each other without a gap.
///
/// # Errors
/// The first [`TraceError`].
pub fn parse_lines(bytes: &[u8]) -> Result<Vec<TraceLine>, TraceError> {
    let (lines, whole_bytes) = parse_whole_lines(bytes)?;
    if whole_bytes < bytes.len() {
        return Err(TraceError::Torn {
            line_number: lines.len() + 1,
            whole_bytes,
        });
    }
    Ok(lines)
}

/// Reads the whole lines of a trace whose last line may be torn, and says how many bytes they have: what a writer that
/// comes back keeps of the file.
///
/// # Errors
/// The first [`TraceError`], never [`TraceError::Torn`].
pub fn parse_whole_lines(bytes: &[u8]) -> Result<(Vec<TraceLine>, usize), TraceError> {
    let whole_bytes = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    let mut lines: Vec<TraceLine> = Vec::new();
    for (index, line) in bytes[..whole_bytes].split_inclusive(|byte| *byte == b'\n').enumerate() {
        let line_number = index + 1;
        let text = std::str::from_utf8(line).map_err(|e| TraceError::Malformed {
            line_number,
            cause: e.to_string(),
        })?;
        let line = TraceLine::parse(text, line_number)?;
        if let Some(before) = lines.last() {
            let expected = StepsCompleted(before.step.0.saturating_add(1));
            if line.step != expected {
                return Err(TraceError::OutOfOrder {
                    line_number,
                    expected,
                    found: line.step,
                });
            }
        }
        lines.push(line);
    }
    Ok((lines, whole_bytes))
}

/// The text form of [`TraceLine`]: the keys and their order are a contract.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LineText {
    step: StepsCompleted,
    tokens: u64,
    data: String,
    // `deserialize_with` makes the key itself mandatory; only its value may be null.
    #[serde(deserialize_with = "Option::deserialize")]
    loss: Option<f64>,
    loss_bits: String,
    #[serde(deserialize_with = "Option::deserialize")]
    grad_norm: Option<f64>,
    grad_norm_bits: String,
    state: String,
    lr: f64,
    mixture: DomainMap<f64>,
    domains: DomainMap<DomainLoss>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    heldout: Option<DomainMap<DomainLoss>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lane_squares: Option<f64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    skipped: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lineage: Option<NewLineage>,
    decisions: Vec<Decision>,
}

impl From<TraceLine> for LineText {
    fn from(line: TraceLine) -> Self {
        Self {
            step: line.step,
            tokens: line.tokens,
            data: hex::encode(line.data),
            loss: finite(line.loss),
            loss_bits: bits_text(line.loss),
            grad_norm: finite(line.grad_norm),
            grad_norm_bits: bits_text(line.grad_norm),
            state: hex::encode(line.state),
            lr: line.lr,
            mixture: line.mixture,
            domains: line.domains,
            heldout: line.heldout,
            lane_squares: line.lane_squares,
            skipped: line.skipped,
            lineage: line.lineage,
            decisions: line.decisions,
        }
    }
}

impl TryFrom<LineText> for TraceLine {
    type Error = String;

    fn try_from(text: LineText) -> Result<Self, String> {
        Ok(Self {
            step: text.step,
            tokens: text.tokens,
            data: digest("data", &text.data)?,
            loss: from_bits("loss", text.loss, &text.loss_bits)?,
            grad_norm: from_bits("grad_norm", text.grad_norm, &text.grad_norm_bits)?,
            state: digest("state", &text.state)?,
            lr: text.lr,
            mixture: text.mixture,
            domains: text.domains,
            heldout: text.heldout,
            lane_squares: text.lane_squares,
            skipped: text.skipped,
            lineage: text.lineage,
            decisions: text.decisions,
        })
    }
}

/// The text form of [`DomainLoss`]: bits only where the loss is not finite.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DomainLossText {
    #[serde(deserialize_with = "Option::deserialize")]
    loss: Option<f64>,
    tokens: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loss_bits: Option<String>,
}

impl From<DomainLoss> for DomainLossText {
    fn from(value: DomainLoss) -> Self {
        Self {
            loss: finite(value.loss),
            tokens: value.tokens,
            loss_bits: (!value.loss.is_finite()).then(|| bits_text(value.loss)),
        }
    }
}

impl TryFrom<DomainLossText> for DomainLoss {
    type Error = String;

    fn try_from(text: DomainLossText) -> Result<Self, String> {
        let loss = match (text.loss, &text.loss_bits) {
            (Some(loss), None) => loss,
            (loss, Some(bits)) => from_bits("loss", loss, bits)?,
            (None, None) => return Err("a domain's loss is null and has no bits".into()),
        };
        Ok(Self {
            loss,
            tokens: text.tokens,
        })
    }
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

fn bits_text(value: f64) -> String {
    format!("{:#018x}", value.to_bits())
}

fn from_bits(key: &str, value: Option<f64>, bits: &str) -> Result<f64, String> {
    let digits = bits
        .strip_prefix("0x")
        .filter(|digits| digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_hexdigit()));
    let parsed = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
    let from_bits = f64::from_bits(parsed.ok_or_else(|| format!("{key}_bits '{bits}' is not 0x and 16 hex digits"))?);
    if value.map(f64::to_bits) == finite(from_bits).map(f64::to_bits) {
        Ok(from_bits)
    } else {
        let shown = value.map_or_else(|| "null".to_owned(), |value| value.to_string());
        Err(format!("{key} {shown} disagrees with {key}_bits {bits} ({from_bits})"))
    }
}

fn digest(key: &str, text: &str) -> Result<[u8; 32], String> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).map_err(|e| format!("{key} '{text}' is not 64 hex digits ({e})"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
