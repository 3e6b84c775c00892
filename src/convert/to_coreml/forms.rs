//! How each weight is encoded, by what it does in the model.

use super::profile::Profile;
use super::weights::Wish;
use crate::error::{Error, Result};

/// How matrices are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matrices {
    /// As float16.
    Float16,
    /// As integers of 4 or 8 bits with scales.
    Integers(u32),
    /// As indices of so many bits into tables of values.
    Palette(u32),
    /// As -1, 0 and 1 with a scale for each row.
    Ternary,
}

/// What shares a scale, or a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// A whole tensor: one table.
    Tensor,
    /// A row: one scale.
    Channel,
    /// So many columns of integers, or rows of a palette.
    Group(u64),
}

/// What is wished for.
#[derive(Clone, Debug)]
pub struct Forms {
    /// Matrices of layers.
    pub matrices: Matrices,
    /// What shares a scale or a table there; `None`: 32 columns of integers of 4 bits, a row of those of 8, 8 rows
    /// of a palette.
    pub granularity: Option<Granularity>,
    /// Bits of embeddings and head: a palette below 8, integers at 8, float16 at 16; `None`: by what `matrices` are.
    pub embedding_bits: Option<u32>,
    /// Whether ternary weights keep a bit for each element and another for each that is not zero.
    pub sparse: bool,
    /// Whether what does not fit into groups may have a scale for each row instead.
    pub allow_fallback: bool,
    /// Whether a palette is asked for as such, not only as a form of so many bits.
    pub must_be_palette: bool,
}

/// Bits of indices that Core ML has.
const PALETTES: [u32; 6] = [1, 2, 3, 4, 6, 8];
/// Columns that share a scale by default.
const COLUMNS: u64 = 32;
/// Rows that share a table by default.
const ROWS: u64 = 8;

impl Forms {
    /// Matrices so, and nothing else said.
    pub fn new(matrices: Matrices) -> Self {
        Self {
            matrices,
            granularity: None,
            embedding_bits: None,
            sparse: false,
            allow_fallback: false,
            must_be_palette: false,
        }
    }

    /// Whether that can be, on this profile.
    ///
    /// # Errors
    /// `Misuse` for bits that Core ML has not, and for options that contradict each other.
    pub fn check(&self, profile: Profile) -> Result<()> {
        let of_palette = |bits: u32| match PALETTES.contains(&bits) {
            true => Ok(()),
            false => Err(Error::misuse(format!("palettes of {bits} bits: Core ML has no such indices"))
                .hint("1, 2, 3, 4, 6 and 8 bits are possible")),
        };
        match self.matrices {
            Matrices::Palette(bits) => of_palette(bits)?,
            Matrices::Integers(4 | 8) | Matrices::Float16 | Matrices::Ternary => {}
            Matrices::Integers(bits) => {
                return Err(Error::misuse(format!("integers of {bits} bits: Core ML has 4 and 8")));
            }
        }
        match self.embedding_bits {
            None | Some(8 | 16) => {}
            Some(bits) => of_palette(bits)?,
        }
        let refused = |what: String| Err(Error::misuse(format!("--granularity: {what}")));
        match (self.granularity, self.matrices) {
            (None, _) => {}
            (Some(_), Matrices::Float16) => return refused("float16 shares nothing".into()),
            (Some(_), Matrices::Ternary) => {
                return refused("ternary weights have a scale for each row".into());
            }
            (Some(Granularity::Group(0)), _) => return refused("a group of 0".into()),
            (Some(Granularity::Tensor), Matrices::Integers(_)) => {
                return refused("integers have a scale for each row at least".into());
            }
            (Some(Granularity::Group(_)), Matrices::Integers(_)) if profile == Profile::Ane => {
                return refused("the Neural Engine has no scales of blocks within a row: channel".into());
            }
            (Some(_), _) => {}
        }
        if self.sparse && self.matrices != Matrices::Ternary {
            return Err(Error::misuse("--ternary-form means nothing without --bits ternary"));
        }
        let groups = match (self.matrices, self.granularity) {
            (Matrices::Integers(4), None) => profile == Profile::Gpu,
            (Matrices::Integers(_), Some(Granularity::Group(_))) => true,
            _ => false,
        };
        match self.allow_fallback && !groups {
            true => {
                Err(Error::misuse("--allow-fallback means nothing here: no columns share scales in groups"))
            }
            false => Ok(()),
        }
    }

    /// The option, if there is one, that says more of matrices than how many bits they have.
    pub fn exact_option(&self) -> Option<&'static str> {
        match (self.must_be_palette, self.granularity) {
            (true, _) => Some("--palettize"),
            (false, Some(_)) => Some("--granularity"),
            (false, None) => None,
        }
    }

    /// What it is called: `f16`, `int4`, `lut2`, `ternary`.
    pub fn name(&self) -> String {
        match self.matrices {
            Matrices::Float16 => "f16".into(),
            Matrices::Integers(bits) => format!("int{bits}"),
            Matrices::Palette(bits) => format!("lut{bits}"),
            Matrices::Ternary => "ternary".into(),
        }
    }

    /// How the tensor called so (by its GGUF name) is encoded, and why not as usual.
    ///
    /// # Errors
    /// `Unsupported` for columns that do not fit into groups, unless that is allowed.
    pub fn wish(&self, profile: Profile, name: &str, shape: &[u64]) -> Result<(Wish, Option<String>)> {
        let [.., rows, columns] = *shape else { return Ok((Wish::F16, None)) };
        match role(name) {
            Role::Other => Ok((Wish::F16, None)),
            Role::Embedding => Ok(palette_or_integers(self.of_embeddings(), None, rows)),
            Role::Matrix => match self.matrices {
                Matrices::Float16 => Ok((Wish::F16, None)),
                Matrices::Ternary => Ok((Wish::Ternary { sparse: self.sparse }, None)),
                Matrices::Palette(bits) => Ok(palette(bits, self.granularity, rows)),
                Matrices::Integers(bits) => self.integers(profile, bits, columns),
            },
        }
    }

    fn integers(&self, profile: Profile, bits: u32, columns: u64) -> Result<(Wish, Option<String>)> {
        let block = match (self.granularity, bits, profile) {
            (Some(Granularity::Group(n)), ..) => n,
            (None, 4, Profile::Gpu) => COLUMNS,
            _ => return Ok((Wish::Int { bits, block: None }, None)),
        };
        if columns.is_multiple_of(block) {
            return Ok((Wish::Int { bits, block: Some(block) }, None));
        }
        let why = format!("its {columns} columns are no multiple of {block}");
        match self.allow_fallback {
            true => Ok((Wish::Int { bits, block: None }, Some(format!("{why}: a scale for each row")))),
            false => Err(Error::unsupported(why).hint(
                "--allow-fallback gives such matrices a scale for each row; --granularity channel all",
            )),
        }
    }

    /// Bits of embeddings and head; 16 for float16.
    fn of_embeddings(&self) -> u32 {
        let by_matrices = match self.matrices {
            Matrices::Float16 => 16,
            Matrices::Integers(_) => 8,
            Matrices::Palette(1..=3) | Matrices::Ternary => 4,
            Matrices::Palette(4) => 6,
            Matrices::Palette(bits) => bits,
        };
        self.embedding_bits.unwrap_or(by_matrices)
    }
}

/// What a tensor does, as far as encodings go.
enum Role {
    /// Rows of the vocabulary.
    Embedding,
    /// What layers multiply with.
    Matrix,
    /// Norms, biases, routers, positions, sinks: small, or sensitive.
    Other,
}

/// Whether codes that the source has of such a tensor may stay: those of matrices and embeddings.
pub fn may_keep(name: &str) -> bool {
    !matches!(role(name), Role::Other)
}

/// Whether such a tensor is a matrix of a layer.
pub fn is_matrix(name: &str, shape: &[u64]) -> bool {
    shape.len() > 1 && matches!(role(name), Role::Matrix)
}

fn role(name: &str) -> Role {
    match name {
        "token_embd.weight" | "output.weight" => Role::Embedding,
        _ => {
            let of_layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
            let is_matrix = of_layer.is_some_and(|(_, role)| {
                role.ends_with(".weight") && !role.starts_with("ffn_gate_inp") && !role.contains("norm")
            });
            if is_matrix { Role::Matrix } else { Role::Other }
        }
    }
}

/// The form of embeddings: 8 bits are integers, which need no tables.
fn palette_or_integers(bits: u32, granularity: Option<Granularity>, rows: u64) -> (Wish, Option<String>) {
    match bits {
        16 => (Wish::F16, None),
        8 => (Wish::Int { bits: 8, block: None }, None),
        _ => palette(bits, granularity, rows),
    }
}

/// Tables for groups of rows: groups are equal, so that fewer rows may have to share one.
fn palette(bits: u32, granularity: Option<Granularity>, rows: u64) -> (Wish, Option<String>) {
    let wanted = match granularity {
        Some(Granularity::Tensor) => return (Wish::Lut { bits, rows: None }, None),
        Some(Granularity::Channel) => 1,
        Some(Granularity::Group(n)) => n,
        None => ROWS,
    };
    let each = (1..=wanted.min(rows)).rev().find(|n| rows.is_multiple_of(*n)).unwrap_or(1);
    let note = (each != wanted)
        .then(|| format!("its {rows} rows are no multiple of {wanted}: {each} share a table"));
    (Wish::Lut { bits, rows: Some(each) }, note)
}
