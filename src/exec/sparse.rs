//! Weights most of whose elements are zero: a mask, and the others in order.

use std::sync::Arc;

use super::groups::Groups;
use super::weight::{RUN, Stored, Weight, table};
use crate::container::coreml::DataType;
use crate::error::{Error, Result};

/// Nonzero elements, in the order of the mask.
#[derive(Clone, Debug)]
pub(super) enum Values {
    /// As they are.
    Plain(Arc<Weight>),
    /// `constexpr_lut_to_sparse`: the table is that of the place in the whole.
    Lut { indices: Stored, lut: Arc<Weight>, groups: Arc<Groups> },
}

/// A weight with a mask.
#[derive(Debug)]
pub(super) struct Sparse {
    mask: Stored,
    /// Ones before each run of [`RUN`] bits.
    ranks: Vec<usize>,
    values: Values,
}

impl Values {
    /// `constexpr_lut_to_sparse`.
    ///
    /// # Errors
    /// `Malformed` for parts that do not go together; `Unsupported` for entries of several elements.
    pub(super) fn lut(mask: &Stored, indices: Stored, lut: Arc<Weight>) -> Result<Self> {
        let (groups, size) = table(&mask.shape, indices.dtype, &lut)?;
        if size != 1 {
            return Err(Error::unsupported("entries of several elements in what is sparse are not computed"));
        }
        Ok(Self::Lut { indices, lut, groups: Arc::new(groups) })
    }

    pub(super) fn dtype(&self) -> DataType {
        match self {
            Self::Plain(weight) => weight.dtype,
            Self::Lut { lut, .. } => lut.dtype,
        }
    }

    /// What they are made of.
    pub(super) fn weight(&self) -> &Arc<Weight> {
        match self {
            Self::Plain(weight) => weight,
            Self::Lut { lut, .. } => lut,
        }
    }

    /// The shape: one dimension.
    pub(super) fn shape(&self) -> &[usize] {
        match self {
            Self::Plain(weight) => &weight.shape,
            Self::Lut { indices, .. } => &indices.shape,
        }
    }
}

impl Sparse {
    /// # Errors
    /// `Malformed` where there are not as many values as ones in the mask.
    pub(super) fn new(mask: Stored, values: Values) -> Result<Self> {
        if mask.dtype != DataType::UInt1 {
            return Err(Error::malformed(format!("mask is {}, uint1 was expected", mask.dtype)));
        }
        let n = mask.shape.iter().product::<usize>();
        let (mut ones, mut ranks, mut bits) = (0, Vec::new(), [0; RUN]);
        for first in (0..n).step_by(RUN) {
            let bits = &mut bits[..RUN.min(n - first)];
            mask.codes(first, bits);
            ranks.push(ones);
            ones += bits.iter().map(|b| usize::from(*b)).sum::<usize>();
        }
        match values.shape() == [ones] {
            true => Ok(Self { mask, ranks, values }),
            false => Err(Error::malformed(format!(
                "nonzero_data has shape {:?}, the mask {ones} ones",
                values.shape()
            ))),
        }
    }

    /// The elements from `first` on. `out` has at most as many as remain.
    pub(super) fn read(&self, first: usize, out: &mut [f32]) {
        let mut done = 0;
        while done < out.len() {
            let at = first + done;
            let n = (RUN - at % RUN).min(out.len() - done);
            self.read_run(at, &mut out[done..done + n]);
            done += n;
        }
    }

    /// Within one run of the mask.
    fn read_run(&self, first: usize, out: &mut [f32]) {
        let (mut mask, begin) = ([0; RUN], first % RUN);
        let mask = &mut mask[..begin + out.len()];
        self.mask.codes(first - begin, mask);
        let (before, mask) = mask.split_at(begin);
        let ones = |bits: &[u8]| bits.iter().map(|b| usize::from(*b)).sum::<usize>();
        let (mut next, n) = (self.ranks[first / RUN] + ones(before), ones(mask));
        match &self.values {
            Values::Plain(weight) => {
                let mut values = [0.0; RUN];
                weight.read(next, &mut values[..n]);
                let mut values = values.into_iter();
                for (to, bit) in out.iter_mut().zip(mask) {
                    *to = if *bit == 1 { values.next().unwrap_or(0.0) } else { 0.0 };
                }
            }
            Values::Lut { indices, lut, groups } => {
                let (mut codes, mut table) = ([0; RUN], [0.0; 256]);
                indices.codes(next, &mut codes[..n]);
                next = 0;
                let entries = 1 << indices.dtype.bits();
                groups.runs(first, out.len(), |group, run| {
                    lut.read(group * entries, &mut table[..entries]);
                    for (to, bit) in out[run.clone()].iter_mut().zip(&mask[run]) {
                        *to = if *bit == 1 { table[usize::from(codes[next])] } else { 0.0 };
                        next += usize::from(*bit);
                    }
                });
            }
        }
    }
}
