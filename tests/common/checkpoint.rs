//! Checkpoints put together by hand: tensors as bytes, written without the library's own writer.
#![allow(dead_code)] // each test uses its part

use std::fs;
use std::path::Path;

use qconv::container::safetensors;
use qconv::limits::Limits;
use serde_json::{Map, Value as Json, json};

/// Type as safetensors calls it, shape, data.
pub type Tensor = (String, Vec<u64>, Vec<u8>);

/// Tensors by name, in order, and config.json.
#[derive(Clone)]
pub struct Made {
    pub tensors: Vec<(String, Tensor)>,
    pub config: Json,
}

impl Made {
    pub fn new(config: Json) -> Self {
        Self { tensors: Vec::new(), config }
    }

    /// A model of the fixtures.
    pub fn of(source: &Path) -> Self {
        let config = serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
        let store = safetensors::open(&source.join("model.safetensors"), &Limits::default()).unwrap().store;
        let tensors = store.tensors().iter().map(|t| {
            let bytes = store.read_all(t).unwrap();
            (t.name.clone(), (t.dtype.name().to_string(), t.shape.clone(), bytes))
        });
        Self { tensors: tensors.collect(), config }
    }

    pub fn with(mut self, name: &str, dtype: &str, shape: &[u64], data: impl AsRef<[u8]>) -> Self {
        self.tensors.push((name.into(), (dtype.into(), shape.to_vec(), data.as_ref().to_vec())));
        self
    }

    pub fn quantized(mut self, quantization: Json) -> Self {
        self.config["quantization_config"] = quantization;
        self
    }

    pub fn get(&mut self, name: &str) -> &mut Tensor {
        let found = self.tensors.iter_mut().find(|(n, _)| n == name);
        &mut found.unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    pub fn take(&mut self, name: &str) -> Tensor {
        let at = self.tensors.iter().position(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}"));
        self.tensors.remove(at).1
    }

    pub fn safetensors(&self) -> Vec<u8> {
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let end = data.len() + bytes.len();
            header.insert(
                name.clone(),
                json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), end]}),
            );
            data.extend(bytes);
        }
        let mut header = Json::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
    }

    /// Writes weights and config into `dir`, with the tokenizer of `like`.
    pub fn write(&self, dir: &Path, like: &Path) {
        fs::create_dir_all(dir).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"] {
            if like.join(name).exists() {
                fs::copy(like.join(name), dir.join(name)).unwrap();
            }
        }
        fs::write(dir.join("model.safetensors"), self.safetensors()).unwrap();
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
    }
}

/// Little-endian bytes.
pub fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn i32_bytes(values: impl IntoIterator<Item = u32>) -> Vec<u8> {
    values.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Numbers that only look random.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }

    /// From -1 to 1, exact in BF16 and F16.
    pub fn value(&mut self) -> f32 {
        (self.below(255) as f32 - 127.0) / 128.0
    }
}
