//! The token loop.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::metrics::GenerationMetrics;
use super::sampler::{Sampler, Sampling};
use crate::error::{Error, Result};
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
    /// What the session held, the prompt, and the tokens given out.
    history: Vec<u32>,
    logits: Vec<f32>, // [vocab]
    finish: Option<FinishReason>,
    stop_token: Option<u32>,
    metrics: GenerationMetrics,
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
            logits: Vec::new(),
            stop_token: None,
            metrics: GenerationMetrics::default(),
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
        if self.finish.is_some() {
            return Ok(None);
        }
        let first = self.metrics.generated_tokens == 0 && self.metrics.decode_tokens == 0;
        if !first && session.len() + self.pending.len() > model.context() {
            self.finish = Some(FinishReason::Context);
            return Ok(None);
        }
        let start = Instant::now();
        if first {
            session.prefill(model, &self.pending, Logits::Last, &mut self.logits, stop)?;
        } else {
            session.forward(model, &self.pending, Logits::Last, &mut self.logits, stop)?;
        }
        let computed = Instant::now();
        let token = self.sampler.sample(&mut self.logits, &self.history)?;
        self.metrics.sample_seconds += computed.elapsed().as_secs_f64();
        let seconds = (computed - start).as_secs_f64();
        if first {
            self.metrics.prefill_tokens += self.pending.len();
            self.metrics.prefill_seconds += seconds;
            self.metrics.layer_tokens = session.layer_tokens().collect();
            self.metrics.kv_bytes = session.kv_bytes();
        } else {
            self.metrics.decode_tokens += self.pending.len();
            self.metrics.decode_seconds += seconds;
        }
        self.pending.clear();
        self.pending.push(token);
        if self.request.stop.contains(&token) {
            self.stop_token = Some(token);
            self.finish = Some(FinishReason::Stop);
            return Ok(None);
        }
        self.history.push(token);
        self.metrics.generated_tokens += 1;
        if self.metrics.generated_tokens == self.request.max_new {
            self.finish = Some(FinishReason::Length);
        }
        Ok(Some(token))
    }

    /// Why it ended, once it has.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish
    }

    /// The stop token that ended it.
    pub fn stop_token(&self) -> Option<u32> {
        self.stop_token
    }

    /// The logits of the last step, `[vocab]`, after the repeat penalty.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// What it measured so far.
    pub fn metrics(&self) -> &GenerationMetrics {
        &self.metrics
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
