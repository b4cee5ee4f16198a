//! Whether what was chosen to be skipped makes whole tokens faster.
//!
//! The parts were timed each by itself, with what is active drawn: a token's own inputs may be other than 0 more often, and
//! what a part leaves in the caches, or a thread that comes late to the next one, is seen in whole tokens only. (With two
//! threads the choices of TEAL, each a gain by its own times, once made SmolLM2-135M slower by 3 to 7 %.) So a text is
//! generated twice, token by token in turns, with the choices and without.
//!
//! Of the turns' ratios the lower quartile counts. Their median is within 1 % of what is true on a machine with nothing else to
//! do, but was seen anywhere from 0.93 to 1.1 of equals where other programs took the cores; the quartile then falls, and what
//! nobody can see to be faster stays dense.

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

/// How many times as fast three of four tokens are at least with what `chosen` skips as with what `dense` does, which is
/// nothing; both take the same for zero, so their tokens are the same.
pub(super) fn speedup(model: &Model, dense: Arc<Sparsity>, chosen: Arc<Sparsity>) -> Result<f64> {
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
    ratios.sort_by(f64::total_cmp);
    Ok(ratios[ratios.len() / 4])
}

/// The place of the largest value.
fn largest(values: &[f32]) -> u32 {
    let largest = (0..).zip(values).max_by(|a, b| a.1.total_cmp(b.1));
    largest.map_or(0, |(place, _)| place)
}
