//! `w4a8_sparse/scalar`: the oracle.

use std::ops::Range;

use half::f16;

use super::{SparseMatmul, Vector, by_group};
use crate::cpu::Isa;
use crate::pack::{Bundles, CHUNK, MIDDLE};

/// Portable Rust.
pub(super) struct Scalar;

impl SparseMatmul for Scalar {
    fn isa(&self) -> Isa {
        Isa::Scalar
    }

    fn rows(&self, w: &Bundles, x: &Vector<'_>, active: &[u32], out: &mut [f32]) {
        let side = w.row_side().expect("bundles with rows");
        x.check(w.inputs(), side.groups);
        assert_eq!(out.len(), active.len(), "an output a neuron");
        for (&n, out) in active.iter().zip(out) {
            let (codes, facts) = w.row(n as usize);
            let (scales, zeros) = facts.split_at(2 * side.groups);
            *out = 0.0;
            for (g, x_codes) in x.0.codes.chunks(side.group).enumerate() {
                let first = g * side.group;
                let products =
                    x_codes.iter().enumerate().map(|(k, &x)| code(codes, first + k) * i32::from(x));
                let zero = zeros.get(g).map_or(MIDDLE, |&zero| i32::from(zero));
                let sum = 16 * products.sum::<i32>() - zero * x.0.sums[g]; // in sixteenths, as the zero points
                *out = f32::mul_add(sum as f32, half(scales, g) * x.0.scales[g], *out);
            }
            scale(std::slice::from_mut(out), side.output_mul);
        }
    }

    fn columns(&self, w: &Bundles, x: &Vector<'_>, active: &[u32], chunks: Range<usize>, y: &mut [f32]) {
        let side = w.column_side();
        x.check(w.neurons(), side.groups);
        let first = chunks.start * CHUNK;
        assert_eq!(y.len(), w.outputs().min(chunks.end * CHUNK) - first, "the chunks' outputs");
        y.fill(0.0);
        for (g, active) in by_group(active, side.group) {
            let (scales, zeros) = w.column_scales(g);
            for (o, y) in (first..).zip(y.iter_mut()) {
                let product = |&n: &u32| code(w.column(n as usize), o) * i32::from(x.0.codes[n as usize]);
                let zero = zeros.get(o).map_or(MIDDLE, |&zero| i32::from(zero));
                let sum = 16 * active.iter().map(product).sum::<i32>() - zero * x.0.sums[g];
                *y = f32::mul_add(sum as f32, half(scales, o) * x.0.scales[g], *y);
            }
        }
        scale(y, side.output_mul);
    }
}

/// Code `i` in chunks of 32 bytes.
fn code(bytes: &[u8], i: usize) -> i32 {
    let byte = bytes[i / CHUNK * 32 + i % 32];
    i32::from(if i % CHUNK < 32 { byte & 15 } else { byte >> 4 })
}

fn half(bytes: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32()
}

/// The matrix's factor, applied where it is one.
pub(super) fn scale(values: &mut [f32], factor: f32) {
    if factor.to_bits() != 1f32.to_bits() {
        for value in values {
            *value *= factor;
        }
    }
}
