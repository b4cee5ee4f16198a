//! `w8a8/scalar`: the oracle.

use std::ops::Range;

use crate::cpu::Isa;
use crate::kernels::quantize::Activations;
use crate::kernels::tiles::{Outputs, Rows, Tile, walk};
use crate::kernels::{Columns, IntMatmul};
use crate::pack::{Layout, MIDDLE, Packed, TILE_K, TILE_ROWS, group_header};

/// Portable Rust.
pub(super) struct Scalar;

impl IntMatmul for Scalar {
    fn isa(&self) -> Isa {
        Isa::Scalar
    }

    fn layout(&self) -> Layout {
        Layout::W8
    }

    unsafe fn tiles(&self, w: &Packed, x: &Activations, tiles: Range<usize>, y: Columns<'_>) {
        // SAFETY: the caller's promise.
        unsafe { walk::<1>(w, x, tiles, y, |tile, x, out| block(tile, x, &mut out[0])) }
    }
}

fn block(tile: &Tile<'_>, x: &Rows<'_>, y: &mut Outputs) {
    const STEP: usize = Layout::W8.step_bytes();
    let group_bytes = tile.header() + tile.group_steps * STEP;
    let groups = tile.bytes.chunks(group_bytes).zip(x.codes.chunks(tile.group_steps * TILE_K));
    for ((bytes, x_codes), (x_scale, x_sum)) in groups.zip(x.scales.iter().zip(x.sums)) {
        let (scales, zeros) = group_header(bytes, tile.asymmetric);
        let mut sums = [0i32; TILE_ROWS];
        for (chunk, x) in bytes[tile.header()..].chunks_exact(64).zip(x_codes.chunks_exact(4)) {
            let x: [i32; 4] = std::array::from_fn(|i| i32::from(x[i]));
            for (sum, lane) in sums.iter_mut().zip(chunk.chunks_exact(4)) {
                for i in 0..4 {
                    *sum += i32::from(lane[i] as i8) * x[i];
                }
            }
        }
        for r in 0..TILE_ROWS {
            let sum = sums[r] - (zeros[r] - MIDDLE) * x_sum;
            y[r] = f32::mul_add(sum as f32, scales[r] * x_scale, y[r]);
        }
    }
}
