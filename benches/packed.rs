//! Quantized checkpoints, on one thread: how fast weights become integers in groups, and these, or weights,
//! the bytes of a layout.
//!
//! `cargo bench --profile release --bench packed` shows megabytes of F32 weights in a second. Arguments name
//! rows of the table instead of all.

use std::hint::black_box;
use std::time::Instant;

use qconv::container::grouped::Rows;
use qconv::packed::write::{
    Awq, Bnb4, Bnb8, Compressed, CompressedFp8, Data, Fp8, Gptq, Grid, Layout, Mxfp4, round, weigh,
};

const ROWS: u64 = 256;
const COLS: u64 = 4096;

fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

/// One row of the table, where it is asked for: the best of some runs.
fn show(wanted: &[String], name: &str, mut run: impl FnMut()) {
    if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
        return;
    }
    let once = |_| {
        let begun = Instant::now();
        run();
        begun.elapsed().as_secs_f64()
    };
    let seconds = (0..7).map(once).fold(f64::INFINITY, f64::min);
    println!("{name:<32}{:>9.0} MB/s", (ROWS * COLS * 4) as f64 / seconds / 1e6);
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test --benches` runs this too, to see that it starts.
    if !args.iter().any(|a| a == "--bench") {
        return;
    }
    let wanted: Vec<String> = args.into_iter().filter(|a| !a.starts_with('-')).collect();
    let weights = noise((ROWS * COLS) as usize);
    let importance: Vec<f32> = noise(COLS as usize).iter().map(|x| x * x).collect();
    let mut rows = Rows::default();
    for (bits, symmetric) in [(4, true), (4, false), (8, true), (2, false)] {
        for group_size in [Some(128), None] {
            let grid = Grid { levels: 1 << bits, group_size, symmetric, least_zero: 0 };
            let kind = if symmetric { "symmetric" } else { "with zeros" };
            let group = group_size.map_or("of a row".to_string(), |n| format!("of {n}"));
            let name = format!("{bits} bits {kind}, {group}");
            show(&wanted, &format!("round {name}"), || round(&grid, &weights, COLS, &mut rows).unwrap());
            let mut weighed = || weigh(&grid, &weights, COLS, &importance, &mut rows).unwrap();
            show(&wanted, &format!("weigh {name}"), &mut weighed);
        }
    }
    let grid = |bits: u32| Grid { levels: 1 << bits, group_size: Some(128), symmetric: false, least_zero: 1 };
    let gptq = |bits| Gptq { grid: grid(bits), first_version: true };
    let compressed = |bits, bytes| Compressed { grid: grid(bits), bytes, act_order: false };
    let bnb = |fp4| Bnb4 { fp4, compute: "float16".to_string(), nested: None };
    let layouts: [(&str, Box<dyn Layout>); 13] = [
        ("gptq 4 bits", Box::new(gptq(4))),
        ("gptq 3 bits", Box::new(gptq(3))),
        ("gptq 8 bits", Box::new(gptq(8))),
        ("awq", Box::new(Awq { grid: grid(4) })),
        ("compressed-tensors 4 bits", Box::new(compressed(4, false))),
        ("compressed-tensors 8 bits", Box::new(compressed(8, false))),
        ("compressed-tensors int8", Box::new(compressed(8, true))),
        ("compressed-tensors fp8", Box::new(CompressedFp8)),
        ("bnb nf4", Box::new(bnb(false))),
        ("bnb fp4", Box::new(bnb(true))),
        ("bnb int8", Box::new(Bnb8)),
        ("fp8 in blocks", Box::new(Fp8 { block: [128, 128] })),
        ("mxfp4", Box::new(Mxfp4)),
    ];
    for (name, layout) in &layouts {
        let data = match layout.grid() {
            Some(grid) => {
                round(grid, &weights, COLS, &mut rows).unwrap();
                Data::Integers(&rows)
            }
            None => Data::Weights(&weights),
        };
        let mut sum = 0u64;
        let mut put = |part: usize, offset: u64, bytes: &[u8]| {
            sum = black_box(sum + part as u64 + offset + u64::from(black_box(bytes)[0]));
            Ok(())
        };
        show(&wanted, &format!("write {name}"), || {
            black_box(layout.write([ROWS, COLS], 0, data, &mut put).unwrap());
        });
    }
}
