//! `StagedFolder`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::Mutex;

use nybble::Error;
use nybble::format::publish;
use pyo3::prelude::*;
use pyo3::types::PyAny;

use crate::error::{exclusively, run};

/// A folder that appears under its final name when it is committed, and not at all otherwise.
#[pyclass(frozen, module = "nybble._nybble")]
pub(crate) struct StagedFolder {
    path: OsString,
    core: Mutex<Option<publish::StagedFolder>>,
}

#[pymethods]
impl StagedFolder {
    #[new]
    #[pyo3(signature = (path, overwrite=false))]
    fn new(py: Python<'_>, path: PathBuf, overwrite: bool) -> PyResult<Self> {
        let core = run(py, || publish::StagedFolder::new(path, overwrite))?;
        Ok(Self { path: core.path().into(), core: Mutex::new(Some(core)) })
    }

    /// The folder to write into.
    #[getter]
    fn path(&self) -> &OsStr {
        &self.path
    }

    /// Gives the folder its final name, once everything in it has reached the disk.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        run(py, || {
            exclusively(&self.core, "folder", |core| match core.take() {
                Some(core) => core.commit(),
                None => Err(Error::argument("folder", "one that is being written", "one that is done with")),
            })
        })
    }

    /// Removes the folder; nothing happens if it was committed.
    fn abort(&self, py: Python<'_>) -> PyResult<()> {
        run(py, || {
            exclusively(&self.core, "folder", |core| {
                drop(core.take());
                Ok(())
            })
        })
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// Leaving the block without a commit removes the folder.
    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _trace: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        self.abort(py)?;
        Ok(false)
    }
}
