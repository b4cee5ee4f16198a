//! Rounding of activations in every tier against `scalar`, bit for bit, and `scalar` against its definition.

#![allow(clippy::float_cmp)] // equality to the bit is the point

mod common;

use common::{GROUPS_OF_8, KINDS, Kind, Random, SHAPES, activations, bits, scalar_quantize, tests, tier};
use nybble::cpu::Isa;
use nybble::kernels::quantize::{self, Activations, Granularity, Quantize, Rounding, Source};
use nybble::threads::Pool;

tests! {
    quantize_scalar => check_quantize(Scalar);
    quantize_avx2 => check_quantize(Avx2);
    quantize_avx512vnni => check_quantize(Avx512Vnni);
}

/// Every way to round.
fn roundings() -> [Rounding; 6] {
    let pers = [Granularity::Token, Granularity::Group, Granularity::Tensor(0.011)];
    std::array::from_fn(|i| Rounding { bits: [8, 4][i / 3], per: pers[i % 3] })
}

/// Codes, scales and sums are those of `scalar`, for every shape and input, on any number of threads.
fn check_quantize(isa: Isa) {
    let Some(kernel) = tier(quantize::kernels(), Quantize::isa, isa) else { return };
    let pools = [1, 2, 3].map(|threads| Pool::new(threads).expect("a pool"));
    let (mut x, mut expected) = (Activations::new(), Activations::new());
    for rounding in roundings() {
        for (cols, group) in SHAPES.into_iter().chain([(16_384, 128)]) {
            for (rows, pool) in
                [(3, &pools[0]), (0, &pools[1]), (1, &pools[1]), (2, &pools[1]), (17, &pools[2])]
            {
                let inputs = KINDS.map(|kind| activations(rows, cols, kind));
                let mut random = Random(7);
                let halves =
                    (0..rows * cols).map(|i| if i % 32 == 0 { 127.0 } else { (i % 255) as f32 / 2.0 - 63.0 });
                let tiny = (0..rows * cols).map(|i| random.unit() * [1e-38, 1e-36, 2e-36, 1e-45][i / 32 % 4]);
                let huge = (0..rows * cols).map(|i| [f32::MAX, -f32::MAX, 1.0, 1e38][i % 4]);
                let more: [Vec<f32>; 3] = [halves.collect(), tiny.collect(), huge.collect()];
                for input in inputs.iter().chain(&more) {
                    x.quantize(pool, kernel, input, rows, cols, group, rounding).expect("good input");
                    expected
                        .quantize(&pools[0], scalar_quantize(), input, rows, cols, group, rounding)
                        .expect("good input");
                    assert_eq!((x.rows(), x.cols(), x.group()), (rows, cols, expected.group()));
                    for r in 0..rows {
                        assert_eq!(x.codes(r), expected.codes(r), "row {r} of {rows} x {cols}");
                        assert_eq!(bits(x.scales(r)), bits(expected.scales(r)), "row {r} of {rows} x {cols}");
                        assert_eq!(x.sums(r), expected.sums(r), "row {r} of {rows} x {cols}");
                        assert!(x.codes(r)[cols..].iter().all(|&c| c == 0), "padding");
                    }
                }
            }
        }
    }
}

#[test]
fn rows_of_four_bits_stand_among_rows_of_eight() {
    let (rows, cols) = (6, 96);
    let pool = Pool::new(2).expect("a pool");
    let input = activations(rows, cols, Kind::Random);
    let low = [false, true, true, false, true, false];
    for kernel in quantize::kernels() {
        for (per, per_of_low) in [
            (Granularity::Token, Granularity::Token),
            (Granularity::Group, Granularity::Group),
            (Granularity::Tensor(0.01), Granularity::Tensor(0.01 * (127.0 / 7.0))),
        ] {
            let rounded = |rounding, low: &[bool]| {
                let mut x = Activations::new();
                let input = &mut Source::Given(&input);
                x.quantize_source(&pool, kernel, input, rows, cols, 32, rounding, low).map(|()| x)
            };
            let eight = Rounding { bits: 8, per };
            let all_low = rounded(Rounding { bits: 4, per: per_of_low }, &[]).expect("good input");
            let none_low = rounded(eight, &[]).expect("good input");
            let mixed = rounded(eight, &low).expect("good input");
            assert_eq!(mixed.bits(), 8);
            for (r, &low) in low.iter().enumerate() {
                let expected = if low { &all_low } else { &none_low };
                assert_eq!(mixed.codes(r), expected.codes(r), "{per:?}, row {r}");
                assert_eq!(mixed.scales(r), expected.scales(r), "{per:?}, row {r}");
                assert_eq!(mixed.sums(r), expected.sums(r), "{per:?}, row {r}");
                assert!(!low || mixed.codes(r).iter().all(|code| code.abs() <= 7));
            }
            assert!(rounded(eight, &low[1..]).is_err());
        }
    }
}

/// Rows that are computed on the way are rounded as rows that were there, and are there afterwards.
#[test]
fn computed_rows_are_those_given() {
    for (rows, cols) in [(0, 32), (1, 96), (3, 100), (600, 64)] {
        let input = activations(rows, cols, Kind::Random);
        let doubled: Vec<f32> = input.iter().map(|x| 2.0 * x).collect();
        let compute = |r: usize, out: &mut [f32]| {
            out.iter_mut().zip(&input[r * cols..]).for_each(|(out, x)| *out = 2.0 * x);
        };
        for threads in [1, 3] {
            let pool = Pool::new(threads).expect("a pool");
            let (mut x, mut expected) = (Activations::new(), Activations::new());
            let kernel = scalar_quantize();
            expected.quantize(&pool, kernel, &doubled, rows, cols, 32, GROUPS_OF_8).expect("good input");
            let mut buffer = vec![f32::NAN; rows * cols];
            let mut source = Source::Computed { rows: &mut buffer, compute: &compute };
            x.quantize_source(&pool, kernel, &mut source, rows, cols, 32, GROUPS_OF_8, &[])
                .expect("good input");
            for r in 0..rows {
                assert_eq!((x.codes(r), x.scales(r)), (expected.codes(r), expected.scales(r)), "row {r}");
            }
            assert_eq!(source.rows(&pool, cols), doubled);
            let mut buffer = vec![f32::NAN; rows * cols];
            let mut source = Source::Computed { rows: &mut buffer, compute: &compute };
            assert_eq!(source.rows(&pool, cols), doubled);
            let mut short = Source::Computed { rows: &mut [0.0; 31], compute: &compute };
            assert!(x.quantize_source(&pool, kernel, &mut short, 1, 32, 32, GROUPS_OF_8, &[]).is_err());
        }
    }
}

#[test]
fn quantize_scalar_follows_its_definition() {
    let pool = Pool::new(1).expect("a pool");
    for rounding in roundings() {
        for (cols, group) in SHAPES {
            let input = activations(3, cols, Kind::Random);
            let mut x = Activations::new();
            x.quantize(&pool, scalar_quantize(), &input, 3, cols, group, rounding).expect("good input");
            for r in 0..3 {
                let row = &input[r * cols..][..cols];
                for (g, part) in row.chunks(group).enumerate() {
                    let levels = if rounding.bits == 4 { 7.0 } else { 127.0 };
                    let largest = |over: &[f32]| over.iter().fold(0f32, |a, b| a.max(b.abs()));
                    let scale = match rounding.per {
                        Granularity::Token => largest(row) / levels,
                        Granularity::Group => largest(part) / levels,
                        Granularity::Tensor(scale) => scale,
                    };
                    let code = |v: &f32| {
                        (v.clamp(-levels * scale, levels * scale) * (1.0 / scale)).round_ties_even()
                    };
                    let codes: Vec<i8> = part.iter().map(|v| code(v) as i8).collect();
                    assert!(codes.iter().all(|code| f32::from(code.abs()) <= levels));
                    assert_eq!(x.scales(r)[g].to_bits(), scale.to_bits());
                    assert_eq!(&x.codes(r)[g * group..][..part.len()], codes);
                    assert_eq!(x.sums(r)[g], codes.iter().map(|&c| i32::from(c)).sum::<i32>());
                }
            }
        }
    }
}

#[test]
fn quantize_marks_what_has_no_scale() {
    let pool = Pool::new(1).expect("a pool");
    let mut x = Activations::new();
    let mut input = vec![1.0; 96];
    input[3] = f32::NAN;
    input[32..64].fill(1e-40);
    x.quantize(&pool, scalar_quantize(), &input, 1, 96, 32, GROUPS_OF_8).expect("good shape");
    assert!(x.scales(0)[0].is_nan() && x.scales(0)[1] == 0.0 && x.scales(0)[2] == 1.0 / 127.0);
    assert_eq!(x.sums(0), [0, 0, 127 * 32]);
    for (rows, cols, group) in
        [(1, 95, 32), (2, 96, 32), (1, 96, 0), (1, 96, 33), (1, 0, 32), (usize::MAX, 96, 32)]
    {
        assert!(x.quantize(&pool, scalar_quantize(), &input, rows, cols, group, GROUPS_OF_8).is_err());
    }
}

#[test]
fn roundings_that_mean_nothing_are_errors() {
    let pool = Pool::new(1).expect("a pool");
    let mut x = Activations::new();
    let scales = [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40].map(|scale| (8, Granularity::Tensor(scale)));
    for (bits, per) in scales.into_iter().chain([(3, Granularity::Token), (16, Granularity::Group)]) {
        let rounding = Rounding { bits, per };
        assert!(
            x.quantize(&pool, scalar_quantize(), &[1.0; 32], 1, 32, 32, rounding).is_err(),
            "{rounding:?}"
        );
    }
}
