use crate::data::stats::{LaneStats, StatsError};
use proptest::prelude::*;
use tarazed_domain::lanes::sum_over_lanes;
use tarazed_domain::{DomainIndex, LaneIndex, LaneTree, Node};

fn lane_stats(domains: usize) -> impl Strategy<Value = LaneStats> {
    let sum = (-1e6_f64..1e6, 0_u64..1 << 40);
    (
        prop::collection::vec(sum.clone(), domains),
        prop::collection::vec(sum, domains),
    )
        .prop_map(move |(train, heldout)| {
            let mut stats = LaneStats::new(domains);
            for (domain, ((loss, tokens), (held_loss, held_tokens))) in train.into_iter().zip(heldout).enumerate() {
                stats.add_train(DomainIndex(domain as u16), loss, tokens);
                stats.add_heldout(DomainIndex(domain as u16), held_loss, held_tokens);
            }
            stats
        })
}

proptest! {
    /// DET-2: whatever ranks hold the lanes and in whatever order their nodes come, the bits are those of the lane tree.
    #[test]
    fn fold_follows_the_lane_tree(
        lanes in prop::collection::vec(lane_stats(3), 1..20),
        speeds in prop::collection::vec(1_u32..9, 1..8),
        order in any::<prop::sample::Index>(),
    ) {
        let tree = LaneTree::new(lanes.len() as u32);
        let expected = sum_over_lanes(tree, lanes.clone(), |a, b| LaneStats::sum(a, &b).unwrap());
        let ranges = tree.assign(&speeds[..speeds.len().min(lanes.len())]);
        let mut nodes: Vec<(Node, LaneStats)> = Vec::new();
        for range in ranges {
            let mut fold = tarazed_domain::lanes::TreeFold::new(tree, range);
            for lane in range.lanes() {
                fold.insert(Node::leaf(lane), lanes[lane.index()].clone(), |a, b| LaneStats::sum(a, &b)).unwrap();
            }
            for (node, stats) in fold.into_nodes() {
                // What travels between ranks.
                nodes.push((node, LaneStats::decode(&stats.encode(), 3).unwrap()));
            }
        }
        let turn = order.index(nodes.len());
        nodes.rotate_left(turn);
        let folded = LaneStats::fold(tree, nodes).unwrap();
        prop_assert_eq!(folded.encode(), expected.encode());
    }

    /// Bytes come back as they went, and any other length is refused.
    #[test]
    fn bytes_round_trip_and_damage_is_refused(stats in lane_stats(4), cut in 0_usize..140, extra in 1_usize..40) {
        let bytes = stats.encode();
        prop_assert_eq!(bytes.len(), LaneStats::encoded_bytes(4));
        prop_assert_eq!(LaneStats::decode(&bytes, 4).unwrap(), stats);
        prop_assert!(LaneStats::decode(&bytes[..cut], 4).is_err());
        prop_assert!(LaneStats::decode(&[bytes.clone(), vec![0; extra]].concat(), 4).is_err());
        prop_assert_eq!(LaneStats::decode(&bytes, 5), Err(StatsError::Domains { expected: 5, found: 4 }));
    }

    /// No bytes from a peer make it panic.
    #[test]
    fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200), domains in 0_usize..8) {
        let _answer = LaneStats::decode(&bytes, domains);
    }
}

#[test]
fn what_is_no_partition_of_the_lanes_is_refused() {
    let tree = LaneTree::new(3);
    let leaf = |lane: u32| (Node::leaf(LaneIndex(lane)), LaneStats::new(1));
    let pair = (Node { level: 1, index: 0 }, LaneStats::new(1));
    let beyond = (Node { level: 40, index: 0 }, LaneStats::new(1));
    let cover = |nodes: Vec<(Node, LaneStats)>| match LaneStats::fold(tree, nodes) {
        Err(StatsError::Cover { covered, .. }) => Some(covered),
        _ => None,
    };
    assert_eq!(cover(vec![leaf(0), leaf(1), leaf(2)]), None);
    assert_eq!(cover(vec![leaf(2), pair.clone()]), None);
    assert_eq!(cover(vec![leaf(0), leaf(2)]), Some(1));
    assert_eq!(cover(vec![leaf(0), leaf(0), leaf(1), leaf(2)]), Some(1));
    assert_eq!(cover(vec![pair, leaf(1), leaf(2)]), Some(2));
    assert_eq!(cover(vec![leaf(0), leaf(1)]), Some(2));
    assert_eq!(cover(vec![leaf(0), leaf(1), leaf(2), leaf(3)]), Some(3));
    assert_eq!(cover(vec![beyond]), Some(0));
    assert_eq!(cover(Vec::new()), Some(0));
}

#[test]
fn means_are_formed_after_the_last_sum() {
    let names = ["web".to_owned(), "wiki".to_owned()];
    let mut a = LaneStats::new(2);
    a.add_train(DomainIndex(0), 30.0, 10);
    a.add_train(DomainIndex(0), 10.0, 10);
    let mut b = LaneStats::new(2);
    b.add_train(DomainIndex(1), 5.0, 5);
    let sum = LaneStats::sum(a.clone(), &b).unwrap();
    assert_eq!(sum.train_total().mean(), Some(45.0 / 25.0));
    assert_eq!(
        sum.train_map(&names).get("web").map(|seen| (seen.loss, seen.tokens)),
        Some((2.0, 20))
    );
    assert!(a.train_map(&names).get("wiki").is_none(), "no tokens, no loss");
    assert!(sum.heldout_map(&names).is_none(), "no evaluation, no held-out losses");
    let mut held = a;
    held.add_heldout(DomainIndex(1), 8.0, 4);
    assert_eq!(
        held.heldout_map(&names).unwrap().get("wiki").map(|seen| seen.loss),
        Some(2.0)
    );
    assert_eq!(LaneStats::new(2).train_total().mean(), None);
}

#[test]
fn token_counts_that_overflow_are_refused() {
    let mut a = LaneStats::new(1);
    a.add_train(DomainIndex(0), 1.0, u64::MAX);
    let mut b = LaneStats::new(1);
    b.add_train(DomainIndex(0), 1.0, 1);
    assert!(matches!(LaneStats::sum(a, &b), Err(StatsError::Overflow { .. })));
}
