//! A LoRA adapter in PEFT's layout: `adapter_config.json` beside `adapter_model.safetensors` or
//! `.bin`.
//!
//! Source of names and formulas: PEFT's `src/peft/tuners/lora/{config,layer}.py` and
//! `src/peft/utils/save_and_load.py`. A pair (A, B) changes the weight of its module by
//! `scaling * B A`, where `scaling` is `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::Value as Json;

use super::checkpoint::model_card;
use crate::arch::Placer;
use crate::container::side::read_json;
use crate::container::{Factor, LowRank, Store, weights};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::packed::patterns::{At, Patterns};
use crate::tensor::{DType, TensorInfo};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];
/// PEFT wraps a model twice, which shows in the names.
const WRAPPERS: &str = "base_model.model.";

/// An opened adapter. Only headers are read.
#[derive(Debug)]
pub struct Adapter {
    /// The directory.
    pub dir: PathBuf,
    /// Its weights.
    pub store: Arc<Store>,
    /// What it changes, in the order of its weights.
    pub pairs: Vec<Pair>,
    /// Tokens that switch it on (aLoRA).
    pub invocation_tokens: Vec<u32>,
    /// README.md, where there is one.
    pub model_card: Option<String>,
}

/// Two matrices that change a weight.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Name of the weight in the base: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// A, of (rank, inputs).
    pub a: TensorInfo,
    /// B, of (outputs, rank).
    pub b: TensorInfo,
    /// Whether the weight is an embedding: a matrix of (inputs, outputs).
    pub embedding: bool,
    /// The dimension between.
    pub rank: u64,
    /// What B A is multiplied by.
    pub scaling: f64,
}

/// The part that a tensor of the adapter plays.
enum Part {
    A,
    B,
}

impl Adapter {
    /// Opens the adapter's directory, or the directory of the file that is given.
    ///
    /// # Errors
    /// `Io` for no such path; `Unsupported` for what is no LoRA adapter, or one of a kind that is more
    /// than a sum of products; `Malformed` when its tensors do not fit each other or its config.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let dir = match path.parent() {
            Some(parent) if path.is_file() => parent,
            _ => path,
        };
        let config_path = dir.join(CONFIG);
        let Some(config) = read_json::<Json>(&config_path, limits.side_file_bytes)? else {
            return Err(Error::unsupported(format!("is no PEFT adapter: {CONFIG} is missing"))
                .at(path)
                .hint(format!("give the directory that holds {CONFIG} and {}", WEIGHTS[0])));
        };
        let config = Config(config);
        config.check().map_err(|e| e.at(&config_path))?;
        let invocation_tokens = config.invocation_tokens().map_err(|e| e.at(&config_path))?;
        let weights = WEIGHTS.iter().map(|name| dir.join(name)).find(|path| path.exists());
        let weights = weights.ok_or_else(|| {
            Error::unsupported(format!("holds no weights: neither {} nor {}", WEIGHTS[0], WEIGHTS[1])).at(dir)
        })?;
        let store = weights::open(&weights, limits)?.store;
        let pairs = pairs(&config, store.tensors()).map_err(|e| e.at(&weights))?;
        let model_card = model_card(dir, limits)?;
        Ok(Self { dir: dir.to_path_buf(), store: Arc::new(store), pairs, invocation_tokens, model_card })
    }

    /// Each pair's product as the checkpoint stores the weight, and that weight's name there.
    ///
    /// # Errors
    /// `Malformed` when the base lacks a tensor or has it in another shape, `Unsupported` when the
    /// tensor is none that the architecture takes over as a matrix.
    pub fn products(&self, placer: &Placer<'_>, base: &Store) -> Result<Vec<(String, LowRank)>> {
        let names: HashMap<String, &TensorInfo> =
            base.tensors().iter().map(|t| (placer.canonical(&t.name), t)).collect();
        let product = |pair: &Pair| {
            let context = |e: Error| e.context(format!("adapter's {:?}", pair.name)).at(&self.dir);
            let product = pair.product(placer, &self.store).map_err(context)?;
            let weight = names.get(&placer.canonical(&pair.name)).ok_or_else(|| {
                context(Error::malformed("the base has no such tensor")).hint(
                    "the adapter was made for another base, or for one whose output is no matrix of its own",
                )
            })?;
            if weight.shape != [product.rows, product.columns] {
                return Err(context(Error::malformed(format!(
                    "changes a matrix of {:?}, the base's is {:?}",
                    [product.rows, product.columns],
                    weight.shape
                )))
                .hint("the adapter was made for another base"));
            }
            Ok((weight.name.clone(), product))
        };
        self.pairs.iter().map(product).collect()
    }

    /// Declares the adapter's products, `scale` times, as additions to the tensors of `base`.
    ///
    /// # Errors
    /// As [`Self::products`]; `Unsupported` for an adapter that is switched on by tokens.
    pub fn merge(&self, placer: &Placer<'_>, base: &mut Store, scale: f32) -> Result<()> {
        if !self.invocation_tokens.is_empty() {
            return Err(Error::unsupported("an aLoRA is switched on by tokens and cannot be merged")
                .at(&self.dir)
                .hint("keep it apart: qconv lora-to-gguf"));
        }
        for (name, mut product) in self.products(placer, base)? {
            product.scale *= scale;
            base.add(&name, product);
        }
        Ok(())
    }
}

impl Pair {
    /// The product as a checkpoint stores the weight: (outputs, inputs), or the other way round.
    ///
    /// # Errors
    /// As [`Placer::place`].
    pub fn product(&self, placer: &Placer<'_>, store: &Arc<Store>) -> Result<LowRank> {
        let (inputs, outputs) = (self.a.row(), self.b.shape[0]);
        let (rank, scale) = (self.rank, self.scaling as f32);
        let store = store.clone();
        let factor = |tensor: &TensorInfo, turned| Factor { tensor: tensor.clone(), turned };
        if self.embedding || placer.is_transposed(&self.weight(outputs, inputs))? {
            let (left, right) = (factor(&self.a, true), factor(&self.b, true));
            Ok(LowRank { store, left, right, rows: inputs, columns: outputs, rank, scale })
        } else {
            let (left, right) = (factor(&self.b, false), factor(&self.a, false));
            Ok(LowRank { store, left, right, rows: outputs, columns: inputs, rank, scale })
        }
    }

    /// The weight as a tensor of a checkpoint, of which only name and shape are meant.
    pub fn weight(&self, rows: u64, columns: u64) -> TensorInfo {
        let shape = vec![rows, columns];
        TensorInfo { name: self.name.clone(), dtype: DType::F32, shape, file: 0, offset: 0, nbytes: 0 }
    }
}

/// adapter_config.json.
struct Config(Json);

impl Config {
    fn is_set(&self, key: &str) -> bool {
        match self.0.get(key) {
            None | Some(Json::Null | Json::Bool(false)) => false,
            Some(Json::Array(list)) => !list.is_empty(),
            Some(Json::Object(map)) => !map.is_empty(),
            Some(Json::String(text)) => !text.is_empty(),
            Some(_) => true,
        }
    }

    /// Refuses what is more than a sum of products.
    fn check(&self) -> Result<()> {
        let kind = self.0.get("peft_type").and_then(Json::as_str).unwrap_or("unnamed");
        if !kind.eq_ignore_ascii_case("LORA") {
            return Err(Error::unsupported(format!("is an adapter of the kind {kind}, not LoRA"))
                .hint("merge it into its base with PEFT, and convert the result"));
        }
        for (key, why) in [
            ("use_dora", "DoRA also scales each row by a learned length"),
            ("use_qalora", "QA-LoRA pools its inputs"),
            ("lora_bias", "its B has a bias, which GGUF adapters cannot hold"),
            ("layer_replication", "the base's layers are repeated"),
            ("target_parameters", "parameters that are no modules of their own are adapted"),
            ("trainable_token_indices", "single rows of the embedding are replaced"),
        ] {
            if self.is_set(key) {
                return Err(Error::unsupported(format!("{key}: {why}"))
                    .hint("merge it into its base with PEFT (merge_and_unload), and convert the result"));
            }
        }
        let initial = self.0.get("init_lora_weights").and_then(Json::as_str).unwrap_or_default();
        if ["pissa", "olora", "corda", "lora_ga"].iter().any(|i| initial.starts_with(i)) {
            return Err(Error::unsupported(format!(
                "init_lora_weights {initial:?}: the adapter belongs to a base whose weights were changed when training began"
            ))
            .hint("save it with path_initial_model_for_weight_conversion, which makes it one for the unchanged base"));
        }
        Ok(())
    }

    fn invocation_tokens(&self) -> Result<Vec<u32>> {
        let bad = || Error::malformed("alora_invocation_tokens is no list of token ids");
        match self.0.get("alora_invocation_tokens") {
            None | Some(Json::Null) if self.is_set("invocation_string") => Err(Error::unsupported(
                "invocation_string: the tokens that switch the adapter on are not given as ids",
            )
            .hint("write their ids into alora_invocation_tokens")),
            None | Some(Json::Null) => Ok(Vec::new()),
            Some(list) => {
                let id = |v: &Json| v.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(bad);
                list.as_array().ok_or_else(bad)?.iter().map(id).collect()
            }
        }
    }

    /// `r` or `lora_alpha` of a module: that of the first pattern whose end it matches, or the common
    /// one.
    fn number(&self, key: &str, of: &Numbers, module: &str) -> Result<f64> {
        let of_pattern =
            of.patterns.first(module, of.numbers.len())?.and_then(|i| of.numbers.get(i).copied());
        let number = of_pattern.or(self.0.get(key).and_then(Json::as_f64));
        number
            .filter(|n| n.is_finite() && *n != 0.0)
            .ok_or_else(|| Error::malformed(format!("{CONFIG} gives no {key} other than 0")))
    }

    fn patterns(&self, key: &str) -> Result<Numbers> {
        let mut of = Numbers { patterns: Patterns::new(At::Modules), numbers: Vec::new() };
        let Some(Json::Object(map)) = self.0.get(key) else { return Ok(of) };
        for (pattern, n) in map {
            let bad = || Error::malformed(format!("{CONFIG}: {key} {pattern:?} is no pattern with a number"));
            of.patterns.add(pattern).map_err(|e| match e.kind() {
                ErrorKind::Unsupported => bad(),
                _ => e.context(format_args!("{CONFIG}: {key}")),
            })?;
            of.numbers.push(n.as_f64().ok_or_else(bad)?);
        }
        Ok(of)
    }
}

/// Ranks or alphas of some modules.
struct Numbers {
    patterns: Patterns,
    /// That of each pattern.
    numbers: Vec<f64>,
}

/// Name of the weight, the part, and whether the weight is an embedding.
fn parse_name(name: &str) -> Option<(String, Part, bool)> {
    // PEFT leaves out the adapter's name when it saves; others do not.
    let module = name.strip_prefix(WRAPPERS).unwrap_or(name);
    let module = module.strip_suffix(".weight").unwrap_or(module);
    for (marker, part, embedding) in [
        (".lora_A", Part::A, false),
        (".lora_B", Part::B, false),
        (".lora_embedding_A", Part::A, true),
        (".lora_embedding_B", Part::B, true),
    ] {
        if let Some((module, adapter)) = module.rsplit_once(marker)
            && (adapter.is_empty() || adapter.starts_with('.') && !adapter.ends_with(".bias"))
        {
            return Some((format!("{module}.weight"), part, embedding));
        }
    }
    None
}

fn pairs(config: &Config, tensors: &[TensorInfo]) -> Result<Vec<Pair>> {
    let (ranks, alphas) = (config.patterns("rank_pattern")?, config.patterns("alpha_pattern")?);
    type Found<'a> = (Option<&'a TensorInfo>, Option<&'a TensorInfo>, bool);
    let mut found: IndexMap<String, Found<'_>> = IndexMap::new();
    for t in tensors {
        let Some((name, part, embedding)) = parse_name(&t.name) else {
            if t.name.ends_with(".base_layer.weight") {
                continue; // the base's own weight
            }
            return Err(whole_weight(&t.name));
        };
        let entry = found.entry(name).or_insert((None, None, embedding));
        let place = match part {
            Part::A => &mut entry.0,
            Part::B => &mut entry.1,
        };
        if place.replace(t).is_some() {
            return Err(Error::malformed(format!("tensor {:?} appears under two names", t.name)));
        }
    }
    if found.is_empty() {
        return Err(Error::malformed("holds no LoRA matrices"));
    }
    let pair = |(name, (a, b, embedding)): (String, Found<'_>)| {
        let context = |e: Error| e.context(format!("{name:?}"));
        let (Some(a), Some(b)) = (a, b) else {
            let lacking = if a.is_some() { "B" } else { "A" };
            return Err(context(Error::malformed(format!("lora_{lacking} is missing"))));
        };
        let ([rank, inputs], [outputs, rank_b]) = (&a.shape[..], &b.shape[..]) else {
            return Err(context(Error::unsupported(format!(
                "A of {:?} and B of {:?} are no matrices; only linear layers and embeddings are known",
                a.shape, b.shape
            ))));
        };
        if rank != rank_b || [rank, inputs, outputs].contains(&&0) {
            let why = format!("A of {:?} and B of {:?} do not fit each other", a.shape, b.shape);
            return Err(context(Error::malformed(why).hint("(r, inputs) and (outputs, r) were expected")));
        }
        let module = name.trim_end_matches(".weight");
        let r = config.number("r", &ranks, module).map_err(context)?;
        if r != *rank as f64 {
            let why = format!("its rank is {rank}, {CONFIG} says {r}");
            return Err(context(
                Error::malformed(why).hint("config and weights are not of the same adapter"),
            ));
        }
        let alpha = config.number("lora_alpha", &alphas, module).map_err(context)?;
        let scaling = if config.is_set("use_rslora") { alpha / r.sqrt() } else { alpha / r };
        let (a, b, rank) = (a.clone(), b.clone(), *rank);
        Ok(Pair { name, a, b, embedding, rank, scaling })
    };
    found.into_iter().map(pair).collect()
}

/// What a tensor that is no factor means.
fn whole_weight(name: &str) -> Error {
    if name.contains("lora_magnitude_vector") {
        return Error::unsupported(format!("tensor {name:?}: DoRA also scales each row by a learned length"))
            .hint("merge it into its base with PEFT (merge_and_unload), and convert the result");
    }
    if name.ends_with(".bias") {
        return Error::unsupported(format!("tensor {name:?}: a trained bias is no product of two matrices"))
            .hint("merge it into its base with PEFT (merge_and_unload), and convert the result");
    }
    Error::unsupported(format!(
        "tensor {name:?} is a whole weight (modules_to_save), which GGUF adapters cannot hold"
    ))
    .hint("merge it into its base with PEFT (merge_and_unload), and convert the result")
}
