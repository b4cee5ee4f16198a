//! `Encoder`.

use std::path::PathBuf;

use numpy::{PyArray1, PyArray2, PyArray3, PyArrayMethods, PyReadonlyArray4, PyUntypedArrayMethods};
use nybble::kernels::attention::KvType;
use nybble::model::LoadOptions;
use nybble::tokens::PatchPolicy;
use nybble::{Error, Result};
use pyo3::prelude::*;

use crate::array::{matrix, values};
use crate::error::{run, run_in_background, run_until_signal};
use crate::model::{access, to_json};

/// Tokens, embeddings and class scores of images.
type Encoded<'py> = (
    Bound<'py, PyArray3<f32>>,
    Bound<'py, PyArray2<f32>>,
    Bound<'py, PyArray2<f32>>,
    Option<(Bound<'py, PyArray2<u32>>, Bound<'py, PyArray2<u32>>, f64)>,
);

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

    /// Multiplications with additions that an image of that size takes, with a policy as for `encode`.
    #[pyo3(signature = (height, width, tokens=None))]
    fn macs(&self, py: Python<'_>, height: usize, width: usize, tokens: Option<&str>) -> PyResult<u64> {
        run(py, || {
            let spec = self.core.spec();
            let policy = tokens.map(policy).transpose()?;
            if let Some(policy) = &policy {
                policy.check(spec.layers.len(), !spec.prefix.is_empty())?;
            }
            Ok(spec.macs([height, width], policy.as_ref()))
        })
    }

    /// Tokens `[images, tokens, hidden]`, embeddings `[images, embedding]` and class scores `[images, labels]` of
    /// `pixels [images, channels, height, width]`, and with a policy of token reduction (as JSON) which patches the tokens
    /// are, `[images, tokens]` without learned ones, the largest number for what several were merged into; and for each patch
    /// the token that holds it, `[images, patches]`, the largest number for one that left; and the seconds that choosing took.
    #[pyo3(signature = (pixels, tokens=None))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        pixels: PyReadonlyArray4<'py, f32>,
        tokens: Option<&str>,
    ) -> PyResult<Encoded<'py>> {
        let policy = run(py, || tokens.map(policy).transpose())?;
        let shape: [usize; 4] = std::array::from_fn(|i| pixels.shape()[i]);
        let values = values(&pixels);
        let done = run_until_signal(py, |stop| self.core.encode(&values, shape, policy.as_ref(), stop))?;
        let spec = self.core.spec();
        let images = done.images;
        let tokens = (done.tokens.len() / spec.hidden).checked_div(images).unwrap_or(0);
        let patches = done.places.len().checked_div(images).unwrap_or(0);
        let all = done.owners.len().checked_div(images).unwrap_or(0);
        let places = match policy {
            Some(_) => Some((
                matrix(py, done.places, images, patches)?,
                matrix(py, done.owners, images, all)?,
                done.choosing.as_secs_f64(),
            )),
            None => None,
        };
        Ok((
            PyArray1::from_vec(py, done.tokens).reshape([images, tokens, spec.hidden])?,
            matrix(py, done.embedding, images, spec.embedding())?,
            matrix(py, done.logits, images, spec.labels())?,
            places,
        ))
    }
}

/// Reads a policy of token reduction.
pub(crate) fn policy(json: &str) -> Result<PatchPolicy> {
    serde_json::from_str(json).map_err(|error| Error::argument("tokens", "a policy for patches", error))
}

/// The values of `model_type` that mean an image encoder.
#[pyfunction]
pub(crate) fn encoder_types() -> Vec<&'static str> {
    nybble::model::arch::encoder_types()
}
