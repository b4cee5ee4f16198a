//! `Model`.

use std::path::PathBuf;
use std::sync::Arc;

use nybble::format::Access;
use nybble::kernels::attention::KvType;
use nybble::model::LoadOptions;
use nybble::tokens::Policy;
use nybble::{Error, Result};
use pyo3::prelude::*;

use crate::error::{run, run_in_background};
use crate::session::Session;
use crate::sparsity::Sparsity;

/// An open model: immutable, shared by its sessions and by threads.
#[pyclass(frozen, module = "nybble._nybble")]
pub(crate) struct Model {
    core: Arc<nybble::model::Model>,
}

impl Model {
    pub(crate) fn core(&self) -> Arc<nybble::model::Model> {
        Arc::clone(&self.core)
    }
}

#[pymethods]
impl Model {
    /// Opens a folder or a GGUF file. `tokens` is a policy of token reduction as JSON in the place of the folder's own; `null`
    /// for none at all.
    #[staticmethod]
    #[pyo3(signature = (path, threads=None, context=None, kv=None, mmap=true, tokens=None))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        threads: Option<usize>,
        context: Option<usize>,
        kv: Option<&str>,
        mmap: bool,
        tokens: Option<&str>,
    ) -> PyResult<Self> {
        let tokens = run(py, || tokens.map(policy).transpose())?;
        let kv = run(py, || kv.map(KvType::parse).transpose())?;
        let options = LoadOptions { threads, access: access(mmap), kv, context };
        let core = run_in_background(py, move || {
            let model = nybble::model::Model::open(path, &options)?;
            match tokens {
                Some(policy) => model.with_tokens(policy),
                None => Ok(model),
            }
        })?;
        Ok(Self { core: Arc::new(core) })
    }

    /// Sizes, kernels and memory, as JSON.
    fn info(&self, py: Python<'_>) -> PyResult<String> {
        run(py, || to_json(&self.core.info()))
    }

    /// A new, empty session; with `tokens` as for `open`. It takes for zero what `sparsity` says, or else what the folder
    /// says, unless it is `dense`.
    #[pyo3(signature = (tokens=None, sparsity=None, dense=false))]
    fn session(
        &self,
        py: Python<'_>,
        tokens: Option<&str>,
        sparsity: Option<PyRef<'_, Sparsity>>,
        dense: bool,
    ) -> PyResult<Session> {
        let given = sparsity.map(|sparsity| Arc::clone(&sparsity.core));
        let core = run(py, || {
            let policy = tokens.map_or_else(|| Ok(self.core.settings().tokens.clone()), policy)?;
            let sparsity = given.or_else(|| self.core.sparsity().cloned()).filter(|_| !dense);
            self.core.session_with(policy, sparsity)
        })?;
        Ok(Session::new(Arc::clone(&self.core), core))
    }

    /// What the folder takes for zero, if anything.
    fn sparsity(&self) -> Option<Sparsity> {
        self.core.sparsity().map(|core| Sparsity { core: Arc::clone(core) })
    }
}

/// Reads a policy of token reduction, or none for `null`.
fn policy(json: &str) -> Result<Option<Policy>> {
    let value: serde_json::Value =
        serde_json::from_str(json).map_err(|error| Error::argument("tokens", "JSON", error))?;
    if value.is_null() { Ok(None) } else { Policy::read(&value).map(Some) }
}

pub(crate) fn access(mmap: bool) -> Access {
    if mmap { Access::Map } else { Access::Read }
}

pub(crate) fn to_json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::argument("value", "something JSON can hold", error))
}
