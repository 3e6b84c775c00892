//! The execution of a model: tokens in, logits or embeddings out.

use std::marker::PhantomData;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::observe::{Observer, SlotBox, on_eval, watch};
use super::{Model, log};
use crate::error::{Error, Result};

/// How to execute a model.
#[derive(Clone, Debug)]
pub struct ContextOptions {
    /// Most tokens that can be held; 0 takes the model's own context length.
    pub n_ctx: u32,
    /// Most tokens computed at once. Logits of all of them take `n_batch` times the vocabulary's
    /// size times 4 bytes.
    pub n_batch: u32,
    /// Threads. One is the default: ggml's threads wait by spinning, which stalls on a busy
    /// machine.
    pub threads: u32,
    /// Keep keys and values in F32 and compute attention without the fused kernel, to compare
    /// results with an exact reference. Off means F16, as users run it.
    pub exact: bool,
    /// Whether the computation can be looked at, see [`Context::decode_observed`].
    pub observed: bool,
}

impl Default for ContextOptions {
    fn default() -> Self {
        Self { n_ctx: 0, n_batch: 512, threads: 1, exact: false, observed: false }
    }
}

/// Which logits [`Context::decode`] shall keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// Those of the last token.
    Last,
    /// Those of every token. (llama.cpp then computes the last layer for every token too.)
    All,
}

/// How the vectors of a text's tokens become one (`enum llama_pooling_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// They stay apart.
    None,
    /// Their mean.
    Mean,
    /// The first.
    Cls,
    /// The last.
    Last,
    /// A classifier on the first or their mean: one score for each label.
    Rank,
}

impl Pooling {
    const ALL: [(Self, sys::llama_pooling_type); 5] = [
        (Self::None, sys::LLAMA_POOLING_TYPE_NONE),
        (Self::Mean, sys::LLAMA_POOLING_TYPE_MEAN),
        (Self::Cls, sys::LLAMA_POOLING_TYPE_CLS),
        (Self::Last, sys::LLAMA_POOLING_TYPE_LAST),
        (Self::Rank, sys::LLAMA_POOLING_TYPE_RANK),
    ];

    fn id(self) -> sys::llama_pooling_type {
        Self::ALL.into_iter().find(|(p, _)| *p == self).map_or(sys::LLAMA_POOLING_TYPE_NONE, |(_, id)| id)
    }
}

/// The state of one sequence under a model: what it has read, and its last logits.
#[derive(Debug)]
pub struct Context<'m> {
    context: NonNull<sys::llama_context>,
    model: &'m Model,
    n_ctx: usize,
    n_batch: usize,
    // Tokens decoded so far.
    position: usize,
    // Batch indices whose logits exist.
    logits: std::ops::Range<usize>,
    // Batch indices whose embeddings exist.
    embeddings: std::ops::Range<usize>,
    // Where not `None`, the vectors of a text become one, and only that exists.
    pooling: Pooling,
    buffers: log::Buffers,
    // Whether the encoder of an encoder-decoder has read something.
    encoded: bool,
    // Whom the library's callback finds. Freed after `drop` has freed the context.
    slot: Option<SlotBox>,
    // Computation uses thread-local state of the library: a context may move, not be shared.
    not_sync: PhantomData<std::cell::Cell<()>>,
}

// SAFETY: a context may be used from any thread, by one at a time; `&mut self` sees to that.
unsafe impl Send for Context<'_> {}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: ours alone; the model outlives it.
        unsafe { sys::llama_free(self.context.as_ptr()) }
    }
}

impl<'m> Context<'m> {
    /// A context in which nothing has been read yet.
    ///
    /// # Errors
    /// `Misuse` for a vocabulary-only model, `Unsupported` with llama.cpp's reason when it cannot
    /// execute the model.
    pub fn new(model: &'m Model, options: &ContextOptions) -> Result<Self> {
        Self::with_output(model, options, None)
    }

    /// A context for [`Self::embed`], with the pooling that the model states, or another. At most
    /// `n_batch` tokens make a text.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn for_embeddings(
        model: &'m Model,
        options: &ContextOptions,
        pooling: Option<Pooling>,
    ) -> Result<Self> {
        Self::with_output(model, options, Some(pooling))
    }

    /// `embeddings`: whether they are wanted, and with which pooling.
    fn with_output(
        model: &'m Model,
        options: &ContextOptions,
        embeddings: Option<Option<Pooling>>,
    ) -> Result<Self> {
        if model.vocab_only() {
            return Err(Error::misuse("only the vocabulary was loaded; the model cannot be executed"));
        }
        if options.n_ctx == 0 && model.n_ctx_train() == 0 {
            return Err(Error::unsupported("the model does not say how long its context is"));
        }
        log::clear();
        let threads = i32::try_from(options.threads.max(1)).unwrap_or(i32::MAX);
        let n_batch = options.n_batch.max(1);
        // SAFETY: returns a plain struct of defaults.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.n_ctx = options.n_ctx;
        params.n_batch = n_batch;
        // An encoder looks at a whole text at once, and pooling takes in one batch.
        let at_once = embeddings.is_some() || model.has_encoder();
        params.n_ubatch = if at_once { n_batch } else { n_batch.min(512) };
        params.embeddings = embeddings.is_some();
        if let Some(Some(pooling)) = embeddings {
            params.pooling_type = pooling.id();
        }
        params.n_seq_max = 1;
        params.n_threads = threads;
        params.n_threads_batch = threads;
        params.no_perf = true;
        if options.exact {
            params.type_k = sys::GGML_TYPE_F32;
            params.type_v = sys::GGML_TYPE_F32;
            params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_DISABLED;
        }
        let slot = options.observed.then(SlotBox::new);
        if let Some(slot) = &slot {
            params.cb_eval = Some(on_eval);
            params.cb_eval_user_data = slot.user_data();
        }
        // SAFETY: the model is valid, has weights and outlives the context (`'m`); the one pointer of
        // ours in the parameters is to the slot, which outlives the context too; the function catches its exceptions and returns null.
        let context = unsafe { sys::llama_init_from_model(model.as_ptr(), params) };
        let context = NonNull::new(context).ok_or_else(|| {
            Error::unsupported(format!(
                "llama.cpp cannot execute the model: {}",
                log::reason("no reason given")
            ))
        })?;
        let (mut adapters, mut scales): (Vec<_>, Vec<_>) =
            model.adapters().iter().map(|&(adapter, scale)| (adapter.as_ptr(), scale)).unzip();
        // SAFETY: the context is valid; both arrays have so many elements, and the adapters live as
        // long as the model. The call copies them.
        let status = unsafe {
            let n = adapters.len();
            sys::llama_set_adapters_lora(context.as_ptr(), adapters.as_mut_ptr(), n, scales.as_mut_ptr())
        };
        if status != 0 {
            // SAFETY: ours alone, and not used again.
            unsafe { sys::llama_free(context.as_ptr()) };
            return Err(Error::unsupported(format!("llama.cpp takes no adapters here (status {status})")));
        }
        // SAFETY: the context is valid. llama.cpp may have rounded what was asked for.
        let (n_ctx, n_batch, pooling) = unsafe {
            let context = context.as_ptr();
            (sys::llama_n_ctx(context), sys::llama_n_batch(context), sys::llama_pooling_type(context))
        };
        let pooling = Pooling::ALL.into_iter().find(|(_, id)| *id == pooling);
        Ok(Self {
            context,
            model,
            n_ctx: n_ctx as usize,
            n_batch: n_batch as usize,
            position: 0,
            logits: 0..0,
            embeddings: 0..0,
            pooling: pooling.map_or(Pooling::None, |(p, _)| p),
            buffers: log::buffers(),
            encoded: false,
            slot,
            not_sync: PhantomData,
        })
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Most tokens it can hold.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Most tokens of one [`Self::decode`].
    pub fn n_batch(&self) -> usize {
        self.n_batch
    }

    /// Tokens read so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Memory taken when it was made.
    pub fn buffers(&self) -> log::Buffers {
        self.buffers
    }

    /// Waits until a device has computed what was given to it; the logits do so themselves.
    pub fn synchronize(&mut self) {
        // SAFETY: the context is valid.
        unsafe { sys::llama_synchronize(self.context.as_ptr()) }
    }

    /// How the vectors of a text's tokens become one.
    pub fn pooling(&self) -> Pooling {
        self.pooling
    }

    /// Reads `ids` after everything read before, and keeps the logits that `keep` asks for.
    ///
    /// # Errors
    /// `Misuse` when `ids` is empty, longer than [`Self::n_batch`], leaves the context or holds an
    /// id outside the vocabulary, or the model's encoder has nothing read yet; `Unsupported` with
    /// llama.cpp's reason when it fails.
    pub fn decode(&mut self, ids: &[i32], keep: Logits) -> Result<()> {
        if self.model.has_encoder() && !self.encoded {
            return Err(Error::misuse("the model's decoder needs a text that its encoder has read"));
        }
        let n = ids.len();
        // SAFETY: `run` gives a valid context and a valid batch.
        self.run(ids, keep, |context, batch| unsafe { sys::llama_decode(context, batch) })?;
        self.position += n;
        self.logits = if keep == Logits::All { 0..n } else { n - 1..n };
        Ok(())
    }

    /// As [`Self::decode`], and shows `observer` what it wants of the computation.
    ///
    /// # Errors
    /// As [`Self::decode`], and what `observer` returns: the computation is then incomplete, and the
    /// context has to be cleared. `Misuse` unless the context was made with
    /// [`ContextOptions::observed`].
    pub fn decode_observed(&mut self, ids: &[i32], keep: Logits, observer: &mut dyn Observer) -> Result<()> {
        let slot = self.slot.as_ref().map(SlotBox::address);
        let slot = slot.ok_or_else(|| Error::misuse("the context was not made to be observed"))?;
        // SAFETY: the slot belongs to `self`, which is borrowed for the whole call.
        unsafe { watch(slot, observer, || self.decode(ids, keep)) }
    }

    /// Lets the encoder of an encoder-decoder read `ids`: what [`Self::decode`] reads after this
    /// attends to them.
    ///
    /// # Errors
    /// As [`Self::decode`]; `Misuse` for a model without such an encoder.
    pub fn encode(&mut self, ids: &[i32]) -> Result<()> {
        if !self.model.has_encoder() {
            return Err(Error::misuse("the model has no encoder beside its decoder"));
        }
        // SAFETY: `run` gives a valid context and a valid batch.
        self.run(ids, Logits::All, |context, batch| unsafe { sys::llama_encode(context, batch) })?;
        self.encoded = true;
        Ok(())
    }

    /// Forgets everything read, reads the text `ids`, and keeps its embeddings.
    ///
    /// # Errors
    /// As [`Self::decode`]; `Misuse` for more tokens than the model has positions, or when the
    /// context is not one [`Self::for_embeddings`].
    pub fn embed(&mut self, ids: &[i32]) -> Result<()> {
        let most = self.model.n_ctx_train() as usize;
        if most > 0 && ids.len() > most {
            return Err(Error::misuse(format!("the text has {} tokens, the model takes {most}", ids.len()))
                .hint("divide the text"));
        }
        self.clear();
        if self.model.has_encoder() {
            self.encode(ids)?;
        } else {
            self.decode(ids, Logits::All)?;
        }
        self.logits = 0..0;
        self.embeddings = 0..ids.len();
        Ok(())
    }

    /// Checks `ids` and hands them to `function` as a batch.
    fn run(
        &mut self,
        ids: &[i32],
        keep: Logits,
        function: impl FnOnce(*mut sys::llama_context, sys::llama_batch) -> i32,
    ) -> Result<()> {
        if ids.is_empty() || ids.len() > self.n_batch {
            return Err(Error::misuse(format!(
                "{} tokens given to decode at once, 1 to {} can be",
                ids.len(),
                self.n_batch
            )));
        }
        if ids.len() > self.n_ctx - self.position.min(self.n_ctx) {
            return Err(Error::misuse(format!(
                "{} tokens after {} do not fit the context of {} tokens",
                ids.len(),
                self.position,
                self.n_ctx
            )));
        }
        for &id in ids {
            self.model.check_token(id)?;
        }
        (self.logits, self.embeddings) = (0..0, 0..0);
        let n = ids.len();
        let mut token = ids.to_vec();
        // Positions stay below `n_ctx`, which llama.cpp itself keeps in 32 bits.
        let mut pos: Vec<i32> = (self.position..self.position + n).map(|p| p as i32).collect();
        let mut n_seq_id = vec![1i32; n];
        let mut sequence = 0i32;
        let mut seq_id: Vec<*mut i32> = vec![&raw mut sequence; n];
        let mut output = vec![i8::from(keep == Logits::All); n];
        if let Some(last) = output.last_mut() {
            *last = 1;
        }
        let batch = sys::llama_batch {
            n_tokens: n as i32,
            token: token.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: pos.as_mut_ptr(),
            n_seq_id: n_seq_id.as_mut_ptr(),
            seq_id: seq_id.as_mut_ptr(),
            logits: output.as_mut_ptr(),
        };
        log::clear();
        // The arrays hold `n` elements each and live through the call, which copies them; `n` is at
        // most `n_batch`, and the ids are in the vocabulary.
        let status = function(self.context.as_ptr(), batch);
        if status != 0 {
            return Err(Error::unsupported(format!(
                "llama.cpp failed to decode (status {status}): {}",
                log::reason("no reason given")
            )));
        }
        Ok(())
    }

    /// The logits after token `i` of the last [`Self::decode`], one for every token of the
    /// vocabulary; `None` where they were not kept, or the model has none.
    pub fn logits(&self, i: usize) -> Option<&[f32]> {
        if !self.logits.contains(&i) || !self.model.has_logits() {
            return None;
        }
        // SAFETY: the context is valid; `i` is a batch index whose logits were asked for.
        let row = unsafe { sys::llama_get_logits_ith(self.context.as_ptr(), i as i32) };
        if row.is_null() {
            return None;
        }
        // SAFETY: a row has one value per token of the vocabulary, and stays as it is until the
        // next decode, which needs `&mut self`.
        Some(unsafe { std::slice::from_raw_parts(row, self.model.n_tokens()) })
    }

    /// The logits after the last token read.
    pub fn last_logits(&self) -> Option<&[f32]> {
        self.logits(self.logits.end.checked_sub(1)?)
    }

    /// What [`Self::embed`] found: of each token, or with pooling of the whole text. Each has
    /// [`Model::n_embd`] values, with [`Pooling::Rank`] one for each label. `None` when nothing
    /// has been embedded, or the model has no embeddings.
    pub fn embeddings(&self) -> Option<Vec<&[f32]>> {
        if self.embeddings.is_empty() {
            return None;
        }
        let context = self.context.as_ptr();
        let row = |values: *mut f32, n: usize| {
            // SAFETY: a row has `n` values, and stays as it is until the next call that needs
            // `&mut self`.
            (!values.is_null()).then(|| unsafe { std::slice::from_raw_parts(values.cast_const(), n) })
        };
        let n_embd = self.model.n_embd();
        if self.pooling == Pooling::None {
            let all = self.embeddings.clone();
            return all
                // SAFETY: the context is valid; the indices are those of the last batch.
                .map(|i| row(unsafe { sys::llama_get_embeddings_ith(context, i as i32) }, n_embd))
                .collect();
        }
        // SAFETY: the context is valid; every batch is of sequence 0.
        let pooled = unsafe { sys::llama_get_embeddings_seq(context, 0) };
        let n = if self.pooling == Pooling::Rank { self.model.n_labels() } else { n_embd };
        Some(vec![row(pooled, n)?])
    }

    /// Forgets all but the first `keep` tokens, or all where the model's memory cannot be cut there:
    /// a recurrent state, or a window that has moved on. Returns how many remain.
    pub fn truncate(&mut self, keep: usize) -> usize {
        if keep >= self.position {
            return self.position;
        }
        let cut = keep > 0
            // SAFETY: the context is valid; without a memory nothing is asked of it. Positions stay below
            // `n_ctx`, which llama.cpp itself keeps in 32 bits.
            && unsafe {
                let memory = sys::llama_get_memory(self.context.as_ptr());
                !memory.is_null()
                // Tokens that left the window are needed again, and are gone.
                && sys::llama_memory_seq_pos_min(memory, 0) == 0
                && sys::llama_memory_seq_rm(memory, 0, keep as i32, -1)
            };
        if !cut {
            self.clear();
            return 0;
        }
        self.position = keep;
        (self.logits, self.embeddings) = (0..0, 0..0);
        keep
    }

    /// Forgets everything read.
    pub fn clear(&mut self) {
        self.position = 0;
        (self.logits, self.embeddings) = (0..0, 0..0);
        // SAFETY: the context is valid; it may have no memory, then there is nothing to clear.
        unsafe {
            let memory = sys::llama_get_memory(self.context.as_ptr());
            if !memory.is_null() {
                sys::llama_memory_clear(memory, true);
            }
        }
    }
}
