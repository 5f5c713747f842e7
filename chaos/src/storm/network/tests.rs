//! Each condition, on real sockets with a socket on either side.

use super::*;
use std::io::{Read, Write};
use std::net::TcpStream as StdStream;
use std::time::{Duration, Instant};

/// Longest wait for bytes that must come.
const WAIT: Duration = Duration::from_secs(20);
/// How long bytes that must not come are waited for.
const ABSENT: Duration = Duration::from_millis(150);

/// A proxy, a dialer that names itself worker 3 to the hub, and the hub's end of the connection.
struct Bench {
    runtime: tokio::runtime::Runtime,
    network: Network,
    hub: StdListener,
}

impl Bench {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let network = runtime
            .block_on(Network::start(Path::new("/nowhere"), 2))
            .expect("ports");
        let _keys = network.lead_to(1, Path::new("/nowhere"));
        let port = network.shared.control.load(Ordering::SeqCst);
        let hub = StdListener::bind((Ipv4Addr::LOCALHOST, port)).expect("the hub's port");
        Self { runtime, network, hub }
    }

    fn connect(&self) -> (StdStream, StdStream) {
        let front = (Ipv4Addr::LOCALHOST, self.network.front + self.network.ranks);
        let mut rank = StdStream::connect(front).expect("connected");
        let mut hello = b"tarazed\x01".to_vec();
        hello.extend(3_u32.to_le_bytes());
        rank.write_all(&hello).expect("sent");
        let (mut hub, _) = self.hub.accept().expect("accepted");
        for stream in [&rank, &hub] {
            stream.set_read_timeout(Some(WAIT)).expect("a limit");
        }
        let mut heard = vec![0; hello.len()];
        hub.read_exact(&mut heard).expect("the hello, as it was");
        assert_eq!(heard, hello);
        (rank, hub)
    }
}

fn receive<const N: usize>(stream: &mut StdStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).expect("bytes");
    bytes
}

fn is_silent(stream: &mut StdStream) -> bool {
    stream.set_read_timeout(Some(ABSENT)).expect("a limit");
    let silent = matches!(stream.read(&mut [0]), Err(e) if e.kind() == io::ErrorKind::WouldBlock);
    stream.set_read_timeout(Some(WAIT)).expect("a limit");
    silent
}

#[test]
fn what_nobody_harms_passes_both_ways_and_ends_in_order() {
    let bench = Bench::new();
    let (mut rank, mut hub) = bench.connect();
    rank.write_all(b"up").expect("sent");
    hub.write_all(b"down").expect("sent");
    assert_eq!((&receive::<2>(&mut hub), &receive::<4>(&mut rank)), (b"up", b"down"));
    assert_eq!(bench.network.live(), [Way::Up(3)]);
    drop(rank);
    assert_eq!(hub.read(&mut [0]).expect("an orderly end"), 0);
}

#[test]
fn a_cut_way_swallows_and_the_connection_never_carries_again() {
    let bench = Bench::new();
    let (mut rank, mut hub) = bench.connect();
    bench.network.set(Way::Up(3), Some(Condition::Cut));
    rank.write_all(b"lost").expect("sent into nothing");
    assert!(is_silent(&mut hub));
    hub.write_all(b"back").expect("sent");
    assert_eq!(&receive::<4>(&mut rank), b"back", "the other way is whole");
    bench.network.mend_all();
    rank.write_all(b"late").expect("sent");
    assert!(is_silent(&mut hub), "bytes before are missing");
    assert!(bench.network.hits(Way::Up(3)) >= 2);
    let (mut again, mut other) = bench.connect();
    again.write_all(b"new").expect("sent");
    assert_eq!(&receive::<3>(&mut other), b"new");
    drop(rank);
    assert!(
        hub.read(&mut [0]).is_err(),
        "it ends as one that the other side has forgotten"
    );
}

#[test]
fn an_end_behind_a_cut_way_does_not_show_until_it_is_mended() {
    let bench = Bench::new();
    let (rank, mut hub) = bench.connect();
    bench.network.set(Way::Up(3), Some(Condition::Cut));
    drop(rank);
    assert!(is_silent(&mut hub));
    bench.network.set(Way::Up(3), None);
    assert!(hub.read(&mut [0]).is_err(), "a reset");
}

#[test]
fn one_bit_is_flipped_once() {
    let bench = Bench::new();
    let (mut rank, mut hub) = bench.connect();
    bench.network.set(Way::Up(3), Some(Condition::FlipBit));
    rank.write_all(&[0; 8]).expect("sent");
    let heard = receive::<8>(&mut hub);
    assert_eq!(heard.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1, "{heard:?}");
    rank.write_all(&[0; 8]).expect("sent");
    assert_eq!(receive::<8>(&mut hub), [0; 8]);
}

#[test]
fn delay_and_rate_are_kept() {
    let bench = Bench::new();
    let (mut rank, mut hub) = bench.connect();
    bench.network.set(Way::Up(3), Some(Condition::Delay(120)));
    let began = Instant::now();
    rank.write_all(b"x").expect("sent");
    receive::<1>(&mut hub);
    assert!(began.elapsed() >= Duration::from_millis(120), "{:?}", began.elapsed());
    bench.network.set(Way::Up(3), Some(Condition::Throttle(100_000)));
    let began = Instant::now();
    rank.write_all(&[7; 20_000]).expect("sent");
    assert_eq!(receive::<20_000>(&mut hub), [7; 20_000]);
    assert!(began.elapsed() >= Duration::from_millis(150), "{:?}", began.elapsed());
}

#[test]
fn a_reset_breaks_both_ends_and_no_other_connection() {
    let bench = Bench::new();
    let (mut rank, mut hub) = bench.connect();
    assert_eq!(bench.network.reset(Way::Down(3)), 1);
    assert!(rank.read(&mut [0]).is_err() && hub.read(&mut [0]).is_err());
    assert_eq!(bench.network.reset(Way::Up(4)), 0);
    let (mut again, mut other) = bench.connect();
    again.write_all(b"new").expect("sent");
    assert_eq!(&receive::<3>(&mut other), b"new");
    drop(bench.runtime);
}
