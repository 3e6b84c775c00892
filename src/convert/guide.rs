//! Which tensors are rounded by which method, by what second moments.

use std::path::PathBuf;
use std::sync::Arc;

use super::plan::{Guide, Rounding, TensorPlan};
use crate::block::gram::PANEL;
use crate::block::lattice;
use crate::container::moments::Moments;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::quantize::Method;

/// A method, and the moments it needs.
#[derive(Clone, Debug)]
pub struct MethodChoice {
    /// The method.
    pub method: Method,
    /// What `qconv calibrate` wrote.
    pub moments: PathBuf,
}

/// A method with its moments opened.
pub(super) struct Guiding {
    method: Method,
    moments: Arc<Moments>,
}

impl Guiding {
    pub fn open(choice: &MethodChoice, limits: &Limits) -> Result<Self> {
        let moments = Arc::new(Moments::open(&choice.moments, limits)?);
        Ok(Self { method: choice.method, moments })
    }

    /// The guide for a tensor, named as in the model; `None` where its type has no lattice, or its input
    /// was not calibrated.
    pub fn find(&self, name: &str, tensor: &TensorPlan) -> Option<Guide> {
        let lattice = lattice(tensor.dtype)?;
        let input = self.moments.input_of(name)?;
        let (columns, rows) = tensor.rows();
        let experts = (tensor.source.elements() / columns / rows).max(1);
        let fits = input.columns == columns && input.experts == experts;
        (fits && columns.is_multiple_of(PANEL as u64)).then(|| Guide {
            moments: self.moments.clone(),
            input: input.clone(),
            method: self.method,
            lattice,
        })
    }

    /// What was guided, and what was not.
    pub fn note(&self, tensors: &[TensorPlan]) -> String {
        let guided = tensors.iter().filter(|t| matches!(t.rounding, Rounding::Guided(_))).count();
        let other = tensors.iter().filter(|t| t.dtype.is_block() && !t.is_plain()).count() - guided;
        format!("{guided} tensors are rounded by {:?}, {other} others as llama.cpp does", self.method)
    }
}

impl MethodChoice {
    /// By its name.
    ///
    /// # Errors
    /// `Misuse` for an unknown name, or where a method lacks its moments.
    pub fn parse(name: &str, moments: Option<PathBuf>) -> Result<Self> {
        let method = match name {
            "gptq" => Method::Gptq(crate::quantize::gptq::Options::default()),
            _ => return Err(Error::misuse(format!("{name:?} is no method; there is gptq"))),
        };
        let moments = moments.ok_or_else(|| {
            Error::misuse(format!("--method {name} needs second moments"))
                .hint("make them with qconv calibrate MODEL -o FILE, and give them with --moments FILE")
        })?;
        Ok(Self { method, moments })
    }
}
