//! The loops of attention that are not products, compiled under each tier's instructions.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

use super::super::elementwise::math::{exp, tanh};
use super::super::f32::lanes::LANES;
use super::KEYS;

/// Scores of one query and one block of keys.
pub(super) type Scores = [f32; KEYS];

/// What one block of keys did to a query's running softmax.
#[derive(Clone, Copy)]
pub(super) struct Update {
    /// The largest score so far.
    pub(super) max: f32,
    /// Factor for everything summed before this block.
    pub(super) fade: f32,
    /// Sum of this block's weights.
    pub(super) sum: f32,
}

/// `cap * tanh(score / cap)`.
#[inline(always)]
pub(super) fn cap(scores: &mut Scores, cap: f32) {
    for score in scores {
        *score = cap * tanh(*score / cap);
    }
}

/// Adds `slope` times each key's position, the first of which is `first`.
#[inline(always)]
pub(super) fn slope(scores: &mut Scores, slope: f32, first: usize) {
    for (i, score) in scores.iter_mut().enumerate() {
        *score += slope * (first + i) as f32;
    }
}

/// Replaces scores by weights `exp(score - max)`, where `max` is the larger of `max` and theirs.
///
/// Scores of minus infinity, keys that are not seen, get weight 0 exactly.
#[inline(always)]
pub(super) fn weigh(scores: &mut Scores, max: f32) -> Update {
    let mut largest = [f32::NEG_INFINITY; LANES];
    for run in scores.as_chunks::<LANES>().0 {
        for (largest, &score) in largest.iter_mut().zip(run) {
            *largest = if score > *largest { score } else { *largest };
        }
    }
    let new = pairwise(largest, |a, b| if a > b { a } else { b });
    let new = if new > max { new } else { max };
    let mut sums = [0.0; LANES];
    for run in scores.as_chunks_mut::<LANES>().0 {
        for (sum, score) in sums.iter_mut().zip(run) {
            *score = exp(*score - new);
            *sum += *score;
        }
    }
    Update { max: new, fade: exp(max - new), sum: pairwise(sums, |a, b| a + b) }
}

#[inline(always)]
fn pairwise(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// `x *= by`.
#[inline(always)]
pub(super) fn scale(x: &mut [f32], by: f32) {
    for x in x {
        *x *= by;
    }
}
