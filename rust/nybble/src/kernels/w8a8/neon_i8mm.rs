//! `w8a8/neon_i8mm`: `smmla`, 32 products an instruction.
//!
//! As `w4a8/neon_i8mm`; here a row's eight columns come from two chunks, zipped by words. Per two chunks of 16 rows by 4
//! columns that is 8 loads and 8 zips, shared by all tokens, and for each pair of tokens 8 `smmla` and 2 loads: with four
//! tokens 36 instructions for 512 products, 0.070 a product.

use std::arch::aarch64::*;

use super::neon_dotprod;
use crate::cpu::Isa;
use crate::kernels::arm::{finish_group, pair_rows, smmla, store};
use crate::kernels::tiles::{Outputs, Rows, Tile, int_matmul_kernel};
use crate::pack::Layout;

int_matmul_kernel!(NeonI8mm, Isa::NeonI8mm, Layout::W8, 4, block);

const STEP: usize = Layout::W8.step_bytes();

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
            // Two chunks at a time: eight columns.
            for _ in 0..4 * tile.steps_of(g) {
                let mut eight = [vdupq_n_s8(0); P];
                for (p, eight) in eight.iter_mut().enumerate() {
                    let first = codes.add(2 * p * x.stride);
                    *eight = vcombine_s8(vld1_s8(first), vld1_s8(first.add(x.stride)));
                }
                for q in 0..4 {
                    let chunks = weights.cast::<i8>().add(16 * q);
                    let left = vreinterpretq_s32_s8(vld1q_s8(chunks));
                    let right = vreinterpretq_s32_s8(vld1q_s8(chunks.add(64)));
                    let first = vreinterpretq_s8_s32(vzip1q_s32(left, right));
                    let second = vreinterpretq_s8_s32(vzip2q_s32(left, right));
                    for (sums, eight) in sums.iter_mut().zip(eight) {
                        sums[2 * q] = smmla(sums[2 * q], first, eight);
                        sums[2 * q + 1] = smmla(sums[2 * q + 1], second, eight);
                    }
                }
                weights = weights.add(128);
                codes = codes.add(8);
            }
            for (p, (y, sums)) in y.iter_mut().zip(&sums).enumerate() {
                for (token, (y, sums)) in y.iter_mut().zip(pair_rows(sums)).enumerate() {
                    let at = (2 * p + token) * x.groups + g;
                    let (scale, sum) = (*x.scales.get_unchecked(at), *x.sums.get_unchecked(at));
                    finish_group::<0>(y, sums, header, tile.asymmetric, 128, scale, sum);
                }
            }
        }
    }
    store(out, y.as_flattened());
}
