//! That what a model says of its functions is what they are: inputs, outputs and states, their types and shapes.

use std::collections::{BTreeMap, BTreeSet};

use crate::container::coreml::mil::{Function, NamedValueType, TensorType, ValueType};
use crate::container::coreml::model::{
    ArrayDataType, ArrayFeatureType, FeatureDescription, FeatureKind, Flexibility, ModelDescription,
    SizeRange,
};
use crate::container::coreml::{DataType, Model};
use crate::error::{Error, Result};

/// The name of the only function, where no functions are described.
const MAIN: &str = "main";
/// Most shapes that can be listed.
const MOST_SHAPES: usize = 128;

/// Looks at the description of a model whose functions are in order.
///
/// # Errors
/// `Malformed` for what differs, with the function and the feature.
pub(super) fn check(model: &Model) -> Result<()> {
    let (description, functions) = (&model.description, &model.program.functions);
    let names: Vec<&str> = functions.keys().map(String::as_str).collect();
    if description.functions.is_empty() {
        let [(MAIN, function)] = functions.iter().map(|(n, f)| (n.as_str(), f)).collect::<Vec<_>>()[..]
        else {
            return Err(Error::malformed(format!(
                "no functions are described, so that \"main\" is the only one; there are {names:?}"
            )));
        };
        let ModelDescription { input, output, state, .. } = description;
        return of_function(function, input, output, state).map_err(|e| e.context("function \"main\""));
    }
    let described: BTreeSet<&str> = description.functions.iter().map(|f| f.name.as_str()).collect();
    if described.len() != description.functions.len() || !described.iter().eq(&names) {
        let found: Vec<&str> = description.functions.iter().map(|f| f.name.as_str()).collect();
        return Err(Error::malformed(format!("functions {found:?} are described, there are {names:?}")));
    }
    if !described.contains(description.default_function_name.as_str()) {
        let found = &description.default_function_name;
        return Err(Error::malformed(format!("the default function {found:?} is none of {names:?}")));
    }
    if [&description.input, &description.output, &description.state].iter().any(|list| !list.is_empty()) {
        return Err(Error::malformed("what goes in and out is said of the model, and of its functions"));
    }
    for of in &description.functions {
        let Some(function) = functions.get(&of.name) else { continue };
        of_function(function, &of.input, &of.output, &of.state)
            .map_err(|e| e.context(format_args!("function {:?}", of.name)))?;
    }
    Ok(())
}

fn of_function(
    function: &Function,
    inputs: &[FeatureDescription],
    outputs: &[FeatureDescription],
    states: &[FeatureDescription],
) -> Result<()> {
    let mut declared: BTreeMap<&str, &NamedValueType> =
        function.inputs.iter().map(|input| (input.name.as_str(), input)).collect();
    for (kind, list) in [("input", inputs), ("state", states)] {
        for described in list {
            let name = described.name.as_str();
            let found = declared.remove(name).ok_or_else(|| {
                Error::malformed(format!("the {kind} {name:?} is described, which the function has not"))
            })?;
            let check = match &found.value_type {
                ValueType::State(held) if kind == "state" => state(described, &held.0),
                other if kind == "input" => array(described, other, true),
                _ => Err(Error::malformed(format!("is described as {kind}, and is none"))),
            };
            check.map_err(|e| e.context(format_args!("{kind} {name:?}")))?;
        }
    }
    if let Some(name) = declared.into_keys().next() {
        return Err(Error::malformed(format!("{name:?} goes into the function, and is not described")));
    }
    let Some(block) = function.block_specializations.get(&function.opset) else { return Ok(()) };
    if !outputs.iter().map(|o| &o.name).eq(&block.outputs) {
        let found: Vec<&str> = outputs.iter().map(|o| o.name.as_str()).collect();
        return Err(Error::malformed(format!(
            "outputs {found:?} are described, it gives {:?}",
            block.outputs
        )));
    }
    let wanted: BTreeSet<&str> = outputs.iter().map(|o| o.name.as_str()).collect();
    let results = block.operations.iter().flat_map(|o| &o.outputs).chain(&function.inputs);
    let mut results: Vec<&NamedValueType> = results.filter(|r| wanted.contains(r.name.as_str())).collect();
    results.reverse(); // the first of a name counts
    let results: BTreeMap<&str, &NamedValueType> =
        results.into_iter().map(|r| (r.name.as_str(), r)).collect();
    for described in outputs {
        if let Some(found) = results.get(described.name.as_str()) {
            array(described, &found.value_type, false)
                .map_err(|e| e.context(format_args!("output {:?}", described.name)))?;
        }
    }
    Ok(())
}

fn state(described: &FeatureDescription, held: &ValueType) -> Result<()> {
    let (FeatureKind::State(array), ValueType::Tensor(tensor)) = (&described.feature_type.kind, held) else {
        return Err(Error::malformed("is described as another kind"));
    };
    let array = &array.0;
    same_type(array, tensor)?;
    if !same_shape(&array.shape, &tensor.shape()?) || array.flexibility != Flexibility::None {
        return Err(differs(array, tensor));
    }
    Ok(())
}

fn array(described: &FeatureDescription, declared: &ValueType, is_input: bool) -> Result<()> {
    let (FeatureKind::MultiArray(array), ValueType::Tensor(tensor)) =
        (&described.feature_type.kind, declared)
    else {
        return Err(Error::malformed("is described as another kind"));
    };
    same_type(array, tensor)?;
    let shape = tensor.shape()?;
    let is_fixed = shape.iter().all(Option::is_some);
    let fits = match &array.flexibility {
        // An output whose sizes are not known has no shape.
        Flexibility::None if !is_input && !is_fixed => array.shape.is_empty() || may_be(&array.shape, &shape),
        Flexibility::None => same_shape(&array.shape, &shape),
        Flexibility::Range(sizes) => {
            let range = |(size, (range, default)): (&Option<u64>, (&_, &i64))| {
                let range: &SizeRange = range;
                let (least, most) = (range.lower_bound, u64::try_from(range.upper_bound).ok());
                let default = u64::try_from(*default).ok();
                let holds = |n: u64| n >= least && most.is_none_or(|most| n <= most);
                default.is_some_and(holds)
                    && match size {
                        Some(n) => least == *n && most == Some(*n),
                        None => least >= 1,
                    }
            };
            !is_fixed
                && sizes.0.len() == shape.len()
                && array.shape.len() == shape.len()
                && shape.iter().zip(sizes.0.iter().zip(&array.shape)).all(range)
        }
        Flexibility::Enumerated(list) => {
            let shapes = || list.0.iter().map(|one| &one.0);
            list.0.len() <= MOST_SHAPES
                && shapes().all(|one| may_be(one, &shape))
                && shapes().any(|one| *one == array.shape)
        }
    };
    if fits { Ok(()) } else { Err(differs(array, tensor)) }
}

/// Whether a shape is one that is declared.
fn may_be(described: &[i64], declared: &[Option<u64>]) -> bool {
    let fits = |(a, b): (&i64, &Option<u64>)| u64::try_from(*a).is_ok_and(|a| b.is_none_or(|b| a == b));
    described.len() == declared.len() && described.iter().zip(declared).all(fits)
}

/// The same where all of it is known.
fn same_shape(described: &[i64], declared: &[Option<u64>]) -> bool {
    declared.iter().all(Option::is_some) && may_be(described, declared)
}

fn same_type(array: &ArrayFeatureType, tensor: &TensorType) -> Result<()> {
    let described = match array.data_type {
        ArrayDataType::Float16 => DataType::Float16,
        ArrayDataType::Float32 => DataType::Float32,
        ArrayDataType::Double => DataType::Float64,
        ArrayDataType::Int8 => DataType::Int8,
        ArrayDataType::Int32 => DataType::Int32,
        ArrayDataType::Invalid => DataType::Unused,
    };
    match described == tensor.data_type {
        true => Ok(()),
        false => Err(Error::malformed(format!("is described as {described}, it is {}", tensor.data_type))),
    }
}

fn differs(array: &ArrayFeatureType, tensor: &TensorType) -> Error {
    let declared: Vec<String> = match tensor.shape() {
        Ok(shape) => shape.iter().map(|n| n.map_or_else(|| "?".into(), |n| n.to_string())).collect(),
        Err(e) => return e,
    };
    let ranges = match &array.flexibility {
        Flexibility::None => String::new(),
        Flexibility::Range(sizes) => {
            let range = |r: &SizeRange| format!("{}..{}", r.lower_bound, r.upper_bound);
            format!(" in ranges {}", sizes.0.iter().map(range).collect::<Vec<_>>().join(", "))
        }
        Flexibility::Enumerated(list) => format!(" or one of {} shapes", list.0.len()),
    };
    Error::malformed(format!(
        "is described with the shape {:?}{ranges}, it has [{}]",
        array.shape,
        declared.join(", ")
    ))
}
