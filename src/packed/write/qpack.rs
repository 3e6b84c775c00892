//! Encodings of `.qpack` files, which take rows and groups of any length: see `formats/spec/qpack.md`.
//!
//! The suffix of a part is its name in the manifest.

use std::sync::Arc;

use super::bnb::{Bnb8, Table};
use super::{Data, Fp8, Grid, Layout, Part, Put};
use crate::container::qpack::{Codebook, Encoding, Integers, Scaled, Sparse, Ternary, Trits, Zeros};
use crate::error::{Error, Result};
use crate::packed::qpack::{put_codebook, put_integers, put_sparse, put_ternary};
use crate::tensor::DType;

/// The parts of an encoding.
fn parts(encoding: &Encoding, rows: u64, cols: u64) -> Result<Vec<Part>> {
    let parts = encoding.parts(&[rows, cols])?.unwrap_or_default();
    Ok(parts.into_iter().map(|p| Part::new(p.name, p.dtype, &p.shape)).collect())
}

/// Rows and columns that share a scale.
fn block(grid: &Grid, cols: u64) -> [u64; 2] {
    [1, grid.group_size.unwrap_or(cols).min(cols)]
}

/// The encoding `integers`.
#[derive(Clone, Debug, PartialEq)]
pub struct QpackIntegers {
    /// The integers.
    pub grid: Grid,
    /// Type of the scales; those that rounding finds are numbers of F16.
    pub scales: DType,
    /// Whether columns name their groups.
    pub ordered: bool,
}

impl QpackIntegers {
    fn integers(&self, cols: u64) -> Integers {
        let zeros = if self.grid.symmetric { Zeros::Middle } else { Zeros::Codes(0) };
        let block = block(&self.grid, cols);
        Integers { bits: self.grid.bits(), block, scales: self.scales, zeros, g_idx: self.ordered }
    }
}

impl Layout for QpackIntegers {
    fn grid(&self) -> Option<&Grid> {
        Some(&self.grid)
    }

    fn scales(&self) -> DType {
        self.scales
    }

    fn encoding(&self, _rows: u64, cols: u64) -> Option<Encoding> {
        Some(Encoding::Integers(self.integers(cols)))
    }

    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        parts(&Encoding::Integers(self.integers(cols)), rows, cols)
    }

    fn holds_order(&self) -> bool {
        self.ordered
    }

    fn write(&self, [rows, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        let e = self.integers(cols);
        let order = self.ordered.then(|| data.groups(cols as usize, e.block[1]));
        put_integers(&e, &[rows, cols], first, data.integers()?, order.as_deref(), put)?;
        Ok(0.0)
    }
}

/// The encoding `ternary`.
#[derive(Clone, Debug, PartialEq)]
pub struct QpackTernary {
    /// Ternary digits in groups.
    pub grid: Grid,
    /// How digits lie in bytes.
    pub packing: Trits,
    /// Type of the scales.
    pub scales: DType,
}

impl QpackTernary {
    fn ternary(&self, cols: u64) -> Ternary {
        Ternary { packing: self.packing, block: block(&self.grid, cols), scales: self.scales }
    }
}

impl Layout for QpackTernary {
    fn grid(&self) -> Option<&Grid> {
        Some(&self.grid)
    }

    fn scales(&self) -> DType {
        self.scales
    }

    fn encoding(&self, _rows: u64, cols: u64) -> Option<Encoding> {
        Some(Encoding::Ternary(self.ternary(cols)))
    }

    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        parts(&Encoding::Ternary(self.ternary(cols)), rows, cols)
    }

    fn write(&self, [rows, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        put_ternary(&self.ternary(cols), &[rows, cols], first, data.integers()?, put)?;
        Ok(0.0)
    }
}

/// The encoding `sparse_ternary`.
#[derive(Clone, Debug, PartialEq)]
pub struct QpackSparse {
    /// Ternary digits in groups.
    pub grid: Grid,
    /// Type of the scales.
    pub scales: DType,
    /// Where the signs of every 64th row begin, and their end, once that is known.
    pub starts: Option<Arc<[u64]>>,
}

/// Rows whose signs are written together.
const SPARSE_UNIT: u64 = 64;

impl QpackSparse {
    fn sparse(&self, cols: u64) -> Sparse {
        Sparse { block: block(&self.grid, cols), scales: self.scales }
    }
}

impl Layout for QpackSparse {
    fn grid(&self) -> Option<&Grid> {
        Some(&self.grid)
    }

    fn scales(&self) -> DType {
        self.scales
    }

    fn encoding(&self, _rows: u64, cols: u64) -> Option<Encoding> {
        Some(Encoding::Sparse(self.sparse(cols)))
    }

    /// Signs are the most that there can be, where they were not counted.
    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        let mut parts = parts(&Encoding::Sparse(self.sparse(cols)), rows, cols)?;
        if let Some(end) = self.starts.as_ref().and_then(|starts| starts.last()) {
            parts[SIGNS].shape = vec![*end];
        }
        Ok(parts)
    }

    fn unit(&self, _cols: u64) -> u64 {
        SPARSE_UNIT
    }

    fn counted(&self, used: &[u64]) -> Option<Arc<dyn Layout>> {
        let mut starts = vec![0];
        for rows in used.chunks(SPARSE_UNIT as usize) {
            let bytes: u64 = rows.iter().map(|n| n.div_ceil(8)).sum();
            starts.push(starts[starts.len() - 1] + bytes);
        }
        Some(Arc::new(Self { starts: Some(starts.into()), ..self.clone() }))
    }

    fn write(&self, [rows, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        let start = self.starts.as_ref().and_then(|starts| starts.get((first / SPARSE_UNIT) as usize));
        let mut at = match start {
            Some(start) if first.is_multiple_of(SPARSE_UNIT) => *start,
            _ => return Err(Error::misuse("it is not known where the signs of these rows begin")),
        };
        put_sparse(&self.sparse(cols), &[rows, cols], first, &mut at, data.integers()?, put)?;
        Ok(0.0)
    }
}

/// The part of signs.
const SIGNS: usize = 2;

/// The encoding `codebook` with a table of bitsandbytes; groups end with rows, which are read by themselves.
#[derive(Clone, Debug, PartialEq)]
pub struct QpackCodebook {
    /// FP4 instead of NF4.
    pub fp4: bool,
    /// Columns that share a scale; `None` for whole rows.
    pub group_size: Option<u64>,
}

impl QpackCodebook {
    fn codebook(&self, rows: u64, cols: u64) -> Codebook {
        Codebook {
            bits: 4,
            block: [1, self.group_size.unwrap_or(cols).min(cols)],
            flat: false,
            scales: Some(DType::F32),
            nested: None,
            table: DType::F32,
            tables: [rows, cols],
        }
    }
}

impl Layout for QpackCodebook {
    fn encoding(&self, rows: u64, cols: u64) -> Option<Encoding> {
        Some(Encoding::Codebook(self.codebook(rows, cols)))
    }

    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        parts(&Encoding::Codebook(self.codebook(rows, cols)), rows, cols)
    }

    fn write(&self, [rows, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        let weights = data.weights()?;
        let e = self.codebook(rows, cols);
        let table = Table::new(self.fp4);
        let (wide, cols_n) = (e.block[1] as usize, cols as usize);
        let mut codes = vec![0; weights.len()];
        let mut scales = Vec::new();
        let mut loss = 0.0;
        for (weights, codes) in weights.chunks(cols_n).zip(codes.chunks_mut(cols_n)) {
            for (weights, codes) in weights.chunks(wide).zip(codes.chunks_mut(wide)) {
                let scale = super::greatest(weights);
                loss += table.encode(weights, scale, scale, codes);
                scales.extend(scale.to_le_bytes());
            }
        }
        put_codebook(&e, &[rows, cols], first * cols, &codes, put)?;
        if first == 0 {
            put(1, 0, &table.map.map(f32::to_le_bytes).concat())?;
        }
        put(2, first * cols.div_ceil(e.block[1]) * 4, &scales)?;
        Ok(loss)
    }
}

/// The encoding `scaled`, with elements and scales as other layouts have them.
#[derive(Clone, Debug, PartialEq)]
pub enum QpackScaled {
    /// As LLM.int8.
    Int8,
    /// FP8 in blocks of 128 x 128, the last of which may be smaller.
    Fp8,
}

/// Rows and columns of a block of FP8.
const FP8_BLOCK: u64 = 128;

impl QpackScaled {
    fn scaled(&self, rows: u64, cols: u64) -> Scaled {
        let scales = DType::F32;
        match self {
            Self::Int8 => Scaled { dtype: DType::I8, block: [1, cols], scales, divisor: 127 },
            Self::Fp8 => {
                let block = [rows, cols].map(|n| n.min(FP8_BLOCK));
                Scaled { dtype: DType::F8_E4M3, block, scales, divisor: 1 }
            }
        }
    }
}

impl Layout for QpackScaled {
    fn encoding(&self, rows: u64, cols: u64) -> Option<Encoding> {
        Some(Encoding::Scaled(self.scaled(rows, cols)))
    }

    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        parts(&Encoding::Scaled(self.scaled(rows, cols)), rows, cols)
    }

    fn unit(&self, _cols: u64) -> u64 {
        match self {
            Self::Int8 => 1,
            Self::Fp8 => FP8_BLOCK,
        }
    }

    fn write(&self, shape: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        // What they have beside says nothing of values.
        let mut put =
            |part: usize, at: u64, bytes: &[u8]| if part < 2 { put(part, at, bytes) } else { Ok(()) };
        match self {
            Self::Int8 => Bnb8.write(shape, first, data, &mut put),
            Self::Fp8 => Fp8 { block: [FP8_BLOCK; 2] }.write(shape, first, data, &mut put),
        }
    }
}
