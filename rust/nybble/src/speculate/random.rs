//! Random drafts: the control, which is always wrong but by chance.

use super::statistics::{self, Statistics};
use super::tree::DraftTree;
use super::{Draft, Text};
use crate::decode::Rng;
use crate::error::Result;

/// Nodes drafted.
const NODES: usize = 16;

/// Drafts random tokens. It shows what speculation costs where it does not pay.
#[derive(Debug)]
pub struct Random {
    vocab: usize,
    rng: Rng,
}

impl Random {
    /// Tokens of a vocabulary of that size.
    pub fn new(vocab: usize, seed: u64) -> Self {
        Self { vocab, rng: Rng::new(seed) }
    }
}

impl Draft for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn propose(&mut self, _text: &Text<'_>, tree: &mut DraftTree, statistics: &Statistics) -> Result<()> {
        for _ in 0..NODES {
            let parent = self.rng.bits() as usize % tree.nodes().len();
            let token = (self.rng.bits() % self.vocab.max(1) as u64) as u32;
            tree.add(parent, token, statistics::random(), statistics);
        }
        Ok(())
    }
}
