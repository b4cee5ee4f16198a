//! Attention to the first token.

use super::{Evidence, Score};
use crate::kernels::attention::Statistic;

/// The probability a token gives to the text's first one, summed over heads (Agile-Quant, arXiv 2312.05693, section "Token
/// Pruning": tokens that hardly attend to the start token are the least important ones).
///
/// The first token gives itself all of it, so it always scores highest. Work on attention sinks reads the same signal the
/// other way round: attention to the first token is what a head gives when it has nothing to say (`StreamingLLM`, arXiv
/// 2309.17453). Measure it beside the others.
pub(super) struct Start;

impl Score for Start {
    fn name(&self) -> &'static str {
        "start"
    }

    fn statistic(&self) -> Option<Statistic> {
        Some(Statistic::Given { key: 0 })
    }

    fn score(&self, evidence: &Evidence<'_>, scores: &mut Vec<f32>) {
        scores.clear();
        scores.extend_from_slice(evidence.measured);
    }
}
