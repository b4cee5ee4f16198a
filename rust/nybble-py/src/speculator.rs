//! `Speculator`, and datastores of text.

use std::path::PathBuf;
use std::sync::Arc;

use numpy::PyReadonlyArray1;
use nybble::Error;
use nybble::speculate::{Datastore, Settings, Times};
use pyo3::prelude::*;

use crate::error::run;
use crate::model::{Model, to_json};

/// Speculation for the texts of a model, and what they learn together.
#[pyclass(frozen, module = "nybble._nybble")]
pub(crate) struct Speculator {
    pub(crate) core: Arc<nybble::speculate::Speculator>,
}

#[pymethods]
impl Speculator {
    /// Speculation for `model`; `settings` are JSON.
    #[new]
    fn new(py: Python<'_>, model: PyRef<'_, Model>, settings: &str) -> PyResult<Self> {
        let model = model.core();
        let core = run(py, || nybble::speculate::Speculator::new(&model, Settings::read(settings)?))?;
        Ok(Self { core: Arc::new(core) })
    }

    /// The settings, as JSON.
    fn settings(&self, py: Python<'_>) -> PyResult<String> {
        run(py, || to_json(self.core.settings()))
    }

    /// Rows computed together and seconds, if they were measured.
    fn times(&self) -> Option<Vec<(usize, f64)>> {
        self.core.times().map(|times| times.points().to_vec())
    }

    /// Makes known what was measured earlier.
    fn set_times(&self, py: Python<'_>, times: Vec<(usize, f64)>) -> PyResult<()> {
        run(py, || {
            let wrong =
                || Error::argument("times", "ascending rows from 1 on, with positive seconds", "others");
            self.core.set_times(Times::known(times).ok_or_else(wrong)?);
            Ok(())
        })
    }

    /// Probabilities that the candidates of a token are right at a depth, as seen so far.
    fn ranks(&self, depth: usize) -> Vec<f32> {
        self.core.ranks(depth)
    }

    /// Saves the adjacency matrix.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        run(py, || self.core.save_matrix(&path))
    }

    /// Forgets what was learned, but not what was measured.
    fn forget(&self) {
        self.core.forget();
    }
}

/// Writes a datastore of tokens to a file.
#[pyfunction]
pub(crate) fn build_datastore(
    py: Python<'_>,
    path: PathBuf,
    tokens: PyReadonlyArray1<'_, u32>,
    vocab: usize,
) -> PyResult<()> {
    let tokens = tokens.as_array().to_vec();
    run(py, || Datastore::build(&path, &tokens, vocab))
}
