//! What the 256-bit integer matmuls share: the beginning and the end of a group, 16 outputs as two vectors of eight.

use std::arch::x86_64::*;

use super::tiles::Outputs;
use crate::pack::MIDDLE;

/// The zero points of eight rows, half `half` of the tile's, or [`MIDDLE`] for each if there are none.
///
/// # Safety
/// The header behind `header` can be read.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn zero_points(header: *const u8, asymmetric: bool, half: usize) -> __m256i {
    if asymmetric {
        // SAFETY: 16 zero points of one byte follow the 16 scales of two.
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(header.add(32 + 8 * half).cast())) }
    } else {
        _mm256_set1_epi32(MIDDLE)
    }
}

/// The scales of the 16 rows.
///
/// # Safety
/// The header behind `header` can be read.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(crate) unsafe fn scales(header: *const u8) -> [__m256; 2] {
    let scales = header.cast::<__m128i>();
    // SAFETY: a header begins with 16 scales of two bytes.
    unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(scales)), _mm256_cvtph_ps(_mm_loadu_si128(scales.add(1)))] }
}

/// `y += (scale * x_scale) * sums`: the end of a group for one row.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn finish_group(y: &mut [__m256; 2], sums: [__m256i; 2], scales: [__m256; 2], x_scale: f32) {
    let x_scale = _mm256_set1_ps(x_scale);
    for half in 0..2 {
        let scale = _mm256_mul_ps(scales[half], x_scale);
        y[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[half]), scale, y[half]);
    }
}

/// Writes the rows' outputs.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn store(out: &mut [Outputs], y: &[[__m256; 2]]) {
    for (out, y) in out.iter_mut().zip(y) {
        // SAFETY: an output is 16 floats.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), y[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), y[1]);
        }
    }
}
