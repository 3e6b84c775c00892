//! Products of panels ([`crate::block::gram`]) with FMA.

use crate::block::gram::{PANEL, Tile, kernel};

/// As the portable function, where the CPU has what it takes; otherwise false, and nothing is done.
type Product = fn(&[[f32; PANEL]], &[[f32; PANEL]], &mut Tile) -> bool;

/// The fastest first.
pub(in crate::block) static PRODUCTS: &[Product] = &[avx512, avx2];

/// By the fastest implementation that this CPU can run.
pub(in crate::block) fn product(a: &[[f32; PANEL]], b: &[[f32; PANEL]], out: &mut Tile) -> bool {
    PRODUCTS.iter().any(|run| run(a, b, out))
}

// Closures lose the enabled features, inlined ones into a function that has them do not.
fn avx512(a: &[[f32; PANEL]], b: &[[f32; PANEL]], out: &mut Tile) -> bool {
    #[target_feature(enable = "avx512f,fma")]
    fn run(a: &[[f32; PANEL]], b: &[[f32; PANEL]], out: &mut Tile) {
        kernel::<4, 32>(a, b, out, f32::mul_add);
    }
    if !is_x86_feature_detected!("avx512f") || !is_x86_feature_detected!("fma") {
        return false;
    }
    // SAFETY: the CPU has the features.
    unsafe { run(a, b, out) };
    true
}

fn avx2(a: &[[f32; PANEL]], b: &[[f32; PANEL]], out: &mut Tile) -> bool {
    #[target_feature(enable = "avx2,fma")]
    fn run(a: &[[f32; PANEL]], b: &[[f32; PANEL]], out: &mut Tile) {
        kernel::<4, 16>(a, b, out, f32::mul_add);
    }
    if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("fma") {
        return false;
    }
    // SAFETY: the CPU has the features.
    unsafe { run(a, b, out) };
    true
}
