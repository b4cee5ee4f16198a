//! Fewer tokens: which of a prompt's tokens the deeper layers do without.
//!
//! A method is a choice of small parts, each a pure function: a [`Criterion`] scores the tokens at a layer, [`budget`] says
//! how many stay, [`select`] picks them, and [`gather`] brings their rows together. A [`Policy`] names the parts; the
//! decoder puts them to work between attention and feed-forward of the layers it names (`model/reduce.rs`).
//!
//! What is left out is left out of the prompt's computation and of the deeper layers' keys and values. Tokens computed later
//! are never left out. What it costs is to be measured on tokens behind the prompt, never on the tokens that stayed.

#![forbid(unsafe_code)]

pub mod budget;
pub mod criterion;
pub mod patches;
mod policy;
pub mod select;

pub use criterion::Criterion;
pub use patches::PatchPolicy;
pub use policy::{Action, Policy, Positions};

/// Brings the rows `keep`, ascending, of `x` (rows of `width`) together at its beginning.
///
/// # Panics
/// When there is no such row.
pub fn gather<T: Copy>(x: &mut [T], width: usize, keep: &[usize]) {
    for (to, &from) in keep.iter().enumerate() {
        if to != from {
            x.copy_within(from * width..(from + 1) * width, to * width);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_move_up() {
        let mut x = [0, 1, 10, 11, 20, 21, 30, 31];
        gather(&mut x, 2, &[0, 2, 3]);
        assert_eq!(x[..6], [0, 1, 20, 21, 30, 31]);
        gather(&mut x, 2, &[]);
        assert_eq!(x[..2], [0, 1]);
    }
}
