//! Models end to end: opening, validating, running, generating, on a tiny random Llama.

mod tiny;

use nybble::decode::{FinishReason, Generation, Generator, Request, Sampling};
use nybble::format::{Access, Dtype};
use nybble::kernels::attention::KvType;
use nybble::model::{LoadOptions, Logits, Model};
use nybble::tokens::Policy;
use nybble::{Error, Result};
use serde_json::{Value, json};
use tiny::{Tiny, VOCAB};

const PROMPT: [u32; 11] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5];

fn open(tiny: &Tiny, threads: usize) -> Result<Model> {
    Model::open(tiny.save().path(), &LoadOptions { threads: Some(threads), ..LoadOptions::default() })
}

fn never() -> bool {
    false
}

fn logits(model: &Model, chunks: &[&[u32]]) -> Vec<f32> {
    let mut session = model.session();
    let (mut all, mut part) = (Vec::new(), Vec::new());
    for chunk in chunks {
        session.forward(model, chunk, Logits::All, &mut part, &never).expect("logits");
        all.extend_from_slice(&part);
    }
    assert_eq!(session.len(), chunks.iter().map(|chunk| chunk.len()).sum::<usize>());
    all
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Largest difference over the largest value.
fn distance(one: &[f32], two: &[f32]) -> f32 {
    assert_eq!(one.len(), two.len());
    let largest = one.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    one.iter().zip(two).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

fn problems(tiny: &Tiny) -> String {
    match open(tiny, 1) {
        Ok(_) => panic!("it opened"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn chunks_and_threads_do_not_change_a_bit() {
    let tiny = Tiny::llama();
    let model = open(&tiny, 1).expect("good");
    let whole = logits(&model, &[&PROMPT]);
    assert_eq!(whole.len(), PROMPT.len() * VOCAB);
    assert!(whole.iter().all(|value| value.is_finite()));
    assert_eq!(bits(&whole), bits(&logits(&model, &[&PROMPT[..1], &PROMPT[1..8], &PROMPT[8..]])));
    let single: Vec<&[u32]> = PROMPT.chunks(1).collect();
    assert_eq!(bits(&whole), bits(&logits(&model, &single)));
    for threads in [2, 3] {
        let model = open(&tiny, threads).expect("good");
        assert_eq!(bits(&whole), bits(&logits(&model, &[&PROMPT])));
        assert_eq!(bits(&whole), bits(&logits(&model, &single)));
    }
    let mut last = vec![9.0; 3];
    let mut session = model.session();
    session.forward(&model, &PROMPT, Logits::Last, &mut last, &never).expect("logits");
    assert_eq!(bits(&last), bits(&whole[whole.len() - VOCAB..]));
    session.truncate(4);
    session.forward(&model, &PROMPT[4..], Logits::Last, &mut last, &never).expect("logits");
    assert_eq!(bits(&last), bits(&whole[whole.len() - VOCAB..]));
    session.forward(&model, &[1], Logits::None, &mut last, &never).expect("no logits");
    assert!(last.is_empty());
}

#[test]
fn both_ways_of_reading_files_and_both_caches_work() {
    let tiny = Tiny::llama();
    let dir = tiny.save();
    let mapped = Model::open(dir.path(), &LoadOptions::default()).expect("good");
    let read = Model::open(dir.path(), &LoadOptions { access: Access::Read, ..LoadOptions::default() });
    let whole = logits(&mapped, &[&PROMPT]);
    assert_eq!(bits(&whole), bits(&logits(&read.expect("good"), &[&PROMPT])));
    let half = Model::open(dir.path(), &LoadOptions { kv: Some(KvType::F16), ..LoadOptions::default() });
    let half = half.expect("good");
    let rounded = logits(&half, &[&PROMPT]);
    assert!(distance(&whole, &rounded) < 2e-3 && whole != rounded);
    let info = half.info();
    assert_eq!((info.kv_type.as_str(), info.kv_bytes_per_token), ("f16", 2 * 2 * 32 * 2));
    assert_eq!(
        info.parameters,
        tiny.tensors.values().map(|t| t.1.iter().product::<usize>() as u64).sum::<u64>()
    );
    assert!(serde_json::to_string(&info).is_ok_and(|text| text.contains("w4a8/")));
}

/// Quantizes everything, and returns the rounded floats beside the packed folder.
fn quantized(bits: u32, group: usize, symmetric: bool, activations: &Value) -> (Tiny, Tiny) {
    let (mut rounded, mut packed) = (Tiny::llama(), Tiny::llama());
    for module in rounded.matrices() {
        let width = if module.ends_with("down_proj") { 96 } else { 64 };
        let (bits, group) = if module.contains("embed") { (8, 64) } else { (bits, group.min(width)) };
        rounded.quantize(&module, bits, group, symmetric || module.contains("embed"), &mut packed);
    }
    let strategy = if group >= 64 { "channel" } else { "group" };
    let weights = json!({"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
        "group_size": if group >= 64 { Value::Null } else { json!(group) }, "dynamic": false});
    let embedding = json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel"});
    packed.config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations},
            "group_1": {"targets": ["Embedding"], "weights": embedding}}});
    (rounded, packed)
}

#[test]
fn quantized_weights_are_the_rounded_weights() {
    for (bits_each, group, symmetric) in
        [(4, 32, true), (4, 32, false), (8, 32, false), (4, 96, true), (8, 96, true)]
    {
        let (rounded, packed) = quantized(bits_each, group, symmetric, &Value::Null);
        let dir = packed.save();
        let options = LoadOptions { kv: Some(KvType::F32), threads: Some(2), ..LoadOptions::default() };
        let model = Model::open(dir.path(), &options).expect("good");
        let wanted = logits(&open(&rounded, 1).expect("good"), &[&PROMPT]);
        let found = logits(&model, &[&PROMPT[..3], &PROMPT[3..]]);
        assert!(
            distance(&wanted, &found) < 1e-6,
            "{bits_each} {group} {symmetric}: {}",
            distance(&wanted, &found)
        );
        let bytes = model.info().weight_bytes;
        assert!(bytes.contains_key("w8") && bytes.contains_key("w4") == (bits_each == 4), "{bytes:?}");
    }
}

#[test]
fn eight_bit_activations_cost_little_and_keep_the_bits() {
    let token =
        json!({"num_bits": 8, "type": "int", "symmetric": true, "dynamic": true, "strategy": "token"});
    let mut grouped = token.clone();
    grouped["strategy"] = json!("group");
    grouped["group_size"] = json!(32);
    for (bits_each, activations) in [(4, &token), (4, &grouped), (8, &token), (8, &grouped)] {
        let (rounded, packed) = quantized(bits_each, 32, true, activations);
        let wanted = logits(&open(&rounded, 1).expect("good"), &[&PROMPT]);
        let one = open(&packed, 1).expect("good");
        let found = logits(&one, &[&PROMPT]);
        assert!(distance(&wanted, &found) < 0.05, "{bits_each}: {}", distance(&wanted, &found));
        assert_ne!(wanted, found);
        let single: Vec<&[u32]> = PROMPT.chunks(1).collect();
        assert_eq!(bits(&found), bits(&logits(&open(&packed, 2).expect("good"), &single)));
        assert_eq!(one.info().kv_type, "f16");
    }
    let mut wide = grouped;
    wide["group_size"] = json!(64);
    let (_, packed) = quantized(4, 32, true, &wide);
    assert!(matches!(open(&packed, 1), Err(Error::Unsupported { .. })) || problems(&packed).contains("64"));
}

#[test]
fn codes_a_byte_each_are_read() {
    let (mut rounded, mut packed) = (Tiny::llama(), Tiny::llama());
    let module = "model.layers.0.mlp.down_proj";
    rounded.quantize(module, 8, 96, true, &mut packed);
    let words = packed.tensors.remove(&format!("{module}.weight_packed")).expect("packed").2;
    packed.tensors.remove(&format!("{module}.weight_shape"));
    let codes = words.iter().map(|byte| byte ^ 0x80).collect();
    packed.tensors.insert(format!("{module}.weight"), (Dtype::I8, vec![64, 96], codes));
    packed.config["quantization_config"] = json!({"quant_method": "compressed-tensors", "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["re:.*layers.0.*down_proj"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel"}}}});
    let dir = packed.save();
    let model = Model::open(dir.path(), &LoadOptions { kv: Some(KvType::F32), ..LoadOptions::default() });
    let wanted = logits(&open(&rounded, 1).expect("good"), &[&PROMPT]);
    assert!(distance(&wanted, &logits(&model.expect("good"), &[&PROMPT])) < 1e-6);
}

#[test]
fn every_contradiction_is_reported_at_once() {
    let mut tiny = Tiny::llama();
    tiny.tensors.remove("model.norm.weight");
    tiny.tensors.remove("model.layers.1.mlp.up_proj.weight");
    tiny.put("model.layers.0.self_attn.q_proj.weight", &[64, 63], &[0.0; 64 * 63]);
    tiny.tensors.insert(
        "model.layers.0.self_attn.o_proj.weight".into(),
        (Dtype::I32, vec![64, 64], vec![0; 64 * 64 * 4]),
    );
    tiny.config["tie_word_embeddings"] = json!(false);
    let message = problems(&tiny);
    for word in [
        "model.norm.weight",
        "layers.1.mlp.up_proj.weight",
        "[64, 64], found [64, 63]",
        "o_proj.weight: expected a float",
        "lm_head.weight",
        "config.json",
    ] {
        assert!(message.contains(word), "{word}: {message}");
    }
}

#[test]
fn a_lying_config_allocates_nothing_and_says_what_is_wrong() {
    for (key, value, word) in [
        ("num_hidden_layers", json!(4000), "and "),
        ("num_hidden_layers", json!(1_000_000_000), "num_hidden_layers"),
        ("hidden_size", json!(2_000_000_000), "embed_tokens"),
        ("vocab_size", json!(2_000_000_000), "embed_tokens"),
        ("intermediate_size", json!(1_000_000), "mlp"),
        ("num_attention_heads", json!(3), "hidden_size"),
        ("num_attention_heads", json!(2), "k_proj"),
        ("num_key_value_heads", json!(3), "num_key_value_heads"),
        ("head_dim", json!(2_000_000_000), "q_proj"),
        ("head_dim", json!(15), "head_dim"),
        ("model_type", json!("gpt9"), "gpt9"),
        ("model_type", json!("qwen3"), "q_norm"),
        ("model_type", json!("gpt2"), "n_embd"),
    ] {
        let mut tiny = Tiny::llama();
        tiny.config[key] = value.clone();
        let message = problems(&tiny);
        assert!(message.contains(word), "{key} {value}: {message}");
        assert!(message.len() < 10_000);
    }
    let mut tiny = Tiny::llama();
    tiny.config["max_position_embeddings"] = json!(2_000_000_000);
    let model = open(&tiny, 1).expect("a large context costs nothing until it is used");
    assert_eq!(logits(&model, &[&PROMPT]), logits(&open(&Tiny::llama(), 1).expect("good"), &[&PROMPT]));
}

#[test]
fn quantized_folders_that_contradict_themselves_are_refused() {
    let good = || quantized(4, 32, true, &Value::Null).1;
    let module = "model.layers.0.mlp.gate_proj";
    let at = |part: &str| format!("{module}.{part}");
    let check = |change: &dyn Fn(&mut Tiny), word: &str| {
        let mut tiny = good();
        change(&mut tiny);
        let message = problems(&tiny);
        assert!(message.contains(word), "{word}: {message}");
    };
    let set = |tiny: &mut Tiny, key: &str, value: Value| {
        let path = format!("/quantization_config/config_groups/group_0/{key}");
        *tiny.config.pointer_mut(&path).expect("there") = value;
    };
    for part in ["weight_packed", "weight_scale", "weight_shape"] {
        check(&|t| drop(t.tensors.remove(&at(part))), &at(part));
    }
    check(&|t| t.tensors.get_mut(&at("weight_shape")).expect("there").2[0] = 95, "[95, 64]");
    check(&|t| set(t, "weights/group_size", json!(48)), "48");
    check(&|t| set(t, "weights/group_size", json!(16)), "16");
    check(&|t| set(t, "weights/num_bits", json!(8)), "weight_packed");
    check(&|t| set(t, "weights/symmetric", json!(false)), "zero_point");
    check(&|t| set(t, "targets", json!(["re:.*up_proj"])), "no group");
    for bad in [0x7e00_u16, 0x7c00, 0xbc00] {
        let change = |t: &mut Tiny| {
            t.tensors.get_mut(&at("weight_scale")).expect("there").2[..2].copy_from_slice(&bad.to_le_bytes());
        };
        check(&change, "gate_proj");
    }
    let mut regrouped: Vec<u8> = (0..64_i32).flat_map(|i| (i / 32).to_le_bytes()).collect();
    let mut tiny = good();
    tiny.tensors.insert(at("weight_g_idx"), (Dtype::I32, vec![64], regrouped.clone()));
    assert!(open(&tiny, 1).is_ok(), "the usual order is no order");
    regrouped[0] = 1;
    tiny.tensors.insert(at("weight_g_idx"), (Dtype::I32, vec![64], regrouped));
    assert!(problems(&tiny).contains("actorder"));
}

#[test]
fn requests_out_of_range_are_errors_and_change_nothing() {
    let model = open(&Tiny::llama(), 1).expect("good");
    let mut session = model.session();
    let mut out = Vec::new();
    let mut run = |tokens: &[u32]| session.forward(&model, tokens, Logits::Last, &mut out, &never);
    assert!(matches!(run(&[]), Err(Error::Argument { .. })));
    assert!(matches!(run(&[0, 67]), Err(Error::Token { token: 67, position: 1, vocab: VOCAB })));
    assert!(matches!(run(&[u32::MAX]), Err(Error::Token { .. })));
    assert!(matches!(run(&[1; 97]), Err(Error::Context { tokens: 97, limit: 96 })));
    assert!(run(&[1; 96]).is_ok());
    assert!(matches!(run(&[1]), Err(Error::Context { tokens: 97, limit: 96 })));
    assert_eq!(session.len(), 96);
    let other = open(&Tiny::llama(), 1).expect("good");
    assert!(session.forward(&other, &[1], Logits::Last, &mut out, &never).is_err());
    for context in [0, 97, usize::MAX] {
        let options = LoadOptions { context: Some(context), ..LoadOptions::default() };
        assert!(Model::open(Tiny::llama().save().path(), &options).is_err());
    }
    let threads = LoadOptions { threads: Some(0), ..LoadOptions::default() };
    assert!(Model::open(Tiny::llama().save().path(), &threads).is_err());
}

#[test]
fn an_interrupted_pass_leaves_the_session_as_it_was() {
    let model = open(&Tiny::llama(), 1).expect("good");
    let mut session = model.session();
    let mut out = Vec::new();
    session.forward(&model, &PROMPT[..5], Logits::None, &mut out, &never).expect("a prompt");
    for polls in 0..3_usize {
        let left = std::cell::Cell::new(polls);
        let stop = || left.replace(left.get().saturating_sub(1)) == 0;
        let result = session.forward(&model, &PROMPT[5..], Logits::Last, &mut out, &stop);
        assert!(matches!(result, Err(Error::Interrupted)));
        assert_eq!(session.tokens(), &PROMPT[..5]);
    }
    session.forward(&model, &PROMPT[5..], Logits::Last, &mut out, &never).expect("logits");
    let whole = logits(&model, &[&PROMPT]);
    assert_eq!(bits(&out), bits(&whole[whole.len() - VOCAB..]));
}

fn generate(model: &Model, request: Request) -> (Vec<u32>, Generation) {
    let mut session = model.session();
    let mut generation = Generation::new(model, &session, request).expect("a good request");
    let mut tokens = Vec::new();
    while let Some(token) = generation.step(model, &mut session, &never).expect("a token") {
        tokens.push(token);
    }
    (tokens, generation)
}

#[test]
fn generation_ends_by_length_stop_and_context() {
    let model = open(&Tiny::llama(), 1).expect("good");
    let request = Request { prompt: PROMPT.to_vec(), max_new: 20, ..Request::default() };
    let (tokens, generation) = generate(&model, request.clone());
    assert_eq!((tokens.len(), generation.finish_reason()), (20, Some(FinishReason::Length)));
    let metrics = generation.metrics();
    assert_eq!((metrics.prefill_tokens, metrics.decode_tokens, metrics.generated_tokens), (11, 19, 20));

    let first = tokens.iter().position(|token| *token == tokens[7]).expect("it is there");
    let (stopped, generation) = generate(&model, Request { stop: vec![tokens[7]], ..request.clone() });
    assert_eq!((&stopped[..], generation.finish_reason()), (&tokens[..first], Some(FinishReason::Stop)));
    assert_eq!(generation.stop_token(), Some(tokens[7]));

    let (all, generation) = generate(&model, Request { max_new: 1000, ..request.clone() });
    assert_eq!(generation.finish_reason(), Some(FinishReason::Context));
    assert_eq!((all.len(), &all[..20]), (96 - 11 + 1, &tokens[..]));

    let (none, generation) = generate(&model, Request { max_new: 0, ..request.clone() });
    assert_eq!((none.len(), generation.finish_reason()), (0, Some(FinishReason::Length)));

    let session = model.session();
    let refused = |request: Request| Generation::new(&model, &session, request).map(|_| ());
    assert!(matches!(
        refused(Request { prompt: vec![1; 97], ..request.clone() }),
        Err(Error::Context { .. })
    ));
    assert!(refused(Request { prompt: vec![], ..request.clone() }).is_err());
    assert!(refused(Request { stop: vec![99], ..request.clone() }).is_err());
    let nan = Sampling { top_p: f32::NAN, ..Sampling::default() };
    assert!(refused(Request { sampling: nan, ..request }).is_err());
}

#[test]
fn seeds_repeat_and_an_interrupted_step_may_be_tried_again() {
    let model = open(&Tiny::llama(), 1).expect("good");
    let sampling = Sampling {
        temperature: 1.5,
        top_k: 20,
        top_p: 0.95,
        repeat_penalty: 1.1,
        seed: 5,
        ..Sampling::default()
    };
    let request = Request { prompt: PROMPT.to_vec(), max_new: 24, sampling, ..Request::default() };
    let (tokens, _) = generate(&model, request.clone());
    let mut session = model.session();
    let stopped = std::cell::Cell::new(false);
    let every_other = || stopped.replace(!stopped.get());
    let mut generation = Generation::new(&model, &session, request.clone()).expect("a good request");
    assert!(matches!(generation.step(&model, &mut session, &|| true), Err(Error::Interrupted)));
    let mut again = Vec::new();
    loop {
        match generation.step(&model, &mut session, &every_other) {
            Ok(Some(token)) => again.push(token),
            Ok(None) => break,
            Err(Error::Interrupted) => {
                again.extend(generation.step(&model, &mut session, &never).expect("a token"));
                if generation.finish_reason().is_some() {
                    break;
                }
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(tokens, again);
    let mut other = request;
    other.sampling.seed = 6;
    let mut session = model.session();
    let generator = Generator::new(&model, &mut session, other, &never).expect("a good request");
    assert_ne!(tokens, generator.collect::<Result<Vec<_>>>().expect("tokens"));
}

#[test]
fn an_interrupted_reduced_prompt_leaves_the_session_as_it_was() {
    let policy = Policy { ratio: 0.6, layers: Some(vec![0]), min_prompt: 2, ..Policy::default() };
    let model = open(&Tiny::llama(), 2).expect("good").with_tokens(Some(policy)).expect("fits");
    let mut session = model.session();
    let (mut out, mut again) = (Vec::new(), Vec::new());
    session.forward(&model, &PROMPT[..3], Logits::None, &mut out, &never).expect("a text");
    session.prefill(&model, &PROMPT, Logits::Last, &mut out, &never).expect("logits");
    let held: Vec<usize> = session.layer_tokens().collect();
    // 11 tokens of which 4.4 stay, the last of the prompt among them.
    assert_eq!(held, [14, 7]);
    session.truncate(3);
    for polls in 0..3_usize {
        let left = std::cell::Cell::new(polls);
        let stop = || left.replace(left.get().saturating_sub(1)) == 0;
        let result = session.prefill(&model, &PROMPT, Logits::Last, &mut again, &stop);
        assert!(matches!(result, Err(Error::Interrupted)), "{polls}");
        assert_eq!((session.len(), session.layer_tokens().collect::<Vec<_>>()), (3, vec![3, 3]));
    }
    session.prefill(&model, &PROMPT, Logits::Last, &mut again, &never).expect("logits");
    assert_eq!(bits(&out), bits(&again));
    assert!(session.prefill(&model, &PROMPT, Logits::All, &mut again, &never).is_err());
    assert_eq!(session.layer_tokens().collect::<Vec<_>>(), held);
    assert!(session.kv_bytes() < session.bytes());
    // A session of its own: another policy, or none.
    let mut plain = model.session_with(None, None).expect("none");
    plain.prefill(&model, &PROMPT, Logits::All, &mut out, &never).expect("all");
    assert_eq!(plain.layer_tokens().collect::<Vec<_>>(), [11, 11]);
    let nan = Policy { ratio: f64::NAN, ..Policy::default() };
    assert!(model.session_with(Some(nan), None).is_err());
}
