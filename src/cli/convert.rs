//! `qconv convert`

use std::path::PathBuf;

use qconv::convert::{
    HfContainer, ImatrixChoice, Job, MethodChoice, Outcome, ToHf, ToQpack, Wanted, parse_method,
    parse_tensor_method,
};
use qconv::error::{Error, Result};
use qconv::packed::write::{CompressedFormat, Format};
use qconv::plain;
use qconv::quantize::Tuning;
use qconv::tensor::DType;
use regex::Regex;
use serde_json::{Value as Json, json};

use super::Status;
use super::common::{self, WriteArgs};
use super::quantizer::{parse_count, parse_damp};
use super::ui;

/// Write a checkpoint for transformers and vLLM, quantized or not, from any source
///
/// Where the codes and scales of the source are on the grid of the output, they are moved, and nothing is
/// rounded; the summary says so for each tensor.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// A Hugging Face directory, quantized or not, a GGUF file, or a .qpack file
    pub source: PathBuf,

    /// The directory to write; by default beside the source, called MODEL-FORMAT-w4-g128
    #[arg(short, long)]
    pub output: Option<PathBuf>,

    /// gptq, awq, bnb-nf4 (bnb_4bit), bnb-fp4, bnb-int8 (bnb_8bit), compressed-tensors, fp8, mxfp4;
    /// safetensors and pytorch, which are not quantized; or qpack, which takes tensors as they are
    #[arg(long, value_name = "FORMAT", value_parser = parse_to)]
    pub to: To,

    /// Type of the weights that are not quantized: f32, f16 or bf16
    #[arg(long)]
    pub dtype: Option<String>,

    /// Modules to leave as they are, beside embeddings, head, norms and routers; may be repeated
    #[arg(long, visible_alias = "modules-to-not-convert", value_name = "REGEX", value_parser = Regex::new)]
    pub ignore: Vec<Regex>,

    /// Largest weights file
    #[arg(long, value_name = "SIZE", default_value = "5G", value_parser = common::parse_size)]
    pub max_shard_size: u64,

    /// Refuse what would lose anything
    #[arg(long)]
    pub exact_only: bool,

    #[command(flatten)]
    pub grid: GridArgs,

    #[command(flatten)]
    pub rounding: RoundingArgs,

    /// Take the definition of the architecture from this file (CONTRIBUTING.md describes it)
    #[arg(long, value_name = "FILE")]
    pub arch_file: Option<PathBuf>,

    #[command(flatten)]
    pub write: WriteArgs,
}

/// What can be chosen of integer codes.
#[derive(clap::Args, Debug)]
pub struct CodeArgs {
    /// Bits of a code
    #[arg(long, visible_alias = "w-bit", value_name = "N")]
    pub bits: Option<u32>,

    /// Columns that share a scale: 32, 64, 128 ... (in .qpack any number), or -1 for whole rows
    #[arg(long, visible_alias = "q-group-size", value_name = "N", allow_negative_numbers = true)]
    pub group_size: Option<i64>,

    /// The middle code is zero
    #[arg(long, overrides_with = "asym")]
    pub sym: bool,

    /// Each group has its own zero
    #[arg(long, overrides_with = "sym")]
    pub asym: bool,
}

impl CodeArgs {
    /// Options that were given.
    pub fn given(&self) -> impl Iterator<Item = &'static str> {
        let each = [
            self.bits.map(|_| "--bits"),
            self.group_size.map(|_| "--group-size"),
            self.sym.then_some("--sym"),
            self.asym.then_some("--asym"),
        ];
        each.into_iter().flatten()
    }

    /// What is wanted of a format's codes.
    pub fn wanted(&self, format: Format) -> Wanted {
        let symmetric = if self.sym || self.asym { Some(self.sym) } else { None };
        Wanted { bits: self.bits, group_size: self.group_size, symmetric, ..Wanted::new(format) }
    }
}

/// What can be chosen of a quantized format. By default it is as in the source, where that is quantized.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Format")]
pub struct GridArgs {
    #[command(flatten)]
    pub codes: CodeArgs,

    /// Say in config.json that columns were rounded in the order of their activations; groups stay where
    /// they are (static_groups)
    #[arg(long)]
    pub desc_act: bool,

    /// gptq, which stores zeros less 1, or gptq_v2; by default the second where zeros differ
    #[arg(long, value_name = "FORMAT", value_parser = ["gptq", "gptq_v2"])]
    pub checkpoint_format: Option<String>,

    /// Of compressed-tensors: pack-quantized (the default), naive-quantized (bytes), int-quantized and
    /// float-quantized (activations are quantized too)
    #[arg(long, value_name = "FORMAT", value_parser = parse_compressed)]
    pub compressed_format: Option<CompressedFormat>,

    /// Quantize the scales of bitsandbytes' 4 bits as well
    #[arg(long)]
    pub double_quant: bool,
}

/// How weights become integers.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Rounding")]
pub struct RoundingArgs {
    /// Of gptq, awq and compressed-tensors: rtn (the next code), imatrix (weighed by --imatrix, or by the
    /// diagonal of --moments), gptq, trainable or adaround, which need --moments
    #[arg(long, value_name = "METHOD")]
    pub method: Option<String>,

    /// Method for the tensors whose name matches, such as down_proj=gptq; the first that matches counts
    #[arg(long, value_name = "REGEX=METHOD")]
    pub tensor_method: Vec<String>,

    /// Second moments of the inputs, as qconv calibrate writes them
    #[arg(long, value_name = "FILE")]
    pub moments: Option<PathBuf>,

    /// Weigh errors by this importance matrix (GGUF, or the older .dat)
    #[arg(long, value_name = "FILE")]
    pub imatrix: Option<PathBuf>,

    /// Damping: what is added to the diagonal of the second moments, in parts of its mean (0.01 unless given)
    #[arg(long, value_name = "PART", value_parser = parse_damp)]
    pub damp_percent: Option<f64>,

    /// Rounds of trainable, steps of adaround; at most
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub iters: Option<usize>,
}

impl RoundingArgs {
    /// # Errors
    /// `Misuse` for unknown methods, and for options that mean nothing to those that are given.
    pub fn choice(&self) -> Result<Option<MethodChoice>> {
        let tensors = self.tensor_method.iter().map(|e| parse_tensor_method(e));
        let by_tensor = tensors.collect::<Result<Vec<_>>>()?;
        let (fold, others) = match self.method.as_deref().map(parse_method).transpose()? {
            Some((fold, way)) => (fold, Some(way)),
            None => (None, None),
        };
        let choice = MethodChoice {
            fold,
            by_tensor,
            others,
            moments: self.moments.clone(),
            ..MethodChoice::default()
        };
        let tuning = Tuning { damp: self.damp_percent, iters: self.iters, ..Tuning::default() };
        let choice = choice.tuned(&tuning)?;
        match (choice.is_empty(), &self.moments) {
            (true, Some(_)) => Err(Error::misuse("--moments has no effect without a method")
                .hint("--method gptq makes the most of them, --method imatrix takes their diagonal")),
            (true, None) => Ok(None),
            (false, _) => Ok(Some(choice)),
        }
    }
}

/// What `--to` says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum To {
    Safetensors,
    Pytorch,
    Qpack,
    Packed(Format),
}

/// Names that people know from elsewhere.
const ALIASES: [(&str, Format); 6] = [
    ("bnb_4bit", Format::BnbNf4),
    ("bnb_8bit", Format::BnbInt8),
    ("nf4", Format::BnbNf4),
    ("fp4", Format::BnbFp4),
    ("int8", Format::BnbInt8),
    ("compressed_tensors", Format::Compressed(CompressedFormat::Pack)),
];

pub fn parse_to(text: &str) -> std::result::Result<To, String> {
    let packed = Format::NAMES.iter().chain(&ALIASES).find(|(name, _)| *name == text);
    match (text, packed) {
        ("safetensors" | "hf", _) => Ok(To::Safetensors),
        ("pytorch", _) => Ok(To::Pytorch),
        ("qpack", _) => Ok(To::Qpack),
        (_, Some((_, format))) => Ok(To::Packed(*format)),
        ("gguf", _) => Err("GGUF is written by hf-to-gguf and quantize".into()),
        _ => {
            let names: Vec<_> = Format::NAMES.iter().map(|(name, _)| *name).collect();
            Err(format!("known are {}, safetensors, pytorch and qpack", names.join(", ")))
        }
    }
}

fn parse_compressed(text: &str) -> std::result::Result<CompressedFormat, String> {
    let names: Vec<_> = CompressedFormat::NAMES.iter().map(|(name, _)| *name).collect();
    let found = CompressedFormat::NAMES.iter().find(|(name, _)| *name == text);
    found.map(|(_, format)| *format).ok_or_else(|| format!("known are {}", names.join(", ")))
}

/// What `--dtype` says.
pub fn dtype_arg(text: Option<&str>) -> Result<Option<DType>> {
    let parse = |name: &str| {
        DType::from_name(name)
            .ok_or_else(|| Error::misuse(format!("{name:?} is no type; f32, f16 and bf16 are")))
    };
    text.map(parse).transpose()
}

impl GridArgs {
    /// Options that were given.
    fn given(&self) -> Vec<&'static str> {
        let each = [
            self.desc_act.then_some("--desc-act"),
            self.checkpoint_format.as_ref().map(|_| "--checkpoint-format"),
            self.compressed_format.map(|_| "--compressed-format"),
            self.double_quant.then_some("--double-quant"),
        ];
        self.codes.given().chain(each.into_iter().flatten()).collect()
    }

    /// # Errors
    /// `Misuse` for an option that means nothing with this format.
    fn wanted(&self, mut format: Format) -> Result<Wanted> {
        if let (Format::Compressed(own), Some(given)) = (&mut format, self.compressed_format) {
            *own = given;
        }
        let heeded: &[&str] = match format {
            Format::Gptq => {
                &["--bits", "--group-size", "--sym", "--asym", "--desc-act", "--checkpoint-format"]
            }
            Format::Awq => &["--bits", "--group-size", "--sym", "--asym"],
            Format::Compressed(CompressedFormat::Float) => &["--compressed-format"],
            Format::Compressed(_) => &["--bits", "--group-size", "--sym", "--asym", "--compressed-format"],
            Format::BnbNf4 | Format::BnbFp4 => &["--double-quant"],
            Format::BnbInt8 | Format::Fp8 | Format::Mxfp4 | Format::Qpack(_) => &[],
        };
        if let Some(option) = self.given().iter().find(|option| !heeded.contains(option)) {
            let name = match format {
                Format::Compressed(own) => own.name(),
                other => other.name(),
            };
            return Err(Error::misuse(format!("{option} means nothing with --to {name}")));
        }
        Ok(Wanted {
            desc_act: self.desc_act,
            second_version: self.checkpoint_format.as_ref().map(|f| f == "gptq_v2"),
            double_quant: self.double_quant,
            ..self.codes.wanted(format)
        })
    }
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let wanted = match args.to {
        To::Packed(format) => Some(args.grid.wanted(format)?),
        To::Safetensors | To::Pytorch | To::Qpack => {
            if let Some(option) = args.grid.given().first() {
                return Err(Error::misuse(format!(
                    "{option} means nothing for weights that are not quantized"
                ))
                .into());
            }
            None
        }
    };
    let (method, imatrix) = (args.rounding.choice()?, args.rounding.imatrix.clone());
    if wanted.is_none() && (method.is_some() || imatrix.is_some()) {
        return Err(Error::misuse("a method means nothing for weights that are not quantized").into());
    }
    if args.to == To::Qpack {
        if args.dtype.is_some() || !args.ignore.is_empty() || args.arch_file.is_some() {
            let why = "--to qpack takes tensors as they are: --dtype, --ignore and --arch-file mean nothing";
            return Err(Error::misuse(why).hint("qconv pack --encoding quantizes").into());
        }
        let output = args.output.clone();
        return common::finish(&ToQpack { output, ..ToQpack::new(&args.source) }.plan()?, &args.write);
    }
    let job = ToHf {
        method,
        imatrix: imatrix.map(|path| ImatrixChoice { path, include: Vec::new(), exclude: Vec::new() }),
        output: args.output.clone(),
        container: if args.to == To::Pytorch { HfContainer::Pytorch } else { HfContainer::Safetensors },
        wanted,
        dtype: dtype_arg(args.dtype.as_deref())?,
        ignore: args.ignore.clone(),
        max_shard_size: args.max_shard_size,
        measures: true,
        exact_only: args.exact_only,
        arch_file: args.arch_file.clone(),
        ..ToHf::new(&args.source, "")
    }
    .plan()?;
    finish(&job, &args.write)
}

/// Runs a planned job, and sums it up with what became of each tensor.
pub fn finish(job: &Job, write: &WriteArgs) -> anyhow::Result<Status> {
    let Some(done) = common::carry_out(job, write)? else { return Ok(Status::Done) };
    if !write.work.quiet {
        say_losses(job, &done.outcomes);
        common::say_summary(job, &done);
    }
    if write.work.json {
        let mut summary = common::summary(job, &done);
        summary["losses"] = losses(job, &done.outcomes);
        ui::print(format_args!("{summary:#}"))?;
    }
    Ok(Status::Done)
}

/// What became of each tensor: `exact`, or how it was rounded and what it lost.
pub fn say_losses(job: &Job, outcomes: &[Outcome]) {
    let width = plain::width(outcomes.iter().map(|o| o.name.chars().count()), 0);
    for (t, o) in job.plan.tensors.iter().zip(outcomes) {
        ui::say(&format!("{:<width$}  {:>18}  {}", o.name, t.type_name(), loss(o)));
    }
}

fn loss(o: &Outcome) -> String {
    match o.nmse {
        Some(0.0) => "exact".into(),
        Some(nmse) => format!("requantized, NMSE {nmse:.3e}"),
        None => "not looked at".into(),
    }
}

fn losses(job: &Job, outcomes: &[Outcome]) -> Json {
    let each = job.plan.tensors.iter().zip(outcomes).map(
        |(t, o)| json!({"name": o.name, "type": t.type_name(), "exact": o.nmse == Some(0.0), "nmse": o.nmse}),
    );
    Json::Array(each.collect())
}
