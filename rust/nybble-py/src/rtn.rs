//! `rtn`.

use numpy::{PyArray2, PyReadonlyArray2};
use nybble::Error;
use nybble::solve::rtn::{Rtn, Zeros, rtn as core_rtn};
use pyo3::prelude::*;

use crate::array::matrix;
use crate::error::{exception, run};

type Matrix<'py, T> = Bound<'py, PyArray2<T>>;
type Rounded<'py> = (Matrix<'py, u8>, Matrix<'py, f32>, Option<Matrix<'py, f32>>);

/// Rounds a matrix to integers with a scale (and a zero point) for each group of inputs; returns codes, scales and zeros.
#[pyfunction]
#[pyo3(signature = (weights, bits, group, zeros, threads=None))]
pub(crate) fn rtn<'py>(
    py: Python<'py>,
    weights: PyReadonlyArray2<'py, f32>,
    bits: u32,
    group: usize,
    zeros: &str,
    threads: Option<usize>,
) -> PyResult<Rounded<'py>> {
    let (rows, cols) = weights.as_array().dim();
    let Ok(values) = weights.as_slice() else {
        return Err(exception(py, &Error::argument("weights", "a contiguous array", "one with gaps")));
    };
    let zeros = match zeros {
        "middle" => Zeros::Middle,
        "whole" => Zeros::Whole,
        "sixteenths" => Zeros::Sixteenths,
        other => return Err(exception(py, &Error::argument("zeros", "middle, whole or sixteenths", other))),
    };
    let rounded = run(py, || core_rtn(values, rows, cols, &Rtn { bits, group, zeros, threads }))?;
    let groups = rounded.groups;
    Ok((
        matrix(py, rounded.codes, rows, cols)?,
        matrix(py, rounded.scales, rows, groups)?,
        rounded.zeros.map(|zeros| matrix(py, zeros, rows, groups)).transpose()?,
    ))
}
