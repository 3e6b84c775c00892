//! What ggml's own loader makes of the malformed corpus, beside what qconv makes of it. ggml accepts some files that
//! lie, and ends the process on others, so it looks at each in a child.
#![cfg(all(unix, feature = "ggml"))]

#[path = "common/corpus/mod.rs"]
mod corpus;
#[path = "common/raw.rs"]
mod raw;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use corpus::{Case, Outcome};
use qconv::container::gguf::Gguf;
use qconv::convert::{Quantize, Quantizer, Recipe};
use qconv::ggml::oracle;
use qconv::limits::Limits;

/// The file that a child is to look at.
const FILE: &str = "QCONV_TEST_GGML_FILE";
const CHILD: &str = "ggml_looks";

/// What ggml does with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ggml {
    Accepts,
    Refuses,
    /// A signal ends the process.
    Dies,
}

/// The child: exit code 0 where ggml accepts the file, 3 where it refuses it.
#[test]
#[ignore = "what the other tests run in a child"]
fn ggml_looks() {
    let path = std::env::var_os(FILE).expect("the file's path");
    std::process::exit(if oracle::gguf_opens(Path::new(&path)) { 0 } else { 3 });
}

fn ask(path: &Path) -> Ggml {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([CHILD, "--exact", "--ignored"]).env(FILE, path).stdin(Stdio::null());
    let status = child.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    match status.code() {
        Some(0) => Ggml::Accepts,
        Some(3) => Ggml::Refuses,
        None => Ggml::Dies,
        Some(code) => panic!("{}: the child ends with {code}", path.display()),
    }
}

/// The corpus, with what ggml says of each file.
fn asked(dir: &Path) -> Vec<(Case, Ggml)> {
    let path = dir.join("asked.gguf");
    let ask = |case: Case| {
        fs::write(&path, &case.bytes).unwrap();
        let said = ask(&path);
        (case, said)
    };
    corpus::all_gguf().into_iter().map(ask).collect()
}

/// Files that qconv's reader refuses, and that ggml's accepts; it dies of none, as of ggml 0.26. Those of tensors
/// that lie beyond the file are read and copied by whoever believes the header.
const REFUSED_BY_QCONV_ALONE: &[(&str, Ggml)] = &[
    ("trunc_no_data", Ggml::Accepts),
    ("trunc_data_half", Ggml::Accepts),
    ("trunc_data_minus1", Ggml::Accepts),
    ("key_65536", Ggml::Accepts),
    ("key_nonutf8", Ggml::Accepts),
    ("key_nul", Ggml::Accepts),
    ("arr_bool_bad", Ggml::Accepts),
    ("bool_bad", Ggml::Accepts),
    ("tname_empty", Ggml::Accepts),
    ("tname_nul_dup", Ggml::Accepts),
    ("tname_nonutf8", Ggml::Accepts),
    ("exabyte_f32", Ggml::Accepts),
    ("exceeds_file_1row", Ggml::Accepts),
    ("split_count2_alone", Ggml::Accepts),
    ("split_no_ge_count", Ggml::Accepts),
    ("split_no1_first", Ggml::Accepts),
    ("split_count_65535", Ggml::Accepts),
    ("split_tensors_neg", Ggml::Accepts),
    ("split_no_str", Ggml::Accepts),
    ("split_count_only", Ggml::Accepts),
];

#[test]
fn what_ggml_accepts_or_dies_of_qconv_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let all = asked(dir.path());
    let differ: Vec<(&str, Ggml)> = all
        .iter()
        .filter(|(case, said)| matches!(case.opened, Outcome::Refused(..)) && *said != Ggml::Refuses)
        .map(|(case, said)| (case.name.as_str(), *said))
        .collect();
    println!("{} of {}: {differ:#?}", differ.len(), all.len());
    assert_eq!(differ, REFUSED_BY_QCONV_ALONE);
    let path = dir.path().join("model.gguf");
    let output = dir.path().join("out.gguf");
    for (case, _) in all.iter().filter(|(case, _)| differ.iter().any(|(name, _)| *name == case.name)) {
        fs::write(&path, &case.bytes).unwrap();
        // No reader, so no view of a tensor; and nothing is written.
        let Outcome::Refused(kind, words) = &case.opened else { unreachable!() };
        let error = Gguf::open(&path, &Limits::default()).expect_err(&case.name);
        assert!(error.kind() == *kind && error.to_string().contains(words), "{}: {error}", case.name);
        let quantizer = Quantizer::new(Recipe::parse("q8_0").unwrap());
        let error = Quantize::new(&path, &output, quantizer).plan().map(drop).expect_err(&case.name);
        assert_eq!(error.kind(), *kind, "{}: {error}", case.name);
        assert!(!output.exists(), "{}", case.name);
    }
}

/// What is no model, ggml opens all the same; no conversion begins.
#[test]
fn what_is_no_model_is_not_quantized() {
    let dir = tempfile::tempdir().unwrap();
    let (path, output) = (dir.path().join("model.gguf"), dir.path().join("out.gguf"));
    let mut accepted = 0;
    for (case, said) in asked(dir.path()) {
        let (Outcome::Fine, Outcome::Refused(kind, words)) = (&case.opened, &case.used) else { continue };
        accepted += usize::from(said == Ggml::Accepts);
        fs::write(&path, &case.bytes).unwrap();
        let quantizer = Quantizer::new(Recipe::parse("q8_0").unwrap());
        let error = Quantize::new(&path, &output, quantizer).plan().map(drop).expect_err(&case.name);
        assert!(error.kind() == *kind && error.to_string().contains(words), "{}: {error}", case.name);
        assert!(!output.exists(), "{}", case.name);
    }
    assert!(accepted >= 5, "{accepted}");
}

/// Files that qconv reads, and ggml's reader refuses or dies of.
const READ_BY_QCONV_ALONE: &[(&str, Ggml)] = &[
    ("big_endian_valid", Ggml::Refuses),
    ("arr_nested_2", Ggml::Refuses),
    ("off_reordered", Ggml::Refuses),
    ("off_gap", Ggml::Refuses),
];

/// What qconv alone reads holds no tensor beyond the file either, and each is a decision of the specification.
#[test]
fn what_qconv_alone_reads_is_decided() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut alone = Vec::new();
    for (case, said) in asked(dir.path()) {
        if !matches!(case.opened, Outcome::Fine) {
            continue;
        }
        fs::write(&path, &case.bytes).unwrap();
        let gguf = Gguf::open(&path, &Limits::default()).unwrap();
        for t in gguf.store.tensors() {
            assert!(t.offset + t.nbytes <= case.bytes.len() as u64, "{}: {}", case.name, t.name);
        }
        if said != Ggml::Accepts {
            alone.push((case.name.clone(), said, case.policy));
        }
    }
    println!("{alone:#?}");
    assert!(alone.iter().all(|(_, _, policy)| policy.is_some()), "{alone:#?}");
    let alone: Vec<(&str, Ggml)> = alone.iter().map(|(name, said, _)| (name.as_str(), *said)).collect();
    assert_eq!(alone, READ_BY_QCONV_ALONE);
}
