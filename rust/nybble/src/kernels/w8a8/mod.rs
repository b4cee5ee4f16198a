//! 8-bit weights, 8-bit activations.
//!
//! As `w4a8`, with codes 0..=255. Tiles hold them as signed bytes (less 128), so that a symmetric matrix, whose zero point is
//! 128, needs no correction at all on instruction sets that multiply signed bytes. See [`crate::pack`] for the tile.

#[cfg(target_arch = "x86_64")]
mod avx2;
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
