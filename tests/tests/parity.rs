//! Parity with PyTorch: losses, every gradient tensor and ten optimizer steps against a float64 reference.
//!
//! The reference files under `parity/reference/` come from `parity/make_reference.py`, which writes the architecture out
//! in plain PyTorch and shares nothing with this code. The body is generic over [`Device`]: a device in full precision
//! is held to the bounds below, which leave a few times what PyTorch's own float32 needs (the files say how much).
//!
//! Each bound has its negative controls: a wrong RoPE layout, a weight a thousandth off in any one tensor, an update
//! without clipping, with decay on norm weights, or with the rate of the step before, must all exceed it. A parity test
//! that they would pass proves nothing.
//!
//! What this does not do: speed (`src/bin/bench_step/`), or lanes and ranks (the end-to-end tests).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use tarazed_domain::config::ModelConfig;
use tarazed_domain::{BlockIndex, ParameterLayout};
use tarazed_kernels::{AdamwStep, BlockHash, Blocks, CpuDevice, Device, OptimizerState, Precision, View, ViewMut};
use tarazed_model::{Model, parameter_layout};

const CASES: [&str; 3] = ["wide_gqa", "mha", "odd"];

/// Small and odd enough that tensors share blocks and both groups end in padding.
const BLOCK_ELEMENTS: usize = 1000;

/// Per-sequence loss, relative.
const LOSS_ERROR_MAX: f64 = 5e-7;
/// Each gradient tensor, Frobenius norm of the difference over that of the reference.
const GRADIENT_ERROR_MAX: f64 = 5e-6;
/// Loss and gradient norm of each of the ten steps, relative.
const STEP_ERROR_MAX: f64 = 5e-6;
/// Each tensor after ten steps, Frobenius norm of the difference over that of the tensor's whole movement. Looser:
/// AdamW divides by the gradient's own size, so an element whose gradient is near zero moves by its rounding error.
const FINAL_ERROR_MAX: f64 = 1e-4;

#[derive(Deserialize)]
struct Shape {
    layers: usize,
    hidden: usize,
    ffn: usize,
    heads: usize,
    kv_heads: usize,
    context: usize,
    vocabulary: usize,
    sequences: usize,
    norm_eps: f64,
    rope_theta: f64,
}

#[derive(Deserialize)]
struct Optimizer {
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    clip_norm: f64,
    steps: usize,
}

#[derive(Deserialize)]
struct Header {
    shape: Shape,
    optimizer: Optimizer,
    f32_gradient_error: BTreeMap<String, f64>,
}

/// One reference file.
struct Reference {
    header: Header,
    tokens: Vec<u32>,
    /// Every float tensor, widened.
    tensors: BTreeMap<String, Vec<f64>>,
}

impl Reference {
    fn load(case: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("parity/reference/{case}.safetensors"));
        let bytes = std::fs::read(&path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let header = &metadata.metadata().as_ref().unwrap()["reference"];
        let mut reference = Self {
            header: serde_json::from_str(header).unwrap(),
            tokens: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let data = view.data();
            match view.dtype() {
                Dtype::U32 => {
                    assert_eq!(name, "tokens");
                    reference.tokens = words(data).map(u32::from_le_bytes).collect();
                }
                Dtype::F32 => {
                    let values = words(data).map(|word| f64::from(f32::from_le_bytes(word))).collect();
                    reference.tensors.insert(name, values);
                }
                Dtype::F64 => {
                    reference
                        .tensors
                        .insert(name, words(data).map(f64::from_le_bytes).collect());
                }
                other => panic!("{name} has the unexpected type {other:?}"),
            }
        }
        reference
    }

    fn config(&self) -> ModelConfig {
        let shape = &self.header.shape;
        ModelConfig {
            layers: shape.layers,
            hidden: shape.hidden,
            ffn: shape.ffn,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            context: shape.context,
            vocabulary: shape.vocabulary,
            rope_theta: shape.rope_theta,
            norm_eps: shape.norm_eps,
            init_std: 0.02,
            norm_init: 1.0,
            initial: None,
        }
    }

    /// Batch `step`, `[sequences, context + 1]`.
    fn batch(&self, step: usize) -> &[u32] {
        let len = self.header.shape.sequences * self.sequence_tokens();
        &self.tokens[step * len..(step + 1) * len]
    }

    fn sequence_tokens(&self) -> usize {
        self.header.shape.context + 1
    }

    /// Initial weights in the flat space; every tensor of the layout must be in the file and the other way round.
    fn flat_weights(&self, layout: &ParameterLayout) -> Vec<f32> {
        let mut flat = vec![0.0; layout.flat_elements()];
        for slot in layout.tensors() {
            let values = &self.tensors[&format!("weight.{}", slot.name)];
            assert_eq!(values.len(), slot.len(), "{} has another size", slot.name);
            for (to, &from) in flat[slot.range()].iter_mut().zip(values) {
                *to = from as f32;
            }
        }
        let count = self.tensors.keys().filter(|name| name.starts_with("weight.")).count();
        assert_eq!(
            count,
            layout.tensors().len(),
            "the reference has tensors that the layout lacks"
        );
        flat
    }
}

fn words<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    data.chunks_exact(N).map(|word| word.try_into().unwrap())
}

/// Norm of the difference over `size`.
fn relative(ours: &[f32], theirs: &[f64], size: f64) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let square: f64 = ours.iter().zip(theirs).map(|(&a, &b)| (f64::from(a) - b).powi(2)).sum();
    square.sqrt() / size
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// The model on a device with all it needs to learn.
struct Learner<D: Device> {
    config: ModelConfig,
    layout: ParameterLayout,
    model: Model<D>,
    stream: D::Stream,
    /// Working weights, and the full-precision state.
    weights: D::Buffer,
    master: D::Buffer,
    first_moment: D::Buffer,
    second_moment: D::Buffer,
}

/// What an update does beside the gradient; changed by the negative controls.
#[derive(Clone, Copy)]
struct Update {
    learning_rate: f64,
    clip_norm: f64,
    decay_on_norms: bool,
}

/// What a negative control makes of step `index`'s update.
type Change<'a> = &'a dyn Fn(usize, Update) -> Update;

impl<D: Device> Learner<D> {
    fn new(device: D, config: ModelConfig, weights: &[f32]) -> Self {
        let layout = parameter_layout(&config, BLOCK_ELEMENTS);
        let mut stream = device.stream().unwrap();
        let mut filled = |precision| {
            let mut buffer = device.alloc(layout.flat_elements(), precision).unwrap();
            device.upload(&mut stream, weights, ViewMut::from(&mut buffer)).unwrap();
            buffer
        };
        let (working, master) = (filled(Precision::Working), filled(Precision::Full));
        let zeros = || device.alloc(layout.flat_elements(), Precision::Full).unwrap();
        let (first_moment, second_moment) = (zeros(), zeros());
        let model = Model::new(&config, &layout, device).unwrap();
        Self {
            config,
            layout,
            model,
            stream,
            weights: working,
            master,
            first_moment,
            second_moment,
        }
    }

    /// Per-sequence losses and the gradient of the mean token loss, in micro-batches of so many sequences.
    fn gradient(&mut self, tokens: &[u32], micro_batch: usize) -> (Vec<f64>, D::Buffer) {
        let sequence_tokens = self.config.context + 1;
        let predictions = tokens.len() / sequence_tokens * self.config.context;
        let mut gradient = self
            .model
            .device()
            .alloc(self.layout.flat_elements(), Precision::Full)
            .unwrap();
        let mut workspace = self.model.workspace(micro_batch).unwrap();
        let mut losses = Vec::new();
        for part in tokens.chunks(micro_batch * sequence_tokens) {
            let scale = 1.0 / predictions as f32;
            let abort = AtomicBool::new(false);
            let sums = self
                .model
                .forward_backward(&self.weights, &mut gradient, &mut workspace, part, scale, &abort)
                .unwrap();
            losses.extend(sums);
        }
        self.model.device().synchronize(workspace.stream()).unwrap();
        (losses, gradient)
    }

    /// One optimizer update; gives back mean loss and gradient norm.
    fn step(&mut self, tokens: &[u32], optimizer: &Optimizer, index: usize, update: Update) -> (f64, f64) {
        let sequences = tokens.len() / (self.config.context + 1);
        let (losses, gradient) = self.gradient(tokens, sequences);
        let mut sums = vec![0.0; self.layout.block_count()];
        let device = self.model.device();
        device
            .square_sums(&mut self.stream, View::from(&gradient), BLOCK_ELEMENTS, &mut sums)
            .unwrap();
        let gradient_norm = sums.iter().sum::<f64>().sqrt();
        for block in (0..self.layout.block_count() as u32).map(BlockIndex) {
            let offset = self.layout.block_range(block).start;
            let decays = self.layout.block_decays(block) || update.decay_on_norms;
            let call = AdamwStep {
                learning_rate: update.learning_rate,
                beta1: optimizer.beta1,
                beta2: optimizer.beta2,
                eps: optimizer.eps,
                weight_decay: if decays { optimizer.weight_decay } else { 0.0 },
                gradient_scale: (update.clip_norm / gradient_norm).min(1.0) as f32,
                step: index as u64 + 1,
            };
            let state = OptimizerState {
                master: ViewMut::at(&mut self.master, offset),
                first_moment: ViewMut::at(&mut self.first_moment, offset),
                second_moment: ViewMut::at(&mut self.second_moment, offset),
            };
            let blocks = Blocks {
                first: block,
                block_elements: BLOCK_ELEMENTS,
            };
            let working = Some(ViewMut::at(&mut self.weights, offset));
            let mut hashes = [BlockHash::default()];
            let gradient = View::at(&gradient, offset);
            device
                .adamw(&mut self.stream, &call, blocks, gradient, state, working, &mut hashes)
                .unwrap();
        }
        device.synchronize(&mut self.stream).unwrap();
        let predictions = sequences * self.config.context;
        (losses.iter().sum::<f64>() / predictions as f64, gradient_norm)
    }
}

/// Copies a whole buffer from the device.
fn download<D: Device>(device: &D, buffer: &D::Buffer) -> Vec<f32> {
    let mut host = vec![0.0; device.len(buffer)];
    let mut stream = device.stream().unwrap();
    device.download(&mut stream, View::from(buffer), &mut host).unwrap();
    host
}

/// By tensor, the error of the gradient of batch 0; and the worst error of its losses.
fn gradient_errors<D: Device>(
    device: D,
    reference: &Reference,
    weights: &[f32],
    micro_batch: usize,
) -> (f64, Vec<(String, f64)>) {
    let mut learner = Learner::new(device, reference.config(), weights);
    let (losses, gradient) = learner.gradient(reference.batch(0), micro_batch);
    let gradient = download(learner.model.device(), &gradient);
    let expected = &reference.tensors["loss_f64"];
    assert_eq!(losses.len(), expected.len(), "one loss for each sequence");
    let loss_error = losses
        .iter()
        .zip(expected)
        .map(|(a, b)| ((a - b) / b).abs())
        .fold(0.0, f64::max);
    let mut padding = gradient.clone();
    let errors = learner.layout.tensors().iter().map(|slot| {
        let theirs = &reference.tensors[&format!("gradient.{}", slot.name)];
        padding[slot.range()].fill(0.0);
        (
            slot.name.clone(),
            relative(&gradient[slot.range()], theirs, norm(theirs)),
        )
    });
    let errors = errors.collect();
    assert!(padding.iter().all(|&value| value == 0.0), "the padding has a gradient");
    (loss_error, errors)
}

/// Runs the ten steps; the worst error of losses and norms, and by tensor that of the final weights.
fn ten_step_errors<D: Device>(
    device: D,
    reference: &Reference,
    change: impl Fn(usize, Update) -> Update,
) -> (f64, Vec<(String, f64)>) {
    let config = reference.config();
    let weights = reference.flat_weights(&parameter_layout(&config, BLOCK_ELEMENTS));
    let mut learner = Learner::new(device, config, &weights);
    let optimizer = &reference.header.optimizer;
    let mut step_error = 0.0_f64;
    for index in 0..optimizer.steps {
        let update = Update {
            learning_rate: reference.tensors["step.learning_rate"][index],
            clip_norm: optimizer.clip_norm,
            decay_on_norms: false,
        };
        let (loss, gradient_norm) = learner.step(reference.batch(index), optimizer, index, change(index, update));
        for (ours, theirs) in [(loss, "step.loss"), (gradient_norm, "step.gradient_norm")] {
            let theirs = reference.tensors[theirs][index];
            step_error = step_error.max(((ours - theirs) / theirs).abs());
        }
    }
    let master = download(learner.model.device(), &learner.master);
    let errors = learner.layout.tensors().iter().map(|slot| {
        let theirs = &reference.tensors[&format!("final.{}", slot.name)];
        let before = &reference.tensors[&format!("weight.{}", slot.name)];
        let moved: Vec<f64> = theirs.iter().zip(before).map(|(a, b)| a - b).collect();
        (slot.name.clone(), relative(&master[slot.range()], theirs, norm(&moved)))
    });
    (step_error, errors.collect())
}

fn worst(errors: &[(String, f64)]) -> (&str, f64) {
    let (name, error) = errors.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert!(
        errors.iter().all(|(_, error)| error.is_finite()),
        "an error is not finite: {errors:?}"
    );
    (name, *error)
}

fn initial_weights(reference: &Reference) -> (ParameterLayout, Vec<f32>) {
    let layout = parameter_layout(&reference.config(), BLOCK_ELEMENTS);
    let weights = reference.flat_weights(&layout);
    (layout, weights)
}

#[test]
fn losses_and_every_gradient_tensor_agree_with_pytorch() {
    for case in CASES {
        let reference = Reference::load(case);
        let (_, weights) = initial_weights(&reference);
        for micro_batch in 1..=reference.header.shape.sequences {
            let (loss_error, errors) = gradient_errors(CpuDevice::new(), &reference, &weights, micro_batch);
            let (name, error) = worst(&errors);
            let pytorch = reference
                .header
                .f32_gradient_error
                .values()
                .copied()
                .fold(0.0, f64::max);
            println!(
                "{case}, micro-batch {micro_batch}: loss {loss_error:.1e}, worst gradient {error:.1e} ({name}; \
                 PyTorch float32 {pytorch:.1e})"
            );
            assert!(loss_error <= LOSS_ERROR_MAX, "{case}: a loss is off by {loss_error:e}");
            for (name, error) in &errors {
                assert!(
                    *error <= GRADIENT_ERROR_MAX,
                    "{case}, micro-batch {micro_batch}: {name} is off by {error:e}"
                );
            }
        }
    }
}

/// Each prefix of a sequence must predict what the loss of the whole sequence says it does.
#[test]
fn logits_of_prefixes_agree_with_pytorch() {
    for case in CASES {
        let reference = Reference::load(case);
        let (_, weights) = initial_weights(&reference);
        let learner = Learner::new(CpuDevice::new(), reference.config(), &weights);
        let mut workspace = learner.model.workspace(1).unwrap();
        let losses = reference.batch(0).chunks(reference.sequence_tokens()).map(|sequence| {
            let token_losses = (1..sequence.len()).map(|end| {
                let logits = learner
                    .model
                    .next_logits(&learner.weights, &mut workspace, &sequence[..end])
                    .unwrap();
                assert_eq!(logits.len(), learner.config.vocabulary);
                let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
                sum.ln() - f64::from(logits[sequence[end] as usize])
            });
            token_losses.sum::<f64>()
        });
        for (ours, theirs) in losses.zip(&reference.tensors["loss_f64"]) {
            assert!(
                ((ours - theirs) / theirs).abs() <= LOSS_ERROR_MAX,
                "{case}: {ours} against {theirs}"
            );
        }
    }
}

#[test]
fn ten_steps_agree_with_pytorch() {
    for case in CASES {
        let reference = Reference::load(case);
        let (step_error, errors) = ten_step_errors(CpuDevice::new(), &reference, |_, update| update);
        let (name, error) = worst(&errors);
        println!("{case}: steps {step_error:.1e}, worst final weights {error:.1e} ({name})");
        assert!(
            step_error <= STEP_ERROR_MAX,
            "{case}: a loss or a gradient norm is off by {step_error:e}"
        );
        for (name, error) in &errors {
            assert!(
                *error <= FINAL_ERROR_MAX,
                "{case}: {name} is off by {error:e} after ten steps"
            );
        }
    }
}

/// DET-1: the instruction set decides speed alone. Equal errors to the last bit in every tensor after ten steps leave no
/// room for another number anywhere.
#[test]
fn every_instruction_set_learns_the_same() {
    let reference = Reference::load("odd");
    let runs = CpuDevice::all_instruction_sets().into_iter().map(|device| {
        let set = device.instruction_set();
        (set, ten_step_errors(device, &reference, |_, update| update))
    });
    let runs: Vec<_> = runs.collect();
    for (set, errors) in &runs[1..] {
        assert_eq!(errors, &runs[0].1, "{set} and {} differ", runs[0].0);
    }
}

/// Reordering the rows of each query and key head from halves to pairs makes the rotate-half kernel compute what the
/// pairwise RoPE layout would: the commonest mistake when weights change hands.
#[test]
fn a_wrong_rope_layout_is_seen() {
    for case in CASES {
        let reference = Reference::load(case);
        let (layout, mut weights) = initial_weights(&reference);
        let (hidden, head_dim) = (reference.config().hidden, reference.config().head_dim());
        for slot in layout
            .tensors()
            .iter()
            .filter(|s| s.name.contains("q_proj") || s.name.contains("k_proj"))
        {
            let rows: Vec<Vec<f32>> = weights[slot.range()].chunks(hidden).map(<[f32]>::to_vec).collect();
            for (row, to) in weights[slot.range()].chunks_mut(hidden).enumerate() {
                let (head, i) = (row / head_dim, row % head_dim);
                let from = head * head_dim
                    + if i < head_dim / 2 {
                        2 * i
                    } else {
                        2 * (i - head_dim / 2) + 1
                    };
                to.copy_from_slice(&rows[from]);
            }
        }
        let (loss_error, errors) = gradient_errors(CpuDevice::new(), &reference, &weights, 1);
        assert!(loss_error > 100.0 * LOSS_ERROR_MAX, "{case}: only {loss_error:e}");
        // A tensor below the first attention, and one above it: both must feel it.
        for tensor in ["model.embed_tokens.weight", "lm_head.weight"] {
            let error = errors.iter().find(|(name, _)| name == tensor).unwrap().1;
            assert!(error > 100.0 * GRADIENT_ERROR_MAX, "{case}: {tensor} only {error:e}");
        }
    }
}

#[test]
fn a_thousandth_off_in_any_tensor_is_seen() {
    for case in CASES {
        let reference = Reference::load(case);
        let (layout, weights) = initial_weights(&reference);
        for slot in layout.tensors() {
            let mut changed = weights.clone();
            for value in &mut changed[slot.range()] {
                *value *= 1.001;
            }
            let (_, errors) = gradient_errors(CpuDevice::new(), &reference, &changed, 1);
            let (_, error) = worst(&errors);
            assert!(
                error > 10.0 * GRADIENT_ERROR_MAX,
                "{case}: {} scaled by 1.001 shows only as {error:e}",
                slot.name
            );
        }
    }
}

#[test]
fn a_wrong_update_is_seen() {
    for case in CASES {
        let reference = Reference::load(case);
        let rates = &reference.tensors["step.learning_rate"];
        let wrong: [(&str, Change); 3] = [
            ("no clipping", &|_, update| Update {
                clip_norm: f64::INFINITY,
                ..update
            }),
            ("decay on norm weights", &|_, update| Update {
                decay_on_norms: true,
                ..update
            }),
            ("the rate of the step before", &|index, update| Update {
                learning_rate: rates[index.saturating_sub(1)],
                ..update
            }),
        ];
        for (what, change) in wrong {
            let (_, errors) = ten_step_errors(CpuDevice::new(), &reference, change);
            let (_, error) = worst(&errors);
            assert!(error > 10.0 * FINAL_ERROR_MAX, "{case}: {what} shows only as {error:e}");
        }
    }
}
