//! `ViT` and `DeiT`: a class token (`DeiT`: and a distillation token), norms before the blocks and one behind the last.
//!
//! `vit_post_norm` is not transformers' but ours: the same with norms behind the blocks, as `PyTorch`'s own
//! `TransformerEncoderLayer` has them unless told otherwise.

use serde_json::Value;

use super::vision::{self, Names, Sizes, is_class, tensor};
use super::{Arch, Builder};
use crate::error::Result;
use crate::model::config::Reader;
use crate::model::encoder::spec::{EncoderSpec, HeadSpec, Pooling, Reads};
use crate::model::spec::Role;

/// The canonical beginning of names; the classes of transformers add their own.
const ROOT: &str = "vit";

pub(super) static ARCH: Arch = Arch {
    family: "vit",
    model_types: &["vit", "deit", "vit_post_norm"],
    spec: Builder::Encoder(spec),
    prefixes: &[
        ("deit.", "vit."),
        ("embeddings.", "vit.embeddings."),
        ("encoder.", "vit.encoder."),
        ("layernorm.", "vit.layernorm."),
        ("pooler.", "vit.pooler."),
    ],
    gguf: None,
};

const NAMES: Names = Names {
    qkv: ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    out: "attention.output.dense",
    mlp: ["intermediate.dense", "output.dense"],
    norms: ["layernorm_before", "layernorm_after"],
    scales: None,
    norms_behind: false,
};

fn spec(config: &Value) -> Result<EncoderSpec> {
    let mut config = Reader::new(config)?;
    let c = &mut config;
    let sizes = Sizes::read(c, 1e-12, "gelu", |c, _| c.size("intermediate_size"));
    let kind = c.text_or("model_type", "vit");
    let names = Names { norms_behind: kind == "vit_post_norm", ..NAMES };
    let hidden = sizes.hidden;
    let mut prefix = vec![tensor(format!("{ROOT}.embeddings.cls_token"), &[1, 1, hidden])];
    if kind == "deit" {
        prefix.push(tensor(format!("{ROOT}.embeddings.distillation_token"), &[1, 1, hidden]));
    }
    let labels = vision::labels(c);
    let head = |module: &str, token: usize| HeadSpec {
        linear: vision::linear(module.into(), labels, hidden, true, Role::Head),
        reads: Reads::Token(token),
    };
    let heads = if is_class(c, "ForImageClassificationWithTeacher") {
        vec![head("cls_classifier", 0), head("distillation_classifier", 1)]
    } else if is_class(c, "ForImageClassification") {
        vec![head("classifier", 0)]
    } else {
        Vec::new()
    };
    if heads.len() > prefix.len() {
        c.problem(
            "architectures: expected a distillation token (model_type deit) beside a teacher's classifier",
        );
    }
    let patches = format!("{ROOT}.embeddings.patch_embeddings.projection");
    let spec = EncoderSpec {
        family: ARCH.model_types.iter().find(|name| **name == kind).copied().unwrap_or(ARCH.family),
        hidden,
        channels: sizes.channels,
        patch: sizes.patch,
        image: sizes.image,
        patch_weight: sizes.patch_weight(&patches),
        patch_bias: Some(tensor(format!("{patches}.bias"), &[hidden])),
        registers: None,
        positions: tensor(
            format!("{ROOT}.embeddings.position_embeddings"),
            &[1, prefix.len() + sizes.patches(), hidden],
        ),
        prefix,
        antialias: false,
        embedding_norm: None,
        layers: sizes.layers(&names, &|i, part| format!("{ROOT}.encoder.layer.{i}.{part}")),
        final_norm: Some(sizes.norm(format!("{ROOT}.layernorm"))),
        pooling: Pooling::Class(None),
        projection: None,
        heads,
    };
    config.finish(spec)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    pub(crate) fn minimal() -> Value {
        json!({"model_type": "vit", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
               "num_attention_heads": 3, "image_size": 8, "patch_size": 4})
    }

    #[test]
    fn the_family_members_differ_in_tokens_norms_and_heads() {
        let mut config = minimal();
        let plain = spec(&config).expect("good");
        assert_eq!((plain.learned(), plain.tokens([8, 8]), plain.labels()), (1, 5, 0));
        assert_eq!(plain.positions.shape, [1, 5, 12]);
        assert!(
            plain.layers.iter().all(
                |layer| !layer.attention.as_ref().expect("whole").causal && layer.mlp_norms.pre.is_some()
            )
        );
        let layer = 4 * (12 * 12 + 12) + 2 * 12 * 20 + 20 + 12 + 4 * 12;
        assert_eq!(plain.inventory().parameters(), 12 * 49 + 12 + 5 * 12 + 2 * layer + 24);
        // 4 patches of 48 values into 12; two layers of 5 tokens.
        assert_eq!(plain.macs([8, 8], None), 4 * 48 * 12 + 2 * (5 * (4 * 144 + 480) + 2 * 25 * 12));

        config["model_type"] = json!("vit_post_norm");
        config["architectures"] = json!(["ViTForImageClassification"]);
        config["id2label"] = json!({"0": "a", "1": "b", "2": "c"});
        let behind = spec(&config).expect("good");
        assert!(
            behind
                .layers
                .iter()
                .all(|layer| layer.mlp_norms.after.is_some() && layer.mlp_norms.pre.is_none())
        );
        assert_eq!((behind.family, behind.labels()), ("vit_post_norm", 3));

        config["model_type"] = json!("deit");
        config["architectures"] = json!(["DeiTForImageClassificationWithTeacher"]);
        let deit = spec(&config).expect("good");
        assert_eq!((deit.learned(), deit.heads.len()), (2, 2));
        assert_eq!(deit.heads[1].reads, Reads::Token(1));
    }

    #[test]
    fn lies_are_all_reported() {
        let config = json!({"model_type": "vit", "hidden_size": 13, "intermediate_size": 0, "num_hidden_layers": 1,
            "num_attention_heads": 3, "image_size": [8, 8, 8], "patch_size": 16, "hidden_act": "silu",
            "architectures": ["DeiTForImageClassificationWithTeacher"]});
        let message = spec(&config).map_err(|e| e.to_string()).expect_err("lies");
        for word in ["hidden_size", "intermediate_size", "image_size", "patch_size", "hidden_act", "teacher"]
        {
            assert!(message.contains(word), "{word}: {message}");
        }
    }
}
