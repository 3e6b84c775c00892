//! Quantizers that know what a matrix is for: from the second moments of its inputs they choose codes
//! so that its output changes least, on the grids that the block types have.
//!
//! Adding a method: one file here, a variant of [`Method`] and its row in [`Method::NAMES`].

pub mod gptq;

use crate::block::Lattice;
use crate::container::moments::{Input, Moments};
use crate::error::{Error, Result};

/// How codes are chosen where second moments are known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// One weight after the other, with feedback of the error.
    Gptq(gptq::Options),
}

/// What a method made of the moments of an input, for all rows that read it.
#[derive(Debug)]
pub enum Prepared {
    /// For GPTQ.
    Gptq(gptq::Feedback),
}

impl Method {
    /// Every method by its name, as it is without options.
    pub const NAMES: &[(&str, fn() -> Self)] = &[("gptq", || Self::Gptq(gptq::Options::default()))];

    /// By its name, as it is without options.
    pub fn parse(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(own, _)| *own == name).map(|(_, new)| new())
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Gptq(_) => "gptq",
        }
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::NAMES.iter().map(|(name, _)| *name)
    }

    /// Bytes that preparing for an input of so many columns takes at most, and those that are then kept.
    pub fn bytes(&self, columns: u64) -> (u64, u64) {
        match self {
            Self::Gptq(_) => gptq::Feedback::bytes(columns),
        }
    }

    /// Fewest tokens that an input must have been seen with.
    pub fn least_tokens(&self) -> u64 {
        64
    }

    /// Prepares for the rows of one expert (0 where there are none).
    ///
    /// # Errors
    /// As the moments can be read; as the method says.
    pub fn prepare(&self, moments: &Moments, input: &Input, expert: u64) -> Result<Prepared> {
        let count = moments.counts(input)?.get(expert as usize).copied().unwrap_or(0);
        let sums = OfExpert { moments, input, expert };
        match self {
            Self::Gptq(options) => Ok(Prepared::Gptq(gptq::Feedback::new(&sums, count, options)?)),
        }
    }
}

impl Prepared {
    /// Encodes whole rows, and returns what each costs: the mean square of the change of its output.
    ///
    /// # Errors
    /// `Misuse` when sizes do not fit.
    pub fn encode(&self, lattice: &Lattice, weights: &[f32], out: &mut [u8]) -> Result<Vec<f64>> {
        match self {
            Self::Gptq(feedback) => feedback.encode(lattice, weights, out),
        }
    }
}

/// The moments of one expert.
struct OfExpert<'a> {
    moments: &'a Moments,
    input: &'a Input,
    expert: u64,
}

impl gptq::Sums for OfExpert<'_> {
    fn columns(&self) -> usize {
        self.input.columns as usize
    }

    fn read(&self, i: usize, row: &mut [f32]) -> Result<()> {
        self.moments.read_packed(self.input, self.expert, self.input.row_start(i as u64), row)?;
        match row.iter().any(|v| !v.is_finite()) {
            true => Err(Error::malformed(format!("moments of {:?} are not finite", self.input.name))),
            false => Ok(()),
        }
    }
}
