//! Bytes from object stores.

/// Manifests.
pub mod manifest {
    use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
    use tarazed_store::{
        BinaryId, CommitRef, Digest, Lineage, Manifest, ObjectRecord, ShardGeometry, ShardRecord, TraceHead, WriterId,
        WriterNonce,
    };

    const HEADER_BYTES: usize = 56;

    /// Any bytes as a manifest, and their tail as an archive behind a right header.
    ///
    /// # Panics
    /// If something that must hold does not.
    pub fn run(data: &[u8]) {
        check(data);
        if let Some(archive) = data.get(HEADER_BYTES..) {
            let mut sealed = b"TZMANIF1".to_vec();
            sealed.extend_from_slice(&1_u32.to_le_bytes());
            sealed.extend_from_slice(&0_u32.to_le_bytes());
            sealed.extend_from_slice(&(archive.len() as u64).to_le_bytes());
            sealed.extend_from_slice(blake3::hash(archive).as_bytes());
            sealed.extend_from_slice(archive);
            check(&sealed);
        }
    }

    fn check(bytes: &[u8]) {
        let Ok(manifest) = Manifest::decode("a-key", bytes) else {
            return;
        };
        // What restoring asks of a manifest that was believed.
        let _no_overflow = manifest.shard_bytes();
        for record in &manifest.shards {
            let geometry = manifest.geometry(record.shard).expect("a shard that is listed");
            assert!(geometry.payload_bytes() < record.object.length && geometry.first_element() < u64::MAX / 4);
        }
        let written = manifest.encode().expect("what was read can be written");
        assert_eq!(Manifest::decode("a-key", &written).ok(), Some(manifest));
    }

    fn sample(libraries: &[&str], parent: bool) -> Manifest {
        let digest = Digest::of(b"x");
        let shard = |index: u32, first_block, block_count: u32| {
            let geometry = ShardGeometry {
                shard: OptimizerShardIndex(index),
                first_block,
                block_count,
                block_elements: 4,
            };
            let object = ObjectRecord {
                key: format!("shards/{:020}/{:020}-w-{index:06}-000000.safetensors", 20, 3),
                length: 1_000,
                blake3: digest,
            };
            ShardRecord::new(&geometry, object)
        };
        let reference = CommitRef {
            sequence: 1,
            step: StepsCompleted(10),
            record: digest,
        };
        Manifest {
            run: digest,
            step: StepsCompleted(20),
            generation: Generation(3),
            writer: WriterId {
                nonce: WriterNonce([7; 16]),
                generation: Generation(2),
            },
            block_elements: 4,
            block_count: 3,
            shard_count: 2,
            layout: digest,
            data: digest,
            shards: vec![shard(0, 0, 2), shard(1, 2, 1)],
            decisions: b"[]".to_vec(),
            trace_head: TraceHead {
                step: StepsCompleted(20),
                length_bytes: 100,
                blake3: digest,
                last_line: r#"{"step":20}"#.into(),
            },
            binary: BinaryId {
                version: "0.1.0".into(),
                build: "a-build-of-the-program".into(),
                libraries: libraries.iter().map(ToString::to_string).collect(),
            },
            device_type: "cpu-f32".into(),
            lineage: Lineage {
                parent: parent.then_some(reference),
                restored_from: parent.then_some(reference),
                declared: if parent { "another binary".into() } else { String::new() },
            },
            created_unix_ms: 1,
            rollback_reach_steps: parent.then_some(290),
        }
    }

    /// Two manifests.
    ///
    /// # Panics
    /// If one cannot be written.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let samples = [sample(&[], false), sample(&["cublasLt 13.1", "z"], true)];
        samples
            .iter()
            .map(|sample| sample.encode().expect("a manifest"))
            .collect()
    }
}

/// Commit records.
pub mod record {
    use tarazed_domain::{Generation, StepsCompleted};
    use tarazed_store::{CommitRecord, Digest, RecordKind, WriterNonce};

    const SEQUENCE: u64 = 5;

    /// Any bytes as a record, and their first line under a right seal.
    ///
    /// # Panics
    /// If a record is believed that would not be written so.
    pub fn run(data: &[u8]) {
        check(data);
        let line = data.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let seal = format!("\n{{\"blake3\":\"{}\"}}\n", blake3::hash(line).to_hex());
        check(&[line, seal.as_bytes()].concat());
    }

    fn check(bytes: &[u8]) {
        if let Ok(record) = CommitRecord::decode(SEQUENCE, bytes) {
            assert_eq!(record.encode().ok().as_deref(), Some(bytes), "one record, one spelling");
        }
    }

    /// One of each kind.
    ///
    /// # Panics
    /// If one cannot be written.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let digest = Digest::of(b"x");
        let kinds = [
            RecordKind::Fence {},
            RecordKind::Commit {
                manifest: "manifests/a-key".into(),
                length: 9,
                blake3: digest,
                step: StepsCompleted(20),
                shard_count: 2,
                shard_bytes: 2_000,
                created_unix_ms: 1,
            },
            RecordKind::Retire { sequences: vec![1, 2] },
            RecordKind::Pin {
                sequence: 1,
                note: "kept for \"A\"".into(),
            },
            RecordKind::Unpin { sequence: 1 },
        ];
        let record = |kind| CommitRecord::new(SEQUENCE, digest, WriterNonce([7; 16]), Generation(3), kind);
        kinds.map(|kind| record(kind).encode().expect("a record")).to_vec()
    }
}

/// Headers of checkpoint shards.
pub mod shard_header {
    use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
    use tarazed_store::{ShardGeometry, check_header, encode_header};

    const STEP: StepsCompleted = StepsCompleted(20);

    const fn geometry() -> ShardGeometry {
        ShardGeometry {
            shard: OptimizerShardIndex(1),
            first_block: 2,
            block_count: 2,
            block_elements: 3,
        }
    }

    /// Any bytes as a header, and their tail behind a right length.
    pub fn run(data: &[u8]) {
        let _mostly_refused = check_header(data, STEP, &geometry());
        if let Some(json) = data.get(8..) {
            let sealed = [&(json.len() as u64).to_le_bytes(), json].concat();
            let _mostly_refused = check_header(&sealed, STEP, &geometry());
        }
    }

    /// The right one, and one of another step.
    ///
    /// # Panics
    /// If one cannot be written.
    #[must_use]
    pub fn seeds() -> Vec<Vec<u8>> {
        let of = |step| encode_header(step, Generation(3), &geometry()).expect("a header");
        vec![of(STEP), of(StepsCompleted(21))]
    }
}
