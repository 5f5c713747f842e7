//! The conformance suite of [`Device`]: one body, run on every implementation, with an f64 oracle.
//!
//! Each check draws fresh inputs from a seed, rounds them through the device, computes the expected result from what the
//! device really holds, poisons all outputs and their surroundings with NaN, and compares every element. The suite runs twice: with
//! tensors at odd offsets, so that a device that relies on alignment is found, and with aligned ones, which a device may take
//! another way; a write beyond a tensor is found in both.
//!
//! Stated error bounds, with `u` the unit roundoff of the result's precision, and `max|y|` the largest element of the expected
//! tensor. Of working precision it is the device's (2⁻²⁴ for f32); of full precision at most 2⁻²⁰, which leaves room for the order of
//! sums and a hardware's exponential, unless the result follows from one that was rounded to working precision (the head's):
//!
//! | kernel | bound on the absolute error |
//! |---|---|
//! | GEMM, `k` terms | `(4 + sqrt(k)) · u · (|c| + alpha · sum |a·b|)` |
//! | RMSNorm; its gradients over `rows` rows | `8 u · max|y|`; `(16 + sqrt(rows)) · u · max|y|` |
//! | RoPE, either way | `4 u · max|y|` |
//! | attention output; log-sum-exp; gradient | `16 u · max|y|`; `8 u · max(1, max|y|)`; `16 u · max|y|` |
//! | SwiGLU, either way | `16 u · max|y|` |
//! | cross-entropy loss; gradient | `4 u · max(1, max|logit|)`; `8 u · scale · max(1, max|logit|)` |
//! | AdamW weight, moments | `8 u · max|y|` |
//! | head and loss in one: loss; its gradients | `16 u · max|y|`; `32 u · max|y|` |
//! | embedding, addition, hashes | none: exact |
//! | embedding gradient of `n` ids | `u · n · max|y|` |
//! | sum of squares | `2⁻⁴⁰` relative |
//!
//! And besides, of every tensor of 256 elements and more: `2.5 u` of its own Frobenius norm, or 1e-6 where that is more (sums are
//! f32 whatever the working precision is).

mod checks;
pub mod reference;

use crate::device::{Device, DeviceError, Precision, View, ViewMut};

/// A device that does not conform, or that failed.
#[derive(Debug, thiserror::Error)]
pub enum ConformanceError {
    /// Halt: this kernel is wrong on this device.
    #[error(
        "{kernel} ({shape}, seed {seed}): element {index} is {got}, expected {expected}, allowed error {allowed:e}"
    )]
    Wrong {
        /// The kernel and its output.
        kernel: String,
        /// Shape of the call.
        shape: String,
        /// Seed of the inputs.
        seed: u64,
        /// Element of the output.
        index: usize,
        /// What the device made.
        got: f64,
        /// What the oracle made.
        expected: f64,
        /// Bound on the difference.
        allowed: f64,
    },
    /// Halt: the kernel wrote where it must not, or made other bits from the same values.
    #[error("{kernel} ({shape}, seed {seed}): {fault}")]
    Fault {
        /// The kernel.
        kernel: String,
        /// Shape of the call.
        shape: String,
        /// Seed of the inputs.
        seed: u64,
        /// What it did.
        fault: String,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Several kernels are wrong: the first fault of each.
    #[error("{}", several(.0))]
    Several(Vec<Self>),
}

fn several(faults: &[ConformanceError]) -> String {
    let texts: Vec<String> = faults.iter().map(ToString::to_string).collect();
    format!("{} kernels: {}", faults.len(), texts.join("; "))
}

/// The largest errors of one kernel.
#[derive(Clone, PartialEq, Debug)]
pub struct Measured {
    /// The kernel and its output.
    pub kernel: String,
    /// Largest error of an element over the error allowed, at most 1.
    pub share: f64,
    /// Largest relative error of a whole tensor, in Frobenius norms; none where all tensors are short.
    pub relative: Option<f64>,
}

/// Bound of whole tensors' relative errors, in units of the unit roundoff: below 1e-2 in bf16.
const RELATIVE_MAX: f64 = 2.5;
/// And what it is at least: of sums of some hundred terms in f32.
const RELATIVE_IN_FULL: f64 = 1e-6;
/// Elements of a tensor whose relative error says something: that of a few is that of a sum that may have cancelled.
const RELATIVE_ELEMENTS_MIN: usize = 256;

type Check<D> = fn(&mut Bench<'_, D>) -> Result<(), ConformanceError>;

/// Runs every check, with inputs drawn from `seed`. `unit_roundoff` is that of the device's working precision.
///
/// # Errors
/// The first fault of each kernel that has one; a device that fails ends the suite.
pub fn run<D: Device>(device: &D, unit_roundoff: f64, seed: u64) -> Result<Vec<Measured>, ConformanceError> {
    let mut bench = Bench::new(device, unit_roundoff, seed)?;
    let suite: [Check<D>; 11] = [
        checks::gemm,
        checks::rms_norm,
        checks::rope,
        checks::attention,
        checks::swiglu,
        checks::embedding,
        checks::cross_entropy,
        checks::head_loss,
        checks::additions,
        checks::square_sums,
        checks::adamw,
    ];
    let mut faults = Vec::new();
    let all = OFFSETS
        .into_iter()
        .flat_map(|offset| suite.map(|check| (offset, check)));
    for (offset, check) in all {
        bench.offset = offset;
        match check(&mut bench) {
            Ok(()) => {}
            // A shape that a device does not take says nothing of its other kernels; a lost device ends them all.
            Err(fault @ ConformanceError::Device(DeviceError::Unsupported { .. })) => faults.push(fault),
            Err(lost @ ConformanceError::Device(_)) => {
                faults.push(lost);
                break;
            }
            Err(fault) => faults.push(fault),
        }
    }
    match faults.len() {
        0 => Ok(bench.measured),
        1 => Err(faults.remove(0)),
        _ => Err(ConformanceError::Several(faults)),
    }
}

/// Numbers from a counter (SplitMix64).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// A stream of its own for each seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// Numbers of mean 0 and deviation about 1 (three uniform numbers each).
    pub fn numbers(&mut self, len: usize) -> Vec<f64> {
        let mut uniform = || (self.bits() >> 11) as f64 / (1_u64 << 52) as f64 - 1.0;
        (0..len).map(|_| uniform() + uniform() + uniform()).collect()
    }
}

/// Elements before a tensor: at an odd address, and at one that 16 bytes divide in either precision.
const OFFSETS: [usize; 2] = [5, 8];
/// Unit roundoff that results in full precision are measured by, at most.
const FULL_UNIT: f64 = 1.0 / (1_u64 << 20) as f64;
/// Poisoned elements behind it.
const BEHIND: usize = 19;

/// One tensor in a buffer of its own.
struct Tensor<D: Device> {
    buffer: D::Buffer,
    /// Elements before it.
    offset: usize,
    len: usize,
    /// Unit roundoff that it is measured by.
    unit: f64,
}

impl<D: Device> Tensor<D> {
    fn view(&self) -> View<'_, D::Buffer> {
        View::at(&self.buffer, self.offset)
    }

    fn view_mut(&mut self) -> ViewMut<'_, D::Buffer> {
        ViewMut::at(&mut self.buffer, self.offset)
    }
}

/// A device under test.
struct Bench<'a, D: Device> {
    device: &'a D,
    stream: D::Stream,
    unit: f64,
    seed: u64,
    offset: usize,
    random: Random,
    measured: Vec<Measured>,
}

impl<'a, D: Device> Bench<'a, D> {
    fn new(device: &'a D, unit: f64, seed: u64) -> Result<Self, ConformanceError> {
        Ok(Self {
            device,
            stream: device.stream()?,
            unit,
            seed,
            offset: 0,
            random: Random::new(seed),
            measured: Vec::new(),
        })
    }

    /// A tensor of these values, and the values as the device holds them.
    fn put(&mut self, values: &[f64], precision: Precision) -> Result<(Tensor<D>, Vec<f64>), ConformanceError> {
        let len = values.len();
        let offset = self.offset;
        let mut padded = vec![f32::NAN; offset + len + BEHIND];
        for (to, value) in padded[offset..].iter_mut().zip(values) {
            *to = *value as f32;
        }
        let mut buffer = self.device.alloc(padded.len(), precision)?;
        self.device
            .upload(&mut self.stream, &padded, ViewMut::from(&mut buffer))?;
        let unit = match precision {
            Precision::Working => self.unit,
            Precision::Full => self.unit.min(FULL_UNIT),
        };
        let tensor = Tensor {
            buffer,
            offset,
            len,
            unit,
        };
        let held = self.get("upload", "", &tensor)?;
        Ok((tensor, held))
    }

    /// A tensor of random values.
    fn random(&mut self, len: usize, precision: Precision) -> Result<(Tensor<D>, Vec<f64>), ConformanceError> {
        let values = self.random.numbers(len);
        self.put(&values, precision)
    }

    /// A tensor of NaN.
    fn poisoned(&mut self, len: usize, precision: Precision) -> Result<Tensor<D>, ConformanceError> {
        Ok(self.put(&vec![f64::NAN; len], precision)?.0)
    }

    /// Values of a tensor, once its surroundings are found untouched.
    fn get(&mut self, kernel: &str, shape: &str, tensor: &Tensor<D>) -> Result<Vec<f64>, ConformanceError> {
        let (start, end) = (tensor.offset, tensor.offset + tensor.len);
        let mut padded = vec![0.0; end + BEHIND];
        self.device
            .download(&mut self.stream, View::from(&tensor.buffer), &mut padded)?;
        let surroundings = padded[..start].iter().chain(&padded[end..]);
        if surroundings.into_iter().any(|value| !value.is_nan()) {
            return Err(self.fault(kernel, shape, "wrote outside its tensor".to_owned()));
        }
        Ok(padded[start..end].iter().map(|&x| f64::from(x)).collect())
    }

    fn fault(&self, kernel: &str, shape: &str, fault: String) -> ConformanceError {
        ConformanceError::Fault {
            kernel: kernel.to_owned(),
            shape: shape.to_owned(),
            seed: self.seed,
            fault,
        }
    }

    /// Compares each element under its own bound and keeps the worst share.
    fn compare(
        &mut self,
        (kernel, shape): (&str, &str),
        tensor: &Tensor<D>,
        expected: &[f64],
        allowed: impl Fn(usize) -> f64,
    ) -> Result<(), ConformanceError> {
        let got = self.get(kernel, shape, tensor)?;
        assert_eq!(got.len(), expected.len(), "the oracle of {kernel} has another shape");
        let relative = self.relative((kernel, shape), &got, expected, tensor.unit)?;
        let mut worst = 0.0_f64;
        for (index, (&got, &expected)) in got.iter().zip(expected).enumerate() {
            let (error, allowed) = ((got - expected).abs(), allowed(index));
            if error.is_nan() || error > allowed {
                return Err(ConformanceError::Wrong {
                    kernel: kernel.to_owned(),
                    shape: shape.to_owned(),
                    seed: self.seed,
                    index,
                    got,
                    expected,
                    allowed,
                });
            }
            if allowed > 0.0 {
                worst = worst.max(error / allowed);
            }
        }
        match self.measured.iter_mut().find(|measured| measured.kernel == kernel) {
            Some(measured) => {
                measured.share = measured.share.max(worst);
                measured.relative = match (measured.relative, relative) {
                    (Some(one), Some(other)) => Some(one.max(other)),
                    (one, other) => one.or(other),
                };
            }
            None => self.measured.push(Measured {
                kernel: kernel.to_owned(),
                share: worst,
                relative,
            }),
        }
        Ok(())
    }

    /// The relative error of a whole tensor, if it is long enough to have one.
    fn relative(
        &self,
        (kernel, shape): (&str, &str),
        got: &[f64],
        expected: &[f64],
        unit: f64,
    ) -> Result<Option<f64>, ConformanceError> {
        if expected.len() < RELATIVE_ELEMENTS_MIN {
            return Ok(None);
        }
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        let size = norm(&mut expected.iter().copied());
        let error = norm(&mut got.iter().zip(expected).map(|(got, expected)| got - expected));
        let (relative, allowed) = (error / size, (RELATIVE_MAX * unit).max(RELATIVE_IN_FULL));
        if size > 0.0 && (relative.is_nan() || relative > allowed) {
            let fault = format!("relative error {relative:e} of the whole tensor, allowed {allowed:e}");
            return Err(self.fault(kernel, shape, fault));
        }
        Ok((size > 0.0).then_some(relative))
    }

    /// Compares under `factor · u · max|expected|`.
    fn compare_scaled(
        &mut self,
        names: (&str, &str),
        tensor: &Tensor<D>,
        expected: &[f64],
        factor: f64,
    ) -> Result<(), ConformanceError> {
        let allowed = factor * tensor.unit * largest(expected);
        self.compare(names, tensor, expected, |_| allowed)
    }

    /// Token ids on the device.
    fn tokens(&mut self, ids: &[u32]) -> Result<D::Tokens, ConformanceError> {
        let mut tokens = self.device.alloc_tokens(ids.len())?;
        self.device.upload_tokens(&mut self.stream, ids, &mut tokens)?;
        Ok(tokens)
    }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}
