//! What became of a quantization: tensor by tensor, in all, and what the written file predicts.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use qconv::convert::{Job, Outcome, Stage};
use qconv::error::{Error, Result};
use serde_json::{Value as Json, json};

use super::common::{Done, WriteArgs};
#[cfg(feature = "ggml")]
use super::{common, ui};

/// What is wanted beside the output.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Reporting")]
pub struct ReportArgs {
    /// Write what became of each tensor to this file, .md or .json; may be given twice
    #[arg(long, value_name = "FILE", value_parser = parse_report)]
    pub report: Vec<PathBuf>,

    /// Load what was written, and compare its predictions with the source's, over a text (a part of a novel
    /// unless given)
    #[arg(long, value_name = "TEXT", num_args = 0..=1, require_equals = true, default_missing_value = "builtin")]
    pub evaluate: Option<PathBuf>,

    /// How much of that text is read, in windows of 512 tokens
    #[arg(long, value_name = "N", default_value_t = 16, requires = "evaluate")]
    pub evaluate_chunks: usize,
}

/// How a report is written.
#[derive(Clone, Copy)]
enum Form {
    Markdown,
    Json,
}

fn form(path: &Path) -> Option<Form> {
    match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "md" => Some(Form::Markdown),
        "json" => Some(Form::Json),
        _ => None,
    }
}

fn parse_report(text: &str) -> std::result::Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if form(&path).is_some() { Ok(path) } else { Err("a report ends in .md or .json".into()) }
}

impl ReportArgs {
    /// Compares `job`'s output with `source`, a file that can be run, if that is wished.
    ///
    /// # Errors
    /// What cannot be run; texts that are too short.
    #[cfg(feature = "ggml")]
    pub fn evaluation(&self, job: &Job, source: &Path, args: &WriteArgs) -> Result<Option<Json>> {
        let Some(text) = &self.evaluate else { return Ok(None) };
        let text = (text.as_os_str() != "builtin").then_some(text.as_path());
        let threads = common::threads(args.work.engine_threads());
        let options =
            super::eval::Comparison { text, chunks: self.evaluate_chunks, threads, quiet: args.work.quiet };
        let found = super::eval::compare_files(source, &job.output, &options)?;
        let has_collapsed = found.has_collapsed();
        if !args.work.quiet {
            ui::say(&format!(
                "perplexity {:.4} before, {:.4} after; KLD {:.6} ± {:.6}; the same likeliest token in {:.2} % of {} \
                 predictions",
                found.base_perplexity.value,
                found.perplexity.value,
                found.kld.value,
                found.kld.error,
                100.0 * found.same_top.value,
                found.count
            ));
            if has_collapsed {
                ui::say(COLLAPSED);
            }
        }
        let mut value = json!(found);
        value["has_collapsed"] = has_collapsed.into();
        Ok(Some(value))
    }

    /// Without the engine nothing can be run.
    ///
    /// # Errors
    /// `Unsupported` where it is wished.
    #[cfg(not(feature = "ggml"))]
    pub fn evaluation(&self, _: &Job, _: &Path, _: &WriteArgs) -> Result<Option<Json>> {
        match self.evaluate {
            Some(_) => Err(Error::unsupported("this build of qconv cannot run models to evaluate them")),
            None => Ok(None),
        }
    }

    /// Writes the reports. `summary` is that of the finished job, with what was added to it.
    ///
    /// # Errors
    /// `Misuse` where one exists and must not be overwritten; `Io`.
    pub fn write(&self, done: &Done, summary: &Json, force: bool) -> Result<()> {
        for path in &self.report {
            let text = match form(path) {
                Some(Form::Markdown) => markdown(&done.outcomes, summary),
                Some(Form::Json) => {
                    let mut value = summary.clone();
                    value["outcomes"] = json!(done.outcomes);
                    format!("{value:#}\n")
                }
                None => return Err(Error::misuse("a report ends in .md or .json").at(path)),
            };
            let stage = Stage::files_at(&[(path.clone(), text.len() as u64)], force)?;
            for file in stage.files() {
                file.write_at(0, text.as_bytes())?;
            }
            stage.commit()?;
        }
        Ok(())
    }

    /// Whether all reports can be written in the end.
    ///
    /// # Errors
    /// `Misuse` where one exists and must not be overwritten.
    pub fn check(&self, force: bool) -> Result<()> {
        match self.report.iter().find(|path| path.exists() && !force) {
            Some(path) => Err(Error::misuse("exists already").at(path).hint("--force overwrites it")),
            None => Ok(()),
        }
    }
}

const COLLAPSED: &str = "warning: the model has collapsed: it predicts the text more than ten times worse than its source, or other things";

/// Sums of outcomes by method: tensors, weights' bytes are in the summary already.
fn methods(outcomes: &[Outcome]) -> Vec<(&'static str, usize)> {
    let mut counts: indexmap::IndexMap<&'static str, usize> = indexmap::IndexMap::new();
    for o in outcomes {
        *counts.entry(o.method).or_default() += 1;
    }
    counts.into_iter().collect()
}

fn markdown(outcomes: &[Outcome], summary: &Json) -> String {
    let mut out = String::new();
    let text = |key: &str| match &summary[key] {
        Json::String(text) => text.clone(),
        other => other.to_string(),
    };
    // Writing to a string cannot fail.
    let _ = writeln!(out, "# {}\n", text("output"));
    let _ = writeln!(
        out,
        "{} bytes, {:.3} bits per weight, {} weights in {} tensors, {:.1} s.\n",
        text("bytes"),
        summary["bits_per_weight"].as_f64().unwrap_or(0.0),
        text("parameters"),
        text("tensors"),
        summary["seconds"].as_f64().unwrap_or(0.0)
    );
    let _ = writeln!(out, "| method | tensors |\n|---|---|");
    for (method, n) in methods(outcomes) {
        let _ = writeln!(out, "| {method} | {n} |");
    }
    if let Some(e) = summary.get("evaluation").filter(|e| e.is_object()) {
        let number = |key: &str, part: &str| e[key][part].as_f64().unwrap_or(f64::NAN);
        let _ = writeln!(out, "\n| | before | after |\n|---|---|---|");
        let (before, after) = (number("base_perplexity", "value"), number("perplexity", "value"));
        let _ = writeln!(out, "| perplexity | {before:.4} | {after:.4} |");
        let (kld, error) = (number("kld", "value"), number("kld", "error"));
        let _ = writeln!(out, "| KLD | 0 | {kld:.6} ± {error:.6} |");
        let _ =
            writeln!(out, "| same likeliest token | 100 % | {:.2} % |", 100.0 * number("same_top", "value"));
        let _ = writeln!(out, "\n{} predictions, of the written file, loaded again.", e["count"]);
        if e["has_collapsed"] == true {
            let _ = writeln!(out, "\n**{COLLAPSED}.**");
        }
    }
    for note in summary["notes"].as_array().into_iter().flatten().filter_map(Json::as_str) {
        let _ = write!(out, "\n- {note}");
    }
    let _ = writeln!(
        out,
        "\n\nErrors are mean squares of what a matrix's output loses over the calibration text, in parts of its own: \
         \"before\" if every block were rounded by itself.\n\n\
         | tensor | type | method | error before | after | damping | instead of |\n|---|---|---|---|---|---|---|"
    );
    let number = |n: Option<f64>| n.map(|n| format!("{n:.3e}")).unwrap_or_default();
    for o in outcomes {
        let (before, after) = (o.error.map(|e| e.before), o.error.map(|e| e.after));
        let damp = match o.damp_grew {
            true => format!("{} (grew)", number(o.damp)),
            false => number(o.damp),
        };
        let fallback = o.fallback.as_ref().map(|f| format!("{}: {}", f.wanted, f.why)).unwrap_or_default();
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {damp} | {} |",
            o.name,
            o.dtype,
            o.method,
            number(before),
            number(after),
            fallback.replace('|', "/")
        );
    }
    out
}
