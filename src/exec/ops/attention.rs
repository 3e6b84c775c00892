//! Attention in one operation.

use faer::{MatMut, MatRef};
use rayon::prelude::*;

use super::super::call::{Call, same_dtype};
use super::super::product::{PRODUCTS, multiply};
use super::super::strided::{repeated, strides};
use super::super::tensor::{Data, Tensor, zeros};
use super::reduce::softmax_row;
use super::{Operator, computed, one};
use crate::error::{Error, Result};

pub(super) const OPERATORS: &[Operator] =
    &[computed("scaled_dot_product_attention", &["query", "key", "value", "attn_mask"], attention)];

/// Queries whose scores are held at a time, by each thread.
const ROWS: usize = 64;

/// `softmax(query key^T / sqrt(E) + mask) value`, for each of the dimensions in front, which are the same in all three.
/// A mask of truth values hides what is false.
fn attention(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let ((query, q), (key, k), (value, v)) =
        (call.floats("query")?, call.floats("key")?, call.floats("value")?);
    same_dtype(&query, &key)?;
    same_dtype(&query, &value)?;
    let wrong = || {
        let [q, k, v] = [&query, &key, &value].map(|t| t.described());
        Error::malformed(format!("query {q}, key {k} and value {v} do not go together"))
    };
    let ([outer @ .., rows, width], [k_outer @ .., keys, k_width], [v_outer @ .., v_keys, columns]) =
        (&query.shape[..], &key.shape[..], &value.shape[..])
    else {
        return Err(wrong());
    };
    if outer.is_empty() || k_outer != outer || v_outer != outer || k_width != width || v_keys != keys {
        return Err(wrong());
    }
    let scores: Vec<usize> = [outer, &[*rows, *keys]].concat();
    let mask = call.given("attn_mask")?.map(|mask| call.decoded(mask)).transpose()?;
    if let Some(mask) = &mask
        && !(mask.shape.len() <= scores.len()
            && mask.shape.iter().rev().zip(scores.iter().rev()).all(|(n, size)| *n == 1 || n == size))
    {
        return Err(Error::malformed(format!(
            "attn_mask is {}, scores have shape {scores:?}",
            mask.described()
        )));
    }
    let at_mask = mask.as_ref().map(|mask| repeated(&mask.shape, &scores)).unwrap_or_default();
    let own = strides(outer);
    // Adds the mask to the scores of one query.
    let hide = |batch: usize, row: usize, scores: &mut [f32]| {
        let Some(mask) = &mask else { return };
        let [of_outer @ .., of_row, of_key] = &at_mask[..] else { return };
        let places = outer.iter().zip(&own).map(|(n, s)| batch / *s as usize % n);
        let base: isize = places.zip(of_outer).map(|(i, s)| i as isize * s).sum();
        let base = base + row as isize * of_row;
        let at = |i: usize| (base + i as isize * of_key) as usize;
        match &mask.data {
            Data::Bools(shown) => {
                let hidden = |(i, s): (usize, &mut f32)| {
                    if !shown[at(i)] {
                        *s = f32::NEG_INFINITY;
                    }
                };
                scores.iter_mut().enumerate().for_each(hidden);
            }
            Data::Floats(add) => scores.iter_mut().enumerate().for_each(|(i, s)| *s += add[at(i)]),
            Data::Ints(_) | Data::Text(_) => scores.fill(f32::NAN),
        }
    };
    if let Some(mask) = mask.as_ref().filter(|m| matches!(m.data, Data::Ints(_) | Data::Text(_))) {
        return Err(Error::malformed(format!("attn_mask is {}", mask.described())));
    }
    let shape: Vec<usize> = [outer, &[*rows, *columns]].concat();
    let mut out = zeros(call.result(&shape)?)?;
    let (rows, keys, width, columns) = (*rows, *keys, *width, *columns);
    if out.is_empty() || keys == 0 || width == 0 {
        return Err(wrong());
    }
    // Scores of each thread.
    let parts = rows.div_ceil(ROWS).saturating_mul(outer.iter().product()).min(rayon::current_num_threads());
    call.reserve(rows.min(ROWS).saturating_mul(keys).saturating_mul(parts))?;
    let sides = (rows.saturating_mul(width)).saturating_add(keys.saturating_mul(width + columns));
    let scores = rows.saturating_mul(keys);
    let all = sides.saturating_add(scores).saturating_add(scores.saturating_mul(width + columns) / PRODUCTS);
    call.work(all.saturating_mul(outer.iter().product()))?;
    let scale = 1.0 / (width as f32).sqrt();
    out.par_chunks_exact_mut(rows * columns).enumerate().for_each(|(batch, out)| {
        let queries = &q[batch * rows * width..][..rows * width];
        let key = MatRef::from_row_major_slice(&k[batch * keys * width..][..keys * width], keys, width);
        let value =
            MatRef::from_row_major_slice(&v[batch * keys * columns..][..keys * columns], keys, columns);
        let part = |scores: &mut Vec<f32>, (n, out): (usize, &mut [f32])| {
            let (first, count) = (n * ROWS, out.len() / columns);
            let query =
                MatRef::from_row_major_slice(&queries[first * width..][..count * width], count, width);
            scores.resize(count * keys, 0.0);
            multiply(MatMut::from_row_major_slice_mut(scores, count, keys), query, key.transpose());
            for (i, row) in scores.chunks_exact_mut(keys).enumerate() {
                row.iter_mut().for_each(|s| *s *= scale);
                hide(batch, first + i, row);
                softmax_row(row);
            }
            let scores = MatRef::from_row_major_slice(scores, count, keys);
            multiply(MatMut::from_row_major_slice_mut(out, count, columns), scores, value);
        };
        out.par_chunks_mut(ROWS * columns).enumerate().for_each_init(Vec::new, part);
    });
    one(Tensor::of_floats(query.dtype, shape, out))
}
