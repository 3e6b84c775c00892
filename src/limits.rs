//! What a file may demand of us before we refuse it.

/// Bounds on numbers that come from files. All are checked before anything is allocated.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest JSON or GGUF header, in bytes.
    pub header_bytes: u64,
    /// Longest single string in a header, in bytes.
    pub string_bytes: u64,
    /// Most tensors in a file, and in a checkpoint of many files.
    pub tensors: u64,
    /// Most metadata entries in a GGUF file.
    pub metadata_entries: u64,
    /// Deepest nesting of GGUF arrays.
    pub array_depth: u32,
    /// Most shards of one checkpoint.
    pub shards: u64,
    /// Largest config or tokenizer file, in bytes.
    pub side_file_bytes: u64,
    /// Most bytes of values and states that the executor of Core ML programs holds at a time.
    pub executor_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_bytes: 1 << 30,
            string_bytes: 64 << 20,
            tensors: 1 << 20,
            metadata_entries: 1 << 16,
            array_depth: 2,
            shards: 1 << 16,
            side_file_bytes: 256 << 20,
            executor_bytes: 4 << 30,
        }
    }
}
