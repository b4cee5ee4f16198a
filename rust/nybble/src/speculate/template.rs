//! Trees of a fixed shape.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::tree::MAX_NODES;
use crate::error::{Error, Result};

/// A tree whose nodes say which rank of their parent's row in the adjacency matrix they take: the first child of a node takes
/// rank 0, the second rank 1, and so on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Parent of each node, in breadth-first order; node 0 is the root and its own parent.
    parents: Vec<usize>,
    ranks: Vec<usize>,
}

impl Template {
    /// The tree of Token Recycling (arXiv 2408.08696), "2.2.2" in its authors' code: 80 nodes, six deep, the paths that were
    /// accepted most often on held-out texts.
    pub fn paper() -> Self {
        const COUNTS: [usize; 78] = [
            8, // root
            8, 4, 3, 2, 1, 1, 1, 1, // 0 to 7
            8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0, // 00 to 70
            5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, // 000 to 500
            3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, // 0000 to 3000
            2, 0, 0, 1, 0, 0, 0, 0, // 00000 to 10000
        ];
        Self::of_counts(&COUNTS)
    }

    /// A tree of counts that were checked.
    fn of_counts(counts: &[usize]) -> Self {
        let mut template = Self { parents: vec![0], ranks: vec![0] };
        for (node, &count) in counts.iter().enumerate() {
            template.parents.extend(std::iter::repeat_n(node, count));
            template.ranks.extend(0..count);
        }
        template
    }

    /// The tree whose nodes have these numbers of children, in breadth-first order from the root on. Nodes behind the end of
    /// the list have none.
    pub fn from_counts(counts: &[usize]) -> Result<Self> {
        let mut nodes = 1;
        for (node, &count) in counts.iter().enumerate() {
            if node >= nodes {
                let expected = format!("counts of the {nodes} nodes that are some node's children");
                return Err(Error::argument("template", expected, format!("a count for node {node}")));
            }
            if count > MAX_NODES + 1 - nodes {
                let expected = format!("at most {MAX_NODES} nodes");
                return Err(Error::argument(
                    "template",
                    expected,
                    format!("{count} children of node {node}"),
                ));
            }
            nodes += count;
        }
        Self::of_counts(counts).checked()
    }

    /// The tree whose node `i + 1` is a child of node `parents[i]`; node 0 is the root. Any order will do.
    pub fn from_parents(parents: &[usize]) -> Result<Self> {
        if parents.len() > MAX_NODES {
            return Err(Error::argument("template", format!("at most {MAX_NODES} nodes"), parents.len()));
        }
        let mut children = vec![Vec::new(); parents.len() + 1];
        for (node, &parent) in (1..).zip(parents) {
            let Some(children) = children.get_mut(parent) else {
                let expected = format!("nodes 0 to {} as parents", parents.len());
                return Err(Error::argument("template", expected, parent));
            };
            children.push(node);
        }
        let mut order = vec![0];
        let mut template = Self { parents: vec![0], ranks: vec![0] };
        let mut next = 0;
        while let Some(&node) = order.get(next) {
            template.parents.extend(std::iter::repeat_n(next, children[node].len()));
            template.ranks.extend(0..children[node].len());
            order.extend(&children[node]);
            next += 1;
        }
        if template.len() < parents.len() {
            let lost = (1..=parents.len()).find(|node| !order.contains(node)).unwrap_or_default();
            let found = format!("node {lost}, which follows itself");
            return Err(Error::argument("template", "nodes that all descend from the root", found));
        }
        template.checked()
    }

    /// The `nodes` likeliest paths when a candidate of rank `r` is right with probability `ranks[r]`, at every depth.
    pub fn likeliest(nodes: usize, ranks: &[f32]) -> Result<Self> {
        if nodes > MAX_NODES {
            return Err(Error::argument("template", format!("at most {MAX_NODES} nodes"), nodes));
        }
        if let Some(wrong) = ranks.iter().find(|chance| !(0.0..=1.0).contains(*chance)) {
            return Err(Error::argument("template", "probabilities from 0 to 1", wrong));
        }
        if ranks.is_empty() {
            return Err(Error::argument("template", "the probability of at least one rank", 0));
        }
        // A node brings its first child and its next sibling, so every path is brought once and never before its parent.
        let mut heap = BinaryHeap::from([Path { chance: ranks[0], ranks: vec![0], parent: 0 }]);
        let mut found: Vec<usize> = Vec::with_capacity(nodes);
        while found.len() < nodes {
            let Some(Path { chance, ranks: path, parent }) = heap.pop() else { break };
            found.push(parent);
            let rank = path[path.len() - 1];
            let mut first = path.clone();
            first.push(0);
            heap.push(Path { chance: chance * ranks[0], ranks: first, parent: found.len() });
            if let Some(&next) = ranks.get(rank + 1) {
                let above = if ranks[rank] > 0.0 { chance / ranks[rank] } else { 0.0 };
                let mut sibling = path;
                sibling.pop();
                sibling.push(rank + 1);
                heap.push(Path { chance: (above * next).min(chance), ranks: sibling, parent });
            }
        }
        Self::from_parents(&found)
    }

    fn checked(self) -> Result<Self> {
        if self.is_empty() {
            return Err(Error::argument("template", "at least one node besides the root", 0));
        }
        Ok(self)
    }

    /// Nodes besides the root.
    pub fn len(&self) -> usize {
        self.parents.len() - 1
    }

    /// Never: a template has a node besides the root.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Parent and rank of the nodes behind the root, in breadth-first order; the root is node 0.
    pub fn nodes(&self) -> impl Iterator<Item = (usize, usize)> {
        self.parents.iter().copied().zip(self.ranks.iter().copied()).skip(1)
    }

    /// Candidates of a token that are needed.
    pub fn ranks(&self) -> usize {
        self.ranks.iter().max().map_or(0, |rank| rank + 1)
    }

    /// Nodes at each depth from 1 on.
    pub fn levels(&self) -> Vec<usize> {
        let mut depths: Vec<usize> = vec![0];
        let mut levels = Vec::new();
        for (parent, _) in self.nodes() {
            let depth = depths[parent] + 1;
            depths.push(depth);
            levels.resize(levels.len().max(depth), 0);
            levels[depth - 1] += 1;
        }
        levels
    }
}

/// A path of ranks from the root.
#[derive(Debug)]
struct Path {
    chance: f32,
    ranks: Vec<usize>,
    parent: usize,
}

impl Ord for Path {
    /// The likelier one is greater; of equals the shorter, then the one of lower ranks.
    fn cmp(&self, other: &Self) -> Ordering {
        let order = self.chance.total_cmp(&other.chance);
        order.then(other.ranks.len().cmp(&self.ranks.len())).then(other.ranks.cmp(&self.ranks))
    }
}

impl PartialOrd for Path {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Path {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Path {}

#[cfg(test)]
mod tests {
    use super::super::statistics::RANK_PRIORS;
    use super::*;

    #[test]
    fn the_paper_s_tree_has_its_levels() {
        let paper = Template::paper();
        assert_eq!((paper.len(), paper.ranks()), (80, 8));
        assert_eq!(paper.levels(), [8, 21, 25, 15, 8, 3]);
        let leaves = (0..=80).filter(|node| paper.nodes().all(|(parent, _)| parent != *node)).count();
        assert_eq!(leaves, 40);
    }

    #[test]
    fn what_is_no_tree_is_refused() {
        let message = |template: Result<Template>| template.expect_err("no tree").to_string();
        assert!(message(Template::from_counts(&[])).contains("at least one node"));
        assert!(message(Template::from_counts(&[0])).contains("at least one node"));
        assert!(message(Template::from_counts(&[1, 0, 2])).contains("node 2"));
        assert!(message(Template::from_counts(&[usize::MAX])).contains("255"));
        assert!(message(Template::from_counts(&[200, 56])).contains("255"));
        assert!(message(Template::from_parents(&[])).contains("at least one node"));
        assert!(message(Template::from_parents(&[0, 3, 2])).contains("follows itself"));
        assert!(message(Template::from_parents(&[1])).contains("follows itself"));
        assert!(message(Template::from_parents(&[0, 7])).contains("0 to 2"));
        assert!(message(Template::likeliest(0, &[0.5])).contains("at least one node"));
        assert!(message(Template::likeliest(3, &[])).contains("at least one rank"));
        assert!(message(Template::likeliest(3, &[f32::NAN])).contains("0 to 1"));
        assert!(Template::likeliest(MAX_NODES + 1, &[0.5]).is_err());
    }

    #[test]
    fn the_likeliest_paths_by_hand() {
        // 0 (.5), 1 (.3), 00 (.25), then 01 and 10 (.15): the lower path first.
        let template = Template::likeliest(4, &[0.5, 0.3]).expect("a tree");
        assert_eq!(template, Template::from_counts(&[2, 2]).expect("a tree"));
        let chain = Template::likeliest(5, &[0.9]).expect("a tree");
        assert_eq!(chain.levels(), [1; 5]);
        let large = Template::likeliest(80, &RANK_PRIORS).expect("a tree");
        let same =
            large.levels().iter().zip(Template::paper().levels()).map(|(a, b)| a.abs_diff(b)).sum::<usize>();
        assert!(same <= 14, "{:?}", large.levels());
        assert_eq!(Template::likeliest(3, &[0.0, 0.0]).expect("zeros are probabilities").len(), 3);
    }

    #[test]
    fn parents_in_any_order_make_the_same_tree() {
        let one = Template::from_parents(&[0, 0, 1, 1]).expect("a tree");
        assert_eq!(one, Template::from_counts(&[2, 2]).expect("a tree"));
        assert_eq!(one, Template::from_parents(&[3, 3, 0, 0]).expect("a tree"));
    }
}
