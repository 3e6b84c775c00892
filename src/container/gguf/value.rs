//! GGUF metadata: typed values under unique keys, in file order.

use indexmap::IndexMap;

macro_rules! value_types {
    ($($variant:ident($rust:ty) = $id:literal $name:literal;)*) => {
        /// `enum gguf_type` (gguf.h).
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum ValueType { $($variant,)* Array }

        impl ValueType {
            /// The number in the file.
            pub const fn id(self) -> u32 {
                match self { $(Self::$variant => $id,)* Self::Array => 9 }
            }

            /// The type with that number.
            pub const fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$variant),)* 9 => Some(Self::Array), _ => None }
            }

            /// gguf-py's name: `UINT32`, `STRING`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* Self::Array => "ARRAY" }
            }
        }

        /// One metadata value. Strings are bytes: GGUF promises UTF-8, some vocabularies break it.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs)]
        pub enum Value { $($variant($rust),)* Array(Array) }

        impl Value {
            /// Its type.
            pub fn value_type(&self) -> ValueType {
                match self { $(Self::$variant(_) => ValueType::$variant,)* Self::Array(_) => ValueType::Array }
            }
        }

        /// An array whose elements all have one type. An array of arrays may mix element types.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs)]
        pub enum Array { $($variant(Vec<$rust>),)* Array(Vec<Array>) }

        impl Array {
            /// Type of the elements.
            pub fn element_type(&self) -> ValueType {
                match self { $(Self::$variant(_) => ValueType::$variant,)* Self::Array(_) => ValueType::Array }
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                match self { $(Self::$variant(v) => v.len(),)* Self::Array(v) => v.len() }
            }

            /// Whether there are no elements.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// Element `i` as a value of its own.
            pub fn get(&self, i: usize) -> Option<Value> {
                match self {
                    $(Self::$variant(v) => v.get(i).cloned().map(Value::$variant),)*
                    Self::Array(v) => v.get(i).cloned().map(Value::Array),
                }
            }
        }
    };
}

value_types! {
    U8(u8) = 0 "UINT8";
    I8(i8) = 1 "INT8";
    U16(u16) = 2 "UINT16";
    I16(i16) = 3 "INT16";
    U32(u32) = 4 "UINT32";
    I32(i32) = 5 "INT32";
    F32(f32) = 6 "FLOAT32";
    Bool(bool) = 7 "BOOL";
    String(Vec<u8>) = 8 "STRING";
    U64(u64) = 10 "UINT64";
    I64(i64) = 11 "INT64";
    F64(f64) = 12 "FLOAT64";
}

impl Value {
    /// The text, if this is a string of valid UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(s) => std::str::from_utf8(s).ok(),
            _ => None,
        }
    }

    /// The number, if this is an integer (of any width) that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            Self::I8(v) => v.try_into().ok(),
            Self::I16(v) => v.try_into().ok(),
            Self::I32(v) => v.try_into().ok(),
            Self::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// The number, if this is an integer or a float.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => Some(v.into()),
            Self::F64(v) => Some(v),
            Self::I8(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            Self::I64(v) => Some(v as f64),
            _ => self.as_u64().map(|v| v as f64),
        }
    }

    /// The truth value, if this is one.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// The array, if this is one.
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Self::Array(a) => Some(a),
            _ => None,
        }
    }
}

impl From<&str> for Value {
    fn from(s: &str) -> Self {
        Self::String(s.as_bytes().to_vec())
    }
}

impl From<String> for Value {
    fn from(s: String) -> Self {
        Self::String(s.into_bytes())
    }
}

/// Shows scalars plainly, and arrays as their first elements with the number of the rest.
impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::U8(v) => write!(f, "{v}"),
            Self::I8(v) => write!(f, "{v}"),
            Self::U16(v) => write!(f, "{v}"),
            Self::I16(v) => write!(f, "{v}"),
            Self::U32(v) => write!(f, "{v}"),
            Self::I32(v) => write!(f, "{v}"),
            Self::F32(v) => write!(f, "{v}"),
            Self::Bool(v) => write!(f, "{v}"),
            Self::U64(v) => write!(f, "{v}"),
            Self::I64(v) => write!(f, "{v}"),
            Self::F64(v) => write!(f, "{v}"),
            Self::String(v) => write!(f, "{:?}", String::from_utf8_lossy(v)),
            Self::Array(a) => {
                const SHOWN: usize = 6;
                f.write_str("[")?;
                for i in 0..a.len().min(SHOWN) {
                    if i > 0 {
                        f.write_str(", ")?;
                    }
                    if let Some(v) = a.get(i) {
                        write!(f, "{v}")?;
                    }
                }
                if a.len() > SHOWN {
                    write!(f, ", ... {} more", a.len() - SHOWN)?;
                }
                f.write_str("]")
            }
        }
    }
}

/// Metadata in file order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(pub IndexMap<String, Value>);

impl Metadata {
    /// The value under `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// Sets `key`; a new key goes to the end, an old one keeps its place.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.0.insert(key.into(), value.into());
    }

    /// Removes `key`, keeping the order of the others.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        self.0.shift_remove(key)
    }

    /// All entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// The text under `key`.
    pub fn str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// The non-negative integer under `key`.
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }
}
