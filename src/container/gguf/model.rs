//! What a file must hold to be used as a model. Inspection does without.

use crate::error::{Error, Result};

use super::read::Gguf;
use super::value::{Value, ValueType};

impl Gguf {
    /// Checks that the metadata every consumer relies on are there, have the right types and
    /// agree with each other, so that later code may believe them.
    ///
    /// # Errors
    /// `Malformed`, naming the key.
    pub fn check_model(&self) -> Result<()> {
        let path = self.store.files().first().map(|f| f.path().to_path_buf());
        self.check_hyperparameters().and_then(|()| self.check_tokenizer()).map_err(|e| match path {
            Some(path) => e.at(path),
            None => e,
        })
    }

    fn check_hyperparameters(&self) -> Result<()> {
        const ARCHITECTURE: &str = "general.architecture";
        let arch = match self.metadata.get(ARCHITECTURE) {
            None => {
                return Err(Error::malformed(format!("is no model: it has no {ARCHITECTURE}")));
            }
            Some(v) => v.as_str().filter(|s| !s.is_empty()).ok_or_else(|| {
                Error::malformed(format!("{ARCHITECTURE} is {v}, not the name of an architecture"))
            })?,
        };
        for (key, value) in self.metadata.iter() {
            let Some(short) = key.strip_prefix(arch).and_then(|k| k.strip_prefix('.')) else { continue };
            let wrong = |what: String| Err(Error::malformed(format!("{key} {what}")));
            match (short, value) {
                (_, Value::F32(v)) if v.is_nan() => return wrong("is not a number".into()),
                (_, Value::F64(v)) if v.is_nan() => return wrong("is not a number".into()),
                ("block_count", v) => {
                    let blocks = v.as_u64();
                    let tensors = self.store.tensors().len() as u64;
                    if blocks.is_none() || tensors > 0 && blocks > Some(tensors) {
                        return wrong(format!("is {v}; the file has {tensors} tensors"));
                    }
                }
                // Models without attention (Mamba) have 0 heads.
                ("attention.head_count", v) if !matches!(v, Value::Array(_)) && v.as_u64().is_none() => {
                    return wrong(format!("is {v}, not a count"));
                }
                ("embedding_length", v) if v.as_u64().unwrap_or(0) == 0 => {
                    return wrong(format!("is {v}, not a count above 0"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check_tokenizer(&self) -> Result<()> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        let array = |key: &str, types: &[ValueType]| -> Result<Option<usize>> {
            match self.metadata.get(key) {
                None => Ok(None),
                Some(Value::Array(a)) if types.contains(&a.element_type()) => Ok(Some(a.len())),
                Some(Value::Array(a)) => Err(Error::malformed(format!(
                    "{key} is an array of {}, not of {}",
                    a.element_type().name(),
                    types.first().map_or("", |t| t.name())
                ))),
                Some(v) => Err(Error::malformed(format!("{key} is {}, not an array", v.value_type().name()))),
            }
        };
        let tokens = array(TOKENS, &[ValueType::String])?;
        array("tokenizer.ggml.merges", &[ValueType::String])?;
        for (key, types) in [
            ("tokenizer.ggml.scores", &[ValueType::F32][..]),
            ("tokenizer.ggml.token_type", &[ValueType::I32, ValueType::U32]),
        ] {
            let found = array(key, types)?;
            if let (Some(found), Some(tokens)) = (found, tokens)
                && found != tokens
            {
                return Err(Error::malformed(format!("{key} has {found} entries for {tokens} tokens")));
            }
        }
        Ok(())
    }
}
