//! How to speculate.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::template::Template;
use super::tree::MAX_NODES;
use crate::error::{Error, Result};

/// Where drafts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The adjacency matrix of Token Recycling.
    Recycle,
    /// Recycling by pairs of tokens.
    Pairs,
    /// Prompt lookup.
    Ngram,
    /// A suffix automaton over the conversation.
    Suffix,
    /// A datastore of text.
    Retrieval,
    /// A small model.
    Model,
    /// Chance.
    Random,
}

/// What a text finds in the adjacency matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// What earlier texts left.
    #[default]
    Hot,
    /// Nothing.
    Cold,
}

/// A tree of a fixed shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Shape {
    /// `"paper"`: the 80 nodes of Token Recycling.
    Name(String),
    /// Numbers of children in breadth-first order.
    Counts(Vec<usize>),
}

/// How to speculate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where drafts come from.
    pub sources: Vec<Source>,
    /// Candidates of a token in the adjacency matrix.
    pub k: usize,
    /// What a text finds in the adjacency matrix.
    pub start: Start,
    /// Always the likeliest so many nodes, whether it pays or not; none measures what pays.
    pub nodes: Option<usize>,
    /// Always this tree, from the adjacency matrix alone.
    pub template: Option<Shape>,
    /// File with an adjacency matrix to start from.
    pub matrix: Option<PathBuf>,
    /// Datastore of the source `retrieval`.
    pub index: Option<PathBuf>,
    /// Model of the source `model`.
    pub model: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sources: vec![Source::Suffix, Source::Pairs, Source::Recycle],
            k: 8,
            start: Start::Hot,
            nodes: None,
            template: None,
            matrix: None,
            index: None,
            model: None,
        }
    }
}

impl Settings {
    /// Reads settings from JSON.
    pub fn read(json: &str) -> Result<Self> {
        let settings: Self = serde_json::from_str(json)
            .map_err(|error| Error::argument("draft", "settings of speculation", error))?;
        settings.check()?;
        Ok(settings)
    }

    /// Refuses settings that mean nothing.
    pub fn check(&self) -> Result<()> {
        let wrong = |name: &str, expected: &str, found: &dyn std::fmt::Display| {
            Err(Error::argument(format!("draft.{name}"), expected, found.to_string()))
        };
        if self.sources.is_empty() {
            return wrong("sources", "at least one source of drafts", &"none");
        }
        if self.nodes.is_some_and(|nodes| !(1..=MAX_NODES).contains(&nodes)) {
            return wrong("nodes", &format!("1 to {MAX_NODES}"), &self.nodes.unwrap_or_default());
        }
        if self.template.is_some() && (self.nodes.is_some() || self.sources != [Source::Recycle]) {
            return wrong("template", "the source recycle alone, and no number of nodes", &"others");
        }
        if self.sources.contains(&Source::Retrieval) != self.index.is_some() {
            return wrong(
                "index",
                "a datastore for the source retrieval, and only for it",
                &"only one of them",
            );
        }
        if self.sources.contains(&Source::Model) != self.model.is_some() {
            return wrong("model", "a model for the source model, and only for it", &"only one of them");
        }
        self.template()?;
        Ok(())
    }

    /// The fixed tree, if there is one.
    pub fn template(&self) -> Result<Option<Template>> {
        match &self.template {
            None => Ok(None),
            Some(Shape::Counts(counts)) => Template::from_counts(counts).map(Some),
            Some(Shape::Name(name)) if name == "paper" => Ok(Some(Template::paper())),
            Some(Shape::Name(name)) => Err(Error::argument(
                "draft.template",
                "\"paper\" or numbers of children",
                format!("{name:?}"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_strictly() {
        assert_eq!(Settings::read("{}").expect("defaults"), Settings::default());
        let paper = Settings::read(r#"{"sources": ["recycle"], "template": "paper"}"#).expect("good");
        assert_eq!(paper.template().expect("good").map(|template| template.len()), Some(80));
        for (json, word) in [
            (r#"{"source": []}"#, "source"),
            (r#"{"sources": []}"#, "at least one"),
            (r#"{"sources": ["warp"]}"#, "warp"),
            (r#"{"nodes": 0}"#, "1 to 255"),
            (r#"{"nodes": 256}"#, "1 to 255"),
            (r#"{"nodes": -1}"#, "-1"),
            (r#"{"template": "paper"}"#, "recycle alone"),
            (r#"{"sources": ["recycle"], "template": "thesis"}"#, "thesis"),
            (r#"{"sources": ["recycle"], "template": [1, 0, 1]}"#, "node 2"),
            (r#"{"sources": ["recycle"], "template": []}"#, "at least one node"),
            (r#"{"sources": ["retrieval"]}"#, "index"),
            (r#"{"model": "x"}"#, "model"),
            ("3", "settings"),
        ] {
            let message = Settings::read(json).expect_err(json).to_string();
            assert!(message.contains(word), "{json}: {message}");
        }
    }
}
