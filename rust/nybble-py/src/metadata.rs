//! Metadata of a GGUF file as Python objects.

use std::collections::BTreeMap;

use nybble::format::gguf::{Array, Value};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

/// All of it, by key.
pub(crate) fn to_dict<'py>(
    py: Python<'py>,
    values: &BTreeMap<String, Value>,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (key, value) in values {
        dict.set_item(key, object(py, value)?)?;
    }
    Ok(dict)
}

fn object<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    match value {
        Value::U8(value) => value.into_bound_py_any(py),
        Value::I8(value) => value.into_bound_py_any(py),
        Value::U16(value) => value.into_bound_py_any(py),
        Value::I16(value) => value.into_bound_py_any(py),
        Value::U32(value) => value.into_bound_py_any(py),
        Value::I32(value) => value.into_bound_py_any(py),
        Value::U64(value) => value.into_bound_py_any(py),
        Value::I64(value) => value.into_bound_py_any(py),
        Value::F32(value) => value.into_bound_py_any(py),
        Value::F64(value) => value.into_bound_py_any(py),
        Value::Bool(value) => value.into_bound_py_any(py),
        Value::Text(text) => text.into_bound_py_any(py),
        Value::Array(array) => list(py, array),
    }
}

fn list<'py>(py: Python<'py>, array: &Array) -> PyResult<Bound<'py, PyAny>> {
    let list = match array {
        // As numbers: a list of bytes would become a `bytes`.
        Array::U8(values) => PyList::new(py, values.iter().map(|value| u32::from(*value))),
        Array::I8(values) => PyList::new(py, values),
        Array::U16(values) => PyList::new(py, values),
        Array::I16(values) => PyList::new(py, values),
        Array::U32(values) => PyList::new(py, values),
        Array::I32(values) => PyList::new(py, values),
        Array::U64(values) => PyList::new(py, values),
        Array::I64(values) => PyList::new(py, values),
        Array::F32(values) => PyList::new(py, values),
        Array::F64(values) => PyList::new(py, values),
        Array::Bool(values) => PyList::new(py, values),
        Array::Text(texts) => PyList::new(py, (0..texts.len()).map(|index| texts.get(index))),
    };
    list.map(Bound::into_any)
}
