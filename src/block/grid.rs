//! What the types share whose codes are points of a grid: the points, and the search for them.
//!
//! A grid is a set of vectors of `D` small codes: 8 codes of 3 levels, or 4 codes of 8. Blocks store
//! a point's index, in about as many bits as the point has weights. The search takes the code
//! vector that rounding gives; where that is no point, it tries the points of the nearest
//! *shells*: those at the least distance between codes, at the next to least, and so on. Their
//! order, by distance and then by index, settles ties.
//! Source: `iq2xs_init_impl`, `iq3xs_init_impl` (`ggml-quants.c`).
// Loops over lanes and groups go by index: several arrays run along.
#![allow(clippy::needless_range_loop)]

/// Candidates that are compared side by side.
pub(super) const LANES: usize = 8;

/// Reads a file of `formats/block`: words in hexadecimal of one width each, a separator after each.
///
/// A word holds a point's codes, the first in its low bits: 2 bits a code where there are 8, 3 bits
/// where there are 4.
pub(super) const fn words<const N: usize>(text: &[u8]) -> [u16; N] {
    let width = text.len() / N;
    assert!(text.len() == N * width, "as many words as the grid has points");
    let mut words = [0; N];
    let mut n = 0;
    while n < N {
        let mut i = n * width;
        while i < (n + 1) * width - 1 {
            let digit = match text[i] {
                c @ b'0'..=b'9' => c - b'0',
                c @ b'a'..=b'f' => c - b'a' + 10,
                _ => panic!("not a hexadecimal digit"),
            };
            words[n] = words[n] << 4 | digit as u16;
            i += 1;
        }
        n += 1;
    }
    words
}

/// The points of `words` with `levels` for codes.
pub(super) const fn points<const N: usize, const D: usize, const L: usize>(
    words: &[u16; N],
    levels: &[i8; L],
) -> [[i8; D]; N] {
    let mut points = [[0; D]; N];
    let mut n = 0;
    while n < N {
        let mut i = 0;
        while i < D {
            points[n][i] = levels[code::<D>(words[n], i) as usize];
            i += 1;
        }
        n += 1;
    }
    points
}

/// Code `i` of a word.
const fn code<const D: usize>(word: u16, i: usize) -> u8 {
    assert!(D == 8 || D == 4);
    if D == 8 { (word >> (2 * i) & 3) as u8 } else { (word >> (3 * i) & 7) as u8 }
}

/// Words of eight points, the candidates of a code vector. The last of a list is repeated to fill
/// its lanes, which changes nothing where the first of equals wins.
pub(super) type Candidates = [u16; LANES];

/// A grid as encoders need it. To be built once: it takes some milliseconds.
pub(super) struct Grid<const D: usize> {
    levels: usize,
    /// For the code vector `c`, at index `sum(c[i] * levels^i)`.
    map: Box<[Entry]>,
    /// For each code vector that is a point, which one it is.
    points: Box<[u16]>,
    near: Box<[Candidates]>,
}

/// Where the candidates of a code vector begin, how many eights there are, and whether it is a
/// point: one word, because the search waits for memory more than it calculates.
#[derive(Clone, Copy, Default)]
struct Entry(u32);

/// What [`Grid::find`] finds.
pub(super) struct Found<'a> {
    /// Whether the code vector is a point.
    pub exact: bool,
    /// The points near it, itself alone if it is one. Never empty.
    pub near: &'a [Candidates],
}

impl<const D: usize> Grid<D> {
    /// The grid of `words`, whose codes are below `levels`, with neighbours out of the `shells`
    /// nearest shells.
    pub(super) fn new(words: &[u16], levels: usize, shells: usize) -> Self {
        let codes: [Vec<u8>; D] = std::array::from_fn(|i| words.iter().map(|&w| code::<D>(w, i)).collect());
        let mut map = vec![Entry::default(); levels.pow(D as u32)];
        let mut points = vec![0; map.len()];
        let mut near = Vec::new();
        let mut distances = vec![0u8; words.len()];
        let mut list = Vec::new();
        for (index, entry) in map.iter_mut().enumerate() {
            distances.fill(0);
            let mut rest = index;
            for codes in &codes {
                let own = (rest % levels) as u8;
                rest /= levels;
                for (distance, &code) in distances.iter_mut().zip(codes) {
                    let step = code.abs_diff(own);
                    *distance += step * step;
                }
            }
            // The distance of the farthest shell that counts.
            let mut farthest = distances.iter().copied().fold(u8::MAX, u8::min);
            if farthest > 0 {
                for _ in 1..shells {
                    let further = |d: u8| if d > farthest { d } else { u8::MAX };
                    farthest = distances.iter().fold(u8::MAX, |least, &d| least.min(further(d)));
                }
            }
            list.clear();
            list.extend((0u16..).zip(distances.iter().copied()).filter(|(_, d)| *d <= farthest));
            let exact = farthest == 0;
            if exact {
                points[index] = list[0].0;
            }
            list.sort_by_key(|(_, d)| *d);
            let start = near.len();
            for eight in list.chunks(LANES) {
                near.push(std::array::from_fn(|c| words[usize::from(eight[c.min(eight.len() - 1)].0)]));
            }
            *entry = Entry((start << 8 | (near.len() - start) << 1) as u32 | u32::from(exact));
        }
        Self { levels, map: map.into(), points: points.into(), near: near.into() }
    }

    /// What there is at the code vector of `index`.
    #[inline(always)]
    pub(super) fn find(&self, index: usize) -> Found<'_> {
        let Entry(entry) = self.map[index];
        let (start, count) = ((entry >> 8) as usize, (entry >> 1 & 127) as usize);
        Found { exact: entry & 1 != 0, near: &self.near[start..start + count] }
    }

    /// The index of the point whose word this is.
    pub(super) fn point(&self, word: u16) -> u16 {
        let index = (0..D).rev().fold(0, |index, i| index * self.levels + usize::from(code::<D>(word, i)));
        self.points[index]
    }
}

/// Bit 7 is set where that makes the number of bits even: what seven signs leave to the eighth.
pub(super) const EVEN: [u8; 128] = {
    let mut signs = [0; 128];
    let mut n = 0;
    while n < 128 {
        signs[n] = n as u8 | (n.count_ones() as u8 & 1) << 7;
        n += 1;
    }
    signs
};

/// Eight weights: a point's levels by `d`, with a minus where the sign's bit is set.
#[inline(always)]
pub(super) fn decode_eight(d: f32, levels: &[i8; 8], signs: u8, y: &mut [f32; 8]) {
    for i in 0..8 {
        let minus = u32::from(signs) << (31 - i) & 1 << 31;
        y[i] = f32::from_bits((d * f32::from(levels[i])).to_bits() ^ minus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Indexes of the points near the code vector of an index, by the definition.
    fn near<const D: usize>(words: &[u16], levels: usize, shells: usize, index: usize) -> Vec<u16> {
        let mut list: Vec<(u32, u16)> = (0..)
            .zip(words)
            .map(|(n, &word)| {
                let own = |i| (index / levels.pow(i as u32) % levels) as i32;
                ((0..D).map(|i| (i32::from(code::<D>(word, i)) - own(i)).pow(2) as u32).sum(), n)
            })
            .collect();
        list.sort_unstable();
        let mut distances: Vec<u32> = list.iter().map(|(d, _)| *d).collect();
        distances.dedup();
        let farthest = if distances[0] == 0 { 0 } else { distances[shells.min(distances.len()) - 1] };
        list.into_iter().filter(|(d, _)| *d <= farthest).map(|(_, n)| n).collect()
    }

    fn check<const D: usize>(words: &[u16], levels: usize, shells: usize) {
        let grid = Grid::<D>::new(words, levels, shells);
        let (mut longest, mut sum, mut chunks) = (0, 0, 0);
        for index in 0..levels.pow(D as u32) {
            let expected = near::<D>(words, levels, shells, index);
            let found = grid.find(index);
            longest = longest.max(expected.len());
            sum += expected.len();
            chunks += found.near.len();
            assert_eq!(
                found.exact,
                expected.len() == 1 && grid.point(words[usize::from(expected[0])]) == expected[0] && {
                    let word = words[usize::from(expected[0])];
                    (0..D).all(|i| usize::from(code::<D>(word, i)) == index / levels.pow(i as u32) % levels)
                }
            );
            let mut list: Vec<u16> = found.near.as_flattened().to_vec();
            let padding = list.split_off(expected.len());
            assert_eq!(list, expected.iter().map(|&p| words[usize::from(p)]).collect::<Vec<_>>());
            assert!(padding.len() < LANES && padding.iter().all(|p| p == list.last().unwrap()));
            assert!(expected.iter().all(|&p| grid.point(words[usize::from(p)]) == p));
        }
        println!("{} points: {sum} near, {chunks} chunks, {longest} at most", words.len());
    }

    #[test]
    fn neighbours_are_those_of_the_nearest_shells() {
        check::<8>(&words::<256>(include_bytes!("../../formats/block/iq2_xxs.txt")), 3, 2);
        check::<8>(&words::<512>(include_bytes!("../../formats/block/iq2_xs.txt")), 3, 2);
        check::<8>(&words::<1024>(include_bytes!("../../formats/block/iq2_s.txt")), 3, 1);
        check::<8>(&words::<2048>(include_bytes!("../../formats/block/iq1_s.txt")), 3, 3);
        check::<4>(&words::<256>(include_bytes!("../../formats/block/iq3_xxs.txt")), 8, 2);
        check::<4>(&words::<512>(include_bytes!("../../formats/block/iq3_s.txt")), 8, 3);
    }
}
