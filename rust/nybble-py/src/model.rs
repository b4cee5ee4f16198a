//! `Model`.

use std::path::PathBuf;
use std::sync::Arc;

use nybble::format::Access;
use nybble::kernels::attention::KvType;
use nybble::model::LoadOptions;
use nybble::{Error, Result};
use pyo3::prelude::*;

use crate::error::{run, run_in_background};
use crate::session::Session;

/// An open model: immutable, shared by its sessions and by threads.
#[pyclass(frozen, module = "nybble._nybble")]
pub(crate) struct Model {
    core: Arc<nybble::model::Model>,
}

#[pymethods]
impl Model {
    /// Opens a folder or a GGUF file.
    #[staticmethod]
    #[pyo3(signature = (path, threads=None, context=None, kv=None, mmap=true))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        threads: Option<usize>,
        context: Option<usize>,
        kv: Option<&str>,
        mmap: bool,
    ) -> PyResult<Self> {
        let kv = run(py, || kv.map(KvType::parse).transpose())?;
        let options = LoadOptions { threads, access: access(mmap), kv, context };
        let core = run_in_background(py, move || nybble::model::Model::open(path, &options))?;
        Ok(Self { core: Arc::new(core) })
    }

    /// Sizes, kernels and memory, as JSON.
    fn info(&self, py: Python<'_>) -> PyResult<String> {
        run(py, || to_json(&self.core.info()))
    }

    /// A new, empty session.
    fn session(&self, py: Python<'_>) -> PyResult<Session> {
        let core = run(py, || Ok(self.core.session()))?;
        Ok(Session::new(Arc::clone(&self.core), core))
    }
}

pub(crate) fn access(mmap: bool) -> Access {
    if mmap { Access::Map } else { Access::Read }
}

pub(crate) fn to_json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::argument("value", "something JSON can hold", error))
}
