//! The file types of llama.cpp's converter, and its rules for the type of each tensor. Those of its
//! quantizer are recipes.

use crate::tensor::DType;

/// A file type: what `--type` names, and `general.file_type` records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileType {
    /// Type of the tensors that are not kept higher.
    pub dtype: DType,
    /// `enum llama_ftype` (llama.h).
    pub id: u32,
}

/// All that llama.cpp's converter writes.
pub const FILE_TYPES: &[FileType] = &[
    FileType { dtype: DType::F32, id: 0 },
    FileType { dtype: DType::F16, id: 1 },
    FileType { dtype: DType::BF16, id: 32 },
    FileType { dtype: DType::Q8_0, id: 7 },
    FileType { dtype: DType::TQ2_0, id: 37 },
    FileType { dtype: DType::TQ1_0, id: 36 },
];

/// Base names of tensors that llama.cpp keeps in F32 whatever the file type.
const ALWAYS_F32: &[&str] = &[
    "ffn_gate_inp",
    "ffn_gate_inp_shexp",
    "position_embd",
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

    /// The file type that keeps most of a checkpoint's tensors as they are.
    pub fn of_source(dtypes: impl Iterator<Item = (DType, u64)>) -> Self {
        let mut bytes = std::collections::BTreeMap::new();
        for (dtype, n) in dtypes {
            *bytes.entry(dtype).or_insert(0u64) += n;
        }
        let most = bytes.into_iter().max_by_key(|(_, n)| *n).map(|(d, _)| d);
        FILE_TYPES
            .iter()
            .copied()
            .find(|t| Some(t.dtype) == most && !t.dtype.is_block())
            .unwrap_or(FILE_TYPES[1])
    }

    /// The name in file names: `Q8_0`.
    pub fn name(self) -> &'static str {
        self.dtype.name()
    }

    /// The type of one tensor, and the wanted one where the row does not fit it.
    /// Source: `prepare_tensors` in llama.cpp's `conversion/base.py`.
    pub fn choose(self, name: &str, shape: &[u64]) -> (DType, Option<DType>) {
        let base = base_name(name);
        if shape.len() <= 1
            || name.ends_with("_norm.weight")
            || !name.ends_with(".weight")
            || ALWAYS_F32.contains(&base)
        {
            return (DType::F32, None);
        }
        let ternary = matches!(self.dtype, DType::TQ1_0 | DType::TQ2_0);
        if ternary && NEVER_TERNARY.contains(&base) {
            return (DType::F16, None);
        }
        if shape.last().is_some_and(|row| !row.is_multiple_of(self.dtype.block_size())) {
            return (DType::F16, Some(self.dtype));
        }
        (self.dtype, None)
    }
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
        assert_eq!(q8.choose("blk.0.attn_q.weight", &[64, 64]), (DType::Q8_0, None));
        assert_eq!(q8.choose("blk.0.attn_q.weight", &[64, 33]), (DType::F16, Some(DType::Q8_0)));
        assert_eq!(q8.choose("blk.0.attn_q_norm.weight", &[4, 64]), (DType::F32, None));
        assert_eq!(q8.choose("blk.0.ffn_gate_inp.weight", &[4, 64]), (DType::F32, None));
        assert_eq!(q8.choose("blk.0.attn_q.bias", &[64]), (DType::F32, None));
        let tq = FileType::parse("tq2_0").unwrap();
        assert_eq!(tq.choose("token_embd.weight", &[8, 256]), (DType::F16, None));
        assert_eq!(tq.choose("blk.11.ffn_up_exps.weight", &[2, 8, 256]), (DType::TQ2_0, None));
        assert!(FileType::parse("q4_k_m").is_none());
        assert_eq!(base_name("blk.12.ffn_up_exps.weight"), "ffn_up_exps");
        assert_eq!(base_name("output.weight"), "output");
    }
}
