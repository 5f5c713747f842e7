//! How many sequences of each domain a batch gets, and in which order.
//!
//! No draw: counts follow the mixture by quota with carry. Weights are fixed-point parts of `2^32`, so carries are exact
//! integers, sum to zero, never drift, and are the same on every machine (DET-1). With `T` the exact amount due to a
//! domain so far and `C` its count, a batch gives every domain its whole sequences due, then hands out what is left to
//! the domains with a started sequence, the one whose sequence falls due first before the others. That is earliest
//! deadline first on unit jobs, which meets every deadline that can be met; so while the mixture stands,
//! `|C - T| < 1` for every domain after every batch (the quota property, Balinski and Young 1975; the chairman
//! assignment problem, Tijdeman 1980). Plain largest remainder hands out to the largest fraction instead and can break
//! that bound.
//!
//! Inside a batch each domain is spread evenly, with a phase of its own, and the whole batch is turned by a keyed amount
//! per step, so that every lane sees every domain over time and none gets a domain alone.

use tarazed_domain::DomainIndex;

/// One in fixed point.
const ONE: i64 = 1 << 32;
/// Sequences of one global batch at most; keeps all products inside 64 bits.
pub const SEQUENCES_PER_STEP_MAX: u32 = 1 << 24;

/// A mixture in fixed point: parts of `2^32`, exactly that in sum.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Quanta(Vec<i64>);

impl Quanta {
    /// Rounds `weights` (finite, not negative, not all zero) to parts; a positive weight keeps at least one part, and
    /// the largest takes up the rounding.
    #[must_use]
    pub fn new(weights: &[f64]) -> Self {
        let sum: f64 = weights.iter().sum();
        let mut parts: Vec<i64> = weights
            .iter()
            .map(|weight| ((weight / sum * ONE as f64) as i64).max(i64::from(*weight > 0.0)))
            .collect();
        let rounding = ONE - parts.iter().sum::<i64>();
        // max_by_key takes the last of equals; reversed, the first.
        if let Some(largest) = parts.iter_mut().rev().max_by_key(|part| **part) {
            *largest += rounding;
        }
        Self(parts)
    }

    /// Number of domains.
    #[must_use]
    pub fn domain_count(&self) -> usize {
        self.0.len()
    }
}

/// What each domain is owed (positive) or got in advance (negative), in parts of `2^32` of a sequence; zero in sum.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Carry(Vec<i64>);

impl Carry {
    /// Nothing owed.
    #[must_use]
    pub fn new(domain_count: usize) -> Self {
        Self(vec![0; domain_count])
    }

    /// So many domains from now on; nothing is owed to a new one.
    pub fn grow(&mut self, domain_count: usize) {
        self.0.resize(domain_count.max(self.0.len()), 0);
    }

    /// In sequences, for reports and checks.
    #[must_use]
    pub fn in_sequences(&self) -> Vec<f64> {
        self.0.iter().map(|parts| *parts as f64 / ONE as f64).collect()
    }
}

/// Composes batches; holds only scratch memory.
#[derive(Clone, Debug, Default)]
pub struct Composer {
    order: Vec<usize>,
}

impl Composer {
    /// Counts of the next batch of `sequences`, into `counts`; `carry` moves on by one batch.
    ///
    /// # Panics
    /// If the numbers of domains differ or the batch is above [`SEQUENCES_PER_STEP_MAX`].
    pub fn compose(&mut self, quanta: &Quanta, sequences: u32, carry: &mut Carry, counts: &mut [u32]) {
        assert!(sequences <= SEQUENCES_PER_STEP_MAX, "a batch of {sequences} sequences");
        assert!(
            counts.len() == quanta.0.len() && carry.0.len() == quanta.0.len(),
            "as many counts and carries as domains"
        );
        let mut left = i64::from(sequences);
        for ((due, part), count) in carry.0.iter_mut().zip(&quanta.0).zip(counts.iter_mut()) {
            *due += part * i64::from(sequences);
            let whole = (*due).max(0) / ONE;
            *count = whole as u32;
            *due -= whole * ONE;
            left -= whole;
        }
        if left > 0 {
            self.hand_out(quanta, left as usize, carry, counts);
        }
        while left < 0 {
            left += self.take_back(left.unsigned_abs() as usize, carry, counts);
        }
    }

    /// One more sequence to each of the `left` domains whose started sequence falls due first.
    fn hand_out(&mut self, quanta: &Quanta, left: usize, carry: &mut Carry, counts: &mut [u32]) {
        self.order.clear();
        self.order
            .extend((0..counts.len()).filter(|domain| carry.0[*domain] > 0));
        // Steps to the deadline are (1 - fraction) / weight; without a weight the sequence never falls due.
        let lacking = |domain: usize| i128::from(ONE - carry.0[domain]);
        let weight = |domain: usize| i128::from(quanta.0[domain]);
        self.order.sort_unstable_by(|&a, &b| {
            let (never_a, never_b) = (weight(a) == 0, weight(b) == 0);
            never_a
                .cmp(&never_b)
                .then_with(|| (lacking(a) * weight(b)).cmp(&(lacking(b) * weight(a))))
                .then(a.cmp(&b))
        });
        // Carries sum to zero before the batch, so the fractions of the started sequences sum to at least `left`.
        assert!(
            self.order.len() >= left,
            "more sequences are left than domains are owed"
        );
        for &domain in &self.order[..left] {
            counts[domain] += 1;
            carry.0[domain] -= ONE;
        }
    }

    /// More whole sequences are due than the batch holds: possible only after the mixture changed. Those least behind
    /// wait for a later batch. Returns how many were taken, at least one.
    fn take_back(&mut self, excess: usize, carry: &mut Carry, counts: &mut [u32]) -> i64 {
        self.order.clear();
        self.order
            .extend((0..counts.len()).filter(|domain| counts[*domain] > 0));
        self.order
            .sort_unstable_by(|&a, &b| carry.0[a].cmp(&carry.0[b]).then(a.cmp(&b)));
        let taken = excess.min(self.order.len());
        assert!(taken > 0, "an excess comes from counts");
        for &domain in &self.order[..taken] {
            counts[domain] -= 1;
            carry.0[domain] += ONE;
        }
        taken as i64
    }
}

/// The domains of a batch, place by place: each spread evenly, all turned by `rotation` places.
#[must_use]
pub fn interleave(counts: &[u32], rotation: u32) -> Vec<DomainIndex> {
    let total: usize = counts.iter().map(|count| *count as usize).sum();
    let mut places: Vec<(u64, u16)> = Vec::with_capacity(total);
    for (domain, &count) in counts.iter().enumerate() {
        // Phases by the golden ratio: domains of equal counts do not sit side by side.
        let phase = ((domain as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 32;
        for unit in 0..u64::from(count) {
            places.push((((unit << 32) + phase) / u64::from(count), domain as u16));
        }
    }
    places.sort_unstable();
    if total > 0 {
        places.rotate_right(rotation as usize % total);
    }
    places.into_iter().map(|(_, domain)| DomainIndex(domain)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mixture() -> impl Strategy<Value = Vec<f64>> {
        let weight = prop_oneof![4 => 0.0_f64..1.0, 1 => Just(0.0), 1 => 1e-12_f64..1e-3];
        prop::collection::vec(weight, 1..12).prop_filter("some weight", |weights| weights.iter().sum::<f64>() > 0.0)
    }

    fn largest(carry: &Carry) -> i64 {
        carry.0.iter().map(|parts| parts.abs()).max().unwrap_or(0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Counts track a standing mixture within one sequence per domain after every batch; carries sum to zero.
        #[test]
        fn counts_track_a_standing_mixture_within_one(weights in mixture(), sequences in 1_u32..40, steps in 1_u32..400) {
            let quanta = Quanta::new(&weights);
            prop_assert_eq!(quanta.0.iter().sum::<i64>(), ONE);
            let mut carry = Carry::new(weights.len());
            let mut counts = vec![0; weights.len()];
            let mut composer = Composer::default();
            let mut totals = vec![0_i64; weights.len()];
            for step in 1..=i64::from(steps) {
                composer.compose(&quanta, sequences, &mut carry, &mut counts);
                prop_assert_eq!(counts.iter().sum::<u32>(), sequences);
                prop_assert_eq!(carry.0.iter().sum::<i64>(), 0);
                prop_assert!(largest(&carry) < ONE, "carry {:?} at step {step}", carry.in_sequences());
                for ((total, count), (part, due)) in totals.iter_mut().zip(&counts).zip(quanta.0.iter().zip(&carry.0)) {
                    *total += i64::from(*count);
                    // The carry is what it says: exactly the amount due less the amount given.
                    prop_assert_eq!(part * i64::from(sequences) * step - *total * ONE, *due);
                }
            }
        }

        /// A mixture that changes at every step cannot drive carries away, and full batches always come out.
        #[test]
        fn carries_stay_bounded_when_the_mixture_changes(
            changes in prop::collection::vec((prop::collection::vec(0.0_f64..1.0, 6), 1_u32..5), 1..200),
            sequences in 1_u32..20,
        ) {
            let mut carry = Carry::new(6);
            let mut counts = vec![0; 6];
            let mut composer = Composer::default();
            for (mut weights, steps) in changes {
                weights[0] += 1e-3;
                let quanta = Quanta::new(&weights);
                for _ in 0..steps {
                    composer.compose(&quanta, sequences, &mut carry, &mut counts);
                    prop_assert_eq!(counts.iter().sum::<u32>(), sequences);
                    prop_assert_eq!(carry.0.iter().sum::<i64>(), 0);
                    prop_assert!(largest(&carry) < 2 * ONE, "carry {:?}", carry.in_sequences());
                }
            }
        }

        /// Every stretch of a batch, and so every lane, holds each domain in proportion, within two sequences.
        #[test]
        fn domains_are_spread_evenly_over_lanes(
            counts in prop::collection::vec(0_u32..40, 1..9),
            lanes in 1_usize..9,
            rotation: u32,
        ) {
            let mut counts = counts;
            let total: u32 = counts.iter().sum();
            counts[0] += (lanes as u32 - total % lanes as u32) % lanes as u32;
            let places = interleave(&counts, rotation);
            let sequences = places.len() / lanes;
            for lane in places.chunks(sequences.max(1)) {
                for (domain, count) in counts.iter().enumerate() {
                    let here = lane.iter().filter(|place| place.index() == domain).count() as f64;
                    let fair = f64::from(*count) / lanes as f64;
                    prop_assert!((here - fair).abs() <= 2.0, "domain {domain}: {here} for {fair} in {places:?}");
                }
            }
            let mut again = vec![0; counts.len()];
            for place in places {
                again[place.index()] += 1;
            }
            prop_assert_eq!(again, counts);
        }
    }

    /// A case where handing out by largest remainder leaves a domain more than one sequence behind, and deadlines do not.
    #[test]
    fn deadlines_beat_largest_remainders() {
        let weights = [0.2595, 0.2595, 0.2595, 0.0738, 0.0738, 0.0739];
        let quanta = Quanta::new(&weights);
        let mut carry = Carry::new(6);
        let mut counts = vec![0; 6];
        let mut composer = Composer::default();
        for _ in 0..10_000 {
            composer.compose(&quanta, 1, &mut carry, &mut counts);
            assert!(largest(&carry) < ONE);
        }
        let mut worst = 0_i64;
        let mut owed = [0_i64; 6];
        for _ in 0..10_000 {
            for (owed, part) in owed.iter_mut().zip(&quanta.0) {
                *owed += part;
            }
            if let Some(largest) = owed.iter_mut().max() {
                *largest -= ONE;
            }
            worst = worst.max(owed.iter().map(|parts| parts.abs()).max().unwrap_or(0));
        }
        assert!(
            worst >= ONE,
            "largest remainder held {} here",
            worst as f64 / ONE as f64
        );
    }

    #[test]
    fn a_domain_without_weight_gets_nothing_after_its_carry() {
        let mut composer = Composer::default();
        let mut carry = Carry::new(3);
        let mut counts = vec![0; 3];
        composer.compose(&Quanta::new(&[0.3, 0.3, 0.4]), 8, &mut carry, &mut counts);
        let off = Quanta::new(&[0.5, 0.5, 0.0]);
        let mut total = 0;
        for _ in 0..100 {
            composer.compose(&off, 8, &mut carry, &mut counts);
            total += counts[2];
        }
        assert!(total <= 1, "{total} sequences of a domain without weight");
    }
}
