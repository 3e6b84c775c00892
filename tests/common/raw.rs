//! GGUF bytes put together by hand, right or wrong, independently of the library's own writer.
#![allow(dead_code)] // each test uses its part

/// `enum gguf_type`.
pub mod kind {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

/// A file in the making.
#[derive(Clone)]
pub struct Raw {
    pub big_endian: bool,
    pub version: u32,
    pub tensor_count: Option<u64>,
    pub entry_count: Option<u64>,
    pub entries: Vec<Vec<u8>>,
    pub infos: Vec<Vec<u8>>,
    pub alignment: usize,
    pub data: Vec<u8>,
}

impl Raw {
    /// No entries, no tensors.
    pub fn empty() -> Self {
        Self {
            big_endian: false,
            version: 3,
            tensor_count: None,
            entry_count: None,
            entries: Vec::new(),
            infos: Vec::new(),
            alignment: 32,
            data: Vec::new(),
        }
    }

    /// The metadata of a small llama.
    pub fn llama() -> Self {
        Self::empty()
            .text("general.architecture", "llama")
            .u32("llama.block_count", 1)
            .u32("llama.embedding_length", 8)
            .u32("llama.attention.head_count", 2)
    }

    /// The same with three tensors: F32 [4, 8], F16 [16], Q8_0 [2, 32].
    pub fn valid() -> Self {
        let mut raw = Self::llama()
            .info("token_embd.weight", &[8, 4], 0, 0)
            .info("output_norm.weight", &[16], 1, 128)
            .info("blk.0.ffn_up.weight", &[32, 2], 8, 160);
        raw.data = (0..=255).collect();
        raw
    }

    pub fn n32(&self, v: u32) -> Vec<u8> {
        if self.big_endian { v.to_be_bytes().into() } else { v.to_le_bytes().into() }
    }

    pub fn n64(&self, v: u64) -> Vec<u8> {
        if self.big_endian { v.to_be_bytes().into() } else { v.to_le_bytes().into() }
    }

    pub fn string(&self, s: impl AsRef<[u8]>) -> Vec<u8> {
        [self.n64(s.as_ref().len() as u64), s.as_ref().to_vec()].concat()
    }

    pub fn entry(mut self, key: impl AsRef<[u8]>, kind: u32, payload: impl AsRef<[u8]>) -> Self {
        self.entries.push([self.string(key), self.n32(kind), payload.as_ref().to_vec()].concat());
        self
    }

    pub fn text(self, key: &str, value: impl AsRef<[u8]>) -> Self {
        let value = self.string(value);
        self.entry(key, kind::STRING, value)
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        let value = self.n32(value);
        self.entry(key, kind::U32, value)
    }

    /// An array that claims `count` elements of type `element`.
    pub fn array(self, key: &str, element: u32, count: u64, payload: impl AsRef<[u8]>) -> Self {
        let payload = [self.n32(element), self.n64(count), payload.as_ref().to_vec()].concat();
        self.entry(key, kind::ARRAY, payload)
    }

    pub fn strings(self, key: &str, values: &[&[u8]]) -> Self {
        let payload = values.iter().flat_map(|v| self.string(v)).collect::<Vec<_>>();
        self.array(key, kind::STRING, values.len() as u64, payload)
    }

    /// A tensor info; `dims` in the file's order, row length first.
    pub fn info(mut self, name: impl AsRef<[u8]>, dims: &[u64], ggml_type: u32, offset: u64) -> Self {
        let mut info = self.string(name);
        info.extend(self.n32(dims.len() as u32));
        dims.iter().for_each(|d| info.extend(self.n64(*d)));
        info.extend(self.n32(ggml_type));
        info.extend(self.n64(offset));
        self.infos.push(info);
        self
    }

    pub fn with_data(mut self, bytes: usize) -> Self {
        self.data = vec![0; bytes];
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.n32(self.version));
        out.extend(self.n64(self.tensor_count.unwrap_or(self.infos.len() as u64)));
        out.extend(self.n64(self.entry_count.unwrap_or(self.entries.len() as u64)));
        out.extend(self.entries.concat());
        out.extend(self.infos.concat());
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(&self.data);
        out
    }
}
