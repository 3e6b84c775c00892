//! SHA-256 with AVX2 and with AVX-512 VL, for CPUs without instructions for it: eight messages in the lanes of
//! eight words, or one message, whose words beyond the sixteenth are made for eight blocks at once (Gueron and
//! Krasnov, "Simultaneous hashing of multiple messages" and "Parallelizing message schedules to accelerate the
//! computations of hash functions", 2012).
//!
//! It belongs to `crate::sha256`, below the modules that store bytes, and is here because `unsafe` is.
//!
//! Both kernels stand once, over the trait [`Words`]. Its methods and they are `unsafe` for one reason: the CPU
//! must have the features of the implementation. [`kernels`] is the only way in, and asks the CPU first.
//! Registers of 512 bits were tried: 1.3 GB/s, where these reach 2.5.
#![allow(unsafe_op_in_unsafe_fn)]

use core::arch::x86_64::*;

use super::{Block, K, Kernel, LANES};

/// Those that this CPU can run, the fastest first.
pub(super) fn kernels() -> impl Iterator<Item = &'static Kernel> {
    let scalar = is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2");
    let avx2 = scalar && is_x86_feature_detected!("avx2");
    let avx512 = avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl");
    avx512.then_some(&AVX512).into_iter().chain(avx2.then_some(&AVX2))
}

/// One kernel over the given words, compiled with the given features.
macro_rules! kernel {
    ($kernel:ident, $words:ty, $features:literal, few $few:literal) => {
        static $kernel: Kernel = Kernel {
            many: |states, blocks| {
                #[target_feature(enable = $features)]
                unsafe fn run(states: &mut [[u32; LANES]; 8], blocks: &[&[Block]; LANES]) {
                    many::<$words>(states, blocks);
                }
                // SAFETY: the kernel is handed out only after the features were detected.
                unsafe { run(states, blocks) }
            },
            one: |state, blocks| {
                #[target_feature(enable = $features)]
                unsafe fn run(state: &mut [u32; 8], blocks: &[Block]) {
                    one::<$words>(state, blocks);
                }
                // SAFETY: the kernel is handed out only after the features were detected.
                unsafe { run(state, blocks) }
            },
            few: $few,
        };
    };
}

kernel!(AVX2, Avx2, "avx2,bmi1,bmi2", few 3);
kernel!(AVX512, Avx512, "avx512f,avx512vl,avx2,bmi1,bmi2", few 2);

/// A word of each of eight messages, or of eight blocks.
#[derive(Clone, Copy)]
struct Avx2(__m256i);

/// As [`Avx2`], with rotations and functions of three words in one instruction.
#[derive(Clone, Copy)]
struct Avx512(__m256i);

/// What differs between them, and what they are.
trait Words: Copy {
    fn of(words: __m256i) -> Self;
    fn get(self) -> __m256i;
    /// Rotated to the right.
    unsafe fn rotate<const N: i32>(self) -> Self;
    unsafe fn xor(self, b: Self, c: Self) -> Self;
    /// Bits of `b` where those of `self` are set, else of `c`.
    unsafe fn choose(self, b: Self, c: Self) -> Self;
    /// Bits as most of the three have them.
    unsafe fn majority(self, b: Self, c: Self) -> Self;

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self::of(_mm256_add_epi32(self.get(), other.get()))
    }

    #[inline(always)]
    unsafe fn shift<const N: i32>(self) -> Self {
        Self::of(_mm256_srli_epi32::<N>(self.get()))
    }

    #[inline(always)]
    unsafe fn all(word: u32) -> Self {
        Self::of(_mm256_set1_epi32(word as i32))
    }

    #[inline(always)]
    unsafe fn load(words: &[u32; LANES]) -> Self {
        Self::of(_mm256_loadu_si256(words.as_ptr().cast()))
    }

    #[inline(always)]
    unsafe fn store(self, words: &mut [u32; LANES]) {
        _mm256_storeu_si256(words.as_mut_ptr().cast(), self.get());
    }
}

impl Words for Avx2 {
    #[inline(always)]
    fn of(words: __m256i) -> Self {
        Self(words)
    }

    #[inline(always)]
    fn get(self) -> __m256i {
        self.0
    }

    #[inline(always)]
    unsafe fn rotate<const N: i32>(self) -> Self {
        let left = _mm256_sllv_epi32(self.0, _mm256_set1_epi32(32 - N));
        Self(_mm256_or_si256(_mm256_srli_epi32::<N>(self.0), left))
    }

    #[inline(always)]
    unsafe fn xor(self, b: Self, c: Self) -> Self {
        Self(_mm256_xor_si256(_mm256_xor_si256(self.0, b.0), c.0))
    }

    #[inline(always)]
    unsafe fn choose(self, b: Self, c: Self) -> Self {
        Self(_mm256_xor_si256(_mm256_and_si256(self.0, _mm256_xor_si256(b.0, c.0)), c.0))
    }

    #[inline(always)]
    unsafe fn majority(self, b: Self, c: Self) -> Self {
        let differ = _mm256_and_si256(_mm256_xor_si256(self.0, b.0), _mm256_xor_si256(b.0, c.0));
        Self(_mm256_xor_si256(differ, b.0))
    }
}

impl Words for Avx512 {
    #[inline(always)]
    fn of(words: __m256i) -> Self {
        Self(words)
    }

    #[inline(always)]
    fn get(self) -> __m256i {
        self.0
    }

    #[inline(always)]
    unsafe fn rotate<const N: i32>(self) -> Self {
        Self(_mm256_ror_epi32::<N>(self.0))
    }

    // The tables of the functions, by the bits of the three: 0xf0, 0xcc, 0xaa.
    #[inline(always)]
    unsafe fn xor(self, b: Self, c: Self) -> Self {
        Self(_mm256_ternarylogic_epi32::<{ 0xf0 ^ 0xcc ^ 0xaa }>(self.0, b.0, c.0))
    }

    #[inline(always)]
    unsafe fn choose(self, b: Self, c: Self) -> Self {
        Self(_mm256_ternarylogic_epi32::<{ (0xf0 & 0xcc) | (0x0f & 0xaa) }>(self.0, b.0, c.0))
    }

    #[inline(always)]
    unsafe fn majority(self, b: Self, c: Self) -> Self {
        Self(_mm256_ternarylogic_epi32::<{ (0xf0 & 0xcc) | (0xf0 & 0xaa) | (0xcc & 0xaa) }>(self.0, b.0, c.0))
    }
}

/// The sixteen words of eight blocks.
#[inline(always)]
unsafe fn load<W: Words>(blocks: [&Block; LANES]) -> [W; 16] {
    let big_endian =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
    let mut words = [W::all(0); 16];
    for (k, four) in words.chunks_exact_mut(4).enumerate() {
        // Words `4 k` and on, of one message and of the one four lanes on.
        let pair = |lane: usize| {
            let quarter = |block: &Block| _mm_loadu_si128(block[16 * k..16 * k + 16].as_ptr().cast());
            let pair = _mm256_set_m128i(quarter(blocks[lane + 4]), quarter(blocks[lane]));
            _mm256_shuffle_epi8(pair, big_endian)
        };
        let [a, b, c, d] = [pair(0), pair(1), pair(2), pair(3)];
        let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        four[0] = W::of(_mm256_unpacklo_epi64(ab, cd));
        four[1] = W::of(_mm256_unpackhi_epi64(ab, cd));
        let (ab, cd) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        four[2] = W::of(_mm256_unpacklo_epi64(ab, cd));
        four[3] = W::of(_mm256_unpackhi_epi64(ab, cd));
    }
    words
}

/// The word sixteen after `t`, in its place.
#[inline(always)]
unsafe fn extend<W: Words>(w: &mut [W; 16], t: usize) {
    let (x, y) = (w[(t + 1) % 16], w[(t + 14) % 16]);
    let s0 = x.rotate::<7>().xor(x.rotate::<18>(), x.shift::<3>());
    let s1 = y.rotate::<17>().xor(y.rotate::<19>(), y.shift::<10>());
    w[t] = w[t].add(s0).add(w[(t + 9) % 16].add(s1));
}

/// `$round!(t, names of the state's words)` for each `t`: instead of the words, their names move on.
macro_rules! rounds {
    ($round:ident, $($name:ident)*;) => {};
    (
        $round:ident, $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident;
        $t:literal $($more:literal)*
    ) => {
        $round!($t, $a $b $c $d $e $f $g $h);
        rounds!($round, $h $a $b $c $d $e $f $g; $($more)*);
    };
}

/// The blocks of eight messages, as many of each.
#[inline(always)]
unsafe fn many<W: Words>(states: &mut [[u32; LANES]; 8], blocks: &[&[Block]; LANES]) {
    let mut state = [W::all(0); 8];
    state.iter_mut().zip(&*states).for_each(|(s, words)| *s = W::load(words));
    let count = blocks.iter().map(|b| b.len()).min().unwrap_or(0);
    let mut n = 0;
    while n < count {
        let mut w = load::<W>(core::array::from_fn(|lane| &blocks[lane][n]));
        n += 1;
        let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = state;
        for (r, k) in K.as_chunks::<16>().0.iter().enumerate() {
            macro_rules! round {
                ($t:literal, $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident) => {
                    let s1 = $e.rotate::<6>().xor($e.rotate::<11>(), $e.rotate::<25>());
                    let t1 = $h.add(w[$t].add(W::all(k[$t]))).add(s1).add($e.choose($f, $g));
                    let s0 = $a.rotate::<2>().xor($a.rotate::<13>(), $a.rotate::<22>());
                    $d = $d.add(t1);
                    $h = t1.add(s0.add($a.majority($b, $c)));
                };
            }
            macro_rules! extended {
                ($t:literal, $($name:ident)*) => {
                    extend(&mut w, $t);
                    round!($t, $($name)*);
                };
            }
            if r == 0 {
                rounds!(round, a b c d e f g h; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
            } else {
                rounds!(extended, a b c d e f g h; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
            }
        }
        for (s, v) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
            *s = s.add(v);
        }
    }
    states.iter_mut().zip(state).for_each(|(words, s)| s.store(words));
}

/// The blocks of one message.
#[inline(always)]
unsafe fn one<W: Words>(state: &mut [u32; 8], blocks: &[Block]) {
    for group in blocks.chunks(LANES) {
        // Lanes that are left over repeat the last block, for nothing.
        let mut w = load::<W>(core::array::from_fn(|lane| &group[lane.min(group.len() - 1)]));
        // All words of the blocks, the constants added.
        let mut sums = [[0; LANES]; 64];
        for (r, (sums, k)) in sums.as_chunks_mut::<16>().0.iter_mut().zip(K.as_chunks::<16>().0).enumerate() {
            if r > 0 {
                (0..16).for_each(|t| extend(&mut w, t));
            }
            for t in 0..16 {
                w[t].add(W::all(k[t])).store(&mut sums[t]);
            }
        }
        for lane in 0..group.len() {
            let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
            // The majority of a, b, c is b where a and b agree or b and c do not; the next round's b and c are a and b.
            let mut differ = b ^ c;
            for sums in sums.as_chunks::<16>().0 {
                macro_rules! round {
                    ($t:literal, $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident) => {
                        let s1 = $e.rotate_right(6) ^ $e.rotate_right(11) ^ $e.rotate_right(25);
                        let choice = ($e & $f).wrapping_add(!$e & $g);
                        let t1 = $h.wrapping_add(sums[$t][lane]).wrapping_add(choice).wrapping_add(s1);
                        let s0 = $a.rotate_right(2) ^ $a.rotate_right(13) ^ $a.rotate_right(22);
                        $d = $d.wrapping_add(t1);
                        let next = $a ^ $b;
                        $h = t1.wrapping_add((next & differ) ^ $b).wrapping_add(s0);
                        differ = next;
                    };
                }
                rounds!(round, a b c d e f g h; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
            }
            for (s, v) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
                *s = s.wrapping_add(v);
            }
        }
    }
}
