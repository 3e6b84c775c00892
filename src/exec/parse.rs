//! Functions of a program as steps: names become places, constants are read once.

use std::collections::HashMap;
use std::sync::Arc;

use super::call::Operand;
use super::ops::{Operator, find};
use super::sparse::Values;
use super::tensor::{Data, MOST_STORED, Tensor, bounded};
use super::weight::{Bytes, Stored, Weight, is_float};
use crate::container::coreml::DataType;
use crate::container::coreml::mil::{
    Binding, BlobFileValue, Function as Message, ImmediateValue, NamedValueType, Operation, Stored as Place,
    TensorType, TensorValue, Value, ValueType,
};
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

/// Where bytes of a weight file are.
pub(super) type Find<'a> = &'a dyn Fn(&BlobFileValue, &TensorType) -> Result<Bytes>;

/// What a name stands for.
enum Known {
    Constant(Operand),
    /// The second result of `constexpr_lut_to_sparse`, and its mask.
    Sparse(Stored, Values),
    Place(usize),
    State,
}

struct Parser<'a> {
    known: HashMap<&'a str, Known>,
    types: HashMap<&'a str, &'a ValueType>,
    places: usize,
    find: Find<'a>,
}

/// Reads a function.
///
/// # Errors
/// `Unsupported` for operations and constants that are not known; `Malformed` for names that stand for nothing, or for
/// two things, and the like.
pub(super) fn function(message: &Message, find: Find<'_>) -> Result<Function> {
    let block = message
        .block_specializations
        .get(&message.opset)
        .ok_or_else(|| Error::malformed(format!("has no block for its opset {:?}", message.opset)))?;
    let mut parser = Parser { known: HashMap::new(), types: HashMap::new(), places: 0, find };
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
            Known::Sparse(..) => {
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
            Binding::Value(value) => self.value(value).map(Source::Constant),
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
        let known = match operation.kind.as_str() {
            "const" => {
                let val = operation.attributes.get("val").ok_or_else(|| Error::malformed("it has no val"))?;
                vec![Known::Constant(self.value(val)?)]
            }
            "constexpr_blockwise_shift_scale" => {
                let offset = operation.inputs.get("offset").map(|_| self.weight(operation, "offset"));
                let (data, scale) = (self.weight(operation, "data")?, self.weight(operation, "scale")?);
                vec![constant(Weight::blockwise(data, scale, offset.transpose()?)?)]
            }
            "constexpr_lut_to_dense" => {
                let axis = match operation.inputs.contains_key("vector_axis") {
                    true => Some(self.integer(operation, "vector_axis")?),
                    false => None,
                };
                let indices = self.stored(operation, "indices")?;
                vec![constant(Weight::lut(indices, self.weight(operation, "lut")?, axis)?)]
            }
            "constexpr_lut_to_sparse" => {
                let (mask, lut) = (self.stored(operation, "indices_mask")?, self.weight(operation, "lut")?);
                let values = Values::lut(&mask, self.stored(operation, "indices_nonzero_data")?, lut)?;
                vec![constant(Weight::plain(mask.clone())), Known::Sparse(mask, values)]
            }
            "constexpr_sparse_to_dense" => vec![constant(self.dense(operation)?)],
            _ => return Err(Error::unsupported("this operation is not executed")),
        };
        if known.len() != operation.outputs.len() {
            let found = operation.outputs.len();
            return Err(Error::malformed(format!("it has {found} results, not {}", known.len())));
        }
        for (output, known) in operation.outputs.iter().zip(known) {
            let declared = declared(&output.name, &output.value_type)?;
            let (dtype, shape) = match &known {
                Known::Constant(operand) => (operand.dtype(), operand.shape()),
                Known::Sparse(_, values) => (values.dtype(), values.shape()),
                Known::Place(_) | Known::State => continue,
            };
            declared.check(dtype, shape)?;
            self.define(output, known)?;
        }
        Ok(())
    }

    /// `constexpr_sparse_to_dense`. What belongs to a mask goes to the places of that mask.
    fn dense(&self, operation: &Operation) -> Result<Weight> {
        let mask = self.stored(operation, "mask")?;
        let known = match operation.inputs.get("nonzero_data").map(|argument| &argument.0[..]) {
            Some([Binding::Name(name)]) => Some(self.get(name)?),
            _ => None,
        };
        let values = match known {
            Some(Known::Sparse(of, _)) if of.shape != mask.shape || of.bytes.get() != mask.bytes.get() => {
                return Err(Error::malformed("mask is not that of nonzero_data"));
            }
            Some(Known::Sparse(_, values)) => values.clone(),
            _ => Values::Plain(self.weight(operation, "nonzero_data")?),
        };
        Weight::sparse(mask, values)
    }

    fn weight(&self, operation: &Operation, parameter: &str) -> Result<Arc<Weight>> {
        match self.single(operation, parameter)? {
            Source::Constant(Operand::Weight(weight)) => Ok(weight),
            _ => Err(Error::malformed(format!("{parameter}: a constant of numbers was expected"))),
        }
    }

    fn stored(&self, operation: &Operation, parameter: &str) -> Result<Stored> {
        let weight = self.weight(operation, parameter)?;
        let none = || Error::unsupported(format!("{parameter} is computed from others"));
        weight.as_stored().cloned().ok_or_else(none)
    }

    fn integer(&self, operation: &Operation, parameter: &str) -> Result<i64> {
        let tensor = self.weight(operation, parameter)?.tensor()?;
        match tensor.as_ints() {
            Some([one]) => Ok((*one).into()),
            _ => Err(Error::malformed(format!("{parameter}: an integer was expected"))),
        }
    }

    /// A constant. Numbers stay as they are stored.
    fn value(&self, value: &Value) -> Result<Operand> {
        let ValueType::Tensor(ty) = &value.value_type else {
            return Err(Error::unsupported("a constant that is no tensor"));
        };
        let shape = ty.fixed_shape()?;
        let shape: Option<Vec<usize>> = shape.into_iter().map(|n| usize::try_from(n).ok()).collect();
        let shape = shape.ok_or_else(|| Error::limit("a size is beyond memory"))?;
        let bytes = match &value.stored {
            Place::Blob(blob) => (self.find)(blob, ty)?,
            Place::Immediate(ImmediateValue::Tensor(held)) => match held {
                TensorValue::Bools(bools) => {
                    let data = Data::Bools(Arc::new(bools.0.clone()));
                    return Ok(Operand::Tensor(Tensor { dtype: ty.data_type, shape, data }));
                }
                TensorValue::Strings(texts) => match &texts.0[..] {
                    [text] if shape.is_empty() => {
                        let data = Data::Text(Arc::from(text.as_str()));
                        return Ok(Operand::Tensor(Tensor { dtype: ty.data_type, shape, data }));
                    }
                    _ => return Err(Error::unsupported("a constant of several texts")),
                },
                other => Bytes::Here(immediate(other, ty.data_type)?.into()),
            },
            _ => return Err(Error::unsupported("a constant that is no tensor")),
        };
        Ok(Operand::Weight(Arc::new(Weight::plain(Stored::new(ty.data_type, shape, bytes)?))))
    }
}

fn constant(weight: Weight) -> Known {
    Known::Constant(Operand::Weight(Arc::new(weight)))
}

/// Numbers in the program, as they would lie in a weight file.
fn immediate(held: &TensorValue, dtype: DataType) -> Result<Vec<u8>> {
    match held {
        TensorValue::None => Ok(Vec::new()),
        TensorValue::Bytes(bytes) => Ok(bytes.0.clone()),
        TensorValue::Floats(floats) => Ok(floats.0.iter().flat_map(|v| v.to_le_bytes()).collect()),
        TensorValue::Ints(ints) if dtype == DataType::Int32 => {
            Ok(ints.0.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        // Of 16 bits, with sign or without.
        TensorValue::Ints(ints) => {
            let half = |v: &i32| match i16::try_from(*v) {
                Ok(v) if dtype == DataType::Int16 => Ok(v.to_le_bytes()),
                _ => match u16::try_from(*v) {
                    Ok(v) if dtype == DataType::UInt16 => Ok(v.to_le_bytes()),
                    _ => Err(Error::malformed(format!("{v} is no {dtype}"))),
                },
            };
            Ok(ints.0.iter().map(half).collect::<Result<Vec<_>>>()?.concat())
        }
        _ => Err(Error::unsupported(format!("constants of type {dtype} are not computed with"))),
    }
}

impl Declared {
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
