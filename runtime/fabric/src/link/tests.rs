//! A link against a peer that sends whatever the test wants, byte by byte.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;
use crate::{Corruption, Refusal};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use tarazed_domain::Generation;
use tarazed_domain::limits::FRAME_PAYLOAD_BYTES_MAX;

const OWN: Identity = Identity {
    generation: Generation(5),
    rank: Rank(0),
    world_size: 3,
};
const PEER: Rank = Rank(1);
const DUE: Tag = Tag::new(TagKind::Probe, 3, 4);

fn pair() -> (Link, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let link = Link::new(near.into(), OWN, PEER, Arc::default(), Arc::default());
    (link, far)
}

fn header(payload: &[u8]) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Data,
        generation: OWN.generation,
        source: PEER,
        destination: OWN.rank,
        sequence: 0,
        tag: DUE,
        message_bytes: payload.len() as u64,
        offset: 0,
        payload_bytes: payload.len() as u64,
        payload_checksum: payload_checksum(payload),
    }
}

fn frame(header: &FrameHeader, payload: &[u8]) -> Vec<u8> {
    [&header.encode()[..], payload].concat()
}

/// Lets a fresh link receive `wire`, followed by the end of the stream, where one message of `expected` bytes is due.
fn received(wire: &[u8], expected: usize) -> (Result<Vec<u8>, FabricError>, Link) {
    let (mut link, mut far) = pair();
    far.write_all(wire).unwrap();
    drop(far);
    let mut buffer = vec![0; expected];
    let outcome = receive_all(&mut link, &mut buffer);
    (outcome.map(|()| buffer), link)
}

fn receive_all(link: &mut Link, buffer: &mut [u8]) -> Result<(), FabricError> {
    let mut receive = Receive {
        from: PEER,
        tag: DUE,
        bytes: buffer,
    };
    let mut incoming = Incoming::default();
    incoming.push(&mut receive);
    while incoming.due().is_some() {
        link.receive_step(&mut incoming)?;
    }
    Ok(())
}

/// The corruption that is reported, and its counter.
fn refused(header: &FrameHeader, payload: &[u8], refusal: Refusal) -> FabricError {
    let (outcome, link) = received(&frame(header, payload), 16);
    assert_eq!(link.judge.refusals().get(refusal), 1, "{outcome:?}");
    assert_eq!(link.judge.refusals().total(), 1);
    outcome.unwrap_err()
}

#[test]
fn every_single_bit_flip_of_a_frame_is_detected() {
    let payload: Vec<u8> = (0..16).collect();
    let good = frame(&header(&payload), &payload);
    assert_eq!(received(&good, 16).0, Ok(payload.clone()));
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let (outcome, link) = received(&bad, 16);
        assert!(
            matches!(
                outcome,
                Err(FabricError::Corrupt {
                    peer: PEER,
                    tag: DUE,
                    ..
                })
            ),
            "bit {bit}: {outcome:?}"
        );
        assert_eq!(link.judge.refusals().get(Refusal::FrameCorrupt), 1, "bit {bit}");
    }
}

#[test]
fn every_truncation_of_a_frame_is_a_lost_peer() {
    let payload: Vec<u8> = (0..16).collect();
    let good = frame(&header(&payload), &payload);
    for length in 0..good.len() {
        let outcome = received(&good[..length], 16).0;
        assert!(
            matches!(outcome, Err(FabricError::PeerLost { peer: PEER, .. })),
            "{length}: {outcome:?}"
        );
    }
}

// SUP-2, and the rest of what a well-made frame can have wrong.
#[test]
fn frames_that_are_not_due_are_refused_and_counted() {
    let payload = [7; 16];
    let good = header(&payload);
    let corrupt = |corruption| FabricError::Corrupt {
        peer: PEER,
        tag: DUE,
        corruption,
    };
    let case = |changed: FrameHeader, refusal| refused(&changed, &payload, refusal);
    for stale in [4, 6] {
        let changed = FrameHeader {
            generation: Generation(stale),
            ..good
        };
        assert_eq!(case(changed, Refusal::FrameGeneration), corrupt(Corruption::Generation));
    }
    for changed in [
        FrameHeader {
            source: Rank(2),
            ..good
        },
        FrameHeader {
            destination: Rank(2),
            ..good
        },
    ] {
        assert_eq!(case(changed, Refusal::FrameCorrupt), corrupt(Corruption::Misrouted));
    }
    let skipped = FrameHeader { sequence: 1, ..good };
    assert_eq!(case(skipped, Refusal::FrameSequence), corrupt(Corruption::Sequence));
    let shifted = FrameHeader { offset: 8, ..good };
    assert_eq!(case(shifted, Refusal::FrameSequence), corrupt(Corruption::Sequence));
    let oversized = FrameHeader {
        payload_bytes: 17,
        ..good
    };
    assert_eq!(case(oversized, Refusal::FrameOversized), corrupt(Corruption::Oversized));
    let huge = FrameHeader {
        payload_bytes: FRAME_PAYLOAD_BYTES_MAX as u64 + 1,
        ..good
    };
    assert_eq!(case(huge, Refusal::FrameOversized), corrupt(Corruption::Oversized));
    let empty = FrameHeader {
        payload_bytes: 0,
        ..good
    };
    assert_eq!(
        case(empty, Refusal::FrameOversized),
        corrupt(Corruption::Oversized),
        "no endless empty frames"
    );
    let longer = FrameHeader {
        message_bytes: u64::MAX,
        ..good
    };
    assert!(matches!(
        case(longer, Refusal::FrameUnexpected),
        FabricError::LengthMismatch { .. }
    ));
    let other = FrameHeader {
        tag: Tag { item: 5, ..DUE },
        ..good
    };
    assert!(matches!(
        case(other, Refusal::FrameUnexpected),
        FabricError::TagMismatch { .. }
    ));
}

#[test]
fn a_repeated_frame_is_refused() {
    let payload = [7; 16];
    let once = frame(&header(&payload), &payload);
    let (mut link, mut far) = pair();
    far.write_all(&once).unwrap();
    far.write_all(&once).unwrap();
    receive_all(&mut link, &mut [0; 16]).unwrap();
    let error = receive_all(&mut link, &mut [0; 16]).unwrap_err();
    assert_eq!(
        error,
        FabricError::Corrupt {
            peer: PEER,
            tag: DUE,
            corruption: Corruption::Sequence
        }
    );
    assert_eq!(link.judge.refusals().get(Refusal::FrameSequence), 1);
}

#[test]
fn a_message_may_come_in_frames_of_any_size() {
    let message: Vec<u8> = (0..100).collect();
    let mut wire = Vec::new();
    for (sequence, (start, end)) in [(0, 1), (1, 60), (60, 100)].into_iter().enumerate() {
        let payload = &message[start..end];
        let piece = FrameHeader {
            sequence: sequence as u64,
            message_bytes: 100,
            offset: start as u64,
            ..header(payload)
        };
        wire.extend(frame(&piece, payload));
    }
    assert_eq!(received(&wire, 100).0, Ok(message));
}

#[test]
fn only_what_is_due_is_read_from_the_socket() {
    let payload = [7; 16];
    let (mut link, mut far) = pair();
    far.write_all(&frame(&header(&payload), &payload)).unwrap();
    far.write_all(b"for later").unwrap();
    receive_all(&mut link, &mut [0; 16]).unwrap();
    let mut rest = [0; 64];
    let (_, unread) = rustix::net::recv(&link.socket, &mut rest[..], RecvFlags::DONTWAIT).unwrap();
    assert_eq!(&rest[..unread], b"for later");
}

#[test]
fn a_fault_passes_the_blame_on_and_never_to_oneself() {
    let cases = [(2, Rank(2)), (0, PEER), (3, PEER), (u64::MAX, PEER)];
    for (reported, blamed) in cases {
        let fault = FrameHeader {
            kind: FrameKind::Fault,
            tag: Tag::new(TagKind::Auxiliary, 0, reported),
            ..header(&[])
        };
        let (outcome, _) = received(&fault.encode(), 16);
        assert_eq!(outcome.unwrap_err().peer(), Some(blamed), "in the stream, {reported}");
        let (mut link, mut far) = pair();
        far.write_all(&fault.encode()).unwrap();
        drop(far);
        assert_eq!(
            link.look_at_hangup().unwrap_err().peer(),
            Some(blamed),
            "at the hang-up, {reported}"
        );
    }
}

#[test]
fn a_hangup_behind_early_data_is_no_verdict_and_a_goodbye_is_no_loss() {
    for (kind, presence) in [
        (FrameKind::Data, Presence::ClosedBehindData),
        (FrameKind::Goodbye, Presence::Left),
    ] {
        let (mut link, mut far) = pair();
        far.write_all(&FrameHeader { kind, ..header(&[]) }.encode()).unwrap();
        drop(far);
        link.look_at_hangup().unwrap();
        assert_eq!(link.presence(), presence);
    }
    let (mut link, far) = pair();
    drop(far);
    assert!(matches!(
        link.look_at_hangup(),
        Err(FabricError::PeerLost { peer: PEER, .. })
    ));
}

#[test]
fn what_a_link_sends_is_what_a_link_accepts() {
    let message: Vec<u8> = (0..3 * FRAME_BYTES_SENT_MAX + 5).map(|i| i as u8).collect();
    let (mut link, mut far) = pair();
    let wire = std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut wire = Vec::new();
            far.read_to_end(&mut wire).unwrap();
            wire
        });
        let mut out = Outgoing::default();
        out.push(DUE, &message);
        out.push(DUE, &[]);
        while out.due().is_some() {
            link.send_step(&mut out).unwrap();
        }
        assert_eq!(link.progress.sample().bytes_sent, message.len() as u64);
        drop(link);
        reader.join().unwrap()
    });
    assert_eq!(wire.len(), message.len() + 5 * HEADER_BYTES);
    // The other end of the pair, as the peer sees it.
    let peer = Identity { rank: PEER, ..OWN };
    let (near, mut far) = UnixStream::pair().unwrap();
    let mut link = Link::new(near.into(), peer, OWN.rank, Arc::default(), Arc::default());
    let writer = std::thread::spawn(move || far.write_all(&wire));
    let mut buffer = vec![0; message.len()];
    receive_all(&mut link, &mut buffer).unwrap();
    receive_all(&mut link, &mut []).unwrap();
    assert!(buffer == message);
    writer.join().unwrap().unwrap();
}
