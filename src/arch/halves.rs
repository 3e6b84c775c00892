//! The order of a head's elements that RoPE rotates together, and from one to the other.
//!
//! Element `j` of a head of `d` is rotated with `j + d / 2` in most programs (halves), and with its
//! neighbour in others. llama.cpp keeps to what each architecture's first program did, so its converter
//! moves the rows of some and not of others. Rearrangements that are `for` one of the orders say which:
//! without them a row leads to the order in which the other one has it already.

use serde::Deserialize;

use super::Model;
use super::active::ActiveRow;
use super::inverse::Rearrange;
use super::mapping::{Data, MAX_LAYERS, Mapped, Piece, sizes};
use super::rows::Op;
use super::scope::{WithCaptures, WithShape};
use super::template::Captures;
use crate::error::{Error, Result};
use crate::tensor::{Axes, TensorInfo, elements};

/// The order of elements that RoPE rotates together.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// As llama.cpp has the architecture: neighbours in some, halves in others.
    Ggml,
    /// Halves, in every architecture.
    Halves,
}

impl Model {
    /// The way of every tensor of a GGUF file to the same tensor where RoPE rotates halves: what
    /// [`Model::map_as`] gives with [`Layout::Halves`]. Names, shapes and order stay; only rows of queries
    /// and keys move, so blocks along rows stay whole.
    ///
    /// # Errors
    /// `Malformed` for a shape that does not fit the definition's rearrangement.
    pub fn halves(&self, tensors: &[TensorInfo]) -> Result<Vec<Mapped>> {
        // Single tensors of a file are asked for too.
        let rows = self.active_rows(tensors.len().max(MAX_LAYERS as usize))?;
        let half = |t: &TensorInfo| {
            let axes = self.in_halves(t, &rows).map_err(|e| e.context(format!("tensor {:?}", t.name)))?;
            let piece = Piece { source: t.name.clone(), copy: axes.into_copy(0) };
            let data = Data::Copied { pieces: vec![piece], elementwise: Vec::new() };
            Ok(Mapped { name: t.name.clone(), shape: t.shape.clone(), data, fixed: None })
        };
        tensors.iter().map(half).collect()
    }

    /// What is for ggml alone undone, from the last to the first, then what is for halves alone done.
    fn in_halves(&self, t: &TensorInfo, rows: &[ActiveRow<'_>]) -> Result<Axes> {
        elements(&t.shape)?;
        let mut axes = Axes::new(&t.shape);
        let Some((ops, captures)) = ops_of(&t.name, rows) else { return Ok(axes) };
        let scope = WithCaptures(&self.scope, &captures);
        let of = |layout| move |op: &&Op| op.layout() == Some(layout);
        let undone = ops.iter().filter(of(Layout::Ggml)).rev().map(|op| (op, true));
        for (op, back) in undone.chain(ops.iter().filter(of(Layout::Halves)).map(|op| (op, false))) {
            let Op::Rearrange(r) = op else { continue };
            let spec = Rearrange::parse(&r.rearrange)?;
            let spec = if back { spec.inverse() } else { spec };
            let shape = axes.shape();
            let (groups, order) = spec.resolve(&shape, &sizes(&r.sizes, &WithShape(&scope, &shape))?)?;
            axes.regroup(&groups, &order)?;
        }
        if axes.shape() != t.shape {
            return Err(Error::malformed(format!(
                "shape {:?} becomes {:?} by a rearrangement `for` one layout, which must keep it",
                t.shape,
                axes.shape()
            )));
        }
        Ok(axes)
    }
}

/// The transforms that end in a tensor of GGUF.
fn ops_of<'a>(name: &str, rows: &'a [ActiveRow<'_>]) -> Option<(&'a [Op], Captures)> {
    rows.iter().find_map(|r| {
        let (k, captures) = r.row.to.iter().enumerate().find_map(|(k, to)| Some((k, to.matches(name)?)))?;
        let ops = if r.row.to.len() > 1 { &r.row.part_ops[k] } else { &r.row.ops };
        r.in_layer(&captures).then_some((&ops[..], captures))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::{all, take_for};
    use crate::tensor::{DType, StridedCopy};

    /// Where each element of the source goes.
    fn moved(copy: &StridedCopy, from: &[u64]) -> Vec<u64> {
        let bytes: Vec<u8> = from.iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut out = vec![0u8; bytes.len()];
        copy.gather(0, 8, &mut out, &mut Vec::new(), &mut |at, buffer: &mut [u8]| {
            buffer.copy_from_slice(&bytes[at as usize * 8..][..buffer.len()]);
            Ok(())
        })
        .unwrap();
        out.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    #[test]
    fn both_ways_to_halves_meet_in_every_architecture() {
        // Heads, heads of keys, width of a head and of the model in the examples.
        let (h, kv, n) = (4u64, 2u64, 64u64);
        let mut seen = Vec::new();
        for arch in all().unwrap() {
            let Some(examples) = arch.examples() else { continue };
            for (_, config) in examples {
                let Ok(model) = take_for(arch.clone(), &config) else { continue };
                for active in model.active_rows(8).unwrap() {
                    let row = active.row;
                    for k in 0..row.to.len() {
                        let ops = if row.to.len() > 1 { &row.part_ops[k] } else { &row.ops };
                        if ops.iter().all(|op| op.layout().is_none()) {
                            continue;
                        }
                        let d = model.var("head_dim").unwrap().as_u64().unwrap_or(n / h);
                        let target = row.to[k].text();
                        let shape = match (row.hf.text(), target) {
                            (name, _) if name.ends_with("wqkv.weight") => vec![(h + 2 * kv) * d, n],
                            (name, _) if name.ends_with("W_pack.weight") => vec![3 * h * d, n],
                            (name, _) if name.contains("query_key_value") => vec![(h + 2 * kv) * d, n],
                            (_, name) if name.contains("_norm") => {
                                vec![if name.contains("attn_q") { h } else { kv }, d]
                            }
                            (_, name) => vec![if name.contains("attn_q") { h } else { kv } * d, n],
                        };
                        let layer = (0..8).find(|i| active.in_layer(&Captures::of_layer(*i))).unwrap();
                        let mut captures = Captures::of_layer(layer);
                        captures.parameter = row.hf.has_parameter().then_some("weight");
                        let to = |layout| {
                            let axes = Axes::new(&shape);
                            let (axes, _) = model
                                .transform(row, k, &axes, &captures, layout)
                                .unwrap_or_else(|e| panic!("{} {target}: {e}", arch.name));
                            (axes.shape(), axes.into_copy(0))
                        };
                        let (out, ggml) = to(Layout::Ggml);
                        let (same, halves) = to(Layout::Halves);
                        assert_eq!(out, same, "{}", arch.name);
                        let numbers: Vec<u64> = (0..shape.iter().product()).collect();
                        let wanted =
                            moved(&halves, &numbers)[..out.iter().product::<u64>() as usize].to_vec();
                        let file = moved(&ggml, &numbers)[..wanted.len()].to_vec();
                        let info = TensorInfo {
                            name: row.to[k].fill(&captures).unwrap(),
                            shape: out.clone(),
                            dtype: DType::F32,
                            file: 0,
                            offset: 0,
                            nbytes: 4 * out.iter().product::<u64>(),
                        };
                        let mapped = model.halves(std::slice::from_ref(&info)).unwrap().remove(0);
                        let Data::Copied { pieces, .. } = mapped.data else { panic!("values") };
                        assert!(moved(&pieces[0].copy, &file) == wanted, "{} {target}", arch.name);
                        if file != wanted {
                            seen.push(arch.name.clone());
                        }
                    }
                }
            }
        }
        seen.dedup();
        let names = "arcee arctic baichuan bailingmoe chameleon cohere2 command-r deci deepseek ernie4_5-moe ernie4_5 glm4 granite granite_swa granitehybrid granitemoe internlm2 llada llama-embed llama minicpm mistral3 muse-glimmer nanbeige nemotron_h nemotron_h_moe olmo smollm3 xverse";
        assert_eq!(seen, names.split(' ').collect::<Vec<_>>());
    }

    #[test]
    fn rearrangements_for_a_layout_stand_where_they_can_be_undone() {
        let with = |row: &str| {
            let text = format!("schema = 1\n[tensors]\n\"a.{{i}}.weight\" = {row}\n");
            crate::arch::Architecture::parse(&text, &|_| None).map(drop)
        };
        let turn = r#"{ rearrange = "(h two d) n -> (h d two) n", h = 2, two = 2, for = "ggml" }"#;
        with(&format!(r#"{{ to = "b.{{i}}.weight", ops = [{turn}] }}"#)).unwrap();
        for wrong in [
            format!(r#"{{ to = "b.{{i}}.weight", ops = [{turn}, {{ add = 1 }}] }}"#),
            format!(r#"{{ split = ["b.{{i}}.weight", "c.{{i}}.weight"], ops = [{turn}] }}"#),
            format!(r#"{{ to = "b.{{i}}.weight", pad = "4", ops = [{turn}] }}"#),
            turn.replace("ggml", "gguf")
                .replace("{ rearrange", r#"{ to = "b.{i}.weight", ops = [{ rearrange"#)
                + "] }",
        ] {
            assert!(with(&wrong).is_err(), "{wrong}");
        }
    }
}
