//! What the graphs compute, by qconv's executor: layouts, and divisions into calls, do not show.

use qconv::exec::{LanguageModel, Rounding, Session};
use qconv::limits::Limits;
use qconv::mil::{Layout, Part, Target};

use crate::families::{CONTEXT, Family, families};
use crate::package::{Saved, save};
use crate::{CHANNELS, ROWS, build};

/// More than a window.
const TOKENS: usize = 27;

/// Logits of tokens, given in these pieces.
fn logits(saved: &Saved, pieces: &[usize], rounding: Rounding) -> Vec<f32> {
    let model = LanguageModel::open(&saved.path, &Limits::default()).unwrap_or_else(|e| panic!("{e}"));
    let mut session = Session::new(&model, CONTEXT as usize, rounding).unwrap();
    let ids: Vec<i32> = (0..TOKENS as i32).map(|i| i * 37 % 256).collect();
    let mut rest = &ids[..];
    let mut all = Vec::new();
    for n in pieces {
        let (now, later) = rest.split_at(*n);
        all.extend(session.decode(now).unwrap());
        rest = later;
    }
    assert!(rest.is_empty());
    all
}

fn rows(family: &Family) -> Saved {
    save(family, "run-rows", &[("main", &build(family, &ROWS, Part::Whole))])
}

fn channels(family: &Family) -> Saved {
    let infer = Target { layout: Layout::Channels { tokens: 1 }, ..CHANNELS };
    let [infer, prefill] = [infer, CHANNELS].map(|target| build(family, &target, Part::Whole));
    save(family, "run-channels", &[("infer", &infer), ("prefill", &prefill)])
}

/// The largest difference, and the largest of `b`.
fn differences(a: &[f32], b: &[f32]) -> (f32, f32) {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    (a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs())), largest)
}

#[test]
fn both_layouts_compute_the_same() {
    for family in families(2) {
        let (rows, channels) = (rows(&family), channels(&family));
        let whole = logits(&rows, &[TOKENS], Rounding::F32);
        for (saved, pieces) in [(&rows, &[8, 1, 18][..]), (&channels, &[TOKENS]), (&channels, &[3, 16, 8])] {
            let (worst, largest) = differences(&logits(saved, pieces, Rounding::F32), &whole);
            assert!(worst < 1e-4 * largest, "{} {pieces:?}: {worst} of {largest}", family.name);
        }
    }
}

/// What goes beyond 65504 does not where the stream is multiplied.
#[test]
fn a_stream_beyond_float16() {
    let gemma = |stream: f32| {
        let mut family = families(2).into_iter().find(|f| f.name == "gemma3").unwrap();
        family.loud = 4e5;
        family.decoder.stream = stream;
        rows(&family)
    };
    let wanted = logits(&gemma(1.0), &[TOKENS], Rounding::F32);
    assert!(logits(&gemma(1.0), &[TOKENS], Rounding::F16).iter().any(|v| !v.is_finite()));
    let small = gemma(1.0 / 32.0);
    let (worst, largest) = differences(&logits(&small, &[TOKENS], Rounding::F32), &wanted);
    assert!(worst < 1e-4 * largest, "{worst} of {largest}");
    let (worst, largest) = differences(&logits(&small, &[TOKENS], Rounding::F16), &wanted);
    assert!(worst < 2e-2 * largest, "{worst} of {largest}");
}
