//! `w8a8/avx2`: `vpmaddubsw` on magnitudes.
//!
//! The instruction wants one unsigned operand. `|w| * (x with the sign of w)` is the same product as `w * x`, and with `|w|`
//! at most 128 and `|x|` at most 127 a pair is at most 32512: it never saturates. Two pairs would, so each is widened to 32
//! bits at once by `vpmaddwd`. The magnitudes are made once for all rows.
//!
//! Where the weights are codes of 7 bits ([`Packed::narrow`]), adding 64 makes them unsigned, and the products of two columns
//! with any activations are at most 2 * 127 * 127: no change of sign is needed, and `64 * sum(activations)` is taken off once
//! a group. Where the activations have 7 bits, too, those of four columns are at most 4 * 127 * 63, so two pairs are added
//! before they are widened: three multiplications for 64 products, in place of six. In groups of 128 that runs at 1.6 times
//! the speed of 8 bits with 8.
//!
//! The change of sign takes one of the two multiplication slots a cycle (measured on Zen 3), so three instructions for 32
//! products set the pace. Tried and lost: widening both sides to 16 bits for `vpmaddwd` alone, which is two instructions. With
//! the activations widened once for all tiles, two rows by a whole tile run at 0.97 of this, four by half a tile at 0.7:
//! widening the weights, too, takes a slot, and each is used for fewer rows than registers would have to hold.

use std::arch::x86_64::*;

use crate::cpu::Isa;
use crate::kernels::tiles::{Outputs, Rows, Tile, fetch_ahead, int_matmul_kernel, opaque};
use crate::kernels::x86;
use crate::pack::{Layout, MIDDLE};

int_matmul_kernel!(Avx2, Isa::Avx2, Layout::W8, 4, block);

const STEP: usize = Layout::W8.step_bytes();

#[target_feature(enable = "avx2,fma,f16c")]
fn block(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    if tile.narrow {
        return if x.bits < 8 { narrow::<2>(tile, x, out) } else { narrow::<1>(tile, x, out) };
    }
    match (out.len(), tile.asymmetric) {
        (1, false) => rows::<1, false>(tile, x, out),
        (2, false) => rows::<2, false>(tile, x, out),
        (3, false) => rows::<3, false>(tile, x, out),
        (_, false) => rows::<4, false>(tile, x, out),
        (1, true) => rows::<1, true>(tile, x, out),
        (2, true) => rows::<2, true>(tile, x, out),
        (3, true) => rows::<3, true>(tile, x, out),
        (_, true) => rows::<4, true>(tile, x, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rows<const M: usize, const ASYMMETRIC: bool>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    assert!(out.len() == M && tile.asymmetric == ASYMMETRIC);
    tile.check(x, M, STEP);
    if M > 1 {
        opaque(0); // aligns the stack
    }
    let ones = _mm256_set1_epi16(1);
    let mut y = [[_mm256_setzero_ps(); 2]; M];
    let mut weights = tile.bytes.as_ptr();
    let mut codes = x.codes.as_ptr();
    for g in 0..x.groups {
        let header = weights;
        // SAFETY: `check` made sure that the tile holds this group's header and steps, and each of the M rows its 32
        // codes a step and one scale and sum a group; the pointers advance by exactly these amounts.
        unsafe {
            weights = weights.add(tile.header());
            let mut sums = [[_mm256_setzero_si256(); 2]; M];
            for chunk in 0..8 * tile.steps_of(g) {
                if tile.cold && chunk % 8 == 0 {
                    fetch_ahead::<STEP>(weights);
                }
                let chunk = weights.cast::<__m256i>();
                let w = [_mm256_loadu_si256(chunk), _mm256_loadu_si256(chunk.add(1))];
                let magnitude = [_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])];
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x = _mm256_set1_epi32(codes.add(m * x.stride).cast::<i32>().read_unaligned());
                    for half in 0..2 {
                        let pairs = _mm256_maddubs_epi16(magnitude[half], _mm256_sign_epi8(x, w[half]));
                        sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
                    }
                }
                weights = weights.add(64);
                codes = codes.add(4);
            }
            for half in 0..2 {
                let scale = _mm256_cvtph_ps(_mm_loadu_si128(header.cast::<__m128i>().add(half)));
                for m in 0..M {
                    let at = m * x.groups + g;
                    let mut sum = sums[m][half];
                    if ASYMMETRIC {
                        let zero = x86::zero_points(header, true, half);
                        let zero = _mm256_sub_epi32(zero, _mm256_set1_epi32(MIDDLE));
                        let x_sum = _mm256_set1_epi32(*x.sums.get_unchecked(at));
                        sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zero, x_sum));
                    }
                    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(*x.scales.get_unchecked(at)));
                    y[m][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, y[m][half]);
                }
            }
        }
    }
    x86::store(out, &y);
}

/// Weights of 7 bits; `PAIRS` chunks are added up in 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
fn narrow<const PAIRS: usize>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    match out.len() {
        1 => narrow_rows::<1, PAIRS>(tile, x, out),
        2 => narrow_rows::<2, PAIRS>(tile, x, out),
        3 => narrow_rows::<3, PAIRS>(tile, x, out),
        _ => narrow_rows::<4, PAIRS>(tile, x, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn narrow_rows<const M: usize, const PAIRS: usize>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    assert!(out.len() == M && tile.narrow && !tile.asymmetric && (PAIRS == 1 || x.bits < 8));
    tile.check(x, M, STEP);
    if M > 1 {
        opaque(0); // aligns the stack
    }
    let ones = _mm256_set1_epi16(1);
    let offset = _mm256_set1_epi8(64);
    let mut y = [[_mm256_setzero_ps(); 2]; M];
    let mut weights = tile.bytes.as_ptr();
    let mut codes = x.codes.as_ptr();
    for g in 0..x.groups {
        let header = weights;
        // SAFETY: as in `rows`.
        unsafe {
            weights = weights.add(tile.header());
            let mut sums = [[_mm256_setzero_si256(); 2]; M];
            for (m, sums) in sums.iter_mut().enumerate() {
                *sums = [_mm256_set1_epi32(-64 * *x.sums.get_unchecked(m * x.groups + g)); 2];
            }
            for chunk in 0..8 / PAIRS * tile.steps_of(g) {
                if tile.cold && chunk % (8 / PAIRS) == 0 {
                    fetch_ahead::<STEP>(weights);
                }
                let chunk = weights.cast::<__m256i>();
                let w: [[__m256i; 2]; PAIRS] = std::array::from_fn(|pair| {
                    std::array::from_fn(|half| {
                        _mm256_add_epi8(offset, _mm256_loadu_si256(chunk.add(2 * pair + half)))
                    })
                });
                for (m, sums) in sums.iter_mut().enumerate() {
                    let four = codes.add(m * x.stride).cast::<i32>();
                    let x: [__m256i; PAIRS] =
                        std::array::from_fn(|pair| _mm256_set1_epi32(four.add(pair).read_unaligned()));
                    for half in 0..2 {
                        let mut pairs = _mm256_maddubs_epi16(w[0][half], x[0]);
                        for pair in 1..PAIRS {
                            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[pair][half], x[pair]));
                        }
                        sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
                    }
                }
                weights = weights.add(64 * PAIRS);
                codes = codes.add(4 * PAIRS);
            }
            let scales = x86::scales(header);
            for m in 0..M {
                x86::finish_group(&mut y[m], sums[m], scales, *x.scales.get_unchecked(m * x.groups + g));
            }
        }
    }
    x86::store(out, &y);
}
