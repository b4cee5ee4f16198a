//! `w4a8/neon_i8mm`: `smmla`, 32 products an instruction.
//!
//! `smmla` multiplies two rows of eight columns by two tokens' eight activations into a 2 x 2 block of sums. A chunk's vector
//! holds columns 0 to 3 of four rows in its low and 4 to 7 in its high nibbles; zipping the two by words puts a row's eight
//! columns side by side, two rows a vector. Per chunk of 16 rows by 8 columns that is 4 loads, 8 operations to unpack and 8
//! zips, shared by all tokens, and for each pair of tokens 8 `smmla` and 2 loads for 256 products: with four tokens 40
//! instructions for 512 products, 0.078 a product.
//!
//! Tokens go in pairs; one left over takes the `sdot` kernel, which has no use for the second half of the block.

use std::arch::aarch64::*;

use super::neon_dotprod;
use crate::cpu::Isa;
use crate::kernels::arm::{finish_group, pair_rows, smmla, store};
use crate::kernels::tiles::{Outputs, Rows, Tile, int_matmul_kernel};
use crate::pack::Layout;

int_matmul_kernel!(NeonI8mm, Isa::NeonI8mm, Layout::W4, 4, block);

const STEP: usize = Layout::W4.step_bytes();

#[target_feature(enable = "neon,dotprod,i8mm")]
fn block(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    match out.len() {
        1 => neon_dotprod::rows::<1>(tile, x, out),
        2 => rows::<1>(tile, x, out),
        3 => {
            let (pair, last) = out.split_at_mut(2);
            rows::<1>(tile, &x.part(0, 2), pair);
            neon_dotprod::rows::<1>(tile, &x.part(2, 1), last);
        }
        _ => rows::<2>(tile, x, out),
    }
}

/// `P` pairs of tokens.
#[target_feature(enable = "neon,dotprod,i8mm")]
fn rows<const P: usize>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    assert!(out.len() == 2 * P);
    tile.check(x, 2 * P, STEP);
    let nibble = vdupq_n_u8(15);
    let mut y = [[[vdupq_n_f32(0.0); 4]; 2]; P];
    let mut weights = tile.bytes.as_ptr();
    let mut codes = x.codes.as_ptr();
    for g in 0..x.groups {
        // SAFETY: `check` made sure that the tile holds this group's header and steps, and each of the 2 P rows its 32
        // codes a step and one scale and sum a group; the pointers advance by exactly these amounts.
        unsafe {
            let header = weights;
            weights = weights.add(tile.header());
            let mut sums = [[vdupq_n_s32(0); 8]; P];
            // A chunk at a time: eight columns.
            for _ in 0..4 * tile.steps_of(g) {
                let mut eight = [vdupq_n_s8(0); P];
                for (p, eight) in eight.iter_mut().enumerate() {
                    let first = codes.add(2 * p * x.stride);
                    *eight = vcombine_s8(vld1_s8(first), vld1_s8(first.add(x.stride)));
                }
                for q in 0..4 {
                    let w = vld1q_u8(weights.add(16 * q));
                    let low = vreinterpretq_s32_u8(vandq_u8(w, nibble));
                    let high = vreinterpretq_s32_u8(vshrq_n_u8::<4>(w));
                    let first = vreinterpretq_s8_s32(vzip1q_s32(low, high));
                    let second = vreinterpretq_s8_s32(vzip2q_s32(low, high));
                    for (sums, eight) in sums.iter_mut().zip(eight) {
                        sums[2 * q] = smmla(sums[2 * q], first, eight);
                        sums[2 * q + 1] = smmla(sums[2 * q + 1], second, eight);
                    }
                }
                weights = weights.add(64);
                codes = codes.add(8);
            }
            for (p, (y, sums)) in y.iter_mut().zip(&sums).enumerate() {
                for (token, (y, sums)) in y.iter_mut().zip(pair_rows(sums)).enumerate() {
                    let at = (2 * p + token) * x.groups + g;
                    let (scale, sum) = (*x.scales.get_unchecked(at), *x.sums.get_unchecked(at));
                    finish_group::<4>(y, sums, header, tile.asymmetric, 0, scale, sum);
                }
            }
        }
    }
    store(out, y.as_flattened());
}
