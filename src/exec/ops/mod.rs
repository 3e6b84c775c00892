//! Operations: their names, their parameters, and what they compute.
//!
//! Parameters and formulas are those of coremltools (`converters/mil/mil/ops/defs/iOS15` to `iOS18`). Sums are of
//! float32 products, or of float64 where a mean or a norm needs it; what is declared float16 is rounded once, when the
//! operation is done.

mod attention;
mod elementwise;
mod indexing;
mod reduce;
mod shape;

use super::call::Call;
use super::product;
use super::tensor::Tensor;
use crate::error::Result;

/// An operation.
#[derive(Debug)]
pub(super) struct Operator {
    pub(super) name: &'static str,
    pub(super) parameters: &'static [&'static str],
    /// Whether results are computed, not only moved: those are rounded.
    pub(super) computes: bool,
    pub(super) run: fn(&mut Call<'_>) -> Result<Vec<Tensor>>,
}

pub(super) const fn computed(
    name: &'static str,
    parameters: &'static [&'static str],
    run: fn(&mut Call<'_>) -> Result<Vec<Tensor>>,
) -> Operator {
    Operator { name, parameters, computes: true, run }
}

const fn moved(
    name: &'static str,
    parameters: &'static [&'static str],
    run: fn(&mut Call<'_>) -> Result<Vec<Tensor>>,
) -> Operator {
    Operator { name, parameters, computes: false, run }
}

/// Every operation that is executed, but for constants and states.
static OPERATORS: &[&[Operator]] = &[
    attention::OPERATORS,
    elementwise::OPERATORS,
    indexing::OPERATORS,
    product::OPERATORS,
    reduce::OPERATORS,
    shape::OPERATORS,
];

/// The operation of this name.
pub(super) fn find(name: &str) -> Option<&'static Operator> {
    OPERATORS.iter().copied().flatten().find(|o| o.name == name)
}

pub(super) use elementwise::broadcast;

fn one(tensor: Tensor) -> Result<Vec<Tensor>> {
    Ok(vec![tensor])
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use super::super::call::Operand;
    use super::super::tensor::Data;
    use super::*;
    use crate::container::coreml::DataType;

    pub(in super::super) fn floats(shape: &[usize], values: &[f32]) -> Tensor {
        Tensor::floats(shape, values.to_vec()).unwrap()
    }

    pub(in super::super) fn ints(values: &[i32]) -> Tensor {
        Tensor::ints(&[values.len()], values.to_vec()).unwrap()
    }

    pub(in super::super) fn int(value: i32) -> Tensor {
        Tensor::ints(&[], vec![value]).unwrap()
    }

    pub(in super::super) fn bools(values: &[bool]) -> Tensor {
        Tensor::of_bools(vec![values.len()], values.to_vec())
    }

    pub(in super::super) fn truth(value: bool) -> Tensor {
        Tensor::of_bools(vec![], vec![value])
    }

    pub(in super::super) fn text(value: &str) -> Tensor {
        Tensor { dtype: DataType::String, shape: vec![], data: Data::Text(Arc::from(value)) }
    }

    /// What an operation makes of these.
    pub(in super::super) fn run(name: &str, inputs: &[(&'static str, Tensor)]) -> Result<Vec<Tensor>> {
        let operator = find(name).unwrap_or_else(|| panic!("{name}"));
        let mut bound: Vec<(&str, Vec<Operand>)> = Vec::new();
        for (name, tensor) in inputs {
            assert!(operator.parameters.contains(name), "{name}");
            match bound.iter_mut().find(|(other, _)| other == name) {
                Some((_, operands)) => operands.push(Operand::Tensor(tensor.clone())),
                None => bound.push((name, vec![Operand::Tensor(tensor.clone())])),
            }
        }
        (operator.run)(&mut Call { inputs: bound, results: 1, room: usize::MAX })
    }

    /// The one result of an operation, of floats: its shape and elements.
    pub(in super::super) fn of(name: &str, inputs: &[(&'static str, Tensor)]) -> (Vec<usize>, Vec<f32>) {
        let found = run(name, inputs).unwrap_or_else(|e| panic!("{name}: {e}"));
        (found[0].shape.clone(), found[0].as_floats().unwrap().to_vec())
    }

    /// That an operation refuses these, with such words.
    pub(in super::super) fn refused(name: &str, inputs: &[(&'static str, Tensor)], words: &str) {
        let e = run(name, inputs).unwrap_err();
        assert!(e.to_string().contains(words), "{name}: {words:?} was expected: {e}");
    }

    pub(in super::super) fn near(found: &[f32], wanted: &[f32]) {
        assert_eq!(found.len(), wanted.len(), "{found:?}");
        for (f, w) in found.iter().zip(wanted) {
            assert!((f - w).abs() <= 1e-6 * w.abs().max(1.0), "{found:?}, {wanted:?} was expected");
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names = HashSet::new();
        for operator in OPERATORS.iter().copied().flatten() {
            assert!(names.insert(operator.name), "{}", operator.name);
            let parameters: HashSet<_> = operator.parameters.iter().collect();
            assert_eq!(parameters.len(), operator.parameters.len(), "{}", operator.name);
        }
        assert!(names.len() > 45, "{}", names.len());
    }
}
