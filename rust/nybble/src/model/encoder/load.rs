//! The weights of an encoder.

use std::sync::Arc;

use super::spec::{AttentionPoolSpec, EncoderSpec, Pooling, Reads};
use crate::error::Result;
use crate::model::blocks::{Layer, Mlp, Norm};
use crate::model::checkpoint::Checkpoint;
use crate::model::linear::{Linear, Part};
use crate::model::load::Loader;
use crate::pack::{Layout, Packed};
use crate::threads::Pool;

/// The weights of an encoder.
#[derive(Debug)]
pub(super) struct Weights {
    pub(super) patch: Linear,
    pub(super) learned: Vec<f32>, // [learned, hidden]     tokens before the patches, with their positions
    pub(super) positions: Vec<f32>, // [rows, cols, hidden]  of the patches
    pub(super) embedding_norm: Option<Norm>,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Option<Norm>,
    pub(super) pooling: LoadedPooling,
    pub(super) projection: Option<Linear>,
    pub(super) heads: Vec<(Linear, Reads)>,
}

/// See [`Pooling`].
#[derive(Debug)]
pub(super) enum LoadedPooling {
    Class(Option<Norm>),
    Attention(Box<AttentionPool>),
}

/// See [`AttentionPoolSpec`].
#[derive(Debug)]
pub(super) struct AttentionPool {
    pub(super) heads: usize,
    pub(super) query: Vec<f32>, // [hidden]  the probe, projected
    pub(super) kv: Linear,
    pub(super) out: Linear,
    pub(super) norm: Norm,
    pub(super) mlp: Mlp,
}

impl Weights {
    /// Reads and packs the weights of a validated specification.
    pub(super) fn load(spec: &EncoderSpec, checkpoint: &Checkpoint, pool: &Pool) -> Result<Self> {
        let load = Loader { checkpoint, pool };
        let bias = spec.patch_bias.as_ref().map(|bias| load.tensor(bias)).transpose()?;
        let patch = float(&load.tensor(&spec.patch_weight)?, spec.patch_len(), bias, pool)?;

        let mut learned = Vec::new();
        for token in &spec.prefix {
            learned.extend(load.tensor(token)?);
        }
        let mut positions = load.tensor(&spec.positions)?;
        let patches = positions.split_off(learned.len());
        learned.iter_mut().zip(positions).for_each(|(x, position)| *x += position);
        if let Some(registers) = &spec.registers {
            // They stand behind the class token, which is the only one with a position where there are registers.
            learned.extend(load.tensor(registers)?);
        }
        let pooling = match &spec.pooling {
            Pooling::Class(norm) => LoadedPooling::Class(load.norm(norm.as_ref())?),
            Pooling::Attention(spec) => LoadedPooling::Attention(Box::new(attention_pool(&load, spec)?)),
        };
        let head = |head: &super::spec::HeadSpec| Ok((load.linear(&[&head.linear], None)?, head.reads));
        Ok(Self {
            patch,
            learned,
            positions: patches,
            embedding_norm: load.norm(spec.embedding_norm.as_ref())?,
            layers: spec.layers.iter().map(|layer| load.layer(layer, false)).collect::<Result<_>>()?,
            final_norm: load.norm(spec.final_norm.as_ref())?,
            pooling,
            projection: spec.projection.as_ref().map(|linear| load.linear(&[linear], None)).transpose()?,
            heads: spec.heads.iter().map(head).collect::<Result<_>>()?,
        })
    }

    /// All packed matrices.
    pub(super) fn matrices(&self) -> Vec<&Arc<Packed>> {
        let mut list: Vec<&Arc<Packed>> = self.patch.weights().collect();
        list.extend(self.layers.iter().flat_map(Layer::matrices));
        if let LoadedPooling::Attention(pool) = &self.pooling {
            let linears = [&pool.kv, &pool.out, &pool.mlp.gate_up, &pool.mlp.down];
            list.extend(linears.into_iter().flat_map(Linear::weights));
        }
        list.extend(self.projection.iter().flat_map(Linear::weights));
        list.extend(self.heads.iter().flat_map(|(linear, _)| linear.weights()));
        list
    }

    /// Whether any matrix holds integer codes.
    pub(super) fn quantized(&self) -> bool {
        self.matrices().iter().any(|matrix| matches!(matrix.layout(), Layout::W4 | Layout::W8))
    }
}

/// A linear of plain values, rows of `cols`.
fn float(values: &[f32], cols: usize, bias: Option<Vec<f32>>, pool: &Pool) -> Result<Linear> {
    let rows = values.len().checked_div(cols).unwrap_or(0);
    let weight = Arc::new(Packed::from_f32(rows, cols, values, pool)?);
    Ok(Linear::new(vec![Part { weight, rounding: None }], bias))
}

fn attention_pool(load: &Loader<'_>, spec: &AttentionPoolSpec) -> Result<AttentionPool> {
    let probe = load.tensor(&spec.probe)?;
    let hidden = probe.len();
    let mut weight = load.tensor(&spec.qkv)?;
    let mut bias = load.tensor(&spec.qkv_bias)?;
    let kv = weight.split_off(hidden * hidden);
    let kv_bias = bias.split_off(hidden);
    let dot = |row: &[f32]| row.iter().zip(&probe).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
    let project = |(row, bias): (&[f32], &f32)| (dot(row) + f64::from(*bias)) as f32;
    Ok(AttentionPool {
        heads: spec.heads,
        query: weight.chunks_exact(hidden).zip(&bias).map(project).collect(),
        kv: float(&kv, hidden, Some(kv_bias), load.pool)?,
        out: load.linear(&[&spec.out], None)?,
        norm: load.norm(Some(&spec.norm))?.expect("there is one"),
        mlp: load.mlp(&spec.mlp)?,
    })
}
