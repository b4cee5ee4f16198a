//! Token reduction at work in an encoder: what is measured, who stays, and the rows that are left.

use super::forward::MERGED;
use super::spec::EncoderSpec;
use crate::error::Result;
use crate::kernels::attention::{self, KvCache, Scratch, Shape, Statistic};
use crate::model::linear::Run;
use crate::tokens::PatchPolicy;
use crate::tokens::patches::{Choice, Evidence, Wants};

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
    /// The layer that chooses, and how many patches stay.
    now: (usize, usize),
    /// What was chosen there, image by image; empty where nothing leaves.
    choices: Vec<Choice>,
    measured: Vec<f32>,
}

impl<'a> Reduction<'a> {
    pub(super) fn new(
        policy: &'a PatchPolicy,
        spec: &EncoderSpec,
        before: usize,
        images: usize,
        size: [usize; 2],
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
            now: (0, 0),
            choices: Vec::new(),
            measured: Vec::new(),
        }
    }

    /// Begins a layer that `n` tokens reach; none where all of them stay.
    pub(super) fn begin(&mut self, layer: usize, n: usize) -> Option<&mut Self> {
        let patches = n / self.images - self.learned;
        let kept = self.policy.kept(layer, patches).filter(|kept| *kept < patches)?;
        self.now = (layer, kept);
        Some(self)
    }

    /// Chooses among the next image's tokens, whose keys are in `cache`.
    pub(super) fn choose(
        &mut self,
        run: Run<'_>,
        shape: &Shape<'_>,
        cache: &KvCache,
        qkv: &[f32],
        memory: &mut Scratch,
    ) -> Result<()> {
        let n = cache.len();
        let (q, k) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let width = q + 2 * k;
        let method = &self.policy.method;
        let wants = method.wants();
        let ask = match wants {
            Wants::Nothing => None,
            Wants::Received => Some((n, Statistic::Received)),
            // The first query alone: what it gives is what each token receives.
            Wants::ClassRow => Some((1, Statistic::Received)),
            Wants::Each => Some((n, Statistic::Each)),
        };
        if let Some((queries, statistic)) = ask {
            let (kernel, out) = (run.kernels.attention, &mut self.measured);
            attention::statistics(
                run.pool, kernel, shape, cache, qkv, width, queries, statistic, out, memory,
            )?;
            if statistic == Statistic::Received {
                run.kernels.elementwise.scale(out, 1.0 / (shape.heads * queries) as f32);
            }
        }
        let each = wants == Wants::Each;
        let mut keys = Vec::new();
        if each {
            keys.extend(qkv.chunks_exact(width).flat_map(|row| &row[q..q + k]));
        }
        let measured = &self.measured[..];
        let evidence = Evidence {
            layer: (self.now.0, self.depth),
            image: self.before + self.choices.len(),
            attention: if each { measured } else { &[] },
            scores: if each { &[] } else { measured },
            keys: &keys,
            heads: shape.heads,
            learned: self.learned,
        };
        self.choices.push(method.choose(run.pool, run.kernels, &evidence, n, self.now.1)?);
        Ok(())
    }

    /// Whether chosen tokens leave at this place of a layer.
    pub(super) fn leaves(&self, behind: bool) -> bool {
        !self.choices.is_empty() && self.policy.method.behind_the_layer() == behind
    }

    /// Writes the rows of `x [n, hidden]` that stay to `out`; returns their number.
    pub(super) fn leave(&mut self, x: &[f32], hidden: usize, out: &mut Vec<f32>) -> usize {
        out.clear();
        let image = x.len() / self.images;
        let patches = self.places.len() / self.images;
        let mut places = Vec::new();
        let images = x.chunks_exact(image).zip(self.places.chunks_exact(patches)).zip(&self.choices);
        for ((x, held), choice) in images {
            for &token in &choice.keep {
                out.extend_from_slice(&x[token * hidden..][..hidden]);
                places.extend(token.checked_sub(self.learned).map(|patch| held[patch]));
            }
            if let Some(parts) = &choice.fused {
                let first = out.len();
                out.resize(first + hidden, 0.0);
                for &(token, weight) in parts {
                    let row = &x[token * hidden..][..hidden];
                    out[first..].iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x);
                }
                places.push(MERGED);
            }
        }
        self.places = places;
        self.choices.clear();
        out.len() / hidden
    }
}
