//! Same values, same bits (DET-1, DET-2): a small model's passes, compared bit for bit.

use super::CheckFailed;
use serde_json::{Value, json};
use std::sync::atomic::AtomicBool;
use tarazed_domain::ParameterLayout;
use tarazed_domain::config::ModelConfig;
use tarazed_kernels::{Device, Precision, View, ViewMut};
use tarazed_model::{Model, Workspace, initialise, parameter_layout};

/// What is compared.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// The model.
    pub model: ModelConfig,
    /// Lanes.
    pub lanes: usize,
    /// Sequences of a micro-batch; a lane has one.
    pub sequences: usize,
}

impl Sizes {
    /// A model that uses every kernel at sizes beyond one tile.
    #[must_use]
    pub fn standard() -> Self {
        Self {
            model: model(2, [256, 688, 4, 2, 256, 1000]),
            lanes: 4,
            sequences: 2,
        }
    }

    /// A model that any device passes over at once.
    #[must_use]
    pub fn small() -> Self {
        Self {
            model: model(1, [32, 48, 2, 1, 8, 50]),
            lanes: 3,
            sequences: 1,
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
    }
}

/// Seed of the weights; any will do.
const SEED: u64 = 20_260_101;
/// Elements of a parameter block; decides nothing here.
const BLOCK_ELEMENTS: usize = 4096;
const CHECK: &str = "determinism";

/// Losses and gradient of one lane, as bits.
type Bits = (Vec<u64>, Vec<u32>);

/// A model on a device, with its weights.
pub(super) struct Bench<D: Device> {
    pub model: Model<D>,
    pub layout: ParameterLayout,
    pub weights: D::Buffer,
}

impl<D: Device + Clone> Bench<D> {
    pub fn new(device: &D, config: &ModelConfig) -> Result<Self, CheckFailed> {
        let failed = CheckFailed::because::<tarazed_kernels::DeviceError>(CHECK);
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
        Ok(Self { model, layout, weights })
    }

    /// Token ids of a micro-batch; another one for each lane.
    pub fn tokens(&self, config: &ModelConfig, sequences: usize, lane: usize) -> Vec<u32> {
        let ids = sequences * (config.context + 1);
        let id = |index: usize| (index * 7919 + lane * 104_729 + index * index * 31) % config.vocabulary;
        (0..ids).map(|index| id(index) as u32).collect()
    }

    /// One lane's micro-batch into a fresh gradient.
    fn lane(&self, workspace: &mut Workspace<D>, sizes: &Sizes, lane: usize) -> Result<Bits, CheckFailed> {
        let failed = CheckFailed::because::<tarazed_kernels::DeviceError>(CHECK);
        let device = self.model.device();
        let elements = self.layout.flat_elements();
        let mut gradient = device.alloc(elements, Precision::Full).map_err(&failed)?;
        let tokens = self.tokens(&sizes.model, sizes.sequences, lane);
        let abort = AtomicBool::new(false);
        let losses = self
            .model
            .forward_backward(&self.weights, &mut gradient, workspace, &tokens, 1.0, &abort)
            .map_err(CheckFailed::because(CHECK))?;
        let mut values = vec![0.0_f32; elements];
        device
            .download(workspace.stream(), View::from(&gradient), &mut values)
            .map_err(&failed)?;
        let bits = |losses: Vec<f64>| losses.into_iter().map(f64::to_bits).collect();
        Ok((bits(losses), values.into_iter().map(f32::to_bits).collect()))
    }
}

/// Where two results differ first.
fn same(what: &str, lane: usize, first: &Bits, second: &Bits) -> Result<(), CheckFailed> {
    let differs = CheckFailed::because(CHECK);
    if let Some(at) = first.0.iter().zip(&second.0).position(|(a, b)| a != b) {
        return Err(differs(format!(
            "{what}: lane {lane}, loss of sequence {at} has other bits"
        )));
    }
    if let Some(at) = first.1.iter().zip(&second.1).position(|(a, b)| a != b) {
        let (a, b) = (first.1[at], second.1[at]);
        let text = format!("{what}: lane {lane}, gradient element {at} is {a:#010x}, then {b:#010x}");
        return Err(differs(text));
    }
    Ok(())
}

/// Runs each lane twice, the lanes in reverse, and all lanes at once on streams of their own.
///
/// # Errors
/// The first lane that came out otherwise.
pub fn check<D: Device + Clone>(device: &D, sizes: &Sizes) -> Result<Value, CheckFailed> {
    let bench = Bench::new(device, &sizes.model)?;
    let workspace = || {
        bench
            .model
            .workspace(sizes.sequences)
            .map_err(CheckFailed::because(CHECK))
    };
    let mut own = workspace()?;
    let mut lanes = |order: &mut dyn Iterator<Item = usize>| -> Result<Vec<(usize, Bits)>, CheckFailed> {
        order
            .map(|lane| Ok((lane, bench.lane(&mut own, sizes, lane)?)))
            .collect()
    };
    let first = lanes(&mut (0..sizes.lanes))?;
    for (lane, bits) in lanes(&mut (0..sizes.lanes))? {
        same("the same inputs twice", lane, &first[lane].1, &bits)?;
    }
    for (lane, bits) in lanes(&mut (0..sizes.lanes).rev())? {
        same("lanes in another order", lane, &first[lane].1, &bits)?;
    }
    let together: Vec<Result<Bits, CheckFailed>> = std::thread::scope(|scope| {
        let bench = &bench;
        let workers: Vec<_> = (0..sizes.lanes)
            .map(|lane| scope.spawn(move || bench.lane(&mut workspace()?, sizes, lane)))
            .collect();
        let panicked = || Err(CheckFailed::because(CHECK)("a lane's thread panicked"));
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|_| panicked()))
            .collect()
    });
    for (lane, bits) in together.into_iter().enumerate() {
        same(
            "all lanes at once, each on a stream of its own",
            lane,
            &first[lane].1,
            &bits?,
        )?;
    }
    Ok(json!({
        "model": format!("{:?}", sizes.model), "lanes": sizes.lanes, "sequences": sizes.sequences,
        "same_bits": ["the same inputs twice", "lanes in another order", "all lanes at once, each on a stream of its own"],
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tarazed_kernels::CpuDevice;

    #[test]
    fn the_processor_gives_the_same_bits() {
        let report = check(&CpuDevice::new(), &Sizes::small()).expect("deterministic");
        assert_eq!(report["same_bits"].as_array().map(Vec::len), Some(3));
    }

    #[test]
    fn other_lanes_have_other_bits_and_a_difference_is_named() {
        let sizes = Sizes::small();
        let bench = Bench::new(&CpuDevice::new(), &sizes.model).expect("a model");
        let mut workspace = bench.model.workspace(sizes.sequences).expect("memory");
        let mut lane = |lane| bench.lane(&mut workspace, &sizes, lane).expect("a lane");
        let (zero, one) = (lane(0), lane(1));
        assert!(same("x", 0, &zero, &zero).is_ok());
        let failed = same("x", 0, &zero, &one).expect_err("differs").to_string();
        assert!(
            failed.starts_with("determinism: x: lane 0, loss of sequence 0"),
            "{failed}"
        );
        let mut flipped = zero.clone();
        flipped.1[5] ^= 1;
        let failed = same("x", 2, &zero, &flipped).expect_err("differs").to_string();
        assert!(failed.contains("lane 2, gradient element 5 is"), "{failed}");
    }
}
