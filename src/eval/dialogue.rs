//! A conversation with a model, in the words of its own chat template.

use std::time::{SystemTime, UNIX_EPOCH};

use super::chat::{Conversation, Message, TemplateTokens, render};
use super::engine::Engine;
use super::generate::tokenize_prompt;
use crate::error::{Error, Result};

/// What was said so far.
#[derive(Debug)]
pub struct Dialogue<'m> {
    model: &'m dyn Engine,
    template: String,
    tokens: TemplateTokens,
    system: Option<String>,
    // Questions and answers in turn.
    turns: Vec<Message>,
    // One time for the whole conversation: a template that prints it prints the same each time.
    now: i64,
}

impl<'m> Dialogue<'m> {
    /// A conversation in which nothing was said.
    ///
    /// # Errors
    /// `Unsupported` when the model has no chat template.
    pub fn new(model: &'m dyn Engine, system: Option<&str>) -> Result<Self> {
        let template = model.chat_template().ok_or_else(|| {
            Error::unsupported("the model has no chat template")
                .hint("run without --chat to continue the prompt as plain text")
        })?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let now = i64::try_from(now).unwrap_or(0);
        let tokens = TemplateTokens::of(model);
        Ok(Self { model, template, tokens, system: system.map(str::to_string), turns: Vec::new(), now })
    }

    /// Messages so far, the system's not counted.
    pub fn len(&self) -> usize {
        self.turns.len()
    }

    /// Whether nothing was said yet.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Forgets what was said; the system message stays.
    pub fn reset(&mut self) {
        self.turns.clear();
    }

    /// Another system message, or none.
    pub fn set_system(&mut self, text: Option<&str>) {
        self.system = text.map(str::to_string);
    }

    /// The user's next message.
    pub fn ask(&mut self, text: &str) {
        self.turns.push(Message::new("user", text));
    }

    /// The model's answer to it.
    pub fn answer(&mut self, text: &str) {
        self.turns.push(Message::new("assistant", text));
    }

    /// Takes back the last message.
    pub fn take_back(&mut self) {
        self.turns.pop();
    }

    /// The tokens up to where the model's next answer begins.
    ///
    /// # Errors
    /// As [`render`] and [`tokenize_prompt`].
    pub fn prompt(&self) -> Result<Vec<i32>> {
        let system = self.system.as_deref().map(|text| Message::new("system", text));
        let messages: Vec<Message> = system.into_iter().chain(self.turns.iter().cloned()).collect();
        let text = render(&self.template, &Conversation::new(&messages), &self.tokens, self.now)?;
        tokenize_prompt(self.model, &text)
    }

    /// As [`Self::prompt`]; forgets the oldest questions with their answers until it has at most `most`
    /// tokens. Returns also how many were forgotten.
    ///
    /// # Errors
    /// As [`Self::prompt`]; `Misuse` when the last question alone is longer.
    pub fn prompt_within(&mut self, most: usize) -> Result<(Vec<i32>, usize)> {
        let mut forgotten = 0;
        loop {
            let ids = self.prompt()?;
            if ids.len() <= most {
                return Ok((ids, forgotten));
            }
            if self.turns.len() < 3 {
                return Err(Error::misuse(format!(
                    "the message has {} tokens, {most} fit the context beside an answer",
                    ids.len()
                ))
                .hint("shorten it, or give a longer context with -c"));
            }
            self.turns.drain(..2);
            forgotten += 1;
        }
    }
}
