//! Arithmetic that a transform does on values.

/// Arithmetic on single values, in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Elementwise {
    /// `x * mul + add`, rounded after each step.
    Affine {
        /// Factor.
        mul: f32,
        /// Summand.
        add: f32,
    },
    /// `x * mul` for the elements `start..end` of the tensor.
    Scale {
        /// Factor.
        mul: f32,
        /// The first element.
        start: u64,
        /// One beyond the last.
        end: u64,
    },
    /// `-exp(x)`, rounded once.
    NegExp,
    /// `ln(-x)`, which undoes that.
    LogNeg,
    /// `exp(x)`, rounded once.
    Exp,
    /// `ln(x)`, which undoes that.
    Ln,
    /// Each stretch of `row` elements divided by its Euclidean norm, which is not less than 1e-12.
    /// Only whole stretches can be given to [`Self::apply`].
    UnitRows {
        /// Length of a stretch.
        row: u64,
    },
}

impl Elementwise {
    /// What undoes it. What the norm was is lost: rows of norm 1 stay so.
    pub fn inverse(self) -> Self {
        match self {
            Self::Affine { mul, add } => Self::Affine { mul: 1.0 / mul, add: -add / mul },
            Self::Scale { mul, start, end } => Self::Scale { mul: 1.0 / mul, start, end },
            Self::NegExp => Self::LogNeg,
            Self::LogNeg => Self::NegExp,
            Self::Exp => Self::Ln,
            Self::Ln => Self::Exp,
            Self::UnitRows { row } => Self::UnitRows { row },
        }
    }

    /// Applies it to the tensor's elements from number `first` on.
    pub fn apply(self, values: &mut [f32], first: u64) {
        match self {
            Self::Scale { mul, start, end } => {
                let at = |n: u64| (n.saturating_sub(first)).min(values.len() as u64) as usize;
                let (start, end) = (at(start), at(end));
                values[start..end].iter_mut().for_each(|x| *x *= mul);
            }
            Self::Affine { mul: 1.0, add } => values.iter_mut().for_each(|x| *x += add),
            Self::Affine { mul, add } => values.iter_mut().for_each(|x| *x = *x * mul + add),
            Self::NegExp => values.iter_mut().for_each(|x| *x = -f64::from(*x).exp() as f32),
            Self::Exp => values.iter_mut().for_each(|x| *x = f64::from(*x).exp() as f32),
            Self::Ln => values.iter_mut().for_each(|x| *x = f64::from(*x).ln() as f32),
            Self::UnitRows { row } => {
                for row in values.chunks_mut(row.max(1) as usize) {
                    let norm = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
                    let norm = norm.max(1e-12) as f32;
                    row.iter_mut().for_each(|x| *x /= norm);
                }
            }
            Self::LogNeg => values.iter_mut().for_each(|x| *x = (-f64::from(*x)).ln() as f32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_is_undone() {
        let values = [-2.5f32, -1.0, 0.0, 0.25, 3.0];
        for op in [Elementwise::Affine { mul: 2.0, add: 1.0 }, Elementwise::NegExp, Elementwise::Exp] {
            let mut changed = values;
            op.apply(&mut changed, 0);
            assert!(changed != values);
            op.inverse().apply(&mut changed, 0);
            assert!(changed.iter().zip(values).all(|(a, b)| (a - b).abs() < 1e-6), "{op:?}: {changed:?}");
        }
        let scale = Elementwise::Scale { mul: 2.0, start: 11, end: 13 };
        let mut span = values;
        scale.apply(&mut span, 10);
        assert_eq!(span, [-2.5, -2.0, 0.0, 0.25, 3.0]);
        let mut beyond = values;
        scale.apply(&mut beyond, 13);
        assert_eq!(beyond, values);
        let mut rows = [3.0f32, 4.0, 0.0, -2.0, 0.0, 0.0];
        Elementwise::UnitRows { row: 2 }.apply(&mut rows, 0);
        assert_eq!(rows, [0.6, 0.8, 0.0, -1.0, 0.0, 0.0]);
        let mut one = [1.0f32];
        Elementwise::NegExp.apply(&mut one, 0);
        assert_eq!(one, [-std::f32::consts::E]);
    }
}
