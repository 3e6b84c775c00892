//! Programs: opening, calling.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::Rounding;
use super::call::{Call, Operand};
use super::parse::{self, Action, Declared, Function, Source, Step};
use super::tensor::{Data, Tensor, zeros};
use super::weight::{is_float, round};
use crate::container::coreml::{DataType, Package};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// Where the limit of [`Call::room`] is from.
pub(super) const MEMORY_HINT: &str = "the limit is 64 bytes for each of the package and 128 MiB, and at most --max-executor, or --max-memory of verify";
/// What a call may take in memory, of a package of any size, and for each of its bytes: contexts of some 100,000
/// tokens for models of 2 bits are within.
const SOME_MEMORY: u64 = 128 << 20;
const MEMORY_PER_BYTE: u64 = 64;
/// Where the limit of [`Call::fuel`] is from.
pub(super) const FUEL_HINT: &str = "the limit is 8192 elements for each byte of the package, and 32 Mi; 128 products of a matrix count as one";
/// Most elements of all operands and results of a call together, in the same way. A model of 2 bits that takes 4096
/// tokens at once takes some 500 for each byte, of 16,384 tokens some 5000.
const SOME_FUEL: u64 = 1 << 25;
const FUEL_PER_BYTE: u64 = 8192;
/// Bytes of an element in memory.
const ELEMENT: u64 = 4;

/// A program, ready to be called.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    functions: BTreeMap<String, Function>,
    /// Bytes of the package.
    pub(super) bytes: u64,
    /// Most elements that are in memory at a time.
    most_live: usize,
    /// Most elements of all operands and results of a call.
    fuel: u64,
}

/// What states hold, by name. States of functions that have the same name are the same.
#[derive(Clone, Debug, Default)]
pub struct States {
    /// `None` while a function has it, and after one that failed.
    values: BTreeMap<String, Option<Tensor>>,
    overflow: Option<String>,
}

impl Program {
    /// Opens a package: reads its model, and of its weights as much as is needed when it is. `limits` say how much
    /// memory a call may take.
    ///
    /// # Errors
    /// Those of [`Package::open`]; `Unsupported` for operations that are not known; `Malformed` for values that are
    /// used before they are made, and the like; `Limit` for states beyond the memory.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let package = Arc::new(Package::open(path, limits)?);
        let mut functions = BTreeMap::new();
        for (name, message) in &package.model().program.functions {
            let function = parse::function(&package, message)
                .map_err(|e| e.context(format_args!("function {name:?}")).at(path))?;
            functions.insert(name.clone(), function);
        }
        let bytes = package.bytes();
        let most =
            limits.executor_bytes.min(SOME_MEMORY.saturating_add(bytes.saturating_mul(MEMORY_PER_BYTE)));
        let most_live = usize::try_from(most / ELEMENT).unwrap_or(usize::MAX);
        let fuel = SOME_FUEL.saturating_add(bytes.saturating_mul(FUEL_PER_BYTE));
        let program = Self { path: path.into(), functions, bytes, most_live, fuel };
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
        self.check_memory([self.state_elements()])
    }

    /// That there may be memory for states of so many elements together.
    pub(super) fn check_memory(&self, states: impl IntoIterator<Item = usize>) -> Result<()> {
        let all = states.into_iter().fold(0, usize::saturating_add);
        match all > self.most_live {
            true => Err(beyond(format!("its states have {all} elements"), self.most_live)),
            false => Ok(()),
        }
    }

    /// The same of a tensor that goes into a call.
    pub(super) fn check_input(&self, shape: &[usize]) -> Result<()> {
        let n = shape.iter().try_fold(1usize, |n, size| n.checked_mul(*size));
        match n.is_none_or(|n| n > self.most_live) {
            true => Err(beyond(format!("an input of shape {shape:?}"), self.most_live).at(&self.path)),
            false => Ok(()),
        }
    }

    /// Elements of its states: those of all functions.
    pub(super) fn state_elements(&self) -> usize {
        let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
        sizes
            .extend(self.functions.values().flat_map(|f| &f.states).map(|s| (s.name.as_str(), s.elements())));
        sizes.values().fold(0, |all, n| all.saturating_add(*n))
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
    ///
    /// # Errors
    /// `Limit` where there is no memory for them.
    pub fn states(&self) -> Result<States> {
        let mut values = BTreeMap::new();
        for state in self.functions.values().flat_map(|f| &f.states) {
            if values.contains_key(&state.name) {
                continue;
            }
            let shape: Vec<usize> = state.shape.iter().map(|n| n.unwrap_or_default()).collect();
            let filled = zeros(state.elements()).map_err(|e| e.context(&state.name).at(&self.path))?;
            values.insert(state.name.clone(), Some(Tensor::of_floats(state.dtype, shape, filled)));
        }
        Ok(States { values, overflow: None })
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
            let most = self.most_live;
            let fuel = self.fuel;
            let mut run = Run { declared: &found.states, places, live: 0, most, fuel, states, rounding };
            run.inputs(found, inputs)?;
            for step in &found.steps {
                run.step(step).map_err(|e| e.context(&step.name))?;
            }
            let output = |(declared, source): &(Declared, Source)| {
                let operand = run.take(source)?;
                run.spend(&operand)?;
                let tensor = operand.tensor(run.most.saturating_sub(run.live))?;
                run.live = run.live.saturating_add(tensor.len());
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
    /// Elements of all places, and how many there may be.
    live: usize,
    most: usize,
    /// Elements that may still be computed.
    fuel: u64,
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

    /// Counts what is decoded outside of an operation.
    fn spend(&mut self, operand: &Operand) -> Result<()> {
        if let Operand::Weight(weight) = operand {
            let mut call = Call { fuel: self.fuel, ..Call::default() };
            call.work(weight.len())?;
            self.fuel = call.fuel;
        }
        Ok(())
    }

    fn put(&mut self, tensor: Tensor, place: Option<usize>) -> Result<()> {
        let Some(place) = place else { return Ok(()) };
        self.live = self.live.saturating_add(tensor.len());
        if self.live > self.most {
            return Err(beyond(format!("there would be {} elements in memory", self.live), self.most));
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
                let operand = self.take(data)?;
                self.spend(&operand)?;
                let tensor = operand.tensor(self.most.saturating_sub(self.live))?;
                return self.write(state, tensor);
            }
            Action::Run(operator, inputs) => {
                let mut call = Call {
                    inputs: Vec::with_capacity(inputs.len()),
                    results: step.results.len(),
                    declared: step.results.first().map(|(declared, _)| declared),
                    room: self.most.saturating_sub(self.live),
                    fuel: self.fuel,
                };
                call.work(1)?;
                for (parameter, sources) in inputs {
                    let operands: Vec<Operand> =
                        sources.iter().map(|source| self.take(source)).collect::<Result<_>>()?;
                    for operand in &operands {
                        if let Operand::Tensor(tensor) = operand {
                            call.work(tensor.len())?;
                        }
                    }
                    call.inputs.push((parameter, operands));
                }
                // What is declared is not more than there may be.
                for (declared, _) in &step.results {
                    let least: usize = declared.shape.iter().map(|n| n.unwrap_or(1)).product(); // bounded
                    if least > self.most {
                        return Err(beyond(format!("{:?} is declared {declared}", declared.name), self.most));
                    }
                }
                let found = (operator.run)(&mut call);
                self.fuel = call.fuel;
                let mut found = found?;
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

/// That something is more than the memory that calls may take.
fn beyond(what: String, most: usize) -> Error {
    let bytes = (most as u64).saturating_mul(ELEMENT);
    Error::limit(format!("{what}; executing may take {bytes} bytes, 4 for an element")).hint(MEMORY_HINT)
}
