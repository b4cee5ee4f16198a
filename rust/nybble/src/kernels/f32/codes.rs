//! Integer weights widened with vector instructions.
//!
//! The same values as [`Packed::dequantize_tile`], bit for bit, for weights-only models whose decode would otherwise spend
//! its time there. The layout (`pack/int.rs`) has 16 rows in 16 lanes of 32 bits already, so a column is a shift, a mask, a
//! conversion, and the weight's definition `(code - zero) * scale`; codes are small integers and zero points at most sixteenths,
//! of which the difference is exact in `f32` too.

#![allow(clippy::inline_always)] // see `lanes`

use std::ops::Range;

use half::f16;

use super::lanes::{LANES, Lanes};
use crate::pack::{Layout, Packed, TILE_K, header_bytes};

/// What widening codes needs beyond [`Lanes`].
pub(crate) trait CodeLanes: Lanes {
    /// Sixteen words of 32 bits.
    type Words: Copy;
    /// Reads 16 words.
    unsafe fn words(from: *const u8) -> Self::Words;
    /// `(word >> shift & mask) ^ flip`, a number below 256, of every word.
    unsafe fn codes(words: Self::Words, shift: i32, mask: i32, flip: i32) -> Self;
    /// Sixteen bytes as numbers.
    unsafe fn load_bytes(from: *const u8) -> Self;
    /// The same number in all lanes.
    unsafe fn splat(x: f32) -> Self;
    /// `self - other`.
    unsafe fn minus(self, other: Self) -> Self;
    /// `self * other`.
    unsafe fn times(self, other: Self) -> Self;
}

/// Writes `columns` of tile `t` of an integer matrix, rounded up to whole steps of 32, as `[column][16 rows]` into `out`.
///
/// # Safety
/// The instructions of `L` must be there.
#[inline(always)]
pub(crate) unsafe fn dequantize<L: CodeLanes>(w: &Packed, t: usize, columns: Range<usize>, out: &mut [f32]) {
    let steps = columns.start / TILE_K..columns.end.div_ceil(TILE_K);
    assert!(
        columns.start.is_multiple_of(TILE_K) && out.len() >= steps.len() * TILE_K * LANES,
        "room for whole steps"
    );
    // SAFETY: the assertion covers what is written, the slices below what is read; the instructions are promised.
    unsafe {
        match w.layout() {
            Layout::W4 => each_step::<L, 8>(w, t, steps, out.as_mut_ptr()),
            _ => each_step::<L, 4>(w, t, steps, out.as_mut_ptr()),
        }
    }
}

/// Steps whose words hold `N` codes.
///
/// # Safety
/// As [`dequantize`], and there is room for all steps at `out`.
#[inline(always)]
unsafe fn each_step<L: CodeLanes, const N: usize>(
    w: &Packed,
    t: usize,
    steps: Range<usize>,
    mut out: *mut f32,
) {
    let tile = w.tile_bytes(t);
    let header = header_bytes(w.asymmetric());
    let bytes = w.layout().step_bytes();
    // SAFETY: promised by the caller.
    unsafe {
        for step in steps {
            let group = step * TILE_K / w.group();
            let start = group * (header + w.group() / TILE_K * bytes);
            let head = &tile[start..start + header];
            let scale = L::load_f16(head.as_ptr().cast::<f16>()).times(L::splat(w.scale_mul()));
            let zero = if w.asymmetric() {
                L::load_bytes(head[header - LANES..].as_ptr()).times(L::splat(w.layout().zero_unit()))
            } else {
                L::splat(if N == 8 { 8.0 } else { 128.0 })
            };
            let codes = &tile[(group + 1) * header + step * bytes..][..bytes];
            for chunk in 0..TILE_K / N {
                let words = L::words(codes[chunk * 64..chunk * 64 + 64].as_ptr());
                for i in 0..N {
                    let shift = 8 * (i % 4) + i / 4 * 4;
                    let (mask, flip) = if N == 8 { (15, 0) } else { (255, 128) };
                    L::codes(words, shift as i32, mask, flip).minus(zero).times(scale).store(out);
                    out = out.add(LANES);
                }
            }
        }
    }
}
