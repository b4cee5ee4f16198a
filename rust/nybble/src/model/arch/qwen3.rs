//! Qwen3 (dense): Llama with a norm on every query and key head, and a head width of its own.

use serde_json::{Map, Value, json};

use super::gated::{self, Traits, Windows};
use super::gguf::{GATED_BLOCK, GgufArch, Metadata, unchanged};
use super::{Arch, Builder};
use crate::error::Result;
use crate::model::config::Reader;
use crate::model::spec::Spec;

pub(super) static ARCH: Arch = Arch {
    family: "qwen3",
    model_types: &["qwen3"],
    spec: Builder::Decoder(spec),
    prefixes: gated::PREFIXES,
    gguf: Some(&GGUF),
};

fn spec(config: &Value) -> Result<Spec> {
    let mut reader = Reader::new(config)?;
    let bias = reader.flag_or("attention_bias", false);
    let traits = Traits {
        attention_bias: (bias, bias),
        qk_norm: true,
        windows: Windows::Late,
        default_head_dim: Some(128),
        ..Traits::llama("qwen3")
    };
    gated::spec(reader, &traits)
}

static GGUF: GgufArch = GgufArch {
    name: "qwen3",
    config: gguf_config,
    tensors: &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")],
    block: "model.layers",
    block_tensors: GATED_BLOCK,
    transform: unchanged,
};

fn gguf_config(meta: &Metadata<'_>) -> Result<Map<String, Value>> {
    let mut config = meta.gated("qwen3")?;
    config.insert("use_sliding_window".into(), json!(false));
    if meta.has_tensor("blk.0.attn_q.bias") {
        config.insert("attention_bias".into(), json!(true));
    }
    meta.rope(&mut config)?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_norms_and_head_width() {
        let config = json!({"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50});
        let spec = spec(&config).expect("good");
        let attention = spec.layers[0].attention.as_ref().expect("whole");
        assert_eq!(attention.head_dim, 128);
        let (q, k) = attention.qk_norms.as_ref().expect("norms");
        assert_eq!((q.dim, k.module.as_str()), (128, "model.layers.0.self_attn.k_norm"));
        assert!(attention.qkv.linears().iter().all(|linear| !linear.bias));
    }
}
