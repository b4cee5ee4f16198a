//! What an open model is made of, for `inspect`, `bench` and reports.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::Model;
use crate::pack::Packed;
use crate::tokens::Policy;

/// Sizes, kernels and memory of an open model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Info {
    /// The family.
    pub family: String,
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads of a layer; of pruned ones the most.
    pub heads: usize,
    /// Key and value heads of a layer; of pruned ones the most.
    pub kv_heads: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Most tokens of a session.
    pub context: usize,
    /// Number of weights; a head that shares the embedding counts once.
    pub parameters: u64,
    /// Bytes of packed weights by layout (`w4`, `w8`, `f32`, `f16`, `bf16`).
    pub weight_bytes: BTreeMap<String, u64>,
    /// Type of cached keys and values: `f32`, `f16` or `int8`.
    pub kv_type: String,
    /// Bytes that one token's keys and values take.
    pub kv_bytes_per_token: usize,
    /// The policy by which tokens of prompts are reduced.
    pub tokens: Option<Policy>,
    /// The kernel of every operation, as `operation/tier`.
    pub kernels: Vec<String>,
    /// Number of threads.
    pub threads: usize,
}

/// Bytes of packed matrices by layout.
pub(super) fn layout_bytes(matrices: &[&Arc<Packed>]) -> BTreeMap<String, u64> {
    let mut bytes = BTreeMap::new();
    for matrix in matrices {
        *bytes.entry(matrix.layout().name().to_owned()).or_default() += matrix.bytes() as u64;
    }
    bytes
}

pub(super) fn info(model: &Model) -> Info {
    let attentions = || model.spec.layers.iter().filter_map(|layer| layer.attention.as_ref());
    let kv_width: usize = attentions().map(|attention| 2 * attention.kv_width()).sum();
    let kv_heads: usize = attentions().map(|attention| attention.kv_heads).sum();
    Info {
        family: model.spec.family.into(),
        layers: model.spec.layers.len(),
        hidden: model.spec.hidden,
        heads: attentions().map(|attention| attention.heads).max().unwrap_or(0),
        kv_heads: attentions().map(|attention| attention.kv_heads).max().unwrap_or(0),
        vocab: model.spec.vocab,
        context: model.context,
        parameters: model.spec.parameters(),
        weight_bytes: layout_bytes(&model.weights.matrices()),
        kv_type: model.kv.name().into(),
        kv_bytes_per_token: kv_width * model.kv.bytes() + kv_heads * model.kv.scale_bytes(),
        tokens: model.settings.tokens.clone(),
        kernels: model.kernels.names(),
        threads: model.pool.threads(),
    }
}
