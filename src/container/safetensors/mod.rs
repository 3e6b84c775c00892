//! Safetensors: Hugging Face's tensor format, single files and shards with an index.
