//! Model files: what is read, what is refused and with which words, and what is written.

mod badfiles;

#[path = "format/dequantize.rs"]
mod dequantize;
#[path = "format/folder.rs"]
mod folder;
#[path = "format/gguf.rs"]
mod gguf;
#[path = "format/json.rs"]
mod json;
#[path = "format/limits.rs"]
mod limits;
#[path = "format/properties.rs"]
mod properties;
#[path = "format/publish.rs"]
mod publish;
#[path = "format/safetensors.rs"]
mod safetensors;
#[path = "format/sweeps.rs"]
mod sweeps;
#[path = "format/writer.rs"]
mod writer;
