//! What a generation measured.

use serde::Serialize;

/// Tokens and seconds of one generation.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct GenerationMetrics {
    /// Tokens of the prompt that were computed.
    pub prefill_tokens: usize,
    /// Seconds for them, until the first logits.
    pub prefill_seconds: f64,
    /// Tokens computed after that; of drafts those that were right. The last token given out is never computed, so this is one
    /// less than the number of generated tokens, unless a stop token ended it.
    pub decode_tokens: usize,
    /// Passes of the model for them.
    pub decode_steps: usize,
    /// Seconds for them.
    pub decode_seconds: f64,
    /// Seconds spent choosing tokens.
    pub sample_seconds: f64,
    /// Tokens given out.
    pub generated_tokens: usize,
    /// Tokens whose keys and values each layer held behind the prompt: fewer where some were dropped.
    pub layer_tokens: Vec<usize>,
    /// Bytes of these keys and values.
    pub kv_bytes: usize,
    /// What speculation did; none where it is off.
    pub draft: Option<DraftMetrics>,
    /// What activation sparsity skipped; none where there are no thresholds.
    pub sparsity: Option<SparsityMetrics>,
}

/// What activation sparsity did while tokens were computed one by one.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct SparsityMetrics {
    /// How many times as fast at least three of four whole tokens were with all that pays part by part, measured when the model
    /// was opened or earlier: below 1.02 nothing is skipped. None where nothing pays.
    pub measured_speedup: Option<f64>,
    /// Whether its turns were too scattered to tell, as beside other work: it is measured anew when the model is opened again.
    pub scattered: bool,
    /// Layers in which skipping neurons pays, by times measured on this machine.
    pub sparse_layers: usize,
    /// Feed-forward blocks in which neurons were skipped.
    pub sparse_blocks: u64,
    /// Feed-forward blocks of these layers in which too many neurons were active for that.
    pub dense_blocks: u64,
    /// Linears in which skipping columns pays.
    pub sparse_linears: usize,
    /// Times that columns of one were skipped.
    pub skipped_linears: u64,
    /// Share of the neurons of both that were not active.
    pub inactive_neurons: Option<f64>,
}

/// What speculation did in one generation.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DraftMetrics {
    /// Passes that computed drafts; the other ones of `decode_steps` computed one token.
    pub drafted_steps: usize,
    /// Drafted tokens computed.
    pub drafted_tokens: usize,
    /// Drafted tokens that were right.
    pub accepted_tokens: usize,
    /// How many passes gave 1, 2, 3, ... tokens.
    pub tokens_by_step: Vec<usize>,
    /// Tokens a pass of the model: 1 without speculation, the mean accepted tokens of the literature.
    pub mean_accepted: Option<f64>,
    /// Seconds spent drafting.
    pub draft_seconds: f64,
    /// Seconds of the passes that computed drafts; part of `decode_seconds`.
    pub verify_seconds: f64,
    /// Seconds spent learning from what the model said.
    pub learn_seconds: f64,
    /// Seconds spent measuring what several tokens cost, once for a model and machine.
    pub measure_seconds: f64,
    /// Tokens a second, with drafting and learning.
    pub tokens_per_second: Option<f64>,
    /// Tokens a second that plain decoding would give, by the times of one token in this process.
    pub plain_tokens_per_second: Option<f64>,
}

impl DraftMetrics {
    /// Counts a pass that gave so many tokens, after computing so many drafts.
    pub(crate) fn count(&mut self, tokens: usize, drafted: usize) {
        self.drafted_steps += usize::from(drafted > 0);
        self.drafted_tokens += drafted;
        self.accepted_tokens += tokens.saturating_sub(1);
        self.tokens_by_step.resize(self.tokens_by_step.len().max(tokens), 0);
        if let Some(count) = tokens.checked_sub(1).and_then(|place| self.tokens_by_step.get_mut(place)) {
            *count += 1;
        }
    }
}

impl GenerationMetrics {
    /// Prompt tokens a second.
    pub fn prefill_speed(&self) -> Option<f64> {
        speed(self.prefill_tokens, self.prefill_seconds)
    }

    /// New tokens a second, without choosing them.
    pub fn decode_speed(&self) -> Option<f64> {
        speed(self.decode_tokens, self.decode_seconds)
    }
}

fn speed(tokens: usize, seconds: f64) -> Option<f64> {
    (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
}
