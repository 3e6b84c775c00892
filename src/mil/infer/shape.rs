//! Operations that change shapes alone, and the shape itself.

use super::super::types::{Dim, Symbols, TensorType};
use super::super::value::{Int, Known, Operand};
use super::{ALL, BOOL, Call, INT, Operation, constant, one, optional, tensor};
use crate::container::coreml::DataType;
use crate::error::{Error, Result};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation { name: "shape", parameters: &[tensor("x", ALL)], infer: shape },
    Operation { name: "reshape", parameters: &[tensor("x", ALL), tensor("shape", INT)], infer: reshape },
    Operation { name: "transpose", parameters: &[tensor("x", ALL), constant("perm", INT)], infer: transpose },
    Operation {
        name: "expand_dims",
        parameters: &[tensor("x", ALL), constant("axes", INT)],
        infer: expand_dims,
    },
    Operation { name: "squeeze", parameters: &[tensor("x", ALL), optional("axes", INT)], infer: squeeze },
    Operation { name: "tile", parameters: &[tensor("x", ALL), tensor("reps", INT)], infer: tile },
    Operation {
        name: "concat",
        parameters: &[tensor("values", ALL), constant("axis", INT), optional("interleave", BOOL)],
        infer: concat,
    },
    Operation {
        name: "split",
        parameters: &[
            tensor("x", ALL),
            optional("num_splits", INT),
            optional("split_sizes", INT),
            constant("axis", INT),
        ],
        infer: split,
    },
];

/// Tensors have at most so many dimensions.
const MOST_DIMENSIONS: usize = 5;

fn shape(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let sizes: Vec<Int> = call.get("x")?.ty.dims.iter().map(|d| Int::Size(*d)).collect();
    let ty = TensorType::fixed(DataType::Int32, &[sizes.len() as u64]);
    Ok(vec![Operand { known: Some(Known::Ints(sizes)), ..Operand::of(ty) }])
}

/// One size may be -1, the rest of the elements. A size of 0 is refused: Core ML takes it for the size that is there,
/// coremltools for none.
fn reshape(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    let (x, shape) = (&call.get("x")?.ty, call.get("shape")?);
    let [Dim::Known(rank)] = shape.ty.dims[..] else {
        return Err(Error::misuse(format!("shape is {}, a vector of known length was expected", shape.ty)));
    };
    if rank > MOST_DIMENSIONS as u64 {
        return Err(Error::misuse(format!("{rank} dimensions; Core ML has at most {MOST_DIMENSIONS}")));
    }
    let Some(ints) = shape.ints() else {
        return one(x.dtype, (0..rank).map(|_| symbols.fresh()).collect());
    };
    let (mut dims, mut rest) = (Vec::with_capacity(ints.len()), None);
    for (i, int) in ints.iter().enumerate() {
        dims.push(match (int, int.known()) {
            (_, Some(n @ 1..)) => Dim::Known(n as u64),
            (_, Some(-1)) if rest.is_none() => {
                rest = Some(i);
                Dim::Known(1)
            }
            (_, Some(n)) => return Err(Error::misuse(format!("size {n} in dimension {i}"))),
            (Int::Size(dim), None) => *dim,
            (_, None) => symbols.fresh(),
        });
    }
    // What stands on both sides cancels out.
    let (mut before, mut after) = (unknown(&x.dims), unknown(&dims));
    before.retain(|d| match after.iter().position(|other| other == d) {
        Some(k) => {
            after.remove(k);
            false
        }
        None => true,
    });
    let (from, to) = (known(&x.dims)?, known(&dims)?);
    let wrong = || Error::misuse(format!("{x} does not become {}", TensorType::new(x.dtype, dims.clone())));
    let filled = match (rest, &before[..], &after[..]) {
        (None, [], []) if from != to => return Err(wrong()),
        (Some(_), [], []) if to == 0 || from % to != 0 => return Err(wrong()),
        (Some(_), [], []) => Some(Dim::Known(from / to)),
        (Some(_), [one], []) if from == to => Some(*one),
        (Some(_), ..) => Some(symbols.fresh()),
        (None, ..) => None,
    };
    if let (Some(i), Some(dim)) = (rest, filled) {
        dims[i] = dim;
    }
    one(x.dtype, dims)
}

fn unknown(dims: &[Dim]) -> Vec<Dim> {
    dims.iter().copied().filter(|d| d.known().is_none()).collect()
}

/// The product of the sizes that are known.
fn known(dims: &[Dim]) -> Result<u64> {
    let product = dims.iter().filter_map(|d| d.known()).try_fold(1u64, u64::checked_mul);
    product.ok_or_else(|| Error::misuse("more than 2^64 elements"))
}

fn transpose(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let x = &call.get("x")?.ty;
    let perm = call.axes("perm", x.rank())?.unwrap_or_default();
    if perm.len() != x.rank() {
        return Err(Error::misuse(format!("perm has {} axes, x has {}", perm.len(), x.rank())));
    }
    one(x.dtype, perm.into_iter().map(|i| x.dims[i]).collect())
}

/// Elements stay as they are and in order.
fn reshaped(x: &Operand, dims: Vec<Dim>) -> Result<Vec<Operand>> {
    let known = x.known.clone();
    Ok(vec![Operand { known, ..Operand::of(TensorType::new(x.ty.dtype, dims)) }])
}

fn expand_dims(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let x = call.get("x")?;
    let rank = x.ty.rank() + call.ints("axes")?.map_or(0, |axes| axes.len());
    if rank > MOST_DIMENSIONS {
        return Err(Error::misuse(format!("{rank} dimensions; Core ML has at most {MOST_DIMENSIONS}")));
    }
    let axes = call.axes("axes", rank)?.unwrap_or_default();
    let mut own = x.ty.dims.iter().copied();
    let dims = (0..rank).map(|i| if axes.contains(&i) { Some(Dim::Known(1)) } else { own.next() });
    reshaped(x, dims.collect::<Option<_>>().unwrap_or_default())
}

fn squeeze(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let x = call.get("x")?;
    let is_one = |i: &usize| x.ty.dims[*i] == Dim::Known(1);
    let axes = call.axes("axes", x.ty.rank())?;
    let axes = axes.unwrap_or_else(|| (0..x.ty.rank()).filter(is_one).collect());
    if let Some(i) = axes.iter().find(|i| !is_one(i)) {
        return Err(Error::misuse(format!("axis {i} of {} is not 1", x.ty)));
    }
    reshaped(x, (0..x.ty.rank()).filter(|i| !axes.contains(i)).map(|i| x.ty.dims[i]).collect())
}

fn tile(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    let (x, reps) = (&call.get("x")?.ty, call.get("reps")?);
    if reps.ty.declared() != [Some(x.rank() as u64)] {
        return Err(Error::misuse(format!("reps is {}, x has {} dimensions", reps.ty, x.rank())));
    }
    let times = |i: usize| reps.ints().and_then(|ints| ints.get(i)).and_then(|n| n.known());
    let mut dims = Vec::with_capacity(x.rank());
    for (i, dim) in x.dims.iter().enumerate() {
        dims.push(match (*dim, times(i)) {
            (_, Some(n)) if n < 1 => return Err(Error::misuse(format!("{n} times in dimension {i}"))),
            (Dim::Known(size), Some(n)) => {
                let size = size.checked_mul(n as u64);
                Dim::Known(size.ok_or_else(|| Error::misuse("more than 2^64 elements"))?)
            }
            (dim, Some(1)) => dim,
            _ => symbols.fresh(),
        });
    }
    one(x.dtype, dims)
}

fn concat(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    let values = call.all("values");
    let Some((first, others)) = values.split_first() else {
        return Err(Error::misuse("values: there are none"));
    };
    if call.is("interleave")? {
        return Err(Error::unsupported("interleave: elements that alternate are not known"));
    }
    let axis = TensorType::axis(call.int("axis", 0)?, first.ty.rank())?;
    let mut dims = first.ty.dims.clone();
    for other in others {
        let ty = &other.ty;
        let wrong =
            || Error::misuse(format!("values: {} and {ty} cannot be joined at axis {axis}", first.ty));
        if ty.dtype != first.ty.dtype || ty.rank() != first.ty.rank() {
            return Err(wrong());
        }
        for (i, (dim, own)) in dims.iter_mut().zip(&ty.dims).enumerate() {
            *dim = match (*dim, *own) {
                (Dim::Known(a), Dim::Known(b)) if i == axis => {
                    Dim::Known(a.checked_add(b).ok_or_else(wrong)?)
                }
                _ if i == axis => symbols.fresh(),
                (a, b) if !a.may_equal(b) => return Err(wrong()),
                (Dim::Any(_), b @ Dim::Known(_)) => b,
                (a, _) => a,
            };
        }
    }
    // Vectors of integers stay known.
    let ints: Option<Vec<&[Int]>> = values.iter().map(|v| v.ints()).collect();
    let known = ints.filter(|_| first.ty.rank() == 1).map(|ints| Known::Ints(ints.concat()));
    Ok(vec![Operand { known, ..Operand::of(TensorType::new(first.ty.dtype, dims)) }])
}

fn split(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let x = &call.get("x")?.ty;
    let axis = TensorType::axis(call.int("axis", 0)?, x.rank())?;
    let wrong = |what: String| Error::misuse(format!("{x} at axis {axis}: {what}"));
    let Dim::Known(size) = x.dims[axis] else { return Err(wrong("its size is not known".into())) };
    let sizes = match (call.ints("split_sizes")?, call.int("num_splits", 0)?) {
        (Some(sizes), n) if n == 0 || n == sizes.len() as i64 => sizes,
        (None, n @ 1..) if size % n as u64 == 0 => vec![(size / n as u64) as i64; n as usize],
        (_, n) => return Err(wrong(format!("{n} parts do not go into it"))),
    };
    let parts: Option<Vec<u64>> = sizes.iter().map(|n| u64::try_from(*n).ok()).collect();
    let parts = parts.filter(|p| p.iter().try_fold(0u64, |a, b| a.checked_add(*b)) == Some(size));
    let parts = parts.ok_or_else(|| wrong(format!("parts of {sizes:?}")))?;
    let part = |n: u64| {
        let mut dims = x.dims.clone();
        dims[axis] = Dim::Known(n);
        Operand::of(TensorType::new(x.dtype, dims))
    };
    Ok(parts.into_iter().map(part).collect())
}

#[cfg(test)]
mod tests {
    use super::super::infer;
    use super::super::tests::{float, int, ints, of};
    use super::*;

    fn dims(found: &[Operand]) -> Vec<Dim> {
        found[0].ty.dims.clone()
    }

    #[test]
    fn heads_of_a_length_that_is_not_known() {
        let mut symbols = Symbols::default();
        let (q, n) = (symbols.fresh(), Dim::Known);
        let x = float(&[n(1), q, n(64)]);
        let heads = of("reshape", &[("x", &x), ("shape", &ints(&[1, -1, 4, 16]))], &mut symbols).unwrap();
        assert_eq!(dims(&heads), [n(1), q, n(4), n(16)]);
        let turned =
            of("transpose", &[("x", &heads[0]), ("perm", &ints(&[0, 2, 1, 3]))], &mut symbols).unwrap();
        assert_eq!(dims(&turned), [n(1), n(4), q, n(16)]);
        // Twice as many elements: another length.
        let other = of("reshape", &[("x", &x), ("shape", &ints(&[-1, 4, 8]))], &mut symbols).unwrap();
        assert!(
            matches!(dims(&other)[..], [Dim::Any(_), Dim::Known(4), Dim::Known(8)]) && dims(&other)[0] != q
        );
        // The length by way of the shape.
        let sizes = of("shape", &[("x", &x)], &mut symbols).unwrap();
        let axes = ints(&[0]);
        let q_len =
            of("gather", &[("x", &sizes[0]), ("indices", &int(1)), ("axis", &int(0))], &mut symbols).unwrap();
        let q_len = of("expand_dims", &[("x", &q_len[0]), ("axes", &axes)], &mut symbols).unwrap();
        let (one, rest, axis) = (ints(&[1]), ints(&[4, 16]), int(0));
        let values = vec![&one, &q_len[0], &rest];
        let shape = infer("concat", &[("values", values), ("axis", vec![&axis])], &mut symbols).unwrap();
        let heads = of("reshape", &[("x", &x), ("shape", &shape[0])], &mut symbols).unwrap();
        assert_eq!(dims(&heads), [n(1), q, n(4), n(16)]);
    }

    #[test]
    fn parts_and_wholes() {
        let mut symbols = Symbols::default();
        let (q, n) = (symbols.fresh(), Dim::Known);
        let x = float(&[n(1), q, n(64)]);
        let parts =
            of("split", &[("x", &x), ("split_sizes", &ints(&[48, 16])), ("axis", &int(-1))], &mut symbols);
        let parts = parts.unwrap();
        assert_eq!((parts[0].ty.dims[2], parts[1].ty.dims[2]), (n(48), n(16)));
        let values = vec![&parts[0], &parts[1]];
        let whole = infer("concat", &[("values", values), ("axis", vec![&int(2)])], &mut symbols).unwrap();
        assert_eq!(dims(&whole), x.ty.dims);
        let tiled = of("tile", &[("x", &x), ("reps", &ints(&[3, 1, 2]))], &mut symbols).unwrap();
        assert_eq!(dims(&tiled), [n(3), q, n(128)]);
        let flat = of("squeeze", &[("x", &x), ("axes", &ints(&[0]))], &mut symbols).unwrap();
        assert_eq!(dims(&flat), [q, n(64)]);
    }

    #[test]
    fn what_does_not_fit() {
        let mut symbols = Symbols::default();
        let x = float(&[Dim::Known(1), Dim::Known(6), Dim::Known(64)]);
        let mut fault =
            |op: &str, inputs: &[(&str, &Operand)]| of(op, inputs, &mut symbols).unwrap_err().to_string();
        assert!(
            fault("reshape", &[("x", &x), ("shape", &ints(&[0, 64, 6]))]).contains("size 0 in dimension 0")
        );
        assert!(
            fault("reshape", &[("x", &x), ("shape", &ints(&[-1, -1]))]).contains("size -1 in dimension 1")
        );
        assert!(
            fault("reshape", &[("x", &x), ("shape", &ints(&[6, 63]))]).contains("does not become fp16[6,63]")
        );
        assert!(fault("reshape", &[("x", &x), ("shape", &ints(&[-1, 63]))]).contains("does not become"));
        assert!(fault("reshape", &[("x", &x), ("shape", &ints(&[1; 6]))]).contains("6 dimensions"));
        assert!(fault("transpose", &[("x", &x), ("perm", &ints(&[0, 1]))]).contains("perm has 2 axes"));
        assert!(fault("squeeze", &[("x", &x), ("axes", &ints(&[1]))]).contains("is not 1"));
        assert!(fault("tile", &[("x", &x), ("reps", &ints(&[1, 0, 1]))]).contains("0 times"));
        assert!(fault("split", &[("x", &x), ("num_splits", &int(4)), ("axis", &int(1))]).contains("4 parts"));
        let sizes = ints(&[40, 20]);
        assert!(
            fault("split", &[("x", &x), ("split_sizes", &sizes), ("axis", &int(2))]).contains("[40, 20]")
        );
    }
}
