//! What the benchmarks of single loops share: made-up weights, and the best of some runs.
#![allow(dead_code)] // each benchmark uses its part

use std::time::Instant;

/// Numbers that are distributed about as weights are, of about unit size.
pub fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

/// Seconds, the best of some.
pub fn time(times: usize, mut run: impl FnMut()) -> f64 {
    let once = |_| {
        let begun = Instant::now();
        run();
        begun.elapsed().as_secs_f64()
    };
    (0..times).map(once).fold(f64::INFINITY, f64::min)
}

/// A table of speeds, some of whose rows may be asked for.
pub struct Table {
    wanted: Vec<String>,
}

impl Table {
    /// What the command line asks for; `None` where nothing is to be measured: `cargo test --benches` runs
    /// benchmarks too, to see that they start.
    pub fn of_args() -> Option<Self> {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let is_asked = args.iter().any(|a| a == "--bench");
        is_asked.then(|| Self { wanted: args.into_iter().filter(|a| !a.starts_with('-')).collect() })
    }

    /// One row, where it is asked for: so many units in a second.
    pub fn show(&self, name: &str, unit: &str, units: f64, mut run: impl FnMut()) {
        if !self.wanted.is_empty() && !self.wanted.iter().any(|w| name.contains(w.as_str())) {
            return;
        }
        // Long enough to be measured.
        let repeats = (0.01 / time(1, &mut run)).ceil().clamp(1.0, 1000.0) as usize;
        let seconds = time(7, || (0..repeats).for_each(|_| run())) / repeats as f64;
        println!("{name:<36}{:>9.2} {unit}/s", units / seconds);
    }
}
