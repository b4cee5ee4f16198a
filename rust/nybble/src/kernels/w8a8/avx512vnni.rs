//! `w8a8/avx512vnni`: `vpdpbusd`, 64 products an instruction.
//!
//! One 512-bit vector is a whole chunk: 16 rows by four columns. The instruction wants unsigned codes, so 128 is added back
//! by an XOR, and it adds in 32 bits, starting from `-zero * sum(x)`.

use std::arch::x86_64::*;

use crate::cpu::Isa;
use crate::kernels::tiles::{Outputs, Rows, Tile, block_by_rows, fetch_ahead, int_matmul_kernel, opaque};
use crate::pack::{Layout, MIDDLE};

int_matmul_kernel!(Avx512Vnni, Isa::Avx512Vnni, Layout::W8, 8, block);

const STEP: usize = Layout::W8.step_bytes();

block_by_rows!("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c", rows, [1, 2, 3, 4, 5, 6, 7], 8);

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn rows<const M: usize>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    assert!(out.len() == M);
    tile.check(x, M, STEP);
    if M > 1 {
        opaque(0); // aligns the stack
    }
    let sign = _mm512_set1_epi8(-128);
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
            let mut even = [_mm512_setzero_si512(); M];
            let mut odd = [_mm512_setzero_si512(); M];
            for m in 0..M {
                let x_sum = _mm512_set1_epi32(*x.sums.get_unchecked(m * x.groups + g));
                even[m] = _mm512_sub_epi32(even[m], _mm512_mullo_epi32(zero, x_sum));
            }
            for _ in 0..tile.steps_of(g) {
                if tile.cold {
                    fetch_ahead::<STEP>(weights);
                }
                for chunk in 0..8 {
                    let w = _mm512_loadu_si512(weights.add(64 * chunk).cast());
                    let w = _mm512_xor_si512(w, sign);
                    for m in 0..M {
                        let four = codes.add(m * x.stride + 4 * chunk).cast::<i32>();
                        let sums = if M < 4 && chunk % 2 == 1 { &mut odd[m] } else { &mut even[m] };
                        *sums = _mm512_dpbusd_epi32(*sums, w, _mm512_set1_epi32(four.read_unaligned()));
                    }
                }
                weights = weights.add(STEP);
                codes = codes.add(32);
            }
            let scale = _mm512_cvtph_ps(_mm256_loadu_si256(header.cast()));
            for m in 0..M {
                let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(even[m], odd[m]));
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
