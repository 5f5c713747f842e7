//! How many sequences of each domain a batch holds, and in which order: exact, without a draw.
//!
//! A mixture is turned into whole parts of 2³². Each domain has an account of what it is owed; a batch pays out whole
//! sequences, then one more to those whose next falls due first. After a change of mixture more may be due than a batch
//! holds; then those least in arrears wait.

const WHOLE: i64 = 1 << 32;

/// A mixture in force.
#[derive(Clone, Debug)]
pub struct Mixture {
    /// As they were decided.
    weights: Vec<f64>,
    /// Shares of one, as printed in trace lines.
    pub shares: Vec<f64>,
    parts: Vec<i64>,
}

impl Mixture {
    /// From weights as many as domains: finite, not negative, not all zero.
    pub fn new(weights: &[f64], domains: usize) -> Result<Self, String> {
        if weights.len() != domains {
            return Err(format!("{} weights for {domains} domains", weights.len()));
        }
        let mut sum = 0.0;
        for weight in weights {
            if !weight.is_finite() || *weight < 0.0 {
                return Err(format!("the weight {weight}"));
            }
            sum += weight;
        }
        if !f64::is_finite(sum) || sum <= 0.0 {
            return Err(format!("weights that sum to {sum}"));
        }
        let mut parts: Vec<i64> = Vec::with_capacity(domains);
        for weight in weights {
            let part = (weight / sum * WHOLE as f64) as i64; // towards zero
            parts.push(if *weight > 0.0 { part.max(1) } else { 0 });
        }
        // What rounding left over goes to the largest, the first of equals.
        let rest = WHOLE - parts.iter().sum::<i64>();
        let largest = parts.iter().copied().max();
        if let Some(part) = parts.iter_mut().find(|part| Some(**part) == largest) {
            *part += rest;
        }
        Ok(Self {
            weights: weights.to_vec(),
            shares: weights.iter().map(|weight| weight / sum).collect(),
            parts,
        })
    }

    /// This one without some domains, whose weight goes to the others; where no other has any, all of it.
    pub fn without(&self, left_out: impl Fn(usize) -> bool) -> Self {
        let weights = self.weights.iter().enumerate();
        let weights: Vec<f64> = weights
            .map(|(domain, weight)| if left_out(domain) { 0.0 } else { *weight })
            .collect();
        Self::new(&weights, weights.len()).unwrap_or_else(|_| self.clone())
    }

    /// This one with new domains behind its own: they have these shares, its own domains the rest, in their proportions.
    pub fn joined_by(&self, new: &[f64]) -> Result<Self, String> {
        let taken: f64 = new.iter().sum();
        if new.iter().any(|share| !(share.is_finite() && *share > 0.0)) || taken >= 1.0 {
            return Err("shares of new domains that are none, or leave nothing to the others".into());
        }
        let kept = 1.0 - taken;
        let weights: Vec<f64> = self
            .shares
            .iter()
            .map(|share| share * kept)
            .chain(new.iter().copied())
            .collect();
        Self::new(&weights, weights.len())
    }
}

/// What each domain is owed, in parts of a sequence.
pub struct Accounts {
    owed: Vec<i64>,
}

impl Accounts {
    pub fn new(domains: usize) -> Self {
        Self { owed: vec![0; domains] }
    }

    /// One more domain, to which nothing is owed.
    pub fn open(&mut self) {
        self.owed.push(0);
    }

    /// Sequences of each domain in the next batch.
    pub fn pay(&mut self, mixture: &Mixture, sequences: u32) -> Vec<u32> {
        let mut paid = vec![0_i64; self.owed.len()];
        for ((owed, part), paid) in self.owed.iter_mut().zip(&mixture.parts).zip(&mut paid) {
            *owed += part * i64::from(sequences);
            *paid = if *owed > 0 { *owed / WHOLE } else { 0 };
            *owed -= *paid * WHOLE;
        }
        let mut open = i64::from(sequences) - paid.iter().sum::<i64>();
        if open > 0 {
            for domain in self.soonest_due(mixture).into_iter().take(open as usize) {
                paid[domain] += 1;
                self.owed[domain] -= WHOLE;
            }
        }
        while open < 0 {
            let mut ranked: Vec<usize> = (0..paid.len()).filter(|domain| paid[*domain] > 0).collect();
            ranked.sort_by_key(|domain| (self.owed[*domain], *domain));
            for domain in ranked.into_iter().take(open.unsigned_abs() as usize) {
                paid[domain] -= 1;
                self.owed[domain] += WHOLE;
                open += 1;
            }
        }
        paid.into_iter().map(|count| count as u32).collect()
    }

    /// Domains that are owed a part of a sequence, by the time until all of it is due: the part that lacks, over the weight.
    fn soonest_due(&self, mixture: &Mixture) -> Vec<usize> {
        let mut owed: Vec<usize> = (0..self.owed.len()).filter(|domain| self.owed[*domain] > 0).collect();
        owed.sort_by(|&a, &b| {
            let lacks = |domain: usize| i128::from(WHOLE - self.owed[domain]);
            let part = |domain: usize| i128::from(mixture.parts[domain]);
            // Without a weight it never falls due.
            (part(a) == 0)
                .cmp(&(part(b) == 0))
                .then((lacks(a) * part(b)).cmp(&(lacks(b) * part(a))))
                .then(a.cmp(&b))
        });
        owed
    }
}

/// The domain at each place of a batch: every domain spread evenly from a phase of its own, then all turned right.
pub fn places(counts: &[u32], turn: u64) -> Vec<u16> {
    let mut placed: Vec<(u64, u16)> = Vec::new();
    for (domain, count) in (0_u16..).zip(counts) {
        let phase = (u64::from(domain) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        placed.extend((0..u64::from(*count)).map(|unit| ((unit << 32 | phase) / u64::from(*count), domain)));
    }
    placed.sort_unstable();
    let length = placed.len();
    (0..length)
        .map(|place| placed[(place + length - turn as usize % length) % length].1)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standing_mixture_is_kept_within_one_sequence() {
        let mixture = Mixture::new(&[0.5, 0.3, 0.2, 0.0], 4).unwrap();
        let mut accounts = Accounts::new(4);
        let mut totals = [0_i64; 4];
        for step in 1..=1_000 {
            let counts = accounts.pay(&mixture, 7);
            assert_eq!(counts.iter().sum::<u32>(), 7);
            for ((total, count), share) in totals.iter_mut().zip(&counts).zip(&mixture.shares) {
                *total += i64::from(*count);
                assert!((*total as f64 - share * 7.0 * f64::from(step)).abs() < 1.0 + 1e-6);
            }
        }
    }

    #[test]
    fn new_domains_join_a_mixture_with_their_shares() {
        let mixture = Mixture::new(&[1.0, 3.0], 2).unwrap();
        assert_eq!(mixture.joined_by(&[0.5]).unwrap().shares, [0.125, 0.375, 0.5]);
        assert_eq!(mixture.joined_by(&[]).unwrap().shares, [0.25, 0.75]);
        for shares in [&[0.0][..], &[1.0], &[0.5, 0.5], &[f64::NAN]] {
            assert!(mixture.joined_by(shares).is_err(), "{shares:?}");
        }
    }

    #[test]
    fn batches_stay_full_when_the_mixture_turns_over() {
        let (left, right) = (
            Mixture::new(&[1.0, 1.0, 1.0, 0.0], 4).unwrap(),
            Mixture::new(&[0.0, 0.0, 1e-9, 1.0], 4).unwrap(),
        );
        let mut accounts = Accounts::new(4);
        for step in 0..500 {
            let mixture = if step % 3 == 0 { &left } else { &right };
            assert_eq!(accounts.pay(mixture, 1).iter().sum::<u32>(), 1);
            assert_eq!(accounts.owed.iter().sum::<i64>(), 0);
        }
    }

    #[test]
    fn places_hold_the_counts() {
        let placed = places(&[3, 0, 5], 2);
        assert_eq!(
            [0, 1, 2].map(|domain| placed.iter().filter(|place| **place == domain).count()),
            [3, 0, 5]
        );
        let unturned = places(&[3, 0, 5], 0);
        assert_eq!(placed[2..], unturned[..6], "turned right by two");
        assert_eq!(places(&[1], 5), [0]);
    }

    #[test]
    fn mixtures_that_are_none_are_refused() {
        for weights in [
            &[1.0][..],
            &[0.0, 0.0],
            &[-1.0, 2.0],
            &[f64::NAN, 1.0],
            &[f64::MAX, f64::MAX],
        ] {
            assert!(Mixture::new(weights, 2).is_err(), "{weights:?}");
        }
    }
}
