//! Chat templates: from messages to the text that a model was trained on.
//!
//! A template is a program that comes with the model, written for Jinja as transformers sets it up.
//! It runs without files, network or clock other than the time it is given, and within bounds: its
//! steps (fuel), its time, the size and depth of its values, and its output. minijinja runs it; the
//! operations in which Python differs, and those that make values, are ours (`sandbox.rs`).

mod bounds;
mod clock;
mod python;
mod sandbox;

use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use super::engine::Engine;
use crate::error::{Error, Result};

/// One message of a conversation.
#[derive(Clone, Debug)]
pub struct Message {
    /// `system`, `user`, `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

/// What a template is given.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// A list of messages, as transformers takes them: objects with `role`, `content` (a text or a
    /// list of parts), `tool_calls` and what else the model knows.
    pub messages: Json,
    /// Tools in the form of JSON schemas, or null.
    pub tools: Json,
    /// Whether the text ends where the assistant begins.
    pub add_generation_prompt: bool,
    /// Other variables of the template, such as `enable_thinking`.
    pub extra: Map<String, Json>,
}

impl Conversation {
    /// These messages, up to where the assistant begins.
    pub fn new(messages: &[Message]) -> Self {
        let messages = messages.iter().map(|m| json!({"role": m.role, "content": m.content})).collect();
        Self { messages, tools: Json::Null, add_generation_prompt: true, extra: Map::new() }
    }
}

/// The special tokens that a template may name; empty where the vocabulary has none.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct TemplateTokens {
    pub bos: String,
    pub eos: String,
}

impl TemplateTokens {
    /// Those of a model's vocabulary.
    pub fn of(model: &dyn Engine) -> Self {
        let delimiters = model.delimiters();
        let name = |id: Option<i32>| id.and_then(|id| model.token_text(id)).unwrap_or_default();
        Self { bos: name(delimiters.bos), eos: name(delimiters.eos) }
    }
}

/// What renderings may take together: time, and values made and walked through.
pub struct Allowance(Arc<bounds::Meter>);

impl Allowance {
    /// For a chat.
    pub fn chat() -> Self {
        Self(bounds::Meter::new(bounds::CHAT))
    }

    /// For short samples with all templates of a file.
    pub fn samples() -> Self {
        Self(bounds::Meter::new(bounds::SAMPLES))
    }
}

/// Renders `template` as transformers' `apply_chat_template` does. `now` is the time in seconds since
/// 1970, in UTC, for templates that print the date.
///
/// # Errors
/// `Unsupported` when the template is faulty, refuses the messages (`raise_exception`), or wants
/// more than a template may take.
pub fn render(
    template: &str,
    conversation: &Conversation,
    tokens: &TemplateTokens,
    now: i64,
) -> Result<String> {
    render_within(template, conversation, tokens, now, &Allowance::chat())
}

/// [`render`], with what is left of an allowance.
///
/// # Errors
/// As [`render`].
pub fn render_within(
    template: &str,
    conversation: &Conversation,
    tokens: &TemplateTokens,
    now: i64,
    allowance: &Allowance,
) -> Result<String> {
    let mut variables = conversation.extra.clone();
    for (name, value) in [
        ("messages", conversation.messages.clone()),
        ("tools", conversation.tools.clone()),
        ("documents", Json::Null),
        ("add_generation_prompt", conversation.add_generation_prompt.into()),
        ("bos_token", tokens.bos.as_str().into()),
        ("eos_token", tokens.eos.as_str().into()),
    ] {
        variables.insert(name.into(), value);
    }
    // The library's frames are deep; a thread of its own has room for them, and keeps its panics.
    let run = || sandbox::render(template, &variables, now, &allowance.0);
    let rendered = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, run);
        match thread.map(|t| t.join()) {
            Ok(Ok(rendered)) => rendered,
            _ => Err("the renderer broke down".into()),
        }
    });
    rendered.map_err(|why| {
        Error::unsupported(format!("the chat template {why}"))
            .hint("write the text in the model's own format, and give it without the template")
    })
}

/// Words of the errors of templates that want more than they may take.
const BOUNDS: &[&str] = &[
    "does not end within",
    "takes too long",
    "is longer than",
    "too large",
    "too long",
    "too deep",
    "more values than it may",
    "more operators than",
    "more branches than",
    "writes more than",
    "for too much",
    "multiplies a constant",
    "the renderer broke down",
];

/// Whether [`render`] refused a template because it takes too much, and not because of what it says.
pub fn exceeds_bounds(error: &Error) -> bool {
    let text = error.to_string();
    // What a template itself raises is its own words.
    !text.contains("refuses the messages") && BOUNDS.iter().any(|words| text.contains(words))
}

/// Macros may nest 500 deep.
const STACK_BYTES: usize = 64 << 20;
