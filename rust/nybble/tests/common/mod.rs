//! What the tests of kernels share.

#![allow(dead_code, unused_macros, unused_imports)] // each test binary uses a part

use nybble::cpu::Isa;
use nybble::kernels::quantize::{self, Granularity, Quantize, Rounding};
use nybble::threads::Pool;

/// One test an operation and tier; a tier that this CPU does not have is reported as skipped.
macro_rules! tests {
    ($($name:ident => $check:ident($isa:ident);)+) => {
        $(
            #[test]
            fn $name() {
                if Isa::$isa.allowed() {
                    $check(Isa::$isa);
                } else {
                    eprintln!("skipped: this CPU (or NYBBLE_ISA) does not allow {}", Isa::$isa.name());
                }
            }
        )+
    };
}
pub(crate) use tests;

/// The kernel of tier `isa` and the scalar one.
pub(crate) fn pair<T: ?Sized>(
    list: &[&'static T],
    isa_of: impl Fn(&T) -> Isa,
    isa: Isa,
) -> (&'static T, &'static T) {
    let find = |isa| list.iter().copied().find(|kernel| isa_of(kernel) == isa);
    (find(isa).expect("an allowed tier is listed"), find(Isa::Scalar).expect("scalar is listed"))
}

/// The kernel of a tier, or a note that there is none.
pub(crate) fn tier<T: ?Sized>(
    list: Vec<&'static T>,
    isa_of: impl Fn(&T) -> Isa,
    isa: Isa,
) -> Option<&'static T> {
    let kernel = list.into_iter().find(|k| isa_of(k) == isa);
    if kernel.is_none() {
        eprintln!("skipped: this CPU has no {}", isa.name());
    }
    kernel
}

pub(crate) fn pool(threads: usize) -> Pool {
    Pool::new(threads).expect("a pool")
}

/// Deterministic numbers (`SplitMix64`).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// From -1 to 1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// A positive number f16 holds exactly.
    pub(crate) fn scale(&mut self) -> f32 {
        (1 + self.next() % 1023) as f32 / 4096.0
    }

    pub(crate) fn take(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}

#[track_caller]
pub(crate) fn assert_same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            f.to_bits() == e.to_bits() || (f.is_nan() && e.is_nan()),
            "{what}: element {i} is {f}, not {e}"
        );
    }
}

/// Bits with all NaNs made equal: which NaN an operation gives is not defined.
pub(crate) fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|v| if v.is_nan() { f32::NAN } else { *v }.to_bits()).collect()
}

/// Columns and group; equal means one scale a row.
pub(crate) const SHAPES: [(usize, usize); 15] = [
    (1, 1),
    (31, 31),
    (31, 32),
    (32, 32),
    (33, 32),
    (64, 32),
    (64, 64),
    (64, 128),
    (96, 32),
    (96, 64),
    (100, 100),
    (576, 32),
    (576, 64),
    (576, 128),
    (576, 576),
];

/// What weights, scales and activations look like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    Random,
    AllMin,
    AllMax,
    /// The extremes that make every product positive and as large as possible.
    Alternating,
    Zeros,
    /// NaN and infinities among the activations, zeros among the scales.
    NotFinite,
    /// Scales far outside f16's range.
    OddScales,
}

pub(crate) const KINDS: [Kind; 7] = [
    Kind::Random,
    Kind::AllMin,
    Kind::AllMax,
    Kind::Alternating,
    Kind::Zeros,
    Kind::NotFinite,
    Kind::OddScales,
];

/// `rows` rows of activations; the first ones are the same for every `rows`.
pub(crate) fn activations(rows: usize, cols: usize, kind: Kind) -> Vec<f32> {
    let mut random = Random(cols as u64);
    let value = |i: usize, random: &mut Random| match kind {
        Kind::AllMin => -1.5,
        Kind::AllMax => 1.5,
        Kind::Alternating => [2.0, -2.0][i % cols % 2],
        Kind::Zeros => 0.0,
        Kind::NotFinite if i / cols % 4 != 3 && i % cols == cols / 2 => {
            [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][i / cols % 4]
        }
        _ => random.unit() * 3.0,
    };
    (0..rows * cols).map(|i| value(i, &mut random)).collect()
}

pub(crate) const GROUPS_OF_8: Rounding = Rounding { bits: 8, per: Granularity::Group };

pub(crate) fn scalar_quantize() -> &'static dyn Quantize {
    quantize::kernels()[0]
}
