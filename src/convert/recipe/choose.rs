//! The type of every tensor: a recipe, the user's wishes, and what holds for all file types.
//!
//! Source of the facts: `src/llama-quant.cpp`; formats/spec/recipes.md has them in prose.

use std::cmp::Ordering;

use regex::{Regex, RegexBuilder};

use super::role::{Asked, Counters, Role, layer_of};
use super::{ModelFacts, Recipe};
use crate::convert::guide::Way;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// What the user asks for beyond a file type.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Types by name; the first pattern found in a name counts, see [`parse_tensor_type`].
    pub tensor_types: Vec<(Regex, DType)>,
    /// Type of the token embeddings.
    pub token_embedding: Option<DType>,
    /// Type of the output tensor; without one, of the token embeddings, which then serve as output.
    pub output: Option<DType>,
    /// The file type's main type for all tensors, by no rules.
    pub pure: bool,
    /// Keep the output tensor as it is.
    pub leave_output: bool,
    /// Whether there is an importance matrix.
    pub imatrix: bool,
    /// Count tensors in the order given, instead of by layer and name: llama.cpp does so for files
    /// whose shards are kept.
    pub file_order: bool,
}

/// The type of one tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The type to write.
    pub dtype: DType,
    /// The type that was wanted, where the rows do not fill its blocks.
    pub wanted: Option<DType>,
    /// Whether llama.cpp refuses to write this without importances for this tensor.
    pub needs_imatrix: bool,
    /// The method that the recipe names for it.
    pub way: Option<Way>,
}

/// `REGEX=TYPE`, as llama-quantize's `--tensor-type` reads it: the pattern may match anywhere in a
/// tensor's name, in any case.
///
/// # Errors
/// `Misuse` for what is no pattern or no type that can be written.
pub fn parse_tensor_type(text: &str) -> Result<(Regex, DType)> {
    let (pattern, name) = text
        .split_once('=')
        .filter(|(pattern, _)| !pattern.is_empty())
        .ok_or_else(|| Error::misuse(format!("{text:?} is not REGEX=TYPE, such as attn_v=q8_0")))?;
    let dtype = DType::from_name(name)
        .filter(|&t| is_weight(t) && t.ggml_id().is_some() && !NOT_WRITTEN.contains(&t))
        .ok_or_else(|| Error::misuse(format!("{text:?}: {name:?} is no type for weights")))?;
    // No backtracking: no pattern takes longer than its length times the name's.
    let regex = RegexBuilder::new(pattern)
        .case_insensitive(true)
        .build()
        .map_err(|e| Error::misuse(format!("{pattern:?} is no regular expression: {e}")))?;
    Ok((regex, dtype))
}

/// Never quantized: names that hold one of these. They are small, or not weights.
const NEVER: &[&str] = &[
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
];
/// The same for whole names.
const NEVER_WHOLE: &[&str] = &["position_embd.weight", "token_types.weight"];
/// The same, and names that hold one of the second list are Q8_0, in this architecture.
const GLM5_NEXT: &str = "glm5-next";
const NEVER_GLM5_NEXT: &[&str] = &[
    "hc_",
    "indexer.attn_q_b",
    "indexer.attn_k",
    "indexer.proj",
    "indexer_compressor_gate",
    "indexer_compressor_ape",
    "ssm_f_a.weight",
    "ssm_f_b.weight",
    "ssm_g_a.weight",
    "ssm_g_b.weight",
    "ssm_beta.weight",
    "attn_kv_a_mqa.weight",
    "attn_k_b.weight",
    "attn_v_b.weight",
];
const Q8_0_GLM5_NEXT: &[&str] = &["attn_q_a", "attn_q_b", "nextn.eh_proj"];
/// Types that come out as garbage without importances, whatever the file type.
const NEEDS_IMATRIX: &[DType] =
    &[DType::IQ1_S, DType::IQ1_M, DType::IQ2_XXS, DType::IQ2_XS, DType::IQ2_S, DType::IQ3_XXS];
/// Types whose encoder has no way without importances, whatever the tensor.
const ENCODER_NEEDS_IMATRIX: &[DType] = &[DType::IQ1_S, DType::IQ2_XXS, DType::IQ2_XS];
/// Types of activations: ggml does not write them to files.
const NOT_WRITTEN: &[DType] = &[DType::Q8_1, DType::Q8_K];

impl Recipe {
    /// The types of all tensors of a model: name, type and shape (outermost dimension first), as
    /// they are in a GGUF file. The order of the list does not matter, see
    /// [`Overrides::file_order`]; the choices come in it.
    ///
    /// # Errors
    /// `Unsupported` or `Misuse` for rows that do not fill the blocks of their type, where there
    /// is no other type for them; `Malformed` for experts of a layer that the model does not have.
    pub fn choose(
        &self,
        facts: &ModelFacts,
        overrides: &Overrides,
        tensors: &[(&str, DType, &[u64])],
    ) -> Result<Vec<Choice>> {
        let mut order: Vec<usize> = (0..tensors.len()).collect();
        if !overrides.file_order {
            order.sort_by(|&a, &b| loader_order(tensors[a].0, tensors[b].0));
        }
        let mut chooser =
            Chooser { recipe: self, facts, overrides, tied: true, n_attn_v: 0, done: Counters::default() };
        for (name, ..) in tensors {
            match Role::of(name) {
                Role::AttnV => chooser.n_attn_v += 1,
                Role::Output => chooser.tied = false,
                _ => {}
            }
        }
        let mut choices: Vec<_> = tensors
            .iter()
            .map(|t| Choice { dtype: t.1, wanted: None, needs_imatrix: false, way: None })
            .collect();
        for at in order {
            let (name, source, shape) = tensors[at];
            let context = |e: Error| e.context(format!("tensor {name:?}"));
            choices[at] = chooser.one(name, source, shape).map_err(context)?;
        }
        Ok(choices)
    }
}

/// The order in which llama.cpp loads tensors: those of no layer first, then by layer and name.
pub fn loader_order(a: &str, b: &str) -> Ordering {
    let layer = |name| layer_of(name).unwrap_or(-1);
    layer(a).cmp(&layer(b)).then_with(|| a.cmp(b))
}

/// Whether a tensor of this type holds weights, which may be stored as another type.
fn is_weight(dtype: DType) -> bool {
    dtype.is_block() || matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64)
}

struct Chooser<'a> {
    recipe: &'a Recipe,
    facts: &'a ModelFacts,
    overrides: &'a Overrides,
    /// Whether the token embeddings serve as output.
    tied: bool,
    n_attn_v: u32,
    /// Tensors that the rules were asked about.
    done: Counters,
}

impl Chooser<'_> {
    fn one(&mut self, name: &str, source: DType, shape: &[u64]) -> Result<Choice> {
        if !self.may_be_quantized(name, source, shape) {
            return Ok(Choice { dtype: source, wanted: None, needs_imatrix: false, way: None });
        }
        let role = Role::of(name);
        let width = shape.last().copied().unwrap_or(1);
        let mut way = None;
        let (dtype, wanted) = match self.demanded(name, role) {
            Some(dtype) => {
                if !width.is_multiple_of(dtype.block_size()) {
                    return Err(Error::misuse(format!(
                        "rows of {width} do not fill the blocks of {} of {dtype}",
                        dtype.block_size()
                    )));
                }
                (dtype, None)
            }
            None if !self.recipe.dtype.is_block() => (self.recipe.dtype, None),
            None => {
                let wanted = match self.by_pattern(name) {
                    Some(dtype) => dtype,
                    None if self.overrides.pure => self.recipe.dtype,
                    None => {
                        let (dtype, by) = self.by_rules(name, role, shape)?;
                        way = by;
                        dtype
                    }
                };
                let dtype = fallback(wanted, width)?;
                (dtype, (dtype != wanted).then_some(wanted))
            }
        };
        let ends = matches!(role, Role::TokenEmbd | Role::Output);
        let poor = !ends && (NEEDS_IMATRIX.contains(&dtype) || self.recipe.needs_imatrix.contains(&dtype));
        let needs_imatrix = dtype != source && (poor || ENCODER_NEEDS_IMATRIX.contains(&dtype));
        Ok(Choice { dtype, wanted, needs_imatrix, way })
    }

    fn may_be_quantized(&self, name: &str, source: DType, shape: &[u64]) -> bool {
        // ggml does not count outer dimensions of one.
        let dims = shape.len() - shape.iter().take_while(|&&n| n == 1).count();
        let holds = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
        dims >= 2
            && is_weight(source)
            && name.ends_with("weight")
            && !holds(NEVER)
            && !NEVER_WHOLE.contains(&name)
            && !(self.overrides.leave_output && Role::of(name) == Role::Output)
            && !(self.facts.arch == GLM5_NEXT && holds(NEVER_GLM5_NEXT))
    }

    /// What the user says about the ends of the model. The embeddings of each layer are a large
    /// table of their own, for which a pattern says more.
    fn demanded(&self, name: &str, role: Role) -> Option<DType> {
        let patterns_decide = || name.starts_with("per_layer") && self.by_pattern(name).is_some();
        match role {
            Role::TokenEmbd => self.overrides.token_embedding.filter(|_| !patterns_decide()),
            Role::Output => self.overrides.output,
            _ => None,
        }
    }

    fn by_pattern(&self, name: &str) -> Option<DType> {
        self.overrides.tensor_types.iter().find(|(regex, _)| regex.is_match(name)).map(|(_, dtype)| *dtype)
    }

    fn by_rules(&mut self, name: &str, role: Role, shape: &[u64]) -> Result<(DType, Option<Way>)> {
        if self.facts.arch == GLM5_NEXT && Q8_0_GLM5_NEXT.iter().any(|part| name.contains(part)) {
            return Ok((DType::Q8_0, None));
        }
        let role = if self.tied && role == Role::TokenEmbd { Role::Output } else { role };
        let index = self.done.count(role);
        if let (Role::Output, Some(dtype)) = (role, self.overrides.output) {
            return Ok((dtype, None));
        }
        let Self { facts, n_attn_v, .. } = *self;
        let imatrix = self.overrides.imatrix;
        self.recipe.apply_rules(&Asked { facts, name, role, index, n_attn_v, shape, imatrix })
    }
}

/// The type instead of `wanted` where rows of `width` do not fill its blocks.
fn fallback(wanted: DType, width: u64) -> Result<DType> {
    let fits = |dtype: DType| width.is_multiple_of(dtype.block_size());
    if fits(wanted) {
        return Ok(wanted);
    }
    let smaller = match wanted {
        DType::IQ1_S
        | DType::IQ1_M
        | DType::IQ2_XXS
        | DType::IQ2_XS
        | DType::IQ2_S
        | DType::IQ3_XXS
        | DType::IQ3_S
        | DType::IQ4_XS => DType::IQ4_NL,
        DType::Q2_0 | DType::Q2_K | DType::Q3_K | DType::TQ1_0 | DType::TQ2_0 => DType::Q4_0,
        DType::Q4_K => DType::Q5_0,
        DType::Q5_K => DType::Q5_1,
        DType::Q6_K => DType::Q8_0,
        _ if wanted.block_size() <= 32 => DType::F16,
        _ => {
            return Err(Error::unsupported(format!(
                "rows of {width} do not fill the blocks of {} of {wanted}, and no other type stands in for it",
                wanted.block_size()
            ))
            .hint("name another type for such tensors (--tensor-type)"));
        }
    };
    Ok(if fits(smaller) { smaller } else { DType::F16 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn facts() -> ModelFacts {
        ModelFacts { arch: "llama".into(), layers: 8, main_layers: 8, heads: 8, kv_heads: 8, experts: 0 }
    }

    fn choose(recipe: &str, overrides: &Overrides, name: &str, shape: &[u64]) -> Result<Choice> {
        let tensors = [(name, DType::F32, shape), ("output.weight", DType::F32, &[8, 256][..])];
        Ok(Recipe::parse(recipe)?.choose(&facts(), overrides, &tensors)?[0])
    }

    #[test]
    fn every_rule_can_be_evaluated() {
        for recipe in Recipe::all().unwrap() {
            for experts in [0, 2, 8] {
                for imatrix in [false, true] {
                    let overrides = Overrides { imatrix, ..Default::default() };
                    for name in [
                        "token_embd.weight",
                        "blk.7.attn_q.weight",
                        "blk.7.attn_k.weight",
                        "blk.7.attn_v.weight",
                        "blk.7.attn_output.weight",
                        "blk.7.ffn_up.weight",
                        "blk.7.ffn_gate.weight",
                        "blk.7.ffn_down.weight",
                        "blk.7.other.weight",
                    ] {
                        let facts = ModelFacts { experts, ..facts() };
                        recipe.choose(&facts, &overrides, &[(name, DType::F32, &[8, 256])]).unwrap();
                    }
                }
            }
        }
    }

    #[test]
    fn wishes_and_their_order() {
        let (v, embd, out) = ("blk.0.attn_v.weight", "token_embd.weight", "output.weight");
        let shape = &[8, 256][..];
        let dtype = |o: &Overrides, name| choose("Q4_K_M", o, name, shape).unwrap().dtype;
        let wishes = Overrides {
            tensor_types: ["TTN_V=q2_k", "attn_v=q3_k", "embd=f16"]
                .map(|t| parse_tensor_type(t).unwrap())
                .into(),
            ..Default::default()
        };
        assert_eq!(dtype(&wishes, v), DType::Q2_K);
        assert_eq!(dtype(&wishes, embd), DType::F16);
        let both = Overrides { token_embedding: Some(DType::Q8_0), ..wishes };
        assert_eq!(dtype(&both, embd), DType::Q8_0);
        assert_eq!(dtype(&both, "per_layer_token_embd.weight"), DType::F16);
        let pure = Overrides { pure: true, output: Some(DType::BF16), ..Default::default() };
        assert_eq!(dtype(&pure, v), DType::Q4_K);
        assert_eq!(
            Recipe::parse("Q4_K_M").unwrap().choose(&facts(), &pure, &[(out, DType::F32, shape)]).unwrap()[0]
                .dtype,
            DType::BF16
        );
        for bad in ["attn_v", "=q8_0", "(=q8_0", "a=q9", "a=i32", "a=q8_k", "a=u8", "a{9999999}=q8_0"] {
            assert_eq!(parse_tensor_type(bad).unwrap_err().kind(), ErrorKind::Misuse, "{bad}");
        }
    }

    #[test]
    fn what_cannot_be_is_an_error() {
        let none = Overrides::default();
        let odd = &[8, 96][..];
        assert_eq!(
            choose("q1_0", &none, "blk.0.attn_q.weight", odd).unwrap_err().kind(),
            ErrorKind::Unsupported
        );
        let wish = Overrides { token_embedding: Some(DType::Q4_K), ..Default::default() };
        assert_eq!(choose("q8_0", &wish, "token_embd.weight", odd).unwrap_err().kind(), ErrorKind::Misuse);
        let facts = ModelFacts { experts: 4, ..facts() };
        let outside = [("blk.8.ffn_down_exps.weight", DType::F32, &[4, 8, 256][..])];
        let error = Recipe::parse("Q4_K_M").unwrap().choose(&facts, &none, &outside).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed);
    }

    #[test]
    fn shapes_and_types_that_stay() {
        for (shape, dtype) in [(&[256][..], DType::F32), (&[1, 256], DType::F32), (&[256, 1], DType::I32)] {
            let tensors = [("blk.0.attn_q.weight", dtype, shape)];
            let choice =
                Recipe::parse("F16").unwrap().choose(&facts(), &Overrides::default(), &tensors).unwrap()[0];
            assert_eq!(choice.dtype, dtype, "{shape:?}");
        }
    }
}
