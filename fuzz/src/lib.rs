//! What is fuzzed: a function for each target, which takes any bytes, and says whether they were what it reads.
//!
//! `tests/bugs.rs` of qconv includes this file too, and replays seeds and former findings without libFuzzer. A target
//! fails by a panic, an assertion, or by too much memory or time. Errors are what it expects of most inputs.
#![allow(dead_code)] // by whom it is included

mod blocks;
mod containers;
mod coreml;
mod input;
mod packed;
mod qpack;
mod scratch;
mod words;

#[path = "../../tests/common/torch.rs"]
pub mod torch;

/// A target.
pub struct Target {
    /// Its name: of its file in `fuzz_targets`, and of the directory of its seeds in `corpus`.
    pub name: &'static str,
    /// What it does with an input. It gives whether the input was accepted, at least in part.
    pub run: fn(&[u8]) -> bool,
    /// Where other seeds are, from the repository's root.
    pub beside: &'static str,
}

const fn target(name: &'static str, run: fn(&[u8]) -> bool, beside: &'static str) -> Target {
    Target { name, run, beside }
}

/// All of them.
pub const TARGETS: &[Target] = &[
    target("architecture", words::architecture, "formats/arch"),
    target("blocks", blocks::decode, ""),
    target("blocks_encode", blocks::encode, ""),
    target("chat", words::chat, "fixtures/chat/templates"),
    target("config", words::config, ""),
    target("coreml_blob", coreml::blob, ""),
    target("coreml_model", coreml::model, ""),
    target("coreml_package", coreml::package, ""),
    target("expression", words::expression, ""),
    target("gguf", containers::gguf, ""),
    target("gguf_model", containers::gguf_model, ""),
    target("gguf_round_trip", containers::gguf_round_trip, ""),
    target("imatrix", containers::imatrix, ""),
    target("index", containers::index, ""),
    target("inspect", containers::inspect, ""),
    target("journal", words::journal, ""),
    target("moments", containers::moments, ""),
    target("packed", packed::made, ""),
    target("packed_directory", packed::directory, ""),
    target("pickle", containers::pickle, ""),
    target("pytorch", containers::pytorch, "fixtures/pytorch"),
    target("qpack", qpack::file, ""),
    target("qpack_manifest", qpack::manifest, ""),
    target("qpack_planes", qpack::planes, ""),
    target("recipe", words::recipe, "formats/recipe"),
    target("safetensors", containers::safetensors, ""),
    target("scan", containers::scan, "fuzz/corpus/inspect"),
    target("tokenizer_json", words::tokenizer_json, ""),
    target("tokenizer_model", words::tokenizer_model, ""),
];

/// Runs the target of this name; `None` where there is none.
pub fn run(name: &str, data: &[u8]) -> Option<bool> {
    TARGETS.iter().find(|t| t.name == name).map(|t| (t.run)(data))
}
