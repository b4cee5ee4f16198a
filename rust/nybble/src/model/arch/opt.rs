//! OPT: learned positions from row 2 on, layer norms before or (350m) behind the blocks, `ReLU`, and in the 350m model an
//! embedding narrower than the model. llama.cpp does not know it.

use serde_json::Value;

use super::{Arch, Builder};
use crate::error::Result;
use crate::model::config::Reader;
use crate::model::spec::{
    Activation, AttentionSpec, BlockNorms, EmbeddingSpec, LayerSpec, LinearSpec, MlpSpec, NormKind, NormSpec,
    Position, Qkv, Role, Spec,
};

/// Rows of the position table before position 0.
const OFFSET: usize = 2;

pub(super) static ARCH: Arch = Arch {
    family: "opt",
    model_types: &["opt"],
    spec: Builder::Decoder(spec),
    prefixes: &[("decoder.", "model.decoder.")],
    gguf: None,
};

fn spec(config: &Value) -> Result<Spec> {
    let mut config = Reader::new(config)?;
    let c = &mut config;
    let hidden = c.size("hidden_size");
    let inner = c.size("ffn_dim");
    let layers = c.layers("num_hidden_layers");
    let heads = c.size("num_attention_heads");
    let vocab = c.size("vocab_size");
    let context = c.size_or("max_position_embeddings", 2048);
    let narrow = c.size_or("word_embed_proj_dim", hidden);
    c.divides(("hidden_size", hidden), ("num_attention_heads", heads));
    let before = c.flag_or("do_layer_norm_before", true);
    let bias = c.flag_or("enable_bias", true);
    let affine = c.flag_or("layer_norm_elementwise_affine", true);
    let final_norm = before && !c.flag_or("_remove_final_layer_norm", false);
    let name = c.text_or("activation_function", "relu");
    let activation = Activation::parse(name).filter(|a| *a != Activation::Silu).unwrap_or_else(|| {
        c.problem(format!("activation_function: expected relu or a gelu, found {name:?}"));
        Activation::Relu
    });

    let norm = |module: String| NormSpec {
        module,
        kind: NormKind::Layer,
        dim: hidden,
        eps: 1e-5,
        plus_one: false,
        affine,
    };
    let linear = |module: String, rows: usize, cols: usize, bias: bool, role: Role| LinearSpec {
        module,
        rows,
        cols,
        bias,
        transposed: false,
        role,
    };
    let head_dim = (hidden / heads).max(1);
    let norms = |module: String| {
        let norm = Some(norm(module));
        if before {
            BlockNorms { pre: norm, ..BlockNorms::default() }
        } else {
            BlockNorms { after: norm, ..BlockNorms::default() }
        }
    };
    let layer = |i: usize| {
        let at = |rest: &str| format!("model.decoder.layers.{i}.{rest}");
        let project =
            |part: &str| linear(at(&format!("self_attn.{part}_proj")), hidden, hidden, bias, Role::Qkv);
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
                qkv: Qkv::Separate { q: project("q"), k: project("k"), v: project("v") },
                qk_norms: None,
                out: linear(at("self_attn.out_proj"), hidden, hidden, bias, Role::Out),
            }),
            attention_norms: norms(at("self_attn_layer_norm")),
            mlp: Some(MlpSpec {
                gate: None,
                up: linear(at("fc1"), inner, hidden, bias, Role::GateUp),
                down: linear(at("fc2"), hidden, inner, bias, Role::Down),
                activation,
            }),
            mlp_norms: norms(at("final_layer_norm")),
        }
    };
    let projection = |part: &str, rows: usize, cols: usize| {
        let module = format!("model.decoder.project_{part}");
        (narrow != hidden).then(|| linear(module, rows, cols, false, Role::Project))
    };
    let table = |part: &str, rows: usize, cols: usize| {
        let module = format!("model.decoder.embed_{part}");
        EmbeddingSpec { module, rows, cols }
    };
    let spec = Spec {
        family: "opt",
        vocab,
        hidden,
        context,
        embedding: table("tokens", vocab, narrow),
        embedding_scale: None,
        embedding_norm: None,
        project_in: projection("in", hidden, narrow),
        position: Position::Learned { table: table("positions", context + OFFSET, hidden), offset: OFFSET },
        ropes: Vec::new(),
        layers: (0..layers).map(layer).collect(),
        final_norm: final_norm.then(|| norm("model.decoder.final_layer_norm".into())),
        project_out: projection("out", narrow, hidden),
        head: linear("lm_head".into(), vocab, narrow, false, Role::Head),
        tied: c.flag_or("tie_word_embeddings", true),
        logit_softcap: None,
    };
    config.finish(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_norm_orders_and_projections() {
        let mut config = json!({"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 40});
        let plain = spec(&config).expect("good");
        assert!(plain.tied && plain.final_norm.is_some() && plain.project_in.is_none());
        assert!(plain.layers[0].attention_norms.pre.is_some());
        let Position::Learned { table, offset } = &plain.position else { panic!("learned") };
        assert_eq!((table.rows, *offset), (42, 2));
        config["do_layer_norm_before"] = json!(false);
        config["word_embed_proj_dim"] = json!(16);
        let old = spec(&config).expect("good");
        assert!(old.final_norm.is_none() && old.layers[0].mlp_norms.after.is_some());
        assert_eq!(old.project_in.as_ref().map(|p| (p.rows, p.cols)), Some((32, 16)));
        assert_eq!(old.project_out.as_ref().map(|p| (p.rows, p.cols)), Some((16, 32)));
        assert_eq!((old.embedding.cols, old.head.cols), (16, 16));
        config["num_attention_heads"] = json!(5);
        config["activation_function"] = json!("tanh");
        let message = spec(&config).map_err(|e| e.to_string()).expect_err("lies");
        assert!(message.contains("hidden_size") && message.contains("activation_function"), "{message}");
    }
}
