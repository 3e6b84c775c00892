//! A look at what is computed while a model reads: the inputs of its matrices, the outputs of its
//! layers (llama.cpp's `cb_eval`).

use std::any::Any;
use std::borrow::Cow;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use crate::block::codec;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Who looks at the computation.
pub trait Observer {
    /// Whether this node, which is about to be computed, shall be shown. Its values do not exist yet;
    /// names, shapes and sources do. Nodes that nobody wants are computed together, and faster.
    fn wants(&mut self, node: &Node<'_>) -> bool;

    /// A node that was wanted, with its values and those of its sources.
    ///
    /// # Errors
    /// An error ends the observation, and [`super::Context::decode_observed`] returns it.
    fn see(&mut self, node: &Node<'_>) -> Result<()>;
}

/// What a node computes, as far as observers tell operations apart (`enum ggml_op`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Source 0, a matrix `[columns, rows, ..]`, times source 1, inputs `[columns, tokens, ..]`.
    MulMat,
    /// The same with a stack of matrices `[columns, rows, experts]`, of which source 2, `[used, tokens]`
    /// in I32, chooses some for each token. Source 1 is `[columns, used or 1, tokens]`.
    MulMatId,
    /// Anything else.
    Other,
}

/// A tensor of the running computation.
#[derive(Clone, Copy)]
pub struct Node<'a>(&'a sys::ggml_tensor);

impl std::fmt::Debug for Node<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {:?} {:?}", self.name(), self.op(), self.shape())
    }
}

impl<'a> Node<'a> {
    /// Its name, such as `l_out-3`, or of a weight `blk.3.ffn_down.weight`. Copies of weights that
    /// llama.cpp makes for another device are called `DEVICE#blk.3.ffn_down.weight#0`: what stands
    /// between the signs is the name.
    pub fn name(&self) -> Cow<'a, str> {
        let bytes: &'a [u8] = bytemuck::cast_slice(&self.0.name);
        let len = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        match String::from_utf8_lossy(&bytes[..len]) {
            Cow::Borrowed(name) => Cow::Borrowed(name.split('#').nth(1).unwrap_or(name)),
            Cow::Owned(name) => Cow::Owned(name),
        }
    }

    /// What tells it from all others of one decode.
    pub fn id(&self) -> usize {
        std::ptr::from_ref(self.0).addr()
    }

    /// What it computes.
    pub fn op(&self) -> Op {
        match self.0.op {
            sys::GGML_OP_MUL_MAT => Op::MulMat,
            sys::GGML_OP_MUL_MAT_ID => Op::MulMatId,
            _ => Op::Other,
        }
    }

    /// Elements along each dimension, the innermost first.
    pub fn shape(&self) -> [usize; 4] {
        self.0.ne.map(|n| usize::try_from(n).unwrap_or(0))
    }

    /// The type of its elements; `None` for one that only ggml has.
    pub fn dtype(&self) -> Option<DType> {
        // The library's enumerations are signed on Windows.
        let id = i64::from(self.0.type_);
        DType::ALL.iter().copied().find(|t| t.ggml_id().map(i64::from) == Some(id))
    }

    /// What it is computed from.
    pub fn source(&self, i: usize) -> Option<Node<'a>> {
        let source = *self.0.src.get(i)?;
        // SAFETY: null, or a tensor of the same graph, which lives and stays as it is during the
        // callback.
        unsafe { source.as_ref() }.map(Node)
    }

    /// Its values, the innermost dimension first, in `scratch` unless they lie in memory just so.
    ///
    /// # Errors
    /// `Unsupported` for types without a codec, and for elements that are not next to each other.
    pub fn values<'s>(&'s self, scratch: &'s mut Vec<f32>) -> Result<&'s [f32]> {
        let n = self.elements();
        if self.0.type_ == sys::GGML_TYPE_F32 && self.is_on_host() && self.is_contiguous() {
            // SAFETY: on the host, contiguous F32: `n` aligned values from `data` on. Nothing is
            // computed during the callback, to which `self` is bound.
            return Ok(unsafe { std::slice::from_raw_parts(self.0.data.cast::<f32>(), n) });
        }
        let dtype = self.dtype().filter(|d| codec(*d).is_some());
        let codec = dtype.and_then(codec).ok_or_else(|| self.unreadable("has a type without a codec"))?;
        let bytes = self.bytes()?;
        let row_bytes = codec.dtype.bytes_for(self.0.ne[0].try_into().unwrap_or(0))? as usize;
        scratch.clear();
        scratch.resize(n, 0.0);
        let columns = self.shape()[0].max(1);
        for (row, at) in scratch.chunks_exact_mut(columns).zip(self.row_offsets()) {
            let bytes =
                bytes.get(at..at + row_bytes).ok_or_else(|| self.unreadable("has strange strides"))?;
            codec.decode(bytes, row)?;
        }
        Ok(scratch)
    }

    /// Its values where they are integers (I32), the innermost dimension first.
    ///
    /// # Errors
    /// `Unsupported` for other types.
    pub fn integers(&self) -> Result<Vec<i32>> {
        if self.0.type_ != sys::GGML_TYPE_I32 {
            return Err(self.unreadable("holds no integers"));
        }
        let bytes = self.bytes()?;
        let columns = self.shape()[0];
        let mut out = Vec::with_capacity(self.elements());
        for at in self.row_offsets() {
            let row =
                bytes.get(at..at + columns * 4).ok_or_else(|| self.unreadable("has strange strides"))?;
            out.extend(row.as_chunks::<4>().0.iter().map(|b| i32::from_ne_bytes(*b)));
        }
        Ok(out)
    }

    fn elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// Where rows begin, in bytes.
    fn row_offsets(&self) -> impl Iterator<Item = usize> + use<'a> {
        let ([_, ne1, ne2, ne3], nb) = (self.shape(), self.0.nb);
        (0..ne3).flat_map(move |k| {
            (0..ne2).flat_map(move |j| (0..ne1).map(move |i| k * nb[3] + j * nb[2] + i * nb[1]))
        })
    }

    fn is_contiguous(&self) -> bool {
        // SAFETY: a valid tensor.
        unsafe { sys::ggml_is_contiguous(self.0) }
    }

    fn is_on_host(&self) -> bool {
        !self.0.data.is_null()
            && !self.0.buffer.is_null()
            // SAFETY: a null buffer is not asked; another is valid as long as the tensor.
            && unsafe { sys::ggml_backend_buffer_is_host(self.0.buffer) }
    }

    /// The bytes from its first element to its last.
    fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        // Within a row elements must follow each other; rows may lie anywhere.
        // SAFETY: a type of a valid tensor.
        if self.0.nb[0] != unsafe { sys::ggml_type_size(self.0.type_) } {
            return Err(self.unreadable("has elements that are not next to each other"));
        }
        // SAFETY: a valid tensor.
        let n = unsafe { sys::ggml_nbytes(self.0) };
        if self.is_on_host() {
            // SAFETY: a tensor on the host has so many bytes from `data` on; see `values`.
            return Ok(Cow::Borrowed(unsafe { std::slice::from_raw_parts(self.0.data.cast::<u8>(), n) }));
        }
        if self.0.data.is_null() || self.0.buffer.is_null() {
            return Err(self.unreadable("has no memory"));
        }
        let mut out = vec![0u8; n];
        // SAFETY: the tensor is allocated, and `out` has room for its bytes.
        unsafe { sys::ggml_backend_tensor_get(self.0, out.as_mut_ptr().cast(), 0, n) };
        Ok(Cow::Owned(out))
    }

    fn unreadable(&self, why: &str) -> Error {
        Error::unsupported(format!("the computed tensor {:?} {why}", self.name()))
    }
}

/// Where the library's callback finds who observes.
#[derive(Default)]
pub(super) struct Slot {
    // Valid while `watch` runs, and `None` else.
    observer: Option<NonNull<dyn Observer>>,
    error: Option<Error>,
    panic: Option<Box<dyn Any + Send>>,
}

/// The slot of a context, at an address that stays.
pub(super) struct SlotBox(NonNull<Slot>);

impl std::fmt::Debug for SlotBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SlotBox")
    }
}

impl SlotBox {
    pub(super) fn new() -> Self {
        Self(NonNull::from(Box::leak(Box::<Slot>::default())))
    }

    /// What llama.cpp hands to [`on_eval`].
    pub(super) fn user_data(&self) -> *mut c_void {
        self.0.as_ptr().cast()
    }

    /// The same address, for [`watch`].
    pub(super) fn address(&self) -> NonNull<Slot> {
        self.0
    }
}

/// Runs `compute`, and shows `observer` what it wants.
///
/// # Safety
/// `slot` is that of a living [`SlotBox`], which no other call uses meanwhile.
pub(super) unsafe fn watch<R>(
    slot: NonNull<Slot>,
    observer: &mut dyn Observer,
    compute: impl FnOnce() -> Result<R>,
) -> Result<R> {
    struct Clear(NonNull<Slot>);
    impl Drop for Clear {
        fn drop(&mut self) {
            // SAFETY: the slot lives (see `watch`), and the callback, its only other user, is over.
            unsafe { (*self.0.as_ptr()).observer = None };
        }
    }
    // SAFETY: only the lifetime is forgotten: `Clear` takes the pointer out of the slot before this
    // function is left, also by a panic of `compute`.
    let observer: NonNull<dyn Observer> = unsafe { std::mem::transmute(NonNull::from(observer)) };
    // SAFETY: the slot lives, and its only other user, the callback, runs within `compute`.
    unsafe { (*slot.as_ptr()).observer = Some(observer) };
    let clear = Clear(slot);
    let result = compute();
    drop(clear);
    // SAFETY: as above; `compute` is over.
    let (error, panic) = unsafe { ((*slot.as_ptr()).error.take(), (*slot.as_ptr()).panic.take()) };
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
    error.map_or(result, Err)
}

impl Drop for SlotBox {
    fn drop(&mut self) {
        // SAFETY: made by `Box::leak`, freed once; the context that knows it is freed before.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// llama.cpp asks whether a node is wanted, and if so comes again when it is computed. `false` then
/// stops this part of the computation.
pub(super) unsafe extern "C" fn on_eval(tensor: *mut sys::ggml_tensor, ask: bool, user: *mut c_void) -> bool {
    let slot = user.cast::<Slot>();
    // SAFETY: `user` is the slot of the context that computes, see `SlotBox`; the observer in it is
    // valid while it is there. The tensor lives and stays as it is during this call.
    let outcome = catch_unwind(AssertUnwindSafe(|| unsafe {
        let (Some(mut observer), None, None) = ((*slot).observer, &(*slot).error, &(*slot).panic) else {
            return false;
        };
        let node = Node(&*tensor);
        if ask {
            return observer.as_mut().wants(&node);
        }
        match observer.as_mut().see(&node) {
            Ok(()) => true,
            Err(e) => {
                (*slot).error = Some(e);
                false
            }
        }
    }));
    outcome.unwrap_or_else(|panic| {
        // SAFETY: as above; the closure is over.
        unsafe { (*slot).panic = Some(panic) };
        false
    })
}
