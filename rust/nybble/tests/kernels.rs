//! Every integer kernel of every tier against `scalar`, bit for bit, and `scalar` against the formula.
//!
//! One test function an operation and tier, so that a tier can be run alone (in an emulator, for example) by its name. A
//! tier this CPU lacks prints that it was skipped.

#![allow(clippy::float_cmp)] // equality to the bit is the point

mod common;

use common::{GROUPS_OF_8, KINDS, Kind, Random, SHAPES, activations, bits, scalar_quantize, tier};
use nybble::cpu::Isa;
use nybble::error::Error;
use nybble::kernels::quantize::{Activations, Granularity, Rounding};
use nybble::kernels::{Columns, IntMatmul, int_matmul, w4a4, w4a4_trip, w4a8, w8a8};
use nybble::pack::{IntSource, Layout, Packed};
use nybble::threads::Pool;
use proptest::prelude::*;

/// Numbers of activation rows; the last is the largest.
const ROWS: [usize; 8] = [0, 1, 2, 3, 5, 8, 9, 17];
const OUTPUTS: [usize; 7] = [0, 1, 15, 16, 17, 33, 64];
/// Integer weights before packing, one byte a code.
struct Weights {
    bits: u32,
    rows: usize,
    cols: usize,
    group: usize,
    groups: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Option<Vec<u8>>,
}

impl Weights {
    /// Codes of 7 bits are stored as those of 8 bits between 64 and 191.
    fn new(bits: u32, rows: usize, (cols, group): (usize, usize), asymmetric: bool, kind: Kind) -> Self {
        let mut random = Random((rows * 1000 + cols) as u64 ^ u64::from(bits));
        let (least, mask) = match bits {
            4 => (0, 15),
            7 => (64, 127),
            _ => (0, 255),
        };
        let top = least + mask;
        let groups = cols.div_ceil(group);
        let code = |i: usize, random: &mut Random| match kind {
            Kind::AllMin => least,
            Kind::AllMax => top,
            Kind::Alternating => [top, least][i % cols % 2],
            _ => least + (random.next() as u8 & mask),
        };
        let scale = |i: usize, random: &mut Random| match kind {
            Kind::NotFinite if i.is_multiple_of(3) => 0.0,
            Kind::OddScales => [1e-39, 1e-45, f32::MIN_POSITIVE, 0.0, 3e-38][i % 5],
            _ => random.scale(),
        };
        Self {
            bits: if bits == 4 { 4 } else { 8 },
            rows,
            cols,
            group,
            groups,
            codes: (0..rows * cols).map(|i| code(i, &mut random)).collect(),
            scales: (0..rows * groups).map(|i| scale(i, &mut random)).collect(),
            zeros: asymmetric.then(|| (0..rows * groups).map(|_| random.next() as u8).collect()),
        }
    }

    fn row_bytes(&self) -> usize {
        self.cols.div_ceil(if self.bits == 4 { 8 } else { 4 }) * 4
    }

    /// The codes as a file has them; the bytes after a row's last code are garbage.
    fn file_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0xa5; self.rows * self.row_bytes()];
        for (row, bytes) in self.codes.chunks_exact(self.cols).zip(bytes.chunks_exact_mut(self.row_bytes())) {
            for (i, &code) in row.iter().enumerate() {
                match (self.bits, i % 2) {
                    (8, _) => bytes[i] = code,
                    (_, 0) => bytes[i / 2] = bytes[i / 2] & 0xf0 | code,
                    (_, _) => bytes[i / 2] = bytes[i / 2] & 0x0f | code << 4,
                }
            }
        }
        bytes
    }

    fn source<'a>(&'a self, codes: &'a [u8]) -> IntSource<'a> {
        IntSource {
            name: "test.weight",
            rows: self.rows,
            cols: self.cols,
            bits: self.bits,
            group: self.group,
            codes,
            row_bytes: self.row_bytes(),
            scales: &self.scales,
            zeros: self.zeros.as_deref(),
            row_map: None,
        }
    }

    fn pack(&self, pool: &Pool) -> Packed {
        let bytes = self.file_bytes();
        Packed::from_int(&self.source(&bytes), pool).expect("good weights")
    }

    /// Codes in units of zero points: sixteenths for 4 bits.
    fn units(&self) -> u8 {
        if self.bits == 4 { 16 } else { 1 }
    }

    /// `units * code - zero point`.
    fn steps(&self, code: u8, row: usize, g: usize) -> i32 {
        let zero = self.zeros.as_ref().map_or(128, |zeros| zeros[row * self.groups + g]);
        i32::from(code) * i32::from(self.units()) - i32::from(zero)
    }

    /// The formula, from the unpacked codes.
    fn formula(&self, x: &Activations) -> Vec<f32> {
        let mut y = Vec::new();
        for m in 0..x.rows() {
            for row in 0..self.rows {
                let codes = &self.codes[row * self.cols..][..self.cols];
                let groups = codes.chunks(self.group).zip(x.codes(m).chunks(self.group)).enumerate();
                let sum = groups.fold(0f32, |y, (g, (w, a))| {
                    let products =
                        w.iter().zip(a).map(|(&w, &a)| i64::from(self.steps(w, row, g)) * i64::from(a));
                    let sum: i64 = products.sum();
                    f32::mul_add(sum as f32, self.scales[row * self.groups + g] * x.scales(m)[g], y)
                });
                y.push(sum / f32::from(self.units()));
            }
        }
        y
    }
}

fn quantized(w: &Weights, rows: usize, kind: Kind, rounding: Rounding) -> Activations {
    let pool = Pool::new(1).expect("a pool");
    let mut x = Activations::new();
    x.quantize(&pool, scalar_quantize(), &activations(rows, w.cols, kind), rows, w.cols, w.group, rounding)
        .expect("good activations");
    x
}

/// Runs the matmul into the middle of a wider matrix, and checks that nothing around it was written.
fn multiply(pool: &Pool, kernel: &dyn IntMatmul, w: &Packed, x: &Activations) -> Vec<f32> {
    let (stride, offset) = (w.rows() + 5, 2);
    let mut y = vec![-77.0; x.rows() * stride];
    int_matmul(pool, kernel, w, x, Columns::new(&mut y, x.rows(), stride, offset, w.rows()))
        .expect("matching shapes");
    let mut inside = Vec::new();
    for row in y.chunks_exact(stride) {
        let (before, rest) = row.split_at(offset);
        let (row, after) = rest.split_at(w.rows());
        assert!(before.iter().chain(after).all(|v| *v == -77.0), "wrote outside its columns");
        inside.extend_from_slice(row);
    }
    inside
}

/// All sizes and inputs; any number of rows together gives the rows that `scalar` computes one by one.
fn check_matmul(kernels: fn() -> Vec<&'static dyn IntMatmul>, [bits_per_weight, x_bits]: [u32; 2], isa: Isa) {
    let Some(kernel) = tier(kernels(), IntMatmul::isa, isa) else { return };
    let scalar = kernels()[0];
    assert_eq!(scalar.isa(), Isa::Scalar);
    let pool = Pool::new(1).expect("a pool");
    for outputs in OUTPUTS {
        for shape in SHAPES {
            for kind in KINDS {
                for asymmetric in [false, true] {
                    let w = Weights::new(bits_per_weight, outputs, shape, asymmetric, kind);
                    let packed = w.pack(&pool);
                    if bits_per_weight == 7 {
                        assert_eq!(packed.narrow(), !asymmetric);
                    }
                    let all = ROWS[ROWS.len() - 1];
                    let per = if outputs % 2 == 0 { Granularity::Token } else { Granularity::Group };
                    let rounding = Rounding { bits: x_bits, per };
                    let x = quantized(&w, all, kind, rounding);
                    let expected = multiply(&pool, scalar, &packed, &x);
                    if isa == Isa::Scalar && kind != Kind::OddScales {
                        assert_eq!(bits(&expected), bits(&w.formula(&x)), "{outputs} {shape:?} {kind:?}");
                    }
                    for rows in ROWS {
                        let y = multiply(&pool, kernel, &packed, &quantized(&w, rows, kind, rounding));
                        assert_eq!(
                            bits(&y),
                            bits(&expected[..rows * outputs]),
                            "{rows} rows, {outputs} outputs, {shape:?}, {kind:?}, asymmetric: {asymmetric}"
                        );
                    }
                }
            }
        }
    }
}

/// The same bits with one, two and three threads.
fn check_threads(
    kernels: fn() -> Vec<&'static dyn IntMatmul>,
    [bits_per_weight, x_bits]: [u32; 2],
    isa: Isa,
) {
    let Some(kernel) = tier(kernels(), IntMatmul::isa, isa) else { return };
    for outputs in [1, 33, 100] {
        let w = Weights::new(bits_per_weight, outputs, (96, 32), true, Kind::Random);
        let x = quantized(&w, 5, Kind::Random, Rounding { bits: x_bits, per: Granularity::Group });
        let y = [1, 2, 3].map(|threads| {
            let pool = Pool::new(threads).expect("a pool");
            bits(&multiply(&pool, kernel, &w.pack(&pool), &x))
        });
        assert!(y[0] == y[1] && y[0] == y[2], "{outputs} outputs");
    }
}

macro_rules! tiers {
    ($($isa:ident: $w4a8:ident $w8a8:ident $w4a4:ident $trip:ident;)*) => { $(
        #[test]
        fn $w4a8() {
            check_matmul(w4a8::kernels, [4, 8], Isa::$isa);
            check_threads(w4a8::kernels, [4, 8], Isa::$isa);
        }

        #[test]
        fn $w8a8() {
            check_matmul(w8a8::kernels, [8, 8], Isa::$isa);
            check_threads(w8a8::kernels, [8, 8], Isa::$isa);
        }

        #[test]
        fn $w4a4() {
            check_matmul(w4a4::kernels, [4, 4], Isa::$isa);
            check_threads(w4a4::kernels, [4, 4], Isa::$isa);
        }

        #[test]
        fn $trip() {
            check_matmul(w4a4_trip::kernels, [4, 4], Isa::$isa);
            check_threads(w4a4_trip::kernels, [4, 4], Isa::$isa);
        }

    )* };
}

tiers! {
    Scalar: w4a8_scalar w8a8_scalar w4a4_scalar w4a4_trip_scalar;
    Avx2: w4a8_avx2 w8a8_avx2 w4a4_avx2 w4a4_trip_avx2;
    AvxVnni: w4a8_avxvnni w8a8_avxvnni w4a4_avxvnni w4a4_trip_avxvnni;
    Avx512Vnni: w4a8_avx512vnni w8a8_avx512vnni w4a4_avx512vnni w4a4_trip_avx512vnni;
    Neon: w4a8_neon w8a8_neon w4a4_neon w4a4_trip_neon;
    NeonDotprod: w4a8_neon_dotprod w8a8_neon_dotprod w4a4_neon_dotprod w4a4_trip_neon_dotprod;
    NeonI8mm: w4a8_neon_i8mm w8a8_neon_i8mm w4a4_neon_i8mm w4a4_trip_neon_i8mm;
}

/// Other tiers treat codes of 7 bits as those of 8 that they are.
#[test]
fn w7a7_avx2() {
    for isa in [Isa::Scalar, Isa::Avx2] {
        check_matmul(w8a8::kernels, [7, 8], isa);
        check_matmul(w8a8::kernels, [7, 7], isa);
    }
}

#[test]
fn kernels_of_4_bit_activations_refuse_8_bits() {
    let pool = Pool::new(1).expect("a pool");
    let w = Weights::new(4, 20, (64, 32), true, Kind::Random);
    let x = quantized(&w, 2, Kind::Random, GROUPS_OF_8);
    let mut y = vec![0.0; 40];
    for kernel in w4a4::kernels().into_iter().chain(w4a4_trip::kernels()) {
        let columns = Columns::new(&mut y, 2, 20, 0, 20);
        let done = int_matmul(&pool, kernel, &w.pack(&pool), &x, columns);
        assert_eq!(done.is_err(), kernel.activation_bits() == 4);
    }
}

#[test]
fn a_wrong_layout_or_shape_is_an_error() {
    let pool = Pool::new(1).expect("a pool");
    let w = Weights::new(8, 20, (64, 32), false, Kind::Random);
    let packed = w.pack(&pool);
    let x = quantized(&w, 2, Kind::Random, GROUPS_OF_8);
    let mut y = vec![0.0; 40];
    for kernel in w4a8::kernels() {
        let columns = Columns::new(&mut y, 2, 20, 0, 20);
        let error = int_matmul(&pool, kernel, &packed, &x, columns).expect_err("another layout");
        assert!(matches!(error, Error::Layout { expected: "w4", found: "w8" }), "{error}");
    }
    assert!(packed.expect_layout(Layout::W8).is_ok());
    let kernel = w8a8::kernels()[0];
    let narrow = Columns::new(&mut y, 2, 20, 0, 19);
    assert!(int_matmul(&pool, kernel, &packed, &x, narrow).is_err());
    let short = Columns::new(&mut y, 1, 20, 0, 20);
    assert!(int_matmul(&pool, kernel, &packed, &x, short).is_err());
    for other in [(64, 64), (96, 32)] {
        let other = Weights::new(8, 20, other, false, Kind::Random);
        let x = quantized(&other, 2, Kind::Random, GROUPS_OF_8);
        let columns = Columns::new(&mut y, 2, 20, 0, 20);
        assert!(int_matmul(&pool, kernel, &packed, &x, columns).is_err());
    }
}

#[test]
fn bad_sources_are_errors_that_name_the_tensor() {
    let pool = Pool::new(2).expect("a pool");
    let good = Weights::new(4, 3, (100, 32), true, Kind::Random);
    let bytes = good.file_bytes();
    let zeros = good.zeros.clone().expect("asymmetric");
    let with_scale = |value: f32| {
        let mut scales = good.scales.clone();
        scales[5] = value;
        scales
    };
    let scales = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0].map(with_scale);
    let source = good.source(&bytes);
    let mut bad = vec![
        (IntSource { bits: 3, ..source }, "4 or 8 bits"),
        (IntSource { bits: 8, ..source }, "at least 100 bytes a row"),
        (IntSource { group: 0, ..source }, "multiple of 32"),
        (IntSource { group: 48, ..source }, "multiple of 32"),
        (IntSource { group: 64, ..source }, "scales"),
        (IntSource { cols: 0, ..source }, "at least one column"),
        (IntSource { cols: usize::MAX, ..source }, "fewer columns"),
        (IntSource { cols: 1 << 40, group: 1 << 40, ..source }, "65536"),
        (IntSource { cols: 101, row_bytes: 50, ..source }, "at least 51 bytes"),
        (IntSource { rows: 4, ..source }, "4 rows x 4 scales"),
        (IntSource { rows: usize::MAX, ..source }, "scales"),
        (IntSource { codes: &bytes[..bytes.len() - 3], ..source }, "3 rows of 52 bytes"),
        (IntSource { row_bytes: usize::MAX / 2 + 1, ..source }, "3 rows of"),
        (IntSource { zeros: Some(&zeros[1..]), ..source }, "12 zero points"),
        (IntSource { row_map: Some(&[0, 1, 3]), ..source }, "row 3"),
        (IntSource { row_map: Some(&[0, 1]), ..source }, "map of 3 rows"),
    ];
    bad.extend(scales.iter().map(|scales| (IntSource { scales, ..source }, "row 1, group 1")));
    for (source, part) in &bad {
        let message = Packed::from_int(source, &pool).expect_err(part).to_string();
        assert!(message.starts_with("test.weight: ") && message.contains(part), "{message}");
    }
    assert!(Packed::from_int(&source, &pool).is_ok());
    let negative_zero = with_scale(-0.0);
    assert!(Packed::from_int(&IntSource { scales: &negative_zero, ..source }, &pool).is_ok());
}

#[test]
fn scales_outside_f16_are_kept_by_a_power_of_two() {
    let pool = Pool::new(1).expect("a pool");
    for factor in [1e-40, 1e-30, 1e-6, 1.0, 1e6, 1e35] {
        let mut w = Weights::new(4, 17, (64, 32), false, Kind::Random);
        for (i, scale) in w.scales.iter_mut().enumerate() {
            *scale = (1.0 + i as f32 * 0.01) * factor;
        }
        let packed = w.pack(&pool);
        let mut row = [0.0; 64];
        for r in 0..17 {
            packed.row(r, &mut row).expect("a row");
            for (i, value) in row.iter().enumerate() {
                let exact = (f32::from(w.codes[r * 64 + i]) - 8.0) * w.scales[r * 2 + i / 32];
                let bound = exact.abs() / 2048.0 + 1e-44;
                assert!((value - exact).abs() <= bound, "{factor}: {value} for {exact}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// Unpacking is the inverse of packing, whatever the shape, and for any choice of rows.
    #[test]
    fn unpacking_inverts_packing(
        rows in 0usize..40,
        cols in 1usize..700,
        group in 0usize..6,
        bits in prop::sample::select(vec![4u32, 8]),
        asymmetric: bool,
        threads in 1usize..4,
        picks in prop::option::of(prop::collection::vec(any::<prop::sample::Index>(), 0..50)),
    ) {
        let pool = Pool::new(threads).expect("a pool");
        let group = if group == 5 { cols } else { [32, 64, 96, 128, 256][group].min(cols.next_multiple_of(32)) };
        let w = Weights::new(bits, rows, (cols, group), asymmetric, Kind::Random);
        let bytes = w.file_bytes();
        let map: Option<Vec<u32>> = picks
            .filter(|_| rows > 0)
            .map(|picks| picks.iter().map(|pick| pick.index(rows) as u32).collect());
        let source = IntSource { row_map: map.as_deref(), rows: map.as_ref().map_or(rows, Vec::len), ..w.source(&bytes) };
        let packed = Packed::from_int(&source, &pool).expect("good weights");
        prop_assert_eq!((packed.rows(), packed.cols()), (source.rows, cols));
        let mut row = vec![0.0; cols];
        for r in 0..packed.rows() {
            packed.row(r, &mut row).expect("a row");
            let from = map.as_ref().map_or(r, |map| map[r] as usize);
            for (i, value) in row.iter().enumerate() {
                let g = i / group;
                let steps = w.steps(w.codes[from * cols + i], from, g) as f32 / f32::from(w.units());
                prop_assert_eq!(*value, steps * w.scales[from * w.groups + g]);
            }
        }
        prop_assert!(packed.row(packed.rows(), &mut row).is_err());
        if packed.rows() > 0 {
            prop_assert!(packed.row(0, &mut row[1..]).is_err());
        }
    }
}
