//! A training step against PyTorch's, on the same GPU: whole updates of the same shape, the two sides in turn, and medians.
//!
//! A step is a few micro-batches of random ids, forward and backward into one gradient, its norm, clipping and AdamW with the
//! block hashes; nothing of lanes and exchanges. The other side is a script (`tests/bench/pytorch_gpu_step.py`) that a Python
//! with PyTorch runs; without one, ours alone is timed, and the report says so.

use super::timing::Spread;
use super::{CheckFailed, VISIBLE_VARIABLE};
use serde::Deserialize;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tarazed_domain::config::Config;
use tarazed_domain::{BlockIndex, ParameterLayout};
use tarazed_kernels::cuda::CudaDevice;
use tarazed_kernels::cuda::driver::Driver;
use tarazed_kernels::cuda::peak::dense_bf16_flops_per_s;
use tarazed_kernels::{AdamwStep, BlockHash, Blocks, Device, DeviceError, OptimizerState, Precision, View, ViewMut};
use tarazed_model::{Model, Workspace, flops, initialise, parameter_layout};

/// What is timed.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// Steps that count, of each side; three before them do not.
    pub rounds: usize,
    /// A Python with PyTorch, and the script.
    pub peer: Option<(PathBuf, PathBuf)>,
    /// What [`super::VISIBLE_VARIABLE`] is to be for the peer, so that both sides have one device.
    pub visible: Option<String>,
}

const CHECK: &str = "bench";
/// Steps of each side that do not count: the first has algorithms to find and code to compile.
const WARM_UP: usize = 3;
/// By how much the two sides' first losses may differ, as a share: both begin from random weights of the same spread, and are
/// near the logarithm of the vocabulary. More, and they are not the same model.
const LOSS_SHARE_MAX: f64 = 0.02;

fn failed(cause: impl std::fmt::Display) -> CheckFailed {
    CheckFailed::because(CHECK)(cause)
}

/// Times one config's step, then looks once where its time goes.
///
/// # Errors
/// A config that does not load, the device's, a peer that breaks off or computes another model.
pub fn measure<D: Driver>(device: &CudaDevice<D>, sizes: &Sizes, path: &Path) -> Result<Value, CheckFailed> {
    let config = Config::load(path, &[]).map_err(failed)?;
    // The peer compiles at its first step, which takes long: it does so while our own model is made.
    let mut peer = match &sizes.peer {
        None => None,
        Some((python, script)) => Some(Peer::start(python, script, path, sizes)?),
    };
    let mut ours = Ours::new(device, &config, sizes.micro_batches)?;
    let first_of_theirs = peer.as_mut().map(Peer::first).transpose()?;
    if let Some(peer) = &peer {
        let parameters = ours.layout.parameter_count() as u64;
        if (peer.ready.parameters, peer.ready.tokens_per_step) != (parameters, ours.tokens_per_step as u64) {
            return Err(failed(format!(
                "{}: the peer has {:?}, and here are {parameters} parameters and {} tokens a step",
                path.display(),
                peer.ready,
                ours.tokens_per_step
            )));
        }
    }
    let (mut our_ms, mut their_ms) = (Vec::new(), Vec::new());
    let (_, first_of_ours) = ours.step()?;
    compare_losses(first_of_ours, first_of_theirs.map(|theirs| theirs.loss))?;
    for round in 1..WARM_UP + sizes.rounds {
        let (ms, _) = ours.step()?;
        let theirs = peer.as_mut().map(Peer::step).transpose()?;
        if round >= WARM_UP {
            our_ms.push(ms);
            their_ms.extend(theirs.map(|theirs| theirs.seconds * 1e3));
        }
    }
    let side = |times: Vec<f64>| {
        let Spread([least, median, most]) = Spread::of(times);
        let rate = ours.tokens_per_step as f64 / (median / 1e3);
        let peak = dense_bf16_flops_per_s(&device.facts().name);
        let mfu = peak.map(|peak| flops::utilisation(&config.model, rate, peak) * 100.0);
        (
            median,
            json!({"ms_least": least, "ms_median": median, "ms_most": most, "tokens_per_second": rate, "mfu_percent": mfu}),
        )
    };
    let (our_median, our_side) = side(our_ms);
    let (ratio, their_side) = match &peer {
        None => (
            Value::Null,
            json!("not run: no Python with PyTorch was given (--python)"),
        ),
        Some(peer) => {
            let (their_median, mut theirs) = side(their_ms);
            theirs["torch"] = json!(peer.ready.ready);
            (json!(their_median / our_median), theirs)
        }
    };
    Ok(json!({
        "config": path.display().to_string(), "parameters": ours.layout.parameter_count(),
        "tokens_per_step": ours.tokens_per_step, "micro_batches": sizes.micro_batches, "rounds": sizes.rounds,
        "ours": our_side, "pytorch": their_side, "pytorch_time_over_ours": ratio,
        // Times that are there are not given up for it.
        "profile": ours.profile().unwrap_or_else(|failure| json!(failure.to_string())),
    }))
}

/// A loss that is no number is no training; two that differ are two models.
fn compare_losses(ours: f64, theirs: Option<f64>) -> Result<(), CheckFailed> {
    if !ours.is_finite() {
        return Err(failed(format!("our first loss is {ours}")));
    }
    let Some(theirs) = theirs else { return Ok(()) };
    if (ours - theirs).abs() <= LOSS_SHARE_MAX * ours.abs() {
        return Ok(());
    }
    Err(failed(format!(
        "the first losses are {ours} here and {theirs} there: they are not of the same model"
    )))
}

/// Our side: a model with its optimizer's state.
struct Ours<'a, D: Driver> {
    device: &'a CudaDevice<D>,
    config: &'a Config,
    model: Model<CudaDevice<D>>,
    layout: ParameterLayout,
    workspace: Workspace<CudaDevice<D>>,
    tokens: Vec<Vec<u32>>,
    tokens_per_step: usize,
    weights: Buffer<D>,
    gradient: Buffer<D>,
    /// Master weights and both moments.
    state: [Buffer<D>; 3],
    hashes: Vec<BlockHash>,
    steps: u64,
}

type Buffer<D> = <CudaDevice<D> as Device>::Buffer;

impl<'a, D: Driver> Ours<'a, D> {
    fn new(device: &'a CudaDevice<D>, config: &'a Config, micro_batches: usize) -> Result<Self, CheckFailed> {
        let layout = parameter_layout(&config.model, config.optimizer.block_elements);
        let model = Model::new(&config.model, &layout, device.clone()).map_err(failed)?;
        let sequences = config.batch.micro_batch_sequences as usize;
        let workspace = model.workspace(sequences).map_err(failed)?;
        let elements = layout.flat_elements();
        let full = || device.alloc(elements, Precision::Full).map_err(failed);
        let mut ours = Self {
            device,
            config,
            workspace,
            tokens: (0..micro_batches)
                .map(|number| random_ids(config, sequences, number))
                .collect(),
            tokens_per_step: micro_batches * sequences * config.model.context,
            weights: device.alloc(elements, Precision::Working).map_err(failed)?,
            gradient: full()?,
            state: [full()?, full()?, full()?],
            hashes: vec![BlockHash::default(); layout.block_count()],
            steps: 0,
            model,
            layout,
        };
        ours.begin().map_err(failed)?;
        Ok(ours)
    }

    /// Initial weights, and the hashes of the state as it stands.
    fn begin(&mut self) -> Result<(), DeviceError> {
        let elements = self.layout.flat_elements();
        let mut initial = vec![0.0; elements];
        let (layout, config) = (&self.layout, self.config);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = elements.div_ceil(threads);
        std::thread::scope(|scope| {
            for (part, out) in initial.chunks_mut(share).enumerate() {
                let range = part * share..part * share + out.len();
                scope.spawn(move || initialise(layout, &config.model, config.run.seed, range, out));
            }
        });
        let (device, stream) = (self.device, self.workspace.stream());
        device.upload(stream, &initial, ViewMut::from(&mut self.weights))?;
        let [master, first, second] = &mut self.state;
        device.upload(stream, &initial, ViewMut::from(&mut *master))?;
        let blocks = Blocks {
            first: BlockIndex(0),
            block_elements: self.layout.block_elements(),
        };
        let parts = [&*master, &*first, &*second].map(View::from);
        device.block_hashes(stream, blocks, parts[0], parts[1], parts[2], &mut self.hashes)?;
        device.synchronize(stream)
    }

    /// Where one more step's time goes, operation by operation.
    fn profile(&mut self) -> Result<Value, CheckFailed> {
        self.workspace.stream().begin_profile().map_err(failed)?;
        let (wall_ms, _) = self.step()?;
        let spent = self.workspace.stream().end_profile().map_err(failed)?;
        let operations: Vec<Value> = spent
            .iter()
            .map(|spent| json!({"what": spent.what, "calls": spent.calls, "ms": spent.milliseconds}))
            .collect();
        Ok(json!({"wall_ms": wall_ms, "operations": operations}))
    }

    /// One update: milliseconds by the wall's clock, and the mean token loss before it.
    fn step(&mut self) -> Result<(f64, f64), CheckFailed> {
        let began = Instant::now();
        let (scale, elements) = (1.0 / self.tokens_per_step as f32, self.layout.flat_elements());
        self.device
            .zero(self.workspace.stream(), ViewMut::from(&mut self.gradient), elements)
            .map_err(failed)?;
        let (abort, mut loss) = (AtomicBool::new(false), 0.0);
        for tokens in &self.tokens {
            let (weights, gradient, workspace) = (&self.weights, &mut self.gradient, &mut self.workspace);
            let losses = self
                .model
                .forward_backward(weights, gradient, workspace, tokens, scale, &abort);
            loss += losses.map_err(failed)?.iter().sum::<f64>();
        }
        self.update().map_err(failed)?;
        Ok((began.elapsed().as_secs_f64() * 1e3, loss / self.tokens_per_step as f64))
    }

    fn update(&mut self) -> Result<(), DeviceError> {
        let (layout, optimizer) = (&self.layout, &self.config.optimizer);
        let (device, stream) = (self.device, self.workspace.stream());
        let (block_elements, count) = (layout.block_elements(), layout.block_count());
        let mut sums = vec![0.0_f64; count];
        device.square_sums(stream, View::from(&self.gradient), block_elements, &mut sums)?;
        let norm = sums.iter().sum::<f64>().sqrt();
        self.steps += 1;
        let decays = |block: &usize| layout.block_decays(BlockIndex(*block as u32));
        let decaying = (0..count).take_while(decays).count();
        for (run, weight_decay) in [(0..decaying, optimizer.weight_decay), (decaying..count, 0.0)] {
            let call = AdamwStep {
                learning_rate: optimizer.learning_rate,
                beta1: optimizer.beta1,
                beta2: optimizer.beta2,
                eps: optimizer.eps,
                weight_decay,
                gradient_scale: (optimizer.clip_norm / norm.max(optimizer.clip_norm)) as f32,
                step: self.steps,
            };
            let blocks = Blocks {
                first: BlockIndex(run.start as u32),
                block_elements,
            };
            let at = run.start * block_elements;
            let [master, first, second] = &mut self.state;
            let state = OptimizerState {
                master: ViewMut::at(master, at),
                first_moment: ViewMut::at(first, at),
                second_moment: ViewMut::at(second, at),
            };
            let (gradient, weights) = (View::at(&self.gradient, at), Some(ViewMut::at(&mut self.weights, at)));
            device.adamw(stream, &call, blocks, gradient, state, weights, &mut self.hashes[run])?;
        }
        device.synchronize(stream)
    }
}

/// Ids of one micro-batch, runs of `context + 1`; others for each.
fn random_ids(config: &Config, sequences: usize, number: usize) -> Vec<u32> {
    let mut state = number as u64 + 1;
    let mut next = || {
        // As `timing`'s numbers: a linear congruential generator, of whose state the upper bits count.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((state >> 33) % config.model.vocabulary as u64) as u32
    };
    (0..sequences * (config.model.context + 1)).map(|_| next()).collect()
}

/// What the script says first.
#[derive(Debug, Deserialize)]
struct Ready {
    /// PyTorch's version.
    ready: String,
    parameters: u64,
    tokens_per_step: u64,
}

/// And of each step.
#[derive(Debug, Deserialize)]
struct Step {
    seconds: f64,
    loss: f64,
}

/// The script, running; ended with this.
struct Peer {
    child: Child,
    commands: Option<ChildStdin>,
    /// Its lines, as a thread reads them.
    answers: Receiver<String>,
    ready: Ready,
}

/// How long an answer may take: the first step compiles.
const ANSWER_WITHIN: Duration = Duration::from_secs(600);
/// How long it may take to end when its input does.
const END_WITHIN: Duration = Duration::from_secs(5);

/// Reads lines until there are no more.
fn lines_of(out: ChildStdout) -> Receiver<String> {
    let (to, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let read = BufReader::new(out).lines().map_while(Result::ok);
        read.take_while(|line| to.send(line.clone()).is_ok()).for_each(drop);
    });
    lines
}

impl Peer {
    fn start(python: &Path, script: &Path, config: &Path, sizes: &Sizes) -> Result<Self, CheckFailed> {
        let cannot = |e: std::io::Error| failed(format!("{}: {e}", python.display()));
        let mut command = Command::new(python);
        if let Some(visible) = &sizes.visible {
            command.env(VISIBLE_VARIABLE, visible);
        }
        let mut child = command
            .arg(script)
            .arg(config)
            .arg(sizes.micro_batches.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(cannot)?;
        let commands = child.stdin.take();
        let Some(out) = child.stdout.take() else {
            return Err(failed("the peer has no output"));
        };
        let ready = Ready {
            ready: String::new(),
            parameters: 0,
            tokens_per_step: 0,
        };
        let mut peer = Self {
            child,
            commands,
            answers: lines_of(out),
            ready,
        };
        peer.ask()?;
        Ok(peer)
    }

    /// What it says of itself, and its first step, which it was asked for when it began.
    fn first(&mut self) -> Result<Step, CheckFailed> {
        self.ready = self.answer()?;
        self.answer()
    }

    fn step(&mut self) -> Result<Step, CheckFailed> {
        self.ask()?;
        self.answer()
    }

    /// Asks for a step.
    fn ask(&mut self) -> Result<(), CheckFailed> {
        let gone = |e: std::io::Error| failed(format!("the peer is gone: {e}"));
        let Some(commands) = &mut self.commands else {
            return Ok(());
        };
        let written = commands.write_all(b"step\n").and_then(|()| commands.flush());
        written.map_err(gone)
    }

    fn answer<T: for<'de> Deserialize<'de>>(&mut self) -> Result<T, CheckFailed> {
        let line = self.answers.recv_timeout(ANSWER_WITHIN).map_err(|error| {
            failed(match error {
                RecvTimeoutError::Timeout => format!("the peer said nothing for {} s", ANSWER_WITHIN.as_secs()),
                RecvTimeoutError::Disconnected => {
                    "the peer ended early; its own words stand on standard error".to_owned()
                }
            })
        })?;
        serde_json::from_str(&line).map_err(|e| failed(format!("the peer said {line:?} ({e})")))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // End of input ends the script; one that does not listen is ended.
        self.commands = None;
        let until = Instant::now() + END_WITHIN;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tarazed_kernels::cuda::recording::RecordingDriver;

    const CONFIG: &str = "[run]\nname = \"bench\"\nseed = 7\nsteps = 3\n\
        [model]\nlayers = 1\nhidden = 16\nffn = 16\nheads = 2\nkv_heads = 1\ncontext = 8\nvocabulary = 300\ninit_std = 0.02\n\
        [batch]\nlanes = 2\nsequences_per_lane = 2\nmicro_batch_sequences = 2\n\
        [optimizer]\nlearning_rate = 1e-3\nschedule = { kind = \"constant\", warmup_steps = 2 }\nblock_elements = 1024\n\
        [data]\nheld_out_fraction = 0.1\n\
        [[data.domains]]\nname = \"web\"\npath = \"web.jsonl\"\nlanguage = \"en\"\nweight = 1.0\n";
    /// 2 x 300 x 16, a layer of 2 x 16² + 2 x 16 x 8 + 3 x 16 x 16 + 2 x 16, and a norm of 16.
    const PARAMETERS: usize = 9_600 + 512 + 256 + 768 + 32 + 16;

    /// A peer that speaks the script's words: the parameters and the loss that it is told.
    fn sizes(folder: &Path, peer: Option<(usize, &str)>) -> Sizes {
        let peer = peer.map(|(parameters, loss)| {
            let script = folder.join("peer.sh");
            let text = format!(
                "echo '{{\"ready\":\"0.0\",\"parameters\":{parameters},\"tokens_per_step\":48}}'\n\
                 while read line; do echo '{{\"seconds\":0.5,\"loss\":{loss}}}'; done\n"
            );
            std::fs::write(&script, text).expect("written");
            (PathBuf::from("/bin/sh"), script)
        });
        Sizes {
            micro_batches: 3,
            rounds: 2,
            peer,
            visible: None,
        }
    }

    fn measured(peer: Option<(usize, &str)>) -> Result<Value, CheckFailed> {
        let folder = tempfile::tempdir().expect("a folder");
        let config = folder.path().join("bench.toml");
        std::fs::write(&config, CONFIG).expect("written");
        let device = CudaDevice::new(RecordingDriver::new()).expect("a device");
        measure(&device, &sizes(folder.path(), peer), &config)
    }

    /// The recorder computes nothing: its loss is zero.
    #[test]
    fn both_sides_are_timed_and_set_against_each_other() {
        let report = measured(Some((PARAMETERS, "0.0"))).expect("runs");
        assert_eq!(
            (&report["parameters"], &report["tokens_per_step"]),
            (&json!(PARAMETERS), &json!(48))
        );
        assert_eq!(report["pytorch"]["ms_median"], 500.0);
        assert_eq!(report["pytorch"]["torch"], "0.0");
        let ours = report["ours"]["ms_median"].as_f64().expect("a time");
        assert_eq!(report["pytorch_time_over_ours"], 500.0 / ours);
        assert!(report["ours"]["mfu_percent"].is_null(), "no known peak: {report}");
        // Each operation of a step is in its profile: of three micro-batches, and one update in two runs of blocks.
        let operations = report["profile"]["operations"].as_array().expect("a list");
        let calls = |what: &str| {
            operations
                .iter()
                .find(|spent| spent["what"] == what)
                .map(|spent| &spent["calls"])
        };
        assert_eq!(calls("attention_32"), Some(&json!(3)), "{report}");
        assert_eq!(calls("adamw"), Some(&json!(2)), "{report}");
    }

    #[test]
    fn without_a_python_the_report_says_so() {
        let report = measured(None).expect("runs");
        assert!(
            report["ours"]["ms_median"].as_f64().is_some_and(|ms| ms > 0.0),
            "{report}"
        );
        assert!(
            report["pytorch"]
                .as_str()
                .is_some_and(|text| text.starts_with("not run")),
            "{report}"
        );
        assert!(report["pytorch_time_over_ours"].is_null(), "{report}");
    }

    #[test]
    fn another_model_is_not_compared_with() {
        let refused = measured(Some((PARAMETERS + 1, "0.0"))).expect_err("another size");
        assert!(refused.cause.contains("the peer has"), "{refused}");
        let refused = measured(Some((PARAMETERS, "5.7"))).expect_err("another loss");
        assert!(refused.cause.contains("not of the same model"), "{refused}");
        let refused = measured(Some((PARAMETERS, "nothing"))).expect_err("no number");
        assert!(refused.cause.contains("the peer said"), "{refused}");
        assert!(compare_losses(f64::NAN, None).is_err());
        assert!(compare_losses(5.7, Some(f64::NAN)).is_err());
    }
}
