//! Operations on each element, and along axes.

use super::super::types::{Dim, Symbols, TensorType, broadcast};
use super::super::value::{Int, Known, Operand};
use super::{
    ALL, BOOL, Call, FLOATS, INT, NUMBERS, Operation, Parameter, TEXT, constant, one, optional, tensor,
};
use crate::container::coreml::DataType;
use crate::error::{Error, Result};

const TWO_NUMBERS: &[Parameter] = &[tensor("x", NUMBERS), tensor("y", NUMBERS)];
const TWO_TRUTHS: &[Parameter] = &[tensor("x", BOOL), tensor("y", BOOL)];
const FLOAT: &[Parameter] = &[tensor("x", FLOATS)];
const REDUCED: &[Parameter] = &[tensor("x", NUMBERS), optional("axes", INT), optional("keep_dims", BOOL)];
const NORMED: &[Parameter] = &[
    tensor("x", FLOATS),
    optional("axes", INT),
    optional("gamma", FLOATS),
    optional("beta", FLOATS),
    optional("epsilon", FLOATS),
];

pub(super) const OPERATIONS: &[Operation] = &[
    Operation { name: "add", parameters: TWO_NUMBERS, infer: binary },
    Operation { name: "sub", parameters: TWO_NUMBERS, infer: binary },
    Operation { name: "mul", parameters: TWO_NUMBERS, infer: binary },
    Operation { name: "real_div", parameters: TWO_NUMBERS, infer: binary },
    Operation { name: "floor_div", parameters: TWO_NUMBERS, infer: binary },
    Operation { name: "mod", parameters: TWO_NUMBERS, infer: binary },
    Operation { name: "maximum", parameters: TWO_NUMBERS, infer: binary },
    Operation { name: "minimum", parameters: TWO_NUMBERS, infer: binary },
    Operation { name: "less", parameters: TWO_NUMBERS, infer: comparison },
    Operation { name: "less_equal", parameters: TWO_NUMBERS, infer: comparison },
    Operation { name: "greater", parameters: TWO_NUMBERS, infer: comparison },
    Operation { name: "greater_equal", parameters: TWO_NUMBERS, infer: comparison },
    Operation { name: "equal", parameters: TWO_NUMBERS, infer: comparison },
    Operation { name: "not_equal", parameters: TWO_NUMBERS, infer: comparison },
    Operation { name: "logical_and", parameters: TWO_TRUTHS, infer: binary },
    Operation { name: "logical_or", parameters: TWO_TRUTHS, infer: binary },
    Operation { name: "logical_not", parameters: &[tensor("x", BOOL)], infer: unary },
    Operation { name: "exp", parameters: FLOAT, infer: unary },
    Operation { name: "tanh", parameters: FLOAT, infer: unary },
    Operation { name: "sigmoid", parameters: FLOAT, infer: unary },
    Operation { name: "silu", parameters: FLOAT, infer: unary },
    Operation { name: "sqrt", parameters: FLOAT, infer: unary },
    Operation { name: "gelu", parameters: &[tensor("x", FLOATS), optional("mode", TEXT)], infer: unary },
    Operation {
        name: "rsqrt",
        parameters: &[tensor("x", FLOATS), optional("epsilon", FLOATS)],
        infer: unary,
    },
    Operation {
        name: "clip",
        parameters: &[tensor("x", FLOATS), constant("alpha", FLOATS), constant("beta", FLOATS)],
        infer: clip,
    },
    Operation {
        name: "select",
        parameters: &[tensor("cond", BOOL), tensor("a", ALL), tensor("b", ALL)],
        infer: select,
    },
    Operation { name: "cast", parameters: &[tensor("x", ALL), constant("dtype", TEXT)], infer: cast },
    Operation { name: "softmax", parameters: &[tensor("x", FLOATS), optional("axis", INT)], infer: softmax },
    Operation { name: "reduce_mean", parameters: REDUCED, infer: reduce },
    Operation { name: "reduce_sum", parameters: REDUCED, infer: reduce },
    Operation { name: "reduce_max", parameters: REDUCED, infer: reduce },
    Operation { name: "reduce_min", parameters: REDUCED, infer: reduce },
    Operation { name: "reduce_sum_square", parameters: REDUCED, infer: reduce },
    Operation { name: "layer_norm", parameters: NORMED, infer: layer_norm },
];

fn unary(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let x = &call.get("x")?.ty;
    one(x.dtype, x.dims.clone())
}

fn binary(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    call.same_dtype("x", "y")?;
    let (x, y) = (call.get("x")?, call.get("y")?);
    let dims = broadcast(&x.ty.dims, &y.ty.dims, symbols)?;
    // Sums of sizes have no symbol; that they are integers of a known number is of use.
    let known = match (x.ints(), y.ints()) {
        (Some(a), Some(_)) => Some(Known::Ints(vec![Int::Unknown; a.len()])),
        _ => None,
    };
    let known = known.filter(|_| x.ty.dims == y.ty.dims);
    Ok(vec![Operand { known, ..Operand::of(TensorType::new(x.ty.dtype, dims)) }])
}

fn comparison(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    call.same_dtype("x", "y")?;
    one(DataType::Bool, broadcast(&call.get("x")?.ty.dims, &call.get("y")?.ty.dims, symbols)?)
}

fn clip(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    for bound in ["alpha", "beta"] {
        call.same_dtype("x", bound)?;
        if call.get(bound)?.ty.rank() != 0 {
            return Err(Error::misuse(format!("{bound} is {}, a scalar was expected", call.get(bound)?.ty)));
        }
    }
    unary(call, symbols)
}

/// Its shape is that of `a` and `b` together: `cond` alone does not make it larger.
fn select(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    call.same_dtype("a", "b")?;
    let (a, b) = (&call.get("a")?.ty, &call.get("b")?.ty);
    one(a.dtype, broadcast(&a.dims, &b.dims, symbols)?)
}

fn cast(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let (x, name) = (call.get("x")?, call.text("dtype")?.unwrap_or_default());
    let dtype = ALL.iter().copied().find(|t| t.name() == name);
    let dtype = dtype.ok_or_else(|| Error::misuse(format!("dtype {name:?}: one of {ALL:?} was expected")))?;
    one(dtype, x.ty.dims.clone())
}

fn softmax(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    TensorType::axis(call.int("axis", -1)?, call.get("x")?.ty.rank())?;
    unary(call, symbols)
}

fn reduce(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let x = &call.get("x")?.ty;
    let axes = call.axes("axes", x.rank())?.unwrap_or_else(|| (0..x.rank()).collect());
    let keep = call.is("keep_dims")?;
    let left = x.dims.iter().enumerate().filter_map(|(i, d)| match (axes.contains(&i), keep) {
        (false, _) => Some(*d),
        (true, true) => Some(Dim::Known(1)),
        (true, false) => None,
    });
    one(x.dtype, left.collect())
}

fn layer_norm(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    let x = &call.get("x")?.ty;
    let axes = call.axes("axes", x.rank())?.unwrap_or_else(|| (0..x.rank()).collect());
    let over: Vec<Dim> = (0..x.rank()).filter(|i| axes.contains(i)).map(|i| x.dims[i]).collect();
    for name in ["gamma", "beta"] {
        let Some(given) = call.given(name) else { continue };
        let fits =
            given.ty.rank() == over.len() && given.ty.dims.iter().zip(&over).all(|(a, b)| a.may_equal(*b));
        if !fits {
            return Err(Error::misuse(format!(
                "{name} is {}, which is not the shape of the axes of {x}",
                given.ty
            )));
        }
    }
    unary(call, symbols)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{bools, float, int, ints, of, text, weight};
    use super::*;

    #[test]
    fn shapes_of_results() {
        let mut symbols = Symbols::default();
        let (q, k, n) = (symbols.fresh(), symbols.fresh(), Dim::Known);
        let (rows, keys) = (float(&[q, n(1)]), float(&[n(1), k]));
        let dims = |found: Vec<Operand>| (found[0].ty.dtype, found[0].ty.dims.clone());
        let hidden = of("greater_equal", &[("x", &rows), ("y", &keys)], &mut symbols).unwrap();
        assert_eq!(dims(hidden.clone()), (DataType::Bool, vec![q, k]));
        let fp16 = of("cast", &[("x", &hidden[0]), ("dtype", &text("fp16"))], &mut symbols).unwrap();
        assert_eq!(dims(fp16), (DataType::Float16, vec![q, k]));
        let x = float(&[n(1), q, n(8)]);
        let (last, keep) =
            (ints(&[-1]), Operand { ty: TensorType::fixed(DataType::Bool, &[]), ..bools(&[true]) });
        let mean =
            of("reduce_mean", &[("x", &x), ("axes", &last), ("keep_dims", &keep)], &mut symbols).unwrap();
        assert_eq!(dims(mean).1, [n(1), q, n(1)]);
        let sum = of("reduce_sum", &[("x", &x), ("axes", &ints(&[0, 2]))], &mut symbols).unwrap();
        assert_eq!(dims(sum).1, [q]);
        let normed = of("layer_norm", &[("x", &x), ("axes", &last), ("gamma", &weight(&[8]))], &mut symbols);
        assert_eq!(dims(normed.unwrap()).1, x.ty.dims);
        // Scalars stay scalars: coremltools infers the same, whatever the condition's shape.
        let chosen =
            of("select", &[("cond", &hidden[0]), ("a", &float(&[])), ("b", &float(&[]))], &mut symbols);
        assert_eq!(dims(chosen.unwrap()).1, []);
    }

    #[test]
    fn what_does_not_go_together() {
        let mut symbols = Symbols::default();
        let x = float(&[Dim::Known(2), Dim::Known(8)]);
        let mut fault =
            |op: &str, inputs: &[(&str, &Operand)]| of(op, inputs, &mut symbols).unwrap_err().to_string();
        assert!(fault("mul", &[("x", &x), ("y", &weight(&[3]))]).contains("sizes 8 and 3"));
        assert!(fault("softmax", &[("x", &x), ("axis", &int(2))]).contains("axis 2 of 2"));
        assert!(fault("reduce_sum", &[("x", &x), ("axes", &ints(&[1, -1]))]).contains("axis 1 twice"));
        assert!(fault("cast", &[("x", &x), ("dtype", &text("half"))]).contains("\"half\""));
        assert!(
            fault("clip", &[("x", &x), ("alpha", &weight(&[1])), ("beta", &weight(&[]))])
                .contains("a scalar")
        );
        let gamma = weight(&[2]);
        assert!(
            fault("layer_norm", &[("x", &x), ("axes", &ints(&[-1])), ("gamma", &gamma)]).contains("gamma")
        );
    }
}
