//! The loops of attention that are not products, compiled by each tier for itself.
//!
//! Counted loops, for the reason given in `elementwise`.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

use super::super::elementwise::math::{exp, tanh};
use super::super::f32::lanes::{LANES, Lanes, Work};
use super::KEYS;

/// Scores of one query and one block of keys.
pub(super) type Scores = [f32; KEYS];

/// The running softmax of one row.
#[derive(Clone, Copy)]
pub(super) struct Running {
    /// The largest score so far.
    pub(super) max: f32,
    /// The sum of the weights so far, relative to it.
    pub(super) sum: f32,
    /// What the last block multiplied all earlier weights by.
    pub(super) fade: f32,
}

impl Running {
    /// Before the first key.
    pub(super) const START: Self = Self { max: f32::NEG_INFINITY, sum: 0.0, fade: 1.0 };
}

/// Adds a span's weighted values and running softmax to those of the spans before it.
///
/// A span without a visible key changes nothing, and the first one with some is taken over as it is.
pub(super) struct Merge<'a> {
    pub(super) sums: &'a mut [f32],
    pub(super) running: &'a mut Running,
    pub(super) span_sums: &'a [f32],
    pub(super) span: Running,
}

impl Work for Merge<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { sums, running, span_sums, span } = self;
        if span.max == f32::NEG_INFINITY {
            return;
        }
        if running.max == f32::NEG_INFINITY {
            sums.copy_from_slice(span_sums);
            *running = span;
            return;
        }
        let max = if span.max > running.max { span.max } else { running.max };
        let (old, new) = (exp(running.max - max), exp(span.max - max));
        let n = sums.len();
        assert_eq!(span_sums.len(), n, "both of one length");
        for i in 0..n {
            sums[i] = sums[i] * old + span_sums[i] * new;
        }
        *running = Running { max, sum: running.sum * old + span.sum * new, fade: 1.0 };
    }
}

/// `score = cap * tanh(score / cap)`.
pub(super) struct Cap<'a>(pub(super) &'a mut Scores, pub(super) f32);

impl Work for Cap<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self(scores, cap) = self;
        for i in 0..KEYS {
            scores[i] = cap * tanh(scores[i] / cap);
        }
    }
}

/// Adds a slope times each key's position, the first of which is the last field.
pub(super) struct Slope<'a>(pub(super) &'a mut Scores, pub(super) f32, pub(super) usize);

impl Work for Slope<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self(scores, slope, first) = self;
        for i in 0..KEYS {
            scores[i] += slope * (first + i) as f32;
        }
    }
}

/// `x += bias`.
pub(super) struct Bias<'a>(pub(super) &'a mut [f32], pub(super) &'a [f32]);

impl Work for Bias<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self(x, bias) = self;
        let bias = &bias[..x.len()];
        for i in 0..x.len() {
            x[i] += bias[i];
        }
    }
}

/// `x *= factor`.
pub(super) struct Scale<'a>(pub(super) &'a mut [f32], pub(super) f32);

impl Work for Scale<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self(x, factor) = self;
        for i in 0..x.len() {
            x[i] *= factor;
        }
    }
}

/// `x *= factors`, each its own.
pub(super) struct Times<'a>(pub(super) &'a mut [f32], pub(super) &'a [f32]);

impl Work for Times<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self(x, factors) = self;
        let factors = &factors[..x.len()];
        for i in 0..x.len() {
            x[i] *= factors[i];
        }
    }
}

/// Replaces each row's scores by weights `exp(score - max)`, where `max` is the largest score so far, and brings the rows'
/// sums up to date. Rows that see no key of the block are left alone.
///
/// Scores of minus infinity, keys that are not seen, get weight 0 exactly. Maxima and sums have one lane for each position
/// modulo 16, then halve in pairs; that order is part of the result. They are written with [`Lanes`], for the compiler made
/// scalar code of them. All rows take each stage together: a row's stages wait for one another, different rows do not.
pub(super) struct Weigh<'a> {
    pub(super) scores: &'a mut [Scores],
    pub(super) running: &'a mut [Running],
    /// First key of the block that a row sees, and the first after those.
    pub(super) seen: &'a [(usize, usize)],
}

impl Work for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let rows = self.scores.len().min(self.running.len()).min(self.seen.len());
        for row in 0..rows {
            let running = &mut self.running[row];
            if self.seen[row].0 < self.seen[row].1 {
                // SAFETY: the instructions are promised.
                let largest = unsafe { largest::<L>(&self.scores[row]) };
                let old = running.max;
                running.max = if largest > old { largest } else { old };
                running.fade = if largest > old { exp(old - running.max) } else { 1.0 };
            }
        }
        for row in 0..rows {
            if self.seen[row].0 < self.seen[row].1 {
                let (scores, max) = (&mut self.scores[row], self.running[row].max);
                for i in 0..KEYS {
                    scores[i] = exp(scores[i] - max);
                }
            }
        }
        for row in 0..rows {
            let running = &mut self.running[row];
            if self.seen[row].0 < self.seen[row].1 {
                // SAFETY: the instructions are promised.
                running.sum = running.sum * running.fade + unsafe { sum::<L>(&self.scores[row]) };
            }
        }
    }
}

/// The largest score, of a multiple of 16; NaN is never it.
///
/// # Safety
/// The instructions of `L` must be there.
#[inline(always)]
pub(super) unsafe fn largest<L: Lanes>(scores: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    assert!(scores.len() >= LANES && scores.len().is_multiple_of(LANES), "whole lanes");
    // SAFETY: both have 16 elements at every address used; the instructions are promised.
    unsafe {
        let mut largest = L::load(scores.as_ptr());
        for i in 1..scores.len() / LANES {
            largest = largest.larger(L::load(scores.as_ptr().add(i * LANES)));
        }
        largest.store(lanes.as_mut_ptr());
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = if lanes[l + width] > lanes[l] { lanes[l + width] } else { lanes[l] };
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of a multiple of 16 numbers.
///
/// # Safety
/// The instructions of `L` must be there.
#[inline(always)]
pub(super) unsafe fn sum<L: Lanes>(scores: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    assert!(scores.len() >= LANES && scores.len().is_multiple_of(LANES), "whole lanes");
    // SAFETY: both have 16 elements at every address used; the instructions are promised.
    unsafe {
        let mut sum = L::load(scores.as_ptr());
        for i in 1..scores.len() / LANES {
            sum = sum.plus(L::load(scores.as_ptr().add(i * LANES)));
        }
        sum.store(lanes.as_mut_ptr());
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}
