//! `Checkpoint`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use numpy::PyArray2;
use nybble::Error;
use nybble::model::arch::Builder;
use nybble::model::spec::{
    AttentionSpec, BlockNorms, EmbeddingSpec, Inventory, LayerSpec, LinearSpec, NormSpec, Qkv,
};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use serde_json::{Value, json};

use crate::array::matrix;
use crate::error::{exception, run};
use crate::metadata;
use crate::model::{access, to_json};

/// A model's files: a configuration and named tensors.
#[pyclass(frozen, module = "nybble._nybble")]
pub(crate) struct Checkpoint {
    core: nybble::model::Checkpoint,
}

#[pymethods]
impl Checkpoint {
    /// Opens a folder or a GGUF file.
    #[staticmethod]
    #[pyo3(signature = (path, mmap=true))]
    fn open(py: Python<'_>, path: PathBuf, mmap: bool) -> PyResult<Self> {
        let core = run(py, || nybble::model::Checkpoint::open(path, access(mmap)))?;
        Ok(Self { core })
    }

    /// `folder` or `gguf`.
    #[getter]
    fn kind(&self) -> &'static str {
        if self.core.gguf().is_some() { "gguf" } else { "folder" }
    }

    /// The configuration, as JSON.
    fn config(&self, py: Python<'_>) -> PyResult<String> {
        run(py, || to_json(self.core.config()))
    }

    /// Type and shape of every tensor.
    fn tensors(&self) -> BTreeMap<&str, (&'static str, Vec<usize>)> {
        let tensors = self.core.tensors().iter();
        tensors.map(|(name, tensor)| (name.as_str(), (tensor.dtype.name(), tensor.shape.clone()))).collect()
    }

    /// Rows `start..stop` of a tensor as f32; a tensor of one dimension is one row.
    #[pyo3(signature = (name, start=0, stop=None))]
    fn read<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        start: usize,
        stop: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (values, rows, cols) = run(py, || {
            let tensor = self.core.tensor(name)?;
            let (len, width) = tensor.matrix();
            let vector = tensor.shape.len() < 2;
            let (rows, cols) = if vector { (1, len) } else { (len, width) };
            let stop = stop.unwrap_or(rows);
            if start > stop || stop > rows {
                return Err(Error::argument(
                    "rows",
                    format!("a range within 0..{rows}"),
                    format!("{start}..{stop}"),
                ));
            }
            let mut values = Vec::new();
            // The core counts the elements of a vector as its rows.
            let range = if !vector {
                start..stop
            } else if start < stop {
                0..len
            } else {
                0..0
            };
            self.core.read_f32(name, range, &mut values)?;
            Ok((values, stop - start, cols))
        })?;
        matrix(py, values, rows, cols)
    }

    /// A copy of a tensor's stored bytes.
    fn raw<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = self.core.raw(name).and_then(|bytes| {
            let detail = "the file keeps them in another order; read the values instead";
            bytes.ok_or_else(|| Error::unsupported(format!("copying the bytes of {name}"), detail))
        });
        bytes.map(|bytes| PyBytes::new(py, bytes)).map_err(|error| exception(py, &error))
    }

    /// What there is to compress and what a model needs, as JSON.
    fn plan(&self, py: Python<'_>) -> PyResult<String> {
        run(py, || {
            let plan = match self.core.arch().spec {
                Builder::Decoder(_) => {
                    let spec = self.core.spec()?;
                    plan("decoder", spec.family, spec.tied, &spec.inventory(), &spec.layers)
                }
                Builder::Encoder(_) => {
                    let spec = self.core.encoder_spec()?;
                    plan("encoder", spec.family, false, &spec.inventory(), &spec.layers)
                }
            };
            to_json(&plan)
        })
    }

    /// The metadata of a GGUF file; empty for a folder.
    fn gguf_metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        match self.core.gguf() {
            Some(gguf) => metadata::to_dict(py, gguf.metadata()),
            None => Ok(PyDict::new(py)),
        }
    }
}

fn plan(kind: &str, family: &str, tied: bool, weights: &Inventory<'_>, layers: &[LayerSpec]) -> Value {
    let linear = |linear: &LinearSpec| {
        json!({
            "module": linear.module,
            "rows": linear.rows,
            "cols": linear.cols,
            "bias": linear.bias,
            "transposed": linear.transposed,
            "role": linear.role.name(),
        })
    };
    let embedding =
        |table: &EmbeddingSpec| json!({ "module": table.module, "rows": table.rows, "cols": table.cols });
    let mut tensors = Vec::new();
    for linear in &weights.linears {
        tensors.push(linear.weight());
        if linear.bias {
            tensors.push(format!("{}.bias", linear.module));
        }
    }
    tensors.extend(weights.embeddings.iter().map(|table| table.weight()));
    for norm in &weights.norms {
        if norm.affine {
            tensors.push(format!("{}.weight", norm.module));
        }
        if norm.has_bias() {
            tensors.push(format!("{}.bias", norm.module));
        }
    }
    tensors.extend(weights.tensors.iter().map(|tensor| tensor.name.clone()));
    json!({
        "kind": kind,
        "family": family,
        "linears": weights.linears.iter().copied().map(linear).collect::<Vec<_>>(),
        "embeddings": weights.embeddings.iter().copied().map(embedding).collect::<Vec<_>>(),
        "tied": tied,
        "tensors": tensors,
        "layers": layers.iter().map(layer).collect::<Vec<_>>(),
    })
}

/// How the parts of a layer hang together, by the names of the linears: what calibration walks through, and what may be
/// rescaled without changing the function.
fn layer(layer: &LayerSpec) -> Value {
    json!({
        "attention": layer.attention.as_ref().map(attention),
        "attention_norms": norms(&layer.attention_norms),
        "mlp": layer.mlp.as_ref().map(|mlp| json!({
            "gate": mlp.gate.as_ref().map(|gate| &gate.module),
            "up": mlp.up.module,
            "down": mlp.down.module,
            "activation": mlp.activation.name(),
        })),
        "mlp_norms": norms(&layer.mlp_norms),
    })
}

fn attention(attention: &AttentionSpec) -> Value {
    let layout = match &attention.qkv {
        Qkv::Separate { .. } => "separate",
        Qkv::Fused { per_head: true, .. } => "per_head",
        Qkv::Fused { per_head: false, .. } => "stacked",
    };
    json!({
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "groups": attention.groups,
        "head_dim": attention.head_dim,
        "layout": layout,
        "qkv": attention.qkv.linears().iter().map(|linear| &linear.module).collect::<Vec<_>>(),
        "out": attention.out.module,
    })
}

fn norms(norms: &BlockNorms) -> Value {
    let norm =
        |norm: &NormSpec| json!({ "module": norm.module, "affine": norm.affine, "plus_one": norm.plus_one });
    json!({
        "pre": norms.pre.as_ref().map(norm),
        "post": norms.post.as_ref().map(norm),
        "residual_is_normed": norms.residual_is_normed,
    })
}
