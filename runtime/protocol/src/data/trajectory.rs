//! Weight trajectory: how the spread of each kind of parameter moves over the layers (arXiv 2408.07410, section 3.2.3).
//!
//! ```text
//! blocks ──► moments of pieces ──► moments of tensors ──► std by layer, a curve for each kind ──► Fréchet distance
//! ```
//!
//! For a parameter kind `p` the curve of a state is `(layer, std of p's tensor in that layer)`, and the distance between
//! two states `dist(p) = Frechet(curve, curve') / (tokens' - tokens)`, per 10⁹ tokens. The report does not say which
//! discrete form it takes; here it is the coupling distance of Eiter and Mannila (1994) between points of the plane.
//!
//! - **DET-1**, **DET-2** Optimizer shards hold blocks, so a rank knows pieces of tensors: the part of one tensor in one
//!   block. Sums run in f64 over a piece from left to right, then over the pieces of a tensor along a tree of neighbours.
//!   Nothing depends on who holds which block.
//!
//! It reads no weight: whoever holds a block sums its pieces (`train/moments.rs`). [`WeightLine`] is what a line of
//! `weights.jsonl` carries, and [`WeightLog`](super::weight_log::WeightLog) says which lines are written. A line is a function
//! of the promise, like the trace, and apart from it only because of its size; no decision reads it.

use crate::trace::DomainMap;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tarazed_domain::{BlockIndex, ParameterLayout, StepsCompleted};

/// Tokens that distances are given for.
pub const DISTANCE_TOKENS: f64 = 1e9;

/// Count, sum and sum of squares of some weights.
#[derive(Clone, Copy, PartialEq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Moments {
    /// How many.
    pub count: u64,
    /// Their sum.
    pub sum: f64,
    /// The sum of their squares.
    pub square_sum: f64,
}

impl Moments {
    /// Of these weights, summed left to right.
    #[must_use]
    pub fn of(weights: &[f32]) -> Self {
        let mut moments = Self::default();
        for weight in weights.iter().map(|weight| f64::from(*weight)) {
            moments.count += 1;
            moments.sum += weight;
            moments.square_sum += weight * weight;
        }
        moments
    }

    /// `left + right` (DET-2: the order of the arguments is the order of the addition).
    #[must_use]
    pub fn sum(left: Self, right: Self) -> Self {
        Self {
            count: left.count + right.count,
            sum: left.sum + right.sum,
            square_sum: left.square_sum + right.square_sum,
        }
    }

    /// Standard deviation, over the count; 0 of nothing.
    #[must_use]
    pub fn std(self) -> f64 {
        let count = self.count.max(1) as f64;
        let mean = self.sum / count;
        (self.square_sum / count - mean * mean).max(0.0).sqrt()
    }
}

/// The part of one tensor that lies in one block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    /// The block.
    pub block: BlockIndex,
    /// Place of the tensor in [`ParameterLayout::tensors`].
    pub tensor: usize,
    /// Elements, within the block.
    pub within: Range<usize>,
}

/// All pieces of all tensors, tensor by tensor, each from its first block to its last.
#[must_use]
pub fn pieces(layout: &ParameterLayout) -> Vec<Piece> {
    let size = layout.block_elements();
    let mut pieces = Vec::new();
    for (tensor, slot) in layout.tensors().iter().enumerate() {
        let range = slot.range();
        let mut start = range.start;
        while start < range.end {
            let block = start / size;
            let end = range.end.min((block + 1) * size);
            pieces.push(Piece {
                block: BlockIndex(block as u32),
                tensor,
                within: start - block * size..end - block * size,
            });
            start = end;
        }
    }
    pieces
}

/// Moments of each tensor from those of its pieces, both in the order of [`pieces`].
///
/// # Panics
/// If there are not as many moments as pieces.
#[must_use]
pub fn fold_tensors(pieces: &[Piece], moments: &[Moments]) -> Vec<Moments> {
    assert_eq!(pieces.len(), moments.len(), "the moments of every piece");
    let mut tensors = Vec::new();
    let mut rest = moments;
    for group in pieces.chunk_by(|a, b| a.tensor == b.tensor) {
        let (own, others) = rest.split_at(group.len());
        rest = others;
        tensors.push(fold_neighbours(own.to_vec()));
    }
    tensors
}

/// Neighbours first, an odd last one passes through, as gradient norms are summed over blocks.
fn fold_neighbours(mut moments: Vec<Moments>) -> Moments {
    while moments.len() > 1 {
        moments = moments
            .chunks(2)
            .filter_map(|pair| pair.iter().copied().reduce(Moments::sum))
            .collect();
    }
    moments.first().copied().unwrap_or_default()
}

/// A line of `weights.jsonl`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightLine {
    /// Updates in this state.
    pub step: StepsCompleted,
    /// Training tokens behind it.
    pub tokens: u64,
    /// Standard deviation by parameter kind (e.g. `self_attn.q_proj`), layer after layer.
    pub std: DomainMap<Vec<f64>>,
    /// Distance of each kind's curve from that of the line before, per 10⁹ tokens; absent in the first line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distance: Option<DomainMap<f64>>,
}

impl WeightLine {
    /// Of a state whose tensors have these moments; kinds in the order of the layout, what belongs to no layer left out.
    ///
    /// # Panics
    /// If there are not as many moments as tensors.
    #[must_use]
    pub fn new(step: StepsCompleted, tokens: u64, layout: &ParameterLayout, tensors: &[Moments]) -> Self {
        assert_eq!(layout.tensors().len(), tensors.len(), "the moments of every tensor");
        let mut found: Vec<(usize, &str, f64)> = Vec::new();
        for (slot, moments) in layout.tensors().iter().zip(tensors) {
            if let Some((layer, kind)) = layer_and_kind(&slot.name) {
                found.push((layer, kind, moments.std()));
            }
        }
        let mut std = DomainMap::<Vec<f64>>::default();
        for (_, kind, _) in &found {
            if std.get(kind).is_none() {
                let mut layers: Vec<_> = found.iter().filter(|(_, other, _)| other == kind).collect();
                layers.sort_by_key(|(layer, ..)| *layer);
                std.0
                    .push(((*kind).to_owned(), layers.iter().map(|(.., std)| *std).collect()));
            }
        }
        Self {
            step,
            tokens,
            std,
            distance: None,
        }
    }

    /// The same, with its distance from the line before.
    #[must_use]
    pub fn after(mut self, before: Option<&Self>) -> Self {
        self.distance = before.and_then(|before| self.distances(before));
        self
    }

    /// Distance of each kind from an earlier state, per 10⁹ tokens; none without tokens between them.
    #[must_use]
    pub fn distances(&self, before: &Self) -> Option<DomainMap<f64>> {
        let tokens = self.tokens.checked_sub(before.tokens).filter(|tokens| *tokens > 0)? as f64;
        let kinds = self.std.iter().filter_map(|(kind, curve)| {
            let distance = frechet(before.std.get(kind)?, curve)?;
            Some((kind.to_owned(), distance * DISTANCE_TOKENS / tokens))
        });
        Some(DomainMap(kinds.collect()))
    }
}

/// `model.layers.7.self_attn.q_proj.weight` is layer 7 and `self_attn.q_proj`.
fn layer_and_kind(name: &str) -> Option<(usize, &str)> {
    let (layer, kind) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, kind.strip_suffix(".weight").unwrap_or(kind)))
}

/// Discrete Fréchet distance of two curves `(0, a₀), (1, a₁), …`: the least, over all ways to walk both from end to end
/// without going back, of the longest distance between the two walkers. None if one has no point.
///
/// T. Eiter and H. Mannila, Computing discrete Fréchet distance, TU Wien, CD-TR 94/64, 1994.
#[must_use]
pub fn frechet(a: &[f64], b: &[f64]) -> Option<f64> {
    let apart = |i: usize, j: usize| {
        let (along, across) = (i.abs_diff(j) as f64, a[i] - b[j]);
        (along * along + across * across).sqrt()
    };
    // The best up to the pair (i, j), row by row.
    let mut row: Vec<f64> = Vec::new();
    for i in 0..a.len() {
        let before = std::mem::take(&mut row);
        for j in 0..b.len() {
            let reached = [
                before.get(j).copied(),
                j.checked_sub(1).and_then(|left| row.get(left).copied()),
                j.checked_sub(1).and_then(|left| before.get(left).copied()),
            ];
            let best = reached.into_iter().flatten().fold(f64::INFINITY, f64::min);
            let here = apart(i, j);
            row.push(if i == 0 && j == 0 { here } else { here.max(best) });
        }
    }
    row.last().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(block_elements: usize) -> ParameterLayout {
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![5, 3], true)];
        for layer in 0..12 {
            for kind in ["self_attn.q_proj", "mlp.up_proj"] {
                tensors.push((format!("model.layers.{layer}.{kind}.weight"), vec![4, 3], true));
            }
            tensors.push((format!("model.layers.{layer}.input_layernorm.weight"), vec![3], false));
        }
        ParameterLayout::new(tensors, block_elements)
    }

    fn weights(layout: &ParameterLayout) -> Vec<f32> {
        (0..layout.flat_elements())
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0)
            .collect()
    }

    /// As ranks do it: each piece from its block.
    fn line_of(layout: &ParameterLayout, flat: &[f32], tokens: u64) -> WeightLine {
        let pieces = pieces(layout);
        let moments: Vec<Moments> = pieces
            .iter()
            .map(|piece| Moments::of(&flat[layout.block_range(piece.block)][piece.within.clone()]))
            .collect();
        WeightLine::new(StepsCompleted(1), tokens, layout, &fold_tensors(&pieces, &moments))
    }

    proptest! {
        /// Every parameter is in one piece, whatever the blocks, and each tensor's spread is that of its own weights.
        #[test]
        fn pieces_are_a_partition(block_elements in 1_usize..70) {
            let layout = layout(block_elements);
            let flat = weights(&layout);
            let total: usize = pieces(&layout).iter().map(|piece| piece.within.len()).sum();
            prop_assert_eq!(total, layout.parameter_count());
            let line = line_of(&layout, &flat, 1);
            for (kind, stds) in line.std.iter() {
                prop_assert_eq!(stds.len(), 12);
                for (layer, std) in stds.iter().enumerate() {
                    let slot = layout.tensor(&format!("model.layers.{layer}.{kind}.weight")).expect("a tensor");
                    let own: Vec<f64> = flat[slot.range()].iter().map(|w| f64::from(*w)).collect();
                    let mean = own.iter().sum::<f64>() / own.len() as f64;
                    let variance = own.iter().map(|w| (w - mean) * (w - mean)).sum::<f64>() / own.len() as f64;
                    prop_assert!((std - variance.sqrt()).abs() < 1e-12);
                }
            }
        }

        /// A distance: none from itself, the same both ways, at most that of walking in step, and at least that of the ends.
        #[test]
        fn frechet_is_a_distance(pairs in prop::collection::vec((0.0_f64..3.0, 0.0_f64..3.0), 1..20)) {
            let (a, b): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
            prop_assert_eq!(frechet(&a, &a), Some(0.0));
            let distance = frechet(&a, &b).expect("curves with points");
            prop_assert_eq!(frechet(&b, &a), Some(distance));
            let apart: Vec<f64> = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).collect();
            let in_step = apart.iter().copied().fold(0.0, f64::max);
            prop_assert!(distance <= in_step && distance >= apart[0].max(apart[apart.len() - 1]));
        }
    }

    #[test]
    fn kinds_are_curves_over_the_layers_in_their_order() {
        let layout = layout(16);
        let line = line_of(&layout, &weights(&layout), 100);
        let kinds: Vec<&str> = line.std.iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, ["self_attn.q_proj", "mlp.up_proj", "input_layernorm"]);
        let text = serde_json::to_string(&line).expect("text");
        assert_eq!(serde_json::from_str::<WeightLine>(&text).expect("a line"), line);
        let wider: Vec<f32> = weights(&layout).iter().map(|weight| weight * 1.5).collect();
        let later = line_of(&layout, &wider, 100 + 2_000_000_000);
        let distances = later.distances(&line).expect("tokens between them");
        for (kind, distance) in distances.iter() {
            let largest = line.std.get(kind).expect("a curve").iter().copied().fold(0.0, f64::max);
            assert!((distance - 0.5 * largest / 2.0).abs() < 1e-9, "{kind}: {distance}");
        }
        assert_eq!(line.distances(&line), None);
    }

    /// Where a walker does better by waiting: the peak is shifted by one layer and twice as high as a layer is wide.
    #[test]
    fn a_shifted_peak_costs_one_layer() {
        let a = [0.0, 3.0, 0.0, 0.0];
        let b = [0.0, 0.0, 3.0, 0.0];
        assert_eq!(frechet(&a, &b), Some(1.0));
        assert_eq!(frechet(&a, &[]), None);
    }
}
