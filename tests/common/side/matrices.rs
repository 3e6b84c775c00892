//! What a quantization is guided by: importance matrices, second moments, baselines, tables of a mix.

use std::ffi::OsStr;
use std::fs;

use qconv::ErrorKind::{Limit, Malformed, Unsupported};
use qconv::container::imatrix::ImportanceMatrix;
use qconv::container::moments::Moments;
use qconv::eval::baseline::Baseline;
use qconv::limits::Limits;

use crate::common::fixture;
use crate::raw::{Raw, kind};
use crate::side::{Accepted, Expect, Place, Refused, check, damaged, small_gguf};

/// Opens an importance matrix and looks at all of it.
fn look(path: &std::path::Path) -> qconv::Result<()> {
    let matrix = ImportanceMatrix::open(path, &Limits::default())?;
    for (name, entry) in &matrix.entries {
        matrix.examine(entry)?;
        matrix.sums(name, entry, 512)?;
    }
    Ok(())
}

/// By the library, and as `--imatrix` of a quantization.
#[track_caller]
fn guides(place: &Place, case: &str, bytes: &[u8], expect: Expect) {
    place.put("m", bytes);
    let path = place.path("m");
    check(case, look(&path), expect);
    let output = place.output();
    let args = ["quantize".as_ref(), small_gguf().as_os_str(), output.as_os_str()];
    let more: [&OsStr; 5] =
        ["-t".as_ref(), "q4_k_m".as_ref(), "-q".as_ref(), "--imatrix".as_ref(), path.as_os_str()];
    if let Refused(..) = expect {
        place.program(case, &[&args[..], &more].concat(), expect);
    }
    let args = ["imatrix".as_ref(), "--in-file".as_ref(), path.as_os_str(), "--show-statistics".as_ref()];
    place.program(case, &args, expect);
}

fn n32(n: i32) -> [u8; 4] {
    n.to_le_bytes()
}

/// The flat format: number of entries, then these.
fn flat(n: i32, entries: &[Vec<u8>]) -> Vec<u8> {
    [&n32(n)[..], &entries.concat()].concat()
}

fn entry(len: i32, name: &[u8], calls: i32, values: i32, data: &[f32]) -> Vec<u8> {
    let data = data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    [&n32(len)[..], name, &n32(calls), &n32(values), &data].concat()
}

#[test]
fn flat_matrices() {
    let place = Place::new();
    let good = entry(5, b"a.wei", 1, 2, &[1.0, 2.0]);
    let max = i32::MAX;
    for (case, bytes, expect) in [
        ("sound", flat(1, std::slice::from_ref(&good)), Accepted),
        ("empty", Vec::new(), Refused(Malformed, "beyond the file")),
        ("no entries", flat(0, &[]), Refused(Malformed, "0 entries")),
        ("-1 entries", flat(-1, std::slice::from_ref(&good)), Refused(Malformed, "is negative")),
        ("2^31 entries", flat(max, std::slice::from_ref(&good)), Refused(Malformed, "2147483647 entries")),
        ("name of -1", flat(1, &[entry(-1, b"a.wei", 1, 2, &[1.0, 2.0])]), Refused(Malformed, "is negative")),
        (
            "name of 2^31",
            flat(1, &[entry(max, b"a.wei", 1, 2, &[1.0, 2.0])]),
            Refused(Malformed, "2147483647 bytes"),
        ),
        (
            "name beyond",
            flat(1, &[entry(900, b"a.wei", 1, 2, &[1.0, 2.0])]),
            Refused(Malformed, "beyond the file"),
        ),
        (
            "no UTF-8",
            flat(1, &[entry(2, b"\xff\xfe", 1, 2, &[1.0, 2.0])]),
            Refused(Malformed, "is not UTF-8"),
        ),
        ("no values", flat(1, &[entry(5, b"a.wei", 1, 0, &[1.0, 2.0])]), Refused(Malformed, "has 0 values")),
        ("-2 values", flat(1, &[entry(5, b"a.wei", 1, -2, &[1.0, 2.0])]), Refused(Malformed, "is negative")),
        (
            "2^31 values",
            flat(1, &[entry(5, b"a.wei", 1, max, &[1.0, 2.0])]),
            Refused(Malformed, "2147483647 values"),
        ),
        ("-1 calls", flat(1, &[entry(5, b"a.wei", -1, 2, &[1.0, 2.0])]), Refused(Malformed, "is negative")),
        ("2^31 calls", flat(1, &[entry(5, b"a.wei", max, 2, &[1.0, 2.0])]), Accepted),
        ("no calls", flat(1, &[entry(5, b"a.wei", 0, 2, &[1.0, 2.0])]), Accepted),
        ("twice", flat(2, &[good.clone(), good.clone()]), Refused(Malformed, "\"a.wei\" appears twice")),
        ("fewer", flat(2, std::slice::from_ref(&good)), Refused(Malformed, "2 entries")),
        (
            "data name of 2^31",
            [flat(1, std::slice::from_ref(&good)), n32(1).to_vec(), n32(max).to_vec()].concat(),
            Accepted,
        ),
    ] {
        guides(&place, case, &bytes, expect);
    }
    let whole = flat(1, &[good]);
    for (case, bytes) in damaged(&whole) {
        place.put("m", bytes);
        match look(&place.path("m")) {
            Err(e) => assert!(matches!(e.kind(), Malformed | Unsupported), "{case}: {e}"),
            Ok(()) => assert!(!case.starts_with("cut"), "{case}"),
        }
    }
}

/// An importance matrix of one weight with these sums and counts.
fn gguf(sums: &[u64], kind_of_sums: u32, counts: &[f32]) -> Raw {
    let n = sums.iter().product::<u64>() as usize;
    let mut raw = Raw::empty()
        .text("general.type", "imatrix")
        .strings("imatrix.datasets", &[b"wiki\xff"])
        .u32("imatrix.chunk_count", 1)
        .u32("imatrix.chunk_size", 512)
        .info("a.weight.in_sum2", sums, kind_of_sums, 0)
        .info("a.weight.counts", &[1, counts.len() as u64], 0, (4 * n as u64).next_multiple_of(32));
    raw.data = vec![0; (4 * n).next_multiple_of(32)];
    raw.data.extend(counts.iter().flat_map(|c| c.to_le_bytes()));
    raw.data.resize(raw.data.len().next_multiple_of(32), 0);
    raw
}

#[test]
fn gguf_matrices() {
    let place = Place::new();
    let plain = |counts: &[f32]| gguf(&[2, counts.len() as u64], 0, counts).bytes();
    let no_counts = {
        let mut raw = gguf(&[2, 1], 0, &[1.0]);
        raw.infos.truncate(1);
        raw.bytes()
    };
    let no_sums = {
        let mut raw = gguf(&[2, 1], 0, &[1.0]);
        raw.infos.remove(0);
        raw.bytes()
    };
    for (case, bytes, expect) in [
        ("sound", plain(&[3.0]), Accepted),
        ("nothing seen", plain(&[0.0, 5.0]), Accepted),
        ("count NaN", plain(&[f32::NAN]), Refused(Malformed, "a count of NaN")),
        ("count -1", plain(&[1.0, -1.0]), Refused(Malformed, "a count of -1")),
        ("count infinite", plain(&[f32::INFINITY]), Refused(Malformed, "a count of inf")),
        ("count 1e30", plain(&[1e30]), Refused(Malformed, "a count of 1")),
        ("no counts", no_counts, Refused(Malformed, "has sums, but no counts")),
        ("no sums", no_sums, Refused(Malformed, "has counts, but no sums")),
        ("three for two", gguf(&[3], 0, &[1.0, 1.0]).bytes(), Refused(Malformed, "3 sums for 2 counts")),
        ("F16", gguf(&[2, 1], 1, &[1.0]).bytes(), Refused(Malformed, "is not F32")),
        ("model", Raw::valid().bytes(), Refused(Malformed, "is no importance matrix")),
        (
            "no entries",
            {
                let mut raw = gguf(&[2, 1], 0, &[1.0]);
                raw.infos.clear();
                raw.bytes()
            },
            Refused(Malformed, "without entries"),
        ),
        (
            "chunks of 2^32",
            {
                let mut raw = gguf(&[2, 1], 0, &[1.0]);
                raw.entries.remove(2);
                raw.entry("imatrix.chunk_count", kind::U64, (1u64 << 32).to_le_bytes()).bytes()
            },
            Accepted,
        ),
        (
            "datasets of numbers",
            {
                let mut raw = gguf(&[2, 1], 0, &[1.0]);
                raw.entries.remove(1);
                raw.u32("imatrix.datasets", 3).bytes()
            },
            Accepted,
        ),
    ] {
        guides(&place, case, &bytes, expect);
    }
    let whole = gguf(&[2, 1], 0, &[1.0]).bytes();
    for n in 0..whole.len() {
        place.put("m", &whole[..n]);
        // Behind the last count there is only padding.
        match look(&place.path("m")) {
            Err(e) => assert!(matches!(e.kind(), Malformed | Unsupported), "cut at {n}: {e}"),
            Ok(()) => assert!(n >= whole.len() - 28, "cut at {n}"),
        }
    }
}

/// Importance of another model: columns that do not fit.
#[test]
fn matrices_of_another_model() {
    let place = Place::new();
    let path = place.path("m");
    fs::copy(fixture("imatrix/mixtral.gguf"), &path).unwrap();
    let output = place.output();
    let args = ["quantize".as_ref(), small_gguf().as_os_str(), output.as_os_str(), "-q".as_ref()];
    let more: [&OsStr; 4] = ["-t".as_ref(), "q4_k_m".as_ref(), "--imatrix".as_ref(), path.as_os_str()];
    place.program("mixtral", &[&args[..], &more].concat(), Refused(Malformed, "columns"));
}

#[test]
fn second_moments() {
    let place = Place::new();
    let strings = |raw: Raw, key: &str, values: &[&[u8]]| raw.strings(key, values);
    let of = |weights: &[&[u8]], inputs: &[&[u8]], shapes: [&[u64]; 4], count: i64| {
        let raw =
            Raw::empty().text("general.type", "moments").u32("moments.version", 1).text("moments.model", "x");
        let raw = strings(strings(raw, "moments.texts", &[b"t"]), "moments.tokens.sha256", &[b"s"]);
        let raw = raw.array("moments.contexts", kind::U32, 1, 64u32.to_le_bytes());
        let raw = raw.array("moments.chunks", kind::U32, 1, 1u32.to_le_bytes());
        let mut raw = strings(strings(raw, "moments.weights", weights), "moments.inputs", inputs);
        let mut at = 0u64;
        for ((end, kind, size), shape) in
            [("in_moments", 0, 4), ("in_sum", 0, 4), ("in_sum_abs", 0, 4), ("counts", 27, 8)]
                .into_iter()
                .zip(shapes)
        {
            raw = raw.info(format!("a.weight.{end}"), shape, kind, at);
            at += (shape.iter().product::<u64>() * size).next_multiple_of(32);
        }
        raw.data = vec![0; at as usize];
        let tail = at as usize - 32;
        raw.data[tail..tail + 8].copy_from_slice(&count.to_le_bytes());
        raw.bytes()
    };
    let sound: [&[u64]; 4] = [&[3, 1], &[2, 1], &[2, 1], &[1, 1]];
    let name: &[u8] = b"a.weight";
    for (case, bytes, expect) in [
        ("sound", of(&[name], &[name], sound, 5), Accepted),
        ("negative count", of(&[name], &[name], sound, -1), Refused(Malformed, "a count is negative")),
        (
            "other first",
            of(&[b"b.weight"], &[name], sound, 1),
            Refused(Malformed, "not the first of its weights"),
        ),
        ("weight twice", of(&[name, name], &[name, name], sound, 1), Refused(Malformed, "twice")),
        ("lists", of(&[name, b"b"], &[name], sound, 1), Refused(Malformed, "2 moments.weights")),
        (
            "triangle",
            of(&[name], &[name], [&[4, 1], &[2, 1], &[2, 1], &[1, 1]], 1),
            Refused(Malformed, "do not fit"),
        ),
        (
            "one dimension",
            of(&[name], &[name], [&[3], &[2, 1], &[2, 1], &[1, 1]], 1),
            Refused(Malformed, "is F32 [3]"),
        ),
        ("no parts", of(&[b"b.weight"], &[b"b.weight"], sound, 1), Refused(Malformed, "there is no tensor")),
        ("a model", Raw::valid().bytes(), Refused(Malformed, "no second moments")),
        ("version 2", Raw::empty().u32("moments.version", 2).bytes(), Refused(Unsupported, "version 2")),
        (
            "version as text",
            Raw::empty().text("moments.version", "1").bytes(),
            Refused(Malformed, "no second moments"),
        ),
    ] {
        place.put("m", bytes);
        let path = place.path("m");
        check(case, Moments::open(&path, &Limits::default()).map(drop), expect);
        if let Refused(..) = expect {
            let output = place.output();
            let args = ["quantize".as_ref(), small_gguf().as_os_str(), output.as_os_str(), "-q".as_ref()];
            let more: [&OsStr; 6] = ["-t", "q4_k_m", "--method", "gptq", "--moments"]
                .map(OsStr::new)
                .into_iter()
                .chain([path.as_os_str()])
                .collect::<Vec<_>>()
                .try_into()
                .unwrap();
            place.program(case, &[&args[..], &more].concat(), expect);
        }
    }
}

#[test]
fn baselines() {
    let place = Place::new();
    let words = |magic: &[u8], n: &[u32], rest: usize| {
        [magic, &n.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>(), &vec![0; rest]].concat()
    };
    let max = u32::MAX;
    for (case, bytes, says) in [
        ("empty", Vec::new(), "fewer than the header's"),
        ("another file", words(b"GGUF\0\0\0\0", &[4, 4, 1, 1, 1, 0], 99), "begins with neither"),
        ("no windows", words(b"qcbase02", &[4, 4, 0, 1, 1, 0], 99), "0 windows"),
        ("windows of 3", words(b"qcbase02", &[3, 4, 1, 1, 1, 0], 99), "windows of 3 tokens"),
        ("no vocabulary", words(b"qcbase02", &[4, 0, 1, 1, 1, 0], 99), "of 0 tokens"),
        ("k of 2^32", words(b"qcbase02", &[4, 4, 1, max, 1, 0], 99), "4294967295 and 1 of 4"),
        ("all of 2^32", words(b"qcbase02", &[max, max, max, max, max, 0], 99), ""),
        ("2^32 windows", words(b"qcbase02", &[4, 4, max, 1, 1, 0], 99), "the file has"),
        ("another length", words(b"qcbase02", &[4, 4, 1, 1, 1, 0], 99), "the file has"),
        ("llama.cpp's of 2^32", words(b"_logits_", &[max, max, max], 99), ""),
    ] {
        place.put("b", bytes);
        check(case, Baseline::open(&place.path("b")).map(drop), Refused(Malformed, says));
    }
}

#[test]
fn tables_of_a_mix() {
    use qconv::mix::table::{Subject, Table};
    let place = Place::new();
    let of = Subject { model: "m".into(), rounding: "r".into(), text: String::new() };
    let table = || Table::new(of.clone(), indexmap::IndexMap::new());
    let sound = table().to_json().unwrap();
    for (case, text, expect) in [
        ("sound", sound.clone(), Accepted),
        (
            "deep",
            format!("{{\"version\":{}", "[".repeat(100_000)),
            Refused(Malformed, "is not the JSON expected"),
        ),
        ("unknown key", sound.replacen('{', "{\"x\": 1,", 1), Refused(Malformed, "unknown field")),
        (
            "version",
            sound.replacen("\"version\": 1", "\"version\": 4294967296", 1),
            Refused(Malformed, "u32"),
        ),
        ("many", format!("[{}0]", "0,".repeat(2 << 20)), Refused(Limit, "values")),
    ] {
        place.put("t.json", text);
        check(case, table().take_trials(&place.path("t.json")), expect);
    }
    for n in 0..sound.trim_end().len() {
        place.put("t.json", &sound[..n]);
        assert_eq!(table().take_trials(&place.path("t.json")).unwrap_err().kind(), Malformed, "cut at {n}");
    }
}
