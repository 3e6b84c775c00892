//! The two ends of a file: 64 bytes before the segments, 128 behind the manifest.

use crate::container::InputFile;
use crate::error::{Error, Result};

/// The first and the last 8 bytes. The first is no text, and line ends would not survive a transfer as text.
const MAGIC: [u8; 8] = *b"\x89qpack\r\n";
/// Version of the format that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Segments and the manifest begin at multiples of it.
pub const ALIGNMENT: u64 = 64;
pub(super) const HEADER: u64 = ALIGNMENT;
pub(super) const FOOTER: u64 = 128;
/// Most bytes of a signature.
pub(super) const MAX_SIGNATURE: u64 = 1 << 20;

/// Whether a file begins as this format does.
///
/// # Errors
/// `Io`.
pub fn is_qpack(file: &InputFile) -> Result<bool> {
    let mut magic = [0; 8];
    if file.len() < 8 {
        return Ok(false);
    }
    file.read_at(0, &mut magic)?;
    Ok(is_magic(&magic))
}

/// Whether these are the first 8 bytes of such a file, and the last.
pub fn is_magic(bytes: &[u8; 8]) -> bool {
    *bytes == MAGIC
}

/// The first bytes of a file.
pub fn header() -> [u8; HEADER as usize] {
    let mut out = [0; HEADER as usize];
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out
}

/// Checks the first bytes of a file.
pub(super) fn check_header(file: &InputFile) -> Result<()> {
    let mut found = [0; HEADER as usize];
    if file.len() < HEADER + FOOTER {
        return Err(Error::malformed(format!(
            "has {} bytes, a .qpack file at least {}",
            file.len(),
            HEADER + FOOTER
        ))
        .hint("the file is cut short, or something else"));
    }
    file.read_at(0, &mut found)?;
    if found[..8] != MAGIC {
        return Err(Error::malformed("is no .qpack file: it begins otherwise"));
    }
    check_version(u32_at(&found, 8))?;
    match found[12..].iter().position(|b| *b != 0) {
        None => Ok(()),
        Some(at) => Err(Error::malformed(format!("byte {} of its header is not 0", at + 12))),
    }
}

fn check_version(version: u32) -> Result<()> {
    match version {
        VERSION => Ok(()),
        0 => Err(Error::malformed("is of version 0, which there is not")),
        _ => Err(Error::unsupported(format!("is of version {version}, versions up to {VERSION} are read"))
            .hint("a newer qconv reads it")),
    }
}

/// What the last bytes say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Footer {
    /// First byte of the manifest, and its length.
    pub manifest: (u64, u64),
    pub manifest_sha256: [u8; 32],
    /// Bytes of the signature, between manifest and footer.
    pub signature: u64,
    pub signature_sha256: [u8; 32],
}

impl Footer {
    pub fn bytes(&self) -> [u8; FOOTER as usize] {
        let mut out = [0; FOOTER as usize];
        out[..8].copy_from_slice(&self.manifest.0.to_le_bytes());
        out[8..16].copy_from_slice(&self.manifest.1.to_le_bytes());
        out[16..48].copy_from_slice(&self.manifest_sha256);
        out[48..56].copy_from_slice(&self.signature.to_le_bytes());
        out[56..88].copy_from_slice(&self.signature_sha256);
        out[88..92].copy_from_slice(&VERSION.to_le_bytes());
        out[120..].copy_from_slice(&MAGIC);
        out
    }

    /// Reads and checks the last bytes of a file.
    pub fn read(file: &InputFile) -> Result<Self> {
        let mut bytes = [0; FOOTER as usize];
        file.read_at(file.len() - FOOTER, &mut bytes)?;
        let cut = |what: &str| {
            Error::malformed(what)
                .hint("the file is cut short, or something was appended to it: fetch it again")
        };
        if bytes[120..] != MAGIC {
            return Err(cut("does not end as a .qpack file"));
        }
        check_version(u32_at(&bytes, 88))?;
        if bytes[92..120].iter().any(|b| *b != 0) {
            return Err(Error::malformed("bytes of its footer that have to be 0 are not"));
        }
        let hash = |at: usize| std::array::from_fn(|i| bytes[at + i]);
        let footer = Self {
            manifest: (u64_at(&bytes, 0), u64_at(&bytes, 8)),
            manifest_sha256: hash(16),
            signature: u64_at(&bytes, 48),
            signature_sha256: hash(56),
        };
        let (begin, len) = footer.manifest;
        let end = begin.checked_add(len).and_then(|n| n.checked_add(footer.signature)?.checked_add(FOOTER));
        if end != Some(file.len()) || begin < HEADER || !begin.is_multiple_of(ALIGNMENT) {
            return Err(cut(&format!(
                "its manifest should have {len} bytes at {begin}, its signature {}, and the file ends at {}",
                footer.signature,
                file.len()
            )));
        }
        if footer.signature > MAX_SIGNATURE {
            return Err(Error::limit(format!(
                "its signature has {} bytes, at most {MAX_SIGNATURE} are allowed",
                footer.signature
            )));
        }
        Ok(footer)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}
