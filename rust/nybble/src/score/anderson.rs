//! Anderson acceleration (Anderson, J. ACM 12, 1965) of steps towards a fixed point.
//!
//! With `g` what a step makes of `x` and `f = g - x`, the next step begins with that mixture of what the last ones made in
//! which their changes cancel best:
//!
//! ```text
//! x = g - c_1 Δg_1 - c_2 Δg_2,   c = argmin |f - c_1 Δf_1 - c_2 Δf_2|
//! ```
//!
//! `Δ_1` and `Δ_2` are the differences between the last three steps. With one of them alone attention of DINOv2-S takes up to
//! twice as many steps to settle, with three or five as many.

use super::dot;
use super::pagerank::{one, sum};

/// Two differences are taken for one where less than this share of their squares is not common to both.
const PARALLEL: f64 = 1e-10;

/// What is remembered of the steps of one head.
#[derive(Debug, Default)]
pub(super) struct Anderson {
    /// Scores before the step.
    x: Vec<f32>,
    /// What the last step made, and how much it changed.
    last: Option<Step>,
    /// The latest differences between steps, the latest first.
    differences: [Option<Step>; 2],
}

#[derive(Debug)]
struct Step {
    g: Vec<f32>,
    f: Vec<f32>,
}

impl Anderson {
    /// Remembers the scores before a step.
    pub(super) fn before(&mut self, scores: &[f32]) {
        self.x.clear();
        self.x.extend_from_slice(scores);
    }

    /// Turns what a step made into what the next one is to begin with: scores that are not negative and sum to 1.
    pub(super) fn after(&mut self, scores: &mut [f32]) {
        let f: Vec<f32> = scores.iter().zip(&self.x).map(|(g, x)| g - x).collect();
        let step = Step { g: scores.to_vec(), f };
        if let Some(last) = &mut self.last {
            for (last, now) in [(&mut last.g, &step.g), (&mut last.f, &step.f)] {
                last.iter_mut().zip(now).for_each(|(last, now)| *last = now - *last);
            }
            self.differences.swap(0, 1);
            self.differences[0] = self.last.take();
        }
        if let [Some(first), second] = &self.differences {
            let parts = mixture(first, second.as_ref(), &step.f);
            for (part, difference) in parts.into_iter().zip([Some(first), second.as_ref()]) {
                if let Some(difference) = difference.filter(|_| part.is_finite()) {
                    scores.iter_mut().zip(&difference.g).for_each(|(x, dg)| *x -= part * dg);
                }
            }
            // Scores that are no numbers stay none.
            scores.iter_mut().filter(|x| **x < 0.0).for_each(|x| *x = 0.0);
            let factor = one(sum(scores));
            for x in scores {
                *x *= factor;
            }
        }
        self.last = Some(step);
    }
}

/// How much of each difference takes most of `f` away.
fn mixture(first: &Step, second: Option<&Step>, f: &[f32]) -> [f32; 2] {
    let a = &first.f;
    let (aa, af) = (dot(a, a), dot(a, f));
    if let Some(Step { f: b, .. }) = second {
        let (ab, bb, bf) = (dot(a, b), dot(b, b), dot(b, f));
        let determinant = aa * bb - ab * ab;
        if determinant > PARALLEL * aa * bb {
            return [(bb * af - ab * bf) / determinant, (aa * bf - ab * af) / determinant].map(|c| c as f32);
        }
    }
    [if aa > 0.0 { (af / aa) as f32 } else { 0.0 }, 0.0]
}
