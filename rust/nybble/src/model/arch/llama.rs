//! Llama 1 to 3, Mistral, and models built alike (`SmolLM2`, `TinyLlama` and many more): the plainest modern decoder.

use serde_json::{Map, Value, json};

use super::gated::{self, Traits, Windows};
use super::gguf::{GgufArch, Metadata, Transform};
use super::{Arch, Builder};
use crate::error::Result;
use crate::model::config::Reader;
use crate::model::spec::Spec;

pub(super) static ARCH: Arch = Arch {
    family: "llama",
    model_types: &["llama", "mistral"],
    spec: Builder::Decoder(spec),
    prefixes: gated::PREFIXES,
    gguf: Some(&GGUF),
};

fn spec(config: &Value) -> Result<Spec> {
    let mut reader = Reader::new(config)?;
    let bias = reader.flag_or("attention_bias", false);
    let mistral = reader.text_or("model_type", "llama") == "mistral";
    let traits = Traits {
        attention_bias: (bias, bias),
        mlp_bias: reader.flag_or("mlp_bias", false),
        windows: if mistral { Windows::All } else { Windows::Never },
        ..Traits::llama("llama")
    };
    gated::spec(reader, &traits)
}

/// Llamas whose layers differ: llama.cpp reads those under the name of the first such models.
pub(super) static DECI: Arch = Arch { family: "llama", model_types: &[], gguf: Some(&DECI_GGUF), ..ARCH };

static GGUF: GgufArch = GgufArch {
    name: "llama",
    config: gguf_config,
    tensors: &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")],
    block: "model.layers",
    block_tensors: super::gguf::GATED_BLOCK,
    transform,
};

static DECI_GGUF: GgufArch = GgufArch { name: "deci", ..GGUF };

fn gguf_config(meta: &Metadata<'_>) -> Result<Map<String, Value>> {
    let mut config = meta.gated("llama")?;
    if meta.has_tensor("blk.0.attn_q.bias") {
        config.insert("attention_bias".into(), json!(true));
    }
    if meta.has_tensor("blk.0.ffn_up.bias") {
        config.insert("mlp_bias".into(), json!(true));
    }
    if let Some(window) = meta.size("attention.sliding_window")? {
        config.insert("model_type".into(), json!("mistral"));
        config.insert("sliding_window".into(), json!(window));
    }
    meta.rope(&mut config)?;
    Ok(config)
}

/// llama.cpp rotates neighbouring columns, transformers the two halves of a head, so the converter reordered the rows of
/// the query and key projections within each head: row `half * d/2 + i` was moved to `2 i + half`.
fn transform(name: &str, rows: usize, spec: &Spec) -> Transform {
    let rotated = [".self_attn.q_proj.", ".self_attn.k_proj."].iter().any(|part| name.contains(part));
    let dim = spec.layers.iter().find_map(|layer| layer.attention.as_ref()).map_or(0, |a| a.head_dim);
    if !rotated || dim < 2 || !rows.is_multiple_of(dim) {
        return Transform::None; // a wrong shape is what validation reports
    }
    let stored = |row: usize| {
        let (head, in_head) = (row / dim, row % dim);
        let (half, i) = (in_head / (dim / 2), in_head % (dim / 2));
        (head * dim + 2 * i + half) as u32
    };
    Transform::Rows((0..rows).map(stored).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::rope::Scaling;
    use crate::model::spec::{Qkv, Role};

    pub(crate) fn minimal() -> Value {
        json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
               "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 100})
    }

    #[test]
    fn a_minimal_config() {
        let spec = spec(&minimal()).expect("good");
        assert_eq!((spec.family, spec.layers.len(), spec.context, spec.tied), ("llama", 2, 2048, false));
        let layer = &spec.layers[1];
        let attention = layer.attention.as_ref().expect("whole");
        assert_eq!((attention.head_dim, attention.kv_heads), (8, 2));
        let Qkv::Separate { k, .. } = &layer.attention.as_ref().expect("whole").qkv else {
            panic!("separate")
        };
        assert_eq!((k.module.as_str(), k.rows, k.cols), ("model.layers.1.self_attn.k_proj", 16, 64));
        assert!(!k.bias && layer.attention.as_ref().expect("whole").window.is_none());
        assert_eq!(spec.linears().len(), 2 * 7 + 1);
        assert_eq!(spec.linears().last().map(|head| head.role), Some(Role::Head));
        assert_eq!(spec.ropes[0].scaling, Scaling::Default);
        let by_hand = 2 * 100 * 64 + 2 * (64 * 64 * 2 + 2 * 16 * 64 + 3 * 64 * 96 + 2 * 64) + 64;
        assert_eq!(spec.parameters(), by_hand);
    }

    #[test]
    fn variants() {
        let mut config = minimal();
        config["attention_bias"] = json!(true);
        config["mlp_bias"] = json!(true);
        config["head_dim"] = json!(16);
        config["tie_word_embeddings"] = json!(true);
        let biased = spec(&config).expect("good");
        assert!(biased.tied && biased.linears().iter().all(|linear| linear.bias));
        assert_eq!(biased.layers[0].attention.as_ref().expect("whole").out.cols, 128);
        config["model_type"] = json!("mistral");
        config["sliding_window"] = json!(32);
        let mistral = spec(&config).expect("good");
        assert!(
            mistral.layers.iter().all(|layer| layer.attention.as_ref().expect("whole").window == Some(32))
        );
        config["sliding_window"] = Value::Null;
        assert!(spec(&config).expect("good").layers[0].attention.as_ref().expect("whole").window.is_none());
    }

    #[test]
    fn lies_are_all_reported() {
        let config = json!({"model_type": "llama", "hidden_size": 65, "intermediate_size": 0, "num_hidden_layers": 1e9,
            "num_attention_heads": 8, "num_key_value_heads": 3, "hidden_act": "sin", "rms_norm_eps": -1});
        let message = spec(&config).map_err(|e| e.to_string()).expect_err("lies");
        for word in [
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_key_value_heads",
            "vocab_size",
            "hidden_act",
            "rms_norm_eps",
        ] {
            assert!(message.contains(word), "{word}: {message}");
        }
    }

    #[test]
    fn query_rows_go_back_to_halves() {
        let spec = spec(&minimal()).expect("good");
        let Transform::Rows(map) = transform("model.layers.0.self_attn.k_proj.weight", 16, &spec) else {
            panic!("reordered")
        };
        assert_eq!(&map[..8], &[0, 2, 4, 6, 1, 3, 5, 7]);
        assert_eq!(map[8], 8);
        assert!(matches!(transform("model.layers.0.self_attn.v_proj.weight", 16, &spec), Transform::None));
    }
}
