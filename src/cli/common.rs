//! Options and output that several commands share.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use qconv::convert::{Budget, Job, Outcome, PartPlan, Resume, Stage, TensorPlan, TokenCheck};
use qconv::error::{Error, Result};
use qconv::plain;
use serde_json::json;

use super::given;
use super::ui::{self, Progress};

/// Options of every command that writes.
#[derive(clap::Args, Debug)]
pub struct WriteArgs {
    /// Show what would be written, tensor by tensor, and write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Overwrite the output if it exists
    #[arg(long)]
    pub force: bool,

    /// Go on with an interrupted run of this command, or fail if there is none; without this it is gone on with
    /// where there is one
    #[arg(long, conflicts_with = "no_resume")]
    pub resume: bool,

    /// Begin anew where a run was interrupted, instead of going on
    #[arg(long)]
    pub no_resume: bool,

    #[command(flatten)]
    pub work: WorkArgs,
}

impl WriteArgs {
    /// What becomes of an interrupted run.
    pub fn resuming(&self) -> Resume {
        match (self.resume, self.no_resume) {
            (true, _) => Resume::Must,
            (_, true) => Resume::Never,
            _ => Resume::Gladly,
        }
    }
}

/// Options of every command that works through a model.
#[derive(clap::Args, Debug)]
pub struct WorkArgs {
    /// Worker threads; all processors by default
    #[arg(short = 'j', long)]
    pub threads: Option<usize>,

    /// Most memory for buffers, such as 64M or 1G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_memory: Option<u64>,

    /// Say only what went wrong
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,

    /// Say more
    #[arg(short, long)]
    pub verbose: bool,

    /// Print a machine-readable summary to stdout
    #[arg(long)]
    pub json: bool,
}

impl WorkArgs {
    /// The threads given, as the engine counts them.
    pub fn engine_threads(&self) -> Option<u32> {
        self.threads.and_then(|n| u32::try_from(n).ok())
    }

    pub fn budget(&self) -> Result<Budget> {
        Budget::new(self.threads, self.max_memory)
    }
}

/// The threads given, or one for each processor.
pub fn threads(given: Option<u32>) -> u32 {
    given.unwrap_or_else(|| {
        std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
    })
}

/// Changes to the metadata.
#[derive(clap::Args, Debug)]
pub struct EditArgs {
    /// The model's name (general.name)
    #[arg(long)]
    pub name: Option<String>,

    /// Set a metadata entry; the type is that of the old entry, or is given: key=u32:5
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Leave a metadata entry out
    #[arg(long, value_name = "KEY")]
    pub remove: Vec<String>,
}

impl EditArgs {
    pub fn edits(&self) -> qconv::convert::MetadataEdits {
        qconv::convert::MetadataEdits {
            name: self.name.clone(),
            set: self.set.clone(),
            remove: self.remove.clone(),
        }
    }
}

/// What `--allow-token-mismatch` says.
pub fn token_check(allow_mismatch: bool) -> TokenCheck {
    if allow_mismatch { TokenCheck::Lenient } else { TokenCheck::Required }
}

/// `64M`, `1.5G`, `1000000`: K, M, G and T count in 1024, with or without `B` or `iB`.
pub fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("a size is a number with K, M, G or T".into()),
    };
    let n: f64 = digits.trim().parse().map_err(|_| "a size is a number with K, M, G or T".to_string())?;
    let bytes = n * f64::from(1u32 << 10).powi(shift / 10);
    if bytes.is_finite() && (0.0..9e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err("out of range".into())
    }
}

/// `PATH` or `PATH:SCALE`; without a scale it is 1.
pub fn parse_scaled(text: &str) -> std::result::Result<(PathBuf, f32), String> {
    let scaled = text.rsplit_once(':').and_then(|(path, scale)| Some((path, scale.parse::<f32>().ok()?)));
    let (path, scale) = scaled.unwrap_or((text, 1.0));
    match (path.is_empty(), scale.is_finite()) {
        (false, true) => Ok((path.into(), scale)),
        _ => Err("a path was expected, perhaps with a scale: adapter:0.5".into()),
    }
}

/// A job that was carried out.
pub struct Done {
    pub seconds: f64,
    pub outcomes: Vec<Outcome>,
}

/// Whether a job may write, before something long comes before it. From then on Ctrl-C ends things in order.
pub fn check_new(job: &Job, args: &WriteArgs) -> Result<()> {
    ui::catch_interrupt();
    given::check(&job.outputs())?;
    // What was being renamed when a run was killed is not finished: the job itself finds out.
    let is_new = |path: &&PathBuf| !path.exists() || args.force || Stage::is_unfinished(&job.output);
    match job.outputs().iter().find(|path| !is_new(path)) {
        Some(path) => Err(Error::misuse("exists already").at(path).hint("--force overwrites it")),
        None => Ok(()),
    }
}

/// Runs a planned job under a progress bar, or shows it.
pub fn carry_out(job: &Job, args: &WriteArgs) -> Result<Option<Done>> {
    let budget = args.work.budget()?;
    if args.dry_run {
        show_plan(job, &budget, args.work.json).map_err(|e| Error::io("write", "stdout", e))?;
        return Ok(None);
    }
    if args.work.verbose {
        for t in &job.plan.tensors {
            ui::say(&format!("{:<40} {:>8} {:?}", t.name, t.type_name(), t.shape));
        }
    }
    if !args.work.quiet {
        job.plan.notes.iter().for_each(|n| ui::say(&format!("note: {n}")));
    }
    ui::catch_interrupt();
    given::check(&job.outputs())?;
    let begun = Instant::now();
    let progress = Progress::new("converting", job.work(), args.work.quiet);
    let done = job.run_resuming(args.force, args.resuming(), &budget, &progress);
    progress.finish();
    let outcomes = done?;
    Ok(Some(Done { seconds: begun.elapsed().as_secs_f64(), outcomes }))
}

/// Where the tensors of a packed matrix lie.
fn parts(t: &TensorPlan) -> Option<serde_json::Value> {
    let place = |p: &PartPlan| json!({"name": p.name, "type": p.dtype, "shape": p.shape, "file": p.file, "offset": p.offset});
    Some(t.parts()?.iter().map(place).collect())
}

fn show_plan(job: &Job, budget: &Budget, json: bool) -> std::io::Result<()> {
    let plan = &job.plan;
    let mut out = ui::stdout();
    if json {
        let tensors: Vec<_> = plan
            .tensors
            .iter()
            .map(|t| {
                json!({"name": t.name, "shape": t.shape, "type": t.type_name(), "wanted": t.wanted,
                       "file": t.file, "offset": t.offset, "bytes": t.nbytes, "parts": parts(t)})
            })
            .collect();
        let files: Vec<_> =
            plan.files.iter().map(|f| json!({"name": f.name.to_string_lossy(), "bytes": f.len})).collect();
        let value = json!({"output": job.output.to_string_lossy(), "files": files, "bytes": plan.total_len(),
            "parameters": plan.parameters(), "bits_per_weight": plan.bits_per_weight(),
            "peak_buffer_bytes": budget.peak(plan), "tokens": job.tokens, "notes": plan.notes,
            "obstacle": plan.obstacle.as_ref().map(|o| &o.message), "tensors": tensors});
        writeln!(out, "{value:#}")?;
        return out.flush();
    }
    let width = plain::width(plan.tensors.iter().map(|t| t.name.chars().count()), 0);
    for t in &plan.tensors {
        writeln!(
            out,
            "{:<width$}  {:>6}  {:>12}  {:?}",
            plain::line(&t.name),
            t.type_name(),
            t.nbytes,
            t.shape
        )?;
    }
    writeln!(out, "\noutput: {}", job.output.display())?;
    for f in plan.files.iter().filter(|f| !f.name.as_os_str().is_empty()) {
        writeln!(out, "  {:<40} {:>12}", f.name.display(), f.len)?;
    }
    writeln!(
        out,
        "{} tensors, {} weights, {} bytes ({}), {:.2} bits per weight; at most {} of buffers",
        plan.tensors.len(),
        ui::count(plan.parameters()),
        plan.total_len(),
        ui::size(plan.total_len()),
        plan.bits_per_weight(),
        ui::size(budget.peak(plan)),
    )?;
    if let Some(tokens) = &job.tokens {
        writeln!(out, "tokens: {tokens}")?;
    }
    for n in &plan.notes {
        writeln!(out, "note: {n}")?;
    }
    if let Some(o) = &plan.obstacle {
        writeln!(out, "cannot be carried out: {}\n  hint: {}", o.message, o.hint)?;
    }
    out.flush()
}

/// Runs a planned job, and sums it up.
pub fn finish(job: &Job, args: &WriteArgs) -> anyhow::Result<super::Status> {
    if let Some(done) = carry_out(job, args)? {
        if !args.work.quiet {
            say_summary(job, &done);
        }
        if args.work.json {
            ui::print(format_args!("{:#}", summary(job, &done)))?;
        }
    }
    Ok(super::Status::Done)
}

/// Bytes of the weights as the source stores them.
fn stored_bytes(job: &Job) -> u64 {
    job.store.files().iter().map(|f| f.len()).sum()
}

/// The summary of a finished job as JSON.
pub fn summary(job: &Job, done: &Done) -> serde_json::Value {
    let notes: Vec<String> = job.plan.notes.iter().cloned().chain(Outcome::notes(&done.outcomes)).collect();
    let input = stored_bytes(job);
    json!({
        "output": job.output.to_string_lossy(),
        "files": job.outputs().iter().map(|path| path.to_string_lossy()).collect::<Vec<_>>(),
        "bytes": job.plan.total_len(),
        "source_bytes": input,
        "tensors": job.plan.tensors.len(),
        "parameters": job.plan.parameters(),
        "bits_per_weight": job.plan.bits_per_weight(),
        "seconds": done.seconds,
        "tokens": job.tokens,
        "notes": notes,
    })
}

/// The summary of a finished job as a line.
pub fn say_summary(job: &Job, done: &Done) {
    let seconds = done.seconds;
    let input = stored_bytes(job);
    let output = job.plan.total_len();
    ui::say(&format!(
        "{}: {} from {}, {} weights in {} tensors, {:.2} bits per weight, {seconds:.1} s ({}/s)",
        job.output.display(),
        ui::size(output),
        ui::size(input),
        ui::count(job.plan.parameters()),
        job.plan.tensors.len(),
        job.plan.bits_per_weight(),
        ui::size((input as f64 / seconds.max(1e-9)) as u64),
    ));
    if let Some(tokens) = &job.tokens {
        ui::say(&format!("tokens: {tokens}"));
    }
    Outcome::notes(&done.outcomes).iter().for_each(|n| ui::say(&format!("note: {n}")));
}

#[cfg(test)]
mod tests {
    use super::{parse_scaled, parse_size};

    #[test]
    fn scales() {
        for (text, path, scale) in [
            ("a", "a", 1.0),
            ("a:0.5", "a", 0.5),
            ("a:-1", "a", -1.0),
            ("C:\\a", "C:\\a", 1.0),
            ("a:b:2", "a:b", 2.0),
        ] {
            assert_eq!(parse_scaled(text), Ok((path.into(), scale)), "{text}");
        }
        assert!(parse_scaled("a:inf").is_err() && parse_scaled(":1").is_err() && parse_scaled("").is_err());
    }

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("64M", 64 << 20), ("1.5G", 3 << 29), ("1000", 1000), ("2KiB", 2048), ("3gb", 3 << 30)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "-1", "1X", "nan", "inf", "1e40T", "é"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
