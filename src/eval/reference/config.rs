//! config.json as candle's models want it: one dialect, no gaps.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};

/// Counts in a config lie below this.
const MOST: u64 = 1 << 24;

/// A flat config.json.
#[derive(Clone)]
pub(super) struct Config(Map<String, Json>);

impl Config {
    /// Brings older and newer dialects together: what stands in `text_config` at the root, the
    /// parameters of RoPE as `rope_theta` and `rope_scaling` (null where nothing is scaled).
    pub fn read(config: &Json) -> Self {
        let mut flat = config.as_object().cloned().unwrap_or_default();
        if let Some(Json::Object(text)) = flat.remove("text_config") {
            flat.extend(text);
        }
        // Ids of special tokens play no part, and come in several forms.
        flat.retain(|key, _| !key.ends_with("_token_id"));
        let mut config = Self(flat);
        if let Some(Json::Object(rope)) = config.0.remove("rope_parameters") {
            let per_layer_type = |kind: &str| rope.get(kind).and_then(Json::as_object).cloned();
            let full = per_layer_type("full_attention");
            if let Some(theta) =
                per_layer_type("sliding_attention").and_then(|r| r.get("rope_theta").cloned())
            {
                config.0.insert("rope_local_base_freq".into(), theta);
            }
            let rope = full.unwrap_or(rope);
            for key in ["rope_theta", "partial_rotary_factor"] {
                if let Some(value) = rope.get(key) {
                    config.0.insert(key.into(), value.clone());
                }
            }
            config.0.insert("rope_scaling".into(), Json::Object(rope));
        }
        if let Some(Json::Object(rope)) = config.0.get_mut("rope_scaling") {
            let kind = rope.get("rope_type").or(rope.get("type")).and_then(Json::as_str);
            match kind.map(str::to_string) {
                None => drop(config.0.remove("rope_scaling")),
                Some(kind) if kind == "default" => drop(config.0.remove("rope_scaling")),
                Some(kind) => drop(rope.insert("rope_type".into(), kind.into())),
            }
        }
        config
    }

    pub fn get(&self, key: &str) -> &Json {
        self.0.get(key).unwrap_or(&Json::Null)
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key).as_str()
    }

    pub fn is(&self, key: &str) -> bool {
        self.get(key).as_bool() == Some(true)
    }

    /// A positive number of things.
    ///
    /// # Errors
    /// `Malformed` where it is missing or none.
    pub fn count(&self, key: &str) -> Result<usize> {
        let value = self.get(key);
        match value.as_u64() {
            Some(n @ 1..MOST) => Ok(n as usize),
            _ => Err(Error::malformed(format!("config.json: {key} is {value}, a count was expected"))),
        }
    }

    /// Positions that the model was made for.
    pub fn positions(&self) -> usize {
        self.count("max_position_embeddings").or(self.count("n_positions")).unwrap_or(usize::MAX)
    }

    pub fn with(&self, key: &str, value: impl Into<Json>) -> Self {
        let mut config = self.clone();
        config.0.insert(key.into(), value.into());
        config
    }

    /// The same where `key` is not there, or null.
    pub fn or(&self, key: &str, value: impl Into<Json>) -> Self {
        if self.get(key).is_null() { self.with(key, value) } else { self.clone() }
    }

    /// What all decoders have, checked.
    ///
    /// # Errors
    /// `Malformed` for heads that do not fit each other, and counts that are none.
    pub fn checked(self) -> Result<Self> {
        let (hidden, heads) = (self.count("hidden_size")?, self.count("num_attention_heads")?);
        let config = self.or("num_key_value_heads", heads).or("head_dim", hidden / heads);
        let (kv, dim) = (config.count("num_key_value_heads")?, config.count("head_dim")?);
        for key in ["num_hidden_layers", "intermediate_size"] {
            config.count(key)?;
        }
        if heads % kv != 0 || dim % 2 != 0 {
            return Err(Error::malformed(format!(
                "config.json: {heads} heads of {dim} values cannot share {kv} key-value heads"
            )));
        }
        Ok(config)
    }

    /// Refuses what candle's model would leave out.
    ///
    /// # Errors
    /// `Unsupported` where `is_so`.
    pub fn without(self, is_so: bool, what: &str) -> Result<Self> {
        match is_so {
            true => Err(Error::unsupported(format!("candle's model leaves out {what}"))),
            false => Ok(self),
        }
    }

    /// In the form of one of candle's models.
    ///
    /// # Errors
    /// `Unsupported` with the field that is not as it was expected.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(Json::Object(self.0.clone()))
            .map_err(|e| Error::unsupported(format!("candle's model does not take this config.json: {e}")))
    }
}
