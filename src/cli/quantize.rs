//! `qconv quantize`

use std::path::PathBuf;

use qconv::convert::{Quantize, Sharding};
use qconv::limits::Limits;
use serde_json::{Value as Json, json};

use super::common::{self, EditArgs, WriteArgs};
use super::mix::{self, MixArgs};
use super::quantizer::{QuantizerArgs, ShardArgs, type_names};
use super::report::ReportArgs;
use super::runnable::Runnable;
use super::{Status, beforehand, ui};

/// Write a GGUF file with another type
#[derive(clap::Args, Debug)]
#[command(after_help = format!("Types: {}", type_names()))]
pub struct Args {
    /// The GGUF file (of a split one, any shard), or a .qpack file that was made of one
    pub source: PathBuf,

    /// The file to write; shards are named after it
    pub output: PathBuf,

    /// The file type, such as q4_k_m; below are all
    #[arg(
        short = 't',
        long = "type",
        value_name = "TYPE",
        required_unless_present = "target",
        conflicts_with = "target"
    )]
    pub file_type: Option<String>,

    /// Quantize again what is quantized already, and lose twice
    #[arg(long)]
    pub allow_requantize: bool,

    /// Divide the output into files as the source is
    #[arg(long, conflicts_with_all = ["split_max_size", "split_max_tensors"])]
    pub keep_split: bool,

    #[command(flatten)]
    pub shards: ShardArgs,

    #[command(flatten)]
    pub edits: EditArgs,

    #[command(flatten)]
    pub write: WriteArgs,

    #[command(flatten)]
    pub quantizer: QuantizerArgs,

    #[command(flatten)]
    pub report: ReportArgs,

    #[command(flatten)]
    pub mix: MixArgs,
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let (write, report) = (&args.write, &args.report);
    report.check(write.force)?;
    let mut quantizer = args.quantizer.quantizer(args.file_type.as_deref().unwrap_or(mix::UNDECIDED))?;
    quantizer.allow_requantize = args.allow_requantize;
    let calibrates = args.quantizer.calibrates(Some(&quantizer))?;
    quantizer.ignore_methods = calibrates;
    let mut conversion = Quantize {
        source: args.source.clone(),
        output: args.output.clone(),
        quantizer,
        sharding: if args.keep_split { Sharding::Keep } else { args.shards.sharding()? },
        edits: args.edits.edits(),
        limits: Limits::default(),
    };
    let mut job = conversion.plan()?;
    let first = job.store.files().first().map_or_else(|| args.source.clone(), |f| f.path().to_path_buf());
    let runs = match !write.dry_run && (calibrates || report.evaluate.is_some()) {
        true => Some(Runnable::of(&first, write.work.engine_threads(), write.work.quiet)?),
        false => None,
    };
    let source = runs.as_ref().map_or(&first, |runs| &runs.path);
    args.mix.check_shown(calibrates, write)?;
    if args.mix.is_given() && !write.dry_run {
        common::check_new(&job, write)?;
    }
    if calibrates {
        let moments = beforehand::moments_path(&args.source, &job.output);
        if write.dry_run {
            beforehand::announce(&mut job, &moments, None);
        } else {
            common::check_new(&job, write)?;
            beforehand::calibrate(source, &moments, &args.quantizer, write)?;
            conversion.quantizer.take_moments(moments);
            job = conversion.plan()?;
        }
    }
    let found = args.mix.search(&conversion, write)?;
    if let Some(found) = &found {
        conversion.quantizer = found.quantizer.clone();
        job = conversion.plan()?;
        job.plan.notes.push(mix::note(found));
    }
    let Some(done) = common::carry_out(&job, write)? else { return Ok(Status::Done) };
    if !write.work.quiet {
        common::say_summary(&job, &done);
    }
    let mut summary = common::summary(&job, &done);
    summary["mix"] = json!(found.as_ref().map(mix::json_of));
    summary["converted"] = runs.as_ref().map_or(Json::Null, Runnable::json);
    summary["evaluation"] = json!(report.evaluation(&job, source, write)?);
    report.write(&done, &summary, write.force)?;
    if write.work.json {
        ui::print(format_args!("{summary:#}"))?;
    }
    Ok(Status::Done)
}
