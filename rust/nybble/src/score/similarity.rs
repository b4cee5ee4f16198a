//! Which tokens are alike: cosines of their features, and pairs made by them.
//!
//! No matrix of all cosines is held for a matching: some rows of it at a time, and of each only its best.

use std::cmp::Ordering;

use super::{LANES, dot};
use crate::error::{Error, Result};
use crate::kernels::{Columns, Kernels, float_matmul};
use crate::pack::Packed;
use crate::threads::Pool;
use crate::tokens::select::highest;

/// Rows of cosines in memory at a time.
const ROWS: usize = 128;

/// Features of tokens: `dim` values of each, as far apart as `stride`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Features<'a> {
    /// From the first token's on.
    pub values: &'a [f32],
    /// Values from one token to the next.
    pub stride: usize,
    /// Values of one token.
    pub dim: usize,
}

impl Features<'_> {
    /// Those of one token.
    pub fn row(&self, token: usize) -> &[f32] {
        &self.values[token * self.stride..][..self.dim]
    }

    /// A copy of those of some tokens, side by side.
    pub fn of(&self, tokens: &[usize]) -> Vec<f32> {
        let mut rows = Vec::with_capacity(tokens.len() * self.dim);
        for &token in tokens {
            rows.extend_from_slice(self.row(token));
        }
        rows
    }
}

/// For each of some tokens the one of others that is most like it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Matches {
    /// Its number among the others; of several that are equally alike the first.
    pub best: Vec<usize>,
    /// The cosine.
    pub cosine: Vec<f32>,
}

/// Pairs to merge.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pairs {
    /// Tokens that go, in ascending order.
    pub from: Vec<usize>,
    /// The token that each of them goes into; several may go into one.
    pub into: Vec<usize>,
}

/// The rows of `[n, dim]`, each with length 1; a row of zeros stays.
fn normalised(pool: &Pool, kernels: &Kernels, mut rows: Vec<f32>, dim: usize) -> Result<Vec<f32>> {
    if dim == 0 || !rows.len().is_multiple_of(dim) {
        return Err(Error::argument("features", format!("rows of {dim} values"), rows.len()));
    }
    pool.split_rows(&mut rows, dim, &|_, rows| {
        for row in rows.chunks_exact_mut(dim) {
            let square = dot(row, row);
            if square > 0.0 {
                kernels.elementwise.scale(row, (1.0 / square.sqrt()) as f32);
            }
        }
    });
    Ok(rows)
}

/// Cosines `[a, b]` of the rows of two lists of features.
pub fn cosines(pool: &Pool, kernels: &Kernels, a: Vec<f32>, b: Vec<f32>, dim: usize) -> Result<Vec<f32>> {
    let a = normalised(pool, kernels, a, dim)?;
    let b = normalised(pool, kernels, b, dim)?;
    let (rows, cols) = (a.len() / dim, b.len() / dim);
    let mut out = vec![0.0; rows * cols];
    if !out.is_empty() {
        let packed = Packed::from_f32(cols, dim, &b, pool)?;
        float_matmul(pool, kernels.f32, &packed, &a, Columns::new(&mut out, rows, cols, 0, cols))?;
    }
    Ok(out)
}

/// For each row of `a` the row of `b` with the largest cosine; there must be one. A NaN is below all numbers.
pub fn matches(pool: &Pool, kernels: &Kernels, a: Vec<f32>, b: Vec<f32>, dim: usize) -> Result<Matches> {
    let a = normalised(pool, kernels, a, dim)?;
    let b = normalised(pool, kernels, b, dim)?;
    let cols = b.len() / dim;
    let mut found = Matches::default();
    if a.is_empty() {
        return Ok(found);
    }
    if cols == 0 {
        return Err(Error::argument("features", "at least one token to match with", "none"));
    }
    let packed = Packed::from_f32(cols, dim, &b, pool)?;
    let mut line = vec![0.0; ROWS * cols];
    for part in a.chunks(ROWS * dim) {
        let rows = part.len() / dim;
        let line = &mut line[..rows * cols];
        float_matmul(pool, kernels.f32, &packed, part, Columns::new(line, rows, cols, 0, cols))?;
        let mut tops = vec![(0, 0.0); rows];
        pool.split_rows(&mut tops, 1, &|first, tops| {
            for (top, cosines) in tops.iter_mut().zip(line[first * cols..].chunks_exact(cols)) {
                *top = largest(cosines);
            }
        });
        found.best.extend(tops.iter().map(|top| top.0));
        found.cosine.extend(tops.iter().map(|top| top.1));
    }
    Ok(found)
}

/// The place of the largest number and the number; the first of equal ones, and place 0 where none is a number.
fn largest(numbers: &[f32]) -> (usize, f32) {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = numbers.as_chunks::<LANES>();
    let mut tops = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (top, &number) in tops.iter_mut().zip(chunk) {
            *top = larger(*top, number);
        }
    }
    let top = tops.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, larger);
    let place = numbers.iter().position(|number| number.partial_cmp(&top) == Some(Ordering::Equal));
    (place.unwrap_or(0), top)
}

/// `ToMe`'s bipartite matching (arXiv 2210.09461): tokens in even places are paired with the most similar one in an odd place,
/// and the `count` most similar pairs are returned. The first `protected` tokens are left out on both sides. There are never
/// more pairs than tokens in even places that may go, or none if no token may take them.
pub fn bipartite(
    pool: &Pool,
    kernels: &Kernels,
    features: &[f32],
    dim: usize,
    count: usize,
    protected: usize,
) -> Result<Pairs> {
    if dim == 0 || !features.len().is_multiple_of(dim) {
        return Err(Error::argument("features", format!("rows of {dim} values"), features.len()));
    }
    let n = features.len() / dim;
    let side = |odd: usize| (0..n).filter(move |i| i % 2 == odd && *i >= protected).collect::<Vec<_>>();
    let (from, into) = (side(0), side(1));
    if count == 0 || from.is_empty() || into.is_empty() {
        return Ok(Pairs::default());
    }
    let features = Features { values: features, stride: dim, dim };
    let found = matches(pool, kernels, features.of(&from), features.of(&into), dim)?;
    let mut keep = Vec::new();
    highest(&found.cosine, count, &mut keep);
    Ok(Pairs {
        from: keep.iter().map(|&i| from[i]).collect(),
        into: keep.iter().map(|&i| into[found.best[i]]).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_do_not_matter_and_zeros_match_nothing_better() {
        let (pool, kernels) = (Pool::new(2).expect("threads"), Kernels::best());
        let a = [3.0, 0.0, 0.0, 0.1, -2.0, -2.0, 0.0, 0.0];
        let b = [0.0, 7.0, 1e-3, 0.0, -1.0, -1.0];
        let found = matches(&pool, &kernels, a.to_vec(), b.to_vec(), 2).expect("good");
        assert_eq!(found.best, [1, 0, 2, 0]);
        assert!((found.cosine[2] - 1.0).abs() < 1e-6 && found.cosine[3].abs() < 1e-6);
        let all = cosines(&pool, &kernels, a.to_vec(), b.to_vec(), 2).expect("good");
        assert!((all[2] + 0.5_f32.sqrt()).abs() < 1e-6 && all.len() == 12);
        let refused = |b: &[f32], dim| matches(&pool, &kernels, a.to_vec(), b.to_vec(), dim).is_err();
        assert!(refused(&[], 2) && refused(&b, 3) && refused(&b, 0));
        let none = matches(&pool, &kernels, Vec::new(), Vec::new(), 2);
        assert!(none.is_ok_and(|none| none == Matches::default()));
    }

    #[test]
    fn pairs_cross_between_even_and_odd_places() {
        let (pool, kernels) = (Pool::new(1).expect("one"), Kernels::best());
        // Tokens 2 and 5 point the same way, 4 and 1 nearly, 0 is protected.
        let features = [1.0, 0.0, 0.0, 1.0, -1.0, -1.0, 1.0, 1.0, 0.1, 1.0, -1.0, -1.0];
        let pairs =
            |count, protected| bipartite(&pool, &kernels, &features, 2, count, protected).expect("good");
        assert_eq!(pairs(1, 1), Pairs { from: vec![2], into: vec![5] });
        assert_eq!(pairs(2, 1), Pairs { from: vec![2, 4], into: vec![5, 1] });
        assert_eq!(pairs(9, 1).from, [2, 4]);
        assert_eq!(pairs(9, 2), Pairs { from: vec![2, 4], into: vec![5, 3] });
        assert_eq!((pairs(0, 0), pairs(3, 6)), (Pairs::default(), Pairs::default()));
        assert!(bipartite(&pool, &kernels, &features, 5, 1, 0).is_err());
    }
}
