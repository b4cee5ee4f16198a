//! `w4a4/avx2`: that of `w4a8`, widened less often.
//!
//! A pair of products is at most `2 * 15 * 7 = 210`; the eight pairs of each of sixteen steps are at most 26880 in 16 bits.

use crate::cpu::Isa;
use crate::kernels::tiles::{Outputs, Rows, Tile, int_matmul_kernel};
use crate::kernels::w4a8::avx2::block_of;
use crate::pack::Layout;

int_matmul_kernel!(Avx2, Isa::Avx2, Layout::W4, 4, block, 4);

#[target_feature(enable = "avx2,fma,f16c")]
fn block(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    block_of::<16>(tile, x, out);
}
