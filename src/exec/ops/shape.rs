//! Operations that change shapes, put tensors together and take them apart.

use std::sync::Arc;

use super::super::call::{Call, axis};
use super::super::strided::{Dim, strides, take};
use super::super::tensor::{Data, Tensor, elements};
use super::{Operator, moved, one};
use crate::error::{Error, Result};

pub(super) const OPERATORS: &[Operator] = &[
    moved("shape", &["x"], shape),
    moved("reshape", &["x", "shape"], reshape),
    moved("transpose", &["x", "perm"], transpose),
    moved("expand_dims", &["x", "axes"], expand_dims),
    moved("squeeze", &["x", "axes"], squeeze),
    moved("tile", &["x", "reps"], tile),
    moved("concat", &["values", "axis", "interleave"], concat),
    moved("split", &["x", "num_splits", "split_sizes", "axis"], split),
];

/// The same of each kind of elements.
macro_rules! of_each {
    ($data:expr, $values:ident => $new:expr) => {
        match $data {
            Data::Floats($values) => Data::Floats(Arc::new($new)),
            Data::Ints($values) => Data::Ints(Arc::new($new)),
            Data::Bools($values) => Data::Bools(Arc::new($new)),
            Data::Text(_) => return Err(Error::malformed("a text is no tensor of elements")),
        }
    };
}
pub(super) use of_each;

/// The elements at these places of a tensor, which are within it, as a tensor of this shape.
pub(super) fn taken(
    call: &mut Call<'_>,
    x: &Tensor,
    shape: Vec<usize>,
    base: isize,
    dims: &[Dim],
) -> Result<Tensor> {
    call.elements(&shape)?;
    let data = of_each!(&x.data, values => take(values, base, dims));
    Ok(Tensor { dtype: x.dtype, shape, data })
}

fn shape(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let x = call.operand("x")?;
    let sizes: Vec<i32> = x.shape().iter().map(|n| i32::try_from(*n).unwrap_or(i32::MAX)).collect();
    one(Tensor::of_ints(vec![sizes.len()], sizes))
}

/// One size may be -1, the rest of the elements. A size of 0 is refused: Core ML takes it for the size that is there,
/// coremltools for none.
fn reshape(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (mut x, sizes) = (call.tensor("x")?, call.some_ints("shape")?);
    let wrong = || Error::malformed(format!("{} does not become {sizes:?}", x.described()));
    let mut shape = Vec::with_capacity(sizes.len());
    let mut rest = None;
    for (i, size) in sizes.iter().enumerate() {
        shape.push(match usize::try_from(*size) {
            Ok(n @ 1..) => n,
            Err(_) if *size == -1 && rest.is_none() => {
                rest = Some(i);
                1
            }
            _ => return Err(wrong()),
        });
    }
    let n = elements(&shape)?; // takes no memory
    match rest {
        Some(i) if x.len().is_multiple_of(n) => shape[i] = x.len() / n,
        None if x.len() == n => {}
        _ => return Err(wrong()),
    }
    x.shape = shape;
    one(x)
}

fn transpose(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let x = call.tensor("x")?;
    let perm = call.axes("perm", x.shape.len())?.unwrap_or_default();
    if perm.len() != x.shape.len() {
        return Err(Error::malformed(format!("perm has {} axes, x is {}", perm.len(), x.described())));
    }
    one(transposed(call, &x, &perm)?)
}

/// With its dimensions in this order.
pub(super) fn transposed(call: &mut Call<'_>, x: &Tensor, perm: &[usize]) -> Result<Tensor> {
    let own = strides(&x.shape);
    let dims: Vec<Dim> = perm.iter().map(|i| (x.shape[*i], own[*i])).collect();
    taken(call, x, dims.iter().map(|(n, _)| *n).collect(), 0, &dims)
}

fn expand_dims(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (mut x, given) = (call.tensor("x")?, call.some_ints("axes")?);
    let rank = x.shape.len() + given.len();
    elements(&vec![1; rank])?;
    let axes: Vec<usize> = given.iter().map(|a| axis(*a, rank)).collect::<Result<_>>()?;
    let mut own = x.shape.iter().copied();
    let at = |i: usize| if axes.contains(&i) { Some(1) } else { own.next() };
    let shape: Option<Vec<usize>> = (0..rank).map(at).collect();
    x.shape = shape.ok_or_else(|| Error::malformed(format!("axes {given:?}: one comes twice")))?;
    one(x)
}

fn squeeze(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let mut x = call.tensor("x")?;
    let axes = call.axes("axes", x.shape.len())?;
    let axes = axes.unwrap_or_else(|| (0..x.shape.len()).filter(|i| x.shape[*i] == 1).collect());
    if let Some(i) = axes.iter().find(|i| x.shape[**i] != 1) {
        return Err(Error::malformed(format!("axis {i} of {} is not 1", x.described())));
    }
    x.shape = (0..x.shape.len()).filter(|i| !axes.contains(i)).map(|i| x.shape[i]).collect();
    one(x)
}

fn tile(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (x, reps) = (call.tensor("x")?, call.some_ints("reps")?);
    let reps: Option<Vec<usize>> = reps.iter().map(|n| usize::try_from(*n).ok().filter(|n| *n > 0)).collect();
    let reps = reps.filter(|reps| reps.len() == x.shape.len());
    let reps = reps.ok_or_else(|| {
        Error::malformed(format!("reps: one or more for each dimension of {}", x.described()))
    })?;
    let shape: Vec<usize> = x.shape.iter().zip(&reps).map(|(n, times)| n.saturating_mul(*times)).collect();
    call.declared.map_or(Ok(()), |declared| declared.check(declared.dtype, &shape))?;
    let own = x.shape.iter().copied().zip(strides(&x.shape));
    let dims: Vec<Dim> = own.zip(reps).flat_map(|(dim, times)| [(times, 0), dim]).collect();
    one(taken(call, &x, shape, 0, &dims)?)
}

fn concat(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let values = call.all("values");
    let Some(first) = values.first() else { return Err(Error::malformed("values is missing")) };
    if call.is("interleave", false)? {
        return Err(Error::unsupported("interleave: elements that alternate are not computed"));
    }
    let at = call.axis("axis", 0, first.shape().len())?;
    let (mut shape, mut size, dtype) = (first.shape().to_vec(), 0usize, first.dtype());
    for value in &values {
        let mut own = value.shape().to_vec();
        if own.len() == shape.len() {
            own[at] = shape[at];
        }
        if own != shape || value.dtype() != dtype {
            let (a, b) = (first.described(), value.described());
            return Err(Error::malformed(format!("{a} and {b} cannot be joined at axis {at}")));
        }
        size = size.saturating_add(value.shape()[at]);
    }
    shape[at] = size;
    let n = call.result(&shape)?;
    // Nothing is made of any number of rows that hold nothing.
    let outer: usize = if n > 0 { shape[..at].iter().product() } else { 0 };
    call.work(outer.saturating_mul(values.len()))?;
    let values: Vec<Tensor> = values.into_iter().map(|v| call.decoded(v)).collect::<Result<_>>()?;
    let Some(first) = values.first() else { return Err(Error::malformed("values is missing")) };
    fn joined<T: Copy>(parts: &[&[T]], outer: usize) -> Vec<T> {
        let mut out = Vec::with_capacity(parts.iter().map(|p| p.len()).sum());
        for i in 0..outer {
            for part in parts {
                let inner = part.len() / outer;
                out.extend_from_slice(&part[i * inner..][..inner]);
            }
        }
        out
    }
    macro_rules! all {
        ($kind:ident) => {{
            let parts = values.iter().map(|v| match &v.data {
                Data::$kind(values) => Some(&values[..]),
                _ => None,
            });
            let parts: Option<Vec<_>> = parts.collect();
            parts.map(|parts| Data::$kind(Arc::new(joined(&parts, outer))))
        }};
    }
    let data = match &first.data {
        Data::Floats(_) => all!(Floats),
        Data::Ints(_) => all!(Ints),
        Data::Bools(_) => all!(Bools),
        Data::Text(_) => None,
    };
    let data = data.ok_or_else(|| Error::malformed(format!("{} cannot be joined", first.described())))?;
    one(Tensor { dtype: first.dtype, shape, data })
}

fn split(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let x = call.tensor("x")?;
    let at = call.axis("axis", 0, x.shape.len())?;
    let (sizes, parts) = (call.ints("split_sizes")?, call.int("num_splits", 0)?);
    let size = x.shape[at];
    let wrong = |what: String| Error::malformed(format!("{} at axis {at}: {what}", x.described()));
    let sizes: Vec<usize> = match (sizes, usize::try_from(parts)) {
        (Some(sizes), Ok(n)) if n == 0 || n == sizes.len() => {
            let known: Option<Vec<usize>> = sizes.iter().map(|n| usize::try_from(*n).ok()).collect();
            let sum = |sizes: &Vec<usize>| sizes.iter().try_fold(0usize, |s, n| s.checked_add(*n));
            known.filter(|k| sum(k) == Some(size)).ok_or_else(|| wrong(format!("parts {sizes:?}")))?
        }
        (None, Ok(n @ 1..)) if size.is_multiple_of(n) && n <= call.results => vec![size / n; n],
        _ => return Err(wrong(format!("{parts} parts do not go into it"))),
    };
    let own = strides(&x.shape);
    let mut begin = 0;
    let mut part = |size: usize| {
        let mut shape = x.shape.clone();
        shape[at] = size;
        let dims: Vec<Dim> = shape.iter().copied().zip(own.iter().copied()).collect();
        let base = begin as isize * own[at];
        begin += size;
        taken(call, &x, shape, base, &dims)
    };
    sizes.into_iter().map(&mut part).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{bools, floats, int, ints, of, refused, run, text, truth};
    use super::*;

    fn six() -> Tensor {
        floats(&[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    }

    #[test]
    fn shapes() {
        let found = run("shape", &[("x", six())]).unwrap();
        assert_eq!(found[0], ints(&[2, 3]));
        let shape = |sizes: &[i32]| of("reshape", &[("x", six()), ("shape", ints(sizes))]).0;
        assert_eq!((shape(&[3, 2]), shape(&[1, -1, 1]), shape(&[-1])), (vec![3, 2], vec![1, 6, 1], vec![6]));
        for sizes in [&[4, -1][..], &[0, 6], &[-1, -1], &[5], &[-2, 3], &[i32::MAX, i32::MAX, -1]] {
            let words = if sizes.len() == 3 { "more than" } else { "does not become" };
            refused("reshape", &[("x", six()), ("shape", ints(sizes))], words);
        }
        let expand = |axes: &[i32]| of("expand_dims", &[("x", six()), ("axes", ints(axes))]).0;
        assert_eq!((expand(&[0]), expand(&[-1, 1])), (vec![1, 2, 3], vec![2, 1, 3, 1]));
        refused("expand_dims", &[("x", six()), ("axes", ints(&[0, 0]))], "one comes twice");
        refused("expand_dims", &[("x", six()), ("axes", ints(&[3]))], "axis 3 of 3");
        let ones = floats(&[1, 2, 1], &[0.0, 1.0]);
        assert_eq!(of("squeeze", &[("x", ones.clone())]).0, [2]);
        assert_eq!(of("squeeze", &[("x", ones.clone()), ("axes", ints(&[-1]))]).0, [1, 2]);
        refused("squeeze", &[("x", ones), ("axes", ints(&[1]))], "axis 1 of fp32[1,2,1] is not 1");
    }

    #[test]
    fn orders() {
        let (shape, values) = of("transpose", &[("x", six()), ("perm", ints(&[1, 0]))]);
        assert_eq!((shape, values), (vec![3, 2], vec![0.0, 3.0, 1.0, 4.0, 2.0, 5.0]));
        let all: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let x = floats(&[2, 3, 4], &all);
        let (shape, values) = of("transpose", &[("x", x), ("perm", ints(&[2, -3, 1]))]);
        let wanted: Vec<f32> = (0..4)
            .flat_map(|c| (0..2).flat_map(move |a| (0..3).map(move |b| (a * 12 + b * 4 + c) as f32)))
            .collect();
        assert_eq!((shape, values), (vec![4, 2, 3], wanted));
        refused("transpose", &[("x", six()), ("perm", ints(&[0]))], "perm has 1 axes");
        refused("transpose", &[("x", six()), ("perm", ints(&[0, 0]))], "axis 0 twice");
        let (shape, values) = of("tile", &[("x", six()), ("reps", ints(&[1, 2]))]);
        let wanted = vec![0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 3.0, 4.0, 5.0];
        assert_eq!((shape, values), (vec![2, 6], wanted));
        assert_eq!(of("tile", &[("x", six()), ("reps", ints(&[2, 1]))]).0, [4, 3]);
        refused("tile", &[("x", six()), ("reps", ints(&[0, 1]))], "one or more");
        refused("tile", &[("x", six()), ("reps", ints(&[i32::MAX, i32::MAX]))], "more than");
    }

    #[test]
    fn parts() {
        let two = floats(&[2, 1], &[8.0, 9.0]);
        let both = [("values", six()), ("values", two), ("axis", int(-1)), ("interleave", truth(false))];
        let (shape, values) = of("concat", &both);
        assert_eq!((shape, values), (vec![2, 4], vec![0.0, 1.0, 2.0, 8.0, 3.0, 4.0, 5.0, 9.0]));
        let joined =
            run("concat", &[("values", ints(&[1])), ("values", ints(&[2, 3])), ("axis", int(0))]).unwrap();
        assert_eq!(joined[0], ints(&[1, 2, 3]));
        let joined =
            run("concat", &[("values", bools(&[true])), ("values", bools(&[])), ("axis", int(0))]).unwrap();
        assert_eq!(joined[0], bools(&[true]));
        refused(
            "concat",
            &[("values", six()), ("values", ints(&[1])), ("axis", int(0))],
            "cannot be joined at axis 0",
        );
        refused("concat", &[("values", text("a")), ("axis", int(0))], "axis 0 of 0");
        let mixed = [("values", six()), ("axis", int(0)), ("interleave", truth(true))];
        refused("concat", &mixed, "interleave");
        let sizes = [("x", six()), ("split_sizes", ints(&[2, 1])), ("axis", int(1))];
        let found = run("split", &sizes).unwrap();
        assert_eq!(found, [floats(&[2, 2], &[0.0, 1.0, 3.0, 4.0]), floats(&[2, 1], &[2.0, 5.0])]);
        refused("split", &[("x", six()), ("split_sizes", ints(&[2, 2])), ("axis", int(1))], "parts [2, 2]");
        refused(
            "split",
            &[("x", six()), ("num_splits", int(2)), ("axis", int(1))],
            "2 parts do not go into it",
        );
    }
}
