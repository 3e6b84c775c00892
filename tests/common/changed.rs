//! Inputs changed as libFuzzer does, and always the same ones.

/// Numbers that only look random (Marsaglia's xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

/// An input changed in a few places; `other` is one of the same kind.
pub fn changed(random: &mut Random, data: &[u8], other: &[u8]) -> Vec<u8> {
    const NUMBERS: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff_ffff, 1 << 31, 1 << 63, u64::MAX];
    let mut data = data.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(data.len());
        let n = random.below(data.len() - at).min(64);
        match random.below(8) {
            0 => data.truncate(at),
            1 => drop(data.drain(at..at + n)),
            2 => drop(data.splice(at..at, data[at..at + n].to_vec())),
            3 if !other.is_empty() => {
                let from = random.below(other.len());
                let taken = &other[from..from + random.below(other.len() - from).min(64)];
                let end = (at + taken.len()).min(data.len());
                drop(data.splice(at..end, taken.to_vec()));
            }
            4 => {
                let number = NUMBERS[random.below(NUMBERS.len())].to_le_bytes();
                let to = data.iter_mut().skip(at).take(1 << random.below(4));
                to.zip(number).for_each(|(to, from)| *to = from);
            }
            5 => data
                .iter_mut()
                .skip(at)
                .take(1)
                .for_each(|b| *b = b.wrapping_add(random.below(9) as u8).wrapping_sub(4)),
            _ => data.iter_mut().skip(at).take(1).for_each(|b| *b ^= 1 << random.below(8)),
        }
    }
    data
}
