//! Q5_1: 32 weights in 24 bytes, a scale and a minimum, codes of 5 bits.

use super::cast::{inverse, min_max, truncate};
use super::lattice::{Latticed, half, whole};
use super::q5_0::{pack, unpack};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16, weighed};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Minimum, f16 little endian.
    pub m: [u8; 2],
    /// Bit 4 of every code: weight `j` in bit `j` of this little-endian word.
    pub qh: [u8; 4],
    /// Bits 0 to 3: weight `j` in the low half of byte `j`, weight `j + 16` in the high half.
    /// A weight is `d * code + m`.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q5_1.type_size());

impl weighed::Weighed for Block {
    const MIDDLE: Option<u8> = None;
    const MOST: u8 = 31;

    #[inline(always)]
    fn pack(d: [u8; 2], m: [u8; 2], codes: &[u8; 32]) -> Self {
        let (qh, qs) = pack(codes);
        Self { d, m, qh, qs }
    }
}

impl Latticed<32> for Block {
    const GROUP: usize = 32;
    const LEVELS: &'static [f32] = &whole::<32>(0);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        let m = f32_from_f16(u16::from_le_bytes(self.m));
        lines.fill((d, m));
    }

    fn put(&mut self, codes: &[u8; 32]) {
        (self.qh, self.qs) = pack(codes);
    }

    fn set(&mut self, _: usize, (scale, offset): (f32, f32)) {
        self.d = half(scale);
        self.m = half(offset);
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q5_1,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: Some(weighed::portable::<Block>),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: Some(|x| super::q4_1::bound(x, 31.0)),
};

pub(super) fn encode_block(x: &[f32; 32], block: &mut Block) {
    let (min, max) = min_max(x);
    let d = (max - min) / 31.0;
    let id = inverse(d);
    block.d = f16_from_f32(d).to_le_bytes();
    block.m = f16_from_f32(min).to_le_bytes();
    (block.qh, block.qs) = pack(&x.map(|x| truncate((x - min) * id + 0.5) as u8));
}

fn decode_block(block: &Block, y: &mut [f32; 32]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let m = f32_from_f16(u16::from_le_bytes(block.m));
    for (y, code) in y.iter_mut().zip(unpack(&block.qh, &block.qs)) {
        *y = f32::from(code) * d + m;
    }
}
