//! What the hashes of an update cost: AdamW with both of them, one pass of hashes alone, and the same bytes copied, over a
//! state that no cache holds. Rounds alternate; the median of each counts.
//!
//! `cargo run --release -p tarazed-kernels --example adamw_bench [ELEMENTS]`

use std::error::Error;
use std::time::Instant;
use tarazed_domain::BlockIndex;
use tarazed_kernels::{AdamwStep, BlockHash, Blocks, CpuDevice, Device, OptimizerState, Precision, View, ViewMut};

const BLOCK_ELEMENTS: usize = 4096;
const ROUNDS: usize = 41;

fn main() -> Result<(), Box<dyn Error>> {
    let wanted = std::env::args()
        .nth(1)
        .map_or(Ok(3_150_000), |text| text.parse::<usize>())?;
    let count = wanted.div_ceil(BLOCK_ELEMENTS);
    let elements = count * BLOCK_ELEMENTS;
    let blocks = Blocks {
        first: BlockIndex(0),
        block_elements: BLOCK_ELEMENTS,
    };
    for device in CpuDevice::all_instruction_sets() {
        let mut stream = device.stream()?;
        let mut arrays = Vec::new();
        for seed in 0..5_usize {
            let mut array = device.alloc(elements, Precision::Working)?;
            for (index, value) in array.iter_mut().enumerate() {
                *value = ((index * 7919 + seed * 104_729) % 1000) as f32 / 500.0 - 1.0;
            }
            arrays.push(array);
        }
        let [gradient, master, first, second, working] = arrays.as_mut_slice() else {
            return Err("five arrays".into());
        };
        second.iter_mut().for_each(|value| *value = value.abs());
        let mut hashes = vec![BlockHash::default(); count];
        let mut times_ms: [Vec<f64>; 3] = Default::default();
        for round in 0..ROUNDS {
            let start = Instant::now();
            let (p, m, v) = (View::from(&*master), View::from(&*first), View::from(&*second));
            device.block_hashes(&mut stream, blocks, p, m, v, &mut hashes)?;
            times_ms[0].push(start.elapsed().as_secs_f64() * 1e3);
            let start = Instant::now();
            let step = AdamwStep {
                step: round as u64 + 1,
                learning_rate: 1e-3,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                gradient_scale: 0.5,
            };
            let state = OptimizerState {
                master: ViewMut::from(&mut *master),
                first_moment: ViewMut::from(&mut *first),
                second_moment: ViewMut::from(&mut *second),
            };
            let to = Some(ViewMut::from(&mut *working));
            let changed = device.adamw(
                &mut stream,
                &step,
                blocks,
                View::from(&*gradient),
                state,
                to,
                &mut hashes,
            )?;
            times_ms[1].push(start.elapsed().as_secs_f64() * 1e3);
            assert_eq!(changed, 0, "the update reads what was hashed");
            let start = Instant::now();
            device.copy(
                &mut stream,
                View::from(&*gradient),
                ViewMut::from(&mut *working),
                elements,
            )?;
            times_ms[2].push(start.elapsed().as_secs_f64() * 1e3);
        }
        let median = |times: &mut Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let [hash, update, copy] = times_ms.each_mut().map(median);
        println!(
            "{:10} {elements} elements: hashes alone {hash:.2} ms, update with both {update:.2} ms, copy of one array {copy:.2} ms",
            device.instruction_set()
        );
    }
    Ok(())
}
