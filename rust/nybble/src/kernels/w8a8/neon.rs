//! `w8a8/neon`: `smlal`, eight products an instruction, for cores without a dot product.
//!
//! As `w4a8/neon`, but a product is up to `128 * 127 = 16256`: two of them fit into 16 bits (32512), a third does not. So
//! two chunks are multiplied and then added into 32 bits.
//!
//! Instructions a product: 0.27 with one token (two chunks, 128 products, are 8 loads, 2 broadcasts, 16 multiplications, 8
//! `sadalp`), 0.23 with two.

use std::arch::aarch64::*;

use crate::cpu::Isa;
use crate::kernels::arm::{finish_group, store};
use crate::kernels::tiles::{Outputs, Rows, Tile, block_by_rows, int_matmul_kernel};
use crate::pack::Layout;

int_matmul_kernel!(Neon, Isa::Neon, Layout::W8, 2, block);

const STEP: usize = Layout::W8.step_bytes();

block_by_rows!("neon", rows, [1], 2);

#[target_feature(enable = "neon")]
fn rows<const M: usize>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    assert!(out.len() == M);
    tile.check(x, M, STEP);
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
            // Two chunks at a time: eight columns.
            for _ in 0..4 * tile.steps_of(g) {
                let mut x0 = [vdup_n_s8(0); M];
                let mut x1 = [vdup_n_s8(0); M];
                for m in 0..M {
                    let four = codes.add(m * x.stride).cast::<i32>();
                    x0[m] = vreinterpret_s8_s32(vdup_n_s32(four.read_unaligned()));
                    x1[m] = vreinterpret_s8_s32(vdup_n_s32(four.add(1).read_unaligned()));
                }
                for q in 0..4 {
                    let chunks = weights.cast::<i8>().add(16 * q);
                    let (w0, w1) = (vld1q_s8(chunks), vld1q_s8(chunks.add(64)));
                    for (m, sums) in sums.iter_mut().enumerate() {
                        let first = vmull_s8(vget_low_s8(w0), x0[m]);
                        let second = vmull_s8(vget_high_s8(w0), x0[m]);
                        let first = vmlal_s8(first, vget_low_s8(w1), x1[m]);
                        let second = vmlal_s8(second, vget_high_s8(w1), x1[m]);
                        sums[2 * q] = vpadalq_s16(sums[2 * q], first);
                        sums[2 * q + 1] = vpadalq_s16(sums[2 * q + 1], second);
                    }
                }
                weights = weights.add(128);
                codes = codes.add(8);
            }
            for m in 0..M {
                let at = m * x.groups + g;
                let (scale, sum) = (*x.scales.get_unchecked(at), *x.sums.get_unchecked(at));
                let mut lanes = [vdupq_n_s32(0); 4];
                for (q, lanes) in lanes.iter_mut().enumerate() {
                    *lanes = vpaddq_s32(sums[m][2 * q], sums[m][2 * q + 1]);
                }
                finish_group::<0>(&mut y[m], lanes, header, tile.asymmetric, 128, scale, sum);
            }
        }
    }
    store(out, &y);
}
