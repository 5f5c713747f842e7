//! A communicator over the recording library: what it asks for and in which order, and how long memory stays.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::Arc;
use tarazed_kernels::cuda::nccl::recording::{Call, RecordingNccl, RecordingWorld};
use tarazed_kernels::cuda::nccl::{Communicator, CommunicatorError, Direction, Fault, Nccl, State, Transfer, UniqueId};
use tarazed_kernels::cuda::recording::RecordingDriver;
use tarazed_kernels::cuda::{CudaBuffer, CudaDevice};
use tarazed_kernels::{Device, Precision};

const ELEMENTS: usize = 8;

struct Side {
    driver: RecordingDriver,
    device: CudaDevice<RecordingDriver>,
    library: RecordingNccl,
    communicator: Communicator<RecordingDriver>,
}

impl Side {
    fn new(world: &Arc<RecordingWorld>) -> Self {
        let driver = RecordingDriver::new();
        let device = CudaDevice::new(driver.clone()).unwrap();
        let library = RecordingNccl::new(world, driver.clone());
        let communicator = Communicator::new(&device, Arc::new(library.clone())).unwrap();
        Self {
            driver,
            device,
            library,
            communicator,
        }
    }

    fn buffer(&self) -> CudaBuffer<RecordingDriver> {
        self.device.alloc(ELEMENTS, Precision::Full).unwrap()
    }
}

fn transfer(direction: Direction, buffer: &CudaBuffer<RecordingDriver>) -> Transfer {
    let span = buffer.span(0..ELEMENTS);
    Transfer {
        peer: if direction == Direction::Send { 1 } else { 0 },
        direction,
        offset: 4,
        bytes: span.bytes() - 4,
        span,
    }
}

/// Ranks 0 and 1, connected.
fn pair() -> (Arc<RecordingWorld>, Side, Side) {
    let world = RecordingWorld::new();
    let (mut zero, mut one) = (Side::new(&world), Side::new(&world));
    let id = zero.library.unique_id().unwrap();
    zero.communicator.connect(&id, 2, 0).unwrap();
    assert_eq!(zero.communicator.state(), Ok(State::Busy), "the other is not there yet");
    one.communicator.connect(&id, 2, 1).unwrap();
    for side in [&mut zero, &mut one] {
        assert_eq!(side.communicator.state(), Ok(State::Ready));
    }
    (world, zero, one)
}

#[test]
fn bytes_move_and_everything_is_given_back() {
    let (_, mut zero, mut one) = pair();
    let (from, to) = (zero.buffer(), one.buffer());
    let sent: Vec<u8> = (0..32).collect();
    zero.driver.poke(from.address(), &sent);
    zero.communicator.start(&[transfer(Direction::Send, &from)]).unwrap();
    assert_eq!(zero.communicator.is_done(), Ok(false), "nobody receives yet");
    one.communicator.start(&[transfer(Direction::Receive, &to)]).unwrap();
    assert_eq!(zero.communicator.is_done(), Ok(true));
    assert_eq!(one.communicator.is_done(), Ok(true));
    assert_eq!(one.driver.peek(to.address(), 32)[4..], sent[4..]);

    zero.communicator.finalize().unwrap();
    assert_eq!(zero.communicator.state(), Ok(State::Ready));
    zero.communicator.destroy().unwrap();
    one.communicator.abort().unwrap();
    let connected = |rank| vec![Call::Init(2, rank), Call::GroupStart];
    let mut expected = vec![Call::UniqueId];
    expected.extend(connected(0));
    expected.extend([Call::Send(1, 28), Call::GroupEnd, Call::Finalize, Call::Destroy]);
    assert_eq!(zero.library.take(), expected);
    let mut expected = connected(1);
    expected.extend([Call::Receive(0, 28), Call::GroupEnd, Call::Abort]);
    assert_eq!(one.library.take(), expected);
    drop((from, to, zero.device, one.device));
    for (driver, library) in [(zero.driver, zero.library), (one.driver, one.library)] {
        assert_eq!((driver.left(), library.left()), (vec![], vec![]));
    }
}

/// The recorder panics where memory is freed while work uses it.
#[test]
fn memory_stays_until_its_work_is_done_whatever_its_owner_drops() {
    for aborted in [false, true] {
        let (_world, mut zero, mut one) = pair();
        let from = zero.buffer();
        zero.communicator.start(&[transfer(Direction::Send, &from)]).unwrap();
        drop(from);
        let held = |side: &Side| side.driver.left().contains(&"32 bytes of device memory".to_owned());
        assert_eq!(zero.communicator.is_done(), Ok(false));
        assert!(held(&zero), "work is under way");
        if aborted {
            zero.communicator.abort().unwrap();
            assert!(!zero.driver.left().contains(&"32 bytes of device memory".to_owned()));
        } else {
            let to = one.buffer();
            one.communicator.start(&[transfer(Direction::Receive, &to)]).unwrap();
            assert!(held(&zero), "nobody has looked yet");
            assert_eq!(zero.communicator.is_done(), Ok(true));
            assert!(!held(&zero));
        }
    }
}

#[test]
fn a_group_is_ended_whichever_call_of_it_fails() {
    // Id and connection come first; then the group's start, two sends and its end.
    for (number, ended) in [(2, 0), (3, 1), (4, 1), (5, 1)] {
        let (_world, mut zero, one) = pair();
        let from = zero.buffer();
        zero.library.fail(number, Fault::System);
        let part = transfer(Direction::Send, &from);
        let error = zero.communicator.start(&[part.clone(), part]).unwrap_err();
        let CommunicatorError::Nccl(error) = error else {
            panic!("{error}")
        };
        assert_eq!((error.fault, error.call), (Fault::System, zero.library.asked()[number]));
        let ends = zero
            .library
            .asked()
            .iter()
            .filter(|call| **call == "ncclGroupEnd")
            .count();
        assert_eq!(ends, ended, "{number}");
        zero.communicator.abort().unwrap();
        assert_eq!(zero.library.left(), Vec::<String>::new(), "{number}");
        drop(one);
    }
}

#[test]
fn one_that_fails_to_connect_or_by_itself_is_given_back() {
    let world = RecordingWorld::new();
    let mut zero = Side::new(&world);
    zero.library.fail(0, Fault::Usage);
    let id = UniqueId([7; 128]);
    assert!(zero.communicator.connect(&id, 2, 0).is_err());
    assert_eq!(zero.library.left().len(), 1, "it came to be all the same");
    drop(zero.communicator);
    assert_eq!(zero.library.left(), Vec::<String>::new());

    let (_world, mut zero, _one) = pair();
    zero.library.fail_communicators(Fault::Peer);
    assert!(matches!(
        zero.communicator.is_done(),
        Err(CommunicatorError::Nccl(error)) if error.fault == Fault::Peer
    ));
    drop(zero.communicator);
    assert_eq!(zero.library.left(), Vec::<String>::new());
}
