//! The vision towers of CLIP and `SigLIP`, alone or inside the model with its text tower, which is left alone.
//!
//! CLIP norms the embedded tokens once more, reads the class token through a norm of its own, and projects it to the width
//! that text shares. `SigLIP` has no class token: a learned query attends to the patches.

use serde_json::Value;

use super::vision::{self, Names, Sizes, is_class, tensor};
use super::{Arch, Builder};
use crate::error::{Error, Result};
use crate::model::config::{Reader, brief};
use crate::model::encoder::spec::{AttentionPoolSpec, EncoderSpec, HeadSpec, Pooling, Reads};
use crate::model::spec::Role;

pub(super) static CLIP: Arch = Arch {
    family: "clip",
    model_types: &["clip", "clip_vision_model"],
    spec: Builder::Encoder(clip),
    prefixes: PREFIXES,
    gguf: None,
};

pub(super) static SIGLIP: Arch = Arch {
    family: "siglip",
    model_types: &["siglip", "siglip_vision_model"],
    spec: Builder::Encoder(siglip),
    prefixes: PREFIXES,
    gguf: None,
};

/// A tower saved alone by transformers 5 has no prefix.
const PREFIXES: &[(&str, &str)] = &[
    ("embeddings.", "vision_model.embeddings."),
    ("encoder.", "vision_model.encoder."),
    ("pre_layrnorm.", "vision_model.pre_layrnorm."),
    ("post_layernorm.", "vision_model.post_layernorm."),
    ("head.", "vision_model.head."),
];

const NAMES: Names = Names {
    qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    out: "self_attn.out_proj",
    mlp: ["mlp.fc1", "mlp.fc2"],
    norms: ["layer_norm1", "layer_norm2"],
    scales: None,
    norms_behind: false,
};

fn at(part: &str) -> String {
    format!("vision_model.{part}")
}

/// The parts of a tower, read from the configuration of the tower or of the whole model.
fn tower(
    config: &Value,
    build: impl FnOnce(&mut Reader<'_>, &mut Reader<'_>) -> EncoderSpec,
) -> Result<EncoderSpec> {
    let mut outer = Reader::new(config)?;
    let whole = match config.get("vision_config") {
        None | Some(Value::Null) => None,
        Some(Value::Object(tower)) => Some(tower),
        Some(other) => {
            return Err(Error::format("config.json", "vision_config", "an object", brief(other)));
        }
    };
    let mut inner = match whole {
        Some(tower) => Reader::inner(tower),
        None => Reader::new(config)?,
    };
    let spec = build(&mut outer, &mut inner);
    if whole.is_some() {
        outer.absorb("vision_config", inner);
        return outer.finish(spec);
    }
    let spec = inner.finish(spec)?;
    outer.finish(spec)
}

fn common(family: &'static str, sizes: &Sizes, class_token: bool) -> EncoderSpec {
    let hidden = sizes.hidden;
    let patches = at("embeddings.patch_embedding");
    let prefix: Vec<_> =
        class_token.then(|| tensor(at("embeddings.class_embedding"), &[hidden])).into_iter().collect();
    EncoderSpec {
        family,
        hidden,
        channels: sizes.channels,
        patch: sizes.patch,
        image: sizes.image,
        patch_weight: sizes.patch_weight(&patches),
        patch_bias: None,
        registers: None,
        positions: tensor(
            at("embeddings.position_embedding.weight"),
            &[prefix.len() + sizes.patches(), hidden],
        ),
        prefix,
        antialias: false,
        embedding_norm: None,
        layers: sizes.layers(&NAMES, &|i, part| at(&format!("encoder.layers.{i}.{part}"))),
        final_norm: None,
        pooling: Pooling::Class(None),
        projection: None,
        heads: Vec::new(),
    }
}

fn classifier(outer: &mut Reader<'_>, hidden: usize) -> Vec<HeadSpec> {
    if !is_class(outer, "ForImageClassification") {
        return Vec::new();
    }
    let linear = vision::linear("classifier".into(), vision::labels(outer), hidden, true, Role::Head);
    vec![HeadSpec { linear, reads: Reads::PatchMean }]
}

fn clip(config: &Value) -> Result<EncoderSpec> {
    tower(config, |outer, c| {
        let sizes = Sizes::read(c, 1e-5, "quick_gelu", |c, _| c.size("intermediate_size"));
        let hidden = sizes.hidden;
        // Both towers of the whole model end in the same width; a tower alone says whether it has the projection.
        let projected = is_class(outer, "CLIPModel") || is_class(outer, "WithProjection");
        let width = outer.size_or("projection_dim", 512);
        let projection = || vision::linear("visual_projection".into(), width, hidden, false, Role::Project);
        EncoderSpec {
            embedding_norm: Some(sizes.norm(at("pre_layrnorm"))),
            pooling: Pooling::Class(Some(sizes.norm(at("post_layernorm")))),
            projection: projected.then(projection),
            heads: classifier(outer, hidden),
            ..common("clip", &sizes, true)
        }
    })
}

fn siglip(config: &Value) -> Result<EncoderSpec> {
    tower(config, |outer, c| {
        let sizes = Sizes::read(c, 1e-6, "gelu_pytorch_tanh", |c, _| c.size("intermediate_size"));
        if !c.flag_or("vision_use_head", true) {
            c.problem("vision_use_head: expected true, found false (the tower then has no embedding)");
        }
        let hidden = sizes.hidden;
        let pool = AttentionPoolSpec {
            heads: sizes.heads,
            probe: tensor(at("head.probe"), &[1, 1, hidden]),
            qkv: tensor(at("head.attention.in_proj_weight"), &[hidden.saturating_mul(3), hidden]),
            qkv_bias: tensor(at("head.attention.in_proj_bias"), &[hidden.saturating_mul(3)]),
            out: vision::linear(at("head.attention.out_proj"), hidden, hidden, true, Role::Out),
            norm: sizes.norm(at("head.layernorm")),
            mlp: sizes.mlp(at("head.mlp.fc1"), at("head.mlp.fc2")),
        };
        EncoderSpec {
            patch_bias: Some(tensor(at("embeddings.patch_embedding.bias"), &[hidden])),
            final_norm: Some(sizes.norm(at("post_layernorm"))),
            pooling: Pooling::Attention(Box::new(pool)),
            heads: classifier(outer, hidden),
            ..common("siglip", &sizes, false)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sizes() -> Value {
        json!({"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3,
               "image_size": 8, "patch_size": 4})
    }

    #[test]
    fn towers_alone_and_inside_the_whole_model() {
        let mut alone = sizes();
        alone["model_type"] = json!("clip_vision_model");
        alone["architectures"] = json!(["CLIPVisionModel"]);
        let tower = clip(&alone).expect("good");
        assert!(tower.projection.is_none() && tower.final_norm.is_none() && tower.embedding_norm.is_some());
        let whole = json!({"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 7,
            "text_config": {}, "vision_config": sizes()});
        let tower = clip(&whole).expect("good");
        assert_eq!(
            (tower.embedding(), tower.learned(), tower.positions.shape.as_slice()),
            (7, 1, [5, 12].as_slice())
        );
        let whole = json!({"model_type": "siglip", "architectures": ["SiglipForImageClassification"],
            "vision_config": sizes(), "num_labels": 4});
        let tower = siglip(&whole).expect("good");
        assert_eq!((tower.embedding(), tower.learned(), tower.labels()), (12, 0, 4));
        assert!(matches!(tower.pooling, Pooling::Attention(_)));
    }

    #[test]
    fn lies_name_the_key_they_are_under() {
        let mut inner = sizes();
        inner["hidden_size"] = json!(0);
        inner["vision_use_head"] = json!(false);
        let whole = json!({"model_type": "siglip", "vision_config": inner});
        let message = siglip(&whole).map_err(|e| e.to_string()).expect_err("lies");
        assert!(
            message.contains("vision_config.hidden_size") && message.contains("vision_use_head"),
            "{message}"
        );
        assert!(clip(&json!({"model_type": "clip", "vision_config": 3})).is_err());
        assert!(clip(&json!({"model_type": "clip"})).is_err());
    }
}
