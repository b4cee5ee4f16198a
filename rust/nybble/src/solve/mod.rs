//! The hot loops of compression: plain functions on plain arrays.
//!
//! Nothing here knows about files, models or packing; a method in Python hands over one block of rows at a time and gets
//! integers and scales back. [`rtn`] rounds every weight to the nearest step of the best scale.

pub mod rtn;

pub use rtn::{IntWeights, Rtn, rtn};
