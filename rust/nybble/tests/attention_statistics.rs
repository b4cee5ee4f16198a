//! What attention's kernels tell about who attends to whom: statistics, and graphs that are kept.

#![allow(clippy::float_cmp)] // the same bits are what is asked for
#![allow(clippy::redundant_closure_for_method_calls)] // the method's own path is longer

mod common;
mod sequences;

use common::{assert_same_bits, pair, pool, tests};
use nybble::cpu::Isa;
use nybble::kernels::attention::{
    self, Attention, Graph, KvCache, KvType, Scratch, Shape, Statistic, attend, attend_graph, statistics,
};
use sequences::{Case, cases};

tests! {
    graph_scalar => check_graph(Scalar);
    graph_avx2 => check_graph(Avx2);
    graph_avx512vnni => check_graph(Avx512Vnni);
    graph_neon => check_graph(Neon);
    statistics_scalar => check_statistics(Scalar);
    statistics_avx2 => check_statistics(Avx2);
    statistics_avx512vnni => check_statistics(Avx512Vnni);
    statistics_neon => check_statistics(Neon);
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
