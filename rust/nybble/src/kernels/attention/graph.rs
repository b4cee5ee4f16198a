//! Attention as a graph: every probability, in 8 or 16 bits, as it falls off the computation itself.
//!
//! Methods that let tokens vote read all probabilities of a layer many times over. In `f32` those of 1370 tokens and 6 heads
//! are 45 MB, which no cache holds, and computing them apart from attention would take its scores twice. So
//! [`super::attend_graph`] leaves each block's weights here while it has them: relative to the largest score *so far*, with
//! that score beside them; when a task is done the rest of the softmax becomes a factor for each query and block of keys:
//!
//! ```text
//! A[i, j] = factor[i, block of j] * weight[i, j]
//! ```
//!
//! Weights lie between 0 and 1, and a vote sums up hundreds of them, so their rounding hardly shows in it. Up to [`FINE`] of
//! them are brain floats; more are bytes with 5 bits of exponent and 3 of mantissa, down to 2^-30, and 0 below. Both become
//! `f32` by a shift.
//!
//! A block of keys holds the weights of all queries one after the other, so a vote is one pass of the panel loop of
//! [`super::super::f32`] over memory in order, with all sums in registers.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

use half::bf16;

use super::super::elementwise::math::exp;
use super::super::f32::lanes::{Element, LANES, Lanes, MAX_ROWS, Panel, Tier, Work};
use super::cache::Lines;
use super::softmax::Scores;
use super::{Attention, Columns, KEYS};
use crate::error::{Error, Result};
use crate::threads::Pool;

/// Most weights that are held as brain floats: 8 MB of them, which the caches still serve.
const FINE: usize = 4 << 20;

/// A byte's exponent is this much smaller than that of the weight it stands for.
const BIAS: u32 = 96;

/// A number from 2^-126 to 2^-95, or 0: the upper bits of an `f32`'s exponent are those of none, 3 bits are mantissa.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Small(pub(crate) u8);

impl Element for Small {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const Self, _spare: bool) -> L {
        // SAFETY: promised by the caller.
        unsafe { L::load_small(from) }
    }
}

/// What every query gives every key.
#[derive(Default)]
pub struct Graph {
    heads: usize,
    n: usize,
    fine: bool,
    /// `[head][block of keys][query][KEYS]`, brain floats or bytes.
    weights: Lines,
    /// `[head][block of keys][query]`.
    factors: Lines,
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").field("heads", &self.heads).field("n", &self.n).finish_non_exhaustive()
    }
}

impl Graph {
    /// The graph of `probabilities [heads, n, n]`.
    pub fn from_f32(
        pool: &Pool,
        kernel: &dyn Attention,
        probabilities: &[f32],
        heads: usize,
        n: usize,
    ) -> Result<Self> {
        let wanted = n.checked_mul(n).and_then(|square| square.checked_mul(heads));
        if wanted != Some(probabilities.len()) {
            let expected = format!("{heads} x {n} x {n} values");
            return Err(Error::argument("attention", expected, probabilities.len()));
        }
        let mut graph = Self::default();
        graph.resize(heads, n)?;
        let record = graph.record();
        let blocks = n.div_ceil(KEYS);
        pool.split(heads * n, 1, &|rows| {
            for row in rows {
                let (head, query) = (row / n, row % n);
                let row = &probabilities[row * n..][..n];
                let largest = row.iter().fold(0.0_f32, |largest, &p| if p > largest { p } else { largest });
                // Kept as a factor where it is infinite or no number, and the scores show it.
                let sum: f32 = row.iter().sum();
                let factor = if sum.is_finite() { largest } else { sum };
                for block in 0..blocks {
                    let part = &row[block * KEYS..n.min((block + 1) * KEYS)];
                    let mut weights: Scores = [0.0; KEYS];
                    for (weight, &p) in weights.iter_mut().zip(part) {
                        *weight = if largest > 0.0 { p / largest } else { 0.0 };
                    }
                    // SAFETY: no other index has this head and query.
                    unsafe {
                        kernel.encode(&record, head, block, query, &weights);
                        record.factors(head, block, query, 1)[0] = factor;
                    }
                }
            }
        });
        Ok(graph)
    }

    /// Number of heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Blocks of keys.
    fn blocks(&self) -> usize {
        self.n.div_ceil(KEYS)
    }

    /// Makes room for other heads and tokens; what was there is lost.
    pub(super) fn resize(&mut self, heads: usize, n: usize) -> Result<()> {
        let rows = heads.checked_mul(n.div_ceil(KEYS)).and_then(|rows| rows.checked_mul(n));
        let all = rows.and_then(|rows| rows.checked_mul(KEYS));
        let (Some(rows), Some(all)) = (rows, all) else {
            return Err(Error::argument(
                "attention graph",
                "a size that can be addressed",
                format!("{n} tokens"),
            ));
        };
        (self.heads, self.n, self.fine) = (heads, n, all <= FINE);
        let size = if self.fine { size_of::<bf16>() } else { size_of::<Small>() };
        for (lines, elements, size) in [(&mut self.weights, all, size), (&mut self.factors, rows, 4)] {
            if lines.bytes() < elements * size {
                *lines = Lines::new("attention graph", elements, size)?;
            }
        }
        Ok(())
    }

    /// Where the computation leaves weights.
    pub(super) fn record(&mut self) -> Record<'_> {
        let (groups, n) = (self.heads * self.blocks(), self.n);
        let width = if self.fine { KEYS / 2 } else { KEYS / 4 };
        Record {
            blocks: self.blocks(),
            n,
            fine: self.fine,
            weights: Columns::new(self.weights.elements_mut(), groups * n, width, 0, width),
            factors: Columns::new(self.factors.elements_mut(), groups, n, 0, n),
        }
    }

    /// Adds up votes: for the heads named, `next[j] = sum over i of scores[i] * A[i, j]`. Scores and `next` are `[heads, n]`.
    ///
    /// # Panics
    /// When they are not, or there is no such head.
    pub fn pass(
        &self,
        pool: &Pool,
        kernel: &dyn Attention,
        scores: &[f32],
        heads: &[usize],
        next: &mut [f32],
    ) {
        let (n, blocks) = (self.n, self.blocks());
        let next = Columns::new(next, self.heads, n, 0, n);
        pool.split(heads.len() * blocks, 1, &|tasks| {
            let (mut coefficients, mut sums) = (vec![0.0; n], [0.0; KEYS]);
            for task in tasks {
                let (head, block) = (heads[task / blocks], task % blocks);
                let scores = &scores[head * n..][..n];
                self.votes_for(kernel, head, block, scores, &mut coefficients, &mut sums);
                // SAFETY: no other task has this head and block.
                let next = unsafe { next.row(head, block * KEYS, KEYS) };
                next.copy_from_slice(&sums[..next.len()]);
            }
        });
    }

    /// The votes for one block of keys. `coefficients` is memory for a number a token.
    fn votes_for(
        &self,
        kernel: &dyn Attention,
        head: usize,
        block: usize,
        scores: &[f32],
        coefficients: &mut [f32],
        out: &mut [f32; KEYS],
    ) {
        let (n, group) = (self.n, head * self.blocks() + block);
        assert!(head < self.heads && block < self.blocks(), "head {head}, block {block}");
        assert!(scores.len() == n && coefficients.len() == n, "a score for each of {n} tokens");
        let factors = &self.factors.elements::<f32>()[group * n..][..n];
        let rows = group * n * KEYS..(group + 1) * n * KEYS;
        if self.fine {
            let weights = &self.weights.elements::<bf16>()[rows];
            kernel.votes(Given::Fine(weights), factors, scores, coefficients, out);
        } else {
            let weights = &self.weights.elements::<Small>()[rows];
            kernel.votes(Given::Coarse(weights), factors, scores, coefficients, out);
        }
    }
}

/// The weights for one block of keys, `[query][KEYS]`.
#[derive(Debug, Clone, Copy)]
pub enum Given<'a> {
    /// As brain floats.
    Fine(&'a [bf16]),
    /// As bytes.
    #[expect(private_interfaces, reason = "only made and read here")]
    Coarse(&'a [Small]),
}

/// Where the computation leaves weights and factors.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    blocks: usize,
    n: usize,
    fine: bool,
    weights: Columns<'a>,
    factors: Columns<'a>,
}

impl<'a> Record<'a> {
    /// Factors of `count` queries, before the end of a task the largest scores so far.
    ///
    /// # Safety
    /// No other thread may access these factors meanwhile.
    pub(super) unsafe fn factors(
        &self,
        head: usize,
        block: usize,
        query: usize,
        count: usize,
    ) -> &'a mut [f32] {
        // SAFETY: promised by the caller.
        unsafe { self.factors.row(head * self.blocks + block, query, count) }
    }

    /// Writes weights.
    ///
    /// # Safety
    /// No other thread may access those of this head, block and query meanwhile.
    pub(super) unsafe fn encode<T: Tier>(
        &self,
        tier: T,
        (head, block, query): (usize, usize, usize),
        weights: &Scores,
    ) {
        let row = (head * self.blocks + block) * self.n + query;
        // SAFETY: promised by the caller.
        let to = unsafe { self.weights.row(row, 0, KEYS) };
        if self.fine {
            tier.run(Fine { weights, to });
        } else {
            tier.run(Coarse { weights, to });
        }
    }
}

/// [`super::Attention::votes`] of a tier.
pub(super) fn votes<T: Tier>(
    tier: T,
    weights: Given<'_>,
    factors: &[f32],
    scores: &[f32],
    coefficients: &mut [f32],
    out: &mut [f32; KEYS],
) {
    match weights {
        Given::Fine(weights) => panel(tier, weights, 1.0, factors, scores, coefficients, out),
        Given::Coarse(weights) => {
            let undo = f32::from_bits((127 + BIAS) << 23);
            panel(tier, weights, undo, factors, scores, coefficients, out);
        }
    }
}

fn panel<T: Tier, E: Element>(
    tier: T,
    weights: &[E],
    scale: f32,
    factors: &[f32],
    scores: &[f32],
    coefficients: &mut [f32],
    out: &mut [f32; KEYS],
) {
    tier.run(Coefficients { scale, factors, scores, out: coefficients });
    let n = coefficients.len();
    assert!(weights.len() == n * KEYS, "weights of {n} queries");
    let mut y = [std::ptr::null_mut(); MAX_ROWS];
    y[0] = out.as_mut_ptr();
    let panel = Panel {
        x: coefficients.as_ptr(),
        x_stride: n,
        w: weights.as_ptr(),
        w_step: KEYS,
        w_tile: LANES,
        depth: n,
        y,
        fresh: true,
    };
    // SAFETY: the slices above hold this row, these tiles and this depth.
    unsafe { tier.panel(&panel, 1, KEYS / LANES) }
}

/// `out = scores * factors * scale`.
struct Coefficients<'a> {
    scale: f32,
    factors: &'a [f32],
    scores: &'a [f32],
    out: &'a mut [f32],
}

impl Work for Coefficients<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { scale, factors, scores, out } = self;
        let n = out.len();
        let (factors, scores) = (&factors[..n], &scores[..n]);
        for i in 0..n {
            out[i] = scores[i] * factors[i] * scale;
        }
    }
}

/// Factors of some queries, the largest scores before: `of = exp(of - max) / sum`.
pub(super) struct Factors<'a> {
    pub(super) of: &'a mut [f32],
    pub(super) max: &'a [f32],
    pub(super) sum: &'a [f32],
}

impl Work for Factors<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { of, max, sum } = self;
        let n = of.len();
        let (max, sum) = (&max[..n], &sum[..n]);
        for i in 0..n {
            of[i] = exp(of[i] - max[i]) / sum[i];
        }
    }
}

/// Rounds to brain floats, two in a word.
struct Fine<'a> {
    weights: &'a Scores,
    to: &'a mut [f32],
}

impl Work for Fine<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { weights, to } = self;
        let mut halves = [0_u16; KEYS];
        for i in 0..KEYS {
            let bits = weights[i].to_bits();
            halves[i] = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        }
        for (to, halves) in to.iter_mut().zip(halves.chunks_exact(2)) {
            *to = f32::from_ne_bytes(bytes([halves[0], halves[1]].map(u16::to_ne_bytes)));
        }
    }
}

#[inline(always)]
fn bytes([[a, b], [c, d]]: [[u8; 2]; 2]) -> [u8; 4] {
    [a, b, c, d]
}

/// Rounds to [`Small`], four in a word.
struct Coarse<'a> {
    weights: &'a Scores,
    to: &'a mut [f32],
}

impl Work for Coarse<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { weights, to } = self;
        let mut codes = [0_u8; KEYS];
        for i in 0..KEYS {
            // A half of the last bit that stays is added; what is then below 8, the exponent of none, is 0.
            let code = ((weights[i].to_bits() + (1 << 19)) >> 20) as i32 - (BIAS << 3) as i32;
            codes[i] = if code < 8 { 0 } else { code as u8 };
        }
        for (to, codes) in to.iter_mut().zip(codes.chunks_exact(4)) {
            *to = f32::from_ne_bytes([codes[0], codes[1], codes[2], codes[3]]);
        }
    }
}
