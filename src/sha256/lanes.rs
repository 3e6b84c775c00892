//! SHA-256 of several messages at once.
//!
//! Of one message, each block waits for the one before; of several, the same words lie beside each other in
//! registers. On x86-64 without instructions for SHA-256, AVX2 makes eight messages together 4 times as fast as
//! one after the other, AVX-512's instructions 6 times. Elsewhere messages go one by one, to [`Sha256`].

// `unsafe` has its place, and this has another.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[path = "../block/simd/sha256.rs"]
mod simd;

use super::Sha256;

/// Bytes that are compressed at once.
type Block = [u8; 64];

/// Messages that a kernel compresses at once.
const LANES: usize = 8;

/// An implementation of the compression of blocks. A state is eight words.
#[derive(Debug)]
struct Kernel {
    /// Blocks of several messages, of each as many; states are given word by word.
    many: fn(&mut [[u32; LANES]; 8], &[&[Block]; LANES]),
    /// Blocks of one message.
    one: fn(&mut [u32; 8], &[Block]),
    /// Fewer messages than these are faster one by one.
    few: usize,
}

/// The hash of one of several messages.
#[derive(Clone, Debug)]
pub struct Lane(Inner);

#[derive(Clone, Debug)]
enum Inner {
    Alone(Sha256),
    Beside(Stream),
}

#[derive(Clone, Debug)]
struct Stream {
    kernel: &'static Kernel,
    state: [u32; 8],
    /// How many there were.
    bytes: u64,
    /// Those of a block that is not whole.
    rest: Block,
}

impl Lane {
    /// Of a message that has no others beside it.
    pub fn alone() -> Self {
        Self(Inner::Alone(Sha256::new()))
    }

    /// Of a message that has others beside it.
    pub fn beside() -> Self {
        // Without optimization, as tests are often built, the kernels are slow.
        let is_better = !hardware() && !cfg!(unoptimized);
        kernels().next().filter(|_| is_better).map_or_else(Self::alone, Self::by)
    }

    /// By each implementation that the CPU can run.
    #[cfg(test)]
    pub(crate) fn implementations() -> Vec<Self> {
        kernels().map(Self::by).chain([Self::alone()]).collect()
    }

    fn by(kernel: &'static Kernel) -> Self {
        Self(Inner::Beside(Stream { kernel, state: START, bytes: 0, rest: [0; 64] }))
    }

    /// How many like this are best computed at once, on one thread.
    pub fn at_once(&self) -> usize {
        match self.0 {
            Inner::Alone(_) => 1,
            Inner::Beside(_) => LANES,
        }
    }

    /// The hash.
    pub fn finalize(self) -> [u8; 32] {
        match self.0 {
            Inner::Alone(hash) => hash.finalize(),
            Inner::Beside(stream) => stream.finalize(),
        }
    }
}

impl Stream {
    /// Counts all bytes, completes a block that was begun, keeps what is no block, and gives the blocks between.
    fn take<'a>(&mut self, bytes: &'a [u8]) -> &'a [Block] {
        let held = (self.bytes % 64) as usize;
        self.bytes = self.bytes.wrapping_add(bytes.len() as u64);
        let (more, bytes) = bytes.split_at(bytes.len().min((64 - held) % 64));
        self.rest[held..held + more.len()].copy_from_slice(more);
        if held > 0 && held + more.len() == 64 {
            (self.kernel.one)(&mut self.state, &[self.rest]);
        }
        let (blocks, rest) = bytes.as_chunks::<64>();
        if !rest.is_empty() {
            self.rest[..rest.len()].copy_from_slice(rest);
        }
        blocks
    }

    fn finalize(mut self) -> [u8; 32] {
        let held = (self.bytes % 64) as usize;
        let mut end = [[0; 64]; 2];
        end[0][..held].copy_from_slice(&self.rest[..held]);
        end[0][held] = 0x80;
        // The length in bits, where it fits behind that.
        let last = usize::from(held >= 56);
        end[last][56..].copy_from_slice(&self.bytes.wrapping_mul(8).to_be_bytes());
        (self.kernel.one)(&mut self.state, &end[..=last]);
        let mut out = [0; 32];
        out.as_chunks_mut()
            .0
            .iter_mut()
            .zip(self.state)
            .for_each(|(bytes, word)| *bytes = word.to_be_bytes());
        out
    }
}

/// Each gets bytes of its message, several at once where that is faster.
pub fn update<'a>(lanes: impl IntoIterator<Item = (&'a mut Lane, &'a [u8])>) {
    let mut open = Vec::new();
    for (lane, bytes) in lanes {
        match &mut lane.0 {
            Inner::Alone(hash) => hash.update(bytes),
            Inner::Beside(stream) => {
                let blocks = stream.take(bytes);
                open.push((stream, blocks));
            }
        }
    }
    loop {
        open.retain(|(_, blocks)| !blocks.is_empty());
        let Some(kernel) = open.first().map(|(stream, _)| stream.kernel) else { return };
        let used = open.len().min(LANES);
        if used < kernel.few {
            break;
        }
        let count = open[..used].iter().map(|(_, blocks)| blocks.len()).min().unwrap_or(0);
        // Lanes that are left over repeat the last message, for nothing.
        let lane = |k: usize| &open[k.min(used - 1)];
        let mut states = std::array::from_fn(|word| std::array::from_fn(|k| lane(k).0.state[word]));
        (kernel.many)(&mut states, &std::array::from_fn(|k| &lane(k).1[..count]));
        for (k, (stream, blocks)) in open[..used].iter_mut().enumerate() {
            stream.state = states.map(|words| words[k]);
            *blocks = &blocks[count..];
        }
    }
    for (stream, blocks) in open {
        (stream.kernel.one)(&mut stream.state, blocks);
    }
}

/// Those that this CPU can run, the fastest first.
fn kernels() -> impl Iterator<Item = &'static Kernel> {
    #[cfg(target_arch = "x86_64")]
    return simd::kernels();
    #[cfg(not(target_arch = "x86_64"))]
    std::iter::empty()
}

/// Whether the CPU has instructions for it: they are as fast for one message.
fn hardware() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("sha");
    #[cfg(not(target_arch = "x86_64"))]
    true
}

/// Of the square roots of the first primes (FIPS 180-4, 5.3.3).
const START: [u32; 8] = fractions(2);
/// Of their cube roots (4.2.2).
#[cfg(target_arch = "x86_64")]
const K: [u32; 64] = fractions(3);

/// The first 32 bits behind the point of the roots of the first primes.
const fn fractions<const N: usize>(degree: u32) -> [u32; N] {
    let mut found = [0; N];
    let (mut n, mut number) = (0, 2u128);
    while n < N {
        let mut divisor = 2;
        while !number.is_multiple_of(divisor) {
            divisor += 1;
        }
        if divisor == number {
            // The root times 2^32, bit by bit; that of the greatest has 37.
            let (mut root, mut bit) = (0u128, 1u128 << 37);
            while bit > 0 {
                if (root | bit).pow(degree) <= number << (32 * degree) {
                    root |= bit;
                }
                bit >>= 1;
            }
            found[n] = root as u32;
            n += 1;
        }
        number += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sha256::hex;
    use proptest::prelude::*;
    use sha2::Digest;

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as u8
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    /// Of NIST's "Examples with Intermediate Values", and of no bytes.
    #[test]
    fn examples_of_nist() {
        let million = vec![b'a'; 1_000_000];
        let two_blocks = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
        let examples: [(&[u8], &str); 4] = [
            (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (two_blocks, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"),
            (&million, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
        ];
        for (message, expected) in examples {
            for mut hash in Lane::implementations() {
                update([(&mut hash, message)]);
                assert_eq!(hex(&hash.finalize()), expected);
            }
        }
    }

    /// All ends of blocks, and all numbers of blocks around those that are compressed at once.
    #[test]
    fn every_length() {
        let bytes = noise(1200, 1);
        for len in 0..bytes.len() {
            let expected: [u8; 32] = sha2::Sha256::digest(&bytes[..len]).into();
            for mut hash in Lane::implementations() {
                update([(&mut hash, &bytes[..len])]);
                assert_eq!(hash.finalize(), expected, "{len} bytes");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// However bytes are divided, and however many messages there are at once.
        #[test]
        fn as_sha2_has_it(lens in prop::collection::vec(prop_oneof![0usize..200, 0usize..4000], 1..20), step in 1usize..2000) {
            let messages: Vec<_> = lens.iter().zip(0..).map(|(len, seed)| noise(*len, seed)).collect();
            for start in Lane::implementations() {
                let mut hashes = vec![start; messages.len()];
                for from in (0..4000).step_by(step) {
                    let part = |m: &'_ Vec<u8>| from.min(m.len())..(from + step).min(m.len());
                    update(hashes.iter_mut().zip(&messages).map(|(hash, m)| (hash, &m[part(m)])));
                }
                for (hash, message) in hashes.into_iter().zip(&messages) {
                    prop_assert_eq!(hash.finalize(), <[u8; 32]>::from(sha2::Sha256::digest(message)));
                }
            }
        }
    }
}
