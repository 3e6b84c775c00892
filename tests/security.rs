//! What `SECURITY.md` says is there: the tests of its table, the options of its limits.

use std::fs;
use std::path::Path;

use qconv::limits::Bound;
use regex::Regex;

/// Published faults whose class a test has to cover.
const PUBLISHED: &[&str] = &[
    "CVE-2024-21802",
    "CVE-2024-25664",
    "CVE-2025-53630",
    "CVE-2026-27940",
    "GHSA-vgg9-87g3-85w8",
    "CVE-2026-33298",
    "GHSA-96jg-mvhq-q7q7",
    "PR 24759",
    "#27203",
    "GHSA-3p75-pq92-q28f",
    "#19856",
    "#27188",
    "CVE-2024-39720",
    "CVE-2025-0312",
    "CVE-2024-12055",
    "CVE-2026-7482",
    "CVE-2024-45436",
    "CVE-2024-34359",
    "CVE-2026-5760",
    "CVE-2025-49847",
    "#26511",
    "PR 25821",
    "pickle",
    "Trail of Bits",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The rows of the table below a heading, as cells.
fn table(heading: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let (_, section) = text.split_once(&format!("## {heading}\n")).unwrap_or_else(|| panic!("no {heading}"));
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_string()).collect()).collect()
}

#[test]
fn every_class_has_tests_that_exist() {
    let rows = table("Classes of faults, and their tests");
    assert!(rows.len() >= 15, "{} rows", rows.len());
    let name = Regex::new("`([a-z0-9_/]+)(\\.rs)?`").unwrap();
    let mut seen = 0;
    for row in &rows {
        let [faults, _, tests] = &row[..] else { panic!("{row:?} has no three cells") };
        let mut file: Option<(String, String)> = None;
        let mut of_row = 0;
        for found in name.captures_iter(tests) {
            if found.get(2).is_some() {
                // Tests beside the code have its whole path.
                let dir =
                    if found[1].starts_with("src/") { root().to_path_buf() } else { root().join("tests") };
                let path = dir.join(format!("{}.rs", &found[1]));
                let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{faults}: {path:?}: {e}"));
                file = Some((found[1].to_string(), text));
                continue;
            }
            let (file, text) = file.as_ref().unwrap_or_else(|| panic!("{faults}: no file before the test"));
            let test = Regex::new(&format!(r"#\[test\]\s+fn {}\(\)", &found[1])).unwrap();
            assert!(test.is_match(text), "{faults}: {file}.rs has no test {}", &found[1]);
            of_row += 1;
        }
        assert!(of_row > 0, "{faults}: no test");
        seen += of_row;
    }
    assert!(seen > rows.len());
}

#[test]
fn published_faults_are_in_the_table() {
    let rows = table("Classes of faults, and their tests");
    for fault in PUBLISHED {
        // Numbers that share a year are written without it.
        let short = fault.rsplit('-').next().unwrap();
        let is_there = |row: &Vec<String>| row[0].contains(fault) || row[0].contains(short);
        assert!(rows.iter().any(is_there), "{fault}");
    }
}

#[test]
fn limits_are_those_of_the_program() {
    let rows = table("Limits");
    let bounds = [
        Bound::Header,
        Bound::String,
        Bound::Metadata,
        Bound::Depth,
        Bound::Tensors,
        Bound::Shards,
        Bound::SideFile,
        Bound::Executor,
    ];
    let options: Vec<String> = bounds.iter().map(|b| format!("`--{}`", b.option())).collect();
    assert_eq!(rows.iter().map(|row| row[0].clone()).collect::<Vec<_>>(), options);
}
