//! HQQ: what the library itself saved (`fixtures/hqq/make.py`) gives the values that it computes, in both
//! forms; what cannot be read is refused by name.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/torch.rs"]
mod torch;
#[path = "common/unpacked.rs"]
mod unpacked;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use checkpoint::Made;
use qconv::ErrorKind::{Limit, Malformed, Unsupported};
use qconv::container::safetensors;
use qconv::convert::Checkpoint;
use qconv::limits::Limits;
use qconv::{ErrorKind, Result};
use serde_json::json;
use torch::{archive, dict, int, ints, storage, tensor, text, whole};
use unpacked::{decoded, same};

const BLOCK: &str = "model.layers.0";

fn checkpoint(dir: &Path) -> Result<Checkpoint> {
    Checkpoint::open(dir, &Limits::default())
}

#[test]
fn both_forms_give_what_the_library_computes() {
    let expected = common::fixture("hqq/expected.safetensors");
    let expected = safetensors::open(&expected, &Limits::default()).unwrap().store;
    assert_eq!(expected.tensors().len(), 8);
    for form in ["hqq/qmodel", "hqq/safetensors"] {
        let opened = checkpoint(&common::fixture(form)).unwrap();
        assert_eq!(opened.quant_method, Some("hqq"), "{form}");
        let store = &opened.store;
        for t in expected.tensors() {
            let info = store.get(&t.name).unwrap();
            assert_eq!(info.shape, t.shape, "{form}: {}", t.name);
            same(&decoded(store, &t.name), &decoded(&expected, &t.name));
        }
        // Nothing is left of the parts.
        let names: BTreeSet<_> = store.tensors().iter().map(|t| t.name.as_str()).collect();
        let mut all: BTreeSet<String> = expected.tensors().iter().map(|t| t.name.clone()).collect();
        all.extend(["input_layernorm", "post_attention_layernorm"].map(|n| format!("{BLOCK}.{n}.weight")));
        all.extend(["q", "k", "v", "o"].map(|n| format!("{BLOCK}.self_attn.{n}_proj.bias")));
        all.extend(["model.embed_tokens.weight", "model.norm.weight"].map(String::from));
        assert!(names.iter().eq(&all), "{form}: {names:?}");
        // Groups within rows are seen as such.
        let grouped = |name: &str| {
            let info = store.get(&format!("{BLOCK}.{name}.weight")).unwrap();
            store.grouped(info).map(|(matrix, _)| (matrix.shape().bits, matrix.shape().group_size))
        };
        assert_eq!(grouped("self_attn.q_proj"), Some((8, 16)), "{form}");
        assert_eq!(grouped("self_attn.v_proj"), Some((3, 16)), "{form}");
        assert_eq!(grouped("mlp.gate_proj"), Some((1, 8)), "{form}");
        assert_eq!(grouped("mlp.up_proj"), None, "{form}: along the outputs");
        assert!(store.grouped(store.get("lm_head.weight").unwrap()).is_none(), "{form}: across rows");
    }
}

/// A directory with this `qmodel.pt`.
fn with_pickle(pickle: &[u8], config: &str) -> Result<Checkpoint> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    fs::write(dir.path().join("qmodel.pt"), archive(pickle)).unwrap();
    checkpoint(dir.path())
}

/// Six floats 0, seen as this shape.
fn floats(size: &[i64], stride: &[i64]) -> Vec<u8> {
    tensor(storage("torch\nFloatStorage", "0", 6), 0, size, stride)
}

type Entries = Vec<(Vec<u8>, Vec<u8>)>;

/// A module as the library saved it at first: 8 weights in groups of 4, whose bytes are called two floats.
fn old_module() -> Entries {
    let meta = vec![
        (text("nbits"), int(8)),
        (text("group_size"), int(4)),
        (text("shape"), [b"ctorch\nSize\n", &ints(&[2, 4])[..], b"\x85R"].concat()),
        (text("axis"), int(1)),
        (text("packing"), text("8bit_u8")),
        (text("view_as_float"), b"\x88".to_vec()),
        (text("quant_scale"), b"\x89".to_vec()),
        (text("scale"), floats(&[2, 1], &[1, 1])),
        (text("zero"), floats(&[2, 1], &[1, 1])),
    ];
    vec![(text("W_q"), floats(&[2], &[1])), (text("meta"), dict(&meta)), (text("bias"), floats(&[2], &[1]))]
}

#[test]
fn modules_with_a_dict_of_their_own() {
    let pickle = whole(&dict(&[(text("a.b"), dict(&old_module()))]));
    let opened = with_pickle(&pickle, "{}").unwrap();
    let names: Vec<_> = opened.store.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["a.b.weight", "a.b.bias"]);
    assert_eq!(decoded(&opened.store, "a.b.weight"), [0.0; 8]);
    let other = r#"{"quantization_config": {"quant_method": "gptq", "bits": 4}}"#;
    let e = with_pickle(&pickle, other).unwrap_err();
    assert_eq!(e.kind(), Malformed);
    assert!(e.to_string().contains("gptq"), "{e}");
}

#[test]
fn pickles_that_want_too_much() {
    let refused = |pickle: &[u8], kind: ErrorKind, says: &str| {
        let e = with_pickle(pickle, "{}").unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(says), "{e}");
    };
    let module = dict(&[(text("W_q"), floats(&[2], &[1]))]);
    // Remembered as 0, and recalled.
    let remembered = [&module[..], b"q\0"].concat();
    refused(
        &whole(&dict(&[(text("a"), remembered), (text("b"), b"h\0".to_vec())])),
        Malformed,
        "\"b\" comes twice",
    );
    refused(&whole(&dict(&[(int(3), module.clone())])), Unsupported, "no text");
    // A long name for many short ones.
    let many: Entries = (0..200).map(|i| (text(&format!("{i}")), int(i))).collect();
    let many = dict(&[many, vec![(text("W_q"), floats(&[2], &[1]))]].concat());
    refused(&whole(&dict(&[(text(&"x".repeat(1 << 20)), many)])), Limit, "names");
    // Of itself.
    let own = [b"}q\0", &text("a")[..], b"h\0s", &text("m")[..], &module[..], b"s"].concat();
    refused(&whole(&own), Malformed, "");
}

/// The fixture with one thing changed.
fn changed(change: impl FnOnce(&mut Made)) -> Result<Checkpoint> {
    let source = common::fixture("hqq/safetensors");
    let mut made = Made::of(&source);
    change(&mut made);
    let dir = tempfile::tempdir().unwrap();
    made.write(dir.path(), &source);
    checkpoint(dir.path())
}

#[test]
fn what_does_not_fit_is_refused() {
    let k = |key: &str| format!("{BLOCK}.self_attn.k_proj.{key}");
    let number = |key: &str, n: i32| {
        let key = k(key);
        move |m: &mut Made| m.get(&key).2 = n.to_le_bytes().to_vec()
    };
    changed(|_| {}).unwrap();
    let check = |found: Result<Checkpoint>, kind: ErrorKind, says: &str| {
        let e = found.unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(says), "{says}: {e}");
        assert!(e.path().is_some());
    };
    check(changed(|m| m.get(&k("quant_scale")).2 = vec![1]), Unsupported, "quant_scale");
    check(changed(|m| m.get(&k("quant_zero")).2 = vec![1]), Unsupported, "quant_zero");
    check(changed(|m| m.get(&k("channel_wise")).2 = vec![0]), Unsupported, "channel_wise");
    check(changed(|m| m.get(&k("packing")).2 = b"5bit_32".to_vec()), Unsupported, "5bit_32");
    check(changed(|m| m.get(&k("packing")).2 = b"2bit_u8".to_vec()), Malformed, "nbits = 4");
    check(changed(number("nbits", 0)), Malformed, "nbits = 0");
    check(changed(number("axis", 2)), Malformed, "axis = 2");
    check(changed(number("axis", 0)), Malformed, "was expected");
    check(changed(number("group_size", 0)), Malformed, "group_size = 0");
    check(changed(number("group_size", 48)), Malformed, "does not divide");
    check(changed(number("group_size", 32)), Malformed, "shape [64, 1], [32, 1] was expected");
    check(changed(|m| m.get(&k("shape")).2 = vec![0; 16]), Malformed, "shape = [0,0]");
    check(changed(|m| m.get(&k("shape")).2 = vec![0xff; 16]), Malformed, "shape");
    check(changed(|m| m.get(&k("view_as_float")).2 = vec![1]), Malformed, "F16");
    for key in ["shape", "axis", "packing", "nbits", "scale", "zero"] {
        check(changed(|m| drop(m.take(&k(key)))), Malformed, "missing");
    }
    check(changed(|m| drop(m.take(&k("W_q")))), Malformed, "not there");
    let unsaid = changed(|m| m.config["quantization_config"] = json!(null));
    check(unsaid, Malformed, "no quantization_config");
    let with = |m: &mut Made| m.tensors.push((k("zero_scale"), ("F16".into(), vec![1], vec![0; 2])));
    check(changed(with), Unsupported, "zero_scale");
}

/// Whatever byte is damaged: an error, or other values, but no panic, and no more memory than the file has.
#[test]
fn damaged_files_do_no_harm() {
    let mut random = checkpoint::Random(5);
    let dir = tempfile::tempdir().unwrap();
    for (form, file) in [("hqq/qmodel", "qmodel.pt"), ("hqq/safetensors", "model.safetensors")] {
        let source = common::fixture(form);
        let whole = fs::read(source.join(file)).unwrap();
        let place = dir.path().join(form);
        fs::create_dir_all(&place).unwrap();
        fs::copy(source.join("config.json"), place.join("config.json")).unwrap();
        let (mut read, mut refused) = (0, 0);
        for _ in 0..250 {
            let mut bytes = whole.clone();
            for _ in 0..=random.below(3) {
                let at = random.below(bytes.len() as u64) as usize;
                bytes[at] = random.below(256) as u8;
            }
            fs::write(place.join(file), bytes).unwrap();
            let Ok(opened) = checkpoint(&place) else {
                refused += 1;
                continue;
            };
            for t in opened.store.tensors() {
                assert!(t.nbytes < 1 << 20, "{}", t.name);
                read += usize::from(opened.store.read_all(t).is_ok());
            }
        }
        assert!(read > 100 && refused > 20, "{form}: {read} {refused}");
    }
}
