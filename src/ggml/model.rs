//! A loaded model and its vocabulary.

use std::collections::HashSet;
use std::ffi::CString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::OnceLock;

use llama_cpp_sys_2 as sys;

use super::{adapter, c_path, init, log, text};
use crate::container::gguf::Gguf;
use crate::container::open_regular;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::vocab::check_loadable;

/// How to load a model.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Load the metadata and the vocabulary only; such a model cannot be executed.
    pub vocab_only: bool,
    /// Map the file instead of reading it.
    pub use_mmap: bool,
    /// Layers to place on a GPU, where a GPU backend is compiled in; negative means all.
    pub n_gpu_layers: i32,
    /// Let ggml rearrange weights in memory for speed. Off where activations or exact results
    /// are wanted: rearranged weights take other kernels.
    pub use_extra_bufts: bool,
    /// LoRA adapters (GGUF files) that every context of the model adds, so many times.
    pub adapters: Vec<(PathBuf, f32)>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            vocab_only: false,
            use_mmap: true,
            n_gpu_layers: 0,
            use_extra_bufts: false,
            adapters: Vec::new(),
        }
    }
}

/// Which tokenizer llama.cpp runs (`enum llama_vocab_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum VocabType {
    None,
    Spm,
    Bpe,
    Wpm,
    Ugm,
    Rwkv,
    Plamo2,
    Other,
}

/// Ids of special tokens; `None` where the vocabulary has no such token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SpecialTokens {
    pub bos: Option<i32>,
    pub eos: Option<i32>,
    pub eot: Option<i32>,
    pub sep: Option<i32>,
    pub nl: Option<i32>,
    pub pad: Option<i32>,
    pub mask: Option<i32>,
    /// Whether `tokenize` with `add_special` begins with `bos`.
    pub add_bos: bool,
    /// Whether `tokenize` with `add_special` ends with `eos`.
    pub add_eos: bool,
}

/// Architectures whose graphs end without logits (`res->t_logits` in llama.cpp's `src/models`).
const WITHOUT_LOGITS: [&str; 13] = [
    "bert",
    "clef",
    "eurobert",
    "gemma-embedding",
    "jina-bert-v2",
    "jina-bert-v3",
    "llama-embed",
    "modern-bert",
    "neo-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "t5encoder",
    "wavtokenizer-dec",
];

/// A model in memory, with its vocabulary.
#[derive(Debug)]
pub struct Model {
    model: NonNull<sys::llama_model>,
    vocab: NonNull<sys::llama_vocab>,
    vocab_only: bool,
    coverage: OnceLock<Coverage>,
    buffers: log::Buffers,
    // Adapters with their scales. They belong to the model, which frees them.
    adapters: Vec<(NonNull<sys::llama_adapter_lora>, f32)>,
}

// SAFETY: after loading, llama.cpp only reads a model: tokenizing, looking up tokens and creating
// contexts do not change it, and each context has its own state.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: ours alone; every context borrows the model and is gone by now.
        unsafe { sys::llama_model_free(self.model.as_ptr()) }
    }
}

impl Model {
    /// Loads the GGUF file at `path`. A split file is given by its first shard, named
    /// `NAME-00001-of-0000N.gguf`; llama.cpp finds the others beside it.
    ///
    /// # Errors
    /// `Io` when the file cannot be opened, `Malformed` when it is no GGUF file or has a vocabulary that
    /// would end the process in llama.cpp, `Unsupported` with llama.cpp's reason when that refuses it.
    pub fn load(path: impl AsRef<Path>, options: &ModelOptions) -> Result<Self> {
        let path = path.as_ref();
        check_magic(path)?;
        let metadata = Gguf::metadata_of(path, &Limits::default())?;
        check_loadable(&metadata).map_err(|e| e.at(path))?;
        drop(metadata);
        init()?;
        let c_path = c_path(path)?;
        log::clear();
        // SAFETY: returns a plain struct of defaults.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.vocab_only = options.vocab_only;
        params.n_gpu_layers = options.n_gpu_layers;
        params.use_extra_bufts = options.use_extra_bufts;
        params.load_mode =
            if options.use_mmap { sys::LLAMA_LOAD_MODE_MMAP } else { sys::LLAMA_LOAD_MODE_NONE };
        // SAFETY: `c_path` lives through the call; the parameters hold no pointers of ours; the
        // function catches its own exceptions and returns null on failure.
        let model = unsafe { sys::llama_model_load_from_file(c_path.as_ptr(), params) };
        let model = NonNull::new(model).ok_or_else(|| {
            Error::unsupported(format!("llama.cpp cannot load it: {}", log::reason("no reason given")))
                .at(path)
        })?;
        // SAFETY: the model is valid; its vocabulary lives as long as it does.
        let vocab = unsafe { sys::llama_model_get_vocab(model.as_ptr()) };
        let mut loaded = match NonNull::new(vocab.cast_mut()) {
            Some(vocab) => Self {
                model,
                vocab,
                vocab_only: options.vocab_only,
                coverage: OnceLock::new(),
                buffers: log::buffers(),
                adapters: Vec::new(),
            },
            None => {
                // SAFETY: ours alone, and not used again.
                unsafe { sys::llama_model_free(model.as_ptr()) };
                return Err(Error::unsupported("llama.cpp gives it no vocabulary").at(path));
            }
        };
        for (adapter, scale) in &options.adapters {
            loaded.load_adapter(adapter, *scale)?;
        }
        Ok(loaded)
    }

    /// Loads an adapter into the model, before anyone else sees the model.
    fn load_adapter(&mut self, path: &Path, scale: f32) -> Result<()> {
        if self.vocab_only {
            return Err(Error::misuse("only the vocabulary was loaded; there is nothing to adapt").at(path));
        }
        adapter::check(path)?;
        let c_path = c_path(path)?;
        log::clear();
        // SAFETY: the model is valid, has weights and is ours alone; the path lives through the call;
        // the function catches its own exceptions and returns null on failure.
        let adapter = unsafe { sys::llama_adapter_lora_init(self.as_ptr(), c_path.as_ptr()) };
        let adapter = NonNull::new(adapter).ok_or_else(|| {
            Error::unsupported(format!(
                "llama.cpp cannot load the adapter: {}",
                log::reason("no reason given")
            ))
            .at(path)
            .hint("an adapter fits the base that it was made for, converted by qconv lora-to-gguf")
        })?;
        self.adapters.push((adapter, scale));
        Ok(())
    }

    /// The adapters that contexts add, with their scales.
    pub(super) fn adapters(&self) -> &[(NonNull<sys::llama_adapter_lora>, f32)] {
        &self.adapters
    }

    pub(super) fn as_ptr(&self) -> *mut sys::llama_model {
        self.model.as_ptr()
    }

    /// Whether only the vocabulary was loaded.
    pub fn vocab_only(&self) -> bool {
        self.vocab_only
    }

    /// llama.cpp's one-line description: architecture, size, file type.
    pub fn description(&self) -> String {
        // SAFETY: the model is valid; `fill` passes a buffer with its length.
        fill(|buf, len| unsafe { sys::llama_model_desc(self.as_ptr(), buf, len) }).unwrap_or_default()
    }

    /// The metadata value under `key` as llama.cpp prints it; `None` for arrays and absent keys.
    pub fn metadata(&self, key: &str) -> Option<String> {
        let key = CString::new(key).ok()?;
        // SAFETY: the model and the key are valid; `fill` passes a buffer with its length.
        fill(|buf, len| unsafe { sys::llama_model_meta_val_str(self.as_ptr(), key.as_ptr(), buf, len) })
    }

    /// The default chat template, if the file has one.
    pub fn chat_template(&self) -> Option<String> {
        // SAFETY: null asks for the default; the result is null or lives as long as the model.
        let template = unsafe { sys::llama_model_chat_template(self.as_ptr(), std::ptr::null()) };
        // SAFETY: not null, null-terminated, unchanged.
        (!template.is_null()).then(|| unsafe { text(template) })
    }

    /// Number of weights.
    pub fn n_params(&self) -> u64 {
        // SAFETY: the model is valid.
        unsafe { sys::llama_model_n_params(self.as_ptr()) }
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        // SAFETY: the model is valid.
        unsafe { sys::llama_model_size(self.as_ptr()) }
    }

    /// Memory taken when it was loaded.
    pub fn buffers(&self) -> log::Buffers {
        self.buffers
    }

    /// Context length it was trained with, in tokens.
    pub fn n_ctx_train(&self) -> u32 {
        // SAFETY: the model is valid.
        unsafe { sys::llama_model_n_ctx_train(self.as_ptr()) }.try_into().unwrap_or(0)
    }

    /// Whether it predicts a next token from the tokens before, without a separate encoder.
    pub fn is_decoder_only(&self) -> bool {
        self.has_logits() && !self.has_encoder()
    }

    /// Whether it predicts tokens at all. The library does not say: asked for the logits of an
    /// encoder, it gives what its buffer happened to hold.
    pub fn has_logits(&self) -> bool {
        !self.metadata("general.architecture").is_some_and(|name| WITHOUT_LOGITS.contains(&name.as_str()))
    }

    /// Whether it has an encoder of its own, as T5 has. (BERT and the like are to llama.cpp
    /// decoders that see the whole text.)
    pub fn has_encoder(&self) -> bool {
        // SAFETY: the model is valid.
        unsafe { sys::llama_model_has_encoder(self.as_ptr()) }
    }

    /// With which token the decoder beside an encoder begins; `None` where there is no decoder, or
    /// nobody says.
    pub fn decoder_start(&self) -> Option<i32> {
        // SAFETY: the model is valid.
        let id = unsafe {
            (sys::llama_model_has_encoder(self.as_ptr()) && sys::llama_model_has_decoder(self.as_ptr()))
                .then(|| sys::llama_model_decoder_start_token(self.as_ptr()))
        };
        id.filter(|id| self.has_token(*id))
    }

    /// Layers.
    pub fn n_layer(&self) -> usize {
        // SAFETY: the model is valid.
        usize::try_from(unsafe { sys::llama_model_n_layer(self.as_ptr()) }).unwrap_or(0)
    }

    /// Size of an embedding.
    pub fn n_embd(&self) -> usize {
        // SAFETY: the model is valid.
        unsafe { sys::llama_model_n_embd_out(self.as_ptr()) }.try_into().unwrap_or(0)
    }

    /// Number of a classifier's labels; 1 where the file names none.
    pub fn n_labels(&self) -> usize {
        // SAFETY: the model is valid.
        unsafe { sys::llama_model_n_cls_out(self.as_ptr()) as usize }
    }

    /// Number of tokens in the vocabulary.
    pub fn n_tokens(&self) -> usize {
        // SAFETY: the vocabulary is valid.
        unsafe { sys::llama_vocab_n_tokens(self.vocab.as_ptr()) }.try_into().unwrap_or(0)
    }

    /// Whether `id` is in the vocabulary.
    pub fn has_token(&self, id: i32) -> bool {
        usize::try_from(id).is_ok_and(|id| id < self.n_tokens())
    }

    /// Which tokenizer runs.
    pub fn vocab_type(&self) -> VocabType {
        // SAFETY: the vocabulary is valid.
        match unsafe { sys::llama_vocab_type(self.vocab.as_ptr()) } {
            sys::LLAMA_VOCAB_TYPE_NONE => VocabType::None,
            sys::LLAMA_VOCAB_TYPE_SPM => VocabType::Spm,
            sys::LLAMA_VOCAB_TYPE_BPE => VocabType::Bpe,
            sys::LLAMA_VOCAB_TYPE_WPM => VocabType::Wpm,
            sys::LLAMA_VOCAB_TYPE_UGM => VocabType::Ugm,
            sys::LLAMA_VOCAB_TYPE_RWKV => VocabType::Rwkv,
            sys::LLAMA_VOCAB_TYPE_PLAMO2 => VocabType::Plamo2,
            _ => VocabType::Other,
        }
    }

    /// The special tokens.
    pub fn special_tokens(&self) -> SpecialTokens {
        let vocab = self.vocab.as_ptr();
        let id = |id: i32| self.has_token(id).then_some(id);
        // SAFETY: the vocabulary is valid; these only read it.
        unsafe {
            SpecialTokens {
                bos: id(sys::llama_vocab_bos(vocab)),
                eos: id(sys::llama_vocab_eos(vocab)),
                eot: id(sys::llama_vocab_eot(vocab)),
                sep: id(sys::llama_vocab_sep(vocab)),
                nl: id(sys::llama_vocab_nl(vocab)),
                pad: id(sys::llama_vocab_pad(vocab)),
                mask: id(sys::llama_vocab_mask(vocab)),
                add_bos: sys::llama_vocab_get_add_bos(vocab),
                add_eos: sys::llama_vocab_get_add_eos(vocab),
            }
        }
    }

    /// Whether generation ends with `id`. False for ids outside the vocabulary.
    pub fn is_end_of_generation(&self, id: i32) -> bool {
        // SAFETY: the vocabulary is valid and holds `id`.
        self.has_token(id) && unsafe { sys::llama_vocab_is_eog(self.vocab.as_ptr(), id) }
    }

    /// Whether `id` is a control token, which has no text. False for ids outside the vocabulary.
    pub fn is_control(&self, id: i32) -> bool {
        // SAFETY: the vocabulary is valid and holds `id`.
        self.has_token(id) && unsafe { sys::llama_vocab_is_control(self.vocab.as_ptr(), id) }
    }

    /// Whether `id` is a user-defined token: one that is found in the text before anything else.
    /// False for ids outside the vocabulary.
    pub fn is_user_defined(&self, id: i32) -> bool {
        self.has_token(id)
            // SAFETY: the vocabulary is valid and holds `id`.
            && unsafe { sys::llama_vocab_get_attr(self.vocab.as_ptr(), id) }
                & sys::LLAMA_TOKEN_ATTR_USER_DEFINED
                != 0
    }

    /// The vocabulary's entry for `id`, in its own spelling (`Ġthe`, `▁the`, `<0x0A>`).
    pub fn token_text(&self, id: i32) -> Option<String> {
        // SAFETY: the vocabulary is valid and holds `id`; the string lives as long as the model.
        self.has_token(id).then(|| unsafe { text(sys::llama_vocab_get_text(self.vocab.as_ptr(), id)) })
    }

    /// The bytes that `id` stands for in text; perhaps a part of a character only. Control tokens
    /// have none, unless `special` asks for their names.
    ///
    /// # Errors
    /// `Misuse` for ids outside the vocabulary, or when only dummy tokens were loaded.
    pub fn token_to_piece(&self, id: i32, special: bool) -> Result<Vec<u8>> {
        self.check_token(id)?;
        self.check_tokenizer()?;
        let mut piece = vec![0u8; 32];
        loop {
            // SAFETY: the vocabulary is valid and holds `id`; at most `piece.len()` bytes are
            // written. A negative answer is the length that would be needed.
            let n = unsafe {
                sys::llama_token_to_piece(
                    self.vocab.as_ptr(),
                    id,
                    piece.as_mut_ptr().cast(),
                    piece.len() as i32,
                    0,
                    special,
                )
            };
            match usize::try_from(n) {
                Ok(n) => {
                    piece.truncate(n);
                    return Ok(piece);
                }
                Err(_) => {
                    let needed = n.unsigned_abs() as usize;
                    if needed <= piece.len() {
                        return Err(Error::unsupported(format!("llama.cpp gives token {id} no text")));
                    }
                    piece.resize(needed, 0);
                }
            }
        }
    }

    /// The ids of `text`. `add_special` adds what the vocabulary says to add (bos, eos);
    /// `parse_special` reads the names of control tokens as those tokens.
    ///
    /// # Errors
    /// `Unsupported` when the model has no tokenizer, or its vocabulary cannot spell the text;
    /// `Limit` when the text is 2 GiB or longer.
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<i32>> {
        self.check_tokenizer()?;
        self.check_spelling(text)?;
        if add_special {
            let special = self.special_tokens();
            let needs_bos = special.add_bos || self.vocab_type() == VocabType::Wpm;
            let needs_sep = self.vocab_type() == VocabType::Wpm;
            if needs_bos && special.bos.is_none()
                || special.add_eos && special.eos.is_none()
                || needs_sep && special.sep.is_none()
            {
                return Err(Error::unsupported(
                    "the vocabulary asks to add a bos, eos or sep token but defines none",
                ));
            }
        }
        let len = i32::try_from(text.len())
            .map_err(|_| Error::limit("text of 2 GiB or more cannot be tokenized at once"))?;
        // Room for the usual case; a negative answer tells how many are needed.
        let mut ids = vec![0i32; text.len() / 3 + 8];
        loop {
            // SAFETY: `text` is `len` bytes; at most `ids.len()` ids are written.
            let n = unsafe {
                sys::llama_tokenize(
                    self.vocab.as_ptr(),
                    text.as_ptr().cast(),
                    len,
                    ids.as_mut_ptr(),
                    i32::try_from(ids.len()).unwrap_or(i32::MAX),
                    add_special,
                    parse_special,
                )
            };
            match usize::try_from(n) {
                Ok(n) => {
                    ids.truncate(n);
                    return Ok(ids);
                }
                Err(_) => {
                    let needed = n.unsigned_abs() as usize;
                    if n == i32::MIN || needed <= ids.len() {
                        return Err(Error::limit("the text has too many tokens for llama.cpp"));
                    }
                    ids.resize(needed, 0);
                }
            }
        }
    }

    pub(super) fn check_token(&self, id: i32) -> Result<()> {
        if self.has_token(id) {
            return Ok(());
        }
        Err(Error::misuse(format!(
            "token {id} is not in the model's vocabulary of {} tokens",
            self.n_tokens()
        )))
    }

    fn check_tokenizer(&self) -> Result<()> {
        if self.vocab_type() == VocabType::None {
            return Err(Error::unsupported("the model has no vocabulary"));
        }
        Ok(())
    }

    /// SentencePiece vocabularies spell unknown characters byte by byte; where such a byte token
    /// is missing llama.cpp ends the process, so we look first.
    fn check_spelling(&self, text: &str) -> Result<()> {
        if self.vocab_type() != VocabType::Spm {
            return Ok(());
        }
        let coverage = self.coverage.get_or_init(|| Coverage::of(self));
        // Spaces are written as U+2581, and one may be put in front.
        match text.chars().chain(['\u{2581}']).find(|&c| c != ' ' && !coverage.has(c)) {
            None => Ok(()),
            Some(c) => Err(Error::unsupported(format!(
                "the vocabulary has neither {c:?} nor tokens for its bytes; llama.cpp cannot tokenize it"
            ))),
        }
    }
}

/// The characters and the bytes that a SentencePiece vocabulary can spell.
#[derive(Debug)]
struct Coverage {
    chars: HashSet<char>,
    bytes: [bool; 256],
}

impl Coverage {
    fn of(model: &Model) -> Self {
        let mut coverage = Self { chars: HashSet::new(), bytes: [false; 256] };
        for id in 0..i32::try_from(model.n_tokens()).unwrap_or(i32::MAX) {
            let Some(text) = model.token_text(id) else { continue };
            let mut chars = text.chars();
            if let (Some(c), None) = (chars.next(), chars.next()) {
                coverage.chars.insert(c);
            } else if let Some(hex) = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'))
                && hex.len() == 2
                && let Ok(byte) = u8::from_str_radix(hex, 16)
            {
                coverage.bytes[usize::from(byte)] = true;
            }
        }
        coverage
    }

    fn has(&self, c: char) -> bool {
        self.chars.contains(&c) || c.encode_utf8(&mut [0; 4]).bytes().all(|b| self.bytes[usize::from(b)])
    }
}

fn check_magic(path: &Path) -> Result<()> {
    let mut magic = [0; 4];
    let (mut file, _) = open_regular(path)?;
    match file.read_exact(&mut magic) {
        Ok(()) if &magic == b"GGUF" => Ok(()),
        Err(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => Err(Error::io("read", path, e)),
        _ => Err(Error::malformed("is not a GGUF file (its first four bytes are not `GGUF`)")
            .at(path)
            .hint("convert a Hugging Face checkpoint first: qconv hf-to-gguf")),
    }
}

/// Calls `get` with a buffer that grows until the text it reports fits.
fn fill(mut get: impl FnMut(*mut std::ffi::c_char, usize) -> i32) -> Option<String> {
    let mut buf = vec![0u8; 256];
    loop {
        let n = usize::try_from(get(buf.as_mut_ptr().cast(), buf.len())).ok()?;
        if n < buf.len() {
            buf.truncate(n);
            return Some(String::from_utf8_lossy(&buf).into_owned());
        }
        buf.resize(n + 1, 0);
    }
}
