//! `Encoder`.

use std::path::PathBuf;

use numpy::{PyArray1, PyArray2, PyArray3, PyArrayMethods, PyReadonlyArray4, PyUntypedArrayMethods};
use nybble::kernels::attention::KvType;
use nybble::model::LoadOptions;
use pyo3::prelude::*;

use crate::array::{matrix, values};
use crate::error::{run, run_in_background, run_until_signal};
use crate::model::{access, to_json};

/// Tokens, embeddings and class scores of images.
type Encoded<'py> = (Bound<'py, PyArray3<f32>>, Bound<'py, PyArray2<f32>>, Bound<'py, PyArray2<f32>>);

/// An open image encoder.
#[pyclass(frozen, module = "nybble._nybble")]
pub(crate) struct Encoder {
    core: nybble::model::Encoder,
}

#[pymethods]
impl Encoder {
    /// Opens a folder.
    #[staticmethod]
    #[pyo3(signature = (path, threads=None, kv=None, mmap=true))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        threads: Option<usize>,
        kv: Option<&str>,
        mmap: bool,
    ) -> PyResult<Self> {
        let kv = run(py, || kv.map(KvType::parse).transpose())?;
        let options = LoadOptions { threads, access: access(mmap), kv, context: None };
        let core = run_in_background(py, move || nybble::model::Encoder::open(path, &options))?;
        Ok(Self { core })
    }

    /// Sizes, kernels and memory, as JSON.
    fn info(&self, py: Python<'_>) -> PyResult<String> {
        run(py, || to_json(&self.core.info()))
    }

    /// Tokens `[images, tokens, hidden]`, embeddings `[images, embedding]` and class scores `[images, labels]` of
    /// `pixels [images, channels, height, width]`.
    fn encode<'py>(&self, py: Python<'py>, pixels: PyReadonlyArray4<'py, f32>) -> PyResult<Encoded<'py>> {
        let shape: [usize; 4] = std::array::from_fn(|i| pixels.shape()[i]);
        let values = values(&pixels);
        let done = run_until_signal(py, |stop| self.core.encode(&values, shape, stop))?;
        let spec = self.core.spec();
        let images = done.images;
        let tokens = (done.tokens.len() / spec.hidden).checked_div(images).unwrap_or(0);
        Ok((
            PyArray1::from_vec(py, done.tokens).reshape([images, tokens, spec.hidden])?,
            matrix(py, done.embedding, images, spec.embedding())?,
            matrix(py, done.logits, images, spec.labels())?,
        ))
    }
}

/// The values of `model_type` that mean an image encoder.
#[pyfunction]
pub(crate) fn encoder_types() -> Vec<&'static str> {
    nybble::model::arch::encoder_types()
}
