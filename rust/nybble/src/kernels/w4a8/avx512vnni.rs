//! `w4a8/avx512vnni`: `vpdpbusd`, 64 products an instruction.
//!
//! One 512-bit vector is a whole chunk: 16 rows by four columns. The instruction takes the unsigned codes as they are and
//! adds in 32 bits. High nibbles are not shifted down: their sums come out in sixteenths, which is the unit of the zero
//! points, so they start from `-zero * sum(x)`, and the low nibbles' sums are multiplied by 16 once a group. A row thus has
//! two chains of sums, which with one row also hide the instruction's latency.

use std::arch::x86_64::*;

use crate::cpu::Isa;
use crate::kernels::tiles::{Outputs, Rows, Tile, block_by_rows, fetch_ahead, int_matmul_kernel, opaque};
use crate::pack::{Layout, MIDDLE};

int_matmul_kernel!(Avx512Vnni, Isa::Avx512Vnni, Layout::W4, 8, block);

const STEP: usize = Layout::W4.step_bytes();

block_by_rows!("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c", rows, [1, 2, 3, 4, 5, 6, 7], 8);

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn rows<const M: usize>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    assert!(out.len() == M);
    tile.check(x, M, STEP);
    if M > 1 {
        opaque(0); // aligns the stack
    }
    let nibble = _mm512_set1_epi8(15);
    let mut y = [_mm512_setzero_ps(); M];
    let mut weights = tile.bytes.as_ptr();
    let mut codes = x.codes.as_ptr();
    for g in 0..x.groups {
        // SAFETY: `check` made sure that the tile holds this group's header and steps, and each of the M rows its 32
        // codes a step and one scale and sum a group; the pointers advance by exactly these amounts.
        unsafe {
            let header = weights;
            weights = weights.add(tile.header());
            let zero = if tile.asymmetric {
                _mm512_cvtepu8_epi32(_mm_loadu_si128(header.add(32).cast()))
            } else {
                _mm512_set1_epi32(MIDDLE)
            };
            let mut low = [_mm512_setzero_si512(); M];
            let mut high = [_mm512_setzero_si512(); M];
            for m in 0..M {
                let x_sum = _mm512_set1_epi32(*x.sums.get_unchecked(m * x.groups + g));
                high[m] = _mm512_sub_epi32(high[m], _mm512_mullo_epi32(zero, x_sum));
            }
            for _ in 0..tile.steps_of(g) {
                if tile.cold {
                    fetch_ahead::<STEP>(weights);
                }
                for chunk in 0..4 {
                    let w = _mm512_loadu_si512(weights.add(64 * chunk).cast());
                    let (w0, w1) = (_mm512_and_si512(w, nibble), _mm512_andnot_si512(nibble, w));
                    for m in 0..M {
                        let four = codes.add(m * x.stride + 8 * chunk).cast::<i32>();
                        let x0 = _mm512_set1_epi32(four.read_unaligned());
                        let x1 = _mm512_set1_epi32(four.add(1).read_unaligned());
                        low[m] = _mm512_dpbusd_epi32(low[m], w0, x0);
                        high[m] = _mm512_dpbusd_epi32(high[m], w1, x1);
                    }
                }
                weights = weights.add(STEP);
                codes = codes.add(32);
            }
            let scale = _mm512_cvtph_ps(_mm256_loadu_si256(header.cast()));
            for m in 0..M {
                let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<4>(low[m]), high[m]));
                let x_scale = _mm512_set1_ps(*x.scales.get_unchecked(m * x.groups + g));
                y[m] = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, x_scale), y[m]);
            }
        }
    }
    for (out, y) in out.iter_mut().zip(y) {
        // SAFETY: an output is 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), y) }
    }
}
