//! Kernels: one folder an operation, one file an ISA tier.
//!
//! Every operation has a trait, a `scalar` implementation that is always compiled and is the oracle, and a `kernels()`
//! list of all implementations this CPU (and `NYBBLE_ISA`) allows, lowest tier first. Tests and benches walk that list, so
//! adding a kernel is one file and one line. [`Kernels`] is the choice made once a model.
//!
//! Integer kernels equal `scalar` bit for bit. All kernels compute a row of their result with the same arithmetic however
//! many rows are computed together and whichever thread does it.

#![allow(unsafe_code)]
#![allow(clippy::wildcard_imports)] // `std::arch` has no other readable form
#![allow(clippy::cast_ptr_alignment)] // vectors are loaded with the unaligned instructions
#![allow(clippy::needless_range_loop)] // several arrays of registers are indexed together

#[cfg(target_arch = "aarch64")]
pub(crate) mod arm;
pub mod attention;
pub mod columns;
pub mod elementwise;
pub mod f32;
pub mod norm;
pub mod peak;
pub mod quantize;
pub mod rope;
pub(crate) mod tiles;
pub mod w4a4;
pub mod w4a4_trip;
pub mod w4a8;
pub mod w4a8_sparse;
pub mod w8a8;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

use std::ops::Range;

pub use columns::Columns;

use crate::cpu::Isa;
use crate::error::{Error, Result};
use crate::pack::{Layout, Packed, TILE_ROWS};
use crate::threads::Pool;
use quantize::Activations;

/// A matmul of integer activations with packed integer weights (`w4a8`, `w8a8`, `w4a4`, `w4a4_trip`).
pub trait IntMatmul: Sync {
    /// The tier.
    fn isa(&self) -> Isa;

    /// The layout of the weights it reads.
    fn layout(&self) -> Layout;

    /// The most bits the activations may have: 8, or 4 for a kernel that relies on their small products.
    fn activation_bits(&self) -> u32 {
        8
    }

    /// `y[r, 16 t .. 16 t + 16] = sum over groups g of (scale_w * scale_x) * (sum_k (code_w - zero) * code_x)` for every
    /// row `r` of `x` and every tile `t` in `tiles`.
    ///
    /// The inner sum is exact in `i32`; groups are added in order with one fused multiply-add each, in `f32`.
    ///
    /// # Safety
    /// No other thread may access the columns of these tiles in `y` during the call. `w` has this kernel's layout, `x` its
    /// columns and group, and `tiles` lies inside it.
    unsafe fn tiles(&self, w: &Packed, x: &Activations, tiles: Range<usize>, y: Columns<'_>);
}

/// The kernels chosen for a model: the best of each operation at or below one tier.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// Float to int8 activations.
    pub quantize: &'static dyn quantize::Quantize,
    /// 4-bit weights, 8-bit activations.
    pub w4a8: &'static dyn IntMatmul,
    /// 8-bit weights, 8-bit activations.
    pub w8a8: &'static dyn IntMatmul,
    /// 4-bit weights, 4-bit activations.
    pub w4a4: &'static dyn IntMatmul,
    /// 4-bit weights, 8-bit activations, some neurons.
    pub w4a8_sparse: &'static dyn w4a8_sparse::SparseMatmul,
    /// Any weights, float activations.
    pub f32: &'static dyn f32::FloatMatmul,
    /// Causal attention over the KV cache.
    pub attention: &'static dyn attention::Attention,
    /// RMS and layer norm.
    pub norm: &'static dyn norm::Norm,
    /// Rotary position embedding.
    pub rope: &'static dyn rope::Rope,
    /// Activation functions and sums.
    pub elementwise: &'static dyn elementwise::Elementwise,
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}

impl Kernels {
    /// The best kernels this CPU and `NYBBLE_ISA` allow.
    pub fn best() -> Self {
        Self::up_to(Isa::best())
    }

    /// The best kernels not above `isa`.
    pub fn up_to(isa: Isa) -> Self {
        fn pick<T: ?Sized>(list: Vec<&'static T>, isa_of: impl Fn(&T) -> Isa, isa: Isa) -> &'static T {
            list.into_iter().rfind(|kernel| isa_of(kernel) <= isa).expect("scalar is always listed")
        }
        Self {
            quantize: pick(quantize::kernels(), quantize::Quantize::isa, isa),
            w4a8: pick(w4a8::kernels(), IntMatmul::isa, isa),
            w8a8: pick(w8a8::kernels(), IntMatmul::isa, isa),
            w4a4: pick(w4a4::kernels(), IntMatmul::isa, isa),
            w4a8_sparse: pick(w4a8_sparse::kernels(), w4a8_sparse::SparseMatmul::isa, isa),
            f32: pick(f32::kernels(), f32::FloatMatmul::isa, isa),
            attention: pick(attention::kernels(), attention::Attention::isa, isa),
            norm: pick(norm::kernels(), norm::Norm::isa, isa),
            rope: pick(rope::kernels(), rope::Rope::isa, isa),
            elementwise: pick(elementwise::kernels(), elementwise::Elementwise::isa, isa),
        }
    }

    /// The kernel for weights of a layout and activations of that many bits.
    ///
    /// 8-bit weights have no kernel of their own for 4-bit activations: their products gain nothing from it.
    pub fn int(&self, weights: Layout, activation_bits: u32) -> &'static dyn IntMatmul {
        match (weights, activation_bits) {
            (Layout::W4, 4) => self.w4a4,
            (Layout::W4, _) => self.w4a8,
            _ => self.w8a8,
        }
    }

    /// The chosen kernel of every operation, as `operation/tier`.
    pub fn names(&self) -> Vec<String> {
        [
            ("quantize", self.quantize.isa()),
            ("w4a8", self.w4a8.isa()),
            ("w8a8", self.w8a8.isa()),
            ("w4a4", self.w4a4.isa()),
            ("w4a8_sparse", self.w4a8_sparse.isa()),
            ("f32", self.f32.isa()),
            ("attention", self.attention.isa()),
            ("norm", self.norm.isa()),
            ("rope", self.rope.isa()),
            ("elementwise", self.elementwise.isa()),
        ]
        .into_iter()
        .map(|(op, isa)| format!("{op}/{}", isa.name()))
        .collect()
    }
}

/// `y = x Wᵀ` with int8 activations, split over the pool by tiles; `y` has `x.rows()` rows and `w.rows()` columns.
pub fn int_matmul(
    pool: &Pool,
    kernel: &dyn IntMatmul,
    w: &Packed,
    x: &Activations,
    y: Columns<'_>,
) -> Result<()> {
    int_matmuls(pool, x, &mut std::iter::once(IntProduct { kernel, w, y }))
}

/// One of the products of [`int_matmuls`].
#[derive(Clone, Copy)]
pub struct IntProduct<'a> {
    /// Computes it.
    pub kernel: &'a dyn IntMatmul,
    /// The weights.
    pub w: &'a Packed,
    /// Where it goes: columns of its own.
    pub y: Columns<'a>,
}

impl std::fmt::Debug for IntProduct<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IntProduct").field("w", self.w).field("y", &self.y).finish_non_exhaustive()
    }
}

/// Products computed in one phase of the pool; more take several phases.
const PRODUCTS: usize = 4;

/// Several products of the same activations, as [`int_matmul`] each. Few rows and a small matrix (keys and values of one
/// token) are too little work for a phase of the pool of their own; their tiles are shared out together.
pub fn int_matmuls(
    pool: &Pool,
    x: &Activations,
    products: &mut dyn Iterator<Item = IntProduct<'_>>,
) -> Result<()> {
    loop {
        let mut batch = [None; PRODUCTS];
        let mut tiles = 0;
        for (slot, product) in batch.iter_mut().zip(&mut *products) {
            let IntProduct { kernel, w, y } = product;
            w.expect_layout(kernel.layout())?;
            if x.bits() > kernel.activation_bits() {
                let most = format!("{} bits or fewer", kernel.activation_bits());
                return Err(Error::argument("activations", most, format!("{} bits", x.bits())));
            }
            if (x.cols(), x.group()) != (w.cols(), w.group()) {
                return Err(Error::argument(
                    "activations",
                    format!("{} columns in groups of {}", w.cols(), w.group()),
                    format!("{} columns in groups of {}", x.cols(), x.group()),
                ));
            }
            check_output(w, x.rows(), y)?;
            *slot = Some((tiles, product));
            tiles += w.tiles();
        }
        let Some(_) = batch[0] else { return Ok(()) };
        pool.split(tiles, 1, &|range| {
            for &(first, IntProduct { kernel, w, y }) in batch.iter().flatten() {
                let own = range.start.max(first)..range.end.min(first + w.tiles());
                if own.start < own.end {
                    // SAFETY: `split` hands out disjoint tile ranges, a tile's columns are its own, and the checks above
                    // hold.
                    unsafe { kernel.tiles(w, x, own.start - first..own.end - first, y) }
                }
            }
        });
    }
}

/// `y = x Wᵀ` with float activations `x [rows, w.cols()]` and weights of any layout, split over the pool by tiles.
pub fn float_matmul(
    pool: &Pool,
    kernel: &dyn f32::FloatMatmul,
    w: &Packed,
    x: &[f32],
    y: Columns<'_>,
) -> Result<()> {
    if x.len() != y.rows() * w.cols() {
        return Err(Error::argument("x", format!("{} x {} values", y.rows(), w.cols()), x.len()));
    }
    check_output(w, y.rows(), y)?;
    pool.split(w.tiles(), 1, &|tiles| {
        // SAFETY: as in `int_matmul`.
        unsafe { kernel.tiles(w, x, tiles, y) }
    });
    Ok(())
}

fn check_output(w: &Packed, rows: usize, y: Columns<'_>) -> Result<()> {
    if (y.rows(), y.width()) == (rows, w.rows()) {
        return Ok(());
    }
    Err(Error::argument("output", format!("{rows} x {}", w.rows()), format!("{} x {}", y.rows(), y.width())))
}

const _: () = assert!(TILE_ROWS == 16);
