//! Speed of every implementation of every type beside the linked ggml's, on one thread.
//!
//! `cargo bench --profile release --bench block -- q4_k iq4` runs the types whose names contain one of
//! the arguments, and without arguments all. Weights and blocks stay in the second-level cache; the contenders
//! take turns, and the median of the rounds counts. In million weights per second, with the ratio
//! to ggml; each row is one direction of one type.

use qconv::block::{Codec, codec, implementations};
use qconv::tensor::DType;
use std::hint::black_box;
use std::time::Instant;

/// Weights in a run: 256 KiB as f32.
const WEIGHTS: usize = 64 * 1024;
const ROW: usize = 4096;
const ROUNDS: usize = 31;

const TYPES: [DType; 27] = [
    DType::F16,
    DType::BF16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::TQ1_0,
    DType::TQ2_0,
    DType::Q1_0,
    DType::Q2_0,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
    DType::IQ2_XXS,
    DType::IQ2_XS,
    DType::IQ2_S,
    DType::IQ3_XXS,
    DType::IQ3_S,
    DType::IQ1_S,
    DType::IQ1_M,
    DType::IQ4_NL,
    DType::IQ4_XS,
    DType::MXFP4,
    DType::NVFP4,
];

fn main() {
    // Sums of uniform numbers: near enough to the Gaussian that weights follow.
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let weights: Vec<f32> = (0..WEIGHTS).map(|_| 0.02 * (0..12).map(|_| uniform()).sum::<f32>()).collect();

    let importance: Vec<f32> = (0..ROW).map(|_| uniform().powi(2)).collect();

    let mut copy = vec![0f32; WEIGHTS];
    let rate =
        race(&mut [("copy", Box::new(|| black_box(&mut copy).copy_from_slice(black_box(&weights))))])[0];
    println!("million weights per second; f32 copy within the cache: {rate:.0}");
    println!("{:<14}{:>10}{:>22}{:>22}{:>22}", "", "ggml", "scalar", "avx2", "avx512");
    let wanted: Vec<_> =
        std::env::args().skip(1).filter(|a| !a.starts_with('-')).map(|a| a.to_uppercase()).collect();
    for dtype in TYPES
        .into_iter()
        .filter(|t| wanted.is_empty() || wanted.iter().any(|w| t.name().contains(w.as_str())))
    {
        if codec(dtype).is_some_and(|c| c.needs_importance()) {
            // ggml refuses these without one.
        } else {
            row(&format!("{dtype} encode"), dtype, &|c| {
                let (src, mut dst) = (weights.clone(), buffer(dtype));
                match c {
                    Some(c) => Box::new(move || c.encode(black_box(&src), ROW, None, &mut dst).unwrap()),
                    None => ggml_encode(dtype, src, dst, None),
                }
            });
        }
        if codec(dtype).is_some_and(|c| c.heeds_importance()) {
            row(&format!("{dtype} weighed"), dtype, &|c| {
                let (src, mut dst, importance) = (weights.clone(), buffer(dtype), &importance);
                match c {
                    Some(c) => {
                        Box::new(move || c.encode(black_box(&src), ROW, Some(importance), &mut dst).unwrap())
                    }
                    None => ggml_encode(dtype, src, dst, Some(importance)),
                }
            });
        }
        let mut blocks = buffer(dtype);
        codec(dtype).unwrap().encode(&weights, ROW, Some(&importance), &mut blocks).unwrap();
        row(&format!("{dtype} decode"), dtype, &|c| {
            let (src, mut dst) = (blocks.clone(), vec![0f32; WEIGHTS]);
            match c {
                Some(c) => Box::new(move || c.decode(black_box(&src), &mut dst).unwrap()),
                None => ggml_decode(dtype, src, dst),
            }
        });
    }
}

fn buffer(dtype: DType) -> Vec<u8> {
    vec![0; dtype.bytes_for(WEIGHTS as u64).unwrap() as usize]
}

/// A contender's run over [`WEIGHTS`] weights.
type Run<'a> = Box<dyn FnMut() + 'a>;

fn row<'a>(title: &str, dtype: DType, make: &dyn Fn(Option<&'static Codec>) -> Run<'a>) {
    let mut runs: Vec<(&str, Run)> = vec![("ggml", make(None))];
    runs.extend(implementations(dtype).map(|c| (c.implementation, make(Some(c)))));
    let rates = race(&mut runs);
    let digits = if rates[0] < 100.0 { 1 } else { 0 };
    print!("{title:<14}{:>10.digits$}", rates[0]);
    for rate in &rates[1..] {
        print!("{rate:>13.digits$} ({:>5.1}x)", rate / rates[0]);
    }
    println!();
}

/// Million weights per second of each contender: the median of alternating rounds. Slow contenders
/// run once in a round, and fewer rounds.
fn race(runs: &mut [(&str, Run)]) -> Vec<f64> {
    let mut times = vec![Vec::new(); runs.len()];
    let begun = Instant::now();
    for round in 0..ROUNDS {
        if round >= 5 && begun.elapsed().as_secs() >= 4 {
            break;
        }
        for ((_, run), times) in runs.iter_mut().zip(&mut times) {
            let warming = Instant::now();
            run();
            let repeats = if warming.elapsed().as_millis() > 10 { 1 } else { 8 };
            let start = Instant::now();
            for _ in 0..repeats {
                run();
            }
            times.push(start.elapsed().as_secs_f64() / f64::from(repeats));
        }
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    times.iter_mut().map(|t| WEIGHTS as f64 / median(t) / 1e6).collect()
}

#[cfg(feature = "ggml")]
fn ggml_encode<'a>(dtype: DType, src: Vec<f32>, mut dst: Vec<u8>, importance: Option<&'a [f32]>) -> Run<'a> {
    use llama_cpp_sys_2::{ggml_quantize_chunk, ggml_type};
    let id = dtype.ggml_id().unwrap() as ggml_type;
    // SAFETY: src holds whole rows, dst exactly their bytes.
    Box::new(move || unsafe {
        let rows = (WEIGHTS / ROW) as i64;
        let src = black_box(&src).as_ptr();
        ggml_quantize_chunk(
            id,
            src,
            dst.as_mut_ptr().cast(),
            0,
            rows,
            ROW as i64,
            importance.map_or(std::ptr::null(), <[f32]>::as_ptr),
        );
    })
}

#[cfg(feature = "ggml")]
fn ggml_decode<'a>(dtype: DType, src: Vec<u8>, mut dst: Vec<f32>) -> Run<'a> {
    use llama_cpp_sys_2::{ggml_get_type_traits, ggml_type};
    let id = dtype.ggml_id().unwrap() as ggml_type;
    // SAFETY: the traits live forever, and src holds exactly the bytes of dst's weights.
    Box::new(move || unsafe {
        let to_float = (*ggml_get_type_traits(id)).to_float.unwrap();
        to_float(black_box(&src).as_ptr().cast(), dst.as_mut_ptr(), WEIGHTS as i64);
    })
}

// Without ggml the portable implementation is the yardstick.
#[cfg(not(feature = "ggml"))]
fn ggml_encode<'a>(dtype: DType, src: Vec<f32>, mut dst: Vec<u8>, importance: Option<&'a [f32]>) -> Run<'a> {
    let scalar = implementations(dtype).next().unwrap();
    Box::new(move || scalar.encode(black_box(&src), ROW, importance, &mut dst).unwrap())
}

#[cfg(not(feature = "ggml"))]
fn ggml_decode<'a>(dtype: DType, src: Vec<u8>, mut dst: Vec<f32>) -> Run<'a> {
    let scalar = implementations(dtype).next().unwrap();
    Box::new(move || scalar.decode(black_box(&src), &mut dst).unwrap())
}
