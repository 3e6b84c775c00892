//! Which weights go into which package, where one would be too large.

use crate::error::{Error, Result};
use crate::mil::Part;

/// What a weight is a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The beginning: embeddings of tokens, and of positions.
    Embedding,
    /// A layer.
    Layer(usize),
    /// All layers that turn queries and keys by this table.
    Table(usize),
    /// The end: the last norm, and the head.
    Head,
}

impl At {
    /// By the GGUF name.
    pub fn of(name: &str) -> Self {
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')?.0.parse().ok());
        match layer {
            Some(layer) => Self::Layer(layer),
            None if name.starts_with("output") => Self::Head,
            None => Self::Embedding,
        }
    }

    /// Whether a weight there is needed for `part`; `tables` are those of each layer.
    pub fn is_in(self, part: &Part, tables: &[usize]) -> bool {
        match (self, part) {
            (_, Part::Whole) | (Self::Embedding, Part::Embedding) | (Self::Head, Part::Head) => true,
            (Self::Layer(layer), Part::Layers(layers)) => layers.contains(&layer),
            (Self::Table(table), Part::Layers(layers)) => {
                tables.get(layers.clone()).is_some_and(|of| of.contains(&table))
            }
            _ => false,
        }
    }
}

/// Divides a model into packages below `most` bytes: one, or one of embeddings, some of layers, and one of the head.
/// `bytes` gives those of the package of a part.
///
/// # Errors
/// `Misuse` for a part that is too large by itself; those of `bytes`.
pub fn divide(layers: usize, most: u64, bytes: &dyn Fn(&Part) -> Result<u64>) -> Result<Vec<Part>> {
    let fits = |part: &Part| Ok(bytes(part)? < most);
    if fits(&Part::Whole)? {
        return Ok(vec![Part::Whole]);
    }
    let check = |part: Part, what: &str| match bytes(&part)? {
        n if n < most => Ok(part),
        n => Err(Error::misuse(format!("--chunk-size {most}: {what} alone takes {n} bytes"))
            .hint("fewer --bits make it smaller, for embeddings and head --embedding-bits")),
    };
    let mut parts = vec![check(Part::Embedding, "the embedding")?];
    let mut first = 0;
    while first < layers {
        let mut end = first + 1;
        check(Part::Layers(first..end), &format!("layer {first}"))?;
        while end < layers && fits(&Part::Layers(first..end + 1))? {
            end += 1;
        }
        parts.push(Part::Layers(first..end));
        first = end;
    }
    parts.push(check(Part::Head, "the head")?);
    Ok(parts)
}

/// What the package of a part is called, among `count`: `chunk_02_layers_0_7.mlpackage`.
pub fn name(number: usize, part: &Part) -> String {
    let what = match part {
        Part::Whole => "model".to_string(),
        Part::Embedding => "embedding".into(),
        Part::Layers(layers) => format!("layers_{}_{}", layers.start, layers.end.saturating_sub(1)),
        Part::Head => "head".into(),
    };
    format!("chunk_{:02}_{what}.mlpackage", number + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// A model of six layers of 10 MB, embeddings of 25 and a head of 15.
    fn bytes(part: &Part) -> Result<u64> {
        Ok(match part {
            Part::Whole => 100 * MB,
            Part::Embedding => 25 * MB,
            Part::Layers(layers) => 10 * MB * layers.len() as u64,
            Part::Head => 15 * MB,
        })
    }

    #[test]
    fn as_few_as_fit() {
        let divided =
            |most| divide(6, most, &bytes).unwrap().iter().map(|p| format!("{p:?}")).collect::<Vec<_>>();
        assert_eq!(divided(100 * MB + 1), ["Whole"]);
        assert_eq!(divided(100 * MB), ["Embedding", "Layers(0..6)", "Head"]);
        assert_eq!(divided(40 * MB + 1), ["Embedding", "Layers(0..4)", "Layers(4..6)", "Head"]);
        let e = divide(6, 25 * MB, &bytes).unwrap_err();
        assert!(e.to_string().contains("the embedding alone takes 25000000 bytes"), "{e}");
    }

    #[test]
    fn weights_have_places() {
        assert_eq!(At::of("blk.12.attn_q.weight"), At::Layer(12));
        assert_eq!(
            (At::of("token_embd.weight"), At::of("position_embd.weight")),
            (At::Embedding, At::Embedding)
        );
        assert_eq!((At::of("output_norm.weight"), At::of("output.3.weight")), (At::Head, At::Head));
        let tables = [0, 1, 0];
        assert!(At::Table(1).is_in(&Part::Layers(1..3), &tables));
        assert!(!At::Table(1).is_in(&Part::Layers(2..3), &tables));
        assert!(At::Table(1).is_in(&Part::Whole, &tables) && !At::Table(1).is_in(&Part::Head, &tables));
    }

    #[test]
    fn chunks_have_names() {
        assert_eq!(name(1, &Part::Layers(0..8)), "chunk_02_layers_0_7.mlpackage");
    }
}
