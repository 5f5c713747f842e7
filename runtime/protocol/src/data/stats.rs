//! Losses per domain of one lane, and their sum over lanes.
//!
//! A lane counts, for every domain, the sum of its token losses in nats and the number of those tokens, for training and
//! for held-out text apart. Lanes are summed along the aligned tree (DET-2), so the bits do not depend on which rank
//! computed which lane. Means are formed only after the last sum:
//!
//! `loss = Σ_d loss_sum(d) / Σ_d tokens(d)`, domains in config order, in f64.
//!
//! Flat form, little endian: `u32` number of domains, then for each domain training `f64` loss sum, `u64` tokens, then
//! the same for held-out, and the `f64` square of the lane's gradient, -1 where it was not asked for. Its length depends on the number of domains alone, so lanes can be all-gathered. It is
//! validated before use: bytes from a peer are never trusted.

use crate::trace::{DomainLoss, DomainMap};
use tarazed_domain::lanes::TreeFold;
use tarazed_domain::limits::DOMAINS_MAX;
use tarazed_domain::{DomainIndex, LaneRange, LaneTree, Node};

/// A sum of token losses and their number.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct LossSum {
    /// Sum of the token losses, in nats.
    pub loss_sum: f64,
    /// Tokens that count.
    pub tokens: u64,
}

impl LossSum {
    /// Mean loss per token in nats; none without tokens.
    #[must_use]
    pub fn mean(self) -> Option<f64> {
        (self.tokens > 0).then(|| self.loss_sum / self.tokens as f64)
    }

    /// Adds the loss of further tokens, in the order of the calls.
    pub fn add(&mut self, loss_sum: f64, tokens: u64) {
        self.loss_sum += loss_sum;
        self.tokens += tokens;
    }
}

/// Statistics of one lane, or of any node of the lane tree.
#[derive(Clone, PartialEq, Debug)]
pub struct LaneStats {
    train: Vec<LossSum>,
    heldout: Vec<LossSum>,
    /// Sum over lanes of the squares of their parts of the gradient; [`NO_SQUARES`] where nobody summed them.
    squares: f64,
}

/// Refused statistics. The caller halts the step: a peer of another config or corrupted bytes.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StatsError {
    /// Halt: the bytes are not what a peer of this config sends.
    #[error(
        "lane statistics of {found_bytes} bytes are not those of {domains} domains ({expected_bytes} bytes); all ranks must run the same config"
    )]
    Length {
        /// Domains of this run.
        domains: usize,
        /// Bytes they need.
        expected_bytes: usize,
        /// Bytes that came.
        found_bytes: usize,
    },
    /// Halt: the bytes name another number of domains.
    #[error("lane statistics name {found} domains, this run has {expected}; all ranks must run the same config")]
    Domains {
        /// Domains of this run.
        expected: usize,
        /// Domains named.
        found: u32,
    },
    /// Halt: the nodes are not a partition of the lanes.
    #[error("lane statistics cover lanes up to {covered}, then comes {found}; each lane must come exactly once")]
    Cover {
        /// Lanes covered from 0 without a gap.
        covered: u32,
        /// The node that comes next, or "nothing".
        found: String,
    },
    /// Halt: more tokens than can be counted.
    #[error("lane statistics count more than 2^64 tokens of domain {domain}; a peer sent corrupted bytes")]
    Overflow {
        /// The domain.
        domain: DomainIndex,
    },
}

/// No sum of squares is negative.
const NO_SQUARES: f64 = -1.0;
const HEADER_BYTES: usize = 4;
const SQUARES_BYTES: usize = 8;
const SUM_BYTES: usize = 16;

impl LaneStats {
    /// All zero, for `domain_count` domains.
    ///
    /// # Panics
    /// If there are more domains than [`DOMAINS_MAX`]: the config refuses that before.
    #[must_use]
    pub fn new(domain_count: usize) -> Self {
        assert!(domain_count <= DOMAINS_MAX, "at most {DOMAINS_MAX} domains");
        Self {
            train: vec![LossSum::default(); domain_count],
            heldout: vec![LossSum::default(); domain_count],
            squares: NO_SQUARES,
        }
    }

    /// Number of domains.
    #[must_use]
    pub fn domain_count(&self) -> usize {
        self.train.len()
    }

    /// Adds training losses of a domain. Call in the lane's fixed order: sequence by sequence, left to right (DET-1).
    ///
    /// # Panics
    /// If there is no such domain.
    pub fn add_train(&mut self, domain: DomainIndex, loss_sum: f64, tokens: u64) {
        self.train[domain.index()].add(loss_sum, tokens);
    }

    /// Adds held-out losses of a domain, in a fixed order.
    ///
    /// # Panics
    /// If there is no such domain.
    pub fn add_heldout(&mut self, domain: DomainIndex, loss_sum: f64, tokens: u64) {
        self.heldout[domain.index()].add(loss_sum, tokens);
    }

    /// The square of the lane's part of the gradient: of its own sum, as it is added to those of other lanes.
    pub const fn set_squares(&mut self, squares: f64) {
        self.squares = squares;
    }

    /// Sum over lanes of the squares of their parts of the gradient; none where it was not asked for.
    #[must_use]
    pub fn lane_squares(&self) -> Option<f64> {
        (self.squares >= 0.0).then_some(self.squares)
    }

    /// Training sums, in domain order.
    #[must_use]
    pub fn train(&self) -> &[LossSum] {
        &self.train
    }

    /// Held-out sums, in domain order; all without tokens when the step is not an evaluation.
    #[must_use]
    pub fn heldout(&self) -> &[LossSum] {
        &self.heldout
    }

    /// Sum over all domains of training, in domain order; its mean is the loss of the trace line.
    #[must_use]
    pub fn train_total(&self) -> LossSum {
        total(&self.train)
    }

    /// Training losses by name, domains without tokens left out: the `domains` of a trace line.
    ///
    /// # Panics
    /// If there are not as many names as domains.
    #[must_use]
    pub fn train_map(&self, names: &[String]) -> DomainMap<DomainLoss> {
        map(&self.train, names)
    }

    /// Held-out losses by name; none when the step is not an evaluation: the `heldout` of a trace line.
    ///
    /// # Panics
    /// If there are not as many names as domains.
    #[must_use]
    pub fn heldout_map(&self, names: &[String]) -> Option<DomainMap<DomainLoss>> {
        let map = map(&self.heldout, names);
        (!map.0.is_empty()).then_some(map)
    }

    /// `left + right` (DET-2: the order of the arguments is the order of the addition).
    ///
    /// # Errors
    /// If a token count leaves 64 bits.
    ///
    /// # Panics
    /// If the numbers of domains differ.
    pub fn sum(mut left: Self, right: &Self) -> Result<Self, StatsError> {
        assert_eq!(
            left.domain_count(),
            right.domain_count(),
            "the same domains on every lane"
        );
        for (mine, theirs) in [(&mut left.train, &right.train), (&mut left.heldout, &right.heldout)] {
            for (domain, (mine, theirs)) in mine.iter_mut().zip(theirs).enumerate() {
                mine.loss_sum += theirs.loss_sum;
                mine.tokens = mine.tokens.checked_add(theirs.tokens).ok_or(StatsError::Overflow {
                    domain: DomainIndex(domain as u16),
                })?;
            }
        }
        left.squares = match (left.lane_squares(), right.lane_squares()) {
            (Some(mine), Some(theirs)) => mine + theirs,
            _ => NO_SQUARES,
        };
        Ok(left)
    }

    /// Folds the nodes of all ranks to the root. They may come in any order; together they must be a partition of the
    /// lanes into nodes of the tree, e.g. every lane, or every rank's maximal nodes.
    ///
    /// # Errors
    /// [`StatsError::Cover`] if they are not, [`StatsError::Overflow`] on corrupted counts.
    ///
    /// # Panics
    /// If the numbers of domains differ: decoding checks that before.
    pub fn fold(tree: LaneTree, mut nodes: Vec<(Node, Self)>) -> Result<Self, StatsError> {
        nodes.sort_by_key(|(node, _)| tree.span(*node).start);
        let mut covered = 0;
        for (node, _) in &nodes {
            let span = (node.level <= tree.root().level).then(|| tree.span(*node));
            match span.filter(|span| !span.is_empty() && span.start == covered) {
                Some(span) => covered = span.end,
                None => {
                    return Err(StatsError::Cover {
                        covered,
                        found: format!("{node:?}"),
                    });
                }
            }
        }
        if covered != tree.lane_count() {
            return Err(StatsError::Cover {
                covered,
                found: "nothing".into(),
            });
        }
        let all = LaneRange {
            start: 0,
            end: tree.lane_count(),
        };
        let mut fold = TreeFold::new(tree, all);
        for (node, stats) in nodes {
            fold.insert(node, stats, |left, right| Self::sum(left, &right))?;
        }
        let mut folded = fold.into_nodes();
        assert_eq!(folded.len(), 1, "a partition of the lanes folds to the root");
        Ok(folded.remove(0).1)
    }

    /// Bytes of the flat form for `domain_count` domains.
    #[must_use]
    pub const fn encoded_bytes(domain_count: usize) -> usize {
        HEADER_BYTES + domain_count * 2 * SUM_BYTES + SQUARES_BYTES
    }

    /// The flat form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::encoded_bytes(self.domain_count()));
        bytes.extend_from_slice(&(self.domain_count() as u32).to_le_bytes());
        for (train, heldout) in self.train.iter().zip(&self.heldout) {
            for sum in [train, heldout] {
                bytes.extend_from_slice(&sum.loss_sum.to_le_bytes());
                bytes.extend_from_slice(&sum.tokens.to_le_bytes());
            }
        }
        bytes.extend_from_slice(&self.squares.to_le_bytes());
        bytes
    }

    /// Reads the flat form of a peer with the same config.
    ///
    /// # Errors
    /// A [`StatsError`] if the length or the number of domains is another. Loss sums that are not finite pass: they are
    /// a finding of the step, not of the transport.
    pub fn decode(bytes: &[u8], domain_count: usize) -> Result<Self, StatsError> {
        let wrong_length = || StatsError::Length {
            domains: domain_count,
            expected_bytes: Self::encoded_bytes(domain_count),
            found_bytes: bytes.len(),
        };
        let (header, body) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(wrong_length)?;
        let found = u32::from_le_bytes(*header);
        if found as usize != domain_count {
            return Err(StatsError::Domains {
                expected: domain_count,
                found,
            });
        }
        if bytes.len() != Self::encoded_bytes(domain_count) {
            return Err(wrong_length());
        }
        let mut stats = Self::new(domain_count);
        let mut words = body.chunks_exact(8).map(|word| {
            let mut le = [0; 8];
            le.copy_from_slice(word);
            u64::from_le_bytes(le)
        });
        for (train, heldout) in stats.train.iter_mut().zip(&mut stats.heldout) {
            for sum in [train, heldout] {
                if let (Some(loss_sum), Some(tokens)) = (words.next(), words.next()) {
                    sum.loss_sum = f64::from_bits(loss_sum);
                    sum.tokens = tokens;
                }
            }
        }
        if let Some(squares) = words.next() {
            stats.squares = f64::from_bits(squares);
        }
        Ok(stats)
    }
}

fn total(sums: &[LossSum]) -> LossSum {
    let mut all = LossSum::default();
    for sum in sums {
        all.add(sum.loss_sum, sum.tokens);
    }
    all
}

fn map(sums: &[LossSum], names: &[String]) -> DomainMap<DomainLoss> {
    assert_eq!(sums.len(), names.len(), "one name per domain");
    DomainMap(
        sums.iter()
            .zip(names)
            .filter_map(|(sum, name)| {
                let loss = sum.mean()?;
                Some((
                    name.clone(),
                    DomainLoss {
                        loss,
                        tokens: sum.tokens,
                    },
                ))
            })
            .collect(),
    )
}
