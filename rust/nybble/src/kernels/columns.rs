//! A matrix that several threads write at once, each its own columns.

use std::marker::PhantomData;

/// Row-major output `[rows, stride]` of which a kernel call writes some columns of every row.
///
/// A matmul is split over output columns, so no thread's part is one slice. This view hands out the part of one row that
/// belongs to a column range; keeping the ranges of different threads apart is the one promise its user makes.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    data: *mut f32,
    rows: usize,
    stride: usize,
    offset: usize,
    width: usize,
    marker: PhantomData<&'a mut [f32]>,
}

// SAFETY: the view is only a pointer to `f32`s; `row` is unsafe and asks its caller to keep threads apart.
unsafe impl Send for Columns<'_> {}
// SAFETY: as above.
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    /// A view of columns `offset .. offset + width` of `data`, which is `[rows, stride]`.
    ///
    /// # Panics
    /// When the columns do not lie inside a row or `data` is shorter than `rows * stride`.
    pub fn new(data: &'a mut [f32], rows: usize, stride: usize, offset: usize, width: usize) -> Self {
        assert!(offset + width <= stride, "columns {offset}+{width} of {stride}");
        assert!(data.len() >= rows * stride, "{} elements for {rows} x {stride}", data.len());
        Self { data: data.as_mut_ptr(), rows, stride, offset, width, marker: PhantomData }
    }

    /// A view of `width` of its columns, from `offset` on.
    ///
    /// # Panics
    /// When it has no such columns.
    #[must_use]
    pub fn part(self, offset: usize, width: usize) -> Self {
        assert!(offset + width <= self.width, "columns {offset}+{width} of {}", self.width);
        Self { offset: self.offset + offset, width, ..self }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns that may be written.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Columns `from .. from + len` of `row`, counted from the view's own first column; cut at the view's width.
    ///
    /// # Safety
    /// No other live slice, on any thread, may overlap these columns of this row.
    ///
    /// # Panics
    /// When `row` or `from` is out of range.
    pub unsafe fn row(&self, row: usize, from: usize, len: usize) -> &'a mut [f32] {
        assert!(row < self.rows && from <= self.width, "row {row} of {}, column {from}", self.rows);
        let len = len.min(self.width - from);
        // SAFETY: `new` checked that every row's columns lie inside the slice borrowed for 'a; disjointness is promised.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.stride + self.offset + from), len) }
    }
}
