//! What executes a model, as far as text is concerned: tokens of a vocabulary, and logits after them.
//!
//! An [`Engine`] is a model in memory with its tokenizer, a [`Reader`] one sequence that it reads. Whoever
//! generates or measures asks these, and does not know what computes behind them.

use std::fmt::Debug;

use crate::error::{Error, Result};

/// A model that can be executed, and its vocabulary.
pub trait Engine: Debug {
    /// In a few words, for messages.
    fn description(&self) -> String;

    /// How it comes to its predictions.
    fn kind(&self) -> Kind;

    /// Tokens in the vocabulary: values in a row of logits.
    fn n_tokens(&self) -> usize;

    /// Context length that it was made for, in tokens.
    fn n_ctx(&self) -> usize;

    /// How large it is.
    ///
    /// # Errors
    /// As its files cannot be read.
    fn size(&self) -> Result<Size>;

    /// The ids of `text`. `add_special` adds what the vocabulary says to add; `parse_special` reads the names
    /// of control tokens as those tokens.
    ///
    /// # Errors
    /// `Unsupported` when there is no tokenizer, or its vocabulary cannot spell the text.
    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<i32>>;

    /// The bytes that `id` stands for in text; perhaps a part of a character only. Control tokens have none.
    ///
    /// # Errors
    /// `Misuse` for ids outside the vocabulary.
    fn piece(&self, id: i32) -> Result<Vec<u8>>;

    /// The vocabulary's entry for `id`, in its own spelling (`Ġthe`, `▁the`, `<0x0A>`).
    fn token_text(&self, id: i32) -> Option<String>;

    /// What stands around texts.
    fn delimiters(&self) -> Delimiters;

    /// Whether generation ends with `id`. False for ids outside the vocabulary.
    fn is_end_of_generation(&self, id: i32) -> bool;

    /// The chat template, in Jinja.
    fn chat_template(&self) -> Option<String>;

    /// What is recommended for sampling under this key, as GGUF calls it (`general.sampling.*`): `temp`, `top_k`.
    fn recommended(&self, key: &str) -> Option<String>;

    /// What happened while it was executed that its results do not show.
    fn remark(&self) -> Option<String> {
        None
    }

    /// A sequence of which nothing has been read yet.
    ///
    /// # Errors
    /// `Unsupported` when the model cannot be executed, `Misuse` for a context that it cannot have.
    fn reader<'a>(&'a self, options: &ReaderOptions) -> Result<Box<dyn Reader + 'a>>;
}

/// How a model comes to its predictions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From the tokens before.
    Decoder,
    /// From a text that its encoder has read, and the tokens after `start`.
    EncoderDecoder {
        /// With which token the decoder begins.
        start: i32,
    },
    /// It predicts no tokens.
    Encoder,
}

/// The tokens at the beginning and at the end of a text; `None` where the vocabulary has no such token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delimiters {
    /// At the beginning.
    pub bos: Option<i32>,
    /// At the end.
    pub eos: Option<i32>,
    /// Whether [`Engine::tokenize`] with `add_special` begins with `bos`.
    pub add_bos: bool,
    /// Whether [`Engine::tokenize`] with `add_special` ends with `eos`.
    pub add_eos: bool,
}

/// The size of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Number of weights.
    pub parameters: u64,
}

/// How to read.
#[derive(Clone, Copy, Debug)]
pub struct ReaderOptions {
    /// Most tokens that can be held.
    pub n_ctx: u32,
    /// Most tokens computed at once.
    pub n_batch: u32,
    /// Threads.
    pub threads: u32,
}

/// Which logits [`Reader::decode`] shall keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Those of the last token.
    Last,
    /// Those of every token.
    All,
}

/// The state of one sequence under a model: what it has read, and its last logits.
pub trait Reader: Debug {
    /// Most tokens it can hold.
    fn n_ctx(&self) -> usize;

    /// Most tokens of one [`Self::decode`].
    fn n_batch(&self) -> usize;

    /// Batches of a multiple of so many tokens take least time for each.
    fn step(&self) -> usize {
        1
    }

    /// Tokens read so far.
    fn position(&self) -> usize;

    /// Reads `ids` after everything read before, and keeps the logits that `keep` asks for.
    ///
    /// # Errors
    /// `Misuse` when `ids` is empty, longer than [`Self::n_batch`], leaves the context or holds an id outside
    /// the vocabulary; what execution fails with.
    fn decode(&mut self, ids: &[i32], keep: Keep) -> Result<()>;

    /// The logits after token `i` of the last [`Self::decode`], one for every token of the vocabulary; `None`
    /// where they were not kept, or the model has none.
    fn logits(&self, i: usize) -> Option<&[f32]>;

    /// The logits after the last token read.
    fn last_logits(&self) -> Option<&[f32]>;

    /// Forgets all but the first `keep` tokens, or all where that cannot be done. Returns how many remain.
    fn truncate(&mut self, keep: usize) -> usize;

    /// Forgets everything read.
    fn clear(&mut self) {
        self.truncate(0);
    }

    /// Lets the encoder of a [`Kind::EncoderDecoder`] read `ids`: what [`Self::decode`] reads after this
    /// attends to them.
    ///
    /// # Errors
    /// As [`Self::decode`]; `Misuse` for a model without such an encoder.
    fn encode(&mut self, _ids: &[i32]) -> Result<()> {
        Err(Error::misuse("the model has no encoder beside its decoder"))
    }
}

/// The linked llama.cpp.
#[cfg(feature = "ggml")]
mod linked {
    use super::{Delimiters, Engine, Keep, Kind, Reader, ReaderOptions, Result, Size};
    use crate::ggml::{Context, ContextOptions, Logits, Model};

    impl Engine for Model {
        fn description(&self) -> String {
            Self::description(self)
        }

        fn kind(&self) -> Kind {
            let start = || self.decoder_start().or(self.special_tokens().bos);
            match (self.is_decoder_only(), self.has_encoder() && self.has_logits()) {
                (true, _) => Kind::Decoder,
                (_, true) => start().map_or(Kind::Encoder, |start| Kind::EncoderDecoder { start }),
                _ => Kind::Encoder,
            }
        }

        fn n_tokens(&self) -> usize {
            Self::n_tokens(self)
        }

        fn n_ctx(&self) -> usize {
            self.n_ctx_train() as usize
        }

        fn size(&self) -> Result<Size> {
            Ok(Size { bytes: self.tensor_bytes(), parameters: self.n_params() })
        }

        fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<i32>> {
            Self::tokenize(self, text, add_special, parse_special)
        }

        fn piece(&self, id: i32) -> Result<Vec<u8>> {
            self.token_to_piece(id, false)
        }

        fn token_text(&self, id: i32) -> Option<String> {
            Self::token_text(self, id)
        }

        fn delimiters(&self) -> Delimiters {
            let special = self.special_tokens();
            Delimiters {
                bos: special.bos,
                eos: special.eos,
                add_bos: special.add_bos,
                add_eos: special.add_eos,
            }
        }

        fn is_end_of_generation(&self, id: i32) -> bool {
            Self::is_end_of_generation(self, id)
        }

        fn chat_template(&self) -> Option<String> {
            Self::chat_template(self)
        }

        fn recommended(&self, key: &str) -> Option<String> {
            self.metadata(&format!("general.sampling.{key}"))
        }

        fn reader<'a>(&'a self, options: &ReaderOptions) -> Result<Box<dyn Reader + 'a>> {
            let &ReaderOptions { n_ctx, n_batch, threads } = options;
            let options = ContextOptions { n_ctx, n_batch, threads, ..ContextOptions::default() };
            Ok(Box::new(Context::new(self, &options)?))
        }
    }

    impl Reader for Context<'_> {
        fn n_ctx(&self) -> usize {
            Self::n_ctx(self)
        }

        fn n_batch(&self) -> usize {
            Self::n_batch(self)
        }

        fn position(&self) -> usize {
            Self::position(self)
        }

        fn decode(&mut self, ids: &[i32], keep: Keep) -> Result<()> {
            let keep = match keep {
                Keep::Last => Logits::Last,
                Keep::All => Logits::All,
            };
            Self::decode(self, ids, keep)
        }

        fn logits(&self, i: usize) -> Option<&[f32]> {
            Self::logits(self, i)
        }

        fn last_logits(&self) -> Option<&[f32]> {
            Self::last_logits(self)
        }

        fn truncate(&mut self, keep: usize) -> usize {
            Self::truncate(self, keep)
        }

        fn clear(&mut self) {
            Self::clear(self);
        }

        fn encode(&mut self, ids: &[i32]) -> Result<()> {
            Self::encode(self, ids)
        }
    }
}
