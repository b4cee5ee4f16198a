//! Panels with AVX-512: 16 lanes are one register.
//!
//! Twelve rows of one tile, or three rows of four tiles, are 12 independent chains; 8 keep two 512-bit multipliers of
//! latency 4 busy, 4 the one of CPUs that split a 512-bit operation into two halves. With 32 registers nothing spills.

#![allow(clippy::inline_always)] // see `lanes`

use std::arch::x86_64::*;
use std::ops::Range;

use half::{bf16, f16};

use super::super::attention::Small;
use super::codes::{self, CodeLanes};
use super::lanes::{self, Element, Lanes, Panel, Tier, Work, by_rows};
use crate::cpu::{Avx512Vnni, Isa};
use crate::pack::Packed;

/// Sixteen floats in one register.
#[derive(Clone, Copy)]
struct One(__m512);

impl Lanes for One {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { Self(_mm512_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller has AVX-512; 16 floats are readable there.
        unsafe { Self(_mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: the caller has AVX-512; 16 half floats are readable there.
        unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16, _spare: bool) -> Self {
        // SAFETY: the caller has AVX-512; 16 brain floats are readable there.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: the caller has AVX-512; 16 bytes are readable there.
        unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn load_small(from: *const Small) -> Self {
        // SAFETY: the caller has AVX-512; 16 bytes are readable there.
        unsafe {
            let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<20>(codes)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller has AVX-512; 16 floats are writable there.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn add_product(self, x: f32, w: Self) -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { Self(_mm512_fmadd_ps(_mm512_set1_ps(x), w.0, self.0)) }
    }

    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { Self(_mm512_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn larger(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512. The instruction gives its second operand when either is NaN.
        unsafe { Self(_mm512_max_ps(other.0, self.0)) }
    }
}

impl CodeLanes for One {
    type Words = __m512i;

    #[inline(always)]
    unsafe fn words(from: *const u8) -> Self::Words {
        // SAFETY: the caller has AVX-512; 64 bytes are readable there.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn codes(words: Self::Words, shift: i32, mask: i32, flip: i32) -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe {
            let codes =
                _mm512_and_si512(_mm512_srl_epi32(words, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(mask));
            Self(_mm512_cvtepi32_ps(_mm512_xor_si512(codes, _mm512_set1_epi32(flip))))
        }
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self {
        // SAFETY: the caller has AVX-512; 16 bytes are readable there.
        unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { Self(_mm512_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn minus(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { Self(_mm512_sub_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn times(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
    }
}

impl Tier for Avx512Vnni {
    const ISA: Isa = Isa::Avx512Vnni;
    const ROWS: usize = 12;

    unsafe fn panel<W: Element>(self, panel: &Panel<W>, rows: usize, tiles: usize) {
        // SAFETY: `self` proves the instructions; the rest is promised by the caller.
        unsafe {
            by_rows!(go, panel, rows, tiles, {
                1 => 4, 2 => 4, 3 => 4, 4 => 2, 5 => 2, 6 => 2, 7 => 1, 8 => 1, 9 => 1, 10 => 1, 11 => 1, 12 => 1,
            });
        }
    }

    fn run<F: Work>(self, work: F) -> F::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
        fn go<F: Work>(work: F) -> F::Output {
            // SAFETY: this function has the instructions.
            unsafe { work.run::<One>() }
        }
        // SAFETY: `self` proves the instructions.
        unsafe { go(work) }
    }

    fn dequantize(self, w: &Packed, tile: usize, columns: Range<usize>, to: &mut [f32]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
        fn go(w: &Packed, tile: usize, columns: Range<usize>, to: &mut [f32]) {
            // SAFETY: this function has the instructions.
            unsafe { codes::dequantize::<One>(w, tile, columns, to) }
        }
        // SAFETY: `self` proves the instructions.
        unsafe { go(w, tile, columns, to) }
    }
}

/// # Safety
/// As [`Tier::panel`] for `R` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn go<W: Element, const T: usize, const R: usize>(panel: &Panel<W>, tiles: usize) {
    // SAFETY: promised by the caller; this function has the instructions.
    unsafe { lanes::panel::<One, W, T, R>(panel, tiles) }
}
