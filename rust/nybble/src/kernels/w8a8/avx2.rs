//! `w8a8/avx2`: `vpmaddubsw` on magnitudes.
//!
//! The instruction wants one unsigned operand. `|w| * (x with the sign of w)` is the same product as `w * x`, and with `|w|`
//! at most 128 and `|x|` at most 127 a pair is at most 32512: it never saturates. Two pairs would, so each is widened to 32
//! bits at once by `vpmaddwd`. The magnitudes are made once for all rows.
//!
//! Where the weights are codes of 7 bits ([`Packed::narrow`]), adding 64 makes them unsigned, and the products of two columns
//! with any activations are at most 2 * 127 * 127: no change of sign is needed, and `64 * sum(activations)` is taken off once
//! a group. Where the activations have 7 bits, too, those of four columns are at most 4 * 127 * 63, so two pairs are added
//! before they are widened: three multiplications for 64 products, in place of six. That runs about one and a half
//! times as fast as 8 bits with 8.
//!
//! The change of sign takes one of the two multiplication slots a cycle (measured on Zen 3), so three instructions for 32
//! products set the pace. Tried and lost: widening both sides to 16 bits for `vpmaddwd` alone, which is two instructions. With
//! the activations widened once for all tiles, two rows by a whole tile run at 0.97 of this, four by half a tile at 0.7:
//! widening the weights, too, takes a slot, and each is used for fewer rows than registers would have to hold.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::cpu::Isa;
use crate::kernels::quantize::Activations;
use crate::kernels::tiles::{Outputs, Rows, Tile, fetch_ahead, int_matmul_kernel, opaque, walk};
use crate::kernels::{Columns, x86};
use crate::pack::{Layout, MIDDLE, Packed, TILE_K, TILE_ROWS, header_bytes};

int_matmul_kernel!(all, Avx2, Isa::Avx2, Layout::W8, 8);

const STEP: usize = Layout::W8.step_bytes();

/// What makes codes of 7 bits unsigned.
const NARROW: i32 = 64;

/// # Safety
/// As [`crate::kernels::IntMatmul::tiles`], and the CPU has the instructions.
unsafe fn all(w: &Packed, x: &Activations, tiles: Range<usize>, y: Columns<'_>) {
    // SAFETY: promised by the caller.
    unsafe {
        if w.narrow() && x.bits() < 8 && x.groups() == 1 && w.cols() <= SHORT {
            short(w, x, tiles, y);
        } else {
            walk::<4>(w, x, tiles, y, |tile, x, out| block(tile, x, out));
        }
    }
}

/// Columns up to which a matrix of one group is multiplied by [`short`].
const SHORT: usize = 128;

/// What [`walk`] and [`block`] do, for short rows of narrow codes such as the keys of a head: four rows go through all tiles
/// in one loop. To begin and end a tile takes as long as a third of its 64 columns otherwise.
///
/// # Safety
/// As [`crate::kernels::IntMatmul::tiles`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn short(w: &Packed, x: &Activations, tiles: Range<usize>, y: Columns<'_>) {
    for first in (0..x.rows()).step_by(4) {
        let count = (x.rows() - first).min(4);
        let rows = x.block(first, count);
        // SAFETY: promised by the caller.
        unsafe {
            match count {
                1 => short_rows::<1>(w, &rows, tiles.clone(), y, first),
                2 => short_rows::<2>(w, &rows, tiles.clone(), y, first),
                3 => short_rows::<3>(w, &rows, tiles.clone(), y, first),
                _ => short_rows::<4>(w, &rows, tiles.clone(), y, first),
            }
        }
    }
}

/// # Safety
/// As [`short`], of `M` rows, which are those of `y` from `first` on.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn short_rows<const M: usize>(
    w: &Packed,
    x: &Rows<'_>,
    tiles: Range<usize>,
    y: Columns<'_>,
    first: usize,
) {
    assert!(w.narrow() && x.bits < 8, "codes of 7 bits");
    opaque(0); // aligns the stack
    let factor = w.output_mul();
    let mut start = [_mm256_setzero_si256(); M];
    for (start, sum) in start.iter_mut().zip(x.sums) {
        *start = _mm256_set1_epi32(-NARROW * sum);
    }
    if !tiles.is_empty() {
        Tile::of(w, tiles.start).check(x, M, STEP); // all tiles are alike
    }
    let turns = 4 * w.cols().div_ceil(TILE_K);
    for t in tiles {
        let tile = w.tile_bytes(t);
        let mut sums = [[_mm256_setzero_si256(); 2]; M];
        for (sums, start) in sums.iter_mut().zip(start) {
            *sums = [start; 2];
        }
        let mut weights = tile[header_bytes(false)..].as_ptr();
        let mut codes = x.codes.as_ptr();
        for _ in 0..turns {
            // SAFETY: `check` made sure that a tile holds these steps, and each of the M rows their codes.
            unsafe {
                narrow::<M, 2>(weights, codes, x.stride, &mut sums);
                weights = weights.add(128);
                codes = codes.add(8);
            }
        }
        // SAFETY: a tile begins with its header.
        let scales = unsafe { x86::scales(tile.as_ptr()) };
        for m in 0..M {
            let mut out = [_mm256_setzero_ps(); 2];
            x86::finish_group(&mut out, sums[m], scales, x.scales[m]);
            out = out.map(|out| _mm256_mul_ps(out, _mm256_set1_ps(factor)));
            // SAFETY: promised by the caller, and the slice is gone before the next is made.
            let to = unsafe { y.row(first + m, t * TILE_ROWS, TILE_ROWS) };
            if let Ok(to) = <&mut Outputs>::try_from(&mut *to) {
                x86::store(std::slice::from_mut(to), &[out]);
            } else {
                let mut all = [[0.0; TILE_ROWS]];
                x86::store(&mut all, &[out]);
                to.copy_from_slice(&all[0][..to.len()]);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn block(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    match (tile.asymmetric, tile.narrow, x.bits < 8) {
        (true, ..) => block_of::<0, true>(tile, x, out),
        (false, false, _) => block_of::<0, false>(tile, x, out),
        (false, true, false) => block_of::<1, false>(tile, x, out),
        (false, true, true) => block_of::<2, false>(tile, x, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn block_of<const PAIRS: usize, const ASYMMETRIC: bool>(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    match out.len() {
        1 => rows::<1, PAIRS, ASYMMETRIC>(tile, x, out),
        2 => rows::<2, PAIRS, ASYMMETRIC>(tile, x, out),
        3 => rows::<3, PAIRS, ASYMMETRIC>(tile, x, out),
        _ => rows::<4, PAIRS, ASYMMETRIC>(tile, x, out),
    }
}

/// `PAIRS` chunks are added up in 16 bits, which takes narrow weights; 0 is for weights of all 8 bits.
#[target_feature(enable = "avx2,fma,f16c")]
fn rows<const M: usize, const PAIRS: usize, const ASYMMETRIC: bool>(
    tile: &Tile<'_>,
    x: &Rows<'_>,
    out: &mut [Outputs],
) {
    assert!(out.len() == M && tile.asymmetric == ASYMMETRIC);
    assert!((PAIRS == 0 || tile.narrow) && (PAIRS < 2 || x.bits < 8));
    tile.check(x, M, STEP);
    if M > 1 {
        opaque(0); // aligns the stack
    }
    let turns = 8 / PAIRS.max(1);
    let mut y = [[_mm256_setzero_ps(); 2]; M];
    let mut weights = tile.bytes.as_ptr();
    let mut codes = x.codes.as_ptr();
    for g in 0..x.groups {
        let header = weights;
        // SAFETY: `check` made sure that the tile holds this group's header and steps, and each of the M rows its 32
        // codes a step and one scale and sum a group; the pointers advance by exactly these amounts.
        unsafe {
            weights = weights.add(tile.header());
            let mut sums = [[_mm256_setzero_si256(); 2]; M];
            for half in 0..2 {
                let zero = match (PAIRS, ASYMMETRIC) {
                    (0, false) => break,
                    (0, true) => {
                        let zero = x86::zero_points(header, true, half);
                        _mm256_sub_epi32(zero, _mm256_set1_epi32(MIDDLE))
                    }
                    _ => _mm256_set1_epi32(NARROW),
                };
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x_sum = _mm256_set1_epi32(*x.sums.get_unchecked(m * x.groups + g));
                    sums[half] = _mm256_sub_epi32(sums[half], _mm256_mullo_epi32(zero, x_sum));
                }
            }
            for turn in 0..turns * tile.steps_of(g) {
                if tile.cold && turn % turns == 0 {
                    fetch_ahead::<STEP>(weights);
                }
                if PAIRS == 0 {
                    wide(weights, codes, x.stride, &mut sums);
                } else {
                    narrow::<M, PAIRS>(weights, codes, x.stride, &mut sums);
                }
                weights = weights.add(64 * PAIRS.max(1));
                codes = codes.add(4 * PAIRS.max(1));
            }
            let scales = x86::scales(header);
            for m in 0..M {
                x86::finish_group(&mut y[m], sums[m], scales, *x.scales.get_unchecked(m * x.groups + g));
            }
        }
    }
    x86::store(out, &y);
}

/// Adds the products of a chunk of weights.
///
/// # Safety
/// Behind `weights` there is a chunk, and behind `codes` there are four codes of `M` rows, `stride` apart.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn wide<const M: usize>(
    weights: *const u8,
    codes: *const i8,
    stride: usize,
    sums: &mut [[__m256i; 2]; M],
) {
    let ones = _mm256_set1_epi16(1);
    let chunk = weights.cast::<__m256i>();
    // SAFETY: promised by the caller.
    let w = unsafe { [_mm256_loadu_si256(chunk), _mm256_loadu_si256(chunk.add(1))] };
    let magnitude = w.map(|w| _mm256_abs_epi8(w));
    for (m, sums) in sums.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        let x = _mm256_set1_epi32(unsafe { codes.add(m * stride).cast::<i32>().read_unaligned() });
        for half in 0..2 {
            let pairs = _mm256_maddubs_epi16(magnitude[half], _mm256_sign_epi8(x, w[half]));
            sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
        }
    }
}

/// Adds the products of `PAIRS` chunks of narrow weights, each [`NARROW`] too large.
///
/// # Safety
/// As [`wide`], of as many chunks; with two of them no code is beyond 63.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn narrow<const M: usize, const PAIRS: usize>(
    weights: *const u8,
    codes: *const i8,
    stride: usize,
    sums: &mut [[__m256i; 2]; M],
) {
    let (ones, offset) = (_mm256_set1_epi16(1), _mm256_set1_epi8(NARROW as i8));
    let chunk = weights.cast::<__m256i>();
    let w: [[__m256i; 2]; PAIRS] = std::array::from_fn(|pair| {
        std::array::from_fn(|half| {
            // SAFETY: promised by the caller.
            _mm256_add_epi8(offset, unsafe { _mm256_loadu_si256(chunk.add(2 * pair + half)) })
        })
    });
    for (m, sums) in sums.iter_mut().enumerate() {
        let x: [__m256i; PAIRS] = std::array::from_fn(|pair| {
            // SAFETY: promised by the caller.
            _mm256_set1_epi32(unsafe { codes.add(m * stride).cast::<i32>().add(pair).read_unaligned() })
        });
        for half in 0..2 {
            let mut pairs = _mm256_maddubs_epi16(w[0][half], x[0]);
            for pair in 1..PAIRS {
                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[pair][half], x[pair]));
            }
            sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
        }
    }
}
