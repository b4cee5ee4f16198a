//! Integer tiles: 4- and 8-bit codes with their scales beside them.
//!
//! A weight is `scale * (code - zero)`. A tile holds, for each group of columns in order, a header and the group's steps:
//!
//! ```text
//! header  16 scales as f16, one a row; asymmetric matrices: 16 zero points as u8 after them,
//!         W4 in sixteenths of a code, W8 in codes
//! step    32 columns of 16 rows
//!   W4    4 chunks of 64 bytes; byte 4 r + i of chunk j holds row r, column 8 j + i in its low
//!         and column 8 j + 4 + i in its high nibble                                      (i < 4)
//!   W8    8 chunks of 64 bytes; byte 4 r + i of chunk j holds row r, column 4 j + i,
//!         as a signed byte: the code less 128
//! ```
//!
//! A 64-byte chunk thus has 16 lanes of 32 bits, one a row, and in each lane the four columns that a dot-product instruction
//! multiplies by four activations: those four are the same for all rows, so one broadcast of 32 bits feeds the whole vector,
//! and the 16 results are already apart. Four-bit codes stay unsigned (one AND or one shift with AND unpacks 64 of them); the
//! zero point is subtracted once a group, as `zero * sum(activations)`. Eight-bit codes are signed because AVX2 and NEON
//! multiply those without further work, and one XOR makes them unsigned where that is wanted.
//!
//! A zero point among sixteen codes is a whole number in most formats, for no better reason than that it then fits into four
//! bits. It costs accuracy: the best offset of a group lies up to half a step away from a whole one, which is as much as
//! rounding itself costs. A byte a row has room for the fraction, and a kernel takes it into account for nothing: it keeps its
//! sums in sixteenths too (its last widening multiplies by 16, or the high nibbles are never shifted down), and the outputs
//! are divided by 16 with the matrix's factor.
//!
//! Scales are f16 because that is what checkpoints store. A tensor whose scales f16 cannot hold exactly is multiplied by a
//! power of two that puts its largest scale near the top of f16's range; the outputs are multiplied by the inverse.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use half::f16;

use super::{Buffer, Layout, Packed, TILE_K, TILE_ROWS, grouping};
use crate::error::{Error, Result};
use crate::threads::Pool;

/// Most columns a scale: 65536 products of an 8-bit code and an 8-bit activation still fit into an `i32`.
pub(super) const MAX_GROUP: usize = 65536;

/// The zero point of symmetric codes in the unit of zero points: code 8 of 4 bits in sixteenths, code 128 of 8 bits.
pub(crate) const MIDDLE: i32 = 128;

pub(super) const SCALE_BYTES: usize = 2 * TILE_ROWS;
/// The smallest f16 that is held to full precision, 2^-14.
const SMALLEST_NORMAL: f32 = 6.103_515_6e-5;
/// Steps that are rearranged together: each source row is read 256 (W4) or 512 (W8) bytes at a time, which the hardware
/// prefetcher follows, and what is written stays in the first-level cache.
const BLOCK: usize = 16;

/// Integer weights as the file formats hand them over, row-major.
#[derive(Debug, Clone, Copy)]
pub struct IntSource<'a> {
    /// The tensor's name, for messages.
    pub name: &'a str,
    /// Output rows.
    pub rows: usize,
    /// Input columns.
    pub cols: usize,
    /// 4 or 8.
    pub bits: u32,
    /// Columns a scale: a multiple of 32, or `cols` for one scale a row.
    pub group: usize,
    /// Unsigned codes. 4 bits: column `i` of a row in nibble `i`, low nibble first. 8 bits: one byte a column.
    pub codes: &'a [u8],
    /// Bytes from the start of one row's codes to the next.
    pub row_bytes: usize,
    /// `[rows, groups]`.
    pub scales: &'a [f32],
    /// What stands for 0, `[rows, groups]`, in units of [`Layout::zero_unit`]: 4 bits in sixteenths of a code, 8 bits in
    /// codes. `None` means code 8 or 128 everywhere.
    pub zeros: Option<&'a [u8]>,
    /// Row `r` is row `row_map[r]` of the arrays above.
    pub row_map: Option<&'a [u32]>,
}

impl Layout {
    /// Bytes of a step of 16 rows x 32 columns of integer codes.
    pub(crate) const fn step_bytes(self) -> usize {
        match self {
            Self::W4 => TILE_ROWS * TILE_K / 2,
            _ => TILE_ROWS * TILE_K,
        }
    }

    /// The unit of zero points, in codes: 1/16 for 4 bits, else 1.
    pub const fn zero_unit(self) -> f32 {
        match self {
            Self::W4 => 0.0625,
            _ => 1.0,
        }
    }
}

/// Bytes before the codes of a group.
pub(crate) const fn header_bytes(asymmetric: bool) -> usize {
    if asymmetric { SCALE_BYTES + TILE_ROWS } else { SCALE_BYTES }
}

impl Packed {
    /// Packs integer weights, after checking every shape and value in `src`.
    ///
    /// Runs on the pool's threads and holds nothing but the result; `src.codes` may be a mapped file.
    pub fn from_int(src: &IntSource<'_>, pool: &Pool) -> Result<Self> {
        let plan = Plan::new(src)?;
        let scale_mul = scale_factor(src, plan.groups, pool)?;
        let tiles = src.rows.div_ceil(TILE_ROWS);
        let narrow = AtomicBool::new(plan.layout == Layout::W8 && src.zeros.is_none());
        let data = Buffer::build(src.name, tiles, plan.tile_bytes, pool, &|t, tile| {
            plan.fill(t, tile, 1.0 / scale_mul);
            if narrow.load(Ordering::Relaxed) && !plan.narrow(tile) {
                narrow.store(false, Ordering::Relaxed);
            }
        })?;
        Ok(Self {
            layout: plan.layout,
            rows: src.rows,
            cols: src.cols,
            group: plan.group,
            asymmetric: src.zeros.is_some(),
            narrow: narrow.into_inner(),
            scale_mul,
            tile_bytes: plan.tile_bytes,
            data,
        })
    }

    /// Writes the columns `k` of tile `t`, dequantized, as `[column][16 rows]` into `out`; rows beyond the last are 0.
    ///
    /// `k` starts at a multiple of 32 and ends at one or at the last column. Inlined, so that it is compiled with the vector
    /// instructions of the kernel that calls it.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "the caller's target features are the point")]
    pub(crate) fn dequantize_tile(&self, t: usize, k: Range<usize>, out: &mut [f32]) {
        debug_assert!(k.start.is_multiple_of(TILE_K) && k.end <= self.cols);
        let tile = self.tile_bytes(t);
        let mut scales = [0.0; TILE_ROWS];
        let mut zeros = [0.0; TILE_ROWS];
        let mut group = usize::MAX;
        for (step, out) in (k.start / TILE_K..).zip(out[..k.len() * TILE_ROWS].chunks_mut(TILE_K * TILE_ROWS))
        {
            let g = step * TILE_K / self.group;
            if g != group {
                group = g;
                (scales, zeros) = self.group_values(tile, g);
            }
            let codes = &tile[self.step_offset(step)..][..self.layout.step_bytes()];
            if self.layout == Layout::W4 {
                for (chunk, out) in codes.chunks_exact(64).zip(out.chunks_mut(8 * TILE_ROWS)) {
                    let lanes = lanes(chunk);
                    for (i, out) in out.chunks_exact_mut(TILE_ROWS).enumerate() {
                        let shift = 8 * (i % 4) + i / 4 * 4;
                        for r in 0..TILE_ROWS {
                            let code = (lanes[r] >> shift & 15) as f32;
                            out[r] = (code - zeros[r]) * scales[r];
                        }
                    }
                }
            } else {
                for (chunk, out) in codes.chunks_exact(64).zip(out.chunks_mut(4 * TILE_ROWS)) {
                    let lanes = lanes(chunk);
                    for (i, out) in out.chunks_exact_mut(TILE_ROWS).enumerate() {
                        for r in 0..TILE_ROWS {
                            let code = (lanes[r] >> (8 * i) & 255 ^ 128) as f32;
                            out[r] = (code - zeros[r]) * scales[r];
                        }
                    }
                }
            }
        }
    }

    /// One row of an integer tile, dequantized; the arithmetic of [`Packed::dequantize_tile`].
    pub(super) fn int_row(&self, tile: &[u8], lane: usize, out: &mut [f32]) {
        for (g, out) in out.chunks_mut(self.group).enumerate() {
            let (scales, zeros) = self.group_values(tile, g);
            for (i, value) in out.iter_mut().enumerate() {
                let column = i % TILE_K;
                let step = &tile[self.step_offset((g * self.group + i) / TILE_K)..];
                let code = if self.layout == Layout::W4 {
                    let byte = step[column / 8 * 64 + lane * 4 + column % 4];
                    if column % 8 < 4 { byte & 15 } else { byte >> 4 }
                } else {
                    step[column / 4 * 64 + lane * 4 + column % 4] ^ 128
                };
                *value = (f32::from(code) - zeros[lane]) * scales[lane];
            }
        }
    }

    /// Where a step's codes start in a tile.
    pub(super) fn step_offset(&self, step: usize) -> usize {
        let groups = step * TILE_K / self.group + 1;
        groups * header_bytes(self.asymmetric) + step * self.layout.step_bytes()
    }

    /// The scales, with the matrix's factor, and the zero points of group `g`, in codes. Codes less zero points are exact.
    fn group_values(&self, tile: &[u8], g: usize) -> ([f32; TILE_ROWS], [f32; TILE_ROWS]) {
        let header = self.step_offset(g * self.group / TILE_K) - header_bytes(self.asymmetric);
        let (scales, zeros) = group_header(&tile[header..], self.asymmetric);
        let unit = self.layout.zero_unit();
        (scales.map(|scale| scale * self.scale_mul), zeros.map(|zero| zero as f32 * unit))
    }

    /// What the outputs of an integer kernel, which are in the unit of zero points, are multiplied by.
    pub(crate) fn output_mul(&self) -> f32 {
        self.scale_mul * self.layout.zero_unit()
    }
}

/// The scales and the zero points, in their unit, in the header at the start of `group`.
pub(crate) fn group_header(group: &[u8], asymmetric: bool) -> ([f32; TILE_ROWS], [i32; TILE_ROWS]) {
    let (scales, zeros) = group[..header_bytes(asymmetric)].split_at(SCALE_BYTES);
    let scales = std::array::from_fn(|r| f16::from_le_bytes([scales[2 * r], scales[2 * r + 1]]).to_f32());
    (scales, if asymmetric { std::array::from_fn(|r| i32::from(zeros[r])) } else { [MIDDLE; TILE_ROWS] })
}

/// The sixteen 32-bit lanes of a chunk.
#[inline(always)]
#[expect(clippy::inline_always, reason = "as `dequantize_tile`")]
fn lanes(chunk: &[u8]) -> [u32; TILE_ROWS] {
    std::array::from_fn(|r| {
        u32::from_le_bytes([chunk[4 * r], chunk[4 * r + 1], chunk[4 * r + 2], chunk[4 * r + 3]])
    })
}

/// A checked source and the geometry of its tiles.
struct Plan<'a> {
    src: &'a IntSource<'a>,
    layout: Layout,
    group: usize,
    groups: usize,
    steps: usize,
    tile_bytes: usize,
}

impl<'a> Plan<'a> {
    fn new(src: &'a IntSource<'a>) -> Result<Self> {
        let wrong = |expected: String, found: String| Err(Error::argument(src.name, expected, found));
        let layout = match src.bits {
            4 => Layout::W4,
            8 => Layout::W8,
            bits => return wrong("4 or 8 bits a weight".into(), format!("{bits}")),
        };
        let (group, groups) = grouping(src.name, src.cols, src.group)?;
        let source_rows = src.scales.len() / groups;
        if !src.scales.len().is_multiple_of(groups) || (src.row_map.is_none() && source_rows != src.rows) {
            return wrong(
                format!("{} rows x {groups} scales", src.rows),
                format!("{} scales", src.scales.len()),
            );
        }
        if let Some(zeros) = src.zeros
            && zeros.len() != src.scales.len()
        {
            return wrong(format!("{} zero points", src.scales.len()), format!("{}", zeros.len()));
        }
        if let Some(map) = src.row_map {
            if map.len() != src.rows {
                return wrong(format!("a map of {} rows", src.rows), format!("{}", map.len()));
            }
            if let Some(row) = map.iter().find(|&&row| row as usize >= source_rows) {
                return wrong(format!("a map into {source_rows} rows"), format!("row {row}"));
            }
        }
        let used = if layout == Layout::W4 { src.cols.div_ceil(2) } else { src.cols };
        if src.row_bytes < used {
            return wrong(format!("at least {used} bytes a row"), format!("{}", src.row_bytes));
        }
        let need = if source_rows == 0 {
            Some(0)
        } else {
            (source_rows - 1).checked_mul(src.row_bytes).and_then(|n| n.checked_add(used))
        };
        if need.is_none_or(|need| src.codes.len() < need) {
            return wrong(
                format!("{source_rows} rows of {} bytes", src.row_bytes),
                format!("{} bytes", src.codes.len()),
            );
        }
        let steps = src.cols.div_ceil(TILE_K);
        let tile_bytes = steps
            .checked_mul(layout.step_bytes())
            .and_then(|n| n.checked_add(groups.checked_mul(header_bytes(src.zeros.is_some()))?));
        match tile_bytes {
            Some(tile_bytes) => Ok(Self { src, layout, group, groups, steps, tile_bytes }),
            None => wrong("fewer columns".into(), format!("{}", src.cols)),
        }
    }

    /// The row of the source that becomes row `r`.
    fn source_row(&self, r: usize) -> usize {
        self.src.row_map.map_or(r, |map| map[r] as usize)
    }

    /// Writes tile `t`, which is all zeros before.
    fn fill(&self, t: usize, tile: &mut [u8], unscale: f32) {
        let asymmetric = self.src.zeros.is_some();
        let (header, step_bytes) = (header_bytes(asymmetric), self.layout.step_bytes());
        let group_steps = self.group / TILE_K;
        let rows: [Option<usize>; TILE_ROWS] = std::array::from_fn(|r| {
            let row = t * TILE_ROWS + r;
            (row < self.src.rows).then(|| self.source_row(row))
        });
        for first in (0..self.steps).step_by(BLOCK) {
            let steps = first..(first + BLOCK).min(self.steps);
            let mut offsets = [0; BLOCK];
            for (offset, step) in offsets.iter_mut().zip(steps.clone()) {
                let g = step / group_steps;
                *offset = (g + 1) * header + step * step_bytes;
                if step.is_multiple_of(group_steps) {
                    let (scales, zeros) = tile[*offset - header..*offset].split_at_mut(SCALE_BYTES);
                    for (r, row) in rows.iter().enumerate() {
                        let Some(row) = row else { continue };
                        let at = row * self.groups + g;
                        scales[2 * r..2 * r + 2]
                            .copy_from_slice(&half_bits(self.src.scales[at] * unscale).to_le_bytes());
                        if let Some(source) = self.src.zeros {
                            zeros[r] = source[at];
                        }
                    }
                }
            }
            for (r, row) in rows.iter().enumerate() {
                if let Some(row) = *row {
                    self.fill_row(tile, r, row, steps.clone(), &offsets);
                }
            }
        }
    }

    /// Whether all signed bytes of a tile lie in -64 ..= 63.
    fn narrow(&self, tile: &[u8]) -> bool {
        let header = header_bytes(false);
        let groups = tile.chunks(header + self.group / TILE_K * self.layout.step_bytes());
        let wide = |codes: &[u8]| codes.iter().fold(0, |seen, code| seen | code.wrapping_add(64)) & 128 != 0;
        groups.map(|group| &group[header..]).all(|codes| !wide(codes))
    }

    /// Writes lane `r` of the steps `steps` of a tile, which start at `offsets`, from row `row` of the source.
    fn fill_row(&self, tile: &mut [u8], r: usize, row: usize, steps: Range<usize>, offsets: &[usize; BLOCK]) {
        let width = if self.layout == Layout::W4 { TILE_K / 2 } else { TILE_K };
        let codes = &self.src.codes[row * self.src.row_bytes..];
        let whole = if self.layout == Layout::W4 { self.src.cols / 2 } else { self.src.cols } / width;
        let tail = steps.end > whole;
        let source = &codes[steps.start * width..];
        let place = match self.layout {
            Layout::W4 => place_w4,
            _ => place_w8,
        };
        for (source, offset) in source.chunks_exact(width).zip(offsets).take(steps.len() - usize::from(tail))
        {
            place(&mut tile[*offset..], r, source);
        }
        if tail {
            // Behind the last column stand activations of 0, so any code will do there; the middle one is never too wide.
            let mut last = [128; TILE_K];
            let left = self.src.cols - whole * TILE_K;
            let rest = &codes[whole * width..];
            let bytes = if self.layout == Layout::W4 { left.div_ceil(2) } else { left };
            last[..bytes].copy_from_slice(&rest[..bytes]);
            place(&mut tile[offsets[steps.len() - 1]..], r, &last[..width]);
        }
    }
}

/// Writes 32 four-bit codes of row `r` into a step.
#[inline]
fn place_w4(step: &mut [u8], r: usize, source: &[u8]) {
    let step = &mut step[..Layout::W4.step_bytes()];
    for (eight, chunks) in source.chunks_exact(8).zip(step.chunks_exact_mut(128)) {
        let x = u64::from_le_bytes(eight.try_into().expect("chunks of eight"));
        // Two chunks at once, one in each half: nibbles 0..4 become the low nibbles of four bytes, 4..8 the high ones.
        let spread = |x: u64| {
            let x = (x | x << 8) & 0x00ff_00ff_00ff_00ff;
            (x | x << 4) & 0x0f0f_0f0f_0f0f_0f0f
        };
        let y = spread(x & 0x0000_ffff_0000_ffff) | spread(x >> 16 & 0x0000_ffff_0000_ffff) << 4;
        chunks[4 * r..4 * r + 4].copy_from_slice(&(y as u32).to_le_bytes());
        chunks[64 + 4 * r..68 + 4 * r].copy_from_slice(&((y >> 32) as u32).to_le_bytes());
    }
}

/// Writes 32 eight-bit codes of row `r` into a step.
#[inline]
fn place_w8(step: &mut [u8], r: usize, source: &[u8]) {
    let step = &mut step[..Layout::W8.step_bytes()];
    for (four, chunk) in source.chunks_exact(4).zip(step.chunks_exact_mut(64)) {
        let x = u32::from_le_bytes(four.try_into().expect("chunks of four")) ^ 0x8080_8080;
        chunk[4 * r..4 * r + 4].copy_from_slice(&x.to_le_bytes());
    }
}

/// `value` rounded to f16. Most scales were f16 before: those need no rounding, only a shift.
#[inline]
fn half_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    if bits.trailing_zeros() >= 13 && (0x3880_0000..0x4780_0000).contains(&bits) {
        ((bits - 0x3800_0000) >> 13) as u16
    } else {
        f16::from_f32(value.abs()).to_bits()
    }
}

/// Checks the scales and finds the power of two `m` such that `scale / m` is stored: 1 when f16 holds them all exactly.
fn scale_factor(src: &IntSource<'_>, groups: usize, pool: &Pool) -> Result<f32> {
    // Non-negative floats compare as their bits do; everything wrong (NaN, infinite, negative) compares above them.
    let (largest, smallest, low) = (AtomicU32::new(0), AtomicU32::new(u32::MAX), AtomicU32::new(0));
    pool.split(src.scales.len(), 64, &|range| {
        let (mut top, mut bottom, mut ored) = (0, u32::MAX, 0);
        for scale in &src.scales[range] {
            let bits = scale.to_bits();
            top = top.max(bits);
            bottom = bottom.min(bits.wrapping_sub(1)); // a scale of 0 must not count
            ored |= bits;
        }
        largest.fetch_max(top, Ordering::Relaxed);
        smallest.fetch_min(bottom, Ordering::Relaxed);
        low.fetch_or(ored, Ordering::Relaxed);
    });
    let mut largest = f32::from_bits(largest.into_inner());
    let smallest = f32::from_bits(smallest.into_inner().wrapping_add(1));
    if !(largest.is_finite() && largest.is_sign_positive()) {
        if let Some(at) = src.scales.iter().position(|s| !(s.is_finite() && *s >= 0.0)) {
            return Err(Error::argument(
                src.name,
                "finite scales, none negative",
                format!("{} for row {}, group {}", src.scales[at], at / groups, at % groups),
            ));
        }
        largest = src.scales.iter().fold(0.0, |a, &b| a.max(b)); // only some zeros had a sign
    }
    let normal = low.into_inner().trailing_zeros() >= 13 && largest <= 65504.0 && smallest >= SMALLEST_NORMAL;
    let exact = |s: &f32| f16::from_f32(*s).to_f32().to_bits() == s.to_bits();
    if largest == 0.0 || normal || src.scales.iter().all(exact) {
        return Ok(1.0);
    }
    // The largest scale goes to 2^14 .. 2^15; with subnormal f32 scales as far up as a normal factor reaches.
    let exponent = (largest.to_bits() >> 23) as i32 - 127;
    Ok(f32::from_bits((((exponent - 14).clamp(-126, 126) + 127) as u32) << 23))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_dequantizes_to_its_rows() {
        let pool = Pool::new(1).expect("a pool");
        for (bits, cols, group) in [(4, 100usize, 100), (4, 96, 32), (8, 65, 64), (8, 31, 31)] {
            for zeros in [None, Some(vec![53; 18 * 4])] {
                let codes: Vec<u8> = (0..18 * cols).map(|i| (i * 89 % 251) as u8).collect();
                let groups = cols.div_ceil(group);
                let scales: Vec<f32> = (0..18 * groups).map(|i| (i + 1) as f32 / 3.0).collect();
                let source = IntSource {
                    name: "w",
                    rows: 18,
                    cols,
                    bits,
                    group,
                    codes: &codes,
                    row_bytes: cols,
                    scales: &scales,
                    zeros: zeros.as_ref().map(|zeros| &zeros[..18 * groups]),
                    row_map: None,
                };
                let packed = Packed::from_int(&source, &pool).expect("good weights");
                let mut row = vec![0.0; cols];
                for t in 0..2 {
                    for k in [0..cols, 0..32.min(cols), cols / 32 * 32..cols] {
                        let mut tile = vec![f32::NAN; k.len() * TILE_ROWS];
                        packed.dequantize_tile(t, k.clone(), &mut tile);
                        for lane in 0..TILE_ROWS {
                            row.fill(0.0);
                            if t * TILE_ROWS + lane < 18 {
                                packed.row(t * TILE_ROWS + lane, &mut row).expect("a row");
                            }
                            let column: Vec<f32> =
                                tile.iter().skip(lane).step_by(TILE_ROWS).copied().collect();
                            assert_eq!(column, row[k.clone()], "{bits} bits, tile {t}, lane {lane}, {k:?}");
                        }
                    }
                }
            }
        }
    }
}
