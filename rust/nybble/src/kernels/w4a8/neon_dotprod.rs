//! `w4a8/neon_dotprod`: `sdot`, 16 products an instruction.
//!
//! A chunk is four vectors of four rows by four columns; `sdot` multiplies them by four activations picked from a register
//! that holds sixteen, so nothing is broadcast. Codes of 0..=15 are signed bytes as well as unsigned ones.
//!
//! Instructions a product: 0.16 with one token (half a step, 256 products, is 9 loads, 16 operations to unpack, 16 `sdot`),
//! 0.09 with four.

use std::arch::aarch64::*;

use crate::cpu::Isa;
use crate::kernels::arm::{finish_group, sdot_lane, store};
use crate::kernels::tiles::{Outputs, Rows, Tile, block_by_rows, int_matmul_kernel};
use crate::pack::Layout;

int_matmul_kernel!(NeonDotprod, Isa::NeonDotprod, Layout::W4, 4, block);

const STEP: usize = Layout::W4.step_bytes();

block_by_rows!("neon,dotprod", rows, [1, 2, 3], 4);

#[target_feature(enable = "neon,dotprod")]
pub(super) fn rows<const M: usize>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    assert!(out.len() == M);
    tile.check(x, M, STEP);
    let nibble = vdupq_n_u8(15);
    let mut y = [[vdupq_n_f32(0.0); 4]; M];
    let mut weights = tile.bytes.as_ptr();
    let mut codes = x.codes.as_ptr();
    for g in 0..x.groups {
        // SAFETY: `check` made sure that the tile holds this group's header and steps, and each of the M rows its 32
        // codes a step and one scale and sum a group; the pointers advance by exactly these amounts.
        unsafe {
            let header = weights;
            weights = weights.add(tile.header());
            let mut sums = [[vdupq_n_s32(0); 4]; M];
            // Half a step at a time: two chunks, sixteen columns.
            for _ in 0..2 * tile.steps_of(g) {
                let mut sixteen = [vdupq_n_s8(0); M];
                for (m, sixteen) in sixteen.iter_mut().enumerate() {
                    *sixteen = vld1q_s8(codes.add(m * x.stride));
                }
                for q in 0..4 {
                    let (w0, w1) = (vld1q_u8(weights.add(16 * q)), vld1q_u8(weights.add(64 + 16 * q)));
                    let low = |w| vreinterpretq_s8_u8(vandq_u8(w, nibble));
                    let high = |w| vreinterpretq_s8_u8(vshrq_n_u8::<4>(w));
                    for m in 0..M {
                        let mut sum = sums[m][q];
                        sum = sdot_lane::<0>(sum, low(w0), sixteen[m]);
                        sum = sdot_lane::<1>(sum, high(w0), sixteen[m]);
                        sum = sdot_lane::<2>(sum, low(w1), sixteen[m]);
                        sums[m][q] = sdot_lane::<3>(sum, high(w1), sixteen[m]);
                    }
                }
                weights = weights.add(128);
                codes = codes.add(16);
            }
            for m in 0..M {
                let at = m * x.groups + g;
                let (scale, sum) = (*x.scales.get_unchecked(at), *x.sums.get_unchecked(at));
                finish_group::<4>(&mut y[m], sums[m], header, tile.asymmetric, 0, scale, sum);
            }
        }
    }
    store(out, &y);
}
