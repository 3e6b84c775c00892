//! Quantizers that know what a matrix is for: from the second moments of its inputs they choose codes
//! so that its output changes least, on the grids that the block types have.
//!
//! Adding a method: one file here, a variant of [`Method`] and its row in [`Method::NAMES`].

pub mod adaround;
pub mod awq;
pub mod descent;
pub mod gptq;
pub mod palette;
#[cfg(test)]
pub(crate) mod sample;
pub mod ternary;

use crate::block::Lattice;
use crate::block::uniform::Grid;
use crate::container::grouped::Rows;
use crate::container::moments::{Input, Moments};
use crate::error::{Error, Result};

/// How codes are chosen where second moments are known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// One weight after the other, with feedback of the error.
    Gptq(gptq::Options),
    /// The same, then codes and scales moved where that pays.
    Trainable(descent::Options),
    /// Scales rest: one of two levels for each weight by gradient, then codes moved where that pays.
    AdaRound(adaround::Options),
    /// For the types with three levels: their scales and thresholds as well.
    Ternary(ternary::Options),
}

/// Options of methods, where the user sets them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tuning {
    /// What is added to the diagonal of second moments, in parts of its mean.
    pub damp: Option<f64>,
    /// Whether columns are rounded in the order of their mean squares.
    pub desc_act: Option<bool>,
    /// Steps of `adaround`, rounds of `trainable` and `ternary`.
    pub iters: Option<usize>,
    /// The size of a step of `adaround`.
    pub lr: Option<f32>,
    /// Columns that a step of `adaround` moves.
    pub batch: Option<usize>,
    /// The last stage of `ternary`.
    pub ternary_stage: Option<ternary::Stage>,
}

impl Tuning {
    /// The options that are set, as the command line calls them.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let Self { damp, desc_act, iters, lr, batch, ternary_stage } = self;
        let each = [
            damp.map(|_| "damp-percent"),
            desc_act.map(|_| "desc-act"),
            iters.map(|_| "iters"),
            lr.map(|_| "lr"),
            batch.map(|_| "batch"),
            ternary_stage.map(|_| "ternary-stage"),
        ];
        each.into_iter().flatten()
    }
}

/// What a method made of the moments of an input, for all rows that read it.
#[derive(Debug)]
pub enum Prepared {
    /// For GPTQ.
    Gptq(gptq::Feedback),
    /// For AdaRound.
    AdaRound(adaround::AdaRound),
    /// For descent on codes and scales.
    Trainable(descent::Descent),
    /// For ternary weights.
    Ternary(ternary::Ternary),
}

/// A name, and the method as it is without options.
pub type Named = (&'static str, fn() -> Method);

impl Method {
    /// Every method by its name, as it is without options.
    pub const NAMES: &[Named] = &[
        ("gptq", || Self::Gptq(gptq::Options::default())),
        ("trainable", || Self::Trainable(descent::Options::default())),
        ("adaround", || Self::AdaRound(adaround::Options::default())),
        ("ternary", || Self::Ternary(ternary::Options::default())),
    ];

    /// By its name, as it is without options.
    pub fn parse(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(own, _)| *own == name).map(|(_, new)| new())
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Gptq(_) => "gptq",
            Self::Trainable(_) => "trainable",
            Self::AdaRound(_) => "adaround",
            Self::Ternary(_) => "ternary",
        }
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::NAMES.iter().map(|(name, _)| *name)
    }

    /// Sets the options it has, and returns those that it has not.
    pub fn tune(&mut self, tuning: &Tuning) -> Tuning {
        fn take<T>(own: &mut T, given: &mut Option<T>) {
            if let Some(given) = given.take() {
                *own = given;
            }
        }
        let mut rest = *tuning;
        let gptq = match self {
            Self::Gptq(options) => options,
            Self::Trainable(options) => &mut options.start,
            Self::AdaRound(options) => &mut options.descent.start,
            Self::Ternary(options) => &mut options.descent.start,
        };
        take(&mut gptq.damp, &mut rest.damp);
        take(&mut gptq.desc_act, &mut rest.desc_act);
        match self {
            Self::Gptq(_) => {}
            Self::Trainable(options) => take(&mut options.iters, &mut rest.iters),
            Self::AdaRound(options) => {
                take(&mut options.iters, &mut rest.iters);
                take(&mut options.lr, &mut rest.lr);
                take(&mut options.batch, &mut rest.batch);
            }
            Self::Ternary(options) => {
                take(&mut options.descent.iters, &mut rest.iters);
                take(&mut options.stage, &mut rest.ternary_stage);
            }
        }
        rest
    }

    /// Bytes that preparing for an input of so many columns takes at most, and those that are then kept.
    pub fn bytes(&self, columns: u64) -> (u64, u64) {
        match self {
            Self::Gptq(_) => gptq::Feedback::bytes(columns),
            Self::AdaRound(_) | Self::Trainable(_) | Self::Ternary(_) => descent::Descent::bytes(columns),
        }
    }

    /// Fewest tokens that an input must have been seen with.
    pub fn least_tokens(&self) -> u64 {
        64
    }

    /// Prepares for the rows of one expert (0 where there are none), whose columns were multiplied with
    /// `scales`, and what they read divided.
    ///
    /// # Errors
    /// As the moments can be read; as the method says.
    pub fn prepare(
        &self,
        moments: &Moments,
        input: &Input,
        expert: u64,
        scales: Option<&[f32]>,
    ) -> Result<Prepared> {
        let count = moments.counts(input)?.get(expert as usize).copied().unwrap_or(0);
        self.prepare_from(&OfExpert { moments, input, expert, scales }, count)
    }

    /// The same from sums over `count` tokens, wherever they come from.
    ///
    /// # Errors
    /// As the sums can be read; as the method says.
    pub fn prepare_from(&self, sums: &dyn gptq::Sums, count: u64) -> Result<Prepared> {
        match self {
            Self::Gptq(options) => Ok(Prepared::Gptq(gptq::Feedback::new(sums, count, options)?)),
            Self::AdaRound(options) => Ok(Prepared::AdaRound(adaround::AdaRound::new(sums, count, options)?)),
            Self::Trainable(options) => Ok(Prepared::Trainable(descent::Descent::new(sums, count, options)?)),
            Self::Ternary(options) => Ok(Prepared::Ternary(ternary::Ternary::new(sums, count, options)?)),
        }
    }
}

impl Prepared {
    /// The moments, as they were factored.
    pub fn feedback(&self) -> &gptq::Feedback {
        match self {
            Self::Gptq(feedback) => feedback,
            Self::AdaRound(adaround) => adaround.feedback(),
            Self::Trainable(descent) => descent.feedback(),
            Self::Ternary(ternary) => ternary.feedback(),
        }
    }

    /// Encodes whole rows, and returns what each costs: the mean square of the change of its output, by
    /// damped moments.
    ///
    /// # Errors
    /// `Misuse` when sizes do not fit.
    pub fn encode(&self, lattice: &Lattice, weights: &[f32], out: &mut [u8]) -> Result<Vec<f64>> {
        match self {
            Self::Gptq(feedback) => feedback.encode(lattice, weights, out),
            Self::AdaRound(adaround) => adaround.encode(lattice, weights, out),
            Self::Trainable(descent) => descent.encode(lattice, weights, out),
            Self::Ternary(ternary) => ternary.encode(lattice, weights, out),
        }
    }
}

impl Prepared {
    /// Rounds whole rows to integers in groups, which stay as they are: columns are rounded in any order,
    /// groups follow on each other. Returns what each row costs, as [`Self::encode`].
    ///
    /// # Errors
    /// `Malformed` for weights that are not finite, or too large for a scale in F16; `Misuse` when sizes do not
    /// fit.
    pub fn round(&self, grid: &Grid, weights: &[f32], rows: &mut Rows) -> Result<Vec<f64>> {
        let cols = self.feedback().columns() as u64;
        let lattice = grid.lattice(cols)?;
        grid.check(weights, cols)?;
        let mut blocks = vec![0; lattice.bytes(weights.len())];
        let costs = self.encode(&lattice, weights, &mut blocks)?;
        grid.unpack(&blocks, cols, rows)?;
        Ok(costs)
    }
}

/// The moments of one expert.
pub fn sums<'a>(moments: &'a Moments, input: &'a Input, expert: u64) -> impl gptq::Sums + 'a {
    OfExpert { moments, input, expert, scales: None }
}

/// The moments of one expert, of inputs that are divided by scales.
struct OfExpert<'a> {
    moments: &'a Moments,
    input: &'a Input,
    expert: u64,
    scales: Option<&'a [f32]>,
}

impl gptq::Sums for OfExpert<'_> {
    fn columns(&self) -> usize {
        self.input.columns as usize
    }

    fn read(&self, i: usize, row: &mut [f32]) -> Result<()> {
        self.moments.read_packed(self.input, self.expert, self.input.row_start(i as u64), row)?;
        match row.iter().any(|v| !v.is_finite()) {
            true => Err(Error::malformed(format!("moments of {:?} are not finite", self.input.name))),
            false => {
                if let Some(scales) = self.scales.and_then(|s| s.get(i..)) {
                    let first = scales.first().copied().unwrap_or(1.0);
                    row.iter_mut().zip(scales).for_each(|(v, s)| *v /= first * s);
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::sample::{Square, noise};
    use super::*;
    use crate::block::lattice;
    use crate::block::uniform::{TERNARY, round, weigh};
    use crate::tensor::DType;

    const TYPES: [DType; 4] = [DType::Q4_0, DType::Q2_K, DType::IQ4_XS, DType::TQ2_0];

    fn prepare(method: &Method, sums: &Square, tokens: u64) -> Result<Prepared> {
        match method {
            Method::Gptq(o) => gptq::Feedback::new(sums, tokens, o).map(Prepared::Gptq),
            Method::AdaRound(o) => adaround::AdaRound::new(sums, tokens, o).map(Prepared::AdaRound),
            Method::Trainable(o) => descent::Descent::new(sums, tokens, o).map(Prepared::Trainable),
            Method::Ternary(o) => ternary::Ternary::new(sums, tokens, o).map(Prepared::Ternary),
        }
    }

    /// Few steps: tests are not optimized.
    fn brief(name: &str) -> Method {
        tuned(name, Tuning { iters: Some(3), ..Tuning::default() }).0
    }

    /// With options, and those that it has not.
    fn tuned(name: &str, tuning: Tuning) -> (Method, Vec<&'static str>) {
        let mut method = Method::parse(name).unwrap();
        let rest = method.tune(&tuning).names().collect();
        (method, rest)
    }

    fn encode(prepared: &Prepared, dtype: DType, weights: &[f32]) -> (Vec<f64>, Vec<u8>) {
        let mut bytes = vec![0; dtype.bytes_for(weights.len() as u64).unwrap() as usize];
        let costs = prepared.encode(lattice(dtype).unwrap(), weights, &mut bytes).unwrap();
        (costs, bytes)
    }

    #[test]
    fn what_searches_is_no_worse_than_its_start() {
        let (n, tokens, rows) = (256, 300, 33);
        let sums = Square::new(n, tokens);
        let weights = noise(n * rows, 3);
        let gptq = prepare(&brief("gptq"), &sums, tokens as u64).unwrap();
        for name in ["adaround", "trainable", "ternary"] {
            let prepared = prepare(&brief(name), &sums, tokens as u64).unwrap();
            let mut gain = 0.0;
            for dtype in TYPES {
                let (start, _) = encode(&gptq, dtype, &weights);
                let (costs, bytes) = encode(&prepared, dtype, &weights);
                let mut decoded = vec![0f32; n * rows];
                lattice(dtype).unwrap().decode(&bytes, &mut decoded).unwrap();
                for (r, (&cost, start)) in costs.iter().zip(&start).enumerate() {
                    assert!(cost <= start * (1.0 + 1e-4), "{name} {dtype}: {cost} after {start}");
                    gain += (1.0 - cost / start) / (rows * TYPES.len()) as f64;
                    // What is claimed is what the bytes say.
                    let row = r * n..(r + 1) * n;
                    let error: Vec<f32> =
                        weights[row.clone()].iter().zip(&decoded[row]).map(|(w, y)| w - y).collect();
                    let exact = sums.cost(tokens, 0.01, &error);
                    assert!((cost - exact).abs() <= 1e-3 * exact, "{name} {dtype}: {cost} {exact}");
                }
                // Rows do not depend on each other.
                let (_, alone) = encode(&prepared, dtype, &weights[32 * n..]);
                assert_eq!(alone, bytes[32 * alone.len()..], "{name} {dtype}");
            }
            assert!(gain > 0.01, "{name}: {gain}");
        }
    }

    /// Integers in groups: each method loses less than the one before, and what it says.
    #[test]
    fn grids_have_an_order_of_methods() {
        let (n, tokens, rows) = (128, 160, 5);
        let sums = Square::new(n, tokens);
        let weights = noise(n * rows, 3);
        let [gptq, trainable, adaround] = ["gptq", "trainable", "adaround"]
            .map(|name| prepare(&brief(name), &sums, tokens as u64).unwrap());
        let lost = |grid: &Grid, found: &Rows| -> Vec<f64> {
            let shape = grid.shape(rows as u64, n as u64);
            let (groups, size) = (shape.groups as usize, shape.group_size as usize);
            let middle = f32::from(grid.middle());
            assert!(found.scales.iter().all(|s| *s != 0.0 && s.is_finite()));
            assert!(found.zeros.iter().all(|z| if grid.symmetric { *z == middle } else { *z >= 1.0 }));
            assert!(found.codes.iter().all(|c| u16::from(*c) < grid.levels));
            let value = |i: usize| {
                let g = i / n * groups + i % n / size;
                (f32::from(found.codes[i]) - found.zeros[g]) * found.scales[g]
            };
            let errors: Vec<f32> = weights.iter().enumerate().map(|(i, w)| w - value(i)).collect();
            errors.chunks(n).map(|row| sums.cost(tokens, 0.01, row)).collect()
        };
        for bits in [2, 3, 4, 8] {
            for group_size in [Some(32), Some(48), None] {
                for symmetric in [false, true] {
                    let grid = Grid { levels: 1 << bits, group_size, symmetric, least_zero: 1 };
                    let mut found = Rows::default();
                    round(&grid, &weights, n as u64, &mut found).unwrap();
                    let nearest = lost(&grid, &found);
                    let importance = gptq.feedback().importance();
                    weigh(&grid, &weights, n as u64, importance, &mut found).unwrap();
                    let weighed = lost(&grid, &found);
                    let mut guided = |prepared: &Prepared| {
                        let costs = prepared.round(&grid, &weights, &mut found).unwrap();
                        let lost = lost(&grid, &found);
                        for (cost, exact) in costs.iter().zip(&lost) {
                            assert!((cost - exact).abs() <= 1e-3 * exact, "{grid:?}: {cost} {exact}");
                        }
                        lost
                    };
                    let [first, second, third] = [&gptq, &trainable, &adaround].map(&mut guided);
                    for (start, after) in first.iter().zip(second.iter().zip(&third)) {
                        assert!(*after.0 <= start * 1.0001 && *after.1 <= start * 1.0001, "{grid:?}");
                    }
                    let total = |costs: &[f64]| costs.iter().sum::<f64>();
                    let [nearest, weighed, first] = [&nearest, &weighed, &first].map(|c| total(c));
                    // What is weighed by column may lose more where columns depend on each other.
                    assert!(first < 0.5 * weighed.min(nearest), "{grid:?}: {nearest} {weighed} {first}");
                    assert!(total(&second) < first, "{grid:?}: {first} {}", total(&second));
                }
            }
        }
        let grid = Grid { levels: 1 << 4, group_size: None, symmetric: true, least_zero: 0 };
        assert!(gptq.round(&grid, &weights[1..], &mut Rows::default()).is_err());
        for w in [f32::NAN, 1e30] {
            assert!(gptq.round(&grid, &vec![w; n], &mut Rows::default()).is_err());
        }
    }

    /// On a small problem, every choice of codes can be tried.
    #[test]
    fn adaround_is_near_the_best_choice() {
        let (n, tokens) = (32, 100);
        let sums = Square::new(n, tokens);
        let method = Method::parse("adaround").unwrap();
        let prepared = prepare(&method, &sums, tokens as u64).unwrap();
        let lattice = lattice(DType::Q4_0).unwrap();
        // Only the first 12 weights are between levels of the scale, 1.
        let mut weights = vec![0f32; n];
        weights[n - 1] = -8.0;
        let fractions = noise(12, 5);
        weights.iter_mut().zip(&fractions).for_each(|(w, f)| *w = f.abs().fract() + 1.0);
        let (costs, bytes) = encode(&prepared, DType::Q4_0, &weights);
        let mut lines = [(0.0, 0.0)];
        lattice.lines(&bytes, &mut lines).unwrap();
        let best = (0..1u32 << 12).map(|ups| {
            let error: Vec<f32> = (0..n)
                .map(|i| {
                    let level = weights[i] / lines[0].0;
                    let up = if i < 12 { level.floor() + (ups >> i & 1) as f32 } else { level.round() };
                    weights[i] - lines[0].0 * up
                })
                .collect();
            sums.cost(tokens, 0.01, &error)
        });
        let best = best.fold(f64::INFINITY, f64::min);
        assert!(costs[0] <= 1.3 * best, "{} {best}", costs[0]);
    }

    #[test]
    fn stages_of_ternary_follow_each_other() {
        let (n, tokens, rows) = (256, 300, 8);
        let sums = Square::new(n, tokens);
        let weights = noise(n * rows, 3);
        let grid = |group_size| {
            let grid = Grid { levels: TERNARY, group_size, symmetric: true, least_zero: 0 };
            grid.lattice(n as u64).unwrap()
        };
        let types = [DType::TQ1_0, DType::TQ2_0].map(|dtype| *lattice(dtype).unwrap());
        for lattice in types.into_iter().chain([grid(None), grid(Some(96))]) {
            let totals: Vec<f64> = ternary::Stage::NAMES
                .iter()
                .map(|(name, stage)| {
                    assert_eq!(ternary::Stage::parse(name).unwrap(), *stage);
                    let tuning = Tuning { ternary_stage: Some(*stage), ..Tuning::default() };
                    let (method, _) = tuned("ternary", tuning);
                    let prepared = prepare(&method, &sums, tokens as u64).unwrap();
                    let mut bytes = vec![0; lattice.bytes(weights.len())];
                    prepared.encode(&lattice, &weights, &mut bytes).unwrap().iter().sum()
                })
                .collect();
            // Each stage by itself is better than the one before, on this problem but for the second.
            assert!(totals[2] < totals[0] && totals[3] < totals[2], "{totals:?}");
            assert!(totals[4] <= totals[3] && totals[5] < totals[4], "{totals:?}");
        }
    }

    #[test]
    fn what_says_nothing_is_no_obstacle() {
        let n = 256;
        let one = Square::new(n, 1);
        let mut spike = Square { n, sums: vec![0.0; n * n] };
        spike.sums[0] = 1e20;
        let mut weights = noise(n * 3, 3);
        weights[..n].fill(0.0);
        weights[n..2 * n].iter_mut().for_each(|w| *w *= 1e-30);
        for (name, _) in Method::NAMES {
            for sums in [&one, &spike] {
                let prepared = prepare(&brief(name), sums, 1).unwrap();
                for dtype in [DType::Q4_0, DType::Q2_K, DType::TQ2_0] {
                    let (costs, _) = encode(&prepared, dtype, &weights);
                    assert!(costs.iter().all(|c| c.is_finite()), "{name} {dtype} {costs:?}");
                }
                for (levels, symmetric) in [(2, false), (TERNARY, true), (4, true), (256, false)] {
                    let grid = Grid { levels, group_size: Some(100), symmetric, least_zero: 1 };
                    let mut rows = Rows::default();
                    let costs = prepared.round(&grid, &weights, &mut rows).unwrap();
                    assert!(costs.iter().all(|c| c.is_finite()), "{name} {grid:?} {costs:?}");
                    assert!(rows.scales.iter().all(|s| s.is_finite() && *s != 0.0), "{name} {grid:?}");
                }
            }
            let nothing = Square { n, sums: vec![0.0; n * n] };
            assert!(prepare(&brief(name), &nothing, 1).is_err());
        }
    }

    #[test]
    fn options_that_mean_nothing_are_left() {
        let all = Tuning {
            damp: Some(0.05),
            desc_act: Some(false),
            iters: Some(7),
            lr: Some(0.5),
            batch: Some(64),
            ternary_stage: Some(ternary::Stage::Absmean),
        };
        assert_eq!(tuned("gptq", all).1, ["iters", "lr", "batch", "ternary-stage"]);
        assert_eq!(tuned("trainable", all).1, ["lr", "batch", "ternary-stage"]);
        assert_eq!(tuned("adaround", all).1, ["ternary-stage"]);
        assert_eq!(tuned("ternary", all).1, ["lr", "batch"]);
        let Method::AdaRound(options) = tuned("adaround", all).0 else { unreachable!() };
        assert_eq!((options.iters, options.lr, options.batch), (7, 0.5, 64));
        let start = options.descent.start;
        assert_eq!((start.damp, start.desc_act), (0.05, false));
        assert!(ternary::Stage::parse("none").is_err());
    }
}
