//! One score of several heads' (Zero-TPrune, arXiv 2305.17328).
//!
//! Some heads tell tokens apart and some do not: one whose scores hardly differ says nothing, and one that puts all on a few
//! tokens drowns the others. The *variance-based head filter* keeps the heads whose variance is in a range. Of the kept heads
//! the root mean square is taken, so that a token that one head cannot do without stays, though the others ignore it
//! (*emphasising informative regions*).

use std::ops::RangeInclusive;

use crate::error::{Error, Result};

/// The range of variances in the paper.
pub const VARIANCES: RangeInclusive<f32> = 0.01..=0.7;

/// Which heads of `scores [heads, n]` have a variance in `range`; all of them where none has.
///
/// The paper does not say how scores are scaled before the variance is taken, and with a sum of 1 no head of 197 tokens
/// reaches its range. Here each head's scores are scaled to a mean of 1: equal scores then have variance 0, and all on one
/// token `n - 1`.
pub fn informative(scores: &[f32], heads: usize, range: RangeInclusive<f32>) -> Result<Vec<bool>> {
    let n = width(scores, heads)?;
    let mut kept: Vec<bool> =
        scores.chunks_exact(n.max(1)).map(|scores| range.contains(&variance(scores))).collect();
    kept.resize(heads, false); // heads without tokens
    if !kept.contains(&true) {
        kept.fill(true);
    }
    Ok(kept)
}

/// The variance of scores scaled to a mean of 1; NaN where they have no mean.
fn variance(scores: &[f32]) -> f32 {
    let n = scores.len() as f64;
    let mean = scores.iter().map(|&s| f64::from(s)).sum::<f64>() / n;
    let square = scores.iter().map(|&s| (f64::from(s) / mean - 1.0).powi(2)).sum::<f64>();
    (square / n) as f32
}

/// The root mean square of the kept heads' scores, for each token.
pub fn emphasise(scores: &[f32], heads: usize, kept: &[bool]) -> Result<Vec<f32>> {
    let n = width(scores, heads)?;
    if kept.len() != heads {
        return Err(Error::argument("kept", format!("{heads} flags"), kept.len()));
    }
    let count = kept.iter().filter(|kept| **kept).count();
    if count == 0 {
        return Err(Error::argument("kept", "at least one head", "none"));
    }
    let mut all = vec![0.0; n];
    if n > 0 {
        for (scores, _) in scores.chunks_exact(n).zip(kept).filter(|(_, kept)| **kept) {
            all.iter_mut().zip(scores).for_each(|(sum, score)| *sum += score * score);
        }
    }
    for sum in &mut all {
        *sum = (*sum / count as f32).sqrt();
    }
    Ok(all)
}

fn width(scores: &[f32], heads: usize) -> Result<usize> {
    if heads == 0 || !scores.len().is_multiple_of(heads) {
        return Err(Error::argument("scores", format!("a row for each of {heads} heads"), scores.len()));
    }
    Ok(scores.len() / heads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_and_lonely_heads_are_left_out() {
        let mut scores = vec![0.25; 4]; // variance 0
        scores.extend([1.0, 0.0, 0.0, 0.0]); // variance 3
        scores.extend([0.4, 0.3, 0.2, 0.1]); // variance 0.2
        assert_eq!(informative(&scores, 3, VARIANCES).expect("good"), [false, false, true]);
        // The scale does not matter.
        let large: Vec<f32> = scores.iter().map(|s| s * 100.0).collect();
        assert_eq!(informative(&large, 3, VARIANCES).expect("good"), [false, false, true]);
        assert_eq!(informative(&scores[..8], 2, VARIANCES).expect("good"), [true, true]);
        assert_eq!(informative(&[0.0; 4], 2, VARIANCES).expect("no mean"), [true, true]);
        assert_eq!(informative(&[], 2, VARIANCES).expect("no tokens"), [true, true]);
        assert!(informative(&scores, 5, VARIANCES).is_err() && informative(&scores, 0, VARIANCES).is_err());
    }

    #[test]
    fn one_head_is_enough_to_matter() {
        let scores = [0.0, 0.6, 0.4, 0.8, 0.1, 0.1];
        let all = emphasise(&scores, 2, &[true, true]).expect("good");
        let by_hand = [0.32_f32.sqrt(), (0.37_f32 / 2.0).sqrt(), (0.17_f32 / 2.0).sqrt()];
        assert!(all.iter().zip(by_hand).all(|(a, b)| (a - b).abs() < 1e-6), "{all:?}");
        let one = emphasise(&scores, 2, &[false, true]).expect("good");
        assert!(one.iter().zip(&scores[3..]).all(|(a, b)| (a - b).abs() < 1e-7), "{one:?}");
        assert!(emphasise(&scores, 2, &[false, false]).is_err());
        assert!(emphasise(&scores, 2, &[true]).is_err());
    }
}
