//! Tensors that are written as several others, or were several: those of `.qpack`, where nothing is decoded and
//! nothing rounded, and those of Core ML packages.

use std::fmt::Debug;

use super::journal::Written;
use super::outcome::{Loss, Spanned};
use super::pack::PartPlan;
use super::stage::OutputFile;
use super::stream::Observer;
use super::to_coreml::weights::{Scratch, WeightPlan};
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
    /// How its weights become codes; `copy` where they are those of the source.
    pub method: &'static str,
    /// The tensors that are written.
    pub parts: Vec<PartPlan>,
    by: By,
}

/// Bytes of buffers where a tensor is moved as a whole.
const PANELS: u64 = 16 << 20;

/// What moves the bytes.
#[derive(Debug)]
enum By {
    /// Into an encoding of `.qpack`.
    Taking(Box<Taken>),
    /// Out of one.
    Restoring(Box<(Tensor, Origin)>),
    /// Into the blobs of a Core ML package.
    Encoding(Box<WeightPlan>),
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
        Ok(Self { kind: kind(&tensor.encoding), method: "copy", parts, by: By::Taking(Box::new(taken)) })
    }

    /// Out of `.qpack`, as the tensors that it was made from.
    pub fn restored(tensor: Tensor, origin: Origin) -> Self {
        let parts = origin.parts.iter().map(|s| PartPlan::new(&s.name, s.dtype, &s.shape)).collect();
        Self {
            kind: kind(&tensor.encoding),
            method: "copy",
            parts,
            by: By::Restoring(Box::new((tensor, origin))),
        }
    }

    /// Into the blobs of a Core ML package, which have their places.
    pub(super) fn encoding(weight: WeightPlan, parts: Vec<PartPlan>) -> Self {
        let (kind, method) = weight.kind();
        Self { kind, method, parts, by: By::Encoding(Box::new(weight)) }
    }

    /// Into how many spans the work falls.
    pub(super) fn spans(&self) -> u64 {
        match &self.by {
            By::Taking(_) | By::Restoring(_) => 1,
            By::Encoding(weight) => weight.spans() as u64,
        }
    }

    /// Bytes of the buffers of a worker: panels of rows, before and after, or a span of weights.
    pub(super) fn buffer_bytes(&self, nbytes: u64) -> u64 {
        match &self.by {
            By::Taking(_) | By::Restoring(_) => nbytes.saturating_mul(2).min(PANELS),
            By::Encoding(weight) => weight.buffer_bytes(),
        }
    }

    /// Writes a span of all parts.
    ///
    /// # Errors
    /// As reads and writes fail; `Interrupted` when the observer says so.
    pub(super) fn write(
        &self,
        (name, span): (&str, u64),
        store: &Store,
        files: &[OutputFile],
        scratch: &mut Scratch,
        observer: &dyn Observer,
        mut note: Option<&mut Written>,
    ) -> Result<Spanned> {
        let put = |number: usize, offset: u64, bytes: &[u8]| {
            if observer.interrupted() {
                return Err(Error::interrupted());
            }
            let part = self.parts.get(number).ok_or_else(|| Error::misuse("a part that is not there"))?;
            observer.advance(bytes.len() as u64, name);
            files[part.file].write_at(part.offset + offset, bytes)
        };
        let putting: &mut Put<'_> = &mut |number, offset, bytes| {
            put(number, offset, bytes)?;
            if let (Some(note), Some(part)) = (&mut note, self.parts.get(number)) {
                note.note(number, (part.file, part.offset + offset), bytes);
            }
            Ok(())
        };
        let mut done = Spanned { loss: Some(Loss::default()), ..Spanned::default() };
        match &self.by {
            By::Taking(taken) => taken.write(store, putting)?,
            By::Restoring(both) => restore(store, &both.0, &both.1, putting)?,
            By::Encoding(weight) => {
                let became = weight.write(store, span as usize, scratch, &put)?;
                done.loss = Some(Loss { lost: became.lost, power: became.power });
                done.flushed = became.flushed;
            }
        }
        Ok(done)
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
