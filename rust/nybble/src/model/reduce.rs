//! Token reduction at work: a policy made to fit a model, and the rows of one pass.
//!
//! At a pruning layer the tokens are scored when attention has been computed. Dropped ones leave behind the attention's
//! residual: the layer's own keys and values have all tokens, its feed-forward block and everything deeper only those that
//! stay. Tokens of 4 bits all stay; the inputs of their linears behind attention are rounded to 4 bits, in that layer and in
//! all deeper ones.

use super::blocks::Attention;
use super::linear::Linear;
use super::load::Weights;
use super::spec::{Position, Spec};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::kernels::attention::{self, KvCache, Shape};
use crate::threads::Pool;
use crate::tokens::criterion::Evidence;
use crate::tokens::{Action, Policy, Positions, budget, gather, select};

/// A policy that fits a model.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    pub(super) policy: Policy,
    /// Pruning layers, ascending.
    layers: Vec<usize>,
}

impl Plan {
    /// Checks a policy against a model whose sessions hold at most `context` tokens.
    pub(super) fn new(policy: Policy, spec: &Spec, weights: &Weights, context: usize) -> Result<Self> {
        policy.check()?;
        let depth = spec.layers.len();
        let layers = policy.layers.clone().unwrap_or_else(|| budget::default_layers(depth));
        if let Some(layer) = layers.last().filter(|layer| **layer >= depth) {
            return Err(Error::argument("tokens.layers", format!("layers below {depth}"), layer));
        }
        if let Some(layer) = layers.iter().find(|layer| spec.layers[**layer].attention.is_none()) {
            return Err(Error::argument("tokens.layers", "layers with attention", layer));
        }
        if layers.is_empty() {
            let detail =
                "the first layer is never the only one that prunes, unless it is named in tokens.layers";
            return Err(Error::unsupported(format!("token pruning in a model of {depth} layer(s)"), detail));
        }
        match policy.action {
            Action::Drop if policy.positions == Positions::Kept => {
                // A kernel knows a key by its place in the cache, which with gaps is not its position.
                let detail = "they go by position, and the cache keeps none for the tokens left; \
                    tokens.positions \"renumbered\" is";
                let window = spec.layers.iter().find_map(|layer| layer.attention.as_ref()?.window);
                if let Some(window) = window.filter(|window| *window < context) {
                    let item = format!("token pruning with kept positions and a window of {window} tokens");
                    return Err(Error::unsupported(item, detail));
                }
                if spec.position == Position::Alibi {
                    return Err(Error::unsupported("token pruning with kept positions and ALiBi", detail));
                }
            }
            Action::FourBit => {
                let bytes = weights.layers.iter().any(|layer| {
                    let out = layer.attention.iter().map(|attention| &attention.out);
                    let mut linears = out.chain(layer.mlp.iter().flat_map(|mlp| [&mlp.gate_up, &mlp.down]));
                    linears.any(Linear::takes_bytes)
                });
                if !bytes {
                    let item = "tokens.action \"4bit\" for a model without 8-bit inputs of linears";
                    return Err(Error::unsupported(item, "a model compressed with activations of 8 bits is"));
                }
            }
            Action::Drop => {}
        }
        Ok(Self { policy, layers })
    }

    /// Whether it does anything to a prompt of `n` tokens.
    pub(super) fn applies(&self, n: usize) -> bool {
        n >= self.policy.min_prompt.max(2) && self.policy.ratio > 0.0
    }

    /// Whether tokens leave.
    pub(super) fn drops(&self) -> bool {
        self.policy.action == Action::Drop
    }

    /// Whether tokens behind dropped ones have the positions of the text.
    pub(super) fn keeps_positions(&self) -> bool {
        self.policy.positions == Positions::Kept
    }

    /// How many of `n` tokens are left as they are behind a layer, if it is a pruning layer.
    fn kept(&self, layer: usize, n: usize) -> Option<usize> {
        let step = self.layers.binary_search(&layer).ok()? + 1;
        Some(budget::kept(n, self.policy.ratio, step, self.layers.len()))
    }
}

/// The rows of one pass; its memory is kept.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// Tokens the pass began with.
    all: usize,
    /// Where the rows' tokens stand in the text.
    positions: Vec<usize>,
    /// Whether inputs have 4 bits; empty if none have.
    low: Vec<bool>,
    measured: Vec<f32>,
    scores: Vec<f32>,
    keep: Vec<usize>,
}

impl Rows {
    /// Begins a pass of `n` tokens from position `start` on.
    pub(super) fn begin(&mut self, start: usize, n: usize) {
        self.all = n;
        self.positions.clear();
        self.positions.extend(start..start + n);
        self.low.clear();
    }

    /// Ends it: rows of later passes are as they come.
    pub(super) fn end(&mut self) {
        self.positions.clear();
        self.low.clear();
    }

    /// Positions of the rows in the text; empty outside of a pass.
    pub(super) fn positions(&self) -> &[usize] {
        &self.positions
    }

    /// Flags of the rows whose inputs have 4 bits; empty if none have.
    pub(super) fn low(&self) -> &[bool] {
        &self.low
    }

    /// Behind the attention of `layer`, whose queries are `q`: finds the rows to keep, or to round to 4 bits. Says whether any
    /// rows are to leave, by [`Rows::leave`].
    #[expect(clippy::too_many_arguments, reason = "what attention was computed with, and where")]
    pub(super) fn choose(
        &mut self,
        (pool, kernels): (&Pool, &Kernels),
        plan: &Plan,
        layer: usize,
        shape: &Shape<'_>,
        attention: &Attention,
        cache: &KvCache,
        (q, stride): (&[f32], usize),
        scratch: &mut attention::Scratch,
    ) -> Result<bool> {
        let n = self.positions.len();
        let Some(count) = plan.kept(layer, self.all) else { return Ok(false) };
        let fewer = match plan.policy.action {
            Action::Drop => count < n,
            Action::FourBit => count < n - self.low.iter().filter(|low| **low).count(),
        };
        if !fewer {
            return Ok(false);
        }
        let criterion = plan.policy.criterion;
        self.measured.clear();
        if let Some(statistic) = criterion.statistic() {
            let (out, kernel) = (&mut self.measured, kernels.attention);
            attention::statistics(pool, kernel, shape, cache, q, stride, n, statistic, out, scratch)?;
        }
        let evidence = Evidence {
            n,
            measured: &self.measured[self.measured.len().saturating_sub(n)..],
            window: attention.window,
            positions: &self.positions,
            layer,
            seed: plan.policy.seed,
        };
        criterion.score(&evidence, &mut self.scores);
        for (score, low) in self.scores.iter_mut().zip(&self.low) {
            if *low {
                *score = f32::NEG_INFINITY; // 4 bits are for good
            }
        }
        // The last token gives the logits, and the first one is where heads attend that have nothing to say.
        let first = usize::from(self.positions[0] == 0);
        self.scores[..first].fill(f32::INFINITY);
        self.scores[n - 1] = f32::INFINITY;
        select::highest(&self.scores, count.max(first + 1), &mut self.keep);
        if plan.policy.action == Action::FourBit {
            self.low.clear();
            self.low.resize(n, true);
            self.keep.iter().for_each(|row| self.low[*row] = false);
            return Ok(false);
        }
        Ok(self.keep.len() < n)
    }

    /// Takes the rows that are not kept out of `x [n, width]`; returns how many are left.
    pub(super) fn leave(&mut self, x: &mut Vec<f32>, width: usize) -> usize {
        let n = self.keep.len();
        gather(x, width, &self.keep);
        x.truncate(n * width);
        gather(&mut self.positions, 1, &self.keep);
        self.positions.truncate(n);
        n
    }
}
