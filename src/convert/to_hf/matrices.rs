//! Which matrices of a model are quantized, and with how many bits where nobody said.

use std::collections::BTreeSet;

use regex::Regex;

use super::Wanted;
use crate::arch::Mapped;
use crate::container::Store;
use crate::container::grouped::Rows;
use crate::convert::gather::Source;
use crate::error::{Error, Result};
use crate::packed::write::{Format, IntegerData, Integers, Target, is_half};
use crate::tensor::DType;

/// Parts of names between the number of a block and `weight` that mean: not this one. Routers choose
/// experts, and small changes change the choice; embeddings are no products.
const LEFT: [&str; 8] =
    ["norm", "router", "embed", "conv", "rotary", "relative_attention_bias", "ln_", "lora"];
/// The same, as whole parts.
const LEFT_WHOLE: [&str; 5] = ["gate", "gate_inp", "shared_expert_gate", "wte", "wpe"];
/// Towers that see or hear, which are small and suffer most.
const TOWERS: [&str; 6] = ["vision", "visual", "audio", "image", "speech", "projector"];

/// Whether a tensor is a matrix that `format` quantizes, unless that is not wished.
pub fn is_wanted(format: Format, name: &str, shape: &[u64], ignore: &[Regex]) -> bool {
    let module = module(name);
    if ignore.iter().any(|pattern| pattern.is_match(module)) {
        return false;
    }
    if format == Format::Mxfp4 {
        return name.ends_with("_blocks") && shape.len() == 3;
    }
    // Stacks of experts are one tensor, which may have any name.
    let is_stack = matches!(format, Format::Qpack(_)) && shape.len() == 3 && experts(name).is_some();
    let parts: Vec<&str> = module.split('.').collect();
    // Matrices of a block: below a number.
    let Some(number) = parts.iter().position(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
    else {
        return false;
    };
    let inner = &parts[number + 1..];
    (is_stack || name.ends_with(".weight") && shape.len() == 2)
        && !inner.is_empty()
        && !parts.iter().any(|p| TOWERS.iter().any(|tower| p.contains(tower)))
        && !inner.iter().any(|p| LEFT_WHOLE.contains(p) || LEFT.iter().any(|left| p.contains(left)))
}

/// A module that stays as it is, where it could have been quantized.
pub fn is_kept(name: &str, shape: &[u64]) -> bool {
    name.ends_with(".weight") && shape.len() == 2
}

/// The module of all experts of a block that a tensor belongs to.
pub fn experts(name: &str) -> Option<&str> {
    let (before, _) = name.split_once(".experts.")?;
    name.get(..before.len() + ".experts".len())
}

/// `model.layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj`.
pub fn module(name: &str) -> &str {
    name.strip_suffix(".weight").or_else(|| name.strip_suffix("_blocks")).unwrap_or(name)
}

/// The names of modules that are quantized, for loaders that would take each linear layer of a block for one:
/// what follows the number of the block, or all of the name where another block keeps such a module.
/// transformers compares ends of names (`modules_in_block_to_quantize`).
pub fn in_blocks(quantized: &[&str], kept: &[String]) -> Vec<String> {
    let of_block = |name: &'_ str| {
        let start = name.split('.').scan(0, |at, part| {
            *at += part.len() + 1;
            Some((*at, part))
        });
        let mut numbers =
            start.filter(|(_, part)| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
        numbers.next().map_or(0, |(end, _)| end.min(name.len()))
    };
    let inner: BTreeSet<&str> = kept.iter().map(|name| &name[of_block(name)..]).collect();
    let names: BTreeSet<&str> = quantized
        .iter()
        .map(|name| &name[of_block(name)..])
        .zip(quantized)
        .map(|(short, name)| if inner.contains(short) { *name } else { short })
        .collect();
    names.into_iter().map(String::from).collect()
}

/// The integers that a tensor consists of, where it is taken over whole.
pub fn integers(m: &Mapped, source: &Source, store: &Store) -> Option<Integers> {
    let cols = m.shape.last().copied()?;
    let dtype = source.dtype()?;
    if source.is_plain(dtype)
        && let Some(integers) = Integers::blocks(dtype, source.elements() / cols.max(1), cols)
    {
        return Some(integers);
    }
    let (matrix, _) = store.grouped(store.get(&m.name)?)?;
    let whole = source.is_plain(dtype) && [matrix.shape().rows, matrix.shape().cols] == m.shape[..];
    whole.then(|| Integers::Grouped(matrix.clone()))
}

/// Completes what is wanted by what most matrices of the source have already, or by what is customary.
///
/// # Errors
/// `Misuse` for what the format has not; as reads fail.
pub fn decide<'a>(
    wanted: &Wanted,
    of_source: impl Iterator<Item = &'a Integers>,
    store: &Store,
) -> Result<Target> {
    let mut target = Target::new(wanted.format);
    let mut kinds: Vec<(u64, &Integers)> = Vec::new();
    let all: Vec<&Integers> = of_source.collect();
    for integers in all.iter().copied() {
        let shape = integers.shape();
        let n = shape.rows * shape.cols;
        let same = |other: &Integers| {
            let other = other.shape();
            (other.bits, other.group_size) == (shape.bits, shape.group_size)
        };
        match kinds.iter_mut().find(|(_, other)| same(other)) {
            Some((count, _)) => *count += n,
            None => kinds.push((n, integers)),
        }
    }
    let found = kinds.into_iter().max_by_key(|(n, _)| *n).map(|(_, integers)| integers);
    if let Some(integers) = found.filter(|_| wanted.format.has_grid()) {
        let shape = integers.shape();
        let (symmetric, halves) = look(&all, store)?;
        let like = Target {
            bits: shape.bits,
            group_size: (shape.groups > 1).then_some(shape.group_size),
            symmetric: symmetric || wanted.format.is_ternary(),
            scales: if halves { DType::F16 } else { DType::F32 },
            ..target.clone()
        };
        // Where the format has no such codes, wider ones hold them.
        let wider = Target { bits: 8, ..like.clone() };
        target = [like, wider].into_iter().find(|t| t.check().is_ok()).unwrap_or(target);
    }
    target.bits = wanted.bits.unwrap_or(target.bits);
    match wanted.group_size {
        None => {}
        Some(-1) => target.group_size = None,
        Some(n @ 1..) => target.group_size = Some(n as u64),
        Some(n) => {
            return Err(Error::misuse(format!("--group-size {n}: columns of a group, or -1 for a row")));
        }
    }
    target.symmetric = wanted.symmetric.unwrap_or(target.symmetric);
    target.desc_act = wanted.desc_act;
    let same = |i: &&&Integers| i.shape().group_size == target.group_size.unwrap_or(i.shape().cols);
    if target.format.holds_order() {
        for integers in all.iter().filter(same) {
            target.ordered |= integers.order(store.stored())?.is_some();
        }
    }
    target.second_version = wanted.second_version;
    target.double_quant = wanted.double_quant;
    target.check()?;
    Ok(target)
}

/// Looks at some rows of each matrix, from all over it: whether zeros are the middle code, and scales numbers of
/// F16.
fn look(all: &[&Integers], store: &Store) -> Result<(bool, bool)> {
    let (mut symmetric, mut halves) = (true, true);
    let mut rows = Rows::default();
    for integers in all {
        if let Some(known) = integers.is_symmetric() {
            symmetric &= known;
            continue;
        }
        let shape = integers.shape();
        let middle = (1u32 << (shape.bits - 1)) as f32;
        let last = shape.rows.saturating_sub(1);
        for k in 0..LOOKS.min(shape.rows) {
            // The last is looked at, and the product is below 2^64.
            let row =
                (u128::from(last) * u128::from(k) / u128::from(LOOKS.min(shape.rows).max(2) - 1)) as u64;
            integers.read_lines(IntegerData::Stored(store.stored()), row..row + 1, &mut rows)?;
            symmetric &= rows.zeros.iter().all(|zero| *zero == middle);
            halves &= rows.scales.iter().all(|scale| is_half(*scale));
        }
    }
    Ok((symmetric, halves))
}

/// Rows that are looked at.
const LOOKS: u64 = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::write::QpackEncoding;

    #[test]
    fn matrices_of_blocks_but_for_routers() {
        let ignore = [Regex::new("down_proj$").unwrap()];
        let wanted = |name: &str| is_wanted(Format::Gptq, name, &[64, 64], &ignore);
        for name in [
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.11.mlp.gate_proj.weight",
            "model.layers.1.mlp.experts.3.up_proj.weight",
            "model.language_model.layers.1.mlp.up_proj.weight",
            "encoder.block.0.layer.0.SelfAttention.q.weight",
        ] {
            assert!(wanted(name), "{name}");
        }
        for name in [
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.layers.0.mlp.gate.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
            "model.layers.0.mlp.router.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.0.self_attn.q_proj.bias",
            "model.vision_tower.layers.0.fc1.weight",
        ] {
            assert!(!wanted(name), "{name}");
        }
        let stack = |format, name| is_wanted(format, name, &[4, 64, 64], &[]);
        let qpack = Format::Qpack(QpackEncoding::Integers);
        assert!(!stack(Format::Gptq, "model.layers.0.mlp.experts.gate_up_proj"));
        assert!(stack(qpack, "model.layers.0.mlp.experts.gate_up_proj"));
        assert!(!stack(qpack, "model.layers.0.conv.weight"));
        let bias = "model.layers.0.mlp.experts.gate_up_proj_bias";
        assert!(
            !is_wanted(qpack, bias, &[4, 64], &[])
                && is_wanted(qpack, "model.layers.0.q.weight", &[4, 4], &[])
        );
    }

    #[test]
    fn modules_by_the_end_of_their_names() {
        let kept = ["lm_head", "model.layers.1.mlp.up", "model.layers.0.self_attn.k"].map(String::from);
        let quantized = ["model.layers.0.mlp.up", "model.layers.0.self_attn.q", "model.layers.1.self_attn.q"];
        assert_eq!(in_blocks(&quantized, &kept), ["model.layers.0.mlp.up", "self_attn.q"]);
    }
}
