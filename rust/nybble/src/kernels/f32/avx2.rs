//! Panels with AVX2, FMA and F16C: 16 lanes are two registers.
//!
//! Six rows of one tile fill 12 of the 16 registers with sums and leave room for the two of weights and one broadcast:
//! 12 independent chains, more than the 8 that keep two multipliers of latency 4 busy.

#![allow(clippy::inline_always)] // see `lanes`

use std::arch::x86_64::*;
use std::ops::Range;

use half::{bf16, f16};

use super::super::attention::Small;
use super::codes::{self, CodeLanes};
use super::lanes::{self, Element, Lanes, Panel, Tier, Work, by_rows};
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
    unsafe fn load_bf16(from: *const bf16, spare: bool) -> Self {
        // SAFETY: the caller has AVX2; 16 brain floats are readable there.
        unsafe {
            if !spare {
                let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
                return Self(
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
                );
            }
            // Each half of the register gets the same 8 numbers, of which it moves its own 4 into upper halves of 32 bits:
            // one shuffle in the place of a shuffle and a shift.
            let place = _mm256_setr_epi8(
                -1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, //
                -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15,
            );
            let low = _mm256_broadcastsi128_si256(_mm_loadu_si128(from.cast()));
            let high = _mm256_broadcastsi128_si256(_mm_loadu_si128(from.add(8).cast()));
            Self(
                _mm256_castsi256_ps(_mm256_shuffle_epi8(low, place)),
                _mm256_castsi256_ps(_mm256_shuffle_epi8(high, place)),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: the caller has AVX2; 16 bytes are readable there.
        unsafe {
            Self(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8).cast()))),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_small(from: *const Small) -> Self {
        // SAFETY: the caller has AVX2; 16 bytes are readable there.
        unsafe {
            let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
            let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast()));
            Self(
                _mm256_castsi256_ps(_mm256_slli_epi32::<20>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<20>(high)),
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

    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn larger(self, other: Self) -> Self {
        // SAFETY: the caller has AVX2. The instruction gives its second operand when either is NaN.
        unsafe { Self(_mm256_max_ps(other.0, self.0), _mm256_max_ps(other.1, self.1)) }
    }
}

impl CodeLanes for Pair {
    type Words = (__m256i, __m256i);

    #[inline(always)]
    unsafe fn words(from: *const u8) -> Self::Words {
        // SAFETY: the caller has AVX2; 64 bytes are readable there.
        unsafe { (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())) }
    }

    #[inline(always)]
    unsafe fn codes((low, high): Self::Words, shift: i32, mask: i32, flip: i32) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe {
            let count = _mm_cvtsi32_si128(shift);
            let (mask, flip) = (_mm256_set1_epi32(mask), _mm256_set1_epi32(flip));
            let low = _mm256_and_si256(_mm256_srl_epi32(low, count), mask);
            let high = _mm256_and_si256(_mm256_srl_epi32(high, count), mask);
            Self(
                _mm256_cvtepi32_ps(_mm256_xor_si256(low, flip)),
                _mm256_cvtepi32_ps(_mm256_xor_si256(high, flip)),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self {
        // SAFETY: the caller has AVX2; 16 bytes are readable there.
        unsafe {
            Self(
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast()))),
            )
        }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe { Self(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn minus(self, other: Self) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe { Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn times(self, other: Self) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }
}

impl Tier for Avx2 {
    const ISA: Isa = Isa::Avx2;
    const ROWS: usize = 6;

    unsafe fn panel<W: Element>(self, panel: &Panel<W>, rows: usize, tiles: usize) {
        // SAFETY: `self` proves the instructions; the rest is promised by the caller.
        unsafe {
            by_rows!(go, panel, rows, tiles, { 1 => 4, 2 => 2, 3 => 1, 4 => 1, 5 => 1, 6 => 1 });
        }
    }

    fn run<F: Work>(self, work: F) -> F::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn go<F: Work>(work: F) -> F::Output {
            // SAFETY: this function has the instructions.
            unsafe { work.run::<Pair>() }
        }
        // SAFETY: `self` proves the instructions.
        unsafe { go(work) }
    }

    fn dequantize(self, w: &Packed, tile: usize, columns: Range<usize>, to: &mut [f32]) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn go(w: &Packed, tile: usize, columns: Range<usize>, to: &mut [f32]) {
            // SAFETY: this function has the instructions.
            unsafe { codes::dequantize::<Pair>(w, tile, columns, to) }
        }
        // SAFETY: `self` proves the instructions.
        unsafe { go(w, tile, columns, to) }
    }
}

/// # Safety
/// As [`Tier::panel`] for `R` rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn go<W: Element, const T: usize, const R: usize>(panel: &Panel<W>, tiles: usize) {
    // SAFETY: promised by the caller; this function has the instructions.
    unsafe { lanes::panel::<Pair, W, T, R>(panel, tiles) }
}
