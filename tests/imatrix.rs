//! `qconv imatrix`: llama.cpp's values, in its format; sums of several; a killed run goes on.

mod common;
#[path = "common/place.rs"]
mod place;

use std::fs;
use std::path::Path;

use place::Place;
use qconv::container::imatrix::{ImportanceMatrix, Sums};
use qconv::limits::Limits;
use serde_json::Value as Json;

fn recorded(name: &str) -> String {
    common::fixture(&format!("imatrix/{name}")).to_str().unwrap().to_string()
}

fn read(path: impl AsRef<Path>) -> (ImportanceMatrix, Vec<(String, Sums)>) {
    let matrix = ImportanceMatrix::open(path, &Limits::default()).unwrap();
    let sums = matrix.entries.iter().map(|(n, e)| (n.clone(), matrix.sums(n, e, 512).unwrap())).collect();
    (matrix, sums)
}

/// The largest relative difference of two files' sums, after a look at everything else.
#[track_caller]
fn difference(a: impl AsRef<Path>, b: impl AsRef<Path>) -> f64 {
    let ((a, a_sums), (b, b_sums)) = (read(a), read(b));
    assert_eq!((a.chunks, a.datasets), (b.chunks, b.datasets));
    assert_eq!(a_sums.len(), b_sums.len());
    let mut worst = 0f64;
    for ((name, a), (other, b)) in a_sums.iter().zip(&b_sums) {
        assert_eq!((name, &a.counts, a.squares.len()), (other, &b.counts, b.squares.len()));
        for (a, b) in a.squares.iter().zip(&b.squares) {
            worst = worst.max((a - b).abs() / a.abs().max(b.abs()).max(1e-30));
        }
    }
    worst
}

fn json(place: &Place, args: &[&str]) -> Json {
    serde_json::from_slice(&place.succeeds(args).stdout).unwrap()
}

/// tests/peers/imatrix.sh recorded these tables; ours are computed from the same sums.
#[test]
fn statistics_are_llama_cpps() {
    let place = Place::new();
    for name in ["tiny-llama", "mixtral"] {
        let file = recorded(&format!("{name}.gguf"));
        let found = json(&place, &["imatrix", "--in-file", &file, "--show-statistics", "--json", "-q"]);
        let tensors = found["statistics"]["tensors"].as_array().unwrap();
        let layers = found["statistics"]["layers"].as_array().unwrap();
        let table = fs::read_to_string(recorded(&format!("{name}.statistics"))).unwrap();
        let (mut rows, mut averages) = (0, 0);
        for line in table.lines() {
            let cells: Vec<_> = line.split('\t').map(|c| c.trim().trim_end_matches('%').trim()).collect();
            let close = |ours: &Json, percent: f64, cell: &str, what: &str| {
                let (ours, theirs) = (ours.as_f64().unwrap_or(0.0) * percent, cell.parse::<f64>().unwrap());
                // Half of the last digit, and what F32 loses.
                let digit = 0.1f64.powi(cell.split_once('.').map_or(0, |(_, d)| d.len() as i32));
                assert!(
                    (ours - theirs).abs() <= 0.51 * digit + 1e-5 * theirs.abs(),
                    "{line}: {what}: {ours}, not {theirs}"
                );
            };
            if cells.len() == 13 {
                let t = tensors
                    .iter()
                    .find(|t| {
                        let layer = t["layer"].as_u64().map_or("-".to_string(), |l| l.to_string());
                        let dotted = format!(".{}.weight", cells[1]);
                        layer == cells[0] && format!(".{}", t["tensor"].as_str().unwrap()).ends_with(&dotted)
                    })
                    .unwrap_or_else(|| panic!("{line}"));
                let keys = ["sum", "min", "max", "mean", "std", "active", "n", "entropy", "entropy_share"];
                let keys = keys.iter().chain(&["outliers", "similarity"]);
                for (key, cell) in keys.zip(&cells[2..]) {
                    let percent = ["active", "entropy_share", "outliers"].contains(key);
                    close(&t[key], if percent { 100.0 } else { 1.0 }, cell, key);
                }
                rows += 1;
            } else {
                let layer: u64 = cells[0].parse().unwrap();
                let l = layers.iter().find(|l| l["layer"] == layer).unwrap();
                close(&l["sum"], 1.0, cells[1], "sum");
                close(&l["outliers"], 100.0, cells[2], "outliers");
                close(&l["similarity"], 1.0, cells[3], "similarity");
                averages += 1;
            }
        }
        assert_eq!((rows, averages), (tensors.len(), layers.len()));
        assert!(rows > 10 && averages > 1);
    }
}

#[test]
fn several_add_up() {
    let place = Place::new();
    let (tiny, mixtral) = (recorded("tiny-llama.gguf"), recorded("mixtral.gguf"));
    place.succeeds(&["imatrix", "--in-file", &mixtral, "-o", "one.gguf", "-q"]);
    assert_eq!(fs::read(place.path("one.gguf")).unwrap(), fs::read(&mixtral).unwrap());
    place.succeeds(&["imatrix", "--in-file", &mixtral, "--in-file", "one.gguf", "-o", "two.gguf", "-q"]);
    let ((two, two_sums), (_, one_sums)) = (read(place.path("two.gguf")), read(&mixtral));
    assert_eq!((two.chunks, two.datasets.len()), (Some(8), 2));
    for ((name, two), (_, one)) in two_sums.iter().zip(&one_sums) {
        assert!(two.squares.iter().zip(&one.squares).all(|(two, one)| *two == 2.0 * one), "{name}");
        assert!(two.counts.iter().zip(&one.counts).all(|(two, one)| *two == 2 * one), "{name}");
    }
    // The flat format keeps means: the sums come back but for their rounding.
    let flat = ["imatrix", "--in-file", &tiny, "-o", "tiny.dat", "--output-format", "dat", "-q"];
    place.succeeds(&flat);
    place.succeeds(&["imatrix", "--in-file", "tiny.dat", "-o", "back.gguf", "-q"]);
    let worst = difference(place.path("back.gguf"), &tiny);
    assert!(worst < 3e-7, "{worst}");
    let both = ["imatrix", "--in-file", &tiny, "--in-file", &mixtral, "-o", "no.gguf"];
    place.refuses(&both, &["mixtral.gguf", "attn_k.weight", "the same model"]);
    place.refuses(&["imatrix", "--in-file", &tiny, "-o", "back.gguf"], &["back.gguf", "--force"]);
    fs::write(place.path("bad.gguf"), b"GGUF").unwrap();
    place.refuses(&["imatrix", "--in-file", "bad.gguf", "-o", "no.gguf"], &["bad.gguf"]);
    let mut bytes = fs::read(&tiny).unwrap();
    let end = bytes.len();
    // The last tensor but one byte's padding: the count; before it the sums of output.weight.
    bytes[end - 32 - 4..end - 32].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(place.path("nan.gguf"), bytes).unwrap();
    place.refuses(
        &["imatrix", "--in-file", "nan.gguf", "-o", "no.gguf"],
        &["nan.gguf", "output.weight", "NaN"],
    );
}

#[cfg(feature = "ggml")]
mod with_a_model {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// The fixture in F32, and the text beside it under the name it was recorded with.
    fn model(name: &str) -> Place {
        let place = Place::new();
        let source = common::fixture(name);
        let args = ["hf-to-gguf", source.to_str().unwrap(), "-o", "model.gguf", "--no-verify", "-q"];
        place.succeeds(&[&args[..], &["--type", "f32"]].concat());
        fs::copy(common::fixture("tiny-llama/calibration.txt"), place.path("calibration.txt")).unwrap();
        place
    }

    const TEXT: &[&str] = &["--text", "calibration.txt", "-j", "1", "-q"];

    /// llama.cpp's own tool, linked with the same library, recorded these. Its sums in F32 are 4e-6 off
    /// by themselves. Where the compiler is another, so is the rounding of the model's computation.
    const BOUND: f64 = if cfg!(all(target_os = "linux", target_arch = "x86_64")) { 1e-5 } else { 1e-3 };

    #[test]
    fn values_are_llama_cpps() {
        for (name, source) in [("tiny-llama", "tiny-llama"), ("mixtral", "models/mixtral")] {
            let place = model(source);
            let args =
                ["imatrix", "model.gguf", "-o", "ours.gguf", "--chunks", "4", "--process-output", "--json"];
            let summary = json(&place, &[&args[..], TEXT].concat());
            let worst = difference(place.path("ours.gguf"), recorded(&format!("{name}.gguf")));
            println!("{name}: {worst:e}");
            assert!(worst < BOUND, "{name}: {worst:e}");
            assert_eq!(summary["reading"]["tokens"], 2048);
            let experts = summary["experts"].as_array().unwrap();
            if name == "mixtral" {
                let tokens: Vec<u64> =
                    experts[1]["tokens"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
                assert_eq!((experts.len(), tokens.iter().sum::<u64>()), (2, 2 * 2048));
                assert_eq!(experts[1]["rarely_seen"], serde_json::json!([3]), "{tokens:?}");
            } else {
                assert!(experts.is_empty());
            }
        }
    }

    #[test]
    fn parts_make_a_whole() {
        let place = model("tiny-llama");
        let make = |args: &[&str]| place.succeeds(&[&["imatrix", "model.gguf"], args, TEXT].concat());
        make(&["-o", "all.gguf", "--chunks", "3"]);
        make(&["-o", "first.gguf", "--chunks", "1", "--no-ppl"]);
        make(&["-o", "sum.gguf", "--from-chunk", "1", "--chunks", "2", "--in-file", "first.gguf"]);
        let ((all, all_sums), (sum, sums)) = (read(place.path("all.gguf")), read(place.path("sum.gguf")));
        assert_eq!((all.chunks, sum.chunks), (Some(3), Some(3)));
        for ((name, all), (_, sum)) in all_sums.iter().zip(&sums) {
            assert_eq!(all.counts, sum.counts, "{name}");
            let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 2e-7 * a;
            assert!(all.squares.iter().zip(&sum.squares).all(close), "{name}");
        }
        assert!(!all_sums.iter().any(|(name, _)| name == "output.weight"));
        // A quantizer takes it.
        let args = ["quantize", "model.gguf", "q.gguf", "--type", "iq2_xs", "--imatrix", "all.gguf", "-q"];
        place.succeeds(&args);
    }

    #[test]
    fn a_killed_run_goes_on_and_ends_the_same() {
        let place = model("tiny-llama");
        let begin = ["imatrix", "model.gguf", "--chunks", "8", "--save-frequency", "1"];
        place.succeeds(&[&begin[..], &["-o", "whole.gguf"], TEXT].concat());
        let whole = fs::read(place.path("whole.gguf")).unwrap();
        let kept = place.path(".out.gguf.qconv-checkpoint");
        let args = [&begin[..], &["-o", "out.gguf"], TEXT].concat();
        for signal in ["-KILL", crate::common::interrupt()] {
            let mut child = Command::new(env!("CARGO_BIN_EXE_qconv"))
                .args(&args)
                .current_dir(place.0.path())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let begun = Instant::now();
            while !kept.exists() {
                assert!(child.try_wait().unwrap().is_none(), "it ended before it was stopped");
                assert!(begun.elapsed() < Duration::from_secs(120));
                std::thread::sleep(Duration::from_millis(1));
            }
            Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
            assert!(!child.wait().unwrap().success());
            assert!(kept.exists() && !place.path("out.gguf").exists());
            // More windows of the same text would go on too, other options would not.
            let dry = |more: &[&str]| json(&place, &[&args[..], &["--dry-run", "--json"], more].concat());
            let read = dry(&[])["read_already"].as_u64().unwrap();
            assert!((1..8).contains(&read), "{signal}: {read}");
            assert_eq!(dry(&["--process-output"])["read_already"], 0);
            assert_eq!(dry(&["--ctx", "256"])["read_already"], 0);
            let summary = json(&place, &[&args[..], &["--json"]].concat());
            assert_eq!(summary["reading"]["read_before"].as_u64(), Some(read));
            assert!(fs::read(place.path("out.gguf")).unwrap() == whole, "{signal}: other bytes");
            assert!(!kept.exists());
            fs::remove_file(place.path("out.gguf")).unwrap();
        }
        // What a file of that name holds that is no checkpoint does no harm.
        fs::write(&kept, b"GGUF and no more").unwrap();
        place.succeeds(&args);
        assert!(fs::read(place.path("out.gguf")).unwrap() == whole);
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        let place = model("tiny-llama");
        let refused = |args: &[&str], says: &[&str]| {
            place.refuses(&[&["imatrix", "model.gguf", "-o", "no.gguf"], args, TEXT].concat(), says);
        };
        refused(&["--ctx", "8"], &["at least 16"]);
        refused(&["--from-chunk", "500"], &["not one window", "after the first 500"]);
        refused(&["--chats", "none.jsonl", "--chunks", "900"], &["none.jsonl"]);
        place.refuses(&["imatrix", "calibration.txt", "-o", "no.gguf"], &["calibration.txt"]);
        fs::write(place.path("old.gguf"), "x").unwrap();
        place.refuses(&["imatrix", "model.gguf", "-o", "old.gguf"], &["old.gguf", "--force"]);
    }
}
