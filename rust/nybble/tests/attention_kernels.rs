//! Attention of every tier against `scalar` (the same bits) and against a plain computation in double precision.

#![allow(clippy::float_cmp)] // the same bits are what is asked for
#![allow(clippy::redundant_closure_for_method_calls)] // the method's own path is longer

mod common;

use common::{Random, assert_same_bits, pair, pool, tests};
use half::f16;
use nybble::cpu::Isa;
use nybble::kernels::attention::{
    self, Attention, Branches, Graph, KvCache, KvType, Scratch, Shape, Statistic, attend, attend_graph,
    attend_tree, statistics,
};

tests! {
    attention_scalar => check_attention(Scalar);
    attention_avx2 => check_attention(Avx2);
    attention_avx512vnni => check_attention(Avx512Vnni);
    attention_neon => check_attention(Neon);
    log2_scalar => check_log2(Scalar);
    log2_avx2 => check_log2(Avx2);
    log2_avx512vnni => check_log2(Avx512Vnni);
    log2_neon => check_log2(Neon);
    attention_chunks_scalar => check_chunks(Scalar);
    attention_chunks_avx2 => check_chunks(Avx2);
    attention_chunks_avx512vnni => check_chunks(Avx512Vnni);
    attention_chunks_neon => check_chunks(Neon);
    attention_trees_scalar => check_trees(Scalar);
    attention_trees_avx2 => check_trees(Avx2);
    attention_trees_avx512vnni => check_trees(Avx512Vnni);
    attention_trees_neon => check_trees(Neon);
    attention_non_finite_scalar => check_non_finite(Scalar);
    attention_non_finite_avx2 => check_non_finite(Avx2);
    attention_non_finite_avx512vnni => check_non_finite(Avx512Vnni);
    attention_non_finite_neon => check_non_finite(Neon);
    graph_scalar => check_graph(Scalar);
    graph_avx2 => check_graph(Avx2);
    graph_avx512vnni => check_graph(Avx512Vnni);
    graph_neon => check_graph(Neon);
    statistics_scalar => check_statistics(Scalar);
    statistics_avx2 => check_statistics(Avx2);
    statistics_avx512vnni => check_statistics(Avx512Vnni);
    statistics_neon => check_statistics(Neon);
}

/// Queries, keys and values of a sequence, and how a layer attends to it.
struct Case {
    heads: usize,
    kv_heads: usize,
    groups: Option<Vec<usize>>,
    dim: usize,
    kind: KvType,
    window: Option<usize>,
    alibi: Option<Vec<f32>>,
    softcap: Option<f32>,
    full: bool,
    log2: bool,
    len: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(heads: usize, kv_heads: usize, dim: usize, kind: KvType, len: usize) -> Self {
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

    fn shape(&self) -> Shape<'_> {
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

    /// Attention of the whole sequence, `chunks` positions at a time (the last is repeated).
    fn run(&self, kernel: &dyn Attention, threads: usize, chunks: &[usize]) -> Vec<f32> {
        let pool = pool(threads);
        let (width, kv_width) = (self.heads * self.dim, self.kv_heads * self.dim);
        let mut cache = KvCache::new(self.kv_heads, self.dim, self.kind);
        let mut scratch = Scratch::new();
        let mut out = vec![0.0; self.len * width];
        let mut sizes = chunks.iter();
        let mut size = 1;
        let mut at = 0;
        while at < self.len {
            size = *sizes.next().unwrap_or(&size);
            let n = size.min(self.len - at);
            let kv = at * kv_width..;
            cache.append(&pool, &self.k[kv.clone()], &self.v[kv], n, kv_width).expect("room");
            let out = &mut out[at * width..(at + n) * width];
            attend(&pool, kernel, &self.shape(), &cache, &self.q[at * width..], width, n, out, &mut scratch)
                .expect("attends");
            at += n;
        }
        out
    }

    /// What the cache holds of one position's key or value in a head.
    fn stored(&self, row: &[f32]) -> Vec<f64> {
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
    fn row(&self, h: usize, j: usize) -> std::ops::Range<usize> {
        let shared = match &self.groups {
            Some(groups) => groups.partition_point(|&first| first <= h) - 1,
            None => h / (self.heads / self.kv_heads),
        };
        let first = (j * self.kv_heads + shared) * self.dim;
        first..first + self.dim
    }

    /// The last position that query `i` sees.
    fn last(&self, i: usize) -> usize {
        if self.full { self.len - 1 } else { i }
    }

    /// The first position that query `i` sees.
    fn first(&self, i: usize) -> usize {
        self.window.map_or(0, |window| (i + 1).saturating_sub(window))
    }

    /// The exact softmax of one query and head, over the positions it sees, in double precision.
    fn probabilities(&self, i: usize, h: usize) -> Vec<f64> {
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

    /// The definition, in double precision, for one query: its outputs, and how far off each may be.
    ///
    /// Weights that are powers of two jump, so a weight so near to the jump that rounding decides may be either; and values
    /// are rounded to half a step of their scale.
    fn exact(&self, i: usize) -> Vec<(f64, f64)> {
        let mut out = Vec::new();
        for h in 0..self.heads {
            let exact = self.probabilities(i, h);
            let values: Vec<Vec<f64>> =
                (self.first(i)..=self.last(i)).map(|j| self.stored(&self.v[self.row(h, j)])).collect();
            let power = |p: f64| if (-p.log2()).round() > 15.0 { 0.0 } else { (-(-p.log2()).round()).exp2() };
            let weights: Vec<f64> = exact.iter().map(|&p| if self.log2 { power(p) } else { p }).collect();
            for d in 0..self.dim {
                let weighed = weights.iter().zip(&values).map(|(w, v)| w * v[d]).sum();
                let mut bound = 1e-5; // outputs are means of values up to 3
                if self.log2 {
                    for ((p, w), v) in exact.iter().zip(&weights).zip(&values) {
                        let largest = values.iter().flatten().fold(0.0, |top: f64, v| top.max(v.abs()));
                        bound += w * largest / 127.0 / 2.0 * 1.01;
                        let other = [power(p * 0.9999), power(p * 1.0001)];
                        bound += other.map(|other| (other - w).abs()).iter().sum::<f64>() * v[d].abs();
                    }
                }
                out.push((weighed, bound));
            }
        }
        out
    }
}

/// Sequences that cover head shapes, lengths around the block size, windows, slopes and caps.
fn cases() -> Vec<Case> {
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

/// Weights that are powers of two.
fn log2_cases() -> Vec<Case> {
    let mut list = Vec::new();
    for (kind, len) in [(KvType::F32, 1), (KvType::F16, 64), (KvType::Int8, 65), (KvType::F16, 330)] {
        list.push(Case { log2: true, ..Case::new(6, 2, 24, kind, len) });
    }
    list.push(Case { log2: true, window: Some(40), ..Case::new(9, 3, 64, KvType::F32, 130) });
    list
}

fn check_log2(isa: Isa) {
    check_cases(isa, log2_cases());
    check_chunks_of(
        isa,
        vec![
            Case { log2: true, ..Case::new(9, 3, 16, KvType::F16, 530) },
            Case { log2: true, window: Some(50), ..Case::new(6, 2, 24, KvType::Int8, 200) },
        ],
    );
}

fn check_attention(isa: Isa) {
    check_cases(isa, cases());
}

fn check_cases(isa: Isa, cases: Vec<Case>) {
    let (kernel, scalar) = pair(&attention::kernels(), |k| k.isa(), isa);
    for case in cases {
        let what = format!(
            "{} heads, {} shared, of {}, {} positions, {:?}, window {:?}",
            case.heads, case.kv_heads, case.dim, case.len, case.kind, case.window
        );
        let together = case.run(kernel, 1, &[case.len]);
        assert_same_bits(&case.run(kernel, 3, &[case.len]), &together, &what);
        if isa != Isa::Scalar {
            assert_same_bits(&together, &case.run(scalar, 1, &[case.len]), &what);
            continue; // what equals it to the bit is as near to the exact result
        }
        let width = case.heads * case.dim;
        for i in (0..case.len).step_by(7).chain([case.len - 1]) {
            for (d, (exact, bound)) in case.exact(i).into_iter().enumerate() {
                let error = (f64::from(together[i * width + d]) - exact).abs();
                assert!(error < bound, "{what}: query {i}, output {d} is wrong by {error}, not {bound}");
            }
        }
    }
}

fn check_chunks(isa: Isa) {
    let slopes = Some(vec![0.5; 9]);
    let cases = vec![
        Case::new(9, 3, 64, KvType::F32, 200),
        Case::new(9, 3, 64, KvType::F16, 200),
        Case::new(9, 3, 64, KvType::Int8, 200),
        Case { window: Some(50), softcap: Some(9.0), ..Case::new(6, 2, 24, KvType::Int8, 200) },
        Case { window: Some(50), ..Case::new(9, 3, 16, KvType::F32, 200) },
        Case { alibi: slopes, softcap: Some(9.0), ..Case::new(9, 1, 8, KvType::F16, 200) },
        Case { groups: Some(vec![0, 5, 6, 9]), ..Case::new(9, 3, 16, KvType::F16, 200) },
        // Several spans: alone, a token's are separate tasks.
        Case::new(9, 3, 16, KvType::F16, 530),
        Case { window: Some(300), ..Case::new(6, 2, 24, KvType::F32, 530) },
    ];
    check_chunks_of(isa, cases);
}

fn check_chunks_of(isa: Isa, cases: Vec<Case>) {
    let (kernel, _) = pair(&attention::kernels(), |k| k.isa(), isa);
    for case in cases {
        let together = case.run(kernel, 1, &[case.len]);
        for threads in [1, 2, 5] {
            for chunks in [&[7, 193][..], &[1], &[64, 1, 5, 63, 67], &[100], &[511, 2]] {
                let what = format!("{threads} threads, chunks {chunks:?}");
                assert_same_bits(&case.run(kernel, threads, chunks), &together, &what);
            }
        }
    }
}

/// The nodes of a tree get the bits of a text that has those on their path alone.
fn check_trees(isa: Isa) {
    let (kernel, _) = pair(&attention::kernels(), |k| k.isa(), isa);
    let slopes = Some(vec![0.5; 9]);
    let chain: Vec<usize> = (0..40_usize).map(|node| node.saturating_sub(1)).collect();
    let wide: Vec<usize> =
        (0..33).map(|node| [0, 0, 0, 0, 1, 1, 2, 4, 7, 8, 9][node % 11].min(node / 2)).collect();
    let mixed = vec![0, 0, 0, 1, 1, 3, 5, 2, 6];
    for case in [
        Case::new(9, 3, 64, KvType::F32, 400),
        Case::new(9, 3, 24, KvType::F16, 400),
        Case::new(4, 2, 16, KvType::Int8, 400),
        Case { window: Some(5), softcap: Some(9.0), ..Case::new(6, 2, 24, KvType::Int8, 400) },
        Case { window: Some(100), ..Case::new(9, 3, 16, KvType::F32, 400) },
        Case { alibi: slopes, softcap: Some(9.0), ..Case::new(9, 1, 8, KvType::F16, 400) },
        Case::new(70, 1, 8, KvType::F32, 400),
    ] {
        let (width, kv_width) = (case.heads * case.dim, case.kv_heads * case.dim);
        let rows = |at: usize| at * kv_width..;
        // Within a block, across the edges of a block and of a span, and from the start.
        for past in [0, 60, 250] {
            for parents in [&[0][..], &chain, &wide, &mixed] {
                let branches = Branches::new(parents).expect("a tree");
                let n = branches.len();
                let pool = pool([1, 2, 3][(past + n) % 3]);
                let mut cache = KvCache::new(case.kv_heads, case.dim, case.kind);
                cache.append(&pool, &case.k, &case.v, past + n, kv_width).expect("room");
                let mut found = vec![0.0; n * width];
                let (q, mut scratch) = (&case.q[past * width..], Scratch::new());
                let shape = case.shape();
                attend_tree(&pool, kernel, &shape, &cache, q, width, &branches, &mut found, &mut scratch)
                    .expect("attends");
                for node in 0..n {
                    cache.truncate(past);
                    for &place in branches.path(node) {
                        let at = rows(past + place);
                        cache.append(&pool, &case.k[at.clone()], &case.v[at], 1, kv_width).expect("room");
                    }
                    let mut alone = vec![0.0; width];
                    let q = &q[node * width..];
                    attend(&pool, kernel, &shape, &cache, q, width, 1, &mut alone, &mut scratch)
                        .expect("attends");
                    let what = format!("node {node} of {n} behind {past}, {:?}", case.kind);
                    assert_same_bits(&found[node * width..][..width], &alone, &what);
                }
            }
        }
    }
}

#[test]
fn trees_that_are_none_are_refused() {
    assert!(Branches::new(&[0, 2, 0]).is_err());
    assert!(Branches::new(&[0, 1]).is_err());
    let one = Branches::new(&[9]).expect("the root's parent does not matter");
    assert_eq!((one.len(), one.positions(), one.path(0)), (1, 1, &[0][..]));
    let mut none = Branches::new(&[]).expect("no tree at all");
    assert!(none.is_empty() && none.positions() == 0);
    assert!(none.set(&[0, 0, 3]).is_err() && none.is_empty());
    let case = Case { log2: true, ..Case::new(4, 2, 16, KvType::F32, 5) };
    let pool = pool(1);
    let mut cache = KvCache::new(2, 16, KvType::F32);
    cache.append(&pool, &case.k, &case.v, 5, 32).expect("room");
    let (kernel, shape, mut scratch) = (attention::kernels()[0], case.shape(), Scratch::new());
    let mut out = vec![0.0; 64];
    let refused = attend_tree(&pool, kernel, &shape, &cache, &case.q, 64, &one, &mut out, &mut scratch);
    assert!(refused.is_err_and(|error| error.to_string().contains("log2")));
}

fn measure(
    case: &Case,
    kernel: &dyn Attention,
    threads: usize,
    n: usize,
    statistic: Statistic,
) -> nybble::Result<Vec<f32>> {
    let (pool, kv_width, width) = (pool(threads), case.kv_heads * case.dim, case.heads * case.dim);
    let mut cache = KvCache::new(case.kv_heads, case.dim, case.kind);
    cache.append(&pool, &case.k, &case.v, case.len, kv_width)?;
    let mut out = vec![7.0; 3];
    let (q, mut scratch) = (&case.q[case.len.saturating_sub(n) * width..], Scratch::new());
    statistics(&pool, kernel, &case.shape(), &cache, q, width, n, statistic, &mut out, &mut scratch)?;
    Ok(out)
}

/// What [`measure`] measures, in double precision from every query's probabilities.
fn expected(case: &Case, exact: &[Vec<Vec<f64>>], n: usize, statistic: Statistic) -> Vec<f64> {
    let queries = case.len - n..case.len;
    match statistic {
        Statistic::Given { key } => queries
            .map(|i| {
                let seen = (case.first(i)..=case.last(i)).contains(&key);
                exact[i].iter().map(|p| if seen { p[key - case.first(i)] } else { 0.0 }).sum()
            })
            .collect(),
        Statistic::Received => {
            let mut received = vec![0.0; case.len];
            for i in queries {
                for (p, key) in exact[i].iter().flatten().zip((case.first(i)..=case.last(i)).cycle()) {
                    received[key] += p;
                }
            }
            received
        }
    }
}

fn check_statistics(isa: Isa) {
    let (kernel, scalar) = pair(&attention::kernels(), |k| k.isa(), isa);
    // More queries than a piece, and more heads on one key head than a task takes.
    let more = [Case::new(3, 1, 16, KvType::F16, 300), Case::new(70, 1, 8, KvType::F32, 40)];
    for case in cases().into_iter().chain(more) {
        let probabilities = |i| (0..case.heads).map(|head| case.probabilities(i, head)).collect();
        let exact: Vec<Vec<Vec<f64>>> =
            if isa == Isa::Scalar { (0..case.len).map(probabilities).collect() } else { Vec::new() };
        let (all, some) = (case.len, case.len.div_ceil(2));
        for (n, statistic) in [
            (all, Statistic::Given { key: 0 }),
            (all, Statistic::Received),
            (some, Statistic::Given { key: case.len / 3 }),
            (some, Statistic::Received),
            (1, Statistic::Given { key: case.len - 1 }),
            (1, Statistic::Received),
        ] {
            let what = format!(
                "{} heads of {}, {n} of {}, {:?}, {statistic:?}",
                case.heads, case.dim, case.len, case.kind
            );
            let found = measure(&case, kernel, 1, n, statistic).expect("measures");
            let shared = measure(&case, kernel, 3, n, statistic).expect("measures");
            assert_same_bits(&shared, &found, &what);
            if isa != Isa::Scalar {
                let oracle = measure(&case, scalar, 1, n, statistic).expect("measures");
                assert_same_bits(&found, &oracle, &what);
                continue; // what equals it to the bit is as near to the exact result
            }
            let expected = expected(&case, &exact, n, statistic);
            assert_eq!(found.len(), expected.len(), "{what}");
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                let error = (f64::from(*found) - expected).abs();
                assert!(error < 2e-5 * expected.max(1.0), "{what} {i}: {found}, {expected}");
            }
        }
        assert!(measure(&case, kernel, 1, 1, Statistic::Given { key: case.len }).is_err());
        assert!(measure(&case, kernel, 1, case.len + 1, Statistic::Received).is_err());
        assert_eq!(measure(&case, kernel, 1, 0, Statistic::Received).expect("none"), vec![0.0; case.len]);
    }
}

/// What one-hot scores receive of a graph: its rows, `[heads, n, n]`.
fn rows(graph: &Graph, kernel: &dyn Attention) -> Vec<f32> {
    let (pool, heads, n) = (pool(2), graph.heads(), graph.len());
    let mut rows = vec![0.0; heads * n * n];
    for i in 0..n {
        let (mut scores, mut next) = (vec![0.0; heads * n], vec![0.0; heads * n]);
        scores.iter_mut().skip(i).step_by(n).for_each(|score| *score = 1.0);
        graph.pass(&pool, kernel, &scores, &(0..heads).collect::<Vec<_>>(), &mut next);
        for (head, next) in next.chunks_exact(n).enumerate() {
            rows[(head * n + i) * n..][..n].copy_from_slice(next);
        }
    }
    rows
}

fn check_graph(isa: Isa) {
    let (kernel, scalar) = pair(&attention::kernels(), |k| k.isa(), isa);
    let long = Case::new(8, 8, 8, KvType::F32, 750); // more weights than are held as brain floats
    for case in [
        Case { full: true, ..Case::new(3, 3, 16, KvType::F32, 70) },
        Case { full: true, ..Case::new(4, 2, 8, KvType::Int8, 129) },
        Case { full: true, ..Case::new(70, 1, 8, KvType::F16, 40) },
        Case { full: true, log2: true, ..Case::new(2, 2, 16, KvType::F32, 65) },
        Case { full: true, ..Case::new(2, 2, 8, KvType::F32, 1) },
        Case { full: true, ..long },
    ] {
        let (width, kv_width, n) = (case.heads * case.dim, case.kv_heads * case.dim, case.len);
        let coarse = case.heads * n * n > 4 << 20;
        let bias: Vec<f32> = (0..n).map(|i| (1.0 + (i % 3) as f32).ln()).collect();
        let record = |kernel: &dyn Attention, threads| {
            let (pool, mut scratch) = (pool(threads), Scratch::new());
            let mut cache = KvCache::new(case.kv_heads, case.dim, case.kind);
            cache.append(&pool, &case.k, &case.v, n, kv_width).expect("room");
            let shape = Shape { bias: Some(&bias), ..case.shape() };
            let (mut out, mut plain) = (vec![0.0; n * width], vec![0.0; n * width]);
            let mut graph = Graph::default();
            attend_graph(&pool, kernel, &shape, &cache, &case.q, width, &mut out, &mut graph, &mut scratch)
                .expect("attends");
            attend(&pool, kernel, &shape, &cache, &case.q, width, n, &mut plain, &mut scratch)
                .expect("attends");
            assert_same_bits(&out, &plain, "the output beside a graph");
            let causal = Shape { causal: true, ..shape };
            let refused = attend_graph(
                &pool,
                kernel,
                &causal,
                &cache,
                &case.q,
                width,
                &mut out,
                &mut Graph::default(),
                &mut scratch,
            );
            assert!(refused.is_err());
            graph
        };
        let what = format!("{} heads of {}, {n} tokens, {:?}", case.heads, case.dim, case.kind);
        let graph = record(kernel, 3);
        if coarse {
            // Every row would take long: a vote of all.
            let scores = vec![1.0; case.heads * n];
            let votes = |graph: &Graph, kernel: &dyn Attention, threads| {
                let mut next = vec![0.0; case.heads * n];
                graph.pass(&pool(threads), kernel, &scores, &(0..case.heads).collect::<Vec<_>>(), &mut next);
                next
            };
            let found = votes(&graph, kernel, 2);
            assert_same_bits(&found, &votes(&record(scalar, 1), scalar, 1), &what);
            for votes in found.chunks_exact(n) {
                let sum: f32 = votes.iter().sum();
                assert!((sum / n as f32 - 1.0).abs() < 2e-3, "{what}: {sum}");
            }
            continue;
        }
        let found = rows(&graph, kernel);
        assert_same_bits(&found, &rows(&record(scalar, 1), scalar), &what);
        if isa != Isa::Scalar {
            continue;
        }
        for i in 0..n {
            for head in 0..case.heads {
                let plain = case.probabilities(i, head);
                let weighted: Vec<f64> =
                    plain.iter().zip(&bias).map(|(p, bias)| p * f64::from(bias.exp())).collect();
                let sum: f64 = weighted.iter().sum();
                for (j, p) in weighted.iter().enumerate() {
                    let (found, p) = (f64::from(found[(head * n + i) * n + j]), p / sum);
                    assert!((found - p).abs() < 5e-3 * p + 1e-6, "{what} {head} {i} {j}: {found}, {p}");
                }
            }
        }
    }
    // From numbers, and what is not one shows.
    let mut graph = vec![0.5, 0.5, 0.0, 1.0];
    let made = |graph: &[f32]| Graph::from_f32(&pool(1), kernel, graph, 1, 2).expect("good");
    assert_same_bits(&rows(&made(&graph), kernel), &graph, "a small graph");
    graph[0] = f32::NAN;
    assert!(rows(&made(&graph), kernel)[..2].iter().all(|x| x.is_nan()));
    assert!(Graph::from_f32(&pool(1), kernel, &graph, 2, 2).is_err());
}

fn check_non_finite(isa: Isa) {
    let (kernel, _) = pair(&attention::kernels(), |k| k.isa(), isa);
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-42] {
        for kind in [KvType::F32, KvType::F16, KvType::Int8] {
            let clean = Case::new(4, 2, 16, kind, 100);
            let expected = clean.run(kernel, 2, &[100]);
            let mut case = clean;
            let kv = case.kv_heads * case.dim;
            case.k[70 * kv + 3] = poison;
            case.v[70 * kv + 5] = poison;
            let found = case.run(kernel, 2, &[100]);
            // Positions before the poisoned one do not see it.
            assert_same_bits(&found[..70 * 64], &expected[..70 * 64], "before the poison");
            // Nor does anyone after it was truncated away.
            let pool = pool(1);
            let mut cache = KvCache::new(2, 16, kind);
            let mut out = vec![0.0; 64];
            cache.append(&pool, &case.k, &case.v, 100, kv).expect("room");
            cache.truncate(70);
            let (shape, q) = (case.shape(), &case.q[69 * 64..]);
            attend(&pool, kernel, &shape, &cache, q, 64, 1, &mut out, &mut Scratch::new()).expect("attends");
            assert_same_bits(&out, &expected[69 * 64..70 * 64], "after truncation");
        }
    }
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let pool = pool(1);
    let kernel = attention::kernels()[0];
    let case = Case::new(4, 2, 16, KvType::F32, 5);
    let mut cache = KvCache::new(2, 16, KvType::F32);
    cache.append(&pool, &case.k, &case.v, 5, 32).expect("room");
    let good = case.shape();
    let mut scratch = Scratch::new();
    let mut refused = |shape: Shape<'_>, q: &[f32], stride, n, out_len| {
        let mut out = vec![0.0; out_len];
        attend(&pool, kernel, &shape, &cache, q, stride, n, &mut out, &mut scratch).is_err()
    };
    assert!(!refused(good, &case.q, 64, 5, 5 * 64));
    assert!(!refused(good, &[], 64, 0, 0));
    assert!(refused(good, &case.q, 64, 6, 6 * 64));
    assert!(refused(good, &case.q, 65, 5, 5 * 64));
    assert!(refused(good, &case.q, usize::MAX, 5, 5 * 64));
    assert!(refused(good, &case.q, 64, 5, 5 * 64 - 1));
    assert!(refused(Shape { heads: 5, ..good }, &case.q, 64, 1, 80));
    for groups in [&[0, 4][..], &[0, 4, 4], &[1, 2, 4], &[0, 2, 5], &[0, 2, 3, 4]] {
        assert!(refused(Shape { groups: Some(groups), ..good }, &case.q, 64, 1, 64));
    }
    assert!(refused(Shape { kv_heads: 0, ..good }, &case.q, 64, 1, 64));
    assert!(refused(Shape { head_dim: 8, ..good }, &case.q, 64, 1, 32));
    assert!(refused(Shape { window: Some(0), ..good }, &case.q, 64, 1, 64));
    assert!(refused(Shape { causal: false, window: Some(9), ..good }, &case.q, 64, 1, 64));
    assert!(refused(Shape { softcap: Some(0.0), ..good }, &case.q, 64, 1, 64));
    assert!(refused(Shape { softcap: Some(f32::NAN), ..good }, &case.q, 64, 1, 64));
    assert!(refused(Shape { alibi: Some(&[0.1]), ..good }, &case.q, 64, 1, 64));
}

#[test]
fn attention_scratch_stops_growing() {
    let pool = pool(2);
    let kernel = *attention::kernels().last().expect("scalar");
    let case = Case::new(4, 2, 16, KvType::F32, 100);
    let mut cache = KvCache::new(2, 16, KvType::F32);
    cache.append(&pool, &case.k, &case.v, 100, 32).expect("room");
    let mut scratch = Scratch::new();
    let mut out = vec![0.0; 100 * 64];
    let mut sizes = Vec::new();
    for n in [100, 1, 50, 100] {
        let q = &case.q[(100 - n) * 64..];
        attend(&pool, kernel, &case.shape(), &cache, q, 64, n, &mut out[..n * 64], &mut scratch)
            .expect("attends");
        sizes.push(scratch.bytes());
    }
    assert!(sizes.iter().all(|&size| size == sizes[0] && size > 0), "{sizes:?}");
}
