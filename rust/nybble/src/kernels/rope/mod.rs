//! Rotary position embedding.
//!
//! Each head's first `rotary_dim` elements are taken as pairs (element `i` with element `i + rotary_dim / 2`, the pairing of
//! Hugging Face models) and every pair is turned by an angle that grows with the position and falls with `i`. The product of
//! a turned query and a turned key then depends on the distance of their positions only. Cosines and sines come from the
//! caller, which computes them once a position for all layers.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

/// The kernel of one tier.
macro_rules! tier {
    ($($tier:tt)+) => {
        $crate::kernels::elementwise::tiers::instantiate! {
            Rope for $($tier)+;
            fn rotate(x: &mut [f32], head_dim: usize, rotary_dim: usize, cos: &[f32], sin: &[f32]);
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

/// Rotation of the heads of one token.
pub trait Rope: Sync {
    /// The tier.
    fn isa(&self) -> Isa;
    /// Turns every head of `x [heads * head_dim]`; `cos` and `sin` have `rotary_dim / 2` elements.
    ///
    /// # Panics
    /// When `x` is not made of whole heads, or `rotary_dim` is odd, larger than `head_dim` or not twice the length of `cos`
    /// and `sin`.
    fn rotate(&self, x: &mut [f32], head_dim: usize, rotary_dim: usize, cos: &[f32], sin: &[f32]);
}

/// All kernels this CPU and `NYBBLE_ISA` allow, lowest tier first.
pub fn kernels() -> Vec<&'static dyn Rope> {
    listed!(dyn Rope)
}

/// The loop every tier is made of.
mod loops {
    #[inline(always)]
    pub(super) fn rotate(x: &mut [f32], head_dim: usize, rotary_dim: usize, cos: &[f32], sin: &[f32]) {
        assert!(
            head_dim > 0 && x.len().is_multiple_of(head_dim),
            "{} elements in heads of {head_dim}",
            x.len()
        );
        assert!(rotary_dim <= head_dim && rotary_dim.is_multiple_of(2), "{rotary_dim} of {head_dim} turned");
        let half = rotary_dim / 2;
        assert!(cos.len() == half && sin.len() == half, "one angle a pair");
        for head in x.chunks_exact_mut(head_dim) {
            let (first, second) = head[..rotary_dim].split_at_mut(half);
            for i in 0..half {
                let (a, b) = (first[i], second[i]);
                first[i] = a * cos[i] - b * sin[i];
                second[i] = b * cos[i] + a * sin[i];
            }
        }
    }
}
