//! Sequences to attend to, with the definition of attention in double precision, for the tests of its kernels.

use half::f16;
use nybble::kernels::attention::{KvType, Shape};

use crate::common::Random;

/// Queries, keys and values of a sequence, and how a layer attends to it.
pub(crate) struct Case {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) groups: Option<Vec<usize>>,
    pub(crate) dim: usize,
    pub(crate) kind: KvType,
    pub(crate) window: Option<usize>,
    pub(crate) alibi: Option<Vec<f32>>,
    pub(crate) softcap: Option<f32>,
    pub(crate) full: bool,
    pub(crate) log2: bool,
    pub(crate) len: usize,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

impl Case {
    pub(crate) fn new(heads: usize, kv_heads: usize, dim: usize, kind: KvType, len: usize) -> Self {
        let mut numbers = Random((heads * 1000 + dim * 10 + len) as u64);
        let mut wide = |n: usize| numbers.take(n).iter().map(|x| x * 3.0).collect();
        let (q, k, v) = (wide(len * heads * dim), wide(len * kv_heads * dim), wide(len * kv_heads * dim));
        Self {
            heads,
            kv_heads,
            groups: None,
            dim,
            kind,
            window: None,
            alibi: None,
            softcap: None,
            full: false,
            log2: false,
            len,
            q,
            k,
            v,
        }
    }

    pub(crate) fn shape(&self) -> Shape<'_> {
        Shape {
            causal: !self.full,
            heads: self.heads,
            kv_heads: self.kv_heads,
            groups: self.groups.as_deref(),
            head_dim: self.dim,
            scale: 1.0 / (self.dim as f32).sqrt(),
            window: self.window,
            alibi: self.alibi.as_deref(),
            softcap: self.softcap,
            bias: None,
            log2: self.log2,
        }
    }

    /// What the cache holds of one position's key or value in a head.
    pub(crate) fn stored(&self, row: &[f32]) -> Vec<f64> {
        let top = row.iter().fold(0.0, |top: f32, x| top.max(x.abs()));
        let scale = top / 127.0;
        let held = |&x: &f32| match self.kind {
            KvType::F32 => f64::from(x),
            KvType::F16 => f64::from(f16::from_f32(x).to_f32()),
            KvType::Int8 => f64::from((x * (1.0 / scale)).round_ties_even() * scale),
        };
        row.iter().map(held).collect()
    }

    /// Where position `j`'s key or value of the head that query head `h` shares is.
    pub(crate) fn row(&self, h: usize, j: usize) -> std::ops::Range<usize> {
        let shared = match &self.groups {
            Some(groups) => groups.partition_point(|&first| first <= h) - 1,
            None => h / (self.heads / self.kv_heads),
        };
        let first = (j * self.kv_heads + shared) * self.dim;
        first..first + self.dim
    }

    /// The last position that query `i` sees.
    pub(crate) fn last(&self, i: usize) -> usize {
        if self.full { self.len - 1 } else { i }
    }

    /// The first position that query `i` sees.
    pub(crate) fn first(&self, i: usize) -> usize {
        self.window.map_or(0, |window| (i + 1).saturating_sub(window))
    }

    /// The exact softmax of one query and head, over the positions it sees, in double precision.
    pub(crate) fn probabilities(&self, i: usize, h: usize) -> Vec<f64> {
        let q = &self.q[(i * self.heads + h) * self.dim..][..self.dim];
        let scores: Vec<f64> = (self.first(i)..=self.last(i))
            .map(|j| {
                let key = self.stored(&self.k[self.row(h, j)]);
                let dot: f64 = q.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum();
                let score = dot * f64::from(self.shape().scale);
                let score =
                    self.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
                score + self.alibi.as_ref().map_or(0.0, |slopes| f64::from(slopes[h]) * j as f64)
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        scores.iter().map(|s| (s - max).exp() / sum).collect()
    }
}

/// Sequences that cover head shapes, lengths around the block size, windows, slopes and caps.
pub(crate) fn cases() -> Vec<Case> {
    let mut list = Vec::new();
    for (i, &dim) in [8, 16, 64, 80, 128, 256].iter().enumerate() {
        for (j, &(heads, kv_heads)) in [(1, 1), (9, 3), (4, 1), (2, 2)].iter().enumerate() {
            let kind = [KvType::F32, KvType::F16, KvType::Int8][(i + j) % 3];
            list.push(Case::new(heads, kv_heads, dim, kind, [1, 63, 65, 130][(i + j) % 4]));
        }
    }
    for len in [1, 63, 64, 65, 200, 513] {
        list.push(Case::new(3, 1, 16, KvType::F32, len));
    }
    for (window, len) in [(1, 70), (5, 70), (64, 200), (100, 200), (1000, 100)] {
        list.push(Case { window: Some(window), ..Case::new(6, 2, 16, KvType::F16, len) });
    }
    for (len, kind) in [(1, KvType::F32), (65, KvType::F32), (300, KvType::F16), (530, KvType::Int8)] {
        list.push(Case { full: true, ..Case::new(6, 3, 24, kind, len) });
    }
    for (groups, kind, len) in [
        (vec![0, 3, 4, 6], KvType::F32, 130),
        (vec![0, 1, 6], KvType::F16, 65),
        (vec![0, 61, 62], KvType::Int8, 20), // more heads than a task has, beside a single one
    ] {
        let (heads, kv_heads) = (groups[groups.len() - 1], groups.len() - 1);
        list.push(Case { groups: Some(groups), ..Case::new(heads, kv_heads, 16, kind, len) });
    }
    let slopes = Some(vec![0.5, 0.25, 0.125, 0.0625]);
    list.push(Case { alibi: slopes.clone(), ..Case::new(4, 4, 16, KvType::F32, 200) });
    list.push(Case { softcap: Some(5.0), ..Case::new(4, 2, 32, KvType::F32, 130) });
    list.push(Case {
        alibi: slopes,
        softcap: Some(20.0),
        window: Some(33),
        ..Case::new(4, 2, 24, KvType::F16, 130)
    });
    list
}
