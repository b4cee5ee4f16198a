//! A linear as it runs: one or more packed matrices that read the same input, and a bias.
//!
//! Queries, keys and values (and gate and up) are one [`Linear`] of several parts, so their input is rounded once
//! and their outputs stand side by side in one row.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::settings::Settings;
use crate::error::Result;
use crate::kernels::quantize::{Activations, Rounding, Source};
use crate::kernels::w4a8_sparse::sparse_columns;
use crate::kernels::{Columns, IntProduct, Kernels, float_matmul, int_matmuls};
use crate::pack::{Bundles, Layout, Packed};
use crate::threads::Pool;

/// What runs a model: its threads, kernels and settings.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    pub(super) pool: &'a Pool,
    pub(super) kernels: &'a Kernels,
    pub(super) settings: &'a Settings,
}

/// One matrix of a linear.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) weight: Arc<Packed>,
    /// How inputs are rounded; none multiplies them in float.
    pub(super) rounding: Option<Rounding>,
}

impl Part {
    /// Whether one rounding of the input serves both.
    fn reads_the_same(&self, other: &Self) -> bool {
        let form = |part: &Self| part.rounding.map(|rounding| (rounding, part.weight.group()));
        form(self) == form(other)
    }
}

/// Columns of some matrices of a linear, to be read one by one where many inputs are 0.
#[derive(Debug)]
pub(super) struct Skippable {
    which: Range<usize>,
    bundles: Vec<Bundles>, // of each of these matrices
    /// Inputs that may be other than 0; with more of them all columns are read.
    pub(super) most: usize,
    patience: Patience,
}

/// When to look again whether few enough inputs are other than 0: looking costs time of its own, a few hundredths of that of a
/// small linear, in vain where they never are.
#[derive(Debug, Default)]
struct Patience {
    /// Times in a row that there were too many, up to a limit.
    misses: AtomicU32,
    /// Tokens that will not be looked at.
    wait: AtomicU32,
}

impl Patience {
    /// At most `2^MISSES - 1` tokens are not looked at.
    const MISSES: u32 = 6;

    /// Whether to look at this token.
    fn look(&self) -> bool {
        let wait = self.wait.load(Ordering::Relaxed);
        self.wait.store(wait.saturating_sub(1), Ordering::Relaxed);
        wait == 0
    }

    /// Takes note of what was seen.
    fn saw(&self, few: bool) {
        let misses = if few { 0 } else { Self::MISSES.min(self.misses.load(Ordering::Relaxed) + 1) };
        self.misses.store(misses, Ordering::Relaxed);
        self.wait.store((1 << misses) - 1, Ordering::Relaxed);
    }
}

impl Skippable {
    /// Whether it is worth looking for inputs that are 0.
    pub(super) fn worth_a_look(&self) -> bool {
        self.patience.look()
    }

    pub(super) fn inputs(&self) -> usize {
        self.bundles.first().map_or(0, Bundles::neurons)
    }

    pub(super) fn which(&self) -> Range<usize> {
        self.which.clone()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bundles.iter().map(Bundles::bytes).sum()
    }
}

/// Lists the places where `flags` are set, without branches: half of these would be foretold wrongly, which costs more than the
/// columns that are then skipped.
pub(super) fn list_where(list: &mut Vec<u32>, flags: impl ExactSizeIterator<Item = bool>) {
    list.resize(flags.len(), 0);
    let mut count = 0;
    for (n, flag) in (0..).zip(flags) {
        list[count] = n;
        count += usize::from(flag);
    }
    list.truncate(count);
}

/// `y = W x + b`.
#[derive(Debug)]
pub(super) struct Linear {
    parts: Vec<Part>,
    bias: Option<Vec<f32>>, // [rows]
    rows: usize,
}

impl Linear {
    pub(super) fn new(parts: Vec<Part>, bias: Option<Vec<f32>>) -> Self {
        let rows = parts.iter().map(|part| part.weight.rows()).sum();
        debug_assert!(bias.as_ref().is_none_or(|bias| bias.len() == rows));
        Self { parts, bias, rows }
    }

    /// Outputs.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// The packed matrices.
    pub(super) fn weights(&self) -> impl Iterator<Item = &Arc<Packed>> {
        self.parts.iter().map(|part| &part.weight)
    }

    /// The matrices, if they read the same and nothing is added to what they give.
    pub(super) fn plain_parts(&self) -> Option<&[Part]> {
        let same = self.parts.windows(2).all(|pair| pair[0].reads_the_same(&pair[1]));
        (same && self.bias.is_none()).then_some(&self.parts)
    }

    /// Number of matrices.
    pub(super) fn count(&self) -> usize {
        self.parts.len()
    }

    /// Whether any matrix takes inputs of 8 bits.
    pub(super) fn takes_bytes(&self) -> bool {
        self.parts.iter().any(|part| part.rounding.is_some_and(|rounding| rounding.bits == 8))
    }

    /// Computes `y [n, rows]` from `x [n, cols]`; `rounded` is scratch.
    pub(super) fn forward(
        &self,
        run: Run<'_>,
        x: &[f32],
        n: usize,
        rounded: &mut Activations,
        y: &mut [f32],
    ) -> Result<()> {
        self.forward_source(run, &mut Source::Given(x), n, &[], rounded, y)
    }

    /// The same of some of the matrices, whose outputs alone are written to their places in `y`.
    pub(super) fn forward_parts(
        &self,
        run: Run<'_>,
        which: Range<usize>,
        x: &mut Source<'_>,
        n: usize,
        rounded: &mut Activations,
        y: &mut [f32],
    ) -> Result<()> {
        self.multiply(run, which.clone(), x, n, &[], rounded, y)?;
        self.add_bias(run, which, y);
        Ok(())
    }

    /// Where in a row the outputs of some matrices are.
    fn outputs(&self, which: Range<usize>) -> Range<usize> {
        let rows = |parts: &[Part]| parts.iter().map(|part| part.weight.rows()).sum::<usize>();
        let first = rows(&self.parts[..which.start]);
        first..first + rows(&self.parts[which])
    }

    fn add_bias(&self, run: Run<'_>, which: Range<usize>, y: &mut [f32]) {
        let Some(bias) = &self.bias else { return };
        let own = self.outputs(which);
        for row in y.chunks_exact_mut(self.rows) {
            run.kernels.elementwise.add_assign(&mut row[own.clone()], &bias[own.clone()]);
        }
    }

    /// The columns of some of the matrices, if these are of the kind that sparse kernels read.
    pub(super) fn skippable(&self, which: Range<usize>, pool: &Pool) -> Result<Option<Skippable>> {
        let parts = &self.parts[which.clone()];
        let rounded = |part: &Part| part.rounding.is_some_and(|rounding| rounding.bits == 8);
        let good = parts.windows(2).all(|pair| pair[0].reads_the_same(&pair[1]))
            && parts.iter().all(|part| part.weight.layout() == Layout::W4 && rounded(part));
        if !good {
            return Ok(None);
        }
        let bundles = parts.iter().map(|part| Bundles::new(None, &part.weight, pool));
        let bundles = bundles.collect::<Result<_>>()?;
        Ok(Some(Skippable { which, bundles, most: usize::MAX, patience: Patience::default() }))
    }

    /// As [`Linear::forward_parts`] of one row and the matrices of `columns`; returns whether it skipped the columns whose
    /// input is 0. `active` is scratch.
    pub(super) fn forward_skipping(
        &self,
        run: Run<'_>,
        columns: &Skippable,
        x: &mut Source<'_>,
        active: &mut Vec<u32>,
        rounded: &mut Activations,
        y: &mut [f32],
    ) -> Result<bool> {
        let Skippable { which, bundles, most, patience } = columns;
        let parts = &self.parts[which.clone()];
        let Part { weight, rounding: Some(rounding) } = &parts[0] else {
            unreachable!("columns are those of rounded matrices");
        };
        let (cols, group) = (weight.cols(), weight.group());
        rounded.quantize_source(run.pool, run.kernels.quantize, x, 1, cols, group, *rounding, &[])?;
        list_where(active, rounded.codes(0)[..cols].iter().map(|code| *code != 0));
        let few = active.len() <= *most;
        patience.saw(few);
        let mut first = self.outputs(which.clone()).start;
        if few {
            for bundles in bundles {
                let y = &mut y[first..][..bundles.outputs()];
                sparse_columns(run.pool, run.kernels.w4a8_sparse, bundles, rounded, 0, active, y)?;
                first += bundles.outputs();
            }
        } else {
            let outputs = Columns::new(y, 1, self.rows, 0, self.rows);
            let mut products = parts.iter().map(|Part { weight: w, .. }| {
                let y = outputs.part(first, w.rows());
                first += w.rows();
                IntProduct { kernel: run.kernels.w4a8, w, y }
            });
            int_matmuls(run.pool, rounded, &mut products)?;
        }
        self.add_bias(run, which.clone(), y);
        Ok(few)
    }

    /// The same of inputs that may have to be computed first, and with 4 bits instead of 8 in the rows that `low` says so of;
    /// it is empty or has `n` flags.
    pub(super) fn forward_source(
        &self,
        run: Run<'_>,
        x: &mut Source<'_>,
        n: usize,
        low: &[bool],
        rounded: &mut Activations,
        y: &mut [f32],
    ) -> Result<()> {
        self.multiply(run, 0..self.parts.len(), x, n, low, rounded, y)?;
        if let Some(bias) = &self.bias {
            run.pool.split_rows(y, self.rows, &|_, rows| {
                for row in rows.chunks_exact_mut(self.rows) {
                    run.kernels.elementwise.add_assign(row, bias);
                }
            });
        }
        Ok(())
    }

    /// The products of some of the matrices.
    #[expect(clippy::too_many_arguments, reason = "those of `forward_source` and which of them")]
    fn multiply(
        &self,
        run: Run<'_>,
        which: Range<usize>,
        x: &mut Source<'_>,
        n: usize,
        low: &[bool],
        rounded: &mut Activations,
        y: &mut [f32],
    ) -> Result<()> {
        let columns = Columns::new(y, n, self.rows, 0, self.rows);
        let mut offset = self.parts[..which.start].iter().map(|part| part.weight.rows()).sum();
        for parts in self.parts[which].chunk_by(Part::reads_the_same) {
            let Part { weight, rounding } = &parts[0];
            if let Some(rounding) = *rounding {
                let (cols, group) = (weight.cols(), weight.group());
                let kernel = run.kernels.quantize;
                rounded.quantize_source(run.pool, kernel, x, n, cols, group, rounding, low)?;
            }
            let mut products = parts.iter().map(|Part { weight, .. }| {
                let own = columns.part(offset, weight.rows());
                offset += weight.rows();
                (weight.as_ref(), own)
            });
            if let Some(rounding) = rounding {
                let kernel = |w: &Packed| run.kernels.int(w.layout(), rounding.bits);
                let mut products = products.map(|(w, y)| IntProduct { kernel: kernel(w), w, y });
                int_matmuls(run.pool, rounded, &mut products)?;
            } else {
                let x = x.rows(run.pool, weight.cols());
                products.try_for_each(|(w, y)| float_matmul(run.pool, run.kernels.f32, w, x, y))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_never_sparse_is_rarely_looked_at() {
        let looked_at = |patience: &Patience, few: bool| {
            let look = |_: &usize| {
                let look = patience.look();
                if look {
                    patience.saw(few);
                }
                look
            };
            (0..1000).filter(look).collect::<Vec<_>>()
        };
        let patience = Patience::default();
        let found = looked_at(&patience, false);
        assert_eq!(found[..5], [0, 2, 6, 14, 30]);
        assert_eq!(found.len(), 6 + (1000 - 63) / 64);
        // Once there were few, every token is looked at.
        let found = looked_at(&patience, true);
        assert!(found[0] < 64 && found[1..] == (found[0] + 1..1000).collect::<Vec<_>>());
    }

    #[test]
    fn places_of_flags_are_listed() {
        let mut list = vec![7; 3];
        list_where(&mut list, [true, false, true, true, false].into_iter());
        assert_eq!(list, [0, 2, 3]);
        list_where(&mut list, std::iter::empty());
        assert!(list.is_empty());
    }
}
