//! The values that weights of an encoded block can take, its scales given. Quantizers that choose codes
//! by other means than rounding each weight by itself (GPTQ and its like) search among these, and store
//! the codes they chose. Blocks are those of a type, or of integers in groups ([`super::uniform`]).

use super::uniform::Grid;
use super::{Codec, codec, f16_from_f32};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Block types whose weights are independent of each other once the scales are fixed.
/// `N` is the weights of a block.
pub(super) trait Latticed<const N: usize>: bytemuck::Pod {
    /// Weights that share a scale.
    const GROUP: usize;
    /// What codes stand for, ascending: a weight is `scale * LEVELS[code] + offset`.
    const LEVELS: &'static [f32];

    /// Scale and offset of each group, as the decoder reads them.
    fn lines(&self, lines: &mut [(f32, f32)]);
    /// Stores codes, one for each weight, each below the number of levels.
    fn put(&mut self, codes: &[u8; N]);
    /// Brings scale and offset of a group as near to these as the block can, the other groups' staying
    /// as they are.
    fn set(&mut self, group: usize, line: (f32, f32));
}

/// The lattice of a type, or of integers in groups.
#[derive(Clone, Copy, Debug)]
pub struct Lattice {
    /// Weights of a block.
    pub block_size: usize,
    /// Bytes of a block.
    pub type_size: usize,
    /// Weights that share a scale.
    pub group: usize,
    /// Weights that begin with a block: rows, whose last block may be filled in part; of types one block.
    row: usize,
    /// What codes stand for, ascending: a weight is `scale * levels[code] + offset`, in F32.
    pub levels: &'static [f32],
    form: Form,
}

/// How blocks are made.
#[derive(Clone, Copy, Debug)]
enum Form {
    Type {
        dtype: DType,
        lines: fn(&[u8], &mut [(f32, f32)]),
        put: fn(&[u8], &mut [u8]),
        set: fn(usize, (f32, f32), &mut [u8]),
    },
    Grid(Grid),
}

const fn lattice_of<B: Latticed<N>, const N: usize>(dtype: DType) -> Lattice {
    let form = Form::Type {
        dtype,
        lines: |bytes, lines| {
            let blocks = bytemuck::cast_slice::<u8, B>(bytes);
            for (block, lines) in blocks.iter().zip(lines.chunks_exact_mut(N / B::GROUP)) {
                block.lines(lines);
            }
        },
        put: |codes, bytes| {
            let blocks = bytemuck::cast_slice_mut::<u8, B>(bytes);
            for (block, codes) in blocks.iter_mut().zip(codes.as_chunks().0) {
                block.put(codes);
            }
        },
        set: |group, line, bytes| {
            let blocks = bytemuck::cast_slice_mut::<u8, B>(bytes);
            if let Some(block) = blocks.get_mut(group / (N / B::GROUP)) {
                block.set(group % (N / B::GROUP), line);
            }
        },
    };
    Lattice { block_size: N, type_size: size_of::<B>(), group: B::GROUP, row: N, levels: B::LEVELS, form }
}

/// Every type that has a lattice: the one table.
static LATTICES: &[Lattice] = &[
    lattice_of::<super::q4_0::Block, 32>(DType::Q4_0),
    lattice_of::<super::q4_1::Block, 32>(DType::Q4_1),
    lattice_of::<super::q5_0::Block, 32>(DType::Q5_0),
    lattice_of::<super::q5_1::Block, 32>(DType::Q5_1),
    lattice_of::<super::q8_0::Block, 32>(DType::Q8_0),
    lattice_of::<super::q2_k::Block, 256>(DType::Q2_K),
    lattice_of::<super::q3_k::Block, 256>(DType::Q3_K),
    lattice_of::<super::q4_k::Block, 256>(DType::Q4_K),
    lattice_of::<super::q5_k::Block, 256>(DType::Q5_K),
    lattice_of::<super::q6_k::Block, 256>(DType::Q6_K),
    lattice_of::<super::iq4_nl::Block, 32>(DType::IQ4_NL),
    lattice_of::<super::iq4_xs::Block, 256>(DType::IQ4_XS),
    lattice_of::<super::tq1_0::Block, 256>(DType::TQ1_0),
    lattice_of::<super::tq2_0::Block, 256>(DType::TQ2_0),
];

/// The lattice of `dtype`; `None` for types whose codes are not independent, or that have no scale.
pub fn lattice(dtype: DType) -> Option<&'static Lattice> {
    LATTICES.iter().find(|l| l.dtype() == Some(dtype))
}

impl Lattice {
    /// That of rows of integers in groups of so many.
    pub(super) fn of_grid(
        grid: Grid,
        row: usize,
        group: usize,
        type_size: usize,
        levels: &'static [f32],
    ) -> Self {
        Self { block_size: group, type_size, group, row, levels, form: Form::Grid(grid) }
    }

    /// The type whose blocks these are; `None` for integers in groups.
    pub fn dtype(&self) -> Option<DType> {
        match self.form {
            Form::Type { dtype, .. } => Some(dtype),
            Form::Grid(_) => None,
        }
    }

    /// Whether offsets can be other than 0: those of types whose levels count from 0.
    pub fn has_offset(&self) -> bool {
        self.levels.first() == Some(&0.0)
    }

    /// Whether offsets are the scale times a whole number, the zero, with its sign changed.
    pub fn has_zero(&self) -> bool {
        self.has_offset() && matches!(self.form, Form::Grid(_))
    }

    /// Bytes of so many weights, which have to fill whole blocks, or whole rows of integers.
    pub fn bytes(&self, weights: usize) -> usize {
        weights / self.row * self.row.div_ceil(self.block_size) * self.type_size
    }

    /// Groups of so many weights, as for [`Self::bytes`].
    pub fn groups(&self, weights: usize) -> usize {
        weights / self.row * self.row.div_ceil(self.group)
    }

    /// Encodes rows of `row` weights by the search that the type or grid has, the errors of each column
    /// weighed by its importance.
    ///
    /// # Errors
    /// As [`Codec::encode`]; `Misuse` when sizes do not fit.
    pub fn encode(&self, weights: &[f32], row: usize, importance: &[f32], bytes: &mut [u8]) -> Result<()> {
        match &self.form {
            Form::Type { dtype, .. } => codec_of(*dtype)?.encode(weights, row, Some(importance), bytes),
            Form::Grid(grid) => {
                self.check(bytes, weights.len())?;
                if row != importance.len() || row != self.row {
                    let what = format!("importance of {} columns for rows of {row}", importance.len());
                    return Err(Error::misuse(what));
                }
                grid.encode(self.group, weights, importance, bytes);
                Ok(())
            }
        }
    }

    /// The weights of encoded blocks.
    ///
    /// # Errors
    /// `Misuse` when `bytes` are not the blocks of so many weights.
    pub fn decode(&self, bytes: &[u8], weights: &mut [f32]) -> Result<()> {
        match &self.form {
            Form::Type { dtype, .. } => codec_of(*dtype)?.decode(bytes, weights),
            Form::Grid(grid) => {
                self.check(bytes, weights.len())?;
                grid.decode(self.row, self.group, bytes, weights);
                Ok(())
            }
        }
    }

    /// Scale and offset of each group of encoded weights.
    ///
    /// # Errors
    /// `Misuse` when `bytes` are not whole blocks, or `lines` are not as many as their groups.
    pub fn lines(&self, bytes: &[u8], lines: &mut [(f32, f32)]) -> Result<()> {
        if self.groups_of(bytes) != Some(lines.len()) {
            return Err(self.misfit(bytes));
        }
        match &self.form {
            Form::Type { lines: read, .. } => read(bytes, lines),
            Form::Grid(grid) => grid.lines(self.group, bytes, lines),
        }
        Ok(())
    }

    /// Replaces the codes of encoded weights, whose scales stay. Every code must be below the number of
    /// levels; higher bits are lost.
    ///
    /// # Errors
    /// `Misuse` when `bytes` are not whole blocks, or `codes` are not as many as their weights.
    pub fn put(&self, codes: &[u8], bytes: &mut [u8]) -> Result<()> {
        self.check(bytes, codes.len())?;
        match &self.form {
            Form::Type { put, .. } => put(codes, bytes),
            Form::Grid(grid) => grid.put(self.row, self.group, codes, bytes),
        }
        Ok(())
    }

    /// Brings scale and offset of a group of encoded weights as near to `line` as the type can without
    /// a change to other groups: where these share a scale of their scales, that stays. Codes stay too.
    /// What is not finite changes nothing.
    ///
    /// # Errors
    /// `Misuse` when `bytes` are not whole blocks, or have no such group.
    pub fn set(&self, group: usize, line: (f32, f32), bytes: &mut [u8]) -> Result<()> {
        let groups = self.groups_of(bytes).ok_or_else(|| self.misfit(bytes))?;
        if group >= groups {
            return Err(Error::misuse(format!("of {groups} groups there is no group {group}")));
        }
        if line.0.is_finite() && line.1.is_finite() {
            match &self.form {
                Form::Type { set, .. } => set(group, line, bytes),
                Form::Grid(grid) => grid.set(line, &mut bytes[group * self.type_size..]),
            }
        }
        Ok(())
    }

    /// The groups of whole blocks.
    fn groups_of(&self, bytes: &[u8]) -> Option<usize> {
        let is_whole = bytes.len().is_multiple_of(self.type_size);
        is_whole.then(|| bytes.len() / self.type_size * (self.block_size / self.group))
    }

    fn check(&self, bytes: &[u8], weights: usize) -> Result<()> {
        match weights.is_multiple_of(self.row) && self.bytes(weights) == bytes.len() {
            true => Ok(()),
            false => Err(self.misfit(bytes)),
        }
    }

    fn misfit(&self, bytes: &[u8]) -> Error {
        let of = self.dtype().map_or_else(|| "integers in groups".to_string(), |dtype| dtype.to_string());
        Error::misuse(format!("{} bytes are not the blocks of these {of} weights", bytes.len()))
    }
}

fn codec_of(dtype: DType) -> Result<&'static Codec> {
    codec(dtype).ok_or_else(|| Error::unsupported(format!("type {dtype} has no codec")))
}

/// `N` levels, one apart.
pub(super) const fn whole<const N: usize>(first: i16) -> [f32; N] {
    let mut levels = [0.0; N];
    let mut i = 0;
    while i < N {
        levels[i] = (first + i as i16) as f32;
        i += 1;
    }
    levels
}

/// The f16 next to `x`, little endian; the greatest for what is beyond.
pub(super) fn half(x: f32) -> [u8; 2] {
    f16_from_f32(x.clamp(-65504.0, 65504.0)).to_le_bytes()
}

/// How many times `unit` comes nearest to `x`.
pub(super) fn steps(x: f32, unit: f32, least: i32, most: i32) -> i32 {
    if unit == 0.0 {
        return 0;
    }
    ((x / unit).round_ties_even() as i32).clamp(least, most)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_row_is_a_block_type_of_its_own() {
        for (i, l) in LATTICES.iter().enumerate() {
            let dtype = l.dtype().unwrap();
            assert!(l.levels.is_sorted(), "{dtype}");
            assert!(l.block_size.is_multiple_of(l.group));
            assert_eq!(
                [l.block_size, l.type_size].map(|n| n as u64),
                [dtype.block_size(), dtype.type_size()]
            );
            assert!(LATTICES[..i].iter().all(|other| other.dtype() != l.dtype()));
        }
        assert!(lattice(DType::Q4_0).unwrap().lines(&[0; 17], &mut [(0.0, 0.0)]).is_err());
        assert!(lattice(DType::Q4_0).unwrap().put(&[0; 31], &mut [0; 18]).is_err());
        assert!(lattice(DType::Q4_0).unwrap().set(1, (0.0, 0.0), &mut [0; 18]).is_err());
    }

    proptest! {
        /// What is put is what the decoder reads, whatever the scales.
        #[test]
        fn decoded_is_what_was_put(picks in prop::collection::vec(any::<u8>(), 512), row in prop::collection::vec(-3f32..3.0, 512)) {
            let grid = |bits: u32, group_size, symmetric| {
                Grid { levels: 1 << bits, group_size, symmetric, least_zero: 1 }.lattice(512).unwrap()
            };
            let grids = [grid(4, Some(32), true), grid(8, None, true), grid(2, Some(120), false), grid(8, Some(65), false), grid(1, Some(32), false)];
            for lattice in LATTICES.iter().chain(&grids) {
                let mut bytes = vec![0; lattice.bytes(512)];
                match lattice.dtype() {
                    Some(dtype) => codec_of(dtype).unwrap().encode(&row, 512, None, &mut bytes).unwrap(),
                    None => lattice.encode(&row, 512, &[1.0; 512], &mut bytes).unwrap(),
                }
                let mut lines = vec![(0.0, 0.0); lattice.groups(512)];
                lattice.lines(&bytes, &mut lines).unwrap();
                let codes: Vec<u8> =
                    picks.iter().map(|&p| (usize::from(p) % lattice.levels.len()) as u8).collect();
                lattice.put(&codes, &mut bytes).unwrap();
                let mut decoded = vec![0f32; 512];
                lattice.decode(&bytes, &mut decoded).unwrap();
                for (i, (&code, &y)) in codes.iter().zip(&decoded).enumerate() {
                    let (scale, offset) = lines[i / lattice.group];
                    let expected = scale * lattice.levels[usize::from(code)] + offset;
                    prop_assert!(expected == y, "{lattice:?} weight {i}: {expected} {y}");
                }
                let mut after = lines.clone();
                lattice.lines(&bytes, &mut after).unwrap();
                prop_assert_eq!(&after, &lines);
                // What a group has can be set; what it has not comes near, and other groups stay.
                for (group, &line) in lines.iter().enumerate() {
                    lattice.set(group, line, &mut bytes).unwrap();
                }
                lattice.lines(&bytes, &mut after).unwrap();
                prop_assert_eq!(&after, &lines);
                let group = usize::from(picks[0]) % lines.len();
                let wanted = 0.5 * (lines[group].0 + lines[(group + 1) % lines.len()].0);
                let before = (wanted - lines[group].0).abs();
                lattice.set(group, (wanted, lines[group].1), &mut bytes).unwrap();
                lattice.set(group, (f32::NAN, 0.0), &mut bytes).unwrap();
                lattice.lines(&bytes, &mut after).unwrap();
                let (line, was) = (after[group], lines[group]);
                let near = (wanted - line.0).abs() <= before && (line.1 == was.1 || lattice.has_zero());
                prop_assert!(near, "{lattice:?} {line:?}");
                after[group] = was;
                prop_assert_eq!(&after, &lines);
            }
        }
    }
}
