//! What predictions are worth: perplexity, and the divergence of one model from another.
//!
//! Definitions and error estimates are those of llama.cpp's perplexity tool
//! (`tools/perplexity/perplexity.cpp`), so that numbers can be compared with published ones. All are
//! over natural logarithms. Errors are standard errors of the mean.

use serde::Serialize;

use super::softmax;

/// A mean with its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// Its standard error; 0 where ten values or fewer are too few to tell.
    pub error: f64,
}

/// Sums of values and their squares.
#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    n: u64,
    sum: f64,
    squares: f64,
}

impl Moments {
    fn add(&mut self, x: f64) {
        self.n += 1;
        self.sum += x;
        self.squares += x * x;
    }

    /// `exp` of the mean, with its error to first order.
    fn exp(&self) -> Estimate {
        let Estimate { value, error } = self.estimate();
        Estimate { value: value.exp(), error: value.exp() * error }
    }

    fn mean(&self) -> f64 {
        self.sum / self.n.max(1) as f64
    }

    fn variance(&self) -> f64 {
        self.squares / self.n.max(1) as f64 - self.mean() * self.mean()
    }

    fn estimate(&self) -> Estimate {
        let n = self.n.max(1) as f64;
        let (value, variance) = (self.mean(), self.variance());
        let error = if variance > 0.0 && self.n > 10 { (variance / (n - 1.0)).sqrt() } else { 0.0 };
        Estimate { value, error }
    }
}

/// The logarithm of what exponentials of a row of logits sum up to: `ln p_i = logits[i] - norm`.
pub fn log_norm(logits: &[f32]) -> f64 {
    let max = softmax::max(logits);
    f64::from(max) + softmax::sum_exp(logits, max).ln()
}

/// Perplexity, growing with every prediction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Perplexity(Moments);

impl Perplexity {
    /// What it consists of: how many predictions, the sum of their values, and that of the squares.
    pub fn parts(&self) -> (u64, f64, f64) {
        (self.0.n, self.0.sum, self.0.squares)
    }

    /// The one of these [`Self::parts`].
    pub fn from_parts((n, sum, squares): (u64, f64, f64)) -> Self {
        Self(Moments { n, sum, squares })
    }

    /// Counts the prediction of the token that came, by its negative log-probability.
    pub fn add(&mut self, nll: f64) {
        self.0.add(nll);
    }

    /// Predictions counted.
    pub fn count(&self) -> u64 {
        self.0.n
    }

    /// `exp` of the mean, with its error to first order.
    pub fn estimate(&self) -> Estimate {
        self.0.exp()
    }
}

/// What the base model said of the next token.
#[derive(Clone, Copy, Debug)]
pub enum Base<'a> {
    /// Logarithms of all probabilities, but for a constant, which is the second.
    Whole(&'a [f32], f64),
    /// Of some tokens only.
    Sampled(&'a Sampled),
}

/// The likeliest tokens of one prediction, and some of the others, drawn by their probability.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampled {
    /// The likeliest tokens, the first before the second.
    pub top: Vec<Choice>,
    /// Tokens drawn of the rest; one may be there several times.
    pub drawn: Vec<Choice>,
    /// The logarithm of the rest's probability: all but `top`.
    pub log_rest: f32,
    /// That of the token that came.
    pub log_prob_next: f32,
}

/// A token and the logarithm of its probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub id: u32,
    /// `ln p`.
    pub log_prob: f32,
}

impl Sampled {
    /// The divergence of `logits` from it, and the variance of this estimate.
    ///
    /// Over any partition the divergence is the sum of `p ln(p / q) - p + q`, as both sum up to 1.
    /// The likeliest tokens and the rest as one are such a partition; the rest adds its probability
    /// times its own divergence, whose mean is estimated from the tokens drawn: with
    /// `r = q / p`, both relative to the rest, the mean of `r - 1 - ln r` is the divergence, and no
    /// term of it is negative (Schulman, "Approximating KL divergence", 2020).
    fn divergence(&self, logits: &[f32]) -> (f64, f64) {
        let max = softmax::max(logits);
        let all = softmax::sum_exp(logits, max);
        let weight = |c: &Choice| logits.get(c.id as usize).map_or(0.0, |&x| f64::from(x - max).exp());
        let term = |p: f64, q: f64| if p > 0.0 { q - p - p * (q / p).ln() } else { q };
        let (mut sum, mut own) = (0.0, 0.0);
        for c in &self.top {
            let w = weight(c);
            own += w;
            sum += term(f64::from(c.log_prob).exp(), w / all);
        }
        // Rounding may leave less than nothing.
        let own_rest = (all - own).max(f64::MIN_POSITIVE);
        let rest = f64::from(self.log_rest).exp();
        sum += term(rest, own_rest / all);
        let mut drawn = Moments::default();
        for c in &self.drawn {
            let log_r = (weight(c) / own_rest).ln() - f64::from(c.log_prob - self.log_rest);
            drawn.add(log_r.exp_m1() - log_r);
        }
        if drawn.n == 0 {
            return (sum, 0.0);
        }
        (sum + rest * drawn.mean(), rest * rest * drawn.variance() / drawn.n as f64)
    }
}

/// Below this a probability of the base does not count, as in llama.cpp.
const LEAST_LOG_PROB: f64 = -16.0;

/// How a model departs from a base, growing with every prediction.
#[derive(Clone, Debug, Default)]
pub struct Divergence {
    nll: Moments,
    base_nll: Moments,
    products: f64,
    kld: Moments,
    klds: Vec<f32>,
    p_squares: Moments,
    same_top: u64,
    sampling_variance: f64,
}

/// The measures of a [`Divergence`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DivergenceSummary {
    /// Predictions compared.
    pub count: u64,
    /// Perplexity of the model.
    pub perplexity: Estimate,
    /// Perplexity of the base.
    pub base_perplexity: Estimate,
    /// `ln(perplexity / base_perplexity)`: errors of both mostly cancel.
    pub ln_ratio: Estimate,
    /// Mean Kullback-Leibler divergence of the model from the base, in nats.
    pub kld: Estimate,
    /// What the base's sampling alone adds to its error: 0 where the base is known as a whole.
    pub kld_sampling_error: f64,
    /// Its median.
    pub kld_median: f64,
    /// What 99 % of predictions stay below.
    pub kld_99: f64,
    /// What 99.9 % stay below.
    pub kld_999: f64,
    /// The worst.
    pub kld_max: f64,
    /// Root mean square of the change of the probability of the token that came.
    pub p_rms: Estimate,
    /// Share of predictions whose likeliest token is the base's.
    pub same_top: Estimate,
}

impl DivergenceSummary {
    /// Whether so little is left of the base that the model is of no use: it predicts the text more than ten times
    /// worse, or other things (a base that hardly predicts the text itself has nothing to lose there).
    pub fn has_collapsed(&self) -> bool {
        // What is no number is no use either.
        let (ratio, kld) = (self.ln_ratio.value, self.kld.value);
        ratio.is_nan() || kld.is_nan() || ratio > COLLAPSE.0.ln() || kld > COLLAPSE.1
    }
}

/// The ratio of perplexities and the mean KL divergence from which on a model has collapsed.
const COLLAPSE: (f64, f64) = (10.0, 1.0);

impl Divergence {
    /// Compares the logits of one prediction with the base's; `next` is the token that came.
    pub fn add(&mut self, logits: &[f32], base: Base<'_>, next: usize) {
        let norm = log_norm(logits);
        let log_p = |i: usize| logits.get(i).map_or(f64::NEG_INFINITY, |&x| f64::from(x) - norm);
        let (kld, log_base_next, top) = match base {
            Base::Whole(base, base_norm) => {
                let log_base = |x: f32| f64::from(x) - base_norm;
                let kld = softmax::divergence(base, base_norm, logits, norm, LEAST_LOG_PROB);
                let next = base.get(next).map_or(f64::NEG_INFINITY, |&x| log_base(x));
                (kld, next, super::logits::argmax(base))
            }
            Base::Sampled(sampled) => {
                let (kld, variance) = sampled.divergence(logits);
                self.sampling_variance += variance;
                (kld, f64::from(sampled.log_prob_next), sampled.top.first().map(|c| c.id as usize))
            }
        };
        let (nll, base_nll) = (-log_p(next), -log_base_next);
        self.nll.add(nll);
        self.base_nll.add(base_nll);
        self.products += nll * base_nll;
        self.kld.add(kld);
        self.klds.push(kld as f32);
        self.p_squares.add(((-nll).exp() - (-base_nll).exp()).powi(2));
        self.same_top += u64::from(super::logits::argmax(logits) == top);
    }

    /// Predictions compared.
    pub fn count(&self) -> u64 {
        self.nll.n
    }

    /// The mean Kullback-Leibler divergence so far, in nats.
    pub fn kld(&self) -> Estimate {
        self.kld.estimate()
    }

    /// The measures so far. Takes time in proportion to [`Self::count`].
    pub fn summary(&self) -> DivergenceSummary {
        let n = self.nll.n.max(1) as f64;
        let (ln, base) = (self.nll.estimate(), self.base_nll.estimate());
        let covariance = match self.nll.n {
            0..10 => 0.0,
            _ => (self.products / n - ln.value * base.value) / (n - 1.0),
        };
        let variance = ln.error * ln.error + base.error * base.error - 2.0 * covariance;
        let p = self.p_squares.estimate();
        let rms = p.value.sqrt();
        let same = self.same_top as f64 / n;
        let mut klds = self.klds.clone();
        klds.sort_by(f32::total_cmp);
        DivergenceSummary {
            count: self.nll.n,
            perplexity: self.nll.exp(),
            base_perplexity: self.base_nll.exp(),
            ln_ratio: Estimate { value: ln.value - base.value, error: variance.max(0.0).sqrt() },
            kld: self.kld.estimate(),
            kld_sampling_error: self.sampling_variance.sqrt() / n,
            kld_median: percentile(&klds, 0.5),
            kld_99: percentile(&klds, 0.99),
            kld_999: percentile(&klds, 0.999),
            kld_max: percentile(&klds, 1.0),
            p_rms: Estimate { value: rms, error: if rms > 0.0 { 0.5 / rms * p.error } else { 0.0 } },
            same_top: Estimate { value: same, error: (same * (1.0 - same) / (n - 1.0).max(1.0)).sqrt() },
        }
    }
}

/// Interpolated between neighbours; 0 of none. `sorted` ascends.
fn percentile(sorted: &[f32], fraction: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = fraction.clamp(0.0, 1.0) * last as f64;
    let (low, part) = (at.floor() as usize, at.fract());
    let value = |i: usize| f64::from(sorted[i.min(last)]);
    (1.0 - part) * value(low) + part * value(low + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collapse_is_ten_times_worse_or_something_else() {
        let base = [10.0f32.ln(), 0.0, 0.0];
        let collapsed = |odds: [f32; 3], next: usize| {
            let mut divergence = Divergence::default();
            let logits = odds.map(f32::ln);
            (0..20).for_each(|_| divergence.add(&logits, Base::Whole(&base, log_norm(&base)), next));
            divergence.summary().has_collapsed()
        };
        assert!(!collapsed([4.0, 7.0, 1.0], 0));
        assert!(collapsed([1.0, 8.0, 4.0], 0));
        // 1 / 12 against 8 / 11: better at the text, but another model.
        assert!(collapsed([1.0, 8.0, 2.0], 1));
        assert!(collapsed([f32::NAN, 1.0, 1.0], 0));
    }

    #[test]
    fn perplexity_of_known_odds() {
        let mut ppl = Perplexity::default();
        (0..8).for_each(|_| ppl.add(4f64.ln()));
        assert!((ppl.estimate().value - 4.0).abs() < 1e-12 && ppl.estimate().error == 0.0);
        // Half ln 2, half ln 8: the mean is ln 4, the deviation ln 2.
        let mut ppl = Perplexity::default();
        (0..50).for_each(|i| ppl.add(if i % 2 == 0 { 2f64.ln() } else { 8f64.ln() }));
        let e = ppl.estimate();
        assert!((e.value - 4.0).abs() < 1e-12 && (e.error - 4.0 * 2f64.ln() / 7.0).abs() < 1e-12);
    }

    #[test]
    fn divergence_by_hand() {
        let logits = |p: &[f32]| p.iter().map(|p| p.ln() + 3.0).collect::<Vec<f32>>();
        let (base, own) = (logits(&[0.5, 0.25, 0.25]), logits(&[0.25, 0.5, 0.25]));
        let expected = 0.5 * 2f64.ln() + 0.25 * 0.5f64.ln();
        let mut d = Divergence::default();
        d.add(&own, Base::Whole(&base, log_norm(&base)), 1);
        let s = d.summary();
        assert!((s.kld.value - expected).abs() < 1e-6, "{s:?}");
        assert!((s.p_rms.value - 0.25).abs() < 1e-6 && s.same_top.value == 0.0);
        assert!((s.perplexity.value - 2.0).abs() < 1e-5 && (s.base_perplexity.value - 4.0).abs() < 1e-5);
        assert!((s.ln_ratio.value - 0.5f64.ln()).abs() < 1e-6);
        // The rest is one token: nothing is lost. Then two, of which each is drawn once.
        let choice = |id: u32| Choice { id, log_prob: [0.5f32, 0.25, 0.25][id as usize].ln() };
        for (top, drawn, log_rest) in
            [(vec![0, 1], vec![2], 0.25f32.ln()), (vec![0], vec![1, 2], 0.5f32.ln())]
        {
            let [top, drawn] = [top, drawn].map(|ids| ids.into_iter().map(choice).collect());
            let sampled = Sampled { top, drawn, log_rest, log_prob_next: 0.25f32.ln() };
            let mut t = Divergence::default();
            t.add(&own, Base::Sampled(&sampled), 1);
            let t = t.summary();
            assert!((t.kld.value - s.kld.value).abs() < 1e-6, "{t:?}");
            assert!((t.p_rms.value - s.p_rms.value).abs() < 1e-6);
        }
    }

    #[test]
    fn percentiles() {
        assert_eq!(percentile(&[], 0.5), 0.0);
        assert_eq!(percentile(&[1.0, 2.0, 4.0], 0.5), 2.0);
        assert_eq!(percentile(&[1.0, 2.0], 0.5), 1.5);
        assert_eq!(percentile(&[1.0, 2.0], 1.0), 2.0);
    }
}
