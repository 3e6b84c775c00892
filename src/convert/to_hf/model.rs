//! A model in the terms of Hugging Face, whatever it is read from.

use std::fs;
use std::path::Path;

use serde_json::{Value as Json, json};

use super::rounding::{Need, Places, places_of_checkpoint};
use super::torch_name;
use crate::arch::{Data, Mapped, Piece};
use crate::container::Store;
use crate::container::side::read_side_file;
use crate::convert::checkpoint::Checkpoint;
use crate::convert::gather::identity;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::{DType, Dim, StridedCopy, TensorInfo};

/// Opened and recognised: everything but types and places is known.
pub struct HfModel {
    /// What values are read from.
    pub store: Store,
    /// Tensors by their names in a checkpoint.
    pub mapped: Vec<Mapped>,
    /// config.json, without what it says of quantization.
    pub config: Json,
    /// The other files of the directory.
    pub side: Vec<(String, Vec<u8>)>,
    /// Type of the weights that are not packed.
    pub dtype: DType,
    /// Whether tensors that are not packed in the source keep their own types.
    pub keeps_types: bool,
    /// The model's own name.
    pub name: Option<String>,
    /// Where matrices are in GGUF, if that was asked for.
    pub places: Places,
    /// What was done on the way.
    pub notes: Vec<String>,
}

/// Files that have no place in another format, or are written anew.
const LEFT: [&str; 6] = [
    "config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
    "recipe.yaml",
];
/// Endings of files that go along.
const TAKEN: [&str; 9] = ["json", "jinja", "model", "txt", "md", "py", "tiktoken", "vocab", "yaml"];
/// The ending of the name of MXFP4's codes.
pub(super) const BLOCKS: &str = "_blocks";

/// Opens a directory. Stacks of experts come as `blocks` wants them: `[expert, out, in]`, called `X_blocks`,
/// or as the parameter `X` of the model itself, `[expert, in, out]`.
///
/// # Errors
/// What is no model.
pub fn open(path: &Path, dtype: Option<DType>, blocks: bool, need: Need, limits: &Limits) -> Result<HfModel> {
    let checkpoint = Checkpoint::open(path, limits)?;
    let place = checkpoint.side.place();
    of_checkpoint(checkpoint, dtype, blocks, need, limits).map_err(place)
}

fn of_checkpoint(
    checkpoint: Checkpoint,
    dtype: Option<DType>,
    blocks: bool,
    need: Need,
    limits: &Limits,
) -> Result<HfModel> {
    let mut notes: Vec<String> = checkpoint.notes().into_iter().collect();
    let name = Some(checkpoint.side.model_name()).filter(|n| !n.is_empty());
    let Checkpoint { dir, side: kept, store, mut config, .. } = checkpoint;
    let places = match need {
        Need::Must => places_of_checkpoint(&config, &store).map_err(|e| e.at(dir.join("config.json")))?,
        Need::Gladly => places_of_checkpoint(&config, &store).unwrap_or_default(),
        Need::Not => Places::new(),
    };
    let own = config_dtype(&config).or_else(|| most_floats(&store)).unwrap_or(DType::BF16);
    // Other models have stacks too, which nobody reads so.
    let blocks = blocks && config.get("model_type").and_then(Json::as_str) == Some("gpt_oss");
    let mapped = store.tensors().iter().map(|t| mapped(t, blocks)).collect::<Result<_>>()?;
    drop_quantization(&mut config);
    if let Some(text) = config.get_mut("text_config") {
        drop_quantization(text);
    }
    set_dtype(&mut config, dtype.unwrap_or(own));
    let side = side_files(&dir, limits, &mut notes)?;
    drop(kept);
    let keeps_types = dtype.is_none();
    let dtype = dtype.unwrap_or(own);
    Ok(HfModel { store, mapped, config, side, dtype, keeps_types, name, places, notes })
}

pub(super) fn drop_quantization(config: &mut Json) {
    if let Some(config) = config.as_object_mut() {
        config.shift_remove("quantization_config");
    }
}

/// The type that config.json states.
fn config_dtype(config: &Json) -> Option<DType> {
    let text = config.get("text_config").unwrap_or(&Json::Null);
    let stated = [config, text].into_iter().flat_map(|c| [c.get("dtype"), c.get("torch_dtype")]).flatten();
    let known = [DType::F32, DType::F16, DType::BF16];
    stated
        .filter_map(Json::as_str)
        .find_map(|name| known.into_iter().find(|d| torch_name(*d) == name.trim_start_matches("torch.")))
}

/// The type of most values that are not packed.
fn most_floats(store: &Store) -> Option<DType> {
    let bytes = |dtype: &DType| {
        let own = store.tensors().iter().filter(|t| t.dtype == *dtype && !store.is_joined(t));
        own.map(|t| t.nbytes).sum::<u64>()
    };
    let known = [DType::F32, DType::F16, DType::BF16].into_iter();
    known.filter(|d| bytes(d) > 0).max_by_key(bytes)
}

/// States the type wherever the config stated one.
pub(super) fn set_dtype(config: &mut Json, dtype: DType) {
    let Some(fields) = config.as_object_mut() else { return };
    let mut stated = false;
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = fields.get_mut(key) {
            *value = json!(torch_name(dtype));
            stated = true;
        }
    }
    if !stated {
        fields.insert("torch_dtype".into(), json!(torch_name(dtype)));
    }
    for (_, inner) in fields.iter_mut().filter(|(key, _)| key.ends_with("_config")) {
        for key in ["dtype", "torch_dtype"] {
            if let Some(value) = inner.get_mut(key).filter(|v| v.is_string()) {
                *value = json!(torch_name(dtype));
            }
        }
    }
}

/// A tensor as it is, but for stacks of experts.
fn mapped(t: &TensorInfo, blocks: bool) -> Result<Mapped> {
    let as_is = || identity(std::slice::from_ref(t)).remove(0);
    let stack = t.name.contains(".experts.") && t.shape.len() == 3;
    // Stacks that `.qpack` has in another encoding are called so too.
    let is_blocks = t.dtype == DType::MXFP4 || stack && t.name.ends_with(BLOCKS);
    match (is_blocks, blocks) {
        (true, false) => {
            let name = t.name.strip_suffix(BLOCKS).unwrap_or(&t.name);
            transposed(t, name.to_string())
        }
        (false, true) if stack && t.name.ends_with("_proj") => transposed(t, format!("{}{BLOCKS}", t.name)),
        _ => Ok(as_is()),
    }
}

/// Each matrix of a stack, transposed.
fn transposed(t: &TensorInfo, name: String) -> Result<Mapped> {
    let [stack, rows, cols] = t.shape[..] else {
        return Err(Error::unsupported(format!(
            "tensor {:?} has shape {:?}, a stack of matrices was expected",
            t.name, t.shape
        )));
    };
    let dims = vec![
        Dim { n: stack, src: rows * cols, dst: rows * cols },
        Dim { n: cols, src: 1, dst: rows },
        Dim { n: rows, src: cols, dst: 1 },
    ];
    let piece = Piece { source: t.name.clone(), copy: StridedCopy::new(dims, 0, 0) };
    let data = Data::Copied { pieces: vec![piece], elementwise: Vec::new() };
    Ok(Mapped { name, shape: vec![stack, cols, rows], data, fixed: None })
}

/// The small files of a directory, and of those in it that hold parts of a pipeline.
fn side_files(dir: &Path, limits: &Limits, notes: &mut Vec<String>) -> Result<Vec<(String, Vec<u8>)>> {
    let mut side = Vec::new();
    for name in names(dir)? {
        let path = dir.join(&name);
        if path.is_dir() {
            // Of sentence-transformers: 1_Pooling/config.json.
            if name.starts_with(|c: char| c.is_ascii_digit())
                && let Some(bytes) = read_side_file(&path.join("config.json"), limits.side_file_bytes)?
            {
                side.push((format!("{name}/config.json"), bytes));
                if ["model.safetensors", "pytorch_model.bin"].iter().any(|w| path.join(w).exists()) {
                    notes.push(format!("{name} has weights of its own, which are not written"));
                }
            }
            continue;
        }
        let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
        let is_licence = ["LICENSE", "LICENCE", "NOTICE"].iter().any(|l| name.starts_with(l));
        let taken = TAKEN.contains(&ending) || is_licence;
        let is_index = name.ends_with(".index.json");
        if !taken || is_index || LEFT.contains(&name.as_str()) || name.starts_with('.') {
            continue;
        }
        if let Some(bytes) = read_side_file(&path, limits.side_file_bytes)? {
            side.push((name, bytes));
        }
    }
    Ok(side)
}

/// The names in a directory that are UTF-8, in their order.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))?;
    let mut names: Vec<String> = entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}
