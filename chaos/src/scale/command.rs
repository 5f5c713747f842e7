//! `tarazed-chaos scale`: one large world in detail, and the figure of goodput against the time between failures.

use super::causes::CAUSES;
use super::cost::RANKS_PER_HOST;
use super::fleet::Layout;
use super::ledger::{CHARGE_ADMISSION, CHARGE_START, CHARGES};
use super::report::Report;
use super::setup::Setup;
use super::{figure, run, sweep};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tarazed_domain::limits::{CONTROL_MESSAGE_BYTES_MAX, LANES_MAX, RANKS_MAX, Timeouts};

const MS_PER_DAY: f64 = 86_400_000.0;
/// Simulated days, a century.
const DAYS_MAX: f64 = 36_500.0;

/// What to simulate.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Worker slots, a multiple of eight.
    #[arg(long, default_value_t = 100_000)]
    ranks: u32,
    /// Simulated days.
    #[arg(long, default_value_t = 54.0)]
    days: f64,
    /// Seed of the failures.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Copies of each optimizer shard; with one, each loss means a restore.
    #[arg(long, default_value_t = 2)]
    replicas: u32,
    /// How worker slots lie on hosts.
    #[arg(long, value_enum, default_value_t = Layout::Packed)]
    layout: Layout,
    /// Published failure rates are multiplied by this.
    #[arg(long, default_value_t = 1.0)]
    rate_factor: f64,
    /// `fault.timeout_ms`, from which all timeouts derive.
    #[arg(long, default_value_t = 20_000)]
    timeout_ms: u64,
    /// Hosts that stand by; a fiftieth of all by default, at least 64.
    #[arg(long)]
    spare_hosts: Option<u32>,
    /// A step while all ranks are there.
    #[arg(long, default_value_t = 5_000)]
    step_ms: u64,
    /// The run stands still for a checkpoint.
    #[arg(long, default_value_t = 500)]
    snapshot_ms: u64,
    /// From there until it is whole in the store.
    #[arg(long, default_value_t = 30_000)]
    upload_ms: u64,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
    /// Also writes the figure of goodput against the time between failures, as SVG.
    #[arg(long)]
    figure: Option<PathBuf>,
    /// Points measured on real runs for the figure: CSV lines of mtbf_s,goodput,source.
    #[arg(long, default_value = "docs/figures/measured.csv")]
    measured: PathBuf,
}

impl Args {
    fn setup(&self) -> Result<Setup, String> {
        let horizon_ms = self.days * MS_PER_DAY;
        if !(1.0..MS_PER_DAY * DAYS_MAX).contains(&horizon_ms) {
            return Err(format!("{} days cannot be simulated", self.days));
        }
        let mut setup = Setup::new(self.ranks, horizon_ms as u64, self.seed);
        setup.rate_factor = self.rate_factor;
        setup.spare_hosts = self.spare_hosts.unwrap_or(setup.spare_hosts);
        setup.protection.replicas = self.replicas;
        setup.protection.layout = self.layout;
        setup.protection.snapshot_ms = self.snapshot_ms;
        setup.protection.upload_ms = self.upload_ms;
        setup.cost.step_ms = self.step_ms;
        setup.cost.timeouts = Timeouts::derive(self.timeout_ms);
        Ok(setup)
    }
}

/// Carries it out; the exit code is 1 where something went wrong in the world, 2 where there is none.
#[must_use]
pub fn run_command(args: &Args) -> ExitCode {
    match carry_out(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

fn carry_out(args: &Args) -> Result<bool, String> {
    let began = Instant::now();
    let setup = args.setup()?;
    let drawn = args.figure.as_ref().map(|_| figure::read_measured(&args.measured));
    let measured = drawn.transpose()?.unwrap_or_default();
    // The figure's many small worlds run beside the large one.
    let (report, points, wall) = std::thread::scope(|scope| {
        let sweep = args
            .figure
            .as_ref()
            .map(|_| scope.spawn(|| sweep::sweep(setup.seed, &setup.cost)));
        let report = run(setup.clone());
        let wall = began.elapsed();
        let points = match sweep.map(std::thread::ScopedJoinHandle::join) {
            None => Ok(Vec::new()),
            Some(Ok(points)) => points,
            Some(Err(_)) => Err("the sweep panicked".to_owned()),
        };
        (report, points, wall)
    });
    let (report, points) = (report?, points?);
    if args.json {
        println!("{}", to_json(&report, wall));
    } else {
        print!("{}", to_table(&report, wall));
    }
    if let Some(path) = &args.figure {
        let svg = figure::draw(&report, &points, &measured);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        }
        std::fs::write(path, svg).map_err(|e| format!("{}: {e}", path.display()))?;
        if !args.json {
            let seconds = began.elapsed().as_secs_f64();
            println!(
                "figure: {}, {} points, {seconds:.1} s with it",
                path.display(),
                points.len()
            );
        }
    }
    Ok(report.failure.is_none())
}

/// The most memory this process ever held (bytes), where the system says so.
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// What one line of the table says.
struct Row {
    name: &'static str,
    faults: u64,
    hung: u64,
    struck: u64,
    detected_s: Option<f64>,
    recovered_s: Option<f64>,
    restores: u64,
    down_s: f64,
    partial_s: f64,
    replayed_s: f64,
}

fn mean_s(times: impl Iterator<Item = u64>) -> Option<f64> {
    let (mut count, mut sum) = (0_u64, 0_u64);
    for time_ms in times {
        (count, sum) = (count + 1, sum + time_ms);
    }
    (count > 0).then(|| sum as f64 / count as f64 / 1e3)
}

fn rows(report: &Report) -> Vec<Row> {
    (0..CHARGES)
        .map(|at| {
            let faults = || report.tally.faults.iter().filter(move |fault| fault.cause == at);
            let charged = report.ledger.charged[at];
            Row {
                name: match at {
                    CHARGE_START => "start of the run",
                    CHARGE_ADMISSION => "admitting replacements",
                    _ => CAUSES[at].name,
                },
                faults: faults().count() as u64,
                hung: faults().filter(|fault| fault.seen == super::causes::Seen::Hang).count() as u64,
                struck: faults().map(|fault| fault.struck as u64).sum(),
                detected_s: mean_s(faults().filter_map(|fault| fault.detected_ms)),
                recovered_s: mean_s(faults().filter_map(|fault| fault.recovered_ms)),
                restores: report.tally.restores[at],
                down_s: charged.down_ms as f64 / 1e3,
                partial_s: charged.partial_ms as f64 / 1e3,
                replayed_s: charged.replayed_ms as f64 / 1e3,
            }
        })
        .collect()
}

/// What the product of today would refuse or not carry.
fn limits(report: &Report) -> Vec<String> {
    let mut limits = Vec::new();
    let (ranks, lanes) = (
        report.setup.ranks,
        report.setup.ranks * report.setup.cost.lanes_per_rank,
    );
    if ranks > RANKS_MAX {
        limits.push(format!("{ranks} ranks: the config refuses more than {RANKS_MAX}"));
    }
    if lanes > LANES_MAX {
        limits.push(format!("{lanes} lanes: the config refuses more than {LANES_MAX}"));
    }
    if report.plan_bytes > CONTROL_MESSAGE_BYTES_MAX as f64 {
        limits.push(format!(
            "a plan has {:.1} MiB encoded: the control link refuses more than {} MiB",
            report.plan_bytes / f64::from(1 << 20),
            CONTROL_MESSAGE_BYTES_MAX >> 20
        ));
    }
    limits
}

fn to_json(report: &Report, wall: Duration) -> Value {
    let (setup, tally, ledger) = (&report.setup, &report.tally, &report.ledger);
    let causes: Vec<Value> = rows(report)
        .into_iter()
        .map(|row| {
            json!({
                "cause": row.name, "faults": row.faults, "hung": row.hung, "processes_struck": row.struck,
                "detection_mean_s": row.detected_s, "recovery_mean_s": row.recovered_s, "restores": row.restores,
                "down_s": row.down_s, "partial_s": row.partial_s, "replayed_s": row.replayed_s,
            })
        })
        .collect();
    let halts: Vec<Value> = tally
        .halts
        .iter()
        .map(|(_, code, diagnosis)| json!({"code": code, "diagnosis": diagnosis}))
        .collect();
    json!({
        "ranks": setup.ranks, "days": setup.horizon_ms as f64 / MS_PER_DAY, "seed": setup.seed,
        "replicas": setup.protection.replicas, "layout": format!("{:?}", setup.protection.layout).to_lowercase(),
        "spare_hosts": setup.spare_hosts, "checkpoint_every_steps": setup.every_steps(),
        "mtbf_expected_s": setup.mtbf_ms() / 1e3, "mtbf_drawn_s": report.mtbf_ms() / 1e3,
        "goodput": report.goodput(), "young_daly_goodput": setup.terms(report.plan_bytes).best_goodput(setup.mtbf_ms()),
        "steps": ledger.steps, "steps_lost": ledger.steps_lost, "steps_replayed": ledger.steps_replayed,
        "steps_finished_for_the_dead": tally.finished_steps, "disputes": tally.disputes, "convicted": tally.convicted,
        "useful_s": ledger.useful_ms as f64 / 1e3, "short_handed_s": ledger.short_handed_ms as f64 / 1e3,
        "snapshot_s": ledger.snapshot_ms as f64 / 1e3, "by_cause": causes,
        "generations": tally.generations, "pauses": tally.pauses, "shard_copies": tally.copies, "kills": tally.kills,
        "faults_that_struck_nothing": tally.struck_nothing, "starts_without_a_host": tally.waits_for_spare,
        "checkpoints_lost_in_upload": tally.saves_lost, "halts": halts,
        "machine_events": tally.events, "machine_effects": tally.effects, "plan_bytes": report.plan_bytes,
        "limits": limits(report), "digest": report.digest, "exit_code": report.exit_code, "failure": report.failure,
        "wall_s": wall.as_secs_f64(), "peak_memory_bytes": peak_memory_bytes(),
    })
}

fn to_table(report: &Report, wall: Duration) -> String {
    let (setup, tally, ledger) = (&report.setup, &report.tally, &report.ledger);
    let horizon_s = setup.horizon_ms as f64 / 1e3;
    let percent = |seconds: f64| 100.0 * seconds / horizon_s;
    let mut text = format!(
        "{} ranks on {} hosts and {} spares, {:?} layout, {} replicas, {:.1} days, seed {}; checkpoint every {} steps of {} s\n\n",
        setup.ranks,
        setup.ranks / RANKS_PER_HOST,
        setup.spare_hosts,
        setup.protection.layout,
        setup.protection.replicas,
        horizon_s / 86_400.0,
        setup.seed,
        setup.every_steps(),
        setup.cost.step_ms as f64 / 1e3,
    );
    text += &format!(
        "{:<24}{:>7}{:>6}{:>10}{:>11}{:>12}{:>10}{:>9}{:>9}{:>9}\n",
        "cause",
        "faults",
        "hung",
        "processes",
        "detected s",
        "recovered s",
        "restores",
        "down %",
        "partial%",
        "replay %"
    );
    let shown = |time: Option<f64>| time.map_or_else(|| "-".to_owned(), |time| format!("{time:.2}"));
    for row in rows(report) {
        text += &format!(
            "{:<24}{:>7}{:>6}{:>10}{:>11}{:>12}{:>10}{:>9.3}{:>9.3}{:>9.3}\n",
            row.name,
            row.faults,
            row.hung,
            row.struck,
            shown(row.detected_s),
            shown(row.recovered_s),
            row.restores,
            percent(row.down_s),
            percent(row.partial_s),
            percent(row.replayed_s),
        );
    }
    let snapshot = percent(ledger.snapshot_ms as f64 / 1e3);
    let short_handed = percent(ledger.short_handed_ms as f64 / 1e3);
    text += &format!(
        "\ngoodput {:.2} %; snapshots {snapshot:.3} %, slower steps while ranks are missing {short_handed:.3} %; \
         restoring after every failure, Young and Daly expect {:.2} %\n",
        100.0 * report.goodput(),
        100.0 * setup.terms(report.plan_bytes).best_goodput(setup.mtbf_ms()),
    );
    text += &format!(
        "steps: {} committed, each once; {} given up for a checkpoint, {} computed again; {} finished for the dead\n",
        ledger.steps, ledger.steps_lost, ledger.steps_replayed, tally.finished_steps
    );
    text += &format!(
        "time between failures {:.0} s drawn, {:.0} s expected; {} struck nothing, {} starts found no host, {} checkpoints \
         lost in upload, {} disputes, {} named for them, {} halts\n",
        report.mtbf_ms() / 1e3,
        setup.mtbf_ms() / 1e3,
        tally.struck_nothing,
        tally.waits_for_spare,
        tally.saves_lost,
        tally.disputes,
        tally.convicted,
        tally.halts.len(),
    );
    text += &format!(
        "machine: {} events, {} effects, {} generations, {} pauses, {} shard copies; wall {:.1} s, peak memory {}\n",
        tally.events,
        tally.effects,
        tally.generations,
        tally.pauses,
        tally.copies,
        wall.as_secs_f64(),
        peak_memory_bytes().map_or_else(|| "unknown".to_owned(), |bytes| format!("{} MiB", bytes >> 20)),
    );
    for limit in limits(report) {
        text += &format!("beyond today's product: {limit}\n");
    }
    text += &format!("ended with {:?}, digest {}\n", report.exit_code, report.digest);
    if let Some(failure) = &report.failure {
        text += &format!("FAILED: {failure}\n");
    }
    text
}
