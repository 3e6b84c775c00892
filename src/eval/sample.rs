//! Which token comes next: from logits to a probability for each candidate, and a draw among them.
//!
//! The steps are llama.cpp's, in its order: penalties for repetition, `top_k`, `typical`, `top_p`,
//! `min_p`, temperature (`common/common.h`, `src/llama-sampler.cpp`). The numbers drawn are our own:
//! the same seed gives the same text here, and another there.

use std::collections::HashMap;

/// How a token is chosen from the logits. The defaults are llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 or less takes the likeliest candidate (greedy).
    pub temperature: f32,
    /// Candidates kept; 0 keeps all.
    pub top_k: usize,
    /// Keeps the likeliest candidates that reach this probability together; 1 keeps all.
    pub top_p: f32,
    /// Keeps candidates at least so probable, relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Keeps the candidates whose information is closest to the entropy, up to this probability
    /// together; 1 keeps all.
    pub typical: f32,
    /// Positive logits of repeated tokens are divided by it, others multiplied; 1 changes nothing.
    pub repeat_penalty: f32,
    /// Taken from the logit of a repeated token for each time that it occurred.
    pub frequency_penalty: f32,
    /// Taken from the logit of a repeated token.
    pub presence_penalty: f32,
    /// A token is repeated if it is among so many last ones; 0 penalizes none.
    pub repeat_last_n: usize,
    /// The same seed gives the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical: 1.0,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    fn penalizes(&self) -> bool {
        let changes =
            self.repeat_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0;
        changes && self.repeat_last_n > 0
    }
}

/// A token that may come next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Its id.
    pub id: i32,
    /// Its logit, penalties included.
    pub logit: f32,
    /// Its probability among the candidates.
    pub p: f64,
}

/// Chooses tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: Random,
    // Between calls only their memory is kept.
    candidates: Candidates,
    penalized: Vec<f32>,
}

impl Sampler {
    /// One that begins with the seed.
    pub fn new(sampling: &Sampling) -> Self {
        Self {
            sampling: sampling.clone(),
            random: Random(sampling.seed),
            candidates: Candidates::default(),
            penalized: Vec::new(),
        }
    }

    /// How it chooses.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Draws a token. `logits` has one value for each token of the vocabulary, `before` the tokens
    /// that came before. `None` when every logit is NaN.
    pub fn choose(&mut self, logits: &[f32], before: &[i32]) -> Option<i32> {
        let point = if self.sampling.temperature > 0.0 { self.random.uniform() } else { 0.0 };
        let candidates = self.candidates(logits, before);
        let mut reached = 0.0;
        let drawn = candidates.iter().find(|c| {
            reached += c.p;
            point < reached
        });
        // Rounding may leave the sum just below 1.
        drawn.or(candidates.last()).map(|c| c.id)
    }

    /// What [`Self::choose`] draws from: probabilities sum to 1. Empty when every logit is NaN.
    pub fn candidates(&mut self, logits: &[f32], before: &[i32]) -> &[Candidate] {
        let s = &self.sampling;
        let logits = if s.penalizes() {
            penalize(logits, before, s, &mut self.penalized);
            &self.penalized
        } else {
            logits
        };
        let c = &mut self.candidates;
        // The likeliest alone is found without sorting anything.
        let only_the_first = s.temperature <= 0.0 && s.typical >= 1.0;
        c.take(logits, if only_the_first { 1 } else { s.top_k });
        if s.typical < 1.0 {
            c.keep_typical(s.typical.into());
        }
        if s.temperature <= 0.0 {
            c.keep_first();
        } else {
            if s.top_p < 1.0 {
                c.keep_top_p(s.top_p.into());
            }
            if s.min_p > 0.0 {
                c.keep_min_p(s.min_p);
            }
        }
        c.set_probabilities(if s.temperature > 0.0 { s.temperature.into() } else { 1.0 });
        &c.list
    }
}

/// Steele, Lea and Flood's SplitMix64.
#[derive(Clone, Debug)]
pub(super) struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next number, in [0, 1).
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Copies `logits` to `out`, lower for tokens that are repeated.
fn penalize(logits: &[f32], before: &[i32], s: &Sampling, out: &mut Vec<f32>) {
    out.clear();
    out.extend_from_slice(logits);
    let recent = &before[before.len().saturating_sub(s.repeat_last_n)..];
    let mut counts: HashMap<usize, u32> = HashMap::new();
    for id in recent.iter().filter_map(|&id| usize::try_from(id).ok()) {
        *counts.entry(id).or_default() += 1;
    }
    for (id, n) in counts {
        let Some(logit) = out.get_mut(id) else { continue };
        // Dividing a negative logit would make the token likelier.
        *logit = if *logit > 0.0 { *logit / s.repeat_penalty } else { *logit * s.repeat_penalty };
        *logit -= n as f32 * s.frequency_penalty + s.presence_penalty;
    }
}

/// Candidates, of which the first `sorted` are the likeliest in descending order.
#[derive(Clone, Debug, Default)]
struct Candidates {
    list: Vec<Candidate>,
    sorted: usize,
}

/// The likelier first; of equals the one with the smaller id.
fn likelier(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

impl Candidates {
    /// The `k` likeliest tokens (0: all), NaN left out.
    fn take(&mut self, logits: &[f32], k: usize) {
        self.list.clear();
        self.sorted = 0;
        let all = logits.iter().zip(0i32..).filter(|(v, _)| !v.is_nan());
        // -0 and 0 are the same logit; a total order would tell them apart.
        let all = all.map(|(&logit, id)| Candidate { id, logit: logit + 0.0, p: 0.0 });
        if k == 0 {
            self.list.extend(all);
            return;
        }
        // Most tokens are below the k-th likeliest so far, and never enter the list.
        let room = k.saturating_mul(2).max(k.saturating_add(64));
        let mut least = None;
        for c in all {
            if least.is_some_and(|least| c.logit <= least) {
                continue;
            }
            self.list.push(c);
            if self.list.len() == room {
                self.cut_to(k);
                least = self.list.last().map(|c| c.logit);
            }
        }
        self.cut_to(k);
        self.sort_to(k);
    }

    /// Keeps the `k` likeliest, the least of them last.
    fn cut_to(&mut self, k: usize) {
        if k < self.list.len() {
            self.list.select_nth_unstable_by(k - 1, likelier);
            self.list.truncate(k);
        }
    }

    /// Brings the likeliest `n` to the front, sorted.
    fn sort_to(&mut self, n: usize) {
        let n = n.min(self.list.len());
        if n <= self.sorted {
            return;
        }
        let rest = &mut self.list[self.sorted..];
        let wanted = n - self.sorted;
        if wanted < rest.len() {
            rest.select_nth_unstable_by(wanted - 1, likelier);
        }
        rest[..wanted].sort_unstable_by(likelier);
        self.sorted = n;
    }

    fn highest(&self) -> Option<f32> {
        match self.sorted {
            0 => self.list.iter().map(|c| c.logit).max_by(f32::total_cmp),
            _ => self.list.first().map(|c| c.logit),
        }
    }

    fn keep_first(&mut self) {
        self.sort_to(1);
        self.list.truncate(1);
    }

    fn keep_top_p(&mut self, top_p: f64) {
        self.set_probabilities(1.0);
        let mut reached = 0.0;
        for i in 0..self.list.len() {
            if i == self.sorted {
                self.sort_to(self.sorted.saturating_mul(8).max(256));
            }
            reached += self.list[i].p;
            if reached >= top_p {
                self.list.truncate(i + 1);
                self.sorted = i + 1;
                return;
            }
        }
    }

    fn keep_min_p(&mut self, min_p: f32) {
        let Some(highest) = self.highest() else { return };
        // The likeliest stays in any case.
        let least = (highest + min_p.ln()).min(highest);
        self.list.retain(|c| c.logit >= least);
        self.sorted = self.sorted.min(self.list.len());
    }

    /// Locally typical sampling (Meister et al. 2022).
    fn keep_typical(&mut self, typical: f64) {
        self.set_probabilities(1.0);
        let information = |c: &Candidate| -c.p.max(f64::MIN_POSITIVE).ln();
        let entropy: f64 = self.list.iter().map(|c| c.p * information(c)).sum();
        let distance = |c: &Candidate| (information(c) - entropy).abs();
        self.list.sort_unstable_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.id.cmp(&b.id)));
        let mut reached = 0.0;
        let last = self.list.iter().position(|c| {
            reached += c.p;
            reached > typical
        });
        if let Some(last) = last {
            self.list.truncate(last + 1);
        }
        self.sorted = 0;
    }

    /// The softmax of the logits divided by `temperature`.
    fn set_probabilities(&mut self, temperature: f64) {
        let Some(highest) = self.highest() else { return };
        let highest = f64::from(highest);
        let mut sum = 0.0;
        for c in &mut self.list {
            // Infinite logits are no numbers to subtract.
            let below = f64::from(c.logit) - highest;
            c.p = if below.is_nan() { 1.0 } else { (below / temperature).exp() };
            sum += c.p;
        }
        self.list.iter_mut().for_each(|c| c.p /= sum);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Everything kept.
    fn open() -> Sampling {
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Sampling::default() }
    }

    fn candidates(sampling: &Sampling, logits: &[f32]) -> Vec<Candidate> {
        Sampler::new(sampling).candidates(logits, &[]).to_vec()
    }

    fn ids(sampling: &Sampling, logits: &[f32]) -> Vec<i32> {
        let mut ids: Vec<i32> = candidates(sampling, logits).iter().map(|c| c.id).collect();
        ids.sort_unstable();
        ids
    }

    /// The steps as a page of arithmetic: everything sorted, nothing clever.
    fn plainly(s: &Sampling, logits: &[f32]) -> Vec<i32> {
        let mut all: Vec<(i32, f64)> = logits.iter().zip(0..).map(|(&l, id)| (id, f64::from(l))).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if s.top_k > 0 {
            all.truncate(s.top_k);
        }
        let sum: f64 = all.iter().map(|c| (c.1 - all[0].1).exp()).sum();
        let p: Vec<f64> = all.iter().map(|c| (c.1 - all[0].1).exp() / sum).collect();
        let (mut reached, mut kept) = (0.0, Vec::new());
        for (c, p) in all.iter().zip(&p) {
            if s.top_p < 1.0 && reached >= f64::from(s.top_p) {
                break;
            }
            reached += p;
            kept.push((c.0, *p));
        }
        let mut ids: Vec<i32> =
            kept.iter().filter(|c| c.1 >= f64::from(s.min_p) * p[0] * (1.0 - 1e-6)).map(|c| c.0).collect();
        ids.sort_unstable();
        ids
    }

    proptest! {
        #[test]
        fn candidates_are_those_of_plain_arithmetic(
            logits in prop::collection::vec((-80i16..80).prop_map(|v| f32::from(v) / 8.0), 1..900),
            top_k in 0usize..400, top_p in 0.05f32..1.1, min_p in 0f32..0.9, temperature in 0.05f32..4.0,
        ) {
            // Away from where rounding decides.
            let (top_p, min_p) = (top_p.min(1.0), (min_p * 10.0).round() / 10.0 * 0.97);
            let s = Sampling { temperature, top_k, top_p, min_p, ..open() };
            let found = candidates(&s, &logits);
            let sum: f64 = found.iter().map(|c| c.p).sum();
            prop_assert!((sum - 1.0).abs() < 1e-9, "{}", sum);
            prop_assert_eq!(ids(&s, &logits), plainly(&s, &logits));
            for pair in found.windows(2) {
                let ratio = (f64::from(pair[1].logit - pair[0].logit) / f64::from(temperature)).exp();
                prop_assert!((pair[1].p - ratio * pair[0].p).abs() < 1e-9);
            }
            let k = if top_k == 0 { logits.len() } else { top_k.min(logits.len()) };
            prop_assert_eq!(candidates(&Sampling { top_k, ..open() }, &logits).len(), k);
            let greedy = Sampler::new(&Sampling { temperature: 0.0, ..s }).choose(&logits, &[]);
            prop_assert_eq!(greedy.map(|id| id as usize), super::super::logits::argmax(&logits));
        }

        #[test]
        fn typical_keeps_what_is_near_the_entropy(
            logits in prop::collection::vec(-6f32..6.0, 2..60), typical in 0.05f32..0.95,
        ) {
            let all = candidates(&open(), &logits);
            let entropy: f64 = all.iter().map(|c| -c.p * c.p.ln()).sum();
            let far = |id: i32| (-all[id as usize].p.ln() - entropy).abs();
            let kept = ids(&Sampling { typical, ..open() }, &logits);
            let mass: f64 = kept.iter().map(|&id| all[id as usize].p).sum();
            let farthest = kept.iter().copied().max_by(|&a, &b| far(a).total_cmp(&far(b))).unwrap();
            prop_assert!(kept.len() == all.len() || mass > f64::from(typical));
            prop_assert!(mass - all[farthest as usize].p <= f64::from(typical) + 1e-9);
            prop_assert!((0..all.len() as i32).all(|id| kept.contains(&id) || far(id) >= far(farthest) - 1e-9));
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [1.0, 5.0, f32::NAN, 4.0, -3.0, f32::NEG_INFINITY];
        let s = Sampling { temperature: 2.0, seed: 11, ..open() };
        let mut sampler = Sampler::new(&s);
        let n = 40_000;
        let drawn: Vec<i32> = (0..n).map(|_| sampler.choose(&logits, &[]).unwrap()).collect();
        for c in candidates(&s, &logits) {
            let share = drawn.iter().filter(|&&id| id == c.id).count() as f64 / f64::from(n);
            // Five standard deviations.
            assert!((share - c.p).abs() <= 5.0 * (c.p * (1.0 - c.p) / f64::from(n)).sqrt(), "{c:?} {share}");
        }
        let mut again = Sampler::new(&s);
        assert!(drawn.iter().all(|&id| again.choose(&logits, &[]) == Some(id)));
        let mut other = Sampler::new(&Sampling { seed: 12, ..s });
        assert!(!drawn.iter().all(|&id| other.choose(&logits, &[]) == Some(id)));
        assert_eq!(Sampler::new(&open()).choose(&[f32::NAN], &[]), None);
        assert_eq!(Sampler::new(&Sampling::greedy()).choose(&[f32::NAN], &[]), None);
        // Infinite logits are a model's fault, and no reason to give up.
        assert_eq!(ids(&open(), &[f32::NEG_INFINITY]), [0]);
        assert_eq!(Sampler::new(&open()).choose(&[0.0, f32::INFINITY, 3.0], &[]), Some(1));
    }

    #[test]
    fn repetition_is_penalized_as_in_llama_cpp() {
        let logits = [4.0, -4.0, 4.0, -4.0];
        let s = Sampling { repeat_penalty: 2.0, repeat_last_n: 3, ..open() };
        let after = |s: &Sampling, before: &[i32]| -> Vec<f32> {
            let mut found = Sampler::new(s).candidates(&logits, before).to_vec();
            found.sort_by_key(|c| c.id);
            found.iter().map(|c| c.logit).collect()
        };
        assert_eq!(after(&s, &[0, 1, 0]), [2.0, -8.0, 4.0, -4.0]);
        assert_eq!(after(&s, &[0, 1, 3, 3, 99, -1]), [4.0, -4.0, 4.0, -8.0]);
        let s = Sampling { repeat_penalty: 1.0, frequency_penalty: 0.5, presence_penalty: 0.25, ..s };
        assert_eq!(after(&s, &[0, 1, 0]), [2.75, -4.75, 4.0, -4.0]);
        assert_eq!(after(&Sampling { repeat_last_n: 0, ..s.clone() }, &[0, 1, 0]), logits);
        let greedy = Sampling { temperature: 0.0, ..s };
        assert_eq!(Sampler::new(&greedy).choose(&logits, &[0]), Some(2));
    }
}
