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
    use super::super::parse::Declared;
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
        (operator.run)(&mut Call {
            inputs: bound,
            results: 1,
            declared: None,
            room: usize::MAX,
            fuel: u64::MAX,
        })
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

    /// What operations take is counted before they take it: what is decoded, what they need meanwhile, and the work.
    #[test]
    fn memory_and_work_are_counted() {
        use super::super::weight::Weight;
        use super::super::weight::tests::{of_bytes, package};
        let stored = |shape: &[u64], dtype: DataType, bytes: usize| {
            Operand::Weight(Arc::new(
                Weight::new(&package(), of_bytes(dtype, shape, &vec![0; bytes])).unwrap(),
            ))
        };
        let row = |n: u64| stored(&[n], DataType::Float16, 2 * n as usize);
        let tensor = Operand::Tensor;
        let many = |n: usize| Tensor::ints(&[n], vec![1; n]).unwrap();
        let call = |name: &str, inputs: Vec<(&'static str, Vec<Operand>)>, room: usize, fuel: u64| {
            let mut call = Call { inputs, results: 1, declared: None, room, fuel };
            (find(name).unwrap().run)(&mut call).map(|_| ())
        };
        let (most, all) = (usize::MAX, u64::MAX);
        let memory = "there is memory for";
        let work = "computes far more";
        let few = "at most 16 are read";
        let axis = || ("axis", vec![tensor(int(0))]);
        let floats = |shape: &[usize]| tensor(floats(shape, &vec![1.0; shape.iter().product()]));
        let square = |n: usize| vec![("x", vec![floats(&[n, n])]), ("y", vec![floats(&[n, n])])];
        let heads = || ["query", "key", "value"].map(|name| (name, vec![floats(&[1, 100, 1])])).to_vec();
        type Inputs = Vec<(&'static str, Vec<Operand>)>;
        let cases: Vec<(&str, Inputs, usize, u64, &str)> = vec![
            ("add", vec![("x", vec![row(100)]), ("y", vec![row(100)])], 299, all, memory),
            ("concat", vec![("values", vec![row(100); 16]), axis()], 3199, all, memory),
            ("concat", vec![("values", vec![row(100); 16]), axis()], 1599, all, memory),
            (
                "select",
                vec![("cond", vec![tensor(truth(true))]), ("a", vec![row(100)]), ("b", vec![row(100)])],
                299,
                all,
                memory,
            ),
            (
                "cast",
                vec![("x", vec![floats(&[100])]), ("dtype", vec![tensor(text("int32"))])],
                99,
                all,
                memory,
            ),
            (
                "transpose",
                vec![("x", vec![floats(&[10, 10])]), ("perm", vec![tensor(ints(&[1, 0]))])],
                99,
                all,
                memory,
            ),
            ("topk", vec![("x", vec![floats(&[100])])], 401, all, memory),
            ("topk", vec![("x", vec![floats(&[1024])])], most, 40_000, work),
            ("reshape", vec![("x", vec![floats(&[1])]), ("shape", vec![tensor(many(17))])], most, all, few),
            (
                "expand_dims",
                vec![("x", vec![floats(&[1])]), ("axes", vec![tensor(many(17))])],
                most,
                all,
                few,
            ),
            (
                "split",
                vec![("x", vec![floats(&[17])]), ("split_sizes", vec![tensor(many(17))])],
                most,
                all,
                few,
            ),
            ("matmul", square(100), 10_000, 30_000 + 7000, work),
            ("scaled_dot_product_attention", heads(), 200 + 6400 - 100 - 1, all, memory),
            ("scaled_dot_product_attention", heads(), most, 10_000, work),
        ];
        for (name, inputs, room, fuel, words) in cases {
            let e = call(name, inputs.clone(), room, fuel).unwrap_err();
            assert!(e.kind() == crate::ErrorKind::Limit && e.to_string().contains(words), "{name}: {e}");
            let parts_of_many = words == few;
            assert!(parts_of_many || call(name, inputs, most, all).is_ok(), "{name}");
        }
        // What is declared is looked at before anything is made.
        let declared = Declared { name: "y".into(), dtype: DataType::Float32, shape: vec![Some(2)] };
        let inputs = vec![("x", vec![floats(&[2])]), ("reps", vec![tensor(ints(&[1 << 20]))])];
        let mut tile = Call { inputs, results: 1, declared: Some(&declared), room: 0, fuel: 0 };
        let e = (find("tile").unwrap().run)(&mut tile).unwrap_err();
        assert!(e.to_string().contains("it is declared fp32[2]"), "{e}");
    }

    /// Rows without elements are not walked through.
    #[test]
    fn nothing_of_many_rows() {
        let none = || floats(&[1 << 29, 0], &[]);
        let joined = run("concat", &[("values", none()), ("values", none()), ("axis", int(1))]).unwrap();
        assert_eq!(joined[0].shape(), [1 << 29, 0]);
        let x = floats(&[1 << 28, 2, 0], &[]);
        let taken = run("gather", &[("x", x), ("indices", ints(&[0, 1])), ("axis", int(1))]).unwrap();
        assert_eq!(taken[0].shape(), [1 << 28, 2, 0]);
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
