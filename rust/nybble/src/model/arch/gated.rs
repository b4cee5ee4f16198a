//! What Llama, Qwen and Gemma have in common: RMS norms, rotary positions, grouped heads, a gated feed-forward block, and
//! the same weight names. A family says in [`Traits`] where it differs.

use serde_json::Value;

use crate::error::Result;
use crate::model::config::{Reader, brief};
use crate::model::rope::RopeSpec;
use crate::model::spec::{
    Activation, AttentionSpec, BlockNorms, EmbeddingSpec, LayerSpec, LinearSpec, MlpSpec, NormKind, NormSpec,
    Position, Qkv, Role, Spec,
};

/// Name beginnings of these families; a bare model (without head) is saved without `model.`.
pub(super) const PREFIXES: &[(&str, &str)] =
    &[("layers.", "model.layers."), ("embed_tokens.", "model.embed_tokens."), ("norm.", "model.norm.")];

/// Which layers see a window only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Windows {
    /// None, whatever the configuration says.
    Never,
    /// All, when `sliding_window` is set (Mistral).
    All,
    /// By `layer_types`, else from layer `max_window_layers` on when `use_sliding_window` is set (Qwen).
    Late,
    /// By `layer_types`, else all but every `sliding_window_pattern`-th layer (Gemma 3).
    Pattern,
}

/// Where a family differs.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is a part that a family has or has not")]
pub(super) struct Traits {
    pub(super) family: &'static str,
    /// Bias of q, k, v; then of the attention output.
    pub(super) attention_bias: (bool, bool),
    pub(super) mlp_bias: bool,
    /// RMS norm of each query and key head.
    pub(super) qk_norm: bool,
    /// Norm weights are the gain minus one.
    pub(super) norm_plus_one: bool,
    /// Norms also behind the blocks, Gemma's names.
    pub(super) sandwich: bool,
    pub(super) windows: Windows,
    /// Width of a head when the configuration does not say; none means the width over the heads.
    pub(super) default_head_dim: Option<usize>,
    pub(super) default_theta: f64,
    /// The scores are divided by the root of this key's value in place of the head's width.
    pub(super) score_key: Option<&'static str>,
    pub(super) activation_key: &'static str,
    pub(super) default_activation: &'static str,
    pub(super) embedding_scaled: bool,
    pub(super) default_tied: bool,
}

impl Traits {
    /// Plain Llama.
    pub(super) fn llama(family: &'static str) -> Self {
        Self {
            family,
            attention_bias: (false, false),
            mlp_bias: false,
            qk_norm: false,
            norm_plus_one: false,
            sandwich: false,
            windows: Windows::Never,
            default_head_dim: None,
            default_theta: 10_000.0,
            score_key: None,
            activation_key: "hidden_act",
            default_activation: "silu",
            embedding_scaled: false,
            default_tied: false,
        }
    }
}

/// The specification of `config`.
pub(super) fn spec(mut config: Reader<'_>, traits: &Traits) -> Result<Spec> {
    let c = &mut config;
    let hidden = c.size("hidden_size");
    let inner = c.size("intermediate_size");
    let layers = c.layers("num_hidden_layers");
    let heads = c.size("num_attention_heads");
    let kv_heads = c.size_or("num_key_value_heads", heads);
    let vocab = c.size("vocab_size");
    let context = c.size_or("max_position_embeddings", 2048);
    let eps = c.number_or("rms_norm_eps", 1e-6) as f32;
    c.divides(("num_attention_heads", heads), ("num_key_value_heads", kv_heads));
    let head_dim = match (c.opt_size("head_dim"), traits.default_head_dim) {
        (Some(dim), _) | (None, Some(dim)) => dim,
        (None, None) => {
            c.divides(("hidden_size", hidden), ("num_attention_heads", heads));
            (hidden / heads).max(1)
        }
    };
    if !head_dim.is_multiple_of(2) {
        c.problem(format!("head_dim: expected an even number to rotate, found {head_dim}"));
    }
    let name = c.text_or(traits.activation_key, traits.default_activation);
    let gated = |activation: &Activation| matches!(activation, Activation::Silu | Activation::GeluTanh);
    let activation = Activation::parse(name).filter(gated).unwrap_or_else(|| {
        let key = traits.activation_key;
        c.problem(format!("{key}: expected silu or gelu_pytorch_tanh for a gated block, found {name:?}"));
        Activation::Silu
    });
    let score_dim = match traits.score_key {
        Some(key) => c.number_or(key, head_dim as f64),
        None => head_dim as f64,
    };
    let window = c.opt_size("sliding_window");
    let sliding = sliding_layers(c, traits.windows, layers, window);
    let ropes = ropes(c, traits, head_dim, context);
    let softcap = c.opt_number("attn_logit_softcapping").map(|cap| cap as f32);

    let norm = |module: String, dim: usize| NormSpec {
        module,
        kind: NormKind::Rms,
        dim,
        eps,
        plus_one: traits.norm_plus_one,
        affine: true,
    };
    let linear = |module: String, rows: usize, cols: usize, bias: bool, role: Role| LinearSpec {
        module,
        rows,
        cols,
        bias,
        transposed: false,
        role,
    };
    let layer = |i: usize| {
        let at = |rest: &str| format!("model.layers.{i}.{rest}");
        let (qkv_bias, out_bias) = traits.attention_bias;
        let project = |part: &str, heads: usize| {
            let rows = heads.saturating_mul(head_dim);
            linear(at(&format!("self_attn.{part}_proj")), rows, hidden, qkv_bias, Role::Qkv)
        };
        let (q, k, v) = (project("q", heads), project("k", kv_heads), project("v", kv_heads));
        let head_norm = |part: &str| norm(at(&format!("self_attn.{part}_norm")), head_dim);
        let attention = AttentionSpec {
            heads,
            kv_heads,
            groups: None,
            head_dim,
            scale: (1.0 / score_dim.sqrt()) as f32,
            causal: true,
            window: window.filter(|_| sliding[i]),
            softcap,
            // Gemma's second rotary embedding is that of the layers with a window.
            rope: Some(if sliding[i] { ropes.len() - 1 } else { 0 }),
            qk_norms: traits.qk_norm.then(|| (head_norm("q"), head_norm("k"))),
            out: linear(at("self_attn.o_proj"), hidden, q.rows, out_bias, Role::Out),
            qkv: Qkv::Separate { q, k, v },
        };
        let before = |module: &str| Some(norm(at(module), hidden));
        let norms = |pre: &str, post: Option<&str>| BlockNorms {
            pre: before(pre),
            post: post.and_then(before),
            ..BlockNorms::default()
        };
        let mlp = |part: &str, rows: usize, cols: usize, role: Role| {
            linear(at(&format!("mlp.{part}_proj")), rows, cols, traits.mlp_bias, role)
        };
        LayerSpec {
            attention: Some(attention),
            attention_norms: norms("input_layernorm", traits.sandwich.then_some("post_attention_layernorm")),
            mlp: Some(MlpSpec {
                gate: Some(mlp("gate", inner, hidden, Role::GateUp)),
                up: mlp("up", inner, hidden, Role::GateUp),
                down: mlp("down", hidden, inner, Role::Down),
                activation,
            }),
            mlp_norms: if traits.sandwich {
                norms("pre_feedforward_layernorm", Some("post_feedforward_layernorm"))
            } else {
                norms("post_attention_layernorm", None)
            },
        }
    };
    let spec = Spec {
        family: traits.family,
        vocab,
        hidden,
        context,
        embedding: EmbeddingSpec { module: "model.embed_tokens".into(), rows: vocab, cols: hidden },
        embedding_scale: traits.embedding_scaled.then(|| (hidden as f64).sqrt() as f32),
        embedding_norm: None,
        project_in: None,
        position: Position::Rope,
        layers: (0..layers).map(layer).collect(),
        final_norm: Some(norm("model.norm".into(), hidden)),
        project_out: None,
        head: linear("lm_head".into(), vocab, hidden, false, Role::Head),
        tied: c.flag_or("tie_word_embeddings", traits.default_tied),
        logit_softcap: c.opt_number("final_logit_softcapping").map(|cap| cap as f32),
        ropes,
    };
    config.finish(spec)
}

/// The rotary embedding of layers with full attention; for Gemma 3 that of the layers with a window follows.
fn ropes(c: &mut Reader<'_>, traits: &Traits, head_dim: usize, context: usize) -> Vec<RopeSpec> {
    if traits.windows != Windows::Pattern {
        return vec![RopeSpec::read(c, None, "rope_theta", traits.default_theta, head_dim, context)];
    }
    vec![
        RopeSpec::read(c, Some("full_attention"), "rope_theta", traits.default_theta, head_dim, context),
        RopeSpec::read(c, Some("sliding_attention"), "rope_local_base_freq", 10_000.0, head_dim, context),
    ]
}

/// Whether each layer sees a window only.
fn sliding_layers(c: &mut Reader<'_>, windows: Windows, layers: usize, window: Option<usize>) -> Vec<bool> {
    let off = match windows {
        Windows::Never => true,
        Windows::All | Windows::Pattern => window.is_none(),
        Windows::Late => window.is_none() || !c.flag_or("use_sliding_window", false),
    };
    let listed = match (windows, c.get("layer_types")) {
        (Windows::Never | Windows::All, _) | (_, None) => None,
        (_, Some(Value::Array(list))) if list.len() == layers => {
            let mut sliding = Vec::with_capacity(layers);
            for (i, value) in list.iter().enumerate() {
                match value.as_str() {
                    Some("sliding_attention") => sliding.push(true),
                    Some("full_attention") => sliding.push(false),
                    _ => {
                        sliding.push(false);
                        c.problem(format!(
                            "layer_types[{i}]: expected full_attention or sliding_attention, found {}",
                            brief(value)
                        ));
                    }
                }
            }
            Some(sliding)
        }
        (_, Some(other)) => {
            c.problem(format!("layer_types: expected a list of {layers}, found {}", brief(other)));
            None
        }
    };
    match (listed, windows) {
        (Some(sliding), Windows::Pattern) => sliding, // the window's absence does not change which rope a layer has
        (_, _) if off && windows != Windows::Pattern => vec![false; layers],
        (Some(sliding), _) => sliding,
        (None, Windows::Never) => vec![false; layers],
        (None, Windows::All) => vec![true; layers],
        (None, Windows::Late) => {
            let first = c.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28);
            (0..layers).map(|i| i as u64 >= first).collect()
        }
        (None, Windows::Pattern) => {
            let period = c.size_or("sliding_window_pattern", 6);
            (1..=layers).map(|i| i % period != 0).collect()
        }
    }
}
