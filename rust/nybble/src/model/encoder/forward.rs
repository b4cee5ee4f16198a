//! The forward pass of an encoder: pixels in, tokens, embeddings and class scores out.
//!
//! It reads as the decoder's and is made of the same pieces; `n` is the number of tokens of all images computed together.
//! With a policy of token reduction (`reduce.rs`) there are fewer of them in deeper layers.
//! Images meet in the linears only, each attends to itself. Rows are computed with the same arithmetic whatever they are
//! computed with, so an image's results do not depend on the images beside it.

use std::time::Duration;

use super::load::{AttentionPool, LoadedPooling, Weights};
use super::reduce::Reduction;
use super::spec::{EncoderSpec, Reads};
use super::{Encoder, positions};
use crate::error::{Error, Result};
use crate::kernels::attention::{self, Graph, KvCache};
use crate::kernels::quantize::Source;
use crate::model::blocks::{Attention, Layer};
use crate::model::decoder::{self, Scratch, feed_forward, fit, leave, project};
use crate::model::linear::Run;
use crate::tokens::PatchPolicy;

/// Tokens computed together, unless one image has more: enough for the matmuls to run at full speed, and few enough that
/// what one layer leaves is still in the cache when the next one reads it.
const ROWS: usize = 1024;

/// What an encoder makes of images.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Encoding {
    /// Number of images.
    pub images: usize,
    /// The last hidden states `[images, tokens, hidden]`, learned tokens first, then patches row by row.
    pub tokens: Vec<f32>,
    /// `[images, embedding]`.
    pub embedding: Vec<f32>,
    /// `[images, labels]`; empty without a classifier.
    pub logits: Vec<f32>,
    /// Which patches the tokens behind the learned ones are, `[images, tokens - learned]`; [`MERGED`] for one that several
    /// became. Empty where no policy was given.
    pub places: Vec<u32>,
    /// For each patch the token that holds it, counted behind the learned ones, `[images, patches]`; [`GONE`] for one that left.
    /// Empty where no policy was given.
    pub owners: Vec<u32>,
    /// Time in which tokens were scored, chosen and taken out; without that in which attention recorded what it gives whom.
    pub choosing: Duration,
}

/// Stands in [`Encoding::places`] for a token that is no single patch's.
pub const MERGED: u32 = u32::MAX;

/// Stands in [`Encoding::owners`] for a patch that left.
pub const GONE: u32 = u32::MAX;

/// Buffers of the forward pass.
#[derive(Debug, Default)]
pub(super) struct Memory {
    scratch: Scratch,
    patches: Vec<f32>, // [images * grid, patch]
    pooled: Vec<f32>,  // [images, hidden or 2 hidden]
    scores: Vec<f32>,  // [images, labels]
    /// Of one image in one layer.
    cache: Option<KvCache>,
    /// Of the pooling.
    pool_cache: Option<KvCache>,
    /// Of the layer that chooses patches by it.
    graph: Graph,
    /// Interpolated positions of the grid used last.
    positions: ([usize; 2], Vec<f32>),
}

/// Computes `pixels [images, channels, height, width]`.
pub(super) fn forward(
    model: &Encoder,
    pixels: &[f32],
    size: [usize; 2],
    policy: Option<&PatchPolicy>,
    memory: &mut Memory,
    stop: &dyn Fn() -> bool,
) -> Result<Encoding> {
    let spec = &model.spec;
    let image = spec.channels * size[0] * size[1];
    let (images, tokens) = (pixels.len() / image, spec.tokens(size));
    let mut out = Encoding { images, ..Encoding::default() };
    if policy.is_none() {
        out.tokens.reserve_exact(images * tokens * spec.hidden);
    }
    let step = (ROWS / tokens).max(1);
    for (index, pixels) in pixels.chunks(step * image).enumerate() {
        let images = pixels.len() / image;
        let mut reduction = policy.map(|policy| {
            let graph = std::mem::take(&mut memory.graph);
            Reduction::new(policy, spec, index * step, images, size, graph)
        });
        chunk(model, pixels, size, reduction.as_mut(), memory, &mut out, stop)?;
        if let Some(reduction) = reduction {
            out.places.extend(reduction.places);
            out.owners.extend(reduction.owners);
            out.choosing += reduction.spent;
            memory.graph = reduction.graph;
        }
    }
    Ok(out)
}

/// Some images together.
fn chunk(
    model: &Encoder,
    pixels: &[f32],
    size: [usize; 2],
    mut reduction: Option<&mut Reduction<'_>>,
    memory: &mut Memory,
    out: &mut Encoding,
    stop: &dyn Fn() -> bool,
) -> Result<()> {
    let run = Run { pool: &model.pool, kernels: &model.kernels, settings: &model.settings };
    let (spec, weights) = (&model.spec, &model.weights);
    embed(run, spec, weights, pixels, size, memory)?;
    let images = pixels.len() / (spec.channels * size[0] * size[1]);
    let mut n = images * spec.tokens(size);
    let s = &mut memory.scratch;
    for buffer in [&mut s.xb, &mut s.h] {
        fit(buffer, n * spec.hidden);
    }
    if let Some(norm) = &weights.embedding_norm {
        norm.rows(run, &s.x, &mut s.xb);
        std::mem::swap(&mut s.x, &mut s.xb);
    }
    for (index, layer) in weights.layers.iter().enumerate() {
        if stop() {
            return Err(Error::Interrupted);
        }
        let Layer { attention, attention_block, mlp, mlp_block } = layer;
        let (Some(attention), Some(mlp)) = (attention, mlp) else {
            unreachable!("no configuration of an encoder leaves out a part of a layer");
        };
        let cache = match &mut memory.cache {
            Some(cache) if cache.kv_heads() == attention.kv_heads => cache,
            // Of a pruned model whose layers differ, each needs its own.
            other => other.insert(KvCache::new(attention.kv_heads, attention.head_dim, model.kv)),
        };

        project(run, attention_block, attention, None, &|row| row, None, n, s)?;
        if let Some(reduction) = &mut reduction {
            reduction.begin(index, n);
        }
        attend(run, attention, cache, images, reduction.as_deref_mut(), s)?;
        attention.out.forward_source(run, &mut Source::Given(&s.att), n, &[], &mut s.rounded, &mut s.h)?;
        leave(run, attention_block, s);
        reduce(reduction.as_deref_mut(), false, &mut n, spec.hidden, s);

        feed_forward(run, mlp_block, mlp, n, &[], None, s)?;
        leave(run, mlp_block, s);
        reduce(reduction.as_deref_mut(), true, &mut n, spec.hidden, s);
    }
    if let Some(norm) = &weights.final_norm {
        norm.rows(run, &s.x, &mut s.xb);
        std::mem::swap(&mut s.x, &mut s.xb);
    }
    out.tokens.extend_from_slice(&s.x);
    let reduction = reduction.as_deref();
    classify(run, spec, weights, images, reduction, memory, &mut out.logits)?;
    pool(run, model, images, reduction, memory, &mut out.embedding)
}

/// `x = [learned tokens; patches W + b + positions]` of every image.
fn embed(
    run: Run<'_>,
    spec: &EncoderSpec,
    weights: &Weights,
    pixels: &[f32],
    size: [usize; 2],
    memory: &mut Memory,
) -> Result<()> {
    let [rows, cols] = spec.grid(size);
    let [high, wide] = spec.patch;
    let (patches, width, hidden) = (rows * cols, spec.patch_len(), spec.hidden);
    let images = pixels.len() / (spec.channels * size[0] * size[1]);
    let s = &mut memory.scratch;
    fit(&mut memory.patches, images * patches * width);
    run.pool.split_rows(&mut memory.patches, width, &|first, part| {
        for (i, patch) in part.chunks_exact_mut(width).enumerate() {
            let (image, place) = ((first + i) / patches, (first + i) % patches);
            let (top, left) = (place / cols * high, place % cols * wide);
            for (line, out) in patch.chunks_exact_mut(wide).enumerate() {
                let (channel, y) = (image * spec.channels + line / high, top + line % high);
                out.copy_from_slice(&pixels[(channel * size[0] + y) * size[1] + left..][..wide]);
            }
        }
    });
    fit(&mut s.h, images * patches * hidden);
    weights.patch.forward(run, &memory.patches, images * patches, &mut s.rounded, &mut s.h)?;

    let learned_grid = spec.grid(spec.image);
    let added = if learned_grid == [rows, cols] {
        &weights.positions
    } else {
        if memory.positions.0 != [rows, cols] {
            let table = &weights.positions;
            let new = positions::interpolate(table, learned_grid, [rows, cols], hidden, spec.antialias);
            memory.positions = ([rows, cols], new);
        }
        &memory.positions.1
    };
    let image = weights.learned.len() + patches * hidden;
    fit(&mut s.x, images * image);
    for (x, h) in s.x.chunks_exact_mut(image).zip(s.h.chunks_exact(patches * hidden)) {
        let (learned, x) = x.split_at_mut(weights.learned.len());
        learned.copy_from_slice(&weights.learned);
        x.copy_from_slice(h);
        run.kernels.elementwise.add_assign(x, added);
    }
    Ok(())
}

/// Takes the tokens that were chosen to leave out of `x`, if this is the place in a layer where they do.
fn reduce(
    reduction: Option<&mut Reduction<'_>>,
    behind: bool,
    n: &mut usize,
    hidden: usize,
    s: &mut Scratch,
) {
    let Some(reduction) = reduction.filter(|reduction| reduction.leaves(behind)) else { return };
    *n = reduction.leave(&s.x, hidden, &mut s.xb);
    std::mem::swap(&mut s.x, &mut s.xb);
    for buffer in [&mut s.xb, &mut s.h] {
        fit(buffer, *n * hidden);
    }
}

/// `att = softmax(scale * q kᵀ) v` of every image by itself; where tokens are reduced, each image's plan is made before the
/// next one's keys replace its own.
///
/// On codes there is no cache: it is filled where a layer's choice of tokens reads it. A method that wants the graph of
/// attention gets that of floats, and the layer computes in floats, for the probabilities are a part of it; what tokens receive
/// is computed from floats beside attention on codes.
fn attend(
    run: Run<'_>,
    attention: &Attention,
    cache: &mut KvCache,
    images: usize,
    mut reduction: Option<&mut Reduction<'_>>,
    s: &mut Scratch,
) -> Result<()> {
    let q = attention.heads * attention.head_dim;
    let k = attention.kv_heads * attention.head_dim;
    let width = q + 2 * k;
    let n = s.qkv.len() / width / images;
    let shape = decoder::shape(run, attention);
    fit(&mut s.att, images * n * q);
    let (pool, kernel, scratch) = (run.pool, run.kernels.attention, &mut s.attention);
    let images = s.qkv.chunks_exact(n * width).zip(s.att.chunks_exact_mut(n * q));
    for (image, (qkv, out)) in images.enumerate() {
        let graph = reduction.as_ref().is_some_and(|reduction| reduction.wants_graph());
        let codes = run.settings.attention_codes && !graph;
        cache.truncate(0);
        if !codes || reduction.as_ref().is_some_and(|reduction| reduction.wants_cache()) {
            cache.append(pool, &qkv[q..], &qkv[q + k..], n, width)?;
        }
        let bias = reduction.as_ref().and_then(|reduction| reduction.bias(image, n)).map(<[f32]>::to_vec);
        let shape = attention::Shape { bias: bias.as_deref(), ..shape };
        if codes {
            let (k, v) = (&qkv[q..], &qkv[q + k..]);
            let rows = attention::codes::Rows { q: qkv, q_stride: width, k, v, kv_stride: width };
            attention::attend_codes(pool, run.kernels, &shape, rows, n, out, scratch)?;
        } else if let Some(graph) = reduction.as_mut().and_then(|reduction| reduction.graph()) {
            attention::attend_graph(pool, kernel, &shape, cache, qkv, width, out, graph, scratch)?;
        } else {
            attention::attend(pool, kernel, &shape, cache, qkv, width, n, out, scratch)?;
        }
        if let Some(reduction) = &mut reduction {
            reduction.decide(run, &shape, cache, qkv, n, scratch)?;
        }
    }
    Ok(())
}

/// Appends the mean of the classifiers' scores of `x`'s tokens.
fn classify(
    run: Run<'_>,
    spec: &EncoderSpec,
    weights: &Weights,
    images: usize,
    reduction: Option<&Reduction<'_>>,
    memory: &mut Memory,
    logits: &mut Vec<f32>,
) -> Result<()> {
    let Memory { scratch: s, pooled, scores, .. } = memory;
    let (hidden, labels, first) = (spec.hidden, spec.labels(), logits.len());
    let image = s.x.len() / images;
    let patches = weights.learned.len()..image;
    let mean = |index: usize, tokens: &[f32], pooled: &mut Vec<f32>| {
        let sizes = reduction.and_then(|reduction| reduction.sizes(index, image / hidden));
        mean(&tokens[patches.clone()], hidden, sizes.map(|sizes| &sizes[patches.start / hidden..]), pooled);
    };
    logits.resize(first + images * labels, 0.0);
    for (linear, reads) in &weights.heads {
        pooled.clear();
        for (index, tokens) in s.x.chunks_exact(image).enumerate() {
            match reads {
                Reads::Token(token) => pooled.extend_from_slice(&tokens[token * hidden..][..hidden]),
                Reads::PatchMean => mean(index, tokens, pooled),
                Reads::ClassAndPatchMean => {
                    pooled.extend_from_slice(&tokens[..hidden]);
                    mean(index, tokens, pooled);
                }
            }
        }
        fit(scores, images * labels);
        linear.forward(run, pooled, images, &mut s.rounded, scores)?;
        run.kernels.elementwise.add_assign(&mut logits[first..], scores);
    }
    if weights.heads.len() > 1 {
        run.kernels.elementwise.scale(&mut logits[first..], 1.0 / weights.heads.len() as f32);
    }
    Ok(())
}

/// Appends the mean of rows of `width`, each counted as often as `sizes` says.
fn mean(rows: &[f32], width: usize, sizes: Option<&[f32]>, out: &mut Vec<f32>) {
    let first = out.len();
    out.resize(first + width, 0.0);
    for (i, row) in rows.chunks_exact(width).enumerate() {
        let size = sizes.map_or(1.0, |sizes| sizes[i]);
        out[first..].iter_mut().zip(row).for_each(|(sum, x)| *sum += size * x);
    }
    let count = sizes.map_or((rows.len() / width) as f32, |sizes| sizes.iter().sum());
    out[first..].iter_mut().for_each(|sum| *sum /= count);
}

/// Appends the embeddings of `x`'s images.
fn pool(
    run: Run<'_>,
    model: &Encoder,
    images: usize,
    reduction: Option<&Reduction<'_>>,
    memory: &mut Memory,
    embedding: &mut Vec<f32>,
) -> Result<()> {
    let (hidden, weights) = (model.spec.hidden, &model.weights);
    match &weights.pooling {
        LoadedPooling::Class(norm) => {
            let (x, pooled) = (&memory.scratch.x, &mut memory.pooled);
            pooled.clear();
            for tokens in x.chunks_exact(x.len() / images) {
                pooled.extend_from_slice(&tokens[..hidden]);
            }
            if let Some(norm) = norm {
                let class = pooled.clone();
                norm.rows(run, &class, pooled);
            }
        }
        LoadedPooling::Attention(pooling) => attention_pool(run, model, pooling, images, reduction, memory)?,
    }
    let first = embedding.len();
    let Memory { scratch: s, pooled, .. } = memory;
    embedding.resize(first + images * model.spec.embedding(), 0.0);
    let out = &mut embedding[first..];
    if let Some(linear) = &weights.projection {
        return linear.forward(run, pooled, images, &mut s.rounded, out);
    }
    out.copy_from_slice(pooled);
    Ok(())
}

/// `h = out(softmax(scale * query kᵀ) v)`, `pooled = h + mlp(norm(h))` of every image.
fn attention_pool(
    run: Run<'_>,
    model: &Encoder,
    pooling: &AttentionPool,
    images: usize,
    reduction: Option<&Reduction<'_>>,
    memory: &mut Memory,
) -> Result<()> {
    let hidden = model.spec.hidden;
    let dim = hidden / pooling.heads;
    let Memory { scratch: s, pooled, pool_cache, .. } = memory;
    let n = s.x.len() / hidden;
    fit(&mut s.qkv, n * 2 * hidden);
    pooling.kv.forward(run, &s.x, n, &mut s.rounded, &mut s.qkv)?;
    let cache = pool_cache.get_or_insert_with(|| KvCache::new(pooling.heads, dim, model.kv));
    let shape = attention::Shape {
        heads: pooling.heads,
        kv_heads: pooling.heads,
        groups: None,
        head_dim: dim,
        scale: (1.0 / (dim as f64).sqrt()) as f32,
        causal: false,
        window: None,
        alibi: None,
        softcap: None,
        bias: None,
        log2: false,
    };
    fit(&mut s.att, images * hidden);
    let n = n / images;
    let images_of = s.qkv.chunks_exact(n * 2 * hidden).zip(s.att.chunks_exact_mut(hidden));
    for (index, (kv, out)) in images_of.enumerate() {
        cache.truncate(0);
        cache.append(run.pool, kv, &kv[hidden..], n, 2 * hidden)?;
        let sizes = reduction.and_then(|reduction| reduction.sizes(index, n));
        let bias: Option<Vec<f32>> = sizes.map(|sizes| sizes.iter().map(|size| size.ln()).collect());
        let shape = attention::Shape { bias: bias.as_deref(), ..shape };
        let kernel = run.kernels.attention;
        attention::attend(run.pool, kernel, &shape, cache, &pooling.query, hidden, 1, out, &mut s.attention)?;
    }
    let width = pooling.mlp.gate_up.rows();
    fit(pooled, images * hidden);
    for (buffer, width) in [(&mut s.h, hidden), (&mut s.gate_up, width), (&mut s.inner, pooling.mlp.inner)] {
        fit(buffer, images * width);
    }
    pooling.out.forward(run, &s.att, images, &mut s.rounded, pooled)?;
    pooling.norm.rows(run, pooled, &mut s.h);
    pooling.mlp.gate_up.forward(run, &s.h, images, &mut s.rounded, &mut s.gate_up)?;
    for (gate_up, inner) in s.gate_up.chunks_exact(width).zip(s.inner.chunks_exact_mut(pooling.mlp.inner)) {
        pooling.mlp.activate(run, gate_up, &[], inner);
    }
    pooling.mlp.down.forward(run, &s.inner, images, &mut s.rounded, &mut s.h)?;
    run.kernels.elementwise.add_assign(pooled, &s.h);
    Ok(())
}
