//! Functions of a program as steps: names become places, constants are read once.

use std::collections::HashMap;
use std::sync::Arc;

use super::call::Operand;
use super::ops::{Operator, find};
use super::tensor::{Data, MOST_STORED, Tensor, bounded};
use super::weight::{Weight, is_float};
use crate::container::coreml::mil::{
    Binding, Function as Message, ImmediateValue, NamedValueType, Operation, Stored, TensorValue, Value,
    ValueType,
};
use crate::container::coreml::{Constant, DataType, Form, Package, constant, constants};
use crate::error::{Error, Result};

/// The type that a value is declared to have.
#[derive(Debug)]
pub(super) struct Declared {
    pub(super) name: String,
    pub(super) dtype: DataType,
    /// `None` is a size that is not known before execution.
    pub(super) shape: Vec<Option<usize>>,
}

/// What a step reads.
#[derive(Debug)]
pub(super) enum Source {
    Constant(Operand),
    /// A place, and whether nobody reads it later.
    Place {
        at: usize,
        last: bool,
    },
}

#[derive(Debug)]
pub(super) enum Action {
    /// An operation, with its parameters.
    Run(&'static Operator, Vec<(String, Vec<Source>)>),
    /// Reads a state: takes it, where it is written next.
    Read {
        state: String,
        take: bool,
    },
    Write {
        state: String,
        data: Source,
    },
}

#[derive(Debug)]
pub(super) struct Step {
    /// `linear "blk_0_attn_q"`
    pub(super) name: String,
    pub(super) action: Action,
    /// Where each result goes; `None` where nobody reads it.
    pub(super) results: Vec<(Declared, Option<usize>)>,
}

/// A function, ready to be executed.
#[derive(Debug)]
pub(super) struct Function {
    /// Its inputs, and their places.
    pub(super) inputs: Vec<(Declared, Option<usize>)>,
    /// What it gives, in order.
    pub(super) outputs: Vec<(Declared, Source)>,
    /// Its states, all of whose sizes are known.
    pub(super) states: Vec<Declared>,
    pub(super) steps: Vec<Step>,
    /// How many places there are.
    pub(super) places: usize,
}

/// Constants of at most so many elements that stand in the program are decoded once.
const FEW: usize = 1 << 12;

/// What a name stands for.
enum Known {
    Constant(Operand),
    /// The second result of `constexpr_lut_to_sparse` and the like.
    Sparse,
    Place(usize),
    State,
}

struct Parser<'a> {
    package: &'a Arc<Package>,
    constants: HashMap<String, Arc<Constant>>,
    known: HashMap<&'a str, Known>,
    types: HashMap<&'a str, &'a ValueType>,
    places: usize,
}

/// Reads a function.
///
/// # Errors
/// `Unsupported` for operations and constants that are not known; `Malformed` for names that stand for nothing, or for
/// two things, and the like.
pub(super) fn function(package: &Arc<Package>, message: &Message) -> Result<Function> {
    let block = message
        .block_specializations
        .get(&message.opset)
        .ok_or_else(|| Error::malformed(format!("has no block for its opset {:?}", message.opset)))?;
    let constants = constants(package, message)?.into_iter().map(|c| (c.name.clone(), c)).collect();
    let mut parser = Parser { package, constants, known: HashMap::new(), types: HashMap::new(), places: 0 };
    let (mut inputs, mut states) = (Vec::new(), Vec::new());
    for input in &message.inputs {
        let context = |e: Error| e.context(format_args!("input {:?}", input.name));
        if let ValueType::State(of) = &input.value_type {
            let state = declared(&input.name, &of.0).map_err(context)?;
            if state.shape.contains(&None) || !is_float(state.dtype) {
                return Err(context(Error::unsupported("its state is not of floats and of one shape")));
            }
            parser.define(input, Known::State).map_err(context)?;
            states.push(state);
        } else {
            let place = parser.place();
            parser.define(input, Known::Place(place)).map_err(context)?;
            inputs.push((declared(&input.name, &input.value_type).map_err(context)?, Some(place)));
        }
    }
    let mut steps = Vec::new();
    for (n, operation) in block.operations.iter().enumerate() {
        let name = match operation.outputs.first() {
            Some(first) => format!("{} {:?}", operation.kind, first.name),
            None => format!("operation {n}, {}", operation.kind),
        };
        let step = parser.operation(operation, &name).map_err(|e| e.context(name))?;
        steps.extend(step);
    }
    let output = |name: &String| {
        let missing = || Error::malformed(format!("its output {name:?} is made by no operation"));
        let ty = parser.types.get(name.as_str()).ok_or_else(missing)?;
        Ok((declared(name, ty)?, parser.source(name)?))
    };
    let outputs = block.outputs.iter().map(output).collect::<Result<_>>()?;
    let mut function = Function { inputs, outputs, states, steps, places: parser.places };
    last_uses(&mut function);
    states_taken(&mut function);
    Ok(function)
}

/// Marks what reads a place last, and drops results that nobody reads.
fn last_uses(function: &mut Function) {
    let mut used = vec![false; function.places];
    let mut mark = |source: &mut Source| {
        if let Source::Place { at, last } = source {
            *last = !std::mem::replace(&mut used[*at], true);
        }
    };
    function.outputs.iter_mut().rev().for_each(|(_, source)| mark(source));
    for step in function.steps.iter_mut().rev() {
        match &mut step.action {
            Action::Run(_, inputs) => {
                inputs.iter_mut().rev().for_each(|(_, sources)| sources.iter_mut().rev().for_each(&mut mark));
            }
            Action::Write { data, .. } => mark(data),
            Action::Read { .. } => {}
        }
    }
    let results = function.steps.iter_mut().flat_map(|step| &mut step.results);
    for (_, place) in results.chain(&mut function.inputs) {
        *place = place.filter(|at| used[*at]);
    }
}

/// A state that is read to be written need not be kept meanwhile.
fn states_taken(function: &mut Function) {
    let mut written_next: HashMap<String, bool> = HashMap::new();
    for step in function.steps.iter_mut().rev() {
        match &mut step.action {
            Action::Read { state, take } => {
                *take = written_next.insert(state.clone(), false).unwrap_or(false);
            }
            Action::Write { state, .. } => {
                written_next.insert(state.clone(), true);
            }
            Action::Run(..) => {}
        }
    }
}

fn declared(name: &str, value_type: &ValueType) -> Result<Declared> {
    let ValueType::Tensor(tensor) = value_type else {
        return Err(Error::unsupported(format!("the type of {name:?} is no tensor")));
    };
    let size = |n: Option<u64>| match n.map(usize::try_from) {
        None => Ok(None),
        Some(Ok(n)) => Ok(Some(n)),
        Some(Err(_)) => Err(Error::limit(format!("{name:?} has a size beyond memory"))),
    };
    let shape = tensor.shape().map_err(|e| e.context(format_args!("the type of {name:?}")))?;
    let shape: Vec<Option<usize>> = shape.into_iter().map(size).collect::<Result<_>>()?;
    // Of sizes that are known, products are safe from here on.
    let known: Vec<usize> = shape.iter().map(|n| n.unwrap_or(1)).collect();
    bounded(&known, MOST_STORED).map_err(|e| e.context(name))?;
    Ok(Declared { name: name.into(), dtype: tensor.data_type, shape })
}

impl<'a> Parser<'a> {
    fn place(&mut self) -> usize {
        self.places += 1;
        self.places - 1
    }

    fn define(&mut self, named: &'a NamedValueType, known: Known) -> Result<()> {
        let name = named.name.as_str();
        self.types.insert(name, &named.value_type);
        match self.known.insert(name, known) {
            None => Ok(()),
            Some(_) => Err(Error::malformed(format!("{name:?} is the name of two values"))),
        }
    }

    fn get(&self, name: &str) -> Result<&Known> {
        let missing = || Error::malformed(format!("{name:?} is used, and nothing before it is called so"));
        self.known.get(name).ok_or_else(missing)
    }

    fn source(&self, name: &str) -> Result<Source> {
        match self.get(name)? {
            Known::Constant(operand) => Ok(Source::Constant(operand.clone())),
            Known::Place(at) => Ok(Source::Place { at: *at, last: false }),
            Known::State => Err(Error::malformed(format!("{name:?} is a state, which has to be read first"))),
            Known::Sparse => {
                Err(Error::unsupported(format!("{name:?} is sparse: it is made dense, and no more")))
            }
        }
    }

    fn operation(&mut self, operation: &'a Operation, name: &str) -> Result<Option<Step>> {
        let kind = operation.kind.as_str();
        if kind == "const" || kind.starts_with("constexpr_") {
            self.constant(operation)?;
            return Ok(None);
        }
        if !operation.blocks.is_empty() {
            return Err(Error::unsupported("operations with blocks of their own are not executed"));
        }
        let action = match kind {
            "read_state" => Action::Read { state: self.state(operation)?, take: false },
            "write_state" => {
                Action::Write { state: self.state(operation)?, data: self.single(operation, "data")? }
            }
            _ => {
                let operator =
                    find(kind).ok_or_else(|| Error::unsupported("this operation is not executed"))?;
                let mut inputs = Vec::with_capacity(operation.inputs.len());
                for (parameter, argument) in &operation.inputs {
                    if !operator.parameters.contains(&parameter.as_str()) {
                        return Err(Error::malformed(format!("it has no parameter {parameter}")));
                    }
                    let bound = argument.0.iter().map(|binding| self.bound(binding)).collect::<Result<_>>();
                    inputs.push((parameter.clone(), bound.map_err(|e| e.context(parameter))?));
                }
                Action::Run(operator, inputs)
            }
        };
        let mut results = Vec::with_capacity(operation.outputs.len());
        for output in &operation.outputs {
            let place = self.place();
            self.define(output, Known::Place(place))?;
            results.push((declared(&output.name, &output.value_type)?, Some(place)));
        }
        let fits = match action {
            Action::Read { .. } => results.len() == 1,
            Action::Write { .. } => results.is_empty(),
            Action::Run(..) => true,
        };
        if !fits {
            return Err(Error::malformed(format!("it has {} results", results.len())));
        }
        Ok(Some(Step { name: name.into(), action, results }))
    }

    fn bound(&self, binding: &Binding) -> Result<Source> {
        match binding {
            Binding::Name(name) => self.source(name),
            Binding::Value(value) => self.value("its value", value).map(Source::Constant),
            Binding::None => Err(Error::malformed("it is bound to nothing")),
        }
    }

    fn single(&self, operation: &Operation, parameter: &str) -> Result<Source> {
        match operation.inputs.get(parameter).map(|argument| &argument.0[..]) {
            Some([binding]) => self.bound(binding).map_err(|e| e.context(parameter)),
            None => Err(Error::malformed(format!("{parameter} is missing"))),
            Some(others) => {
                Err(Error::malformed(format!("{parameter} is bound to {} values, not one", others.len())))
            }
        }
    }

    /// The name of the state that an operation reads or writes.
    fn state(&self, operation: &Operation) -> Result<String> {
        match operation.inputs.get("input").map(|argument| &argument.0[..]) {
            Some([Binding::Name(name)]) if matches!(self.get(name)?, Known::State) => Ok(name.clone()),
            _ => Err(Error::malformed("input: the name of a state was expected")),
        }
    }

    fn constant(&mut self, operation: &'a Operation) -> Result<()> {
        let refused = |name: &str| {
            Error::unsupported(format!(
                "it has the attribute {name}, as before iOS 18, which is not computed"
            ))
        };
        let is_const = operation.kind == "const";
        if let Some(name) = operation.attributes.keys().find(|n| !is_const && *n != "name") {
            return Err(refused(name));
        }
        if is_const {
            let val = operation.attributes.get("val").ok_or_else(|| Error::malformed("it has no val"))?;
            let [output] = &operation.outputs[..] else {
                return Err(Error::malformed(format!("it has {} results, not 1", operation.outputs.len())));
            };
            let operand = match self.constants.get(&output.name) {
                Some(constant) => self.operand(Arc::clone(constant))?,
                None => self.value(&output.name, val)?,
            };
            declared(&output.name, &output.value_type)?.check(operand.dtype(), operand.shape())?;
            return self.define(output, Known::Constant(operand));
        }
        // Their types are those that they declare.
        for output in &operation.outputs {
            let constant = self.constants.get(&output.name).cloned();
            let constant = constant.ok_or_else(|| Error::unsupported("this operation is not executed"))?;
            let known = match constant.form {
                Form::SparseLut { .. } | Form::SparseBlockwise { .. } => Known::Sparse,
                _ => Known::Constant(self.operand(constant)?),
            };
            self.define(output, known)?;
        }
        Ok(())
    }

    fn operand(&self, constant: Arc<Constant>) -> Result<Operand> {
        let weight = Weight::new(self.package, constant)?;
        match weight.len() <= FEW && !weight.is_in_file() {
            true => Ok(Operand::Tensor(weight.tensor()?)),
            false => Ok(Operand::Weight(Arc::new(weight))),
        }
    }

    /// A value that stands in the program: numbers, truth values or a text.
    fn value(&self, name: &str, value: &Value) -> Result<Operand> {
        if let Some(constant) = constant(self.package, name, value)? {
            return self.operand(Arc::new(constant));
        }
        match (&value.value_type, &value.stored) {
            (
                ValueType::Tensor(ty),
                Stored::Immediate(ImmediateValue::Tensor(TensorValue::Strings(texts))),
            ) => match &texts.0[..] {
                [text] if ty.fixed_shape()?.is_empty() => {
                    let data = Data::Text(Arc::from(text.as_str()));
                    Ok(Operand::Tensor(Tensor { dtype: ty.data_type, shape: Vec::new(), data }))
                }
                _ => Err(Error::unsupported("a constant of several texts")),
            },
            _ => Err(Error::unsupported("a constant that is no tensor")),
        }
    }
}

impl Declared {
    /// Elements of one whose sizes are all known.
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().map(|n| n.unwrap_or(0)).product() // bounded
    }

    /// That a value is of this type.
    ///
    /// # Errors
    /// `Malformed`, with both.
    pub(super) fn check(&self, dtype: DataType, shape: &[usize]) -> Result<()> {
        let fits = self.dtype == dtype
            && self.shape.len() == shape.len()
            && self.shape.iter().zip(shape).all(|(wanted, found)| wanted.is_none_or(|n| n == *found));
        if fits {
            return Ok(());
        }
        let found = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        Err(Error::malformed(format!("{:?} is {dtype}[{found}], it is declared {self}", self.name)))
    }
}

impl std::fmt::Display for Declared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let size = |n: &Option<usize>| n.map_or("?".into(), |n| n.to_string());
        let sizes: Vec<String> = self.shape.iter().map(size).collect();
        write!(f, "{}[{}]", self.dtype, sizes.join(","))
    }
}
