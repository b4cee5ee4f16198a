//! `w4a4_trip/scalar`: the multiplier in portable Rust.

use std::ops::Range;

use super::loops;
use crate::cpu::Isa;
use crate::kernels::quantize::Activations;
use crate::kernels::tiles::walk;
use crate::kernels::{Columns, IntMatmul};
use crate::pack::{Layout, Packed};

/// Portable Rust.
pub(super) struct Scalar;

impl IntMatmul for Scalar {
    fn isa(&self) -> Isa {
        Isa::Scalar
    }

    fn layout(&self) -> Layout {
        Layout::W4
    }

    fn activation_bits(&self) -> u32 {
        4
    }

    unsafe fn tiles(&self, w: &Packed, x: &Activations, tiles: Range<usize>, y: Columns<'_>) {
        // SAFETY: the caller's promise.
        unsafe { walk::<8>(w, x, tiles, y, loops::block) }
    }
}
