//! Fetching: the values of a planned tensor, for any span of it, from the source's files.
//!
//! A copy is cut to the span, and each part gathered from the source ([`StridedCopy::gather`]).
//! Permuted rows, transposes and stacked experts all come down to this.

use super::fold::{Factor, Side};
use super::low_rank::{self, Held};
use crate::arch::{self, Data, Elementwise, Mapped};
use crate::block::{Codec, codec};
use crate::container::{LowRank, Store};
use crate::error::{Error, Result};
use crate::tensor::{DType, Dim, StridedCopy, TensorInfo};
use crate::work::resize;

/// A planned tensor tied to the store it reads from.
#[derive(Debug)]
pub struct Source {
    kind: Kind,
    elementwise: Vec<Elementwise>,
    factors: Vec<Factor>,
    elements: u64,
    contiguous: bool,
    /// Some elements have no source: they are zero.
    has_gaps: bool,
}

#[derive(Debug)]
enum Kind {
    Values(Vec<f32>),
    Stored { dtype: DType, pieces: Vec<Piece>, blocks: Option<Vec<StridedCopy>> },
}

/// A copy from one tensor of the store, to which products may be added first.
#[derive(Debug)]
struct Piece {
    info: TensorInfo,
    copy: StridedCopy,
    added: Vec<LowRank>,
}

/// Tensors that stay what they are.
pub fn identity(tensors: &[TensorInfo]) -> Vec<Mapped> {
    tensors
        .iter()
        .map(|t| Mapped {
            name: t.name.clone(),
            shape: t.shape.clone(),
            data: Data::Copied {
                pieces: vec![arch::Piece {
                    source: t.name.clone(),
                    copy: StridedCopy::identity(t.elements()),
                }],
                elementwise: Vec::new(),
            },
            fixed: None,
        })
        .collect()
}

/// Buffers of one worker, kept between spans.
#[derive(Debug, Default)]
pub struct Scratch {
    stretch: Vec<u8>,
    decoded: Vec<f32>,
    raw: Vec<u8>,
    held: Held,
}

impl Source {
    /// What is added to pieces on the way.
    pub fn added(&self) -> impl Iterator<Item = &LowRank> {
        let pieces = match &self.kind {
            Kind::Stored { pieces, .. } => pieces.as_slice(),
            Kind::Values(_) => &[],
        };
        pieces.iter().flat_map(|piece| &piece.added)
    }

    /// Ties `mapped` to `store`.
    ///
    /// # Errors
    /// `Unsupported` when pieces differ in type, or nothing can decode the type.
    pub fn new(mapped: &Mapped, store: &Store) -> Result<Self> {
        let elements = crate::tensor::elements(&mapped.shape)?;
        let (pieces, elementwise) = match &mapped.data {
            Data::Copied { pieces, elementwise } => (pieces, elementwise),
            Data::Values(values) => {
                return Ok(Self { kind: Kind::Values(values.clone()), ..Self::moved(elements) });
            }
        };
        let mut tied: Vec<Piece> = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let info = store
                .get(&piece.source)
                .ok_or_else(|| Error::malformed(format!("tensor {:?} is missing", piece.source)))?;
            if piece.copy.elements() > 0
                && (piece.copy.src_end() > info.elements() || piece.copy.dst_end() > elements)
            {
                return Err(Error::malformed(format!("tensor {:?} is smaller than its use", info.name)));
            }
            if let Some(Piece { info: first, .. }) = tied.first()
                && first.dtype != info.dtype
            {
                return Err(Error::unsupported(format!(
                    "tensor {:?} is {}, but {:?}, which goes into the same tensor, is {}",
                    info.name, info.dtype, first.name, first.dtype
                )));
            }
            let added = store.added(&info.name).to_vec();
            tied.push(Piece { info: info.clone(), copy: piece.copy.clone(), added });
        }
        let Some(dtype) = tied.first().map(|p| p.info.dtype) else {
            return Err(Error::malformed(format!("tensor {:?} has no source", mapped.name)));
        };
        let copied = tied.iter().try_fold(0u64, |n, p| n.checked_add(p.copy.elements()));
        let has_gaps = copied.is_none_or(|n| n < elements);
        let changed = tied.iter().any(|p| !p.added.is_empty());
        let in_blocks = || tied.iter().map(|p| p.copy.in_blocks(dtype.block_size())).collect();
        let blocks = if changed { None } else { in_blocks() };
        let plain = |copy: &StridedCopy| matches!(copy.dims[..], [] | [Dim { src: 1, dst: 1, .. }]);
        let contiguous = tied.iter().all(|p| plain(&p.copy) && !store.is_scattered(&p.info));
        Ok(Self {
            kind: Kind::Stored { dtype, pieces: tied, blocks },
            elementwise: elementwise.clone(),
            factors: Vec::new(),
            elements,
            contiguous,
            has_gaps,
        })
    }

    /// So many elements that are not read by their values.
    pub(super) fn moved(elements: u64) -> Self {
        Self {
            kind: Kind::Values(Vec::new()),
            elementwise: Vec::new(),
            factors: Vec::new(),
            elements,
            contiguous: true,
            has_gaps: false,
        }
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
            && self.factors.is_empty()
            && matches!(&self.kind, Kind::Stored { dtype: d, blocks: Some(_), .. } if *d == dtype)
    }

    /// Whether a span is one stretch of one source tensor, so that small spans cost nothing.
    pub fn is_contiguous(&self) -> bool {
        self.contiguous
    }

    /// Whether something is added to the stored values.
    pub fn is_changed(&self) -> bool {
        matches!(&self.kind, Kind::Stored { pieces, .. } if pieces.iter().any(|p| !p.added.is_empty()))
    }

    /// Bytes that a worker holds beside its buffers, for spans of `span` elements.
    pub fn held_bytes(&self, span: u64) -> u64 {
        let Kind::Stored { pieces, .. } = &self.kind else { return 0 };
        let products = pieces.iter().flat_map(|p| &p.added);
        products.map(|product| low_rank::held_bytes(product, span)).max().unwrap_or(0)
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
        resize(out, ((end - start) * size) as usize, 0)?;
        if self.has_gaps {
            out.fill(0);
        }
        for (piece, copy) in pieces.iter().zip(blocks) {
            for part in copy.clip(start, end) {
                let mut fetch = |lo: u64, buf: &mut [u8]| store.read(&piece.info, lo * size, buf);
                part.gather(start, size, out, &mut scratch.stretch, &mut fetch)?;
            }
        }
        Ok(())
    }

    /// Adds the scales of a fold.
    pub fn fold(&mut self, factor: Factor) {
        self.factors.push(factor);
    }

    /// What folds multiply the columns of an expert's matrix with.
    pub fn column_scales(&self, expert: u64) -> Option<&[f32]> {
        self.factors.iter().find(|f| f.side == Side::Consumer)?.columns(expert)
    }

    /// Turns the importance of an expert's columns into that after folds: what is multiplied by a scale
    /// reads what is divided by it.
    pub fn scale_importance(&self, expert: u64, importance: &mut [f32]) {
        let scales = self.column_scales(expert).unwrap_or_default();
        importance.iter_mut().zip(scales).for_each(|(w, s)| *w /= s * s);
    }

    /// Values of elements `start..end`, after all arithmetic.
    ///
    /// # Errors
    /// As reads fail; `Unsupported` when nothing decodes the type; `Misuse` before the scales of folds
    /// are known.
    pub fn values(
        &self,
        store: &Store,
        start: u64,
        end: u64,
        out: &mut Vec<f32>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.unfolded(store, start, end, out, scratch)?;
        self.factors.iter().try_for_each(|f| f.apply(out, start))
    }

    /// The same without what folds do.
    ///
    /// # Errors
    /// As reads fail; `Unsupported` when nothing decodes the type.
    pub fn unfolded(
        &self,
        store: &Store,
        start: u64,
        end: u64,
        out: &mut Vec<f32>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        // Arithmetic on rows needs whole ones.
        let row = self.elementwise.iter().find_map(|e| match e {
            Elementwise::UnitRows { row } => Some(*row),
            _ => None,
        });
        let row = row.unwrap_or(1);
        if !start.is_multiple_of(row) || (!end.is_multiple_of(row) && end < self.elements) {
            let first = start - start % row;
            let whole = end.checked_next_multiple_of(row).map_or(self.elements, |e| e.min(self.elements));
            self.unfolded(store, first, whole, out, scratch)?;
            out.truncate((end - first) as usize);
            out.drain(..(start - first) as usize);
            return Ok(());
        }
        resize(out, (end - start) as usize, 0.0)?;
        if self.has_gaps {
            out.fill(0.0);
        }
        match &self.kind {
            Kind::Values(values) => {
                let range = values.get(start as usize..end as usize);
                out.copy_from_slice(range.ok_or_else(|| Error::misuse("a span beyond the tensor"))?);
            }
            Kind::Stored { dtype, blocks: Some(_), .. } => {
                let codec = decoder(*dtype)?;
                let mut raw = std::mem::take(&mut scratch.raw);
                self.raw(store, start, end, &mut raw, scratch)?;
                codec.decode(&raw, out)?;
                scratch.raw = raw;
            }
            // Blocks fall apart (a transposed quantized matrix), or values are needed before they are
            // moved: decode stretch by stretch.
            Kind::Stored { pieces, blocks: None, .. } => {
                let Scratch { stretch: buffer, decoded, raw, held } = scratch;
                for Piece { info, copy, added } in pieces {
                    for part in copy.clip(start, end) {
                        let mut fetch = |lo: u64, buf: &mut [u8]| {
                            let values = decode(store, info, lo, buf.len() / 4, raw, decoded)?;
                            for product in added {
                                low_rank::add(product, lo, values, held)?;
                            }
                            buf.copy_from_slice(bytemuck::cast_slice(values));
                            Ok(())
                        };
                        let bytes = bytemuck::cast_slice_mut(out.as_mut_slice());
                        part.gather(start, 4, bytes, buffer, &mut fetch)?;
                    }
                }
            }
        }
        self.elementwise.iter().for_each(|e| e.apply(out, start));
        Ok(())
    }
}

fn decoder(dtype: DType) -> Result<&'static Codec> {
    codec(dtype).ok_or_else(|| Error::unsupported(format!("values of type {dtype} cannot be read yet")))
}

/// The `n` values from element `lo` on, decoded with the blocks they lie in.
///
/// # Errors
/// As reads fail; `Unsupported` when nothing decodes the type.
pub(super) fn decode<'a>(
    store: &Store,
    info: &TensorInfo,
    lo: u64,
    n: usize,
    raw: &mut Vec<u8>,
    decoded: &'a mut Vec<f32>,
) -> Result<&'a mut [f32]> {
    let codec = decoder(info.dtype)?;
    let (block, size) = (info.dtype.block_size(), info.dtype.type_size());
    let (first, last) = (lo / block, (lo + n as u64).div_ceil(block));
    resize(raw, ((last - first) * size) as usize, 0)?;
    store.read(info, first * size, raw)?;
    resize(decoded, ((last - first) * block) as usize, 0.0)?;
    codec.decode(raw, decoded)?;
    let skip = (lo - first * block) as usize;
    Ok(&mut decoded[skip..skip + n])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::safetensors;
    use crate::limits::Limits;

    #[test]
    fn arithmetic_on_rows_sees_whole_ones_whatever_the_span() {
        let layout = safetensors::write::layout(&[("w", DType::F32, &[3, 4])], u64::MAX).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let mut bytes = layout.files[0].header.clone();
        bytes.extend((0..12).flat_map(|i: u8| f32::from(i).to_le_bytes()));
        std::fs::write(&path, bytes).unwrap();
        let store = safetensors::open(&path, &Limits::default()).unwrap().store;
        let mut mapped = identity(store.tensors()).remove(0);
        let Data::Copied { elementwise, .. } = &mut mapped.data else { panic!("copied") };
        elementwise.push(Elementwise::UnitRows { row: 4 });
        let source = Source::new(&mapped, &store).unwrap();
        let read = |start, end| {
            let mut values = Vec::new();
            source.values(&store, start, end, &mut values, &mut Scratch::default()).unwrap();
            values
        };
        let whole = read(0, 12);
        for row in whole.chunks(4) {
            let norm: f32 = row.iter().map(|x| x * x).sum();
            assert!((norm - 1.0).abs() < 1e-6, "{row:?}");
        }
        for (start, end) in (0..12).flat_map(|a| (a..12).map(move |b| (a, b + 1))) {
            assert_eq!(read(start, end), whole[start as usize..end as usize], "{start}..{end}");
        }
    }
}
