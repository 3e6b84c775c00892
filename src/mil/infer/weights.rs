//! Weights that are decoded: the operations that iOS 18 has for compressed constants.

use super::super::types::{Dim, Symbols, TensorType};
use super::super::value::Operand;
use super::{Call, FLOATS, INT, Operation, constant, optional};
use crate::container::coreml::DataType;
use crate::error::{Error, Result};

use DataType::{Float16, Float32, Int4, Int8, UInt1, UInt2, UInt3, UInt4, UInt6, UInt8};

const CODES: &[DataType] = &[Int4, UInt4, Int8, UInt8, Float16, Float32];
const INDICES: &[DataType] = &[UInt1, UInt2, UInt3, UInt4, UInt6, UInt8];
const ENTRIES: &[DataType] = &[Int8, UInt8, Float16, Float32];
const MASK: &[DataType] = &[UInt1];

pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "constexpr_blockwise_shift_scale",
        parameters: &[constant("data", CODES), constant("scale", FLOATS), optional("offset", CODES)],
        infer: blockwise,
    },
    Operation {
        name: "constexpr_lut_to_dense",
        parameters: &[constant("indices", INDICES), constant("lut", ENTRIES), optional("vector_axis", INT)],
        infer: lut_to_dense,
    },
    Operation {
        name: "constexpr_lut_to_sparse",
        parameters: &[
            constant("indices_mask", MASK),
            constant("indices_nonzero_data", INDICES),
            constant("lut", ENTRIES),
        ],
        infer: lut_to_sparse,
    },
    Operation {
        name: "constexpr_sparse_to_dense",
        parameters: &[constant("nonzero_data", CODES), constant("mask", MASK)],
        infer: sparse_to_dense,
    },
];

fn shape(operand: &Operand) -> Result<Vec<u64>> {
    let sizes: Option<Vec<u64>> = operand.ty.dims.iter().map(|d| d.known()).collect();
    sizes.ok_or_else(|| Error::misuse(format!("{} is no shape of a constant", operand.ty)))
}

fn decoded(dtype: DataType, shape: &[u64]) -> Operand {
    Operand::weight(TensorType::fixed(dtype, shape))
}

/// That each size of `whole` is a multiple of that of `parts`.
fn check_groups(what: &str, whole: &[u64], parts: &[u64]) -> Result<()> {
    let fits = whole.len() == parts.len() && whole.iter().zip(parts).all(|(n, g)| *g > 0 && n % g == 0);
    if fits { Ok(()) } else { Err(Error::misuse(format!("{what} of shape {parts:?} for {whole:?}"))) }
}

/// `scale * (data - offset)`, where each scale is that of a block.
fn blockwise(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let (data, scale) = (call.get("data")?, call.get("scale")?);
    let whole = shape(data)?;
    check_groups("scales", &whole, &shape(scale)?)?;
    if let Some(offset) = call.given("offset") {
        let is_known = [data.ty.dtype, Float16, Float32].contains(&offset.ty.dtype);
        if offset.ty.dims != scale.ty.dims || !is_known {
            return Err(Error::misuse(format!(
                "offset is {}, scale {}, data {}",
                offset.ty, scale.ty, data.ty
            )));
        }
    }
    Ok(vec![decoded(scale.ty.dtype, &whole)])
}

/// The shape of a table: a size for each dimension of the indices, then entries, then elements of each.
fn check_table(call: &Call<'_>, indices: DataType, whole: &[u64]) -> Result<u64> {
    let table = shape(call.get("lut")?)?;
    let [groups @ .., entries, elements] = &table[..] else {
        return Err(Error::misuse(format!("a table of shape {table:?}")));
    };
    check_groups("tables", whole, groups)?;
    if *entries != 1 << indices.bits() || *elements == 0 {
        return Err(Error::misuse(format!("tables of {entries} entries, read by {indices}")));
    }
    Ok(*elements)
}

fn lut_to_dense(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let indices = call.get("indices")?;
    let mut whole = shape(indices)?;
    let elements = check_table(call, indices.ty.dtype, &whole)?;
    if (elements > 1) != call.given("vector_axis").is_some() {
        return Err(Error::misuse(format!(
            "vector_axis belongs to entries of several elements; these have {elements}"
        )));
    }
    if elements > 1 {
        let axis = TensorType::axis(call.int("vector_axis", 0)?, whole.len())?;
        let size = whole[axis].checked_mul(elements);
        whole[axis] = size.ok_or_else(|| Error::misuse("more than 2^64 elements"))?;
    }
    Ok(vec![decoded(call.get("lut")?.ty.dtype, &whole)])
}

fn lut_to_sparse(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let (mask, indices) = (call.get("indices_mask")?, call.get("indices_nonzero_data")?);
    let whole = shape(mask)?;
    if check_table(call, indices.ty.dtype, &whole)? > 1 {
        return Err(Error::unsupported("entries of several elements in what is sparse are not known"));
    }
    let [Dim::Known(n)] = indices.ty.dims[..] else {
        return Err(Error::misuse(format!("indices_nonzero_data is {}, a vector was expected", indices.ty)));
    };
    Ok(vec![decoded(UInt1, &whole), decoded(call.get("lut")?.ty.dtype, &[n])])
}

fn sparse_to_dense(call: &Call<'_>, _: &mut Symbols) -> Result<Vec<Operand>> {
    let (data, mask) = (call.get("nonzero_data")?, call.get("mask")?);
    if data.ty.rank() != 1 {
        return Err(Error::misuse(format!("nonzero_data is {}, a vector was expected", data.ty)));
    }
    Ok(vec![decoded(data.ty.dtype, &shape(mask)?)])
}

#[cfg(test)]
mod tests {
    use super::super::tests::{int, of};
    use super::*;

    #[test]
    fn what_is_decoded() {
        let mut symbols = Symbols::default();
        let codes = |dtype, shape: &[u64]| decoded(dtype, shape);
        let mut result = |op: &str, inputs: &[(&str, &Operand)]| of(op, inputs, &mut symbols);
        let (int4, scale) = (codes(Int4, &[8, 64]), codes(Float16, &[8, 2]));
        let w = result("constexpr_blockwise_shift_scale", &[("data", &int4), ("scale", &scale)]).unwrap();
        assert_eq!(w, [codes(Float16, &[8, 64])]);
        let (two, table) = (codes(UInt2, &[8, 64]), codes(Float16, &[4, 1, 4, 1]));
        let w = result("constexpr_lut_to_dense", &[("indices", &two), ("lut", &table)]).unwrap();
        assert_eq!(w, [codes(Float16, &[8, 64])]);
        // Entries of four rows.
        let (rows, table) = (codes(UInt8, &[2, 64]), codes(Float16, &[1, 1, 256, 4]));
        let vectors = [("indices", &rows), ("lut", &table), ("vector_axis", &int(0))];
        assert_eq!(result("constexpr_lut_to_dense", &vectors).unwrap(), [codes(Float16, &[8, 64])]);
        let (mask, nonzero, table) =
            (codes(UInt1, &[8, 64]), codes(UInt1, &[300]), codes(Float16, &[8, 1, 2, 1]));
        let sparse = [("indices_mask", &mask), ("indices_nonzero_data", &nonzero), ("lut", &table)];
        let sparse = result("constexpr_lut_to_sparse", &sparse).unwrap();
        let w = result("constexpr_sparse_to_dense", &[("nonzero_data", &sparse[1]), ("mask", &sparse[0])])
            .unwrap();
        assert_eq!(w, [codes(Float16, &[8, 64])]);
    }

    #[test]
    fn tables_and_scales_that_do_not_fit() {
        let mut symbols = Symbols::default();
        let mut fault =
            |op: &str, inputs: &[(&str, &Operand)]| of(op, inputs, &mut symbols).unwrap_err().to_string();
        let (two, three) = (decoded(UInt2, &[8, 64]), decoded(Float16, &[3, 1, 4, 1]));
        assert!(
            fault("constexpr_lut_to_dense", &[("indices", &two), ("lut", &three)])
                .contains("tables of shape")
        );
        let short = decoded(Float16, &[1, 1, 3, 1]);
        assert!(fault("constexpr_lut_to_dense", &[("indices", &two), ("lut", &short)]).contains("3 entries"));
        let whole = decoded(Float16, &[1, 1, 4, 1]);
        let axis = [("indices", &two), ("lut", &whole), ("vector_axis", &int(0))];
        assert!(fault("constexpr_lut_to_dense", &axis).contains("vector_axis"));
        let (data, scale) = (decoded(Int4, &[8, 64]), decoded(Float16, &[8, 3]));
        let op = "constexpr_blockwise_shift_scale";
        assert!(fault(op, &[("data", &data), ("scale", &scale)]).contains("scales of shape [8, 3]"));
        let (scale, offset) = (decoded(Float16, &[8, 1]), decoded(UInt8, &[8, 1]));
        assert!(
            fault(op, &[("data", &data), ("scale", &scale), ("offset", &offset)]).contains("offset is uint8")
        );
    }
}
