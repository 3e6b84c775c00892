//! The text of a calibration: plain files, conversations, or a sample, as windows of tokens.
//!
//! Everything is one stream of tokens, which is cut into windows as in [`crate::eval::windows`]. A
//! plain file is tokenized whole, so that one file gives the windows of llama.cpp's imatrix tool. A
//! conversation is rendered with the model's own template, and its control tokens are read as such.
//! Conversations lie one behind another, and a window may begin within one: nothing is left out and
//! nothing is padded, so every token counts as often as every other.

use std::path::PathBuf;

use serde_json::Value as Json;

use crate::error::{Error, Result};
use crate::eval::chat::Conversation;

/// What is read where no text is given: the first part of Jane Austen's "Emma" (1815, in the public
/// domain), 200,000 bytes of English prose. It has nothing in common with
/// [`crate::eval::SAMPLE_TEXT`], which measures what came of it.
pub const SAMPLE_TEXT: &str = include_str!("../../fixtures/tiny-llama/calibration.txt");

/// How [`SAMPLE_TEXT`] is called in the outputs.
pub const SAMPLE_NAME: &str = "Emma";

/// Seconds since 1970 at which templates that print the date are rendered: 1 January 2026. Outputs do
/// not depend on the day.
#[cfg(feature = "ggml")]
const NOW: i64 = 1_767_225_600;

/// Which text, and how much of it.
#[derive(Clone, Debug)]
pub struct TextSource {
    /// Plain text, UTF-8.
    pub texts: Vec<PathBuf>,
    /// Conversations, one JSON object a line (see [`sample`]), or one JSON array of them.
    pub chats: Vec<PathBuf>,
    /// Tokens of a window.
    pub n_ctx: usize,
    /// Windows that are left out at the beginning.
    pub skip: usize,
    /// Most windows.
    pub most: Option<usize>,
    /// Whether names of control tokens in plain text are read as those tokens.
    pub parse_special: bool,
}

impl Default for TextSource {
    fn default() -> Self {
        let (texts, chats) = (Vec::new(), Vec::new());
        Self { texts, chats, n_ctx: 512, skip: 0, most: None, parse_special: false }
    }
}

/// One entry of a file of conversations.
#[derive(Clone, Debug)]
pub enum Sample {
    /// For the model's chat template.
    Chat(Conversation),
    /// As it stands.
    Text(String),
}

impl TextSource {
    /// The files, or the sample, by their names.
    pub fn names(&self) -> Vec<String> {
        let files: Vec<_> = self.texts.iter().chain(&self.chats).map(|p| p.display().to_string()).collect();
        if files.is_empty() { vec![SAMPLE_NAME.to_string()] } else { files }
    }
}

/// Reads an entry: `{"messages": [{"role", "content"}...]}` as transformers has them, with `tools`
/// where there are; `{"conversations": [{"from", "value"}...]}` as ShareGPT has them; or
/// `{"text": "..."}`.
///
/// # Errors
/// `Malformed` for anything else.
pub fn sample(entry: Json) -> Result<Sample> {
    let wrong = |what: &str| {
        Err(Error::malformed(what).hint(
            r#"an entry is {"messages": [{"role": ..., "content": ...}]}, {"conversations": [{"from": ..., "value": ...}]} or {"text": ...}"#,
        ))
    };
    let Json::Object(mut entry) = entry else { return wrong("is no JSON object") };
    if let Some(Json::String(text)) = entry.get_mut("text") {
        return Ok(Sample::Text(std::mem::take(text)));
    }
    let messages = match (entry.remove("messages"), entry.remove("conversations")) {
        (Some(Json::Array(messages)), _) => messages,
        (None, Some(Json::Array(turns))) => {
            let mut messages = Vec::with_capacity(turns.len());
            for turn in turns {
                // Some files have messages under this name.
                if turn.get("role").is_some() {
                    messages.push(turn);
                    continue;
                }
                let text = |key: &str| turn.get(key).and_then(Json::as_str);
                let (Some(from), Some(value)) = (text("from"), text("value")) else {
                    return wrong("has a turn without from and value");
                };
                let role = match from {
                    "human" | "user" => "user",
                    "gpt" | "chatgpt" | "assistant" | "model" | "bot" => "assistant",
                    other => other,
                };
                messages.push(serde_json::json!({"role": role, "content": value}));
            }
            messages
        }
        _ => return wrong("has none of messages, conversations and text"),
    };
    if messages.is_empty() {
        return wrong("has no messages");
    }
    if messages.iter().any(|m| m.get("role").and_then(Json::as_str).is_none()) {
        return wrong("has a message without a role");
    }
    let mut conversation = Conversation::new(&[]);
    conversation.messages = Json::Array(messages);
    conversation.tools = entry.remove("tools").unwrap_or(Json::Null);
    conversation.add_generation_prompt = false;
    Ok(Sample::Chat(conversation))
}

#[cfg(feature = "ggml")]
mod tokens {
    use super::*;
    use crate::container::side::read_text;
    use crate::eval::chat::{self, TemplateTokens};
    use crate::eval::generate::tokenize_prompt;
    use crate::eval::windows::Windows;
    use crate::ggml::Model;
    use crate::limits::Limits;

    impl TextSource {
        /// The windows, in the model's tokens.
        ///
        /// # Errors
        /// `Misuse` when there is not one whole window, `Malformed` for a faulty entry, `Unsupported`
        /// for conversations where the model has no chat template, or its template refuses one.
        pub fn windows(&self, model: &Model) -> Result<Windows> {
            if self.n_ctx < 4 {
                return Err(Error::misuse(format!(
                    "windows of {} tokens: at least 4 are needed",
                    self.n_ctx
                )));
            }
            // What is beyond these tokens need not be read.
            let wanted = self.most.and_then(|most| most.checked_add(self.skip)?.checked_mul(self.n_ctx));
            let wanted = wanted.unwrap_or(usize::MAX);
            let mut tokens = Vec::new();
            if self.texts.is_empty() && self.chats.is_empty() {
                tokens = model.tokenize(SAMPLE_TEXT, true, self.parse_special)?;
            }
            let max_bytes = Limits::default().side_file_bytes;
            for path in &self.texts {
                if tokens.len() < wanted {
                    let text = read_text(path, max_bytes)?;
                    let ids = model.tokenize(&text, true, self.parse_special);
                    tokens.extend(ids.map_err(|e| e.at(path))?);
                }
            }
            for path in &self.chats {
                if tokens.len() < wanted {
                    let text = read_text(path, max_bytes)?;
                    self.read_chats(model, &text, wanted, &mut tokens).map_err(|e| e.at(path))?;
                }
            }
            let found = tokens.len();
            let count = (found / self.n_ctx).saturating_sub(self.skip);
            if count == 0 {
                let skipped = match self.skip {
                    0 => String::new(),
                    n => format!(" after the first {n}"),
                };
                let message =
                    format!("the text has {found} tokens: not one window of {}{skipped}", self.n_ctx);
                return Err(Error::misuse(message).hint("give a longer text, or shorter windows with --ctx"));
            }
            let count = count.min(self.most.unwrap_or(count).max(1));
            let begin = self.skip * self.n_ctx;
            tokens.truncate(begin + count * self.n_ctx);
            tokens.drain(..begin);
            Ok(Windows { tokens, n_ctx: self.n_ctx, bos: Windows::bos_of(model) })
        }

        /// Adds the tokens of a file's entries until there are as many as wanted.
        fn read_chats(&self, model: &Model, file: &str, wanted: usize, tokens: &mut Vec<i32>) -> Result<()> {
            let template = model.chat_template();
            let names = TemplateTokens::of(model);
            for (place, entry) in entries(file)? {
                if tokens.len() >= wanted {
                    break;
                }
                let ids = entry.and_then(sample).and_then(|sample| match (sample, &template) {
                    (Sample::Text(text), _) => model.tokenize(&text, true, self.parse_special),
                    (Sample::Chat(chat), Some(template)) => {
                        tokenize_prompt(model, &chat::render(template, &chat, &names, NOW)?)
                    }
                    (Sample::Chat(_), None) => {
                        Err(Error::unsupported("the model has no chat template for conversations")
                            .hint("render them yourself, and give the text with --text and --parse-special"))
                    }
                });
                tokens.extend(ids.map_err(|e| e.context(place))?);
            }
            Ok(())
        }
    }
}

/// The entries of a file, each with its place for messages.
#[cfg(any(feature = "ggml", test))]
fn entries(file: &str) -> Result<Box<dyn Iterator<Item = (String, Result<Json>)> + '_>> {
    let file = file.trim_start_matches('\u{feff}');
    let faulty = |e: serde_json::Error| Error::malformed(format!("is no JSON: {e}"));
    if file.trim_start().starts_with('[') {
        let entries: Vec<Json> = serde_json::from_str(file).map_err(faulty)?;
        let place = |(n, entry)| (format!("entry {}", n + 1), Ok(entry));
        return Ok(Box::new(entries.into_iter().enumerate().map(place)));
    }
    let lines = file.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let entry = move |(n, line)| (format!("line {}", n + 1), serde_json::from_str(line).map_err(faulty));
    Ok(Box::new(lines.map(entry)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_as_people_have_them() {
        let file = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}

{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 5}
{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
{"text": "a"}"#;
        let lines: Vec<_> = entries(file).unwrap().collect();
        assert_eq!(
            lines.iter().map(|(place, _)| place.as_str()).collect::<Vec<_>>(),
            ["line 1", "line 3", "line 4", "line 5"]
        );
        let expected = serde_json::json!([
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        ]);
        for (place, entry) in lines {
            match sample(entry.unwrap()).unwrap() {
                Sample::Chat(chat) => {
                    assert_eq!(chat.messages, expected, "{place}");
                    assert!(!chat.add_generation_prompt);
                }
                Sample::Text(text) => assert_eq!((text.as_str(), place.as_str()), ("a", "line 5")),
            }
        }
        let array = format!(
            "\u{feff} [{}]",
            file.split_whitespace().collect::<Vec<_>>().join(" ").replace("} {\"", "}, {\"")
        );
        assert_eq!(entries(&array).unwrap().count(), 4);
    }

    #[test]
    fn what_is_no_entry_is_refused() {
        assert!(entries("[1, 2").is_err());
        assert!(entries("{\"text\": ").unwrap().all(|(_, entry)| entry.is_err()));
        for (entry, says) in [
            ("5", "no JSON object"),
            ("{}", "none of"),
            (r#"{"text": 5}"#, "none of"),
            (r#"{"messages": []}"#, "no messages"),
            (r#"{"messages": [{"content": "a"}]}"#, "without a role"),
            (r#"{"conversations": [{"from": "human"}]}"#, "without from and value"),
        ] {
            let error = sample(serde_json::from_str(entry).unwrap()).unwrap_err().to_string();
            assert!(error.contains(says), "{entry}: {error}");
        }
    }
}
