//! Matmul with float activations and weights of any layout.
//!
//! Float models run entirely on it. Compressed ones use it where activations keep 16 or 32 bits ("weights only"): the
//! integer tiles are dequantized, a piece at a time, into a buffer that stays in the first-level cache.
//!
//! Few rows (decode) stream the weights from memory once. Many rows (prefill) go over a piece of a tile again and again
//! while it is in that cache. 16-bit weights are widened in registers, each time: six rows share one widening, and storing
//! widened pieces instead was slower up to twelve rows and no faster beyond. Either way each output is
//! `fma(x[k], w[k], sum)` for `k` in order, so the bits do not depend on the way taken, on the number of rows, or on the
//! tier.
//!
//! The loop itself is in [`lanes`]; attention shares it.

pub(crate) mod lanes;
pub(crate) mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod codes;
#[cfg(target_arch = "aarch64")]
mod neon;

use std::ops::Range;

use half::{bf16, f16};

use super::Columns;
use super::elementwise::tiers::listed;
use crate::cpu::Isa;
use crate::pack::{Layout, Packed, TILE_ROWS};
use lanes::{Element, LANES, MAX_ROWS, Panel, Tier, elements};

/// Floats of a piece of weights: 16 KiB, half of a small first-level cache; the inputs need some of the rest.
const PIECE: usize = 4096;

/// A matmul of `f32` activations with packed weights of any layout.
pub trait FloatMatmul: Sync {
    /// The tier.
    fn isa(&self) -> Isa;

    /// `y[r, 16 t .. 16 t + 16] = sum over k of x[r, k] * w[.., k]` for every row `r` and every tile `t` in `tiles`.
    ///
    /// # Safety
    /// No other thread may access the columns of these tiles in `y` during the call. `x` has `y.rows()` rows of `w.cols()`
    /// values, `y` has `w.rows()` columns, and `tiles` lies inside `w`.
    unsafe fn tiles(&self, w: &Packed, x: &[f32], tiles: Range<usize>, y: Columns<'_>);
}

/// All kernels this CPU and `NYBBLE_ISA` allow, lowest tier first.
pub fn kernels() -> Vec<&'static dyn FloatMatmul> {
    listed!(dyn FloatMatmul, neon)
}

impl<T: Tier> FloatMatmul for T {
    fn isa(&self) -> Isa {
        T::ISA
    }

    unsafe fn tiles(&self, w: &Packed, x: &[f32], tiles: Range<usize>, y: Columns<'_>) {
        debug_assert_eq!(x.len(), y.rows() * w.cols());
        // SAFETY: promised by the caller.
        unsafe {
            match w.layout() {
                Layout::F32 => float_tiles::<T, f32>(*self, w, x, tiles, y),
                Layout::F16 => float_tiles::<T, f16>(*self, w, x, tiles, y),
                Layout::Bf16 => float_tiles::<T, bf16>(*self, w, x, tiles, y),
                Layout::W4 | Layout::W8 => int_tiles(*self, w, x, tiles, y),
            }
        }
    }
}

/// Some adjacent tiles, or as many pieces of them, and their place in the product.
struct Weights<'a, W> {
    data: &'a [W],
    /// Elements from one tile to the next.
    stride: usize,
    tiles: Range<usize>,
    /// The columns `data` covers of each tile, and of how many there are.
    columns: Range<usize>,
    cols: usize,
}

/// # Safety
/// As [`FloatMatmul::tiles`], and the layout's elements are `W`.
unsafe fn float_tiles<T: Tier, W: Element>(
    tier: T,
    w: &Packed,
    x: &[f32],
    tiles: Range<usize>,
    y: Columns<'_>,
) {
    let cols = w.cols();
    if y.rows() <= T::ROWS {
        let data = elements::<W>(w.adjacent_tiles(tiles.clone()));
        // SAFETY: promised by the caller.
        unsafe { add(tier, &Weights { data, stride: cols * LANES, tiles, columns: 0..cols, cols }, x, y) }
        return;
    }
    for tile in tiles {
        let data = elements::<W>(w.tile_bytes(tile));
        for columns in pieces(cols, PIECE / LANES) {
            let data = &data[columns.start * LANES..columns.end * LANES];
            let piece = Weights { data, stride: 0, tiles: tile..tile + 1, columns, cols };
            // SAFETY: promised by the caller.
            unsafe { add(tier, &piece, x, y) }
        }
    }
}

/// # Safety
/// As [`FloatMatmul::tiles`], and the layout is an integer one.
unsafe fn int_tiles<T: Tier>(tier: T, w: &Packed, x: &[f32], tiles: Range<usize>, y: Columns<'_>) {
    // With few rows, several tiles at once are needed to keep the multipliers busy (see `lanes::panel`).
    let together = if y.rows() <= T::ROWS / 2 { 4 } else { 1 };
    let width = PIECE / LANES / together;
    let mut wide = Aligned([0.0; PIECE]);
    let mut first = tiles.start;
    while first < tiles.end {
        let group = first..tiles.end.min(first + together);
        for columns in pieces(w.cols(), width) {
            for (tile, wide) in group.clone().zip(wide.0.chunks_exact_mut(width * LANES)) {
                tier.dequantize(w, tile, columns.clone(), wide);
            }
            let (stride, cols) = (width * LANES, w.cols());
            let piece = Weights { data: &wide.0[..], stride, tiles: group.clone(), columns, cols };
            // SAFETY: promised by the caller.
            unsafe { add(tier, &piece, x, y) }
        }
        first = group.end;
    }
}

/// `0..cols` in runs of `width`; one empty run when there are no columns, so that the outputs become 0.
fn pieces(cols: usize, width: usize) -> impl Iterator<Item = Range<usize>> {
    (0..cols.max(1)).step_by(width).map(move |from| from..cols.min(from + width))
}

#[repr(align(64))]
struct Aligned([f32; PIECE]);

/// Adds the product of some weights to `y`, or stores it when it is the first part of the sum.
///
/// # Safety
/// As [`FloatMatmul::tiles`] for these tiles.
unsafe fn add<T: Tier, W: Element>(tier: T, w: &Weights<'_, W>, x: &[f32], y: Columns<'_>) {
    let depth = w.columns.len();
    let count = w.tiles.len();
    assert!(count == 0 || w.data.len() >= (count - 1) * w.stride + depth * LANES, "weights of a panel");
    assert!(x.len() >= y.rows() * w.cols && w.columns.end <= w.cols, "inputs of a panel");
    // The last tile may reach beyond the last column of `y`.
    let whole = count.min((y.width() / TILE_ROWS).saturating_sub(w.tiles.start));
    let blocks = y.rows().div_ceil(T::ROWS);
    for block in 0..blocks {
        // Blocks of nearly equal size: the smaller a block, the less it keeps the multipliers busy.
        let rows = y.rows() * block / blocks..y.rows() * (block + 1) / blocks;
        let mut panel = Panel {
            x: x[rows.start * w.cols + w.columns.start..].as_ptr(),
            x_stride: w.cols,
            w: w.data.as_ptr(),
            w_step: LANES,
            w_tile: w.stride,
            depth,
            y: [std::ptr::null_mut(); MAX_ROWS],
            fresh: w.columns.start == 0,
        };
        if whole > 0 {
            for (row, start) in rows.clone().zip(&mut panel.y) {
                // SAFETY: these columns are this call's own, and the slice lives no longer than this expression.
                *start = unsafe { y.row(row, w.tiles.start * TILE_ROWS, whole * TILE_ROWS) }.as_mut_ptr();
            }
            // SAFETY: the assertions above cover the weights and inputs, `whole` the outputs.
            unsafe { tier.panel(&panel, rows.len(), whole) }
        }
        for tile in whole..count {
            panel.w = w.data[tile * w.stride..].as_ptr();
            // SAFETY: as above; outputs are copied by their own length.
            unsafe { add_edge(tier, panel, rows.clone(), w.tiles.start + tile, y) }
        }
    }
}

/// One tile of which `y` has only some columns: computed in full beside it, then copied.
///
/// # Safety
/// As [`Tier::panel`], but for `panel.y`, which is replaced.
#[inline(never)]
unsafe fn add_edge<T: Tier, W: Element>(
    tier: T,
    mut panel: Panel<W>,
    rows: Range<usize>,
    tile: usize,
    y: Columns<'_>,
) {
    let mut full = [[0.0; LANES]; MAX_ROWS];
    // SAFETY: the tile's columns are this call's own; one row's slice is gone before the next one's is made.
    let own = |row: usize| unsafe { y.row(row, tile * TILE_ROWS, TILE_ROWS) };
    for ((row, full), start) in rows.clone().zip(&mut full).zip(&mut panel.y) {
        if !panel.fresh {
            let have = own(row);
            full[..have.len()].copy_from_slice(have);
        }
        *start = full.as_mut_ptr();
    }
    // SAFETY: the outputs are the rows of `full`, the rest is promised by the caller.
    unsafe { tier.panel(&panel, rows.len(), 1) }
    for (row, full) in rows.zip(&full) {
        let have = own(row);
        have.copy_from_slice(&full[..have.len()]);
    }
}
