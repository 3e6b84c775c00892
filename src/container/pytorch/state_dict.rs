//! The dict of tensors in a pickle, and where each tensor lies within its storage.

use std::collections::HashSet;

use super::globals::shown;
use super::machine::{Object, Pickle, Storage, Tensor, Value};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::{self, DType, Dim, StridedCopy};

/// Most dimensions of a tensor; GGUF has four.
const MAX_DIMS: usize = 8;

/// A tensor of the state dict.
pub struct Entry<'a> {
    pub name: &'a str,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub nbytes: u64,
    /// Index into [`Pickle::storages`].
    pub storage: usize,
    pub place: Place,
}

/// Where a tensor's elements lie in its storage.
pub enum Place {
    /// In order, from this byte on.
    From(u64),
    /// Elsewhere: counted in elements from the storage's first byte.
    Strided(StridedCopy),
}

/// The tensors of `pickle`, in its order.
///
/// # Errors
/// `Unsupported` when there is no dict of tensors, or more than one; `Malformed` for a name that
/// comes twice and a tensor that leaves its storage; `Limit`.
pub fn entries<'a>(pickle: &Pickle<'a>, limits: &Limits) -> Result<Vec<Entry<'a>>> {
    let dict = find(pickle)?;
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    let mut used = HashSet::new();
    for (key, value) in dict {
        let Value::Object(id) = value else { continue };
        let Some(Object::Tensor(tensor)) = pickle.objects.get(*id) else { continue };
        let Value::Text(name) = key else {
            return Err(Error::unsupported("a tensor's key in its dict is no text"));
        };
        if !names.insert(*name) {
            return Err(Error::malformed(format!("tensor {:?} appears twice", shown(name))));
        }
        if entries.len() as u64 >= limits.tensors {
            return Err(Error::limit(format!("more than the {} tensors allowed", limits.tensors)));
        }
        let entry =
            locate(pickle, name, tensor).map_err(|e| e.context(format_args!("tensor {:?}", shown(name))))?;
        entries.push(entry);
        used.insert(*id);
    }
    // What would be left out without a word.
    let all = pickle.objects.iter().filter(|o| matches!(o, Object::Tensor(_))).count();
    if all > used.len() {
        return Err(Error::unsupported(format!(
            "{} of its {all} tensors are not in its dict of tensors",
            all - used.len()
        ))
        .hint("save the state dict alone, or as safetensors"));
    }
    Ok(entries)
}

type Pairs<'a> = [(Value<'a>, Value<'a>)];

/// The one dict that holds tensors: the outermost object, or a dict within dicts from there.
fn find<'p, 'a>(pickle: &'p Pickle<'a>) -> Result<&'p Pairs<'a>> {
    let has_tensors = |dict: &Pairs| {
        dict.iter().any(|(_, v)| match v {
            Value::Object(id) => matches!(pickle.objects.get(*id), Some(Object::Tensor(_))),
            _ => false,
        })
    };
    let mut seen = vec![false; pickle.objects.len()];
    let mut queue = vec![("", pickle.root)];
    let mut found: Vec<(&str, &Pairs)> = Vec::new();
    // Each object is looked at once, however often it is referred to.
    while let Some((key, value)) = queue.pop() {
        let Value::Object(id) = value else { continue };
        let Some(Object::Dict(dict)) = pickle.objects.get(id) else { continue };
        match seen.get_mut(id) {
            Some(seen) if !*seen => *seen = true,
            _ => continue,
        }
        if has_tensors(dict) {
            found.push((key, dict));
        }
        queue.extend(dict.iter().map(|(k, v)| match k {
            Value::Text(key) => (*key, *v),
            _ => ("", *v),
        }));
    }
    match found.as_slice() {
        [(_, dict)] => Ok(dict),
        [] => match (pickle.root, pickle.storages.is_empty()) {
            // A state dict without tensors, as an empty shard has it.
            (Value::Object(id), true) => match pickle.objects.get(id) {
                Some(Object::Dict(dict)) if dict.is_empty() => Ok(dict),
                _ => Err(Error::unsupported("holds no dict of tensors")),
            },
            _ => Err(Error::unsupported("holds no dict of tensors")),
        },
        [(a, _), (b, _), ..] => Err(Error::unsupported(format!(
            "holds {} dicts of tensors: {:?}, {:?} ...",
            found.len(),
            shown(b),
            shown(a)
        ))
        .hint("save the model's state dict alone, or as safetensors")),
    }
}

fn locate<'a>(pickle: &Pickle<'a>, name: &'a str, tensor: &Tensor<'a>) -> Result<Entry<'a>> {
    let storage = pickle.storages.get(tensor.storage).ok_or_else(|| Error::malformed("has no storage"))?;
    let numbers = |value: Value, what: &str| -> Result<Vec<u64>> {
        let items = pickle.items(value).ok_or_else(|| Error::malformed(format!("its {what} is no tuple")))?;
        if items.len() > MAX_DIMS {
            return Err(Error::unsupported(format!("has {} dimensions", items.len())));
        }
        let number = |v: &Value| match v {
            Value::Int(n @ 0..) => Ok(*n as u64),
            _ => Err(Error::malformed(format!("its {what} has an entry that is no size"))),
        };
        items.iter().map(number).collect()
    };
    let shape = numbers(tensor.size, "size")?;
    let strides = numbers(tensor.stride, "stride")?;
    if shape.len() != strides.len() {
        return Err(Error::malformed(format!("has the shape {shape:?} and the strides {strides:?}")));
    }
    let Value::Int(offset @ 0..) = tensor.offset else {
        return Err(Error::malformed("its offset is no size"));
    };
    let (offset, dtype) = (offset as u64, tensor.dtype);
    let elements = tensor::elements(&shape)?;
    let nbytes = dtype.nbytes(&shape)?;
    let bytes = bytes_of(storage)?;
    let numel = bytes / dtype.type_size();
    let entry = |shape, place| Entry { name, dtype, shape, nbytes, storage: tensor.storage, place };
    if elements == 0 {
        return Ok(entry(shape, Place::From(0)));
    }
    // One past the last element.
    let end = shape.iter().zip(&strides).try_fold(offset, |end, (n, stride)| {
        (n - 1).checked_mul(*stride).and_then(|reach| end.checked_add(reach))
    });
    if end.is_none_or(|end| end >= numel) {
        return Err(Error::malformed(format!(
            "its shape {shape:?}, strides {strides:?} and offset {offset} leave its storage of {numel} elements"
        )));
    }
    if elements > numel {
        return Err(Error::unsupported(format!(
            "its shape {shape:?} repeats the {numel} elements of its storage (strides {strides:?})"
        ))
        .hint("save it with .contiguous()"));
    }
    let mut dims = Vec::with_capacity(shape.len());
    let mut dst = 1;
    for (&n, &src) in shape.iter().zip(&strides).rev() {
        dims.push(Dim { n, src, dst });
        dst *= n;
    }
    dims.reverse();
    let copy = StridedCopy::new(dims, offset, 0);
    let place = match copy.dims[..] {
        [] | [Dim { src: 1, .. }] => Place::From(offset * dtype.type_size()),
        _ => Place::Strided(copy),
    };
    Ok(entry(shape, place))
}

/// Bytes of a storage.
///
/// # Errors
/// `Malformed` when they do not fit.
pub fn bytes_of(storage: &Storage) -> Result<u64> {
    storage.dtype.bytes_for(storage.numel)
}
