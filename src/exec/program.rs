//! Programs: opening, calling.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Rounding, Tensor};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// A program, ready to be called.
#[derive(Debug)]
pub struct Program {
    functions: BTreeMap<String, ()>,
}

/// What states hold, by name. States of functions that have the same name are the same.
#[derive(Clone, Debug, Default)]
pub struct States {
    values: BTreeMap<String, Option<Tensor>>,
    overflow: Option<String>,
}

impl Program {
    /// Opens a package: reads its model and maps its weights. They must not be written to while this lives, see
    /// [`container::map`](crate::container::map).
    ///
    /// # Errors
    /// Those of [`Package::open`](crate::container::coreml::Package::open); `Unsupported` for operations that are not
    /// known; `Malformed` for values that are used before they are made, and the like.
    pub fn open(path: &Path, _limits: &Limits) -> Result<Self> {
        Err(Error::unsupported("programs are not executed yet").at(path))
    }

    /// Names of its functions.
    pub fn functions(&self) -> impl Iterator<Item = &str> {
        self.functions.keys().map(String::as_str)
    }

    /// Its states, filled with zeros: those of all functions.
    pub fn states(&self) -> States {
        States::default()
    }

    /// Calls a function. States are changed in place; they are lost when it fails.
    ///
    /// # Errors
    /// `Misuse` for inputs that are missing or of other types, `Malformed` for results that are not of the declared
    /// type, `Limit` for results that are too large.
    pub fn call(
        &self,
        function: &str,
        _inputs: &BTreeMap<String, Tensor>,
        _states: &mut States,
        _rounding: Rounding,
    ) -> Result<BTreeMap<String, Tensor>> {
        Err(Error::misuse(format!("there is no function {function:?}")))
    }
}

impl States {
    /// The state of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.values.get(name)?.as_ref()
    }

    /// The first operation whose result was beyond float16, where results are rounded to that.
    pub fn overflow(&self) -> Option<&str> {
        self.overflow.as_deref()
    }
}
