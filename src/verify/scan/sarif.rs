//! SARIF 2.1.0, which code-scanning services read.

use std::path::Path;

use serde_json::{Value as Json, json};

use super::{Finding, RULES, Scan};
use crate::sha256::{Sha256, hex};

const SCHEMA: &str = "https://json.schemastore.org/sarif-2.1.0.json";

/// The log of a scan: one run, all rules, a result for each finding.
pub fn log(scan: &Scan) -> Json {
    let rules: Vec<Json> = RULES
        .iter()
        .map(|rule| {
            json!({
                "id": rule.id,
                "name": pascal(rule.name),
                "shortDescription": {"text": rule.text},
                "fullDescription": {"text": rule.text},
                "defaultConfiguration": {"level": rule.severity.name()},
                "properties": {"tags": ["security", "model-file"]},
            })
        })
        .collect();
    let artifacts: Vec<Json> = scan
        .files
        .iter()
        .map(|file| {
            let mut artifact = json!({"location": location(&file.path), "length": file.bytes});
            if let Some(sum) = &file.sha256 {
                artifact["hashes"] = json!({"sha-256": sum});
            }
            artifact
        })
        .collect();
    let notifications: Vec<Json> = scan
        .unchecked
        .iter()
        .map(|u| {
            json!({
                "level": "error",
                "message": {"text": format!("could not be checked: {}", u.error)},
                "locations": [{"physicalLocation": {"artifactLocation": location(&u.path)}}],
            })
        })
        .collect();
    json!({
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {
                "name": "qconv",
                "version": env!("CARGO_PKG_VERSION"),
                "semanticVersion": env!("CARGO_PKG_VERSION"),
                "rules": rules,
            }},
            "columnKind": "unicodeCodePoints",
            "invocations": [{
                "executionSuccessful": scan.unchecked.is_empty(),
                "toolExecutionNotifications": notifications,
            }],
            "artifacts": artifacts,
            "results": scan.findings.iter().map(result).collect::<Vec<_>>(),
        }],
    })
}

fn result(finding: &Finding) -> Json {
    let mut physical = json!({"artifactLocation": location(&finding.file)});
    if let Some(offset) = finding.offset.filter(|o| i64::try_from(*o).is_ok()) {
        physical["region"] = json!({"byteOffset": offset});
        if let Some(length) = finding.length.filter(|n| i64::try_from(*n).is_ok()) {
            physical["region"]["byteLength"] = json!(length);
        }
    }
    let mut place = json!({"physicalLocation": physical});
    let logical: Vec<Json> = [(&finding.tensor, "resource"), (&finding.key, "member")]
        .into_iter()
        .filter_map(|(name, kind)| Some(json!({"name": name.as_ref()?, "kind": kind})))
        .collect();
    if !logical.is_empty() {
        place["logicalLocations"] = json!(logical);
    }
    let mut text = finding.message.clone();
    if let Some(hint) = &finding.hint {
        text = format!("{text}. {hint}");
    }
    // Stays the same when the finding is met again, wherever the file lies and whatever its numbers are.
    let name = finding.file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let of = |part: &Option<String>| part.clone().unwrap_or_default();
    let identity = [finding.rule.id, &name, &of(&finding.tensor), &of(&finding.key)].join("\0");
    json!({
        "ruleId": finding.rule.id,
        "ruleIndex": RULES.iter().position(|r| r.id == finding.rule.id).unwrap_or_default(),
        "level": finding.severity.name(),
        "message": {"text": text},
        "locations": [place],
        "partialFingerprints": {"qconv/v1": hex(&Sha256::digest(identity.as_bytes()))},
    })
}

/// A relative path as a URI reference; an absolute one as a URI.
fn location(path: &Path) -> Json {
    let text = path.to_string_lossy().replace('\\', "/");
    let text = text.trim_start_matches("./");
    let encoded: String = text
        .bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                char::from(b).to_string()
            }
            b => format!("%{b:02X}"),
        })
        .collect();
    json!({"uri": if path.is_absolute() { format!("file://{encoded}") } else { encoded }})
}

/// `shard-missing` as `ShardMissing`: what SARIF wants names to be.
fn pascal(name: &str) -> String {
    let capital = |part: &str| {
        let mut chars = part.chars();
        chars.next().map(|c| c.to_ascii_uppercase().to_string() + chars.as_str()).unwrap_or_default()
    };
    name.split('-').map(capital).collect()
}
