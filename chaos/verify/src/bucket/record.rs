//! A record of the commit chain: two lines, the record and the BLAKE3 of its line.

use crate::json::Json;

pub const RECORD_BYTES_MAX: u64 = 64 * 1024;
/// Places of a chain (docs/FORMATS.md). Anybody may put an object with a higher number there; no sum of places overflows below.
pub const PLACES_MAX: u64 = 1_000_000_000_000_000;
const MAGIC: &str = "tarazed-chain";
const SCHEMA: u64 = 1;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Commit {
    pub manifest: String,
    pub length: u64,
    pub blake3: [u8; 32],
    pub step: u64,
    pub shard_count: u64,
    pub shard_bytes: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    Fence,
    Commit(Commit),
    Retire(Vec<u64>),
    Pin(u64),
    Unpin(u64),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    pub sequence: u64,
    pub previous: [u8; 32],
    pub writer: [u8; 16],
    pub generation: u64,
    pub kind: Kind,
}

pub fn key(sequence: u64) -> String {
    format!("commits/{sequence:020}.jsonl")
}

/// The place in the chain that a key stands for, [`PLACES_MAX`] and more included; none for a key that is no record's.
pub fn place(key_text: &str) -> Option<u64> {
    let digits = key_text.strip_prefix("commits/")?.strip_suffix(".jsonl")?;
    let place = digits.parse().ok()?;
    (key(place) == key_text).then_some(place)
}

impl Record {
    /// Reads the bytes found in place `sequence`. The hash comes first: what it does not cover is not interpreted.
    pub fn decode(sequence: u64, bytes: &[u8]) -> Result<Self, String> {
        let mut lines = bytes.split(|byte| *byte == b'\n');
        let (Some(line), Some(seal), Some(b""), None) = (lines.next(), lines.next(), lines.next(), lines.next()) else {
            return Err("it is not two lines".into());
        };
        let sealed = Json::parse(seal)?;
        let [digest] = sealed.exactly(["blake3"])?;
        if digest.hex::<32>()? != *blake3::hash(line).as_bytes() || sealed.print().as_bytes() != seal {
            return Err("its line does not have the BLAKE3 it states".into());
        }
        let json = Json::parse(line)?;
        if json.print().as_bytes() != line {
            return Err("its line is not in its shortest form".into());
        }
        let [magic, schema, place, previous, writer, generation, kind] = json.exactly([
            "magic",
            "schema",
            "sequence",
            "previous",
            "writer",
            "generation",
            "kind",
        ])?;
        if magic.text()? != MAGIC || schema.count()? != SCHEMA {
            return Err("it is no record of schema 1".into());
        }
        if place.count()? != sequence {
            return Err(format!("it is record {} in the place of {sequence}", place.count()?));
        }
        Ok(Self {
            sequence,
            previous: previous.hex()?,
            writer: writer.hex()?,
            generation: generation.count()?,
            kind: read_kind(kind)?,
        })
    }
}

fn read_kind(json: &Json) -> Result<Kind, String> {
    let [(name, body)] = json.object()? else {
        return Err("its kind is not one".into());
    };
    match name.as_str() {
        "fence" => body.exactly([]).map(|[]| Kind::Fence),
        "commit" => {
            let keys = [
                "manifest",
                "length",
                "blake3",
                "step",
                "shard_count",
                "shard_bytes",
                "created_unix_ms",
            ];
            let [manifest, length, blake3, step, shard_count, shard_bytes, created] = body.exactly(keys)?;
            created.count()?;
            Ok(Kind::Commit(Commit {
                manifest: manifest.text()?.to_owned(),
                length: length.count()?,
                blake3: blake3.hex()?,
                step: step.count()?,
                shard_count: shard_count.count()?,
                shard_bytes: shard_bytes.count()?,
            }))
        }
        "retire" => {
            let [sequences] = body.exactly(["sequences"])?;
            sequences
                .list()?
                .iter()
                .map(Json::count)
                .collect::<Result<_, _>>()
                .map(Kind::Retire)
        }
        "pin" => {
            let [sequence, note] = body.exactly(["sequence", "note"])?;
            note.text()?;
            sequence.count().map(Kind::Pin)
        }
        "unpin" => {
            let [sequence] = body.exactly(["sequence"])?;
            sequence.count().map(Kind::Unpin)
        }
        other => Err(format!("'{other}' is no kind of record")),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::json::to_hex;

    /// The bytes of a record; `kind` in JSON.
    pub fn handmade(sequence: u64, previous: [u8; 32], writer: u8, generation: u64, kind: &str) -> Vec<u8> {
        let line = format!(
            r#"{{"magic":"tarazed-chain","schema":1,"sequence":{sequence},"previous":"{}","writer":"{}","generation":{generation},"kind":{kind}}}"#,
            to_hex(&previous),
            to_hex(&[writer; 16])
        );
        format!("{line}\n{{\"blake3\":\"{}\"}}\n", blake3::hash(line.as_bytes())).into_bytes()
    }

    #[test]
    fn every_kind_is_read() {
        let kind = |text: &str| Record::decode(5, &handmade(5, [9; 32], 1, 2, text)).map(|record| record.kind);
        assert_eq!(kind(r#"{"fence":{}}"#), Ok(Kind::Fence));
        assert_eq!(kind(r#"{"retire":{"sequences":[1,2]}}"#), Ok(Kind::Retire(vec![1, 2])));
        assert_eq!(kind(r#"{"pin":{"sequence":1,"note":"for \"A\""}}"#), Ok(Kind::Pin(1)));
        assert_eq!(kind(r#"{"unpin":{"sequence":1}}"#), Ok(Kind::Unpin(1)));
        assert!(kind(r#"{"fence":{"x":1}}"#).is_err());
        assert!(kind(r#"{"other":{}}"#).is_err());
        assert!(
            kind(r#"{"pin": {"sequence":1,"note":""}}"#).is_err(),
            "another spelling"
        );
        assert!(Record::decode(6, &handmade(5, [9; 32], 1, 2, r#"{"fence":{}}"#)).is_err());
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = handmade(5, [9; 32], 1, 2, r#"{"pin":{"sequence":1,"note":"x"}}"#);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                assert!(Record::decode(5, &damaged).is_err(), "byte {at}, bit {bit}");
            }
            assert!(Record::decode(5, &bytes[..at]).is_err(), "{at} bytes");
        }
    }

    #[test]
    fn keys_name_places() {
        assert_eq!(place(&key(7)), Some(7));
        for stray in [
            "commits/7.jsonl",
            "commits/+0000000000000000007.jsonl",
            "commits/x.jsonl",
            "manifests/1",
        ] {
            assert_eq!(place(stray), None);
        }
    }
}
