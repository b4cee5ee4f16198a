//! nybble's core: small transformers, fast on the CPU you have. No Python in here.

#![deny(missing_docs)]

pub mod cpu;
pub mod decode;
pub mod error;
pub mod format;
pub mod kernels;
pub mod model;
pub mod pack;
pub mod probe;
pub mod score;
pub mod solve;
pub mod speculate;
pub mod threads;
pub mod tokens;

pub use error::{Error, Result};
