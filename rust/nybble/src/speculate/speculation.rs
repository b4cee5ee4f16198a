//! The loop: draft, compute, choose, learn.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::cost::Times;
use super::datastore::{Datastore, Retrieval};
use super::draft_model::DraftModel;
use super::ngram::Ngram;
use super::pairs::{PairTable, Pairs};
use super::random::Random;
use super::recycle::{Matrix, Recycle, SharedMatrix, lock};
use super::settings::{Settings, Source, Start};
use super::statistics::Statistics;
use super::suffix::Suffix;
use super::tree::DraftTree;
use super::{Draft, Step, Text};
use crate::decode::{DraftMetrics, Generation};
use crate::error::{Error, Result};
use crate::model::{Model, Session};

/// Most rows of a measured tree.
const MOST_ROWS: usize = 64;

/// New tokens from which measuring what they cost is worth it.
const LONG: usize = 16;

/// Steps without a draft worth computing after which drafting becomes rarer.
const PATIENCE: usize = 16;

/// Steps between two drafts, at most, while drafts do not pay.
const RARELY: usize = 16;

/// Share of a new time in the mean of drafting's.
const NEWS: f64 = 0.05;

/// How large trees are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// What pays by the times measured on this machine.
    Measured,
    /// Always so many nodes, the likeliest ones.
    Nodes(usize),
    /// All that is drafted.
    All,
}

/// What the texts of a model share.
#[derive(Debug)]
pub struct Speculator {
    settings: Settings,
    vocab: usize,
    matrix: SharedMatrix,
    pairs: Arc<Mutex<PairTable>>,
    shared: Arc<Mutex<Shared>>,
    datastore: Option<Arc<Datastore>>,
    model: Option<Arc<Model>>,
}

/// What is learned from all texts.
#[derive(Debug, Default)]
struct Shared {
    statistics: Statistics,
    times: Option<Times>,
}

impl Speculator {
    /// Reads what the settings name.
    pub fn new(model: &Model, settings: Settings) -> Result<Self> {
        settings.check()?;
        if model.settings().log2_softmax {
            let detail = "a tree of drafts needs the exact softmax";
            return Err(Error::unsupported("speculation with softmax \"log2\"", detail));
        }
        let vocab = model.spec().vocab;
        let matrix = match &settings.matrix {
            Some(path) => {
                let matrix = Matrix::load(path, vocab)?;
                if matrix.k() != settings.k {
                    let expected = format!("{} candidates a token", settings.k);
                    return Err(Error::format(path, "k", expected, matrix.k().to_string()));
                }
                matrix
            }
            None => Matrix::new(vocab, settings.k)?,
        };
        let matrix = Arc::new(Mutex::new(matrix));
        Recycle::new(Arc::clone(&matrix), settings.template()?)?; // the template fits the matrix
        let datastore = settings.index.as_ref().map(|path| Datastore::open(path, vocab)).transpose()?;
        let small = settings.model.as_ref().map(|path| super::draft_model::open(path, model)).transpose()?;
        Ok(Self {
            settings,
            vocab,
            matrix,
            pairs: Arc::default(),
            shared: Arc::default(),
            datastore: datastore.map(Arc::new),
            model: small.map(Arc::new),
        })
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What several rows cost, if it is known.
    pub fn times(&self) -> Option<Times> {
        lock(&self.shared).times.clone()
    }

    /// Makes known what several rows cost, measured earlier with the same model on the same machine.
    pub fn set_times(&self, times: Times) {
        lock(&self.shared).times = Some(times);
    }

    /// Probability that the first, second, ... candidate of a token is its successor at that depth, as seen so far.
    pub fn ranks(&self, depth: usize) -> Vec<f32> {
        lock(&self.shared).statistics.ranks(depth).to_vec()
    }

    /// Saves the adjacency matrix.
    pub fn save_matrix(&self, path: &Path) -> Result<()> {
        lock(&self.matrix).save(path)
    }

    /// Forgets everything but what rows cost.
    pub fn forget(&self) {
        lock(&self.matrix).clear();
        lock(&self.pairs).clear();
        lock(&self.shared).statistics = Statistics::default();
    }

    /// Speculation for a text of `model`, which must be the one it was made for, or one that is the same but for its weights.
    pub fn speculation(&self, model: &Model) -> Result<Speculation> {
        let (vocab, settings) = (model.spec().vocab, model.settings());
        if vocab != self.vocab || settings.log2_softmax {
            let expected = format!("a model of {} tokens with the exact softmax", self.vocab);
            return Err(Error::argument("speculator", expected, format!("one of {vocab} tokens")));
        }
        let template = self.settings.template()?;
        let size = match (&template, self.settings.nodes) {
            (Some(_), _) => Size::All,
            (None, Some(nodes)) => Size::Nodes(nodes),
            (None, None) => Size::Measured,
        };
        let mut drafts: Vec<Box<dyn Draft>> = Vec::new();
        for source in &self.settings.sources {
            drafts.push(match source {
                Source::Suffix => Box::new(Suffix::default()),
                Source::Pairs => Box::new(Pairs::new(match self.settings.start {
                    Start::Hot => Arc::clone(&self.pairs),
                    Start::Cold => Arc::default(),
                })),
                Source::Ngram => Box::new(Ngram::default()),
                Source::Random => Box::new(Random::new(self.vocab, 0)),
                Source::Recycle => {
                    let matrix = match self.settings.start {
                        Start::Hot => Arc::clone(&self.matrix),
                        Start::Cold => Arc::new(Mutex::new(Matrix::new(self.vocab, self.settings.k)?)),
                    };
                    Box::new(Recycle::new(matrix, template.clone())?)
                }
                Source::Retrieval => match &self.datastore {
                    Some(store) => Box::new(Retrieval::new(Arc::clone(store))),
                    None => return Err(Error::argument("draft.index", "a datastore", "none")),
                },
                Source::Model => match &self.model {
                    Some(model) => Box::new(DraftModel::new(Arc::clone(model))),
                    None => return Err(Error::argument("draft.model", "a model", "none")),
                },
            });
        }
        // These continue what the others begin, the surer one first.
        drafts.sort_by_key(|draft| {
            ["pairs", "recycle"].iter().position(|name| *name == draft.name()).map_or(0, |i| i + 1)
        });
        let mut speculation = Speculation::new(drafts, size);
        speculation.shared = Arc::clone(&self.shared);
        Ok(speculation)
    }
}

/// Speculation for one text.
pub struct Speculation {
    drafts: Vec<Box<dyn Draft>>,
    size: Size,
    shared: Arc<Mutex<Shared>>,
    tree: DraftTree,
    order: Vec<usize>,
    tokens: Vec<u32>,
    parents: Vec<usize>,
    /// Where nodes of the draft tree stand among those computed.
    places: Vec<usize>,
    /// Steps in a row that computed no draft, and steps until the next drafting.
    idle: usize,
    wait: usize,
    /// Mean seconds of drafting and learning.
    overhead: f64,
}

impl std::fmt::Debug for Speculation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.drafts.iter().map(|draft| draft.name()).collect();
        f.debug_struct("Speculation")
            .field("drafts", &names)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl Speculation {
    /// Speculation with drafters of one's own, which shares nothing with other texts.
    pub fn new(drafts: Vec<Box<dyn Draft>>, size: Size) -> Self {
        Self {
            drafts,
            size,
            shared: Arc::default(),
            tree: DraftTree::default(),
            order: Vec::new(),
            tokens: Vec::new(),
            parents: Vec::new(),
            places: Vec::new(),
            idle: 0,
            wait: 0,
            overhead: 0.0,
        }
    }

    /// The next token of `generation`, as [`Generation::step`].
    pub fn step(
        &mut self,
        generation: &mut Generation,
        model: &Model,
        session: &mut Session,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<u32>> {
        let begins = generation.metrics().draft.is_none();
        if begins {
            generation.metrics_mut().draft = Some(DraftMetrics::default());
        }
        if !generation.awaits_drafts() {
            let computed = generation.metrics().prefill_tokens;
            let token = generation.step(model, session, stop)?;
            if generation.metrics().prefill_tokens > computed
                && let Some((&last, earlier)) = session.tokens().split_last()
            {
                self.learn(generation, &[last], &[0], earlier.last().copied(), model.spec().vocab);
            }
            return Ok(token);
        }
        self.measure(generation, model, session, stop)?;
        let start = Instant::now();
        let nodes = self.draft(generation, model.context() - session.len())?;
        let drafted = start.elapsed().as_secs_f64();

        self.tokens.clear();
        self.parents.clear();
        self.places.clear();
        let root = generation.history().last().copied().unwrap_or_default();
        self.tokens.push(root);
        self.parents.push(0);
        self.places.resize(self.tree.nodes().len(), 0);
        for &node in &self.order[..nodes] {
            let drafted = &self.tree.nodes()[node];
            self.places[node] = self.tokens.len();
            self.parents.push(self.places[drafted.parent]);
            self.tokens.push(drafted.token);
        }
        let (known, before) = (generation.history().len(), generation.metrics().decode_seconds);
        if nodes == 0 {
            let token = generation.step(model, session, stop)?;
            self.after(generation, model.spec().vocab, known, before, drafted);
            return Ok(token);
        }
        let given = generation.verify(model, session, &self.tokens, &self.parents, stop)?;
        if given.is_some() {
            self.after(generation, model.spec().vocab, known, before, drafted);
        }
        generation.step(model, session, stop)
    }

    /// Learns from a pass over `self.tokens`, before which `known` tokens were known.
    fn after(&mut self, generation: &mut Generation, vocab: usize, known: usize, before: f64, drafted: f64) {
        let seconds = generation.metrics().decode_seconds - before;
        if seconds <= 0.0 {
            return; // it ended without a pass
        }
        let rows = self.tokens.len();
        let stopped = usize::from(generation.stop_token().is_some());
        {
            let chosen = generation.history()[known..].iter().copied().chain(generation.stop_token());
            let mut shared = lock(&self.shared);
            let mut at = 0;
            for token in chosen {
                let mut next = None;
                for child in self.tree.children(at) {
                    let node = &self.tree.nodes()[child];
                    for &kind in node.kinds().iter().chain(&node.agreed) {
                        shared.statistics.count(kind, node.token == token);
                    }
                    if node.token == token {
                        next = Some(child);
                    }
                }
                let Some(next) = next else { break };
                at = next;
            }
            if let Some(times) = &mut shared.times {
                times.note(rows, seconds);
            }
        }
        let tokens = generation.history().len() - known + stopped;
        let before = known.checked_sub(2).map(|place| generation.history()[place]);
        let (nodes, parents) = (std::mem::take(&mut self.tokens), std::mem::take(&mut self.parents));
        let learned = self.learn(generation, &nodes, &parents, before, vocab);
        (self.tokens, self.parents) = (nodes, parents);
        self.overhead += NEWS * (drafted + learned - self.overhead);
        let plain = lock(&self.shared).times.as_ref().map(|times| times.of(1));
        let metrics = generation.metrics_mut();
        let (all, steps) = (metrics.decode_tokens as f64, metrics.decode_steps as f64);
        let decode = metrics.decode_seconds;
        let Some(draft) = &mut metrics.draft else { return };
        draft.count(tokens, rows - 1);
        draft.draft_seconds += drafted;
        if rows > 1 {
            draft.verify_seconds += seconds;
        }
        draft.mean_accepted = Some(all / steps);
        draft.tokens_per_second = Some(all / (decode + draft.draft_seconds + draft.learn_seconds));
        draft.plain_tokens_per_second = plain.map(|seconds| 1.0 / seconds);
    }

    /// Shows the drafters a pass, and returns the seconds it took.
    fn learn(
        &mut self,
        generation: &mut Generation,
        tokens: &[u32],
        parents: &[usize],
        before: Option<u32>,
        vocab: usize,
    ) -> f64 {
        let start = Instant::now();
        let step = Step { tokens, parents, before, logits: generation.logits(), vocab };
        for draft in &mut self.drafts {
            draft.learn(&step);
        }
        let seconds = start.elapsed().as_secs_f64();
        if let Some(draft) = &mut generation.metrics_mut().draft {
            draft.learn_seconds += seconds;
        }
        seconds
    }

    /// Makes the draft tree, and returns how many of its nodes in `self.order` to compute; there is room for `room` rows.
    fn draft(&mut self, generation: &Generation, room: usize) -> Result<usize> {
        let tokens = generation.history();
        self.tree.reset(tokens.last().copied().unwrap_or_default());
        self.order.clear();
        // Beyond the tokens asked for, every draft is in vain.
        let most = room.min(generation.left()).saturating_sub(1);
        let depth = most;
        let unknown = self.size == Size::Measured && lock(&self.shared).times.is_none();
        if most == 0 || unknown {
            return Ok(0);
        }
        if self.wait > 0 {
            self.wait -= 1;
            return Ok(0);
        }
        let shared = lock(&self.shared);
        for draft in &mut self.drafts {
            draft.propose(&Text { tokens }, &mut self.tree, &shared.statistics)?;
        }
        self.tree.settle(&shared.statistics);
        self.tree.by_reach(&mut self.order);
        let nodes = self.tree.nodes();
        self.order.retain(|&node| nodes[node].depth <= depth);
        let available = self.order.len().min(room - 1);
        let chosen = match self.size {
            Size::All => available,
            Size::Nodes(nodes) => available.min(nodes),
            Size::Measured => {
                let most = available.min(MOST_ROWS - 1);
                let best = |times: &Times| times.best(&self.tree, &self.order, self.overhead, most);
                shared.times.as_ref().map_or(0, best)
            }
        };
        if chosen > 0 {
            self.idle = 0;
        } else {
            self.idle += 1;
            self.wait = self.idle.saturating_sub(PATIENCE).min(RARELY);
        }
        Ok(chosen)
    }

    /// Measures what several rows cost here, if that is needed and not known.
    fn measure(
        &mut self,
        generation: &mut Generation,
        model: &Model,
        session: &mut Session,
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        if self.size != Size::Measured || lock(&self.shared).times.is_some() {
            return Ok(());
        }
        let room = model.context() - session.len();
        if generation.left() < LONG || room < LONG {
            return Ok(());
        }
        let start = Instant::now();
        let last = generation.history().last().copied().unwrap_or_default();
        let mut logits = Vec::new();
        let times = Times::measure(room.min(MOST_ROWS), |rows| {
            let parents: Vec<usize> = (0..rows).map(|node: usize| node.saturating_sub(1)).collect();
            session.forward_tree(model, &vec![last; rows], &parents, &mut logits, stop)?;
            session.accept(&[])
        })?;
        lock(&self.shared).times = Some(times);
        if let Some(draft) = &mut generation.metrics_mut().draft {
            draft.measure_seconds += start.elapsed().as_secs_f64();
        }
        Ok(())
    }
}
