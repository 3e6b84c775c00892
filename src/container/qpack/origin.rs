//! The tensors that an encoded one was made of, as the manifest notes them.

use serde_json::{Value as Json, json};

use super::fields::{Fields, dtype};
use super::json::Kept;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// How the tensors of another format come back.
#[derive(Clone, Debug, PartialEq)]
pub struct Origin {
    /// How that format lays them out.
    pub layout: String,
    /// The tensors, in the order of the source.
    pub parts: Vec<Source>,
}

/// A tensor of another format.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// Its name.
    pub name: String,
    /// Its type.
    pub dtype: DType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// The part that it is made of, or what it follows from.
    pub from: String,
}

impl Origin {
    /// What a tensor notes.
    ///
    /// # Errors
    /// `Malformed` where it is no such note.
    pub fn of(tensor: &super::Tensor) -> Result<Option<Self>> {
        let read = |kept: &Kept| {
            Self::parse(&kept.value()).map_err(|e| e.context(format_args!("tensor {:?}", tensor.name)))
        };
        tensor.origin.as_ref().map(read).transpose()
    }

    fn parse(value: &Json) -> Result<Self> {
        let mut fields = Fields::of(value, "origin")?;
        let source = |value: &Json| {
            let mut fields = Fields::of(value, "a part of origin")?;
            let (name, kind) = (fields.text("name")?.to_string(), fields.text("type")?);
            let dtype = dtype(kind).ok_or_else(|| fields.wrong("type", &kind.into()))?;
            let shape = fields.numbers("shape")?;
            dtype.nbytes(&shape).map_err(|e| e.context(&name))?;
            Ok(Source { name, dtype, shape, from: fields.text("from")?.to_string() })
        };
        let parts = fields.list("parts")?.iter().map(source).collect::<Result<Vec<_>>>()?;
        match parts.is_empty() {
            true => Err(Error::malformed("origin names no tensors")),
            false => Ok(Self { layout: fields.text("layout")?.to_string(), parts }),
        }
    }

    /// For the manifest.
    pub fn json(&self) -> Json {
        let part =
            |s: &Source| json!({"name": s.name, "type": s.dtype.name(), "shape": s.shape, "from": s.from});
        json!({"layout": self.layout, "parts": self.parts.iter().map(part).collect::<Vec<_>>()})
    }
}
