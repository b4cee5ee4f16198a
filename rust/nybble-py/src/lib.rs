//! The extension module `nybble._nybble`: the core crate's types and errors as Python sees them, and nothing else.
//!
//! One file a concept; `error.rs` is the only place that knows Python's exception classes and the only way into the core
//! (it releases the GIL, watches for Ctrl-C and stops panics). `python/nybble/_nybble.pyi` is the interface in Python's
//! words, compared with this module by mypy's stubtest.

#![forbid(unsafe_code)]
// PyO3 hands over what it converted from Python by value.
#![allow(clippy::needless_pass_by_value)]

mod array;
mod checkpoint;
mod doctor;
mod encoder;
mod error;
mod generator;
mod metadata;
mod model;
mod score;
mod session;
mod solve;
mod sparsity;
mod speculator;
mod staged;
mod writer;

use pyo3::prelude::*;

/// nybble's Rust core.
#[pymodule(gil_used = false)]
mod _nybble {
    #[pymodule_export]
    use super::checkpoint::Checkpoint;
    #[pymodule_export]
    use super::doctor::{doctor, read_bandwidth, version};
    #[pymodule_export]
    use super::encoder::{Encoder, encoder_types};
    #[pymodule_export]
    use super::generator::Generator;
    #[pymodule_export]
    use super::model::Model;
    #[pymodule_export]
    use super::score::{
        AttentionGraph, attention_received, attention_row, best_matches, bipartite, choose_patches, cosines,
        emphasise, informative_heads, pagerank, pagerank_iterations, top_k,
    };
    #[pymodule_export]
    use super::session::Session;
    #[pymodule_export]
    use super::solve::{gptq, rtn, select, sparsegpt};
    #[pymodule_export]
    use super::sparsity::Sparsity;
    #[pymodule_export]
    use super::speculator::{Speculator, build_datastore};
    #[pymodule_export]
    use super::staged::StagedFolder;
    #[pymodule_export]
    use super::writer::SafeTensorsWriter;
}
