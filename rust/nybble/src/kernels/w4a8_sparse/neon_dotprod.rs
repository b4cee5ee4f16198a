//! `w4a8_sparse/neon_dotprod`: `sdot`, 16 products an instruction.
//!
//! *Rows.* Four neurons at a time, each in a lane of its own once a group is added up. Codes of 0..=15 are signed bytes as
//! well as unsigned ones; 32 bytes are the codes of two times 32 columns.
//!
//! *Columns.* Four neurons' bytes are interleaved, so that one instruction multiplies all four by their activations and adds,
//! for four outputs.

use std::arch::aarch64::*;
use std::ops::Range;

use super::scalar::scale;
use super::{SparseMatmul, Vector, by_group};
use crate::cpu::{Isa, NeonDotprod};
use crate::kernels::arm::{half_to_single, sdot};
use crate::pack::{Bundles, CHUNK, MIDDLE, Side};

struct Kernel(#[allow(dead_code)] NeonDotprod);

/// The kernel, if the CPU has the tier.
pub(super) fn kernel() -> Option<&'static dyn SparseMatmul> {
    static KERNEL: std::sync::LazyLock<Option<Kernel>> =
        std::sync::LazyLock::new(|| NeonDotprod::new().map(Kernel));
    KERNEL.as_ref().map(|kernel| kernel as &dyn SparseMatmul)
}

impl SparseMatmul for Kernel {
    fn isa(&self) -> Isa {
        Isa::NeonDotprod
    }

    fn rows(&self, w: &Bundles, x: &Vector<'_>, active: &[u32], out: &mut [f32]) {
        let side = w.row_side().expect("bundles with rows");
        x.check(w.inputs(), side.groups);
        assert_eq!(out.len(), active.len(), "an output a neuron");
        for (batch, out) in active.chunks(FOUR).zip(out.chunks_mut(FOUR)) {
            // SAFETY: the token proves that the CPU has the instructions.
            unsafe { rows(w, side, x, batch, out) }
        }
        scale(out, side.output_mul);
    }

    fn columns(&self, w: &Bundles, x: &Vector<'_>, active: &[u32], chunks: Range<usize>, y: &mut [f32]) {
        let side = w.column_side();
        x.check(w.neurons(), side.groups);
        let outputs = w.outputs().min(chunks.end * CHUNK) - chunks.start * CHUNK;
        assert_eq!(y.len(), outputs, "the chunks' outputs");
        for (chunk, y) in chunks.zip(y.chunks_mut(CHUNK)) {
            // SAFETY: the token proves that the CPU has the instructions.
            unsafe { columns(w, side, x, active, chunk, y) }
        }
        scale(y, side.output_mul);
    }
}

/// Neurons that are computed together.
const FOUR: usize = 4;

/// The end of a group: `y += (scale * x_scale) * (16 * sums - zero * x_sum)`.
#[inline]
#[target_feature(enable = "neon")]
fn finish(
    y: float32x4_t,
    sums: int32x4_t,
    scales: [u8; 8],
    zeros: Option<[u8; 4]>,
    x_scale: f32,
    x_sum: i32,
) -> float32x4_t {
    let scales = half_to_single(vcreate_u16(u64::from_le_bytes(scales)));
    let zeros = match zeros {
        Some(zeros) => {
            let wide = vmovl_u8(vcreate_u8(u64::from(u32::from_le_bytes(zeros))));
            vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)))
        }
        None => vdupq_n_s32(MIDDLE),
    };
    let sums = vmlsq_s32(vshlq_n_s32::<4>(sums), zeros, vdupq_n_s32(x_sum));
    vfmaq_f32(y, vcvtq_f32_s32(sums), vmulq_n_f32(scales, x_scale))
}

/// Rows of at most four neurons, whose groups are any multiple of 32.
#[target_feature(enable = "neon,dotprod")]
fn rows(w: &Bundles, side: Side, x: &Vector<'_>, active: &[u32], out: &mut [f32]) {
    let steps = x.0.codes.len() / 32;
    let rows: [_; FOUR] = std::array::from_fn(|i| w.row(active[i.min(active.len() - 1)] as usize));
    assert!(rows.iter().all(|row| row.0.len() == 32 * steps.div_ceil(2)));
    let nibble = vdupq_n_u8(15);
    let mut y = vdupq_n_f32(0.0);
    for g in 0..side.groups {
        let mut sums = [vdupq_n_s32(0); FOUR];
        for step in g * side.group / 32..steps.min((g + 1) * side.group.div_ceil(32)) {
            // SAFETY: `x` has 32 codes for each step, and each row 32 bytes for every two.
            unsafe {
                let at = x.0.codes.as_ptr().add(32 * step);
                let (x0, x1) = (vld1q_s8(at), vld1q_s8(at.add(16)));
                for (sum, row) in sums.iter_mut().zip(&rows) {
                    let bytes = row.0.as_ptr().add(step / 2 * 32);
                    let (w0, w1) = (vld1q_u8(bytes), vld1q_u8(bytes.add(16)));
                    let (w0, w1) = if step % 2 == 0 {
                        (vandq_u8(w0, nibble), vandq_u8(w1, nibble))
                    } else {
                        (vshrq_n_u8::<4>(w0), vshrq_n_u8::<4>(w1))
                    };
                    *sum = sdot(*sum, vreinterpretq_s8_u8(w0), x0);
                    *sum = sdot(*sum, vreinterpretq_s8_u8(w1), x1);
                }
            }
        }
        let sums = vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
        let mut scales = [0; 8];
        for (scale, (_, facts)) in scales.chunks_exact_mut(2).zip(&rows) {
            scale.copy_from_slice(&facts[2 * g..2 * g + 2]);
        }
        let zeros = side.asymmetric.then(|| rows.map(|(_, facts)| facts[2 * side.groups + g]));
        y = finish(y, sums, scales, zeros, x.0.scales[g], x.0.sums[g]);
    }
    let mut four = [0.0; FOUR];
    // SAFETY: there are four.
    unsafe { vst1q_f32(four.as_mut_ptr(), y) }
    out.copy_from_slice(&four[..out.len()]);
}

/// The outputs of a chunk.
#[target_feature(enable = "neon,dotprod")]
fn columns(w: &Bundles, side: Side, x: &Vector<'_>, active: &[u32], chunk: usize, y: &mut [f32]) {
    let mut outputs = [vdupq_n_f32(0.0); CHUNK / 4];
    for (g, members) in by_group(active, side.group) {
        let mut sums = [vdupq_n_s32(0); CHUNK / 4];
        for batch in members.chunks(FOUR) {
            let column = |i: usize| &w.column(batch[i.min(batch.len() - 1)] as usize)[32 * chunk..][..32];
            let columns: [_; FOUR] = std::array::from_fn(column);
            let mut codes = [0; FOUR]; // of neurons that are not there 0
            for (code, &n) in codes.iter_mut().zip(batch) {
                *code = x.0.codes[n as usize].cast_unsigned();
            }
            let x = vreinterpretq_s8_u32(vdupq_n_u32(u32::from_le_bytes(codes)));
            for half in 0..2 {
                // SAFETY: each of the columns has 32 bytes here.
                let [a, b, c, d] = columns.map(|bytes| unsafe { vld1q_u8(bytes.as_ptr().add(16 * half)) });
                let (ab, cd) = (vzip1q_u8(a, b), vzip1q_u8(c, d));
                let (ab2, cd2) = (vzip2q_u8(a, b), vzip2q_u8(c, d));
                let pairs = [(ab, cd), (ab2, cd2)]
                    .map(|(ab, cd)| (vreinterpretq_u16_u8(ab), vreinterpretq_u16_u8(cd)));
                let interleaved = [
                    vzip1q_u16(pairs[0].0, pairs[0].1),
                    vzip2q_u16(pairs[0].0, pairs[0].1),
                    vzip1q_u16(pairs[1].0, pairs[1].1),
                    vzip2q_u16(pairs[1].0, pairs[1].1),
                ];
                for (i, w) in interleaved.into_iter().enumerate() {
                    let w = vreinterpretq_u8_u16(w);
                    // Outputs of this half of the low nibbles, and those 32 further on in the high ones.
                    let (low, high) = (4 * half + i, 8 + 4 * half + i);
                    sums[low] = sdot(sums[low], vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15))), x);
                    sums[high] = sdot(sums[high], vreinterpretq_s8_u8(vshrq_n_u8::<4>(w)), x);
                }
            }
        }
        let (scales, zeros) = w.column_scales(g);
        let scales = &scales[2 * CHUNK * chunk..][..2 * CHUNK];
        for (i, (output, sums)) in outputs.iter_mut().zip(sums).enumerate() {
            let scales = *scales[8 * i..].first_chunk().expect("four scales");
            let zeros = side
                .asymmetric
                .then(|| *zeros[CHUNK * chunk + 4 * i..].first_chunk().expect("four zero points"));
            *output = finish(*output, sums, scales, zeros, x.0.scales[g], x.0.sums[g]);
        }
    }
    let mut all = [0.0; CHUNK];
    for (all, output) in all.chunks_exact_mut(4).zip(outputs) {
        // SAFETY: there are four.
        unsafe { vst1q_f32(all.as_mut_ptr(), output) }
    }
    y.copy_from_slice(&all[..y.len()]);
}
