//! Panels with NEON: 16 lanes are four registers.
//!
//! The compiler turns the portable panels into scalar multiply-adds on ARM, hence this tier. Six rows of one tile are 24 of
//! the 32 registers and 24 independent chains. One row takes two tiles: 8 chains, which two pipes of latency 4 need.

#![allow(clippy::inline_always)] // see `lanes`

use std::arch::aarch64::*;
use std::ops::Range;

use half::{bf16, f16};

use super::super::attention::Small;
use super::codes::{self, CodeLanes};
use super::lanes::{self, Element, Lanes, Panel, Tier, Work, by_rows};
use crate::cpu::{Isa, Neon};
use crate::pack::Packed;

/// Sixteen floats in four registers.
#[derive(Clone, Copy)]
struct Quad([float32x4_t; 4]);

/// Calls an expression in the register's index for each of the four.
macro_rules! four {
    ($i:ident => $value:expr) => {
        [
            {
                const $i: usize = 0;
                $value
            },
            {
                const $i: usize = 1;
                $value
            },
            {
                const $i: usize = 2;
                $value
            },
            {
                const $i: usize = 3;
                $value
            },
        ]
    };
}

impl Lanes for Quad {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller has NEON.
        unsafe { Self([vdupq_n_f32(0.0); 4]) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller has NEON; 16 floats are readable there.
        unsafe { Self(four!(I => vld1q_f32(from.add(4 * I)))) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: the caller has NEON; 16 half floats are readable there.
        unsafe { Self(four!(I => widen_f16(vld1_u16(from.cast::<u16>().add(4 * I))))) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16, _spare: bool) -> Self {
        // SAFETY: the caller has NEON; 16 brain floats are readable there.
        unsafe {
            Self(
                four!(I => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast::<u16>().add(4 * I))))),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: the caller has NEON; 16 bytes are readable there.
        unsafe {
            let bytes = vld1q_s8(from);
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes)));
            let quarters = [vget_low_s16(low), vget_high_s16(low), vget_low_s16(high), vget_high_s16(high)];
            Self(four!(I => vcvtq_f32_s32(vmovl_s16(quarters[I]))))
        }
    }

    #[inline(always)]
    unsafe fn load_small(from: *const Small) -> Self {
        // SAFETY: the caller has NEON; 16 bytes are readable there.
        unsafe {
            let bytes = vld1q_u8(from.cast());
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_u8(vget_high_u8(bytes)));
            let quarters = [vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high)];
            Self(four!(I => vreinterpretq_f32_u32(vshlq_n_u32::<20>(vmovl_u16(quarters[I])))))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller has NEON; 16 floats are writable there.
        unsafe {
            four!(I => vst1q_f32(to.add(4 * I), self.0[I]));
        }
    }

    #[inline(always)]
    unsafe fn add_product(self, x: f32, w: Self) -> Self {
        // SAFETY: the caller has NEON.
        unsafe {
            let x = vdupq_n_f32(x);
            Self(four!(I => vfmaq_f32(self.0[I], x, w.0[I])))
        }
    }

    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        // SAFETY: the caller has NEON.
        unsafe { Self(four!(I => vaddq_f32(self.0[I], other.0[I]))) }
    }

    #[inline(always)]
    unsafe fn larger(self, other: Self) -> Self {
        // SAFETY: the caller has NEON. Not its maximum, which gives NaN when either is NaN.
        unsafe { Self(four!(I => vbslq_f32(vcgtq_f32(other.0[I], self.0[I]), other.0[I], self.0[I]))) }
    }
}

/// Four half floats, as `widen_f16` of the scalar tier. The conversion instruction is there on every CPU, its intrinsic
/// needs a newer compiler.
#[inline(always)]
unsafe fn widen_f16(bits: uint16x4_t) -> float32x4_t {
    // SAFETY: the caller has NEON.
    unsafe {
        let bits = vmovl_u16(bits);
        let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
        let rest = vshlq_n_u32::<13>(vandq_u32(bits, vdupq_n_u32(0x7fff)));
        let scale = vreinterpretq_f32_u32(vdupq_n_u32((127 + 112) << 23));
        let scaled = vreinterpretq_u32_f32(vmulq_f32(vreinterpretq_f32_u32(rest), scale));
        let special = vandq_u32(vcgeq_u32(rest, vdupq_n_u32(0x7c00 << 13)), vdupq_n_u32(0x7f80_0000));
        vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(scaled, special), sign))
    }
}

impl CodeLanes for Quad {
    type Words = [uint32x4_t; 4];

    #[inline(always)]
    unsafe fn words(from: *const u8) -> Self::Words {
        // SAFETY: the caller has NEON; 64 bytes are readable there.
        unsafe { four!(I => vreinterpretq_u32_u8(vld1q_u8(from.add(16 * I)))) }
    }

    #[inline(always)]
    unsafe fn codes(words: Self::Words, shift: i32, mask: i32, flip: i32) -> Self {
        // SAFETY: the caller has NEON. A shift to the left by a negative number is one to the right.
        unsafe {
            let (shift, mask, flip) =
                (vdupq_n_s32(-shift), vdupq_n_u32(mask as u32), vdupq_n_u32(flip as u32));
            Self(four!(I => {
                let code = vandq_u32(vshlq_u32(words[I], shift), mask);
                vcvtq_f32_u32(veorq_u32(code, flip))
            }))
        }
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self {
        // SAFETY: the caller has NEON; 16 bytes are readable there.
        unsafe {
            let bytes = vld1q_u8(from);
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_u8(vget_high_u8(bytes)));
            let quarters = [vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high)];
            Self(four!(I => vcvtq_f32_u32(vmovl_u16(quarters[I]))))
        }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller has NEON.
        unsafe { Self([vdupq_n_f32(x); 4]) }
    }

    #[inline(always)]
    unsafe fn minus(self, other: Self) -> Self {
        // SAFETY: the caller has NEON.
        unsafe { Self(four!(I => vsubq_f32(self.0[I], other.0[I]))) }
    }

    #[inline(always)]
    unsafe fn times(self, other: Self) -> Self {
        // SAFETY: the caller has NEON.
        unsafe { Self(four!(I => vmulq_f32(self.0[I], other.0[I]))) }
    }
}

impl Tier for Neon {
    const ISA: Isa = Isa::Neon;
    const ROWS: usize = 6;

    unsafe fn panel<W: Element>(self, panel: &Panel<W>, rows: usize, tiles: usize) {
        // SAFETY: `self` proves the instructions; the rest is promised by the caller.
        unsafe {
            by_rows!(go, panel, rows, tiles, { 1 => 2, 2 => 2, 3 => 1, 4 => 1, 5 => 1, 6 => 1 });
        }
    }

    fn run<F: Work>(self, work: F) -> F::Output {
        #[target_feature(enable = "neon")]
        fn go<F: Work>(work: F) -> F::Output {
            // SAFETY: this function has the instructions.
            unsafe { work.run::<Quad>() }
        }
        // SAFETY: `self` proves the instructions.
        unsafe { go(work) }
    }

    fn dequantize(self, w: &Packed, tile: usize, columns: Range<usize>, to: &mut [f32]) {
        #[target_feature(enable = "neon")]
        fn go(w: &Packed, tile: usize, columns: Range<usize>, to: &mut [f32]) {
            // SAFETY: this function has the instructions.
            unsafe { codes::dequantize::<Quad>(w, tile, columns, to) }
        }
        // SAFETY: `self` proves the instructions.
        unsafe { go(w, tile, columns, to) }
    }
}

/// # Safety
/// As [`Tier::panel`] for `R` rows.
#[target_feature(enable = "neon")]
unsafe fn go<W: Element, const T: usize, const R: usize>(panel: &Panel<W>, tiles: usize) {
    // SAFETY: promised by the caller; this function has the instructions.
    unsafe { lanes::panel::<Quad, W, T, R>(panel, tiles) }
}
