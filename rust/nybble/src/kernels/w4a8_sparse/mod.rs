//! 4-bit weights, 8-bit activations, and only the neurons that do something.
//!
//! Two products over [`Bundles`]: `rows` gives some outputs of a matrix (of `up`, those of the active neurons), `columns`
//! multiplies by an input that is zero but in some places (that of `down`). Both give, bit for bit, what `w4a8` gives for the
//! same integers: sums are exact, and groups are added in order, each with one fused multiply-add. Whether neurons are
//! skipped or multiplied by zero is thus a question of time alone, and may be answered anew for every token.
//!
//! A group of `down` spans neighbouring neurons, of which any may be active: the sum in 32 bits runs over those that are, and
//! a scale is applied once for each group and output that has any. Wide groups make that cheap; with groups of 32 scales are
//! a good part of the work.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
#[cfg(target_arch = "aarch64")]
mod neon_dotprod;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use super::Columns;
use super::quantize::Activations;
use super::tiles::Rows;
use crate::cpu::Isa;
use crate::error::{Error, Result};
use crate::pack::{Bundles, CHUNK};
use crate::threads::Pool;

/// Products of one row of activations with some neurons of bundles.
pub trait SparseMatmul: Sync {
    /// The tier.
    fn isa(&self) -> Isa;

    /// `out[i]` = row `active[i]` of `up` times `x`, the only row of `x`.
    ///
    /// # Panics
    /// When `x` has other columns or groups than `up`, a neuron does not exist, or `out` has another length than `active`.
    fn rows(&self, w: &Bundles, x: &Vector<'_>, active: &[u32], out: &mut [f32]);

    /// `y` = outputs of the chunks `chunks` of `down` times `x`, which is 0 in all places but `active`, in ascending order.
    ///
    /// # Panics
    /// As [`SparseMatmul::rows`], and when `y` has not the outputs of these chunks.
    fn columns(&self, w: &Bundles, x: &Vector<'_>, active: &[u32], chunks: Range<usize>, y: &mut [f32]);
}

/// One row of activations.
pub struct Vector<'a>(Rows<'a>);

impl std::fmt::Debug for Vector<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vector").field("stride", &self.0.stride).finish_non_exhaustive()
    }
}

impl<'a> Vector<'a> {
    /// Row `row` of `x`.
    pub fn of(x: &'a Activations, row: usize) -> Self {
        Self(x.block(row, 1))
    }

    /// Asserts what the kernels' pointer arithmetic relies on.
    fn check(&self, cols: usize, groups: usize) {
        let x = &self.0;
        assert!(
            x.stride == cols.next_multiple_of(32)
                && x.codes.len() == x.stride
                && x.groups == groups
                && x.scales.len() == groups
                && x.sums.len() == groups,
            "weights and activations differ in shape"
        );
    }
}

/// All implementations this CPU allows, lowest tier first.
pub fn kernels() -> Vec<&'static dyn SparseMatmul> {
    let all: &[Option<&'static dyn SparseMatmul>] = &[
        Some(&scalar::Scalar),
        #[cfg(target_arch = "x86_64")]
        avx2::kernel(),
        #[cfg(target_arch = "x86_64")]
        avx512vnni::kernel(),
        #[cfg(target_arch = "aarch64")]
        neon_dotprod::kernel(),
    ];
    all.iter().copied().flatten().collect()
}

/// Rows `active` of `up` times row `row` of `x`, on the pool's threads.
pub fn sparse_rows(
    pool: &Pool,
    kernel: &dyn SparseMatmul,
    w: &Bundles,
    x: &Activations,
    row: usize,
    active: &[u32],
    out: &mut [f32],
) -> Result<()> {
    let Some(side) = w.row_side() else {
        return Err(Error::argument("bundles", "some with rows", "columns alone"));
    };
    check(x, row, w.inputs(), side.group)?;
    check_active(w, active)?;
    if out.len() != active.len() {
        return Err(Error::argument("output", format!("{} values", active.len()), out.len()));
    }
    let x = Vector::of(x, row);
    pool.split_rows(out, 1, &|first, part| kernel.rows(w, &x, &active[first..first + part.len()], part));
    Ok(())
}

/// `down` times row `row` of `x`, which is 0 in all places but `active`, on the pool's threads.
pub fn sparse_columns(
    pool: &Pool,
    kernel: &dyn SparseMatmul,
    w: &Bundles,
    x: &Activations,
    row: usize,
    active: &[u32],
    y: &mut [f32],
) -> Result<()> {
    check(x, row, w.neurons(), w.column_side().group)?;
    check_active(w, active)?;
    if y.len() != w.outputs() {
        return Err(Error::argument("output", format!("{} values", w.outputs()), y.len()));
    }
    let x = Vector::of(x, row);
    let columns = Columns::new(y, 1, w.outputs(), 0, w.outputs());
    // Not too small: every range begins anew with the first active neuron.
    let grain = (w.chunks() / (4 * pool.threads())).max(1);
    pool.split(w.chunks(), grain, &|chunks| {
        // SAFETY: `split` hands out disjoint chunks.
        let part = unsafe { columns.row(0, chunks.start * CHUNK, chunks.len() * CHUNK) };
        kernel.columns(w, &x, active, chunks, part);
    });
    Ok(())
}

fn check(x: &Activations, row: usize, cols: usize, group: usize) -> Result<()> {
    if row >= x.rows() {
        return Err(Error::argument("row", format!("less than {}", x.rows()), row));
    }
    if (x.cols(), x.group()) == (cols, group) {
        return Ok(());
    }
    Err(Error::argument(
        "activations",
        format!("{cols} columns in groups of {group}"),
        format!("{} columns in groups of {}", x.cols(), x.group()),
    ))
}

fn check_active(w: &Bundles, active: &[u32]) -> Result<()> {
    let good =
        active.is_sorted_by(|a, b| a < b) && active.last().is_none_or(|&last| (last as usize) < w.neurons());
    if good {
        return Ok(());
    }
    let found = active.iter().find(|&&n| n as usize >= w.neurons());
    let found = found.map_or_else(|| "another order".into(), ToString::to_string);
    Err(Error::argument("active neurons", format!("ascending ones below {}", w.neurons()), found))
}

/// The active neurons of each group that has any, with the group's number.
fn by_group(mut active: &[u32], group: usize) -> impl Iterator<Item = (usize, &[u32])> {
    std::iter::from_fn(move || {
        let g = *active.first()? as usize / group;
        let end = (g + 1) * group;
        let (own, rest) = active.split_at(active.iter().take_while(|&&n| (n as usize) < end).count());
        active = rest;
        Some((g, own))
    })
}
