//! GPTQ on one layer of the shape of a model of 7 billion weights, on one thread: what its parts take, beside
//! what faer's product of matrices reaches in the same run.
//!
//! `cargo bench --profile release --bench gptq` takes matrices of 4096 columns, and with 11008 as well where
//! that is an argument. Moments are made up: neighbouring columns depend on each other. Rows and tokens
//! are a sample, times are of all.

#[path = "common/timing.rs"]
mod timing;

use std::time::Instant;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, Par};
use qconv::block::gram::{PANEL, product};
use qconv::block::lattice;
use qconv::calibrate::gram::{Panels, ROWS, band_len, bands};
use qconv::error::Result;
use qconv::quantize::gptq::{Feedback, Options, Sums};
use qconv::tensor::DType;
use timing::{Table, noise, time};

/// Rows of a matrix, and tokens of the calibration.
const ALL_ROWS: f64 = 4096.0;
const TOKENS: f64 = 16384.0;
/// Rows that are rounded here.
const SAMPLE: usize = 4 * PANEL;

struct MadeUp(usize);

impl Sums for MadeUp {
    fn columns(&self) -> usize {
        self.0
    }

    fn read(&self, i: usize, row: &mut [f32]) -> Result<()> {
        // Far columns depend on each other a little.
        let size = |i: usize| 1.0 + (i % 13) as f32;
        let mut near = 1f32;
        for (j, value) in (i..).zip(row) {
            *value = (near + 0.1) * size(i) * size(j);
            near = if near > 1e-9 { near * 0.9 } else { 0.0 };
        }
        Ok(())
    }
}

fn peak() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).map(str::trim);
    line.unwrap_or("unknown").to_string()
}

fn main() {
    if Table::of_args().is_none() {
        return;
    }
    let size = 1024;
    let (a, b) = (noise(size * size), noise(size * size));
    let whole = |data: &[f32]| Mat::from_fn(size, size, |i, j| data[i * size + j]);
    let (x, y, mut z) = (whole(&a), whole(&b), Mat::<f32>::zeros(size, size));
    let theirs = time(5, || matmul(z.as_mut(), Accum::Replace, x.as_ref(), y.as_ref(), 1.0, Par::Seq));
    println!(
        "faer, f32, {size} x {size} x {size}: {:.1} GFLOP/s",
        2.0 * (size as f64).powi(3) / theirs / 1e9
    );

    let other = std::env::args().any(|a| a == "11008");
    for n in [4096, 11008].into_iter().take(1 + usize::from(other)) {
        let flops = 2.0 * n as f64 * (PANEL * PANEL) as f64;
        let panel = |data: &[f32]| data.as_chunks::<PANEL>().0.to_vec();
        let (a, b) = (panel(&noise(n * PANEL)), panel(&noise(n * PANEL)));
        let mut tile = [[0.0; PANEL]; PANEL];
        let seconds = time(50, || product(&a, std::hint::black_box(&b), &mut tile));
        println!("{n} columns\n  panels of {PANEL}: {:.1} GFLOP/s", flops / seconds / 1e9);

        let tokens = noise(n * ROWS);
        let mut panels = Panels::default();
        let mut acc: Vec<Vec<f64>> =
            (0..bands(n as u64)).map(|b| vec![0.0; band_len(n as u64, b) as usize]).collect();
        let seconds = time(2, || {
            panels.pack(n, tokens.chunks_exact(n));
            acc.iter_mut().enumerate().for_each(|(b, band)| panels.add_products(b, band));
        });
        let (flops, blocks) = ((n * n * ROWS) as f64, TOKENS / ROWS as f64);
        println!(
            "  moments of {TOKENS} tokens: {:.1} s, {:.1} GFLOP/s",
            seconds * blocks,
            flops / seconds / 1e9
        );
        drop(acc);

        let begun = Instant::now();
        let feedback = Feedback::new(&MadeUp(n), 1, &Options::default()).unwrap();
        println!("  factor: {:.1} s (at most {})", begun.elapsed().as_secs_f64(), peak());
        let weights = noise(n * SAMPLE);
        for dtype in [DType::Q4_0, DType::Q4_K, DType::Q2_K] {
            let lattice = lattice(dtype).unwrap();
            let mut bytes = vec![0; lattice.bytes(weights.len())];
            let scales = time(1, || lattice.encode(&weights, n, feedback.importance(), &mut bytes).unwrap());
            let all = time(1, || drop(feedback.encode(lattice, &weights, &mut bytes).unwrap()));
            let of_all = ALL_ROWS / SAMPLE as f64;
            println!(
                "  {ALL_ROWS} rows to {dtype}: {:.1} s, of which scales {:.1} s",
                all * of_all,
                scales * of_all * (1 + Options::default().refits) as f64
            );
        }
    }
    println!("at most {} in memory", peak());
}
