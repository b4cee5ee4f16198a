//! What an image encoder is, as data.
//!
//! `ViT`, `DeiT`, `DINOv2` and the vision towers of CLIP and `SigLIP` are one machine: an image is cut into patches, each becomes
//! a token by one matrix, some learned tokens stand before them, positions are added, and layers as a decoder has them follow,
//! in which every token sees all others. The families differ in the tokens before the patches, the place of norms, and in what
//! the image's embedding and class scores are read from.

use crate::model::spec::{Inventory, LayerSpec, LinearSpec, MlpSpec, NormSpec, TensorSpec};
use crate::tokens::PatchPolicy;

/// A whole encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderSpec {
    /// The family's name.
    pub family: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Colour channels.
    pub channels: usize,
    /// Height and width of a patch.
    pub patch: [usize; 2],
    /// Height and width of the images the positions were learned for.
    pub image: [usize; 2],
    /// The patch embedding `[hidden, channels, patch height, patch width]`.
    pub patch_weight: TensorSpec,
    /// Its bias (CLIP has none).
    pub patch_bias: Option<TensorSpec>,
    /// Learned tokens before the patches that have positions: a class token, and `DeiT`'s distillation token.
    pub prefix: Vec<TensorSpec>,
    /// Learned tokens behind the class token that have no positions.
    pub registers: Option<TensorSpec>,
    /// Positions of the prefix and then of the patches, row by row.
    pub positions: TensorSpec,
    /// Whether positions are smoothed where a smaller grid is made of them, as transformers does for the family.
    pub antialias: bool,
    /// Norm of the embedded tokens (CLIP).
    pub embedding_norm: Option<NormSpec>,
    /// The layers in order.
    pub layers: Vec<LayerSpec>,
    /// Norm of all tokens behind the layers.
    pub final_norm: Option<NormSpec>,
    /// What the embedding is made of.
    pub pooling: Pooling,
    /// From the pooled width to the embedding's (CLIP).
    pub projection: Option<LinearSpec>,
    /// The classifiers, whose scores are averaged (`DeiT` has two); none for a model that only embeds.
    pub heads: Vec<HeadSpec>,
}

/// How the tokens of an image become one vector.
#[derive(Debug, Clone, PartialEq)]
pub enum Pooling {
    /// The class token, with a norm of its own (CLIP) or without.
    Class(Option<NormSpec>),
    /// A learned query attends to all tokens (`SigLIP`).
    Attention(Box<AttentionPoolSpec>),
}

/// Attention of one learned query, then a feed-forward block.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionPoolSpec {
    /// Heads.
    pub heads: usize,
    /// The query before its projection.
    pub probe: TensorSpec,
    /// The projections of queries, keys and values, one matrix `[3 hidden, hidden]`.
    pub qkv: TensorSpec,
    /// Their biases.
    pub qkv_bias: TensorSpec,
    /// The output projection.
    pub out: LinearSpec,
    /// Norm before the feed-forward block.
    pub norm: NormSpec,
    /// The feed-forward block.
    pub mlp: MlpSpec,
}

/// A classifier.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadSpec {
    /// The classifier.
    pub linear: LinearSpec,
    /// What it reads.
    pub reads: Reads,
}

/// What a classifier reads, of the tokens behind the final norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// One of the learned tokens.
    Token(usize),
    /// The mean of the patches.
    PatchMean,
    /// The class token and then the mean of the patches.
    ClassAndPatchMean,
}

impl EncoderSpec {
    /// Learned tokens before the patches.
    pub fn learned(&self) -> usize {
        self.prefix.len()
            + self.registers.as_ref().map_or(0, |registers| registers.len() / self.hidden.max(1))
    }

    /// Rows and columns of patches in an image.
    pub fn grid(&self, [height, width]: [usize; 2]) -> [usize; 2] {
        [height / self.patch[0], width / self.patch[1]]
    }

    /// Tokens of an image of that size.
    pub fn tokens(&self, image: [usize; 2]) -> usize {
        let [rows, cols] = self.grid(image);
        self.learned().saturating_add(rows.saturating_mul(cols))
    }

    /// Values of a patch.
    pub fn patch_len(&self) -> usize {
        self.channels.saturating_mul(self.patch[0]).saturating_mul(self.patch[1])
    }

    /// Width of the embedding.
    pub fn embedding(&self) -> usize {
        self.projection.as_ref().map_or(self.hidden, |projection| projection.rows)
    }

    /// Number of classes; 0 without a classifier.
    pub fn labels(&self) -> usize {
        self.heads.first().map_or(0, |head| head.linear.rows)
    }

    /// All weights.
    pub fn inventory(&self) -> Inventory<'_> {
        let mut all = Inventory::default();
        all.tensors.push(&self.patch_weight);
        all.tensors.extend(&self.patch_bias);
        all.tensors.extend(&self.prefix);
        all.tensors.extend(&self.registers);
        all.tensors.push(&self.positions);
        all.norms.extend(&self.embedding_norm);
        for layer in &self.layers {
            all.layer(layer);
        }
        all.norms.extend(&self.final_norm);
        match &self.pooling {
            Pooling::Class(norm) => all.norms.extend(norm),
            Pooling::Attention(pool) => {
                all.tensors.extend([&pool.probe, &pool.qkv, &pool.qkv_bias]);
                all.linears.push(&pool.out);
                all.norms.push(&pool.norm);
                all.mlp(&pool.mlp);
            }
        }
        all.linears.extend(&self.projection);
        all.linears.extend(self.heads.iter().map(|head| &head.linear));
        all
    }

    /// Multiplications with additions that an image of that size takes, in the linears and in attention; choosing tokens is
    /// not counted.
    pub fn macs(&self, image: [usize; 2], policy: Option<&PatchPolicy>) -> u64 {
        let matrix = |linear: &LinearSpec| linear.rows as u64 * linear.cols as u64;
        let learned = self.learned();
        let mut patches = self.tokens(image) - learned;
        let mut sum = patches as u64 * self.patch_len() as u64 * self.hidden as u64;
        for (index, LayerSpec { attention, mlp, .. }) in self.layers.iter().enumerate() {
            let n = (learned + patches) as u64;
            if let Some(attention) = attention {
                let qkv: u64 = attention.qkv.linears().into_iter().map(matrix).sum();
                sum += n * (qkv + matrix(&attention.out)) + 2 * n * n * attention.q_width() as u64;
            }
            let mut behind = n;
            if let Some(policy) = policy {
                patches = policy.left(index, patches);
                if !policy.method.behind_the_layer() {
                    behind = (learned + patches) as u64;
                }
            }
            let mlp = mlp.iter().flat_map(|mlp| mlp.gate.iter().chain([&mlp.up, &mlp.down]));
            sum += behind * mlp.map(matrix).sum::<u64>();
        }
        sum
    }
}
