//! Which fault comes next, and when: functions of the seed.

use super::kind::Kind;
use super::scenario::Pace;
use crate::sim::random::Random;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Faults dealt from a shuffled deck, so that each kind comes as often as its weight says, soon.
#[derive(Debug)]
pub struct Deck {
    weights: BTreeMap<Kind, u32>,
    cards: Vec<Kind>,
    /// Cards that could not be played when they came up; they are tried again before new ones.
    put_back: VecDeque<Kind>,
    random: Random,
}

impl Deck {
    /// Of these weights.
    #[must_use]
    pub fn new(weights: BTreeMap<Kind, u32>, seed: u64) -> Self {
        Self {
            weights,
            cards: Vec::new(),
            put_back: VecDeque::new(),
            random: Random::of(seed, "deck", 0),
        }
    }

    /// The next card; none where every kind has turned out to be impossible.
    pub fn deal(&mut self) -> Option<Kind> {
        if self.cards.is_empty() {
            let copies = |(&kind, &weight): (&Kind, &u32)| std::iter::repeat_n(kind, weight as usize);
            self.cards = self.weights.iter().flat_map(copies).collect();
            for last in (1..self.cards.len()).rev() {
                let other = self.random.between(0, last as u64) as usize;
                self.cards.swap(last, other);
            }
        }
        self.cards.pop()
    }

    /// The card to try as number `turn` of `turns` at one moment. Those put back come first, but the last is a new one: all
    /// that were put back may wait for a larger world, which only another fault brings.
    pub fn card(&mut self, turn: usize, turns: usize) -> Option<Kind> {
        if turn + 1 < turns && self.put_back.len() > turn {
            self.put_back.pop_front()
        } else {
            self.deal()
        }
    }

    /// It could not be played now.
    pub fn put_back(&mut self, kind: Kind) {
        self.put_back.push_back(kind);
    }

    /// It never will be.
    pub fn strike_out(&mut self, kind: Kind) {
        self.weights.remove(&kind);
        self.cards.retain(|card| *card != kind);
        self.put_back.retain(|card| *card != kind);
    }
}

/// When the next fault is due.
#[derive(Debug)]
pub struct Clock {
    pace: Pace,
    random: Random,
    due: Option<Instant>,
}

impl Clock {
    /// Nothing is due before the first line.
    #[must_use]
    pub fn new(pace: Pace, seed: u64) -> Self {
        Self {
            pace,
            random: Random::of(seed, "clock", 0),
            due: None,
        }
    }

    /// A new line was written.
    pub fn line(&mut self, now: Instant) {
        if self.due.is_none() {
            self.due = Some(now + self.wait());
        }
    }

    /// Whether a fault is due.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
    }

    /// A fault was done. Arrivals that do not wait for lines keep to their own times, however late this one was.
    pub fn done(&mut self) {
        let waits_for_line = self.pace.after_line_ms.is_some();
        let due = self.due.take().filter(|_| !waits_for_line);
        self.due = due.map(|due| due + self.wait());
    }

    fn wait(&mut self) -> Duration {
        let ms = match (self.pace.per_hour, self.pace.every_ms, self.pace.after_line_ms) {
            (Some(rate), ..) => self.random.waiting_ms(3_600_000.0 / rate),
            (_, Some(ms), _) => ms,
            (_, _, Some([least, most])) => self.random.between(least, most),
            _ => 0,
        };
        Duration::from_millis(ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deck_holds_each_kind_as_often_as_its_weight_says() {
        let weights = BTreeMap::from([(Kind::KillRank, 3), (Kind::EdgeReset, 1)]);
        let mut deck = Deck::new(weights.clone(), 5);
        let dealt: Vec<Kind> = (0..40).filter_map(|_| deck.deal()).collect();
        assert_eq!(dealt.iter().filter(|kind| **kind == Kind::KillRank).count(), 30);
        let mut again = Deck::new(weights, 5);
        let same: Vec<Kind> = (0..40).filter_map(|_| again.deal()).collect();
        assert_eq!(dealt, same);
        deck.strike_out(Kind::KillRank);
        deck.put_back(Kind::EdgeReset);
        assert_eq!(deck.card(0, 4), Some(Kind::EdgeReset));
        deck.strike_out(Kind::EdgeReset);
        assert_eq!(deck.deal(), None);
    }

    #[test]
    fn cards_that_wait_for_a_larger_world_do_not_keep_new_ones_away() {
        let mut deck = Deck::new(BTreeMap::from([(Kind::KillRank, 1)]), 5);
        (0..20).for_each(|_| deck.put_back(Kind::EdgeReset));
        let tried: Vec<Option<Kind>> = (0..4)
            .map(|turn| {
                let card = deck.card(turn, 4);
                deck.put_back(Kind::EdgeReset);
                card
            })
            .collect();
        assert_eq!(tried[..3], [Some(Kind::EdgeReset); 3]);
        assert_eq!(tried[3], Some(Kind::KillRank));
    }

    #[test]
    fn a_fixed_rate_does_not_drift_and_a_line_is_waited_for_where_it_should_be() {
        let start = Instant::now();
        let pace = Pace {
            every_ms: Some(100),
            ..Pace::default()
        };
        let mut clock = Clock::new(pace, 1);
        assert!(!clock.is_due(start + Duration::from_secs(9)));
        clock.line(start);
        for turn in 1..=5 {
            assert!(!clock.is_due(start + Duration::from_millis(100 * turn - 1)));
            assert!(clock.is_due(start + Duration::from_millis(100 * turn)));
            clock.done();
        }
        let pace = Pace {
            after_line_ms: Some([5, 5]),
            ..Pace::default()
        };
        let mut clock = Clock::new(pace, 1);
        clock.line(start);
        assert!(clock.is_due(start + Duration::from_millis(5)));
        clock.done();
        assert!(!clock.is_due(start + Duration::from_secs(9)));
    }
}
