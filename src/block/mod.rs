//! Codecs: how each type turns weights into bytes, and bytes into weights.
//!
//! A block type stores `block_size` weights in `type_size` bytes; `formats/spec/blocks.md`
//! describes each. [`codec`] gives the fastest implementation that this CPU can run. All
//! implementations of a type write the same bytes: those of the linked ggml's
//! `ggml_quantize_chunk`, for every input, NaN and infinities included (but for blocks with NaN in
//! Q2_K, Q4_K and Q5_K, and the sign of a NaN in Q4_0 and Q5_0 with an importance, where ggml's
//! bytes depend on its compiler; and but for weights whose squares overflow in IQ1, IQ2 and IQ3, where
//! ggml stops). Conversions refuse weights that are not finite before they come here.
//!
//! Adding a type: one file here with a `SCALAR` codec, one row in the table `SCALAR`, one section of the
//! specification; where its codes are independent of each other, one row in the table of `lattice.rs`. A
//! SIMD path is a row in the table of its family in `simd/`.

pub mod bits;
mod cast;
mod float;
mod float8;
pub mod gram;
mod grid;
mod grid_search;
mod groups;
mod iq1;
mod iq1_m;
mod iq1_s;
mod iq2_s;
mod iq2_xs;
mod iq2_xxs;
mod iq3_s;
mod iq3_xxs;
mod iq4_nl;
mod iq4_xs;
mod kquant;
mod lattice;
mod lines;
mod mxfp4;
mod nvfp4;
mod q1_0;
mod q2_0;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod simd;
pub mod ternary;
mod tq1_0;
mod tq2_0;
pub mod trits;
pub mod uniform;
mod weighed;

pub(crate) use groups::{LANES, WHOLE};
pub use lattice::{Lattice, lattice};

pub use float::{bf16_from_f32, f16_from_f32, f32_from_bf16, f32_from_f16};
pub use float8::{e4m3_from_f32, f32_from_e4m3};

use crate::error::{Error, Result};
use crate::tensor::DType;

/// The portable implementation of every type: the one table.
static SCALAR: &[Codec] = &[
    float::F32,
    float::F16,
    float::BF16,
    float::F64,
    float8::F8_E4M3,
    float8::F8_E5M2,
    float8::F8_E8M0,
    q4_0::SCALAR,
    q4_1::SCALAR,
    q5_0::SCALAR,
    q5_1::SCALAR,
    q8_0::SCALAR,
    q2_k::SCALAR,
    q3_k::SCALAR,
    q4_k::SCALAR,
    q5_k::SCALAR,
    q6_k::SCALAR,
    iq1_s::SCALAR,
    iq1_m::SCALAR,
    iq2_xxs::SCALAR,
    iq2_xs::SCALAR,
    iq2_s::SCALAR,
    iq3_xxs::SCALAR,
    iq3_s::SCALAR,
    iq4_nl::SCALAR,
    iq4_xs::SCALAR,
    tq1_0::SCALAR,
    tq2_0::SCALAR,
    mxfp4::SCALAR,
    nvfp4::SCALAR,
    q1_0::SCALAR,
    q2_0::SCALAR,
];

/// Weights of whole blocks, and exactly their bytes.
type EncodeFn = fn(&[f32], &mut [u8]);
/// One row, the importance of each of its columns, and exactly the row's bytes.
type WeighFn = fn(&[f32], &[f32], &mut [u8]);
/// Bytes of whole blocks, and exactly their weights.
type DecodeFn = fn(&[u8], &mut [f32]);

/// One implementation of the bytes of one type.
///
/// The functions behind it are handed whole blocks and matching lengths only.
#[derive(Clone, Copy, Debug)]
pub struct Codec {
    /// The type.
    pub dtype: DType,
    /// Which implementation this is: `scalar`, `avx2`, `avx512`.
    pub implementation: &'static str,
    /// Weights to blocks, each block by itself; `None` where the type is only read, or only
    /// written with an importance.
    encode: Option<EncodeFn>,
    /// A row to blocks, its errors weighed by the importance of their columns; `None` where
    /// importance changes nothing.
    weigh: Option<WeighFn>,
    /// Blocks to weights.
    decode: DecodeFn,
    /// The largest error that encoding one block of finite weights can make; `None` where the
    /// type promises none.
    bound: Option<fn(&[f32]) -> f32>,
}

/// The fastest implementation of `dtype` on this CPU; `None` where qconv has no codec for it.
pub fn codec(dtype: DType) -> Option<&'static Codec> {
    implementations(dtype).last()
}

/// Every implementation of `dtype` that this CPU can run: the portable one first, the fastest
/// last. They differ in speed only; tests run over all of them.
pub fn implementations(dtype: DType) -> impl Iterator<Item = &'static Codec> {
    #[cfg(target_arch = "x86_64")]
    let simd = simd::tables();
    #[cfg(not(target_arch = "x86_64"))]
    let simd = std::iter::empty::<&'static [Codec]>();
    std::iter::once(SCALAR).chain(simd).flatten().filter(move |c| c.dtype == dtype)
}

impl Codec {
    /// Whether weights can be written in this type, given an importance if need be.
    pub fn can_encode(&self) -> bool {
        self.encode.is_some() || self.weigh.is_some()
    }

    /// Whether the type is written with an importance only: grids so coarse that without one the
    /// result is useless, and refused by ggml too (`ggml_quantize_requires_imatrix`).
    pub fn needs_importance(&self) -> bool {
        self.encode.is_none() && self.weigh.is_some()
    }

    /// Whether an importance changes the bytes.
    pub fn heeds_importance(&self) -> bool {
        self.weigh.is_some()
    }

    /// Encodes rows of `row` weights each, one row after the other, into `dst`.
    ///
    /// `importance` holds one weight per column, as an importance matrix does. Types whose
    /// encoder in ggml ignores it (Q8_0, Q1_0, Q2_0, TQ1_0, TQ2_0, MXFP4, NVFP4, element types)
    /// ignore it here.
    ///
    /// # Errors
    /// `Misuse` when `row` does not fill whole blocks, when `src` is not whole rows, when the
    /// length of `importance` or `dst` does not match, or when the type needs an importance and
    /// gets none. `Unsupported` when the type can only be read.
    pub fn encode(&self, src: &[f32], row: usize, importance: Option<&[f32]>, dst: &mut [u8]) -> Result<()> {
        let dtype = self.dtype;
        if row == 0 || !src.len().is_multiple_of(row) || !row.is_multiple_of(self.block_size()) {
            return Err(Error::misuse(format!(
                "{} weights are not rows of {row} that fill blocks of {} ({dtype})",
                src.len(),
                self.block_size()
            )));
        }
        self.check_bytes(src.len(), dst.len())?;
        if let Some(importance) = importance {
            if importance.len() != row {
                return Err(Error::misuse(format!(
                    "importance of {} columns for rows of {row} weights",
                    importance.len()
                )));
            }
            if let Some(weigh) = self.weigh {
                let bytes = dst.len() / (src.len() / row).max(1);
                for (x, y) in src.chunks_exact(row).zip(dst.chunks_exact_mut(bytes.max(1))) {
                    weigh(x, importance, y);
                }
                return Ok(());
            }
        }
        match self.encode {
            Some(encode) => encode(src, dst),
            None if self.weigh.is_some() => {
                return Err(Error::misuse(format!("{dtype} can be written with an importance matrix only")));
            }
            None => return Err(Error::unsupported(format!("{dtype} can be read, not written"))),
        }
        Ok(())
    }

    /// Decodes whole blocks. Any bytes decode to something; a NaN's sign and payload are
    /// unspecified.
    ///
    /// # Errors
    /// `Misuse` when `dst` is not whole blocks, or `src` is not exactly their bytes.
    pub fn decode(&self, src: &[u8], dst: &mut [f32]) -> Result<()> {
        if !dst.len().is_multiple_of(self.block_size()) {
            return Err(Error::misuse(format!(
                "{} weights do not fill blocks of {} ({})",
                dst.len(),
                self.block_size(),
                self.dtype
            )));
        }
        self.check_bytes(dst.len(), src.len())?;
        (self.decode)(src, dst);
        Ok(())
    }

    /// The largest `|decoded - w|` that encoding and decoding may cause for a weight `w` of
    /// `src`, in the unit of the weights: what the type promises, worked out from the weights
    /// themselves, rounding of the scale to f16 included. Over several blocks it is the largest
    /// of theirs; give one block for the sharpest bound.
    ///
    /// Infinite where nothing is promised: weights that are not finite, or a scale beyond f16.
    /// `None` when the type as such gives no bound.
    pub fn error_bound(&self, src: &[f32]) -> Option<f32> {
        let bound = self.bound?;
        let largest = |most: f32, block: &[f32]| {
            if block.iter().all(|w| w.is_finite()) { most.max(bound(block)) } else { f32::INFINITY }
        };
        Some(src.chunks(self.block_size()).fold(0.0, largest))
    }

    fn block_size(&self) -> usize {
        self.dtype.block_size() as usize
    }

    fn check_bytes(&self, weights: usize, bytes: usize) -> Result<()> {
        let expected = (weights / self.block_size()).checked_mul(self.dtype.type_size() as usize);
        if expected == Some(bytes) {
            return Ok(());
        }
        Err(Error::misuse(format!("{weights} weights of {} do not take {bytes} bytes", self.dtype)))
    }
}

/// Pairs of `N` weights and the block that they fill.
#[inline(always)]
fn encode_pairs<'a, B: bytemuck::Pod, const N: usize>(
    src: &'a [f32],
    dst: &'a mut [u8],
) -> impl Iterator<Item = (&'a [f32; N], &'a mut B)> {
    src.as_chunks::<N>().0.iter().zip(bytemuck::cast_slice_mut(dst))
}

/// Pairs of a block and the `N` weights that it holds.
#[inline(always)]
fn decode_pairs<'a, B: bytemuck::Pod, const N: usize>(
    src: &'a [u8],
    dst: &'a mut [f32],
) -> impl Iterator<Item = (&'a B, &'a mut [f32; N])> {
    bytemuck::cast_slice(src).iter().zip(dst.as_chunks_mut::<N>().0)
}
