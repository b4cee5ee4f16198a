//! `w4a8_sparse/avx2`: `vpmaddubsw`, 32 products an instruction.
//!
//! *Rows.* 32 bytes of a row are two runs of 32 columns; each is multiplied by 32 activations as they lie. At the end of a
//! group the sums of eight neurons are added across lanes together, by a tree of shuffles in 16 bits (a lane holds at most
//! `2 * 15 * 127 = 3810`, and four of them together 15240), after which each neuron has a lane. One neuron at a time with
//! eight of its groups in the tree was tried and took 1.7 times as long: its fused multiply-adds wait for one another.
//!
//! *Columns.* Two neurons' bytes are interleaved, so that one instruction multiplies both by their activations and adds, for
//! 16 outputs; sixteen neurons are added up in 16 bits (`8 * 3810 = 30480`) before they are widened.

use std::arch::x86_64::*;
use std::ops::Range;

use super::x86::{BLOCK, EIGHT, fetch_chunk, x86_kernel};
use super::{Vector, by_group};
use crate::cpu::Isa;
use crate::kernels::tiles::opaque;
use crate::pack::{Bundles, CHUNK, MIDDLE, Side};

x86_kernel!(Avx2, Isa::Avx2, "avx2,fma,f16c");

/// Neurons whose products are added up in 16 bits.
const TOGETHER: usize = 16;

/// The activations of a chunk; those behind the last are 0.
///
/// # Safety
/// There is such a chunk.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn activations(x: &Vector<'_>, chunk: usize) -> [__m256i; 2] {
    // SAFETY: `x` is a multiple of 32 long.
    unsafe {
        let at = x.0.codes.as_ptr().add(CHUNK * chunk).cast::<__m256i>();
        let whole = CHUNK * chunk + CHUNK <= x.0.codes.len();
        [_mm256_loadu_si256(at), if whole { _mm256_loadu_si256(at.add(1)) } else { _mm256_setzero_si256() }]
    }
}

/// Adds halves of 64 bits: four sums of `a`, then four of `b`, in either half.
#[inline]
#[target_feature(enable = "avx2")]
fn halves(a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b))
}

/// The sums of eight vectors of sixteen lanes, of which [`halves`] has added up two and two.
#[inline]
#[target_feature(enable = "avx2")]
fn across(h: [__m256i; 4]) -> __m256i {
    let quarters = |a, b| {
        let (a, b) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
        let (even, odd) = (_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b));
        _mm256_add_epi16(_mm256_castps_si256(even), _mm256_castps_si256(odd))
    };
    let ones = _mm256_set1_epi16(1);
    let first = _mm256_madd_epi16(quarters(h[0], h[1]), ones);
    let second = _mm256_madd_epi16(quarters(h[2], h[3]), ones);
    _mm256_add_epi32(
        _mm256_permute2x128_si256::<0x20>(first, second),
        _mm256_permute2x128_si256::<0x31>(first, second),
    )
}

/// The sums of both groups of 32 in a chunk, a lane a row.
///
/// # Safety
/// The rows and `x` have such a chunk.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn two_groups(rows: &[*const u8; EIGHT], chunk: usize, x: &Vector<'_>) -> [__m256i; 2] {
    let nibble = _mm256_set1_epi8(15);
    // SAFETY: the caller's promise.
    unsafe {
        let [x0, x1] = activations(x, chunk);
        let (mut low, mut high) = ([_mm256_setzero_si256(); 4], [_mm256_setzero_si256(); 4]);
        for i in 0..4 {
            let a = _mm256_loadu_si256(rows[2 * i].add(32 * chunk).cast());
            let b = _mm256_loadu_si256(rows[2 * i + 1].add(32 * chunk).cast());
            low[i] = halves(
                _mm256_maddubs_epi16(_mm256_and_si256(a, nibble), x0),
                _mm256_maddubs_epi16(_mm256_and_si256(b, nibble), x0),
            );
            high[i] = halves(
                _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(a), nibble), x1),
                _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(b), nibble), x1),
            );
        }
        [across(low), across(high)]
    }
}

/// The sums of a group of some chunks, a lane a row.
///
/// # Safety
/// The rows and `x` have such chunks.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn one_group(
    rows: &[*const u8; EIGHT],
    from: usize,
    to: usize,
    x: &Vector<'_>,
    ahead: &[*const u8; EIGHT],
) -> __m256i {
    let nibble = _mm256_set1_epi8(15);
    let ones = _mm256_set1_epi16(1);
    // SAFETY: the caller's promise.
    unsafe {
        let mut v = [_mm256_setzero_si256(); EIGHT];
        for chunk in from..to {
            fetch_chunk(ahead, chunk);
            let [x0, x1] = activations(x, chunk);
            for i in 0..EIGHT {
                let w = _mm256_loadu_si256(rows[i].add(32 * chunk).cast());
                let low = _mm256_maddubs_epi16(_mm256_and_si256(w, nibble), x0);
                let high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(w), nibble), x1);
                v[i] = _mm256_add_epi32(v[i], _mm256_madd_epi16(_mm256_add_epi16(low, high), ones));
            }
        }
        across_wide(&v)
    }
}

/// The sums of eight vectors of eight lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn across_wide(v: &[__m256i; 8]) -> __m256i {
    let four = |a, b, c, d| _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    let (first, second) = (four(v[0], v[1], v[2], v[3]), four(v[4], v[5], v[6], v[7]));
    _mm256_add_epi32(
        _mm256_permute2x128_si256::<0x20>(first, second),
        _mm256_permute2x128_si256::<0x31>(first, second),
    )
}

/// The outputs of at most [`BLOCK`] chunks.
#[target_feature(enable = "avx2,fma,f16c")]
fn columns(w: &Bundles, side: Side, x: &Vector<'_>, active: &[u32], chunks: Range<usize>, y: &mut [f32]) {
    opaque(0); // aligns the stack
    assert!(chunks.len() <= BLOCK && chunks.end <= w.chunks());
    let mut outputs = [[0f32; CHUNK]; BLOCK];
    let mut sums = [[0i32; CHUNK]; BLOCK];
    let mut place = 0; // in `active`
    for (g, members) in by_group(active, side.group) {
        let (scales, zeros) = w.column_scales(g);
        let (x_scale, x_sum) = (x.0.scales[g], x.0.sums[g]);
        let mut batches = members.chunks(TOGETHER).peekable();
        let mut begun = false;
        while let Some(batch) = batches.next() {
            let mut bytes = [std::ptr::null(); TOGETHER];
            let mut factors = [0i32; TOGETHER / 2];
            for (i, &n) in batch.iter().enumerate() {
                bytes[i] = w.column(n as usize)[32 * chunks.start..].as_ptr();
                let code = u32::from(x.0.codes[n as usize].cast_unsigned());
                factors[i / 2] |= (code << (8 * (i % 2)) | code << (8 * (i % 2) + 16)).cast_signed();
            }
            if batch.len() % 2 == 1 {
                bytes[batch.len()] = bytes[batch.len() - 1]; // times 0
            }
            place += batch.len();
            let mut ahead = [std::ptr::null(); TOGETHER];
            let next = active[place..].iter().take(TOGETHER);
            for (ahead, &n) in ahead.iter_mut().zip(next) {
                *ahead = w.column(n as usize)[32 * chunks.start..].as_ptr();
            }
            let next = active.get(place).map_or(g, |&n| n as usize / side.group);
            let (next_scales, next_zeros) = w.column_scales(next);
            let pairs = batch.len().div_ceil(2);
            let (bytes, factors) = (&bytes[..2 * pairs], &factors[..pairs]);
            let last = batches.peek().is_none();
            for (c, sums) in sums.iter_mut().take(chunks.len()).enumerate() {
                if c % 2 == 0 {
                    for next in ahead {
                        _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(32 * c).cast());
                    }
                }
                // SAFETY: all of `bytes` have 32 bytes for each of the chunks.
                let mut v = unsafe { chunk(bytes, factors, 32 * c) };
                // SAFETY: sums and outputs have 64 elements, and the scales and zero points as many for each of all chunks.
                unsafe {
                    let at = sums.as_mut_ptr().cast::<__m256i>();
                    if begun {
                        for (i, v) in v.iter_mut().enumerate() {
                            *v = _mm256_add_epi32(*v, _mm256_loadu_si256(at.add(i)));
                        }
                    }
                    if last {
                        let place = (chunks.start + c) * CHUNK;
                        let at = next_scales.as_ptr().wrapping_add(2 * place);
                        _mm_prefetch::<_MM_HINT_T0>(at.cast());
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(64).cast());
                        _mm_prefetch::<_MM_HINT_T0>(next_zeros.as_ptr().wrapping_add(place).cast());
                        let scales = &scales[2 * place..][..2 * CHUNK];
                        let zeros = if side.asymmetric { &zeros[place..][..CHUNK] } else { zeros };
                        finish(&v, scales, zeros, side.asymmetric, x_scale, x_sum, &mut outputs[c]);
                    } else {
                        for (i, v) in v.iter().enumerate() {
                            _mm256_storeu_si256(at.add(i), *v);
                        }
                    }
                }
            }
            begun = true;
        }
    }
    for (y, outputs) in y.chunks_mut(CHUNK).zip(&outputs) {
        y.copy_from_slice(&outputs[..y.len()]);
    }
}

/// The sums of the products of up to sixteen neurons for the 64 outputs from byte `at` on, eight outputs a vector.
///
/// # Safety
/// Each of `bytes` has 32 bytes from `at` on, and there are two for each of `factors`, at most sixteen.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn chunk(bytes: &[*const u8], factors: &[i32], at: usize) -> [__m256i; 8] {
    let nibble = _mm256_set1_epi8(15);
    let mut v = [_mm256_setzero_si256(); 4];
    for (pair, &factor) in bytes.chunks_exact(2).zip(factors) {
        // SAFETY: the caller's promise.
        let (a, b) = unsafe {
            let load = |bytes: *const u8| _mm256_loadu_si256(bytes.add(at).cast());
            (load(pair[0]), load(pair[1]))
        };
        let x = _mm256_set1_epi32(factor);
        // Outputs 0 to 7 and 16 to 23, then 8 to 15 and 24 to 31; and those 32 further on in the high nibbles.
        for (i, w) in [_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)].into_iter().enumerate() {
            let (low, high) =
                (_mm256_and_si256(w, nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(w), nibble));
            v[i] = _mm256_add_epi16(v[i], _mm256_maddubs_epi16(low, x));
            v[2 + i] = _mm256_add_epi16(v[2 + i], _mm256_maddubs_epi16(high, x));
        }
    }
    let low = |v| _mm256_cvtepi16_epi32(_mm256_castsi256_si128(v));
    let high = |v| _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(v));
    [low(v[0]), low(v[1]), high(v[0]), high(v[1]), low(v[2]), low(v[3]), high(v[2]), high(v[3])]
}

/// The end of a group: `y += (scale * x_scale) * (16 * sums - zero * x_sum)`.
///
/// # Safety
/// `scales` has 128 bytes and, if `asymmetric`, `zeros` 64.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn finish(
    v: &[__m256i; 8],
    scales: &[u8],
    zeros: &[u8],
    asymmetric: bool,
    x_scale: f32,
    x_sum: i32,
    y: &mut [f32; CHUNK],
) {
    let x_scale = _mm256_set1_ps(x_scale);
    let middle = _mm256_set1_epi32(MIDDLE * x_sum);
    for (i, v) in v.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = _mm256_cvtph_ps(_mm_loadu_si128(scales.as_ptr().add(16 * i).cast()));
            let offset = if asymmetric {
                let zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(zeros.as_ptr().add(8 * i).cast()));
                _mm256_mullo_epi32(zero, _mm256_set1_epi32(x_sum))
            } else {
                middle
            };
            let sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_slli_epi32::<4>(*v), offset));
            let y = y.as_mut_ptr().add(8 * i);
            _mm256_storeu_ps(y, _mm256_fmadd_ps(sum, _mm256_mul_ps(scale, x_scale), _mm256_loadu_ps(y)));
        }
    }
}
