//! Scores of tokens.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use numpy::{PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3};
use nybble::kernels::Kernels;
use nybble::kernels::attention::Graph;
use nybble::score::similarity::Features;
use nybble::score::{self, Matrices, PageRank, Recorded, Start, heads, similarity};
use nybble::threads::Pool;
use nybble::tokens::patches::{Evidence, Wants};
use nybble::tokens::select::highest;
use nybble::{Error, Result};
use pyo3::prelude::*;

use crate::array::{matrix, values};
use crate::error::run;

type Row<'py, T> = Bound<'py, PyArray1<T>>;
type Matrix<'py> = Bound<'py, PyArray2<f32>>;

/// Threads are kept: starting them would take longer than most of these functions.
static POOLS: LazyLock<Mutex<BTreeMap<usize, Arc<Pool>>>> = LazyLock::new(Mutex::default);

fn pool(threads: Option<usize>) -> Result<Arc<Pool>> {
    let threads = threads.map_or_else(Pool::default_threads, Ok)?;
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = pools.get(&threads) {
        return Ok(Arc::clone(pool));
    }
    let pool = Arc::new(Pool::new(threads)?);
    pools.insert(threads, Arc::clone(&pool));
    Ok(pool)
}

/// Scores `[heads, n]` and the steps of each head.
#[pyfunction]
#[pyo3(signature = (attention, iterations, tolerance, damping, token=None, factor=None, extrapolate=false, threads=None))]
#[allow(clippy::too_many_arguments)] // Python passes them by name
pub(crate) fn pagerank<'py>(
    py: Python<'py>,
    attention: PyReadonlyArray3<'py, f32>,
    iterations: usize,
    tolerance: f32,
    damping: f32,
    token: Option<usize>,
    factor: Option<f32>,
    extrapolate: bool,
    threads: Option<usize>,
) -> PyResult<(Matrix<'py>, Vec<usize>)> {
    let (heads, n, columns) = attention.as_array().dim();
    let attention = values(&attention);
    let settings = PageRank { iterations, tolerance, damping, start: start(token, factor, n), extrapolate };
    let ranks = run(py, || {
        square(n, columns)?;
        let votes = Matrices::new(Kernels::best().elementwise, &attention, heads, n)?;
        score::pagerank(&*pool(threads)?, &votes, &settings)
    })?;
    Ok((matrix(py, ranks.scores, heads, n)?, ranks.iterations))
}

/// Attention as a graph whose probabilities take a byte or two.
#[pyclass(frozen, module = "nybble._nybble")]
pub(crate) struct AttentionGraph {
    core: Graph,
}

#[pymethods]
impl AttentionGraph {
    /// The graph of `attention [heads, n, n]`.
    #[new]
    #[pyo3(signature = (attention, threads=None))]
    fn new(py: Python<'_>, attention: PyReadonlyArray3<'_, f32>, threads: Option<usize>) -> PyResult<Self> {
        let (heads, n, columns) = attention.as_array().dim();
        let attention = values(&attention);
        let core = run(py, || {
            square(n, columns)?;
            Graph::from_f32(&*pool(threads)?, Kernels::best().attention, &attention, heads, n)
        })?;
        Ok(Self { core })
    }

    /// Heads and tokens.
    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.core.heads(), self.core.len())
    }

    /// Scores `[heads, n]` and the steps of each head.
    #[pyo3(signature = (iterations, tolerance, damping, token=None, factor=None, extrapolate=false, threads=None))]
    #[allow(clippy::too_many_arguments)] // Python passes them by name
    fn pagerank<'py>(
        &self,
        py: Python<'py>,
        iterations: usize,
        tolerance: f32,
        damping: f32,
        token: Option<usize>,
        factor: Option<f32>,
        extrapolate: bool,
        threads: Option<usize>,
    ) -> PyResult<(Matrix<'py>, Vec<usize>)> {
        let (heads, n) = self.shape();
        let settings =
            PageRank { iterations, tolerance, damping, start: start(token, factor, n), extrapolate };
        let ranks = run(py, || {
            let votes = Recorded { kernel: Kernels::best().attention, graph: &self.core };
            score::pagerank(&*pool(threads)?, &votes, &settings)
        })?;
        Ok((matrix(py, ranks.scores, heads, n)?, ranks.iterations))
    }
}

fn start(token: Option<usize>, factor: Option<f32>, n: usize) -> Start {
    match token {
        None => Start::Uniform,
        Some(token) => Start::Emphasised { token, factor: factor.unwrap_or((n as f32).sqrt()) },
    }
}

fn square(rows: usize, columns: usize) -> Result<()> {
    if rows == columns {
        return Ok(());
    }
    Err(Error::argument("attention", "as many keys as queries", format!("{rows} x {columns}")))
}

/// Steps behind a layer.
#[pyfunction]
pub(crate) fn pagerank_iterations(layer: usize, depth: usize) -> usize {
    score::pagerank::iterations(layer, depth)
}

/// The mean over heads and queries of what each token is given.
#[pyfunction]
#[pyo3(signature = (attention, threads=None))]
pub(crate) fn attention_received<'py>(
    py: Python<'py>,
    attention: PyReadonlyArray3<'py, f32>,
    threads: Option<usize>,
) -> PyResult<Row<'py, f32>> {
    let (heads, n, columns) = attention.as_array().dim();
    let attention = values(&attention);
    let scores = run(py, || {
        square(n, columns)?;
        score::received(&*pool(threads)?, Kernels::best().elementwise, &attention, heads, n)
    })?;
    Ok(PyArray1::from_vec(py, scores))
}

/// The mean over heads of what one query gives.
#[pyfunction]
pub(crate) fn attention_row<'py>(
    py: Python<'py>,
    attention: PyReadonlyArray3<'py, f32>,
    query: usize,
) -> PyResult<Row<'py, f32>> {
    let (heads, n, columns) = attention.as_array().dim();
    let attention = values(&attention);
    let scores = run(py, || {
        square(n, columns)?;
        score::query_row(Kernels::best().elementwise, &attention, heads, n, query)
    })?;
    Ok(PyArray1::from_vec(py, scores))
}

/// Which heads have a variance between the two.
#[pyfunction]
pub(crate) fn informative_heads(
    py: Python<'_>,
    scores: PyReadonlyArray2<'_, f32>,
    least: f32,
    most: f32,
) -> PyResult<Vec<bool>> {
    let heads = scores.as_array().dim().0;
    let scores = values(&scores);
    run(py, || heads::informative(&scores, heads, least..=most))
}

/// The root mean square of the kept heads.
#[pyfunction]
pub(crate) fn emphasise<'py>(
    py: Python<'py>,
    scores: PyReadonlyArray2<'py, f32>,
    kept: Vec<bool>,
) -> PyResult<Row<'py, f32>> {
    let heads = scores.as_array().dim().0;
    let scores = values(&scores);
    let scores = run(py, || heads::emphasise(&scores, heads, &kept))?;
    Ok(PyArray1::from_vec(py, scores))
}

/// Cosines of the rows of two matrices.
#[pyfunction]
#[pyo3(signature = (a, b, threads=None))]
pub(crate) fn cosines<'py>(
    py: Python<'py>,
    a: PyReadonlyArray2<'py, f32>,
    b: PyReadonlyArray2<'py, f32>,
    threads: Option<usize>,
) -> PyResult<Matrix<'py>> {
    let ((rows, dim), (cols, other)) = (a.as_array().dim(), b.as_array().dim());
    let (a, b) = (values(&a), values(&b));
    let found = run(py, || {
        same_width(dim, other)?;
        similarity::cosines(&*pool(threads)?, &Kernels::best(), a.into_owned(), b.into_owned(), dim)
    })?;
    matrix(py, found, rows, cols)
}

fn same_width(a: usize, b: usize) -> Result<()> {
    if a == b { Ok(()) } else { Err(Error::argument("features", format!("rows of {a} values"), b)) }
}

/// For each row of `a` the row of `b` most like it, and the cosine.
#[pyfunction]
#[pyo3(signature = (a, b, threads=None))]
pub(crate) fn best_matches<'py>(
    py: Python<'py>,
    a: PyReadonlyArray2<'py, f32>,
    b: PyReadonlyArray2<'py, f32>,
    threads: Option<usize>,
) -> PyResult<(Row<'py, usize>, Row<'py, f32>)> {
    let (dim, other) = (a.as_array().dim().1, b.as_array().dim().1);
    let (a, b) = (values(&a), values(&b));
    let found = run(py, || {
        same_width(dim, other)?;
        similarity::matches(&*pool(threads)?, &Kernels::best(), a.into_owned(), b.into_owned(), dim)
    })?;
    Ok((PyArray1::from_vec(py, found.best), PyArray1::from_vec(py, found.cosine)))
}

/// `ToMe`'s pairs: tokens that go, and those they go into.
#[pyfunction]
#[pyo3(signature = (features, count, protected=0, threads=None))]
pub(crate) fn bipartite<'py>(
    py: Python<'py>,
    features: PyReadonlyArray2<'py, f32>,
    count: usize,
    protected: usize,
    threads: Option<usize>,
) -> PyResult<(Row<'py, usize>, Row<'py, usize>)> {
    let dim = features.as_array().dim().1;
    let features = values(&features);
    let pairs = run(py, || {
        similarity::bipartite(&*pool(threads)?, &Kernels::best(), &features, dim, count, protected)
    })?;
    Ok((PyArray1::from_vec(py, pairs.from), PyArray1::from_vec(py, pairs.into)))
}

/// The places of the highest scores, in ascending order.
#[pyfunction]
pub(crate) fn top_k<'py>(
    py: Python<'py>,
    scores: PyReadonlyArray1<'py, f32>,
    k: usize,
) -> PyResult<Row<'py, usize>> {
    let scores = values(&scores);
    let keep = run(py, || {
        let mut keep = Vec::new();
        highest(&scores, k, &mut keep);
        Ok(keep)
    })?;
    Ok(PyArray1::from_vec(py, keep))
}

/// Which of `n` tokens stay behind a layer, ascending, as a policy (JSON) has it: `attention [heads, n, n]` and `keys
/// [n, dim]` of all heads side by side are the layer's, and the first `learned` tokens stay. None where all stay.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // Python passes them by name
pub(crate) fn choose_patches<'py>(
    py: Python<'py>,
    policy: &str,
    layer: usize,
    depth: usize,
    image: usize,
    attention: PyReadonlyArray3<'py, f32>,
    keys: PyReadonlyArray2<'py, f32>,
    learned: usize,
) -> PyResult<Option<Vec<usize>>> {
    let (heads, n, columns) = attention.as_array().dim();
    let (attention, (rows, dim), keys) = (values(&attention), keys.as_array().dim(), values(&keys));
    let keys = Features { values: &keys, stride: dim, dim };
    run(py, || {
        square(n, columns)?;
        if rows != n || learned > n {
            return Err(Error::argument("keys", format!("{n} rows, {learned} of them learned"), rows));
        }
        let policy = crate::encoder::policy(policy)?;
        policy.check(depth, learned > 0)?;
        let (pool, kernels) = (pool(None)?, Kernels::best());
        let Some(budget) = policy.budget(layer, n - learned) else { return Ok(None) };
        let graph;
        let mut evidence =
            Evidence { layer: (layer, depth), image, keys, heads, learned, ..Evidence::default() };
        let scores = match policy.method.wants() {
            Wants::Nothing | Wants::Keys => Vec::new(),
            Wants::Received => score::received(&pool, kernels.elementwise, &attention, heads, n)?,
            Wants::ClassRow => score::query_row(kernels.elementwise, &attention, heads, n, 0)?,
            Wants::Graph => {
                graph = Graph::from_f32(&pool, kernels.attention, &attention, heads, n)?;
                evidence.graph = Some(&graph);
                Vec::new()
            }
        };
        evidence.scores = &scores;
        let plan = policy.method.plan(&pool, &kernels, &evidence, n, budget)?;
        let whole = plan.rows().all(|(own, parts)| own.is_some() && parts.len() == 1);
        if !whole {
            return Err(Error::unsupported("merging tokens here", "only a choice of tokens is returned"));
        }
        Ok(Some(plan.rows().filter_map(|row| row.0).collect()))
    })
}
