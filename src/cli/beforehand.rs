//! What a method needs and nobody has given: second moments, from a calibration before the quantization.

use std::path::{Path, PathBuf};

use qconv::convert::Job;
use qconv::error::{Error, Result};

use super::common::WriteArgs;
use super::quantizer::QuantizerArgs;
use super::ui;

/// Where a model's moments lie when they were collected on the way: beside the output, called after the source,
/// so that outputs of all types share them.
pub fn moments_path(source: &Path, output: &Path) -> PathBuf {
    let source = source.canonicalize().unwrap_or_else(|_| source.to_path_buf());
    let name = source.file_name().unwrap_or_default().to_string_lossy();
    let stem = [".gguf", ".qpack"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    output.with_file_name(format!("{stem}.moments.gguf"))
}

/// Says in a plan that is shown what would happen before it, `runnable` bytes of a conversion that can be run among
/// it.
pub fn announce(job: &mut Job, moments: &Path, runnable: Option<u64>) {
    // What a type needs will be there.
    job.plan.obstacle = None;
    let notes = &mut job.plan.notes;
    notes.push(format!(
        "the model would be calibrated first, into {}; what its method takes of memory shows then",
        moments.display()
    ));
    if let Some(bytes) = runnable {
        let bytes = ui::size(bytes);
        notes.push(format!(
            "for that a conversion of {bytes} that can be run would lie beside the output meanwhile"
        ));
    }
}

/// Collects the moments of the GGUF file `model` in `target`, or takes those that lie there from an earlier run.
///
/// # Errors
/// As a calibration; `Misuse` where moments of something else lie there, unless they may be overwritten.
#[cfg(feature = "ggml")]
pub fn calibrate(model: &Path, target: &Path, args: &QuantizerArgs, write: &WriteArgs) -> Result<()> {
    use qconv::calibrate::inputs::Selection;
    use qconv::calibrate::moments::{Calibration, Options};
    use qconv::container::moments::Moments;
    use qconv::limits::Limits;

    use super::runnable::Loaded;

    let quiet = write.work.quiet;
    let at = |e: Error| if e.path().is_some() { e } else { e.at(model) };
    let calibration = args.calibration_args(&write.work);
    let Loaded { runs: _runs, model: loaded } = calibration.model(model, quiet)?;
    let source = calibration.source();
    let windows = source.windows(&loaded).map_err(at)?;
    let selection = Selection { output: true, ..Selection::default() };
    let names = source.names().join(", ");
    let job = Calibration::new(&loaded, model, windows, &names, &selection, false).map_err(at)?;
    if target.exists() {
        let found = Moments::open(target, &Limits::default()).map(|m| m.contents().clone());
        let is_ours = found.map(|mut found| {
            // The same tokens are the same text, however it was called.
            found.texts.iter_mut().for_each(|t| t.name.clone_from(&names));
            found == job.plan.contents
        });
        match is_ours {
            Ok(true) => {
                if !quiet {
                    ui::say(&format!("note: calibrated before: {}", target.display()));
                }
                return Ok(());
            }
            _ if write.force => {}
            Ok(false) => {
                return Err(Error::misuse("moments of another model, text or length lie here")
                    .at(target)
                    .hint("--moments takes them all the same, --force overwrites them"));
            }
            Err(e) => return Err(e.hint("--force overwrites it")),
        }
    }
    let options = Options {
        threads: calibration.threads(),
        max_memory: write.work.max_memory.unwrap_or(1 << 30),
        save_every: std::time::Duration::from_secs(60),
    };
    super::calibrate::collect(&job, target, write.force, &options, quiet).map_err(at)?;
    Ok(())
}

/// Without the engine nothing can be run.
///
/// # Errors
/// `Unsupported`, always.
#[cfg(not(feature = "ggml"))]
pub fn calibrate(_: &Path, _: &Path, _: &QuantizerArgs, _: &WriteArgs) -> Result<()> {
    Err(Error::unsupported("this build of qconv cannot run models to calibrate")
        .hint("give second moments with --moments FILE"))
}
