//! A Core ML package as a Hugging Face directory would have it: weights decoded, under the names that they had.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::Value as Json;

use super::model::{HfModel, drop_quantization, set_dtype};
use super::rounding::Places;
use crate::arch::{self, Layout, Mapped, Model};
use crate::container::coreml::{DataType, Package, chunks};
use crate::container::side::{read_json, read_side_file};
use crate::convert::gather::identity;
use crate::convert::to_coreml::{SIDE, SUFFIX};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::packed::coreml::{Constants, FACTORS};
use crate::tensor::{DType, TensorInfo};

const CONFIG: &str = "config.json";
const HEAD: &str = "output.weight";
/// What the metadata of packages that were converted here have.
const VERSION: &str = "com.qconv.version";

/// Opens a package, or a directory of several. With a config.json beside it, tensors are those of a checkpoint of its
/// class; without, each is called as the program calls it.
///
/// # Errors
/// What is no package; `Malformed` for packages that lack weights of the model, or have others; unknown
/// architectures.
pub fn open(path: &Path, dtype: Option<DType>, arch_file: Option<&Path>, limits: &Limits) -> Result<HfModel> {
    let at = |e: Error| e.at(path);
    let packages = chunks::packages(path, limits)?;
    let opened = packages.iter().map(|path| Ok(Arc::new(Package::open(path, limits)?)));
    let opened = opened.collect::<Result<Vec<_>>>()?;
    let is_own =
        opened.iter().all(|package| package.model().description.metadata.user_defined.contains_key(VERSION));
    let constants = Constants::of(&opened)?;
    let dir = beside(path);
    let config_path = dir.join(CONFIG);
    let config: Option<Json> = read_json(&config_path, limits.side_file_bytes)?;
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = name.map(|name| name.strip_suffix(&format!(".{SUFFIX}")).unwrap_or(&name).to_string());
    let dtype = dtype.unwrap_or(DType::F16);
    let Some(mut config) = config else {
        let (store, _) = constants.store(&by_value(&constants, is_own).map_err(at)?).map_err(at)?;
        let mapped = identity(store.tensors());
        let notes = vec![format!(
            "there is no {CONFIG} beside it: tensors are called as in the program, and only they are written"
        )];
        let (side, places) = (Vec::new(), Places::new());
        let config = Json::Null;
        return Ok(HfModel { store, mapped, config, side, dtype, keeps_types: false, name, places, notes });
    };
    // Definitions ask it how tensors are called.
    drop_quantization(&mut config);
    let model = match arch_file {
        Some(path) => arch::take_for(arch::read(path, limits)?, &config),
        None => arch::recognise(&config, &[], None),
    };
    let mut model = model.map_err(|e| e.at(&config_path))?;
    model.facts_mut().n_tokens = model.var("vocab_size")?.as_u64();
    let (store, _) = constants.store(&by_tensor(&constants, model.is_tied()?)).map_err(at)?;
    let tensors: Vec<TensorInfo> = store.tensors().iter().map(unshaped).collect();
    let mapped = model.map_back_as(&tensors, Layout::Halves).map_err(at)?;
    let described =
        |e: Error| at(e.context(format_args!("of the model that {} describes", config_path.display())));
    check_whole(&model, &mapped).map_err(described)?;
    set_dtype(&mut config, dtype);
    let mut side = Vec::new();
    for name in SIDE.into_iter().filter(|name| *name != CONFIG) {
        if let Some(bytes) = read_side_file(&dir.join(name), limits.side_file_bytes)? {
            side.push((name.to_string(), bytes));
        }
    }
    let (places, notes) = (Places::new(), Vec::new());
    Ok(HfModel { store, mapped, config, side, dtype, keeps_types: false, name, places, notes })
}

/// Where the other files of a model are: in its directory, or in that of its only package.
fn beside(path: &Path) -> PathBuf {
    let parent = || path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match chunks::is_divided(path) {
        true => path.to_path_buf(),
        false => parent().to_path_buf(),
    }
}

/// Every tensor of numbers, called after its constant. In packages that were converted here factors behind a product
/// belong to their matrix.
///
/// # Errors
/// `Unsupported` for packages of others that have a matrix, and what may be its factors: nothing tells them from
/// another weight.
fn by_value(constants: &Constants, is_own: bool) -> Result<Vec<(String, Vec<String>)>> {
    let is_number = |t: DataType| matches!(t, DataType::Float16 | DataType::Float32);
    let (mut tensors, mut factors) = (Vec::new(), HashSet::new());
    for constant in constants.iter().filter(|c| is_number(c.data_type) && !c.shape.is_empty()) {
        let of = vec![constant.name.clone()];
        for name in constants.tensor(&of)?.map(|(_, used)| used).unwrap_or_default() {
            if name != constant.name {
                factors.insert(name.to_string());
            }
        }
        tensors.push((constant.name.clone(), of));
    }
    if let Some(name) = factors.iter().min().filter(|_| !is_own) {
        let of = name.strip_suffix(FACTORS).unwrap_or(name);
        return Err(Error::unsupported(format!(
            "weights {of:?} and {name:?}: whether the second is multiplied with the first cannot be told, in a package that \
             was not converted here"
        )));
    }
    tensors.retain(|(name, _)| !factors.contains(name));
    Ok(tensors)
}

/// The tensors of a language model by their GGUF names. The parts of a divided head are one; a head that is tied to the
/// embeddings is left out.
fn by_tensor(constants: &Constants, is_tied: bool) -> Vec<(String, Vec<String>)> {
    let mut named: IndexMap<String, Vec<(u64, String)>> = IndexMap::new();
    for constant in constants.iter().filter(|c| !c.shape.is_empty()) {
        if let Some((name, part)) = tensor_of(&constant.name) {
            named.entry(name).or_default().push((part, constant.name.clone()));
        }
    }
    if is_tied {
        named.shift_remove(HEAD);
    }
    let in_order = |(name, mut parts): (String, Vec<(u64, String)>)| {
        parts.sort();
        (name, parts.into_iter().map(|(_, constant)| constant).collect())
    };
    named.into_iter().map(in_order).collect()
}

/// The tensor that a constant is called after, `blk_3_attn_q_weight`, and which part of it it is.
fn tensor_of(constant: &str) -> Option<(String, u64)> {
    let (stem, kind) = constant.rsplit_once('_').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    if let Some((layer, role)) = stem.strip_prefix("blk_").and_then(|rest| rest.split_once('_')) {
        let is_number = !layer.is_empty() && layer.bytes().all(|b| b.is_ascii_digit());
        return is_number.then(|| (format!("blk.{layer}.{role}.{kind}"), 0));
    }
    match stem.strip_prefix("output_").and_then(|part| part.parse().ok()) {
        Some(part) => Some((format!("output.{kind}"), part)),
        None => Some((format!("{stem}.{kind}"), 0)),
    }
}

/// A tensor as a checkpoint has it: graphs shape norms (`[n, 1, 1]`), sinks (`[groups, heads]`) and biases
/// (`[experts, 1, n]`) as they need them; the elements are the same.
fn unshaped(tensor: &TensorInfo) -> TensorInfo {
    let is_of_experts = tensor.name.ends_with("_exps.bias");
    let is_vector = ["norm", "sinks", ".bias"].iter().any(|part| tensor.name.contains(part));
    let shape = match tensor.shape[..] {
        [experts, 1, n] if is_of_experts => vec![experts, n],
        _ if is_vector && !is_of_experts => vec![tensor.elements()],
        _ => return tensor.clone(),
    };
    TensorInfo { shape, ..tensor.clone() }
}

/// That a checkpoint of these tensors would be a whole one.
fn check_whole(model: &Model, mapped: &[Mapped]) -> Result<()> {
    let info = |m: &Mapped| {
        let (name, shape) = (m.name.clone(), m.shape.clone());
        let nbytes = DType::F16.nbytes(&shape)?;
        Ok(TensorInfo { name, dtype: DType::F16, shape, file: 0, offset: 0, nbytes })
    };
    let tensors = mapped.iter().map(info).collect::<Result<Vec<_>>>()?;
    model.map_as(&tensors, Layout::Halves).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::tensor_of;

    #[test]
    fn constants_are_called_after_tensors() {
        for (constant, tensor) in [
            ("blk_3_attn_q_weight", Some(("blk.3.attn_q.weight", 0))),
            ("blk_12_ffn_gate_inp_bias", Some(("blk.12.ffn_gate_inp.bias", 0))),
            ("token_embd_weight", Some(("token_embd.weight", 0))),
            ("output_norm_weight", Some(("output_norm.weight", 0))),
            ("output_weight", Some(("output.weight", 0))),
            ("output_11_weight", Some(("output.weight", 11))),
            ("output_11_bias", Some(("output.bias", 11))),
            ("rope_cos_0", None),
            ("blk_x_attn_q_weight", None),
            ("blk_0_attn_q_weight_scale", None),
        ] {
            assert_eq!(
                tensor_of(constant),
                tensor.map(|(name, part)| (name.to_string(), part)),
                "{constant}"
            );
        }
    }
}
