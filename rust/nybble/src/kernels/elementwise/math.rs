//! `exp`, `tanh`, `erf` and the activation functions, without the C library.
//!
//! A C library's `exp` differs from system to system and cannot be vectorised. These are short polynomials in plain
//! multiplications and additions, with selections instead of branches: the compiler turns a loop over them into vector
//! code of whatever width the caller's instructions have, and since no pair of operations is ever fused the bits are the
//! same everywhere.
//!
//! The coefficients are minimax fits made for this crate (iteratively reweighted least squares on Chebyshev nodes, rounded
//! to `f32`). Largest errors over a dense sweep against double precision, checked by the tests: `exp` 1.2 ulp for normal
//! results, `tanh` 2 ulp, `erf` 2 ulp, `erfc` 1e-5 relative where it is above 1e-30.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

use std::f32::consts::{FRAC_1_SQRT_2, LOG2_E};

/// e to the power `x`; 0 below -104, infinity above 89, NaN for NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves no room for a fraction: the sum's low bits are the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first so short that its products with integers up to 150 are exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > 100.0 { 100.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let shifted = x * LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let r = (x - whole * LN2_HIGH) - whole * LN2_LOW;
    // Pairs of terms at once: half the depth of one term after the other, and depth is what a vector loop waits for.
    let r2 = r * r;
    let low = 1.666_652_1e-1 * r + 4.999_999_4e-1;
    let high = 8.368_724e-3 * r + 4.166_839e-2;
    let p = (1.381_458e-3 * r2 + high) * r2 + low;
    let p = (p * r2 + r) + 1.0;
    // 2^n as two factors: each is a normal number even where the result is subnormal or infinite.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) << 23).cast_unsigned())
}

/// Hyperbolic tangent.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let z = x * x;
    let p = -5.717_026e-3;
    let p = p * z + 2.065_057e-2;
    let p = p * z - 5.374_349_3e-2;
    let p = p * z + 1.333_149_1e-1;
    let p = p * z - 3.333_328_4e-1;
    let near = (p * z) * x + x;
    let far = 1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0);
    if x.abs() < 0.625 { near } else { far.copysign(x) }
}

/// The error function for |x| < 1.
#[inline(always)]
fn erf_near(x: f32) -> f32 {
    let z = x * x;
    let p = 7.889_115e-5;
    let p = p * z - 8.020_84e-4;
    let p = p * z + 5.189_535e-3;
    let p = p * z - 2.685_444_4e-2;
    let p = p * z + 1.128_36e-1;
    let p = p * z - 3.761_262_6e-1;
    let p = p * z + 1.283_791_7e-1; // and 1, added last: 2 / sqrt(pi) would lose bits in one piece
    p * x + x
}

/// 1 - erf(x) for x >= 1: exp(-x^2) t q(t) with t = 1 / (1 + x / 2).
#[inline(always)]
fn erfc_far(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.5 * x);
    let q = 9.334_168e-2;
    let q = q * t - 2.257_869_1e-1;
    let q = q * t + 8.183_623e-2;
    let q = q * t + 6.143_944e-2;
    let q = q * t + 1.786_057e-1;
    let q = q * t + 2.470_038_4e-1;
    let q = q * t + 2.820_347_2e-1;
    let q = q * t + 2.820_986_5e-1;
    exp(-(x * x)) * (t * q)
}

/// The error function.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let far = (1.0 - erfc_far(x.abs())).copysign(x);
    if x.abs() < 1.0 { erf_near(x) } else { far }
}

/// `x / (1 + e^-x)`, known as `SiLU` or swish.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x` times the normal distribution's cumulative function.
///
/// The lower tail is taken from `erfc`, not from 1 - erf, and keeps its relative precision.
#[inline(always)]
pub fn gelu_erf(x: f32) -> f32 {
    let u = x * FRAC_1_SQRT_2;
    let tail = 0.5 * erfc_far(u.abs());
    let far = if u < 0.0 { tail } else { 1.0 - tail };
    let below = if u.abs() < 1.0 { 0.5 + 0.5 * erf_near(u) } else { far };
    x * below
}

/// `x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
///
/// Computed as `x / (1 + exp(-2 u))`, the same function: one exponential and no cancellation for negative `x`.
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769_2;
    let u = TWICE_SQRT_2_OVER_PI * (x + 0.044_715 * (x * x * x));
    x / (1.0 + exp(-u))
}

/// `x / (1 + exp(-1.702 x))`, the form of GELU that CLIP was trained with.
#[inline(always)]
pub fn gelu_quick(x: f32) -> f32 {
    x / (1.0 + exp(-1.702 * x))
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // exact results are what is asked for
mod tests {
    use super::*;

    /// Distance in units in the last place of `expected`.
    fn ulps(found: f32, expected: f64) -> f64 {
        let near = (expected as f32).abs().max(f32::MIN_POSITIVE);
        let ulp = f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near);
        (f64::from(found) - expected).abs() / ulp
    }

    fn sweep(from: f32, to: f32, steps: usize) -> impl Iterator<Item = f32> {
        (0..=steps).map(move |i| from + (to - from) * (i as f32 / steps as f32))
    }

    /// `erf` in double precision: the power series below 3, the continued fraction of `erfc` above.
    fn exact_erfc(x: f64) -> f64 {
        if x < 2.5 {
            let mut term = x;
            let mut sum = x;
            for n in 1..200 {
                term *= -x * x / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            return 1.0 - sum * 2.0 / std::f64::consts::PI.sqrt();
        }
        let mut fraction = 0.0;
        for n in (1..200).rev() {
            fraction = f64::from(n) / 2.0 / (x + fraction);
        }
        (-x * x).exp() / (x + fraction) / std::f64::consts::PI.sqrt()
    }

    fn exact_erf(x: f64) -> f64 {
        (1.0 - exact_erfc(x.abs())).copysign(x)
    }

    #[test]
    fn exp_is_within_its_bound() {
        let worst =
            sweep(-87.3, 88.72, 2_000_000).map(|x| ulps(exp(x), f64::from(x).exp())).fold(0.0, f64::max);
        assert!(worst < 1.2, "{worst} ulp");
        // Subnormal results: within one of the smallest steps.
        let least = f64::from(f32::from_bits(1));
        for x in sweep(-104.5, -87.3, 200_000) {
            assert!((f64::from(exp(x)) - f64::from(x).exp()).abs() <= least, "{x}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(f32::NEG_INFINITY), exp(f32::INFINITY)), (0.0, f32::INFINITY));
        assert_eq!((exp(-105.0), exp(89.0)), (0.0, f32::INFINITY));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_within_its_bound() {
        let exact = |x: f32| f64::from(x).tanh();
        let wide = sweep(-12.0, 12.0, 1_000_000);
        let small = sweep(-1.0, 1.0, 1_000_000).map(|x| x * x * x * 1e-3);
        let worst = wide.chain(small).map(|x| ulps(tanh(x), exact(x))).fold(0.0, f64::max);
        assert!(worst < 2.0, "{worst} ulp");
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY), tanh(0.0)), (1.0, -1.0, 0.0));
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_within_its_bound() {
        let worst =
            sweep(-6.0, 6.0, 200_000).map(|x| ulps(erf(x), exact_erf(f64::from(x)))).fold(0.0, f64::max);
        assert!(worst < 2.0, "{worst} ulp");
        let tail = sweep(1.0, 8.2, 50_000)
            .map(|x| (f64::from(erfc_far(x)) / exact_erfc(f64::from(x)) - 1.0).abs())
            .fold(0.0, f64::max);
        assert!(tail < 1e-5, "{tail} relative");
        assert_eq!((erf(f32::INFINITY), erf(f32::NEG_INFINITY), erf(0.0)), (1.0, -1.0, 0.0));
        assert!(erf(f32::NAN).is_nan());
    }

    #[test]
    fn activations_follow_their_definitions() {
        for x in sweep(-20.0, 20.0, 200_000) {
            let d = f64::from(x);
            let near = |found: f32, expected: f64| {
                (f64::from(found) - expected).abs() <= 4e-7 * expected.abs() + 1e-12 * d.abs()
            };
            assert!(near(silu(x), d / (1.0 + (-d).exp())), "silu {x}");
            // The product in the exponent is rounded once, which grows with it.
            let quick = d / (1.0 + (-1.702 * d).exp());
            assert!((f64::from(gelu_quick(x)) - quick).abs() <= 5e-6 * quick.abs() + 1e-12, "gelu_quick {x}");
            let phi = if d < 0.0 {
                0.5 * exact_erfc(-d / 2f64.sqrt())
            } else {
                1.0 - 0.5 * exact_erfc(d / 2f64.sqrt())
            };
            assert!(
                (f64::from(gelu_erf(x)) - d * phi).abs() <= 3e-6 * (d * phi).abs() + 1e-12,
                "gelu_erf {x}"
            );
            let u = (2.0 / std::f64::consts::PI).sqrt() * (d + 0.044_715 * d * d * d);
            let expected = d / (1.0 + (-2.0 * u).exp());
            assert!(
                (f64::from(gelu_tanh(x)) - expected).abs() <= 2e-5 * expected.abs() + 1e-12,
                "gelu_tanh {x}"
            );
        }
    }
}
