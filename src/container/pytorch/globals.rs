//! The names that a state dict's pickle may mention. They are looked up here and nowhere else:
//! nothing is imported or called.

use crate::error::{Error, Result};
use crate::tensor::DType;

/// A name that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Global {
    OrderedDict,
    /// `torch.Size`, a tuple.
    Size,
    /// `torch.device`, of no interest.
    Device,
    /// The class of a tensor, as `_rebuild_from_type_v2` mentions it.
    TensorType,
    /// A storage's class with the type of its elements; bytes for an untyped one.
    Storage(DType),
    DType(DType),
    RebuildTensor,
    RebuildTensorV2,
    RebuildTensorV3,
    RebuildParameter,
    RebuildFromType,
}

/// Names of `torch` for each type: its storage's, and those of the type itself.
const TYPES: &[(&str, &[&str], DType)] = &[
    ("FloatStorage", &["float32", "float"], DType::F32),
    ("HalfStorage", &["float16", "half"], DType::F16),
    ("BFloat16Storage", &["bfloat16"], DType::BF16),
    ("DoubleStorage", &["float64", "double"], DType::F64),
    ("CharStorage", &["int8"], DType::I8),
    ("ShortStorage", &["int16", "short"], DType::I16),
    ("IntStorage", &["int32", "int"], DType::I32),
    ("LongStorage", &["int64", "long"], DType::I64),
    ("ByteStorage", &["uint8"], DType::U8),
    ("BoolStorage", &["bool"], DType::Bool),
    ("", &["uint16"], DType::U16),
    ("", &["uint32"], DType::U32),
    ("", &["uint64"], DType::U64),
    ("", &["float8_e4m3fn"], DType::F8_E4M3),
    ("", &["float8_e5m2"], DType::F8_E5M2),
    ("", &["float8_e8m0fnu"], DType::F8_E8M0),
];

impl Global {
    /// What `module.name` is.
    ///
    /// # Errors
    /// `Unsupported`, with the name, for anything that is not on the list.
    pub fn find(module: &str, name: &str) -> Result<Self> {
        let found = match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDict),
            ("torch", "Size") => Some(Self::Size),
            ("torch", "device") => Some(Self::Device),
            ("torch", "Tensor") | ("torch.nn.parameter", "Parameter") => Some(Self::TensorType),
            ("torch._utils", "_rebuild_tensor") => Some(Self::RebuildTensor),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Self::RebuildTensorV2),
            ("torch._utils", "_rebuild_tensor_v3") => Some(Self::RebuildTensorV3),
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                Some(Self::RebuildParameter)
            }
            ("torch._tensor", "_rebuild_from_type_v2") => Some(Self::RebuildFromType),
            ("torch.storage", "UntypedStorage" | "_UntypedStorage") => Some(Self::Storage(DType::U8)),
            ("torch", _) if !name.is_empty() => TYPES.iter().find_map(|&(storage, names, dtype)| {
                if storage == name {
                    Some(Self::Storage(dtype))
                } else {
                    names.contains(&name).then_some(Self::DType(dtype))
                }
            }),
            _ => None,
        };
        found.ok_or_else(|| {
            Error::unsupported(format!("its pickle refers to {}.{}", shown(module), shown(name))).hint(
                "only tensors in dicts are read, nothing is executed: save the state dict alone, or as safetensors",
            )
        })
    }
}

/// What `torch` calls the class of a storage of this type, where it has one (an untyped one holds the
/// others), and the type itself.
pub fn names(dtype: DType) -> Option<(Option<&'static str>, &'static str)> {
    let (storage, names, _) = TYPES.iter().find(|(_, _, t)| *t == dtype)?;
    Some((Some(*storage).filter(|s| !s.is_empty()), names.first()?))
}

/// A name for a message: cut, and without control characters.
pub fn shown(text: &str) -> String {
    const CHARS: usize = 100;
    let mut cut: String = text.chars().take(CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(CHARS).is_some() {
        cut.push_str("...");
    }
    cut
}
