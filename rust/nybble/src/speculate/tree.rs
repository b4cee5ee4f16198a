//! The tree that all drafters write into.

use super::statistics::{self, Statistics};

/// Most nodes of a tree besides the root.
pub const MAX_NODES: usize = 255;

/// Kinds of guesses that one node can be of, see [`super::statistics`].
const KINDS: usize = 3;

/// One drafted token.
#[derive(Debug, Clone)]
pub struct Node {
    /// The token.
    pub token: u32,
    /// The node before it.
    pub parent: usize,
    /// Edges from the root.
    pub depth: usize,
    /// Probability that it follows its parent, as measured for guesses of its kinds.
    pub chance: f32,
    /// Probability that it and all before it are right.
    pub reach: f32,
    /// The kind of what several drafters propose, once the tree is settled.
    pub agreed: Option<u16>,
    kinds: [u16; KINDS],
    known_kinds: usize,
    first_child: Option<usize>,
    last_child: Option<usize>,
    next: Option<usize>,
}

impl Node {
    /// What kinds of guesses made it.
    pub fn kinds(&self) -> &[u16] {
        &self.kinds[..self.known_kinds]
    }
}

/// Guesses of what follows: node 0 is the last token that is certain, every other node one that may follow its parent.
///
/// Drafters add to it in turn. What a second one proposes at the same place is no second node: the two guesses together make
/// the node likelier.
#[derive(Debug, Clone, Default)]
pub struct DraftTree {
    nodes: Vec<Node>,
}

impl DraftTree {
    /// Starts over from a root.
    pub fn reset(&mut self, root: u32) {
        self.nodes.clear();
        self.nodes.push(Self::node(root, 0, 0, 1.0, 1.0));
    }

    fn node(token: u32, parent: usize, depth: usize, chance: f32, reach: f32) -> Node {
        Node {
            token,
            parent,
            depth,
            chance,
            reach,
            agreed: None,
            kinds: [0; KINDS],
            known_kinds: 0,
            first_child: None,
            last_child: None,
            next: None,
        }
    }

    /// All nodes, parents before children; none before the first [`DraftTree::reset`].
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Nodes besides the root.
    pub fn len(&self) -> usize {
        self.nodes.len().saturating_sub(1)
    }

    /// Whether there is nothing but the root.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether no further node has room.
    pub fn is_full(&self) -> bool {
        self.len() >= MAX_NODES
    }

    /// Proposes `token` behind `parent`, a guess of a kind whose probability `statistics` knows. Returns its node, which may
    /// be there already; none if the tree is full.
    pub fn add(&mut self, parent: usize, token: u32, kind: u16, statistics: &Statistics) -> Option<usize> {
        let chance = statistics.chance(kind);
        if let Some(index) = self.child(parent, token) {
            let above = self.nodes[parent].reach;
            let node = &mut self.nodes[index];
            if !node.kinds().contains(&kind) && node.known_kinds < KINDS {
                node.kinds[node.known_kinds] = kind;
                node.known_kinds += 1;
                // As if the guesses were independent.
                node.chance = 1.0 - (1.0 - node.chance) * (1.0 - chance);
                node.reach = above * node.chance;
            }
            return Some(index);
        }
        if self.is_full() {
            return None;
        }
        let index = self.nodes.len();
        let above = &mut self.nodes[parent];
        let mut node = Self::node(token, parent, above.depth + 1, chance, above.reach * chance);
        (node.kinds[0], node.known_kinds) = (kind, 1);
        match above.last_child.replace(index) {
            None => above.first_child = Some(index),
            Some(sibling) => self.nodes[sibling].next = Some(index),
        }
        self.nodes.push(node);
        Some(index)
    }

    /// The child of `parent` that carries `token`.
    pub fn child(&self, parent: usize, token: u32) -> Option<usize> {
        self.children(parent).find(|&child| self.nodes[child].token == token)
    }

    /// The children of a node, in the order in which they were proposed.
    pub fn children(&self, parent: usize) -> impl Iterator<Item = usize> {
        std::iter::successors(self.nodes[parent].first_child, |&child| self.nodes[child].next)
    }

    /// Tokens from the one behind the root to `node`.
    pub fn path(&self, node: usize, tokens: &mut Vec<u32>) {
        tokens.clear();
        let mut at = node;
        while at > 0 {
            tokens.push(self.nodes[at].token);
            at = self.nodes[at].parent;
        }
        tokens.reverse();
    }

    /// Brings every node's reach up to date once all drafters have proposed, and keeps what children of one node have together
    /// at 1 or less. Drafters are not independent of each other: what several of them propose gets the probability that such
    /// nodes were seen to have.
    pub fn settle(&mut self, statistics: &Statistics) {
        for node in self.nodes.iter_mut().filter(|node| node.known_kinds > 1) {
            let kind = statistics::agreed(node.chance);
            (node.agreed, node.chance) = (Some(kind), statistics.chance(kind));
        }
        for parent in 0..self.nodes.len() {
            let total: f32 = self.children(parent).map(|child| self.nodes[child].chance).sum();
            let factor = if total > 1.0 { 1.0 / total } else { 1.0 };
            let reach = self.nodes[parent].reach;
            let mut child = self.nodes[parent].first_child;
            while let Some(index) = child {
                let node = &mut self.nodes[index];
                node.chance *= factor;
                node.reach = reach * node.chance;
                child = node.next;
            }
        }
    }

    /// Nodes besides the root from the likeliest to be reached on; of equals the first. A node comes after its parent.
    pub fn by_reach(&self, order: &mut Vec<usize>) {
        order.clear();
        order.extend(1..self.nodes.len());
        order.sort_by(|&a, &b| self.nodes[b].reach.total_cmp(&self.nodes[a].reach).then(a.cmp(&b)));
    }
}
