//! The parts of a layer, with their packed weights.

use std::sync::Arc;

use super::linear::{Linear, Run};
use super::spec::{Activation, NormKind};
use crate::pack::Packed;

/// A norm.
#[derive(Debug)]
pub(super) struct Norm {
    pub(super) kind: NormKind,
    pub(super) eps: f32,
    pub(super) gain: Vec<f32>,         // [dim]
    pub(super) bias: Option<Vec<f32>>, // [dim]
}

impl Norm {
    /// One row.
    pub(super) fn row(&self, run: Run<'_>, x: &[f32], out: &mut [f32]) {
        match self.kind {
            NormKind::Rms => run.kernels.norm.rms(x, &self.gain, self.eps, out),
            NormKind::Layer => run.kernels.norm.layer(x, &self.gain, self.bias.as_deref(), self.eps, out),
        }
    }

    /// All rows of `x [n, dim]`.
    pub(super) fn rows(&self, run: Run<'_>, x: &[f32], out: &mut [f32]) {
        let dim = self.gain.len();
        run.pool.split_rows(out, dim, &|first, rows| {
            for (i, out) in rows.chunks_exact_mut(dim).enumerate() {
                self.row(run, &x[(first + i) * dim..][..dim], out);
            }
        });
    }
}

/// The norms around a residual block, see [`super::spec::BlockNorms`].
#[derive(Debug)]
pub(super) struct Block {
    pub(super) pre: Option<Norm>,
    pub(super) post: Option<Norm>,
    pub(super) after: Option<Norm>,
    pub(super) scale: Option<Vec<f32>>, // [hidden]
    pub(super) residual_is_normed: bool,
}

impl Block {
    /// What computes a row of the block's input from `x [n, hidden]`: `pre(x)`, or `x` itself.
    pub(super) fn enter<'a>(&'a self, run: Run<'a>, x: &'a [f32]) -> impl Fn(usize, &mut [f32]) + Sync + 'a {
        move |row, out| {
            let x = &x[row * out.len()..][..out.len()];
            match &self.pre {
                Some(norm) => norm.row(run, x, out),
                None => out.copy_from_slice(x),
            }
        }
    }
}

/// Attention.
#[derive(Debug)]
pub(super) struct Attention {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) scale: f32,
    pub(super) causal: bool,
    pub(super) window: Option<usize>,
    pub(super) softcap: Option<f32>,
    pub(super) slopes: Option<Vec<f32>>, // [heads]
    pub(super) rope: Option<usize>,
    pub(super) qkv: Linear,
    pub(super) q_norm: Option<Norm>,
    pub(super) k_norm: Option<Norm>,
    pub(super) out: Linear,
}

/// The feed-forward part.
#[derive(Debug)]
pub(super) struct Mlp {
    /// Width between the linears.
    pub(super) inner: usize,
    pub(super) gated: bool,
    pub(super) activation: Activation,
    /// The gate's outputs, if there is one, and then `up`'s.
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
}

impl Mlp {
    /// `act(gate) * up`, or `act(up)`, of one row.
    pub(super) fn activate(&self, run: Run<'_>, gate_up: &[f32], out: &mut [f32]) {
        let elementwise = run.kernels.elementwise;
        if self.gated {
            let (gate, up) = gate_up.split_at(self.inner);
            match self.activation {
                Activation::Silu => elementwise.silu_mul(gate, up, out),
                // The other activations are refused for gated blocks when the configuration is read.
                _ => elementwise.gelu_tanh_mul(gate, up, out),
            }
            return;
        }
        out.copy_from_slice(gate_up);
        match self.activation {
            Activation::GeluTanh => elementwise.gelu_tanh(out),
            Activation::GeluErf => elementwise.gelu_erf(out),
            Activation::GeluQuick => elementwise.gelu_quick(out),
            // Plain SiLU is refused when the configuration is read.
            Activation::Relu | Activation::Silu => elementwise.relu(out),
        }
    }
}

/// A layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attention: Attention,
    pub(super) attention_block: Block,
    pub(super) mlp: Mlp,
    pub(super) mlp_block: Block,
}

impl Layer {
    /// Its packed matrices.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Arc<Packed>> {
        let linears = [&self.attention.qkv, &self.attention.out, &self.mlp.gate_up, &self.mlp.down];
        linears.into_iter().flat_map(Linear::weights)
    }
}
