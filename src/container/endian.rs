//! Byte order of tensor data. Big-endian GGUF files exist (s390x, AIX); everything here computes
//! on little-endian data, so [`super::Store::read`] turns it round on the way in.

use crate::error::{Error, Result};
use crate::tensor::DType;

/// Where a block type keeps its 16-bit fields, the only ones whose byte order matters.
///
/// `None` for types whose big-endian form nobody has defined: their blocks hold packed integers
/// that are not plain bytes.
fn half_fields(dtype: DType) -> Option<&'static [usize]> {
    Some(match dtype {
        DType::Q4_0 | DType::Q8_0 | DType::IQ4_NL => &[0],
        DType::Q4_1 | DType::Q8_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        DType::TQ1_0 => &[52],
        DType::TQ2_0 => &[64],
        DType::MXFP4 => &[],
        _ => return None,
    })
}

/// Turns big-endian data of `dtype` into little-endian data, or back.
///
/// # Errors
/// `Unsupported` for block types without a defined big-endian layout; `Misuse` when `data` is not
/// whole blocks.
pub fn swap(dtype: DType, data: &mut [u8]) -> Result<()> {
    let size = dtype.type_size() as usize;
    if !data.len().is_multiple_of(size) {
        return Err(Error::misuse(format!("{} bytes are not whole blocks of {dtype}", data.len())));
    }
    if !dtype.is_block() {
        data.chunks_exact_mut(size).for_each(<[u8]>::reverse);
        return Ok(());
    }
    let fields = half_fields(dtype).ok_or_else(|| {
        Error::unsupported(format!("big-endian data of type {dtype} has no defined layout"))
    })?;
    for block in data.chunks_exact_mut(size) {
        for &at in fields {
            block.swap(at, at + 1);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_within_blocks_and_swapping_twice_changes_nothing() {
        for &dtype in DType::ALL {
            let size = dtype.type_size() as usize;
            let original: Vec<u8> = (0..3 * size).map(|i| i as u8).collect();
            let mut data = original.clone();
            match swap(dtype, &mut data) {
                Ok(()) => {
                    assert_eq!(data == original, size == 1 || dtype == DType::MXFP4, "{dtype}");
                    swap(dtype, &mut data).unwrap();
                    assert_eq!(data, original, "{dtype}");
                }
                Err(_) => assert!(dtype.is_block()),
            }
        }
        assert!(swap(DType::F32, &mut [0; 6]).is_err());
    }
}
