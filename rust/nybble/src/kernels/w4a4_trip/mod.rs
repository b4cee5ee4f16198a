//! The 4-bit multiplier of Agile-Quant (arXiv 2312.05693, "SIMD-based 4-bit multiplier"): two products in one
//! multiplication.
//!
//! Weights of two neighbouring outputs share a 16-bit lane, `w0 + (w1 << 8)`. Multiplied by one activation `a`, the lane
//! holds `a w0` in its low and `a w1` in its high byte: both are at most `15 * 15 = 225`, so nothing is carried over. The
//! bytes are then taken apart and added in 16 bits, and spilled into 32 bits before 16 bits overflow: the paper's rule is
//! every 2^8 products, `225 * 256 = 57600`.
//!
//! Activations have to be unsigned for that: `a = x + 8`. With `n` columns in a group, `z` the zero point and the sums over
//! the group's columns,
//!
//! ```text
//! sum (w - z) x = sum w a - 8 sum w - z sum x
//! ```
//!
//! The result is that of [`super::w4a4`], bit for bit. It is kept to measure the paper's idea, not to run models: five
//! instructions (multiply, mask, shift, two additions) for as many lanes as `vpmaddubsw` or `vpdpbusd` multiply twice or
//! four times over in one or two. The paper compares with an int8 kernel that has no such instruction.
//!
//! What differs: the paper has weights stored as pairs of rows. Here they are brought into that order from the one tile that
//! all kernels share, once for up to eight tokens.

mod loops;

/// The kernel of one tier.
macro_rules! tier {
    ($token:ident, $isa:expr, $features:literal) => {
        $crate::kernels::tiles::int_matmul_kernel!($token, $isa, $crate::pack::Layout::W4, 8, block, 4);

        #[target_feature(enable = $features)]
        fn block(
            tile: &$crate::kernels::tiles::Tile<'_>,
            x: &$crate::kernels::tiles::Rows<'_>,
            out: &mut [$crate::kernels::tiles::Outputs],
        ) {
            super::loops::block(tile, x, out);
        }
    };
}

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
