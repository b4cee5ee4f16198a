//! Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and windows in the later layers if asked for.

use serde_json::{Map, Value, json};

use super::gated::{self, Traits, Windows};
use super::gguf::{GATED_BLOCK, GgufArch, Metadata, unchanged};
use super::{Arch, Builder};
use crate::error::Result;
use crate::model::config::Reader;
use crate::model::spec::Spec;

pub(super) static ARCH: Arch = Arch {
    family: "qwen2",
    model_types: &["qwen2"],
    spec: Builder::Decoder(spec),
    prefixes: gated::PREFIXES,
    gguf: Some(&GGUF),
};

fn spec(config: &Value) -> Result<Spec> {
    let traits = Traits { attention_bias: (true, false), windows: Windows::Late, ..Traits::llama("qwen2") };
    gated::spec(Reader::new(config)?, &traits)
}

static GGUF: GgufArch = GgufArch {
    name: "qwen2",
    config: gguf_config,
    tensors: &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")],
    block: "model.layers",
    block_tensors: GATED_BLOCK,
    transform: unchanged,
};

fn gguf_config(meta: &Metadata<'_>) -> Result<Map<String, Value>> {
    let mut config = meta.gated("qwen2")?;
    config.insert("use_sliding_window".into(), json!(false));
    meta.rope(&mut config)?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases_and_windows() {
        let mut config = json!({"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "sliding_window": 16});
        let plain = spec(&config).expect("good");
        assert!(plain.layers.iter().all(|layer| layer.attention.as_ref().expect("whole").window.is_none()));
        assert!(
            plain.layers[0].attention.as_ref().expect("whole").qkv.linears().iter().all(|linear| linear.bias)
        );
        assert!(!plain.layers[0].attention.as_ref().expect("whole").out.bias);
        config["use_sliding_window"] = json!(true);
        config["max_window_layers"] = json!(3);
        let windows = |config: &Value| -> Vec<bool> {
            let spec = spec(config).expect("good");
            spec.layers
                .iter()
                .map(|layer| layer.attention.as_ref().expect("whole").window.is_some())
                .collect()
        };
        assert_eq!(windows(&config), [false, false, false, true]);
        config["layer_types"] =
            json!(["sliding_attention", "full_attention", "full_attention", "full_attention"]);
        assert_eq!(windows(&config), [true, false, false, false]);
        config["layer_types"] = json!(["linear_attention"]);
        assert!(spec(&config).is_err());
    }
}
