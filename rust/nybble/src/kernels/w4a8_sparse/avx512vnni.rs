//! `w4a8_sparse/avx512vnni`: `vpdpbusd`, 64 products an instruction, added in 32 bits at once.
//!
//! *Rows.* 32 bytes become 64 codes, the low nibbles in one half of a vector and the high ones in the other, beside 64
//! activations as they lie. A group of 32 is a half; the sums of eight neurons are added across lanes together.
//!
//! *Columns.* Four neurons' bytes are interleaved, so that one instruction multiplies all four by their activations and adds,
//! for 16 outputs of two chunks. High nibbles are not shifted down: their sums are sixteen times too large, which is the unit
//! of the zero points, and the low nibbles' sums are brought to it at the end of a group.

use std::arch::x86_64::*;
use std::ops::Range;

use super::x86::{BLOCK, EIGHT, fetch_chunk, x86_kernel};
use super::{Vector, by_group};
use crate::cpu::Isa;
use crate::kernels::tiles::opaque;
use crate::pack::{Bundles, CHUNK, MIDDLE, Side};

x86_kernel!(Avx512Vnni, Isa::Avx512Vnni, "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c");

/// Neurons whose products are computed together.
const TOGETHER: usize = 16;

/// The activations of a chunk; those behind the last are 0.
///
/// # Safety
/// There is such a chunk.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn activations(x: &Vector<'_>, chunk: usize) -> __m512i {
    let left = x.0.codes.len() - CHUNK * chunk; // a multiple of 32
    let mask = if left >= CHUNK { u64::MAX } else { u64::from(u32::MAX) };
    // SAFETY: the bytes under the mask are there.
    unsafe { _mm512_maskz_loadu_epi8(mask, x.0.codes.as_ptr().add(CHUNK * chunk)) }
}

/// The 64 codes in 32 bytes.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn codes(bytes: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    let w = unsafe { _mm256_loadu_si256(bytes.cast()) };
    let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(w), _mm256_srli_epi16::<4>(w));
    _mm512_and_si512(both, _mm512_set1_epi8(15))
}

/// The sums of both halves of eight vectors: first the low halves', a lane a vector.
#[inline]
#[target_feature(enable = "avx512f")]
fn across(v: &[__m512i; EIGHT]) -> __m512i {
    let pair = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let four = |a, b, c, d| {
        let (p, q) = (pair(a, b), pair(c, d));
        _mm512_add_epi32(_mm512_unpacklo_epi64(p, q), _mm512_unpackhi_epi64(p, q))
    };
    let (first, second) = (four(v[0], v[1], v[2], v[3]), four(v[4], v[5], v[6], v[7]));
    let even = _mm512_shuffle_i32x4::<0x88>(first, second);
    let odd = _mm512_shuffle_i32x4::<0xdd>(first, second);
    let sums = _mm512_add_epi32(even, odd);
    _mm512_shuffle_i32x4::<0xd8>(sums, sums)
}

/// The sums of both groups of 32 in a chunk, a lane a row.
///
/// # Safety
/// The rows and `x` have such a chunk.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn two_groups(rows: &[*const u8; EIGHT], chunk: usize, x: &Vector<'_>) -> [__m256i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let x = activations(x, chunk);
        let sums = rows.map(|row| _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes(row.add(32 * chunk)), x));
        let sums = across(&sums);
        [_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64::<1>(sums)]
    }
}

/// The sums of a group of some chunks, a lane a row.
///
/// # Safety
/// The rows and `x` have such chunks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn one_group(
    rows: &[*const u8; EIGHT],
    from: usize,
    to: usize,
    x: &Vector<'_>,
    ahead: &[*const u8; EIGHT],
) -> __m256i {
    let mut v = [_mm512_setzero_si512(); EIGHT];
    for chunk in from..to {
        fetch_chunk(ahead, chunk);
        // SAFETY: the caller's promise.
        unsafe {
            let x = activations(x, chunk);
            for (v, row) in v.iter_mut().zip(rows) {
                *v = _mm512_dpbusd_epi32(*v, codes(row.add(32 * chunk)), x);
            }
        }
    }
    let sums = across(&v);
    _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64::<1>(sums))
}

/// Sums of two chunks: of the low nibbles, 16 outputs a vector of which each 128 bits hold four, then of the high ones.
type Sums = [__m512i; 8];

/// The outputs of at most [`BLOCK`] chunks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn columns(w: &Bundles, side: Side, x: &Vector<'_>, active: &[u32], chunks: Range<usize>, y: &mut [f32]) {
    opaque(0); // aligns the stack
    assert!(chunks.len() <= BLOCK && chunks.end <= w.chunks());
    let mut outputs = [[0f32; 2 * CHUNK]; BLOCK / 2];
    let mut sums: [Sums; BLOCK / 2] = [[_mm512_setzero_si512(); 8]; BLOCK / 2];
    let pairs = chunks.len().div_ceil(2);
    let mut place = 0; // in `active`
    for (g, members) in by_group(active, side.group) {
        let (scales, zeros) = w.column_scales(g);
        let (x_scale, x_sum) = (x.0.scales[g], x.0.sums[g]);
        let mut batches = members.chunks(TOGETHER).peekable();
        let mut begun = false;
        while let Some(batch) = batches.next() {
            let mut bytes = [std::ptr::null(); TOGETHER];
            let mut factors = [0i32; TOGETHER / 4];
            for (i, &n) in batch.iter().enumerate() {
                bytes[i] = w.column(n as usize)[32 * chunks.start..].as_ptr();
                let code = u32::from(x.0.codes[n as usize].cast_unsigned());
                factors[i / 4] |= (code << (8 * (i % 4))).cast_signed();
            }
            let fours = batch.len().div_ceil(4);
            let any = bytes[0];
            bytes[batch.len()..].fill(any); // times 0
            place += batch.len();
            let mut ahead = [std::ptr::null(); TOGETHER];
            for (ahead, &n) in ahead.iter_mut().zip(active[place..].iter().take(TOGETHER)) {
                *ahead = w.column(n as usize)[32 * chunks.start..].as_ptr();
            }
            let (bytes, factors) = (&bytes[..4 * fours], &factors[..fours]);
            let last = batches.peek().is_none();
            for pair in 0..pairs {
                for next in ahead {
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(64 * pair).cast());
                }
                let both = 2 * pair + 1 < chunks.len();
                let begin = if begun { sums[pair] } else { [_mm512_setzero_si512(); 8] };
                // SAFETY: all of `bytes` have 32 bytes for each of the chunks.
                let v = unsafe { two_chunks(begin, bytes, factors, 64 * pair, both) };
                if last {
                    let place = (chunks.start + 2 * pair) * CHUNK;
                    let count = if both { 2 * CHUNK } else { CHUNK };
                    let scales = &scales[2 * place..][..2 * count];
                    let zeros = if side.asymmetric { &zeros[place..][..count] } else { zeros };
                    finish(&v, scales, zeros, side.asymmetric, x_scale, x_sum, &mut outputs[pair][..count]);
                } else {
                    sums[pair] = v;
                }
            }
            begun = true;
        }
    }
    for (y, outputs) in y.chunks_mut(2 * CHUNK).zip(&outputs) {
        y.copy_from_slice(&outputs[..y.len()]);
    }
}

/// Adds the products of up to sixteen neurons for the two chunks from byte `at` on, or for the one that there is.
///
/// # Safety
/// Each of `bytes` has 32 bytes for each of these chunks from `at` on, and there are four for each of `factors`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn two_chunks(mut v: Sums, bytes: &[*const u8], factors: &[i32], at: usize, both: bool) -> Sums {
    let nibble = _mm512_set1_epi8(15);
    let mask = if both { u64::MAX } else { u64::from(u32::MAX) };
    for (four, &factor) in bytes.chunks_exact(4).zip(factors) {
        // SAFETY: the bytes under the mask are there by the caller's promise.
        let load = |i: usize| unsafe { _mm512_maskz_loadu_epi8(mask, four[i].add(at).cast()) };
        let (a, b, c, d) = (load(0), load(1), load(2), load(3));
        let x = _mm512_set1_epi32(factor);
        let (ab, cd) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
        let (ab2, cd2) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
        let interleaved = [
            _mm512_unpacklo_epi16(ab, cd),
            _mm512_unpackhi_epi16(ab, cd),
            _mm512_unpacklo_epi16(ab2, cd2),
            _mm512_unpackhi_epi16(ab2, cd2),
        ];
        for (i, w) in interleaved.into_iter().enumerate() {
            v[i] = _mm512_dpbusd_epi32(v[i], _mm512_and_si512(w, nibble), x);
            v[4 + i] = _mm512_dpbusd_epi32(v[4 + i], _mm512_andnot_si512(nibble, w), x);
        }
    }
    v
}

/// The end of a group: `y += (scale * x_scale) * (16 * sums - zero * x_sum)`, for one chunk or two.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn finish(v: &Sums, scales: &[u8], zeros: &[u8], asymmetric: bool, x_scale: f32, x_sum: i32, y: &mut [f32]) {
    let (low, high) = (in_order([v[0], v[1], v[2], v[3]]), in_order([v[4], v[5], v[6], v[7]]));
    let low = low.map(|sums| _mm512_slli_epi32::<4>(sums));
    // Outputs of the first chunk, then of the second.
    let sums = [low[0], low[1], high[0], high[1], low[2], low[3], high[2], high[3]];
    let (x_scale, x_sum) = (_mm512_set1_ps(x_scale), _mm512_set1_epi32(x_sum));
    assert!(scales.len() == 2 * y.len() && (!asymmetric || zeros.len() == y.len()));
    for (i, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // SAFETY: scales and zero points are as many as outputs.
        unsafe {
            let scale = _mm512_cvtph_ps(_mm256_loadu_si256(scales.as_ptr().add(32 * i).cast()));
            let zero = if asymmetric {
                _mm512_cvtepu8_epi32(_mm_loadu_si128(zeros.as_ptr().add(16 * i).cast()))
            } else {
                _mm512_set1_epi32(MIDDLE)
            };
            let sum = _mm512_sub_epi32(sums[i], _mm512_mullo_epi32(zero, x_sum));
            let old = _mm512_loadu_ps(y.as_ptr());
            let factor = _mm512_mul_ps(scale, x_scale);
            _mm512_storeu_ps(y.as_mut_ptr(), _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, old));
        }
    }
}

/// Four vectors whose 128 bits number `l` hold four neighbours of 16, the other way round: vector `l` holds all 16.
#[inline]
#[target_feature(enable = "avx512f")]
fn in_order(v: [__m512i; 4]) -> [__m512i; 4] {
    let (a, b) = (_mm512_shuffle_i32x4::<0x44>(v[0], v[1]), _mm512_shuffle_i32x4::<0x44>(v[2], v[3]));
    let (c, d) = (_mm512_shuffle_i32x4::<0xee>(v[0], v[1]), _mm512_shuffle_i32x4::<0xee>(v[2], v[3]));
    [
        _mm512_shuffle_i32x4::<0x88>(a, b),
        _mm512_shuffle_i32x4::<0xdd>(a, b),
        _mm512_shuffle_i32x4::<0x88>(c, d),
        _mm512_shuffle_i32x4::<0xdd>(c, d),
    ]
}
