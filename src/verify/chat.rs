//! Whether the file's chat templates render.

use super::Outcome;
use crate::container::gguf::{Metadata, Value};
use crate::eval::chat::{Allowance, Conversation, Message, TemplateTokens, render_within};

const TEMPLATE: &str = "tokenizer.chat_template";

/// Renders every template of the file with a short conversation; `None` where there is none. One that
/// does not render may want other messages, or tools: that is said, and no fault of the file.
pub(super) fn check(metadata: &Metadata) -> Option<(Outcome, String)> {
    let templates: Vec<(&str, &str)> = metadata
        .iter()
        .filter_map(|(key, value)| match (key.strip_prefix(TEMPLATE)?, value.as_str()?) {
            ("", text) => Some(("default", text)),
            (name, text) => Some((name.strip_prefix('.')?, text)),
        })
        .collect();
    if templates.is_empty() {
        return None;
    }
    let token = |role: &str| {
        let id = metadata.get(&format!("tokenizer.ggml.{role}_token_id")).and_then(Value::as_u64)?;
        match metadata.get("tokenizer.ggml.tokens")? {
            Value::Array(tokens) => Some(tokens.get(usize::try_from(id).ok()?)?.as_str()?.to_string()),
            _ => None,
        }
    };
    let tokens =
        TemplateTokens { bos: token("bos").unwrap_or_default(), eos: token("eos").unwrap_or_default() };
    let conversation = Conversation::new(&[Message::new("user", "What is 2 + 2?")]);
    // All together: a file may have many.
    let allowance = Allowance::chat();
    let mut outcome = Outcome::Passed;
    let mut said = Vec::new();
    for (name, text) in templates {
        match render_within(text, &conversation, &tokens, 0, &allowance) {
            Ok(rendered) => said.push(format!("{name}: {} bytes for a question", rendered.len())),
            Err(e) => {
                outcome = Outcome::Skipped;
                said.push(format!("{name}: {e}"));
            }
        }
    }
    Some((outcome, said.join("; ")))
}
