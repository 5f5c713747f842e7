//! The emulator itself: kernels that are wrong on purpose (`kernels/cuda/emulator/faults.cu`), and what it says of each.
#![cfg(feature = "emulator")]
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use tarazed_kernels::cuda::driver::{Driver, DriverError};
use tarazed_kernels::cuda::emulated::EmulatedDriver;
use tarazed_kernels::cuda::table::{Access, Argument, Element, Entry, Kind, Launch, POINTWISE, Value};

/// Threads of the one block that is launched: two warps.
const THREADS: u32 = 64;
/// Dynamic shared memory that it has: 16 bytes a thread.
const SHARED_BYTES: u32 = 16 * THREADS;
/// Set in the process that is meant to fault.
const FAULT: &str = "TARAZED_TEST_FAULT";

static ARGUMENTS: [Argument; 1] = [Argument {
    name: "out",
    kind: Kind::Pointer {
        element: Element::F32,
        access: Access::Update,
        optional: false,
    },
    meaning: "[threads]",
}];

macro_rules! faults {
    ($($ident:ident = $name:literal),* $(,)?) => {
        $(static $ident: Entry = Entry {
            name: $name,
            source: &POINTWISE,
            arguments: &ARGUMENTS,
        };)*
    };
}

faults! {
    MISSED_BARRIER = "fault_missed_barrier",
    TWO_BARRIERS = "fault_two_barriers",
    HALF_WARP = "fault_half_warp",
    DIVERGENCE = "fault_divergence",
    UNWRITTEN = "fault_unwritten",
    RACE = "fault_race",
    NO_WAIT = "fault_no_wait",
    LEFT_COPY = "fault_left_copy",
    ALIGNMENT = "fault_alignment",
    BEYOND = "fault_beyond",
    UNKNOWN = "fault_that_there_is_not",
    GROUP_NONE = "fault_group_none",
    GROUP_UNPUBLISHED = "fault_group_unpublished",
    GROUP_UNFENCED = "fault_group_unfenced",
    GROUP_UNFINISHED = "fault_group_unfinished",
    GROUP_WEIGHTS = "fault_group_weights",
    GROUP_ONE_WARP = "fault_group_one_warp",
    GROUP_BASE = "fault_group_base",
    GROUP_EARLY = "fault_group_early",
}

fn driver() -> EmulatedDriver {
    EmulatedDriver::new(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap_or_else(|error| panic!("{error}"))
}

/// Runs one block; what it left, or what was wrong.
fn run(driver: &EmulatedDriver, entry: &'static Entry) -> Result<Vec<f32>, DriverError> {
    run_block(driver, entry, THREADS, SHARED_BYTES)
}

fn run_block(
    driver: &EmulatedDriver,
    entry: &'static Entry,
    threads: u32,
    shared_bytes: u32,
) -> Result<Vec<f32>, DriverError> {
    let stream = driver.create_stream()?;
    let bytes = threads as usize * size_of::<f32>();
    let (out, host) = (driver.alloc(bytes)?, driver.alloc_pinned(bytes)?);
    let launch = Launch {
        entry,
        grid: [1, 1, 1],
        block: [threads, 1, 1],
        shared_bytes,
    };
    let kernel = driver.load(entry)?;
    // SAFETY: both ranges have that many bytes, and are given back when the driver is.
    unsafe {
        driver.set_bytes(stream, out, 0, bytes)?;
        driver.launch(stream, kernel, &launch, &[Value::Pointer(out.0)])?;
        driver.copy_to_host(stream, host.as_ptr(), out, bytes)?;
        Ok(std::slice::from_raw_parts(host.as_ptr().cast::<f32>(), threads as usize).to_vec())
    }
}

#[test]
fn threads_that_do_not_meet_are_an_error() {
    let driver = driver();
    for (entry, expected) in [
        (&MISSED_BARRIER, "32 of 64 threads ended, 32 wait at a barrier"),
        (&TWO_BARRIERS, "meets one at faults.cu"),
        (&HALF_WARP, "none can go on"),
        (&DIVERGENCE, "lanes of a warp diverge"),
        (&LEFT_COPY, "copies under way"),
        (&ALIGNMENT, "not aligned to 16 bytes"),
        (&UNKNOWN, "there is no kernel"),
    ] {
        let error = run(&driver, entry).expect_err(entry.name).to_string();
        assert!(error.contains(expected) && error.contains(entry.name), "{error}");
    }
}

/// Products of groups of warps: what PTX asks of who starts them.
#[test]
fn a_group_s_product_that_is_started_wrongly_is_an_error() {
    let driver =
        EmulatedDriver::hopper(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap_or_else(|error| panic!("{error}"));
    let multiply = |entry| run_block(&driver, entry, 128, 64 * 64 * 2 + 1024);
    for order in [0, 1, 2, 3] {
        driver.set_order(order);
        assert_eq!(multiply(&GROUP_NONE).unwrap(), [64.0; 128]);
        // It is there behind the wait, and not before.
        assert_eq!(multiply(&GROUP_EARLY).unwrap(), [0.0; 128]);
        for (entry, expected) in [
            (&GROUP_UNPUBLISHED, "was not published"),
            (&GROUP_UNFENCED, "without a fence"),
            (&GROUP_UNFINISHED, "products under way"),
            (&GROUP_WEIGHTS, "changed before the wait"),
            (&GROUP_ONE_WARP, "not all warps of a group"),
            (&GROUP_BASE, "multiple of 1024 bytes"),
        ] {
            let error = multiply(entry).expect_err(entry.name).to_string();
            assert!(error.contains(expected) && error.contains(entry.name), "{error}");
        }
    }
}

#[test]
fn what_nobody_wrote_is_not_a_number() {
    let driver = driver();
    for entry in [&UNWRITTEN, &NO_WAIT] {
        let values = run(&driver, entry).unwrap();
        assert!(values.iter().all(|value| value.is_nan()), "{}: {values:?}", entry.name);
    }
}

#[test]
fn a_race_gives_other_values_in_another_order() {
    let driver = driver();
    let forward = run(&driver, &RACE).unwrap();
    driver.set_order(1);
    assert_ne!(forward, run(&driver, &RACE).unwrap());
}

#[test]
fn a_write_behind_shared_memory_faults_and_is_named() {
    if std::env::var_os(FAULT).is_some() {
        let left = run(&driver(), &BEYOND);
        panic!("it did not fault: {left:?}");
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_write_behind_shared_memory_faults_and_is_named",
            "--nocapture",
        ])
        .env(FAULT, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && text.contains("emulator: fault_beyond, block 0,0,0, thread 0,0,0"),
        "{text}"
    );
}

#[test]
fn a_block_larger_than_the_kernel_s_bound_is_refused() {
    let driver = driver();
    let stream = driver.create_stream().unwrap();
    let entry = &tarazed_kernels::cuda::table::ADD_F32;
    let (kernel, memory) = (driver.load(entry).unwrap(), driver.alloc(4096).unwrap());
    let launch = Launch {
        entry,
        grid: [1, 1, 1],
        block: [512, 1, 1],
        shared_bytes: 0,
    };
    let values = [Value::Pointer(memory.0), Value::Pointer(memory.0), Value::U64(0)];
    // SAFETY: the kernel gets a length of zero.
    let error = unsafe { driver.launch(stream, kernel, &launch, &values) }.unwrap_err();
    assert!(
        error.to_string().contains("512 threads, where its bound is 256"),
        "{error}"
    );
}
