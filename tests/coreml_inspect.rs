//! What `inspect` says of Core ML packages. Texts are in `tests/goldens/coreml`; `QCONV_UPDATE=1` writes them anew.

mod common;

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use common::fixture;
use qconv::container::coreml::chunks::CHUNKS;
use serde_json::Value as Json;

fn inspect(path: &Path, options: &[&str]) -> String {
    let mut command = Command::cargo_bin("qconv").unwrap();
    let output = command.arg("inspect").arg(path).args(options).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn golden(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/coreml").join(name);
    if std::env::var_os("QCONV_UPDATE").is_some() {
        fs::write(&path, found).unwrap();
    }
    assert_eq!(found, fs::read_to_string(&path).unwrap(), "{name}");
}

/// Paths are those of this machine.
fn without(text: String, path: &Path) -> String {
    text.replace(&path.display().to_string(), "PACKAGE")
}

#[test]
fn functions_and_weights_as_text() {
    for name in ["mini", "weights"] {
        let path = fixture(&format!("coreml/{name}.mlpackage"));
        golden(&format!("inspect-{name}.txt"), &without(inspect(&path, &[]), &path));
    }
    let path = fixture("coreml/mini.mlpackage");
    golden("inspect-mini-ops.txt", &without(inspect(&path, &["--ops"]), &path));
    golden("inspect-mini.json", &without(inspect(&path, &["--json"]), &path));
}

#[test]
fn filters() {
    let path = fixture("coreml/weights.mlpackage");
    let sparse = inspect(&path, &["--tensor", "^sparse_"]);
    assert_eq!(sparse.lines().count(), 5, "{sparse}");
    let metadata = inspect(&path, &["--metadata"]);
    assert!(metadata.contains("coremltools.version") && !metadata.contains("int4"), "{metadata}");
    let json: Json = serde_json::from_str(&inspect(&path, &["--json", "--tensor", "^conv$"])).unwrap();
    assert_eq!(json["weights"].as_array().unwrap().len(), 1);
    assert!(json["functions"][0].get("text").is_none());
    let json: Json = serde_json::from_str(&inspect(&path, &["--json", "--ops"])).unwrap();
    assert!(json["functions"][0]["text"].as_str().unwrap().contains("-> int4_blocks:fp16[8,64]"));
}

#[test]
fn a_model_of_several_packages() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["one.mlpackage", "two.mlpackage"] {
        copy(&fixture("coreml/mini.mlpackage"), &dir.path().join(name));
    }
    let chunks = r#"{"packages": [{"package": "two.mlpackage"}, {"package": "one.mlpackage"}]}"#;
    fs::write(dir.path().join(CHUNKS), chunks).unwrap();
    let json: Json = serde_json::from_str(&inspect(dir.path(), &["--json"])).unwrap();
    assert_eq!(json["container"]["packages"], 2);
    let packages = |list: &str| -> Vec<String> {
        let list = json[list].as_array().unwrap();
        list.iter().map(|one| one["package"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(packages("functions"), ["two.mlpackage", "one.mlpackage"]);
    assert_eq!(packages("weights"), ["two.mlpackage", "two.mlpackage", "one.mlpackage", "one.mlpackage"]);
    assert_eq!((&json["totals"]["bytes"], &json["files"].as_array().unwrap().len()), (&Json::from(376), &6));
    let text = inspect(dir.path(), &[]);
    assert!(text.contains("function main of two.mlpackage (CoreML8)"), "{text}");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() { copy(&path, &to) } else { fs::copy(&path, &to).map(drop).unwrap() }
    }
}
