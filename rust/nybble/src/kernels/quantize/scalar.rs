//! `quantize/scalar`: the oracle.

use super::{Block, Quantize, Rounding, Row, convert};
use crate::cpu::Isa;

/// 1.5 * 2^23: adding it to a small float rounds to an integer, halves to even, which is then the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// Portable Rust.
pub(super) struct Scalar;

impl Quantize for Scalar {
    fn isa(&self) -> Isa {
        Isa::Scalar
    }

    fn row(&self, x: &[f32], group: usize, rounding: Rounding, out: Row<'_>) {
        convert(x, group, rounding, out, largest, encode);
    }
}

fn largest(x: &[Block<f32>]) -> u32 {
    x.as_flattened().iter().fold(0, |top, v| top.max(v.to_bits() & 0x7fff_ffff))
}

fn encode(x: &[Block<f32>], inverse: f32, codes: &mut [Block<i8>]) -> i32 {
    let mut sum = 0;
    for (code, v) in codes.as_flattened_mut().iter_mut().zip(x.as_flattened()) {
        let rounded = (v * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
        *code = rounded as i8;
        sum += rounded;
    }
    sum
}
