//! `quantize/avx512vnni`: sixteen floats at a time.

use std::arch::x86_64::*;
use std::sync::LazyLock;

use super::{Block, Quantize, Rounding, Row, convert};
use crate::cpu::{Avx512Vnni, Isa};

/// Holds the proof that the instructions may be used.
struct Kernel(#[allow(dead_code)] Avx512Vnni);

/// The kernel, if the CPU has the tier.
pub(super) fn kernel() -> Option<&'static dyn Quantize> {
    static KERNEL: LazyLock<Option<Kernel>> = LazyLock::new(|| Avx512Vnni::new().map(Kernel));
    KERNEL.as_ref().map(|k| k as &dyn Quantize)
}

impl Quantize for Kernel {
    fn isa(&self) -> Isa {
        Isa::Avx512Vnni
    }

    fn row(&self, x: &[f32], group: usize, rounding: Rounding, out: Row<'_>) {
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { row(x, group, rounding, out) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn row(x: &[f32], group: usize, rounding: Rounding, out: Row<'_>) {
    convert(x, group, rounding, out, |x| largest(x), |x, inverse, codes| encode(x, inverse, codes));
}

/// Half of the 32 values.
#[inline]
#[target_feature(enable = "avx512f")]
fn half(x: &Block<f32>, i: usize) -> __m512 {
    let half = &x[16 * i..16 * i + 16];
    // SAFETY: the slice has sixteen values.
    unsafe { _mm512_loadu_ps(half.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn largest(x: &[Block<f32>]) -> u32 {
    let mut top = _mm512_setzero_si512();
    for x in x {
        let magnitude = |i| _mm512_and_si512(_mm512_castps_si512(half(x, i)), _mm512_set1_epi32(0x7fff_ffff));
        top = _mm512_max_epu32(top, _mm512_max_epu32(magnitude(0), magnitude(1)));
    }
    _mm512_reduce_max_epu32(top)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn encode(x: &[Block<f32>], inverse: f32, codes: &mut [Block<i8>]) -> i32 {
    let inverse = _mm512_set1_ps(inverse);
    let mut sums = _mm512_setzero_si512();
    for (x, codes) in x.iter().zip(codes) {
        // Rust leaves the rounding mode alone: to nearest, halves to even.
        let code = |i| _mm512_cvtps_epi32(_mm512_mul_ps(half(x, i), inverse));
        let (low, high) = (code(0), code(1));
        let start: *mut i8 = codes.as_mut_ptr();
        // SAFETY: the destination has 32 bytes.
        unsafe {
            _mm_storeu_si128(start.cast(), _mm512_cvtepi32_epi8(low));
            _mm_storeu_si128(start.add(16).cast(), _mm512_cvtepi32_epi8(high));
        }
        sums = _mm512_add_epi32(sums, _mm512_add_epi32(low, high));
    }
    _mm512_reduce_add_epi32(sums)
}
