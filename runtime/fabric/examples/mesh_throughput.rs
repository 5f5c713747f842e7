//! Measures the data plane: an all-reduce among processes, as the ranks of a step do it.
//!
//! `cargo run --release -p tarazed-fabric --example mesh_throughput -- [unix|tcp] [ranks] [MiB] [repetitions]`
//!
//! Each repetition sends every rank's part of a gradient to the part's owner (grouped send/receive), sums there in rank
//! order, and gathers the sums. The sum is this program's: the fabric moves bytes. Rank 0 prints the times of the
//! slowest rank in each repetition, the share of the sum, and the CPU time of one rank.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tarazed_domain::limits::Timeouts;
use tarazed_domain::{Generation, Rank};
use tarazed_fabric::{
    AbortHandle, Collective, FabricError, Listener, Receive, Send, SocketMesh, Tag, TagKind, Transport, connect_mesh,
};

type Failure = Box<dyn std::error::Error>;

const GENERATION: Generation = Generation(1);
const TOKEN: [u8; 32] = [7; 32];

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let text = |at: usize, otherwise: &str| arguments.get(at).map_or(otherwise, String::as_str).to_owned();
    let transport = text(0, "unix");
    let ranks: usize = text(1, "4").parse()?;
    let bytes: usize = text(2, "64").parse::<usize>()? * 1024 * 1024;
    let repetitions: usize = text(3, "20").parse()?;
    match arguments.get(4) {
        None => start(&transport, ranks, &arguments, bytes, repetitions),
        Some(rank) => work(&transport, Rank(rank.parse()?), ranks, bytes, repetitions),
    }
}

/// Starts one process per rank and hands all addresses to each.
fn start(transport: &str, ranks: usize, given: &[String], bytes: usize, repetitions: usize) -> Result<(), Failure> {
    let defaults = [
        transport.to_owned(),
        ranks.to_string(),
        (bytes >> 20).to_string(),
        repetitions.to_string(),
    ];
    let arguments: Vec<&String> = given.iter().chain(&defaults[given.len().min(4)..]).collect();
    let mut processes = Vec::new();
    let mut addresses = Vec::new();
    for rank in 0..ranks {
        let mut process = Command::new(std::env::current_exe()?)
            .args(&arguments)
            .arg(rank.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(process.stdout.take().ok_or("no output")?);
        let mut address = String::new();
        lines.read_line(&mut address)?;
        addresses.push(address.trim().to_owned());
        processes.push((process, lines));
    }
    for (process, _) in &mut processes {
        let mut input = process.stdin.take().ok_or("no input")?;
        writeln!(input, "{}", addresses.join(" "))?;
    }
    for (mut process, mut lines) in processes {
        std::io::copy(&mut lines, &mut std::io::stdout())?;
        if !process.wait()?.success() {
            return Err("a rank failed".into());
        }
    }
    Ok(())
}

/// One rank.
fn work(transport: &str, rank: Rank, ranks: usize, bytes: usize, repetitions: usize) -> Result<(), Failure> {
    let transport = match transport {
        "unix" => Transport::Unix {
            dir: std::env::temp_dir(),
        },
        "tcp" => Transport::Tcp {
            ip: "127.0.0.1".parse()?,
        },
        other => return Err(format!("no transport {other}; unix or tcp").into()),
    };
    let listener = Listener::bind(&transport)?;
    println!("{}", listener.address());
    let mut roster = String::new();
    std::io::stdin().read_line(&mut roster)?;
    let roster: Vec<String> = roster.split_whitespace().map(str::to_owned).collect();
    let timeouts = Timeouts::derive(30_000);
    let abort = AbortHandle::new(GENERATION)?;
    let mut mesh = connect_mesh(&listener, GENERATION, rank, &roster, TOKEN, &timeouts, &abort)?;

    let part = bytes / ranks / 4 * 4;
    let mut reduce = Reduce::new(rank, ranks, part);
    let mut times = Vec::new();
    for repetition in 0..repetitions + 2 {
        // So that all start together.
        mesh.all_gather(Tag::new(TagKind::Barrier, repetition as u64, 0), &[], &vec![0; ranks])?;
        let (total, sum) = reduce.run(&mut mesh, repetition as u64)?;
        let mine = [total.as_secs_f64().to_le_bytes(), sum.as_secs_f64().to_le_bytes()].concat();
        let all = mesh.all_gather(
            Tag::new(TagKind::Barrier, repetition as u64, 1),
            &mine,
            &vec![16; ranks],
        )?;
        let slowest = |at: usize| {
            let seconds = all
                .iter()
                .map(|one| f64::from_le_bytes(std::array::from_fn(|i| one[at + i])));
            seconds.fold(0.0, f64::max)
        };
        // The first two warm up memory and socket buffers.
        if repetition >= 2 {
            times.push((slowest(0) * 1e3, slowest(8) * 1e3));
        }
    }
    if rank == Rank(0) {
        report(&mut times, part * ranks, ranks);
    }
    mesh.leave();
    Ok(())
}

fn report(times: &mut [(f64, f64)], bytes: usize, ranks: usize) {
    times.sort_by(|a, b| a.0.total_cmp(&b.0));
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].0;
    let moved = 2 * bytes / ranks * (ranks - 1);
    println!(
        "{ranks} ranks, {} MiB: best {:.1} ms, median {:.1} ms, worst {:.1} ms (sum {:.1} ms); \
         {:.2} GB/s sent per rank, {:.2} GB/s by all",
        bytes >> 20,
        at(0.0),
        at(0.5),
        at(1.0),
        times[times.len() / 2].1,
        moved as f64 / at(0.5) / 1e6,
        (moved * ranks) as f64 / at(0.5) / 1e6,
    );
    println!(
        "CPU time of rank 0: {:.0} ms in {} repetitions",
        cpu_ms(),
        times.len() + 2
    );
}

fn cpu_ms() -> f64 {
    let text = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    text.split_whitespace()
        .next()
        .and_then(|nanoseconds| nanoseconds.parse::<f64>().ok())
        .unwrap_or(f64::NAN)
        / 1e6
}

/// The buffers of one rank: its gradient, what it receives of its part, and the result.
struct Reduce {
    rank: Rank,
    part: usize,
    gradient: Vec<u8>,
    received: Vec<Vec<u8>>,
    result: Vec<u8>,
    lengths: Vec<usize>,
}

impl Reduce {
    fn new(rank: Rank, ranks: usize, part: usize) -> Self {
        let gradient = (0..part * ranks / 4)
            .flat_map(|at| value(rank.index(), at).to_le_bytes())
            .collect();
        let received = (0..ranks).map(|_| vec![0; part]).collect();
        Self {
            rank,
            part,
            gradient,
            received,
            result: vec![0; part * ranks],
            lengths: vec![part; ranks],
        }
    }

    /// One all-reduce, checked; the whole time and the sum's.
    fn run(&mut self, mesh: &mut SocketMesh, step: u64) -> Result<(Duration, Duration), FabricError> {
        let start = Instant::now();
        let tag = Tag::new(TagKind::GradientPartial, step, 0);
        let (rank, part) = (self.rank.index(), self.part);
        let others = |count: usize| (1..count).map(move |distance| (rank + distance) % count);
        let sends: Vec<Send<'_>> = others(self.received.len())
            .map(|to| Send {
                to: Rank(to as u32),
                tag,
                bytes: &self.gradient[to * part..][..part],
            })
            .collect();
        let mut receives: Vec<Receive<'_>> = self
            .received
            .iter_mut()
            .enumerate()
            .filter(|(from, _)| *from != rank)
            .map(|(from, bytes)| Receive {
                from: Rank(from as u32),
                tag,
                bytes,
            })
            .collect();
        mesh.exchange(&sends, &mut receives)?;
        let sum_start = Instant::now();
        self.received[rank].copy_from_slice(&self.gradient[rank * part..][..part]);
        self.sum();
        let sum = sum_start.elapsed();
        let tag = Tag::new(TagKind::WorkingWeights, step, 0);
        mesh.all_gather_in_place(tag, &mut self.result, &self.lengths)?;
        let total = start.elapsed();
        self.verify();
        Ok((total, sum))
    }

    /// Adds all ranks' parts in rank order, into the own place of the result.
    fn sum(&mut self) {
        let own = &mut self.result[self.rank.index() * self.part..][..self.part];
        own.copy_from_slice(&self.received[0]);
        for part in &self.received[1..] {
            for (sum, term) in own.chunks_exact_mut(4).zip(part.chunks_exact(4)) {
                let total = float(sum) + float(term);
                sum.copy_from_slice(&total.to_le_bytes());
            }
        }
    }

    fn verify(&self) {
        let ranks = self.received.len();
        for at in (0..self.result.len() / 4).step_by(997) {
            let expected = (0..ranks).fold(0.0, |sum, rank| sum + value(rank, at));
            assert!(
                float(&self.result[at * 4..]).to_bits() == expected.to_bits(),
                "wrong sum at {at}"
            );
        }
    }
}

fn value(rank: usize, at: usize) -> f32 {
    ((at * 31 + rank * 7) % 1000) as f32
}

fn float(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}
