//! The flat parameter space: tensors, blocks, optimizer shards.
//!
//! All parameters lie in one flat f32 space, first the tensors that decay, then those that do not (norm weights); each
//! group is padded to whole blocks, so a block is decayed as a whole or not at all. Padding is zero and stays zero. Fixed
//! blocks are the unit of gradient-norm partials and of hashes; optimizer shards are contiguous runs of blocks. Nothing
//! here depends on the world size.

use crate::ids::{BlockIndex, OptimizerShardIndex};
use std::ops::Range;

/// One parameter tensor in the flat space.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorSlot {
    /// Hugging Face name, e.g. `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Row-major shape, e.g. `[out_features, in_features]`.
    pub shape: Vec<usize>,
    /// First element in the flat space.
    pub offset: usize,
    /// Whether weight decay applies.
    pub decays: bool,
}

impl TensorSlot {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its elements in the flat space.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// Where every parameter lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParameterLayout {
    tensors: Vec<TensorSlot>,
    block_elements: usize,
    decayed_blocks: usize,
    block_count: usize,
    parameter_count: usize,
}

impl ParameterLayout {
    /// Lays out `tensors` (name, shape, decays), in the given order within each group.
    ///
    /// # Panics
    /// If `block_elements` is zero: the config refuses that before.
    #[must_use]
    pub fn new(tensors: impl IntoIterator<Item = (String, Vec<usize>, bool)>, block_elements: usize) -> Self {
        assert!(block_elements > 0, "a block holds at least one element");
        let (decaying, steady): (Vec<_>, Vec<_>) = tensors.into_iter().partition(|(_, _, decays)| *decays);
        let mut slots = Vec::with_capacity(decaying.len() + steady.len());
        let mut offset = 0;
        let mut parameter_count = 0;
        let mut decayed_blocks = 0;
        for (group_index, group) in [decaying, steady].into_iter().enumerate() {
            for (name, shape, decays) in group {
                let slot = TensorSlot {
                    name,
                    shape,
                    offset,
                    decays,
                };
                offset += slot.len();
                parameter_count += slot.len();
                slots.push(slot);
            }
            offset = offset.next_multiple_of(block_elements);
            if group_index == 0 {
                decayed_blocks = offset / block_elements;
            }
        }
        Self {
            tensors: slots,
            block_elements,
            decayed_blocks,
            block_count: offset / block_elements,
            parameter_count,
        }
    }

    /// The tensors, by offset.
    #[must_use]
    pub fn tensors(&self) -> &[TensorSlot] {
        &self.tensors
    }

    /// The tensor of that name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorSlot> {
        self.tensors.iter().find(|slot| slot.name == name)
    }

    /// One line for each tensor, by offset: name, shape, offset. Its digest tells layouts apart in manifests.
    #[must_use]
    pub fn described(&self) -> String {
        let line = |slot: &TensorSlot| format!("{} {:?} {}\n", slot.name, slot.shape, slot.offset);
        self.tensors.iter().map(line).collect()
    }

    /// Elements of the flat space, padding included: a multiple of the block size.
    #[must_use]
    pub const fn flat_elements(&self) -> usize {
        self.block_count * self.block_elements
    }

    /// Parameters, padding not counted.
    #[must_use]
    pub const fn parameter_count(&self) -> usize {
        self.parameter_count
    }

    /// Elements of one block.
    #[must_use]
    pub const fn block_elements(&self) -> usize {
        self.block_elements
    }

    /// Number of blocks.
    #[must_use]
    pub const fn block_count(&self) -> usize {
        self.block_count
    }

    /// Whether weight decay applies to a block.
    #[must_use]
    pub const fn block_decays(&self, block: BlockIndex) -> bool {
        block.index() < self.decayed_blocks
    }

    /// The elements of a block in the flat space.
    #[must_use]
    pub const fn block_range(&self, block: BlockIndex) -> Range<usize> {
        block.index() * self.block_elements..(block.index() + 1) * self.block_elements
    }
}

/// How the blocks group into optimizer shards: contiguous, as even as whole blocks allow, the same at any world size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShardLayout {
    block_count: usize,
    block_elements: usize,
    shard_count: usize,
}

impl ShardLayout {
    /// Cuts the layout's blocks into at most `shard_count_max` shards, none empty.
    #[must_use]
    pub fn new(layout: &ParameterLayout, shard_count_max: usize) -> Self {
        let block_count = layout.block_count();
        Self {
            block_count,
            block_elements: layout.block_elements(),
            shard_count: shard_count_max.clamp(1, block_count.max(1)),
        }
    }

    /// Number of optimizer shards.
    #[must_use]
    pub const fn shard_count(&self) -> usize {
        self.shard_count
    }

    /// The shards, in order.
    pub fn shards(&self) -> impl ExactSizeIterator<Item = OptimizerShardIndex> + use<> {
        (0..self.shard_count as u32).map(OptimizerShardIndex)
    }

    /// The blocks of a shard.
    #[must_use]
    pub const fn blocks(&self, shard: OptimizerShardIndex) -> Range<usize> {
        let index = shard.index();
        index * self.block_count / self.shard_count..(index + 1) * self.block_count / self.shard_count
    }

    /// The elements of a shard in the flat space.
    #[must_use]
    pub const fn elements(&self, shard: OptimizerShardIndex) -> Range<usize> {
        let blocks = self.blocks(shard);
        blocks.start * self.block_elements..blocks.end * self.block_elements
    }
}
