//! RMS norm and layer norm of one row.
//!
//! Sums run in [`SUMS`] partial sums, element `i` into sum `i % SUMS`, which are then added pairwise: the same order in
//! every tier, wide enough for vector code, and more precise than one long sum.

mod loops;

/// The kernel of one tier.
macro_rules! tier {
    ($($tier:tt)+) => {
        $crate::kernels::elementwise::tiers::instantiate! {
            Norm for $($tier)+;
            fn rms(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]);
            fn layer(x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]);
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
mod scalar;

use super::elementwise::tiers::listed;
use crate::cpu::Isa;

/// Number of partial sums.
const SUMS: usize = 32;

/// Norms of one row.
///
/// # Panics
/// When the slices differ in length.
pub trait Norm: Sync {
    /// The tier.
    fn isa(&self) -> Isa;
    /// `out = x / sqrt(mean(x^2) + eps) * gain`.
    fn rms(&self, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]);
    /// `out = (x - mean(x)) / sqrt(variance(x) + eps) * gain + bias`, with the variance over `len` elements.
    fn layer(&self, x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]);
}

/// All kernels this CPU and `NYBBLE_ISA` allow, lowest tier first.
pub fn kernels() -> Vec<&'static dyn Norm> {
    listed!(dyn Norm)
}
