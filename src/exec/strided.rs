//! Elements at regular places: what slices, transposes and repetitions have in common.

/// A dimension: how many elements, and how far from one to the next.
pub(super) type Dim = (usize, isize);

/// Distances between neighbours of a row-major tensor.
pub(super) fn strides(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i].max(1) as isize; // within the tensor's elements
    }
    strides
}

/// Those of a tensor that is repeated to `shape`: 0 where its own size is 1, and in front.
pub(super) fn repeated(own: &[usize], shape: &[usize]) -> Vec<isize> {
    let own_strides = strides(own);
    let front = shape.len().saturating_sub(own.len());
    let at = |i: usize| match i.checked_sub(front) {
        Some(k) if own[k] != 1 => own_strides[k],
        _ => 0,
    };
    (0..shape.len()).map(at).collect()
}

/// Places of `N` tensors walked together, in order: dimensions that can be walked as one are.
pub(super) struct Walk<const N: usize> {
    dims: Vec<(usize, [isize; N])>,
}

impl<const N: usize> Walk<N> {
    pub(super) fn new(dims: impl IntoIterator<Item = (usize, [isize; N])>) -> Self {
        let mut joined: Vec<(usize, [isize; N])> = Vec::new();
        for (n, strides) in dims {
            match joined.last_mut() {
                _ if n == 1 => {}
                Some((outer, outer_strides))
                    if (0..N).all(|k| outer_strides[k] == strides[k] * n as isize) && n > 0 =>
                {
                    (*outer, *outer_strides) = (*outer * n, strides);
                }
                _ => joined.push((n, strides)),
            }
        }
        Self { dims: joined }
    }

    /// Calls `each` for every row of the innermost dimension: where it begins in each tensor, how long it is, how far
    /// apart its elements are.
    pub(super) fn rows(&self, base: [isize; N], mut each: impl FnMut([isize; N], usize, [isize; N])) {
        let Some(((n, strides), outer)) = self.dims.split_last() else { return each(base, 1, [1; N]) };
        if self.dims.iter().any(|(n, _)| *n == 0) {
            return;
        }
        let (mut at, mut place) = (vec![0; outer.len()], base);
        loop {
            each(place, *n, *strides);
            let mut i = outer.len();
            loop {
                if i == 0 {
                    return;
                }
                i -= 1;
                let (size, strides) = &outer[i];
                at[i] += 1;
                if at[i] < *size {
                    (0..N).for_each(|k| place[k] += strides[k]);
                    break;
                }
                (0..N).for_each(|k| place[k] -= strides[k] * (at[i] - 1) as isize);
                at[i] = 0;
            }
        }
    }
}

/// The elements of `source` at these places, in order. All places lie within it.
pub(super) fn take<T: Copy>(source: &[T], base: isize, dims: &[Dim]) -> Vec<T> {
    let mut out = Vec::with_capacity(dims.iter().map(|(n, _)| n).product());
    Walk::new(dims.iter().map(|(n, s)| (*n, [*s]))).rows([base], |[base], n, [stride]| match stride {
        1 => out.extend_from_slice(&source[base as usize..][..n]),
        0 => out.extend(std::iter::repeat_n(source[base as usize], n)),
        _ => out.extend((0..n as isize).map(|i| source[(base + i * stride) as usize])),
    });
    out
}

/// Puts `values` in order at these places of `target`. All places lie within it.
pub(super) fn put<T: Copy>(values: &[T], target: &mut [T], base: isize, dims: &[Dim]) {
    let mut rest = values;
    Walk::new(dims.iter().map(|(n, s)| (*n, [*s]))).rows([base], |[base], n, [stride]| {
        let (row, others) = rest.split_at(n);
        rest = others;
        match stride {
            1 => target[base as usize..][..n].copy_from_slice(row),
            _ => row.iter().zip(0..).for_each(|(v, i)| target[(base + i * stride) as usize] = *v),
        }
    });
}
