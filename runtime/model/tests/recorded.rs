//! The passes over a driver that writes every call down: what is asked before a run starts is what a step asks for.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::atomic::AtomicBool;
use tarazed_domain::config::{Config, ModelConfig};
use tarazed_kernels::cuda::driver::Severity;
use tarazed_kernels::cuda::recording::{Call, RecordingDriver};
use tarazed_kernels::cuda::table::Launch;
use tarazed_kernels::cuda::{CudaDevice, shapes};
use tarazed_kernels::{Device, DeviceError, Precision};
use tarazed_model::{Model, ModelError, parameter_layout};

const SEQUENCES: usize = 3;

/// The small model of the other tests, and one whose head is done in several runs of rows, the last one shorter.
fn models() -> [ModelConfig; 2] {
    let many = ModelConfig {
        context: 50,
        vocabulary: 1 << 14,
        ..common::config()
    };
    [common::config(), many]
}

fn recorded(config: &ModelConfig) -> (RecordingDriver, Model<CudaDevice<RecordingDriver>>, usize) {
    let recorder = RecordingDriver::new();
    let device = CudaDevice::new(recorder.clone()).unwrap();
    let layout = parameter_layout(config, common::BLOCK_ELEMENTS);
    let model = Model::new(config, &layout, device).unwrap();
    (recorder, model, layout.flat_elements())
}

fn pass(model: &Model<CudaDevice<RecordingDriver>>, config: &ModelConfig, elements: usize) {
    let device = model.device();
    let mut workspace = model.workspace(SEQUENCES).unwrap();
    let weights = device.alloc(elements, Precision::Working).unwrap();
    let mut gradients = device.alloc(elements, Precision::Full).unwrap();
    let tokens = common::tokens(config, SEQUENCES, 3);
    let abort = AtomicBool::new(false);
    model
        .forward_backward(&weights, &mut gradients, &mut workspace, &tokens, 1.0, &abort)
        .unwrap();
    model.losses(&weights, &mut workspace, &tokens, &abort).unwrap();
}

#[test]
fn no_product_is_planned_in_a_step_and_none_in_vain() {
    for config in models() {
        let (_, model, elements) = recorded(&config);
        model.prepare(SEQUENCES).unwrap();
        let keys = || {
            model
                .device()
                .plans()
                .into_iter()
                .map(|(key, _)| key)
                .collect::<Vec<_>>()
        };
        let prepared = keys();
        pass(&model, &config, elements);
        assert_eq!(prepared, keys(), "planned in the step: {config:?}");

        let (_, model, elements) = recorded(&config);
        pass(&model, &config, elements);
        let used: Vec<_> = model.device().plans().into_iter().map(|(key, _)| key).collect();
        assert_eq!(prepared, used, "prepared and not used: {config:?}");
    }
}

#[test]
fn a_product_without_an_algorithm_is_refused_before_a_step() {
    let config = common::config();
    let (recorder, model, _) = recorded(&config);
    recorder.fail(recorder.asked().len(), Severity::Refused);
    let refused = model.prepare(SEQUENCES).unwrap_err();
    assert!(
        matches!(
            &refused,
            ModelError::Device(DeviceError::Unsupported { operation: "gemm", .. })
        ),
        "{refused}"
    );
    let text = refused.to_string();
    assert!(
        text.contains("batch.micro_batch_sequences") && text.contains("cluster.device"),
        "{text}"
    );
}

/// Each launch of a pass is one that the check before a run asked for, as large or larger.
#[test]
fn every_launch_of_a_pass_was_asked_for() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/quickstart.toml");
    let mut config = Config::load(&path, &[]).unwrap();
    config.batch.micro_batch_sequences = SEQUENCES as u32;
    config.optimizer.block_elements = common::BLOCK_ELEMENTS;
    for model_config in models() {
        config.model = model_config;
        let (recorder, model, elements) = recorded(&config.model);
        pass(&model, &config.model, elements);
        let asked: Vec<Launch> = shapes::launches(&config)
            .into_iter()
            .map(|r| r.launch.unwrap())
            .collect();
        let launched: Vec<Launch> = recorder
            .take()
            .iter()
            .filter_map(|call| match call {
                Call::Launch(_, launch, _) => Some(*launch),
                _ => None,
            })
            .collect();
        assert!(launched.len() > 20, "{}", launched.len());
        for launch in launched {
            let covers = |asked: &Launch| {
                asked.entry == launch.entry
                    && asked.block == launch.block
                    && asked.shared_bytes == launch.shared_bytes
                    && asked.grid.iter().zip(launch.grid).all(|(&most, grid)| grid <= most)
            };
            assert!(asked.iter().any(covers), "{launch:?}");
        }
    }
}
