//! Fewer patches: which of an image's tokens the deeper layers of an encoder do without.
//!
//! Behind the attention of a pruning layer every patch gets a score, the best stay, and the others leave or are merged into
//! tokens that stay. Learned tokens (class, distillation, registers) always stay. How many stay depends on how many there are,
//! not on the image, so images of a batch keep as many tokens as each other.
//!
//! Whatever a method does is a [`Plan`]: each token behind the layer is a weighted sum of tokens before it, most of them of a
//! single one with weight 1.
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
use crate::kernels::attention::Graph;
use crate::score::similarity::{self, Features};
use crate::score::{self, PageRank, Ranks, Recorded, Start, heads, pagerank};
use crate::threads::Pool;

/// A vote has settled when a step changes scores by less than this in all.
pub const TOLERANCE: f32 = 1e-3;

/// What stays where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchPolicy {
    /// How patches are chosen.
    pub method: Method,
    /// The pruning layers, ascending.
    pub layers: Vec<usize>,
    /// For each of them how many patches leave for being like another one: those with a twin in Zero-TPrune, pairs merged in
    /// `ToMe`, none for methods that do not compare. Never more than half of the patches. Empty for none anywhere.
    #[serde(default)]
    pub remove: Vec<usize>,
    /// For each of them the share of the patches left by that that stays, rounded up; above 0 and at most 1.
    pub keep: Vec<f64>,
}

/// How many patches stay behind a pruning layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Those that leave for being like another one.
    pub remove: usize,
    /// Those that stay in the end.
    pub keep: usize,
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
    /// Like ones are merged: `ToMe` (Bolya et al., ICLR 2023, arXiv 2210.09461).
    #[serde(rename = "tome")]
    ToMe {
        /// Whether a token's key counts as many times as patches were merged into it, as in the paper.
        proportional: bool,
    },
    /// By `PageRank` of the attention graph, and without twins.
    #[serde(rename = "zero_tprune")]
    ZeroTPrune(ZeroTPrune),
}

/// The settings of Zero-TPrune.
///
/// Not stated in the paper, and chosen here: scores of a head are scaled to a mean of 1 before the variance is taken; where
/// no head passes all are kept; the second vote is on the graph of the tokens left, begins with the first one's scores, and
/// takes at most as many steps; votes for tokens that left are lost, and the others' scores scaled back to sum 1; steps end
/// early when they change scores by less than [`TOLERANCE`] in all, and are extrapolated to get there sooner; learned tokens
/// vote and are voted for, but are no candidates; features are the keys of all heads side by side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZeroTPrune {
    /// Steps of a vote; none for [`pagerank::iterations`] of the layer.
    pub iterations: Option<usize>,
    /// The class token begins with a score of the square root of the tokens' number, the others with 1 (variant "a").
    pub class_start: bool,
    /// Whether steps are extrapolated ([`PageRank::extrapolate`]); the paper's are not.
    pub extrapolate: bool,
    /// Least and largest variance of a head that is heard.
    pub variances: (f32, f32),
}

/// What is known of an image's tokens at a pruning layer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Evidence<'a> {
    /// The layer, and the number of layers.
    pub layer: (usize, usize),
    /// Which image of how many that come this way; a random choice depends on it.
    pub image: usize,
    /// All probabilities, where the method wants them ([`Method::wants`]).
    pub graph: Option<&'a Graph>,
    /// Attention received or the class token's row `[n]`, where the method wants that.
    pub scores: &'a [f32],
    /// Keys of all heads side by side, where the method wants them.
    pub keys: Features<'a>,
    /// How many patches each token stands for `[n]`; empty where nothing was merged.
    pub sizes: &'a [f32],
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
    /// What the tokens' keys are.
    Keys,
    /// Keys, and what each token gives each.
    Graph,
}

/// The tokens behind a pruning layer, each a weighted sum of those before it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// For each token the one whose place it has, and where its parts end.
    rows: Vec<(Option<usize>, usize)>,
    /// Tokens and weights.
    parts: Vec<(usize, f32)>,
}

impl Plan {
    /// The plan in which some tokens stay as they are.
    pub fn keeping(tokens: impl IntoIterator<Item = usize>) -> Self {
        let mut plan = Self::default();
        tokens.into_iter().for_each(|token| plan.push(Some(token), [(token, 1.0)]));
        plan
    }

    /// Adds a token that is the sum of `parts`; in the place of `own`, if it is one of those that stay.
    pub fn push(&mut self, own: Option<usize>, parts: impl IntoIterator<Item = (usize, f32)>) {
        self.parts.extend(parts);
        self.rows.push((own, self.parts.len()));
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether no token is left.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// For each token the one whose place it has, and its parts.
    pub fn rows(&self) -> impl Iterator<Item = (Option<usize>, &[(usize, f32)])> {
        let starts = std::iter::once(0).chain(self.rows.iter().map(|row| row.1));
        self.rows.iter().zip(starts).map(|(&(own, end), start)| (own, &self.parts[start..end]))
    }

    /// Appends the rows that become of `x`, rows of `width`.
    pub fn apply(&self, x: &[f32], width: usize, out: &mut Vec<f32>) {
        for (_, parts) in self.rows() {
            if let [(token, 1.0)] = parts {
                out.extend_from_slice(&x[token * width..][..width]);
                continue;
            }
            let first = out.len();
            out.resize(first + width, 0.0);
            for &(token, weight) in parts {
                let row = &x[token * width..][..width];
                out[first..].iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x);
            }
        }
    }
}

impl PatchPolicy {
    /// Checks a policy against an encoder of `depth` layers, with a class token or without.
    pub fn check(&self, depth: usize, class_token: bool) -> Result<()> {
        let wrong = |name: &str, expected: &str, found: String| {
            Err(Error::argument(format!("tokens.{name}"), expected, found))
        };
        let Self { method, layers, remove, keep } = self;
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
        if !(remove.is_empty() || remove.len() == layers.len()) {
            return wrong(
                "remove",
                &format!("a number for each of {} layers", layers.len()),
                format!("{remove:?}"),
            );
        }
        if !method.compares() && remove.iter().any(|count| *count > 0) {
            return wrong("remove", "0, for the method compares nothing", format!("{remove:?}"));
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

    /// How many of `patches` stay behind a layer; none where all do.
    pub fn budget(&self, layer: usize, patches: usize) -> Option<Budget> {
        let step = self.layers.binary_search(&layer).ok()?;
        let remove = self.remove.get(step).map_or(0, |remove| *remove).min(patches / 2);
        // A share like 0.7 is a little more or less than it says; 0.7 of 10 is 7 all the same.
        let keep = (self.keep[step] * (patches - remove) as f64 - 1e-9).ceil().max(0.0) as usize;
        // Pairs are made of two halves.
        let least = if matches!(self.method, Method::ToMe { .. }) { patches - patches / 2 } else { 1 };
        let keep = keep.clamp(least.min(patches), patches);
        (keep < patches).then_some(Budget { remove, keep })
    }

    /// How many tokens of `patches` are left behind a layer, that of merged ones among them.
    pub fn left(&self, layer: usize, patches: usize) -> usize {
        let fused = matches!(self.method, Method::ClassRow { fuse: true });
        self.budget(layer, patches).map_or(patches, |budget| budget.keep + usize::from(fused))
    }
}

impl Method {
    /// What it wants to know.
    pub fn wants(&self) -> Wants {
        match self {
            Self::Random { .. } => Wants::Nothing,
            Self::Received {} => Wants::Received,
            Self::ClassRow { .. } => Wants::ClassRow,
            Self::ToMe { .. } => Wants::Keys,
            Self::ZeroTPrune(_) => Wants::Graph,
        }
    }

    /// Whether it looks for tokens that are like others.
    pub fn compares(&self) -> bool {
        matches!(self, Self::ToMe { .. } | Self::ZeroTPrune(_))
    }

    /// Whether it makes means, in which a token counts as often as the patches it stands for.
    pub fn merges(&self) -> bool {
        matches!(self, Self::ToMe { .. })
    }

    /// Whether keys count as often as the patches they stand for: the logarithm of that is added to their scores.
    pub fn proportional(&self) -> bool {
        matches!(self, Self::ToMe { proportional: true })
    }

    /// Whether tokens leave behind the whole layer and not between its attention and its feed-forward block.
    pub fn behind_the_layer(&self) -> bool {
        matches!(self, Self::ZeroTPrune(_))
    }

    /// Says what becomes of `n` tokens.
    pub fn plan(
        &self,
        pool: &Pool,
        kernels: &Kernels,
        evidence: &Evidence<'_>,
        n: usize,
        budget: Budget,
    ) -> Result<Plan> {
        let learned = evidence.learned;
        let best = |scores: &[f32]| {
            let mut keep = Vec::new();
            highest(&scores[learned..], budget.keep, &mut keep);
            (0..learned).chain(keep.into_iter().map(|patch| learned + patch)).collect::<Vec<_>>()
        };
        match self {
            Self::Random { seed } => {
                let draw = |token: usize| random(*seed, [evidence.layer.0, evidence.image, token]);
                let scores: Vec<f32> = (0..n).map(draw).collect();
                Ok(Plan::keeping(best(&scores)))
            }
            Self::Received {} | Self::ClassRow { fuse: false } => Ok(Plan::keeping(best(evidence.scores))),
            Self::ClassRow { fuse: true } => {
                let keep = best(evidence.scores);
                let gone: Vec<_> = (0..n)
                    .filter(|token| keep.binary_search(token).is_err())
                    .map(|token| (token, evidence.scores[token]))
                    .collect();
                let mut plan = Plan::keeping(keep);
                if !gone.is_empty() {
                    plan.push(None, gone);
                }
                Ok(plan)
            }
            Self::ToMe { .. } => merge(pool, kernels, evidence, n, budget),
            Self::ZeroTPrune(settings) => {
                Ok(Plan::keeping(settings.choose(pool, kernels, evidence, n, budget)?))
            }
        }
    }
}

/// `ToMe`: like tokens become one, their mean weighted by how many patches each stands for.
fn merge(pool: &Pool, kernels: &Kernels, evidence: &Evidence<'_>, n: usize, budget: Budget) -> Result<Plan> {
    let dim = evidence.keys.dim / evidence.heads;
    let mut features = vec![0.0; n * dim];
    for (token, feature) in features.chunks_exact_mut(dim).enumerate() {
        // The sum over heads has the cosines of the mean.
        for key in evidence.keys.row(token).chunks_exact(dim) {
            feature.iter_mut().zip(key).for_each(|(sum, x)| *sum += x);
        }
    }
    let count = n - evidence.learned - budget.keep;
    let pairs = similarity::bipartite(pool, kernels, &features, dim, count, evidence.learned)?;
    let mut members = vec![Vec::new(); n];
    for (&from, &into) in pairs.from.iter().zip(&pairs.into) {
        members[into].push(from);
    }
    let size = |token: usize| evidence.sizes.get(token).copied().unwrap_or(1.0);
    let mut plan = Plan::default();
    for (token, members) in members.iter().enumerate() {
        if pairs.from.binary_search(&token).is_ok() {
            continue;
        }
        let all = || std::iter::once(token).chain(members.iter().copied());
        let total: f32 = all().map(size).sum();
        plan.push(Some(token), all().map(|part| (part, size(part) / total)));
    }
    Ok(plan)
}

impl ZeroTPrune {
    fn choose(
        &self,
        pool: &Pool,
        kernels: &Kernels,
        evidence: &Evidence<'_>,
        n: usize,
        budget: Budget,
    ) -> Result<Vec<usize>> {
        let Some(graph) = evidence.graph else {
            return Err(Error::argument("attention graph", "that of the layer", "none"));
        };
        let learned = evidence.learned;
        let (layer, depth) = evidence.layer;
        let settings = PageRank {
            iterations: self.iterations.unwrap_or_else(|| pagerank::iterations(layer, depth)),
            tolerance: TOLERANCE,
            damping: 1.0,
            start: if self.class_start {
                Start::Emphasised { token: 0, factor: (n as f32).sqrt() }
            } else {
                Start::Uniform
            },
            extrapolate: self.extrapolate,
        };
        let votes = Recorded { kernel: kernels.attention, graph };
        let mut ranks = score::pagerank(pool, &votes, &settings)?;
        let mut left: Vec<usize> = (0..n).collect();
        if budget.remove > 0 {
            let importance = self.importance(&ranks, evidence.heads, &left)?;
            let gone = twins(pool, kernels, evidence, &importance, budget.remove)?;
            left.retain(|token| gone.binary_search(token).is_err());
            if left.len() - learned > budget.keep {
                ranks = pagerank::settle(pool, &votes, &settings, ranks.scores, &gone)?;
            }
        }
        let importance = self.importance(&ranks, evidence.heads, &left)?;
        let mut keep = Vec::new();
        highest(&importance[learned..], budget.keep, &mut keep);
        Ok((0..learned).chain(keep.into_iter().map(|patch| left[learned + patch])).collect())
    }

    /// The importance of the tokens `left`.
    fn importance(&self, ranks: &Ranks, count: usize, left: &[usize]) -> Result<Vec<f32>> {
        let n = ranks.scores.len() / count.max(1);
        let scores: Vec<f32> =
            ranks.scores.chunks_exact(n).flat_map(|scores| left.iter().map(|&token| scores[token])).collect();
        let (least, most) = self.variances;
        let kept = heads::informative(&scores, count, least..=most)?;
        heads::emphasise(&scores, count, &kept)
    }
}

/// The `count` patches of the less important half that are most like one of the other half, ascending.
fn twins(
    pool: &Pool,
    kernels: &Kernels,
    evidence: &Evidence<'_>,
    importance: &[f32],
    count: usize,
) -> Result<Vec<usize>> {
    let mut order: Vec<usize> = (evidence.learned..importance.len()).collect();
    let value =
        |token: &usize| if importance[*token].is_nan() { f32::NEG_INFINITY } else { importance[*token] };
    order.sort_by(|a, b| value(a).total_cmp(&value(b)).then(b.cmp(a)));
    let (candidates, others) = order.split_at(order.len() / 2);
    let keys = &evidence.keys;
    let found = similarity::matches(pool, kernels, keys.of(candidates), keys.of(others), keys.dim)?;
    let mut closest = Vec::new();
    highest(&found.cosine, count, &mut closest);
    let mut gone: Vec<usize> = closest.into_iter().map(|twin| candidates[twin]).collect();
    gone.sort_unstable();
    Ok(gone)
}

/// A number from 0 to 1 that depends on the seed and the place only.
fn random(seed: u64, place: [usize; 3]) -> f32 {
    let bits = place.iter().fold(mix(seed), |state, part| mix(state ^ *part as u64));
    (bits >> 40) as f32 * (1.0 / (1_u32 << 24) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(method: &Method, evidence: &Evidence<'_>, n: usize, budget: [usize; 2]) -> Plan {
        let (pool, kernels) = (Pool::new(2).expect("threads"), Kernels::best());
        let [remove, keep] = budget;
        method.plan(&pool, &kernels, evidence, n, Budget { remove, keep }).expect("good")
    }

    fn nothing<'a>() -> Evidence<'a> {
        Evidence { layer: (3, 12), heads: 1, learned: 1, ..Evidence::default() }
    }

    #[test]
    fn scores_choose_and_the_rest_is_fused() {
        let evidence = Evidence { scores: &[0.0, 0.1, 0.4, 0.2, 0.3], ..nothing() };
        let mut plan = Plan::keeping([0, 2, 4]);
        assert_eq!(choose(&Method::Received {}, &evidence, 5, [0, 2]), plan);
        plan.push(None, [(1, 0.1), (3, 0.2)]);
        assert_eq!(choose(&Method::ClassRow { fuse: true }, &evidence, 5, [0, 2]), plan);
        let all = Plan::keeping(0..5);
        assert_eq!(choose(&Method::ClassRow { fuse: true }, &evidence, 5, [0, 4]), all);
        let mut rows = vec![];
        plan.apply(&[1., 2., 3., 4., 5., 6., 7., 8., 9., 10.], 2, &mut rows);
        assert_eq!(rows[..6], [1., 2., 5., 6., 9., 10.]);
        assert!((rows[6] - 1.7).abs() < 1e-6 && (rows[7] - 2.0).abs() < 1e-6 && plan.len() == 4);
    }

    #[test]
    fn chance_depends_on_the_seed_alone() {
        let pick = |seed, image| -> Vec<usize> {
            let plan = choose(&Method::Random { seed }, &Evidence { image, ..nothing() }, 101, [0, 50]);
            plan.rows().filter_map(|row| row.0).collect()
        };
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
        let pool = Pool::new(1).expect("one");
        let kernel = Kernels::best().attention;
        let graph = Graph::from_f32(&pool, kernel, &row.repeat(7), 1, 7).expect("good");
        // Patch 6, of the less important half, has the direction of patch 2; 1 and 3 are like nobody.
        let keys = [0., 0., 1., 0., 0., 1., -1., 0., 1., 1., 0., -1., 0., 3.];
        let evidence = Evidence {
            graph: Some(&graph),
            keys: Features { values: &keys, stride: 2, dim: 2 },
            ..nothing()
        };
        let settings =
            ZeroTPrune { iterations: None, class_start: false, extrapolate: true, variances: (0.01, 0.7) };
        let keep = |budget| choose(&Method::ZeroTPrune(settings.clone()), &evidence, 7, budget);
        assert_eq!(keep([1, 5]), Plan::keeping([0, 1, 2, 3, 4, 5]));
        assert_eq!(keep([0, 4]), Plan::keeping([0, 2, 4, 5, 6]));
        assert_eq!(keep([1, 3]), Plan::keeping([0, 2, 4, 5]));
    }

    #[test]
    fn like_tokens_become_their_mean() {
        // Two heads of two dimensions; in the sum over them 2 is like 5 and 4 like 1, and 0 is the class token.
        let keys = [
            9., 9., 9., 9., 0., 1., 0., 0., 1., 0., 1., 0., -1., 1., 0., 1., 0., 0., 0.1, 1., 2., 0., 0., 0.,
        ];
        let sizes = [1., 2., 3., 1., 2., 1.];
        let evidence = Evidence {
            keys: Features { values: &keys, stride: 4, dim: 4 },
            sizes: &sizes,
            heads: 2,
            ..nothing()
        };
        let mut plan = Plan::keeping([0, 1, 3, 4]);
        plan.push(Some(5), [(5, 0.25), (2, 0.75)]);
        let tome = Method::ToMe { proportional: true };
        assert_eq!(choose(&tome, &evidence, 6, [1, 4]), plan);
        let mut both = Plan::keeping([0]);
        both.push(Some(1), [(1, 0.5), (4, 0.5)]);
        both.push(Some(3), [(3, 1.0)]);
        both.push(Some(5), [(5, 0.25), (2, 0.75)]);
        assert_eq!(choose(&tome, &evidence, 6, [2, 3]), both);
        let plain = choose(&tome, &Evidence { sizes: &[], ..evidence }, 6, [1, 4]);
        assert_eq!(plain.rows().last().expect("a row").1, [(5, 0.5), (2, 0.5)]);
    }

    #[test]
    fn counts_and_bad_policies() {
        let policy = PatchPolicy {
            method: Method::Received {},
            layers: vec![1, 3],
            remove: vec![],
            keep: vec![0.7, 0.01],
        };
        let kept =
            |policy: &PatchPolicy, layer, patches| policy.budget(layer, patches).map(|b| (b.remove, b.keep));
        assert_eq!(
            (kept(&policy, 0, 10), kept(&policy, 1, 10), kept(&policy, 1, 11)),
            (None, Some((0, 7)), Some((0, 8)))
        );
        assert_eq!(
            (kept(&policy, 3, 10), kept(&policy, 3, 1), kept(&policy, 3, 0)),
            (Some((0, 1)), None, None)
        );
        let settings =
            ZeroTPrune { iterations: None, class_start: false, extrapolate: true, variances: (0.0, 1.0) };
        let zero = PatchPolicy {
            method: Method::ZeroTPrune(settings),
            layers: vec![1, 3],
            remove: vec![4, 4],
            keep: vec![1.0, 0.5],
        };
        assert_eq!(
            (kept(&zero, 1, 10), kept(&zero, 3, 10), kept(&zero, 1, 3)),
            (Some((4, 6)), Some((4, 3)), Some((1, 2)))
        );
        let tome =
            PatchPolicy { method: Method::ToMe { proportional: true }, keep: vec![1.0, 0.2], ..zero.clone() };
        assert_eq!((kept(&tome, 1, 11), kept(&tome, 3, 11)), (Some((4, 7)), Some((4, 6))));
        let evit = PatchPolicy { method: Method::ClassRow { fuse: true }, ..policy.clone() };
        assert_eq!((evit.left(1, 10), evit.left(2, 10), policy.left(1, 10)), (8, 10, 7));
        assert!(
            policy.check(4, false).is_ok() && zero.check(4, false).is_ok() && policy.check(3, true).is_err()
        );
        let bad = |change: &dyn Fn(&mut PatchPolicy)| {
            let mut policy = policy.clone();
            change(&mut policy);
            policy.check(4, false).is_err()
        };
        assert!(
            bad(&|p| p.layers = vec![]) && bad(&|p| p.layers = vec![3, 1]) && bad(&|p| p.layers = vec![1])
        );
        assert!(bad(&|p| p.keep = vec![0.0, 1.0]) && bad(&|p| p.keep = vec![0.5, f64::NAN]));
        assert!(bad(&|p| p.remove = vec![1, 1]) && bad(&|p| p.method = Method::ClassRow { fuse: false }));
        let short = PatchPolicy { remove: vec![4], ..zero };
        assert!(short.check(4, false).is_err());
    }
}
