//! `quantize/avx512vnni`: sixteen floats at a time.

use std::arch::x86_64::*;
use std::sync::LazyLock;

use super::{Granularity, Quantize, Row, convert};
use crate::cpu::{Avx512Vnni, Isa};
use crate::pack::TILE_K;

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

    fn row(&self, x: &[f32], group: usize, per: Granularity, out: Row<'_>) {
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { row(x, group, per, out) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn row(x: &[f32], group: usize, per: Granularity, out: Row<'_>) {
    convert(x, group, per, out, |x| largest(x), |x, inverse, codes| encode(x, inverse, codes));
}

/// Half of the 32 values.
#[inline]
#[target_feature(enable = "avx512f")]
fn half(x: &[f32; TILE_K], i: usize) -> __m512 {
    let half = &x[16 * i..16 * i + 16];
    // SAFETY: the slice has sixteen values.
    unsafe { _mm512_loadu_ps(half.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn largest(x: &[f32; TILE_K]) -> u32 {
    let magnitude = |i| _mm512_and_si512(_mm512_castps_si512(half(x, i)), _mm512_set1_epi32(0x7fff_ffff));
    _mm512_reduce_max_epu32(_mm512_max_epu32(magnitude(0), magnitude(1)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn encode(x: &[f32; TILE_K], inverse: f32, codes: &mut [i8; TILE_K]) -> i32 {
    let inverse = _mm512_set1_ps(inverse);
    let code = |i| _mm512_cvtps_epi32(_mm512_mul_ps(half(x, i), inverse));
    let (low, high) = (code(0), code(1));
    let start: *mut i8 = codes.as_mut_ptr();
    // SAFETY: the destination has 32 bytes.
    unsafe {
        _mm_storeu_si128(start.cast(), _mm512_cvtepi32_epi8(low));
        _mm_storeu_si128(start.add(16).cast(), _mm512_cvtepi32_epi8(high));
    }
    _mm512_reduce_add_epi32(_mm512_add_epi32(low, high))
}
