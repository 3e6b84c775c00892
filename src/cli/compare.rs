//! `qconv eval compare`: several models in one table.

use std::path::{Path, PathBuf};

use qconv::convert::Stage;
use qconv::error::{Error, Result};
use qconv::eval::engine::{Engine, Size};
use qconv::eval::picture::Picture;
use qconv::eval::plot::{Point, kld_over_size};
use qconv::eval::score::{Base, Divergence, DivergenceSummary, log_norm};
use serde::Serialize;
use serde_json::Value as Json;

use super::eval::{TextArgs, Watch, plus_minus, same_windows};
use super::ui;

/// A line of the table.
#[derive(Serialize)]
struct Row {
    model: PathBuf,
    bytes: u64,
    bits_per_weight: f64,
    tokens_per_second: f64,
    converted: Json,
    #[serde(flatten)]
    divergence: DivergenceSummary,
}

/// How the table is written to a file.
#[derive(Clone, Copy)]
pub enum Form {
    Csv,
    Svg,
    Png,
}

impl Form {
    fn bytes(self, rows: &[Row]) -> Vec<u8> {
        match self {
            Self::Csv => table(rows).into_bytes(),
            Self::Svg => picture(rows).to_svg().into_bytes(),
            Self::Png => picture(rows).to_png(),
        }
    }
}

/// Where the table goes beside stdout.
///
/// # Errors
/// `Misuse` for a picture of no known format.
pub fn files(csv: Option<&Path>, plots: &[PathBuf]) -> Result<Vec<(PathBuf, Form)>> {
    let mut files: Vec<_> = csv.map(|path| (path.to_path_buf(), Form::Csv)).into_iter().collect();
    for path in plots {
        let form = match path.extension().map(|e| e.to_ascii_lowercase()) {
            Some(e) if e == "svg" => Form::Svg,
            Some(e) if e == "png" => Form::Png,
            _ => return Err(Error::misuse("a picture's name ends in .svg or .png").at(path)),
        };
        files.push((path.clone(), form));
    }
    Ok(files)
}

fn picture(rows: &[Row]) -> Picture {
    let point = |r: &Row| Point {
        name: r.model.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        bytes: r.bytes,
        bits_per_weight: r.bits_per_weight,
        kld: r.divergence.kld,
    };
    let points: Vec<Point> = rows.iter().map(point).collect();
    // There are at least two models; the first is the base.
    kld_over_size(&points[0], &points[1..])
}

/// Compares the models, the first being the base.
///
/// # Errors
/// What cannot be run, read or written.
pub fn compare(
    paths: &[PathBuf],
    files: &[(PathBuf, Form)],
    force: bool,
    args: &TextArgs,
) -> anyhow::Result<()> {
    // What cannot be written shall show before the work.
    let outputs: Vec<_> = files.iter().map(|(path, _)| (path.clone(), 0)).collect();
    let stage = if outputs.is_empty() { None } else { Some(Stage::files_at(&outputs, force)?) };
    let (mut runs, mut models) = (Vec::with_capacity(paths.len()), Vec::with_capacity(paths.len()));
    for path in paths {
        let loaded = args.model(path)?;
        runs.push(loaded.runs);
        models.push(loaded.model);
    }
    let models: Vec<&dyn Engine> = models.iter().map(|m| &**m).collect();
    let named: Vec<(&Path, &dyn Engine)> =
        paths.iter().map(PathBuf::as_path).zip(models.iter().copied()).collect();
    let windows = same_windows(args, &named)?;
    let mut watch = Watch::new(&windows, args.quiet);
    let mut all = vec![Divergence::default(); models.len()];
    let times = windows.read(&models, args.threads(), |window, rows, next| {
        watch.at(window, String::new)?;
        if let Some(base) = rows.first() {
            let base = Base::Whole(base, log_norm(base));
            all.iter_mut().zip(rows).for_each(|(d, row)| d.add(row, base, next));
        }
        Ok(())
    })?;
    watch.finish(&named);
    let read = (windows.count() * (windows.n_ctx - 1)) as f64;
    let sizes = named.iter().map(|(path, model)| model.size().map_err(|e| e.at(path)));
    let sizes: Vec<Size> = sizes.collect::<Result<_>>()?;
    let rows: Vec<Row> = paths
        .iter()
        .zip(sizes)
        .zip(&all)
        .zip(times)
        .zip(&runs)
        .map(|((((path, size), divergence), time), runs)| Row {
            model: path.clone(),
            bytes: size.bytes,
            bits_per_weight: size.bytes as f64 * 8.0 / size.parameters.max(1) as f64,
            tokens_per_second: read / time.as_secs_f64().max(1e-9),
            converted: runs.json(),
            divergence: divergence.summary(),
        })
        .collect();
    for (file, (_, form)) in stage.iter().flat_map(Stage::files).zip(files) {
        file.write_at(0, &form.bytes(&rows))?;
    }
    stage.map_or(Ok(()), Stage::commit)?;
    if args.json {
        ui::print(serde_json::to_string_pretty(&rows)?)?;
    } else {
        say(&rows)?;
    }
    Ok(())
}

fn say(rows: &[Row]) -> qconv::Result<()> {
    let name = |r: &Row| r.model.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let width = rows.iter().map(|r| name(r).chars().count()).max().unwrap_or(0).max(5);
    ui::print(format_args!(
        "{:width$}  {:>9}  {:>6}  {:>20}  {:>21}  {:>9}  {:>8}  {:>8}",
        "model", "size", "bits/w", "perplexity", "KLD", "KLD 99 %", "same top", "tokens/s"
    ))?;
    for r in rows {
        let d = &r.divergence;
        ui::print(format_args!(
            "{:width$}  {:>9}  {:>6.2}  {:>20}  {:>21}  {:>9.6}  {:>6.2} %  {:>8.1}",
            name(r),
            ui::size(r.bytes),
            r.bits_per_weight,
            plus_minus(d.perplexity, 4),
            plus_minus(d.kld, 6),
            d.kld_99,
            100.0 * d.same_top.value,
            r.tokens_per_second
        ))?;
    }
    Ok(())
}

fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "model,bytes,bits_per_weight,perplexity,perplexity_error,kld,kld_error,kld_median,kld_99,kld_999,kld_max,\
         p_rms,same_top,tokens_per_second\n",
    );
    for r in rows {
        let d = &r.divergence;
        let quoted = r.model.to_string_lossy().replace('"', "\"\"");
        out += &format!(
            "\"{quoted}\",{},{:.4},{:.6},{:.6},{:.8},{:.8},{:.8},{:.8},{:.8},{:.8},{:.6},{:.6},{:.2}\n",
            r.bytes,
            r.bits_per_weight,
            d.perplexity.value,
            d.perplexity.error,
            d.kld.value,
            d.kld.error,
            d.kld_median,
            d.kld_99,
            d.kld_999,
            d.kld_max,
            d.p_rms.value,
            d.same_top.value,
            r.tokens_per_second
        );
    }
    out
}
