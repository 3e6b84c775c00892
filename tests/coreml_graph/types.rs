//! Types of a function, inferred anew from what stands in it: each value is made once and before it is used, and is
//! declared as exactly what its operation gives.

use std::collections::{HashMap, HashSet};

use qconv::container::coreml::mil::{
    Binding, Function, ImmediateValue, Operation, Stored, TensorValue, Value, ValueType,
};
use qconv::error::{Error, Result};
use qconv::mil::{Dim, Int, Known, Operand, Symbols, TensorType, infer};

/// Checks each operation of a function against what is known of it.
///
/// # Errors
/// `Malformed` for values that are not there, are there twice, or are of another type than the operation gives, with
/// the value's name; `Unsupported` for operations that are not known.
pub fn check(function: &Function) -> Result<()> {
    let mut checker = Checker { values: HashMap::new(), states: HashMap::new(), symbols: Symbols::default() };
    for input in &function.inputs {
        let context = |e: Error| e.context(format!("input {}", input.name));
        match &input.value_type {
            ValueType::State(held) => {
                let ty = checker.declared(&held.0).map_err(context)?;
                checker.states.insert(&input.name, ty);
            }
            other => {
                let operand = Operand::of(checker.declared(other).map_err(context)?);
                checker.add(&input.name, operand)?;
            }
        }
    }
    let block = function.block_specializations.get(&function.opset);
    let block = block.ok_or_else(|| Error::malformed(format!("there is no block for {}", function.opset)))?;
    for operation in &block.operations {
        let name = operation.outputs.first().map_or("", |o| &o.name);
        let context = |e: Error| e.context(format!("operation {} that gives {name:?}", operation.kind));
        checker.operation(operation).map_err(context)?;
    }
    let mut seen = HashSet::new();
    match block.outputs.iter().find(|name| !checker.values.contains_key(name.as_str()) || !seen.insert(*name))
    {
        Some(name) => Err(Error::malformed(format!("the output {name:?} is not there, or is there twice"))),
        None => Ok(()),
    }
}

struct Checker<'a> {
    values: HashMap<&'a str, Operand>,
    states: HashMap<&'a str, TensorType>,
    symbols: Symbols,
}

impl<'a> Checker<'a> {
    fn add(&mut self, name: &'a str, operand: Operand) -> Result<()> {
        let is_new = !self.states.contains_key(name) && self.values.insert(name, operand).is_none();
        if is_new { Ok(()) } else { Err(Error::malformed(format!("{name:?} is there twice"))) }
    }

    fn operation(&mut self, operation: &'a Operation) -> Result<()> {
        let results = match &*operation.kind {
            "const" => {
                let value = operation.attributes.get("val");
                vec![self.constant(value.ok_or_else(|| Error::malformed("it has no val"))?)?]
            }
            "read_state" => vec![Operand::of(self.state(operation)?)],
            "write_state" => {
                let (state, data) = (self.state(operation)?, self.bound(operation, "data")?);
                match &data[..] {
                    [data] if data.ty == state => vec![],
                    [data] => return Err(Error::malformed(format!("{} into a state of {state}", data.ty))),
                    _ => return Err(Error::malformed("data is not one value")),
                }
            }
            kind => {
                let bound = |name: &'a String| Ok((name.as_str(), self.bound(operation, name)?));
                let inputs: Vec<(&str, Vec<Operand>)> =
                    operation.inputs.keys().map(bound).collect::<Result<_>>()?;
                let inputs: Vec<(&str, Vec<&Operand>)> =
                    inputs.iter().map(|(name, operands)| (*name, operands.iter().collect())).collect();
                infer(kind, &inputs, &mut self.symbols)?
            }
        };
        if results.len() != operation.outputs.len() {
            let (given, named) = (results.len(), operation.outputs.len());
            return Err(Error::malformed(format!("it gives {given} values, {named} are named")));
        }
        for (result, output) in results.into_iter().zip(&operation.outputs) {
            let declared = self.declared(&output.value_type)?;
            if (declared.dtype, declared.declared()) != (result.ty.dtype, result.ty.declared()) {
                return Err(Error::malformed(format!("it is declared as {declared}, it is {}", result.ty)));
            }
            self.add(&output.name, result)?;
        }
        Ok(())
    }

    /// What a parameter is bound to.
    fn bound(&mut self, operation: &'a Operation, parameter: &str) -> Result<Vec<Operand>> {
        let bindings = operation.inputs.get(parameter).map_or(&[][..], |argument| &argument.0);
        let operand = |binding: &'a Binding| match binding {
            Binding::Name(name) => self.values.get(name.as_str()).cloned().ok_or_else(|| {
                Error::malformed(format!("{parameter} is {name:?}, which no operation before it gives"))
            }),
            Binding::Value(value) => self.constant(value),
            Binding::None => Err(Error::malformed(format!("{parameter} is bound to nothing"))),
        };
        bindings.iter().map(operand).collect()
    }

    /// The type of the state that an operation reads or writes.
    fn state(&self, operation: &Operation) -> Result<TensorType> {
        let bindings = operation.inputs.get("input").map_or(&[][..], |argument| &argument.0);
        let found = match bindings {
            [Binding::Name(name)] => self.states.get(name.as_str()),
            _ => None,
        };
        found.cloned().ok_or_else(|| Error::malformed("input is no state"))
    }

    fn constant(&self, value: &Value) -> Result<Operand> {
        let ValueType::Tensor(ty) = &value.value_type else {
            return Err(Error::unsupported("a constant that is no tensor is not known"));
        };
        let operand = Operand::weight(TensorType::fixed(ty.data_type, &ty.fixed_shape()?));
        let Stored::Immediate(ImmediateValue::Tensor(elements)) = &value.stored else { return Ok(operand) };
        let known = match elements {
            TensorValue::Ints(all) => {
                Some(Known::Ints(all.0.iter().map(|n| Int::Known((*n).into())).collect()))
            }
            TensorValue::Bools(all) => Some(Known::Bools(all.0.clone())),
            TensorValue::Strings(all) => all.0.first().cloned().map(Known::Text),
            _ => None,
        };
        Ok(Operand { known, ..operand })
    }

    fn declared(&mut self, value_type: &ValueType) -> Result<TensorType> {
        let ValueType::Tensor(ty) = value_type else {
            return Err(Error::unsupported("only tensors are known"));
        };
        let dims = ty.shape()?.into_iter().map(|size| match size {
            Some(size) => Dim::Known(size),
            None => self.symbols.fresh(),
        });
        Ok(TensorType::new(ty.data_type, dims.collect()))
    }
}
