//! Matrices of 7-bit codes that are made anew while a model runs: the keys and values that attention multiplies with.
//!
//! They are tiles like any other matrix's, so that every kernel for 8-bit weights reads them. Only the memory is kept from one
//! matrix to the next of the same shape; the writer fills all of a tile's rows and columns, and padding stays 0.

use half::f16;

use super::int::SCALE_BYTES;
use super::{Buffer, Layout, Packed, TILE_K, TILE_ROWS, group_header, grouping, header_bytes};
use crate::error::{Error, Result};

/// The largest code.
pub(crate) const LARGEST: f32 = 63.0;

impl Packed {
    /// A matrix of zeros, symmetric and of one factor, to be filled through [`Packed::write_scales`] and
    /// [`Packed::write_chunk`] with codes from -63 to 63.
    pub(crate) fn to_fill(name: &str, rows: usize, cols: usize, group: usize) -> Result<Self> {
        let (group, groups) = grouping(name, cols, group)?;
        let tile_bytes = cols
            .div_ceil(TILE_K)
            .checked_mul(Layout::W8.step_bytes())
            .and_then(|codes| codes.checked_add(groups.checked_mul(header_bytes(false))?));
        let bytes = tile_bytes.and_then(|bytes| rows.div_ceil(TILE_ROWS).checked_mul(bytes));
        let refused = || Error::argument(name, format!("memory for {rows} x {cols} codes"), "out of memory");
        let data = bytes.and_then(Buffer::zeroed).ok_or_else(refused)?;
        Ok(Self {
            layout: Layout::W8,
            rows,
            cols,
            group,
            asymmetric: false,
            narrow: true,
            scale_mul: 1.0,
            tile_bytes: tile_bytes.unwrap_or_default(),
            data,
        })
    }

    /// Writes the scales of the 16 rows of tile `t` in group `g`, rounded to f16.
    pub(crate) fn write_scales(&mut self, t: usize, g: usize, scales: &[f32; TILE_ROWS]) {
        let at = t * self.tile_bytes + self.step_offset(g * self.group / TILE_K) - header_bytes(false);
        let header = &mut self.data.bytes_mut()[at..][..SCALE_BYTES];
        for (to, scale) in header.chunks_exact_mut(2).zip(scales) {
            to.copy_from_slice(&f16::from_f32(*scale).to_le_bytes());
        }
    }

    /// The chunks of the columns of step `step` in tile `t`, four columns each.
    pub(crate) fn chunks_mut(&mut self, t: usize, step: usize) -> &mut [[u8; 64]] {
        let at = t * self.tile_bytes + self.step_offset(step);
        self.data.bytes_mut()[at..][..Layout::W8.step_bytes()].as_chunks_mut().0
    }

    /// The scales of the 16 rows of tile `t` in group `g`.
    pub(crate) fn scales_of(&self, t: usize, g: usize) -> [f32; TILE_ROWS] {
        let at = self.step_offset(g * self.group / TILE_K) - header_bytes(false);
        group_header(&self.tile_bytes(t)[at..], false).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for (rows, cols, group) in [(1, 4, 4), (18, 72, 72), (33, 132, 64)] {
            let mut packed = Packed::to_fill("w", rows, cols, group).expect("memory");
            let code = |row: usize, col: usize| ((row * 31 + col * 7) % 127) as i8 - 63;
            let scale = |row: usize, group: usize| (1 + row % 16 + group) as f32 / 8.0;
            let groups = cols.next_multiple_of(TILE_K).div_ceil(packed.group());
            for t in 0..packed.tiles() {
                for g in 0..groups {
                    packed.write_scales(t, g, &std::array::from_fn(|r| scale(r, g)));
                    assert_eq!(packed.scales_of(t, g)[3], scale(3, g));
                }
                for step in 0..cols.div_ceil(TILE_K) {
                    for (chunk, bytes) in packed.chunks_mut(t, step).iter_mut().enumerate() {
                        for (at, byte) in bytes.iter_mut().enumerate() {
                            let (row, col) = (t * TILE_ROWS + at / 4, step * TILE_K + 4 * chunk + at % 4);
                            *byte = if row < rows && col < cols { code(row, col) as u8 } else { 0 };
                        }
                    }
                }
            }
            let mut found = vec![0.0; cols];
            for row in 0..rows {
                packed.row(row, &mut found).expect("a row");
                let value = |col| f32::from(code(row, col)) * scale(row, col / packed.group());
                assert_eq!(found, (0..cols).map(value).collect::<Vec<_>>(), "row {row}");
            }
        }
        assert!(Packed::to_fill("w", usize::MAX, 32, 32).is_err());
    }
}
