//! The table against the sources that it describes.

use super::*;
use crate::device::{Attention, CrossEntropy, DeviceError, Norm, Rope};

/// Every entry is defined in its source with parameters of the table's types and names, in the table's order.
#[test]
fn sources_declare_what_the_table_says() {
    for entry in ENTRIES {
        let declared = declared(entry);
        let expected: Vec<String> = entry.arguments.iter().map(parameter).collect();
        assert_eq!(declared, expected, "{}", entry.name);
    }
}

/// Parameters of the kernel in its source: `KERNEL(name, threads, blocks)(parameters)`.
fn declared(entry: &Entry) -> Vec<String> {
    let text = entry.source.text;
    let start = format!("KERNEL({},", entry.name);
    let (_, after) = text
        .split_once(&start)
        .unwrap_or_else(|| panic!("{} has no {start}", entry.source.file));
    let (_, after) = after.split_once(")(").expect("a list of parameters");
    let (parameters, _) = after.split_once(')').expect("its end");
    let one = |parameter: &str| parameter.split_whitespace().collect::<Vec<_>>().join(" ");
    parameters.split(',').map(one).collect()
}

fn parameter(argument: &Argument) -> String {
    let kind = match argument.kind {
        Kind::U32 => "u32".to_owned(),
        Kind::U64 => "u64".to_owned(),
        Kind::F32 => "float".to_owned(),
        Kind::Pointer { element, access, .. } => {
            let element = match element {
                Element::Bf16 => "bf16",
                Element::F32 => "float",
                Element::F64 => "double",
                Element::U32 => "u32",
                Element::U64 => "u64",
            };
            let constant = if access == Access::Read { "const " } else { "" };
            format!("{constant}{element}*")
        }
    };
    format!("{kind} {}", argument.name)
}

#[test]
fn attention_s_tiles_are_those_of_its_sources() {
    let text = HEADERS
        .iter()
        .find(|header| header.file == "attention.cuh")
        .expect("it is there")
        .text;
    for tiles in &ATTENTION_TILES {
        let tiling = |name: &str, [warps, own, others]: [u32; 3]| {
            format!("    using {name} = Tiling<{warps}, {own}, {others}>;\n")
        };
        let expected = format!(
            "template <> struct Tilings<{}> {{\n{}{}{}}};",
            tiles.head_dim,
            tiling("Forward", tiles.forward),
            tiling("Keys", tiles.keys),
            tiling("Queries", tiles.queries),
        );
        assert!(text.contains(&expected), "attention.cuh has not:\n{expected}");
    }
}

#[test]
fn no_launch_asks_for_more_than_a_card_gives() {
    for tiles in &ATTENTION_TILES {
        for bytes in [tiles.forward_bytes(), tiles.keys_bytes(), tiles.queries_bytes()] {
            assert!(bytes <= SHARED_BYTES_MAX, "{tiles:?}: {bytes}");
        }
    }
    assert!(LOGITS_KEPT_BYTES <= SHARED_BYTES_MAX as usize);
}

proptest::proptest! {
    /// Runs cover the rows, and none is empty.
    #[test]
    fn partials_of_a_norm_cover_its_rows(rows in 0_usize..1 << 20) {
        let (partials, each) = norm_partials(rows);
        assert!(partials * each >= rows && partials <= NORM_PARTIALS_MAX);
        assert!(partials == 0 || (partials - 1) * each < rows);
        assert!(each % NORM_CHUNKS == 0);
    }

    /// A norm's rows fit their threads: as many chunks for each as the kernel has registers for, or shared memory for all.
    #[test]
    fn rows_of_a_norm_fit_their_threads(width in 1_usize..NORM_ELEMENTS_MAX + 1) {
        let launch = rms_norm_backward(&Norm { rows: 1, width, eps: 1e-5 }).unwrap();
        let of_thread = width.div_ceil(CHUNK).div_ceil(launch.block[0] as usize);
        if launch.entry == &RMS_NORM_BACKWARD {
            assert!(of_thread <= 2 && launch.shared_bytes == 0);
        } else {
            assert!(width > 8192 && launch.shared_bytes as usize >= width * size_of::<f32>());
        }
    }
}

#[test]
fn values_are_checked_against_their_kinds() {
    let bf16 = RMS_NORM.arguments[0].kind;
    assert!(Value::Pointer(2).fits(bf16) && !Value::Pointer(3).fits(bf16) && !Value::Pointer(0).fits(bf16));
    assert!(Value::Pointer(0).fits(RMS_NORM.arguments[1].kind));
    assert!(!Value::U32(1).fits(bf16) && !Value::U64(1).fits(Kind::U32));
}

/// Whether a source or header has this very line.
fn has_line(file: &str, line: &str) -> bool {
    let all = SOURCES.into_iter().chain(&HEADERS);
    let text = all
        .filter(|source| source.file == file)
        .map(|source| source.text)
        .next()
        .expect("it is there");
    text.lines().any(|other| other == line)
}

/// Numbers that launches and kernels must agree on.
#[test]
fn sizes_are_those_of_the_sources() {
    for (file, name, value) in [
        ("common.cuh", "u32 CHUNK", CHUNK),
        ("pointwise.cu", "u32 ELEMENT_THREADS", THREADS),
        ("pointwise.cu", "u32 ELEMENT_QUADS", CHUNK / 4),
        ("pointwise.cu", "u32 SORTED", SORTED),
        ("rows.cu", "u32 NORM_CHUNKS", NORM_CHUNKS),
        ("rows.cu", "u32 SECTOR", SECTOR),
        ("rows.cu", "u32 STRANDS", STRANDS),
        ("optimizer.cu", "u64 OPTIMIZER_TILE", OPTIMIZER_TILE),
        ("optimizer.cu", "u32 THREADS", THREADS),
        ("platform.cuh", "u32 WARP", WARP),
    ] {
        let line = format!("constexpr {name} = {value};");
        assert!(has_line(file, &line), "{file} has not: {line}");
    }
}

/// Lanes for each token of [`ATTENTION_DELTA`]: the launch and the kernel have one rule.
#[test]
fn delta_s_lanes_are_those_of_its_source() {
    let [few, most] = [1, HEAD_ELEMENTS_MAX].map(|head_dim| THREADS / delta_tokens(head_dim));
    let rule = format!("return head_dim <= {few} * CHUNK ? {few} : {most};");
    let line = format!("DEVICE u32 delta_lanes(u32 head_dim) {{ {rule} }}");
    assert!(
        has_line("attention_backward.cu", &line),
        "attention_backward.cu has not: {line}"
    );
    for head_dim in 1..=HEAD_ELEMENTS_MAX {
        let lanes = if head_dim <= few * CHUNK { few } else { most };
        assert_eq!(delta_tokens(head_dim) * lanes, THREADS, "{head_dim}");
    }
}

/// No launch has more threads than its kernel is compiled for.
#[test]
fn blocks_keep_the_bounds_of_their_kernels() {
    let norm = Norm {
        rows: 1,
        width: 1 << 14,
        eps: 1e-5,
    };
    let rotation = Rope {
        rows: 1,
        context: 1,
        heads: 80,
        head_dim: 128,
        stride: 1 << 14,
    };
    let loss = CrossEntropy {
        rows: 1,
        vocabulary: 1 << 18,
        target_offset: 0,
        gradient_scale: Some(1.0),
    };
    let narrow = Norm { width: 1 << 13, ..norm };
    let mut launches = vec![
        rope(&rotation),
        embed(1, 1 << 14),
        embed_sort(1),
        embed_order(1),
        embed_backward(1, 1 << 14),
        rms_norm(&norm),
        rms_norm_backward(&narrow),
        rms_norm_backward(&norm),
        rms_norm_weight_gradient(&norm),
        cross_entropy(&loss),
        square_sums(1),
        swiglu(&SWIGLU, 1, 1 << 14),
        swiglu(&SWIGLU_BACKWARD, 1, 1 << 14),
        optimizer(&ADAMW, 1, 1 << 14),
        optimizer(&BLOCK_HASHES, 1, 1 << 14),
    ];
    for entry in [&CONVERT_F32_BF16, &CONVERT_BF16_F32, &ADD_F32, &ADD_BF16, &ADD_F32_BF16] {
        launches.push(elementwise(entry, 1 << 14));
    }
    for head_dim in [32, 64, 128] {
        let call = Attention {
            sequences: 1,
            context: 1 << 14,
            heads: 1,
            kv_heads: 1,
            head_dim,
        };
        launches.extend([attention(&call), attention_keys(&call), attention_queries(&call)]);
        if head_dim == 32 {
            launches.push(attention_delta(&call));
            launches.push(attention_group_sums(&Attention { heads: 2, ..call }));
        }
    }
    assert_eq!(launches.len(), ENTRIES.len());
    for launch in launches {
        let launch = launch.expect("a shape that is possible");
        let (_, after) = launch
            .entry
            .source
            .text
            .split_once(&format!("KERNEL({}, ", launch.entry.name))
            .expect("it is there");
        let bound: u32 = after.split(',').next().expect("a bound").parse().expect("a number");
        assert!(launch.block.iter().product::<u32>() <= bound, "{launch:?}");
    }
}

/// `limits.toml` names every kernel and no other.
#[test]
fn every_kernel_has_limits() {
    let limits: toml::Table = include_str!("../../../cuda/limits.toml").parse().expect("it is TOML");
    let mut named: Vec<&str> = limits["kernel"]
        .as_table()
        .expect("a table")
        .keys()
        .map(String::as_str)
        .collect();
    let mut expected: Vec<&str> = ENTRIES.iter().map(|entry| entry.name).collect();
    named.sort_unstable();
    expected.sort_unstable();
    assert_eq!(named, expected);
}

proptest::proptest! {
    /// Blocks of threads cover what they work on, and the last one has work.
    #[test]
    fn launches_cover_their_tensors(len in 1_usize..1 << 40, tokens in 1_usize..1 << 20) {
        let cover = |blocks: u32, each: usize, all: usize| {
            blocks as usize * each >= all && (blocks as usize - 1) * each < all
        };
        assert!(cover(elementwise(&ADD_F32, len).unwrap().grid[0], THREADS * CHUNK, len));
        let block = len % (1 << 28) + 1;
        assert!(cover(optimizer(&ADAMW, 1, block).unwrap().grid[1], OPTIMIZER_TILE, block));
        for head_dim in [1, 33, 128] {
            let call = Attention { sequences: 1, context: tokens, heads: 2, kv_heads: 1, head_dim };
            let tiles = &ATTENTION_TILES[head_size("attention", &call).unwrap()];
            assert!(cover(attention(&call).unwrap().grid[0], tiles.forward[1] as usize, tokens));
            assert!(cover(attention_keys(&call).unwrap().grid[0], tiles.keys[1] as usize, tokens));
            assert!(cover(attention_queries(&call).unwrap().grid[0], tiles.queries[1] as usize, tokens));
            assert!(cover(attention_delta(&call).unwrap().grid[0], delta_tokens(head_dim), tokens));
        }
    }
}

#[test]
fn what_no_grid_holds_is_refused() {
    let call = Attention {
        sequences: 65_536,
        context: 8,
        heads: 1,
        kv_heads: 1,
        head_dim: 64,
    };
    assert!(matches!(attention(&call), Err(DeviceError::Unsupported { .. })));
    let wide = Attention {
        sequences: 1,
        head_dim: 129,
        ..call
    };
    assert!(matches!(attention_keys(&wide), Err(DeviceError::Unsupported { .. })));
    assert!(elementwise(&ADD_F32, 0).expect("nothing to do").is_empty());
}
