//! A small model of the same vocabulary drafts for a large one.
//!
//! "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., arXiv 2211.17192), without its rejection: the
//! large model chooses as always, and the small one's likeliest tokens are guesses of that. A chain of its first choices is
//! drafted as long as it is sure of them, and its second choices are branches.

use std::path::Path;
use std::sync::Arc;

use super::statistics::{self, Statistics};
use super::top::top;
use super::tree::DraftTree;
use super::{Draft, Text};
use crate::error::{Error, Result};
use crate::model::{LoadOptions, Logits, Model, Session};

/// Tokens of a chain.
const DEPTH: usize = 8;

/// Choices drafted at each place.
const CHOICES: usize = 3;

/// A chain less likely than this is not continued.
const LEAST_REACH: f32 = 0.1;

/// Opens a draft model for `large`, to run on as many threads.
pub(super) fn open(path: &Path, large: &Model) -> Result<Model> {
    let options = LoadOptions { threads: Some(large.pool().threads()), ..LoadOptions::default() };
    let small = Model::open(path, &options)?;
    let (vocab, found) = (large.spec().vocab, small.spec().vocab);
    if vocab != found {
        let expected = format!("a model with the {vocab} tokens of the one it drafts for");
        return Err(Error::argument("draft.model", expected, format!("{} with {found}", path.display())));
    }
    Ok(small)
}

/// Drafts with a small model.
#[derive(Debug)]
pub struct DraftModel {
    model: Arc<Model>,
    session: Session,
    logits: Vec<f32>,
}

impl DraftModel {
    /// Drafts with this model, whose vocabulary must be that of the texts.
    pub fn new(model: Arc<Model>) -> Self {
        let session = model.session();
        Self { model, session, logits: Vec::new() }
    }
}

impl Draft for DraftModel {
    fn name(&self) -> &'static str {
        "model"
    }

    fn propose(&mut self, text: &Text<'_>, tree: &mut DraftTree, statistics: &Statistics) -> Result<()> {
        let tokens = text.tokens;
        // The last token is computed in any case: its logits are needed.
        let most = tokens.len().saturating_sub(1).min(self.session.len());
        let known = self.session.tokens();
        let shared = (0..most).find(|&i| known[i] != tokens[i]).unwrap_or(most);
        let shared = self.session.truncate(shared);
        let mut next = tokens[shared..].to_vec();
        let mut node = 0;
        for _ in 0..DEPTH {
            if next.is_empty() || self.session.len() + next.len() > self.model.context() {
                break;
            }
            self.session.forward(&self.model, &next, Logits::Last, &mut self.logits, &|| false)?;
            let (mut best, mut values) = ([0; CHOICES], [0.0; CHOICES]);
            let found = top(&self.logits, &mut best, &mut values);
            let sum: f32 = self.logits.iter().map(|logit| (logit - values[0]).exp()).sum();
            let mut first = None;
            for (&token, value) in best[..found].iter().zip(values) {
                let kind = statistics::model((value - values[0]).exp() / sum);
                let child = tree.add(node, token, kind, statistics);
                first = first.or(child);
            }
            let Some(child) = first else { break };
            if tree.nodes()[child].reach < LEAST_REACH {
                break;
            }
            node = child;
            next = vec![tree.nodes()[child].token];
        }
        Ok(())
    }
}
