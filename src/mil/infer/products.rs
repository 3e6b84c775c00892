//! Products of matrices, and attention.

use super::super::types::{Dim, Symbols, TensorType, broadcast};
use super::super::value::Operand;
use super::{BOOL, Call, FLOATS, INT, Operation, Parameter, TEXT, constant, one, optional, tensor};
use crate::container::coreml::DataType;
use crate::error::{Error, Result};

const MASK: &[DataType] = &[DataType::Bool, DataType::Float16, DataType::Float32];

pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "linear",
        parameters: &[tensor("x", FLOATS), constant("weight", FLOATS), optional("bias", FLOATS)],
        infer: linear,
    },
    Operation {
        name: "matmul",
        parameters: &[
            tensor("x", FLOATS),
            tensor("y", FLOATS),
            optional("transpose_x", BOOL),
            optional("transpose_y", BOOL),
        ],
        infer: matmul,
    },
    Operation {
        name: "conv",
        parameters: &[
            tensor("x", FLOATS),
            tensor("weight", FLOATS),
            optional("bias", FLOATS),
            optional("strides", INT),
            optional("pad_type", TEXT),
            optional("pad", INT),
            optional("dilations", INT),
            optional("groups", INT),
        ],
        infer: conv,
    },
    Operation {
        name: "scaled_dot_product_attention",
        parameters: &[
            tensor("query", FLOATS),
            tensor("key", FLOATS),
            tensor("value", FLOATS),
            Parameter { name: "attn_mask", optional: true, constant: false, dtypes: MASK },
        ],
        infer: attention,
    },
];

fn check_bias(call: &Call<'_>, outputs: Dim) -> Result<()> {
    match call.given("bias") {
        Some(bias) if bias.ty.dims != [outputs] => {
            Err(Error::misuse(format!("bias is {}, there are {outputs} outputs", bias.ty)))
        }
        _ => Ok(()),
    }
}

/// `x W^T + bias`, for vectors along the last axis.
fn linear(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    call.same_dtype("x", "weight")?;
    let (x, weight) = (&call.get("x")?.ty, &call.get("weight")?.ty);
    let ([outputs, inputs], Some((last, outer))) = (&weight.dims[..], x.dims.split_last()) else {
        return Err(Error::misuse(format!("{x} times {weight}: a matrix was expected")));
    };
    if x.rank() > 3 || !last.may_equal(*inputs) {
        return Err(Error::misuse(format!("{x} does not go into the matrix {weight}")));
    }
    check_bias(call, *outputs)?;
    one(x.dtype, [outer, &[*outputs]].concat())
}

fn matmul(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    call.same_dtype("x", "y")?;
    let (x, y) = (&call.get("x")?.ty, &call.get("y")?.ty);
    let matrix = |ty: &TensorType, turned: bool| match ty.dims[..] {
        [ref outer @ .., rows, cols] => {
            Ok(if turned { (outer.to_vec(), cols, rows) } else { (outer.to_vec(), rows, cols) })
        }
        _ => Err(Error::misuse(format!("{ty} is no matrix"))),
    };
    let (x_outer, rows, inner) = matrix(x, call.is("transpose_x")?)?;
    let (y_outer, other, cols) = matrix(y, call.is("transpose_y")?)?;
    if !inner.may_equal(other) {
        return Err(Error::misuse(format!("{x} times {y}: {inner} and {other} differ")));
    }
    let mut dims = broadcast(&x_outer, &y_outer, symbols)?;
    dims.extend([rows, cols]);
    one(x.dtype, dims)
}

/// Only what is a product of matrices: kernels of 1 by 1.
fn conv(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    call.same_dtype("x", "weight")?;
    let (x, weight) = (&call.get("x")?.ty, &call.get("weight")?.ty);
    let ([batch, channels, height, width], [outputs, inputs, Dim::Known(1), Dim::Known(1)]) =
        (&x.dims[..], &weight.dims[..])
    else {
        return Err(Error::unsupported(format!("{x} with {weight}: kernels of 1 by 1 are known")));
    };
    let plain = |name: &str, value: i64| {
        Ok::<_, Error>(call.ints(name)?.is_none_or(|n| n.iter().all(|n| *n == value)))
    };
    let is_plain = plain("strides", 1)?
        && plain("dilations", 1)?
        && plain("pad", 0)?
        && plain("groups", 1)?
        && call.text("pad_type")?.is_none_or(|t| t == "valid");
    if !is_plain {
        return Err(Error::unsupported("strides, padding, dilations and groups are not known"));
    }
    if !channels.may_equal(*inputs) {
        return Err(Error::misuse(format!("{x} does not go into the kernels {weight}")));
    }
    check_bias(call, *outputs)?;
    one(x.dtype, vec![*batch, *outputs, *height, *width])
}

/// Heads of queries, keys and values are as many: nothing is shared here.
fn attention(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    call.same_dtype("query", "key")?;
    call.same_dtype("query", "value")?;
    let (query, key, value) = (&call.get("query")?.ty, &call.get("key")?.ty, &call.get("value")?.ty);
    let wrong =
        || Error::misuse(format!("queries {query}, keys {key} and values {value} do not go together"));
    let rank = query.rank();
    if rank < 3 || key.rank() != rank || value.rank() != rank {
        return Err(wrong());
    }
    let outer = |ty: &TensorType| ty.dims[..rank - 2].to_vec();
    let same_outer = |other: &TensorType| outer(query).iter().zip(outer(other)).all(|(a, b)| a.may_equal(b));
    let fits = same_outer(key)
        && same_outer(value)
        && query.dims[rank - 1].may_equal(key.dims[rank - 1])
        && key.dims[rank - 2].may_equal(value.dims[rank - 2]);
    if !fits {
        return Err(wrong());
    }
    if let Some(mask) = call.given("attn_mask") {
        let mask = &mask.ty;
        let wrong = || Error::misuse(format!("a mask {mask} does not fit queries {query} and keys {key}"));
        let Some((keys, rows)) = mask.dims.split_last() else { return Err(wrong()) };
        if !keys.may_equal(key.dims[rank - 2]) || rows.len() >= rank {
            return Err(wrong());
        }
        broadcast(&query.dims[..rank - 1], rows, symbols).map_err(|_| wrong())?;
    }
    let mut dims = query.dims.clone();
    dims[rank - 1] = value.dims[rank - 1];
    one(query.dtype, dims)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{bools, float, of, text, weight};
    use super::*;

    #[test]
    fn products() {
        let mut symbols = Symbols::default();
        let (q, k, n) = (symbols.fresh(), symbols.fresh(), Dim::Known);
        let mut dims = |op: &str, inputs: &[(&str, &Operand)]| {
            of(op, inputs, &mut symbols).map(|o| o[0].ty.dims.clone())
        };
        let turned = Operand { ty: TensorType::fixed(DataType::Bool, &[]), ..bools(&[true]) };
        let x = float(&[n(1), q, n(64)]);
        let y = dims("linear", &[("x", &x), ("weight", &weight(&[96, 64])), ("bias", &weight(&[96]))]);
        assert_eq!(y.unwrap(), [n(1), q, n(96)]);
        let (queries, keys) = (float(&[n(1), n(4), q, n(16)]), float(&[n(1), n(4), k, n(16)]));
        let scores = dims("matmul", &[("x", &queries), ("y", &keys), ("transpose_y", &turned)]);
        assert_eq!(scores.unwrap(), [n(1), n(4), q, k]);
        let experts = dims(
            "matmul",
            &[("x", &float(&[q, n(64)])), ("y", &weight(&[3, 96, 64])), ("transpose_y", &turned)],
        );
        assert_eq!(experts.unwrap(), [n(3), q, n(96)]);
        let mask = float(&[n(1), n(1), q, k]);
        let attended = dims(
            "scaled_dot_product_attention",
            &[("query", &queries), ("key", &keys), ("value", &keys), ("attn_mask", &mask)],
        );
        assert_eq!(attended.unwrap(), queries.ty.dims);
        let channels = float(&[n(1), n(64), n(1), n(8)]);
        let y = dims(
            "conv",
            &[("x", &channels), ("weight", &weight(&[96, 64, 1, 1])), ("pad_type", &text("valid"))],
        );
        assert_eq!(y.unwrap(), [n(1), n(96), n(1), n(8)]);
    }

    #[test]
    fn what_does_not_go_together() {
        let mut symbols = Symbols::default();
        let (q, n) = (symbols.fresh(), Dim::Known);
        let mut fault =
            |op: &str, inputs: &[(&str, &Operand)]| of(op, inputs, &mut symbols).unwrap_err().to_string();
        let x = float(&[n(1), q, n(64)]);
        assert!(fault("linear", &[("x", &x), ("weight", &weight(&[96, 63]))]).contains("does not go into"));
        assert!(
            fault("linear", &[("x", &x), ("weight", &float(&[n(96), n(64)]))]).contains("must be a constant")
        );
        let narrow = fault("linear", &[("x", &x), ("weight", &weight(&[96, 64])), ("bias", &weight(&[64]))]);
        assert!(narrow.contains("there are 96 outputs"), "{narrow}");
        let (queries, keys) = (float(&[n(1), n(4), q, n(16)]), float(&[n(1), n(2), q, n(16)]));
        let shared = [("query", &queries), ("key", &keys), ("value", &keys)];
        assert!(fault("scaled_dot_product_attention", &shared).contains("do not go together"));
        let channels = float(&[n(1), n(64), n(1), n(8)]);
        assert!(fault("conv", &[("x", &channels), ("weight", &weight(&[96, 64, 3, 3]))]).contains("1 by 1"));
    }
}
