//! The grid of a group of weights: the scale and the zero point with the least squared error.
//!
//! A group of weights `w_1 .. w_n` is read back as `s (q_i - z)` from unsigned codes `q_i`; for given `s` and `z` the best code
//! is the nearest one. What is chosen here is `s` and, for asymmetric groups, `z`, to minimise
//!
//! ```text
//! E(s, z) = sum_i h_i (w_i - s (q_i - z))^2
//! ```
//!
//! where the importance `h_i` of an input is 1 unless a calibration says otherwise.
//!
//! The textbook choice `s = max|w| / (2^(bits-1) - 1)` spends the whole range on the largest weight. A smaller scale clips
//! that weight and rounds all others more finely; with 4 bits it is usually better. `E` has a kink wherever some weight
//! changes its code and many local minima between the kinks, so the search has two stages:
//!
//! 1. **Candidates.** Scales that map the largest magnitude to `d` steps, for a list of `d` around the largest code. The
//!    list holds the whole numbers, so weights that already lie on a grid of that many steps come back exactly.
//! 2. **Refinement.** For fixed codes `E` is a parabola in `s`; its minimum `s = sum h_i w_i c_i / sum h_i c_i^2` with the centred
//!    codes `c_i = q_i - z` is a new candidate, whose codes give the next one, until nothing improves. Asymmetric groups
//!    also try the zero points beside the best one, and the pair that a straight line `w = s q + b` through the fixed
//!    codes gives, `z = -b / s` rounded to what a zero point can be.
//!
//! A zero point is a whole code where the file has no room for more ([`Zeros::Whole`]), or a sixteenth of one
//! ([`Zeros::Sixteenths`]): with 4 bits the nearest whole code is up to half a step away from the best offset, as far as
//! rounding itself moves a weight. On the 135M model this was developed with, sixteenths take the loss of perplexity from
//! 27 % to 19 %. A weight of exactly 0 then need not come back as 0; whoever prunes first chooses whole codes.
//!
//! Every candidate is rounded to f16 **before** its codes are chosen and its error is taken, so what is minimised is the
//! error of the file, not of a scale the file cannot hold. The first candidate is the textbook scale; a later one replaces
//! it only if it is better, so the result is never worse than the textbook's.
//!
//! Symmetric groups are the case of a fixed `z = 2^(bits-1)`, the middle code ([`Zeros::Middle`]).

use half::f16;

use crate::error::{Error, Result};

/// What a zero point may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// The middle code, 8, 64 or 128: symmetric weights.
    Middle,
    /// Any code.
    Whole,
    /// Sixteenths of a code, from 0 to 15 15/16; 4 bits only.
    Sixteenths,
}

impl Zeros {
    /// Refuses bits that codes do not have, or not with these zero points.
    pub(super) fn check(self, bits: u32) -> Result<()> {
        let (accepted, expected): (&[u32], _) = match self {
            Self::Middle => (&[4, 7, 8], "4, 7 or 8"),
            Self::Whole => (&[4, 8], "4 or 8 with zero points"),
            Self::Sixteenths => (&[4], "4 with zero points in sixteenths"),
        };
        if accepted.contains(&bits) {
            return Ok(());
        }
        Err(Error::argument("bits", expected, bits))
    }
}

/// Steps the largest magnitude is mapped to, tried in this order for 4 bits. Below 7 nothing is clipped: those entries
/// only serve weights that already lie on a coarser grid.
const STEPS_4: &[f32] = &[
    7.0, 4.0, 5.0, 6.0, 6.5, 7.25, 7.5, 7.75, 8.0, 8.25, 8.5, 8.75, 9.0, 9.25, 9.5, 9.75, 10.0, 10.5, 12.0,
    14.0,
];
/// The same for 8 bits, where clipping pays only for groups much longer than a row of registers.
const STEPS_8: &[f32] =
    &[127.0, 127.5, 128.0, 129.0, 130.0, 132.0, 134.0, 136.0, 140.0, 144.0, 150.0, 160.0, 176.0, 192.0];
/// The same for 7 bits.
const STEPS_7: &[f32] = &[63.0, 63.5, 64.0, 64.5, 65.0, 66.0, 67.0, 68.0, 70.0, 72.0, 76.0, 80.0, 88.0, 96.0];
/// The range's length in steps, for asymmetric 4-bit groups.
const SPANS_4: &[f32] = &[
    15.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 13.5, 14.0, 14.5, 15.25, 15.5, 15.75, 16.0, 16.5, 17.0, 17.5,
    18.0, 19.0, 20.0, 23.0, 27.0,
];
/// The same for 8 bits.
const SPANS_8: &[f32] =
    &[255.0, 254.0, 255.5, 256.0, 257.0, 258.0, 260.0, 264.0, 268.0, 272.0, 280.0, 288.0, 304.0, 320.0];

/// The smallest positive f16, 2^-24.
const SMALLEST: f32 = 5.960_464_5e-8;

/// Refinements at most; nearly all groups stop after two or three.
const ROUNDS: usize = 8;

/// The values a group can take: `scale * (code - zero)` for codes `0 ..= top`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    /// Representable in f16.
    pub(super) scale: f32,
    /// In codes, from 0 on; the largest is `top`, or 15/16 more.
    pub(super) zero: f32,
    /// The largest code.
    pub(super) top: f32,
}

impl Grid {
    /// A grid whose scale is the value of f16 nearest to `scale`, or `None` where that is not a usable scale.
    fn new(scale: f32, zero: f32, top: f32) -> Option<Self> {
        if !scale.is_finite() || scale <= 0.0 {
            return None;
        }
        let scale = f16::from_f32(scale.clamp(SMALLEST, f16::MAX.to_f32())).to_f32();
        Some(Self { scale, zero, top })
    }

    /// Divisions are slow, products of the reciprocal are not, and both sides of a tie have the same error.
    /// A subnormal scale's reciprocal is at most 2^24.
    pub(super) fn inverse(&self) -> f32 {
        1.0 / self.scale
    }

    /// The code `q` nearest to `w`, as a float.
    #[inline(always)]
    pub(super) fn code(&self, w: f32, inverse: f32) -> f32 {
        // Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number (half to even) any number up to 2^22,
        // and unlike `round_ties_even` it is two vector instructions on every CPU.
        const MAGIC: f32 = 12_582_912.0;
        let steps = w * inverse + self.zero;
        // `f32::clamp` checks its limits and keeps NaN, which costs as much as all the rest.
        let steps = if steps > 0.0 { steps } else { 0.0 };
        let steps = if steps < self.top { steps } else { self.top };
        (steps + MAGIC) - MAGIC
    }

    /// The centred code `q - z`.
    #[inline]
    fn centred(&self, w: f32, inverse: f32) -> f32 {
        self.code(w, inverse) - self.zero
    }

    pub(super) fn encode(&self, w: &[f32], codes: &mut [u8]) {
        let inverse = if self.scale > 0.0 { self.inverse() } else { 0.0 };
        for (code, &w) in codes.iter_mut().zip(w) {
            *code = self.code(w, inverse) as u8;
        }
    }

    /// `E`: the squared error of the group on this grid.
    fn error(&self, w: &[f32], h: &[f32]) -> f64 {
        let inverse = self.inverse();
        sums(w, h, |w| {
            let e = w - self.scale * self.centred(w, inverse);
            [e * e]
        })[0]
    }

    /// The scale with the least squared error for this grid's codes; not rounded yet.
    fn best_scale(&self, w: &[f32], h: &[f32]) -> f32 {
        let inverse = self.inverse();
        let [wc, cc] = sums(w, h, |w| {
            let c = self.centred(w, inverse);
            [w * c, c * c]
        });
        (wc / cc) as f32 // all codes zero gives NaN, which is no candidate
    }

    /// Scale and zero point of the straight line `w = scale * (c + b)` through this grid's centred codes.
    fn best_line(&self, w: &[f32], h: &[f32]) -> (f32, f32) {
        let inverse = self.inverse();
        let [n, sw, sc, wc, cc] = sums(w, h, |w| {
            let c = self.centred(w, inverse);
            [1.0, w, c, w * c, c * c]
        });
        let scale = (n * wc - sw * sc) / (n * cc - sc * sc);
        let shift = (sw - scale * sc) / (n * scale);
        (scale as f32, (f64::from(self.zero) - shift) as f32)
    }
}

/// Adds `h_i term(w_i)` over the group; without `h`, `term(w_i)`.
#[inline]
fn sums<const N: usize>(w: &[f32], h: &[f32], term: impl Fn(f32) -> [f32; N]) -> [f64; N] {
    if h.is_empty() { add::<N, false>(w, w, term) } else { add::<N, true>(w, h, term) }
}

/// In f32 in eight lanes, which the compiler turns into vector instructions, and f64 every few hundred weights, so that a
/// group as long as a row loses nothing.
#[inline(always)]
fn add<const N: usize, const WEIGHTED: bool>(
    w: &[f32],
    h: &[f32],
    term: impl Fn(f32) -> [f32; N],
) -> [f64; N] {
    const LANES: usize = 8;
    let mut total = [0.0; N];
    for (block, weights) in w.chunks(256).zip(h.chunks(256)) {
        let mut lanes = [[0.0_f32; LANES]; N];
        let (eights, rest) = block.as_chunks::<LANES>();
        let (weight_eights, weight_rest) = weights.as_chunks::<LANES>();
        for (eight, weights) in eights.iter().zip(weight_eights) {
            for lane in 0..LANES {
                let terms = term(eight[lane]);
                for (lanes, term) in lanes.iter_mut().zip(terms) {
                    lanes[lane] += if WEIGHTED { weights[lane] * term } else { term };
                }
            }
        }
        for (lane, (&w, &weight)) in rest.iter().zip(weight_rest).enumerate() {
            for (lanes, term) in lanes.iter_mut().zip(term(w)) {
                lanes[lane] += if WEIGHTED { weight * term } else { term };
            }
        }
        for (total, lanes) in total.iter_mut().zip(lanes) {
            *total += f64::from(lanes.iter().sum::<f32>());
        }
    }
    total
}

/// The best grid found for one group. `h` holds the importance of each weight's input, none of it negative; or nothing, when
/// all weigh the same.
pub(super) fn search(w: &[f32], h: &[f32], bits: u32, zeros: Zeros) -> Grid {
    let top = (1_u32 << bits) as f32 - 1.0;
    let middle = (1_u32 << (bits - 1)) as f32;
    // NaN cannot occur here; zero is always inside the range, as it must be (nearly) exact.
    let low = w.iter().copied().fold(0.0, f32::min);
    let high = w.iter().copied().fold(0.0, f32::max);
    let grid = Grid { scale: 0.0, zero: middle, top };
    let mut best = Best { w, h, zeros, grid, error: f64::INFINITY };
    if high.max(-low) <= SMALLEST / 2.0 {
        return best.grid; // nearer to zero than to any other value
    }
    if zeros == Zeros::Middle {
        let reach = high.max(-low);
        let candidates = match bits {
            4 => STEPS_4,
            7 => STEPS_7,
            _ => STEPS_8,
        };
        for steps in candidates {
            best.offer(reach / steps, middle);
        }
        for _ in 0..ROUNDS {
            if !best.offer(best.grid.best_scale(w, h), middle) {
                break;
            }
        }
        return best.grid;
    }
    // With sixteenths the range need not reach to zero. The textbook's grid is a candidate all the same: it serves groups
    // of one value, which have no range.
    let ends = if zeros == Zeros::Sixteenths {
        let scale = (high * 0.5 - low * 0.5) / top * 2.0;
        best.offer(scale, (-low / scale).round());
        extremes(w)
    } else {
        (low, high)
    };
    for &steps in if bits == 4 { SPANS_4 } else { SPANS_8 } {
        // Halves first: the difference of two huge numbers of opposite sign overflows.
        let scale = (ends.1 * 0.5 - ends.0 * 0.5) / steps * 2.0;
        let exact = -ends.0 / scale;
        if zeros == Zeros::Sixteenths {
            // A grid longer than the range lies with its first code on the lowest weight (or with a later one, where zero is
            // below them all), so that weights on a grid come back exactly; a shorter one clips both ends alike.
            best.offer(scale, exact - exact.floor().min(0.0) - 0.5 * (steps - top).max(0.0));
            continue;
        }
        best.offer(scale, exact);
        if exact.fract() != 0.0 {
            best.offer(scale, if exact.fract() < 0.5 { exact.ceil() } else { exact.floor() });
        }
    }
    let beside = if zeros == Zeros::Sixteenths { 0.125 } else { 1.0 };
    for _ in 0..ROUNDS {
        let Grid { scale, zero, .. } = best.grid;
        let (line_scale, line_zero) = best.grid.best_line(w, h);
        let mut better = best.offer(best.grid.best_scale(w, h), zero);
        better |= best.offer(line_scale, line_zero);
        better |= best.offer(scale, zero - beside);
        better |= best.offer(scale, zero + beside);
        if !better {
            break;
        }
    }
    best.grid
}

/// The least and the largest weight.
fn extremes(w: &[f32]) -> (f32, f32) {
    w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &w| (low.min(w), high.max(w)))
}

/// The search's state.
struct Best<'a> {
    w: &'a [f32],
    h: &'a [f32],
    zeros: Zeros,
    grid: Grid,
    error: f64,
}

impl Best<'_> {
    /// Takes the candidate, its zero point rounded to what one can be, if it is better, or the first one; says whether it did.
    fn offer(&mut self, scale: f32, zero: f32) -> bool {
        let zero = match self.zeros {
            Zeros::Sixteenths => ((zero * 16.0).round() / 16.0).clamp(0.0, self.grid.top + 0.9375),
            Zeros::Whole | Zeros::Middle => zero.round().clamp(0.0, self.grid.top),
        };
        let Some(candidate) = Grid::new(scale, zero, self.grid.top) else {
            return false;
        };
        let error = candidate.error(self.w, self.h);
        // Squares of weights beyond 1e19 overflow: then every error is infinite and the textbook scale stands.
        if error < self.error || self.grid.scale == 0.0 {
            self.grid = candidate;
            self.error = error;
            return true;
        }
        false
    }
}
