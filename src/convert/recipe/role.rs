//! What a tensor does in the model, by its name, and what rules may ask about it.

use serde::Deserialize;
use serde_json::Value as Json;

use super::ModelFacts;
use crate::arch::{Expr, Scope};
use crate::error::{Error, Result};
use crate::tensor::DType;

macro_rules! roles {
    ($($variant:ident $name:literal,)*) => {
        /// What a tensor does.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
        #[serde(rename_all = "snake_case")]
        #[allow(missing_docs)]
        pub enum Role { $($variant),* }

        impl Role {
            const COUNT: usize = [$(Role::$variant),*].len();

            /// Its name in recipes.
            pub fn name(self) -> &'static str {
                match self { $(Role::$variant => $name),* }
            }
        }
    };
}

roles! {
    TokenEmbd "token_embd",
    Output "output",
    AttnQ "attn_q",
    AttnK "attn_k",
    AttnV "attn_v",
    AttnOutput "attn_output",
    FfnUp "ffn_up",
    FfnGate "ffn_gate",
    FfnDown "ffn_down",
    Other "other",
}

/// Parts of names and what they mean, the first that is found counts. Where values are stored
/// together with something else, that is treated as values.
const PARTS: &[(&str, Role)] = &[
    ("attn_qkv.weight", Role::AttnV),
    ("attn_kv_b.weight", Role::AttnV),
    ("attn_v.weight", Role::AttnV),
    ("attn_k.weight", Role::AttnK),
    ("attn_q.weight", Role::AttnQ),
    ("attn_output.weight", Role::AttnOutput),
    ("ffn_up", Role::FfnUp),
    ("ffn_gate", Role::FfnGate),
    ("ffn_down", Role::FfnDown),
];

impl Role {
    /// The role of the tensor called `name`.
    pub fn of(name: &str) -> Self {
        match name {
            "output.weight" => Self::Output,
            "token_embd.weight" | "per_layer_token_embd.weight" => Self::TokenEmbd,
            _ => PARTS.iter().find(|(part, _)| name.contains(part)).map_or(Self::Other, |(_, role)| *role),
        }
    }
}

/// The layer's number in `blk.3.attn_q.weight`, as C's `scanf` reads it: what follows the number
/// does not matter, a number that is too large loses its upper bits.
pub(super) fn layer_of(name: &str) -> Option<i32> {
    let rest = name.strip_prefix("blk.")?;
    let (sign, digits) = match rest.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, rest.strip_prefix('+').unwrap_or(rest)),
    };
    let mut number = None;
    for digit in digits.bytes().take_while(u8::is_ascii_digit) {
        let so_far: i64 = number.unwrap_or(0);
        number = Some(so_far.saturating_mul(10).saturating_add(i64::from(digit - b'0')));
    }
    number.map(|n| (sign * n) as i32)
}

/// How many tensors of each role there were.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters([u32; Role::COUNT]);

impl Counters {
    /// Counts a tensor; returns how many came before.
    pub fn count(&mut self, role: Role) -> u32 {
        let before = self.of(role);
        self.0[role as usize] += 1;
        before
    }

    pub fn of(&self, role: Role) -> u32 {
        self.0[role as usize]
    }
}

/// A tensor about which the rules are asked.
pub(super) struct Asked<'a> {
    pub facts: &'a ModelFacts,
    pub name: &'a str,
    pub role: Role,
    /// Tensors of this role that rules were asked about before.
    pub index: u32,
    /// Tensors with values of attention, in the whole model.
    pub n_attn_v: u32,
    pub shape: &'a [u64],
    pub imatrix: bool,
}

impl<'a> Asked<'a> {
    /// What expressions may name.
    pub fn scope<'s>(&'s self, default: DType, vars: &'s [(&'s str, &'s Expr)]) -> AskedScope<'s, 'a> {
        AskedScope { asked: self, default, dtype: default, vars }
    }

    /// Where the tensor stands among the layers. Experts are stored in any order, so that only
    /// the name tells; values of attention are counted nevertheless.
    fn layer(&self) -> Result<i64> {
        if self.facts.experts <= 1 || self.role == Role::AttnV {
            return Ok(i64::from(self.index));
        }
        let layer = layer_of(self.name).filter(|&i| i >= 0 && i64::from(i) < i64::from(self.facts.layers));
        layer.map(i64::from).ok_or_else(|| {
            Error::malformed(format!(
                "tensor {:?} belongs to none of the {} layers",
                self.name, self.facts.layers
            ))
        })
    }
}

pub(super) struct AskedScope<'s, 'a> {
    asked: &'s Asked<'a>,
    default: DType,
    /// The type so far.
    pub dtype: DType,
    vars: &'s [(&'s str, &'s Expr)],
}

impl Scope for AskedScope<'_, '_> {
    fn get(&self, name: &str) -> Result<Option<Json>> {
        let Asked { facts, role, shape, .. } = self.asked;
        let layered = matches!(role, Role::AttnV | Role::FfnUp | Role::FfnGate | Role::FfnDown);
        Ok(Some(match name {
            "arch" => facts.arch.as_str().into(),
            "main_layers" => facts.main_layers.into(),
            "heads" => facts.heads.into(),
            "kv_heads" => facts.kv_heads.into(),
            "gqa" => facts.gqa().into(),
            "experts" => facts.experts.into(),
            "imatrix" => self.asked.imatrix.into(),
            "role" => role.name().into(),
            "type" => self.dtype.name().into(),
            "default" => self.default.name().into(),
            "fits" => shape.last().is_none_or(|width| width.is_multiple_of(self.default.block_size())).into(),
            // The third dimension: how many matrices are stacked.
            "depth" => shape.iter().rev().nth(2).copied().unwrap_or(1).into(),
            "index" if layered => self.asked.index.into(),
            "i" if layered => self.asked.layer()?.into(),
            "n" if *role == Role::AttnV => self.asked.n_attn_v.into(),
            "n" if layered => facts.layers.into(),
            _ => match self.vars.iter().position(|(var, _)| *var == name) {
                // It knows the variables before it, and so never itself.
                Some(at) => self.vars[at].1.eval(&AskedScope { vars: &self.vars[..at], ..*self })?,
                None => {
                    return Err(Error::malformed(format!("{name} means nothing for {}", role.name())));
                }
            },
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_by_name() {
        for (name, role) in [
            ("blk.0.attn_qkv.weight", Role::AttnV),
            ("blk.0.attn_kv_b.weight", Role::AttnV),
            ("blk.0.attn_v_b.weight", Role::Other),
            ("blk.0.attn_k.bias", Role::Other),
            ("blk.0.ffn_gate_up_exps.weight", Role::FfnGate),
            ("blk.0.ffn_down_exps.weight", Role::FfnDown),
            ("output_norm.weight", Role::Other),
            ("per_layer_token_embd.weight", Role::TokenEmbd),
        ] {
            assert_eq!(Role::of(name), role, "{name}");
        }
    }

    #[test]
    fn layers_by_name() {
        for (name, layer) in [
            ("blk.12.attn_q.weight", Some(12)),
            ("blk.7", Some(7)),
            ("blk.-7.x", Some(-7)),
            ("blk.4294967297.x", Some(1)),
            ("blk.99999999999999999999.x", Some(-1)),
            ("blk.x", None),
            ("v.blk.0.x", None),
        ] {
            assert_eq!(layer_of(name), layer, "{name}");
        }
    }
}
