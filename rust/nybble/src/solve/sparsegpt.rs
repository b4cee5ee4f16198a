//! `SparseGPT`'s column sweep: take out one input's weights after another and let the inputs that come later make up for it.
//!
//! Frantar and Alistarh, "`SparseGPT`: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774. With the
//! upper Cholesky factor `U` of the inverse of the inputs' second moments (see [`gptq`](super::gptq)), over the columns in
//! blocks:
//!
//! ```text
//! those weights of a block go whose (w_j / U_jj)^2 is smallest, when the sweep reaches the block (or its group of m columns)
//! for each column i of the block:   e   = w_i / U_ii where w_i goes, else 0
//!                                   w_j = w_j - e U_ij      for all j > i
//! ```
//!
//! Each element takes its updates one by one in the order of `i`, in f32 and without fused multiply-adds, so that plain array
//! operations in any language give the same bits.

use rayon::prelude::*;

use super::gptq::axpy;
use super::rtn::{crew, finite};
use super::select::smallest;
use crate::error::{Error, Result};

/// What is taken out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// This share of each block of columns, over all rows together.
    Share(f64),
    /// So many of every so many neighbours in a row.
    Neighbours {
        /// How many go.
        drop: usize,
        /// Of how many.
        of: usize,
    },
}

/// Settings of [`sparsegpt`].
#[derive(Clone, Copy, Debug)]
pub struct SparseGpt<'a> {
    /// What is taken out.
    pub pattern: Pattern,
    /// `U`, row-major `[cols, cols]`; what is below the diagonal is not read.
    pub factor: &'a [f32],
    /// Columns of a block.
    pub block: usize,
    /// Threads to use; the result does not depend on it.
    pub threads: Option<usize>,
}

/// What is left of a matrix: its weights, zero where one went, and a mark of 1 where one stays.
pub type Sparse = (Vec<f32>, Vec<u8>);

/// Takes weights out of a row-major matrix `[rows, cols]` and changes the others to make up for them.
///
/// # Errors
/// [`Error::Argument`] for shapes and settings out of range, and for numbers that are not finite.
pub fn sparsegpt(weights: &[f32], rows: usize, cols: usize, settings: &SparseGpt<'_>) -> Result<Sparse> {
    let SparseGpt { pattern, factor, block, threads } = *settings;
    if rows.checked_mul(cols) != Some(weights.len()) {
        return Err(Error::argument("weights", format!("{rows} x {cols} elements"), weights.len()));
    }
    if cols.checked_mul(cols) != Some(factor.len()) {
        return Err(Error::argument("factor", format!("{cols} x {cols} elements"), factor.len()));
    }
    for (i, row) in factor.chunks(cols.max(1)).enumerate() {
        if !(row[i] > 0.0 && row[i..].iter().all(|u| u.is_finite())) {
            let expected = "finite numbers, those on the diagonal positive";
            return Err(Error::argument("factor", expected, format!("others in row {i}")));
        }
    }
    if block == 0 {
        return Err(Error::argument("block", "at least one column", block));
    }
    match pattern {
        Pattern::Share(share) if !(0.0..=1.0).contains(&share) => {
            return Err(Error::argument("share", "a number from 0 to 1", share));
        }
        Pattern::Neighbours { drop, of } if of == 0 || !cols.is_multiple_of(of) || drop > of => {
            let expected = format!("some of a divisor of {cols} columns");
            return Err(Error::argument("neighbours", expected, format!("{drop} of {of}")));
        }
        Pattern::Neighbours { of, .. } if !block.is_multiple_of(of) => {
            return Err(Error::argument("block", format!("a multiple of {of}"), block));
        }
        _ => {}
    }
    let mut w = weights.to_vec();
    let mut keep = vec![1; w.len()];
    if w.is_empty() {
        return Ok((w, keep));
    }
    crew(threads)?.install(|| {
        finite(weights, cols)?;
        for start in (0..cols).step_by(block) {
            let stop = (start + block).min(cols);
            if let Pattern::Share(share) = pattern {
                mark(&w, &mut keep, cols, start..stop, factor, share);
            }
            w.par_chunks_mut(cols).zip(keep.par_chunks_mut(cols)).for_each(|(w, keep)| {
                sweep(w, keep, start..stop, factor, pattern);
            });
        }
        Ok((w, keep))
    })
}

fn score(w: f32, u: f32) -> f32 {
    w * w / (u * u)
}

/// Marks what goes of a block, over all rows together.
fn mark(w: &[f32], keep: &mut [u8], cols: usize, block: std::ops::Range<usize>, factor: &[f32], share: f64) {
    let width = block.len();
    let mut scores = vec![0.0; w.len() / cols * width];
    scores.par_chunks_mut(width).zip(w.par_chunks(cols)).for_each(|(scores, w)| {
        for (score_of, i) in scores.iter_mut().zip(block.clone()) {
            *score_of = score(w[i], factor[i * cols + i]);
        }
    });
    let count = (scores.len() as f64 * share) as usize;
    smallest(&scores, count, |at| keep[at / width * cols + block.start + at % width] = 0);
}

/// Sweeps a row over the columns of a block.
fn sweep(w: &mut [f32], keep: &mut [u8], block: std::ops::Range<usize>, factor: &[f32], pattern: Pattern) {
    let cols = w.len();
    let mut errors = vec![0.0; block.len()];
    let mut scores = Vec::new();
    for i in block.clone() {
        if let Pattern::Neighbours { drop, of } = pattern
            && i.is_multiple_of(of)
        {
            scores.clear();
            scores.extend((i..i + of).map(|j| score(w[j], factor[j * cols + j])));
            smallest(&scores, drop, |at| keep[i + at] = 0);
        }
        if keep[i] == 0 {
            let u = &factor[i * cols..][..cols];
            let e = w[i] / u[i];
            w[i] = 0.0;
            errors[i - block.start] = e;
            axpy(&mut w[i + 1..block.end], e, &u[i + 1..block.end]);
        }
    }
    for (&e, i) in errors.iter().zip(block.clone()) {
        if e != 0.0 {
            axpy(&mut w[block.end..], e, &factor[i * cols..][block.end..cols]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(n: usize) -> Vec<f32> {
        (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect()
    }

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 500.0 - 1.0).collect()
    }

    #[test]
    fn inputs_that_have_nothing_in_common_keep_their_largest_weights() {
        let factor = identity(4);
        let half = SparseGpt { pattern: Pattern::Share(0.5), factor: &factor, block: 4, threads: Some(2) };
        let w = [4.0, -1.0, 2.0, 3.0, 0.5, -8.0, 7.0, 0.1];
        let (sparse, keep) = sparsegpt(&w, 2, 4, &half).expect("good weights");
        assert_eq!(keep, [1, 0, 0, 1, 0, 1, 1, 0]);
        assert_eq!(sparse, [4.0, 0.0, 0.0, 3.0, 0.0, -8.0, 7.0, 0.0]);
        let pairs = Pattern::Neighbours { drop: 1, of: 2 };
        let (_, keep) = sparsegpt(&w, 2, 4, &SparseGpt { pattern: pairs, ..half }).expect("good weights");
        assert_eq!(keep, [1, 0, 0, 1, 0, 1, 1, 0]);
    }

    #[test]
    fn a_later_column_makes_up_for_an_earlier_one() {
        let factor = [1.0, -0.5, 0.0, 1.0]; // what column 0 loses, half of it column 1 gains
        let first = SparseGpt { pattern: Pattern::Share(0.5), factor: &factor, block: 2, threads: Some(1) };
        let (sparse, keep) = sparsegpt(&[1.0, 3.0], 1, 2, &first).expect("good weights");
        assert_eq!((sparse, keep), (vec![0.0, 3.5], vec![0, 1]));
    }

    #[test]
    fn threads_do_not_show() {
        let (rows, cols) = (37, 200);
        let w = numbers(rows * cols, 2);
        let mut factor = numbers(cols * cols, 3);
        for i in 0..cols {
            factor[i * cols + i] = 2.0;
        }
        for pattern in [Pattern::Share(0.3), Pattern::Neighbours { drop: 4, of: 8 }] {
            let one = SparseGpt { pattern, factor: &factor, block: 64, threads: Some(1) };
            let five = SparseGpt { threads: Some(5), ..one };
            let one = sparsegpt(&w, rows, cols, &one).expect("good weights");
            assert_eq!(sparsegpt(&w, rows, cols, &five).expect("good weights"), one);
            let gone = one.1.len() - one.1.iter().map(|&keep| usize::from(keep)).sum::<usize>();
            let wanted: usize = match pattern {
                Pattern::Share(share) => {
                    [64.0, 64.0, 64.0, 8.0].map(|n: f64| (n * 37.0 * share) as usize).iter().sum()
                }
                Pattern::Neighbours { .. } => rows * cols / 2,
            };
            assert_eq!(gone, wanted);
        }
    }

    #[test]
    fn what_is_out_of_range_is_an_error() {
        let factor = identity(4);
        let good = SparseGpt { pattern: Pattern::Share(0.5), factor: &factor, block: 4, threads: Some(1) };
        let w = [1.0; 8];
        assert!(sparsegpt(&w, 2, 4, &good).is_ok());
        assert!(sparsegpt(&w, 2, 3, &good).is_err());
        assert!(sparsegpt(&w, 2, 4, &SparseGpt { factor: &factor[..9], ..good }).is_err());
        assert!(sparsegpt(&w, 2, 4, &SparseGpt { block: 0, ..good }).is_err());
        for pattern in [
            Pattern::Share(1.5),
            Pattern::Share(f64::NAN),
            Pattern::Neighbours { drop: 1, of: 3 },
            Pattern::Neighbours { drop: 3, of: 2 },
            Pattern::Neighbours { drop: 0, of: 0 },
        ] {
            assert!(sparsegpt(&w, 2, 4, &SparseGpt { pattern, ..good }).is_err(), "{pattern:?}");
        }
        let pairs = Pattern::Neighbours { drop: 1, of: 2 };
        assert!(sparsegpt(&w, 2, 4, &SparseGpt { pattern: pairs, block: 3, ..good }).is_err());
        for (at, bad) in [(5, 0.0), (5, f32::NAN), (6, f32::INFINITY)] {
            let mut factor = factor.clone();
            factor[at] = bad;
            assert!(sparsegpt(&w, 2, 4, &SparseGpt { factor: &factor, ..good }).is_err());
        }
        let mut bad = w;
        bad[6] = f32::NAN;
        let message = sparsegpt(&bad, 2, 4, &good).expect_err("not finite").to_string();
        assert!(message.contains("row 1, column 2"), "{message}");
        assert!(sparsegpt(&[], 0, 4, &good).is_ok());
        assert!(sparsegpt(&[], 3, 0, &SparseGpt { factor: &[], ..good }).is_ok());
    }
}
