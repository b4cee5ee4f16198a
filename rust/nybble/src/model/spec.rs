//! What a transformer is, as data: the parts all have, and the decoder made of them. The image encoder is in
//! [`super::encoder::spec`].
//!
//! The families read here (Llama, Qwen, Gemma, OPT, BLOOM, GPT-2) are one machine with different parts fitted: a kind of
//! norm and where it stands, a way to tell positions, a gated or a plain feed-forward block. A [`Spec`] lists the parts a
//! model has, the names of their weights and their sizes. It is made from `config.json` by one file a family (`arch/`) and
//! read by everything else: the loader, the decoder, and compression, which asks [`Spec::linears`] what there is to
//! quantize without knowing the family.
//!
//! Sizes stand with each layer, not with the model, so a layer that was cut narrower than its neighbours is nothing
//! special. No size here has been compared with a weight yet: that is `validate`'s work, before anything is allocated.

use super::rope::RopeSpec;

/// Most layers a configuration may name; the deepest published models have a few hundred.
pub const MAX_LAYERS: usize = 4096;

/// A whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// The family's name, as `model_type` spells it.
    pub family: &'static str,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Most positions the model was made for.
    pub context: usize,
    /// The token embedding.
    pub embedding: EmbeddingSpec,
    /// Factor on embedded tokens (Gemma: the square root of the width).
    pub embedding_scale: Option<f32>,
    /// Norm of embedded tokens (BLOOM).
    pub embedding_norm: Option<NormSpec>,
    /// From the embedding's width to the model's (some OPT).
    pub project_in: Option<LinearSpec>,
    /// How positions are told apart.
    pub position: Position,
    /// The rotary embeddings that layers refer to by index.
    pub ropes: Vec<RopeSpec>,
    /// The layers in order.
    pub layers: Vec<LayerSpec>,
    /// Norm before the head.
    pub final_norm: Option<NormSpec>,
    /// From the model's width to the head's (some OPT).
    pub project_out: Option<LinearSpec>,
    /// The head; when `tied`, its weight is the embedding's.
    pub head: LinearSpec,
    /// Whether head and embedding share one matrix.
    pub tied: bool,
    /// Logits become `cap * tanh(logits / cap)`.
    pub logit_softcap: Option<f32>,
}

/// How a model tells positions apart.
#[derive(Debug, Clone, PartialEq)]
pub enum Position {
    /// Queries and keys are rotated, see [`AttentionSpec::rope`].
    Rope,
    /// A learned vector is added; position `i` uses row `i + offset`.
    Learned {
        /// The table.
        table: EmbeddingSpec,
        /// Rows before position 0.
        offset: usize,
    },
    /// Scores are lowered in proportion to the distance.
    Alibi,
}

/// One layer: attention, then a feed-forward block. Pruning may have taken away either.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// The attention part.
    pub attention: Option<AttentionSpec>,
    /// The norms around attention.
    pub attention_norms: BlockNorms,
    /// The feed-forward part.
    pub mlp: Option<MlpSpec>,
    /// The norms around the feed-forward part.
    pub mlp_norms: BlockNorms,
}

/// The norms of a residual block `f`: `x = after(residual + post(f(pre(x))))`, each of them optional.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BlockNorms {
    /// Norm of the block's input.
    pub pre: Option<NormSpec>,
    /// Norm of the block's output, before it is added (Gemma 3).
    pub post: Option<NormSpec>,
    /// Norm of the sum (the oldest transformers and OPT-350m).
    pub after: Option<NormSpec>,
    /// Factors of what is added, one a column: `x = after(residual + scale * post(f(pre(x))))` (layer scale).
    pub scale: Option<TensorSpec>,
    /// The residual is `pre(x)` in place of `x` (a BLOOM option).
    pub residual_is_normed: bool,
}

/// Attention of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads` where `groups` does not say otherwise.
    pub kv_heads: usize,
    /// Where key heads have different numbers of query heads, the first query head of each, and behind the last one `heads`.
    pub groups: Option<Vec<usize>>,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Whether a query sees the keys up to its own position only.
    pub causal: bool,
    /// A query sees the keys at a distance below this.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// Index into [`Spec::ropes`].
    pub rope: Option<usize>,
    /// The projections of queries, keys and values.
    pub qkv: Qkv,
    /// Norms of each query head and each key head.
    pub qk_norms: Option<(NormSpec, NormSpec)>,
    /// The output projection.
    pub out: LinearSpec,
}

impl AttentionSpec {
    /// Columns of all query heads.
    pub fn q_width(&self) -> usize {
        self.heads.saturating_mul(self.head_dim)
    }

    /// Columns of all key heads, and of all value heads.
    pub fn kv_width(&self) -> usize {
        self.kv_heads.saturating_mul(self.head_dim)
    }
}

/// How the query, key and value projections are stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Qkv {
    /// Three matrices.
    Separate {
        /// Queries.
        q: LinearSpec,
        /// Keys.
        k: LinearSpec,
        /// Values.
        v: LinearSpec,
    },
    /// One matrix.
    Fused {
        /// All of it.
        linear: LinearSpec,
        /// Rows are `[head][q, k, v][head_dim]` (BLOOM) and not `[q, k, v][head][head_dim]` (GPT-2).
        per_head: bool,
    },
}

impl Qkv {
    /// The stored matrices in the order queries, keys, values.
    pub fn linears(&self) -> Vec<&LinearSpec> {
        match self {
            Self::Separate { q, k, v } => vec![q, k, v],
            Self::Fused { linear, .. } => vec![linear],
        }
    }
}

/// The feed-forward block `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpSpec {
    /// The gate.
    pub gate: Option<LinearSpec>,
    /// Into the inner width.
    pub up: LinearSpec,
    /// Back to the model's width.
    pub down: LinearSpec,
    /// The nonlinearity.
    pub activation: Activation,
}

/// The nonlinearities of feed-forward blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// GELU by the tanh approximation.
    GeluTanh,
    /// GELU by the error function.
    GeluErf,
    /// GELU by the logistic function, `x / (1 + exp(-1.702 x))`.
    GeluQuick,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// The activation of that name in a `config.json`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "silu" | "swish" => Some(Self::Silu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate" | "gelu_python_tanh" => {
                Some(Self::GeluTanh)
            }
            "gelu" | "gelu_python" => Some(Self::GeluErf),
            "quick_gelu" => Some(Self::GeluQuick),
            "relu" => Some(Self::Relu),
            _ => None,
        }
    }

    /// A short name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::GeluTanh => "gelu_tanh",
            Self::GeluErf => "gelu_erf",
            Self::GeluQuick => "gelu_quick",
            Self::Relu => "relu",
        }
    }
}

/// The kind of a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `x / rms(x) * gain`.
    Rms,
    /// `(x - mean) / deviation * gain + bias`.
    Layer,
}

/// One norm.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    /// Module path; the tensors are `<module>.weight` and `<module>.bias`.
    pub module: String,
    /// Which formula.
    pub kind: NormKind,
    /// Width.
    pub dim: usize,
    /// Added to the mean square or the variance.
    pub eps: f32,
    /// The stored weight is the gain minus one (Gemma).
    pub plus_one: bool,
    /// Whether it has weights at all (an OPT option leaves them out).
    pub affine: bool,
}

impl NormSpec {
    /// Whether a bias is stored.
    pub fn has_bias(&self) -> bool {
        self.affine && self.kind == NormKind::Layer
    }
}

/// What a linear does; compression chooses bits by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Queries, keys, values.
    Qkv,
    /// Attention output.
    Out,
    /// Into the feed-forward block.
    GateUp,
    /// Out of the feed-forward block.
    Down,
    /// Between the embedding's width and the model's.
    Project,
    /// Logits.
    Head,
}

impl Role {
    /// A short name for reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::Out => "out",
            Self::GateUp => "gate_up",
            Self::Down => "down",
            Self::Project => "project",
            Self::Head => "head",
        }
    }
}

/// One linear, `y = W x + b`.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearSpec {
    /// Module path, such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// The plain weight is stored `[cols, rows]` (the `Conv1D` of GPT-2). Packed weights are `[rows, cols]` always.
    pub transposed: bool,
    /// What it is for.
    pub role: Role,
}

impl LinearSpec {
    /// Name of the plain weight.
    pub fn weight(&self) -> String {
        format!("{}.weight", self.module)
    }

    /// The class names a quantization target may call it by, own class first.
    pub fn classes(&self) -> &'static [&'static str] {
        if self.transposed { &["Conv1D", "Linear"] } else { &["Linear"] }
    }
}

/// A tensor of floats that is neither a linear's, a table's nor a norm's.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().fold(1, |product, &size| product.saturating_mul(size))
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One embedding table.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingSpec {
    /// Module path.
    pub module: String,
    /// Entries.
    pub rows: usize,
    /// Width.
    pub cols: usize,
}

impl EmbeddingSpec {
    /// Name of the plain weight.
    pub fn weight(&self) -> String {
        format!("{}.weight", self.module)
    }
}

/// The weights that a model needs, by kind: what validation compares with a file and compression goes through.
#[derive(Debug, Default)]
pub struct Inventory<'a> {
    /// Every linear with a weight of its own, in the order of the forward pass. A tied head is not among them.
    pub linears: Vec<&'a LinearSpec>,
    /// The token embedding first, then the position table; an image encoder has none.
    pub embeddings: Vec<&'a EmbeddingSpec>,
    /// Every norm, in the order of the forward pass.
    pub norms: Vec<&'a NormSpec>,
    /// Whatever else there is.
    pub tensors: Vec<&'a TensorSpec>,
}

impl<'a> Inventory<'a> {
    /// Adds the weights of a layer.
    pub(super) fn layer(&mut self, layer: &'a LayerSpec) {
        let LayerSpec { attention, attention_norms, mlp, mlp_norms } = layer;
        self.norms.extend(&attention_norms.pre);
        if let Some(attention) = attention {
            self.linears.extend(attention.qkv.linears());
            self.linears.push(&attention.out);
            self.norms.extend(attention.qk_norms.iter().flat_map(|(q, k)| [q, k]));
        }
        for norms in [&attention_norms.post, &attention_norms.after] {
            self.norms.extend(norms);
        }
        if let Some(mlp) = mlp {
            self.mlp(mlp);
        }
        for norms in [&mlp_norms.pre, &mlp_norms.post, &mlp_norms.after] {
            self.norms.extend(norms);
        }
        self.tensors.extend([&attention_norms.scale, &mlp_norms.scale].into_iter().flatten());
    }

    /// Adds the linears of a feed-forward block.
    pub(super) fn mlp(&mut self, mlp: &'a MlpSpec) {
        self.linears.extend(&mlp.gate);
        self.linears.extend([&mlp.up, &mlp.down]);
    }

    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        let matrix = |rows: usize, cols: usize| (rows as u64).saturating_mul(cols as u64);
        let linears = self.linears.iter().map(|linear| {
            matrix(linear.rows, linear.cols) + if linear.bias { linear.rows as u64 } else { 0 }
        });
        let tables = self.embeddings.iter().map(|table| matrix(table.rows, table.cols));
        let norms = self
            .norms
            .iter()
            .map(|norm| norm.dim as u64 * (u64::from(norm.affine) + u64::from(norm.has_bias())));
        let tensors = self.tensors.iter().map(|tensor| tensor.len() as u64);
        linears.chain(tables).chain(norms).chain(tensors).fold(0, u64::saturating_add)
    }
}

impl Spec {
    /// All weights.
    pub fn inventory(&self) -> Inventory<'_> {
        let mut all = Inventory::default();
        all.linears.extend(&self.project_in);
        all.embeddings.push(&self.embedding);
        if let Position::Learned { table, .. } = &self.position {
            all.embeddings.push(table);
        }
        all.norms.extend(&self.embedding_norm);
        for layer in &self.layers {
            all.layer(layer);
        }
        all.linears.extend(&self.project_out);
        if !self.tied {
            all.linears.push(&self.head);
        }
        all.norms.extend(&self.final_norm);
        all
    }

    /// Every linear with a weight of its own, in the order of the forward pass. A tied head is not among them.
    pub fn linears(&self) -> Vec<&LinearSpec> {
        self.inventory().linears
    }

    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        self.inventory().parameters()
    }

    /// Head slopes of `ALiBi`: powers of `2^(-8/n)` for `n` heads; with `n` between two powers of two, every second slope of
    /// the next power fills up.
    pub fn alibi_slopes(heads: usize) -> Vec<f32> {
        let power = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
        let slope = |n: usize, i: usize| (-8.0 * i as f64 / n as f64).exp2() as f32;
        let base = (1..=power).map(|i| slope(power, i));
        base.chain((1..).step_by(2).map(|i| slope(2 * power, i))).take(heads).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alibi_slopes_are_geometric_and_fill_up_from_the_next_power() {
        let eight = Spec::alibi_slopes(8);
        assert_eq!(eight, (1..=8).map(|i| 0.5_f32.powi(i)).collect::<Vec<_>>());
        let six = Spec::alibi_slopes(6);
        assert_eq!(&six[..4], &[0.25, 0.0625, 0.015_625, 0.003_906_25]);
        assert_eq!(&six[4..], &[0.5, 0.125]);
        assert!(Spec::alibi_slopes(0).is_empty());
    }
}
