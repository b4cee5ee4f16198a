//! 4-bit weights, 8-bit activations.
//!
//! Per group: an exact integer dot product of unsigned codes 0..=15 with activations -127..=127, less `zero` times the
//! activations' sum, in sixteenths, which is the unit of the zero points; then one fused multiply-add with the product of
//! the two scales. See [`crate::pack`] for the tile.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_dotprod;
#[cfg(target_arch = "aarch64")]
mod neon_i8mm;
mod scalar;

use super::IntMatmul;
use super::tiles::kernel_of_every_tier;

/// All implementations this CPU allows, lowest tier first.
pub fn kernels() -> Vec<&'static dyn IntMatmul> {
    kernel_of_every_tier!()
}
