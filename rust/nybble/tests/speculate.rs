//! Speculation never changes a token: random models, hostile drafters, every drafter, sampled and greedy.

mod tiny;

use nybble::decode::{FinishReason, Generation, GenerationMetrics, Request, Rng, Sampling};
use nybble::kernels::attention::KvType;
use nybble::model::{LoadOptions, Logits, Model, Session};
use nybble::speculate::{
    Datastore, Draft, DraftTree, Matrix, Settings, Size, Source, Speculation, Speculator, Statistics, Step,
    Text, Times, statistics,
};
use nybble::{Error, Result};
use proptest::prelude::*;
use tempfile::TempDir;
use tiny::{Tiny, VOCAB};

const CONTEXT: usize = 600;

/// Texts of the test of distributions.
const DRAWS: usize = 4000;

/// The tiny model; quantized to 4 bits with 8-bit activations if asked for.
fn folder(quantized: bool) -> TempDir {
    let mut plain = Tiny::llama();
    plain.config["max_position_embeddings"] = CONTEXT.into();
    if !quantized {
        return plain.save();
    }
    let mut rounded = Tiny { config: plain.config.clone(), tensors: plain.tensors.clone() };
    for matrix in plain.matrices().iter().filter(|name| name.contains("layers")) {
        rounded.quantize(matrix, 4, 32, true, &mut plain);
    }
    plain.config["quantization_config"] = serde_json::json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"g": {"targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": true},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": true,
                "symmetric": true}}}});
    plain.save()
}

fn open(folder: &TempDir, threads: usize, kv: KvType) -> Model {
    let options = LoadOptions { threads: Some(threads), kv: Some(kv), ..LoadOptions::default() };
    Model::open(folder.path(), &options).expect("good")
}

fn never() -> bool {
    false
}

/// What a generation gave, and where it left its session.
#[derive(Debug, PartialEq)]
struct Outcome {
    tokens: Vec<u32>,
    finish: Option<FinishReason>,
    stop: Option<u32>,
    held: Vec<u32>,
    last: Vec<u32>,
}

fn outcome(model: &Model, session: &mut Session, generation: &Generation, tokens: Vec<u32>) -> Outcome {
    let held = session.tokens().to_vec();
    // The keys and values that were kept are those of the tokens.
    let mut logits = Vec::new();
    if held.len() < model.context() {
        session.forward(model, &[1], Logits::Last, &mut logits, &never).expect("room");
    }
    let last = logits.iter().map(|logit| logit.to_bits()).collect();
    Outcome { tokens, finish: generation.finish_reason(), stop: generation.stop_token(), held, last }
}

fn plainly(model: &Model, request: &Request) -> Outcome {
    let mut session = model.session();
    let mut generation = Generation::new(model, &session, request.clone()).expect("good");
    let mut tokens = Vec::new();
    while let Some(token) = generation.step(model, &mut session, &never).expect("a step") {
        tokens.push(token);
    }
    outcome(model, &mut session, &generation, tokens)
}

fn speculating(
    model: &Model,
    request: &Request,
    speculation: &mut Speculation,
    stop: &dyn Fn() -> bool,
) -> (Outcome, GenerationMetrics) {
    let mut session = model.session();
    let mut generation = Generation::new(model, &session, request.clone()).expect("good");
    let mut tokens = Vec::new();
    loop {
        match speculation.step(&mut generation, model, &mut session, stop) {
            Ok(Some(token)) => tokens.push(token),
            Ok(None) => break,
            Err(Error::Interrupted) => {} // and try again
            Err(error) => panic!("{error}"),
        }
    }
    let metrics = generation.metrics().clone();
    (outcome(model, &mut session, &generation, tokens), metrics)
}

/// Anything: wrong tokens, the right continuation up to a place, chains, stars, and whatever lies between.
struct Hostile {
    rng: Rng,
    truth: Vec<u32>,
}

impl Draft for Hostile {
    fn name(&self) -> &'static str {
        "hostile"
    }

    fn propose(&mut self, text: &Text<'_>, tree: &mut DraftTree, statistics: &Statistics) -> Result<()> {
        for _ in 0..self.rng.bits() % 30 {
            let parent = self.rng.bits() as usize % tree.nodes().len();
            let token = (self.rng.bits() % VOCAB as u64) as u32;
            tree.add(parent, token, statistics::random(), statistics);
        }
        let mut node = 0;
        for &token in self.truth.iter().skip(text.tokens.len()).take(self.rng.bits() as usize % 9) {
            let kind = statistics::model(0.5);
            node = tree.add(node, token, kind, statistics).unwrap_or(0);
        }
        Ok(())
    }

    fn learn(&mut self, step: &Step<'_>) {
        assert_eq!(step.logits.len(), step.tokens.len() * VOCAB);
        assert!(step.rows().count() == step.tokens.len() && !step.tokens.is_empty());
    }
}

fn sampled(temperature: f32, seed: u64) -> Sampling {
    Sampling { temperature, top_k: 12, repeat_penalty: 1.05, seed, ..Sampling::default() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn hostile_drafts_change_nothing(
        seed in any::<u64>(), prompt in prop::collection::vec(0..VOCAB as u32, 1..70), max_new in 0_usize..60,
        temperature in prop_oneof![Just(0.0_f32), 0.2_f32..2.0], stop in prop::collection::vec(0..VOCAB as u32, 0..2),
        quantized in any::<bool>(), threads in 1_usize..4, kv in 0_usize..3, size in 0_usize..3, hiccups in any::<bool>(),
    ) {
        let folder = folder(quantized);
        let kv = [KvType::F32, KvType::F16, KvType::Int8][kv];
        let model = open(&folder, 1, kv);
        let request = Request { prompt: prompt.clone(), max_new, stop, sampling: sampled(temperature, seed) };
        let wanted = plainly(&model, &request);
        let truth = prompt.iter().chain(&wanted.tokens).copied().collect();
        let size = [Size::All, Size::Nodes(5), Size::Measured][size];
        let mut speculation = Speculation::new(vec![Box::new(Hostile { rng: Rng::new(seed), truth })], size);
        let other = open(&folder, threads, kv);
        let polls = std::cell::Cell::new(0_usize);
        let interrupt = || {
            polls.set(polls.get() + 1);
            hiccups && polls.get() % 31 == 30
        };
        let (found, metrics) = speculating(&other, &request, &mut speculation, &interrupt);
        prop_assert_eq!(&found, &wanted);
        prop_assert_eq!(metrics.generated_tokens, wanted.tokens.len());
        let draft = metrics.draft.expect("it was on");
        prop_assert_eq!(draft.tokens_by_step.iter().sum::<usize>(), metrics.decode_steps);
        let given: usize = draft.tokens_by_step.iter().zip(1..).map(|(steps, tokens)| steps * tokens).sum();
        prop_assert_eq!(given, metrics.decode_tokens);
    }
}

fn settings(sources: &[Source]) -> Settings {
    Settings { sources: sources.to_vec(), ..Settings::default() }
}

#[test]
fn every_drafter_gives_the_plain_tokens() {
    let folder = folder(true);
    let model = open(&folder, 2, KvType::F16);
    let index = folder.path().join("text.index");
    let tokens: Vec<u32> = (0..2000_u32).map(|i| (i * i + i / 7) % VOCAB as u32).collect();
    Datastore::build(&index, &tokens, VOCAB).expect("room");
    let retrieval = Settings { index: Some(index), ..settings(&[Source::Retrieval, Source::Recycle]) };
    let small = Settings { model: Some(folder.path().into()), ..settings(&[Source::Model]) };
    let paper = Settings::read(r#"{"sources": ["recycle"], "template": "paper"}"#).expect("good");
    let star = Settings::read(r#"{"sources": ["recycle"], "k": 3, "template": [3, 1]}"#).expect("good");
    let fixed = Settings { nodes: Some(7), ..Settings::default() };
    let cold = Settings::read(r#"{"start": "cold", "nodes": 20}"#).expect("good");
    for settings in [
        Settings::default(),
        fixed,
        cold,
        paper,
        star,
        retrieval,
        Settings { nodes: Some(6), ..small.clone() },
        small,
        settings(&[Source::Ngram]),
        settings(&[Source::Random]),
        Settings { nodes: Some(9), ..settings(&[Source::Pairs, Source::Ngram]) },
    ] {
        let what = format!("{settings:?}");
        let speculator = Speculator::new(&model, settings).expect("good");
        let mut accepted = 0;
        for (prompt, sampling) in
            [(vec![3, 1, 4], sampled(0.0, 0)), (vec![5; 20], sampled(0.0, 0)), (vec![7, 8], sampled(0.7, 3))]
        {
            let request = Request { prompt, max_new: 120, stop: vec![66], sampling };
            let mut speculation = speculator.speculation(&model).expect("good");
            let (found, metrics) = speculating(&model, &request, &mut speculation, &never);
            assert_eq!(found, plainly(&model, &request), "{what}");
            accepted += metrics.draft.expect("it was on").accepted_tokens;
        }
        if what.contains("nodes: Some") || what.contains("template: Some") {
            assert!(accepted > 10, "{accepted} accepted of {what}");
        }
    }
}

#[test]
fn texts_in_several_threads_share_what_is_learned() {
    const THREADS: u32 = 6;
    let folder = folder(true);
    let model = open(&folder, 2, KvType::F16);
    let every = [Source::Recycle, Source::Pairs, Source::Suffix, Source::Ngram];
    let speculator = Speculator::new(&model, Settings { nodes: Some(12), ..settings(&every) }).expect("good");
    let file = folder.path().join("matrix");
    let requests = |thread: u32| {
        (0..8).map(move |text| Request {
            prompt: vec![(7 * thread + text) % VOCAB as u32, 3],
            max_new: 40,
            ..Request::default()
        })
    };
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (model, speculator, file) = (&model, &speculator, &file);
            scope.spawn(move || {
                for request in requests(thread) {
                    let mut speculation = speculator.speculation(model).expect("good");
                    let (found, _) = speculating(model, &request, &mut speculation, &never);
                    assert_eq!(found, plainly(model, &request));
                    // Whatever the others do meanwhile, what is written is whole, and what is forgotten harmless.
                    let own = file.with_extension(thread.to_string());
                    speculator.save_matrix(&own).expect("room");
                    assert_eq!(Matrix::load(&own, VOCAB).expect("whole").k(), 8);
                    if thread == 0 {
                        speculator.forget();
                    }
                }
            });
        }
    });
    assert!(speculator.ranks(0).iter().all(|share| (0.0..=1.0).contains(share)));
}

#[test]
fn the_end_of_the_context_is_met_exactly() {
    let folder = folder(false);
    let options = LoadOptions { threads: Some(1), context: Some(40), ..LoadOptions::default() };
    let model = Model::open(folder.path(), &options).expect("good");
    for prompt in [1, 30, 38, 39, 40] {
        let request = Request { prompt: vec![5; prompt], max_new: 1000, ..Request::default() };
        let wanted = plainly(&model, &request);
        assert_eq!(wanted.finish, Some(FinishReason::Context));
        let truth = vec![5; prompt].into_iter().chain(wanted.tokens.clone()).collect();
        let hostile = Hostile { rng: Rng::new(1), truth };
        let mut speculation = Speculation::new(vec![Box::new(hostile)], Size::All);
        assert_eq!(speculating(&model, &request, &mut speculation, &never).0, wanted);
    }
}

/// Sampled tokens follow the model's distribution: chi-square of the second new token over many seeds, against the
/// probabilities computed from the logits.
#[test]
fn sampled_tokens_have_the_model_s_distribution() {
    let folder = folder(false);
    let model = open(&folder, 1, KvType::F32);
    let temperature = 2.5;
    let probabilities = |tokens: &[u32]| -> Vec<f64> {
        let mut logits = Vec::new();
        model.session().forward(&model, tokens, Logits::Last, &mut logits, &never).expect("logits");
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f64> = logits.iter().map(|l| (f64::from(l - max) / temperature).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / sum).collect()
    };
    let prompt = vec![3, 1, 4, 1, 5];
    let mut expected = vec![0.0; VOCAB];
    for (first, p) in (0..).zip(probabilities(&prompt)) {
        let next = probabilities(&prompt.iter().copied().chain([first]).collect::<Vec<_>>());
        expected.iter_mut().zip(next).for_each(|(sum, q)| *sum += p * q);
    }
    // One session: only the sampled part is run again, always with drafts behind the first token.
    let settings = Settings { nodes: Some(12), ..Settings::default() };
    let speculator = Speculator::new(&model, settings).expect("good");
    let mut counts = vec![0.0; VOCAB];
    let mut accepted = 0;
    for seed in 0..DRAWS as u64 {
        let sampling = Sampling { temperature: temperature as f32, seed, ..Sampling::default() };
        let request = Request { prompt: prompt.clone(), max_new: 3, stop: vec![], sampling };
        let mut session = model.session();
        let mut generation = Generation::new(&model, &session, request).expect("good");
        let mut speculation = speculator.speculation(&model).expect("good");
        let mut second = 0;
        for place in 0..3 {
            let token = speculation.step(&mut generation, &model, &mut session, &never).expect("a step");
            if place == 1 {
                second = token.expect("a token");
            }
        }
        counts[second as usize] += 1.0;
        accepted += generation.metrics().draft.as_ref().map_or(0, |draft| draft.accepted_tokens);
    }
    assert!(accepted > DRAWS / 20, "{accepted} drafts were right");
    // Rare tokens share a cell.
    let (mut chi, mut cells, mut rare) = (0.0, 0, (0.0, 0.0));
    for (count, p) in counts.iter().zip(&expected) {
        let mean = p * DRAWS as f64;
        if mean < 8.0 {
            rare = (rare.0 + count, rare.1 + mean);
        } else {
            chi += (count - mean).powi(2) / mean;
            cells += 1;
        }
    }
    if rare.1 > 0.0 {
        chi += (rare.0 - rare.1).powi(2) / rare.1;
        cells += 1;
    }
    // Mean plus four standard deviations of the chi-square distribution.
    let freedom = f64::from(cells - 1);
    assert!(chi < freedom + 4.0 * (2.0 * freedom).sqrt(), "chi-square {chi} of {freedom} degrees of freedom");
}

#[test]
fn a_tree_s_logits_are_those_of_its_paths() {
    for (quantized, kv) in [(false, KvType::F32), (true, KvType::F16), (true, KvType::Int8)] {
        let folder = folder(quantized);
        let model = open(&folder, 2, kv);
        let parents = [0, 0, 0, 1, 3, 2, 4, 4, 1];
        let tokens = [9, 8, 7, 6, 5, 4, 3, 2, 1];
        let prompt: Vec<u32> = (0..61).map(|i| i * 5 % VOCAB as u32).collect();
        let mut session = model.session();
        let (mut out, mut alone) = (Vec::new(), Vec::new());
        session.forward(&model, &prompt, Logits::None, &mut out, &never).expect("room");
        session.forward_tree(&model, &tokens, &parents, &mut out, &never).expect("a tree");
        assert_eq!(session.len(), 61);
        let mut other = model.session();
        for node in 0..9 {
            let mut path = vec![node];
            while path[0] > 0 {
                path.insert(0, parents[path[0]]);
            }
            let text: Vec<u32> =
                prompt.iter().copied().chain(path.iter().map(|&node| tokens[node])).collect();
            other.truncate(0);
            other.forward(&model, &text, Logits::Last, &mut alone, &never).expect("logits");
            let row = &out[node * VOCAB..][..VOCAB];
            assert!(row.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits()), "node {node}");
        }
        for wrong in [&[0, 2, 5, 6][..], &[1], &[0, 4], &[9]] {
            assert!(session.accept(wrong).is_err(), "{wrong:?}");
        }
        session.accept(&[0, 1, 3, 4, 7]).expect("a path");
        assert_eq!(session.tokens()[61..], [9, 8, 6, 5, 2]);
        assert!(session.accept(&[0]).is_err(), "the tree is gone");
        assert!(session.forward_tree(&model, &[1, 2], &[0, 1], &mut out, &never).is_err());
        assert!(session.forward_tree(&model, &[1, 2], &[0], &mut out, &never).is_err());
        assert!(session.forward_tree(&model, &[1, 999], &[0, 0], &mut out, &never).is_err());
        assert_eq!(session.len(), 66);
        // A tree that nobody accepts leaves nothing behind.
        session.forward_tree(&model, &tokens, &parents, &mut out, &never).expect("a tree");
        session.forward(&model, &[11], Logits::Last, &mut out, &never).expect("logits");
        let text = session.tokens().to_vec();
        other.truncate(0);
        other.forward(&model, &text, Logits::Last, &mut alone, &never).expect("logits");
        assert!(out.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

/// The next tokens, known beforehand.
struct Right(Vec<u32>);
impl Draft for Right {
    fn name(&self) -> &'static str {
        "right"
    }
    fn propose(&mut self, text: &Text<'_>, tree: &mut DraftTree, statistics: &Statistics) -> Result<()> {
        let mut node = 0;
        for &token in self.0.iter().skip(text.tokens.len()).take(3) {
            node = tree.add(node, token, statistics::model(0.9), statistics).unwrap_or(0);
        }
        Ok(())
    }
}

#[test]
fn drafts_that_never_pay_are_not_computed() {
    let folder = folder(true);
    let model = open(&folder, 1, KvType::F16);
    let speculator = Speculator::new(&model, settings(&[Source::Random])).expect("good");
    speculator.set_times(Times::known(vec![(1, 1.0), (2, 1.4), (8, 4.0)]).expect("times"));
    let request = Request { prompt: vec![3], max_new: 400, ..Request::default() };
    let mut speculation = speculator.speculation(&model).expect("good");
    let (_, metrics) = speculating(&model, &request, &mut speculation, &never);
    let draft = metrics.draft.expect("it was on");
    assert!(
        draft.drafted_steps < metrics.decode_steps / 8,
        "{} of {}",
        draft.drafted_steps,
        metrics.decode_steps
    );
    // And what is always right is computed once it is known to be.
    let wanted = plainly(&model, &request);
    let truth: Vec<u32> = [3].into_iter().chain(wanted.tokens).collect();
    let mut speculation = Speculation::new(vec![Box::new(Right(truth))], Size::Nodes(3));
    let (_, metrics) = speculating(&model, &request, &mut speculation, &never);
    let draft = metrics.draft.expect("it was on");
    assert!(draft.mean_accepted.is_some_and(|mean| mean > 3.9), "{draft:?}");
}

#[test]
fn what_does_not_fit_the_model_is_refused() {
    let folder = folder(false);
    let model = open(&folder, 1, KvType::F32);
    let message = |settings: Settings| Speculator::new(&model, settings).expect_err("refused").to_string();
    assert!(message(Settings { k: 0, ..Settings::default() }).contains("1 to 64"));
    let file = folder.path().join("matrix");
    Matrix::new(VOCAB + 1, 8).expect("good").save(&file).expect("room");
    assert!(message(Settings { matrix: Some(file.clone()), ..Settings::default() }).contains("67 tokens"));
    Matrix::new(VOCAB, 4).expect("good").save(&file).expect("room");
    assert!(message(Settings { matrix: Some(file), ..Settings::default() }).contains("8 candidates"));
    let narrow = Settings::read(r#"{"sources": ["recycle"], "k": 2, "template": "paper"}"#).expect("good");
    assert!(message(narrow).contains("at most 2 children"));
    let mut other = Tiny::llama();
    other.config["vocab_size"] = 66.into();
    let table = other.floats("model.embed_tokens.weight");
    other.put("model.embed_tokens.weight", &[66, 64], &table[..66 * 64]);
    let other = other.save();
    let small = Settings { model: Some(other.path().into()), ..settings(&[Source::Model]) };
    assert!(message(small).contains("67 tokens"));
    let mut log2 = Tiny::llama();
    log2.config["nybble"] = serde_json::json!({"version": 1, "run": {"softmax": "log2"}});
    let log2 = log2.save();
    let model = open(&log2, 1, KvType::F32);
    assert!(
        Speculator::new(&model, Settings::default()).is_err_and(|error| error.to_string().contains("log2"))
    );
}
