//! What this machine offers.

use nybble::cpu::{self, Isa};
use nybble::kernels::Kernels;
use nybble::threads::Pool;
use nybble::{Error, probe};
use pyo3::prelude::*;
use serde_json::{Map, Value, json};

use crate::error::run;
use crate::model::to_json;

/// Instruction sets, the kernel chosen for each operation and threads, as JSON.
#[pyfunction]
pub(crate) fn doctor(py: Python<'_>) -> PyResult<String> {
    run(py, || {
        cpu::check_environment()?;
        let tier = |isa: Isa| {
            let found = json!({ "detected": isa.detected(), "allowed": isa.allowed() });
            (isa.name().to_string(), found)
        };
        let tiers: Map<String, Value> = Isa::ALL.into_iter().map(tier).collect();
        to_json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "isa": tiers,
            "best": Isa::best().name(),
            "kernels": Kernels::best().names(),
            "threads_default": Pool::default_threads()?,
        }))
    })
}

/// Bytes a second that `threads` threads read from memory, measured on a buffer of so many megabytes.
#[pyfunction]
pub(crate) fn read_bandwidth(py: Python<'_>, threads: usize, megabytes: usize) -> PyResult<f64> {
    run(py, || {
        let bytes = megabytes.checked_mul(1 << 20).filter(|bytes| (1..=1 << 34).contains(bytes));
        let bytes = bytes.ok_or_else(|| Error::argument("megabytes", "1 to 16384", megabytes))?;
        Ok(probe::read_bandwidth(&Pool::new(threads)?, bytes))
    })
}

/// The version of the core.
#[pyfunction]
pub(crate) fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}
