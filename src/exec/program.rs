//! Programs: opening, calling.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::Rounding;
use super::call::{Call, Operand};
use super::parse::{self, Action, Declared, Function, Source, Step};
use super::tensor::{Data, Tensor};
use super::weight::{Bytes, is_float, round};
use crate::container::coreml::{DataType, Package};
use crate::container::map::MappedFile;
use crate::error::{Error, Result};
use crate::limits::Limits;

/// Most elements that are in memory at a time.
const MOST_LIVE: usize = 1 << 31;

/// A program, ready to be called.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    functions: BTreeMap<String, Function>,
}

/// What states hold, by name. States of functions that have the same name are the same.
#[derive(Clone, Debug, Default)]
pub struct States {
    /// `None` while a function has it, and after one that failed.
    values: BTreeMap<String, Option<Tensor>>,
    overflow: Option<String>,
}

impl Program {
    /// Opens a package: reads its model and maps its weights. They must not be written to while this lives, see
    /// [`container::map`](crate::container::map).
    ///
    /// # Errors
    /// Those of [`Package::open`]; `Unsupported` for operations that are not known; `Malformed` for values that are
    /// used before they are made, and the like.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let package = Package::open(path, limits)?;
        let mut maps = BTreeMap::new();
        for (name, weights) in package.weights() {
            maps.insert(name.as_str(), Arc::new(MappedFile::new(weights.file())?));
        }
        let mut functions = BTreeMap::new();
        for (name, message) in &package.model().program.functions {
            let function = parse::function(message, &|value, ty| {
                let (_, blob) = package.blob(value, ty)?;
                let missing = || Error::malformed(format!("no value lies in {:?}", value.file_name));
                let map = maps.get(value.file_name.as_str()).ok_or_else(missing)?;
                // Within the file, as the package has checked.
                let (begin, n) = (blob.data() as usize, blob.bytes as usize);
                Ok(Bytes::Mapped(map.clone(), begin..begin + n))
            });
            let function = function.map_err(|e| e.context(format_args!("function {name:?}")).at(path))?;
            functions.insert(name.clone(), function);
        }
        let program = Self { path: path.into(), functions };
        program.check_states().map_err(|e| e.at(path))?;
        Ok(program)
    }

    /// That states of one name are of one type, and are not too large together.
    fn check_states(&self) -> Result<()> {
        let mut types: BTreeMap<&str, &Declared> = BTreeMap::new();
        for state in self.functions.values().flat_map(|f| &f.states) {
            let first = *types.entry(&state.name).or_insert(state);
            if (first.dtype, &first.shape) != (state.dtype, &state.shape) {
                let name = &state.name;
                return Err(Error::malformed(format!("the state {name:?} is {first} and {state}")));
            }
        }
        let size = |state: &&Declared| state.shape.iter().map(|n| n.unwrap_or(0)).product::<usize>();
        match types.values().map(size).fold(0, usize::saturating_add) {
            all if all > MOST_LIVE => Err(Error::limit(format!(
                "its states have {all} elements, at most {MOST_LIVE} are computed with"
            ))),
            _ => Ok(()),
        }
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of its functions, in order.
    pub fn functions(&self) -> impl Iterator<Item = &str> {
        self.functions.keys().map(String::as_str)
    }

    pub(super) fn function(&self, name: &str) -> Option<&Function> {
        self.functions.get(name)
    }

    /// Its states, filled with zeros: those of all functions.
    pub fn states(&self) -> States {
        let zeros = |state: &Declared| {
            let shape: Vec<usize> = state.shape.iter().map(|n| n.unwrap_or_default()).collect();
            let n = shape.iter().product();
            Some(Tensor::of_floats(state.dtype, shape, vec![0.0; n]))
        };
        let mut values = BTreeMap::new();
        for state in self.functions.values().flat_map(|f| &f.states) {
            values.entry(state.name.clone()).or_insert_with(|| zeros(state));
        }
        States { values, overflow: None }
    }

    /// Calls a function. States are changed in place; those that it was writing are lost when it fails.
    ///
    /// # Errors
    /// `Misuse` for inputs that are missing or of other types, `Malformed` for results that are not of the declared
    /// type, `Limit` for results that are too large.
    pub fn call(
        &self,
        function: &str,
        inputs: &BTreeMap<String, Tensor>,
        states: &mut States,
        rounding: Rounding,
    ) -> Result<BTreeMap<String, Tensor>> {
        let found = self.functions.get(function).ok_or_else(|| {
            let known: Vec<&str> = self.functions().collect();
            Error::misuse(format!("there is no function {function:?}")).hint(format!("it has {known:?}"))
        });
        let run = |found: &Function| {
            let places = vec![None; found.places];
            let mut run = Run { declared: &found.states, places, live: 0, states, rounding };
            run.inputs(found, inputs)?;
            for step in &found.steps {
                run.step(step).map_err(|e| e.context(&step.name))?;
            }
            let output = |(declared, source): &(Declared, Source)| {
                let tensor = run.take(source)?.tensor()?;
                Ok((declared.name.clone(), tensor))
            };
            found.outputs.iter().map(output).collect()
        };
        found
            .and_then(run)
            .map_err(|e: Error| e.context(format_args!("function {function:?}")).at(&self.path))
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

/// A function that is being executed.
struct Run<'a> {
    /// Its states.
    declared: &'a [Declared],
    places: Vec<Option<Tensor>>,
    /// Elements of all places.
    live: usize,
    states: &'a mut States,
    rounding: Rounding,
}

impl Run<'_> {
    fn inputs(&mut self, function: &Function, inputs: &BTreeMap<String, Tensor>) -> Result<()> {
        for (declared, place) in &function.inputs {
            let name = &declared.name;
            let given = inputs.get(name).cloned();
            let mut tensor =
                given.ok_or_else(|| Error::misuse(format!("the input {name:?} is missing: {declared}")))?;
            if is_float(tensor.dtype) && is_float(declared.dtype) {
                tensor.dtype = declared.dtype;
            }
            declared
                .check(tensor.dtype, &tensor.shape)
                .map_err(|e| Error::misuse(format!("an input: {e}")))?;
            self.round(&mut tensor, name);
            self.put(tensor, *place)?;
        }
        let unknown = |name: &&String| !function.inputs.iter().any(|(d, _)| d.name == **name);
        match inputs.keys().find(unknown) {
            Some(name) => Err(Error::misuse(format!("there is no input {name:?}"))),
            None => Ok(()),
        }
    }

    fn put(&mut self, tensor: Tensor, place: Option<usize>) -> Result<()> {
        let Some(place) = place else { return Ok(()) };
        self.live += tensor.len();
        if self.live > MOST_LIVE {
            let found = self.live;
            return Err(Error::limit(format!(
                "{found} elements in memory, at most {MOST_LIVE} are computed with"
            )));
        }
        self.places[place] = Some(tensor);
        Ok(())
    }

    fn take(&mut self, source: &Source) -> Result<Operand> {
        match source {
            Source::Constant(operand) => Ok(operand.clone()),
            Source::Place { at, last } => {
                let place = &mut self.places[*at];
                let tensor = if *last { place.take() } else { place.clone() };
                // Every place is filled before it is read, by the order of steps.
                let tensor = tensor.ok_or_else(|| Error::malformed("a value is used before it is made"))?;
                if *last {
                    self.live -= tensor.len();
                }
                Ok(Operand::Tensor(tensor))
            }
        }
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        let found = match &step.action {
            Action::Read { state, take } => {
                let value = self.states.values.get_mut(state);
                let value = value.and_then(|value| if *take { value.take() } else { value.clone() });
                vec![value.ok_or_else(|| {
                    Error::misuse(format!(
                        "the state {state:?} is of another program, or lost in a call that failed"
                    ))
                })?]
            }
            Action::Write { state, data } => {
                let tensor = self.take(data)?.tensor()?;
                return self.write(state, tensor);
            }
            Action::Run(operator, inputs) => {
                let mut call = Call { inputs: Vec::with_capacity(inputs.len()), results: step.results.len() };
                for (parameter, sources) in inputs {
                    let operands = sources.iter().map(|source| self.take(source)).collect::<Result<_>>()?;
                    call.inputs.push((parameter, operands));
                }
                let mut found = (operator.run)(&mut call)?;
                if operator.computes {
                    found.iter_mut().for_each(|tensor| self.round(tensor, &step.name));
                }
                found
            }
        };
        if found.len() < step.results.len() {
            return Err(Error::malformed(format!(
                "{} results are declared, it has {}",
                step.results.len(),
                found.len()
            )));
        }
        for (tensor, (declared, place)) in found.into_iter().zip(&step.results) {
            declared.check(tensor.dtype, &tensor.shape)?;
            self.put(tensor, *place)?;
        }
        Ok(())
    }

    fn write(&mut self, state: &str, tensor: Tensor) -> Result<()> {
        let declared = self.declared.iter().find(|d| d.name == state);
        declared.map_or(Ok(()), |declared| declared.check(tensor.dtype, &tensor.shape))?;
        self.states.values.insert(state.into(), Some(tensor));
        Ok(())
    }

    /// Rounds what is declared float16, where that is wanted.
    fn round(&mut self, tensor: &mut Tensor, name: &str) {
        if self.rounding == Rounding::F32 || tensor.dtype != DataType::Float16 {
            return;
        }
        if let Data::Floats(values) = &mut tensor.data {
            let chunks = Arc::make_mut(values).par_chunks_mut(1 << 14);
            if chunks.map(round).reduce(|| false, |a, b| a | b) {
                self.states.overflow.get_or_insert_with(|| name.into());
            }
        }
    }
}
