//! Tensors whose bytes are moved into several others, or out of several: nothing is decoded, nothing rounded.

use std::fmt::Debug;

use super::pack::PartPlan;
use super::stage::OutputFile;
use super::stream::Observer;
use crate::container::Store;
use crate::container::qpack::{Encoding, Origin, Part, Tensor};
use crate::error::{Error, Result};
use crate::packed::qpack::{Taken, restore};
use crate::packed::write::Put;
use crate::tensor::DType;

/// A planned tensor that is moved.
#[derive(Debug)]
pub struct Moved {
    /// What it is on the way, such as `integers`.
    pub kind: &'static str,
    /// The tensors that are written.
    pub parts: Vec<PartPlan>,
    by: By,
}

/// What moves the bytes.
#[derive(Debug)]
enum By {
    /// Into an encoding of `.qpack`.
    Taking(Box<Taken>),
    /// Out of one.
    Restoring(Box<(Tensor, Origin)>),
}

impl Moved {
    /// Into an encoding of `.qpack`.
    ///
    /// # Errors
    /// `Malformed` for impossible sizes.
    pub fn taken(taken: Taken) -> Result<Self> {
        let tensor = &taken.tensor;
        let sizes = tensor.encoding.parts(&tensor.shape)?.unwrap_or_default();
        let part = |(k, part): (usize, &Part)| match sizes.get(k) {
            Some(size) if !size.varies => PartPlan::new(&part.name, size.dtype, &size.shape),
            _ => PartPlan::new(&part.name, DType::U8, &[part.segment.bytes]),
        };
        let parts = tensor.parts.iter().enumerate().map(part).collect();
        Ok(Self { kind: kind(&tensor.encoding), parts, by: By::Taking(Box::new(taken)) })
    }

    /// Out of `.qpack`, as the tensors that it was made from.
    pub fn restored(tensor: Tensor, origin: Origin) -> Self {
        let parts = origin.parts.iter().map(|s| PartPlan::new(&s.name, s.dtype, &s.shape)).collect();
        Self { kind: kind(&tensor.encoding), parts, by: By::Restoring(Box::new((tensor, origin))) }
    }

    /// Writes all parts.
    ///
    /// # Errors
    /// As reads and writes fail; `Interrupted` when the observer says so.
    pub(super) fn write(
        &self,
        name: &str,
        store: &Store,
        files: &[OutputFile],
        observer: &dyn Observer,
    ) -> Result<()> {
        let put: &mut Put<'_> = &mut |part: usize, offset: u64, bytes: &[u8]| {
            if observer.interrupted() {
                return Err(Error::interrupted());
            }
            let part = self.parts.get(part).ok_or_else(|| Error::misuse("a part that is not there"))?;
            observer.advance(bytes.len() as u64, name);
            files[part.file].write_at(part.offset + offset, bytes)
        };
        match &self.by {
            By::Taking(taken) => taken.write(store, put),
            By::Restoring(both) => restore(store, &both.0, &both.1, put),
        }
    }
}

fn kind(encoding: &Encoding) -> &'static str {
    match encoding {
        Encoding::Plain(dtype) => dtype.name(),
        Encoding::Integers(_) => "integers",
        Encoding::Codebook(_) => "codebook",
        Encoding::Ternary(_) => "ternary",
        Encoding::Sparse(_) => "sparse_ternary",
        Encoding::Scaled(_) => "scaled",
        Encoding::Unknown(_) => "unknown",
    }
}
