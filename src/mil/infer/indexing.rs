//! Operations that take elements by their places, or put them there.

use super::super::types::{Dim, Symbols, TensorType};
use super::super::value::{Int, Known, Operand};
use super::{ALL, BOOL, Call, FLOATS, INT, NUMBERS, Operation, Parameter, TEXT, one, optional, tensor};
use crate::container::coreml::DataType;
use crate::error::{Error, Result};

const SLICE: &[Parameter] = &[
    tensor("x", ALL),
    tensor("begin", INT),
    tensor("end", INT),
    optional("stride", INT),
    optional("begin_mask", BOOL),
    optional("end_mask", BOOL),
    optional("squeeze_mask", BOOL),
];

pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "gather",
        parameters: &[
            tensor("x", NUMBERS),
            tensor("indices", INT),
            optional("axis", INT),
            optional("batch_dims", INT),
            optional("validate_indices", BOOL),
        ],
        infer: gather,
    },
    Operation {
        name: "range_1d",
        parameters: &[tensor("end", INT), tensor("start", INT), tensor("step", INT)],
        infer: range,
    },
    Operation { name: "slice_by_index", parameters: SLICE, infer: slice_by_index },
    Operation {
        name: "slice_update",
        parameters: &[
            tensor("x", ALL),
            tensor("update", ALL),
            tensor("begin", INT),
            tensor("end", INT),
            optional("stride", INT),
            optional("begin_mask", BOOL),
            optional("end_mask", BOOL),
            optional("squeeze_mask", BOOL),
        ],
        infer: slice_update,
    },
    Operation {
        name: "topk",
        parameters: &[
            tensor("x", FLOATS),
            optional("k", INT),
            optional("axis", INT),
            optional("ascending", BOOL),
            optional("sort", BOOL),
            optional("return_indices", BOOL),
            optional("output_indices_dtype", TEXT),
        ],
        infer: topk,
    },
    Operation {
        name: "scatter_along_axis",
        parameters: &[
            tensor("data", NUMBERS),
            tensor("indices", INT),
            tensor("updates", NUMBERS),
            optional("axis", INT),
            optional("mode", TEXT),
            optional("validate_indices", BOOL),
        ],
        infer: scatter_along_axis,
    },
];

fn gather(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let (x, indices) = (call.get("x")?, call.get("indices")?);
    let axis = TensorType::axis(call.int("axis", 0)?, x.ty.rank())?;
    let batch = usize::try_from(call.int("batch_dims", 0)?).unwrap_or(usize::MAX);
    if batch > axis || batch > indices.ty.rank() {
        return Err(Error::misuse(format!("{batch} dimensions of batches, of {} by {}", x.ty, indices.ty)));
    }
    let dims = [&x.ty.dims[..axis], &indices.ty.dims[batch..], &x.ty.dims[axis + 1..]].concat();
    // One of a list of sizes.
    let pick = |list: &[Int], at: &[Int]| match at {
        [at] => list.get(usize::try_from(at.known()?).ok()?).copied(),
        _ => None,
    };
    let known = match (x.ints(), indices.ints()) {
        (Some(list), Some(at)) if x.ty.rank() == 1 => pick(list, at).map(|n| Known::Ints(vec![n])),
        _ => None,
    };
    Ok(vec![Operand { known, ..Operand::of(TensorType::new(x.ty.dtype, dims)) }])
}

/// From 0 in steps of 1 to a size, there are as many.
fn range(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    let scalar = |name: &str| {
        let operand = call.get(name)?;
        match (operand.ty.rank(), operand.ints()) {
            (0, Some([one])) => Ok(*one),
            (0, _) => Ok(Int::Unknown),
            _ => Err(Error::misuse(format!("{name} is {}, a scalar was expected", operand.ty))),
        }
    };
    let (start, end, step) = (scalar("start")?, scalar("end")?, scalar("step")?);
    let n = match (start.known(), end.known(), step.known()) {
        (_, _, Some(0)) => return Err(Error::misuse("step is 0")),
        (Some(a), Some(b), Some(s)) => {
            let (a, b, s) = (i128::from(a), i128::from(b), i128::from(s));
            let n = (b - a + s - s.signum()).div_euclid(s).max(0);
            Dim::Known(u64::try_from(n).unwrap_or(u64::MAX))
        }
        (Some(0), None, Some(1)) => match end {
            Int::Size(dim) => dim,
            _ => symbols.fresh(),
        },
        _ => symbols.fresh(),
    };
    one(DataType::Int32, vec![n])
}

/// The shape of a stretch of `x`, and of that without what is squeezed.
fn stretch(call: &Call<'_>, x: &TensorType, symbols: &mut Symbols) -> Result<Vec<Dim>> {
    let rank = x.rank();
    for name in ["begin", "end"] {
        let given = &call.get(name)?.ty;
        if given.declared() != [Some(rank as u64)] {
            return Err(Error::misuse(format!("{name} is {given}, x has {rank} dimensions")));
        }
    }
    let strides = call.ints("stride")?.unwrap_or_else(|| vec![1; rank]);
    if strides.len() != rank || strides.contains(&0) {
        return Err(Error::misuse(format!("stride is {strides:?}, x has {rank} dimensions")));
    }
    let (from_first, to_last) = (call.mask("begin_mask", rank)?, call.mask("end_mask", rank)?);
    let squeezed = call.mask("squeeze_mask", rank)?;
    let bound = |name: &str, i: usize| {
        Ok::<_, Error>(call.get(name)?.ints().and_then(|ints| ints.get(i)).and_then(|n| n.known()))
    };
    let mut dims = Vec::with_capacity(rank);
    for i in 0..rank {
        let begin = if from_first[i] { None } else { Some(bound("begin", i)?) };
        let end = if to_last[i] { None } else { Some(bound("end", i)?) };
        if !squeezed[i] {
            dims.push(length(x.dims[i], begin, end, strides[i], symbols)?);
        }
    }
    Ok(dims)
}

/// How many elements of a dimension lie from `begin` to `end`: `None` is where it begins or ends, `Some(None)` a bound
/// that is not known.
fn length(
    size: Dim,
    begin: Option<Option<i64>>,
    end: Option<Option<i64>>,
    stride: i64,
    symbols: &mut Symbols,
) -> Result<Dim> {
    if let (Some(Some(a)), Some(Some(b))) = (begin, end)
        && a >= 0
        && b >= 0
        && stride > 0
    {
        if b < a {
            return Err(Error::misuse(format!("from {a} to {b} in steps of {stride}")));
        }
        // So few are there whatever the size is.
        let n = (b - a).unsigned_abs().div_ceil(stride.unsigned_abs());
        if n <= 1 {
            return Ok(Dim::Known(n));
        }
    }
    if begin == Some(Some(-1)) && end.is_none() && stride > 0 {
        return Ok(Dim::Known(1));
    }
    let Dim::Known(n) = size else {
        let whole = begin.is_none() && end.is_none() && stride.abs() == 1;
        return Ok(if whole { size } else { symbols.fresh() });
    };
    if begin == Some(None) || end == Some(None) {
        return Ok(if n == 1 { size } else { symbols.fresh() });
    }
    let n = i128::from(n);
    let place = |at: i64| if at < 0 { (i128::from(at) + n).max(0) } else { i128::from(at).min(n) };
    let (first, last) = (begin.flatten().map(place), end.flatten().map(place));
    let (low, high) = match stride > 0 {
        true => (first.unwrap_or(0), last.unwrap_or(n)),
        false => (last.unwrap_or(-1), first.unwrap_or(n - 1).min(n - 1)),
    };
    let span = u64::try_from((high - low).max(0)).unwrap_or(u64::MAX);
    Ok(Dim::Known(span.div_ceil(stride.unsigned_abs())))
}

fn slice_by_index(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    let x = &call.get("x")?.ty;
    one(x.dtype, stretch(call, x, symbols)?)
}

fn slice_update(call: &Call<'_>, symbols: &mut Symbols) -> Result<Vec<Operand>> {
    call.same_dtype("x", "update")?;
    let (x, update) = (&call.get("x")?.ty, &call.get("update")?.ty);
    let dims = stretch(call, x, symbols)?;
    let fits = dims.len() == update.rank() && dims.iter().zip(&update.dims).all(|(a, b)| a.may_equal(*b));
    if !fits || update.rank() == 0 {
        let stretch = TensorType::new(x.dtype, dims);
        return Err(Error::misuse(format!("update is {update}, the stretch of {x} is {stretch}")));
    }
    one(x.dtype, x.dims.clone())
}

fn topk(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let x = &call.get("x")?.ty;
    let (axis, k) = (TensorType::axis(call.int("axis", -1)?, x.rank())?, call.int("k", 1)?);
    let mut dims = x.dims.clone();
    let k = u64::try_from(k).ok().filter(|k| *k > 0 && dims[axis].known().is_none_or(|n| *k <= n));
    let k = k.ok_or_else(|| Error::misuse(format!("k of {x} at axis {axis}")))?;
    if !matches!(call.text("output_indices_dtype")?, None | Some("int32")) {
        return Err(Error::unsupported("output_indices_dtype: int32 is known"));
    }
    dims[axis] = Dim::Known(k);
    let values = Operand::of(TensorType::new(x.dtype, dims.clone()));
    Ok(vec![values, Operand::of(TensorType::new(DataType::Int32, dims))])
}

fn scatter_along_axis(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    call.same_dtype("data", "updates")?;
    let (data, indices, updates) =
        (&call.get("data")?.ty, &call.get("indices")?.ty, &call.get("updates")?.ty);
    let axis = TensorType::axis(call.int("axis", 0)?, data.rank())?;
    let fits = |other: &TensorType| {
        other.rank() == data.rank()
            && other.dims.iter().zip(&data.dims).enumerate().all(|(i, (a, b))| i == axis || a.may_equal(*b))
    };
    let same = indices.dims.iter().zip(&updates.dims).all(|(a, b)| a.may_equal(*b));
    if !fits(indices) || !fits(updates) || !same {
        return Err(Error::misuse(format!(
            "{updates} cannot go to places {indices} of {data} along axis {axis}"
        )));
    }
    one(data.dtype, data.dims.clone())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{bools, float, int, ints, of, weight};
    use super::*;

    fn dims(found: Result<Vec<Operand>>) -> Vec<Dim> {
        found.unwrap()[0].ty.dims.clone()
    }

    /// Where `past` and `k` are: a length that shapes tell, and what remains of it.
    fn bounds(values: &[Int]) -> Operand {
        let ty = TensorType::fixed(DataType::Int32, &[values.len() as u64]);
        Operand { known: Some(Known::Ints(values.to_vec())), ..Operand::of(ty) }
    }

    #[test]
    fn stretches_of_a_cache() {
        let mut symbols = Symbols::default();
        let (k, n) = (symbols.fresh(), Dim::Known);
        let cache = float(&[n(2), n(1), n(2), n(64), n(16)]);
        let end = bounds(&[Int::Known(1), Int::Known(1), Int::Known(2), Int::Size(k), Int::Known(16)]);
        let (begin, one) = (ints(&[0; 5]), bools(&[true, false, false, false, false]));
        let (first, last) =
            (bools(&[false, true, true, true, true]), bools(&[false, true, true, false, true]));
        let read =
            [("x", &cache), ("begin", &begin), ("end", &end), ("begin_mask", &first), ("end_mask", &last)];
        let read = dims(of("slice_by_index", &[&read[..], &[("squeeze_mask", &one)]].concat(), &mut symbols));
        assert!(matches!(read[..], [Dim::Known(1), Dim::Known(2), Dim::Any(_), Dim::Known(16)]), "{read:?}");
        let begin = bounds(&[Int::Known(0), Int::Known(0), Int::Known(0), Int::Unknown, Int::Known(0)]);
        let update = float(&[n(1), n(1), n(2), k, n(16)]);
        let written = [("x", &cache), ("update", &update), ("begin", &begin), ("end", &end)];
        assert_eq!(dims(of("slice_update", &written, &mut symbols)), cache.ty.dims);
        let narrow = float(&[n(1), n(1), n(1), k, n(16)]);
        let written = [("x", &cache), ("update", &narrow), ("begin", &begin), ("end", &end)];
        let e = of("slice_update", &written, &mut symbols).unwrap_err();
        assert!(e.to_string().contains("update is fp16[1,1,1,"), "{e}");
    }

    /// Against numpy's rules, of which these are a part.
    #[test]
    fn lengths() {
        let mut symbols = Symbols::default();
        let q = symbols.fresh();
        let n = |n| Dim::Known(n);
        for (size, begin, end, stride, expected) in [
            (n(10), Some(2), Some(7), 2, 3),
            (n(10), None, Some(-1), 1, 9),
            (n(10), Some(-3), None, 1, 3),
            (n(10), None, None, -1, 10),
            (n(10), None, None, 3, 4),
            (n(10), Some(0), Some(100), 1, 10),
            (n(10), Some(8), Some(-5), 1, 0),
            (n(10), Some(-100), Some(4), 1, 4),
            (n(10), Some(7), Some(2), -2, 3),
            (n(0), None, None, 1, 0),
            (q, Some(5), Some(6), 1, 1),
            (q, Some(5), Some(5), 1, 0),
            (q, Some(-1), None, 1, 1),
        ] {
            let found = length(size, begin.map(Some), end.map(Some), stride, &mut symbols).unwrap();
            assert_eq!(found, n(expected), "{size} {begin:?} {end:?} {stride}");
        }
        assert_eq!(length(q, None, None, 1, &mut symbols).unwrap(), q);
        let other = length(q, None, Some(Some(-1)), 1, &mut symbols).unwrap();
        assert!(other.known().is_none() && other != q);
        assert!(length(n(4), Some(Some(3)), Some(Some(1)), 1, &mut symbols).is_err());
        assert_eq!(length(n(1), Some(None), Some(None), 1, &mut symbols).unwrap(), n(1));
    }

    #[test]
    fn positions_and_tables() {
        let mut symbols = Symbols::default();
        let (k, n) = (symbols.fresh(), Dim::Known);
        let k_len = Operand { ty: TensorType::fixed(DataType::Int32, &[]), ..bounds(&[Int::Size(k)]) };
        let past = Operand { ty: TensorType::fixed(DataType::Int32, &[]), ..bounds(&[Int::Unknown]) };
        let (zero, step) = (int(0), int(1));
        let keys = of("range_1d", &[("start", &zero), ("end", &k_len), ("step", &step)], &mut symbols);
        assert_eq!(dims(keys), [k]);
        let some =
            of("range_1d", &[("start", &past), ("end", &k_len), ("step", &step)], &mut symbols).unwrap();
        let positions = some[0].ty.dims[0];
        assert!(positions.known().is_none() && positions != k);
        let cos =
            of("gather", &[("x", &weight(&[64, 16])), ("indices", &some[0]), ("axis", &zero)], &mut symbols);
        assert_eq!(dims(cos), [positions, n(16)]);
        for (start, end, step, count) in
            [(0, 10, 3, 4), (5, 5, 1, 0), (5, 0, -2, 3), (3, 1, 1, 0), (-4, 4, 4, 2)]
        {
            let (start, end, step) = (int(start), int(end), int(step));
            let found = of("range_1d", &[("start", &start), ("end", &end), ("step", &step)], &mut symbols);
            assert_eq!(dims(found), [n(count)]);
        }
    }

    #[test]
    fn experts_that_are_chosen() {
        let mut symbols = Symbols::default();
        let (q, n) = (symbols.fresh(), Dim::Known);
        let scores = float(&[q, n(32)]);
        let chosen = of("topk", &[("x", &scores), ("k", &int(4)), ("axis", &int(-1))], &mut symbols).unwrap();
        assert_eq!((chosen[0].ty.dims.clone(), chosen[1].ty.dtype), (vec![q, n(4)], DataType::Int32));
        let gates = [("data", &scores), ("indices", &chosen[1]), ("updates", &chosen[0]), ("axis", &int(-1))];
        assert_eq!(dims(of("scatter_along_axis", &gates, &mut symbols)), scores.ty.dims);
        let e = of("topk", &[("x", &scores), ("k", &int(33))], &mut symbols).unwrap_err();
        assert!(e.to_string().contains("k of fp16"), "{e}");
    }
}
