//! Attention of the nodes of a tree: several continuations of one text in one pass.
//!
//! The last `n` entries of the cache are the nodes, parents before children. A node at depth `d` stands at position `past + d`
//! of its own text, which is the cache up to `past` and then the nodes on its path; of the other nodes it sees nothing. Its
//! output has the same bits as if those on its path alone had been appended one after the other: a score is one chain of
//! additions whatever lane the key lies in, so scores are computed where the keys are and then moved to where they belong,
//! and everything behind them (running softmax, spans, the order in which values are added) goes by position.

use super::super::f32::lanes::{Element, LANES, MAX_ROWS, Tier};
use super::KEYS;
use super::block::{Job, Rows};
use super::softmax::{Scale, Times, Weigh};
use crate::error::{Error, Result};

/// The paths of a tree's nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Branches {
    /// Where each node's path starts in `places`; one more at the end.
    starts: Vec<usize>,
    /// The nodes of each path, from the root to the node itself.
    places: Vec<usize>,
}

impl Branches {
    /// The paths of nodes given by their parents; node 0 is the root, and a parent comes before its children.
    pub fn new(parents: &[usize]) -> Result<Self> {
        let mut branches = Self::default();
        branches.set(parents)?;
        Ok(branches)
    }

    /// Replaces the tree. The memory is kept; after an error it is empty.
    pub fn set(&mut self, parents: &[usize]) -> Result<()> {
        self.starts.clear();
        self.places.clear();
        self.starts.push(0);
        for (node, &parent) in parents.iter().enumerate() {
            if node > 0 {
                if parent >= node {
                    self.starts.truncate(1);
                    self.places.clear();
                    let expected = format!("a parent of node {node} before it");
                    return Err(Error::argument("tree", expected, parent));
                }
                self.places.extend_from_within(self.starts[parent]..self.starts[parent + 1]);
            }
            self.places.push(node);
            self.starts.push(self.places.len());
        }
        Ok(())
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// Whether there is no node.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Nodes from the root to `node`, both included.
    pub fn path(&self, node: usize) -> &[usize] {
        &self.places[self.starts[node]..self.starts[node + 1]]
    }

    /// Edges between the root and `node`.
    pub fn depth(&self, node: usize) -> usize {
        self.starts[node + 1] - self.starts[node] - 1
    }

    /// Positions that the nodes take: one more than the largest depth.
    pub fn positions(&self) -> usize {
        (0..self.len()).map(|node| self.depth(node) + 1).max().unwrap_or(0)
    }

    /// Floats that one row's scores with all nodes take, see [`Job::node_scores`].
    pub(super) fn floats(&self) -> usize {
        self.len().next_multiple_of(LANES) + LANES
    }
}

impl<T: Tier, E: Element> Job<'_, T, E> {
    /// Scores of all rows with all nodes, `branches.floats()` apart. The first is that of the entry at [`Job::first_lane`].
    pub(super) fn node_scores(&self, branches: &Branches, queries: &[f32], scores: &mut [f32]) {
        let (first, width) = (self.first_lane(), branches.floats());
        let tiles = (self.call.past + branches.len() - first).div_ceil(LANES);
        for part in self.parts() {
            let mut y = [std::ptr::null_mut(); MAX_ROWS];
            for (y, row) in y.iter_mut().zip(part.clone()) {
                *y = scores[row * width..][..tiles * LANES].as_mut_ptr();
            }
            let queries = &queries[part.start * self.padded..part.end * self.padded];
            self.products(first, tiles, part.len(), queries, y);
        }
    }

    /// The entry that begins the run of 16 in which the first node lies.
    fn first_lane(&self) -> usize {
        self.call.past / LANES * LANES
    }

    /// Takes rows through the positions `start..start + KEYS`, some of which may be nodes. `first` is the first row's number
    /// in the task, `node_scores` are those of all rows of the task.
    pub(super) fn branched_block(
        &self,
        branches: &Branches,
        start: usize,
        first: usize,
        node_scores: &[f32],
        rows: Rows<'_>,
    ) {
        let past = self.call.past;
        // Positions of the block before this one are entries of their own number.
        let plain = past.clamp(start, start + KEYS) - start;
        let Rows { queries, sums, scores, running, seen, slopes } = rows;
        let some = |&&(from, to): &&(usize, usize)| from < to;
        let Some(from) = seen.iter().filter(some).map(|seen| seen.0).min() else { return };
        if from < plain {
            let tiles = from / LANES..plain.div_ceil(LANES);
            let mut y = [std::ptr::null_mut(); MAX_ROWS];
            for (y, scores) in y.iter_mut().zip(&mut scores[..seen.len()]) {
                *y = scores[tiles.start * LANES..tiles.end * LANES].as_mut_ptr();
            }
            self.products(start + tiles.start * LANES, tiles.len(), seen.len(), queries, y);
        }
        let width = branches.floats();
        // Nodes in this block that a row sees: their positions in it, and their entries in the cache.
        let nodes = |i: usize| {
            let path = branches.path(self.place(first + i).0);
            let (from, to) = seen[i];
            (from.max(plain)..to).map(move |at| (at, past + path[start + at - past]))
        };
        for (i, &(from, to)) in seen.iter().enumerate() {
            if from == to {
                continue;
            }
            let node_scores = &node_scores[(first + i) * width..][..width];
            let scores = &mut scores[i];
            for (at, entry) in nodes(i) {
                scores[at] = node_scores[entry - self.first_lane()];
            }
            if let Some((keys, _)) = self.scales {
                if from < plain {
                    let to = to.min(plain);
                    self.tier.run(Times(&mut scores[from..to], &keys[start + from..start + to]));
                }
                for (at, entry) in nodes(i) {
                    scores[at] *= keys[entry];
                }
            }
            self.shape_scores(scores, start, (from, to), slopes[i]);
        }
        self.tier.run(Weigh { scores, running, seen });
        for (i, &(from, to)) in seen.iter().enumerate() {
            if from == to {
                continue;
            }
            let own = i * self.padded..(i + 1) * self.padded;
            let fade = running[i].fade;
            // Exactly 1 as long as the largest score stays: then there is nothing to do.
            if fade.to_bits() != 1.0f32.to_bits() {
                self.tier.run(Scale(&mut sums[own.clone()], fade));
            }
            if let Some((_, values)) = self.scales {
                if from < plain {
                    let to = to.min(plain);
                    self.tier.run(Times(&mut scores[i][from..to], &values[start + from..start + to]));
                }
                for (at, entry) in nodes(i) {
                    scores[i][at] *= values[entry];
                }
            }
        }
        if seen.iter().all(|other| other.0 == seen[0].0) && seen[0].0 < plain {
            self.values(start, (seen[0].0, plain), scores, sums);
        } else {
            for (i, &(from, to)) in seen.iter().enumerate() {
                if from < to.min(plain) {
                    let own = i * self.padded..(i + 1) * self.padded;
                    self.values(start, (from, to.min(plain)), &scores[i..=i], &mut sums[own]);
                }
            }
        }
        for i in 0..seen.len() {
            let own = i * self.padded..(i + 1) * self.padded;
            for (at, entry) in nodes(i) {
                self.value(entry, &scores[i][at..=at], &mut sums[own.clone()]);
            }
        }
    }
}
