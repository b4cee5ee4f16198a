//! Arrays in and out, without copies where numpy's layout allows.

use std::borrow::Cow;

use numpy::ndarray::Dimension;
use numpy::{Element, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray, PyReadonlyArray1};
use nybble::Error;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::exception;

/// A matrix as a numpy array; `values` has `rows * cols` elements.
pub(crate) fn matrix<T: numpy::Element>(
    py: Python<'_>,
    values: Vec<T>,
    rows: usize,
    cols: usize,
) -> PyResult<Bound<'_, PyArray2<T>>> {
    PyArray1::from_vec(py, values).reshape([rows, cols])
}

/// The values of an array, last dimension first; copied where the array has them in another order or with gaps.
pub(crate) fn values<'a, T: Element + Copy, D: Dimension>(
    array: &'a PyReadonlyArray<'_, T, D>,
) -> Cow<'a, [T]> {
    let view = array.as_array();
    match view.to_slice() {
        Some(values) => Cow::Borrowed(values),
        None => Cow::Owned(view.iter().copied().collect()),
    }
}

/// Runs `work` on the bytes of a `bytes`, a numpy array or another object with the buffer protocol.
pub(crate) fn with_bytes<T>(data: &Bound<'_, PyAny>, work: impl FnOnce(&[u8]) -> PyResult<T>) -> PyResult<T> {
    if let Ok(bytes) = data.cast::<PyBytes>() {
        return work(bytes.as_bytes());
    }
    let py = data.py();
    let numpy = py.import("numpy")?;
    // The stable ABI of Python 3.10 has no buffer protocol, so numpy looks at the object. The view is flat and contiguous
    // (a copy where the object is not) and shares the object's memory.
    let flat = numpy.call_method1("ascontiguousarray", (data,))?.call_method1("reshape", (-1,))?;
    let flat = flat.call_method1("view", (numpy.getattr("uint8")?,))?;
    let flat: PyReadonlyArray1<'_, u8> = flat.extract()?;
    match flat.as_slice() {
        Ok(bytes) => work(bytes),
        Err(_) => Err(exception(py, &Error::argument("data", "contiguous bytes", "an array with gaps"))),
    }
}
