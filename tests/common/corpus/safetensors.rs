//! safetensors: headers, entries, and what hides between tensors.

use qconv::ErrorKind::{Malformed, Unsupported};

use super::{Case, Cases, end_of_zip};

/// A file with this header, padded to 8 bytes, and `data` zeros.
pub fn file(header: &str, data: usize) -> Vec<u8> {
    let mut header = header.as_bytes().to_vec();
    header.resize(header.len().next_multiple_of(8), b' ');
    with_length(header.len() as u64, &header, data)
}

/// The same with any length and no padding.
pub fn with_length(length: u64, header: &[u8], data: usize) -> Vec<u8> {
    [&length.to_le_bytes()[..], header, &vec![0; data]].concat()
}

/// A header with one tensor `a`.
pub fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
}

/// A header with `a` of 16 bytes and `b` of 16 from `begin` on.
pub fn two(begin: u64) -> String {
    let b = one("F32", "[4]", &format!("[{begin},{}]", begin + 16)).replace("\"a\"", "\"b\"");
    format!("{},{}", &GOOD[..GOOD.len() - 1], &b[1..])
}

/// One tensor of 16 bytes.
pub const GOOD: &str = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
/// What is between its braces.
const FIELDS: &str = r#""dtype":"F32","shape":[4],"data_offsets":[0,16]"#;

/// All files.
pub fn all() -> Vec<Case> {
    let mut cases = Cases::default();
    good(&mut cases);
    headers(&mut cases);
    entries(&mut cases);
    places(&mut cases);
    cases.0
}

fn named(name: &str) -> String {
    GOOD.replace("\"a\"", &format!("\"{name}\""))
}

fn good(t: &mut Cases) {
    t.read("ok", file(GOOD, 16));
    t.read("ok_meta", file(&GOOD.replacen('{', r#"{"__metadata__":{"format":"pt"},"#, 1), 16));
    t.read("ok_empty_tensor", file(&one("F32", "[0,4]", "[0,0]"), 0));
    t.read("ok_scalar", file(&one("F32", "[]", "[0,4]"), 4));
    t.read("ok_no_tensors", file(r#"{"__metadata__":{}}"#, 0));
    t.read("ok_two", file(&two(16), 32));
    let line = "name empty, with NUL, with `../`";
    t.read("name_empty", file(&named(""), 16)).policy(line);
    t.read("name_nul", file(&named("a\\u0000b"), 16)).policy(line);
    t.read("name_traversal", file(&named("../../x"), 16));
    t.read("name_escape", file(&named("\\u001b[2J\\u009b31m\\u202e"), 16));
    t.read("name_long", file(&named(&"n".repeat(100_000)), 16));
    let many: Vec<String> = (0..20_000)
        .map(|i| format!(r#""t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#))
        .collect();
    t.read("many_tensors", file(&format!("{{{}}}", many.join(",")), 0));
    t.read("shape_64", file(&one("F32", &format!("[4{}]", ",1".repeat(63)), "[0,16]"), 16));
}

fn headers(t: &mut Cases) {
    t.refuse("empty", &b""[..], Unsupported, "is no file that can be read");
    t.refuse("short7", &[1; 7][..], Malformed, "7 bytes");
    t.refuse("len_only", with_length(8, b"", 0), Malformed, "should have 8 bytes");
    t.refuse("len_0", with_length(0, b"", 0), Malformed, "{");
    t.refuse("len_max", with_length(u64::MAX, GOOD.as_bytes(), 16), Malformed, "18446744073709551615 bytes");
    t.refuse("len_eof_plus1", with_length(9, b"{}      ", 0), Malformed, "should have 9 bytes");
    t.refuse("len_short", with_length(10, GOOD.as_bytes(), 16), Malformed, "header is faulty");
    t.refuse("not_brace", file(&format!(" {GOOD}"), 16), Malformed, "does not begin with \"{\"")
        .policy("header does not begin with `{`");
    t.refuse("json_array", file("[]", 0), Malformed, "does not begin with \"{\"");
    t.refuse("json_trunc", file(&GOOD[..GOOD.len() - 1], 16), Malformed, "header is faulty");
    t.refuse("json_trailing", file("{}x", 0), Malformed, "trailing characters");
    t.refuse("json_nul_pad", with_length(8, b"{}\0\0\0\0\0\0", 0), Malformed, "trailing characters");
    t.refuse("json_nonutf8", with_length(7, b"{\"\xff\":1}", 0), Malformed, "header is faulty");
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    t.refuse("json_deep", file(&deep, 0), Malformed, "header is faulty: \"a\"");
    let pickle = [b"\x80\x04\x95".to_vec(), vec![0; 64]].concat();
    t.refuse("pickle_in_disguise", pickle, Malformed, "header");
}

fn entries(t: &mut Cases) {
    for (name, header, says) in [
        ("dup_tensor", format!(r#"{{"a":{{{FIELDS}}},"a":{{{FIELDS}}}}}"#), "\"a\" appears twice"),
        ("dup_field", format!(r#"{{"a":{{"dtype":"F32",{FIELDS}}}}}"#), "\"a\": duplicate field `dtype`"),
        ("dup_meta_key", r#"{"__metadata__":{"k":"","k":""}}"#.into(), "\"k\" appears twice"),
        ("meta_nonstr", r#"{"__metadata__":{"k":1}}"#.into(), "\"__metadata__\": invalid type"),
        ("no_dtype", r#"{"a":{"shape":[4],"data_offsets":[0,16]}}"#.into(), "\"a\": missing field `dtype`"),
        ("no_object", r#"{"a":1}"#.into(), "\"a\": invalid type"),
        ("shape_neg", one("F32", "[-4]", "[0,16]"), "\"a\": invalid value: integer `-4`"),
        ("shape_float", one("F32", "[4.0]", "[0,16]"), "\"a\": invalid type: floating point"),
        ("shape_exponent", one("F32", "[4e0]", "[0,16]"), "\"a\": invalid type: floating point"),
        ("shape_overflow_bytes", one("F32", "[4611686018427387904]", "[0,0]"), "tensor \"a\": "),
        ("shape_overflow", one("F32", "[4294967296,4294967296]", "[0,0]"), "tensor \"a\": "),
        ("off_neg", one("F32", "[4]", "[-16,0]"), "\"a\": invalid value: integer `-16`"),
        ("off_2p64", one("F32", "[4]", "[18446744073709551599,18446744073709551615]"), "\"a\""),
        ("off_above", one("F32", "[4]", "[0,99999999999999999999]"), "\"a\": invalid type"),
        ("off_one", one("F32", "[4]", "[16]"), "\"a\": invalid length 1"),
        ("off_three", one("F32", "[4]", "[0,16,32]"), "\"a\": "),
        ("off_reversed", one("F32", "[4]", "[16,0]"), "its offsets are 16 to 0"),
        ("off_short", one("F32", "[4]", "[0,15]"), "takes 16 bytes, its offsets are 0 to 15"),
    ] {
        t.refuse(name, file(&header, 16), Malformed, says);
    }
    let line = "a name, a field, `__metadata__` or a key in it twice";
    let twice = format!(r#"{{"__metadata__":{{}},"__metadata__":{{}},"a":{{{FIELDS}}}}}"#);
    t.refuse("dup_meta", file(&twice, 16), Malformed, "\"__metadata__\" appears twice").policy(line);
    let extra = format!(r#"{{"a":{{{FIELDS},"x":1}}}}"#);
    t.refuse("extra_field", file(&extra, 16), Malformed, "\"a\": unknown field `x`")
        .policy("unknown field in a tensor");
    for (name, dtype) in [("unknown", "F33"), ("lower", "f32"), ("ggml", "Q8_0"), ("none", "")] {
        let says = format!("tensor \"a\": its type \"{dtype}\" is not known");
        t.refuse(&format!("dtype_{name}"), file(&one(dtype, "[4]", "[0,16]"), 16), Unsupported, &says);
    }
    for (name, dtype, shape) in [("sub_byte_odd", "F4", "[3]"), ("sub_byte", "F6_E2M3", "[4]")] {
        let says = format!("tensor \"a\": its type \"{dtype}\" is not supported");
        t.refuse(name, file(&one(dtype, shape, "[0,2]"), 2), Unsupported, &says);
    }
    // What a shape's length makes of each line that shows it.
    for (name, more) in [("65", 64), ("long", 200_000)] {
        let header = one("F32", &format!("[4{}]", ",1".repeat(more)), "[0,16]");
        let says = format!("tensor \"a\": {} dimensions, at most 64 are allowed", more + 1);
        t.refuse(&format!("shape_{name}"), file(&header, 16), Malformed, &says)
            .policy("more than 64 dimensions");
    }
}

/// Holes, in which another file could lie.
fn places(t: &mut Cases) {
    t.refuse("overlap", file(&two(0), 16), Malformed, "tensor \"b\" overlaps the one before");
    t.refuse("overlap_part", file(&two(8), 24), Malformed, "tensor \"b\" overlaps the one before");
    t.refuse("hole_mid", file(&two(32), 48), Malformed, "tensor \"b\" leaves a gap before it");
    let behind = one("F32", "[4]", "[16,32]");
    t.refuse("hole_start", file(&behind, 32), Malformed, "tensor \"a\" leaves a gap before it");
    t.refuse("trailing", file(GOOD, 17), Malformed, "1 bytes behind its last tensor");
    let polyglot = [file(GOOD, 16), end_of_zip()].concat();
    t.refuse("trailing_zip", polyglot, Malformed, "22 bytes behind its last tensor");
    t.refuse("trunc_data", file(GOOD, 15), Malformed, "end at byte 80, the file has 79");
}
