//! `general.*`: name, size, origin and licence of a model, from config.json, the model card, and
//! the name of the directory, as llama.cpp's converter derives them.
//! Source of the rules: gguf-py's `metadata.py` and `utility.py`; the naming convention stands in
//! ggml's `docs/gguf.md`.

use serde_json::{Map, Value as Json};

use super::model_id::{ModelId, title};
use crate::container::gguf::{Array, Metadata, Value};

/// Weights by kind. Experts are counted once: `expert` is what one expert has.
#[derive(Clone, Copy, Debug, Default)]
pub struct ParameterCounts {
    /// All weights.
    pub total: u64,
    /// Weights that are in no expert.
    pub shared: u64,
    /// Weights of one expert, over all layers.
    pub expert: u64,
    /// Experts in a layer.
    pub expert_count: u64,
}

/// What a Hugging Face directory says about a model in words.
pub struct Described<'a> {
    /// Name of the directory.
    pub dir_name: &'a str,
    /// config.json.
    pub config: &'a Json,
    /// generation_config.json.
    pub generation: Option<&'a Json>,
    /// README.md.
    pub model_card: Option<&'a str>,
}

/// The derived metadata.
#[derive(Clone, Debug, Default)]
pub struct General {
    texts: Map<String, Json>,
    sampling: Vec<(&'static str, Value)>,
    base_models: Option<Vec<Map<String, Json>>>,
    datasets: Option<Vec<Map<String, Json>>>,
    tags: Option<Vec<String>>,
    languages: Option<Vec<String>>,
}

/// Keys in the order in which they are written, after `general.name`.
const TEXT_KEYS: &[&str] = &[
    "name",
    "author",
    "version",
    "organization",
    "finetune",
    "basename",
    "description",
    "quantized_by",
    "size_label",
    "license",
    "license.name",
    "license.link",
    "url",
    "doi",
    "uuid",
    "repo_url",
    "source.url",
    "source.doi",
    "source.uuid",
    "source.repo_url",
];

/// Our key, and the model card's keys for it, the first that is there counts.
const CARD_KEYS: &[(&str, &[&str])] = &[
    ("name", &["name", "model_name"]),
    ("author", &["author", "model_author", "model_creator"]),
    ("version", &["version", "model_version"]),
    ("organization", &["organization", "model_organization"]),
    ("description", &["description", "model_description"]),
    ("finetune", &["finetune", "model_finetune"]),
    ("basename", &["basename", "model_basename", "model_type"]),
    ("size_label", &["size_label", "model_size_label"]),
    ("source.url", &["url", "model_url"]),
    ("source.doi", &["doi", "model_doi"]),
    ("source.uuid", &["uuid", "model_uuid"]),
    ("source.repo_url", &["repo_url", "model_repo_url"]),
    ("license", &["license"]),
    ("license.name", &["license_name"]),
    ("license.link", &["license_link"]),
];

/// Keys of one base model or dataset, in the order in which they are written.
const ORIGIN_KEYS: &[&str] =
    &["name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url"];

/// generation_config.json's keys, and ours under `general.sampling.`.
const SAMPLING: &[(&str, &[&str])] = &[
    ("sequence", &["sequence"]),
    ("top_k", &["top_k"]),
    ("top_p", &["top_p"]),
    ("min_p", &["min_p"]),
    ("xtc_probability", &["xtc_probability"]),
    ("xtc_threshold", &["xtc_threshold"]),
    ("temp", &["temperature"]),
    ("penalty_last_n", &["penalty_last_n"]),
    ("penalty_repeat", &["penalty_repeat", "repetition_penalty"]),
    ("mirostat", &["mirostat"]),
    ("mirostat_tau", &["mirostat_tau"]),
    ("mirostat_eta", &["mirostat_eta"]),
];

impl General {
    /// Derives what can be derived. A name given by hand replaces the derived one.
    pub fn derive(from: &Described<'_>, counts: ParameterCounts, name: Option<&str>) -> Self {
        let mut general = Self::default();
        if let Some(generation) = from.generation {
            general.sampling = sampling(generation);
        }
        if let Some(card) = from.model_card.and_then(front_matter) {
            general.use_card(&card, counts.total);
        }
        let path = from.config.get("_name_or_path").and_then(Json::as_str);
        // More than one slash is a path on somebody's disk, not a model's name.
        if let Some(id) = path.filter(|p| p.matches('/').count() <= 1) {
            general.use_id(&ModelId::parse(id, counts.total));
        }
        general.use_id(&ModelId::parse(from.dir_name, counts.total));
        general.fill("name", Some(from.dir_name.to_string()));
        if counts.total > 0 {
            general.fill("size_label", Some(size_label(counts)));
        }
        if let Some(name) = name {
            general.texts.insert("name".into(), name.into());
        }
        general
    }

    /// The value of a text key such as `name`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.texts.get(key)?.as_str()
    }

    /// Writes `general.*` but architecture, type, file type and quantization version.
    pub fn write(&self, metadata: &mut Metadata) {
        for (key, value) in &self.sampling {
            metadata.set(format!("general.sampling.{key}"), value.clone());
        }
        for key in TEXT_KEYS {
            if let Some(text) = self.get(key) {
                metadata.set(format!("general.{key}"), text);
            }
        }
        for (kind, origins) in [("base_model", &self.base_models), ("dataset", &self.datasets)] {
            let Some(origins) = origins else { continue };
            metadata.set(format!("general.{kind}.count"), Value::U32(origins.len() as u32));
            for (i, origin) in origins.iter().enumerate() {
                for key in ORIGIN_KEYS {
                    if let Some(text) = origin.get(*key).and_then(text_of) {
                        metadata.set(format!("general.{kind}.{i}.{key}"), text);
                    }
                }
            }
        }
        for (key, list) in [("tags", &self.tags), ("languages", &self.languages)] {
            if let Some(list) = list {
                let list = list.iter().map(|s| s.as_bytes().to_vec()).collect();
                metadata.set(format!("general.{key}"), Value::Array(Array::String(list)));
            }
        }
    }

    /// The name of the GGUF file: `{base}-{size}-{finetune}-{version}-{TYPE}.gguf`; a projector's
    /// begins with `mmproj-` and has no size.
    pub fn file_name(&self, type_name: &str, mmproj: bool) -> String {
        let plain = |text: &str| {
            let dashed: String = text
                .trim()
                .chars()
                .map(|c| if c.is_control() || matches!(c, ' ' | '/' | '\\' | ':') { '-' } else { c })
                .collect();
            dashed.trim_start_matches('.').to_string()
        };
        let mut parts = vec![plain(self.get("basename").or(self.get("name")).unwrap_or("ggml-model"))];
        let further =
            if mmproj { &["finetune", "version"][..] } else { &["size_label", "finetune", "version"] };
        parts.extend(further.iter().filter_map(|k| self.get(k)).map(plain));
        if mmproj {
            parts.insert(0, "mmproj".into());
        }
        parts.push(type_name.to_uppercase());
        format!("{}.gguf", parts.join("-"))
    }

    fn fill(&mut self, key: &str, value: Option<String>) {
        if let Some(value) = value
            && !self.texts.contains_key(key)
        {
            self.texts.insert(key.into(), value.into());
        }
    }

    fn use_id(&mut self, id: &ModelId) {
        self.fill("name", id.name.as_deref().map(title));
        self.fill("organization", id.organization.as_deref().map(title));
        self.fill("basename", id.basename.clone());
        self.fill("finetune", id.finetune.clone());
        self.fill("version", id.version.clone());
        self.fill("size_label", id.size_label.clone());
    }

    fn use_card(&mut self, card: &Map<String, Json>, total: u64) {
        for (key, names) in CARD_KEYS {
            self.fill(key, names.iter().find_map(|n| card.get(*n)).and_then(text_of));
        }
        let entries = |names: &[&str]| {
            let value = names.iter().find_map(|n| card.get(*n))?;
            Some(match value {
                Json::Array(list) => list.clone(),
                Json::Null => Vec::new(),
                one => vec![one.clone()],
            })
        };
        let origins = |names: &[&str]| -> Option<Vec<Map<String, Json>>> {
            Some(entries(names)?.iter().filter_map(|e| origin(e, total)).collect())
        };
        self.base_models = origins(&["base_model", "base_models", "base_model_sources"]);
        self.datasets = origins(&["datasets", "dataset", "dataset_sources"]);
        let list = |names: [&str; 2]| {
            let found: Vec<String> =
                names.iter().filter_map(|n| entries(&[n])).flatten().filter_map(|v| text_of(&v)).collect();
            (!found.is_empty()).then_some(found)
        };
        self.tags = list(["tags", "pipeline_tag"]);
        self.languages = list(["languages", "language"]);
    }
}

fn sampling(generation: &Json) -> Vec<(&'static str, Value)> {
    let number = |key: &str, names: &[&str]| {
        let v = names.iter().find_map(|n| generation.get(*n)).filter(|v| !v.is_null())?;
        Some(match key {
            "sequence" => Value::from(v.as_str()?),
            "top_k" | "penalty_last_n" | "mirostat" => Value::I32(v.as_i64()?.try_into().ok()?),
            _ => Value::F32(v.as_f64()? as f32),
        })
    };
    SAMPLING.iter().filter_map(|(key, names)| Some((*key, number(key, names)?))).collect()
}

/// Scalars as text; a list joined by commas.
fn text_of(value: &Json) -> Option<String> {
    match value {
        Json::String(s) => Some(s.clone()),
        Json::Number(_) | Json::Bool(_) => Some(value.to_string()),
        Json::Array(list) => Some(list.iter().filter_map(text_of).collect::<Vec<_>>().join(",")),
        _ => None,
    }
}

/// Most bytes of what a model card says of itself.
const FRONT_BYTES: usize = 1 << 18;

/// Deepest nesting of its lists: the parser takes time by the square of it.
const FRONT_DEPTH: usize = 64;

/// How deep brackets are nested at most, those in texts included.
fn nesting(yaml: &[&str]) -> usize {
    let (mut depth, mut most) = (0usize, 0);
    for byte in yaml.iter().flat_map(|l| l.bytes()) {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        most = most.max(depth);
    }
    most
}

/// The YAML between the `---` lines at the beginning of a model card. A card with faulty YAML is
/// treated as one without: it describes the model, it does not define it.
fn front_matter(card: &str) -> Option<Map<String, Json>> {
    let mut lines = card.lines();
    if lines.next()? != "---" {
        return None;
    }
    let yaml: Vec<&str> = lines.take_while(|l| *l != "---").collect();
    if yaml.iter().map(|l| l.len()).sum::<usize>() > FRONT_BYTES || nesting(&yaml) > FRONT_DEPTH {
        return None;
    }
    // `no` is Norwegian here, not a truth value; YAML indents with spaces.
    let yaml = (yaml.join("\n") + "\n").replace("- no\n", "- \"no\"\n").replace('\t', "  ");
    match serde_norway::from_str(&yaml).ok()? {
        Json::Object(map) => Some(map),
        _ => None,
    }
}

/// A base model or dataset: an id, an address, or fields of its own.
fn origin(entry: &Json, total: u64) -> Option<Map<String, Json>> {
    let id = match entry {
        Json::Object(map) => return Some(map.clone()),
        Json::String(id) => id,
        _ => return None,
    };
    let mut map = Map::new();
    let mut parts = |id: &str| {
        let parsed = ModelId::parse(id, total);
        let mut put = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                map.insert(key.into(), value.into());
            }
        };
        put("name", parsed.name.as_deref().map(title));
        put("organization", parsed.organization.as_deref().map(title));
        put("version", parsed.version);
        parsed.organization.zip(parsed.name)
    };
    if ["http://", "https://", "ssh://"].iter().any(|p| id.starts_with(p)) {
        let hub = id.strip_prefix("https://huggingface.co/").or(id.strip_prefix("http://huggingface.co/"));
        if let Some(id) = hub.filter(|h| h.matches('/').count() == 1 && !h.ends_with('/')) {
            parts(id);
        }
        map.insert("repo_url".into(), id.as_str().into());
    } else if let Some((organization, name)) = parts(id) {
        map.insert("repo_url".into(), format!("https://huggingface.co/{organization}/{name}").into());
    }
    Some(map)
}

/// `135M`, `8x7.2B`: with experts, their number and what a token's path would have with one each.
fn size_label(counts: ParameterCounts) -> String {
    if counts.expert_count > 0 {
        format!("{}x{}", counts.expert_count, rounded(counts.shared + counts.expert))
    } else {
        rounded(counts.total)
    }
}

/// At least two significant digits, in K, M, B or T.
fn rounded(n: u64) -> String {
    let n = n as f64;
    let (value, unit) = match n {
        n if n > 1e12 => (n * 1e-12, 'T'),
        n if n > 1e9 => (n * 1e-9, 'B'),
        n if n > 1e6 => (n * 1e-6, 'M'),
        n => (n * 1e-3, 'K'),
    };
    let whole = value.round_ties_even() as u64;
    let digits = if whole == 0 { 0 } else { whole.to_string().len() };
    format!("{value:.*}{unit}", 2usize.saturating_sub(digits))
}

/// llama.cpp looks for Phi 3's tokens in every model that is called so, and does not load one that
/// lacks them (`llama_vocab::impl::load`). Such a model is called `phi_3`; returns a note that says so.
pub(super) fn avoid_phi3(metadata: &mut Metadata, tokens: &[Vec<u8>]) -> Option<String> {
    const NAMES: [&str; 2] = ["phi-3", "phi3"];
    const TOKENS: [&str; 4] = ["</s>", "<unk>", "<s>", "<|endoftext|>"];
    let name = metadata.str("general.name")?.to_string();
    let place = |name: &str| {
        let lower = name.to_ascii_lowercase();
        NAMES.iter().find_map(|n| Some((lower.find(n)?, n.len())))
    };
    place(&name)?;
    let lacking = TOKENS.iter().find(|wanted| !tokens.iter().any(|t| t == wanted.as_bytes()))?;
    let mut new = name.clone();
    while let Some((at, len)) = place(&new) {
        new.replace_range(at + 3..at + len, "_3");
    }
    metadata.set("general.name", new.as_str());
    Some(format!(
        "general.name is {new:?} instead of {name:?}: llama.cpp loads no model of that name whose vocabulary lacks {lacking:?}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(dir_name: &str, total: u64) -> General {
        let config = Json::Null;
        let from = Described { dir_name, config: &config, generation: None, model_card: None };
        General::derive(&from, ParameterCounts { total, shared: total, ..Default::default() }, None)
    }

    #[test]
    fn names_fall_into_parts() {
        for (dir, total, name, base, finetune, version, size, file) in [
            ("gemma3-spm", 372_000, "Gemma3 Spm", None, None, None, "372K", "Gemma3-Spm-372K-F16.gguf"),
            (
                "SmolLM2-135M-hf",
                134_515_008,
                "SmolLM2 135M Hf",
                Some("SmolLM2"),
                Some("hf"),
                None,
                "135M",
                "SmolLM2-135M-hf-F16.gguf",
            ),
            (
                "Meta-Llama-3-8B",
                8_030_000_000,
                "Meta Llama 3 8B",
                Some("Meta-Llama-3"),
                None,
                None,
                "8B",
                "Meta-Llama-3-8B-F16.gguf",
            ),
            (
                "Qwen2.5-0.5B-Instruct",
                494_000_000,
                "Qwen2.5 0.5B Instruct",
                Some("Qwen2.5"),
                Some("Instruct"),
                None,
                "0.5B",
                "Qwen2.5-0.5B-Instruct-F16.gguf",
            ),
            (
                "gpt-oss-20b",
                20_900_000_000,
                "Gpt Oss 20b",
                Some("gpt-oss"),
                None,
                None,
                "20B",
                "gpt-oss-20B-F16.gguf",
            ),
            (
                "Mixtral-8x7B-Instruct-v0.1",
                46_700_000_000,
                "Mixtral 8x7B Instruct v0.1",
                Some("Mixtral"),
                Some("Instruct"),
                Some("v0.1"),
                "8x7B",
                "Mixtral-8x7B-Instruct-v0.1-F16.gguf",
            ),
            (
                "bloom-7b1",
                7_100_000_000,
                "Bloom 7b1",
                Some("bloom"),
                None,
                None,
                "7.1B",
                "bloom-7.1B-F16.gguf",
            ),
            (
                "Phi-3-mini-128k-instruct",
                3_800_000_000,
                "Phi 3 Mini 128k Instruct",
                Some("Phi-3"),
                Some("128k-instruct"),
                None,
                "mini",
                "Phi-3-mini-128k-instruct-F16.gguf",
            ),
        ] {
            let g = described(dir, total);
            assert_eq!(g.get("name"), Some(name));
            assert_eq!(
                (g.get("basename"), g.get("finetune"), g.get("version"), g.get("size_label")),
                (base, finetune, version, Some(size)),
                "{dir}"
            );
            assert_eq!(g.file_name("f16", false), file);
        }
    }

    #[test]
    fn sizes_have_two_digits() {
        for (n, label) in [
            (427_000, "427K"),
            (1_660_000_000, "1.7B"),
            (134_515_008, "135M"),
            (9_400_000, "9.4M"),
            (0, "0.00K"),
        ] {
            assert_eq!(rounded(n), label);
        }
        let moe = ParameterCounts { total: 9, shared: 200_000, expert: 129_000, expert_count: 4 };
        assert_eq!(size_label(moe), "4x329K");
    }

    #[test]
    fn a_name_that_llama_cpp_stumbles_over() {
        let mut m = Metadata::default();
        m.set("general.name", "My Phi-3 of phi3");
        let all = ["</s>", "<unk>", "<s>", "<|endoftext|>"].map(|t| t.as_bytes().to_vec());
        assert_eq!(avoid_phi3(&mut m, &all), None);
        let note = avoid_phi3(&mut m, &all[..3]).unwrap();
        assert_eq!(m.str("general.name"), Some("My Phi_3 of phi_3"));
        assert!(note.contains("<|endoftext|>"), "{note}");
        assert_eq!(avoid_phi3(&mut m, &all[..3]), None);
    }

    #[test]
    fn model_cards() {
        let card = "---\nlicense: apache-2.0\nlanguage:\n- en\n- no\nbase_model: meta-llama/Llama-2-7b-hf\ntags:\n- chat\npipeline_tag: text-generation\n---\n# Hello\n";
        let config = serde_json::json!({"_name_or_path": "org/Some-Name-1B"});
        let generation = serde_json::json!({"temperature": 0.6, "top_k": 20});
        let from = Described {
            dir_name: "x",
            config: &config,
            generation: Some(&generation),
            model_card: Some(card),
        };
        let g = General::derive(&from, ParameterCounts::default(), None);
        let mut m = Metadata::default();
        g.write(&mut m);
        assert_eq!(m.str("general.name"), Some("Some Name 1B"));
        assert_eq!(m.str("general.organization"), Some("Org"));
        assert_eq!(m.str("general.license"), Some("apache-2.0"));
        assert_eq!(m.str("general.base_model.0.name"), Some("Llama 2 7b Hf"));
        assert_eq!(
            m.str("general.base_model.0.repo_url"),
            Some("https://huggingface.co/meta-llama/Llama-2-7b-hf")
        );
        assert_eq!(m.u64("general.base_model.count"), Some(1));
        assert_eq!(m.get("general.languages").and_then(|v| v.as_array()).map(Array::len), Some(2));
        assert_eq!(m.get("general.tags").and_then(|v| v.as_array()).map(Array::len), Some(2));
        assert_eq!(m.get("general.sampling.top_k"), Some(&Value::I32(20)));
        for bad in ["", "---", "---\n: : :\n---", "no front matter"] {
            let from = Described { dir_name: "x", config: &config, generation: None, model_card: Some(bad) };
            General::derive(&from, ParameterCounts::default(), None);
        }
    }
}
