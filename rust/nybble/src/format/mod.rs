//! Model files: reading them without trusting them, writing them without leaving halves.
//!
//! A model file comes from anywhere, so everything in it is a claim until it is compared with the bytes really present.
//! The readers here share a few habits:
//!
//! - A size, count or offset from a file is checked (no overflow, no more than the bytes left) *before* anything is
//!   allocated or indexed with it, so a 100-byte file can never ask for gigabytes.
//! - Tensors must tile their file without holes or overlaps, names must be unique, and names are only ever dictionary keys:
//!   the one place where a file names another file ([`folder`]) accepts plain file names inside the folder and nothing else.
//! - Nothing that can run code is read. Pickles are recognised and refused.
//! - An error names the file, the tensor or field, what was expected and what was found.
//!
//! What is read: `config.json` and friends ([`json`]), safetensors alone ([`safetensors`]) or as a Hugging Face folder, one
//! file or sharded ([`folder`]), and GGUF ([`gguf`]). [`dtype`] knows the element types and turns them into `f32`.
//! [`writer`] writes safetensors piece by piece, and [`publish`] makes a finished folder appear all at once.
//!
//! Files are memory mapped by default. [`mapped`] says what that costs when another program changes a file meanwhile, and
//! how to do without.

pub mod dtype;
pub mod folder;
pub mod gguf;
pub mod json;
pub mod mapped;
pub mod publish;
pub mod safetensors;
pub mod tensor;
pub mod writer;

mod blocks;
mod foreign;
mod header;
mod index;
mod strict;

pub use dtype::Dtype;
pub use mapped::Access;
pub use tensor::TensorInfo;
