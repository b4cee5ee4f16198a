//! One text in a model: its tokens, their keys and values, and the buffers of the forward pass.

use super::Model;
use super::decoder::Scratch;
use super::rope::RopeTable;
use crate::error::{Error, Result};
use crate::kernels::attention::KvCache;

/// Tokens computed together. A longer prompt is cut: the buffers stay small and stopping stays quick, while weights are
/// still read once for many tokens. The cut never shows in the result.
const CHUNK: usize = 512;

/// Which rows of logits a forward pass is to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None; only keys and values are wanted.
    None,
    /// That of the last token.
    Last,
    /// Those of all tokens.
    All,
}

/// A text's keys and values, and scratch memory. Belongs to the model that made it.
#[derive(Debug)]
pub struct Session {
    pub(super) model: u64,
    pub(super) tokens: Vec<u32>,
    pub(super) caches: Vec<KvCache>, // [layers]
    pub(super) ropes: Vec<RopeTable>,
    pub(super) scratch: Scratch,
}

impl Session {
    pub(super) fn new(model: &Model) -> Self {
        let cache = |layer: &super::blocks::Layer| {
            let attention = &layer.attention;
            KvCache::new(attention.kv_heads, attention.head_dim, model.kv).with_limit(model.context)
        };
        Self {
            model: model.id,
            tokens: Vec::new(),
            caches: model.weights.layers.iter().map(cache).collect(),
            ropes: model.spec.ropes.iter().map(RopeTable::new).collect(),
            scratch: Scratch::default(),
        }
    }

    /// Tokens whose keys and values it holds.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of tokens held.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Bytes of its keys and values.
    pub fn bytes(&self) -> usize {
        self.caches.iter().map(KvCache::bytes).sum()
    }

    /// Forgets all tokens but the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        for cache in &mut self.caches {
            cache.truncate(self.tokens.len());
        }
    }

    /// Whether `tokens` may be computed next: there are some, each is in the vocabulary, and they fit into the context.
    pub fn check(&self, model: &Model, tokens: &[u32]) -> Result<()> {
        if self.model != model.id {
            return Err(Error::argument("session", "one made by this model", "one of another model"));
        }
        if tokens.is_empty() {
            return Err(Error::argument("tokens", "at least one", 0));
        }
        let vocab = model.spec.vocab;
        if let Some(position) = tokens.iter().position(|token| *token as usize >= vocab) {
            return Err(Error::Token { token: tokens[position], position, vocab });
        }
        let all = self.len().saturating_add(tokens.len());
        if all > model.context {
            return Err(Error::Context { tokens: all, limit: model.context });
        }
        Ok(())
    }

    /// Computes `tokens` behind those it holds and replaces `out` with the logits asked for, rows of the vocabulary.
    ///
    /// `stop` is polled before every layer; when it says so the result is [`Error::Interrupted`]. After any error the
    /// session holds what it held before.
    pub fn forward(
        &mut self,
        model: &Model,
        tokens: &[u32],
        want: Logits,
        out: &mut Vec<f32>,
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        self.check(model, tokens)?;
        let rows = match want {
            Logits::None => 0,
            Logits::Last => 1,
            Logits::All => tokens.len(),
        };
        reserve(out, rows.saturating_mul(model.spec.vocab))?;
        let before = self.len();
        let mut done = 0;
        for chunk in tokens.chunks(CHUNK) {
            let last = done + chunk.len() == tokens.len();
            let logits = match want {
                Logits::Last if last => &mut out[..],
                Logits::All => &mut out[done * model.spec.vocab..][..chunk.len() * model.spec.vocab],
                Logits::None | Logits::Last => &mut [],
            };
            // One region a chunk: the workers are woken once for all its phases.
            if let Err(error) = model.pool.region(|| self.chunk(model, chunk, logits, stop)) {
                self.truncate(before);
                return Err(error);
            }
            done += chunk.len();
        }
        Ok(())
    }
}

/// Makes `out` hold `len` values.
fn reserve(out: &mut Vec<f32>, len: usize) -> Result<()> {
    if out.len() < len && out.try_reserve(len - out.len()).is_err() {
        return Err(Error::argument("logits", "as many rows as fit into memory", format!("{len} values")));
    }
    out.resize(len, 0.0);
    Ok(())
}
