//! The shape of the source tree: modules import downward only, files stay small, and `unsafe`
//! stays where it belongs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

/// From top to bottom. A module may import those below it, never those above.
const ORDER: &[&str] = &[
    "cli",
    "verify",
    "diff",
    "inspect",
    "mix",
    "model",
    "convert",
    "calibrate",
    "eval",
    "exec",
    "ggml",
    "vocab",
    "mil",
    "arch",
    "quantize",
    "packed",
    "block",
    "container",
    "tensor",
    // The ground that all stand on.
    "work",
    "sha256",
    "sys",
    "limits",
    "error",
    "plain",
];
/// The roots of the two crates.
const ROOTS: &[&str] = &["lib", "main"];
const MAY_BE_UNSAFE: &[&str] = &["src/block/simd/", "src/ggml/", "src/container/map.rs"];
/// Where one line allows it, for the module or for the one that it declares: `block::simd`, and `sha256`'s kernels,
/// which lie beside those.
const ALLOW_UNSAFE: &[&str] =
    &["src/block/mod.rs", "src/container/map.rs", "src/ggml/mod.rs", "src/sha256/lanes.rs"];
const MOST_LINES: usize = 650;

struct SourceFile {
    /// Relative to the repository: `src/arch/expr.rs`.
    path: String,
    text: String,
}

impl SourceFile {
    /// Folders below `src` and the file's name without `.rs`; `mod` is left out.
    fn modules(&self) -> Vec<&str> {
        let path = self.path.trim_start_matches("src/").trim_end_matches(".rs");
        path.split('/').filter(|part| *part != "mod").collect()
    }

    /// The lines of code: comments, documentation too, are left out.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text
            .lines()
            .enumerate()
            .map(|(n, line)| (n + 1, line.split_once("// ").map_or(line, |(code, _)| code)))
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
    }
}

fn sources() -> Vec<SourceFile> {
    fn visit(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(&path, files);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    visit(&root.join("src"), &mut files);
    files.sort();
    assert!(files.len() > 40, "the source tree was not found");
    files
        .iter()
        .map(|path| SourceFile {
            path: path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/"),
            text: fs::read_to_string(path).unwrap(),
        })
        .collect()
}

/// Modules of the crate's root that `code` (a whole file without comments) names by way of
/// `crate::` or by enough `super::`; `depth` is how many `super::` lead to the root.
fn imports(code: &str, depth: usize) -> Vec<String> {
    let root = if depth == 0 {
        r"\bcrate::".to_string()
    } else {
        format!(r"(?:\bcrate::|(?:\bsuper::){{{depth}}})")
    };
    let one = Regex::new(&format!(r"{root}([a-z_]+)")).unwrap();
    let group = Regex::new(&format!(r"{root}\{{")).unwrap();
    let mut found: Vec<String> = one.captures_iter(code).map(|c| c[1].to_string()).collect();
    for start in group.find_iter(code) {
        // The names directly within the braces: a::{b, c::{d}, e} has b, c and e.
        let mut nesting = 1;
        let inside: String = code[start.end()..]
            .chars()
            .scan((), |(), c| {
                nesting += i32::from(c == '{') - i32::from(c == '}');
                (nesting > 0).then_some(if nesting == 1 { c } else { ' ' })
            })
            .collect();
        let name = |item: &str| {
            item.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().map(String::from)
        };
        found.extend(inside.split(',').filter_map(name));
    }
    found
}

#[test]
fn imports_point_downward() {
    let rank = |module: &str| ORDER.iter().position(|m| *m == module);
    let mut wrong = Vec::new();
    for file in sources() {
        let modules = file.modules();
        let own = modules[0];
        if ROOTS.contains(&own) {
            continue;
        }
        let here = rank(own).unwrap_or_else(|| panic!("{}: {own} has no place in the order", file.path));
        let code: String = file.code().map(|(_, line)| format!("{line}\n")).collect();
        for target in imports(&code, modules.len()) {
            if rank(&target).is_some_and(|there| there < here) {
                wrong.push(format!("{}: {own} imports {target}, which is above it", file.path));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// What the executor computes is what stands in the file, not the graph that it was built from.
#[test]
fn the_executor_knows_no_builder() {
    let own: Vec<SourceFile> = sources().into_iter().filter(|f| f.modules()[0] == "exec").collect();
    assert!(own.len() > 5);
    for file in own {
        let code: String = file.code().map(|(_, line)| format!("{line}\n")).collect();
        let targets = imports(&code, file.modules().len());
        assert!(!targets.iter().any(|t| ["mil", "convert", "arch"].contains(&t.as_str())), "{}", file.path);
    }
}

#[test]
fn imports_are_found() {
    let code = "use crate::{arch, block::{codec, x}, tensor::DType};\nuse crate::vocab::Vocab;\nsuper::super::sys::f()";
    let mut found = imports(code, 2);
    found.sort();
    assert_eq!(found, ["arch", "block", "sys", "tensor", "vocab"]);
}

#[test]
fn files_stay_small() {
    let long: Vec<_> = sources()
        .iter()
        .map(|f| (f.path.clone(), f.text.lines().count()))
        .filter(|(_, lines)| *lines > MOST_LINES)
        .collect();
    assert!(long.is_empty(), "more than {MOST_LINES} lines: {long:?}");
}

/// The compiler holds the rest to it: `lib.rs` denies `unsafe`, and nothing but these lines allows it. Clippy wants a
/// SAFETY comment at each block.
#[test]
fn unsafe_stays_in_its_folders() {
    let words = [r"\bunsafe\b", r"\bunsafe_code\b"].map(|w| Regex::new(w).unwrap());
    let (mut wrong, mut allowed) = (Vec::new(), BTreeMap::new());
    for file in sources() {
        let is_root = ROOTS.contains(&file.modules()[0]);
        for (n, line) in file.code() {
            let may = MAY_BE_UNSAFE.iter().any(|folder| file.path.starts_with(folder));
            if words[0].is_match(line) && !may {
                wrong.push(format!("{}:{n}: {}", file.path, line.trim()));
            }
            let is_held = is_root && (line.contains("forbid(") || line.contains("deny("));
            if words[1].is_match(line) && !is_held {
                *allowed.entry(file.path.clone()).or_insert(0) += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    assert_eq!(allowed, ALLOW_UNSAFE.iter().map(|path| (path.to_string(), 1)).collect());
    let root = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    assert!(root.contains("\n#![deny(unsafe_code)]\n#![deny(clippy::undocumented_unsafe_blocks)]\n"));
    for (n, line) in root.lines().enumerate().filter(|(_, line)| line.starts_with("pub mod ")) {
        let name = line.trim_start_matches("pub mod ").trim_end_matches(';');
        let may = ALLOW_UNSAFE.iter().any(|path| path.starts_with(&format!("src/{name}/")));
        let forbids = n > 0 && root.lines().nth(n - 1) == Some("#[forbid(unsafe_code)]");
        assert!(may != forbids, "src/lib.rs:{}: {name}", n + 1);
    }
}
