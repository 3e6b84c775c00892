//! How tensors are stored, in words.

use crate::container::Store;
use crate::container::qpack::{self, Encoding, Trits, Zeros};
use crate::tensor::TensorInfo;

/// How a tensor is stored: `Q4_K`, `4 bits, groups of 128`, or as the manifest has it.
pub fn describe(store: &Store, info: &TensorInfo, manifest: Option<&qpack::Tensor>) -> String {
    match (manifest, store.packing(info)) {
        (Some(tensor), _) => encoding(&tensor.encoding, &tensor.shape),
        (None, Some((packing, _))) => format!("{} bits, {}", packing.bits, groups(packing.block)),
        (None, None) => info.dtype.name().to_string(),
    }
}

/// An encoding of `.qpack` files, of a tensor of this shape.
pub fn encoding(encoding: &Encoding, shape: &[u64]) -> String {
    let groups = |block: [u64; 2]| {
        let cols = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().product::<u64>() / cols.max(1);
        groups([
            if block[0] == rows && rows > 1 { 0 } else { block[0] },
            if block[1] == cols { 0 } else { block[1] },
        ])
    };
    match encoding {
        Encoding::Plain(dtype) => dtype.name().to_string(),
        Encoding::Integers(e) => {
            let zeros = match e.zeros {
                Zeros::Middle => "symmetric".to_string(),
                Zeros::Codes(_) => "zeros in codes".to_string(),
                Zeros::Numbers(dtype) => format!("zeros {dtype}"),
            };
            let order = if e.g_idx { ", columns in an order of their own" } else { "" };
            format!("integers of {} bits, {}, scales {}, {zeros}{order}", e.bits, groups(e.block), e.scales)
        }
        Encoding::Codebook(e) => {
            let scales = match (e.scales, e.nested) {
                (_, Some(nested)) => {
                    format!(", {}, scales in codes, {} share one", run(e.block), nested.block)
                }
                (Some(dtype), None) => format!(", {}, scales {dtype}", run(e.block)),
                (None, None) => String::new(),
            };
            format!("codebook of {} bits{scales}, table {}", e.bits, e.table)
        }
        Encoding::Ternary(e) => {
            let packing = match e.packing {
                Trits::Base3 => "five digits a byte",
                Trits::Bits2 => "2 bits",
            };
            format!("ternary, {packing}, {}, scales {}", groups(e.block), e.scales)
        }
        Encoding::Sparse(e) => format!("sparse ternary, {}, scales {}", groups(e.block), e.scales),
        Encoding::Scaled(e) => {
            let divisor = if e.divisor > 1 { format!(", divided by {}", e.divisor) } else { String::new() };
            format!("{} scaled, {}, scales {}{divisor}", e.dtype, groups(e.block), e.scales)
        }
        Encoding::Unknown(_) => format!("unknown: {}", encoding.kind()),
    }
}

/// Groups that go on from row to row.
fn run(block: [u64; 2]) -> String {
    match block {
        [1, n] => format!("groups of {n}"),
        [rows, cols] => format!("blocks of {rows} x {cols}"),
    }
}

/// What shares a scale: rows and columns, of which 0 are all.
pub(crate) fn groups(block: [u64; 2]) -> String {
    match block {
        [0, 0] => "one scale".to_string(),
        [1, 0] => "a scale for each row".to_string(),
        [rows, 0] => format!("a scale for {rows} rows"),
        [0, cols] => format!("groups of {cols} over all rows"),
        [1, cols] => format!("groups of {cols}"),
        [rows, 1] => format!("groups of {rows} along the outputs"),
        [rows, cols] => format!("blocks of {rows} x {cols}"),
    }
}
