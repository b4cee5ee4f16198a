//! Prompt lookup: what followed the last tokens when they came before.
//!
//! "Prompt Lookup Decoding" (A. Saxena 2023): the longest suffix of 3, 2 or 1 tokens that stands earlier in the text, its last
//! place, and the 10 tokens that followed there.

use super::statistics::{self, Statistics};
use super::tree::DraftTree;
use super::{Draft, Text};
use crate::error::{Error, Result};

/// Drafts by n-gram lookup in the prompt and what was written.
#[derive(Debug, Clone)]
pub struct Ngram {
    longest: usize,
    copied: usize,
}

impl Default for Ngram {
    fn default() -> Self {
        Self { longest: 3, copied: 10 }
    }
}

impl Ngram {
    /// Looks for at most `longest` tokens and copies `copied`.
    pub fn new(longest: usize, copied: usize) -> Result<Self> {
        if longest == 0 || copied == 0 {
            return Err(Error::argument("ngram", "at least one token to look for and to copy", 0));
        }
        Ok(Self { longest, copied })
    }
}

impl Draft for Ngram {
    fn name(&self) -> &'static str {
        "ngram"
    }

    fn propose(&mut self, text: &Text<'_>, tree: &mut DraftTree, statistics: &Statistics) -> Result<()> {
        let tokens = text.tokens;
        let Some(earlier) = tokens.len().checked_sub(1) else { return Ok(()) };
        for length in (1..=self.longest.min(earlier)).rev() {
            let wanted = &tokens[tokens.len() - length..];
            let Some(at) = tokens[..earlier].windows(length).rposition(|window| window == wanted) else {
                continue;
            };
            let mut node = 0;
            for (depth, &token) in (1..=self.copied).zip(&tokens[at + length..]) {
                let kind = statistics::ngram(length, depth);
                let Some(next) = tree.add(node, token, kind, statistics) else { break };
                node = next;
            }
            break;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drafted(tokens: &[u32], ngram: &mut Ngram) -> Vec<u32> {
        let mut tree = DraftTree::default();
        tree.reset(tokens.last().copied().unwrap_or(0));
        ngram.propose(&Text { tokens }, &mut tree, &Statistics::default()).expect("drafts");
        tree.nodes()[1..].iter().map(|node| node.token).collect()
    }

    #[test]
    fn the_longest_and_then_the_last_match_counts() {
        let mut ngram = Ngram::new(3, 2).expect("good");
        assert_eq!(drafted(&[1, 2, 3, 7, 7, 9, 3, 8, 8, 1, 2, 3], &mut ngram), [7, 7]);
        assert_eq!(drafted(&[5, 6, 5, 9, 5], &mut ngram), [9, 5]);
        assert_eq!(drafted(&[4, 4, 4], &mut ngram), [4]);
        assert_eq!(drafted(&[1, 2, 3], &mut ngram), [0; 0]);
        assert_eq!(drafted(&[1], &mut ngram), [0; 0]);
        assert_eq!(drafted(&[], &mut ngram), [0; 0]);
        assert!(Ngram::new(0, 1).is_err() && Ngram::new(1, 0).is_err());
    }
}
