//! `Sparsity`.

use std::sync::Arc;

use numpy::{PyArray1, PyReadonlyArray1};
use nybble::Error;
use nybble::model::sparsity::{INPUTS, LayerThresholds, Measured};
use pyo3::prelude::*;

use crate::error::run;
use crate::model::{Model, to_json};

/// What a model takes for zero, and where skipping it pays.
#[pyclass(frozen, module = "nybble._nybble")]
pub(crate) struct Sparsity {
    pub(crate) core: Arc<nybble::model::Sparsity>,
}

/// A layer's thresholds of neurons, those of inputs, and the share of neurons that is active.
type Given<'py> = (Option<PyReadonlyArray1<'py, f32>>, [f32; INPUTS], f32);
type Told<'py> = (Option<Bound<'py, PyArray1<f32>>>, [f32; INPUTS], f32);

#[pymethods]
impl Sparsity {
    /// Thresholds for `model`, layer by layer.
    #[new]
    fn new(py: Python<'_>, model: PyRef<'_, Model>, layers: Vec<Given<'_>>) -> PyResult<Self> {
        let layer = |(neurons, inputs, active): &Given<'_>| LayerThresholds {
            neurons: neurons.as_ref().map(|neurons| neurons.as_array().to_vec()).unwrap_or_default(),
            inputs: *inputs,
            active: *active,
        };
        let layers = layers.iter().map(layer).collect();
        let model = model.core();
        Ok(Self { core: run(py, || model.sparsity_of(layers))? })
    }

    /// The thresholds.
    fn thresholds<'py>(&self, py: Python<'py>) -> Vec<Told<'py>> {
        let layer = |layer: &LayerThresholds| {
            let neurons = &layer.neurons;
            let neurons = (!neurons.is_empty()).then(|| PyArray1::from_slice(py, neurons));
            (neurons, layer.inputs, layer.active)
        };
        self.core.thresholds().iter().map(layer).collect()
    }

    /// Measures where skipping pays, or uses times `known` from earlier; returns the times, as JSON, if there is anything to
    /// skip. Their `speedup` of whole tokens belongs to these thresholds, unlike the others.
    #[pyo3(signature = (model, known=None))]
    fn probe(
        &self,
        py: Python<'_>,
        model: PyRef<'_, Model>,
        known: Option<&str>,
    ) -> PyResult<Option<String>> {
        let model = model.core();
        run(py, || {
            let read = |known| serde_json::from_str::<Measured>(known);
            let known =
                known.map(read).transpose().map_err(|error| Error::argument("known", "times", error))?;
            model.probe_sparsity(&self.core, known)?.map(to_json).transpose()
        })
    }

    /// Layers that skip neurons when few enough are active.
    fn sparse_layers(&self) -> usize {
        self.core.sparse_layers()
    }

    /// Linears that skip columns when few enough of their inputs are other than 0.
    fn sparse_linears(&self) -> usize {
        self.core.sparse_linears()
    }

    /// Bytes of memory that this takes.
    fn bytes(&self) -> usize {
        self.core.bytes()
    }
}
