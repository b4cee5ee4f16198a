//! The token loop allocates nothing.
//!
//! One test only: other tests of the same process would be counted too.

mod tiny;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use nybble::decode::{Generation, Request, Sampling};
use nybble::model::sparsity::{LayerThresholds, Measured, Times};
use nybble::model::{LoadOptions, Model};
use nybble::tokens::Policy;
use tiny::Tiny;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
struct Counting;

// SAFETY: every call is passed on as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, data: *mut u8, layout: Layout) {
        // SAFETY: promised by the caller.
        unsafe { System.dealloc(data, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: promised by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, data: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: promised by the caller.
        unsafe { System.realloc(data, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Long enough that a token's attention is split over spans of the context.
const TOKENS: usize = 700;

fn models() -> Vec<(&'static str, Tiny)> {
    let mut plain = Tiny::llama();
    plain.config["max_position_embeddings"] = 1024.into();
    let mut rounded = Tiny { config: plain.config.clone(), tensors: plain.tensors.clone() };
    let mut packed = Tiny { config: plain.config.clone(), tensors: plain.tensors.clone() };
    for matrix in plain.matrices().iter().filter(|name| name.contains("layers")) {
        rounded.quantize(matrix, 4, 32, true, &mut packed);
    }
    packed.config["quantization_config"] = serde_json::json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"g": {"targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": true},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": true,
                "symmetric": true}}}});
    vec![("float", plain), ("quantized", packed)]
}

#[test]
fn generated_tokens_allocate_nothing() {
    let drawn = Sampling {
        temperature: 0.9,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.01,
        repeat_penalty: 1.1,
        ..Sampling::default()
    };
    let greedy = Sampling::default();
    let by_top_p = Sampling { temperature: 1.5, top_p: 0.8, ..Sampling::default() };
    for (name, tiny) in models() {
        let folder = tiny.save();
        let half = Policy { ratio: 0.5, min_prompt: 2, ..Policy::default() };
        for (threads, policy, sparse) in
            [(1, None, false), (3, None, false), (2, Some(half), false), (2, None, true)]
        {
            let options = LoadOptions { threads: Some(threads), ..LoadOptions::default() };
            let model = Model::open(folder.path(), &options).expect("good");
            let model = model.with_tokens(policy).expect("fits");
            let mut session = model.session();
            if sparse {
                // Thresholds that leave about half of the neurons and of some inputs, and times that make skipping pay.
                let inputs = [0.2, 0.3, 0.1, 0.0, 0.0];
                let layer = LayerThresholds { neurons: vec![0.4; 96], inputs, active: 0.5 };
                let sparsity = model.sparsity_of(vec![layer; 2]).expect("fits");
                let times = Times { dense: 1.0, sparse: vec![(0.1, 0.1), (0.9, 0.1)] };
                let measured = Measured {
                    neurons: Some(times.clone()),
                    inputs: std::array::from_fn(|_| Some(times.clone())),
                    speedup: Some(2.0),
                    ..Measured::default()
                };
                let found = model.probe_sparsity(&sparsity, Some(measured)).expect("no error");
                assert_eq!(found.is_some(), name == "quantized");
                session = model.session_with(None, Some(sparsity)).expect("fits");
            }
            for (i, sampling) in [&greedy, &drawn, &by_top_p, &greedy].into_iter().enumerate() {
                session.truncate(0);
                let request = Request {
                    prompt: vec![3, 1, 4, 1, 5],
                    max_new: TOKENS,
                    sampling: sampling.clone(),
                    ..Request::default()
                };
                let mut generation = Generation::new(&model, &session, request).expect("good");
                // The prompt makes the sampler's and the logits' memory; the first text that of the session.
                let mut step = || generation.step(&model, &mut session, &|| false).expect("a step");
                step();
                let before = ALLOCATIONS.load(Ordering::Relaxed);
                let mut given = 1;
                while step().is_some() {
                    given += 1;
                }
                let found = ALLOCATIONS.load(Ordering::Relaxed) - before;
                assert_eq!(given, TOKENS);
                let skipped =
                    generation.metrics().sparsity.as_ref().map_or(0, |sparsity| sparsity.sparse_blocks);
                assert_eq!(skipped > 0, sparse && name == "quantized");
                if i > 0 {
                    assert_eq!(found, 0, "{name}, {threads} threads, {sampling:?}");
                }
            }
        }
    }
}
