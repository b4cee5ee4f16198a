//! `Session`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use numpy::{PyArray1, PyArray2, PyReadonlyArray1};
use nybble::decode::{Generation, Request, Sampling};
use nybble::model::Logits;
use nybble::{Error, Result};
use pyo3::prelude::*;

use crate::array::matrix;
use crate::error::{exclusively, run, run_until_signal};
use crate::generator::Generator;
use crate::speculator::Speculator;

/// Values of a layer by their names, `[tokens, width]` each.
type Seen<'py> = BTreeMap<&'static str, Bound<'py, PyArray2<f32>>>;

/// One text in a model, with its keys and values.
#[pyclass(frozen, module = "nybble._nybble")]
pub(crate) struct Session {
    model: Arc<nybble::model::Model>,
    core: Mutex<nybble::model::Session>,
}

impl Session {
    pub(crate) fn new(model: Arc<nybble::model::Model>, core: nybble::model::Session) -> Self {
        Self { model, core: Mutex::new(core) }
    }

    /// Runs `work` with the model and the session.
    pub(crate) fn with<T>(
        &self,
        work: impl FnOnce(&nybble::model::Model, &mut nybble::model::Session) -> Result<T>,
    ) -> Result<T> {
        exclusively(&self.core, "session", |core| work(&self.model, core))
    }
}

#[pymethods]
impl Session {
    /// Computes `ids` after what the session holds; returns the logits wanted: `last`, `all` or `none`. A prompt's tokens may
    /// be reduced by the session's policy.
    #[pyo3(signature = (ids, want="last", prompt=false))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'py, u32>,
        want: &str,
        prompt: bool,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let ids = ids.as_array().to_vec();
        let vocab = self.model.spec().vocab;
        let logits = run_until_signal(py, |stop| {
            let want = match want {
                "last" => Logits::Last,
                "all" => Logits::All,
                "none" => Logits::None,
                _ => return Err(Error::argument("want", "last, all or none", want)),
            };
            let mut logits = Vec::new();
            self.with(|model, session| {
                if prompt {
                    session.prefill(model, &ids, want, &mut logits, stop)
                } else {
                    session.forward(model, &ids, want, &mut logits, stop)
                }
            })?;
            Ok(logits)
        })?;
        let rows = logits.len() / vocab;
        matrix(py, logits, rows, vocab)
    }

    /// Computes `ids`; returns for each layer the values that thresholds are found by, by their names.
    fn observe<'py>(&self, py: Python<'py>, ids: PyReadonlyArray1<'py, u32>) -> PyResult<Vec<Seen<'py>>> {
        let ids = ids.as_array().to_vec();
        let seen = run_until_signal(py, |stop| {
            let mut seen: Vec<BTreeMap<&'static str, Vec<f32>>> = Vec::new();
            self.with(|model, session| {
                let show = &mut |layer: usize, what, values: &[f32]| {
                    seen.resize(seen.len().max(layer + 1), BTreeMap::new());
                    seen[layer].insert(what, values.to_vec());
                };
                session.observe(model, &ids, show, stop)
            })?;
            Ok(seen)
        })?;
        let rows = ids.len().max(1);
        let array = |(what, values): (&'static str, Vec<f32>)| {
            let cols = values.len() / rows;
            matrix(py, values, rows, cols).map(|values| (what, values))
        };
        seen.into_iter().map(|layer| layer.into_iter().map(array).collect()).collect()
    }

    /// The tokens the session holds.
    fn tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let tokens = run(py, || self.with(|_, session| Ok(session.tokens().to_vec())))?;
        Ok(PyArray1::from_vec(py, tokens))
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        run(py, || self.with(|_, session| Ok(session.len())))
    }

    /// Tokens whose keys and values each layer holds.
    fn layer_tokens(&self, py: Python<'_>) -> PyResult<Vec<usize>> {
        run(py, || self.with(|_, session| Ok(session.layer_tokens().collect())))
    }

    /// Bytes of the keys and values held.
    fn kv_bytes(&self, py: Python<'_>) -> PyResult<usize> {
        run(py, || self.with(|_, session| Ok(session.kv_bytes())))
    }

    /// Forgets everything from token `n` on, and the whole of a reduced prompt that `n` lies in; returns what is left.
    fn truncate(&self, py: Python<'_>, n: usize) -> PyResult<usize> {
        run(py, || {
            self.with(|_, session| {
                if n > session.len() {
                    return Err(Error::argument("n", format!("0 to {}", session.len()), n));
                }
                Ok(session.truncate(n))
            })
        })
    }

    /// Prepares a generation after what the session holds; it computes nothing until its first token is asked for.
    #[pyo3(signature = (prompt, max_new, stop=None, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0,
                        repeat_penalty=1.0, repeat_last_n=64, seed=0, speculator=None))]
    #[allow(clippy::too_many_arguments)]
    fn generate(
        slf: Bound<'_, Self>,
        prompt: PyReadonlyArray1<'_, u32>,
        max_new: usize,
        stop: Option<Vec<u32>>,
        temperature: f32,
        top_k: usize,
        top_p: f32,
        min_p: f32,
        repeat_penalty: f32,
        repeat_last_n: usize,
        seed: u64,
        speculator: Option<PyRef<'_, Speculator>>,
    ) -> PyResult<Generator> {
        let prompt = prompt.as_array().to_vec();
        let sampling = Sampling { temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed };
        let request = Request { prompt, max_new, stop: stop.unwrap_or_default(), sampling };
        let session = slf.get();
        let core = run(slf.py(), || session.with(|model, session| Generation::new(model, session, request)))?;
        let speculator = speculator.map(|speculator| Arc::clone(&speculator.core));
        let speculation = run(slf.py(), || {
            speculator.map(|speculator| session.with(|model, _| speculator.speculation(model))).transpose()
        })?;
        Ok(Generator::new(slf.unbind(), core, speculation))
    }
}
