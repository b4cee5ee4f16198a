//! Every float kernel of every tier but attention against `scalar` (the same bits) and against a plain computation in double precision.
//!
//! One test an operation and tier, with both in its name, so that `cargo test avx512` picks a tier's tests. A tier this CPU
//! does not have is reported as skipped.

#![allow(clippy::float_cmp)] // the same bits are what is asked for
#![allow(clippy::redundant_closure_for_method_calls)] // the method's own path is longer

mod common;

use common::{Random, assert_same_bits, pair, pool, tests};
use half::f16;
use nybble::cpu::Isa;
use nybble::kernels::{Columns, elementwise, f32 as matmul, float_matmul, norm, rope};
use nybble::pack::{IntSource, Layout, Packed};

tests! {
    f32_scalar => check_f32(Scalar);
    f32_avx2 => check_f32(Avx2);
    f32_avx512vnni => check_f32(Avx512Vnni);
    f32_neon => check_f32(Neon);
    norm_scalar => check_norm(Scalar);
    norm_avx2 => check_norm(Avx2);
    norm_avx512vnni => check_norm(Avx512Vnni);
    rope_scalar => check_rope(Scalar);
    rope_avx2 => check_rope(Avx2);
    rope_avx512vnni => check_rope(Avx512Vnni);
    elementwise_scalar => check_elementwise(Scalar);
    elementwise_avx2 => check_elementwise(Avx2);
    elementwise_avx512vnni => check_elementwise(Avx512Vnni);
}

/// A matrix of every layout.
fn matrices(rows: usize, cols: usize, numbers: &mut Random) -> Vec<Packed> {
    let pool = pool(2);
    let data = numbers.take(rows * cols);
    let half: Vec<_> = data.iter().map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    let brain: Vec<_> = data.iter().map(|&x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
    let mut list = vec![
        Packed::from_f32(rows, cols, &data, &pool).expect("packs"),
        Packed::from_half(rows, cols, &half, Layout::F16, &pool).expect("packs"),
        Packed::from_half(rows, cols, &brain, Layout::Bf16, &pool).expect("packs"),
    ];
    for (bits, group, asymmetric) in [(4, 32, false), (4, cols, true), (8, 64, true), (8, cols, false)] {
        if rows == 0 || cols == 0 {
            continue;
        }
        let row_bytes = (cols * bits as usize).div_ceil(32) * 4;
        let groups = if group >= cols { 1 } else { cols.div_ceil(group) };
        let codes: Vec<u8> = (0..rows * row_bytes).map(|_| numbers.next() as u8).collect();
        let scales: Vec<f32> =
            (0..rows * groups).map(|_| f16::from_f32(numbers.unit().abs() * 0.1).to_f32()).collect();
        let zeros: Vec<u8> = (0..rows * groups).map(|_| numbers.next() as u8).collect();
        let source = IntSource {
            name: "w",
            rows,
            cols,
            bits,
            group,
            codes: &codes,
            row_bytes,
            scales: &scales,
            zeros: asymmetric.then_some(&zeros),
            row_map: None,
        };
        list.push(Packed::from_int(&source, &pool).expect("packs"));
    }
    list
}

fn multiply(
    threads: usize,
    kernel: &dyn matmul::FloatMatmul,
    w: &Packed,
    x: &[f32],
    rows: usize,
) -> Vec<f32> {
    // A wider output with a margin on both sides shows writes outside the columns.
    let stride = w.rows() + 5;
    let mut y = vec![7.0; rows * stride];
    float_matmul(&pool(threads), kernel, w, x, Columns::new(&mut y, rows, stride, 2, w.rows()))
        .expect("multiplies");
    let mut out = Vec::new();
    for row in y.chunks_exact(stride) {
        assert!(row[..2].iter().chain(&row[2 + w.rows()..]).all(|&margin| margin == 7.0));
        out.extend_from_slice(&row[2..2 + w.rows()]);
    }
    out
}

fn check_f32(isa: Isa) {
    let (kernel, scalar) = pair(&matmul::kernels(), |k| k.isa(), isa);
    let mut numbers = Random(1);
    for cols in [0, 1, 3, 31, 33, 100, 257, 600] {
        for outputs in [0, 1, 15, 16, 17, 50, 97] {
            for w in matrices(outputs, cols, &mut numbers) {
                for rows in [0, 1, 2, 5, 17] {
                    let x = numbers.take(rows * cols);
                    let what = format!("{} {outputs} x {cols}, {rows} rows", w.layout().name());
                    let y = multiply(1, kernel, &w, &x, rows);
                    assert_same_bits(&y, &multiply(3, kernel, &w, &x, rows), &what);
                    if isa == Isa::Scalar {
                        compare_with_double(&w, &x, rows, &y, &what);
                    } else {
                        assert_same_bits(&y, &multiply(1, scalar, &w, &x, rows), &what);
                    }
                    for row in 0..if outputs > 0 { rows } else { 0 } {
                        let alone = multiply(1, kernel, &w, &x[row * cols..(row + 1) * cols], 1);
                        assert_same_bits(&alone, &y[row * outputs..(row + 1) * outputs], &what);
                    }
                }
            }
        }
    }
    let w = &matrices(16, 40, &mut numbers)[0];
    let mut x = numbers.take(40);
    (x[3], x[9]) = (f32::NAN, f32::INFINITY);
    assert!(multiply(1, kernel, w, &x, 1).iter().all(|y| y.is_nan()));
}

/// Each of the additions is wrong by at most half an ulp of a partial sum, which is at most the sum of magnitudes.
fn compare_with_double(w: &Packed, x: &[f32], rows: usize, y: &[f32], what: &str) {
    let mut weights = vec![0.0; w.cols()];
    for output in 0..w.rows() {
        w.row(output, &mut weights).expect("a row");
        for row in 0..rows {
            let (mut exact, mut size) = (0.0, 0.0);
            for (&x, &w) in x[row * w.cols()..(row + 1) * w.cols()].iter().zip(&weights) {
                exact += f64::from(x) * f64::from(w);
                size += (f64::from(x) * f64::from(w)).abs();
            }
            let error = (f64::from(y[row * w.rows() + output]) - exact).abs();
            let bound = size * w.cols() as f64 * f64::from(f32::EPSILON) / 2.0;
            assert!(
                error <= bound,
                "{what}: output {output} of row {row} is wrong by {error}, bound {bound}"
            );
        }
    }
}

const LENGTHS: [usize; 12] = [1, 3, 8, 15, 16, 31, 32, 33, 100, 576, 1000, 1536];

fn check_norm(isa: Isa) {
    let (kernel, scalar) = pair(&norm::kernels(), |k| k.isa(), isa);
    let mut numbers = Random(5);
    for n in LENGTHS {
        for shift in [0.0, 10.0] {
            let x: Vec<f32> = numbers.take(n).iter().map(|x| x * 4.0 + shift).collect();
            let (gain, bias) = (numbers.take(n), numbers.take(n));
            let exact: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let mean = exact.iter().sum::<f64>() / n as f64;
            let square = exact.iter().map(|x| x * x).sum::<f64>() / n as f64;
            let variance = exact.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
            let (mut out, mut other) = (vec![0.0; n], vec![0.0; n]);

            kernel.rms(&x, &gain, 1e-5, &mut out);
            scalar.rms(&x, &gain, 1e-5, &mut other);
            assert_same_bits(&out, &other, "rms");
            for i in 0..n {
                let expected = exact[i] / (square + 1e-5).sqrt() * f64::from(gain[i]);
                assert!((f64::from(out[i]) - expected).abs() <= 1e-6 * expected.abs() + 1e-9, "rms {n}: {i}");
            }
            for bias in [None, Some(&bias[..])] {
                kernel.layer(&x, &gain, bias, 1e-5, &mut out);
                scalar.layer(&x, &gain, bias, 1e-5, &mut other);
                assert_same_bits(&out, &other, "layer");
                for i in 0..n {
                    let unit = (exact[i] - mean) / (variance + 1e-5).sqrt();
                    let expected = unit * f64::from(gain[i]) + bias.map_or(0.0, |bias| f64::from(bias[i]));
                    // For one element the mean is the element: 0, up to the mean's own rounding over sqrt(eps).
                    let bound = 1e-5 + 2e-6 * f64::from(shift) / (variance + 1e-5).sqrt();
                    assert!((f64::from(out[i]) - expected).abs() <= bound, "layer {n}: {i}");
                }
            }
        }
    }
    let mut out = [0.0; 3];
    kernel.rms(&[f32::NAN, 1.0, f32::INFINITY], &[1.0; 3], 1e-5, &mut out);
    assert!(out[0].is_nan());
    kernel.rms(&[0.0; 3], &[1.0; 3], 1e-5, &mut out);
    assert_eq!(out, [0.0; 3]);
    kernel.rms(&[], &[], 1e-5, &mut []);
    kernel.layer(&[], &[], Some(&[]), 1e-5, &mut []);
}

fn check_rope(isa: Isa) {
    let (kernel, scalar) = pair(&rope::kernels(), |k| k.isa(), isa);
    let mut numbers = Random(6);
    for (heads, dim, turned) in
        [(1, 2, 2), (3, 8, 8), (9, 64, 64), (2, 80, 32), (1, 256, 64), (2, 6, 0), (4, 100, 50), (0, 8, 8)]
    {
        let x = numbers.take(heads * dim);
        let angles: Vec<f32> = numbers.take(turned / 2).iter().map(|x| x * 3.0).collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let (mut out, mut other) = (x.clone(), x.clone());
        kernel.rotate(&mut out, dim, turned, &cos, &sin);
        scalar.rotate(&mut other, dim, turned, &cos, &sin);
        assert_same_bits(&out, &other, "rope");
        for (i, &found) in out.iter().enumerate() {
            let (head, d) = (i / dim * dim, i % dim);
            let half = turned / 2;
            let expected = if d >= turned {
                x[i]
            } else if d < half {
                x[i] * cos[d] - x[head + d + half] * sin[d]
            } else {
                x[i] * cos[d - half] + x[head + d - half] * sin[d - half]
            };
            assert!((found - expected).abs() < 1e-6, "{heads} heads of {dim}: {i}");
        }
    }
}

fn check_elementwise(isa: Isa) {
    let (kernel, scalar) = pair(&elementwise::kernels(), |k| k.isa(), isa);
    let mut numbers = Random(7);
    for n in LENGTHS.into_iter().chain([0]) {
        let mut x: Vec<f32> = numbers.take(n).iter().map(|x| x * 12.0).collect();
        let special =
            [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-42, f32::MAX, f32::MIN, 89.0, -104.5];
        for (x, special) in x.iter_mut().skip(3).step_by(11).zip(special) {
            *x = special;
        }
        let y = numbers.take(n);
        let both = |f: &dyn Fn(&dyn elementwise::Elementwise) -> Vec<f32>, what: &str| {
            assert_same_bits(&f(kernel), &f(scalar), what);
            f(kernel)
        };
        let in_place = |f: &dyn Fn(&dyn elementwise::Elementwise, &mut [f32]), what: &str| {
            both(
                &|kernel| {
                    let mut out = x.clone();
                    f(kernel, &mut out);
                    out
                },
                what,
            )
        };
        let gelu_tanh = in_place(&|k, x| k.gelu_tanh(x), "gelu_tanh");
        let relu = in_place(&|k, x| k.relu(x), "relu");
        let added = in_place(&|k, x| k.add_assign(x, &y), "add_assign");
        let scaled = in_place(&|k, x| k.scale(x, 0.3), "scale");
        let capped = in_place(&|k, x| k.softcap(x, 2.5), "softcap");
        in_place(&|k, x| k.gelu_erf(x), "gelu_erf");
        in_place(&|k, x| k.gelu_quick(x), "gelu_quick");
        let by = numbers.take(n);
        let added_scaled = in_place(&|k, x| k.add_scaled(x, &y, &by), "add_scaled");
        for count in [0, 1, 3, 4, 5, 9] {
            let (rows, weights) = (numbers.take(n * count), numbers.take(count));
            let summed = in_place(&|k, x| k.add_rows(x, &rows, &weights), "add_rows");
            for i in 0..n {
                let mut expected = x[i];
                for (row, weight) in weights.iter().enumerate() {
                    expected += weight * rows[row * n + i];
                }
                let same = summed[i].is_nan() && expected.is_nan() || summed[i] == expected;
                assert!(same, "add_rows of {count} to {}: {}, {expected}", x[i], summed[i]);
            }
        }
        let gated = |f: &dyn Fn(&dyn elementwise::Elementwise, &mut [f32]), what: &str| in_place(f, what);
        let silu_mul = gated(&|k, out| k.silu_mul(&x, &y, out), "silu_mul");
        let gelu_mul = gated(&|k, out| k.gelu_tanh_mul(&x, &y, out), "gelu_tanh_mul");
        for i in 0..n {
            let d = f64::from(x[i]);
            let near = |found: f32, expected: f64| {
                let expected = f64::from(expected as f32);
                found.is_nan() && expected.is_nan()
                    || f64::from(found) == expected
                    || (f64::from(found) - expected).abs() <= 2e-6 * expected.abs() + 1e-30
            };
            assert!(near(relu[i], if d < 0.0 { 0.0 } else { d }), "relu {d}");
            assert!(near(added[i], d + f64::from(y[i])), "add_assign {d}");
            let product = f64::from(y[i] * by[i]);
            assert!(near(added_scaled[i], d + product), "add_scaled {d}");
            assert!(near(scaled[i], d * f64::from(0.3f32)), "scale {d}");
            assert!(near(capped[i], 2.5 * (d / 2.5).tanh()), "softcap {d}");
            assert!(near(gelu_mul[i], f64::from(gelu_tanh[i]) * f64::from(y[i])), "gelu_tanh_mul {d}");
            assert!(near(silu_mul[i], d / (1.0 + (-d).exp()) * f64::from(y[i])) || d < -80.0, "silu_mul {d}");
        }
    }
}
