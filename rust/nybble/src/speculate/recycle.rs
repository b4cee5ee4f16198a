//! Token Recycling: the candidates a model rejected for one token are drafts for the next time it meets that token.
//!
//! "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling" (Luo et al. 2024,
//! arXiv 2408.08696). An adjacency matrix holds the `k` likeliest successors of each token, best first, from the last time the
//! model computed it:
//!
//! ```text
//! M[t] = top_k(logits after t), for every node t of every verified tree, rejected ones included
//! child r of a node = M[token of the node][r]
//! ```
//!
//! `k = 8` is the paper's. What differs: entries are 32 bits (1.5 MiB for 49,152 tokens; the authors' are 64); a row never
//! written proposes nothing (theirs proposes token 0); and beside each row stands one byte, how much likelier the first
//! successor was than the second, by which the acceptance statistics tell sure rows from unsure ones.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::file::{self, Kind};
use super::statistics::{self, Statistics};
use super::template::Template;
use super::top::{MOST, top};
use super::tree::DraftTree;
use super::{Draft, Step, Text};
use crate::error::{Error, Result};

const KIND: Kind = Kind { magic: *b"nybbleAM", version: 1, what: "an adjacency matrix" };

/// An entry without a successor.
const NONE: u32 = u32::MAX;

/// Steps of a margin in a unit of log odds.
const MARGIN_STEPS: f32 = 16.0;

/// Nodes with less of a chance to be reached are not worth proposing.
const LEAST_REACH: f32 = 0.004;

/// Nodes proposed at most.
const NODES: usize = 96;

/// The likeliest successors of every token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrix {
    vocab: usize,
    k: usize,
    rows: Vec<u32>,   // [vocab, k]
    margins: Vec<u8>, // [vocab]
}

impl Matrix {
    /// A matrix without any successor.
    pub fn new(vocab: usize, k: usize) -> Result<Self> {
        if !(1..=MOST).contains(&k) {
            return Err(Error::argument("k", format!("1 to {MOST} candidates"), k));
        }
        let size = vocab.checked_mul(k).filter(|size| *size < 1 << 32);
        let Some(size) = size else {
            return Err(Error::argument("vocabulary", "one whose matrix has less than 2^32 entries", vocab));
        };
        Ok(Self { vocab, k, rows: vec![NONE; size], margins: vec![0; vocab] })
    }

    /// Tokens it has rows for.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Candidates of a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes of the candidates.
    pub fn bytes(&self) -> usize {
        self.rows.len() * size_of::<u32>()
    }

    /// The successors of a token, best first.
    pub fn row(&self, token: u32) -> &[u32] {
        let row = &self.rows[token as usize * self.k..][..self.k];
        &row[..row.iter().position(|&next| next == NONE).unwrap_or(self.k)]
    }

    /// How sure the model was of the first successor of a token: a class below [`statistics::MARGINS`].
    fn margin(&self, token: u32) -> usize {
        margin_class(self.margins[token as usize])
    }

    /// Replaces a token's successors by the likeliest ones of the logits after it.
    pub fn update(&mut self, token: u32, logits: &[f32]) {
        let mut values = [0.0; MOST];
        let row = &mut self.rows[token as usize * self.k..][..self.k];
        let found = top(logits, row, &mut values[..self.k]);
        row[found..].fill(NONE);
        let margin = if found > 1 { values[0] - values[1] } else { 0.0 };
        self.margins[token as usize] = margin_code(margin);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.rows.fill(NONE);
        self.margins.fill(0);
    }

    /// Writes it to a file, which is replaced as a whole or not at all.
    pub fn save(&self, path: &Path) -> Result<()> {
        let (words, rest) = self.margins.as_chunks::<4>();
        let mut margins: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        if !rest.is_empty() {
            let mut last = [0; 4];
            last[..rest.len()].copy_from_slice(rest);
            margins.push(u32::from_le_bytes(last));
        }
        file::write(path, &KIND, &[self.vocab as u64, self.k as u64], &[&self.rows, &margins])
    }

    /// Reads a file that [`Matrix::save`] wrote for a vocabulary of that size.
    pub fn load(path: &Path, vocab: usize) -> Result<Self> {
        Self::from_bytes(path, &file::read(path, 1 << 32)?, vocab)
    }

    /// The same from the bytes of such a file; `path` is for messages.
    pub fn from_bytes(path: &Path, bytes: &[u8], vocab: usize) -> Result<Self> {
        let ([found, k], start) = file::check(path, &KIND, bytes)?;
        if found != vocab as u64 {
            let expected = format!("{vocab} tokens, as the model has");
            return Err(Error::format(path, "vocabulary", expected, found.to_string()));
        }
        if !(1..=MOST as u64).contains(&k) {
            return Err(Error::format(path, "k", format!("1 to {MOST}"), k.to_string()));
        }
        let mut matrix = Self::new(vocab, k as usize)?;
        let (words, _) = bytes[start..].as_chunks::<4>();
        let expected = matrix.rows.len() + vocab.div_ceil(4);
        if words.len() != expected {
            return Err(Error::format(path, "size", format!("{expected} words"), words.len().to_string()));
        }
        for (entry, word) in matrix.rows.iter_mut().zip(words) {
            *entry = u32::from_le_bytes(*word);
        }
        if let Some(token) = matrix.rows.iter().find(|token| **token as usize >= vocab && **token != NONE) {
            return Err(Error::format(
                path,
                "successor",
                format!("a token below {vocab}"),
                token.to_string(),
            ));
        }
        let margins = words[matrix.rows.len()..].as_flattened();
        matrix.margins.copy_from_slice(&margins[..vocab]);
        Ok(matrix)
    }
}

/// A margin between the best two logits in a byte.
pub(super) fn margin_code(margin: f32) -> u8 {
    (margin * MARGIN_STEPS).clamp(0.0, 255.0) as u8
}

/// The class of a margin, below [`statistics::MARGINS`].
pub(super) fn margin_class(code: u8) -> usize {
    let margin = f32::from(code) / MARGIN_STEPS;
    [0.5, 1.5, 3.0, 5.0].iter().filter(|edge| margin >= **edge).count()
}

/// A matrix that several texts learn from and draft with.
pub type SharedMatrix = Arc<Mutex<Matrix>>;

/// Drafts from an adjacency matrix.
#[derive(Debug)]
pub struct Recycle {
    matrix: SharedMatrix,
    template: Option<Template>,
    heap: Vec<usize>,
    places: Vec<usize>,
}

impl Recycle {
    /// Drafts the likeliest paths, or exactly those of a template.
    pub fn new(matrix: SharedMatrix, template: Option<Template>) -> Result<Self> {
        let k = lock(&matrix).k;
        if let Some(template) = template.as_ref().filter(|template| template.ranks() > k) {
            let expected = format!("at most {k} children of a node, the candidates of a token");
            return Err(Error::argument("template", expected, template.ranks()));
        }
        Ok(Self { matrix, template, heap: Vec::new(), places: Vec::new() })
    }

    fn fill(&mut self, matrix: &Matrix, template: &Template, tree: &mut DraftTree, statistics: &Statistics) {
        self.places.clear();
        self.places.push(0);
        for (parent, rank) in template.nodes() {
            // usize::MAX stands for a node whose parent or token is not there.
            let above = self.places[parent];
            let token = tree.nodes().get(above).and_then(|node| matrix.row(node.token).get(rank).copied());
            let place = token.and_then(|token| {
                let node = &tree.nodes()[above];
                let kind = statistics::recycle(matrix.margin(node.token), rank, node.depth + 1);
                tree.add(above, token, kind, statistics)
            });
            self.places.push(place.unwrap_or(usize::MAX));
        }
    }
}

/// Locks what only another thread's panic can have poisoned; it holds no half-made state that could do harm.
pub(super) fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Draft for Recycle {
    fn name(&self) -> &'static str {
        "recycle"
    }

    fn propose(&mut self, _text: &Text<'_>, tree: &mut DraftTree, statistics: &Statistics) -> Result<()> {
        let matrix = Arc::clone(&self.matrix);
        let matrix = lock(&matrix);
        if let Some(template) = self.template.take() {
            self.fill(&matrix, &template, tree, statistics);
            self.template = Some(template);
            return Ok(());
        }
        // The node likeliest to be reached is the next whose successors are looked up.
        self.heap.clear();
        self.heap.extend(0..tree.nodes().len());
        while tree.len() < NODES {
            let reach = |&place: &usize| tree.nodes()[self.heap[place]].reach;
            let best = (0..self.heap.len()).max_by(|a, b| reach(a).total_cmp(&reach(b)).then(b.cmp(a)));
            let Some(best) = best else { break };
            let at = self.heap.swap_remove(best);
            let (token, depth, reach) = {
                let node = &tree.nodes()[at];
                (node.token, node.depth, node.reach)
            };
            if reach < LEAST_REACH {
                break;
            }
            let margin = matrix.margin(token);
            for (rank, &next) in matrix.row(token).iter().enumerate() {
                let kind = statistics::recycle(margin, rank, depth + 1);
                if reach * statistics.chance(kind) < LEAST_REACH && tree.child(at, next).is_none() {
                    continue;
                }
                let before = tree.nodes().len();
                if let Some(child) = tree.add(at, next, kind, statistics)
                    && child == before
                {
                    self.heap.push(child);
                }
            }
        }
        Ok(())
    }

    fn learn(&mut self, step: &Step<'_>) {
        let mut matrix = lock(&self.matrix);
        // In the order of the nodes: of a token that is there twice the last one counts.
        for (token, logits) in step.rows() {
            matrix.update(token, logits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> Matrix {
        let mut matrix = Matrix::new(10, 3).expect("good");
        matrix.update(1, &[0.0, 5.0, 1.0, 4.0, 4.5, 0.0, 0.0, 0.0, 0.0, 0.0]);
        matrix.update(9, &[f32::NAN, f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY]);
        matrix
    }

    #[test]
    fn rows_are_the_likeliest_tokens() {
        let matrix = matrix();
        assert_eq!(matrix.row(1), [1, 4, 3]);
        assert_eq!(matrix.row(9), [2]);
        assert_eq!(matrix.row(0), [0; 0]);
        assert_eq!(Matrix::new(49_152, 8).expect("good").bytes(), 3 << 19);
        for k in [0, 65] {
            assert!(Matrix::new(10, k).is_err_and(|error| error.to_string().contains("1 to 64")));
        }
        assert!(Matrix::new(usize::MAX, 8).is_err());
    }

    #[test]
    fn files_come_back_or_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("m.bin");
        let matrix = matrix();
        matrix.save(&path).expect("room");
        matrix.save(&path).expect("replaced");
        assert_eq!(Matrix::load(&path, 10).expect("the same"), matrix);
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 1);
        let other = Matrix::load(&path, 11).expect_err("another vocabulary").to_string();
        assert!(other.contains("11 tokens") && other.contains("10"), "{other}");
        let bytes = std::fs::read(&path).expect("there");
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).expect("room");
            assert!(matches!(Matrix::load(&path, 10), Err(Error::Format { .. })), "{len} bytes");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &flipped).expect("room");
            assert!(matches!(Matrix::load(&path, 10), Err(Error::Format { .. })), "bit {bit}");
        }
        assert!(matches!(Matrix::load(&folder.path().join("none"), 10), Err(Error::Io { .. })));
        assert!(matrix.save(&folder.path().join("no/where")).is_err());
    }

    #[test]
    fn templates_need_their_candidates() {
        let shared = Arc::new(Mutex::new(matrix()));
        let error = Recycle::new(Arc::clone(&shared), Some(Template::paper())).expect_err("8 of 3");
        assert!(error.to_string().contains("at most 3"));
        let mut recycle =
            Recycle::new(shared, Some(Template::from_counts(&[2, 3, 1]).expect("a tree"))).expect("fits");
        let (mut tree, statistics) = (DraftTree::default(), Statistics::default());
        tree.reset(1);
        recycle.propose(&Text { tokens: &[1] }, &mut tree, &statistics).expect("drafts");
        let tokens: Vec<_> = tree.nodes().iter().map(|node| (node.token, node.parent)).collect();
        // 1 follows itself; 4 was never seen, so nothing follows it.
        assert_eq!(tokens, [(1, 0), (1, 0), (4, 0), (1, 1), (4, 1), (3, 1)]);
    }
}
