//! Attention whose softmax outputs are powers of two, so that weighting values is shifting and adding integers.
//!
//! The 4-bit log2 quantizer of Agile-Quant (arXiv 2312.05693), after FQ-ViT (arXiv 2111.13824):
//!
//! ```text
//! q = clamp(round(-log2 p), 0, 15),  p' = 2^-q,  and p' = 0 where round(-log2 p) > 15
//! out = sum over keys of p' v
//! ```
//!
//! Values are 8-bit codes with one scale for 16 dimensions of a head and the positions that a query sees of a block of 64,
//! so a block's sum is `sum of (code << (15 - q))` in 32 bits, at most `64 * 127 * 2^15`. The paper does not say how values
//! are grouped; the cache keeps them in its own type. What a query does not see has no part in a scale: its output depends
//! on nothing but its own position and the cache here, too.
//!
//! `q` needs the softmax's final sum, so the keys are gone through twice: once for the largest score and the sum, once for
//! the weights. That makes it slower than the exact attention here, whose products are fused multiply-adds; it is kept to
//! measure what 4-bit weights cost in accuracy, and as the reference for hardware where shifting is cheaper.
//!
//! No logarithm is taken: `round(-log2 p)` is the exponent of `p`, one less where its mantissa is above the square root of 2.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

use super::super::f32::lanes::{Element, LANES, Lanes, MAX_ROWS, Tier, Work};
use super::block::{Job, Rows};
use super::softmax::{Running, Scores};
use super::{KEYS, Memory, TASK_ROWS};

/// Largest exponent.
const LARGEST: u32 = 15;

/// Exponent of a weight that is 0.
const NONE: u32 = LARGEST + 1;

/// 16 dimensions of the values of a block, as codes.
type Codes = [[i32; LANES]; KEYS];

/// # Safety
/// As [`super::Attention::run`].
pub(super) unsafe fn run<T: Tier, E: Element>(job: &Job<'_, T, E>, memory: &mut Memory) {
    let (padded, rows) = (job.padded, job.rows());
    let (queries, rest) = memory.lines.elements_mut::<f32>().split_at_mut(TASK_ROWS * padded);
    let (sums, rest) = rest.split_at_mut(TASK_ROWS * padded);
    let scores = &mut rest[TASK_ROWS * padded..].as_chunks_mut::<KEYS>().0[..MAX_ROWS];
    job.queries(queries);
    sums[..rows * padded].fill(0.0);

    let mut running = [Running::START; TASK_ROWS];
    let seen = job.all_seen();
    let blocks = (seen.start / KEYS * KEYS..seen.end).step_by(KEYS);
    for quantized in [false, true] {
        for start in blocks.clone() {
            for part in job.parts() {
                let lines = part.start * padded..part.end * padded;
                let (seen, slopes) = job.sight(&part, start);
                let seen = &seen[..part.len()];
                // The second time the largest score is known: weights are relative to it, and the sums stay.
                let mut copies: [_; MAX_ROWS] =
                    std::array::from_fn(|i| running.get(part.start + i).copied().unwrap_or(Running::START));
                let mut rows = Rows {
                    queries: &queries[lines.clone()],
                    sums: &mut sums[lines],
                    scores,
                    running: &mut copies[..part.len()],
                    seen,
                    slopes: &slopes[..part.len()],
                };
                if !job.weigh(start, &mut rows) {
                    continue;
                }
                if !quantized {
                    running[part.clone()].copy_from_slice(rows.running);
                    continue;
                }
                let mut exponents = [[NONE; KEYS]; MAX_ROWS];
                for (i, row) in part.clone().enumerate() {
                    let inverse = 1.0 / running[row].sum;
                    job.tier.run(Exponents { weights: &scores[i], inverse, out: &mut exponents[i] });
                }
                let sums = &mut sums[part.start * padded..part.end * padded];
                // As in exact attention: only at the diagonal and at a window's edge each row has its own range.
                if seen.iter().all(|other| *other == seen[0]) {
                    job.shift_add(start, seen[0], &exponents, sums);
                } else {
                    for (i, &seen) in seen.iter().enumerate() {
                        let own = i * padded..(i + 1) * padded;
                        job.shift_add(start, seen, &exponents[i..=i], &mut sums[own]);
                    }
                }
            }
        }
    }
    for row in 0..rows {
        let (query, head) = job.place(row);
        // SAFETY: this query and head are this task's own.
        let out = unsafe { job.call.out.row(query, head * job.dim, job.dim) };
        out.copy_from_slice(&sums[row * padded..][..job.dim]);
        if !running[row].sum.is_finite() {
            out.fill(f32::NAN); // the exponents of such weights say nothing
        }
    }
}

impl<T: Tier, E: Element> Job<'_, T, E> {
    /// Adds the values of the positions `from..to` of the block at `start`, shifted by the rows' exponents, to the rows' sums.
    fn shift_add(
        &self,
        start: usize,
        (from, to): (usize, usize),
        exponents: &[[u32; KEYS]],
        sums: &mut [f32],
    ) {
        if from >= to {
            return;
        }
        let mut codes: Codes = [[0; LANES]; KEYS];
        for lane in (0..self.padded).step_by(LANES) {
            let values = &self.values
                [(start + from) * self.padded + lane..(start + to - 1) * self.padded + lane + LANES];
            let scales = self.scales.map(|(_, values)| &values[start + from..start + to]);
            let scale =
                self.tier.run(Round { values, step: self.padded, scales, codes: &mut codes[from..to] });
            for (sums, exponents) in sums.chunks_exact_mut(self.padded).zip(exponents) {
                let sums = sums[lane..].first_chunk_mut().expect("16 padded dimensions");
                self.tier.run(ShiftAdd {
                    codes: &codes[from..to],
                    exponents: &exponents[from..to],
                    scale,
                    sums,
                });
            }
        }
    }
}

/// `round(-log2(weight * inverse))`, or [`NONE`] above [`LARGEST`].
struct Exponents<'a> {
    weights: &'a Scores,
    inverse: f32,
    out: &'a mut [u32; KEYS],
}

impl Work for Exponents<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        /// What carries a mantissa above the square root of 2 into the exponent.
        const CARRY: u32 = (1 << 23) - 0x35_04f3;
        let Self { weights, inverse, out } = self;
        for i in 0..KEYS {
            let p = (weights[i] * inverse).to_bits();
            // A probability is at most 1, but for rounding.
            let exponent = 127_u32.saturating_sub((p + CARRY) >> 23);
            out[i] = if exponent > LARGEST { NONE } else { exponent };
        }
    }
}

/// Rounds 16 dimensions of some positions to 8 bits with one scale, which it returns; NaN if any is not finite.
struct Round<'a, E> {
    /// The first position's, and the others `step` apart.
    values: &'a [E],
    step: usize,
    /// Of the values, if they are codes.
    scales: Option<&'a [f32]>,
    codes: &'a mut [[i32; LANES]],
}

impl<E: Element> Work for Round<'_, E> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        let Self { values, step, scales, codes } = self;
        let mut floats = [[0.0_f32; LANES]; KEYS];
        let mut top = 0;
        for (i, floats) in floats.iter_mut().enumerate().take(codes.len()) {
            let values = &values[i * step..][..LANES];
            // SAFETY: both have 16 elements; the instructions are promised.
            unsafe { E::lanes::<L>(values.as_ptr(), true).store(floats.as_mut_ptr()) }
            for value in floats {
                *value *= scales.map_or(1.0, |scales| scales[i]);
                top = top.max(value.to_bits() & 0x7fff_ffff);
            }
        }
        let top = f32::from_bits(top);
        if !top.is_finite() {
            return f32::NAN;
        }
        let scale = (top / 127.0).max(f32::MIN_POSITIVE);
        // One long loop: of two nested ones the compiler takes the outer, and gathers what lies 16 apart.
        for (code, value) in codes.as_flattened_mut().iter_mut().zip(floats.as_flattened()) {
            *code = (value / scale).round_ties_even() as i32;
        }
        scale
    }
}

/// `sums += scale * sum of code * 2^-exponent`.
struct ShiftAdd<'a> {
    codes: &'a [[i32; LANES]],
    exponents: &'a [u32],
    scale: f32,
    sums: &'a mut [f32; LANES],
}

impl Work for ShiftAdd<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { codes, exponents, scale, sums } = self;
        let mut total = [0_i32; LANES];
        for (codes, &exponent) in codes.iter().zip(exponents) {
            // Opaque: else the compiler takes 16 positions together, and gathers what lies 16 apart.
            let exponent = std::hint::black_box(exponent);
            if exponent <= LARGEST {
                for l in 0..LANES {
                    total[l] += codes[l] << (LARGEST - exponent);
                }
            }
        }
        for l in 0..LANES {
            sums[l] += total[l] as f32 * (scale / (1 << LARGEST) as f32);
        }
    }
}
