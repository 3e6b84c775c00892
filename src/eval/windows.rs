//! A text in windows, as llama.cpp's perplexity tool reads it, through one or several models at once.
//!
//! The text is tokenized whole, with what the vocabulary puts before it, and cut into windows of
//! `n_ctx` tokens, each read on its own; a rest that fills no window is left out. Where the
//! vocabulary begins texts with a token (BOS), each window's first token is replaced by it. Of each
//! window the predictions from position `n_ctx / 2` on are scored: before it there is too little
//! context. Source: `tools/perplexity/perplexity.cpp`.

use std::time::{Duration, Instant};

use super::engine::{Engine, Keep, Kind, ReaderOptions};
use crate::error::{Error, Result};

/// Most bytes of the logits that are held of one model at once.
const LOGIT_BYTES: usize = 32 << 20;

/// A tokenized text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of all windows, one after another.
    pub tokens: Vec<i32>,
    /// Tokens of a window.
    pub n_ctx: usize,
    /// What each window's first token is replaced by.
    pub bos: Option<i32>,
}

impl Windows {
    /// Windows.
    pub fn count(&self) -> usize {
        self.tokens.len() / self.n_ctx.max(1)
    }

    /// The tokens of each window as a model reads them.
    pub fn each(&self) -> impl Iterator<Item = Vec<i32>> + '_ {
        self.tokens.chunks_exact(self.n_ctx.max(1)).map(|window| {
            let mut read = window.to_vec();
            if let (Some(bos), Some(first)) = (self.bos, read.first_mut()) {
                *first = bos;
            }
            read
        })
    }

    /// Predictions that are scored in each window.
    pub fn scored(&self) -> usize {
        self.n_ctx - 1 - self.n_ctx / 2
    }

    /// Tokenizes `text`, and takes at most `most` windows of it.
    ///
    /// # Errors
    /// `Misuse` when the text is shorter than two windows, as in llama.cpp, or windows than 4 tokens.
    pub fn new(model: &dyn Engine, text: &str, n_ctx: usize, most: Option<usize>) -> Result<Self> {
        if n_ctx < 4 {
            return Err(Error::misuse(format!("windows of {n_ctx} tokens: at least 4 are needed")));
        }
        let mut tokens = model.tokenize(text, true, false)?;
        let count = tokens.len() / n_ctx;
        if count < 2 {
            return Err(Error::misuse(format!(
                "the text has {} tokens; two windows of {n_ctx} are needed at least",
                tokens.len()
            ))
            .hint("give a longer text, or shorter windows with --ctx"));
        }
        tokens.truncate(count.min(most.unwrap_or(count)) * n_ctx);
        Ok(Self { tokens, n_ctx, bos: Self::bos_of(model) })
    }

    /// What each window's first token is replaced by: the token that the vocabulary begins texts with.
    pub fn bos_of(model: &dyn Engine) -> Option<i32> {
        let delimiters = model.delimiters();
        delimiters.bos.filter(|_| delimiters.add_bos)
    }

    /// Lets every model read every window, side by side. `score` gets, for each scored prediction,
    /// the number of the window, the logits of every model, and the token that came. Returns the
    /// time that each model took.
    ///
    /// # Errors
    /// Those of `score`, and of the models' execution; `Misuse` when vocabularies differ in size.
    pub fn read(
        &self,
        models: &[&dyn Engine],
        threads: u32,
        mut score: impl FnMut(usize, &[&[f32]], usize) -> Result<()>,
    ) -> Result<Vec<Duration>> {
        let Some(first) = models.first() else { return Ok(Vec::new()) };
        if let Some(other) = models.iter().find(|m| m.n_tokens() != first.n_tokens()) {
            return Err(Error::misuse(format!(
                "the vocabularies have {} and {} tokens: predictions cannot be compared",
                first.n_tokens(),
                other.n_tokens()
            )));
        }
        if let Some(m) = models.iter().find(|m| m.kind() != Kind::Decoder) {
            return Err(Error::unsupported(format!("{} predicts no next token", m.description())));
        }
        let n_batch = (LOGIT_BYTES / 4 / first.n_tokens().max(1)).clamp(16, 512).min(self.n_ctx);
        let options = ReaderOptions {
            n_ctx: u32::try_from(self.n_ctx).map_err(|_| Error::misuse("windows are too long"))?,
            n_batch: n_batch as u32,
            threads,
        };
        let mut readers = models.iter().map(|m| m.reader(&options)).collect::<Result<Vec<_>>>()?;
        let mut times = vec![Duration::ZERO; models.len()];
        let half = self.n_ctx / 2;
        let step = readers.iter().map(|r| r.step()).max().unwrap_or(1).max(1);
        let n_batch = if n_batch > step { n_batch - n_batch % step } else { n_batch };
        // Nothing follows the last token: what it predicts cannot be scored. It is read where it fills a step.
        let last = step > 1 && (self.n_ctx - half).is_multiple_of(step);
        let end = self.n_ctx - usize::from(!last);
        let windows = self.tokens.chunks_exact(self.n_ctx).zip(self.each());
        for (number, (window, read)) in windows.enumerate() {
            for (reader, time) in readers.iter_mut().zip(&mut times) {
                let begun = Instant::now();
                reader.clear();
                for part in read[..half].chunks(n_batch) {
                    reader.decode(part, Keep::Last)?;
                }
                *time += begun.elapsed();
            }
            for (k, part) in read[half..end].chunks(n_batch).enumerate() {
                for (reader, time) in readers.iter_mut().zip(&mut times) {
                    let begun = Instant::now();
                    reader.decode(part, Keep::All)?;
                    *time += begun.elapsed();
                }
                for i in 0..part.len() {
                    let Some(&next) = window.get(half + k * n_batch + i + 1) else { break };
                    let rows = readers.iter().map(|r| r.logits(i)).collect::<Option<Vec<_>>>();
                    let rows = rows.ok_or_else(|| Error::unsupported("the model gives no logits"))?;
                    if let Some(bad) = rows.iter().position(|row| !super::logits::is_sound(row)) {
                        return Err(no_numbers(models, bad, number, half + k * n_batch + i));
                    }
                    score(number, &rows, usize::try_from(next).unwrap_or(usize::MAX))?;
                }
            }
        }
        Ok(times)
    }
}

fn no_numbers(models: &[&dyn Engine], bad: usize, window: usize, token: usize) -> Error {
    let which = match models.len() {
        1 => String::new(),
        n => format!(" of model {} of {n}", bad + 1),
    };
    Error::check(format!(
        "the logits{which} are no numbers (NaN or infinite) after token {token} of window {window}: \
         its predictions cannot be scored"
    ))
    .hint("qconv inspect and qconv verify tell whether its tensors are sound")
}

#[cfg(test)]
mod tests {
    use super::super::engine::{Delimiters, Reader, Size};
    use super::*;

    /// Its logits after a token are its place and the token.
    #[derive(Debug)]
    struct Echo {
        step: usize,
    }

    #[derive(Debug)]
    struct EchoReader {
        step: usize,
        n_batch: usize,
        position: usize,
        rows: Vec<[f32; 2]>,
    }

    impl Engine for Echo {
        fn description(&self) -> String {
            "an echo".into()
        }
        fn kind(&self) -> Kind {
            Kind::Decoder
        }
        fn n_tokens(&self) -> usize {
            2
        }
        fn n_ctx(&self) -> usize {
            64
        }
        fn size(&self) -> Result<Size> {
            Ok(Size::default())
        }
        fn tokenize(&self, text: &str, _: bool, _: bool) -> Result<Vec<i32>> {
            Ok(text.bytes().map(i32::from).collect())
        }
        fn piece(&self, _: i32) -> Result<Vec<u8>> {
            Ok(Vec::new())
        }
        fn token_text(&self, _: i32) -> Option<String> {
            None
        }
        fn delimiters(&self) -> Delimiters {
            Delimiters { bos: Some(7), add_bos: true, ..Delimiters::default() }
        }
        fn is_end_of_generation(&self, _: i32) -> bool {
            false
        }
        fn chat_template(&self) -> Option<String> {
            None
        }
        fn recommended(&self, _: &str) -> Option<String> {
            None
        }
        fn reader<'a>(&'a self, options: &ReaderOptions) -> Result<Box<dyn Reader + 'a>> {
            let n_batch = options.n_batch as usize;
            Ok(Box::new(EchoReader { step: self.step, n_batch, position: 0, rows: Vec::new() }))
        }
    }

    impl Reader for EchoReader {
        fn n_ctx(&self) -> usize {
            64
        }
        fn n_batch(&self) -> usize {
            self.n_batch
        }
        fn step(&self) -> usize {
            self.step
        }
        fn position(&self) -> usize {
            self.position
        }
        fn decode(&mut self, ids: &[i32], keep: Keep) -> Result<()> {
            assert!(ids.len() <= self.n_batch);
            let places = self.position..;
            self.rows = ids.iter().zip(places).map(|(id, place)| [place as f32, *id as f32]).collect();
            if keep == Keep::Last {
                self.rows.drain(..ids.len() - 1);
            }
            self.position += ids.len();
            Ok(())
        }
        fn logits(&self, i: usize) -> Option<&[f32]> {
            self.rows.get(i).map(|row| &row[..])
        }
        fn last_logits(&self) -> Option<&[f32]> {
            self.rows.last().map(|row| &row[..])
        }
        fn truncate(&mut self, keep: usize) -> usize {
            self.position = self.position.min(keep);
            self.position
        }
    }

    #[test]
    fn every_prediction_is_scored_once_whatever_the_steps() {
        let text: String = (b'!'..b'~').map(char::from).collect();
        for n_ctx in [4, 9, 16, 24, 32] {
            let windows = Windows::new(&Echo { step: 1 }, &text, n_ctx, None).unwrap();
            let mut expected = Vec::new();
            for (number, window) in windows.tokens.chunks_exact(n_ctx).enumerate() {
                for place in n_ctx / 2..n_ctx - 1 {
                    let read = [place as f32, window[place] as f32];
                    expected.push((number, read.to_vec(), window[place + 1] as usize));
                }
            }
            assert_eq!(expected.len(), windows.count() * windows.scored());
            for step in [1, 3, 4, 8, 64] {
                let mut found = Vec::new();
                let score = |number: usize, rows: &[&[f32]], next: usize| {
                    found.push((number, rows[0].to_vec(), next));
                    assert_eq!(rows[0], rows[1]);
                    Ok(())
                };
                windows.read(&[&Echo { step }, &Echo { step: 1 }], 1, score).unwrap();
                assert_eq!(found, expected, "{n_ctx} {step}");
            }
        }
    }
}
