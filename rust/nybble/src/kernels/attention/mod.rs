//! Attention over a KV cache, causal or not, for one new token and for many.
//!
//! Scores of a query with all keys are never stored. Keys are taken in blocks of [`KEYS`] positions, and a running softmax
//! keeps the largest score so far, the sum of weights and the weighted sum of values; a block with a larger score fades what
//! was summed before (Milakov and Gimelshein, "Online normalizer calculation for softmax"; blocks as in `FlashAttention`,
//! arXiv 2205.14135).
//!
//! Blocks form spans of [`SPAN`] positions. Every span starts a running softmax of its own, and what the spans leave is
//! merged from the first to the last. With many queries one task does all of that in a row. A single token in a long context
//! has too few heads to keep all threads busy; then the spans are tasks of their own, and the same merges in the same order
//! follow when all are done.
//!
//! Block and span boundaries are multiples of [`KEYS`] and [`SPAN`] counted from position 0, and the arithmetic of one query
//! and head depends on nothing but its own position and the cache. So a token's output has the same bits whether it is
//! computed alone, with 200 others, in chunks, or on any number of threads; speculation relies on that.
//!
//! Both products, query with keys and weights with values, are the panel loop of [`super::f32`]. Rows of a panel are the
//! queries of a task *and* the heads that share keys, so grouped heads load each key once. A row's sums run over exactly
//! the keys it sees: what a position must not see is never read for it, not even multiplied by 0.

mod block;
mod branches;
mod cache;
pub mod codes;
mod graph;
mod log2;
mod softmax;
mod statistics;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

pub use branches::Branches;
pub use cache::{KvCache, KvType};
pub use codes::attend_codes;
pub(crate) use graph::Small;
pub use graph::{Given, Graph, Record};
pub use statistics::{Statistic, statistics};

use super::Columns;
use super::elementwise::tiers::listed;
use super::quantize::Activations;
use crate::cpu::Isa;
use crate::error::{Error, Result};
use crate::threads::Pool;
use cache::Lines;

/// Keys of a block.
pub(crate) const KEYS: usize = 64;

/// Positions of a span: short enough that a context worth splitting has several, long enough that a merge is nothing beside
/// the span itself.
const SPAN: usize = 4 * KEYS;

/// Queries times heads that one task takes through the keys together: a multiple of every tier's rows. Their queries, sums
/// and a block of keys and values stay in the second-level cache.
const TASK_ROWS: usize = 60;

/// Tasks a thread should have to choose from, so that the last one to finish does not keep the others waiting.
const TASKS_PER_THREAD: usize = 4;

/// How the heads of a layer attend.
#[derive(Debug, Clone, Copy)]
pub struct Shape<'a> {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; `heads / kv_heads` neighbouring heads share one, where `groups` does not say otherwise.
    pub kv_heads: usize,
    /// The first query head of each key head, ascending, and behind the last one `heads`.
    pub groups: Option<&'a [usize]>,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of every score, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Whether a query sees the keys up to its own position only, and not all of the cache.
    pub causal: bool,
    /// A query at `i` sees the key at `j <= i` only if `i - j` is less than this.
    pub window: Option<usize>,
    /// `ALiBi`: a slope for every head. The key at `j` has `slope * j` added to its score, which differs from
    /// `slope * (j - i)` by a constant that the softmax removes.
    pub alibi: Option<&'a [f32]>,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// A number for each key that is added to its scores, such as the logarithm of how many tokens it stands for.
    pub bias: Option<&'a [f32]>,
    /// Softmax outputs become powers of two with 4-bit exponents, see `attention/log2.rs`.
    pub log2: bool,
}

impl Shape<'_> {
    /// The query heads that share a key head.
    fn group(&self, kv_head: usize) -> Range<usize> {
        if let Some(groups) = self.groups {
            return groups[kv_head]..groups[kv_head + 1];
        }
        let group = self.heads / self.kv_heads;
        kv_head * group..(kv_head + 1) * group
    }

    /// The most query heads that share a key head.
    fn largest_group(&self) -> usize {
        (0..self.kv_heads).map(|kv_head| self.group(kv_head).len()).max().unwrap_or(0)
    }
}

/// Attention of one tier.
pub trait Attention: Sync {
    /// The tier.
    fn isa(&self) -> Isa;

    /// Computes one task of a call of [`attend`].
    ///
    /// # Safety
    /// No other thread may access the task's rows and heads of the output during the call.
    unsafe fn run(&self, call: &Call<'_>, task: Task, memory: &mut Memory);

    /// Merges the spans of the given rows (queries times heads) from `partials`, the call's own, all of them written.
    ///
    /// # Safety
    /// No other thread may access these rows of the output and of `partials` during the call.
    unsafe fn merge(&self, call: &Call<'_>, partials: Columns<'_>, rows: Range<usize>, memory: &mut Memory);

    /// Makes codes of the `n` keys and values of one head, for [`attend_codes`]; the head has their shape.
    fn encode_head(
        &self,
        rows: &codes::Rows<'_>,
        kv_head: usize,
        n: usize,
        dim: usize,
        head: &mut codes::Head,
    );

    /// Computes some queries of one head in a call of [`attend_codes`].
    ///
    /// # Safety
    /// No other thread may access these rows of this head in the output during the call.
    unsafe fn run_codes(
        &self,
        call: &codes::Call<'_>,
        head: usize,
        queries: Range<usize>,
        memory: &mut Memory,
    );

    /// Computes one task of a call of [`statistics`]: adds what the given queries give with the heads of one key head.
    fn statistics(
        &self,
        call: &Call<'_>,
        kv_head: usize,
        queries: Range<usize>,
        statistic: Statistic,
        sums: &mut [f32],
        memory: &mut Memory,
    );

    /// Writes what one query gives to one block of keys, relative to its factor, see [`Graph`].
    ///
    /// # Safety
    /// No other thread may access these weights of the record during the call.
    unsafe fn encode(
        &self,
        record: &Record<'_>,
        head: usize,
        block: usize,
        query: usize,
        weights: &[f32; KEYS],
    );

    /// Adds up what all queries give to one block of keys: `out[j] = sum over i of scores[i] * factors[i] * weights[i][j]`.
    fn votes(
        &self,
        weights: Given<'_>,
        factors: &[f32],
        scores: &[f32],
        coefficients: &mut [f32],
        out: &mut [f32; KEYS],
    );
}

/// The checked arguments of one call of [`attend`].
#[derive(Clone)]
pub struct Call<'a> {
    shape: Shape<'a>,
    cache: &'a KvCache,
    q: &'a [f32],
    q_stride: usize,
    /// Positions before the first query.
    past: usize,
    /// The queries' places in a tree; none if each stands behind the one before it.
    branches: Option<&'a Branches>,
    /// Spans that any query sees keys of.
    spans: Range<usize>,
    /// Where tasks leave their spans, `[n, heads, spans, partial]`; none if each goes through all spans itself.
    partials: Option<Columns<'a>>,
    /// Where weights are left as a graph.
    record: Option<Record<'a>>,
    out: Columns<'a>,
}

impl std::fmt::Debug for Call<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Call").field("shape", &self.shape).field("past", &self.past).finish_non_exhaustive()
    }
}

/// A part of the work: some queries with some heads that share a key head, and some spans of its keys.
#[derive(Debug, Clone)]
pub struct Task {
    kv_head: usize,
    heads: Range<usize>,
    queries: Range<usize>,
    spans: Range<usize>,
}

/// Memory of [`attend`], kept between calls so that only the first ones allocate.
#[derive(Default)]
pub struct Scratch {
    /// One a thread; never contended.
    workers: Vec<Mutex<Memory>>,
    /// What spans leave, where they are tasks of their own.
    partials: Lines,
    /// Keys and values as codes.
    heads: Vec<codes::Head>,
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scratch").field("bytes", &self.bytes()).finish()
    }
}

impl Scratch {
    /// Empty scratch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        let workers = self.workers.iter().map(|work| lock(work).bytes()).sum::<usize>();
        workers + self.partials.bytes() + self.heads.iter().map(codes::Head::bytes).sum::<usize>()
    }

    fn grow(&mut self, threads: usize, floats: usize, partials: usize) -> Result<()> {
        if self.partials.bytes() < partials * size_of::<f32>() {
            self.partials = Lines::new("attention scratch", partials, size_of::<f32>())?;
        }
        self.workers.resize_with(self.workers.len().max(threads), Mutex::default);
        for work in &mut self.workers[..threads] {
            let work = work.get_mut().unwrap_or_else(PoisonError::into_inner);
            if work.lines.bytes() < floats * size_of::<f32>() {
                work.lines = Lines::new("attention scratch", floats, size_of::<f32>())?;
            }
        }
        Ok(())
    }
}

/// One thread's scratch.
#[derive(Default)]
pub struct Memory {
    lines: Lines,
    /// Of attention on codes.
    queries: Activations,
    weights: Activations,
}

impl Memory {
    fn bytes(&self) -> usize {
        self.lines.bytes() + self.queries.bytes() + self.weights.bytes()
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("bytes", &self.bytes()).finish()
    }
}

fn lock(work: &Mutex<Memory>) -> std::sync::MutexGuard<'_, Memory> {
    work.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All kernels this CPU and `NYBBLE_ISA` allow, lowest tier first.
pub fn kernels() -> Vec<&'static dyn Attention> {
    listed!(dyn Attention, neon)
}

/// Attention of the last `n` positions of `cache`, whose queries are `q`; head `h` of query `i` starts at
/// `i * q_stride + h * head_dim`. `out` is `[n, heads * head_dim]`.
#[expect(
    clippy::too_many_arguments,
    reason = "each is one thing, and a struct of them would be built for every call"
)]
pub fn attend(
    pool: &Pool,
    kernel: &dyn Attention,
    shape: &Shape<'_>,
    cache: &KvCache,
    q: &[f32],
    q_stride: usize,
    n: usize,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    compute(pool, kernel, shape, cache, q, q_stride, n, None, None, out, scratch)
}

/// Attention of the last entries of `cache`, which are the nodes of a tree: each sees what stood before them and the nodes on
/// its path. Otherwise as [`attend`].
#[expect(clippy::too_many_arguments, reason = "those of `attend` and the tree")]
pub fn attend_tree(
    pool: &Pool,
    kernel: &dyn Attention,
    shape: &Shape<'_>,
    cache: &KvCache,
    q: &[f32],
    q_stride: usize,
    branches: &Branches,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    if !shape.causal {
        let found = "queries that see all keys";
        return Err(Error::argument("a tree of drafts", "causal attention", found));
    }
    if shape.log2 {
        let detail = "its values are rounded in blocks of neighbours in the cache";
        return Err(Error::unsupported("a tree of drafts with softmax \"log2\"", detail));
    }
    compute(pool, kernel, shape, cache, q, q_stride, branches.len(), Some(branches), None, out, scratch)
}

/// [`attend`] for all positions of a cache, leaving the probabilities in `graph`; all queries see all keys.
#[expect(clippy::too_many_arguments, reason = "those of `attend` and the graph")]
pub fn attend_graph(
    pool: &Pool,
    kernel: &dyn Attention,
    shape: &Shape<'_>,
    cache: &KvCache,
    q: &[f32],
    q_stride: usize,
    out: &mut [f32],
    graph: &mut Graph,
    scratch: &mut Scratch,
) -> Result<()> {
    if shape.causal {
        return Err(Error::argument("an attention graph", "queries that see all keys", "causal attention"));
    }
    graph.resize(shape.heads, cache.len())?;
    // Probabilities rounded to powers of two are not left: the graph is the exact softmax's.
    let exact = Shape { log2: false, ..*shape };
    let record = Some(graph.record());
    compute(pool, kernel, &exact, cache, q, q_stride, cache.len(), None, record, out, scratch)?;
    if shape.log2 {
        return attend(pool, kernel, shape, cache, q, q_stride, cache.len(), out, scratch);
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "those of `attend`, the tree and the graph")]
fn compute(
    pool: &Pool,
    kernel: &dyn Attention,
    shape: &Shape<'_>,
    cache: &KvCache,
    q: &[f32],
    q_stride: usize,
    n: usize,
    branches: Option<&Branches>,
    record: Option<Record<'_>>,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let width = check(shape, cache, q, q_stride, n)?;
    if n.checked_mul(width) != Some(out.len()) {
        return Err(Error::argument("attention output", format!("{n} x {width} values"), out.len()));
    }
    if n == 0 || width == 0 {
        return Ok(());
    }
    let group = shape.largest_group();
    let past = cache.len() - n;
    let first = shape.window.map_or(0, |window| (past + 1).saturating_sub(window));
    let positions = past + branches.map_or(n, Branches::positions);
    let spans = first / SPAN..positions.div_ceil(SPAN);
    let Cut { heads, queries, spans: span_pieces } = cut(
        pool.threads(),
        shape.kv_heads,
        group,
        n,
        if shape.log2 || record.is_some() { 1 } else { spans.len() },
    );
    let pieces = group.div_ceil(heads);
    let blocks = n.div_ceil(queries);
    let parts = shape.kv_heads * pieces * span_pieces;
    let tasks = blocks * parts;
    let threads = pool.threads().min(tasks);
    // Room for the spans of the cache's whole memory: it then grows when the cache does, not with every span.
    let partial = block::partial(cache.padded_dim());
    let room = n * shape.heads * cache.capacity().div_ceil(SPAN) * partial;
    let floats = block::floats(shape.head_dim, branches.map_or(0, Branches::floats));
    scratch.grow(threads, floats, if span_pieces > 1 { room } else { 0 })?;
    let Scratch { workers, partials, .. } = scratch;
    let rows = n * shape.heads;
    let call = Call {
        shape: *shape,
        cache,
        q,
        q_stride,
        past,
        branches,
        partials: (span_pieces > 1)
            .then(|| Columns::new(partials.elements_mut(), rows * spans.len(), partial, 0, partial)),
        record,
        spans: spans.clone(),
        out: Columns::new(out, n, width, 0, width),
    };
    // The last queries see the most keys. Starting with them, and giving each thread the next task when it is ready for it,
    // keeps all threads busy to the end; which thread computes a task does not change it.
    work_off(pool, workers, threads, tasks, &|index, work| {
        let (block, part) = (blocks - 1 - index / parts, index % parts);
        let (part, span) = (part / span_pieces, part % span_pieces);
        let (kv_head, piece) = (part / pieces, part % pieces);
        let span_at = |i: usize| spans.start + spans.len() * i / span_pieces;
        let own = shape.group(kv_head);
        let first = own.start + piece * heads;
        if first >= own.end {
            return; // a group of fewer heads than the largest
        }
        let task = Task {
            kv_head,
            heads: first..own.end.min(first + heads),
            queries: block * queries..n.min((block + 1) * queries),
            spans: span_at(span)..span_at(span + 1),
        };
        // SAFETY: no two indices share a query, a head and a span.
        unsafe { kernel.run(&call, task, work) }
    });
    if let Some(partials) = call.partials {
        // SAFETY: all tasks are done, and this is the only thread now.
        unsafe { kernel.merge(&call, partials, 0..rows, &mut lock(&workers[0])) }
    }
    Ok(())
}

/// How the work is cut into tasks.
struct Cut {
    /// Heads of a task.
    heads: usize,
    /// Queries of a task.
    queries: usize,
    /// Tasks that the spans are dealt out to.
    spans: usize,
}

/// Chooses the tasks; any choice gives the same bits.
fn cut(threads: usize, kv_heads: usize, group: usize, n: usize, spans: usize) -> Cut {
    let wanted = if threads == 1 { 1 } else { threads * TASKS_PER_THREAD };
    let heads = group.min(TASK_ROWS);
    let queries = (TASK_ROWS / heads).min(n);
    let tasks = kv_heads * n.div_ceil(queries) * group.div_ceil(heads);
    if tasks >= wanted {
        return Cut { heads, queries, spans: 1 };
    }
    // Too few tasks, as in decode. Spans are taken apart first, for that costs only the merge; then heads, though they load
    // their shared keys more than once.
    let pieces = wanted.div_ceil(tasks).min(spans);
    let heads = heads.div_ceil(wanted.div_ceil(tasks * pieces));
    Cut { heads, queries, spans: pieces }
}

/// Runs tasks `0..tasks` on `threads` threads, each with its own memory; a thread takes the next one when it is ready for it.
fn work_off(
    pool: &Pool,
    workers: &[Mutex<Memory>],
    threads: usize,
    tasks: usize,
    task: &(impl Fn(usize, &mut Memory) + Sync),
) {
    let next = AtomicUsize::new(0);
    let run = |worker: usize| {
        let mut work = lock(&workers[worker]);
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                break;
            }
            task(index, &mut work);
        }
    };
    if threads == 1 {
        run(0);
    } else {
        pool.run(&|worker| {
            if worker < threads {
                run(worker);
            }
        });
    }
}

/// Checks the arguments of [`attend`] but the output, and returns the width of a row of it.
fn check(shape: &Shape<'_>, cache: &KvCache, q: &[f32], q_stride: usize, n: usize) -> Result<usize> {
    let wrong = |name: &str, expected: String, found: String| Err(Error::argument(name, expected, found));
    let Shape { heads, kv_heads, head_dim, .. } = *shape;
    check_heads(shape)?;
    if (kv_heads, head_dim) != (cache.kv_heads(), cache.head_dim()) {
        let found = format!("{} heads of {}", cache.kv_heads(), cache.head_dim());
        return wrong("KV cache", format!("{kv_heads} heads of {head_dim}"), found);
    }
    if n > cache.len() {
        return wrong(
            "queries",
            format!("at most the {} positions of the cache", cache.len()),
            n.to_string(),
        );
    }
    if let Some(alibi) = shape.alibi
        && alibi.len() != heads
    {
        return wrong("ALiBi slopes", format!("{heads} slopes"), alibi.len().to_string());
    }
    if let Some(bias) = shape.bias
        && bias.len() != cache.len()
    {
        return wrong("bias of keys", format!("{} numbers", cache.len()), bias.len().to_string());
    }
    if !shape.causal && shape.window.is_some() {
        return wrong("window", "causal attention".into(), "queries that see all keys".into());
    }
    if shape.window == Some(0) {
        return wrong("window", "at least 1".into(), "0".into());
    }
    if let Some(cap) = shape.softcap
        && (cap.is_nan() || cap <= 0.0)
    {
        return wrong("softcap", "a positive number".into(), cap.to_string());
    }
    let width = heads.checked_mul(head_dim).ok_or_else(|| {
        Error::argument("heads", "a row that can be addressed", format!("{heads} x {head_dim}"))
    })?;
    let needed = n.saturating_sub(1).checked_mul(q_stride).and_then(|last| last.checked_add(width));
    if n > 0 && needed.is_none_or(|needed| q.len() < needed) {
        return wrong("queries", format!("{n} rows of {width}, {q_stride} apart"), q.len().to_string());
    }
    Ok(width)
}

/// Checks how query heads share key heads.
fn check_heads(shape: &Shape<'_>) -> Result<()> {
    let wrong = |name: &str, expected: String, found: String| Err(Error::argument(name, expected, found));
    let Shape { heads, kv_heads, .. } = *shape;
    if let Some(groups) = shape.groups {
        let ends = groups.first() == Some(&0) && groups.last() == Some(&heads);
        if kv_heads == 0 || groups.len() != kv_heads + 1 || !ends || !groups.is_sorted_by(|a, b| a < b) {
            let expected = format!("the first heads of {kv_heads} groups, and {heads}");
            return wrong("groups of heads", expected, format!("{groups:?}"));
        }
    } else if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return wrong("heads", format!("a multiple of {kv_heads}"), heads.to_string());
    }
    Ok(())
}
