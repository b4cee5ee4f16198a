//! Fewer patches: which of an image's tokens the deeper layers of an encoder do without.
//!
//! Behind the attention of a pruning layer every patch gets a score, the best stay, and the others leave or are merged into
//! one token. Learned tokens (class, distillation, registers) always stay. How many stay depends on how many there are, not
//! on the image, so images of a batch keep as many tokens as each other.
//!
//! [`Method::ZeroTPrune`] is Zero-TPrune (Wang et al., CVPR 2024, arXiv 2305.17328), which has no public official code, in its
//! order I', S, I: one vote to order the tokens, removal of those that have a twin, a second vote among those left. What the
//! paper leaves open is said at [`ZeroTPrune`].

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use super::criterion::random::mix;
use super::select::highest;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::score::{self, PageRank, Start, heads, pagerank, similarity};
use crate::threads::Pool;

/// What stays where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchPolicy {
    /// How patches are chosen.
    pub method: Method,
    /// The pruning layers, ascending.
    pub layers: Vec<usize>,
    /// For each of them the share of the patches reaching it that stays, rounded up; above 0 and at most 1. With Zero-TPrune of
    /// the patches that are left when those with a twin are gone.
    pub keep: Vec<f64>,
}

/// How patches are chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Method {
    /// By nothing: the measure of all others.
    Random {
        /// Of the choice.
        seed: u64,
    },
    /// By the attention they get, the mean over heads and all queries.
    Received {},
    /// By the attention they get from the class token: `EViT` (Liang et al., ICLR 2022, arXiv 2202.07800), training-free.
    ClassRow {
        /// The others become one token, their sum weighted by their scores, as in the paper; else they leave.
        fuse: bool,
    },
    /// By `PageRank` of the attention graph, and without twins.
    #[serde(rename = "zero_tprune")]
    ZeroTPrune(ZeroTPrune),
}

/// The settings of Zero-TPrune.
///
/// Not stated in the paper, and chosen here: scores of a head are scaled to a mean of 1 before the variance is taken; where
/// no head passes all are kept; the second vote is on the graph of the tokens left, with rows scaled to sum 1 again, and as
/// many steps as the first; steps end early when they change scores by less than 1e-3 in all; learned tokens vote and are
/// voted for, but are no candidates; features are the keys of all heads side by side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZeroTPrune {
    /// Tokens that a pruning layer removes for having a twin (the S stage); never more than half of them.
    pub similar: usize,
    /// Steps of a vote; none for [`pagerank::iterations`] of the layer.
    pub iterations: Option<usize>,
    /// The class token begins with a score of the square root of the tokens' number, the others with 1 (variant "a").
    pub class_start: bool,
    /// Least and largest variance of a head that is heard.
    pub variances: (f32, f32),
}

/// What is known of an image's tokens at a pruning layer.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// The layer, and the number of layers.
    pub layer: (usize, usize),
    /// Which image of how many that come this way; a random choice depends on it.
    pub image: usize,
    /// Probabilities `[heads, n, n]`, where the method wants them ([`Method::wants`]).
    pub attention: &'a [f32],
    /// Attention received or the class token's row `[n]`, where the method wants that.
    pub scores: &'a [f32],
    /// Keys `[n, dim]` of all heads side by side.
    pub keys: &'a [f32],
    /// Number of heads.
    pub heads: usize,
    /// Learned tokens at the beginning.
    pub learned: usize,
}

/// What a method wants to know of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// Nothing.
    Nothing,
    /// What each token gets of all.
    Received,
    /// What each token gets of the class token.
    ClassRow,
    /// Everything.
    Each,
}

/// The tokens behind a pruning layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    /// Those that stay, ascending, learned ones among them.
    pub keep: Vec<usize>,
    /// A further token is the sum of these, with these weights.
    pub fused: Option<Vec<(usize, f32)>>,
}

impl PatchPolicy {
    /// Checks a policy against an encoder of `depth` layers, with a class token or without.
    pub fn check(&self, depth: usize, class_token: bool) -> Result<()> {
        let wrong = |name: &str, expected: &str, found: String| {
            Err(Error::argument(format!("tokens.{name}"), expected, found))
        };
        let Self { method, layers, keep } = self;
        if layers.is_empty()
            || !layers.is_sorted_by(|a, b| a < b)
            || layers.last().is_some_and(|l| *l >= depth)
        {
            return wrong(
                "layers",
                &format!("layers below {depth} in ascending order"),
                format!("{layers:?}"),
            );
        }
        if keep.len() != layers.len() || !keep.iter().all(|share| *share > 0.0 && *share <= 1.0) {
            let expected = format!("a share above 0 and at most 1 for each of {} layers", layers.len());
            return wrong("keep", &expected, format!("{keep:?}"));
        }
        match method {
            Method::ClassRow { .. } if !class_token => {
                let item = "choosing patches by the class token's attention in a model without one";
                return Err(Error::unsupported(item, "attention received needs none"));
            }
            Method::ZeroTPrune(ZeroTPrune { class_start: true, .. }) if !class_token => {
                let item = "class_start in a model without a class token";
                return Err(Error::unsupported(item, "votes that begin equal need none"));
            }
            Method::ZeroTPrune(ZeroTPrune { variances: (least, most), .. })
                if least.partial_cmp(most).is_none_or(Ordering::is_gt) =>
            {
                return wrong("variances", "the least and the largest", format!("{least}, {most}"));
            }
            _ => {}
        }
        Ok(())
    }

    /// How many of `patches` stay behind a layer; none if it is no pruning layer.
    pub fn kept(&self, layer: usize, patches: usize) -> Option<usize> {
        let step = self.layers.binary_search(&layer).ok()?;
        // A share like 0.7 is a little more or less than it says; 0.7 of 10 is 7 all the same.
        let twins = match &self.method {
            Method::ZeroTPrune(settings) => settings.similar.min(patches / 2),
            _ => 0,
        };
        let kept = (self.keep[step] * (patches - twins) as f64 - 1e-9).ceil().max(0.0) as usize;
        Some(kept.clamp(1.min(patches), patches))
    }
}

impl Method {
    /// What it wants to know.
    pub fn wants(&self) -> Wants {
        match self {
            Self::Random { .. } => Wants::Nothing,
            Self::Received {} => Wants::Received,
            Self::ClassRow { .. } => Wants::ClassRow,
            Self::ZeroTPrune(_) => Wants::Each,
        }
    }

    /// Whether tokens leave behind the whole layer and not between its attention and its feed-forward block.
    pub fn behind_the_layer(&self) -> bool {
        matches!(self, Self::ZeroTPrune(_))
    }

    /// Chooses `count` of the patches among `n` tokens.
    pub fn choose(
        &self,
        pool: &Pool,
        kernels: &Kernels,
        evidence: &Evidence<'_>,
        n: usize,
        count: usize,
    ) -> Result<Choice> {
        let learned = evidence.learned;
        let best = |scores: &[f32]| {
            let mut keep = Vec::new();
            highest(&scores[learned..], count, &mut keep);
            (0..learned).chain(keep.into_iter().map(|patch| learned + patch)).collect::<Vec<_>>()
        };
        match self {
            Self::Random { seed } => {
                let draw = |token: usize| random(*seed, [evidence.layer.0, evidence.image, token]);
                let scores: Vec<f32> = (0..n).map(draw).collect();
                Ok(Choice { keep: best(&scores), fused: None })
            }
            Self::Received {} | Self::ClassRow { fuse: false } => {
                Ok(Choice { keep: best(evidence.scores), fused: None })
            }
            Self::ClassRow { fuse: true } => {
                let keep = best(evidence.scores);
                let gone = (0..n).filter(|token| keep.binary_search(token).is_err());
                let fused: Vec<_> = gone.map(|token| (token, evidence.scores[token])).collect();
                Ok(Choice { keep, fused: (!fused.is_empty()).then_some(fused) })
            }
            Self::ZeroTPrune(settings) => {
                let keep = settings.choose(pool, kernels, evidence, n, count)?;
                Ok(Choice { keep, fused: None })
            }
        }
    }
}

impl ZeroTPrune {
    fn choose(
        &self,
        pool: &Pool,
        kernels: &Kernels,
        evidence: &Evidence<'_>,
        n: usize,
        count: usize,
    ) -> Result<Vec<usize>> {
        let learned = evidence.learned;
        let mut left: Vec<usize> = (learned..n).collect();
        let removed = self.similar.min(left.len().saturating_sub(count)).min(left.len() / 2);
        let graph; // of the tokens that the twins left behind
        let mut votes = evidence.attention;
        let mut all: Vec<usize> = (0..n).collect();
        if removed > 0 {
            let importance = self.vote(pool, kernels, votes, evidence, n)?;
            drop_twins(pool, kernels, evidence, &importance, removed, &mut left)?;
            all = (0..learned).chain(left.iter().copied()).collect();
            graph = among(pool, kernels, votes, evidence.heads, n, &all);
            votes = &graph;
        }
        let importance = self.vote(pool, kernels, votes, evidence, all.len())?;
        let mut keep = Vec::new();
        highest(&importance[learned..], count, &mut keep);
        Ok((0..learned).chain(keep.into_iter().map(|patch| all[learned + patch])).collect())
    }

    /// The importance of each of `n` tokens.
    fn vote(
        &self,
        pool: &Pool,
        kernels: &Kernels,
        attention: &[f32],
        evidence: &Evidence<'_>,
        n: usize,
    ) -> Result<Vec<f32>> {
        let (layer, depth) = evidence.layer;
        let settings = PageRank {
            iterations: self.iterations.unwrap_or_else(|| pagerank::iterations(layer, depth)),
            tolerance: 1e-3,
            damping: 1.0,
            start: if self.class_start {
                Start::Emphasised { token: 0, factor: (n as f32).sqrt() }
            } else {
                Start::Uniform
            },
        };
        let ranks = score::pagerank(pool, kernels.elementwise, attention, evidence.heads, n, &settings)?;
        let (least, most) = self.variances;
        let kept = heads::informative(&ranks.scores, evidence.heads, least..=most)?;
        heads::emphasise(&ranks.scores, evidence.heads, &kept)
    }
}

/// Takes `count` of the less important half of the patches `left` away, those most like one of the other half.
fn drop_twins(
    pool: &Pool,
    kernels: &Kernels,
    evidence: &Evidence<'_>,
    importance: &[f32],
    count: usize,
    left: &mut Vec<usize>,
) -> Result<()> {
    let mut order = left.clone();
    let value =
        |token: &usize| if importance[*token].is_nan() { f32::NEG_INFINITY } else { importance[*token] };
    order.sort_by(|a, b| value(a).total_cmp(&value(b)).then(b.cmp(a)));
    let (candidates, others) = order.split_at(left.len() / 2);
    let dim = evidence.keys.len() / (importance.len().max(1));
    let rows = |tokens: &[usize]| -> Vec<f32> {
        tokens.iter().flat_map(|&token| &evidence.keys[token * dim..][..dim]).copied().collect()
    };
    let found = similarity::matches(pool, kernels, &rows(candidates), &rows(others), dim)?;
    let mut twins = Vec::new();
    highest(&found.cosine, count, &mut twins);
    let mut gone: Vec<usize> = twins.into_iter().map(|twin| candidates[twin]).collect();
    gone.sort_unstable();
    left.retain(|token| gone.binary_search(token).is_err());
    Ok(())
}

/// The graph of some of `n` tokens, with rows scaled to sum 1.
fn among(
    pool: &Pool,
    kernels: &Kernels,
    attention: &[f32],
    heads: usize,
    n: usize,
    tokens: &[usize],
) -> Vec<f32> {
    let width = tokens.len();
    let mut graph = vec![0.0; heads * width * width];
    if graph.is_empty() {
        return graph;
    }
    pool.split_rows(&mut graph, width, &|first, rows| {
        for (index, row) in (first..).zip(rows.chunks_exact_mut(width)) {
            let from = &attention[(index / width * n + tokens[index % width]) * n..][..n];
            for (to, &token) in row.iter_mut().zip(tokens) {
                *to = from[token];
            }
            let sum: f32 = row.iter().sum();
            if sum > 0.0 {
                kernels.elementwise.scale(row, 1.0 / sum);
            }
        }
    });
    graph
}

/// A number from 0 to 1 that depends on the seed and the place only.
fn random(seed: u64, place: [usize; 3]) -> f32 {
    let bits = place.iter().fold(mix(seed), |state, part| mix(state ^ *part as u64));
    (bits >> 40) as f32 * (1.0 / (1_u32 << 24) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(method: &Method, evidence: &Evidence<'_>, n: usize, count: usize) -> Choice {
        let (pool, kernels) = (Pool::new(2).expect("threads"), Kernels::best());
        method.choose(&pool, &kernels, evidence, n, count).expect("good")
    }

    const NOTHING: Evidence<'_> =
        Evidence { layer: (3, 12), image: 0, attention: &[], scores: &[], keys: &[], heads: 1, learned: 1 };

    #[test]
    fn scores_choose_and_the_rest_is_fused() {
        let evidence = Evidence { scores: &[0.0, 0.1, 0.4, 0.2, 0.3], ..NOTHING };
        let keep = vec![0, 2, 4];
        let received = choose(&Method::Received {}, &evidence, 5, 2);
        assert_eq!(received, Choice { keep: keep.clone(), fused: None });
        let fused = choose(&Method::ClassRow { fuse: true }, &evidence, 5, 2);
        assert_eq!(fused, Choice { keep, fused: Some(vec![(1, 0.1), (3, 0.2)]) });
        assert_eq!(choose(&Method::ClassRow { fuse: true }, &evidence, 5, 4).fused, None);
    }

    #[test]
    fn chance_depends_on_the_seed_alone() {
        let pick =
            |seed, image| choose(&Method::Random { seed }, &Evidence { image, ..NOTHING }, 101, 50).keep;
        assert_eq!(pick(1, 0), pick(1, 0));
        assert!(pick(1, 0) != pick(2, 0) && pick(1, 0) != pick(1, 1));
        assert!(pick(1, 0).len() == 51 && pick(1, 0)[0] == 0);
        let mut counts = vec![0; 101];
        (0..400).flat_map(|image| pick(7, image)).for_each(|token| counts[token] += 1);
        assert!(counts[0] == 400 && counts[1..].iter().all(|count| (140..260).contains(count)), "{counts:?}");
    }

    #[test]
    fn twins_leave_before_the_unimportant() {
        // Six patches and a class token; all attend to tokens in proportion to these.
        let row = [0.1, 0.05, 0.3, 0.05, 0.25, 0.15, 0.1];
        let attention = row.repeat(7);
        // Patch 6, of the less important half, has the direction of patch 2; 1 and 3 are like nobody.
        let keys = [0., 0., 1., 0., 0., 1., -1., 0., 1., 1., 0., -1., 0., 3.];
        let evidence = Evidence { attention: &attention, keys: &keys, ..NOTHING };
        let settings =
            ZeroTPrune { similar: 1, iterations: None, class_start: false, variances: (0.01, 0.7) };
        let one = |similar| Method::ZeroTPrune(ZeroTPrune { similar, ..settings.clone() });
        assert_eq!(choose(&one(1), &evidence, 7, 5).keep, [0, 1, 2, 3, 4, 5]);
        assert_eq!(choose(&one(0), &evidence, 7, 4).keep, [0, 2, 4, 5, 6]);
        assert_eq!(choose(&one(1), &evidence, 7, 3).keep, [0, 2, 4, 5]);
        // Never more twins than tokens that have to go.
        assert_eq!(choose(&one(3), &evidence, 7, 6).keep, [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn counts_and_bad_policies() {
        let policy = PatchPolicy { method: Method::Received {}, layers: vec![1, 3], keep: vec![0.7, 0.01] };
        assert_eq!((policy.kept(0, 10), policy.kept(1, 10), policy.kept(1, 11)), (None, Some(7), Some(8)));
        assert_eq!((policy.kept(3, 10), policy.kept(3, 0)), (Some(1), Some(0)));
        let twins = ZeroTPrune { similar: 4, iterations: None, class_start: false, variances: (0.0, 1.0) };
        let zero =
            PatchPolicy { method: Method::ZeroTPrune(twins), layers: vec![1, 3], keep: vec![1.0, 0.5] };
        assert_eq!((zero.kept(1, 10), zero.kept(3, 10), zero.kept(1, 3)), (Some(6), Some(3), Some(2)));
        assert!(policy.check(4, false).is_ok() && policy.check(3, true).is_err());
        let bad = |change: &dyn Fn(&mut PatchPolicy)| {
            let mut policy = policy.clone();
            change(&mut policy);
            policy.check(4, false).is_err()
        };
        assert!(
            bad(&|p| p.layers = vec![]) && bad(&|p| p.layers = vec![3, 1]) && bad(&|p| p.layers = vec![1])
        );
        assert!(bad(&|p| p.keep = vec![0.0, 1.0]) && bad(&|p| p.keep = vec![0.5, f64::NAN]));
        assert!(bad(&|p| p.method = Method::ClassRow { fuse: false }));
    }
}
