//! The options for mixed precision, and what is said while it is searched.

use std::path::{Path, PathBuf};

use qconv::convert::{Budget, HfToGguf, Observer, Quantize, Stage};
use qconv::error::{Error, Result};
use qconv::eval::score::DivergenceSummary;
use qconv::mix::{self, Judge, Measure, Mixture, Options, Step, Target};
use qconv::tensor::DType;
use serde_json::json;

use super::common::{WriteArgs, parse_size};
use super::quantizer::parse_count;
use super::ui::{self, Progress};

/// A type for each tensor, for a size or a quality.
#[derive(clap::Args, Debug, Default, PartialEq)]
#[command(next_help_heading = "Mixed precision")]
pub struct MixArgs {
    /// Choose the types so that the files have at most this size, such as 4GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size, group = "target")]
    pub target_size: Option<u64>,

    /// Choose the types so that the tensors have at most so many bits for each weight
    #[arg(long, value_name = "BITS", group = "target")]
    pub target_bpw: Option<f64>,

    /// Choose the smallest types whose mean KLD, measured, stays below this
    #[arg(long, value_name = "NATS", group = "target")]
    pub max_kld: Option<f64>,

    /// Choose the smallest types that raise the perplexity, measured, by no more than this, such as 5%
    #[arg(long, value_name = "PERCENT", value_parser = parse_share, group = "target")]
    pub max_ppl_increase: Option<f64>,

    /// Types to choose among [default: q2_k,q3_k,q4_k,q5_k,q6_k,q8_0]
    #[arg(long, value_name = "TYPE,...", value_delimiter = ',', value_parser = parse_type, requires = "target")]
    pub types: Vec<DType>,

    /// What is measured before types are chosen: each tensor as two types, or as all, each layer, or
    /// nothing, so that estimates from --moments or --imatrix decide
    #[arg(long, value_enum, default_value_t, requires = "target")]
    pub measure: MeasureArg,

    /// The text to measure on: its first half chooses, its second half checks; by default a part of a
    /// novel
    #[arg(long, value_name = "FILE", requires = "target")]
    pub measure_text: Option<PathBuf>,

    /// Windows of 512 tokens that are read of each half
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = parse_count, requires = "target")]
    pub windows: usize,

    /// Keep the sensitivities of the tensors in this file, and go on from those in it
    #[arg(long, value_name = "FILE", requires = "target")]
    pub sensitivity: Option<PathBuf>,

    /// Write the types chosen to this file, for --tensor-type-file; a dry run does so too
    #[arg(long, value_name = "FILE", requires = "target")]
    pub save_recipe: Option<PathBuf>,
}

/// See [`Measure`].
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq)]
pub enum MeasureArg {
    Nothing,
    Layers,
    #[default]
    Tensors,
    All,
}

/// The file type that stands aside until types are found.
pub const UNDECIDED: &str = "q8_0";
/// Tokens that are read at once.
#[cfg(feature = "ggml")]
const N_CTX: usize = 512;

fn parse_type(name: &str) -> std::result::Result<DType, String> {
    DType::from_name(name).filter(|d| d.is_block()).ok_or_else(|| format!("{name:?} is no type of blocks"))
}

/// `5%`, or `5`.
fn parse_share(text: &str) -> std::result::Result<f64, String> {
    let percent: f64 =
        text.trim_end_matches('%').trim().parse().map_err(|_| "a number of percent was expected")?;
    if percent > 0.0 && percent.is_finite() { Ok(percent / 100.0) } else { Err("it must be above 0".into()) }
}

impl MixArgs {
    /// Whether types are to be searched.
    pub fn is_given(&self) -> bool {
        self.target().is_some()
    }

    fn target(&self) -> Option<Target> {
        let size = self.target_size.map(Target::Bytes).or(self.target_bpw.map(Target::BitsPerWeight));
        size.or(self.max_kld.map(Target::Kld)).or(self.max_ppl_increase.map(Target::PplIncrease))
    }

    /// Whether a plan with the result can be shown: not before the moments it depends on are there.
    pub fn check_shown(&self, calibrates: bool, write: &WriteArgs) -> Result<()> {
        match self.is_given() && calibrates && write.dry_run {
            true => Err(Error::misuse("types are searched with the moments of a calibration")
                .hint("make them with qconv calibrate, and give them with --moments FILE")),
            false => Ok(()),
        }
    }

    /// Searches types for a conversion from another format; `model` is the model in GGUF, as it is.
    pub fn search_hf(
        &self,
        conversion: &HfToGguf,
        model: &Path,
        output: &Path,
        write: &WriteArgs,
    ) -> Result<Option<Mixture>> {
        let Some(quantizer) = conversion.quantizer.clone() else { return Ok(None) };
        let sharding = conversion.sharding.clone();
        self.search(&Quantize { sharding, ..Quantize::new(model, output, quantizer) }, write)
    }

    /// Searches types for the GGUF file that `quantize` converts; `None` where that is not asked for.
    pub fn search(&self, quantize: &Quantize, write: &WriteArgs) -> Result<Option<Mixture>> {
        let Some(target) = self.target() else { return Ok(None) };
        let budget = write.work.budget()?;
        ui::catch_interrupt();
        let options = Options {
            target,
            types: if self.types.is_empty() { mix::TYPES.to_vec() } else { self.types.clone() },
            measure: match self.measure {
                MeasureArg::Nothing => Measure::Nothing,
                MeasureArg::Layers => Measure::Layers,
                MeasureArg::Tensors => Measure::Tensors,
                MeasureArg::All => Measure::All,
            },
            sensitivity: self.sensitivity.clone(),
        };
        // What cannot be written shall show before the work.
        let recipe = self.save_recipe.as_ref();
        let stage = recipe.map(|path| Stage::files_at(&[(path.clone(), 0)], write.force)).transpose()?;
        let still = Progress::new("measuring", 0, true);
        let (mut trials, mut done) = (0, 0);
        let mut progress = None;
        let mut tell = |step: Step<'_>| match step {
            _ if write.work.quiet => {}
            Step::Trials(n, seconds) => {
                trials = n;
                ui::say(&format!(
                    "{n} measurements of single tensors, about {:.0} s at first sight",
                    n as f64 * seconds
                ));
                progress = Some(Progress::counting("measuring", "models", n as u64, false));
            }
            Step::Trial(trial) => {
                done += 1;
                let what = format!("{} {}: KLD {:.6}", trial.tensors.join(", "), trial.dtype, trial.kld);
                if let Some(p) = &progress {
                    p.advance(1, &what);
                    if done == trials {
                        p.finish();
                    }
                }
            }
            Step::Joint(bytes, expected, found) => ui::say(&format!(
                "{}: KLD {:.6} ± {:.6} measured, {expected:.6} by single tensors, {}",
                ui::size(bytes),
                found.kld.value,
                found.kld.error,
                perplexity(found)
            )),
        };
        let mut judge = self.judge(quantize, budget, &still)?;
        let judge = judge.as_mut().map(|j| &mut **j as &mut dyn Judge);
        let found = mix::search(quantize, &options, judge, budget.threads, &still, &mut tell)?;
        if let Some(stage) = stage {
            stage.files().iter().try_for_each(|f| f.write_at(0, found.recipe().as_bytes()))?;
            stage.commit()?;
        }
        Ok(Some(found))
    }

    #[cfg(feature = "ggml")]
    fn judge<'a>(
        &self,
        quantize: &Quantize,
        budget: Budget,
        observer: &'a Progress,
    ) -> Result<Option<Box<dyn Judge + 'a>>> {
        let needs_none = self.measure == MeasureArg::Nothing
            && (self.target_size.or(self.target_bpw.map(|_| 0))).is_some();
        if needs_none {
            return Ok(None);
        }
        let text = match &self.measure_text {
            Some(path) => qconv::container::side::read_text(path, quantize.limits.side_file_bytes)?.into(),
            None => std::borrow::Cow::Borrowed(qconv::calibrate::text::SAMPLE_TEXT),
        };
        // Of a split model llama.cpp wants the first shard.
        let gguf = qconv::container::gguf::Gguf::open(&quantize.source, &quantize.limits)?;
        let first = gguf.store.files().first().map_or(&*quantize.source, |f| f.path());
        let runs = super::runnable::Runnable::of(first, u32::try_from(budget.threads).ok(), true)?;
        let reading = mix::measure::Reading { text: &text, n_windows: self.windows, n_ctx: N_CTX };
        let trial = qconv::convert::Temporary::beside(&quantize.output, "trial");
        let judge = mix::measure::Measurer::new(&runs.path, trial, &reading, budget, observer)
            .map_err(|e| if e.path().is_some() { e } else { e.at(first) })?;
        Ok(Some(Box::new(judge)))
    }

    /// Without ggml there is nobody to measure: the estimates alone decide.
    #[cfg(not(feature = "ggml"))]
    fn judge<'a>(&self, _: &Quantize, _: Budget, _: &'a Progress) -> Result<Option<Box<dyn Judge + 'a>>> {
        match self.measure {
            MeasureArg::Nothing => Ok(None),
            _ => Err(Error::unsupported("this build cannot run models, so nothing can be measured")
                .hint("let estimates decide with --measure nothing, or build with the feature ggml")),
        }
    }
}

/// What was found, in a sentence.
pub fn note(found: &Mixture) -> String {
    let mut by_type = std::collections::BTreeMap::<String, usize>::new();
    for dtype in found.types.values() {
        *by_type.entry(dtype.to_string()).or_default() += 1;
    }
    let types: Vec<_> = by_type.iter().map(|(dtype, n)| format!("{n} {dtype}")).collect();
    let of = |what: &str, found: &Option<DivergenceSummary>| match found {
        Some(f) => format!("; {what} KLD {:.6} ± {:.6}, {}", f.kld.value, f.kld.error, perplexity(f)),
        None => String::new(),
    };
    let expected = match found.table.trials.is_empty() {
        true => String::new(),
        false => format!("; expected KLD {:.6}", found.expected),
    };
    format!(
        "types chosen: {}{expected}{}{}",
        types.join(", "),
        of("measured", &found.measured),
        of("on text held out", &found.held_out)
    )
}

fn perplexity(found: &DivergenceSummary) -> String {
    format!("perplexity {:+.2} %", 100.0 * found.ln_ratio.value.exp_m1())
}

/// What a summary in JSON says of it.
pub fn json_of(found: &Mixture) -> serde_json::Value {
    let types: serde_json::Map<_, _> =
        found.types.iter().map(|(name, dtype)| (name.clone(), json!(dtype.to_string()))).collect();
    json!({"file_type": found.quantizer.recipe.name, "types": types, "expected": found.expected, "measured": found.measured,
           "held_out": found.held_out, "trials": found.table.trials.len()})
}
