//! Recorded work and snapshots, over a driver that writes every call down.

#![allow(clippy::unwrap_used, reason = "a test's own helpers")]

mod cuda_rig;

use cuda_rig::{Layer, Rig};
use tarazed_kernels::cuda::graph::{GraphKey, Graphs};
use tarazed_kernels::cuda::recording::{Call, RecordingDriver};
use tarazed_kernels::cuda::snapshot::Snapshots;
use tarazed_kernels::{Device, DeviceError, Precision, View, ViewMut};

fn work(calls: &[Call]) -> Vec<Call> {
    calls.iter().filter(|call| call.is_work()).cloned().collect()
}

/// DET-2: a replay asks the device for the same work, over the same memory, in the same order, as the work itself.
#[test]
fn recorded_work_is_the_work() {
    let mut rig = Rig::new();
    let mut layer = Layer::new(&rig.device).unwrap();
    let mut graphs = Graphs::default();
    let key = || GraphKey::default().size(1).factor(0.5);
    let mut runs = Vec::new();
    for _ in 0..4 {
        let _ = rig.recorder.take();
        graphs
            .run(&rig.device, &mut rig.stream, key(), |stream| {
                layer.pass(&rig.device, stream)
            })
            .unwrap();
        runs.push(rig.recorder.take());
    }
    let plain = work(&runs[0]);
    assert!(plain.len() > 6, "{plain:?}");
    for run in &runs[1..] {
        assert_eq!(work(run), plain);
    }
    let launches = |run: &[Call]| run.iter().filter(|call| matches!(call, Call::LaunchGraph(..))).count();
    assert_eq!(runs.iter().map(|run| launches(run)).collect::<Vec<_>>(), [0, 1, 1, 1]);
    let captures = |run: &[Call]| run.iter().filter(|call| matches!(call, Call::BeginCapture(..))).count();
    assert_eq!(runs.iter().map(|run| captures(run)).collect::<Vec<_>>(), [0, 1, 0, 0]);
    // A replay is one call.
    assert!(matches!(runs[2][0], Call::LaunchGraph(..)) && runs[2].len() == plain.len() + 1);
    assert_eq!(graphs.recorded(), 1);
}

#[test]
fn another_shape_factor_or_buffer_is_another_graph() {
    let rig = Rig::new();
    let (a, b) = (rig.buffer(8, Precision::Full), rig.buffer(8, Precision::Full));
    let key = || GraphKey::default().size(4).factor(0.5).buffer(&a);
    assert_eq!(key(), key());
    assert_ne!(key(), GraphKey::default().size(5).factor(0.5).buffer(&a));
    assert_ne!(key(), GraphKey::default().size(4).factor(-0.5).buffer(&a));
    assert_ne!(key(), GraphKey::default().size(4).factor(0.5).buffer(&b));
}

#[test]
fn a_graph_keeps_the_memory_that_its_work_uses() {
    let mut rig = Rig::new();
    let mut buffer = rig.buffer(1000, Precision::Full);
    let graph = rig
        .device
        .record(&mut rig.stream, |stream| {
            rig.device.zero(stream, ViewMut::from(&mut buffer), 1000)
        })
        .unwrap();
    let address = buffer.address();
    drop(buffer);
    let freed = |calls: &[Call]| calls.contains(&Call::Free(address));
    assert!(!freed(&rig.recorder.take()));
    graph.launch(&mut rig.stream).unwrap();
    drop(graph);
    assert!(freed(&rig.recorder.take()));
}

#[test]
fn work_that_waits_or_allocates_is_not_recorded() {
    let mut rig = Rig::new();
    let mut buffer = rig.buffer(64, Precision::Full);
    let device = rig.device.clone();
    type Work<'a> =
        Box<dyn FnOnce(&mut tarazed_kernels::cuda::CudaStream<RecordingDriver>) -> Result<(), DeviceError> + 'a>;
    let refused: Vec<Work<'_>> = vec![
        Box::new(|stream| device.synchronize(stream)),
        Box::new(|stream| device.download(stream, View::from(&buffer), &mut [0.0; 4])),
        // Its scratch is not there yet.
        Box::new(|stream| device.square_sums(stream, View::from(&buffer), 64, &mut [0.0])),
    ];
    for work in refused {
        let refused = rig.device.record(&mut rig.stream, work).err().unwrap();
        assert!(matches!(refused, DeviceError::Unsupported { .. }), "{refused}");
    }
    let upload = |stream: &mut _| device.upload(stream, &[0.0; 4], ViewMut::from(&mut buffer));
    assert!(rig.device.record(&mut rig.stream, upload).is_err());
    // The stream is as before.
    rig.device.synchronize(&mut rig.stream).unwrap();
    let recorder = rig.recorder.clone();
    drop((rig, buffer, device));
    assert_eq!(recorder.left(), Vec::<String>::new());
}

#[test]
fn work_that_panics_leaves_no_capture() {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let mut rig = Rig::new();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let _ = rig
            .device
            .record(&mut rig.stream, |_| -> Result<(), DeviceError> { panic!("on purpose") });
    }));
    assert!(outcome.is_err());
    rig.device.synchronize(&mut rig.stream).unwrap();
}

/// The copy follows the update before it and precedes the next one, by events on the device; it runs beside the forward
/// pass between them.
#[test]
fn a_snapshot_is_ordered_by_events() {
    let mut rig = Rig::new();
    let mut state = rig.filled(&[1.0, 2.0, 3.0]);
    let mut activations = rig.buffer(4, Precision::Full);
    let mut snapshots = Snapshots::new(&rig.device).unwrap();
    let _ = rig.recorder.take();
    let mut snapshot = snapshots
        .begin(&mut rig.stream, &[(View::at(&state, 1), 2), (View::from(&state), 3)])
        .unwrap();
    let begun = rig.recorder.take();
    // The next forward pass does not wait.
    rig.device.zero(&mut rig.stream, (&mut activations).into(), 4).unwrap();
    let forward = rig.recorder.take();
    assert!(
        !forward
            .iter()
            .any(|call| matches!(call, Call::Wait(..) | Call::Synchronize(_))),
        "{forward:?}"
    );
    snapshot.precedes(&rig.stream).unwrap();
    rig.device.zero(&mut rig.stream, (&mut state).into(), 3).unwrap();
    let update = rig.recorder.take();

    let (updated, compute) = found(&begun, |call| match call {
        Call::Record(event, stream) => Some((*event, *stream)),
        _ => None,
    });
    let (copies, waited) = found(&begun, |call| match call {
        Call::Wait(stream, event) => Some((*stream, *event)),
        _ => None,
    });
    assert!(copies != compute && waited == updated, "the copy waits for the update");
    let place = |wanted: &dyn Fn(&Call) -> bool| begun.iter().position(wanted).unwrap();
    let waits = place(&|call| matches!(call, Call::Wait(..)));
    let first_copy = place(&|call| matches!(call, Call::CopyToHost(stream, ..) if *stream == copies));
    let done = begun
        .iter()
        .rposition(|call| matches!(call, Call::Record(_, stream) if *stream == copies));
    assert!(waits < first_copy && Some(first_copy) < done, "{begun:?}");
    let Some(Call::Record(done, _)) = done.map(|at| begun[at].clone()) else {
        panic!("{begun:?}")
    };
    assert_eq!(
        update[0],
        Call::Wait(compute, done),
        "the next update waits for the copy"
    );
    assert!(matches!(update[1], Call::SetBytes(stream, ..) if stream == compute));

    assert_eq!(snapshot.full(0).unwrap(), [2.0, 3.0]);
    assert_eq!(snapshot.full(1).unwrap(), [1.0, 2.0, 3.0]);
    snapshots.recycle(snapshot).unwrap();
    let _ = rig.recorder.take();
    drop(snapshots.begin(&mut rig.stream, &[(View::from(&state), 3)]).unwrap());
    let calls = rig.recorder.take();
    assert!(
        !calls.iter().any(|call| matches!(call, Call::AllocPinned(_))),
        "pinned memory is kept"
    );
    assert!(
        calls.iter().any(|call| matches!(call, Call::SynchronizeEvent(_))),
        "a drop waits for the copy"
    );
}

fn found<T>(calls: &[Call], what: impl Fn(&Call) -> Option<T>) -> T {
    calls.iter().find_map(what).unwrap()
}
