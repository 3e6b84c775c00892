//! Operations along axes: sums, norms.

use rayon::prelude::*;

use super::super::call::Call;
use super::super::tensor::Tensor;
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
fn last(x: &Tensor, axes: &[usize]) -> Result<(Tensor, Vec<usize>)> {
    let others = (0..x.shape.len()).filter(|i| !axes.contains(i));
    let perm: Vec<usize> = others.chain((0..x.shape.len()).filter(|i| axes.contains(i))).collect();
    let is_so = perm.iter().enumerate().all(|(i, p)| i == *p);
    Ok((if is_so { x.clone() } else { transposed(x, &perm)? }, perm))
}

/// The inverse of [`last`].
fn back(x: Tensor, perm: &[usize]) -> Result<Tensor> {
    if perm.iter().enumerate().all(|(i, p)| i == *p) {
        return Ok(x);
    }
    let mut inverse = vec![0; perm.len()];
    perm.iter().enumerate().for_each(|(i, p)| inverse[*p] = i);
    transposed(&x, &inverse)
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
    let (rows, _) = last(&x, &axes)?;
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
fn each_row(x: Tensor, axes: &[usize], f: impl Fn(&mut [f32]) + Send + Sync) -> Result<Vec<Tensor>> {
    let size: usize = axes.iter().map(|i| x.shape[*i]).product();
    let (rows, perm) = last(&x, axes)?;
    let (dtype, shape) = (x.dtype, rows.shape.clone());
    drop(x);
    let mut values = match rows.data {
        super::super::tensor::Data::Floats(values) => std::sync::Arc::unwrap_or_clone(values),
        _ => Vec::new(),
    };
    if size > 0 {
        values.par_chunks_mut(size).with_min_len(16).for_each(f);
    }
    one(back(Tensor::of_floats(dtype, shape, values), &perm)?)
}

fn softmax(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (x, _) = call.floats("x")?;
    let axis = call.axis("axis", -1, x.shape.len())?;
    each_row(x, &[axis], softmax_row)
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
        Some(given) => super::super::call::floats(&given.tensor()?).map(Some),
    };
    let (gamma, beta) = (affine("gamma")?, affine("beta")?);
    each_row(x, &axes, |row| {
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
