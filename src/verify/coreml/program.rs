//! That a function is one: values are made before they are used, and once; operations and their parameters are known;
//! results have the types that operations make of what they are given.

use std::collections::HashMap;

use crate::container::coreml::DataType;
use crate::container::coreml::mil::{
    Binding, Block, Function, ImmediateValue, Operation, Stored, TensorValue, Value, ValueType,
};
use crate::error::{Error, Result};
use crate::mil::{Dim, Int, Known, Operand, Symbols, TensorType, identifier, infer};

/// The sets of operators, by the specification that has them (coremltools, `_OPSET`).
const OPSETS: [(&str, i32); 5] =
    [("CoreML5", 6), ("CoreML6", 7), ("CoreML7", 8), ("CoreML8", 9), ("CoreML9", 10)];
/// The one whose operations are known.
const KNOWN: &str = "CoreML8";
/// Elements of constants that shapes can depend on, at most.
const MOST_KNOWN: usize = 1 << 12;

/// A function whose values have the types that they should have.
pub(super) struct Typed<'a> {
    /// Its name.
    pub(super) name: &'a str,
    pub(super) function: &'a Function,
    pub(super) block: &'a Block,
    /// States by name: the types of what they hold.
    pub(super) states: HashMap<&'a str, TensorType>,
    /// Values by name.
    pub(super) values: HashMap<&'a str, Operand>,
}

/// Looks at a function.
///
/// # Errors
/// `Malformed` for what is wrong, with the operation; `Unsupported` for operations that are not known.
pub(super) fn check<'a>(name: &'a str, function: &'a Function, specification: i32) -> Result<Typed<'a>> {
    let wanted = OPSETS.iter().find(|(opset, _)| *opset == function.opset).map(|(_, number)| *number);
    if wanted != Some(specification) {
        return Err(Error::malformed(format!(
            "its operators are those of {:?}, the model's specification is {specification}",
            function.opset
        )));
    }
    let block =
        match (function.block_specializations.len(), function.block_specializations.get(&function.opset)) {
            (1, Some(block)) if block.inputs.is_empty() => block,
            (1, Some(_)) => return Err(Error::malformed("its block has inputs of its own")),
            (n, _) => return Err(Error::malformed(format!("it has {n} blocks, not the one of its opset"))),
        };
    if function.opset != KNOWN {
        return Err(Error::unsupported(format!(
            "operators of {} are not known, {KNOWN} are",
            function.opset
        )));
    }
    let mut typed = Typed { name, function, block, states: HashMap::new(), values: HashMap::new() };
    let mut symbols = Symbols::default();
    for input in &function.inputs {
        typed.input(&input.name, &input.value_type, &mut symbols).map_err(|e| e.context(&input.name))?;
    }
    for (n, operation) in block.operations.iter().enumerate() {
        let what = match operation.outputs.first() {
            Some(output) => format!("{} {:?}", operation.kind, output.name),
            None => format!("operation {n}, {}", operation.kind),
        };
        typed.operation(operation, &mut symbols).map_err(|e| e.context(what))?;
    }
    for output in &block.outputs {
        if !typed.values.contains_key(output.as_str()) {
            return Err(Error::malformed(format!("its output {output:?} is no value")));
        }
    }
    if block.outputs.is_empty() {
        return Err(Error::malformed("it has no outputs"));
    }
    Ok(typed)
}

impl<'a> Typed<'a> {
    fn input(&mut self, name: &'a str, declared: &'a ValueType, symbols: &mut Symbols) -> Result<()> {
        self.check_name(name)?;
        match declared {
            ValueType::State(held) => {
                let ty = declared_type(&held.0, symbols)?;
                if ty.dims.iter().any(|d| d.known().is_none()) || ty.dtype != DataType::Float16 {
                    return Err(Error::malformed(format!(
                        "a state of {ty}, one of fp16 and known sizes is one"
                    )));
                }
                self.states.insert(name, ty);
            }
            other => {
                let ty = declared_type(other, symbols)?;
                self.values.insert(name, Operand::of(ty));
            }
        }
        Ok(())
    }

    /// That a name is an identifier, and new.
    fn check_name(&self, name: &str) -> Result<()> {
        if identifier(name) != name {
            return Err(Error::malformed(format!("{name:?} is no identifier")));
        }
        match self.values.contains_key(name) || self.states.contains_key(name) {
            true => Err(Error::malformed(format!("{name:?} is there already"))),
            false => Ok(()),
        }
    }

    fn operation(&mut self, operation: &'a Operation, symbols: &mut Symbols) -> Result<()> {
        if !operation.blocks.is_empty() {
            return Err(Error::unsupported("branches and loops are not known"));
        }
        check_attributes(operation)?;
        let results = match operation.kind.as_str() {
            "const" => {
                let value = operation.attributes.get("val");
                vec![constant(value.ok_or_else(|| Error::malformed("has no value"))?, symbols)?]
            }
            "read_state" => vec![Operand::of(self.state(operation)?.clone())],
            "write_state" => {
                let (state, data) = (self.state(operation)?, self.only(operation, "data")?);
                let written = self.value(data)?;
                if written.ty != *state {
                    return Err(Error::malformed(format!("puts {} into a state of {state}", written.ty)));
                }
                check_parameters(operation, &["data", "input"])?;
                Vec::new()
            }
            kind => {
                let mut inline = Vec::new();
                for argument in operation.inputs.values() {
                    for binding in &argument.0 {
                        if let Binding::Value(value) = binding {
                            inline.push(constant(value, symbols)?);
                        }
                    }
                }
                let mut inline = inline.iter();
                let mut inputs = Vec::with_capacity(operation.inputs.len());
                for (parameter, argument) in &operation.inputs {
                    let mut given = Vec::with_capacity(argument.0.len());
                    for binding in &argument.0 {
                        given.push(match binding {
                            Binding::Name(name) => {
                                self.value(name).map_err(|e| e.context(parameter.as_str()))?
                            }
                            Binding::Value(_) => inline.next().ok_or_else(|| Error::misuse("no value"))?,
                            Binding::None => {
                                return Err(Error::malformed(format!("{parameter} is bound to nothing")));
                            }
                        });
                    }
                    inputs.push((parameter.as_str(), given));
                }
                infer(kind, &inputs, symbols)?
            }
        };
        if operation.kind == "read_state" {
            check_parameters(operation, &["input"])?;
        }
        if results.len() != operation.outputs.len() {
            let (found, wanted) = (operation.outputs.len(), results.len());
            return Err(Error::malformed(format!("gives {found} values, not {wanted}")));
        }
        for (output, result) in operation.outputs.iter().zip(results) {
            self.check_name(&output.name)?;
            let declared = declared_type(&output.value_type, symbols)?;
            if !is_declared(&declared, &result.ty) {
                return Err(Error::malformed(format!(
                    "{:?} is declared as {}, the operation gives {}",
                    output.name,
                    shown(&declared),
                    shown(&result.ty)
                )));
            }
            self.values.insert(&output.name, result);
        }
        Ok(())
    }

    fn value(&self, name: &str) -> Result<&Operand> {
        self.values.get(name).ok_or_else(|| Error::malformed(format!("{name:?} is no value before it")))
    }

    fn state(&self, operation: &Operation) -> Result<&TensorType> {
        let name = self.only(operation, "input")?;
        self.states.get(name).ok_or_else(|| Error::malformed(format!("{name:?} is no state")))
    }

    /// The name that a parameter is bound to.
    fn only<'o>(&self, operation: &'o Operation, parameter: &str) -> Result<&'o str> {
        bound(operation, parameter)
            .ok_or_else(|| Error::malformed(format!("{parameter} is bound to no single name")))
    }
}

/// The one name that a parameter is bound to.
pub(super) fn bound<'o>(operation: &'o Operation, parameter: &str) -> Option<&'o str> {
    match &operation.inputs.get(parameter)?.0[..] {
        [Binding::Name(name)] => Some(name),
        _ => None,
    }
}

fn check_parameters(operation: &Operation, known: &[&str]) -> Result<()> {
    match operation.inputs.keys().find(|name| !known.contains(&name.as_str())) {
        Some(other) => Err(Error::malformed(format!("it has no parameter {other}"))),
        None => Ok(()),
    }
}

/// Every operation has a name, constants have a value, and nothing else: loaders refuse what they do not know.
fn check_attributes(operation: &Operation) -> Result<()> {
    let is_const = operation.kind == "const";
    if is_const && !operation.inputs.is_empty() {
        return Err(Error::malformed("a constant has no parameters"));
    }
    for (name, value) in &operation.attributes {
        match name.as_str() {
            "name" if text(value).is_some() => {}
            "name" => return Err(Error::malformed("its attribute name is no text")),
            "val" if is_const => {}
            other => {
                return Err(Error::malformed(format!("it has the attribute {other}, which is not known")));
            }
        }
    }
    match operation.attributes.contains_key("name") {
        true => Ok(()),
        false => Err(Error::malformed("it has no attribute name")),
    }
}

fn text(value: &Value) -> Option<&str> {
    match &value.stored {
        Stored::Immediate(ImmediateValue::Tensor(TensorValue::Strings(list))) => match &list.0[..] {
            [text] => Some(text),
            _ => None,
        },
        _ => None,
    }
}

/// A value with what shapes can depend on.
fn constant(value: &Value, symbols: &mut Symbols) -> Result<Operand> {
    let ty = declared_type(&value.value_type, symbols)?;
    let ints = |list: &mut dyn Iterator<Item = i64>| Some(Known::Ints(list.map(Int::Known).collect()));
    let known = match &value.stored {
        Stored::Immediate(ImmediateValue::Tensor(held)) => match held {
            TensorValue::Ints(list) if list.0.len() <= MOST_KNOWN => {
                ints(&mut list.0.iter().map(|n| i64::from(*n)))
            }
            TensorValue::LongInts(list) if list.0.len() <= MOST_KNOWN => ints(&mut list.0.iter().copied()),
            TensorValue::Bools(list) if list.0.len() <= MOST_KNOWN => Some(Known::Bools(list.0.clone())),
            TensorValue::Strings(_) => text(value).map(|text| Known::Text(text.into())),
            _ => None,
        },
        _ => None,
    };
    Ok(Operand { ty, constant: true, known })
}

fn declared_type(declared: &ValueType, symbols: &mut Symbols) -> Result<TensorType> {
    let ValueType::Tensor(tensor) = declared else {
        return Err(Error::unsupported("values that are no tensors are not known"));
    };
    let dims = tensor.shape()?.into_iter().map(|size| size.map_or_else(|| symbols.fresh(), Dim::Known));
    Ok(TensorType::new(tensor.data_type, dims.collect()))
}

/// A size may be declared as not known, but not as known where it is not, or as another.
fn is_declared(declared: &TensorType, found: &TensorType) -> bool {
    let fits = |(declared, found): (&Dim, &Dim)| match (declared, found) {
        (Dim::Known(a), Dim::Known(b)) => a == b,
        (Dim::Known(_), Dim::Any(_)) => false,
        (Dim::Any(_), _) => true,
    };
    declared.dtype == found.dtype
        && declared.dims.len() == found.dims.len()
        && declared.dims.iter().zip(&found.dims).all(fits)
}

/// `fp16[1,?]`.
fn shown(ty: &TensorType) -> String {
    let dims: Vec<String> =
        ty.dims.iter().map(|d| d.known().map_or_else(|| "?".into(), |n| n.to_string())).collect();
    format!("{}[{}]", ty.dtype, dims.join(","))
}
