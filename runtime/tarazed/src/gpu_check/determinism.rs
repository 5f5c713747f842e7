//! Same values, same bits (DET-1, DET-2): a small model's passes, compared bit for bit.

use super::CheckFailed;
use serde_json::{Value, json};
use std::sync::atomic::AtomicBool;
use tarazed_domain::config::ModelConfig;
use tarazed_domain::{BlockIndex, ParameterLayout};
use tarazed_kernels::hash::BlockHash;
use tarazed_kernels::{AdamwStep, Blocks, Device, DeviceError, Gemm, Norm, OptimizerState, Precision, View, ViewMut};
use tarazed_model::{Model, Workspace, initialise, parameter_layout};

/// What is compared.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// The models.
    pub models: Vec<ModelConfig>,
    /// Lanes, at least two.
    pub lanes: usize,
    /// Sequences of a micro-batch; a lane has one.
    pub sequences: usize,
    /// Products besides: outputs, inputs and rows of a weight's gradient.
    pub products: Vec<[usize; 3]>,
    /// Norms besides: rows and width. No model of these is as wide as some are.
    pub norms: Vec<[usize; 2]>,
}

impl Sizes {
    /// Models at sizes beyond one tile, with heads of 64, 128 and 32 elements: attention has kernels for each. With the
    /// update that follows they launch every kernel.
    #[must_use]
    pub fn standard() -> Self {
        Self {
            models: vec![
                model(2, [256, 688, 4, 2, 256, 1000]),
                model(1, [256, 688, 2, 1, 256, 1000]),
                model(1, [128, 344, 4, 2, 256, 1000]),
            ],
            lanes: 4,
            sequences: 2,
            // Small results of long sums, which a library cuts between blocks of threads.
            products: vec![[768, 768, 32_768], [768, 2048, 32_768], [256, 256, 8192]],
            norms: vec![[70, 8200]],
        }
    }

    /// A model that any device passes over at once.
    #[must_use]
    pub fn small() -> Self {
        Self {
            models: vec![model(1, [32, 48, 2, 1, 8, 50])],
            lanes: 3,
            sequences: 1,
            products: vec![[8, 16, 24]],
            norms: vec![[3, 40]],
        }
    }
}

/// Hidden size, inner size, query heads, key heads, context and vocabulary.
pub(super) fn model(layers: usize, [hidden, ffn, heads, kv_heads, context, vocabulary]: [usize; 6]) -> ModelConfig {
    ModelConfig {
        layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        context,
        vocabulary,
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        init_std: 0.02,
        norm_init: 1.0,
        initial: None,
    }
}

/// Seed of the weights; any will do.
const SEED: u64 = 20_260_101;
/// Elements of a parameter block; decides nothing here.
const BLOCK_ELEMENTS: usize = 4096;
const CHECK: &str = "determinism";
/// Updates in a row: the second one finds moments that are not zero, and hashes that the first one left.
const UPDATES: u64 = 2;
/// Each of them; any numbers will do.
const UPDATE: AdamwStep = AdamwStep {
    learning_rate: 3e-3,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
    gradient_scale: 0.5,
    step: 1,
};

/// Results by name, as bits.
type Bits = Vec<(&'static str, Vec<u64>)>;

fn bits_of(values: &[f32]) -> Vec<u64> {
    values.iter().map(|value| u64::from(value.to_bits())).collect()
}

/// A model on a device, with its weights.
pub(super) struct Bench<D: Device> {
    pub model: Model<D>,
    pub layout: ParameterLayout,
    pub weights: D::Buffer,
    config: ModelConfig,
    /// The weights in full precision.
    initial: Vec<f32>,
}

/// What one lane gave.
struct Lane {
    bits: Bits,
    gradient: Vec<f32>,
}

impl<D: Device + Clone> Bench<D> {
    pub fn new(device: &D, config: &ModelConfig) -> Result<Self, CheckFailed> {
        let failed = CheckFailed::because::<DeviceError>(CHECK);
        let layout = parameter_layout(config, BLOCK_ELEMENTS);
        let model = Model::new(config, &layout, device.clone()).map_err(CheckFailed::because(CHECK))?;
        let mut initial = vec![0.0; layout.flat_elements()];
        initialise(&layout, config, SEED, 0..layout.flat_elements(), &mut initial);
        let mut weights = device.alloc(initial.len(), Precision::Working).map_err(&failed)?;
        let mut stream = device.stream().map_err(&failed)?;
        device
            .upload(&mut stream, &initial, ViewMut::from(&mut weights))
            .map_err(&failed)?;
        device.synchronize(&mut stream).map_err(&failed)?;
        Ok(Self {
            model,
            layout,
            weights,
            config: config.clone(),
            initial,
        })
    }

    /// Token ids of a micro-batch; another one for each lane.
    pub fn tokens(&self, config: &ModelConfig, sequences: usize, lane: usize) -> Vec<u32> {
        let ids = sequences * (config.context + 1);
        let id = |index: usize| (index * 7919 + lane * 104_729 + index * index * 31) % config.vocabulary;
        (0..ids).map(|index| id(index) as u32).collect()
    }

    /// One lane's micro-batch into a fresh gradient.
    fn lane(&self, workspace: &mut Workspace<D>, sequences: usize, lane: usize) -> Result<Lane, CheckFailed> {
        let failed = CheckFailed::because::<DeviceError>(CHECK);
        let device = self.model.device();
        let elements = self.layout.flat_elements();
        let mut gradient = device.alloc(elements, Precision::Full).map_err(&failed)?;
        let tokens = self.tokens(&self.config, sequences, lane);
        let abort = AtomicBool::new(false);
        let losses = self
            .model
            .forward_backward(&self.weights, &mut gradient, workspace, &tokens, 1.0, &abort)
            .map_err(CheckFailed::because(CHECK))?;
        let mut values = vec![0.0_f32; elements];
        device
            .download(workspace.stream(), View::from(&gradient), &mut values)
            .map_err(&failed)?;
        let losses = losses.into_iter().map(f64::to_bits).collect();
        let bits = vec![("loss of sequence", losses), ("gradient element", bits_of(&values))];
        Ok(Lane { bits, gradient: values })
    }

    /// What becomes of two lanes' gradients: fold, norm, two updates with their hashes, and conversions.
    fn update(&self, left: &[f32], right: &[f32]) -> Result<Bits, CheckFailed> {
        let changed = |count: usize| {
            let cause = format!("{count} blocks of optimizer state were not as the update before had left them");
            (count > 0).then(|| CheckFailed::because(CHECK)(cause))
        };
        let (bits, counts) = self.updated(left, right).map_err(CheckFailed::because(CHECK))?;
        counts.into_iter().find_map(changed).map_or(Ok(bits), Err)
    }

    /// The update's results, and how many blocks each update found changed.
    fn updated(&self, left: &[f32], right: &[f32]) -> Result<(Bits, Vec<usize>), DeviceError> {
        let (device, len) = (self.model.device(), self.layout.flat_elements());
        let mut stream = device.stream()?;
        let full = || device.alloc(len, Precision::Full);
        let (mut gradient, mut other, mut master, mut first, mut second) =
            (full()?, full()?, full()?, full()?, full()?);
        let (mut working, mut converted) = (
            device.alloc(len, Precision::Working)?,
            device.alloc(len, Precision::Working)?,
        );
        device.upload(&mut stream, left, ViewMut::from(&mut gradient))?;
        device.upload(&mut stream, right, ViewMut::from(&mut other))?;
        device.upload(&mut stream, &self.initial, ViewMut::from(&mut master))?;
        device.fold(&mut stream, ViewMut::from(&mut gradient), View::from(&other), len)?;
        let mut sums = vec![0.0_f64; len / BLOCK_ELEMENTS];
        device.square_sums(&mut stream, View::from(&gradient), BLOCK_ELEMENTS, &mut sums)?;

        let blocks = Blocks {
            first: BlockIndex(0),
            block_elements: BLOCK_ELEMENTS,
        };
        let mut hashes = vec![BlockHash::default(); len / BLOCK_ELEMENTS];
        let state = [&master, &first, &second].map(View::from);
        device.block_hashes(&mut stream, blocks, state[0], state[1], state[2], &mut hashes)?;
        let mut changed = Vec::new();
        for number in 1..=UPDATES {
            let step = AdamwStep { step: number, ..UPDATE };
            let state = OptimizerState {
                master: ViewMut::from(&mut master),
                first_moment: ViewMut::from(&mut first),
                second_moment: ViewMut::from(&mut second),
            };
            let copy = Some(ViewMut::from(&mut working));
            changed.push(device.adamw(
                &mut stream,
                &step,
                blocks,
                View::from(&gradient),
                state,
                copy,
                &mut hashes,
            )?);
        }

        device.copy(&mut stream, View::from(&gradient), ViewMut::from(&mut converted), len)?;
        device.add(&mut stream, ViewMut::from(&mut converted), View::from(&working), len)?;
        device.copy(&mut stream, View::from(&converted), ViewMut::from(&mut other), len)?;
        device.add(&mut stream, ViewMut::from(&mut other), View::from(&converted), len)?;
        let mut bits: Bits = vec![
            (
                "sum of squares of block",
                sums.iter().map(|sum| sum.to_bits()).collect(),
            ),
            ("half of a block's hash", halves(&hashes)),
        ];
        let parts = [
            ("folded gradient element", &gradient),
            ("master weight", &master),
            ("first moment", &first),
            ("second moment", &second),
            ("working weight", &working),
            ("converted element", &converted),
            ("element added to", &other),
        ];
        let mut values = vec![0.0_f32; len];
        for (name, buffer) in parts {
            device.download(&mut stream, View::from(buffer), &mut values)?;
            bits.push((name, bits_of(&values)));
        }
        Ok((bits, changed))
    }
}

/// Each hash as two numbers.
fn halves(hashes: &[BlockHash]) -> Vec<u64> {
    let numbers = |hash: &BlockHash| {
        let whole = u128::from_le_bytes(hash.0);
        [whole as u64, (whole >> 64) as u64]
    };
    hashes.iter().flat_map(numbers).collect()
}

/// Where two results differ first; `of` says of what they are.
fn same(what: &str, of: &str, first: &Bits, second: &Bits) -> Result<(), CheckFailed> {
    let differs = CheckFailed::because(CHECK);
    for ((name, first), (_, second)) in first.iter().zip(second) {
        if let Some(at) = first.iter().zip(second).position(|(a, b)| a != b) {
            let (a, b) = (first[at], second[at]);
            let text = format!("{what}: {of}, {name} {at} is {a:#x}, then {b:#x}");
            return Err(differs(text));
        }
    }
    Ok(())
}

const COMPARISONS: [&str; 5] = [
    "the same inputs twice",
    "lanes in another order",
    "all lanes at once, each on a stream of its own",
    "the same update twice",
    "long sums and wide norms twice, and on streams at once",
];

/// For each model: runs each lane twice, the lanes in reverse, and all lanes at once on streams of their own; then the
/// update twice.
///
/// # Errors
/// The first result that came out otherwise.
pub fn check<D: Device + Clone>(device: &D, sizes: &Sizes) -> Result<Value, CheckFailed> {
    for config in &sizes.models {
        check_model(&Bench::new(device, config)?, sizes)?;
    }
    for &shape in &sizes.products {
        check_product(device, shape, sizes.lanes)?;
    }
    for &shape in &sizes.norms {
        check_norm(device, shape, sizes.lanes)?;
    }
    let models: Vec<String> = sizes.models.iter().map(|model| model.identity()).collect();
    Ok(json!({
        "models": models, "lanes": sizes.lanes, "sequences": sizes.sequences, "updates": UPDATES, "products": sizes.products, "norms": sizes.norms,
        "same_bits": COMPARISONS,
    }))
}

fn check_model<D: Device + Clone>(bench: &Bench<D>, sizes: &Sizes) -> Result<(), CheckFailed> {
    let [twice, reversed, together, updates, _] = COMPARISONS;
    let of = |lane: usize| format!("heads of {} elements, lane {lane}", bench.config.head_dim());
    let workspace = || {
        bench
            .model
            .workspace(sizes.sequences)
            .map_err(CheckFailed::because(CHECK))
    };
    let mut own = workspace()?;
    let mut lanes = |order: &mut dyn Iterator<Item = usize>| -> Result<Vec<(usize, Lane)>, CheckFailed> {
        order
            .map(|lane| Ok((lane, bench.lane(&mut own, sizes.sequences, lane)?)))
            .collect()
    };
    let first = lanes(&mut (0..sizes.lanes))?;
    for (lane, again) in lanes(&mut (0..sizes.lanes))? {
        same(twice, &of(lane), &first[lane].1.bits, &again.bits)?;
    }
    for (lane, again) in lanes(&mut (0..sizes.lanes).rev())? {
        same(reversed, &of(lane), &first[lane].1.bits, &again.bits)?;
    }
    let at_once: Vec<Result<Lane, CheckFailed>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..sizes.lanes)
            .map(|lane| scope.spawn(move || bench.lane(&mut workspace()?, sizes.sequences, lane)))
            .collect();
        let panicked = || Err(CheckFailed::because(CHECK)("a lane's thread panicked"));
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|_| panicked()))
            .collect()
    });
    for (lane, again) in at_once.into_iter().enumerate() {
        same(together, &of(lane), &first[lane].1.bits, &again?.bits)?;
    }
    let (left, right) = (&first[0].1.gradient, &first[1].1.gradient);
    let updated = bench.update(left, right)?;
    same(updates, &of(0), &updated, &bench.update(left, right)?)
}

/// A buffer of numbers that repeat themselves late.
fn operand<D: Device>(device: &D, stream: &mut D::Stream, len: usize) -> Result<D::Buffer, DeviceError> {
    let value = |index: usize| (index * 7919 % 1009) as f32 / 504.5 - 1.0;
    let values: Vec<f32> = (0..len).map(value).collect();
    let mut buffer = device.alloc(len, Precision::Working)?;
    device.upload(stream, &values, ViewMut::from(&mut buffer))?;
    device.synchronize(stream)?;
    Ok(buffer)
}

/// The same work twice on one stream, then on as many streams at once.
fn check_repeats<D: Device>(
    device: &D,
    of: &str,
    streams: usize,
    work: impl Fn(&mut D::Stream) -> Result<Bits, DeviceError> + Sync,
) -> Result<(), CheckFailed> {
    let failed = CheckFailed::because::<DeviceError>(CHECK);
    let mut stream = device.stream().map_err(&failed)?;
    let first = work(&mut stream).map_err(&failed)?;
    same(COMPARISONS[4], of, &first, &work(&mut stream).map_err(&failed)?)?;
    let at_once: Vec<Result<Bits, DeviceError>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..streams)
            .map(|_| scope.spawn(|| work(&mut device.stream()?)))
            .collect();
        let panicked = || DeviceError::Failed {
            operation: CHECK,
            cause: "a thread panicked".to_owned(),
        };
        let join = |worker: std::thread::ScopedJoinHandle<'_, _>| worker.join().unwrap_or_else(|_| Err(panicked()));
        workers.into_iter().map(join).collect()
    });
    for again in at_once {
        same(COMPARISONS[4], of, &first, &again.map_err(&failed)?)?;
    }
    Ok(())
}

/// A weight's gradient over many rows.
fn check_product<D: Device>(
    device: &D,
    [outputs, inputs, rows]: [usize; 3],
    streams: usize,
) -> Result<(), CheckFailed> {
    let failed = CheckFailed::because::<DeviceError>(CHECK);
    let mut stream = device.stream().map_err(&failed)?;
    let slopes = operand(device, &mut stream, rows * outputs).map_err(&failed)?;
    let x = operand(device, &mut stream, rows * inputs).map_err(&failed)?;
    let of = format!("gradient of a {outputs} x {inputs} weight over {rows} rows");
    check_repeats(device, &of, streams, |stream| {
        let mut into = device.alloc(outputs * inputs, Precision::Full)?;
        let call = Gemm::weight_gradient(outputs, inputs, rows);
        let to = ViewMut::from(&mut into);
        device.gemm(stream, &call, View::from(&slopes), View::from(&x), to)?;
        let mut values = vec![0.0_f32; outputs * inputs];
        device.download(stream, View::from(&into), &mut values)?;
        Ok(vec![("element", bits_of(&values))])
    })
}

/// A norm and its gradients.
fn check_norm<D: Device>(device: &D, [rows, width]: [usize; 2], streams: usize) -> Result<(), CheckFailed> {
    let failed = CheckFailed::because::<DeviceError>(CHECK);
    let mut stream = device.stream().map_err(&failed)?;
    let x = operand(device, &mut stream, rows * width).map_err(&failed)?;
    let slopes = operand(device, &mut stream, rows * width).map_err(&failed)?;
    let weight = operand(device, &mut stream, width).map_err(&failed)?;
    let call = Norm { rows, width, eps: 1e-5 };
    check_repeats(device, &format!("norm of {rows} x {width}"), streams, |stream| {
        let mut y = device.alloc(rows * width, Precision::Working)?;
        let mut into_x = device.alloc(rows * width, Precision::Working)?;
        let mut into_weight = device.alloc(width, Precision::Full)?;
        let mut inverse = device.alloc(rows, Precision::Full)?;
        let (x, weight, slopes) = (View::from(&x), View::from(&weight), View::from(&slopes));
        let to = (ViewMut::from(&mut y), ViewMut::from(&mut inverse));
        device.rms_norm(stream, &call, x, None, weight, to.0, to.1)?;
        let to = (ViewMut::from(&mut into_x), ViewMut::from(&mut into_weight));
        device.rms_norm_backward(stream, &call, x, View::from(&inverse), weight, slopes, to.0, to.1)?;
        let mut bits = Bits::new();
        for (name, buffer, len) in [
            ("normal", &y, rows * width),
            ("gradient element", &into_x, rows * width),
            ("weight's gradient element", &into_weight, width),
        ] {
            let mut values = vec![0.0_f32; len];
            device.download(stream, View::from(buffer), &mut values)?;
            bits.push((name, bits_of(&values)));
        }
        Ok(bits)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use tarazed_kernels::CpuDevice;
    use tarazed_kernels::cuda::CudaDevice;
    use tarazed_kernels::cuda::recording::{Call, RecordingDriver};
    use tarazed_kernels::cuda::table::ENTRIES;

    #[test]
    fn the_processor_gives_the_same_bits() {
        let report = check(&CpuDevice::new(), &Sizes::small()).expect("deterministic");
        assert_eq!(report["same_bits"].as_array().map(Vec::len), Some(COMPARISONS.len()));
    }

    #[test]
    fn other_lanes_have_other_bits_and_a_difference_is_named() {
        let sizes = Sizes::small();
        let bench = Bench::new(&CpuDevice::new(), &sizes.models[0]).expect("a model");
        let mut workspace = bench.model.workspace(sizes.sequences).expect("memory");
        let mut lane = |lane| bench.lane(&mut workspace, sizes.sequences, lane).expect("a lane");
        let (zero, one) = (lane(0), lane(1));
        assert!(same("x", "lane 0", &zero.bits, &zero.bits).is_ok());
        let failed = same("x", "lane 0", &zero.bits, &one.bits)
            .expect_err("differs")
            .to_string();
        assert!(
            failed.starts_with("determinism: x: lane 0, loss of sequence 0"),
            "{failed}"
        );
        let mut flipped = zero.bits.clone();
        flipped[1].1[5] ^= 1;
        let failed = same("x", "lane 2", &zero.bits, &flipped)
            .expect_err("differs")
            .to_string();
        assert!(failed.contains("lane 2, gradient element 5 is"), "{failed}");
    }

    /// Every result of an update depends on what went in.
    #[test]
    fn other_gradients_make_other_updates() {
        let bench = Bench::new(&CpuDevice::new(), &Sizes::small().models[0]).expect("a model");
        let gradient: Vec<f32> = (0..bench.layout.flat_elements())
            .map(|i| (i % 97) as f32 * 0.01 - 0.3)
            .collect();
        let more: Vec<f32> = gradient.iter().map(|x| x + 0.5).collect();
        let update = |right: &[f32]| bench.update(&gradient, right).expect("updates");
        let (one, other) = (update(&gradient), update(&more));
        for ((name, one), (_, other)) in one.iter().zip(&other) {
            assert_ne!(one, other, "{name}");
        }
    }

    /// What [`Sizes::standard`] says of itself.
    #[test]
    fn the_standard_sizes_launch_every_kernel() {
        let recorder = RecordingDriver::new();
        let device = CudaDevice::new(recorder.clone()).expect("a device");
        // One lane and one update of each model: the others launch the same.
        let sizes = Sizes::standard();
        for config in &sizes.models {
            let bench = Bench::new(&device, config).expect("a model");
            let mut workspace = bench.model.workspace(sizes.sequences).expect("memory");
            let lane = bench.lane(&mut workspace, sizes.sequences, 0).expect("a lane");
            // The recorder computes nothing: its blocks are as it likes.
            bench.updated(&lane.gradient, &lane.gradient).expect("an update");
        }
        for &shape in &sizes.norms {
            check_norm(&device, shape, 1).expect("norms");
        }
        let calls = recorder.take();
        let launched: BTreeSet<&str> = calls
            .iter()
            .filter_map(|call| match call {
                Call::Launch(_, launch, _) => Some(launch.entry.name),
                _ => None,
            })
            .collect();
        let missing: Vec<&str> = ENTRIES
            .iter()
            .map(|entry| entry.name)
            .filter(|name| !launched.contains(name))
            .collect();
        assert_eq!(missing, [""; 0]);
    }
}
