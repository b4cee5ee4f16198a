//! `DINOv2`, with register tokens or without: `ViT` with learned factors of what each block adds.

use serde_json::Value;

use super::vision::{self, Names, Sizes, is_class, tensor};
use super::{Arch, Builder};
use crate::error::Result;
use crate::model::config::Reader;
use crate::model::encoder::spec::{EncoderSpec, HeadSpec, Pooling, Reads};
use crate::model::spec::Role;

const REGISTERS: &str = "dinov2_with_registers";

pub(super) static ARCH: Arch = Arch {
    family: "dinov2",
    model_types: &["dinov2", REGISTERS],
    spec: Builder::Encoder(spec),
    prefixes: &[
        ("dinov2_with_registers.", "dinov2."),
        ("embeddings.", "dinov2.embeddings."),
        ("encoder.", "dinov2.encoder."),
        ("layernorm.", "dinov2.layernorm."),
    ],
    gguf: None,
};

const NAMES: Names = Names {
    qkv: ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    out: "attention.output.dense",
    mlp: ["mlp.fc1", "mlp.fc2"],
    norms: ["norm1", "norm2"],
    scales: Some(["layer_scale1.lambda1", "layer_scale2.lambda1"]),
    norms_behind: false,
};

fn spec(config: &Value) -> Result<EncoderSpec> {
    let mut config = Reader::new(config)?;
    let c = &mut config;
    let sizes = Sizes::read(c, 1e-6, "gelu", |c, hidden| {
        let ratio = c.number_or("mlp_ratio", 4.0);
        (hidden as f64 * ratio).max(1.0) as usize
    });
    if c.flag_or("use_swiglu_ffn", false) {
        c.problem("use_swiglu_ffn: expected false, found true (the giant model's gated block is not read)");
    }
    let hidden = sizes.hidden;
    let with_registers = c.text_or("model_type", "dinov2") == REGISTERS;
    let registers = with_registers.then(|| {
        let count = c.size_or("num_register_tokens", 4);
        tensor("dinov2.embeddings.register_tokens", &[1, count, hidden])
    });
    let labels = vision::labels(c);
    let classifier = is_class(c, "ForImageClassification").then(|| HeadSpec {
        linear: vision::linear("classifier".into(), labels, hidden.saturating_mul(2), true, Role::Head),
        reads: Reads::ClassAndPatchMean,
    });
    let patches = "dinov2.embeddings.patch_embeddings.projection";
    let spec = EncoderSpec {
        family: if with_registers { REGISTERS } else { ARCH.family },
        hidden,
        channels: sizes.channels,
        patch: sizes.patch,
        image: sizes.image,
        patch_weight: sizes.patch_weight(patches),
        patch_bias: Some(tensor(format!("{patches}.bias"), &[hidden])),
        prefix: vec![tensor("dinov2.embeddings.cls_token", &[1, 1, hidden])],
        registers,
        positions: tensor("dinov2.embeddings.position_embeddings", &[1, 1 + sizes.patches(), hidden]),
        antialias: with_registers,
        embedding_norm: None,
        layers: sizes.layers(&NAMES, &|i, part| format!("dinov2.encoder.layer.{i}.{part}")),
        final_norm: Some(sizes.norm("dinov2.layernorm".into())),
        pooling: Pooling::Class(None),
        projection: None,
        heads: classifier.into_iter().collect(),
    };
    config.finish(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn registers_scales_and_the_wide_classifier() {
        let mut config = json!({"model_type": "dinov2", "hidden_size": 12, "num_hidden_layers": 1,
            "num_attention_heads": 3, "image_size": 28, "patch_size": 14, "mlp_ratio": 4});
        let plain = spec(&config).expect("good");
        assert_eq!(
            (plain.learned(), plain.layers[0].mlp.as_ref().expect("whole").up.rows, plain.antialias),
            (1, 48, false)
        );
        assert!(plain.layers[0].attention_norms.scale.is_some());
        config["model_type"] = json!(REGISTERS);
        config["num_register_tokens"] = json!(3);
        config["architectures"] = json!(["Dinov2WithRegistersForImageClassification"]);
        let with = spec(&config).expect("good");
        assert_eq!((with.learned(), with.tokens([28, 42]), with.antialias), (4, 10, true));
        assert_eq!((with.labels(), with.heads[0].linear.cols), (2, 24));
        config["use_swiglu_ffn"] = json!(true);
        assert!(spec(&config).expect_err("gated").to_string().contains("use_swiglu_ffn"));
    }
}
