//! Models whose layers were cut, each to another shape, against the same model with zeros in the places of what was cut.

mod tiny;

use nybble::model::{LoadOptions, Logits, Model};
use serde_json::{Value, json};
use tiny::{Tiny, VOCAB};

const PROMPT: [u32; 11] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5];
const HEAD: usize = 16;

/// What stays of a layer: query heads, key heads, neurons.
struct Kept {
    heads: Vec<usize>,
    kv_heads: Vec<usize>,
    neurons: Vec<usize>,
}

/// The columns of these heads.
fn columns(heads: &[usize]) -> Vec<usize> {
    heads.iter().flat_map(|head| head * HEAD..(head + 1) * HEAD).collect()
}

/// Takes rows of a matrix.
fn take_rows(tiny: &mut Tiny, name: &str, rows: &[usize], cols: usize) {
    let values = tiny.floats(name);
    let taken: Vec<f32> = rows.iter().flat_map(|&row| values[row * cols..][..cols].to_vec()).collect();
    tiny.put(name, &[rows.len(), cols], &taken);
}

/// Takes columns of a matrix, or sets the others to 0.
fn take_cols(tiny: &mut Tiny, name: &str, kept: &[usize], cols: usize, cut: bool) {
    let mut values = tiny.floats(name);
    let rows = values.len() / cols;
    if cut {
        let taken: Vec<f32> =
            values.chunks_exact(cols).flat_map(|row| kept.iter().map(|&col| row[col])).collect();
        tiny.put(name, &[rows, kept.len()], &taken);
    } else {
        for row in values.chunks_exact_mut(cols) {
            row.iter_mut()
                .enumerate()
                .filter(|(col, _)| !kept.contains(col))
                .for_each(|(_, value)| *value = 0.0);
        }
        tiny.put(name, &[rows, cols], &values);
    }
}

/// The same model with zeros, and cut.
fn masked_and_cut(layers: &[Kept], structure: &Value) -> (Tiny, Tiny) {
    let (mut masked, mut cut) = (Tiny::llama(), Tiny::llama());
    for (i, Kept { heads, kv_heads, neurons }) in layers.iter().enumerate() {
        let at = |part: &str| format!("model.layers.{i}.{part}.weight");
        for (tiny, cut) in [(&mut masked, false), (&mut cut, true)] {
            take_cols(tiny, &at("self_attn.o_proj"), &columns(heads), 64, cut);
            take_cols(tiny, &at("mlp.down_proj"), neurons, 96, cut);
        }
        take_rows(&mut cut, &at("self_attn.q_proj"), &columns(heads), 64);
        take_rows(&mut cut, &at("self_attn.k_proj"), &columns(kv_heads), 64);
        take_rows(&mut cut, &at("self_attn.v_proj"), &columns(kv_heads), 64);
        take_rows(&mut cut, &at("mlp.gate_proj"), neurons, 64);
        take_rows(&mut cut, &at("mlp.up_proj"), neurons, 64);
        let gone = |empty: bool, parts: &[&str]| {
            if empty { parts.iter().map(|part| at(part)).collect() } else { vec![] }
        };
        let attention = [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "input_layernorm",
        ];
        let mlp = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"];
        for name in gone(heads.is_empty(), &attention).into_iter().chain(gone(neurons.is_empty(), &mlp)) {
            cut.tensors.remove(&name);
        }
    }
    cut.config["head_dim"] = json!(HEAD);
    cut.config["nybble"] = json!({"version": 1, "structure": structure});
    (masked, cut)
}

fn open(tiny: &Tiny, threads: usize) -> nybble::Result<Model> {
    Model::open(tiny.save().path(), &LoadOptions { threads: Some(threads), ..LoadOptions::default() })
}

fn logits(model: &Model, chunks: &[&[u32]]) -> Vec<f32> {
    let mut session = model.session();
    let (mut all, mut part) = (Vec::new(), Vec::new());
    for chunk in chunks {
        session.forward(model, chunk, Logits::All, &mut part, &|| false).expect("logits");
        all.extend_from_slice(&part);
    }
    all
}

fn check(layers: &[Kept], structure: &Value) {
    let (masked, cut) = masked_and_cut(layers, structure);
    let wanted = logits(&open(&masked, 1).expect("whole"), &[&PROMPT]);
    let model = open(&cut, 1).expect("cut");
    let found = logits(&model, &[&PROMPT]);
    assert_eq!(found.len(), PROMPT.len() * VOCAB);
    let largest = wanted.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    for (found, wanted) in found.iter().zip(&wanted) {
        assert!((found - wanted).abs() < 1e-5 * largest, "{found}, expected {wanted}");
    }
    let parts = [&PROMPT[..3], &PROMPT[3..4], &PROMPT[4..]];
    assert_eq!(logits(&model, &parts), found, "in parts");
    assert_eq!(logits(&open(&cut, 3).expect("cut"), &[&PROMPT]), found, "by several threads");
    let stored = cut.tensors.values().map(|tensor| tensor.1.iter().product::<usize>() as u64).sum::<u64>();
    assert_eq!(model.info().parameters, stored);
    // Forgetting and going on leaves every layer's cache in step.
    let mut session = model.session();
    let mut last = Vec::new();
    session.forward(&model, &PROMPT, Logits::Last, &mut last, &|| false).expect("logits");
    assert_eq!(session.truncate(5), 5);
    assert!(session.layer_tokens().all(|tokens| tokens == 5));
    session.forward(&model, &PROMPT[5..], Logits::Last, &mut last, &|| false).expect("logits");
    assert_eq!(last, found[found.len() - VOCAB..]);
}

fn thirds() -> Vec<usize> {
    (0..96).filter(|neuron| neuron % 3 != 1).collect()
}

#[test]
fn heads_groups_and_neurons_of_each_layer() {
    check(
        &[
            Kept { heads: vec![0, 1, 3], kv_heads: vec![0, 1], neurons: thirds() },
            Kept { heads: vec![2, 3], kv_heads: vec![1], neurons: (0..96).collect() },
        ],
        &json!({"layers": [
            {"num_attention_heads": 3, "num_key_value_heads": 2, "queries_per_kv": [2, 1], "intermediate_size": 64},
            {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96},
        ]}),
    );
}

#[test]
fn whole_blocks() {
    check(
        &[
            Kept { heads: vec![], kv_heads: vec![], neurons: (0..96).collect() },
            Kept { heads: vec![0, 1, 2, 3], kv_heads: vec![0, 1], neurons: vec![] },
        ],
        &json!({"layers": [{"num_attention_heads": 0, "num_key_value_heads": 0}, {"intermediate_size": 0}]}),
    );
}

#[test]
fn biases_of_compensation() {
    let structure = json!({"layers": [{"intermediate_size": 64, "biases": ["down_proj", "o_proj"]}, {}]});
    let kept = |neurons| Kept { heads: vec![0, 1, 2, 3], kv_heads: vec![0, 1], neurons };
    let (mut masked, mut cut) = masked_and_cut(&[kept(thirds()), kept((0..96).collect())], &structure);
    // The whole model says it with the family's keys, where all linears of a kind have a bias.
    masked.config["mlp_bias"] = json!(true);
    masked.config["attention_bias"] = json!(true);
    let bias: Vec<f32> = (0..64).map(|i| (i as f32 * 0.3).sin()).collect();
    for layer in 0..2 {
        for (part, rows) in [
            ("self_attn.q_proj", 64),
            ("self_attn.k_proj", 32),
            ("self_attn.v_proj", 32),
            ("self_attn.o_proj", 64),
            ("mlp.gate_proj", 96),
            ("mlp.up_proj", 96),
            ("mlp.down_proj", 64),
        ] {
            let name = format!("model.layers.{layer}.{part}.bias");
            let added = layer == 0 && ["self_attn.o_proj", "mlp.down_proj"].contains(&part);
            let values = if added { bias.clone() } else { vec![0.0; rows] };
            masked.put(&name, &[rows], &values);
            if added {
                cut.put(&name, &[rows], &values);
            }
        }
    }
    let wanted = logits(&open(&masked, 1).expect("whole"), &[&PROMPT]);
    let found = logits(&open(&cut, 1).expect("cut"), &[&PROMPT]);
    let largest = wanted.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    assert!(found.iter().zip(&wanted).all(|(found, wanted)| (found - wanted).abs() < 1e-5 * largest));
}

#[test]
fn cut_layers_can_be_quantized() {
    let layers = [
        Kept { heads: vec![0, 1, 3], kv_heads: vec![0, 1], neurons: thirds() },
        Kept { heads: vec![2, 3], kv_heads: vec![1], neurons: (0..32).collect() },
    ];
    let structure = json!({"layers": [
        {"num_attention_heads": 3, "queries_per_kv": [2, 1], "intermediate_size": 64},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32},
    ]});
    let (_, mut rounded) = masked_and_cut(&layers, &structure);
    let (_, mut packed) = masked_and_cut(&layers, &structure);
    let linears: Vec<_> = rounded.matrices().into_iter().filter(|module| !module.contains("embed")).collect();
    for module in linears {
        let cols = rounded.tensors[&format!("{module}.weight")].1[1];
        rounded.quantize(&module, 4, cols, false, &mut packed);
    }
    let weights = json!({"num_bits": 4, "type": "int", "symmetric": false, "strategy": "channel",
        "dynamic": false});
    packed.config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": null}}});
    let wanted = logits(&open(&rounded, 1).expect("rounded"), &[&PROMPT]);
    let found = logits(&open(&packed, 2).expect("packed"), &[&PROMPT]);
    let largest = wanted.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    assert!(found.iter().zip(&wanted).all(|(found, wanted)| (found - wanted).abs() < 3e-3 * largest));
}

#[test]
fn a_structure_of_another_model_is_refused() {
    let kept = || Kept { heads: vec![0, 1, 2, 3], kv_heads: vec![0, 1], neurons: (0..96).collect() };
    for (structure, words) in [
        (
            json!({"layers": [{"intermediate_size": 64}, {}]}),
            "down_proj.weight: expected shape [64, 64], found [64, 96]",
        ),
        (json!({"layers": [{}, {}, {}]}), "expected a list of 2, found a list of 3"),
        (json!({"layers": [{"biases": ["o_proj"]}, {}]}), "o_proj.bias: expected this tensor"),
    ] {
        let (_, cut) = masked_and_cut(&[kept(), kept()], &structure);
        let error = open(&cut, 1).map(|_| ()).expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
    }
}
