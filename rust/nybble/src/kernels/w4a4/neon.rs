//! `w4a4/neon`: `mul` and `mla` on bytes, sixteen products an instruction, for cores without a dot product.
//!
//! Several tokens take weights as -8..=7: a product with an activation of -7..=7 is then at most 56 and the sum of two at
//! most 112, so `mul` and `mla` stay within a byte, and one `sadalp` adds neighbouring bytes into 16 bits. One token does
//! not pay for the subtraction of 8: codes of 0..=15 give products of at most 105, each widened by itself. A lane of 16 bits
//! grows by at most 4 * 420 a step and is widened to 32 bits after 16 steps, or at the end of a group.
//!
//! Instructions a product: 0.23 with one token (a step of 512 products is 16 loads, 32 operations to unpack, 8 broadcasts,
//! 32 `mul`, 32 `sadalp`) against 0.25 of `w4a8/neon`; 0.15 with four (64 to unpack, for all; 16 `mul`, 16 `mla`, 16
//! `sadalp` for each) against its 0.20 with two, the most that its registers hold. A core that runs 128-bit multiplications
//! at half the rate of `smlal` gains nothing.

use std::arch::aarch64::*;

use crate::cpu::Isa;
use crate::kernels::arm::{finish_group, store};
use crate::kernels::tiles::{Outputs, Rows, Tile, block_by_rows, int_matmul_kernel};
use crate::pack::Layout;

int_matmul_kernel!(Neon, Isa::Neon, Layout::W4, 4, block, 4);

const STEP: usize = Layout::W4.step_bytes();

/// Steps that 16-bit sums hold.
const WIDEN: usize = 16;

block_by_rows!("neon", rows, [1, 2, 3], 4);

#[target_feature(enable = "neon")]
fn rows<const M: usize>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    assert!(out.len() == M);
    tile.check(x, M, STEP);
    let (nibble, eight) = (vdupq_n_u8(15), vdupq_n_s8(8));
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
            let mut left = tile.steps_of(g);
            while left > 0 {
                let mut short = [[vdupq_n_s16(0); 4]; M]; // two lanes a row
                for _ in 0..left.min(WIDEN) {
                    for chunk in 0..4 {
                        let mut x0 = [vdupq_n_s8(0); M];
                        let mut x1 = [vdupq_n_s8(0); M];
                        for m in 0..M {
                            let four = codes.add(m * x.stride + 8 * chunk).cast::<i32>();
                            x0[m] = vreinterpretq_s8_s32(vdupq_n_s32(four.read_unaligned()));
                            x1[m] = vreinterpretq_s8_s32(vdupq_n_s32(four.add(1).read_unaligned()));
                        }
                        for q in 0..4 {
                            let w = vld1q_u8(weights.add(64 * chunk + 16 * q));
                            let mut low = vreinterpretq_s8_u8(vandq_u8(w, nibble));
                            let mut high = vreinterpretq_s8_u8(vshrq_n_u8::<4>(w));
                            if M == 1 {
                                let first = vpadalq_s8(short[0][q], vmulq_s8(low, x0[0]));
                                short[0][q] = vpadalq_s8(first, vmulq_s8(high, x1[0]));
                                continue;
                            }
                            (low, high) = (vsubq_s8(low, eight), vsubq_s8(high, eight));
                            for (m, short) in short.iter_mut().enumerate() {
                                let products = vmlaq_s8(vmulq_s8(low, x0[m]), high, x1[m]);
                                short[q] = vpadalq_s8(short[q], products);
                            }
                        }
                    }
                    weights = weights.add(STEP);
                    codes = codes.add(32);
                }
                left = left.saturating_sub(WIDEN);
                for m in 0..M {
                    for q in 0..4 {
                        sums[m][q] = vpadalq_s16(sums[m][q], short[m][q]);
                    }
                }
            }
            for m in 0..M {
                let at = m * x.groups + g;
                let (scale, sum) = (*x.scales.get_unchecked(at), *x.sums.get_unchecked(at));
                // Zero points are in sixteenths, and so is the 8 that the codes were lowered by.
                let bias = if M == 1 { 0 } else { 16 * 8 };
                finish_group::<4>(&mut y[m], sums[m], header, tile.asymmetric, bias, scale, sum);
            }
        }
    }
    store(out, &y);
}
