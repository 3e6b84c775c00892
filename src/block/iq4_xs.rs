//! IQ4_XS: 256 weights in 136 bytes, 8 groups with a scale of 6 bits, the levels of IQ4_NL.

use super::cast::{extreme, inverse};
use super::iq4_nl::{AS_FLOATS, dequantize, deviation, quantize, search, squares, weigh};
use super::kquant::{nearest, pack_halves};
use super::lattice::{Latticed, steps};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale of the scales, f16 little endian.
    pub d: [u8; 2],
    /// Bits 4 and 5 of the scales: group `j` in bits `2j` and `2j + 1` of this little-endian word.
    pub scales_h: [u8; 2],
    /// Bits 0 to 3: group `j` in half `j % 2` of byte `j / 2`.
    pub scales_l: [u8; 4],
    /// Codes: 16 bytes for each group of 32, packed as in IQ4_NL. A weight is
    /// `d * (scale - 32) * LEVELS[code]`.
    pub qs: [u8; 128],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ4_XS.type_size());

impl Latticed<256> for Block {
    const GROUP: usize = 32;
    const LEVELS: &'static [f32] = &AS_FLOATS;

    fn lines(&self, lines: &mut [(f32, f32)]) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        for (line, scale) in lines.iter_mut().zip(self.scales(d)) {
            *line = (scale, 0.0);
        }
    }

    fn put(&mut self, codes: &[u8; 256]) {
        pack_halves::<16>(codes, &mut self.qs);
    }

    fn set(&mut self, group: usize, (scale, _): (f32, f32)) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        let bits = (steps(scale, d, -32, 31) + 32) as u16;
        let (half, pair) = (4 * (group % 2), 2 * group);
        self.scales_l[group / 2] = self.scales_l[group / 2] & !(15 << half) | (bits as u8 & 15) << half;
        let high = u16::from_le_bytes(self.scales_h) & !(3 << pair) | bits >> 4 << pair;
        self.scales_h = high.to_le_bytes();
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ4_XS,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, None, block))),
    weigh: Some(|row, importance, dst| {
        for ((x, block), importance) in encode_pairs(row, dst).zip(importance.as_chunks().0) {
            encode_block(x, Some(importance), block);
        }
    }),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

fn encode_block(x: &[f32; 256], importance: Option<&[f32; 256]>, block: &mut Block) {
    let mut found = [0.0; 8];
    let deviation = deviation(x);
    let x = x.as_chunks::<32>().0;
    for (i, (scale, x)) in found.iter_mut().zip(x).enumerate() {
        let weights = match importance {
            Some(importance) => weigh(x, &importance.as_chunks().0[i], deviation),
            None => squares(x),
        };
        *scale = search(x, &weights);
    }
    let scales = block.store_scales(&found);
    for ((x, d), qs) in x.iter().zip(scales).zip(block.qs.chunks_exact_mut(16)) {
        quantize(x, d, qs);
    }
}

fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let scales = block.scales(f32_from_f16(u16::from_le_bytes(block.d)));
    for ((y, d), qs) in y.chunks_exact_mut(32).zip(scales).zip(block.qs.chunks_exact(16)) {
        dequantize(qs, d, y);
    }
}

impl Block {
    /// Stores the scales of the groups, and gives those that their codes are to be taken for: as
    /// stored, but for the rounding of `d` to f16.
    #[inline(always)]
    pub(super) fn store_scales(&mut self, found: &[f32; 8]) -> [f32; 8] {
        let d = extreme(found) / -32.0;
        let id = inverse(d);
        let mut scales = [0.0; 8];
        let (mut scales_h, mut scales_l) = (0u16, 0u32);
        for j in 0..8 {
            let scale = nearest(id * found[j]).clamp(-32, 31);
            scales[j] = d * scale as f32;
            let bits = (scale + 32) as u16;
            scales_l |= u32::from(bits & 15) << (4 * j);
            scales_h |= bits >> 4 << (2 * j);
        }
        self.d = f16_from_f32(d).to_le_bytes();
        self.scales_h = scales_h.to_le_bytes();
        self.scales_l = scales_l.to_le_bytes();
        scales
    }

    /// The scale of each group, `d` read as f32.
    #[inline(always)]
    pub(super) fn scales(&self, d: f32) -> [f32; 8] {
        let (scales_h, scales_l) = (u16::from_le_bytes(self.scales_h), u32::from_le_bytes(self.scales_l));
        let mut scales = [0.0; 8];
        for (j, value) in scales.iter_mut().enumerate() {
            let scale = (scales_l >> (4 * j) & 15) as i32 | i32::from(scales_h >> (2 * j) & 3) << 4;
            *value = d * (scale - 32) as f32;
        }
        scales
    }
}
