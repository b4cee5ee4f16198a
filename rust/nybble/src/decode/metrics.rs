//! What a generation measured.

use serde::Serialize;

/// Tokens and seconds of one generation.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct GenerationMetrics {
    /// Tokens of the prompt that were computed.
    pub prefill_tokens: usize,
    /// Seconds for them, until the first logits.
    pub prefill_seconds: f64,
    /// Tokens computed one at a time after that. The last token given out is never computed, so this is one less than the
    /// number of generated tokens, unless a stop token ended it.
    pub decode_tokens: usize,
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
