//! Round to nearest, with the scale of every group searched for the least squared error.
//!
//! A group of weights `w_1 .. w_n` of one row shares a scale `s` and a zero point `z`. A weight is stored as the unsigned
//! code `q_i` in `0 ..= 2^bits - 1` and read back as `s (q_i - z)`. For given `s` and `z` the best code is the nearest one,
//!
//! ```text
//! q_i = clamp(round(w_i / s + z), 0, 2^bits - 1)
//! ```
//!
//! so what is left is to choose `s` (and, for asymmetric groups, `z`) to minimise `sum_i (w_i - s (q_i - z))^2`, which is the
//! work of [`super::grid`].

use rayon::prelude::*;

use super::grid::{Zeros, search};
use crate::error::{Error, Result};
use crate::threads::{MAX_THREADS, Pool};

/// What to round to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rtn {
    /// Bits of a code: 4 or 8, or 7 with [`Zeros::Middle`].
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
    /// One zero point a group, in codes: whole or sixteenths; `None` for symmetric weights, where it is the middle code.
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
    kind.check(bits)?;
    let symmetric = kind == Zeros::Middle;
    if rows.checked_mul(cols) != Some(weights.len()) {
        return Err(Error::argument("weights", format!("{rows} x {cols} elements"), weights.len()));
    }
    let crew = crew(settings.threads)?;
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
            let grid = search(w, &[], bits, kind);
            grid.encode(w, codes);
            *scale = grid.scale;
            *zero = grid.zero;
        }
    };
    // Rows are independent, so who computes which cannot be seen in the result.
    crew.install(|| {
        finite(weights, cols)?;
        let inputs = weights.par_chunks(cols).zip(codes.par_chunks_mut(cols));
        let outputs = scales.par_chunks_mut(groups).zip(zeros.par_chunks_mut(groups));
        inputs.zip(outputs).for_each(|((w, codes), (scales, zeros))| round_row(w, codes, scales, zeros));
        Ok(())
    })?;
    Ok(IntWeights { codes, scales, zeros: (!symmetric).then_some(zeros), groups })
}

/// Threads for one call: a global pool would be lost in a forked child.
pub(super) fn crew(threads: Option<usize>) -> Result<rayon::ThreadPool> {
    let threads = match threads {
        Some(threads) if (1..=MAX_THREADS).contains(&threads) => threads,
        Some(threads) => return Err(Error::argument("threads", format!("1 to {MAX_THREADS}"), threads)),
        None => Pool::default_threads()?,
    };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| Error::argument("threads", "threads the system can start", error))
}

/// Refuses weights that are not finite, naming the first.
pub(super) fn finite(weights: &[f32], cols: usize) -> Result<()> {
    let broken = weights.par_chunks(cols).position_first(|row| row.iter().any(|w| !w.is_finite()));
    let Some(row) = broken else { return Ok(()) };
    let at = weights[row * cols..].iter().position(|w| !w.is_finite()).unwrap_or(0);
    let found = format!("{} at row {row}, column {at}", weights[row * cols + at]);
    Err(Error::argument("weights", "finite numbers", found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;
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
        for bits in [4, 7, 8] {
            for zeros in ALL {
                if zeros.check(bits).is_err() {
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
