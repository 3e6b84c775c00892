//! Q5_0: 32 weights in 22 bytes, one scale, codes of 5 bits around 16.

use super::cast::{extreme, inverse, truncate};
use super::lattice::{Latticed, half, whole};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16, weighed};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Bit 4 of every code: weight `j` in bit `j` of this little-endian word.
    pub qh: [u8; 4],
    /// Bits 0 to 3: weight `j` in the low half of byte `j`, weight `j + 16` in the high half.
    /// A weight is `d * (code - 16)`.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q5_0.type_size());

impl weighed::Weighed for Block {
    const MIDDLE: Option<u8> = Some(16);
    const MOST: u8 = 31;

    #[inline(always)]
    fn pack(d: [u8; 2], _: [u8; 2], codes: &[u8; 32]) -> Self {
        let (qh, qs) = pack(codes);
        Self { d, qh, qs }
    }
}

impl Latticed<32> for Block {
    const GROUP: usize = 32;
    const LEVELS: &'static [f32] = &whole::<32>(-16);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        lines.fill((d, 0.0));
    }

    fn put(&mut self, codes: &[u8; 32]) {
        (self.qh, self.qs) = pack(codes);
    }

    fn set(&mut self, _: usize, (scale, _): (f32, f32)) {
        self.d = half(scale);
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q5_0,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: Some(weighed::portable::<Block>),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: Some(|x| super::q4_0::bound(x, 16.0)),
};

/// The weight farthest from zero gets code 0, so that its sign picks the sign of `d`.
pub(super) fn encode_block(x: &[f32; 32], block: &mut Block) {
    let d = extreme(x) / -16.0;
    let id = inverse(d);
    block.d = f16_from_f32(d).to_le_bytes();
    let codes = x.map(|x| (truncate(x * id + 16.5) as i8).min(31) as u8);
    (block.qh, block.qs) = pack(&codes);
}

fn decode_block(block: &Block, y: &mut [f32; 32]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    for (y, code) in y.iter_mut().zip(unpack(&block.qh, &block.qs)) {
        *y = f32::from(code as i8 - 16) * d;
    }
}

/// Splits codes of 5 bits into their high bits and their low halves; Q5_1 shares it.
pub(super) fn pack(codes: &[u8; 32]) -> ([u8; 4], [u8; 16]) {
    let qh = codes.iter().enumerate().fold(0u32, |qh, (j, &c)| qh | u32::from(c >> 4 & 1) << j);
    let (low, high) = codes.split_at(16);
    let mut qs = [0; 16];
    for (q, (low, high)) in qs.iter_mut().zip(low.iter().zip(high)) {
        *q = low & 15 | high << 4;
    }
    (qh.to_le_bytes(), qs)
}

/// The inverse of [`pack`].
pub(super) fn unpack(qh: &[u8; 4], qs: &[u8; 16]) -> [u8; 32] {
    let qh = u32::from_le_bytes(*qh);
    let mut codes = [0; 32];
    let (low, high) = codes.split_at_mut(16);
    for (j, ((low, high), &q)) in low.iter_mut().zip(high).zip(qs).enumerate() {
        *low = q & 15 | ((qh >> j & 1) as u8) << 4;
        *high = q >> 4 | ((qh >> (j + 16) & 1) as u8) << 4;
    }
    codes
}
