//! The unigram baseline that a model must beat.

/// Token counts of one language's training text, as a unigram model with add-one smoothing:
/// `p(t) = (count(t) + 1) / (N + V)` over `N` tokens and `V` vocabulary entries.
#[derive(Clone, Debug)]
pub(crate) struct Unigram {
    counts: Vec<u64>,
    total: u64,
}

impl Unigram {
    pub(crate) fn new(vocabulary: usize) -> Self {
        Self {
            counts: vec![0; vocabulary],
            total: 0,
        }
    }

    pub(crate) fn add(&mut self, tokens: &[u32]) {
        for &token in tokens {
            self.counts[token as usize] += 1;
        }
        self.total += tokens.len() as u64;
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        assert_eq!(self.counts.len(), other.counts.len());
        for (a, b) in self.counts.iter_mut().zip(&other.counts) {
            *a += b;
        }
        self.total += other.total;
    }

    /// Cross-entropy of `text` under this distribution, in nats per token: `-(1/n) sum_t count(t) ln p(t)`, summed in
    /// order of the token id, with a logarithm that is compiled in (DET-1). `None` for an empty text.
    pub(crate) fn cross_entropy_nats(&self, text: &Self) -> Option<f64> {
        assert_eq!(self.counts.len(), text.counts.len());
        if text.total == 0 {
            return None;
        }
        let denominator = (self.total + self.counts.len() as u64) as f64;
        let sum: f64 = text
            .counts
            .iter()
            .zip(&self.counts)
            .filter(|(n, _)| **n > 0)
            .map(|(&n, &seen)| -(n as f64) * libm::log((seen + 1) as f64 / denominator))
            .sum();
        Some(sum / text.total as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropy_of_a_known_distribution() {
        let mut train = Unigram::new(4);
        train.add(&[0, 0, 0, 1]);
        let mut text = Unigram::new(4);
        text.add(&[0, 2]);
        // p(0) = 4/8, p(2) = 1/8.
        let expected = (2.0_f64.ln() + 8.0_f64.ln()) / 2.0;
        let got = train.cross_entropy_nats(&text).unwrap();
        assert!((got - expected).abs() < 1e-12);
        assert_eq!(train.cross_entropy_nats(&Unigram::new(4)), None);
    }

    /// DET-1: the figure is hashed into a data set's version, so its logarithm may not be the host's: that of glibc 2.36 on
    /// x86-64 ends in c6.
    #[test]
    fn the_figure_has_the_same_bits_everywhere() {
        let (mut train, mut text) = (Unigram::new(461), Unigram::new(461));
        for token in 0..461_u32 {
            train.add(&vec![token; (token % 89) as usize]);
            text.add(&vec![token; (token % 7) as usize]);
        }
        let bits = train.cross_entropy_nats(&text).unwrap().to_bits();
        assert_eq!(bits, 0x4019_c71e_cbc1_85c8, "{bits:#x}");
    }
}
