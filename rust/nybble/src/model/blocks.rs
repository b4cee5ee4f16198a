//! The parts of a layer, with their packed weights.

use std::sync::Arc;

use super::linear::{Linear, Part, Run, list_where};
use super::spec::{Activation, NormKind};
use crate::error::Result;
use crate::kernels::quantize::{Activations, Source};
use crate::kernels::w4a8_sparse::{sparse_columns, sparse_rows};
use crate::pack::{Bundles, Packed};

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
    pub(super) groups: Option<Vec<usize>>, // [kv_heads + 1]
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
    /// `act(gate) * up`, or `act(up)`, of one row, and 0 where `act` is not above `least`, which is empty or has a
    /// threshold for each neuron.
    pub(super) fn activate(&self, run: Run<'_>, gate_up: &[f32], least: &[f32], out: &mut [f32]) {
        let elementwise = run.kernels.elementwise;
        if self.gated {
            let (gate, up) = gate_up.split_at(self.inner);
            match (self.activation, least.is_empty()) {
                (Activation::Silu, true) => elementwise.silu_mul(gate, up, out),
                (Activation::Silu, false) => elementwise.silu_mul_above(gate, up, least, out),
                // The other activations are refused for gated blocks when the configuration is read.
                (_, true) => elementwise.gelu_tanh_mul(gate, up, out),
                (_, false) => elementwise.gelu_tanh_mul_above(gate, up, least, out),
            }
            return;
        }
        out.copy_from_slice(gate_up);
        self.act(run, out);
        for (value, least) in out.iter_mut().zip(least) {
            *value = if value.abs() <= *least { 0.0 } else { *value };
        }
    }

    /// The activation function.
    pub(super) fn act(&self, run: Run<'_>, x: &mut [f32]) {
        let elementwise = run.kernels.elementwise;
        match self.activation {
            Activation::Silu => elementwise.silu(x),
            Activation::GeluTanh => elementwise.gelu_tanh(x),
            Activation::GeluErf => elementwise.gelu_erf(x),
            Activation::GeluQuick => elementwise.gelu_quick(x),
            Activation::Relu => elementwise.relu(x),
        }
    }

    /// The matrices before and behind the neurons, if a gate that reads what `up` reads decides on these.
    pub(super) fn neurons(&self) -> Option<(&Part, &Part)> {
        match (self.gate_up.plain_parts()?, self.down.plain_parts()?) {
            ([_, up], [down]) => Some((up, down)),
            _ => None,
        }
    }

    /// `y = down(act * up(x))` of one row by the neurons that are active. `act` is 0 or more for the others and becomes what
    /// `down` reads; `rounded` holds `x` as the gate read it.
    pub(super) fn skip(
        &self,
        run: Run<'_>,
        bundles: &Bundles,
        Active { list, picked }: &mut Active,
        act: &mut [f32],
        rounded: &mut Activations,
        y: &mut [f32],
    ) -> Result<()> {
        let Some((_, Part { weight, rounding: Some(rounding) })) = self.neurons() else {
            unreachable!("bundles are made of rounded matrices");
        };
        let kernel = run.kernels.w4a8_sparse;
        let picked = &mut picked[..list.len()];
        sparse_rows(run.pool, kernel, bundles, rounded, 0, list, picked)?;
        let mut next = 0;
        for (&n, up) in list.iter().zip(&*picked) {
            let n = n as usize;
            act[next..n].fill(0.0);
            act[n] *= up;
            next = n + 1;
        }
        act[next..].fill(0.0);
        let (inner, group) = (&mut Source::Given(act), weight.group());
        rounded.quantize_source(
            run.pool,
            run.kernels.quantize,
            inner,
            1,
            weight.cols(),
            group,
            *rounding,
            &[],
        )?;
        sparse_columns(run.pool, kernel, bundles, rounded, 0, list, y)
    }
}

/// The neurons of one token that are active.
#[derive(Debug, Default)]
pub(super) struct Active {
    /// Their numbers, ascending.
    pub(super) list: Vec<u32>,
    picked: Vec<f32>,
}

impl Active {
    /// Lists the neurons whose `act` is above their threshold.
    pub(super) fn find(&mut self, act: &[f32], least: &[f32]) {
        self.picked.resize(act.len(), 0.0);
        let above = |(act, least): (&f32, &f32)| act.abs() > *least || act.is_nan();
        list_where(&mut self.list, act.iter().zip(least).map(above));
    }
}

/// A layer; pruning may have taken away either part.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attention: Option<Attention>,
    pub(super) attention_block: Block,
    pub(super) mlp: Option<Mlp>,
    pub(super) mlp_block: Block,
}

impl Layer {
    /// Its packed matrices.
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Arc<Packed>> {
        let attention = self.attention.iter().flat_map(|attention| [&attention.qkv, &attention.out]);
        let mlp = self.mlp.iter().flat_map(|mlp| [&mlp.gate_up, &mlp.down]);
        attention.chain(mlp).flat_map(Linear::weights)
    }
}
