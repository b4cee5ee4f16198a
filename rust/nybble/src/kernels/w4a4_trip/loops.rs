//! The multiplier as plain loops over lanes; each tier compiles them with its own instructions.

#![allow(clippy::inline_always)] // what a tier inlines is compiled with its instructions

use crate::kernels::tiles::{Outputs, Rows, Tile};
use crate::pack::{Layout, TILE_K, TILE_ROWS, group_header};

const STEP: usize = Layout::W4.step_bytes();

/// Pairs of outputs in a tile.
const PAIRS: usize = TILE_ROWS / 2;

/// Steps whose products 16 bits hold: `15 * 15 * 32 * 8 = 57600`.
const SPILL: usize = 8;

/// The weights of a step: for two columns at a time, each column's pairs of outputs.
type Lanes = [[u16; 2 * PAIRS]; TILE_K / 2];

/// A step's weights as pairs, and for each output the sum of its codes.
#[inline(always)]
fn pairs(step: &[u8], sums: &mut [i32; TILE_ROWS]) -> Lanes {
    let mut lanes = [[0; 2 * PAIRS]; TILE_K / 2];
    for (chunk, bytes) in step.chunks_exact(4 * TILE_ROWS).enumerate() {
        // A word is an output's eight codes: the low nibbles are columns 0 to 3, the high ones 4 to 7.
        let words: [u32; TILE_ROWS] = std::array::from_fn(|row| {
            u32::from_le_bytes(*bytes[4 * row..].first_chunk().expect("four bytes an output"))
        });
        for (sum, word) in sums.iter_mut().zip(words) {
            let pairs = (word & 0x0f0f_0f0f) + (word >> 4 & 0x0f0f_0f0f);
            *sum += (pairs.wrapping_mul(0x0101_0101) >> 24) as i32; // the sum of its bytes, at most 120
        }
        for column in 0..8 {
            let shift = 8 * (column % 4) + 4 * (column / 4);
            let lanes = &mut lanes[4 * chunk + column / 2][column % 2 * PAIRS..][..PAIRS];
            for (pair, lane) in lanes.iter_mut().enumerate() {
                let code = |row: usize| words[row] >> shift & 15;
                *lane = (code(2 * pair) | code(2 * pair + 1) << 8) as u16;
            }
        }
    }
    lanes
}

/// What one row of activations has gathered in a group: the low and the high fields of each lane.
#[derive(Clone, Copy)]
struct Fields {
    short: [[u16; 2 * PAIRS]; 2],
    long: [[u32; PAIRS]; 2],
}

impl Fields {
    const NONE: Self = Self { short: [[0; 2 * PAIRS]; 2], long: [[0; PAIRS]; 2] };

    /// Multiplies a step's weights with 32 activations.
    #[inline(always)]
    fn add(&mut self, weights: &Lanes, x: &[i8; TILE_K]) {
        let [mut low, mut high] = self.short; // copies: in registers
        let mut next = weights.iter().zip(x.as_chunks::<2>().0);
        // Opaque, or the compiler unrolls it and adds across the lanes instead of along them, at a fifth of the speed.
        for _ in 0..std::hint::black_box(TILE_K / 2) {
            let Some((weights, x)) = next.next() else { break };
            let a = x.map(|x| (x + 8) as u16);
            for i in 0..2 * PAIRS {
                let product = weights[i].wrapping_mul(a[i / PAIRS]);
                low[i] += product & 0xff;
                high[i] += product >> 8;
            }
        }
        self.short = [low, high];
    }

    /// Moves what 16 bits hold into 32.
    #[inline(always)]
    fn spill(&mut self) {
        for (long, short) in self.long.iter_mut().zip(&mut self.short) {
            for i in 0..PAIRS {
                long[i] += u32::from(short[i]) + u32::from(short[i + PAIRS]);
            }
            *short = [0; 2 * PAIRS];
        }
    }
}

/// One tile for up to eight rows; codes of activations are within -8..=7.
#[inline(always)]
pub(super) fn block(tile: &Tile<'_>, x: &Rows<'_>, out: &mut [Outputs]) {
    tile.check(x, out.len(), STEP);
    let group_bytes = tile.header() + tile.group_steps * STEP;
    for (g, bytes) in tile.bytes.chunks(group_bytes).enumerate() {
        let (scales, zeros) = group_header(bytes, tile.asymmetric);
        let mut codes = [0; TILE_ROWS];
        let mut fields = [Fields::NONE; 8];
        let fields = &mut fields[..out.len()];
        for (s, step) in bytes[tile.header()..].chunks_exact(STEP).enumerate() {
            let weights = pairs(step, &mut codes);
            let column = (g * tile.group_steps + s) * TILE_K;
            for (m, fields) in fields.iter_mut().enumerate() {
                let x = x.codes[m * x.stride + column..].first_chunk().expect("32 codes a step");
                fields.add(&weights, x);
                if s % SPILL == SPILL - 1 {
                    fields.spill();
                }
            }
        }
        for (m, (fields, y)) in fields.iter_mut().zip(out.iter_mut()).enumerate() {
            fields.spill();
            let (x_scale, x_sum) = (x.scales[m * x.groups + g], x.sums[m * x.groups + g]);
            for r in 0..TILE_ROWS {
                let products = fields.long[r % 2][r / 2] as i32;
                let sum = 16 * (products - 8 * codes[r]) - zeros[r] * x_sum; // in sixteenths, as the zero points
                y[r] = f32::mul_add(sum as f32, scales[r] * x_scale, y[r]);
            }
        }
    }
}
