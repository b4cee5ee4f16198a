//! NEON instructions whose intrinsics are not stable yet, as one-line assembler wrappers, in this one place.

use std::arch::aarch64::*;
use std::arch::asm;

use super::tiles::Outputs;
use crate::pack::MIDDLE;

/// Adds to each 32-bit lane of `sum` the dot product of its four bytes in `w` with the four bytes of lane `LANE` of `x`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn sdot_lane<const LANE: usize>(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: reads and writes the named registers only; the instruction is part of the enabled features.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]",
            sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// Adds to each 32-bit lane of `sum` the dot product of its four bytes in `w` with those in `x`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn sdot(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: reads and writes the named registers only; the instruction is part of the enabled features.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// Adds to `sum`, a 2 x 2 block, the products of the two rows of eight bytes in `w` with the two in `x`.
///
/// Lane `2 i + j` gets row `i` of `w` times row `j` of `x`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
pub(crate) fn smmla(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: reads and writes the named registers only; the instruction is part of the enabled features.
    unsafe {
        asm!(
            "smmla {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// The blocks of 16 rows and two tokens, apart: for each token the sums of the rows in order.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn pair_rows(blocks: &[int32x4_t; 8]) -> [[int32x4_t; 4]; 2] {
    let first = std::array::from_fn(|q| vuzp1q_s32(blocks[2 * q], blocks[2 * q + 1]));
    let second = std::array::from_fn(|q| vuzp2q_s32(blocks[2 * q], blocks[2 * q + 1]));
    [first, second]
}

/// Four half-precision numbers, as bits, to single precision.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn half_to_single(bits: uint16x4_t) -> float32x4_t {
    let value: float32x4_t;
    // SAFETY: as above; `fcvtl` is part of NEON itself.
    unsafe {
        asm!(
            "fcvtl {value:v}.4s, {bits:v}.4h",
            value = lateout(vreg) value, bits = in(vreg) bits,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    value
}

/// The end of a group for one row: `y += (scale * x_scale) * (2^SHIFT * sums - zero * x_sum)`, 16 outputs.
///
/// `header` points at the group's 16 scales, followed, if `asymmetric`, by 16 zero points; else the zero point is [`MIDDLE`].
/// `bias` is what the codes in the tile were lowered by; `SHIFT` takes their sums to the unit of the zero points.
///
/// # Safety
/// The header can be read.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) unsafe fn finish_group<const SHIFT: i32>(
    y: &mut [float32x4_t; 4],
    sums: [int32x4_t; 4],
    header: *const u8,
    asymmetric: bool,
    bias: i32,
    x_scale: f32,
    x_sum: i32,
) {
    for (q, (y, sum)) in y.iter_mut().zip(sums).enumerate() {
        // SAFETY: a header has 16 scales of two bytes and, if asymmetric, 16 zero points of one byte.
        let (scale, zero) = unsafe {
            let zero = if asymmetric {
                let four = header.add(32 + 4 * q).cast::<u32>().read_unaligned();
                let wide = vmovl_u8(vcreate_u8(u64::from(four)));
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)))
            } else {
                vdupq_n_s32(MIDDLE)
            };
            (half_to_single(vreinterpret_u16_u8(vld1_u8(header.add(8 * q)))), zero)
        };
        let sum =
            vmlsq_s32(vshlq_n_s32::<SHIFT>(sum), vsubq_s32(zero, vdupq_n_s32(bias)), vdupq_n_s32(x_sum));
        *y = vfmaq_f32(*y, vcvtq_f32_s32(sum), vmulq_n_f32(scale, x_scale));
    }
}

/// Writes the rows' outputs.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn store(out: &mut [Outputs], y: &[[float32x4_t; 4]]) {
    for (out, y) in out.iter_mut().zip(y) {
        for (q, y) in y.iter().enumerate() {
            // SAFETY: an output is 16 floats.
            unsafe { vst1q_f32(out.as_mut_ptr().add(4 * q), *y) }
        }
    }
}
