//! Integer matrices and activations to measure kernels with, the same in every run.
#![allow(dead_code)] // no bench needs all of it

use nybble::kernels::quantize::{self, Activations, Granularity, Rounding};
use nybble::pack::{IntSource, Packed};
use nybble::threads::Pool;

/// Repeatable bytes.
pub(crate) fn noise(len: usize, state: &mut u32) -> Vec<u8> {
    let mut next = || {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A matrix of codes of 4, 7 or 8 bits, with a scale for each `group` columns and perhaps a zero point.
pub(crate) fn weights(
    pool: &Pool,
    bits: u32,
    (rows, cols): (usize, usize),
    group: usize,
    zeros: bool,
    state: &mut u32,
) -> Packed {
    let stored = if bits == 4 { 4 } else { 8 };
    let row_bytes = cols * stored / 8;
    let mut codes = noise(rows * row_bytes, state);
    if bits == 7 {
        for code in &mut codes {
            *code = 64 + *code / 2;
        }
    }
    let groups = rows * cols / group;
    let (scales, points) = (vec![0.01; groups], zeros.then(|| noise(groups, state)));
    let source = IntSource {
        name: "bench",
        rows,
        cols,
        bits: stored as u32,
        group,
        codes: &codes,
        row_bytes,
        scales: &scales,
        zeros: points.as_deref(),
        row_map: None,
    };
    Packed::from_int(&source, pool).expect("good weights")
}

/// Rows of numbers to multiply them by.
pub(crate) fn activations(pool: &Pool, bits: u32, rows: usize, cols: usize, group: usize) -> Activations {
    let x = floats(rows * cols);
    let kernel = *quantize::kernels().last().expect("scalar is always there");
    let mut activations = Activations::new();
    activations
        .quantize(pool, kernel, &x, rows, cols, group, Rounding { bits, per: Granularity::Group })
        .expect("good activations");
    activations
}

/// Numbers from -127.5 to 127.5.
pub(crate) fn floats(len: usize) -> Vec<f32> {
    noise(len, &mut 1).iter().map(|&b| f32::from(b) - 127.5).collect()
}
