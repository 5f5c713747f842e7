//! TSM: the committed trace, turned into signals.
//!
//! Feed every line once, in order; the state is a function of the lines alone, so a new process rebuilds it by feeding
//! the trace again (LOOP-1). Formulas, with `t` the line, `d` a domain, `n_d` its tokens in the line:
//!
//! | signal | formula | source |
//! |---|---|---|
//! | smoothed training loss | `m_d ← 0.97 m_d + 0.03 l_d`, over `1 - 0.97^k` after `k` values | bias correction as in Adam, arXiv 1412.6980 |
//! | residual loss | `e_t = Σ_d (n_d / Σ n) (l_d(t) - smoothed_d(t-1))` | loss minus what the mixture explains: reweighting is no spike |
//! | loss spike | `e_t > mean + 6 σ` over the last 128 residuals, once there are 64; or not finite | skip rule of OLMo 2, arXiv 2501.00656 |
//! | gradient-norm spike | the same on the gradient norm | the same |
//! | held-out loss | newest evaluation; by language: mean over its domains' tokens; macro: plain mean over domains | |
//! | plateau | Welch's `t < 2` between the mixture-free losses of the last 128 lines and of the 128 before | Welch 1947 |
//! | divergence | the mixture-free loss of the last 32 lines lies above that of the 128 before by more than 6 standard errors (as Welch's `t`) and 0.1 nats | |
//! | bits per byte | `l / ln 2` over bytes per token: of the training part as the data's manifest counts it, of the held-out text that is scored as the index of documents does; a language's are the bits of its domains over their bytes | Gao et al., arXiv 2101.00027, section 3.1 |
//! | gradient noise scale | `S / |G|²` in tokens, `|G|² = (B |G_B|² - b |G_b|²) / (B - b)`, `S = (|G_b|² - |G_B|²) / (1/b - 1/B)`, both smoothed as losses are | McCandlish et al., arXiv 1812.06162, appendix A.1 |
//! | tokens requested | `Σ_t p_d(t) · tokens(t)`, `p` the mixture in force | |
//! | epochs | realised training tokens of the domain's present edition over the training tokens of that | |
//! | epoch | `⌈realised sequences of the present edition / its training sequences⌉`: the pass that the newest sample is of, from 1 | |
//!
//! The mixture-free loss is `e_t + Σ_d w_d smoothed_d(t-1)` with the configured weights `w`: the loss as it would read
//! under an unchanged mixture. For the noise scale `B` are the tokens of the step and `b` those of one of its `L` lanes: with
//! the line's `lane_squares` `Q = Σ_l |g_l|²` of the lanes' parts of the gradient, `|G_b|² = L Q`. Lanes are fixed, so no
//! world size has a part in it. A plateau is a statement about these lines; under a warm-up or a level learning rate it is
//! not convergence. Sums run in domain order and from the oldest line on.

use super::DomainFacts;
use super::decision::{DataChange, Decision, data_changes};
use crate::trace::TraceLine;
use std::collections::{BTreeMap, VecDeque};
use tarazed_domain::config::Language;
use tarazed_domain::{StepIndex, StepsCompleted};

/// Decay of the smoothed training loss, per line.
pub const SMOOTHING: f64 = 0.97;
/// Lines a spike is judged against at most.
pub const SPIKE_WINDOW_LINES: usize = 128;
/// Lines before any spike is called.
pub const SPIKE_WINDOW_LINES_MIN: usize = 64;
/// Standard deviations above the mean that make a spike.
pub const SPIKE_SIGMAS: f64 = 6.0;
/// Least standard deviation of the residual loss, in nats: a loss that hardly moves is not full of spikes.
pub const LOSS_SIGMA_NATS_MIN: f64 = 1e-3;
/// Least standard deviation of the gradient norm, relative to its mean.
pub const GRAD_NORM_SIGMA_FRACTION_MIN: f64 = 1e-2;
/// Lines in each half of the plateau test.
pub const PLATEAU_WINDOW_LINES: usize = 128;
/// A plateau is a fall of less than this many standard errors.
pub const PLATEAU_STANDARD_ERRORS: f64 = 2.0;

/// Newest lines whose loss is held against those before, for divergence.
pub const DIVERGENCE_LINES: usize = 32;
/// Lines before them.
pub const DIVERGENCE_REFERENCE_LINES: usize = 128;
/// A divergence is a rise of more than this many standard errors.
pub const DIVERGENCE_STANDARD_ERRORS: f64 = 6.0;
/// And of more than this many nats.
pub const DIVERGENCE_NATS_MIN: f64 = 0.1;

/// UTF-8 bytes behind one token of a domain, on average.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct BytesPerToken {
    /// Of the training part; 0 where it is not known.
    pub train: f64,
    /// Of the held-out part.
    pub heldout: f64,
}

/// Mean and spread of a window of lines.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct WindowStats {
    /// Values in the window.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation (over `count - 1`).
    pub sigma: f64,
}

/// A quantity against its own recent past.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Judged {
    /// The value of this line.
    pub value: f64,
    /// The lines before it.
    pub window: WindowStats,
    /// Their mean + 6 σ; none before there are enough of them.
    pub threshold: Option<f64>,
    /// Above that, or not finite.
    pub spike: bool,
}

/// A loss that rises and stays up.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Divergence {
    /// The first line of those that lie above what was before.
    pub since: StepsCompleted,
    /// Mixture-free loss before, in nats.
    pub before: f64,
    /// By how much it rose.
    pub rise: f64,
}

/// How noisy gradients are, smoothed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GradientNoise {
    /// Square of the true gradient's norm, `|G|²`.
    pub gradient_square: f64,
    /// Trace of the covariance of a gradient over one token, `S`.
    pub noise_trace: f64,
    /// The simple noise scale `S / |G|²`, in tokens: a batch well below it wastes steps, one well above it wastes tokens.
    /// None where `|G|²` is lost in the noise.
    pub scale_tokens: Option<f64>,
}

/// Signals of one domain.
#[derive(Clone, PartialEq, Debug)]
pub struct DomainSignals {
    /// Name, as in the trace.
    pub name: String,
    /// Smoothed training loss in nats; none before the domain's first tokens.
    pub train_loss: Option<f64>,
    /// Held-out loss of the newest evaluation, in nats; none before the first, or where the domain holds nothing out.
    pub heldout_loss: Option<f64>,
    /// Smoothed training loss in bits per byte of text; none where bytes are not known.
    pub train_bits_per_byte: Option<f64>,
    /// Held-out loss in bits per byte of text.
    pub heldout_bits_per_byte: Option<f64>,
    /// Training tokens so far.
    pub tokens: u64,
    /// Those of the domain's present edition.
    pub edition_tokens: u64,
    /// Training tokens the mixtures in force asked for so far.
    pub tokens_requested: f64,
    /// Passes over the training part of the domain's present edition so far.
    pub epochs: f64,
    /// The pass that the newest sample of that edition is of, from 1; 0 before the first one, or where the length of a sequence
    /// is not known.
    pub epoch: u64,
    /// That pass began with this line, and it is another than the first.
    pub epoch_begins: bool,
}

/// Held-out loss of one language.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LanguageSignals {
    /// The language.
    pub language: Language,
    /// Mean over the held-out tokens of its domains, in nats.
    pub heldout_loss: f64,
    /// Those tokens.
    pub tokens: u64,
    /// The same loss in bits per byte of text: their bits over the bytes behind them; none where bytes are not known for all.
    pub heldout_bits_per_byte: Option<f64>,
}

/// What the trace says after one line.
#[derive(Clone, PartialEq, Debug)]
pub struct Signals {
    /// The line.
    pub step: StepsCompleted,
    /// Training tokens so far.
    pub tokens: u64,
    /// By domain, in config order.
    pub domains: Vec<DomainSignals>,
    /// By language, in the order of [`Language`]; those with held-out text in the newest evaluation.
    pub languages: Vec<LanguageSignals>,
    /// Plain mean of the domains' held-out losses.
    pub heldout_macro: Option<f64>,
    /// The newest evaluation at or before this line.
    pub evaluated: Option<StepsCompleted>,
    /// Loss minus what the mixture explains, in nats.
    pub residual_loss: Judged,
    /// Global gradient norm before clipping.
    pub grad_norm: Judged,
    /// The newest line with a spike of either, this one included.
    pub last_spike: Option<StepsCompleted>,
    /// No fall of the mixture-free loss over the last 256 lines; none before there are so many.
    pub plateau: Option<bool>,
    /// The mixture-free loss rises and stays up.
    pub divergence: Option<Divergence>,
    /// Gradient noise; none where lines do not hold what it is made of.
    pub gradient_noise: Option<GradientNoise>,
}

impl Signals {
    /// Whether this line is a spike, of loss or gradient norm.
    #[must_use]
    pub const fn spike(&self) -> bool {
        self.residual_loss.spike || self.grad_norm.spike
    }
}

/// A line that does not follow the lines before it. The caller halts: the trace is another run's, or damaged.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SignalError {
    /// Lines must come once each and in order.
    #[error("line {found} came where line {expected} must come; feed the whole trace in order")]
    OutOfOrder {
        /// The line due.
        expected: StepsCompleted,
        /// The line that came.
        found: StepsCompleted,
    },
    /// The line names a domain that neither the config nor a decision before does.
    #[error(
        "line {line} names the domain '{domain}', which neither this config nor a decision before has; the trace is another run's"
    )]
    UnknownDomain {
        /// The line.
        line: StepsCompleted,
        /// The domain.
        domain: String,
    },
}

#[derive(Clone, Debug, Default)]
struct DomainState {
    smoothed: Smoothed,
    heldout: Option<(f64, u64)>,
    tokens: u64,
    /// Those of editions before the present one.
    tokens_before: u64,
    tokens_requested: f64,
}

/// Held-out text of one language.
#[derive(Clone, Copy, Debug, Default)]
struct HeldOutSum {
    nats: f64,
    tokens: u64,
    bytes: f64,
    bytes_unknown: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Smoothed {
    sum: f64,
    weight: f64,
}

impl Smoothed {
    fn add(&mut self, value: f64) {
        self.sum = SMOOTHING * self.sum + (1.0 - SMOOTHING) * value;
        self.weight = SMOOTHING * self.weight + (1.0 - SMOOTHING);
    }

    fn value(self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}

/// The Training State Monitor as a pure machine.
#[derive(Clone, Debug)]
pub struct Tsm {
    facts: Vec<DomainFacts>,
    domains: Vec<DomainState>,
    /// Changes of the data that no line has seen yet, by the first step that they act on.
    coming: BTreeMap<StepIndex, DataChange>,
    last: Option<StepsCompleted>,
    residuals: Window,
    grad_norms: Window,
    mixture_free: VecDeque<f64>,
    evaluated: Option<StepsCompleted>,
    last_spike: Option<StepsCompleted>,
    bytes: Vec<BytesPerToken>,
    lanes: u32,
    /// Tokens of one sequence; 0 where they are not known.
    context_tokens: u64,
    gradient_square: Smoothed,
    noise_trace: Smoothed,
}

impl Tsm {
    /// A monitor that has seen nothing.
    #[must_use]
    pub fn new(facts: Vec<DomainFacts>) -> Self {
        Self {
            domains: vec![DomainState::default(); facts.len()],
            facts,
            coming: BTreeMap::new(),
            last: None,
            residuals: Window::default(),
            grad_norms: Window::default(),
            mixture_free: VecDeque::new(),
            evaluated: None,
            last_spike: None,
            bytes: Vec::new(),
            lanes: 1,
            context_tokens: 0,
            gradient_square: Smoothed::default(),
            noise_trace: Smoothed::default(),
        }
    }

    /// The same, with what the data's manifest says of bytes, in domain order.
    #[must_use]
    pub fn with_bytes(mut self, bytes: Vec<BytesPerToken>) -> Self {
        self.bytes = bytes;
        self
    }

    /// The same, for lines whose gradients were summed over so many lanes.
    #[must_use]
    pub const fn with_lanes(mut self, lanes: u32) -> Self {
        self.lanes = lanes;
        self
    }

    /// The same, for sequences of so many tokens.
    #[must_use]
    pub const fn with_context(mut self, context_tokens: u64) -> Self {
        self.context_tokens = context_tokens;
        self
    }

    /// Hears of decisions of lines before the next one: what changes the data acts on a later line, which must be explained
    /// by it. The same ones may come again.
    pub fn learn(&mut self, decisions: &[Decision]) {
        let seen = self.last.unwrap_or_default();
        for (from, change) in data_changes(decisions).filter(|(from, _)| from.0 >= seen.0) {
            self.coming.insert(from, change.clone());
        }
    }

    /// Takes over what acts on the step of this line. Of a new text nothing is known: it explains itself at first. A domain
    /// that comes later has no part in the mixture-free loss, which must not jump where it comes.
    fn arrive(&mut self, line: StepsCompleted) {
        while let Some(first) = self.coming.first_entry().filter(|first| first.key().0 < line.0) {
            for edition in first.remove().domains {
                let at = usize::from(edition.domain);
                let facts = DomainFacts {
                    name: edition.name,
                    language: Language::from_name(&edition.language).unwrap_or(Language::En),
                    weight: self.facts.get(at).map_or(0.0, |facts| facts.weight),
                    train_tokens: edition.train_tokens,
                    train_sequences: edition.train_sequences,
                };
                match (self.facts.get_mut(at), self.domains.get_mut(at)) {
                    (Some(known), Some(state)) => {
                        *known = facts;
                        state.smoothed = Smoothed::default();
                        state.tokens_before = state.tokens;
                        // Its level is another, which is neither a divergence nor the end of one plateau.
                        self.mixture_free.clear();
                    }
                    _ => {
                        self.facts.push(facts);
                        self.domains.push(DomainState::default());
                    }
                }
                if let Some(bytes) = self.bytes.get_mut(at) {
                    bytes.train = 0.0; // of a new text they are not known
                }
            }
        }
    }

    /// Takes in the next line. The first may be any (a trace may begin at a restore point); then each must follow.
    ///
    /// # Errors
    /// A [`SignalError`]; no line is taken in then.
    pub fn on_line(&mut self, line: &TraceLine) -> Result<Signals, SignalError> {
        self.check_order(line)?;
        self.arrive(line.step);
        self.check_names(line)?;
        self.last = Some(line.step);
        let (residual, level) = self.explain(line);
        let residual_loss = self.residuals.judge(residual, LOSS_SIGMA_NATS_MIN);
        let sigma_min = GRAD_NORM_SIGMA_FRACTION_MIN * self.grad_norms.stats().mean.abs();
        let grad_norm = self.grad_norms.judge(line.grad_norm, sigma_min);
        let spike = residual_loss.spike || grad_norm.spike;
        if spike {
            self.last_spike = Some(line.step);
        }
        self.take_losses(line, residual_loss.spike);
        if let Some(level) = level
            && residual.is_finite()
        {
            self.mixture_free.push_back(level + residual);
            if self.mixture_free.len() > 2 * PLATEAU_WINDOW_LINES {
                self.mixture_free.pop_front();
            }
        }
        self.take_noise(line);
        Ok(self.signals(line, residual_loss, grad_norm))
    }

    fn take_noise(&mut self, line: &TraceLine) {
        let tokens: u64 = line.domains.iter().map(|(_, seen)| seen.tokens).sum();
        let Some(squares) = line
            .lane_squares
            .filter(|squares| squares.is_finite() && self.lanes > 1 && tokens > 0)
        else {
            return;
        };
        let lanes = f64::from(self.lanes);
        let large = line.grad_norm * line.grad_norm; // |G_B|²
        let small = lanes * squares; // |G_b|²
        if large.is_finite() {
            // With B = L b, both divided through by b.
            self.gradient_square.add((lanes * large - small) / (lanes - 1.0));
            self.noise_trace.add((small - large) * tokens as f64 / (lanes - 1.0));
        }
    }

    fn gradient_noise(&self) -> Option<GradientNoise> {
        let (gradient_square, noise_trace) = (self.gradient_square.value()?, self.noise_trace.value()?);
        Some(GradientNoise {
            gradient_square,
            noise_trace,
            scale_tokens: (gradient_square > 0.0 && noise_trace >= 0.0).then(|| noise_trace / gradient_square),
        })
    }

    fn check_order(&self, line: &TraceLine) -> Result<(), SignalError> {
        let expected = self.last.map(|last| StepsCompleted(last.0.saturating_add(1)));
        match expected.filter(|expected| *expected != line.step) {
            Some(expected) => Err(SignalError::OutOfOrder {
                expected,
                found: line.step,
            }),
            None => Ok(()),
        }
    }

    fn check_names(&self, line: &TraceLine) -> Result<(), SignalError> {
        let named = line.domains.iter().map(|(name, _)| name);
        let heldout = line.heldout.iter().flat_map(|map| map.iter().map(|(name, _)| name));
        let mixture = line.mixture.iter().map(|(name, _)| name);
        for name in named.chain(heldout).chain(mixture) {
            if !self.facts.iter().any(|fact| fact.name == name) {
                return Err(SignalError::UnknownDomain {
                    line: line.step,
                    domain: name.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// The residual loss of a line, and the level of the loss under the configured mixture, from the lines before.
    /// A domain seen for the first time explains itself: its residual is 0.
    fn explain(&self, line: &TraceLine) -> (f64, Option<f64>) {
        let mut residual = 0.0;
        let mut tokens = 0.0;
        let (mut level, mut weights) = (0.0, 0.0);
        for (fact, state) in self.facts.iter().zip(&self.domains) {
            let smoothed = state.smoothed.value();
            if let Some(smoothed) = smoothed {
                level += fact.weight * smoothed;
                weights += fact.weight;
            }
            if let Some(seen) = line.domains.get(&fact.name) {
                tokens += seen.tokens as f64;
                let expected = smoothed.unwrap_or(if seen.loss.is_finite() { seen.loss } else { 0.0 });
                residual += seen.tokens as f64 * (seen.loss - expected);
            }
        }
        let residual = match tokens > 0.0 {
            true if line.loss.is_finite() => residual / tokens,
            // The total is the ground truth for what is not finite.
            true => line.loss,
            false => 0.0,
        };
        (residual, (weights > 0.0).then(|| level / weights))
    }

    fn take_losses(&mut self, line: &TraceLine, loss_spike: bool) {
        let step_tokens: u64 = line.domains.iter().map(|(_, seen)| seen.tokens).sum();
        let mixture_sum: f64 = line.mixture.iter().map(|(_, weight)| *weight).sum();
        if line.heldout.is_some() {
            self.evaluated = Some(line.step);
        }
        for (fact, state) in self.facts.iter().zip(&mut self.domains) {
            if let Some(seen) = line.domains.get(&fact.name) {
                state.tokens = state.tokens.saturating_add(seen.tokens);
                // A spike says nothing of the level. It cannot last: what enters the window widens it.
                if seen.loss.is_finite() && !loss_spike {
                    state.smoothed.add(seen.loss);
                }
            }
            if let Some(weight) = line.mixture.get(&fact.name)
                && mixture_sum > 0.0
            {
                state.tokens_requested += weight / mixture_sum * step_tokens as f64;
            }
            if let Some(heldout) = &line.heldout {
                state.heldout = heldout.get(&fact.name).map(|seen| (seen.loss, seen.tokens));
            }
        }
    }

    fn signals(&self, line: &TraceLine, residual_loss: Judged, grad_norm: Judged) -> Signals {
        let mut by_language: BTreeMap<Language, HeldOutSum> = BTreeMap::new();
        let (mut macro_sum, mut macro_count) = (0.0, 0);
        for (domain, (fact, state)) in self.facts.iter().zip(&self.domains).enumerate() {
            if let Some((loss, tokens)) = state.heldout {
                let sum = by_language.entry(fact.language).or_default();
                sum.nats += loss * tokens as f64;
                sum.tokens += tokens;
                match self.bytes_per_token(domain, |bytes| bytes.heldout) {
                    Some(bytes) => sum.bytes += bytes * tokens as f64,
                    None => sum.bytes_unknown = true,
                }
                macro_sum += loss;
                macro_count += 1;
            }
        }
        Signals {
            step: line.step,
            tokens: line.tokens,
            domains: self
                .facts
                .iter()
                .zip(&self.domains)
                .enumerate()
                .map(|(domain, (fact, state))| self.domain_signals(domain, fact, state, line))
                .collect(),
            languages: by_language
                .into_iter()
                .filter(|(_, sum)| sum.tokens > 0)
                .map(|(language, sum)| LanguageSignals {
                    language,
                    heldout_loss: sum.nats / sum.tokens as f64,
                    tokens: sum.tokens,
                    heldout_bits_per_byte: (!sum.bytes_unknown).then(|| sum.nats / std::f64::consts::LN_2 / sum.bytes),
                })
                .collect(),
            heldout_macro: (macro_count > 0).then(|| macro_sum / f64::from(macro_count)),
            evaluated: self.evaluated,
            residual_loss,
            grad_norm,
            last_spike: self.last_spike,
            plateau: self.plateau(),
            divergence: self.divergence(line.step),
            gradient_noise: self.gradient_noise(),
        }
    }

    fn domain_signals(
        &self,
        domain: usize,
        fact: &DomainFacts,
        state: &DomainState,
        line: &TraceLine,
    ) -> DomainSignals {
        let edition_tokens = state.tokens - state.tokens_before;
        let of_line = line.domains.get(&fact.name).map_or(0, |seen| seen.tokens);
        let epoch = self.epoch(fact, edition_tokens);
        let epoch_before = self.epoch(fact, edition_tokens.saturating_sub(of_line));
        DomainSignals {
            name: fact.name.clone(),
            train_loss: state.smoothed.value(),
            heldout_loss: state.heldout.map(|(loss, _)| loss),
            train_bits_per_byte: self.bits_per_byte(domain, state.smoothed.value(), |bytes| bytes.train),
            heldout_bits_per_byte: self
                .bits_per_byte(domain, state.heldout.map(|(loss, _)| loss), |bytes| bytes.heldout),
            tokens: state.tokens,
            edition_tokens,
            tokens_requested: state.tokens_requested,
            epochs: edition_tokens as f64 / fact.train_tokens.max(1) as f64,
            epoch,
            epoch_begins: epoch > epoch_before.max(1),
        }
    }

    /// The pass that the last of so many tokens is of: passes are of whole sequences.
    fn epoch(&self, fact: &DomainFacts, edition_tokens: u64) -> u64 {
        let pass_tokens = fact.train_sequences.saturating_mul(self.context_tokens);
        match pass_tokens {
            0 => 0,
            tokens => edition_tokens.div_ceil(tokens),
        }
    }

    fn bits_per_byte(&self, domain: usize, nats: Option<f64>, part: fn(&BytesPerToken) -> f64) -> Option<f64> {
        let bytes = self.bytes_per_token(domain, part)?;
        Some(nats? / std::f64::consts::LN_2 / bytes)
    }

    fn bytes_per_token(&self, domain: usize, part: fn(&BytesPerToken) -> f64) -> Option<f64> {
        self.bytes.get(domain).map(part).filter(|bytes| *bytes > 0.0)
    }

    fn divergence(&self, line: StepsCompleted) -> Option<Divergence> {
        let levels = &self.mixture_free;
        let first = levels
            .len()
            .checked_sub(DIVERGENCE_LINES + DIVERGENCE_REFERENCE_LINES)?;
        let before = stats(levels.range(first..first + DIVERGENCE_REFERENCE_LINES));
        let recent = stats(levels.range(first + DIVERGENCE_REFERENCE_LINES..));
        let rise = recent.mean - before.mean;
        let far = rise > DIVERGENCE_STANDARD_ERRORS * standard_error(before, recent) && rise > DIVERGENCE_NATS_MIN;
        far.then(|| Divergence {
            since: StepsCompleted((line.0 + 1).saturating_sub(DIVERGENCE_LINES as u64)),
            before: before.mean,
            rise,
        })
    }

    fn plateau(&self) -> Option<bool> {
        if self.mixture_free.len() < 2 * PLATEAU_WINDOW_LINES {
            return None;
        }
        let before = stats(self.mixture_free.iter().take(PLATEAU_WINDOW_LINES));
        let after = stats(self.mixture_free.iter().skip(PLATEAU_WINDOW_LINES));
        let error = standard_error(before, after).max(f64::EPSILON);
        Some(before.mean - after.mean < PLATEAU_STANDARD_ERRORS * error)
    }
}

/// Standard error of the difference of two means (Welch 1947).
fn standard_error(a: WindowStats, b: WindowStats) -> f64 {
    let variance = |window: WindowStats| window.sigma * window.sigma / window.count as f64;
    (variance(a) + variance(b)).sqrt()
}

/// The last values of a quantity.
#[derive(Clone, Debug, Default)]
struct Window {
    values: VecDeque<f64>,
}

impl Window {
    fn stats(&self) -> WindowStats {
        stats(self.values.iter())
    }

    /// Judges a value against the window, then takes it in: cut off at the threshold, so one spike does not hide the
    /// next and a new level is accepted after some lines. What is not finite is never taken in.
    fn judge(&mut self, value: f64, sigma_min: f64) -> Judged {
        let window = self.stats();
        let threshold = window.mean + SPIKE_SIGMAS * window.sigma.max(sigma_min);
        let judged = window.count >= SPIKE_WINDOW_LINES_MIN;
        let spike = !value.is_finite() || judged && value > threshold;
        if value.is_finite() {
            self.values.push_back(if judged { value.min(threshold) } else { value });
            if self.values.len() > SPIKE_WINDOW_LINES {
                self.values.pop_front();
            }
        }
        Judged {
            value,
            window,
            threshold: judged.then_some(threshold),
            spike,
        }
    }
}

fn stats<'a>(values: impl ExactSizeIterator<Item = &'a f64> + Clone) -> WindowStats {
    let count = values.len();
    if count == 0 {
        return WindowStats::default();
    }
    let mean = values.clone().sum::<f64>() / count as f64;
    let squares: f64 = values.map(|value| (value - mean) * (value - mean)).sum();
    WindowStats {
        count,
        mean,
        sigma: (squares / count.saturating_sub(1).max(1) as f64).sqrt(),
    }
}
