//! Bytes of one checkpoint shard: a safetensors file that any tool can open.
//!
//! Three flat f32 tensors, in this order and without gaps: `master`, `exp_avg`, `exp_avg_sq`; the metadata name step,
//! generation, shard and blocks, as decimal text. The header says nothing of ranks (CKPT-6). Layout after the
//! safetensors format: u64 little-endian header length, JSON header padded with spaces to 8 bytes, tensor bytes.

use crate::error::StoreError;
use crate::limits::SHARD_HEADER_BYTES_MAX;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tarazed_domain::{Generation, OptimizerShardIndex, ShardLayout, StepsCompleted};

/// Names of the tensors, in file order.
pub const TENSORS: [&str; 3] = ["master", "exp_avg", "exp_avg_sq"];
/// Bytes of all three tensors per element.
pub const BYTES_PER_ELEMENT: u64 = 12;
const FORMAT: &str = "tarazed-optimizer-shard-1";

/// Which blocks an optimizer shard holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ShardGeometry {
    /// Which optimizer shard.
    pub shard: OptimizerShardIndex,
    /// Its first block in the flat parameter space.
    pub first_block: u32,
    /// How many blocks.
    pub block_count: u32,
    /// Elements of one block.
    pub block_elements: u64,
}

impl ShardGeometry {
    /// The geometry of `shard` in a shard layout.
    ///
    /// # Panics
    /// If the layout has no such shard or it is empty: a programmer's error.
    #[must_use]
    pub fn of(layout: &ShardLayout, shard: OptimizerShardIndex) -> Self {
        let (blocks, elements) = (layout.blocks(shard), layout.elements(shard));
        assert!(
            shard.index() < layout.shard_count() && !blocks.is_empty(),
            "no shard {shard} in this layout"
        );
        Self {
            shard,
            first_block: blocks.start as u32,
            block_count: blocks.len() as u32,
            block_elements: (elements.len() / blocks.len()) as u64,
        }
    }

    /// Elements of each tensor.
    #[must_use]
    pub const fn elements(&self) -> u64 {
        self.block_count as u64 * self.block_elements
    }

    /// Position of the first element in the flat parameter space.
    #[must_use]
    pub const fn first_element(&self) -> u64 {
        self.first_block as u64 * self.block_elements
    }

    /// Bytes of the three tensors.
    #[must_use]
    pub const fn payload_bytes(&self) -> u64 {
        self.elements() * BYTES_PER_ELEMENT
    }
}

#[derive(PartialEq, Eq, Debug, Serialize, Deserialize)]
struct TensorEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

#[derive(PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    metadata: BTreeMap<String, String>,
    #[serde(flatten)]
    tensors: BTreeMap<String, TensorEntry>,
}

impl Header {
    fn new(step: StepsCompleted, generation: Generation, geometry: &ShardGeometry) -> Self {
        let metadata = [
            ("format", FORMAT.to_string()),
            ("step", step.to_string()),
            ("generation", generation.to_string()),
            ("shard", geometry.shard.to_string()),
            ("first_block", geometry.first_block.to_string()),
            ("block_count", geometry.block_count.to_string()),
            ("block_elements", geometry.block_elements.to_string()),
        ];
        let bytes = geometry.elements() * 4;
        let entry = |index: u64| TensorEntry {
            dtype: "F32".to_string(),
            shape: vec![geometry.elements()],
            data_offsets: [index * bytes, (index + 1) * bytes],
        };
        Self {
            metadata: metadata
                .into_iter()
                .map(|(key, value)| (key.to_string(), value))
                .collect(),
            tensors: (0_u64..)
                .zip(TENSORS)
                .map(|(index, name)| (name.to_string(), entry(index)))
                .collect(),
        }
    }
}

/// The file's first bytes: length and JSON header. The tensors follow.
///
/// # Errors
/// [`StoreError::Refused`] if JSON cannot hold it.
pub fn encode_header(
    step: StepsCompleted,
    generation: Generation,
    geometry: &ShardGeometry,
) -> Result<Vec<u8>, StoreError> {
    let mut json = serde_json::to_vec(&Header::new(step, generation, geometry))
        .map_err(|error| StoreError::refused(format!("a shard header cannot be written: {error}")))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(&json);
    Ok(bytes)
}

/// Bytes before the tensors, for an object of `length` bytes that holds `geometry`.
///
/// # Errors
/// Why no object of that length can hold it.
pub fn header_bytes(length: u64, geometry: &ShardGeometry) -> Result<u64, String> {
    match length.checked_sub(geometry.payload_bytes()) {
        Some(bytes) if (8..=SHARD_HEADER_BYTES_MAX).contains(&bytes) => Ok(bytes),
        _ => Err(format!(
            "{length} bytes cannot hold {} elements three times",
            geometry.elements()
        )),
    }
}

/// Checks the file's first bytes (all of them, up to the tensors) against what the manifest says. The caller has checked
/// the object's hash before (CKPT-4).
///
/// # Errors
/// What differs, in words.
pub fn check_header(bytes: &[u8], step: StepsCompleted, geometry: &ShardGeometry) -> Result<(), String> {
    let (length, json) = bytes.split_first_chunk::<8>().ok_or("it has no header")?;
    if u64::from_le_bytes(*length) != json.len() as u64 {
        return Err("its header has another length than its size implies".to_string());
    }
    let header: Header = serde_json::from_slice(json).map_err(|error| format!("its header cannot be read: {error}"))?;
    // The generation may differ: a manifest can list shards uploaded just before a reconfiguration.
    let generation = header
        .metadata
        .get("generation")
        .and_then(|text| text.parse().ok())
        .map(Generation);
    let generation = generation.ok_or("its header names no generation")?;
    if header != Header::new(step, generation, geometry) {
        return Err(format!(
            "its header is not that of step {step}, shard {}",
            geometry.shard
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> ShardGeometry {
        ShardGeometry {
            shard: OptimizerShardIndex(1),
            first_block: 4,
            block_count: 2,
            block_elements: 3,
        }
    }

    #[test]
    fn other_tools_read_a_shard() {
        let geometry = geometry();
        let mut file = encode_header(StepsCompleted(8), Generation(2), &geometry).unwrap();
        let header_len = file.len() as u64;
        let values: Vec<f32> = (0..18).map(|i| i as f32 / 7.0 - 1.0).collect();
        file.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        assert_eq!(header_bytes(file.len() as u64, &geometry), Ok(header_len));
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["first_block"], "4");
        let parsed = safetensors::SafeTensors::deserialize(&file).unwrap();
        for (index, name) in TENSORS.iter().enumerate() {
            let tensor = parsed.tensor(name).unwrap();
            assert_eq!(
                (tensor.dtype(), tensor.shape()),
                (safetensors::Dtype::F32, &[6_usize][..])
            );
            let read: Vec<f32> = tensor
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect();
            assert_eq!(read, values[index * 6..index * 6 + 6]);
        }
    }

    #[test]
    fn a_header_of_another_shard_or_step_is_noticed() {
        let geometry = geometry();
        let bytes = encode_header(StepsCompleted(8), Generation(2), &geometry).unwrap();
        assert_eq!(check_header(&bytes, StepsCompleted(8), &geometry), Ok(()));
        assert!(check_header(&bytes, StepsCompleted(9), &geometry).is_err());
        let other = ShardGeometry {
            first_block: 5,
            ..geometry
        };
        assert!(check_header(&bytes, StepsCompleted(8), &other).is_err());
        assert!(check_header(&bytes[..bytes.len() - 1], StepsCompleted(8), &geometry).is_err());
        assert!(check_header(b"", StepsCompleted(8), &geometry).is_err());
    }
}
