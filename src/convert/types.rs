//! The file types of llama.cpp's converter, and its rules for the type of each tensor. Those of its
//! quantizer are recipes.

use crate::container::Store;
use crate::tensor::{DType, TensorInfo};

/// A file type: what `--type` names, and `general.file_type` records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileType {
    /// Type of the tensors that are not kept higher.
    pub dtype: DType,
    /// `enum llama_ftype` (llama.h).
    pub id: u32,
    /// Block type of most tensors that stay as they are in the source; those of others stay, too.
    pub keeps: Option<DType>,
}

/// File types of sources that are partly quantized already, in a block type of ggml.
const KEPT: &[(FileType, &str)] = &[
    (kept(DType::MXFP4, 38), "MXFP4_MOE"),
    (kept(DType::Q4_0, 2), "Q4_0"),
    (kept(DType::Q4_1, 3), "Q4_1"),
    (kept(DType::Q5_0, 8), "Q5_0"),
    (kept(DType::Q5_1, 9), "Q5_1"),
    (kept(DType::Q8_0, 7), "Q8_0"),
    (kept(DType::TQ2_0, 37), "TQ2_0"),
];

const fn kept(dtype: DType, id: u32) -> FileType {
    FileType { dtype: DType::BF16, id, keeps: Some(dtype) }
}

const fn plain(dtype: DType, id: u32) -> FileType {
    FileType { dtype, id, keeps: None }
}

/// All that llama.cpp's converter writes.
pub const FILE_TYPES: &[FileType] = &[
    plain(DType::F32, 0),
    plain(DType::F16, 1),
    plain(DType::BF16, 32),
    plain(DType::Q8_0, 7),
    plain(DType::TQ2_0, 37),
    plain(DType::TQ1_0, 36),
];

/// What the two factors of an adapter's product are called behind their tensor's name.
pub const LORA_A: &str = ".lora_a";
/// See [`LORA_A`].
pub const LORA_B: &str = ".lora_b";

/// Base names of tensors that llama.cpp keeps in F32 whatever the file type.
const ALWAYS_F32: &[&str] = &[
    "ffn_gate_inp",
    "ffn_gate_inp_shexp",
    "position_embd",
    "v.position_embd",
    "a.position_embd",
    "token_types",
    "ssm_conv1d",
    "ssm_conv1d_q",
    "ssm_conv1d_k",
    "ssm_conv1d_v",
    "shortconv.conv",
    "time_mix_first",
    "time_mix_w1",
    "time_mix_w2",
    "time_mix_decay_w1",
    "time_mix_decay_w2",
    "time_mix_lerp_fused",
    "altup_correct_coef",
    "altup_predict_coef",
    "indexer.proj",
];

/// Base names that the ternary file types keep at F16.
const NEVER_TERNARY: &[&str] =
    &["token_embd", "output", "per_layer_token_embd", "altup_router", "laurel_l", "laurel_r"];

impl FileType {
    /// The file type of this name, in any case: `q8_0`.
    pub fn parse(name: &str) -> Option<Self> {
        FILE_TYPES.iter().copied().find(|t| t.dtype.name().eq_ignore_ascii_case(name))
    }

    /// The file type that keeps most of a checkpoint's tensors as they are. Those that were decoded
    /// from another packing follow the others, or become `decoded`.
    pub fn of_source(store: &Store, decoded: Option<DType>) -> Self {
        let mut bytes = std::collections::BTreeMap::new();
        for t in store.tensors().iter().filter(|t| !store.is_joined(t)) {
            *bytes.entry(t.dtype).or_insert(0u64) += t.nbytes;
        }
        let most = bytes.into_iter().max_by_key(|(_, n)| *n).map(|(d, _)| d);
        let main = FILE_TYPES.iter().copied().find(|t| Some(t.dtype) == most && !t.dtype.is_block());
        let main = main.unwrap_or(FILE_TYPES[1]);
        let weights = |dtype| {
            let becomes = |t: &TensorInfo| match is_decoded(store, t) {
                true => decoded,
                false => Some(t.dtype),
            };
            let of_type = store.tensors().iter().filter(|t| becomes(t) == dtype);
            of_type.map(|t| t.elements()).sum::<u64>()
        };
        let kept = KEPT.iter().rev().max_by_key(|(t, _)| weights(t.keeps));
        let kept = kept.filter(|(t, _)| weights(t.keeps) > 0);
        kept.map_or(main, |(kept, _)| Self { dtype: main.dtype, ..*kept })
    }

    /// The name in file names: `Q8_0`.
    pub fn name(self) -> &'static str {
        let kept = KEPT.iter().find(|(t, _)| t.keeps == self.keeps);
        kept.map_or(self.dtype.name(), |(_, name)| name)
    }

    /// The same where nothing is kept.
    pub fn main(self) -> Self {
        FILE_TYPES.iter().copied().find(|t| t.dtype == self.dtype).unwrap_or(self)
    }

    /// The type of one tensor, and the wanted one where the row does not fit it.
    /// Source: `prepare_tensors` and `tensor_force_quant` in llama.cpp's `conversion/base.py`. `stored`
    /// is the type in the source, `fixed` what its definition says.
    pub fn choose(
        self,
        name: &str,
        shape: &[u64],
        stored: Option<DType>,
        fixed: Option<DType>,
    ) -> (DType, Option<DType>) {
        let is_ternary = |dtype| matches!(dtype, DType::TQ1_0 | DType::TQ2_0);
        if let Some(kept) = stored.filter(|stored| self.keeps.is_some() && stored.is_block()) {
            let is_never = is_ternary(kept) && NEVER_TERNARY.contains(&base_name(name));
            return (if is_never { DType::F16 } else { kept }, None);
        }
        if shape.len() <= 1 || name.ends_with("_norm.weight") {
            return (DType::F32, None);
        }
        // Convolutions, which ggml computes in F16 or F32.
        let is_convolution = name.contains(".patch_embd.weight") || name.contains(".patch_merger.weight");
        let convolution = if self.dtype == DType::F16 { DType::F16 } else { DType::F32 };
        if let Some(dtype) = fixed.or(is_convolution.then_some(convolution)) {
            return (dtype, None);
        }
        let base = base_name(name);
        let is_matrix = [".weight", LORA_A, LORA_B].iter().any(|suffix| name.ends_with(suffix));
        if !is_matrix || ALWAYS_F32.contains(&base) {
            return (DType::F32, None);
        }
        if is_ternary(self.dtype) && NEVER_TERNARY.contains(&base) {
            return (DType::F16, None);
        }
        if shape.last().is_some_and(|row| !row.is_multiple_of(self.dtype.block_size())) {
            return (DType::F16, Some(self.dtype));
        }
        (self.dtype, None)
    }
}

/// Whether a tensor comes from a packing that has no type.
pub fn is_decoded(store: &Store, tensor: &TensorInfo) -> bool {
    store.is_joined(tensor) && !tensor.dtype.is_block()
}

/// The tensor's role: `blk.3.attn_q.weight` -> `attn_q`.
pub fn base_name(name: &str) -> &str {
    let rest = match name.strip_prefix("blk.").and_then(|r| r.split_once('.')) {
        Some((layer, rest)) if layer.bytes().all(|b| b.is_ascii_digit()) => rest,
        _ => name,
    };
    rest.strip_suffix(".weight").or(rest.strip_suffix(".bias")).unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules() {
        let q8 = FileType::parse("Q8_0").unwrap();
        assert_eq!(q8.choose("blk.0.attn_q.weight", &[64, 64], None, None), (DType::Q8_0, None));
        assert_eq!(q8.choose("blk.0.attn_q.weight", &[64, 33], None, None), (DType::F16, Some(DType::Q8_0)));
        assert_eq!(q8.choose("blk.0.attn_q_norm.weight", &[4, 64], None, None), (DType::F32, None));
        assert_eq!(q8.choose("blk.0.ffn_gate_inp.weight", &[4, 64], None, None), (DType::F32, None));
        assert_eq!(q8.choose("blk.0.attn_q.bias", &[64], None, None), (DType::F32, None));
        let tq = FileType::parse("tq2_0").unwrap();
        assert_eq!(tq.choose("token_embd.weight", &[8, 256], None, None), (DType::F16, None));
        assert_eq!(tq.choose("blk.11.ffn_up_exps.weight", &[2, 8, 256], None, None), (DType::TQ2_0, None));
        for (file_type, conv) in [("f16", DType::F16), ("bf16", DType::F32), ("q8_0", DType::F32)] {
            let t = FileType::parse(file_type).unwrap();
            assert_eq!(t.choose("v.patch_embd.weight.1", &[8, 3, 14, 14], None, None).0, conv);
            assert_eq!(t.choose("v.position_embd.weight", &[8, 64], None, None).0, DType::F32);
            assert_eq!(
                t.choose("mm.input_projection.weight", &[8, 64], None, Some(DType::F16)).0,
                DType::F16
            );
            assert_eq!(t.choose("v.post_ln.weight", &[8], None, Some(DType::F16)).0, DType::F32);
        }
        assert!(FileType::parse("q4_k_m").is_none());
        let kept = KEPT[0].0;
        assert_eq!(
            kept.choose("blk.1.ffn_up_exps.weight", &[2, 8, 64], Some(DType::MXFP4), None).0,
            DType::MXFP4
        );
        assert_eq!(
            kept.choose("blk.1.ffn_up_exps.weight", &[2, 8, 64], Some(DType::BF16), None).0,
            DType::BF16
        );
        assert_eq!((kept.name(), kept.main().name(), kept.main().id), ("MXFP4_MOE", "BF16", 32));
        assert_eq!(base_name("blk.12.ffn_up_exps.weight"), "ffn_up_exps");
        assert_eq!(base_name("output.weight"), "output");
    }
}
