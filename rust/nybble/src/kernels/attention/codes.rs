//! Attention on codes of 7 bits: both products are those of the integer matmuls.
//!
//! For one head, keys are the weights of a linear `[keys, head_dim]` that reads queries, and values those of a linear
//! `[head_dim, keys]` that reads probabilities. So both are packed like the weights of `w8a8`, once for all queries, and that
//! operation's kernels multiply. On x86-64 without dot product instructions 64 products of 7-bit codes are three
//! multiplications, those of floats are eight.
//!
//! ```text
//! scores        s_ij = q_i (k_j - mean k) / sqrt(d)     the mean moves all scores of a query alike: softmax removes it
//! weights       w_ij = exp(s_ij - m_ib),  b the block of j,  m_ib = max over the block
//! outputs       o_i  = (sum over b of e_ib (sum over j in b of w_ij v_j)) / (sum over b of e_ib (sum over j in b of w_ij))
//!               e_ib = exp(m_ib - max over b of m_ib)
//! ```
//!
//! Queries and keys are rounded with a scale for each token, keys after their mean is taken off (`SageAttention`, arXiv
//! 2410.02367); values with a scale for each dimension and block of [`BLOCK`] keys. Weights are 0, 1/126 .. 1 relative to the
//! largest of their block: a block of many small weights keeps them, and no second pass over the scores is needed. As codes go
//! from -63 to 63, what is multiplied is the weight less a half, and the totals, times the sum of a block's values, are added
//! afterwards.
//!
//! Small weights lose most by rounding: many become 0. What all of a block lose together is known, and is shared out evenly
//! over its keys, for it is one more multiple of the sum of its values. In `DINOv2` of 1370 tokens that takes the error of the
//! weights from 2.1 % of the output's norm to 1.0 % with blocks of 128 and from 1.6 % to 0.4 % with blocks of 64; queries and
//! keys cost 0.8 %, values 0.4 %.
//!
//! Everything that is not an integer product is compiled by each tier for itself and free of fused operations but those of
//! the float panels, so all tiers give the same bits; and one query's output depends on nothing but the query, the keys and
//! the values.

mod loops;

use std::ops::Range;
use std::sync::PoisonError;

use super::super::f32::lanes::{LANES, MAX_ROWS, Panel, Tier};
use super::super::quantize::Activations;
use super::super::{Columns, IntMatmul, Kernels};
use super::{Memory, Scratch, Shape, work_off};
use crate::error::{Error, Result};
use crate::pack::{LARGEST, Packed, TILE_K, TILE_ROWS, grouping};
use crate::threads::Pool;
use loops::{AddRows, Finish, Merge, PackValues, Round, RoundRows, Tops};

/// Keys that share the scale of their values and the largest score.
pub(super) const BLOCK: usize = 64;

/// Keys whose scores are computed together.
const SPAN: usize = 2 * BLOCK;

/// Queries of a task: their weights, and a block of scores, stay in the second-level cache.
const QUERIES: usize = 32;

const BITS: u32 = 7;

/// Queries, keys and values, which stand side by side in rows of one matrix or of several.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Head `h` of query `i` starts at `i * q_stride + h * head_dim`.
    pub q: &'a [f32],
    /// From one query to the next.
    pub q_stride: usize,
    /// Key head `h` of position `j` starts at `j * kv_stride + h * head_dim`.
    pub k: &'a [f32],
    /// As the keys.
    pub v: &'a [f32],
    /// From one key to the next, and from one value to the next.
    pub kv_stride: usize,
}

/// The keys and values of one head as codes.
#[derive(Debug, Default)]
pub struct Head {
    /// Spans of keys, each `[keys, head_dim]`.
    keys: Vec<Packed>,
    /// A power of two that multiplies every key.
    key_factor: f32,
    /// `[head_dim, keys]`, in groups of a block.
    values: Option<Packed>,
    /// A power of two that multiplies every value.
    value_factor: f32,
    /// The sums of each block's values, `[blocks, padded dim]`.
    totals: Vec<f32>,
    /// Whether all keys are finite.
    finite: bool,
    /// Scratch.
    rounded: Activations,
    sums: Vec<f32>,
    scales: Vec<f32>,
    row: Vec<f32>,
}

/// The checked arguments of one call of [`attend_codes`].
pub struct Call<'a> {
    shape: Shape<'a>,
    rows: Rows<'a>,
    n: usize,
    matmul: &'static dyn IntMatmul,
    heads: &'a [Head],
    out: Columns<'a>,
}

impl std::fmt::Debug for Call<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Call").field("shape", &self.shape).field("n", &self.n).finish_non_exhaustive()
    }
}

/// Attention of `n` queries that see all `n` keys, on codes of 7 bits. `out` is `[n, heads * head_dim]`.
///
/// Of the shape's forms a bias of keys is known here; others are errors.
pub fn attend_codes(
    pool: &Pool,
    kernels: &Kernels,
    shape: &Shape<'_>,
    rows: Rows<'_>,
    n: usize,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let width = check(shape, &rows, n)?;
    if n.checked_mul(width) != Some(out.len()) {
        return Err(Error::argument("attention output", format!("{n} x {width} values"), out.len()));
    }
    if n == 0 || width == 0 {
        return Ok(());
    }
    let (kv_heads, dim) = (shape.kv_heads, shape.head_dim);
    let blocks = n.div_ceil(QUERIES);
    let tasks = shape.heads * blocks;
    let threads = pool.threads().min(tasks);
    let floats = SPAN + n.div_ceil(BLOCK) + dim.next_multiple_of(LANES) + 1;
    scratch.grow(threads, QUERIES * floats + 2 * dim, 0)?;
    scratch.heads.resize_with(scratch.heads.len().max(kv_heads), Head::default);
    for head in &mut scratch.heads[..kv_heads] {
        head.shape(n, dim)?;
    }
    let Scratch { workers, heads, .. } = scratch;
    // All threads' room now, whichever of them get something to do: memory does not depend on who wakes first.
    let most = QUERIES.min(n);
    for work in &mut workers[..threads] {
        let Memory { queries, weights, .. } = work.get_mut().unwrap_or_else(PoisonError::into_inner);
        queries.make_room(most, dim, (dim.next_multiple_of(TILE_K), 1), BITS);
        weights.make_room(most, n, (BLOCK, n.div_ceil(BLOCK)), BITS);
    }
    let kernel = kernels.attention;
    pool.split_rows(&mut heads[..kv_heads], 1, &|first, heads| {
        for (i, head) in heads.iter_mut().enumerate() {
            kernel.encode_head(&rows, first + i, n, dim, head);
        }
    });
    let call = Call {
        shape: *shape,
        rows,
        n,
        matmul: kernels.w8a8,
        heads,
        out: Columns::new(out, n, width, 0, width),
    };
    work_off(pool, workers, threads, tasks, &|index, memory| {
        let (head, block) = (index / blocks, index % blocks);
        let queries = block * QUERIES..n.min((block + 1) * QUERIES);
        // SAFETY: no two indices share a head and a query.
        unsafe { kernel.run_codes(&call, head, queries, memory) }
    });
    Ok(())
}

/// Checks the arguments of [`attend_codes`] but the output, and returns the width of a row of it.
fn check(shape: &Shape<'_>, rows: &Rows<'_>, n: usize) -> Result<usize> {
    let unsupported = [
        (shape.causal, "queries that do not see all keys"),
        (shape.window.is_some(), "a window"),
        (shape.alibi.is_some(), "ALiBi"),
        (shape.softcap.is_some(), "capped scores"),
        (shape.log2, "softmax \"log2\""),
    ];
    for (there, what) in unsupported {
        if there {
            return Err(Error::unsupported("attention in 7 bits", format!("not with {what}")));
        }
    }
    super::check_heads(shape)?;
    let elements = |heads: usize| {
        heads.checked_mul(shape.head_dim).ok_or_else(|| {
            Error::argument("heads", "a row that can be addressed", format!("{heads} x {}", shape.head_dim))
        })
    };
    let (width, kv_width) = (elements(shape.heads)?, elements(shape.kv_heads)?);
    for (name, values, stride, width) in [
        ("queries", rows.q, rows.q_stride, width),
        ("keys", rows.k, rows.kv_stride, kv_width),
        ("values", rows.v, rows.kv_stride, kv_width),
    ] {
        let needed = n.saturating_sub(1).checked_mul(stride).and_then(|last| last.checked_add(width));
        if n > 0 && needed.is_none_or(|needed| values.len() < needed) {
            let expected = format!("{n} rows of {width}, {stride} apart");
            return Err(Error::argument(name, expected, values.len()));
        }
    }
    if let Some(bias) = shape.bias
        && bias.len() != n
    {
        return Err(Error::argument("bias of keys", format!("{n} numbers"), bias.len()));
    }
    if n > 0 && width > 0 {
        grouping("elements of a head", shape.head_dim, shape.head_dim)?;
    }
    Ok(width)
}

/// The power of two that a matrix is divided by so that f16 holds its scales: 1 for all but very small and very large ones.
fn factor(largest: f32) -> f32 {
    const USUAL: Range<f32> = 0.0039..32768.0;
    let scale = largest / LARGEST;
    if scale == 0.0 || USUAL.contains(&scale) {
        return 1.0;
    }
    let exponent = (scale.to_bits() >> 23) as i32 - 127;
    f32::from_bits((((exponent - 14).clamp(-126, 126) + 127) as u32) << 23)
}

impl Head {
    /// Bytes of memory held.
    pub(super) fn bytes(&self) -> usize {
        let packed = self.keys.iter().chain(&self.values).map(Packed::bytes).sum::<usize>();
        let floats = [&self.totals, &self.sums, &self.scales, &self.row].map(Vec::capacity);
        packed + self.rounded.bytes() + size_of::<f32>() * floats.iter().sum::<usize>()
    }

    /// Room for that many keys and values.
    fn shape(&mut self, n: usize, dim: usize) -> Result<()> {
        if self.values.as_ref().is_some_and(|values| (values.rows(), values.cols()) == (dim, n)) {
            return Ok(());
        }
        self.values = None;
        self.keys.clear();
        for first in (0..n).step_by(SPAN) {
            self.keys.push(Packed::to_fill("keys", SPAN.min(n - first), dim, dim)?);
        }
        self.values = Some(Packed::to_fill("values", dim, n, BLOCK)?);
        Ok(())
    }

    fn fill_keys<T: Tier>(&mut self, tier: T, k: &[f32], stride: usize, n: usize) {
        let Self { keys, key_factor, finite, rounded, sums, scales, row, .. } = self;
        let dim = keys[0].cols();
        sums.clear();
        sums.resize(dim, 0.0);
        tier.run(AddRows { rows: k, stride, n, sums });
        let share = 1.0 / n as f32;
        for sum in sums.iter_mut() {
            *sum *= share;
        }
        scales.clear();
        scales.resize(n.next_multiple_of(TILE_ROWS), 0.0);
        row.resize(dim, 0.0);
        let padded = dim.next_multiple_of(TILE_K);
        let mut codes = rounded.make_room(TILE_ROWS, dim, (padded, 1), BITS);
        for (tile, scales) in scales.chunks_exact_mut(TILE_ROWS).enumerate() {
            let first = tile * TILE_ROWS;
            let count = TILE_ROWS.min(n - first);
            let rows = &k[first * stride..];
            tier.run(RoundRows { rows, stride, n: count, less: sums, row, codes: &mut codes });
            scales[..count].copy_from_slice(&codes.scales[..count]);
            codes.codes[count * padded..].fill(0);
            let (span, tile) = (first / SPAN, first % SPAN / TILE_ROWS);
            for step in 0..padded / TILE_K {
                for (chunk, to) in keys[span].chunks_mut(tile, step).iter_mut().enumerate() {
                    let column = step * TILE_K + 4 * chunk;
                    for (r, to) in to.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                        let four = &codes.codes[r * padded + column..][..4];
                        *to = [four[0] as u8, four[1] as u8, four[2] as u8, four[3] as u8];
                    }
                }
            }
        }
        *finite = scales.iter().all(|scale| scale.is_finite());
        let largest = scales.iter().fold(0.0f32, |top, scale| top.max(*scale)) * LARGEST;
        *key_factor = factor(if *finite { largest } else { 0.0 });
        for (tile, scales) in scales.as_chunks::<TILE_ROWS>().0.iter().enumerate() {
            let first = tile * TILE_ROWS;
            keys[first / SPAN].write_scales(
                first % SPAN / TILE_ROWS,
                0,
                &scales.map(|scale| scale / *key_factor),
            );
        }
    }

    fn fill_values<T: Tier>(&mut self, tier: T, v: &[f32], stride: usize, n: usize, dim: usize) {
        let Self { values: Some(values), value_factor, totals, sums: tops, .. } = self else {
            unreachable!("`shape` came first");
        };
        let padded = dim.next_multiple_of(LANES);
        let blocks = n.div_ceil(BLOCK);
        tops.clear();
        tops.resize(blocks * padded, 0.0);
        totals.resize(blocks * padded, 0.0);
        for (block, tops) in tops.chunks_exact_mut(padded).enumerate() {
            let first = block * BLOCK;
            let rows = &v[first * stride..];
            tier.run(Tops { rows, stride, n: BLOCK.min(n - first), largest: &mut tops[..dim] });
        }
        let largest = tops.iter().filter(|top| top.is_finite()).fold(0.0f32, |top, own| top.max(*own));
        *value_factor = factor(largest);
        let mut rows = [[0.0; LANES]; BLOCK];
        for (at, (tops, totals)) in
            tops.chunks_exact(LANES).zip(totals.as_chunks_mut::<LANES>().0).enumerate()
        {
            let (block, tile) = (at / (padded / LANES), at % (padded / LANES));
            let (first, lane) = (block * BLOCK, tile * LANES);
            let count = BLOCK.min(n - first);
            let width = LANES.min(dim - lane);
            for (key, row) in rows[..count].iter_mut().enumerate() {
                let values = &v[(first + key) * stride + lane..][..width];
                if let Ok(values) = <&[f32; LANES]>::try_from(values) {
                    *row = *values;
                } else {
                    row[..width].copy_from_slice(values);
                    row[width..].fill(0.0);
                }
            }
            rows[count..].fill([0.0; LANES]);
            let mut scales = [0.0; LANES];
            let mut inverse = [0.0; LANES];
            for l in 0..LANES {
                let scale = tops[l] / LARGEST;
                if scale >= f32::MIN_POSITIVE && scale.is_finite() {
                    (scales[l], inverse[l]) = (scale / *value_factor, 1.0 / scale);
                } else if !scale.is_finite() {
                    scales[l] = f32::NAN;
                }
            }
            values.write_scales(tile, block, &scales);
            let mut sums = [0; LANES];
            for (i, rows) in rows[..count.next_multiple_of(TILE_K)].chunks_exact(TILE_K).enumerate() {
                let chunks = values.chunks_mut(tile, block * BLOCK / TILE_K + i);
                tier.run(PackValues { rows, inverse: &inverse, chunks, sums: &mut sums });
            }
            // What the kernels multiply with is the scale as f16 has it.
            let scales = values.scales_of(tile, block);
            for l in 0..LANES {
                totals[l] = sums[l] as f32 * scales[l];
            }
        }
    }
}

/// See [`super::Attention::encode_head`].
pub(super) fn encode<T: Tier>(
    tier: T,
    rows: &Rows<'_>,
    kv_head: usize,
    n: usize,
    dim: usize,
    head: &mut Head,
) {
    let Rows { k, v, kv_stride, .. } = *rows;
    head.fill_keys(tier, &k[kv_head * dim..], kv_stride, n);
    head.fill_values(tier, &v[kv_head * dim..], kv_stride, n, dim);
}

/// # Safety
/// As [`super::Attention::run_codes`].
pub(super) unsafe fn run<T: Tier>(
    tier: T,
    call: &Call<'_>,
    head: usize,
    queries: Range<usize>,
    memory: &mut Memory,
) {
    let Call { shape, rows, n, matmul, heads, out } = call;
    let Shape { head_dim: dim, bias, .. } = *shape;
    let kv_head = (0..shape.kv_heads).find(|&kv| shape.group(kv).contains(&head)).unwrap_or_default();
    let Head { keys, key_factor, values: Some(values), value_factor, totals, finite, .. } = &heads[kv_head]
    else {
        unreachable!("heads were packed");
    };
    let (count, padded) = (queries.len(), dim.next_multiple_of(LANES));
    let Memory { lines, queries: rounded, weights } = memory;
    let blocks = n.div_ceil(BLOCK);
    let (scores, rest) = lines.elements_mut::<f32>().split_at_mut(QUERIES * SPAN);
    let (shares, rest) = rest.split_at_mut(QUERIES * blocks);
    let (sums, rest) = rest.split_at_mut(QUERIES * padded);
    let (factors, rest) = rest.split_at_mut(QUERIES);
    let factors = &mut factors[..count];

    let columns = dim.next_multiple_of(TILE_K);
    let (row, less) = rest.split_at_mut(dim);
    let less = &mut less[..dim];
    less.fill(0.0);
    let mut codes = rounded.make_room(count, dim, (columns, 1), BITS);
    let own = &rows.q[queries.start * rows.q_stride + head * dim..];
    tier.run(RoundRows { rows: own, stride: rows.q_stride, n: count, less, row, codes: &mut codes });
    // Scores are exponents of 2.
    let factor = shape.scale * std::f32::consts::LOG2_E * key_factor;
    for scale in codes.scales.iter_mut() {
        *scale *= factor;
    }

    let mut codes = weights.make_room(count, *n, (values.group(), blocks), BITS);
    for (span, keys) in keys.iter().enumerate() {
        let (first, own) = (span * SPAN, keys.rows());
        let y = Columns::new(scores, count, SPAN, 0, own);
        // SAFETY: `scores` is this task's own; queries have the keys' columns in one group, as keys do.
        unsafe { matmul.tiles(keys, rounded, 0..keys.tiles(), y) }
        let bias = bias.map(|bias| &bias[first..][..own]);
        tier.run(Round { scores, first, count: own, bias, codes: &mut codes, sums: shares });
    }
    tier.run(Merge { codes: &mut codes, keys: *n, sums: shares, totals: factors });
    for factor in &mut *factors {
        *factor = if *finite { value_factor / *factor } else { f32::NAN };
    }

    let y = Columns::new(sums, count, padded, 0, dim);
    // SAFETY: `sums` is this task's own; weights have a column for every key, in blocks, as values do.
    unsafe { matmul.tiles(values, weights, 0..values.tiles(), y) }
    for first in (0..count).step_by(T::ROWS) {
        let part = first..count.min(first + T::ROWS);
        let mut y = [std::ptr::null_mut(); MAX_ROWS];
        for (y, sums) in
            y.iter_mut().zip(sums[part.start * padded..part.end * padded].chunks_exact_mut(padded))
        {
            *y = sums.as_mut_ptr();
        }
        assert!(shares.len() >= part.end * blocks && totals.len() >= blocks * padded, "rows of a panel");
        let panel = Panel {
            x: shares[part.start * blocks..].as_ptr(),
            x_stride: blocks,
            w: totals.as_ptr(),
            w_step: padded,
            w_tile: LANES,
            depth: blocks,
            y,
            fresh: false,
        };
        // SAFETY: the slices above hold these rows, blocks and dimensions.
        unsafe { tier.panel(&panel, part.len(), padded / LANES) }
    }
    for (r, query) in queries.enumerate() {
        // SAFETY: this query and head are this task's own.
        let out = unsafe { out.row(query, head * dim, dim) };
        tier.run(Finish { out, sums: &sums[r * padded..][..dim], factor: factors[r] });
    }
}
