//! Which weights of a matrix stay: the largest scores of a row, of the whole, or of every few neighbours.
//!
//! Always by count, never by a threshold, so that equal scores cannot take out more than was asked for: of equal ones those
//! that stand first go first.

use rayon::prelude::*;

use super::rtn::{crew, finite};
use crate::error::{Error, Result};

/// Among which weights the smallest scores are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Among {
    /// All weights of the matrix together; that many go.
    All(usize),
    /// Those of each row; that many go of each.
    Row(usize),
    /// Every so many neighbours of a row; that many go of each such group.
    Neighbours {
        /// How many go.
        drop: usize,
        /// Of how many.
        of: usize,
    },
}

/// Marks with 1 what stays of a matrix with these scores, row-major `[rows, cols]`, and with 0 what goes.
///
/// # Errors
/// [`Error::Argument`] for shapes and counts out of range, and for scores that are not finite.
pub fn select(
    scores: &[f32],
    rows: usize,
    cols: usize,
    among: Among,
    threads: Option<usize>,
) -> Result<Vec<u8>> {
    if rows.checked_mul(cols) != Some(scores.len()) {
        return Err(Error::argument("scores", format!("{rows} x {cols} elements"), scores.len()));
    }
    let (drop, of) = match among {
        Among::All(drop) => (drop, scores.len()),
        Among::Row(drop) => (drop, cols),
        Among::Neighbours { drop, of } => (drop, of),
    };
    if drop > of {
        return Err(Error::argument("drop", format!("at most {of}"), drop));
    }
    if let Among::Neighbours { of, .. } = among
        && (of == 0 || !cols.is_multiple_of(of))
    {
        return Err(Error::argument("of", format!("a divisor of {cols} columns"), of));
    }
    let mut keep = vec![1; scores.len()];
    if scores.is_empty() || drop == 0 {
        return Ok(keep);
    }
    crew(threads)?.install(|| {
        finite(scores, cols)?;
        keep.par_chunks_mut(of).zip(scores.par_chunks(of)).for_each(|(keep, scores)| {
            smallest(scores, drop, |at| keep[at] = 0);
        });
        Ok(keep)
    })
}

/// Calls back with the places of the `count` smallest scores, in any order; of equal ones the first.
pub(super) fn smallest(scores: &[f32], count: usize, mut found: impl FnMut(usize)) {
    let key = |&at: &u32| (order(scores[at as usize]), at);
    let mut places: Vec<u32> = (0..scores.len() as u32).collect();
    if count == 0 {
        return;
    }
    if count < places.len() {
        places.select_nth_unstable_by_key(count - 1, key);
    }
    for &at in &places[..count] {
        found(at as usize);
    }
}

/// Integers that compare as the numbers do; zeros of both signs are one.
fn order(value: f32) -> i32 {
    let bits = (value + 0.0).to_bits() as i32;
    bits ^ ((bits >> 31) & 0x7fff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(scores: &[f32], rows: usize, among: Among) -> Vec<u8> {
        select(scores, rows, scores.len() / rows, among, Some(2)).expect("good scores")
    }

    #[test]
    fn the_smallest_go() {
        let scores = [3.0, -1.0, 2.0, 0.5, 9.0, 8.0, 7.0, 6.0];
        assert_eq!(kept(&scores, 2, Among::All(3)), [1, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(kept(&scores, 2, Among::Row(1)), [1, 0, 1, 1, 1, 1, 1, 0]);
        assert_eq!(kept(&scores, 2, Among::Neighbours { drop: 1, of: 2 }), [1, 0, 1, 0, 1, 0, 1, 0]);
        assert_eq!(kept(&scores, 1, Among::All(8)), [0; 8]);
        assert_eq!(kept(&scores, 1, Among::All(0)), [1; 8]);
    }

    #[test]
    fn equal_scores_go_by_their_place_and_never_too_many() {
        assert_eq!(kept(&[1.0; 6], 1, Among::All(2)), [0, 0, 1, 1, 1, 1]);
        assert_eq!(kept(&[0.0, -0.0, 0.0, -0.0], 1, Among::Row(2)), [0, 0, 1, 1]);
    }

    #[test]
    fn what_is_out_of_range_is_an_error() {
        let scores = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let of = |rows, cols, among| select(&scores, rows, cols, among, Some(1)).is_err();
        assert!(of(2, 2, Among::Row(1)));
        assert!(of(2, 3, Among::Row(4)));
        assert!(of(2, 3, Among::All(7)));
        assert!(of(2, 3, Among::Neighbours { drop: 1, of: 2 }));
        assert!(of(2, 3, Among::Neighbours { drop: 1, of: 0 }));
        assert!(of(2, 3, Among::Neighbours { drop: 4, of: 3 }));
        let bad = [1.0, f32::NAN];
        assert!(select(&bad, 1, 2, Among::Row(1), Some(1)).is_err());
        assert!(select(&[], 0, 4, Among::Row(1), Some(1)).expect("nothing").is_empty());
    }
}
