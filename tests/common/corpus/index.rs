//! Indexes of sharded checkpoints.

use qconv::ErrorKind::{Io, Malformed};
use serde_json::json;

use super::safetensors::{GOOD, file};
use super::{Case, Cases};

pub const FIRST: &str = "model-00001-of-00002.safetensors";
pub const SECOND: &str = "model-00002-of-00002.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";

/// The shards that lie beside each index: `a` in the first, `b` in the second.
pub fn shards() -> [(&'static str, Vec<u8>); 2] {
    let shard = |name: &str| file(&GOOD.replace("\"a\"", &format!("\"{name}\"")), 16);
    [(FIRST, shard("a")), (SECOND, shard("b"))]
}

/// The index that fits them.
pub fn good() -> Vec<u8> {
    let map = json!({"metadata": {"total_size": 32}, "weight_map": {"a": FIRST, "b": SECOND}});
    map.to_string().into_bytes()
}

/// All indexes.
pub fn all() -> Vec<Case> {
    let mut t = Cases::default();
    let with = |a: &str| json!({"weight_map": {"a": a, "b": SECOND}}).to_string().into_bytes();
    t.read("index_ok", good());
    t.read("index_surplus_file", json!({"weight_map": {"a": FIRST}}).to_string().into_bytes());
    // CVE-2024-45436 and its class.
    for (name, shard) in [
        ("traversal", "../../../etc/passwd"),
        ("abs", "/etc/passwd"),
        ("parent", ".."),
        ("self", "."),
        ("empty", ""),
        ("below", "x/y.safetensors"),
        ("drive", "C:\\x"),
        ("backslash", "a\\b"),
        ("nul", "a\0b"),
    ] {
        let says = format!("shard {shard:?} is no plain file name");
        t.refuse(&format!("index_{name}"), with(shard), Malformed, &says);
    }
    t.refuse("index_missing_shard", with("nope.safetensors"), Io, "nope.safetensors: cannot open");
    let absent = json!({"weight_map": {"a": FIRST, "b": SECOND, "zz": FIRST}}).to_string();
    t.refuse("index_tensor_absent", absent.into_bytes(), Malformed, "tensor \"zz\" is not in model-00001");
    t.refuse("index_other_shard", with(SECOND), Malformed, "tensor \"a\" is not in model-00002");
    let twice = format!(r#"{{"weight_map":{{"a":"{FIRST}","a":"{FIRST}"}}}}"#);
    for (name, text, says) in [
        ("no_map", r#"{"metadata":{}}"#, "missing field `weight_map`"),
        ("map_list", r#"{"weight_map":["a"]}"#, "invalid type: sequence"),
        ("number", r#"{"weight_map":{"a":1}}"#, "invalid type: integer"),
        ("twice", twice.as_str(), "\"a\" appears twice"),
        ("cut", r#"{"weight_map":{"a":"#, "is no valid index"),
    ] {
        t.refuse(&format!("index_{name}"), text.as_bytes(), Malformed, says);
    }
    t.0
}
