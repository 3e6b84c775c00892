//! The files of sentence-transformers beside an encoder: modules.json lists what follows the
//! model, `1_Pooling/config.json` says how the vectors of a text's tokens become one.
//!
//! Source: `Pooling` of sentence-transformers, `enum llama_pooling_type` of llama.h.

use std::path::{Component, Path};

use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use crate::container::side::read_json;
use crate::error::{Error, Result};
use crate::limits::Limits;

/// Number in llama.cpp, key of older files, value of `pooling_mode` in newer ones.
const POOLINGS: [(u32, &str, &str); 3] = [
    (1, "pooling_mode_mean_tokens", "mean"),
    (2, "pooling_mode_cls_token", "cls"),
    (3, "pooling_mode_lasttoken", "lasttoken"),
];

/// What the files say.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sentence {
    /// `enum llama_pooling_type`.
    pub pooling: Option<u32>,
    /// What is left out.
    pub notes: Vec<String>,
}

#[derive(Deserialize)]
struct Module {
    #[serde(rename = "type")]
    kind: String,
    path: String,
}

impl Sentence {
    /// Reads the files of `dir`; where there are none, nothing is said.
    ///
    /// # Errors
    /// `Unsupported` for a pooling that llama.cpp does not have, `Malformed` for files that are not
    /// as expected, `Limit` and `Io` from reading.
    pub fn read(dir: &Path, limits: &Limits) -> Result<Self> {
        let mut found = Self::default();
        let list = dir.join("modules.json");
        let modules = read_json::<Vec<Module>>(&list, limits.side_file_bytes)?.unwrap_or_default();
        for module in modules {
            match module.kind.rsplit('.').next().unwrap_or_default() {
                "Pooling" if found.pooling.is_none() => {
                    let inside = Path::new(&module.path);
                    if inside.components().any(|c| !matches!(c, Component::Normal(_))) {
                        let why = format!("the path {:?} of a module leaves the directory", module.path);
                        return Err(Error::malformed(why).at(&list));
                    }
                    let path = dir.join(inside).join("config.json");
                    let config = read_json::<Json>(&path, limits.side_file_bytes)?;
                    let config = config.ok_or_else(|| Error::malformed("is missing, modules.json names it").at(&path))?;
                    found.pooling = Some(pooling(&config).map_err(|e| e.at(&path))?);
                }
                "Dense" => found.notes.push(format!(
                    "warning: the dense layer {} that sentence-transformers puts after the model is left out: embeddings will differ",
                    module.path
                )),
                _ => {}
            }
        }
        Ok(found)
    }
}

fn pooling(config: &Json) -> Result<u32> {
    let is_on = |(_, key, mode): &&(u32, &str, &str)| {
        config.get(key).and_then(Json::as_bool) == Some(true)
            || config.get("pooling_mode").and_then(Json::as_str) == Some(mode)
    };
    let found = POOLINGS.iter().find(is_on).map(|(id, ..)| *id);
    found.ok_or_else(|| {
        Error::unsupported("llama.cpp pools by mean, first or last token only, this model otherwise")
            .hint("without modules.json it is converted, and gives the vectors of single tokens")
    })
}

/// The files that say the same, by name; none for what is no pooling of sentence-transformers.
pub fn files(pooling: u64, n_embd: u64) -> Vec<(String, Json)> {
    let Some((id, ..)) = POOLINGS.iter().find(|(id, ..)| u64::from(*id) == pooling) else {
        return Vec::new();
    };
    let mut config = Map::new();
    config.insert("word_embedding_dimension".into(), json!(n_embd));
    config.extend(POOLINGS.iter().map(|(other, key, _)| ((*key).to_string(), json!(other == id))));
    let module = |n: u32, path: &str, name: &str| json!({"idx": n, "name": n.to_string(), "path": path, "type": format!("sentence_transformers.models.{name}")});
    let modules = json!([module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling")]);
    vec![("modules.json".into(), modules), ("1_Pooling/config.json".into(), Json::Object(config))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn read(files: &[(&str, &str)]) -> Result<Sentence> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Sentence::read(dir.path(), &Limits::default())
    }

    const LIST: &str = r#"[{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]"#;

    #[test]
    fn poolings() {
        assert_eq!(read(&[]).unwrap(), Sentence::default());
        for (config, id) in [
            (r#"{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}"#, 1),
            (r#"{"pooling_mode_cls_token": true}"#, 2),
            (r#"{"pooling_mode": "lasttoken"}"#, 3),
        ] {
            let found = read(&[("modules.json", LIST), ("1_Pooling/config.json", config)]).unwrap();
            assert_eq!((found.pooling, found.notes.len()), (Some(id), 1));
        }
        let max = r#"{"pooling_mode_max_tokens": true}"#;
        let e = read(&[("modules.json", LIST), ("1_Pooling/config.json", max)]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert_eq!(read(&[("modules.json", LIST)]).unwrap_err().kind(), ErrorKind::Malformed);
        let outside = LIST.replace("1_Pooling", "../x");
        assert_eq!(read(&[("modules.json", &outside)]).unwrap_err().kind(), ErrorKind::Malformed);
    }

    #[test]
    fn written_files_say_the_same() {
        for id in 1..=3 {
            let files: Vec<(String, String)> =
                files(id.into(), 8).into_iter().map(|(name, json)| (name, json.to_string())).collect();
            let files: Vec<(&str, &str)> = files.iter().map(|(n, t)| (n.as_str(), t.as_str())).collect();
            assert_eq!(read(&files).unwrap(), Sentence { pooling: Some(id), notes: Vec::new() });
        }
        assert!(files(4, 8).is_empty() && files(0, 8).is_empty());
    }
}
