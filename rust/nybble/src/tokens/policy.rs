//! The settings of token reduction.

use serde::Serialize;
use serde_json::{Map, Value};

use super::Criterion;
use crate::error::{Error, Result};

/// The positions of tokens behind others that are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// As in the text, with gaps.
    Kept,
    /// Counted anew in each layer, without gaps.
    Renumbered,
}

/// What becomes of the tokens that score lowest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Action {
    /// Deeper layers do without them.
    #[serde(rename = "drop")]
    Drop,
    /// From there on the inputs of their linears behind attention have 4 bits instead of 8.
    #[serde(rename = "4bit")]
    FourBit,
}

/// Which tokens of a prompt are reduced, where and how.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Policy {
    /// What makes a token worth keeping.
    pub criterion: Criterion,
    /// The share of a prompt's tokens that is reduced behind the last pruning layer, at least 0 and below 1.
    pub ratio: f64,
    /// The pruning layers, ascending; none for [`super::budget::default_layers`].
    pub layers: Option<Vec<usize>>,
    /// The positions of those that stay.
    pub positions: Positions,
    /// What becomes of the others.
    pub action: Action,
    /// Prompts of fewer tokens are left alone.
    pub min_prompt: usize,
    /// Of a criterion that draws.
    pub seed: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            criterion: Criterion::START,
            ratio: 0.0,
            layers: None,
            positions: Positions::Kept,
            action: Action::Drop,
            min_prompt: 64,
            seed: 0,
        }
    }
}

impl Policy {
    /// Reads settings: an object with the fields' names. What is not there has its default; a key that is not known is an
    /// error.
    pub fn read(settings: &Value) -> Result<Self> {
        let Value::Object(map) = settings else {
            return Err(wrong("tokens", "an object", settings));
        };
        let mut policy = Self::default();
        for (key, value) in map {
            policy.set(key, value)?;
        }
        policy.check()?;
        Ok(policy)
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<()> {
        let name = format!("tokens.{key}");
        let text = || value.as_str().ok_or_else(|| wrong(&name, "a text", value));
        let number = |expected| value.as_u64().ok_or_else(|| wrong(&name, expected, value));
        match key {
            "criterion" => self.criterion = Criterion::parse(text()?)?,
            "ratio" => self.ratio = value.as_f64().ok_or_else(|| wrong(&name, RATIO, value))?,
            "layers" => self.layers = layers(value).ok_or_else(|| wrong(&name, LAYERS, value))?,
            "positions" => {
                self.positions = match text()? {
                    "kept" => Positions::Kept,
                    "renumbered" => Positions::Renumbered,
                    _ => return Err(wrong(&name, "\"kept\" or \"renumbered\"", value)),
                }
            }
            "action" => {
                self.action = match text()? {
                    "drop" => Action::Drop,
                    "4bit" => Action::FourBit,
                    _ => return Err(wrong(&name, "\"drop\" or \"4bit\"", value)),
                }
            }
            "min_prompt" => {
                self.min_prompt = usize::try_from(number("a number of tokens")?).unwrap_or(usize::MAX);
            }
            "seed" => self.seed = number("a whole number from 0 to 2^64 - 1")?,
            _ => {
                let known: Map<String, Value> = match serde_json::to_value(Self::default()) {
                    Ok(Value::Object(map)) => map,
                    _ => Map::new(),
                };
                let known: Vec<_> = known.keys().map(String::as_str).collect();
                return Err(Error::unsupported(name, format!("{} are read", known.join(", "))));
            }
        }
        Ok(())
    }

    /// Checks the ranges.
    pub fn check(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.ratio) {
            return Err(Error::argument("tokens.ratio", RATIO, self.ratio));
        }
        if let Some(layers) = &self.layers
            && (layers.is_empty() || !layers.is_sorted_by(|a, b| a < b))
        {
            return Err(Error::argument("tokens.layers", LAYERS, format!("{layers:?}")));
        }
        Ok(())
    }
}

const RATIO: &str = "a share of tokens to leave out, at least 0 and below 1";
const LAYERS: &str = "layers in ascending order, at least one";

/// The list, or none for null; nothing of another kind.
#[expect(clippy::option_option, reason = "null is a value here")]
fn layers(value: &Value) -> Option<Option<Vec<usize>>> {
    match value {
        Value::Null => Some(None),
        Value::Array(list) => {
            let layer = |value: &Value| value.as_u64().and_then(|layer| usize::try_from(layer).ok());
            list.iter().map(layer).collect::<Option<_>>().map(Some)
        }
        _ => None,
    }
}

fn wrong(name: &str, expected: &str, found: &Value) -> Error {
    let mut text = found.to_string();
    if text.chars().count() > 60 {
        text = text.chars().take(60).chain("...".chars()).collect();
    }
    Error::argument(name, expected, text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn settings_are_read_strictly() {
        assert_eq!(Policy::read(&json!({})).expect("defaults"), Policy::default());
        let all = json!({"criterion": "received", "ratio": 0.25, "layers": [2, 5], "positions": "renumbered",
            "action": "4bit", "min_prompt": 9, "seed": u64::MAX});
        let policy = Policy::read(&all).expect("good");
        assert_eq!(serde_json::to_value(&policy).expect("JSON"), all);
        assert_eq!(policy.layers, Some(vec![2, 5]));
        assert_eq!(Policy::read(&json!({"layers": null})).expect("good").layers, None);
        for (settings, word) in [
            (json!([]), "an object"),
            (json!({"rate": 0.3}), "tokens.rate"),
            (json!({"criterion": "best"}), "received"),
            (json!({"criterion": 1}), "a text"),
            (json!({"ratio": 1}), "below 1"),
            (json!({"ratio": 1.5}), "below 1"),
            (json!({"ratio": -0.1}), "at least 0"),
            (json!({"ratio": "0.3"}), "tokens.ratio"),
            (json!({"layers": []}), "at least one"),
            (json!({"layers": [3, 3]}), "ascending"),
            (json!({"layers": [4, 3]}), "ascending"),
            (json!({"layers": [-1]}), "tokens.layers"),
            (json!({"layers": [1.5]}), "tokens.layers"),
            (json!({"layers": 3}), "tokens.layers"),
            (json!({"positions": "new"}), "renumbered"),
            (json!({"action": "merge"}), "4bit"),
            (json!({"min_prompt": -1}), "min_prompt"),
            (json!({"seed": 0.5}), "seed"),
        ] {
            let message = Policy::read(&settings).expect_err(word).to_string();
            assert!(message.contains(word), "{settings}: {message}");
        }
        for ratio in [f64::NAN, f64::INFINITY, -f64::MIN_POSITIVE, 1.0] {
            assert!(Policy { ratio, ..Policy::default() }.check().is_err(), "{ratio}");
        }
    }
}
