//! ggml's own answers, for tests and benchmarks to compare ours with. No command converts or
//! quantizes through these.

use std::path::Path;

use llama_cpp_sys_2 as sys;

use super::{c_path, init, log};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Rows of F32 `src`, each `row` long, as `ggml_quantize_chunk` encodes them. `imatrix` holds one
/// importance for each of a row's columns.
///
/// ggml stops the process on rows that some searches cannot handle (NaN); give it finite values.
///
/// # Errors
/// `Misuse` when sizes do not fit, when ggml cannot quantize to the type, or needs an importance
/// matrix for it.
pub fn quantize_chunk(dtype: DType, src: &[f32], row: usize, imatrix: Option<&[f32]>) -> Result<Vec<u8>> {
    init()?;
    let id = ggml_id(dtype)?;
    // What `ggml_quantize_chunk` has no case for; it would stop the process.
    if matches!(
        dtype,
        DType::F64 | DType::I8 | DType::I16 | DType::I32 | DType::I64 | DType::Q8_1 | DType::Q8_K
    ) {
        return Err(Error::misuse(format!("ggml cannot quantize to {dtype}")));
    }
    if row == 0 || !src.len().is_multiple_of(row) || imatrix.is_some_and(|m| m.len() != row) {
        return Err(Error::misuse(format!(
            "{} values are not rows of {row}, or the importances are not {row}",
            src.len()
        )));
    }
    let row_bytes = dtype.bytes_for(row as u64)?;
    // SAFETY: a constant answer for any type.
    if imatrix.is_none() && unsafe { sys::ggml_quantize_requires_imatrix(id) } {
        return Err(Error::misuse(format!("ggml quantizes to {dtype} only with an importance matrix")));
    }
    let rows = src.len() / row;
    let mut out = vec![0u8; rows * row_bytes as usize];
    let imatrix = imatrix.map_or(std::ptr::null(), <[f32]>::as_ptr);
    // SAFETY: `src` holds `rows` rows of `row` values, a whole number of blocks; `out` has room
    // for them encoded; `imatrix` is null or `row` values. ggml guards its tables with a lock.
    let written = unsafe {
        sys::ggml_quantize_chunk(
            id,
            src.as_ptr(),
            out.as_mut_ptr().cast(),
            0,
            rows as i64,
            row as i64,
            imatrix,
        )
    };
    debug_assert_eq!(written, out.len());
    Ok(out)
}

/// The values of encoded `bytes`, as ggml's `to_float` decodes them.
///
/// # Errors
/// `Misuse` when `bytes` are not whole blocks, or ggml cannot decode the type.
pub fn dequantize(dtype: DType, bytes: &[u8]) -> Result<Vec<f32>> {
    init()?;
    let id = ggml_id(dtype)?;
    let type_size = dtype.type_size() as usize;
    if !bytes.len().is_multiple_of(type_size) {
        return Err(Error::misuse(format!("{} bytes are not whole blocks of {dtype}", bytes.len())));
    }
    let mut out = vec![0f32; bytes.len() / type_size * dtype.block_size() as usize];
    if dtype == DType::F32 {
        // ggml has no decoder for what needs none.
        bytemuck::cast_slice_mut(&mut out).copy_from_slice(bytes);
        return Ok(out);
    }
    // SAFETY: `id` is in ggml's table, whose rows are constant.
    let to_float = unsafe { (*sys::ggml_get_type_traits(id)).to_float }
        .ok_or_else(|| Error::misuse(format!("ggml cannot decode {dtype}")))?;
    // ggml reads 16-bit fields: the copy is aligned for them, the caller's bytes need not be.
    let mut aligned = vec![0u64; bytes.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut aligned)[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the input holds whole blocks and is aligned; the output has room for their elements.
    unsafe { to_float(aligned.as_ptr().cast(), out.as_mut_ptr(), out.len() as i64) };
    Ok(out)
}

/// How [`model_quantize`] shall quantize; the fields of `llama_model_quantize_params`.
#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// `enum llama_ftype`: the `general.file_type` of the result.
    pub ftype: u32,
    /// Threads; 0 takes all.
    pub threads: i32,
    /// Accept tensors that are quantized already.
    pub allow_requantize: bool,
    /// Whether the output tensor is quantized.
    pub quantize_output_tensor: bool,
    /// One type for all tensors.
    pub pure: bool,
    /// Type of the output tensor, instead of llama.cpp's choice.
    pub output_tensor_type: Option<DType>,
    /// Type of the token embeddings, instead of llama.cpp's choice.
    pub token_embedding_type: Option<DType>,
    /// Keep the shards of a split file.
    pub keep_split: bool,
    /// Importances: tensor name, and one value for each column (for each expert).
    pub imatrix: Vec<(String, Vec<f32>)>,
    /// Types of tensors whose names match a regular expression (ECMAScript, as llama.cpp reads it).
    pub tensor_types: Vec<(String, DType)>,
    /// Layers to leave out.
    pub prune_layers: Vec<i32>,
}

impl QuantizeOptions {
    /// llama-quantize's defaults, to `ftype`, on one thread.
    pub fn new(ftype: u32) -> Self {
        Self {
            ftype,
            threads: 1,
            allow_requantize: false,
            quantize_output_tensor: true,
            pure: false,
            output_tensor_type: None,
            token_embedding_type: None,
            keep_split: false,
            imatrix: Vec::new(),
            tensor_types: Vec::new(),
            prune_layers: Vec::new(),
        }
    }
}

/// Quantizes the GGUF file `input` to `output` with `llama_model_quantize`.
///
/// # Errors
/// `Misuse` for names with null bytes or negative layers, `Unsupported` with llama.cpp's reason.
pub fn model_quantize(input: &Path, output: &Path, options: &QuantizeOptions) -> Result<()> {
    init()?;
    let (c_input, c_output) = (c_path(input)?, c_path(output)?);
    let c_name = |name: &str| {
        std::ffi::CString::new(name).map_err(|_| Error::misuse(format!("{name:?} holds a null byte")))
    };
    let type_id = |dtype: Option<DType>| dtype.map_or(Ok(sys::GGML_TYPE_COUNT), ggml_id);
    if options.prune_layers.iter().any(|&l| l < 0) {
        return Err(Error::misuse("a layer to prune has a negative number"));
    }
    // Each list ends with a row of null (or -1), as the library expects.
    let imatrix_names = options.imatrix.iter().map(|(n, _)| c_name(n)).collect::<Result<Vec<_>>>()?;
    let mut imatrix: Vec<_> = imatrix_names
        .iter()
        .zip(&options.imatrix)
        .map(|(name, (_, values))| sys::llama_model_imatrix_data {
            name: name.as_ptr(),
            data: values.as_ptr(),
            size: values.len(),
        })
        .collect();
    imatrix.push(sys::llama_model_imatrix_data { name: std::ptr::null(), data: std::ptr::null(), size: 0 });
    let patterns = options.tensor_types.iter().map(|(p, _)| c_name(p)).collect::<Result<Vec<_>>>()?;
    let mut overrides = Vec::new();
    for (pattern, (_, dtype)) in patterns.iter().zip(&options.tensor_types) {
        overrides
            .push(sys::llama_model_tensor_override { pattern: pattern.as_ptr(), type_: ggml_id(*dtype)? });
    }
    overrides
        .push(sys::llama_model_tensor_override { pattern: std::ptr::null(), type_: sys::GGML_TYPE_COUNT });
    let mut prune = options.prune_layers.clone();
    prune.push(-1);

    log::clear();
    // SAFETY: returns a plain struct of defaults.
    let mut params = unsafe { sys::llama_model_quantize_default_params() };
    params.nthread = options.threads;
    params.ftype = options.ftype as sys::llama_ftype;
    params.allow_requantize = options.allow_requantize;
    params.quantize_output_tensor = options.quantize_output_tensor;
    params.pure_ = options.pure;
    params.keep_split = options.keep_split;
    params.output_tensor_type = type_id(options.output_tensor_type)?;
    params.token_embedding_type = type_id(options.token_embedding_type)?;
    if imatrix.len() > 1 {
        params.imatrix = imatrix.as_ptr();
    }
    if overrides.len() > 1 {
        params.tt_overrides = overrides.as_ptr();
    }
    if prune.len() > 1 {
        params.prune_layers = prune.as_ptr();
    }
    // SAFETY: paths and lists live through the call, each list ends with its terminator; the
    // function catches its exceptions.
    let status = unsafe { sys::llama_model_quantize(c_input.as_ptr(), c_output.as_ptr(), &params) };
    if status != 0 {
        return Err(Error::unsupported(format!(
            "llama.cpp cannot quantize it: {}",
            log::reason("no reason given")
        ))
        .at(input));
    }
    Ok(())
}

/// Whether ggml's own reader, `gguf_init_from_file`, accepts the file's header. On the way it
/// checks types, sizes and offsets, as llama.cpp does before it loads a model.
pub fn gguf_opens(path: &Path) -> bool {
    let Ok(path) = init().and_then(|()| c_path(path)) else { return false };
    let params = sys::gguf_init_params { no_alloc: true, ctx: std::ptr::null_mut() };
    // SAFETY: the path lives through the call; without `ctx` no tensors are allocated. The result
    // is null or ours to free.
    unsafe {
        let gguf = sys::gguf_init_from_file(path.as_ptr(), params);
        if gguf.is_null() {
            return false;
        }
        sys::gguf_free(gguf);
    }
    true
}

fn ggml_id(dtype: DType) -> Result<u32> {
    dtype.ggml_id().ok_or_else(|| Error::misuse(format!("ggml has no type {dtype}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::{TypeFacts, type_facts};

    #[test]
    fn our_table_is_ggmls() {
        let mut compared = 0;
        for id in 0..sys::GGML_TYPE_COUNT {
            let Some(dtype) = DType::from_ggml_id(id) else {
                let facts = type_facts(id);
                assert_eq!(facts, None, "ggml type {id} is missing in our table");
                continue;
            };
            let facts = type_facts(id).unwrap_or_else(|| panic!("ggml has no type {id}"));
            let name = facts.name.to_uppercase();
            let expected = TypeFacts { name, ..facts };
            let ours = TypeFacts {
                name: dtype.name().to_owned(),
                block_size: dtype.block_size(),
                type_size: dtype.type_size(),
            };
            assert_eq!(ours, expected);
            compared += 1;
        }
        assert!(compared > 30);
        assert!(DType::ALL.iter().filter_map(|t| t.ggml_id()).all(|id| id < sys::GGML_TYPE_COUNT));
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let src: Vec<f32> = (0..512).map(|i| (i as f32 * 0.37).sin()).collect();
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q4_K, DType::TQ1_0] {
            let bytes = quantize_chunk(dtype, &src, 256, None).unwrap();
            assert_eq!(bytes.len() as u64, dtype.bytes_for(512).unwrap());
            let back = dequantize(dtype, &bytes).unwrap();
            let worst = src.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let bound = match dtype {
                DType::F32 => 0.0,
                DType::F16 | DType::BF16 | DType::Q8_0 => 0.005,
                DType::Q4_K => 0.1,
                _ => 0.51,
            };
            assert!(worst <= bound, "{dtype}: {worst}");
        }
    }

    #[test]
    fn misuse_is_refused() {
        for (dtype, len, row, importances) in [
            (DType::Q8_0, 33, 33, None),
            (DType::Q8_0, 64, 0, None),
            (DType::Q8_0, 64, 32, Some(64)),
            (DType::U8, 64, 32, None),
            (DType::I32, 64, 32, None),
            (DType::Q8_K, 256, 256, None),
            (DType::IQ2_XXS, 256, 256, None),
        ] {
            let imatrix = importances.map(|n| vec![1.0; n]);
            let result = quantize_chunk(dtype, &vec![0.5; len], row, imatrix.as_deref());
            assert!(result.is_err(), "{dtype} {len} {row}");
        }
        assert!(dequantize(DType::Q8_0, &[0; 33]).is_err());
        assert!(dequantize(DType::I8, &[0; 32]).is_err());
    }
}
