//! One text in a model: its tokens, their keys and values, and the buffers of the forward pass.
//!
//! What a policy of token reduction does to a prompt is done by [`Session::prefill`] alone; [`Session::forward`] computes
//! every token in full, whatever came before. A reduced prompt is computed in parts of up to [`PART`] tokens. The tokens of a
//! part are chosen among one another, so a part stays or goes as a whole: see [`Session::truncate`].

use std::sync::Arc;

use super::Model;
use super::decoder::Scratch;
use super::reduce::{Plan, Rows};
use super::rope::RopeTable;
use super::sparsity::{Skipped, Sparsity};
use crate::error::{Error, Result};
use crate::kernels::attention::{Branches, KvCache};

/// Tokens computed together. A longer prompt is cut: the buffers stay small and stopping stays quick, while weights are
/// still read once for many tokens. The cut never shows in the result.
const CHUNK: usize = 512;

/// Tokens of a reduced prompt computed together at most: they compete for their places. A longer prompt is cut into equal
/// parts.
pub const PART: usize = 2048;

/// Told the values of a layer: its number, what they are, and the rows.
pub(super) type Tap<'a> = &'a mut dyn FnMut(usize, &'static str, &[f32]);

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
    pub(super) rows: Rows,
    pub(super) plan: Option<Arc<Plan>>,
    pub(super) sparsity: Option<Arc<Sparsity>>,
    pub(super) skipped: Skipped,
    /// What was reduced, in order.
    parts: Vec<Part>,
    /// Tokens of a tree that are in the caches behind those held, until some of them are accepted.
    tree: Vec<u32>,
    branches: Branches,
}

/// A part of a prompt whose tokens were reduced.
#[derive(Debug)]
struct Part {
    start: usize,
    end: usize,
    /// Entries of each layer's cache at its end.
    entries: Vec<usize>, // [layers]
}

impl Session {
    pub(super) fn new(model: &Model, plan: Option<Arc<Plan>>, sparsity: Option<Arc<Sparsity>>) -> Self {
        let cache = |layer: &super::blocks::Layer| {
            // Without attention it counts tokens and holds nothing.
            let (heads, dim) =
                layer.attention.as_ref().map_or((0, 0), |attention| (attention.kv_heads, attention.head_dim));
            KvCache::new(heads, dim, model.kv).with_limit(model.context)
        };
        Self {
            model: model.id,
            tokens: Vec::new(),
            caches: model.weights.layers.iter().map(cache).collect(),
            ropes: model.spec.ropes.iter().map(RopeTable::new).collect(),
            scratch: Scratch::default(),
            rows: Rows::default(),
            plan,
            sparsity,
            skipped: Skipped::default(),
            parts: Vec::new(),
            tree: Vec::new(),
            branches: Branches::default(),
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

    /// Tokens whose keys and values each layer holds: fewer than [`Session::len`] behind layers that dropped some of a prompt.
    pub fn layer_tokens(&self) -> impl ExactSizeIterator<Item = usize> {
        self.caches.iter().map(KvCache::len)
    }

    /// Bytes of the keys and values of these tokens, without the memory for more.
    pub fn kv_bytes(&self) -> usize {
        self.caches.iter().map(KvCache::used_bytes).sum()
    }

    /// Bytes of memory for keys and values.
    pub fn bytes(&self) -> usize {
        self.caches.iter().map(KvCache::bytes).sum()
    }

    /// Forgets all tokens but the first `len`, and returns how many it still holds.
    ///
    /// Those are fewer where `len` lies inside a part of a prompt that was reduced: which tokens stayed depended on those
    /// that would go, so the whole part is forgotten.
    pub fn truncate(&mut self, len: usize) -> usize {
        let mut len = len.min(self.tokens.len());
        while let Some(part) = self.parts.pop_if(|part| len < part.end) {
            len = len.min(part.start);
        }
        self.tokens.truncate(len);
        self.tree.clear();
        let last = self.parts.last();
        for (layer, cache) in self.caches.iter_mut().enumerate() {
            // Behind the last part no token is missing.
            cache.truncate(last.map_or(len, |part| part.entries[layer] + len - part.end));
        }
        len
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
        self.compute(model, tokens, None, want, out, stop)
    }

    /// As [`Session::forward`], but `tokens` are a prompt: the session's policy may reduce them. Without one, or where it
    /// leaves a prompt of this length alone, it is the same in all bits. Of tokens that may be dropped there are no
    /// [`Logits::All`].
    pub fn prefill(
        &mut self,
        model: &Model,
        tokens: &[u32],
        want: Logits,
        out: &mut Vec<f32>,
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        let plan = self.plan.clone().filter(|plan| plan.applies(tokens.len()));
        if want == Logits::All && plan.as_ref().is_some_and(|plan| plan.drops()) {
            return Err(Error::argument("want", "last or none, for tokens of the prompt are dropped", "all"));
        }
        self.compute(model, tokens, plan.as_deref(), want, out, stop)
    }

    /// Computes the nodes of a tree behind the tokens it holds: several continuations in one pass. Replaces `out` with the
    /// logits of all nodes, in all bits those that [`Session::forward`] gives for the tokens on a node's path.
    ///
    /// Node `i` is `tokens[i]` behind node `parents[i]`, which comes before it; node 0 is the root, and its parent is not
    /// looked at. The session holds no more than before until [`Session::accept`] names a path.
    pub fn forward_tree(
        &mut self,
        model: &Model,
        tokens: &[u32],
        parents: &[usize],
        out: &mut Vec<f32>,
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        self.check(model, tokens)?;
        if tokens.len() != parents.len() || tokens.len() > CHUNK {
            let expected = format!("{} parents, and at most {CHUNK}", tokens.len());
            return Err(Error::argument("tree", expected, parents.len()));
        }
        let before = self.len();
        self.truncate(before);
        let mut branches = std::mem::take(&mut self.branches);
        let computed = branches.set(parents).and_then(|()| {
            reserve(out, tokens.len() * model.spec.vocab)?;
            model.pool.region(|| self.chunk(model, tokens, None, Some(&branches), out, stop, None))
        });
        self.branches = branches;
        match computed {
            Ok(()) => self.tree.extend_from_slice(tokens),
            Err(_) => drop(self.truncate(before)),
        }
        computed
    }

    /// Holds the tokens of a path of the tree computed last, and forgets the others. A path begins with the root, 0, and goes
    /// on from each node to one of its children; an empty one forgets the whole tree.
    pub fn accept(&mut self, path: &[usize]) -> Result<()> {
        let is_path =
            path.last().is_none_or(|&last| last < self.tree.len() && self.branches.path(last) == path);
        if !is_path {
            let expected = format!("a path in the tree of {} nodes", self.tree.len());
            return Err(Error::argument("path", expected, format!("{path:?}")));
        }
        let added = self.tree.len();
        for cache in &mut self.caches {
            cache.keep(cache.len() - added, path);
        }
        self.tokens.extend(path.iter().map(|&node| self.tree[node]));
        self.tree.clear();
        Ok(())
    }

    /// Computes `tokens`, at most 512 of them, and shows the values that thresholds of activation sparsity are found by: of
    /// each layer in turn what queries, keys and values read (`qkv`), what the attention's output projection reads (`out`), what
    /// gate and up read (`gate_up`), the activation function's values (`act`), and with a gate what these are multiplied by (`up`). Rows
    /// are those of the tokens; they are as thresholds leave them, but `out`, `act` and `up` as they were before.
    pub fn observe(
        &mut self,
        model: &Model,
        tokens: &[u32],
        show: &mut dyn FnMut(usize, &'static str, &[f32]),
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        self.check(model, tokens)?;
        if tokens.len() > CHUNK {
            return Err(Error::argument("tokens", format!("at most {CHUNK}"), tokens.len()));
        }
        let before = self.len();
        self.truncate(before);
        let computed = model.pool.region(|| self.chunk(model, tokens, None, None, &mut [], stop, Some(show)));
        if computed.is_err() {
            self.truncate(before);
        }
        computed
    }

    /// How it leaves out what is nearly zero, if it does.
    pub fn sparsity(&self) -> Option<&Sparsity> {
        self.sparsity.as_deref()
    }

    /// What was skipped so far.
    pub fn skipped(&self) -> Skipped {
        self.skipped
    }

    fn compute(
        &mut self,
        model: &Model,
        tokens: &[u32],
        plan: Option<&Plan>,
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
        if !self.tree.is_empty() {
            self.truncate(before);
        }
        let together = plan.map_or(CHUNK, |_| tokens.len().div_ceil(tokens.len().div_ceil(PART)));
        let mut done = 0;
        for chunk in tokens.chunks(together) {
            let last = done + chunk.len() == tokens.len();
            let logits = match want {
                Logits::Last if last => &mut out[..],
                Logits::All => &mut out[done * model.spec.vocab..][..chunk.len() * model.spec.vocab],
                Logits::None | Logits::Last => &mut [],
            };
            // One region a chunk: the workers are woken once for all its phases.
            if let Err(error) = model.pool.region(|| self.chunk(model, chunk, plan, None, logits, stop, None))
            {
                self.truncate(before);
                return Err(error);
            }
            done += chunk.len();
            if plan.is_some() {
                let end = self.len();
                let entries = self.layer_tokens().collect();
                self.parts.push(Part { start: end - chunk.len(), end, entries });
            }
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
