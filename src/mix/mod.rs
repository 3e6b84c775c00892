//! Mixed precision: a type for each tensor, so that a model of a given size departs least from the one
//! that is not quantized, or one of a given quality is smallest.
//!
//! [`search()`] estimates what each tensor loses as each type ([`proxy`]), refines that by the KLD of models
//! in which a single tensor (or layer) is quantized ([`table`]), solves the choice among them
//! ([`knapsack`]), and measures the whole: divergences do not add up, so what single tensors promise is
//! scaled by what all together give. The result is a list of types by name, as `--tensor-type-file` reads
//! it.

pub mod knapsack;
#[cfg(feature = "ggml")]
pub mod measure;
pub mod proxy;
mod search;
pub mod table;
mod trials;

use std::path::PathBuf;

use crate::convert::Job;
use crate::error::{Error, Result};
use crate::eval::score::DivergenceSummary;
use crate::tensor::DType;

pub use search::{Mixture, search};

/// What is asked of the result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// All files together have at most so many bytes.
    Bytes(u64),
    /// The tensors have at most so many bits for each weight.
    BitsPerWeight(f64),
    /// The mean KLD stays below this many nats.
    Kld(f64),
    /// The perplexity rises by at most this share.
    PplIncrease(f64),
}

/// How much is measured of single tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Measure {
    /// Nothing: estimates alone count.
    Nothing,
    /// Each layer as one type, and each tensor outside layers.
    Layers,
    /// Each tensor as two types.
    #[default]
    Tensors,
    /// Each tensor as each type.
    All,
}

/// What is asked for, and by which means.
#[derive(Clone, Debug)]
pub struct Options {
    /// The target.
    pub target: Target,
    /// The types to choose among.
    pub types: Vec<DType>,
    /// What to measure.
    pub measure: Measure,
    /// Where sensitivities are kept, and found again.
    pub sensitivity: Option<PathBuf>,
}

/// Types to choose among where none are named: those that need no importance matrix, and are fast.
pub const TYPES: [DType; 6] = [DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K, DType::Q8_0];

/// Which part of the text a model is measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sample {
    /// The one that types are chosen by.
    Choosing,
    /// The one that only checks the result.
    HeldOut,
}

/// Who measures models.
pub trait Judge {
    /// The text in a few words, which tell it from others.
    fn text(&self) -> String;
    /// The file that jobs shall write.
    fn path(&self) -> PathBuf;
    /// Seconds that a measurement takes, about.
    fn seconds(&self) -> f64;
    /// Carries the job out, and compares what it wrote with the model that is not quantized.
    ///
    /// # Errors
    /// As jobs can be run and models executed.
    fn measure(&mut self, job: &Job, sample: Sample) -> Result<DivergenceSummary>;
}

/// What the search is doing.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// So many measurements of single tensors lie ahead, of about so many seconds each.
    Trials(usize, f64),
    /// The KLD of these tensors as this type.
    Trial(&'a table::Trial),
    /// A whole model: bytes, what was expected of it, and what was measured.
    Joint(u64, f64, &'a DivergenceSummary),
}

impl Target {
    /// What of a measurement is to stay below the target, and the target; `None` where size is the target.
    /// A standard error is added: other text may be less kind.
    fn quality(&self, found: &DivergenceSummary) -> Option<(f64, f64)> {
        match *self {
            Self::Kld(most) => Some((found.kld.value + found.kld.error, most)),
            Self::PplIncrease(most) => {
                Some(((found.ln_ratio.value + found.ln_ratio.error).exp_m1().max(1e-9), most))
            }
            Self::Bytes(_) | Self::BitsPerWeight(_) => None,
        }
    }

    /// # Errors
    /// `Misuse` for what is no size and no quality.
    fn check(&self) -> Result<()> {
        match *self {
            Self::Bytes(n) if n > 0 => Ok(()),
            Self::BitsPerWeight(x) | Self::Kld(x) | Self::PplIncrease(x) if x.is_finite() && x > 0.0 => {
                Ok(())
            }
            other => Err(Error::misuse(format!("the target {other:?} cannot be met: it must be above 0"))),
        }
    }
}
