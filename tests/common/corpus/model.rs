//! GGUF files that can be looked at, and are no models, or odd ones: architecture, hyper-parameters, splits,
//! vocabulary, templates.

use qconv::ErrorKind::Malformed;

use super::Cases;
use crate::raw::{Raw, kind};

/// Without any of the entries of the valid file.
fn bare() -> Raw {
    Raw { entries: Vec::new(), ..Raw::valid() }
}

/// The valid file with another `general.architecture`, or none.
fn with_architecture(entry: impl FnOnce(Raw) -> Raw) -> Raw {
    let raw = entry(bare());
    Raw { entries: [raw.entries, Raw::valid().entries[1..].to_vec()].concat(), ..Raw::valid() }
}

/// With this vocabulary.
fn tokens(tokens: &[&[u8]]) -> Raw {
    Raw::valid().text("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", tokens)
}

fn types(raw: Raw, types: &[i32]) -> Raw {
    let payload: Vec<u8> = types.iter().flat_map(|t| t.to_le_bytes()).collect();
    raw.array("tokenizer.ggml.token_type", kind::I32, types.len() as u64, payload)
}

fn template(text: &str) -> Raw {
    Raw::valid().text("tokenizer.chat_template", text)
}

fn split(no: u16, count: u16, tensors: i32) -> Raw {
    Raw::valid()
        .entry("split.no", kind::U16, no.to_le_bytes())
        .entry("split.count", kind::U16, count.to_le_bytes())
        .entry("split.tensors.count", kind::I32, tensors.to_le_bytes())
}

pub fn models(t: &mut Cases) {
    hyperparameters(t);
    splits(t);
    vocabularies(t);
    // CVE-2024-34359, CVE-2026-5760: text, to whoever does not render it.
    t.read("tpl_ssti", template("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__ }}"));
    let bomb = "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}";
    t.read("tpl_loop", template(bomb));
}

fn hyperparameters(t: &mut Cases) {
    let none = with_architecture(|raw| raw);
    t.read("arch_missing", none).but(Malformed, "it has no general.architecture").policy("no `general.archi");
    let array = with_architecture(|raw| raw.strings("general.architecture", &[b"llama"]));
    t.read("arch_array", array).but(Malformed, "general.architecture is [\"llama\"]");
    let empty = with_architecture(|raw| raw.text("general.architecture", ""));
    t.read("arch_empty", empty).but(Malformed, "general.architecture is \"\"");
    for (name, arch) in [("unknown", "zzz9"), ("format", "%s%n{0}"), ("escape", "\u{1b}[2J\u{9b}31m")] {
        let raw = bare().text("general.architecture", arch).u32(&format!("{arch}.block_count"), 1);
        t.read(&format!("arch_{name}"), raw).policy("an architecture that is not known");
    }
    let llama = || bare().text("general.architecture", "llama");
    let block = || llama().u32("llama.block_count", 1);
    let text = llama().text("llama.block_count", "1");
    t.read("block_count_str", text).but(Malformed, "llama.block_count is \"1\"");
    for (name, n) in [("513", 513), ("huge", u32::MAX)] {
        let raw = llama().u32("llama.block_count", n);
        let says = format!("llama.block_count is {n}; the file has 3 tensors");
        t.read(&format!("block_count_{name}"), raw).but(Malformed, &says).policy("`block_count` above");
    }
    let zero = block().u32("llama.attention.head_count", 0);
    t.read("head_count_0", zero).policy("head count 0");
    let text = block().text("llama.attention.head_count", "2");
    t.read("head_count_str", text).but(Malformed, "llama.attention.head_count is \"2\"");
    let none = block().u32("llama.embedding_length", 0);
    t.read("width_0", none).but(Malformed, "llama.embedding_length is 0");
    let nan = Raw::valid().entry("llama.rope.freq_base", kind::F32, f32::NAN.to_le_bytes());
    t.read("rope_nan", nan)
        .but(Malformed, "llama.rope.freq_base is not a number")
        .policy("a hyper-parameter that is NaN");
    t.read("file_type_str", Raw::valid().text("general.file_type", "Q4")).policy("`general.file_type`");
    t.read("quant_version_0", Raw::valid().u32("general.quantization_version", 0))
        .policy("`general.quantization_version`");
}

fn splits(t: &mut Cases) {
    let alone = "is shard 1 of 2, but its name does not say so";
    t.refuse("split_count2_alone", split(0, 2, 6), Malformed, alone);
    t.refuse("split_no_ge_count", split(5, 2, 6), Malformed, "split.no is 5, of 2 shards");
    t.refuse("split_no1_first", split(1, 2, 6), Malformed, "is shard 2 of 2, but its name does not say so");
    t.refuse("split_count_65535", split(0, 65535, 3), Malformed, "is shard 1 of 65535, but its name");
    t.read("split_count_0", split(0, 0, 3)).policy("`split.count` 0");
    t.read("split_count_1", split(0, 1, 3)).policy("`split.count` 0");
    t.refuse("split_tensors_neg", split(0, 1, -1), Malformed, "split.tensors.count is -1, not a count");
    let text = Raw::valid().text("split.no", "0").u32("split.count", 2).u32("split.tensors.count", 3);
    t.refuse("split_no_str", text, Malformed, "split.no is \"0\", not a count");
    let half = Raw::valid().u32("split.count", 2);
    t.refuse("split_count_only", half, Malformed, "split.no or split.tensors.count is missing");
}

fn vocabularies(t: &mut Cases) {
    let three: &[&[u8]] = &[b"<s>", b"</s>", b"a"];
    let short = types(tokens(three), &[3]);
    t.read("tok_types_short", short)
        .but(Malformed, "tokenizer.ggml.token_type has 1 entries for 3 tokens")
        .policy("tokens, scores, types, merges");
    let numbers = Raw::valid().array("tokenizer.ggml.tokens", kind::U32, 3, [0; 12]);
    t.read("tok_tokens_u32", numbers)
        .but(Malformed, "tokenizer.ggml.tokens is an array of UINT32, not of STRING");
    let scalar = Raw::valid().text("tokenizer.ggml.tokens", "a");
    t.read("tok_tokens_scalar", scalar).but(Malformed, "tokenizer.ggml.tokens is STRING, not an array");
    let line = "tokens: none, twice the same";
    t.read("tok_empty", tokens(&[])).policy(line);
    t.read("tok_dup", tokens(&[b"a", b"a"])).policy(line);
    t.read("tok_type_99", types(tokens(three), &[99, -1, 1])).policy(line);
    t.read("tok_long_token", tokens(&[&[b'x'; 70_000]])).policy(line); // CVE-2025-49847
    t.read("tok_nonutf8", tokens(&[b"\xff", b"\xc3"]));
    // llama.cpp #26511 wrote where such a token says.
    let bytes = Raw::valid().text("tokenizer.ggml.model", "plamo2");
    let bytes = bytes.strings("tokenizer.ggml.tokens", &[b"<0x-1>", b"<0xZZ>"]);
    t.read("tok_byte_neg", types(bytes, &[6, 6])).policy(line);
    let map = Raw::valid().text("tokenizer.ggml.model", "t5").strings("tokenizer.ggml.tokens", three);
    let map = map.array("tokenizer.ggml.precompiled_charsmap", kind::U8, 8, [0xff; 8]);
    t.read("tok_charsmap_bad", map).policy("`precompiled_charsmap`");
}
