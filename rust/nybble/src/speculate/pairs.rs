//! Token Recycling by pairs of tokens.
//!
//! The adjacency matrix of [`super::recycle`] forgets what stood before a token. This table keeps the likeliest successors of a
//! token and the one before it, from the last time the model computed them together, in the manner of the n-gram caches of
//! Lookahead Decoding (arXiv 2402.02057): fewer guesses, more of them right. Pairs are hashed into a fixed number of rows, the
//! later of two that meet replaces the other, and a row remembers its pair, so it never answers for another one.

use std::sync::{Arc, Mutex};

use super::recycle::{lock, margin_class, margin_code};
use super::statistics::{self, Statistics};
use super::top::top;
use super::tree::DraftTree;
use super::{Draft, Step, Text};
use crate::error::Result;

/// Rows; a power of two.
const ROWS: usize = 1 << 15;

/// Candidates of a row.
const CANDIDATES: usize = 4;

/// Nodes with less of a chance to be reached are not worth proposing.
const LEAST_REACH: f32 = 0.01;

/// Nodes proposed at most.
const NODES: usize = 64;

const NONE: u32 = u32::MAX;

/// Successors of a pair.
#[derive(Debug, Clone, Copy)]
struct Row {
    pair: (u32, u32),
    next: [u32; CANDIDATES],
    margin: u8,
}

/// The likeliest successors of pairs of tokens.
#[derive(Debug, Clone)]
pub struct PairTable {
    rows: Vec<Row>,
}

impl Default for PairTable {
    fn default() -> Self {
        Self { rows: vec![Row { pair: (NONE, NONE), next: [NONE; CANDIDATES], margin: 0 }; ROWS] }
    }
}

impl PairTable {
    fn place((one, two): (u32, u32)) -> usize {
        let mixed = (u64::from(one) << 32 | u64::from(two)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 40) as usize % ROWS
    }

    fn get(&self, pair: (u32, u32)) -> Option<&Row> {
        Some(&self.rows[Self::place(pair)]).filter(|row| row.pair == pair)
    }

    /// Replaces what followed a pair by the likeliest tokens of the logits after it.
    pub fn update(&mut self, pair: (u32, u32), logits: &[f32]) {
        let (mut next, mut values) = ([NONE; CANDIDATES], [0.0; CANDIDATES]);
        let found = top(logits, &mut next, &mut values);
        next[found..].fill(NONE);
        let margin = if found > 1 { margin_code(values[0] - values[1]) } else { 0 };
        self.rows[Self::place(pair)] = Row { pair, next, margin };
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Drafts from a table of pairs.
#[derive(Debug)]
pub struct Pairs {
    table: Arc<Mutex<PairTable>>,
    queue: Vec<usize>,
}

impl Pairs {
    /// Drafts from this table.
    pub fn new(table: Arc<Mutex<PairTable>>) -> Self {
        Self { table, queue: Vec::new() }
    }
}

impl Draft for Pairs {
    fn name(&self) -> &'static str {
        "pairs"
    }

    fn propose(&mut self, text: &Text<'_>, tree: &mut DraftTree, statistics: &Statistics) -> Result<()> {
        let table = lock(&self.table);
        let before = text.tokens.len().checked_sub(2).map(|place| text.tokens[place]);
        self.queue.clear();
        self.queue.extend(0..tree.nodes().len());
        let mut at = 0;
        while let Some(&index) = self.queue.get(at)
            && tree.len() < NODES
        {
            at += 1;
            let node = &tree.nodes()[index];
            let (depth, reach) = (node.depth, node.reach);
            let previous = if index == 0 { before } else { Some(tree.nodes()[node.parent].token) };
            let Some(row) = previous.and_then(|previous| table.get((previous, node.token))) else { continue };
            let margin = margin_class(row.margin);
            for (rank, &next) in row.next.iter().enumerate().filter(|(_, next)| **next != NONE) {
                let kind = statistics::pairs(margin, rank, depth + 1);
                if reach * statistics.chance(kind) < LEAST_REACH && tree.child(index, next).is_none() {
                    continue;
                }
                let count = tree.nodes().len();
                if tree.add(index, next, kind, statistics) == Some(count) {
                    self.queue.push(count);
                }
            }
        }
        Ok(())
    }

    fn learn(&mut self, step: &Step<'_>) {
        let mut table = lock(&self.table);
        for ((token, logits), previous) in step.rows().zip(step.previous()) {
            if let Some(previous) = previous {
                table.update((previous, token), logits);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_told_apart() {
        let table = Arc::new(Mutex::new(PairTable::default()));
        let mut pairs = Pairs::new(Arc::clone(&table));
        let logits = [0.0, 9.0, 1.0, f32::NEG_INFINITY, 0.0, 0.0, 9.0, 1.0, 9.0, 0.0, 0.0, 5.0];
        // 7 behind 5, then 1 behind 7, then 2 behind 7.
        pairs.learn(&Step {
            tokens: &[7, 1, 2],
            parents: &[0, 0, 0],
            before: Some(5),
            logits: &logits,
            vocab: 4,
        });
        let row = |one, two| lock(&table).get((one, two)).map(|row| row.next);
        assert_eq!(row(5, 7), Some([1, 2, 0, NONE]));
        assert_eq!(row(7, 1), Some([2, 3, 0, 1]));
        assert_eq!(row(7, 2), Some([0, 3, 1, 2]));
        assert!(row(6, 7).is_none() && row(1, 2).is_none());
        let (mut tree, statistics) = (DraftTree::default(), Statistics::default());
        tree.reset(7);
        pairs.propose(&Text { tokens: &[5, 7] }, &mut tree, &statistics).expect("drafts");
        let children: Vec<u32> = tree.children(0).map(|child| tree.nodes()[child].token).collect();
        assert_eq!(children, [1, 2, 0]);
        tree.reset(7);
        pairs.propose(&Text { tokens: &[7] }, &mut tree, &statistics).expect("no pair");
        assert!(tree.is_empty());
        lock(&table).clear();
        assert!(row(5, 7).is_none());
    }
}
