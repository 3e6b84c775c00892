//! What ggml's own reader makes of the header of a GGUF file, for tests to compare ours with.

use std::ffi::CStr;
use std::path::Path;
use std::ptr::{NonNull, null_mut};

use llama_cpp_sys_2 as sys;

use super::{c_path, init};
use crate::container::gguf::{Array, Metadata, Value, ValueType};
use crate::error::{Error, Result};

/// A header as ggml has it.
#[derive(Clone, Debug)]
pub struct Listing {
    /// Version of the format.
    pub version: u32,
    /// Alignment of the data, in bytes.
    pub alignment: u64,
    /// Where the data begins, in bytes.
    pub data_offset: u64,
    /// In file order. The library gives texts as C strings: they end before the first NUL.
    pub metadata: Metadata,
    /// In file order.
    pub tensors: Vec<Listed>,
}

/// A tensor as ggml has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: Vec<u8>,
    /// `ne`: its shape, the row length first, 1 behind its last dimension.
    pub ne: [i64; 4],
    /// `enum ggml_type`.
    pub type_id: u32,
    /// First byte within the data.
    pub offset: u64,
    /// `ggml_nbytes`.
    pub bytes: u64,
}

/// An opened header.
struct Opened(NonNull<sys::gguf_context>);

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: it came from `gguf_init_from_file`, and is freed once.
        unsafe { sys::gguf_free(self.0.as_ptr()) };
    }
}

/// Opens the header of the file at `path` by `gguf_init_from_file`, without data; `None` where ggml refuses it.
///
/// The library ends the process at some files that contradict themselves: give it those that
/// [`Gguf::open`](crate::container::gguf::Gguf::open) takes.
///
/// # Errors
/// `Misuse` for a path that C cannot have; `Unsupported` for value types that ggml has and we have not; as [`init`].
pub fn list(path: &Path) -> Result<Option<Listing>> {
    init()?;
    let path = c_path(path)?;
    let params = sys::gguf_init_params { no_alloc: true, ctx: null_mut() };
    // SAFETY: the path is a C string; no context for tensors is asked for.
    let opened = unsafe { sys::gguf_init_from_file(path.as_ptr(), params) };
    let Some(opened) = NonNull::new(opened).map(Opened) else { return Ok(None) };
    let ctx = opened.0.as_ptr();
    // SAFETY: `ctx` is open until `opened` is dropped; these read numbers of it.
    let (version, alignment, data_offset, entries, count) = unsafe {
        (
            sys::gguf_get_version(ctx),
            sys::gguf_get_alignment(ctx) as u64,
            sys::gguf_get_data_offset(ctx) as u64,
            sys::gguf_get_n_kv(ctx),
            sys::gguf_get_n_tensors(ctx),
        )
    };
    let mut metadata = Metadata::default();
    for id in 0..entries {
        // SAFETY: `id` is below the number of entries; keys are C strings that live as long as `ctx`.
        let key = unsafe { CStr::from_ptr(sys::gguf_get_key(ctx, id)) }.to_string_lossy().into_owned();
        let value = opened.value(id).map_err(|e| e.context(format_args!("metadata {key:?}")))?;
        metadata.set(key, value);
    }
    // SAFETY: ids are below the number of tensors; names are C strings, and `ne` four numbers, that live as long as
    // `ctx` and are copied here.
    let tensor = |id| unsafe {
        let ne = std::slice::from_raw_parts(sys::gguf_get_tensor_ne(ctx, id), 4);
        Listed {
            name: CStr::from_ptr(sys::gguf_get_tensor_name(ctx, id)).to_bytes().to_vec(),
            ne: std::array::from_fn(|i| ne[i]),
            type_id: sys::gguf_get_tensor_type(ctx, id),
            offset: sys::gguf_get_tensor_offset(ctx, id) as u64,
            bytes: sys::gguf_get_tensor_size(ctx, id) as u64,
        }
    };
    let tensors = (0..count).map(tensor).collect();
    Ok(Some(Listing { version, alignment, data_offset, metadata, tensors }))
}

impl Opened {
    /// The value of entry `id`, which is below the number of entries.
    fn value(&self, id: i64) -> Result<Value> {
        use ValueType as T;
        let ctx = self.0.as_ptr();
        // SAFETY: the entry is there.
        let kind = known(unsafe { sys::gguf_get_kv_type(ctx, id) })?;
        if kind == T::Array {
            return self.array(id).map(Value::Array);
        }
        // SAFETY: the entry is there, and of the type that is asked for; a text is a C string that lives as long as
        // `ctx`, and is copied.
        Ok(unsafe {
            match kind {
                T::U8 => Value::U8(sys::gguf_get_val_u8(ctx, id)),
                T::I8 => Value::I8(sys::gguf_get_val_i8(ctx, id)),
                T::U16 => Value::U16(sys::gguf_get_val_u16(ctx, id)),
                T::I16 => Value::I16(sys::gguf_get_val_i16(ctx, id)),
                T::U32 => Value::U32(sys::gguf_get_val_u32(ctx, id)),
                T::I32 => Value::I32(sys::gguf_get_val_i32(ctx, id)),
                T::F32 => Value::F32(sys::gguf_get_val_f32(ctx, id)),
                T::Bool => Value::Bool(sys::gguf_get_val_bool(ctx, id)),
                T::U64 => Value::U64(sys::gguf_get_val_u64(ctx, id)),
                T::I64 => Value::I64(sys::gguf_get_val_i64(ctx, id)),
                T::F64 => Value::F64(sys::gguf_get_val_f64(ctx, id)),
                T::String => {
                    Value::String(CStr::from_ptr(sys::gguf_get_val_str(ctx, id)).to_bytes().to_vec())
                }
                T::Array => return Err(Error::unsupported("an array")), // it was looked for above
            }
        })
    }

    /// The array of entry `id`, which is one.
    fn array(&self, id: i64) -> Result<Array> {
        use ValueType as T;
        let ctx = self.0.as_ptr();
        // SAFETY: the entry is there, and an array.
        let (kind, n) = unsafe { (known(sys::gguf_get_arr_type(ctx, id))?, sys::gguf_get_arr_n(ctx, id)) };
        if kind == T::String {
            // SAFETY: the elements are texts, `i` is below their number; they are C strings, and copied.
            let text = |i| unsafe { CStr::from_ptr(sys::gguf_get_arr_str(ctx, id, i)) }.to_bytes().to_vec();
            return Ok(Array::String((0..n).map(text).collect()));
        }
        let width = match kind {
            T::U8 | T::I8 | T::Bool => 1,
            T::U16 | T::I16 => 2,
            T::U32 | T::I32 | T::F32 => 4,
            T::U64 | T::I64 | T::F64 => 8,
            T::String | T::Array => return Err(Error::unsupported("an array of arrays")),
        };
        let bytes = match n {
            0 => &[][..],
            // SAFETY: the elements are no texts: they are `n` numbers of this width, one behind the other, that live
            // as long as `ctx`.
            _ => unsafe { std::slice::from_raw_parts(sys::gguf_get_arr_data(ctx, id).cast(), n * width) },
        };
        macro_rules! numbers {
            ($type:ty) => {
                bytes.as_chunks().0.iter().map(|b| <$type>::from_ne_bytes(*b)).collect()
            };
        }
        Ok(match kind {
            T::U8 => Array::U8(numbers!(u8)),
            T::I8 => Array::I8(numbers!(i8)),
            T::U16 => Array::U16(numbers!(u16)),
            T::I16 => Array::I16(numbers!(i16)),
            T::U32 => Array::U32(numbers!(u32)),
            T::I32 => Array::I32(numbers!(i32)),
            T::F32 => Array::F32(numbers!(f32)),
            T::U64 => Array::U64(numbers!(u64)),
            T::I64 => Array::I64(numbers!(i64)),
            T::F64 => Array::F64(numbers!(f64)),
            _ => Array::Bool(bytes.iter().map(|b| *b != 0).collect()),
        })
    }
}

fn known(id: sys::gguf_type) -> Result<ValueType> {
    ValueType::from_id(id).ok_or_else(|| Error::unsupported(format!("value type {id} is not known")))
}
