//! What fault tolerance costs: a step with replicas against one with a single copy of each optimizer shard, and the parts
//! that both have.
//!
//! Replicas can be switched off (`optimizer.replicas = 1`): no forwarding of reduced gradients, no second update, nothing to
//! compare. Block hashes and the barrier cannot, as the trace needs both. So the hashes are timed by themselves, as all
//! ranks make them at once over what each holds, and the barrier by the run's own clock of its phases, waiting for the
//! slowest rank included. An update hashes each block in the pass that updates it, while it lies in the cache: what counts is
//! what a further hash of a block costs right after a first one, and not the way from memory.
//!
//! The whole cost is one ratio, by round: a step with all of it over a step with none of it, that is the step with one
//! copy less the hashes of that copy, before and after the update, and its barrier. It is an upper bound: gradients would
//! have to be waited for without a barrier, too. Wall-clock time scatters by more than what is looked for where others share the machine, so the processor
//! time of all ranks, from the last step that does not count to the last of all, is compared as well: ranks keep all processors
//! busy, so it is what steps cost, less what they wait, and its whole ratio is that of replicas and hashes (the barrier's own
//! work is on both sides, and too little to be seen). It is read between steps, and divided by the steps between. Audits, one
//! lane computed twice each `fault.audit_interval_steps`, are on on both sides. All runs train on one data set, made before the first.

use anyhow::{Result, anyhow};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tarazed_domain::BlockIndex;
use tarazed_domain::config::Config;
use tarazed_kernels::{BlockHash, Blocks, CpuBuffer, CpuDevice, CpuStream, Device, Precision, View};
use tarazed_tests::figures::{Figures, Summary};
use tarazed_tests::harness::{Project, Run};

/// Steps at the start of a run that do not count.
const WARM_UP_STEPS: u64 = 5;
/// An update hashes what it reads and what it writes.
const HASHES_PER_UPDATE: f64 = 2.0;
/// Steps that a run would go on for after those that count.
const MORE_STEPS: u64 = 1_000;
/// The kernel tells processor time in hundredths of a second (proc(5)).
const MS_PER_TICK: f64 = 10.0;
/// Between looks at the trace.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Hashes of a block on top of the first, which finds it in memory.
const MORE_HASHES: usize = 4;
/// Times that the hashes are made in each round.
const HASH_TURNS: usize = 15;

struct Side {
    step_ms: f64,
    /// Processor time of all ranks, per step.
    cpu_ms: f64,
    barrier_ms: f64,
}

pub fn measure(config: &Path, ranks: u32, rounds: usize, steps: u64) -> Result<Figures> {
    let project = Project::of(config);
    let data = prepared(&project);
    let loaded = Config::load(config, &[])?;
    let mut seen = Rounds {
        ranks,
        ..Rounds::default()
    };
    for round in 0..rounds {
        let side = |replicas: u32| run(&project, &data, ranks, steps, replicas, round);
        // The order alternates, so that neither side always meets the warmer machine.
        let (on, off) = if round.is_multiple_of(2) {
            let on = side(2);
            (on, side(1))
        } else {
            let off = side(1);
            (side(2), off)
        };
        seen.add(&on, &off, hash_ms(&loaded, ranks, 1)?, hash_ms(&loaded, ranks, 2)?);
    }
    Ok(seen.report())
}

/// What each round gave.
#[derive(Default)]
struct Rounds {
    ranks: u32,
    on_ms: Vec<f64>,
    off_ms: Vec<f64>,
    barrier_ms: Vec<f64>,
    hash_one_ms: Vec<f64>,
    hash_two_ms: Vec<f64>,
    /// With replicas over without.
    ratios: Vec<f64>,
    /// With everything over nothing.
    whole: Vec<f64>,
    /// The same by processor time.
    cpu_ratios: Vec<f64>,
    whole_cpu: Vec<f64>,
}

impl Rounds {
    fn add(&mut self, on: &Side, off: &Side, hash_one_ms: f64, hash_two_ms: f64) {
        let ratio = on.step_ms / off.step_ms;
        let whole = on.step_ms / (off.step_ms - HASHES_PER_UPDATE * hash_one_ms - off.barrier_ms);
        // The hashes of one copy, made by all ranks at once, keep so many processors busy.
        let processors = std::thread::available_parallelism()
            .map_or(1, |count| count.get())
            .min(self.ranks as usize) as f64;
        let hashes_cpu_ms = HASHES_PER_UPDATE * hash_one_ms * processors;
        let (cpu_ratio, whole_cpu) = (on.cpu_ms / off.cpu_ms, on.cpu_ms / (off.cpu_ms - hashes_cpu_ms));
        self.cpu_ratios.push(cpu_ratio);
        self.whole_cpu.push(whole_cpu);
        self.on_ms.push(on.step_ms);
        self.off_ms.push(off.step_ms);
        self.barrier_ms.push(off.barrier_ms);
        self.hash_one_ms.push(hash_one_ms);
        self.hash_two_ms.push(hash_two_ms);
        self.ratios.push(ratio);
        self.whole.push(whole);
        println!(
            "round {}: {:.1} ms with replicas, {:.1} ms without, ratio {ratio:.4}; hashes {hash_one_ms:.2} ms and barrier \
             {:.2} ms of the latter, whole ratio {whole:.4}; processor time {:.1} and {:.1} ms, ratio {cpu_ratio:.4}, \
             whole {whole_cpu:.4}",
            self.whole.len(),
            on.step_ms,
            off.step_ms,
            off.barrier_ms,
            on.cpu_ms,
            off.cpu_ms,
        );
    }

    fn report(&self) -> Figures {
        let (on, off) = (Summary::of(&self.on_ms), Summary::of(&self.off_ms));
        let (ratio, barrier) = (Summary::of(&self.ratios), Summary::of(&self.barrier_ms));
        let (hash_one, hash_two) = (Summary::of(&self.hash_one_ms), Summary::of(&self.hash_two_ms));
        let whole = Summary::of(&self.whole);
        let share = |ms: f64| 100.0 * ms / off.median;
        println!("step with replicas     {on} ms");
        println!("step without           {off} ms");
        println!("ratio                  {ratio}");
        println!(
            "hashes of one copy     {hash_one} ms, {:.2}% of a step without",
            share(hash_one.median)
        );
        println!("hashes of two copies   {hash_two} ms");
        println!(
            "barrier                {barrier} ms, {:.2}% of a step without, waiting included",
            share(barrier.median)
        );
        println!(
            "fault tolerance, whole {whole}: a step with all of it costs {:+.1}%, {:+.1}% to {:+.1}% by round",
            percent(whole.median),
            percent(whole.least),
            percent(whole.most)
        );
        let (cpu_ratio, whole_cpu) = (Summary::of(&self.cpu_ratios), Summary::of(&self.whole_cpu));
        println!(
            "by processor time      {whole_cpu}: {:+.1}%, {:+.1}% to {:+.1}% by round; replicas alone {:+.1}%",
            percent(whole_cpu.median),
            percent(whole_cpu.least),
            percent(whole_cpu.most),
            percent(cpu_ratio.median),
        );
        Figures::new("overhead")
            .number("whole_cpu_percent", percent(whole_cpu.median))
            .summary("cpu_ratio", cpu_ratio)
            .summary("whole_cpu_ratio", whole_cpu)
            .number("hash_percent", share(hash_one.median))
            .number("barrier_percent", share(barrier.median))
            .number("whole_percent", percent(whole.median))
            .summary("with_replicas_ms", on)
            .summary("without_replicas_ms", off)
            .summary("ratio", ratio)
            .summary("hash_one_copy_ms", hash_one)
            .summary("hash_two_copies_ms", hash_two)
            .summary("barrier_ms", barrier)
            .summary("whole_ratio", whole)
    }
}

/// What a ratio adds, in percent.
fn percent(ratio: f64) -> f64 {
    100.0 * (ratio - 1.0)
}

/// The data folder that all runs share.
fn prepared(project: &Project) -> PathBuf {
    let first = project.train("data").ranks(1).steps(1).complete();
    first.dir().join("data")
}

fn run(project: &Project, data: &Path, ranks: u32, steps: u64, replicas: u32, round: usize) -> Side {
    let name = format!("replicas-{replicas}-{round}");
    let folder = project.run_dir(&name);
    std::fs::create_dir_all(&folder).expect("a run folder");
    std::os::unix::fs::symlink(data, folder.join("data")).expect("a link to the data");
    let train = project
        .train(&name)
        .ranks(ranks)
        // The ranks must live when their time is read: the run is ended as it is dropped.
        .set("run.steps", &(steps + MORE_STEPS).to_string())
        .set("optimizer.replicas", &replicas.to_string())
        .set("mixture.controller", "static")
        .set("evaluation.interval_steps", "0")
        .set("checkpoint.interval_steps", "0");
    let mut run = Run::start(&train);
    let (first_step, first_ms) = spent(&mut run, WARM_UP_STEPS);
    let (last_step, last_ms) = spent(&mut run, steps);
    let cpu_ms = (last_ms - first_ms) / (last_step - first_step) as f64;
    let metrics = run.json_lines("metrics.jsonl");
    let counted = metrics
        .iter()
        .filter(|line| (WARM_UP_STEPS + 1..=steps).contains(&line["step"].as_u64().unwrap_or_default()));
    let (mut step_ms, mut barrier_ms) = (Vec::new(), Vec::new());
    for line in counted {
        step_ms.extend(line["step_ms"].as_f64());
        barrier_ms.extend(line["phase_ms"]["barrier"].as_f64());
    }
    Side {
        step_ms: Summary::of(&step_ms).median,
        cpu_ms,
        barrier_ms: Summary::of(&barrier_ms).median,
    }
}

/// Processor time of all ranks as soon as this step, or one after it, is committed, and which one that was.
fn spent(run: &mut Run, step: u64) -> (u64, f64) {
    loop {
        assert!(run.ended().is_none(), "the run ended before step {step}");
        let reached = run.step();
        if reached >= step {
            return (reached, run.processes().ticks() as f64 * MS_PER_TICK);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// A hash of all that `ranks` ranks hold, each on a thread, all at once, of blocks that are in the cache already: how much
/// longer passes take that hash each block some times more, from the first thread to the last. They share the processors as
/// the ranks of a run do.
fn hash_ms(config: &Config, ranks: u32, copies: usize) -> Result<f64> {
    let layout = tarazed_model::parameter_layout(&config.model, config.optimizer.block_elements);
    let block_count = (copies * layout.block_count()).div_ceil(ranks as usize);
    let mut held = (0..ranks)
        .map(|_| Held::new(layout.block_elements(), block_count))
        .collect::<Result<Vec<_>>>()?;
    let mut added_ms = Vec::new();
    for _ in 0..HASH_TURNS {
        let once_ms = pass_ms(&mut held, 1)?;
        added_ms.push((pass_ms(&mut held, 1 + MORE_HASHES)? - once_ms) / MORE_HASHES as f64);
    }
    Ok(Summary::of(&added_ms).median)
}

/// One pass over all that is held, which hashes each block so many times.
fn pass_ms(held: &mut [Held], times: usize) -> Result<f64> {
    let began = Instant::now();
    let hashed: Vec<Result<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = held
            .iter_mut()
            .map(|held| scope.spawn(move || held.hash(times)))
            .collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended
            .map(|ended| ended.unwrap_or_else(|_| Err(anyhow!("a thread that hashes panicked"))))
            .collect()
    });
    hashed.into_iter().collect::<Result<()>>()?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// What one rank holds: a share of the copies of the state.
struct Held {
    device: CpuDevice,
    stream: CpuStream,
    /// Master weights and both moments.
    state: [CpuBuffer; 3],
    block_elements: usize,
    hashes: Vec<BlockHash>,
}

impl Held {
    fn new(block_elements: usize, block_count: usize) -> Result<Self> {
        let device = CpuDevice::new();
        // Written to: memory that is only asked for is one page of zeros, however large.
        let alloc = |value: f32| -> Result<CpuBuffer> {
            let mut tensor = device.alloc(block_count * block_elements, Precision::Full)?;
            tensor.fill(value);
            Ok(tensor)
        };
        Ok(Self {
            device,
            stream: device.stream()?,
            state: [alloc(1.0)?, alloc(2.0)?, alloc(3.0)?],
            block_elements,
            hashes: vec![BlockHash::default(); block_count],
        })
    }

    fn hash(&mut self, times: usize) -> Result<()> {
        for (index, hash) in self.hashes.iter_mut().enumerate() {
            let blocks = Blocks {
                first: BlockIndex(index as u32),
                block_elements: self.block_elements,
            };
            let offset = index * self.block_elements;
            let [master, first, second] = self.state.each_ref().map(|tensor| View::at(tensor, offset));
            for _ in 0..times {
                let hash = std::slice::from_mut(hash);
                self.device
                    .block_hashes(&mut self.stream, blocks, master, first, second, hash)?;
            }
        }
        Ok(())
    }
}
