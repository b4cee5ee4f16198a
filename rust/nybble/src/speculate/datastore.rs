//! Retrieval drafts: what followed the last tokens in a collection of texts.
//!
//! RASD, "Retrieval-Augmented Speculative Decoding" (arXiv 2503.03434), whose code was not published, over a datastore as that
//! of REST (arXiv 2311.08252). [`Datastore`] is the texts' tokens with their suffix array, mapped from a file. For the longest
//! suffix of the text that stands in it, of 16 tokens down to 2, up to 64 of its places are looked at, spread evenly over
//! all of them; the 10 tokens behind each form a trie whose nodes have the share of continuations that go through them.
//!
//! Pruned by the draft's probabilities: a first token which none of the drafters before this one proposes, and which the
//! datastore itself does not hold for likely, is left out unless the match is longer than 8. Fused by longest prefix: each
//! path goes along the tree of the other drafters as far as it agrees with them, and what is left is grafted there, which is what
//! [`DraftTree::add`] does. The paper scores by the draft model's probabilities; here the measured chance of the kind of
//! guess takes their place, so drafts of all sources are compared on one scale.

use std::cmp::Ordering;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use super::file::{self, Kind};
use super::statistics::{self, Statistics};
use super::tree::DraftTree;
use super::{Draft, Text};
use crate::error::{Error, Result};
use crate::format::Access;
use crate::format::mapped::MappedFile;

const KIND: Kind = Kind { magic: *b"nybbleDS", version: 1, what: "a datastore of text" };

/// Tokens by which suffixes are sorted; those that agree in so many stand in the order of the texts.
const SORTED: usize = 32;

/// Longest and shortest match looked for.
const LENGTHS: (usize, usize) = (16, 2);

/// Continuations looked at, and tokens of each.
const CONTINUATIONS: usize = 64;
const COPIED: usize = 10;

/// Matches from this length on are trusted without another drafter's consent.
const TRUSTED: usize = 9;

/// Share of the continuations that makes a token likely by itself.
const LIKELY: f32 = 0.2;

/// Texts as tokens, and where every sequence of tokens stands in them.
#[derive(Debug)]
pub struct Datastore {
    file: MappedFile,
    start: usize,
    len: usize,
}

impl Datastore {
    /// Writes the datastore of `tokens`, of a vocabulary of `vocab`, to a file.
    pub fn build(path: &Path, tokens: &[u32], vocab: usize) -> Result<()> {
        if tokens.is_empty() || tokens.len() >= 1 << 31 {
            return Err(Error::argument("tokens", "1 to 2147483647 tokens", tokens.len()));
        }
        if let Some(position) = tokens.iter().position(|token| *token as usize >= vocab) {
            return Err(Error::Token { token: tokens[position], position, vocab });
        }
        let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
        let suffix = |at: u32| &tokens[at as usize..tokens.len().min(at as usize + SORTED)];
        order.par_sort_unstable_by(|&a, &b| suffix(a).cmp(suffix(b)).then(a.cmp(&b)));
        file::write(path, &KIND, &[vocab as u64, tokens.len() as u64], &[tokens, &order])
    }

    /// Opens a file that [`Datastore::build`] wrote for a vocabulary of that size.
    pub fn open(path: &Path, vocab: usize) -> Result<Self> {
        Self::from_file(MappedFile::open(path, Access::Map)?, vocab)
    }

    /// The same from a file that is open.
    pub fn from_file(file: MappedFile, vocab: usize) -> Result<Self> {
        let path = file.path();
        let ([found, len], start) = file::check(path, &KIND, file.bytes())?;
        if found != vocab as u64 {
            let expected = format!("{vocab} tokens, as the model has");
            return Err(Error::format(path, "vocabulary", expected, found.to_string()));
        }
        let words = (file.bytes().len() - start) / 4;
        if len.checked_mul(2) != Some(words as u64) || len == 0 {
            return Err(Error::format(path, "size", format!("2 x {len} words"), words.to_string()));
        }
        let store = Self { file, start, len: len as usize };
        for place in 0..store.len {
            if store.token(place) as usize >= vocab || store.place(place) >= store.len {
                let found = format!("{} and {}", store.token(place), store.place(place));
                return Err(Error::format(
                    store.file.path(),
                    format!("entry {place}"),
                    "a token and a place in it",
                    found,
                ));
            }
        }
        Ok(store)
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: there is a token at least.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn word(&self, index: usize) -> u32 {
        let at = self.start + 4 * index;
        let bytes = &self.file.bytes()[at..at + 4];
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    fn token(&self, place: usize) -> u32 {
        self.word(place)
    }

    /// The place at which the suffix of that rank begins.
    fn place(&self, rank: usize) -> usize {
        self.word(self.len + rank) as usize
    }

    /// Ranks of the suffixes that begin with `wanted`, at most [`SORTED`] tokens.
    pub fn find(&self, wanted: &[u32]) -> std::ops::Range<usize> {
        let compare = |rank: usize| {
            let place = self.place(rank);
            for (i, token) in wanted.iter().enumerate() {
                if place + i >= self.len {
                    return Ordering::Less;
                }
                match self.token(place + i).cmp(token) {
                    Ordering::Equal => {}
                    other => return other,
                }
            }
            Ordering::Equal
        };
        let bound = |before: &dyn Fn(Ordering) -> bool| {
            let (mut low, mut high) = (0, self.len);
            while low < high {
                let middle = low + (high - low) / 2;
                if before(compare(middle)) { low = middle + 1 } else { high = middle }
            }
            low
        };
        bound(&|order| order.is_lt())..bound(&|order| order.is_le())
    }
}

/// Drafts from a datastore.
#[derive(Debug)]
pub struct Retrieval {
    store: Arc<Datastore>,
    trie: Vec<Branch>,
}

/// A node of the trie of continuations.
#[derive(Debug)]
struct Branch {
    token: u32,
    parent: usize,
    count: usize,
}

impl Retrieval {
    /// Drafts from this datastore.
    pub fn new(store: Arc<Datastore>) -> Self {
        Self { store, trie: Vec::new() }
    }
}

impl Draft for Retrieval {
    fn name(&self) -> &'static str {
        "retrieval"
    }

    fn propose(&mut self, text: &Text<'_>, tree: &mut DraftTree, statistics: &Statistics) -> Result<()> {
        let (longest, shortest) = LENGTHS;
        let tokens = text.tokens;
        let found = (shortest..=longest.min(tokens.len())).rev().find_map(|length| {
            let ranks = self.store.find(&tokens[tokens.len() - length..]);
            (!ranks.is_empty()).then_some((length, ranks))
        });
        let Some((length, ranks)) = found else { return Ok(()) };
        self.trie.clear();
        self.trie.push(Branch { token: 0, parent: 0, count: 0 });
        let looked = ranks.len().min(CONTINUATIONS);
        for i in 0..looked {
            let place = self.store.place(ranks.start + ranks.len() * i / looked) + length;
            let mut node = 0;
            self.trie[0].count += 1;
            for place in place..self.store.len.min(place + COPIED) {
                let token = self.store.token(place);
                let known = (1..self.trie.len())
                    .find(|at| self.trie[*at].parent == node && self.trie[*at].token == token);
                node = known.unwrap_or_else(|| {
                    self.trie.push(Branch { token, parent: node, count: 0 });
                    self.trie.len() - 1
                });
                self.trie[node].count += 1;
            }
        }
        // Parents come before their children, so a child of what was left out is left out too.
        let mut places = vec![Some(0); self.trie.len()];
        for at in 1..self.trie.len() {
            let Branch { token, parent, count } = self.trie[at];
            let share = count as f32 / self.trie[parent].count as f32;
            let pruned = parent == 0 && length < TRUSTED && share < LIKELY && tree.child(0, token).is_none();
            places[at] = places[parent]
                .filter(|_| !pruned)
                .and_then(|above| tree.add(above, token, statistics::retrieval(length, share), statistics));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn store(tokens: &[u32]) -> (tempfile::TempDir, Datastore) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("index");
        Datastore::build(&path, tokens, 10).expect("room");
        let store = Datastore::open(&path, 10).expect("good");
        (folder, store)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn all_places_are_found(
            tokens in prop::collection::vec(0_u32..4, 1..120),
            wanted in prop::collection::vec(0_u32..4, 1..6),
        ) {
            let (_folder, store) = store(&tokens);
            let mut found: Vec<usize> = store.find(&wanted).map(|rank| store.place(rank)).collect();
            found.sort_unstable();
            let there: Vec<usize> = (0..tokens.len()).filter(|at| tokens[*at..].starts_with(&wanted)).collect();
            prop_assert_eq!(found, there);
        }
    }

    #[test]
    fn files_that_are_damaged_or_of_another_vocabulary_are_refused() {
        let (folder, _store) = store(&[1, 2, 3, 1, 2, 4]);
        let path = folder.path().join("index");
        let bytes = std::fs::read(&path).expect("there");
        let error = Datastore::open(&path, 11).expect_err("another vocabulary").to_string();
        assert!(error.contains("11 tokens"), "{error}");
        let copy = folder.path().join("copy");
        for len in 0..bytes.len() {
            std::fs::write(&copy, &bytes[..len]).expect("room");
            assert!(Datastore::open(&copy, 10).is_err(), "{len} bytes");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&copy, &flipped).expect("room");
            assert!(matches!(Datastore::open(&copy, 10), Err(Error::Format { .. })), "bit {bit}");
        }
        assert!(Datastore::build(&copy, &[], 10).is_err());
        assert!(matches!(Datastore::build(&copy, &[3, 10], 10), Err(Error::Token { position: 1, .. })));
    }

    #[test]
    fn continuations_become_branches_fused_with_what_is_there() {
        let (_folder, store) = store(&[1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 7, 7]);
        let (mut tree, statistics) = (DraftTree::default(), Statistics::default());
        tree.reset(2);
        let three = tree.add(0, 3, statistics::random(), &statistics).expect("room");
        Retrieval::new(Arc::new(store))
            .propose(&Text { tokens: &[8, 1, 2] }, &mut tree, &statistics)
            .expect("drafts");
        let tokens = |node: usize| tree.children(node).map(|at| tree.nodes()[at].token).collect::<Vec<_>>();
        assert_eq!(tokens(0), [3, 7]);
        assert_eq!(tokens(three), [4, 5]);
        assert_eq!(tree.nodes()[three].kinds().len(), 2);
    }
}
