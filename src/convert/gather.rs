//! Fetching: the values of a planned tensor, for any span of it, from the source's files.
//!
//! A copy is cut to the span, and each part gathered from the source ([`StridedCopy::gather`]).
//! Permuted rows, transposes and stacked experts all come down to this.

use crate::arch::{Data, Elementwise, Mapped, Piece};
use crate::block::{Codec, codec};
use crate::container::Store;
use crate::error::{Error, Result};
use crate::tensor::{DType, Dim, StridedCopy, TensorInfo};

/// A planned tensor tied to the store it reads from.
#[derive(Debug)]
pub struct Source {
    kind: Kind,
    elementwise: Vec<Elementwise>,
    elements: u64,
    contiguous: bool,
    /// Some elements have no source: they are zero.
    has_gaps: bool,
}

#[derive(Debug)]
enum Kind {
    Values(Vec<f32>),
    Stored { dtype: DType, pieces: Vec<(TensorInfo, StridedCopy)>, blocks: Option<Vec<StridedCopy>> },
}

/// Tensors that stay what they are.
pub fn identity(tensors: &[TensorInfo]) -> Vec<Mapped> {
    tensors
        .iter()
        .map(|t| Mapped {
            name: t.name.clone(),
            shape: t.shape.clone(),
            data: Data::Copied {
                pieces: vec![Piece { source: t.name.clone(), copy: StridedCopy::identity(t.elements()) }],
                elementwise: Vec::new(),
            },
        })
        .collect()
}

/// Buffers of one worker, kept between spans.
#[derive(Debug, Default)]
pub struct Scratch {
    stretch: Vec<u8>,
    decoded: Vec<f32>,
    raw: Vec<u8>,
}

impl Source {
    /// Ties `mapped` to `store`.
    ///
    /// # Errors
    /// `Unsupported` when pieces differ in type, or nothing can decode the type.
    pub fn new(mapped: &Mapped, store: &Store) -> Result<Self> {
        let elements = crate::tensor::elements(&mapped.shape)?;
        let Data::Copied { pieces, elementwise } = &mapped.data else {
            let Data::Values(values) = &mapped.data else { unreachable!("data is copied or values") };
            return Ok(Self {
                kind: Kind::Values(values.clone()),
                elementwise: Vec::new(),
                elements,
                contiguous: true,
                has_gaps: false,
            });
        };
        let mut tied: Vec<(TensorInfo, StridedCopy)> = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let info = store
                .get(&piece.source)
                .ok_or_else(|| Error::malformed(format!("tensor {:?} is missing", piece.source)))?;
            if piece.copy.elements() > 0
                && (piece.copy.src_end() > info.elements() || piece.copy.dst_end() > elements)
            {
                return Err(Error::malformed(format!("tensor {:?} is smaller than its use", info.name)));
            }
            if let Some((first, _)) = tied.first()
                && first.dtype != info.dtype
            {
                return Err(Error::unsupported(format!(
                    "tensor {:?} is {}, but {:?}, which goes into the same tensor, is {}",
                    info.name, info.dtype, first.name, first.dtype
                )));
            }
            tied.push((info.clone(), piece.copy.clone()));
        }
        let Some(dtype) = tied.first().map(|(info, _)| info.dtype) else {
            return Err(Error::malformed(format!("tensor {:?} has no source", mapped.name)));
        };
        let copied = tied.iter().try_fold(0u64, |n, (_, copy)| n.checked_add(copy.elements()));
        let has_gaps = copied.is_none_or(|n| n < elements);
        let blocks = tied.iter().map(|(_, copy)| copy.in_blocks(dtype.block_size())).collect();
        let plain = |copy: &StridedCopy| matches!(copy.dims[..], [] | [Dim { src: 1, dst: 1, .. }]);
        let contiguous = tied.iter().all(|(info, copy)| plain(copy) && !store.is_scattered(info));
        Ok(Self {
            kind: Kind::Stored { dtype, pieces: tied, blocks },
            elementwise: elementwise.clone(),
            elements,
            contiguous,
            has_gaps,
        })
    }

    /// Type of the source's values; `None` for values that were computed.
    pub fn dtype(&self) -> Option<DType> {
        match &self.kind {
            Kind::Values(_) => None,
            Kind::Stored { dtype, .. } => Some(*dtype),
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.elements
    }

    /// Whether the source's bytes can go into an output of `dtype` untouched.
    pub fn is_plain(&self, dtype: DType) -> bool {
        self.elementwise.is_empty()
            && matches!(&self.kind, Kind::Stored { dtype: d, blocks: Some(_), .. } if *d == dtype)
    }

    /// Whether a span is one stretch of one source tensor, so that small spans cost nothing.
    pub fn is_contiguous(&self) -> bool {
        self.contiguous
    }

    /// The codec that decodes the source, where its values are needed.
    ///
    /// # Errors
    /// `Unsupported` when there is none.
    pub fn check_decodable(&self) -> Result<()> {
        match self.dtype() {
            Some(dtype) => decoder(dtype).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Bytes of elements `start..end`, in the source's own type. Only where [`Self::is_plain`].
    ///
    /// # Errors
    /// As reads fail.
    pub fn raw(
        &self,
        store: &Store,
        start: u64,
        end: u64,
        out: &mut Vec<u8>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Kind::Stored { dtype, pieces, blocks: Some(blocks) } = &self.kind else {
            return Err(Error::misuse("only stored values have bytes of their own"));
        };
        let (block, size) = (dtype.block_size(), dtype.type_size());
        let (start, end) = (start / block, end / block);
        out.resize(((end - start) * size) as usize, 0);
        if self.has_gaps {
            out.fill(0);
        }
        for ((info, _), copy) in pieces.iter().zip(blocks) {
            for part in copy.clip(start, end) {
                let mut fetch = |lo: u64, buf: &mut [u8]| store.read(info, lo * size, buf);
                part.gather(start, size, out, &mut scratch.stretch, &mut fetch)?;
            }
        }
        Ok(())
    }

    /// Values of elements `start..end`, after all arithmetic.
    ///
    /// # Errors
    /// As reads fail; `Unsupported` when nothing decodes the type.
    pub fn values(
        &self,
        store: &Store,
        start: u64,
        end: u64,
        out: &mut Vec<f32>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        out.resize((end - start) as usize, 0.0);
        if self.has_gaps {
            out.fill(0.0);
        }
        match &self.kind {
            Kind::Values(values) => {
                let range = values.get(start as usize..end as usize);
                out.copy_from_slice(range.ok_or_else(|| Error::misuse("a span beyond the tensor"))?);
            }
            Kind::Stored { dtype, pieces, blocks } => {
                let codec = decoder(*dtype)?;
                if blocks.is_some() {
                    let mut raw = std::mem::take(&mut scratch.raw);
                    self.raw(store, start, end, &mut raw, scratch)?;
                    codec.decode(&raw, out)?;
                    scratch.raw = raw;
                } else {
                    // Blocks fall apart (a transposed quantized matrix): decode stretch by stretch.
                    let Scratch { stretch: buffer, decoded, raw } = scratch;
                    for (info, copy) in pieces {
                        for part in copy.clip(start, end) {
                            let mut fetch = |lo: u64, buf: &mut [u8]| {
                                decode_stretch(store, info, codec, lo, buf, raw, decoded)
                            };
                            let bytes = bytemuck::cast_slice_mut(out.as_mut_slice());
                            part.gather(start, 4, bytes, buffer, &mut fetch)?;
                        }
                    }
                }
            }
        }
        self.elementwise.iter().for_each(|e| e.apply(out));
        Ok(())
    }
}

fn decoder(dtype: DType) -> Result<&'static Codec> {
    codec(dtype).ok_or_else(|| Error::unsupported(format!("values of type {dtype} cannot be read yet")))
}

/// Fills `buf` with f32 values from element `lo` on, decoding the blocks they lie in.
fn decode_stretch(
    store: &Store,
    info: &TensorInfo,
    codec: &Codec,
    lo: u64,
    buf: &mut [u8],
    raw: &mut Vec<u8>,
    decoded: &mut Vec<f32>,
) -> Result<()> {
    let (block, size) = (info.dtype.block_size(), info.dtype.type_size());
    let n = buf.len() as u64 / 4;
    let (first, last) = (lo / block, (lo + n).div_ceil(block));
    raw.resize(((last - first) * size) as usize, 0);
    store.read(info, first * size, raw)?;
    decoded.resize(((last - first) * block) as usize, 0.0);
    codec.decode(raw, decoded)?;
    let skip = (lo - first * block) as usize;
    buf.copy_from_slice(bytemuck::cast_slice(&decoded[skip..skip + n as usize]));
    Ok(())
}
