//! Panels with AVX2, FMA and F16C: 16 lanes are two registers.
//!
//! Six rows of one tile fill 12 of the 16 registers with sums and leave room for the two of weights and one broadcast:
//! 12 independent chains, more than the 8 that keep two multipliers of latency 4 busy.

#![allow(clippy::inline_always)] // see `lanes`

use std::arch::x86_64::{
    __m256, _mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};
use std::ops::Range;

use half::{bf16, f16};

use super::lanes::{Element, Lanes, Panel, Tier, by_rows, widen};
use crate::cpu::{Avx2, Isa};
use crate::pack::Packed;

/// Sixteen floats in two registers.
#[derive(Clone, Copy)]
struct Pair(__m256, __m256);

impl Lanes for Pair {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller has AVX2.
        unsafe { Self(_mm256_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller has AVX2; 16 floats are readable there.
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: the caller has F16C; 16 half floats are readable there.
        unsafe {
            Self(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: the caller has AVX2; 16 brain floats are readable there.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            Self(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller has AVX2; 16 floats are writable there.
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn add_product(self, x: f32, w: Self) -> Self {
        // SAFETY: the caller has FMA.
        unsafe {
            let x = _mm256_set1_ps(x);
            Self(_mm256_fmadd_ps(x, w.0, self.0), _mm256_fmadd_ps(x, w.1, self.1))
        }
    }
}

impl Tier for Avx2 {
    const ISA: Isa = Isa::Avx2;
    const ROWS: usize = 6;

    unsafe fn panel<W: Element>(self, panel: &Panel<W>, rows: usize, tiles: usize) {
        // SAFETY: `self` proves the instructions; the rest is promised by the caller.
        unsafe { go(panel, rows, tiles) }
    }

    fn widen<W: Element>(self, from: &[W], to: &mut [f32]) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn go<W: Element>(from: &[W], to: &mut [f32]) {
            // SAFETY: this function has the instructions.
            unsafe { widen::<Pair, W>(from, to) }
        }
        // SAFETY: `self` proves the instructions.
        unsafe { go(from, to) }
    }

    fn dequantize(self, w: &Packed, tile: usize, columns: Range<usize>, to: &mut [f32]) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn go(w: &Packed, tile: usize, columns: Range<usize>, to: &mut [f32]) {
            w.dequantize_tile(tile, columns, to);
        }
        // SAFETY: `self` proves the instructions.
        unsafe { go(w, tile, columns, to) }
    }
}

/// # Safety
/// As [`Tier::panel`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn go<W: Element>(panel: &Panel<W>, rows: usize, tiles: usize) {
    // SAFETY: promised by the caller.
    unsafe {
        by_rows!(Pair, panel, rows, tiles, { 1 => 4, 2 => 2, 3 => 2, 4 => 1, 5 => 1, 6 => 1 });
    }
}
