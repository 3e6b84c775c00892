//! `qconv pack`

use std::path::{Path, PathBuf};

use qconv::container::qpack::{Qpack, SUFFIX};
use qconv::container::shards::split_shard_name;
use qconv::convert::{HfContainer, ImatrixChoice, Job, Temporary, ToHf, ToQpack, Wanted, recompress};
use qconv::error::{Error, Result};
use qconv::limits::Limits;
use qconv::packed::write::{Format, QpackEncoding};
use regex::Regex;
use serde_json::json;

use super::common::{self, WriteArgs, parse_size};
use super::convert::{CodeArgs, RoundingArgs, dtype_arg, finish, say_losses};
use super::ui::Progress;
use super::{Status, ui};

/// Put a whole model into one .qpack file: its tensors, its other files, and where they come from
///
/// Without options of an encoding tensors stay what they are: codes and scales of quantized checkpoints go into
/// encodings of the file, and `qconv unpack` gives the same files back. With them the matrices of blocks are
/// quantized; integers and ternary digits that the source has already, and that are on the grid, are moved.
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

    /// Compress segments without loss: BF16 weights take a third less, and are read at some hundred MB/s. What is not
    /// compressed yet lies beside the output meanwhile
    #[arg(long)]
    pub compress: bool,

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
    /// int (1 to 8 bits), ternary (five digits a byte), ternary-bits2, sparse-ternary (of models that are ternary
    /// already), nf4, fp4, int8 (a scale for each row) or fp8 (blocks of 128 x 128)
    #[arg(long, value_parser = parse_encoding)]
    pub encoding: Option<QpackEncoding>,

    #[command(flatten)]
    pub codes: CodeArgs,

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
        let given = self.codes.given().next().is_some();
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
        let heeded = |option: &&str| ["--group-size", "--sym"].contains(option);
        if encoding != QpackEncoding::Integers
            && let Some(option) = self.codes.given().find(|option| !heeded(option))
        {
            return Err(Error::misuse(format!("{option} means nothing with --encoding {}", encoding.name())));
        }
        Ok(Some(self.codes.wanted(Format::Qpack(encoding))))
    }
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let (method, imatrix) = (args.rounding.choice()?, args.rounding.imatrix.clone());
    let wanted = args.encoding.wanted(method.is_some() || imatrix.is_some())?;
    let is_measured = wanted.is_some();
    let max_shard_size = args.max_shard_size.unwrap_or(u64::MAX);
    let dtype = dtype_arg(args.encoding.dtype.as_deref())?;
    let plan = |output: Option<PathBuf>| -> Result<Job> {
        let Some(wanted) = wanted.clone() else {
            return ToQpack { output, max_shard_size, ..ToQpack::new(&args.source) }.plan();
        };
        let choice =
            |path: &PathBuf| ImatrixChoice { path: path.clone(), include: Vec::new(), exclude: Vec::new() };
        ToHf {
            method: method.clone(),
            imatrix: imatrix.as_ref().map(choice),
            output,
            container: HfContainer::Qpack,
            wanted: Some(wanted),
            dtype,
            ignore: args.encoding.ignore.clone(),
            max_shard_size,
            measures: true,
            exact_only: args.encoding.exact_only,
            ..ToHf::new(&args.source, "")
        }
        .plan()
    };
    let mut job = plan(args.output.clone())?;
    if args.compress && !args.write.dry_run {
        return compressed(&job, plan, &args.write, is_measured);
    }
    if args.compress {
        job.plan.notes.push("sizes are those before compression".into());
    }
    if is_measured { finish(&job, &args.write) } else { common::finish(&job, &args.write) }
}

/// Writes what `job` would, compressed: first without compression beside it.
fn compressed(
    job: &Job,
    plan: impl Fn(Option<PathBuf>) -> Result<Job>,
    write: &WriteArgs,
    is_measured: bool,
) -> anyhow::Result<Status> {
    common::check_new(job, write)?;
    job.check_not_input()?;
    let plain = plan(Some(Temporary::name(&job.output, "plain.qpack")))?;
    // What a killed process left is of no use.
    let gone: Vec<_> = plain.outputs().into_iter().map(Temporary::new).collect();
    gone.iter().filter(|file| file.path().exists()).for_each(|file| drop(std::fs::remove_file(file.path())));
    let Some(done) = common::carry_out(&plain, write)? else { return Ok(Status::Done) };
    let quiet = write.work.quiet;
    let source = Qpack::open(&plain.output, &Limits::default())?;
    let bytes = source.manifests().flat_map(|(_, m)| m.segments()).map(|s| s.content_bytes()).sum();
    let progress = Progress::new("compressing", bytes, quiet);
    // The name that was asked for, from which those of a set are made.
    let stem = stem_of(&job.output);
    let found = recompress(&source, &stem, true, write.force, &write.work.budget()?, &progress);
    progress.finish();
    let found = found?;
    let share = found.bytes as f64 / found.bytes_before.max(1) as f64;
    if !quiet {
        if is_measured {
            say_losses(&plain, &done.outcomes);
        }
        let [is, was] = [found.bytes, found.bytes_before].map(ui::size);
        ui::say(&format!("{}: {is} instead of {was}, {:.1} %", found.outputs[0].display(), share * 100.0));
    }
    if write.work.json {
        let mut summary = common::summary(&plain, &done);
        summary["output"] = json!(found.outputs[0]);
        summary["files"] = json!(found.outputs);
        summary["bytes"] = json!(found.bytes);
        summary["bytes_uncompressed"] = json!(found.bytes_before);
        ui::print(format_args!("{summary:#}"))?;
    }
    Ok(Status::Done)
}

/// Without the number of a file in a set.
fn stem_of(output: &Path) -> PathBuf {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    match split_shard_name(&name, SUFFIX) {
        Some((stem, ..)) => output.with_file_name(format!("{stem}.{SUFFIX}")),
        None => output.to_path_buf(),
    }
}
