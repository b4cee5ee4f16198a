//! BLOOM: `ALiBi` in place of positions, a norm on the embedding, and one projection with queries, keys and values
//! interleaved head by head.

use serde_json::{Map, Value, json};

use super::gguf::{GgufArch, Metadata, Transform};
use super::{Arch, Builder};
use crate::error::Result;
use crate::model::config::Reader;
use crate::model::spec::{
    Activation, AttentionSpec, BlockNorms, EmbeddingSpec, LayerSpec, LinearSpec, MlpSpec, NormKind, NormSpec,
    Position, Qkv, Role, Spec,
};

pub(super) static ARCH: Arch = Arch {
    family: "bloom",
    model_types: &["bloom"],
    spec: Builder::Decoder(spec),
    prefixes: &[
        ("h.", "transformer.h."),
        ("word_embeddings.", "transformer.word_embeddings."),
        ("word_embeddings_layernorm.", "transformer.word_embeddings_layernorm."),
        ("ln_f.", "transformer.ln_f."),
    ],
    gguf: Some(&GGUF),
};

fn spec(config: &Value) -> Result<Spec> {
    let mut config = Reader::new(config)?;
    let c = &mut config;
    // The oldest configurations say n_embed, num_hidden_layers and num_attention_heads.
    let either = |c: &Reader<'_>, new: &'static str, old: &'static str| {
        if c.get(new).is_none() && c.get(old).is_some() { old } else { new }
    };
    let width = either(c, "n_embed", "hidden_size");
    let (layer_key, head_key) =
        (either(c, "n_layer", "num_hidden_layers"), either(c, "n_head", "num_attention_heads"));
    let hidden = if c.get(width).is_some() { c.size(width) } else { c.size("hidden_size") };
    let layers = c.layers(layer_key);
    let heads = c.size(head_key);
    let vocab = c.size("vocab_size");
    // ALiBi has no last position; the training length is what the quality was measured on.
    let context = c.size_or("seq_length", 2048);
    let eps = c.number_or("layer_norm_epsilon", 1e-5) as f32;
    let residual_is_normed = c.flag_or("apply_residual_connection_post_layernorm", false);
    c.divides((width, hidden), (head_key, heads));

    let norm = |module: String| NormSpec {
        module,
        kind: NormKind::Layer,
        dim: hidden,
        eps,
        plus_one: false,
        affine: true,
    };
    let linear = |module: String, rows: usize, cols: usize, role: Role| LinearSpec {
        module,
        rows,
        cols,
        bias: true,
        transposed: false,
        role,
    };
    let head_dim = (hidden / heads).max(1);
    let inner = hidden.saturating_mul(4);
    let layer = |i: usize| {
        let at = |rest: &str| format!("transformer.h.{i}.{rest}");
        let norms = |module: &str| BlockNorms {
            pre: Some(norm(at(module))),
            residual_is_normed,
            ..BlockNorms::default()
        };
        let qkv = linear(at("self_attention.query_key_value"), hidden.saturating_mul(3), hidden, Role::Qkv);
        LayerSpec {
            attention: Some(AttentionSpec {
                heads,
                kv_heads: heads,
                groups: None,
                head_dim,
                scale: (1.0 / (head_dim as f64).sqrt()) as f32,
                causal: true,
                window: None,
                softcap: None,
                rope: None,
                qkv: Qkv::Fused { linear: qkv, per_head: true },
                qk_norms: None,
                out: linear(at("self_attention.dense"), hidden, hidden, Role::Out),
            }),
            attention_norms: norms("input_layernorm"),
            mlp: Some(MlpSpec {
                gate: None,
                up: linear(at("mlp.dense_h_to_4h"), inner, hidden, Role::GateUp),
                down: linear(at("mlp.dense_4h_to_h"), hidden, inner, Role::Down),
                activation: Activation::GeluTanh,
            }),
            mlp_norms: norms("post_attention_layernorm"),
        }
    };
    let spec = Spec {
        family: "bloom",
        vocab,
        hidden,
        context,
        embedding: EmbeddingSpec { module: "transformer.word_embeddings".into(), rows: vocab, cols: hidden },
        embedding_scale: None,
        embedding_norm: Some(norm("transformer.word_embeddings_layernorm".into())),
        project_in: None,
        position: Position::Alibi,
        ropes: Vec::new(),
        layers: (0..layers).map(layer).collect(),
        final_norm: Some(norm("transformer.ln_f".into())),
        project_out: None,
        head: LinearSpec { bias: false, ..linear("lm_head".into(), vocab, hidden, Role::Head) },
        tied: c.flag_or("tie_word_embeddings", true),
        logit_softcap: None,
    };
    config.finish(spec)
}

static GGUF: GgufArch = GgufArch {
    name: "bloom",
    config: gguf_config,
    tensors: &[
        ("token_embd", "transformer.word_embeddings"),
        ("token_embd_norm", "transformer.word_embeddings_layernorm"),
        ("output_norm", "transformer.ln_f"),
        ("output", "lm_head"),
    ],
    block: "transformer.h",
    block_tensors: &[
        ("attn_norm", "input_layernorm"),
        ("attn_qkv", "self_attention.query_key_value"),
        ("attn_output", "self_attention.dense"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_up", "mlp.dense_h_to_4h"),
        ("ffn_down", "mlp.dense_4h_to_h"),
    ],
    transform,
};

fn gguf_config(meta: &Metadata<'_>) -> Result<Map<String, Value>> {
    let mut config = meta.base("bloom")?;
    config.insert("hidden_size".into(), json!(meta.need("embedding_length")?));
    config.insert("n_layer".into(), json!(meta.need("block_count")?));
    config.insert("n_head".into(), json!(meta.need("attention.head_count")?));
    config.insert("seq_length".into(), json!(meta.size("context_length")?.unwrap_or(2048)));
    config.insert(
        "layer_norm_epsilon".into(),
        json!(meta.number("attention.layer_norm_epsilon")?.unwrap_or(1e-5)),
    );
    // Converters write a copy of the embedding as the head.
    config.insert("tie_word_embeddings".into(), json!(true));
    Ok(config)
}

/// The converter sorted the rows `[head][q, k, v][d]` into `[q, k, v][head][d]`.
fn transform(name: &str, rows: usize, spec: &Spec) -> Transform {
    let attention = spec.layers.first().and_then(|layer| layer.attention.as_ref());
    let Some((heads, dim)) = attention.map(|attention| (attention.heads, attention.head_dim)) else {
        return Transform::None;
    };
    if !name.contains(".query_key_value.") || rows != heads.saturating_mul(3).saturating_mul(dim) {
        return Transform::None;
    }
    let stored = |row: usize| {
        let (head, part, i) = (row / (3 * dim), row / dim % 3, row % dim);
        ((part * heads + head) * dim + i) as u32
    };
    Transform::Rows((0..rows).map(stored).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimal_config_and_the_order_of_rows() {
        let config =
            json!({"model_type": "bloom", "hidden_size": 12, "n_layer": 1, "n_head": 3, "vocab_size": 50});
        let good = spec(&config).expect("good");
        assert!(good.tied && good.embedding_norm.is_some() && good.position == Position::Alibi);
        assert!(good.linears().iter().all(|linear| linear.bias));
        assert_eq!(good.layers[0].mlp.as_ref().expect("whole").up.rows, 48);
        let Transform::Rows(map) =
            transform("transformer.h.0.self_attention.query_key_value.bias", 36, &good)
        else {
            panic!("reordered")
        };
        assert_eq!(map[4..8], [12, 13, 14, 15]); // keys of head 0 stand behind the queries of all heads
        assert_eq!(map[12], 4); // queries of head 1
        let old = json!({"model_type": "bloom", "n_embed": 12, "num_hidden_layers": 1, "num_attention_heads": 3,
            "vocab_size": 50});
        assert_eq!(spec(&old).expect("good"), good);
        let lies = json!({"model_type": "bloom", "hidden_size": 13, "n_layer": 0, "n_head": 3});
        let message = spec(&lies).map_err(|e| e.to_string()).expect_err("lies");
        assert!(
            ["hidden_size", "n_layer", "vocab_size"].iter().all(|word| message.contains(word)),
            "{message}"
        );
    }
}
