//! What quantized checkpoints can be written: their layouts, and what config.json says of them.
//!
//! Keys of `quantization_config`: `transformers/utils/quantization_config.py`, checked by loading with the
//! libraries that `formats/spec/packed.md` names.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::{Awq, Bnb4, Bnb8, Compressed, CompressedFp8, Fp8, Gptq, Grid, Layout, Mxfp4};
use super::{QpackCodebook, QpackIntegers, QpackScaled, QpackSparse, QpackTernary};
use crate::block::uniform::TERNARY;
use crate::container::qpack::Trits;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// A format of quantized checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// AutoGPTQ's, which GPTQModel and vLLM read.
    Gptq,
    /// AutoAWQ's GEMM layout.
    Awq,
    /// 4 bits of bitsandbytes: quantiles of a normal distribution.
    BnbNf4,
    /// 4 bits of bitsandbytes: floats.
    BnbFp4,
    /// LLM.int8 of bitsandbytes.
    BnbInt8,
    /// compressed-tensors, in one of its own formats.
    Compressed(CompressedFormat),
    /// FP8 in blocks, as DeepSeek V3 is published.
    Fp8,
    /// MXFP4, as the experts of gpt-oss are published.
    Mxfp4,
    /// `.qpack`, in one of its encodings.
    Qpack(QpackEncoding),
}

/// An encoding of `.qpack` files, as weights are brought into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QpackEncoding {
    /// Integers of 1 to 8 bits, in groups of any size.
    Integers,
    /// -1, 0 and 1 times the scale of a group.
    Ternary(Trits),
    /// The same of weights that are ternary already, most of them 0.
    Sparse,
    /// Quantiles of a normal distribution, 4 bits.
    Nf4,
    /// Floats of 4 bits.
    Fp4,
    /// 8 bits with a scale for each row, as LLM.int8.
    Int8,
    /// FP8 in blocks of 128 x 128.
    Fp8,
}

impl QpackEncoding {
    /// Names, as the command line has them.
    pub const NAMES: &[(&str, Self)] = &[
        ("int", Self::Integers),
        ("ternary", Self::Ternary(Trits::Base3)),
        ("ternary-bits2", Self::Ternary(Trits::Bits2)),
        ("sparse-ternary", Self::Sparse),
        ("nf4", Self::Nf4),
        ("fp4", Self::Fp4),
        ("int8", Self::Int8),
        ("fp8", Self::Fp8),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, e)| *e == self).map_or("", |(name, _)| name)
    }
}

/// A format of compressed-tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressedFormat {
    /// Codes in a stream of bits; only weights are quantized.
    Pack,
    /// Codes of 8 bits; activations are quantized as well when the model runs.
    Int,
    /// Codes of 8 bits; only weights are quantized.
    Naive,
    /// FP8; activations are quantized as well when the model runs.
    Float,
}

impl CompressedFormat {
    /// Names, as config.json has them.
    pub const NAMES: &[(&str, Self)] = &[
        ("pack-quantized", Self::Pack),
        ("int-quantized", Self::Int),
        ("naive-quantized", Self::Naive),
        ("float-quantized", Self::Float),
    ];

    /// As config.json has it.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, f)| *f == self).map_or("", |(name, _)| name)
    }
}

impl Format {
    /// Names of those that checkpoints have, as the command line has them; of compressed-tensors the first.
    pub const NAMES: &[(&str, Self)] = &[
        ("gptq", Self::Gptq),
        ("awq", Self::Awq),
        ("bnb-nf4", Self::BnbNf4),
        ("bnb-fp4", Self::BnbFp4),
        ("bnb-int8", Self::BnbInt8),
        ("compressed-tensors", Self::Compressed(CompressedFormat::Pack)),
        ("fp8", Self::Fp8),
        ("mxfp4", Self::Mxfp4),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        let plain = match self {
            Self::Compressed(_) => Self::Compressed(CompressedFormat::Pack),
            Self::Qpack(encoding) => return encoding.name(),
            other => other,
        };
        Self::NAMES.iter().find(|(_, f)| *f == plain).map_or("", |(name, _)| name)
    }

    /// Whether it has integers in groups, which methods can choose.
    pub fn has_grid(self) -> bool {
        match self {
            Self::Gptq | Self::Awq => true,
            Self::Compressed(format) => format != CompressedFormat::Float,
            Self::Qpack(encoding) => matches!(encoding, QpackEncoding::Integers) || self.is_ternary(),
            _ => false,
        }
    }

    /// Whether these are -1, 0 and 1.
    pub fn is_ternary(self) -> bool {
        matches!(self, Self::Qpack(QpackEncoding::Ternary(_) | QpackEncoding::Sparse))
    }

    /// Whether the columns of a group can be chosen.
    pub fn has_groups(self) -> bool {
        self.has_grid() || matches!(self, Self::Qpack(QpackEncoding::Nf4 | QpackEncoding::Fp4))
    }

    /// Whether columns may name their groups.
    pub fn holds_order(self) -> bool {
        matches!(
            self,
            Self::Gptq | Self::Compressed(CompressedFormat::Pack) | Self::Qpack(QpackEncoding::Integers)
        )
    }

    /// Bits that codes can have.
    fn bits(self) -> &'static [u32] {
        match self {
            Self::Gptq => &[2, 3, 4, 8],
            Self::Compressed(CompressedFormat::Pack) => &[2, 3, 4, 5, 6, 7, 8],
            Self::Compressed(_) | Self::BnbInt8 | Self::Fp8 => &[8],
            Self::Qpack(QpackEncoding::Integers) => &[1, 2, 3, 4, 5, 6, 7, 8],
            Self::Qpack(QpackEncoding::Ternary(_) | QpackEncoding::Sparse) => &[2],
            Self::Qpack(QpackEncoding::Int8 | QpackEncoding::Fp8) => &[8],
            _ => &[4],
        }
    }
}

/// A format, and what can be chosen of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The format.
    pub format: Format,
    /// Bits of a code.
    pub bits: u32,
    /// Columns of a group; `None` for one group in a row.
    pub group_size: Option<u64>,
    /// Whether zero is the middle code everywhere.
    pub symmetric: bool,
    /// Whether columns were rounded in the order of their activations: something that config.json tells.
    pub desc_act: bool,
    /// Whether groups follow such an order, instead of the columns': each column names its own.
    pub ordered: bool,
    /// Whether GPTQ's zeros are stored as they are, as the second version of its format has them, and not
    /// less 1. `None`: where zeros differ.
    pub second_version: Option<bool>,
    /// Whether the scales of bitsandbytes' 4 bits are quantized as well.
    pub double_quant: bool,
    /// Type of the scales of integers in `.qpack`: F16 or F32. Elsewhere they are F16.
    pub scales: DType,
}

impl Target {
    /// A format as it mostly is.
    pub fn new(format: Format) -> Self {
        let bits = match format.bits() {
            [bits] => *bits,
            _ => 4,
        };
        let group_size = match format {
            _ if bits == 8 => None,
            Format::Qpack(QpackEncoding::Nf4 | QpackEncoding::Fp4) => Some(64),
            _ => Some(128),
        };
        Self {
            format,
            bits,
            group_size,
            symmetric: format != Format::Awq,
            desc_act: false,
            ordered: false,
            second_version: None,
            double_quant: false,
            scales: DType::F16,
        }
    }

    /// Whether the format has what was chosen.
    ///
    /// # Errors
    /// `Misuse` where it has not.
    pub fn check(&self) -> Result<()> {
        let (name, known) = (self.format.name(), self.format.bits());
        let only = |what: &str| Err(Error::misuse(format!("{name} {what}")));
        if !known.contains(&self.bits) {
            let known: Vec<_> = known.iter().map(u32::to_string).collect();
            return only(&format!("has codes of {} bits, not of {}", known.join(", "), self.bits));
        }
        let grouped = self.group_size.is_some();
        match self.format {
            Format::Compressed(CompressedFormat::Int) if grouped || !self.symmetric => {
                only("with int-quantized has one scale for each row: --group-size -1 --sym")
            }
            Format::Gptq if !self.symmetric && self.second_version == Some(false) && self.bits == 2 => {
                // A zero of 0 has no place, and 1..3 are few.
                only("with 2 bits and zeros needs --checkpoint-format gptq_v2")
            }
            Format::BnbNf4 | Format::BnbFp4 => Ok(()),
            Format::Qpack(QpackEncoding::Integers) if self.bits == 1 && self.symmetric => {
                only("with 1 bit has codes 0 and 1, which need zeros: --asym")
            }
            Format::Qpack(QpackEncoding::Int8) if grouped => only("has one scale for each row"),
            Format::Qpack(QpackEncoding::Fp8) if grouped => only("has a scale for each 128 x 128"),
            Format::Qpack(encoding) if encoding != QpackEncoding::Integers && !self.symmetric => {
                only("has no zeros")
            }
            _ if self.ordered && !self.format.holds_order() => only("knows no order of columns"),
            _ if self.double_quant => only("has no double quantization"),
            _ => Ok(()),
        }
    }

    /// Whether zeros of GPTQ are stored less 1.
    fn first_version(&self) -> bool {
        !self.second_version.unwrap_or(!self.symmetric)
    }

    fn grid(&self) -> Grid {
        let gptq = self.format == Format::Gptq;
        Grid {
            levels: if self.format.is_ternary() { TERNARY } else { 1 << self.bits },
            group_size: self.group_size,
            symmetric: self.symmetric,
            least_zero: (gptq && self.first_version()).into(),
        }
    }

    /// How matrices of these sizes (rows, columns) are stored, of a model that is computed in `dtype`
    /// (`float16`).
    ///
    /// # Errors
    /// `Unsupported` for sizes that have no place.
    pub fn layout(&self, sizes: &[[u64; 2]], dtype: &str) -> Result<Arc<dyn Layout>> {
        let bnb4 = |fp4| Bnb4 { fp4, compute: dtype.to_string(), nested: self.double_quant.then_some(None) };
        Ok(match self.format {
            Format::Gptq => Arc::new(Gptq { grid: self.grid(), first_version: self.first_version() }),
            Format::Awq => Arc::new(Awq { grid: self.grid() }),
            Format::BnbNf4 => Arc::new(bnb4(false)),
            Format::BnbFp4 => Arc::new(bnb4(true)),
            Format::BnbInt8 => Arc::new(Bnb8),
            Format::Compressed(CompressedFormat::Float) => Arc::new(CompressedFp8),
            Format::Compressed(f) => {
                let bytes = f != CompressedFormat::Pack;
                Arc::new(Compressed { grid: self.grid(), bytes, act_order: self.ordered })
            }
            Format::Fp8 => Arc::new(Fp8 { block: [fp8_block(sizes)?; 2] }),
            Format::Mxfp4 => Arc::new(Mxfp4),
            Format::Qpack(encoding) => self.qpack(encoding),
        })
    }

    fn qpack(&self, encoding: QpackEncoding) -> Arc<dyn Layout> {
        let (grid, scales) = (self.grid(), self.scales);
        let codebook = |fp4| QpackCodebook { fp4, group_size: self.group_size };
        match encoding {
            QpackEncoding::Integers => Arc::new(QpackIntegers { grid, scales, ordered: self.ordered }),
            QpackEncoding::Ternary(packing) => Arc::new(QpackTernary { grid, packing, scales }),
            QpackEncoding::Sparse => Arc::new(QpackSparse { grid, scales, starts: None }),
            QpackEncoding::Nf4 => Arc::new(codebook(false)),
            QpackEncoding::Fp4 => Arc::new(codebook(true)),
            QpackEncoding::Int8 => Arc::new(QpackScaled::Int8),
            QpackEncoding::Fp8 => Arc::new(QpackScaled::Fp8),
        }
    }

    /// `quantization_config` of a model whose `kept` modules are not quantized, and whose matrices have
    /// these sizes; `None` for `.qpack`, which says it of each tensor.
    ///
    /// # Errors
    /// As [`Self::layout`].
    pub fn config(&self, kept: &[String], sizes: &[[u64; 2]], dtype: &str) -> Result<Option<Json>> {
        let group_size = self.group_size.map_or(-1, |n| n as i64);
        Ok(Some(match self.format {
            Format::Qpack(_) => return Ok(None),
            Format::Gptq => self.gptq_config(kept, group_size),
            Format::Awq => json!({
                "quant_method": "awq", "bits": self.bits, "group_size": group_size, "zero_point": true,
                "version": "gemm", "modules_to_not_convert": kept,
            }),
            Format::BnbNf4 | Format::BnbFp4 | Format::BnbInt8 => self.bnb_config(kept, dtype),
            Format::Compressed(format) => self.compressed_config(kept, format),
            Format::Fp8 => {
                let block = fp8_block(sizes)?;
                json!({
                    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                    "weight_block_size": [block, block], "modules_to_not_convert": kept,
                })
            }
            Format::Mxfp4 => json!({"quant_method": "mxfp4", "modules_to_not_convert": kept}),
        }))
    }

    fn gptq_config(&self, kept: &[String], group_size: i64) -> Json {
        // Outside of blocks nothing is quantized anyway.
        let in_blocks = kept.iter().filter(|name| name.bytes().any(|b| b.is_ascii_digit()));
        let rules: serde_json::Map<_, _> =
            in_blocks.map(|name| (format!("-:^{}$", name.replace('.', "\\.")), json!({}))).collect();
        let mut config = json!({
            "quant_method": "gptq", "bits": self.bits, "group_size": group_size,
            "sym": self.symmetric, "desc_act": self.desc_act || self.ordered,
            "static_groups": self.desc_act && !self.ordered,
            "true_sequential": false, "damp_percent": 0.01, "lm_head": false, "pack_dtype": "int32",
            "checkpoint_format": if self.first_version() { "gptq" } else { "gptq_v2" },
            "meta": {"quantizer": [concat!("qconv:", env!("CARGO_PKG_VERSION"))]},
        });
        if !rules.is_empty() {
            config["dynamic"] = Json::Object(rules);
        }
        config
    }

    fn bnb_config(&self, kept: &[String], dtype: &str) -> Json {
        let four = self.format != Format::BnbInt8;
        let kind = if self.format == Format::BnbFp4 { "fp4" } else { "nf4" };
        json!({
            "quant_method": "bitsandbytes", "_load_in_4bit": four, "_load_in_8bit": !four,
            "load_in_4bit": four, "load_in_8bit": !four, "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_type": kind, "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": self.double_quant, "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": kept,
        })
    }

    fn compressed_config(&self, kept: &[String], format: CompressedFormat) -> Json {
        let float = format == CompressedFormat::Float;
        let grouped = self.group_size.filter(|_| !float);
        let weights = json!({
            "num_bits": self.bits, "type": if float { "float" } else { "int" },
            "symmetric": self.symmetric, "strategy": if grouped.is_some() { "group" } else { "channel" },
            "group_size": grouped, "dynamic": false, "actorder": self.ordered.then_some("group"),
            "block_structure": null, "observer": "minmax", "observer_kwargs": {},
        });
        let activations = matches!(format, CompressedFormat::Int | CompressedFormat::Float).then(|| {
            json!({
                "num_bits": 8, "type": if float { "float" } else { "int" }, "symmetric": true,
                "strategy": "token", "group_size": null, "dynamic": true, "actorder": null,
                "block_structure": null, "observer": null, "observer_kwargs": {},
            })
        });
        // Without its own format, a group of 8 bits would be taken for a packed one.
        json!({
            "quant_method": "compressed-tensors", "format": format.name(),
            "quantization_status": "compressed", "global_compression_ratio": null,
            "kv_cache_scheme": null, "ignore": kept,
            "config_groups": {"group_0": {
                "targets": ["Linear"], "weights": weights, "input_activations": activations,
                "output_activations": null, "format": format.name(),
            }},
        })
    }
}

/// Rows and columns of FP8's blocks: the largest of 128, 64 and 32 in which all matrices divide, since
/// loaders know no ragged blocks. Matrices that are smaller than a block are one.
fn fp8_block(sizes: &[[u64; 2]]) -> Result<u64> {
    let divides = |block: u64| sizes.iter().flatten().all(|n| *n <= block || n.is_multiple_of(block));
    [128, 64, 32].into_iter().find(|block| divides(*block)).ok_or_else(|| {
        Error::unsupported("FP8: there is no size of blocks (128, 64 or 32) that divides all matrices")
            .hint("leave those out that are odd, with --ignore")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_format_has_not() {
        let of_qpack = QpackEncoding::NAMES.iter().map(|(name, e)| (name, Format::Qpack(*e)));
        for (name, format) in Format::NAMES.iter().map(|(name, f)| (name, *f)).chain(of_qpack) {
            assert_eq!(format.name(), *name);
            let target = Target::new(format);
            target.check().unwrap();
            assert!(Target { bits: 9, ..target.clone() }.check().is_err(), "{name}");
            let doubled = Target { double_quant: true, ..target };
            assert_eq!(doubled.check().is_ok(), matches!(format, Format::BnbNf4 | Format::BnbFp4), "{name}");
        }
    }

    #[test]
    fn blocks_that_divide_all() {
        assert_eq!(fp8_block(&[[256, 4096], [64, 100]]).unwrap(), 128);
        assert_eq!(fp8_block(&[[256, 192]]).unwrap(), 64);
        assert!(fp8_block(&[[256, 200]]).is_err());
    }

    #[test]
    fn what_stays_is_told() {
        let kept = ["lm_head".to_string(), "model.layers.0.mlp.gate".to_string()];
        for (name, format) in Format::NAMES {
            let config = Target::new(*format).config(&kept, &[[128, 128]], "float16").unwrap();
            let config = config.unwrap();
            assert!(config.to_string().contains("gate"), "{name}: {config}");
        }
    }
}
