//! Round to nearest, with the scale of every group searched for the least squared error.
//!
//! A group of weights `w_1 .. w_n` of one row shares a scale `s` and a zero point `z`. A weight is stored as the unsigned
//! code `q_i` in `0 ..= 2^bits - 1` and read back as `s (q_i - z)`. For given `s` and `z` the best code is the nearest one,
//!
//! ```text
//! q_i = clamp(round(w_i / s + z), 0, 2^bits - 1)
//! ```
//!
//! so what is left is to choose `s` (and, for asymmetric groups, `z`) to minimise
//!
//! ```text
//! E(s, z) = sum_i (w_i - s (q_i - z))^2
//! ```
//!
//! The textbook choice `s = max|w| / (2^(bits-1) - 1)` spends the whole range on the largest weight. A smaller scale clips
//! that weight and rounds all others more finely; with 4 bits it is usually better. `E` has a kink wherever some weight
//! changes its code and many local minima between the kinks, so the search has two stages:
//!
//! 1. **Candidates.** Scales that map the largest magnitude to `d` steps, for a list of `d` around the largest code. The
//!    list holds the whole numbers, so weights that already lie on a grid of that many steps come back exactly.
//! 2. **Refinement.** For fixed codes `E` is a parabola in `s`; its minimum `s = sum w_i c_i / sum c_i^2` with the centred
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
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::threads::{MAX_THREADS, Pool};

/// What a zero point may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// The middle code, 8 or 128: symmetric weights.
    Middle,
    /// Any code.
    Whole,
    /// Sixteenths of a code, from 0 to 15 15/16; 4 bits only.
    Sixteenths,
}

/// What to round to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rtn {
    /// Bits of a code: 4 or 8.
    pub bits: u32,
    /// Weights that share a scale; 0, or anything from the row's length on, means the whole row. Where it does not divide
    /// the row the last group is shorter.
    pub group: usize,
    /// What zero points may be.
    pub zeros: Zeros,
    /// Threads to use; `None` means [`Pool::default_threads`]. The result does not depend on it.
    pub threads: Option<usize>,
}

/// A matrix `[rows, cols]` as integers: `w[r, c] = scales[r, g] * (codes[r, c] - zeros[r, g])`, `g = c / group`.
#[derive(Clone, Debug, PartialEq)]
pub struct IntWeights {
    /// Unsigned codes, one byte each, row-major.
    pub codes: Vec<u8>,
    /// One scale a group, row-major `[rows, groups]`; finite, not negative, exactly representable in f16.
    pub scales: Vec<f32>,
    /// One zero point a group, in codes: whole or sixteenths; `None` for symmetric weights, where it is 8 or 128.
    pub zeros: Option<Vec<f32>>,
    /// Groups in a row.
    pub groups: usize,
}

/// Rounds `weights`, a row-major matrix `[rows, cols]`.
///
/// # Errors
/// [`Error::Argument`] for shapes and settings out of range, and for a weight that is not finite, with its row and column.
pub fn rtn(weights: &[f32], rows: usize, cols: usize, settings: &Rtn) -> Result<IntWeights> {
    let Rtn { bits, zeros: kind, .. } = *settings;
    if bits != 4 && (bits != 8 || kind == Zeros::Sixteenths) {
        let expected = if kind == Zeros::Sixteenths { "4 with zero points in sixteenths" } else { "4 or 8" };
        return Err(Error::argument("bits", expected, bits));
    }
    let symmetric = kind == Zeros::Middle;
    if rows.checked_mul(cols) != Some(weights.len()) {
        return Err(Error::argument("weights", format!("{rows} x {cols} elements"), weights.len()));
    }
    let threads = match settings.threads {
        Some(threads) if (1..=MAX_THREADS).contains(&threads) => threads,
        Some(threads) => return Err(Error::argument("threads", format!("1 to {MAX_THREADS}"), threads)),
        None => Pool::default_threads()?,
    };
    let group = if settings.group == 0 { cols } else { settings.group.min(cols) };
    let groups = if group == 0 { 0 } else { cols.div_ceil(group) };
    let mut codes = vec![0; rows * cols];
    let mut scales = vec![0.0; rows * groups];
    let mut zeros = vec![0.0; rows * groups];
    if codes.is_empty() {
        return Ok(IntWeights { codes, scales, zeros: (!symmetric).then_some(zeros), groups });
    }
    let round_row = |w: &[f32], codes: &mut [u8], scales: &mut [f32], zeros: &mut [f32]| {
        let parts = w.chunks(group).zip(codes.chunks_mut(group)).zip(scales.iter_mut().zip(zeros.iter_mut()));
        for ((w, codes), (scale, zero)) in parts {
            let grid = search(w, bits, kind);
            grid.encode(w, codes);
            *scale = grid.scale;
            *zero = grid.zero;
        }
    };
    // Rows are independent, so who computes which cannot be seen in the result. The pool lives for this call only: a global
    // one would be lost in a forked child.
    let crew = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| Error::argument("threads", "threads the system can start", error))?;
    crew.install(|| {
        let broken = weights.par_chunks(cols).position_first(|row| row.iter().any(|w| !w.is_finite()));
        if let Some(row) = broken {
            let at = weights[row * cols..].iter().position(|w| !w.is_finite()).unwrap_or(0);
            let found = format!("{} at row {row}, column {at}", weights[row * cols + at]);
            return Err(Error::argument("weights", "finite numbers", found));
        }
        let inputs = weights.par_chunks(cols).zip(codes.par_chunks_mut(cols));
        let outputs = scales.par_chunks_mut(groups).zip(zeros.par_chunks_mut(groups));
        inputs.zip(outputs).for_each(|((w, codes), (scales, zeros))| round_row(w, codes, scales, zeros));
        Ok(())
    })?;
    Ok(IntWeights { codes, scales, zeros: (!symmetric).then_some(zeros), groups })
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
struct Grid {
    /// Representable in f16.
    scale: f32,
    /// In codes, from 0 on; the largest is `top`, or 15/16 more.
    zero: f32,
    /// The largest code.
    top: f32,
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
    fn inverse(&self) -> f32 {
        1.0 / self.scale
    }

    /// The code `q` nearest to `w`, as a float.
    #[inline(always)]
    fn code(&self, w: f32, inverse: f32) -> f32 {
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

    fn encode(&self, w: &[f32], codes: &mut [u8]) {
        let inverse = if self.scale > 0.0 { self.inverse() } else { 0.0 };
        for (code, &w) in codes.iter_mut().zip(w) {
            *code = self.code(w, inverse) as u8;
        }
    }

    /// `E`: the squared error of the group on this grid.
    fn error(&self, w: &[f32]) -> f64 {
        let inverse = self.inverse();
        sums(w, |w| {
            let e = w - self.scale * self.centred(w, inverse);
            [e * e]
        })[0]
    }

    /// The scale with the least squared error for this grid's codes; not rounded yet.
    fn best_scale(&self, w: &[f32]) -> f32 {
        let inverse = self.inverse();
        let [wc, cc] = sums(w, |w| {
            let c = self.centred(w, inverse);
            [w * c, c * c]
        });
        (wc / cc) as f32 // all codes zero gives NaN, which is no candidate
    }

    /// Scale and zero point of the straight line `w = scale * (c + b)` through this grid's centred codes.
    fn best_line(&self, w: &[f32]) -> (f32, f32) {
        let inverse = self.inverse();
        let n = w.len() as f64;
        let [sw, sc, wc, cc] = sums(w, |w| {
            let c = self.centred(w, inverse);
            [w, c, w * c, c * c]
        });
        let scale = (n * wc - sw * sc) / (n * cc - sc * sc);
        let shift = (sw - scale * sc) / (n * scale);
        (scale as f32, (f64::from(self.zero) - shift) as f32)
    }
}

/// Adds `term(w_i)` over the group: f32 in eight lanes, which the compiler turns into vector instructions, f64 every few
/// hundred weights, so that a group as long as a row loses nothing.
#[inline(always)]
fn sums<const N: usize>(w: &[f32], term: impl Fn(f32) -> [f32; N]) -> [f64; N] {
    const LANES: usize = 8;
    let mut total = [0.0; N];
    for block in w.chunks(256) {
        let mut lanes = [[0.0_f32; LANES]; N];
        let (eights, rest) = block.as_chunks::<LANES>();
        for eight in eights {
            for lane in 0..LANES {
                let terms = term(eight[lane]);
                for (lanes, term) in lanes.iter_mut().zip(terms) {
                    lanes[lane] += term;
                }
            }
        }
        for (lane, &w) in rest.iter().enumerate() {
            for (lanes, term) in lanes.iter_mut().zip(term(w)) {
                lanes[lane] += term;
            }
        }
        for (total, lanes) in total.iter_mut().zip(lanes) {
            *total += f64::from(lanes.iter().sum::<f32>());
        }
    }
    total
}

/// The best grid found for one group.
fn search(w: &[f32], bits: u32, zeros: Zeros) -> Grid {
    let top = (1_u32 << bits) as f32 - 1.0;
    let middle = (1_u32 << (bits - 1)) as f32;
    // NaN cannot occur here; zero is always inside the range, as it must be (nearly) exact.
    let low = w.iter().copied().fold(0.0, f32::min);
    let high = w.iter().copied().fold(0.0, f32::max);
    let grid = Grid { scale: 0.0, zero: middle, top };
    let mut best = Best { w, zeros, grid, error: f64::INFINITY };
    if high.max(-low) <= SMALLEST / 2.0 {
        return best.grid; // nearer to zero than to any other value
    }
    if zeros == Zeros::Middle {
        let reach = high.max(-low);
        for steps in if bits == 4 { STEPS_4 } else { STEPS_8 } {
            best.offer(reach / steps, middle);
        }
        for _ in 0..ROUNDS {
            if !best.offer(best.grid.best_scale(w), middle) {
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
        let (line_scale, line_zero) = best.grid.best_line(w);
        let mut better = best.offer(best.grid.best_scale(w), zero);
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
        let error = candidate.error(self.w);
        // Squares of weights beyond 1e19 overflow: then every error is infinite and the textbook scale stands.
        if error < self.error || self.grid.scale == 0.0 {
            self.grid = candidate;
            self.error = error;
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const W4: Rtn = Rtn { bits: 4, group: 0, zeros: Zeros::Middle, threads: Some(1) };
    const ALL: [Zeros; 3] = [Zeros::Middle, Zeros::Whole, Zeros::Sixteenths];

    fn decode(result: &IntWeights, rows: usize, cols: usize, settings: &Rtn) -> Vec<f32> {
        let group = if settings.group == 0 { cols } else { settings.group.min(cols) };
        let middle = (1 << (settings.bits - 1)) as f32;
        (0..rows * cols)
            .map(|i| {
                let at = i / cols * result.groups + i % cols / group;
                let zero = result.zeros.as_ref().map_or(middle, |zeros| zeros[at]);
                result.scales[at] * (f32::from(result.codes[i]) - zero)
            })
            .collect()
    }

    fn one(w: &[f32], settings: Rtn) -> (IntWeights, Vec<f32>) {
        let result = rtn(w, 1, w.len(), &settings).expect("good weights");
        let back = decode(&result, 1, w.len(), &settings);
        (result, back)
    }

    fn squared(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    /// The textbook: the largest magnitude (or the range) spread over all codes, the scale in f16.
    fn textbook(w: &[f32], bits: u32, symmetric: bool) -> Vec<f32> {
        let top = (1_u32 << bits) as f32 - 1.0;
        let low = w.iter().copied().fold(0.0, f32::min);
        let high = w.iter().copied().fold(0.0, f32::max);
        let middle = (1_u32 << (bits - 1)) as f32;
        let range = if symmetric { high.max(-low) / (middle - 1.0) } else { (high - low) / top };
        let scale = f16::from_f32(range).to_f32();
        if scale == 0.0 {
            return vec![0.0; w.len()];
        }
        let zero = if symmetric { middle } else { (-low / range).round() };
        w.iter().map(|w| scale * (((w / scale).round_ties_even() + zero).clamp(0.0, top) - zero)).collect()
    }

    #[test]
    fn a_small_case_worked_by_hand() {
        // Codes of 0.7 at s = 0.1 are 7 1 -2 and nothing is lost but 0.04 of the second weight: E = 0.0016. With these
        // codes the parabola's minimum is (7 * 0.7 + 1 * 0.14 + 2 * 0.2) / (49 + 1 + 4) = 5.44 / 54 = 0.100741, where
        // E = 0.5496 - 5.44^2 / 54 = 0.001570; f16 has 0.10076904 beside it.
        let (result, back) = one(&[0.7, 0.14, -0.2], W4);
        assert_eq!(result.codes, [15, 9, 6]);
        assert_eq!(result.scales, [f16::from_f32(5.44 / 54.0).to_f32()]);
        assert!((squared(&[0.7, 0.14, -0.2], &back) - 0.001_570).abs() < 1e-6);
        assert!(result.zeros.is_none());
    }

    #[test]
    fn clipping_one_outlier_pays_when_it_makes_the_rest_finer() {
        let mut w = vec![0.04; 127];
        w.push(0.7); // at s = 0.1 every 0.04 becomes 0
        let (result, back) = one(&w, W4);
        assert!(squared(&w, &back) < 0.7 * squared(&w, &textbook(&w, 4, true)));
        assert!(result.codes[127] == 15 && back[127] < 0.7 && back[0] > 0.0);
    }

    #[test]
    fn weights_on_a_grid_of_sixteen_steps_come_back_exactly() {
        for zeros in ALL {
            for scale in [0.0123_f32, 3.0, 6.5e-5, 1e-6] {
                let scale = f16::from_f32(scale).to_f32();
                for seed in 0..200_u32 {
                    let zero = match zeros {
                        Zeros::Middle => 8.0,
                        Zeros::Whole => (seed % 16) as f32,
                        Zeros::Sixteenths => seed as f32 / 16.0,
                    };
                    let mut state = seed;
                    let w: Vec<f32> = (0..32)
                        .map(|_| {
                            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                            scale * (((state >> 16) % 16) as f32 - zero)
                        })
                        .collect();
                    let (_, back) = one(&w, Rtn { zeros, ..W4 });
                    assert_eq!(w, back, "scale {scale}, seed {seed}, {zeros:?}");
                }
            }
        }
    }

    #[test]
    fn eight_bit_files_are_rounded_again_without_loss() {
        // Blocks of 32 whose largest code is 127, as other tools write them.
        let scale = f16::from_f32(0.0031).to_f32();
        let w: Vec<f32> =
            (0..32).map(|i| scale * (if i == 5 { -127.0 } else { (i * 7 - 100) as f32 })).collect();
        let (_, back) = one(&w, Rtn { bits: 8, ..W4 });
        assert_eq!(w, back);
    }

    #[test]
    fn zeros_tiny_and_huge_weights_are_safe() {
        for bits in [4, 8] {
            for zeros in ALL {
                if bits == 8 && zeros == Zeros::Sixteenths {
                    continue;
                }
                let settings = Rtn { bits, zeros, ..W4 };
                let (result, back) = one(&[0.0; 40], settings);
                assert_eq!((result.scales[0], back), (0.0, vec![0.0; 40]));
                // Nothing below half the smallest f16 can be told from zero.
                let (result, back) = one(&[1e-30, -2e-38, 1e-45], settings);
                assert_eq!((result.scales[0], back), (0.0, vec![0.0; 3]));
                // A subnormal scale has few bits; the codes make up for what they can.
                let tiny = [1e-6, -2e-6, 3e-6, 0.0];
                let (_, back) = one(&tiny, settings);
                assert!(tiny.iter().zip(&back).all(|(w, b)| (w - b).abs() <= 3e-7), "{back:?}");
                let (result, back) = one(&[3e38, -3e38, 1.0], settings);
                assert!(result.scales[0] == 65504.0 && back.iter().all(|b| b.is_finite()));
                let (_, back) = one(&[-5.0, -5.0], settings);
                assert!(back.iter().all(|b| (b + 5.0).abs() < 0.02), "{back:?}");
            }
        }
    }

    #[test]
    fn a_weight_that_is_not_finite_is_named() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut w = vec![1.0; 12];
            w[7] = bad;
            w[9] = bad;
            let message = rtn(&w, 3, 4, &W4).expect_err("not finite").to_string();
            assert!(message.contains("at row 1, column 3"), "{message}");
        }
    }

    #[test]
    fn shapes_and_settings_out_of_range_are_errors() {
        let w = [1.0; 6];
        assert!(rtn(&w, 2, 2, &W4).is_err());
        assert!(rtn(&w, usize::MAX, 2, &W4).is_err());
        assert!(rtn(&w, 2, 3, &Rtn { bits: 3, ..W4 }).is_err());
        assert!(rtn(&w, 2, 3, &Rtn { bits: 8, zeros: Zeros::Sixteenths, ..W4 }).is_err());
        assert!(rtn(&w, 2, 3, &Rtn { threads: Some(0), ..W4 }).is_err());
        for (rows, cols) in [(0, 5), (5, 0), (0, 0)] {
            let result = rtn(&[], rows, cols, &Rtn { zeros: Zeros::Whole, ..W4 }).expect("empty");
            assert!(result.codes.is_empty() && result.scales.len() == rows * result.groups);
        }
    }

    #[test]
    fn threads_do_not_show_and_the_last_group_may_be_short() {
        let (rows, cols) = (37, 75);
        let w: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 500.0 - 1.0).collect();
        for zeros in ALL {
            let settings = Rtn { group: 32, zeros, ..W4 };
            let single = rtn(&w, rows, cols, &settings).expect("good weights");
            assert_eq!(single.groups, 3);
            for threads in [2, 5] {
                let many =
                    rtn(&w, rows, cols, &Rtn { threads: Some(threads), ..settings }).expect("good weights");
                assert_eq!(single, many);
            }
            // The last group of a row is what the same eleven weights give alone.
            let (alone, _) = one(&w[64..75], Rtn { group: 0, ..settings });
            assert_eq!(single.codes[64..75], alone.codes);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn never_worse_than_the_textbook_and_never_off_the_nearest_code(
            w in proptest::collection::vec(prop_oneof![-1.0_f32..1.0, -1e-3_f32..1e-3, -50.0_f32..80.0, Just(0.0)], 1..200),
            (bits, zeros) in prop_oneof![
                Just((4_u32, Zeros::Middle)), Just((4, Zeros::Whole)), Just((4, Zeros::Sixteenths)),
                Just((8, Zeros::Middle)), Just((8, Zeros::Whole)),
            ],
        ) {
            let (result, back) = one(&w, Rtn { bits, zeros, ..W4 });
            let symmetric = zeros == Zeros::Middle;
            let (found, textbook) = (squared(&w, &back), squared(&w, &textbook(&w, bits, symmetric)));
            prop_assert!(found <= textbook * (1.0 + 1e-5) + 1e-12, "{found} against {textbook}");
            let scale = result.scales[0];
            prop_assert_eq!(f16::from_f32(scale).to_f32(), scale);
            let top = (1_u32 << bits) as f32 - 1.0;
            let zero = result.zeros.map_or((1 << (bits - 1)) as f32, |zeros| zeros[0]);
            prop_assert!((zero * 16.0).fract() == 0.0 && (zeros == Zeros::Sixteenths || zero.fract() == 0.0));
            for (w, b) in w.iter().zip(&back) {
                let inside = (scale * -zero..=scale * (top - zero)).contains(w);
                prop_assert!(!inside || (w - b).abs() <= scale * 0.5001, "{w} became {b} with scale {scale}");
            }
        }
    }
}
