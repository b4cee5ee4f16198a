//! Attention on codes of 7 bits: every tier against `scalar` (the same bits), `scalar` against attention in double precision.

#![allow(clippy::float_cmp)] // the same bits are what is asked for

mod common;
#[allow(dead_code)] // of those made there only some are of use here
mod sequences;

use common::{assert_same_bits, pool, tests};
use nybble::cpu::Isa;
use nybble::kernels::Kernels;
use nybble::kernels::attention::{KvType, Scratch, Shape, attend_codes, codes};
use sequences::Case;

tests! {
    codes_scalar => check_codes(Scalar);
    codes_avx2 => check_codes(Avx2);
    codes_avxvnni => check_codes(AvxVnni);
    codes_avx512vnni => check_codes(Avx512Vnni);
    codes_neon => check_codes(Neon);
    codes_neon_dotprod => check_codes(NeonDotprod);
    codes_neon_i8mm => check_codes(NeonI8mm);
    codes_non_finite_scalar => check_non_finite(Scalar);
    codes_non_finite_avx2 => check_non_finite(Avx2);
    codes_non_finite_avxvnni => check_non_finite(AvxVnni);
    codes_non_finite_avx512vnni => check_non_finite(Avx512Vnni);
    codes_non_finite_neon => check_non_finite(Neon);
    codes_non_finite_neon_dotprod => check_non_finite(NeonDotprod);
    codes_non_finite_neon_i8mm => check_non_finite(NeonI8mm);
}

/// Queries that see all keys.
fn full(heads: usize, kv_heads: usize, dim: usize, len: usize) -> Case {
    Case { full: true, ..Case::new(heads, kv_heads, dim, KvType::F32, len) }
}

fn run(case: &Case, isa: Isa, threads: usize, bias: Option<&[f32]>, scratch: &mut Scratch) -> Vec<f32> {
    let kernels = Kernels::up_to(isa);
    let (width, kv_width) = (case.heads * case.dim, case.kv_heads * case.dim);
    let rows = codes::Rows { q: &case.q, q_stride: width, k: &case.k, v: &case.v, kv_stride: kv_width };
    let shape = Shape { bias, ..case.shape() };
    let mut out = vec![f32::NAN; case.len * width];
    attend_codes(&pool(threads), &kernels, &shape, rows, case.len, &mut out, scratch).expect("attends");
    out
}

/// The definition, in double precision. A bias multiplies probabilities by its power of e.
fn exact(case: &Case, bias: Option<&[f32]>) -> Vec<f64> {
    let mut out = Vec::new();
    for i in 0..case.len {
        for h in 0..case.heads {
            let mut weights = case.probabilities(i, h);
            if let Some(bias) = bias {
                weights.iter_mut().zip(bias).for_each(|(weight, bias)| *weight *= f64::from(*bias).exp());
            }
            let sum: f64 = weights.iter().sum();
            for d in 0..case.dim {
                let value = |j| f64::from(case.v[case.row(h, j)][d]);
                out.push(weights.iter().enumerate().map(|(j, w)| w / sum * value(j)).sum());
            }
        }
    }
    out
}

/// The norm of the difference, of the norm of what is expected.
fn relative(found: &[f32], expected: &[f64]) -> f64 {
    let square = |x: f64| x * x;
    let error: f64 = found.iter().zip(expected).map(|(f, e)| square(f64::from(*f) - e)).sum();
    (error / expected.iter().copied().map(square).sum::<f64>()).sqrt()
}

fn check_codes(isa: Isa) {
    let mut list = Vec::new();
    for (i, len) in [257, 1, 2, 63, 64, 65, 197].into_iter().enumerate() {
        for (j, dim) in [32, 64, 72, 80].into_iter().enumerate() {
            let (heads, kv_heads) = [(1, 1), (3, 3), (4, 2)][(i + j) % 3];
            list.push(full(heads, kv_heads, dim, len));
        }
    }
    list.push(full(2, 1, 24, 300));
    list.push(full(2, 2, 160, 129));
    list.push(Case { groups: Some(vec![0, 3, 4]), ..full(4, 2, 16, 100) });
    // Memory is kept from one to the next, of other shapes.
    let mut scratch = Scratch::new();
    for (number, case) in list.iter().enumerate() {
        let what = format!("{} heads of {}, {} tokens", case.heads, case.dim, case.len);
        let logs: Vec<f32> = (0..case.len).map(|j| ((1 + j % 5) as f32).ln()).collect();
        let bias = (number % 3 == 1).then_some(&logs[..]);
        let found = run(case, isa, 1, bias, &mut scratch);
        assert_same_bits(&run(case, isa, 3, bias, &mut scratch), &found, &what);
        if isa == Isa::Scalar {
            let error = relative(&found, &exact(case, bias));
            assert!(error < 0.04, "{what}: wrong by {error}");
        } else {
            assert_same_bits(&found, &run(case, Isa::Scalar, 1, bias, &mut Scratch::new()), &what);
        }
    }
}

/// What is on the grid of codes is computed exactly.
#[test]
fn codes_of_a_case_worked_by_hand() {
    let mut case = full(1, 1, 32, 2);
    for values in [&mut case.q, &mut case.k, &mut case.v] {
        values.fill(0.0);
    }
    // The first query's scores are 1/2 and -1/2 in powers of two: weights 1 and 1/2. The second sees both alike.
    case.q[0] = 1.0;
    (case.k[0], case.k[32]) = (63.0, -63.0);
    (case.v[0], case.v[32]) = (63.0, -63.0);
    (case.v[1], case.v[33]) = (21.0, 63.0);
    let kernels = Kernels::up_to(Isa::Scalar);
    let rows = codes::Rows { q: &case.q, q_stride: 32, k: &case.k, v: &case.v, kv_stride: 32 };
    let shape = Shape { scale: std::f32::consts::LN_2 / 126.0, ..case.shape() };
    let mut out = vec![0.0; 64];
    attend_codes(&pool(1), &kernels, &shape, rows, 2, &mut out, &mut Scratch::new()).expect("attends");
    let near = |found: f32, expected: f32| (found - expected).abs() < 1e-5;
    assert!(near(out[0], (2.0 * 63.0 - 63.0) / 3.0) && near(out[1], (2.0 * 21.0 + 63.0) / 3.0), "{out:?}");
    assert!(near(out[32], 0.0) && near(out[33], 42.0), "{out:?}");
    assert!(out[2..32].iter().chain(&out[34..]).all(|x| *x == 0.0), "{out:?}");
}

/// Equal keys make the output the mean of all values, in every block.
#[test]
fn codes_of_equal_keys() {
    let mut case = full(1, 1, 32, 300);
    case.k.iter_mut().enumerate().for_each(|(i, k)| *k = (i % 32) as f32);
    case.v.iter_mut().enumerate().for_each(|(i, v)| *v = [63.0, -5.0, 17.0][i / 32 % 3]);
    let found = run(&case, Isa::Scalar, 1, None, &mut Scratch::new());
    assert!(found.iter().all(|x| (x - 25.0).abs() < 1e-4), "{:?}", &found[..32]);
}

/// What all keys share moves all scores of a query alike, so it must not cost bits of the keys.
#[test]
fn codes_do_without_what_keys_share() {
    let mut case = full(2, 2, 64, 197);
    for (i, k) in case.k.iter_mut().enumerate().filter(|(i, _)| i % 64 % 3 == 0) {
        *k += 50.0 + (i % 64) as f32;
    }
    let error = relative(&run(&case, Isa::Scalar, 1, None, &mut Scratch::new()), &exact(&case, None));
    assert!(error < 0.04, "wrong by {error}");
}

/// Scales reach beyond f16.
#[test]
fn codes_of_any_magnitude() {
    let case = full(2, 2, 64, 150);
    let mut scratch = Scratch::new();
    let expected = run(&case, Isa::Scalar, 1, None, &mut scratch);
    for factor in [2f32.powi(-70), 2f32.powi(-20), 2f32.powi(60)] {
        let times = |values: &[f32], factor: f32| values.iter().map(|x| x * factor).collect::<Vec<_>>();
        let (q, k, v) = (times(&case.q, 1.0 / factor), times(&case.k, factor), times(&case.v, factor));
        let moved = Case { q, k, v, ..full(2, 2, 64, 150) };
        let found = run(&moved, Isa::Scalar, 1, None, &mut scratch);
        assert_same_bits(&times(&found, 1.0 / factor), &expected, &format!("times {factor}"));
    }
}

fn check_non_finite(isa: Isa) {
    let (dim, len) = (64, 140);
    let clean = full(2, 2, dim, len);
    let width = 2 * dim;
    let expected = run(&clean, isa, 1, None, &mut Scratch::new());
    // What is not finite is seen by all that read it, and by nobody else. It is in the second head.
    let check = |case: &Case, lost: &dyn Fn(usize, usize) -> bool| {
        let found = run(case, isa, 2, None, &mut Scratch::new());
        for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let (query, d) = (at / width, at % width);
            let good = if lost(query, d) { found.is_nan() } else { found.to_bits() == expected.to_bits() };
            assert!(good, "query {query}, output {d}: {found}, not {expected}");
        }
    };
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut case = full(2, 2, dim, len);
        case.q[70 * width + dim + 3] = poison;
        check(&case, &|query, d| query == 70 && d >= dim);
        case = full(2, 2, dim, len);
        case.k[70 * width + dim + 3] = poison;
        check(&case, &|_, d| d >= dim);
        case = full(2, 2, dim, len);
        case.v[130 * width + dim + 3] = poison;
        check(&case, &|_, d| d == dim + 3);
    }
    // As the other tiers, with scores beyond all floats.
    let mut large = full(2, 2, dim, len);
    for x in large.q.iter_mut().chain(&mut large.k) {
        *x *= 1e25;
    }
    let found = run(&large, isa, 1, None, &mut Scratch::new());
    assert_same_bits(&found, &run(&large, Isa::Scalar, 1, None, &mut Scratch::new()), "large");
}

#[test]
fn codes_refuse_what_does_not_fit() {
    let case = full(4, 2, 16, 5);
    let kernels = Kernels::up_to(Isa::Scalar);
    let pool = pool(1);
    let good = case.shape();
    let rows = codes::Rows { q: &case.q, q_stride: 64, k: &case.k, v: &case.v, kv_stride: 32 };
    let mut scratch = Scratch::new();
    let mut error = |shape: Shape<'_>, rows, n: usize, len| {
        let mut out = vec![0.0; len];
        let done = attend_codes(&pool, &kernels, &shape, rows, n, &mut out, &mut scratch);
        done.err().map_or(String::new(), |error| error.to_string())
    };
    assert_eq!(error(good, rows, 5, 320), "");
    assert_eq!(error(good, rows, 0, 0), "");
    assert!(error(good, rows, 5, 319).contains("output"));
    assert!(error(good, rows, 6, 384).contains("queries"));
    assert!(error(good, codes::Rows { q_stride: usize::MAX, ..rows }, 5, 320).contains("queries"));
    assert!(error(good, codes::Rows { k: &[], ..rows }, 5, 320).contains("keys"));
    assert!(error(good, codes::Rows { v: &case.v[1..], ..rows }, 5, 320).contains("values"));
    assert!(error(Shape { heads: 5, ..good }, rows, 1, 80).contains("heads"));
    assert!(error(Shape { bias: Some(&[0.0]), ..good }, rows, 5, 320).contains("bias"));
    for (shape, what) in [
        (Shape { causal: true, ..good }, "all keys"),
        (Shape { log2: true, ..good }, "log2"),
        (Shape { softcap: Some(1.0), ..good }, "capped"),
        (Shape { alibi: Some(&[0.0; 4]), ..good }, "ALiBi"),
        (Shape { window: Some(3), ..good }, "window"),
    ] {
        let message = error(shape, rows, 5, 320);
        assert!(message.contains("7 bits") && message.contains(what), "{message}");
    }
}

#[test]
fn codes_scratch_stops_growing() {
    let case = full(2, 2, 32, 300);
    let mut scratch = Scratch::new();
    let mut sizes = Vec::new();
    for _ in 0..3 {
        run(&case, Isa::best(), 2, None, &mut scratch);
        sizes.push(scratch.bytes());
    }
    assert!(sizes.iter().all(|&size| size == sizes[0] && size > 2 * 300 * 2 * 32), "{sizes:?}");
}
