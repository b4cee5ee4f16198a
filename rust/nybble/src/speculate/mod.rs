//! Lossless speculation: several tokens a pass, the same tokens as without.
//!
//! Drafters guess what follows, the model computes all guesses in one pass ([`crate::model::Session::forward_tree`]), and those
//! that are what it says anyway are kept ([`crate::decode::Generation::verify`]). A guess can cost time, never change a token.
//!
//! A [`Draft`] adds guesses to a [`DraftTree`], each of a kind whose probability the [`Statistics`] know; two drafters that
//! guess the same share a node. On a GPU many rows cost what one does. On a CPU they do not, and what they cost differs
//! between machines, so it is measured ([`Times`]), and each step computes the tree that promises most tokens a second, which
//! may be none. Drafters go on guessing, ever more rarely, where nothing pays; the statistics thus notice when it would again.
//!
//! A [`Speculator`] is what all texts of a model share: the adjacency matrix, the statistics and the times. A
//! [`Speculation`] is one text's.
//!
//! Adding a drafter: a file with its paper, a kind in `statistics.rs`, and a line in [`Speculator::speculation`].

#![forbid(unsafe_code)]

pub mod statistics;

mod cost;
mod datastore;
mod draft_model;
mod file;
mod ngram;
mod pairs;
mod random;
mod recycle;
mod settings;
mod speculation;
mod suffix;
mod template;
mod top;
mod tree;

pub use cost::Times;
pub use datastore::{Datastore, Retrieval};
pub use draft_model::DraftModel;
pub use ngram::Ngram;
pub use pairs::{PairTable, Pairs};
pub use random::Random;
pub use recycle::{Matrix, Recycle, SharedMatrix};
pub use settings::{Settings, Shape, Source, Start};
pub use speculation::{Size, Speculation, Speculator};
pub use statistics::Statistics;
pub use suffix::{Automaton, Suffix};
pub use template::Template;
pub use top::top;
pub use tree::{DraftTree, MAX_NODES, Node};

use crate::error::Result;

/// A text to be continued.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// All its tokens.
    pub tokens: &'a [u32],
}

/// What the model said in one step.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Tokens computed: the last certain one, then drafts.
    pub tokens: &'a [u32],
    /// Which of them each stands behind; the first's own entry does not matter.
    pub parents: &'a [usize],
    /// The token before the first one.
    pub before: Option<u32>,
    /// The logits after each of them, `[tokens, vocab]`.
    pub logits: &'a [f32],
    /// Size of the vocabulary.
    pub vocab: usize,
}

impl<'a> Step<'a> {
    /// Tokens with the logits after them.
    pub fn rows(&self) -> impl Iterator<Item = (u32, &'a [f32])> {
        self.tokens.iter().copied().zip(self.logits.chunks_exact(self.vocab.max(1)))
    }

    /// The token before that of each row.
    pub fn previous(&self) -> impl Iterator<Item = Option<u32>> {
        let before =
            |(row, &parent): (usize, &usize)| if row == 0 { self.before } else { Some(self.tokens[parent]) };
        self.parents.iter().enumerate().map(before)
    }
}

/// Guesses what follows a text.
pub trait Draft: Send {
    /// Its name in settings and reports.
    fn name(&self) -> &'static str;

    /// Adds guesses to a tree whose root is the text's last token. Other drafters may have added theirs before.
    fn propose(&mut self, text: &Text<'_>, tree: &mut DraftTree, statistics: &Statistics) -> Result<()>;

    /// Learns from a step, drafts that were wrong included.
    fn learn(&mut self, step: &Step<'_>) {
        let _ = step;
    }
}
