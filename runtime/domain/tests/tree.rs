//! DET-2: the sum over the lanes is one fixed tree, whoever holds which lanes and in whatever order they finish.
//!
//! The oracle here is the definition, written as a recursion over halves of a power of two; it shares no code with
//! [`TreeFold`], which works upwards from the leaves.

use proptest::prelude::*;
use std::collections::BTreeSet;
use std::convert::Infallible;
use tarazed_domain::lanes::{TreeFold, sum_over_lanes};
use tarazed_domain::limits::LANES_MAX;
use tarazed_domain::{LaneIndex, LaneRange, LaneTree, Node};

/// Trees up to this many lanes have every range looked at.
const LANES_EXHAUSTIVE: u32 = 33;
/// Trees up to this many lanes have every node looked at for every range.
const LANES_SEARCHED: u32 = 18;

/// The definition: a span is its left half plus its right half, and a half without a lane passes the other through.
fn oracle<T: Clone>(values: &[T], start: usize, size: usize, add: &impl Fn(T, T) -> T) -> Option<T> {
    if size == 1 {
        return values.get(start).cloned();
    }
    let half = size / 2;
    let (left, right) = (
        oracle(values, start, half, add),
        oracle(values, start + half, half, add),
    );
    match (left, right) {
        (Some(left), Some(right)) => Some(add(left, right)),
        (left, None) => left,
        (None, Some(_)) => panic!("lanes are missing from the right only"),
    }
}

fn oracle_root<T: Clone>(values: &[T], add: &impl Fn(T, T) -> T) -> T {
    oracle(values, 0, values.len().next_power_of_two(), add).expect("at least one lane")
}

fn oracle_node<T: Clone>(values: &[T], node: Node, add: &impl Fn(T, T) -> T) -> T {
    let size = 1_usize << node.level;
    oracle(values, node.index as usize * size, size, add).expect("a node that covers a lane")
}

/// A sum that shows its own shape: it is neither associative nor commutative.
fn shape(left: String, right: String) -> String {
    format!("({left}+{right})")
}

fn names(lane_count: u32) -> Vec<String> {
    (0..lane_count).map(|lane| lane.to_string()).collect()
}

/// Lanes that a node covers, counted one by one.
fn covered(node: Node, lane_count: u32) -> BTreeSet<u32> {
    (0..lane_count)
        .filter(|lane| lane >> node.level == node.index)
        .collect()
}

/// The nodes inside `range` whose parent is not: found by looking at every node there is.
fn maximal_by_search(lane_count: u32, range: LaneRange) -> Vec<Node> {
    let levels = u32::BITS - (lane_count - 1).leading_zeros();
    let inside = |node: Node| {
        let lanes = covered(node, lane_count);
        !lanes.is_empty() && lanes.iter().all(|&lane| range.start <= lane && lane < range.end)
    };
    let mut nodes = Vec::new();
    for level in 0..=levels as u8 {
        for index in 0..lane_count {
            let node = Node { level, index };
            let parent = Node {
                level: level + 1,
                index: index / 2,
            };
            if inside(node) && (u32::from(level) == levels || !inside(parent)) {
                nodes.push(node);
            }
        }
    }
    nodes.sort_by_key(|&node| covered(node, lane_count).first().copied());
    nodes
}

fn fold<T>(
    tree: LaneTree,
    range: LaneRange,
    values: impl IntoIterator<Item = (Node, T)>,
    add: impl Fn(T, T) -> T,
) -> Vec<(Node, T)> {
    let mut fold = TreeFold::new(tree, range);
    for (node, value) in values {
        let added: Result<(), Infallible> = fold.insert(node, value, |left, right| Ok(add(left, right)));
        match added {
            Ok(()) => {}
        }
    }
    fold.into_nodes()
}

const fn whole(lane_count: u32) -> LaneRange {
    LaneRange {
        start: 0,
        end: lane_count,
    }
}

/// A number of lanes, and a non-empty range of them.
fn range_of_lanes() -> impl Strategy<Value = (u32, LaneRange)> {
    (1..=300_u32)
        .prop_flat_map(|count| (Just(count), 0..count))
        .prop_flat_map(|(count, start)| (Just(count), Just(start), start + 1..=count))
        .prop_map(|(count, start, end)| (count, LaneRange { start, end }))
}

/// A number of lanes, and relative speeds of at most as many ranks; some alike, some far apart, some zero.
fn speeds() -> impl Strategy<Value = (u32, Vec<u32>)> {
    let speed = prop_oneof![Just(0), Just(1), Just(1000), 0..5_u32, any::<u32>()];
    (1..=400_u32).prop_flat_map(move |count| {
        (
            Just(count),
            prop::collection::vec(speed.clone(), 1..=count.min(64) as usize),
        )
    })
}

/// DET-2: written out by hand, so that neither the tree nor the oracle can drift.
#[test]
fn the_shape_of_small_trees() {
    for (lane_count, expected) in [
        (1, "0"),
        (2, "(0+1)"),
        (3, "((0+1)+2)"),
        (5, "(((0+1)+(2+3))+4)"),
        (6, "(((0+1)+(2+3))+(4+5))"),
        (7, "(((0+1)+(2+3))+((4+5)+6))"),
        (8, "(((0+1)+(2+3))+((4+5)+(6+7)))"),
    ] {
        assert_eq!(
            sum_over_lanes(LaneTree::new(lane_count), names(lane_count), shape),
            expected
        );
        assert_eq!(oracle_root(&names(lane_count), &shape), expected);
    }
}

/// What a rank ships covers its lanes once, and no larger node would do. Every range of every small tree.
#[test]
fn maximal_nodes_cover_a_range_once_and_are_the_largest() {
    for lane_count in 1..=LANES_SEARCHED {
        let tree = LaneTree::new(lane_count);
        for start in 0..=lane_count {
            for end in start..=lane_count {
                let range = LaneRange { start, end };
                let nodes = tree.maximal_nodes(range);
                assert_eq!(
                    nodes,
                    maximal_by_search(lane_count, range),
                    "{lane_count} lanes, {range:?}"
                );
                let mut next = start;
                for node in nodes {
                    let lanes = covered(node, lane_count);
                    assert_eq!(lanes, (next..next + lanes.len() as u32).collect());
                    assert_eq!(
                        tree.span(node),
                        LaneRange {
                            start: next,
                            end: next + lanes.len() as u32
                        }
                    );
                    next += lanes.len() as u32;
                }
                assert_eq!(next, end);
            }
        }
    }
}

/// The memory of a rank: values held while its lanes finish in order. Every range of every small tree.
#[test]
fn few_values_are_held_in_lane_order() {
    let mut most_unaligned = 0;
    for lane_count in 1..=LANES_EXHAUSTIVE {
        let tree = LaneTree::new(lane_count);
        for start in 0..lane_count {
            for end in start + 1..=lane_count {
                let range = LaneRange { start, end };
                let mut fold = TreeFold::new(tree, range);
                let mut held_max = 0;
                for lane in range.lanes() {
                    let added: Result<(), Infallible> = fold.insert(Node::leaf(lane), (), |(), ()| Ok(()));
                    match added {
                        Ok(()) => held_max = held_max.max(fold.held_count() as u32),
                    }
                }
                let length = end - start;
                let aligned = start.is_multiple_of(length.next_power_of_two());
                let bound = if aligned {
                    length.ilog2() + 1
                } else {
                    2 * length.ilog2()
                };
                assert!(
                    held_max <= bound.max(1),
                    "{held_max} held of {range:?} of {lane_count} lanes"
                );
                if !aligned {
                    most_unaligned = most_unaligned.max(held_max.saturating_sub(length.ilog2() + 1));
                }
            }
        }
    }
    assert!(most_unaligned > 0, "an unaligned range needs the wider bound");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// DET-2: in whatever order the lanes of a range finish, its nodes hold what the definition says, and are those it is
    /// to ship.
    #[test]
    fn any_order_folds_to_the_definition(
        ((lane_count, range), order) in range_of_lanes().prop_flat_map(|(count, range)| {
            let lanes: Vec<LaneIndex> = range.lanes().collect();
            (Just((count, range)), Just(lanes).prop_shuffle())
        }),
    ) {
        let tree = LaneTree::new(lane_count);
        let all = names(lane_count);
        let values = order.iter().map(|&lane| (Node::leaf(lane), all[lane.index()].clone()));
        let nodes = fold(tree, range, values, shape);
        let shipped: Vec<Node> = nodes.iter().map(|(node, _)| *node).collect();
        prop_assert_eq!(shipped, tree.maximal_nodes(range));
        for (node, value) in nodes {
            prop_assert_eq!(value, oracle_node(&all, node, &shape));
        }
    }

    /// DET-2: floats of very different sizes, whose sum depends on every bracket, have the same bits in any order.
    #[test]
    fn any_order_gives_the_same_bits(
        (values, order) in prop::collection::vec((-1.0e6_f32..1.0e6, -30..30_i32), 1..200).prop_flat_map(|values| {
            let order: Vec<usize> = (0..values.len()).collect();
            let values: Vec<f32> = values.into_iter().map(|(value, power)| value * 2.0_f32.powi(power)).collect();
            (Just(values), Just(order).prop_shuffle())
        }),
    ) {
        let lane_count = values.len() as u32;
        let add = |left: f32, right: f32| left + right;
        let expected = oracle_root(&values, &add).to_bits();
        prop_assert_eq!(sum_over_lanes(LaneTree::new(lane_count), values.clone(), add).to_bits(), expected);
        let shuffled = order.iter().map(|&lane| (Node::leaf(LaneIndex(lane as u32)), values[lane]));
        let nodes = fold(LaneTree::new(lane_count), whole(lane_count), shuffled, add);
        prop_assert_eq!(nodes.len(), 1);
        prop_assert_eq!(nodes[0].1.to_bits(), expected);
    }

    /// DET-2: whatever ranks there are, what they ship folds to the same tree, in whatever order it arrives.
    #[test]
    fn any_world_ships_the_same_sum((lane_count, speeds) in speeds(), seed in any::<u64>()) {
        let tree = LaneTree::new(lane_count);
        let all = names(lane_count);
        let mut shipped = Vec::new();
        for range in tree.assign(&speeds) {
            let values = range.lanes().map(|lane| (Node::leaf(lane), all[lane.index()].clone()));
            shipped.extend(fold(tree, range, values, shape));
        }
        // Any order will do; a multiplicative hash of the node mixes well enough.
        shipped.sort_by_key(|(node, _)| {
            (u64::from(node.index) << 8 | u64::from(node.level)).wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        let nodes = fold(tree, whole(lane_count), shipped, shape);
        prop_assert_eq!(nodes, vec![(tree.root(), oracle_root(&all, &shape))]);
    }

    /// Every lane is some rank's, every rank has one, and no lane would be done earlier elsewhere.
    #[test]
    fn lanes_are_shared_out_by_speed((lane_count, speeds) in speeds()) {
        let ranges = LaneTree::new(lane_count).assign(&speeds);
        prop_assert_eq!(ranges.len(), speeds.len());
        let mut next = 0;
        for range in &ranges {
            prop_assert_eq!(range.start, next);
            prop_assert!(range.end > range.start);
            next = range.end;
        }
        prop_assert_eq!(next, lane_count);

        // Whoever has a lane to give would be done later with one of any other's.
        let speed = |rank: usize| u64::from(speeds[rank].max(1));
        for (giver, given) in ranges.iter().enumerate().filter(|(_, range)| range.len() > 1) {
            for (taker, taken) in ranges.iter().enumerate() {
                let (before, after) = (given.len() as u64 * speed(taker), (taken.len() as u64 + 1) * speed(giver));
                prop_assert!(giver == taker || before <= after, "{giver} should give {taker} a lane");
            }
        }
    }

    /// The largest batch and the largest world there may be: nothing overflows on the way.
    #[test]
    fn the_largest_batch_is_shared_out(ranks in 1..=LANES_MAX, speed in any::<u32>()) {
        let ranges = LaneTree::new(LANES_MAX).assign(&vec![speed; ranks as usize]);
        prop_assert_eq!(ranges.len(), ranks as usize);
        prop_assert_eq!(ranges.first().map(|range| range.start), Some(0));
        prop_assert_eq!(ranges.last().map(|range| range.end), Some(LANES_MAX));
        let (least, most) = (LANES_MAX / ranks, LANES_MAX.div_ceil(ranks));
        for pair in ranges.windows(2) {
            prop_assert_eq!(pair[0].end, pair[1].start);
        }
        for range in ranges {
            prop_assert!((least..=most).contains(&(range.len() as u32)));
        }
    }
}
