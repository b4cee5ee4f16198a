//! `quantize/avx2`: eight floats at a time.

use std::arch::x86_64::*;
use std::sync::LazyLock;

use super::{Block, Quantize, Rounding, Row, convert};
use crate::cpu::{Avx2, Isa};

/// Holds the proof that the instructions may be used.
struct Kernel(#[allow(dead_code)] Avx2);

/// The kernel, if the CPU has the tier.
pub(super) fn kernel() -> Option<&'static dyn Quantize> {
    static KERNEL: LazyLock<Option<Kernel>> = LazyLock::new(|| Avx2::new().map(Kernel));
    KERNEL.as_ref().map(|k| k as &dyn Quantize)
}

impl Quantize for Kernel {
    fn isa(&self) -> Isa {
        Isa::Avx2
    }

    fn row(&self, x: &[f32], group: usize, rounding: Rounding, out: Row<'_>) {
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { row(x, group, rounding, out) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn row(x: &[f32], group: usize, rounding: Rounding, out: Row<'_>) {
    convert(x, group, rounding, out, |x| largest(x), |x, inverse, codes| encode(x, inverse, codes));
}

/// Eight of the 32 values.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eight(x: &Block<f32>, i: usize) -> __m256 {
    let eight = &x[8 * i..8 * i + 8];
    // SAFETY: the slice has eight values.
    unsafe { _mm256_loadu_ps(eight.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn largest(x: &[Block<f32>]) -> u32 {
    let mut top = _mm256_setzero_si256();
    for x in x {
        let magnitude =
            |i| _mm256_and_si256(_mm256_castps_si256(eight(x, i)), _mm256_set1_epi32(0x7fff_ffff));
        let low = _mm256_max_epu32(magnitude(0), magnitude(1));
        top = _mm256_max_epu32(top, _mm256_max_epu32(low, _mm256_max_epu32(magnitude(2), magnitude(3))));
    }
    let top = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top));
    let top = _mm_max_epu32(top, _mm_shuffle_epi32::<0b01_00_11_10>(top));
    let top = _mm_max_epu32(top, _mm_shuffle_epi32::<0b10_11_00_01>(top));
    _mm_cvtsi128_si32(top) as u32
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn encode(x: &[Block<f32>], inverse: f32, codes: &mut [Block<i8>]) -> i32 {
    let inverse = _mm256_set1_ps(inverse);
    let mut sums = _mm256_setzero_si256();
    for (x, codes) in x.iter().zip(codes) {
        // Rust leaves the rounding mode alone: to nearest, halves to even.
        let code = |i| _mm256_cvtps_epi32(_mm256_mul_ps(eight(x, i), inverse));
        // Packing works within 128-bit halves; the permutation puts groups of four values back into order.
        let low = _mm256_packs_epi32(code(0), code(1));
        let packed = _mm256_packs_epi16(low, _mm256_packs_epi32(code(2), code(3)));
        let packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        // SAFETY: the destination has 32 bytes.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), packed) }
        let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), packed);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    let sums = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
    let sums = _mm_add_epi32(sums, _mm_shuffle_epi32::<0b01_00_11_10>(sums));
    let sums = _mm_add_epi32(sums, _mm_shuffle_epi32::<0b10_11_00_01>(sums));
    _mm_cvtsi128_si32(sums)
}
