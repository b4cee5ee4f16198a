//! What all integer matmuls share: the walk over tiles and rows, and the views their inner loops work on.
//!
//! A kernel supplies one function: 16 outputs (a tile) for a few rows of activations. Each output of each row has its own
//! vector lane and its own sums, so how many rows are taken together decides only how often a weight is unpacked, never a
//! bit of the result.

use std::ops::Range;

use super::Columns;
use super::quantize::Activations;
use crate::pack::{Packed, TILE_K, TILE_ROWS, header_bytes};

/// The outputs of one tile for one row of activations.
pub(crate) type Outputs = [f32; TILE_ROWS];

/// One tile of integer weights.
pub(crate) struct Tile<'a> {
    /// For each group its header (see [`Tile::header`]) and its steps.
    pub(crate) bytes: &'a [u8],
    /// Whether the bytes come from memory, not from a cache: worth fetching ahead.
    pub(crate) cold: bool,
    /// Whether headers have zero points.
    pub(crate) asymmetric: bool,
    /// Whether no weight is further than 64 codes from 0, see [`Packed::narrow`].
    pub(crate) narrow: bool,
    /// Steps of 32 columns.
    pub(crate) steps: usize,
    /// Steps of every group but perhaps the last.
    pub(crate) group_steps: usize,
}

/// Some rows of activations.
pub(crate) struct Rows<'a> {
    /// `[rows, stride]`.
    pub(crate) codes: &'a [i8],
    /// Columns rounded up to 32.
    pub(crate) stride: usize,
    /// `[rows, groups]`.
    pub(crate) scales: &'a [f32],
    /// `[rows, groups]`.
    pub(crate) sums: &'a [i32],
    /// Groups of a row.
    pub(crate) groups: usize,
    /// Bits of a code.
    pub(crate) bits: u32,
}

#[cfg(target_arch = "aarch64")]
impl Rows<'_> {
    /// `count` rows from row `first` on.
    pub(crate) fn part(&self, first: usize, count: usize) -> Rows<'_> {
        Rows {
            codes: &self.codes[first * self.stride..][..count * self.stride],
            scales: &self.scales[first * self.groups..][..count * self.groups],
            sums: &self.sums[first * self.groups..][..count * self.groups],
            ..*self
        }
    }
}

impl<'a> Tile<'a> {
    /// Tile `t` of a matrix, in a cache.
    #[inline]
    pub(crate) fn of(w: &'a Packed, t: usize) -> Self {
        Self {
            bytes: w.tile_bytes(t),
            cold: false,
            asymmetric: w.asymmetric(),
            narrow: w.narrow(),
            steps: w.cols().div_ceil(TILE_K),
            group_steps: w.group() / TILE_K,
        }
    }

    /// Bytes before each group's steps: 16 scales as f16, then 16 zero points if there are any.
    pub(crate) fn header(&self) -> usize {
        header_bytes(self.asymmetric)
    }

    /// The steps of group `g`.
    #[inline]
    pub(crate) fn steps_of(&self, g: usize) -> usize {
        self.group_steps.min(self.steps - g * self.group_steps)
    }

    /// Asserts what the kernels' pointer arithmetic relies on: the tile and `m` rows of `x` have as many steps and groups
    /// as they say.
    #[inline]
    pub(crate) fn check(&self, x: &Rows<'_>, m: usize, step_bytes: usize) {
        let groups = self.steps.div_ceil(self.group_steps);
        assert!(
            self.bytes.len() == groups * self.header() + self.steps * step_bytes
                && x.groups == groups
                && x.stride == self.steps * TILE_K
                && x.codes.len() == m * x.stride
                && x.scales.len() == m * groups
                && x.sums.len() == m * groups,
            "weights and activations differ in shape"
        );
    }
}

/// Calls `block` for every tile and for up to `MAX` rows at a time, and writes what it returns to `y`.
///
/// `block` gets as many outputs, all 0, as there are rows.
///
/// Taking many rows in blocks of columns and of rows, so that a part of a wide tile stays in the first-level cache and the
/// rows' activations in the second, was tried and lost a tenth: the tile streams from the second level fast enough, and the
/// blocks pay for picking up and putting down their sums.
///
/// # Safety
/// As [`super::IntMatmul::tiles`].
pub(crate) unsafe fn walk<const MAX: usize>(
    w: &Packed,
    x: &Activations,
    tiles: Range<usize>,
    y: Columns<'_>,
    block: impl Fn(&Tile<'_>, &Rows<'_>, &mut [Outputs]),
) {
    let factor = w.output_mul();
    let scaled = factor.to_bits() != 1f32.to_bits();
    for t in tiles {
        let mut tile = Tile { cold: true, ..Tile::of(w, t) };
        for first in (0..x.rows()).step_by(MAX) {
            let count = MAX.min(x.rows() - first);
            let mut outputs = [[0.0; TILE_ROWS]; MAX];
            let outputs = &mut outputs[..count];
            block(&tile, &x.block(first, count), outputs);
            tile.cold = false;
            for (r, outputs) in outputs.iter_mut().enumerate() {
                if scaled {
                    for v in outputs.iter_mut() {
                        *v *= factor;
                    }
                }
                // SAFETY: only this thread uses this tile's columns, and the slice is gone before the next is made.
                let to = unsafe { y.row(first + r, t * TILE_ROWS, TILE_ROWS) };
                if let Ok(to) = <&mut Outputs>::try_from(&mut *to) {
                    *to = *outputs; // a length the compiler knows: two stores instead of a call of memmove
                } else {
                    // The last tile of a matrix may have fewer rows than 16.
                    to.copy_from_slice(&outputs[..to.len()]);
                }
            }
        }
    }
}

/// Asks for the lines of a step some way ahead of `weights`.
///
/// Hardware follows a stream by itself, but only within a page of 4 KiB and after it has seen its first lines; with this one
/// row reads a fifth to a third more a second. 1 KiB ahead gains a little less, 4 KiB nothing with two threads.
///
/// Nothing on ARM, where the instruction has no stable form and nothing was measured.
#[inline]
pub(crate) fn fetch_ahead<const STEP: usize>(weights: *const u8) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..=STEP.div_ceil(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        const AHEAD: usize = 1536;
        // SAFETY: the instruction never faults, wherever the address points, and is part of the architecture's baseline.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(AHEAD + 64 * line).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = weights;
}

/// `value`, as something the compiler knows nothing about, and vectors on the stack aligned.
///
/// A caller's stack is aligned to 16 bytes only, and the compiler learns too late that it will have to keep vectors there
/// to align it further: by chance, half of them then straddle cache lines, which cost a third of the speed. A value that asks for
/// the alignment from the start settles it for the whole function this is inlined into.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn opaque(value: usize) -> usize {
    #[repr(align(64))]
    struct Aligned(usize);

    std::hint::black_box(Aligned(value)).0
}

/// A kernel type holding its capability token, its `kernel()` and its [`super::IntMatmul`].
macro_rules! int_matmul_kernel {
    ($token:ident, $isa:expr, $layout:expr, $rows:literal, $block:ident) => {
        $crate::kernels::tiles::int_matmul_kernel!($token, $isa, $layout, $rows, $block, 8);
    };
    ($token:ident, $isa:expr, $layout:expr, $rows:literal, $block:ident, $activation_bits:literal) => {
        /// # Safety
        /// As [`crate::kernels::IntMatmul::tiles`], and the CPU has the instructions.
        unsafe fn walk_tiles(
            w: &crate::pack::Packed,
            x: &crate::kernels::quantize::Activations,
            tiles: std::ops::Range<usize>,
            y: crate::kernels::Columns<'_>,
        ) {
            // SAFETY: promised by the caller.
            unsafe {
                crate::kernels::tiles::walk::<$rows>(w, x, tiles, y, |tile, x, out| $block(tile, x, out));
            }
        }

        $crate::kernels::tiles::int_matmul_kernel!(walk_tiles, $token, $isa, $layout, $activation_bits);
    };
    ($walk:ident, $token:ident, $isa:expr, $layout:expr, $activation_bits:literal) => {
        /// Holds the proof that the instructions may be used.
        struct Kernel(#[allow(dead_code)] crate::cpu::$token);

        /// The kernel, if the CPU has the tier.
        pub(super) fn kernel() -> Option<&'static dyn crate::kernels::IntMatmul> {
            static KERNEL: std::sync::LazyLock<Option<Kernel>> =
                std::sync::LazyLock::new(|| crate::cpu::$token::new().map(Kernel));
            KERNEL.as_ref().map(|k| k as &dyn crate::kernels::IntMatmul)
        }

        impl crate::kernels::IntMatmul for Kernel {
            fn isa(&self) -> crate::cpu::Isa {
                $isa
            }

            fn layout(&self) -> crate::pack::Layout {
                $layout
            }

            fn activation_bits(&self) -> u32 {
                $activation_bits
            }

            unsafe fn tiles(
                &self,
                w: &crate::pack::Packed,
                x: &crate::kernels::quantize::Activations,
                tiles: std::ops::Range<usize>,
                y: crate::kernels::Columns<'_>,
            ) {
                // SAFETY: the token proves that the CPU has the instructions; the rest is the caller's promise.
                unsafe { $walk(w, x, tiles, y) }
            }
        }
    };
}

/// A kernel's `block`: its `rows` with the number of rows as a constant.
macro_rules! block_by_rows {
    ($features:literal, $rows:ident, [$($n:literal),+], $most:literal) => {
        #[target_feature(enable = $features)]
        fn block(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
            match out.len() {
                $($n => $rows::<$n>(tile, x, out),)+
                _ => $rows::<$most>(tile, x, out),
            }
        }
    };
}

/// The kernels of the calling module, which has a file for every tier, as far as this CPU allows them, lowest tier first.
macro_rules! kernel_of_every_tier {
    () => {{
        let all: &[Option<&'static dyn $crate::kernels::IntMatmul>] = &[
            Some(&scalar::Scalar),
            #[cfg(target_arch = "x86_64")]
            avx2::kernel(),
            #[cfg(target_arch = "x86_64")]
            avxvnni::kernel(),
            #[cfg(target_arch = "x86_64")]
            avx512vnni::kernel(),
            #[cfg(target_arch = "aarch64")]
            neon::kernel(),
            #[cfg(target_arch = "aarch64")]
            neon_dotprod::kernel(),
            #[cfg(target_arch = "aarch64")]
            neon_i8mm::kernel(),
        ];
        all.iter().copied().flatten().collect()
    }};
}

pub(crate) use {block_by_rows, int_matmul_kernel, kernel_of_every_tier};
