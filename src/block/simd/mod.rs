//! SIMD paths for x86-64, chosen at run time.
//!
//! Each kernel stands once in `kernels`, over the traits [`Decode`] and [`Encode`] of 32 weights;
//! `avx2` and `avx512` implement these and nothing else. Kernels treat ordinary blocks; blocks
//! with NaN, infinities or a scale near the ends of f32 go to the portable code, so that the bytes
//! are the same by construction there. Each block's arithmetic keeps its order, and a product and a sum
//! are never contracted into one rounding.
//!
//! On other processors the portable code serves; no such machine was at hand to prove more.
//!
//! Functions here are `unsafe` for one reason, stated once: the CPU must have the features of the
//! implementation. [`tables`] is the only way in, and asks the CPU first.
#![allow(unsafe_op_in_unsafe_fn)]

mod avx2;
mod avx512;
mod float4;
mod gram;
mod grid;
mod iq1;
mod iq4;
mod kernels;
mod kquant;
mod signs;

use super::{Codec, float, mxfp4, nvfp4, q1_0, q2_0, q4_0, q4_1, q5_0, q5_1, q8_0, tq1_0, tq2_0, weighed};
use core::arch::x86_64::__m256i;
use float4::*;
#[cfg(test)]
pub(super) use gram::PRODUCTS;
pub(super) use gram::product;
use kernels::*;
use signs::*;

/// The tables of the implementations that this CPU can run, the fastest last.
pub(super) fn tables() -> impl Iterator<Item = &'static [Codec]> {
    // The standard library caches what it asks the CPU.
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    let avx2 = avx2.then_some(AVX2).into_iter().flatten();
    avx2.chain(avx512.then_some(AVX512).into_iter().flatten()).copied()
}

/// The tables that AVX2 and F16C are enough for, one for each family of types.
static AVX2: &[&[Codec]] = &[SIMPLE_AVX2, kquant::AVX2, grid::AVX2, iq1::IQ1_AVX2, iq4::IQ4_AVX2];
/// The tables that need AVX-512 F, BW, VL and DQ as well.
static AVX512: &[&[Codec]] = &[SIMPLE_AVX512, kquant::AVX512, iq1::IQ1_AVX512, iq4::IQ4_AVX512];

/// 32 weights in registers, lane `i` for weight `i`: what decoding needs.
///
/// Methods are `unsafe` as all here: the CPU must have the implementor's features.
trait Decode: Copy {
    unsafe fn store(self, y: &mut [f32; 32]);
    /// From halves, little endian.
    unsafe fn load_f16(x: &[u8; 64]) -> Self;
    /// From signed bytes.
    unsafe fn from_i8(q: __m256i) -> Self;
    unsafe fn mul(self, s: f32) -> Self;
    unsafe fn add(self, s: f32) -> Self;
    /// The first 16 lanes times one number, the others times another.
    unsafe fn mul_halves(self, s: [f32; 2]) -> Self;
    /// As [`Self::mul_halves`].
    unsafe fn add_halves(self, s: [f32; 2]) -> Self;
}

/// What encoding needs beyond it.
trait Encode: Decode {
    unsafe fn load(x: &[f32; 32]) -> Self;
    /// To the nearest halves, ties to even; lanes must not be NaN.
    unsafe fn store_f16(self, y: &mut [u8; 64]);
    unsafe fn abs(self) -> Self;
    /// The larger of lanes that are zero, positive or NaN; NaN counts as larger than all.
    unsafe fn max(self, other: Self) -> Self;
    /// The largest lane, in the order of [`Self::max`].
    unsafe fn reduce_max(self) -> f32;
    /// The largest of the first 16 lanes and of the others, in the same order.
    unsafe fn max_halves(self) -> (f32, f32);
    /// Codes of E2M1 as bytes: how many of the places half way between two magnitudes a lane passes,
    /// and its sign in bit 3 if any. Magnitudes are those of `mxfp4::DOUBLED` times `low` in the first 16 lanes,
    /// times `high` in the others; NaN gets 0.
    unsafe fn between(self, low: f32, high: f32) -> __m256i;
    /// Least and greatest lane, from `f32::MAX` down and `-f32::MAX` up, NaN passed over; the
    /// sign of a zero is unspecified.
    unsafe fn min_max(self) -> (f32, f32);
    /// Bit `i` is set where lane `i` equals `s`.
    unsafe fn eq(self, s: f32) -> u32;
    /// Truncated to bytes: lanes from 0 to 255; NaN becomes 0.
    unsafe fn truncate(self) -> __m256i;
    /// Rounded half away from zero to signed bytes: lanes from -128 to 127.
    unsafe fn round(self) -> __m256i;
}

/// One table of codecs: the portable ones with their functions replaced by instances of the
/// kernels, over the given lanes, compiled with the given features. Those of Q4_0 and Q5_0 are
/// given apart: AVX-512's mask registers slow their search for the extreme weight.
macro_rules! table {
    (
        $table:ident, $name:literal, $features:literal,
        encode $encoder:ty, decode $decoder:ty, symmetric $symmetric:literal, lanes $lanes:literal
    ) => {
        static $table: &[Codec] = {
            // Wraps the kernel over a run of blocks into a function with the features enabled.
            macro_rules! encode {
                ($kernel:ident, $enabled:literal) => {
                    Some(|src, dst| {
                        #[target_feature(enable = $enabled)]
                        unsafe fn run(src: &[f32], dst: &mut [u8]) {
                            $kernel::<$encoder>(src, dst);
                        }
                        // SAFETY: the table is handed out only after the features were detected.
                        unsafe { run(src, dst) }
                    })
                };
            }
            macro_rules! decode {
                ($kernel:ident) => {
                    |src, dst| {
                        #[target_feature(enable = $features)]
                        unsafe fn run(src: &[u8], dst: &mut [f32]) {
                            $kernel::<$decoder>(src, dst);
                        }
                        // SAFETY: the table is handed out only after the features were detected.
                        unsafe { run(src, dst) }
                    }
                };
            }
            macro_rules! row {
                ($base:expr, $encode:ident, $decode:ident) => {
                    row!($base, $encode, $decode, $features)
                };
                ($base:expr, $encode:ident, $decode:ident, $enabled:literal) => {
                    Codec {
                        implementation: $name,
                        encode: encode!($encode, $enabled),
                        decode: decode!($decode),
                        ..$base
                    }
                };
            }
            macro_rules! weighed {
                ($block:ty, $row:expr) => {
                    Codec {
                        weigh: Some(|src, importance, dst| {
                            #[target_feature(enable = $features)]
                            unsafe fn run(src: &[f32], importance: &[f32], dst: &mut [u8]) {
                                weighed::row::<$block, $lanes>(src, importance, dst);
                            }
                            // SAFETY: the table is handed out only after the features were detected.
                            unsafe { run(src, importance, dst) }
                        }),
                        ..$row
                    }
                };
            }
            &[
                row!(float::F16, encode_f16, decode_f16),
                row!(float::BF16, encode_bf16, decode_bf16),
                weighed!(q4_0::Block, row!(q4_0::SCALAR, encode_q4_0, decode_q4_0, $symmetric)),
                weighed!(q4_1::Block, row!(q4_1::SCALAR, encode_q4_1, decode_q4_1)),
                weighed!(q5_0::Block, row!(q5_0::SCALAR, encode_q5_0, decode_q5_0, $symmetric)),
                weighed!(q5_1::Block, row!(q5_1::SCALAR, encode_q5_1, decode_q5_1)),
                row!(q8_0::SCALAR, encode_q8_0, decode_q8_0),
                row!(mxfp4::SCALAR, encode_mxfp4, decode_mxfp4),
                row!(nvfp4::SCALAR, encode_nvfp4, decode_nvfp4),
                row!(q1_0::SCALAR, encode_q1_0, decode_q1_0),
                row!(q2_0::SCALAR, encode_q2_0, decode_q2_0),
                row!(tq1_0::SCALAR, encode_tq1_0, decode_tq1_0),
                row!(tq2_0::SCALAR, encode_tq2_0, decode_tq2_0),
            ]
        };
    };
}

table!(SIMPLE_AVX2, "avx2", "avx2,f16c", encode avx2::Avx2, decode avx2::Avx2, symmetric "avx2,f16c", lanes 16);
// Encoding with registers of 512 bits gained nothing: 0.9 to 1.0 of AVX2's speed, where AVX2's
// lanes compiled with AVX-512's instructions (Q4_1, Q5_1, Q8_0) reach 1.0 to 1.2 of it.
table!(
    SIMPLE_AVX512, "avx512", "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c",
    encode avx2::Avx2, decode avx512::Avx512, symmetric "avx2,f16c", lanes 32
);
