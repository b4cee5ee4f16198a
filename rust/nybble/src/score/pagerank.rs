//! Weighted `PageRank` of the attention graph, head by head.
//!
//! Zero-TPrune (arXiv 2305.17328) lets tokens vote: a token's score is what the others' scores give it through attention,
//!
//! ```text
//! s <- transpose(A) s
//! ```
//!
//! from equal scores, a few times over (Page et al. 1999 add a jump to any token with probability `1 - damping`; there is none
//! here unless asked for). The rows of `A` sum to 1, so the sum of scores stays; the factor `1/N` of the paper's form is a
//! constant that this leaves out. `A` is read row by row, each row multiplied by its token's score and added up, so nothing is
//! transposed and every read is in order.

use std::sync::Mutex;

use super::check;
use crate::error::{Error, Result};
use crate::kernels::elementwise::Elementwise;
use crate::threads::Pool;

/// How to iterate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PageRank {
    /// Most steps.
    pub iterations: usize,
    /// Ends when a step changes scores by less than this: the sum of the absolute changes, of scores with sum 1. With 0 all
    /// steps are done.
    pub tolerance: f32,
    /// Share of the votes; the rest falls on all tokens equally. 1 in the paper.
    pub damping: f32,
    /// The scores to begin with.
    pub start: Start,
}

/// The scores to begin with; they sum to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Start {
    /// All equal.
    Uniform,
    /// One token, the class token, `factor` times the others; the paper's variant has the square root of their number.
    Emphasised {
        /// Which.
        token: usize,
        /// How many times.
        factor: f32,
    },
}

impl Default for PageRank {
    fn default() -> Self {
        Self { iterations: 50, tolerance: 1e-6, damping: 1.0, start: Start::Uniform }
    }
}

/// Scores of each head.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ranks {
    /// `[heads, n]`, each head's with sum 1.
    pub scores: Vec<f32>,
    /// Steps that each head took.
    pub iterations: Vec<usize>,
}

/// The steps that Zero-TPrune takes behind layer `layer` of `depth`: attention of early layers is spread out and its votes
/// take long to settle, that of deep ones is settled already.
///
/// The paper says 30 to 50 in the first three layers, 5 to 10 in the middle ones and 1 in the deep ones. Here it is the smaller
/// number of each range (the residual stop is for the rest), and the last third is deep.
pub fn iterations(layer: usize, depth: usize) -> usize {
    match layer {
        0..3 => 30,
        _ if layer * 3 < depth * 2 => 5,
        _ => 1,
    }
}

/// Scores the `n` tokens of `attention [heads, n, n]`. Heads are shared out to the pool's threads.
pub fn pagerank(
    pool: &Pool,
    kernel: &dyn Elementwise,
    attention: &[f32],
    heads: usize,
    n: usize,
    settings: &PageRank,
) -> Result<Ranks> {
    let square = check(attention, heads, n)?;
    let PageRank { tolerance, damping, start, .. } = *settings;
    if !(0.0..=1.0).contains(&damping) {
        return Err(Error::argument("damping", "a share from 0 to 1", damping));
    }
    if tolerance.is_nan() || tolerance < 0.0 {
        return Err(Error::argument("tolerance", "a number that is not negative", tolerance));
    }
    let mut first = vec![1.0; n];
    if let Start::Emphasised { token, factor } = start {
        if token >= n {
            return Err(Error::argument("start token", format!("one below {n}"), token));
        }
        if !(factor > 0.0 && factor.is_finite()) {
            return Err(Error::argument("start factor", "a positive number", factor));
        }
        first[token] = factor;
    }
    normalise(kernel, &mut first);
    let mut ranks = Ranks { scores: vec![0.0; heads * n], iterations: vec![0; heads] };
    if ranks.scores.is_empty() {
        return Ok(ranks);
    }
    let taken = Mutex::new(&mut ranks.iterations);
    pool.split_rows(&mut ranks.scores, n, &|from, part| {
        let mut next = vec![0.0; n];
        for (head, scores) in (from..).zip(part.chunks_exact_mut(n)) {
            scores.copy_from_slice(&first);
            let graph = &attention[head * square..][..square];
            let steps = iterate(kernel, graph, scores, &mut next, settings);
            taken.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[head] = steps;
        }
    });
    Ok(ranks)
}

/// Steps of one head; returns how many.
fn iterate(
    kernel: &dyn Elementwise,
    graph: &[f32],
    scores: &mut [f32],
    next: &mut [f32],
    settings: &PageRank,
) -> usize {
    let n = scores.len();
    for step in 0..settings.iterations {
        next.fill(0.0);
        kernel.add_rows(next, graph, scores);
        normalise(kernel, next);
        if settings.damping < 1.0 {
            let jump = (1.0 - settings.damping) / n as f32;
            for score in next.iter_mut() {
                *score = settings.damping * *score + jump;
            }
        }
        let change: f32 = scores.iter().zip(&*next).map(|(old, new)| (old - new).abs()).sum();
        scores.copy_from_slice(next);
        if change < settings.tolerance {
            return step + 1;
        }
    }
    settings.iterations
}

/// Gives scores the sum 1, if they have a sum.
fn normalise(kernel: &dyn Elementwise, scores: &mut [f32]) {
    let sum: f32 = scores.iter().sum();
    if sum > 0.0 && sum.is_finite() {
        kernel.scale(scores, 1.0 / sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;

    fn ranks(attention: &[f32], heads: usize, n: usize, settings: &PageRank) -> Ranks {
        let pool = Pool::new(2).expect("threads");
        pagerank(&pool, Kernels::best().elementwise, attention, heads, n, settings).expect("good")
    }

    #[test]
    fn graphs_whose_fixed_point_is_known() {
        // Two states with rates 0.1 and 0.3 out of them: 3 to 1.
        let two = ranks(&[0.9, 0.1, 0.3, 0.7], 1, 2, &PageRank { iterations: 200, ..PageRank::default() });
        assert!((two.scores[0] - 0.75).abs() < 1e-5 && (two.scores[1] - 0.25).abs() < 1e-5);
        assert!(two.iterations[0] < 60);
        // All attend to the last token: one step, and the second to see that nothing changes.
        let sink = ranks(&[0.0, 0.0, 1.0].repeat(3), 1, 3, &PageRank::default());
        assert_eq!((sink.scores.as_slice(), sink.iterations[0]), ([0.0, 0.0, 1.0].as_slice(), 2));
        // A ring is a fixed point from the beginning, though it never settles from another start.
        let ring = [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0];
        let still = ranks(&ring, 1, 3, &PageRank::default());
        assert!(still.iterations[0] == 1 && still.scores.iter().all(|s| (s - 1.0 / 3.0).abs() < 1e-7));
        let start = Start::Emphasised { token: 0, factor: 2.0 };
        let turning = ranks(&ring, 1, 3, &PageRank { iterations: 4, start, ..PageRank::default() });
        assert_eq!(turning.iterations[0], 4);
        assert!((turning.scores[1] - 0.5).abs() < 1e-6, "{turning:?}");
    }

    #[test]
    fn no_steps_and_bad_settings() {
        let start = Start::Emphasised { token: 1, factor: 2.0 };
        let none = ranks(&[0.5; 8], 2, 2, &PageRank { iterations: 0, start, ..PageRank::default() });
        assert_eq!(none.iterations, [0, 0]);
        assert!(none.scores.chunks(2).all(|s| (s[0] - 1.0 / 3.0).abs() < 1e-7));
        let pool = Pool::new(1).expect("one");
        let kernel = Kernels::best().elementwise;
        let good = PageRank::default();
        let refused = |settings| pagerank(&pool, kernel, &[0.5; 4], 1, 2, &settings).is_err();
        assert!(
            refused(PageRank { damping: 1.5, ..good }) && refused(PageRank { damping: f32::NAN, ..good })
        );
        assert!(refused(PageRank { tolerance: -1.0, ..good }));
        assert!(refused(PageRank { start: Start::Emphasised { token: 2, factor: 1.0 }, ..good }));
        assert!(refused(PageRank { start: Start::Emphasised { token: 0, factor: f32::INFINITY }, ..good }));
        assert!(!refused(good));
    }

    #[test]
    fn fewer_steps_the_deeper() {
        let steps: Vec<usize> = (0..12).map(|layer| iterations(layer, 12)).collect();
        assert_eq!(steps, [30, 30, 30, 5, 5, 5, 5, 5, 1, 1, 1, 1]);
    }
}
