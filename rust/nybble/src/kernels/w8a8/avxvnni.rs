//! `w8a8/avxvnni`: the VEX form of `vpdpbusd`, 32 products an instruction, for CPUs with VNNI but without AVX-512.
//!
//! A chunk is two vectors of eight rows by four columns, made unsigned by an XOR; sums start from `-zero * sum(x)`.

use std::arch::x86_64::*;

use crate::cpu::Isa;
use crate::kernels::tiles::{Outputs, Rows, Tile, block_by_rows, fetch_ahead, int_matmul_kernel, opaque};
use crate::kernels::x86;
use crate::pack::Layout;

int_matmul_kernel!(AvxVnni, Isa::AvxVnni, Layout::W8, 4, block);

const STEP: usize = Layout::W8.step_bytes();

block_by_rows!("avxvnni,avx2,fma,f16c", rows, [1, 2, 3], 4);

#[target_feature(enable = "avxvnni,avx2,fma,f16c")]
fn rows<const M: usize>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    assert!(out.len() == M);
    tile.check(x, M, STEP);
    if M > 1 {
        opaque(0); // aligns the stack
    }
    let sign = _mm256_set1_epi8(-128);
    let mut y = [[_mm256_setzero_ps(); 2]; M];
    let mut weights = tile.bytes.as_ptr();
    let mut codes = x.codes.as_ptr();
    for g in 0..x.groups {
        // SAFETY: `check` made sure that the tile holds this group's header and steps, and each of the M rows its 32
        // codes a step and one scale and sum a group; the pointers advance by exactly these amounts.
        unsafe {
            let header = weights;
            weights = weights.add(tile.header());
            let mut sums = [[_mm256_setzero_si256(); 2]; M];
            for half in 0..2 {
                let zero = x86::zero_points(header, tile.asymmetric, half);
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x_sum = _mm256_set1_epi32(*x.sums.get_unchecked(m * x.groups + g));
                    sums[half] = _mm256_sub_epi32(sums[half], _mm256_mullo_epi32(zero, x_sum));
                }
            }
            for _ in 0..tile.steps_of(g) {
                if tile.cold {
                    fetch_ahead::<STEP>(weights);
                }
                for chunk in 0..8 {
                    let w = weights.add(64 * chunk).cast::<__m256i>();
                    let w = [_mm256_loadu_si256(w), _mm256_loadu_si256(w.add(1))];
                    let w = w.map(|w| _mm256_xor_si256(w, sign));
                    for (m, sums) in sums.iter_mut().enumerate() {
                        let four = codes.add(m * x.stride + 4 * chunk).cast::<i32>();
                        let x = _mm256_set1_epi32(four.read_unaligned());
                        for half in 0..2 {
                            sums[half] = _mm256_dpbusd_avx_epi32(sums[half], w[half], x);
                        }
                    }
                }
                weights = weights.add(STEP);
                codes = codes.add(32);
            }
            let scales = x86::scales(header);
            for m in 0..M {
                x86::finish_group(&mut y[m], sums[m], scales, *x.scales.get_unchecked(m * x.groups + g));
            }
        }
    }
    x86::store(out, &y);
}
