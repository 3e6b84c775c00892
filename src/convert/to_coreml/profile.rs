//! The two profiles: which functions a package has, and how its model is described.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use crate::arch::Model as ArchModel;
use crate::container::coreml::mil::Program;
use crate::container::coreml::model::{
    ArrayDataType, FeatureDescription, Flexibility, FunctionDescription, Metadata, ModelDescription,
    SizeRange,
};
use crate::container::coreml::{DataType, Model, Only};
use crate::mil::{Built, Dim, Feature, Layout};

/// What a package is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// GPUs of Macs: lengths vary, attention is one operation, and the interface is that of swift-transformers.
    Gpu,
    /// The Neural Engine of iPhones: all shapes are fixed, channels come first, and a function for prompts shares
    /// its weights with one for single tokens.
    Ane,
}

/// Specification of iOS 18 and macOS 15: the first with states, and with codes below a byte.
const SPECIFICATION: i32 = 9;
/// Tokens of a prompt that the Neural Engine takes at once.
const PREFILL: u64 = 64;
/// Most rows of the vocabulary in one product of the Neural Engine.
const ROWS: u64 = 16384;
/// Parts of the vocabulary begin at multiples of it, so that groups of rows fit.
const STEP: u64 = 8;

impl Profile {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Ane => "ane",
        }
    }

    /// The functions, and how activations lie in each. The first counts where none is asked for.
    pub fn functions(self, context: u64) -> Vec<(&'static str, Layout)> {
        let channels = |tokens: u64| Layout::Channels { tokens: tokens.min(context) };
        match self {
            Self::Gpu => vec![("main", Layout::Rows)],
            Self::Ane => vec![("infer", channels(1)), ("prefill", channels(PREFILL))],
        }
    }

    /// Most tokens in one call.
    pub fn tokens(self, context: u64) -> u64 {
        match self {
            Self::Gpu => context,
            Self::Ane => PREFILL.min(context),
        }
    }

    /// The rows of the head that are one product each.
    pub fn vocabulary(self, rows: u64) -> Vec<std::ops::Range<u64>> {
        let parts = match self {
            Self::Gpu => 1,
            Self::Ane => rows.div_ceil(ROWS).max(1),
        };
        let each = rows.div_ceil(parts).checked_next_multiple_of(STEP).unwrap_or(rows).max(1);
        (0..parts)
            .map(|j| (j * each).min(rows)..((j + 1) * each).min(rows))
            .filter(|r| !r.is_empty())
            .collect()
    }
}

/// The model of a package: its functions by name, the first of which counts where none is asked for. Lengths that
/// are not fixed go up to `context`.
pub fn model(functions: Vec<(&'static str, Built)>, metadata: Metadata, context: u64) -> Model {
    let mut program = Program { version: 1, ..Program::default() };
    let mut description = ModelDescription { metadata, ..ModelDescription::default() };
    let alone = functions.len() == 1;
    for (name, built) in functions {
        let input = built.inputs.iter().map(|f| described(f, context)).collect();
        let output = built.outputs.iter().map(result).collect();
        let state = built.states.iter().map(|f| FeatureDescription::state(&f.name, &sizes(f, 1))).collect();
        program.functions.insert(name.to_string(), built.function);
        if alone {
            (description.input, description.output, description.state) = (input, output, state);
            continue;
        }
        if description.functions.is_empty() {
            description.default_function_name = name.to_string();
        }
        description.functions.push(FunctionDescription { name: name.to_string(), input, output, state });
    }
    Model { specification_version: SPECIFICATION, description, program, ..Model::default() }
}

/// An input: its shape, and, where lengths vary, the range of each dimension.
fn described(feature: &Feature, context: u64) -> FeatureDescription {
    let most = context as i64; // far below 2^63
    let flexibility = match is_fixed(feature) {
        true => Flexibility::None,
        false => {
            let range = |dim: &Dim| match dim {
                Dim::Known(n) => SizeRange { lower_bound: *n, upper_bound: *n as i64 },
                Dim::Any(_) => SizeRange { lower_bound: 1, upper_bound: most },
            };
            Flexibility::Range(Only(feature.ty.dims.iter().map(range).collect()))
        }
    };
    FeatureDescription::array(&feature.name, array_type(feature), &sizes(feature, 1), flexibility)
}

/// An output: its shape, where that is fixed.
fn result(feature: &Feature) -> FeatureDescription {
    let shape = if is_fixed(feature) { sizes(feature, 1) } else { Vec::new() };
    FeatureDescription::array(&feature.name, array_type(feature), &shape, Flexibility::None)
}

fn is_fixed(feature: &Feature) -> bool {
    feature.ty.dims.iter().all(|dim| matches!(dim, Dim::Known(_)))
}

/// The shape, with `any` for what is not known.
fn sizes(feature: &Feature, any: i64) -> Vec<i64> {
    let size = |dim: &Dim| match dim {
        Dim::Known(n) => i64::try_from(*n).unwrap_or(i64::MAX),
        Dim::Any(_) => any,
    };
    feature.ty.dims.iter().map(size).collect()
}

fn array_type(feature: &Feature) -> ArrayDataType {
    match feature.ty.dtype {
        DataType::Int32 => ArrayDataType::Int32,
        _ => ArrayDataType::Float16,
    }
}

/// What a package says of itself. swift-transformers fetches the tokenizer of the repository it names.
pub fn metadata(
    source: &ArchModel,
    id: Option<&str>,
    profile: Profile,
    context: u64,
    form: &str,
) -> Metadata {
    let config = source.config();
    let stated =
        config.get("_name_or_path").and_then(Json::as_str).map(public).filter(|name| !name.is_empty());
    let architecture = source.class_name().to_string();
    let mut user_defined = BTreeMap::from([
        ("co.huggingface.exporters.architecture".to_string(), architecture),
        ("com.qconv.context".to_string(), context.to_string()),
        ("com.qconv.profile".to_string(), profile.name().to_string()),
        ("com.qconv.version".to_string(), env!("CARGO_PKG_VERSION").to_string()),
        ("com.qconv.weights".to_string(), form.to_string()),
    ]);
    if let Some(id) = id.or(stated) {
        user_defined.insert("co.huggingface.exporters.name".to_string(), id.to_string());
    }
    let short_description = format!("{}, {form}, context of {context}", source.class_name());
    Metadata { short_description, user_defined, ..Metadata::default() }
}

/// A name that tells nothing of somebody's directories: `OWNER/NAME` as it is, of a path what it leads to.
fn public(name: &str) -> &str {
    let is_path =
        name.starts_with(['/', '.', '~']) || name.contains(['\\', ':']) || name.matches('/').count() > 1;
    match is_path {
        true => name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or_default(),
        false => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_private() {
        for (stated, told) in [
            ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
            ("gpt2", "gpt2"),
            ("/home/someone/secret/llama/", "llama"),
            ("./out", "out"),
            ("../runs/7/llama", "llama"),
            ("~/llama", "llama"),
            ("runs/seven/llama", "llama"),
            ("C:\\Users\\someone\\llama", "llama"),
            ("/", ""),
        ] {
            assert_eq!(public(stated), told, "{stated}");
        }
    }

    #[test]
    fn vocabularies_are_parted() {
        assert_eq!(Profile::Gpu.vocabulary(151_936), vec![0..151_936]);
        assert_eq!(Profile::Ane.vocabulary(16384), vec![0..16384]);
        assert_eq!(Profile::Ane.vocabulary(49152), [0..16384, 16384..32768, 32768..49152]);
        for rows in [1, 7, 16385, 32000, 50257, 262_144, 262_145] {
            let parts = Profile::Ane.vocabulary(rows);
            let ends: Vec<u64> = parts.iter().map(|r| r.end).collect();
            let starts: Vec<u64> = parts.iter().map(|r| r.start).collect();
            assert_eq!((starts[0], *ends.last().unwrap()), (0, rows));
            assert_eq!(starts[1..], ends[..ends.len() - 1], "{rows}");
            assert!(
                starts.iter().all(|s| s.is_multiple_of(8)) && parts.iter().all(|r| r.end - r.start <= ROWS)
            );
        }
    }
}
