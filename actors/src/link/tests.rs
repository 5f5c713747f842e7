//! Real sockets, real actors, and real processes that die.

use super::envelope::{FOOTER_BYTES, Footer, Kind, open, seal};
use super::*;
use proptest::prelude::*;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;
use tarazed_domain::limits::{
    CONTROL_MESSAGE_BYTES_MAX, LINK_UNACKNOWLEDGED_BYTES_MAX, LINK_UNACKNOWLEDGED_MESSAGES_MAX,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Far above anything measured; only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(30);
const FAILURE: Duration = Duration::from_secs(3);
const TOKEN: [u8; 32] = [7; 32];
const CHILD_ADDRESS: &str = "TARAZED_TEST_LINK_CHILD";

fn peer(worker: u32, incarnation: u32) -> PeerId {
    PeerId {
        worker: WorkerId(worker),
        incarnation: Incarnation(incarnation),
    }
}

fn loopback() -> Bind {
    Bind::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)))
}

async fn hub(bind: Bind) -> (Hub, UnboundedReceiver<HubEvent>) {
    let (events, receiver) = unbounded_channel();
    let config = HubConfig {
        token: TOKEN,
        bind,
        failure: FAILURE,
        supervisor: None,
    };
    let hub = start_hub(config, move |event| drop(events.send(event))).await.unwrap();
    (hub, receiver)
}

fn uplink_config(address: String, peer: PeerId) -> UplinkConfig {
    UplinkConfig {
        address,
        token: TOKEN,
        peer,
        connect: PATIENCE,
        failure: FAILURE,
        supervisor: None,
    }
}

async fn uplink(hub: &Hub, peer: PeerId) -> (Uplink, UnboundedReceiver<UplinkEvent>) {
    let (events, receiver) = unbounded_channel();
    let config = uplink_config(hub.address(), peer);
    let uplink = connect_uplink(config, move |event| drop(events.send(event)))
        .await
        .unwrap();
    (uplink, receiver)
}

async fn next<T>(receiver: &mut UnboundedReceiver<T>) -> T {
    tokio::time::timeout(PATIENCE, receiver.recv()).await.unwrap().unwrap()
}

async fn connected(receiver: &mut UnboundedReceiver<HubEvent>) -> PeerId {
    match next(receiver).await {
        HubEvent::Connected(peer) => peer,
        other => panic!("{other:?}"),
    }
}

async fn disconnected(receiver: &mut UnboundedReceiver<HubEvent>) -> (PeerId, String) {
    match next(receiver).await {
        HubEvent::Disconnected(peer, reason) => (peer, reason),
        other => panic!("{other:?}"),
    }
}

async fn at_hub(receiver: &mut UnboundedReceiver<HubEvent>) -> (PeerId, Body) {
    match next(receiver).await {
        HubEvent::Message(peer, body) => (peer, body),
        other => panic!("{other:?}"),
    }
}

async fn at_rank(receiver: &mut UnboundedReceiver<UplinkEvent>) -> Body {
    match next(receiver).await {
        UplinkEvent::Message(body) => body,
        other @ UplinkEvent::Lost(_) => panic!("{other:?}"),
    }
}

async fn lost(receiver: &mut UnboundedReceiver<UplinkEvent>) -> String {
    match next(receiver).await {
        UplinkEvent::Lost(reason) => reason,
        other @ UplinkEvent::Message(_) => panic!("{other:?}"),
    }
}

/// Not a test of its own: the body of the child processes below, which re-execute this binary.
#[test]
fn child_process() {
    let Ok(address) = std::env::var(CHILD_ADDRESS) else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (events, mut receiver) = unbounded_channel();
        let config = uplink_config(address, peer(1, 0));
        let uplink = connect_uplink(config, move |event| drop(events.send(event)))
            .await
            .unwrap();
        while let Some(UplinkEvent::Message(body)) = receiver.recv().await {
            uplink.send(body.into_vec()).unwrap();
        }
    });
    std::process::exit(0);
}

fn spawn_child(address: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "link::tests::child_process", "--nocapture"])
        .env(CHILD_ADDRESS, address)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// LINK-1: order and exactly-once, in both directions, over either kind of socket, through many credit rounds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_arrive_once_and_in_order() {
    let folder = tempfile::tempdir().unwrap();
    for bind in [Bind::near(folder.path(), "link.sock"), loopback()] {
        let (hub, mut hub_events) = hub(bind).await;
        let (uplink, mut rank_events) = uplink(&hub, peer(3, 2)).await;
        assert_eq!(connected(&mut hub_events).await, peer(3, 2));
        assert_eq!(hub.peers(), [peer(3, 2)]);
        let count = LINK_UNACKNOWLEDGED_MESSAGES_MAX / 2;
        // More in all than one window: later rounds run on credits given back.
        for round in 0..3 {
            for index in 0..count {
                let number = round * count + index;
                hub.send(peer(3, 2), number.to_le_bytes().to_vec()).unwrap();
                uplink.send(number.to_be_bytes().to_vec()).unwrap();
            }
            for index in 0..count {
                let number = round * count + index;
                assert_eq!(*at_rank(&mut rank_events).await, number.to_le_bytes());
                let (from, body) = at_hub(&mut hub_events).await;
                assert_eq!((from, &*body), (peer(3, 2), &number.to_be_bytes()[..]));
            }
        }
        assert_eq!(hub.counts().messages_received, 3 * count);
        assert_eq!(hub.counts().frames_refused + uplink.counts().frames_refused, 0);
        hub.close().await;
        assert_eq!(lost(&mut rank_events).await, "closed by the other side");
    }
}

/// The largest message passes; one byte more is refused at the sender, and the link goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_size_limit_is_exact() {
    let (hub, mut hub_events) = hub(loopback()).await;
    let (uplink, _rank_events) = uplink(&hub, peer(0, 0)).await;
    connected(&mut hub_events).await;
    let error = uplink.send(vec![0; CONTROL_MESSAGE_BYTES_MAX + 1]).unwrap_err();
    assert!(matches!(error, LinkError::TooLarge { .. }), "{error}");
    uplink.send(vec![9; CONTROL_MESSAGE_BYTES_MAX]).unwrap();
    let (_, body) = at_hub(&mut hub_events).await;
    assert!(body.len() == CONTROL_MESSAGE_BYTES_MAX && body.iter().all(|byte| *byte == 9));
}

/// LINK-2, and the times that recovery rests on: a killed process shows within milliseconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_death_of_a_process_is_seen_at_once() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bind) in [("unix", Bind::near(folder.path(), "link.sock")), ("tcp", loopback())] {
        let (hub, mut events) = hub(bind).await;
        let (mut starts, mut deaths) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let began = Instant::now();
            let mut child = spawn_child(&hub.address());
            connected(&mut events).await;
            starts.push(began.elapsed());
            hub.send(peer(1, 0), b"echo".to_vec()).unwrap();
            assert_eq!(&*at_hub(&mut events).await.1, b"echo");
            let killed = Instant::now();
            child.kill().unwrap();
            let (who, reason) = disconnected(&mut events).await;
            deaths.push(killed.elapsed());
            child.wait().unwrap();
            assert_eq!(who, peer(1, 0));
            assert!(reason.contains("without a goodbye"), "{reason}");
            let error = hub.send(peer(1, 0), Vec::new()).unwrap_err();
            assert!(matches!(error, LinkError::Disconnected(_)), "{error}");
        }
        println!("{name}: process start to Connected {starts:?}; SIGKILL to Disconnected {deaths:?}");
        assert!(deaths.iter().min().unwrap() < &Duration::from_millis(200), "{deaths:?}");
        hub.close().await;
    }
}

/// The mirror image: a rank sees at once that its hub is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_hub_is_seen_at_once() {
    let (hub, mut hub_events) = hub(loopback()).await;
    let (uplink, mut rank_events) = uplink(&hub, peer(0, 0)).await;
    connected(&mut hub_events).await;
    let dropped = Instant::now();
    drop(hub);
    let reason = lost(&mut rank_events).await;
    println!("hub dropped to Lost: {:?}", dropped.elapsed());
    assert!(reason.contains("without a goodbye"), "{reason}");
    assert!(matches!(uplink.send(Vec::new()), Err(LinkError::Disconnected(_))));
}

/// Prints what starting an uplink and a round trip cost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bind) in [("unix", Bind::near(folder.path(), "link.sock")), ("tcp", loopback())] {
        let (hub, mut hub_events) = hub(bind).await;
        let mut starts = Vec::new();
        for incarnation in 0..10 {
            let began = Instant::now();
            let (uplink, _events) = uplink(&hub, peer(0, incarnation)).await;
            connected(&mut hub_events).await;
            starts.push(began.elapsed());
            drop(uplink);
            disconnected(&mut hub_events).await;
        }
        let (uplink, mut rank_events) = uplink(&hub, peer(1, 0)).await;
        connected(&mut hub_events).await;
        let mut trips = Vec::new();
        for _ in 0..2000 {
            let began = Instant::now();
            hub.send(peer(1, 0), vec![1; 100]).unwrap();
            uplink.send(at_rank(&mut rank_events).await.into_vec()).unwrap();
            at_hub(&mut hub_events).await;
            trips.push(began.elapsed());
        }
        starts.sort_unstable();
        trips.sort_unstable();
        println!(
            "{name}: uplink start to Connected median {:?} max {:?}; round trip median {:?} p99 {:?}",
            starts[5], starts[9], trips[1000], trips[1980]
        );
        hub.close().await;
    }
}

/// Who does not hold the token learns nothing and gets nothing, on either side.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused() {
    let (hub, mut hub_events) = hub(loopback()).await;
    let mut config = uplink_config(hub.address(), peer(0, 0));
    config.token[31] ^= 1;
    let error = connect_uplink(config, |event| panic!("{event:?}"))
        .await
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, LinkError::Reconfigure { .. }), "{error}");
    assert!(error.to_string().contains("does not hold this run's token"), "{error}");

    let address = hub.address().strip_prefix("tcp:").unwrap().to_owned();
    let mut stranger = std::net::TcpStream::connect(&address).unwrap();
    stranger.write_all(&[b'G'; 200]).unwrap();
    // One who says nothing keeps nobody out.
    let _silent = std::net::TcpStream::connect(&address).unwrap();
    let (_uplink, _events) = uplink(&hub, peer(0, 0)).await;
    assert_eq!(connected(&mut hub_events).await, peer(0, 0));
    tokio::time::timeout(PATIENCE, async {
        while hub.counts().handshakes_refused < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

/// A caller that replays, alters or reflects what it saw fails: each bit of the proved part matters.
#[tokio::test]
async fn the_handshake_binds_its_transcript() {
    use super::handshake::{answer, call, receive};
    // Byte positions in what the caller sends: worker, incarnation, endpoint, nonce, proof.
    for flipped in [None, Some(8), Some(12), Some(16), Some(30), Some(60)] {
        let (mut rank, mut near) = tokio::io::duplex(4096);
        let (mut far, mut hub_side) = tokio::io::duplex(4096);
        let relay = async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let mut seen = 0;
            let (mut near_read, mut near_write) = tokio::io::split(&mut near);
            let (mut far_read, mut far_write) = tokio::io::split(&mut far);
            let back = tokio::io::copy(&mut far_read, &mut near_write);
            let forth = async {
                let mut byte = [0; 1];
                while near_read.read_exact(&mut byte).await.is_ok() {
                    if flipped == Some(seen) {
                        byte[0] ^= 1;
                    }
                    seen += 1;
                    far_write.write_all(&byte).await?;
                }
                std::io::Result::Ok(())
            };
            let _ = tokio::join!(back, forth);
        };
        let hub_end = async {
            let caller = receive(&mut hub_side, &TOKEN, 5).await.ok()?;
            let who = caller.peer;
            answer(&mut hub_side, caller, &super::handshake::Verdict::Welcome)
                .await
                .ok()?;
            Some(who)
        };
        let rank_end = async { call(&mut rank, &TOKEN, peer(1, 2), 6).await };
        let relay = tokio::spawn(relay);
        let both = tokio::time::timeout(PATIENCE, async {
            // One end fails and leaves the other waiting for bytes: that is what its limit is for.
            tokio::select! {
                who = hub_end => who,
                Err(_) = rank_end => None,
            }
        });
        let admitted = both.await.unwrap();
        relay.abort();
        assert_eq!(admitted, flipped.is_none().then_some(peer(1, 2)), "byte {flipped:?}");
    }
}

/// SUP-2: newer replaces older; older and doubled are refused and counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identity_is_worker_and_incarnation() {
    let (hub, mut hub_events) = hub(loopback()).await;
    let (_old, mut old_events) = uplink(&hub, peer(4, 1)).await;
    assert_eq!(connected(&mut hub_events).await, peer(4, 1));

    let mut twin = uplink_config(hub.address(), peer(4, 1));
    twin.connect = Duration::from_millis(50);
    let error = connect_uplink(twin, |_| {}).await.map(drop).unwrap_err();
    assert!(
        matches!(&error, LinkError::Retry { cause, .. } if cause.contains("connected already")),
        "{error}"
    );

    let (_new, mut new_events) = uplink(&hub, peer(4, 2)).await;
    let (who, reason) = disconnected(&mut hub_events).await;
    assert_eq!((who, reason.as_str()), (peer(4, 1), "replaced by incarnation 2"));
    assert_eq!(connected(&mut hub_events).await, peer(4, 2));
    lost(&mut old_events).await;
    assert!(matches!(
        hub.send(peer(4, 1), Vec::new()),
        Err(LinkError::Disconnected(_))
    ));

    let stale = uplink_config(hub.address(), peer(4, 1));
    let error = connect_uplink(stale, |_| {}).await.map(drop).unwrap_err();
    assert!(matches!(error, LinkError::Halt { .. }), "{error}");
    assert!(hub.counts().identities_refused >= 2);

    hub.send(peer(4, 2), b"still here".to_vec()).unwrap();
    assert_eq!(&*at_rank(&mut new_events).await, b"still here");
}

/// The same life may come back after its connection broke.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_life_may_reconnect() {
    let (hub, mut hub_events) = hub(loopback()).await;
    let (first, _) = uplink(&hub, peer(0, 0)).await;
    connected(&mut hub_events).await;
    drop(first);
    disconnected(&mut hub_events).await;
    let (_second, mut events) = uplink(&hub, peer(0, 0)).await;
    connected(&mut hub_events).await;
    hub.send(peer(0, 0), vec![1]).unwrap();
    assert_eq!(&*at_rank(&mut events).await, [1]);
    hub.disconnect(peer(0, 0), "the roster moved on");
    assert_eq!(disconnected(&mut hub_events).await.1, "the roster moved on");
    lost(&mut events).await;
}

/// SUP-5: a peer that handles nothing is disconnected exactly past the bound; the others do not notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unhandled_messages_are_bounded() {
    let (hub, mut hub_events) = hub(loopback()).await;
    // The receivers keep every body, so no credit goes back.
    let (_slow, mut slow_events) = uplink(&hub, peer(0, 0)).await;
    let (_heavy, _heavy_events) = uplink(&hub, peer(1, 0)).await;
    let (_good, mut good_events) = uplink(&hub, peer(2, 0)).await;
    for _ in 0..3 {
        connected(&mut hub_events).await;
    }
    for _ in 0..LINK_UNACKNOWLEDGED_MESSAGES_MAX {
        hub.send(peer(0, 0), Vec::new()).unwrap();
    }
    let error = hub.send(peer(0, 0), Vec::new()).unwrap_err();
    assert!(matches!(error, LinkError::Overrun { .. }), "{error}");
    let (who, reason) = disconnected(&mut hub_events).await;
    assert_eq!(who, peer(0, 0));
    assert!(reason.contains("unhandled"), "{reason}");

    let large = LINK_UNACKNOWLEDGED_BYTES_MAX as usize / CONTROL_MESSAGE_BYTES_MAX;
    for _ in 0..large {
        hub.send(peer(1, 0), vec![0; CONTROL_MESSAGE_BYTES_MAX]).unwrap();
    }
    let error = hub.send(peer(1, 0), vec![0]).unwrap_err();
    assert!(matches!(error, LinkError::Overrun { .. }), "{error}");
    assert_eq!(disconnected(&mut hub_events).await.0, peer(1, 0));
    assert_eq!(hub.counts().overruns, 2);

    hub.send(peer(2, 0), b"on".to_vec()).unwrap();
    assert_eq!(&*at_rank(&mut good_events).await, b"on");
    // Its own end hears of it too; what had arrived by then may or may not have been delivered before.
    while let UplinkEvent::Message(_) = next(&mut slow_events).await {}
}

/// Nothing that was sent before an orderly close is lost, even if the process ends right after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn close_waits_until_all_is_handled() {
    for _ in 0..20 {
        let (hub, mut hub_events) = hub(loopback()).await;
        let (uplink, _events) = uplink(&hub, peer(0, 0)).await;
        for number in 0..1000_u32 {
            uplink.send(number.to_le_bytes().to_vec()).unwrap();
        }
        let reader = tokio::spawn(async move {
            connected(&mut hub_events).await;
            for number in 0..1000_u32 {
                assert_eq!(*at_hub(&mut hub_events).await.1, number.to_le_bytes());
            }
            disconnected(&mut hub_events).await
        });
        assert!(uplink.close().await);
        assert_eq!(
            reader.await.unwrap(),
            (peer(0, 0), "closed by the other side".to_owned())
        );
    }
}

/// The goodbye arrives also when nothing is under way, so that an orderly end never looks like a crash.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_end_is_told_from_a_crash() {
    for round in 0..200 {
        let (hub, mut hub_events) = hub(loopback()).await;
        let (uplink, mut rank_events) = uplink(&hub, peer(0, 0)).await;
        connected(&mut hub_events).await;
        if round % 2 == 0 {
            hub.close().await;
            assert_eq!(lost(&mut rank_events).await, "closed by the other side");
        } else {
            assert!(uplink.close().await);
            assert_eq!(disconnected(&mut hub_events).await.1, "closed by the other side");
        }
    }
}

/// LINK-1: bad frames end their connection with a reason, are counted, and harm no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_frames_end_the_connection() {
    let (hub, mut hub_events) = hub(loopback()).await;
    let (_bystander, mut bystander_events) = uplink(&hub, peer(9, 0)).await;
    connected(&mut hub_events).await;
    /// What the hub says, and the frame that makes it say so.
    type Case = (&'static str, fn(Footer) -> Vec<u8>);
    let cases: [Case; 4] = [
        ("checksum", |footer| {
            let mut frame = seal(b"hello".to_vec(), footer);
            frame[0] ^= 1;
            frame
        }),
        ("schema", |footer| {
            let mut frame = seal(b"hello".to_vec(), footer);
            let at = frame.len() - 14;
            frame[at] += 1;
            frame
        }),
        ("frame 0 was expected and frame 7 came", |footer| {
            seal(Vec::new(), Footer { sequence: 7, ..footer })
        }),
        ("credits for", |footer| {
            let footer = Footer {
                kind: Kind::Handled,
                ..footer
            };
            seal(vec![1; 16], footer)
        }),
    ];
    for (worker, (expected, frame)) in (0..).zip(cases) {
        let (uplink, mut events) = uplink(&hub, peer(worker, 0)).await;
        connected(&mut hub_events).await;
        let footer = Footer {
            connection: uplink.connection().id,
            sequence: 0,
            kind: Kind::Data,
        };
        uplink.connection().post_raw(frame(footer));
        let (who, reason) = disconnected(&mut hub_events).await;
        assert_eq!(who, peer(worker, 0));
        assert!(reason.contains(expected), "{reason}");
        lost(&mut events).await;
        assert_eq!(hub.counts().frames_refused, u64::from(worker) + 1);
    }
    hub.send(peer(9, 0), b"fine".to_vec()).unwrap();
    assert_eq!(&*at_rank(&mut bystander_events).await, b"fine");
}

/// Links of several runs in one process share nothing, although ractor's registry is global.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_links_in_one_process() {
    let mut ends = Vec::new();
    for _ in 0..4 {
        let (hub, hub_events) = hub(loopback()).await;
        let mut ranks = Vec::new();
        for worker in 0..3 {
            ranks.push(uplink(&hub, peer(worker, 0)).await);
        }
        ends.push((hub, hub_events, ranks));
    }
    for (index, (hub, hub_events, ranks)) in (0_u8..).zip(&mut ends) {
        for _ in 0..3 {
            connected(hub_events).await;
        }
        for (worker, (uplink, events)) in (0..).zip(ranks) {
            hub.send(peer(worker, 0), vec![index, worker as u8]).unwrap();
            assert_eq!(&*at_rank(events).await, [index, worker as u8]);
            uplink.send(vec![index, worker as u8]).unwrap();
            let (who, body) = at_hub(hub_events).await;
            assert_eq!((who, &*body), (peer(worker, 0), &[index, worker as u8][..]));
        }
    }
}

/// A Unix socket's name goes with its hub; a dead hub's name is taken over, a living one's is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn socket_names() {
    let folder = tempfile::tempdir().unwrap();
    let bind = Bind::near(folder.path(), "link.sock");
    let Bind::Unix(path) = bind.clone() else {
        panic!("{bind:?}")
    };
    let (first, _events) = hub(bind.clone()).await;
    let config = HubConfig {
        token: TOKEN,
        bind: bind.clone(),
        failure: FAILURE,
        supervisor: None,
    };
    let error = start_hub(config, |_| {}).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("another controller"), "{error}");
    first.close().await;
    assert!(!path.exists());

    // What a killed hub leaves behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let (second, mut events) = hub(bind).await;
    let (_uplink, _rank_events) = uplink(&second, peer(0, 0)).await;
    connected(&mut events).await;

    let long = PathBuf::from("/tmp").join("x".repeat(120));
    assert!(matches!(Bind::near(&long, "link.sock"), Bind::Tcp(address) if address.ip().is_loopback()));
    let unanswered = UplinkConfig {
        connect: Duration::from_millis(30),
        ..uplink_config("unix:/nonexistent/link.sock".to_owned(), peer(0, 0))
    };
    let error = connect_uplink(unanswered, |_| {}).await.map(drop).unwrap_err();
    assert!(matches!(error, LinkError::Retry { .. }), "{error}");
    let error = connect_uplink(uplink_config("elsewhere".to_owned(), peer(0, 0)), |_| {}).await;
    assert!(matches!(error.map(drop), Err(LinkError::Reconfigure { .. })));
}

struct Parent(tokio::sync::mpsc::UnboundedSender<String>);
struct ParentMessage;
impl ractor::Message for ParentMessage {}

impl Actor for Parent {
    type Msg = ParentMessage;
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<ParentMessage>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<ParentMessage>,
        event: SupervisionEvent,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(_, cause) = event {
            self.0.send(cause.to_string())?;
        }
        Ok(())
    }
}

/// SUP-1: what breaks inside the link climbs to its parent with the root cause, and no stream outlives it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_climb_with_their_cause() {
    let (causes, mut climbed) = unbounded_channel();
    let (parent, _) = Actor::spawn(None, Parent(causes), ()).await.unwrap();
    let config = HubConfig {
        token: TOKEN,
        bind: loopback(),
        failure: FAILURE,
        supervisor: Some(parent.get_cell()),
    };
    let hub = start_hub(config, |event| {
        assert!(
            !matches!(event, HubEvent::Message(..)),
            "the owner cannot bear messages"
        );
    })
    .await
    .unwrap();
    let (rank, mut events) = uplink(&hub, peer(0, 0)).await;
    rank.send(vec![1]).unwrap();
    assert!(next(&mut climbed).await.contains("the owner cannot bear messages"));
    lost(&mut events).await;
    parent.stop(None);
}

/// A part of the link that is killed takes the link with it, and says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_part_ends_the_link() {
    let (causes, mut climbed) = unbounded_channel();
    let (parent, _) = Actor::spawn(None, Parent(causes), ()).await.unwrap();
    let (events, mut hub_events) = unbounded_channel();
    let config = HubConfig {
        token: TOKEN,
        bind: loopback(),
        failure: FAILURE,
        supervisor: Some(parent.get_cell()),
    };
    let hub = start_hub(config, move |event| drop(events.send(event))).await.unwrap();
    let (_rank, mut rank_events) = uplink(&hub, peer(0, 0)).await;
    connected(&mut hub_events).await;
    let switchboard = parent.get_children().pop().unwrap();
    switchboard.get_children().pop().unwrap().kill();
    assert!(disconnected(&mut hub_events).await.1.contains("a part of the link"));
    assert!(next(&mut climbed).await.contains("a part of the link"));
    lost(&mut rank_events).await;
    assert!(matches!(
        hub.send(peer(0, 0), Vec::new()),
        Err(LinkError::Disconnected(_))
    ));
    parent.stop(None);
}

/// A TCP peer whose host is gone must show within the failure timeout, without any traffic.
#[tokio::test]
async fn tcp_streams_watch_their_peer() {
    use super::socket::{Listener, Stream};
    use rustix::net::sockopt;
    let (listener, address) = Listener::bind(&loopback()).await.unwrap();
    let bind = Bind::parse(&address).unwrap();
    let (dialled, accepted) = tokio::join!(Stream::dial(&bind), listener.accept());
    for stream in [dialled.unwrap(), accepted.unwrap()] {
        stream.tune(FAILURE).unwrap();
        let Stream::Tcp(stream) = stream else { panic!("not TCP") };
        assert!(sockopt::tcp_nodelay(&stream).unwrap());
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        assert_eq!(sockopt::tcp_user_timeout(&stream).unwrap(), 3000);
        assert_eq!(sockopt::tcp_keepidle(&stream).unwrap(), Duration::from_secs(1));
    }
}

/// An authenticated peer that stops before its session is up does not keep its place for ever.
#[tokio::test]
async fn a_session_that_does_not_come_up_expires() {
    use super::handshake::{Verdict, call};
    use super::socket::Stream;
    let (hub, _events) = hub(loopback()).await;
    let bind = Bind::parse(&hub.address()).unwrap();
    let mut stream = Stream::dial(&bind).await.unwrap();
    let session = call(stream.duplex(), &TOKEN, peer(0, 0), 1).await.unwrap();
    assert_eq!(session.verdict, Verdict::Welcome);
    // It says no more; the hub ends the stream.
    let mut byte = [0; 64];
    let end = async {
        use tokio::io::AsyncReadExt;
        while !matches!(stream.duplex().read(&mut byte).await, Ok(0) | Err(_)) {}
    };
    tokio::time::timeout(PATIENCE, end).await.unwrap();
}

#[test]
fn a_detached_body_is_just_bytes() {
    let body = Body::detached(vec![1, 2]);
    assert_eq!(&*body, [1, 2]);
    assert_eq!(body.into_vec(), [1, 2]);
    assert_eq!(Arc::new(Counters::default()).read(), LinkCounts::default());
}

proptest! {
    /// What is sealed opens; with any one bit changed, or cut short anywhere, it does not.
    #[test]
    fn envelopes_are_checked(
        body in proptest::collection::vec(any::<u8>(), 0..200),
        connection: u64,
        sequence: u64,
        bit: prop::sample::Index,
        cut: prop::sample::Index,
    ) {
        let footer = Footer { connection, sequence, kind: Kind::Data };
        let frame = seal(body.clone(), footer);
        prop_assert_eq!(frame.len(), body.len() + FOOTER_BYTES);
        prop_assert_eq!(open(frame.clone()), Ok((footer, body)));
        let mut flipped = frame.clone();
        let bit = bit.index(frame.len() * 8);
        flipped[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(open(flipped).is_err());
        let short = frame[..cut.index(frame.len())].to_vec();
        prop_assert!(open(short).is_err());
    }
}
