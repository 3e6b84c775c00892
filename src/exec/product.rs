//! Products of matrices with weights that are decoded in tiles.
//!
//! A tile is [`TILE`] rows of the weight; threads take tiles, and one thread computes all of a tile, so that the order
//! of sums does not depend on how many there are.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::call::{Call, Operand, floats};
use super::ops::{Operator, broadcast, computed};
use super::strided::repeated;
use super::tensor::{Tensor, zeros};
use super::weight::Weight;
use crate::error::{Error, Result};

pub(super) const OPERATORS: &[Operator] = &[
    computed("linear", &["x", "weight", "bias"], linear),
    computed("matmul", &["x", "y", "transpose_x", "transpose_y"], matrices),
    computed("conv", &["x", "weight", "bias", "strides", "pad_type", "pad", "dilations", "groups"], conv),
];

/// Rows that are decoded at a time.
const TILE: usize = 64;
/// Products of a matrix that take as much time as one element of other operations.
pub(super) const PRODUCTS: usize = 128;

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
    ///
    /// # Errors
    /// As [`Weight::read`].
    fn multiply(&self, x: MatRef<'_, f32>, out: MatMut<'_, f32>) -> Result<()> {
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
                    weight.read(from + first, scratch)?;
                    &scratch[..]
                }
            };
            multiply(tile, MatRef::from_row_major_slice(rows, n / inner.max(1), inner), x);
            Ok(())
        };
        tiles.into_par_iter().enumerate().try_for_each_init(Vec::new, work)
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
    let bias = call.decoded(bias)?;
    call.reserve(bias.len())?;
    match bias.as_floats() {
        Some(values) if bias.shape == [outputs] => Ok(Some(values.to_vec())),
        _ => Err(Error::malformed(format!("bias is {}, there are {outputs} outputs", bias.described()))),
    }
}

/// Takes memory for the tiles of a weight, if it is one, and counts the work of `count` times a matrix of `rows` by
/// `inner` with one of `inner` by `columns`, the weight's outputs.
fn pay(
    call: &mut Call<'_>,
    weight: Option<&Weight>,
    count: usize,
    [rows, inner, columns]: [usize; 3],
) -> Result<()> {
    let of = |a: usize, b: usize| a.saturating_mul(b);
    let mut each = of(rows, inner).saturating_add(of(rows, columns));
    each = each.saturating_add(of(of(rows, inner), columns) / PRODUCTS);
    each = each.saturating_add(match weight {
        Some(weight) => {
            let tiles = columns.div_ceil(TILE);
            call.reserve(of(of(columns.min(TILE), inner), tiles.min(rayon::current_num_threads())))?;
            weight.work(tiles, of(columns.min(TILE), inner))
        }
        None => of(inner, columns),
    });
    call.work(of(each, count))
}

/// Of an operand that is decoded in tiles.
fn stored(weight: &Operand) -> Option<&Weight> {
    match weight {
        Operand::Weight(weight) => Some(weight),
        Operand::Tensor(_) => None,
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
    let n = call.result(&shape)?;
    let vectors = outer.iter().product();
    pay(call, stored(&weight), 1, [vectors, inputs, outputs])?;
    let mut out = zeros(n)?;
    if !out.is_empty() && inputs > 0 {
        let x = MatRef::from_row_major_slice(&values, vectors, inputs);
        let out = MatMut::from_row_major_slice_mut(&mut out, vectors, outputs);
        rows(&weight)?.multiply(x.transpose(), out.transpose_mut())?;
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
    let (all, n) = (call.result(&shape)?, places.iter().product::<usize>());
    pay(call, stored(&weight), batch, [n, inputs, outputs])?;
    let mut out = zeros(all)?;
    if !out.is_empty() && inputs > 0 {
        let weight = rows(&weight)?;
        for (x, out) in values.chunks_exact(inputs * n).zip(out.chunks_exact_mut(outputs * n)) {
            let x = MatRef::from_row_major_slice(x, inputs, n);
            weight.multiply(x, MatMut::from_row_major_slice_mut(out, outputs, n))?;
        }
    }
    if let Some(bias) = bias {
        let each = |(row, b): (&mut [f32], &f32)| row.iter_mut().for_each(|v| *v += b);
        out.chunks_mut((outputs * n).max(1))
            .for_each(|out| out.chunks_mut(n.max(1)).zip(&bias).for_each(each));
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
    let n = call.result(&shape)?;
    let tiles = stored(&y).filter(|_| of_y.turned);
    pay(call, tiles, if n > 0 { outer.iter().product() } else { 0 }, [rows, inner, columns])?;
    let mut out = zeros(n)?;
    let done = |out| Ok(vec![Tensor::of_floats(x.dtype, shape, out)]);
    if out.is_empty() || inner == 0 {
        return done(out);
    }
    // Which matrices each product is of.
    let strides = [repeated(of_x.outer, &outer), repeated(of_y.outer, &outer)];
    let pair = |product: usize| {
        let (mut rest, mut places) = (product, [0; 2]);
        for (k, size) in outer.iter().enumerate().rev() {
            let at = rest % size;
            rest /= size;
            places = [0, 1].map(|side| places[side] + at * strides[side][k] as usize);
        }
        places
    };
    let x_of = |i: usize| of_x.matrix(&values[i * rows * inner..][..rows * inner]);
    // Where rows of what is stored are columns of what is multiplied, they are decoded in tiles.
    if let (Operand::Weight(weight), true) = (&y, of_y.turned) {
        for (k, out) in out.chunks_exact_mut(rows * columns).enumerate() {
            let [i, j] = pair(k);
            let out = MatMut::from_row_major_slice_mut(out, rows, columns);
            Rows::Weight(weight, j * columns * inner).multiply(x_of(i).transpose(), out.transpose_mut())?;
        }
        return done(out);
    }
    let y = floats(&call.decoded(y)?)?;
    out.par_chunks_exact_mut(rows * columns).enumerate().for_each(|(k, out)| {
        let [i, j] = pair(k);
        let y = of_y.matrix(&y[j * columns * inner..][..columns * inner]);
        let x = x_of(i);
        out.par_chunks_mut(TILE * columns).enumerate().for_each(|(k, out)| {
            let n = out.len() / columns;
            multiply(MatMut::from_row_major_slice_mut(out, n, columns), x.subrows(k * TILE, n), y);
        });
    });
    done(out)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::ops::tests::{bools, floats, int, ints, near, of, refused, text, truth};
    use super::super::weight::tests::{of_bytes, package};
    use super::*;
    use crate::container::coreml::{Constant, DataType, Form};

    fn some(shape: &[usize], seed: usize) -> Tensor {
        let n: usize = shape.iter().product();
        floats(shape, &(0..n).map(|i| ((i * 37 + seed * 11) % 23) as f32 / 8.0 - 1.25).collect::<Vec<_>>())
    }

    fn values(tensor: &Tensor) -> &[f32] {
        tensor.as_floats().unwrap()
    }

    /// `a b` by the definition: `[rows, inner]`, `[inner, columns]`.
    fn product(a: &[f32], b: &[f32], inner: usize, columns: usize) -> Vec<f32> {
        let rows = a.len() / inner;
        let at = |i: usize, j: usize| (0..inner).map(|k| a[i * inner + k] * b[k * columns + j]).sum();
        (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))).map(|(i, j)| at(i, j)).collect()
    }

    fn turned(a: &[f32], columns: usize) -> Vec<f32> {
        (0..columns).flat_map(|j| a.iter().skip(j).step_by(columns).copied()).collect()
    }

    #[test]
    fn vectors_through_a_matrix() {
        // More rows than a tile, none a multiple of it.
        for (outer, inputs, outputs) in
            [(vec![1, 3], 5, 130), (vec![9], 64, 64), (vec![], 7, 1), (vec![2, 70], 33, 65)]
        {
            let (x, w) = (some(&[&outer[..], &[inputs]].concat(), 1), some(&[outputs, inputs], 2));
            let bias = some(&[outputs], 3);
            let mut wanted = product(values(&x), &turned(values(&w), inputs), inputs, outputs);
            let (shape, found) = of("linear", &[("x", x.clone()), ("weight", w.clone())]);
            assert_eq!(shape, [&outer[..], &[outputs]].concat());
            near(&found, &wanted);
            wanted
                .chunks_mut(outputs)
                .for_each(|row| row.iter_mut().zip(values(&bias)).for_each(|(v, b)| *v += b));
            near(&of("linear", &[("x", x), ("weight", w), ("bias", bias)]).1, &wanted);
        }
        let (x, w) = (some(&[2, 3], 1), some(&[4, 3], 2));
        refused("linear", &[("x", some(&[2, 4], 1)), ("weight", w.clone())], "fp32[2,4] does not go into");
        refused(
            "linear",
            &[("x", x.clone()), ("weight", w.clone()), ("bias", some(&[3], 0))],
            "there are 4 outputs",
        );
        refused("linear", &[("x", x.clone()), ("weight", some(&[4, 3, 1, 1], 0))], "does not go into");
        refused("linear", &[("x", x), ("weight", some(&[4], 0))], "a matrix was expected");
    }

    /// No outputs, each with a bias.
    #[test]
    fn no_outputs() {
        let none = |shape: &[usize]| floats(shape, &[]);
        let x = [("x", some(&[1, 3, 1, 1], 1)), ("weight", none(&[0, 3, 1, 1])), ("bias", none(&[0]))];
        assert_eq!(of("conv", &x).0, [1, 0, 1, 1]);
        let x = [("x", some(&[2, 3], 1)), ("weight", none(&[0, 3])), ("bias", none(&[0]))];
        assert_eq!(of("linear", &x).0, [2, 0]);
    }

    /// What is decoded in tiles gives the bits of what was decoded before.
    #[test]
    fn weights_are_as_tensors() {
        let (inputs, outputs) = (40, 150);
        let w: Vec<u8> = (0..inputs * outputs).map(|i| (i * 7 % 251) as u8).collect();
        let stored = |shape: &[usize]| {
            let shape: Vec<u64> = shape.iter().map(|n| *n as u64).collect();
            let scale = 1f32.to_le_bytes();
            let scale = of_bytes(DataType::Float32, &vec![1; shape.len()], &scale);
            let data = of_bytes(DataType::Int8, &shape, &w);
            let form = Form::Blockwise { data, scale, offset: None };
            let constant = Constant { name: "w".into(), data_type: DataType::Float32, shape, form };
            Arc::new(Weight::new(&package(), constant.into()).unwrap())
        };
        let run = |name: &str, parameter, weight: Operand, x: Tensor, turn: bool| {
            let mut inputs = vec![("x", vec![Operand::Tensor(x)]), (parameter, vec![weight])];
            if turn {
                inputs.push(("transpose_y", vec![Operand::Tensor(truth(true))]));
            }
            let operator = super::super::ops::find(name).unwrap();
            (operator.run)(&mut Call { inputs, results: 1, declared: None, room: usize::MAX, fuel: u64::MAX })
                .unwrap()
                .remove(0)
        };
        for (name, parameter, shape, x, turn) in [
            ("linear", "weight", vec![outputs, inputs], vec![3, inputs], false),
            ("conv", "weight", vec![outputs, inputs, 1, 1], vec![1, inputs, 1, 3], false),
            ("matmul", "y", vec![3, outputs / 3, inputs], vec![2, inputs], true),
            ("matmul", "y", vec![outputs, inputs], vec![2, outputs], false),
        ] {
            let (weight, x) = (stored(&shape), some(&x, 5));
            let decoded = run(name, parameter, Operand::Tensor(weight.tensor().unwrap()), x.clone(), turn);
            let found = run(name, parameter, Operand::Weight(weight), x, turn);
            assert_eq!(found.shape, decoded.shape, "{name}");
            near(values(&found), values(&decoded));
        }
    }

    #[test]
    fn kernels() {
        let (x, w, bias) = (some(&[2, 5, 1, 3], 1), some(&[70, 5, 1, 1], 2), some(&[70], 3));
        let mut wanted = Vec::new();
        for x in values(&x).chunks(15) {
            wanted.extend(product(values(&w), x, 5, 3));
        }
        let plain = [
            ("x", x.clone()),
            ("weight", w.clone()),
            ("strides", ints(&[1, 1])),
            ("pad_type", text("valid")),
            ("pad", ints(&[0; 4])),
            ("dilations", ints(&[1, 1])),
            ("groups", int(1)),
        ];
        let (shape, found) = of("conv", &plain);
        assert_eq!(shape, [2, 70, 1, 3]);
        near(&found, &wanted);
        let with_bias = [&plain[..], &[("bias", bias.clone())]].concat();
        wanted
            .chunks_mut(3)
            .enumerate()
            .for_each(|(i, row)| row.iter_mut().for_each(|v| *v += values(&bias)[i % 70]));
        near(&of("conv", &with_bias).1, &wanted);
        let other = |name, value| [&plain[..2], &[(name, value)]].concat();
        refused("conv", &other("strides", ints(&[2, 1])), "kernels of one element are known");
        refused("conv", &other("groups", int(2)), "kernels of one element are known");
        refused("conv", &other("pad_type", text("same")), "kernels of one element are known");
        refused(
            "conv",
            &[("x", x), ("weight", some(&[5, 5, 3, 1], 0))],
            "[5, 5, 3, 1], a matrix was expected",
        );
    }

    #[test]
    fn stacks_of_matrices() {
        let (x, y) = (some(&[2, 1, 3, 4], 1), some(&[3, 4, 70], 2));
        let mut wanted = Vec::new();
        for x in values(&x).chunks(12) {
            values(&y).chunks(280).for_each(|y| wanted.extend(product(x, y, 4, 70)));
        }
        let (shape, found) = of("matmul", &[("x", x.clone()), ("y", y.clone())]);
        assert_eq!(shape, [2, 3, 3, 70]);
        near(&found, &wanted);
        let turn = |t: &Tensor| {
            let (mut shape, n) = (t.shape.clone(), t.shape.len());
            let (rows, columns) = (shape[n - 2], shape[n - 1]);
            shape.swap(n - 1, n - 2);
            let all: Vec<f32> = values(t).chunks(rows * columns).flat_map(|m| turned(m, columns)).collect();
            floats(&shape, &all)
        };
        for (tx, ty) in [(true, false), (false, true), (true, true)] {
            let inputs = [
                ("x", if tx { turn(&x) } else { x.clone() }),
                ("y", if ty { turn(&y) } else { y.clone() }),
                ("transpose_x", truth(tx)),
                ("transpose_y", truth(ty)),
            ];
            near(&of("matmul", &inputs).1, &wanted);
        }
        refused("matmul", &[("x", x.clone()), ("y", some(&[5, 2], 0))], "4 and 5 differ");
        refused("matmul", &[("x", x), ("y", some(&[4], 0))], "[4] is no matrix");
        refused("matmul", &[("x", some(&[2, 3, 4], 0)), ("y", some(&[5, 4, 2], 0))], "do not go together");
        let empty = of("matmul", &[("x", floats(&[2, 0], &[])), ("y", floats(&[0, 2], &[]))]);
        assert_eq!(empty, (vec![2, 2], vec![0.0; 4]));
    }

    /// By the definition; more queries than are computed at a time.
    #[test]
    fn attention() {
        let (heads, rows, keys, width, columns) = (2, 70, 5, 4, 3);
        let [q, k, v] = [
            some(&[1, heads, rows, width], 1),
            some(&[1, heads, keys, width], 2),
            some(&[1, heads, keys, columns], 3),
        ];
        let wanted = |mask: &dyn Fn(usize, usize, usize) -> f32| {
            let mut out = Vec::new();
            for h in 0..heads {
                for i in 0..rows {
                    let score = |j: usize| {
                        let dot: f32 = (0..width)
                            .map(|e| {
                                values(&q)[(h * rows + i) * width + e]
                                    * values(&k)[(h * keys + j) * width + e]
                            })
                            .sum();
                        (dot / (width as f32).sqrt() + mask(h, i, j)).exp()
                    };
                    let sum: f32 = (0..keys).map(score).sum();
                    for c in 0..columns {
                        let of = |j: usize| score(j) * values(&v)[(h * keys + j) * columns + c];
                        out.push((0..keys).map(of).sum::<f32>() / sum);
                    }
                }
            }
            out
        };
        let found = |mask: Option<Tensor>| {
            let mut inputs = vec![("query", q.clone()), ("key", k.clone()), ("value", v.clone())];
            inputs.extend(mask.map(|mask| ("attn_mask", mask)));
            let (shape, values) = of("scaled_dot_product_attention", &inputs);
            assert_eq!(shape, [1, heads, rows, columns]);
            values
        };
        near(&found(None), &wanted(&|_, _, _| 0.0));
        let causal = |i: usize, j: usize| j <= i % keys;
        let shown: Vec<bool> = (0..rows * keys).map(|n| causal(n / keys, n % keys)).collect();
        let by_truth = Tensor { shape: vec![rows, keys], ..bools(&shown) };
        near(&found(Some(by_truth)), &wanted(&|_, i, j| if causal(i, j) { 0.0 } else { f32::NEG_INFINITY }));
        let add = some(&[1, heads, 1, keys], 7);
        near(&found(Some(add.clone())), &wanted(&|h, _, j| values(&add)[h * keys + j]));
        let all = [("query", q.clone()), ("key", k.clone()), ("value", v.clone())];
        let with = |mask: Tensor| [&all[..], &[("attn_mask", mask)]].concat();
        refused(
            "scaled_dot_product_attention",
            &with(some(&[rows, 4], 0)),
            "scores have shape [1, 2, 70, 5]",
        );
        refused("scaled_dot_product_attention", &with(ints(&[0])), "attn_mask is int32[1]");
        let fewer = [("query", q), ("key", some(&[1, 1, keys, width], 0)), ("value", v)];
        refused("scaled_dot_product_attention", &fewer, "do not go together");
    }
}
