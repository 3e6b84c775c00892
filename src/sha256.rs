//! SHA-256, as fast as the processor has it.
//!
//! Of `ring`, whose code uses the instructions for it (x86's SHA extensions, ARM's) and AVX elsewhere: without them it
//! is twice as fast as `sha2` 0.10, with them as fast (on ARM, where that has none unless it is built so, several times).

pub mod lanes;

/// A sum in the making.
#[derive(Clone)]
pub struct Sha256(ring::digest::Context);

impl Sha256 {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self(ring::digest::Context::new(&ring::digest::SHA256))
    }

    /// With more bytes.
    pub fn update(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.update(bytes.as_ref());
    }

    /// The sum.
    pub fn finalize(self) -> [u8; 32] {
        let digest = self.0.finish();
        std::array::from_fn(|i| digest.as_ref()[i]) // SHA-256 has 32
    }

    /// Of these bytes.
    pub fn digest(bytes: impl AsRef<[u8]>) -> [u8; 32] {
        let mut sum = Self::new();
        sum.update(bytes);
        sum.finalize()
    }
}

/// Bytes as hexadecimal digits, in lower case.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

impl Default for Sha256 {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sha256")
    }
}

#[cfg(test)]
mod tests {
    use super::Sha256;
    use sha2::Digest;

    #[test]
    fn the_same_as_another_implementation() {
        let bytes: Vec<u8> = (0..10_000u32).map(|i| ((i * i) >> 3) as u8).collect();
        for len in [0, 1, 55, 56, 63, 64, 65, 1000, 9999] {
            let wanted: [u8; 32] = sha2::Sha256::digest(&bytes[..len]).into();
            assert_eq!(Sha256::digest(&bytes[..len]), wanted, "{len} bytes");
            let mut parts = Sha256::new();
            bytes[..len].chunks(37).for_each(|chunk| parts.update(chunk));
            assert_eq!(parts.clone().finalize(), wanted, "{len} bytes");
        }
    }
}
