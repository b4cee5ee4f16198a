//! The token loop.

use std::collections::VecDeque;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::metrics::{GenerationMetrics, SparsityMetrics};
use super::sampler::{Sampler, Sampling};
use crate::error::{Error, Result};
use crate::model::sparsity::Skipped;
use crate::model::{Logits, Model, Session};

/// New tokens for which there is memory from the start.
const HISTORY: usize = 1 << 16;

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// It gave as many tokens as asked for.
    Length,
    /// A stop token was chosen; it is not given out.
    Stop,
    /// The model's context is full.
    Context,
}

impl FinishReason {
    /// `length`, `stop` or `context`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Stop => "stop",
            Self::Context => "context",
        }
    }
}

/// What to generate.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Tokens to compute before the first new one, behind those the session holds already. The session's policy may reduce
    /// them, and only them.
    pub prompt: Vec<u32>,
    /// Most tokens to give out.
    pub max_new: usize,
    /// Tokens that end the text.
    pub stop: Vec<u32>,
    /// How to choose.
    pub sampling: Sampling,
}

/// A generation under way, apart from the model and the session it runs on.
#[derive(Debug)]
pub struct Generation {
    request: Request,
    sampler: Sampler,
    /// Tokens that the next step computes.
    pending: Vec<u32>,
    /// What the session held, the prompt, and the tokens chosen.
    history: Vec<u32>,
    /// Chosen tokens that were not given out yet.
    ready: VecDeque<u32>,
    /// Tokens chosen that are given out sooner or later.
    chosen: usize,
    started: bool,
    vocab: usize,
    logits: Vec<f32>, // [rows, vocab]
    path: Vec<usize>,
    finish: Option<FinishReason>,
    stop_token: Option<u32>,
    metrics: GenerationMetrics,
    /// What the session had skipped before.
    before: Skipped,
}

impl Generation {
    /// Prepares a generation on `session`; the prompt and the settings are checked, nothing is computed.
    pub fn new(model: &Model, session: &Session, request: Request) -> Result<Self> {
        let sampler = Sampler::new(request.sampling.clone())?;
        session.check(model, &request.prompt)?;
        if let Some(&token) = request.stop.iter().find(|&&token| token as usize >= model.spec().vocab) {
            return Err(Error::argument("stop", format!("token ids below {}", model.spec().vocab), token));
        }
        // Room for all there can be: nothing allocates in the token loop.
        let room = model.context().min(session.len() + request.prompt.len() + request.max_new.min(HISTORY));
        let mut history = Vec::with_capacity(room);
        history.extend_from_slice(session.tokens());
        history.extend_from_slice(&request.prompt);
        Ok(Self {
            pending: request.prompt.clone(),
            finish: (request.max_new == 0).then_some(FinishReason::Length),
            request,
            sampler,
            history,
            ready: VecDeque::with_capacity(1),
            chosen: 0,
            started: false,
            vocab: model.spec().vocab,
            logits: Vec::new(),
            path: Vec::new(),
            stop_token: None,
            metrics: GenerationMetrics::default(),
            before: session.skipped(),
        })
    }

    /// The next token, or none when the generation has ended. `stop` is polled while the model runs; when it says so, the
    /// step fails with [`Error::Interrupted`] and may be tried again.
    pub fn step(
        &mut self,
        model: &Model,
        session: &mut Session,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<u32>> {
        if let Some(token) = self.give() {
            return Ok(Some(token));
        }
        if self.ended(model, session) {
            return Ok(None);
        }
        let start = Instant::now();
        if self.started {
            session.forward(model, &self.pending, Logits::Last, &mut self.logits, stop)?;
        } else {
            session.prefill(model, &self.pending, Logits::Last, &mut self.logits, stop)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        self.note_skipped(session);
        if self.started {
            self.count(self.pending.len(), seconds);
        } else {
            self.metrics.prefill_tokens += self.pending.len();
            self.metrics.prefill_seconds += seconds;
            self.metrics.layer_tokens = session.layer_tokens().collect();
            self.metrics.kv_bytes = session.kv_bytes();
            self.started = true;
        }
        self.choose(0)?;
        Ok(self.give())
    }

    /// A step that computes drafts beside the next token: node 0 of a tree is that token, every other node a guess of what
    /// follows its parent (see [`Session::forward_tree`]). At each node a token is chosen as [`Generation::step`] would, from
    /// the same logits with the same random numbers, and as long as it is one of the node's children, that child is next:
    /// what is chosen never depends on the guesses. [`Generation::step`] then gives out the tokens.
    ///
    /// Returns the nodes at which tokens were chosen, whose children along the path they are; the logits of all nodes are
    /// [`Generation::logits`]. None if the generation has ended. It must have begun with a [`Generation::step`], all of whose
    /// tokens were given out.
    pub fn verify(
        &mut self,
        model: &Model,
        session: &mut Session,
        tokens: &[u32],
        parents: &[usize],
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<&[usize]>> {
        if !self.started || !self.ready.is_empty() || self.pending.first() != tokens.first() {
            let expected = "drafts behind the last token, once it was given out";
            return Err(Error::argument("tree", expected, format!("one from {:?}", tokens.first())));
        }
        if self.ended(model, session) {
            return Ok(None);
        }
        let start = Instant::now();
        session.forward_tree(model, tokens, parents, &mut self.logits, stop)?;
        self.path.clear();
        self.path.push(0);
        loop {
            let node = self.path[self.path.len() - 1];
            let token = match self.choose(node) {
                Ok(token) => token,
                Err(error) => {
                    session.accept(&[])?;
                    return Err(error);
                }
            };
            if self.finish.is_some() {
                break;
            }
            let child = (node + 1..tokens.len()).find(|&at| parents[at] == node && tokens[at] == token);
            let Some(child) = child else { break };
            self.path.push(child);
        }
        session.accept(&self.path)?;
        self.note_skipped(session);
        self.count(self.path.len(), start.elapsed().as_secs_f64());
        Ok(Some(&self.path))
    }

    /// Whether it has ended; it has when the next token does not fit into the context.
    fn ended(&mut self, model: &Model, session: &Session) -> bool {
        if self.finish.is_none() && self.started && session.len() + self.pending.len() > model.context() {
            self.finish = Some(FinishReason::Context);
        }
        self.finish.is_some()
    }

    /// Takes note of what the session has skipped.
    fn note_skipped(&mut self, session: &Session) {
        let Some(sparsity) = session.sparsity() else { return };
        let (now, before) = (session.skipped(), self.before);
        let neurons = now.neurons - before.neurons;
        let inactive = neurons - (now.active - before.active);
        self.metrics.sparsity = Some(SparsityMetrics {
            measured_speedup: sparsity.speedup(),
            scattered: sparsity.scattered(),
            sparse_layers: sparsity.sparse_layers(),
            sparse_blocks: now.sparse - before.sparse,
            dense_blocks: now.dense - before.dense,
            sparse_linears: sparsity.sparse_linears(),
            skipped_linears: now.linears - before.linears,
            inactive_neurons: (neurons > 0).then(|| inactive as f64 / neurons as f64),
        });
    }

    /// Counts a pass after the first one.
    fn count(&mut self, tokens: usize, seconds: f64) {
        self.metrics.decode_tokens += tokens;
        self.metrics.decode_steps += 1;
        self.metrics.decode_seconds += seconds;
    }

    /// Chooses the token behind a row of the logits: it is the next to be computed, and to be given out unless it ends the
    /// text.
    fn choose(&mut self, row: usize) -> Result<u32> {
        let start = Instant::now();
        let vocab = self.vocab;
        let token = self.sampler.sample(&mut self.logits[row * vocab..][..vocab], &self.history)?;
        self.metrics.sample_seconds += start.elapsed().as_secs_f64();
        self.pending.clear();
        self.pending.push(token);
        if self.request.stop.contains(&token) {
            self.stop_token = Some(token);
            self.finish = Some(FinishReason::Stop);
            return Ok(token);
        }
        self.history.push(token);
        self.ready.push_back(token);
        self.chosen += 1;
        if self.chosen == self.request.max_new {
            self.finish = Some(FinishReason::Length);
        }
        Ok(token)
    }

    /// Gives out a chosen token.
    fn give(&mut self) -> Option<u32> {
        let token = self.ready.pop_front()?;
        self.metrics.generated_tokens += 1;
        Some(token)
    }

    /// Whether the prompt was computed and every chosen token given out, but it has not ended: then [`Generation::verify`] may
    /// be called.
    pub fn awaits_drafts(&self) -> bool {
        self.started && self.ready.is_empty() && self.finish.is_none()
    }

    /// What the session held, the prompt, and the tokens chosen; the last of them is not computed yet.
    pub fn history(&self) -> &[u32] {
        &self.history
    }

    /// Tokens that may still be chosen.
    pub fn left(&self) -> usize {
        self.request.max_new - self.chosen
    }

    /// Why it ended, once it has.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish.filter(|_| self.ready.is_empty())
    }

    /// The stop token that ended it.
    pub fn stop_token(&self) -> Option<u32> {
        self.stop_token
    }

    /// The logits of the last step, `[vocab]`, or `[nodes, vocab]`; after the repeat penalty where a token was chosen.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// What it measured so far.
    pub fn metrics(&self) -> &GenerationMetrics {
        &self.metrics
    }

    /// The same, for whoever drafts.
    pub(crate) fn metrics_mut(&mut self) -> &mut GenerationMetrics {
        &mut self.metrics
    }
}

/// A [`Generation`] with its model and session, as an iterator of tokens.
pub struct Generator<'a> {
    model: &'a Model,
    session: &'a mut Session,
    generation: Generation,
    stop: &'a dyn Fn() -> bool,
    failed: bool,
}

impl std::fmt::Debug for Generator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl<'a> Generator<'a> {
    /// An iterator over the tokens of `request`; `stop` as for [`Generation::step`].
    pub fn new(
        model: &'a Model,
        session: &'a mut Session,
        request: Request,
        stop: &'a dyn Fn() -> bool,
    ) -> Result<Self> {
        let generation = Generation::new(model, session, request)?;
        Ok(Self { model, session, generation, stop, failed: false })
    }

    /// The loop's state.
    pub fn generation(&self) -> &Generation {
        &self.generation
    }
}

impl Iterator for Generator<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let token = self.generation.step(self.model, self.session, self.stop).transpose();
        self.failed = matches!(token, Some(Err(_)));
        token
    }
}
