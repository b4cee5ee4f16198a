//! 4-bit weights, 4-bit activations: the fastest kernel of each tier.
//!
//! The arithmetic is that of [`super::w4a8`], and so is the result for the same codes; what differs is that codes of
//! activations are within -7..=7, so a product is at most 105 and many of them add up in 16 bits, two even in 8.
//!
//! That helps only where a CPU has no instruction that multiplies bytes and adds the products in 32 bits. Where it has
//! (`vpdpbusd`, `sdot`, `smmla`) no smaller product is cheaper, and the kernels of `w4a8` are the fastest for 4 bits as
//! well: 4-bit activations then only cost accuracy. What one instruction multiplies:
//!
//! | tier | w4a8 | w4a4 | w4a4 by the paper's multiplier |
//! |---|---|---|---|
//! | `avx2` | 32 (`vpmaddubsw`), widened every step | 32, widened every 16 steps | 32 in five instructions |
//! | `avxvnni` | 32 | 32, the same kernel | 32 in five instructions |
//! | `avx512vnni` | 64 | 64, the same kernel | 64 in five instructions |
//! | `neon` | 8 (`smlal`) | 16 (`mul`, `mla`), and one instruction to widen two of them | 16 in five instructions |
//! | `neon_dotprod` | 16 | 16, the same kernel | 16 in five instructions |
//! | `neon_i8mm` | 32 | 32, the same kernel | 16 in five instructions |
//!
//! So they pay, by little, on CPUs without a dot product: measured on Zen 3, `cargo bench -p nybble --bench roofline`, and
//! counted in instructions on ARMv8.0. [`super::w4a4_trip`] is the paper's multiplier.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "aarch64")]
mod neon;

use super::{IntMatmul, w4a8};
use crate::cpu::Isa;

/// All implementations this CPU allows, lowest tier first.
pub fn kernels() -> Vec<&'static dyn IntMatmul> {
    let own: &[Option<&'static dyn IntMatmul>] = &[
        #[cfg(target_arch = "x86_64")]
        avx2::kernel(),
        #[cfg(target_arch = "aarch64")]
        neon::kernel(),
    ];
    let own_of = |isa: Isa| own.iter().flatten().copied().find(|kernel| kernel.isa() == isa);
    w4a8::kernels().into_iter().map(|kernel| own_of(kernel.isa()).unwrap_or(kernel)).collect()
}
