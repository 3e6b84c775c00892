//! The scanner: one damage for each rule, found by the rule's id; files without damage; exit codes, SARIF, manifests, and
//! what uses them.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/place.rs"]
mod place;
#[path = "common/raw.rs"]
mod raw;
#[path = "common/sound.rs"]
mod sound;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use checkpoint::{Made, Random, f32_bytes};
use common::{budget, fixture};
use place::Place;
use qconv::block::codec;
use qconv::convert::Silent;
use qconv::limits::Limits;
use qconv::tensor::DType;
use qconv::verify::scan::{Options, RULES, Scan, Severity, scan};
use raw::{Raw, kind};
use serde_json::{Value as Json, json};
use sound::*;

type Files = Vec<(&'static str, Vec<u8>)>;

/// Files of a model of the fixtures, and more.
fn model(more: &[(&'static str, &[u8])]) -> Files {
    let of = |name: &'static str| (name, fs::read(fixture("models/llama").join(name)).unwrap());
    let mut files: BTreeMap<&'static str, Vec<u8>> =
        ["config.json", "model.safetensors", "tokenizer.json"].map(of).into();
    files.extend(more.iter().map(|(name, bytes)| (*name, bytes.to_vec())));
    files.into_iter().collect()
}

/// What must be found where: rule, files, limits where others count.
fn damages() -> Vec<(&'static str, Files)> {
    let gguf = |bytes: Vec<u8>| vec![("x.gguf", bytes)];
    let whole = sound().bytes();
    let cut = whole[..whole.len() - 33].to_vec();
    let behind = |more: &[u8]| [whole.clone(), more.to_vec()].concat();
    let mut swapped = sound();
    swapped.infos.swap(0, 1);
    let tensor = |name: &str| without("tokenizer.ggml.bos_token_id").info(name, &[8], 0, 256);
    let named = |name: &str| {
        let mut raw = tensor(name);
        raw.data.extend(f32_bytes(&[1.0; 8]));
        raw.bytes()
    };
    let second = Raw::empty().text("general.architecture", "gpt2").info("y", &[8], 0, 0);
    let second = Raw { data: f32_bytes(&[1.0; 8]), ..second };
    let entry = |key: &str, value: u32| without(key).u32(key, value).bytes();
    let mut config: Json = serde_json::from_slice(&model(&[])[0].1).unwrap();
    config["auto_map"] = json!({"AutoModel": "modeling_x.X"});
    let config = config.to_string();
    let nan = f32::NAN.to_le_bytes();
    let imatrix = Raw::empty()
        .text("general.type", "imatrix")
        .strings("imatrix.datasets", &[b"x"])
        .u32("imatrix.chunk_count", 1)
        .u32("imatrix.chunk_size", 8)
        .info("a.in_sum2", &[4, 1], 0, 0)
        .info("a.counts", &[1, 1], 0, 32);
    let mut imatrix = imatrix.with_data(64);
    put(&mut imatrix, 0, &f32_bytes(&[1.0, -1.0, 1.0, 1.0]));
    put(&mut imatrix, 32, &f32_bytes(&[1.0]));
    let ternary = [vec![0b1010_1011u8; 64], vec![0, 0x3c]].concat();
    vec![
        ("QV101", gguf(cut)),
        ("QV103", gguf(behind(&[0xaa; 64]))),
        ("QV104", gguf(behind(b"PK\x05\x06------------------"))),
        ("QV105", gguf(with_tensors(base(), "token_embd.weight", 256, 352).bytes())),
        ("QV106", gguf(data(200, &[7]))),
        ("QV107", gguf(swapped.bytes())),
        ("QV201", vec![("m-00001-of-00002.gguf", shard(0, sound(), 4))]),
        (
            "QV202",
            vec![
                ("m-00001-of-00002.gguf", shard(0, sound(), 4)),
                ("m-00002-of-00002.gguf", shard(1, second, 4)),
            ],
        ),
        (
            "QV203",
            model(&[(
                "model-old.safetensors",
                &Made::new(json!({})).with("a", "F32", &[1], [0; 4]).safetensors(),
            )]),
        ),
        ("QV301", gguf(without("llama.context_length").bytes())),
        ("QV302", gguf(sound().text("general.file_type", "Q4").bytes())),
        ("QV303", gguf(entry("llama.block_count", 513))),
        ("QV304", gguf(sound().u32("general.quantization_version", 7).bytes())),
        ("QV305", gguf(without("general.architecture").text("general.architecture", "zzz9").bytes())),
        ("QV306", gguf(with_tensors(base(), "other.weight", 128, 224).bytes())),
        ("QV307", gguf(entry("llama.embedding_length", 16))),
        ("QV401", gguf(named("\u{1b}[2J"))),
        ("QV402", gguf(named("../../x"))),
        ("QV403", gguf(named("a\u{202e}b"))),
        ("QV501", gguf(numbers("tokenizer.ggml.token_type", kind::I32, &[1]))),
        ("QV502", gguf(entry("tokenizer.ggml.bos_token_id", 4))),
        ("QV503", gguf(tokens(&[b"a", b"b", b"a"]).bytes())),
        (
            "QV504",
            gguf(replace(tokens(&[b"a", b"b", b"<0x-1>"]).bytes(), &types(&[3, 3, 1]), &types(&[3, 3, 6]))),
        ),
        ("QV505", gguf(tokens(&[&[b'x'; 70_000], b"b", b"c"]).bytes())),
        ("QV506", gguf(numbers("tokenizer.ggml.token_type", kind::I32, &[3, 3, 99, 1]))),
        ("QV507", gguf(sound().strings("tokenizer.ggml.merges", &[b"a z"]).bytes())),
        (
            "QV508",
            gguf(
                without("tokenizer.ggml.model")
                    .text("tokenizer.ggml.model", "t5")
                    .array("tokenizer.ggml.precompiled_charsmap", kind::U8, 8, [0xff; 8])
                    .bytes(),
            ),
        ),
        (
            "QV509",
            gguf(
                without("tokenizer.ggml.scores")
                    .array("tokenizer.ggml.scores", kind::F32, 4, [nan; 4].concat())
                    .bytes(),
            ),
        ),
        ("QV510", gguf(tokens(&[]).bytes())),
        ("QV601", gguf(template("{{ nothing.at.all }}"))),
        (
            "QV602",
            gguf(template("{% for i in range(4000) %}{% for j in range(4000) %}x{% endfor %}{% endfor %}")),
        ),
        ("QV603", gguf(template("{{ ''.__class__.__mro__[1].__subclasses__() }}"))),
        ("QV604", gguf(template("{{ os.popen('id').read() }}"))),
        ("QV605", gguf(template("{% include 'x' %}"))),
        ("QV606", gguf(template("{% for i in range(10**9) %}x{% endfor %}"))),
        ("QV607", gguf(template("{{ 'http://example.com' }}"))),
        ("QV701", vec![("x.bin", b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.".to_vec())]),
        ("QV702", vec![("x.pkl", b"\x80\x02\x82\x01.".to_vec())]),
        ("QV801", model(&[("tokenizer_config.json", b"{\"a\": ")])),
        ("QV802", model(&[("config.json", config.as_bytes())])),
        ("QV803", model(&[("modeling_x.py", b"pass")])),
        ("QV804", unfit()),
        ("QV901", gguf(data(4, &nan))),
        ("QV902", gguf(data(4, &f32::INFINITY.to_le_bytes()))),
        ("QV903", gguf(data(128, &[0, 0x7c]))),
        ("QV904", gguf(data(128, &[0, 0xbc]))),
        ("QV905", gguf(data(128, &[0, 0x78]))),
        ("QV906", gguf(one(&[256], DType::TQ2_0, &ternary))),
        ("QV907", gguf(data(0, &[0; 128]))),
        ("QV908", gguf(data(224, &[0; 32]))),
        ("QV909", gguf(data(0, &1u32.to_le_bytes().repeat(32)))),
        ("QV910", gguf(imatrix.bytes())),
    ]
}

/// Metadata of the sound model, without tensors.
fn base() -> Raw {
    Raw { infos: Vec::new(), data: Vec::new(), ..sound() }
}

fn types(types: &[u32]) -> Vec<u8> {
    types.iter().flat_map(|t| t.to_le_bytes()).collect()
}

fn replace(bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes.windows(from.len()).position(|w| w == from).unwrap();
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

/// A quantized checkpoint that lacks the scales of one matrix.
fn unfit() -> Files {
    let mut made = Made::of(&fixture("models/fmt-gptq4"));
    let name = made.tensors.iter().map(|(n, _)| n.clone()).find(|n| n.ends_with(".scales")).unwrap();
    made.take(&name);
    vec![("config.json", made.config.to_string().into_bytes()), ("model.safetensors", made.safetensors())]
}

fn look(dir: &Path, limits: &Limits) -> Scan {
    let options = Options { tensors: true, sha256: false, limits: limits.clone() };
    scan(&[dir.to_path_buf()], &options, &budget(), &Silent).unwrap()
}

fn write(dir: &Path, files: &Files) {
    for (name, bytes) in files {
        fs::write(dir.join(name), bytes).unwrap();
    }
}

fn rules(scan: &Scan) -> Vec<&'static str> {
    scan.findings.iter().map(|f| f.rule.id).collect()
}

#[test]
fn each_rule_finds_its_damage() {
    // These are about the command line's options, or about other files.
    let elsewhere = ["QV001", "QV002", "QV003", "QV004", "QV005", "QV102", "QV990"];
    let mut found: BTreeSet<&str> = elsewhere.into();
    for (rule, files) in damages() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &files);
        let scan = look(dir.path(), &Limits::default());
        assert!(rules(&scan).contains(&rule), "{rule}: {:#?} {:#?}", scan.findings, scan.unchecked);
        let finding = scan.findings.iter().find(|f| f.rule.id == rule).unwrap();
        let name = finding.file.file_name().unwrap().to_str().unwrap();
        assert!(
            files.iter().any(|(n, _)| *n == name) || rule == "QV201" || rule == "QV804",
            "{rule}: {finding:?}"
        );
        found.insert(rule);
    }
    let all: BTreeSet<&str> = RULES.iter().map(|r| r.id).collect();
    assert_eq!(found, all);
}

#[test]
fn places_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = data(4, &f32::NAN.to_le_bytes());
    fs::write(dir.path().join("x.gguf"), &bytes).unwrap();
    let scan = look(dir.path(), &Limits::default());
    let finding = &scan.findings[0];
    let at = finding.offset.unwrap() as usize;
    assert_eq!(bytes[at..at + 4], f32::NAN.to_le_bytes());
    assert_eq!((finding.tensor.as_deref(), finding.length), (Some("token_embd.weight"), Some(4)));
    let bytes = without("llama.block_count").u32("llama.block_count", 600).bytes();
    fs::write(dir.path().join("x.gguf"), &bytes).unwrap();
    let scan = look(dir.path(), &Limits::default());
    let at = scan.findings[0].offset.unwrap() as usize;
    assert!(bytes[at + 8..].starts_with(b"llama.block_count"), "{:?}", scan.findings);
    let bytes = template("ab {{ x.__class__ }}");
    fs::write(dir.path().join("x.gguf"), &bytes).unwrap();
    let scan = look(dir.path(), &Limits::default());
    let at = scan.findings[0].offset.unwrap() as usize;
    assert!(bytes[at..].starts_with(b"__class__"), "{:?}", scan.findings);
}

/// A template is looked at wherever a loader might take it from.
#[test]
fn templates_are_found_in_other_forms() {
    let dir = tempfile::tempdir().unwrap();
    let found = |bytes: Vec<u8>| {
        fs::write(dir.path().join("x.gguf"), bytes).unwrap();
        let scan = look(dir.path(), &Limits::default());
        let mut rules = rules(&scan);
        rules.sort_unstable();
        rules
    };
    let key = "tokenizer.chat_template";
    let evil: &[u8] = b"{{ ''.__class__ }}";
    assert_eq!(found(without(key).text(key, [evil, b"{# \xff #}"].concat()).bytes()), ["QV101", "QV603"]);
    assert_eq!(found(without(key).strings(key, &[evil]).bytes()), ["QV302", "QV603"]);
    assert_eq!(
        found(sound().strings("tokenizer.chat_template.x", &[b"a", evil]).bytes()),
        ["QV302", "QV603"]
    );
    assert_eq!(found(sound().strings("tokenizer.chat_templates", &[evil]).bytes()), ["QV603"]);
    assert_eq!(found(sound().u32("tokenizer.chat_template.x", 1).bytes()), ["QV302"]);
    let names = sound().strings("tokenizer.chat_templates", &[b"tool_use"]);
    assert_eq!(found(names.text("tokenizer.chat_template.tool_use", "{{ messages }}").bytes()), [""; 0]);
}

/// What is found in hostile templates is not in those of known models.
#[test]
fn real_templates_raise_no_alarm() {
    let dir = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for entry in fs::read_dir(common::fixture("chat/templates")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(dir.path().join("x.gguf"), template(&text)).unwrap();
        let scan = look(dir.path(), &Limits::default());
        let alarms: Vec<_> = scan.findings.iter().filter(|f| f.severity != Severity::Note).collect();
        assert!(alarms.is_empty(), "{}: {alarms:?}", path.display());
        seen += 1;
    }
    assert!(seen > 10, "{seen}");
}

#[test]
fn limits_are_findings() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("x.gguf"), sound().bytes()).unwrap();
    let scan = look(dir.path(), &Limits { tensors: 2, ..Limits::default() });
    assert_eq!(rules(&scan), ["QV102"]);
}

#[test]
fn sound_files_have_no_findings() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("x.gguf"), sound().bytes()).unwrap();
    let scan = look(dir.path(), &Limits::default());
    assert!(scan.findings.is_empty() && scan.unchecked.is_empty() && scan.files.len() == 1, "{scan:#?}");
    let set = [
        ("m-00001-of-00002.gguf", shard(0, sound(), 4)),
        ("m-00002-of-00002.gguf", {
            let raw = Raw::empty().info("y", &[8], 0, 0);
            shard(1, Raw { data: f32_bytes(&[1.0; 8]), ..raw }, 4)
        }),
    ];
    write(dir.path(), &set.into());
    let scan = look(dir.path(), &Limits::default());
    assert!(scan.findings.is_empty() && scan.files.len() == 3, "{scan:#?}");

    for name in ["models", "tiny-llama"] {
        let scan = look(&fixture(name), &Limits::default());
        let grave: Vec<_> = scan.findings.iter().filter(|f| f.severity > Severity::Note).collect();
        assert!(grave.is_empty() && scan.unchecked.is_empty(), "{grave:#?} {:#?}", scan.unchecked);
        assert!(scan.files.len() > 5, "{name}");
    }
}

/// Encoded weights are never suspicious; bytes that are ones throughout always are.
#[test]
fn every_block_type_is_judged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.gguf");
    let mut random = Random(7);
    let weights: Vec<f32> = (0..512).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
    let importance = vec![1.0; 512];
    let mut encoded = 0;
    for dtype in DType::ALL.iter().copied().filter(|t| t.ggml_id().is_some()) {
        let bytes = dtype.bytes_for(512).unwrap() as usize;
        if let Some(codec) = codec(dtype).filter(|c| c.can_encode()) {
            let mut data = vec![0; bytes];
            let importance = codec.needs_importance().then_some(importance.as_slice());
            codec.encode(&weights, 512, importance, &mut data).unwrap();
            fs::write(&path, one(&[512], dtype, &data)).unwrap();
            let scan = look(&path, &Limits::default());
            assert!(scan.findings.is_empty(), "{dtype}: {:#?}", scan.findings);
            encoded += 1;
        }
        let is_integer = matches!(dtype, DType::I8 | DType::I16 | DType::I32 | DType::I64);
        fs::write(&path, one(&[512], dtype, &vec![0xff; bytes])).unwrap();
        let scan = look(&path, &Limits::default());
        let wanted = if dtype.is_block() { "QV903" } else { "QV901" };
        assert_eq!(rules(&scan).contains(&wanted), !is_integer, "{dtype}: {:#?}", scan.findings);
    }
    assert!(encoded > 25, "{encoded}");
    for (dtype, byte, rule) in [
        (DType::TQ1_0, 1u8, "QV906"), // no five digits
        (DType::Q2_0, 0b11, "QV906"),
        (DType::MXFP4, 0xfe, "QV905"),
    ] {
        let mut data = vec![0; dtype.bytes_for(512).unwrap() as usize];
        data[if dtype == DType::Q2_0 { 5 } else { 0 }] = byte;
        fs::write(&path, one(&[512], dtype, &data)).unwrap();
        assert!(rules(&look(&path, &Limits::default())).contains(&rule), "{dtype}");
    }
    let floats = [("F8_E4M3", 0x7fu8), ("F8_E5M2", 0x7d), ("F8_E8M0", 0xff)];
    for (dtype, nan) in floats {
        let made = Made::new(json!({})).with("a", dtype, &[4], [0x38, 0x38, nan, 0x38]);
        fs::write(dir.path().join("x.safetensors"), made.safetensors()).unwrap();
        let scan = look(&dir.path().join("x.safetensors"), &Limits::default());
        assert_eq!(rules(&scan), ["QV901"], "{dtype}");
    }
}

fn outcome(place: &Place, args: &[&str]) -> (Option<i32>, Json) {
    let output = place.qconv(&[&["verify", "--json"], args].concat());
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or(Json::Null))
}

#[test]
fn exit_codes_and_reports() {
    let place = Place::new();
    let write = |name: &str, bytes: Vec<u8>| fs::write(place.path(name), bytes).unwrap();
    write("good.gguf", sound().bytes());
    write("warn.gguf", [sound().bytes(), vec![0xaa; 64]].concat());
    write("bad.gguf", data(4, &f32::NAN.to_le_bytes()));
    write("text", b"nothing".to_vec());
    write("future.gguf", Raw { version: 9, ..sound() }.bytes());
    assert_eq!(outcome(&place, &["--scan", "good.gguf"]).0, Some(0));
    assert_eq!(outcome(&place, &["--scan", "warn.gguf"]).0, Some(0));
    assert_eq!(outcome(&place, &["--scan", "--strict", "warn.gguf"]).0, Some(1));
    assert_eq!(outcome(&place, &["--scan", "bad.gguf"]).0, Some(0));
    assert_eq!(outcome(&place, &["--scan", "good.gguf", "future.gguf"]).0, Some(2));
    assert_eq!(outcome(&place, &["good.gguf", "text"]).0, Some(2));
    assert_eq!(outcome(&place, &["good.gguf", "nowhere.gguf"]).0, Some(2));
    let (code, report) = outcome(&place, &["--tensors", "good.gguf", "bad.gguf", "text"]);
    assert_eq!(code, Some(1));
    assert_eq!(
        report["summary"],
        json!({"files": 3, "errors": 1, "warnings": 0, "notes": 0, "unchecked": 1})
    );
    let finding = &report["findings"][0];
    assert_eq!((finding["rule"].as_str(), finding["severity"].as_str()), (Some("QV901"), Some("error")));
    assert_eq!(finding["file"].as_str(), Some("bad.gguf"));
    place.refuses(&["verify", "good.gguf", "bad.gguf", "--against", "x"], &["--against"]);
    place.refuses(&["verify", "--tensors", "good.gguf", "--against", "x"], &["--against"]);

    // A single file that is not sound is not handed to the engine, and its report says what was found.
    let output = place.qconv(&["verify", "warn.gguf", "--no-forward", "--allow-token-mismatch"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("QV103"), "{output:?}");
    write("evil.gguf", template("{{ ''.__class__ }}"));
    let (code, report) = outcome(&place, &["evil.gguf"]);
    assert_eq!(code, Some(1));
    assert_eq!(report["findings"][0]["rule"].as_str(), Some("QV603"));
    assert!(report["checks"].as_array().unwrap().iter().all(|c| c["name"] != "forward"), "{report}");
}

#[test]
fn sarif_is_well_formed() {
    let place = Place::new();
    fs::write(place.path("bad file.gguf"), data(4, &f32::NAN.to_le_bytes())).unwrap();
    fs::write(place.path("evil.gguf"), template("{{ ''.__class__ }}")).unwrap();
    fs::write(place.path("text"), "nothing").unwrap();
    let output = place.qconv(&["verify", "--tensors", "--sarif", "bad file.gguf", "evil.gguf", "text"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let log: Json = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(log["version"], "2.1.0");
    let run = &log["runs"][0];
    let rules = run["tool"]["driver"]["rules"].as_array().unwrap();
    assert_eq!(rules.len(), RULES.len());
    let results = run["results"].as_array().unwrap();
    assert!(results.len() >= 2);
    let mut prints = BTreeSet::new();
    for result in results {
        let index = result["ruleIndex"].as_u64().unwrap() as usize;
        assert_eq!(rules[index]["id"], result["ruleId"]);
        assert_eq!(rules[index]["defaultConfiguration"]["level"], result["level"]);
        assert!(result["message"]["text"].as_str().is_some_and(|t| !t.is_empty()));
        let place = &result["locations"][0]["physicalLocation"];
        assert!(place["artifactLocation"]["uri"].as_str().is_some_and(|u| !u.contains(' ')));
        assert!(place["region"]["byteOffset"].is_u64(), "{result}");
        assert!(prints.insert(result["partialFingerprints"]["qconv/v1"].as_str().unwrap().to_string()));
    }
    assert_eq!(results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"], "bad%20file.gguf");
    assert_eq!(run["invocations"][0]["executionSuccessful"], false);
    assert_eq!(run["invocations"][0]["toolExecutionNotifications"].as_array().unwrap().len(), 1);
    // To a file, with a summary beside it.
    place.qconv(&["verify", "--scan", "--sarif=log.sarif", "evil.gguf"]);
    let again: Json = serde_json::from_slice(&fs::read(place.path("log.sarif")).unwrap()).unwrap();
    assert_eq!(again["runs"][0]["results"].as_array().unwrap().len(), results.len() - 1);
}

#[test]
fn manifests() {
    let place = Place::new();
    fs::create_dir(place.path("d")).unwrap();
    let put = |name: &str, bytes: Vec<u8>| fs::write(place.path(name), bytes).unwrap();
    put("d/a.gguf", sound().bytes());
    put("d/b.safetensors", Made::new(json!({})).with("t", "F32", &[1], [1, 2, 3, 4]).safetensors());
    place.succeeds(&["verify", "d", "--write-manifest", "d/hashes.json"]);
    place.succeeds(&["verify", "d", "--manifest", "d/hashes.json"]);
    let text = fs::read_to_string(place.path("d/hashes.json")).unwrap();
    let sum = place.succeeds(&["verify", "--sha256", "d/a.gguf"]);
    let sum = String::from_utf8(sum.stdout).unwrap();
    assert!(text.contains(&sum[..64]) && sum.ends_with("  d/a.gguf\n"), "{sum}");
    let check = |rule: &str, says: &str| {
        let (code, report) = outcome(&place, &["d", "--manifest", "d/hashes.json"]);
        assert_eq!(code, Some(1), "{rule}");
        let found = report["findings"].as_array().unwrap();
        let found: Vec<_> = found.iter().filter(|f| f["rule"] == rule).collect();
        assert!(found.iter().any(|f| f["message"].as_str().unwrap().contains(says)), "{rule}: {report}");
    };
    // One bit of a tensor: the tensor is named, and no other.
    put("d/a.gguf", data(8, &[1]));
    check("QV001", "see its tensors");
    check("QV002", "token_embd.weight");
    put("d/a.gguf", sound().u32("general.x", 1).bytes());
    check("QV001", "all tensors are as they were");
    put("d/a.gguf", sound().text("general.x", "x".repeat(100)).bytes());
    check("QV001", "length");
    put("d/a.gguf", sound().bytes());
    put("d/c.gguf", sound().bytes());
    check("QV004", "c.gguf");
    fs::remove_file(place.path("d/c.gguf")).unwrap();
    fs::remove_file(place.path("d/b.safetensors")).unwrap();
    check("QV003", "b.safetensors");
    for name in ["../a.gguf", "/etc/passwd", "x/../../y", "c:\\\\x"] {
        put("d/hashes.json", text.replace("b.safetensors", name).into_bytes());
        check("QV005", "leads out");
    }
    put("d/hashes.json", b"{}".to_vec());
    check("QV005", "is no manifest");
    place.refuses(&["verify", "d", "--manifest", "nowhere.json"], &["nowhere.json"]);
}

#[test]
fn packed_files_are_checked() {
    let place = Place::new();
    let source = fixture("models/llama");
    place.succeeds(&["pack", source.to_str().unwrap(), "-o", "x.qpack", "-q"]);
    assert_eq!(outcome(&place, &["--tensors", "x.qpack"]).0, Some(0));
    let mut bytes = fs::read(place.path("x.qpack")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(place.path("x.qpack"), bytes).unwrap();
    let (code, report) = outcome(&place, &["--tensors", "x.qpack"]);
    assert_eq!((code, report["findings"][0]["rule"].as_str()), (Some(1), Some("QV990")));
}

/// Which files are looked at, and how often.
#[test]
fn files_are_found_once() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    // Models beside a checkpoint; what a cache has twice; what is only called as importances are.
    for (name, bytes) in model(&[("x.gguf", &template("{{ ''.__class__ }}"))]) {
        put(&format!("snapshots/a/{name}"), &bytes);
    }
    put("blobs/0123", &sound().bytes());
    put("notes.dat", b"no matrix");
    let paths = [dir.path().to_path_buf(), dir.path().join("snapshots/a/x.gguf")];
    let scan = scan(&paths, &Options { sha256: true, ..Options::default() }, &budget(), &Silent).unwrap();
    assert!(rules(&scan).contains(&"QV603") && scan.unchecked.is_empty(), "{scan:#?}");
    let names: BTreeSet<_> = scan.files.iter().map(|f| &f.path).collect();
    assert_eq!((scan.files.len(), names.len()), (4, 4), "{scan:#?}");
    let gguf = scan.files.iter().find(|f| f.path.ends_with("x.gguf")).unwrap();
    assert!(gguf.format == "GGUF" && !gguf.tensors.is_empty(), "{gguf:?}");
}

/// Names that a disassembler would miss that knew torch's own pickles only.
#[test]
fn pickles_of_any_form_are_looked_at() {
    let over = b"\x80\x04\x8c\x05torchq\x01q\x01\x8c\x05posix\x94\x8c\x06deviceq\x02\x8c\x06system\x94h\x01h\x02\x93.";
    let old = b"L119547037146038801333356L\n.I1001\n.}.cposix\nsystem\n.].";
    for pickle in [&over[..], &old[..], b"I1\n0cposix\nsystem\n."] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x.bin"), pickle).unwrap();
        let scan = look(dir.path(), &Limits::default());
        assert!(scan.findings.iter().any(|f| f.message.contains("posix.system")), "{scan:#?}");
    }
}

/// `docs/verify.md` has the rules as the code does.
#[test]
fn rules_are_documented() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/verify.md")).unwrap();
    let rows: Vec<&str> = text.lines().filter(|l| l.starts_with("| QV")).collect();
    let wanted: Vec<String> = RULES
        .iter()
        .map(|r| format!("| {} | {} | {} | {} |", r.id, r.name, r.severity.name(), r.text))
        .collect();
    assert_eq!(rows, wanted);
}

/// What others run: both files are YAML, and the command line in them is one that is understood.
#[test]
fn action_and_hooks_are_accepted() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let yaml = |name: &str| -> Json {
        serde_norway::from_str(&fs::read_to_string(root.join(name)).unwrap()).unwrap()
    };
    let place = Place::new();
    fs::write(place.path("x.gguf"), sound().bytes()).unwrap();
    let hooks = yaml(".pre-commit-hooks.yaml");
    assert_eq!(hooks.as_array().unwrap().len(), 2);
    for hook in hooks.as_array().unwrap() {
        let entry = hook["entry"].as_str().unwrap().strip_prefix("qconv ").unwrap();
        let args: Vec<&str> = entry.split_whitespace().chain(["x.gguf"]).collect();
        place.succeeds(&args);
    }
    let action = yaml("action.yml");
    assert_eq!(action["runs"]["using"], "composite");
    let steps = action["runs"]["steps"].as_array().unwrap();
    let script = steps.last().unwrap()["run"].as_str().unwrap();
    assert!(steps.iter().all(|s| s["shell"] == "bash" && !s["run"].as_str().unwrap().contains("${{")));
    // As a runner does it, with this binary.
    #[cfg(unix)]
    {
        fs::create_dir_all(place.path("qconv/bin")).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_qconv"), place.path("qconv/bin/qconv")).unwrap();
        let run = |files: &str, args: &str| {
            let mut bash = std::process::Command::new("bash");
            bash.args(["-ec", script]).current_dir(place.0.path()).env("RUNNER_TEMP", place.0.path());
            let output = bash.envs([("FILES", files), ("ARGS", args), ("SARIF", "out.sarif")]).output();
            output.unwrap().status.code()
        };
        // The star is a name, and there is no such file.
        assert_eq!(run("x.gguf *", action["inputs"]["args"]["default"].as_str().unwrap()), Some(2));
        assert_eq!(run("x.gguf", "--tensors --strict"), Some(0));
        assert!(place.path("out.sarif").exists());
    }
}
