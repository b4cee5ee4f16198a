//! Float activations to integers of 8, 7 or 4 bits, as the integer matmuls read them.
//!
//! A group of `group` neighbouring values of one row (or a whole row) shares a scale, `max|x| / 127` (with 7
//! bits `/ 63`, with 4 `/ 7`), and each value becomes the nearest integer to `x / scale`, halves to even. Symmetric codes need no zero
//! point, and their sum, kept beside the scale, is all a matmul needs to take the weights' zero points into account. Codes of
//! 4 bits take a byte each like the others: no CPU multiplies anything smaller.
//!
//! The scale may instead be given, found beforehand on calibration data; values beyond its range are cut off.
//!
//! Two kinds of group have no usable scale. Values so small that the scale would be subnormal (below about 1e-36) become
//! zeros with scale 0. A group with a NaN or an infinity becomes zeros with scale NaN, so that the outputs show it.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
mod scalar;

use super::Columns;
use crate::cpu::Isa;
use crate::error::{Error, Result};
use crate::pack::{TILE_K, grouping};
use crate::threads::Pool;

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Granularity {
    /// All values of a row; its scale is repeated for every group.
    Token,
    /// The values of a group.
    Group,
    /// All values of all rows: this scale.
    Tensor(f32),
}

/// How values become integers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rounding {
    /// 8, 7 or 4.
    pub bits: u32,
    /// What shares a scale.
    pub per: Granularity,
}

impl Rounding {
    /// The largest code; the smallest is its negative.
    pub const fn largest(self) -> i8 {
        match self.bits {
            4 => 7,
            7 => 63,
            _ => 127,
        }
    }

    /// The same with 4 bits and the same range of values; [`Activations::quantize_source`] has codes of both in one matrix.
    #[must_use]
    pub fn narrowed(self) -> Self {
        let per = match self.per {
            Granularity::Tensor(scale) => {
                Granularity::Tensor(scale * (f32::from(self.largest()) / f32::from(Self::NARROW.largest())))
            }
            per @ (Granularity::Token | Granularity::Group) => per,
        };
        Self { per, ..Self::NARROW }
    }

    const NARROW: Self = Self { bits: 4, per: Granularity::Token };

    fn check(self) -> Result<()> {
        if !matches!(self.bits, 4 | 7 | 8) {
            return Err(Error::argument("bits of activations", "4, 7 or 8", self.bits));
        }
        match self.per {
            Granularity::Tensor(scale) if !(scale >= f32::MIN_POSITIVE && scale.is_finite()) => {
                Err(Error::argument("scale of activations", "a positive normal number", scale))
            }
            _ => Ok(()),
        }
    }
}

/// Rows of integer activations with their scales and sums; the buffers are reused from call to call.
#[derive(Debug, Default)]
pub struct Activations {
    rows: usize,
    cols: usize,
    group: usize,
    groups: usize,
    bits: u32,
    /// Columns rounded up to 32.
    stride: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
}

/// All rows of an [`Activations`], to be written.
pub(crate) struct RowsMut<'a> {
    /// `[rows, stride]`.
    pub(crate) codes: &'a mut [i8],
    /// Columns rounded up to 32.
    pub(crate) stride: usize,
    /// `[rows, groups]`.
    pub(crate) scales: &'a mut [f32],
    /// `[rows, groups]`.
    pub(crate) sums: &'a mut [i32],
    /// Groups of a row.
    pub(crate) groups: usize,
}

impl RowsMut<'_> {
    /// Row `r`.
    pub(crate) fn row(&mut self, r: usize) -> Row<'_> {
        let groups = r * self.groups..(r + 1) * self.groups;
        Row {
            codes: &mut self.codes[r * self.stride..][..self.stride],
            scales: &mut self.scales[groups.clone()],
            sums: &mut self.sums[groups],
        }
    }
}

/// One row's parts of an [`Activations`], to be written.
#[derive(Debug)]
pub struct Row<'a> {
    /// The codes, with zeros after the last column.
    pub codes: &'a mut [i8],
    /// One scale a group.
    pub scales: &'a mut [f32],
    /// The sum of the codes of each group.
    pub sums: &'a mut [i32],
}

/// An implementation of the conversion.
pub trait Quantize: Sync {
    /// The tier.
    fn isa(&self) -> Isa;

    /// Converts one row `x` in groups of `group` columns.
    fn row(&self, x: &[f32], group: usize, rounding: Rounding, out: Row<'_>);
}

/// All implementations this CPU allows, lowest tier first.
pub fn kernels() -> Vec<&'static dyn Quantize> {
    let all: &[Option<&'static dyn Quantize>] = &[
        Some(&scalar::Scalar),
        #[cfg(target_arch = "x86_64")]
        avx2::kernel(),
        #[cfg(target_arch = "x86_64")]
        avx512vnni::kernel(),
    ];
    all.iter().copied().flatten().collect()
}

/// Elements below which a second thread costs more than it saves.
const SERIAL: usize = 1 << 15;

/// Writes a row, given its number.
pub type Compute<'a> = &'a (dyn Fn(usize, &mut [f32]) + Sync);

/// The rows to convert, `[rows, cols]`.
pub enum Source<'a> {
    /// Rows that are there.
    Given(&'a [f32]),
    /// Rows that are computed when they are asked for, each by the thread that goes on with it, so that it is still in that
    /// thread's cache: a norm, for example.
    Computed {
        /// Where they are written.
        rows: &'a mut [f32],
        /// What writes them.
        compute: Compute<'a>,
    },
}

impl std::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let given = matches!(self, Self::Given(_));
        f.debug_struct("Source").field("given", &given).field("len", &self.len()).finish()
    }
}

impl<'a> Source<'a> {
    /// Values in all rows.
    fn len(&self) -> usize {
        match self {
            Self::Given(rows) => rows.len(),
            Self::Computed { rows, .. } => rows.len(),
        }
    }

    /// All rows of `cols` values, computed if they were not yet.
    pub fn rows(&mut self, pool: &Pool, cols: usize) -> &'a [f32] {
        let count = self.len() / cols.max(1);
        self.visit(pool, count, cols, &|_, _| {});
        match self {
            Self::Given(rows) => rows,
            Self::Computed { .. } => unreachable!("what was visited is there"),
        }
    }

    /// Calls `then` for every row, on the pool's threads if there is much to do; afterwards the rows are there.
    fn visit(&mut self, pool: &Pool, rows: usize, cols: usize, then: &(dyn Fn(usize, &[f32]) + Sync)) {
        assert_eq!(self.len(), rows * cols, "values of all rows");
        let split = |each: &(dyn Fn(usize) + Sync)| {
            if rows * cols < SERIAL {
                (0..rows).for_each(each);
            } else {
                pool.split(rows, 1, &|range| range.for_each(each));
            }
        };
        match std::mem::replace(self, Self::Given(&[])) {
            Self::Given(all) => {
                *self = Self::Given(all);
                split(&|r| then(r, &all[r * cols..][..cols]));
            }
            Self::Computed { rows: all, compute } => {
                let columns = Columns::new(all, rows, cols, 0, cols);
                split(&|r| {
                    // SAFETY: every row is visited once, by one thread.
                    let row = unsafe { columns.row(r, 0, cols) };
                    compute(r, row);
                    then(r, row);
                });
                *self = Self::Given(all);
            }
        }
    }
}

/// The starts of the three buffers, shared by the threads that fill rows of them.
struct Bases {
    codes: *mut i8,
    scales: *mut f32,
    sums: *mut i32,
}

// SAFETY: every thread writes its own rows.
unsafe impl Sync for Bases {}

impl Bases {
    /// # Safety
    /// Row `r` exists, and no other `Row` of it is alive.
    unsafe fn row<'a>(&self, r: usize, stride: usize, groups: usize) -> Row<'a> {
        // SAFETY: rows do not overlap and this one exists, says the caller.
        unsafe {
            Row {
                codes: std::slice::from_raw_parts_mut(self.codes.add(r * stride), stride),
                scales: std::slice::from_raw_parts_mut(self.scales.add(r * groups), groups),
                sums: std::slice::from_raw_parts_mut(self.sums.add(r * groups), groups),
            }
        }
    }
}

impl Activations {
    /// No rows yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the contents with `x`, `[rows, cols]`, in groups of `group` columns: a multiple of 32, or `cols`.
    #[expect(clippy::too_many_arguments, reason = "a matrix is three of them")]
    pub fn quantize(
        &mut self,
        pool: &Pool,
        kernel: &dyn Quantize,
        x: &[f32],
        rows: usize,
        cols: usize,
        group: usize,
        rounding: Rounding,
    ) -> Result<()> {
        self.quantize_source(pool, kernel, &mut Source::Given(x), rows, cols, group, rounding, &[])
    }

    /// As [`Activations::quantize`], of rows that may have to be computed first; and the rows that `low` says so of have codes
    /// of 4 bits, -7 to 7, in the same range of values. Nothing that reads the codes sees a difference: those of 4 bits are
    /// codes of 8 bits, too. `low` is empty or has a flag for every row.
    #[expect(clippy::too_many_arguments, reason = "a matrix is three of them")]
    pub fn quantize_source(
        &mut self,
        pool: &Pool,
        kernel: &dyn Quantize,
        source: &mut Source<'_>,
        rows: usize,
        cols: usize,
        group: usize,
        rounding: Rounding,
        low: &[bool],
    ) -> Result<()> {
        rounding.check()?;
        let narrowed = rounding.narrowed();
        narrowed.check()?;
        if !low.is_empty() && low.len() != rows {
            return Err(Error::argument("rows of 4 bits", format!("{rows} flags or none"), low.len()));
        }
        let (group, groups) = grouping("activations", cols, group)?;
        if rows.checked_mul(cols) != Some(source.len()) {
            return Err(Error::argument("activations", format!("{rows} x {cols} values"), source.len()));
        }
        let stride = cols.next_multiple_of(TILE_K);
        (self.rows, self.cols, self.group, self.groups, self.stride) = (rows, cols, group, groups, stride);
        self.bits = rounding.bits;
        self.codes.resize(rows * stride, 0);
        self.scales.resize(rows * groups, 0.0);
        self.sums.resize(rows * groups, 0);
        let bases = Bases {
            codes: self.codes.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
        };
        let bases = &bases;
        source.visit(pool, rows, cols, &|r, x| {
            // SAFETY: the buffers were just given `rows` rows, and each is visited once.
            let out = unsafe { bases.row(r, stride, groups) };
            let rounding = if low.get(r) == Some(&true) { narrowed } else { rounding };
            kernel.row(x, group, rounding, out);
        });
        Ok(())
    }

    /// Room for rows whose codes, of at most `bits` bits, do not come from floats as [`Activations::quantize`] takes them. Whoever
    /// asks writes all of them, zeros behind the last column included. `grouping` are the columns of a group and the groups.
    pub(crate) fn make_room(
        &mut self,
        rows: usize,
        cols: usize,
        (group, groups): (usize, usize),
        bits: u32,
    ) -> RowsMut<'_> {
        let stride = cols.next_multiple_of(TILE_K);
        (self.rows, self.cols, self.group, self.groups, self.stride) = (rows, cols, group, groups, stride);
        self.bits = bits;
        self.codes.resize(rows * stride, 0);
        self.scales.resize(rows * groups, 0.0);
        self.sums.resize(rows * groups, 0);
        let Self { codes, scales, sums, .. } = self;
        RowsMut { codes, stride, scales, sums, groups }
    }

    /// Bytes of memory held.
    pub(crate) fn bytes(&self) -> usize {
        self.codes.capacity() + 4 * (self.scales.capacity() + self.sums.capacity())
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Columns per scale: a multiple of 32; for one group a row, the columns rounded up to 32.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Bits of a code: 8, 7 for codes from -63 to 63, or 4 for codes from -7 to 7. Of more than 4 some rows may use 4 only.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Number of groups in a row.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// The codes of row `r`, followed by zeros up to a multiple of 32.
    pub fn codes(&self, r: usize) -> &[i8] {
        &self.codes[r * self.stride..][..self.stride]
    }

    /// The scales of row `r`, one a group.
    pub fn scales(&self, r: usize) -> &[f32] {
        &self.scales[r * self.groups..][..self.groups]
    }

    /// The sums of the codes of row `r`, one a group.
    pub fn sums(&self, r: usize) -> &[i32] {
        &self.sums[r * self.groups..][..self.groups]
    }

    /// The rows `first .. first + count` as the matmul kernels take them.
    pub(crate) fn block(&self, first: usize, count: usize) -> super::tiles::Rows<'_> {
        super::tiles::Rows {
            codes: &self.codes[first * self.stride..][..count * self.stride],
            stride: self.stride,
            scales: &self.scales[first * self.groups..][..count * self.groups],
            sums: &self.sums[first * self.groups..][..count * self.groups],
            groups: self.groups,
            bits: self.bits,
        }
    }
}

/// 32 neighbouring values; the last ones of a row are followed by zeros.
type Block<T> = [T; TILE_K];

/// The part of the conversion that is the same in every tier.
///
/// `largest` gives the bits of the largest magnitude, as an integer: non-negative floats compare as their bits do, and NaN
/// and infinity compare above all numbers. `encode` writes the codes and returns their sum. Inlined into the tier's own
/// function, so that it is compiled with the tier's instructions.
#[inline(always)]
#[expect(clippy::inline_always, reason = "the caller's target features are the point")]
fn convert(
    x: &[f32],
    group: usize,
    rounding: Rounding,
    out: Row<'_>,
    largest: impl Fn(&[Block<f32>]) -> u32,
    encode: impl Fn(&[Block<f32>], f32, &mut [Block<i8>]) -> i32,
) {
    let magnitude = |x: &[f32]| {
        let (blocks, tail) = x.as_chunks();
        let top = largest(blocks);
        if tail.is_empty() { top } else { top.max(largest(&[padded(tail)])) }
    };
    let levels = f32::from(rounding.largest());
    let row = match rounding.per {
        Granularity::Token => Some(magnitude(x)),
        Granularity::Group | Granularity::Tensor(_) => None,
    };
    let groups = x.chunks(group).zip(out.codes.chunks_mut(group)).zip(out.scales).zip(out.sums);
    for (((x, codes), scale), sum) in groups {
        let top = f32::from_bits(row.unwrap_or_else(|| magnitude(x)));
        let usable = top >= levels * f32::MIN_POSITIVE || matches!(rounding.per, Granularity::Tensor(_));
        if !(usable && top.is_finite()) {
            *scale = if top.is_finite() { 0.0 } else { f32::NAN };
            *sum = 0;
            codes.fill(0);
            continue;
        }
        let (blocks, tail) = x.as_chunks();
        let (codes, rest) = codes.as_chunks_mut().0.split_at_mut(blocks.len());
        if let Granularity::Tensor(given) = rounding.per {
            *scale = given;
            let (inverse, most) = (1.0 / given, given * levels);
            let clamped = |x: &Block<f32>, codes| encode(&[x.map(|v| v.clamp(-most, most))], inverse, codes);
            *sum = blocks.iter().zip(codes.chunks_mut(1)).map(|(x, codes)| clamped(x, codes)).sum();
            if !tail.is_empty() {
                *sum += clamped(&padded(tail), rest);
            }
            continue;
        }
        *scale = top / levels;
        let inverse = 1.0 / *scale;
        *sum = encode(blocks, inverse, codes);
        if !tail.is_empty() {
            *sum += encode(&[padded(tail)], inverse, rest);
        }
    }
}

/// Fewer than 32 values with zeros after them.
fn padded(tail: &[f32]) -> Block<f32> {
    let mut block = [0.0; TILE_K];
    block[..tail.len()].copy_from_slice(tail);
    block
}
