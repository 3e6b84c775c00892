//! What qconv is built of, held against `deny.toml` without the network. `cargo deny check` does the same and asks
//! for advisories.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value as Json;

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// A crate, in one version.
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
    builds: bool,
}

impl Package {
    fn id(&self) -> String {
        format!("{}@{}", self.name, self.version)
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All crates of the lock file, and whether these are all: cargo may have fetched only those of this platform.
fn packages() -> (Vec<Package>, bool) {
    let metadata = |more: &[&str]| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["metadata", "--locked", "--offline", "--format-version", "1"]).args(more);
        let out = cargo.current_dir(root()).output().unwrap();
        out.status.success().then_some(out.stdout).ok_or_else(|| String::from_utf8(out.stderr).unwrap())
    };
    let (json, all) = match metadata(&["--all-features"]) {
        Ok(json) => (json, true),
        Err(_) => {
            let out = Command::new("rustc").arg("-vV").output().unwrap();
            let text = String::from_utf8(out.stdout).unwrap();
            let host = text.lines().find_map(|l| l.strip_prefix("host: ")).unwrap();
            eprintln!("only the crates that {host} needs are here, and only they are looked at");
            (metadata(&["--filter-platform", host]).unwrap(), false)
        }
    };
    let json: Json = serde_json::from_slice(&json).unwrap();
    let text = |v: &Json| v.as_str().map(String::from);
    let builds = |t: &Json| t["kind"].as_array().unwrap().iter().any(|k| k == "custom-build");
    let packages = json["packages"].as_array().unwrap().iter().map(|p| Package {
        name: text(&p["name"]).unwrap(),
        version: text(&p["version"]).unwrap(),
        license: text(&p["license"]),
        source: text(&p["source"]),
        builds: p["targets"].as_array().unwrap().iter().any(builds),
    });
    (packages.collect(), all)
}

/// A list of `deny.toml`.
fn list(table: &str, key: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("deny.toml")).unwrap();
    let deny: toml::Table = toml::from_str(&text).unwrap();
    let place = table.split('.').fold(&toml::Value::Table(deny), |v, part| &v[part]).clone();
    let items = place[key].as_array().unwrap();
    items.iter().map(|v| v.as_str().unwrap().to_string()).collect()
}

/// Whether the terms of an SPDX expression can be met with `allowed` ones: all of an AND, one of an OR. The slash of
/// old manifests is an OR.
fn is_met(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let mut depth = 0;
    let outside: Vec<bool> = expression
        .chars()
        .flat_map(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            vec![depth == 0; c.len_utf8()]
        })
        .collect();
    // OR binds less than AND, so that it is taken apart first.
    for (word, all) in [(" OR ", false), ("/", false), (" AND ", true)] {
        if let Some((at, _)) = expression.match_indices(word).find(|(at, _)| outside[*at]) {
            let sides = [&expression[..at], &expression[at + word.len()..]].map(|e| is_met(e, allowed));
            return if all { sides[0] && sides[1] } else { sides[0] || sides[1] };
        }
    }
    let term = expression.trim();
    match term.strip_prefix('(').and_then(|t| t.strip_suffix(')')) {
        Some(inner) => is_met(inner, allowed),
        None => allowed.contains(term),
    }
}

/// Both ways, where all crates are there: what is not in the list, and what the list has too much.
fn check(found: BTreeSet<String>, listed: &BTreeSet<String>, all: bool, what: &str) {
    let new: Vec<_> = found.difference(listed).collect();
    assert!(new.is_empty(), "{what} that deny.toml does not list: {new:?}");
    let gone: Vec<_> = listed.difference(&found).collect();
    assert!(!all || gone.is_empty(), "{what} that deny.toml lists, and that are not there: {gone:?}");
}

#[test]
fn expressions() {
    let allowed = ["MIT", "ISC", "X WITH Y"].map(String::from).into();
    for met in
        ["MIT", "MIT OR GPL", "GPL/MIT", "GPL / MIT", "MIT AND ISC", "(GPL OR MIT) AND ISC", "X WITH Y"]
    {
        assert!(is_met(met, &allowed), "{met}");
    }
    for unmet in ["GPL", "MIT AND GPL", "(MIT OR ISC) AND GPL", "GPL OR MIT AND GPL", "X", ""] {
        assert!(!is_met(unmet, &allowed), "{unmet}");
    }
}

#[test]
fn crates_are_those_that_deny_toml_allows() {
    let (packages, all) = packages();
    assert!(packages.len() > 100, "{} crates", packages.len());
    let allowed = list("licenses", "allow");
    for p in packages.iter().filter(|p| p.name != "qconv") {
        assert_eq!(p.source.as_deref(), Some(CRATES_IO), "{}", p.id());
        let license = p.license.as_deref().unwrap_or_default();
        assert!(is_met(license, &allowed), "{}: {license:?}", p.id());
    }

    let builds = packages.iter().filter(|p| p.builds).map(|p| p.name.clone()).collect();
    check(builds, &list("bans.build", "allow-build-scripts"), all, "build scripts");

    let mut versions: BTreeMap<&str, Vec<&Package>> = BTreeMap::new();
    packages.iter().for_each(|p| versions.entry(&p.name).or_default().push(p));
    let number = |p: &Package| -> Vec<u64> {
        let core = p.version.split(['-', '+']).next().unwrap();
        core.split('.').map(|n| n.parse().unwrap()).collect()
    };
    let older = versions.into_values().flat_map(|mut same| {
        same.sort_by_key(|p| number(p));
        same.pop();
        same
    });
    check(older.map(Package::id).collect(), &list("bans", "skip"), all, "older versions beside newer ones");
}

/// Also those that this platform does not need.
#[test]
fn the_lock_file_names_crates_io_and_checksums_alone() {
    let text = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let lock: toml::Table = toml::from_str(&text).unwrap();
    let packages = lock["package"].as_array().unwrap();
    assert!(packages.len() > 100);
    for p in packages.iter().filter(|p| p["name"].as_str() != Some("qconv")) {
        assert_eq!(p.get("source").and_then(toml::Value::as_str), Some(CRATES_IO), "{p}");
        let checksum = p.get("checksum").and_then(toml::Value::as_str).unwrap_or_default();
        assert!(checksum.len() == 64, "{p}");
    }
}

/// As far as cargo has the registry's index here; it holds what was known when the crates were last resolved.
#[test]
fn no_crate_was_known_to_be_yanked() {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let indexes = home.and_then(|home| fs::read_dir(home.join("registry/index")).ok());
    let indexes: Vec<PathBuf> = indexes.into_iter().flatten().map(|e| e.unwrap().path()).collect();
    let (packages, _) = packages();
    let mut known = 0;
    for p in packages.iter().filter(|p| p.source.is_some()) {
        // Where the sparse index keeps a crate: `3/f/foo`, `se/rd/serde`.
        let name = p.name.to_lowercase();
        let folder = match name.len() {
            1 | 2 => name.len().to_string(),
            3 => format!("3/{}", &name[..1]),
            _ => format!("{}/{}", &name[..2], &name[2..4]),
        };
        let cached = indexes.iter().map(|i| i.join(".cache").join(&folder).join(&name));
        for entries in cached.filter_map(|path| fs::read(path).ok()) {
            let lines =
                entries.split(|b| *b == 0).filter_map(|line| serde_json::from_slice::<Json>(line).ok());
            for line in lines.filter(|l| l["vers"] == p.version.as_str()) {
                assert_eq!(line["yanked"], false, "{} was yanked", p.id());
                known += 1;
            }
        }
    }
    eprintln!("of {} crates the index here knows {known}", packages.len());
}

/// The fuzzers have a lock file of their own, which has to know what the library is built of.
#[test]
fn the_fuzzers_lock_file_is_current() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--locked", "--offline", "--format-version", "1", "--manifest-path"]);
    let out = cargo.arg(root().join("fuzz/Cargo.toml")).output().unwrap();
    let text = String::from_utf8(out.stderr).unwrap();
    // What was not fetched is another matter.
    assert!(!text.contains("cannot update the lock file"), "{text}");
}
