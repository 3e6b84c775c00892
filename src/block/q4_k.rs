//! Q4_K: 256 weights in 144 bytes, 8 groups with a scale and a minimum of 6 bits, codes of 4 bits.

use super::groups::LANES;
use super::kquant::{Lined, encode_lines, pack_halves, unpack_halves};
use super::lattice::{Latticed, steps, whole};
use super::lines::{Affine, Weight};
use super::{Codec, decode_pairs, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    pub scales: Scales,
    /// Codes: of each 64 weights, weight `j` in the low half of byte `j`, weight `j + 32` in the
    /// high half. A weight is `d * scale * code - dmin * minimum`.
    pub qs: [u8; 128],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q4_K.type_size());

/// Scales and minima of the groups; Q5_K shares it.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Scales {
    /// Scale of the scales, f16 little endian.
    pub d: [u8; 2],
    /// Scale of the minima, f16 little endian.
    pub dmin: [u8; 2],
    /// Groups 0 to 3: scale in bits 0 to 5 of byte `j`, minimum in those of byte `j + 4`. Groups 4
    /// to 7: bits 0 to 3 of scale and minimum in the halves of byte `j + 4`, bits 4 and 5 at the
    /// top of the bytes `j - 4` and `j`.
    pub packed: [u8; 12],
}

impl Scales {
    /// Brings scale and offset of a group next to these.
    pub(super) fn set(&mut self, group: usize, (scale, offset): (f32, f32)) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        let dmin = f32_from_f16(u16::from_le_bytes(self.dmin));
        let (mut scales, mut mins) = unpack(&self.packed);
        scales[group] = steps(scale, d, 0, 63) as u8;
        mins[group] = steps(-offset, dmin, 0, 63) as u8;
        self.packed = pack(&scales, &mins);
    }
}

impl Latticed<256> for Block {
    const GROUP: usize = 32;
    const LEVELS: &'static [f32] = &whole::<16>(0);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        for (line, (scale, min)) in lines.iter_mut().zip(self.scales.values()) {
            *line = (scale, -min);
        }
    }

    fn put(&mut self, codes: &[u8; 256]) {
        Lined::<32, 8>::pack(self, codes);
    }

    fn set(&mut self, group: usize, line: (f32, f32)) {
        self.scales.set(group, line);
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q4_K,
    implementation: "scalar",
    encode: Some(|src, dst| encode::<LANES>(src, None, dst)),
    weigh: Some(|src, importance, dst| encode::<LANES>(src, Some(importance), dst)),
    decode: |src, dst| decode(src, dst),
    bound: None,
};

#[inline(always)]
pub(super) fn encode<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_lines::<Block, L, 32, 8>(src, importance, dst);
}

impl Lined<32, 8> for Block {
    const PLAIN: Affine = Affine {
        weight: Weight::Mean,
        codes: 15,
        attempts: 21,
        first: -1.0,
        step: 0.1,
        absolute: false,
        limited: false,
    };
    const LEVELS: u8 = 63;
    const LIMITS: [u8; 2] = [63, 255];
    const SPREAD: f32 = 2.0;

    #[inline(always)]
    fn store(&mut self, d: [u8; 2], dmin: [u8; 2], scales: &[u8; 8], mins: &[u8; 8]) -> [(f32, f32); 8] {
        self.scales = Scales { d, dmin, packed: pack(scales, mins) };
        self.scales.values()
    }

    #[inline(always)]
    fn pack(&mut self, codes: &[u8; 256]) {
        pack_halves::<32>(codes, &mut self.qs);
    }
}

#[inline(always)]
fn decode(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs(src, dst) {
        decode_block(block, y);
    }
}

#[inline(always)]
fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let mut codes = [0; 256];
    unpack_halves::<32>(&block.qs, &mut codes);
    block.scales.decode(&codes, y);
}

impl Scales {
    pub(super) fn decode(&self, codes: &[u8; 256], y: &mut [f32; 256]) {
        for ((y, codes), (scale, min)) in
            y.chunks_exact_mut(32).zip(codes.chunks_exact(32)).zip(self.values())
        {
            for (y, &code) in y.iter_mut().zip(codes) {
                *y = scale * f32::from(code) - min;
            }
        }
    }

    /// Scale and minimum of each group.
    #[inline(always)]
    pub(super) fn values(&self) -> [(f32, f32); 8] {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        let dmin = f32_from_f16(u16::from_le_bytes(self.dmin));
        let (scales, mins) = unpack(&self.packed);
        let mut values = [(0.0, 0.0); 8];
        for j in 0..8 {
            values[j] = (d * f32::from(scales[j]), dmin * f32::from(mins[j]));
        }
        values
    }
}

pub(super) fn pack(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    std::array::from_fn(|j| match j {
        0..4 => scales[j] | scales[j + 4] >> 4 << 6,
        4..8 => mins[j - 4] | mins[j] >> 4 << 6,
        _ => scales[j - 4] & 15 | mins[j - 4] << 4,
    })
}

/// The inverse of [`pack`], four groups at once.
#[inline(always)]
pub(super) fn unpack(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let word = |n: usize| u32::from_le_bytes(packed.as_chunks().0[n]);
    let (scales, mins, low) = (word(0), word(1), word(2));
    let top = |word: u32| word >> 2 & 0x3030_3030;
    let eight =
        |first: u32, last: u32| (u64::from(first & 0x3F3F_3F3F) | u64::from(last) << 32).to_le_bytes();
    (eight(scales, low & 0x0F0F_0F0F | top(scales)), eight(mins, low >> 4 & 0x0F0F_0F0F | top(mins)))
}
