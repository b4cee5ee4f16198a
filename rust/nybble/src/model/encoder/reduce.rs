//! Token reduction at work in an encoder: what is measured, who stays, and the rows that are left.

use std::time::{Duration, Instant};

use super::forward::{GONE, MERGED};
use super::spec::EncoderSpec;
use crate::error::Result;
use crate::kernels::attention::{self, Graph, KvCache, Scratch, Shape, Statistic};
use crate::model::linear::Run;
use crate::score::similarity::Features;
use crate::tokens::PatchPolicy;
use crate::tokens::patches::{Budget, Evidence, Plan, Wants};

/// The reduction of some images that are computed together.
#[derive(Debug)]
pub(super) struct Reduction<'a> {
    policy: &'a PatchPolicy,
    depth: usize,
    learned: usize,
    images: usize,
    /// Images of the call before these.
    before: usize,
    /// Which patches are left, `[images, patches]`.
    pub(super) places: Vec<u32>,
    /// For each patch of the images the token that holds it, counted behind the learned ones, or [`GONE`].
    pub(super) owners: Vec<u32>,
    /// How many patches each token stands for, `[images, tokens]`; empty if the method does not merge.
    sizes: Vec<f32>,
    /// Their logarithms, where keys count as often as that.
    bias: Vec<f32>,
    /// The layer that chooses, and how many patches stay.
    now: Option<(usize, Budget)>,
    /// What was decided there, image by image; empty where nothing leaves.
    plans: Vec<Plan>,
    measured: Vec<f32>,
    pub(super) graph: Graph,
    /// Time that choosing took so far.
    pub(super) spent: Duration,
}

impl<'a> Reduction<'a> {
    pub(super) fn new(
        policy: &'a PatchPolicy,
        spec: &EncoderSpec,
        before: usize,
        images: usize,
        size: [usize; 2],
        graph: Graph,
    ) -> Self {
        let learned = spec.learned();
        let patches = spec.tokens(size) - learned;
        Self {
            policy,
            depth: spec.layers.len(),
            learned,
            images,
            before,
            places: (0..images).flat_map(|_| 0..patches as u32).collect(),
            owners: (0..images).flat_map(|_| 0..patches as u32).collect(),
            sizes: if policy.method.merges() { vec![1.0; images * (learned + patches)] } else { Vec::new() },
            bias: Vec::new(),
            now: None,
            plans: Vec::new(),
            measured: Vec::new(),
            graph,
            spent: Duration::ZERO,
        }
    }

    /// Begins a layer that `n` tokens reach.
    pub(super) fn begin(&mut self, layer: usize, n: usize) {
        let patches = n / self.images - self.learned;
        self.now = self.policy.budget(layer, patches).map(|budget| (layer, budget));
        self.bias.clear();
        if self.policy.method.proportional() {
            self.bias.extend(self.sizes.iter().map(|size| size.ln()));
        }
    }

    /// How many patches each of one image's `n` tokens stands for, where it counts as often as that.
    pub(super) fn sizes(&self, image: usize, n: usize) -> Option<&[f32]> {
        self.policy.method.proportional().then(|| &self.sizes[image * n..][..n])
    }

    /// What is added to the scores of one image's `n` keys.
    pub(super) fn bias(&self, image: usize, n: usize) -> Option<&[f32]> {
        (!self.bias.is_empty()).then(|| &self.bias[image * n..][..n])
    }

    /// What the layer's choice of tokens is made by, if it is to choose.
    fn wants(&self) -> Option<Wants> {
        self.now.map(|_| self.policy.method.wants())
    }

    /// Whether attention is to leave its graph.
    pub(super) fn wants_graph(&self) -> bool {
        self.wants() == Some(Wants::Graph)
    }

    /// Whether [`Reduction::decide`] reads the cache.
    pub(super) fn wants_cache(&self) -> bool {
        matches!(self.wants(), Some(Wants::Received | Wants::ClassRow))
    }

    /// Where attention is to leave its graph, if this layer wants it.
    pub(super) fn graph(&mut self) -> Option<&mut Graph> {
        self.wants_graph().then_some(&mut self.graph)
    }

    /// Decides about the next image's `n` tokens, if the layer is to decide; their keys are in `cache` if it is wanted.
    pub(super) fn decide(
        &mut self,
        run: Run<'_>,
        shape: &Shape<'_>,
        cache: &KvCache,
        qkv: &[f32],
        n: usize,
        memory: &mut Scratch,
    ) -> Result<()> {
        let Some((layer, budget)) = self.now else { return Ok(()) };
        let began = Instant::now();
        let (q, k) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let width = q + 2 * k;
        let method = &self.policy.method;
        let wants = method.wants();
        // Of the first query alone: what it gives is what each token receives.
        let queries = if wants == Wants::ClassRow { 1 } else { n };
        let scored = matches!(wants, Wants::Received | Wants::ClassRow);
        if scored {
            let (kernel, out) = (run.kernels.attention, &mut self.measured);
            let received = Statistic::Received;
            attention::statistics(
                run.pool, kernel, shape, cache, qkv, width, queries, received, out, memory,
            )?;
            run.kernels.elementwise.scale(out, 1.0 / (shape.heads * queries) as f32);
        }
        let image = self.plans.len();
        let evidence = Evidence {
            layer: (layer, self.depth),
            image: self.before + image,
            graph: (wants == Wants::Graph).then_some(&self.graph),
            scores: if scored { &self.measured } else { &[] },
            keys: Features { values: &qkv[q..], stride: width, dim: k },
            sizes: if self.sizes.is_empty() { &[] } else { &self.sizes[image * n..][..n] },
            heads: if wants == Wants::Graph { shape.heads } else { shape.kv_heads },
            learned: self.learned,
        };
        self.plans.push(method.plan(run.pool, run.kernels, &evidence, n, budget)?);
        self.spent += began.elapsed();
        Ok(())
    }

    /// Whether tokens leave at this place of a layer.
    pub(super) fn leaves(&self, behind: bool) -> bool {
        !self.plans.is_empty() && self.policy.method.behind_the_layer() == behind
    }

    /// Writes the rows that become of `x [n, hidden]` to `out`; returns their number.
    pub(super) fn leave(&mut self, x: &[f32], hidden: usize, out: &mut Vec<f32>) -> usize {
        let began = Instant::now();
        out.clear();
        let image = x.len() / self.images;
        let (n, patches) = (image / hidden, self.places.len() / self.images);
        let all = self.owners.len() / self.images;
        let (mut places, mut sizes) = (Vec::new(), Vec::new());
        for (index, plan) in self.plans.iter().enumerate() {
            plan.apply(&x[index * image..][..image], hidden, out);
            let held = &self.places[index * patches..][..patches];
            let mut into = vec![GONE; n];
            for (row, (own, parts)) in plan.rows().enumerate() {
                for part in parts {
                    into[part.0] = row as u32;
                }
                if !self.sizes.is_empty() {
                    sizes.push(parts.iter().map(|part| self.sizes[index * n + part.0]).sum());
                }
                if row >= self.learned {
                    places.push(own.map_or(MERGED, |token| held[token - self.learned]));
                }
            }
            for owner in &mut self.owners[index * all..][..all] {
                if *owner != GONE {
                    let row = into[self.learned + *owner as usize];
                    *owner = if row == GONE { GONE } else { row - self.learned as u32 };
                }
            }
        }
        (self.places, self.sizes) = (places, sizes);
        self.plans.clear();
        self.spent += began.elapsed();
        out.len() / hidden
    }
}
