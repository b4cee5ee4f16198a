//! Gemma 3 (text): norms before and behind every block with gains stored minus one, scaled embeddings, and five layers
//! with a window and their own rotary base for each layer without.

use serde_json::{Map, Value, json};

use super::gated::{self, Traits, Windows};
use super::gguf::{GgufArch, Metadata, Transform};
use super::{Arch, Builder};
use crate::error::Result;
use crate::model::config::Reader;
use crate::model::spec::Spec;

pub(super) static ARCH: Arch = Arch {
    family: "gemma3",
    model_types: &["gemma3_text", "gemma3"],
    spec: Builder::Decoder(spec),
    prefixes: &[
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("layers.", "model.layers."),
        ("embed_tokens.", "model.embed_tokens."),
        ("norm.", "model.norm."),
    ],
    gguf: Some(&GGUF),
};

fn spec(config: &Value) -> Result<Spec> {
    let mut reader = Reader::new(config)?;
    if reader.flag_or("use_bidirectional_attention", false) {
        reader.problem("use_bidirectional_attention: expected false, found true (an embedding model)");
    }
    // The published configurations of the vision models leave out what equals transformers' defaults.
    let mut filled = config.clone();
    if let Value::Object(map) = &mut filled {
        for (key, default) in [
            ("vocab_size", 262_208),
            ("hidden_size", 2304),
            ("intermediate_size", 9216),
            ("num_hidden_layers", 26),
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("max_position_embeddings", 131_072),
            ("query_pre_attn_scalar", 256),
            ("sliding_window", 4096),
        ] {
            map.entry(key).or_insert(json!(default));
        }
    }
    reader.finish(())?;
    let reader = Reader::new(&filled)?;
    let bias = filled.get("attention_bias") == Some(&Value::Bool(true));
    let traits = Traits {
        attention_bias: (bias, bias),
        qk_norm: true,
        norm_plus_one: true,
        sandwich: true,
        windows: Windows::Pattern,
        default_head_dim: Some(256),
        default_theta: 1_000_000.0,
        score_key: Some("query_pre_attn_scalar"),
        activation_key: "hidden_activation",
        default_activation: "gelu_pytorch_tanh",
        embedding_scaled: true,
        default_tied: true,
        ..Traits::llama("gemma3")
    };
    gated::spec(reader, &traits)
}

static GGUF: GgufArch = GgufArch {
    name: "gemma3",
    config: gguf_config,
    tensors: &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")],
    block: "model.layers",
    block_tensors: &[
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("attn_output", "self_attn.o_proj"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ],
    transform: |name, _, _| {
        // The converter stores the gain itself.
        if name.ends_with("norm.weight") { Transform::MinusOne } else { Transform::None }
    },
};

fn gguf_config(meta: &Metadata<'_>) -> Result<Map<String, Value>> {
    let mut config = meta.gated("gemma3_text")?;
    config.remove("hidden_act");
    config.insert("hidden_activation".into(), json!("gelu_pytorch_tanh"));
    let size = |key: &str| config.get(key).and_then(Value::as_u64).unwrap_or(1);
    // The largest model alone divides scores by the root of width over heads; the file does not say so.
    let scalar = match size("num_hidden_layers") {
        62 => size("hidden_size") / size("num_attention_heads").max(1),
        _ => size("head_dim"),
    };
    config.insert("query_pre_attn_scalar".into(), json!(scalar));
    match meta.size("attention.sliding_window")? {
        Some(window) => {
            let period = meta.size("attention.sliding_window_pattern")?.unwrap_or(6);
            config.insert("sliding_window".into(), json!(window));
            config.insert("sliding_window_pattern".into(), json!(period));
        }
        None => {
            config.insert("sliding_window_pattern".into(), json!(1));
        }
    }
    if let Some(cap) = meta.number("final_logit_softcapping")? {
        config.insert("final_logit_softcapping".into(), json!(cap));
    }
    meta.rope(&mut config)?;
    config.entry("rope_theta").or_insert(json!(1_000_000.0));
    let local = meta.number("rope.freq_base_swa")?.unwrap_or(10_000.0);
    config.insert("rope_local_base_freq".into(), json!(local));
    Ok(config)
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these values are exact")]
mod tests {
    use super::*;
    use crate::model::rope::Scaling;

    fn minimal() -> Value {
        json!({"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 50, "sliding_window": 16,
            "query_pre_attn_scalar": 64})
    }

    #[test]
    fn layers_norms_and_scales() {
        let spec = spec(&minimal()).expect("good");
        assert!(spec.tied);
        assert_eq!(spec.embedding_scale, Some(8.0));
        let windows: Vec<_> =
            spec.layers.iter().flat_map(|l| &l.attention).map(|a| (a.window, a.rope)).collect();
        assert_eq!(windows[0], (Some(16), Some(1)));
        assert_eq!(windows[5], (None, Some(0)));
        assert_eq!(windows[6], (Some(16), Some(1)));
        assert_eq!((spec.ropes[0].theta, spec.ropes[1].theta), (1e6, 1e4));
        let layer = &spec.layers[0];
        assert_eq!(layer.attention.as_ref().expect("whole").scale, 0.125);
        assert!(layer.mlp_norms.post.is_some() && layer.attention_norms.post.is_some());
        assert!(spec.inventory().norms.iter().all(|norm| norm.plus_one));
    }

    #[test]
    fn scaling_is_for_full_layers_only() {
        let mut config = minimal();
        config["rope_scaling"] = json!({"rope_type": "linear", "factor": 8.0});
        let spec = spec(&config).expect("good");
        assert_eq!(spec.ropes[0].scaling, Scaling::Linear { factor: 8.0 });
        assert_eq!(spec.ropes[1].scaling, Scaling::Default);
    }
}
