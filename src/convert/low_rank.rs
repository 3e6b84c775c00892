//! Adding products of small matrices to a tensor's values, span by span (`--merge-lora`).

use std::sync::Arc;

use super::gather::decode;
use crate::container::{Factor, LowRank, Store};
use crate::error::Result;
use crate::tensor::Axes;

/// Elements of a factor that are decoded at once.
const CHUNK: usize = 64 << 10;

/// What a worker keeps between spans: the right factor of the product that it used last.
#[derive(Debug, Default)]
pub struct Held {
    /// Whose factor it is: the store's address, and the tensor's name.
    key: Option<(usize, String)>,
    /// (rank, columns), row by row.
    right: Vec<f32>,
    left: Vec<f32>,
    sums: Vec<f32>,
    buffers: (Vec<u8>, Vec<u8>, Vec<f32>),
}

/// Bytes that a worker holds to add `product` to spans of `span` elements.
pub fn held_bytes(product: &LowRank, span: u64) -> u64 {
    let rows = (span / product.columns.max(1)).saturating_add(2).min(product.rows);
    let factors = rows.saturating_add(product.columns).saturating_mul(product.rank);
    // A factor that is stored transposed is read into another buffer of its size.
    factors
        .saturating_mul(2)
        .saturating_add(product.columns)
        .saturating_mul(4)
        .saturating_add(8 * CHUNK as u64)
}

/// Adds the product to `values`, which are the elements of the sum from `start` on, in f32. Each
/// element is summed up by itself, so the result does not depend on the span.
///
/// # Errors
/// As reads of the factors fail.
pub fn add(product: &LowRank, start: u64, values: &mut [f32], held: &mut Held) -> Result<()> {
    let (columns, rank) = (product.columns as usize, product.rank as usize);
    let end = start + values.len() as u64;
    let (first, last) = (start / product.columns, end.div_ceil(product.columns));
    let key = (Arc::as_ptr(&product.store) as usize, product.right.tensor.name.clone());
    if held.key.as_ref() != Some(&key) {
        held.key = None;
        let all = Axes::new(&[product.rank]);
        read(&product.store, &product.right, all, product.columns, &mut held.right, &mut held.buffers)?;
        held.key = Some(key);
    }
    let mut rows = Axes::new(&[product.rows]);
    rows.slice(0, first, last, 1)?;
    read(&product.store, &product.left, rows, product.rank, &mut held.left, &mut held.buffers)?;

    let mut from = (start - first * product.columns) as usize;
    let mut rest = values;
    for row in held.left.chunks_exact(rank) {
        let (these, others) = rest.split_at_mut(rest.len().min(columns - from));
        held.sums.clear();
        held.sums.resize(these.len(), 0.0);
        for (&l, r) in row.iter().zip(held.right.chunks_exact(columns)) {
            for (sum, &r) in held.sums.iter_mut().zip(&r[from..]) {
                *sum += l * r;
            }
        }
        for (value, &sum) in these.iter_mut().zip(&held.sums) {
            *value += product.scale * sum;
        }
        rest = others;
        from = 0;
    }
    Ok(())
}

/// Values of `rows` (of one axis) and all `columns` of a factor, row by row.
fn read(
    store: &Store,
    factor: &Factor,
    rows: Axes,
    columns: u64,
    out: &mut Vec<f32>,
    (stretch, raw, decoded): &mut (Vec<u8>, Vec<u8>, Vec<f32>),
) -> Result<()> {
    let (row, column) = factor.strides();
    let copy = rows.scaled(row).then(Axes::new(&[columns]).scaled(column)).into_copy(0);
    out.resize(copy.elements() as usize, 0.0);
    let mut fetch = |mut lo: u64, buf: &mut [u8]| {
        for part in buf.chunks_mut(4 * CHUNK) {
            let values = decode(store, &factor.tensor, lo, part.len() / 4, raw, decoded)?;
            part.copy_from_slice(bytemuck::cast_slice(values));
            lo += part.len() as u64 / 4;
        }
        Ok(())
    };
    copy.gather(0, 4, bytemuck::cast_slice_mut(out), stretch, &mut fetch)
}
