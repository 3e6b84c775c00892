//! Inputs taken apart.

/// Values off the front of an input; behind its end everything is 0.
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// So many bytes, or what is left.
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub fn u16(&mut self) -> u16 {
        u16::from(self.u8()) | u16::from(self.u8()) << 8
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.u8()) % of.len()]
    }

    /// Numbers, most of them small, some as large as there are.
    pub fn number(&mut self) -> i64 {
        match self.u8() {
            n @ 0..=199 => i64::from(n),
            200..=219 => -i64::from(self.u8()),
            220..=239 => i64::from(self.u16()),
            240..=247 => 1 << (self.u8() % 63),
            _ => i64::from_le_bytes(std::array::from_fn(|_| self.u8())),
        }
    }

    /// Numbers of 4 bytes until the end.
    pub fn floats(&mut self) -> Vec<f32> {
        std::mem::take(&mut self.0).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

/// Most files of a directory.
const MOST_PARTS: usize = 8;
/// What stands before the name of a part.
const MARK: &[u8] = b"\n%% ";

/// An input that stands for several files: `%% NAME`, a line end, the bytes, a line end, and so on. Names are plain.
pub fn parts(data: &[u8]) -> Vec<(&str, &[u8])> {
    let mut found = Vec::new();
    let Some(mut rest) = data.strip_prefix(&MARK[1..]) else { return found };
    while found.len() < MOST_PARTS {
        let end = rest.windows(MARK.len()).position(|w| w == MARK);
        let part = &rest[..end.unwrap_or(rest.len())];
        let line = part.iter().position(|b| *b == b'\n').unwrap_or(part.len());
        let plain = |name: &&str| {
            !name.is_empty()
                && name.len() <= 64
                && !name.starts_with('.')
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if let Some(name) = std::str::from_utf8(&part[..line]).ok().filter(plain) {
            found.push((name, part.get(line + 1..).unwrap_or_default()));
        }
        match end {
            Some(end) => rest = &rest[end + MARK.len()..],
            None => break,
        }
    }
    found
}

/// The part of this name.
pub fn part<'a>(parts: &[(&str, &'a [u8])], name: &str) -> Option<&'a [u8]> {
    parts.iter().find(|(own, _)| *own == name).map(|(_, bytes)| *bytes)
}
