//! `w4a8/neon`: `smlal`, eight products an instruction, for cores without a dot product.
//!
//! Each vector of eight bytes is two rows by four columns, multiplied by four activations repeated twice, and added in 16
//! bits. A product is at most `15 * 127 = 1905`, and a lane gets eight of them a step (15240); at its end `sadalp` adds
//! neighbours into 32 bits. The two 32-bit lanes a row are added once a group.
//!
//! Instructions a product: 0.25 with one token (a step of 512 products is 16 loads, 32 operations to unpack, 64 `smlal`, 8
//! broadcasts, 8 `sadalp`), 0.20 with two.

use std::arch::aarch64::*;

use crate::cpu::Isa;
use crate::kernels::arm::{finish_group, store};
use crate::kernels::tiles::{Outputs, Rows, Tile, block_by_rows, int_matmul_kernel};
use crate::pack::Layout;

int_matmul_kernel!(Neon, Isa::Neon, Layout::W4, 2, block);

const STEP: usize = Layout::W4.step_bytes();

block_by_rows!("neon", rows, [1], 2);

#[target_feature(enable = "neon")]
fn rows<const M: usize>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
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
            let mut sums = [[vdupq_n_s32(0); 8]; M];
            for _ in 0..tile.steps_of(g) {
                let mut short = [[vdupq_n_s16(0); 8]; M];
                for chunk in 0..4 {
                    let mut x0 = [vdup_n_s8(0); M];
                    let mut x1 = [vdup_n_s8(0); M];
                    for m in 0..M {
                        let four = codes.add(m * x.stride + 8 * chunk).cast::<i32>();
                        x0[m] = vreinterpret_s8_s32(vdup_n_s32(four.read_unaligned()));
                        x1[m] = vreinterpret_s8_s32(vdup_n_s32(four.add(1).read_unaligned()));
                    }
                    for q in 0..4 {
                        let w = vld1q_u8(weights.add(64 * chunk + 16 * q));
                        let low = vreinterpretq_s8_u8(vandq_u8(w, nibble));
                        let high = vreinterpretq_s8_u8(vshrq_n_u8::<4>(w));
                        for (m, short) in short.iter_mut().enumerate() {
                            let first = vmlal_s8(short[2 * q], vget_low_s8(low), x0[m]);
                            let second = vmlal_s8(short[2 * q + 1], vget_high_s8(low), x0[m]);
                            short[2 * q] = vmlal_s8(first, vget_low_s8(high), x1[m]);
                            short[2 * q + 1] = vmlal_s8(second, vget_high_s8(high), x1[m]);
                        }
                    }
                }
                for (sums, short) in sums.iter_mut().zip(&short) {
                    for (sum, short) in sums.iter_mut().zip(short) {
                        *sum = vpadalq_s16(*sum, *short);
                    }
                }
                weights = weights.add(STEP);
                codes = codes.add(32);
            }
            for m in 0..M {
                let at = m * x.groups + g;
                let (scale, sum) = (*x.scales.get_unchecked(at), *x.sums.get_unchecked(at));
                let mut lanes = [vdupq_n_s32(0); 4];
                for (q, lanes) in lanes.iter_mut().enumerate() {
                    *lanes = vpaddq_s32(sums[m][2 * q], sums[m][2 * q + 1]);
                }
                finish_group::<4>(&mut y[m], lanes, header, tile.asymmetric, 0, scale, sum);
            }
        }
    }
    store(out, &y);
}
