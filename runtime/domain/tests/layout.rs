//! The flat parameter space: what lies where, and what that may depend on.

use proptest::prelude::*;
use std::path::Path;
use tarazed_domain::config::Config;
use tarazed_domain::{BlockIndex, ParameterLayout, ShardLayout};

type Tensor = (String, Vec<usize>, bool);

/// Tensors in any order of decaying and steady ones, scalars and empty ones among them, one element at least in all.
fn tensors() -> impl Strategy<Value = Vec<Tensor>> {
    let one = (prop::collection::vec(0..9_usize, 0..4), any::<bool>());
    prop::collection::vec(one, 0..20).prop_map(|shapes| {
        std::iter::once((vec![3], true))
            .chain(shapes)
            .enumerate()
            .map(|(index, (shape, decays))| (format!("tensor {index}"), shape, decays))
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Tensors lie one after another, decaying ones first, each group in the order it was given in; only the end of a
    /// group is padded, to a whole block and no further.
    #[test]
    fn tensors_are_disjoint_and_in_order(tensors in tensors(), block_elements in 1..70_usize) {
        let layout = ParameterLayout::new(tensors.clone(), block_elements);
        let wanted = [true, false].map(|decays| tensors.iter().filter(move |tensor| tensor.2 == decays).collect::<Vec<_>>());
        let mut slots = layout.tensors().iter();
        let mut offset = 0;
        for group in &wanted {
            for (name, shape, decays) in group {
                let slot = slots.next().expect("as many slots as tensors");
                prop_assert_eq!((&slot.name, &slot.shape, slot.decays), (name, shape, *decays));
                prop_assert_eq!(slot.offset, offset);
                prop_assert_eq!(slot.len(), shape.iter().product::<usize>());
                prop_assert_eq!(slot.range(), offset..offset + slot.len());
                prop_assert_eq!(layout.tensor(name), Some(slot));
                offset += slot.len();
            }
            while !offset.is_multiple_of(block_elements) {
                offset += 1;
            }
        }
        prop_assert_eq!(slots.next(), None);
        prop_assert_eq!(layout.flat_elements(), offset);
        prop_assert_eq!(layout.block_elements(), block_elements);
        prop_assert_eq!(layout.block_count() * block_elements, offset);
        let elements: usize = tensors.iter().map(|(_, shape, _)| shape.iter().product::<usize>()).sum();
        prop_assert_eq!(layout.parameter_count(), elements);
    }

    /// A block decays as a whole or not at all: AdamW never asks element by element.
    #[test]
    fn no_block_mixes_decaying_and_steady_tensors(tensors in tensors(), block_elements in 1..70_usize) {
        let layout = ParameterLayout::new(tensors, block_elements);
        let mut next = 0;
        for block in (0..layout.block_count() as u32).map(BlockIndex) {
            let elements = layout.block_range(block);
            prop_assert_eq!(elements.start, next);
            prop_assert_eq!(elements.len(), block_elements);
            next = elements.end;
            for slot in layout.tensors() {
                let range = slot.range();
                if range.start < elements.end && elements.start < range.end {
                    prop_assert_eq!(slot.decays, layout.block_decays(block), "{} in block {}", slot.name, block);
                }
            }
        }
        prop_assert_eq!(next, layout.flat_elements());
    }

    /// Optimizer shards are runs of whole blocks: all of them, none twice, none empty, none more than a block larger than
    /// another.
    #[test]
    fn shards_partition_the_blocks(tensors in tensors(), block_elements in 1..70_usize, shards_max in 0..40_usize) {
        let layout = ParameterLayout::new(tensors, block_elements);
        let shards = ShardLayout::new(&layout, shards_max);
        prop_assert_eq!(shards.shard_count(), shards_max.max(1).min(layout.block_count()));
        prop_assert_eq!(shards.shards().len(), shards.shard_count());
        let (mut next, mut smallest, mut largest) = (0, usize::MAX, 0);
        for shard in shards.shards() {
            let blocks = shards.blocks(shard);
            prop_assert_eq!(blocks.start, next);
            prop_assert!(!blocks.is_empty(), "shard {} is empty", shard);
            prop_assert_eq!(
                shards.elements(shard),
                blocks.start * block_elements..blocks.end * block_elements
            );
            next = blocks.end;
            (smallest, largest) = (smallest.min(blocks.len()), largest.max(blocks.len()));
        }
        prop_assert_eq!(next, layout.block_count());
        prop_assert!(largest - smallest <= 1, "{smallest} to {largest} blocks");
    }
}

const TEXT: &str = r#"
[run]
name = "layout"
seed = 7
steps = 1000

[model]
layers = 1
hidden = 64
ffn = 64
heads = 2
kv_heads = 1
context = 8
vocabulary = 300
init_std = 0.1

[batch]
lanes = 8
sequences_per_lane = 1
micro_batch_sequences = 1

[optimizer]
learning_rate = 1e-3
block_elements = 1024
shards = 5

[[data.domains]]
name = "web"
path = "web.jsonl"
language = "en"
weight = 1.0
"#;

/// DET-1: blocks and shards come from the config's keys for them and the model's shape. A world of another size, with
/// other threads and other copies, finds every element in the same block of the same shard, and is the same run.
#[test]
fn nothing_depends_on_the_world_size() {
    let made = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
        let config = Config::parse(TEXT, "layout.toml", &overrides, Path::new("/configs")).expect("a good config");
        let (model, optimizer) = (&config.model, &config.optimizer);
        let tensors = [
            ("embedding".to_owned(), vec![model.vocabulary, model.hidden], true),
            ("norm".to_owned(), vec![model.hidden], false),
        ];
        let layout = ParameterLayout::new(tensors, optimizer.block_elements);
        let shards = ShardLayout::new(&layout, optimizer.shards);
        (config.identity(), layout, shards)
    };
    let alone = made(&[]);
    assert_eq!(alone.2.shard_count(), 5);
    for ranks in 2..=8 {
        let ranks = format!("cluster.ranks={ranks}");
        assert_eq!(made(&[&ranks, "cluster.threads_per_rank=3"]), alone, "{ranks}");
    }
    let recut = made(&["cluster.ranks=8", "optimizer.shards=8", "optimizer.replicas=3"]);
    assert_eq!((&recut.0, &recut.1), (&alone.0, &alone.1), "shards do not move a block");
}
