//! Quantized checkpoints, on one thread: how fast weights become integers in groups, and these, or weights,
//! the bytes of a layout.
//!
//! `cargo bench --profile release --bench packed` shows megabytes of F32 weights in a second. Arguments name
//! rows of the table instead of all.

#[path = "common/timing.rs"]
mod timing;

use std::hint::black_box;
use std::sync::Arc;

use qconv::block::uniform::TERNARY;
use qconv::container::grouped::Rows;
use qconv::container::qpack::Trits;
use qconv::packed::write::{
    Awq, Bnb4, Bnb8, Compressed, CompressedFp8, Data, Format, Fp8, Gptq, Grid, Layout, Mxfp4, QpackEncoding,
    Target, round, weigh,
};
use timing::{Table, noise};

const ROWS: u64 = 256;
const COLS: u64 = 4096;

fn main() {
    let Some(table) = Table::of_args() else { return };
    let show =
        |name: &str, run: &mut dyn FnMut()| table.show(name, "MB", (ROWS * COLS * 4) as f64 / 1e6, run);
    let weights = noise((ROWS * COLS) as usize);
    let importance: Vec<f32> = noise(COLS as usize).iter().map(|x| x * x).collect();
    let mut rows = Rows::default();
    for (levels, symmetric) in [(16, true), (16, false), (256, true), (4, false), (TERNARY, true)] {
        for group_size in [Some(128), None] {
            let grid = Grid { levels, group_size, symmetric, least_zero: 0 };
            let kind = if symmetric { "symmetric" } else { "with zeros" };
            let group = group_size.map_or("of a row".to_string(), |n| format!("of {n}"));
            let name = format!("{levels} codes {kind}, {group}");
            show(&format!("round {name}"), &mut || round(&grid, &weights, COLS, &mut rows).unwrap());
            show(&format!("weigh {name}"), &mut || {
                weigh(&grid, &weights, COLS, &importance, &mut rows).unwrap();
            });
        }
    }
    let grid = |bits: u32| Grid { levels: 1 << bits, group_size: Some(128), symmetric: false, least_zero: 1 };
    let gptq = |bits| Gptq { grid: grid(bits), first_version: true };
    let compressed = |bits, bytes| Compressed { grid: grid(bits), bytes, act_order: false };
    let bnb = |fp4| Bnb4 { fp4, compute: "float16".to_string(), nested: None };
    let checkpoints: [(&str, Arc<dyn Layout>); 13] = [
        ("gptq 4 bits", Arc::new(gptq(4))),
        ("gptq 3 bits", Arc::new(gptq(3))),
        ("gptq 8 bits", Arc::new(gptq(8))),
        ("awq", Arc::new(Awq { grid: grid(4) })),
        ("compressed-tensors 4 bits", Arc::new(compressed(4, false))),
        ("compressed-tensors 8 bits", Arc::new(compressed(8, false))),
        ("compressed-tensors int8", Arc::new(compressed(8, true))),
        ("compressed-tensors fp8", Arc::new(CompressedFp8)),
        ("bnb nf4", Arc::new(bnb(false))),
        ("bnb fp4", Arc::new(bnb(true))),
        ("bnb int8", Arc::new(Bnb8)),
        ("fp8 in blocks", Arc::new(Fp8 { block: [128, 128] })),
        ("mxfp4", Arc::new(Mxfp4)),
    ];
    let of_qpack = |bits: u32, encoding: QpackEncoding| {
        let own = Target::new(Format::Qpack(encoding));
        let target = Target { bits, ..own };
        (format!("qpack {} {bits} bits", encoding.name()), target.layout(&[], "float16").unwrap())
    };
    let ints = (2..=8).map(|bits| of_qpack(bits, QpackEncoding::Integers));
    let others = [Trits::Base3, Trits::Bits2].map(QpackEncoding::Ternary).into_iter();
    let others = others.chain([QpackEncoding::Nf4, QpackEncoding::Int8, QpackEncoding::Fp8]);
    let all = checkpoints.into_iter().map(|(name, layout)| (name.to_string(), layout));
    for (name, layout) in all.chain(ints).chain(others.map(|e| of_qpack(2, e))) {
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
        show(&format!("write {name}"), &mut || {
            black_box(layout.write([ROWS, COLS], 0, data, &mut put).unwrap());
        });
    }
}
