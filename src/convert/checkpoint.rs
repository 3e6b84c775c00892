//! An opened Hugging Face directory: weights, config.json, model card. A `.qpack` file that was made of one
//! is opened as the directory.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::side_files::{SideFiles, is_qpack_file};
use crate::container::qpack::{METADATA, Qpack};
use crate::container::side::{read_json, read_side_file};
use crate::container::{Store, weights};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::packed;

/// Metadata that a GGUF file had and config.json cannot hold, kept beside it by `gguf-to-hf`.
pub const GGUF_METADATA_FILE: &str = "gguf_metadata.json";

/// A model in Hugging Face's layout. Only headers are read.
#[derive(Debug)]
pub struct Checkpoint {
    /// The directory; of a `.qpack` file a temporary one, for as long as this is there.
    pub dir: PathBuf,
    /// What keeps it.
    pub side: SideFiles,
    /// Its weights; those that are packed, joined.
    pub store: Store,
    /// How they were quantized already, `quant_method`.
    pub quant_method: Option<&'static str>,
    /// config.json.
    pub config: Json,
    /// generation_config.json, where there is a valid one.
    pub generation: Option<Json>,
    /// README.md, where there is one.
    pub model_card: Option<String>,
}

impl Checkpoint {
    /// Opens a directory, or the directory of the weights file or index that is given, or a `.qpack` file.
    ///
    /// # Errors
    /// `Io` for no such path, `Malformed` or `Unsupported` for what is no model, and for tensors of a `.qpack`
    /// file whose values cannot be read.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        if is_qpack_file(path)? {
            let model = Qpack::open(path, limits)?;
            let side = SideFiles::extract(&model, path, limits)?;
            let place = side.place();
            return Self::of_qpack(path, model, side, limits).map_err(place);
        }
        let side = SideFiles::of(path, limits)?;
        let config = read_config(path, side.dir(), limits)?;
        let weights = weights::open(path, limits)?;
        let config_path = side.dir().join("config.json");
        let (store, quant_method) = quantization(&config, side.dir(), weights.values, limits)
            .and_then(|stated| packed::unpack(weights.store, stated.as_ref()))
            .map_err(|e| e.at(&config_path))?;
        if let Some(method) = quant_method.filter(|_| is_conv1d(&config)) {
            return Err(Error::unsupported(format!(
                "the layers of this model are stored transposed (Conv1D): packed ones ({method}) are not read yet"
            ))
            .at(&config_path)
            .hint("convert the unquantized model that it was made from"));
        }
        Self::new(side, store, quant_method, config, limits)
    }

    fn of_qpack(path: &Path, model: Qpack, side: SideFiles, limits: &Limits) -> Result<Self> {
        if !side.dir().join("config.json").is_file() {
            let hint = match model.files().iter().any(|f| f.name == METADATA) {
                true => "it was made from GGUF: commands that take GGUF files take it",
                false => {
                    "its tensors can be looked at (inspect) and checked (verify); a model has its config.json in the file"
                }
            };
            return Err(Error::unsupported("is no Hugging Face model: it holds no config.json")
                .at(path)
                .hint(hint));
        }
        model.check_readable().map_err(|e| e.at(path))?;
        let config = read_config(path, side.dir(), limits)?;
        let stated = quantization(&config, side.dir(), Map::new(), limits)?;
        let (parts, tensors) = model.into_parts()?;
        let (store, method) = packed::qpack::join(parts, &tensors)
            .and_then(|store| packed::qpack::unpack_rest(store, stated.as_ref()))
            .map_err(|e| e.at(path))?;
        let is_decoded = store.tensors().iter().any(|t| store.is_joined(t));
        Self::new(side, store, method.or(is_decoded.then_some("qpack")), config, limits)
    }

    fn new(
        side: SideFiles,
        store: Store,
        quant_method: Option<&'static str>,
        config: Json,
        limits: &Limits,
    ) -> Result<Self> {
        let dir = side.dir().to_path_buf();
        let model_card = model_card(&dir, limits)?;
        let generation = match read_json(&dir.join("generation_config.json"), limits.side_file_bytes) {
            // What is no JSON says nothing; the model does not depend on it.
            Err(e) if e.kind() == ErrorKind::Malformed => None,
            found => found?,
        };
        Ok(Self { dir, side, store, quant_method, config, generation, model_card })
    }

    /// What the user should know of the weights.
    pub fn notes(&self) -> Option<String> {
        let decoded = self.store.tensors().iter().filter(|t| self.store.is_joined(t) && !t.dtype.is_block());
        let (method, n) = (self.quant_method?, decoded.count());
        (n > 0).then(|| {
            format!("{n} tensors of the source are quantized already ({method}): what that lost stays lost")
        })
    }

    /// How images and sound are prepared for the model: preprocessor_config.json, and what
    /// processor_config.json says in its place. What either keeps in an object of its own
    /// (`media_proc_cfg`, `image_processor`) is found at its root too.
    ///
    /// # Errors
    /// `Malformed` for what is no JSON object, `Limit`, `Io`.
    pub fn preprocessor(&self, limits: &Limits) -> Result<Json> {
        let mut merged = serde_json::Map::new();
        for (name, object) in
            [("preprocessor_config.json", "media_proc_cfg"), ("processor_config.json", "image_processor")]
        {
            let path = self.dir.join(name);
            let Some(config) = read_json::<Json>(&path, limits.side_file_bytes)? else { continue };
            let Json::Object(config) = config else {
                return Err(Error::malformed("is no JSON object").at(&path));
            };
            let inner = config.get(object).and_then(Json::as_object).cloned();
            merged.extend(config);
            merged.extend(inner.unwrap_or_default());
        }
        Ok(Json::Object(merged))
    }
}

/// Most bytes of a model card.
const CARD_BYTES: u64 = 16 << 20;

/// README.md of a directory; `None` where there is none.
///
/// # Errors
/// `Limit`, `Io`.
pub(super) fn model_card(dir: &Path, limits: &Limits) -> Result<Option<String>> {
    let bytes = read_side_file(&dir.join("README.md"), limits.side_file_bytes.min(CARD_BYTES))?;
    Ok(bytes.map(|text| String::from_utf8_lossy(&text).into_owned()))
}

fn read_config(path: &Path, dir: &Path, limits: &Limits) -> Result<Json> {
    let config_path = dir.join("config.json");
    let Some(config) = read_json::<Json>(&config_path, limits.side_file_bytes)? else {
        return Err(Error::unsupported("is no Hugging Face model: config.json is missing")
            .at(path)
            .hint("give the directory that holds config.json and the weights"));
    };
    match config.is_object() {
        true => Ok(config),
        false => Err(Error::malformed("is no JSON object").at(&config_path)),
    }
}

/// Whether matrices are stored `[in, out]`, as transformers' Conv1D has them, while packed ones are
/// `[out, in]` in any model.
pub(super) fn is_conv1d(config: &Json) -> bool {
    config
        .get("model_type")
        .and_then(Json::as_str)
        .is_some_and(|t| matches!(t, "gpt2" | "jais" | "openai-gpt" | "imagegpt" | "decision_transformer"))
}

/// What the model says of its quantization: in config.json, or, of early GPTQ models, in a file of
/// its own, or with the weights (`values`).
///
/// # Errors
/// `Io`, `Limit` and `Malformed` of that file; `Malformed` for contradictions.
pub fn quantization(
    config: &Json,
    dir: &Path,
    values: Map<String, Json>,
    limits: &Limits,
) -> Result<Option<Json>> {
    let early = || read_json(&dir.join(packed::QUANTIZE_CONFIG), limits.side_file_bytes);
    packed::stated(packed::quantization(config, early)?, values)
}
