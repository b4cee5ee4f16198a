//! Packed weights: one layout for all kernels of an operation.
//!
//! A linear layer's matrix `[rows, cols]` is read far more often than it is written, so it is rearranged once, when a model
//! is opened, into the order in which the kernels read it. The unit is a *tile*: [`TILE_ROWS`] output rows over all
//! columns, in steps of [`TILE_K`] columns. A kernel keeps one lane of a vector for each of the 16 rows, so it never adds
//! across lanes, and it walks a tile from its first byte to its last, which is what memory is fastest at.
//!
//! Integer tiles (`int.rs`) carry their scales and zero points beside the codes; float tiles (`float.rs`) hold the elements
//! in `[column][16 rows]` order. The last tile of a matrix is padded to 16 rows and the last step to 32 columns; padding
//! contributes exactly 0.
//!
//! The same bytes serve every instruction set. A [`Packed`] remembers its [`Layout`], and handing it to a kernel of another
//! one is an error, not a wrong answer.

mod buffer;
mod bundles;
mod codes;
mod float;
mod int;

use half::{bf16, f16};

pub(crate) use buffer::Buffer;
pub(crate) use bundles::Side;
pub use bundles::{Bundles, CHUNK};
pub(crate) use codes::LARGEST;
pub use int::IntSource;
pub(crate) use int::{MIDDLE, group_header, header_bytes};

use crate::error::{Error, Result};

/// Output rows of a tile.
pub const TILE_ROWS: usize = 16;

/// Columns of a step inside a tile; groups and padded columns are multiples of it.
pub const TILE_K: usize = 32;

/// How the elements of a packed matrix are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Layout {
    /// 4-bit codes with a scale a group.
    W4,
    /// 8-bit codes with a scale a group.
    W8,
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
}

impl Layout {
    /// The name used in messages and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::W4 => "w4",
            Self::W8 => "w8",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// One matrix `[rows, cols]` in tiles.
#[derive(Debug)]
pub struct Packed {
    layout: Layout,
    rows: usize,
    cols: usize,
    /// Columns a scale, a multiple of [`TILE_K`]; 0 for float layouts.
    group: usize,
    asymmetric: bool,
    narrow: bool,
    /// A power of two that multiplies every scale.
    scale_mul: f32,
    tile_bytes: usize,
    data: Buffer,
}

impl Packed {
    /// A float matrix whose tiles, `tile_bytes` each, are in `data`.
    pub(crate) fn from_float_tiles(
        layout: Layout,
        rows: usize,
        cols: usize,
        tile_bytes: usize,
        data: Buffer,
    ) -> Self {
        debug_assert_eq!(data.bytes().len(), rows.div_ceil(TILE_ROWS) * tile_bytes);
        Self {
            layout,
            rows,
            cols,
            group: 0,
            asymmetric: false,
            narrow: false,
            scale_mul: 1.0,
            tile_bytes,
            data,
        }
    }

    /// How the elements are stored.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Output rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Inputs per scale: a multiple of 32; for one scale a row, the columns rounded up to 32; for float layouts 0.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.data.bytes().len()
    }

    /// An error unless the layout is `expected`.
    pub fn expect_layout(&self, expected: Layout) -> Result<()> {
        if self.layout == expected {
            return Ok(());
        }
        Err(Error::Layout { expected: expected.name(), found: self.layout.name() })
    }

    /// The bytes of tile `t`.
    ///
    /// # Panics
    /// When there is no such tile.
    pub(crate) fn tile_bytes(&self, t: usize) -> &[u8] {
        &self.data.bytes()[t * self.tile_bytes..][..self.tile_bytes]
    }

    /// Whether these are symmetric 8-bit codes of which none is further than 64 from the middle: codes of 7 bits. Two of
    /// their products with 8-bit activations, four with 7-bit ones, can be added up in 16 bits.
    pub fn narrow(&self) -> bool {
        self.narrow
    }

    /// Whether integer tiles carry zero points.
    pub(crate) fn asymmetric(&self) -> bool {
        self.asymmetric
    }

    /// The power of two that multiplies every output of an integer matmul.
    pub(crate) fn scale_mul(&self) -> f32 {
        self.scale_mul
    }

    /// Writes row `r`, dequantized, into `out`.
    pub fn row(&self, r: usize, out: &mut [f32]) -> Result<()> {
        if r >= self.rows {
            return Err(Error::argument("row", format!("less than {}", self.rows), r));
        }
        if out.len() != self.cols {
            return Err(Error::argument("row buffer", format!("{} values", self.cols), out.len()));
        }
        let tile = self.tile_bytes(r / TILE_ROWS);
        let lane = r % TILE_ROWS;
        match self.layout {
            Layout::W4 | Layout::W8 => self.int_row(tile, lane, out),
            Layout::F32 => {
                for (value, bytes) in out.iter_mut().zip(tile.chunks_exact(4).skip(lane).step_by(TILE_ROWS)) {
                    *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
            }
            Layout::F16 | Layout::Bf16 => {
                for (value, bytes) in out.iter_mut().zip(tile.chunks_exact(2).skip(lane).step_by(TILE_ROWS)) {
                    let bits = u16::from_le_bytes([bytes[0], bytes[1]]);
                    *value = match self.layout {
                        Layout::F16 => f16::from_bits(bits).to_f32(),
                        _ => bf16::from_bits(bits).to_f32(),
                    };
                }
            }
        }
        Ok(())
    }
}

/// The group really used for `cols` columns when `group` is asked for, and the number of groups in a row.
///
/// A group is a multiple of [`TILE_K`]; `group == cols`, or more, means one group a row. The last group may be shorter.
pub(crate) fn grouping(name: &str, cols: usize, group: usize) -> Result<(usize, usize)> {
    let wrong = |expected: &str, found: usize| Err(Error::argument(name, expected, found));
    if cols == 0 {
        return wrong("at least one column", cols);
    }
    if group == 0 || (group < cols && !group.is_multiple_of(TILE_K)) {
        return wrong("groups of a multiple of 32 columns, or one group a row", group);
    }
    let Some(padded) = cols.checked_next_multiple_of(TILE_K) else {
        return wrong("fewer columns", cols);
    };
    let group = if group >= cols { padded } else { group };
    if group > int::MAX_GROUP {
        return wrong("at most 65536 columns a scale", group);
    }
    Ok((group, padded.div_ceil(group)))
}
