//! Portable panels: plain arrays, the oracle of the other tiers.
//!
//! On x86 `mul_add` is a call of the C library here, which keeps the bits and loses the speed; all but the oldest CPUs have
//! a better tier.

#![allow(clippy::inline_always)] // see `lanes`

use std::ops::Range;

use half::{bf16, f16};

use super::super::attention::Small;
use super::lanes::{self, Element, LANES, Lanes, Panel, Tier, Work, by_rows};
use crate::cpu::Isa;
use crate::pack::Packed;

/// The tier that needs no proof.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

/// Sixteen floats in an array.
#[derive(Clone, Copy)]
struct Array([f32; LANES]);

impl Lanes for Array {
    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 16 floats are readable there.
        Self(unsafe { from.cast::<[f32; LANES]>().read() })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: 16 half floats are readable there.
        Self(unsafe { from.cast::<[u16; LANES]>().read() }.map(widen_f16))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16, _spare: bool) -> Self {
        // SAFETY: 16 brain floats are readable there.
        Self(unsafe { from.cast::<[u16; LANES]>().read() }.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: 16 bytes are readable there.
        Self(unsafe { from.cast::<[i8; LANES]>().read() }.map(f32::from))
    }

    #[inline(always)]
    unsafe fn load_small(from: *const Small) -> Self {
        // SAFETY: 16 bytes are readable there.
        Self(unsafe { from.cast::<[u8; LANES]>().read() }.map(|code| f32::from_bits(u32::from(code) << 20)))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 floats are writable there.
        unsafe { to.cast::<[f32; LANES]>().write(self.0) }
    }

    #[inline(always)]
    unsafe fn add_product(self, x: f32, w: Self) -> Self {
        let mut sum = self.0;
        for l in 0..LANES {
            sum[l] = x.mul_add(w.0[l], sum[l]);
        }
        Self(sum)
    }

    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        Self(std::array::from_fn(|l| self.0[l] + other.0[l]))
    }

    #[inline(always)]
    unsafe fn larger(self, other: Self) -> Self {
        Self(std::array::from_fn(|l| if other.0[l] > self.0[l] { other.0[l] } else { self.0[l] }))
    }
}

/// The value of half float `bits`, without branches so that the compiler can vectorise it.
///
/// Exponent and mantissa moved to their place are the value times 2^-112, which one exact multiplication undoes, for
/// subnormal numbers too; infinities and NaNs get their exponent filled.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let rest = u32::from(bits & 0x7fff) << 13;
    let scaled = (f32::from_bits(rest) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = if rest >= 0x7c00 << 13 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled | special | sign)
}

impl Tier for Scalar {
    const ISA: Isa = Isa::Scalar;
    const ROWS: usize = 4;

    unsafe fn panel<W: Element>(self, panel: &Panel<W>, rows: usize, tiles: usize) {
        // SAFETY: promised by the caller.
        unsafe {
            by_rows!(go, panel, rows, tiles, { 1 => 4, 2 => 2, 3 => 1, 4 => 1 });
        }
    }

    fn run<F: Work>(self, work: F) -> F::Output {
        // SAFETY: arrays need no special instructions.
        unsafe { work.run::<Array>() }
    }

    fn dequantize(self, w: &Packed, tile: usize, columns: Range<usize>, to: &mut [f32]) {
        w.dequantize_tile(tile, columns, to);
    }
}

/// # Safety
/// As [`Tier::panel`] for `R` rows.
unsafe fn go<W: Element, const T: usize, const R: usize>(panel: &Panel<W>, tiles: usize) {
    // SAFETY: promised by the caller.
    unsafe { lanes::panel::<Array, W, T, R>(panel, tiles) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_float_widens_exactly() {
        for bits in 0..=u16::MAX {
            let expected = f16::from_bits(bits).to_f32();
            let found = widen_f16(bits);
            assert!(
                found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()),
                "{bits:#x}"
            );
        }
    }
}
