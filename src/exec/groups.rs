//! Which scale or table belongs to an element.

use std::ops::Range;

use crate::error::{Error, Result};

/// Groups of the elements of a tensor: each dimension is cut into equal parts.
#[derive(Debug)]
pub(super) struct Groups {
    /// Size, and how many parts, of each dimension; those that act as one have been joined.
    dims: Vec<(usize, usize)>,
}

impl Groups {
    /// # Errors
    /// `Malformed` where `parts` do not divide `whole`.
    pub(super) fn new(whole: &[usize], parts: &[usize]) -> Result<Self> {
        let divides = |(n, parts): (&usize, &usize)| *parts > 0 && n % parts == 0;
        if whole.len() != parts.len() || !whole.iter().zip(parts).all(divides) {
            return Err(Error::malformed(format!("groups {parts:?} do not divide {whole:?}")));
        }
        let mut dims: Vec<(usize, usize)> = Vec::new();
        for (&size, &parts) in whole.iter().zip(parts) {
            match dims.last_mut() {
                // Parts of whole rows; or a row of its own parts behind the other.
                Some((n, p)) if parts == 1 || *p == *n => {
                    *p *= parts; // divides, so it is no more than the size
                    *n *= size; // within the tensor's elements
                }
                _ => dims.push((size, parts)),
            }
        }
        Ok(Self { dims })
    }

    /// The group of the element at this place.
    pub(super) fn of(&self, at: usize) -> usize {
        let mut group = 0;
        self.runs(at, 1, |of, _| group = of);
        group
    }

    /// Calls `each` with every stretch of one group among the `n` elements from `first` on: the group, and where the
    /// stretch is, counted from `first`.
    pub(super) fn runs(&self, first: usize, n: usize, mut each: impl FnMut(usize, Range<usize>)) {
        let mut done = 0;
        if let [(size, parts)] = self.dims[..] {
            // Nearly all weights: one group behind the other.
            let part = size / parts;
            let (mut group, mut left) = (first / part.max(1), part - first % part.max(1));
            while done < n {
                let len = left.min(n - done);
                each(group, done..done + len);
                (group, left, done) = (group + 1, part, done + len);
            }
            return;
        }
        while done < n {
            let (mut at, mut group, mut groups, mut left) = (first + done, 0, 1, n - done);
            for (i, (size, parts)) in self.dims.iter().enumerate().rev() {
                let (place, part) = (at % size, size / parts);
                if i + 1 == self.dims.len() {
                    left = left.min(part - place % part);
                }
                (group, groups) = (group + place / part * groups, groups * parts);
                at /= size;
            }
            each(group, done..done + left);
            done += left;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the definition: each place divided by the size of the parts.
    #[test]
    fn groups_of_every_place() {
        for (whole, parts) in [
            (vec![8, 6], vec![8, 1]),
            (vec![8, 6], vec![8, 3]),
            (vec![8, 6], vec![2, 1]),
            (vec![8, 6], vec![1, 1]),
            (vec![8, 6], vec![4, 2]),
            (vec![8, 6], vec![1, 6]),
            (vec![8, 6], vec![8, 6]),
            (vec![2, 4, 6], vec![2, 2, 3]),
            (vec![2, 4, 6], vec![1, 4, 1]),
            (vec![4, 6, 1, 1], vec![4, 3, 1, 1]),
            (vec![5], vec![1]),
            (vec![], vec![]),
        ] {
            let groups = Groups::new(&whole, &parts).unwrap();
            let n: usize = whole.iter().product();
            let wanted = |at: usize| {
                let (mut at, mut group, mut factor) = (at, 0, 1);
                for (size, parts) in whole.iter().zip(&parts).rev() {
                    group += at % size / (size / parts) * factor;
                    (at, factor) = (at / size, factor * parts);
                }
                group
            };
            for first in 0..n {
                let mut found = vec![usize::MAX; n - first];
                groups.runs(first, n - first, |group, run| found[run].fill(group));
                assert!((first..n).map(wanted).eq(found), "{whole:?} in {parts:?} from {first}");
                assert_eq!(groups.of(first), wanted(first));
            }
        }
        for (whole, parts) in [(vec![8, 6], vec![3, 1]), (vec![8], vec![8, 1]), (vec![8], vec![0])] {
            assert!(Groups::new(&whole, &parts).is_err());
        }
    }
}
