//! Bytes from sockets.

/// The data plane's frame headers, and the judge that believes them.
pub mod frame {
    use std::sync::Arc;
    use tarazed_domain::{Generation, Rank};
    use tarazed_fabric::{
        FabricError, FrameHeader, FrameKind, HEADER_BYTES, Identity, Judge, RefusalCounters, Tag, TagKind, fuzzing,
    };

    const DUE_BYTES: usize = 1 << 20;

    const fn own() -> Identity {
        Identity {
            generation: Generation(3),
            rank: Rank(0),
            world_size: 4,
        }
    }

    const fn due() -> Tag {
        Tag::new(TagKind::Barrier, 5, 6)
    }

    fn header(sequence: u64) -> FrameHeader {
        FrameHeader {
            kind: FrameKind::Data,
            generation: Generation(3),
            source: Rank(1),
            destination: Rank(0),
            sequence,
            tag: due(),
            message_bytes: DUE_BYTES as u64,
            offset: 0,
            payload_bytes: 4_096,
            payload_checksum: 1,
        }
    }

    /// A stream of headers, each as it is and under a right checksum.
    ///
    /// # Panics
    /// If something that must hold does not.
    pub fn run(data: &[u8]) {
        let counters = Arc::new(RefusalCounters::default());
        let mut judge = Judge::new(own(), Rank(1), Arc::clone(&counters));
        for piece in data.chunks_exact(HEADER_BYTES) {
            let mut bytes = [0; HEADER_BYTES];
            bytes.copy_from_slice(piece);
            let mut sealed = bytes;
            fuzzing::seal_header(&mut sealed);
            for bytes in [bytes, sealed] {
                if let Ok(header) = FrameHeader::decode(&bytes) {
                    assert_eq!(header.encode(), bytes, "one header, one spelling");
                }
                let before = counters.total();
                let judged = judge.header(&bytes, due(), DUE_BYTES, 0);
                let counted = counters.total() - before;
                match judged {
                    Ok(payload) => assert!(payload.bytes <= DUE_BYTES && counted == 0),
                    Err(
                        FabricError::Corrupt { .. }
                        | FabricError::TagMismatch { .. }
                        | FabricError::LengthMismatch { .. },
                    ) => {
                        assert_eq!(counted, 1, "what is refused is counted once");
                    }
                    Err(_) => assert_eq!(counted, 0, "a peer that is gone refused nothing"),
                }
            }
        }
    }

    /// Headers that are due, one of each kind.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let of = |kind| FrameHeader { kind, ..header(0) }.encode().to_vec();
        let two = [header(0).encode(), header(1).encode()].concat();
        vec![of(FrameKind::Data), of(FrameKind::Goodbye), of(FrameKind::Fault), two]
    }
}

/// The data plane's handshake.
pub mod handshake {
    /// One message of it.
    pub fn run(data: &[u8]) {
        tarazed_fabric::fuzzing::handshake(data);
    }

    /// Good messages.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        tarazed_fabric::fuzzing::handshake_seeds()
    }
}

/// The control link's envelopes.
#[cfg(feature = "all")]
pub mod envelope {
    /// One frame.
    pub fn run(data: &[u8]) {
        tarazed_actors::link::fuzzing::envelope(data);
    }

    /// Good frames.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        tarazed_actors::link::fuzzing::envelope_seeds()
    }
}

/// The control link's handshake.
#[cfg(feature = "all")]
pub mod link_handshake {
    use std::cell::OnceCell;
    use tokio::runtime::{Builder, Runtime};

    thread_local! {
        static RUNTIME: OnceCell<Runtime> = const { OnceCell::new() };
    }

    /// All that one side sends.
    ///
    /// # Panics
    /// If a side without the token is believed.
    pub fn run(data: &[u8]) {
        RUNTIME.with(|runtime| {
            let made = runtime.get_or_init(|| Builder::new_current_thread().build().expect("a runtime"));
            made.block_on(tarazed_actors::link::fuzzing::handshake(data));
        });
    }

    /// Beginnings.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        tarazed_actors::link::fuzzing::handshake_seeds()
    }
}
