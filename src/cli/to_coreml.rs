//! `qconv hf-to-coreml` and `qconv gguf-to-coreml`

use std::path::{Path, PathBuf};

use qconv::container::gguf::is_gguf;
use qconv::convert::{Forms, Granularity, ImatrixChoice, Matrices, Profile, ToCoreml};
use qconv::error::{Error, Result};

use super::Status;
use super::common::{self, WriteArgs};

/// Turn a Hugging Face model into a Core ML package for Macs or iPhones
///
/// The package is an ML Program with a cache as its state. Tokenizer and config.json are put beside it. Nothing of it
/// needs a Mac; what only one can show (compilation, placement on the Neural Engine, speed) is not tested.
#[derive(clap::Args, Debug)]
pub struct HfArgs {
    /// The model's directory, or its weights file or index, or a .qpack file
    pub source: PathBuf,

    /// Take the model for this architecture, whatever config.json says
    #[arg(long)]
    pub arch: Option<String>,

    #[command(flatten)]
    pub package: PackageArgs,
}

/// Turn a GGUF file into a Core ML package for Macs or iPhones
///
/// As hf-to-coreml. Codes of Q4_0, Q8_0 and the ternary types go in as they are where --bits leaves room for them;
/// others are decoded and rounded again.
#[derive(clap::Args, Debug)]
pub struct GgufArgs {
    /// The GGUF file (of a split one, any shard), or a .qpack file that was made of one
    pub source: PathBuf,

    #[command(flatten)]
    pub package: PackageArgs,
}

/// What a package is to be like.
#[derive(clap::Args, Debug)]
pub struct PackageArgs {
    /// The package to write, X.mlpackage, or a directory for it; by default beside the source. A model in several
    /// packages becomes a directory X
    #[arg(short, long)]
    pub output: Option<PathBuf>,

    /// gpu (Macs: any lengths, the interface of swift-transformers) or ane (the Neural Engine: fixed shapes, functions
    /// infer and prefill)
    #[arg(long, default_value = "gpu", value_parser = parse_profile)]
    pub profile: Profile,

    /// Tokens that the cache holds; by default 2048, or as many as the model was trained on
    #[arg(long, value_name = "N")]
    pub context: Option<u64>,

    /// With --profile ane, a larger model becomes several packages, each below; 950M by default
    #[arg(long, value_name = "SIZE", value_parser = common::parse_size)]
    pub chunk_size: Option<u64>,

    /// With --profile ane, write what does not fit a phone, or would be slow there
    #[arg(long)]
    pub allow_unfit: bool,

    /// The repository that programs fetch the tokenizer from; by default what config.json says
    #[arg(long, value_name = "OWNER/NAME")]
    pub model_id: Option<String>,

    /// Take the definition of the architecture from this file (CONTRIBUTING.md describes it)
    #[arg(long, value_name = "FILE")]
    pub arch_file: Option<PathBuf>,

    #[command(flatten)]
    pub weights: WeightArgs,

    #[command(flatten)]
    pub write: WriteArgs,
}

/// How weights are encoded.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Weights")]
pub struct WeightArgs {
    /// Bits of the matrices of layers: 8 (integers), 4 (integers for gpu, a palette for ane), 2 (a palette) or
    /// ternary; by default float16
    #[arg(long, value_name = "2|4|8|ternary", value_parser = parse_bits, conflicts_with = "palettize")]
    pub bits: Option<Bits>,

    /// A palette of so many bits: 1, 2, 3, 4, 6 or 8
    #[arg(long, value_name = "BITS")]
    pub palettize: Option<u32>,

    /// What shares a table or a scale: tensor (one table), channel (a row) or group:N (N rows of a palette, N columns
    /// of integers); by default 8 rows, or 32 columns of integers of 4 bits, or a row of 8
    #[arg(long, value_parser = parse_granularity)]
    pub granularity: Option<Granularity>,

    /// Bits of embeddings and head: 8 (integers), 16 (float16), or a palette; by default more than those of the
    /// matrices
    #[arg(long, value_name = "BITS")]
    pub embedding_bits: Option<u32>,

    /// How ternary weights lie: dense (2 bits, the default), or sparse (a bit for each, and one for each that is not
    /// zero)
    #[arg(long, value_name = "FORM", value_parser = ["dense", "sparse"])]
    pub ternary_form: Option<String>,

    /// Weigh errors by this importance matrix (GGUF, or the older .dat)
    #[arg(long, value_name = "FILE")]
    pub imatrix: Option<PathBuf>,

    /// Give matrices whose columns do not fill groups a scale for each row
    #[arg(long)]
    pub allow_fallback: bool,
}

/// What `--bits` says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bits {
    Two,
    Four,
    Eight,
    Ternary,
}

fn parse_bits(text: &str) -> std::result::Result<Bits, String> {
    match text {
        "2" => Ok(Bits::Two),
        "4" => Ok(Bits::Four),
        "8" => Ok(Bits::Eight),
        "ternary" => Ok(Bits::Ternary),
        _ => Err("2, 4, 8 and ternary are possible; --palettize has 1, 3 and 6".into()),
    }
}

fn parse_profile(text: &str) -> std::result::Result<Profile, String> {
    let known = [Profile::Gpu, Profile::Ane];
    known.into_iter().find(|p| p.name() == text).ok_or_else(|| "known are gpu and ane".into())
}

fn parse_granularity(text: &str) -> std::result::Result<Granularity, String> {
    let group = |n: &str| n.parse().ok().filter(|n| *n > 0).map(Granularity::Group);
    match text {
        "tensor" => Ok(Granularity::Tensor),
        "channel" => Ok(Granularity::Channel),
        _ => text.strip_prefix("group:").and_then(group).ok_or_else(|| "tensor, channel or group:N".into()),
    }
}

impl WeightArgs {
    fn forms(&self, profile: Profile) -> Forms {
        let matrices = match (self.palettize, self.bits) {
            (Some(bits), _) => Matrices::Palette(bits),
            (None, None) => Matrices::Float16,
            (None, Some(Bits::Eight)) => Matrices::Integers(8),
            (None, Some(Bits::Four)) if profile == Profile::Gpu => Matrices::Integers(4),
            (None, Some(Bits::Four)) => Matrices::Palette(4),
            (None, Some(Bits::Two)) => Matrices::Palette(2),
            (None, Some(Bits::Ternary)) => Matrices::Ternary,
        };
        Forms {
            granularity: self.granularity,
            embedding_bits: self.embedding_bits,
            sparse: self.ternary_form.as_deref() == Some("sparse"),
            allow_fallback: self.allow_fallback,
            must_be_palette: self.palettize.is_some(),
            ..Forms::new(matrices)
        }
    }
}

impl PackageArgs {
    fn run(&self, source: &Path, arch: Option<&str>) -> anyhow::Result<Status> {
        let imatrix =
            |path: &PathBuf| ImatrixChoice { path: path.clone(), include: Vec::new(), exclude: Vec::new() };
        self.check()?;
        let conversion = ToCoreml {
            output: self.output.clone(),
            profile: self.profile,
            forms: self.weights.forms(self.profile),
            context: self.context,
            allow_unfit: self.allow_unfit,
            imatrix: self.weights.imatrix.as_ref().map(imatrix),
            model_id: self.model_id.clone(),
            arch: arch.map(String::from),
            arch_file: self.arch_file.clone(),
            ..ToCoreml::new(source)
        };
        let chunk_size = self.chunk_size.unwrap_or(conversion.chunk_size);
        let conversion = ToCoreml { chunk_size, ..conversion };
        common::finish(&conversion.plan()?, &self.write)
    }

    /// That every option says something.
    fn check(&self) -> Result<()> {
        let is_ane = self.profile == Profile::Ane;
        let is_ternary = self.weights.bits == Some(Bits::Ternary);
        let idle = [
            (self.chunk_size.is_some() && !is_ane, "--chunk-size means nothing without --profile ane"),
            (self.allow_unfit && !is_ane, "--allow-unfit means nothing without --profile ane"),
            (
                self.weights.ternary_form.is_some() && !is_ternary,
                "--ternary-form means nothing without --bits ternary",
            ),
        ];
        idle.iter().find(|(is_so, _)| *is_so).map_or(Ok(()), |(_, why)| Err(Error::misuse(*why)))
    }
}

pub fn from_hf(args: &HfArgs) -> anyhow::Result<Status> {
    if is_file_of_gguf(&args.source)? {
        return Err(Error::unsupported("is a GGUF file")
            .at(&args.source)
            .hint("gguf-to-coreml takes it")
            .into());
    }
    args.package.run(&args.source, args.arch.as_deref())
}

pub fn from_gguf(args: &GgufArgs) -> anyhow::Result<Status> {
    if !is_file_of_gguf(&args.source)? {
        return Err(Error::unsupported("is no GGUF file")
            .at(&args.source)
            .hint("hf-to-coreml takes others")
            .into());
    }
    args.package.run(&args.source, None)
}

fn is_file_of_gguf(path: &Path) -> Result<bool> {
    Ok(path.is_file() && is_gguf(path)?)
}
