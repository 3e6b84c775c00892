//! `qconv pack`

use std::path::PathBuf;

use qconv::convert::{HfContainer, ImatrixChoice, ToHf, ToQpack, Wanted};
use qconv::error::{Error, Result};
use qconv::packed::write::{Format, QpackEncoding};
use regex::Regex;

use super::Status;
use super::common::{self, WriteArgs, parse_size};
use super::convert::{RoundingArgs, dtype_arg, finish};

/// Put a whole model into one .qpack file: its tensors, its other files, and where they come from
///
/// Without options of an encoding tensors stay what they are: codes and scales of quantized checkpoints go into
/// encodings of the file, and `qconv unpack` gives the same files back. With them the matrices of blocks are
/// quantized; codes that the source has already, and that are on the grid, are moved.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// A Hugging Face directory, quantized or not, a GGUF file, a file of weights, or a .qpack
    pub source: PathBuf,

    /// The file to write; by default beside the source, called after it
    #[arg(short, long)]
    pub output: Option<PathBuf>,

    /// Most bytes of tensors in a file; a larger model becomes a set of files
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_shard_size: Option<u64>,

    #[command(flatten)]
    pub encoding: EncodingArgs,

    #[command(flatten)]
    pub rounding: RoundingArgs,

    #[command(flatten)]
    pub write: WriteArgs,
}

/// How matrices are quantized, if at all.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Encoding of matrices")]
pub struct EncodingArgs {
    /// int (1 to 8 bits), ternary (five digits a byte), ternary-bits2, nf4, fp4, int8 (a scale for each row) or
    /// fp8 (blocks of 128 x 128)
    #[arg(long, value_parser = parse_encoding)]
    pub encoding: Option<QpackEncoding>,

    /// Bits of a code, 1 to 8
    #[arg(long, visible_alias = "w-bit", value_name = "N")]
    pub bits: Option<u32>,

    /// Columns that share a scale, any number, or -1 for whole rows; the last group of a row may be shorter
    #[arg(long, visible_alias = "q-group-size", value_name = "N", allow_negative_numbers = true)]
    pub group_size: Option<i64>,

    /// The middle code is zero
    #[arg(long, overrides_with = "asym")]
    pub sym: bool,

    /// Each group has its own zero
    #[arg(long, overrides_with = "sym")]
    pub asym: bool,

    /// Modules to leave as they are, beside embeddings, head, norms and routers; may be repeated
    #[arg(long, visible_alias = "modules-to-not-convert", value_name = "REGEX", value_parser = Regex::new)]
    pub ignore: Vec<Regex>,

    /// Type of the weights that are not quantized: f32, f16 or bf16
    #[arg(long)]
    pub dtype: Option<String>,

    /// Refuse what would lose anything
    #[arg(long)]
    pub exact_only: bool,
}

fn parse_encoding(text: &str) -> std::result::Result<QpackEncoding, String> {
    let found = QpackEncoding::NAMES.iter().find(|(name, _)| *name == text);
    let names = || QpackEncoding::NAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    found.map(|(_, encoding)| *encoding).ok_or_else(|| format!("known are {}", names()))
}

impl EncodingArgs {
    /// What is wanted; `None` where tensors stay what they are.
    ///
    /// # Errors
    /// `Misuse` for options that mean nothing so.
    fn wanted(&self, has_method: bool) -> Result<Option<Wanted>> {
        let given = self.bits.is_some() || self.group_size.is_some() || self.sym || self.asym;
        let encoding = match self.encoding {
            Some(encoding) => encoding,
            None if given || has_method => QpackEncoding::Integers,
            None => {
                let others = [
                    ("--ignore", !self.ignore.is_empty()),
                    ("--dtype", self.dtype.is_some()),
                    ("--exact-only", self.exact_only),
                ];
                return match others.iter().find(|(_, given)| *given) {
                    Some((option, _)) => Err(Error::misuse(format!(
                        "{option} means nothing without --encoding: tensors stay what they are"
                    ))),
                    None => Ok(None),
                };
            }
        };
        if encoding != QpackEncoding::Integers && (self.bits.is_some() || self.asym) {
            let option = if self.asym { "--asym" } else { "--bits" };
            return Err(Error::misuse(format!("{option} means nothing with --encoding {}", encoding.name())));
        }
        Ok(Some(Wanted {
            bits: self.bits,
            group_size: self.group_size,
            symmetric: if self.sym || self.asym { Some(self.sym) } else { None },
            ..Wanted::new(Format::Qpack(encoding))
        }))
    }
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let (method, imatrix) = (args.rounding.choice()?, args.rounding.imatrix.clone());
    let max_shard_size = args.max_shard_size.unwrap_or(u64::MAX);
    let Some(wanted) = args.encoding.wanted(method.is_some() || imatrix.is_some())? else {
        let job =
            ToQpack { output: args.output.clone(), max_shard_size, ..ToQpack::new(&args.source) }.plan()?;
        return common::finish(&job, &args.write);
    };
    let job = ToHf {
        method,
        imatrix: imatrix.map(|path| ImatrixChoice { path, include: Vec::new(), exclude: Vec::new() }),
        output: args.output.clone(),
        container: HfContainer::Qpack,
        wanted: Some(wanted),
        dtype: dtype_arg(args.encoding.dtype.as_deref())?,
        ignore: args.encoding.ignore.clone(),
        max_shard_size,
        measures: true,
        exact_only: args.encoding.exact_only,
        ..ToHf::new(&args.source, "")
    }
    .plan()?;
    finish(&job, &args.write)
}
