//! The hot loops of compression: plain functions on plain arrays.
//!
//! Nothing here knows about files, models or packing; a method in Python hands over one block of rows at a time and gets
//! integers and scales back. [`rtn`] rounds every weight to the nearest step of the best scale ([`grid`] finds it); [`gptq`]
//! lets the weights not yet rounded make up for the error of those that are. [`select`] takes out the least of scores, and
//! [`sparsegpt`] lets the weights that stay make up for those that go.

pub mod gptq;
pub mod grid;
pub mod rtn;
pub mod select;
pub mod sparsegpt;

pub use gptq::{Gptq, gptq};
pub use grid::Zeros;
pub use rtn::{IntWeights, Rtn, rtn};
pub use select::{Among, select};
pub use sparsegpt::{SparseGpt, sparsegpt};
