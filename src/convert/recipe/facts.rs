//! What recipes ask about a model.

use crate::container::gguf::{Metadata, Value};
use crate::error::{Error, Result};

/// Facts about a model that its file type may depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelFacts {
    /// `general.architecture`.
    pub arch: String,
    /// Layers, those that predict further tokens included.
    pub layers: u32,
    /// Layers without those that predict further tokens.
    pub main_layers: u32,
    /// Attention heads of the first layer.
    pub heads: u32,
    /// Key/value heads of the first layer.
    pub kv_heads: u32,
    /// Experts; 0 in a dense model.
    pub experts: u32,
}

impl ModelFacts {
    /// From the metadata of a GGUF file.
    ///
    /// Where layers were removed, from the metadata before that: llama.cpp counts so.
    ///
    /// # Errors
    /// `Malformed` for a number of layers that is missing, and for what is no count.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self> {
        let arch = metadata
            .str("general.architecture")
            .ok_or_else(|| Error::malformed("general.architecture is missing or no string"))?;
        let count = |key: &str| match metadata.get(&format!("{arch}.{key}")) {
            None => Ok(None),
            Some(value) => first(value)
                .map(Some)
                .ok_or_else(|| Error::malformed(format!("{arch}.{key} is {value}, not a count"))),
        };
        // Encoders of images and sound have no layers of this kind, and nothing that counts them.
        let blocks = match count("block_count")? {
            None if arch != "clip" => {
                return Err(Error::malformed(format!("{arch}.block_count is missing")));
            }
            blocks => blocks.unwrap_or(0),
        };
        let main_layers =
            blocks.checked_sub(count("nextn_predict_layers")?.unwrap_or(0)).ok_or_else(|| {
                Error::malformed(format!("{arch}.nextn_predict_layers is more than the {blocks} layers"))
            })?;
        // Layers that llama.cpp adds when it loads the model: repetitions, and one that routes.
        let layers = match arch {
            "nanbeige" => blocks.checked_mul(count("num_loops")?.unwrap_or(1).max(1)),
            "graniteswitch" => blocks.checked_add(1),
            _ => Some(blocks),
        }
        .ok_or_else(|| Error::malformed(format!("{arch} has too many layers")))?;
        let heads = count("attention.head_count")?.unwrap_or(0);
        Ok(Self {
            arch: arch.to_owned(),
            layers,
            main_layers,
            heads,
            kv_heads: count("attention.head_count_kv")?.unwrap_or(heads),
            experts: count("expert_count")?.unwrap_or(0),
        })
    }

    /// Attention heads that share a key/value head; 0 without attention.
    pub fn gqa(&self) -> u32 {
        self.heads.checked_div(self.kv_heads).unwrap_or(0)
    }
}

/// The number, or the first layer's.
fn first(value: &Value) -> Option<u32> {
    let number = match value {
        Value::Array(list) => list.get(0)?.as_u64(),
        value => value.as_u64(),
    };
    u32::try_from(number?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::gguf::Array;
    use crate::error::ErrorKind;

    fn metadata(entries: &[(&str, Value)]) -> Metadata {
        let mut m = Metadata::default();
        m.set("general.architecture", "llama");
        for (key, value) in entries {
            m.set(format!("llama.{key}"), value.clone());
        }
        m
    }

    #[test]
    fn counts_and_lists_of_counts() {
        let facts = ModelFacts::from_metadata(&metadata(&[
            ("block_count", Value::U64(33)),
            ("nextn_predict_layers", Value::U8(1)),
            ("attention.head_count", Value::Array(Array::I32(vec![32, 16]))),
            ("attention.head_count_kv", Value::U32(8)),
        ]))
        .unwrap();
        assert_eq!((facts.layers, facts.main_layers, facts.gqa(), facts.experts), (33, 32, 4, 0));
        let facts = ModelFacts::from_metadata(&metadata(&[("block_count", Value::U32(2))])).unwrap();
        assert_eq!(facts.gqa(), 0);
    }

    #[test]
    fn what_is_no_count_is_refused() {
        let blocks = ("block_count", Value::U32(2));
        for entries in [
            vec![],
            vec![("block_count", Value::I32(-1))],
            vec![("block_count", Value::U64(1 << 40))],
            vec![("block_count", Value::from("2"))],
            vec![blocks.clone(), ("nextn_predict_layers", Value::U32(3))],
            vec![blocks.clone(), ("attention.head_count", Value::Array(Array::I32(vec![])))],
            vec![blocks.clone(), ("attention.head_count_kv", Value::Array(Array::I32(vec![-4])))],
            vec![blocks, ("expert_count", Value::F32(8.0))],
        ] {
            let error = ModelFacts::from_metadata(&metadata(&entries)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Malformed, "{entries:?}");
        }
        assert!(ModelFacts::from_metadata(&Metadata::default()).is_err());
    }
}
