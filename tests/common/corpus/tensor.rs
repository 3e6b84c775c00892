//! GGUF: names, dimensions, types and offsets of tensors.

use qconv::ErrorKind::{Malformed, Unsupported};

use super::Cases;
use crate::raw::{Raw, kind};

/// A file with one tensor and 2048 bytes of data.
fn one(name: impl AsRef<[u8]>, dims: &[u64], ggml_type: u32) -> Raw {
    Raw::llama().info(name, dims, ggml_type, 0).with_data(2048)
}

/// Two tensors of 8 weights, 32 bytes apart.
fn two(a: &[u8], b: &[u8]) -> Raw {
    Raw::llama().info(a, &[8], 0, 0).info(b, &[8], 0, 32).with_data(64)
}

/// Two tensors of 128 bytes, the second at `offset`.
fn at(offset: u64) -> Raw {
    Raw::llama().info("a", &[32], 0, 0).info("b", &[32], 0, offset).with_data(512)
}

pub fn tensors(t: &mut Cases) {
    names(t);
    dimensions(t);
    types(t);
    offsets(t);
    let nan = Raw { data: f32::NAN.to_le_bytes().repeat(8), ..Raw::llama().info("t", &[8], 0, 0) };
    t.read("data_f32_nan", nan).policy("NaN or Inf as a weight");
}

fn names(t: &mut Cases) {
    let line = "tensor name empty, with NUL, above 63 bytes";
    t.refuse("tname_empty", one("", &[8], 0), Malformed, "tensor 0: its name \"\" has 0 bytes").policy(line);
    t.refuse("tname_64", one("n".repeat(64), &[8], 0), Malformed, "has 64 bytes").policy(line);
    t.read("tname_63", one("n".repeat(63), &[8], 0));
    let mut long = Raw::llama().with_data(32);
    long.infos.push([&(1u64 << 63).to_le_bytes()[..], b"t", &[0; 24]].concat()); // CVE-2024-23496
    t.refuse("tname_2p63", long, Malformed, "tensor 0: 9223372036854775808 bytes of string");
    t.refuse("tname_dup", two(b"a", b"a"), Malformed, "tensor \"a\" appears twice");
    t.refuse("tname_nul_dup", two(b"a", b"a\0b"), Malformed, "tensor 1: its name \"a\\0b\"").policy(line);
    t.refuse("tname_nonutf8", one(b"\xff\xfe", &[8], 0), Malformed, "tensor 0: its name is not UTF-8");
    // CVE-2024-45436: harmless as long as no path is made of it.
    t.read("tname_traversal", one("../../../../tmp/x", &[8], 0));
    t.read("tname_escape", one("\u{1b}[2J\u{9b}31m\u{202e}", &[8], 0));
}

fn dimensions(t: &mut Cases) {
    t.read("ndims_0", one("t", &[], 0)).policy("no dimensions");
    t.refuse("ndims_5", one("t", &[2; 5], 0), Malformed, "tensor 0: \"t\": 5 dimensions");
    let mut many = Raw::llama().with_data(64); // CVE-2024-21802
    many.infos.push([&1u64.to_le_bytes()[..], b"t", &[0xff; 4], &[0; 20]].concat());
    t.refuse("ndims_max", many, Malformed, "tensor 0: \"t\": 4294967295 dimensions");
    t.read("dim_0", one("t", &[0], 0)).policy("a dimension of 0");
    t.read("dim_0_q8", one("t", &[0, 4], 8)).policy("a dimension of 0");
    t.read("dim1_0", one("t", &[32, 0], 8)); // GHSA-3p75-pq92-q28f
    let none = "more than 2^63 elements";
    t.refuse("dims_wrap_zero", one("t", &[1 << 32, 1 << 32], 0), Malformed, none); // CVE-2024-21802
    t.refuse("dims_i64max_x2", one("t", &[(1 << 63) - 1, 2], 24), Malformed, none); // llama.cpp #27203
    t.refuse("dims_negative", one("t", &[1 << 63], 0), Malformed, none);
    t.refuse("dims_wrap_four", one("t", &[1 << 62, 2, 2, 2], 0), Malformed, none);
    let bytes = "\"t\"";
    t.refuse("pad_wrap", one("t", &[u64::MAX / 4], 0), Malformed, bytes); // llama.cpp PR 24759
    t.refuse("nbytes_wrap_f64", one("t", &[1 << 61], 28), Malformed, bytes); // CVE-2026-33298
    // CVE-2026-27940: each size is possible, and their sum wraps.
    let mut sum = Raw::llama().with_data(64);
    for i in 0..4 {
        sum = sum.info(format!("t{i}"), &[1 << 62], 24, i << 62);
    }
    t.refuse("total_wrap", sum, Malformed, "tensor \"t0\" takes 4611686018427387904 bytes");
    // CVE-2026-7482, CVE-2024-12055: what lies behind a file, copied into another.
    let says = "tensor \"t\" takes 1152921504606846976 bytes";
    t.refuse("exabyte_f32", one("t", &[1 << 40, 1 << 18], 0), Malformed, says);
    t.refuse("exceeds_file_1row", one("t", &[32, 17], 0), Malformed, "tensor \"t\" takes 2176 bytes");
}

fn types(t: &mut Cases) {
    for id in [4, 5, 31, 33, 36] {
        let says = format!("tensor 0: \"t\": ggml has removed tensor type {id}");
        t.refuse(&format!("ttype_{id}"), one("t", &[256], id), Unsupported, &says);
    }
    // llama.cpp #19856: a negative type was an index.
    for id in [43, 255, 0x7fff_ffff, u32::MAX] {
        let says = format!("tensor 0: \"t\": tensor type {id} is not known");
        t.refuse(&format!("ttype_{id}"), one("t", &[256], id), Unsupported, &says);
    }
    t.refuse("q8_ne33", one("t", &[33], 8), Malformed, "blocks of 32");
    t.refuse("q4k_ne32", one("t", &[32, 8], 12), Malformed, "blocks of 256");
}

fn offsets(t: &mut Cases) {
    t.refuse("off_unaligned16", at(144), Malformed, "tensor 1: \"b\": offset 144 is no multiple of 32");
    t.refuse("off_overlap_full", at(0), Malformed, "tensors \"a\" and \"b\" overlap");
    t.refuse("off_overlap_part", at(96), Malformed, "tensors \"a\" and \"b\" overlap");
    for offset in [512, 1 << 40, 1 << 63, u64::MAX - 31] {
        t.refuse(&format!("off_past_eof_{offset}"), at(offset), Malformed, "tensor \"b\" takes 128 bytes");
    }
    let reordered = Raw::llama().info("a", &[32], 0, 128).info("b", &[32], 0, 0).with_data(256);
    t.read("off_reordered", reordered).policy("data in another order than the infos");
    t.read("off_gap", at(256)).policy("data in another order than the infos");
}

/// A scalar of each kind, so that a changed byte meets all of them.
pub fn of_all_kinds() -> Raw {
    [
        (kind::U8, 1),
        (kind::I8, 1),
        (kind::U16, 2),
        (kind::I16, 2),
        (kind::I32, 4),
        (kind::F32, 4),
        (kind::BOOL, 1),
        (kind::U64, 8),
        (kind::I64, 8),
        (kind::F64, 8),
    ]
    .into_iter()
    .fold(Raw::valid(), |raw, (id, n)| raw.entry(format!("x.{id}"), id, vec![1; n]))
    .strings("x.s", &[b"a", b"bc"])
    .array("x.a", kind::ARRAY, 1, [&0u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[1, 2]].concat())
}
