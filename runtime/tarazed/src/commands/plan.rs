//! `tarazed plan`: what a config needs. Reads the config and this machine's size, or asks its GPUs' driver; trains and writes
//! nothing.

use crate::exit::{Exit, Failure};
use crate::output::{print, print_json};
use crate::plan::{self, Hardware, render};
use std::fmt::Display;
use std::path::PathBuf;
use tarazed_actors::rank::DeviceChoice;
use tarazed_domain::config::Config;

/// Options of `tarazed plan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Config file.
    config: PathBuf,
    /// Override a key, e.g. --set batch.lanes=16.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// GPUs to plan for, e.g. 64xH200-141GB. Where it is absent: this machine's own GPUs if cluster.device asks for them,
    /// else its processors.
    #[arg(long, value_name = "COUNTxNAME-MEMORYGB")]
    gpus: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command. A plan that does not fit is an answer, not a failure.
///
/// # Errors
/// Refused where the config or the hardware cannot be read.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    let config = Config::load(&args.config, &args.set)?;
    let hardware = match &args.gpus {
        Some(text) => text
            .parse()
            .map_err(|error| Failure::refused("--gpus", error, "or leave it out to plan for this machine"))?,
        None => this_machine(&config)?,
    };
    let plan = plan::plan(&config, &hardware)?;
    if args.json {
        print_json(&plan)?;
    } else {
        print(&render::text(&plan))?;
    }
    Ok(Exit::Done)
}

/// What the config's ranks would compute on here. A plan for other hardware than they ask for would be of no use to
/// anybody, so without a GPU there is none.
fn this_machine(config: &Config) -> Result<Hardware, Failure> {
    match DeviceChoice::of(config) {
        Ok(DeviceChoice::Cpu) => processors(),
        #[cfg(feature = "cuda")]
        Ok(DeviceChoice::Cuda { count }) => {
            let facts = tarazed_kernels::cuda::real::probe(0).map_err(|absence| no_gpu(config, &absence))?;
            own_gpus(config, count, &facts.name, facts.memory_bytes as u64)
        }
        Err(refused) => Err(no_gpu(config, &refused.cause)),
    }
}

fn no_gpu(config: &Config, cause: &dyn Display) -> Failure {
    let cause = format!("asks for GPUs, and this machine has none to plan for ({cause})");
    Failure::refused("cluster.device", cause, other_gpus(config))
}

fn other_gpus(config: &Config) -> String {
    format!("name what to plan for, e.g. --gpus {}xH200-141GB", config.cluster.ranks)
}

/// One of this machine's GPUs for each rank: ranks that share one are not planned for.
#[cfg(any(feature = "cuda", test))]
fn own_gpus(config: &Config, count: u32, product: &str, memory_bytes: u64) -> Result<Hardware, Failure> {
    let ranks = config.cluster.ranks;
    if ranks > count {
        let cause = format!("{ranks} ranks need a GPU each, and this machine has {count} x {product}");
        return Err(Failure::refused("cluster.ranks", cause, other_gpus(config)));
    }
    Hardware::of_product(ranks, product, memory_bytes).ok_or_else(|| {
        let cause = format!("the rates of this machine's {product} are not known");
        Failure::refused("cluster.device", cause, other_gpus(config))
    })
}

fn processors() -> Result<Hardware, Failure> {
    let cores = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
    let remedy = "name GPUs with --gpus, e.g. 64xH200-141GB";
    let text = std::fs::read_to_string("/proc/meminfo")
        .map_err(|e| Failure::refused("/proc/meminfo", format!("cannot be read ({e})"), remedy))?;
    let memory_bytes =
        memory_total_bytes(&text).ok_or_else(|| Failure::refused("/proc/meminfo", "names no total memory", remedy))?;
    Ok(Hardware::Cpu { cores, memory_bytes })
}

fn memory_total_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn total_memory_is_read() {
        let text = "MemTotal:       24618812 kB\nMemFree:        1 kB\n";
        assert_eq!(memory_total_bytes(text), Some(24_618_812 * 1024));
        assert_eq!(memory_total_bytes("MemFree: 1 kB\n"), None);
    }

    fn shipped(name: &str) -> Config {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/").to_owned() + name;
        Config::load(path.as_ref(), &[]).expect("a good config")
    }

    /// A rank has a GPU of this machine for itself, and its rates are known, or nothing is predicted.
    #[test]
    fn this_machines_gpus_are_planned_for_where_they_are_enough() {
        let (h100, memory_bytes) = ("NVIDIA H100 80GB HBM3", 85_029_158_912);
        let small = shipped("gpu-124m.toml");
        let own = own_gpus(&small, 8, h100, memory_bytes).expect("enough of them");
        let one: Hardware = "1xH100-80GB".parse().expect("good hardware");
        let (Hardware::Gpu { count, name, .. }, Hardware::Gpu { name: known, .. }) = (&own, &one) else {
            panic!("{own:?} and {one:?} are GPUs");
        };
        assert_eq!((*count, name), (1, known));
        assert!(plan::plan(&small, &own).expect("a plan").fits);
        for (config, product, cause) in [
            (
                shipped("aquila2-70b.toml"),
                h100,
                "cluster.ranks: 264 ranks need a GPU each",
            ),
            (
                small,
                "NVIDIA H100 PCIe",
                "cluster.device: the rates of this machine's NVIDIA H100 PCIe",
            ),
        ] {
            let refused = own_gpus(&config, 8, product, memory_bytes).expect_err(product);
            assert_eq!(refused.exit, Exit::Refused);
            let remedy = format!("e.g. --gpus {}xH200-141GB", config.cluster.ranks);
            assert!(
                refused.message.starts_with(cause) && refused.message.ends_with(&remedy),
                "{}",
                refused.message
            );
        }
    }
}
