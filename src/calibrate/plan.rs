//! What second moments take: units that are held and written apart, and the passes over the text in
//! which they fit the memory.

use std::ops::Range;

use super::gram::{band_len, bands, panel_bytes};
use crate::container::gguf::write::Layout;
use crate::container::moments::{Contents, Input, Places};
use crate::error::{Error, Result};

/// The smallest part of the work: one band of a triangle, or what is summed besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Which input.
    pub input: usize,
    /// Which of its matrices.
    pub expert: u64,
    /// Which band; `None` for count, sum and sum of magnitudes.
    pub band: Option<u64>,
}

impl Unit {
    /// Values in f64 that it sums up.
    pub fn len(&self, input: &Input) -> u64 {
        self.band.map_or(1 + 2 * input.columns, |b| band_len(input.columns, b))
    }
}

/// Bytes that a unit takes beside its values.
const UNIT_OVERHEAD: u64 = 128;
/// Bytes of buffers for files.
pub(super) const BUFFER: usize = 64 << 10;

/// The work, laid out.
#[derive(Debug)]
pub struct Plan {
    /// What the file will state.
    pub contents: Contents,
    /// The file.
    pub layout: Layout,
    /// Where the numbers of each input go.
    pub places: Vec<Places>,
    /// Units in all.
    pub units: u64,
    /// Bytes that each pass needs beside its units: tokens' inputs in panels, buffers.
    pub scratch: u64,
    // The number of the first unit of each input.
    firsts: Vec<u64>,
}

impl Plan {
    /// Lays the work out. `rows` are the most inputs that one computation shows of a token batch;
    /// `copied` says whether their values have to be copied to be seen.
    ///
    /// # Errors
    /// As [`Contents::layout`].
    pub fn new(contents: Contents, rows: u64, copied: bool) -> Result<Self> {
        let (layout, places) = contents.layout()?;
        let mut firsts = Vec::with_capacity(contents.inputs.len());
        let mut units = 0u64;
        let mut scratch = 0;
        for input in &contents.inputs {
            firsts.push(units);
            units += input.experts * (1 + bands(input.columns));
            let indices = if input.experts > 1 { rows * 24 } else { rows * 8 };
            let copy = if copied { rows * input.columns * 4 } else { 0 };
            scratch = scratch.max(panel_bytes(input.columns) + indices + copy);
        }
        Ok(Self { contents, layout, places, units, scratch: scratch + 4 * BUFFER as u64, firsts })
    }

    /// Unit `n`.
    pub fn unit(&self, n: u64) -> Option<Unit> {
        let input = self.firsts.partition_point(|&first| first <= n).checked_sub(1)?;
        let each = 1 + bands(self.contents.inputs.get(input)?.columns);
        let n = n - self.firsts.get(input)?;
        Some(Unit { input, expert: n / each, band: (n % each).checked_sub(1) })
            .filter(|u| self.contents.inputs.get(input).is_some_and(|i| u.expert < i.experts))
    }

    /// Values of unit `n`.
    pub fn unit_len(&self, n: u64) -> u64 {
        self.unit(n).and_then(|u| Some(u.len(self.contents.inputs.get(u.input)?))).unwrap_or(0)
    }

    /// Bytes in memory of some units.
    pub fn bytes(&self, units: Range<u64>) -> u64 {
        units.map(|n| self.unit_len(n) * 8 + UNIT_OVERHEAD).sum()
    }

    /// The units from `first` on that fit into `budget` bytes with what else is needed.
    ///
    /// # Errors
    /// `Misuse` when not one fits.
    pub fn pass(&self, first: u64, budget: u64) -> Result<Range<u64>> {
        let room = budget.saturating_sub(self.scratch);
        let (mut end, mut bytes) = (first, 0u64);
        while end < self.units {
            bytes += self.bytes(end..end + 1);
            if bytes > room {
                break;
            }
            end += 1;
        }
        if end == first && first < self.units {
            let least = self.scratch + self.bytes(first..first + 1);
            return Err(Error::misuse(format!("{budget} bytes of memory are too few, {least} are needed"))
                .hint(
                    "give more with --max-memory; chosen matrices with fewer columns (--tensors) need less",
                ));
        }
        Ok(first..end)
    }

    /// All passes from unit `first` on.
    ///
    /// # Errors
    /// As [`Self::pass`].
    pub fn passes(&self, first: u64, budget: u64) -> Result<Vec<Range<u64>>> {
        let mut passes: Vec<Range<u64>> = Vec::new();
        let mut at = first;
        while at < self.units {
            let pass = self.pass(at, budget)?;
            at = pass.end;
            passes.push(pass);
        }
        Ok(passes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let input = |name: &str, columns, experts| Input {
            name: name.into(),
            weights: vec![name.into()],
            columns,
            experts,
        };
        let inputs = vec![input("a.weight", 70, 1), input("b.weight", 33, 3), input("c.weight", 5, 1)];
        Plan::new(Contents { model: "m".into(), texts: Vec::new(), inputs }, 16, false).unwrap()
    }

    #[test]
    fn units_cover_everything_once() {
        let plan = plan();
        assert_eq!(plan.units, 4 + 3 * 3 + 2);
        let all: Vec<Unit> = (0..plan.units).map(|n| plan.unit(n).unwrap()).collect();
        assert_eq!(all[0], Unit { input: 0, expert: 0, band: None });
        assert_eq!(all[3], Unit { input: 0, expert: 0, band: Some(2) });
        assert_eq!(all[9], Unit { input: 1, expert: 1, band: Some(1) });
        assert_eq!(all[14], Unit { input: 2, expert: 0, band: Some(0) });
        assert_eq!(plan.unit(plan.units), None);
        let values: u64 = (0..plan.units).map(|n| plan.unit_len(n)).sum();
        assert_eq!(values, 70 * 71 / 2 + 141 + 3 * (33 * 34 / 2 + 67) + 15 + 11);
    }

    #[test]
    fn passes_fit_and_join() {
        let plan = plan();
        for budget in [plan.scratch + 20_000, plan.scratch + 24_000, 1 << 30] {
            let passes = plan.passes(0, budget).unwrap();
            assert!(passes.iter().all(|p| plan.scratch + plan.bytes(p.clone()) <= budget));
            assert!(passes.windows(2).all(|p| p[0].end == p[1].start));
            assert_eq!(passes.last().unwrap().end, plan.units);
        }
        assert_eq!(plan.passes(0, 1 << 30).unwrap().len(), 1);
        let error = plan.passes(0, plan.scratch).unwrap_err();
        assert!(error.to_string().contains("too few"), "{error}");
    }
}
