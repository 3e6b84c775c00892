//! The options of llama-quantize, which `quantize` and `hf-to-gguf` share.

use std::path::PathBuf;

use qconv::block::gram::PANEL;
use qconv::container::side::read_text;
use qconv::convert::{
    ImatrixChoice, MethodChoice, Overrides, Quantizer, Recipe, Sharding, parse_method, parse_tensor_method,
    parse_tensor_type, strip_awq,
};
use qconv::error::{Error, Result};
use qconv::limits::Limits;
use qconv::quantize::Tuning;
use qconv::quantize::ternary::Stage;
use qconv::tensor::DType;

use super::common::parse_size;

/// What a quantizer is told beyond the file type.
#[derive(clap::Args, Debug, Default, PartialEq)]
#[command(next_help_heading = "Quantizing")]
pub struct QuantizerArgs {
    /// Weigh errors by this importance matrix (GGUF, or the older .dat)
    #[arg(long, value_name = "FILE")]
    pub imatrix: Option<PathBuf>,

    /// How weights become codes: rtn (each block by itself), imatrix (weighed by --imatrix, or by the
    /// diagonal of --moments), or one that needs second moments: gptq, trainable, adaround, ternary. With awq
    /// before it, such as awq+gptq, scales move between tensors first; awq alone is awq+imatrix
    #[arg(long, value_name = "METHOD", value_parser = parse_method_arg)]
    pub method: Option<String>,

    /// Method for the tensors whose name matches, such as ffn_down=gptq; the first that matches counts
    #[arg(long, value_name = "REGEX=METHOD", value_parser = parse_tensor_method_arg)]
    pub tensor_method: Vec<String>,

    /// Second moments of the inputs, as qconv calibrate writes them
    #[arg(long, value_name = "FILE")]
    pub moments: Option<PathBuf>,

    /// Damping: what is added to the diagonal of the second moments, in parts of its mean (0.01 unless given);
    /// it grows where that does not suffice, which the summary then says
    #[arg(long, value_name = "PART", value_parser = parse_damp)]
    pub damp_percent: Option<f64>,

    /// Round columns in the order of their mean squares, the greatest first, as is done unless false is
    /// given: with static grids that costs nothing, and loses least
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub desc_act: Option<bool>,

    /// Find scales before the first column is rounded: always true, since blocks lie where they lie
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = parse_static_groups)]
    pub static_groups: Option<bool>,

    /// Let each layer see what the rounded ones before it give: always false, in one run
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = parse_true_sequential)]
    pub true_sequential: Option<bool>,

    /// Columns whose errors are passed on together: always 32. The result does not depend on it
    #[arg(long, value_name = "COLUMNS", value_parser = parse_block_size)]
    pub block_size: Option<usize>,

    /// Rounds of trainable and ternary, steps of adaround; at most
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub iters: Option<usize>,

    /// Size of a step of adaround (trainable and ternary compute the best step)
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub lr: Option<f32>,

    /// Columns that each step of adaround moves, in turn; all unless given. Second moments stand for all
    /// tokens, which therefore come in no batches
    #[arg(long, value_name = "COLUMNS", value_parser = parse_count)]
    pub batch: Option<usize>,

    /// Where ternary stops: absmean, threshold, importance, feedback, refit or descent
    #[arg(long, value_name = "STAGE", value_parser = Stage::parse)]
    pub ternary_stage: Option<Stage>,

    /// Where a method needs second moments and --moments is not given, they are collected first: over this text
    /// or file of conversations (.jsonl; see calibrate), or a part of a novel (builtin); can be repeated
    #[arg(long, value_name = "FILE|builtin", conflicts_with = "moments")]
    pub calibration: Vec<PathBuf>,

    /// How much of that text is read, in windows; 128 by default
    #[arg(long, value_name = "N", conflicts_with = "moments")]
    pub samples: Option<usize>,

    /// Tokens of such a window; 512 by default
    #[arg(long, value_name = "TOKENS", conflicts_with = "moments")]
    pub sample_length: Option<usize>,

    /// Of the importance matrix use only entries whose name contains this
    #[arg(long, value_name = "NAME", requires = "imatrix", conflicts_with = "exclude_weights")]
    pub include_weights: Vec<String>,

    /// Of the importance matrix leave out entries whose name contains this
    #[arg(long, value_name = "NAME", requires = "imatrix")]
    pub exclude_weights: Vec<String>,

    /// Type of the tensors whose name matches, such as attn_v=q8_0; the first that matches counts
    #[arg(long, value_name = "REGEX=TYPE", value_parser = parse_tensor_type_arg)]
    pub tensor_type: Vec<String>,

    /// Such entries, one a line
    #[arg(long, value_name = "FILE")]
    pub tensor_type_file: Option<PathBuf>,

    /// Type of the token embeddings
    #[arg(long, value_name = "TYPE", value_parser = parse_dtype)]
    pub token_embedding_type: Option<DType>,

    /// Type of the output tensor
    #[arg(long, value_name = "TYPE", value_parser = parse_dtype)]
    pub output_tensor_type: Option<DType>,

    /// Give all matrices the same type, by no rules
    #[arg(long)]
    pub pure: bool,

    /// Keep the output tensor as it is
    #[arg(long)]
    pub leave_output_tensor: bool,

    /// Layers to leave out
    #[arg(long, value_name = "LAYER,...", value_delimiter = ',')]
    pub prune_layers: Vec<u64>,

    /// Set a metadata entry, as llama-quantize does; TYPE is int, float, bool or str
    #[arg(long, value_name = "KEY=TYPE:VALUE")]
    pub override_kv: Vec<String>,
}

/// How the output is divided into files.
#[derive(clap::Args, Debug)]
pub struct ShardArgs {
    /// Divide the output into files of at most this size, such as 2G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub split_max_size: Option<u64>,

    /// Divide the output into files of at most this many tensors
    #[arg(long, value_name = "N")]
    pub split_max_tensors: Option<u64>,
}

impl ShardArgs {
    pub fn sharding(&self) -> Result<Sharding> {
        Sharding::bounded(self.split_max_size, self.split_max_tensors)
    }
}

/// Checks an entry of `--tensor-type`, which stays the text it is.
fn parse_tensor_type_arg(text: &str) -> std::result::Result<String, String> {
    parse_tensor_type(text).map(|_| text.to_string()).map_err(|e| e.to_string())
}

fn parse_method_arg(name: &str) -> std::result::Result<String, String> {
    parse_method(name).map(|_| name.to_string()).map_err(|e| e.to_string())
}

fn parse_tensor_method_arg(text: &str) -> std::result::Result<String, String> {
    parse_tensor_method(text).map(|_| text.to_string()).map_err(|e| e.to_string())
}

pub fn parse_damp(text: &str) -> std::result::Result<f64, String> {
    let damp = text.parse().ok().filter(|d: &f64| (0.0..=1.0).contains(d));
    damp.ok_or_else(|| "a number from 0 to 1 is needed: 0.01 is one percent".into())
}

fn parse_bool(text: &str) -> std::result::Result<bool, String> {
    text.parse().map_err(|_| "true or false is needed".into())
}

fn parse_static_groups(text: &str) -> std::result::Result<bool, String> {
    match parse_bool(text)? {
        true => Ok(true),
        false => {
            Err("ggml's blocks are neighbouring columns with scales of their own: grids that are found \
                      while columns are rounded would have to follow the columns' order"
                .into())
        }
    }
}

fn parse_true_sequential(text: &str) -> std::result::Result<bool, String> {
    match parse_bool(text)? {
        false => Ok(false),
        true => Err(
            "second moments are those of the model as it was when it was calibrated: run qconv calibrate \
                     on the quantized file, and quantize the original again with these"
                .into(),
        ),
    }
}

fn parse_block_size(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(PANEL) => Ok(PANEL),
        _ => Err(format!("errors are passed on by {PANEL} columns; codes are the same with any number")),
    }
}

pub fn parse_count(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "a number from 1 on is needed".into())
}

fn parse_rate(text: &str) -> std::result::Result<f32, String> {
    let rate = text.parse().ok().filter(|r: &f32| r.is_finite() && *r > 0.0);
    rate.ok_or_else(|| "a positive number is needed".into())
}

fn parse_dtype(name: &str) -> std::result::Result<DType, String> {
    // The type of an entry for any tensor.
    parse_tensor_type(&format!(".={name}"))
        .map(|(_, dtype)| dtype)
        .map_err(|_| format!("{name:?} is no type for weights"))
}

impl QuantizerArgs {
    /// Whether anything is asked for that llama.cpp's converter has no word for.
    pub fn is_given(&self) -> bool {
        *self != Self::default()
    }

    fn tuning(&self) -> Tuning {
        Tuning {
            damp: self.damp_percent,
            desc_act: self.desc_act,
            iters: self.iters,
            lr: self.lr,
            batch: self.batch,
            ternary_stage: self.ternary_stage,
        }
    }

    /// Whether a calibration comes before what `quantizer` does.
    ///
    /// # Errors
    /// `Misuse` where one is asked for that nothing needs.
    pub fn calibrates(&self, quantizer: Option<&Quantizer>) -> Result<bool> {
        let needed = quantizer
            .is_some_and(|q| q.methods().is_some_and(|m| m.lacks_moments(q.imatrix.is_some()).is_some()));
        let asked = !self.calibration.is_empty() || self.samples.or(self.sample_length).is_some();
        match asked && !needed {
            true => {
                Err(Error::misuse("--calibration has no effect without a method that needs second moments")
                    .hint("--method gptq is one"))
            }
            false => Ok(needed),
        }
    }

    /// How that calibration is done.
    #[cfg(feature = "ggml")]
    pub fn calibration_args(&self, work: &super::common::WorkArgs) -> super::calibration::CalibrationArgs {
        let is_chats = |path: &&PathBuf| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl"));
        let files = self.calibration.iter().filter(|path| path.as_os_str() != "builtin");
        let (chats, text) = files.partition::<Vec<&PathBuf>, _>(is_chats);
        super::calibration::CalibrationArgs {
            text: text.into_iter().cloned().collect(),
            chats: chats.into_iter().cloned().collect(),
            ctx: self.sample_length.unwrap_or(512),
            chunks: Some(self.samples.unwrap_or(128)),
            from_chunk: 0,
            parse_special: false,
            threads: work.threads.and_then(|n| u32::try_from(n).ok()),
            gpu_layers: 0,
        }
    }

    fn method_choice(&self, recipe: &Recipe, is_awq: bool) -> Result<Option<MethodChoice>> {
        let by_tensor =
            self.tensor_method.iter().map(|e| parse_tensor_method(e)).collect::<Result<Vec<_>>>()?;
        let (fold, others) = match self.method.as_deref() {
            Some(name) => parse_method(name).map(|(fold, way)| (fold, Some(way)))?,
            None if is_awq => parse_method("awq").map(|(fold, way)| (fold, Some(way)))?,
            None => (None, None),
        };
        if is_awq && fold.is_none() {
            return Err(Error::misuse("the type asks for awq, and --method for something else"));
        }
        let moments = self.moments.clone();
        let choice = MethodChoice { fold, by_tensor, others, moments, ..MethodChoice::default() };
        let choice = choice.tuned(&self.tuning())?;
        if choice.is_empty() && recipe.ways().next().is_none() {
            return match &self.moments {
                None => Ok(None),
                Some(_) => Err(Error::misuse("--moments has no effect without a method")
                    .hint("--method gptq makes the most of them, --method imatrix takes their diagonal")),
            };
        }
        Ok(Some(choice))
    }

    /// For the file type of this name, which may begin with `awq_`.
    pub fn quantizer(&self, file_type: &str) -> Result<Quantizer> {
        let without = strip_awq(file_type);
        let recipe = Recipe::parse(without.unwrap_or(file_type))?;
        let mut tensor_types =
            self.tensor_type.iter().map(|e| parse_tensor_type(e)).collect::<Result<Vec<_>>>()?;
        if let Some(path) = &self.tensor_type_file {
            let text = read_text(path, Limits::default().side_file_bytes)?;
            for entry in text.split_whitespace() {
                tensor_types.push(parse_tensor_type(entry).map_err(|e| e.at(path))?);
            }
        }
        Ok(Quantizer {
            overrides: Overrides {
                tensor_types,
                token_embedding: self.token_embedding_type,
                output: self.output_tensor_type,
                pure: self.pure,
                leave_output: self.leave_output_tensor,
                ..Overrides::default()
            },
            imatrix: self.imatrix.as_ref().map(|path| ImatrixChoice {
                path: path.clone(),
                include: self.include_weights.clone(),
                exclude: self.exclude_weights.clone(),
            }),
            method: self.method_choice(recipe, without.is_some())?,
            prune_layers: self.prune_layers.iter().copied().collect(),
            override_kv: self.override_kv.clone(),
            ..Quantizer::new(recipe)
        })
    }
}

/// The names of all file types, as help shows them.
pub fn type_names() -> String {
    let all = Recipe::all().unwrap_or_default();
    all.iter().map(|r| r.name.to_lowercase()).collect::<Vec<_>>().join(", ")
}
