//! `w4a8/avx2`: `vpmaddubsw`, 32 products an instruction.
//!
//! The instruction multiplies unsigned by signed bytes and adds neighbours in 16 bits, saturating. A pair of products is at
//! most `2 * 15 * 127 = 3810`, so the eight of a step (30480) are added in 16 bits without overflow, and widened to 32 bits
//! once a step, by a `vpmaddwd` that multiplies by 16 on the way: sums are in sixteenths, as zero points are.
//!
//! 4-bit activations (`w4a4`) add up sixteen steps before they are widened.
//!
//! Four rows at a time: eight 16-bit sums, four unpacked weight vectors, two constants and a broadcast fill the sixteen
//! registers; the 32-bit sums, touched once a step, and the outputs, once a group, may live in memory.

use std::arch::x86_64::*;

use crate::cpu::Isa;
use crate::kernels::tiles::{Outputs, Rows, Tile, fetch_ahead, int_matmul_kernel, opaque};
use crate::kernels::x86;
use crate::pack::Layout;

int_matmul_kernel!(Avx2, Isa::Avx2, Layout::W4, 4, block);

const STEP: usize = Layout::W4.step_bytes();

#[target_feature(enable = "avx2,fma,f16c")]
fn block(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    block_of::<1>(tile, x, out);
}

/// The block of a kernel whose 16-bit sums hold `WIDEN` steps.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) fn block_of<const WIDEN: usize>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    match (out.len(), tile.asymmetric) {
        (1, false) => rows::<1, false, WIDEN>(tile, x, out),
        (2, false) => rows::<2, false, WIDEN>(tile, x, out),
        (3, false) => rows::<3, false, WIDEN>(tile, x, out),
        (_, false) => rows::<4, false, WIDEN>(tile, x, out),
        (1, true) => rows::<1, true, WIDEN>(tile, x, out),
        (2, true) => rows::<2, true, WIDEN>(tile, x, out),
        (3, true) => rows::<3, true, WIDEN>(tile, x, out),
        (_, true) => rows::<4, true, WIDEN>(tile, x, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rows<const M: usize, const ASYMMETRIC: bool, const WIDEN: usize>(
    tile: &Tile<'_>,
    x: &Rows<'_>,
    out: &mut [Outputs],
) {
    assert!(out.len() == M && tile.asymmetric == ASYMMETRIC);
    tile.check(x, M, STEP);
    // Where registers are scarce the chunks stay a loop: unrolled, the compiler reorders the additions and spills.
    let chunks = if M > 1 { opaque(4) } else { 4 };
    let nibble = _mm256_set1_epi8(15);
    let sixteen = _mm256_set1_epi16(16);
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
            for (m, sums) in sums.iter_mut().enumerate() {
                let x_sum = _mm256_set1_epi32(*x.sums.get_unchecked(m * x.groups + g));
                for half in 0..2 {
                    let offset = if ASYMMETRIC {
                        let zero = x86::zero_points(header, true, half);
                        _mm256_mullo_epi32(zero, x_sum)
                    } else {
                        _mm256_slli_epi32::<7>(x_sum) // times MIDDLE
                    };
                    sums[half] = _mm256_sub_epi32(sums[half], offset);
                }
            }
            let mut left = tile.steps_of(g);
            while left > 0 {
                let mut pairs = [[_mm256_setzero_si256(); 2]; M];
                for _ in 0..left.min(WIDEN) {
                    if tile.cold {
                        fetch_ahead::<STEP>(weights);
                    }
                    for chunk in 0..chunks {
                        let packed = weights.add(64 * chunk).cast::<__m256i>();
                        let (w0, w1) = (_mm256_loadu_si256(packed), _mm256_loadu_si256(packed.add(1)));
                        let low = [_mm256_and_si256(w0, nibble), _mm256_and_si256(w1, nibble)];
                        let high = [
                            _mm256_and_si256(_mm256_srli_epi16::<4>(w0), nibble),
                            _mm256_and_si256(_mm256_srli_epi16::<4>(w1), nibble),
                        ];
                        for (m, pairs) in pairs.iter_mut().enumerate() {
                            let four = codes.add(m * x.stride + 8 * chunk).cast::<i32>();
                            let x0 = _mm256_set1_epi32(four.read_unaligned());
                            let x1 = _mm256_set1_epi32(four.add(1).read_unaligned());
                            for half in 0..2 {
                                let sum = _mm256_add_epi16(pairs[half], _mm256_maddubs_epi16(low[half], x0));
                                pairs[half] = _mm256_add_epi16(sum, _mm256_maddubs_epi16(high[half], x1));
                            }
                        }
                    }
                    weights = weights.add(STEP);
                    codes = codes.add(32);
                }
                left = left.saturating_sub(WIDEN);
                for (sums, pairs) in sums.iter_mut().zip(&pairs) {
                    for half in 0..2 {
                        sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs[half], sixteen));
                    }
                }
            }
            let scales = x86::scales(header);
            for m in 0..M {
                x86::finish_group(&mut y[m], sums[m], scales, *x.scales.get_unchecked(m * x.groups + g));
            }
        }
    }
    x86::store(out, &y);
}
