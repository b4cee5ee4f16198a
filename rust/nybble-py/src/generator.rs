//! `Generator`.

use std::sync::Mutex;

use nybble::decode::{FinishReason, Generation};
use nybble::speculate::Speculation;
use pyo3::prelude::*;

use crate::error::{exclusively, run, run_until_signal};
use crate::model::to_json;
use crate::session::Session;

/// The tokens of one generation, computed one by one as they are asked for.
#[pyclass(frozen, module = "nybble._nybble")]
pub(crate) struct Generator {
    session: Py<Session>,
    core: Mutex<(Generation, Option<Speculation>)>,
}

impl Generator {
    pub(crate) fn new(session: Py<Session>, core: Generation, speculation: Option<Speculation>) -> Self {
        Self { session, core: Mutex::new((core, speculation)) }
    }
}

#[pymethods]
impl Generator {
    /// Why it ended: `length`, `stop` or `context`; none while it has not.
    #[getter]
    fn finish_reason(&self, py: Python<'_>) -> PyResult<Option<&'static str>> {
        run(py, || {
            exclusively(&self.core, "generator", |(core, _)| Ok(core.finish_reason().map(FinishReason::name)))
        })
    }

    /// Tokens and seconds of each phase, as JSON.
    fn metrics(&self, py: Python<'_>) -> PyResult<String> {
        run(py, || exclusively(&self.core, "generator", |(core, _)| to_json(core.metrics())))
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<u32>> {
        let session = self.session.get();
        run_until_signal(py, |stop| {
            exclusively(&self.core, "generator", |(core, speculation)| {
                session.with(|model, session| match speculation {
                    Some(speculation) => speculation.step(core, model, session, stop),
                    None => core.step(model, session, stop),
                })
            })
        })
    }
}
