//! A CUDA device over a recording driver, and a run of everything that it can do.

#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a test's own helpers")]

use Precision::{Full, Working};
use tarazed_domain::BlockIndex;
use tarazed_kernels::cuda::driver::Address;
use tarazed_kernels::cuda::graph::{GraphKey, Graphs};
use tarazed_kernels::cuda::recording::RecordingDriver;
use tarazed_kernels::cuda::snapshot::Snapshots;
use tarazed_kernels::cuda::{CudaBuffer, CudaDevice, CudaStream};
use tarazed_kernels::{
    AdamwStep, Attention, BlockHash, Blocks, Device, DeviceError, Embedding, Gemm, HeadLoss, Norm, OptimizerState,
    Precision, Rope, View, ViewMut,
};

pub type Buffer = CudaBuffer<RecordingDriver>;

pub struct Rig {
    pub recorder: RecordingDriver,
    pub device: CudaDevice<RecordingDriver>,
    pub stream: CudaStream<RecordingDriver>,
}

impl Rig {
    pub fn new() -> Self {
        let recorder = RecordingDriver::new();
        let device = CudaDevice::new(recorder.clone()).unwrap();
        let stream = device.stream().unwrap();
        Self {
            recorder,
            device,
            stream,
        }
    }

    pub fn buffer(&self, len: usize, precision: Precision) -> Buffer {
        self.device.alloc(len, precision).unwrap()
    }

    pub fn filled(&mut self, values: &[f32]) -> Buffer {
        let mut buffer = self.buffer(values.len(), Full);
        self.device
            .upload(&mut self.stream, values, (&mut buffer).into())
            .unwrap();
        buffer
    }

    pub fn values(&mut self, buffer: &Buffer, len: usize) -> Vec<f32> {
        let mut values = vec![f32::NAN; len];
        self.device
            .download(&mut self.stream, buffer.into(), &mut values)
            .unwrap();
        values
    }

    pub fn address(&self, buffer: &Buffer) -> Address {
        buffer.address()
    }
}

/// A small model's layer, its optimizer, a graph and a snapshot, and everything given back.
pub fn everything(recorder: &RecordingDriver) -> Result<(), DeviceError> {
    let device = CudaDevice::new(recorder.clone())?;
    let mut stream = device.stream()?;
    layer(&device, &mut stream)?;
    optimizer(&device, &mut stream)?;
    device.memory()?;
    device.measure(&mut stream, |_| Ok(()))?;
    device.synchronize(&mut stream)
}

const ROWS: usize = 6;
const WIDTH: usize = 8;

/// One after another, each over the outputs of those before.
pub struct Layer {
    pub x: Buffer,
    pub y: Buffer,
    pub wide: Buffer,
    pub inverse: Buffer,
    pub weight: Buffer,
    pub gradient: Buffer,
    pub angles: Buffer,
    pub losses: Buffer,
    pub logits: Buffer,
}

impl Layer {
    pub fn new(device: &CudaDevice<RecordingDriver>) -> Result<Self, DeviceError> {
        let working = |len| device.alloc(len, Working);
        let full = |len| device.alloc(len, Full);
        Ok(Self {
            x: working(ROWS * WIDTH)?,
            y: working(ROWS * WIDTH)?,
            wide: working(ROWS * 3 * WIDTH)?,
            inverse: full(ROWS)?,
            weight: working(3 * WIDTH * WIDTH)?,
            gradient: full(3 * WIDTH * WIDTH)?,
            angles: full(3 * 4)?,
            losses: full(ROWS * 2)?,
            logits: working(4 * WIDTH)?,
        })
    }

    /// Norm, product, rotation, attention, and the way back: device work alone.
    pub fn pass(
        &mut self,
        device: &CudaDevice<RecordingDriver>,
        stream: &mut CudaStream<RecordingDriver>,
    ) -> Result<(), DeviceError> {
        let norm = Norm {
            rows: ROWS,
            width: WIDTH,
            eps: 1e-5,
        };
        let attention = Attention {
            sequences: 2,
            context: 3,
            heads: 2,
            kv_heads: 2,
            head_dim: 4,
        };
        let rope = Rope {
            rows: ROWS,
            context: 3,
            heads: 4,
            head_dim: 4,
            stride: 3 * WIDTH,
        };
        let to = (ViewMut::from(&mut self.y), ViewMut::from(&mut self.inverse));
        device.rms_norm(stream, &norm, (&self.x).into(), None, (&self.weight).into(), to.0, to.1)?;
        let call = Gemm::forward(ROWS, 3 * WIDTH, WIDTH);
        let from = (View::from(&self.y), View::from(&self.weight));
        device.gemm(stream, &call, from.0, from.1, (&mut self.wide).into())?;
        device.rope(stream, &rope, (&self.angles).into(), false, (&mut self.wide).into())?;
        let to = (ViewMut::from(&mut self.y), ViewMut::from(&mut self.losses));
        device.attention(stream, &attention, (&self.wide).into(), to.0, to.1)?;
        let mut into_wide = ViewMut::from(&mut self.wide);
        let call = Gemm::weight_gradient(3 * WIDTH, WIDTH, ROWS);
        let from = (into_wide.read(), View::from(&self.y));
        device.gemm(stream, &call, from.0, from.1, (&mut self.gradient).into())?;
        device.zero(stream, into_wide.further(1), 5)?;
        let to = (ViewMut::from(&mut self.x), ViewMut::from(&mut self.gradient));
        let kept = (View::from(&self.y), View::from(&self.inverse), View::from(&self.weight));
        device.rms_norm_backward(stream, &norm, kept.0, kept.1, kept.2, (&self.y).into(), to.0, to.1)
    }
}

fn layer(device: &CudaDevice<RecordingDriver>, stream: &mut CudaStream<RecordingDriver>) -> Result<(), DeviceError> {
    let mut layer = Layer::new(device)?;
    let mut tokens = device.alloc_tokens(ROWS)?;
    device.upload_tokens(stream, &[1; ROWS], &mut tokens)?;
    device.upload(stream, &[0.5; 3 * WIDTH * WIDTH], (&mut layer.weight).into())?;
    let embedding = Embedding {
        tokens: ROWS,
        vocabulary: WIDTH,
        width: WIDTH,
    };
    device.embed(
        stream,
        &embedding,
        (&layer.weight).into(),
        &tokens,
        (&mut layer.x).into(),
    )?;
    let mut graphs = Graphs::default();
    for _ in 0..3 {
        let key = GraphKey::default().size(ROWS).buffer(&layer.gradient);
        graphs.run(device, stream, key, |stream| layer.pass(device, stream))?;
    }
    let head = HeadLoss {
        rows: ROWS,
        width: WIDTH,
        vocabulary: WIDTH,
        chunk_rows: 4,
        gradient_scale: 1.0,
    };
    let gradients = Some((ViewMut::from(&mut layer.y), ViewMut::from(&mut layer.gradient)));
    let (hidden, weight) = (View::from(&layer.x), View::from(&layer.weight));
    let losses = ViewMut::from(&mut layer.losses);
    device.head_loss(
        stream,
        &head,
        &tokens,
        hidden,
        weight,
        &mut layer.logits,
        losses,
        gradients,
    )?;
    device.download(stream, (&layer.losses).into(), &mut [0.0; ROWS])
}

fn optimizer(
    device: &CudaDevice<RecordingDriver>,
    stream: &mut CudaStream<RecordingDriver>,
) -> Result<(), DeviceError> {
    let full = || device.alloc(64, Full);
    let (gradient, mut master, mut first, mut second) = (full()?, full()?, full()?, full()?);
    let mut snapshots = Snapshots::new(device)?;
    let snapshot = snapshots.begin(stream, &[((&master).into(), 64), ((&first).into(), 64)])?;
    let blocks = Blocks {
        first: BlockIndex(0),
        block_elements: 32,
    };
    let step = AdamwStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.0,
        gradient_scale: 1.0,
        step: 1,
    };
    device.square_sums(stream, (&gradient).into(), 32, &mut [0.0; 2])?;
    snapshot.precedes(stream)?;
    let mut hashes = [BlockHash::default(); 2];
    let state = OptimizerState {
        master: (&mut master).into(),
        first_moment: (&mut first).into(),
        second_moment: (&mut second).into(),
    };
    device.adamw(stream, &step, blocks, (&gradient).into(), state, None, &mut hashes)?;
    snapshots.recycle(snapshot)?;
    let mut again = snapshots.begin(stream, &[((&master).into(), 64)])?;
    again.full(0)?;
    Ok(())
}
