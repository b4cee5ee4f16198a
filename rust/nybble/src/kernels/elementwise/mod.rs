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
            fn silu_mul_above(gate: &[f32], up: &[f32], least: &[f32], out: &mut [f32]);
            fn gelu_tanh_mul_above(gate: &[f32], up: &[f32], least: &[f32], out: &mut [f32]);
            fn silu(x: &mut [f32]);
            fn gelu_tanh(x: &mut [f32]);
            fn gelu_erf(x: &mut [f32]);
            fn gelu_quick(x: &mut [f32]);
            fn relu(x: &mut [f32]);
            fn add_assign(x: &mut [f32], y: &[f32]);
            fn add_scaled(x: &mut [f32], y: &[f32], by: &[f32]);
            fn add_rows(x: &mut [f32], rows: &[f32], weights: &[f32]);
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
    /// `out = silu(gate) * up` where `|silu(gate)| > least`, else 0. NaN is larger than anything.
    fn silu_mul_above(&self, gate: &[f32], up: &[f32], least: &[f32], out: &mut [f32]);
    /// The same with the tanh form of GELU.
    fn gelu_tanh_mul_above(&self, gate: &[f32], up: &[f32], least: &[f32], out: &mut [f32]);
    /// `x = silu(x)`.
    fn silu(&self, x: &mut [f32]);
    /// `x = gelu(x)`, the tanh form.
    fn gelu_tanh(&self, x: &mut [f32]);
    /// `x = gelu(x)`, the exact form with the error function.
    fn gelu_erf(&self, x: &mut [f32]);
    /// `x = x * sigmoid(1.702 x)`, the quick form of GELU.
    fn gelu_quick(&self, x: &mut [f32]);
    /// `x = max(x, 0)`; NaN stays NaN.
    fn relu(&self, x: &mut [f32]);
    /// `x += y`.
    fn add_assign(&self, x: &mut [f32], y: &[f32]);
    /// `x += y * by`.
    fn add_scaled(&self, x: &mut [f32], y: &[f32], by: &[f32]);
    /// `x += sum of weights[i] * rows[i]`, where `rows` are as long as `x` and added in order.
    fn add_rows(&self, x: &mut [f32], rows: &[f32], weights: &[f32]);
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
///
/// Counted loops and macros instead of iterators and closures: those are functions of their own, compiled for the plain
/// target, and where the compiler does not inline one the loop is not vectorised.
mod loops {
    use super::math;

    macro_rules! gated {
        ($name:ident, $f:path) => {
            #[inline(always)]
            pub(super) fn $name(gate: &[f32], up: &[f32], out: &mut [f32]) {
                let n = out.len();
                assert!(gate.len() == n && up.len() == n, "gate, up and out of one length");
                for i in 0..n {
                    out[i] = $f(gate[i]) * up[i];
                }
            }
        };
    }

    macro_rules! gated_above {
        ($name:ident, $f:path) => {
            #[inline(always)]
            pub(super) fn $name(gate: &[f32], up: &[f32], least: &[f32], out: &mut [f32]) {
                let n = out.len();
                assert!(gate.len() == n && up.len() == n && least.len() == n, "all of one length");
                for i in 0..n {
                    let value = $f(gate[i]);
                    out[i] = if value.abs() <= least[i] { 0.0 } else { value * up[i] };
                }
            }
        };
    }

    macro_rules! each {
        ($name:ident($x:ident $(, $arg:ident)?) => $value:expr) => {
            #[inline(always)]
            pub(super) fn $name(x: &mut [f32] $(, $arg: f32)?) {
                for i in 0..x.len() {
                    let $x = x[i];
                    x[i] = $value;
                }
            }
        };
    }

    gated!(silu_mul, math::silu);
    gated!(gelu_tanh_mul, math::gelu_tanh);
    gated_above!(silu_mul_above, math::silu);
    gated_above!(gelu_tanh_mul_above, math::gelu_tanh);
    each!(silu(x) => math::silu(x));
    each!(gelu_tanh(x) => math::gelu_tanh(x));
    each!(gelu_erf(x) => math::gelu_erf(x));
    each!(gelu_quick(x) => math::gelu_quick(x));
    each!(relu(x) => if x < 0.0 { 0.0 } else { x });
    each!(scale(x, by) => x * by);
    each!(softcap(x, cap) => cap * math::tanh(x / cap));

    #[inline(always)]
    pub(super) fn add_assign(x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "both of one length");
        for i in 0..x.len() {
            x[i] += y[i];
        }
    }

    #[inline(always)]
    pub(super) fn add_rows(x: &mut [f32], rows: &[f32], weights: &[f32]) {
        let n = x.len();
        assert_eq!(rows.len(), n * weights.len(), "a weight for each row");
        let mut row = 0;
        // Four rows at once: `x` is read and written once for them.
        while row + 4 <= weights.len() {
            let w = &weights[row..row + 4];
            let (a, rest) = rows[row * n..(row + 4) * n].split_at(n);
            let (b, rest) = rest.split_at(n);
            let (c, d) = rest.split_at(n);
            for i in 0..n {
                x[i] = (((x[i] + w[0] * a[i]) + w[1] * b[i]) + w[2] * c[i]) + w[3] * d[i];
            }
            row += 4;
        }
        while row < weights.len() {
            let (weight, a) = (weights[row], &rows[row * n..(row + 1) * n]);
            for i in 0..n {
                x[i] += weight * a[i];
            }
            row += 1;
        }
    }

    #[inline(always)]
    pub(super) fn add_scaled(x: &mut [f32], y: &[f32], by: &[f32]) {
        assert!(x.len() == y.len() && x.len() == by.len(), "all of one length");
        for i in 0..x.len() {
            x[i] += y[i] * by[i];
        }
    }
}
