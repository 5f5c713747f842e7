//! An exchange cut into groups that NCCL takes.
//!
//! Groups of a rank run one after another, and a group waits for its peers. So both ends of every part must put it into the
//! same round, from what both know: its place in the message, the message's place between the two, and how far the receiver is
//! from the sender. Rounds are taken in order on all ranks, so the lowest one that is not done can always be done.

use std::collections::BTreeMap;
use tarazed_domain::Rank;
use tarazed_kernels::cuda::DeviceSpan;
use tarazed_kernels::cuda::nccl::{CALL_BYTES_MAX, Direction, GROUP_CALLS_MAX, Transfer};

/// What one call and one group take at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Sends and receives of a group; at least 2.
    pub group_calls: usize,
    /// Bytes of a send or receive; at least 1.
    pub call_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            group_calls: GROUP_CALLS_MAX,
            call_bytes: CALL_BYTES_MAX,
        }
    }
}

/// A message of an exchange, seen from one end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message<'a> {
    pub peer: Rank,
    pub direction: Direction,
    pub span: &'a DeviceSpan,
}

/// The rounds of an exchange, in order; none is empty. Messages of one peer and direction are in the caller's order. Empty
/// messages need no call: both ends know their length.
pub(super) fn rounds<'a>(
    own: Rank,
    world_size: usize,
    limits: Limits,
    messages: impl Iterator<Item = Message<'a>>,
) -> Vec<Vec<Transfer>> {
    // Half of a group's calls are sends, the other half receives.
    let each_way = (limits.group_calls / 2).max(1);
    let peers = world_size.saturating_sub(1).clamp(1, each_way);
    let per_peer = (each_way / peers).max(1);
    let mut rounds: BTreeMap<(usize, usize), Vec<Transfer>> = BTreeMap::new();
    let mut parts_so_far: BTreeMap<(Rank, bool), usize> = BTreeMap::new();
    for Message { peer, direction, span } in messages {
        let is_send = direction == Direction::Send;
        let (from, to) = if is_send { (own, peer) } else { (peer, own) };
        let distance = (to.index() + world_size - from.index()) % world_size;
        let so_far = parts_so_far.entry((peer, is_send)).or_default();
        for offset in (0..span.bytes()).step_by(limits.call_bytes) {
            let key = (*so_far / per_peer, (distance - 1) / peers);
            *so_far += 1;
            rounds.entry(key).or_default().push(Transfer {
                peer: peer.0,
                direction,
                span: span.clone(),
                offset,
                bytes: limits.call_bytes.min(span.bytes() - offset),
            });
        }
    }
    rounds.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tarazed_kernels::cuda::CudaDevice;
    use tarazed_kernels::cuda::recording::RecordingDriver;
    use tarazed_kernels::{Device, Precision};

    const LONGEST: usize = 40;

    /// (from, to, elements)
    type Pattern = Vec<(usize, usize, usize)>;

    fn patterns() -> impl Strategy<Value = (usize, Limits, Pattern)> {
        let message = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..LONGEST);
        let limits = (2..9_usize, 1..70_usize).prop_map(|(group_calls, call_bytes)| Limits {
            group_calls,
            call_bytes,
        });
        (2..8_usize, limits, prop::collection::vec(message, 0..30)).prop_map(|(size, limits, messages)| {
            let apart = |(from, step, length): (prop::sample::Index, prop::sample::Index, usize)| {
                let from = from.index(size);
                (from, (from + 1 + step.index(size - 1)) % size, length)
            };
            (size, limits, messages.into_iter().map(apart).collect())
        })
    }

    type Moved = BTreeMap<(u32, u32), (Vec<usize>, Vec<usize>)>;

    /// Plays the rounds of all ranks as devices do: a rank leaves a round when its peers have asked for their ends of all
    /// that it has asked for so far. Returns what each pair moved, in order.
    fn play(plans: &[Vec<Vec<Transfer>>]) -> Moved {
        let mut at = vec![0; plans.len()];
        let asked = |at: &[usize], rank: u32, peer: u32, direction: Direction| {
            let rounds = plans[rank as usize].iter().take(at[rank as usize] + 1);
            let transfers = rounds.flatten().filter(|t| t.peer == peer && t.direction == direction);
            transfers.count()
        };
        while (0..plans.len()).any(|rank| at[rank] < plans[rank].len()) {
            let before = at.clone();
            for rank in 0..plans.len() {
                let Some(round) = plans[rank].get(at[rank]) else {
                    continue;
                };
                let own = rank as u32;
                let met = |t: &Transfer| {
                    let other = match t.direction {
                        Direction::Send => Direction::Receive,
                        Direction::Receive => Direction::Send,
                    };
                    asked(&at, t.peer, own, other) >= asked(&at, own, t.peer, t.direction)
                };
                if round.iter().all(met) {
                    at[rank] += 1;
                }
            }
            assert!(at != before, "nobody can go on");
        }
        let mut moved = Moved::new();
        for (own, plan) in (0..).zip(plans) {
            for t in plan.iter().flatten() {
                match t.direction {
                    Direction::Send => moved.entry((own, t.peer)).or_default().0.push(t.bytes),
                    Direction::Receive => moved.entry((t.peer, own)).or_default().1.push(t.bytes),
                }
            }
        }
        moved
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn both_ends_cut_alike_and_nobody_waits_for_ever((size, limits, pattern) in patterns()) {
            let device = CudaDevice::new(RecordingDriver::new()).unwrap();
            let buffer = device.alloc(LONGEST, Precision::Full).unwrap();
            let spans: Vec<DeviceSpan> = pattern.iter().map(|&(_, _, length)| buffer.span(0..length)).collect();
            let plans: Vec<Vec<Vec<Transfer>>> = (0..size)
                .map(|own| {
                    let messages = pattern.iter().zip(&spans).filter_map(|(&(from, to, _), span)| {
                        let (peer, direction) = match own {
                            own if own == from => (to, Direction::Send),
                            own if own == to => (from, Direction::Receive),
                            _ => return None,
                        };
                        Some(Message { peer: Rank(peer as u32), direction, span })
                    });
                    rounds(Rank(own as u32), size, limits, messages)
                })
                .collect();
            for transfers in plans.iter().flatten() {
                prop_assert!((1..=limits.group_calls).contains(&transfers.len()));
                for t in transfers {
                    prop_assert!((1..=limits.call_bytes).contains(&t.bytes) && t.offset + t.bytes <= t.span.bytes());
                }
            }
            let moved = play(&plans);
            for from in 0..size {
                for to in 0..size {
                    let messages = pattern.iter().filter(|m| (m.0, m.1) == (from, to));
                    let bytes: usize = messages.map(|m| m.2 * 4).sum();
                    let (sent, received) = moved.get(&(from as u32, to as u32)).cloned().unwrap_or_default();
                    prop_assert_eq!(sent.iter().sum::<usize>(), bytes);
                    prop_assert_eq!(sent, received);
                }
            }
        }
    }

    /// More peers than a group has calls for: no group is too large all the same.
    #[test]
    fn a_world_larger_than_a_group_is_cut_by_distance() {
        let device = CudaDevice::new(RecordingDriver::new()).unwrap();
        let buffer = device.alloc(1, Precision::Full).unwrap();
        let span = buffer.span(0..1);
        let size = GROUP_CALLS_MAX + 10;
        let others = || (0..size as u32).filter(|&rank| rank != 5).map(Rank);
        let messages =
            [Direction::Send, Direction::Receive].map(|direction| others().map(move |peer| (peer, direction)));
        let messages = messages.into_iter().flatten().map(|(peer, direction)| Message {
            peer,
            direction,
            span: &span,
        });
        let rounds = rounds(Rank(5), size, Limits::default(), messages);
        assert_eq!(rounds.iter().map(Vec::len).sum::<usize>(), 2 * (size - 1));
        assert!(rounds.iter().all(|round| round.len() <= GROUP_CALLS_MAX));
        assert_eq!(rounds.len(), 3);
    }
}
