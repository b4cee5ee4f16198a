//! The loops every tier of the norms is made of.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

use super::SUMS;

/// The sum of an expression in `x` over the elements of a row.
///
/// A macro, because a closure is a function of its own that the compiler may leave out of the vectorised loop.
macro_rules! sum {
    ($row:expr, $x:ident => $value:expr) => {{
        let mut sums = [0.0; SUMS];
        let (runs, rest) = $row.as_chunks::<SUMS>();
        for run in runs {
            for i in 0..SUMS {
                let $x = run[i];
                sums[i] += $value;
            }
        }
        for i in 0..rest.len() {
            let $x = rest[i];
            sums[i] += $value;
        }
        pairwise(sums)
    }};
}

#[inline(always)]
fn pairwise(mut sums: [f32; SUMS]) -> f32 {
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
    let n = x.len();
    assert!(gain.len() == n && out.len() == n, "row, gain and out of one length");
    let mean = sum!(x, x => x * x) / n as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    for i in 0..n {
        out[i] = (x[i] * factor) * gain[i];
    }
}

#[inline(always)]
pub(super) fn layer(x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    let n = x.len();
    assert!(gain.len() == n && out.len() == n, "row, gain and out of one length");
    let mean = sum!(x, x => x) / n as f32;
    // A second pass over the row costs less than the precision that mean(x^2) - mean(x)^2 would.
    let variance = sum!(x, x => (x - mean) * (x - mean)) / n as f32;
    let factor = 1.0 / (variance + eps).sqrt();
    for i in 0..n {
        out[i] = ((x[i] - mean) * factor) * gain[i];
    }
    if let Some(bias) = bias {
        assert_eq!(bias.len(), n, "bias and out of one length");
        for i in 0..n {
            out[i] += bias[i];
        }
    }
}
