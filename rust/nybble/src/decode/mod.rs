//! From logits to tokens: samplers, the token loop, and what it measured.
//!
//! [`Sampler`] turns one row of logits into a token id. [`Generation`] is the loop: each [`Generation::step`] runs the model
//! once and gives the next token, and says in the end why it stopped. It owns no model, so a caller may keep several of them,
//! stop between any two tokens, and continue a session with another prompt. [`Generator`] is the same as an iterator.
//!
//! [`Generation::verify`] is a step that may give several tokens: it computes guesses of what follows beside the next token
//! ([`crate::speculate`] makes them) and keeps those that are what the sampler chooses anyway.

#![forbid(unsafe_code)]

mod generator;
mod metrics;
mod rng;
mod sampler;

pub use generator::{FinishReason, Generation, Generator, Request};
pub use metrics::{DraftMetrics, GenerationMetrics, SparsityMetrics};
pub use rng::Rng;
pub use sampler::{Sampler, Sampling};
