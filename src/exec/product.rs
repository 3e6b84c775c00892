//! Products of matrices with weights that are decoded in tiles.
//!
//! A tile is [`TILE`] rows of the weight; threads take tiles, and one thread computes all of a tile, so that the order
//! of sums does not depend on how many there are.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::call::{Call, Operand, floats};
use super::ops::{Operator, broadcast, computed};
use super::strided::{Walk, repeated};
use super::tensor::{Tensor, elements};
use super::weight::Weight;
use crate::error::{Error, Result};

pub(super) const OPERATORS: &[Operator] = &[
    computed("linear", &["x", "weight", "bias"], linear),
    computed("matmul", &["x", "y", "transpose_x", "transpose_y"], matrices),
    computed("conv", &["x", "weight", "bias", "strides", "pad_type", "pad", "dilations", "groups"], conv),
];

/// Rows that are decoded at a time.
const TILE: usize = 64;

/// `out = a b`, on one thread.
pub(super) fn multiply(out: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    matmul(out, Accum::Replace, a, b, 1.0, Par::Seq);
}

/// Rows of a matrix, decoded or to be decoded.
enum Rows<'a> {
    Values(&'a [f32]),
    /// From this element on.
    Weight(&'a Weight, usize),
}

impl Rows<'_> {
    /// `out = self x`: `self` is as many rows as `out` has, `x` has the columns of `out`.
    fn multiply(&self, x: MatRef<'_, f32>, out: MatMut<'_, f32>) {
        let inner = x.nrows();
        let (mut tiles, mut rest) = (Vec::with_capacity(out.nrows().div_ceil(TILE)), out);
        while rest.nrows() > TILE {
            let (tile, others) = rest.split_at_row_mut(TILE);
            tiles.push(tile);
            rest = others;
        }
        tiles.push(rest);
        let work = |scratch: &mut Vec<f32>, (k, tile): (usize, MatMut<'_, f32>)| {
            let (first, n) = (k * TILE * inner, tile.nrows() * inner);
            let rows = match self {
                Rows::Values(values) => &values[first..first + n],
                Rows::Weight(weight, from) => {
                    scratch.resize(n, 0.0);
                    weight.read(from + first, scratch);
                    &scratch[..]
                }
            };
            multiply(tile, MatRef::from_row_major_slice(rows, n / inner.max(1), inner), x);
        };
        tiles.into_par_iter().enumerate().for_each_init(Vec::new, work);
    }
}

/// `[out, in]`, where what is behind has sizes of 1.
fn matrix(weight: &Operand) -> Result<(usize, usize)> {
    match *weight.shape() {
        [outputs, inputs] | [outputs, inputs, 1] | [outputs, inputs, 1, 1] => Ok((outputs, inputs)),
        ref other => Err(Error::unsupported(format!("weight has shape {other:?}, a matrix was expected"))),
    }
}

fn rows(weight: &Operand) -> Result<Rows<'_>> {
    match weight {
        Operand::Weight(weight) => Ok(Rows::Weight(weight, 0)),
        Operand::Tensor(tensor) => match tensor.as_floats() {
            Some(values) => Ok(Rows::Values(values)),
            None => Err(Error::malformed(format!("weight is {}, floats were expected", tensor.described()))),
        },
    }
}

/// One for each output, if it is given.
fn bias(call: &mut Call<'_>, outputs: usize) -> Result<Option<Vec<f32>>> {
    let Some(bias) = call.given("bias")? else { return Ok(None) };
    let bias = bias.tensor()?;
    match bias.as_floats() {
        Some(values) if bias.shape == [outputs] => Ok(Some(values.to_vec())),
        _ => Err(Error::malformed(format!("bias is {}, there are {outputs} outputs", bias.described()))),
    }
}

fn check_type(x: &Tensor, weight: &Operand) -> Result<()> {
    match x.dtype == weight.dtype() {
        true => Ok(()),
        false => Err(Error::malformed(format!("x is {}, weight {}", x.dtype, weight.dtype()))),
    }
}

/// `x W^T + bias`, for vectors along the last axis.
fn linear(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let ((x, values), weight) = (call.floats("x")?, call.operand("weight")?);
    check_type(&x, &weight)?;
    let ((outputs, inputs), wrong) = (matrix(&weight)?, || {
        let (x, weight) = (x.described(), weight.shape());
        Error::malformed(format!("{x} does not go into a matrix of shape {weight:?}"))
    });
    let Some((&last, outer)) = x.shape.split_last() else { return Err(wrong()) };
    if last != inputs || weight.shape().len() != 2 {
        return Err(wrong());
    }
    let bias = bias(call, outputs)?;
    let shape = [outer, &[outputs]].concat();
    let mut out = vec![0.0; elements(&shape)?];
    let vectors = outer.iter().product();
    if !out.is_empty() && inputs > 0 {
        let x = MatRef::from_row_major_slice(&values, vectors, inputs);
        let out = MatMut::from_row_major_slice_mut(&mut out, vectors, outputs);
        rows(&weight)?.multiply(x.transpose(), out.transpose_mut());
    }
    if let Some(bias) = bias {
        out.par_chunks_mut(outputs.max(1))
            .for_each(|row| row.iter_mut().zip(&bias).for_each(|(v, b)| *v += b));
    }
    Ok(vec![Tensor::of_floats(x.dtype, shape, out)])
}

/// Kernels of one element: `[batch, channels, ...]` times a matrix, for each place.
fn conv(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let ((x, values), weight) = (call.floats("x")?, call.operand("weight")?);
    check_type(&x, &weight)?;
    let mut plain =
        |name: &str, value: i64| Ok(call.ints(name)?.is_none_or(|n| n.iter().all(|n| *n == value)));
    let is_plain = plain("strides", 1)? && plain("dilations", 1)? && plain("pad", 0)? && plain("groups", 1)?;
    let pad_type = call.text("pad_type")?;
    if !is_plain || pad_type.as_deref().is_some_and(|t| !["valid", "custom"].contains(&t)) {
        return Err(Error::unsupported(
            "conv: kernels of one element are known, without strides, padding, groups",
        ));
    }
    let (outputs, inputs) = matrix(&weight)?;
    let [batch, channels, ref places @ ..] = x.shape[..] else {
        return Err(Error::malformed(format!("x is {}, channels were expected", x.described())));
    };
    if channels != inputs || weight.shape().len() != x.shape.len() {
        let (x, weight) = (x.described(), weight.shape());
        return Err(Error::malformed(format!("{x} does not go into kernels of shape {weight:?}")));
    }
    let bias = bias(call, outputs)?;
    let shape = [&[batch, outputs], places].concat();
    let (mut out, n) = (vec![0.0; elements(&shape)?], places.iter().product::<usize>());
    if !out.is_empty() && inputs > 0 {
        let weight = rows(&weight)?;
        for (x, out) in values.chunks_exact(inputs * n).zip(out.chunks_exact_mut(outputs * n)) {
            let x = MatRef::from_row_major_slice(x, inputs, n);
            weight.multiply(x, MatMut::from_row_major_slice_mut(out, outputs, n));
        }
    }
    if let Some(bias) = bias {
        let each = |(row, b): (&mut [f32], &f32)| row.iter_mut().for_each(|v| *v += b);
        out.chunks_mut(outputs * n.max(1)).for_each(|out| out.chunks_mut(n.max(1)).zip(&bias).for_each(each));
    }
    Ok(vec![Tensor::of_floats(x.dtype, shape, out)])
}

/// A stack of matrices as it lies in memory, and whether each is turned.
struct Stack<'a> {
    outer: &'a [usize],
    rows: usize,
    columns: usize,
    turned: bool,
}

impl<'a> Stack<'a> {
    fn new(shape: &'a [usize], turned: bool) -> Result<Self> {
        match shape {
            [outer @ .., rows, columns] => Ok(Self { outer, rows: *rows, columns: *columns, turned }),
            _ => Err(Error::malformed(format!("{shape:?} is no matrix"))),
        }
    }

    /// Rows and columns of what is multiplied.
    fn size(&self) -> (usize, usize) {
        if self.turned { (self.columns, self.rows) } else { (self.rows, self.columns) }
    }

    fn matrix<'v>(&self, values: &'v [f32]) -> MatRef<'v, f32> {
        let matrix = MatRef::from_row_major_slice(values, self.rows, self.columns);
        if self.turned { matrix.transpose() } else { matrix }
    }
}

/// `x y` for each of a stack, repeated as in elementwise operations.
fn matrices(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let ((x, values), y) = (call.floats("x")?, call.operand("y")?);
    check_type(&x, &y)?;
    let of_x = Stack::new(&x.shape, call.is("transpose_x", false)?)?;
    let y_shape = y.shape().to_vec();
    let of_y = Stack::new(&y_shape, call.is("transpose_y", false)?)?;
    let ((rows, inner), (other, columns)) = (of_x.size(), of_y.size());
    if inner != other {
        return Err(Error::malformed(format!(
            "{} times {y_shape:?}: {inner} and {other} differ",
            x.described()
        )));
    }
    let outer = broadcast(of_x.outer, of_y.outer)?;
    let shape = [&outer[..], &[rows, columns]].concat();
    let mut out = vec![0.0; elements(&shape)?];
    // Which matrices each product is of.
    let mut pairs = Vec::new();
    let strides = repeated(of_x.outer, &outer).into_iter().zip(repeated(of_y.outer, &outer));
    let walk = Walk::new(outer.iter().copied().zip(strides.map(|(a, b)| [a, b])));
    walk.rows([0; 2], |at, n, strides| {
        pairs.extend((0..n).map(|i| [0, 1].map(|k| at[k] as usize + i * strides[k] as usize)));
    });
    let done = |out| Ok(vec![Tensor::of_floats(x.dtype, shape, out)]);
    if out.is_empty() || inner == 0 {
        return done(out);
    }
    let x_of = |i: usize| of_x.matrix(&values[i * rows * inner..][..rows * inner]);
    // Where rows of what is stored are columns of what is multiplied, they are decoded in tiles.
    if let (Operand::Weight(weight), true) = (&y, of_y.turned) {
        for ([i, j], out) in pairs.into_iter().zip(out.chunks_exact_mut(rows * columns)) {
            let out = MatMut::from_row_major_slice_mut(out, rows, columns);
            Rows::Weight(weight, j * columns * inner).multiply(x_of(i).transpose(), out.transpose_mut());
        }
        return done(out);
    }
    let y = floats(&y.tensor()?)?;
    out.par_chunks_exact_mut(rows * columns).zip(pairs).for_each(|(out, [i, j])| {
        let y = of_y.matrix(&y[j * columns * inner..][..columns * inner]);
        let x = x_of(i);
        out.par_chunks_mut(TILE * columns).enumerate().for_each(|(k, out)| {
            let n = out.len() / columns;
            multiply(MatMut::from_row_major_slice_mut(out, n, columns), x.subrows(k * TILE, n), y);
        });
    });
    done(out)
}
