//! Operations on each element, or on each pair.

use std::sync::Arc;

use rayon::prelude::*;

use super::super::call::{Call, same_dtype};
use super::super::strided::{Walk, repeated};
use super::super::tensor::{Data, Tensor};
use super::{Operator, computed, moved, one};
use crate::container::coreml::DataType;
use crate::error::{Error, Result};

const X: &[&str] = &["x"];
const XY: &[&str] = &["x", "y"];

pub(super) const OPERATORS: &[Operator] = &[
    computed("add", XY, |call| binary(call, |a, b| a + b, |a, b| Some(a.wrapping_add(b)))),
    computed("sub", XY, |call| binary(call, |a, b| a - b, |a, b| Some(a.wrapping_sub(b)))),
    computed("mul", XY, |call| binary(call, |a, b| a * b, |a, b| Some(a.wrapping_mul(b)))),
    computed("real_div", XY, |call| binary(call, |a, b| a / b, floor_div)),
    computed("floor_div", XY, |call| binary(call, |a, b| (a / b).floor(), floor_div)),
    computed("mod", XY, |call| binary(call, |a, b| a - b * (a / b).floor(), modulo)),
    computed("maximum", XY, |call| binary(call, larger, |a, b| Some(a.max(b)))),
    computed("minimum", XY, |call| binary(call, |a, b| -larger(-a, -b), |a, b| Some(a.min(b)))),
    moved("less", XY, |call| comparison(call, |a, b| a < b, |a, b| a < b)),
    moved("less_equal", XY, |call| comparison(call, |a, b| a <= b, |a, b| a <= b)),
    moved("greater", XY, |call| comparison(call, |a, b| a > b, |a, b| a > b)),
    moved("greater_equal", XY, |call| comparison(call, |a, b| a >= b, |a, b| a >= b)),
    moved("equal", XY, |call| comparison(call, |a, b| a == b, |a, b| a == b)),
    moved("not_equal", XY, |call| comparison(call, |a, b| a != b, |a, b| a != b)),
    moved("logical_and", XY, |call| logical(call, |a, b| a && b)),
    moved("logical_or", XY, |call| logical(call, |a, b| a || b)),
    moved("logical_not", X, logical_not),
    moved("identity", X, |call| one(call.tensor("x")?)),
    computed("exp", X, |call| unary(call, f32::exp)),
    computed("tanh", X, |call| unary(call, f32::tanh)),
    computed("sqrt", X, |call| unary(call, f32::sqrt)),
    computed("sigmoid", X, |call| unary(call, sigmoid)),
    computed("silu", X, |call| unary(call, |x| x * sigmoid(x))),
    computed("gelu", &["x", "mode"], gelu),
    computed("rsqrt", &["x", "epsilon"], rsqrt),
    computed("clip", &["x", "alpha", "beta"], clip),
    moved("select", &["cond", "a", "b"], select),
    computed("cast", &["x", "dtype"], cast),
];

/// From so many elements on, threads are of use.
const PARALLEL: usize = 1 << 14;

fn unary(call: &mut Call<'_>, f: impl Fn(f32) -> f32 + Sync) -> Result<Vec<Tensor>> {
    let mut x = call.tensor("x")?;
    let described = x.described();
    let Data::Floats(values) = &mut x.data else {
        return Err(Error::malformed(format!("x is {described}, floats were expected")));
    };
    let each = |chunk: &mut [f32]| chunk.iter_mut().for_each(|v| *v = f(*v));
    call.own(values)?.par_chunks_mut(PARALLEL).for_each(each);
    one(x)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// The larger, NaN where one is.
fn larger(a: f32, b: f32) -> f32 {
    if a.is_nan() || a > b { a } else { b }
}

/// Toward minus infinity; `None` for what no integer is.
fn floor_div(a: i32, b: i32) -> Option<i32> {
    let towards_zero = a.checked_div(b)?;
    let is_below = a % b != 0 && (a < 0) != (b < 0);
    Some(towards_zero - i32::from(is_below))
}

/// What remains, with the sign of the divisor.
fn modulo(a: i32, b: i32) -> Option<i32> {
    Some(a.wrapping_sub(b.wrapping_mul(floor_div(a, b)?)))
}

/// The shape of two tensors together: sizes of 1 are repeated, and so is the whole for dimensions that one of the two
/// lacks in front.
///
/// # Errors
/// `Malformed` for sizes that differ.
pub(in super::super) fn broadcast(x: &[usize], y: &[usize]) -> Result<Vec<usize>> {
    let rank = x.len().max(y.len());
    let at = |shape: &[usize], i: usize| (i + shape.len()).checked_sub(rank).map_or(1, |k| shape[k]);
    let one = |i: usize| match (at(x, i), at(y, i)) {
        (a, b) if a == b => Ok(a),
        (1, n) | (n, 1) => Ok(n),
        _ => Err(Error::malformed(format!("shapes {x:?} and {y:?} do not go together"))),
    };
    (0..rank).map(one).collect()
}

/// `f` of each pair.
fn pairs<A: Copy, B: Copy, R>(
    (x, x_shape): (&[A], &[usize]),
    (y, y_shape): (&[B], &[usize]),
    shape: &[usize],
    mut f: impl FnMut(A, B) -> R,
) -> Vec<R> {
    let mut out = Vec::with_capacity(shape.iter().product());
    let strides = repeated(x_shape, shape).into_iter().zip(repeated(y_shape, shape)).map(|(a, b)| [a, b]);
    Walk::new(shape.iter().copied().zip(strides)).rows([0; 2], |[a, b], n, strides| {
        let (x, y) = (&x[a as usize..], &y[b as usize..]);
        match strides {
            [1, 1] => out.extend(x[..n].iter().zip(&y[..n]).map(|(a, b)| f(*a, *b))),
            [1, 0] => out.extend(x[..n].iter().map(|a| f(*a, y[0]))),
            [0, 1] => out.extend(y[..n].iter().map(|b| f(x[0], *b))),
            [s, t] => out.extend((0..n).map(|i| f(x[i * s as usize], y[i * t as usize]))),
        }
    });
    out
}

fn binary(
    call: &mut Call<'_>,
    f: impl Fn(f32, f32) -> f32,
    g: impl Fn(i32, i32) -> Option<i32>,
) -> Result<Vec<Tensor>> {
    let (x, y) = (call.tensor("x")?, call.tensor("y")?);
    same_dtype(&x, &y)?;
    let shape = broadcast(&x.shape, &y.shape)?;
    call.result(&shape)?;
    let data = match (&x.data, &y.data) {
        (Data::Floats(a), Data::Floats(b)) => {
            Data::Floats(Arc::new(pairs((a, &x.shape), (b, &y.shape), &shape, f)))
        }
        (Data::Ints(a), Data::Ints(b)) => {
            let mut fault = None;
            let checked = |a: i32, b: i32| {
                g(a, b).unwrap_or_else(|| {
                    fault.get_or_insert((a, b));
                    0
                })
            };
            let values = pairs((a, &x.shape), (b, &y.shape), &shape, checked);
            if let Some((a, b)) = fault {
                return Err(Error::malformed(format!("{a} and {b} have no such integer")));
            }
            Data::Ints(Arc::new(values))
        }
        _ => return Err(Error::malformed(format!("{} and {} are no numbers", x.described(), y.described()))),
    };
    one(Tensor { dtype: x.dtype, shape, data })
}

fn comparison(
    call: &mut Call<'_>,
    f: impl Fn(f32, f32) -> bool,
    g: impl Fn(i32, i32) -> bool,
) -> Result<Vec<Tensor>> {
    let (x, y) = (call.tensor("x")?, call.tensor("y")?);
    same_dtype(&x, &y)?;
    let shape = broadcast(&x.shape, &y.shape)?;
    call.result(&shape)?;
    let values = match (&x.data, &y.data) {
        (Data::Floats(a), Data::Floats(b)) => pairs((a, &x.shape), (b, &y.shape), &shape, f),
        (Data::Ints(a), Data::Ints(b)) => pairs((a, &x.shape), (b, &y.shape), &shape, g),
        _ => return Err(Error::malformed(format!("{} and {} are no numbers", x.described(), y.described()))),
    };
    one(Tensor::of_bools(shape, values))
}

fn logical(call: &mut Call<'_>, f: impl Fn(bool, bool) -> bool) -> Result<Vec<Tensor>> {
    let (x, y) = (call.tensor("x")?, call.tensor("y")?);
    let (Data::Bools(a), Data::Bools(b)) = (&x.data, &y.data) else {
        let (x, y) = (x.described(), y.described());
        return Err(Error::malformed(format!("{x} and {y} are no truth values")));
    };
    let shape = broadcast(&x.shape, &y.shape)?;
    call.result(&shape)?;
    let values = pairs((a, &x.shape), (b, &y.shape), &shape, f);
    one(Tensor::of_bools(shape, values))
}

fn logical_not(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let x = call.tensor("x")?;
    let Data::Bools(values) = &x.data else {
        return Err(Error::malformed(format!("x is {}, truth values were expected", x.described())));
    };
    call.result(&x.shape)?;
    one(Tensor::of_bools(x.shape.clone(), values.iter().map(|v| !v).collect()))
}

/// The error function: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26; off by less than 1.5e-7.
fn erf(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.327_591_1 * x.abs());
    let series = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592]
        .iter()
        .fold(0.0, |s, c| s * t + c);
    (1.0 - series * t * (-x * x).exp()).copysign(x)
}

fn gelu(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    match call.text("mode")?.as_deref() {
        None | Some("EXACT") => unary(call, |x| {
            let x = f64::from(x);
            (x / 2.0 * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
        }),
        Some("TANH_APPROXIMATION") => {
            let factor = (2.0 / std::f32::consts::PI).sqrt();
            unary(call, move |x| x / 2.0 * (1.0 + (factor * (x + 0.044_715 * x * x * x)).tanh()))
        }
        Some("SIGMOID_APPROXIMATION") => unary(call, |x| x * sigmoid(1.702 * x)),
        Some(other) => Err(Error::unsupported(format!("mode {other:?} is not known"))),
    }
}

fn rsqrt(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let epsilon = call.float("epsilon", 1e-12)?;
    unary(call, |x| 1.0 / (x + epsilon).sqrt())
}

fn clip(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (alpha, beta) = (call.float("alpha", f32::NEG_INFINITY)?, call.float("beta", f32::INFINITY)?);
    unary(call, |x| {
        if x < alpha {
            alpha
        } else if x > beta {
            beta
        } else {
            x
        }
    })
}

fn select(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let (cond, a, b) = (call.tensor("cond")?, call.tensor("a")?, call.tensor("b")?);
    same_dtype(&a, &b)?;
    let Data::Bools(which) = &cond.data else {
        return Err(Error::malformed(format!("cond is {}, truth values were expected", cond.described())));
    };
    let shape = broadcast(&cond.shape, &broadcast(&a.shape, &b.shape)?)?;
    let n = call.result(&shape)?;
    let strides: [Vec<isize>; 3] = [&cond, &a, &b].map(|x| repeated(&x.shape, &shape));
    let dims = (0..shape.len()).map(|i| (shape[i], [strides[0][i], strides[1][i], strides[2][i]]));
    let walk = Walk::new(dims);
    fn choose<T: Copy>(walk: &Walk<3>, n: usize, which: &[bool], a: &[T], b: &[T]) -> Vec<T> {
        let mut out = Vec::with_capacity(n);
        walk.rows([0; 3], |at, n, strides| {
            let place = |k: usize, i: usize| at[k] as usize + i * strides[k] as usize;
            out.extend((0..n).map(|i| match which[place(0, i)] {
                true => a[place(1, i)],
                false => b[place(2, i)],
            }));
        });
        out
    }
    let data = match (&a.data, &b.data) {
        (Data::Floats(a), Data::Floats(b)) => Data::Floats(Arc::new(choose(&walk, n, which, a, b))),
        (Data::Ints(a), Data::Ints(b)) => Data::Ints(Arc::new(choose(&walk, n, which, a, b))),
        (Data::Bools(a), Data::Bools(b)) => Data::Bools(Arc::new(choose(&walk, n, which, a, b))),
        _ => return Err(Error::malformed(format!("a is {}, which is not chosen from", a.described()))),
    };
    one(Tensor { dtype: a.dtype, shape, data })
}

/// Floats lose their fraction, and what an integer cannot hold becomes the nearest that it can; NaN becomes 0.
fn cast(call: &mut Call<'_>) -> Result<Vec<Tensor>> {
    let name = call.text("dtype")?.ok_or_else(|| Error::malformed("dtype is missing"))?;
    let x = call.tensor("x")?;
    use DataType::{Bool, Float16, Float32, Int8, Int16, Int32, UInt8, UInt16};
    let known = [Bool, Float16, Float32, Int8, Int16, Int32, UInt8, UInt16];
    let dtype = known.into_iter().find(|t| t.name() == &*name);
    let dtype = dtype.ok_or_else(|| Error::unsupported(format!("dtype {name:?} is not known")))?;
    let range = match dtype {
        Int8 => -128..=127,
        UInt8 => 0..=255,
        Int16 => -32768..=32767,
        UInt16 => 0..=65535,
        _ => i32::MIN..=i32::MAX,
    };
    call.result(&x.shape)?;
    let clamp = |n: i32| n.clamp(*range.start(), *range.end());
    let is_float = matches!(dtype, Float16 | Float32);
    let data = match x.data {
        Data::Floats(values) if is_float => Data::Floats(values),
        Data::Floats(v) if dtype == Bool => Data::Bools(Arc::new(v.iter().map(|v| *v != 0.0).collect())),
        Data::Floats(v) => Data::Ints(Arc::new(v.iter().map(|v| clamp(*v as i32)).collect())),
        Data::Ints(v) if is_float => Data::Floats(Arc::new(v.iter().map(|v| *v as f32).collect())),
        Data::Ints(v) if dtype == Bool => Data::Bools(Arc::new(v.iter().map(|v| *v != 0).collect())),
        Data::Ints(v) => Data::Ints(Arc::new(v.iter().map(|v| clamp(*v)).collect())),
        Data::Bools(v) if is_float => {
            Data::Floats(Arc::new(v.iter().map(|v| f32::from(u8::from(*v))).collect()))
        }
        Data::Bools(v) if dtype == Bool => Data::Bools(v),
        Data::Bools(v) => Data::Ints(Arc::new(v.iter().map(|v| i32::from(*v)).collect())),
        Data::Text(_) => return Err(Error::malformed("x is a text")),
    };
    one(Tensor { dtype, shape: x.shape, data })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{bools, floats, int, ints, near, of, refused, run, text};
    use super::*;

    fn pair(name: &str, a: f32, b: f32) -> f32 {
        of(name, &[("x", floats(&[], &[a])), ("y", floats(&[], &[b]))]).1[0]
    }

    fn whole(name: &str, a: i32, b: i32) -> i32 {
        run(name, &[("x", int(a)), ("y", int(b))]).unwrap()[0].as_ints().unwrap()[0]
    }

    #[test]
    fn pairs_of_numbers() {
        for (name, of_floats, of_ints) in [
            ("add", -4.0, -4),
            ("sub", -10.0, -10),
            ("mul", -21.0, -21),
            ("real_div", -7.0 / 3.0, -3),
            ("floor_div", -3.0, -3),
            ("mod", 2.0, 2),
            ("maximum", 3.0, 3),
            ("minimum", -7.0, -7),
        ] {
            near(&[pair(name, -7.0, 3.0)], &[of_floats]);
            assert_eq!(whole(name, -7, 3), of_ints, "{name}");
        }
        assert!(pair("maximum", f32::NAN, 1.0).is_nan() && pair("maximum", 1.0, f32::NAN).is_nan());
        assert!(pair("minimum", f32::NAN, 1.0).is_nan() && pair("minimum", 1.0, f32::NAN).is_nan());
        assert_eq!(whole("add", i32::MAX, 1), i32::MIN);
        for name in ["real_div", "mod"] {
            refused(name, &[("x", int(1)), ("y", int(0))], "1 and 0 have no such integer");
        }
        refused("floor_div", &[("x", int(i32::MIN)), ("y", int(-1))], "no such integer");
    }

    #[test]
    fn comparisons() {
        let found = |name: &str| {
            let (x, y) = (ints(&[1, 2, 3]), ints(&[2]));
            let same =
                run(name, &[("x", floats(&[3], &[1.0, 2.0, 3.0])), ("y", floats(&[1], &[2.0]))]).unwrap();
            let found = run(name, &[("x", x), ("y", y)]).unwrap();
            assert_eq!(found, same, "{name}");
            found[0].clone()
        };
        for (name, wanted) in [
            ("less", [true, false, false]),
            ("less_equal", [true, true, false]),
            ("greater", [false, false, true]),
            ("greater_equal", [false, true, true]),
            ("equal", [false, true, false]),
            ("not_equal", [true, false, true]),
        ] {
            assert_eq!(found(name), bools(&wanted), "{name}");
        }
        let (x, y) = (bools(&[true, true, false, false]), bools(&[true, false, true, false]));
        let both = [("x", x.clone()), ("y", y)];
        assert_eq!(run("logical_and", &both).unwrap()[0], bools(&[true, false, false, false]));
        assert_eq!(run("logical_or", &both).unwrap()[0], bools(&[true, true, true, false]));
        assert_eq!(run("logical_not", &[("x", x)]).unwrap()[0], bools(&[false, false, true, true]));
    }

    #[test]
    fn shapes_are_repeated() {
        let (x, y) = (floats(&[2, 1, 2], &[1.0, 2.0, 3.0, 4.0]), floats(&[3, 1], &[10.0, 20.0, 30.0]));
        let (shape, values) = of("add", &[("x", x.clone()), ("y", y)]);
        assert_eq!(shape, [2, 3, 2]);
        assert_eq!(values, [11.0, 12.0, 21.0, 22.0, 31.0, 32.0, 13.0, 14.0, 23.0, 24.0, 33.0, 34.0]);
        assert_eq!(of("mul", &[("x", x.clone()), ("y", floats(&[0, 1], &[]))]).0, [2, 0, 2]);
        refused(
            "add",
            &[("x", x.clone()), ("y", floats(&[3], &[0.0; 3]))],
            "[2, 1, 2] and [3] do not go together",
        );
        refused("add", &[("x", x), ("y", int(1))], "fp32[2,1,2] and int32[] have different types");
        let far = floats(&[1 << 15, 1], &vec![0.0; 1 << 15]);
        let wide = floats(&[1 << 15], &vec![0.0; 1 << 15]);
        refused("add", &[("x", far), ("y", wide)], "more than 536870912 elements");
    }

    /// Values of the functions from tables.
    #[test]
    fn functions() {
        let x = floats(&[4], &[-2.0, -0.5, 0.0, 3.0]);
        let of = |name: &str| of(name, &[("x", x.clone())]).1;
        near(&of("exp"), &[0.135_335_28, 0.606_530_66, 1.0, 20.085_537]);
        near(&of("tanh"), &[-0.964_027_6, -0.462_117_16, 0.0, 0.995_054_7]);
        near(&of("sigmoid"), &[0.119_202_92, 0.377_540_67, 0.5, 0.952_574_1]);
        near(&of("silu"), &[-0.238_405_84, -0.188_770_33, 0.0, 2.857_722_4]);
        near(&of("gelu"), &[-0.045_500_264, -0.154_268_77, 0.0, 2.995_950_3]);
        assert_eq!(of("identity"), [-2.0, -0.5, 0.0, 3.0]);
        let gelu = |mode: &str| run("gelu", &[("x", x.clone()), ("mode", text(mode))]);
        let values = |mode: &str| gelu(mode).unwrap()[0].as_floats().unwrap().to_vec();
        near(&values("EXACT"), &of("gelu"));
        near(&values("TANH_APPROXIMATION"), &[-0.045_402_3, -0.154_286, 0.0, 2.996_362_7]);
        near(&values("SIGMOID_APPROXIMATION"), &[-0.064_340_4, -0.149_611_1, 0.0, 2.981_926_7]);
        assert!(gelu("ERF").unwrap_err().to_string().contains("mode \"ERF\""));
        let (x, four) = (floats(&[1], &[4.0]), floats(&[], &[5.0]));
        near(&super::super::tests::of("sqrt", &[("x", x.clone())]).1, &[2.0]);
        near(&super::super::tests::of("rsqrt", &[("x", x.clone())]).1, &[0.5]);
        near(&super::super::tests::of("rsqrt", &[("x", x), ("epsilon", four)]).1, &[1.0 / 3.0]);
    }

    #[test]
    fn choices_and_bounds() {
        let x = floats(&[4], &[-9.0, -1.0, 2.0, f32::NAN]);
        let clip = [("x", x), ("alpha", floats(&[], &[-2.0])), ("beta", floats(&[], &[1.5]))];
        let found = of("clip", &clip).1;
        assert!(found[..3] == [-2.0, -1.0, 1.5] && found[3].is_nan());
        let (a, b) = (floats(&[2, 1], &[1.0, 2.0]), floats(&[], &[9.0]));
        let (shape, values) = of("select", &[("cond", bools(&[true, false, true])), ("a", a), ("b", b)]);
        assert_eq!((shape, values), (vec![2, 3], vec![1.0, 9.0, 1.0, 2.0, 9.0, 2.0]));
    }

    #[test]
    fn casts() {
        let x = floats(&[5], &[-1.7, 0.0, 2.9, 300.0, f32::NAN]);
        let to = |x: &Tensor, dtype: &str| {
            run("cast", &[("x", x.clone()), ("dtype", text(dtype))]).unwrap()[0].clone()
        };
        assert_eq!(to(&x, "int32").as_ints().unwrap(), [-1, 0, 2, 300, 0]);
        assert_eq!(to(&x, "uint8").as_ints().unwrap(), [0, 0, 2, 255, 0]);
        assert_eq!(to(&x, "bool"), bools(&[true, false, true, true, true]));
        assert_eq!(to(&x, "fp16").dtype(), DataType::Float16);
        assert_eq!(to(&ints(&[-300, 7]), "fp32").as_floats().unwrap(), [-300.0, 7.0]);
        assert_eq!(to(&ints(&[-300, 7]), "int8").as_ints().unwrap(), [-128, 7]);
        assert_eq!(to(&bools(&[true, false]), "fp16").as_floats().unwrap(), [1.0, 0.0]);
        refused("cast", &[("x", x), ("dtype", text("half"))], "dtype \"half\" is not known");
    }
}
