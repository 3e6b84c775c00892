//! Second moments: against transformers, against plain sums, and that neither threads nor memory nor a
//! sudden end shows in the file.
#![cfg(feature = "ggml")]

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use place::Place;
use qconv::calibrate::text::TextSource;
use qconv::container::moments::Moments;
use qconv::container::safetensors;
use qconv::ggml::{Context, ContextOptions, Logits, Model, ModelOptions, Node, Observer, Op};
use qconv::limits::Limits;
use serde_json::Value as Json;

fn converted(name: &str) -> Place {
    let place = Place::new();
    let source = common::fixture(name);
    let args = ["hf-to-gguf", source.to_str().unwrap(), "-o", "f32.gguf", "-t", "f32", "--no-verify", "-q"];
    place.succeeds(&args);
    place
}

fn moments(place: &Place, name: &str) -> Moments {
    Moments::open(place.path(name), &Limits::default()).unwrap()
}

fn calibrate(place: &Place, output: &str, args: &[&str]) -> Json {
    let all = [&["calibrate", "f32.gguf", "-o", output, "-q", "--json"], args].concat();
    serde_json::from_slice(&place.succeeds(&all).stdout).unwrap()
}

/// tests/peers/moments.py has the recipe, and compares with more.
#[test]
fn transformers_has_the_same_moments() {
    let reference = safetensors::open(&common::fixture("tiny-llama/moments.safetensors"), &Limits::default());
    let store = reference.unwrap().store;
    let raw = |name: &str| store.read_all(store.get(name).unwrap()).unwrap();
    let values = |name: &str| -> Vec<f64> {
        raw(name).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect()
    };
    let ids: Vec<i32> = raw("input_ids").as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
    let place = converted("tiny-llama");
    let model = Model::load(place.path("f32.gguf"), &ModelOptions::default()).unwrap();
    let text: Vec<u8> = ids.iter().flat_map(|&id| model.token_to_piece(id, true).unwrap()).collect();
    fs::write(place.path("text.txt"), text).unwrap();
    let tensors = r"blk\.1\.(attn_k|ffn_down)";
    calibrate(&place, "m", &["--text", "text.txt", "--layers", "1", "--tensors", tensors]);
    let m = moments(&place, "m");
    assert_eq!(m.contents().inputs.len(), 2);
    // What k reads is what q and v read.
    let attention = m.input_of("blk.1.attn_k.weight").unwrap();
    assert_eq!(attention.name, "blk.1.attn_q.weight");
    assert_eq!(m.counts(attention).unwrap(), [ids.len() as u64]);
    let (ours, theirs) = (m.square(attention, 0).unwrap(), values("blk.1.attn_q.weight"));
    let n = attention.columns as usize;
    let mut packed = theirs.iter();
    for i in 0..n {
        for j in i..n {
            let scale = (ours[i * n + i] * ours[j * n + j]).sqrt();
            let theirs = packed.next().unwrap();
            assert!((ours[i * n + j] - theirs).abs() <= 1e-4 * scale, "{i} {j}: {}", ours[i * n + j]);
            assert_eq!(ours[i * n + j], ours[j * n + i]);
        }
    }
    let down = m.input_of("blk.1.ffn_down.weight").unwrap();
    let ours = m.square(down, 0).unwrap();
    let n = down.columns as usize;
    let (rows, diagonal) = (values("blk.1.ffn_down.weight.rows"), values("blk.1.ffn_down.weight.diagonal"));
    for (i, row) in rows.chunks_exact(n).enumerate() {
        for (j, theirs) in row.iter().enumerate() {
            let scale = (diagonal[i] * diagonal[j]).sqrt();
            assert!((ours[i * n + j] - theirs).abs() <= 1e-4 * scale, "{i} {j}: {}", ours[i * n + j]);
        }
    }
    assert!((0..n).all(|i| (ours[i * n + i] / diagonal[i] - 1.0).abs() < 1e-4));
}

/// Plain sums in f64 of one matrix: count, sum, sum of magnitudes, products.
type Plain = (u64, Vec<f64>, Vec<f64>, Vec<f64>);

/// Sums up what it is shown, one token after another.
#[derive(Default)]
struct Summer(BTreeMap<(String, u64), Plain>);

impl Observer for Summer {
    fn wants(&mut self, node: &Node<'_>) -> bool {
        node.op() != Op::Other && node.source(0).unwrap().name().starts_with("blk.")
    }

    fn see(&mut self, node: &Node<'_>) -> qconv::Result<()> {
        let (name, input) = (node.source(0).unwrap().name().into_owned(), node.source(1).unwrap());
        let [n, slots, ..] = input.shape();
        let mut scratch = Vec::new();
        let rows: Vec<&[f32]> = input.values(&mut scratch)?.chunks_exact(n).collect();
        let mut add = |expert: i32, x: &[f32]| {
            let zeros = || (0, vec![0.0; n], vec![0.0; n], vec![0.0; n * n]);
            let sums = self.0.entry((name.clone(), expert as u64)).or_insert_with(zeros);
            sums.0 += 1;
            for (i, &a) in x.iter().enumerate() {
                sums.1[i] += f64::from(a);
                sums.2[i] += f64::from(a.abs());
                x.iter().zip(&mut sums.3[i * n..]).for_each(|(&b, s)| *s += f64::from(a) * f64::from(b));
            }
        };
        if node.op() == Op::MulMat {
            rows.iter().for_each(|x| add(0, x));
            return Ok(());
        }
        let ids = node.source(2).unwrap();
        let used = ids.shape()[0];
        for (i, expert) in ids.integers()?.into_iter().enumerate() {
            add(expert, rows[i / used * slots + i % used % slots]);
        }
        Ok(())
    }
}

#[test]
fn experts_have_their_own() {
    for name in ["models/mixtral", "models/qwen2_moe", "models/llama"] {
        let place = converted(name);
        let args = ["--ctx", "48", "--chunks", "3", "-j", "2"];
        calibrate(&place, "m", &args);
        let model = Model::load(place.path("f32.gguf"), &ModelOptions::default()).unwrap();
        let source = TextSource { n_ctx: 48, most: Some(3), ..TextSource::default() };
        let options = ContextOptions { n_ctx: 48, exact: true, observed: true, ..ContextOptions::default() };
        let mut context = Context::new(&model, &options).unwrap();
        let mut plain = Summer::default();
        for window in source.windows(&model).unwrap().each() {
            context.clear();
            context.decode_observed(&window, Logits::All, &mut plain).unwrap();
        }
        let m = moments(&place, "m");
        let mut checked = 0;
        for ((weight, expert), (count, sum, sum_abs, products)) in &plain.0 {
            let input = m.input_of(weight).unwrap_or_else(|| panic!("{name} lacks {weight}"));
            let n = input.columns as usize;
            assert_eq!(m.counts(input).unwrap()[*expert as usize], *count, "{name} {weight} {expert}");
            let square = m.square(input, *expert).unwrap();
            for (at, (ours, theirs)) in square.iter().zip(products).enumerate() {
                let scale = (products[at / n * (n + 1)] * products[at % n * (n + 1)]).sqrt();
                assert!((ours - theirs).abs() <= 2e-5 * scale, "{name} {weight} {expert} {at}");
            }
            let vectors = [(m.sum(input, *expert), sum), (m.sum_abs(input, *expert), sum_abs)];
            for (ours, theirs) in vectors {
                let near = |(a, (b, s)): (&f32, (&f64, &f64))| (f64::from(*a) - b).abs() <= 1e-6 * s;
                assert!(ours.unwrap().iter().zip(theirs.iter().zip(sum_abs)).all(near), "{name} {weight}");
            }
            checked += 1;
        }
        let weights: usize = m.contents().inputs.iter().map(|i| i.weights.len()).sum();
        let names: std::collections::BTreeSet<_> = plain.0.keys().map(|(n, _)| n).collect();
        assert_eq!(weights, names.len(), "{name}");
        assert!(checked >= 14, "{name}: {checked}");
    }
}

#[test]
fn threads_and_memory_do_not_show() {
    let place = converted("models/mixtral");
    let args = ["--ctx", "64", "--chunks", "3"];
    let passes = |output: &str, more: &[&str]| {
        let made = calibrate(&place, output, &[&args[..], more].concat());
        made["passes"].as_u64().unwrap()
    };
    assert_eq!(passes("whole", &["-j", "1"]), 1);
    assert_eq!(passes("threads", &["-j", "2"]), 1);
    assert!(passes("memory", &["-j", "2", "--max-memory", "700K"]) > 2);
    let whole = fs::read(place.path("whole")).unwrap();
    assert!(whole == fs::read(place.path("threads")).unwrap());
    assert!(whole == fs::read(place.path("memory")).unwrap());
    // --dry-run says the same beforehand.
    let args = [&["calibrate", "f32.gguf", "-o", "no", "-q", "--json", "--dry-run"], &args[..]].concat();
    let plan: Json = serde_json::from_slice(&place.succeeds(&args).stdout).unwrap();
    assert_eq!((plan["passes"].as_u64(), plan["bytes"].as_u64()), (Some(1), Some(whole.len() as u64)));
    assert!(!place.path("no").exists());
    let hidden =
        place.listing().into_keys().filter(|p| p.file_name().unwrap().to_string_lossy().starts_with('.'));
    assert_eq!(hidden.count(), 0);
}

/// Killed again and again, in every pass.
#[cfg(unix)]
#[test]
fn a_killed_run_goes_on() {
    let place = converted("models/mixtral");
    let args = ["calibrate", "f32.gguf", "--ctx", "64", "--chunks", "12", "-q", "-j", "1", "--json"];
    place.succeeds(&[&args[..], &["-o", "whole", "--max-memory", "1M"]].concat());
    let again = [&args[..], &["-o", "out", "--max-memory", "1M", "--save-every", "0"]].concat();
    let state = place.path(".out.qconv-state");
    let mut kills = 0;
    let mut finished = None;
    while finished.is_none() {
        let before = fs::read(&state).ok();
        let mut child = Command::new(env!("CARGO_BIN_EXE_qconv"));
        let child =
            child.args(&again).current_dir(place.0.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().unwrap();
        let begun = Instant::now();
        // A few windows further than last time.
        let mut changes = 0;
        let mut last = before;
        while child.try_wait().unwrap().is_none() && (kills >= 4 || changes < 3) {
            let now = fs::read(&state).ok();
            changes += u32::from(now != last);
            last = now;
            assert!(begun.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_millis(1));
        }
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            assert!(!place.path("out").exists() && state.exists());
            if kills == 1 {
                let other = [&args[..], &["-o", "out", "--layers", "0"]].concat();
                place.refuses(&other, &["unfinished", "--force"]);
            }
        } else {
            finished = Some(child.wait_with_output().unwrap());
        }
    }
    let finished = finished.unwrap();
    assert!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
    assert!(kills > 0, "nothing was killed");
    let summary: Json = serde_json::from_slice(&finished.stdout).unwrap();
    assert_eq!(summary["resumed"], true);
    assert!(fs::read(place.path("out")).unwrap() == fs::read(place.path("whole")).unwrap());
    assert!(!state.exists() && !place.path(".out.qconv-partial").exists());
}

/// Ctrl-C keeps the work, and another budget takes it over.
#[cfg(unix)]
#[test]
fn an_interrupted_run_goes_on() {
    let place = converted("models/mixtral");
    let args = ["calibrate", "f32.gguf", "--ctx", "64", "--chunks", "60", "-q", "-j", "1"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_qconv"));
    let child = child.args([&args[..], &["-o", "out", "--save-every", "0"]].concat());
    let mut child = child.current_dir(place.0.path()).stderr(Stdio::piped()).spawn().unwrap();
    while !place.path(".out.qconv-state").exists() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    let kill = Command::new("kill").args([common::interrupt(), &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("goes on from here"), "{message}");
    place.succeeds(&[&args[..], &["-o", "out", "--max-memory", "1M"]].concat());
    place.succeeds(&[&args[..], &["-o", "whole"]].concat());
    assert!(fs::read(place.path("out")).unwrap() == fs::read(place.path("whole")).unwrap());
}

#[test]
fn files_add_up() {
    let place = converted("models/mixtral");
    let part = |output: &str, args: &[&str]| {
        calibrate(&place, output, &[&["--ctx", "64", "--layers", "0"], args].concat());
    };
    part("all", &["--chunks", "4"]);
    part("first", &["--chunks", "2"]);
    part("second", &["--from-chunk", "2", "--chunks", "2"]);
    calibrate(&place, "layer1", &["--ctx", "64", "--layers", "1", "--chunks", "2"]);
    let merge = |output: &str, files: &[&str]| {
        place.succeeds(&[&["calibrate", "-q", "-o", output, "--merge"], files].concat());
    };
    merge("sum", &["first", "second", "layer1"]);
    let (all, sum) = (moments(&place, "all"), moments(&place, "sum"));
    assert_eq!(sum.contents().texts.len(), 2);
    assert!(sum.contents().inputs.len() > all.contents().inputs.len());
    for input in &all.contents().inputs {
        assert_eq!(sum.counts(input).unwrap(), all.counts(input).unwrap());
        for expert in 0..input.experts {
            let (a, b) = (all.square(input, expert).unwrap(), sum.square(input, expert).unwrap());
            let n = input.columns as usize;
            for (at, (x, y)) in a.iter().zip(&b).enumerate() {
                let scale = (a[at / n * (n + 1)] * a[at % n * (n + 1)]).sqrt();
                assert!((x - y).abs() <= 1e-5 * scale, "{} {expert} {at}: {x} {y}", input.name);
            }
        }
    }
    // The other layer is as it was, and of one file nothing changes.
    merge("one", &["layer1"]);
    assert!(fs::read(place.path("one")).unwrap() == fs::read(place.path("layer1")).unwrap());
    let twice = ["calibrate", "-o", "x", "--merge", "first", "first"];
    place.refuses(&twice, &["first", "counts the text", "again"]);
}

#[test]
fn what_cannot_be_done_is_refused() {
    let place = converted("models/mixtral");
    let refuses = |args: &[&str], says: &[&str]| {
        place.refuses(
            &[&["calibrate", "f32.gguf", "-q", "--ctx", "64", "--chunks", "1"], args].concat(),
            says,
        );
    };
    refuses(&["-o", "f32.gguf"], &["would overwrite its own input"]);
    fs::write(place.path("other.gguf"), "mine").unwrap();
    refuses(&["-o", "other.gguf"], &["exists already", "--force"]);
    refuses(&["-o", "out", "--layers", "9"], &["none of", "--layers"]);
    refuses(&["-o", "out", "--max-memory", "64K"], &["too few", "needed", "--max-memory"]);
    refuses(&["-o", "no/out"], &["no"]);
    place.refuses(&["calibrate", "none.gguf", "-o", "out"], &["none.gguf"]);
    place.refuses(&["calibrate", "-o", "out", "--merge", "f32.gguf"], &["f32.gguf", "no second moments"]);
    // Encoders work, with a separate encoder nothing does.
    for (name, works) in [("models/bert", true), ("models/t5", false)] {
        let place = converted(name);
        let args = ["calibrate", "f32.gguf", "-o", "out", "-q", "--ctx", "32", "--chunks", "2"];
        if works {
            place.succeeds(&args);
            let m = moments(&place, "out");
            assert!(m.contents().inputs.iter().all(|i| m.counts(i).unwrap() == [64]));
        } else {
            place.refuses(&args, &["encoder"]);
        }
    }
}

#[test]
fn files_that_lie() {
    let place = converted("models/llama");
    calibrate(&place, "m", &["--ctx", "32", "--chunks", "1", "--layers", "0"]);
    let sound = fs::read(place.path("m")).unwrap();
    let opened = |bytes: &[u8]| {
        fs::write(place.path("bad"), bytes).unwrap();
        Moments::open(place.path("bad"), &Limits::default())
    };
    assert!(opened(&sound).is_ok());
    let refused = |find: &[u8], put: &[u8], says: &str| {
        let at = sound.windows(find.len()).position(|w| w == find).unwrap();
        let mut bytes = sound.clone();
        bytes[at..at + put.len()].copy_from_slice(put);
        let error = opened(&bytes).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("bad"), "{says}: {error}");
    };
    refused(b"moments.version", b"moments.versiom", "no second moments");
    refused(b"moments.version\x04\0\0\0\x01", b"moments.version\x04\0\0\0\x09", "version 9");
    refused(b"attn_q.weight.in_sum_abs", b"attn_q.weight.in_sum_abc", "no tensor");
    refused(b"moments.inputs", b"moments.inputz", "moments.inputs");
    refused(b"moments.model", b"moments.modem", "moments.model");
    // Each shorter file is refused, but for the padding at its end.
    for len in (0..sound.len() - 32).step_by(971) {
        assert!(opened(&sound[..len]).is_err(), "{len} bytes");
    }
    // Values that are no sums: in the first triangle's first number.
    let m = opened(&sound).unwrap();
    let first = m.contents().inputs[0].clone();
    let layout = m.contents().layout().unwrap();
    for value in [f32::NAN, f32::INFINITY, -1.0] {
        let mut bytes = sound.clone();
        let at = layout.1[0].moments as usize;
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let error = opened(&bytes).unwrap().square(&first, 0).unwrap_err().to_string();
        assert!(error.contains("no sums of squares"), "{error}");
    }
    let mut bytes = sound.clone();
    let at = layout.1[0].counts as usize;
    bytes[at..at + 8].copy_from_slice(&(-1i64).to_le_bytes());
    assert!(opened(&bytes).unwrap_err().to_string().contains("negative"));
    assert!(m.square(&first, 1).is_err());
}

/// A model whose moments take 134 MB, with and without room for them.
#[cfg(unix)]
#[test]
fn memory_stays_within_the_budget() {
    use wait4::Wait4;
    const WIDTH: u64 = 4096;
    let place = Place::new();
    let mut made = checkpoint::Made::of(&common::fixture("tiny-llama"));
    made.config["intermediate_size"] = WIDTH.into();
    made.config["num_hidden_layers"] = 2.into();
    made.tensors.retain(|(name, _)| !name.contains("layers.2") && !name.contains("layers.3"));
    for (name, (_, shape, data)) in &mut made.tensors {
        if name.contains(".mlp.") {
            let wide = shape.iter_mut().find(|n| **n == 768).unwrap();
            *wide = WIDTH;
            let n = shape.iter().product::<u64>();
            let small = |i: u64| {
                let noise = (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f32 / 8_388_608.0 - 1.0;
                ((noise * 0.02).to_bits() >> 16) as u16
            };
            *data = (0..n).flat_map(|i| small(i).to_le_bytes()).collect();
        }
    }
    made.write(&place.path("hf"), &common::fixture("tiny-llama"));
    place.succeeds(&["hf-to-gguf", "hf", "-o", "f32.gguf", "-t", "f32", "--no-verify", "-q"]);
    let peak = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qconv"));
        command.args(["calibrate", "f32.gguf", "-q", "-j", "1", "--ctx", "16", "--chunks", "1"]).args(args);
        let used =
            command.current_dir(place.0.path()).stdout(Stdio::null()).spawn().unwrap().wait4().unwrap();
        assert!(used.status.success(), "{args:?}");
        used.rusage.maxrss
    };
    let without = peak(&["-o", "none", "--dry-run"]);
    let budget = 32u64 << 20;
    let within = peak(&["-o", "within", "--max-memory", "32M", "--save-every", "0"]);
    let whole = peak(&["-o", "whole"]);
    println!("{without} without, {within} within {budget}, {whole} whole");
    // Less than the 134 MB: what the system takes back meanwhile is not counted.
    assert!(whole > within + (80 << 20), "the moments are not what takes the memory: {whole}");
    // Activations of a whole window instead of a few tokens are llama.cpp's.
    let slack = 12 << 20;
    assert!(within < without + budget + slack, "{within} of {without} + {budget}");
    assert!(fs::read(place.path("within")).unwrap() == fs::read(place.path("whole")).unwrap());
}
