//! The device thread as its actor knows it: commands in, events out, with a real data plane of one rank.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Tensors, Wanted, config, feeder, member, plan};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
use tarazed_fabric::{Listener, Transport};
use tarazed_kernels::CpuDevice;
use tarazed_protocol::message::{BeginPlan, RestoreFrom, StateReport, StepLine};
use tarazed_train::StepError;
use tarazed_train::device_thread::{Command, DeviceEvents, DeviceThread, GenerationControl, Sockets};
use tarazed_train::generation::{Paused, ShardSource, ShardToSave};
use tarazed_train::state::RankState;

#[derive(Debug, PartialEq)]
enum Heard {
    /// A checkpoint shard is being read.
    Reading,
    Running(Generation, StepsCompleted),
    Save(Generation, StepsCompleted, usize),
    Paused(Generation, StepsCompleted),
    Report(Generation, StateReport),
    /// What must not happen here.
    Trouble(String),
}

struct Ear(Sender<Heard>);

impl Ear {
    fn hears(&self, heard: Heard) {
        self.0.send(heard).unwrap();
    }
}

impl DeviceEvents<CpuDevice> for Ear {
    fn running(&self, generation: Generation, base: StepsCompleted) {
        self.hears(Heard::Running(generation, base));
    }

    fn settled(&self, _: Generation, _: StepsCompleted, _: [u8; 16]) {}

    fn line(&self, _: Generation, line: StepLine) {
        self.hears(Heard::Trouble(format!("{line:?}")));
    }

    fn save(&self, generation: Generation, step: StepsCompleted, shards: Vec<ShardToSave<CpuDevice>>) {
        self.hears(Heard::Save(generation, step, shards.len()));
    }

    fn paused(&self, generation: Generation, paused: Paused) {
        self.hears(Heard::Paused(generation, paused.step));
    }

    fn failed(&self, _: Generation, error: &StepError) {
        self.hears(Heard::Trouble(error.to_string()));
    }

    fn report(&self, generation: Generation, report: StateReport) {
        self.hears(Heard::Report(generation, report));
    }

    fn broken(&self, error: &StepError) {
        self.hears(Heard::Trouble(error.to_string()));
    }
}

/// A store that never answers.
struct Silent(Sender<Heard>);

impl ShardSource for Silent {
    fn read(&self, _: &RestoreFrom, _: OptimizerShardIndex, abort: &AtomicBool) -> Result<Tensors, StepError> {
        self.0.send(Heard::Reading).unwrap();
        while !abort.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(StepError::Aborted)
    }
}

fn start() -> (Sender<Command>, Receiver<Heard>, String) {
    let (ear, heard) = channel();
    let (commands, inbox) = channel();
    let config = config();
    let listener = Listener::bind(&Transport::Tcp {
        ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
    })
    .unwrap();
    let address = listener.address();
    let thread = DeviceThread {
        state: RankState::new(Arc::clone(&config), CpuDevice::new(), Arc::default()).unwrap(),
        member: member(0),
        data_plane: Box::new(Sockets {
            listener,
            run_token: [1; 32],
        }),
        feeder: feeder(&config),
        source: Box::new(Silent(ear.clone())),
        events: Arc::new(Ear(ear)),
    };
    std::thread::spawn(move || thread.run(&inbox));
    (commands, heard, address)
}

/// A generation of this rank alone that saves its base and ends.
fn begin(generation: u64, base: u64, restore: Option<RestoreFrom>, address: &str) -> BeginPlan {
    let wanted = Wanted {
        generation,
        members: vec![member(0)],
        replicas: 1,
        last_step: base,
        acknowledged: base,
        restore,
        ..Wanted::default()
    };
    let mut plan = plan(&wanted, &BTreeMap::new());
    plan.addresses = std::iter::once(address).collect();
    plan.checkpoint_at_base = true;
    plan
}

fn next(heard: &Receiver<Heard>) -> Heard {
    heard
        .recv_timeout(Duration::from_secs(30))
        .expect("the device thread answers")
}

/// SUP-4: a fence during a restore whose store is silent is answered, and the rank lives on. What a generation saves
/// carries its own number, however new the fence is that its actor has heard of.
#[test]
fn a_fence_during_a_restore_is_answered_and_the_next_generation_begins() {
    let (commands, heard, address) = start();
    let from = RestoreFrom {
        step: StepsCompleted(3),
        manifest_key: "manifests/3".to_owned(),
        length: 1,
        blake3: [0; 32],
    };
    let control = GenerationControl::new(Generation(4)).unwrap();
    let restoring = Command::Begin {
        plan: Box::new(begin(4, 3, Some(from), &address)),
        control: control.clone(),
    };
    commands.send(restoring).unwrap();
    assert_eq!(next(&heard), Heard::Reading);

    control.abort();
    let generation = Generation(5);
    commands.send(Command::Report { generation }).unwrap();
    assert_eq!(next(&heard), Heard::Report(generation, StateReport::default()));

    let plan = begin(7, 0, None, &address);
    let shards = plan.shards.shard_count();
    let control = GenerationControl::new(plan.generation).unwrap();
    let plan = Box::new(plan);
    commands.send(Command::Begin { plan, control }).unwrap();
    let (generation, base) = (Generation(7), StepsCompleted(0));
    assert_eq!(next(&heard), Heard::Running(generation, base));
    assert_eq!(next(&heard), Heard::Save(generation, base, shards));
    assert_eq!(next(&heard), Heard::Paused(generation, base));
    commands.send(Command::Exit).unwrap();
}
