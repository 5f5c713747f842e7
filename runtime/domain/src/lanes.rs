//! Lanes and the aligned binary tree over them (DESIGN.md section 3).
//!
//! The global batch is cut into a fixed number of lanes. Gradients, losses and statistics of all lanes are summed along
//! one fixed binary tree: a node is `left + right`, and a node whose right half holds no lane passes its left half
//! through. Which rank computes which lane never shows in a sum.
//!
//! Invariant: **DET-2** every sum across lanes follows this tree, whatever the arrival order or the world size.

use crate::ids::LaneIndex;
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

/// A node of the aligned tree: it covers the lanes `[index << level, (index + 1) << level)` that exist.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    Serialize,
    Deserialize,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct Node {
    /// Height above the leaves; 0 is a lane.
    pub level: u8,
    /// Position among the nodes of that level.
    pub index: u32,
}

impl Node {
    /// The leaf of one lane.
    #[must_use]
    pub const fn leaf(lane: LaneIndex) -> Self {
        Self {
            level: 0,
            index: lane.0,
        }
    }

    /// The node one level up.
    #[must_use]
    pub const fn parent(self) -> Self {
        Self {
            level: self.level + 1,
            index: self.index / 2,
        }
    }

    /// The other child of this node's parent.
    #[must_use]
    pub const fn sibling(self) -> Self {
        Self {
            level: self.level,
            index: self.index ^ 1,
        }
    }

    /// Whether this is its parent's left child.
    #[must_use]
    pub const fn is_left(self) -> bool {
        self.index & 1 == 0
    }
}

/// A contiguous, possibly empty range of lanes `[start, end)`.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    Debug,
    Default,
    Serialize,
    Deserialize,
    rkyv::Archive,
    rkyv::Serialize,
    rkyv::Deserialize,
)]
pub struct LaneRange {
    /// First lane.
    pub start: u32,
    /// One past the last lane.
    pub end: u32,
}

impl LaneRange {
    /// Number of lanes.
    #[must_use]
    pub const fn len(self) -> usize {
        (self.end - self.start) as usize
    }

    /// Whether the range holds no lane.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The lanes, in order.
    pub fn lanes(self) -> impl ExactSizeIterator<Item = LaneIndex> {
        (self.start..self.end).map(LaneIndex)
    }

    /// Whether `lane` lies in the range.
    #[must_use]
    pub const fn contains(self, lane: LaneIndex) -> bool {
        self.start <= lane.0 && lane.0 < self.end
    }
}

/// The aligned binary tree over a fixed number of lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LaneTree {
    lane_count: u32,
}

impl LaneTree {
    /// The tree over `lane_count` lanes.
    ///
    /// # Panics
    /// If there is no lane: the config refuses that before.
    #[must_use]
    pub const fn new(lane_count: u32) -> Self {
        assert!(lane_count > 0, "a lane tree needs at least one lane");
        Self { lane_count }
    }

    /// Number of lanes.
    #[must_use]
    pub const fn lane_count(self) -> u32 {
        self.lane_count
    }

    /// The node over all lanes.
    #[must_use]
    pub const fn root(self) -> Node {
        Node {
            level: (u32::BITS - (self.lane_count - 1).leading_zeros()) as u8,
            index: 0,
        }
    }

    /// The lanes that `node` covers; empty where the node lies beyond the last lane.
    #[must_use]
    pub fn span(self, node: Node) -> LaneRange {
        let clamp = |lane: u64| u32::try_from(lane.min(u64::from(self.lane_count))).unwrap_or(self.lane_count);
        LaneRange {
            start: clamp(u64::from(node.index) << node.level),
            end: clamp((u64::from(node.index) + 1) << node.level),
        }
    }

    fn lies_within(self, node: Node, range: LaneRange) -> bool {
        let span = self.span(node);
        !span.is_empty() && range.start <= span.start && span.end <= range.end
    }

    /// The largest nodes that lie whole inside `range`, from left to right: what a rank ships.
    #[must_use]
    pub fn maximal_nodes(self, range: LaneRange) -> Vec<Node> {
        let mut nodes = Vec::new();
        let mut lane = range.start;
        while lane < range.end {
            let mut node = Node::leaf(LaneIndex(lane));
            while node != self.root() && node.is_left() && self.lies_within(node.parent(), range) {
                node = node.parent();
            }
            lane = self.span(node).end;
            nodes.push(node);
        }
        nodes
    }

    /// Contiguous lane ranges for ranks of the given relative `speeds`: each lane goes where it is done first, so that the
    /// slowest rank is done as early as can be; every rank gets at least one lane.
    ///
    /// # Panics
    /// If there are more ranks than lanes or none at all: the config refuses that before.
    #[must_use]
    pub fn assign(self, speeds: &[u32]) -> Vec<LaneRange> {
        let rank_count = speeds.len();
        assert!(
            rank_count > 0 && rank_count <= self.lane_count as usize,
            "ranks must be 1 to the number of lanes"
        );
        let counts = if speeds.iter().all(|&speed| speed == speeds[0]) {
            let (whole, rest) = (
                self.lane_count as usize / rank_count,
                self.lane_count as usize % rank_count,
            );
            (0..rank_count).map(|rank| whole + usize::from(rank < rest)).collect()
        } else {
            self.counts_by_speed(speeds)
        };
        let mut start = 0;
        counts
            .iter()
            .map(|&count: &usize| {
                let range = LaneRange {
                    start,
                    end: start + count as u32,
                };
                start = range.end;
                range
            })
            .collect()
    }

    fn counts_by_speed(self, speeds: &[u32]) -> Vec<usize> {
        // When a rank would be done with one lane more, as a fraction: the earliest first, of equals the lowest rank.
        let mut counts = vec![1; speeds.len()];
        let next = |count: usize, rank: usize| Reverse((Done(count as u64 + 1, u64::from(speeds[rank].max(1))), rank));
        let mut queue: BinaryHeap<_> = (0..speeds.len()).map(|rank| next(1, rank)).collect();
        for _ in speeds.len()..self.lane_count as usize {
            if let Some(Reverse((_, rank))) = queue.pop() {
                counts[rank] += 1;
                queue.push(next(counts[rank], rank));
            }
        }
        counts
    }
}

/// Lanes over speed, compared exactly.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Done(u64, u64);

impl Ord for Done {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0 * other.1).cmp(&(other.0 * self.1))
    }
}

impl PartialOrd for Done {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// Folds values into a range's maximal nodes, in whatever order the lanes finish.
///
/// Combining happens only between siblings, `left + right`, so the bits of a node do not depend on the order in which
/// values come (DET-2). In lane order it holds at most `log2(range) + 1` values where the range begins at a multiple of a
/// power of two that is not shorter, as all do where every rank has the same power of two of lanes. Elsewhere nodes shrink
/// towards both ends of the range, and it holds at most `2 log2(range)` (one for a single lane).
#[derive(Debug)]
pub struct TreeFold<T> {
    tree: LaneTree,
    range: LaneRange,
    held: BTreeMap<Node, T>,
}

impl<T> TreeFold<T> {
    /// An empty fold over the lanes of `range`.
    #[must_use]
    pub const fn new(tree: LaneTree, range: LaneRange) -> Self {
        Self {
            tree,
            range,
            held: BTreeMap::new(),
        }
    }

    /// Adds the value of `node`; `add(left, right)` must leave `left + right` in the value it returns.
    ///
    /// # Errors
    /// Whatever `add` returns.
    ///
    /// # Panics
    /// If the node is outside the range or came before: a programmer's error.
    pub fn insert<E>(&mut self, node: Node, value: T, mut add: impl FnMut(T, T) -> Result<T, E>) -> Result<(), E> {
        let (mut node, mut value) = (node, value);
        while let Some((left, right, parent)) = self.offer(node, value) {
            value = add(left, right)?;
            node = parent;
        }
        Ok(())
    }

    /// Adds the value of `node` and, where its sibling waits, hands both out as (left, right, parent) for the caller to
    /// add and offer again. Lets threads add outside a lock on the fold.
    ///
    /// # Panics
    /// If the node is outside the range or came before.
    pub fn offer(&mut self, node: Node, value: T) -> Option<(T, T, Node)> {
        let mut node = node;
        assert!(
            self.tree.lies_within(node, self.range),
            "node {node:?} is outside {:?}",
            self.range
        );
        loop {
            let parent = node.parent();
            if node == self.tree.root() || !self.tree.lies_within(parent, self.range) {
                break;
            }
            let sibling = node.sibling();
            if self.tree.span(sibling).is_empty() {
                node = parent; // a missing right half: the node passes through
                continue;
            }
            let Some(other) = self.held.remove(&sibling) else {
                break;
            };
            let (left, right) = if node.is_left() { (value, other) } else { (other, value) };
            return Some((left, right, parent));
        }
        let before = self.held.insert(node, value);
        assert!(before.is_none(), "node {node:?} was folded twice");
        None
    }

    /// The folded nodes, left to right. Whole once every lane of the range has come.
    #[must_use]
    pub fn into_nodes(self) -> Vec<(Node, T)> {
        let tree = self.tree;
        let mut nodes: Vec<(Node, T)> = self.held.into_iter().collect();
        nodes.sort_by_key(|(node, _)| tree.span(*node).start);
        nodes
    }

    /// Number of values held now.
    #[must_use]
    pub fn held_count(&self) -> usize {
        self.held.len()
    }
}

/// Sums one value per lane along the tree.
///
/// # Panics
/// If there are not exactly as many values as lanes.
#[must_use]
pub fn sum_over_lanes<T>(tree: LaneTree, values: Vec<T>, mut add: impl FnMut(T, T) -> T) -> T {
    assert_eq!(values.len(), tree.lane_count() as usize, "one value per lane");
    let mut fold = TreeFold::new(
        tree,
        LaneRange {
            start: 0,
            end: tree.lane_count(),
        },
    );
    for (lane, value) in values.into_iter().enumerate() {
        let node = Node::leaf(LaneIndex(lane as u32));
        let folded: Result<(), std::convert::Infallible> = fold.insert(node, value, |left, right| Ok(add(left, right)));
        match folded {
            Ok(()) => {}
        }
    }
    let mut nodes = fold.into_nodes();
    assert_eq!(nodes.len(), 1, "the fold of all lanes is the root");
    nodes.remove(0).1
}
