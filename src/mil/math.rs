//! Operations by short names, for what reads like a formula.

use super::builder::{Arg, Builder, Value};
use crate::error::Result;

/// One of the methods below: the operation has the parameters, in this order, and one result of the name given first.
macro_rules! operations {
    ($($(#[$doc:meta])* $method:ident = $kind:literal($($parameter:ident),*) $({$($fixed:ident: $value:expr),*})?;)*) => {
        impl Builder<'_> {$(
            $(#[$doc])*
            ///
            /// # Errors
            /// As [`Builder::op`].
            pub fn $method<'a>(&mut self, name: &str, $($parameter: impl Into<Arg<'a>>),*) -> Result<Value> {
                let inputs = [
                    $((stringify!($parameter), $parameter.into()),)*
                    $($((stringify!($fixed), Arg::from($value)),)*)?
                ];
                self.op($kind, name, inputs)
            }
        )*}
    };
}

operations! {
    /// `x + y`.
    add = "add"(x, y);
    /// `x - y`.
    sub = "sub"(x, y);
    /// `x y`.
    mul = "mul"(x, y);
    /// `x / y`.
    div = "real_div"(x, y);
    /// The larger of both.
    maximum = "maximum"(x, y);
    /// The smaller of both.
    minimum = "minimum"(x, y);
    /// `x`, at least `alpha` and at most `beta`.
    clip = "clip"(x, alpha, beta);
    /// Whether `x < y`.
    less = "less"(x, y);
    /// Whether `x >= y`.
    greater_equal = "greater_equal"(x, y);
    /// Either.
    logical_or = "logical_or"(x, y);
    /// Elements as another type.
    cast = "cast"(x, dtype);
    /// `tanh(x)`.
    tanh = "tanh"(x);
    /// `1 / (1 + exp(-x))`.
    sigmoid = "sigmoid"(x);
    /// `x / (1 + exp(-x))`.
    silu = "silu"(x);
    /// `x` times the normal distribution's share below `x`; `mode` is `EXACT` or `TANH_APPROXIMATION`.
    gelu = "gelu"(x, mode);
    /// `exp(x)` divided by its sum along an axis.
    softmax = "softmax"(x, axis);
    /// The sum along axes, which stay with a size of 1.
    sum = "reduce_sum"(x, axes) { keep_dims: true };
    /// The largest along axes, which stay with a size of 1.
    max = "reduce_max"(x, axes) { keep_dims: true };
    /// `x y^T`, for the last two axes.
    matmul_transposed = "matmul"(x, y) { transpose_y: true };
    /// `x y`, for the last two axes.
    matmul = "matmul"(x, y);
    /// The shape, as integers.
    shape = "shape"(x);
    /// Elements in another shape, in which one size may be -1.
    reshape = "reshape"(x, shape);
    /// Axes in another order.
    transpose = "transpose"(x, perm);
    /// Axes of size 1 more.
    expand_dims = "expand_dims"(x, axes);
    /// Axes of size 1 less.
    squeeze = "squeeze"(x, axes);
    /// Repeated along each axis so many times.
    tile = "tile"(x, reps);
    /// One behind the other.
    concat = "concat"(values, axis);
    /// Those at these places, which are not negative.
    gather = "gather"(x, indices, axis) { batch_dims: 0, validate_indices: false };
    /// Integers from `start` to below `end`.
    range = "range_1d"(end, start) { step: 1 };
    /// From `begin` to below `end`.
    slice = "slice_by_index"(x, begin, end);
}

impl Builder<'_> {
    /// Parts of these sizes along an axis.
    ///
    /// # Errors
    /// As [`Builder::op`].
    pub fn split<const N: usize>(
        &mut self,
        names: [&str; N],
        x: &Value,
        sizes: [i64; N],
        axis: i64,
    ) -> Result<[Value; N]> {
        let inputs = [("x", x.into()), ("split_sizes", sizes.into()), ("axis", axis.into())];
        self.ops("split", names, inputs)
    }
}
