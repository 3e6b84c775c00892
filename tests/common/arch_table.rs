//! docs/architectures.md: what is shown of each class. From the definitions, the examples that just
//! ran, and tests/peers/architectures.tsv, which `make peers-models` writes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use qconv::arch::{self, Architecture};

const HEAD: &str = "\
# Architectures

Written by `make architectures`; `make test` holds every row to be true. For each class that `config.json` may name:

- **runs**: examples of the definition, made-up checkpoints that were converted, loaded and run in the linked
  llama.cpp, converted back and compared, in `make test`. Classes of one definition share its rules.
- **llama.cpp's converter**: whether it made the same tensors and metadata of a small model that transformers
  wrote, and if not, why; by `make peers-models`.
- **transformers**: root mean square of the difference between the logits (of encoders, the hidden states) that
  llama.cpp computes from our file and those of transformers, relative to their spread; by `make peers-models`. Above
  1e-4 mostly ggml's table for GELU speaks. `-` where transformers has no such class: then names, shapes and keys
  are shown, not that the model computes the same.

";

/// Of each definition its examples' names, in order.
pub type Examples = Vec<(Architecture, Vec<String>)>;

/// Holds every row of the table that is checked in against what is found now, or writes the table
/// where `QCONV_WRITE_TABLE` is set. A new definition may have no row yet: it takes one new file.
pub fn check(examples: &Examples) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path: PathBuf = root.join("docs/architectures.md");
    let peers = fs::read_to_string(root.join("tests/peers/architectures.tsv")).unwrap();
    let table = render(examples, &peers);
    if std::env::var_os("QCONV_WRITE_TABLE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        return fs::write(&path, table).unwrap();
    }
    let old = fs::read_to_string(&path).unwrap_or_default();
    let rows: Vec<&str> = old.lines().filter(|l| l.starts_with("| ")).collect();
    assert!(rows.len() > 200, "docs/architectures.md has {} rows", rows.len());
    let wrong: Vec<&&str> = rows.iter().filter(|row| !table.lines().any(|l| l == **row)).collect();
    assert!(
        wrong.is_empty(),
        "docs/architectures.md is not up to date, run `make architectures`: {wrong:#?}"
    );
}

fn render(examples: &Examples, peers: &str) -> String {
    // By architecture and class: what was compared, the same things said once.
    let mut compared: BTreeMap<(&str, &str), [Vec<&str>; 2]> = BTreeMap::new();
    for line in peers.lines().skip(1) {
        let fields: Vec<&str> = line.split('\t').collect();
        let [arch, class, _, converter, transformers] = fields[..] else { panic!("{line}") };
        let lists = compared.entry((arch, class)).or_default();
        for (list, what) in lists.iter_mut().zip([converter, transformers]) {
            if !list.contains(&what) {
                list.push(what);
            }
        }
    }
    let mut rows = String::new();
    let (mut classes, mut equal, mut matching) = (0, 0, 0);
    for (definition, names) in examples {
        // A name may stand for several classes, told apart by their configs.
        let classes_of: BTreeSet<&str> = definition.class_names().collect();
        for class in classes_of {
            let (converter, rms) = match compared.get(&(definition.arch.as_str(), class)) {
                Some([converter, rms]) => (converter.join("; "), rms.join("; ")),
                None => ("not compared".into(), "not compared".into()),
            };
            let rms = if rms == "transformers has no such class" { "-".into() } else { rms };
            classes += 1;
            equal += usize::from(converter.starts_with("equal"));
            matching += usize::from(rms.starts_with(|c: char| c.is_ascii_digit()));
            let (runs, arch) = (names.join(", "), &definition.arch);
            writeln!(rows, "| {class} | {arch} | {runs} | {converter} | {rms} |").unwrap();
        }
    }
    let mut out = HEAD.to_string();
    writeln!(
        out,
        "{} definitions for {classes} classes; {matching} classes computed beside transformers, {equal} without \
         any difference from llama.cpp's converter.\n",
        examples.len()
    )
    .unwrap();
    out += "| class | architecture | runs | llama.cpp's converter | transformers |\n|---|---|---|---|---|\n";
    out += &rows;
    out += "\n## Refused\n\n| class | why |\n|---|---|\n";
    for (class, why) in arch::refused().unwrap() {
        writeln!(out, "| {class} | {why} |").unwrap();
    }
    out
}
