//! Neuron bundles: what a single neuron of a feed-forward block needs, in one place.
//!
//! Tiles are read from their first byte to their last; where most neurons do nothing, that is mostly in vain. A bundle holds
//! one neuron's row of `up` and its column of `down`, side by side, so that a neuron is read as a whole or not at all:
//!
//! ```text
//! row      chunks of 32 bytes: the low nibbles are 32 columns of `up`, the high ones the next 32
//!          then a scale as f16 for each group, then, of asymmetric matrices, a zero point as u8 for each group
//! column   chunks of 32 bytes: the low nibbles are 32 outputs of `down`, the high ones the next 32
//! ```
//!
//! The scales of `down` belong to outputs and groups of neurons, not to a neuron, and stand apart: for each group 64 f16
//! a chunk, and as many zero points. Codes, scales and zero points are those of the tiles, so kernels that read
//! bundles give the same bits as kernels that read tiles. A matrix whose columns alone may be skipped has bundles without rows.

use super::{Buffer, Layout, Packed, TILE_K, TILE_ROWS};
use crate::error::{Error, Result};
use crate::threads::Pool;

/// Codes in 32 bytes.
pub const CHUNK: usize = 64;

/// How the codes of a matrix become numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Side {
    /// Columns a scale, a multiple of 32.
    pub(crate) group: usize,
    /// Groups of a row.
    pub(crate) groups: usize,
    pub(crate) asymmetric: bool,
    /// What the outputs are multiplied by at the end.
    pub(crate) output_mul: f32,
}

impl Side {
    fn of(matrix: &Packed) -> Self {
        Self {
            group: matrix.group(),
            groups: matrix.cols().div_ceil(matrix.group()),
            asymmetric: matrix.asymmetric(),
            output_mul: matrix.output_mul(),
        }
    }
}

/// The neurons between two 4-bit matrices, or the columns of one.
#[derive(Debug)]
pub struct Bundles {
    neurons: usize,
    inputs: usize,
    outputs: usize,
    row: Option<Side>,
    column: Side,
    /// Bytes of a row's codes.
    row_codes: usize,
    /// Where in a bundle the column begins.
    column_start: usize,
    stride: usize,
    data: Buffer,
    /// Of the columns, by group.
    scales: Buffer,
}

impl Bundles {
    /// Bundles of the rows of `up` with the columns of `down`; of columns alone without `up`.
    pub fn new(up: Option<&Packed>, down: &Packed, pool: &Pool) -> Result<Self> {
        for matrix in up.into_iter().chain([down]) {
            matrix.expect_layout(Layout::W4)?;
        }
        let (neurons, outputs) = (down.cols(), down.rows());
        if let Some(up) = up.filter(|up| up.rows() != neurons) {
            return Err(Error::argument("rows of up", format!("the columns of down, {neurons}"), up.rows()));
        }
        let (row, column) = (up.map(Side::of), Side::of(down));
        let inputs = up.map_or(0, Packed::cols);
        let row_codes = inputs.div_ceil(CHUNK) * CHUNK / 2;
        let facts = row.map_or(0, |row| row.groups * if row.asymmetric { 3 } else { 2 });
        let column_start = row_codes + facts;
        let chunks = outputs.div_ceil(CHUNK);
        // Kernels read up to 16 bytes behind a row's facts.
        let stride = (column_start + (chunks * CHUNK / 2).max(16)).next_multiple_of(64);
        let data = Buffer::build("neuron bundles", neurons, stride, pool, &|n, bundle| {
            if let (Some(up), Some(row)) = (up, row) {
                fill_row(up, row, n, &mut bundle[..column_start]);
            }
            for (o, byte) in bundle[column_start..].iter_mut().take(chunks * CHUNK / 2).enumerate() {
                let first = o / 32 * CHUNK + o % 32;
                let code = |output: usize| if output < outputs { code(down, output, n) } else { 0 };
                *byte = code(first) | code(first + 32) << 4;
            }
        })?;
        let unit = chunks * CHUNK * if column.asymmetric { 3 } else { 2 };
        let scales = Buffer::build("scales of neuron bundles", column.groups, unit, pool, &|g, bytes| {
            let (scales, zeros) = bytes.split_at_mut(2 * chunks * CHUNK);
            for t in 0..down.tiles() {
                let header = header(down, t, g);
                let lanes = TILE_ROWS.min(chunks * CHUNK - t * TILE_ROWS);
                scales[2 * t * TILE_ROWS..][..2 * lanes].copy_from_slice(&header[..2 * lanes]);
                if column.asymmetric {
                    zeros[t * TILE_ROWS..][..lanes].copy_from_slice(&header[2 * TILE_ROWS..][..lanes]);
                }
            }
        })?;
        Ok(Self { neurons, inputs, outputs, row, column, row_codes, column_start, stride, data, scales })
    }

    /// Number of neurons: rows of `up`, columns of `down`.
    pub fn neurons(&self) -> usize {
        self.neurons
    }

    /// Columns of `up`; 0 without it.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Rows of `down`.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Chunks of 64 outputs.
    pub fn chunks(&self) -> usize {
        self.outputs.div_ceil(CHUNK)
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.data.bytes().len() + self.scales.bytes().len()
    }

    /// Bytes of one neuron.
    pub fn bundle_bytes(&self) -> usize {
        self.stride
    }

    pub(crate) fn row_side(&self) -> Option<Side> {
        self.row
    }

    pub(crate) fn column_side(&self) -> Side {
        self.column
    }

    /// The codes of a neuron's row, and behind them its scales and zero points.
    ///
    /// # Panics
    /// When there is no such neuron.
    #[inline]
    pub(crate) fn row(&self, n: usize) -> (&[u8], &[u8]) {
        self.data.bytes()[n * self.stride..][..self.column_start].split_at(self.row_codes)
    }

    /// The codes of a neuron's column.
    ///
    /// # Panics
    /// When there is no such neuron.
    #[inline]
    pub(crate) fn column(&self, n: usize) -> &[u8] {
        &self.data.bytes()[n * self.stride..]
            [self.column_start..self.column_start + self.chunks() * CHUNK / 2]
    }

    /// The scales of a group of the columns, two bytes an output, and the zero points if there are any.
    pub(crate) fn column_scales(&self, g: usize) -> (&[u8], &[u8]) {
        let outputs = self.chunks() * CHUNK;
        let unit = outputs * if self.column.asymmetric { 3 } else { 2 };
        self.scales.bytes()[g * unit..][..unit].split_at(2 * outputs)
    }
}

/// The header of a tile's group.
fn header(matrix: &Packed, t: usize, g: usize) -> &[u8] {
    let step = g * matrix.group() / TILE_K;
    let end = matrix.step_offset(step);
    &matrix.tile_bytes(t)[end - super::header_bytes(matrix.asymmetric())..end]
}

/// One code.
fn code(matrix: &Packed, row: usize, col: usize) -> u8 {
    let step = &matrix.tile_bytes(row / TILE_ROWS)[matrix.step_offset(col / TILE_K)..];
    let (lane, col) = (row % TILE_ROWS, col % TILE_K);
    let byte = step[col / 8 * 64 + lane * 4 + col % 4];
    if col % 8 < 4 { byte & 15 } else { byte >> 4 }
}

fn fill_row(up: &Packed, side: Side, n: usize, part: &mut [u8]) {
    let (codes, facts) = part.split_at_mut(up.cols().div_ceil(CHUNK) * CHUNK / 2);
    for (k, byte) in codes.iter_mut().enumerate() {
        let first = k / 32 * CHUNK + k % 32;
        let code = |col: usize| if col < up.cols() { code(up, n, col) } else { 0 };
        *byte = code(first) | code(first + 32) << 4;
    }
    let lane = n % TILE_ROWS;
    let (scales, zeros) = facts.split_at_mut(2 * side.groups);
    for g in 0..side.groups {
        let header = header(up, n / TILE_ROWS, g);
        scales[2 * g..2 * g + 2].copy_from_slice(&header[2 * lane..2 * lane + 2]);
        if side.asymmetric {
            zeros[g] = header[2 * TILE_ROWS + lane];
        }
    }
}
