//! Sixteen floats side by side, and the one loop that all float products of this crate are made of.
//!
//! A tile of weights, a run of 16 keys stored `[dimension][16 keys]`, and 16 dimensions of a run of values have the same
//! shape: at every step of the summed index there are 16 neighbours that meet one scalar of the other operand. So matmul,
//! query times key and probability times value are all [`panel`]: broadcast a scalar, multiply by 16 lanes, add, with one
//! fused multiply-add a lane. No lane ever meets another one, and every output is one chain of additions in the order of
//! the summed index. That makes its bits independent of how many rows or tiles a call computes, and of the tier.
//!
//! [`Lanes`] is what a tier supplies (two `ymm`, one `zmm`, four NEON registers, or an array), [`Element`] how stored
//! numbers become lanes, and [`Tier`] instantiates the loop under the tier's instructions; a tier is its capability token,
//! which proves that they may be used.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

use std::ops::Range;

use half::{bf16, f16};

use super::super::attention::Small;
use crate::cpu::Isa;
use crate::pack::Packed;

/// Numbers in one [`Lanes`].
pub(crate) const LANES: usize = 16;

/// Most rows of any tier's [`Panel`].
pub(crate) const MAX_ROWS: usize = 12;

/// Sixteen `f32`.
///
/// # Safety of the methods
/// The instructions of the implementing tier must be there, and pointers must be valid for 16 elements; they need not be
/// aligned.
pub(crate) trait Lanes: Copy {
    /// All zeros.
    unsafe fn zero() -> Self;
    /// Reads 16 floats.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads 16 half floats.
    unsafe fn load_f16(from: *const f16) -> Self;
    /// Reads 16 brain floats; the fast way may take a register more if there is one to `spare`.
    unsafe fn load_bf16(from: *const bf16, spare: bool) -> Self;
    /// Reads 16 signed bytes as numbers.
    unsafe fn load_i8(from: *const i8) -> Self;
    /// Reads 16 bytes that are floats cut short.
    unsafe fn load_small(from: *const Small) -> Self;
    /// Writes 16 floats.
    unsafe fn store(self, to: *mut f32);
    /// `self + x * w`, rounded once.
    unsafe fn add_product(self, x: f32, w: Self) -> Self;
    /// `self + other`.
    unsafe fn plus(self, other: Self) -> Self;
    /// `other` where it is larger than `self`.
    unsafe fn larger(self, other: Self) -> Self;
}

/// A stored number that widens to `f32` exactly; every bit pattern is one.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// Sixteen of them.
    ///
    /// # Safety
    /// As [`Lanes`].
    unsafe fn lanes<L: Lanes>(from: *const Self, spare: bool) -> L;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const Self, _spare: bool) -> L {
        // SAFETY: promised by the caller.
        unsafe { L::load(from) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const Self, _spare: bool) -> L {
        // SAFETY: promised by the caller.
        unsafe { L::load_f16(from) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const Self, spare: bool) -> L {
        // SAFETY: promised by the caller.
        unsafe { L::load_bf16(from, spare) }
    }
}

impl Element for i8 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const Self, _spare: bool) -> L {
        // SAFETY: promised by the caller.
        unsafe { L::load_i8(from) }
    }
}

/// `bytes` as elements.
///
/// # Panics
/// When they are not whole, aligned elements, which a tile's bytes always are.
pub(crate) fn elements<W: Element>(bytes: &[u8]) -> &[W] {
    // SAFETY: every bit pattern is a value of an `Element`; `align_to` itself keeps to alignment and length.
    let (head, body, tail) = unsafe { bytes.align_to::<W>() };
    assert!(head.is_empty() && tail.is_empty(), "whole, aligned elements");
    body
}

/// Operands of [`panel`]: `y[r][16 t + l] (+)= sum over k < depth of x[r][k] * w[t][k][l]`.
#[derive(Clone, Copy)]
pub(crate) struct Panel<W> {
    /// Row `r` starts at `x + r * x_stride`.
    pub(crate) x: *const f32,
    pub(crate) x_stride: usize,
    /// The 16 elements of tile `t` for index `k` start at `w + t * w_tile + k * w_step`.
    pub(crate) w: *const W,
    pub(crate) w_step: usize,
    pub(crate) w_tile: usize,
    pub(crate) depth: usize,
    /// Where each row of the result starts; the tiles of a row lie side by side.
    pub(crate) y: [*mut f32; MAX_ROWS],
    /// Start from 0 instead of from what `y` holds.
    pub(crate) fresh: bool,
}

impl<W> Panel<W> {
    /// The same panel from `tiles` tiles further on.
    #[inline(always)]
    unsafe fn skip_tiles(&mut self, tiles: usize) {
        // SAFETY: at most one past the last tile, as the caller promised for `panel`.
        unsafe {
            self.w = self.w.add(tiles * self.w_tile);
            for y in &mut self.y {
                *y = y.wrapping_add(tiles * LANES);
            }
        }
    }
}

/// A loop that every tier compiles for itself, see [`Tier::run`].
pub(crate) trait Work {
    /// What it returns.
    type Output;
    /// The loop; `#[inline(always)]`, or it is compiled for the plain target.
    ///
    /// # Safety
    /// The instructions of `L` must be there.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
}

/// A tier that can compute panels, named by its capability token.
pub(crate) trait Tier: Copy + Send + Sync + 'static {
    /// The tier.
    const ISA: Isa;
    /// Most rows in one call of [`Tier::panel`], at most [`MAX_ROWS`].
    const ROWS: usize;

    /// The product described at [`Panel`] for `rows <= ROWS` rows and `tiles` tiles.
    ///
    /// # Safety
    /// All addresses named there are valid for these rows, tiles and depth, and nothing else uses the results meanwhile.
    unsafe fn panel<W: Element>(self, panel: &Panel<W>, rows: usize, tiles: usize);

    /// Runs `work` compiled under the tier's instructions.
    fn run<F: Work>(self, work: F) -> F::Output;

    /// [`Packed::dequantize_tile`]; there is room for whole steps of 32 columns.
    fn dequantize(self, w: &Packed, tile: usize, columns: Range<usize>, to: &mut [f32]);
}

/// `R` rows of `tiles` tiles, `T` of them at a time.
///
/// One row keeps a multiplier busy only an eighth of the time, for each addition waits for the one before it; several tiles
/// or rows at once are that many independent chains.
///
/// # Safety
/// As [`Tier::panel`], for `R` rows; and the instructions of `L` must be there.
#[inline(always)]
pub(crate) unsafe fn panel<L: Lanes, W: Element, const T: usize, const R: usize>(
    whole: &Panel<W>,
    mut tiles: usize,
) {
    let mut rest = *whole;
    // SAFETY: promised by the caller.
    unsafe {
        while tiles >= T {
            block::<L, W, T, R>(&rest);
            rest.skip_tiles(T);
            tiles -= T;
        }
        while tiles > 0 {
            block::<L, W, 1, R>(&rest);
            rest.skip_tiles(1);
            tiles -= 1;
        }
    }
}

/// `R` rows of `T` tiles, all sums in registers.
///
/// Counted loops on purpose: with iterators over the arrays the compiler left some of them rolled up, and so all sums in
/// memory, at a tenth of the speed.
#[inline(always)]
unsafe fn block<L: Lanes, W: Element, const T: usize, const R: usize>(p: &Panel<W>) {
    // SAFETY: promised by the caller of `panel`.
    unsafe {
        let mut sums = [[L::zero(); T]; R];
        if !p.fresh {
            for r in 0..R {
                for t in 0..T {
                    sums[r][t] = L::load(p.y[r].add(t * LANES));
                }
            }
        }
        for k in 0..p.depth {
            let mut lanes = [L::zero(); T];
            for t in 0..T {
                lanes[t] = W::lanes::<L>(p.w.add(t * p.w_tile + k * p.w_step), R < 4);
            }
            for r in 0..R {
                let x = *p.x.add(r * p.x_stride + k);
                for t in 0..T {
                    sums[r][t] = sums[r][t].add_product(x, lanes[t]);
                }
            }
        }
        for r in 0..R {
            for t in 0..T {
                sums[r][t].store(p.y[r].add(t * LANES));
            }
        }
    }
}

/// Calls `go::<_, T, R>` with the constants of the given number of rows.
macro_rules! by_rows {
    ($go:ident, $panel:expr, $rows:expr, $tiles:expr, { $($r:literal => $t:literal),+ $(,)? }) => {
        match $rows {
            $($r => $go::<_, $t, $r>($panel, $tiles),)+
            other => debug_assert_eq!(other, 0, "rows of a panel"),
        }
    };
}
pub(crate) use by_rows;
