//! Codes of `.qpack` files, on one thread: how fast bytes become codes, and codes values.
//!
//! `cargo bench --profile release --bench qpack` shows weights in a second. Arguments name rows of the table
//! instead of all.

use std::hint::black_box;
use std::time::Instant;

use qconv::block::{bits, trits};
use qconv::container::grouped::{Rows, Shape};

const ROWS: u64 = 64;
/// As in gpt-oss: no multiple of 256.
const COLS: u64 = 2880;

/// One row of the table, where it is asked for: the best of some runs.
fn show(wanted: &[String], name: &str, mut run: impl FnMut()) {
    if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
        return;
    }
    let once = |_| {
        let begun = Instant::now();
        (0..20).for_each(|_| run());
        begun.elapsed().as_secs_f64() / 20.0
    };
    let seconds = (0..7).map(once).fold(f64::INFINITY, f64::min);
    println!("{name:<32}{:>9.2} G weights/s", (ROWS * COLS) as f64 / seconds / 1e9);
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test --benches` runs this too, to see that it starts.
    if !args.iter().any(|a| a == "--bench") {
        return;
    }
    let wanted: Vec<String> = args.into_iter().filter(|a| !a.starts_with('-')).collect();
    let n = (ROWS * COLS) as usize;
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u8
    };
    let noise: Vec<u8> = (0..n).map(|_| next()).collect();
    let mut codes = vec![0u8; n];
    let digits: Vec<u8> = noise.iter().map(|b| b % 3).collect();
    let row = COLS.div_ceil(5) as usize;
    let mut bytes = vec![0; row * ROWS as usize];
    let rows = |bytes: &[u8], row: usize, codes: &mut [u8], unpack: &dyn Fn(&[u8], &mut [u8])| {
        for (bytes, codes) in bytes.chunks_exact(row).zip(codes.chunks_exact_mut(COLS as usize)) {
            unpack(black_box(bytes), codes);
        }
    };
    show(&wanted, "pack base 3", || {
        for (bytes, codes) in bytes.chunks_exact_mut(row).zip(digits.chunks_exact(COLS as usize)) {
            trits::pack(black_box(codes), bytes);
        }
    });
    for (bytes, codes) in bytes.chunks_exact_mut(row).zip(digits.chunks_exact(COLS as usize)) {
        trits::pack(codes, bytes);
    }
    show(&wanted, "unpack base 3", || {
        rows(&bytes, row, &mut codes, &|bytes, codes| assert!(trits::unpack(bytes, codes)))
    });
    for width in 1..=8 {
        let row = bits::bytes(COLS, width).unwrap() as usize;
        show(&wanted, &format!("unpack {width} bits"), || {
            rows(&noise[..row * ROWS as usize], row, &mut codes, &|bytes, codes| {
                bits::unpack(bytes, width, 0, codes);
            });
        });
    }
    for group_size in [64, COLS] {
        let groups = COLS.div_ceil(group_size);
        let shape = Shape { rows: ROWS, cols: COLS, bits: 4, group_size, groups };
        let lines = (ROWS * groups) as usize;
        let rows = Rows { codes: codes.clone(), scales: vec![0.5; lines], zeros: vec![8.0; lines] };
        let mut out = vec![0f32; n];
        show(&wanted, &format!("values, groups of {group_size}"), || {
            rows.all_weights(black_box(&shape), &mut out)
        });
    }
}
