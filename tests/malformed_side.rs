//! Hostile files of every kind beside GGUF and safetensors: each is refused with its reason, or accepted as
//! `formats/spec/` says, by the library and by the program, in little time and memory. What pickles and zip
//! archives may say is in `malformed_pytorch.rs`, what `.qpack` files may in `malformed_qpack.rs`.

mod common;
#[path = "common/raw.rs"]
mod raw;
#[path = "common/torch.rs"]
mod torch;

#[path = "common/side/mod.rs"]
mod side;

#[path = "common/side/configs.rs"]
mod configs;
#[path = "common/side/definitions.rs"]
mod definitions;
#[path = "common/side/matrices.rs"]
mod matrices;
#[path = "common/side/pickles.rs"]
mod pickles;
#[path = "common/side/places.rs"]
mod places;
#[path = "common/side/templates.rs"]
mod templates;
#[path = "common/side/tokenizers.rs"]
mod tokenizers;
