//! Products of some neurons: every kernel of every tier against the dense oracle on the same integers, bit for bit.

#![allow(clippy::float_cmp)] // equality to the bit is the point

mod common;

use common::{Random, bits, scalar_quantize, tests, tier};
use nybble::cpu::Isa;
use nybble::kernels::quantize::{Activations, Granularity, Rounding};
use nybble::kernels::w4a8_sparse::{self, SparseMatmul, sparse_columns, sparse_rows};
use nybble::kernels::{Columns, int_matmul, w4a8};
use nybble::pack::{Bundles, IntSource, Packed};
use nybble::threads::Pool;

fn pack(
    random: &mut Random,
    pool: &Pool,
    (rows, cols): (usize, usize),
    group: usize,
    asymmetric: bool,
    extreme: bool,
) -> Packed {
    let row_bytes = cols.div_ceil(2);
    let groups = cols.div_ceil(group);
    let codes: Vec<u8> =
        (0..rows * row_bytes).map(|_| if extreme { 0xff } else { random.next() as u8 }).collect();
    // The last scales are so small that the matrix needs a factor.
    let scales: Vec<f32> =
        (0..rows * groups).map(|i| random.scale() * if i % 7 == 3 { 1e-9 } else { 1.0 }).collect();
    let zeros: Option<Vec<u8>> =
        asymmetric.then(|| (0..rows * groups).map(|_| random.next() as u8).collect());
    let source = IntSource {
        name: "test",
        rows,
        cols,
        bits: 4,
        group,
        codes: &codes,
        row_bytes,
        scales: &scales,
        zeros: zeros.as_deref(),
        row_map: None,
    };
    Packed::from_int(&source, pool).expect("good weights")
}

fn quantize(x: &[f32], group: usize, per: Granularity) -> Activations {
    let mut codes = Activations::new();
    let pool = Pool::new(1).expect("a pool");
    codes
        .quantize(&pool, scalar_quantize(), x, 1, x.len(), group, Rounding { bits: 8, per })
        .expect("good activations");
    codes
}

fn dense(pool: &Pool, w: &Packed, x: &Activations) -> Vec<f32> {
    let mut y = vec![0.0; w.rows()];
    int_matmul(pool, w4a8::kernels()[0], w, x, Columns::new(&mut y, 1, w.rows(), 0, w.rows()))
        .expect("shapes fit");
    y
}

/// Inputs, neurons, outputs; then the groups of `up` and of `down`.
const SHAPES: [(usize, usize, usize, usize, usize); 9] = [
    (32, 32, 1, 32, 32),
    (64, 96, 64, 32, 32),
    (96, 128, 65, 96, 64),
    (288, 320, 130, 32, 320),
    (576, 256, 192, 64, 128),
    (320, 96, 63, 320, 96),
    (45, 77, 100, 45, 77),
    (352, 600, 1100, 32, 600),
    (1056, 64, 33, 160, 32),
];

fn check(isa: Isa) {
    let Some(kernel) = tier(w4a8_sparse::kernels(), SparseMatmul::isa, isa) else { return };
    let pools = [1, 3].map(|threads| Pool::new(threads).expect("a pool"));
    let mut random = Random(7);
    for (inputs, neurons, outputs, up_group, down_group) in SHAPES {
        for (asymmetric, extreme) in [(false, false), (true, false), (true, true)] {
            let up = pack(&mut random, &pools[1], (neurons, inputs), up_group, asymmetric, extreme);
            let down = pack(&mut random, &pools[1], (outputs, neurons), down_group, asymmetric, extreme);
            let bundles = Bundles::new(Some(&up), &down, &pools[1]).expect("they fit");
            let alone = Bundles::new(None, &down, &pools[1]).expect("it fits");
            assert_eq!((bundles.neurons(), bundles.inputs(), bundles.outputs()), (neurons, inputs, outputs));
            let mut value = |extreme: bool| if extreme { -1.0 } else { random.unit() };
            let x: Vec<f32> = (0..inputs).map(|_| value(extreme)).collect();
            let full: Vec<f32> = (0..neurons).map(|_| value(extreme)).collect();
            for share in [0, 1, 3, 10, 11] {
                let mut inner = full.clone();
                // All, one in three, one in ten, none; and one alone that is not a number.
                inner.iter_mut().enumerate().for_each(|(n, v)| {
                    let active = share > 0 && if share == 11 { n == neurons / 2 } else { n % share == 0 };
                    *v = if !active {
                        0.0
                    } else if share == 11 {
                        f32::NAN
                    } else {
                        *v
                    };
                });
                let active: Vec<u32> = (0..neurons as u32).filter(|&n| inner[n as usize] != 0.0).collect();
                for per in [Granularity::Group, Granularity::Token, Granularity::Tensor(0.01)] {
                    let codes = quantize(&x, up_group, per);
                    let expected = dense(&pools[0], &up, &codes);
                    let expected: Vec<f32> = active.iter().map(|&n| expected[n as usize]).collect();
                    let inner_codes = quantize(&inner, down_group, per);
                    let sums = dense(&pools[0], &down, &inner_codes);
                    for pool in &pools {
                        let context = format!("{inputs} x {neurons} x {outputs}, 1 in {share}, {per:?}");
                        let mut out = vec![9.0; active.len()];
                        sparse_rows(pool, kernel, &bundles, &codes, 0, &active, &mut out).expect("fits");
                        assert_eq!(bits(&out), bits(&expected), "rows of {context}");
                        for bundles in [&bundles, &alone] {
                            let mut y = vec![9.0; outputs];
                            sparse_columns(pool, kernel, bundles, &inner_codes, 0, &active, &mut y)
                                .expect("fits");
                            assert_eq!(bits(&y), bits(&sums), "columns of {context}");
                        }
                    }
                }
            }
        }
    }
}

tests! {
    scalar => check(Scalar);
    avx2 => check(Avx2);
    sparse_avx512vnni => check(Avx512Vnni);
    neon_dotprod => check(NeonDotprod);
}

#[test]
fn wrong_shapes_are_errors() {
    let pool = Pool::new(1).expect("a pool");
    let mut random = Random(1);
    let up = pack(&mut random, &pool, (64, 32), 32, false, false);
    let down = pack(&mut random, &pool, (32, 64), 32, false, false);
    let bundles = Bundles::new(Some(&up), &down, &pool).expect("they fit");
    let other = pack(&mut random, &pool, (32, 32), 32, false, false);
    assert!(Bundles::new(Some(&other), &down, &pool).expect_err("rows").to_string().contains("rows of up"));
    let float = Packed::from_f32(32, 64, &[0.0; 32 * 64], &pool).expect("good");
    assert!(Bundles::new(None, &float, &pool).is_err());
    let kernel = w4a8_sparse::kernels()[0];
    let (x, inner) =
        (quantize(&[1.0; 32], 32, Granularity::Group), quantize(&[1.0; 64], 32, Granularity::Group));
    let rows = |x: &Activations, row, active: &[u32], len: usize| {
        sparse_rows(&pool, kernel, &bundles, x, row, active, &mut vec![0.0; len]).map_err(|e| e.to_string())
    };
    assert_eq!(rows(&x, 0, &[1, 63], 2), Ok(()));
    for (result, word) in [
        (rows(&inner, 0, &[1], 1), "32 columns"),
        (rows(&x, 1, &[1], 1), "row"),
        (rows(&x, 0, &[1, 64], 2), "64"),
        (rows(&x, 0, &[2, 1], 2), "another order"),
        (rows(&x, 0, &[1], 2), "output"),
    ] {
        assert!(result.as_ref().is_err_and(|message| message.contains(word)), "{word}: {result:?}");
    }
    let columns = |x: &Activations, len: usize| {
        sparse_columns(&pool, kernel, &bundles, x, 0, &[1], &mut vec![0.0; len]).is_err()
    };
    assert!(!columns(&inner, 32) && columns(&x, 32) && columns(&inner, 31));
    let alone = Bundles::new(None, &down, &pool).expect("it fits");
    assert!(sparse_rows(&pool, kernel, &alone, &x, 0, &[], &mut []).is_err());
}
