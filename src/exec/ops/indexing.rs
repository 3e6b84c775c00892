//! Operations that take elements by their places, or put them there.

use std::sync::Arc;

use super::super::call::{Call, Operand, same_dtype};
use super::super::strided::{Dim, put, strides};
use super::super::tensor::{Data, Tensor, zeros};
use super::super::weight::{Weight, is_float};
use super::shape::{of_each, taken};
use super::{Operator, moved, one};
use crate::error::{Error, Result};

pub(super) const OPERATORS: &[Operator] = &[
    moved("gather", &["x", "indices", "axis", "batch_dims", "validate_indices"], gather),
    moved("range_1d", &["end", "start", "step"], range),
    moved(
        "slice_by_index",
        &["x", "begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask"],
        slice_by_index,
    ),
    moved(
        "slice_update",
        &["x", "update", "begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask"],
        slice_update,
    ),
    moved("topk", &["x", "k", "axis", "ascending", "sort", "return_indices", "output_indices_dtype"], topk),
    moved(
        "scatter_along_axis",
        &["data", "indices", "updates", "axis", "mode", "validate_indices"],
        scatter_along_axis,
    ),
];

/// Most integers of a range.
const MOST_STEPS: i64 = 1 << 24;

/// Places below 0 and beyond the end are refused: since iOS 17, what Core ML gives there is not defined.
fn gather(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (x, indices) = (call.operand("x")?, call.tensor("indices")?);
    let axis = call.axis("axis", 0, x.shape().len())?;
    let batch = usize::try_from(call.int("batch_dims", 0)?).unwrap_or(usize::MAX);
    let Data::Ints(places) = &indices.data else {
        return Err(Error::malformed(format!("indices is {}, integers were expected", indices.described())));
    };
    let of = x.shape();
    if batch > axis || batch > indices.shape.len() || of[..batch] != indices.shape[..batch] {
        let found = indices.described();
        return Err(Error::malformed(format!("{batch} dimensions of batches, of {of:?} by {found}")));
    }
    let size = of[axis];
    if let Some(place) = places.iter().find(|i| usize::try_from(**i).map_or(true, |i| i >= size)) {
        return Err(Error::malformed(format!("index {place} of {size}")).hint(
            "an index is from 0 to the size of the axis: tokens of the vocabulary, positions of the context",
        ));
    }
    let shape = [&of[..axis], &indices.shape[batch..], &of[axis + 1..]].concat();
    let n = call.result(&shape)?;
    let inner: usize = of[axis + 1..].iter().product();
    let x = match x {
        Operand::Weight(weight) if axis == 0 && is_float(weight.dtype) => {
            call.work(weight.work(places.len(), inner))?;
            return one(rows(&weight, places, inner, shape, n)?);
        }
        other => call.decoded(other)?,
    };
    let batches: usize = x.shape[..batch].iter().product();
    let middle: usize = x.shape[batch..axis].iter().product();
    let per_batch = places.len().checked_div(batches).unwrap_or(0);
    let data = of_each!(&x.data, values => {
        let mut out = Vec::with_capacity(n);
        // Nothing is made of any number of rows that hold nothing.
        for outer in 0..if n > 0 { batches * middle } else { 0 } {
            for place in &places[outer / middle * per_batch..][..per_batch] {
                out.extend_from_slice(&values[(outer * size + *place as usize) * inner..][..inner]);
            }
        }
        out
    });
    one(Tensor { dtype: x.dtype, shape, data })
}

/// Rows of a weight, decoded as they are needed.
fn rows(weight: &Weight, places: &[i32], inner: usize, shape: Vec<usize>, n: usize) -> Result<Tensor> {
    let mut values = zeros(n)?;
    if inner > 0 {
        for (row, place) in values.chunks_mut(inner).zip(places) {
            weight.read(*place as usize * inner, row)?;
        }
    }
    Ok(Tensor::of_floats(weight.dtype, shape, values))
}

fn range(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let mut bound = |name: &str| match call.ints(name)?.as_deref() {
        Some([one]) => Ok(*one),
        _ => Err(Error::malformed(format!("{name}: an integer was expected"))),
    };
    let (start, end, step) = (bound("start")?, bound("end")?, bound("step")?);
    if step == 0 {
        return Err(Error::malformed("step is 0"));
    }
    let n = ((end - start + step - step.signum()) / step).max(0);
    if n > MOST_STEPS {
        return Err(Error::limit(format!(
            "from {start} to {end} by {step}: more than {MOST_STEPS} integers"
        )));
    }
    call.result(&[n as usize])?;
    let values: Vec<i32> = (0..n).map(|i| (start + i * step) as i32).collect();
    one(Tensor::of_ints(vec![values.len()], values))
}

/// A part of a tensor: where it begins, its dimensions, and its shape without those that are squeezed.
struct Stretch {
    base: isize,
    dims: Vec<Dim>,
    shape: Vec<usize>,
}

/// As in numpy: places below 0 count from the end, those beyond are cut.
fn stretch(call: &mut Call<'_>, x: &Tensor) -> Result<Stretch> {
    let rank = x.shape.len();
    let (begin, end) = (call.some_ints("begin")?, call.some_ints("end")?);
    let stride = call.ints("stride")?.unwrap_or_else(|| vec![1; rank]);
    if begin.len() != rank || end.len() != rank || stride.len() != rank || stride.contains(&0) {
        return Err(Error::malformed(format!(
            "begin {begin:?}, end {end:?} and stride {stride:?} of {}",
            x.described()
        )));
    }
    let (from_first, to_last) = (call.mask("begin_mask", rank)?, call.mask("end_mask", rank)?);
    let squeezed = call.mask("squeeze_mask", rank)?;
    let own = strides(&x.shape);
    let mut stretch = Stretch { base: 0, dims: Vec::with_capacity(rank), shape: Vec::with_capacity(rank) };
    for i in 0..rank {
        let size = x.shape[i] as i64;
        let place = |at: i64| if at < 0 { at + size } else { at };
        let step = stride[i];
        let (first, n) = if squeezed[i] {
            let first = place(begin[i]);
            if !(0..size).contains(&first) {
                return Err(Error::malformed(format!(
                    "begin {} in dimension {i} of {}",
                    begin[i],
                    x.described()
                )));
            }
            (first, 1)
        } else {
            // Going up, from 0 to the size; going down, from the last to before the first.
            let (low, high) = if step > 0 { (0, size) } else { (-1, size - 1) };
            let (whole_first, whole_last) = if step > 0 { (low, high) } else { (high, low) };
            let first = if from_first[i] { whole_first } else { place(begin[i]).clamp(low, high) };
            let last = if to_last[i] { whole_last } else { place(end[i]).clamp(low, high) };
            (first, ((last - first + step - step.signum()) / step).max(0))
        };
        let n = n as usize;
        if n > 0 {
            stretch.base += first as isize * own[i];
        }
        stretch.dims.push((n, own[i] * if n > 1 { step as isize } else { 1 }));
        if !squeezed[i] {
            stretch.shape.push(n);
        }
    }
    Ok(stretch)
}

fn slice_by_index(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let x = call.tensor("x")?;
    let Stretch { base, dims, shape } = stretch(call, &x)?;
    one(taken(call, &x, shape, base, &dims)?)
}

/// In place, where nobody else has `x`.
fn slice_update(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (mut x, update) = (call.tensor("x")?, call.tensor("update")?);
    same_dtype(&x, &update)?;
    let Stretch { base, dims, shape } = stretch(call, &x)?;
    if shape != update.shape {
        return Err(Error::malformed(format!(
            "update is {}, the part of {} that it replaces has shape {shape:?}",
            update.described(),
            x.described()
        )));
    }
    match (&mut x.data, &update.data) {
        (Data::Floats(x), Data::Floats(values)) => put(values, &mut call.own(x)?[..], base, &dims),
        (Data::Ints(x), Data::Ints(values)) => put(values, &mut call.own(x)?[..], base, &dims),
        (Data::Bools(x), Data::Bools(values)) => put(values, &mut call.own(x)?[..], base, &dims),
        _ => return Err(Error::malformed("a text is no tensor of elements")),
    }
    one(x)
}

/// The `k` largest, or smallest, in order; of equal ones the first. NaN comes last.
fn topk(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (x, values) = call.floats("x")?;
    let axis = call.axis("axis", -1, x.shape.len())?;
    let (size, inner) = (x.shape[axis], x.shape[axis + 1..].iter().product::<usize>());
    let k = usize::try_from(call.int("k", 1)?).ok().filter(|k| (1..=size).contains(k));
    let k = k.ok_or_else(|| Error::malformed(format!("k of {} at axis {axis}", x.described())))?;
    let ascending = call.is("ascending", false)?;
    if !call.is("return_indices", true)? || call.text("output_indices_dtype")?.is_some_and(|t| &*t != "int32")
    {
        return Err(Error::unsupported("topk: indices of type int32 are known, and no others"));
    }
    let mut shape = x.shape.clone();
    shape[axis] = k;
    let n = call.result(&shape)?;
    call.elements(&shape)?;
    // Places in order, and what sorting them takes: 8 bytes each.
    call.reserve(size.saturating_mul(4))?;
    call.work(x.len().saturating_mul(4 * (size.ilog2() as usize + 1)))?; // one or more, as k is
    let (mut chosen, mut places) = (vec![0.0; n], vec![0; n]);
    for outer in 0..n / (k * inner).max(1) {
        for i in 0..inner {
            let at = |j: usize| values[(outer * size + j) * inner + i];
            let mut order: Vec<usize> = (0..size).collect();
            order.sort_by(|a, b| {
                let (a, b) = if ascending { (at(*a), at(*b)) } else { (at(*b), at(*a)) };
                a.partial_cmp(&b).unwrap_or_else(|| match ascending {
                    true => a.is_nan().cmp(&b.is_nan()),
                    false => b.is_nan().cmp(&a.is_nan()),
                })
            });
            for (r, j) in order.into_iter().take(k).enumerate() {
                let to = (outer * k + r) * inner + i;
                (chosen[to], places[to]) = (at(j), j as i32);
            }
        }
    }
    let values = Tensor::of_floats(x.dtype, shape.clone(), chosen);
    Ok(vec![values, Tensor::of_ints(shape, places)])
}

fn scatter_along_axis(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (mut data, indices, updates) =
        (call.tensor("data")?, call.tensor("indices")?, call.tensor("updates")?);
    same_dtype(&data, &updates)?;
    let axis = call.axis("axis", 0, data.shape.len())?;
    match call.text("mode")?.as_deref() {
        Some("update") => {}
        other => {
            let other = other.unwrap_or("add");
            return Err(Error::unsupported(format!("mode {other:?}: \"update\" is known, and no others")));
        }
    }
    let fits = indices.shape == updates.shape
        && indices.shape.len() == data.shape.len()
        && indices.shape.iter().zip(&data.shape).enumerate().all(|(i, (a, b))| i == axis || a == b);
    if !fits {
        return Err(Error::malformed(format!(
            "{} cannot go to places {} of {} along axis {axis}",
            updates.described(),
            indices.described(),
            data.described()
        )));
    }
    let Data::Ints(places) = &indices.data else {
        return Err(Error::malformed(format!("indices is {}, integers were expected", indices.described())));
    };
    let (size, count) = (data.shape[axis], indices.shape[axis]);
    if let Some(place) = places.iter().find(|i| usize::try_from(**i).map_or(true, |i| i >= size)) {
        return Err(Error::malformed(format!("index {place} of {size}")));
    }
    let inner: usize = data.shape[axis + 1..].iter().product();
    fn scatter<T: Copy>(
        data: &mut [T],
        updates: &[T],
        places: &[i32],
        (size, count, inner): (usize, usize, usize),
    ) {
        for (k, (value, place)) in updates.iter().zip(places).enumerate() {
            let (outer, i) = (k / (count * inner), k % inner);
            data[(outer * size + *place as usize) * inner + i] = *value;
        }
    }
    let sizes = (size, count, inner);
    match (&mut data.data, &updates.data) {
        (Data::Floats(to), Data::Floats(values)) => scatter(&mut call.own(to)?[..], values, places, sizes),
        (Data::Ints(to), Data::Ints(values)) => scatter(&mut call.own(to)?[..], values, places, sizes),
        _ => return Err(Error::malformed(format!("data is {}, numbers were expected", data.described()))),
    }
    one(data)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{bools, floats, int, ints, of, refused, run, text, truth};
    use super::*;

    fn count(shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        floats(shape, &(0..n).map(|i| i as f32).collect::<Vec<_>>())
    }

    #[test]
    fn rows_by_index() {
        let x = count(&[3, 2]);
        let (shape, values) = of("gather", &[("x", x.clone()), ("indices", ints(&[2, 0]))]);
        assert_eq!((shape, values), (vec![2, 2], vec![4.0, 5.0, 0.0, 1.0]));
        let column = [("x", x.clone()), ("indices", int(1)), ("axis", int(-1))];
        assert_eq!(of("gather", &column), (vec![3], vec![1.0, 3.0, 5.0]));
        let indices = Tensor::ints(&[2, 1], vec![2, 0]).unwrap();
        let batched = [("x", count(&[2, 3])), ("indices", indices), ("axis", int(1)), ("batch_dims", int(1))];
        assert_eq!(of("gather", &batched), (vec![2, 1], vec![2.0, 3.0]));
        for index in [-1, 3] {
            refused(
                "gather",
                &[("x", x.clone()), ("indices", ints(&[0, index]))],
                &format!("index {index} of 3"),
            );
        }
        refused("gather", &[("x", x.clone()), ("indices", x.clone())], "integers were expected");
        refused(
            "gather",
            &[("x", x), ("indices", ints(&[0])), ("batch_dims", int(2))],
            "2 dimensions of batches",
        );
    }

    #[test]
    fn ranges() {
        let range = |start, end, step| {
            run("range_1d", &[("start", int(start)), ("end", int(end)), ("step", int(step))])
        };
        for (start, end, step, wanted) in [
            (0, 3, 1, &[0, 1, 2][..]),
            (0, 10, 3, &[0, 3, 6, 9]),
            (5, 0, -2, &[5, 3, 1]),
            (3, 1, 1, &[]),
            (-4, 4, 4, &[-4, 0]),
            (2, 2, 1, &[]),
        ] {
            assert_eq!(
                range(start, end, step).unwrap()[0].as_ints().unwrap(),
                wanted,
                "{start} {end} {step}"
            );
        }
        assert!(range(0, 1, 0).unwrap_err().to_string().contains("step is 0"));
        assert!(range(i32::MIN, i32::MAX, 1).unwrap_err().to_string().contains("more than 16777216"));
    }

    /// Against numpy's slices of `arange(10)`.
    #[test]
    fn slices() {
        let slice = |begin: i32, end: i32, stride: i32, masks: [bool; 3]| {
            let [b, e, s] = masks.map(|m| bools(&[m]));
            let inputs = [
                ("x", count(&[10])),
                ("begin", ints(&[begin])),
                ("end", ints(&[end])),
                ("stride", ints(&[stride])),
                ("begin_mask", b),
                ("end_mask", e),
                ("squeeze_mask", s),
            ];
            of("slice_by_index", &inputs)
        };
        let none = [false; 3];
        for (begin, end, stride, masks, wanted) in [
            (2, 7, 2, none, &[2.0, 4.0, 6.0][..]),
            (-3, 100, 1, none, &[7.0, 8.0, 9.0]),
            (0, -8, 1, none, &[0.0, 1.0]),
            (8, -5, 1, none, &[]),
            (-100, 2, 1, none, &[0.0, 1.0]),
            (7, 2, -2, none, &[7.0, 5.0, 3.0]),
            (7, 99, -3, [true, false, false], &[]),
            (0, 4, -3, [true, false, false], &[9.0, 6.0]),
            (2, 0, -1, [false, true, false], &[2.0, 1.0, 0.0]),
            (0, 0, 4, [true, true, false], &[0.0, 4.0, 8.0]),
        ] {
            let wanted = (vec![wanted.len()], wanted.to_vec());
            assert_eq!(slice(begin, end, stride, masks), wanted, "{begin} {end} {stride} {masks:?}");
        }
        assert_eq!(slice(-2, 0, 1, [false, false, true]), (vec![], vec![8.0]), "end is of no use");
        let part = [("x", count(&[2, 3])), ("begin", ints(&[1, 1])), ("end", ints(&[2, 3]))];
        assert_eq!(of("slice_by_index", &part), (vec![1, 2], vec![4.0, 5.0]));
        let beyond = [
            ("x", count(&[2])),
            ("begin", ints(&[2])),
            ("end", ints(&[0])),
            ("squeeze_mask", bools(&[true])),
        ];
        refused("slice_by_index", &beyond, "begin 2 in dimension 0");
        let no_step =
            [("x", count(&[2])), ("begin", ints(&[0])), ("end", ints(&[1])), ("stride", ints(&[0]))];
        refused("slice_by_index", &no_step, "stride [0]");
        refused(
            "slice_by_index",
            &[("x", count(&[2])), ("begin", ints(&[])), ("end", ints(&[1]))],
            "begin []",
        );
    }

    #[test]
    fn what_is_written_over() {
        let update = |update: Tensor| {
            let (begin, end) = (ints(&[0, 1]), ints(&[2, 3]));
            [("x", count(&[2, 3])), ("update", update), ("begin", begin), ("end", end)]
        };
        let (shape, values) = of("slice_update", &update(floats(&[2, 2], &[9.0, 8.0, 7.0, 6.0])));
        assert_eq!((shape, values), (vec![2, 3], vec![0.0, 9.0, 8.0, 3.0, 7.0, 6.0]));
        refused(
            "slice_update",
            &update(floats(&[1, 2], &[0.0; 2])),
            "update is fp32[1,2], the part of fp32[2,3]",
        );
        let row = floats(&[2], &[-1.0, -2.0]);
        let stepped = [
            ("x", count(&[2, 3])),
            ("update", row),
            ("begin", ints(&[1, 0])),
            ("end", ints(&[0, 3])),
            ("stride", ints(&[1, 2])),
            ("squeeze_mask", bools(&[true, false])),
        ];
        assert_eq!(of("slice_update", &stepped).1, [0.0, 1.0, 2.0, -1.0, 4.0, -2.0]);
    }

    #[test]
    fn the_largest() {
        let x = floats(&[2, 4], &[3.0, 7.0, 7.0, 1.0, f32::NAN, -1.0, -2.0, -3.0]);
        let top = |k: i32, ascending: bool| {
            run(
                "topk",
                &[("x", x.clone()), ("k", int(k)), ("axis", int(-1)), ("ascending", truth(ascending))],
            )
        };
        let found = top(2, false).unwrap();
        assert_eq!(found[0].as_floats().unwrap(), [7.0, 7.0, -1.0, -2.0]);
        assert_eq!(found[1], Tensor::ints(&[2, 2], vec![1, 2, 1, 2]).unwrap());
        assert_eq!(top(3, true).unwrap()[1].as_ints().unwrap(), [3, 0, 1, 3, 2, 1]);
        let first = run("topk", &[("x", x.clone()), ("axis", int(0))]).unwrap();
        assert_eq!(first[1].as_ints().unwrap(), [0, 0, 0, 0]);
        for k in [0, 5, -1] {
            assert!(top(k, false).unwrap_err().to_string().contains("k of fp32[2,4] at axis 1"));
        }
    }

    #[test]
    fn what_is_scattered() {
        let scatter = |places: Vec<i32>, mode: &str| {
            let indices = Tensor::ints(&[2, 2], places).unwrap();
            let updates = floats(&[2, 2], &[9.0, 8.0, 7.0, 6.0]);
            let inputs = [
                ("data", count(&[2, 3])),
                ("indices", indices),
                ("updates", updates),
                ("axis", int(1)),
                ("mode", text(mode)),
            ];
            run("scatter_along_axis", &inputs)
        };
        let found = scatter(vec![2, 0, 1, 2], "update").unwrap();
        assert_eq!(found[0].as_floats().unwrap(), [8.0, 1.0, 9.0, 3.0, 7.0, 6.0]);
        assert!(scatter(vec![0, 1, 2, 3], "update").unwrap_err().to_string().contains("index 3 of 3"));
        assert!(scatter(vec![0; 4], "add").unwrap_err().to_string().contains("mode \"add\""));
    }
}
