//! Whether what was chosen to be skipped makes whole tokens faster.
//!
//! The parts were timed each by itself, with what is active drawn: a token's own inputs may be other than 0 more often, and
//! what a part leaves in the caches, or a thread that comes late to the next one, is seen in whole tokens only. (With two
//! threads the choices of TEAL, each a gain by its own times, once made SmolLM2-135M slower by 3 to 7 %.) So a text is
//! generated twice, token by token in turns, with the choices and without.
//!
//! Of the turns' ratios the lower quartile counts. Their median is within 1 % of what is true on a machine with nothing else to
//! do, but was seen anywhere from 0.93 to 1.1 of equals where other programs took the cores; the quartile then falls, and what
//! nobody can see to be faster stays dense. Where the quartiles lie on both sides of what is enough, and far apart, that is
//! said of this moment, not of the machine: it is not to be remembered.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Sparsity;
use crate::error::Result;
use crate::model::{Logits, Model, Session};

/// Tokens of both, at most and at least; the least are enough when they have taken as long as [`ENOUGH`].
const TOKENS: usize = 40;
const FEWEST: usize = 8;
const ENOUGH: Duration = Duration::from_millis(800);

/// Tokens that are not timed: buffers get their memory, and the first one is unlike all others to models.
const WARMUP: usize = 2;

/// Quartiles further apart than this, several times what must be gained, are those of a machine that does other work, too.
const SCATTER: f64 = 0.05;

/// Ratios of turns, sparse tokens against dense ones: how many times as fast what `chosen` skips is as what `dense` does, which
/// is nothing; both take the same for zero, so their tokens are the same.
pub(super) fn ratios(model: &Model, dense: Arc<Sparsity>, chosen: Arc<Sparsity>) -> Result<Vec<f64>> {
    let mut sessions = [dense, chosen].map(|sparsity| Session::new(model, None, Some(sparsity)));
    let mut ratios = Vec::with_capacity(TOKENS);
    let (mut token, mut logits) = (0, Vec::new());
    let begin = Instant::now();
    for turn in 0..WARMUP + TOKENS {
        if turn >= WARMUP + FEWEST && begin.elapsed() > ENOUGH {
            break;
        }
        if sessions[0].len() == model.context() {
            for session in &mut sessions {
                session.truncate(0);
            }
        }
        let mut seconds = [0.0; 2];
        // Either is first every other time.
        for which in [turn % 2, 1 - turn % 2] {
            let begin = Instant::now();
            sessions[which].forward(model, &[token], Logits::Last, &mut logits, &|| false)?;
            seconds[which] = begin.elapsed().as_secs_f64().max(1e-9);
        }
        token = largest(&logits);
        if turn >= WARMUP {
            ratios.push(seconds[0] / seconds[1]);
        }
    }
    Ok(ratios)
}

/// How many times as fast three of four tokens are at least, by the ratios of one turn or more; and whether these are too
/// scattered to tell on which side of `enough` that is.
pub(super) fn judge(mut ratios: Vec<f64>, enough: f64) -> (f64, bool) {
    ratios.sort_by(f64::total_cmp);
    let quarter = ratios.len() / 4;
    let (low, high) = (ratios[quarter], ratios[ratios.len() - 1 - quarter]);
    (low, low < enough && enough <= high && high - low > SCATTER)
}

/// The place of the largest value.
fn largest(values: &[f32]) -> u32 {
    let largest = (0..).zip(values).max_by(|a, b| a.1.total_cmp(b.1));
    largest.map_or(0, |(place, _)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_far_apart_and_on_both_sides_tell_nothing() {
        // Eight turns: the third and the sixth are the quartiles.
        for (low, high, expected) in [
            (0.90, 1.15, (0.90, true)),
            (0.90, 1.01, (0.90, false)), // slower, as seen by three of four
            (1.03, 1.40, (1.03, false)), // faster, as seen by three of four
            (1.00, 1.04, (1.00, false)), // near to enough, but near to each other
        ] {
            let ratios = vec![high, 9.0, low, high, 0.1, low, 9.0, 0.1];
            assert_eq!(judge(ratios, 1.02), expected);
        }
        assert_eq!(judge(vec![1.5], 1.02), (1.5, false));
    }
}
