//! Operations along axes: sums, norms.

use rayon::prelude::*;

use super::super::call::{Call, floats};
use super::super::tensor::{Data, Tensor};
use super::shape::transposed;
use super::{Operator, computed, one};
use crate::error::{Error, Result};

const REDUCED: &[&str] = &["x", "axes", "keep_dims"];

pub(super) const OPERATORS: &[Operator] = &[
    computed("reduce_mean", REDUCED, |call| reduce(call, |row| sum(row) / row.len() as f64)),
    computed("reduce_sum", REDUCED, |call| reduce(call, sum)),
    computed("reduce_sum_square", REDUCED, |call| {
        reduce(call, |row| row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum())
    }),
    computed("reduce_max", REDUCED, |call| reduce(call, |row| f64::from(max(row)))),
    computed("reduce_min", REDUCED, |call| {
        reduce(call, |row| {
            row.iter().fold(f64::INFINITY, |m, v| if f64::from(*v) > m { m } else { (*v).into() })
        })
    }),
    computed("softmax", &["x", "axis"], softmax),
    computed("layer_norm", &["x", "axes", "gamma", "beta", "epsilon"], layer_norm),
];

fn sum(row: &[f32]) -> f64 {
    row.iter().map(|v| f64::from(*v)).sum()
}

/// The largest, NaN where one is.
fn max(row: &[f32]) -> f32 {
    row.iter().fold(f32::NEG_INFINITY, |m, v| if *v < m { m } else { *v })
}

/// With these axes last, in their order.
fn last(call: &mut Call<'_>, x: &Tensor, axes: &[usize]) -> Result<(Tensor, Vec<usize>)> {
    let others = (0..x.shape.len()).filter(|i| !axes.contains(i));
    let perm: Vec<usize> = others.chain((0..x.shape.len()).filter(|i| axes.contains(i))).collect();
    let is_so = perm.iter().enumerate().all(|(i, p)| i == *p);
    Ok((if is_so { x.clone() } else { transposed(call, x, &perm)? }, perm))
}

/// The inverse of [`last`].
fn back(call: &mut Call<'_>, x: Tensor, perm: &[usize]) -> Result<Tensor> {
    if perm.iter().enumerate().all(|(i, p)| i == *p) {
        return Ok(x);
    }
    let mut inverse = vec![0; perm.len()];
    perm.iter().enumerate().for_each(|(i, p)| inverse[*p] = i);
    transposed(call, &x, &inverse)
}

fn reduce(call: &mut Call<'_>, f: impl Fn(&[f32]) -> f64 + Sync) -> Result<Vec<Tensor>> {
    let (x, _) = call.floats("x")?;
    let rank = x.shape.len();
    let axes = call.axes("axes", rank)?.unwrap_or_else(|| (0..rank).collect());
    let keep = call.is("keep_dims", false)?;
    let size: usize = axes.iter().map(|i| x.shape[*i]).product();
    let left = |i: usize| match (axes.contains(&i), keep) {
        (false, _) => Some(x.shape[i]),
        (true, true) => Some(1),
        (true, false) => None,
    };
    let shape: Vec<usize> = (0..rank).filter_map(left).collect();
    if size == 0 {
        return Err(Error::malformed(format!("{} has nothing along its axes {axes:?}", x.described())));
    }
    call.result(&shape)?;
    let (rows, _) = last(call, &x, &axes)?;
    let rows = rows.as_floats().unwrap_or_default();
    let values = rows.par_chunks(size).with_min_len(64).map(|row| f(row) as f32).collect();
    one(Tensor::of_floats(x.dtype, shape, values))
}

/// In place; NaN where all are minus infinity.
pub(super) fn softmax_row(row: &mut [f32]) {
    let largest = max(row);
    let mut sum = 0.0;
    for v in row.iter_mut() {
        *v = (*v - largest).exp();
        sum += f64::from(*v);
    }
    let factor = (1.0 / sum) as f32;
    row.iter_mut().for_each(|v| *v *= factor);
}

/// Each row along these axes, in place.
fn each_row(
    call: &mut Call<'_>,
    x: Tensor,
    axes: &[usize],
    f: impl Fn(&mut [f32]) + Send + Sync,
) -> Result<Vec<Tensor>> {
    let size: usize = axes.iter().map(|i| x.shape[*i]).product();
    let (rows, perm) = last(call, &x, axes)?;
    let (dtype, shape) = (x.dtype, rows.shape.clone());
    drop(x);
    let mut values = match rows.data {
        Data::Floats(mut values) => std::mem::take(call.own(&mut values)?),
        _ => Vec::new(),
    };
    if size > 0 {
        values.par_chunks_mut(size).with_min_len(16).for_each(f);
    }
    one(back(call, Tensor::of_floats(dtype, shape, values), &perm)?)
}

fn softmax(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (x, _) = call.floats("x")?;
    let axis = call.axis("axis", -1, x.shape.len())?;
    each_row(call, x, &[axis], softmax_row)
}

/// `(x - mean) / sqrt(variance + epsilon) * gamma + beta`, the variance that of all, not of a sample.
fn layer_norm(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (x, _) = call.floats("x")?;
    let rank = x.shape.len();
    let axes = call.axes("axes", rank)?.unwrap_or_else(|| (0..rank).collect());
    let epsilon = f64::from(call.float("epsilon", 1e-5)?);
    let over: Vec<usize> = (0..rank).filter(|i| axes.contains(i)).map(|i| x.shape[i]).collect();
    let mut affine = |name: &str| match call.given(name)? {
        None => Ok(None),
        Some(given) if given.shape() != over => {
            let found = given.shape();
            Err(Error::malformed(format!(
                "{name} has shape {found:?}, the axes of {} {over:?}",
                x.described()
            )))
        }
        Some(given) => floats(&call.decoded(given)?).map(Some),
    };
    let (gamma, beta) = (affine("gamma")?, affine("beta")?);
    each_row(call, x, &axes, |row| {
        let n = row.len() as f64;
        let mean = sum(row) / n;
        let variance = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
        let factor = 1.0 / (variance + epsilon).sqrt();
        row.iter_mut().for_each(|v| *v = ((f64::from(*v) - mean) * factor) as f32);
        if let Some(gamma) = &gamma {
            row.iter_mut().zip(&**gamma).for_each(|(v, g)| *v *= g);
        }
        if let Some(beta) = &beta {
            row.iter_mut().zip(&**beta).for_each(|(v, b)| *v += b);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{floats, int, ints, near, of, refused, run, truth};

    #[test]
    fn sums_along_axes() {
        let x = floats(&[2, 3], &[1.0, 2.0, 3.0, -4.0, 5.0, 6.0]);
        let along = |name: &str, axis: i32| of(name, &[("x", x.clone()), ("axes", ints(&[axis]))]);
        assert_eq!(along("reduce_sum", -1), (vec![2], vec![6.0, 7.0]));
        assert_eq!(along("reduce_sum", 0), (vec![3], vec![-3.0, 7.0, 9.0]));
        assert_eq!(along("reduce_mean", 1), (vec![2], vec![2.0, 7.0 / 3.0]));
        assert_eq!(along("reduce_max", 0).1, [1.0, 5.0, 6.0]);
        assert_eq!(along("reduce_min", 0).1, [-4.0, 2.0, 3.0]);
        assert_eq!(along("reduce_sum_square", 1).1, [14.0, 77.0]);
        assert_eq!(of("reduce_sum", &[("x", x.clone())]), (vec![], vec![13.0]));
        let kept = [("x", x.clone()), ("axes", ints(&[0, 1])), ("keep_dims", truth(true))];
        assert_eq!(of("reduce_max", &kept), (vec![1, 1], vec![6.0]));
        refused("reduce_sum", &[("x", x), ("axes", ints(&[2]))], "axis 2 of 2");
        refused(
            "reduce_max",
            &[("x", floats(&[2, 0], &[])), ("axes", ints(&[1]))],
            "has nothing along its axes",
        );
    }

    #[test]
    fn shares() {
        let e = std::f32::consts::E;
        let x = floats(&[2, 2], &[0.0, 1.0, 1000.0, 1000.0]);
        let wanted = [1.0 / (1.0 + e), e / (1.0 + e), 0.5, 0.5];
        near(&of("softmax", &[("x", x.clone())]).1, &wanted);
        let turned = floats(&[2, 2], &[0.0, 1000.0, 1.0, 1000.0]);
        let along_first = of("softmax", &[("x", turned), ("axis", int(0))]).1;
        near(&along_first, &[wanted[0], wanted[2], wanted[1], wanted[3]]);
        let nothing = floats(&[2], &[f32::NEG_INFINITY; 2]);
        assert!(of("softmax", &[("x", nothing)]).1.iter().all(|v| v.is_nan()));
    }

    #[test]
    fn norms() {
        let x = floats(&[2, 2], &[1.0, 3.0, -1.0, 5.0]);
        let (axes, epsilon) = (ints(&[-1]), floats(&[], &[3.0]));
        let (gamma, beta) = (floats(&[2], &[2.0, 4.0]), floats(&[2], &[10.0, 20.0]));
        // Means 2 and 2, variances 1 and 9.
        let plain = [("x", x.clone()), ("axes", axes.clone()), ("epsilon", epsilon.clone())];
        let wide = 3.0 / 12f32.sqrt();
        near(&of("layer_norm", &plain).1, &[-0.5, 0.5, -wide, wide]);
        let affine = [&plain[..], &[("gamma", gamma), ("beta", beta)]].concat();
        near(&of("layer_norm", &affine).1, &[9.0, 22.0, 10.0 - 2.0 * wide, 20.0 + 4.0 * wide]);
        let first =
            [("x", floats(&[2, 2], &[1.0, -1.0, 3.0, 5.0])), ("axes", ints(&[0])), ("epsilon", epsilon)];
        near(&of("layer_norm", &first).1, &[-0.5, -wide, 0.5, wide]);
        let wrong = [("x", x), ("axes", axes), ("gamma", floats(&[1], &[1.0]))];
        assert!(run("layer_norm", &wrong).unwrap_err().to_string().contains("gamma has shape [1]"));
    }
}
