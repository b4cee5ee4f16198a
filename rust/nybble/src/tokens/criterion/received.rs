//! Attention received.

use super::{Evidence, Score};
use crate::kernels::attention::Statistic;

/// The mean probability a token gets from the queries computed with it that can see it, itself among them, summed over
/// heads.
///
/// Column sums of the attention matrix are the usual measure of a token's use to others (H2O, arXiv 2306.14048; `FastV`,
/// arXiv 2403.06764). Without the division early tokens would score higher only for being seen by more.
pub(super) struct Received;

impl Score for Received {
    fn name(&self) -> &'static str {
        "received"
    }

    fn statistic(&self) -> Option<Statistic> {
        Some(Statistic::Received)
    }

    fn score(&self, evidence: &Evidence<'_>, scores: &mut Vec<f32>) {
        let seen_by = |i: usize| evidence.window.unwrap_or(usize::MAX).min(evidence.n - i);
        scores.clear();
        scores.extend(evidence.measured.iter().enumerate().map(|(i, sum)| sum / seen_by(i) as f32));
    }
}
