//! Attention of every tier against `scalar` (the same bits) and against a plain computation in double precision.

#![allow(clippy::float_cmp)] // the same bits are what is asked for
#![allow(clippy::redundant_closure_for_method_calls)] // the method's own path is longer

mod common;
mod sequences;

use common::{assert_same_bits, pair, pool, tests};
use nybble::cpu::Isa;
use nybble::kernels::attention::{
    self, Attention, Branches, KvCache, KvType, Scratch, Shape, attend, attend_tree,
};
use sequences::{Case, cases};

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
}

impl Case {
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
        // All pairs would take minutes where a CPU is emulated.
        for (threads, chunks) in
            [(1, &[7, 193][..]), (2, &[1]), (5, &[64, 1, 5, 63, 67]), (2, &[100]), (5, &[511, 2]), (1, &[1])]
        {
            let what = format!("{threads} threads, chunks {chunks:?}");
            assert_same_bits(&case.run(kernel, threads, chunks), &together, &what);
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
