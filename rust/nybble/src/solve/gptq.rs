//! GPTQ's column sweep: round one input's weights after another and let the inputs not yet rounded make up for the error.
//!
//! Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323. With
//! the inputs' second moments `H = X^T X` (damped), the upper Cholesky factor `U` of `H^-1 = U^T U`, and the inputs in the order
//! in which they are rounded, the sweep over a row `w` is
//!
//! ```text
//! for i in 0 .. n:   q_i = nearest value of the group's grid to w_i
//!                    e   = (w_i - q_i) / U_ii
//!                    w_j = w_j - e U_ij      for all j > i
//! ```
//!
//! A row never looks at another one, so rows are spread over threads and who computes which cannot be seen. Each element takes
//! its updates one by one in the order of `i`, in f32 and without fused multiply-adds: a loop of array operations in any
//! language that does the same gives the same bits, and a test holds this file to that. What is changed here is only *when* an
//! update is made: columns near `i` at once, those further away after a block of columns, so that `U` is read from a cache.

use rayon::prelude::*;

use super::grid::{Grid, Zeros, search};
use super::rtn::{IntWeights, crew, finite};
use crate::error::{Error, Result};

/// What to round to, and in which order.
#[derive(Clone, Copy, Debug)]
pub struct Gptq<'a> {
    /// Bits of a code: 4 or 8.
    pub bits: u32,
    /// Weights that share a scale; 0, or anything from the row's length on, means the whole row.
    pub group: usize,
    /// What zero points may be.
    pub zeros: Zeros,
    /// `U`, row-major `[cols, cols]`, its rows and columns in the order in which columns are rounded. What is below the
    /// diagonal is not read.
    pub factor: &'a [f32],
    /// The columns in the order in which they are rounded. Grids are then those of the weights as they came. `None` for the
    /// order in which they stand; then a group's grid is found when the sweep reaches it, for the weights as they are by then.
    pub order: Option<&'a [u32]>,
    /// Importance of each input in the choice of grids, or nothing when all weigh the same.
    pub importance: &'a [f32],
    /// Threads to use; `None` means [`crate::threads::Pool::default_threads`]. The result does not depend on it.
    pub threads: Option<usize>,
}

/// Columns whose updates of all later columns are made together.
const BLOCK: usize = 64;
/// Rows that share a reading of `U`.
const ROWS: usize = 8;
/// Columns updated at a time: this many of [`ROWS`] rows and of [`BLOCK`] rows of `U` stay in a core's second cache.
const TILE: usize = 512;

/// Rounds `weights`, a row-major matrix `[rows, cols]`.
///
/// # Errors
/// [`Error::Argument`] for shapes and settings out of range, and for numbers that are not finite.
pub fn gptq(weights: &[f32], rows: usize, cols: usize, settings: &Gptq<'_>) -> Result<IntWeights> {
    let Gptq { bits, zeros: kind, factor, .. } = *settings;
    kind.check(bits)?;
    if rows.checked_mul(cols) != Some(weights.len()) {
        return Err(Error::argument("weights", format!("{rows} x {cols} elements"), weights.len()));
    }
    if cols.checked_mul(cols) != Some(factor.len()) {
        return Err(Error::argument("factor", format!("{cols} x {cols} elements"), factor.len()));
    }
    if !settings.importance.is_empty() && settings.importance.len() != cols {
        let found = settings.importance.len();
        return Err(Error::argument("importance", format!("{cols} elements, or none"), found));
    }
    if settings.importance.iter().any(|h| !(h.is_finite() && *h >= 0.0)) {
        return Err(Error::argument("importance", "finite numbers, none negative", "another"));
    }
    // Checked as a whole: a row of `U` is read from its diagonal on.
    for (i, row) in factor.chunks(cols.max(1)).enumerate() {
        if !(row[i] > 0.0 && row[i..].iter().all(|u| u.is_finite())) {
            let expected = "finite numbers, those on the diagonal positive";
            return Err(Error::argument("factor", expected, format!("others in row {i}")));
        }
    }
    let order = permutation(settings.order, cols)?;
    let group = if settings.group == 0 { cols } else { settings.group.min(cols) };
    let groups = if group == 0 { 0 } else { cols.div_ceil(group) };
    let crew = crew(settings.threads)?;
    let mut codes = vec![0; rows * cols];
    let mut scales = vec![0.0; rows * groups];
    let mut zeros = vec![0.0; rows * groups];
    if !codes.is_empty() {
        let sweep = Sweep { settings, order: &order, cols, group, groups };
        crew.install(|| {
            finite(weights, cols)?;
            let inputs = weights.par_chunks(ROWS * cols).zip(codes.par_chunks_mut(ROWS * cols));
            let outputs = scales.par_chunks_mut(ROWS * groups).zip(zeros.par_chunks_mut(ROWS * groups));
            inputs.zip(outputs).for_each(|((w, codes), (scales, zeros))| sweep.rows(w, codes, scales, zeros));
            Ok(())
        })?;
    }
    Ok(IntWeights { codes, scales, zeros: (kind != Zeros::Middle).then_some(zeros), groups })
}

fn permutation(order: Option<&[u32]>, cols: usize) -> Result<Vec<usize>> {
    let Some(order) = order else { return Ok((0..cols).collect()) };
    let mut seen = vec![false; cols];
    for &column in order {
        match seen.get_mut(column as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => {
                return Err(Error::argument(
                    "order",
                    "every column once",
                    format!("{column} again or beyond"),
                ));
            }
        }
    }
    if order.len() != cols {
        return Err(Error::argument("order", format!("{cols} columns"), order.len()));
    }
    Ok(order.iter().map(|&column| column as usize).collect())
}

struct Sweep<'a> {
    settings: &'a Gptq<'a>,
    order: &'a [usize],
    cols: usize,
    group: usize,
    groups: usize,
}

impl Sweep<'_> {
    /// The grid of group `g` for the weights `w` of that group.
    fn grid(&self, w: &[f32], g: usize) -> Grid {
        let h = self.settings.importance;
        let h = if h.is_empty() { h } else { &h[g * self.group..][..w.len()] };
        search(w, h, self.settings.bits, self.settings.zeros)
    }

    /// Sweeps over at most [`ROWS`] rows.
    fn rows(&self, weights: &[f32], codes: &mut [u8], scales: &mut [f32], zeros: &mut [f32]) {
        let Sweep { settings, order, cols, group, groups } = *self;
        let count = weights.len() / cols;
        let moving = settings.order.is_none();
        let unknown = Grid { scale: 0.0, zero: 0.0, top: 0.0 };
        let mut grids = vec![unknown; count * groups];
        if !moving {
            for (row, grids) in weights.chunks(cols).zip(grids.chunks_mut(groups)) {
                for (g, (w, grid)) in row.chunks(group).zip(grids).enumerate() {
                    *grid = self.grid(w, g);
                }
            }
        }
        // The weights in the order of the sweep.
        let mut w = vec![0.0; weights.len()];
        for (to, from) in w.chunks_mut(cols).zip(weights.chunks(cols)) {
            for (to, &column) in to.iter_mut().zip(order) {
                *to = from[column];
            }
        }
        // Where grids are found on the way, a block is whole groups: their weights have all updates when it begins.
        let block = if moving { (BLOCK / group).max(1) * group } else { BLOCK };
        let mut errors = vec![0.0; count * block];
        for start in (0..cols).step_by(block) {
            let stop = (start + block).min(cols);
            for i in start..stop {
                let u = &settings.factor[i * cols..][..cols];
                let column = order[i];
                let g = column / group;
                for row in 0..count {
                    let w = &mut w[row * cols..][..cols];
                    let grid = &mut grids[row * groups + g];
                    if moving && i % group == 0 {
                        *grid = self.grid(&w[i..stop.min(i + group)], g);
                    }
                    let inverse = if grid.scale > 0.0 { grid.inverse() } else { 0.0 };
                    let code = grid.code(w[i], inverse);
                    codes[row * cols + column] = code as u8;
                    let e = (w[i] - grid.scale * (code - grid.zero)) / u[i];
                    errors[row * block + i - start] = e;
                    axpy(&mut w[i + 1..stop], e, &u[i + 1..stop]);
                }
            }
            for tile in (stop..cols).step_by(TILE) {
                let end = (tile + TILE).min(cols);
                for row in 0..count {
                    let w = &mut w[row * cols..][tile..end];
                    for k in start..stop {
                        let u = &settings.factor[k * cols..][tile..end];
                        axpy(w, errors[row * block + k - start], u);
                    }
                }
            }
        }
        for (grid, (scale, zero)) in grids.iter().zip(scales.iter_mut().zip(zeros)) {
            *scale = grid.scale;
            *zero = grid.zero;
        }
    }
}

/// `w = w - e u`.
#[inline]
pub(super) fn axpy(w: &mut [f32], e: f32, u: &[f32]) {
    for (w, u) in w.iter_mut().zip(u) {
        *w -= e * u;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solve::rtn::{Rtn, rtn};

    fn identity(n: usize) -> Vec<f32> {
        (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect()
    }

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 500.0 - 1.0).collect()
    }

    fn settings<'a>(factor: &'a [f32], order: Option<&'a [u32]>) -> Gptq<'a> {
        Gptq {
            bits: 4,
            group: 32,
            zeros: Zeros::Sixteenths,
            factor,
            order,
            importance: &[],
            threads: Some(2),
        }
    }

    #[test]
    fn inputs_that_have_nothing_in_common_are_rounded_to_nearest() {
        let (rows, cols) = (11, 160);
        let (w, factor) = (numbers(rows * cols, 1), identity(cols));
        let plain = Rtn { bits: 4, group: 32, zeros: Zeros::Sixteenths, threads: Some(1) };
        let nearest = rtn(&w, rows, cols, &plain).expect("good weights");
        let backwards: Vec<u32> = (0..cols as u32).rev().collect();
        for order in [None, Some(backwards.as_slice())] {
            let swept = gptq(&w, rows, cols, &settings(&factor, order)).expect("good weights");
            assert_eq!(swept, nearest);
        }
    }

    #[test]
    fn a_later_column_makes_up_for_an_earlier_one() {
        // Seven steps of about 1 each; what column 1 loses, column 2 can make up for.
        let mut w = vec![0.0; 32];
        (w[0], w[1], w[2]) = (7.0, 1.4, 2.0);
        let mut factor = identity(32);
        factor[32 + 2] = -1.0; // what column 1 loses, column 2 gains
        let order: Vec<u32> = (0..32).collect();
        let done = Gptq { zeros: Zeros::Middle, ..settings(&factor, Some(&order)) };
        let done = gptq(&w, 1, 32, &done).expect("good weights");
        let scale = done.scales[0];
        let back: Vec<f32> = done.codes.iter().map(|&code| scale * (f32::from(code) - 8.0)).collect();
        // 1.4 becomes about 1: the 0.4 goes to the neighbour, 2.4, which becomes about 2.
        let lost = 1.4 - back[1];
        assert!(lost > 0.2 && (back[2] - (2.0 + lost)).abs() <= 0.5 * scale, "{back:?}");
    }

    #[test]
    fn threads_do_not_show() {
        let (rows, cols) = (37, 200);
        let w = numbers(rows * cols, 2);
        let mut factor = numbers(cols * cols, 3);
        for i in 0..cols {
            factor[i * cols + i] = 2.0;
        }
        let order: Vec<u32> = (0..cols as u32).map(|i| (i * 77) % cols as u32).collect();
        for order in [None, Some(order.as_slice())] {
            let one = Gptq { threads: Some(1), ..settings(&factor, order) };
            let one = gptq(&w, rows, cols, &one).expect("good weights");
            let five = Gptq { threads: Some(5), ..settings(&factor, order) };
            assert_eq!(gptq(&w, rows, cols, &five).expect("good weights"), one);
        }
    }

    #[test]
    fn what_is_out_of_range_is_an_error() {
        let factor = identity(4);
        let good = Gptq { group: 0, ..settings(&factor, None) };
        let w = [1.0; 8];
        assert!(gptq(&w, 2, 4, &good).is_ok());
        assert!(gptq(&w, 2, 3, &good).is_err());
        assert!(gptq(&w, 2, 4, &Gptq { bits: 3, ..good }).is_err());
        assert!(gptq(&w, 2, 4, &Gptq { factor: &factor[..9], ..good }).is_err());
        assert!(gptq(&w, 2, 4, &Gptq { importance: &[1.0], ..good }).is_err());
        assert!(gptq(&w, 2, 4, &Gptq { importance: &[1.0, -1.0, 1.0, 1.0], ..good }).is_err());
        assert!(gptq(&w, 2, 4, &Gptq { threads: Some(0), ..good }).is_err());
        for order in [&[0, 1, 2][..], &[0, 1, 2, 2], &[0, 1, 2, 4]] {
            assert!(gptq(&w, 2, 4, &Gptq { order: Some(order), ..good }).is_err());
        }
        for (at, bad) in [(5, 0.0), (5, f32::NAN), (6, f32::INFINITY)] {
            let mut factor = factor.clone();
            factor[at] = bad;
            assert!(gptq(&w, 2, 4, &Gptq { factor: &factor, ..good }).is_err());
        }
        let mut bad = w;
        bad[6] = f32::NAN;
        let message = gptq(&bad, 2, 4, &good).expect_err("not finite").to_string();
        assert!(message.contains("row 1, column 2"), "{message}");
        assert!(gptq(&[], 0, 4, &good).is_ok());
        assert!(gptq(&[], 3, 0, &Gptq { factor: &[], ..good }).is_ok());
    }
}
