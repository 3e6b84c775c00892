//! Special token ids, `add_*_token` flags and chat templates, from the files of a tokenizer.

use std::path::Path;

use serde_json::Value;

use super::hf::{AddedToken, read_json, read_side_file, token_text};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// A chat template is text of at most this many bytes.
const TEMPLATE_BYTES: u64 = 8 << 20;

macro_rules! special_ids {
    ($($field:ident $hf:literal $gguf:literal,)*) => {
        /// Ids of the tokens with a role, where the model names one.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub struct SpecialIds { $(pub $field: Option<u32>,)* }

        impl SpecialIds {
            /// Role (as in Hugging Face's `ROLE_token`), GGUF key and id of every role.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, &'static str, Option<u32>)> {
                [$(($hf, concat!("tokenizer.ggml.", $gguf, "_token_id"), self.$field),)*].into_iter()
            }

            /// The same, to be changed.
            pub fn iter_mut(&mut self) -> impl Iterator<Item = (&'static str, &'static str, &mut Option<u32>)> {
                [$(($hf, concat!("tokenizer.ggml.", $gguf, "_token_id"), &mut self.$field),)*].into_iter()
            }
        }
    };
}

special_ids! {
    bos "bos" "bos",
    eos "eos" "eos",
    unk "unk" "unknown",
    sep "sep" "seperator", // the format's spelling
    pad "pad" "padding",
    cls "cls" "cls",
    mask "mask" "mask",
    eot "eot" "eot",
    eom "eom" "eom",
}

/// What the tokenizer adds around a text; `None` where no file says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct AddTokens {
    pub bos: Option<bool>,
    pub eos: Option<bool>,
    pub sep: Option<bool>,
}

/// What [`read`] found.
#[derive(Default)]
pub struct Special {
    pub ids: SpecialIds,
    pub add: AddTokens,
    /// Name and template, `default` for the main one. Data: never rendered here.
    pub chat_templates: Vec<(String, String)>,
}

/// The role tokens' texts while the post-processor is read.
#[derive(Default)]
struct Texts {
    bos: Option<String>,
    eos: Option<String>,
    sep: Option<String>,
    cls: Option<String>,
    eot: Option<String>,
    eom: Option<String>,
}

/// Reads ids, flags and templates. `n_tokens` bounds the ids; `added` and `post_processor` come
/// from tokenizer.json where there is one.
///
/// # Errors
/// `Malformed`, `Limit` or `Io` for a chat template file that cannot be read.
pub fn read(
    source: &super::Source,
    tokenizer_config: &Value,
    added: &[AddedToken],
    post_processor: &Value,
    n_tokens: usize,
    limits: &Limits,
    notes: &mut Vec<String>,
) -> Result<Special> {
    let (dir, config) = (source.dir, source.config);
    let mut special = Special::default();
    let text = |role: &str| token_text(tokenizer_config, &format!("{role}_token"));
    let mut texts = Texts {
        bos: text("bos").or_else(|| text("cls")),
        eos: text("eos").or_else(|| text("sep")),
        sep: text("sep"),
        cls: text("cls"),
        eot: text("eot"),
        eom: text("eom"),
    };
    let one = std::slice::from_ref(post_processor);
    for processor in post_processor.get("processors").and_then(Value::as_array).map_or(one, Vec::as_slice) {
        match processor.get("type").and_then(Value::as_str) {
            Some("ByteLevel") => {
                special.add.bos.get_or_insert(false);
                special.add.eos.get_or_insert(false);
            }
            Some(name @ ("RobertaProcessing" | "BertProcessing")) => {
                // RoBERTa puts a second separator between two texts.
                let sep = name == "RobertaProcessing";
                special.add = AddTokens { bos: Some(true), eos: Some(true), sep: Some(sep) };
                let of = |key: &str| Some(processor.get(key)?.get(0)?.as_str()?.to_owned());
                texts.cls = texts.cls.take().or_else(|| of("cls"));
                texts.sep = texts.sep.take().or_else(|| of("sep"));
            }
            Some("TemplateProcessing") => template(processor, &mut texts, &mut special.add, notes),
            _ => {}
        }
    }
    for (role, flag) in
        [("bos", &mut special.add.bos), ("eos", &mut special.add.eos), ("sep", &mut special.add.sep)]
    {
        let said = tokenizer_config.get(format!("add_{role}_token")).and_then(Value::as_bool);
        if let (Some(said), Some(done)) = (said, *flag)
            && said != done
        {
            notes.push(format!(
                "tokenizer_config.json says add_{role}_token = {said}, the post-processor {done}: the latter is taken"
            ));
        }
        *flag = flag.or(said);
    }
    for (role, _, id) in special.ids.iter_mut() {
        let text = match role {
            "bos" => texts.bos.clone(),
            "eos" => texts.eos.clone(),
            "sep" => texts.sep.clone(),
            "cls" => texts.cls.clone(),
            "eot" => texts.eot.clone(),
            "eom" => texts.eom.clone(),
            _ => text(role),
        };
        let named = text.and_then(|text| added.iter().find(|t| t.content == text)).map(|t| t.id.into());
        let key = format!("{role}_token_id");
        let listed = [Some(config), config.get("text_config")].into_iter().flatten();
        let listed = listed.filter_map(|c| c.get(&key)?.as_i64());
        for candidate in named.into_iter().chain(listed) {
            match usize::try_from(candidate) {
                Ok(i) if i < n_tokens => {
                    *id = u32::try_from(i).ok();
                    break;
                }
                _ => notes.push(format!("{key} {candidate} is not one of the {n_tokens} tokens: ignored")),
            }
        }
    }
    if special.ids.cls == special.ids.bos {
        // llama.cpp begins a text with `bos`, whatever the model calls it.
        special.ids.cls = None;
    }
    special.chat_templates = chat_templates(dir, tokenizer_config, limits, notes)?;
    Ok(special)
}

/// Reads which tokens a `TemplateProcessing` puts around one text, and between two.
fn template(processor: &Value, texts: &mut Texts, add: &mut AddTokens, notes: &mut Vec<String>) {
    let entries = |key: &str| processor.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let token = |v: &Value| v.get("SpecialToken")?.get("id")?.as_str().map(str::to_owned);
    let (single, pair) = (entries("single"), entries("pair"));
    let (mut first, mut last) = (None, None);
    if let [head, .., tail] = single {
        first = token(head);
        last = token(tail);
    }
    if let Some(first) = &first {
        if Some(first) != texts.bos.as_ref() && Some(first) != texts.cls.as_ref() {
            texts.bos.get_or_insert_with(|| first.clone());
            texts.cls.get_or_insert_with(|| first.clone());
        }
        let known = Some(first) == texts.bos.as_ref() || Some(first) == texts.cls.as_ref();
        if !known {
            notes
                .push(format!("the template begins with {first:?}, which is neither BOS nor CLS: not added"));
        }
        add.bos = Some(known);
    }
    if let Some(last) = &last {
        if Some(last) != texts.eos.as_ref() {
            // The text ends in something else than EOS: what was EOS ends a turn.
            let old = texts.eos.replace(last.clone());
            match (&texts.eot, &texts.eom) {
                (None, _) => texts.eot = old,
                (_, None) => texts.eom = old,
                _ => notes.push(format!("EOS {old:?} gives way to {last:?}, which the template adds")),
            }
        }
        add.eos = Some(true);
    }
    // [first] A (sep ..) B [last]: is the middle a separator?
    let edge = |v: Option<&Value>, wanted: &Option<String>| wanted.is_some() && v.and_then(token) == *wanted;
    let mut middle = pair;
    if edge(middle.first(), &first) {
        middle = middle.get(1..).unwrap_or(&[]);
    }
    if edge(middle.last(), &last) {
        middle = middle.get(..middle.len() - 1).unwrap_or(&[]);
    }
    let sequence = |v: &Value| v.get("Sequence")?.get("id")?.as_str().map(str::to_owned);
    if let [a, between @ .., b] = middle
        && let [sep, rest @ ..] = between
        && (sequence(a).as_deref(), sequence(b).as_deref()) == (Some("A"), Some("B"))
    {
        let separates = |v: &Value| {
            let text = token(v);
            text.is_some() && (text == texts.sep || text == texts.eos)
        };
        let found = (separates(sep) && last.is_none()) || (matches!(rest, [second] if separates(second)));
        add.sep = Some(found);
        if found {
            texts.sep = texts.sep.take().or_else(|| texts.eos.clone());
        }
    }
}

/// All chat templates: files of their own come before tokenizer_config.json, as in transformers.
/// (llama.cpp's converter has it the other way round.)
fn chat_templates(
    dir: &Path,
    config: &Value,
    limits: &Limits,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, String)>> {
    let max = limits.side_file_bytes.min(TEMPLATE_BYTES);
    let mut templates = Vec::new();
    let read_text = |path: &Path| -> Result<Option<String>> {
        let Some(bytes) = read_side_file(path, max)? else { return Ok(None) };
        String::from_utf8(bytes).map(Some).map_err(|_| Error::malformed("is not UTF-8").at(path))
    };
    if let Some(text) = read_text(&dir.join("chat_template.jinja"))? {
        templates.push(("default".to_owned(), text));
    }
    let folder = dir.join("additional_chat_templates");
    let mut paths = Vec::new();
    if let Ok(entries) = std::fs::read_dir(&folder) {
        for entry in entries {
            let path = entry.map_err(|e| Error::io("read", &folder, e))?.path();
            if path.extension().is_some_and(|e| e == "jinja") {
                paths.push(path);
            }
        }
    }
    paths.sort();
    for path in paths {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(text) = read_text(&path)? {
            push_template(&name, text, &mut templates, notes);
        }
    }
    let inline = config.get("chat_template").filter(|t| !t.is_null());
    if !templates.is_empty() {
        if inline.is_some_and(|t| t.as_str().is_none_or(|t| templates.iter().all(|(_, text)| text != t))) {
            notes.push(
                "the chat template is that of chat_template.jinja; tokenizer_config.json has another".into(),
            );
        }
    } else if let Some(inline) = inline {
        add_templates(inline, &mut templates, notes);
    } else if let Some(json) = read_json::<Value>(&dir.join("chat_template.json"), max)?
        && let Some(t) = json.get("chat_template")
    {
        add_templates(t, &mut templates, notes);
    }
    Ok(templates)
}

fn add_templates(json: &Value, templates: &mut Vec<(String, String)>, notes: &mut Vec<String>) {
    match json {
        Value::String(text) => push_template("default", text.clone(), templates, notes),
        Value::Array(list) => {
            for entry in list {
                let field = |key: &str| entry.get(key).and_then(Value::as_str);
                if let (Some(name), Some(text)) = (field("name"), field("template")) {
                    push_template(name, text.to_owned(), templates, notes);
                }
            }
        }
        _ => notes.push("chat_template is neither text nor a list: ignored".into()),
    }
}

/// Template names become part of a metadata key: what is no ASCII letter or digit becomes `_`.
fn push_template(name: &str, text: String, templates: &mut Vec<(String, String)>, notes: &mut Vec<String>) {
    let key: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    if key.is_empty() || templates.iter().any(|(n, _)| *n == key) {
        notes.push(format!("chat template {name:?} has no name of its own: ignored"));
    } else {
        templates.push((key, text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn added(texts: &[&str]) -> Vec<AddedToken> {
        let one = |(i, t): (usize, &&str)| serde_json::from_value(json!({"id": i, "content": t})).unwrap();
        texts.iter().enumerate().map(one).collect()
    }

    fn run(dir: &Path, config: Value, tokenizer_config: Value, post: Value) -> (Special, Vec<String>) {
        let mut notes = Vec::new();
        let tokens = added(&["<s>", "</s>", "<|end|>", "<sep>"]);
        let source = super::super::Source { dir, config: &config, vocab_size: None, pre: None, kinds: &[] };
        let s = read(&source, &tokenizer_config, &tokens, &post, 10, &Limits::default(), &mut notes).unwrap();
        (s, notes)
    }

    #[test]
    fn ids_by_name_then_config() {
        let dir = tempfile::tempdir().unwrap();
        let (s, notes) = run(
            dir.path(),
            json!({"eos_token_id": [1, 2], "pad_token_id": 99, "text_config": {"pad_token_id": 3, "bos_token_id": 5}}),
            json!({"bos_token": "<s>", "unk_token": {"content": "</s>"}, "add_bos_token": true}),
            Value::Null,
        );
        assert_eq!((s.ids.bos, s.ids.eos, s.ids.unk, s.ids.pad), (Some(0), None, Some(1), Some(3)));
        assert_eq!(s.add, AddTokens { bos: Some(true), eos: None, sep: None });
        assert_eq!(notes.len(), 1, "{notes:?}");
    }

    #[test]
    fn template_processing() {
        let dir = tempfile::tempdir().unwrap();
        let tok = |t: &str| json!({"SpecialToken": {"id": t, "type_id": 0}});
        let seq = |t: &str| json!({"Sequence": {"id": t, "type_id": 0}});
        let post = json!({"type": "TemplateProcessing", "single": [tok("<s>"), seq("A"), tok("<|end|>")],
            "pair": [tok("<s>"), seq("A"), tok("</s>"), seq("B"), tok("<|end|>")]});
        let conf = json!({"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": false});
        let (s, _) = run(dir.path(), json!({}), conf, post);
        assert_eq!((s.add.bos, s.add.eos, s.add.sep), (Some(true), Some(true), Some(false)));
        assert_eq!((s.ids.eos, s.ids.eot), (Some(2), Some(1)));
        let post = json!({"processors": [{"type": "ByteLevel"}]});
        let (s, _) = run(dir.path(), json!({}), json!({}), post);
        assert_eq!((s.add.bos, s.add.eos, s.add.sep), (Some(false), Some(false), None));
    }

    #[test]
    fn templates_from_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        std::fs::write(path.join("chat_template.json"), r#"{"chat_template": "J"}"#).unwrap();
        let get = |conf: Value| run(path, json!({}), conf, Value::Null).0.chat_templates;
        assert_eq!(get(json!({})), [("default".into(), "J".into())]);
        std::fs::write(path.join("chat_template.jinja"), "D").unwrap();
        std::fs::create_dir(path.join("additional_chat_templates")).unwrap();
        std::fs::write(path.join("additional_chat_templates/tool-use.jinja"), "T").unwrap();
        assert_eq!(get(json!({})), [("default".into(), "D".into()), ("tool_use".into(), "T".into())]);
        let both = run(path, json!({}), json!({"chat_template": "C"}), Value::Null);
        assert_eq!(both.0.chat_templates[0], ("default".into(), "D".into()));
        assert!(both.1.iter().any(|n| n.contains("has another")), "{:?}", both.1);
        std::fs::remove_file(path.join("chat_template.jinja")).unwrap();
        std::fs::remove_dir_all(path.join("additional_chat_templates")).unwrap();
        assert_eq!(get(json!({"chat_template": "C"})), [("default".into(), "C".into())]);
    }
}
