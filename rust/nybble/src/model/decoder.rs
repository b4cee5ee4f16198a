//! The forward pass: tokens in, logits out, one function for every family.
//!
//! It reads top to bottom: embed, then for each layer attention and feed-forward, then norm and head. Buffers are named
//! after the math, with their shape beside them; `n` is the number of tokens computed together. They keep the memory of the
//! largest `n` seen, so generating a token allocates nothing.
//!
//! Every row is computed with the same arithmetic whatever `n` is and however the threads share the work: one token at a
//! time, a whole prompt at once, or anything between gives the same bits. Only where a prompt's tokens are reduced (see
//! `reduce.rs`) it matters which tokens are computed together, for they are chosen among one another.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::Model;
use super::blocks::{Active, Attention, Block, Layer, Mlp};
use super::linear::{Linear, Run};
use super::reduce::Plan;
use super::rope::RopeTable;
use super::session::{Session, Tap};
use super::sparsity::{Input, Skip, cut};
use super::spec::Position;
use crate::error::{Error, Result};
use crate::kernels::attention::{self, Branches, KvCache};
use crate::kernels::quantize::{Activations, Source};
use crate::pack::Packed;

/// Buffers of the forward pass.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) x: Vec<f32>,       // [n, hidden]           the residual stream
    pub(super) xb: Vec<f32>,      // [n, hidden]           x after a norm
    pub(super) h: Vec<f32>,       // [n, hidden]           what a block adds to x
    narrow: Vec<f32>,             // [n, embedding width]  on the other side of a projection
    pub(super) qkv: Vec<f32>,     // [n, q + k + v]
    normed: Vec<f32>,             // [n, q + k + v]        the same with normed heads
    pub(super) att: Vec<f32>,     // [n, q]                weighted values
    pub(super) gate_up: Vec<f32>, // [n, 2 inner] or [n, inner]
    pub(super) inner: Vec<f32>,   // [n, inner]            after the activation
    pub(super) active: Active,
    pub(super) rounded: Activations,
    pub(super) attention: attention::Scratch,
}

impl Session {
    /// Computes `tokens`, at most a chunk of them, and as many last rows of logits as `logits` has room for. With a plan the
    /// tokens are reduced. As the nodes of a tree they go into the caches only. A tap is shown what layers compute.
    #[expect(clippy::too_many_arguments, reason = "the ways to compute tokens meet here")]
    pub(super) fn chunk(
        &mut self,
        model: &Model,
        tokens: &[u32],
        plan: Option<&Plan>,
        tree: Option<&Branches>,
        logits: &mut [f32],
        stop: &dyn Fn() -> bool,
        mut tap: Option<Tap<'_>>,
    ) -> Result<()> {
        let sparsity = self.sparsity.as_deref();
        let run = model.run();
        let (mut n, start) = (tokens.len(), self.tokens.len());
        let (s, rows) = (&mut self.scratch, &mut self.rows);
        if plan.is_some() {
            rows.begin(start, n);
        } else {
            rows.end();
        }
        let kept_positions = self.plan.as_deref().is_some_and(Plan::keeps_positions);
        for buffer in [&mut s.x, &mut s.xb, &mut s.h] {
            fit(buffer, n * model.spec.hidden);
        }
        for rope in &mut self.ropes {
            rope.extend(start + n);
        }

        // How far a row's token stands behind the first one.
        let offset = |row: usize| tree.map_or(row, |tree| tree.depth(row));
        embed(run, model, tokens, &|row| start + offset(row), s)?;
        for (index, (layer, cache)) in model.weights.layers.iter().zip(&mut self.caches).enumerate() {
            if stop() {
                return Err(Error::Interrupted);
            }
            let Layer { attention, attention_block, mlp, mlp_block } = layer;
            // A cache is shorter than the text where tokens of a prompt were left out before this layer.
            let first = if kept_positions { start } else { cache.len() };
            let listed = if kept_positions { rows.positions() } else { &[] };
            let position = |row: usize| listed.get(row).copied().unwrap_or_else(|| first + offset(row));
            let mut skip =
                sparsity.map(|sparsity| Skip { sparsity, layer: index, skipped: &mut self.skipped });
            if let Some(attention) = attention {
                let rope = attention.rope.map(|index| &self.ropes[index]);
                let mut leaving = false;
                project(run, attention_block, attention, rope, &position, skip.as_mut(), n, s)?;
                attend(run, attention, cache, tree, n, s)?;
                if let Some(tap) = &mut tap {
                    tap(index, "qkv", &s.xb);
                    tap(index, "out", &s.att);
                }
                if let Some(skip) = &skip {
                    cut(&mut s.att, skip.cuts().out());
                }
                if let Some(plan) = plan {
                    let Scratch { qkv, attention: memory, .. } = s;
                    let (shape, queries) = (shape(run, attention), (&qkv[..], qkv.len() / n));
                    let on = (run.pool, run.kernels);
                    leaving = rows.choose(on, plan, index, &shape, attention, cache, queries, memory)?;
                }
                let weighted = &mut Source::Given(&s.att);
                let (low, columns) = (rows.low(), (Input::Out, skip.as_mut(), &mut s.active));
                forward_cut(run, &attention.out, columns, weighted, n, low, &mut s.rounded, &mut s.h)?;
                leave(run, attention_block, s);
                if leaving {
                    n = rows.leave(&mut s.x, model.spec.hidden);
                    for buffer in [&mut s.xb, &mut s.h] {
                        fit(buffer, n * model.spec.hidden);
                    }
                }
            } else {
                cache.append(run.pool, &[], &[], n, 0)?;
            }

            if let Some(mlp) = mlp {
                feed_forward(run, mlp_block, mlp, n, rows.low(), skip, s)?;
                if let Some(tap) = &mut tap {
                    tap(index, "gate_up", &s.xb);
                    watch(run, mlp, n, s, &mut |site, values| tap(index, site, values));
                }
                leave(run, mlp_block, s);
            }
        }
        if !logits.is_empty() {
            if stop() {
                return Err(Error::Interrupted);
            }
            head(run, model, logits, s)?;
        }
        if tree.is_none() {
            self.tokens.extend_from_slice(tokens);
        }
        Ok(())
    }
}

/// Gives a buffer its length; what it holds does not matter.
pub(super) fn fit(buffer: &mut Vec<f32>, len: usize) {
    buffer.resize(len, 0.0);
}

/// `x = embedding[tokens]`, scaled, projected, with positions added and normed, as the model has it.
fn embed(
    run: Run<'_>,
    model: &Model,
    tokens: &[u32],
    position: &(dyn Fn(usize) -> usize + Sync),
    s: &mut Scratch,
) -> Result<()> {
    let (weights, spec, n) = (&model.weights, &model.spec, tokens.len());
    let token = |i: usize| tokens[i] as usize;
    if let Some(project_in) = &weights.project_in {
        fit(&mut s.narrow, n * spec.embedding.cols);
        look_up(run, &weights.embedding, &token, &mut s.narrow)?;
        project_in.forward(run, &s.narrow, n, &mut s.rounded, &mut s.x)?;
    } else {
        look_up(run, &weights.embedding, &token, &mut s.x)?;
    }
    if let Some(scale) = spec.embedding_scale {
        run.kernels.elementwise.scale(&mut s.x, scale);
    }
    if let (Some(table), Position::Learned { offset, .. }) = (&weights.positions, &spec.position) {
        look_up(run, table, &|i| position(i) + offset, &mut s.h)?;
        run.kernels.elementwise.add_assign(&mut s.x, &s.h);
    }
    if let Some(norm) = &weights.embedding_norm {
        norm.rows(run, &s.x, &mut s.xb);
        std::mem::swap(&mut s.x, &mut s.xb);
    }
    Ok(())
}

/// Rows `row(0)`, `row(1)`, ... of a table.
fn look_up(
    run: Run<'_>,
    table: &Packed,
    row: &(dyn Fn(usize) -> usize + Sync),
    out: &mut [f32],
) -> Result<()> {
    let failed = Mutex::new(None);
    run.pool.split_rows(out, table.cols(), &|first, rows| {
        for (i, out) in rows.chunks_exact_mut(table.cols()).enumerate() {
            if let Err(error) = table.row(row(first + i), out) {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// After a block: `x = after(residual + scale * post(h))`.
pub(super) fn leave(run: Run<'_>, block: &Block, s: &mut Scratch) {
    if block.residual_is_normed {
        s.x.copy_from_slice(&s.xb);
    }
    if let Some(norm) = &block.post {
        norm.rows(run, &s.h, &mut s.xb);
        std::mem::swap(&mut s.h, &mut s.xb);
    }
    add(run, &mut s.x, &s.h, block.scale.as_deref());
    if let Some(norm) = &block.after {
        norm.rows(run, &s.x, &mut s.xb);
        std::mem::swap(&mut s.x, &mut s.xb);
    }
}

/// `x += y`, or `x += y * scale` with a factor for each column, on several threads when there is much of it.
fn add(run: Run<'_>, x: &mut [f32], y: &[f32], scale: Option<&[f32]>) {
    const MUCH: usize = 1 << 15;
    let elementwise = run.kernels.elementwise;
    let width = scale.map_or(1, <[f32]>::len);
    let add = |first: usize, part: &mut [f32]| {
        let y = &y[first * width..][..part.len()];
        match scale {
            None => elementwise.add_assign(part, y),
            Some(scale) => {
                for (x, y) in part.chunks_exact_mut(width).zip(y.chunks_exact(width)) {
                    elementwise.add_scaled(x, y, scale);
                }
            }
        }
    };
    if x.len() < MUCH { add(0, x) } else { run.pool.split_rows(x, width, &add) }
}

/// `[q | k | v] = qkv(xb)` with the block's input `xb`, with normed heads and turned to their positions where the model has that.
#[expect(clippy::too_many_arguments, reason = "a block, its rows, and what may be skipped")]
pub(super) fn project(
    run: Run<'_>,
    block: &Block,
    attention: &Attention,
    rope: Option<&RopeTable>,
    position: &(dyn Fn(usize) -> usize + Sync),
    mut skip: Option<&mut Skip<'_>>,
    n: usize,
    s: &mut Scratch,
) -> Result<()> {
    let dim = attention.head_dim;
    let (q, k) = (attention.heads * dim, attention.kv_heads * dim);
    let width = q + 2 * k;
    fit(&mut s.qkv, n * width);
    let enter = block.enter(run, &s.x);
    let (least, least_q) = skip.as_ref().map_or((0.0, 0.0), |skip| (skip.cuts().qkv(), skip.cuts().q()));
    let enter = |row: usize, out: &mut [f32]| {
        enter(row, out);
        cut(out, least);
    };
    let input = &mut Source::Computed { rows: &mut s.xb, compute: &enter };
    if least_q > 0.0 {
        let parts = attention.qkv.count();
        let columns = (Input::Qkv, skip.as_deref_mut(), &mut s.active);
        forward_parts_cut(run, &attention.qkv, 1..parts, columns, input, n, &mut s.rounded, &mut s.qkv)?;
        fit(&mut s.h, s.xb.len());
        s.h.copy_from_slice(&s.xb);
        cut(&mut s.h, least_q);
        let input = &mut Source::Given(&s.h);
        let columns = (Input::Q, skip, &mut s.active);
        forward_parts_cut(run, &attention.qkv, 0..1, columns, input, n, &mut s.rounded, &mut s.qkv)?;
    } else {
        let columns = (Input::Qkv, skip, &mut s.active);
        forward_cut(run, &attention.qkv, columns, input, n, &[], &mut s.rounded, &mut s.qkv)?;
    }

    if let (Some(q_norm), Some(k_norm)) = (&attention.q_norm, &attention.k_norm) {
        fit(&mut s.normed, n * width);
        run.pool.split_rows(&mut s.normed, width, &|first, rows| {
            for (from, to) in s.qkv[first * width..].chunks_exact(width).zip(rows.chunks_exact_mut(width)) {
                let norms = (0..).map(|head| if head < attention.heads { q_norm } else { k_norm });
                let heads = from[..q + k].chunks_exact(dim).zip(to[..q + k].chunks_exact_mut(dim));
                heads.zip(norms).for_each(|((head, out), norm)| norm.row(run, head, out));
                to[q + k..].copy_from_slice(&from[q + k..]);
            }
        });
        std::mem::swap(&mut s.qkv, &mut s.normed);
    }
    if let Some(rope) = rope {
        run.pool.split_rows(&mut s.qkv, width, &|first, rows| {
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                let (cos, sin) = rope.angles(position(first + i));
                run.kernels.rope.rotate(&mut row[..q + k], dim, 2 * cos.len(), cos, sin);
            }
        });
    }
    Ok(())
}

/// Which input of a layer a linear reads, where its columns may be skipped, and scratch.
type Cut<'a, 'b> = (Input, Option<&'a mut Skip<'b>>, &'a mut Active);

/// A linear, of one row without the columns whose input is 0 where that pays.
#[expect(clippy::too_many_arguments, reason = "those of a linear and what may be skipped")]
fn forward_cut(
    run: Run<'_>,
    linear: &Linear,
    cut: Cut<'_, '_>,
    x: &mut Source<'_>,
    n: usize,
    low: &[bool],
    rounded: &mut Activations,
    y: &mut [f32],
) -> Result<()> {
    if low.is_empty() && skipping(run, linear, cut, x, n, rounded, y)? {
        return Ok(());
    }
    linear.forward_source(run, x, n, low, rounded, y)
}

/// The same of some of its matrices.
#[expect(clippy::too_many_arguments, reason = "those of a linear and what may be skipped")]
fn forward_parts_cut(
    run: Run<'_>,
    linear: &Linear,
    which: Range<usize>,
    cut: Cut<'_, '_>,
    x: &mut Source<'_>,
    n: usize,
    rounded: &mut Activations,
    y: &mut [f32],
) -> Result<()> {
    if skipping(run, linear, cut, x, n, rounded, y)? {
        return Ok(());
    }
    linear.forward_parts(run, which, x, n, rounded, y)
}

/// Computes one row with columns that may be skipped, if there are such; returns whether it did.
fn skipping(
    run: Run<'_>,
    linear: &Linear,
    (input, skip, active): Cut<'_, '_>,
    x: &mut Source<'_>,
    n: usize,
    rounded: &mut Activations,
    y: &mut [f32],
) -> Result<bool> {
    let Some(skip) = skip.filter(|_| n == 1) else { return Ok(false) };
    let columns = skip.sparsity.columns(skip.layer, input).filter(|columns| columns.worth_a_look());
    let Some(columns) = columns else { return Ok(false) };
    let sparse = linear.forward_skipping(run, columns, x, &mut active.list, rounded, y)?;
    skip.skipped.linears += u64::from(sparse);
    Ok(true)
}

/// How the heads of a layer attend.
pub(super) fn shape<'a>(run: Run<'_>, attention: &'a Attention) -> attention::Shape<'a> {
    attention::Shape {
        heads: attention.heads,
        kv_heads: attention.kv_heads,
        groups: attention.groups.as_deref(),
        head_dim: attention.head_dim,
        scale: attention.scale,
        causal: attention.causal,
        window: attention.window,
        alibi: attention.slopes.as_deref(),
        softcap: attention.softcap,
        bias: None,
        log2: run.settings.log2_softmax,
    }
}

/// `att = softmax(scale * q kᵀ) v`, over the cached keys and values and the new ones, of a tree those on a node's path.
fn attend(
    run: Run<'_>,
    attention: &Attention,
    cache: &mut KvCache,
    tree: Option<&Branches>,
    n: usize,
    s: &mut Scratch,
) -> Result<()> {
    let dim = attention.head_dim;
    let (q, k) = (attention.heads * dim, attention.kv_heads * dim);
    let width = q + 2 * k;
    cache.append(run.pool, &s.qkv[q..], &s.qkv[q + k..], n, width)?;
    let shape = shape(run, attention);
    fit(&mut s.att, n * q);
    let kernel = run.kernels.attention;
    let (q, out, memory) = (&s.qkv, &mut s.att, &mut s.attention);
    match tree {
        Some(tree) => attention::attend_tree(run.pool, kernel, &shape, cache, q, width, tree, out, memory),
        None => attention::attend(run.pool, kernel, &shape, cache, q, width, n, out, memory),
    }
}

/// `h = down(act(gate(xb)) * up(xb))`, or without a gate `h = down(act(up(xb)))`, without what is below thresholds.
pub(super) fn feed_forward(
    run: Run<'_>,
    block: &Block,
    mlp: &Mlp,
    n: usize,
    low: &[bool],
    mut skip: Option<Skip<'_>>,
    s: &mut Scratch,
) -> Result<()> {
    let width = mlp.gate_up.rows();
    fit(&mut s.gate_up, n * width);
    fit(&mut s.inner, n * mlp.inner);
    let cuts = skip.as_ref().map(Skip::cuts);
    let neurons = cuts.map_or(&[][..], |cuts| &cuts.neurons);
    let (least, least_inner) = cuts.map_or((0.0, 0.0), |cuts| (cuts.gate_up(), cuts.down()));
    let enter = block.enter(run, &s.x);
    let enter = |row: usize, out: &mut [f32]| {
        enter(row, out);
        cut(out, least);
    };
    let input = &mut Source::Computed { rows: &mut s.xb, compute: &enter };
    // Of one token, the neurons that the gate leaves.
    if n == 1
        && low.is_empty()
        && least_inner == 0.0
        && let Some(Skip { sparsity, layer, skipped }) =
            skip.as_mut().filter(|skip| skip.sparsity.may_skip(skip.layer))
    {
        mlp.gate_up.forward_parts(run, 0..1, input, 1, &mut s.rounded, &mut s.gate_up)?;
        s.inner.copy_from_slice(&s.gate_up[..mlp.inner]);
        mlp.act(run, &mut s.inner);
        s.active.find(&s.inner, neurons);
        let active = s.active.list.len();
        skipped.neurons += mlp.inner as u64;
        skipped.active += active as u64;
        if let Some(bundles) = sparsity.bundles(*layer, active) {
            skipped.sparse += 1;
            return mlp.skip(run, bundles, &mut s.active, &mut s.inner, &mut s.rounded, &mut s.h);
        }
        skipped.dense += 1;
        let input = &mut Source::Given(&s.xb);
        mlp.gate_up.forward_parts(run, 1..2, input, 1, &mut s.rounded, &mut s.gate_up)?;
    } else {
        let columns = (Input::GateUp, skip.as_mut(), &mut s.active);
        forward_cut(run, &mlp.gate_up, columns, input, n, low, &mut s.rounded, &mut s.gate_up)?;
    }
    let activate = |row: usize, out: &mut [f32]| {
        mlp.activate(run, &s.gate_up[row * width..][..width], neurons, out);
        cut(out, least_inner);
    };
    let inner = &mut Source::Computed { rows: &mut s.inner, compute: &activate };
    let columns = (Input::Down, skip.as_mut(), &mut s.active);
    forward_cut(run, &mlp.down, columns, inner, n, low, &mut s.rounded, &mut s.h)
}

/// Shows the values that thresholds of neurons are found by, of a block just computed: the activation function's (`act`), and
/// with a gate what it is multiplied by (`up`).
fn watch(run: Run<'_>, mlp: &Mlp, n: usize, s: &mut Scratch, show: &mut dyn FnMut(&'static str, &[f32])) {
    let (width, inner) = (mlp.gate_up.rows(), mlp.inner);
    for row in 0..n {
        s.inner[row * inner..][..inner].copy_from_slice(&s.gate_up[row * width..][..inner]);
    }
    mlp.act(run, &mut s.inner);
    show("act", &s.inner);
    if mlp.gated {
        for row in 0..n {
            let up = &s.gate_up[row * width + inner..][..inner];
            s.inner[row * inner..][..inner].copy_from_slice(up);
        }
        show("up", &s.inner);
    }
}

/// `logits = head(norm(x))` of the last rows, as many as `logits` has room for.
fn head(run: Run<'_>, model: &Model, logits: &mut [f32], s: &mut Scratch) -> Result<()> {
    let (weights, spec) = (&model.weights, &model.spec);
    let rows = logits.len() / spec.vocab;
    let first = s.x.len() - rows * spec.hidden;
    let x = &s.x[first..]; // [rows, hidden]
    let mut last = x;
    if let Some(norm) = &weights.final_norm {
        norm.rows(run, x, &mut s.xb[first..]);
        last = &s.xb[first..];
    }
    if let Some(project_out) = &weights.project_out {
        fit(&mut s.narrow, rows * spec.head.cols);
        project_out.forward(run, last, rows, &mut s.rounded, &mut s.narrow)?;
        last = &s.narrow;
    }
    weights.head.forward(run, last, rows, &mut s.rounded, logits)?;
    if let Some(cap) = spec.logit_softcap {
        run.kernels.elementwise.softcap(logits, cap);
    }
    Ok(())
}
