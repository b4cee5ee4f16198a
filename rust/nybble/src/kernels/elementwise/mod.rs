//! Activation functions and sums of whole rows.
//!
//! The arithmetic is written once, as plain loops over the functions of [`math`]; a tier is the same loops compiled under
//! its instructions. Every operation is an explicit multiplication, addition or division, none is fused, so all tiers give
//! the same bits.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

pub mod math;
pub(crate) mod tiers;

/// The kernel of one tier.
macro_rules! tier {
    ($($tier:tt)+) => {
        $crate::kernels::elementwise::tiers::instantiate! {
            Elementwise for $($tier)+;
            fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]);
            fn gelu_tanh_mul(gate: &[f32], up: &[f32], out: &mut [f32]);
            fn gelu_tanh(x: &mut [f32]);
            fn gelu_erf(x: &mut [f32]);
            fn relu(x: &mut [f32]);
            fn add_assign(x: &mut [f32], y: &[f32]);
            fn scale(x: &mut [f32], by: f32);
            fn softcap(x: &mut [f32], cap: f32);
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
mod scalar;

use crate::cpu::Isa;
use tiers::listed;

/// Operations on each element of a row.
///
/// # Panics
/// Those with several slices panic when the slices differ in length.
pub trait Elementwise: Sync {
    /// The tier.
    fn isa(&self) -> Isa;
    /// `out = silu(gate) * up`.
    fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]);
    /// `out = gelu(gate) * up` with the tanh form of GELU.
    fn gelu_tanh_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]);
    /// `x = gelu(x)`, the tanh form.
    fn gelu_tanh(&self, x: &mut [f32]);
    /// `x = gelu(x)`, the exact form with the error function.
    fn gelu_erf(&self, x: &mut [f32]);
    /// `x = max(x, 0)`; NaN stays NaN.
    fn relu(&self, x: &mut [f32]);
    /// `x += y`.
    fn add_assign(&self, x: &mut [f32], y: &[f32]);
    /// `x *= by`.
    fn scale(&self, x: &mut [f32], by: f32);
    /// `x = cap * tanh(x / cap)`: a smooth limit.
    fn softcap(&self, x: &mut [f32], cap: f32);
}

/// All kernels this CPU and `NYBBLE_ISA` allow, lowest tier first.
pub fn kernels() -> Vec<&'static dyn Elementwise> {
    listed!(dyn Elementwise)
}

/// The loops every tier is made of.
mod loops {
    use super::math;

    #[inline(always)]
    fn with(gate: &[f32], up: &[f32], out: &mut [f32], f: impl Fn(f32) -> f32) {
        assert!(gate.len() == out.len() && up.len() == out.len(), "gate, up and out of one length");
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = f(gate) * up;
        }
    }

    #[inline(always)]
    fn each(x: &mut [f32], f: impl Fn(f32) -> f32) {
        for x in x {
            *x = f(*x);
        }
    }

    #[inline(always)]
    pub(super) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
        with(gate, up, out, math::silu);
    }

    #[inline(always)]
    pub(super) fn gelu_tanh_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
        with(gate, up, out, math::gelu_tanh);
    }

    #[inline(always)]
    pub(super) fn gelu_tanh(x: &mut [f32]) {
        each(x, math::gelu_tanh);
    }

    #[inline(always)]
    pub(super) fn gelu_erf(x: &mut [f32]) {
        each(x, math::gelu_erf);
    }

    #[inline(always)]
    pub(super) fn relu(x: &mut [f32]) {
        each(x, |x| if x < 0.0 { 0.0 } else { x });
    }

    #[inline(always)]
    pub(super) fn add_assign(x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "both of one length");
        for (x, &y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }

    #[inline(always)]
    pub(super) fn scale(x: &mut [f32], by: f32) {
        each(x, |x| x * by);
    }

    #[inline(always)]
    pub(super) fn softcap(x: &mut [f32], cap: f32) {
        each(x, |x| cap * math::tanh(x / cap));
    }
}
