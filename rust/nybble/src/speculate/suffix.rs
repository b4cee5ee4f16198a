//! A suffix automaton over the conversation: matches of any length.
//!
//! The automaton (Blumer et al. 1985) of a text has a state for every set of places at which some of its substrings end; it is
//! extended by a token in amortised constant time. As a drafter it is that of SAM-Decoding (arXiv 2411.10666): the longest
//! suffix that stands earlier in the text, and what followed it there. Here the place is the latest one, and the suffix
//! links lead on to shorter suffixes with other continuations, which become branches.

use super::statistics::{self, Statistics};
use super::tree::DraftTree;
use super::{Draft, Text};
use crate::error::Result;

/// Tokens copied behind a match.
const COPIED: usize = 16;

/// Suffix links followed when the places of matches are brought up to date, and when branches are looked for.
const LINKS: usize = 32;

/// Branches from different matches.
const BRANCHES: usize = 4;

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone)]
struct State {
    /// Length of its longest substring.
    len: u32,
    link: u32,
    /// Tokens up to the end of the latest place it was seen at.
    end: u32,
    /// Token and state, sorted by token.
    next: Vec<(u32, u32)>,
}

impl State {
    fn get(&self, token: u32) -> Option<u32> {
        self.next.binary_search_by_key(&token, |entry| entry.0).ok().map(|place| self.next[place].1)
    }

    fn set(&mut self, token: u32, state: u32) {
        match self.next.binary_search_by_key(&token, |entry| entry.0) {
            Ok(place) => self.next[place].1 = state,
            Err(place) => self.next.insert(place, (token, state)),
        }
    }
}

/// A suffix automaton.
#[derive(Debug, Clone)]
pub struct Automaton {
    states: Vec<State>,
    last: u32,
    len: u32,
}

impl Default for Automaton {
    fn default() -> Self {
        Self { states: vec![State { len: 0, link: NONE, end: 0, next: Vec::new() }], last: 0, len: 0 }
    }
}

impl Automaton {
    /// Tokens it holds.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a token. `matches` become the suffixes of the new text that stand earlier in it, the longest of each set of
    /// places: their lengths and how many tokens stand before the end of their latest earlier place.
    pub fn push(&mut self, token: u32, matches: &mut Vec<(usize, usize)>) {
        self.len += 1;
        let new = self.states.len() as u32;
        self.states.push(State { len: self.len, link: 0, end: self.len, next: Vec::new() });
        let mut at = self.last;
        while at != NONE && self.states[at as usize].get(token).is_none() {
            self.states[at as usize].set(token, new);
            at = self.states[at as usize].link;
        }
        // The loop ended at a state that has the token, or at none.
        if let Some(target) = self.states.get(at as usize).and_then(|state| state.get(token)) {
            let len = self.states[at as usize].len + 1;
            if self.states[target as usize].len == len {
                self.states[new as usize].link = target;
            } else {
                let clone = self.states.len() as u32;
                let mut copy = self.states[target as usize].clone();
                copy.len = len;
                self.states.push(copy);
                while at != NONE && self.states[at as usize].get(token) == Some(target) {
                    self.states[at as usize].set(token, clone);
                    at = self.states[at as usize].link;
                }
                self.states[target as usize].link = clone;
                self.states[new as usize].link = clone;
            }
        }
        self.last = new;
        matches.clear();
        let mut at = self.states[new as usize].link;
        for _ in 0..LINKS {
            if at == 0 || at == NONE {
                break;
            }
            let state = &mut self.states[at as usize];
            matches.push((state.len as usize, state.end as usize));
            state.end = self.len;
            at = state.link;
        }
    }
}

/// Drafts from a suffix automaton of the prompt and what was written.
#[derive(Debug, Default)]
pub struct Suffix {
    automaton: Automaton,
    tokens: Vec<u32>,
    matches: Vec<(usize, usize)>,
}

impl Draft for Suffix {
    fn name(&self) -> &'static str {
        "suffix"
    }

    fn propose(&mut self, text: &Text<'_>, tree: &mut DraftTree, statistics: &Statistics) -> Result<()> {
        let known = self.tokens.len();
        if text.tokens.len() < known || text.tokens[..known] != self.tokens {
            *self = Self::default();
        }
        for &token in &text.tokens[self.tokens.len()..] {
            self.automaton.push(token, &mut self.matches);
            self.tokens.push(token);
        }
        let mut first: Vec<u32> = Vec::with_capacity(BRANCHES);
        for &(length, end) in &self.matches {
            let Some(&next) = self.tokens.get(end) else { continue };
            if first.contains(&next) {
                continue;
            }
            first.push(next);
            let mut node = 0;
            for (depth, &token) in (1..=COPIED).zip(&self.tokens[end..]) {
                let kind = statistics::suffix(length, depth);
                let Some(next) = tree.add(node, token, kind, statistics) else { break };
                node = next;
            }
            if first.len() == BRANCHES {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_longest_match_is_the_one_found_by_looking(tokens in prop::collection::vec(0_u32..4, 1..80)) {
            let (mut automaton, mut matches) = (Automaton::default(), Vec::new());
            for n in 1..=tokens.len() {
                automaton.push(tokens[n - 1], &mut matches);
                let text = &tokens[..n];
                let longest = (1..n).rev().find(|len| {
                    text[..n - 1].windows(*len).any(|window| window == &text[n - len..])
                });
                prop_assert_eq!(matches.first().map(|found| found.0), longest);
                for &(len, end) in &matches {
                    prop_assert!(end < n);
                    prop_assert_eq!(&text[end - len..end], &text[n - len..]);
                }
                prop_assert!(matches.is_sorted_by(|a, b| a.0 > b.0));
            }
            prop_assert!(automaton.len() == tokens.len() && automaton.states.len() <= 2 * tokens.len());
        }
    }

    #[test]
    fn shorter_matches_become_branches() {
        let mut suffix = Suffix::default();
        let (mut tree, statistics) = (DraftTree::default(), Statistics::default());
        let tokens = [1, 2, 3, 9, 3, 8, 1, 2, 3];
        for n in 1..=tokens.len() {
            tree.reset(tokens[n - 1]);
            suffix.propose(&Text { tokens: &tokens[..n] }, &mut tree, &statistics).expect("drafts");
        }
        let children: Vec<u32> = tree.children(0).map(|child| tree.nodes()[child].token).collect();
        assert_eq!(children, [9, 8]);
        tree.reset(7);
        suffix.propose(&Text { tokens: &[7, 7] }, &mut tree, &statistics).expect("another text");
        assert_eq!(suffix.automaton.len(), 2);
    }
}
