//! The header of a safetensors file that somebody else wrote: every number in it is checked before anything is read by it.

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bytes of a header: the limit of the format's own reader.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// The key that is no tensor.
const METADATA: &str = "__metadata__";

/// What a tensor's values are stored as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stored {
    /// IEEE 754, 32 bits.
    F32,
    /// The upper half of one.
    Bf16,
    /// IEEE 754, 16 bits.
    F16,
}

impl Stored {
    fn named(name: &str) -> Option<Self> {
        match name {
            "F32" => Some(Self::F32),
            "BF16" => Some(Self::Bf16),
            "F16" => Some(Self::F16),
            _ => None,
        }
    }

    /// Bytes of one value.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Widens little-endian values: exactly, since f32 has all values of either half. As many as `out` has room for.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Self::Bf16 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
                }
            }
            Self::F16 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = f16(u16::from_le_bytes([b[0], b[1]]));
                }
            }
        }
    }
}

/// An f16 as f32.
fn f16(bits: u16) -> f32 {
    let (sign, exponent, fraction) = (
        u32::from(bits & 0x8000) << 16,
        u32::from(bits >> 10 & 0x1F),
        u32::from(bits & 0x3FF),
    );
    let magnitude = match exponent {
        // No leading one: a multiple of 2^-24, which f32 has exactly.
        0 => (fraction as f32 * f32::from_bits(0x3380_0000)).to_bits(),
        0x1F => 0x7F80_0000 | fraction << 13,
        _ => (exponent + 127 - 15) << 23 | fraction << 13,
    };
    f32::from_bits(sign | magnitude)
}

/// A tensor in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// What its values are stored as.
    pub stored: Stored,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Its first byte in the file.
    pub at: u64,
}

/// As the header spells it.
#[derive(Deserialize)]
struct Spelled {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// All keys of an object, in order: a name that stands twice must not hide a tensor.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Pairs;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Reader)
    }
}

/// Why a file's header cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The file could not be read.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// It does not say what it must; in words.
    #[error("{0}")]
    Bad(String),
}

/// The tensors of a file, in the order of its header: each has the bytes that its shape and type ask for, and together they are the
/// file's, without a gap and to its end.
///
/// # Errors
/// As [`HeaderError`].
pub fn read(file: &File) -> Result<Vec<Entry>, HeaderError> {
    let length = file.metadata()?.len();
    let mut first = [0; 8];
    if length < 8 {
        return Err(HeaderError::Bad(format!(
            "{length} bytes are too few for a safetensors file"
        )));
    }
    file.read_exact_at(&mut first, 0)?;
    let header_bytes = u64::from_le_bytes(first);
    if header_bytes > HEADER_BYTES_MAX.min(length - 8) {
        return Err(HeaderError::Bad(format!(
            "a header of {header_bytes} bytes in a file of {length}"
        )));
    }
    let mut text = vec![0; header_bytes as usize];
    file.read_exact_at(&mut text, 8)?;
    let start = 8 + header_bytes;
    entries(&text, start, length - start).map_err(HeaderError::Bad)
}

/// The tensors that a header spells, with `length` bytes of values from `start` on.
///
/// # Errors
/// In words, where they are not the file's values, all of them and once.
pub fn entries(header: &[u8], start: u64, length: u64) -> Result<Vec<Entry>, String> {
    let Pairs(pairs) = serde_json::from_slice(header).map_err(|e| format!("its header cannot be read ({e})"))?;
    let mut found: Vec<(Entry, u64)> = Vec::new();
    for (name, value) in pairs {
        if name == METADATA {
            continue;
        }
        found.push(entry(name, value, start, length)?);
    }
    let mut names: Vec<&str> = found.iter().map(|(entry, _)| entry.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("tensor {} stands twice in its header", twice[0]));
    }
    let mut spans: Vec<(u64, u64)> = found.iter().map(|(entry, end)| (entry.at, *end)).collect();
    spans.sort_unstable();
    let mut next = start;
    for (at, end) in spans {
        if at != next {
            return Err("its tensors overlap, or leave a gap".to_owned());
        }
        next = end;
    }
    let (held, needed) = (length, next - start);
    if held != needed {
        return Err(format!(
            "it holds {held} bytes of values, and its header speaks of {needed}"
        ));
    }
    Ok(found.into_iter().map(|(entry, _)| entry).collect())
}

/// A tensor and one past its last byte.
fn entry(name: String, value: Value, start: u64, length: u64) -> Result<(Entry, u64), String> {
    let spelled: Spelled = serde_json::from_value(value).map_err(|e| format!("tensor {name}: cannot be read ({e})"))?;
    let Spelled {
        dtype,
        shape,
        data_offsets: [from, to],
    } = spelled;
    let Some(stored) = Stored::named(&dtype) else {
        return Err(format!(
            "tensor {name} is of type {dtype}, and F32, BF16 and F16 are read"
        ));
    };
    let bytes = shape
        .iter()
        .try_fold(stored.bytes(), |bytes, &size| bytes.checked_mul(size));
    if bytes.is_none() || to.checked_sub(from) != bytes {
        return Err(format!(
            "tensor {name}: bytes {from} to {to} are not those of the shape {shape:?} in {dtype}"
        ));
    }
    if to > length {
        return Err(format!(
            "tensor {name} ends at byte {to} of the values, and the file holds {length}: it is not whole"
        ));
    }
    let shape = shape.into_iter().map(usize::try_from).collect::<Result<Vec<_>, _>>();
    let shape = shape.map_err(|_| format!("tensor {name} is larger than memory can be"))?;
    let entry = Entry {
        name,
        stored,
        shape,
        at: start + from,
    };
    Ok((entry, start + to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::io::Write;

    /// A file with this header and so many bytes of values.
    fn file(header: &str, bytes: usize) -> File {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| file.write_all(header.as_bytes()))
            .and_then(|()| file.write_all(&vec![0; bytes]))
            .expect("written");
        file
    }

    fn said(header: &str, bytes: usize) -> String {
        read(&file(header, bytes)).expect_err("refused").to_string()
    }

    /// Other programs write tensors in the order that they like, and what they like beside them.
    #[test]
    fn order_and_metadata_do_not_matter() {
        let header = json!({
            "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]},
            "__metadata__": {"format": "pt"},
            "empty": {"dtype": "F16", "shape": [0, 7], "data_offsets": [28, 28]},
            "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
            "c": {"dtype": "F16", "shape": [], "data_offsets": [28, 30]},
        });
        let text = format!("{header}  ");
        let start = 8 + text.len() as u64;
        let mut entries = read(&file(&text, 30)).expect("a good file");
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let entry = |name: &str, stored, shape: &[usize], at| Entry {
            name: name.to_owned(),
            stored,
            shape: shape.to_vec(),
            at: start + at,
        };
        let expected = [
            entry("a", Stored::Bf16, &[2], 0),
            entry("b", Stored::F32, &[2, 3], 4),
            entry("c", Stored::F16, &[], 28),
            entry("empty", Stored::F16, &[0, 7], 28),
        ];
        assert_eq!(entries, expected);
    }

    #[test]
    fn a_header_that_lies_is_refused() {
        let one = |shape: Value, offsets: [u64; 2]| {
            json!({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).to_string()
        };
        for (header, bytes, part) in [
            (one(json!([2]), [0, 8]), 7, "the file holds 7: it is not whole"),
            (one(json!([2]), [0, 8]), 9, "it holds 9 bytes of values, and its header speaks of 8"),
            (one(json!([3]), [0, 8]), 8, "tensor a: bytes 0 to 8 are not those of the shape [3]"),
            (one(json!([2]), [8, 0]), 8, "tensor a: bytes 8 to 0"),
            (one(json!([2]), [4, 12]), 12, "overlap, or leave a gap"),
            (one(json!([u64::MAX, 2]), [0, 8]), 8, "tensor a: bytes 0 to 8"),
            (one(json!([1_u64 << 62, 4]), [0, 0]), 0, "tensor a: bytes 0 to 0"),
            (one(json!([-2]), [0, 8]), 8, "tensor a: cannot be read"),
            (one(json!([2]), [0, 8]).replace("F32", "I64"), 8, "tensor a is of type I64"),
            (one(json!([2]), [0, 8]).replace("\"shape\"", "\"form\""), 8, "tensor a: cannot be read"),
            ("[]".to_owned(), 0, "its header cannot be read"),
            ("{\"a\":".to_owned(), 0, "its header cannot be read"),
            (
                r#"{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"a":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}"#.to_owned(),
                4,
                "tensor a stands twice",
            ),
            (
                r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"b":{"dtype":"F16","shape":[2],"data_offsets":[2,6]}}"#.to_owned(),
                6,
                "overlap, or leave a gap",
            ),
        ] {
            let told = said(&header, bytes);
            assert!(told.contains(part), "{header}: {told}");
        }
    }

    #[test]
    fn a_file_that_is_none_is_refused() {
        let raw = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().expect("a temporary file");
            file.write_all(bytes).expect("written");
            read(&file).expect_err("refused").to_string()
        };
        assert!(raw(b"").contains("too few"));
        assert!(raw(b"1234567").contains("too few"));
        for length in [3, u64::MAX, HEADER_BYTES_MAX + 1] {
            let told = raw(&[&length.to_le_bytes()[..], b"{}"].concat());
            assert!(
                told.contains(&format!("a header of {length} bytes in a file of 10")),
                "{told}"
            );
        }
        read(&file("{}", 0)).expect("no tensor at all");
    }

    /// All 65,536 of each, by the definition of the formats.
    #[test]
    fn halves_are_widened_exactly() {
        for bits in 0..=u16::MAX {
            let mut out = [0.0];
            Stored::F16.widen(&bits.to_le_bytes(), &mut out);
            let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
            let (exponent, fraction) = (i32::from(bits >> 10 & 0x1F), f64::from(bits & 0x3FF));
            let expected = match exponent {
                0 => sign * fraction * 2_f64.powi(-24),
                31 if fraction == 0.0 => sign * f64::INFINITY,
                31 => f64::NAN,
                _ => sign * (1.0 + fraction / 1024.0) * 2_f64.powi(exponent - 15),
            };
            let same = f64::from(out[0]) == expected && out[0].is_sign_negative() == (sign < 0.0);
            assert!(
                same || (expected.is_nan() && out[0].is_nan()),
                "{bits:#x}: {} {expected}",
                out[0]
            );
            Stored::Bf16.widen(&bits.to_le_bytes(), &mut out);
            assert_eq!(out[0].to_bits(), u32::from(bits) << 16);
        }
        let mut out = [0.0; 2];
        let values = [f32::MIN_POSITIVE / 2.0, -0.0];
        Stored::F32.widen(&values.map(f32::to_le_bytes).concat(), &mut out);
        assert_eq!(out.map(f32::to_bits), values.map(f32::to_bits));
    }
}
