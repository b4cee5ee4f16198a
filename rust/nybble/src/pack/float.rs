//! Packing of float matrices: `[column][16 rows]` within a tile, elements kept as they are.
//!
//! A kernel multiplies one input with the 16 weights that meet it, so those are stored side by side. The elements stay in
//! the type the model was saved in: a 16-bit weight is half the memory traffic of its 32-bit value, and widening it is
//! exact and nearly free.

use std::ops::Range;

use super::buffer::Buffer;
use super::{Layout, Packed, TILE_ROWS};
use crate::error::{Error, Result};
use crate::threads::Pool;

impl Packed {
    /// Packs `data`, row-major `[rows, cols]`.
    pub fn from_f32(rows: usize, cols: usize, data: &[f32], pool: &Pool) -> Result<Self> {
        pack(Layout::F32, rows, cols, data, pool, f32::to_le_bytes)
    }

    /// Packs `data`, row-major `[rows, cols]`, numbers of type `layout` ([`Layout::F16`] or [`Layout::Bf16`]) as files
    /// hold them, low byte first.
    pub fn from_half(
        rows: usize,
        cols: usize,
        data: &[[u8; 2]],
        layout: Layout,
        pool: &Pool,
    ) -> Result<Self> {
        if !matches!(layout, Layout::F16 | Layout::Bf16) {
            return Err(Error::argument("layout", "f16 or bf16", layout.name()));
        }
        pack(layout, rows, cols, data, pool, |value| value)
    }

    /// The bytes of several adjacent tiles.
    ///
    /// # Panics
    /// When there are no such tiles.
    pub(crate) fn adjacent_tiles(&self, tiles: Range<usize>) -> &[u8] {
        &self.data.bytes()[tiles.start * self.tile_bytes..tiles.end * self.tile_bytes]
    }
}

/// Transposes each 16 rows of `data` into a tile.
fn pack<T: Copy + Sync, const N: usize>(
    layout: Layout,
    rows: usize,
    cols: usize,
    data: &[T],
    pool: &Pool,
    bytes: impl Fn(T) -> [u8; N] + Sync,
) -> Result<Packed> {
    if rows.checked_mul(cols) != Some(data.len()) {
        return Err(Error::argument(
            "weights",
            format!("{rows} x {cols} values"),
            format!("{} values", data.len()),
        ));
    }
    let tile_bytes = cols
        .checked_mul(TILE_ROWS * N)
        .ok_or_else(|| Error::argument("weights", "fewer columns", format!("{cols} columns")))?;
    let buffer =
        Buffer::build("packed weights", rows.div_ceil(TILE_ROWS), tile_bytes, pool, &|tile, out| {
            let first = tile * TILE_ROWS;
            let last = rows.min(first + TILE_ROWS);
            // 64 columns at a time: the piece of the tile stays in the first-level cache while 16 rows visit it.
            for from in (0..cols).step_by(64) {
                let to = cols.min(from + 64);
                for row in first..last {
                    let lane = (row - first) * N;
                    let source = &data[row * cols + from..row * cols + to];
                    let target = out[from * TILE_ROWS * N..].chunks_exact_mut(TILE_ROWS * N);
                    for (step, &value) in target.zip(source) {
                        step[lane..lane + N].copy_from_slice(&bytes(value));
                    }
                }
            }
        })?;
    Ok(Packed::from_float_tiles(layout, rows, cols, tile_bytes, buffer))
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn rows_come_back_as_they_went_in() {
        for threads in [1, 3] {
            let pool = Pool::new(threads).expect("a pool");
            for (rows, cols) in [(0, 0), (0, 5), (3, 0), (1, 1), (15, 3), (16, 64), (17, 65), (50, 130)] {
                let bits: Vec<u16> =
                    (0..rows * cols).map(|i| (i as u16).wrapping_mul(40503) & 0x7bff).collect();
                let values: Vec<f32> = bits.iter().map(|&b| f32::from(b) / 3.0).collect();
                let mut out = vec![0.0; cols];
                let full = Packed::from_f32(rows, cols, &values, &pool).expect("packs");
                assert_eq!(
                    (full.layout(), full.rows(), full.cols(), full.group()),
                    (Layout::F32, rows, cols, 0)
                );
                let data: Vec<[u8; 2]> = bits.iter().map(|b| b.to_le_bytes()).collect();
                let half = Packed::from_half(rows, cols, &data, Layout::F16, &pool).expect("packs");
                let brain = Packed::from_half(rows, cols, &data, Layout::Bf16, &pool).expect("packs");
                assert_eq!((half.bytes() * 2, brain.bytes()), (full.bytes(), half.bytes()));
                for row in 0..rows {
                    let part = row * cols..(row + 1) * cols;
                    full.row(row, &mut out).expect("a row");
                    assert_eq!(out, &values[part.clone()]);
                    half.row(row, &mut out).expect("a row");
                    assert!(
                        out.iter().zip(&bits[part.clone()]).all(|(x, &b)| *x == f16::from_bits(b).to_f32())
                    );
                    brain.row(row, &mut out).expect("a row");
                    assert!(out.iter().zip(&bits[part]).all(|(x, &b)| *x == bf16::from_bits(b).to_f32()));
                }
            }
        }
    }

    #[test]
    fn a_tile_interleaves_16_rows_and_pads_with_zeros() {
        let pool = Pool::new(1).expect("a pool");
        let data: Vec<f32> = (0..17 * 3).map(|i| i as f32 + 1.0).collect();
        let packed = Packed::from_f32(17, 3, &data, &pool).expect("packs");
        assert_eq!(packed.adjacent_tiles(0..2).len(), 2 * 48 * 4);
        let floats = |bytes: &[u8]| -> Vec<f32> {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        let first = floats(packed.tile_bytes(0));
        let second = floats(packed.tile_bytes(1));
        for col in 0..3 {
            for lane in 0..16 {
                assert_eq!(first[col * 16 + lane], data[lane * 3 + col]);
                assert_eq!(second[col * 16 + lane], if lane == 0 { data[48 + col] } else { 0.0 });
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() {
        let pool = Pool::new(1).expect("a pool");
        for (rows, cols, len) in [(2, 3, 5), (2, 3, 7), (usize::MAX, 2, 2), (1 << 40, 1 << 40, 1)] {
            let data = vec![0.0; len];
            assert!(matches!(Packed::from_f32(rows, cols, &data, &pool), Err(Error::Argument { .. })));
        }
        assert!(Packed::from_f32(0, usize::MAX, &[], &pool).is_err());
        assert!(Packed::from_half(1, 1, &[[0; 2]], Layout::W4, &pool).is_err());
    }
}
