//! `qconv verify` as a scanner: many files, nothing executed.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use qconv::convert::{Budget, Stage};
use qconv::error::{Error, Result};
use qconv::limits::Limits;
use qconv::verify::Report;
use qconv::verify::scan::{self, Finding, Kind, Scan, Severity, manifest, sarif};
use serde_json::{Value as Json, json};

use super::common::WorkArgs;
use super::{Status, ui};

/// Options of the scanner.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Scan")]
pub struct ScanArgs {
    /// Only look: execute nothing, load nothing. So it is with many files, with directories, and with the options
    /// below
    #[arg(long)]
    pub scan: bool,

    /// Read all tensors: NaN, infinities, impossible scales, codes that do not exist, zeros
    #[arg(long)]
    pub tensors: bool,

    /// Warnings are findings too
    #[arg(long)]
    pub strict: bool,

    /// Print the SHA-256 of files and, with --verbose or --json, of tensors
    #[arg(long)]
    pub sha256: bool,

    /// Write a SARIF 2.1.0 log to FILE, or to stdout
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-", require_equals = true)]
    pub sarif: Option<PathBuf>,

    /// Compare with a list of hashes that --write-manifest wrote
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,

    /// Write a list of hashes of files and tensors, beside them
    #[arg(long, value_name = "FILE", conflicts_with = "manifest")]
    pub write_manifest: Option<PathBuf>,
}

/// The version of what `--json` prints.
const SCHEMA: u64 = 1;

impl ScanArgs {
    /// Whether these files are to be scanned only.
    pub fn is_meant(&self, files: &[PathBuf]) -> Result<bool> {
        let asked = self.scan
            || self.tensors
            || self.sha256
            || self.sarif.is_some()
            || self.manifest.is_some()
            || self.write_manifest.is_some();
        let [file] = files else { return Ok(true) };
        Ok(asked
            || match scan::kind(file)? {
                Some(Kind::Gguf | Kind::Qpack | Kind::CoreMl | Kind::Unknown) => false,
                Some(Kind::Safetensors | Kind::Pytorch | Kind::HuggingFace | Kind::Imatrix) | None => true,
            })
    }

    /// Scans, prints what was found, and writes what was asked for.
    pub fn run(&self, files: &[PathBuf], work: &WorkArgs, limits: &Limits) -> anyhow::Result<Status> {
        if self.sarif.as_deref().is_some_and(is_stdout) && (work.json || self.sha256) {
            return Err(Error::misuse("--sarif and another output both want stdout")
                .hint("give it a file: --sarif=scan.sarif")
                .into());
        }
        // What cannot be written shall show before the work.
        self.sarif.as_ref().map_or(Ok(()), |path| Written::Sarif.check(path))?;
        self.write_manifest.as_ref().map_or(Ok(()), |path| Written::Manifest.check(path))?;
        let found = self.look(files, work, limits)?;
        if let Some(path) = &self.sarif {
            let text = serde_json::to_string_pretty(&sarif::log(&found))?;
            match is_stdout(path) {
                true => ui::print(text)?,
                false => Written::Sarif.write(path, &(text + "\n"))?,
            }
        }
        if work.json {
            ui::print(serde_json::to_string_pretty(&summary(&found))?)?;
        } else if self.sha256 {
            sums(&found, work.verbose)?;
        }
        if let Some(path) = &self.write_manifest {
            let dir = path.parent().unwrap_or(Path::new(""));
            Written::Manifest.write(path, &manifest::text(&found, dir)?)?;
        }
        say(&found, work.quiet);
        let clean = found.is_clean(self.strict);
        match found.unchecked.first() {
            Some(first) if clean => {
                let n = found.unchecked.len();
                let rest = if n > 1 { format!(" ({n} files could not be)") } else { String::new() };
                Err(anyhow::anyhow!("could not be checked: {}{rest}", first.error))
            }
            _ if clean => Ok(Status::Done),
            _ => Ok(Status::Findings),
        }
    }

    fn look(&self, files: &[PathBuf], work: &WorkArgs, limits: &Limits) -> Result<Scan> {
        let sums = self.sha256 || self.manifest.is_some() || self.write_manifest.is_some();
        let options = scan::Options { tensors: self.tensors, sha256: sums, limits: limits.clone() };
        ui::catch_interrupt();
        let progress = ui::Progress::new("scanning", scan::bytes_to_read(files, &options), work.quiet);
        let found = scan::scan(files, &options, &work.budget()?, &progress);
        progress.finish();
        let mut found = found?;
        if let Some(path) = &self.manifest {
            // A manifest that lies among the files is not one of them.
            found.files.retain(|f| !is_same(&f.path, path));
            manifest::check(&mut found, path)?;
        }
        if let Some(path) = &self.write_manifest {
            found.files.retain(|f| !is_same(&f.path, path));
        }
        Ok(found)
    }
}

fn is_same(a: &Path, b: &Path) -> bool {
    match (std::fs::canonicalize(a), std::fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// What is written to a file.
#[derive(Clone, Copy)]
enum Written {
    Sarif,
    Manifest,
}

impl Written {
    /// Its name, and what is found in the beginning of each.
    fn is(self) -> (&'static str, &'static str) {
        match self {
            Self::Sarif => ("SARIF log", "sarif"),
            Self::Manifest => ("list of hashes", "\"qconv_manifest\""),
        }
    }

    /// Refuses to replace what is something else: a model, say.
    fn check(self, path: &Path) -> Result<()> {
        let is_regular = std::fs::metadata(path).is_ok_and(|meta| meta.is_file());
        if !is_regular || is_stream(path) {
            return Ok(());
        }
        let mut begins = Vec::new();
        let file = std::fs::File::open(path).map_err(|e| Error::io("open", path, e))?;
        file.take(BEGIN).read_to_end(&mut begins).map_err(|e| Error::io("read", path, e))?;
        let text = String::from_utf8_lossy(&begins);
        let (name, word) = self.is();
        let is_one = text.trim_start().starts_with('{') && text.contains(word) && !text.contains('\0');
        match is_one || begins.is_empty() {
            true => Ok(()),
            false => Err(Error::misuse(format!("exists already, and is no {name}"))
                .at(path)
                .hint("give another name, or remove it first")),
        }
    }

    /// Writes it. A device, a pipe or what is open already is written to; files are replaced.
    fn write(self, path: &Path, text: &str) -> Result<()> {
        let failed = |e| Error::io("write", path, e);
        if is_stream(path) {
            // A pipe waits for its reader, and nothing else is left to be ended in order.
            ui::patience(0);
            let mut file = std::fs::OpenOptions::new().append(true).open(path).map_err(failed)?;
            return file.write_all(text.as_bytes()).map_err(failed);
        }
        self.check(path)?;
        let stage = Stage::files_at(&[(path.to_path_buf(), text.len() as u64)], true)?;
        stage.files().iter().try_for_each(|file| file.write_at(0, text.as_bytes()))?;
        stage.commit()
    }
}

/// Bytes that tell a log or a list.
const BEGIN: u64 = 1024;

/// Whether a path leads to stdout.
fn is_stdout(path: &Path) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|name| path == Path::new(name))
}

/// Whether a path leads to a device or a pipe, or to what this program has open: nothing that is replaced.
fn is_stream(path: &Path) -> bool {
    let link = std::fs::read_link(path).unwrap_or_default();
    let is_open = |path: &Path| path.starts_with("/proc/self/fd") || path.starts_with("/dev/fd");
    is_open(path)
        || is_open(&link)
        || std::fs::metadata(path).is_ok_and(|meta| !meta.is_file() && !meta.is_dir())
}

/// What a file holds, before it is loaded; nothing is said where there is nothing.
pub fn beforehand(file: &Path, work: &WorkArgs, limits: &Limits) -> Result<Scan> {
    let options = scan::Options { tensors: false, sha256: false, limits: limits.clone() };
    scan::scan(&[file.to_path_buf()], &options, &Budget::new(Some(1), None)?, &qconv::convert::Silent)
        .inspect(|found| findings(found, work.quiet))
}

/// What `--json` prints.
pub fn summary(found: &Scan) -> Json {
    json!({
        "schema": SCHEMA,
        "files": found.files,
        "findings": found.findings,
        "unchecked": found.unchecked,
        "summary": {
            "files": found.files.len(),
            "errors": found.count(Severity::Error),
            "warnings": found.count(Severity::Warning),
            "notes": found.count(Severity::Note),
            "unchecked": found.unchecked.len(),
        },
    })
}

/// A report of the checks with what a scan found.
pub fn joined(report: &Report, found: &Scan) -> serde_json::Result<Json> {
    let mut json = summary(found);
    if let (Some(json), Json::Object(report)) = (json.as_object_mut(), serde_json::to_value(report)?) {
        json.extend(report);
    }
    Ok(json)
}

fn findings(found: &Scan, quiet: bool) {
    for Finding { rule, severity, message, file, offset, hint, .. } in &found.findings {
        if quiet && *severity != Severity::Error {
            continue;
        }
        let at = offset.map_or(String::new(), |o| format!(" at byte {o}"));
        ui::say(&format!(
            "{:>7}  {} {}: {}{at}: {message}",
            severity.name(),
            rule.id,
            rule.name,
            file.display()
        ));
        if let Some(hint) = hint.as_ref().filter(|_| !quiet) {
            ui::say(&format!("           hint: {hint}"));
        }
    }
}

fn say(found: &Scan, quiet: bool) {
    findings(found, quiet);
    let with_findings = |file: &Path| found.findings.iter().any(|f| f.file == *file);
    if quiet {
        return;
    }
    for file in found.files.iter().filter(|f| !with_findings(&f.path)).take(MOST_LINES) {
        ui::say(&format!("     ok  {} ({})", file.path.display(), file.format));
    }
    for one in found.unchecked.iter().skip(usize::from(found.is_clean(true))) {
        ui::say(&format!("unchecked  {}", one.error));
    }
    ui::say(&format!(
        "{} files: {} errors, {} warnings, {} notes, {} not checked",
        found.files.len(),
        found.count(Severity::Error),
        found.count(Severity::Warning),
        found.count(Severity::Note),
        found.unchecked.len()
    ));
}

/// Most lines about files with which nothing is wrong.
const MOST_LINES: usize = 100;

/// As `sha256sum` prints them, so that it can check them.
fn sums(found: &Scan, verbose: bool) -> Result<()> {
    let mut out = ui::stdout();
    let mut line = |text: String| writeln!(out, "{text}").map_err(|e| Error::io("write", "stdout", e));
    for file in &found.files {
        if let Some(sum) = &file.sha256 {
            line(format!("{sum}  {}", file.path.display()))?;
        }
        for tensor in file.tensors.iter().filter(|_| verbose) {
            line(format!("{}  {} {} {:?}", tensor.sha256, tensor.name, tensor.dtype, tensor.shape))?;
        }
    }
    Ok(())
}
