//! What the x86 tiers share: rows of eight neurons, each in a lane of its own once a group is added up.
//!
//! A tier brings `two_groups`, the sums of both groups of 32 in a chunk, and `one_group`, those of a group of whole chunks; the
//! rest is written once and compiled with each tier's features.

use std::arch::x86_64::*;

/// Neurons that are computed together, each in a lane of its own once a group is added up.
pub(super) const EIGHT: usize = 8;

/// Chunks of outputs that are computed together: their sums stay in the first-level cache.
pub(super) const BLOCK: usize = 16;

/// Defines the kernel of a tier that has `two_groups`, `one_group` and `columns`, all compiled with these features.
macro_rules! x86_kernel {
    ($token:ident, $isa:expr, $features:literal) => {
        struct Kernel(#[allow(dead_code)] crate::cpu::$token);

        /// The kernel, if the CPU has the tier.
        pub(super) fn kernel() -> Option<&'static dyn super::SparseMatmul> {
            static KERNEL: std::sync::LazyLock<Option<Kernel>> =
                std::sync::LazyLock::new(|| crate::cpu::$token::new().map(Kernel));
            KERNEL.as_ref().map(|kernel| kernel as &dyn super::SparseMatmul)
        }

        impl super::SparseMatmul for Kernel {
            fn isa(&self) -> Isa {
                $isa
            }

            fn rows(&self, w: &Bundles, x: &Vector<'_>, active: &[u32], out: &mut [f32]) {
                let side = w.row_side().expect("bundles with rows");
                x.check(w.inputs(), side.groups);
                assert_eq!(out.len(), active.len(), "an output a neuron");
                if side.group == 32 || side.group.is_multiple_of(CHUNK) || side.groups == 1 {
                    // SAFETY: the token proves that the CPU has the instructions.
                    unsafe { eights(w, side, x, active, out) }
                    super::scalar::scale(out, side.output_mul);
                } else {
                    // A group ends in the middle of a chunk, as no recipe makes them.
                    super::scalar::Scalar.rows(w, x, active, out);
                }
            }

            fn columns(
                &self,
                w: &Bundles,
                x: &Vector<'_>,
                active: &[u32],
                chunks: std::ops::Range<usize>,
                y: &mut [f32],
            ) {
                let side = w.column_side();
                x.check(w.neurons(), side.groups);
                let outputs = w.outputs().min(chunks.end * CHUNK) - chunks.start * CHUNK;
                assert_eq!(y.len(), outputs, "the chunks' outputs");
                for first in chunks.clone().step_by(super::x86::BLOCK) {
                    let block = first..chunks.end.min(first + super::x86::BLOCK);
                    let from = (first - chunks.start) * CHUNK;
                    let part = &mut y[from..outputs.min(from + block.len() * CHUNK)];
                    // SAFETY: the token proves that the CPU has the instructions.
                    unsafe { columns(w, side, x, active, block, part) }
                }
                super::scalar::scale(y, side.output_mul);
            }
        }

        /// Groups of 32, or of whole chunks.
        #[target_feature(enable = $features)]
        fn eights(w: &Bundles, side: Side, x: &Vector<'_>, active: &[u32], out: &mut [f32]) {
            opaque(0); // aligns the stack
            let chunks = x.0.stride.div_ceil(CHUNK);
            let mut batches = active.chunks(super::x86::EIGHT).peekable();
            for out in out.chunks_mut(super::x86::EIGHT) {
                let Some(batch) = batches.next() else { break };
                let start = |batch: &[u32], i: usize| w.row(batch[i.min(batch.len() - 1)] as usize);
                let rows: [_; super::x86::EIGHT] = std::array::from_fn(|i| start(batch, i));
                let ahead = *batches.peek().unwrap_or(&batch);
                let ahead: [_; super::x86::EIGHT] = std::array::from_fn(|i| start(ahead, i).0.as_ptr());
                assert!(rows.iter().all(|(codes, facts)| {
                    codes.len() == 32 * chunks
                        && facts.len() == side.groups * if side.asymmetric { 3 } else { 2 }
                }));
                let (codes, facts) = (rows.map(|row| row.0.as_ptr()), rows.map(|row| row.1.as_ptr()));
                let mut y = _mm256_setzero_ps();
                for first in (0..side.groups).step_by(8) {
                    let count = 8.min(side.groups - first);
                    // SAFETY: `codes` have 32 bytes for each chunk, of which a group of 32 takes one half and another one all; behind
                    // `facts` there are at least 16 bytes of the bundle, so eight groups can be read even if fewer exist.
                    unsafe {
                        let mut sums = [_mm256_setzero_si256(); 8];
                        if side.group == 32 {
                            for pair in 0..count.div_ceil(2) {
                                let chunk = first / 2 + pair;
                                super::x86::fetch_chunk(&ahead, chunk);
                                let [low, high] = two_groups(&codes, chunk, x);
                                (sums[2 * pair], sums[2 * pair + 1]) = (low, high);
                            }
                        } else {
                            for (g, sum) in (first..).zip(sums.iter_mut().take(count)) {
                                let from = g * side.group / CHUNK;
                                let to = chunks.min((g + 1) * side.group.next_multiple_of(CHUNK) / CHUNK);
                                *sum = one_group(&codes, from, to, x, &ahead);
                            }
                        }
                        let scales = super::x86::turned(&facts, 2 * first);
                        let zeros = if side.asymmetric {
                            super::x86::turned_bytes(&facts, 2 * side.groups + first)
                        } else {
                            [_mm_setzero_si128(); 8]
                        };
                        for i in 0..count {
                            let (x_scale, x_sum) = (x.0.scales[first + i], x.0.sums[first + i]);
                            let offset = if side.asymmetric {
                                _mm256_mullo_epi32(_mm256_cvtepu8_epi32(zeros[i]), _mm256_set1_epi32(x_sum))
                            } else {
                                _mm256_set1_epi32(MIDDLE * x_sum)
                            };
                            let sum =
                                _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_slli_epi32::<4>(sums[i]), offset));
                            let scale = _mm256_mul_ps(_mm256_cvtph_ps(scales[i]), _mm256_set1_ps(x_scale));
                            y = _mm256_fmadd_ps(sum, scale, y);
                        }
                    }
                }
                let mut all = [0f32; super::x86::EIGHT];
                // SAFETY: there are eight.
                unsafe { _mm256_storeu_ps(all.as_mut_ptr(), y) }
                out.copy_from_slice(&all[..out.len()]);
            }
        }
    };
}
pub(super) use x86_kernel;

/// Asks for a chunk of each of some rows, one line in two calls.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn fetch_chunk(rows: &[*const u8; EIGHT], chunk: usize) {
    if chunk.is_multiple_of(2) {
        for row in rows {
            _mm_prefetch::<_MM_HINT_T1>(row.wrapping_add(32 * chunk).cast());
        }
    }
}

/// Eight rows of eight 16-bit numbers from byte `at` on, the other way round.
///
/// # Safety
/// The rows have 16 bytes there.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn turned(rows: &[*const u8; EIGHT], at: usize) -> [__m128i; 8] {
    // SAFETY: the caller's promise.
    let r = rows.map(|row| unsafe { _mm_loadu_si128(row.add(at).cast()) });
    let words =
        [0, 2, 4, 6].map(|i| (_mm_unpacklo_epi16(r[i], r[i + 1]), _mm_unpackhi_epi16(r[i], r[i + 1])));
    let [a, b, c, d] = words;
    let quads = |p, q, s, t| {
        let (left, right) = (_mm_unpacklo_epi32(p, q), _mm_unpacklo_epi32(s, t));
        let (left2, right2) = (_mm_unpackhi_epi32(p, q), _mm_unpackhi_epi32(s, t));
        [
            _mm_unpacklo_epi64(left, right),
            _mm_unpackhi_epi64(left, right),
            _mm_unpacklo_epi64(left2, right2),
            _mm_unpackhi_epi64(left2, right2),
        ]
    };
    let (low, high) = (quads(a.0, b.0, c.0, d.0), quads(a.1, b.1, c.1, d.1));
    [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]]
}

/// Eight rows of eight bytes, the other way round; each in the low half of a vector.
///
/// # Safety
/// The rows have eight bytes there.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn turned_bytes(rows: &[*const u8; EIGHT], at: usize) -> [__m128i; 8] {
    // SAFETY: the caller's promise.
    let r = rows.map(|row| unsafe { _mm_loadl_epi64(row.add(at).cast()) });
    let [a, b, c, d] = [0, 2, 4, 6].map(|i| _mm_unpacklo_epi8(r[i], r[i + 1]));
    let (ab, ab2) = (_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b));
    let (cd, cd2) = (_mm_unpacklo_epi16(c, d), _mm_unpackhi_epi16(c, d));
    let pairs = [
        _mm_unpacklo_epi32(ab, cd),
        _mm_unpackhi_epi32(ab, cd),
        _mm_unpacklo_epi32(ab2, cd2),
        _mm_unpackhi_epi32(ab2, cd2),
    ];
    let second = |v| _mm_unpackhi_epi64(v, v);
    [
        pairs[0],
        second(pairs[0]),
        pairs[1],
        second(pairs[1]),
        pairs[2],
        second(pairs[2]),
        pairs[3],
        second(pairs[3]),
    ]
}
