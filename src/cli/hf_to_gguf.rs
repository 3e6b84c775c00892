//! `qconv hf-to-gguf`

use std::path::PathBuf;

use qconv::convert::{FileType, HfToGguf, MergeLora, Quantizer};
use qconv::error::Error;
use qconv::limits::Limits;
use qconv::verify;
use serde_json::json;

use super::beforehand;
use super::common::{self, EditArgs, WriteArgs};
use super::mix::{self, MixArgs};
use super::quantizer::{QuantizerArgs, ShardArgs, type_names};
use super::report::ReportArgs;
use super::runnable::Runnable;
use super::{Status, ui};

/// Convert a Hugging Face model to a GGUF file, and quantize it on the way
#[derive(clap::Args, Debug)]
#[command(after_help = format!(
    "Types: auto, {}.\n\nThe types f32, f16, bf16, q8_0, tq1_0 and tq2_0 follow llama.cpp's converter, all others \
     (and these, where an option for quantizing is given) llama-quantize.", type_names()
))]
pub struct Args {
    /// The model's directory, or its weights file or index, or a .qpack file
    pub source: PathBuf,

    /// The file to write, or a directory for it; by default named after model and type, beside
    /// the source
    #[arg(short, long)]
    pub output: Option<PathBuf>,

    /// The file type, such as q4_k_m, or auto (the source's precision); below are all
    #[arg(
        short = 't',
        long = "type",
        value_name = "TYPE",
        default_value = "auto",
        conflicts_with = "target"
    )]
    pub file_type: String,

    /// With --type auto, the type of weights that are quantized in a way that no type holds exactly, such as q8_0;
    /// by default that of other weights. Rows that do not fit it become f16
    #[arg(long, value_name = "TYPE", conflicts_with = "target")]
    pub decoded_type: Option<String>,

    /// Write the part that sees or hears instead of the language model: what llama.cpp takes as
    /// --mmproj
    #[arg(long, conflicts_with = "target")]
    pub mmproj: bool,

    /// Take the model for this architecture, whatever config.json says
    #[arg(long)]
    pub arch: Option<String>,

    /// Take the definition of the architecture from this file (CONTRIBUTING.md describes it)
    #[arg(long, value_name = "FILE", conflicts_with = "arch")]
    pub arch_file: Option<PathBuf>,

    /// Take this pre-tokenizer (tokenizer.ggml.pre) instead of the one whose tokens agree
    #[arg(long, value_name = "NAME")]
    pub pre: Option<String>,

    /// Convert even if llama.cpp's tokens differ from those of tokenizer.json
    #[arg(long)]
    pub allow_token_mismatch: bool,

    /// Merge a LoRA adapter (PEFT's directory) into the weights, so many times (1); can be repeated
    #[arg(long, value_name = "ADAPTER[:SCALE]", value_parser = common::parse_scaled)]
    pub merge_lora: Vec<(PathBuf, f32)>,

    /// Skip the checks of the finished file
    #[arg(long)]
    pub no_verify: bool,

    #[command(flatten)]
    pub edits: EditArgs,

    #[command(flatten)]
    pub shards: ShardArgs,

    #[command(flatten)]
    pub write: WriteArgs,

    #[command(flatten)]
    pub quantizer: QuantizerArgs,

    #[command(flatten)]
    pub report: ReportArgs,

    #[command(flatten)]
    pub mix: MixArgs,
}

/// What the converter is asked for, and what the quantizer makes of that.
fn types(args: &Args) -> qconv::Result<(Option<FileType>, Option<Quantizer>)> {
    if args.mix.is_given() {
        return Ok((None, Some(args.quantizer.quantizer(mix::UNDECIDED)?)));
    }
    let is_auto = args.file_type.eq_ignore_ascii_case("auto");
    let converters = if is_auto { None } else { FileType::parse(&args.file_type) };
    match (converters, args.quantizer.is_given()) {
        (None, false) if is_auto => Ok((None, None)),
        (None, true) if is_auto => Err(qconv::Error::misuse("options for quantizing need a --type")),
        (Some(file_type), false) => Ok((Some(file_type), None)),
        _ => Ok((None, Some(args.quantizer.quantizer(&args.file_type)?))),
    }
}

/// What `--decoded-type` says.
fn decoded_type(args: &Args, is_auto: bool) -> qconv::Result<Option<FileType>> {
    let Some(name) = &args.decoded_type else { return Ok(None) };
    match FileType::parse(name) {
        _ if !is_auto => Err(Error::misuse("--decoded-type means nothing beside a --type")
            .hint("only --type auto keeps what is quantized as it is, where that is possible")),
        None => {
            Err(Error::misuse(format!("--decoded-type {name}: f32, f16, bf16 and q8_0 are types for that")))
        }
        found => Ok(found),
    }
}

/// Weights of each tensor that the spot check looks at.
const SPOT_CHECK: u64 = 16 << 10;

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let (file_type, quantizer) = types(args)?;
    let merge = |(adapter, scale): &(PathBuf, f32)| MergeLora { adapter: adapter.clone(), scale: *scale };
    let merge_lora: Vec<_> = args.merge_lora.iter().map(merge).collect();
    let calibrates = args.quantizer.calibrates(quantizer.as_ref())?;
    if calibrates && args.mmproj {
        return Err(
            qconv::Error::misuse("a projector cannot be calibrated: give --moments, or no method").into()
        );
    }
    args.report.check(args.write.force)?;
    let mut conversion = HfToGguf {
        source: args.source.clone(),
        output: args.output.clone(),
        file_type,
        decoded: decoded_type(args, file_type.is_none() && quantizer.is_none())?,
        quantizer,
        sharding: args.shards.sharding()?,
        mmproj: args.mmproj,
        arch: args.arch.clone(),
        arch_file: args.arch_file.clone(),
        pre: args.pre.clone(),
        tokens: common::token_check(args.allow_token_mismatch),
        merge_lora: merge_lora.clone(),
        edits: args.edits.edits(),
        limits: Limits::default(),
    };
    if let Some(quantizer) = &mut conversion.quantizer {
        quantizer.ignore_methods = calibrates;
    }
    let mut job = conversion.plan()?;
    let moments = beforehand::moments_path(&args.source, &job.output);
    let (mut runnable, mut found) = (None, None);
    args.mix.check_shown(calibrates, &args.write)?;
    if args.write.dry_run && calibrates {
        let bytes = Runnable::bytes(&conversion, &job.output)?;
        beforehand::announce(&mut job, &moments, Some(bytes));
    } else if args.mix.is_given() || !args.write.dry_run && (calibrates || args.report.evaluate.is_some()) {
        ui::catch_interrupt();
        // Of types that are yet to be found the output's name may tell.
        let is_named = args.output.as_ref().is_some_and(|path| !path.is_dir());
        if !args.write.dry_run && (is_named || !args.mix.is_given()) {
            common::check_new(&job, &args.write)?;
        }
        let runs = &*runnable.insert(Runnable::write(&conversion, &job.output, &args.write)?);
        if calibrates {
            beforehand::calibrate(&runs.path, &moments, &args.quantizer, &args.write)?;
            if let Some(quantizer) = &mut conversion.quantizer {
                quantizer.take_moments(moments);
            }
            job = conversion.plan()?;
        }
        found = args.mix.search_hf(&conversion, &runs.path, &job.output, &args.write)?;
        if let Some(found) = &found {
            conversion.quantizer = Some(found.quantizer.clone());
            job = conversion.plan()?;
            job.plan.notes.push(mix::note(found));
        }
    }
    let Some(done) = common::carry_out(&job, &args.write)? else { return Ok(Status::Done) };
    let work = &args.write.work;
    if !work.quiet {
        common::say_summary(&job, &done);
    }
    let report = if args.no_verify {
        None
    } else {
        let options = verify::Options {
            file: job.output.clone(),
            // Layers that were left out are no match for the source.
            against: args.quantizer.prune_layers.is_empty().then(|| args.source.clone()),
            sample: Some(SPOT_CHECK),
            forward: false,
            logits: None,
            arch: args.arch.clone(),
            arch_file: args.arch_file.clone(),
            pre: args.pre.clone(),
            tokens: conversion.tokens,
            merge_lora,
            limits: Limits::default(),
        };
        Some(verify::verify(&options, &work.budget()?, &ui::Progress::new("verifying", 0, true))?)
    };
    let mut summary = common::summary(&job, &done);
    summary["mix"] = json!(found.as_ref().map(mix::json_of));
    summary["verify"] = json!(report.as_ref().map(|r| &r.checks));
    if let Some(runnable) = &runnable {
        summary["evaluation"] = json!(args.report.evaluation(&job, &runnable.path, &args.write)?);
    }
    args.report.write(&done, &summary, args.write.force)?;
    if work.json {
        ui::print(format_args!("{summary:#}"))?;
    }
    match report {
        Some(report) => Ok(super::verify::say(&report, work.quiet)),
        None => Ok(Status::Done),
    }
}
