//! Checkpoints of Hugging Face and PyTorch: weights, the files beside them, and whether they belong together.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::finding::Finding;
use super::rules::{CHECKPOINT, CONFIG, PROGRAM, REMOTE_CODE, SHARD_STRAY, VOCAB_ID};
use super::target::{PICKLES, files_of, kind_of_file};
use super::{Kind, Opened, Options, Scan, names, pickle, template};
use crate::container::side::{from_json, read_json, read_side_file};
use crate::container::{InputFile, Store, pytorch as torch, safetensors as st};
use crate::error::{Error, ErrorKind, Result};
use crate::eval::chat::TemplateTokens;
use crate::limits::Limits;
use crate::model::{Model, Opened as OpenedModel};

/// Endings of programs.
const PROGRAMS: &[&str] = &["py", "sh", "so", "exe", "dll", "dylib", "bat", "ps1", "js", "jar", "pyc"];
/// Files of transformers that no index names.
const BESIDE: &[&str] = &["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"];

/// A safetensors file, or the set that it belongs to.
pub(super) fn safetensors(scan: &mut Scan, path: &Path, options: &Options) -> Result<Option<Opened>> {
    let opened = st::open(path, &options.limits)?;
    for (file, metadata) in opened.store.files().iter().zip(&opened.metadata) {
        for key in metadata.keys() {
            scan.findings.extend(names::check(file.path(), "key", key).into_iter().map(|f| f.key(key)));
        }
    }
    tensor_names(scan, &opened.store);
    Ok(Some(Opened { store: opened.store, format: "safetensors" }))
}

/// A PyTorch file, or the set that it belongs to; pickles of anything else as well.
pub(super) fn pytorch(scan: &mut Scan, path: &Path, options: &Options) -> Result<Option<Opened>> {
    let any = pickle::check(scan, path, &options.limits)?;
    if !any && !torch::is_pytorch(&InputFile::open(path)?)? {
        return Err(Error::unsupported("is no file that can be read").at(path));
    }
    let store = match torch::open(path, &options.limits) {
        Ok(store) => store,
        // What it names has been said, which is why it is not read.
        Err(e) if any && matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::Malformed) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    for file in store.files().iter().filter(|f| f.path() != path) {
        pickle::check(scan, file.path(), &options.limits)?;
    }
    tensor_names(scan, &store);
    Ok(Some(Opened { store, format: "PyTorch" }))
}

fn tensor_names(scan: &mut Scan, store: &Store) {
    for info in store.tensors() {
        let file = store.files().get(info.file).map_or(Path::new(""), InputFile::path);
        let found = names::check(file, "tensor", &info.name);
        scan.findings.extend(found.into_iter().map(|f| f.tensor(&info.name)));
    }
}

/// A directory of transformers, or a part of one: the weights of the checkpoint, and what else lies beside them.
pub(super) fn directory(scan: &mut Scan, path: &Path, options: &Options) -> Result<Vec<Opened>> {
    let limits = &options.limits;
    let dir = if path.is_dir() {
        path
    } else {
        path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
    };
    let files = files_of(dir)?;
    for (name, file) in &files {
        let ending = name.rsplit_once('.').map_or("", |(_, e)| e);
        scan.findings.extend(names::check(file, "file", name));
        if PROGRAMS.contains(&ending) {
            let message = format!("{name} is a program");
            scan.find(Finding::new(&PROGRAM, file, message).hint("loaders run it with trust_remote_code"));
        } else if PICKLES.contains(&ending)
            && !matches!(kind_of_file(file)?, Kind::Gguf | Kind::Safetensors | Kind::Qpack)
        {
            if let Err(e) = pickle::check(scan, file, limits) {
                scan.error(e, file)?;
            }
        } else if ending == "json" {
            json(scan, file, name, limits)?;
        } else if ending == "jinja" {
            match crate::container::side::read_text(file, limits.side_file_bytes) {
                Ok(text) => {
                    let place = template::Place { file, key: name, offset: Some(0) };
                    template::check(scan, &place, name, &text, &TemplateTokens::default());
                }
                Err(e) => scan.error(e, file)?,
            }
        }
    }
    let mut all = Vec::new();
    match weights(scan, path, &files, limits) {
        Ok(opened) => all.extend(opened),
        Err(e) => scan.error(e, dir)?,
    }
    let mut read: HashSet<PathBuf> = all.iter().flat_map(Opened::files).collect();
    strays(scan, all.first(), &files, &read);
    // Adapters, parts of pipelines, consolidated weights: nobody promises that they stay unread.
    for (_, file) in files.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        if read.contains(file) {
            continue;
        }
        match safetensors(scan, file, options) {
            Ok(opened) => {
                read.extend(opened.iter().flat_map(Opened::files));
                all.extend(opened);
            }
            Err(e) => scan.error(e, file)?,
        }
    }
    Ok(all)
}

/// The weights of the checkpoint, where there are any that can be read.
fn weights(
    scan: &mut Scan,
    path: &Path,
    files: &[(String, PathBuf)],
    limits: &Limits,
) -> Result<Option<Opened>> {
    let opened = match OpenedModel::open(path, limits) {
        // A tokenizer alone, or a configuration.
        Err(e) if e.kind() == ErrorKind::Unsupported && !files.iter().any(|(n, _)| is_weights(n)) => {
            return Ok(None);
        }
        // Why a pickle is not read has been said.
        Err(e)
            if e.kind() == ErrorKind::Unsupported
                && scan.findings.iter().any(|f| e.path() == Some(&f.file)) =>
        {
            return Ok(None);
        }
        other => other?,
    };
    let OpenedModel::Directory { weights, .. } = opened else { return Ok(None) };
    tensor_names(scan, &weights.store);
    // Quantized tensors are joined from their parts, which have to fit.
    if let Err(e) = Model::open(path, limits)
        && matches!(e.kind(), ErrorKind::Malformed | ErrorKind::Limit)
    {
        scan.find(Finding::quoting(&CHECKPOINT, &e, path));
    }
    Ok(Some(Opened { store: weights.store, format: Kind::HuggingFace.name() }))
}

/// Weights of the checkpoint's own kind that are not of it.
fn strays(scan: &mut Scan, opened: Option<&Opened>, files: &[(String, PathBuf)], read: &HashSet<PathBuf>) {
    let Some(ending) = opened.and_then(|o| o.store.files().first()?.path().extension()) else { return };
    for (name, file) in files {
        let is_alike = file.extension() == Some(ending) && !name.contains('/');
        let is_stray = is_alike && !BESIDE.contains(&name.as_str());
        if is_stray && !read.contains(file) && st_or_torch(file) {
            let message = format!("{name} belongs to no index and no set of shards");
            scan.find(Finding::new(&SHARD_STRAY, file, message));
        }
    }
}

fn is_weights(name: &str) -> bool {
    let of_torch = name.ends_with(".bin") && !BESIDE.contains(&name);
    name.ends_with(".safetensors") || of_torch || name.ends_with("qmodel.pt")
}

fn st_or_torch(file: &Path) -> bool {
    let is_st = kind_of_file(file).is_ok_and(|k| matches!(k, Kind::Safetensors | Kind::Pytorch));
    // Recorded logits lie beside models of tests, as do adapters beside models.
    let name = file.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    is_st && (name.starts_with("model") || name.starts_with("pytorch_model"))
}

/// A JSON file beside weights.
fn json(scan: &mut Scan, file: &Path, name: &str, limits: &Limits) -> Result<()> {
    // Tokenizers have more values than other files.
    let read = match name.rsplit('/').next() {
        Some("tokenizer.json") => read_side_file(file, limits.side_file_bytes)
            .and_then(|bytes| bytes.map(|bytes| from_json(&bytes, file)).transpose()),
        _ => read_json(file, limits.side_file_bytes),
    };
    let value: Json = match read {
        Ok(Some(value)) => value,
        Ok(None) => return Ok(()),
        Err(e) if e.kind() == ErrorKind::Malformed => {
            scan.find(Finding::quoting(&CONFIG, &e, file));
            return Ok(());
        }
        Err(e) => return scan.error(e, file),
    };
    let of_model = ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"];
    let Some(object) = value.as_object() else {
        if of_model.contains(&name) {
            scan.find(Finding::new(&CONFIG, file, format!("{name} is no JSON object")));
        }
        return Ok(());
    };
    if let Some(map) = object.get("auto_map").filter(|m| !m.is_null()) {
        let shown: Vec<String> = match map {
            Json::Object(map) => map.values().map(plain).collect(),
            other => vec![plain(other)],
        };
        let message = format!("{name} asks for code of its own: {}", shown.join(", "));
        let hint = "it runs with trust_remote_code=True only; read it before that";
        scan.find(Finding::new(&REMOTE_CODE, file, message).key("auto_map").hint(hint));
    }
    if name == "config.json" {
        ids(scan, file, object);
    }
    let templates = templates(object);
    let place = || template::Place { file, key: "chat_template", offset: None };
    let all = templates.iter().map(|(name, text)| (place(), name.as_str(), *text));
    template::check_all(scan, all, &special(object));
    Ok(())
}

fn plain(value: &Json) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// `chat_template`: a text, or a list of texts with names.
fn templates(object: &Map<String, Json>) -> Vec<(String, &str)> {
    match object.get("chat_template") {
        Some(Json::String(text)) => vec![("default".into(), text)],
        Some(Json::Array(list)) => {
            list.iter().filter_map(|t| Some((plain(t.get("name")?), t.get("template")?.as_str()?))).collect()
        }
        _ => Vec::new(),
    }
}

fn special(object: &Map<String, Json>) -> TemplateTokens {
    let token = |key: &str| match object.get(key) {
        Some(Json::String(text)) => text.clone(),
        Some(other) => other.get("content").map(plain).unwrap_or_default(),
        None => String::new(),
    };
    TemplateTokens { bos: token("bos_token"), eos: token("eos_token") }
}

/// Ids of special tokens in config.json, which loaders take as indexes.
fn ids(scan: &mut Scan, file: &Path, object: &Map<String, Json>) {
    let Some(size) = object.get("vocab_size").and_then(Json::as_u64) else { return };
    for (key, value) in object.iter().filter(|(key, _)| key.ends_with("_token_id")) {
        let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        // -1 is none, as null is.
        let bad = |id: &&Json| id.as_i64().is_some_and(|id| id < -1 || id.unsigned_abs() >= size && id != -1);
        if let Some(id) = ids.iter().find(bad) {
            let message = format!("{key} is {id}, of {size} tokens");
            scan.find(Finding::new(&VOCAB_ID, file, message).key(key).values(id, format!("below {size}")));
        }
    }
}
