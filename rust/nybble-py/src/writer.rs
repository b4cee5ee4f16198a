//! `SafeTensorsWriter`.

use std::path::PathBuf;
use std::sync::Mutex;

use nybble::format::{Dtype, writer};
use nybble::{Error, Result};
use pyo3::prelude::*;

use crate::array::with_bytes;
use crate::error::{exclusively, run};

/// A safetensors file being written; it is removed unless it is finished.
#[pyclass(frozen, module = "nybble._nybble")]
pub(crate) struct SafeTensorsWriter {
    core: Mutex<Option<writer::SafeTensorsWriter>>,
}

impl SafeTensorsWriter {
    fn with<T>(&self, work: impl FnOnce(&mut Option<writer::SafeTensorsWriter>) -> Result<T>) -> Result<T> {
        exclusively(&self.core, "writer", |core| {
            if core.is_none() {
                return Err(Error::argument("writer", "an unfinished file", "a finished one"));
            }
            work(core)
        })
    }
}

#[pymethods]
impl SafeTensorsWriter {
    #[new]
    fn new(py: Python<'_>, path: PathBuf, entries: Vec<(String, String, Vec<usize>)>) -> PyResult<Self> {
        let core = run(py, || {
            let typed = |(name, dtype, shape): (String, String, Vec<usize>)| {
                let unknown = || {
                    Error::unsupported(format!("the type {dtype:?} of {name}"), "F32, F16, BF16, I32, ...")
                };
                Dtype::from_safetensors(&dtype).ok_or_else(unknown).map(|dtype| (name, dtype, shape))
            };
            let entries = entries.into_iter().map(typed).collect::<Result<Vec<_>>>()?;
            writer::SafeTensorsWriter::create(path, entries)
        })?;
        Ok(Self { core: Mutex::new(Some(core)) })
    }

    /// Writes a whole tensor.
    fn write(&self, py: Python<'_>, name: &str, data: &Bound<'_, PyAny>) -> PyResult<()> {
        with_bytes(data, |bytes| {
            run(py, || self.with(|core| core.as_mut().map_or(Ok(()), |core| core.write(name, bytes))))
        })
    }

    /// Writes the part of a tensor that starts `offset` bytes into it.
    fn write_at(&self, py: Python<'_>, name: &str, offset: usize, data: &Bound<'_, PyAny>) -> PyResult<()> {
        with_bytes(data, |bytes| {
            run(py, || {
                self.with(|core| core.as_mut().map_or(Ok(()), |core| core.write_at(name, offset, bytes)))
            })
        })
    }

    /// Checks that every byte was written and waits until all have reached the disk.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        run(py, || self.with(|core| core.take().map_or(Ok(()), writer::SafeTensorsWriter::finish)))
    }
}
