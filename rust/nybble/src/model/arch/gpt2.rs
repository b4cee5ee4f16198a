//! GPT-2: learned positions, layer norms, tanh GELU, and linears stored `[inputs, outputs]` (`Conv1D`).

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
    family: "gpt2",
    model_types: &["gpt2"],
    spec: Builder::Decoder(spec),
    prefixes: &[
        ("h.", "transformer.h."),
        ("wte.", "transformer.wte."),
        ("wpe.", "transformer.wpe."),
        ("ln_f.", "transformer.ln_f."),
    ],
    gguf: Some(&GGUF),
};

fn spec(config: &Value) -> Result<Spec> {
    let mut config = Reader::new(config)?;
    let c = &mut config;
    let hidden = c.size("n_embd");
    let layers = c.layers("n_layer");
    let heads = c.size("n_head");
    let vocab = c.size("vocab_size");
    let context =
        if c.get("n_positions").is_none() { c.size_or("n_ctx", 1024) } else { c.size("n_positions") };
    let inner = c.size_or("n_inner", hidden.saturating_mul(4));
    let eps = c.number_or("layer_norm_epsilon", 1e-5) as f32;
    c.divides(("n_embd", hidden), ("n_head", heads));
    if c.flag_or("add_cross_attention", false) {
        c.problem("add_cross_attention: expected false, found true (half of an encoder-decoder)");
    }
    let scaled = c.flag_or("scale_attn_weights", true);
    let by_depth = c.flag_or("scale_attn_by_inverse_layer_idx", false);
    let name = c.text_or("activation_function", "gelu_new");
    let activation = Activation::parse(name).filter(|a| *a != Activation::Silu).unwrap_or_else(|| {
        c.problem(format!("activation_function: expected relu or a gelu, found {name:?}"));
        Activation::GeluTanh
    });

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
        transposed: true,
        role,
    };
    let head_dim = (hidden / heads).max(1);
    let layer = |i: usize| {
        let at = |rest: &str| format!("transformer.h.{i}.{rest}");
        let norms = |module: &str| BlockNorms { pre: Some(norm(at(module))), ..BlockNorms::default() };
        let width = if scaled { (head_dim as f64).sqrt() } else { 1.0 };
        let depth = if by_depth { (i + 1) as f64 } else { 1.0 };
        let qkv = linear(at("attn.c_attn"), hidden.saturating_mul(3), hidden, Role::Qkv);
        LayerSpec {
            attention: Some(AttentionSpec {
                heads,
                kv_heads: heads,
                groups: None,
                head_dim,
                scale: (1.0 / width / depth) as f32,
                causal: true,
                window: None,
                softcap: None,
                rope: None,
                qkv: Qkv::Fused { linear: qkv, per_head: false },
                qk_norms: None,
                out: linear(at("attn.c_proj"), hidden, hidden, Role::Out),
            }),
            attention_norms: norms("ln_1"),
            mlp: Some(MlpSpec {
                gate: None,
                up: linear(at("mlp.c_fc"), inner, hidden, Role::GateUp),
                down: linear(at("mlp.c_proj"), hidden, inner, Role::Down),
                activation,
            }),
            mlp_norms: norms("ln_2"),
        }
    };
    let table = |module: &str, rows: usize| EmbeddingSpec { module: module.into(), rows, cols: hidden };
    let head = linear("lm_head".into(), vocab, hidden, Role::Head);
    let spec = Spec {
        family: "gpt2",
        vocab,
        hidden,
        context,
        embedding: table("transformer.wte", vocab),
        embedding_scale: None,
        embedding_norm: None,
        project_in: None,
        position: Position::Learned { table: table("transformer.wpe", context), offset: 0 },
        ropes: Vec::new(),
        layers: (0..layers).map(layer).collect(),
        final_norm: Some(norm("transformer.ln_f".into())),
        project_out: None,
        head: LinearSpec { bias: false, transposed: false, ..head },
        tied: c.flag_or("tie_word_embeddings", true),
        logit_softcap: None,
    };
    config.finish(spec)
}

static GGUF: GgufArch = GgufArch {
    name: "gpt2",
    config: gguf_config,
    tensors: &[
        ("token_embd", "transformer.wte"),
        ("position_embd", "transformer.wpe"),
        ("output_norm", "transformer.ln_f"),
        ("output", "lm_head"),
    ],
    block: "transformer.h",
    block_tensors: &[
        ("attn_norm", "ln_1"),
        ("attn_qkv", "attn.c_attn"),
        ("attn_output", "attn.c_proj"),
        ("ffn_norm", "ln_2"),
        ("ffn_up", "mlp.c_fc"),
        ("ffn_down", "mlp.c_proj"),
    ],
    // The converter stores linears [outputs, inputs].
    transform: |name, _, _| {
        let conv = [".c_attn.weight", ".c_proj.weight", ".c_fc.weight"];
        if conv.iter().any(|end| name.ends_with(end)) { Transform::Transposed } else { Transform::None }
    },
};

fn gguf_config(meta: &Metadata<'_>) -> Result<Map<String, Value>> {
    let mut config = meta.base("gpt2")?;
    let context = meta.need("context_length")?;
    config.insert("n_embd".into(), json!(meta.need("embedding_length")?));
    config.insert("n_layer".into(), json!(meta.need("block_count")?));
    config.insert("n_head".into(), json!(meta.need("attention.head_count")?));
    config.insert("n_positions".into(), json!(context));
    config.insert("n_ctx".into(), json!(context));
    if let Some(inner) = meta.size("feed_forward_length")? {
        config.insert("n_inner".into(), json!(inner));
    }
    config.insert(
        "layer_norm_epsilon".into(),
        json!(meta.number("attention.layer_norm_epsilon")?.unwrap_or(1e-5)),
    );
    config.insert("activation_function".into(), json!("gelu_new"));
    Ok(config)
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these values are exact")]
mod tests {
    use super::*;

    #[test]
    fn a_minimal_config() {
        let mut config =
            json!({"model_type": "gpt2", "n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 50});
        let plain = spec(&config).expect("good");
        assert!(plain.tied && plain.context == 1024);
        assert!(plain.linears().iter().all(|linear| linear.transposed && linear.bias));
        assert_eq!(plain.layers[2].attention.as_ref().expect("whole").scale, 0.5);
        assert_eq!(plain.layers[0].mlp.as_ref().expect("whole").up.rows, 64);
        config["scale_attn_by_inverse_layer_idx"] = json!(true);
        config["tie_word_embeddings"] = json!(false);
        let deep = spec(&config).expect("good");
        assert_eq!(deep.layers[1].attention.as_ref().expect("whole").scale, 0.25);
        assert!(!deep.linears().last().expect("a head").transposed);
        config["n_head"] = json!(5);
        config["add_cross_attention"] = json!(true);
        let message = spec(&config).map_err(|e| e.to_string()).expect_err("lies");
        assert!(message.contains("n_embd") && message.contains("add_cross_attention"), "{message}");
    }
}
