//! What queries give and keys get: sums of attention's probabilities, without ever holding more than a block of them.
//!
//! Pruning asks which tokens matter, and attention knows: how much of each query's probability falls on one key
//! ([`Statistic::Given`]), or how much each key gets of all queries together ([`Statistic::Received`]; of a single query it
//! is that query's row of the attention matrix, such as the one of a class token). Both are sums over heads.
//!
//! Methods that take attention as a graph want every probability: that is [`super::Graph`].
//!
//! A probability needs the softmax's final maximum and sum, so the keys are gone through twice, in the blocks of
//! [`super::attend`] and with its arithmetic; the second time only through the blocks that are asked for. The work is cut into
//! pieces of [`PIECE`] queries and one key head, whatever the number of threads. Each adds up its own queries and heads in
//! order, and the pieces are added in order when all are done: the sums have the same bits for any number of threads, and the
//! memory is that of one row a piece and key head, never one a query.
//!
//! The probabilities are the exact softmax's, also where the model rounds them to powers of two.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

use std::ops::Range;

use super::super::f32::lanes::{Element, Lanes, MAX_ROWS, Tier, Work};
use super::block::{Job, Rows};
use super::softmax::Running;
use super::{
    Attention, Call, Columns, KEYS, KvCache, Memory, SPAN, Scratch, Shape, TASK_ROWS, Task, block, check,
    work_off,
};
use crate::error::{Error, Result};
use crate::threads::Pool;

/// Queries of a piece.
const PIECE: usize = 256;

/// Which sums of probabilities [`statistics`] computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistic {
    /// For each of the `n` queries the probability it gives to this key, summed over heads.
    Given {
        /// Position of the key in the cache.
        key: usize,
    },
    /// For each key of the cache the probability it gets, summed over heads and the `n` queries.
    Received,
}

/// Replaces `out` with sums of the probabilities with which the last `n` positions of `cache`, whose queries are `q`, attend:
/// `n` or `cache.len()` of them.
/// The other arguments are those of [`super::attend`]. A query whose scores are not finite gives NaN.
#[expect(clippy::too_many_arguments, reason = "those of `attend` and what is asked for")]
pub fn statistics(
    pool: &Pool,
    kernel: &dyn Attention,
    shape: &Shape<'_>,
    cache: &KvCache,
    q: &[f32],
    q_stride: usize,
    n: usize,
    statistic: Statistic,
    out: &mut Vec<f32>,
    scratch: &mut Scratch,
) -> Result<()> {
    check(shape, cache, q, q_stride, n)?;
    let (width, len) = match statistic {
        Statistic::Given { key } if key >= cache.len() => {
            return Err(Error::argument("key", format!("a position below {}", cache.len()), key));
        }
        Statistic::Given { .. } => (PIECE, n),
        Statistic::Received => (cache.len(), cache.len()),
    };
    out.clear();
    out.resize(len, 0.0);
    if n == 0 {
        return Ok(());
    }
    let (pieces, parts) = (n.div_ceil(PIECE), shape.kv_heads);
    let tasks = pieces * parts;
    let threads = pool.threads().min(tasks);
    scratch.grow(threads, block::floats(shape.head_dim, 0), tasks * width)?;
    let Scratch { workers, partials, .. } = scratch;
    let past = cache.len() - n;
    let first = shape.window.map_or(0, |window| (past + 1).saturating_sub(window));
    let call = Call {
        shape: *shape,
        cache,
        q,
        q_stride,
        past,
        branches: None,
        spans: first / SPAN..cache.len().div_ceil(SPAN),
        partials: None,
        record: None,
        out: Columns::new(&mut partials.elements_mut()[..tasks * width], tasks, width, 0, width),
    };
    work_off(pool, workers, threads, tasks, &|index, memory| {
        let (piece, kv_head) = (index / parts, index % parts);
        let queries = piece * PIECE..n.min((piece + 1) * PIECE);
        // SAFETY: every index has a row of its own.
        let sums = unsafe { call.out.row(index, 0, width) };
        sums.fill(0.0);
        kernel.statistics(&call, kv_head, queries, statistic, sums, memory);
    });
    for (index, sums) in partials.elements::<f32>()[..tasks * width].chunks_exact(width).enumerate() {
        let first = match statistic {
            Statistic::Given { .. } => index / parts * PIECE,
            Statistic::Received => 0,
        };
        out[first..].iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    }
    Ok(())
}

/// One piece of queries with the heads of one key head: adds their probabilities to `sums`, zeros before.
pub(super) fn run<T: Tier, E: Element>(
    tier: T,
    call: &Call<'_>,
    kv_head: usize,
    queries: Range<usize>,
    statistic: Statistic,
    sums: &mut [f32],
    memory: &mut Memory,
) {
    let group = call.shape.group(kv_head);
    let heads = group.len().min(TASK_ROWS);
    let step = TASK_ROWS / heads;
    for first in queries.clone().step_by(step) {
        for head in group.clone().step_by(heads) {
            let task = Task {
                kv_head,
                heads: head..group.end.min(head + heads),
                queries: first..queries.end.min(first + step),
                spans: call.spans.clone(),
            };
            let job = Job::<T, E>::new(tier, call, &task);
            add(&job, statistic, first - queries.start, sums, memory);
        }
    }
}

/// Adds the probabilities of the rows of one job, whose first query is number `offset` of the piece.
fn add<T: Tier, E: Element>(
    job: &Job<'_, T, E>,
    statistic: Statistic,
    offset: usize,
    sums: &mut [f32],
    memory: &mut Memory,
) {
    let padded = job.padded;
    let (queries, rest) = memory.lines.elements_mut::<f32>().split_at_mut(TASK_ROWS * padded);
    let scores = &mut rest[2 * TASK_ROWS * padded..].as_chunks_mut::<KEYS>().0[..MAX_ROWS];
    job.queries(queries);
    let mut running = [Running::START; TASK_ROWS];
    let seen = job.all_seen();
    let all = seen.start / KEYS * KEYS..seen.end;
    let wanted = match statistic {
        Statistic::Given { key } => key / KEYS * KEYS..key + 1,
        Statistic::Received => all.clone(),
    };
    for (blocks, final_sums) in [(all, false), (wanted, true)] {
        for start in blocks.step_by(KEYS) {
            for part in job.parts() {
                let (seen, slopes) = job.sight(&part, start);
                // The second time the largest score is known: weights are relative to it.
                let mut copies: [_; MAX_ROWS] =
                    std::array::from_fn(|i| running.get(part.start + i).copied().unwrap_or(Running::START));
                let mut rows = Rows {
                    queries: &queries[part.start * padded..part.end * padded],
                    sums: &mut [],
                    scores,
                    running: &mut copies[..part.len()],
                    seen: &seen[..part.len()],
                    slopes: &slopes[..part.len()],
                };
                if !job.weigh(start, &mut rows) {
                    continue;
                }
                if !final_sums {
                    running[part.clone()].copy_from_slice(rows.running);
                    continue;
                }
                for (i, row) in part.clone().enumerate() {
                    let (from, to) = seen[i];
                    let inverse = 1.0 / running[row].sum;
                    match statistic {
                        Statistic::Given { key } if (from..to).contains(&(key - start)) => {
                            let (query, _) = job.place(row);
                            sums[offset + query - job.task.queries.start] += scores[i][key - start] * inverse;
                        }
                        Statistic::Received if from < to => {
                            let sums = &mut sums[start + from..start + to];
                            job.tier.run(Add { sums, weights: &scores[i][from..to], inverse });
                        }
                        _ => {}
                    }
                }
            }
        }
    }
}

/// `sums += weights * inverse`.
struct Add<'a> {
    sums: &'a mut [f32],
    weights: &'a [f32],
    inverse: f32,
}

impl Work for Add<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { sums, weights, inverse } = self;
        let weights = &weights[..sums.len()];
        for i in 0..sums.len() {
            sums[i] += weights[i] * inverse;
        }
    }
}
