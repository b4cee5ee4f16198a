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

use std::cmp::Ordering;
use std::sync::{Mutex, PoisonError};

use super::anderson::Anderson;
use super::{LANES, check};
use crate::error::{Error, Result};
use crate::kernels::attention::{Attention, Graph};
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
    /// Whether each step begins with what the last ones lead to, not with what the last one made (Anderson acceleration): the
    /// same fixed point in far fewer steps.
    pub extrapolate: bool,
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
        Self { iterations: 50, tolerance: 1e-6, damping: 1.0, start: Start::Uniform, extrapolate: false }
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

/// A graph of attention for each head, whose rows sum to 1.
pub trait Votes: Sync {
    /// Number of heads.
    fn heads(&self) -> usize;

    /// Number of tokens.
    fn tokens(&self) -> usize;

    /// For the heads named, in ascending order, `next = transpose(A) scores`; both are `[heads, tokens]`.
    fn pass(&self, pool: &Pool, scores: &[f32], heads: &[usize], next: &mut [f32]);
}

/// Graphs as plain numbers, `[heads, n, n]`.
#[derive(Clone, Copy)]
pub struct Matrices<'a> {
    kernel: &'a dyn Elementwise,
    attention: &'a [f32],
    heads: usize,
    n: usize,
}

impl<'a> Matrices<'a> {
    /// The graphs of `attention [heads, n, n]`.
    pub fn new(kernel: &'a dyn Elementwise, attention: &'a [f32], heads: usize, n: usize) -> Result<Self> {
        check(attention, heads, n)?;
        Ok(Self { kernel, attention, heads, n })
    }
}

impl Votes for Matrices<'_> {
    fn heads(&self) -> usize {
        self.heads
    }

    fn tokens(&self) -> usize {
        self.n
    }

    fn pass(&self, pool: &Pool, scores: &[f32], heads: &[usize], next: &mut [f32]) {
        let n = self.n;
        pool.split_rows(next, n, &|first, part| {
            for (head, next) in (first..).zip(part.chunks_exact_mut(n)) {
                if heads.binary_search(&head).is_ok() {
                    next.fill(0.0);
                    let graph = &self.attention[head * n * n..][..n * n];
                    self.kernel.add_rows(next, graph, &scores[head * n..][..n]);
                }
            }
        });
    }
}

/// Graphs as attention leaves them.
#[derive(Clone, Copy)]
pub struct Recorded<'a> {
    /// The kernel that adds them up.
    pub kernel: &'a dyn Attention,
    /// The graphs.
    pub graph: &'a Graph,
}

impl Votes for Recorded<'_> {
    fn heads(&self) -> usize {
        self.graph.heads()
    }

    fn tokens(&self) -> usize {
        self.graph.len()
    }

    fn pass(&self, pool: &Pool, scores: &[f32], heads: &[usize], next: &mut [f32]) {
        self.graph.pass(pool, self.kernel, scores, heads, next);
    }
}

/// Scores the tokens of `votes`, from the settings' start.
pub fn pagerank(pool: &Pool, votes: &dyn Votes, settings: &PageRank) -> Result<Ranks> {
    let (heads, n) = (votes.heads(), votes.tokens());
    let mut first = vec![1.0; n];
    if let Start::Emphasised { token, factor } = settings.start {
        if token >= n {
            return Err(Error::argument("start token", format!("one below {n}"), token));
        }
        if !(factor > 0.0 && factor.is_finite()) {
            return Err(Error::argument("start factor", "a positive number", factor));
        }
        first[token] = factor;
    }
    settle(pool, votes, settings, first.repeat(heads), &[])
}

/// Scores tokens from the given scores on, `[heads, n]`. Tokens that are `gone` have score 0 and get none: what others give
/// them is lost, and the sum of the others' scores is brought back to 1.
pub fn settle(
    pool: &Pool,
    votes: &dyn Votes,
    settings: &PageRank,
    scores: Vec<f32>,
    gone: &[usize],
) -> Result<Ranks> {
    let (heads, n) = (votes.heads(), votes.tokens());
    let PageRank { iterations, tolerance, damping, extrapolate, .. } = *settings;
    if !(0.0..=1.0).contains(&damping) {
        return Err(Error::argument("damping", "a share from 0 to 1", damping));
    }
    if tolerance.is_nan() || tolerance < 0.0 {
        return Err(Error::argument("tolerance", "a number that is not negative", tolerance));
    }
    if heads.checked_mul(n) != Some(scores.len()) {
        return Err(Error::argument("scores", format!("{heads} x {n}"), scores.len()));
    }
    if let Some(token) = gone.iter().find(|token| **token >= n) {
        return Err(Error::argument("gone tokens", format!("tokens below {n}"), token));
    }
    let mut ranks = Ranks { scores, iterations: vec![0; heads] };
    if ranks.scores.is_empty() {
        return Ok(ranks);
    }
    for scores in ranks.scores.chunks_exact_mut(n) {
        for &token in gone {
            scores[token] = 0.0;
        }
        let factor = one(sum(scores));
        for score in scores {
            *score *= factor;
        }
    }
    let settled = |change: f32| change.partial_cmp(&tolerance) == Some(Ordering::Less);
    let mut next = vec![0.0; heads * n];
    let mut active: Vec<usize> = (0..heads).collect();
    let jump = (1.0 - damping) / (n - gone.len()) as f32;
    // How much a head's last step changed, and what it remembers; each is locked by one thread only.
    let mut states: Vec<Mutex<(f32, Anderson)>> = (0..heads).map(|_| Mutex::default()).collect();
    for step in 1..=iterations {
        votes.pass(pool, &ranks.scores, &active, &mut next);
        for next in next.chunks_exact_mut(n) {
            for &token in gone {
                next[token] = 0.0;
            }
        }
        pool.split_rows(&mut ranks.scores, n, &|first, part| {
            for (head, scores) in (first..).zip(part.chunks_exact_mut(n)) {
                if active.binary_search(&head).is_err() {
                    continue;
                }
                let (change, anderson) = &mut *states[head].lock().unwrap_or_else(PoisonError::into_inner);
                if extrapolate {
                    anderson.before(scores);
                }
                *change = update(scores, &next[head * n..][..n], gone, damping, jump);
                if extrapolate && !settled(*change) && step < iterations {
                    anderson.after(scores);
                }
            }
        });
        for &head in &active {
            ranks.iterations[head] = step;
        }
        active.retain(|&head| !settled(states[head].get_mut().unwrap_or_else(PoisonError::into_inner).0));
        if active.is_empty() {
            break;
        }
    }
    Ok(ranks)
}

/// Takes over the votes of one head, 0 for those gone; returns how much scores change in all.
fn update(scores: &mut [f32], next: &[f32], gone: &[usize], damping: f32, jump: f32) -> f32 {
    let factor = damping * one(sum(next));
    // In lanes: a single chain of additions would take as long as the votes.
    let mut changes = [0.0; LANES];
    let mut take = |lane: usize, score: &mut f32, vote: f32| {
        let new = vote * factor + jump;
        changes[lane] += (*score - new).abs();
        *score = new;
    };
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    let (votes, last) = next.as_chunks::<LANES>();
    for (scores, votes) in chunks.iter_mut().zip(votes) {
        for lane in 0..LANES {
            take(lane, &mut scores[lane], votes[lane]);
        }
    }
    for (score, vote) in rest.iter_mut().zip(last) {
        take(0, score, *vote);
    }
    for &token in gone {
        scores[token] = 0.0;
    }
    changes.iter().sum::<f32>() - jump * gone.len() as f32
}

/// The sum, in lanes and in double precision: what a step leaves undone else shows in the change of the next one.
pub(super) fn sum(scores: &[f32]) -> f64 {
    let (chunks, rest) = scores.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for chunk in chunks {
        for (sum, &score) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(score);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&score| f64::from(score)).sum::<f64>()
}

/// What gives scores of that sum the sum 1, if there is one.
pub(super) fn one(sum: f64) -> f32 {
    if sum > 0.0 && sum.is_finite() { (1.0 / sum) as f32 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;

    fn ranks(attention: &[f32], heads: usize, n: usize, settings: &PageRank) -> Ranks {
        let pool = Pool::new(2).expect("threads");
        let votes = Matrices::new(Kernels::best().elementwise, attention, heads, n).expect("good");
        pagerank(&pool, &votes, settings).expect("good")
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
        let votes = Matrices::new(kernel, &[0.5; 4], 1, 2).expect("good");
        let refused = |settings| pagerank(&pool, &votes, &settings).is_err();
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
