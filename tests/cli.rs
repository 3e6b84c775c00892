//! The command line as a user meets it: wrong input gets one clear message and exit code 2 and
//! leaves nothing behind; output goes where it should, and nowhere else.

mod common;
#[path = "common/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use assert_cmd::assert::OutputAssertExt;
use place::{Place, check_refusal};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde_json::{Value as Json, json};

/// Models to convert.
trait Models {
    /// A copy of the small Llama, its weights as `shards` files.
    fn llama(&self, name: &str, shards: usize) -> PathBuf;
    /// The same, with its tensors changed by `damage` before they are written.
    fn damaged_llama(&self, name: &str, shards: usize, damage: impl FnOnce(&mut Tensors)) -> PathBuf;
}

impl Models for Place {
    fn llama(&self, name: &str, shards: usize) -> PathBuf {
        self.damaged_llama(name, shards, |_| {})
    }

    fn damaged_llama(&self, name: &str, shards: usize, damage: impl FnOnce(&mut Tensors)) -> PathBuf {
        let source = common::fixture("models/llama");
        let dir = self.path(name);
        fs::create_dir(&dir).unwrap();
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            fs::copy(source.join(file), dir.join(file)).unwrap();
        }
        let mut tensors = read_tensors(&source.join("model.safetensors"));
        damage(&mut tensors);
        write_shards(&dir, &tensors, shards);
        dir
    }
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec())))
        .collect()
}

fn write_shards(dir: &Path, tensors: &Tensors, shards: usize) {
    let per_shard = tensors.len().div_ceil(shards);
    let names: Vec<&String> = tensors.keys().collect();
    let mut weight_map = serde_json::Map::new();
    for (k, part) in names.chunks(per_shard).enumerate() {
        let file = match shards {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{shards:05}.safetensors", k + 1),
        };
        let views = part.iter().map(|name| {
            let (dtype, shape, data) = &tensors[*name];
            (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        fs::write(dir.join(&file), serialize(views, None).unwrap()).unwrap();
        weight_map.extend(part.iter().map(|name| (name.to_string(), Json::from(file.as_str()))));
    }
    if shards > 1 {
        let index = json!({"metadata": {}, "weight_map": weight_map});
        fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Json)) {
    let mut value: Json = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn what_is_no_model() {
    let place = Place::new();
    fs::create_dir(place.path("empty")).unwrap();
    fs::write(place.path("notes.txt"), "This is not a model.\n").unwrap();
    place.refuses(&["hf-to-gguf", "nowhere", "-o", "x.gguf"], &["nowhere", "No such file"]);
    place.refuses(&["hf-to-gguf", "notes.txt", "-o", "x.gguf"], &["notes.txt", "no Hugging Face model"]);
    place.refuses(&["hf-to-gguf", "empty", "-o", "x.gguf"], &["empty", "config.json is missing"]);
    for command in [
        &["gguf-to-hf", "notes.txt", "-o", "x"][..],
        &["quantize", "notes.txt", "x.gguf", "--type", "q8_0"],
        &["inspect", "notes.txt"],
    ] {
        place.refuses(command, &["notes.txt"]);
    }
    for command in [
        &["gguf-to-hf", "nowhere", "-o", "x"][..],
        &["quantize", "nowhere", "x.gguf", "--type", "q8_0"],
        &["inspect", "nowhere"],
        &["verify", "nowhere"],
    ] {
        place.refuses(command, &["nowhere", "No such file"]);
    }
    // To be no GGUF file is a finding of the verifier, not a failure to verify.
    let output = place.qconv(&["verify", "notes.txt"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("FAILED  structure"));

    place.llama("no-weights", 1);
    fs::remove_file(place.path("no-weights/model.safetensors")).unwrap();
    place.refuses(&["hf-to-gguf", "no-weights", "-o", "x.gguf"], &["no-weights"]);
    place.llama("bad-config", 1);
    fs::write(place.path("bad-config/config.json"), "{\"architectures\": [").unwrap();
    place.refuses(&["hf-to-gguf", "bad-config", "-o", "x.gguf"], &["config.json", "JSON"]);
    place.llama("no-tokenizer", 1);
    fs::remove_file(place.path("no-tokenizer/tokenizer.json")).unwrap();
    place.refuses(&["hf-to-gguf", "no-tokenizer", "-o", "x.gguf"], &["tokenizer"]);
}

#[test]
fn unknown_architecture_names_the_nearest() {
    let place = Place::new();
    let dir = place.llama("model", 1);
    edit_json(&dir.join("config.json"), |c| c["architectures"] = json!(["LlamaForCausalLN"]));
    place.refuses(
        &["hf-to-gguf", "model", "-o", "x.gguf"],
        &["config.json", "LlamaForCausalLN", "hint:", "nearest", "take all 21 tensors", "--arch llama"],
    );
    // A name that says nothing: the tensors do.
    edit_json(&dir.join("config.json"), |c| c["architectures"] = json!(["ZephyrModelOfMine"]));
    place.refuses(
        &["hf-to-gguf", "model", "-o", "x.gguf"],
        &["ZephyrModelOfMine", "the rules of llama, ", "--arch "],
    );
    place.damaged_llama("odd", 1, |t| {
        let taken = t.remove("model.norm.weight").unwrap();
        t.insert("model.final_layernorm_of_mine.weight".into(), taken);
    });
    edit_json(&place.path("odd/config.json"), |c| c["architectures"] = json!(["ZephyrModelOfMine"]));
    place.refuses(&["hf-to-gguf", "odd", "-o", "x.gguf"], &["kinds of tensors", "--arch "]);
    place.refuses(&["hf-to-gguf", "model", "-o", "x.gguf", "--arch", "lama"], &["lama", "llama"]);
    edit_json(&dir.join("config.json"), |c| c["architectures"] = json!(["LlamaForCausalLN"]));
    place.refuses(&["hf-to-gguf", "model", "-o", "x.gguf", "--arch", "lama"], &["lama", "llama"]);
    place.succeeds(&["hf-to-gguf", "model", "-o", "x.gguf", "--arch", "llama"]);
}

#[test]
fn damaged_weights() {
    let place = Place::new();
    let dir = place.llama("shard-missing", 3);
    fs::remove_file(dir.join("model-00002-of-00003.safetensors")).unwrap();
    place.refuses(
        &["hf-to-gguf", "shard-missing", "-o", "x.gguf"],
        &["model-00002-of-00003.safetensors", "hint:"],
    );

    let lost = "model.layers.1.mlp.up_proj.weight";
    place.damaged_llama("tensor-missing", 1, |t| {
        t.remove(lost).unwrap();
    });
    place.refuses(&["hf-to-gguf", "tensor-missing", "-o", "x.gguf"], &[lost, "is missing"]);

    // The index promises a tensor that its shard does not hold.
    let dir = place.damaged_llama("index-lies", 2, |t| {
        t.remove(lost).unwrap();
    });
    edit_json(&dir.join("model.safetensors.index.json"), |index| {
        index["weight_map"][lost] = json!("model-00002-of-00002.safetensors");
    });
    place.refuses(&["hf-to-gguf", "index-lies", "-o", "x.gguf"], &[lost]);

    let surplus = "model.layers.1.mlp.up_projection.weight";
    place.damaged_llama("tensor-surplus", 1, |t| {
        let copy = t[lost].clone();
        t.insert(surplus.into(), copy);
    });
    place.refuses(
        &["hf-to-gguf", "tensor-surplus", "-o", "x.gguf"],
        &[surplus, "hint:", "nearest rule", "up_proj"],
    );

    // A layer beyond those that config.json counts.
    place.damaged_llama("layer-surplus", 1, |t| {
        let copy = t[lost].clone();
        t.insert("model.layers.2.mlp.up_proj.weight".into(), copy);
    });
    place.refuses(&["hf-to-gguf", "layer-surplus", "-o", "x.gguf"], &["layer 2", "config.json"]);

    let dir = place.llama("truncated", 2);
    let shard = dir.join("model-00002-of-00002.safetensors");
    let whole = fs::read(&shard).unwrap();
    for keep in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&shard, &whole[..keep]).unwrap();
        place.refuses(&["hf-to-gguf", "truncated", "-o", "x.gguf"], &["model-00002-of-00002.safetensors"]);
    }
}

#[test]
fn wrong_wishes() {
    let place = Place::new();
    place.llama("model", 1);
    place.refuses(&["hf-to-gguf", "model", "-o", "x.gguf", "--type", "q9_z"], &["q9_z", "hint:", "nearest"]);
    place.refuses(&["hf-to-gguf", "model", "-o", "x.gguf", "--set", "no-equals-sign"], &["no-equals-sign"]);
    place.refuses(&["hf-to-gguf", "model", "-o", "x.gguf", "--set", "llama.block_count=many"], &["many"]);
    place.refuses(&["hf-to-gguf", "model", "-o", "x.gguf", "--remove", "no.such.key"], &["no.such.key"]);
    place.refuses(&["hf-to-gguf", "model", "-o", "x.gguf", "--max-memory", "1K"], &["--max-memory", "hint:"]);
    for usage in [
        &["hf-to-gguf"][..],
        &["hf-to-gguf", "model", "--no-such-option"],
        &["hf-to-gguf", "model", "--max-memory", "much"],
        &["no-such-command"],
    ] {
        let output = place.qconv(usage);
        assert_eq!(output.status.code(), Some(2), "{usage:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{usage:?}");
    }

    place.succeeds(&["hf-to-gguf", "model", "-o", "q4.gguf", "--type", "q4_0", "-q"]);
    place.refuses(
        &["quantize", "q4.gguf", "q8.gguf", "--type", "q8_0"],
        &["quantized already", "--allow-requantize"],
    );
    place.succeeds(&["quantize", "q4.gguf", "q8.gguf", "--type", "q8_0", "--allow-requantize"]);
    place.refuses(&["gguf-to-hf", "q4.gguf", "-o", "hf", "--dtype", "q8_0"], &["Q8_0", "bf16"]);
}

#[test]
fn outputs_that_cannot_be() {
    let place = Place::new();
    place.llama("model", 1);
    fs::write(place.path("file"), "precious").unwrap();
    fs::create_dir(place.path("dir")).unwrap();
    fs::write(place.path("dir/file"), "precious").unwrap();

    place.refuses(&["hf-to-gguf", "model", "-o", "file"], &["file", "exists", "--force"]);
    assert_eq!(fs::read(place.path("file")).unwrap(), b"precious");
    place.refuses(&["hf-to-gguf", "model", "-o", "no/such/x.gguf"], &["no/such", "does not exist"]);
    // No permission; root has them all, so the place is one where nobody can write.
    place.refuses(&["hf-to-gguf", "model", "-o", "file/x.gguf"], &["file"]);

    place.succeeds(&["hf-to-gguf", "model", "-o", "a.gguf", "-q"]);
    for force in [&[][..], &["--force"]] {
        let args = [&["quantize", "a.gguf", "a.gguf", "--type", "q8_0"], force].concat();
        place.refuses(&args, &["a.gguf", "input"]);
        let args = [&["quantize", "a.gguf", "./dir/../a.gguf", "--type", "q8_0"], force].concat();
        place.refuses(&args, &["a.gguf", "input"]);
        let args = [&["hf-to-gguf", "model", "-o", "model/model.safetensors"], force].concat();
        place.refuses(&args, &["model.safetensors", "input"]);
    }
    #[cfg(unix)]
    {
        fs::hard_link(place.path("a.gguf"), place.path("b.gguf")).unwrap();
        std::os::unix::fs::symlink("a.gguf", place.path("link.gguf")).unwrap();
        place.refuses(&["quantize", "a.gguf", "link.gguf", "--type", "q8_0", "--force"], &["input"]);
    }

    place.refuses(&["gguf-to-hf", "a.gguf", "-o", "dir"], &["dir", "--force"]);
    place.refuses(&["gguf-to-hf", "a.gguf", "-o", "file"], &["file"]);
    place.refuses(&["gguf-to-hf", "a.gguf", "-o", "no/such"], &["does not exist"]);
    place.succeeds(&["gguf-to-hf", "a.gguf", "-o", "dir", "--force", "-q"]);
    assert_eq!(fs::read(place.path("dir/file")).unwrap(), b"precious", "--force replaces only its own names");
    place.succeeds(&["hf-to-gguf", "dir", "-o", "file", "--force", "-q"]);
    assert!(fs::read(place.path("file")).unwrap().starts_with(b"GGUF"));
}

/// Writes fail at a size that the file does not reach: as on a full disk, for any user.
#[cfg(unix)]
#[test]
fn disk_full() {
    let place = Place::new();
    place.llama("model", 1);
    let before = place.listing();
    let binary = env!("CARGO_BIN_EXE_qconv");
    let limited = format!("trap '' XFSZ; ulimit -f 100; exec '{binary}' hf-to-gguf model -o x.gguf");
    let output = Command::new("bash").args(["-c", &limited]).current_dir(place.0.path()).output().unwrap();
    check_refusal(&output, "a limit of 100 kB", &["x.gguf", "large"]);
    assert_eq!(place.listing(), before);

    // The real thing: the plan knows that it will not fit.
    fs::create_dir(place.path("disk")).unwrap();
    let convert = format!("'{binary}' hf-to-gguf model -o disk/x.gguf");
    if let Some(output) = on_a_disk_of(&place, "200k", &convert) {
        check_refusal(&output, "a disk of 200 kB", &["x.gguf", "bytes are needed", "has 204800 left"]);
    }
    // And one that fills up meanwhile.
    large_model(&place.path("large"));
    let convert = format!(
        "'{binary}' hf-to-gguf large -o disk/x.gguf --type tq1_0 -j1 & \
         until [ -n \"$(ls -A disk)\" ]; do :; done; \
         head -c 1G /dev/zero > disk/rubbish 2>/dev/null; wait $!; code=$?; rm disk/rubbish; (exit $code)"
    );
    if let Some(output) = on_a_disk_of(&place, "200M", &convert) {
        check_refusal(&output, "a disk that fills up", &["x.gguf", "cannot write", "No space left"]);
    }
}

/// Runs a command with a file system of this size mounted at `disk`, in a namespace of its own, and
/// checks that it leaves nothing there. `None` where that is not allowed.
#[cfg(unix)]
fn on_a_disk_of(place: &Place, size: &str, command: &str) -> Option<Output> {
    let script = format!(
        "mount -t tmpfs -o size={size} tmpfs disk 2>/dev/null || exit 77
         {command}
         code=$?
         [ -z \"$(ls -A disk)\" ] || exit 78
         exit $code"
    );
    let mut unshare = Command::new("unshare");
    let output = unshare.args(["-r", "-m", "bash", "-c", &script]).current_dir(place.0.path()).output();
    let output = output.ok().filter(|o| {
        o.status.code() != Some(77) && !String::from_utf8_lossy(&o.stderr).starts_with("unshare:")
    });
    if output.is_none() {
        eprintln!("no file system can be mounted here: that part of the test is left out");
    }
    output
}

/// A model of 3.2 GB, all zeros, which a sparse file holds without taking the disk.
#[cfg(unix)]
fn large_model(dir: &Path) {
    use std::io::Write;
    let (hidden, ffn, layers) = (2048u64, 65536u64, 2);
    fs::create_dir(dir).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(common::fixture("models/llama").join(file), dir.join(file)).unwrap();
    }
    edit_json(&dir.join("config.json"), |c| {
        c["hidden_size"] = hidden.into();
        c["intermediate_size"] = ffn.into();
        c["num_attention_heads"] = 64.into();
        c["num_key_value_heads"] = 64.into();
        c["num_hidden_layers"] = layers.into();
    });
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![512, hidden]),
        ("model.norm.weight".to_string(), vec![hidden]),
        ("lm_head.weight".to_string(), vec![512, hidden]),
    ];
    for i in 0..layers {
        let mut add =
            |name: &str, shape: Vec<u64>| shapes.push((format!("model.layers.{i}.{name}.weight"), shape));
        add("input_layernorm", vec![hidden]);
        add("post_attention_layernorm", vec![hidden]);
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            add(&format!("self_attn.{name}"), vec![hidden, hidden]);
        }
        add("mlp.gate_proj", vec![ffn, hidden]);
        add("mlp.up_proj", vec![ffn, hidden]);
        add("mlp.down_proj", vec![hidden, ffn]);
    }
    let mut header = serde_json::Map::new();
    let mut at = 0u64;
    for (name, shape) in shapes {
        let end = at + 4 * shape.iter().product::<u64>();
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let mut header = Json::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut file = fs::File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + at).unwrap();
}

#[cfg(unix)]
#[test]
fn interrupted_in_the_middle() {
    use std::os::unix::process::ExitStatusExt;
    use std::time::{Duration, Instant};
    let place = Place::new();
    large_model(&place.path("model"));
    for signal in [common::interrupt(), "-TERM"] {
        let before = place.listing();
        let child = Command::new(env!("CARGO_BIN_EXE_qconv"))
            .args(["hf-to-gguf", "model", "-o", "x.gguf", "--type", "tq1_0", "-j1"])
            .current_dir(place.0.path())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The work has begun when the temporary file is there.
        let begun = Instant::now();
        while place.listing().len() == before.len() {
            assert!(begun.elapsed() < Duration::from_secs(60), "nothing is being written");
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(50));
        Command::new("kill").args([signal, &child.id().to_string()]).assert().success();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.signal(), None, "{signal} killed it");
        check_refusal(&output, signal, &["interrupted"]);
        assert_eq!(place.listing(), before, "{signal} left something behind");
    }
    // What a kill -9 leaves behind is not in the way, and does not stay.
    fs::write(place.path(".x.gguf.qconv-partial"), vec![7u8; 100_000]).unwrap();
    place.llama("small", 1);
    place.succeeds(&["hf-to-gguf", "small", "-o", "x.gguf", "-q"]);
    assert!(!place.path(".x.gguf.qconv-partial").exists());
    place.succeeds(&["hf-to-gguf", "small", "-o", "y.gguf", "-q"]);
    assert!(fs::read(place.path("x.gguf")).unwrap() == fs::read(place.path("y.gguf")).unwrap());
}

#[test]
fn dry_run_writes_nothing() {
    let place = Place::new();
    place.llama("model", 2);
    place.succeeds(&["hf-to-gguf", "model", "-o", "a.gguf", "-q"]);
    let before = place.listing();
    for args in [
        &["hf-to-gguf", "model", "-o", "x.gguf", "--type", "q8_0", "--dry-run"][..],
        &["hf-to-gguf", "model", "--dry-run"],
        &["gguf-to-hf", "a.gguf", "-o", "hf", "--dry-run"],
        &["quantize", "a.gguf", "x.gguf", "--type", "q4_0", "--dry-run"],
    ] {
        let text = String::from_utf8(place.succeeds(args).stdout).unwrap();
        assert!(text.contains("blk.1.attn_q.weight") || text.contains("layers.1.self_attn.q_proj.weight"));
        assert!(text.contains("output: ") && text.contains("of buffers"), "{text}");
        let plan: Json =
            serde_json::from_slice(&place.succeeds(&[args, &["--json"]].concat()).stdout).unwrap();
        assert_eq!(plan["tensors"].as_array().unwrap().len(), 21, "{args:?}");
        assert!(plan["peak_buffer_bytes"].as_u64().unwrap() > 0);
        assert_eq!(place.listing(), before, "{args:?} wrote something");
    }
    // The plan says to the byte what comes.
    let plan =
        place.succeeds(&["hf-to-gguf", "model", "-o", "x.gguf", "--type", "q8_0", "--dry-run", "--json"]);
    let plan: Json = serde_json::from_slice(&plan.stdout).unwrap();
    place.succeeds(&["hf-to-gguf", "model", "-o", "x.gguf", "--type", "q8_0", "-q"]);
    assert_eq!(plan["bytes"].as_u64().unwrap(), fs::metadata(place.path("x.gguf")).unwrap().len());
}

#[test]
fn json_is_json_and_quiet_is_quiet() {
    let place = Place::new();
    place.llama("model", 1);
    for args in [
        &["hf-to-gguf", "model", "-o", "a.gguf", "--type", "q8_0"][..],
        &["hf-to-gguf", "model", "-o", "f.gguf", "--no-verify"],
        &["gguf-to-hf", "a.gguf", "-o", "hf"],
        &["quantize", "f.gguf", "q.gguf", "--type", "q4_1"],
        &["verify", "a.gguf", "--against", "model"],
    ] {
        let again: &[&str] = if args[0] == "verify" { &[] } else { &["--force"] };
        let loud = place.succeeds(args);
        assert!(loud.stdout.is_empty() && !loud.stderr.is_empty(), "{args:?}: messages belong on stderr");
        let quiet = place.succeeds(&[args, again, &["-q"]].concat());
        assert!(quiet.stdout.is_empty() && quiet.stderr.is_empty(), "{args:?} -q: {quiet:?}");
        let json = place.succeeds(&[args, again, &["--json"]].concat());
        let value: Json = serde_json::from_slice(&json.stdout).unwrap();
        let key = if args[0] == "verify" { "checks" } else { "bits_per_weight" };
        assert!(!value[key].is_null(), "{args:?}: {value}");
    }
    for path in ["a.gguf", "model", "model/model.safetensors", "hf"] {
        let text = String::from_utf8(place.succeeds(&["inspect", path]).stdout).unwrap();
        let value: Json =
            serde_json::from_slice(&place.succeeds(&["inspect", path, "--json"]).stdout).unwrap();
        let tensors = value["tensors"].as_array().unwrap();
        assert_eq!(tensors.len(), 21, "{path}");
        assert!(tensors.iter().all(|t| text.contains(t["name"].as_str().unwrap())), "{path}");
    }
    let only = place.succeeds(&["inspect", "a.gguf", "--tensor", r"attn_q\.", "--json"]);
    let only: Json = serde_json::from_slice(&only.stdout).unwrap();
    assert_eq!(only["tensors"].as_array().unwrap().len(), 2);
    let metadata = String::from_utf8(place.succeeds(&["inspect", "a.gguf", "--metadata"]).stdout).unwrap();
    assert!(metadata.contains("general.architecture") && !metadata.contains("blk.0.attn_q.weight"));
}

#[test]
fn findings_are_exit_code_1() {
    let place = Place::new();
    place.llama("model", 1);
    place.damaged_llama("other", 1, |t| {
        let weights = &mut t.get_mut("model.layers.0.mlp.up_proj.weight").unwrap().2;
        weights[100] ^= 0x55;
        weights[101] ^= 0x40;
    });
    place.succeeds(&["hf-to-gguf", "other", "-o", "other.gguf", "-q"]);
    let output = place.qconv(&["verify", "other.gguf", "--against", "model"]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("FAILED  tensors") && message.contains("blk.0.ffn_up.weight"), "{message}");
    // Damage that quiet does not hide.
    let output = place.qconv(&["verify", "other.gguf", "--against", "model", "-q"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("FAILED  tensors"));

    let whole = fs::read(place.path("other.gguf")).unwrap();
    fs::write(place.path("short.gguf"), &whole[..whole.len() - 40]).unwrap();
    assert_eq!(place.qconv(&["verify", "short.gguf"]).status.code(), Some(1));
    place.refuses(&["quantize", "short.gguf", "x.gguf", "--type", "q8_0"], &["short.gguf"]);
}

#[test]
fn metadata_edits() {
    let place = Place::new();
    place.llama("model", 1);
    place.succeeds(&[
        "hf-to-gguf",
        "model",
        "-o",
        "a.gguf",
        "--name",
        "Of My Own",
        "--set",
        "general.author=me",
        "--set",
        "my.number=u64:7",
        "--set",
        "llama.context_length=100",
        "--remove",
        "general.size_label",
        "-q",
    ]);
    let report: Json =
        serde_json::from_slice(&place.succeeds(&["inspect", "a.gguf", "--metadata", "--json"]).stdout)
            .unwrap();
    let text = report["metadata"].to_string();
    assert!(
        text.contains("Of My Own") && text.contains("my.number") && text.contains("general.author"),
        "{text}"
    );
    assert!(!text.contains("general.size_label"), "{text}");
    place.succeeds(&["quantize", "a.gguf", "b.gguf", "--type", "q8_0", "--set", "my.number=8", "-q"]);
    let report = String::from_utf8(place.succeeds(&["inspect", "b.gguf", "--metadata"]).stdout).unwrap();
    assert!(report.contains("my.number: 8") && report.contains("general.file_type: 7"), "{report}");
}

#[test]
fn threads_and_memory_do_not_show() {
    let place = Place::new();
    place.llama("model", 2);
    let mut first: Option<Vec<u8>> = None;
    for memory in ["2M", "16M", "1G"] {
        for threads in ["-j1", "-j2", "-j7"] {
            place.succeeds(&[
                "hf-to-gguf",
                "model",
                "-o",
                "x.gguf",
                "--type",
                "q4_1",
                threads,
                "--max-memory",
                memory,
                "--force",
                "--no-verify",
                "-q",
            ]);
            let bytes = fs::read(place.path("x.gguf")).unwrap();
            let first = first.get_or_insert_with(|| bytes.clone());
            assert!(*first == bytes, "{threads} --max-memory {memory} wrote other bytes");
        }
    }
}

#[test]
fn default_output_name() {
    let place = Place::new();
    place.llama("My-Model", 1);
    place.succeeds(&["hf-to-gguf", "My-Model", "--type", "q8_0", "-q"]);
    let names: Vec<_> =
        place.listing().into_keys().filter(|p| p.extension().is_some_and(|e| e == "gguf")).collect();
    assert_eq!(names.len(), 1, "{names:?}");
    let name = names[0].file_name().unwrap().to_string_lossy().into_owned();
    assert!(name.starts_with("My-Model") && name.ends_with("Q8_0.gguf"), "{name}");
    assert_eq!(names[0].parent(), Some(place.0.path()));
    fs::create_dir(place.path("out")).unwrap();
    place.succeeds(&["hf-to-gguf", "My-Model", "--type", "q8_0", "-o", "out", "-q"]);
    assert!(place.path("out").join(name).is_file());
}

#[test]
fn help_version_and_completions() {
    let place = Place::new();
    let version = String::from_utf8(place.succeeds(&["--version"]).stdout).unwrap();
    assert!(version.starts_with(&format!("qconv {}", env!("CARGO_PKG_VERSION"))) && version.contains("ggml"));
    for shell in ["bash", "zsh", "fish"] {
        let script = place.succeeds(&["completions", shell]).stdout;
        let text = String::from_utf8(script.clone()).unwrap();
        assert!(["hf-to-gguf", "gguf-to-hf", "max-memory"].iter().all(|w| text.contains(w)), "{shell}");
        fs::write(place.path("script"), script).unwrap();
        // The shell itself reads it, where it is installed.
        if let Ok(output) = Command::new(shell).arg("-n").arg(place.path("script")).output() {
            assert!(output.status.success(), "{shell}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    assert!(!place.succeeds(&["help"]).stdout.is_empty());
}
