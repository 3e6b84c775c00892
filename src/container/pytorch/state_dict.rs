//! The dict of tensors in a pickle, and where each tensor lies within its storage.

use std::borrow::Cow;
use std::collections::HashSet;

use serde_json::{Map, Value as Json, json};

use super::globals::Global;
use super::globals::shown;
use super::machine::{Object, Pickle, Storage, Tensor, Value};
use crate::error::{Error, Result};
use crate::limits::{Bound, Limits};
use crate::tensor::{self, DType, Dim, StridedCopy};

/// Most dimensions of a tensor; GGUF has four.
const MAX_DIMS: usize = 8;
/// Most bytes of all names that are put together.
const MAX_NAMES: usize = 64 << 20;
/// Longest text and list among plain values.
const MAX_TEXT: usize = 64;
/// How often all storages can be named over, and how many bytes can be however often: whoever goes through
/// tensors does work for each name.
const MAX_SHARE: u64 = 64;
const SHARED: u64 = 1 << 20;
/// What marks a module of HQQ in a dict of modules.
const MARK: &str = "W_q";

/// A tensor of the state dict.
pub struct Entry<'a> {
    pub name: Cow<'a, str>,
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

/// The tensors of `pickle`, in its order; and, where there is a dict for each module as HQQ's own
/// library saves them, the numbers and words in these.
///
/// # Errors
/// `Unsupported` when there is no dict of tensors, or more than one; `Malformed` for a name that
/// comes twice and a tensor that leaves its storage; `Limit`, also where many tensors lie over each other.
pub fn read<'a>(pickle: &Pickle<'a>, limits: &Limits) -> Result<(Vec<Entry<'a>>, Map<String, Json>)> {
    let (dict, in_modules) = match find(pickle)? {
        Found::Tensors(dict) => {
            (dict.iter().map(|(k, v)| (k.text().map(Cow::Borrowed), *v)).collect(), false)
        }
        Found::Modules(id) => (flatten(pickle, id)?, true),
    };
    let mut entries = Vec::new();
    let mut values = Map::new();
    let mut names = HashSet::new();
    let mut used = HashSet::new();
    let stored = pickle.storages.iter().try_fold(0u64, |n, s| Ok(n.saturating_add(bytes_of(s)?)))?;
    let most = stored.saturating_mul(MAX_SHARE).max(SHARED);
    let mut named = 0u64;
    for (name, value) in dict {
        let tensor = match value {
            Value::Object(id) => pickle.objects.get(id).map(|object| (id, object)),
            _ => None,
        };
        let Some((id, Object::Tensor(tensor))) = tensor else {
            if let (true, Some(name), Some(value)) = (in_modules, name, plain(pickle, value)) {
                values.insert(name.into_owned(), value);
            }
            continue;
        };
        let name = name.ok_or_else(|| Error::unsupported("a tensor's key in its dict is no text"))?;
        if !names.insert(name.clone()) {
            return Err(Error::malformed(format!("tensor {:?} appears twice", shown(&name))));
        }
        if entries.len() as u64 >= limits.tensors {
            return Err(Bound::Tensors.reached(format!("more than the {} tensors allowed", limits.tensors)));
        }
        let entry =
            locate(pickle, tensor).map_err(|e| e.context(format_args!("tensor {:?}", shown(&name))))?;
        named = named.saturating_add(entry.nbytes);
        if named > most {
            return Err(Error::limit(format!(
                "its tensors have {named} bytes and more over storages of {stored}, at most {MAX_SHARE} times as many are allowed"
            ))
            .tensor(&name)
            .hint("save each tensor once"));
        }
        entries.push(Entry { name, ..entry });
        used.insert(id);
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
    Ok((entries, values))
}

/// All that lies in dicts within a dict, by its keys with dots between. Memory stays in proportion to
/// the pickle: each dict counts once, and names that many share are not copied without end.
fn flatten<'a>(pickle: &Pickle<'a>, root: usize) -> Result<Vec<(Option<Cow<'a, str>>, Value<'a>)>> {
    let mut seen = vec![false; pickle.objects.len()];
    let mut bytes = 0;
    let mut flat = Vec::new();
    let mut stack = vec![(String::new(), root, 0)];
    while let Some((prefix, id, at)) = stack.pop() {
        let Some(Object::Dict(dict)) = pickle.objects.get(id) else { continue };
        let Some((key, value)) = dict.get(at) else { continue };
        let key = key.text().ok_or_else(|| Error::unsupported("a key in a dict of modules is no text"))?;
        bytes += prefix.len() + key.len();
        if bytes > MAX_NAMES {
            return Err(Error::limit(format!("its names have more than {MAX_NAMES} bytes")));
        }
        let name = if prefix.is_empty() { key.to_string() } else { format!("{prefix}.{key}") };
        stack.push((prefix, id, at + 1));
        match value {
            Value::Object(id) if matches!(pickle.objects.get(*id), Some(Object::Dict(_))) => {
                match seen.get_mut(*id) {
                    Some(seen) if !*seen => *seen = true,
                    _ => {
                        return Err(Error::malformed(format!("the dict of {:?} comes twice", shown(&name))));
                    }
                }
                stack.push((name, *id, 0));
            }
            _ => flat.push((Some(Cow::Owned(name)), *value)),
        }
    }
    Ok(flat)
}

/// A number, a word, or a few numbers.
fn plain(pickle: &Pickle, value: Value) -> Option<Json> {
    match value {
        Value::Int(n) => Some(json!(n)),
        Value::Bool(b) => Some(json!(b)),
        Value::Float(x) => Some(json!(x)),
        Value::Text(text) if text.len() <= MAX_TEXT => Some(json!(text)),
        Value::Global(Global::DType(dtype)) => Some(json!(dtype.name())),
        _ => {
            let number = |v: &Value| match v {
                Value::Int(n) => Some(*n),
                _ => None,
            };
            let items = pickle.items(value).filter(|items| items.len() <= MAX_DIMS)?;
            items.iter().map(number).collect::<Option<Vec<_>>>().map(Json::from)
        }
    }
}

enum Found<'p, 'a> {
    Tensors(&'p Pairs<'a>),
    /// The outermost object, which holds a dict for each module.
    Modules(usize),
}

type Pairs<'a> = [(Value<'a>, Value<'a>)];

/// The one dict that holds tensors: the outermost object, or a dict within dicts from there; or
/// modules of HQQ.
fn find<'p, 'a>(pickle: &'p Pickle<'a>) -> Result<Found<'p, 'a>> {
    let has_tensors = |dict: &Pairs| {
        dict.iter().any(|(_, v)| match v {
            Value::Object(id) => matches!(pickle.objects.get(*id), Some(Object::Tensor(_))),
            _ => false,
        })
    };
    let root = match pickle.root {
        Value::Object(id) => Some(id),
        _ => None,
    };
    let mut is_hqq = false;
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
            is_hqq |= Some(id) != root && dict.iter().any(|(k, _)| k.text() == Some(MARK));
        }
        queue.extend(dict.iter().map(|(k, v)| (k.text().unwrap_or(""), *v)));
    }
    match found.as_slice() {
        _ if is_hqq => Ok(Found::Modules(root.unwrap_or(0))),
        [(_, dict)] => Ok(Found::Tensors(dict)),
        [] => match (pickle.root, pickle.storages.is_empty()) {
            // A state dict without tensors, as an empty shard has it.
            (Value::Object(id), true) => match pickle.objects.get(id) {
                Some(Object::Dict(dict)) if dict.is_empty() => Ok(Found::Tensors(dict)),
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

/// The entry without its name.
fn locate<'a>(pickle: &Pickle<'a>, tensor: &Tensor<'a>) -> Result<Entry<'a>> {
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
    let entry =
        |shape, place| Entry { name: Cow::default(), dtype, shape, nbytes, storage: tensor.storage, place };
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
