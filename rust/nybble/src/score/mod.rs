//! How much a token matters, and which tokens are alike: pure functions on arrays.
//!
//! Attention is a graph: token `i` points to token `j` with the weight that the softmax gives. [`pagerank()`] finds the tokens
//! on which that graph's votes gather, [`heads`] makes one score of the heads', [`received`] and [`query_row`] are the plain
//! sums that simpler methods use, and [`similarity`] compares tokens' features and pairs the ones that are alike.
//! [`crate::tokens::select::highest`] picks the best without sorting.
//!
//! Attention matrices are `[heads, n, n]`, rows are queries and sum to 1. Every function gives the same bits for any number
//! of threads.

#![forbid(unsafe_code)]

mod anderson;
pub mod heads;
pub mod pagerank;
pub mod similarity;

pub use pagerank::{Matrices, PageRank, Ranks, Recorded, Start, Votes, pagerank};

use crate::error::{Error, Result};
use crate::kernels::elementwise::Elementwise;
use crate::threads::Pool;

/// Numbers side by side, for the compiler to take together.
const LANES: usize = 16;

/// The sum of products, in lanes and in double precision.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let ((chunks, rest), (others, last)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (chunk, other) in chunks.iter().zip(others) {
        for (sum, (&a, &b)) in sums.iter_mut().zip(chunk.iter().zip(other)) {
            *sum += f64::from(a) * f64::from(b);
        }
    }
    let rest = rest.iter().zip(last).map(|(&a, &b)| f64::from(a) * f64::from(b));
    sums.into_iter().chain(rest).sum()
}

/// Checks that `attention` is `[heads, n, n]`, and returns `n * n`.
fn check(attention: &[f32], heads: usize, n: usize) -> Result<usize> {
    let square = n.checked_mul(n);
    if square.and_then(|square| square.checked_mul(heads)) != Some(attention.len()) {
        let expected = format!("{heads} x {n} x {n} values");
        return Err(Error::argument("attention", expected, attention.len()));
    }
    Ok(n * n)
}

/// Attention received: for each token the mean over heads and queries of what they give it; sums to 1.
pub fn received(
    pool: &Pool,
    kernel: &dyn Elementwise,
    attention: &[f32],
    heads: usize,
    n: usize,
) -> Result<Vec<f32>> {
    let square = check(attention, heads, n)?;
    let mut sums = vec![0.0; heads * n];
    if sums.is_empty() {
        return Ok(vec![0.0; n]);
    }
    let weights = vec![1.0 / (heads * n) as f32; n];
    pool.split_rows(&mut sums, n, &|first, part| {
        for (head, sums) in (first..).zip(part.chunks_exact_mut(n)) {
            kernel.add_rows(sums, &attention[head * square..][..square], &weights);
        }
    });
    let mut all = vec![0.0; n];
    sums.chunks_exact(n).for_each(|sums| kernel.add_assign(&mut all, sums));
    Ok(all)
}

/// What one query gives each token, the mean over heads: the class token's row is the score of `EViT` and many others.
pub fn query_row(
    kernel: &dyn Elementwise,
    attention: &[f32],
    heads: usize,
    n: usize,
    query: usize,
) -> Result<Vec<f32>> {
    let square = check(attention, heads, n)?;
    if query >= n {
        return Err(Error::argument("query", format!("a token below {n}"), query));
    }
    let mut all = vec![0.0; n];
    for head in 0..heads {
        kernel.add_assign(&mut all, &attention[head * square + query * n..][..n]);
    }
    kernel.scale(&mut all, 1.0 / heads.max(1) as f32);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;

    #[test]
    fn sums_of_a_graph_by_hand() {
        let (pool, kernels) = (Pool::new(2).expect("threads"), Kernels::best());
        #[rustfmt::skip]
        let attention = [
            0.5, 0.5,  0.0, 1.0,
            1.0, 0.0,  0.25, 0.75,
        ];
        let found = received(&pool, kernels.elementwise, &attention, 2, 2).expect("good");
        assert_eq!(found, [1.75 / 4.0, 2.25 / 4.0]);
        let row = query_row(kernels.elementwise, &attention, 2, 2, 1).expect("good");
        assert_eq!(row, [0.125, 0.875]);
        assert!(query_row(kernels.elementwise, &attention, 2, 2, 2).is_err());
        assert!(received(&pool, kernels.elementwise, &attention, 1, 2).is_err());
        assert!(received(&pool, kernels.elementwise, &[], 0, 3).is_ok_and(|zeros| zeros == [0.0; 3]));
        assert!(received(&pool, kernels.elementwise, &[], 3, 0).is_ok_and(|none| none.is_empty()));
        assert!(received(&pool, kernels.elementwise, &[], usize::MAX, usize::MAX).is_err());
    }
}
