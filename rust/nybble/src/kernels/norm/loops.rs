//! The loops every tier of the norms is made of.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

use super::SUMS;

/// The sum of `f(x)` over a row.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0; SUMS];
    let (runs, rest) = x.as_chunks::<SUMS>();
    for run in runs {
        for (sum, &x) in sums.iter_mut().zip(run) {
            *sum += f(x);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f(x);
    }
    let mut width = SUMS / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

#[inline(always)]
pub(super) fn rms(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
    assert!(gain.len() == x.len() && out.len() == x.len(), "row, gain and out of one length");
    let mean = sum(x, |x| x * x) / x.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    for ((out, &x), &gain) in out.iter_mut().zip(x).zip(gain) {
        *out = (x * factor) * gain;
    }
}

#[inline(always)]
pub(super) fn layer(x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    assert!(gain.len() == x.len() && out.len() == x.len(), "row, gain and out of one length");
    let count = x.len() as f32;
    let mean = sum(x, |x| x) / count;
    // A second pass over the row costs less than the precision that mean(x^2) - mean(x)^2 would.
    let variance = sum(x, |x| (x - mean) * (x - mean)) / count;
    let factor = 1.0 / (variance + eps).sqrt();
    for ((out, &x), &gain) in out.iter_mut().zip(x).zip(gain) {
        *out = ((x - mean) * factor) * gain;
    }
    if let Some(bias) = bias {
        assert_eq!(bias.len(), out.len(), "bias and out of one length");
        for (out, &bias) in out.iter_mut().zip(bias) {
            *out += bias;
        }
    }
}
