//! Strided copies: how the elements of one tensor lie in another.
//!
//! Permuting rows for RoPE, transposing, slicing, splitting a fused matrix and stacking experts
//! are all the same thing, a nest of loops with a stride on either side. A copy can be turned
//! round, which is what makes `gguf-to-hf` out of `hf-to-gguf`; and it can be cut to a range of
//! its destination, which is what makes streaming possible.

use crate::error::{Error, Result};

/// A read may fetch this many times the bytes it is after, where that saves many small reads.
const WASTE: u64 = 4;
/// And at most this many bytes at once.
const MAX_STRETCH: u64 = 4 << 20;

/// One loop: `n` steps, each `src` elements further in the source and `dst` in the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dim {
    /// Number of steps.
    pub n: u64,
    /// Stride in the source, in elements.
    pub src: u64,
    /// Stride in the destination, in elements.
    pub dst: u64,
}

/// `dst[dst_base + sum(i*dim.dst)] = src[src_base + sum(i*dim.src)]` over all loop indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StridedCopy {
    /// Loops, the largest destination stride first.
    pub dims: Vec<Dim>,
    /// First element in the source.
    pub src_base: u64,
    /// First element in the destination.
    pub dst_base: u64,
}

impl StridedCopy {
    /// A copy from its loops; loops of one step vanish and loops that run on into each other join.
    pub fn new(mut dims: Vec<Dim>, src_base: u64, dst_base: u64) -> Self {
        dims.retain(|d| d.n != 1);
        dims.sort_by_key(|d| std::cmp::Reverse(d.dst));
        let mut joined: Vec<Dim> = Vec::with_capacity(dims.len());
        for d in dims {
            match joined.last_mut() {
                Some(outer) if outer.src == d.n * d.src && outer.dst == d.n * d.dst => {
                    *outer = Dim { n: outer.n * d.n, ..d };
                }
                _ => joined.push(d),
            }
        }
        Self { dims: joined, src_base, dst_base }
    }

    /// The copy of `n` consecutive elements onto themselves.
    pub fn identity(n: u64) -> Self {
        Self::new(vec![Dim { n, src: 1, dst: 1 }], 0, 0)
    }

    /// Number of elements copied.
    pub fn elements(&self) -> u64 {
        self.dims.iter().map(|d| d.n).product()
    }

    /// The same copy from destination to source.
    pub fn inverse(&self) -> Self {
        let dims = self.dims.iter().map(|d| Dim { n: d.n, src: d.dst, dst: d.src }).collect();
        Self::new(dims, self.dst_base, self.src_base)
    }

    /// One past the last source element touched.
    pub fn src_end(&self) -> u64 {
        self.src_base + self.dims.iter().map(|d| d.n.saturating_sub(1) * d.src).sum::<u64>() + 1
    }

    /// One past the last destination element touched.
    pub fn dst_end(&self) -> u64 {
        self.dst_base + self.dims.iter().map(|d| d.n.saturating_sub(1) * d.dst).sum::<u64>() + 1
    }

    /// The same copy counted in blocks of `block` elements, where blocks stay whole.
    pub fn in_blocks(&self, block: u64) -> Option<Self> {
        if block == 1 {
            return Some(self.clone());
        }
        let fits = |x: u64| x.is_multiple_of(block);
        let mut dims = Vec::with_capacity(self.dims.len());
        for d in &self.dims {
            if d.src == 1 && d.dst == 1 && fits(d.n) {
                dims.push(Dim { n: d.n / block, ..*d });
            } else if fits(d.src) && fits(d.dst) {
                dims.push(Dim { n: d.n, src: d.src / block, dst: d.dst / block });
            } else {
                return None;
            }
        }
        let whole = self.dims.iter().any(|d| d.src == 1 && d.dst == 1);
        (whole && fits(self.src_base) && fits(self.dst_base))
            .then(|| Self::new(dims, self.src_base / block, self.dst_base / block))
    }

    /// The parts of this copy whose destination lies in `start..end`.
    ///
    /// Destinations of different loop indices must not overlap, and an outer loop must step over
    /// all that its inner loops cover; copies made by [`Axes`] do.
    pub fn clip(&self, start: u64, end: u64) -> Vec<StridedCopy> {
        let mut parts = Vec::new();
        if self.dims.iter().all(|d| d.n > 0) {
            clip(&self.dims, self.src_base, self.dst_base, start, end, &mut parts);
        }
        parts
    }

    /// Copies into `out`, whose first byte is the destination's unit `start`; units are `size`
    /// bytes. `fetch` reads units of the source from a given one on.
    ///
    /// The source is read as one stretch where that costs at most a few times the bytes that are
    /// wanted, else in halves. `out` must hold all that the copy writes; `scratch` is a buffer to
    /// keep between calls.
    ///
    /// # Errors
    /// As `fetch`.
    pub fn gather(
        &self,
        start: u64,
        size: u64,
        out: &mut [u8],
        scratch: &mut Vec<u8>,
        fetch: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let at = ((self.dst_base - start) * size) as usize;
        if let [] | [Dim { src: 1, dst: 1, .. }] = self.dims[..] {
            let bytes = (self.elements() * size) as usize;
            return fetch(self.src_base, &mut out[at..at + bytes]);
        }
        let extent = (self.src_end() - self.src_base) * size;
        let wanted = self.elements() * size;
        if extent <= MAX_STRETCH.max(2 * size) && extent <= WASTE * wanted {
            scratch.resize(extent as usize, 0);
            fetch(self.src_base, scratch)?;
            scatter(&self.dims, scratch, &mut out[at..], size as usize);
            return Ok(());
        }
        // Halve the loop that reaches furthest in the source.
        let reach = |d: &Dim| (d.n - 1) * d.src;
        let Some(k) =
            (0..self.dims.len()).filter(|&k| self.dims[k].n > 1).max_by_key(|&k| reach(&self.dims[k]))
        else {
            return Ok(());
        };
        let d = self.dims[k];
        let half = d.n / 2;
        for (from, n) in [(0, half), (half, d.n - half)] {
            let mut dims = self.dims.clone();
            dims[k].n = n;
            let (src, dst) = (self.src_base + from * d.src, self.dst_base + from * d.dst);
            Self::new(dims, src, dst).gather(start, size, out, scratch, fetch)?;
        }
        Ok(())
    }
}

/// Cuts the outermost loop to the range and goes down only where a step sticks out of it.
fn clip(dims: &[Dim], src: u64, dst: u64, start: u64, end: u64, out: &mut Vec<StridedCopy>) {
    let Some((d, rest)) = dims.split_first() else {
        if (start..end).contains(&dst) {
            out.push(StridedCopy { dims: Vec::new(), src_base: src, dst_base: dst });
        }
        return;
    };
    let extent = rest.iter().map(|r| (r.n - 1) * r.dst).sum::<u64>() + 1;
    // Steps i with any element in the range: dst + i*d.dst + extent > start, dst + i*d.dst < end.
    if dst >= end {
        return;
    }
    let step = d.dst.max(1);
    let first = (start + 1).saturating_sub(dst + extent).div_ceil(step).min(d.n);
    let last = (end - dst).div_ceil(step).min(d.n); // exclusive
    if first >= last {
        return;
    }
    // Of those, only the first and the last can stick out.
    let whole = |i: u64| {
        let at = dst + i * d.dst;
        at >= start && at + extent <= end
    };
    let lo = if whole(first) { first } else { first + 1 };
    let hi = if last > lo && !whole(last - 1) { last - 1 } else { last };
    let partial =
        |i: u64, out: &mut Vec<StridedCopy>| clip(rest, src + i * d.src, dst + i * d.dst, start, end, out);
    if lo > first {
        partial(first, out);
    }
    if hi > lo {
        let mut dims = vec![Dim { n: hi - lo, ..*d }];
        dims.extend_from_slice(rest);
        out.push(StridedCopy::new(dims, src + lo * d.src, dst + lo * d.dst));
    }
    if hi < last && hi >= lo {
        partial(hi, out);
    }
}

/// Runs the loops over bytes in memory.
fn scatter(dims: &[Dim], src: &[u8], dst: &mut [u8], size: usize) {
    match dims {
        [] => dst[..size].copy_from_slice(&src[..size]),
        [Dim { n, src: 1, dst: 1 }] => {
            let bytes = *n as usize * size;
            dst[..bytes].copy_from_slice(&src[..bytes]);
        }
        [d] => match size {
            2 => strided::<2>(d, src, dst),
            4 => strided::<4>(d, src, dst),
            _ => {
                for i in 0..d.n as usize {
                    let (s, t) = (i * d.src as usize * size, i * d.dst as usize * size);
                    dst[t..t + size].copy_from_slice(&src[s..s + size]);
                }
            }
        },
        [d, rest @ ..] => {
            for i in 0..d.n as usize {
                let (s, t) = (i * d.src as usize * size, i * d.dst as usize * size);
                scatter(rest, &src[s..], &mut dst[t..], size);
            }
        }
    }
}

fn strided<const N: usize>(d: &Dim, src: &[u8], dst: &mut [u8]) {
    let (src, dst) = (src.as_chunks::<N>().0, dst.as_chunks_mut::<N>().0);
    for i in 0..d.n as usize {
        dst[i * d.dst as usize] = src[i * d.src as usize];
    }
}

/// A tensor on its way through transforms: each axis is a list of factors, the outermost first,
/// each with its stride in the source. Rearranging moves factors about; no data is touched.
#[derive(Clone, Debug)]
pub struct Axes {
    axes: Vec<Vec<Factor>>,
    base: u64,
}

#[derive(Clone, Copy, Debug)]
struct Factor {
    n: u64,
    stride: u64,
}

impl Axes {
    /// The untouched tensor of this shape. The shape's element count must fit (see
    /// [`crate::tensor::elements`]).
    pub fn new(shape: &[u64]) -> Self {
        let mut stride = 1;
        let mut axes: Vec<_> = shape
            .iter()
            .rev()
            .map(|&n| {
                let factor = Factor { n, stride };
                stride *= n;
                vec![factor]
            })
            .collect();
        axes.reverse();
        Self { axes, base: 0 }
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> Vec<u64> {
        self.axes.iter().map(|a| a.iter().map(|f| f.n).product()).collect()
    }

    /// Keeps `start..stop` of an axis, every `step`-th of it.
    ///
    /// # Errors
    /// `Malformed` when the range leaves the axis.
    pub fn slice(&mut self, axis: usize, start: u64, stop: u64, step: u64) -> Result<()> {
        let shape = self.shape();
        let n = *shape.get(axis).ok_or_else(|| bad(&shape, format!("no axis {axis}")))?;
        if start > stop || stop > n || step == 0 {
            return Err(bad(&shape, format!("slice {start}..{stop} step {step} of axis {axis}")));
        }
        if (start, stop, step) == (0, n, 1) {
            return Ok(());
        }
        let factors = &mut self.axes[axis];
        // An axis of several factors can be cut at multiples of what the inner ones cover.
        let inner: u64 = factors.iter().skip(1).map(|f| f.n).product();
        let fits = inner == 1 || (step == 1 && start.is_multiple_of(inner) && stop.is_multiple_of(inner));
        let Some(outer) = factors.first_mut().filter(|_| fits) else {
            return Err(bad(&shape, format!("slice {start}..{stop} cuts axis {axis} through a regrouping")));
        };
        self.base += start / inner * outer.stride;
        outer.n = (stop - start).div_ceil(step * inner);
        outer.stride *= step;
        Ok(())
    }

    /// Takes index `i` of the first axis, which goes.
    ///
    /// # Errors
    /// `Malformed` when there is no such index.
    pub fn index(&mut self, i: u64) -> Result<()> {
        self.slice(0, i, i.saturating_add(1), 1)?;
        self.axes.remove(0);
        Ok(())
    }

    /// Regroups axes: `groups[k]` lists the sizes into which axis `k` falls apart, `order` tells
    /// for each new axis the parts it is made of, as positions in the flattened list of parts.
    ///
    /// # Errors
    /// `Malformed` when sizes do not multiply to the axis.
    pub fn regroup(&mut self, groups: &[Vec<u64>], order: &[Vec<usize>]) -> Result<()> {
        let shape = self.shape();
        if groups.len() != self.axes.len() {
            return Err(bad(&shape, format!("{} axes were expected", groups.len())));
        }
        let mut parts: Vec<Vec<Factor>> = Vec::new();
        for (axis, sizes) in self.axes.iter().zip(groups) {
            let mut factors: Vec<Factor> = axis.clone();
            // Take the parts from the inside out, splitting factors where a part ends in one.
            let mut taken = Vec::new();
            for &size in sizes.iter().rev() {
                let mut part = Vec::new();
                let mut want = size;
                while want > 1 {
                    let Some(f) = factors.pop() else {
                        return Err(bad(&shape, format!("does not fall into parts of {sizes:?}")));
                    };
                    if want.is_multiple_of(f.n.max(1)) {
                        want /= f.n.max(1);
                        part.push(f);
                    } else if f.n.is_multiple_of(want) {
                        part.push(Factor { n: want, stride: f.stride });
                        factors.push(Factor { n: f.n / want, stride: f.stride * want });
                        want = 1;
                    } else {
                        return Err(bad(&shape, format!("does not fall into parts of {sizes:?}")));
                    }
                }
                part.reverse();
                taken.push(part);
            }
            if factors.iter().any(|f| f.n != 1) {
                return Err(bad(&shape, format!("does not fall into parts of {sizes:?}")));
            }
            taken.reverse();
            parts.extend(taken);
        }
        self.axes = order
            .iter()
            .map(|axis| axis.iter().flat_map(|&p| parts.get(p).cloned().unwrap_or_default()).collect())
            .collect();
        Ok(())
    }

    /// Of a matrix with rows of `columns` elements, rearranged: all axes but the last, and the last,
    /// one made of the matrix's rows alone and the other of its columns, strides counted in these;
    /// and whether the last is the one made of rows. `None` where they mix.
    pub fn apart(&self, columns: u64) -> Option<(Self, Self, bool)> {
        let (last, rest) = self.axes.split_last()?;
        let columns = columns.max(1);
        let made_of_rows = |f: &Factor| f.n == 1 || f.stride.is_multiple_of(columns);
        let made_of_columns = |f: &Factor| f.n == 1 || f.stride < columns;
        let rest = rest.to_vec();
        let all = |axes: &[Vec<Factor>], made: &dyn Fn(&Factor) -> bool| axes.iter().flatten().all(made);
        let last = vec![last.clone()];
        let turned = if all(&rest, &made_of_rows) && all(&last, &made_of_columns) {
            false
        } else if all(&rest, &made_of_columns) && all(&last, &made_of_rows) {
            true
        } else {
            return None;
        };
        let of_rows = |axes: Vec<Vec<Factor>>| {
            let in_rows = |f: Factor| Factor { n: f.n, stride: f.stride / columns };
            let axes = axes.into_iter().map(|axis| axis.into_iter().map(in_rows).collect()).collect();
            Self { axes, base: self.base / columns }
        };
        let of_columns = |axes| Self { axes, base: self.base % columns };
        Some(if turned {
            (of_columns(rest), of_rows(last), true)
        } else {
            (of_rows(rest), of_columns(last), false)
        })
    }

    /// The same axes where each step is `by` times as long.
    pub fn scaled(mut self, by: u64) -> Self {
        self.axes.iter_mut().flatten().for_each(|f| f.stride *= by);
        self.base *= by;
        self
    }

    /// These axes, then those of `other`, in the same source.
    pub fn then(mut self, other: Self) -> Self {
        self.axes.extend(other.axes);
        self.base += other.base;
        self
    }

    /// The copy that lays these axes out in row-major order from `dst_base`.
    pub fn into_copy(self, dst_base: u64) -> StridedCopy {
        let mut dims: Vec<Dim> = Vec::new();
        let mut dst = 1;
        for f in self.axes.iter().flatten().rev() {
            dims.push(Dim { n: f.n, src: f.stride, dst });
            dst *= f.n;
        }
        dims.reverse();
        StridedCopy::new(dims, self.base, dst_base)
    }
}

fn bad(shape: &[u64], what: String) -> Error {
    Error::malformed(format!("shape {shape:?}: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(copy: &StridedCopy, src: &[u32], dst: &mut [u32]) {
        fn go(dims: &[Dim], s: u64, d: u64, src: &[u32], dst: &mut [u32]) {
            match dims.split_first() {
                None => dst[d as usize] = src[s as usize],
                Some((dim, rest)) => {
                    for i in 0..dim.n {
                        go(rest, s + i * dim.src, d + i * dim.dst, src, dst);
                    }
                }
            }
        }
        go(&copy.dims, copy.src_base, copy.dst_base, src, dst);
    }

    #[test]
    fn rows_and_columns_come_apart() {
        // 4 rows of 6, the rows regrouped, then turned.
        let mut axes = Axes::new(&[4, 6]);
        axes.regroup(&[vec![2, 2], vec![6]], &[vec![1, 0], vec![2]]).unwrap();
        let (rows, columns, turned) = axes.apart(6).unwrap();
        assert!(!turned);
        assert_eq!((rows.shape(), columns.shape()), (vec![4], vec![6]));
        let copy = rows.scaled(3).then(Axes::new(&[3])).into_copy(0);
        let (b, mut out) = ((0..12).collect::<Vec<u32>>(), [0; 12]);
        run(&copy, &b, &mut out);
        assert_eq!(out, [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]);
        let mut axes = Axes::new(&[4, 6]);
        axes.slice(1, 2, 6, 1).unwrap();
        axes.slice(0, 1, 4, 1).unwrap();
        axes.regroup(&[vec![3], vec![4]], &[vec![1], vec![0]]).unwrap();
        let (rows, columns, turned) = axes.apart(6).unwrap();
        assert!(turned);
        assert_eq!((rows.shape(), columns.shape(), rows.base, columns.base), (vec![4], vec![3], 2, 1));
        // A row that is made of both.
        let mut axes = Axes::new(&[4, 6]);
        axes.regroup(&[vec![4], vec![6]], &[vec![], vec![0, 1]]).unwrap();
        assert!(axes.apart(6).is_none());
    }

    #[test]
    fn transpose_and_back() {
        let mut axes = Axes::new(&[2, 3]);
        axes.regroup(&[vec![2], vec![3]], &[vec![1], vec![0]]).unwrap();
        assert_eq!(axes.shape(), [3, 2]);
        let copy = axes.into_copy(0);
        let src: Vec<u32> = (0..6).collect();
        let mut dst = vec![9; 6];
        run(&copy, &src, &mut dst);
        assert_eq!(dst, [0, 3, 1, 4, 2, 5]);
        let mut back = vec![9; 6];
        run(&copy.inverse(), &dst, &mut back);
        assert_eq!(back, src);
    }

    #[test]
    fn slices_with_steps() {
        let mut axes = Axes::new(&[6, 2]);
        axes.slice(0, 1, 6, 2).unwrap();
        assert_eq!(axes.shape(), [3, 2]);
        let src: Vec<u32> = (0..12).collect();
        let mut dst = vec![99; 6];
        run(&axes.into_copy(0), &src, &mut dst);
        assert_eq!(dst, [2, 3, 6, 7, 10, 11]);
        assert!(Axes::new(&[6, 2]).slice(0, 3, 7, 1).is_err());
        assert!(Axes::new(&[6, 2]).slice(2, 0, 1, 1).is_err());
    }

    #[test]
    fn block_units_need_whole_blocks() {
        let rows =
            StridedCopy::new(vec![Dim { n: 4, src: 128, dst: 64 }, Dim { n: 64, src: 1, dst: 1 }], 64, 0);
        let blocks = rows.in_blocks(32).unwrap();
        assert_eq!(blocks.dims, [Dim { n: 4, src: 4, dst: 2 }, Dim { n: 2, src: 1, dst: 1 }]);
        assert_eq!(blocks.src_base, 2);
        assert!(rows.in_blocks(48).is_none());
        let transposed =
            StridedCopy::new(vec![Dim { n: 64, src: 1, dst: 64 }, Dim { n: 64, src: 64, dst: 1 }], 0, 0);
        assert!(transposed.in_blocks(32).is_none());
    }

    proptest! {
        /// A regrouped tensor, clipped at any place, is the sum of its parts, and turns back.
        #[test]
        fn clipping_covers_all(a in 1u64..5, b in 1u64..5, c in 1u64..5, d in 1u64..4, cut in 0u64..400, perm in 0usize..24) {
            let mut left = vec![0, 1, 2, 3];
            let mut order = Vec::new();
            let mut p = perm;
            for k in (1..=4).rev() {
                order.push(left.remove(p % k));
                p /= k;
            }
            let mut axes = Axes::new(&[a * b, c * d]);
            axes.regroup(&[vec![a, b], vec![c, d]], &[vec![order[0], order[1]], vec![order[2], order[3]]]).unwrap();
            let n = a * b * c * d;
            let copy = axes.into_copy(0);
            prop_assert_eq!(copy.elements(), n);
            let src: Vec<u32> = (0..n as u32).collect();
            let mut whole = vec![u32::MAX; n as usize];
            run(&copy, &src, &mut whole);
            prop_assert!(!whole.contains(&u32::MAX));
            let cut = cut % (n + 1);
            let mut cutted = vec![u32::MAX; n as usize];
            for (lo, hi) in [(0, cut), (cut, n)] {
                let parts = copy.clip(lo, hi);
                prop_assert_eq!(parts.iter().map(StridedCopy::elements).sum::<u64>(), hi - lo);
                for part in parts {
                    prop_assert!(part.dst_base >= lo && part.dst_end() <= hi && part.src_end() <= n);
                    run(&part, &src, &mut cutted);
                }
            }
            prop_assert_eq!(&cutted, &whole);
            let mut back = vec![u32::MAX; n as usize];
            run(&copy.inverse(), &whole, &mut back);
            prop_assert_eq!(back, src);
        }
    }
}
