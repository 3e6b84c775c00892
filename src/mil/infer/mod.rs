//! What operations are called, which parameters they have, and the types of their results.

mod elementwise;
mod indexing;
mod products;
mod shape;
mod weights;

use super::types::{Dim, Symbols, TensorType};
use super::value::{Known, Operand};
use crate::container::coreml::DataType;
use crate::error::{Error, Result};

/// A parameter of an operation.
#[derive(Debug)]
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// Whether it may be left out.
    pub optional: bool,
    /// Whether only a constant may be given.
    pub constant: bool,
    /// Types of elements that it takes.
    pub dtypes: &'static [DataType],
}

/// An operation of opset `CoreML8`.
pub struct Operation {
    /// What it is called in programs.
    pub name: &'static str,
    /// Its parameters.
    pub parameters: &'static [Parameter],
    /// Types of its results.
    infer: fn(&Call<'_>, &mut Symbols) -> Result<Vec<Operand>>,
}

const FLOATS: &[DataType] = &[DataType::Float16, DataType::Float32];
const NUMBERS: &[DataType] = &[DataType::Float16, DataType::Float32, DataType::Int32];
const ALL: &[DataType] = &[DataType::Float16, DataType::Float32, DataType::Int32, DataType::Bool];
const INT: &[DataType] = &[DataType::Int32];
const BOOL: &[DataType] = &[DataType::Bool];
const TEXT: &[DataType] = &[DataType::String];

const fn tensor(name: &'static str, dtypes: &'static [DataType]) -> Parameter {
    Parameter { name, optional: false, constant: false, dtypes }
}

const fn constant(name: &'static str, dtypes: &'static [DataType]) -> Parameter {
    Parameter { name, optional: false, constant: true, dtypes }
}

const fn optional(name: &'static str, dtypes: &'static [DataType]) -> Parameter {
    Parameter { name, optional: true, constant: true, dtypes }
}

/// Every operation whose results can be told.
pub static OPERATIONS: &[&[Operation]] = &[
    elementwise::OPERATIONS,
    indexing::OPERATIONS,
    products::OPERATIONS,
    shape::OPERATIONS,
    weights::OPERATIONS,
];

/// An operation with what it is given.
pub struct Call<'a> {
    inputs: &'a [(&'a str, Vec<&'a Operand>)],
}

/// Types of the results of `operation`, and what is known of their elements. Each parameter has one value, `values`
/// of `concat` any number.
///
/// # Errors
/// `Unsupported` for an operation that is not known; `Misuse` for parameters that it has not, lacks, or that do not
/// go together, with the names of both.
pub fn infer(
    operation: &str,
    inputs: &[(&str, Vec<&Operand>)],
    symbols: &mut Symbols,
) -> Result<Vec<Operand>> {
    let known = OPERATIONS.iter().copied().flatten().find(|o| o.name == operation);
    let known = known.ok_or_else(|| Error::unsupported(format!("the operation {operation} is not known")))?;
    let context = |e: Error| e.context(format!("operation {operation}"));
    known.check(inputs).and_then(|()| (known.infer)(&Call { inputs }, symbols)).map_err(context)
}

impl Operation {
    fn check(&self, inputs: &[(&str, Vec<&Operand>)]) -> Result<()> {
        for (name, operands) in inputs {
            let parameter = self.parameters.iter().find(|p| p.name == *name);
            let parameter = parameter.ok_or_else(|| Error::misuse(format!("it has no parameter {name}")))?;
            if inputs.iter().filter(|(other, _)| other == name).count() > 1 {
                return Err(Error::misuse(format!("{name} is given twice")));
            }
            if *name != "values" && operands.len() != 1 {
                return Err(Error::misuse(format!("{name} is given {} values, not one", operands.len())));
            }
            for operand in operands {
                let dtype = operand.ty.dtype;
                if !parameter.dtypes.contains(&dtype) {
                    return Err(Error::misuse(format!(
                        "{name} is {dtype}, it may be {:?}",
                        parameter.dtypes
                    )));
                }
                if parameter.constant && !operand.constant {
                    return Err(Error::misuse(format!("{name} must be a constant")));
                }
            }
        }
        let given = |p: &&Parameter| !p.optional && !inputs.iter().any(|(name, _)| *name == p.name);
        match self.parameters.iter().find(given) {
            Some(missing) => Err(Error::misuse(format!("{} is missing", missing.name))),
            None => Ok(()),
        }
    }
}

impl<'a> Call<'a> {
    /// What a parameter is given, if anything.
    fn given(&self, name: &str) -> Option<&'a Operand> {
        self.inputs.iter().find(|(n, _)| *n == name).and_then(|(_, v)| v.first().copied())
    }

    /// What a parameter is given that has to be given.
    fn get(&self, name: &str) -> Result<&'a Operand> {
        self.given(name).ok_or_else(|| Error::misuse(format!("{name} is missing")))
    }

    /// All that a parameter is given.
    fn all(&self, name: &str) -> &'a [&'a Operand] {
        self.inputs.iter().find(|(n, _)| *n == name).map_or(&[], |(_, v)| v.as_slice())
    }

    /// Known integers; `None` where nothing is given.
    fn ints(&self, name: &str) -> Result<Option<Vec<i64>>> {
        let Some(operand) = self.given(name) else { return Ok(None) };
        let ints = operand.ints().and_then(|ints| ints.iter().map(|i| i.known()).collect());
        ints.map(Some).ok_or_else(|| Error::misuse(format!("{name}: its integers are not known")))
    }

    fn int(&self, name: &str, default: i64) -> Result<i64> {
        match self.ints(name)?.as_deref() {
            None => Ok(default),
            Some([one]) => Ok(*one),
            Some(several) => Err(Error::misuse(format!("{name} has {} integers, not one", several.len()))),
        }
    }

    /// A truth value, false where none is given.
    fn is(&self, name: &str) -> Result<bool> {
        match self.given(name).map(|o| &o.known) {
            None => Ok(false),
            Some(Some(Known::Bools(bools))) if bools.len() == 1 => Ok(bools[0]),
            Some(_) => Err(Error::misuse(format!("{name} is not one known truth value"))),
        }
    }

    /// A truth value for each of `n` dimensions, false where none are given.
    fn mask(&self, name: &str, n: usize) -> Result<Vec<bool>> {
        match self.given(name).map(|o| &o.known) {
            None => Ok(vec![false; n]),
            Some(Some(Known::Bools(bools))) if bools.len() == n => Ok(bools.clone()),
            Some(_) => Err(Error::misuse(format!("{name} is not {n} known truth values"))),
        }
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>> {
        match self.given(name).map(|o| &o.known) {
            None => Ok(None),
            Some(Some(Known::Text(text))) => Ok(Some(text)),
            Some(_) => Err(Error::misuse(format!("{name} is not a known text"))),
        }
    }

    /// The places of the axes that a parameter lists, among `rank`, each once.
    fn axes(&self, name: &str, rank: usize) -> Result<Option<Vec<usize>>> {
        let Some(given) = self.ints(name)? else { return Ok(None) };
        let mut axes = Vec::with_capacity(given.len());
        for axis in given {
            let axis = TensorType::axis(axis, rank).map_err(|e| e.context(name))?;
            if axes.contains(&axis) {
                return Err(Error::misuse(format!("{name} has axis {axis} twice")));
            }
            axes.push(axis);
        }
        Ok(Some(axes))
    }

    /// That two parameters have elements of one type.
    fn same_dtype(&self, x: &str, y: &str) -> Result<()> {
        let (a, b) = (self.get(x)?.ty.dtype, self.get(y)?.ty.dtype);
        match a == b {
            true => Ok(()),
            false => Err(Error::misuse(format!("{x} is {a}, {y} is {b}"))),
        }
    }
}

/// One result of which only the type is known.
fn one(dtype: DataType, dims: Vec<Dim>) -> Result<Vec<Operand>> {
    Ok(vec![Operand::of(TensorType::new(dtype, dims))])
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::value::Int;
    use super::*;

    pub(super) fn float(dims: &[Dim]) -> Operand {
        Operand::of(TensorType::new(DataType::Float16, dims.to_vec()))
    }

    pub(super) fn weight(shape: &[u64]) -> Operand {
        Operand::weight(TensorType::fixed(DataType::Float16, shape))
    }

    pub(super) fn ints(values: &[i64]) -> Operand {
        let known = Some(Known::Ints(values.iter().map(|n| Int::Known(*n)).collect()));
        Operand { known, ..Operand::weight(TensorType::fixed(DataType::Int32, &[values.len() as u64])) }
    }

    pub(super) fn int(value: i64) -> Operand {
        Operand { ty: TensorType::fixed(DataType::Int32, &[]), ..ints(&[value]) }
    }

    pub(super) fn bools(values: &[bool]) -> Operand {
        let ty = TensorType::fixed(DataType::Bool, &[values.len() as u64]);
        Operand { known: Some(Known::Bools(values.to_vec())), ..Operand::weight(ty) }
    }

    pub(super) fn text(value: &str) -> Operand {
        let ty = TensorType::fixed(DataType::String, &[]);
        Operand { known: Some(Known::Text(value.into())), ..Operand::weight(ty) }
    }

    /// The results of an operation on these.
    pub(super) fn of(op: &str, inputs: &[(&str, &Operand)], symbols: &mut Symbols) -> Result<Vec<Operand>> {
        let inputs: Vec<_> = inputs.iter().map(|(name, o)| (*name, vec![*o])).collect();
        infer(op, &inputs, symbols)
    }

    #[test]
    fn names_are_unique() {
        let mut names = HashSet::new();
        for op in OPERATIONS.iter().copied().flatten() {
            assert!(names.insert(op.name), "{}", op.name);
            let parameters: HashSet<_> = op.parameters.iter().map(|p| p.name).collect();
            assert_eq!(parameters.len(), op.parameters.len(), "{}", op.name);
        }
        assert!(names.len() > 40);
    }

    #[test]
    fn faults_name_the_operation_and_the_parameter() {
        let mut symbols = Symbols::default();
        let (x, n) = (float(&[Dim::Known(4)]), int(0));
        for (op, inputs, words) in [
            ("add", vec![("x", &x)], "operation add: y is missing"),
            ("add", vec![("x", &x), ("y", &x), ("z", &x)], "no parameter z"),
            ("add", vec![("x", &x), ("y", &n)], "x is fp16, y is int32"),
            ("add", vec![("x", &x), ("x", &x), ("y", &x)], "x is given twice"),
            ("softmax", vec![("x", &n)], "x is int32"),
            ("expand_dims", vec![("x", &x), ("axes", &x)], "axes is fp16"),
            ("warp", vec![("x", &x)], "the operation warp is not known"),
        ] {
            let e = of(op, &inputs, &mut symbols).unwrap_err();
            assert!(e.to_string().contains(words), "{words:?} was expected: {e}");
        }
        let axes = Operand { constant: false, ..ints(&[0]) };
        let e = of("expand_dims", &[("x", &x), ("axes", &axes)], &mut symbols).unwrap_err();
        assert!(e.to_string().contains("axes must be a constant"), "{e}");
    }
}
