//! The loops of attention on codes that are not products, compiled by each tier for itself.
//!
//! Counted loops, for the reason given in `elementwise`.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

use std::f32::consts::{LN_2, LOG2_E};

use super::super::super::elementwise::math::exp;
use super::super::super::f32::lanes::{LANES, Lanes, Work};
use super::super::super::quantize::RowsMut;
use super::super::softmax::{largest, sum};
use super::{BLOCK, SPAN};
use crate::pack::{LARGEST, TILE_K};

/// 1.5 * 2^23: adding it to a small float rounds to an integer, halves to even, which is then the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// `sums += row` for each of some rows.
pub(super) struct AddRows<'a> {
    pub(super) rows: &'a [f32],
    pub(super) stride: usize,
    pub(super) n: usize,
    pub(super) sums: &'a mut [f32],
}

impl Work for AddRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { rows, stride, n, sums } = self;
        for r in 0..n {
            let row = &rows[r * stride..][..sums.len()];
            for d in 0..sums.len() {
                sums[d] += row[d];
            }
        }
    }
}

/// The largest magnitude in each column; not finite if any value is not.
pub(super) struct Tops<'a> {
    pub(super) rows: &'a [f32],
    pub(super) stride: usize,
    pub(super) n: usize,
    pub(super) largest: &'a mut [f32],
}

impl Work for Tops<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { rows, stride, n, largest: tops } = self;
        for r in 0..n {
            let row = &rows[r * stride..][..tops.len()];
            for d in 0..tops.len() {
                // Non-negative floats compare as their bits do; what is not finite compares above all others.
                let (top, own) = (tops[d].to_bits(), row[d].to_bits() & 0x7fff_ffff);
                tops[d] = f32::from_bits(if own > top { own } else { top });
            }
        }
    }
}

/// Rounds rows to 7 bits with a scale each, as [`super::super::super::quantize`] does, after something is taken off.
pub(super) struct RoundRows<'a, 'b> {
    /// Each as long as `less`, `stride` apart.
    pub(super) rows: &'a [f32],
    pub(super) stride: usize,
    pub(super) n: usize,
    pub(super) less: &'a [f32],
    /// Scratch, as long.
    pub(super) row: &'a mut [f32],
    pub(super) codes: &'a mut RowsMut<'b>,
}

impl Work for RoundRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { rows, stride, n, less, row, codes } = self;
        let dim = less.len();
        let row = &mut row[..dim];
        for r in 0..n {
            let values = &rows[r * stride..][..dim];
            let mut top = 0;
            for d in 0..dim {
                row[d] = values[d] - less[d];
                let magnitude = row[d].to_bits() & 0x7fff_ffff;
                top = if magnitude > top { magnitude } else { top };
            }
            let out = codes.row(r);
            let top = f32::from_bits(top);
            let usable = top.is_finite() && top >= LARGEST * f32::MIN_POSITIVE;
            let scale = top / LARGEST;
            let inverse = if usable { 1.0 / scale } else { 0.0 };
            out.scales[0] = match (usable, top.is_finite()) {
                (true, _) => scale,
                (false, true) => 0.0,
                (false, false) => f32::NAN,
            };
            let (codes, rest) = out.codes.split_at_mut(dim);
            let mut sum = 0;
            for d in 0..dim {
                let code = (row[d] * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
                codes[d] = code as i8;
                sum += code;
            }
            rest.fill(0);
            out.sums[0] = if usable { sum } else { 0 };
        }
    }
}

/// Rounds 16 dimensions of the values of a step's 32 keys, in the order of a tile, and adds the codes of each dimension up.
pub(super) struct PackValues<'a> {
    pub(super) rows: &'a [[f32; LANES]],
    pub(super) inverse: &'a [f32; LANES],
    pub(super) chunks: &'a mut [[u8; 64]],
    pub(super) sums: &'a mut [i32; LANES],
}

impl Work for PackValues<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { rows, inverse, chunks, sums } = self;
        for (four, chunk) in rows.as_chunks::<4>().0.iter().zip(chunks) {
            let mut lanes = [0u32; LANES];
            for l in 0..LANES {
                let code =
                    |i: usize| (four[i][l] * inverse[l] + ROUND).to_bits().wrapping_sub(ROUND.to_bits());
                let [a, b, c, d] = [code(0), code(1), code(2), code(3)];
                lanes[l] = a & 255 | (b & 255) << 8 | (c & 255) << 16 | d << 24;
                sums[l] += a.wrapping_add(b).wrapping_add(c).wrapping_add(d).cast_signed();
            }
            for (to, lane) in chunk.as_chunks_mut::<4>().0.iter_mut().zip(lanes) {
                *to = lane.to_le_bytes();
            }
        }
    }
}

/// Makes codes of one span of the rows' scores: weights relative to the largest of their block, which takes the place of the
/// block's scale.
pub(super) struct Round<'a, 'b> {
    /// `[rows, SPAN]`.
    pub(super) scores: &'a mut [f32],
    /// The span's first key.
    pub(super) first: usize,
    /// Keys of the span.
    pub(super) count: usize,
    /// Of these keys, natural logarithms.
    pub(super) bias: Option<&'a [f32]>,
    pub(super) codes: &'a mut RowsMut<'b>,
    /// The sums of weights before they are rounded, in codes, `[rows, blocks]`.
    pub(super) sums: &'a mut [f32],
}

impl Work for Round<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { scores, first, count, bias, codes, sums: exact } = self;
        let RowsMut { codes, stride, scales, sums, groups } = codes;
        for (r, scores) in scores.as_chunks_mut::<SPAN>().0[..scales.len() / *groups].iter_mut().enumerate() {
            if let Some(bias) = bias {
                for i in 0..count {
                    scores[i] += bias[i] * LOG2_E;
                }
            }
            for from in (0..count).step_by(BLOCK) {
                let own = BLOCK.min(count - from);
                let len = own.next_multiple_of(TILE_K);
                let place = r * *groups + (first + from) / BLOCK;
                let scores = &mut scores[from..from + len];
                scores[own..].fill(f32::NEG_INFINITY);
                // SAFETY: the instructions are promised.
                let max = unsafe { largest::<L>(scores) };
                let codes = &mut codes[r * *stride + first + from..][..len];
                let mut rounded = 0;
                for i in 0..len {
                    let weight = weight(scores[i] - max);
                    let code = (weight + (ROUND - LARGEST)).to_bits().wrapping_sub(ROUND.to_bits());
                    scores[i] = weight;
                    codes[i] = code as i8;
                    rounded += code.cast_signed();
                }
                codes[own..].fill(0);
                scores[own..].fill(0.0);
                scales[place] = max;
                sums[place] = rounded + LARGEST as i32 * (len - own) as i32;
                // SAFETY: the instructions are promised.
                exact[place] = unsafe { sum::<L>(scores) };
            }
        }
    }
}

/// `126 * 2^x` for `x` up to 0, and next to nothing below -24. The relative error is 1e-4, a fortieth of half a code's step
/// where that is least, and 0 at whole numbers.
///
/// A minimax fit of `126 * 2^r` over half a step either way, made like those of `elementwise/math.rs`.
#[inline(always)]
fn weight(x: f32) -> f32 {
    let x = if x > -24.0 { x } else { -24.0 };
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    let p = 6.931_125 * r + 30.518_581;
    let p = p * r + 87.353_65;
    let p = p * r + 2.0 * LARGEST;
    // The lowest bits of the sum are the whole part; nothing else of it is left when they are moved to the exponent.
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// Makes factors of the blocks' largest scores, relative to a row's largest, and adds its weights up; NaN where there are no
/// finite scores.
pub(super) struct Merge<'a, 'b> {
    pub(super) codes: &'a mut RowsMut<'b>,
    pub(super) keys: usize,
    /// Sums of weights, which become what the sums of values are multiplied by, `[rows, blocks]`.
    pub(super) sums: &'a mut [f32],
    /// `[rows]`.
    pub(super) totals: &'a mut [f32],
}

impl Work for Merge<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { codes: RowsMut { scales, sums: rounded, groups, .. }, keys, sums, totals } = self;
        for (r, total) in totals.iter_mut().enumerate() {
            let own = r * *groups..(r + 1) * *groups;
            let (scales, rounded, sums) = (&mut scales[own.clone()], &rounded[own.clone()], &mut sums[own]);
            let max = scales.iter().fold(f32::NEG_INFINITY, |max, own| if *own > max { *own } else { max });
            for scale in scales.iter_mut() {
                *scale = exp((*scale - max) * LN_2);
            }
            *total = 0.0;
            for b in 0..sums.len() {
                let count = BLOCK.min(keys - b * BLOCK) as f32;
                *total += scales[b] * sums[b];
                // Half of the largest weight, which the codes are short of, and what rounding took off, shared out.
                sums[b] = scales[b] * ((sums[b] - rounded[b] as f32) / count);
            }
            if !max.is_finite() {
                *total = f32::NAN;
            }
        }
    }
}

/// `out = sums * factor`.
pub(super) struct Finish<'a> {
    pub(super) out: &'a mut [f32],
    pub(super) sums: &'a [f32],
    pub(super) factor: f32,
}

impl Work for Finish<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { out, sums, factor } = self;
        let sums = &sums[..out.len()];
        for d in 0..out.len() {
            out[d] = sums[d] * factor;
        }
    }
}
