//! `rtn`, `gptq`, `select` and `sparsegpt`.

use numpy::{PyArray2, PyReadonlyArray1, PyReadonlyArray2};
use nybble::Error;
use nybble::solve::sparsegpt::Pattern;
use nybble::solve::{Among, Gptq, IntWeights, Rtn, SparseGpt, Zeros};
use nybble::solve::{gptq as core_gptq, rtn as core_rtn, select as core_select, sparsegpt as core_sparsegpt};
use pyo3::prelude::*;

use crate::array::{matrix, values};
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
    let weights = values(&weights);
    let zeros = zero_points(py, zeros)?;
    let rounded = run(py, || core_rtn(&weights, rows, cols, &Rtn { bits, group, zeros, threads }))?;
    arrays(py, rounded, rows, cols)
}

/// Rounds a matrix as `rtn` does, one column after another, the later ones making up for the earlier ones' errors.
#[pyfunction]
#[pyo3(signature = (weights, bits, group, zeros, factor, order=None, importance=None, threads=None))]
#[allow(clippy::too_many_arguments)] // Python passes them by name
pub(crate) fn gptq<'py>(
    py: Python<'py>,
    weights: PyReadonlyArray2<'py, f32>,
    bits: u32,
    group: usize,
    zeros: &str,
    factor: PyReadonlyArray2<'py, f32>,
    order: Option<PyReadonlyArray1<'py, u32>>,
    importance: Option<PyReadonlyArray1<'py, f32>>,
    threads: Option<usize>,
) -> PyResult<Rounded<'py>> {
    let (rows, cols) = weights.as_array().dim();
    let (weights, factor) = (values(&weights), values(&factor));
    let zeros = zero_points(py, zeros)?;
    let order = order.as_ref().map(values);
    let importance = importance.as_ref().map(values).unwrap_or_default();
    let order = order.as_deref();
    let settings = Gptq { bits, group, zeros, factor: &factor, order, importance: &importance, threads };
    let rounded = run(py, || core_gptq(&weights, rows, cols, &settings))?;
    arrays(py, rounded, rows, cols)
}

/// Marks with 1 what stays of a matrix of scores: all but `drop` of each `of` neighbours, of each row, or of the whole.
#[pyfunction]
#[pyo3(signature = (scores, drop, among, threads=None))]
pub(crate) fn select<'py>(
    py: Python<'py>,
    scores: PyReadonlyArray2<'py, f32>,
    drop: usize,
    among: &Bound<'py, PyAny>,
    threads: Option<usize>,
) -> PyResult<Matrix<'py, u8>> {
    let (rows, cols) = scores.as_array().dim();
    let scores = values(&scores);
    let among = match among.extract::<usize>() {
        Ok(of) => Among::Neighbours { drop, of },
        Err(_) => match among.extract::<&str>()? {
            "all" => Among::All(drop),
            "row" => Among::Row(drop),
            other => return Err(exception(py, &Error::argument("among", "all, row or a number", other))),
        },
    };
    let keep = run(py, || core_select(&scores, rows, cols, among, threads))?;
    matrix(py, keep, rows, cols)
}

/// Takes weights out of a matrix, the later columns making up for it; returns the weights and marks with 1 what stays.
#[pyfunction]
#[pyo3(signature = (weights, factor, share=None, neighbours=None, block=128, threads=None))]
pub(crate) fn sparsegpt<'py>(
    py: Python<'py>,
    weights: PyReadonlyArray2<'py, f32>,
    factor: PyReadonlyArray2<'py, f32>,
    share: Option<f64>,
    neighbours: Option<(usize, usize)>,
    block: usize,
    threads: Option<usize>,
) -> PyResult<(Matrix<'py, f32>, Matrix<'py, u8>)> {
    let (rows, cols) = weights.as_array().dim();
    let (weights, factor) = (values(&weights), values(&factor));
    let pattern = match (share, neighbours) {
        (Some(share), None) => Pattern::Share(share),
        (None, Some((drop, of))) => Pattern::Neighbours { drop, of },
        _ => {
            return Err(exception(py, &Error::argument("pattern", "share or neighbours", "both or neither")));
        }
    };
    let settings = SparseGpt { pattern, factor: &factor, block, threads };
    let (sparse, keep) = run(py, || core_sparsegpt(&weights, rows, cols, &settings))?;
    Ok((matrix(py, sparse, rows, cols)?, matrix(py, keep, rows, cols)?))
}

fn zero_points(py: Python<'_>, name: &str) -> PyResult<Zeros> {
    match name {
        "middle" => Ok(Zeros::Middle),
        "whole" => Ok(Zeros::Whole),
        "sixteenths" => Ok(Zeros::Sixteenths),
        other => Err(exception(py, &Error::argument("zeros", "middle, whole or sixteenths", other))),
    }
}

fn arrays(py: Python<'_>, rounded: IntWeights, rows: usize, cols: usize) -> PyResult<Rounded<'_>> {
    let groups = rounded.groups;
    Ok((
        matrix(py, rounded.codes, rows, cols)?,
        matrix(py, rounded.scales, rows, groups)?,
        rounded.zeros.map(|zeros| matrix(py, zeros, rows, groups)).transpose()?,
    ))
}
